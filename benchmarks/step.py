r"""The whole train step with every kind of original, against our own plain fine-tuning step.

    taskset -c 0 python benchmarks/step.py                   times, and memory as XLA accounts it
    python benchmarks/step.py --rss                          peak memory, a process for each line
    python benchmarks/step.py --dtype=bfloat16 --remat=full --batch=128 --lengths=512,128   on a GPU

Columns: "times fine-tune" is the median of the ratios of neighbouring steps to ours, which has the
fused head too; the line below it has the head that others have. "floor" is the same ratio
of the products that the model is made of, with nothing else on top. "accounted" is arguments and
temporaries by XLA, with layers scanned and rematerialised. Where the card is known, "MFU" is those
products over what it can do in the time. Of --rss: the largest resident set from start to the
second update, which on a CPU has parameters, optimizer state and compiler in it; and the device's
own peak.

Where T5X and google/t5patches are installed, their steps are run as well (`published.py`).

Needs jax, flax, optax and numpy, and nothing else of what tnt_jax needs.

Takes about an hour of one core (5 minutes with `--size=small`), and 8 GB (estimated).
"""

import argparse
import dataclasses
import functools
import importlib.util
import json
import sys
import tempfile

import jax
import numpy as np
import report

from tnt_jax import objectives
from tnt_jax.data.examples import Example
from tnt_jax.data.layouts import CAUSAL
from tnt_jax.models import adapters, families, t5
from tnt_jax.models.causal_lm_config import CausalLMConfig, LayerKind
from tnt_jax.training import compiled_step, optimizers, train_step
from tnt_jax.training.originals import STATES, Original, part_of

# emb_dim, num_heads, layers of each stack, mlp_dim
SIZES = {
    "tiny": (32, 2, 1, 64),  # for a look at whether it runs
    "small": (512, 6, 8, 1024),
    "base": (768, 12, 12, 2048),
    "large": (1024, 16, 24, 2816),
}
DECODER_ONLY = ("smollm2_135m",)
FINE_TUNE = objectives.TntObjective(negative_term="none", positive_term="log_likelihood")
TNRF = objectives.TntObjective(negative_term="reverse_kl", positive_term="forward_kl")
OPTIMIZER = optimizers.adafactor(1e-3)
RANK, ALPHA = 16, 32.0
# Multiply-adds per second of dense products: bfloat16, and float32 as TF32.
CARDS = {"H100": (989e12, 494e12), "H200": (989e12, 494e12), "A100": (312e12, 156e12)}


@dataclasses.dataclass(frozen=True)
class Variant:
    """A step.

    `original` is None for plain fine-tuning, `live` the part that is no padding; with `has_logits`
    the head is the usual one, of logits that are held. With `trained_layers`, the decoder's last
    ones alone are trained or have adapters.
    """

    original: str | None
    live: float = 1.0
    has_logits: bool = False
    trained_layers: int | None = None

    @property
    def objective(self):
        """The loss that the step computes."""
        return TNRF if self.original else FINE_TUNE

    def kind(self, config):
        """Where the original's logits come from, and what is trained."""
        name = self.original or "parameters"
        return Original(
            has_adapters=name.startswith("adapters"),
            trained_layers=self.trained_layers,
            cached_from=config if name.endswith("cached") else None,
        )


FIRST = "fine-tune"
VARIANTS = {
    FIRST: Variant(None),
    "fine-tune, logits held": Variant(None, has_logits=True),
    "TNRF, second forward": Variant("parameters"),
    "TNRF, cached": Variant("cached"),
    "TNRF, cached, half padding": Variant("cached", live=0.5),
    "TNRF, adapters_off": Variant("adapters_off"),
}
PUBLISHED = {"published fine-tune": "fine-tune", "published TNFF": "TNFF"}


def make_config(size, dtype, remat, scan):
    """T5 1.1 of a size, or a decoder-only model."""
    computation = {
        "dtype": dtype,
        "remat_policy": remat,
        "scan_layers": scan,
        "adapter_scale": ALPHA / RANK,
    }
    if size in DECODER_ONLY:
        return CausalLMConfig(
            vocab_size=49152,
            emb_dim=576,
            num_heads=9,
            num_kv_heads=3,
            head_dim=64,
            num_layers=30,
            mlp_dim=1536,
            mlp_activations=("silu", "linear"),
            logits_via_embedding=True,
            layer_norm_epsilon=1e-5,
            layer_kinds=(LayerKind(rope_theta=100_000.0),),
            **computation,
        )
    emb_dim, num_heads, num_layers, mlp_dim = SIZES[size]
    return t5.T5Config(
        vocab_size=32128,
        emb_dim=emb_dim,
        num_heads=num_heads,
        num_encoder_layers=num_layers,
        num_decoder_layers=num_layers,
        head_dim=64,
        mlp_dim=mlp_dim,
        mlp_activations=("gelu", "linear"),
        logits_via_embedding=False,
        **computation,
    )


def make_batch(config, batch_size, lengths, live=1.0, seed=0):
    """Random tokens, a tenth of the targets marked; the end of every target may be padding."""
    rng = np.random.default_rng(seed)
    inputs, targets = (
        rng.integers(2, config.vocab_size, (batch_size, n)).astype(np.int32) for n in lengths
    )
    mask = np.broadcast_to(np.arange(lengths[1]) < live * lengths[1], targets.shape)
    marked = mask & (rng.random(targets.shape) < 0.1)
    if isinstance(config, CausalLMConfig):
        examples = []
        for prompt, response, is_live, is_marked in zip(inputs, targets, mask, marked, strict=True):
            places = np.flatnonzero(is_marked)
            pairs = np.stack([places, response[places]], axis=1)
            examples.append(Example(prompt, response[is_live], pairs))
        lengths = dict(zip(("inputs", "targets"), lengths, strict=True))
        return CAUSAL.convert(examples, lengths, num_negative_ids=1)
    return {
        "encoder_input_tokens": inputs,
        "decoder_input_tokens": np.pad(targets, ((0, 0), (1, 0)))[:, :-1] * mask,
        "decoder_target_tokens": targets * mask,
        "decoder_loss_mask": mask.astype(np.int32),
        "decoder_negative_ids": np.where(marked, targets, -1)[..., None],
    }


def make_step(config, variant):
    """The update, compiled at its first call; the state is given away."""
    kind = variant.kind(config)
    factored = functools.partial(
        families.network_of(config).forward, trained_layers=kind.begins_above
    )
    return jax.jit(
        functools.partial(
            train_step.train_step,
            forward=(lambda *of: factored(*of).whole()) if variant.has_logits else factored,
            objective=variant.objective,
            optimizer=OPTIMIZER,
            original_kind=kind,
        ),
        donate_argnums=0,
    )


class Work:
    """A model in training, on which the variants take turns: no more is held than they need."""

    def __init__(self, config, variants, batch_size, lengths):
        self.key = jax.random.key(0)
        network = families.network_of(config)
        params = network.init(self.key)
        forward, lower = jax.jit(network.forward), jax.jit(network.lower_states, static_argnums=2)
        dtypes = network.computed_dtypes()
        self.batches, self.originals, self.states = {}, {}, {}
        for variant in variants:
            batch = jax.tree.map(
                jax.numpy.asarray, make_batch(config, batch_size, lengths, variant.live)
            )
            kind, needs_original = variant.kind(config), variant.objective.needs_original
            features = kind.features(needs_original=needs_original)
            found = {STATES: forward(params, batch).hidden} if STATES in features else {}
            if features.keys() - {STATES}:
                found |= lower(params, batch, variant.trained_layers)
            self.batches[variant] = batch | found
            trained = adapters.upper_layers(params, variant.trained_layers)
            read = kind.read_params(params, trained, needs_original=needs_original)
            if read is not None:
                copy = functools.partial(jax.numpy.array, copy=True)
                read = jax.tree.map(copy, read, part_of(dtypes, read))
            self.originals[variant] = read
            if kind.has_adapters:
                trained = adapters.init(trained, RANK, self.key)
            if not kind.is_apart:
                trained = jax.tree.map(jax.numpy.copy, trained)
                self.states[variant] = train_step.init_state(trained, OPTIMIZER)
        if any(variant.kind(config).is_apart for variant in variants):
            self.states["all"] = train_step.init_state(params, OPTIMIZER)

    def arguments(self, variant):
        """The arguments of the step of a variant."""
        state = self.states[self._whose(variant)]
        return state, self.originals[variant], self.batches[variant], self.key

    def _whose(self, variant):
        """The key of a variant's state."""
        return variant if variant in self.states else "all"

    def update(self, variant, step):
        """One update; the state is shared by all variants that train all parameters."""
        state, sums = step(*self.arguments(variant))
        self.states[self._whose(variant)] = state
        return sums["loss"]


def abstract_arguments(config, variant, batch_size, lengths):
    """Shapes of the arguments of a step."""
    return jax.eval_shape(lambda: Work(config, [variant], batch_size, lengths).arguments(variant))


def accounted(config, variant, batch_size, lengths):
    """Bytes that XLA wants: arguments, results that are new, temporaries."""
    arguments = abstract_arguments(config, variant, batch_size, lengths)
    compiled = make_step(config, variant).lower(*arguments).compile()
    return compiled_step.memory(compiled, {})["total"]


def products(config, variant, batch_size, lengths):
    """Floating-point operations of the products that a step is made of, attention's included."""
    (num_inputs, num_targets), inner = lengths, config.num_heads * config.head_dim
    head = variant.live * num_targets * config.emb_dim * config.vocab_size
    mlp = (len(config.mlp_activations) + 1) * config.emb_dim * config.mlp_dim
    projection = config.emb_dim * inner
    if isinstance(config, CausalLMConfig):
        num_tokens, shared = sum(lengths), config.num_kv_heads / config.num_heads
        of_layer = (2 + 2 * shared) * projection + mlp + 2 * inner * num_tokens
        return _of_update(
            batch_size * config.num_layers * num_tokens * of_layer, batch_size * head, variant
        )
    encoder = num_inputs * (4 * projection + mlp + 2 * inner * num_inputs)
    decoder = num_targets * (6 * projection + mlp + 2 * inner * (num_inputs + num_targets))
    decoder += num_inputs * 2 * projection  # keys and values of what the encoder has read
    layers = config.num_encoder_layers * encoder + config.num_decoder_layers * decoder
    return _of_update(batch_size * layers, batch_size * head, variant)


def _of_update(layers, head, variant):
    """Floating-point operations of an update, from the multiply-adds of one forward pass."""
    # A forward pass is one unit of each, a backward pass two: to activations, and to parameters.
    units = {None: (3, 3), "parameters": (4, 4), "cached": (3, 4), "adapters_off": (3, 3)}
    of_layers, of_head = units[variant.original]
    return 2 * (of_layers * layers + of_head * head)


def of_card(flops, seconds, dtype):
    """The part of the device's speed that a step makes use of; None where it is not known."""
    kind = jax.devices()[0].device_kind
    speeds = [speed for name, speed in CARDS.items() if name in kind]
    if jax.default_backend() != "gpu" or not speeds:
        return None
    return f"{flops / seconds / speeds[0][dtype != 'bfloat16']:.1%}"


def has_published():
    """Whether T5X and google/t5patches are installed."""
    return all(importlib.util.find_spec(name) for name in ("t5x", "t5patches"))


# ----------------------------------------------------------------------- A process for each variant


def published_update(config, name, flags):
    """An update of the published library."""
    import published

    return published.make(config, PUBLISHED[name], make_batch(config, flags.batch, flags.lengths))


def times_of(size, name, flags):
    """One variant and plain fine-tuning in turn, in this process; and memory as XLA accounts it."""
    config = make_config(size, flags.dtype, flags.remat, flags.scan)
    shape = flags.batch, flags.lengths
    ours = {one: VARIANTS[one] for one in (FIRST, name) if one in VARIANTS}
    work = Work(config, ours.values(), *shape)
    runs = {
        one: functools.partial(work.update, variant, make_step(config, variant))
        for one, variant in ours.items()
    }
    if name in PUBLISHED:
        runs[name] = published_update(config, name, flags)
    times = report.interleave(runs, flags.rounds, warm_up=2)
    seconds = report.median(times[name])
    found = {"ms": 1e3 * seconds, "ratio": report.ratio(times[name], times[FIRST])}
    if name in PUBLISHED:
        return found
    runs.clear()
    del work
    variant = VARIANTS[name]
    # Scanned: in a program of layers that are apart XLA may undo it.
    remat = dataclasses.replace(config, remat_policy="full", scan_layers=True)
    floor = products(config, variant, *shape)
    return {
        **found,
        "floor": floor / products(config, VARIANTS[FIRST], *shape),
        "accounted": accounted(remat, variant, flags.memory_batch, flags.memory_lengths) / 2**20,
        "of_card": of_card(floor, seconds, flags.dtype),
    }


def peaks_of(size, name, flags):
    """The peaks of two updates of one variant in this process, which does nothing else."""
    config = make_config(size, flags.dtype, flags.remat, flags.scan)
    if name in PUBLISHED:
        update = published_update(config, name, flags)
    else:
        variant = VARIANTS[name]
        work = Work(config, [variant], flags.batch, flags.lengths)
        update = functools.partial(work.update, variant, make_step(config, variant))
    for _ in range(2):
        jax.block_until_ready(update())
    stats = jax.devices()[0].memory_stats()
    on_device = stats["peak_bytes_in_use"] / 2**20 if stats else None
    return {"resident": report.peak() / 2**20, "device": on_device}


def rows_of(sizes, names, measure, keys, relative):
    """The rows of a table, each when it is there.

    Args:
        sizes: one after the other.
        names: of variants.
        measure: gives what a variant's process has found, None if that failed.
        keys: what of it goes into the row, in order.
        relative: the keys after whose value comes its ratio to the first variant's.
    """
    for size in sizes:
        first = {}
        for name in names:
            found = measure(size, name) or {}
            if name == names[0]:
                first = found
            row = [size, name]
            for key in keys:
                value = found.get(key)
                row.append(value)
                if key in relative:
                    is_known = value is not None and first.get(key) is not None
                    row.append(value / first[key] if is_known else None)
            yield row


def main():
    """Prints one table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])

    def lengths(text):
        return tuple(map(int, text.split(",")))

    parser.add_argument(
        "--size", default="small,base", help=f"of {', '.join([*SIZES, *DECODER_ONLY])}"
    )
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lengths", type=lengths, default=(128, 64), help="inputs,targets")
    parser.add_argument("--memory_batch", type=int, default=32, help="that accounted bytes are of")
    parser.add_argument("--memory_lengths", type=lengths, default=(512, 128))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--remat", default="none", choices=("none", "minimal", "full"))
    parser.add_argument("--scan", action="store_true", help="one loop over the layers of a stack")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--ours", action="store_true", help="leaves out the published library")
    parser.add_argument("--rss", action="store_true", help="peak memory instead of times")
    parser.add_argument("--variant", help="one alone, in this process; prints a JSON line")
    flags = parser.parse_args()
    measure_here = peaks_of if flags.rss else times_of
    if flags.variant:
        print(json.dumps(measure_here(flags.size, flags.variant, flags)))
        return None
    report.heading(is_apart=True)
    what = f"batch {flags.batch} x {'/'.join(map(str, flags.lengths))}, {flags.dtype}"
    failed = []
    with tempfile.TemporaryDirectory() as cache:
        # So that fine-tuning is compiled once. With --rss the compiler's memory is looked at, too.
        environment = {} if flags.rss else {"JAX_COMPILATION_CACHE_DIR": cache}

        def measure(size, name):
            arguments = [*sys.argv[1:], f"--size={size}", f"--variant={name}"]
            found = report.apart(__file__, arguments, **environment)
            failed.extend([] if found else [f"{size}, {name}"])
            return found

        if flags.rss:
            columns = ("peak resident MiB", "times fine-tune", "device MiB", "times fine-tune")
            keys = relative = ("resident", "device")
        else:
            of = f"{flags.memory_batch} x {'/'.join(map(str, flags.memory_lengths))}"
            columns = (
                *("ms", "times fine-tune", "floor"),
                *(f"accounted MiB, {of}", "times fine-tune", "MFU"),
            )
            keys, relative = ("ms", "ratio", "floor", "accounted", "of_card"), ("accounted",)
        names = [*VARIANTS, *(PUBLISHED if has_published() and not flags.ours else ())]
        rows = rows_of(flags.size.split(","), names, measure, keys, relative)
        report.table(("", what, *columns), rows)
    return f"Failed: {'; '.join(failed)}" if failed else None


if __name__ == "__main__":
    sys.exit(main())
