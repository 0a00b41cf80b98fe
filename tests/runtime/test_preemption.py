"""SIGTERM finds an answer wherever a program is."""

import signal
import subprocess
import sys
import textwrap

import pytest
from helpers import several

# A module with one program; what it does stands in a file of its own.
PROGRAM = """
import sys
from tnt_jax.runtime import preemption, program

def work():
    {work}

if __name__ == "__main__":
    program.run("told", "work", [])
"""


def run(tmp_path, work, **settings):
    """The module as a program of its own, which is told by what it does itself."""
    work = textwrap.indent(textwrap.dedent(work), "    ").strip()
    (tmp_path / "told.py").write_text(PROGRAM.replace("{work}", work))
    return subprocess.run(
        [sys.executable, "told.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
        **settings,
    )


ANSWER = "told: stopped by SIGTERM: nothing is half written. The same command goes on.\n"
TELL = "import os, signal, time; os.kill(os.getpid(), signal.SIGTERM)"


@pytest.mark.parametrize(
    "work",
    [
        f"{TELL}; time.sleep(300)",
        # Where what is raised goes nowhere: as JAX has one, and in the end of an object.
        f"""
        import gc
        def collected(phase, info):
            gc.callbacks.remove(collected)
            {TELL}
            for _ in range(100): pass
        gc.callbacks.append(collected)
        gc.collect()
        time = __import__("time"); time.sleep(300)
        """,
        f"""
        class Object:
            def __del__(self):
                {TELL}
                for _ in range(100): pass
        of = Object(); del of
        import time; time.sleep(300)
        """,
        # While an error is being explained.
        f"""
        from tnt_jax.runtime import failures
        def explain(error):
            {TELL}
            time.sleep(300)
        failures.explain = explain
        raise ValueError
        """,
        # Where a library takes it for an error of its own.
        f"""
        from tnt_jax.runtime.errors import UsageError
        try:
            {TELL}; time.sleep(300)
        except BaseException as error:
            raise UsageError("found it damaged") from error
        """,
    ],
    ids=["asleep", "garbage collector", "del", "error", "taken for an error"],
)
def test_it_stops_at_once(tmp_path, work):
    done = run(tmp_path, work)
    assert (done.returncode, done.stderr) == (75, ANSWER)


def test_nothing_more_is_said_when_it_comes_while_the_program_ends(tmp_path):
    done = run(
        tmp_path,
        f"""
        import atexit
        from tnt_jax.runtime.errors import UsageError
        def tell():
            {TELL}
            time.sleep(0.1)
        atexit.register(tell)
        raise UsageError("a mistake")
        """,
    )
    assert (done.returncode, done.stderr) == (2, "told: error: a mistake\n")


def test_what_is_deferred_is_done_first(tmp_path):
    done = run(
        tmp_path,
        f"""
        with preemption.deferred() as is_due:
            assert not is_due(1)
            {TELL}; os.kill(os.getpid(), signal.SIGTERM)
            assert is_due(2)
            print("written")
        print("and this")
        preemption.check()
        print("not this")
        """,
    )
    assert done.returncode == 75
    assert done.stdout == "written\nand this\n"
    assert "stopped by SIGTERM: what was begun is done. The same" in done.stderr


def test_programs_that_are_started_from_one_that_ends_can_be_told(tmp_path):
    """They would inherit a signal that is ignored."""
    done = run(
        tmp_path,
        """
        import atexit, subprocess
        child = "import signal; print(signal.getsignal(signal.SIGTERM) is signal.SIG_DFL)"
        atexit.register(lambda: subprocess.run([sys.executable, "-c", child]))
        """,
    )
    assert (done.returncode, done.stdout) == (0, "True\n")
    assert signal.getsignal(signal.SIGTERM) is not signal.SIG_IGN


def test_jax_is_asked_also_in_one_process_and_by_a_run_that_goes_on(tmp_path, monkeypatch):
    """`jax.distributed` takes SIGTERM from Python; here it comes while the models are read."""
    program = """
        import os, signal, time
        from tnt_jax.runtime import preemption, processes
        from tnt_jax.training import loop

        processes.start("test", processes.Kind.TOGETHER)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(3)  # JAX looks for it every second
        step, latest = 1000, time.monotonic() + 20
        with preemption.deferred(loop._stop_of_all()) as is_due:
            while not is_due(step) and time.monotonic() < latest:
                step += 1
                time.sleep(0.1)
        assert time.monotonic() < latest
        """
    monkeypatch.chdir(tmp_path)
    with several.Processes(["-c", textwrap.dedent(program)], 1, "told") as run:
        assert run.end() == [0], run.said(0)
