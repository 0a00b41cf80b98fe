"""What is unwanted in an output: text in, character spans out.

An annotator reads one record's `inputs` and `targets` and says which stretches of the targets must
go, and what else would be just as wrong there. Offsets are Unicode code points into `targets`, end
exclusive, so that they mean the same in Python, in JSON and for any vocabulary.

Both annotators here compare texts word by word. A word is a run of letters, digits, marks and
underscores; an apostrophe joins ("don't" does not hold "don") unless it starts a possessive 's
("idiot's" holds "idiot"), and `.`, `,` and `:` join digits ("4.5" does not hold "4"). Every other
visible character is a word of its own, except that a hyphen between words counts as a space
("half-ass" holds "ass", "4-star" is "4 star"). Runs of white space are one space. Canonically
equivalent strings and the two apostrophes are equal. A script written without spaces is out of
reach: its runs of letters are single words.
"""

import hashlib
import json
import pathlib
import re
import unicodedata
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, runtime_checkable

from tnt_jax.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Span:
    """One unwanted stretch of the targets.

    Attributes:
      start: code point offset of its first character.
      end: code point offset after its last character.
      alternatives: texts that would be just as wrong from `start` on, cased as the marked text is.
    """

    start: int
    end: int
    alternatives: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Annotation:
    """What an annotator found in one record.

    Attributes:
      spans: sorted and disjoint; empty when nothing is unwanted.
      supported: texts that remain right in this record, in every casing. A token that begins one of
        them must not be removed on account of an alternative.
    """

    spans: tuple[Span, ...]
    supported: tuple[str, ...] = ()


@runtime_checkable
class Annotator(Protocol):
    """The interface of every annotator. Implementations are deterministic and picklable."""

    @property
    def description(self) -> str:
        """Name and settings: the `annotator` field of every record it marked."""
        ...

    def annotate(self, inputs: str, targets: str) -> Annotation:
        """Marks what is unwanted in `targets`, given `inputs`."""
        ...

    def everywhere(self) -> tuple[str, ...]:
        """Texts to remove at every position of every record; usually none."""
        ...


@dataclass(frozen=True, kw_only=True)
class Lexicon:
    """Marks listed words and phrases, whatever the inputs say.

    The list is a UTF-8 text file with one entry a line; blank lines and lines that start with `#`
    are skipped. Of entries that overlap in the targets the first to start wins, then the longest.

    Attributes:
      path: the list.
      case_sensitive: compare letters as they are; else upper and lower case are equal.
      inflections: the last word of an entry also matches with the regular English endings -s, -ed
        and -ing, spelt as English does: fool, fools, fooled, fooling; kisses; bully, bullies,
        bullied; smile, smiled, smiling; slap, slapped (doubled in words of one vowel only).
      alternatives: give each span all other entries, with their inflections.
      at_every_position: all entries go at every position, which distils a decoding mask into the
        weights; see `everywhere`.

    Raises:
      UsageError: the file is missing, is not UTF-8 text or lists nothing.
    """

    path: str
    case_sensitive: bool = False
    inflections: bool = False
    alternatives: bool = True
    at_every_position: bool = False

    def __post_init__(self):
        _ = self._phrases  # a bad file is reported now, not at the first record

    @cached_property
    def _file(self) -> "_TextFile":
        return _TextFile.read(self.path, setting="Lexicon.path")

    @cached_property
    def _texts(self) -> tuple[str, ...]:
        lines = (line.strip() for line in self._file.text.splitlines())
        entries = [line for line in lines if line and not line.startswith("#")]
        if not entries:
            raise UsageError(
                f"Lexicon.path: {self.path} lists nothing; expected one word or phrase a line "
                "(a line that starts with # is a comment)."
            )
        if self.inflections:
            entries = [form for entry in entries for form in (entry, *_inflected(entry))]
        return tuple(dict.fromkeys(entries))

    @cached_property
    def _phrases(self) -> "_Phrases":
        return _Phrases(((text, text) for text in self._texts), case_sensitive=self.case_sensitive)

    @cached_property
    def description(self) -> str:
        """Name, list with digest, and settings."""
        return (
            f"Lexicon({self._file.identity}, case_sensitive={self.case_sensitive}, "
            f"inflections={self.inflections}, alternatives={self.alternatives}, "
            f"at_every_position={self.at_every_position})"
        )

    def annotate(self, inputs: str, targets: str) -> Annotation:
        """Marks every entry in `targets`."""
        del inputs  # a listed word is unwanted even where the inputs hold it
        others = self._texts if self.alternatives else ()
        return Annotation(
            spans=tuple(
                _span(targets, start, end, others, recase=not self.case_sensitive)
                for start, end, _ in self._phrases.longest_mentions(targets)
            )
        )

    def everywhere(self) -> tuple[str, ...]:
        """All entries with their inflections and, unless `case_sensitive`, in every casing."""
        if not self.at_every_position:
            return ()
        return self._texts if self.case_sensitive else _casings(self._texts)


@dataclass(frozen=True, kw_only=True)
class Gazetteer:
    """Marks mentions of known values that the inputs do not state.

    A value is supported when any of its names occurs in the inputs, also within a longer name. Of
    mentions that overlap in the targets the first to start wins, then the longest, and it is marked
    unless a value of that name, of whatever type, is supported. Letter case does not count.

    The file is a JSON object of types, each a list of values or an object that gives each value a
    list of further names: `{"area": ["north", "south"], "food": {"british": ["english"]}}`.

    Attributes:
      path: the file.
      alternatives: give each span all other names that are not supported, of every type.

    Raises:
      UsageError: the file is missing, is not such JSON or names no value.
    """

    path: str
    alternatives: bool = True

    def __post_init__(self):
        _ = self._phrases  # a bad file is reported now, not at the first record

    @cached_property
    def _file(self) -> "_TextFile":
        return _TextFile.read(self.path, setting="Gazetteer.path")

    @cached_property
    def _phrases(self) -> "_Phrases":
        return _Phrases(_named_values(self._file))

    @cached_property
    def _values_by_name(self) -> dict[str, frozenset[Hashable]]:
        return {name: self._phrases.values_of(name) for name, _ in _named_values(self._file)}

    @cached_property
    def description(self) -> str:
        """Name, file with digest, and settings."""
        return f"Gazetteer({self._file.identity}, alternatives={self.alternatives})"

    def annotate(self, inputs: str, targets: str) -> Annotation:
        """Marks every mention in `targets` that `inputs` do not support."""
        supported = self._phrases.values_in(inputs)
        mentions = [
            (start, end)
            for start, end, values in self._phrases.longest_mentions(targets)
            if supported.isdisjoint(values)
        ]
        supported_names, other_names = [], []
        for name, values in self._values_by_name.items():
            (other_names if supported.isdisjoint(values) else supported_names).append(name)
        others = other_names if self.alternatives else ()
        return Annotation(
            spans=tuple(_span(targets, start, end, others, recase=True) for start, end in mentions),
            supported=_casings(supported_names),
        )

    def everywhere(self) -> tuple[str, ...]:
        """Nothing: a value that is wrong for one record is right for another."""
        return ()


# -----------------------------------------------------------------------------
# Files
# -----------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _TextFile:
    path: pathlib.Path
    setting: str
    text: str

    @classmethod
    def read(cls, path: str, *, setting: str) -> "_TextFile":
        try:
            text = pathlib.Path(path).read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(
                f"{setting}: expected a UTF-8 text file, cannot read {path!r}: {error}."
            ) from error
        return cls(path=pathlib.Path(path), setting=setting, text=text)

    @property
    def identity(self) -> str:
        """File name and digest: the same on every machine, different once the content is."""
        return f"{self.path.name}:{hashlib.sha256(self.text.encode()).hexdigest()[:12]}"


def _named_values(file: _TextFile) -> list[tuple[str, tuple[str, str]]]:
    """The pairs (name, (type, value)) of a gazetteer file; a value is its own first name."""

    def names_in(texts: object, where: str) -> list[str]:
        if isinstance(texts, list) and all(isinstance(t, str) and t.strip() for t in texts):
            return texts
        raise UsageError(
            f"{file.setting}: {file.path}: {where} must be a list of non-blank strings, found "
            f"{json.dumps(texts)[:80]}."
        )

    try:
        types = json.loads(file.text)
    except json.JSONDecodeError as error:
        raise UsageError(f"{file.setting}: {file.path} is not JSON: {error}.") from error
    if not isinstance(types, dict) or not any(types.values()):
        raise UsageError(
            f"{file.setting}: {file.path} names no value; expected "
            '{"type": ["value", ...]} or {"type": {"value": ["other name", ...]}}.'
        )
    pairs = []
    for type_name, values in types.items():
        if not isinstance(values, dict):
            values = {value: [] for value in names_in(values, f"type {type_name!r}")}
        names_in(list(values), f"type {type_name!r}")
        for value, others in values.items():
            names = [value, *names_in(others, f"value {value!r} of type {type_name!r}")]
            pairs.extend((name, (type_name, value)) for name in names)
    return pairs


# -----------------------------------------------------------------------------
# Words and phrases
# -----------------------------------------------------------------------------

# `\w` leaves out combining marks (accents of decomposed text, vowel signs of Indic scripts);
# without them "cafe" would be found in "cafe\u0301".
_MARKS = "".join(c for c in map(chr, range(0x300, 0x1F000)) if unicodedata.category(c)[0] == "M")
_LETTER = rf"[\w{_MARKS}]"
_APOSTROPHE = r"['\u2019]"
_HYPHEN = r"[-\u2010\u2011]"
_WORD = re.compile(
    rf"{_LETTER}+(?:{_APOSTROPHE}(?![sS]\b){_LETTER}+|(?<=\d)[.,:](?=\d){_LETTER}+)*"
    rf"|{_APOSTROPHE}[sS]\b"
    rf"|(?<!{_LETTER}){_HYPHEN}|{_HYPHEN}(?!{_LETTER})"  # between words it is a space
    rf"|[^\w\s{_MARKS}\-\u2010\u2011]"
)


class _Phrases:
    """A trie over words: phrases with the values they name.

    A node maps the next word to its child; under the key None it holds the values of the phrase
    that ends there.
    """

    def __init__(self, items: Iterable[tuple[str, Hashable]], *, case_sensitive: bool = False):
        self._case_sensitive = case_sensitive
        self._root: dict = {}
        for phrase, value in items:
            node = self._root
            for key, _, _ in self._words(phrase):
                node = node.setdefault(key, {})
            node.setdefault(None, set()).add(value)

    def _words(self, text: str) -> list[tuple[str, int, int]]:
        """The (comparison key, start, end) of each word."""
        return [(self._key(m.group()), m.start(), m.end()) for m in _WORD.finditer(text)]

    def _key(self, word: str) -> str:
        key = unicodedata.normalize("NFC", word).replace("\u2019", "'")
        return key if self._case_sensitive else key.casefold()

    def _mentions_from(
        self, words: list[tuple[str, int, int]], first: int
    ) -> Iterator[tuple[int, set]]:
        """Phrases from word `first` on, shortest first: (index after the last word, values)."""
        node = self._root
        for index in range(first, len(words)):
            node = node.get(words[index][0])
            if node is None:
                return
            if None in node:
                yield index + 1, node[None]

    def longest_mentions(self, text: str) -> Iterator[tuple[int, int, set]]:
        """Disjoint mentions from left to right, the longest at each place: (start, end, values)."""
        words = self._words(text)
        first = 0
        while first < len(words):
            mentions = list(self._mentions_from(words, first))
            if not mentions:
                first += 1
                continue
            last, values = mentions[-1]
            yield words[first][1], words[last - 1][2], values
            first = last

    def values_in(self, text: str) -> set:
        """The values of all phrases in the text, also of those within longer ones."""
        words = self._words(text)
        return {
            value
            for first in range(len(words))
            for _, values in self._mentions_from(words, first)
            for value in values
        }

    def values_of(self, phrase: str) -> frozenset:
        """The values that a phrase of the trie names."""
        node = self._root
        for key, _, _ in self._words(phrase):
            node = node[key]
        return frozenset(node[None])


def _inflected(entry: str) -> list[str]:
    """The entry with -s, -ed and -ing on its last word, by the spelling rules of English."""
    if not entry[-1].isalpha():
        return []
    plural, past, participle = entry + "s", entry + "ed", entry + "ing"
    word = entry.lower()
    if re.search(r"(s|x|z|ch|sh)$", word):
        plural = entry + "es"
    elif re.search(r"[^aeiou]y$", word):
        plural, past = entry[:-1] + "ies", entry[:-1] + "ied"
    elif word.endswith("e"):
        past = entry + "d"
        if not re.search(r"[eoy]e$", word):  # seeing, hoeing, dyeing keep theirs
            participle = entry[:-1] + "ing"
    if re.search(r"(?<![a-z])[^aeiou\W]*[aeiou][bdfgklmnprtvz]$", word):
        past, participle = entry + entry[-1] + "ed", entry + entry[-1] + "ing"
    return [plural, past, participle]


def _casings(texts: Iterable[str]) -> tuple[str, ...]:
    """Each text as it is, with a capital and in capitals, without repeats."""
    return tuple(
        dict.fromkeys(
            form for text in texts for form in (text, text[:1].upper() + text[1:], text.upper())
        )
    )


def _span(targets: str, start: int, end: int, others: Iterable[str], *, recase: bool) -> Span:
    """A span whose alternatives are the other texts, capitalised where the marked text is."""
    marked = targets[start:end]
    if recase and len(marked) > 1 and marked.isupper():
        others = (text.upper() for text in others)
    elif recase and marked[:1].isupper():
        others = (text[:1].upper() + text[1:] for text in others)
    alternatives = tuple(text for text in dict.fromkeys(others) if text != marked)
    return Span(start=start, end=end, alternatives=alternatives)
