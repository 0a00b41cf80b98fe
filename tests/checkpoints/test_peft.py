"""A run of adapters as PEFT loads it: the names, the arithmetic, and what is refused."""

import contextlib
import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors
import safetensors.numpy
from etils import epath
from flax import traverse_util
from helpers import rooms
from helpers.holders import held_by_another, refusal
from helpers.huggingface_model import TINY, write_directory

from tnt_jax import convert
from tnt_jax.checkpoints import checkpoint_kinds, digests, orbax, peft, pretrained
from tnt_jax.models import adapters, parameters, sharding, t5
from tnt_jax.models.model import Model
from tnt_jax.runtime.errors import UsageError

RANK, ALPHA = 3, 7.5
A, B = ".lora_A.weight", ".lora_B.weight"


def random_adapters(config=TINY, num_layers=None):
    """Layers apart. B is not zero, as after an update."""
    apart = parameters.unstack_layers(t5.T5(config).abstract_params())
    added = adapters.init(adapters.upper_layers(apart, num_layers), RANK, jax.random.key(0))
    random = np.random.default_rng(1)
    return jax.tree.map(lambda x: random.normal(0, 0.5, x.shape).astype(np.float32), added)


def write_run(folder, base, added, negative_term="reverse_kl", **beside):
    """What a training run writes whose adapters are beside the model in `base`."""
    names = pretrained.open_checkpoint(str(base)).weights
    run = {
        "original": {"path": str(base), "digest": digests.of_files(names)},
        "adapters": {"alpha": ALPHA, "rank": RANK, "beside": str(base)} | beside,
        "objective": {"negative_term": negative_term, "positive_term": "forward_kl"},
    }
    items = {"params": ocp.args.StandardSave(added), "run": ocp.args.JsonSave(run)}
    orbax.save_items(epath.Path(folder).absolute(), 5, items)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Hugging Face directory `base`, a run of adapters beside it, and what PEFT has of that."""
    folder = tmp_path_factory.mktemp("peft")
    write_directory(folder / "base")
    write_run(folder / "run", folder / "base", random_adapters())
    to_peft(folder / "run", folder / "peft")
    return folder


def to_peft(run, output, **settings):
    convert.convert(input=str(run), output=str(output), output_format="peft", **settings)


def tensors_of(path):
    return safetensors.numpy.load_file(path / "adapter_model.safetensors")


def config_of(path):
    return json.loads((path / "adapter_config.json").read_text())


def modules_of(tensors):
    return {name.removeprefix("base_model.model.")[: -len(A)] for name in tensors}


def applied(base, path):
    """The weights of a Hugging Face directory with what is in a PEFT directory, by PEFT's rule."""
    weights = safetensors.numpy.load_file(base / "model.safetensors")
    tensors, config = tensors_of(path), config_of(path)
    for module in modules_of(tensors):
        low, high = (tensors[f"base_model.model.{module}{end}"].astype(float) for end in (A, B))
        change = config["lora_alpha"] / config["r"] * (high @ low)
        assert weights[f"{module}.weight"].shape == change.shape
        weights[f"{module}.weight"] = weights[f"{module}.weight"] + change
    return weights


def assert_applied_is_merged(base, run, path, tmp_path):
    """Applied by hand, the adapters give what convert merges; returns the names that changed."""
    convert.convert(input=str(run), output=str(tmp_path / "merged"), output_format="huggingface")
    merged = safetensors.numpy.load_file(tmp_path / "merged" / "model.safetensors")
    before = safetensors.numpy.load_file(base / "model.safetensors")
    found = applied(base, path)
    assert found.keys() == merged.keys()
    for name, weights in merged.items():
        np.testing.assert_allclose(found[name], weights, rtol=1e-5, atol=1e-5, err_msg=name)
    return {name for name in merged if not np.array_equal(merged[name], before[name])}


# ------------------------------------------------------------------------------- What is written


def test_a_trained_run_applied_by_hand_is_the_model_that_it_is(tmp_path):
    """From training to the file, with layers that are stacked."""
    rooms.write_world(tmp_path)
    with contextlib.chdir(tmp_path), rooms.devices_seen():
        settings = {"OUTPUT": "annotated.jsonl", "RECORDS": "corpus.jsonl"}
        assert rooms.run("annotate", settings) == 0
        rooms.train_original("original", 2)
        convert.convert(input="original", output="base", output_format="huggingface")
        settings = {"ORIGINAL": "adapters_off", "ADAPTER_RANK": 4, "ADAPTER_ALPHA": 12.0}
        settings |= {"t5.T5Config.scan_layers": True, "INITIAL_CHECKPOINT_PATH": "base"}
        settings |= {"RECORDS": "annotated.jsonl", "LEARNING_RATE": 0.1, "TRAIN_STEPS": 3}
        assert rooms.run("train", {**settings, "MODEL_DIR": "run"}) == 0
        assert "layers" in rooms.saved("run")["encoder"]
        to_peft("run", "peft")
    changed = assert_applied_is_merged(
        tmp_path / "base", tmp_path / "run", tmp_path / "peft", tmp_path
    )
    # One layer in each stack: 4 matrices of attention and 3 of the MLP; 4 + 4 and 3.
    assert len(changed) == 4 + 3 + 8 + 3
    config = config_of(tmp_path / "peft")
    assert (config["r"], config["lora_alpha"]) == (4, 12)
    assert config["base_model_name_or_path"] == str(tmp_path / "base")


def test_every_kernel_of_every_layer_is_as_merged(folder, tmp_path):
    changed = assert_applied_is_merged(folder / "base", folder / "run", folder / "peft", tmp_path)
    assert len(changed) == 3 * (4 + 3) + 2 * (8 + 3)


def test_the_names_are_modules_of_the_base(folder):
    """Each has both matrices; written out for one module of each kind, from PEFT's own files."""
    tensors = tensors_of(folder / "peft")
    modules = modules_of(tensors)
    base = safetensors.numpy.load_file(folder / "base" / "model.safetensors")
    assert {f"{module}.weight" for module in modules} < base.keys()
    assert tensors.keys() == {f"base_model.model.{m}{end}" for m in modules for end in (A, B)}
    for module in (
        "encoder.block.0.layer.0.SelfAttention.q",
        "encoder.block.2.layer.1.DenseReluDense.wi_1",
        "decoder.block.1.layer.0.SelfAttention.o",
        "decoder.block.0.layer.1.EncDecAttention.k",
        "decoder.block.1.layer.2.DenseReluDense.wo",
    ):
        outputs, inputs = base[f"{module}.weight"].shape
        assert tensors[f"base_model.model.{module}{A}"].shape == (RANK, inputs)
        assert tensors[f"base_model.model.{module}{B}"].shape == (outputs, RANK)
    # PEFT looks for modules by the ends of their names: it must find these, and no others.
    ends = tuple(f".{name}.weight" for name in config_of(folder / "peft")["target_modules"])
    found = {name.removesuffix(".weight") for name in base if name.endswith(ends)}
    assert found == modules


def test_the_numbers_are_those_of_the_run(folder):
    tensors = tensors_of(folder / "peft")
    added = random_adapters()["decoder"]["layers_1"]["encoder_decoder_attention"]["value"]
    module = "base_model.model.decoder.block.1.layer.1.EncDecAttention.v"
    np.testing.assert_array_equal(tensors[f"{module}{A}"], added["adapter_in"].T)
    np.testing.assert_array_equal(tensors[f"{module}{B}"], added["adapter_out"].T)
    assert {x.dtype for x in tensors.values()} == {np.dtype(np.float32)}
    with safetensors.safe_open(folder / "peft" / "adapter_model.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt"}


def test_the_settings(folder):
    config = config_of(folder / "peft")
    expected = {
        "peft_type": "LORA",
        "task_type": "SEQ_2_SEQ_LM",
        "base_model_name_or_path": str(folder / "base"),
        "revision": None,
        "r": RANK,
        "lora_alpha": ALPHA,
        "target_modules": ["k", "o", "q", "v", "wi_0", "wi_1", "wo"],
        "bias": "none",
        "lora_dropout": 0.0,
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "inference_mode": True,
        "modules_to_save": None,
    }
    assert config.items() >= expected.items()


def test_stacked_layers_give_the_same_file(folder, tmp_path):
    config = dataclasses.replace(TINY, scan_layers=True)
    stacked = parameters.stack_layers(random_adapters())
    shapes = jax.tree.map(jnp.shape, t5.T5(config).abstract_params())
    assert stacked["encoder"].keys() < shapes["encoder"].keys()
    write_run(tmp_path / "run", folder / "base", stacked)
    to_peft(tmp_path / "run", tmp_path / "peft")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "peft" / name).read_bytes() == (folder / "peft" / name).read_bytes()


def test_a_model_without_a_gate(tmp_path):
    """T5 1.0 has one matrix where others have two."""
    config = dataclasses.replace(TINY, mlp_activations=("relu",), logits_via_embedding=True)
    write_directory(tmp_path / "base", config)
    write_run(tmp_path / "run", tmp_path / "base", random_adapters(config))
    to_peft(tmp_path / "run", tmp_path / "peft")
    assert config_of(tmp_path / "peft")["target_modules"] == ["k", "o", "q", "v", "wi", "wo"]
    assert_applied_is_merged(tmp_path / "base", tmp_path / "run", tmp_path / "peft", tmp_path)


def test_bfloat16(folder, tmp_path):
    to_peft(folder / "run", tmp_path / "half", dtype="bfloat16")
    half, whole = tensors_of(tmp_path / "half"), tensors_of(folder / "peft")
    assert half.keys() == whole.keys()
    for name, array in half.items():
        np.testing.assert_array_equal(array, whole[name].astype(jnp.bfloat16), err_msg=name)


def test_the_card(folder):
    card = (folder / "peft" / "README.md").read_text()
    assert "library_name: peft" in card
    assert f"rank {RANK} and alpha {ALPHA}" in card
    assert f'AutoModelForSeq2SeqLM.from_pretrained("{folder / "base"}")' in card
    assert 'PeftModel.from_pretrained(base, "peft")' in card
    assert "| updates | 5 |" in card
    assert "base_model:" not in card  # the hub takes names alone


@pytest.mark.parametrize("output_format", ["peft", "huggingface"])
@pytest.mark.parametrize("term", ["forward_kl", "jensen_shannon_split", "unlikelihood", "none"])
def test_a_card_names_the_method_that_it_was(term, output_format, folder, tmp_path):
    write_run(tmp_path / "run", folder / "base", random_adapters(), negative_term=term)
    output = tmp_path / "output"
    convert.convert(input=str(tmp_path / "run"), output=str(output), output_format=output_format)
    card = (output / "README.md").read_text()
    is_targeted = term in ("forward_kl", "jensen_shannon_split")
    assert ("targeted-negative-training" in card) == is_targeted
    assert ("with [Targeted Negative Training](" in card) == is_targeted
    assert ("from the original model that the table names" in card) != is_targeted


def test_a_dry_run_shows_what_would_be_written(folder, tmp_path, capsys):
    to_peft(folder / "run", tmp_path / "out", dry_run=True)
    assert not (tmp_path / "out").exists()
    printed = " ".join(capsys.readouterr().out.split())
    name = f"base_model.model.encoder.block.0.layer.0.SelfAttention.q{A} ({RANK}, 12) float32"
    assert name in printed
    assert "86 arrays" in printed  # two for each of 43 kernels


# ------------------------------------------------------------------------------- The base


def test_a_base_from_the_hub_has_its_name_and_revision(tmp_path, capsys):
    """Where huggingface_hub puts what it downloads."""
    revision = "0123456789abcdef0123456789abcdef01234567"
    snapshot = tmp_path / "hub" / "models--google--t5-v1_1-tiny" / "snapshots" / revision
    write_directory(snapshot)
    write_run(tmp_path / "run", snapshot, random_adapters())
    to_peft(tmp_path / "run", tmp_path / "peft")
    config = config_of(tmp_path / "peft")
    assert config["base_model_name_or_path"] == "google/t5-v1_1-tiny"
    assert config["revision"] == revision
    assert "base_model: google/t5-v1_1-tiny" in (tmp_path / "peft" / "README.md").read_text()
    assert "Warning" not in capsys.readouterr().out


def test_a_base_in_the_cache_of_another_machine(tmp_path, monkeypatch):
    """A run copied from elsewhere finds the revision that it began from, and no newer one."""
    revision, newer = "0123456789abcdef0123456789abcdef01234567", "f" * 40
    of_model = pathlib.Path("hub", "models--google--t5-v1_1-tiny", "snapshots")
    write_directory(tmp_path / "there" / of_model / revision)
    write_run(tmp_path / "run", tmp_path / "there" / of_model / revision, random_adapters())
    here = tmp_path / "here"
    (tmp_path / "there").rename(here)
    write_directory(here / of_model / newer, scale=2.0)
    (here / of_model.parent / "refs").mkdir()
    (here / of_model.parent / "refs" / "main").write_text(newer)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(here / "hub"))
    found = pretrained.open_checkpoint(str(tmp_path / "run"))
    assert found.beside is not None
    assert found.beside.path == epath.Path(here / of_model / revision)
    found.check_original()
    # A cache that has the newer one alone, and nobody to ask for the other.
    checkpoint_kinds._downloaded.cache_clear()  # the next program
    (here / of_model / revision).rename(tmp_path / "gone")
    with pytest.raises(UsageError) as error:
        pretrained.open_checkpoint(str(tmp_path / "run"))
    noted = tmp_path / "there" / of_model / revision
    assert f"found nothing at {noted}, nor on the Hugging Face hub (google/t5-v1_1-tiny, " in str(
        error.value
    )


def test_a_base_that_has_moved_is_found_by_a_link(tmp_path):
    write_directory(tmp_path / "base")
    write_run(tmp_path / "run", tmp_path / "base", random_adapters())
    (tmp_path / "base").rename(tmp_path / "moved")
    message = rf"found nothing at {tmp_path}/base\. Bring it back there, or put a link there to"
    with pytest.raises(UsageError, match=message):
        pretrained.open_checkpoint(str(tmp_path / "run"))
    (tmp_path / "base").symlink_to(tmp_path / "moved")
    pretrained.open_checkpoint(str(tmp_path / "run")).check_original()


def test_a_base_that_transformers_does_not_read(folder, tmp_path, capsys):
    convert.convert(input=str(folder / "base"), output=str(tmp_path / "o"), output_format="orbax")
    checkpoint = tmp_path / "o" / "checkpoint_0"
    write_run(tmp_path / "run", checkpoint, random_adapters())
    to_peft(tmp_path / "run", tmp_path / "peft")
    assert config_of(tmp_path / "peft")["base_model_name_or_path"] == str(checkpoint)
    printed = " ".join(capsys.readouterr().out.split())
    assert "PEFT loads adapters onto a Hugging Face directory" in printed
    assert "--output_format=huggingface" in printed
    # A directory of it is what the adapters are loaded onto.
    convert.convert(
        input=str(checkpoint), output=str(tmp_path / "base"), output_format="huggingface"
    )
    assert_applied_is_merged(tmp_path / "base", tmp_path / "run", tmp_path / "peft", tmp_path)


# ------------------------------------------------------------------------------- What is refused


def test_a_full_model_is_refused(folder, tmp_path):
    convert.convert(input=str(folder / "run"), output=str(tmp_path / "o"), output_format="orbax")
    for path in (folder / "base", tmp_path / "o"):
        with pytest.raises(
            UsageError, match=r"found a full model at .*Use --output_format=huggingface\.$"
        ):
            to_peft(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_output_that_exists_is_refused(folder, tmp_path):
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(UsageError, match=r"--output: expected a directory that does not exist"):
        to_peft(folder / "run", tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["mine"]


def test_adapters_of_the_upper_layers_alone(folder, tmp_path):
    """PEFT puts one onto each module whose name ends in a target's: here those are whole names."""
    write_run(tmp_path / "run", folder / "base", random_adapters(num_layers=1), layers=1)
    to_peft(tmp_path / "run", tmp_path / "peft")
    assert_applied_is_merged(folder / "base", tmp_path / "run", tmp_path / "peft", tmp_path)
    modules = modules_of(n for n in tensors_of(tmp_path / "peft") if n.endswith(A))
    last = TINY.num_decoder_layers - 1
    assert modules == {
        f"decoder.block.{last}.layer.{place}"
        for place in (
            *(f"0.SelfAttention.{name}" for name in "qkvo"),
            *(f"1.EncDecAttention.{name}" for name in "qkvo"),
            *(f"2.DenseReluDense.{name}" for name in ("wi_0", "wi_1", "wo")),
        )
    }
    assert set(config_of(tmp_path / "peft")["target_modules"]) == modules
    assert "The last 1 layers of its decoder" in (tmp_path / "peft" / "README.md").read_text()

    # One of them is lost.
    added = random_adapters(num_layers=1)
    del added["decoder"][f"layers_{last}"]["mlp"]["wo"]
    write_run(tmp_path / "lost", folder / "base", added, layers=1)
    with pytest.raises(UsageError, match=r"found none for decoder\.block\.1.*DenseReluDense\.wo"):
        to_peft(tmp_path / "lost", tmp_path / "out")


def test_options_that_adapters_have_no_use_for(folder, tmp_path):
    with pytest.raises(UsageError, match=r"--scan_layers goes with --output_format=t5x"):
        to_peft(folder / "run", tmp_path / "out", scan_layers=True)
    with pytest.raises(UsageError, match=r"--vocabulary: expected none with .*found a\.model\. L"):
        to_peft(folder / "run", tmp_path / "out", vocabulary="a.model")


def test_a_base_without_the_module_is_refused(folder):
    source = pretrained.open_checkpoint(str(folder / "run"))
    base = dict(pretrained.open_checkpoint(str(folder / "base")).weights)
    dtype = np.dtype(np.float32)
    kernel = "decoder/layers_1/mlp/wo/kernel"
    assert peft.to_stored(source.adapters, base, source.config, dtype)
    wrong = base | {kernel: base[kernel].transposed()}
    with pytest.raises(UsageError, match=r"DenseReluDense\.wo of .*\(12, 20\), .*\(20, 12\)\. Use"):
        peft.to_stored(source.adapters, wrong, source.config, dtype)
    del base[kernel]
    with pytest.raises(UsageError, match=rf"found one for {kernel}, which it does not have\. Use"):
        peft.to_stored(source.adapters, base, source.config, dtype)


@pytest.mark.parametrize("lost", ["one", "all"])
def test_adapters_that_are_lost_are_missed(lost, folder, tmp_path):
    added = traverse_util.flatten_dict(random_adapters(), sep="/")
    kept = {
        name: array
        for name, array in added.items()
        if lost == "one" and not name.startswith("encoder/layers_2/attention/query/")
    } or {"other": np.zeros(2, np.float32)}
    write_run(tmp_path / "run", folder / "base", traverse_util.unflatten_dict(kept, sep="/"))
    message = {
        "one": r"found none for encoder\.block\.2\.layer\.0\.SelfAttention\.q\. The run is damaged",
        "all": r"expected the adapters that its notes tell of, found none",
    }
    with pytest.raises(UsageError, match=message[lost]):
        to_peft(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_original_that_has_changed_is_refused(tmp_path):
    write_directory(tmp_path / "base")
    write_run(tmp_path / "run", tmp_path / "base", random_adapters())
    write_directory(tmp_path / "base", scale=2.0)
    with pytest.raises(UsageError, match="its adapters were trained beside weights with the"):
        to_peft(tmp_path / "run", tmp_path / "out")


def test_an_error_half_way_leaves_nothing(folder, tmp_path, monkeypatch):
    def fail(*unused):
        raise OSError("disk full")

    monkeypatch.setattr(safetensors.numpy, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        to_peft(folder / "run", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_place_where_somebody_is_at_work_is_left_alone(folder, tmp_path):
    with (
        held_by_another("output", tmp_path / "out") as other,
        pytest.raises(UsageError, match=refusal(other)),
    ):
        to_peft(folder / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command(folder, tmp_path, capsys):
    arguments = [f"--input={folder / 'base'}", f"--output={tmp_path / 'out'}"]
    with pytest.raises(SystemExit) as stopped:
        convert._main([*arguments, "--output_format=peft"])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("tnt_jax.convert: error: --output_format=peft: expected a run that")
    assert error.count("\n") == 1


# ------------------------------------------------------------------------------- PEFT itself


@pytest.mark.filterwarnings("ignore")  # of torch's, transformers' and PEFT's own
def test_peft_loads_it_and_computes_our_logits(folder):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    library = pytest.importorskip("peft")

    random = np.random.default_rng(0)
    inputs, targets = random.integers(2, 40, (2, 6)), random.integers(2, 40, (2, 5))
    source = pretrained.open_checkpoint(str(folder / "run"))
    model = Model(
        config=source.config, mesh=sharding.make_mesh(sharding.MeshShape(), jax.devices()[:1])
    )
    shifted = np.pad(targets, ((0, 0), (1, 0)))[:, :-1]
    names = ("encoder_input_tokens", "decoder_input_tokens", "decoder_target_tokens")
    batch = {
        name: jnp.asarray(x, jnp.int32)
        for name, x in zip(names, (inputs, shifted, targets), strict=True)
    }
    expected = np.asarray(model.forward(source.restore(model.abstract_params), batch).whole())

    config = library.PeftConfig.from_pretrained(str(folder / "peft"))
    base = transformers.AutoModelForSeq2SeqLM.from_pretrained(config.base_model_name_or_path)
    with torch.no_grad():
        given = {"input_ids": torch.tensor(inputs), "decoder_input_ids": torch.tensor(shifted)}
        before = base(**given).logits.numpy()
        loaded = library.PeftModel.from_pretrained(base, str(folder / "peft")).eval()
        found = loaded(**given).logits.numpy()
    largest = np.abs(expected).max()
    np.testing.assert_allclose(found, expected, atol=1e-4 * largest)
    assert np.abs(before - expected).max() > 0.1 * largest
    # Every matrix that PEFT put there is one of ours.
    state = library.get_peft_model_state_dict(loaded)
    tensors = tensors_of(folder / "peft")
    assert state.keys() == tensors.keys()
    for name, array in tensors.items():
        np.testing.assert_array_equal(state[name].numpy(), array)
    assert pathlib.Path(config.base_model_name_or_path) == folder / "base"
