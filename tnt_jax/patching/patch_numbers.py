"""What is shown of a patch: its numbers, a table, a few outputs, how it is loaded."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from tnt_jax.data import records
from tnt_jax.evaluation import changes
from tnt_jax.evaluation.evaluations import Evaluation
from tnt_jax.patching.choices import Choice

_NUM_EXAMPLES = 5


def with_marks(row: records.Record) -> str:
    """The targets on one line, with what is unwanted in brackets."""
    text, place = [], 0
    for start, end in row.offsets:
        text += [row.targets[place:start], "[[", row.targets[start:end], "]]"]
        place = end
    return " ".join("".join([*text, row.targets[place:]]).split())


def as_json(choice: Choice) -> dict[str, Any]:
    """A choice, as `patch.json` has it."""
    return {
        "what": choice.what,
        "value": choice.value,
        "reason": choice.reason,
        "flag": choice.flag,
    }


def numbers(evaluation: Evaluation, cut_interval: Sequence[float] | None) -> dict[str, Any]:
    """What `patch.json` says of the outputs of one decoder.

    Args:
      evaluation: What `evaluate` wrote about them.
      cut_interval: The 95 % interval of their cut; None if one prompt alone was asked.

    Returns:
      Shares from 0 to 1, BLEU from 0 to 100, KL in nats per token.
    """
    before, after, comparison = evaluation.original, evaluation.current, evaluation.comparison
    clean, certificate = comparison.unchanged_clean, evaluation.certificate
    return {
        "num_prompts": before.unwanted_outputs.denominator,
        "unwanted_before": before.unwanted_outputs.value,
        "unwanted_after": after.unwanted_outputs.value,
        "cut": evaluation.cut,
        "cut_interval": None if cut_interval is None else list(cut_interval),
        "bleu": comparison.bleu,
        "unchanged": comparison.exact_match.value,
        "unchanged_clean": None if clean is None else clean.value,
        "kl_elsewhere": None if certificate is None else certificate.positive_collateral,
        "repeated_phrase_before": before.repeated_phrase.value,
        "repeated_phrase_after": after.repeated_phrase.value,
    }


def deciding(by_decoder: Mapping[str, Mapping[str, Any]]) -> str | None:
    """The decoder with the least cut; None if no outputs of the original were unwanted.

    Args:
      by_decoder: What `numbers` returns for each decoder, by the decoder's name.
    """
    # Where nothing was unwanted a cut of 0 says nothing.
    cuts = {name: of["cut"] for name, of in by_decoder.items() if of["unwanted_before"]}
    return min(cuts, key=lambda name: cuts[name], default=None)


def verdict(by_decoder: Mapping[str, Mapping[str, Any]], wish: float) -> tuple[str, bool]:
    """What became of the wish on the prompts that nothing was chosen by.

    Args:
      by_decoder: What `numbers` returns for each decoder, by the decoder's name; see `deciding`.
      wish: Share of the unwanted outputs that shall be gone.

    Returns:
      A sentence, and whether less is gone than was wished for.
    """
    worst = deciding(by_decoder)
    if worst is None:
        return (
            "There is no cut to tell: the original says nothing unwanted on the report prompts. "
            "Give more --prompts or --eval_prompts, and another --output.",
            False,
        )
    cut = by_decoder[worst]["cut"]
    is_short = cut < wish
    interval = _interval(by_decoder[worst], ".0%")
    which = f"unwanted {worst} outputs" if len(by_decoder) > 1 else "unwanted outputs"
    return (
        f"{'Not the whole wish' if is_short else 'The wish is fulfilled'}: {cut:.1%} of "
        f"the {which} are gone{f' (95 %: {interval})' if interval else ''}, asked for "
        f"{100 * wish:.4g}%.",
        is_short,
    )


def _interval(numbers: Mapping[str, Any], form: str) -> str:
    """The interval of a cut as a text; "" where there is none."""
    interval = numbers["cut_interval"]
    return "" if interval is None else " to ".join(format(x, form) for x in interval)


def rows(numbers: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """The table of one decoder: what, the original's, the patched model's."""
    interval = _interval(numbers, ".1%")
    cut = f"{numbers['cut']:.1%}" + (f" ({interval})" if interval else "")
    cut = cut if numbers["unwanted_before"] else "-"
    clean, kl = numbers["unchanged_clean"], numbers["kl_elsewhere"]
    return [
        (
            "unwanted outputs",
            f"{numbers['unwanted_before']:.1%}",
            f"{numbers['unwanted_after']:.1%}",
        ),
        ("cut, and its 95 % interval", "", cut),
        ("BLEU to the original's outputs", "", f"{numbers['bleu']:.1f}"),
        ("unchanged outputs", "", f"{numbers['unchanged']:.1%}"),
        ("unchanged among clean ones", "", "-" if clean is None else f"{clean:.1%}"),
        ("KL to the original elsewhere, nats a token", "", "-" if kl is None else f"{kl:.4f}"),
        (
            "outputs that repeat a phrase",
            f"{numbers['repeated_phrase_before']:.1%}",
            f"{numbers['repeated_phrase_after']:.1%}",
        ),
    ]


def examples(
    before: Sequence[records.Record], after: Sequence[records.Record]
) -> list[Mapping[str, str]]:
    """The worst change, and the first ones that were mended."""
    found = [changes.change(*pair) for pair in zip(before, after, strict=True)]
    worst_first = [i for i in changes.worst_first(found) if found[i].kind != "unchanged"]
    mended = [i for i, change in enumerate(found) if change.kind == "mended"]
    others = [i for i in (*mended, *worst_first) if i not in worst_first[:1]]
    places = dict.fromkeys([*worst_first[:1], *others])
    return [
        {
            "prompt": " ".join(before[i].inputs.split()),
            "original": with_marks(before[i]),
            "patched": with_marks(after[i]),
            "change": ("the worst one: " if i in worst_first[:1] else "") + found[i].kind,
        }
        for i in list(places)[:_NUM_EXAMPLES]
    ]


def lines_that_load(model: str, is_decoder_only: bool, output_format: str) -> list[str]:
    """The lines with which its owner's library loads the patched model."""
    kind = "CausalLM" if is_decoder_only else "Seq2SeqLM"
    folder = pathlib.Path(model)
    if (folder / "adapter_config.json").exists():
        name = f"AutoPeftModelFor{kind}"
        return [f"from peft import {name}", f"model = {name}.from_pretrained({model!r})"]
    if (folder / "config.json").exists():
        name = f"AutoModelFor{kind}"
        return [
            f"from transformers import {name}, AutoTokenizer",
            f"model, tokenizer = [c.from_pretrained({model!r}) for c in ({name}, AutoTokenizer)]",
        ]
    if output_format in ("t5x", "same") and folder.name in ("t5x", "t5x_orbax"):
        return ["# in T5X's gin file", f'utils.RestoreCheckpointConfig.path = "{model}"']
    return [
        "from tnt_jax.checkpoints import pretrained",
        f"model = pretrained.open_checkpoint({model!r})",
    ]
