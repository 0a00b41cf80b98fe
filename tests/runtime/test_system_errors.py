"""What the system does not let us read is not damaged, and nobody is told to delete it."""

import contextlib
import errno
import json
import os
import pathlib
import re
import resource
import shutil
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from etils import epath
from helpers.full_disk import full_disk
from helpers.huggingface_model import write_directory

from tnt_jax import convert
from tnt_jax.checkpoints import pretrained
from tnt_jax.data import removed_everywhere
from tnt_jax.data.examples import Example
from tnt_jax.runtime import errors, failures, files, output_parts, stages
from tnt_jax.tokenizers import tokenization, vocabularies
from tnt_jax.training import original_cache

pytestmark = [
    pytest.mark.usefixtures("reads_left_alone"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

LENGTHS = {"inputs": 4, "targets": 8}
EXAMPLES = [
    Example(
        inputs=np.array([2 + i // 30, 2 + i % 30], np.int32),
        targets=np.arange(2, 3 + i % 8, dtype=np.int32),
        negative_pairs=np.zeros((0, 2), np.int32),
    )
    for i in range(400)
]


def states_of(batch):
    """Stand-ins for states: the id of every token, and the first id of the input."""
    tokens = batch["decoder_target_tokens"]
    first = np.broadcast_to(batch["encoder_input_tokens"][:, :1], tokens.shape)
    return {"states": np.stack([tokens, first], axis=-1).astype(np.float32)}


def computed(folder, examples=EXAMPLES[:4]):
    states = original_cache.OriginalStates(folder, "one", LENGTHS)
    original_cache.compute({"states": states}, [examples], states_of, batch_size=4)
    return states


def one_stage(output):
    def function(*, output):
        pathlib.Path(output).mkdir(exist_ok=True)

    stages.Stages(pathlib.Path("root")).run(
        "train", function, output=output, inputs={}, settings={}, goes_on=True
    )


@pytest.fixture(scope="module", autouse=True)
def whole(tmp_path_factory):
    """A model in every format, states, and what a stopped program leaves."""
    folder = tmp_path_factory.mktemp("system")
    with contextlib.chdir(folder):
        write_directory(folder / "huggingface", max_shard_bytes=3000)
        texts = ["the house is wonderful"]
        tokenization.train_sentencepiece(texts, "spiece.model", vocab_size=17)
        vocabulary = tokenization.SentencePiece("spiece.model", 19)
        vocabularies.write(epath.Path("huggingface"), vocabulary)
        for output_format in ("t5x", "t5x_orbax", "orbax"):
            convert.convert(input="huggingface", output=output_format, output_format=output_format)
        computed("states")
        yield folder


def read_model(path):
    opened = pretrained.open_checkpoint(path)
    for array in opened.weights.values():
        array.load()
    vocabulary = pretrained.vocabulary(path)
    tokenization.check_vocabulary(vocabulary)


def read_states(path):
    states = original_cache.OriginalStates(path, "one", LENGTHS)
    assert states.of(EXAMPLES[3]).tolist() == [[2.0, 2.0], [3.0, 2.0], [4.0, 2.0], [5.0, 2.0]]


def message_of(function, path):
    """What a program that meets it says."""
    with pytest.raises((OSError, errors.UsageError)) as caught:
        function(path)
    message = failures.explain(caught.value)
    assert message is not None
    return message


def assert_of_system(message, reason):
    assert reason in message
    assert not re.search("damaged|[Dd]elete|Copy it|missing|not all of|there is none", message)


# --- A disk that fails ----------------------------------------------------------------------------

FAILS = "/proc/self/mem"  # may be opened, and its first byte cannot be read: an error of the disk
KINDS = {"states": read_states}


@pytest.mark.parametrize(
    "file",
    [
        "huggingface/config.json",
        "huggingface/model.safetensors.index.json",
        "huggingface/model-00001-of-00012.safetensors",
        "huggingface/tokenizer_config.json",
        "huggingface/spiece.model",
        "t5x/checkpoint_0/checkpoint",
        "t5x_orbax/checkpoint_0/state/_METADATA",
        "orbax/checkpoint_0/params/_METADATA",
        "states/one/part_*.json",
        "states/one/part_*.npy",
    ],
)
def test_a_disk_that_fails(whole, file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = message_with_links(whole, file, FAILS)
    assert_of_system(message, "Input/output error: ")
    assert re.search(file.rpartition("/")[0].replace("*", ".*"), message)


@pytest.mark.parametrize(
    "file",
    [
        "t5x/checkpoint_0/target.decoder.decoder_norm.scale/.zarray",
        "t5x/checkpoint_0/target.decoder.decoder_norm.scale/0",
        "orbax/checkpoint_0/params/d/*",
        "t5x_orbax/checkpoint_0/state/d/*",
    ],
)
def test_links_that_lead_nowhere(whole, file, tmp_path, monkeypatch):
    """TensorStore reads as many bytes as a file is said to have, and that of above has none."""
    monkeypatch.chdir(tmp_path)
    pathlib.Path("loop").symlink_to(tmp_path / "loop")
    message = message_with_links(whole, file, tmp_path / "loop")
    assert_of_system(message, "Too many levels of symbolic links: ")


def message_with_links(whole, file, target):
    """What is said where files of a copy are links instead."""
    name, _, pattern = file.partition("/")
    shutil.copytree(whole / name, name)
    found = sorted(pathlib.Path(name).glob(pattern))
    assert found
    for path in found:
        path.unlink()
        path.symlink_to(target)
    return message_of(KINDS.get(name, read_model), name)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_files_of_somebody_without_a_name(whole, tmp_path, monkeypatch):
    """In a container the owner of a mounted folder is often a number."""
    shutil.copytree(whole / "huggingface", tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    for file in pathlib.Path("model").iterdir():
        os.chown(file, 54321, 54321)
    read_model("model")


def test_states_that_are_damaged_are_still_named(whole, tmp_path, monkeypatch):
    shutil.copytree(whole / "states", tmp_path / "states")
    monkeypatch.chdir(tmp_path)
    (array,) = pathlib.Path("states/one").glob("*.npy")
    content = array.read_bytes()
    index = array.with_suffix(".json")
    for changed in (b"", content[:-1], b"PK\x03\x04" + content, content.replace(b"<f4", b">f4")):
        array.write_bytes(changed)
        message = message_of(read_states, "states")
        assert message.startswith(f"{index}: expected states of the original, with a file .npy")
        assert message.endswith("Delete both: they will be computed again.")
    array.unlink()
    assert "FileNotFoundError" in message_of(read_states, "states")
    # Shorter than it was when the run began.
    array.write_bytes(content)
    states = original_cache.OriginalStates("states", "one", LENGTHS)
    array.write_bytes(content[:-8])
    assert "found 24 of 32 bytes from row 6 on" in message_of(states.of, EXAMPLES[3])


@pytest.mark.parametrize(
    "place",
    [[0, 3], [0.0, 1], [True, 1], [0, 1e400], ["0", "1"], [-1, 1], [0, 10**30], [10, 1], [0], 7],
)
def test_rows_that_no_part_has(whole, tmp_path, monkeypatch, place):
    shutil.copytree(whole / "states", tmp_path / "states")
    monkeypatch.chdir(tmp_path)
    (index,) = pathlib.Path("states/one").glob("*.json")
    about = json.loads(index.read_text())
    about["keys"][original_cache.OriginalStates("states", "one", LENGTHS).key(EXAMPLES[3])] = place
    index.write_text(json.dumps(about))
    assert message_of(read_states, "states").startswith(f"{index}: expected states of the original")


def test_what_a_stopped_program_did_is_not_discarded(tmp_path, monkeypatch):
    """It was taken for missing, and the folder with all finished parts was deleted."""
    monkeypatch.chdir(tmp_path)
    work = {"seed": 1}
    with pytest.raises(KeyError), output_parts.opened("output.jsonl", [1, 1], work) as begun:
        begun.add(0, ["a\n"], {})
        raise KeyError
    folder = pathlib.Path("output.jsonl.parts")
    names = sorted(file.name for file in folder.iterdir())
    assert "00000.jsonl" in names
    for name in names:
        content = (folder / name).read_bytes()
        (folder / name).unlink()
        (folder / name).symlink_to(FAILS)

        def begin(path):
            with output_parts.opened(path, [1, 1], work):
                raise AssertionError("begun without what is there")

        assert_of_system(message_of(begin, "output.jsonl"), "Input/output error")
        (folder / name).unlink()
        (folder / name).write_bytes(content)
    with output_parts.opened("output.jsonl", [1, 1], work) as again:
        assert again.missing == [1]
        again.add(1, ["b\n"], {})
        again.join(removed_everywhere.replacing("output.jsonl", None))
    assert pathlib.Path("output.jsonl").read_text() == "a\nb\n"


def test_a_note_that_cannot_be_read_is_not_missing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one_stage("model")
    note = stages.note_path(pathlib.Path("root"), "train")
    files.write_json(str(note), {**json.loads(note.read_text()), "seconds": "x"})
    one_stage("model")
    note.unlink()
    note.symlink_to(FAILS)
    assert_of_system(message_of(one_stage, "model"), "Input/output error")


# --- A full disk ----------------------------------------------------------------------------------


def test_states_for_which_there_is_no_room(tmp_path, monkeypatch):
    """NumPy says only how many numbers it could write."""
    monkeypatch.chdir(tmp_path)
    with full_disk(6000):  # less than the array
        message = message_of(lambda folder: computed(folder, EXAMPLES), "states")
    assert re.match(r"cannot write: the disk takes no more \(\d+ requested and \d+ writ", message)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == []
    computed("states")
    read_states("states")


# --- Too many open files --------------------------------------------------------------------------


@contextlib.contextmanager
def no_further_file():
    """This process may open none, until it ends."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.parametrize("name", ["huggingface", "t5x", "t5x_orbax", "orbax", "states"])
def test_no_further_file_may_be_opened(whole, name, monkeypatch):
    monkeypatch.chdir(whole)
    read = KINDS.get(name, read_model)
    read(name)
    with no_further_file():
        message = message_of(read, name)
    assert_of_system(message, "Too many open files: ")
    assert message.endswith(". Raise the limit of open files: `ulimit -n`.")
    read(name)


def test_arrays_that_are_open_already(whole, monkeypatch):
    monkeypatch.chdir(whole)
    for name in ("huggingface", "t5x", "orbax"):
        array = pretrained.open_checkpoint(name).weights["decoder/layers_0/mlp/wo/kernel"]
        array.load()
        with no_further_file():
            message = message_of(lambda _, array=array: array.load(), name)
        assert_of_system(message, "Too many open files: ")


# What a billion tokens are to a limit of 1,024: more parts than files that may be open.
MANY_PARTS = """
    import os, random, resource, sys
    import numpy as np
    from tnt_jax.training import original_cache
    from test_system_errors import EXAMPLES, LENGTHS, states_of

    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    original_cache._TOKENS_PER_PART = 4
    states = original_cache.OriginalStates("many", "one", LENGTHS)
    original_cache.compute({"states": states}, [EXAMPLES], states_of, batch_size=2)
    assert len(os.listdir("many/one")) // 2 > 128
    again = original_cache.OriginalStates("many", "one", LENGTHS)
    assert again.missing([again.key(example) for example in EXAMPLES]) == set()
    rows = list(enumerate(EXAMPLES))
    random.Random(0).shuffle(rows)
    for start in range(0, len(rows), 100):
        batch = rows[start : start + 100]
        placed = [(example, row, 1) for row, (_, example) in enumerate(batch)]
        found = again.feature(placed, (100, 9))
        for row, (_, example) in enumerate(batch):
            of_row = found[row, 1 : 1 + len(example.targets)]
            assert of_row[:, 0].tolist() == example.targets.tolist()
            assert (of_row[:, 1] == example.inputs[0]).all()
        assert not found[:, 0].any() and not found[0, 1 + len(batch[0][1].targets) :].any()
    assert len(os.listdir("/proc/self/fd")) < 64
    print("read")
"""


def test_more_parts_than_files_that_may_be_open(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    here = pathlib.Path(__file__).parent
    paths = [str(here), str(here.parent)]
    program = f"import sys; sys.path[:0] = {paths!r}\n{textwrap.dedent(MANY_PARTS)}"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("read\n")


# --- No permission --------------------------------------------------------------------------------

WITHOUT_PERMISSION = """
    import os
    from tnt_jax.checkpoints import pretrained
    from tnt_jax.runtime import failures
    if os.geteuid() == 0:  # whom nothing is forbidden
        os.seteuid(65534)
    for path in ("closed", "closed/model", "open"):
        try:
            pretrained.open_checkpoint(path)
        except Exception as error:
            print(failures.explain(error))
"""


def test_a_folder_that_may_not_be_entered(whole, tmp_path, monkeypatch):
    """Nothing in it seems to exist."""
    monkeypatch.chdir(tmp_path)
    for folder in (tmp_path, *tmp_path.parents):  # pytest keeps its own for their owner
        if folder.stat().st_uid == pathlib.Path.cwd().stat().st_uid and folder != folder.parent:
            with contextlib.suppress(PermissionError):
                folder.chmod(folder.stat().st_mode | 0o055)
    shutil.copytree(whole / "huggingface", "closed")
    shutil.copytree(whole / "huggingface", "open")
    pathlib.Path("open/config.json").chmod(0)
    pathlib.Path("closed").chmod(0o744)
    program = textwrap.dedent(WITHOUT_PERMISSION)
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    pathlib.Path("closed").chmod(0o755)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if "Warning" not in line]
    assert len(lines) == 3
    for line, path in zip(lines, ("closed", "closed/model", "open/config.json"), strict=True):
        assert line.startswith("Permission denied: ") and path in line


# --- Whose error it is ----------------------------------------------------------------------------


def test_what_tensorstore_says():
    text = (
        'RESOURCE_EXHAUSTED: Error opening "zarr" driver: Error reading local file "/a/.zarray": '
        "Failed to open: \"/a/.zarray\": Too many open files [os_error_code='24']"
    )
    found = errors.of_tensorstore(ValueError(text))
    assert (found.errno, found.filename) == (errno.EMFILE, "/a/.zarray")
    assert failures.out_of_memory(ValueError(text)) is None
    assert failures.out_of_memory(ValueError("RESOURCE_EXHAUSTED: 12 GB")) is not None
    assert errors.of_tensorstore(ValueError('NOT_FOUND: "a"')) is None


@pytest.mark.parametrize(
    ("error", "is_of_system"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "a"), True),
        (OSError(errno.ENOSPC, "No space left on device", "a"), True),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "a"), False),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "a"), False),
        (OSError("a library's own"), False),
        (ValueError("a"), False),
    ],
)
def test_whose_error_it_is(error, is_of_system):
    wrapped = ValueError("the file is damaged")
    wrapped.__cause__ = error
    for one in (error, wrapped):
        found = errors.system_error(one)
        assert (found is not None) == is_of_system
        if found is not None:
            assert type(found) is type(error) and str(found) == str(error)


def test_json_that_is_not_there_is_still_said_to_be_none():
    with pytest.raises(errors.UsageError, match="expected a JSON file, found nowhere: No such"):
        files.read("nowhere")
