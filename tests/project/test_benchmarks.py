"""benchmarks/: rows come when they are there, large variants have a process of their own each.

No number that they print is looked at.
"""

import argparse
import ast
import json
import pathlib
import re
import sys

import numpy as np
import pytest

from tnt_jax.runtime.errors import UsageError

sys.path.append(str(pathlib.Path(__file__).parents[2] / "benchmarks"))
import fuzz
import head
import report
import step

FILES = sorted(pathlib.Path(step.__file__).parent.glob("*.py"))
PROGRAMS = [path for path in FILES if "argparse.ArgumentParser(" in path.read_text("utf-8")]


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.stem)
def test_it_says_what_it_takes(path):
    """Before anybody starts it: the time on a processor like ours, and the memory."""
    said = ast.get_docstring(ast.parse(path.read_text("utf-8")))
    (takes,) = re.findall(r"^Takes (.*?\.)$", said, re.MULTILINE | re.DOTALL)
    assert re.search(r"\d[\d.]* (second|minute|hour)s?\b", takes)
    assert re.search(r"\d[\d.]* [MG]B\b", takes)


def test_a_row_is_printed_when_it_is_there(capsys):
    def rows():
        assert capsys.readouterr().out == "| name | ms |\n"
        yield "a", 1.5
        assert capsys.readouterr().out == "|---|---:|\n| a | 1.50 |\n"
        yield "b", None

    report.table(("name", "ms"), rows())
    assert capsys.readouterr().out == "| b | - |\n"


def test_what_a_process_has_found(tmp_path, capsys):
    (tmp_path / "program.py").write_text(
        "import json, os, sys\n"
        "print('something else')\n"
        "if sys.argv[1] == 'too much': os.kill(os.getpid(), 9)\n"
        "if sys.argv[1] == 'wrong': sys.exit(3)\n"
        "print(json.dumps({'ms': 3, 'of': os.environ['OF']}))\n"
    )
    program = str(tmp_path / "program.py")
    assert report.apart(program, ["right"], OF="a") == {"ms": 3, "of": "a"}
    assert capsys.readouterr() == ("", "")
    assert report.apart(program, ["wrong"]) is None
    assert capsys.readouterr().err == "wrong: ended with status 3.\n"
    assert report.apart(program, ["too much"]) is None
    assert capsys.readouterr().err.startswith("too much: ended with signal 9 ")


OF_STEP = {"ms": 2000.0, "ratio": 1.0, "floor": 1.0, "accounted": 512.0, "of_card": None}
OF_HEAD = [96.0, 0.5, 1100.0, 3.0, 0.5]


@pytest.mark.parametrize(
    ("module", "size", "names", "found", "cells"),
    [
        (
            *(step, "small, ", [*step.VARIANTS, *step.PUBLISHED]),
            *(OF_STEP, "2,000 | 1.00 | 1.00 | 512 | 1.00 | -"),
        ),
        (head, "", [*head.VARIANTS], OF_HEAD, "96.0 | 0.500 | 1,100 | 3.00 | 0.500"),
    ],
    ids=["step", "head"],
)
def test_each_variant_has_a_process_and_one_that_fails_ends_no_other(
    module, size, names, found, cells, monkeypatch, capsys
):
    """A process is begun when the row of the one before has been printed."""
    asked, printed = [], []

    def apart(file, arguments, **environment):
        printed.append(capsys.readouterr().out)
        if file == report.__file__:
            return "a machine"
        assert file == module.__file__
        assert "--rounds=3" in arguments
        name = arguments[-1].removeprefix("--variant=")
        asked.append(name)
        return None if name == names[2] else found

    monkeypatch.setattr(report, "apart", apart)
    monkeypatch.setattr(step, "has_published", lambda: True)
    monkeypatch.setattr(head, "accuracy", lambda num_tokens: [])
    arguments = ["--rounds=3", "--size=small"][: 1 + bool(size)]
    monkeypatch.setattr(sys, "argv", [module.__file__, *arguments])
    assert module.main() == f"Failed: {size}{names[2]}"
    assert asked == names
    printed = [*printed[2:], capsys.readouterr().out]
    for name, text in zip(names, printed, strict=True):
        row = next(line for line in text.splitlines() if f"| {name} |" in line)
        of_row = cells if name != names[2] else re.sub(r"[\d,.]+", "-", cells)
        assert row.endswith(f"| {name} | {of_row} |")


def test_a_variant_of_the_step_is_measured(monkeypatch, capsys):
    arguments = ["--size=tiny", "--batch=1", "--lengths=4,4", "--memory_batch=1"]
    arguments += ["--memory_lengths=4,4", "--rounds=1", "--variant=TNRF, cached, half padding"]
    monkeypatch.setattr(sys, "argv", ["step.py", *arguments])
    step.main()
    found = json.loads(capsys.readouterr().out)
    assert found.keys() == OF_STEP.keys()
    assert found["ms"] > 0 and found["accounted"] > 0


# --- Damaged files --------------------------------------------------------------------------------


def refuse(folder):
    raise UsageError(f"{folder}: expected this, found that.")


def fail(folder):
    raise KeyError("no message")


def fill(folder):
    np.ones(300 * 2**20, np.uint8)


def lack(folder):
    raise MemoryError


@pytest.mark.parametrize(
    ("read", "found"),
    [
        (lambda folder: None, None),
        (refuse, None),
        (fail, r"KeyError: 'no message' \(.*test_benchmarks.py:\d+\)"),
        (fill, r"\d\d\d MiB of memory for 0 bytes"),
        (lack, "out of memory: the host has no more"),
        (lambda folder: pathlib.Path("log").write_text("Traceback (most"), "printed: Traceback"),
        (lambda folder: sum(range(2**24)), r"\d\.\d seconds of a processor"),
        (lambda folder: sys.exit(3), "SystemExit: 3"),
    ],
)
def test_what_is_a_failure_of_reading_a_damaged_file(read, found, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(fuzz.FORMATS, "gin", fuzz.fuzz_formats.Format(fail, read))
    if found is not None and "seconds" in found:
        monkeypatch.setattr(fuzz, "MOST_SECONDS", 0.05)
    pathlib.Path("log").touch()
    case = fuzz.outcome("gin", tmp_path / "damaged", pathlib.Path("log"))
    assert case["said"].startswith("damaged: expected this") == (read is refuse)
    assert (case["failure"] is None) == (found is None)
    assert found is None or re.match(found, case["failure"])


@pytest.mark.parametrize(
    ("end", "found"),
    [("os.abort()", "ended with -6"), ("time.sleep(60)", "it did not come to an end")],
)
def test_a_process_that_a_damaged_file_ends_or_holds(end, found, tmp_path, monkeypatch):
    file = tmp_path / "program.py"
    file.write_text(
        "import json, os, time\n"
        "print(json.dumps({'begun': 4, 'done': ['x']}), flush=True)\n"
        f"{end}\n"
    )
    monkeypatch.setattr(fuzz, "__file__", str(file))
    monkeypatch.setattr(fuzz, "MOST_SECONDS_WAITING", 1)
    flags = argparse.Namespace(seed=0, folder=tmp_path)
    (case,) = fuzz.run_worker(flags, "gin", range(4, 9))
    assert (case["number"], case["failure"]) == (4, found)
