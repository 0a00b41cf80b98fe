"""The model files of gin_configs: the sizes that were published, and what a run may set."""

import dataclasses
import math
import pathlib

import gin
import jax
import pytest

import tnt_jax
from tnt_jax.models import families

MODEL_FILES = pathlib.Path(tnt_jax.__file__).parents[1] / "gin_configs" / "models"

# Parameter counts as published with the checkpoints (model cards; of Gemma's, without vision).
NUM_PARAMS = {
    "t5_1_0_tiny": None,
    "t5_1_0_small": 60_506_624,
    "t5_1_0_base": 222_903_552,
    "t5_1_0_large": 737_668_096,
    "t5_1_0_3b": 2_851_598_336,
    "t5_1_0_11b": 11_307_321_344,
    "t5_1_1_tiny": None,
    "t5_1_1_small": 76_961_152,
    "t5_1_1_base": 247_577_856,
    "t5_1_1_large": 783_150_080,
    "t5_1_1_xl": 2_849_757_184,
    "t5_1_1_xxl": 11_135_332_352,
    "causal_lm_tiny": None,
    "smollm2_135m": 134_515_008,
    "llama_3_2_1b": 1_235_814_400,
    "llama_3_1_8b": 8_030_261_248,
    "qwen3_0_6b": 596_049_920,
    "gemma_3_1b": 999_885_952,
    "gemma_3_27b": 27_009_346_304,
}


def num_params(tree):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def test_every_model_file_is_listed():
    assert {path.stem for path in MODEL_FILES.glob("*.gin")} == {*NUM_PARAMS, "from_checkpoint"}


@pytest.mark.parametrize("name", NUM_PARAMS)
def test_model_files(name):
    gin.clear_config()
    try:
        gin.parse_config_files_and_bindings([str(MODEL_FILES / f"{name}.gin")], [])
        config = gin.query_parameter("MODEL/macro.value").scoped_configurable_fn()
        with gin.unlock_config():
            gin.parse_config("VOCAB_SIZE = 100\nDTYPE = 'bfloat16'\nDROPOUT_RATE = 0.1")
            gin.parse_config("SCAN_LAYERS = True\nREMAT_POLICY = 'minimal'")
            if not name.startswith("t5"):
                gin.parse_config("ATTENTION = 'splash'")
        changed = gin.query_parameter("MODEL/macro.value").scoped_configurable_fn()
    finally:
        gin.clear_config()
    assert config.dropout_rate == 0
    is_t5 = name.startswith("t5")
    assert not is_t5 or config.vocab_size == 32128
    is_large = name.endswith(("_xl", "_xxl", "_3b", "_11b", "_1b", "_8b", "_27b"))
    assert (config.scan_layers, config.remat_policy) == (is_large, "full" if is_large else "none")
    assert changed == dataclasses.replace(
        config,
        vocab_size=100,
        dtype="bfloat16",
        dropout_rate=0.1,
        scan_layers=True,
        remat_policy="minimal",
        attention="xla" if is_t5 else "splash",
    )
    if NUM_PARAMS[name]:
        assert NUM_PARAMS[name] == num_params(families.network_of(config).abstract_params())
