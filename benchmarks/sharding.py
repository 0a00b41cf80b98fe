r"""What eight devices share of the loss head and of the train step, as XLA's programs have it.

    python benchmarks/sharding.py                       for eight simulated devices
    python benchmarks/sharding.py --topology=v5e:2x4    for a TPU that need not be here, by libtpu

Nothing is run. The first table is of the head: 1,024 tokens, T5's vocabulary, width 512. "temp" is
of one device, also in units of its share of a float32 `[tokens, vocabulary]`; what is not of the
blocks are copies of the output matrix or of its gradient, of which a device has "matrix". (A CPU
exchanges nothing in place: the sum of all gradients is a copy.) "FLOPs" are those of one device
over an eighth of what one alone would need. Then all that is exchanged in the loop over blocks.

The second table is of one update with TNRF, a second forward pass, stacked layers and four
microbatches: what is exchanged once, what in the loops, and how much in all.

Needs jax, flax, optax and numpy, and nothing else of what tnt_jax needs.

Takes 3 minutes of one core and 1 GB of memory.
"""

import argparse
import functools
import os

import head
import jax
import jax.numpy as jnp
import report
import step
from jax.sharding import NamedSharding, PartitionSpec

from tnt_jax.models import sharding, t5
from tnt_jax.training import compiled_step, train_step

NUM_DEVICES = 8
BATCH, LENGTH = 8, 128  # of the head
NUM_MICROBATCHES = 4
# Shapes, and parts that the head cuts the vocabulary into.
MESHES = {
    "4 data x 2 model": (sharding.MeshShape(data=4, model=2), 2),
    "8 data": (sharding.MeshShape(data=8), 1),
    "8 fsdp": (sharding.MeshShape(data=1, fsdp=8), 8),
    "2 data x 2 fsdp x 2 model": (sharding.MeshShape(data=2, fsdp=2, model=2), 4),
}
ALONE = sharding.MeshShape(data=1)


def compiled_on(mesh, function, *arguments, **settings):
    """A program for shapes with shardings."""

    def traced(*args):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args)

    return jax.jit(traced, **settings).lower(*arguments).compile()


def shape_of(mesh, spec, *shape, dtype=jnp.float32):
    """A shape with its sharding."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))


def compile_head(mesh, variant):
    """The head's program, gradients left where hidden states and matrix are."""
    rows = sharding.batch_sharding(mesh).spec
    hidden = shape_of(mesh, rows, BATCH, LENGTH, head.EMBED)
    matrix = shape_of(mesh, PartitionSpec("fsdp", "model"), head.EMBED, head.VOCAB)
    of_tokens = functools.partial(shape_of, mesh, rows, BATCH, LENGTH, dtype=jnp.int32)
    tokens = {
        "target_tokens": of_tokens(),
        "negative_ids": shape_of(mesh, rows, BATCH, LENGTH, 1, dtype=jnp.int32),
        "loss_mask": of_tokens(),
    }
    return compiled_on(
        mesh,
        jax.value_and_grad(variant, has_aux=True),
        *((hidden, matrix), (hidden, matrix), tokens),
        out_shardings=(None, (hidden.sharding, matrix.sharding)),
    )


def flops_of_head(mesh):
    """FLOPs of one device, all its tokens in one block: XLA counts the body of a loop once."""
    whole = functools.partial(head.fused_head, block_size=BATCH * LENGTH)
    return compile_head(mesh, whole).cost_analysis()["flops"]


def of_heads(devices):
    """Rows of the first table."""
    alone = flops_of_head(sharding.make_mesh(ALONE, devices[:1]))
    unit = 4 * BATCH * LENGTH * head.VOCAB / NUM_DEVICES
    for name, (shape, num_parts) in MESHES.items():
        mesh = sharding.make_mesh(shape, devices)
        for variant in ("dense", "fused"):
            compiled = compile_head(mesh, getattr(head, variant))
            temp = compiled.memory_analysis().temp_size_in_bytes
            found = compiled_step.collectives(compiled.as_text())
            # How often the loop runs, the data tells: it ends with the tokens that are no padding.
            inside = [
                f"{each.count} {each.operation} {each.shape}" for each in found if not each.times
            ]
            is_fused = variant == "fused"
            yield (
                name,
                variant,
                temp / 2**20,
                temp / unit,
                4 * head.EMBED * head.VOCAB / num_parts / 2**20,
                flops_of_head(mesh) / (alone / NUM_DEVICES) if is_fused else None,
                ("; ".join(inside) or "nothing") if is_fused else None,
            )


# ----------------------------------------------------------------------------------- The whole step


def placed(mesh, abstract, shardings):
    """Shapes with their shardings."""
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        abstract,
        shardings,
    )


def compile_step(mesh, config, batch_size, lengths):
    """The program of an update, as `tnt_jax.training.trainer` makes it."""
    variant = step.VARIANTS["TNRF, second forward"]
    state, original, batch, key = step.abstract_arguments(config, variant, batch_size, lengths)
    where = sharding.param_shardings(state.params, t5.T5(config).logical_axes(), mesh)
    of_state = train_step.TrainState(
        step=sharding.replicated(mesh),
        params=where,
        opt_state=sharding.optimizer_shardings(state.opt_state, state.params, where, mesh),
    )
    specs = jax.tree.map(lambda each: each.spec, where)
    rows = jax.tree.map(lambda _: sharding.batch_sharding(mesh), batch)
    return compiled_on(
        mesh,
        functools.partial(
            train_step.train_step,
            forward=t5.T5(config).forward,
            objective=variant.objective,
            optimizer=step.OPTIMIZER,
            num_microbatches=NUM_MICROBATCHES,
            place_gradients=lambda tree: jax.lax.with_sharding_constraint(tree, specs),
        ),
        placed(mesh, state, of_state),
        placed(mesh, original, where),
        placed(mesh, batch, rows),
        key,
        out_shardings=(of_state, sharding.replicated(mesh)),
        donate_argnums=0,
    )


def of_steps(size, lengths, devices):
    """Rows of the second table."""
    config = step.make_config(size, "float32", "full", True)
    for name in ("8 data", "8 fsdp", "4 data x 2 model"):
        mesh = sharding.make_mesh(MESHES[name][0], devices)
        compiled = compile_step(mesh, config, NUM_DEVICES * NUM_MICROBATCHES, lengths)
        found = compiled_step.collectives(compiled.as_text())
        groups = {}
        for each in found:
            groups.setdefault((each.times, each.operation), []).append(each)
        for (times, operation), parts in groups.items():
            num_bytes = sum(part.num_bytes * part.count for part in parts) * (times or 1)
            yield (
                name,
                operation,
                {1: "once", None: "for a block of tokens"}.get(times, f"{times} times"),
                sum(part.count for part in parts),
                num_bytes / 2**20,
                parts[0].shape,
            )


def described(topology):
    """The devices of a TPU, as `tnt_jax.precompile.devices_of` has them."""
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    from jax.experimental import topologies

    return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices


def main():
    """Prints both tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", default="small", help="of the second table")
    parser.add_argument("--topology", help="of eight TPU chips, such as v5e:2x4 or v6e:2x4")
    flags = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", NUM_DEVICES)
    devices = jax.devices()
    report.heading()
    if flags.topology:
        devices = described(flags.topology)
        print(f"Compiled for {len(devices)} x {devices[0].device_kind}.\n", flush=True)
    report.table(
        (
            *("mesh", "TNRF", "temp MiB", "of [N, V] / 8", "matrix MiB", "FLOPs over an eighth"),
            "exchanged in the loop",
        ),
        of_heads(devices),
    )
    print()
    report.table(
        (
            *(f"{flags.size}, {NUM_MICROBATCHES} microbatches", "collective", "how often"),
            *("in the program", "MiB an update", "the largest"),
        ),
        of_steps(flags.size, (128, 64), devices),
    )


if __name__ == "__main__":
    main()
