"""A path is enough: the kind of checkpoint, the network and the vocabulary are found from it."""

import dataclasses
import json
import pathlib
import shutil

import flax.traverse_util
import gin
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath
from helpers import golden_model
from helpers.huggingface_model import TINY, write_directory

from tnt_jax import convert
from tnt_jax.checkpoints import checkpoint_kinds, lazy_arrays, orbax, pretrained
from tnt_jax.models import parameters, sharding, t5
from tnt_jax.models.model import Model
from tnt_jax.runtime import console
from tnt_jax.runtime.errors import UsageError
from tnt_jax.tokenizers import tokenization, vocabularies

FROM_CHECKPOINT = pathlib.Path(__file__).parents[2] / "gin_configs/models/from_checkpoint.gin"
TEXTS = ["the house is wonderful", "a garden, a river and two trees", "it rains in the garden"]


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocabulary") / "spiece.model"
    tokenization.train_sentencepiece(TEXTS, path, vocab_size=30)
    return str(path)


@pytest.fixture
def directory(tmp_path, sentencepiece):
    """A model of 40 rows with 30 pieces and 9 extra ids."""
    folder = tmp_path / "model"
    write_directory(folder)
    vocabularies.write(epath.Path(folder), tokenization.SentencePiece(sentencepiece, 9))
    return folder


def of_kind(directory, output_format):
    if output_format == "huggingface":
        return directory
    output = directory.parent / output_format
    convert.convert(input=str(directory), output=str(output), output_format=output_format)
    return output


# ------------------------------------------------------------------------------------- Kinds


@pytest.mark.parametrize("output_format", ["huggingface", "orbax", "t5x", "t5x_orbax"])
def test_every_kind_is_found_by_its_path_alone(output_format, directory):
    path = of_kind(directory, output_format)
    expected = pretrained.open_checkpoint(str(directory))
    found = pretrained.open_checkpoint(str(path))
    assert found.output_format == output_format
    assert found.config == expected.config
    for name, array in found.weights.items():
        np.testing.assert_array_equal(array.load(), expected.weights[name].load())
    params = t5.T5(found.config).abstract_params()
    on_one_device = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[3])
        ),
        params,
    )
    restored = found.restore(on_one_device)
    np.testing.assert_array_equal(
        restored["decoder"]["logits_dense"]["kernel"],
        expected.weights["decoder/logits_dense/kernel"].load(),
    )


# --------------------------------------------------------------------- Layers stacked and apart


def on_devices(config):
    """Shapes, split over four devices of two axes."""
    mesh = sharding.make_mesh(sharding.MeshShape(data=1, fsdp=2, model=2), jax.devices()[:4])
    return Model(config=config, mesh=mesh).abstract_params


def assert_restored(found, config, params):
    """Whatever way the layers are stored, each array is read to where its parts belong."""
    for scan_layers in (False, True):
        wanted = on_devices(dataclasses.replace(config, scan_layers=scan_layers))
        restored = found.restore(wanted)
        assert jax.tree.map(lambda x: x.sharding, restored) == jax.tree.map(
            lambda x: x.sharding, wanted
        )
        expected = parameters.stack_layers(params) if scan_layers else params
        jax.tree.map(np.testing.assert_array_equal, restored, expected)


@pytest.mark.parametrize("output_format", ["huggingface", "orbax", "t5x", "t5x_orbax"])
def test_any_checkpoint_becomes_a_model_with_stacked_layers(output_format, directory):
    found = pretrained.open_checkpoint(str(of_kind(directory, output_format)))
    weights = {name: array.load() for name, array in found.weights.items()}
    assert_restored(found, TINY, flax.traverse_util.unflatten_dict(weights, sep="/"))


def test_t5x_s_scanned_layers_become_ours(directory, tmp_path):
    expected = pretrained.open_checkpoint(str(directory)).weights
    expected = {name: array.load() for name, array in expected.items()}
    convert.convert(
        input=str(directory),
        output=str(tmp_path / "t5x"),
        output_format="t5x_orbax",
        scan_layers=True,
    )
    found = pretrained.open_checkpoint(str(tmp_path / "t5x"))
    assert_restored(found, TINY, flax.traverse_util.unflatten_dict(expected, sep="/"))


@pytest.fixture
def of_a_scanned_run(directory, tmp_path):
    """A model directory of ours in which the layers are stacked, and the parameters in it."""
    convert.convert(input=str(directory), output=str(tmp_path / "run"), output_format="orbax")
    shutil.rmtree(tmp_path / "run" / "checkpoint_0")
    params = t5.T5(TINY).init(jax.random.key(4))
    stacked = ocp.args.StandardSave(parameters.stack_layers(params))
    orbax.save_items(epath.Path(tmp_path / "run"), 5, {orbax.PARAMS: stacked})
    return tmp_path / "run", params


def test_a_run_with_stacked_layers_is_a_model_like_any_other(of_a_scanned_run):
    path, params = of_a_scanned_run
    found = pretrained.open_checkpoint(str(path))
    assert found.config == TINY
    assert_restored(found, TINY, params)
    for scan_layers in (False, True):
        model = pretrained.FromCheckpoint(scan_layers=scan_layers, remat_policy="full")
        expected = dataclasses.replace(TINY, scan_layers=scan_layers, remat_policy="full")
        assert pretrained.config_of(model, found) == expected
        assert pretrained.config_of(expected, found) == expected
    other = dataclasses.replace(TINY, scan_layers=True, num_decoder_layers=3)
    with pytest.raises(UsageError, match="does not fit the model settings: decoder/layers_2/"):
        pretrained.config_of(other, found)


@pytest.mark.parametrize("output_format", ["huggingface", "orbax", "t5x", "t5x_orbax"])
def test_a_run_with_stacked_layers_is_converted(output_format, of_a_scanned_run, tmp_path):
    path, params = of_a_scanned_run
    convert.convert(
        input=str(path),
        output=str(tmp_path / "out"),
        output_format=output_format,
        model=dataclasses.replace(TINY, scan_layers=True),
    )
    found = pretrained.open_checkpoint(str(tmp_path / "out")).weights
    expected = flax.traverse_util.flatten_dict(params, sep="/")
    assert found.keys() == expected.keys()
    for name, array in found.items():
        np.testing.assert_array_equal(array.load(), expected[name])


def test_a_layer_of_a_stack_is_read_alone(of_a_scanned_run, monkeypatch):
    """A model that does not fit in memory is converted layer by layer."""
    path, params = of_a_scanned_run
    found = pretrained.open_checkpoint(str(path)).weights
    sizes = []
    of_store = lazy_arrays.of_store

    def recorded(store, source):
        array = of_store(store, source)

        def read(index):
            sizes.append(np.prod([part.stop - part.start for part in index]))
            return array.read(index)

        return dataclasses.replace(array, read=read)

    monkeypatch.setattr(lazy_arrays, "of_store", recorded)
    kernel = params["encoder"]["layers_1"]["mlp"]["wi_0"]["kernel"]
    np.testing.assert_array_equal(found["encoder/layers_1/mlp/wi_0/kernel"].load(), kernel)
    assert sizes == [kernel.size]


# ------------------------------------------------------------------------------------- Finding


def test_a_checkpoint_is_itself_or_the_newest_of_a_directory(tmp_path):
    for name in ("checkpoint_900", "checkpoint_1000", "checkpoint_best", "2000", "other_3000"):
        (tmp_path / name / "params").mkdir(parents=True)
    (tmp_path / "checkpoint_5000" / "state").mkdir(parents=True)  # of no kind that is known
    for path, name in (
        ("", "checkpoint_1000"),
        ("checkpoint_1000", "checkpoint_1000"),
        ("checkpoint_900", "checkpoint_900"),
        ("2000", "2000"),
    ):
        assert checkpoint_kinds.find(str(tmp_path / path)).name == name


def test_the_file_of_a_t5x_checkpoint_stands_for_it(directory):
    folder = of_kind(directory, "t5x") / "checkpoint_0"
    assert checkpoint_kinds.find(str(folder / "checkpoint")) == epath.Path(folder)


def test_what_was_looked_for_is_listed(tmp_path):
    with pytest.raises(UsageError, match=r"found nothing at .*no_such"):
        checkpoint_kinds.find(str(tmp_path / "no_such"))
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "t5x" / "checkpoint_5" / "target.decoder").mkdir(parents=True)
    with pytest.raises(UsageError, match=r"expected a directory with a model, found a file at"):
        checkpoint_kinds.find(str(tmp_path / "file"))
    for name, content in (("empty", "nothing in it"), ("t5x", "checkpoint_5")):
        message = (
            rf"expected a model at .*{name}, .* for: config.json and model.safetensors \(Hugging "
            r"Face\); params \(tnt_jax\); a file named checkpoint \(T5X\); state/_METADATA \(T5X "
            rf"with Orbax\)\. The directory has {content}"
        )
        with pytest.raises(UsageError, match=message):
            checkpoint_kinds.find(str(tmp_path / name))


def test_a_scheme_that_nobody_knows():
    with pytest.raises(UsageError, match=r"expected a path that can be read, found no://where: "):
        checkpoint_kinds.find("no://where")


def test_a_model_of_the_hub(directory, tmp_path, monkeypatch):
    """huggingface_hub itself, off line, on a cache as it lays one out."""
    from huggingface_hub import constants

    cache = tmp_path / "cache"
    snapshot = cache / "models--someone--tiny-t5" / "snapshots" / "0123abc"
    (snapshot.parent.parent / "refs").mkdir(parents=True)
    (snapshot.parent.parent / "refs" / "main").write_text("0123abc")
    snapshot.parent.mkdir()
    directory.rename(snapshot)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    assert pretrained.open_checkpoint("someone/tiny-t5").config == TINY
    assert checkpoint_kinds.revision("someone/tiny-t5") == "0123abc"
    assert checkpoint_kinds.revision(str(snapshot)) is None
    # Whoever owns it gives the name to other weights: not in the middle of a program.
    newer = snapshot.with_name("4567def")
    shutil.copytree(snapshot, newer)
    (snapshot.parent.parent / "refs" / "main").write_text("4567def")
    assert checkpoint_kinds.revision("someone/tiny-t5") == "0123abc"
    checkpoint_kinds._downloaded.cache_clear()  # the next program
    assert checkpoint_kinds.revision("someone/tiny-t5") == "4567def"
    message = "found nothing at someone/other-t5, nor on the Hugging Face hub: "
    with pytest.raises(UsageError, match=message):
        pretrained.open_checkpoint("someone/other-t5")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "someone").mkdir()
    with pytest.raises(UsageError, match="hub was not asked, because there is a someone here"):
        pretrained.open_checkpoint("someone/tiny-t5")
    with pytest.raises(UsageError, match="hub is named with its owner, such as google/flan-t5-"):
        pretrained.open_checkpoint("tiny-t5")


# ------------------------------------------------------------------------------------- The network


def test_sizes_come_from_the_checkpoint_and_the_rest_from_the_settings(directory):
    model = pretrained.FromCheckpoint(dtype="bfloat16", dropout_rate=0.1)
    found = pretrained.config_of(model, pretrained.open_checkpoint(str(directory)))
    assert found == dataclasses.replace(TINY, dtype="bfloat16", dropout_rate=0.1)
    assert pretrained.config_of(TINY, pretrained.open_checkpoint(str(directory))) == TINY
    with pytest.raises(UsageError, match=r"models/from_checkpoint.gin .*INITIAL_CHECKPOINT_PATH"):
        pretrained.config_of(model, None)


def test_settings_that_no_shape_shows_are_compared(directory):
    other = dataclasses.replace(TINY, mlp_activations=("silu", "linear"), layer_norm_epsilon=1e-5)
    message = (
        r"differ from .*config.json, in brackets: mlp_activations = \('silu', 'linear'\) "
        r"\(\('gelu', 'linear'\)\); layer_norm_epsilon = 1e-05 \(1e-06\)"
    )
    source = pretrained.open_checkpoint(str(directory))
    with pytest.raises(UsageError, match=message):
        pretrained.config_of(other, source)
    with pytest.raises(UsageError, match=r"does not fit the model settings: .*instead of \(12, 21"):
        pretrained.config_of(dataclasses.replace(TINY, mlp_dim=21), source)


def test_a_scale_of_logits_is_compared_as_the_number_that_it_is():
    """Gemma's file writes out what others leave to the width of a head."""
    source = pretrained.open_checkpoint(str(golden_model.FOLDER / "causal_lm" / "llama"))
    found = pretrained.config_of(pretrained.FromCheckpoint(), source)
    assert found.attention_scale is None
    same = dataclasses.replace(found, attention_scale=found.head_dim**-0.5)
    assert pretrained.config_of(same, source) == same
    with pytest.raises(UsageError, match=r"in brackets: logit_scale = 3\.0 \("):
        pretrained.config_of(dataclasses.replace(found, attention_scale=3.0), source)


def test_the_gin_file_takes_the_sizes_from_the_checkpoint():
    gin.clear_config()
    try:
        gin.parse_config_file(str(FROM_CHECKPOINT))
        model = gin.query_parameter("MODEL/macro.value").scoped_configurable_fn()
    finally:
        gin.clear_config()
    assert model == pretrained.FromCheckpoint(dtype="float32", dropout_rate=0.0)


def test_every_setting_of_the_computation_is_a_macro_of_the_gin_file():
    text = FROM_CHECKPOINT.read_text()
    fields = {field.name for field in dataclasses.fields(pretrained.FromCheckpoint)}
    # How attention is rounded is left to those who ask for it.
    for name in fields - {"float32_attention_logits"}:
        assert f"pretrained.FromCheckpoint.{name} = %{name.upper()}\n" in text


# ------------------------------------------------------------------------------------- Vocabulary


@pytest.mark.parametrize("output_format", ["huggingface", "orbax"])
def test_a_model_brings_its_vocabulary(output_format, directory, sentencepiece):
    found = pretrained.vocabulary(str(of_kind(directory, output_format)))
    assert found.size == 39
    expected = tokenization.SentencePiece(sentencepiece, 9)
    for text in TEXTS:
        assert found.encode(text) == expected.encode(text)


def test_every_kind_is_opened_by_something():
    assert [*pretrained._OPENERS] == [kind.name for kind in checkpoint_kinds.KINDS]


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_new_run_is_described_anew_and_one_that_goes_on_is_not(directory, tmp_path, monkeypatch):
    """What is there before a run's first checkpoint is of one that died, maybe of another model."""
    path = tmp_path / "another.model"
    tokenization.train_sentencepiece([*TEXTS, "zebras"], path, vocab_size=30)
    another = tokenization.SentencePiece(str(path), 9)
    dead = tmp_path / "run/huggingface"
    pretrained.describe(str(dead.parent), TINY, another, None)
    (dead / "added_tokens.json").write_text("{}")  # the other model had more files
    source, before = pretrained.open_checkpoint(str(directory)), files_of(dead)
    mine = tokenization.SentencePiece(str(directory / "spiece.model"), 9)
    arguments = str(dead.parent), TINY, mine, source

    pretrained.describe(*arguments)
    assert files_of(dead) == before
    monkeypatch.setattr(console, "is_first_process", lambda: False)
    pretrained.describe(*arguments, is_new=True)  # the first process writes, and nobody else
    assert files_of(dead) == before
    monkeypatch.undo()
    pretrained.describe(*arguments, is_new=True)
    pretrained.describe(str(tmp_path / "fresh"), TINY, mine, source)
    assert files_of(dead) == files_of(tmp_path / "fresh/huggingface")
    assert (dead / "spiece.model").read_bytes() == (directory / "spiece.model").read_bytes()
    assert [path.name for path in dead.parent.iterdir()] == ["huggingface"]


def test_a_file_of_pieces_has_t5_s_extra_ids(sentencepiece):
    assert pretrained.vocabulary(sentencepiece).size == 130
    assert pretrained.vocabulary(sentencepiece, 0).size == 30


def test_the_ids_of_byt5(directory):
    (directory / "spiece.model").unlink()
    settings = {"tokenizer_class": "ByT5Tokenizer", "extra_ids": 125}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    found = pretrained.vocabulary(str(directory))
    assert found.size == 384  # as config.json of ByT5 says
    assert found.encode("é") == [195 + 3, 169 + 3]


def test_added_tokens_come_after_t5_s_own(directory, capsys):
    names = [*(f"<extra_id_{i}>" for i in reversed(range(9))), "<sep>"]
    added = {name: 30 + i for i, name in enumerate(names)}
    (directory / "added_tokens.json").write_text(json.dumps(added))
    found = pretrained.vocabulary(str(directory))
    assert "1 tokens that T5 does not (<sep>)" in capsys.readouterr().out
    assert found.size == 40
    assert found.encode("<sep>")[-1] == 39
    plain = tokenization.SentencePiece(str(directory / "spiece.model"), 9)
    for text in (*TEXTS, "<extra_id_0> walks"):
        assert found.encode(text) == plain.encode(text)


def test_a_t5x_checkpoint_brings_none(directory):
    path = of_kind(directory, "t5x")
    shutil.rmtree(path / "huggingface")  # T5X itself writes none
    with pytest.raises(UsageError, match=r"VOCABULARY_PATH: expected spiece.model or tokenizer"):
        pretrained.vocabulary(str(path))


def test_a_file_of_a_directory_is_no_vocabulary(directory, tmp_path):
    (directory / "tokenizer.json").write_text("{}")
    with pytest.raises(UsageError, match=rf"found a file in it, .* VOCABULARY_PATH={directory}\.$"):
        pretrained.vocabulary(str(directory / "tokenizer.json"))
    lone = tmp_path / "lone"
    lone.mkdir()
    (lone / "tokenizer.model").write_bytes(b"of a Llama")
    with pytest.raises(
        UsageError, match=rf"{lone}'\)\.save_pretrained\('{lone}'\) of transformers"
    ):
        vocabularies.of_directory(epath.Path(lone))


def test_another_vocabulary_than_the_model_s(directory, tmp_path, sentencepiece):
    same = tokenization.SentencePiece(sentencepiece, 9)
    source = pretrained.open_checkpoint(str(directory))
    assert pretrained.check_vocabulary(same, TINY, source) == 39
    other = tmp_path / "other.model"
    tokenization.train_sentencepiece([*TEXTS, "zebras"], other, vocab_size=32)
    message = (
        r"expected the vocabulary of the model in .*model, found another: id \d+ is '.*' there"
    )
    with pytest.raises(UsageError, match=message):
        pretrained.check_vocabulary(tokenization.SentencePiece(str(other)), TINY, source)


@pytest.mark.parametrize(
    ("num_rows", "fits"), [(258, False), (259, True), (387, True), (388, False)]
)
def test_rows_and_ids(num_rows, fits):
    if fits:
        return vocabularies.check_size(tokenization.Bytes(), num_rows)
    with pytest.raises(UsageError, match=f"a model with {num_rows} rows .*; found 259. Give"):
        vocabularies.check_size(tokenization.Bytes(), num_rows)


def test_t5_s_own_numbers(shared_data):
    """32,000 pieces and 100 extra ids in 32,128 rows; the ids of a sentence as T5 has them."""
    file = str(shared_data / "data" / "t5_vocab" / "sentencepiece.model")
    vocabulary = pretrained.vocabulary(file)
    vocabularies.check_size(vocabulary, 32128)
    vocabularies.check_size(vocabulary, 32100)
    assert vocabulary.encode("The house is wonderful.") == [37, 629, 19, 1627, 5]
    with pytest.raises(UsageError):
        vocabularies.check_size(vocabulary, 250112)
