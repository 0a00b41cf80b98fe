"""Makes tests/golden/causal_lm/ with transformers: tiny decoder-only models and what they say.

    python tests/golden/make_causal_lm.py

needs torch and transformers (README.md says which), not this project. A model is settings with the
switches of its family, random weights that transformers saves, and what transformers then computes
from the saved directory. `*_4` has the same settings in the dialect of transformers 4. The seed is
chosen, and what follows from it checked: no greedy choice is close to a tie, and no weight is
without effect.
"""

import json
import pathlib
import shutil

import numpy as np
import torch
import transformers

FOLDER = pathlib.Path(__file__).parent / "causal_lm"
PROMPT_LENGTHS = (9, 3, 14, 1)
RESPONSE_LENGTHS = (10, 20, 2, 5)
MAX_LENGTH = 16  # of greedy outputs
NUM_SEEDS = 40
MIN_MARGIN = 2e-3  # of the logits, between a greedy token and the next best
MIN_EFFECT = 1e-2  # of a weight on some logit

COMMON = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": None,
}
LLAMA_3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
MODELS = {
    "llama": {
        "model_type": "llama",
        "rope_parameters": {"rope_type": "default", "rope_theta": 50.0},
    },
    "llama_3": {
        "model_type": "llama",
        "tie_word_embeddings": True,
        "attention_bias": True,
        "head_dim": 8,
        "rope_parameters": LLAMA_3,
    },
    "mistral": {"model_type": "mistral", "sliding_window": 5},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen2_window": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 5,
        "max_window_layers": 2,
    },
    "qwen3": {"model_type": "qwen3", "head_dim": 8, "tie_word_embeddings": True},
    "smollm3": {"model_type": "smollm3", "no_rope_layer_interval": 2},
    "gemma": {"model_type": "gemma", "head_dim": 8, "hidden_act": "gelu_pytorch_tanh"},
    "gemma2": {
        "model_type": "gemma2",
        "head_dim": 8,
        "query_pre_attn_scalar": 12,
        "sliding_window": 5,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 5.0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 50.0},
    },
    "gemma3": {
        "model_type": "gemma3_text",
        "head_dim": 8,
        "query_pre_attn_scalar": 12,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
        "num_hidden_layers": 6,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 20.0},
            "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 200.0},
        },
    },
    "olmo2": {"model_type": "olmo2", "rms_norm_eps": 1e-5},
}
# The same networks, as the hub's files say it.
DIALECT_4 = {
    "llama_3": {"rope_theta": 100.0, "rope_scaling": {**LLAMA_3, "rope_theta": None}},
    "gemma2": {"rope_theta": 50.0, "hidden_act": "gelu_pytorch_tanh"},
    "gemma3": {
        "rope_theta": 200.0,
        "rope_local_base_freq": 20.0,
        "rope_scaling": {"type": "linear", "factor": 2.0},
        "sliding_window_pattern": 3,
    },
}


def randomise(model, seed):
    """Weights of a size that makes every part count."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("norm.weight"):
                parameter.add_(0.3 * noise)
            else:
                parameter.copy_(0.35 * noise)


def rows_of(seed):
    rng = np.random.default_rng(seed)
    return [
        rng.integers(3, COMMON["vocab_size"], length + more).tolist()
        for length, more in zip(PROMPT_LENGTHS, RESPONSE_LENGTHS, strict=True)
    ]


def logits_of(model, rows):
    """Logits `[R, V]` of the responses' tokens, for each row alone."""
    with torch.no_grad():
        return [
            model(torch.tensor([row])).logits[0, length - 1 : -1].float().numpy()
            for row, length in zip(rows, PROMPT_LENGTHS, strict=True)
        ]


def greedy(model, rows):
    """Greedy outputs up to the end, and the smallest margin of a choice."""
    outputs, margin = [], np.inf
    for row, length in zip(rows, PROMPT_LENGTHS, strict=True):
        ids = row[:length]
        with torch.no_grad():
            for _ in range(MAX_LENGTH):
                last = model(torch.tensor([ids])).logits[0, -1]
                best = torch.topk(last, 2)
                margin = min(margin, float(best.values[0] - best.values[1]))
                ids = [*ids, int(best.indices[0])]
                if ids[-1] == COMMON["eos_token_id"]:
                    break
        outputs.append(ids[length:])
    return outputs, margin


def smallest_effect(model, rows):
    """How far the logits move when one parameter changes: the least of all parameters.

    A parameter for which they hardly move could be misread by another implementation unseen.
    """
    before = logits_of(model, rows)
    effects = []
    for parameter in model.parameters():
        with torch.no_grad():
            kept = parameter.clone()
            parameter.add_(0.5 * torch.ones_like(parameter) * torch.sign(parameter))
            after = logits_of(model, rows)
            parameter.copy_(kept)
        effects.append(max(np.abs(a - b).max() for a, b in zip(after, before, strict=True)))
    return min(effects)


def make(name, settings):
    """One model: its directory, and what is expected of it."""
    config = transformers.AutoConfig.for_model(**{**COMMON, **settings})
    for seed in range(NUM_SEEDS):
        model = transformers.AutoModelForCausalLM.from_config(
            config, attn_implementation="eager", dtype=torch.float32
        ).eval()
        randomise(model, seed)
        rows = rows_of(seed)
        outputs, margin = greedy(model, rows)
        if margin >= MIN_MARGIN and len({*map(tuple, outputs)}) == len(rows):
            break
    else:
        raise SystemExit(f"{name}: no seed without a tie")
    effect = smallest_effect(model, rows)
    assert effect >= MIN_EFFECT, (name, effect)
    folder = FOLDER / name
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32
    ).eval()
    found = {f"{name}/logits": np.concatenate(logits_of(loaded, rows))}
    found[f"{name}/rows"] = padded(rows)
    found[f"{name}/greedy"] = padded(outputs)
    print(name, "seed", seed, "margin", margin, "effect", effect)
    return found


def padded(rows):
    """Rows of ids, filled up with -1."""
    array = np.full((len(rows), max(map(len, rows))), -1, np.int32)
    for row, ids in zip(array, rows, strict=True):
        row[: len(ids)] = ids
    return array


torch.set_num_threads(1)  # of so little work


def main():
    """Makes all of them."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    expected = {}
    for name, settings in MODELS.items():
        expected |= make(name, settings)
    for name, changes in DIALECT_4.items():
        config = json.loads((FOLDER / name / "config.json").read_text("utf-8"))
        for key in ("rope_parameters", "layer_types", "dtype"):
            config.pop(key, None)
        config |= {key: value for key, value in changes.items() if key != "rope_scaling"}
        if scaling := changes.get("rope_scaling"):
            config["rope_scaling"] = {k: v for k, v in scaling.items() if v is not None}
        config["torch_dtype"] = "float32"
        (FOLDER / f"{name}_4.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    np.savez_compressed(FOLDER / "expected.npz", **expected)


if __name__ == "__main__":
    main()
