"""Brings the results of several sweeps together, for docs/results.json and docs/results.md.

    python benchmarks/collect_results.py runs/venues_sweep/results.json \
      runs/venues_sweep/ablations.json runs/chitchat_sweep/results.json --output=docs/results.json

Writes {"rows": of all, each with its "sweep", "sweeps": of each its "name", "settings"
and "chosen"}, and prints the tables of every sweep. What it wrote before can be among the files: a
sweep that is given again takes the place of the one before.

Takes 3 seconds and 220 MB of memory.
"""

import argparse
import json
import pathlib

from tnt_jax import run_log, sweep


def main():
    """Writes the file and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("results", type=pathlib.Path, nargs="+", help="what sweeps wrote")
    parser.add_argument("--output", required=True)
    arguments = parser.parse_args()
    rows, sweeps = {}, {}
    for path in arguments.results:
        found = json.loads(path.read_text("utf-8"))
        if "sweeps" in found:
            sweeps |= {of["name"]: of for of in found["sweeps"]}
            rows |= {
                name: [row for row in found["rows"] if row["sweep"] == name] for name in sweeps
            }
            continue
        name = f"{path.parent.name}, {path.stem}"
        sweeps[name] = {"name": name, "settings": found["settings"], "chosen": found["chosen"]}
        rows[name] = [{"sweep": name, **row} for row in found["rows"]]
    for name, found in sweeps.items():
        decoders = list(dict.fromkeys(row["decoder"] for row in found["chosen"]))
        print(f"## {name}\n\n{sweep.as_markdown(found, decoders)}")
    of_all = [row for of_sweep in rows.values() for row in of_sweep]
    run_log.write_json(arguments.output, {"rows": of_all, "sweeps": list(sweeps.values())})


if __name__ == "__main__":
    main()
