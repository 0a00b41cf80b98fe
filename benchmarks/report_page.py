r"""Writes the report of many made-up outputs, and opens it in Chromium.

    python benchmarks/report_page.py --outputs=200000

Prints the processor time and memory that the page took, the size of what was written, and the
processor time and seconds until Chromium shows its charts (`CHROMIUM`, or one that is found).
The outputs are those of the page's tests: a dozen words each, to inputs of two dozen.

Takes 2 minutes of one core and 2 GB of memory.
"""

import argparse
import os
import pathlib
import shutil
import sys
import tempfile
import time

import report as benchmark

from tnt_jax import report

sys.path.append(str(pathlib.Path(__file__).parents[1] / "tests"))
from helpers import outputs


def opened(address: str) -> tuple[float, float]:
    """Seconds until the charts are there, and the processor time of the page."""
    from playwright import sync_api

    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium")
    with sync_api.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page()
        began = time.monotonic()
        page.goto(address)
        page.wait_for_function("typeof views !== 'undefined' && views.length > 0")
        seconds = time.monotonic() - began
        session = page.context.new_cdp_session(page)
        session.send("Performance.enable")
        metrics = session.send("Performance.getMetrics")["metrics"]
        (processor,) = (m["value"] for m in metrics if m["name"] == "ProcessTime")
        return seconds, processor


def main() -> None:
    """One report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--outputs", type=int, default=200_000)
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        outputs.write_pair(folder, flags.outputs)
        began = time.process_time()
        report.report(
            output=str(folder / "report.html"),
            original_records=str(folder / "original.jsonl"),
            current_records=str(folder / "patched.jsonl"),
        )
        rows = [("writing it, seconds of processor time", time.process_time() - began)]
        rows.append(("memory at most, MB", benchmark.peak() / 1e6))
        for file in sorted(folder.glob("report.html*")):
            rows.append((f"{file.name}, MB", file.stat().st_size / 1e6))
        seconds, processor = opened((folder / "report.html").as_uri())
        rows.append(("Chromium, seconds until the charts are there", seconds))
        rows.append(("Chromium, seconds of processor time", processor))
    benchmark.heading()
    benchmark.table(["", ""], rows)


if __name__ == "__main__":
    main()
