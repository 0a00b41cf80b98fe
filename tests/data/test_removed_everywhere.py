"""Ids that are removed at every position belong to one file of records, and to no other."""

import contextlib
import pathlib
import re
import shutil

import gin
import pytest
from helpers import rooms

from tnt_jax.data import records, removed_everywhere
from tnt_jax.runtime.errors import UsageError


@pytest.fixture(scope="module", autouse=True)
def working_directory(tmp_path_factory):
    """The world of `rooms`, an original of one update, and what it is taken to have said."""
    folder = tmp_path_factory.mktemp("world")
    rooms.write_world(folder)
    with contextlib.chdir(folder), rooms.devices_seen():
        for word in ("quiet", "clean"):
            pathlib.Path(f"{word}.txt").write_text(f"{word}\n")
        records.write_records("marked.jsonl", rooms.marked_corpus())
        rooms.train_original("original", 1)
        yield


ROWS = [records.Record(id=str(n), inputs="in", targets="out") for n in range(3)]
REFUSED = (
    r"^\S+everywhere\.json: expected ids that belong to \S+ \(digest \w{16}\), found those of "
)


def ids(*numbers):
    return removed_everywhere.Ids(numbers, {"annotator": "x"})


# --- A file and its ids ---------------------------------------------------------------------------


def test_ids_are_written_and_read_with_their_records(tmp_path):
    one, other, neither = (str(tmp_path / f"{name}.jsonl") for name in ("one", "other", "neither"))
    removed_everywhere.write_records(one, ROWS, ids(5, 3))
    removed_everywhere.write_records(other, ROWS[:2], ids(4))
    removed_everywhere.write_records(neither, ROWS[:1], None)
    assert records.read_records(one) == ROWS
    assert removed_everywhere.of_records(one) == (3, 5)
    assert removed_everywhere.of_records(str(tmp_path / "o*.jsonl")) == (3, 4, 5)
    assert removed_everywhere.of_records(neither) == ()
    removed_everywhere.write_records(one, ROWS, None)
    assert removed_everywhere.files_of(one) == []


@pytest.mark.parametrize(
    "replace",
    [
        lambda file: records.write_records(file, ROWS[:2]),
        lambda file: file.write_bytes(file.read_bytes() + b"\n"),
        lambda file: file.write_bytes(file.read_bytes().replace(b"out", b"ouT", 1)),
        lambda file: file.write_bytes(b""),
    ],
    ids=["other records", "a line more", "a letter", "nothing"],
)
def test_ids_are_refused_where_their_records_were_replaced(tmp_path, replace):
    file = tmp_path / "a.jsonl"
    removed_everywhere.write_records(file, ROWS, ids(5))
    removed_everywhere.write_records(tmp_path / "b.jsonl", ROWS, ids(6))
    replace(file)
    for read in (
        lambda: removed_everywhere.of_records(str(file)),
        lambda: removed_everywhere.of_records(str(tmp_path / "*.jsonl")),
        lambda: removed_everywhere.removed_ids(f"{file}.everywhere.json"),
    ):
        with pytest.raises(UsageError, match=REFUSED + r"other records \(digest '\w{16}'\)"):
            read()
    # Given by another name they are what somebody wants.
    pathlib.Path(f"{file}.everywhere.json").rename(tmp_path / "ids.json")
    assert removed_everywhere.removed_ids(str(tmp_path / "ids.json")) == (5,)
    assert removed_everywhere.of_records(str(file)) == ()


def test_ids_that_do_not_say_whose_they_are_are_refused(tmp_path):
    records.write_records(tmp_path / "a.jsonl", ROWS)
    (tmp_path / "a.jsonl.everywhere.json").write_text('{"ids": [5]}')
    with pytest.raises(UsageError, match=REFUSED + r"other records \(digest None\)"):
        removed_everywhere.of_records(str(tmp_path / "a.jsonl"))


def test_what_fails_half_way_changes_nothing(tmp_path):
    def rows():
        yield ROWS[0]
        raise ZeroDivisionError

    removed_everywhere.write_records(tmp_path / "a.jsonl", ROWS, ids(5))
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    for everywhere in (ids(6), None):
        with pytest.raises(ZeroDivisionError):
            removed_everywhere.write_records(tmp_path / "a.jsonl", rows(), everywhere)
        assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


# --- Programs -------------------------------------------------------------------------------------


def run_annotate(words, everywhere=True, output="annotated.jsonl"):
    settings = {
        "RECORDS": "corpus.jsonl",
        "OUTPUT": output,
        "LEXICON": f"{words}.txt",
        "AT_EVERY_POSITION": everywhere,
        "ALTERNATIVES": False,
    }
    assert rooms.run("annotate", settings) == 0


@pytest.fixture
def written():
    """Records of an annotator that removes "quiet" at every position."""
    run_annotate("quiet")
    assert len(removed_everywhere.of_records("annotated.jsonl")) == 1


def train(capsys):
    """What a run on the records says of ids, or its mistake."""
    shutil.rmtree("model", ignore_errors=True)
    settings = {"RECORDS": "annotated.jsonl", "TRAIN_STEPS": 1, "MODEL_DIR": "model"}
    capsys.readouterr()
    status = rooms.run("train", settings)
    said = capsys.readouterr()
    found = re.search(r"^\d+ ids are removed at every position", said.out, re.MULTILINE)
    return said.err if status else found and found[0]


def test_training_removes_them_and_refuses_those_of_other_records(written, capsys):
    assert train(capsys) == "1 ids are removed at every position"
    records.write_records("annotated.jsonl", rooms.marked_corpus())  # by hand
    error = train(capsys)
    message = error.removeprefix("tnt_jax.train: error: ")
    assert re.match(REFUSED, message)
    assert error.count("\n") == 1
    assert not pathlib.Path("model").exists()


@pytest.mark.parametrize("program", ["localize", "generate", "annotate"])
def test_another_program_that_writes_the_records_takes_them_away(written, program, capsys):
    settings = {
        "localize": {"RECORDS": "marked.jsonl", "NUM_FOLDS": 2, "NUM_UPDATES": 2},
        "generate": {"CHECKPOINT_PATH": "original"},
        "annotate": {"RECORDS": "corpus.jsonl"},
    }[program]
    assert rooms.run(program, {**settings, "OUTPUT": "annotated.jsonl"}) == 0
    assert removed_everywhere.of_records("annotated.jsonl") == ()
    assert not pathlib.Path("annotated.jsonl.everywhere.json").exists()
    if program == "localize":  # whose head has learnt too little to mark much, or anything
        said = train(capsys)
        assert said is None or "none of the 60 examples has one" in said


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


@contextlib.contextmanager
def killed(moment):
    """A process that ends just before, or just after, the records are put in place."""
    replace = pathlib.Path.replace

    def replace_and_end(self, target):
        is_output = pathlib.Path(target).name == "annotated.jsonl"
        if is_output and moment == "before":
            raise Killed
        replace(self, target)
        if is_output:
            raise Killed

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(pathlib.Path, "replace", replace_and_end)
        yield
    gin.clear_config()


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize(
    ("first", "then"),
    [
        (None, ("quiet", True)),
        (("quiet", True), ("clean", True)),
        (("quiet", True), ("clean", False)),
        (("quiet", False), ("clean", True)),
    ],
)
def test_a_kill_leaves_records_with_their_ids_or_a_refusal(first, then, moment):
    """And the same command mends it."""
    for file in pathlib.Path().glob("annotated.jsonl*"):
        shutil.rmtree(file) if file.is_dir() else file.unlink()
    if first:
        run_annotate(*first)
    with killed(moment):
        run_annotate(*then)

    def ids_of(words, everywhere):
        """What is right, by an undisturbed run with another name."""
        run_annotate(words, everywhere, output="right.jsonl")
        return removed_everywhere.of_records("right.jsonl")

    own = {words: ids_of(words, everywhere) for words, everywhere in (first or then, then)}
    with contextlib.suppress(UsageError):  # also where there is no file of records yet
        found = removed_everywhere.of_records("annotated.jsonl")
        (annotator,) = {row.annotator for row in records.read_records("annotated.jsonl")}
        (words,) = (words for words in own if f"{words}.txt" in annotator)
        assert found == own[words]
    run_annotate(*then)
    assert removed_everywhere.of_records("annotated.jsonl") == own[then[0]]
    assert pathlib.Path("annotated.jsonl").read_bytes() == pathlib.Path("right.jsonl").read_bytes()
    left = sorted(file.name for file in pathlib.Path().glob("annotated.jsonl*"))
    ids_file = ["annotated.jsonl.everywhere.json"] * then[1]
    assert left == sorted(["annotated.jsonl", "annotated.jsonl.gin", *ids_file])
