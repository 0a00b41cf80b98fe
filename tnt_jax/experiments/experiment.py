"""What the arms of an experiment share: an original, prompts, an annotator, programs with settings.

`pipeline` and `sweep` are made of this; `experiment_run` runs its stages.
"""

import dataclasses
import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tnt_jax import objectives
from tnt_jax.data import datasets
from tnt_jax.evaluation import results
from tnt_jax.generate import MaskPlace
from tnt_jax.models import decoding
from tnt_jax.runtime import files
from tnt_jax.runtime.errors import UsageError

# Folders under output_dir, beside those of the arms.
TRAINING_OUTPUTS = "training_outputs"
FOLDERS = ("original", TRAINING_OUTPUTS, "stages", results.MASK)


def path_in(*, folder: str, name: str) -> str:
    """The path of a file, or of a folder, within a folder: gin itself joins no texts.

    So a gin file names a folder once, and a flag that sets another moves all that is in it.

    Args:
      folder: A local folder, or one in a bucket.
      name: The name of a file or folder in it.
    """
    return os.path.join(folder, name)  # noqa: PTH118 - pathlib makes gs:/ of gs://


@dataclasses.dataclass(frozen=True, kw_only=True)
class NewOriginal:
    """How to make an original where there is none yet.

    Attributes:
      records: The pairs to train on, a JSONL file.
      vocabulary_path: The sentencepiece model to train on their text.
      vocab_size: Size of that vocabulary, in ids.
      train: `train.train` with its settings bound.
    """

    records: str
    vocabulary_path: str
    vocab_size: int
    train: Callable[..., Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Changes:
    """Settings of an arm's training that differ from those of the experiment.

    Attributes:
      train: Further arguments of `train.train`.
      update: Further arguments of `settings.Update`.
      schedule: Further arguments of `settings.Schedule`.
      dataset: Further arguments of `datasets.RecordFiles`.
    """

    train: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    update: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    schedule: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    dataset: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to update the original.

    Attributes:
      name: Its name, in tables and of its folder.
      objective: The loss per token.
      dataset: Further arguments of `datasets.RecordFiles`, such as `{"only_clean": True}`.
    """

    name: str
    objective: objectives.TntObjective
    dataset: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def changes(self) -> Changes:
        """What its training has otherwise than the experiment."""
        return Changes(dataset=self.dataset)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """The settings that all arms of an experiment share.

    Attributes:
      output_dir: The folder of all files of the run.
      train_prompts: Inputs to generate training outputs from: a file (or glob) of records, or a
        `tasks.SeqioDataset`.
      eval_prompts: Other inputs, for the evaluation.
      vocabulary: Makes the vocabulary; called when its file is there.
      annotator: Makes the annotator; called when its files are there.
      decoders: How to choose tokens, by the decoder's name; outputs of all decoders are evaluated.
      train: Trains an arm: `train.train` with its settings bound.
      original_choice: Makes `settings.OriginalChoice`: where the original's logits come from, and
        what is trained.
      update: Makes `settings.Update`: how an update is computed.
      schedule: Makes `settings.Schedule`: where training starts and how long it goes on.
      generate: Writes a model's outputs: `generate.generate` with its settings bound.
      annotate: Marks outputs: `annotate.annotate` with its settings bound.
      evaluate: Compares outputs: `evaluate.evaluate` with its settings bound.
      certificate: Makes `evaluate.Certificate`: what it takes to run both models on the same
        outputs.
      unrelated_prompts: Prompts of other tasks, of which nothing is learned: an update should not
        change what is said to them. They are answered with the first decoder. None: there are none.
      corpus: Writes the prompts and what else is missing, such as `corpora.venues` with its
        `output_dir` bound; None: the files are there.
      original_checkpoint_path: The original's checkpoint.
      new_original: How to make one, in place of `original_checkpoint_path`.
      clean_per_marked: Most training outputs without a mark for each one with marks; None keeps
        all. Arms with `only_clean` take all clean ones.
      marks: "whole": every token of a marked span is negative; "first_token": its first one alone.
      loss_until: "end": all of an output is trained on; "first_negative": nothing after its first
        negative token.
      mask_decoding: Also generates with the original while what is unwanted is masked, to compare
        every arm with that. None does so where the annotator knows beforehand what it would mark
        (`interface.Mask`).
      mask_place: Makes `generate.MaskPlace`: which token of a masked text is removed.
      training_decoders: The names of the decoders that make the training outputs; empty is the
        first. Outputs of several are brought together as those of rounds are.
      training_records: A file of annotated outputs to learn from, instead of the original's outputs
        for `train_prompts`; None: those.

    Raises:
      UsageError: Settings contradict each other.
    """

    output_dir: str
    train_prompts: Any
    eval_prompts: Any
    vocabulary: Callable[[], Any]
    annotator: Callable[[], Any]
    decoders: Mapping[str, decoding.Decoding]
    train: Callable[..., Any]
    original_choice: Callable[..., Any]
    update: Callable[..., Any]
    schedule: Callable[..., Any]
    generate: Callable[..., Any]
    annotate: Callable[..., Any]
    evaluate: Callable[..., Any]
    certificate: Callable[..., Any]
    unrelated_prompts: Any = None
    corpus: Callable[[], Any] | None = None
    original_checkpoint_path: str | None = None
    new_original: NewOriginal | None = None
    clean_per_marked: int | float | None = None
    marks: str = "whole"
    loss_until: str = "end"
    mask_decoding: bool | None = None
    mask_place: Callable[..., Any] = MaskPlace
    training_decoders: Sequence[str] = ()
    training_records: str | None = None

    def __post_init__(self):
        if (self.original_checkpoint_path is None) == (self.new_original is None):
            raise UsageError(
                "Experiment: expected either original_checkpoint_path or new_original, found "
                f"{'neither' if self.new_original is None else 'both'}."
            )
        if not self.decoders:
            raise UsageError("Experiment.decoders: expected at least one, found none.")
        if strange := [name for name in self.training_decoders if name not in self.decoders]:
            raise UsageError(
                f"TRAINING_DECODERS: expected some of DECODERS, {', '.join(self.decoders)}; found "
                f"{', '.join(strange)}."
            )
        if files.is_remote(self.output_dir):
            raise UsageError(
                "OUTPUT_DIR: expected a local folder, for programs share its many files; found "
                f"{self.output_dir}. Copy it afterwards; train's MODEL_DIR may be in a bucket."
            )

    @property
    def folder(self) -> str:
        """`output_dir`, without `~` at its start."""
        return from_home(self.output_dir)

    def check_arm(
        self, name: str, make_objective: Callable[[], objectives.TntObjective], changes: Changes
    ) -> None:
        """Makes all that an arm's training is told, so that a mistake in it is known beforehand.

        What depends on the devices is not looked at: where all is done, nothing is trained on them.

        Args:
          name: The arm's name.
          make_objective: Makes its loss per token.
          changes: Settings that differ from those of the experiment.

        Raises:
          UsageError: A setting does not fit, or is none.
        """
        try:
            made = self.arguments_of_training(
                make_objective(), files="", vocabulary=None, original=None, changes=changes
            )
            if changes.train:
                inspect.signature(self.train).bind_partial(**made)
            self.mask_place()
            self.certificate(original_checkpoint_path="", checkpoint_path="")
        except TypeError as error:  # a name that no such settings have
            raise UsageError(f"arm {name!r}: {error}") from error

    def arguments_of_training(
        self,
        objective: objectives.TntObjective,
        *,
        files: str,
        vocabulary: Any,
        original: str | None,
        changes: Changes,
        start: str | None = None,
    ) -> dict[str, Any]:
        """The arguments of `train.train`, but for the folder.

        Args:
          objective: The loss per token.
          files: Annotated outputs to learn from.
          vocabulary: The tokeniser.
          original: The original's checkpoint.
          changes: Settings that differ from those of the experiment.
          start: A checkpoint to go on from; None: the original.
        """
        dataset = datasets.RecordFiles(
            **{
                "files": files,
                "vocabulary": vocabulary,
                # An arm of clean outputs alone has no marked ones to take them in proportion to.
                "clean_per_marked": (
                    None if changes.dataset.get("only_clean") else self.clean_per_marked
                ),
                "marks": self.marks,
                "loss_until": self.loss_until,
                **changes.dataset,
            }
        )
        return {
            "objective": objective,
            "dataset": dataset,
            "original_choice": self.original_choice(path=original),
            "update": self.update(**changes.update),
            "schedule": self.schedule(**{**changes.schedule, "start_path": start}),
            **changes.train,
        }

    def check_names(self, names: Sequence[str]) -> None:
        """Checks the names of the arms, which become names of folders.

        Raises:
          UsageError: There is none, or two are the same, or one is that of another folder.
        """
        if not names or len({*names, *FOLDERS}) != len(names) + len(FOLDERS):
            raise UsageError(
                "expected arms whose names differ from each other and from "
                f"{', '.join(FOLDERS)}; found {list(names)}."
            )


def check_rounds(experiment: Experiment, num_rounds: int, name: str = "NUM_ROUNDS") -> None:
    """Raises a UsageError, which names that setting, unless so many rounds can be made."""
    if num_rounds < 1:
        raise UsageError(f"{name}: expected at least 1, found {num_rounds}.")
    if num_rounds > 1 and experiment.train_prompts is None:
        raise UsageError(
            f"{name}: expected 1 where TRAIN_PROMPTS is None, found {num_rounds}: a further round "
            "generates anew. Give the prompts of the TRAINING_RECORDS as TRAIN_PROMPTS, too."
        )


def name_of_round(name: str, number: int) -> str:
    """The name of an arm's round, counted from 1: of its folder and its stages."""
    return name if number == 1 else f"{name}.round{number}"


def from_home(path: str) -> str:
    """A path without `~`, also for a caller from Python, whose settings no program expanded.

    What opens a path expands that itself; what asks for it by its name does not.
    """
    return os.path.expanduser(path)  # noqa: PTH111 - Path's raises where there is no such home
