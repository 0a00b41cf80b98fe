"""Text to token ids and back, and which tokens an unwanted stretch of text touches.

Works for seqio's `SentencePieceVocabulary` and `ByteVocabulary`. Offsets are Unicode code points.
The *extent* of a token is the stretch of text that it stands for, without the spaces at its ends:
the piece "▁house" does not own the space before it. Tokens that stand for no text (EOS, padding, a
lone "▁") have an empty extent. No extent begins or ends with what normalisation drops, such as a
character of no width.
"""

import codecs
import dataclasses
import functools
import io
import itertools
import os
from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import sentencepiece

from tnt_jax.data import records
from tnt_jax.runtime import files
from tnt_jax.runtime.errors import UsageError

if (
    TYPE_CHECKING
):  # seqio imports TensorFlow, which takes seconds; whoever has a vocabulary has paid
    import seqio

PAD_ID = 0
EOS_ID = 1
MARKS = ("whole", "first_token")  # what a span makes negative

Extent = tuple[int, int]

_SPACE = "▁"  # how sentencepiece writes a space inside a piece
# Stands before a text that is tokenised as a continuation. A private-use character: in no
# vocabulary, so it joins no piece.
_ANCHOR = "\ue000"


@dataclasses.dataclass(frozen=True, eq=False)
class MarkedTarget:
    """A target sequence and what must not be said in it.

    Attributes:
        target_ids: `[T]` int32, EOS included.
        negative_pairs: `[M, 2]` int32 rows (position, id), sorted, without repeats.
        span_numbers: `[T]` int32: of each token the number, from 1, of the first span that marks
            it; 0 where none does, -1 where the token stands for no text.
        num_spans_without_token: spans that overlap no token's extent (white space, or characters
            that the tokeniser's normalisation drops), so that nothing was marked for them.
    """

    target_ids: np.ndarray
    negative_pairs: np.ndarray
    span_numbers: np.ndarray
    num_spans_without_token: int


def check_vocabulary(vocabulary: "seqio.Vocabulary") -> int:
    """Loads the vocabulary now, rather than in the middle of a run, and returns its size.

    Raises:
        UsageError: its file is missing or no sentencepiece model, or its ids are not T5's
            (padding 0, EOS 1), or it is of another kind.
    """
    import seqio
    import tensorflow as tf
    from google.protobuf.message import DecodeError

    if isinstance(vocabulary, seqio.SentencePieceVocabulary):
        file = vocabulary.sentencepiece_model_file
        try:
            processor = vocabulary.tokenizer
        except (tf.errors.OpError, DecodeError, RuntimeError, ValueError) as error:
            raise UsageError(
                f"vocabulary: expected a sentencepiece model at {file!r}: "
                f"{str(error).splitlines()[0]}"
            ) from error
        if (processor.pad_id(), processor.eos_id()) != (PAD_ID, EOS_ID):
            raise UsageError(
                f"vocabulary {file!r}: expected T5's ids, padding 0 and EOS 1, found padding "
                f"{processor.pad_id()} and EOS {processor.eos_id()}. Train it with pad_id=0, "
                "eos_id=1, unk_id=2 (tnt_jax.data.tokenization.train_sentencepiece does)."
            )
    elif not isinstance(vocabulary, seqio.ByteVocabulary):
        raise UsageError(
            "vocabulary: expected a seqio SentencePieceVocabulary or ByteVocabulary, found "
            f"{type(vocabulary).__name__}."
        )
    return vocabulary.vocab_size


def encode(vocabulary: "seqio.Vocabulary", text: str, *, add_eos: bool) -> list[int]:
    """Token ids of `text`."""
    return [*vocabulary.encode(text), *([EOS_ID] if add_eos else [])]


def decode(vocabulary: "seqio.Vocabulary", ids: Sequence[int] | np.ndarray) -> str:
    """Text of `ids` up to the first EOS: the text that `token_extents` measures."""
    return vocabulary.decode([int(i) for i in ids])


def token_extents(
    vocabulary: "seqio.Vocabulary", ids: Sequence[int] | np.ndarray
) -> tuple[str, list[Extent]]:
    """Decodes `ids` and says which characters each of them stands for.

    A token that is one byte of a character has the whole character as its extent.

    Returns:
        The text up to the first EOS, and one (start, end) per id.
    """
    ids = [int(i) for i in ids]
    spoken = ids[: ids.index(EOS_ID)] if EOS_ID in ids else ids
    processor = _processor(vocabulary)
    if processor is None:
        text, extents = _byte_extents(spoken)
    else:
        # seqio decodes ids beyond the vocabulary (a model's padding rows) as unknown.
        known = [i if i < processor.vocab_size() else processor.unk_id() for i in spoken]
        decoded = processor.decode(known, return_type=_OFFSETS)
        text, extents = decoded["text"], _piece_extents(processor, decoded, decoded["text"])
    return text, extents + [(len(text), len(text))] * (len(ids) - len(spoken))


def mark_tokens(
    record: records.Record, vocabulary: "seqio.Vocabulary", marks: str = "whole"
) -> MarkedTarget:
    """Turns the marks of a record into token ids to remove per position.

    A token is negative when its extent overlaps a negative span: its own id is removed there. The
    EOS stands for no text, so spans never mark it. `negative_token_ids` come on top. With the marks
    "first_token" the first token of each span alone is negative: whatever begins otherwise goes on
    otherwise.

    With `target_ids` these exact ids are kept. Without them the text is tokenised, and spans are
    matched in the text as it was given, although the tokeniser may normalise it.

    Raises:
        UsageError: `target_ids` do not decode to `targets` or go on after the EOS, a removed id or
            its position does not exist, or there are no such marks.
    """
    if marks not in MARKS:
        raise UsageError(f"marks: expected one of {', '.join(MARKS)}, found {marks!r}.")
    ids, extents, dropped = _measured(record, vocabulary)
    pairs = set()
    span_numbers = [0 if start < end else -1 for start, end in extents]
    num_spans_without_token = 0
    for number, span in enumerate(record.negative_spans or (), start=1):
        touched = [] if dropped.issuperset(range(*span)) else _touched(extents, span)
        touched = touched[: 1 if marks == "first_token" else None]
        pairs.update((position, ids[position]) for position in touched)
        for position in touched:
            span_numbers[position] = span_numbers[position] or number
        num_spans_without_token += not touched
    for position, removed_ids in record.negative_token_ids:
        if position >= len(ids):
            raise UsageError(
                f"record {record.id!r}: negative_token_ids has position {position}, but its "
                f"targets have {len(ids)} tokens."
            )
        for removed_id in removed_ids:
            if not 0 <= removed_id < vocabulary.vocab_size:
                raise UsageError(
                    f"record {record.id!r}: negative_token_ids has id {removed_id}, but the "
                    f"vocabulary has {vocabulary.vocab_size} ids."
                )
            pairs.add((position, removed_id))
    return MarkedTarget(
        target_ids=np.array(ids, np.int32),
        negative_pairs=np.array(sorted(pairs), np.int32).reshape(-1, 2),
        span_numbers=np.array(span_numbers, np.int32),
        num_spans_without_token=num_spans_without_token,
    )


def ids_and_extents(
    record: records.Record, vocabulary: "seqio.Vocabulary"
) -> tuple[list[int], list[Extent]]:
    """Ids of the record's targets, EOS included, and their extents in `record.targets`.

    Raises:
        UsageError: `target_ids` do not decode to `targets`, or go on after the EOS.
    """
    return _measured(record, vocabulary)[:2]


def _measured(
    record: records.Record, vocabulary: "seqio.Vocabulary"
) -> tuple[list[int], list[Extent], frozenset[int]]:
    """`ids_and_extents`, and which places within the extents hold what no token says."""
    if record.target_ids is not None:
        ids = [int(i) for i in record.target_ids]
        if EOS_ID in ids[:-1]:
            raise UsageError(
                f"record {record.id!r}: target_ids go on after the EOS (id {EOS_ID}) at position "
                f"{ids.index(EOS_ID)}: expected them to end there, without padding."
            )
        text, extents = token_extents(vocabulary, ids)
        if text != record.targets:
            raise UsageError(
                f"record {record.id!r}: target_ids decode to {text[:60]!r}, but targets is "
                f"{record.targets[:60]!r}. Expected the vocabulary that the ids were generated "
                "with; leave target_ids out to have targets tokenised."
            )
        return ids, extents, frozenset()
    text = record.targets
    processor = _processor(vocabulary)
    if processor is None:
        ids = encode(vocabulary, text, add_eos=True)
        return ids, token_extents(vocabulary, ids)[1], frozenset()
    encoded = processor.encode(text, return_type=_OFFSETS)
    silent = _silent(processor, text)
    extents = _piece_extents(processor, encoded, text, silent)
    dropped = frozenset()
    if not silent <= {" "}:
        dropped = frozenset(
            place
            for piece, extent in zip(encoded["pieces"], extents, strict=True)
            if _SPACE not in piece.strip(_SPACE)  # a piece of several words says the spaces
            for place in range(*extent)
            if text[place] in silent
        )
    end = len(text)
    return [*encoded["ids"], EOS_ID], [*extents, (end, end)], dropped


def pieces(record: records.Record, vocabulary: "seqio.Vocabulary") -> list[str]:
    """The targets cut up, one stretch per token, spaces with what follows them.

    Joined they are the targets; without a token there is none. What stands for no text, and what
    shares its character with a token before it, gets an empty one.

    Raises:
        UsageError: as `mark_tokens`.
    """
    _, extents = ids_and_extents(record, vocabulary)
    ends = list(itertools.accumulate((end for _, end in extents), max))
    starts = [0, *ends][: len(ends)]
    ends = [*ends[:-1], len(record.targets)][: len(ends)]
    return [record.targets[start:end] for start, end in zip(starts, ends, strict=True)]


def first_token_ids(
    vocabulary: "seqio.Vocabulary", prefix_text: str, strings: Sequence[str]
) -> list[int | None]:
    """The id of each string's first token when it stands right after `prefix_text`.

    A token boundary lies between prefix and string. After a space or at the start of a text the
    first token carries the leading space, as in "▁city"; elsewhere, say after "(", it does not.
    None stands for a string that starts with a lone "▁": that token begins any word.

    Two strings may share a first token. An annotator that removes the first tokens of unsupported
    values should therefore leave out those that begin a supported one.

    Raises:
        UsageError: a string is blank.
    """
    # Whether a text starts with a space piece is the model's own setting: no anchor there.
    anchor = prefix_text and _ANCHOR + (" " if prefix_text[-1].isspace() else "")
    first_tokens = [tokens[0] for tokens in _tokens_after(vocabulary, anchor, strings)]
    return [first_id if reaches else None for first_id, reaches in first_tokens]


def alternative_token_ids(
    vocabulary: "seqio.Vocabulary",
    target_ids: Sequence[int] | np.ndarray,
    span: Extent,
    alternatives: Sequence[str],
    supported: Sequence[str] = (),
    continuations: "Continuations | None" = None,
) -> tuple[tuple[int, tuple[int, ...]], ...]:
    """What to remove where a span begins, so that it is not replaced by an alternative.

    The alternatives are tokenised from the boundary where the span's first token begins: with its
    leading space if it has one, and with the characters that it holds before the span (in
    "▁(river", a span from "river" on has "(" before it). Where a lone "▁" comes before that token,
    an alternative such as "▁city" would take the place of the "▁", one such as "▁", "Zoo" goes on
    after it: each is removed where it would depart. A first token that ends before the
    alternative's own text begins is not removed: it begins innocent words too. Nor is one that
    begins a supported text, or that begins an innocent word and not all of the alternative. An
    unknown token is never removed, for it stands for much else.

    Args:
        vocabulary: of the targets.
        target_ids: the generated ids.
        span: (start, end) in the text of `target_ids`.
        alternatives: texts that would be just as wrong in the place of the span.
        supported: texts that would be right there.
        continuations: with the words that would neither be right nor wrong; None knows none.

    Returns:
        Entries for `Record.negative_token_ids`: positions and, sorted, the ids to remove there.
        Empty when the span touches no token.

    Raises:
        UsageError: an alternative is blank.
    """
    text, extents = token_extents(vocabulary, target_ids)
    touched = _touched(extents, span)
    if not touched:
        return ()
    start = position = touched[0]
    anchor = _ANCHOR
    processor = _processor(vocabulary)
    if processor is not None:
        # Ids beyond the vocabulary decode as unknown, and have no piece.
        own, before = (
            processor.id_to_piece(int(i)) if i < processor.vocab_size() else ""
            for i in (target_ids[position], target_ids[position - 1])
        )
        if position > 0 and before == _SPACE and not own.startswith(_SPACE):
            start = position - 1
        anchor += " " if start < position or own.startswith(_SPACE) else ""
    anchor += text[extents[position][0] : span[0]]
    # Where a lone "▁" comes before, and a text has it too, its next token comes after it.
    space = int(target_ids[start]) if start < position else None

    continuations = continuations or Continuations(vocabulary)
    unknown = vocabulary.unk_id
    kept = {
        (first.is_after_space, first.id) for first in continuations.firsts(anchor, space, supported)
    }
    of_words = continuations.innocent_firsts(anchor, space)
    removed: dict[int, set[int]] = {}
    for first in continuations.firsts(anchor, space, alternatives):
        place = first.is_after_space, first.id
        if (
            first.reaches
            and first.id != unknown
            and place not in kept
            and (first.is_whole or place not in of_words)
        ):
            removed.setdefault(start + first.is_after_space, set()).add(first.id)
    return tuple((where, tuple(sorted(ids))) for where, ids in sorted(removed.items()))


class _First(NamedTuple):
    """The token with which a text departs from what was generated.

    Attributes:
        id: of the token.
        is_after_space: whether it comes after a lone "▁" that was generated, too.
        reaches: whether it spells some of the text, rather than what stands before it alone.
        is_whole: whether it spells all of it.
    """

    id: int
    is_after_space: bool
    reaches: bool
    is_whole: bool


class Continuations:
    """How texts go on after others; what is the same for many spans is computed once."""

    _MOST_PLACES = 64  # of places whose texts are kept: most spans begin after a space

    def __init__(self, vocabulary: "seqio.Vocabulary", innocent: Sequence[str] = ()):
        """Keeps the words that would be neither right nor wrong in the place of any span."""
        self._vocabulary = vocabulary
        self._innocent = innocent
        self._known: dict[tuple[str, int | None], dict[str, _First | None]] = {}
        self._innocent_firsts: dict[tuple[str, int | None], frozenset[tuple[bool, int]]] = {}

    def firsts(self, anchor: str, space: int | None, texts: Sequence[str]) -> list[_First]:
        """The first token of each text; without those texts that come to none.

        Args:
            anchor: what stands before them.
            space: the id of a lone "▁" that comes before, if there is one.
            texts: that may come.
        """
        place = anchor, space
        if place not in self._known and len(self._known) >= self._MOST_PLACES:
            del self._known[next(iter(self._known))]
        known = self._known.setdefault(place, {})
        missing = [text for text in dict.fromkeys(texts) if text not in known]
        for text, tokens in zip(
            missing, _tokens_after(self._vocabulary, anchor, missing), strict=True
        ):
            num_shared = int(bool(tokens) and tokens[0][0] == space)
            if len(tokens) == num_shared:
                known[text] = None
                continue
            first_id, reaches = tokens[num_shared]
            known[text] = _First(first_id, bool(num_shared), reaches, len(tokens) == 1 + num_shared)
        return [first for first in map(known.__getitem__, texts) if first is not None]

    def innocent_firsts(self, anchor: str, space: int | None) -> frozenset[tuple[bool, int]]:
        """Of the first tokens of all innocent words: whether they come after a space, and ids."""
        place = anchor, space
        if place not in self._innocent_firsts:
            self._innocent_firsts[place] = frozenset(
                (first.is_after_space, first.id)
                for first in self.firsts(anchor, space, self._innocent)
            )
        return self._innocent_firsts[place]


_MARKS_AFTER = tuple(".,;:!?)\"'")  # that a piece may join to the word before


def spellings(
    vocabulary: "seqio.Vocabulary", texts: Sequence[str]
) -> dict[str, tuple[tuple[int, ...], ...]]:
    """The ids of each text as it is spelt after a space, but of those that cannot be spelt.

    These are blank, or come to an unknown token, which stands for much else. A text has several
    spellings where its last piece changes before a punctuation mark ("5" and "5.").
    """
    processor = _processor(vocabulary)
    unknown = -1 if vocabulary.unk_id is None else vocabulary.unk_id
    if processor is None:
        found = [{tuple(vocabulary.encode(text)): None} for text in texts]
    else:
        found = [{tuple(ids): None} for ids in processor.encode(list(texts))]  # it takes no tuple
        for mark in _MARKS_AFTER:
            of_mark = processor.encode(mark, out_type=str)[-1]
            spelt = processor.encode([text + mark for text in texts])
            for ids_of_text, ids in zip(found, spelt, strict=True):
                if ids and processor.id_to_piece(ids[-1]).lstrip(_SPACE) == of_mark.lstrip(_SPACE):
                    ids = ids[:-1]  # the mark is a token of its own
                ids_of_text[tuple(ids)] = None
    spelt_of = {
        text: tuple(ids for ids in ids_of_text if ids and unknown not in ids)
        for text, ids_of_text in zip(texts, found, strict=True)
        if text.strip()
    }
    return {text: ids_of_text for text, ids_of_text in spelt_of.items() if ids_of_text}


class Completions:
    """What would complete a text: a decoding mask as marks.

    Texts are spelt as `spellings` has them.
    """

    def __init__(self, vocabulary: "seqio.Vocabulary"):
        self._vocabulary = vocabulary
        self._spelt: dict[str, tuple[tuple[int, ...], ...]] = {}
        # By the texts that came last, which may be a list's thousands, the same for every record.
        self._last: dict[bool, tuple[tuple[str, ...], dict[tuple[int, ...], set[int]]]] = {}

    def ids(
        self,
        target_ids: Sequence[int] | np.ndarray,
        texts: Sequence[str],
        supported: Sequence[str] = (),
        but: Collection[int] = (),
    ) -> tuple[tuple[int, tuple[int, ...]], ...]:
        """At every position, the ids that would complete one of the texts.

        An id is kept where a supported text has come at least as far with it, from the same place
        or an earlier one, as in `decoding.Mask`.

        Args:
            target_ids: the generated ids.
            texts: that must not come up.
            supported: texts that may.
            but: ids that are left out.

        Returns:
            Entries for `Record.negative_token_ids`: positions and, sorted, the ids to remove there.
        """
        completing = self._continuations(tuple(texts), whole=False)
        kept = self._continuations(tuple(supported), whole=True)
        longest = max(map(len, (*completing, *kept)), default=0)
        ids = tuple(int(i) for i in target_ids)
        found = []
        for position in range(len(ids)):
            removed: set[int] = set()
            for length in range(min(longest, position) + 1):  # what came later counts less
                prefix = ids[position - length : position]
                removed |= completing.get(prefix, frozenset())
                removed -= kept.get(prefix, frozenset())
            removed.difference_update(but)
            if removed:
                found.append((position, tuple(sorted(removed))))
        return tuple(found)

    def _continuations(
        self, texts: tuple[str, ...], *, whole: bool
    ) -> dict[tuple[int, ...], set[int]]:
        """By the tokens before, the ids that complete a text, or with `whole` any of its ids."""
        if whole in self._last and self._last[whole][0] == texts:
            return self._last[whole][1]
        found: dict[tuple[int, ...], set[int]] = {}
        if missing := [text for text in texts if text not in self._spelt]:
            spelt = spellings(self._vocabulary, missing)
            self._spelt.update((text, spelt.get(text, ())) for text in missing)
        for tokens in itertools.chain.from_iterable(map(self._spelt.__getitem__, texts)):
            for length in range(0 if whole else max(len(tokens) - 1, 0), len(tokens)):
                found.setdefault(tokens[:length], set()).add(tokens[length])
        self._last[whole] = texts, found
        return found


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
            pad_id=PAD_ID,
            eos_id=EOS_ID,
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


_OFFSETS = "offset_mapping"  # pieces with their places in the text, in code points


def _processor(vocabulary: "seqio.Vocabulary") -> sentencepiece.SentencePieceProcessor | None:
    """What tokenises; None for a vocabulary of bytes, which needs nothing."""
    return getattr(vocabulary, "tokenizer", None)


def _touched(extents: Sequence[Extent], span: Extent) -> list[int]:
    start, end = span
    return [i for i, (a, b) in enumerate(extents) if a < b and a < end and start < b]


def _byte_extents(ids: Sequence[int] | np.ndarray) -> tuple[str, list[Extent]]:
    """Text and extents of ByT5's ids, byte + 3; others, and broken characters, say nothing."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="ignore")
    text = ""
    extents = [(0, 0)] * len(ids)
    unfinished = []  # positions of the bytes since the last whole character
    for position, token_id in enumerate(ids):
        extents[position] = (len(text), len(text))
        if not 3 <= token_id < 259:
            continue
        unfinished.append(position)
        character = decoder.decode(bytes([token_id - 3]))
        if character:
            start = len(text) + (character == " ")
            for own in unfinished[-len(character.encode()) :]:
                extents[own] = (start, len(text) + 1)
            text += character
            unfinished = []
    return text, extents


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


def _is_blank(character: str, beside_space: bool, silent: Collection[str]) -> bool:
    """Whether a piece does not say a character at its end."""
    is_space = character.isspace() if beside_space else character == " "
    return is_space or character in silent


def _tokens_after(
    vocabulary: "seqio.Vocabulary", anchor: str, strings: Sequence[str]
) -> list[list[tuple[int, bool]]]:
    """The tokens of each `anchor + string` that come after `_ANCHOR`, if `anchor` starts with it.

    Each token comes with whether it spells some of the string, rather than of the anchor alone.
    """
    strings = [string.strip() for string in strings]
    if not all(strings):
        raise UsageError("alternatives: expected texts that are not blank, found a blank one.")
    processor = _processor(vocabulary)
    if processor is None:
        return [[(i, True) for i in vocabulary.encode(string)] for string in strings]
    if not strings:
        return []  # sentencepiece takes half a millisecond over none
    strings = [anchor + string for string in strings]
    tokens_by_string = []
    for string, encoded in zip(
        strings, processor.encode(strings, return_type=_OFFSETS), strict=True
    ):
        extents = _piece_extents(processor, encoded, string, _silent(processor, string))
        tokens_by_string.append(
            [
                (token_id, end > len(anchor))
                for token_id, (_, end) in zip(encoded["ids"], extents, strict=True)
                # A string that starts with an unknown character is one unknown token with _ANCHOR.
                if not anchor or end > len(_ANCHOR)
            ]
        )
    return tokens_by_string
