"""The words of texts that are in nothing that an annotator may call unwanted."""

import collections
import itertools
from collections.abc import Sequence

from tnt_jax.annotators import interface, phrases
from tnt_jax.data import records
from tnt_jax.data import words as words_of

# Words look alike that share so many letters at their beginning: a token may begin both.
_NUM_ALIKE = 4
_MOST_RECORDS = 20_000
_ALIKE_COUNTS_FROM = 5  # outputs: two of them may have made the same slip


def words(input: str, annotator: interface.Annotator | interface.Mask) -> tuple[str, ...]:
    """The ordinary words of outputs: those outside of all that the annotator may call unwanted.

    Of the first 20,000 records, a word counts that is in a thousandth of them, and in two: a rarer
    one may be an unwanted one, misspelt. One that looks like unwanted words ("Michel", like
    "Michelin") counts from five outputs on, unless the unwanted ones are in less than ten times as
    many as it.

    Args:
      input: A JSONL file (or glob) of records with targets.
      annotator: One that does not know innocent words marks each record to find them.
    """
    counts: collections.Counter[str] = collections.Counter()
    num_alike: collections.Counter[str | None] = collections.Counter()
    num_read = 0
    for row in itertools.islice(records.iterate(input), _MOST_RECORDS):
        num_read += 1
        outside = _outside(row, annotator)
        if outside is None:
            continue
        counts.update(set(outside))
        unwanted = collections.Counter(map(str.lower, words_of.texts(row.targets)))
        unwanted.subtract(map(str.lower, outside))
        num_alike.update({_beginning(word) for word in +unwanted} - {None})
    least = max(2, num_read / 1000)
    found = [
        word
        for word, count in sorted(counts.items())
        if count >= max(least, min(_ALIKE_COUNTS_FROM, num_alike[_beginning(word)] / 10))
    ]
    return phrases.forms(found)


def _outside(
    row: records.Record, annotator: interface.Annotator | interface.Mask
) -> Sequence[str] | None:
    """The words of a record's targets that are in nothing that the annotator calls unwanted.

    None where it does not know the record.
    """
    if isinstance(annotator, interface.KnowsInnocentWords):
        return annotator.innocent_words(row.targets)
    found = annotator.annotate(row) if isinstance(annotator, interface.Annotator) else None
    if found is None:
        return None
    return [
        row.targets[start:end].lower()
        for start, end in words_of.extents(row.targets)
        if not any(span.start < end and start < span.end for span in found.spans)
    ]


def _beginning(word: str) -> str | None:
    """What words that look like this one begin with; None where it is too short to say."""
    return word[:_NUM_ALIKE].lower() if len(word) >= _NUM_ALIKE else None


def of_prompt(row: records.Record, annotator: interface.Annotator | interface.Mask) -> set[str]:
    """The ordinary words of what a model is given: an output may well repeat them.

    There are none where the annotator does not know innocent words.
    """
    if not isinstance(annotator, interface.KnowsInnocentWords):
        return set()
    texts = dict.fromkeys([row.inputs, *(content for _, content in row.messages)])
    return {word for text in texts for word in annotator.innocent_words(text)}
