"""From records to examples: their texts as token ids, their marks as ids to remove."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from absl import logging

from tnt_jax.data import feature_converters, records, tokenization

if TYPE_CHECKING:
    import seqio


def examples_from_records(
    rows: Sequence[records.Record],
    vocabulary: "seqio.Vocabulary",
    where: str,
    marks: str = "whole",
    loss_until: str = "end",
) -> list[feature_converters.Example]:
    """Tokenises and marks records; warns about spans that touch no token.

    Args:
        rows: the records.
        vocabulary: of inputs and targets.
        where: they come from, for the warning.
        marks: as in `datasets.RecordFiles`.
        loss_until: as in `datasets.RecordFiles`.

    Raises:
        UsageError: a record does not fit the vocabulary (`tokenization.mark_tokens`).
    """
    marked = [example_from_record(record, vocabulary, marks, loss_until) for record in rows]
    log_spans_without_token(sum(number for _, number in marked), where)
    return [example for example, _ in marked]


def example_from_record(
    record: records.Record, vocabulary: "seqio.Vocabulary", marks: str, loss_until: str
) -> tuple[feature_converters.Example, int]:
    """The tokenised record, and how many of its spans touch no token."""
    marked = tokenization.mark_tokens(record, vocabulary, marks)
    inputs = tokenization.encode(vocabulary, record.inputs, add_eos=True)
    example = feature_converters.Example(
        inputs=np.array(inputs, np.int32),
        targets=marked.target_ids,
        negative_pairs=marked.negative_pairs,
        loss_mask=feature_converters.loss_until(
            loss_until, marked.target_ids, marked.negative_pairs
        ),
        span_numbers=marked.span_numbers,
        id=record.id,
    )
    return example, marked.num_spans_without_token


def log_spans_without_token(number: int, where: str) -> None:
    """Warns about spans that mark nothing; `where` names the data set."""
    if number:
        logging.warning(
            "%s: %d negative spans touch no token (white space, or characters that the vocabulary "
            "drops) and mark nothing.",
            where,
            number,
        )
