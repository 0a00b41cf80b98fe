"""Random damage to files of all kinds, for `fuzz.py`; the same for the same chance."""

import contextlib
import functools
import gzip
import json
import pathlib
import random
import struct
import sys
from typing import Any

sys.path.append(str(pathlib.Path(__file__).parents[1] / "tests"))
from helpers import mutations

NUMBERS = (0, 1, 2, 7, 255, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**60, 2**63, 2**64 - 1)
DEEP = "[" * 100_000
REGEXES = ("(a+)+$", "(a|a)*b", "(?:(?:a*)*)*c", "(.*)*x", "(?=", r"\p{L}{1,100000}", "(" * 5000)
GIN = (
    'include "damaged/run.gin"\n',
    'include "damaged/model.gin"\n',
    "BATCH_SIZE = %BATCH_SIZE\n",
    "BATCH_SIZE = %MODEL_DIR\nMODEL_DIR = %BATCH_SIZE\n",
    f"BATCH_SIZE = {DEEP}\n",
    "BATCH_SIZE = " + "(" * 60 + ")" * 60 + "\n",
    "BATCH_SIZE = " + "9" * 5000 + "\n",
    f"BATCH_SIZE = {10**30}\n",
    "BATCH_SIZE = 1e999\n",
    "BATCH_SIZE = -7\n",
    "BATCH_SIZE = '\\x00'\n",
    "BATCH_SIZE = {[]: 1}\n",
    "BATCH_SIZE = {'a': 1, 'a': {1: {}}}\n",
    "BATCH_SIZE = [1, 2\n",
    "BATCH_SIZE = @optax.nothing()\n",
    "BATCH_SIZE = @" + "a." * 2000 + "b\n",
    "import nothing_of_this_name\n",
    "from tnt_jax import nothing_of_this_name\n",
    "from __gin__ import dynamic_registration\n",
    "a" * 100_000 + " = 1\n",
    "x/y/z/train.train.batch_size = 3\n",
    "train.train.nothing = 3\n",
    "t5.T5Config.emb_dim = 'x'\n",
    "\x0c\n  BATCH_SIZE = 3\n",
    "BATCH_SIZE = 3 \\\n",
    "BATCH_SIZE = 08\n",
    "BATCH_SIZE = b'\\xff'\n",
    "BATCH_SIZE = '''\n",
    "train.train:\n  batch_size = 3\n seed = 4\n",
)


def of_whole(content: bytes, chance: random.Random) -> tuple[str, bytes]:
    """A file that is another one from its beginning to its end."""
    return chance.choice(
        [
            lambda: ("empty", b""),
            lambda: ("cut short", content[: chance.randrange(len(content) + 1)]),
            lambda: ("a mark at its start", b"\xef\xbb\xbf" + content),
            lambda: ("UTF-16", content.decode("latin-1").encode("utf-16")),
            lambda: ("twice", content + content),
            lambda: ("nulls", bytes(len(content))),
            lambda: ("nulls behind it", content + bytes(chance.choice([1, 100, 4096]))),
            lambda: ("noise", chance.randbytes(chance.choice([1, 8, 100, 5000]))),
            lambda: ("deep", DEEP.encode()),
            lambda: ("deep and closed", b'{"a":' * 990 + b"1" + b"}" * 990),
            lambda: ("a long number", b"9" * 10_000),
            lambda: ("a long line", b"a" * 2**20),
            lambda: ("no UTF-8", content[: len(content) // 2] + b"\xff\xfe\xc3\x28" + content),
        ]
    )()


def of_lines(content: bytes, chance: random.Random) -> tuple[str, bytes]:
    """Lines that are lost, doubled, exchanged, joined or longer than they were."""
    lines = content.splitlines(keepends=True) or [b""]
    number = chance.randrange(len(lines))
    line = lines[number]
    what = chance.randrange(8)
    if what == 0:
        del lines[number]
    elif what == 1:
        lines.insert(chance.randrange(len(lines) + 1), line)
    elif what == 2:
        chance.shuffle(lines)
    elif what == 3:
        lines[number] = line.rstrip(b"\r\n")
    elif what == 4:
        lines[number] = line.rstrip(b"\r\n") + b"\r\n"
    elif what == 5:
        lines[number] = line.rstrip(b"\n") * chance.choice([2, 50]) + b"\n"
    elif what == 6:
        lines.insert(number, chance.choice([DEEP.encode(), b"\xff\xfe", b"null", b"\0"]) + b"\n")
    else:
        lines[number] = b"  \t" + line
    names = ("lost", "doubled", "shuffled", "joined", "with CR", "repeated", "added", "indented")
    return f"a line {names[what]}", b"".join(lines)


def of_json(value: Any, chance: random.Random) -> tuple[str, Any]:
    """A value of which a part is another one; most of the ways are those of the tests."""
    if chance.random() < 0.6:
        return "a value changed", mutations.changed_value(value, chance)
    found = [place for place in mutations.places(value) if place]
    if not found:
        return "another value", chance.choice(NUMBERS)
    place = chance.choice(found)
    new: Any = chance.choice(
        [
            *(*NUMBERS, *(-number for number in NUMBERS), float("nan"), -0.0, 1e-320),
            *(json.loads("[" * 200 + "]" * 200), "x" * 2**16, "\ud800", "a\0b", "\u2028", "٣"),
            *([2**40, 2**40], [-1, 3], [1, 2, 3, 4, 5], list(range(5000)), [[1]] * 100, ["a", 1]),
            *({"a": {"a": 1}}, {str(i): i for i in range(3000)}, {"": None}, *REGEXES),
            *("../../etc/passwd", "/dev/zero", "a/b", ".", "con", "<extra_id_7>", "<0x41>", "▁"),
        ]
    )
    return f"{'.'.join(map(str, place))} = {str(new)[:40]!r}", mutations.with_change(
        value, place, new
    )


def as_json(value: Any, chance: random.Random) -> bytes:
    """JSON text, now and then with a key twice or with what JSON does not have."""
    text = json.dumps(value, ensure_ascii=chance.random() < 0.5, indent=chance.choice([None, 1]))
    if chance.random() < 0.1 and isinstance(value, dict) and value:
        name = chance.choice(list(value))
        text = f"{{{json.dumps(name)}: {chance.choice(['1', 'null', '[]', '{}'])}, {text[1:]}"
    return text.encode("utf-8", "surrogatepass")


def of_binary(content: bytes, chance: random.Random) -> tuple[str, bytes]:
    """A number of a header that lies: 1 to 8 bytes of the first ones, or of any."""
    size = chance.choice([1, 2, 4, 8])
    end = chance.choice([24, 200, 2000, len(content)])
    start = chance.randrange(max(1, min(len(content), end) - size + 1))
    number = chance.choice(NUMBERS) % 2 ** (8 * size)
    new = number.to_bytes(size, chance.choice(["little", "little", "big"]))
    return f"bytes {start} on = {number}", content[:start] + new + content[start + size :]


def of_safetensors(content: bytes, chance: random.Random) -> tuple[str, bytes]:
    """Another header before the same numbers; its length is right or a lie."""
    (length,) = struct.unpack("<Q", content[:8])
    what, header = of_json(json.loads(content[8 : 8 + length]), chance)
    written = as_json(header, chance)
    stated = len(written) if chance.random() < 0.8 else chance.choice(NUMBERS) % 2**64
    return f"header: {what}", struct.pack("<Q", stated) + written + content[8 + length :]


def of_npy(content: bytes, chance: random.Random) -> tuple[str, bytes]:
    """Another header before the same numbers."""
    (length,) = struct.unpack("<H", content[8:10])
    old, rest = content[10 : 10 + length], content[10 + length :]
    new = chance.choice(
        [
            b"{'descr': '<i8', 'fortran_order': False, 'shape': (%d,), }\n",
            b"{'descr': '|O', 'fortran_order': False, 'shape': (%d,), }\n",
            b"{'descr': '<f4', 'fortran_order': True, 'shape': (%d, 4), }\n",
            b"{'descr': '<i8', 'fortran_order': False, 'shape': (-%d,), }\n",
            b"{'descr': [('a', '<i4'), ('b', 'V%d')], 'fortran_order': False, 'shape': (1,), }\n",
            b"{'descr': '<i8', 'fortran_order': False, 'shape': (0, %d), }\n",
        ]
    )
    new %= chance.choice(NUMBERS)
    if chance.random() < 0.5:
        new = of_text(old, chance)[1]
    stated = len(new) % 2**16 if chance.random() < 0.8 else chance.choice(NUMBERS) % 2**16
    return "header of an array", content[:8] + struct.pack("<H", stated) + new + rest


def of_text(content: bytes, chance: random.Random) -> tuple[str, bytes]:
    """A stretch of bytes flipped, lost, doubled, overwritten or put elsewhere, as in the tests."""
    return "bytes", mutations.changed_bytes(content, chance)


def of_msgpack(content: bytes, chance: random.Random) -> tuple[str, bytes]:
    """T5X's file with another value in it."""
    import msgpack
    from flax import serialization

    what, value = of_json(as_plain(serialization.msgpack_restore(content)), chance)
    if chance.random() < 0.2:
        claim = b"\xdd" + chance.choice(NUMBERS[:9]).to_bytes(4, "big")
        value = {"version": 3, "optimizer": msgpack.ExtType(1, claim * chance.choice([1, 500]))}
    return what, msgpack.packb(value, default=str, unicode_errors="surrogatepass")


def as_plain(value: Any) -> Any:
    """With Python's numbers for NumPy's: those that T5X has there are single ones."""
    if isinstance(value, dict):
        return {key: as_plain(part) for key, part in value.items()}
    return value.item() if hasattr(value, "item") else value


@functools.cache
def zeros(start: bytes) -> bytes:
    """Some kilobytes that become half a gigabyte, compressed as what begins so is."""
    if start == GZIP:
        return gzip.compress(bytes(2**29), 9)
    import tensorstore as ts

    metadata = {"shape": [2**29], "chunks": [2**29], "dtype": "|u1", "fill_value": 1}
    metadata["compressor"] = {"id": "zstd", "level": 1}
    spec = {"driver": "zarr", "kvstore": {"driver": "memory"}, "metadata": metadata}
    store = ts.open(spec, create=True).result()
    store.write(0).result()
    return store.kvstore.read("0").result().value


GZIP, ZSTD = b"\x1f\x8b", b"\x28\xb5"


def of_database(item: pathlib.Path, chance: random.Random) -> str:
    """Damages a value that Orbax has in a database of chunks: an array's metadata, or a chunk."""
    import tensorstore as ts

    base = {"driver": "file", "path": f"{item.absolute()}/"}
    store = ts.KvStore.open({"driver": "ocdbt", "base": base}).result()
    key = chance.choice(sorted(store.list().result()))
    content = store.read(key).result().value
    how, changed = damaged(content, key.decode().rpartition("/")[2], chance)
    store.write(key, changed).result()
    return f"{key.decode()}: {how}"


def damaged(content: bytes, name: str, chance: random.Random) -> tuple[str, bytes]:
    """The content of a file with some damage, by what kind of file it is; says which."""
    if chance.random() < 0.12:
        return of_whole(content, chance)
    if chance.random() < 0.2:
        return of_text(content, chance)
    if name.endswith(".gin") and chance.random() < 0.5:
        line, lines = chance.choice(GIN), content.decode("utf-8", "replace").splitlines(True)
        lines.insert(chance.randrange(len(lines) + 1), line)
        return f"line {line[:60]!r}", "".join(lines).encode()
    if name == "checkpoint":
        with contextlib.suppress(Exception):
            return of_msgpack(content, chance)
    if name.endswith(".safetensors"):
        with contextlib.suppress(Exception):
            return of_safetensors(content, chance)
    if content[:6] == b"\x93NUMPY" and chance.random() < 0.7:
        return of_npy(content, chance)
    if content[:2] in (GZIP, ZSTD) and chance.random() < 0.3:
        return "half a gigabyte of zeros", zeros(content[:2])
    is_lines = name.endswith(".jsonl") or b"}\n{" in content
    if is_lines and chance.random() < 0.7:
        lines = content.splitlines()
        if lines:
            number = chance.randrange(len(lines))
            with contextlib.suppress(ValueError, RecursionError):
                what, value = of_json(json.loads(lines[number]), chance)
                lines[number] = as_json(value, chance).replace(b"\n", b"")
                return f"line {number}: {what}", b"\n".join(lines) + b"\n"
    elif content.lstrip()[:1] in (b"{", b"[") and chance.random() < 0.8:
        with contextlib.suppress(ValueError, RecursionError):
            what, value = of_json(json.loads(content), chance)
            return what, as_json(value, chance)
    is_text = not content[:1000].translate(None, bytes({*range(32, 256), 9, 10, 13}))
    return (of_lines if is_text else of_binary)(content, chance)


def damage(folder: pathlib.Path, pattern: str, chance: random.Random) -> list[str]:
    """Damages a file of a folder, mostly one, and says how."""
    said = []
    for _ in range(chance.choice([1, 1, 1, 2, 3])):
        files = sorted(path for path in folder.glob(pattern) if path.is_file())
        if not files:
            break
        # As likely each name as there are names: else all were chunks of arrays.
        chosen = chance.choice(sorted({path.name for path in files}))
        path = chance.choice([path for path in files if path.name == chosen])
        way = chance.random()
        if chosen == "manifest.ocdbt" and way > 0.3:
            with contextlib.suppress(ValueError):  # it is damaged already
                said.append(of_database(path.parent, chance))
        elif way < 0.04:
            path.unlink()
            how = chance.choice(["missing", "a directory", "a link to itself", "a link to nothing"])
            if how == "a directory":
                path.mkdir()
            elif how != "missing":
                path.symlink_to(path.name if "itself" in how else "nothing")
            said.append(f"{path.relative_to(folder)}: {how}")
        else:
            how, content = damaged(path.read_bytes(), path.name, chance)
            path.write_bytes(content)
            said.append(f"{path.relative_to(folder)}: {how}")
    return said
