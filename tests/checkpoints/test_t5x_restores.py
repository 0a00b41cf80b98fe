"""The real T5X reads what `tnt_jax.convert` writes, and computes the same from it."""

import functools
import warnings

import jax
import numpy as np
import pytest
import seqio
from helpers.t5x_files import BATCH, CONFIG, GOLDEN

from tnt_jax import convert

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # T5X calls what JAX deprecates
    pytest.importorskip(
        "t5x", reason="needs google-research/t5x, which no package index has: see docs/howto_t5x.md"
    )
    from t5x import adafactor, checkpoints, models, partitioning, state_utils, utils
    from t5x.examples.scalable_t5 import network as scalable_network
    from t5x.examples.t5 import network

# T5X and its libraries warn, and broadcast between ranks.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module", autouse=True)
def as_t5x_runs():
    with jax.numpy_rank_promotion("allow"):
        yield


def model_of(scan_layers):
    """T5X's own, of the sizes of CONFIG."""
    fields = set(network.T5Config.__dataclass_fields__) - {"dtype", "float32_attention_logits"}
    sizes = {name: getattr(CONFIG, name) for name in fields if hasattr(CONFIG, name)}
    if scan_layers:
        module = scalable_network.Transformer(scalable_network.T5Config(**sizes, scan_layers=True))
    else:
        module = network.Transformer(network.T5Config(**sizes))
    return models.EncoderDecoderModel(
        module=module,
        input_vocabulary=seqio.ByteVocabulary(),
        output_vocabulary=seqio.ByteVocabulary(),
        optimizer_def=adafactor.Adafactor(
            1e-3, logical_factor_rules=adafactor.standard_logical_factor_rules()
        ),
    )


@pytest.mark.parametrize("output_format", ["t5x", "t5x_orbax"])
@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("is_training", [False, True])
def test_t5x_reads_what_is_written(
    output_format,
    scan_layers,
    is_training,
    written_by_t5x,
    tmp_path,
):
    """For inference; and to train on, as docs/howto_t5x.md says, without the optimizer's state."""
    convert.convert(
        input=str(written_by_t5x / "t5_legacy"),
        output=str(tmp_path),
        output_format=output_format,
        scan_layers=scan_layers,
    )
    model = model_of(scan_layers)
    partitioner = partitioning.PjitPartitioner(num_partitions=1)
    partitioner.mesh = jax.sharding.Mesh(np.reshape(jax.devices(), (4, 2)), ("data", "model"))
    initializer = utils.TrainStateInitializer(
        optimizer_def=model.optimizer_def if is_training else None,
        init_fn=model.get_initial_variables,
        input_shapes={name: array.shape for name, array in BATCH.items()},
        partitioner=partitioner,
    )
    scratch = initializer.from_scratch(jax.random.key(1))
    if output_format == "t5x":
        reader = checkpoints.Checkpointer(scratch, partitioner, str(tmp_path))
    else:
        reader = checkpoints.OrbaxCheckpointManagerInterface(str(tmp_path), scratch, partitioner)
    without_optimizer = functools.partial(
        state_utils.apply_assignment_map, assignment_map=((r"state/param_states.*", None),)
    )
    state = reader.restore(
        path=str(tmp_path / "checkpoint_7"),
        fallback_state=scratch.state_dict() if is_training else None,
        state_transformation_fns=[without_optimizer] if is_training else [],
    )
    assert int(state.step) == 7
    logits = model.module.apply({"params": state.params}, **BATCH, enable_dropout=False)
    real = np.asarray(BATCH["decoder_target_tokens"]) > 0
    expected = GOLDEN["t5_legacy/logits"]
    np.testing.assert_allclose(logits[real], expected[real], rtol=1e-5, atol=1e-5)
