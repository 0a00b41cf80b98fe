"""Paths in a bucket, for which an object store in memory stands."""

import pathlib
import sys
from typing import ClassVar

import pytest
from etils.epath import gpath
from fsspec.implementations.memory import MemoryFileSystem

from tnt_jax import records, run_config, run_log, tasks, tfrecords
from tnt_jax.errors import UsageError


class Bucket(MemoryFileSystem):
    """As fsspec's own, under the name of Google's."""

    protocol = ("gcs", "gs")
    cachable = False
    store: ClassVar = {}
    pseudo_dirs: ClassVar = [""]

    def __init__(self, finalize_on_close=True):
        super().__init__()

    @classmethod
    def _strip_protocol(cls, path):
        return "/" + path.rpartition("://")[2].strip("/")

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


ROWS = [records.Record(id=str(i), inputs="in", targets="ä out") for i in range(3)]


def test_records_go_to_a_bucket_and_come_back(bucket):
    records.check_writable("gs://b/folder/a.jsonl", "OUTPUT")
    records.write_records("gs://b/folder/a.jsonl", ROWS[:2])
    records.write_records("gs://b/folder/b.jsonl", ROWS[2:])
    assert sorted(bucket()) == ["/b/folder/a.jsonl", "/b/folder/b.jsonl"]
    assert records.read_records("gs://b/folder/a.jsonl") == ROWS[:2]
    assert records.read_records("gs://b/folder/*.jsonl") == ROWS
    assert [str(file) for file in records.matching_files("gs://b/folder/[b]*")] == [
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


def test_lengths_of_tfrecords_are_checked_there_too(bucket):
    """TensorFlow has its own way to a bucket, which ends in Google's."""
    tfrecords.write("gs://b/a.tfrecord", ROWS)
    tfrecords._check_lengths(records.path_of("gs://b/a.tfrecord"))
    content = bucket()["/b/a.tfrecord"]
    records.path_of("gs://b/cut.tfrecord").write_bytes(content[:-1])
    message = rf"^gs://b/cut\.tfrecord: damaged.* ends at {len(content)}, the file at"
    with pytest.raises(UsageError, match=message):
        tasks.read_record_files("gs://b/cut.tfrecord")


def test_settings_are_written_beside_the_output(bucket, monkeypatch):
    monkeypatch.setattr(run_config, "text", lambda: "SEED = 3\n")
    run_log.write_json("gs://b/run/a.json", {"x": 1})
    run_config.write("gs://b/run")
    run_config.write("gs://b/run/a.json")
    assert bucket() == {
        "/b/run/a.json": b'{\n  "x": 1\n}\n',
        "/b/run/operative_config.gin": b"SEED = 3\n",
        "/b/run/a.json.gin": b"SEED = 3\n",
    }


def test_local_paths_stay_what_they_were(tmp_path):
    records.write_records(tmp_path / "a.jsonl", ROWS)
    (file,) = records.matching_files(tmp_path / "*.jsonl")
    assert type(file) is type(pathlib.Path())
