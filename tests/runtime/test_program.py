import os
import pathlib
import re
import subprocess
import sys
import textwrap

import gin
import pytest

from tnt_jax.runtime import operative_config, program
from tnt_jax.runtime.errors import UsageError

ROOT = pathlib.Path(__file__).parents[2]

TOY = '''
"""Greets somebody.

More about greeting.
"""

import dataclasses

from tnt_jax.runtime.errors import UsageError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Voice:
    """How to speak."""

    pitch: int
    words: tuple = ("hello",)

    def __post_init__(self):
        if self.pitch < 0:
            raise UsageError(f"pitch: expected at least 0,\\n  found {self.pitch}")


def shout(text, loudness=1):
    return text.upper() + "!" * loudness


def greet(*, name, folder, voice=None, style=shout, lengths=None):
    if name == "bug":
        raise ValueError("our own mistake")
    if name == "interrupt":
        raise KeyboardInterrupt
    if name == "open":
        open(folder + "/absent")
    print(style(name), voice, folder, lengths)
    if name == "write":
        from tnt_jax.runtime import operative_config

        operative_config.write(folder)


if __name__ == "__main__":
    from tnt_jax.runtime import program

    program.run("toy", "greet")
'''

RUN = """# Greets one person.
#
# Set: NAME (whom to greet), FOLDER.

from __gin__ import dynamic_registration
import toy

NAME = %gin.REQUIRED
FOLDER = %gin.REQUIRED
PITCH = 3  # more is higher
LENGTHS = None

toy.greet.name = %NAME
toy.greet.folder = %FOLDER
toy.greet.lengths = %LENGTHS
toy.greet.voice = @toy.Voice()
toy.greet.style = @toy.shout
toy.Voice.pitch = %PITCH
"""


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A folder with a program (toy.py) and its settings (run.gin), which is the working one."""
    (tmp_path / "toy.py").write_text(textwrap.dedent(TOY).lstrip())
    (tmp_path / "run.gin").write_text(RUN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("toy", None)
    gin.clear_config()
    for registry in (gin.config._REGISTRY, gin.config._INVERSE_REGISTRY):
        for key, entry in list(registry.items()):
            if entry.wrapped.__module__ == "toy":
                registry.pop(key)


@pytest.fixture
def run(toy, capsys):
    """Runs the program in this process; returns exit status, stdout and stderr."""

    def run(*arguments):
        with pytest.raises(SystemExit) as stopped:
            program.run("toy", "greet", arguments)
        out, err = capsys.readouterr()
        return stopped.value.code, out, err

    return run


@pytest.fixture
def mistake(run):
    """The one line with which the program refuses its arguments."""

    def mistake(*arguments):
        status, out, err = run(*arguments)
        assert (status, out) == (2, "")
        assert err.count("\n") == 1
        assert err.startswith("toy: error: ")
        return err.removeprefix("toy: error: ").strip()

    return mistake


GIVEN = ("--gin_file=run.gin", "--gin.NAME=ann", "--gin.FOLDER=/tmp/x")


def test_a_setting_may_begin_with_the_home_folder(run, toy, monkeypatch):
    monkeypatch.setenv("HOME", "/home/ann")

    def folder(*arguments):
        status, out, _ = run("--gin_file=run.gin", "--gin.NAME=ann", *arguments)
        assert status == 0
        return out.split()[3]

    assert folder("--gin.FOLDER=~/runs/*.jsonl") == "/home/ann/runs/*.jsonl"
    for other in ("~", "ann~/runs", "~ann"):
        assert folder(f"--gin.FOLDER={other}") == other
    (toy / "run.gin").write_text(RUN.replace("FOLDER = %gin.REQUIRED", "FOLDER = '~/runs'"))
    assert folder() == "/home/ann/runs"


def test_runs_with_its_settings(run):
    status, out, err = run(*GIVEN, "--gin.PITCH=5", "--gin.toy.shout.loudness=2")
    assert (status, err) == (0, "")
    assert out == "ANN!! Voice(pitch=5, words=('hello',)) /tmp/x None\n"


def test_a_terminal_without_utf_8_ends_no_run(toy):
    environment = {**os.environ, "PYTHONPATH": f"{toy}{os.pathsep}{ROOT}"}
    done = subprocess.run(
        [sys.executable, "-m", "toy", *GIVEN, "--gin.NAME=Zo\u00eb \u00b1"],
        env={**environment, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(r"ZO\xcb \xb1! ")


def test_python_dash_m(toy):
    """The real thing, once: the function that gin files name is the one that runs."""
    environment = {**os.environ, "PYTHONPATH": f"{toy}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-m", "toy"]
    done = subprocess.run(
        [*command, *GIVEN], env=environment, capture_output=True, text=True, timeout=240
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "ANN! Voice(pitch=3, words=('hello',)) /tmp/x None\n"
    failed = subprocess.run(
        [*command, *GIVEN, "--gin.PITCH=-1"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert (failed.returncode, failed.stdout) == (2, "")
    assert failed.stderr == "toy: error: pitch: expected at least 0, found -1\n"


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("{'inputs':64,'targets':32}", "{'inputs': 64, 'targets': 32}"),
        ("1e-4", "0.0001"),
        ("-3", "-3"),
        ("True", "True"),
        ("None", "None"),
        ("bfloat16", "bfloat16"),
        ("gs://bucket/a b", "gs://bucket/a b"),
        ("2024-01-01", "2024-01-01"),
        ("it's", "it's"),
        ('"/tmp/x"', "/tmp/x"),
        ("'3'", "3"),
        ("", ""),
        ("a=b", "a=b"),
        ("%PITCH", "3"),
        ("@toy.Voice()", "Voice(pitch=3, words=('hello',))"),
        ("@json.JSONDecodeError", "<class 'json.decoder.JSONDecodeError'>"),  # json: not imported
    ],
)
def test_values_need_no_quotes(run, value, shown):
    status, out, err = run(*GIVEN, f"--gin.LENGTHS={value}")
    assert (status, err) == (0, "")
    assert out.removesuffix("\n").partition("/tmp/x ")[2] == shown


def test_later_files_and_flags_win(run, toy):
    (toy / "other.gin").write_text("PITCH = 8\nNAME = 'bo'\n")
    _, out, _ = run("--gin_file=run.gin", "--gin_file=other.gin", "--gin.FOLDER=x", "--gin.NAME=cy")
    assert out.startswith("CY! Voice(pitch=8,")


def test_the_mark_that_windows_begins_a_file_with_is_no_mistake(run, toy):
    for name in ("run.gin", "other.gin"):
        text = (toy / "run.gin").read_text() if name == "run.gin" else "PITCH = 8\n"
        (toy / name).write_text(text, "utf-8-sig")
    status, out, _ = run(*GIVEN, "--gin_file=other.gin")
    assert status == 0
    assert "pitch=8" in out


def test_gin_files_and_includes_are_found_in_search_paths(run, toy):
    for folder in ("a", "b"):
        (toy / folder / "runs").mkdir(parents=True)
    (toy / "run.gin").rename(toy / "b" / "runs" / "base.gin")
    (toy / "a" / "runs" / "run.gin").write_text("include 'runs/base.gin'\nPITCH = 9\n")
    status, out, _ = run("--gin_file=runs/run.gin", *GIVEN[1:], "--gin_search_paths=a,b")
    assert status == 0
    assert "pitch=9" in out


@pytest.mark.parametrize("name", ["models/t5_1_1_tiny.gin", "gin_configs/models/t5_1_1_tiny.gin"])
def test_project_gin_files_are_found_from_anywhere(run, name):
    status, out, err = run(*GIVEN, f"--gin_file={name}", "--gin.LENGTHS=@t5.T5Config()")
    assert status == 0
    assert "emb_dim=32" in out
    assert err == "toy: warning: nothing reads MODEL (t5_1_1_tiny.gin)\n"


def test_missing_gin_file(mistake, toy):
    message = mistake("--gin_file=models/t5_1_1_tinny.gin")
    assert message.startswith("--gin_file: no gin file 'models/t5_1_1_tinny.gin': looked for ")
    assert str(toy / "models/t5_1_1_tinny.gin") in message
    assert str(ROOT / "gin_configs/models/t5_1_1_tinny.gin") in message
    assert "did you mean models/t5_1_1_tiny.gin" in message


def test_missing_include(mistake, toy):
    (toy / "top.gin").write_text("# first\ninclude 'runs.gin'\n")
    assert mistake("--gin_file=top.gin").startswith("top.gin, line 2: no gin file 'runs.gin'")


def test_a_file_that_includes_itself(mistake, toy):
    (toy / "top.gin").write_text("include 'top.gin'\n")
    assert mistake("--gin_file=top.gin") == "top.gin, line 1: top.gin includes itself"


def test_required_settings_are_listed_together(mistake):
    assert (
        mistake("--gin_file=run.gin")
        == "settings are missing: set --gin.NAME=..., --gin.FOLDER=..."
    )


def test_what_only_a_replaced_setting_needs_is_not_asked_for(run, mistake, toy):
    needs = RUN.replace("PITCH = 3  # more is higher", "PITCH = %gin.REQUIRED")
    (toy / "run.gin").write_text(needs + "toy.shout.loudness = %LOUDNESS\n")
    asked = mistake(*GIVEN, "--gin.toy.greet.style=None")
    assert asked == "settings are missing: set --gin.PITCH=..."
    assert "LOUDNESS" in mistake(*GIVEN, "--gin.PITCH=3")
    status, out, err = run(*GIVEN, "--gin.toy.greet.voice=None", "--gin.LOUDNESS=2")
    assert (status, out, err) == (0, "ANN!! None /tmp/x None\n", "")
    # What takes their place is asked for.
    (toy / "more.gin").write_text("import toy\nother/toy.Voice.pitch = %HEIGHT\n")
    other = ("--gin_file=more.gin", "--gin.toy.greet.voice=@other/toy.Voice()")
    message = mistake(*GIVEN, *other, "--gin.LOUDNESS=2")
    assert "PITCH" in message and "HEIGHT" in message


@pytest.mark.parametrize(
    ("name", "run_file", "left_out"),
    [
        ("evaluate", "evaluate", ["--gin.CERTIFICATE=None", "--gin.VOCABULARY_PATH=spiece.model"]),
        ("annotate", "annotate_python", ["--gin.VOCABULARY=None", "--gin.FUNCTION=mine:mark"]),
    ],
)
def test_run_files_ask_for_no_settings_of_what_is_left_out(name, run_file, left_out):
    """The comments of these run files say what may be left out."""
    files = {"evaluate": ("ORIGINAL_RECORDS", "CURRENT_RECORDS"), "annotate": ("RECORDS",)}[name]
    given = [f"--gin.{file}=a.jsonl" for file in (*files, "OUTPUT")]
    try:
        arguments = [f"--gin_file=runs/{run_file}.gin", *given, *left_out]
        assert program.configure(f"tnt_jax.{name}", name, arguments) is not None
        with pytest.raises(UsageError, match="settings are missing"):
            program.configure(f"tnt_jax.{name}", name, arguments[:-2])
    finally:
        gin.clear_config()


def test_macros_that_nothing_sets(mistake, toy):
    (toy / "more.gin").write_text("import toy\ntoy.shout.loudness = %PICH\n")
    assert mistake(*GIVEN, "--gin_file=more.gin") == (
        "settings are missing: more.gin reads %PICH, which nothing sets (did you mean %PITCH?), "
        "or --gin.PICH=..."
    )


def test_macros_that_another_file_sets(mistake, toy):
    (toy / "more.gin").write_text("import toy\ntoy.shout.loudness = %MODEL\n")
    (toy / "models").mkdir()
    for name in ("a", "b", "c"):
        (toy / "models" / f"{name}.gin").write_text("MODEL = 3\n")
    message = mistake(*GIVEN, "--gin_file=more.gin", "--gin_search_paths=models")
    assert message.startswith(
        "settings are missing: more.gin reads %MODEL, which nothing sets: add --gin_file=a.gin (or "
    )
    assert message.endswith(" others), or --gin.MODEL=...")


def test_misspelt_macro_on_the_command_line(mistake):
    assert mistake(*GIVEN, "--gin.PICH=3") == (
        "--gin.PICH: no gin file reads %PICH; did you mean PITCH?"
    )
    assert mistake("--gin.PITCH=3") == (
        "--gin.PITCH: no gin file reads %PITCH; is a --gin_file missing?"
    )


def test_unused_macros_of_files_are_a_warning(run, toy):
    (toy / "more.gin").write_text("SPEED = 1\nCOLOR = 2\n")
    status, _, err = run(*GIVEN, "--gin_file=more.gin")
    assert status == 0
    assert err == "toy: warning: nothing reads SPEED (more.gin), COLOR (more.gin)\n"


def test_arguments_that_nothing_binds(mistake):
    assert mistake() == (
        "no gin file sets name, folder: pass a run file with --gin_file=..., or set "
        "--gin.toy.greet.name=..., --gin.toy.greet.folder=..."
    )


def test_arguments_can_be_set_without_any_file(run):
    status, out, _ = run("--gin.toy.greet.name=di", "--gin.toy.greet.folder=here")
    assert (status, out) == (0, "DI! None here None\n")


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        (
            "--gin.toy.Voice.pich=3",
            "--gin.toy.Voice.pich=3: Configurable 'toy.Voice' doesn't have a parameter named "
            "'pich'.",
        ),
        (
            "--gin.toy.Voise.pitch=3",
            "--gin.toy.Voise.pitch=3: Couldn't resolve selector toy.Voise; toy has no attribute "
            "Voise.",
        ),
        (
            "--gin.nowhere.Voice.pitch=3",
            "--gin.nowhere.Voice.pitch=3: 'nowhere' was not provided by an import statement.",
        ),
        (
            "--gin.LENGTHS={'inputs' 64}",
            "--gin.LENGTHS={'inputs' 64}: Expected ':'.; a text that starts like this needs "
            "quotes within",
        ),
        (
            "--gin.LENGTHS={[]: 1}",
            "--gin.LENGTHS={[]: 1}: expected a value, found one that is none (unhashable type: "
            "'list'); a text that starts like this needs quotes within",
        ),
        ("--gin.LENGTHS", "--gin.LENGTHS: expected --gin.NAME=VALUE"),
        ("--gin.a-b=3", "--gin.a-b=3: expected --gin.NAME=VALUE"),
        ("--steps=3", "unrecognized arguments: --steps=3 (see --help)"),
    ],
)
def test_wrong_flags(mistake, argument, message):
    assert mistake(*GIVEN, argument) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("X = = 3\n", "bad.gin, line 1: Unable to parse value.: X = = 3"),
        ("X = 1\nX = {[]: 1}\n", "bad.gin, line 2: expected a value, found one that is none (unh"),
        ("import toy\ntoy.Voice\n", "bad.gin, line 2: Couldn't parse statement"),
        ("import nowhere_at_all\n", "No module named 'nowhere_at_all' In file \"bad.gin\", line 1"),
        (
            "from __gin__ import dynamic_registration\nimport toy\ntoy.Voice.pich = 3\n",
            "Configurable 'toy.Voice' doesn't have a parameter named 'pich'. In file \"bad.gin\", "
            "line 3 toy.Voice.pich = 3",
        ),
    ],
)
def test_wrong_gin_files(mistake, toy, text, message):
    (toy / "bad.gin").write_text(text)
    assert mistake(*GIVEN, "--gin_file=bad.gin").startswith(message)


@pytest.mark.parametrize(
    ("text", "reasons"),
    [
        (
            f"X = {'[' * 90_000}",
            {"expected a value, found one that is none (nested", "too many nested"},
        ),
        ("\0" * 5000, {r"Unexpected token.: \x00\x00", "source code cannot contain null bytes"}),
    ],
)
def test_what_is_no_gin_file(mistake, toy, text, reasons):
    """Python's own tokenizer says the reason, and not in the same words in every version."""
    (toy / "bad.gin").write_text(text)
    said = mistake(*GIVEN, "--gin_file=bad.gin")
    assert any(said.startswith(f"bad.gin, line 1: {reason}") for reason in reasons), said


def test_mistakes_found_by_the_library(mistake, toy):
    assert mistake(*GIVEN, "--gin.PITCH=-1") == "pitch: expected at least 0, found -1"
    assert mistake(*GIVEN, "--gin.NAME=open", f"--gin.FOLDER={toy}") == (
        f"No such file or directory: '{toy}/absent'"
    )


def test_a_constructor_that_lacks_a_setting(mistake, toy):
    (toy / "run.gin").write_text(RUN.replace("toy.Voice.pitch", "toy.shout.loudness"))
    assert "missing 1 required keyword-only argument: 'pitch'" in mistake(*GIVEN)


def test_our_own_mistakes_keep_their_traceback(toy):
    with pytest.raises(ValueError, match="our own mistake") as raised:
        program.run("toy", "greet", [*GIVEN, "--gin.NAME=bug"])
    assert raised.traceback[-1].name == "greet"


def test_interrupt(run):
    assert run(*GIVEN, "--gin.NAME=interrupt") == (
        130,
        "",
        "toy: interrupted. The same command goes on.\n",
    )


def test_help_needs_no_import(run, toy):
    (toy / "toy.py").write_text('"""Greets somebody.\n\nMore.\n"""\nraise AssertionError\n')
    status, out, err = run("--help", "--gin_file=run.gin")
    assert (status, err) == (0, "")
    assert out.startswith("Greets somebody.\n\nMore.\n\nusage: python -m toy --gin_file=FILE ...")
    assert "--gin_search_paths" in out
    assert (
        "--gin_file=run.gin needs:\n"
        "  Greets one person.\n"
        "  \n"
        "  Set: NAME (whom to greet), FOLDER.\n"
        "  --gin.NAME=...\n"
        "  --gin.FOLDER=...\n"
        "and sets, unless you do:\n"
        "  --gin.PITCH=3  # more is higher\n"
        "  --gin.LENGTHS=None\n"
    ) in out
    assert "python -m toy --gin_file=run.gin --gin.NAME=... --gin.FOLDER=...\n" in out


def test_help_names_the_run_files_of_a_program_alone(capsys):
    """What a pipeline sets of generate.generate leaves out its output: no run file of its own."""
    with pytest.raises(SystemExit):
        program.run("tnt_jax.generate", "generate", ["--help"])
    out = capsys.readouterr().out
    assert re.findall("^--gin_file=(.*) needs:$", out, re.MULTILINE) == ["runs/generate.gin"]
    assert "With a --gin_file, --help also lists every other setting" in out


def test_a_program_without_settings_names_its_run_files(capsys):
    with pytest.raises(SystemExit):
        program.run("tnt_jax.train", "train", [])
    message = "pass a run file with --gin_file=runs/train.gin or runs/train_task.gin, or set "
    assert message in capsys.readouterr().err


def test_written_config_repeats_the_run(run, toy):
    first = run(*GIVEN, "--gin.NAME=write", f"--gin.FOLDER={toy}", "--gin.toy.shout.loudness=3")
    written = (toy / "operative_config.gin").read_text()
    assert "toy.greet.lengths = %LENGTHS" in written
    (toy / "operative_config.gin").rename(toy / "again.gin")
    assert run("--gin_file=again.gin") == first
    assert (toy / "operative_config.gin").read_text() == written


def test_written_config_holds_what_is_called_later(toy):
    gin.parse_config_files_and_bindings(["run.gin"], ["NAME = 'a'", "FOLDER = 'b'"])
    with gin.unlock_config():
        gin.parse_config(
            ["from __gin__ import dynamic_registration", "import toy", "toy.shout.loudness = 4"]
        )
    operative_config.write(toy / "out.jsonl")
    assert "toy.shout.loudness = 4" in (toy / "out.jsonl.gin").read_text()


def test_no_config_is_written_for_python_callers(tmp_path):
    gin.clear_config()
    operative_config.write(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("before", ["", "import importlib.util as u; u.find_spec('tensorflow'); "])
def test_tensorflow_is_imported_without_its_lines_but_others_come_through(tmp_path, before):
    """Also where a library, as epath does, has asked before whether it is there."""
    (tmp_path / "tensorflow.py").write_text(
        "import os, sys\n"
        "os.write(2, b'I0000 00:00:1.2   3 cudart_stub.cc:31] Could not find cuda drivers\\n')\n"
        "os.write(2, b'WARNING: All log messages before absl::InitializeLog() is called\\n')\n"
        "print('a real warning', file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"from tnt_jax.runtime import program; {before}import tensorflow"],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "a real warning\n")
