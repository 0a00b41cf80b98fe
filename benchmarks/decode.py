r"""Tokens per second of greedy decoding, against transformers, and of tnt_jax.generate as a whole.

    taskset -c 0 python benchmarks/decode.py

The first table decodes 64 tokens for 8 prompts with T5 1.1 small in float32 and random weights, by
us and by transformers' `generate` from a directory that we write. Both have the same weights, so
the tokens must be the same. Without torch and transformers, that line is left out.

The second table is of a whole run of `tnt_jax.generate`: prompts are read, tokenised, decoded,
turned into text and written. Their lengths are those of chitchat's messages. "first" compiles.

Takes about 10 minutes of one core and 2 GB of memory (estimated, not measured).
"""

import argparse
import json
import os
import pathlib
import random
import tempfile
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import jax
import numpy as np
import report
from etils import epath

from tnt_jax import generate
from tnt_jax.checkpoints import huggingface, lazy_arrays, pretrained
from tnt_jax.data import records
from tnt_jax.models import decoding, sharding, t5
from tnt_jax.tokenizers import tokenization

VOCAB_SIZE = 32128
LAST_ID = VOCAB_SIZE - 1  # stands for the end, so that no row ends early
BATCH_SIZE, SOURCE_LENGTH, NUM_TOKENS = 8, 64, 64
LOG_MEDIAN, LOG_DEVIATION = 2.92, 0.76  # of chitchat's messages, see packing.py
NUM_WORDS = 400
LETTERS = "abdefgiklmnoprstu"


def small(vocab_size):
    """T5 1.1 small."""
    return t5.T5Config(
        vocab_size=vocab_size,
        emb_dim=512,
        num_heads=6,
        num_encoder_layers=8,
        num_decoder_layers=8,
        head_dim=64,
        mlp_dim=1024,
        mlp_activations=("gelu", "linear"),
        logits_via_embedding=False,
    )


def write_model(folder, config):
    """Random weights as a Hugging Face directory; returns them."""
    params = jax.jit(t5.T5(config).init)(jax.random.key(0))
    weights = {
        sharding.path_name(path): lazy_arrays.of_array(np.asarray(leaf), "random")
        for path, leaf in jax.tree.leaves_with_path(params)
    }
    huggingface.write_weights(epath.Path(folder), weights, config)
    settings = huggingface.new_config(config) | {"dtype": "float32"}
    (pathlib.Path(folder) / "config.json").write_text(json.dumps(settings))
    return params


def transformers_generate(folder, tokens):
    """The same decoding by transformers, as a function that returns its tokens; None without it."""
    try:
        import torch
        import transformers
    except ImportError:
        return None
    torch.set_num_threads(report.num_cores())
    transformers.logging.set_verbosity_error()
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float32).eval()
    inputs = torch.tensor(tokens, dtype=torch.long)
    settings = transformers.GenerationConfig(
        decoder_start_token_id=0,
        eos_token_id=LAST_ID,
        pad_token_id=0,
        do_sample=False,
        num_beams=1,
        max_new_tokens=NUM_TOKENS,
        suppress_tokens=[0],  # as tnt_jax.models.decoding
    )

    @torch.inference_mode()
    def run():
        mask = (inputs > 0).long()
        found = model.generate(input_ids=inputs, attention_mask=mask, generation_config=settings)
        return found[:, 1:].numpy()

    return run


def compare(rounds):
    """Rows of the first table, and whether the tokens are the same."""
    config = small(VOCAB_SIZE)
    rng = np.random.default_rng(0)
    tokens = rng.integers(2, LAST_ID, (BATCH_SIZE, SOURCE_LENGTH)).astype(np.int32)
    settings = decoding.Decoding(max_length=NUM_TOKENS, end_ids=(LAST_ID,), banned_ids=(0,))
    with tempfile.TemporaryDirectory() as folder:
        params = write_model(folder, config)
        theirs = transformers_generate(folder, tokens)

    lengths = np.full(BATCH_SIZE, SOURCE_LENGTH)

    def ours():
        return decoding.decode(params, tokens, lengths, config=config, decoding=settings).tokens

    runs = {"tnt_jax": ours}
    if theirs is not None:
        runs["transformers"] = theirs
    times = report.interleave(runs, rounds)
    rows = [
        (
            name,
            BATCH_SIZE * NUM_TOKENS / report.median(times[name]),
            report.ratio(times["transformers"], of) if theirs and name == "tnt_jax" else None,
        )
        for name, of in times.items()
    ]
    return rows, None if theirs is None else bool((np.asarray(ours()) == theirs()).all())


def whole_runs(num_prompts, batch_size):
    """Rows of the second table."""
    random.seed(0)
    words = sorted({"".join(random.choices(LETTERS, k=6)) for _ in range(NUM_WORDS)})
    rng = np.random.default_rng(0)
    lengths = np.exp(rng.normal(LOG_MEDIAN, LOG_DEVIATION, num_prompts)).astype(int) + 1
    texts = [" ".join(rng.choice(words, length)) for length in lengths]
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        model, prompts = folder / "model", folder / "prompts.jsonl"
        model.mkdir()
        tokenization.train_sentencepiece(
            [*texts, " ".join(LETTERS)],
            folder / "words.model",
            vocab_size=3 + len(words) + len(LETTERS) + 1,
            user_defined_symbols=[f"\u2581{word}" for word in words],
        )
        vocabulary = pretrained.vocabulary(str(folder / "words.model"), extra_ids=0)
        config = small(vocabulary.size)
        write_model(model, config)
        rows = [records.Record(id=str(n), inputs=text) for n, text in enumerate(texts)]
        records.write_records(prompts, rows)
        for what in ("first", "again"):
            began = time.perf_counter()
            generate.generate(
                output=str(folder / "outputs.jsonl"),
                prompts=str(prompts),
                checkpoint_path=str(model),
                model=config,
                vocabulary=vocabulary,
                decoder=decoding.Decoding(max_length=NUM_TOKENS),
                task_feature_lengths={"inputs": 512},
                batch_size=batch_size,
            )
            seconds = time.perf_counter() - began
            outputs = records.read_records(folder / "outputs.jsonl")
            num_tokens = sum(len(row.target_ids) for row in outputs)
            yield what, num_prompts, seconds, num_prompts / seconds, num_tokens / seconds


def main():
    """Prints both tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--prompts", type=int, default=1024)
    parser.add_argument("--batch_size", type=int, default=64, help="of the second table")
    flags = parser.parse_args()
    packages = (*report.PACKAGES, "torch", "transformers")
    report.heading(packages)
    rows, are_same = compare(flags.rounds)
    report.table(("greedy, 8 x 64 tokens", "tokens/s", "times transformers"), rows)
    if are_same is None:
        print("\ntransformers is left out: torch and transformers are not installed here.\n")
    else:
        print(f"\nThe tokens are {'the same' if are_same else 'NOT the same'}.\n")
    whole = list(whole_runs(flags.prompts, flags.batch_size))
    print()
    columns = ("file to file", "prompts", "seconds", "outputs/s", "tokens/s")
    report.table(columns, whole)


if __name__ == "__main__":
    main()
