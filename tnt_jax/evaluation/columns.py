"""The columns of tables of arms: what each number is called, and how it is written.

The report page and the tables of a sweep have them alike, in this order.
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
      is_main: Whether it is among the numbers to look at first.
    """

    heading: str
    field: str
    form: str
    is_main: bool = False


NUMBERS = (
    Column("cut", "cut", ".1%", is_main=True),
    Column("BLEU", "bleu", ".1f", is_main=True),
    Column("BLEU to the mask", "bleu_to_mask", ".1f", is_main=True),
    Column("the mask's", "same_as_mask", ".1%", is_main=True),
    Column("ROUGE-L", "rouge_l", ".1f"),
    Column("unchanged", "exact_match", ".1%"),
    Column("of clean ones", "unchanged_clean", ".1%", is_main=True),
    Column("repeats", "repeated_word_rate", ".1%"),
    Column("phrases", "repeated_phrase_rate", ".1%", is_main=True),
    Column("unknown", "unknown_token_rate", ".1%"),
    Column("distinct", "distinct_ratio", ".1%"),
    Column("trigrams", "distinct_trigram_ratio", ".1%", is_main=True),
    Column("residual", "residual", ".4f", is_main=True),
    Column("collateral", "collateral", ".4f", is_main=True),
    Column("KL elsewhere", "collateral_elsewhere", ".4f", is_main=True),
    Column("KL unrelated", "unrelated_kl", ".4f", is_main=True),
    Column("unrelated unchanged", "unrelated_unchanged", ".1%"),
)


def known(columns: Iterable[Column], rows: Sequence[Mapping[str, Any]]) -> list[Column]:
    """Those of the columns that any of the rows has a number for."""
    return [c for c in columns if any(row.get(c.field) is not None for row in rows)]
