"""Makes tests/golden/huggingface/ with transformers: tiny models of every family and what they say.

    python tests/golden/make_huggingface.py

needs torch, transformers and sentencepiece (README.md says which), not this project. A family is
settings as its official `config.json` has them, random weights that transformers saves, and what
transformers then computes from the saved directory. The seed is chosen, and what follows from it
checked, so that a mistake shows: greedy outputs vary and no choice is close to a tie, no weight and
no relative position bucket is without effect.
"""

import io
import json
import pathlib
import shutil

import numpy as np
import safetensors.torch
import sentencepiece
import torch
import transformers

FOLDER = pathlib.Path(__file__).parent / "huggingface"
LICENSE = pathlib.Path(__file__).parents[2] / "LICENSE"

MAX_LENGTH = 40  # of greedy outputs
# Distances beyond relative_attention_max_distance (128) in the encoder; 115 is enough for the last
# bucket of the decoder.
SOURCE_LENGTHS = (150, 37, 70, 4)
TARGET_LENGTHS = (118, 16, 5, 1)
NUM_SEEDS = 24
MIN_MARGIN = 2e-3  # of the logits, between a greedy token and the next best
MIN_EFFECT = 1e-2  # of a weight, or of one relative position bucket, on some logit

COMMON = {
    "decoder_start_token_id": 0,
    "dropout_rate": 0.1,
    "eos_token_id": 1,
    "initializer_factor": 1.0,
    "is_encoder_decoder": True,
    "layer_norm_epsilon": 1e-06,
    "pad_token_id": 0,
    "relative_attention_num_buckets": 32,
    "vocab_size": 64,
    "d_model": 16,
    "d_kv": 4,
    "d_ff": 24,
}
GATED = {
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
    "use_cache": True,
}
T5 = {"architectures": ["T5ForConditionalGeneration"], "model_type": "t5", "output_past": True}

# What each config.json holds, by the keys that the official one has: which of them are there, and
# which are left to their defaults, differs between the families.
CONFIGS = {
    # T5 1.0: tied and scaled, relu; no number of decoder layers.
    "t5_1_0": {
        **COMMON,
        **T5,
        "n_positions": 512,
        "num_heads": 4,
        "num_layers": 2,
        "task_specific_params": {
            "summarization": {"max_length": 200, "num_beams": 4, "prefix": "summarize: "}
        },
    },
    # T5 1.1: heads that do not fill d_model, a deeper decoder.
    "t5_1_1": {
        **COMMON,
        **T5,
        **GATED,
        "num_heads": 6,
        "num_layers": 1,
        "num_decoder_layers": 2,
    },
    "lm_adapted": {
        **COMMON,
        **T5,
        **GATED,
        "torch_dtype": "bfloat16",
        "num_heads": 4,
        "num_layers": 2,
        "num_decoder_layers": 2,
    },
    "flan_t5": {
        **COMMON,
        **T5,
        **GATED,
        "dense_act_fn": "gelu_new",
        "is_gated_act": True,
        "n_positions": 512,
        "relative_attention_max_distance": 128,
        "transformers_version": "4.23.1",
        "num_heads": 2,
        "num_layers": 2,
        "num_decoder_layers": 2,
    },
    "mt5": {
        **COMMON,
        **GATED,
        "architectures": ["MT5ForConditionalGeneration"],
        "model_type": "mt5",
        "tokenizer_class": "T5Tokenizer",
        "num_heads": 4,
        "num_layers": 2,
        "num_decoder_layers": 1,
    },
    # ByT5: a deep encoder.
    "byt5": {
        **COMMON,
        **T5,
        **GATED,
        "gradient_checkpointing": False,
        "tokenizer_class": "ByT5Tokenizer",
        "vocab_size": 384,
        "num_heads": 2,
        "num_layers": 6,
        "num_decoder_layers": 2,
    },
    # umT5: a relative position bias in every layer.
    "umt5": {
        **COMMON,
        **GATED,
        "architectures": ["UMT5ForConditionalGeneration"],
        "model_type": "umt5",
        "dense_act_fn": "gelu_new",
        "is_gated_act": True,
        "output_past": True,
        "relative_attention_max_distance": 128,
        "scalable_attention": True,
        "tokenizer_class": "T5Tokenizer",
        "num_heads": 4,
        "num_layers": 3,
        "num_decoder_layers": 2,
    },
    # What transformers 5 makes of T5Config(tie_word_embeddings=False, ...): tied, but not scaled.
    "tied_unscaled": {
        **COMMON,
        **T5,
        **GATED,
        "num_heads": 4,
        "num_layers": 1,
        "num_decoder_layers": 1,
    },
}
TIED = ("t5_1_0", "tied_unscaled")
SHARDED = "flan_t5"
BFLOAT16 = "lm_adapted"
STACKS = ("encoder", "decoder")

TEXTS = (
    "",
    "Unless required by applicable law or agreed to in writing",
    "  two  spaces,\tand a tab\nand a line ",
    "½ café ﬁ Ｔ５ 日本 🙂 e\u0301",
    "sort <extra_id_0> form <extra_id_1>",
    "<extra_id_99> license",
    "the ▁License; un\u200bless a\u00a0b — “c”",
    "0123456789 [{}]~^ LICENSE",
)


def main() -> None:
    transformers.logging.set_verbosity_error()  # `load` says what matters
    transformers.logging.disable_progress_bar()
    torch.set_grad_enabled(False)
    torch.set_num_threads(1)
    shutil.rmtree(FOLDER, ignore_errors=True)
    expected = {}
    for family, settings in CONFIGS.items():
        for name, values in make_model(family, settings).items():
            expected[f"{family}/{name}"] = values
    np.savez_compressed(FOLDER / "expected.npz", **expected)
    make_tokenizers()
    print(f"made with torch {torch.__version__}, transformers {transformers.__version__}:")
    for path in sorted(FOLDER.rglob("*")):
        if path.is_file():
            print(f"{path.stat().st_size:8}  {path.relative_to(FOLDER)}")
    print(f"{sum(path.stat().st_size for path in FOLDER.rglob('*')):8}  altogether")


# ------------------------------------------------------------------------------------- Models


def make_model(family: str, settings: dict) -> dict[str, np.ndarray]:
    folder = FOLDER / family
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
    config = transformers.AutoConfig.from_pretrained(folder)
    model = transformers.AutoModelForSeq2SeqLM.from_config(config).eval()
    if family not in TIED:
        model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.lm_head.weight))
    seed = best_seed(family, model)
    batch = fill(family, model, seed)
    effects = effects_of_weights(model, batch) | effects_of_buckets(model, batch)
    # A key after the query is at least 1 away, so bucket 16 of an encoder is never used.
    unused = {name for name in effects if name.startswith("encoder.") and "[16]" in name}
    assert unused and not any(effects.pop(name) for name in unused), family
    weakest = min(effects, key=effects.get)
    assert effects[weakest] >= MIN_EFFECT, (family, weakest, effects[weakest])
    save(family, model)
    model = load(family)
    logits = teacher_forced(model, batch)
    greedy, margins = greedy_tokens(model, batch)
    print(
        f"{family}: seed {seed}; logits {logits.min():.2f} to {logits.max():.2f}, std "
        f"{logits.std():.2f}; greedy: smallest margin {margins.min():.4f}, distinct tokens "
        f"{num_distinct(greedy)}, {num_ended(greedy)} of {len(greedy)} rows end; least effect "
        f"{effects[weakest]:.3f} ({weakest})",
        flush=True,
    )
    return {**batch, "logits": logits, "greedy_tokens": greedy}


def best_seed(family: str, model: torch.nn.Module) -> int:
    """The seed, of NUM_SEEDS, whose greedy outputs say the most, without a near tie."""
    variety = {}
    for seed in range(NUM_SEEDS):
        greedy, margins = greedy_tokens(model, fill(family, model, seed))
        if margins.min() >= MIN_MARGIN and num_ended(greedy):
            variety[seed] = sum(min(number, 12) for number in num_distinct(greedy))
    return max(variety, key=variety.get)


def num_distinct(tokens: np.ndarray) -> list[int]:
    return [len(set(row) - {0}) for row in tokens.tolist()]


def num_ended(tokens: np.ndarray) -> int:
    return int((tokens == 1).any(axis=1).sum())


def save(family: str, model: torch.nn.Module) -> None:
    """Saves with transformers, then changes what the official directories have otherwise."""
    folder = FOLDER / family
    config_json = (folder / "config.json").read_text()
    if family == BFLOAT16:
        model.bfloat16()
    model.save_pretrained(folder, max_shard_size="16KB" if family == SHARDED else "5GB")
    if family == "tied_unscaled":
        return  # this one keeps the config.json of transformers 5
    (folder / "config.json").write_text(config_json)
    state = model.state_dict()
    if family == "t5_1_0":
        # The official file has this tensor, which no version of the model reads.
        name = "decoder.block.0.layer.{}.{}Attention.relative_attention_bias.weight"
        extra = state[name.format(0, "Self")].flip(0)
        add_tensors(folder / "model.safetensors", {name.format(1, "EncDec"): extra})
    if family == SHARDED:
        # The official files have the embedding three times.
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        shard = index["weight_map"]["shared.weight"]
        copies = {f"{stack}.embed_tokens.weight": state["shared.weight"] for stack in STACKS}
        add_tensors(folder / shard, copies)
        index["weight_map"] |= dict.fromkeys(copies, shard)
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def add_tensors(path: pathlib.Path, tensors: dict[str, torch.Tensor]) -> None:
    stored = safetensors.torch.load_file(path)
    stored |= {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
    safetensors.torch.save_file(stored, path, {"format": "pt"})


def fill(family: str, model: torch.nn.Module, seed: int) -> dict[str, np.ndarray]:
    """Gives the model random weights, of sizes at which all matter, and returns a random batch."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in sorted(model.named_parameters()):
        if "norm" in name:
            weight.uniform_(0.5, 1.5, generator=generator)
            continue
        if name == "shared.weight" or "relative_attention_bias" in name:
            std = 1.0
        elif name == "lm_head.weight":
            std = 2.0 * weight.shape[1] ** -0.5
        elif ".q." in name:
            std = 1.5 * (weight.shape[1] * model.config.d_kv) ** -0.5
        else:
            std = 1.5 * weight.shape[1] ** -0.5
        weight.normal_(0.0, std, generator=generator)
    if family in TIED:  # otherwise the output is the input again and again
        for name, weight in model.named_parameters():
            if any(part in name for part in (".q.", ".o.", ".wo.")):
                weight.mul_(2.0)
    if family == "t5_1_0":  # its logits are divided by 4
        model.decoder.final_layer_norm.weight.mul_(3.0)
    if family == BFLOAT16:
        model.bfloat16().float()
    return random_batch(model.config.vocab_size, seed)


def load(family: str) -> torch.nn.Module:
    """The saved model, in float32; what is wrong with it is an error."""
    model, info = transformers.AutoModelForSeq2SeqLM.from_pretrained(
        FOLDER / family, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), (family, info)
    is_tied = model.lm_head.weight.data_ptr() == model.shared.weight.data_ptr()
    assert is_tied == (family in TIED), family
    scales = getattr(model.config, "scale_decoder_outputs", False)
    assert scales == (family == "t5_1_0"), family
    return model.eval()


def random_batch(vocab_size: int, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)

    def rows(lengths):
        tokens = np.zeros((len(lengths), max(lengths)), np.int32)
        for row, length in zip(tokens, lengths, strict=True):
            row[:length] = [*rng.integers(2, vocab_size, length - 1), 1]
        return tokens

    targets = rows(TARGET_LENGTHS)
    positions = np.arange(targets.shape[1])
    return {
        "encoder_input_tokens": rows(SOURCE_LENGTHS),
        "decoder_input_tokens": np.pad(targets, ((0, 0), (1, 0)))[:, :-1] * (targets > 0),
        "decoder_target_tokens": targets,
        # Every third of the later positions, its last among them, is enough to keep.
        "is_compared": (targets > 0) & ((positions < 30) | (positions % 3 == 0)),
    }


def inputs_of(batch: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    tokens = torch.tensor(batch["encoder_input_tokens"], dtype=torch.long)
    return {"input_ids": tokens, "attention_mask": (tokens > 0).long()}


def teacher_forced(model: torch.nn.Module, batch: dict[str, np.ndarray]) -> np.ndarray:
    """Logits at the positions that are compared, `[N, V]`."""
    decoder_inputs = torch.tensor(batch["decoder_input_tokens"], dtype=torch.long)
    logits = model(**inputs_of(batch), decoder_input_ids=decoder_inputs).logits
    return logits[torch.tensor(batch["is_compared"])].numpy()


def greedy_tokens(
    model: torch.nn.Module, batch: dict[str, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Greedy outputs without padding tokens, and how far the logits of the next best are below.

    Both `[B, MAX_LENGTH]`; after the end of a row 0 and infinity.
    """
    generated = model.generate(
        **inputs_of(batch),
        generation_config=transformers.GenerationConfig(
            decoder_start_token_id=0,
            eos_token_id=1,
            pad_token_id=0,
            do_sample=False,
            num_beams=1,
            max_new_tokens=MAX_LENGTH,
            suppress_tokens=[0],  # as tnt_jax.models.decoding
            use_cache=False,  # transformers 5.24 has none for a decoder deeper than its encoder
            output_scores=True,
            return_dict_in_generate=True,
        ),
    )
    tokens = generated.sequences[:, 1:].numpy()
    best = torch.stack(generated.scores, 1).topk(2).values
    margins = np.where(tokens > 0, (best[..., 0] - best[..., 1]).numpy(), np.inf)
    rest = ((0, 0), (0, MAX_LENGTH - tokens.shape[1]))
    tokens = np.pad(tokens, rest).astype(np.int32)
    return tokens, np.pad(margins, rest, constant_values=np.inf)


def effects_of_weights(model: torch.nn.Module, batch: dict) -> dict[str, float]:
    """How far logits move, per weight: its rows in reverse order, and if square its transpose."""
    before = teacher_forced(model, batch)
    effects = {}
    for name, weight in model.named_parameters():
        kept = weight.clone()
        changes = {"reversed": kept.flip(0)}
        if weight.ndim == 2 and weight.shape[0] == weight.shape[1]:
            changes["transposed"] = kept.T
        for change, changed in changes.items():
            weight.copy_(changed)
            effects[f"{name} {change}"] = abs(teacher_forced(model, batch) - before).max()
        weight.copy_(kept)
    return effects


def effects_of_buckets(model: torch.nn.Module, batch: dict) -> dict[str, float]:
    """How far logits move when one bucket of one relative position bias has another value."""
    before = teacher_forced(model, batch)
    effects = {}
    for name, weight in model.named_parameters():
        if "relative_attention_bias" not in name:
            continue
        for bucket in range(weight.shape[0]):
            kept = weight[bucket].clone()
            weight[bucket].neg_()
            effects[f"{name}[{bucket}]"] = abs(teacher_forced(model, batch) - before).max()
            weight[bucket].copy_(kept)
    return effects


# ----------------------------------------------------------------------------------- Tokenisers


def make_tokenizers() -> None:
    """A sentencepiece model as T5's, the same as transformers saves it, ByT5's, and ids of each."""
    spiece, saved, bytes_ = (FOLDER / name for name in ("spiece", "tokenizer_json", "byt5"))
    spiece.mkdir()
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(" ".join(LICENSE.read_text().split()).split(". ")),
        model_writer=model,
        vocab_size=300,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        character_coverage=1.0,
        num_threads=1,
        minloglevel=2,
    )
    (spiece / "spiece.model").write_bytes(model.getvalue())
    transformers.T5Tokenizer.from_pretrained(spiece).save_pretrained(saved)
    transformers.ByT5Tokenizer().save_pretrained(bytes_)
    ids = {}
    for folder in (spiece, saved, bytes_):
        if folder == spiece:
            tokenizer = transformers.T5Tokenizer.from_pretrained(folder)
        else:
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        ids[folder.name] = {
            "size": len(tokenizer),
            "ids": [tokenizer(text).input_ids for text in TEXTS],
        }
    print("vocabulary sizes:", {name: entry["size"] for name, entry in ids.items()})
    text = json.dumps({"texts": TEXTS, **ids}, ensure_ascii=True)
    (FOLDER / "expected_ids.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
