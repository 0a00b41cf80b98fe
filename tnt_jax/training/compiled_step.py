"""What a compiled step takes of a device: bytes by kind, and what it exchanges, read off XLA."""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from tnt_jax.runtime.array_types import PyTree

GIB = 2**30

_COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_OPERATION = re.compile(rf"= (.+?) ({'|'.join(_COLLECTIVES)})(?:-start)?\(")
_CHANNEL = re.compile(r"channel_id=(\d+)")
_SHAPE = re.compile(r"\b(pred|[a-z]+?\d+)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:body|condition|calls|to_apply|branch_computations)=\{?%?([\w.\-]+)")
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")
_LIMIT = re.compile(r"= s32\[\][^=]* constant\((\d+)\)")
_ASSIGNED = re.compile(r"^Memory Space: default .*\nTotal bytes: (\d+)", re.MULTILINE)
# How a TPU's program has a reduce-scatter: a fusion of an all-reduce and a slice.
_FUSED_SCATTER = "all-reduce-scatter"


@dataclasses.dataclass(frozen=True)
class Collective:
    """Like exchanges of one step.

    Attributes:
      operation: Such as "all-gather".
      shape: The result's dtype and shape on one device, such as "bf16[4096,10240]".
      num_bytes: Bytes of that result; for a reduce-scatter, bytes of what goes in.
      count: How often the program has it.
      times: How often a loop around it runs; None where only the data tells.
    """

    operation: str
    shape: str
    num_bytes: int
    count: int
    times: int | None


def device_bytes(abstract: PyTree) -> int:
    """Bytes that a tree of shapes with shardings takes on each device."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(abstract)
    )


def memory(
    compiled: Any, kinds: Mapping[str, PyTree], assigned: int | None = None
) -> dict[str, int]:
    """Bytes on each device while the step runs.

    Args:
      compiled: The step that `lower(...).compile()` gave.
      kinds: Its arguments, by name.
      assigned: `assigned_bytes`, where the compiler said so.

    Returns:
      By the names of `kinds`; "temporaries" is what the program needs beside its arguments, padding
      of the arguments included; "total" is the sum.
    """
    found = compiled.memory_analysis()
    parts = {name: device_bytes(abstract) for name, abstract in kinds.items()}
    if assigned is None:
        assigned = (
            found.argument_size_in_bytes
            + found.output_size_in_bytes
            - found.alias_size_in_bytes
            + found.temp_size_in_bytes
        )
    total = assigned + found.generated_code_size_in_bytes
    return {**parts, "temporaries": total - sum(parts.values()), "total": total}


def assigned_bytes(usage_report: str) -> int | None:
    """Bytes of arguments, results and temporaries, by the report that XLA for TPUs writes.

    By these the compiler refuses a program. `memory_analysis` has more temporaries than are there
    in libtpu 0.0.42.1 and 0.0.50.1, not in 0.0.52, for the same program: of T5 1.1 XXL on eight
    chips 2.7 GiB more, and it has 17.5 GiB for programs that the compiler puts into 15.

    Args:
      usage_report: The text of "*-memory-usage-report.txt".

    Returns:
      None where the report does not say.
    """
    found = _ASSIGNED.search(usage_report)
    return int(found[1]) if found else None


def collectives(text: str) -> list[Collective]:
    """What devices exchange in a compiled step, by its text, the largest first."""
    computations, name = {}, ""
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            name = match[1]
            computations[name] = []
            entry = name if line.startswith("ENTRY") else None
            if entry:
                computations["ENTRY"] = computations[name]
        elif name:
            computations[name].append(line)
    times = _times(computations)
    found: dict[tuple[str, str, int, int | None], int] = {}
    seen = set()  # the parts of an asynchronous exchange share channel and result
    for name, lines in computations.items():
        if name == "ENTRY" or name not in times:
            continue
        for line in lines:
            if (match := _OPERATION.search(line)) is None:
                continue
            operation = "reduce-scatter" if name.startswith(_FUSED_SCATTER) else match[2]
            shape, num_bytes = _result(match[1], is_start=f"{match[2]}-start(" in line)
            exchange = *_CHANNEL.findall(line), operation, shape
            if exchange in seen and _CHANNEL.search(line):
                continue
            seen.add(exchange)
            key = (operation, shape, num_bytes, times[name])
            found[key] = found.get(key, 0) + 1
    made = [Collective(o, s, n, count, t) for (o, s, n, t), count in found.items()]
    return sorted(made, key=lambda c: -c.num_bytes * c.count * (c.times or 1))


def _times(computations: Mapping[str, Sequence[str]]) -> dict[str, int | None]:
    """How often each computation runs in a step."""
    (entry,) = (
        name
        for name, lines in computations.items()
        if name != "ENTRY" and lines is computations["ENTRY"]
    )
    times: dict[str, int | None] = {entry: 1}
    waiting = [entry]
    while waiting:
        name = waiting.pop()
        for line in computations[name]:
            trips: int | None = 1
            if " while(" in line and (condition := _CONDITION.search(line)):
                # A loop over layers counts up to a constant; one over blocks of tokens does not.
                limits = [m for x in computations[condition[1]] for m in _LIMIT.findall(x)]
                trips = int(limits[0]) if len(limits) == 1 else None
            around = times[name]
            for called in _CALLED.findall(line):
                if called in computations and called not in times:
                    times[called] = None if trips is None or around is None else trips * around
                    waiting.append(called)
    return times


def _result(text: str, *, is_start: bool) -> tuple[str, int]:
    """The shape of a result and its bytes; the pair of an asynchronous start ends with it."""
    shapes = _SHAPE.findall(text)
    if is_start and len(shapes) > 1:
        shapes = shapes[len(shapes) // 2 :]
    sizes = [
        math.prod(int(d) for d in dims.split(",") if d) * _itemsize(dtype) for dtype, dims in shapes
    ]
    largest = shapes[int(np.argmax(sizes))]
    others = f" and {len(shapes) - 1} more" if len(shapes) > 1 else ""
    return f"{largest[0]}[{largest[1]}]{others}", sum(sizes)


def _itemsize(dtype: str) -> int:
    bits = re.search(r"\d+", dtype)
    return 1 if bits is None else max(int(bits[0]) // 8, 1)
