"""Samples of a run: what a model says to a few prompts."""

import types

import jax.numpy as jnp
import numpy as np
from helpers import tiny_tokenizers

from tnt_jax.models import decoding, sharding
from tnt_jax.tokenizers import hub_tokenizer
from tnt_jax.watching import samples


def test_a_sample_ends_where_its_output_ends(tmp_path):
    """A row is filled up with id 0, which is an ordinary token of GPT-2's vocabulary ("!")."""
    tiny_tokenizers.KINDS["qwen"](tmp_path / "qwen")
    vocabulary = hub_tokenizer.HubTokenizer(str(tmp_path / "qwen"))
    said = list(vocabulary.encode("A new line\n"))
    row = np.array([[*said, 0, 0, 0]])
    assert vocabulary.decode(row[0]) != "A new line\n"
    decoded = types.SimpleNamespace(tokens=jnp.asarray(row))
    mesh = sharding.make_mesh(sharding.MeshShape())
    model = types.SimpleNamespace(mesh=mesh, decode=lambda *_, **__: decoded)
    speaker = samples.Speaker(
        model=model,  # pyright: ignore[reportArgumentType]
        vocabulary=vocabulary,
        prompts=[samples.Prompt(id="1", inputs=(5, 6))],
        decoder=decoding.Decoding(max_length=8, end_ids=(said[-1],)),
        longest_input=8,
    )
    assert speaker(None) == ["A new line\n"]
