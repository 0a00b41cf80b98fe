"""Makes docs/report.png: the head of a report page, as a browser shows it.

    make demo
    python docs/picture.py runs/demo/report.html

Needs playwright (`pip install -e '.[test]'`) and a Chromium, which it finds as
tests/programs/test_report_browser.py does: on the PATH, or at TNT_JAX_CHROMIUM.
"""

import argparse
import os
import pathlib
import shutil
import sys

from playwright import sync_api

CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
OUTPUT = pathlib.Path(__file__).with_name("report.png")
MAX_BYTES = 200_000  # a README that loads fast


def find_chromium():
    """Returns the path of a Chromium, or ends the program with what to do."""
    found = os.environ.get("TNT_JAX_CHROMIUM") or next(
        filter(None, map(shutil.which, CHROMIUM_NAMES)), None
    )
    if found is None:
        sys.exit("expected a Chromium, found none: install one, or set TNT_JAX_CHROMIUM")
    return found


def main():
    """Opens the page and writes the picture."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("page", type=pathlib.Path, help="what `python -m tnt_jax.report` wrote")
    parser.add_argument("--width", type=int, default=1240, help="of the window, in pixels")
    parser.add_argument("--height", type=int, default=1320, help="of the window, in pixels")
    arguments = parser.parse_args()

    with sync_api.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=find_chromium(), args=["--no-sandbox"])
        size = {"width": arguments.width, "height": arguments.height}
        page = browser.new_page(viewport=size, color_scheme="light")
        page.goto(arguments.page.resolve().as_uri())
        # The chart is drawn last.
        page.locator("#trade-off-chart canvas").first.wait_for(timeout=60_000)
        page.wait_for_timeout(1_000)
        page.screenshot(path=OUTPUT)
        browser.close()

    num_bytes = OUTPUT.stat().st_size
    print(f"{OUTPUT}: {num_bytes:,} bytes")
    if num_bytes > MAX_BYTES:
        sys.exit(f"expected at most {MAX_BYTES:,} bytes: give a smaller --width or --height")


if __name__ == "__main__":
    main()
