"""What the pieces of a vocabulary spell: text, and in which characters each has a part.

*Byte-level* pieces write each byte of UTF-8 as a character of its own, so that a token may begin or
end within a character. *Sentencepiece-style* pieces write a space as "▁", and as `<0xNN>` the bytes
of what they have no piece for.
"""

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence

from tnt_jax.tokenizers.tokenization import Extent

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_BROKEN = "\ufffd"

# A stretch of text and the positions of the tokens that spell it.
_Unit = tuple[str, Sequence[int]]


def measure(pieces: Sequence[str], *, is_byte_level: bool) -> tuple[str, list[Extent]]:
    """Text, and which of its characters each piece has a part in.

    Pieces that say nothing ("") have an empty extent behind what was said before them.

    Args:
        pieces: one for each token.
        is_byte_level: which of the two kinds they are.
    """
    return _measured((_units_of_bytes if is_byte_level else _units_of_pieces)(pieces), len(pieces))


def _measured(units: Iterable[_Unit], num_tokens: int) -> tuple[str, list[Extent]]:
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


def _units_of_bytes(pieces: Sequence[str]) -> Iterator[_Unit]:
    """Decodes byte-level pieces: UTF-8, in which a token may begin or end within a character."""
    content, owners = bytearray(), []
    for position, piece in enumerate(pieces):
        own = _bytes_by_name(piece)
        content += own
        owners += [position] * len(own)
    for text, start, end in _characters(bytes(content)):
        yield text, sorted(set(owners[start:end]))


def bytes_of(piece: str, *, is_byte_level: bool) -> bytes:
    """The bytes that a piece stands for."""
    if is_byte_level:
        return _bytes_by_name(piece)
    match = _BYTE.fullmatch(piece)
    return bytes([int(match[1], 16)]) if match else piece.replace("▁", " ").encode()


def is_byte(piece: str) -> bool:
    """Whether a sentencepiece-style piece is one byte: a run of these is text as a whole or not."""
    return _BYTE.fullmatch(piece) is not None


def _bytes_by_name(piece: str) -> bytes:
    """What a byte-level piece stands for; the bytes of its text if it is no such piece."""
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


def _units_of_pieces(pieces: Sequence[str]) -> Iterator[_Unit]:
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


def _units_of_run(run: Sequence[tuple[int, int]]) -> Iterator[_Unit]:
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
