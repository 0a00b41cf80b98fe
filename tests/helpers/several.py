"""Programs in several processes on this machine, which meet through `jax.distributed`."""

import contextlib
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

from helpers import rooms

_PATIENCE = 240  # seconds: what a test waits for at most

# For tests where a process is killed, or ends before the others. Elsewhere JAX's 100 seconds stay:
# a machine that stands still for ten would end a test whose processes are all well.
SOON_MISSED = {"TNT_JAX_HEARTBEAT_SECONDS": "10"}


def _port():
    """A socket whose port nobody else is given until it is closed.

    It does not listen, and shares its port with whoever asks for that, as JAX's server does. A port
    that was only looked up would be free for others until the server has started, seconds later.
    """
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    held.bind(("127.0.0.1", 0))
    return held


class Processes:
    """A program in several processes; what each prints is in a file of its own.

    Args:
        arguments: the command after `python`.
        count: of processes.
        name: of the files.
        environment: further variables.
    """

    def __init__(self, arguments, count, name, **environment):
        self.logs = [pathlib.Path(f"{name}.{index}.log") for index in range(count)]
        self._port = _port()
        address = f"127.0.0.1:{self._port.getsockname()[1]}"
        self.processes = []
        for index, log in enumerate(self.logs):
            variables = {
                "TNT_JAX_DISTRIBUTED": "1",
                "JAX_COORDINATOR_ADDRESS": address,
                "JAX_NUM_PROCESSES": str(count),
                "JAX_PROCESS_ID": str(index),
                "JAX_NUM_CPU_DEVICES": "1",
                **environment,
            }
            with log.open("w") as file:
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, *arguments],
                        stdout=file,
                        stderr=subprocess.STDOUT,
                        env=os.environ | variables,
                    )
                )

    def wait_for(self, text, index=0):
        """Until a process has printed this."""
        deadline = time.monotonic() + _PATIENCE
        while text not in self.logs[index].read_text():
            assert self.processes[index].poll() is None, self.logs[index].read_text()
            assert time.monotonic() < deadline, self.logs[index].read_text()
            time.sleep(0.02)

    def send(self, number, index):
        """A signal to one of them."""
        self.processes[index].send_signal(number)

    def end(self):
        """The exit statuses of all, when they have ended."""
        return [process.wait(timeout=_PATIENCE) for process in self.processes]

    def said(self, index):
        """What a process has printed."""
        return self.logs[index].read_text()

    def __enter__(self):
        return self

    def __exit__(self, *unused):
        """None outlives the block."""
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGKILL)
            process.wait()
        self._port.close()


def running(run_name, settings, count, name, gin_files=(), **environment):
    """A program of the world of `rooms` in several processes."""
    module = run_name.partition("_")[0]
    command = ["-m", f"tnt_jax.{module}", *rooms.arguments(run_name, settings, gin_files)]
    return Processes(command, count, name, **environment)


# Of each program: where it waits, a method whose first argument is a number; its processes' kind.
_PLACES = {
    "train": ("tnt_jax.training", "loop", "Loop._batch", "TOGETHER"),
    "generate": ("tnt_jax.runtime", "output_parts", "Parts.add", "APART"),
}
_HELD = """
import json, pathlib, sys, time
from {room} import {owner}
from tnt_jax.runtime import processes, program

real = {owner}.{method}


def is_held(number):
    try:
        return number >= int(pathlib.Path("hold").read_text())
    except (OSError, ValueError):  # it has just gone, or is being written
        return False


def held(self, number, *arguments):
    while is_held(number):
        time.sleep(0.01)
    return real(self, number, *arguments)


{owner}.{method} = held
kind = processes.Kind.{kind}
program.run("tnt_jax.{name}", "{name}", json.loads(sys.argv[1]), processes_run=kind)
"""


@contextlib.contextmanager
def held(run_name, settings, count, name, *, at, **environment):
    """`running`, where each process waits at a place of its program while a file `hold` exists.

    So whoever tells or kills a process need not be quicker than its work.

    Args:
        run_name: a program, "train" or "generate".
        settings: of the run.
        count: of processes.
        name: of their logs.
        at: the first update that is not begun, or the first part that is not written.
        environment: further variables.
    """
    room, owner, method, kind = _PLACES[run_name]
    script = _HELD.format(name=run_name, room=room, owner=owner, method=method, kind=kind)
    command = ["-c", script, json.dumps(rooms.arguments(run_name, settings))]
    hold = pathlib.Path("hold")
    hold.write_text(str(at))
    try:
        with Processes(command, count, name, **environment) as run:
            yield run
    finally:
        hold.unlink(missing_ok=True)
