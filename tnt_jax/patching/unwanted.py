"""What a model must not say, as a user names it, and the annotator that marks it."""

import dataclasses
import os
import pathlib

from tnt_jax.runtime.errors import UsageError

MARKED_TEXTS = "marked_texts.txt"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unwanted:
    """What the model must not say: exactly one of these.

    Attributes:
      words: A list of words and phrases, one a line (`annotators.Lexicon`).
      values: A gazetteer: values that are unwanted where the prompt does not state them.
      spans: What people marked in outputs that the prompts' records have as `targets`.
      entities: Names that the prompt does not support.
      classifier: The words that make a classifier call an output unwanted.
      function: "module:function", from (inputs, targets) to (start, end) pairs.
      labels: The field of the prompts' records that is true where their `targets` are bad: which
        tokens made them so is found (`localize`).
      records: Outputs that are marked already; their prompts are the prompts.

    Raises:
      UsageError: None is set, or several are.
    """

    words: str | None = None
    values: str | None = None
    spans: str | None = None
    entities: bool = False
    classifier: bool = False
    function: str | None = None
    labels: str | None = None
    records: str | None = None

    def __post_init__(self):
        names = [field.name for field in dataclasses.fields(self)]
        found = [f"--{name}" for name in names if getattr(self, name)]
        if len(found) != 1:
            raise UsageError(
                f"expected one of {', '.join(f'--{name}' for name in names)}, which say what is "
                f"unwanted; found {' and '.join(found) or 'none'}."
            )

    @property
    def kind(self) -> str:
        """The name of the attribute that is set."""
        return next(field.name for field in dataclasses.fields(self) if getattr(self, field.name))

    @property
    def file(self) -> str | None:
        """The path of the file that is named; None where this kind names none."""
        has_file = self.kind in ("words", "values", "spans", "records")
        return os.path.expanduser(getattr(self, self.kind)) if has_file else None  # noqa: PTH111

    @property
    def are_outputs_given(self) -> bool:
        """Whether the outputs to learn from are given, and not made."""
        return self.kind in ("spans", "labels", "records")

    def gin_lines(self, folder: pathlib.Path) -> list[str]:
        """The annotator, as settings of a pipeline.

        Args:
          folder: That has `MARKED_TEXTS` and prompts/train.jsonl, where outputs are given.
        """
        name, argument, value = {
            "words": ("Lexicon", "path", self._absolute),
            "values": ("Gazetteer", "path", self._absolute),
            "entities": ("Entities", None, None),
            "classifier": ("Classifier", None, None),
            "function": ("PythonFunction", "function", self.function),
        }.get(self.kind, ("Lexicon", "path", str(folder / MARKED_TEXTS)))
        lines = [f"ANNOTATOR = @annotators.{name}"]
        if argument is not None:
            lines.append(f"annotators.{name}.{argument} = {value!r}")
        if self.are_outputs_given:
            lines.append(f"TRAINING_RECORDS = {str(folder / 'prompts' / 'train.jsonl')!r}")
        return lines

    @property
    def _absolute(self) -> str | None:
        return None if self.file is None else str(pathlib.Path(self.file).absolute())
