"""No file of others runs anything, leads out of its directory, or takes memory for what it lacks.

Code comes in by what a user sets alone: gin files, modules of tasks, functions of annotators.
"""

import ast
import contextlib
import json
import pathlib
import pickle
import sys

import flax.serialization
import numpy as np
import pytest
from etils import epath
from helpers.huggingface_model import write_directory

import tnt_jax
from tnt_jax import convert
from tnt_jax.checkpoints import huggingface, lazy_arrays, orbax, pretrained, safetensors_files, t5x
from tnt_jax.data import records
from tnt_jax.runtime.errors import UsageError
from tnt_jax.tokenizers import tokenization, vocabularies
from tnt_jax.training import original_cache

PACKAGE = pathlib.Path(tnt_jax.__file__).parent
pytestmark = [
    pytest.mark.usefixtures("reads_left_alone"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

# --- Nothing that could run what a file holds is there --------------------------------------------

RUNS_CODE = {
    *("pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "jsonpickle"),
    *("yaml", "torch", "subprocess", "runpy", "code", "ctypes"),
}
# They start a program of ours, always the same. Templates run in one, with limits and no files;
# examples are made in others, which are told of everything as JSON.
ALLOWED = {"template_renderer": {"subprocess"}, "example_maker": {"subprocess"}}


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda file: file.stem)
def test_no_module_can(file):
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        found = RUNS_CODE & {name.partition(".")[0] for name in names}
        assert found <= ALLOWED.get(file.stem, set()), ast.unparse(node)
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("eval", "exec", "compile", "__import__", "os.system"), called
            if called == "np.load":  # which unpickles where it is told to
                allowed = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert allowed["allow_pickle"] == "False"


class Evil:
    """Whoever unpickles it makes a directory."""

    def __reduce__(self):
        return pathlib.Path.mkdir, (pathlib.Path("pwned"),)


EVIL = pickle.dumps(Evil())
_unpickled = []
_is_watching = False


def _watch(event, arguments):
    if _is_watching and event == "pickle.find_class":
        _unpickled.append(arguments)


sys.addaudithook(_watch)  # for good: Python takes none away


@contextlib.contextmanager
def nothing_is_unpickled():
    global _is_watching
    _is_watching = True
    try:
        yield
    finally:
        _is_watching = False
    assert not _unpickled
    assert not pathlib.Path("pwned").exists()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model in every format, and the vocabulary that it came with."""
    folder = tmp_path_factory.mktemp("security")
    with contextlib.chdir(folder):
        write_directory(folder / "huggingface")
        texts = ["the house is wonderful"]
        tokenization.train_sentencepiece(texts, "spiece.model", vocab_size=17)
        vocabulary = tokenization.SentencePiece("spiece.model", 19)
        vocabularies.write(epath.Path("huggingface"), vocabulary)
        for output_format in ("t5x", "t5x_orbax", "orbax"):
            convert.convert(input="huggingface", output=output_format, output_format=output_format)
        yield folder


@pytest.fixture
def copy(folder, tmp_path):
    """A function that copies a directory of `folder`, so that a test may change it."""
    with contextlib.chdir(tmp_path):

        def copy(name):
            source = epath.Path(folder / name)
            for file in sorted(pathlib.Path(source).rglob("*")):
                if file.is_file():
                    place = tmp_path / name / file.relative_to(source)
                    place.parent.mkdir(parents=True, exist_ok=True)
                    place.write_bytes(file.read_bytes())
            return tmp_path / name

        yield copy


def read_everything(path):
    opened = pretrained.open_checkpoint(str(path))
    for array in opened.weights.values():
        array.load()
    tokenization.check_vocabulary(pretrained.vocabulary(str(path)))


@pytest.mark.parametrize("name", ["huggingface", "t5x", "t5x_orbax", "orbax"])
def test_a_model_is_read_without_pickle(copy, name):
    with nothing_is_unpickled():
        read_everything(copy(name))


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("huggingface", "model.safetensors"),
        ("huggingface", "config.json"),
        ("huggingface", "spiece.model"),
        ("huggingface", "tokenizer_config.json"),
        ("t5x", "checkpoint_0/checkpoint"),
        ("t5x", "checkpoint_0/target.decoder.decoder_norm.scale/0"),
        ("t5x", "checkpoint_0/target.decoder.decoder_norm.scale/.zarray"),
        ("t5x_orbax", "checkpoint_0/state/_METADATA"),
        ("orbax", "checkpoint_0/params/_METADATA"),
        ("orbax", "checkpoint_0/params/manifest.ocdbt"),
    ],
)
def test_a_pickle_in_the_place_of_a_file(copy, name, file):
    path = copy(name)
    assert (path / file).is_file()
    (path / file).write_bytes(EVIL)
    with nothing_is_unpickled(), pytest.raises(UsageError):
        read_everything(path)


def test_weights_of_torch_are_never_opened(copy):
    path = copy("huggingface")
    (path / "model.safetensors").unlink()
    (path / "pytorch_model.bin").write_bytes(EVIL)
    with nothing_is_unpickled(), pytest.raises(UsageError, match=r"found pytorch_model\.bin"):
        pretrained.open_checkpoint(str(path))


def test_data_and_states_without_pickle(tmp_path):
    with contextlib.chdir(tmp_path):
        pathlib.Path("rows.jsonl").write_bytes(EVIL)
        with nothing_is_unpickled(), pytest.raises(UsageError):
            records.read_records("rows.jsonl")
        states = pathlib.Path("states/original")
        states.mkdir(parents=True)
        np.save(states / "part_0.npy", np.array([[Evil()]]), allow_pickle=True)
        (states / "part_0.json").write_text('{"dtype": "float32", "keys": {"a": [0, 1]}}')
        with nothing_is_unpickled(), pytest.raises(UsageError, match="Delete both"):
            original_cache.OriginalStates("states", "original", {"inputs": 4, "targets": 4})


# --- Paths stay inside the directory --------------------------------------------------------------


@pytest.mark.parametrize("shard", ["..", ".", "", "a/../../b", "/etc/hosts", "a\0b", "a\\b"])
def test_shards(tmp_path, shard):
    write_directory(tmp_path, max_shard_bytes=3000)
    (tmp_path / safetensors_files.INDEX).write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(UsageError, match="expected the names of files in this directory, found"):
        huggingface.read(epath.Path(tmp_path))


@pytest.mark.parametrize("path", ["..", "a/..", "/", "", "x\0", None, 7, ["a"]])
def test_arrays_of_t5x(copy, path):
    file = copy("t5x") / "checkpoint_0" / "checkpoint"
    content = flax.serialization.msgpack_restore(file.read_bytes())
    content["optimizer"]["target"]["decoder"]["decoder_norm"]["scale"]["kvstore"]["path"] = path
    file.write_bytes(flax.serialization.msgpack_serialize(content))
    with pytest.raises(UsageError, match="expected the names of arrays in this directory, found"):
        pretrained.open_checkpoint(str(file.parent))


def test_arrays_of_orbax(copy):
    """Names of parameters that lead elsewhere, in a checkpoint that is no database."""
    item = copy("orbax") / "checkpoint_0" / "params"
    (item / "manifest.ocdbt").unlink()
    text = (item / "_METADATA").read_text()
    assert "decoder_norm" in text
    (item / "_METADATA").write_text(text.replace("decoder_norm", "../../../decoder_norm"))
    with pytest.raises(UsageError, match=r"expected what Orbax wrote"):
        orbax.lazy_item(epath.Path(item))


# --- Sizes are checked before memory is taken -----------------------------------------------------


def test_a_header_that_is_too_long(tmp_path):
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write((2**40 - 16).to_bytes(8, "little"))
        file.truncate(2**40)  # a hole: it takes no room
    with pytest.raises(UsageError, match=r"a header of 1,099,511,627,760 bytes"):
        safetensors_files.read(epath.Path(path))


def test_a_tensor_that_is_not_there(tmp_path):
    header = {"a": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 2**82]}}
    content = json.dumps(header).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(content).to_bytes(8, "little") + content)
    with pytest.raises(UsageError, match=r"as its header says, found .* cut short"):
        safetensors_files.read(epath.Path(path))


def test_lists_that_claim_to_be_long(tmp_path):
    """Each would be made room for, one within the other: 4 GB for a file of a megabyte."""
    claim = b"\xdd" + (10**6).to_bytes(4, "big")
    (tmp_path / "checkpoint").write_bytes(claim * 500 + bytes(10**6))
    with pytest.raises(UsageError, match=r"1000000 exceeds max_array_len\(1000\)"):
        t5x.read_legacy(epath.Path(tmp_path))


def test_an_array_that_its_files_cannot_hold(copy):
    path = copy("t5x")
    metadata = path / "checkpoint_0" / "target.decoder.decoder_norm.scale" / ".zarray"
    settings = json.loads(metadata.read_text())
    metadata.write_text(json.dumps({**settings, "shape": [2**40], "chunks": [2**40]}))
    with pytest.raises(UsageError, match=r"should take 4,398,[\d,]+ bytes, and its files have"):
        pretrained.open_checkpoint(str(path))


@pytest.mark.parametrize("shape", [(), (0, 4), (10**9, 4)])
def test_layers_that_no_network_has(shape):
    array = lazy_arrays.LazyArray(shape, np.dtype(np.float32), "here", lambda index: np.zeros(0))
    with pytest.raises(UsageError, match=r"here: expected axis 0 to be of layers, 1 to 1,000 of"):
        lazy_arrays.layers_apart({"encoder/layers/mlp/wo/kernel": array})


@pytest.mark.parametrize("name", ["huggingface", "t5x", "orbax"])
def test_settings_of_more_layers_than_there_are_arrays(copy, name):
    path = copy(name)
    config = path / "config.json" if name == "huggingface" else path / "huggingface/config.json"
    settings = json.loads(config.read_text())
    config.write_text(json.dumps({**settings, "num_layers": 900, "num_decoder_layers": 1}))
    with pytest.raises(UsageError, match=r"config\.json: expected .* found 901 layers"):
        pretrained.open_checkpoint(str(path))


def test_more_extra_ids_than_a_vocabulary_has(copy):
    path = copy("huggingface")
    settings = {"tokenizer_class": "T5Tokenizer", "extra_ids": 10**12}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(UsageError, match=r"EXTRA_IDS: expected 0 to 100,000 ids"):
        pretrained.vocabulary(str(path))


def test_a_json_file_that_is_too_large(copy):
    path = copy("huggingface")
    with (path / "config.json").open("r+b") as file:
        file.truncate(2**40)
    with pytest.raises(UsageError, match=r"it has 1,099,511,627,776 bytes, and 268,435,456 are"):
        pretrained.open_checkpoint(str(path))


def test_small_models_of_constants_are_believed(tmp_path):
    """Zeros compress a thousandfold: a small model of them is no lie."""
    array = np.zeros((1000, 1000), np.float32)
    arrays = {"a": lazy_arrays.of_array(array, "here")}
    t5x.write_legacy(epath.Path(tmp_path) / "checkpoint_1", arrays, 1)
    found, _ = t5x.read_legacy(epath.Path(tmp_path) / "checkpoint_1")
    assert not found["a"].load().any()
