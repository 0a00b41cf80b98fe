"""The words of texts that are in nothing that an annotator may call unwanted."""

import collections
import itertools

from tnt_jax.annotators import interface, phrases
from tnt_jax.data import records


def words(
    input: str, annotator: interface.Annotator | interface.Mask, num_records: int = 20_000
) -> tuple[str, ...]:
    """The ordinary words of outputs: those outside of all that the annotator may call unwanted.

    Args:
      input: A JSONL file (or glob) of records with targets.
      annotator: One without `innocent_words` knows none.
      num_records: The first so many records are read. A word counts that is in a thousandth of
        them, and in two: a rarer one may be an unwanted one, misspelt.
    """
    if not hasattr(annotator, "innocent_words"):
        return ()
    counts: collections.Counter[str] = collections.Counter()
    num_read = 0
    for row in itertools.islice(records.iterate(input), num_records):
        num_read += 1
        counts.update(set(annotator.innocent_words(row.targets)))  # pyright: ignore
    least = max(2, num_read / 1000)
    return phrases.forms(sorted(word for word, count in counts.items() if count >= least))


def of_prompt(row: records.Record, annotator: interface.Annotator | interface.Mask) -> set[str]:
    """The ordinary words of what a model is given: an output may well repeat them.

    An annotator without `innocent_words` knows none.
    """
    if not hasattr(annotator, "innocent_words"):
        return set()
    texts = dict.fromkeys([row.inputs, *(content for _, content in row.messages)])
    return {word for text in texts for word in annotator.innocent_words(text)}  # pyright: ignore
