"""Makes `t5x_checkpoints.tar.gz` and `t5x_checkpoints.npz`: run it where T5X is installed.

    python tests/golden/make_t5x_checkpoints.py

Checkpoints that T5X itself writes of tiny random models: the networks `t5` (T5 1.1, and 1.0 with a
tied output matrix) and `scalable_t5` (scanned, and not), in the legacy and the Orbax format, in
float32 and bfloat16. Beside them the logits that T5X computes from each, and its parameters.
"""

import pathlib
import sys
import tarfile
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import seqio
from flax import traverse_util
from t5x import adafactor, checkpoints, models, partitioning, utils
from t5x.examples.scalable_t5 import network as scalable_network
from t5x.examples.t5 import network

HERE = pathlib.Path(__file__).parent
SIZES = {
    "vocab_size": 40,
    "emb_dim": 12,
    "num_heads": 2,
    "num_encoder_layers": 3,
    "num_decoder_layers": 2,
    "head_dim": 4,
    "mlp_dim": 20,
    "dtype": "float32",
}
T5_1_1 = {"mlp_activations": ("gelu", "linear"), "logits_via_embedding": False}
T5_1_0 = {"mlp_activations": ("relu",), "logits_via_embedding": True}
# Name: network, its settings, the format, the type of the weights.
CHECKPOINTS = {
    "t5_legacy": (network, T5_1_1, "legacy", "float32"),
    "t5_legacy_bf16": (network, T5_1_1, "legacy", "bfloat16"),
    "t5_orbax": (network, T5_1_1, "orbax", "float32"),
    "t5_1_0_legacy": (network, T5_1_0, "legacy", "float32"),
    "scanned_legacy": (scalable_network, T5_1_1 | {"scan_layers": True}, "legacy", "float32"),
    "scanned_orbax": (scalable_network, T5_1_1 | {"scan_layers": True}, "orbax", "bfloat16"),
    "scalable_legacy": (scalable_network, T5_1_1 | {"scan_layers": False}, "legacy", "float32"),
}
STEP = 7


def random_batch(seed):
    random = np.random.default_rng(seed)
    inputs = random.integers(2, SIZES["vocab_size"], (2, 30))
    inputs[1, 20:] = 0
    targets = random.integers(2, SIZES["vocab_size"], (2, 25))
    targets[0, 12:] = 0
    return {
        "encoder_input_tokens": inputs.astype(np.int32),
        "decoder_input_tokens": np.pad(targets, ((0, 0), (1, 0)))[:, :-1].astype(np.int32),
        "decoder_target_tokens": targets.astype(np.int32),
    }


def rounded(params, dtype):
    """No two parameters alike, all of them large enough to matter, in float32."""
    random = np.random.default_rng(1)

    def changed(x):
        x = np.asarray(x) * random.uniform(0.7, 1.3, x.shape) + 0.1 * random.normal(size=x.shape)
        return jnp.asarray(x, dtype).astype(jnp.float32)

    return jax.tree.map(changed, params)


def main():
    """Writes both files."""
    arrays = {f"batch/{name}": value for name, value in random_batch(0).items()}
    with tempfile.TemporaryDirectory() as folder:
        for name, (module, settings, kind, dtype) in CHECKPOINTS.items():
            config = module.T5Config(**SIZES, **settings)
            bytes_ = seqio.ByteVocabulary()
            model = models.EncoderDecoderModel(
                module=module.Transformer(config),
                input_vocabulary=bytes_,
                output_vocabulary=bytes_,
                optimizer_def=adafactor.Adafactor(
                    1e-3, logical_factor_rules=adafactor.standard_logical_factor_rules()
                ),
            )
            partitioner = partitioning.PjitPartitioner(num_partitions=1)
            shapes = {key: value.shape for key, value in random_batch(0).items()}
            initializer = utils.TrainStateInitializer(
                optimizer_def=model.optimizer_def,
                init_fn=model.get_initial_variables,
                input_shapes=shapes,
                partitioner=partitioner,
            )
            state = initializer.from_scratch(jax.random.key(0))
            params = rounded(state.params, dtype)
            state = state.replace_params(params).replace_step(jnp.asarray(STEP))
            where = pathlib.Path(folder) / name
            where.mkdir()
            save_dtype = jnp.dtype(dtype)
            if kind == "legacy":
                checkpoints.Checkpointer(
                    state, partitioner, str(where), save_dtype=save_dtype
                ).save(state)
            else:
                writer = checkpoints.OrbaxCheckpointManagerInterface(
                    str(where), state, partitioner, save_dtype=save_dtype
                )
                writer.save(state)
                writer.wait_until_finished()
            for path, value in traverse_util.flatten_dict(params, sep="/").items():
                arrays[f"{name}/params/{path}"] = np.asarray(value)
            logits = model.module.apply({"params": params}, **random_batch(0), enable_dropout=False)
            arrays[f"{name}/logits"] = np.asarray(logits)
            print(name, float(np.abs(arrays[f"{name}/logits"]).max()), file=sys.stderr)
        with tarfile.open(HERE / "t5x_checkpoints.tar.gz", "w:gz") as archive:
            for name in CHECKPOINTS:
                archive.add(pathlib.Path(folder) / name, name)
    np.savez_compressed(HERE / "t5x_checkpoints.npz", **arrays)


if __name__ == "__main__":
    main()
