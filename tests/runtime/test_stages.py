"""What a stage takes for done: only what was made whole, with the settings and files of today."""

import contextlib
import hashlib
import os
import pathlib
import shutil
import types

import pytest

from tnt_jax.runtime import preemption, stages


@pytest.fixture(autouse=True)
def working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def note_run(*, output, path):
    with pathlib.Path(output).open("a") as file:
        file.write(f"{path}\n")


def was_run(path):
    """Whether a stage that reads `path` had to be run."""
    output = pathlib.Path("output")
    before = output.read_text() if output.exists() else ""
    settings = {"output": "output", "inputs": {"path": path}, "settings": {}}
    stages.Stages(pathlib.Path("root")).run("stage", note_run, **settings)
    return output.read_text() != before


def test_a_stage_is_run_again_when_a_file_that_its_pattern_matches_changes():
    folder = pathlib.Path("prompts")
    folder.mkdir()
    (folder / "a.jsonl").write_text("one")
    pattern = "prompts/*.jsonl"
    assert was_run(pattern)
    (folder / "other.txt").write_text("not matched")
    assert not was_run(pattern)
    (folder / "a.jsonl").write_text("two")
    assert was_run(pattern)
    (folder / "b.jsonl").write_text("three")
    assert was_run(pattern)
    (folder / "b.jsonl").rename(folder / "c.jsonl")
    assert was_run(pattern)
    assert not was_run(pattern)
    # The name of a model elsewhere is known by its name alone.
    assert was_run("google/flan-t5-small")
    assert not was_run("google/flan-t5-small")


def test_what_is_hidden_in_a_folder_does_not_count():
    """Desktops and downloads write such files whenever somebody looks."""
    folder = pathlib.Path("model")
    folder.mkdir()
    (folder / "params").write_text("1")
    assert was_run("model")
    (folder / ".DS_Store").write_text("x")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "metadata").write_text("x")
    assert not was_run("model")


RUNS = []  # what a stage closes over would be one of its settings


def make_folder(*, output, path, of):
    RUNS.append((path, of))
    pathlib.Path(output).mkdir(exist_ok=True)


def test_a_folder_that_moves_holds_what_it_held(tmp_path, monkeypatch):
    """However the folder is written, and from wherever: nothing is made again, or deleted."""

    def made_in(root):
        root = pathlib.Path(root)
        settings = {"inputs": {"path": f"{root}/read.txt"}, "settings": {"of": f"{root}/x"}}
        before = len(RUNS)
        output = f"{root}/out"
        stages.Stages(root).run("stage", make_folder, output=output, goes_on=True, **settings)
        return len(RUNS) - before

    pathlib.Path("run").mkdir()
    pathlib.Path("run/read.txt").write_text("1")
    assert made_in("run") == 1
    assert made_in("./run") == made_in(tmp_path / "run") == made_in("run") == 0
    pathlib.Path("run").rename("moved")
    pathlib.Path("else").mkdir()
    monkeypatch.chdir("else")
    assert made_in("../moved") == 0
    pathlib.Path("../moved/read.txt").write_text("2")
    assert made_in("../moved") == 1


def test_whoever_changes_a_setting_is_told_which(capsys):
    counted(2)
    counted(3)
    assert "count: made anew, for settings: up_to changed." in capsys.readouterr().out


def test_a_stage_is_run_again_when_an_older_file_of_its_folder_changes():
    """`cp -p` and `rsync -a` leave such a file: of the same size, with an older time."""
    folder = pathlib.Path("checkpoint")
    folder.mkdir()
    for name, when in (("params", 100), ("newest", 300)):
        (folder / name).write_text(name)
        os.utime(folder / name, (when, when))
    assert was_run("checkpoint")
    assert not was_run("checkpoint")
    (folder / "params").write_text("PARAMS")
    os.utime(folder / "params", (200, 200))
    assert was_run("checkpoint")


def count_up(*, output, up_to):
    """Goes on from what is there."""
    folder = pathlib.Path(output)
    folder.mkdir(exist_ok=True)
    for number in range(len(list(folder.iterdir())), up_to):
        (folder / str(number)).write_text(f"of {up_to}")


def counted(up_to):
    settings = {"output": "output", "inputs": {}, "settings": {"up_to": up_to}, "goes_on": True}
    stages.Stages(pathlib.Path("root")).run("count", count_up, **settings)
    return {file.name: file.read_text() for file in pathlib.Path("output").iterdir()}


@pytest.mark.parametrize("then", [2, 3])
def test_what_was_half_deleted_is_neither_kept_nor_gone_on_from(monkeypatch, then):
    """Whether the settings are again those that made it, or those that it was deleted for."""
    assert counted(2) == {"0": "of 2", "1": "of 2"}

    def interrupted(folder):
        (pathlib.Path(folder) / "0").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", interrupted)
        counted(3)
    assert counted(then) == {str(number): f"of {then}" for number in range(then)}


def counted_in_legs(up_to, after):
    settings = {"output": "output", "inputs": {}, "settings": {"up_to": up_to}, "goes_on": True}
    stages.Stages(pathlib.Path("root")).run(
        "count", count_up, **settings, earlier_settings={"up_to": after} if after else None
    )
    return {file.name: file.read_text() for file in pathlib.Path("output").iterdir()}


def test_a_leg_goes_on_from_the_last_one_and_from_nothing_else():
    assert counted_in_legs(1, 0) == {"0": "of 1"}
    assert counted_in_legs(2, 1) == {"0": "of 1", "1": "of 2"}
    assert counted_in_legs(2, 1) == {"0": "of 1", "1": "of 2"}  # done
    assert counted(2) == {"0": "of 1", "1": "of 2"}  # the same stage, told in one
    # After 2 and not after 1: made anew, in one.
    assert counted_in_legs(4, 1) == {str(number): "of 4" for number in range(4)}


NOW = [0.0]


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr(stages, "time", types.SimpleNamespace(monotonic=lambda: NOW[0]))


def wait(*, output, steps):
    """Takes 2 seconds, and is stopped in its first run."""
    folder = pathlib.Path(output)
    is_first = not folder.exists()
    folder.mkdir(exist_ok=True)
    NOW[0] += 2
    if is_first:
        raise preemption.Preempted("the machine is taken away")


def seconds(steps):
    """That a stage took, if it is done."""
    of_run = stages.Stages(pathlib.Path("root"))
    settings = {"output": "output", "inputs": {}, "settings": {"steps": steps}, "goes_on": True}
    with contextlib.suppress(preemption.Preempted):
        of_run.run("wait", wait, **settings)
    return of_run.seconds("wait")


def test_the_time_of_a_stage_that_was_stopped_is_that_of_all_attempts(clock):
    assert seconds(1) is None
    assert seconds(1) == 4.0
    # With other settings, and where its output is gone, it begins anew.
    assert [seconds(2), seconds(3), seconds(3)] == [None, None, 4.0]
    shutil.rmtree("output")
    assert [seconds(3), seconds(3)] == [None, 4.0]


NO_TIME = b'{"done": true, "seconds": []}'


@pytest.mark.parametrize("content", [b"", b"\xff", b"[" * 100_000, b"[1]", NO_TIME])
def test_a_stage_whose_note_is_damaged_is_run_again(content):
    assert was_run("prompts")
    assert not was_run("prompts")
    stages.note_path(pathlib.Path("root"), "stage").write_bytes(content)
    assert stages.Stages(pathlib.Path("root")).seconds("stage") is None
    assert was_run("prompts")


def test_a_large_file_is_looked_at_again_only_when_it_changes(tmp_path, monkeypatch):
    """In pieces, to the same digest as in one."""
    monkeypatch.setattr(stages, "_LARGE", 3)
    monkeypatch.setattr(stages, "_PIECE", 2)
    file = tmp_path / "model.gguf"
    file.write_bytes(b"weights")
    whole = hashlib.sha256(b"weights").hexdigest()[:16]
    assert stages.fingerprint(str(file)) == whole
    with monkeypatch.context() as unread:
        unread.setattr(stages, "_read_digest", lambda path: pytest.fail("it was read again"))
        assert stages.fingerprint(str(file)) == whole
    other = tmp_path / "other"
    other.write_bytes(b"changed")  # as long as before
    other.replace(file)
    assert stages.fingerprint(str(file)) == hashlib.sha256(b"changed").hexdigest()[:16]
