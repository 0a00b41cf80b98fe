"""launch/: the restart loop, one GPU node, SLURM with stand-ins for its commands, the image."""

import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys

import pytest
from helpers import hostile

from tnt_jax.runtime import errors, failures, preemption

ROOT = pathlib.Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


def bash(*arguments, cwd=ROOT, **environment):
    return subprocess.run(
        ["bash", *map(str, arguments)],
        cwd=cwd,
        env={"PATH": os.environ["PATH"], "HOME": str(cwd)} | environment,
        capture_output=True,
        text=True,
        timeout=240,
    )


def program(folder, text, name="program"):
    path = folder / name
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(0o755)
    return path


# Style --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("linter", "files"),
    [
        ("shellcheck", [*SCRIPTS, ROOT / "tests/helpers/fake_host.sh"]),
        ("hadolint", [ROOT / "Dockerfile"]),
    ],
)
def test_linters_find_nothing(linter, files):
    # A virtual environment's own programs are on PATH only where it is activated.
    beside = shutil.which(linter, path=pathlib.Path(sys.executable).parent)
    found = beside or shutil.which(linter)
    if found is None:
        pytest.skip(f"needs {linter}: pip install {linter}-py, or the system's package")
    done = subprocess.run([found, *files], capture_output=True, text=True, timeout=240)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_can_be_run_and_explain_themselves(script):
    assert os.access(script, os.X_OK)
    assert bash("-n", script).returncode == 0
    if script.name == "host.sh":  # for tpu_vm.sh alone
        return
    done = bash(script, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"launch/{script.name}" in done.stdout
    assert not re.search(r"^(#|set )", done.stdout, re.MULTILINE)


# The restart loop ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("statuses", "expected", "starts"),
    [
        ([0], 0, 1),
        ([75, 75, 0], 0, 3),  # stopped, and saved
        ([143, 143, 143, 0], 0, 4),  # stopped before it could answer
        ([2], 2, 1),  # what a user has to mend
        ([130], 130, 1),  # Ctrl-C
        ([1, 134, 0], 0, 3),  # failures
        ([1, 1, 1], 1, 3),  # too many
        ([1, 1, 75, 1, 1, 0], 0, 6),  # a run that saved ends the row of failures
        ([137, 2], 2, 2),
    ],
)
def test_what_each_exit_status_leads_to(tmp_path, statuses, expected, starts):
    check_statuses(tmp_path, [], statuses, expected, starts)


@pytest.mark.parametrize(
    ("statuses", "expected", "starts"),
    [
        ([1, 75], 75, 2),
        ([143, 143, 143], 143, 3),  # nothing was saved: a failure
    ],
)
def test_what_each_exit_status_leads_to_where_a_scheduler_starts_again(
    tmp_path, statuses, expected, starts
):
    check_statuses(tmp_path, ["--end_when_saved"], statuses, expected, starts)


def check_statuses(folder, settings, statuses, expected, starts):
    script = program(
        folder,
        "echo start >>starts\n"
        f"statuses=({' '.join(map(str, statuses))})\n"
        'exit "${statuses[$(wc -l <starts) - 1]}"',
    )
    loop = [LAUNCH / "restart_loop.sh", "--max_failures=2", "--pause=0", "--state_file=state"]
    done = bash(*loop, *settings, "--", script, cwd=folder)
    assert done.returncode == expected, done.stdout
    assert len((folder / "starts").read_text().splitlines()) == starts
    assert (folder / "state").read_text() == f"finished {expected}\n"


def test_arguments_reach_the_command_as_they_are(tmp_path):
    script = program(tmp_path, 'printf "%s\\n" "$@"')
    arguments = ["--gin.A={'b': 'c d'}", "*", "$HOME", "", "--pause=3"]
    done = bash(LAUNCH / "restart_loop.sh", "--", script, *arguments, cwd=tmp_path)
    assert done.stdout.splitlines() == arguments


def test_a_setting_of_the_loop_that_is_misspelt_is_no_command(tmp_path):
    done = bash(LAUNCH / "restart_loop.sh", "--max_failure=3", "--", "true", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "restart_loop.sh: no setting --max_failure=3; see --help\n"


@pytest.mark.parametrize("is_at", ["work", "pause"])
def test_sigterm_waits_for_the_command_and_starts_nothing_again(tmp_path, is_at):
    script = program(
        tmp_path,
        "trap 'sleep 0.3; echo saved >saved; exit 75' TERM\n"
        "echo start >>starts\n"
        + ("exit 1" if is_at == "pause" else "echo working\nwhile :; do sleep 0.05; done"),
    )
    loop = subprocess.Popen(
        ["bash", LAUNCH / "restart_loop.sh", "--pause=300", "--", script],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert ("again in 300 s" if is_at == "pause" else "working") in loop.stdout.readline()
    loop.send_signal(signal.SIGTERM)
    output, _ = loop.communicate(timeout=240)
    assert loop.returncode == 75, output
    assert "stopped on request" in output
    assert (tmp_path / "saved").exists() == (is_at == "work")
    assert len((tmp_path / "starts").read_text().splitlines()) == 1


def test_sigterm_between_the_command_and_the_pause_is_not_slept_through(tmp_path):
    """Here `date`, which the loop runs there, tells it to stop."""
    script = program(tmp_path, "echo $PPID >loop\nexit 1")
    program(tmp_path, 'kill -TERM "$(cat loop)"\necho now', "date")
    loop = [LAUNCH / "restart_loop.sh", "--pause=300", "--", script]
    done = bash(*loop, cwd=tmp_path, PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert done.returncode == 75, done.stdout
    assert "stopped on request, between two starts" in done.stdout


# One node with GPUs -------------------------------------------------------------------------------


def test_gpu_node_installs_checks_and_runs(tmp_path):
    venv = tmp_path / "venv"
    done = bash(
        *(LAUNCH / "gpu_node.sh", "--dry_run", f"--venv={venv}", "--gin_file=runs/train.gin"),
        "--gin.MODEL_DIR=a b",
    )
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert re.search(r"-m venv --clear .*venv $", lines[0])
    assert lines[1].startswith(f"{venv}/bin/python -m pip install ")
    assert lines[1].endswith(r"\[gpu\,hub\] ")
    assert "default_backend" in lines[3]
    assert lines[4].endswith(
        f"launch/restart_loop.sh -- {venv}/bin/python -m tnt_jax.train "
        r"--gin_file=runs/train.gin --gin.MODEL_DIR=a\ b "
    )
    assert not venv.exists()


@pytest.mark.parametrize(("gpus", "status"), [("yes", 0), ("", 2)])
def test_gpu_node_does_not_train_on_a_processor(tmp_path, gpus, status):
    (tmp_path / "venv/bin").mkdir(parents=True)
    program(
        tmp_path / "venv/bin",
        f'[[ $1 != -c ]] || [[ -n "{gpus}" ]] || exit 1\necho "$*" >>{tmp_path}/calls',
        "python",
    )
    (tmp_path / "venv/.installed-gpu").touch()
    done = bash(LAUNCH / "gpu_node.sh", f"--venv={tmp_path}/venv", "--gin_file=runs/train.gin")
    assert done.returncode == status
    calls = (tmp_path / "calls").read_text() if (tmp_path / "calls").exists() else ""
    assert ("-m tnt_jax.train --gin_file=runs/train.gin" in calls) == (status == 0)
    assert ("JAX finds no GPU here" in done.stderr) == (status == 2)


def test_gpu_node_installs_nothing_where_no_folder_is_named():
    done = bash(LAUNCH / "gpu_node.sh", "--dry_run", "--venv=", "--gin_file=runs/train.gin")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "gpu_node: error: --venv: expected a folder, found nothing\n"


# Of every stand-in: what it was called with, each argument as it came.
NOTES = 'printf "%s\\0" "${0##*/}" "$@" $\'\\n\' >>"$CALLS"'


def calls_of(file):
    """The calls that `NOTES` wrote, each a list of arguments."""
    text = file.read_bytes().decode() if file.exists() else ""
    return [call.split("\0") for call in text.split("\0\n\0") if call]


def assert_refused(done, message):
    """In one line, of which nothing moves a terminal's cursor."""
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(message)
    assert done.stderr.removesuffix("\n").isprintable()


@pytest.fixture
def node(tmp_path):
    """A project's folder whose Python notes what it is called with, and makes its like."""
    project = tmp_path / "the project's"
    shutil.copytree(LAUNCH, project / "launch")
    (project / "setup.py").touch()
    (project / ".ci").mkdir()
    python = program(
        tmp_path,
        f'{NOTES}\nif [[ $2 == venv ]]; then mkdir -p "$4/bin"; cp "$0" "$4/bin/python"; fi',
        "python3",
    )
    program(project / ".ci", f"echo '{python}'", "find_python")
    (tmp_path / "here").mkdir()

    def run(*arguments):
        done = bash(
            project / "launch/gpu_node.sh",
            *arguments,
            cwd=tmp_path / "here",
            CALLS=str(tmp_path / "calls"),
        )
        calls = calls_of(tmp_path / "calls")
        (tmp_path / "calls").unlink(missing_ok=True)
        assert not list(tmp_path.rglob("hacked"))
        return done, calls

    return run


@pytest.mark.parametrize("value", hostile.VALUES)
def test_gpu_node_takes_every_folder_and_every_setting_as_it_is(node, value):
    settings = [f"--gin_file={value}", f"--gin.A={value}", f"--gin_search_paths={value}"]
    done, calls = node(f"--venv={value}", *settings)
    if not value:
        assert_refused(done, "gpu_node: error: --venv: expected a folder")
        return
    assert done.returncode == 0, done.stderr
    venv = f"./{value}" if value[0] in "-%" else value
    assert [call[0] for call in calls] == ["python3", *["python"] * 3]
    assert calls[0][1:] == ["-m", "venv", "--clear", venv]
    assert calls[1][1:4] == ["-m", "pip", "install"]
    assert calls[3][1:] == ["-m", "tnt_jax.train", *settings]
    shown, _ = node(f"--venv={value}", "--dry_run", *settings)
    line = shown.stdout.splitlines()[-1]
    words = subprocess.check_output(["bash", "-c", f"printf '%s\\0' {line}"]).decode().split("\0")
    assert words[-6:-1] == calls[3][1:]


def test_gpu_node_mends_an_environment_that_was_half_made(node, tmp_path):
    """Where a package lacks, Debian's venv fails, and leaves a Python without pip."""
    (tmp_path / "here" / "venv" / "bin").mkdir(parents=True)
    shutil.copy(tmp_path / "python3", tmp_path / "here" / "venv" / "bin" / "python")
    done, calls = node("--venv=venv", "--gin_file=a")
    assert done.returncode == 0, done.stderr
    assert calls[0] == ["python3", "-m", "venv", "--clear", "venv"]
    assert calls[1][:4] == ["python", "-m", "pip", "install"]


@pytest.mark.parametrize("value", hostile.VALUES)
def test_gpu_node_refuses_in_one_line(node, value):
    done, calls = node(f"--program={value}", "--gin_file=a")
    assert_refused(done, "gpu_node: error: --program: expected train, say, found ")
    assert calls == []
    if not value.startswith("--"):
        assert_refused(node(value)[0], "gpu_node: error: expected --NAME=VALUE, found ")


@pytest.mark.parametrize("value", hostile.VALUES)
def test_the_restart_loop_takes_hostile_values(tmp_path, value):
    loop = LAUNCH / "restart_loop.sh"
    for setting in ("--max_failures", "--pause"):
        done = bash(loop, f"{setting}={value}", "--", "true", cwd=tmp_path)
        assert_refused(done, "restart_loop.sh: expected ")
    assert_refused(bash(loop, f"--a={value}", "--", "true"), "restart_loop.sh: no setting --a=")
    done = bash(loop, f"--state_file={value}", "--", "true", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    states = [file.read_text() for file in tmp_path.iterdir()]
    assert states == (["finished 0\n"] if value else [])


def test_a_number_of_the_restart_loop_may_begin_with_zeros(tmp_path):
    done = bash(LAUNCH / "restart_loop.sh", "--max_failures=08", "--pause=00", "--", "false")
    assert (done.returncode, done.stderr) == (1, "")
    assert "9 times in a row: giving up" in done.stdout


# SLURM --------------------------------------------------------------------------------------------


@pytest.fixture
def cluster(tmp_path):
    """A project's folder, an environment of SLURM's, and commands that note their arguments."""
    project = tmp_path / "project"
    shutil.copytree(LAUNCH, project / "launch")
    (project / ".venv-gpu/bin").mkdir(parents=True)
    program(project / ".venv-gpu/bin", "exit 0", "python")
    (tmp_path / "bin").mkdir()
    program(
        tmp_path / "bin",
        'echo "srun ${TNT_JAX_DISTRIBUTED-} $*" >>"$CALLS"\n'
        'if [[ $STATUS == cancel ]]; then kill -TERM "$BATCH"; sleep 0.2; exit 75; fi\n'
        'exit "$STATUS"',
        "srun",
    )
    program(tmp_path / "bin", 'echo "scontrol $*" >>"$CALLS"', "scontrol")
    # sbatch runs a copy, elsewhere.
    copy = tmp_path / "spool_script"
    shutil.copy(LAUNCH / "slurm.sh", copy)

    def run(status, *arguments, **environment):
        done = bash(
            *("-c", 'export BATCH=$$; exec bash "$@"', "batch", copy, *arguments),
            cwd=tmp_path,
            **{
                "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
                "CALLS": str(tmp_path / "calls"),
                "STATUS": str(status),
                "SLURM_JOB_ID": "17",
                "SLURM_SUBMIT_DIR": str(project),
                "SLURM_NTASKS": "16",
                "SLURM_NTASKS_PER_NODE": "8",
                "SLURM_GPUS_ON_NODE": "8",
                **environment,
            },
        )
        calls = tmp_path / "calls"
        return done, calls.read_text().splitlines() if calls.exists() else []

    return run


ARGUMENTS = ["--gin_file=runs/train.gin", "--gin.MODEL_DIR=shared"]
SRUN = (
    "srun 1 --kill-on-bad-exit=0 --wait=0 .venv-gpu/bin/python -m tnt_jax.train "
    "--gin_file=runs/train.gin --gin.MODEL_DIR=shared"
)


@pytest.mark.parametrize(
    ("status", "expected", "calls"),
    [
        (0, 0, [SRUN]),
        (75, 75, [SRUN, "scontrol requeue 17"]),  # the time limit is near
        (2, 2, [SRUN]),
        (143, 143, [SRUN] * 3),  # ended by SIGTERM, and nothing is saved: a failure
        ("cancel", 75, [SRUN]),  # scancel: whoever cancels a job does not want it back
    ],
)
def test_slurm_queues_a_job_again_that_was_stopped(cluster, tmp_path, status, expected, calls):
    if status == 143:
        program(tmp_path / "bin", "exit 0", "sleep")  # between two starts
    done, made = cluster(status, *ARGUMENTS)
    assert (done.returncode, made) == (expected, calls), done.stdout + done.stderr


def test_slurm_gives_each_process_the_cores_that_were_asked_for(cluster):
    """srun takes --cpus-per-task from sbatch no more, since SLURM 22.05."""
    _, (call,) = cluster(0, *ARGUMENTS, SLURM_CPUS_PER_TASK="8")
    assert call == SRUN.replace("=0 .venv", "=0 --cpus-per-task=8 .venv")


def test_slurm_of_one_process_is_not_distributed(cluster):
    one = {"SLURM_NTASKS": "1", "SLURM_NTASKS_PER_NODE": "1", "SLURM_GPUS_ON_NODE": "1"}
    _, calls = cluster(0, *ARGUMENTS, **one)
    assert calls == [SRUN.replace("srun 1 ", "srun  ")]


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (ARGUMENTS, {"SLURM_JOB_ID": ""}, "expected a job of SLURM's"),
        ([], {}, "--gin_file: expected the files of a run"),
        (ARGUMENTS, {"VENV": "nowhere"}, "VENV: no nowhere/bin/python"),
        (ARGUMENTS, {"SLURM_GPUS_ON_NODE": "4"}, "expected a process for each GPU, found "),
        (ARGUMENTS, {"SLURM_SUBMIT_DIR": "/"}, "/ is not the project's folder"),
    ],
)
def test_slurm_refuses_in_one_line(cluster, arguments, environment, message):
    done, calls = cluster(0, *arguments, **environment)
    assert (done.returncode, calls) == (2, [])
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith(f"slurm: error: {message}")


@pytest.mark.parametrize("value", hostile.VALUES)
def test_slurm_takes_every_setting_as_it_is(cluster, tmp_path, value):
    program(tmp_path / "bin", NOTES, "srun")
    venv = tmp_path / "project" / (value or ".venv-gpu")
    if not (venv / "bin").exists():
        (venv / "bin").mkdir(parents=True)
        program(venv / "bin", "exit 0", "python")
    settings = ["--gin_file=a", f"--gin.A={value}", f"--gin_search_paths={value}", value]
    done, _ = cluster(0, *settings, VENV=value)
    assert done.returncode == 0, done.stderr
    python = f"{value or '.venv-gpu'}/bin/python"
    python = f"./{python}" if value.startswith("-") else python
    (call,) = calls_of(tmp_path / "calls")
    options = ["--kill-on-bad-exit=0", "--wait=0"]
    assert call == ["srun", *options, python, "-m", "tnt_jax.train", *settings]
    assert not list(tmp_path.rglob("hacked"))


@pytest.mark.parametrize("value", [value for value in hostile.VALUES if value])
@pytest.mark.parametrize("name", ["VENV", "PROGRAM"])
def test_slurm_refuses_hostile_values_in_one_line(cluster, name, value):
    done, calls = cluster(0, *ARGUMENTS, **{name: value})
    assert_refused(done, f"slurm: error: {name}: ")
    assert calls == []


# The image ----------------------------------------------------------------------------------------


def test_the_image_copies_what_is_there_and_installs_what_setup_py_has():
    text = (ROOT / "Dockerfile").read_text("utf-8")
    allowed = {
        line.removeprefix("!")
        for line in (ROOT / ".dockerignore").read_text("utf-8").splitlines()
        if line.startswith("!")
    }
    copied = [
        source
        for line in re.findall(r"^COPY (.+)$", text, re.MULTILINE)
        for source in line.split()[:-1]
    ]
    assert copied
    for source in copied:
        assert (ROOT / source).exists(), source
        assert pathlib.Path(source).parts[0] in allowed, f".dockerignore keeps {source} away"
    (extra,) = re.findall(r"^ARG ACCELERATOR=(\w+)$", text, re.MULTILINE)
    setup = (ROOT / "setup.py").read_text("utf-8")
    extras = re.findall(r'^        "(\w+)": \[', setup, re.MULTILINE)
    assert {extra, "gpu", "tpu"} <= set(extras)
    entry = re.search(r'^ENTRYPOINT \["(\S+?)"', text, re.MULTILINE)[1]
    assert os.access(ROOT / entry, os.X_OK)


# The pages ----------------------------------------------------------------------------------------

PAGE = (ROOT / "docs/launch.md").read_text("utf-8")


def commands_of(page, program=""):
    """What stands in a page's indented blocks, each command on one line."""
    lines = page.replace("\\\n", " ").splitlines()
    return [line.strip() for line in lines if line.startswith(f"    {program}") and line.strip()]


README = (ROOT / "README.md").read_text("utf-8")
SCRIPT_COMMANDS = [
    command
    for command in dict.fromkeys([*commands_of(PAGE), *commands_of(README)])
    if re.match(r"launch/\w+\.sh ", command)
]


@pytest.mark.parametrize("command", commands_of(PAGE, "python -m tnt_jax"))
def test_the_page_names_gin_files_that_are_there(command):
    for file in re.findall(r"--gin_file=(\S+)", command):
        assert (ROOT / "gin_configs" / file).is_file()


@pytest.mark.parametrize("command", SCRIPT_COMMANDS)
def test_the_pages_commands_are_taken(command, tmp_path):
    """A dry run: the commands cost money, or want a GPU. SLURM's are in the tests above."""
    # tpu_vm.sh sends a commit of a repository: of this tree, whatever state it is in.
    for name in ("launch", "gin_configs", ".ci"):
        shutil.copytree(ROOT / name, tmp_path / name)
    (tmp_path / "setup.py").touch()
    identity = ["-c", "user.name=tests", "-c", "user.email=tests@localhost"]
    for step in (["init", "-q"], ["add", "-A"], [*identity, "commit", "-q", "-m", "all"]):
        subprocess.run(["git", *step], cwd=tmp_path, check=True)
    done = bash("-c", f"{command} --dry_run", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout


def test_xpk_starts_again_what_one_lost_host_ended():
    """xpk ends a job for good whose status is not named; a usage error is to end it."""
    (command,) = commands_of(PAGE, "xpk workload create")
    codes = re.search(r"--restart-on-exit-codes=(\S+)", command)[1].split(",")
    lost = failures.exit_status(errors.ProcessLost("a host is gone"))
    mistaken = failures.exit_status(errors.UsageError("a setting is wrong"))
    assert {str(lost), str(preemption.EXIT_STATUS)} <= {*codes}
    assert str(mistaken) not in codes


def test_the_pages_table_is_that_of_the_compiled_programs():
    def cells(line):
        return [cell.strip() for cell in line.strip("| \n").split("|")]

    compiled = {}
    for line in (ROOT / "docs/tpu_memory.md").read_text("utf-8").splitlines():
        found = cells(line)
        if len(found) > 10 and "billion" in found[0]:
            size = found[0].split(",")[0].removeprefix("T5 1.1 ")
            topology, kind, total = found[1], found[3], found[9]
            kind = kind.replace("adapters_off", "adapters")
            compiled.setdefault((size, topology, kind), float(total))  # the first table's
    rows = [cells(line) for line in PAGE.splitlines() if line.startswith("| ")]
    (topologies,) = [row[1:] for row in rows if row[0] == "`--topology`"]
    num_numbers = 0
    for size, *entries in rows:
        for topology, entry in zip(topologies, entries, strict=False):
            if number := re.fullmatch(r"([\d.]+)(?: \((\w+)\))?", entry):
                if size == "memory of a chip":
                    continue
                total = compiled[size, topology, number[2] or "parameters"]
                assert float(number[1]) == pytest.approx(total, abs=0.051), (size, topology)
                num_numbers += 1
    assert num_numbers > 15
