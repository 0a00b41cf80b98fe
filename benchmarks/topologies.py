r"""What the TNT step takes of a TPU chip, for T5 1.1 and decoder-only models: docs/tpu_memory.md.

    python benchmarks/topologies.py    no TPU is needed
    python benchmarks/topologies.py --sizes=xxl,llama_3_1_8b --topologies=v5e:2x4

Each program is compiled by libtpu (`pip install -e '.[tpu]'`, nothing newer) in a process of its
own. What has been compiled is kept in --results, by the versions of JAX and libtpu: a run that was
stopped goes on, and a run after a change of the step begins with `--again`. Each versions have a
table of their own, those with the most rows first.

Takes 2.5 hours of one core (the table has the seconds of each row) and up to 8 GB of memory.
"""

import argparse
import contextlib
import dataclasses
import importlib.metadata
import json
import os
import pathlib
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).parent.parent
LENGTHS = {"inputs": 512, "targets": 128}
CHIPS = {
    **{"v5e:1x1": 1, "v5e:2x2": 4, "v5e:2x4": 8, "v5e:4x4": 16, "v5e:4x8": 32},
    **{"v5p:2x2x1": 4, "v6e:2x4": 8},
}
KINDS = ("parameters", "cached", "adapters_off")
ON_V5E_HOST = tuple(("v5e:2x4", kind) for kind in KINDS)
# A second tree of parameters takes most: where that fits, the other kinds do.
ON_OTHER_HOSTS = (("v5p:2x2x1", "parameters"), ("v6e:2x4", "parameters"))
ONE_CHIP = tuple(("v5e:1x1", kind) for kind in KINDS)
JOBS = {
    "small": (*ONE_CHIP, *ON_OTHER_HOSTS),
    "base": (*ONE_CHIP, *ON_OTHER_HOSTS),
    "large": (*ONE_CHIP, *ON_OTHER_HOSTS),
    "xl": (("v5e:1x1", "adapters_off"), *ON_V5E_HOST, *ON_OTHER_HOSTS),
    "xxl": (
        ("v5e:2x2", "adapters_off"),
        *ON_V5E_HOST,
        *ON_OTHER_HOSTS,
        ("v5e:4x4", "parameters"),
    ),
    "llama_3_2_1b": (("v5e:1x1", "cached"), ("v5e:1x1", "adapters_off"), *ON_OTHER_HOSTS),
    "llama_3_1_8b": (*ON_V5E_HOST, *ON_OTHER_HOSTS),
    "gemma_3_27b": (("v5e:4x8", "parameters"), ("v5e:4x8", "adapters_off"), *ON_OTHER_HOSTS),
}
# Rows of the batch, on each chip.
ROWS = dict.fromkeys(JOBS, 8) | {"xxl": 1, "llama_3_1_8b": 1, "gemma_3_27b": 1}
T5_SIZES = ("small", "base", "large", "xl", "xxl")
BYTES = ("parameters", "original", "optimizer", "batch", "temporaries", "total")
COLUMNS = (
    *("model", "TPU", "rows", "`ORIGINAL`", *BYTES, "of", "fits", "processor s"),
    "largest exchanges of a step (MiB on a chip, times)",
)


@dataclasses.dataclass(frozen=True)
class Job:
    """One program."""

    size: str
    topology: str
    original: str

    @property
    def batch_size(self):
        """Rows on all chips."""
        return ROWS[self.size] * CHIPS[self.topology]

    def key(self, versions):
        """Its name in the results."""
        return " ".join([self.size, self.topology, self.original, str(self.batch_size), *versions])


def versions_here():
    """The versions of JAX and libtpu."""
    return tuple(importlib.metadata.version(name) for name in ("jax", "libtpu"))


def compile_here(job):
    """Compiles one in this process; prints its report as a JSON line."""
    import gin

    from tnt_jax import objectives, precompile
    from tnt_jax.models import sharding
    from tnt_jax.training import optimizers, settings

    file = f"t5_1_1_{job.size}" if job.size in T5_SIZES else job.size
    gin.parse_config_file(str(ROOT / "gin_configs" / "models" / f"{file}.gin"))
    config = gin.query_parameter("MODEL/macro.value").scoped_configurable_fn()
    began = time.process_time()
    found = precompile.compile_step(
        precompile.devices_of(job.topology),
        model=dataclasses.replace(config, dtype="bfloat16", scan_layers=True, remat_policy="full"),
        objective=objectives.TntObjective(negative_term="reverse_kl", positive_term="forward_kl"),
        update=settings.Update(
            batch_size=job.batch_size,
            task_feature_lengths=LENGTHS,
            optimizer=optimizers.adafactor(1e-3),
            mesh_shape=sharding.MeshShape(fsdp=CHIPS[job.topology]),
        ),
        original_choice=settings.OriginalChoice(path=None, kind=job.original),
    )
    print(json.dumps({**found, "processor_seconds": time.process_time() - began}))


def compile_apart(job):
    """The report of a program, from a process of its own; None if it failed."""
    command = [sys.executable, __file__, f"--job={job.size} {job.topology} {job.original}"]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    if done.returncode:
        print(done.stderr[-2000:], file=sys.stderr)
        return None
    return json.loads(done.stdout.splitlines()[-1])


def row(job, found):
    """The cells of a program."""
    gib = 2**30
    name = f"T5 1.1 {job.size}" if job.size in T5_SIZES else job.size.replace("_", " ")
    if "bytes" in found:
        name = f"{name}, {found['num_params'] / 1e9:.2f} billion"
    cells = [name, job.topology, str(job.batch_size), job.original]
    if "bytes" not in found:  # the compiler gave up, and says only how much it wanted
        seconds = f"{found['processor_seconds']:.0f}"
        return [*cells, *["-"] * 5, found["used"], found["of"], "no", seconds, "-"]
    cells += [f"{found['bytes'][kind] / gib:.3f}" for kind in BYTES]
    cells += [f"{found['of'] / gib:.0f}", "yes" if found["fits"] else "no"]
    exchanges = [
        f"{each['operation']} {each['shape']} ({each['num_bytes'] / 2**20:.1f}, "
        f"{each['count'] * each['times'] if each['times'] else 'by the data'})"
        for each in found["collectives"][:2]
    ]
    return [*cells, f"{found['processor_seconds']:.0f}", "; ".join(exchanges) or "none"]


def read(path):
    """What has been compiled, here and elsewhere."""
    with contextlib.suppress(FileNotFoundError):
        return json.loads(path.read_text())
    return {}


def write_tables(path, results):
    """All that is known so far."""
    jobs = [Job(size, *rest) for size, pairs in JOBS.items() for rest in pairs]
    tables = {}
    for versions in {tuple(key.split()[-2:]) for key in results}:
        found = [(job, results.get(job.key(versions))) for job in jobs]
        tables[versions] = [row(job, report) for job, report in found if report is not None]
    numeric = {2, *range(4, 11), 12}
    lines = [
        "# Memory of the TNT step on TPUs",
        "",
        "Made by `python benchmarks/topologies.py`, which compiles the real programs without any",
        "TPU. GiB of each chip. TNRF, bfloat16, layers stacked and computed again for the gradient",
        '(`REMAT_POLICY = "full"`), Adafactor, everything split over all chips by `fsdp`, rows of',
        f"{LENGTHS['inputs']} and {LENGTHS['targets']} tokens, one row of both if decoder-only.",
        "[The original](originals.md) explains `ORIGINAL`.",
        "",
        "The memory is what the compiler assigns, and refuses a program by. (JAX's own",
        "`memory_analysis` has more temporaries with libtpu 0.0.42.1 and 0.0.50.1: 2.7 GiB for the",
        "XXL on v5e:2x4.) `pip install -e '.[tpu]'` brings JAX and the libtpu that it pins:",
        "JAX 0.10 on Python 3.11, JAX 0.12 on Python 3.12.",
    ]
    for versions, rows in sorted(tables.items(), key=lambda table: (-len(table[1]), table[0])):
        lines += [
            "",
            "## JAX {}, libtpu {}".format(*versions),
            "",
            f"| {' | '.join(COLUMNS)} |",
            f"|{'|'.join('---:' if i in numeric else '---' for i in range(len(COLUMNS)))}|",
            *(f"| {' | '.join(cells)} |" for cells in rows),
        ]
    path.write_text("\n".join(lines) + "\n")


def main():
    """Compiles what is missing and writes the tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sizes", default=",".join(JOBS))
    parser.add_argument("--topologies", default=",".join(CHIPS))
    parser.add_argument("--results", type=pathlib.Path, default=pathlib.Path("topologies.json"))
    parser.add_argument("--output", type=pathlib.Path, default=ROOT / "docs" / "tpu_memory.md")
    parser.add_argument("--again", action="store_true", help="forgets what --results has")
    parser.add_argument("--job", help="one program, in this process")
    flags = parser.parse_args()
    if flags.job:
        return compile_here(Job(*flags.job.split()))
    if flags.again:
        flags.results.unlink(missing_ok=True)
    failed = []
    jobs = [Job(size, *rest) for size in flags.sizes.split(",") for rest in JOBS[size]]
    for job in [job for job in jobs if job.topology in flags.topologies.split(",")]:
        key = job.key(versions_here())
        if key not in read(flags.results):
            print(key, flush=True)
            found = compile_apart(job)
            if found is None:
                failed.append(key)
                continue
            print("\t".join(row(job, found)[4:-1]), flush=True)
            # Read again: another installation may have been at work meanwhile.
            flags.results.write_text(json.dumps({**read(flags.results), key: found}, indent=1))
        write_tables(flags.output, read(flags.results))
    return f"Failed: {', '.join(failed)}" if failed else None


if __name__ == "__main__":
    sys.exit(main())
