"""The steps of a patch, where a user's settings decide how the original is run."""

import gin
import pytest

from tnt_jax.checkpoints import pretrained
from tnt_jax.localize import OriginalModel
from tnt_jax.models import sharding
from tnt_jax.patching import choices, patch_run, pipeline_gin
from tnt_jax.patching.unwanted import Unwanted

NETWORK = choices.Network(
    is_decoder_only=False,
    num_layers=2,
    num_params=1_000,
    emb_dim=8,
    num_heads=2,
    vocab_size=50,
)


@pytest.fixture
def localized(tmp_path):
    """From a user's settings and a number of devices to how `--labels` runs the original."""

    def found(*settings, num_devices):
        written = pipeline_gin.PipelineGin(
            model="model",
            folder=tmp_path,
            unwanted=Unwanted(labels="bad"),
            decoding="greedy",
            own_files=[],
            settings=settings,
        )
        machine = choices.Machine(platform="cpu", num_devices=num_devices, num_bytes=2**34)
        written.write(choices.before_pilot(written.given, [10, 17], NETWORK, machine))
        patch_run.configure(written)
        return patch_run.localized_model("model", "states")

    yield found
    gin.clear_config()


def test_labels_are_looked_into_with_the_settings_of_the_user(localized):
    found = localized(
        "DTYPE='bfloat16'",
        "FSDP_DEVICES=8",
        "TASK_FEATURE_LENGTHS={'inputs': 1024, 'targets': 256}",
        "GENERATE_BATCH_SIZE=16",
        num_devices=8,
    )
    assert found == OriginalModel(
        checkpoint_path="model",
        model=pretrained.FromCheckpoint(dtype="bfloat16"),
        task_feature_lengths={"inputs": 1024, "targets": 256},
        batch_size=16,
        mesh_shape=sharding.MeshShape(fsdp=8),
        states_folder="states",
    )


def test_labels_are_looked_into_with_what_is_chosen_for_the_pilot(localized):
    """64 rows are no multiple of 6 devices; outputs that are as long as MAX_LENGTH are not cut."""
    found = localized("MAX_LENGTH=200", num_devices=6)
    assert found.batch_size == 66
    assert found.task_feature_lengths == {"inputs": 24, "targets": 200}
