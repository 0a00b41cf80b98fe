"""Marks known values that the inputs do not state: a name of a restaurant, a wrong price.

`tnt_jax.data.words` says what a word is.
"""

import json
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from functools import cached_property

from tnt_jax.annotators import phrases
from tnt_jax.annotators.denials import Denials
from tnt_jax.annotators.interface import Annotation, TextFile
from tnt_jax.data.records import Record
from tnt_jax.data.token_automaton import Listed
from tnt_jax.runtime import files
from tnt_jax.runtime.errors import UsageError

_MOST_KNOWN = 256  # sets of supported values


@dataclass(frozen=True, kw_only=True)
class Gazetteer:
    """Marks mentions of known values that the inputs do not state.

    A value is supported when any of its names occurs in the inputs, also within a longer name, and
    is not denied there (`denials`). Of mentions that overlap in the targets the first to start
    wins, then the longest, and it is marked unless a value of that name, of whatever type, is
    supported. Letter case does not count. In a script without spaces (Chinese, Japanese, Thai) a
    name is found within longer words, too.

    The file is a JSON object of types, each a list of values or an object that gives each value a
    list of further names: `{"area": ["north", "south"], "food": {"british": ["english"]}}`.

    Attributes:
      path: the file.
      denials: values that deny the name that they are given to, as "no" does in
        `familyFriendly: no` (`denials.Denials` says in which forms). It supports nothing there.
      alternatives: give each span all other names that are not supported, of every type.
      at_every_position: no name that is not supported may be completed at any position, which
        distils a decoding mask into the weights.

    Raises:
      UsageError: the file is missing, is not such JSON or names no value.
    """

    path: str
    denials: tuple[str, ...] = ()
    alternatives: bool = True
    at_every_position: bool = False

    def __post_init__(self):
        _ = self._phrases  # a bad file is reported now, not at the first record

    @cached_property
    def _file(self) -> TextFile:
        return TextFile.read(self.path, setting="Gazetteer.path")

    @cached_property
    def _phrases(self) -> phrases.Phrases:
        return phrases.Phrases(_named_values(self._file))

    @cached_property
    def _values_by_name(self) -> dict[str, frozenset[Hashable]]:
        return {name: self._phrases.values_of(name) for name, _ in _named_values(self._file)}

    @cached_property
    def description(self) -> str:
        """Name, file with digest, and settings."""
        return (
            f"Gazetteer({self._file.identity}, "
            + (f"denials={'|'.join(self.denials)}, " if self.denials else "")
            + f"alternatives={self.alternatives}, "
            f"at_every_position={self.at_every_position}"
            f"{phrases.word_rule(name for name, _ in _named_values(self._file))})"
        )

    @cached_property
    def _all_names(self) -> tuple[str, ...]:
        return tuple(self._values_by_name)

    @cached_property
    def _denials(self) -> Denials:
        return Denials(self.denials)

    def _supported_in(self, inputs: str) -> set[Hashable]:
        """The values that inputs state and do not deny."""
        denied = self._denials.ends(inputs) if self.denials else ()
        return {
            value
            for _, end, values in self._phrases.mentions(inputs)
            if end not in denied
            for value in values
        }

    @cached_property
    def _known(self) -> "dict[frozenset[Hashable], _Names]":
        return {}

    def _names(self, supported: Iterable[Hashable]) -> "_Names":
        """The names where these values are supported; kept, as many inputs state the same."""
        values = frozenset(supported)
        if values not in self._known:
            if len(self._known) >= _MOST_KNOWN:
                del self._known[next(iter(self._known))]
            are_supported = {
                name: not values.isdisjoint(of_name)
                for name, of_name in self._values_by_name.items()
            }
            names = tuple(name for name, is_supported in are_supported.items() if is_supported)
            others = [name for name, is_supported in are_supported.items() if not is_supported]
            self._known[values] = _Names(names, tuple(others) if self.alternatives else ())
        return self._known[values]

    def annotate(self, record: Record) -> Annotation:
        """Marks every mention in the targets that the inputs do not support."""
        supported = self._supported_in(record.inputs)
        names = self._names(supported)
        spans = tuple(
            names.others.span(record.targets, start, end)
            for start, end, values in self._phrases.longest_mentions(record.targets)
            if supported.isdisjoint(values)
        )
        return Annotation(
            spans=spans,
            supported=names.supported_forms,
            unwanted=self._listed(names.supported) if self.at_every_position else None,
        )

    def unwanted(self, record: Record) -> Listed:
        """All names, but for those that the inputs support."""
        return self._listed(self._names(self._supported_in(record.inputs)).supported)

    def _listed(self, supported_names: tuple[str, ...]) -> Listed:
        return Listed(self._all_names, supported_names)

    def innocent_words(self, text: str) -> list[str]:
        """The words of a text that are in no value's name."""
        return self._phrases.outside(text)

    def everywhere(self) -> None:
        """Nothing: a value that is wrong for one record is right for another."""


@dataclass(frozen=True)
class _Names:
    """The names of a gazetteer where some of its values are supported.

    Their forms are written when they are asked for: a mask, or a clean output, needs none.

    Attributes:
      supported: the names of supported values.
      unsupported: what a marked name may not be replaced by.
    """

    supported: tuple[str, ...]
    unsupported: tuple[str, ...]

    @cached_property
    def supported_forms(self) -> tuple[str, ...]:
        """The names of supported values, in every casing."""
        return phrases.forms(self.supported)

    @cached_property
    def others(self) -> phrases.Alternatives:
        """The names of `unsupported`, in every casing."""
        return phrases.Alternatives.from_texts(self.unsupported)


def _named_values(file: TextFile) -> list[tuple[str, tuple[str, str]]]:
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
        files.check_depth(file.text.encode(), types)
        json.dumps(types, ensure_ascii=False).encode()  # half a surrogate pair is no text
    except (ValueError, RecursionError) as error:
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
