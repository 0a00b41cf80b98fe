"""Processes that hold a place, and the notes that they leave there."""

import contextlib
import json
import pathlib
import re
import socket
import subprocess
import sys
import threading
import time

PATIENCE = 120  # seconds: what a test waits for at most

HOLDER = """
import json, sys
from tnt_jax.runtime import holding

kind, path, share = json.loads(sys.argv[1])
held = holding.output(path, "OUTPUT") if kind == "output" else holding.folder(path, "DIR", share)
with held:
    print("held", flush=True)
    sys.stdin.read()
"""


@contextlib.contextmanager
def held_by_another(kind, path, share=None):
    """A process that holds something; it ends with the block, if it has not been killed."""
    command = [sys.executable, "-c", HOLDER, json.dumps([kind, str(path), share])]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.stdin.close()
        process.wait(PATIENCE)


def wait_until(is_so):
    latest = time.monotonic() + PATIENCE
    while not is_so():
        assert time.monotonic() < latest
        time.sleep(0.01)


def refusal(process):
    """The message for whoever finds a place held, but for the setting and the time."""
    return (
        rf"expected \S+ to be free, found that process {process.pid} on "
        rf"{re.escape(socket.gethostname())} \(since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d UTC\) is at "
        r"work in it\. Wait until that has ended, stop it, or set another \S+\.$"
    )


def note_of(**fields):
    """A note as some process somewhere writes it."""
    note = {
        "host": "elsewhere",
        "process": 7,
        "boot": "another",
        "namespace": "pid:[1]",
        "began": 1,
        "since": "2026-01-01 00:00:00 UTC",
        "token": "theirs",
        "beat": 0,
        "lock": None,
    }
    return json.dumps(note | fields).encode()


@contextlib.contextmanager
def changing(path):
    """A holder on another host, which shows within the block that it lives."""

    def write(beat):
        if isinstance(path, pathlib.Path):  # never half of it
            unfinished = path.with_name("unfinished")
            unfinished.write_bytes(note_of(beat=beat))
            unfinished.replace(path)
        else:
            path.write_bytes(note_of(beat=beat))

    write(0)
    is_over = threading.Event()

    def change():
        beat = 0
        while not is_over.wait(0.05):
            beat += 1
            write(beat)

    thread = threading.Thread(target=change)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join(PATIENCE)
