"""Examples that are made once: the same as those in memory, whole or not there, read row by row."""

import dataclasses
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from helpers.full_disk import full_disk

from tnt_jax.data import datasets, example_files, example_maker, packing, shuffling
from tnt_jax.data.batches import Batches, batch_for_eval
from tnt_jax.data.examples import (
    check_token_ids,
    count_graded,
    digest,
    have_strengths,
    lengths_of,
    max_negative_ids,
    num_marks_of,
    take,
)
from tnt_jax.data.layouts import CAUSAL, are_all_covered, count_lost
from tnt_jax.runtime.errors import UsageError
from tnt_jax.tokenizers import tokenization

LENGTHS = {"inputs": 6, "targets": 12}
BYTES = tokenization.Bytes()
LONG = [*range(100, 140)]
WORDS = ["bad", "good", "fine", "so so", "ünreal", "a  b", ""]


def record(number):
    """A record of one of all kinds: with marks of spans, of ids, with strengths, or without."""
    rng = np.random.default_rng(number)
    text = " ".join(rng.choice(WORDS, rng.integers(1, 9))) + "."
    fields: dict[str, Any] = {
        "id": f"n {number}",
        "inputs": "ask " * int(rng.integers(0, 3)),
        "targets": text,
    }
    spans = [[m, m + 3] for m in range(len(text)) if text.startswith("bad", m)]
    fields["negative_spans"] = [[*span, 0.5] for span in spans] if number % 7 == 0 else spans
    if number % 5 == 0:
        fields["negative_token_ids"] = [[0, [9, 11]], [1, [7], -0.5]]  # the latter is raised
    if number % 15 == 0:  # long sets, which are kept once
        fields["negative_token_ids"] = [[0, LONG], [1, LONG, 0.5], [1, [9, 200]], [2, LONG[:-1]]]
    return fields


@pytest.fixture(autouse=True)
def world(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(example_maker, "_BYTES_PER_PART", 400)
    monkeypatch.setattr(example_maker, "_num_processes", lambda: 1)
    write([record(number) for number in range(60)])


def write(rows, path="records.jsonl"):
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    pathlib.Path(path).write_text(text, "utf-8")


def dataset(**settings):
    return datasets.RecordFiles(
        **({"files": "records.jsonl", "vocabulary": BYTES, "examples_dir": "kept"} | settings)
    )


def in_memory(**settings):
    return dataset(examples_dir=None, **settings).load(LENGTHS)


def names(*folders):
    return sorted(path.name for folder in folders for path in folder.iterdir())


def the_folder():
    (folder,) = pathlib.Path("kept").iterdir()
    return folder


def assert_same(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        for field in dataclasses.fields(one):
            if field.name == "sets":
                sets = ([(*at[:3], at.ids.tolist()) for at in of.sets] for of in (one, other))
                assert next(sets) == next(sets)
            elif field.name != "span_numbers":
                values = getattr(one, field.name), getattr(other, field.name)
                np.testing.assert_array_equal(*values, err_msg=f"{other.id} {field.name}")


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"marks": "first_token"},
        {"loss_until": "first_negative"},
        {"only_clean": True},
        {"clean_per_marked": 0.3},
        {"annotated": False},
    ],
    ids=str,
)
def test_they_are_those_in_memory_in_every_way(settings, capsys, caplog):
    told = []
    for load in (lambda: in_memory(**settings), lambda: dataset(**settings).load(LENGTHS)):
        caplog.clear()
        told.append((load(), caplog.messages))
    (expected, expected_warnings), (found, warnings) = told
    assert warnings == expected_warnings
    assert_same(found, expected)
    assert_same([found[3], found[-1]], [expected[3], expected[-1]])
    assert_same(found[2:9:3], expected[2:9:3])
    assert_same(take(found, np.array([5, 1, 5])), [expected[5], expected[1], expected[5]])
    for of in (digest, max_negative_ids, have_strengths, count_graded):
        assert of(found) == of(expected), of
    for of in (lengths_of, num_marks_of):
        assert of(found).tolist() == of(expected).tolist()
    for of in (count_lost, are_all_covered):
        assert of(found, LENGTHS) == of(expected, LENGTHS)
    check_token_ids(found, 300)
    message = r"^example 'n \d+': \w+ has ids from"
    for examples in (found, expected):
        with pytest.raises(UsageError, match=message):
            check_token_ids(examples, 40)
    out = capsys.readouterr().out
    assert "60 examples are in kept/" in out
    # What says how many are left out says the same.
    lines = [line for line in out.splitlines() if "left out" in line or "clean_per" in line]
    assert lines[: len(lines) // 2] == lines[len(lines) // 2 :]


def test_spans_over_everything_are_seen():
    write([{"inputs": "a", "targets": "bad", "negative_spans": [[0, 3]]}] * 1)
    assert are_all_covered(dataset().load(LENGTHS), LENGTHS)


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("layout", [None, CAUSAL])
def test_batches_are_the_same(pack, layout):
    found, expected = dataset().load(LENGTHS), in_memory()
    more = {} if layout is None else {"feature_layout": layout}
    one, other = (
        Batches(examples, 4, LENGTHS, seed=1, pack=pack, **more) for examples in (found, expected)
    )
    assert one.padding() == other.padding()
    for k in (0, 3, 40):
        assert one.read(k).places == other.read(k).places
        for name, value in other.batch(k).items():
            np.testing.assert_array_equal(one[k][name], value, err_msg=name)
    for batch, same in zip(
        batch_for_eval(found, 7, LENGTHS), batch_for_eval(expected, 7, LENGTHS), strict=True
    ):
        name = "decoder_negative_ids"
        np.testing.assert_array_equal(batch[name], same[name])


def test_what_prompts_begin_with_is_counted_once(monkeypatch):
    rows = [record(number) for number in range(20)]
    for number, row in enumerate(rows):
        row["inputs"] = "A system message, and " + ("then " if number < 10 else "") + row["inputs"]
    write(rows)
    found, expected = dataset().load(LENGTHS), in_memory()
    lengths = [{"inputs": number, "targets": 12} for number in (60, 24)]
    numbers = [CAUSAL.num_shared(expected, of) for of in lengths]
    assert numbers == [16, 0]  # 22 bytes; some are cut at 24
    subset = np.arange(10)
    first = CAUSAL.num_shared([expected[i] for i in subset], lengths[0])
    assert first == 24  # 27 bytes
    for _ in range(2):
        assert [CAUSAL.num_shared(found, of) for of in lengths] == numbers
        assert CAUSAL.num_shared(found.subset(subset), lengths[0]) == first
        monkeypatch.setattr(example_files.ExampleFiles, "take", None)  # nothing is read again


def test_large_data_sets_have_one_digest_too(monkeypatch):
    monkeypatch.setattr(shuffling, "LARGEST_TABLE", 10)
    found, expected = dataset(clean_per_marked=0.5).load(LENGTHS), in_memory(clean_per_marked=0.5)
    assert digest(found) == digest(expected)
    assert digest(found).startswith("rows-")
    assert digest(dataset().load(LENGTHS)) != digest(found)


def test_a_second_start_makes_nothing(capsys, monkeypatch):
    dataset().load(LENGTHS)
    Batches(dataset().load(LENGTHS), 4, LENGTHS, seed=0, pack=True)
    before = {file: file.stat().st_mtime_ns for file in the_folder().iterdir()}
    monkeypatch.setattr(example_maker, "_make", None)
    monkeypatch.setattr(packing, "pack", None)
    for settings in ({}, {"clean_per_marked": 1}, {"seed": 4}):
        dataset(**settings).load(LENGTHS)
    Batches(dataset().load(LENGTHS), 2, LENGTHS, seed=7, pack=True)  # any seed, any batch size
    assert {file: file.stat().st_mtime_ns for file in the_folder().iterdir()} == before
    assert "made before" in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize(
    ("settings", "lengths"),
    [
        ({"vocabulary": tokenization.Bytes(5)}, LENGTHS),
        ({"marks": "first_token"}, LENGTHS),
        ({"loss_until": "first_negative"}, LENGTHS),
        ({"annotated": False}, LENGTHS),
        ({}, LENGTHS | {"targets": 13}),
        ({"files": "other.jsonl"}, LENGTHS),
    ],
    ids=str,
)
def test_whatever_decides_them_has_examples_of_its_own(settings, lengths):
    write([record(number) for number in range(59)], "other.jsonl")
    dataset().load(LENGTHS)
    dataset(**settings).load(lengths)
    assert len(list(pathlib.Path("kept").iterdir())) == 2


def test_records_that_lie_elsewhere_have_the_same_examples():
    dataset().load(LENGTHS)
    pathlib.Path("elsewhere").mkdir()
    pathlib.Path("records.jsonl").rename("elsewhere/records.jsonl")
    dataset(files="elsewhere/*.jsonl").load(LENGTHS)
    the_folder()


def test_several_files_and_ids_that_are_not_given():
    write(
        [{"inputs": "a", "targets": f"fine {n}", "negative_spans": []} for n in range(30)],
        "b.jsonl",
    )
    write([record(number) for number in range(3)], "a.jsonl")
    found = dataset(files="[ab].jsonl").load(LENGTHS)
    assert_same(found, in_memory(files="[ab].jsonl"))
    assert found[3].id == "b:1"
    assert found[-1].id == "b:30"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([record(0), record(1), record(0)], r"records.jsonl:3: the id 'n 0' was used before, at"),
        ([], "records.jsonl: expected records, found none"),
        ([record(0), {"inputs": 3}], "records.jsonl:2: inputs: expected a string"),
        ([{"inputs": "a", "targets": "b"}], "nobody annotated it"),
    ],
)
def test_mistakes_are_those_of_examples_in_memory(rows, message):
    write(rows)
    said = []
    for load in (in_memory, lambda: dataset().load(LENGTHS)):
        with pytest.raises(UsageError, match=message) as error:
            load()
        said.append(str(error.value))
    assert said[0] == said[1]
    assert not [path for path in pathlib.Path("kept").iterdir() if (path / "about.json").exists()]


@pytest.mark.parametrize(
    "lengths", [{"inputs": 6}, {"inputs": 6, "target": 12}, LENGTHS | {"targets": 0}]
)
@pytest.mark.parametrize("folder", ["kept", None])
def test_lengths_are_refused_before_anything_is_tokenised(lengths, folder, monkeypatch):
    monkeypatch.setattr(tokenization.Bytes, "encode", None)
    with pytest.raises(
        UsageError, match=r"^TASK_FEATURE_LENGTHS: expected positive numbers of tok"
    ):
        dataset(examples_dir=folder).load(lengths)
    assert names(pathlib.Path.cwd()) == ["records.jsonl"]


# --- Damage ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rows.bin", "offsets.npy", "digests.npy", "columns.npy"])
def test_a_file_that_is_cut_is_refused_in_one_line(name):
    dataset().load(LENGTHS)
    file = the_folder() / name
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(UsageError, match=r"kept/\w+: expected the examples .* Delete this folder"):
        dataset().load(LENGTHS)


@pytest.mark.parametrize("name", ["offsets.npy", "digests.npy", "columns.npy"])
def test_no_byte_of_an_array_may_be_another(name):
    """Offsets of terabytes, and a header that is no Python, among them."""
    dataset().load(LENGTHS)
    file = the_folder() / name
    content = file.read_bytes()
    for place in (20, 75, 127, 140, len(content) // 2, len(content) - 1):
        for value in (0, content[place] ^ 1, content[place] ^ 128):
            file.write_bytes(content[:place] + bytes([value]) + content[place + 1 :])
            if file.read_bytes() != content:
                with pytest.raises(UsageError, match=r"found damage \(files of .* Delete this f"):
                    dataset().load(LENGTHS)


def test_another_number_of_examples_is_refused():
    dataset().load(LENGTHS)
    file = the_folder() / "about.json"
    for key, value, found in (
        ("num_examples", 59, r"60 examples, and not 59"),
        ("num_examples", None, r"Expected `int`, got `null`"),
        ("bytes", {"offsets.npy": 2}, r"files of"),
    ):
        content = file.read_text()
        file.write_text(json.dumps(json.loads(content) | {key: value}))
        with pytest.raises(UsageError, match=rf"found damage \(.*{found}.*Delete this folder"):
            dataset().load(LENGTHS)
        file.write_text(content)


def test_what_was_kept_and_is_damaged_is_made_again(capsys):
    found = dataset().load(LENGTHS)
    made = np.array([3, 1, 2])
    assert found.kept("order", lambda: made).tolist() == [3, 1, 2]
    (file,) = the_folder().glob("kept_*")
    content = file.read_bytes()
    for place in (0, 20, 75, len(content) - 20, len(content) - 1):
        file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        assert found.kept("order", lambda: made).tolist() == [3, 1, 2]
        assert "found damage: it is made again." in capsys.readouterr().out
        assert file.read_bytes() == content
    file.write_bytes(b"")
    assert found.kept("order", lambda: made).tolist() == [3, 1, 2]
    assert found.kept("order", lambda: 0).tolist() == [3, 1, 2]  # pyright: ignore


def test_a_file_that_is_not_there_is_refused_in_one_line():
    dataset().load(LENGTHS)
    (the_folder() / "about.json").unlink()
    with pytest.raises(UsageError, match=r"expected about.json in a folder of examples, found no"):
        dataset().load(LENGTHS)


def test_no_byte_of_an_example_may_be_another():
    found = dataset().load(LENGTHS)
    file = the_folder() / "rows.bin"
    content = file.read_bytes()
    start, end = np.load(the_folder() / "offsets.npy")[7:9].tolist()
    end -= -(-len("n 7") // 4) * 4  # the id is no part of the digest
    for place in range(start, end):
        with file.open("r+b") as opened:
            opened.seek(place)
            opened.write(bytes([content[place] ^ 0x41]))
        with pytest.raises(UsageError, match=r"the examples that .* \(rows.bin: .* Delete"):
            found[7]
        file.write_bytes(content)
    assert found[7].id == "n 7"


def test_a_damaged_part_is_made_again(monkeypatch):
    """Cut; without bytes, so that its start is before the file; with a header of no Python."""
    write_whole = example_maker._Work._write_whole
    damages = [
        lambda content: content[:0],
        lambda content: content[:100],
        lambda content: content[:200] + content[204:],
        lambda content: content.replace(b"'descr'", b"    (((", 1),
        lambda content: content[:-22] + b"\0" * 22,
    ]

    def damage(work, folder):
        for file, change in zip(sorted(work.folder.glob("*.npz")), damages, strict=False):
            file.write_bytes(change(file.read_bytes()))
        write_whole(work, folder)

    monkeypatch.setattr(example_maker._Work, "_write_whole", damage)
    assert_same(dataset().load(LENGTHS), in_memory())


# --- Stops, and several at once -------------------------------------------------------------------


def test_what_a_stopped_run_has_made_is_not_made_again(monkeypatch):
    made, arrays_of = [], example_maker._arrays_of

    def stopping(plan, part):
        if len(made) == 3:
            raise KeyboardInterrupt
        made.append(part.first_line)
        return arrays_of(plan, part)

    monkeypatch.setattr(example_maker, "_arrays_of", stopping)
    with pytest.raises(KeyboardInterrupt):
        dataset().load(LENGTHS)
    assert [path.suffix for path in pathlib.Path("kept").iterdir()] == [".parts"]

    def counting(plan, part):
        made.append(part.first_line)
        return arrays_of(plan, part)

    monkeypatch.setattr(example_maker, "_arrays_of", counting)
    assert_same(dataset().load(LENGTHS), in_memory())
    assert len(made) == len(set(made)) > 10
    assert the_folder().suffix == ""  # and no parts any more


def test_processes_share_the_work(monkeypatch):
    monkeypatch.setattr(example_maker, "_num_processes", lambda: 2)
    monkeypatch.setattr(example_maker, "_arrays_of", None)  # this process makes none
    found = dataset().load(LENGTHS)
    assert_same(found, in_memory())


def test_a_mistake_that_another_process_finds_is_told_here(monkeypatch):
    monkeypatch.setattr(example_maker, "_num_processes", lambda: 2)
    write([*map(record, range(50)), {"inputs": 3}])
    with pytest.raises(UsageError, match=r"^records.jsonl:51: inputs: expected a string"):
        dataset().load(LENGTHS)


def test_a_full_disk_that_another_process_meets_is_told_here_in_one_line(monkeypatch):
    monkeypatch.setattr(example_maker, "_num_processes", lambda: 2)
    with (
        full_disk(1000),
        pytest.raises(UsageError, match=r"^cannot write: .*File too large\. Make"),
    ):
        dataset().load(LENGTHS)  # a part is larger
    assert_same(dataset().load(LENGTHS), in_memory())


_LOADING = """
import sys
from typing import Any
from tnt_jax.data import datasets, example_maker
from tnt_jax.tokenizers import tokenization
example_maker._BYTES_PER_PART = 400
example_maker._num_processes = lambda: 1
found = datasets.RecordFiles(
    files="records.jsonl", vocabulary=tokenization.Bytes(), examples_dir="kept"
).load({"inputs": 6, "targets": 12})
print(len(found), found[59].id)
"""


def test_runs_that_make_the_same_at_once_end_well():
    write([record(number) for number in range(1000)])
    runs = [
        subprocess.Popen([sys.executable, "-c", _LOADING], stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    said = [run.communicate(timeout=100)[0].splitlines()[-1] for run in runs]
    assert said == ["1000 n 59"] * 3
    assert {file.name for file in the_folder().iterdir()} == {
        *("about.json", "rows.bin", "offsets.npy", "digests.npy", "columns.npy", "sets.npz")
    }


def test_who_finds_them_whole_at_the_last_moment_takes_them(monkeypatch):
    """Between two looks at the folder, another run puts it there."""
    dataset().load(LENGTHS)
    folder, exists = the_folder(), pathlib.Path.exists
    folder.rename("elsewhere")

    def exists_and_then_comes(path):
        found = exists(path)
        if path == folder / "about.json" and exists(pathlib.Path("elsewhere")):
            pathlib.Path("elsewhere").rename(folder)
        return found

    monkeypatch.setattr(example_maker, "_arrays_of", None)
    monkeypatch.setattr(pathlib.Path, "exists", exists_and_then_comes)
    assert len(dataset().load(LENGTHS)) == 60


@pytest.mark.parametrize(
    ("step", "left"),
    [
        ("example_maker.checksum", "*.parts/*.unfinished/rows.bin"),
        ("example_maker.shutil.rmtree", "*.parts/00000.npz"),  # the whole is there
    ],
)
def test_a_run_that_is_killed_while_it_joins_leaves_nothing_for_ever(step, left):
    killing = f"""
import os, signal
from tnt_jax.data import example_maker
{step} = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
{_LOADING}"""
    done = subprocess.run([sys.executable, "-c", killing], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL
    assert [file.stat().st_size > 0 for file in pathlib.Path("kept").glob(left)] == [True]
    assert_same(dataset().load(LENGTHS), in_memory())
    assert names(pathlib.Path("kept")) == [the_folder().name]


def test_a_run_that_is_killed_leaves_nothing_that_is_taken_for_whole():
    write([record(number) for number in range(1000)])
    killing = f"""
import itertools, os, signal
from tnt_jax.data import example_maker
real, number = example_maker._arrays_of, itertools.count()


def arrays_of(*arguments):
    if next(number) == 10:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*arguments)


example_maker._arrays_of = arrays_of
{_LOADING}"""
    done = subprocess.run([sys.executable, "-c", killing], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL
    assert len(names(*pathlib.Path().glob("kept/*.parts"))) >= 10
    assert not list(pathlib.Path("kept").glob("*/about.json"))
    assert_same(dataset().load(LENGTHS), in_memory())


# --- Records that change meanwhile ----------------------------------------------------------------


@pytest.mark.parametrize("how", ["replaced", "written over"])
@pytest.mark.parametrize("number", [0, 3])
def test_records_that_change_while_they_are_read_are_refused(how, number, monkeypatch):
    """Else examples of other records would be found under the digest of these."""
    file, part_of, made = pathlib.Path("records.jsonl"), example_maker._arrays_of, []

    def change():
        other = file.read_text().replace("good", "GOOD")  # of the same size
        if how == "replaced":
            pathlib.Path("new.jsonl").write_text(other)
            pathlib.Path("new.jsonl").rename(file)
        else:
            file.write_text(other)
            os.utime(file, (0, 0))  # another time, however coarse the clock of files is

    def meanwhile(plan, part):
        if len(made) == number:
            change()
        made.append(part)
        return part_of(plan, part)

    monkeypatch.setattr(example_maker, "_arrays_of", meanwhile)
    message = r"^records\.jsonl: expected the records that .* Let nothing write the file while exam"
    with pytest.raises(UsageError, match=message):
        dataset().load(LENGTHS)
    assert len(made) == number + 1
    assert not [*pathlib.Path("kept").glob("*/about.json")]
    monkeypatch.setattr(example_maker, "_arrays_of", part_of)
    assert_same(dataset().load(LENGTHS), in_memory())


@pytest.mark.parametrize("is_gone", [False, True])
def test_records_that_change_before_the_parts_are_joined_are_refused(is_gone, monkeypatch):
    made, content = example_maker._Work.made, pathlib.Path("records.jsonl").read_bytes()

    def made_and_then_changed(work):
        yield from made(work)
        write([record(number) for number in range(60, 120)])
        if is_gone:
            pathlib.Path("records.jsonl").unlink()

    monkeypatch.setattr(example_maker._Work, "made", made_and_then_changed)
    with pytest.raises(
        UsageError, match=r"^records\.jsonl: expected the records that .* Let nothing"
    ):
        dataset().load(LENGTHS)
    monkeypatch.setattr(example_maker._Work, "made", made)
    pathlib.Path("records.jsonl").write_bytes(content)
    assert_same(dataset().load(LENGTHS), in_memory())


def test_other_processes_see_that_records_change(monkeypatch):
    monkeypatch.setattr(example_maker, "_num_processes", lambda: 2)
    started = example_maker._make_in_processes

    def changed_before(*arguments):
        write([record(number) for number in range(60, 120)])
        return started(*arguments)

    monkeypatch.setattr(example_maker, "_make_in_processes", changed_before)
    with pytest.raises(
        UsageError, match=r"^records\.jsonl: expected the records that .* Let nothing"
    ):
        dataset().load(LENGTHS)


# --- Where they lie -------------------------------------------------------------------------------


def test_few_records_leave_no_files():
    assert isinstance(in_memory(), list)
    assert names(pathlib.Path.cwd()) == ["records.jsonl"]


def test_many_records_have_their_examples_beside_them_or_in_the_model_dir(monkeypatch, capsys):
    monkeypatch.setattr(datasets, "_SMALLEST", 1000)
    dataset(examples_dir=None).load(LENGTHS, "model")
    assert names(pathlib.Path.cwd()) == ["records.jsonl", "records.jsonl.examples"]
    pathlib.Path("records.jsonl.examples").rename("elsewhere")
    pathlib.Path("records.jsonl.examples").touch()  # as where it cannot be written
    found = dataset(examples_dir=None).load(LENGTHS, "model")
    assert "60 examples are in model/examples/" in capsys.readouterr().out
    pathlib.Path("model/examples").rename("elsewhere/examples")
    pathlib.Path("model/examples").touch()
    assert_same(dataset(examples_dir=None).load(LENGTHS, "model"), found)
    out = capsys.readouterr().out
    assert "examples and model/examples cannot be written, so examples are made in memory" in out


def test_where_they_cannot_lie():
    with pytest.raises(UsageError, match="EXAMPLES_DIR: expected a local folder"):
        dataset(examples_dir="gs://bucket/kept").load(LENGTHS)


# --- Long sets of ids -----------------------------------------------------------------------------


def test_a_long_set_is_stored_once_however_many_examples_have_it():
    def size_of(rows):
        write(rows)
        dataset().load(LENGTHS)
        files = [*the_folder().iterdir()]
        size = sum(file.stat().st_size for file in files if file.suffix != ".json")
        shutil.rmtree("kept")
        return size

    ids = [*range(3, 259)]
    rows = [record(n) | {"negative_token_ids": [[0, ids], [1, ids]]} for n in range(1, 60)]
    few, many = size_of(rows[:10]), size_of(rows)
    # Two sets of 256 ids would be 4,096 bytes an example; an example without them has about 200.
    assert many - few < 49 * 350
    for example in dataset().load(LENGTHS):
        assert {(p, i) for p in (0, 1) for i in ids} <= {*map(tuple, example.negative_pairs)}


def test_a_set_that_is_damaged_is_found():
    dataset().load(LENGTHS)
    file = the_folder() / "sets.npz"
    content = bytearray(file.read_bytes())
    content[content.index(np.array(LONG[:8], "<i4").tobytes()) + 4] ^= 1
    file.write_bytes(content)
    with pytest.raises(UsageError, match="found damage"):
        [*dataset().load(LENGTHS)]
