"""Finds the names that a text denies, as `family-friendly: no` denies "family-friendly"."""

import re
from collections.abc import Iterable, Iterator, Sequence

from tnt_jax.annotators import phrases
from tnt_jax.data import words

# Between a name and its value; `->` is two words.
_SEPARATORS = frozenset(":=|[(" + "\uff1a\uff1d\uff5c\uff3b\uff08")
_QUOTES = frozenset(
    "\"'\u2018\u2019\u201a\u201c\u201d\u201e\u00ab\u00bb\u2039\u203a\u300c\u300d\u300e\u300f"
)
_EMPHASIS = frozenset("*`")
# Around a name, and around a value. The second of each pair is of full width.
_OPENING = _QUOTES | _EMPHASIS | frozenset("([{" + "\uff08\uff3b\uff5b")
_CLOSING = _QUOTES | _EMPHASIS | frozenset(")]}" + "\uff09\uff3d\uff5d")
_ENDS = _QUOTES | frozenset(",;.|)]}" + "\uff0c\uff1b\u3002\uff5c\uff09\uff3d\uff5d\u3001")
_LINE_BREAK = re.compile(r"[\n\v\f\r\x85\u2028\u2029]")
_MOST_MARKS = 8  # of quotes and the like in a row: what is found takes time in proportion to a text


class Denials:
    """Values that deny the name that they are given to, such as "no".

    Between the two is one of `:`, `=`, `|`, `->`, `[` and `(`. Quotes, brackets and emphasis (`*`,
    a backtick) around either of them do not count. The value has to end there: what follows is the
    end of the text or of the line, one of `,`, `;`, `.`, `|`, a closing bracket, or a quote. So
    `riverside (no parking)` denies nothing.

    Args:
      values: The values, found as `phrases.Phrases` finds them.
    """

    def __init__(self, values: Iterable[str]):
        self._phrases = phrases.Phrases((value, value) for value in values)

    def ends(self, text: str) -> set[int]:
        """The places in a text where a name would end that is denied there."""
        found = list(self._phrases.mentions(text))
        if not found:
            return set()
        extents = words.extents(text)
        starting = {start: number for number, (start, _) in enumerate(extents)}
        ending = {end: number for number, (_, end) in enumerate(extents)}
        spelt = [text[start:end] for start, end in extents]
        return {
            extents[number][1]
            for start, end, _ in found
            if _is_whole(text, extents, ending[end])
            for number in _named(spelt, starting[start])
        }


def _is_whole(text: str, extents: Sequence[tuple[int, int]], last: int) -> bool:
    """Whether the value whose last word has this number ends with it."""
    for number in range(last, last + _MOST_MARKS):
        if number + 1 == len(extents):
            return True
        (_, end), (start, after) = extents[number : number + 2]
        if text[start:after] in _ENDS or _LINE_BREAK.search(text, end, start):
            return True
        if text[start:after] not in _EMPHASIS:
            return False
    return False


def _named(spelt: Sequence[str], first: int) -> Iterator[int]:
    """The numbers of the words that end a name to which the value from word `first` on is given."""
    for number in range(first - 1, max(first - 1 - _MOST_MARKS, 0), -1):
        is_arrow = spelt[number] == ">" and spelt[number - 1] == "-"
        if is_arrow or spelt[number] in _SEPARATORS:
            before = number - 1 - is_arrow
            for last in range(before, max(before - _MOST_MARKS, -1), -1):
                yield last  # a name may end with a bracket of its own
                if spelt[last] not in _CLOSING:
                    break
        if spelt[number] not in _OPENING:
            return
