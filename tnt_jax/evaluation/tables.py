"""Tables of arms: what each number is called, how it is written, and the tables of a sweep.

The report page, and what `pipeline` prints, have the same columns in the same order.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Column:
    """One number of every arm.

    Attributes:
      heading: What stands above it.
      field: Its field in a `results.Row`.
      form: How it is written, as `format` reads it.
      short: The same in few digits, of the numbers to look at first; "" of the others.
    """

    heading: str
    field: str
    form: str
    short: str = ""


# What outputs say.
OF_TEXTS = (
    Column("cut", "cut", ".1%", short=".1%"),
    Column("BLEU", "bleu", ".1f", short=".1f"),
    Column("BLEU to the mask", "bleu_to_mask", ".1f", short=".1f"),
    Column("the mask's", "same_as_mask", ".1%", short=".1%"),
    Column("ROUGE-L", "rouge_l", ".1f"),
    Column("unchanged", "exact_match", ".1%"),
    Column("of clean ones", "unchanged_clean", ".1%", short=".0%"),
    Column("repeats", "repeated_word_rate", ".1%"),
    Column("phrases", "repeated_phrase_rate", ".1%", short=".1%"),
    Column("unknown", "unknown_token_rate", ".1%"),
    Column("distinct", "distinct_ratio", ".1%"),
    Column("trigrams", "distinct_trigram_ratio", ".1%", short=".1%"),
)
# What needs both models, in nats a token; and what is of prompts of other tasks.
OF_MODELS = (
    Column("residual", "residual", ".4f", short=".3f"),
    Column("collateral", "collateral", ".4f", short=".3f"),
    Column("KL elsewhere", "collateral_elsewhere", ".4f", short=".3f"),
    Column("KL unrelated", "unrelated_kl", ".4f", short=".3f"),
    Column("unrelated unchanged", "unrelated_unchanged", ".1%"),
)
NUMBERS = (*OF_TEXTS, *OF_MODELS)
MAIN = tuple(column for column in NUMBERS if column.short)


def known(columns: Iterable[Column], rows: Sequence[Mapping[str, Any]]) -> list[Column]:
    """Those of the columns that any of the rows has a number for."""
    return [c for c in columns if any(row.get(c.field) is not None for row in rows)]


def of_original(row: Mapping[str, Any]) -> dict[str, Any]:
    """The original's numbers, which the row of any of its arms has; named as an arm's own are."""
    found = {column.field: row.get(f"{column.field}_before") for column in NUMBERS}
    found["unwanted_rate_after"] = row["unwanted_rate_before"]
    # What is left where nothing was done: all of it is residual, if no mark is graded.
    if not row.get("num_graded"):
        found["residual"] = row.get("smallest_cost")
    return found


def as_markdown(
    chosen: Iterable[Mapping[str, Any]], decoders: Iterable[str], *, in_full: bool
) -> str:
    """The arms of a sweep at what was chosen for them, a table for each decoder.

    They stand in the order of BLEU to the mask's outputs, which is what a perfect update would say;
    where there is no mask, in that of BLEU to the original's.

    Args:
      chosen: "chosen" of a sweep's results.
      decoders: whose tables are wanted.
      in_full: all columns, with 95 % intervals of cut and BLEU; else the main ones in few digits,
        with the cut's interval, and deviations over seeds of cut and BLEU (to both) alone.
    """
    chosen = list(chosen)
    of_decoders = {name: [row for row in chosen if row["decoder"] == name] for name in decoders}
    return "\n".join(
        _heading(name, rows[0]) + "\n\n" + _table(rows, in_full) + "\n"
        for name, rows in of_decoders.items()
        if rows
    )


def _heading(decoder: str, row: Mapping[str, Any]) -> str:
    phrases = row.get("repeated_phrase_rate_before")
    trigrams = row.get("distinct_trigram_ratio_before")
    return (
        f"{decoder}: {row['num_outputs']} prompts, of which the original answers "
        f"{row['unwanted_rate_before']:.1%} with something unwanted; "
        f"{row['repeated_word_rate_before']:.1%} repeat a word, "
        + ("" if phrases is None else f"{phrases:.1%} a phrase, ")
        + f"{row['distinct_ratio_before']:.1%} are distinct"
        + ("" if trigrams is None else f"; {trigrams:.1%} of the trigrams are distinct")
    )


def _table(rows: Sequence[Mapping[str, Any]], in_full: bool) -> str:
    columns = known(NUMBERS if in_full else MAIN, rows)
    with_interval = ("cut", "bleu") if in_full else ("cut",)
    has_rates = any(row.get("rate") is not None for row in rows)
    has_seeds = in_full or any(row["num_seeds"] > 1 for row in rows)
    headings = ["arm", "alpha", *(["rate"] if has_rates else []), *(["seeds"] if has_seeds else [])]
    alignments = ["---", *["---:"] * (len(headings) - 1)]
    for column in columns:
        has_interval = column.field in with_interval
        headings += [column.heading, "95 %"] if has_interval else [column.heading]
        alignments += ["---:", "---"] if has_interval else ["---:"]
    has_p_values = in_full and any(row.get("bleu_p_value") is not None for row in rows)
    headings += [*(["p"] if has_p_values else []), *(["frontier"] if in_full else [])]
    alignments += [*(["---:"] if has_p_values else []), *(["---"] if in_full else [])]
    lines = [f"| {' | '.join(headings)} |", f"|{'|'.join(alignments)}|"]
    for row in sorted(rows, key=_nearness, reverse=True):
        cells = [
            row["objective"],
            "-" if row["alpha"] is None else f"{row['alpha']:g}",
            *([f"{row['rate'] or 1:g}" if row["alpha"] is not None else "-"] if has_rates else []),
            *([str(row["num_seeds"])] if has_seeds else []),
        ]
        for column in columns:
            cells.append(_with_spread(row, column, in_full))
            if column.field in with_interval:
                interval = row.get(f"{column.field}_interval")
                form = column.form if in_full else ".0%"
                cells.append(" to ".join(written(x, form) for x in interval) if interval else "-")
        if has_p_values:
            cells.append("-" if row.get("bleu_p_value") is None else f"{row['bleu_p_value']:.3f}")
        if in_full:
            cells.append("yes" if row.get("is_pareto") else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _nearness(row: Mapping[str, Any]) -> tuple[float, float]:
    to_mask = row.get("bleu_to_mask")
    return (-1.0 if to_mask is None else to_mask, row["bleu"])


def _with_spread(row: Mapping[str, Any], column: Column, in_full: bool) -> str:
    """A number, with the standard deviation over seeds if there are several."""
    value, spread = row.get(column.field), row.get(f"{column.field}_sd")
    if value is None:
        return "-"
    form = column.form if in_full else column.short
    has_spread = spread is not None and (in_full or column.field in ("cut", "bleu", "bleu_to_mask"))
    return written(value, form) + (f" ±{format(spread, form)}" if has_spread else "")


def written(value: float, form: str) -> str:
    """A number in the form of its column."""
    return format(value, f"z{form}")  # no "-0%"
