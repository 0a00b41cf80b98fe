"""Tokenisers: text to token ids and back, and which characters each token stands for.

`Tokeniser` is what the rest of the project asks. Here are T5's, `SentencePiece` and `Bytes` (ByT5);
`hub_tokenizer` and `chat` have those of decoder-only models. Offsets are Unicode code points. The
*extent* of a token is the stretch of text that it stands for, without the spaces at its ends: the
piece "▁house" does not own the space before it. Tokens that stand for no text (an end, padding, a
lone "▁") have an empty extent. No extent begins or ends with what normalisation drops, such as a
character of no width.
"""

import abc
import codecs
import dataclasses
import functools
import io
import os
import re
import threading
from collections.abc import Collection, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import sentencepiece
from etils import epath
from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2

from tnt_jax.runtime import files
from tnt_jax.runtime.errors import UsageError, is_absence, naming_file

Extent = tuple[int, int]

# T5's ids, for its tokenisers: whoever has one of these asks it.
_PADDING_ID = 0
_END_ID = 1


class Encoded(NamedTuple):
    """A text as tokens, without an end.

    Attributes:
        ids: the token ids.
        extents: (start, end) of each of them in the text as it was given.
        silent: places within the extents that hold what no token says.
    """

    ids: list[int]
    extents: list[Extent]
    silent: frozenset[int]


class Place(NamedTuple):
    """Where an alternative to a generated token would begin.

    Attributes:
        start: the position at which it would depart from what was generated.
        before: the text that the token stands after, as `Tokeniser.continuations` takes it.
        space: the id of a lone "▁" at `start`; None where the token itself is there.
    """

    start: int
    before: str
    space: int | None


class Tokeniser(abc.ABC):
    """What the project asks of a tokeniser.

    Attributes:
        end_ids: the ids that end an output.
        end_id: the one of `end_ids` that is written after a text.
        never_said: the ids that no output may contain, such as padding.
        says_broken: whether bytes that form no character are decoded, as "\ufffd", or left out.
        run_ids: ids of single bytes of which a run is text as a whole, or none of it is.
    """

    end_ids: frozenset[int]
    end_id: int
    never_said: frozenset[int]
    says_broken: bool = True
    run_ids: frozenset[int] = frozenset()

    @property
    @abc.abstractmethod
    def size(self) -> int:
        """Number of ids. A model may have more rows; ids beyond `size` stand for no text."""

    @property
    @abc.abstractmethod
    def unknown_id(self) -> int | None:
        """The id that stands for whatever has no other; None where everything has one."""

    @abc.abstractmethod
    def encode(self, text: str) -> list[int]:
        """The ids of a text, without an end."""

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of several texts, which may be faster than one by one."""
        return [self.encode(text) for text in texts]

    @property
    def written(self) -> Sequence[str] | None:
        """How each id is written, with its spaces, if a prompt is a text's ids and the end.

        Half a surrogate pair stands for what is not written so. None where there are none.
        """
        return None

    @property
    def shapes(self) -> np.ndarray:
        """How many characters of each id's `written` are spaces, and where, `[V, 3]`.

        The columns count the spaces before the text, the characters of the text, and the spaces
        after it. Ids that are not written have zeros.
        """
        raise NotImplementedError

    @abc.abstractmethod
    def prompt_ids(self, text: str, messages: Sequence[tuple[str, str]] = ()) -> list[int]:
        """The ids of a prompt as a model takes it.

        Args:
            text: the prompt, where there are no messages.
            messages: (role, content) pairs: a conversation, for a chat model.

        Raises:
            UsageError: there are messages, and the model has no chat template.
        """

    def prompt_text(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of a prompt's ids, for people."""
        return self.decode(ids)

    @abc.abstractmethod
    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of ids up to the first end: the text that `extents` measures."""

    @abc.abstractmethod
    def encode_with_extents(self, text: str) -> Encoded:
        """The ids of a text, and which of its characters each stands for."""

    def encode_reply(self, text: str, inputs: str) -> list[int]:
        """The ids of what a model says to a prompt, where it is given as a text, without an end.

        Args:
            text: the reply.
            inputs: the prompt; a chat model's template writes it, so that it does not matter there.
        """
        del inputs
        return self.encode(text)

    def encode_reply_with_extents(self, text: str, inputs: str) -> Encoded:
        """The ids of a reply, and which of its characters each stands for."""
        del inputs
        return self.encode_with_extents(text)

    @abc.abstractmethod
    def extents(self, ids: Sequence[int] | np.ndarray) -> tuple[str, list[Extent]]:
        """Decodes ids and says which characters each of them stands for.

        A token that is one byte of a character has the whole character as its extent.

        Returns:
            The text up to the first end, and one (start, end) per id.
        """

    @abc.abstractmethod
    def place_of(self, ids: Sequence[int] | np.ndarray, position: int) -> Place:
        """Where an alternative to the token at a position would begin."""

    @abc.abstractmethod
    def continuations(
        self, before: str | None, strings: Sequence[str]
    ) -> list[list[tuple[int, bool]]]:
        """The tokens of each string where it follows a text, from a token boundary on.

        Args:
            before: the end of the text, so far as it matters: a space or nothing, and characters
                that the first token may hold beside the string's. None begins a text.
            strings: texts without spaces at their ends.

        Returns:
            The ids, each with whether it spells some of the string, rather than of `before` alone.
        """

    @property
    @abc.abstractmethod
    def token_bytes(self) -> Sequence[bytes]:
        """What each id adds to the bytes of a text in UTF-8; nothing for one that says nothing.

        A space that decoding leaves out at the beginning of a text is there.
        """


def check_vocabulary(vocabulary: Any) -> int:
    """Loads a tokeniser now, rather than in the middle of a run, and returns its size.

    Raises:
        UsageError: it is no tokeniser; or the file of a SentencePiece is missing, is no
            sentencepiece model, or has other ids than T5's (padding 0, EOS 1).
    """
    if not hasattr(type(vocabulary), "encode_with_extents"):
        raise UsageError(
            "vocabulary: expected a tokeniser (pretrained.vocabulary, tokenization.SentencePiece "
            f"or tokenization.Bytes), found {type(vocabulary).__name__}."
        )
    return vocabulary.size


def refuse_messages(messages: Sequence[tuple[str, str]]) -> None:
    """Raises a UsageError where there are messages, for a tokeniser without a chat template."""
    if messages:
        raise UsageError(
            "messages: expected a model with a chat template, found one without, or "
            "CHAT_TEMPLATE=None. Give inputs, which are one text, in place of messages."
        )


def find_end(ids: Sequence[int], end_ids: Collection[int]) -> int:
    """The position of the first end; the number of ids where there is none."""
    return next((place for place, id_ in enumerate(ids) if id_ in end_ids), len(ids))


def said(ids: np.ndarray, end_ids: Collection[int]) -> tuple[int, ...]:
    """The ids of a decoded row: up to its first end, or all where there is none."""
    row = ids.tolist()
    return tuple(row[: find_end(row, end_ids) + 1])


# ------------------------------------------------------------------------------- sentencepiece

_SPACE = "▁"  # how sentencepiece writes a space inside a piece
# Stands before a text that is tokenised as a continuation. A private-use character: in no
# vocabulary, so it joins no piece.
_ANCHOR = "\ue000"
_BLANK = re.compile(r"^\s+|\s{2,}|[^\S ]")  # white space that is more, or other, than one space
_NOT_WRITTEN = "\ud800"  # half a surrogate pair, which is in no text
_OFFSETS = "offset_mapping"  # pieces with their places in the text, in code points

_protos: Any = sentencepiece_model_pb2  # protobuf makes its classes when it is imported


@dataclasses.dataclass(frozen=True)
class SentencePiece(Tokeniser):
    """A sentencepiece model, as T5 has it: padding 0, EOS 1, extra ids after the pieces.

    Attributes:
        sentencepiece_model_file: the model; it is read when the first text comes.
        extra_ids: number of pieces "▁<extra_id_0>", ... after its own, the first with the last id.
    """

    sentencepiece_model_file: str
    extra_ids: int = 0

    end_ids = frozenset([_END_ID])
    end_id = _END_ID
    never_said = frozenset([_PADDING_ID])

    def __reduce__(self) -> tuple[Any, ...]:
        # What a copy or another process gets: no loaded model.
        return type(self), (self.sentencepiece_model_file, self.extra_ids)

    @functools.cached_property
    def processor(self) -> sentencepiece.SentencePieceProcessor:
        """The loaded model.

        Raises:
            UsageError: there is no file, it is no sentencepiece model, or its ids are not T5's.
        """
        file = self.sentencepiece_model_file
        try:
            with naming_file(file):
                content = epath.Path(file).read_bytes()
            processor = _load(content, self.extra_ids)
        except (OSError, DecodeError, RuntimeError, ValueError) as error:
            if isinstance(error, OSError) and not is_absence(error):
                raise
            raise UsageError(
                f"vocabulary: expected a sentencepiece model at {file!r}: "
                f"{(str(error).splitlines() or [type(error).__name__])[0]}"
            ) from error
        if (processor.pad_id(), processor.eos_id()) != (_PADDING_ID, _END_ID):
            raise UsageError(
                f"vocabulary {file!r}: expected T5's ids, padding {_PADDING_ID} and EOS {_END_ID}, "
                f"found padding {processor.pad_id()} and EOS {processor.eos_id()}. For a "
                "decoder-only model, name the directory with its tokenizer.json instead. For a T5, "
                "train it with pad_id=0, eos_id=1, unk_id=2 "
                "(tnt_jax.tokenizers.tokenization.train_sentencepiece does)."
            )
        return processor

    @property
    def size(self) -> int:
        """Number of pieces, extra ids included."""
        return self.processor.get_piece_size()

    @property
    def unknown_id(self) -> int:
        """The unknown piece."""
        return self.processor.unk_id()

    def encode(self, text: str) -> list[int]:
        """See `Tokeniser.encode`."""
        return self.processor.encode(text)

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """See `Tokeniser.encode_all`."""
        return self.processor.encode([*texts]) if texts else []

    def prompt_ids(self, text: str, messages: Sequence[tuple[str, str]] = ()) -> list[int]:
        """See `Tokeniser.prompt_ids`."""
        refuse_messages(messages)
        return [*self.encode(text), _END_ID]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """See `Tokeniser.decode`."""
        return self.processor.decode_ids(self._spoken(ids))

    def encode_with_extents(self, text: str) -> Encoded:
        """See `Tokeniser.encode_with_extents`."""
        ids = self.encode(text)
        spelt = "".join(map(self.written.__getitem__, ids))
        if (found := self._read_off(ids, spelt, text)) is not None:
            return Encoded(ids, found, frozenset())
        words = " ".join(text.split())
        if (found := self._read_off(ids, spelt, words)) is not None:
            return Encoded(ids, _over_blanks(found, text), frozenset())
        encoded = self.processor.encode(text, return_type=_OFFSETS)
        silent = _silent(self.processor, text)
        extents = _piece_extents(self.processor, encoded, text, silent)
        places = frozenset()
        if not silent <= {" "}:
            places = frozenset(
                place
                for piece, extent in zip(encoded["pieces"], extents, strict=True)
                if _SPACE not in piece.strip(_SPACE)  # a piece of several words says the spaces
                for place in range(*extent)
                if text[place] in silent
            )
        return Encoded(encoded["ids"], extents, places)

    def extents(self, ids: Sequence[int] | np.ndarray) -> tuple[str, list[Extent]]:
        """See `Tokeniser.extents`."""
        spoken = self._spoken(ids)
        text = self.processor.decode_ids(spoken)
        spelt = "".join(map(self.written.__getitem__, spoken))
        extents = self._read_off(spoken, spelt, text)
        if extents is None:
            decoded = self.processor.decode(spoken, return_type=_OFFSETS)
            extents = _piece_extents(self.processor, decoded, text)
        return text, extents + [(len(text), len(text))] * (len(ids) - len(spoken))

    def place_of(self, ids: Sequence[int] | np.ndarray, position: int) -> Place:
        """See `Tokeniser.place_of`."""
        own = self._piece(ids[position])
        if position > 0 and self._piece(ids[position - 1]) == _SPACE and own[:1] != _SPACE:
            return Place(position - 1, " ", int(ids[position - 1]))
        return Place(position, " " if own.startswith(_SPACE) else "", None)

    def continuations(
        self, before: str | None, strings: Sequence[str]
    ) -> list[list[tuple[int, bool]]]:
        """See `Tokeniser.continuations`."""
        if not strings:
            return []  # sentencepiece takes half a millisecond over none
        # Whether a text starts with a space piece is the model's own setting: no anchor there.
        anchor = "" if before is None else _ANCHOR + before
        texts = [anchor + string for string in strings]
        encoded = self.processor.encode(texts, return_type=_OFFSETS)
        found = []
        for text, of_text in zip(texts, encoded, strict=True):
            extents = _piece_extents(self.processor, of_text, text, _silent(self.processor, text))
            found.append(
                [
                    (token_id, end > len(anchor))
                    for token_id, (_, end) in zip(of_text["ids"], extents, strict=True)
                    # A string that starts with an unknown character is one unknown token with
                    # the anchor.
                    if not anchor or end > len(_ANCHOR)
                ]
            )
        return found

    @property
    def token_bytes(self) -> list[bytes]:
        """See `Tokeniser.token_bytes`."""
        processor = self.processor
        ids = range(self.size)
        found = [processor.id_to_piece(i).replace(_SPACE, " ").encode() for i in ids]
        for i in ids:
            if processor.is_control(i):
                found[i] = b""
            elif processor.is_byte(i):
                found[i] = bytes([int(processor.id_to_piece(i)[3:5], 16)])  # <0xNN>
        found[self.unknown_id] = processor.decode_ids([self.unknown_id]).encode()
        return found

    @functools.cached_property
    def written(self) -> list[str]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """See `Tokeniser.written`."""
        processor = self.processor
        return [
            _NOT_WRITTEN
            if processor.is_control(i)
            or processor.is_unknown(i)
            or processor.is_byte(i)
            or processor.is_unused(i)
            else processor.id_to_piece(i).replace(_SPACE, " ")
            for i in range(self.size)
        ]

    @functools.cached_property
    def shapes(self) -> np.ndarray:  # pyright: ignore[reportIncompatibleMethodOverride]
        """See `Tokeniser.shapes`."""
        written = ["" if piece == _NOT_WRITTEN else piece for piece in self.written]
        return np.array(
            [
                (
                    len(piece) - len(piece.lstrip(" ")),
                    len(piece.strip(" ")),
                    len(piece.lstrip(" ")) - len(piece.strip(" ")),
                )
                for piece in written
            ],
            np.int64,
        )

    @functools.cached_property
    def _shapes(self) -> list[list[int]]:
        return self.shapes.tolist()

    def _read_off(self, ids: Sequence[int], spelt: str, text: str) -> list[Extent] | None:
        """The extents, where the pieces are the text as it is given; None where they are not.

        That takes a seventh of the time of sentencepiece's own offsets.

        Args:
            ids: the tokens, without an end.
            spelt: their `written`, one after another.
            text: whose tokens they are.
        """
        # A space stands before the first word of a text; a model may have been trained without.
        if spelt == text and text[:1] != " ":
            place = 0
        elif spelt[:1] == " " and spelt[1:] == text:
            place = -1
        else:
            return None
        extents, shapes = [], self._shapes
        for token_id in ids:
            before, core, after = shapes[token_id]
            start = place + before
            place = start + core + after
            extents.append((start, start + core) if core else (place, place))
        return extents

    def _spoken(self, ids: Sequence[int] | np.ndarray) -> list[int]:
        """The ids up to the first end; those of a model's padding rows are unknown."""
        known, size = [int(i) for i in ids], self.size
        return [i if i < size else self.unknown_id for i in known[: find_end(known, self.end_ids)]]

    def _piece(self, token_id: int | np.integer) -> str:
        """The piece of an id, of which a model's padding rows have none."""
        return self.processor.id_to_piece(int(token_id)) if token_id < self.size else ""


_loading = threading.Lock()  # loading is not safe in several threads


@functools.lru_cache(maxsize=8)
def _load(content: bytes, extra_ids: int) -> sentencepiece.SentencePieceProcessor:
    model = _protos.ModelProto.FromString(content)
    for number in reversed(range(extra_ids)):
        model.pieces.add(
            piece=f"{_SPACE}<extra_id_{number}>",
            score=0.0,
            type=_protos.ModelProto.SentencePiece.USER_DEFINED,
        )
    processor = sentencepiece.SentencePieceProcessor()
    with _loading:
        processor.LoadFromSerializedProto(model.SerializeToString())
    # One that is no UTF-8 is found now, and not when it comes up.
    processor.id_to_piece(list(range(processor.get_piece_size())))
    return processor


def _silent(processor: sentencepiece.SentencePieceProcessor, text: str) -> frozenset[str]:
    """The characters of a text that come to nothing, or to a space, when it is tokenised."""
    return frozenset(character for character in set(text) if _is_silent(processor, character))


@functools.lru_cache(maxsize=10_000)
def _is_silent(processor: sentencepiece.SentencePieceProcessor, character: str) -> bool:
    return not "".join(processor.encode(character, out_type=str)).strip(_SPACE)


def _piece_extents(
    processor: sentencepiece.SentencePieceProcessor,
    mapping: dict,
    text: str,
    silent: Collection[str] = (),
) -> list[Extent]:
    """Trims the spaces from sentencepiece's offsets, and fills in what it leaves empty.

    What is `silent` is trimmed too: sentencepiece gives it to the space or the letter before it.
    When several pieces spell one character (byte fallback; "½", normalised to "1⁄2") sentencepiece
    gives the character to the last of them and nothing to the others. All of them spell it.
    """
    extents = []
    following = (len(text), len(text))  # the first character of the next piece that has any
    for token_id, piece, (start, end) in zip(
        reversed(mapping["ids"]),
        reversed(mapping["pieces"]),
        reversed(mapping["offsets"]),
        strict=True,
    ):
        # Beside a "▁" the text as given may have any white space, such as a tab or two spaces.
        beside_space = _SPACE in (piece[:1], piece[-1:])
        first, last = start, end
        while first < last and _is_blank(text[first], beside_space, silent):
            first += 1
        while first < last and _is_blank(text[last - 1], beside_space, silent):
            last -= 1
        if processor.is_control(token_id) or not piece.strip(_SPACE):
            extents.append((end, end))
        elif first < last:
            extents.append((first, last))
            following = (first, first + 1)
        else:
            extents.append(following)
    return extents[::-1]


def _over_blanks(extents: list[Extent], text: str) -> list[Extent]:
    """Extents in a text whose white space was one space between two words, in the text itself."""
    places, place = [], 0  # of each character of that text
    for blank in _BLANK.finditer(text := text.rstrip()):
        places += range(place, blank.start())
        if blank.start():
            places.append(blank.end() - 1)
        place = blank.end()
    places += range(place, len(text) + 1)
    return [
        (places[start], places[end - 1] + 1) if start < end else (places[end], places[end])
        for start, end in extents
    ]


def _is_blank(character: str, beside_space: bool, silent: Collection[str]) -> bool:
    """Whether a piece does not say a character at its end."""
    is_space = character.isspace() if beside_space else character == " "
    return is_space or character in silent


# --------------------------------------------------------------------------------------- Bytes

_NUM_SPECIAL = 3  # padding, EOS, unknown
_NUM_BYTES = 256


@dataclasses.dataclass(frozen=True)
class Bytes(Tokeniser):
    """ByT5's tokens: UTF-8 bytes, each with the id byte + 3.

    Attributes:
        extra_ids: number of ids after those of the bytes; they stand for no text.
    """

    extra_ids: int = 0

    end_ids = frozenset([_END_ID])
    end_id = _END_ID
    never_said = frozenset([_PADDING_ID])
    says_broken = False

    @property
    def unknown_id(self) -> int:
        """What stands for no byte."""
        return 2

    @property
    def size(self) -> int:
        """Number of ids, extra ids included."""
        return _NUM_SPECIAL + _NUM_BYTES + self.extra_ids

    def encode(self, text: str) -> list[int]:
        """See `Tokeniser.encode`."""
        return [byte + _NUM_SPECIAL for byte in text.encode()]

    def prompt_ids(self, text: str, messages: Sequence[tuple[str, str]] = ()) -> list[int]:
        """See `Tokeniser.prompt_ids`."""
        refuse_messages(messages)
        return [*self.encode(text), _END_ID]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """See `Tokeniser.decode`."""
        return self.extents(ids)[0]

    def encode_with_extents(self, text: str) -> Encoded:
        """See `Tokeniser.encode_with_extents`."""
        ids = self.encode(text)
        return Encoded(ids, self.extents(ids)[1], frozenset())

    def extents(self, ids: Sequence[int] | np.ndarray) -> tuple[str, list[Extent]]:
        """See `Tokeniser.extents`."""
        known = [int(i) for i in ids]
        spoken = known[: find_end(known, self.end_ids)]
        text, extents = _byte_extents(spoken)
        return text, extents + [(len(text), len(text))] * (len(known) - len(spoken))

    def place_of(self, ids: Sequence[int] | np.ndarray, position: int) -> Place:
        """See `Tokeniser.place_of`."""
        del ids
        return Place(position, "", None)

    def continuations(
        self, before: str | None, strings: Sequence[str]
    ) -> list[list[tuple[int, bool]]]:
        """See `Tokeniser.continuations`."""
        del before  # no token holds more than a byte
        return [[(i, True) for i in self.encode(string)] for string in strings]

    @property
    def token_bytes(self) -> list[bytes]:
        """See `Tokeniser.token_bytes`."""
        own = [bytes([byte]) for byte in range(_NUM_BYTES)]
        return [b""] * _NUM_SPECIAL + own + [b""] * self.extra_ids


def _byte_extents(ids: Sequence[int] | np.ndarray) -> tuple[str, list[Extent]]:
    """Text and extents of ByT5's ids, byte + 3; others, and broken characters, say nothing."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="ignore")
    text = ""
    extents = [(0, 0)] * len(ids)
    unfinished = []  # positions of the bytes since the last whole character
    for position, token_id in enumerate(ids):
        extents[position] = (len(text), len(text))
        if not _NUM_SPECIAL <= token_id < _NUM_SPECIAL + _NUM_BYTES:
            continue
        unfinished.append(position)
        character = decoder.decode(bytes([token_id - _NUM_SPECIAL]))
        if character:
            start = len(text) + (character == " ")
            for own in unfinished[-len(character.encode()) :]:
                extents[own] = (start, len(text) + 1)
            text += character
            unfinished = []
    return text, extents


# ------------------------------------------------------------------------------------ Training


def train_sentencepiece(
    texts: Iterable[str],
    path: str | os.PathLike,
    *,
    vocab_size: int,
    user_defined_symbols: Sequence[str] = (),
) -> None:
    """Trains a unigram sentencepiece model with T5's ids: padding 0, EOS 1, unknown 2, no BOS.

    Every character of `texts` gets a piece. The same texts give the same file on any machine.

    Args:
        texts: the corpus; line breaks count as spaces.
        path: the model file to write.
        vocab_size: number of ids, those three included.
        user_defined_symbols: strings that always are one token, such as slot names.

    Raises:
        UsageError: no text, or `vocab_size` is more, or less, than this corpus can fill.
    """
    sentences = [text for text in (" ".join(text.split()) for text in texts) if text]
    if not sentences:
        raise UsageError("train_sentencepiece: expected texts, found none.")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=model,
            vocab_size=vocab_size,
            pad_id=_PADDING_ID,
            eos_id=_END_ID,
            unk_id=2,
            bos_id=-1,
            character_coverage=1.0,
            user_defined_symbols=list(user_defined_symbols),
            # The default of 4192 bytes silently skips longer texts.
            max_sentence_length=max(len(sentence.encode()) for sentence in sentences) + 1,
            num_threads=1,  # sums of floats would depend on the number of threads
            minloglevel=2,
        )
    except RuntimeError as error:
        # Before "] " stands a place in sentencepiece's source, after it the advice.
        advice = str(error).rpartition("] ")[2]
        raise UsageError(f"train_sentencepiece: vocab_size={vocab_size}: {advice}") from error
    with files.replacing(path) as unfinished:
        unfinished.write_bytes(model.getvalue())
