"""The README.md of a directory: what was done to a model, and what came of it."""

from collections.abc import Mapping
from typing import Any

from tnt_jax.checkpoints.hub_family import HubFamily

_PAPER = "[Targeted Negative Training](https://arxiv.org/abs/2406.13660)"
# How the names of its terms at marked tokens begin: divergences from the desired distribution.
_ITS_TERMS = ("forward_kl", "reverse_kl", "jensen_shannon")


def write(
    *,
    family: HubFamily,
    name: str,
    source: str,
    dtype: str,
    stored_dtype: str,
    quantisation: str | None,
    step: int,
    run: Mapping[str, Any] | None,
    evaluation: Mapping[str, Any] | None,
    has_tokenizer: bool,
) -> str:
    """The text of a model card.

    Args:
      family: What Hugging Face calls the network's settings and parameters.
      name: Name of the model.
      source: The checkpoint that it was written from.
      dtype: Dtypes of its weights, by name.
      stored_dtype: Dtypes of the weights in `source`, by name.
      quantisation: Quantised types of the weights in `source`; None where they are not quantised.
      step: Number of updates of training.
      run: What the training run noted; None says that nothing was trained here.
      evaluation: From `tnt_jax.evaluate`.
      has_tokenizer: Whether a tokenizer lies beside the weights.
    """
    original = ((run or {}).get("original") or {}).get("path")
    parts = [
        "---",
        "library_name: transformers",
        f"pipeline_tag: {family.pipeline_tag}",
        f"tags: [{', '.join([family.tag, 'tnt_jax', *_method(run)])}]",
        "---",
        f"# {name}",
        "",
    ]
    if run:
        parts += [*_trained(run, original, step), ""]
    else:
        change = "no weight was changed"
        if quantisation is not None:
            change = f"weights are stored as {dtype} instead of {quantisation}, otherwise unchanged"
        elif dtype != stored_dtype:
            change = f"weights are stored as {dtype} instead of {stored_dtype}, otherwise unchanged"
        parts += [f"Converted by tnt_jax from `{source}`; {change}.", ""]
    if evaluation:
        parts += [*numbers(evaluation), ""]
    parts += [
        "## Use",
        "",
        f"    from transformers import {family.auto_class}, AutoTokenizer",
        f'    model = {family.auto_class}.from_pretrained("{name}")',
    ]
    if has_tokenizer:
        parts += [f'    tokenizer = AutoTokenizer.from_pretrained("{name}")', ""]
    else:
        parts += ["", "There is no tokenizer here: take the one of the original model.", ""]
    parts += [f"The weights are {dtype}.", ""]
    return "\n".join(parts)


def write_of_adapters(
    *,
    family: HubFamily,
    name: str,
    base: str,
    is_on_hub: bool,
    is_loadable: bool,
    dtype: str,
    step: int,
    run: Mapping[str, Any],
    evaluation: Mapping[str, Any] | None,
) -> str:
    """The text of a card for adapters in PEFT's format.

    Args:
      family: What Hugging Face calls the network's settings and parameters.
      name: Name of the adapters.
      base: The model that they are loaded onto: a name on the hub or a directory.
      is_on_hub: Whether it is a name.
      is_loadable: Whether transformers reads what is there.
      dtype: Dtypes of their weights, by name.
      step: Number of updates of training.
      run: What the training run noted.
      evaluation: From `tnt_jax.evaluate`.
    """
    adapters, original = run["adapters"], run["original"]
    layers = adapters.get("layers")
    made = "" if is_loadable else f"--input={base} --output=BASE --output_format=huggingface"
    loaded = "BASE" if made else base
    parts = [
        "---",
        "library_name: peft",
        *([f"base_model: {base}"] if is_on_hub else []),
        f"pipeline_tag: {family.pipeline_tag}",
        f"tags: [{', '.join(['lora', family.tag, 'tnt_jax', *_method(run)])}]",
        "---",
        f"# {name}",
        "",
        f"Low-rank adapters of rank {adapters['rank']} and alpha {adapters['alpha']:g} for "
        f"`{base}`, which they are loaded onto."
        + (f" The last {layers} layers of its decoder have them." if layers else ""),
        "",
        *_trained(run, original["path"], step),
        "",
    ]
    if evaluation:
        parts += [*numbers(evaluation), ""]
    parts += [
        "## Use",
        "",
        "    from peft import PeftModel",
        f"    from transformers import {family.auto_class}, AutoTokenizer",
        *([f"    # BASE: python -m tnt_jax.convert {made}"] if made else []),
        f'    base = {family.auto_class}.from_pretrained("{loaded}")',
        f'    model = PeftModel.from_pretrained(base, "{name}")',
        f'    tokenizer = AutoTokenizer.from_pretrained("{loaded}")',
        "",
        f"The adapters are {dtype}. `model.merge_and_unload()` is a model without them that "
        "computes the same.",
        "",
    ]
    return "\n".join(parts)


def _method(run: Mapping[str, Any] | None) -> list[str]:
    """The tag of Targeted Negative Training, if a run was that and not one of its rivals."""
    objective, original = (((run or {}).get(name) or {}) for name in ("objective", "original"))
    is_targeted = str(objective.get("negative_term")).startswith(_ITS_TERMS)
    is_removed = objective.get("negative_strength", 1) == 1  # UNDIAL's marks are lowered
    return ["targeted-negative-training"] if original and is_targeted and is_removed else []


def _trained(run: Mapping[str, Any], original: str | None, step: int) -> list[str]:
    objective, data = run.get("objective") or {}, run.get("data") or {}
    how = "Trained by tnt_jax."
    if original:
        how = "Fine-tuned by tnt_jax from the original model that the table names."
    if _method(run):
        how = (
            f"Fine-tuned by tnt_jax with {_PAPER}: marked tokens are removed from the distribution "
            "of the original model, and as little else as possible is changed."
        )
    lines = [
        how,
        "",
        "| | |",
        "|---|---|",
    ]
    if original:
        digest = run["original"]["digest"]
        lines.append(f"| original | `{original}` (digest of its parameters {digest}) |")
        if quantisation := run["original"].get("quantisation"):
            lines.append(f"| its weights, which the patch keeps to | {quantisation}, dequantised |")
    settings = {
        "at marked tokens": objective.get("negative_term"),
        "elsewhere": objective.get("positive_term"),
        "weight of marked tokens (alpha)": objective.get("negative_weight"),
    }
    lines += [f"| {label} | {value} |" for label, value in settings.items() if value is not None]
    lines.append(f"| updates | {step} |")
    if data:
        count, digest = data.get("num_examples", "?"), data.get("digest", "?")
        lines.append(f"| data | {count} examples (digest {digest}) |")
    return lines


def numbers(evaluation: Mapping[str, Any]) -> list[str]:
    """The lines of the table of before and after; KeyError or TypeError where one is missing."""
    before, after = (evaluation[model]["unwanted_outputs"] for model in ("original", "current"))
    comparison, certificate = evaluation["comparison"], evaluation.get("certificate")

    def rate(of: Mapping[str, Any]) -> str:
        return f"{of['value']:.2%} ({of['numerator']} of {of['denominator']})"

    lines = [
        "## Before and after",
        "",
        f"Unwanted is what this annotator marks: `{evaluation['annotator']}`.",
        "",
        "| | original | this model |",
        "|---|---|---|",
        f"| outputs with something unwanted | {rate(before)} | {rate(after)} |",
        f"| cut | | {evaluation['cut']:.1%} |",
        f"| BLEU to the original's outputs | | {comparison['bleu']:.1f} |",
    ]
    kl = certificate["positive_collateral"] if certificate else None
    if kl is not None:
        lines.append(f"| KL to the original at unmarked tokens, nats | | {kl:.4f} |")
    return lines
