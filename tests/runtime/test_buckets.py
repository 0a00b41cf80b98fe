"""Paths in a bucket, for which an object store in memory stands."""

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import pathlib
import pkgutil
import re
import signal
import subprocess
import sys
import time
import types
from typing import ClassVar

import pytest
from etils import epath
from etils.epath import backend, gpath
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem
from helpers import rooms
from helpers.holders import PATIENCE, changing, held_by_another, note_of, refusal, wait_until
from orbax.checkpoint._src.path import gcs_utils

from tnt_jax import convert, prepare, report
from tnt_jax.data import datasets, records, removed_everywhere
from tnt_jax.runtime import failures, files, holding, operative_config, stages
from tnt_jax.runtime.errors import UsageError
from tnt_jax.tokenizers import tokenization
from tnt_jax.training import run_checkpoints
from tnt_jax.watching import metric_writers


class Object(MemoryFile):
    """It is there when it is whole."""

    is_written = False

    def close(self):
        if not self.is_written:
            self.is_written = True
            self.commit()


class Bucket(MemoryFileSystem):
    """fsspec's file system in memory under the name of Google's, safe for several threads."""

    protocol = ("gcs", "gs")
    cachable = False
    store: ClassVar = {}
    pseudo_dirs: ClassVar = [""]

    def __init__(self, finalize_on_close=True):
        super().__init__()

    @classmethod
    def _strip_protocol(cls, path):
        return "/" + path.rpartition("://")[2].strip("/")

    def _open(self, path, mode="rb", **options):
        name = self._strip_protocol(path)
        if mode == "wb":
            return Object(self, name)
        if mode == "rb" and name in self.store:
            return io.BytesIO(self.store[name].getvalue())
        return super()._open(path, mode, **options)

    def glob(self, path, **options):
        return [found.removeprefix("/") for found in super().glob(path, **options)]


@pytest.fixture
def bucket(monkeypatch, tmp_path):
    """Contents by path. Nothing may land in the working directory, where pathlib would put it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gpath, "_is_tf_installed", lambda: False)
    monkeypatch.setitem(sys.modules["fsspec.registry"]._registry, "gcs", Bucket)
    monkeypatch.setattr(Bucket, "store", {})
    yield lambda: {name: bytes(file.getvalue()) for name, file in Bucket.store.items()}
    assert list(tmp_path.iterdir()) == []


class RamBackend(backend._TfBackend):
    """What etils takes for a bucket where TensorFlow is, whose file system in memory stands for it.

    Unlike others, it opens a file for as long as a `with` lasts.
    """

    @property
    def gfile(self):
        gfile = super().gfile

        def renamed(function):
            def call(path, *more, **options):
                return function(os.fspath(path).replace("gs://", "ram://"), *more, **options)

            return call

        functions = ("GFile", "exists", "isdir", "makedirs", "remove", "rmtree")
        of_paths = {name: renamed(getattr(gfile, name)) for name in functions}

        def opened(path, mode):
            if mode.startswith("w") and of_paths["exists"](path):  # memory would append
                of_paths["remove"](path)
            return of_paths["GFile"](path, mode)

        return types.SimpleNamespace(**of_paths | {"GFile": opened})


@pytest.fixture
def tensorflow_bucket(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    ram = RamBackend()
    monkeypatch.setattr(gpath._GPath, "_backend", property(lambda path: ram))
    yield
    assert list(tmp_path.iterdir()) == []


def test_two_of_one_name_are_converted_at_once(bucket):
    """Each is written on this machine first, in a place of its own."""
    one, other = (epath.Path(f"gs://b/{name}/huggingface") for name in ("one", "other"))
    with convert._moved_when_whole(one, "last") as of_one:
        (of_one / "last").write_text("of one")
        with convert._moved_when_whole(other, "last") as of_other:
            (of_other / "last").write_text("of other")
        (of_one / "weights").write_text("many")
    found = {path: (path / "last").read_text() for path in (one, other)}
    assert found == {one: "of one", other: "of other"}
    assert (one / "weights").read_text() == "many"


@pytest.mark.parametrize("kind", ["bucket", "tensorflow_bucket"])
def test_lines_of_a_run_go_to_a_bucket_and_go_on(kind, request):
    request.getfixturevalue(kind)

    def lines(name):
        return epath.Path(f"gs://b/{kind}/{name}").read_text().splitlines()

    with metric_writers.StepLines(f"gs://b/{kind}/events.jsonl") as events:
        for step in (1, 2, 3):
            events.write(step, {"loss": 0.5})
            assert lines("events.jsonl")[-1] == f'{{"step": {step}, "loss": 0.5}}'
    with metric_writers.StepLines(f"gs://b/{kind}/events.jsonl", last_step=2) as events:
        events.write(7, {"text": "ä"})
    assert [json.loads(line)["step"] for line in lines("events.jsonl")] == [1, 2, 7]
    # Numbers are many: they wait for a minute, a checkpoint or the end.
    with metric_writers.open_all(f"gs://b/{kind}", start=0, config={}) as writers:
        for step in (1, 2, 3):
            writers.write(step, {"loss": 0.5})
        assert len(lines("metrics.jsonl")) == 1
        writers.flush()
        assert len(lines("metrics.jsonl")) == 3
        writers.write(4, {"loss": 0.5})
    assert len(lines("metrics.jsonl")) == 4


def test_who_lost_a_folder_writes_nothing_more_into_it(bucket, monkeypatch):
    path = epath.Path("gs://b/events.jsonl")
    with metric_writers.StepLines(path, pause=60) as events:
        events.write(1, {"loss": 0.5})
        monkeypatch.setattr(holding, "is_lost", lambda: True)
        events.write(2, {"loss": 0.5})
        path.write_text("another's")
    assert path.read_text() == "another's"
    monkeypatch.setattr(holding, "is_lost", lambda: False)
    with metric_writers.StepLines(path):  # what is not new is not written again
        path.write_text("another's")


@pytest.mark.parametrize("kind", ["bucket", "tensorflow_bucket"])
def test_a_digest_of_a_file_in_a_bucket(kind, request):
    """TensorFlow's files are no files for `hashlib.file_digest`."""
    request.getfixturevalue(kind)
    file = epath.Path(f"gs://b/{kind}/prompts.jsonl")
    for content in (b"first", b"second"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
        assert stages._digest_of_file(file) == hashlib.sha256(content).hexdigest()[:16]


def test_a_stage_is_run_again_when_what_it_read_in_a_bucket_is_another(bucket):
    seen = stages.fingerprint
    records.write_records("gs://b/prompts/a.jsonl", ROWS[:1])
    file, pattern, folder = paths = ("gs://b/prompts/a.jsonl", "gs://b/prompts/*", "gs://b/prompts")
    first = [seen(path) for path in paths]
    assert first == [seen(path) for path in paths]
    assert len({*first, seen("gs://b/absent")}) == 3  # the pattern matches this file alone
    records.write_records("gs://b/prompts/b.jsonl", ROWS[1:])
    assert seen(file) == first[0]
    assert seen(pattern) != first[1]
    assert seen(folder) != first[2]
    second = [seen(path) for path in paths]
    records.write_records("gs://b/prompts/a.jsonl", [dataclasses.replace(ROWS[2], inputs="longer")])
    assert not any(was == seen(path) for was, path in zip(second, paths, strict=True))


def test_a_note_of_0_2_0_counts_which_had_not_looked_into_the_bucket(bucket, tmp_path_factory):
    records.write_records("gs://b/prompts.jsonl", ROWS)
    root = tmp_path_factory.mktemp("run")
    output = root / "model"

    def append(*, output, prompts):
        with pathlib.Path(output).open("a") as file:
            file.write("run\n")

    def run():
        inputs = {"prompts": "gs://b/prompts.jsonl"}
        stages.Stages(root).run("train", append, output=str(output), inputs=inputs, settings={})

    run()
    note = stages.note_path(root, "train")
    found = json.loads(note.read_text())
    found["described"]["inputs"] = {"gs://b/prompts.jsonl": "not a local file"}
    note.write_text(json.dumps(found))
    run()
    assert output.read_text() == "run\n"


def test_checkpoints_go_to_the_bucket_that_is_named(bucket, monkeypatch):
    # Orbax asks Google what kind of bucket it is.
    monkeypatch.setattr(gcs_utils, "is_hierarchical_namespace_enabled", lambda path: False)
    with run_checkpoints.Checkpoints("gs://b/run") as saved:
        assert str(saved._orbax.directory) == "gs://b/run"


@pytest.mark.parametrize(
    ("name", "said", "status"),
    [
        ("PermissionDeniedError", "does not have storage.objects.create access", 2),
        ("NotFoundError", "The specified bucket does not exist", 2),
        ("UnavailableError", "Error executing an HTTP request: HTTP response code 503", 1),
        ("FailedPreconditionError", "libcurl code 6 meaning 'Couldn't resolve host name'", 1),
    ],
)
def test_what_a_bucket_says_is_one_line(name, said, status):
    import tensorflow as tf

    error = getattr(tf.errors, name)(None, None, f"{said} when reading gs://b/run/metrics.jsonl")
    assert f"cannot read or write: {said} when reading gs://b/run" in str(failures.explain(error))
    assert failures.exit_status(error) == status
    # What it says of a program's own mistake is no mistake of whoever runs it.
    for kind, said in (("InvalidArgumentError", "gs://b"), ("FailedPreconditionError", "a table")):
        with pytest.raises(tf.errors.OpError) as raised:
            raise getattr(tf.errors, kind)(None, None, said)
        assert failures.explain(raised.value) is None


@pytest.mark.parametrize(
    ("error", "status"),
    [
        ("google.api_core.exceptions.Forbidden", 2),
        ("google.api_core.exceptions.NotFound", 2),
        ("google.api_core.exceptions.ServiceUnavailable", 1),
        ("google.api_core.exceptions.TooManyRequests", 1),
        ("google.auth.exceptions.DefaultCredentialsError", 2),
        ("google.auth.exceptions.TransportError", 1),
    ],
)
@pytest.mark.filterwarnings("ignore:Please install grpcio-status:ImportWarning")
def test_what_orbax_hears_of_a_bucket_is_one_line(error, status):
    error = pkgutil.resolve_name(error)("it may not be read")
    assert str(error) in str(failures.explain(error))
    assert failures.exit_status(error) == status


ROWS = [records.Record(id=str(i), inputs="in", targets="ä out") for i in range(3)]


def test_records_go_to_a_bucket_and_come_back(bucket):
    files.check_writable("gs://b/folder/a.jsonl", "OUTPUT")
    records.write_records("gs://b/folder/a.jsonl", ROWS[:2])
    records.write_records("gs://b/folder/b.jsonl", ROWS[2:])
    assert sorted(bucket()) == ["/b/folder/a.jsonl", "/b/folder/b.jsonl"]
    assert records.read_records("gs://b/folder/a.jsonl") == ROWS[:2]
    assert records.read_records("gs://b/folder/*.jsonl") == ROWS
    assert [str(file) for file in files.matching_files("gs://b/folder/[b]*")] == [
        "gs://b/folder/b.jsonl"
    ]


@pytest.mark.parametrize("path", ["gs://b/absent.jsonl", "gs://b/*.jsonl", "gs://other/a"])
def test_what_is_not_there_is_named(bucket, path):
    records.write_records("gs://b/folder/a.jsonl", ROWS)
    with pytest.raises(UsageError, match=r"^gs://.*: no such file, and no file matches it"):
        records.read_records(path)


def test_what_fails_half_way_leaves_nothing(bucket):
    def rows():
        yield ROWS[0]
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        records.write_records("gs://b/a.jsonl", rows())
    assert bucket() == {}


def test_settings_are_written_beside_the_output(bucket, monkeypatch):
    monkeypatch.setattr(operative_config, "text", lambda: "SEED = 3\n")
    files.write_json("gs://b/run/a.json", {"x": 1})
    operative_config.write("gs://b/run")
    operative_config.write("gs://b/run/a.json")
    assert bucket() == {
        "/b/run/a.json": b'{\n  "x": 1\n}\n',
        "/b/run/operative_config.gin": b"SEED = 3\n",
        "/b/run/a.json.gin": b"SEED = 3\n",
    }


def test_a_report_of_files_in_a_bucket_shows_the_settings_beside_them(bucket, capsys):
    for name in ("original", "patched"):
        rows = [dataclasses.replace(row, negative_spans=()) for row in ROWS]
        records.write_records(f"gs://b/{name}.jsonl", rows)
        # Whatever somebody wrote there: the last byte is no UTF-8.
        files.path_of(f"gs://b/{name}.jsonl.gin").write_bytes(b"SEED = 17\n# \xe4\n")
    report.report(
        output="gs://b/page.html",
        original_records="gs://b/original.jsonl",
        current_records="gs://b/patched.jsonl",
    )
    page = bucket()["/b/page.html"].decode()
    for name in ("original", "patched"):
        assert f"<summary>gs://b/{name}.jsonl.gin</summary><pre" in page
    assert page.count("SEED = 17\n# \N{REPLACEMENT CHARACTER}\n") == 2
    assert "in a browser (gs://b/page.html)" in "".join(capsys.readouterr().out.split("\n"))


def test_ids_that_are_removed_everywhere_belong_to_records_there_too(bucket):
    removed_everywhere.write_records("gs://b/a.jsonl", ROWS, removed_everywhere.Ids([5], {}))
    assert removed_everywhere.of_records("gs://b/*.jsonl") == (5,)
    records.write_records("gs://b/a.jsonl", ROWS[:1])
    with pytest.raises(UsageError, match=r"^gs://b/a\.jsonl\.everywhere\.json: expected ids that"):
        removed_everywhere.of_records("gs://b/a.jsonl")
    removed_everywhere.write_records("gs://b/a.jsonl", ROWS[:1], None)
    assert list(bucket()) == ["/b/a.jsonl"]


# --- Who holds it ---------------------------------------------------------------------------------


def hold():
    with holding.folder("gs://b/run", "MODEL_DIR"):
        pass


def note_on(store):
    return json.loads(store()["/b/run/.held"])


@pytest.fixture
def quick(monkeypatch):
    """Nobody waits for long."""
    monkeypatch.setattr(holding, "_SETTLE", 0.01)
    monkeypatch.setattr(holding, "_STALE", 0.6)


def test_one_run_holds_a_folder_in_a_bucket(bucket, quick):
    with holding.folder("gs://b/run", "MODEL_DIR"), holding.output("gs://b/a.jsonl", "OUTPUT"):
        assert sorted(bucket()) == ["/b/.a.jsonl.held", "/b/run/.held"]
        with pytest.raises(UsageError, match=f"gs://b/run to be free, .* process {os.getpid()} on"):
            hold()
        with pytest.raises(UsageError), holding.output("gs://b/a.jsonl", "OUTPUT"):
            pass
    assert bucket() == {}
    hold()


def test_what_a_dead_process_of_this_host_held_there_is_free_at_once(
    bucket, quick, capsys, tmp_path_factory
):
    folder = tmp_path_factory.mktemp("local")
    with held_by_another("folder", folder) as other:
        of_other = json.loads((folder / ".held").read_text()) | {"lock": None}

        def leave(**fields):
            files.path_of("gs://b/run/.held").write_text(json.dumps(of_other | fields))

        leave()
        with pytest.raises(UsageError, match=f"process {other.pid} on "):
            hold()
        leave(began=of_other["began"] - 1)  # its number was another's before
        hold()
        other.kill()
        other.wait(PATIENCE)
        leave()
        hold()
    assert bucket() == {}
    assert "waiting" not in capsys.readouterr().out


def test_another_process_sees_who_holds_a_folder_in_a_bucket(bucket, quick):
    with holding.folder("gs://b/run", "MODEL_DIR"):
        token, note = note_on(bucket)["token"], files.path_of("gs://b/run/.held")
        assert holding._is_there(note, token)
        assert not holding._is_there(note, "of before")
    assert not holding._is_there(note, token)


def test_a_holder_on_another_host_is_watched(bucket, quick, monkeypatch, capsys):
    note = files.path_of("gs://b/run/.held")
    note.write_bytes(note_of())
    hold()
    assert "MODEL_DIR: gs://b/run was held by process 7 on elsewhere" in capsys.readouterr().out
    monkeypatch.setattr(holding, "_STALE", 60.0)
    with (
        changing(note),
        pytest.raises(UsageError, match=r"process 7 on elsewhere .* is at work in it"),
    ):
        hold()
    assert note_on(bucket)["token"] == "theirs"


def test_a_holder_there_shows_that_it_lives_and_ends_when_it_was_taken_for_dead(
    bucket, quick, monkeypatch
):
    monkeypatch.setattr(holding, "_BEAT", 0.01)
    latest = time.monotonic() + PATIENCE
    with (
        pytest.raises(UsageError, match=r"that process 7 on elsewhere .* has taken it over"),
        holding.folder("gs://b/run", "MODEL_DIR"),
    ):
        size = len(bucket()["/b/run/.held"])
        wait_until(lambda: note_on(bucket)["beat"] > 10)
        assert len(bucket()["/b/run/.held"]) == size  # a client may remember an object's length
        holding.check()
        # Until it stands: what the holder has begun to write may come after it.
        while time.monotonic() < latest:
            files.path_of("gs://b/run/.held").write_bytes(note_of())
            time.sleep(0.005)
            holding.check()
    assert note_on(bucket)["token"] == "theirs"


# A bucket that processes share: its objects are the files of a folder.
ON_DISK = """
import json, sys
from etils.epath import gpath
from fsspec.implementations.local import LocalFileSystem
from tnt_jax.runtime import program

folder, arguments = json.loads(sys.argv[1])

class Disk(LocalFileSystem):
    protocol = ("gcs", "gs")
    cachable = False

    def __init__(self, finalize_on_close=True):
        super().__init__(auto_mkdir=True)

    @classmethod
    def _strip_protocol(cls, path):
        path = str(path)
        return path if path.startswith(folder) else folder + "/" + path.rpartition("://")[2]

gpath._is_tf_installed = lambda: False
sys.modules["fsspec.registry"]._registry["gcs"] = Disk
program.run("tnt_jax.annotate", "annotate", arguments)
"""

# Waits for as long as there is a file named `hold`.
FUNCTION = """
import pathlib, time

def mark(inputs, targets):
    while pathlib.Path("hold").exists():
        time.sleep(0.01)
    return [(0, 1)]
"""


def test_two_do_not_write_one_output_there_and_a_killed_one_goes_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = tmp_path / "store"
    records.write_records("outputs.jsonl", ROWS)
    pathlib.Path("marking.py").write_text(FUNCTION)
    rooms.RUNS["annotate_python"] = (["runs/annotate_python.gin"], {"VOCABULARY_PATH": "none"})
    settings = {"RECORDS": "outputs.jsonl", "OUTPUT": "gs://b/a.jsonl", "VOCABULARY": None}
    settings["FUNCTION"] = "marking:mark"
    arguments = rooms.arguments("annotate_python", settings)
    command = [sys.executable, "-c", ON_DISK, json.dumps([str(store), arguments])]
    pathlib.Path("hold").touch()
    with subprocess.Popen(command) as first:
        with contextlib.ExitStack() as stack:
            stack.callback(first.kill)
            wait_until(lambda: (store / "b/a.jsonl.parts/of.json").exists())
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 2, done.stderr
            line = done.stderr.splitlines()[-1]
            assert re.match(r"tnt_jax\.annotate: error: OUTPUT: " + refusal(first), line)
        assert first.wait(PATIENCE) == -signal.SIGKILL
    pathlib.Path("hold").unlink()
    assert (store / "b/.a.jsonl.held").exists()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "waiting" not in done.stdout
    assert [row.negative_spans for row in records.read_records(store / "b/a.jsonl")] == [
        ((0, 1),)
    ] * 3
    assert sorted(file.name for file in (store / "b").iterdir()) == ["a.jsonl", "a.jsonl.gin"]


def test_a_table_in_a_bucket_is_asked_for_once_and_again_where_it_was_replaced(bucket, monkeypatch):
    path, table = "gs://b/a.jsonl", "/b/a.jsonl.sets.jsonl"
    asked, info = [], Bucket.info
    monkeypatch.setattr(
        Bucket, "info", lambda self, name, **more: asked.append(name) or info(self, name, **more)
    )

    def write(first):
        sets = tuple((n % 4, tuple(range(first + n % 2, first + 40))) for n in range(200))
        rows = [
            dataclasses.replace(ROWS[0], id=str(n), negative_token_ids=(one,))
            for n, one in enumerate(sets)
        ]
        removed_everywhere.write_records(path, rows, None)
        asked.clear()
        return rows

    rows = write(10)
    assert records.read_records(path) == rows
    assert sum(name.endswith(table) for name in asked) < 10
    rows = write(20)  # of the same size, so that the size does not tell
    assert records.read_records(path) == rows
    other = dataclasses.replace(ROWS[0], negative_token_ids=((0, tuple(range(50, 90))),))
    removed_everywhere.write_records("gs://b/other.jsonl", [other], None)
    Bucket.store[table] = Bucket.store["/b/other.jsonl.sets.jsonl"]  # records of another one
    Bucket.store["/b/a.jsonl"] = Bucket.store["/b/other.jsonl"]
    assert records.read_records(path) == [other]
    del Bucket.store["/b/other.jsonl.sets.jsonl"]
    with pytest.raises(UsageError, match=r"other\.jsonl\.sets\.jsonl, which is not there\."):
        records.read_records("gs://b/other.jsonl")


def test_examples_of_records_in_a_bucket_need_a_place(bucket, monkeypatch):
    monkeypatch.setattr(datasets, "_SMALLEST", 0)
    records.write_records("gs://b/a.jsonl", ROWS)
    dataset = datasets.RecordFiles(files="gs://b/a.jsonl", vocabulary=tokenization.Bytes())
    message = r"^EXAMPLES_DIR: expected a local folder.* Set EXAMPLES_DIR to a local folder, here"
    with pytest.raises(UsageError, match=message):
        prepare.prepare(dataset=dataset, task_feature_lengths={"inputs": 8, "targets": 8})


def test_local_paths_stay_what_they_were(tmp_path):
    records.write_records(tmp_path / "a.jsonl", ROWS)
    (file,) = files.matching_files(tmp_path / "*.jsonl")
    assert type(file) is type(pathlib.Path())


def test_a_pattern_leaves_out_the_tables_of_long_sets(bucket):
    row = dataclasses.replace(ROWS[0], negative_token_ids=((0, tuple(range(40))),))
    removed_everywhere.write_records("gs://b/folder/a.jsonl", [row], None)
    assert "/b/folder/a.jsonl.sets.jsonl" in bucket()
    for pattern in ("*.jsonl", "a*"):
        assert records.read_records(f"gs://b/folder/{pattern}") == [row]
    # Who names a table means it.
    (file,) = files.matching_files("gs://b/folder/a.jsonl.sets.jsonl")
    assert str(file) == "gs://b/folder/a.jsonl.sets.jsonl"
    with pytest.raises(UsageError, match=r"no file matches it as a pattern \(names that end in "):
        files.matching_files("gs://b/folder/*.sets.jsonl")
