r"""Host memory that reading a Hugging Face directory takes, against reading all of it first.

    python benchmarks/import_memory.py --model=t5_1_1_large

makes a directory of random weights in a temporary folder, then reads it onto the CPU device (or
onto simulated ones) in processes of their own. On a CPU the parameters themselves lie in host
memory too: "beyond" is the peak without them and without what the process held before.

Columns, in MB: the files; the parameters in float32; the largest one; the peak of the resident
set; beyond. The baseline is `safetensors.numpy.load_file`, transposed, then `jax.device_put`.

Takes about 3 minutes of one core, 8 GB of memory and 3 GB of disk (estimated, not measured).
"""

import argparse
import json
import os
import pathlib
import resource
import subprocess
import sys
import tempfile
import time

import report
from etils import epath

METHODS = {"tnt_jax": 1, "tnt_jax, 8 devices": 8, "all at once": 1}
ROOT = pathlib.Path(__file__).parent.parent


def make_directory(folder, model, dtype):
    """Writes random weights of the size of a gin file."""
    import gin
    import jax.numpy as jnp
    import numpy as np

    from tnt_jax import huggingface, lazy_arrays, t5

    gin.parse_config_file(str(ROOT / "gin_configs" / "models" / f"{model}.gin"))
    config = gin.query_parameter("MODEL/macro.value").scoped_configurable_fn()
    random = np.random.default_rng(0)

    def made(name, shape):
        def read(index):
            part = [i.stop - i.start for i in index]
            return random.standard_normal(part, np.float32).astype(jnp.dtype(dtype))

        return lazy_arrays.LazyArray(shape, jnp.dtype(dtype), name, read)

    shapes = lazy_arrays.shapes(t5.abstract_params(config))
    weights = {name: made(name, shape) for name, shape in shapes.items()}
    huggingface.write_weights(epath.Path(folder), weights, max_shard_bytes=10**9)
    settings = json.dumps(huggingface.new_config(config))
    (pathlib.Path(folder) / "config.json").write_text(settings)


def measure(folder, method):
    """Reads it in this process, and prints one JSON line."""
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={METHODS[method]}"
    import jax
    import numpy as np
    import safetensors.numpy

    from tnt_jax import assembly, lazy_arrays, pretrained, sharding

    found = pretrained.open_checkpoint(folder)
    mesh = sharding.make_mesh(sharding.MeshShape(data=1, model=METHODS[method]))
    model = assembly.Model(config=found.config, mesh=mesh)
    abstract = model.abstract_params
    jax.device_put(np.zeros(8)).block_until_ready()
    before = resident()
    began = time.monotonic()
    if method == "all at once":
        tensors = {}
        for file in sorted(pathlib.Path(folder).glob("*.safetensors")):
            tensors |= safetensors.numpy.load_file(file)
        params = [
            jax.device_put(np.ascontiguousarray(x.T).astype(np.float32)) for x in tensors.values()
        ]
    else:
        params = found.restore(abstract)
    jax.block_until_ready(params)
    sizes = [4 * int(np.prod(s)) for s in lazy_arrays.shapes(abstract).values()]
    row = {
        "seconds": time.monotonic() - began,
        "files": sum(f.stat().st_size for f in pathlib.Path(folder).glob("*.safetensors")) / 1e6,
        "parameters": sum(sizes) / 1e6,
        "largest": max(sizes) / 1e6,
        "peak": report.peak() / 1e6,
    }
    row["beyond"] = row["peak"] - before / 1e6 - row["parameters"]
    print(json.dumps(row))


def resident():
    """Bytes of the resident set now."""
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def main():
    """Makes the directory and measures every method."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="t5_1_1_large", help="a file of gin_configs/models")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--folder", help="for --method")
    parser.add_argument("--method", choices=METHODS)
    flags = parser.parse_args()
    if flags.method:
        return measure(flags.folder, flags.method)
    print(
        f"| {flags.model}, {flags.dtype} | files | parameters | largest | peak | beyond | seconds |"
    )
    print("|---|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        make_directory(folder, flags.model, flags.dtype)
        for method in METHODS:
            command = [sys.executable, __file__, f"--folder={folder}", f"--method={method}"]
            printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            row = json.loads(printed.splitlines()[-1])
            cells = [
                f"{row[key]:,.0f}" for key in ("files", "parameters", "largest", "peak", "beyond")
            ]
            print(f"| {method} | {' | '.join(cells)} | {row['seconds']:.0f} |", flush=True)


if __name__ == "__main__":
    main()
