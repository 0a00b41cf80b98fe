"""Tokenisers of decoder-only models: a `tokenizer.json`, read with the `tokenizers` package.

Two kinds are known. *Byte-level* BPE (GPT-2, Llama 3, Qwen, SmolLM) writes each byte of UTF-8 as a
character of its own; *sentencepiece-style* BPE (Llama 2, Gemma, Mistral) writes a space as "▁" and
what it has no piece for as bytes, `<0xNN>`. Text never becomes a control token: those that the file
has are given names that no text can hold (`_with_hidden_names`).
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import pathlib
import re
import secrets
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tokenizers
from etils import epath

from tnt_jax.data.tokenization import (
    Encoded,
    Extent,
    Place,
    Tokeniser,
    find_end,
    refuse_messages,
)
from tnt_jax.runtime import files
from tnt_jax.runtime.errors import UsageError

TOKENIZER = "tokenizer.json"
SETTINGS = "tokenizer_config.json"
GENERATION = "generation_config.json"
# What says how a model reads and writes text: copied, never rewritten.
FILES = (
    TOKENIZER,
    SETTINGS,
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "tokenizer.model",
)
# What decides what `_read` makes.
_READ = (TOKENIZER, SETTINGS, GENERATION, "special_tokens_map.json", "config.json")
_SPACES = {True: "Ġ", False: "▁"}  # how a piece writes a space, by whether it is byte-level
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_BROKEN = "\ufffd"


def is_known(tokenizer: Mapping[str, Any]) -> bool:
    """Whether the content of a `tokenizer.json` is of a kind that `HubTokenizer` reads."""
    return _model_type(tokenizer) == "BPE"


def _model_type(tokenizer: Mapping[str, Any]) -> str | None:
    model = tokenizer.get("model") or {}
    return model.get("type", "BPE" if "merges" in model else None)  # old files do not state it


@dataclasses.dataclass(frozen=True)
class HubTokenizer(Tokeniser):
    """The tokeniser of a directory as the Hugging Face hub has them.

    Attributes:
        folder: with `tokenizer.json`, read when it is first asked for, and the files that state
            which ids end an output: `generation_config.json`, else `config.json`, and the
            `eos_token` of `tokenizer_config.json`.
    """

    folder: str

    def __reduce__(self) -> tuple[Any, ...]:
        # What a copy or another process gets: no loaded tokenizer.
        return type(self), (self.folder,)

    @functools.cached_property
    def _loaded(self) -> "_Loaded":
        return _load(self.folder, self._more_control_names)

    @property
    def _more_control_names(self) -> frozenset[str]:
        """The added tokens that are control tokens, although the file calls them text."""
        return frozenset()

    @property
    def end_ids(self) -> frozenset[int]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The ids that end an output: of the text, and, in a chat model, of a turn."""
        return self._ends

    @functools.cached_property
    def _ends(self) -> frozenset[int]:
        return frozenset(self._loaded.end_ids)

    @property
    def control_ids(self) -> frozenset[int]:
        """The ids of control tokens, ends among them."""
        return self._loaded.silent_ids

    @property
    def end_id(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The tokenizer's own `eos_token`; without one, the first end that is stated."""
        return self._loaded.end_id

    @property
    def never_said(self) -> frozenset[int]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The ids that stand for no text and end nothing.

        These are control tokens other than ends (the start of a text or of a turn, padding that is
        no end, reserved ones) and numbers that no token has. A model may put a little probability
        on them, but an output is a text: they would be in it without a trace, and no record that
        gives a text could hold them. An end is never among them, so padding that is the EOS itself,
        or an id 0 that is a word, stays what it is.
        """
        loaded = self._loaded
        without_token = set(range(self.size)) - set(loaded.names)
        return (loaded.silent_ids - self.end_ids) | without_token

    @property
    def size(self) -> int:
        """One more than the largest id, added tokens included."""
        return self._loaded.size

    @property
    def unknown_id(self) -> int | None:
        """The id of the model's unknown token; None where it has none, as with bytes."""
        return self._loaded.unknown_id

    def encode(self, text: str) -> list[int]:
        """See `Tokeniser.encode`. Text that is spelt like a control token stays text."""
        return self._loaded.beginning.encode(text, add_special_tokens=False).ids

    def prompt_ids(self, text: str, messages: Sequence[tuple[str, str]] = ()) -> list[int]:
        """The ids of a text that the model goes on with: behind its BOS, if it has one; no end."""
        refuse_messages(messages)
        return [*self._loaded.before_text, *self.encode(text)]

    def markup_ids(self, parts: Sequence[tuple[str, bool]]) -> list[int]:
        """The ids of a text, of which only some parts may become control tokens.

        Args:
            parts: stretches of the text in order, each with whether the names of control tokens in
                it mean these tokens; in the others they are text. A name across two parts is text.

        Returns:
            The ids of the whole text, as the tokenizer itself gives them where no name is text.
        """
        return self.encode(
            "".join(self._hidden(part) if is_markup else part for part, is_markup in parts)
        )

    def _hidden(self, markup: str) -> str:
        """The text in which the names of control tokens mean them."""
        hidden = self._loaded.hidden
        return self._names.sub(lambda match: hidden[match[0]], markup)

    @property
    def control_names(self) -> Collection[str]:
        """How the control tokens are written, ends among them."""
        return self._loaded.hidden.keys()

    @functools.cached_property
    def _names(self) -> re.Pattern[str]:
        """Matches a control token as it is written: the longest that is there."""
        longest_first = sorted(self.control_names, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)))

    @property
    def text_names(self) -> Collection[str]:
        """How the added tokens that are no control tokens are written."""
        return self._loaded.text_names

    @functools.cached_property
    def control_texts(self) -> dict[str, str]:
        """How `bos_token`, `eos_token` and the like are written, for a chat template."""
        return _control_texts(epath.Path(self.folder))

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """See `Tokeniser.decode`."""
        return self._loaded.beginning.decode(self._spoken(ids), skip_special_tokens=True)

    def prompt_text(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of a prompt's ids, for people; a conversation goes on behind its ends."""
        return self._loaded.beginning.decode([int(i) for i in ids], skip_special_tokens=True)

    def encode_with_extents(self, text: str) -> Encoded:
        """See `Tokeniser.encode_with_extents`. Nothing is silent: these drop no character."""
        return self._measured(self._loaded.beginning.encode(text, add_special_tokens=False), text)

    def encode_reply(self, text: str, inputs: str) -> list[int]:
        """See `Tokeniser.encode_reply`."""
        return self._reply(text, inputs).ids

    def encode_reply_with_extents(self, text: str, inputs: str) -> Encoded:
        """See `Tokeniser.encode_reply_with_extents`."""
        return self._measured(self._reply(text, inputs), text)

    @property
    def prepends(self) -> bool:
        """Whether a space is put before a text."""
        return self._loaded.prepends

    def encode_between(self, before: str, text: str, *, blank: str, behind: str) -> Encoded:
        """The ids of a text between others, and which of its characters each stands for.

        Args:
            before: the end of a prompt. Names of control tokens in it mean these tokens; its ids
                are left out.
            text: in which such names are text.
            blank: white space before the text, whose tokens are the text's.
            behind: white space after the text, whose tokens are the text's, too.
        """
        before = self._hidden(before)
        own = self.encode(before)
        encoding = self._loaded.beginning.encode(
            before + blank + text + behind, add_special_tokens=False
        )
        if encoding.ids[: len(own)] == own:
            return self._measured(encoding, text, len(before + blank), len(own))
        # A token would reach over the border: the model goes on with the prompt as it is.
        encoding = self._loaded.continuing.encode(blank + text + behind, add_special_tokens=False)
        return self._measured(encoding, text, len(blank))

    def _reply(self, text: str, inputs: str) -> tokenizers.Encoding:
        """A reply's tokens behind a prompt that is a text.

        A tokenizer may put a space before a text. Behind a prompt that space parts two words; where
        white space parts them already, there is none.
        """
        is_parted = inputs and (text[:1].isspace() or inputs[-1:].isspace())
        tokenizer = self._loaded.continuing if is_parted else self._loaded.beginning
        return tokenizer.encode(text, add_special_tokens=False)

    def _measured(
        self, encoding: tokenizers.Encoding, text: str, start: int = 0, num_before: int = 0
    ) -> Encoded:
        """The ids and extents of a text that is a part of what was encoded.

        Args:
            encoding: what the package made of all that was encoded.
            text: the part.
            start: the character at which the part begins.
            num_before: the number of tokens before those of the part.
        """
        loaded = self._loaded
        offsets = encoding.offsets
        if loaded.composes:
            offsets = _over_gaps(offsets, start + len(text))
        blanks = " " if loaded.is_byte_level else " ▁"  # a "▁" that is typed is read as a space
        extents = [
            _trimmed(text, _within(text, first - start, last - start), blanks)
            for first, last in offsets[num_before:]
        ]
        # The space that is put before a text, where it is a piece alone, is not in the text.
        if loaded.prepends and encoding.tokens[num_before : num_before + 1] == [loaded.space]:
            extents[0] = (0, 0)
        return Encoded(encoding.ids[num_before:], extents, frozenset())

    def extents(self, ids: Sequence[int] | np.ndarray) -> tuple[str, list[Extent]]:
        """See `Tokeniser.extents`. Bytes that form no character are "\ufffd", as the library says.

        Control tokens stand for no text.
        """
        spoken = self._spoken(ids)
        text, extents = self._loaded.measure(spoken)
        if text != (whole := self.decode(spoken)):
            text, extents = whole, self._by_prefixes(spoken, whole)
        extents = [_trimmed(text, extent, " ") for extent in extents]
        return text, extents + [(len(text), len(text))] * (len(ids) - len(spoken))

    def place_of(self, ids: Sequence[int] | np.ndarray, position: int) -> Place:
        """See `Tokeniser.place_of`."""
        space, own = self._loaded.space, self._loaded.piece(int(ids[position]))
        if position > 0 and not own.startswith(space):
            before = int(ids[position - 1])
            if self._loaded.piece(before) == space:
                return Place(position - 1, " ", before)
        return Place(position, " " if own.startswith(space) else "", None)

    def continuations(
        self, before: str | None, strings: Sequence[str]
    ) -> list[list[tuple[int, bool]]]:
        """See `Tokeniser.continuations`."""
        loaded, prefix = self._loaded, before or ""
        tokenizer = loaded.beginning if before is None else loaded.continuing
        found = []
        for string in strings:
            encoding = tokenizer.encode(prefix + string, add_special_tokens=False)
            found.append(
                [
                    (token_id, end > len(prefix) and piece != loaded.space)
                    for token_id, piece, (_, end) in zip(
                        encoding.ids, encoding.tokens, encoding.offsets, strict=True
                    )
                ]
            )
        return found

    @property
    def token_bytes(self) -> list[bytes]:
        """See `Tokeniser.token_bytes`."""
        loaded = self._loaded
        pieces = [loaded.piece(i) for i in range(self.size)]
        if loaded.is_byte_level:
            return [_bytes_of(piece) for piece in pieces]
        matches = ((piece, _BYTE.fullmatch(piece)) for piece in pieces)
        return [
            bytes([int(match[1], 16)]) if match else piece.replace("▁", " ").encode()
            for piece, match in matches
        ]

    @property
    def run_ids(self) -> frozenset[int]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """See `Tokeniser.run_ids`: `_units_of_run` reads them."""
        if self._loaded.is_byte_level:
            return frozenset()
        return frozenset(i for i in range(self.size) if _BYTE.fullmatch(self._loaded.piece(i)))

    def pieces(self) -> list[str | None]:
        """How the file writes each token, by its id; None for a number that no token has."""
        return [self._loaded.names.get(i) for i in range(self.size)]

    @functools.cached_property
    def tokenizer_digest(self) -> str:
        """A hash of the files' content that decides the ids of a text; it names no place.

        Resuming compares it, so that a run may go on where the files have moved, and not with
        another tokenizer of the same size.
        """
        digest = hashlib.sha256((epath.Path(self.folder) / TOKENIZER).read_bytes())
        digest.update(json.dumps([sorted(self.end_ids), self.end_id, *self._of_prompts]).encode())
        return digest.hexdigest()

    @property
    def _of_prompts(self) -> tuple[str, ...]:
        """What decides, beside the tokenizer's files, how a prompt is written."""
        # Digests that earlier runs have noted do not have what the file says by itself.
        loaded = self._loaded
        return (json.dumps(loaded.before_text),) if loaded.is_bos_of_setting else ()

    def copy_files(self, folder: epath.Path) -> None:
        """Copies what says how text is tokenised into another directory of this kind."""
        for name in (*FILES, GENERATION):
            source = epath.Path(self.folder) / name
            if source.exists() and not (folder / name).exists():
                (folder / name).write_bytes(source.read_bytes())

    def _spoken(self, ids: Sequence[int] | np.ndarray) -> list[int]:
        """The ids up to the first end."""
        known = [int(i) for i in ids]
        return known[: find_end(known, self._ends)]

    def _by_prefixes(self, ids: list[int], text: str) -> list[Extent]:
        """Extents in the library's own text, where it is another than ours: slow, and for any.

        A token stands for what the text of the ids up to it shares with all of the text, beyond
        what the ids before it do. One of a character that a later token completes shares that one.
        """
        ends = [0, *(_num_shared(self.decode(ids[: i + 1]), text) for i in range(len(ids)))]
        extents: list[Extent] = []
        following = (len(text), len(text))
        for i in reversed(range(len(ids))):
            start, end = min(ends[i], ends[i + 1]), ends[i + 1]
            if not self._loaded.piece(ids[i]).strip(self._loaded.space):
                extents.append((end, end))
                continue
            if start < end:
                following = (start, start + 1)
            extents.append((start, end) if start < end else following)
        return extents[::-1]


def _num_shared(one: str, other: str) -> int:
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def _within(text: str, start: int, end: int) -> Extent:
    """The part of a stretch that lies within a text."""
    return min(max(start, 0), len(text)), min(max(end, 0), len(text))


def _trimmed(text: str, extent: Extent, blanks: str) -> Extent:
    """The extent without the spaces at its ends; empty at its end where it has nothing else."""
    start, end = extent
    while start < end and text[start] in blanks:
        start += 1
    while start < end and text[end - 1] in blanks:
        end -= 1
    return start, end


def _over_gaps(offsets: Sequence[Extent], length: int) -> list[Extent]:
    """Composition (NFC) gives "é" the place of its letter alone: it gets the accent's as well."""
    found = list(offsets)
    reaches = length  # to where the pieces that end where this one does go on
    for i in reversed(range(len(found))):
        start, end = offsets[i]
        if i + 1 < len(found):
            next_start, next_end = offsets[i + 1]
            if next_start >= end:
                reaches = next_start
            elif next_end != end:
                reaches = end
        if start < end:
            found[i] = (start, max(end, reaches))
    return found


# ------------------------------------------------------------------------------------ Decoding

# A stretch of text and the positions of the tokens that spell it.
Unit = tuple[str, Sequence[int]]


def _measure(units: Iterable[Unit], num_tokens: int) -> tuple[str, list[Extent]]:
    """Text, and which of its characters each token has a part in.

    Tokens that say nothing have an empty extent behind what was said before them.
    """
    texts, length = [], 0
    extents: list[Extent | None] = [None] * num_tokens
    for text, owners in units:
        for owner in owners:
            known = extents[owner]
            extents[owner] = (length if known is None else known[0], length + len(text))
        texts.append(text)
        length += len(text)
    ends = itertools.accumulate((0 if one is None else one[1] for one in extents), max)
    found = zip(extents, ends, strict=True)
    return "".join(texts), [(end, end) if one is None else one for one, end in found]


def _units_of_bytes(pieces: Sequence[str]) -> Iterator[Unit]:
    """Decodes byte-level pieces: UTF-8, in which a token may begin or end within a character."""
    content, owners = bytearray(), []
    for position, piece in enumerate(pieces):
        own = _bytes_of(piece)
        content += own
        owners += [position] * len(own)
    for text, start, end in _characters(bytes(content)):
        yield text, sorted(set(owners[start:end]))


def _bytes_of(piece: str) -> bytes:
    """The bytes that a byte-level piece stands for; those of its text if it is no such piece."""
    try:
        return bytes(map(_BYTE_OF.__getitem__, piece))
    except KeyError:  # an added token with a space, say
        return piece.encode()


def _characters(content: bytes) -> Iterator[tuple[str, int, int]]:
    """The characters of UTF-8, each with its bytes; what forms none is "\ufffd"."""
    place = 0
    for text in content.decode(errors="replace"):
        own = text.encode()
        is_there = content.startswith(own, place)
        end = place + (len(own) if is_there else _num_broken(content[place : place + 4]))
        yield text, place, end
        place = end


def _num_broken(content: bytes) -> int:
    """How many of the bytes at the beginning come to one "\ufffd", in Python as in Rust."""
    nums = range(len(content), 1, -1)
    return next((num for num in nums if content[:num].decode(errors="replace") == _BROKEN), 1)


def _units_of_pieces(pieces: Sequence[str]) -> Iterator[Unit]:
    """Decodes sentencepiece-style pieces; a run of bytes is text as a whole, or none of it is."""
    run: list[tuple[int, int]] = []  # (position, byte)
    for position, piece in enumerate(pieces):
        if match := _BYTE.fullmatch(piece):
            run.append((position, int(match[1], 16)))
        elif piece:
            yield from _units_of_run(run)
            run = []
            yield piece.replace("▁", " "), [position]
    yield from _units_of_run(run)


def _units_of_run(run: Sequence[tuple[int, int]]) -> Iterator[Unit]:
    content = bytes(byte for _, byte in run)
    found = list(_characters(content))
    if any(content[start:end] != text.encode() for text, start, end in found):
        yield from ((_BROKEN, [position]) for position, _ in run)
        return
    for text, start, end in found:
        yield text, [position for position, _ in run[start:end]]


def _byte_names() -> dict[str, int]:
    """GPT-2's names of the bytes: themselves if they can be seen, else characters from 256 on."""
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {
        chr(0x100 + i): byte for i, byte in enumerate(others)
    }


_BYTE_OF = _byte_names()

# ------------------------------------------------------------------------------------- Loading


class _Loaded(NamedTuple):
    """A tokenizer.json, ready to use.

    Attributes:
        beginning: encodes what begins a text; decodes.
        continuing: encodes what comes after a text: it puts no space before.
        is_byte_level: which of the two kinds it is.
        prepends: whether a space is put before a text.
        composes: whether characters are composed (NFC) before they are looked up.
        strips: whether decoding leaves out the first space of a text.
        size: one more than the largest id.
        names: the name of every token by its id, as the file has it.
        hidden: by the name of each control token the one that no text holds.
        text_names: the names of the added tokens that are no control tokens.
        silent_ids: control tokens, ends among them.
        end_ids: that end an output, in the order in which they are stated.
        end_id: that is written after a text.
        before_text: ids that are put before a text (BOS).
        is_bos_of_setting: whether the file by itself would put other ids there.
        unknown_id: the id of the unknown token, if there is one.
    """

    beginning: tokenizers.Tokenizer
    continuing: tokenizers.Tokenizer
    is_byte_level: bool
    prepends: bool
    composes: bool
    strips: bool
    size: int
    names: Mapping[int, str]
    hidden: Mapping[str, str]
    text_names: frozenset[str]
    silent_ids: frozenset[int]
    end_ids: tuple[int, ...]
    end_id: int
    before_text: tuple[int, ...]
    is_bos_of_setting: bool
    unknown_id: int | None

    @property
    def space(self) -> str:
        """How a piece writes a space."""
        return _SPACES[self.is_byte_level]

    def piece(self, token_id: int) -> str:
        """How the file writes a token; nothing for a control token or an id that is none."""
        return "" if token_id in self.silent_ids else self.names.get(token_id, "")

    def measure(self, ids: Sequence[int]) -> tuple[str, list[Extent]]:
        """Our own decoding: text, and which of its characters each id has a part in."""
        units = _units_of_bytes if self.is_byte_level else _units_of_pieces
        text, extents = _measure(units([self.piece(i) for i in ids]), len(ids))
        if self.strips and text.startswith(" "):
            text = text[1:]
            extents = [(max(start - 1, 0), max(end - 1, 0)) for start, end in extents]
        return text, extents


def _load(folder: str, more_control_names: frozenset[str]) -> _Loaded:
    """Reads a directory's tokenizer, once while its files are as they are.

    Args:
        folder: the directory.
        more_control_names: added tokens that are control tokens, although the file calls them text.

    Raises:
        UsageError: it cannot be read or is of no kind that is known, or nothing says what ends a
            text.
    """
    where = f"{folder}/{TOKENIZER}"
    try:
        if files.is_remote(folder):
            return _read(folder, more_control_names)
        # A relative one is another after a change of directory.
        place = pathlib.Path(folder).absolute()
        return _read_once(folder, more_control_names, place, _versions(place))
    except (UsageError, OSError):
        raise
    except BaseException as error:  # what the package raises has no type of its own
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = (str(error).splitlines() or [""])[0]
        raise UsageError(
            f"{where}: expected a tokenizer as the package tokenizers writes it, found one that "
            f"cannot be read: {type(error).__name__}: {reason}. Fetch the model's files again."
        ) from error


def _versions(folder: pathlib.Path) -> tuple[tuple[int, int, int] | None, ...]:
    """What tells the files that `_read` reads from others in their place."""
    found = []
    for name in _READ:
        try:
            state = (folder / name).stat()
        except OSError:  # most have not all of them
            found.append(None)
        else:
            found.append((state.st_ino, state.st_size, state.st_mtime_ns))
    return tuple(found)


@functools.lru_cache(maxsize=4)  # a chat model has up to two
def _read_once(
    folder: str, more_control_names: frozenset[str], place: pathlib.Path, versions: tuple[Any, ...]
) -> _Loaded:
    del place, versions  # they decide whether it is read again
    return _read(folder, more_control_names)


_MOST_UNUSED = 1024  # numbers that no token has, beside as many as there are tokens


def _read(path: str, more_control_names: frozenset[str]) -> _Loaded:
    folder, where = epath.Path(path), f"{path}/{TOKENIZER}"
    content = files.read_object(folder / TOKENIZER)
    is_byte_level = _check_kind(content, where)
    names = _names(content)
    if (largest := max(names)) >= 2 * len(names) + _MOST_UNUSED:
        raise UsageError(
            f"{where}: expected the ids of {len(names):,} tokens, found one of {largest:,}. Fetch "
            "the model's files again."
        )
    _check_added(folder, names, where)
    added = {int(one["id"]): one for one in content.get("added_tokens") or ()}
    eos_token = _control_texts(folder).get("eos_token")
    end_ids = _end_ids(folder, {i: names[i] for i in added}, eos_token, where)
    if beyond := _beyond_rows(folder, added) - {*end_ids}:
        content = _without_tokens(content, beyond)
        names = {i: name for i, name in names.items() if i not in beyond}
        added = {i: one for i, one in added.items() if i not in beyond}
    own = [i for i in end_ids if names[i] == eos_token]
    silent = frozenset(end_ids) | {
        i for i, one in added.items() if one["special"] or names[i] in more_control_names
    }
    hidden_of = {names[i]: _hidden_name(i) for i in silent}
    content = _with_hidden_names(content, hidden_of)
    beginning = tokenizers.Tokenizer.from_str(json.dumps(content))
    for i, name in names.items():
        if beginning.token_to_id(hidden_of.get(name, name)) != i:
            raise UsageError(
                f"{where}: expected every token to have the id that is stated, found {name!r} "
                f"with {beginning.token_to_id(hidden_of.get(name, name))} in place of {i}. Fetch "
                "the model's files again."
            )
    bos_token = _control_texts(folder).get("bos_token")
    bos_id = next((i for i in silent if names[i] == bos_token), None)
    of_file = _before_text(beginning)
    before_text = _before_text_by_setting(_settings(folder, SETTINGS), bos_id, of_file)
    beginning.post_processor = None  # pyright: ignore[reportAttributeAccessIssue]
    steps = ("normalizer", "pre_tokenizer")
    prepends = any(_prepends(part) for step in steps for part in _parts(content.get(step)))
    without = {step: _without_prefix(content.get(step)) for step in steps}
    continuing = beginning
    if prepends:
        without = {**content, **without, "post_processor": None}
        continuing = tokenizers.Tokenizer.from_str(json.dumps(without))
    decoders = _types(content.get("decoder"))
    return _Loaded(
        beginning=beginning,
        continuing=continuing,
        is_byte_level=is_byte_level,
        prepends=prepends,
        composes="NFC" in _types(content.get("normalizer")),
        strips=not is_byte_level
        and ("Strip" in decoders or (prepends and "Metaspace" in decoders)),
        size=max(names) + 1,
        names=names,
        hidden=hidden_of,
        text_names=frozenset(names[i] for i in added if i not in silent),
        silent_ids=silent,
        end_ids=end_ids,
        end_id=(*own, *end_ids)[0],
        before_text=before_text,
        is_bos_of_setting=before_text != of_file,
        unknown_id=beginning.token_to_id(content["model"].get("unk_token") or ""),
    )


def _parts(part: Any) -> Iterator[Mapping[str, Any]]:
    """The parts of a normalizer, pre-tokenizer or decoder, those of sequences one by one."""
    if part and part["type"] == "Sequence":
        for key in ("normalizers", "pretokenizers", "decoders"):
            for one in part.get(key, ()):
                yield from _parts(one)
    elif part:
        yield part


def _types(part: Any) -> set[str]:
    return {one["type"] for one in _parts(part)}


def _check_kind(content: Mapping[str, Any], where: str) -> bool:
    """Whether a tokenizer is byte-level; a UsageError where it is of neither kind."""
    decoders = _types(content.get("decoder"))
    is_byte_level = "ByteLevel" in decoders
    normalizers = list(_parts(content.get("normalizer")))
    is_plain = all(
        one["type"] in ("NFC", "Prepend")
        or (one["type"] == "Replace" and (one["pattern"], one["content"]) == ({"String": " "}, "▁"))
        for one in normalizers
    )
    is_sentencepiece = bool(decoders & {"ByteFallback", "Metaspace"})
    if not (is_known(content) and is_plain and (is_byte_level or is_sentencepiece)):
        found = sorted(decoders | {one["type"] for one in normalizers})
        raise UsageError(
            f"{where}: expected byte-level BPE (GPT-2, Llama 3, Qwen) or BPE with byte fallback "
            "(Llama 2, Gemma, Mistral) that changes no more of a text than NFC does, found "
            f"{_model_type(content)} with {', '.join(found) or 'no decoder'}. Use another model."
        )
    return is_byte_level


def _names(content: Mapping[str, Any]) -> dict[int, str]:
    names = {i: piece for piece, i in content["model"]["vocab"].items()}
    added = content.get("added_tokens") or ()
    return names | {int(one["id"]): one["content"] for one in added}


def _check_added(folder: epath.Path, names: Mapping[int, str], where: str) -> None:
    """The settings list tokens as well: none may be there alone."""
    for i, one in (_settings(folder, SETTINGS).get("added_tokens_decoder") or {}).items():
        if names.get(int(i)) != one["content"]:
            raise UsageError(
                f"{where}: expected the tokens of {SETTINGS}, found id {i} to be "
                f"{names.get(int(i))!r} in place of {one['content']!r}. Save the tokenizer again, "
                "with save_pretrained of transformers."
            )


def _settings(folder: epath.Path, name: str) -> Mapping[str, Any]:
    return files.read_object(folder / name) if (folder / name).exists() else {}


def _control_texts(folder: epath.Path) -> dict[str, str]:
    """How `bos_token`, `eos_token` and others that a directory states are written."""
    found = {}
    for name in ("special_tokens_map.json", SETTINGS):
        for key, value in _settings(folder, name).items():
            text = value.get("content") if isinstance(value, Mapping) else value
            if key.endswith("_token") and isinstance(text, str):
                found[key] = text
    return found


def _end_ids(
    folder: epath.Path, names: Mapping[int, str], eos_token: str | None, where: str
) -> tuple[int, ...]:
    """The ids that end an output, of the added tokens: no word of the vocabulary ends a text.

    Those of `generation_config.json`, which transformers and vLLM follow; `config.json` may keep a
    default that was never the model's, and counts where the former states none. The tokenizer's own
    `eos_token` is an end besides, as in vLLM.
    """
    config = _settings(folder, "config.json")
    stated = _settings(folder, GENERATION).get("eos_token_id")
    if stated is None:
        stated = config.get("eos_token_id")
    if stated is None:
        stated = (config.get("text_config") or {}).get("eos_token_id")
    ids = [] if stated is None else [stated] if isinstance(stated, int) else list(stated)
    ids += [i for i, name in names.items() if name == eos_token]
    if not ids:
        raise UsageError(
            f"{where}: expected an id that ends a text, found none. Set eos_token_id in "
            f"{GENERATION}, or eos_token in {SETTINGS}."
        )
    for i in ids:
        if i not in names:
            raise UsageError(
                f"{where}: expected eos_token_id to be ids of added tokens, found {i!r}, which is "
                f"none of them. Correct it in {GENERATION}, or in config.json."
            )
    return tuple(dict.fromkeys(ids))


def _hidden_name(token_id: int) -> str:
    """A name that nobody can write who does not know it: private-use characters about a secret."""
    return f"\ue000{_SECRET}.{token_id}\ue001"


_SECRET = secrets.token_hex(16)


def _with_hidden_names(content: Mapping[str, Any], hidden_of: Mapping[str, str]) -> dict[str, Any]:
    """The tokenizer with control tokens under hidden names: no text comes to one of them.

    The package's own switch, `encode_special_tokens`, looks no control token up in any text; here
    a template's are looked up in the same text in which a user's are not. Nor does it keep a piece
    of the vocabulary, as "</s>" is in Llama 2's, from being put together out of smaller ones:
    merges that would are left out. What the ids are does not depend on the secret.
    """
    model = dict(content["model"])
    model["dropout"] = None  # the same text, the same ids
    model["vocab"] = {hidden_of.get(name, name): i for name, i in model["vocab"].items()}
    model["merges"] = [one for one in model["merges"] if not _touches(one, hidden_of)]
    if model.get("unk_token"):
        model["unk_token"] = hidden_of.get(model["unk_token"], model["unk_token"])
    added = [
        {**one, "content": hidden_of[one["content"]], "special": True, "normalized": False}
        if one["content"] in hidden_of
        else one
        for one in content.get("added_tokens") or ()
    ]
    return {**content, "model": model, "added_tokens": added, "truncation": None, "padding": None}


def _touches(merge: str | Sequence[str], names: Mapping[str, str]) -> bool:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left in names or right in names or left + right in names


def _beyond_rows(folder: epath.Path, added: Mapping[int, Mapping[str, Any]]) -> set[int]:
    """The control tokens that the model of the same directory has no row for, and never sees.

    Gemma 3's text models share a tokenizer with those that see images: its last id stands for a
    piece of one.
    """
    num_rows = _settings(folder, "config.json").get("vocab_size")
    if not isinstance(num_rows, int):
        return set()
    return {i for i, one in added.items() if i >= num_rows and one["special"]}


def _without_tokens(content: Mapping[str, Any], ids: Collection[int]) -> dict[str, Any]:
    vocab = {name: i for name, i in content["model"]["vocab"].items() if i not in ids}
    added = [one for one in content["added_tokens"] if int(one["id"]) not in ids]
    return {**content, "model": {**content["model"], "vocab": vocab}, "added_tokens": added}


# The classes of transformers that put a BOS before a text by this setting, whatever the file says.
_BOS_BY_SETTING = re.compile(r"(Code)?(Llama|Gemma)Tokenizer(Fast)?")


def _before_text(tokenizer: tokenizers.Tokenizer) -> tuple[int, ...]:
    """What the file puts before a text: its BOS, if that is. What is put behind is an end."""
    encoding = tokenizer.encode("a", add_special_tokens=True)
    num_before = next((i for i, put in enumerate(encoding.special_tokens_mask) if not put), 0)
    return tuple(encoding.ids[:num_before])


def _before_text_by_setting(
    settings: Mapping[str, Any], bos_id: int | None, of_file: tuple[int, ...]
) -> tuple[int, ...]:
    """What is put before a text where the settings may say otherwise than the file."""
    is_put = settings.get("add_bos_token")
    if is_put is not None and _BOS_BY_SETTING.fullmatch(str(settings.get("tokenizer_class"))):
        return (bos_id,) if is_put and bos_id is not None else ()
    return of_file


def _prepends(part: Mapping[str, Any]) -> bool:
    """Whether a part of a tokenizer puts a space before a text."""
    if part["type"] == "Metaspace":
        return part.get(
            "prepend_scheme", "always" if part.get("add_prefix_space", True) else ""
        ) in (
            "always",
            "first",
        )
    return part["type"] == "Prepend" or bool(part.get("add_prefix_space"))


def _without_prefix(part: Any) -> Any:
    """The same normalizer or pre-tokenizer, but that it puts no space before a text."""
    if not part:
        return part
    if part["type"] == "Sequence":
        (key,) = set(part) - {"type"}
        nested = [one for one in map(_without_prefix, part[key]) if one]
        return {"type": "Sequence", key: nested}
    if part["type"] == "Prepend":
        return None
    if part["type"] == "Metaspace":
        kept = {key: value for key, value in part.items() if key != "add_prefix_space"}
        return {**kept, "prepend_scheme": "never"}
    return {**part, "add_prefix_space": False} if "add_prefix_space" in part else part
