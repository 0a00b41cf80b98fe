"""Compares decoder-only models with transformers and peft afresh: a part of `parity.py`.

Models are tiny, one of each family and switch (`golden/make_causal_lm.py`), with weights that make
every part count. Of each

* transformers saves a directory, and the logits and greedy outputs of both programs are compared;
* its parameters are changed a little and saved as a training run saves them, `tnt_jax.convert`
  makes a directory of that, and both are compared again;
* random adapters are saved as a run saves them, `tnt_jax.convert` writes PEFT's files, and what
  peft makes of them on the original is compared with ours;
* conversion there and back must give the same bits, in float32 and in bfloat16.
"""

import json
import pathlib
from collections.abc import Callable, Iterator

import jax
import make_causal_lm as reference
import numpy as np
import orbax.checkpoint as ocp
import peft
import torch
import transformers
from etils import epath

from tnt_jax import convert
from tnt_jax.checkpoints import digests, orbax, pretrained
from tnt_jax.data.examples import Example
from tnt_jax.data.layouts import CAUSAL
from tnt_jax.models import adapters, decoding, parameters, sharding
from tnt_jax.models.model import Model

MODELS = reference.MODELS
TOLERANCE = 2e-5  # of the largest logit
RANK, ALPHA = 3, 7.5

Found = Iterator[tuple[str, str, bool]]  # what was compared, the result, whether it is right


def compare(
    name: str,
    folder: pathlib.Path,
    *,
    changed: Callable,
    tensor_differences: Callable[[pathlib.Path, pathlib.Path], Iterator[str]],
) -> Found:
    """All comparisons of one model; `changed` and `tensor_differences` are those of `parity`."""
    original = folder / "original"
    rows = reference.rows_of(0)
    made = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**{**reference.COMMON, **MODELS[name]}),
        attn_implementation="eager",
        dtype=torch.float32,
    )
    reference.randomise(made, 0)
    made.save_pretrained(original)
    source = pretrained.open_checkpoint(str(original))
    ours = Model(config=source.config, mesh=sharding.make_mesh(sharding.MeshShape()))
    params = source.restore(ours.abstract_params)
    yield from answers("transformers -> tnt_jax", load(original), ours, params, rows)

    # A trained model goes back.
    new = changed(params)
    orbax.save_items(epath.Path(folder / "trained"), 7, {"params": ocp.args.StandardSave(new)})
    (folder / "trained" / "huggingface").mkdir()
    settings = (original / "config.json").read_text()
    (folder / "trained" / "huggingface" / "config.json").write_text(settings)
    for is_described in (True, False):
        what = f"tnt_jax -> transformers, {'its' if is_described else 'new'} config.json"
        if not is_described:
            settings = json.dumps(convert.huggingface.new_config(source.config))
            (folder / "trained" / "huggingface" / "config.json").write_text(settings)
        written = folder / f"written_{is_described}"
        to_format(folder / "trained", written, "huggingface")
        yield from answers(what, load(written), ours, new, rows)

    # Adapters go out alone.
    run = folder / "adapted"
    save_adapters(run, original, ours)
    to_format(run, folder / "peft", "peft")
    with_adapters = peft.PeftModel.from_pretrained(load(original), folder / "peft").eval()
    merged = pretrained.open_checkpoint(str(run)).restore(ours.abstract_params)
    yield from answers("tnt_jax -> peft", with_adapters, ours, merged, rows)

    bfloat16 = folder / "bfloat16"
    made.to(torch.bfloat16).save_pretrained(bfloat16)
    for start in (original, bfloat16):
        for via in ("huggingface", "orbax"):
            between, end = (folder / f"{start.name}_{via}{again}" for again in ("", "_again"))
            to_format(start, between, via)
            to_format(between, end, "huggingface")
            differences = list(tensor_differences(start, end))
            result = "; ".join(differences[:3]) or "the same bits"
            yield f"there and back, {start.name}, by {via}", result, not differences


def to_format(source: pathlib.Path, target: pathlib.Path, output_format: str) -> None:
    """Converts a model."""
    convert.convert(input=str(source), output=str(target), output_format=output_format)


def load(folder: pathlib.Path) -> torch.nn.Module:
    """A directory as transformers reads it."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32
    ).eval()


def save_adapters(folder: pathlib.Path, original: pathlib.Path, ours: Model) -> None:
    """Random adapters as a run saves them; B is not zero, as after an update."""
    apart = parameters.unstack_layers(ours.abstract_params)
    random = np.random.default_rng(1)
    added = jax.tree.map(
        lambda x: random.normal(0, 0.2, x.shape).astype(np.float32),
        jax.eval_shape(lambda: adapters.init(apart, RANK, jax.random.key(0))),
    )
    names = pretrained.open_checkpoint(str(original)).weights
    run = {
        "original": {"path": str(original), "digest": digests.of_files(names)},
        "adapters": {"alpha": ALPHA, "rank": RANK, "beside": str(original)},
        "objective": {},
    }
    items = {"params": ocp.args.StandardSave(added), "run": ocp.args.JsonSave(run)}
    orbax.save_items(epath.Path(folder), 5, items)


def answers(what: str, model: torch.nn.Module, ours: Model, params, rows: list) -> Found:
    """Logits of the responses' tokens, and greedy outputs, of the two programs."""
    theirs = np.concatenate(reference.logits_of(model, rows))
    lengths = reference.PROMPT_LENGTHS
    nothing = np.zeros((0, 2), np.int32)
    examples = [
        Example(np.array(row[:n]), np.array(row[n:]), nothing)
        for row, n in zip(rows, lengths, strict=True)
    ]
    sizes = {"inputs": max(lengths), "targets": max(reference.RESPONSE_LENGTHS)}
    batch = CAUSAL.convert(examples, sizes)
    logits = np.asarray(jax.jit(ours.forward)(params, batch).whole())
    logits = logits[batch["decoder_loss_mask"] > 0]
    scale, difference = abs(theirs).max(), abs(logits - theirs).max()
    result = f"differ by at most {difference:.1e}, the largest is {scale:.1f}"
    yield f"{what}: logits", result, bool(difference <= TOLERANCE * scale)

    outputs, margin = reference.greedy(model, rows)
    end = reference.COMMON["eos_token_id"]
    decoded = ours.decode(
        params,
        [row[:n] for row, n in zip(rows, lengths, strict=True)],
        max(lengths),
        decoding.Decoding(max_length=reference.MAX_LENGTH, end_ids=(end,)),
        len(rows),
    )
    said = [
        row[: len(ids)].tolist()
        for row, ids in zip(np.asarray(decoded.tokens), outputs, strict=True)
    ]
    num_other = sum(one != other for one, other in zip(said, outputs, strict=True))
    result = f"{num_other} of {len(rows)} rows differ, least margin {margin:.1e}"
    # Rounding may turn a tie, and nothing else.
    yield f"{what}: greedy", result, num_other == 0 or margin <= 2 * TOLERANCE * scale
