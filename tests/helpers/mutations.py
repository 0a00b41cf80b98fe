"""Random damage to what is valid, the same in every run, and what comes of it."""

import copy
import random
import time

from tnt_jax.runtime import failures

# Values that somebody's file has instead of the right one.
ODD_VALUES = (
    *(None, True, False, 0, 1, -1, 7, 2**31 - 1, 2**31, 2**63, -(2**64), 10**400, 1e308, -0.5),
    *(
        float("nan"),
        float("inf"),
        "",
        " ",
        "x",
        "7",
        "\ud800",
        "\x00",
        "é😀",
        "../..",
        "/etc/passwd",
    ),
    *([], [[]], [0], [1, 2], [[0, 1]], [[2, 1]], [[0, 3.0]], [[0, [1]]], [[0, [-1]]], [None]),
    *({}, {"a": 1}, {"": {}}, [[[[]]]]),
)


def outcome(function, *args, **kwargs):
    """Says "works", or the message of a mistake; any other exception is a failure of the test."""
    began = time.process_time()
    message = "works"
    try:
        function(*args, **kwargs)
    except Exception as error:
        explained = failures.explain(error)
        if explained is None:
            raise
        message = explained
        assert 10 < len(message) < 2200
        assert message.isprintable(), message
    # A hundred times what it takes, of this process alone: what a file says is not believed.
    assert time.process_time() - began < 30, message
    return message


def changed_value(value, chance: random.Random):
    """A JSON value with one of its parts changed, lost, doubled, or put in the place of another."""
    value = copy.deepcopy(value)
    places = [(None, None)]

    def visit(part):
        keys = (
            part if isinstance(part, dict) else range(len(part)) if isinstance(part, list) else ()
        )
        for key in keys:
            places.append((part, key))
            visit(part[key])

    visit(value)
    part, key = chance.choice(places)
    new = copy.deepcopy(chance.choice(ODD_VALUES))
    if part is None:
        return new
    match chance.randrange(4):
        case 0:
            del part[key]
        case 1 if isinstance(part, dict):
            part[chance.choice(["", "id", "é", "\udc00", "a/../../b"])] = part[key]
        case 1:
            part.append(part[key])
        case 2:
            other, other_key = chance.choice(places[1:])
            part[key] = copy.deepcopy(other[other_key])
        case _:
            part[key] = new
    return value


def changed_bytes(content: bytes, chance: random.Random) -> bytes:
    """Bytes with one stretch flipped, lost, doubled, overwritten or put elsewhere."""
    start = chance.randrange(len(content) + 1)
    end = min(len(content), start + chance.choice([1, 1, 2, 4, 8, 64]))
    stretch = content[start:end]
    match chance.randrange(6):
        case 0:
            return content[:start]
        case 1:
            return content[:start] + content[end:]
        case 2:
            return content[:end] + stretch + content[end:]
        case 3:
            return (
                content[:start]
                + bytes(b ^ (1 << chance.randrange(8)) for b in stretch)
                + (content[end:])
            )
        case 4:
            return content[:start] + chance.randbytes(len(stretch)) + content[end:]
        case _:
            filler = chance.choice(
                [b"\x00", b"\xff", b"\x7f", b"[", b"{", b'"', b"\n", b"\\u", b"9"]
            )
            return content[:start] + filler * max(1, len(stretch)) + content[end:]


LACKING = object()


def with_change(value, place, new):
    """A value of JSON's kinds with another in one place of it, or without what is there."""
    if not place:
        return new
    value = copy.deepcopy(value)
    part = value
    for key in place[:-1]:
        part = part[key]
    if new is LACKING:
        del part[place[-1]]
    else:
        part[place[-1]] = new
    return value


def places(value, path=()):
    """Where in a value others are, itself first; of a list the first two."""
    yield path
    keys = list(value) if isinstance(value, dict) else []
    if isinstance(value, list):
        keys = list(range(len(value)))[:2]
    for key in keys:
        yield from places(value[key], (*path, key))
