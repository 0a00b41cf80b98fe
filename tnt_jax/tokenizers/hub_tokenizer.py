"""Tokenisers of decoder-only models: a `tokenizer.json`, read with the `tokenizers` package.

Two kinds are known. *Byte-level* BPE (GPT-2, Llama 3, Qwen, SmolLM) writes each byte of UTF-8 as a
character of its own; *sentencepiece-style* BPE (Llama 2, Gemma, Mistral) writes a space as "▁" and
what it has no piece for as bytes, `<0xNN>`. Text never becomes a control token: those that the file
has are given names that no text can hold (`loaded_tokenizer`).
"""

import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import tokenizers
from etils import epath

from tnt_jax.tokenizers import hub_files, loaded_tokenizer, piece_texts
from tnt_jax.tokenizers.tokenization import (
    Encoded,
    Extent,
    Place,
    Tokeniser,
    find_end,
    refuse_messages,
)


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
    def _loaded(self) -> loaded_tokenizer.LoadedTokenizer:
        return loaded_tokenizer.load(self.folder, self._more_control_names)

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
        return hub_files.control_texts(epath.Path(self.folder))

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
        is_byte_level = loaded.is_byte_level
        return [piece_texts.bytes_of(piece, is_byte_level=is_byte_level) for piece in pieces]

    @property
    def run_ids(self) -> frozenset[int]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """See `Tokeniser.run_ids`: those of single bytes."""
        if self._loaded.is_byte_level:
            return frozenset()
        return frozenset(i for i in range(self.size) if piece_texts.is_byte(self._loaded.piece(i)))

    def pieces(self) -> list[str | None]:
        """How the file writes each token, by its id; None for a number that no token has."""
        return [self._loaded.names.get(i) for i in range(self.size)]

    @functools.cached_property
    def tokenizer_digest(self) -> str:
        """A hash of the files' content that decides the ids of a text; it names no place.

        Resuming compares it, so that a run may go on where the files have moved, and not with
        another tokenizer of the same size.
        """
        digest = hashlib.sha256((epath.Path(self.folder) / hub_files.TOKENIZER).read_bytes())
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
        for name in (*hub_files.FILES, hub_files.GENERATION):
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
