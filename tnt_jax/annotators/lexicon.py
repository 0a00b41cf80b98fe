"""Marks listed words and phrases. `tnt_jax.data.words` says what a word is."""

import re
from dataclasses import dataclass
from functools import cached_property

from tnt_jax.annotators import phrases
from tnt_jax.annotators.interface import Annotation, TextFile
from tnt_jax.data.records import Record
from tnt_jax.data.token_automaton import Listed
from tnt_jax.runtime.errors import UsageError

_HASH = re.compile(r"\\*#")  # of a text; in a list it has one backslash more
_WRITTEN_HASH = re.compile(r"\\+#")


def line_of(text: str) -> str:
    """The line by which a list has a text as its entry; no line begins with `#` then."""
    return f"\\{text}" if _HASH.match(text) else text


def _entry_of(line: str) -> str:
    return line[1:] if _WRITTEN_HASH.match(line) else line


@dataclass(frozen=True, kw_only=True)
class Lexicon:
    r"""Marks listed words and phrases, whatever the inputs say.

    The list is a UTF-8 text file with one entry a line; blank lines and lines that start with `#`
    are skipped, and one that starts with `\#` has an entry that starts with `#`. Of entries that
    overlap in the targets the first to start wins, then the longest. In a script without spaces
    (Chinese, Japanese, Thai) an entry is found within longer words, too.

    Attributes:
      path: the list.
      case_sensitive: compare letters as they are; else upper and lower case are equal.
      inflections: the last word of an entry also matches with the regular English endings -s, -ed
        and -ing, spelt as English does: fool, fools, fooled, fooling; kisses; bully, bullies,
        bullied; smile, smiled, smiling; slap, slapped (doubled in words of one vowel only).
      alternatives: give each span all other entries, with their inflections.
      at_every_position: no entry may be completed at any position, which distils a decoding mask
        into the weights.

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
    def _file(self) -> TextFile:
        return TextFile.read(self.path, setting="Lexicon.path")

    @cached_property
    def _texts(self) -> tuple[str, ...]:
        lines = (line.strip() for line in self._file.text.splitlines())
        entries = [_entry_of(line) for line in lines if line and not line.startswith("#")]
        if not entries:
            raise UsageError(
                f"Lexicon.path: {self.path} lists nothing; expected one word or phrase a line "
                "(a line that starts with # is a comment; \\# starts an entry with #)."
            )
        if self.inflections:
            entries = [form for entry in entries for form in (entry, *phrases.inflected(entry))]
        return tuple(dict.fromkeys(entries))

    @cached_property
    def _phrases(self) -> phrases.Phrases:
        return phrases.Phrases(
            ((text, text) for text in self._texts), case_sensitive=self.case_sensitive
        )

    @cached_property
    def description(self) -> str:
        """Name, list with digest, and settings."""
        return (
            f"Lexicon({self._file.identity}, case_sensitive={self.case_sensitive}, "
            f"inflections={self.inflections}, alternatives={self.alternatives}, "
            f"at_every_position={self.at_every_position}"
            f"{phrases.word_rule(self._texts)})"
        )

    def annotate(self, record: Record) -> Annotation:
        """Marks every entry in the targets, also where the inputs hold it."""
        others = self._others if self.alternatives else phrases.Alternatives((), ())
        return Annotation(
            spans=tuple(
                others.span(record.targets, start, end)
                for start, end, _ in self._phrases.longest_mentions(record.targets)
            ),
            unwanted=self.everywhere(),
        )

    @cached_property
    def _others(self) -> phrases.Alternatives:
        return phrases.Alternatives.from_texts(self._texts, case_sensitive=self.case_sensitive)

    def unwanted(self, record: Record) -> Listed:
        """All entries with their inflections, whatever the inputs hold."""
        del record
        return Listed(self._texts, case_sensitive=self.case_sensitive)

    def innocent_words(self, text: str) -> list[str]:
        """The words of a text that are in no entry."""
        return self._phrases.outside(text)

    def everywhere(self) -> Listed | None:
        """All entries with their inflections."""
        if not self.at_every_position:
            return None
        return Listed(self._texts, case_sensitive=self.case_sensitive)
