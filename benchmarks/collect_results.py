"""Brings the results of several sweeps together, for docs/results.json and docs/results.md.

    python benchmarks/collect_results.py runs/venues_sweep/results.json \
      runs/venues_sweep/ablations.json runs/chitchat_sweep/results.json --output=docs/results.json

Writes {"rows": of all, "sweeps": of each its "name", "settings" and "chosen"}, and prints the
tables of every sweep.
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
    rows, sweeps = [], []
    for path in arguments.results:
        found = json.loads(path.read_text("utf-8"))
        rows += found["rows"]
        name = f"{found['settings']['task']}, {path.stem}"
        sweeps.append({"name": name, "settings": found["settings"], "chosen": found["chosen"]})
        decoders = list(dict.fromkeys(row["decoder"] for row in found["chosen"]))
        print(f"## {name}\n\n{sweep.as_markdown(found, decoders)}")
    run_log.write_json(arguments.output, {"rows": rows, "sweeps": sweeps})


if __name__ == "__main__":
    main()
