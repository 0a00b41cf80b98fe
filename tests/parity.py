"""Compares with transformers afresh, in both directions: T5 at the size of T5-small, and others.

    make parity

needs torch, transformers and peft beside this project, in an environment of its own, which the
target makes. Weights are random, of sizes as `golden/make_huggingface.py` has them. Of each model

* transformers saves a directory, and the logits and greedy outputs of both programs are compared;
* its parameters are changed a little and saved as a training run saves them, `tnt_jax.convert`
  makes a directory of that, with and without the original's settings, and both are compared again;
* conversion there and back must give the same bits, in float32 and in bfloat16.

Tiny models of the decoder-only families come after them (`parity_causal_lm.py`), with peft.

Names of models as arguments run these alone. The exit status is 1 if anything differs.
"""

import json
import logging
import os
import pathlib
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator

os.environ.update(
    JAX_PLATFORMS="cpu", CUDA_VISIBLE_DEVICES="", HF_HUB_OFFLINE="1", TF_CPP_MIN_LOG_LEVEL="3"
)
sys.path.insert(0, str(pathlib.Path(__file__).parent / "golden"))

import jax
import make_huggingface as reference
import numpy as np
import orbax.checkpoint as ocp
import parity_causal_lm
import safetensors.torch
import torch
import transformers
from etils import epath
from sentencepiece import sentencepiece_model_pb2

from tnt_jax import convert
from tnt_jax.checkpoints import orbax, pretrained
from tnt_jax.models import decoding, sharding
from tnt_jax.models.model import Model
from tnt_jax.runtime import console

SPIECE = reference.FOLDER / "spiece" / "spiece.model"
TOLERANCE = 1e-4  # of the largest logit
CHANGE = 0.1  # of the standard deviation of a parameter

SMALL = {"d_model": 512, "d_kv": 64, "vocab_size": 32128}
GATED = {"d_ff": 1024, "num_heads": 6, "num_layers": 8, "num_decoder_layers": 8}
# The published sizes in place of the tiny ones: 60, 77 and 61 million parameters. umT5's vocabulary
# of 256,384 would only take time.
MODELS = {
    "t5_1_0": SMALL | {"d_ff": 2048, "num_heads": 8, "num_layers": 6},
    "t5_1_1": SMALL | GATED,
    "umt5": SMALL | GATED | {"vocab_size": 16384},
}

# What transformers 5 says of every untied T5, although "tie_word_embeddings" is false as it asks.
EXPECTED_WARNING = "but both are present in the checkpoints with different values"

Row = tuple[str, str, str, bool]  # model, what was compared, the result, whether it is as it should


class _Warnings(logging.Handler):
    """Everything that transformers logs from warnings on."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def main(names: list[str]) -> int:
    torch.set_grad_enabled(False)
    transformers.logging.set_verbosity_warning()
    transformers.logging.disable_progress_bar()
    rows: list[Row] = []
    for name in names or (*MODELS, *parity_causal_lm.MODELS):
        with tempfile.TemporaryDirectory() as folder:
            if name in MODELS:
                found = compare(name, pathlib.Path(folder))
            else:
                found = parity_causal_lm.compare(
                    name,
                    pathlib.Path(folder),
                    changed=changed,
                    tensor_differences=tensor_differences,
                )
            for what, result, is_right in found:
                print(f"{name}: {what}: {result}{'' if is_right else '   DIFFERS'}", flush=True)
                rows.append((name, what, result, is_right))
    print()
    console.table(
        [
            (name, what, result, "" if is_right else "DIFFERS")
            for name, what, result, is_right in rows
        ],
        columns=("model", "compared", "result", ""),
        title=f"tnt_jax (JAX {jax.__version__}) and transformers {transformers.__version__} "
        f"(torch {torch.__version__})",
    )
    num_wrong = sum(not is_right for *_, is_right in rows)
    print(f"{num_wrong} of {len(rows)} differ" if num_wrong else f"all {len(rows)} are equal")
    return int(num_wrong > 0)


def padded_vocabulary(path: pathlib.Path, vocab_size: int) -> pathlib.Path:
    """The small one of the tests, with a piece for each row of a model but 100, for extra ids."""
    found = sentencepiece_model_pb2.ModelProto.FromString(SPIECE.read_bytes())
    for number in range(len(found.pieces), vocab_size - 100):
        found.pieces.add(piece=f"\u2581unused{number}", score=-100.0)
    path.write_bytes(found.SerializeToString())
    return path


def compare(name: str, folder: pathlib.Path) -> Iterator[tuple[str, str, bool]]:
    original, original_bf16 = folder / "original", folder / "original_bf16"
    torch_model, batch = make_original(name, original)
    ours = Model(
        config=pretrained.open_checkpoint(str(original)).config,
        mesh=sharding.make_mesh(sharding.MeshShape()),
    )

    params = pretrained.open_checkpoint(str(original)).restore(ours.abstract_params)
    yield from compare_answers("transformers -> tnt_jax", torch_model, ours, params, batch)

    params = changed(params)
    for is_described in (True, False):
        what = f"tnt_jax -> transformers, {'its' if is_described else 'new'} config.json"
        trained, written = (folder / f"{x}_{is_described}" for x in ("trained", "written"))
        save_as_trained(trained, params, original if is_described else None)
        vocabulary = None
        if not is_described:
            vocabulary = str(padded_vocabulary(folder / "spiece.model", ours.config.vocab_size))
        convert.convert(
            input=str(trained),
            output=str(written),
            output_format="huggingface",
            vocabulary=vocabulary,
        )
        complaints, torch_model = load(written)
        yield f"{what}: loading", "; ".join(complaints) or "nothing amiss", not complaints
        yield from compare_answers(what, torch_model, ours, params, batch)

    save_bfloat16(original, original_bf16)
    for dtype, start in (("float32", original), ("bfloat16", original_bf16)):
        for via in ("huggingface", "orbax", "t5x"):
            between = folder / f"{dtype}_{via}"
            end = folder / f"{dtype}_{via}_again"
            convert.convert(input=str(start), output=str(between), output_format=via)
            convert.convert(input=str(between), output=str(end), output_format="huggingface")
            differences = list(tensor_differences(start, end))
            result = "; ".join(differences[:3]) or "the same bits"
            yield f"there and back, {dtype}, by {via}", result, not differences


# ----------------------------------------------------------------------------- transformers' side


def make_original(name: str, folder: pathlib.Path) -> tuple[torch.nn.Module, dict]:
    """A directory as the official ones are, its model, and a batch of random tokens."""
    settings = reference.CONFIGS[name] | MODELS[name]
    folder.mkdir()
    config_json = json.dumps(settings, indent=2)
    (folder / "config.json").write_text(config_json)
    config = transformers.AutoConfig.from_pretrained(folder)
    model = transformers.AutoModelForSeq2SeqLM.from_config(config).eval()
    if name not in reference.TIED:
        model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.lm_head.weight))
    batch = reference.fill(name, model, seed=0)
    model.save_pretrained(folder, max_shard_size="100MB")
    (folder / "config.json").write_text(config_json)
    shutil.copy(SPIECE, folder)
    complaints, model = load(folder)
    assert not complaints, complaints
    return model, batch


def load(folder: pathlib.Path) -> tuple[list[str], torch.nn.Module]:
    """What transformers finds wrong with a directory, and its model."""
    handler = _Warnings()
    logging.getLogger("transformers").addHandler(handler)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model, info = transformers.AutoModelForSeq2SeqLM.from_pretrained(
                folder, dtype=torch.float32, output_loading_info=True
            )
    finally:
        logging.getLogger("transformers").removeHandler(handler)
    complaints = [f"{what}: {sorted(keys)}" for what, keys in info.items() if keys]
    complaints += [str(warning.message) for warning in caught]
    complaints += [message for message in handler.messages if EXPECTED_WARNING not in message]
    return complaints, model.eval()


def save_bfloat16(original: pathlib.Path, folder: pathlib.Path) -> None:
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(original, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    shutil.copy(SPIECE, folder)


def tensor_differences(one: pathlib.Path, other: pathlib.Path) -> Iterator[str]:
    first, second = stored_tensors(one), stored_tensors(other)
    if first.keys() != second.keys():
        yield f"tensors {sorted(first.keys() ^ second.keys())}"
    for name in sorted(first.keys() & second.keys()):
        a, b = first[name], second[name]
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            yield f"{name} {a.dtype} {tuple(a.shape)} and {b.dtype} {tuple(b.shape)}"
        elif not torch.equal(a.view(torch.uint8), b.view(torch.uint8)):
            yield f"{name} has other values"


def stored_tensors(folder: pathlib.Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= safetensors.torch.load_file(path)
    return tensors


# ----------------------------------------------------------------------------- Our side


def changed(params):
    """Every parameter with noise, as if it had been trained."""
    rng = np.random.default_rng(0)

    def add_noise(leaf):
        noise = rng.standard_normal(leaf.shape, np.float32)
        return jax.device_put(leaf + CHANGE * leaf.std() * noise, leaf.sharding)

    return jax.tree.map(add_noise, params)


def save_as_trained(folder: pathlib.Path, params, original: pathlib.Path | None) -> None:
    """A model directory of ours, with the description that `train` takes from its original."""
    items = {orbax.PARAMS: ocp.args.StandardSave(params)}
    orbax.save_items(epath.Path(folder), 7, items)
    if original is not None:
        source = pretrained.open_checkpoint(str(original))
        vocabulary = pretrained.vocabulary(str(original))
        pretrained.describe(str(folder), source.config, vocabulary, source)


def compare_answers(
    what: str, torch_model: torch.nn.Module, ours: Model, params, batch: dict
) -> Iterator[tuple[str, str, bool]]:
    """Teacher-forced logits and greedy outputs of the two programs."""
    theirs = reference.teacher_forced(torch_model, batch)
    logits = np.asarray(jax.jit(ours.forward)(params, batch).whole())[batch["is_compared"]]
    scale = abs(theirs).max()
    difference = abs(logits - theirs).max()
    result = f"differ by at most {difference:.1e}, the largest is {scale:.1f}"
    yield f"{what}: logits", result, bool(difference <= TOLERANCE * scale)

    theirs, margins = reference.greedy_tokens(torch_model, batch)
    decoded = decoding.decode(
        params,
        batch["encoder_input_tokens"],
        (batch["encoder_input_tokens"] != 0).sum(axis=1),
        config=ours.config,
        decoding=decoding.Decoding(max_length=theirs.shape[1], end_ids=(1,), banned_ids=(0,)),
    )
    is_different = np.asarray(decoded.tokens) != theirs
    # From its first difference on, a row is another. Rounding may turn a tie, and nothing else.
    parting = is_different.argmax(axis=1)
    margins_there = margins[np.arange(len(theirs)), parting][is_different.any(axis=1)]
    result = f"{len(margins_there)} of {len(theirs)} rows differ, least margin {margins.min():.1e}"
    if len(margins_there):
        result += f", where they do up to {margins_there.max():.1e}"
    yield f"{what}: greedy", result, bool((margins_there <= 2 * TOLERANCE * scale).all())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
