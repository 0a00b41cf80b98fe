"""A gin file of a pipeline that says what was chosen, and why; a user's own settings win."""

import os
import pathlib
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from tnt_jax.experiments.experiment import Experiment
from tnt_jax.patching.choices import UNKNOWN, Choice
from tnt_jax.patching.search import ROUNDS, Found
from tnt_jax.patching.unwanted import Unwanted
from tnt_jax.runtime import files, gin_files
from tnt_jax.runtime.errors import UsageError

DECODERS = {
    "greedy": '{"greedy": @decoding.Decoding()}',
    "sampled": '{"sampled": @sampled/decoding.Decoding()}',
    "both": '{"greedy": @decoding.Decoding(), "sampled": @sampled/decoding.Decoding()}',
}
WEIGHT = "tnff/objectives.TntObjective.negative_weight"

# Settings whose references rules know by name.
_KNOWN_BY_NAME = ("OPTIMIZER", "LEARNING_RATE")

# Flags of `patch` say these.
_OF_FLAGS = {
    "ORIGINAL_CHECKPOINT_PATH": "--model",
    "TRAIN_PROMPTS": "--prompts",
    "EVAL_PROMPTS": "--eval_prompts",
    "TRAINING_RECORDS": "--records",
    "OUTPUT_DIR": "--output",
}


class PipelineGin:
    """Writes the gin file of a pipeline, and knows what the user has set.

    Attributes:
      path: Where the file is: "so_far.gin" until all is found, then "pipeline.gin".
      given: The user's settings, by name, each as a `Choice` has it; `UNKNOWN` where rules cannot
        count with the value.
      is_all_chosen: Whether the optimizer and its rate are in the file.
    """

    def __init__(
        self,
        *,
        model: str,
        folder: pathlib.Path,
        unwanted: Unwanted,
        decoding: str,
        own_files: Sequence[str],
        settings: Sequence[str],
    ):
        """Reads the user's files.

        Args:
          model: The original: a path, or a name on the hub.
          folder: The run's folder; prompts are in prompts/ there.
          unwanted: What the model must not say.
          decoding: A name of `DECODERS`.
          own_files: The user's own gin files.
          settings: The user's own settings, "NAME=VALUE".

        Raises:
          UsageError: A file or a setting is no gin, or sets what a flag says.
        """
        self._model = os.path.realpath(model) if pathlib.Path(model).exists() else model
        self._folder, self._unwanted, self._decoding = folder, unwanted, decoding
        self._settings = [setting.partition("=")[::2] for setting in settings]
        self.path = folder / "so_far.gin"
        self._prompts = {
            name: str(folder / "prompts" / f"{name}.jsonl") for name in ("train", "report")
        }
        self._records = self._prompts["train"] if unwanted.are_outputs_given else None
        own = gin_files.Settings([pathlib.Path(), gin_files.ROOT, gin_files.GIN_CONFIGS])
        self._files = [own.add_file(name, given_by="--gin_file") for name in own_files]
        for name, value in self._settings:
            if name in _OF_FLAGS:
                raise UsageError(
                    f"--gin.{name}: {_OF_FLAGS[name]} sets this. Use that, and leave this out."
                )
            own.add_binding(name, value)
        self._imports = own.imports_for_bindings()[1:]
        self.given = {name: _plain(name, value, own.values) for name, value in own.values.items()}
        self._updates = 1
        self.is_all_chosen = False

    @property
    def flags(self) -> list[str]:
        """The user's own settings, as they were given."""
        return [f"--gin.{name}={value}" for name, value in self._settings]

    @property
    def is_weight_given(self) -> bool:
        """Whether the weight of the negative term is the user's."""
        return WEIGHT in self.given or "ARMS" in self.given

    def write(
        self, chosen: Sequence[Choice], found: Found | None = None, *, has_own: bool = True
    ) -> None:
        """Writes the gin file.

        Args:
          chosen: The settings to write.
          found: What the search came to, if it is over.
          has_own: Whether the user's files and settings are at its end.
        """
        if found is not None:
            self.path.unlink(missing_ok=True)
            self.path = self._folder / "pipeline.gin"
        self.is_all_chosen = any(choice.macro == "LEARNING_RATE" for choice in chosen)
        lines = [
            f"{gin_files.MADE}patch did, for pipeline: the same model, bit for bit.",
            f"#   {self.command}",
            "",
            "from __gin__ import dynamic_registration",
            "",
            "import optax",
            "from tnt_jax import annotators",
            "from tnt_jax.experiments import experiment",
            "from tnt_jax.models import decoding",
            "from tnt_jax import objectives",
            "from tnt_jax.training import optimizers",
            *self._imports,
            "",
            'include "models/from_checkpoint.gin"',
            'include "runs/pipeline.gin"',
            "",
            f"ORIGINAL_CHECKPOINT_PATH = {self._model!r}",
            f"TRAIN_PROMPTS = {self._prompts['train']!r}",
            f"EVAL_PROMPTS = {self._prompts['report']!r}",
            f"OUTPUT_DIR = {str(self._folder)!r}",
            *self._unwanted.gin_lines(self._folder),
            f"DECODERS = {DECODERS[self._decoding]}",
        ]
        if self._decoding == "both":
            lines.append('TRAINING_DECODERS = ["greedy", "sampled"]')
        lines += [
            "ARMS = [@tnff/experiment.Arm()]",
            "# What a mask would leave is not compared with: it takes as long as the last answers.",
            "MASK_DECODING = False",
        ]
        for choice in chosen:
            if not choice.is_given:
                lines += ["", f"# {choice.what}: {choice.reason}"]
                lines += [f"{choice.macro} = {choice.text}", *choice.bindings]
        attempt, updates = (found.best.attempt, found.best.updates) if found else (ROUNDS[0], 1)
        lines += ["", f"# {_about(found)}"]
        lines += [f"{WEIGHT} = {attempt.weight!r}", f"TRAIN_STEPS = {updates}"]
        self._updates = updates
        if found and attempt.round > 1:
            self._records = found.files
            lines += [
                f"# The outputs of {attempt.round} rounds together",
                f"TRAINING_RECORDS = {self._records!r}",
            ]
        if has_own and (self._files or self._settings):
            lines += ["", "# Given"]
            lines += [f"include {str(file.absolute())!r}" for file in self._files]
            lines += [f"{name} = {gin_files.as_gin(value)}" for name, value in self._settings]
        files.write_text(self.path, "\n".join(lines) + "\n")

    def check(self, experiment: Experiment) -> None:
        """Checks that the user's files and settings, which come last, leave what flags say.

        Args:
          experiment: What gin makes of the file that was written, and of the user's.

        Raises:
          UsageError: A setting of the user's says what a flag does.
        """
        for name, found, written in (
            ("ORIGINAL_CHECKPOINT_PATH", experiment.original_checkpoint_path, self._model),
            ("TRAIN_PROMPTS", experiment.train_prompts, self._prompts["train"]),
            ("EVAL_PROMPTS", experiment.eval_prompts, self._prompts["report"]),
            ("TRAINING_RECORDS", experiment.training_records, self._records),
            ("OUTPUT_DIR", experiment.output_dir, str(self._folder)),
        ):
            if found != written:
                raise UsageError(
                    f"{name}: {_OF_FLAGS[name]} sets this, and a --gin_file or a --gin.NAME=VALUE "
                    f"has set it to {found!r}. Leave it out there."
                )
        updates = self.given.get("TRAIN_STEPS", self._updates)
        found = experiment.schedule(start_path=None).train_steps
        if found != updates:
            raise UsageError(
                f"TRAIN_STEPS: expected it given as a number or not at all, found {found} in a "
                "--gin_file or a --gin.NAME=VALUE. Give --gin.TRAIN_STEPS=N, or leave it out: "
                "patch finds it."
            )

    @property
    def command(self) -> str:
        """The pipeline that does the same in another folder."""
        return (
            f"python -m tnt_jax.pipeline --gin_file={shlex.quote(str(self.path))} "
            f"--gin.OUTPUT_DIR={shlex.quote(f'{self._folder}-again')}"
        )


def _about(found: Found | None) -> str:
    if found is None:
        return "Not found yet"
    enough = "The largest cut of the looks that were enough and within one BLEU of the highest"
    return enough if found.is_enough else "The largest cut"


def _plain(name: str, value: Any, values: Mapping[str, Any], depth: int = 8) -> Any:
    """A value that rules can count with; `UNKNOWN` for other references and what is required.

    Args:
      name: Name of the setting.
      value: Value of the setting.
      values: All settings of the user: a macro among them stands for its value.
      depth: How many steps, into macros and into values within values, are followed.
    """
    if isinstance(value, gin_files.Reference):
        if value.text[0] == "%" and value.text[1:] in values and depth:
            return _plain(name, values[value.text[1:]], values, depth - 1)
        return value.text if name in _KNOWN_BY_NAME and value.text[0] == "@" else UNKNOWN
    if isinstance(value, list | tuple | dict):
        inside = value.values() if isinstance(value, dict) else value
        found = [_plain(name, part, values, depth - 1) for part in inside] if depth else [UNKNOWN]
        if UNKNOWN in found:
            return UNKNOWN
        if isinstance(value, dict):
            return dict(zip(value, found, strict=True))
        return type(value)(found)
    return value if value is None or isinstance(value, bool | int | float | str) else UNKNOWN
