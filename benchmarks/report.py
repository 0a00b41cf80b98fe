"""What the benchmarks share: the machine in one line, Markdown tables, times that can be compared.

    import report  # a benchmark is run as `python benchmarks/NAME.py`, so this folder is importable

    report.heading()
    times = report.interleave({"ours": ours, "theirs": theirs}, rounds=15)
    report.table(["", "ms"], [[name, 1e3 * report.median(of)] for name, of in times.items()])
    report.ratio(times["ours"], times["theirs"])

A benchmark whose variants need much memory measures each in a process of its own (`apart`): what
one took is given back before the next begins.

JAX alone is needed, and of other packages only the versions.
"""

import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import median
from typing import Any

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")


def heading(packages: Sequence[str] = PACKAGES, *, is_apart: bool = False) -> None:
    """Prints `environment` and an empty line, before anything is measured.

    Args:
        packages: whose versions are printed.
        is_apart: asks another process for it, so that this one holds no device; see `apart`.
    """
    text = apart(__file__, packages) if is_apart else environment(packages)
    print(text, end="\n\n", flush=True)


def environment(packages: Sequence[str] = PACKAGES) -> str:
    """Processor, cores of this process, devices, versions and date: what a number depends on."""
    import jax

    device = jax.devices()[0]
    found = [
        f"{cpu_model()} ({num_cores()} of {os.cpu_count()} cores)",
        f"{jax.device_count()} x {device.device_kind} ({jax.default_backend()})",
        f"Python {platform.python_version()}",
        *(f"{name} {version(name)}" for name in packages),
        datetime.date.today().isoformat(),
    ]
    return ", ".join(found)


def cpu_model() -> str:
    """The processor's name as the system gives it."""
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def num_cores() -> int:
    """Cores that this process may use: `taskset -c 0` leaves one."""
    allowed = getattr(os, "sched_getaffinity", None)  # Linux alone has it
    return len(allowed(0)) if allowed else os.cpu_count() or 1


def version(package: str) -> str:
    """The installed version of a package, or "absent"."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def peak() -> int:
    """Bytes of this process's largest resident set: `ru_maxrss` may be that of who started it."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def apart(file: str, arguments: Sequence[str], **environment: str) -> Any:
    """Runs a benchmark's file in a process of its own, whose memory is given back when it ends.

    Nothing of JAX may have been computed here before: on a GPU this process would hold its memory.

    Args:
        file: the benchmark's own `__file__`.
        arguments: its flags.
        environment: further variables.

    Returns:
        What the process printed as JSON in its last line. None if it failed, which is said on
        standard error: so that one variant too many for the memory is not the end of all others.
    """
    command = [sys.executable, file, *arguments]
    variables = os.environ | environment
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=variables, check=False)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    reason = f"status {done.returncode}"
    if done.returncode < 0:
        reason = f"signal {-done.returncode} (9: the system may have had no memory left)"
    print(f"{' '.join(arguments)}: ended with {reason}.", file=sys.stderr, flush=True)
    return None


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Prints Markdown: numbers right-aligned, floats with three significant digits, None a dash.

    Each row is printed when it is there, the names of the columns before that. A column is aligned
    as its cell in the first row is.
    """
    print(f"| {' | '.join(columns)} |", flush=True)
    for number, row in enumerate(rows):
        if number == 0:
            numeric = [isinstance(cell, int | float) for cell in row]
            print(f"|{'|'.join('---:' if is_number else '---' for is_number in numeric)}|")
        print(f"| {' | '.join(map(_cell, row))} |", flush=True)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:#.3g}".rstrip(".")
    return f"{value:,}" if isinstance(value, int) else str(value)


def interleave(
    runs: Mapping[str, Callable[[], Any]], rounds: int, warm_up: int = 1
) -> dict[str, list[float]]:
    """Seconds of every run in every round, one after another: what slows a machine slows them all.

    Args:
        runs: by name; whatever a run returns is waited for (`jax.block_until_ready`).
        rounds: each has every run once.
        warm_up: rounds that come first and do not count: compilation.
    """
    import jax

    times = {name: [] for name in runs}
    for number in range(-warm_up, rounds):
        for name, run in runs.items():
            began = time.perf_counter()
            jax.block_until_ready(run())
            if number >= 0:
                times[name].append(time.perf_counter() - began)
    return times


def ratio(times: Sequence[float], baseline: Sequence[float]) -> float:
    """The median over rounds of time / baseline, both from `interleave`: steadier than a time."""
    return median(one / other for one, other in zip(times, baseline, strict=True))


if __name__ == "__main__":  # in a process of its own
    print(json.dumps(environment(sys.argv[1:])))
