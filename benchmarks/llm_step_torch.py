"""The other side of `llm_step.py`: a model of SmolLM2's sizes in torch, trained and run on request.

`llm_step.py` starts it in an environment with torch, transformers and peft.
"""

import json
import sys
import time

import peft
import report
import torch
import transformers


def serve(*, batch, threads, lengths, rate, rank, alpha):
    """Runs what is asked for, line by line, and answers with the seconds that it took."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    transformers.logging.set_verbosity_error()
    config = transformers.LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        max_position_embeddings=8192,
    )
    models, optimizers = {}, {}

    def model_of(kind):
        if kind not in models:
            model = transformers.LlamaForCausalLM(config)
            if kind == "lora":
                model = peft.get_peft_model(
                    model,
                    peft.LoraConfig(
                        r=rank,
                        lora_alpha=alpha,
                        task_type="CAUSAL_LM",
                        target_modules="all-linear",
                    ),
                )
            trained = [p for p in model.parameters() if p.requires_grad]
            models[kind] = model
            optimizers[kind] = torch.optim.AdamW(trained, lr=rate)
        return models[kind], optimizers[kind]

    rows = torch.randint(3, 49152, (batch, sum(lengths)))
    labels = rows.clone()
    labels[:, : lengths[0]] = -100

    def update(kind):
        model, optimizer = model_of(kind)
        model.train()
        model(input_ids=rows, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    @torch.inference_mode()
    def generate():
        model, _ = model_of("full")
        model.eval()
        settings = transformers.GenerationConfig(
            max_new_tokens=lengths[1], do_sample=False, pad_token_id=0, eos_token_id=None
        )
        prompts = rows[:, : lengths[0]]
        model.generate(
            input_ids=prompts,
            attention_mask=torch.ones_like(prompts),
            generation_config=settings,
        )

    versions = {name: report.version(name) for name in ("torch", "transformers", "peft")}
    print(json.dumps(versions), flush=True)
    for line in sys.stdin:
        kind = line.strip()
        began = time.perf_counter()
        generate() if kind == "generate" else update(kind)
        print(time.perf_counter() - began, flush=True)


if __name__ == "__main__":
    serve(**json.loads(sys.argv[1]))
