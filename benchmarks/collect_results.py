"""Brings the results of several sweeps together, for docs/.

    python benchmarks/collect_results.py docs/results.json runs/venues_sweep/results.json \
      runs/venues_sweep/ablations.json --output=docs/results.json --tables=docs/results_tables.md

Writes {"rows": of all, each with its "sweep", "choice_rows": the same on the prompts that weights
and rates were chosen on, "sweeps": of each its "name", "settings" and "chosen"}, and a page of the
tables of every sweep with all columns; prints the tables with the main columns. What it wrote
before can be among the files: a sweep that is given again takes the place of the one before.

Takes 3 seconds and 220 MB of memory.
"""

import argparse
import json
import pathlib
import re

from tnt_jax.evaluation import tables
from tnt_jax.runtime import files

HEAD = """# All columns of the study

Made by `benchmarks/collect_results.py` from [results.json](results.json), which has every weight
and seed besides. [What the study found](results.md) has the main columns, what they are, and the
commands.

"""


def as_tables(sweeps, in_full):
    """The tables of all sweeps, each below its name."""
    texts = []
    for found in sweeps:
        decoders = dict.fromkeys(row["decoder"] for row in found["chosen"])
        text = tables.as_markdown(found["chosen"], decoders, in_full=in_full)
        texts.append(f"## {found['name']}\n\n{text}")
    return "\n".join(texts)


def settings_of(found):
    """The settings of a sweep, but for where it was run."""
    settings = dict(found["settings"])
    if settings.get("gin"):
        settings["gin"] = re.sub(r"^OUTPUT_DIR = .*\n", "", settings["gin"], flags=re.MULTILINE)
    return settings


def main():
    """Writes the file and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("results", type=pathlib.Path, nargs="+", help="what sweeps wrote")
    parser.add_argument("--output", required=True, help="the JSON file to write")
    parser.add_argument("--tables", help="the page to write")
    arguments = parser.parse_args()
    rows, sweeps = {kind: {} for kind in ("rows", "choice_rows")}, {}
    for path in arguments.results:
        found = json.loads(path.read_text("utf-8"))
        if "sweeps" in found:
            sweeps |= {of["name"]: of for of in found["sweeps"]}
            for kind, of_sweeps in rows.items():
                of_kind = found.get(kind, [])
                for of in found["sweeps"]:
                    of_sweeps[of["name"]] = [row for row in of_kind if row["sweep"] == of["name"]]
            continue
        name = f"{path.parent.name}, {path.stem}"
        sweeps[name] = {"name": name, "settings": settings_of(found), "chosen": found["chosen"]}
        for kind, of_sweeps in rows.items():
            of_sweeps[name] = [{"sweep": name, **row} for row in found[kind]]
    print(as_tables(sweeps.values(), in_full=False))
    of_all = {
        kind: [row for name in sweeps for row in of_sweeps[name]]
        for kind, of_sweeps in rows.items()
    }
    files.write_json(arguments.output, {**of_all, "sweeps": list(sweeps.values())})
    if arguments.tables:
        files.write_text(arguments.tables, HEAD + as_tables(sweeps.values(), in_full=True))


if __name__ == "__main__":
    main()
