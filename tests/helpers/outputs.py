"""Made-up outputs of an original and a patched model, as the programs leave them, for the report.

    inputs "small acorn"    targets "the acorn room is small and dirty."

Every tenth output of the original is unwanted; the patched model mends most, spoils some, and
changes words in others. `HOSTILE` is a record whose texts try to break out of a page.
"""

import json
import random
import re

from tnt_jax.data import records

HOSTILE = records.Record(
    id="<script>alert('id')</script>",
    inputs="</script><script>document.title = 'broken'</script><!-- <script> &lt;b&gt;",
    targets="</script><img src=x onerror=\"document.title = 'broken'\"> \u2028 &amp; dirty",
    negative_spans=(),
    annotator="</textarea><b>bold</b>",
)
UNWANTED = re.compile(r"\b(dirty|noisy)\b")
_NAMES = ("acorn", "birch", "cedar", "daisy", "elder", "fern", "grape", "hazel", "iris", "jade")
_STATES = ("clean", "quiet", "bright", "warm", "cosy")


def annotated(row):
    spans = tuple(match.span() for match in UNWANTED.finditer(row["targets"]))
    return records.Record(**row, negative_spans=spans, annotator=HOSTILE.annotator)


def pair(number, is_sampled=False):
    """Record `number` of both models."""
    chance = random.Random(f"{number} {is_sampled}")
    name, state = chance.choice(_NAMES), chance.choice(_STATES)
    bad = chance.choice(("dirty", "noisy"))
    inputs = f"room {number} {name} {'a long description of it ' * 4}"
    text = f"the {name} room is number {number} on the floor and it is very {{}}."
    before = text.format(bad if number % 10 == 0 else state)
    after = text.format(state)
    if number % 60 == 0:
        after = text.format(bad)
    elif number % 97 == 0:
        after = text.format("noisy")
    elif number % 31 == 0:
        after = text.format(f"very {state} ⁇")
    elif number % 7 == 0:
        after = f"room {number}, the {name}, is {state} and has a view."
    return tuple(
        annotated({"id": f"room-{number}", "inputs": inputs, "targets": targets})
        for targets in (before, after)
    )


def tokens_of(record):
    """A line of TOKENS_OUTPUT: words as pieces, and the end."""
    pieces = re.findall(r"\s*\S+", record.targets)
    chance = random.Random(record.id)
    place, is_negative = 0, []
    for piece in pieces:
        end = place + len(piece)
        is_negative.append(any(s < end and place < e for s, e in record.negative_spans))
        place = end
    pieces, is_negative = [*pieces, ""], [*is_negative, False]
    collateral = [round(chance.expovariate(5) ** 2, 4) for _ in pieces]
    residual = [0.031 if negative else 0.0 for negative in is_negative]
    return {
        "id": record.id,
        "pieces": pieces,
        "kl": [r + c for r, c in zip(residual, collateral, strict=True)],
        "residual": residual,
        "collateral": collateral,
        "smallest_cost": [1.7 if negative else 0.0 for negative in is_negative],
        "is_negative": is_negative,
    }


def write_pair(folder, number, *, is_sampled=False, num_tokens=30):
    """Writes original.jsonl, patched.jsonl and tokens.jsonl, the hostile record among them."""
    folder.mkdir(parents=True, exist_ok=True)
    pairs = [pair(i, is_sampled) for i in range(1, number)]
    after = records.Record(
        **{
            **vars(HOSTILE),
            "targets": HOSTILE.targets + " dirty",
            "negative_spans": ((0, 9), (len(HOSTILE.targets) - 5, len(HOSTILE.targets) + 6)),
        }
    )
    pairs.append((HOSTILE, after))
    for name, side in (("original", 0), ("patched", 1)):
        records.write_records(folder / f"{name}.jsonl", [both[side] for both in pairs])
    lines = [json.dumps(tokens_of(before), ensure_ascii=False) for before, _ in pairs[-num_tokens:]]
    (folder / "tokens.jsonl").write_text("\n".join(lines) + "\n")


def results():
    """Results of a sweep: two tasks, two decoders, three objectives, weights and seeds."""
    rows = []
    for task in ("rooms", "chat"):
        for decoder in ("greedy", "sampled"):
            for objective, keeps in (("TNRF", 30), ("UL+LL", 45), ("<b>NL</b>", 60)):
                for alpha in (0.5, 1, 2, 4):
                    for seed in (0, 1):
                        cut = 1 - 0.5 / (1 + alpha) ** 1.5 - 0.02 * seed
                        rows.append(
                            {
                                "task": task,
                                "objective": objective,
                                "alpha": alpha,
                                "seed": seed,
                                "steps": 240,
                                "decoder": decoder,
                                "unwanted_rate_before": 0.1,
                                "unwanted_rate_after": 0.1 * (1 - cut),
                                "bleu": 100 - keeps * cut**2 - 5 * (decoder == "sampled"),
                                "rouge_l": 100 - keeps * cut**2 / 2,
                                "repeated_word_rate": keeps * alpha / 2000,
                            }
                            | (
                                {"residual": 0.3 / alpha, "collateral": 0.02 * alpha}
                                if objective == "TNRF"
                                else {}
                            )
                        )
    return {"rows": rows}


def evaluation(number):
    """An evaluation of `number` outputs, as far as the report reads it."""
    found = {
        of: {
            "unwanted_outputs": {"numerator": n, "denominator": number, "value": n / number},
            "repeated_word": {"numerator": 0, "denominator": number, "value": 0.0},
            "repeated_phrase": {"numerator": 3, "denominator": number, "value": 3 / number},
            "distinct_trigrams": {"numerator": 300, "denominator": 600, "value": 0.5},
            "unknown_token": {"numerator": 0, "denominator": number, "value": 0.0},
            "distinct_outputs": {"numerator": 60, "denominator": number, "value": 1.0},
            "mean_length": 14.0,
        }
        for of, n in (("original", 5), ("current", 1), ("mask", 0))
    }
    to_mask = {"value": 0.25, "numerator": 1, "denominator": 4}
    return found | {
        "comparison": {
            "bleu": 81.5,
            "rouge_l": 90.0,
            "exact_match": {"value": 0.75, "numerator": 3, "denominator": 4},
            "unchanged_clean": {"value": 0.875, "numerator": 7, "denominator": 8},
        },
        "mask": {
            **found["mask"],
            "comparison": {"bleu": 85.0, "rouge_l": 92.0, "exact_match": to_mask},
            "to_current": {"bleu": 61.5, "rouge_l": 70.0, "exact_match": to_mask},
        },
        "cut": 0.8,
        "certificate": {
            "negative_residual": 0.25,
            "negative_collateral": None,  # as what is not finite is written
            "negative_smallest_cost": 1.5,
            "positive_collateral": 0.125,
        },
    }
