r"""What the TNT step takes of a TPU chip, for every size of T5 1.1: docs/tpu_memory.md.

    python benchmarks/topologies.py                    hours on two cores; no TPU is needed
    python benchmarks/topologies.py --sizes=small,base

Each program is compiled by libtpu (`pip install 'tnt_jax[tpu]'`) in a process of its own. What has
been compiled is kept in --results, by version of JAX: a run that was stopped goes on, and a run
after a change of the step begins with `--again`.
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

ROOT = pathlib.Path(__file__).parent.parent
LENGTHS = {"inputs": 512, "targets": 128}
CHIPS = {"v5e:1x1": 1, "v5e:2x2": 4, "v5e:2x4": 8, "v5e:4x4": 16, "v5p:2x2x1": 4, "v6e:2x4": 8}
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
}
ROWS = dict.fromkeys(JOBS, 8) | {"xxl": 1}  # of the batch, on each chip
BYTES = ("parameters", "original", "optimizer", "batch", "temporaries", "total")
COLUMNS = (
    *("T5 1.1", "TPU", "rows", "`ORIGINAL`", *BYTES, "of", "fits", "compiled in s"),
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

    def key(self):
        """Its name in the results."""
        versions = [importlib.metadata.version(name) for name in ("jax", "libtpu")]
        return " ".join([self.size, self.topology, self.original, str(self.batch_size), *versions])


def compile_here(job):
    """Compiles one in this process; prints its report as a JSON line."""
    import gin

    from tnt_jax import objectives, optimizers, precompile, sharding

    gin.parse_config_file(str(ROOT / "gin_configs" / "models" / f"t5_1_1_{job.size}.gin"))
    config = gin.query_parameter("MODEL/macro.value").scoped_configurable_fn()
    found = precompile.compile_step(
        precompile.devices_of(job.topology),
        model=dataclasses.replace(config, dtype="bfloat16", scan_layers=True, remat_policy="full"),
        objective=objectives.TntObjective(negative_term="reverse_kl", positive_term="forward_kl"),
        task_feature_lengths=LENGTHS,
        batch_size=job.batch_size,
        optimizer=optimizers.adafactor(1e-3),
        mesh_shape=sharding.MeshShape(fsdp=CHIPS[job.topology]),
        original=job.original,
    )
    print(json.dumps(found))


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
    name = f"{job.size}, {found['num_params'] / 1e9:.2f} billion" if "bytes" in found else job.size
    cells = [name, job.topology, str(job.batch_size), job.original]
    if "bytes" not in found:  # the compiler gave up, and says only how much it wanted
        return [*cells, *["-"] * 5, found["used"], found["of"], "no", "-", "-"]
    cells += [f"{found['bytes'][kind] / gib:.3f}" for kind in BYTES]
    cells += [f"{found['of'] / gib:.0f}", "yes" if found["fits"] else "no"]
    exchanges = [
        f"{each['operation']} {each['shape']} ({each['num_bytes'] / 2**20:.1f}, "
        f"{each['count'] * each['times'] if each['times'] else 'by the data'})"
        for each in found["collectives"][:2]
    ]
    return [*cells, f"{found['compile_seconds']:.0f}", "; ".join(exchanges) or "none"]


def write_table(path, results):
    """All that is known so far."""
    jobs = [Job(size, *rest) for size, pairs in JOBS.items() for rest in pairs]
    rows = [row(job, results[job.key()]) for job in jobs if job.key() in results]
    numeric = {2, *range(4, 11), 12}
    lines = [
        "# Memory of the TNT step on TPUs",
        "",
        "Made by `python benchmarks/topologies.py`, which compiles the real programs without any",
        "TPU. GiB of each chip. TNRF, bfloat16, layers stacked and computed again for the gradient",
        '(`REMAT_POLICY = "full"`), Adafactor, everything split over all chips by `fsdp`, rows of',
        f"{LENGTHS['inputs']} and {LENGTHS['targets']} tokens. README.md has `ORIGINAL`.",
        f"JAX {importlib.metadata.version('jax')}, libtpu {importlib.metadata.version('libtpu')}.",
        "",
        f"| {' | '.join(COLUMNS)} |",
        f"|{'|'.join('---:' if i in numeric else '---' for i in range(len(COLUMNS)))}|",
        *(f"| {' | '.join(cells)} |" for cells in rows),
    ]
    path.write_text("\n".join(lines) + "\n")


def main():
    """Compiles what is missing and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sizes", default=",".join(JOBS))
    parser.add_argument("--results", type=pathlib.Path, default=pathlib.Path("topologies.json"))
    parser.add_argument("--output", type=pathlib.Path, default=ROOT / "docs" / "tpu_memory.md")
    parser.add_argument("--again", action="store_true", help="forgets what --results has")
    parser.add_argument("--job", help="one program, in this process")
    flags = parser.parse_args()
    if flags.job:
        return compile_here(Job(*flags.job.split()))
    results = {}
    with contextlib.suppress(FileNotFoundError):
        results = {} if flags.again else json.loads(flags.results.read_text())
    failed = []
    for job in [Job(size, *rest) for size in flags.sizes.split(",") for rest in JOBS[size]]:
        if job.key() not in results:
            print(job.key(), flush=True)
            found = compile_apart(job)
            if found is None:
                failed.append(job.key())
                continue
            results[job.key()] = found
            flags.results.write_text(json.dumps(results, indent=1))
        write_table(flags.output, results)
    return f"Failed: {', '.join(failed)}" if failed else None


if __name__ == "__main__":
    sys.exit(main())
