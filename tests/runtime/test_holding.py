"""Two runs in one place: one of them works, the other is told who does; the dead hold nothing."""

import contextlib
import errno
import fcntl
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time

import pytest
from helpers import several
from helpers.full_disk import full_disk
from helpers.holders import PATIENCE, changing, held_by_another, note_of, refusal, wait_until

from tnt_jax.runtime import holding
from tnt_jax.runtime.errors import UsageError


def hold(path, share=None):
    """Takes a folder, and gives it back."""
    with holding.folder(path, "DIR", share):
        pass


@pytest.fixture
def quick(monkeypatch):
    """Nobody waits for long."""
    monkeypatch.setattr(holding, "_STALE", 0.6)
    monkeypatch.setattr(holding, "_SETTLE", 0.01)


@pytest.fixture
def without_locks(monkeypatch):
    """A file system that has none."""

    def flock(*unused):
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setattr(holding, "_SETTLE", 0.01)


# --- The note -------------------------------------------------------------------------------------


@pytest.mark.parametrize("ends_with", [None, ZeroDivisionError, KeyboardInterrupt])
def test_a_note_says_who_holds_and_goes_with_the_run(tmp_path, ends_with):
    folder = tmp_path / "new" / "folder"
    before = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    with (
        contextlib.suppress(ZeroDivisionError, KeyboardInterrupt),
        holding.folder(folder, "DIR"),
        holding.output(folder / "a.jsonl", "OUTPUT"),
    ):
        assert sorted(file.name for file in folder.iterdir()) == [".a.jsonl.held", ".held"]
        note = json.loads((folder / ".held").read_text())
        assert (note["host"], note["process"]) == (socket.gethostname(), os.getpid())
        now = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
        assert before <= note["since"] <= now
        if ends_with is not None:
            raise ends_with
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("kind", ["folder", "output"])
def test_a_second_process_is_refused_and_told_by_whom(tmp_path, kind):
    hold = getattr(holding, kind)
    with held_by_another(kind, tmp_path / "x") as other:
        with (
            pytest.raises(UsageError, match="^PLACE: " + refusal(other)),
            hold(tmp_path / "x", "PLACE"),
        ):
            pass
        other.send_signal(signal.SIGSTOP)  # asleep, and not dead
        with pytest.raises(UsageError, match=refusal(other)), hold(tmp_path / "x", "PLACE"):
            pass
        other.send_signal(signal.SIGCONT)
    with hold(tmp_path / "x", "PLACE"):
        pass


def test_a_second_run_of_the_same_process_is_refused_too(tmp_path):
    with holding.folder(tmp_path, "DIR"):
        with pytest.raises(UsageError, match=f"process {os.getpid()} on "):
            hold(tmp_path)
        hold(tmp_path / "within")


def test_what_a_killed_process_held_is_free_at_once(tmp_path, capsys):
    with held_by_another("folder", tmp_path) as other:
        other.kill()
        other.wait(PATIENCE)
        assert (tmp_path / ".held").exists()
        with holding.folder(tmp_path, "DIR"):
            assert json.loads((tmp_path / ".held").read_text())["process"] == os.getpid()
    assert "waiting" not in capsys.readouterr().out


def test_no_half_of_a_note_is_left_where_there_is_no_room(tmp_path, capsys):
    """It said nothing of a process, and the next run watched it for a minute."""
    with full_disk(500), pytest.raises(OSError, match="No space left on device"):
        hold(tmp_path)
    assert list(tmp_path.iterdir()) == []
    hold(tmp_path)
    assert "waiting" not in capsys.readouterr().out


def test_of_many_that_start_at_once_one_holds(tmp_path):
    for _ in range(20):
        started, ended = threading.Barrier(8), threading.Barrier(8)
        outcomes = []

        def take(started=started, ended=ended, outcomes=outcomes):
            started.wait(PATIENCE)
            try:
                with holding.folder(tmp_path, "DIR"):
                    outcomes.append("held")
                    ended.wait(PATIENCE)
            except UsageError:
                outcomes.append("refused")
                ended.wait(PATIENCE)

        threads = [threading.Thread(target=take) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
        assert sorted(outcomes) == ["held"] + ["refused"] * 7
        assert not (tmp_path / ".held").exists()


# --- Holders elsewhere ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        note_of(),
        note_of(lock=pathlib.Path("/").stat().st_dev),
        b"x",
        b"[1]",
        b"[" * 1024,
        note_of()[:40],
    ],
)
def test_a_note_that_nobody_changes_is_taken_over(tmp_path, quick, content, capsys):
    (tmp_path / ".held").write_bytes(content)
    with holding.folder(tmp_path, "DIR"):
        assert json.loads((tmp_path / ".held").read_text())["process"] == os.getpid()
    said = capsys.readouterr().out
    who = r"(process 7 on elsewhere \(since 2026-01-01 00:00:00 UTC\)|another process)"
    assert re.match(rf"DIR: \S+ was held by {who}, and nothing here says whether .*: waiting", said)


def test_a_note_that_its_holder_changes_is_respected(tmp_path):
    """Whatever the clock of its host says: nothing of it is compared."""
    note = tmp_path / ".held"
    with (
        changing(note),
        pytest.raises(UsageError, match=r"process 7 on elsewhere .* is at work in it"),
    ):
        hold(tmp_path)
    assert json.loads(note.read_text())["token"] == "theirs"


def test_a_note_that_is_taken_away_meanwhile_keeps_nobody(tmp_path, monkeypatch):
    note, said = tmp_path / ".held", []
    note.write_bytes(note_of())

    def log(message):
        said.append(message)
        note.unlink()

    monkeypatch.setattr(holding.console, "log", log)
    with holding.folder(tmp_path, "DIR"):
        assert json.loads(note.read_text())["process"] == os.getpid()
    assert [message.partition("waiting")[2] for message in said] == [
        " up to 60 seconds for a sign of life."
    ]


@pytest.fixture
def ended():
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait(PATIENCE)
    return process.pid


def test_without_locks_the_table_of_processes_tells(tmp_path, without_locks, ended):
    note, here = tmp_path / ".held", holding._here()
    of_this_host = {"boot": here["boot"], "namespace": here["namespace"]}
    with held_by_another("folder", tmp_path / "other") as other:
        began = json.loads((tmp_path / "other" / ".held").read_text())["began"]
        note.write_bytes(note_of(**of_this_host, process=other.pid, began=began))
        with pytest.raises(UsageError, match=f"process {other.pid} on "):
            hold(tmp_path)
        # A number is used again, and a dead process keeps its own until it is collected.
        note.write_bytes(note_of(**of_this_host, process=other.pid, began=began - 1))
        hold(tmp_path)
        other.kill()
        wait_until(lambda: holding._began(other.pid) is None)
        for number in (other.pid, ended, "x", None, []):
            note.write_bytes(note_of(**of_this_host, process=number, began=began))
            hold(tmp_path)
    assert not note.exists()


def test_a_lock_of_another_mount_says_nothing(tmp_path, ended):
    """Two mounts of one store in one host, say, each with locks of its own."""
    here = holding._here()
    with held_by_another("folder", tmp_path / "other") as other:
        fields = json.loads((tmp_path / "other" / ".held").read_text())
        (tmp_path / ".held").write_text(json.dumps(fields | {"lock": fields["lock"] + 1}))
        with pytest.raises(UsageError, match=f"process {other.pid} on "):
            hold(tmp_path)
    assert here["boot"] == fields["boot"]


def test_without_locks_the_last_of_two_that_write_at_once_holds(
    tmp_path, without_locks, monkeypatch
):
    """Both have found nobody, and both have written before either looks again."""
    both, write, is_over = threading.Barrier(2), holding._Note.write, threading.Event()

    def write_together(self, about):
        is_taking = threading.current_thread() in threads  # and not changing what it has
        if is_taking:
            both.wait(PATIENCE)
        write(self, about)
        if is_taking:
            both.wait(PATIENCE)

    monkeypatch.setattr(holding._Note, "write", write_together)
    outcomes = []

    def take():
        try:
            with holding.folder(tmp_path, "DIR"):
                outcomes.append("held")
                is_over.wait(PATIENCE)
        except UsageError:
            outcomes.append("refused")
            is_over.set()

    threads = [threading.Thread(target=take) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert sorted(outcomes) == ["held", "refused"]
    assert not (tmp_path / ".held").exists()


def test_whoever_was_taken_for_dead_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(holding, "_BEAT", 0.01)
    note, latest = tmp_path / ".held", time.monotonic() + PATIENCE
    with (
        pytest.raises(UsageError, match=r"that process 7 on elsewhere .* has taken it over"),
        holding.folder(tmp_path, "DIR"),
    ):
        wait_until(lambda: json.loads(note.read_text())["beat"] > 2)
        holding.check()
        unfinished = tmp_path / "unfinished"
        unfinished.write_bytes(note_of())
        unfinished.replace(note)
        while time.monotonic() < latest:
            holding.check()
    assert json.loads(note.read_text())["token"] == "theirs"  # and leaves it there
    holding.check()


# --- Shares ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("theirs", "ours", "is_free"),
    [
        ([0, 2], (1, 2), True),
        ([0, 2], (0, 2), False),
        ([0, 2], (1, 3), False),
        ([0, 2], None, False),
        (None, (0, 2), False),
    ],
)
def test_shares_of_one_whole_go_together(tmp_path, theirs, ours, is_free):
    with held_by_another("folder", tmp_path, theirs) as other:
        refused = pytest.raises(UsageError, match=f"process {other.pid} on ")
        with contextlib.nullcontext() if is_free else refused:
            hold(tmp_path, ours)
        assert len(list(tmp_path.iterdir())) == 1
        other.kill()
        other.wait(PATIENCE)
        hold(tmp_path, ours)
    assert len(list(tmp_path.iterdir())) == is_free  # that of the dead one is in nobody's way


# --- Several processes ----------------------------------------------------------------------------


def test_processes_that_do_not_see_one_folder_say_so_before_they_work(tmp_path, monkeypatch):
    """Each host has a disk of its own, the second one with a note from when it was the first."""
    program = """
        import sys
        from tnt_jax.runtime import holding, processes
        from tnt_jax.runtime.errors import UsageError

        processes._PATIENCE = 1.0
        processes.start("test", processes.Kind.TOGETHER)
        with holding.folder("shared", "DIR"):
            pass
        try:
            with holding.folder(f"host{processes.index()}", "DIR"):
                print("works")
        except UsageError as error:
            print(error, flush=True)
            processes.end(2)
            sys.exit(2)
        """
    monkeypatch.chdir(tmp_path)
    (tmp_path / "host1").mkdir()
    (tmp_path / "host1/.held").write_bytes(note_of())
    with several.Processes(["-c", textwrap.dedent(program)], 2, "apart") as run:
        assert run.end() == [2, 2], run.said(0)
    for index in range(2):
        message = (
            "DIR: expected a folder that all 2 processes see, found that what the first one writes "
            f"into host{index} is not there for process 1. Set DIR to a folder that all hosts share"
        )
        assert message in run.said(index)
        assert "works" not in run.said(index)
    assert not (tmp_path / "host0/.held").exists()
