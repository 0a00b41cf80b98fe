"""Every tensor and every setting of a model, changed one at a time, in every format.

What comes of it is the model, or one line; never another exception, much time, or memory for what
is not there. Random damage is in `test_fuzz.py`, and what is said of whole files in
`test_security.py`.
"""

import contextlib
import dataclasses
import json
import pathlib
import resource
import shutil

import flax.serialization
import flax.traverse_util
import jax
import msgpack
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy
import tensorstore as ts
from etils import epath
from helpers.huggingface_model import TINY, write_directory
from helpers.mutations import LACKING, outcome, places, with_change

from tnt_jax import convert
from tnt_jax.checkpoints import lazy_arrays, orbax, pretrained
from tnt_jax.models import adapters, sharding, t5
from tnt_jax.models.model import Model
from tnt_jax.runtime import errors, failures
from tnt_jax.tokenizers import tokenization, vocabularies

pytestmark = [
    pytest.mark.usefixtures("reads_left_alone"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

CONFIG = dataclasses.replace(TINY, num_encoder_layers=1, num_decoder_layers=1)
# All that is read of a config.json, and more of what the hub's have.
SETTINGS = {
    "scale_decoder_outputs": False,
    "tie_word_embeddings": False,
    "n_positions": 512,
    "dtype": "float32",
}
TOKENIZER = {
    "added_tokens": [{"id": 6 - i, "content": f"<extra_id_{i}>"} for i in range(2)],
    "normalizer": {"type": "Precompiled", "precompiled_charsmap": ""},
    "model": {
        "type": "Unigram",
        "unk_id": 2,
        "byte_fallback": False,
        "vocab": [["<pad>", 0.0], ["</s>", 0.0], ["<unk>", 0.0], ["▁the", -1.0], ["▁house", -2.0]],
    },
}
BYTES = {
    "tokenizer_class": "ByT5Tokenizer",
    "extra_ids": 2,
    "additional_special_tokens": ["<extra_id_0>", "<extra_id_1>"],
    "added_tokens_decoder": {"259": {"content": "<extra_id_0>"}},
}


@pytest.fixture(scope="module", autouse=True)
def world(tmp_path_factory):
    """The same model in every format, and tokenizers of all kinds."""
    folder = tmp_path_factory.mktemp("damaged")
    with contextlib.chdir(folder):
        write_directory(folder / "huggingface", CONFIG)
        change_json("huggingface/config.json", lambda config: config | SETTINGS)
        tokenization.train_sentencepiece(["the house is wonderful"], "spiece.model", vocab_size=17)
        vocabulary = tokenization.SentencePiece("spiece.model", 19)
        vocabularies.write(epath.Path("huggingface"), vocabulary)
        write_json("huggingface/generation_config.json", {"max_length": 20, "eos_token_id": 1})
        write_json("huggingface/special_tokens_map.json", {"eos_token": "</s>"})
        write_directory(folder / "sharded", CONFIG, max_shard_bytes=6000)
        for name in ("t5x", "t5x_orbax", "orbax"):
            convert.convert(input="huggingface", output=name, output_format=name)
        convert.convert(
            input="huggingface", output="t5x_scanned", output_format="t5x", scan_layers=True
        )
        write_adapters()
        write_tokenizers()
        yield folder


def write_json(path, value):
    pathlib.Path(path).write_text(json.dumps(value))


def change_json(path, change):
    write_json(path, change(json.loads(pathlib.Path(path).read_text())))


def write_adapters():
    """A run of adapters beside the model."""
    added = adapters.init(t5.T5(CONFIG).abstract_params(), 2, jax.random.key(0))
    run = {
        "original": {"path": "huggingface", "digest": "0"},
        "adapters": {"alpha": 4.0, "rank": 2, "beside": "huggingface"},
        "data": {"num_examples": 1},
    }
    items = {"params": ocp.args.StandardSave(added), "run": ocp.args.JsonSave(run)}
    orbax.save_items(epath.Path("adapters").absolute(), 0, items)
    shutil.copytree("orbax/huggingface", "adapters/huggingface")


def write_tokenizers():
    for name, files in (
        ("pieces", {"tokenizer.json": TOKENIZER, "tokenizer_config.json": {"extra_ids": 2}}),
        ("bytes", {"tokenizer_config.json": BYTES, "added_tokens.json": {"<extra_id_1>": 260}}),
    ):
        pathlib.Path(name).mkdir()
        for file, value in files.items():
            write_json(f"{name}/{file}", value)


@pytest.fixture(autouse=True)
def no_memory():
    """A size that is believed is gigabytes; all that is here are kilobytes."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # of a kilobyte each


@pytest.fixture
def damaged(request):
    """A copy, to be changed, of one of those formats."""
    shutil.rmtree("damaged", ignore_errors=True)
    shutil.copytree(request.param, "damaged")
    return pathlib.Path("damaged")


def of_format(*names):
    return pytest.mark.parametrize("damaged", names, indirect=True)


MESH = sharding.make_mesh(sharding.MeshShape())


def read(path):
    """Everything of a model, on the devices; returns what was opened, and its settings."""
    opened = pretrained.open_checkpoint(str(path))
    for array in opened.weights.values():
        array.load()
    config = pretrained.config_of(pretrained.FromCheckpoint(), opened)
    opened.restore(Model(config=config, mesh=MESH).abstract_params)
    return opened, config


def read_tokenizer(path):
    vocabulary = pretrained.vocabulary(str(path))
    tokenization.check_vocabulary(vocabulary)
    vocabulary.encode("the house")
    vocabularies.check_same(vocabulary, epath.Path(path))


def read_all(path):
    vocabulary = pretrained.vocabulary(str(path))
    opened, config = read(path)
    pretrained.check_vocabulary(vocabulary, config, opened)


# --- Every tensor ---------------------------------------------------------------------------------


def changes(array):
    """A tensor with another rank, size or type, by what is wrong with it; None is no tensor."""
    return {
        "rank 0": ones(()),
        "rank 1": ones((array.size + 1,)),
        "rank 3": ones((*array.shape, 2) if array.ndim == 2 else (2, 2, *array.shape)),
        "size": ones(tuple(n + 1 for n in array.shape)),
        "half precision": array.astype(np.float16),
        "whole numbers": array.astype(np.int8),
        "missing": None,
    }


def ones(shape):
    return np.ones(shape, np.float32)


EXTRA = {"extra": (3,), "encoder/layers_7/mlp/wo/kernel": (20, 12), "one": ()}
# A model without one of the two matrices of the vocabulary is another model: a tied one.
MAY_LACK = {
    *("shared.weight", "lm_head.weight", "decoder/logits_dense/kernel"),
    *("target.decoder.logits_dense.kernel",),
}


def assert_refused(name, change, message):
    if change == "missing" and name in MAY_LACK:
        return
    assert message != "works", (name, change)


@of_format("huggingface", "sharded")
def test_every_tensor_of_safetensors(damaged):
    for file in sorted(damaged.glob("*.safetensors")):
        whole = file.read_bytes()
        tensors = safetensors.numpy.load_file(file)
        assert tensors
        for name, array in tensors.items():
            for change, changed in changes(array).items():
                others = {key: value for key, value in tensors.items() if key != name}
                written = others if changed is None else {**others, name: changed}
                safetensors.numpy.save_file(written, file, {"format": "pt"})
                assert_refused(name, change, outcome(read, damaged))
        for name, shape in EXTRA.items():
            safetensors.numpy.save_file({**tensors, name: ones(shape)}, file)
            assert outcome(read, damaged) != "works", name
        file.write_bytes(whole)
    assert outcome(read, damaged) == "works"


@pytest.mark.parametrize("is_tied", [True, False, None])
@of_format("huggingface")
def test_the_two_matrices_of_the_vocabulary(damaged, is_tied):
    """Compared with each other before they are with the settings."""
    file = damaged / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    change_json(damaged / "config.json", lambda config: config | {"tie_word_embeddings": is_tied})
    for name in ("shared.weight", "lm_head.weight", "decoder.embed_tokens.weight"):
        for shape in ((), (12,), (40, 12, 1), (40,), (12, 40), (39, 12), (1, 480), (480, 1)):
            for written in ({**tensors, name: ones(shape)}, {name: ones(shape)}):
                safetensors.numpy.save_file(written, file)
                assert outcome(read, damaged) != "works", (name, shape)


@of_format("t5x", "t5x_scanned")
def test_every_array_of_t5x(damaged):
    folder = damaged / "checkpoint_0"
    for file in sorted(folder.glob("target.*")):
        file.rename("whole")
        array = open_zarr("whole").read().result()
        for change, changed in changes(array).items():
            write_zarr(file, changed)
            assert_refused(file.name, change, outcome(read, damaged))
        shutil.rmtree(file, ignore_errors=True)
        pathlib.Path("whole").rename(file)
    assert outcome(read, damaged) == "works"


def open_zarr(folder, **settings):
    path = f"{pathlib.Path(folder).absolute()}/"
    spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": path}}
    return ts.open(spec | settings, open="metadata" not in settings).result()


def write_zarr(folder, array):
    shutil.rmtree(folder, ignore_errors=True)
    if array is None:
        return
    metadata = {"shape": list(array.shape), "chunks": list(array.shape)}
    settings = {"dtype": array.dtype.name, "metadata": metadata, "create": True}
    open_zarr(folder, **settings).write(array).result()


@of_format("t5x")
def test_every_array_within_the_file_of_t5x(damaged):
    """Small ones may lie there themselves, where others have what tells their place."""
    content, flat = content_of_t5x(damaged)
    content["optimizer"]["state"]["step"] = np.int32(3)
    for key in flat:
        name = "/".join(key)
        array = pretrained.open_checkpoint("t5x").weights[name].load()
        wrong = {**changes(array), "list": [[1.0], [2.0, 3.0]], "text": "x", "number": 1.0}
        for change, changed in wrong.items():
            target = {**flat, key: changed}
            if changed is None:
                del target[key]
            write_t5x(damaged, content, target)
            assert_refused(name, change, outcome(read, damaged))
        write_t5x(damaged, content, {**flat, key: array})
        assert outcome(read, damaged) == "works"


def content_of_t5x(folder):
    """What the file holds, and its target, flat."""
    content = flax.serialization.msgpack_restore(
        (folder / "checkpoint_0" / "checkpoint").read_bytes()
    )
    flat = flax.traverse_util.flatten_dict(
        content["optimizer"]["target"], is_leaf=lambda _, value: "driver" in value
    )
    return content, flat


def write_t5x(folder, content, flat):
    target = flax.traverse_util.unflatten_dict(flat)
    content = {**content, "optimizer": {**content["optimizer"], "target": target}}
    packed = flax.serialization.msgpack_serialize(content)
    (folder / "checkpoint_0" / "checkpoint").write_bytes(packed)


# One of each kind: Orbax takes its time to write.
OF_EACH_KIND = (
    "token_embedder/embedding",
    "decoder/logits_dense/kernel",
    "encoder/encoder_norm/scale",
    "encoder/relpos_bias/rel_embedding",
    "decoder/layers_0/self_attention/query/kernel",
    "decoder/layers_0/mlp/wo/kernel",
)


@of_format("orbax", "t5x_orbax")
def test_arrays_of_orbax(damaged):
    is_t5x = (damaged / "checkpoint_0" / "state").exists()
    item, within = ("state", ("target",)) if is_t5x else ("params", ())
    stored = orbax.lazy_item(epath.Path(damaged).absolute() / "checkpoint_0" / item, within)
    arrays = {name: array.load() for name, array in stored.items()}
    shutil.rmtree(damaged / "checkpoint_0")

    def of(arrays):
        save_orbax(damaged, arrays, is_t5x)
        message = outcome(read, damaged)
        shutil.rmtree(damaged / "checkpoint_0")
        return message

    for name in OF_EACH_KIND:
        for change, changed in changes(arrays[name]).items():
            others = {key: value for key, value in arrays.items() if key != name}
            message = of(others if changed is None else {**others, name: changed})
            assert_refused(name, change, message)
    for name, shape in EXTRA.items():
        assert of({**arrays, name: ones(shape)}) != "works"
    assert of(arrays) == "works"


def save_orbax(folder, arrays, is_t5x):
    tree = flax.traverse_util.unflatten_dict(arrays, sep="/")
    items = {"params": ocp.args.StandardSave(tree)}
    if is_t5x:
        state = {"target": tree, "state": {"step": np.int32(0), "param_states": {}}}
        items = {"state": ocp.args.PyTreeSave(state)}
    orbax.save_items(epath.Path(folder).absolute(), 0, items)


# --- Every setting --------------------------------------------------------------------------------

DEEP = json.loads("[" * 500 + "]" * 500)
VALUES = (
    *({}, [], None, True, "", "x" * 10_000, -1, 0, 1e9, float("inf"), float("nan"), 10**30),
    DEEP,
)
FEW_VALUES = ({}, None, "x" * 10_000, -1, 1e9, 10**30, DEEP)


def all_changes(value, under=(), values=VALUES):
    """The value with everything that may be wrong with it, or with a part of it, and where."""
    for place in places(value):
        if place[: len(under)] == under[: len(place)]:
            for new in (*values, *([LACKING] if place else [])):
                yield place, new, with_change(value, place, new)


def outcomes_of(file, read, under=(), values=VALUES):
    """What comes of every change of a JSON file: messages, by place and value."""
    value = json.loads(file.read_text())
    found = {}
    for place, new, everything in all_changes(value, under, values):
        write_json(file, everything)
        shown = "lacking" if new is LACKING else str(new)[:12]
        found[".".join(map(str, place)), shown] = outcome(read, pathlib.Path(file.parts[0]))
    write_json(file, value)
    return found


SIZES = {
    *("vocab_size", "d_model", "d_kv", "d_ff", "num_heads", "num_layers", "num_decoder_layers"),
    *("relative_attention_num_buckets", "relative_attention_max_distance"),
}


@of_format("huggingface", "orbax")
def test_every_setting_of_the_network(damaged):
    (file,) = damaged.rglob("config.json")
    found = outcomes_of(file, read)
    optional = SIZES - {*("vocab_size", "d_model", "d_kv", "d_ff", "num_heads", "num_layers")}
    for (place, new), message in found.items():
        if place in SIZES:
            may_be = place in optional and new in ("None", "lacking")
            assert (message == "works") == may_be, (place, new)
            if new not in ("None", "lacking"):
                assert f"{file}: " in message
        if place == "scale_decoder_outputs":
            assert (message == "works") == (new in ("None", "True", "lacking")), new
    of_distance = found["relative_attention_max_distance", "1000000000.0"]
    assert of_distance.endswith("max_distance: expected int, found 1000000000.0.")
    of_scale = found["scale_decoder_outputs", "{}"]
    assert of_scale.endswith("scale_decoder_outputs: expected bool, found {}.")


@pytest.mark.parametrize(
    ("key", "value"), [(key, value) for key in sorted(SIZES) for value in (10**9, 2**31 - 1, 2**63)]
)
@of_format("huggingface")
def test_a_size_that_no_network_has(damaged, key, value):
    """Half a kilobyte of JSON that asked for 20 GB."""
    change_json(damaged / "config.json", lambda config: config | {key: value})
    message = outcome(read, damaged)
    assert ": expected a whole number from 1 to" in message
    assert message.endswith(f"found {value}.")


@of_format("huggingface")
def test_a_size_that_the_tensors_do_not_have(damaged):
    whole = json.loads((damaged / "config.json").read_text())
    for key in SIZES - {"relative_attention_max_distance"}:
        write_json(damaged / "config.json", {**whole, key: 64})
        message = outcome(read, damaged)
        assert "instead of" in message or "expected the settings of the weights beside" in message


@of_format("sharded")
def test_every_part_of_an_index(damaged):
    file = damaged / "model.safetensors.index.json"
    name = next(iter(json.loads(file.read_text())["weight_map"]))
    found = outcomes_of(file, read, under=("weight_map", name))
    assert set(found.values()) > {"works"}


@of_format("huggingface")
def test_every_part_of_a_header(damaged):
    file = damaged / "model.safetensors"
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    for place, new, everything in all_changes(header, under=("shared.weight",)):
        written = json.dumps(everything).encode()
        file.write_bytes(len(written).to_bytes(8, "little") + written + data)
        message = outcome(read, damaged)
        assert message != "works" or everything == header, (place, new)


@of_format("huggingface")
def test_files_beside_a_model(damaged):
    for name in ("generation_config.json", "special_tokens_map.json", "tokenizer_config.json"):
        found = outcomes_of(damaged / name, read_all)
        assert "works" in found.values()


@pytest.mark.parametrize(
    ("damaged", "name"),
    [
        ("pieces", "tokenizer.json"),
        ("pieces", "tokenizer_config.json"),
        ("bytes", "tokenizer_config.json"),
        ("bytes", "added_tokens.json"),
    ],
    indirect=["damaged"],
)
def test_every_part_of_a_tokenizer(damaged, name):
    assert outcome(read_tokenizer, damaged) == "works"
    found = outcomes_of(damaged / name, read_tokenizer)
    assert set(found.values()) > {"works"}


@of_format("t5x")
def test_every_part_of_the_file_of_t5x(damaged):
    content, _ = content_of_t5x(damaged)
    file = damaged / "checkpoint_0" / "checkpoint"
    leaf = ("optimizer", "target", "decoder", "decoder_norm", "scale")
    found = set()
    values = [2**64 - 1 if value == 10**30 else value for value in VALUES]  # of its 64 bits
    for under in (leaf, ("optimizer", "state", "step"), ("version",)):
        for place, new, everything in all_changes(as_plain(content), under, values):
            file.write_bytes(msgpack.packb(everything))
            message = outcome(read, damaged)
            found.add(message)
            if place == ("optimizer", "state", "step"):
                assert (message == "works") == (new == 0), new
    assert found > {"works"}


def as_plain(value):
    """With Python's numbers for NumPy's."""
    if isinstance(value, dict):
        return {key: as_plain(part) for key, part in value.items()}
    return value.item() if isinstance(value, np.ndarray | np.generic) else value


@of_format("t5x", "t5x_scanned")
def test_every_part_of_the_metadata_of_an_array(damaged):
    (folder,) = damaged.glob("checkpoint_0/target.decoder.decoder_norm.scale")
    found = outcomes_of(folder / ".zarray", read)
    assert set(found.values()) > {"works"}


@of_format("orbax", "t5x_orbax")
def test_every_part_of_the_metadata_of_orbax(damaged):
    (file,) = damaged.glob("checkpoint_0/*/_METADATA")
    tree = json.loads(file.read_text())["tree_metadata"]
    name = next(name for name in tree if "decoder_norm" in name)
    found = outcomes_of(file, read, ("tree_metadata", name), FEW_VALUES)
    assert set(found.values()) > {"works"}


@of_format("adapters")
def test_every_part_of_the_notes_of_a_run(damaged):
    assert outcome(read, damaged).startswith(f"{pathlib.Path.cwd()}/damaged/checkpoint_0: its adap")

    def open_it(path):
        pretrained.open_checkpoint(str(path)).weights["decoder/layers_0/mlp/wo/kernel"].load()

    assert outcome(open_it, damaged) == "works"
    file = damaged / "checkpoint_0" / "run" / "metadata"
    found = outcomes_of(file, open_it)
    assert set(found.values()) > {"works"}
    for key in ("alpha", "rank"):
        for new in ("{}", "True", "", "inf", "nan", "1000000000.0", "100000000000"):
            assert found[f"adapters.{key}", new] != "works"


@of_format("adapters")
def test_adapters_beside_themselves(damaged):
    file = damaged / "checkpoint_0" / "run" / "metadata"
    run = json.loads(file.read_text())
    shutil.copytree("damaged", "others")
    for folder, beside in (("damaged", "others"), ("others", "damaged")):
        notes = {**run, "adapters": {**run["adapters"], "beside": beside}}
        write_json(pathlib.Path(folder, *file.parts[1:]), notes)
    message = outcome(pretrained.open_checkpoint, "damaged")
    assert "damaged/checkpoint_0 is trained beside itself: its notes are damaged." in message


# --- What a file claims ---------------------------------------------------------------------------


@of_format("t5x")
def test_lists_that_claim_to_be_long_within_an_array(damaged):
    """An array is a file of its own within T5X's, and its lists are made room for as well."""
    claim = b"\xdd" + (10**6).to_bytes(4, "big")
    array = msgpack.ExtType(1, claim * 500 + bytes(10**6))
    optimizer = {"target": {"scale": array}, "state": {"step": 0}}
    packed = msgpack.packb({"version": 3, "optimizer": optimizer})
    (damaged / "checkpoint_0" / "checkpoint").write_bytes(packed)
    assert "exceeds max_array_len(1000)" in outcome(read, damaged)


@of_format("t5x")
def test_a_chunk_that_is_larger_than_its_array(damaged):
    (folder,) = damaged.glob("checkpoint_0/target.decoder.decoder_norm.scale")
    change_json(folder / ".zarray", lambda metadata: metadata | {"chunks": [2**32]})
    assert outcome(read, damaged) == (
        "checkpoint_0/target.decoder.decoder_norm.scale: expected chunks of at most 48 bytes, as "
        "the array has, found 17,179,869,184; the checkpoint is damaged."
    )


def test_a_step_that_no_run_comes_to():
    for step in (-1, 2**31, 10**30, True, 1.0, "1", None, np.zeros(2, int), np.array(np.nan)):
        with pytest.raises(errors.UsageError, match="here: expected a step, a whole number from 0"):
            lazy_arrays.checked_step(step, "here")
    assert lazy_arrays.checked_step(np.array([7], np.int32), "here") == 7


def test_a_message_is_no_longer_than_one_can_read():
    message = failures.explain(errors.UsageError(f"a: expected b, found {'c' * 10**6}"))
    assert message is not None and len(message) == 2004 and message.endswith("ccc ...")
