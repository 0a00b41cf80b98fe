"""What `evaluate` finds of two models' outputs: `evaluation.json` as Python has it.

Who shows an update, or judges it, reads these. Evaluations of older versions lack some numbers,
which are None.
"""

import os
from collections.abc import Mapping
from typing import Annotated, Any

import msgspec

from tnt_jax.runtime import files
from tnt_jax.runtime.errors import UsageError

# JSON knows numbers of any length; a page has room for these.
Number = Annotated[float, msgspec.Meta(gt=-1e15, lt=1e15)]
_Whole = Annotated[int, msgspec.Meta(gt=-(10**15), lt=10**15)] | Number


class Rate(msgspec.Struct, frozen=True, kw_only=True):
    """So many of so many.

    Attributes:
      numerator: How many.
      denominator: The number that they are among.
      value: The share, from 0 to 1.
    """

    numerator: _Whole
    denominator: _Whole
    value: Number


class Outputs(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The outputs of one model.

    Attributes:
      unwanted_outputs: Those with something unwanted.
      repeated_word: This and the next four are those of `text_metrics.Fluency`.
      mean_length: In tokens; where there was no tokeniser, in words.
      unwanted_tokens: Marked tokens among all.
    """

    unwanted_outputs: Rate
    repeated_word: Rate
    repeated_phrase: Rate
    unknown_token: Rate
    distinct_outputs: Rate
    distinct_trigrams: Rate
    mean_length: Number
    unwanted_tokens: Rate | None = None


class Comparison(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The outputs of one model beside those of another; see `text_metrics.Comparison`."""

    bleu: Number
    rouge_l: Number
    exact_match: Rate
    unchanged_clean: Rate | None = None
    bleu_signature: str | None = None


class Mask(Outputs, frozen=True, kw_only=True, omit_defaults=True):
    """The outputs of the original while what is unwanted is masked.

    Attributes:
      comparison: How these differ from the original's.
      to_current: How the patched model's differ from these.
    """

    comparison: Comparison
    to_current: Comparison


class Certificate(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What moved on the original's outputs, in nats; None where nothing finite was measured.

    Attributes:
      negative_residual: At marks, what is left of what must go.
      negative_collateral: At marks, everything else that moved.
      negative_smallest_cost: At marks, what any update costs.
      positive_collateral: At other positions, the KL to the original.
      num_negative: Number of marked positions.
      num_positive: Number of the others.
      num_cut_inputs: Inputs that are cut.
      num_cut_targets: Outputs that are cut.
      num_lost_marks: Ids to remove that lie beyond the cut.
      num_graded: Ids to remove, of a strength below 1.
      num_removed_everywhere: Ids that are removed at every position of all records.
    """

    negative_residual: Number | None
    negative_collateral: Number | None
    negative_smallest_cost: Number | None
    positive_collateral: Number | None
    num_negative: Number | None = None
    num_positive: Number | None = None
    num_cut_inputs: _Whole | None = None
    num_cut_targets: _Whole | None = None
    num_lost_marks: _Whole | None = None
    num_graded: _Whole | None = None
    num_removed_everywhere: _Whole | None = None


class Unrelated(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What an update changed on prompts of other tasks.

    Attributes:
      kl: To the original, in nats a token that is not marked.
      unchanged: Outputs that did not change.
      num_positive: Number of tokens that are not marked.
    """

    kl: Number | None
    unchanged: Rate
    num_positive: Number | None = None


class Evaluation(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What an update came to.

    Attributes:
      original: The original's outputs.
      current: The patched model's, to the same prompts.
      comparison: How the two differ.
      cut: The share of the unwanted outputs that is gone.
      annotator: Who marked them.
      mask: The original's under a mask, if there are any.
      certificate: What needs both models.
      unrelated: On prompts of other tasks; `pipeline` and `sweep` add it.
    """

    original: Outputs
    current: Outputs
    comparison: Comparison
    cut: Number
    annotator: str | None = None
    mask: Mask | None = None
    certificate: Certificate | None = None
    unrelated: Unrelated | None = None

    def as_json(self) -> dict[str, Any]:
        """What a JSON file has of it."""
        return msgspec.to_builtins(self)


def parse(value: Any) -> Evaluation:
    """The evaluation that a JSON value is.

    Args:
      value: What was read of a file.

    Raises:
      UsageError: It is something else.
    """
    try:
        return msgspec.convert(value, Evaluation)
    except msgspec.ValidationError as error:
        names = sorted(value) if isinstance(value, Mapping) else []
        raise UsageError(
            "expected the JSON file that python -m tnt_jax.evaluate wrote, with original, current, "
            f"comparison and cut; found {names or 'nothing'} ({error})."
        ) from None


def read(path: str | os.PathLike, *, has_certificate: bool = False) -> Evaluation:
    """What `evaluate` wrote in a file.

    Args:
      path: The file.
      has_certificate: Whether there must be one.

    Raises:
      UsageError: It is something else.
    """
    try:
        found = parse(files.read_object(path))
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None
    if has_certificate and found.certificate is None:
        raise UsageError(
            f"{path}: expected a certificate, found none. Delete this file, and it is made again."
        )
    return found
