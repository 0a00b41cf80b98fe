"""What the original says when it goes on from a prefix: values by Monte Carlo.

The value of a prefix is the probability that the original, going on from it, ends well. The share
of good ones among its sampled continuations estimates that without any training, at the price of
decoding each prefix many times. It is what `prefix_values` is checked against.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from tnt_jax.data import marks, records
from tnt_jax.models import decoding
from tnt_jax.models.model import Model
from tnt_jax.runtime import console
from tnt_jax.runtime.array_types import PyTree
from tnt_jax.tokenizers import tokenization


class Prefix(NamedTuple):
    """A record and how many tokens of its targets are given."""

    record: records.Record
    tokens: tuple[int, ...]


def sample(
    prefixes: Sequence[Prefix],
    model: Model,
    params: PyTree,
    vocabulary: Any,
    decoder: decoding.Decoding,
    *,
    num_samples: int,
    input_length: int,
    batch_size: int,
    seed: int,
) -> list[list[records.Record]]:
    """Continuations of each prefix, as whole outputs.

    Args:
      prefixes: What is given.
      model: The model that continues the prefixes.
      params: Its parameters.
      vocabulary: The tokeniser of inputs and outputs.
      decoder: How to choose tokens; a temperature of 1 samples from the model itself.
      num_samples: Continuations of each prefix.
      input_length: Tokens at which inputs are cut.
      batch_size: Continuations computed together.
      seed: Random seed. What is sampled depends on it, the record's id and the prefix's length.
    """
    jobs = [(index, number) for index in range(len(prefixes)) for number in range(num_samples)]
    inputs = [marks.prompt_ids(prefix.record, vocabulary) for prefix in prefixes]
    found: list[list[records.Record]] = [[] for _ in prefixes]
    starts = range(0, len(jobs), batch_size)
    for start in console.progress(starts, f"{len(jobs)} continuations, in batches", len(starts)):
        batch = jobs[start : start + batch_size]
        given = np.full((len(batch), decoder.max_length), -1, np.int32)
        names = []
        for row, (index, number) in zip(given, batch, strict=True):
            record, tokens = prefixes[index]
            row[: len(tokens)] = tokens
            names.append(f"{record.id}/{len(tokens)}/{number}")
        decoded = model.decode(
            params,
            [inputs[index] for index, _ in batch],
            input_length,
            decoder,
            batch_size,
            row_keys=decoding.record_keys(seed, names),
            prefixes=given,
        )
        for (index, _), row, name in zip(batch, np.asarray(decoded.tokens), names, strict=False):
            ids = tokenization.said(row, decoder.end_ids)
            found[index].append(
                records.Record(
                    id=name,
                    inputs=prefixes[index].record.inputs,
                    messages=prefixes[index].record.messages,
                    targets=vocabulary.decode(ids),
                    target_ids=ids,
                )
            )
    return found


def shares_of_good(
    outputs: Sequence[Sequence[records.Record]], is_good: Callable[[records.Record], bool]
) -> np.ndarray:
    """The share of good continuations of each prefix."""
    return np.array([np.mean([is_good(output) for output in of_one]) for of_one in outputs])
