"""launch/tpu_vm.sh against a gcloud that plays failures; what it runs on hosts runs here."""

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
from helpers import fake_gcloud, hostile

ROOT = pathlib.Path(__file__).parents[2]
FAKES = ROOT / "tests" / "helpers"

pytestmark = [
    pytest.mark.skipif(
        not pathlib.Path("/proc/self/environ").exists(), reason="needs Linux's /proc"
    ),
    *(
        pytest.mark.skipif(shutil.which(tool) is None, reason=f"needs {tool}")
        for tool in ("bash", "git", "flock", "setsid", "tar")
    ),
]

ACTIVE = {"state": "ACTIVE"}
WAITING = {"state": "WAITING_FOR_RESOURCES"}
SETTINGS = (
    *("--name=mine", "--project=the-project", "--zone=us-central1-a", "--bucket=mine"),
    *("--accelerator_type=v5litepod-8", "--gin_file=runs/train.gin", "--poll_seconds=0"),
)
HERE = SETTINGS[:3]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A clone with what a launch needs, all of it committed."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("launch", "gin_configs"):
        shutil.copytree(ROOT / name, folder / name)
    identity = ["-c", "user.name=tests", "-c", "user.email=tests@localhost"]
    for command in (["init", "-q"], ["add", "-A"], [*identity, "commit", "-q", "-m", "all"]):
        subprocess.run(["git", *command], cwd=folder, check=True)
    return folder


# A suite in the background of a shell has Ctrl-C ignored, and so would what it starts.
HEARS_CTRL_C = (
    "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); "
    "os.execvp(sys.argv[1], sys.argv[1:])"
)


class Cloud:
    """The world of fake_gcloud.py, and a user in front of it."""

    def __init__(self, folder, checkout):
        self.folder, self.checkout = folder, checkout
        self.started = None
        (folder / "bin").mkdir()
        (folder / "bin/gcloud").write_text(
            f'#!/bin/sh\nexec {sys.executable} -I -S {FAKES / "fake_gcloud.py"} "$@"\n'
        )
        (folder / "bin/gcloud").chmod(0o755)
        (folder / "bin/uv").symlink_to(FAKES / "fake_host.sh")
        (folder / "program").write_text("0\n")
        self.user = folder / "user"
        self.user.mkdir()
        self.set()

    def set(self, **world):
        before = {
            **{"resource": None, "node": None, "generation": 0, "hosts": 1, "plays": []},
            **{"states": [ACTIVE], "later_states": [ACTIVE]},
        }
        if (self.folder / "world.json").exists():
            before = self.world()
        (self.folder / "world.json").write_text(json.dumps(before | world))

    def world(self):
        return json.loads((self.folder / "world.json").read_text())

    def calls(self, action=None):
        file = self.folder / "calls.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        calls = [json.loads(line) for line in lines]
        return [call for call in calls if action is None or action in " ".join(call)]

    def command(self, *arguments):
        return ["bash", str(self.checkout / "launch/tpu_vm.sh"), *arguments]

    @property
    def environment(self):
        return {
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
            "HOME": str(self.user),
            "FAKE_GCLOUD": str(self.folder),
        }

    def run(self, *arguments, **environment):
        return subprocess.run(
            self.command(*arguments),
            env=self.environment | environment,
            cwd=self.user,
            capture_output=True,
            text=True,
            timeout=240,
        )

    def start(self, log, *arguments):
        """Does not wait; the output goes to a file."""
        with log.open("w") as output:
            self.started = subprocess.Popen(
                [sys.executable, "-c", HEARS_CTRL_C, *self.command(*arguments)],
                env=self.environment,
                cwd=self.user,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return self.started

    def shorten_pauses(self):
        """Makes `sleep` on the hosts take no time."""
        (self.folder / "bin/sleep").write_text("#!/bin/sh\nexec /bin/sleep 0.01\n")
        (self.folder / "bin/sleep").chmod(0o755)

    def up(self, *arguments):
        return self.run("up", *SETTINGS, *arguments)

    def hosts(self, generation=1):
        return sorted((self.folder / "hosts" / str(generation)).iterdir())

    def starts(self, generation=1, worker=0):
        """(working directory, TNT_JAX_DISTRIBUTED, arguments) of each start of the program."""
        file = self.hosts(generation)[worker] / "ran"
        lines = file.read_text().splitlines() if file.exists() else []
        return [tuple(line.split("|")) for line in lines]


@pytest.fixture
def cloud(tmp_path, checkout):
    made = Cloud(tmp_path, checkout)
    yield made
    if made.started and made.started.poll() is None:
        os.killpg(made.started.pid, signal.SIGKILL)
        made.started.wait()
    fake_gcloud.end_processes(tmp_path / "hosts")


def wait_until(condition):
    for _ in range(2400):
        if condition():
            return
        time.sleep(0.1)
    raise AssertionError("it did not come to that within four minutes")


# What is refused before anything costs ------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["up"],
            "up needs --name (or TPU_NAME), --project (or PROJECT), --zone (or ZONE), "
            "--accelerator_type (or ACCELERATOR_TYPE), --bucket (or BUCKET), --gin_file; ",
        ),
        (["down", *HERE[:1]], "down needs --project (or PROJECT), --zone (or ZONE); "),
        (["start"], "expected up, logs, status or down, found start; "),
        (["up", *SETTINGS, "--gin_fil=x"], "no setting --gin_fil; "),
        (["up", *SETTINGS, "--name=My TPU"], "--name: expected small letters, "),
        (["up", *SETTINGS, "--provisioning=cheap"], "--provisioning: expected on-demand, "),
        (["up", *SETTINGS, "--accelerator_type=h100-8"], "--runtime_version: none is known for "),
        (
            ["up", *SETTINGS, "--gin_file=runs/trian.gin"],
            "--gin_file: expected a file, found runs/trian.gin, which is neither in commit ",
        ),
        (["up", *SETTINGS, "--gin_file=runs"], "--gin_file: expected a file, found runs, "),
        (["up", *SETTINGS, "--gin_file="], "--gin_file: expected a file, found nothing, "),
        (["up", *SETTINGS, "--commit=fffffff"], "--commit: no such commit here"),
        (["up", *SETTINGS, "--gin.RECORDS=mine.jsonl"], "--gin.RECORDS: mine.jsonl is on this "),
        (["up", *SETTINGS, "--bucket=other"], "--bucket: gs://other cannot be listed, "),
    ],
)
def test_mistakes_are_refused_in_one_line(cloud, arguments, message):
    (cloud.user / "mine.jsonl").touch()
    done = cloud.run(*arguments)
    assert done.returncode == 2
    own_lines = [line for line in done.stderr.splitlines() if not line.startswith("ERROR: ")]
    assert len(own_lines) == 1
    assert own_lines[0].startswith(f"tpu_vm: error: {message}")
    assert cloud.calls("queued-resources") == []


@pytest.mark.parametrize("name", ["STATES_DIR", "EXAMPLES_DIR", "PROFILE_DIR", "MODEL_DIR"])
def test_a_folder_to_write_to_may_be_on_this_machine_as_well(cloud, name):
    setting = f"--gin.{name}={cloud.user}"
    done = cloud.up(setting, "--dry_run")
    assert (done.returncode, done.stderr) == (0, "")
    assert setting in done.stdout


def test_changes_that_are_not_committed_are_refused_or_left_out(cloud, checkout, tmp_path):
    changed = tmp_path / "changed"
    shutil.copytree(checkout, changed)
    (changed / "gin_configs/runs/train.gin").write_text("SEED = 1\n")
    cloud.checkout = changed
    assert "there are changes that are not committed" in cloud.up().stderr
    assert cloud.up("--commit=HEAD").returncode == 0
    (tree,) = cloud.hosts()[0].glob("tnt_jax_launch/code/*")
    sent = (tree / "gin_configs/runs/train.gin").read_bytes()
    assert sent == (checkout / "gin_configs/runs/train.gin").read_bytes()


def test_files_that_are_in_no_commit_are_refused_or_left_out(cloud, checkout, tmp_path):
    changed = tmp_path / "changed"
    shutil.copytree(checkout, changed)
    (changed / "tnt_jax").mkdir()
    for number in range(7):
        (changed / f"tnt_jax/new_{number}.py").touch()
    (changed / "notes.txt").touch()  # no program reads it
    cloud.checkout = changed
    done = cloud.up()
    assert done.returncode == 2
    assert done.stderr.startswith(
        "tpu_vm: error: expected every file of tnt_jax and gin_configs in a commit, found "
        "tnt_jax/new_0.py tnt_jax/new_1.py tnt_jax/new_2.py tnt_jax/new_3.py tnt_jax/new_4.py ...: "
    )
    assert cloud.up("--commit=HEAD", "--dry_run").returncode == 0
    shutil.rmtree(changed / "tnt_jax")
    (changed / "gin_configs/mine.gin").touch()
    assert "found gin_configs/mine.gin: add and commit, " in cloud.up().stderr
    (changed / "gin_configs/mine.gin").unlink()
    assert cloud.up("--dry_run").returncode == 0


def test_an_own_gin_file_goes_before_the_projects_of_its_name(cloud, checkout, tmp_path):
    """The programs look for a gin file in the working directory first."""

    def sent(text):
        (cloud.user / "runs/train.gin").write_text(text)
        return re.findall(r"--gin_file=([\w./]+)", cloud.up("--dry_run").stdout)

    (cloud.user / "runs").mkdir()
    assert sent("SEED = 3\n") == ["own/1/train.gin"]
    assert sent((checkout / "gin_configs/runs/train.gin").read_text()) == ["runs/train.gin"]
    changed = tmp_path / "changed"  # not committed: the commit's is what was asked for
    shutil.copytree(checkout, changed)
    (changed / "gin_configs/runs/train.gin").write_text("SEED = 3\n")
    cloud.checkout, cloud.user = changed, changed / "gin_configs"
    assert re.findall(r"--gin_file=([\w./]+)", cloud.up("--dry_run", "--commit=HEAD").stdout) == [
        "runs/train.gin"
    ]


def test_nothing_of_a_launch_that_was_killed_is_sent(cloud):
    tree = cloud.user / ".local/state/tnt_jax/tpu_vm/the-project.us-central1-a.mine.code/tree"
    (tree / "launch").mkdir(parents=True)
    (tree / "launch/of_another_commit.sh").touch()
    assert cloud.up().returncode == 0
    (sent,) = cloud.hosts()[0].glob("tnt_jax_launch/code/*")
    assert (sent / "launch/host.sh").exists()
    assert not (sent / "launch/of_another_commit.sh").exists()


# Values that a shell might take for something else ------------------------------------------------

REFUSED = (
    *("name", "project", "zone", "bucket", "accelerator_type", "provisioning", "commit", "program"),
    *("lines", "worker", "poll_seconds", "gin_file"),
)


@pytest.mark.parametrize("value", [value for value in hostile.VALUES if value])
def test_values_that_cannot_be_are_refused_in_one_line(cloud, value):
    for flag in REFUSED:
        for arguments in ([f"--{flag}={value}"], [f"--{flag}", value]):
            done = cloud.up(*arguments)
            assert (done.returncode, done.stdout) == (2, ""), (flag, done.stderr)
            assert done.stderr.startswith("tpu_vm: error: --")
            assert done.stderr.removesuffix("\n").isprintable()
    if not value.startswith("--"):
        done = cloud.up(value)
        assert done.stderr.startswith("tpu_vm: error: expected --NAME=VALUE, found ")
        assert done.stderr.removesuffix("\n").isprintable()
    assert cloud.calls() == []
    assert not list(cloud.folder.rglob("hacked"))


def test_hostile_values_arrive_as_they_are(cloud):
    values = hostile.VALUES
    settings = [f"--gin.A{number}={value}" for number, value in enumerate(values)]
    own = [value for value in values if value not in ("", "~")]
    for value in own:
        (cloud.user / value).write_text(f"# {value}\n")
    done = cloud.up(
        *(f"--gin_file={value}" for value in own),
        *settings,
        "--gin.B=a --gin.MODEL_DIR=b",  # a value, and no folder
        *(f"--create_flag=--description={value}" for value in values),
        *(f"--ssh_flag=--ssh-key-file={value}" for value in values),
        *("--accelerator_type=$(touch hacked) 'x", '--runtime_version=a "b"\nc'),
    )
    assert done.returncode == 0, done.stderr
    host = cloud.hosts()[0]
    assert (host / "arguments").read_bytes().decode().split("\0")[:-1] == [
        *("-m", "tnt_jax.train", "--gin_file=runs/train.gin"),
        *(f"--gin_file=own/{number}/{value}" for number, value in enumerate(own, start=1)),
        "--gin.MODEL_DIR=gs://mine/mine",
        *settings,
        "--gin.B=a --gin.MODEL_DIR=b",
    ]
    (tree,) = host.glob("tnt_jax_launch/code/*")
    for number, value in enumerate(own, start=1):
        assert (tree / f"own/{number}" / value).read_bytes().decode() == f"# {value}\n"
    (create,) = cloud.calls("queued-resources create")
    assert [f"--description={value}" for value in values] == [
        word for word in create if word.startswith("--description=")
    ]
    assert {"--accelerator-type=$(touch hacked) 'x", '--runtime-version=a "b"\nc'} <= {*create}
    for call in cloud.calls("tpu-vm s"):
        assert [word for word in call if word.startswith("--ssh-key-file=")] == [
            f"--ssh-key-file={value}" for value in values
        ]
    assert not list(cloud.folder.rglob("hacked"))
    assert (
        "it is done already"
        in cloud.up(
            *(f"--gin_file={value}" for value in own), *settings, "--gin.B=a --gin.MODEL_DIR=b"
        ).stdout
    )


# A run without incidents --------------------------------------------------------------------------


def test_up_names_the_place_where_the_program_writes(cloud):
    cloud.set(states=[ACTIVE])
    done = cloud.up("--gin.MODEL_DIR=gs://other/run")
    assert done.stdout.splitlines()[-2] == "tpu_vm: Done: gs://other/run."


def test_up_installs_the_commit_runs_the_program_and_stays(cloud, checkout):
    cloud.set(states=[WAITING, {"state": "PROVISIONING"}, ACTIVE])
    done = cloud.up("--gin.TRAIN_STEPS=20", "--gin.RECORDS=gs://mine/a b's.jsonl")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-2] == "tpu_vm: Done: gs://mine/mine."
    assert "update 1 of host-0" in done.stdout  # the log
    head = ["git", "-C", str(checkout), "rev-parse", "HEAD"]
    code = subprocess.check_output(head, text=True)[:12]
    tree = cloud.hosts()[0] / "tnt_jax_launch/code" / code
    arguments = (
        "-m tnt_jax.train --gin_file=runs/train.gin --gin.MODEL_DIR=gs://mine/mine "
        "--gin.TRAIN_STEPS=20 --gin.RECORDS=gs://mine/a b's.jsonl"
    )
    assert cloud.starts() == [(str(tree), "", arguments)]
    assert "[tpu,hub]" in (cloud.hosts()[0] / "installed").read_text()
    for file in checkout.glob("launch/*"):
        assert (tree / "launch" / file.name).read_bytes() == file.read_bytes()
    assert cloud.calls("queued-resources delete") == []
    assert cloud.world()["node"]["state"] == "READY"


def test_up_again_finds_what_is_done(cloud):
    assert cloud.up().returncode == 0
    again = cloud.up()
    assert again.returncode == 0
    assert "it is done already" in again.stdout
    assert len(cloud.starts()) == 1
    assert len(cloud.calls("queued-resources create")) == 1


def test_down_deletes_once_and_then_finds_nothing(cloud):
    assert cloud.up().returncode == 0
    assert "mine was deleted" in cloud.run("down", *HERE).stdout
    assert cloud.world()["resource"] is None
    again = cloud.run("down", *HERE)
    assert (again.returncode, again.stderr) == (0, "")
    assert "nothing to delete" in again.stdout
    assert len(cloud.calls("queued-resources delete")) == 1


def test_the_tpu_goes_when_the_run_is_done_on_request(cloud):
    assert cloud.up("--down_when_done").returncode == 0
    assert cloud.world()["resource"] is None


def test_a_dry_run_prints_the_calls_of_a_run_and_makes_none(cloud):
    def without_id(text):
        return re.sub(r"tnt_jax_launch=[0-9a-f]{16}", "tnt_jax_launch=ID", text)

    dry = cloud.run("up", *SETTINGS, "--dry-run", "--provisioning=spot", "--gin.A='b c'")
    assert (dry.returncode, dry.stderr) == (0, "")
    assert cloud.calls() == []
    assert not (cloud.user / ".local").exists()
    assert cloud.up("--provisioning=spot", "--gin.A='b c'").returncode == 0
    made = [["gcloud", *call] for call in cloud.calls()]
    shown = [
        subprocess.run(["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, text=True)
        for line in dry.stdout.splitlines()
        if line.startswith("gcloud ")
    ]
    shown = [each.stdout.split("\0")[:-1] for each in shown]
    assert without_id(json.dumps(shown)) == without_id(json.dumps(made))
    assert sum("--spot" in call for call in made) == 1


@pytest.mark.parametrize(
    ("accelerator_type", "provisioning", "flags"),
    [
        ("v5litepod-16", "on-demand", {"--runtime-version=v2-alpha-tpuv5-lite"}),
        ("v5p-8", "reserved", {"--runtime-version=v2-alpha-tpuv5", "--reserved"}),
        ("v6e-8", "spot", {"--runtime-version=v2-alpha-tpuv6e", "--spot"}),
        ("v4-8", "on-demand", {"--runtime-version=tpu-ubuntu2204-base"}),
    ],
)
def test_what_is_asked_for(cloud, accelerator_type, provisioning, flags):
    done = cloud.up(
        *(f"--accelerator-type={accelerator_type}", f"--provisioning={provisioning}"),
        *("--create_flag=--network=other", "--dry_run"),
    )
    (line,) = [line for line in done.stdout.splitlines() if "queued-resources create" in line]
    given = {word for word in line.split() if word.startswith("--")}
    assert flags | {f"--accelerator-type={accelerator_type}", "--network=other"} <= given
    assert ("--spot" in given, "--reserved" in given) == (
        provisioning == "spot",
        provisioning == "reserved",
    )


def test_labels_of_ones_own_go_beside_ours(cloud):
    """gcloud takes the last --labels alone; without ours nothing would ever be deleted."""
    flags = ("--create_flag=--labels=team=a", "--create_flag=--labels=cost=b")
    assert cloud.up(*flags).returncode == 0
    labels = cloud.world()["resource"]["tpu"]["nodeSpec"][0]["node"]["labels"]
    assert {"team": "a", "cost": "b"}.items() < labels.items()
    assert cloud.run("down", *HERE).returncode == 0
    assert cloud.world()["resource"] is None


def test_a_host_that_is_gone_is_not_waited_for(cloud):
    assert cloud.up().returncode == 0
    for call in cloud.calls("tpu-vm s"):
        assert any(re.match("--s(sh|cp)-flag=.*ConnectTimeout=", word) for word in call), call


def test_the_input_of_whoever_calls_is_left_alone(cloud):
    """ssh reads what it gets, and would end a loop over lines after the first."""
    assert cloud.up().returncode == 0
    loop = 'while read -r line; do "$@" >/dev/null; echo "$line"; done'
    done = subprocess.run(
        ["bash", "-c", loop, "loop", *cloud.command("status", *HERE)],
        env=cloud.environment,
        input="first\nsecond\n",
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.stdout == "first\nsecond\n"


def test_a_host_without_a_log(cloud):
    assert cloud.up().returncode == 0
    (cloud.hosts()[0] / "tnt_jax_host.sh").unlink()
    done = cloud.run("logs", *HERE)
    assert done.returncode == 1
    assert "tpu_vm: error: no log of mine from worker 0, see above; " in done.stderr


def test_own_gin_files_are_sent(cloud):
    (cloud.user / "mine.gin").write_text("SEED = 3\n")
    assert cloud.up("--gin_file=mine.gin").returncode == 0
    ((folder, _, arguments),) = cloud.starts()
    (given,) = re.findall(r"--gin_file=(own\S+)", arguments)
    assert (pathlib.Path(folder) / given).read_text() == "SEED = 3\n"


def test_an_own_gin_file_that_was_renamed_is_sent_again(cloud):
    (cloud.user / "mine.gin").write_text("SEED = 3\n")
    assert cloud.up("--gin_file=mine.gin").returncode == 0
    (cloud.user / "mine.gin").rename(cloud.user / "ours.gin")
    assert cloud.up("--gin_file=ours.gin").returncode == 0
    for (folder, _, arguments), name in zip(cloud.starts(), ("mine", "ours"), strict=True):
        assert f"--gin_file=own/1/{name}.gin" in arguments
        assert (pathlib.Path(folder) / f"own/1/{name}.gin").read_text() == "SEED = 3\n"


def test_a_folder_of_a_bucket_may_be_empty_still(cloud):
    done = cloud.up("--bucket=gs://mine/runs/")
    assert done.returncode == 0, done.stderr
    assert "--gin.MODEL_DIR=gs://mine/runs/mine" in cloud.starts()[0][2]


def test_settings_may_come_from_the_environment(cloud):
    done = cloud.run(
        *("up", "--poll_seconds=0"),
        **{"TPU_NAME": "mine", "PROJECT": "the-project", "ZONE": "us-central1-a"},
        **{"ACCELERATOR_TYPE": "v6e-8", "BUCKET": "gs://mine", "GIN_FILE": "runs/train.gin"},
    )
    assert done.returncode == 0, done.stderr
    assert "--gin.MODEL_DIR=gs://mine/mine" in cloud.starts()[0][2]


# What goes wrong ----------------------------------------------------------------------------------

QUOTA = {
    "at": "queued-resources create",
    "do": "refuse",
    "message": "RESOURCE_EXHAUSTED: Quota limit 'TPUV5sLitepodPerProject' has been exceeded.",
}


def test_quota_that_is_not_there(cloud):
    cloud.set(plays=[QUOTA] * 5)
    done = cloud.up()
    assert done.returncode == 1
    assert "Quota limit" in done.stderr
    assert "three times gcloud could not create mine, see above. Nothing runs." in done.stderr
    assert len(cloud.calls("queued-resources create")) == 3
    assert cloud.calls("delete") == cloud.calls("tpu-vm ssh") == []


def test_quota_that_comes_back(cloud):
    cloud.set(plays=[QUOTA] * 2)
    assert cloud.up().returncode == 0
    assert len(cloud.starts()) == 1


def test_a_request_that_fails(cloud):
    failed = {"state": "FAILED", "failedData": {"error": {"message": "no | capacity"}}}
    cloud.set(states=[WAITING, failed])
    done = cloud.up()
    assert done.returncode == 1
    assert "the request for mine failed three times: no | capacity. Nothing runs." in done.stderr
    assert len(cloud.calls("queued-resources create")) == 3


def test_preempted_half_way_it_is_created_again_and_goes_on(cloud):
    cloud.set(plays=[{"at": "follow", "do": "preempt"}], later_states=[WAITING, ACTIVE])
    (cloud.folder / "program.1").write_text("hold\n")
    done = cloud.up("--provisioning=spot", "--gin.TRAIN_STEPS=20")
    assert done.returncode == 0, done.stderr
    assert "mine was preempted: it is created again." in done.stdout
    first, second = cloud.calls("queued-resources create")
    assert first == second
    assert len(cloud.calls("queued-resources delete")) == 1
    # The same program with the same settings, on a machine that had nothing of the first.
    assert cloud.starts(1) == [
        (where.replace("/2/", "/1/"), *rest) for where, *rest in cloud.starts(2)
    ]
    assert len(cloud.starts(2)) == 1


def test_requests_that_fail_now_and_then_in_a_long_life(cloud):
    failure = {"at": "queued-resources list", "do": "fail"}
    preemption = {"at": "follow", "do": "preempt"}
    cloud.set(plays=[failure | {"skip": 1}, *[preemption, failure | {"skip": 4}] * 3])
    (cloud.folder / "program").write_text("hold\n")
    for generation in (4, 5):
        (cloud.folder / f"program.{generation}").write_text("0\n")
    done = cloud.up()
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("the request for mine failed: it is created again") == 4
    assert done.stdout.count("mine was preempted") == 3


@pytest.mark.parametrize(
    "trouble",
    [
        {"at": "tpu-vm list", "do": "refuse", "message": "503", "skip": 2},
        {"at": "queued-resources delete", "do": "refuse", "message": "503"},
        {"at": "queued-resources create", "do": "refuse", "message": "503", "skip": 1},
        {"at": "queued-resources delete", "do": "linger"},  # the TPU goes later than its request
    ],
)
def test_trouble_while_it_is_created_again(cloud, trouble):
    cloud.set(plays=[{"at": "follow", "do": "preempt"}, trouble])
    (cloud.folder / "program.1").write_text("hold\n")
    done = cloud.up()
    assert done.returncode == 0, done.stderr
    assert cloud.world()["plays"] == []
    assert len(cloud.starts(2)) == 1


def test_what_is_listed_late_was_not_deleted(cloud):
    late = {"at": "queued-resources list", "do": "hide"}
    cloud.set(plays=[late | {"skip": 1}, late])
    done = cloud.up()
    assert done.returncode == 0, done.stderr
    assert len(cloud.calls("queued-resources create")) == 1


def test_what_is_listed_without_a_state_is_there(cloud):
    cloud.set(states=[{}, ACTIVE])
    done = cloud.up()
    assert done.returncode == 0, done.stderr
    assert len(cloud.calls("queued-resources create")) == 1
    cloud.set(resource=cloud.world()["resource"] | {"state": {}})
    assert "mine was deleted" in cloud.run("down", *HERE).stdout
    assert cloud.world()["resource"] is None


def test_hosts_that_end_later_than_the_first(cloud):
    """`host.sh result` waits a minute for them, which is short here."""
    cloud.shorten_pauses()
    (cloud.folder / "program.host-1").write_text("hold\n")
    cloud.set(hosts=2)
    log = cloud.folder / "up.log"
    up = cloud.start(log, "up", *SETTINGS)
    wait_until(lambda: "host-1: running" in log.read_text())
    (cloud.folder / "release").touch()
    assert up.wait(timeout=240) == 0, log.read_text()
    assert [len(cloud.starts(worker=worker)) for worker in (0, 1)] == [1, 1]
    assert "What other workers still do is ended" not in log.read_text()


def test_preempted_before_anything_ran(cloud):
    cloud.set(plays=[{"at": "install mine", "do": "preempt"}])
    assert cloud.up().returncode == 0
    assert len(cloud.calls("queued-resources create")) == 2


def test_one_host_that_cannot_be_reached_at_first(cloud):
    unreachable = {"at": "install mine", "do": "refuse", "worker": 2}
    cloud.set(hosts=3, plays=[unreachable] * 2)
    done = cloud.up()
    assert done.returncode == 0, done.stderr
    starts = [cloud.starts(worker=worker) for worker in range(3)]
    assert [len(each) for each in starts] == [1, 1, 1]
    assert {start[1] for (start,) in starts} == {"1"}, "several hosts: TNT_JAX_DISTRIBUTED=1"
    assert len({start[2] for (start,) in starts}) == 1
    # Installed once where it worked at once, and nobody started before all were there.
    calls = [call[-1] for call in cloud.calls("tpu-vm ssh")]
    kinds = [re.search(r"tnt_jax_host.sh (\w+)", call)[1] for call in calls]
    assert kinds == ["install"] * 3 + ["start", "follow", "result"]
    assert [len((h / "installed").read_text().splitlines()) for h in cloud.hosts()] == [1, 1, 1]


def test_one_host_that_can_never_be_reached(cloud):
    cloud.set(hosts=2, plays=[{"at": "install mine", "do": "refuse", "worker": 1}] * 9)
    done = cloud.up()
    assert done.returncode == 1
    assert "five times it could not be installed on every host" in done.stderr
    assert "tpu_vm.sh down --name=mine" in done.stderr
    assert cloud.starts(worker=0) == []
    assert cloud.calls("delete") == []


def test_starts_that_fail_now_and_then_in_a_long_life(cloud):
    """Five in a row would be too many."""
    lost = {"at": "follow", "do": "refuse"}
    unstarted = {"at": "start mine", "do": "refuse", "skip": 1}
    cloud.set(plays=[lost, unstarted] * 5)
    done = cloud.up()
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("It did not start on every host") == 5


def test_what_went_wrong_on_a_tpu_that_is_gone_is_forgotten(cloud):
    uninstalled = {"at": "install mine", "do": "refuse"}
    preempted = {"at": "tpu-vm list", "do": "preempt", "skip": 5}
    cloud.set(plays=[*[uninstalled] * 8, preempted])
    done = cloud.up()
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("It could not be installed on every host") == 8
    assert len(cloud.starts(2)) == 1


def test_a_host_that_was_repaired_is_installed_again(cloud):
    repaired = {"at": "start mine", "do": "repair", "worker": 1}
    cloud.set(hosts=2, plays=[repaired])
    done = cloud.up()
    assert done.returncode == 0, done.stderr
    assert [len(cloud.starts(worker=worker)) for worker in (0, 1)] == [1, 1]


def test_a_run_that_fails_is_not_tried_for_ever(cloud):
    (cloud.folder / "program").write_text("2\n")
    done = cloud.up()
    assert done.returncode == 1
    assert "the run failed, its log is above." in done.stderr
    assert "status 2, which is final" in done.stdout
    assert len(cloud.starts()) == 1
    assert cloud.world()["node"] is not None


def test_a_run_that_was_stopped_and_has_saved_goes_on(cloud):
    (cloud.folder / "program").write_text("75\n75\n0\n")
    done = cloud.up()
    assert done.returncode == 0
    assert len(cloud.starts()) == 3


def test_hosts_that_restart_go_on(cloud):
    """SIGTERM ends the restart loops, as a machine that goes down does; the TPU is still there."""
    cloud.set(hosts=2, plays=[{"at": "follow", "do": "terminate"}])
    (cloud.folder / "program").write_text("hold\n0\n")
    done = cloud.up()
    assert done.returncode == 0, done.stderr
    assert "finished 75" in done.stdout
    assert [len(cloud.starts(worker=worker)) for worker in (0, 1)] == [2, 2]
    assert len(cloud.calls("queued-resources create")) == 1


@pytest.mark.parametrize("worker", [0, 1])
def test_one_host_that_restarts_joins_the_others_again(cloud, worker):
    """The others run, and look for it in vain until it is started again."""
    cloud.shorten_pauses()
    cloud.set(hosts=2, plays=[{"at": "follow", "do": "reboot", "worker": worker}])
    (cloud.folder / "program").write_text("hold\n")
    log = cloud.folder / "up.log"
    up = cloud.start(log, "up", *SETTINGS)
    wait_until(lambda: "update 2 of host-0" in log.read_text())
    wait_until(lambda: len(cloud.starts(worker=1)) == 2)
    (cloud.folder / "release").touch()
    assert up.wait(timeout=240) == 0, log.read_text()
    assert [len(cloud.starts(worker=each)) for each in (0, 1)] == [2, 2]


@pytest.mark.parametrize("left", ["2", "hold"])
def test_the_first_hosts_end_is_the_runs(cloud, left):
    """Another one failed while it ended; started again alone, it could never meet the others."""
    cloud.shorten_pauses()
    cloud.set(hosts=2)
    (cloud.folder / "program.host-1").write_text(f"{left}\n")
    for _ in range(2):
        done = cloud.up()
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-2] == "tpu_vm: Done: gs://mine/mine."
    assert [len(cloud.starts(worker=worker)) for worker in (0, 1)] == [1, 1]
    assert fake_gcloud.processes_of(cloud.folder / "hosts") == {}


def test_gcloud_that_fails_for_a_while(cloud):
    outage = {"do": "refuse", "message": "no route to host"}
    cloud.set(
        plays=[
            {"at": "follow", "do": "refuse"},
            outage | {"at": "queued-resources list", "skip": 2},
            *[outage | {"at": "queued-resources list"}] * 3,
        ]
    )
    done = cloud.up()
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("no route to host") == 4
    assert len(cloud.starts()) == 1
    assert len(cloud.calls("create")) == 1


def test_gcloud_that_fails_at_once(cloud):
    cloud.set(plays=[{"at": "queued-resources list", "do": "refuse", "message": "no login"}])
    done = cloud.up()
    assert done.returncode == 1
    assert "no login" in done.stderr and "gcloud could not be asked what there is" in done.stderr
    assert cloud.calls("create") == []


# Whose it is --------------------------------------------------------------------------------------


def foreign(labels):
    return {
        "name": "projects/the-project/locations/us-central1-a/queuedResources/mine",
        "state": ACTIVE,
        "tpu": {"nodeSpec": [{"nodeId": "mine", "node": {"labels": labels}}]},
        "coming": [],
    }


@pytest.mark.parametrize(
    ("state", "labels"),
    [
        ("ACTIVE", {"tnt_jax_launch": "0123456789abcdef"}),
        ("FAILED", {}),
        ("SUSPENDED", {"tnt_jax_launch": ""}),
    ],
)
def test_what_others_created_is_left_alone(cloud, labels, state):
    cloud.set(resource=foreign(labels) | {"state": {"state": state}})
    for action in (["up", *SETTINGS], ["down", *HERE]):
        done = cloud.run(*action)
        assert done.returncode == 2
        assert "was not created by this script on this machine: it is left alone" in done.stderr
    assert cloud.calls("create") == cloud.calls("delete") == cloud.calls("ssh") == []
    assert cloud.world()["resource"] is not None


def test_a_tpu_without_a_queued_resource_is_left_alone(cloud):
    name = "projects/the-project/locations/us-central1-a/nodes/mine"
    cloud.set(node={"name": name, "state": "READY", "networkEndpoints": [{}]})
    done = cloud.up()
    assert done.returncode == 2
    assert "a TPU VM mine is there that was not created here" in done.stderr
    assert cloud.calls("create") == cloud.calls("delete") == []


def test_other_names_are_not_confused(cloud):
    other = foreign({})
    cloud.set(resource=other | {"name": other["name"].replace("/mine", "/not-mine")})
    assert "There is no queued resource mine" in cloud.run("status", *HERE).stdout


def test_what_somebody_else_deleted_is_not_created_again(cloud):
    cloud.set(plays=[{"at": "follow", "do": "vanish"}])
    (cloud.folder / "program").write_text("hold\n")
    done = cloud.up()
    assert done.returncode == 1
    assert "mine is gone: somebody deleted it." in done.stderr
    assert len(cloud.calls("queued-resources create")) == 1


# Ended by down ------------------------------------------------------------------------------------


def test_down_ends_the_up_that_follows(cloud):
    (cloud.folder / "program").write_text("hold\n")
    log = cloud.folder / "up.log"
    up = cloud.start(log, "up", *SETTINGS)
    wait_until(lambda: "update 1 of host-0" in log.read_text())
    done = cloud.run("down", *HERE)
    assert f"up is at work on mine, process {up.pid}: it ends when it sees that" in done.stdout
    assert "mine was deleted" in done.stdout
    assert up.wait(timeout=240) == 1
    assert "down was given meanwhile: this ends." in log.read_text()
    assert cloud.world()["resource"] is None
    assert len(cloud.calls("queued-resources create")) == 1
    assert cloud.up("--dry_run").returncode == 0


def test_down_where_somebody_else_is_faster(cloud):
    assert cloud.up().returncode == 0
    cloud.set(plays=[{"at": "queued-resources delete", "do": "vanish"}])
    done = cloud.run("down", *HERE)
    assert done.returncode == 0
    assert "NOT_FOUND" in done.stderr and "mine was deleted" in done.stdout


@pytest.mark.parametrize("at", ["create", "delete"])
def test_down_while_up_is_about_to_create(cloud, at):
    """It finds nothing, or what is on its way out; and nothing may be there afterwards."""
    down = {"at": f"queued-resources {at}", "do": "call", "command": cloud.command("down", *HERE)}
    cloud.set(plays=[down | {"skip": int(at == "create")}, {"at": "follow", "do": "preempt"}])
    (cloud.folder / "program").write_text("hold\n")
    done = cloud.up()
    assert done.returncode == 1
    assert "down was given meanwhile: this ends." in done.stderr
    assert cloud.world()["resource"] is None
    assert len(cloud.calls("queued-resources create")) == (2 if at == "create" else 1)


def test_the_number_of_an_up_that_was_killed_may_be_anothers_by_now(cloud):
    folder = cloud.user / ".local/state/tnt_jax/tpu_vm"
    folder.mkdir(parents=True)
    with subprocess.Popen(["sleep", "600"]) as other:
        (folder / "the-project.us-central1-a.mine.lock").symlink_to(str(other.pid))
        done = cloud.up()
        other.kill()
    assert done.returncode == 0, done.stderr


# Interrupted --------------------------------------------------------------------------------------


def test_interrupted_the_run_goes_on_and_up_takes_it_up_again(cloud):
    cloud.set(hosts=2)
    (cloud.folder / "program").write_text("hold\n")
    log = cloud.folder / "first.log"
    first = cloud.start(log, "up", *SETTINGS)
    wait_until(lambda: "update 1 of host-0" in log.read_text())

    second = cloud.up()
    assert second.returncode == 2
    assert "up is at work on mine already" in second.stderr
    status = cloud.run("status", *HERE).stdout
    assert "queued resource mine: ACTIVE, created here" in status
    assert "TPU VM mine: READY, HEALTHY, 2 host(s)" in status
    assert "host-0: running" in status and "host-1: running" in status

    os.killpg(first.pid, signal.SIGINT)  # Ctrl-C
    assert first.wait(timeout=240) == 130
    assert "Interrupted. What there is stays, and costs" in log.read_text()

    other = cloud.up("--gin.SEED=1")
    assert other.returncode == 1
    assert "mine has another run, see above" in other.stderr

    (cloud.folder / "release").touch()
    third = cloud.up()
    assert third.returncode == 0, third.stderr
    assert [len(cloud.starts(worker=worker)) for worker in (0, 1)] == [1, 1]
    assert len(cloud.calls("queued-resources create")) == 1
    assert "update 1 of host-1" in cloud.run("logs", *HERE, "--worker=1").stdout
