"""Data sets that a run reads from files of records, without TensorFlow."""

import dataclasses
from collections.abc import Mapping, Sequence

from absl import logging

from tnt_jax.data import marks, records, removed_everywhere, tokenization
from tnt_jax.data.examples import Example, says_removed, select_clean
from tnt_jax.data.layouts import count_lost
from tnt_jax.runtime import console
from tnt_jax.runtime.errors import UsageError


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecordFiles:
    """A data set of records in files.

    Attributes:
        files: a JSONL file, or a glob pattern.
        vocabulary: of inputs and targets.
        clean_per_marked: keeps at most this many examples without a mark for each one with marks;
            None keeps all.
        seed: of that choice.
        annotated: whether a record that nobody annotated is an error. False for plain fine-tuning.
        marks: "whole": every token of a span is negative; "first_token": its first one alone.
        loss_until: "end": all of a target is trained on; "first_negative": nothing after its first
            negative token.
        only_clean: leaves out every example in which something unwanted was said, for filtered
            fine-tuning and filtered distillation.

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

    def load(self, task_feature_lengths: Mapping[str, int]) -> list[Example]:
        """Reads, tokenises and marks all records.

        Raises:
            UsageError: a file, a record or the vocabulary has a mistake.
        """
        tokenization.check_vocabulary(self.vocabulary)
        rows = check_trainable(records.read_records(self.files), self.files, self.annotated)
        examples = marks.examples_from_records(
            rows, self.vocabulary, self.files, self.marks, self.loss_until
        )
        if self.only_clean:
            examples = _clean(rows, examples, self.files)
        if self.clean_per_marked is not None:
            selection = select_clean(examples, self.clean_per_marked, self.seed)
            console.log(
                f"{self.files}: all {selection.num_marked} examples with marks and "
                f"{selection.num_clean_kept} of {selection.num_clean} without (clean_per_marked)."
            )
            examples = selection.examples
        log_lost(examples, task_feature_lengths, self.files)
        return examples


def _clean(
    rows: Sequence[records.Record], examples: Sequence[Example], files: str
) -> list[Example]:
    """The examples in which nothing unwanted was said; says how many others there were.

    Raises:
        UsageError: something unwanted was said in all of them.
    """
    kept = [
        example
        for row, example in zip(rows, examples, strict=True)
        # A span may have no token, and a token may be marked without a span: by earlier rounds.
        if not row.negative_spans and not says_removed(example)
    ]
    if not kept:
        raise UsageError(
            f"{files}: only_clean needs examples without marks, but something is marked in all "
            f"{len(examples)} of them. Give outputs to more prompts, or train on the marks."
        )
    console.log(
        f"{files}: {len(kept)} of {len(examples)} examples, those in which nothing is marked; "
        f"{len(examples) - len(kept)} are left out (only_clean)."
    )
    return kept


def check_trainable(
    rows: list[records.Record], files: str, annotated: bool
) -> list[records.Record]:
    """Returns the records; raises a UsageError where one of them cannot be trained on."""
    for record in rows:
        if not record.targets and record.target_ids is None:
            raise UsageError(
                f"{files}: record {record.id!r} has no targets. Expected outputs of the original "
                "model (tnt_jax.generate writes them), not prompts."
            )
        if annotated and record.negative_spans is None and not record.negative_token_ids:
            raise UsageError(
                f"{files}: record {record.id!r} has no negative_spans: nobody annotated it. Run "
                "tnt_jax.annotate on the file, or set ANNOTATED (RecordFiles.annotated) to False "
                "to train on it as it is."
            )
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
