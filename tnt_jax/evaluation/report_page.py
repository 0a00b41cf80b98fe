"""The page of `tnt_jax.report`: data in, one HTML text out.

What is static is written here; charts, lists and filters are `page/report.js`, on data
that lies in the page as JSON. Nothing is loaded: the plotting library (BokehJS, from the bokeh
package: the smallest that is kept and comes from PyPI with its JavaScript) is a part of the page.
Texts of models reach it escaped, or as text nodes; beyond that the page's policy lets no script run
but the two in it.
"""

import base64
import dataclasses
import hashlib
import html
import importlib.resources
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tnt_jax import __version__
from tnt_jax.evaluation import changes, diagnosis, report_rows

# Of each record in a file of tokens: the pieces of its text, and a value for each.
TOKEN_FIELDS = ("pieces", "kl", "residual", "collateral", "smallest_cost", "is_negative")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """The outputs of one arm with one decoder beside those of the original.

    Attributes:
      task: As in the `report_rows.Row` of this comparison; so are the next two.
      arm: Its objective.
      decoder: How the outputs were made.
      num_outputs: Of each model.
      annotator: That marked them.
      kinds: How many changes are of each of `changes.KINDS`.
      signs: Of failure.
      outputs: (id, input, change) to show, the worst first; maybe not all.
      tokens: Of the original's outputs that changed most, as `tnt_jax.evaluate` writes them.
    """

    task: str
    arm: str
    decoder: str
    num_outputs: int
    annotator: str
    kinds: Mapping[str, int]
    signs: Sequence[diagnosis.Sign]
    outputs: Sequence[tuple[str, str, changes.Change]]
    tokens: Sequence[Mapping[str, Any]]


# The columns of the table: heading, field of `report_rows.Row`, how it is written.
_PERCENT, _NUMBER, _NATS = "{:.1%}", "{:.1f}", "{:.3f}"
_COLUMNS = (
    ("alpha", "alpha", "{:g}"),
    ("steps", "steps", "{:g}"),
    ("unwanted", "unwanted_rate_after", _PERCENT),
    ("cut", "cut", _PERCENT),
    ("BLEU", "bleu", _NUMBER),
    ("ROUGE\N{NON-BREAKING HYPHEN}L", "rouge_l", _NUMBER),
    ("unchanged", "exact_match", _PERCENT),
    ("repeated word", "repeated_word_rate", _PERCENT),
    ("unknown token", "unknown_token_rate", _PERCENT),
    ("distinct", "distinct_ratio", _PERCENT),
    ("residual", "residual", _NATS),
    ("collateral", "collateral", _NATS),
    ("KL elsewhere", "collateral_elsewhere", _NATS),
)


def write(
    *,
    title: str,
    rows: Sequence[report_rows.Row],
    comparisons: Sequence[Comparison],
    files: Mapping[str, tuple[int, str]],
    settings: Mapping[str, str],
) -> str:
    """The text of the page.

    Args:
      title: Its heading.
      rows: Results to compare.
      comparisons: Outputs to show.
      files: Bytes and SHA-256 of what was read, by path.
      settings: Texts of what was set, by the path that they come from.
    """
    groups = report_rows.groups(rows)
    data = {
        "rows": [_point(row) for row in rows],
        "groups": [_bar(group) for group in groups],
        "columns": [["seed", "seed"], *([heading, field] for heading, field, _ in _COLUMNS)],
        "comparisons": [
            {
                "task": comparison.task,
                "arm": comparison.arm,
                "decoder": comparison.decoder,
                "num_outputs": comparison.num_outputs,
                "kinds": comparison.kinds,
            }
            for comparison in comparisons
        ],
        "kinds": changes.KINDS,
    }
    islands = [_island("data", data)]
    for number, comparison in enumerate(comparisons):
        islands.append(_island(f"outputs-{number}", [_output(*o) for o in comparison.outputs]))
        islands.append(_island(f"tokens-{number}", [_tokens(row) for row in comparison.tokens]))
    parts = {
        "title": html.escape(title),
        "version": html.escape(__version__),
        "verdicts": "".join(_verdict(c, rows) for c in comparisons),
        "table": _table(groups),
        "signs": "".join(_signs(number, c.signs) for number, c in enumerate(comparisons)),
        "files": _files(files),
        "settings": _settings(settings),
        "islands": "\n".join(islands),
        "style": _file("report.css"),
        "bokeh": _script(_bokeh()),
        "script": _script(_file("report.js")),
    }
    parts["script_hashes"] = " ".join(_digest(parts[name]) for name in ("bokeh", "script"))
    page = _file("report.html")
    # In one pass: what a part holds is not looked at again.
    pieces = page.split("%%")
    return "".join(parts[piece] if i % 2 else piece for i, piece in enumerate(pieces))


# ---------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------


def _island(name: str, value: Any) -> str:
    """JSON that the page reads; no text in it can end the element."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    text = text.replace("<", "\\u003c")
    return f'<script type="application/json" id="{name}">{text}</script>'


def _point(row: report_rows.Row) -> dict[str, Any]:
    return {**dataclasses.asdict(row), "cut": row.cut, "shown": _shown(row)}


def _bar(group: report_rows.Group) -> dict[str, Any]:
    return {**_point(group.mean), "name": _name(group.mean)}


def _name(row: report_rows.Row) -> str:
    return row.objective + ("" if row.alpha is None else f" {row.alpha:g}")


def _shown(row: report_rows.Row) -> dict[str, str]:
    """The numbers of a row as they are written, those that are known."""
    fields = [("seed", "{:g}"), *((field, form) for _, field, form in _COLUMNS)]
    values = {field: (getattr(row, field), form) for field, form in fields}
    return {f: form.format(value) for f, (value, form) in values.items() if value is not None}


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
    values = {
        name: [report_rows.finite(value) for value in row[name]]
        for name in ("kl", "residual", "collateral", "smallest_cost")
    }
    is_negative = [int(bool(value)) for value in row["is_negative"]]
    return {"id": row["id"], "pieces": row["pieces"], "is_negative": is_negative, **values}


# ---------------------------------------------------------------------------------------------
# HTML
# ---------------------------------------------------------------------------------------------


def _verdict(comparison: Comparison, rows: Sequence[report_rows.Row]) -> str:
    names = comparison.task, comparison.arm, comparison.decoder
    row = next(r for r in rows if (r.task, r.objective, r.decoder) == names)
    number = comparison.num_outputs
    before, after = (
        round(rate * number) for rate in (row.unwanted_rate_before, row.unwanted_rate_after)
    )
    return (
        f'<p class="verdict" {_belongs(*names)}><strong>{html.escape(comparison.arm)}</strong>: '
        f"{before:,} of {number:,} outputs were unwanted, {after:,} are now "
        f"(<strong>{row.cut:.1%}</strong> cut). BLEU to the original's outputs "
        f"<strong>{row.bleu:.1f}</strong>; {comparison.kinds['unchanged']:,} outputs did not "
        f"change, {comparison.kinds['newly unwanted']:,} are newly unwanted. Marked by "
        f"{html.escape(comparison.annotator) or 'an annotator without a name'}.</p>"
    )


def _belongs(task: str, arm: str | None, decoder: str) -> str:
    """Attributes by which the page shows an element only where it is about what is chosen."""
    names = {"task": task, "arm": arm, "decoder": decoder}
    return " ".join(
        f'data-{name}="{html.escape(value)}"' for name, value in names.items() if value is not None
    )


def _table(groups: Sequence[report_rows.Group]) -> str:
    columns = [
        column
        for column in _COLUMNS
        if any(getattr(group.mean, column[1]) is not None for group in groups)
    ]
    has_seeds = any(group.num_rows > 1 for group in groups)
    headings = ["", *(["seeds"] if has_seeds else []), *(heading for heading, _, _ in columns)]

    def line(belongs: str, name: str, num_rows: str, shown: Mapping[str, str]) -> str:
        cells = [num_rows] if has_seeds else []
        cells += [shown.get(field, "") for _, field, _ in columns]
        cells = "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
        return f'<tr {belongs}><th scope="row">{name}</th>{cells}</tr>'

    body, told = [], set()
    for group in groups:
        row = group.mean
        belongs = _belongs(row.task, None, row.decoder)
        if belongs not in told:
            told.add(belongs)
            before = {"unwanted_rate_after": _PERCENT.format(row.unwanted_rate_before)}
            if row.smallest_cost is not None:  # what is left where nothing was done
                before["residual"] = _NATS.format(row.smallest_cost)
            body.append(line(belongs, "original", "", before))
        best = ' <span class="tag">best trade-off</span>' if group.is_best else ""
        name = html.escape(row.objective) + best
        body.append(line(belongs, name, str(group.num_rows), _shown(row)))
    head = "".join(f'<th scope="col">{heading}</th>' for heading in headings)
    return f"<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody>"


def _signs(number: int, signs: Iterable[diagnosis.Sign]) -> str:
    items = [
        f'<li class="{"seen" if sign.is_seen else "absent"}"><p><strong>'
        f"{html.escape(sign.name)}</strong>: {'seen' if sign.is_seen else 'not seen'}. "
        f"{html.escape(sign.evidence)}.</p>"
        + (f"<p>{html.escape(sign.suggestion)}</p>" if sign.is_seen else "")
        + "</li>"
        for sign in sorted(signs, key=lambda sign: not sign.is_seen)
    ]
    return f'<ul class="signs" data-comparison="{number}">{"".join(items)}</ul>'


def _files(files: Mapping[str, tuple[int, str]]) -> str:
    lines = [
        f'<tr><th scope="row">{html.escape(path)}</th><td>{size:,}</td>'
        f"<td><code>{digest}</code></td></tr>"
        for path, (size, digest) in files.items()
    ]
    return "".join(lines)


def _settings(settings: Mapping[str, str]) -> str:
    return "".join(
        f"<details><summary>{html.escape(path)}</summary>"
        f'<pre tabindex="0">{html.escape(text)}</pre></details>'
        for path, text in settings.items()
    )


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
    """Made safe to stand in a script element."""
    return text.replace("</script", "<\\/script").replace("<!--", "<\\!--")


def _digest(script: str) -> str:
    digest = hashlib.sha256(script.encode("utf-8")).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
