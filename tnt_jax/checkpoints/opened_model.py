"""What a program that runs a model as it is opens once: checkpoint, network, vocabulary."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

from tnt_jax.checkpoints import pretrained
from tnt_jax.models import sharding
from tnt_jax.models.model import Model
from tnt_jax.models.network_config import NetworkConfig
from tnt_jax.runtime import console, memory
from tnt_jax.runtime.array_types import PyTree
from tnt_jax.tokenizers import tokenization


@dataclasses.dataclass(frozen=True, kw_only=True)
class OpenedModel:
    """A model whose settings are known to fit; its weights are read when they are asked for.

    Attributes:
      source: The checkpoint.
      model: The network on its mesh.
      vocabulary: The tokeniser of inputs and outputs.
    """

    source: pretrained.Pretrained
    model: Model
    vocabulary: tokenization.Tokeniser

    @functools.cached_property
    def params(self) -> PyTree:
        """The parameters, on the mesh, in the dtypes in which they are computed.

        Raises:
          UsageError: The weights are damaged.
        """
        return self.source.restore(self.model.abstract_computed_params)


def open_model(
    path: str,
    settings: NetworkConfig | pretrained.FromCheckpoint,
    vocabulary: tokenization.Tokeniser,
    *,
    batch_size: int,
    num_tokens: int,
    mesh_shape: sharding.MeshShape | None,
    devices: Sequence[Any] | None = None,
) -> OpenedModel:
    """Opens a model and compares everything with it that needs no weight.

    Args:
      path: A checkpoint, or a model directory for its newest.
      settings: The network's settings, or that they are the checkpoint's.
      vocabulary: The tokeniser of inputs and outputs.
      batch_size: Number of rows that are computed together.
      num_tokens: Largest number of tokens in a row.
      mesh_shape: Devices per mesh axis; None puts all on `data`.
      devices: Devices of the mesh; None takes all that are here.

    Raises:
      UsageError: The checkpoint, the vocabulary or a setting does not fit.
    """
    mesh = sharding.make_mesh(mesh_shape or sharding.MeshShape(), devices)
    sharding.check_batch_size(batch_size, 1, mesh)
    memory.check_batch(batch_size, num_tokens)
    source = pretrained.open_checkpoint(path)
    config = pretrained.config_of(settings, source)
    longest = source.max_positions
    if longest is not None and num_tokens > longest:
        console.log(
            f"Rows may have {num_tokens} tokens (TASK_FEATURE_LENGTHS), and {source.path} was made "
            f"for {longest}. What it says in longer ones is noise."
        )
    pretrained.check_vocabulary(vocabulary, config, source)
    return OpenedModel(source=source, model=Model(config=config, mesh=mesh), vocabulary=vocabulary)
