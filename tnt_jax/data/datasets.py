"""Data sets that a run reads from files of records, without TensorFlow."""

import contextlib
import dataclasses
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
from absl import logging

from tnt_jax.data import marks, records, removed_everywhere
from tnt_jax.data.examples import (
    IS_CLEAN,
    Example,
    ExampleTable,
    says_removed,
    select_clean,
    subset,
)
from tnt_jax.data.layouts import checked_lengths, count_lost
from tnt_jax.runtime import console, files
from tnt_jax.runtime.errors import UsageError
from tnt_jax.tokenizers import tokenization


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecordFiles:
    """A data set of records in files.

    Attributes:
        files: a JSONL file, or a glob pattern.
        vocabulary: the tokeniser of inputs and targets.
        clean_per_marked: keeps at most this many examples without a mark for each one with marks;
            None keeps all.
        seed: random seed of the choice of examples without a mark.
        annotated: whether a record that nobody annotated is an error. False for plain fine-tuning.
        marks: "whole": every token of a span is negative; "first_token": its first one alone.
        loss_until: "end": all of a target is trained on; "first_negative": nothing after its first
            negative token.
        only_clean: leaves out every example in which something unwanted was said, for filtered
            fine-tuning and filtered distillation.
        examples_dir: a local folder that the examples of files of any size are kept in. None keeps
            those of one local file from 16 MiB on beside it; of several files, or of one in a
            bucket, where `load` is told of a folder.

    Raises:
        UsageError: settings contradict each other.
    """

    files: str
    vocabulary: tokenization.Tokeniser
    clean_per_marked: int | float | None = None
    seed: int = 0
    annotated: bool = True
    marks: str = "whole"
    loss_until: str = "end"
    # Notes of finished stages do not have it: `settings_json.describe`.
    only_clean: bool = dataclasses.field(default=False, metadata={"omit_default": True})
    examples_dir: str | None = dataclasses.field(default=None, metadata={"omit_default": True})

    def __post_init__(self):
        if self.only_clean and not self.annotated:
            raise UsageError(
                "only_clean needs annotated records, to know which are clean; found "
                "annotated=False. Set one of them otherwise."
            )
        if self.only_clean and self.clean_per_marked is not None:
            raise UsageError(
                "only_clean leaves out all examples with marks; expected clean_per_marked=None, "
                f"found {self.clean_per_marked}. Set one of them otherwise."
            )

    def removed_everywhere(self) -> tuple[int, ...]:
        """What the annotator of the records removes at every position of all of them."""
        return removed_everywhere.of_records(self.files)

    def load(
        self, task_feature_lengths: Mapping[str, int], model_dir: str | None = None
    ) -> Sequence[Example]:
        """All records, tokenised and marked: made now, or before and read where they lie.

        Args:
            task_feature_lengths: "inputs" and "targets", in tokens.
            model_dir: where examples that cannot lie beside their records may be kept.

        Raises:
            UsageError: a file, a record or the vocabulary has a mistake.
        """
        checked_lengths(task_feature_lengths)  # before the work
        tokenization.check_vocabulary(self.vocabulary)
        folders = self.folders(model_dir)
        examples = self.make(task_feature_lengths, folders) if folders else None
        if examples is not None:
            is_clean = (examples.column("flags") & IS_CLEAN) > 0
        else:
            if folders:
                console.log(
                    f"{self.files}: {' and '.join(folders)} cannot be written, so examples are "
                    "made in memory, by every process and at every start. Set EXAMPLES_DIR to a "
                    "local folder."
                )
            examples, is_clean = self._in_memory()
        if self.only_clean:
            examples = _clean(examples, is_clean, self.files)
        if self.clean_per_marked is not None:
            selection = select_clean(examples, self.clean_per_marked, self.seed)
            console.log(
                f"{self.files}: all {selection.num_marked} examples with marks and "
                f"{selection.num_clean_kept} of {selection.num_clean} without (clean_per_marked)."
            )
            examples = selection.examples
        log_lost(examples, task_feature_lengths, self.files)
        return examples

    def _in_memory(self) -> tuple[Sequence[Example], np.ndarray]:
        """The examples, and of each whether nothing unwanted was said in it."""
        rows = check_trainable(records.read_records(self.files), self.files, self.annotated)
        examples = marks.examples_from_records(
            rows, self.vocabulary, self.files, self.marks, self.loss_until
        )
        # A span may have no token, and a token may be marked without a span: by earlier rounds.
        is_clean = [
            not row.has_unwanted_text and not says_removed(example)
            for row, example in zip(rows, examples, strict=True)
        ]
        return examples, np.array(is_clean)

    def make(
        self, task_feature_lengths: Mapping[str, int], folders: Sequence[str]
    ) -> ExampleTable | None:
        """Opens the examples of all records in a folder, where they are made if need be.

        Args:
            task_feature_lengths: "inputs" and "targets", in tokens.
            folders: the first one that has them, or else the first one that can be written.

        Returns:
            The examples; None where no folder can be written.

        Raises:
            UsageError: a file, a record or the vocabulary has a mistake, or what is in a folder is
                damaged.
        """
        from tnt_jax.data import example_maker  # and with it the tokenisers of chat models

        checked_lengths(task_feature_lengths)  # before the work
        settings = {"marks": self.marks, "loss_until": self.loss_until, "annotated": self.annotated}
        plan = example_maker.make_plan(self.files, self.vocabulary, task_feature_lengths, settings)
        places = [pathlib.Path(folder).expanduser() for folder in folders]
        place = next((place for place in places if (place / plan.key).exists()), None)
        for folder in places if place is None else ():
            with contextlib.suppress(UsageError):
                files.check_directory(folder, "EXAMPLES_DIR")
                place = folder
                break
        if place is None:
            return None
        examples = example_maker.open_or_make(plan, place)
        marks.log_spans_without_token(examples.about.num_spans_without_token, self.files)
        return examples

    @property
    def can_be_kept(self) -> bool:
        """Whether a digest tells what the tokeniser does, and so what its examples are."""
        return isinstance(self.vocabulary, tokenization.Bytes) or any(
            hasattr(self.vocabulary, name)
            for name in ("sentencepiece_model_file", "tokenizer_digest")
        )

    def folders(self, model_dir: str | None = None) -> list[str]:
        """Where examples may be kept; none where they are made in memory.

        Raises:
            UsageError: `examples_dir` is no local folder, or no digest tells the tokeniser.
        """
        if self.examples_dir is not None:
            if files.is_remote(self.examples_dir):
                raise UsageError(
                    f"EXAMPLES_DIR: expected a local folder, found {self.examples_dir}. Set it to "
                    "one: examples are read row by row."
                )
            if not self.can_be_kept:
                raise UsageError(
                    "EXAMPLES_DIR: expected a tokeniser of this project, whose examples can be "
                    f"kept, found {type(self.vocabulary).__name__}. Set EXAMPLES_DIR to None: they "
                    "are made in memory then."
                )
            return [self.examples_dir]
        sizes = [files.size_of(file) for file in files.matching_files(self.files)]
        if sum(sizes) < _SMALLEST or not self.can_be_kept:
            return []
        beside = [f"{self.files}.examples"] if pathlib.Path(self.files).is_file() else []
        is_local = model_dir is not None and not files.is_remote(model_dir)
        return [*beside, *([f"{model_dir}/examples"] if is_local else [])]


# Bytes of records. Examples of fewer are made in two seconds, and take less memory than a model.
_SMALLEST = 2**24


def _clean(examples: Sequence[Example], is_clean: np.ndarray, path: str) -> Sequence[Example]:
    """The examples in which nothing unwanted was said; says how many others there were.

    Raises:
        UsageError: something unwanted was said in all of them.
    """
    kept = subset(examples, np.flatnonzero(is_clean))
    if not kept:
        raise UsageError(
            f"{path}: only_clean needs examples without marks, but something is marked in all "
            f"{len(examples)} of them. Give outputs to more prompts, or train on the marks."
        )
    console.log(
        f"{path}: {len(kept)} of {len(examples)} examples, those in which nothing is marked; "
        f"{len(examples) - len(kept)} are left out (only_clean)."
    )
    return kept


def check_trainable(rows: list[records.Record], path: str, annotated: bool) -> list[records.Record]:
    """Returns the records; raises a UsageError where one of them cannot be trained on."""
    for record in rows:
        records.check_trainable(record, path, annotated)
    return rows


def log_lost(
    examples: Sequence[Example],
    task_feature_lengths: Mapping[str, int],
    where: str,
) -> None:
    """Warns about what the feature lengths cut off; `where` names the data set."""
    lost = count_lost(examples, task_feature_lengths)
    if any(lost):
        logging.warning(
            "%s: with TASK_FEATURE_LENGTHS %s, %d inputs and %d targets of %d examples are cut; "
            "%d negative spans and %d ids to remove lie beyond the cut and are lost.",
            where,
            dict(task_feature_lengths),
            lost.num_inputs,
            lost.num_targets,
            len(examples),
            lost.num_spans,
            lost.num_marks,
        )
