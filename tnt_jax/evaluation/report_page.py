"""The page of `tnt_jax.report`: data in, one HTML text out.

What is static is written by the template `page/report.html`; charts, lists and filters by
`page/report.js`, from data that lies in the page as JSON. Nothing is loaded: the plotting library
(BokehJS, from the bokeh package: the smallest that is kept and comes from PyPI with its JavaScript)
is a part of the page. Texts of models reach it escaped, or as text nodes; beyond that the page's
policy lets no script run but the two in it.
"""

import base64
import dataclasses
import hashlib
import importlib.resources
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

from tnt_jax import __version__
from tnt_jax.evaluation import changes, diagnosis, results, tables
from tnt_jax.evaluation.tables import Column

# Of each record in a file of tokens: the pieces of its text, and a value for each.
TOKEN_FIELDS = ("pieces", "kl", "residual", "collateral", "smallest_cost", "is_negative")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """The outputs of one arm with one decoder beside those of the original.

    Attributes:
      task: the task of this comparison's row; arm and decoder are the row's, too.
      arm: the row's objective.
      decoder: how the outputs were made.
      num_outputs: number of outputs of each model.
      annotator: the annotator that marked them.
      kinds: number of changes of each of `changes.KINDS`.
      signs: signs of failure.
      notes: sentences on what its numbers are of.
      outputs: (id, input, change) to show, the worst first; maybe not all.
      num_drawn: how many of these, the last ones, were drawn from those that are not the worst.
      all_outputs: the file that has all outputs, where the page does not.
      tokens: those of the original's outputs that changed most, as `tnt_jax.evaluate` writes them.
    """

    task: str
    arm: str
    decoder: str
    num_outputs: int
    annotator: str
    kinds: Mapping[str, int]
    signs: Sequence[diagnosis.Sign]
    notes: Sequence[str]
    outputs: Sequence[tuple[str, str, changes.Change]]
    num_drawn: int
    all_outputs: str
    tokens: Sequence[Mapping[str, Any]]


_WHOLE = ".0f"
_COLUMNS = (
    Column("alpha", "alpha", "g", short="g"),
    Column("rate", "rate", "g", short="g"),
    Column("steps", "steps", _WHOLE),
    Column("unwanted", "unwanted_rate_after", ".1%", short=".1%"),
    *tables.NUMBERS,
)


def write(
    *,
    title: str,
    rows: Sequence[results.Row],
    comparisons: Sequence[Comparison],
    files: Mapping[str, tuple[int, str]],
    settings: Mapping[str, str],
) -> str:
    """Returns the page as HTML.

    Args:
      title: the page's heading.
      rows: results to compare.
      comparisons: outputs to show.
      files: bytes and SHA-256 of each file that was read, by path.
      settings: texts of the settings, by the path that they come from.
    """
    groups = results.over_seeds(rows, results.SETTINGS)
    data = {
        "rows": [_point(row) for row in rows],
        "groups": [{**_point(row), "name": _name(row)} for row in groups],
        "columns": [["seed", "seed"], *([column.heading, column.field] for column in _COLUMNS)],
        "comparisons": [
            {
                "task": comparison.task,
                "arm": comparison.arm,
                "decoder": comparison.decoder,
                "num_outputs": comparison.num_outputs,
                "kinds": comparison.kinds,
                "num_drawn": comparison.num_drawn,
                "all_outputs": comparison.all_outputs,
            }
            for comparison in comparisons
        ],
        "kinds": changes.KINDS,
    }
    scripts = {"bokeh": _script(_bokeh()), "script": _script(_file("report.js"))}
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.policies["json.dumps_kwargs"] = {
        "ensure_ascii": False,
        "allow_nan": False,
        "separators": (",", ":"),
    }
    return environment.from_string(_file("report.html")).render(
        title=title,
        version=__version__,
        comparisons=[_shown_comparison(comparison, rows) for comparison in comparisons],
        table=_table(groups, [column for column in _COLUMNS if column.short]),
        further=_table(groups, [column for column in _COLUMNS if not column.short]),
        files=files,
        settings=settings,
        data=data,
        style=_file("report.css"),
        script_hashes=" ".join(_digest(text) for text in scripts.values()),
        **scripts,
    )


# ---------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------


def _point(row: results.Row) -> dict[str, Any]:
    return {**{name: row.get(name) for name in results.SHOWN}, "shown": _shown(row)}


def _name(row: results.Row) -> str:
    alpha = "" if row["alpha"] is None else f" {row['alpha']:g}"
    return row["objective"] + alpha + ("" if row["rate"] is None else f", rate x {row['rate']:g}")


def _shown(row: results.Row) -> dict[str, str]:
    """The numbers of a row as they are written, those that are known."""
    shown = tables.known([Column("seed", "seed", _WHOLE), *_COLUMNS], [row])
    return {column.field: format(row[column.field], column.form) for column in shown}


def _output(name: str, inputs: str, change: changes.Change) -> dict[str, Any]:
    return {
        "id": name,
        "input": inputs,
        "kind": change.kind,
        "share": round(change.share, 4),
        "signs": change.signs,
        "lengths": change.lengths,
        "original": change.original,
        "current": change.current,
    }


def _tokens(row: Mapping[str, Any]) -> dict[str, Any]:
    values = {name: row[name] for name in ("kl", "residual", "collateral", "smallest_cost")}
    is_negative = [int(bool(value)) for value in row["is_negative"]]
    return {"id": row["id"], "pieces": row["pieces"], "is_negative": is_negative, **values}


# ---------------------------------------------------------------------------------------------
# What the template shows
# ---------------------------------------------------------------------------------------------


def _shown_comparison(comparison: Comparison, rows: Sequence[results.Row]) -> dict[str, Any]:
    names = comparison.task, comparison.arm, comparison.decoder
    row = next(r for r in rows if (r["task"], r["objective"], r["decoder"]) == names)
    before, after = (
        round(row[f"unwanted_rate_{when}"] * comparison.num_outputs) for when in ("before", "after")
    )
    return {
        **{name: getattr(comparison, name) for name in ("task", "arm", "decoder", "num_outputs")},
        **{"before": before, "after": after, "cut": row["cut"], "bleu": row["bleu"]},
        "unchanged": comparison.kinds["unchanged"],
        "newly_unwanted": comparison.kinds["newly unwanted"],
        "annotator": comparison.annotator or "an annotator without a name",
        "notes": comparison.notes,
        "signs": sorted(comparison.signs, key=lambda sign: not sign.is_seen),
        "outputs": [_output(*output) for output in comparison.outputs],
        "tokens": [_tokens(row) for row in comparison.tokens],
    }


def _table(groups: Sequence[results.Row], among: Sequence[Column]) -> dict[str, Any]:
    """Headings, and lines of cells; before the lines of each task and decoder, the original's."""
    columns = tables.known(among, groups)
    has_seeds = any(group["num_seeds"] > 1 for group in groups)
    # Where all are on the frontier, none is better than anybody.
    has_worse = {_place(g) for g in groups if not g.get("is_pareto", True)}

    def line(
        group: results.Row, name: str, num_seeds: str, shown: Mapping[str, str], is_best: bool
    ) -> dict[str, Any]:
        cells = [num_seeds] if has_seeds else []
        cells += [shown.get(column.field, "") for column in columns]
        task, decoder = _place(group)
        return {
            "task": task, "decoder": decoder, "name": name, "cells": cells, "is_best": is_best
        }  # fmt: skip

    lines, told = [], set()
    for group in groups:
        if _place(group) not in told:
            told.add(_place(group))
            before = _shown(tables.of_original(group))
            lines.append(line(group, "original", "", before, is_best=False))
        is_best = group.get("is_pareto", False) and _place(group) in has_worse
        number = str(group["num_seeds"])
        lines.append(line(group, group["objective"], number, _shown(group), is_best))
    headings = ["", *(["seeds"] if has_seeds else []), *(c.heading for c in columns)]
    return {"headings": headings, "lines": lines, "has_numbers": bool(columns)}


def _place(row: results.Row) -> tuple[str, str]:
    return row["task"], row["decoder"]


# ---------------------------------------------------------------------------------------------
# Files of the page
# ---------------------------------------------------------------------------------------------


def _file(name: str) -> str:
    folder = importlib.resources.files("tnt_jax.evaluation") / "page"
    return (folder / name).read_text("utf-8")


def _bokeh() -> str:
    from bokeh.resources import Resources  # half a second, which only this page pays

    resources = Resources(mode="inline", components=["bokeh", "bokeh-api"], log_level="warn")
    return "\n".join(resources.js_raw)


def _script(text: str) -> str:
    """Escapes a text so that it can stand in a script element."""
    return text.replace("</script", "<\\/script").replace("<!--", "<\\!--")


def _digest(script: str) -> str:
    digest = hashlib.sha256(script.encode("utf-8")).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
