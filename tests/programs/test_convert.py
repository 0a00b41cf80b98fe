"""From any format to any other and back, bit by bit; and what is not converted."""

import dataclasses
import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from helpers.full_disk import full_disk
from helpers.huggingface_model import TINY, write_directory

from tnt_jax import convert
from tnt_jax.checkpoints import pretrained
from tnt_jax.runtime.errors import UsageError
from tnt_jax.tokenizers import tokenization, vocabularies

FORMATS = ("huggingface", "t5x", "t5x_orbax", "orbax")


@pytest.fixture
def directory(tmp_path):
    """A Hugging Face directory with a tokenizer and further files."""
    folder = tmp_path / "original"
    write_directory(folder)
    model = tmp_path / "spiece.model"
    tokenization.train_sentencepiece(["the house is wonderful"], model, vocab_size=17)
    vocabularies.write(epath.Path(folder), tokenization.SentencePiece(str(model), 19))
    (folder / "generation_config.json").write_text('{"max_new_tokens": 7}')
    settings = json.loads((folder / "config.json").read_text())
    settings |= {"task_specific_params": {"summarization": {"prefix": "summarize: "}}}
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def run(directory, output, output_format, **kwargs):
    return convert.convert(
        input=str(directory), output=str(output), output_format=output_format, **kwargs
    )


def loaded(path):
    found = pretrained.open_checkpoint(str(path))
    return {name: array.load() for name, array in found.weights.items()}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, array in found.items():
        assert array.dtype == expected[name].dtype
        np.testing.assert_array_equal(array, expected[name], err_msg=name)


@pytest.mark.parametrize("path", [FORMATS[1:], FORMATS[:0:-1]], ids="-".join)
def test_any_way_around_ends_where_it_began(path, directory, tmp_path):
    expected = loaded(directory)
    here = directory
    for i, output_format in enumerate((*path, "huggingface")):
        run(here, tmp_path / str(i), output_format)
        here = tmp_path / str(i)
    assert_same(loaded(here), expected)
    assert pretrained.open_checkpoint(str(here)).config == TINY


def test_a_directory_goes_through_ours_with_all_that_belongs_to_it(directory, tmp_path):
    run(directory, tmp_path / "ours", "orbax")
    run(tmp_path / "ours", tmp_path / "back", "huggingface")
    names = {file.name for file in directory.iterdir()}
    assert {file.name for file in (tmp_path / "back").iterdir()} == names | {"README.md"}
    for name in names - {"config.json"}:
        assert (tmp_path / "back" / name).read_bytes() == (directory / name).read_bytes(), name
    settings = [json.loads((f / "config.json").read_text()) for f in (tmp_path / "back", directory)]
    assert settings[0] == settings[1] | {"torch_dtype": "float32"}


@pytest.mark.parametrize("output_format", FORMATS[1:])
@pytest.mark.parametrize(
    "change",
    [
        {"mlp_activations": ("silu", "linear")},
        {"mlp_activations": ("gelu_exact",)},
        {"relpos_bias_per_layer": True},
        {"logits_via_embedding": True, "scale_decoder_outputs": False},
    ],
)
def test_what_arrays_do_not_show_comes_back_as_well(output_format, change, tmp_path, capsys):
    config = dataclasses.replace(TINY, **change)
    write_directory(tmp_path / "in", config)
    run(
        tmp_path / "in",
        tmp_path / "out",
        output_format,
        **{"scan_layers": output_format != "orbax"},
    )
    is_warned = "T5X's files do not show mlp_activations" in capsys.readouterr().out
    assert is_warned == ("mlp_activations" in change and output_format != "orbax")
    run(tmp_path / "out", tmp_path / "back", "huggingface")
    before, after = (
        json.loads((tmp_path / name / "config.json").read_text()) for name in ("in", "back")
    )
    assert after == before | {"torch_dtype": "float32"}
    found = pretrained.open_checkpoint(str(tmp_path / "back")).config
    assert found.mlp_activations == config.mlp_activations
    assert found.relpos_bias_per_layer == config.relpos_bias_per_layer
    assert found.scales_logits == config.scales_logits


def test_biases_that_are_alike_are_still_those_of_umt5(tmp_path):
    config = dataclasses.replace(TINY, relpos_bias_per_layer=True)
    arrays = write_directory(tmp_path / "in", config, same_biases=True)
    run(tmp_path / "in", tmp_path / "t5x", "t5x", scan_layers=True)
    run(tmp_path / "t5x", tmp_path / "back", "huggingface")
    assert pretrained.open_checkpoint(str(tmp_path / "back")).config == config
    assert_same(loaded(tmp_path / "back"), arrays)


def test_a_directory_of_another_model(directory, tmp_path):
    run(directory, tmp_path / "out", "t5x")
    write_directory(tmp_path / "other", dataclasses.replace(TINY, mlp_dim=8))
    (tmp_path / "out" / "checkpoint_0").rename(tmp_path / "out" / "checkpoint_5")
    with pytest.raises(UsageError, match=r"has checkpoints of another model"):
        run(tmp_path / "other", tmp_path / "out", "t5x")


@pytest.mark.parametrize("output_format", FORMATS)
def test_the_type_that_was_asked_for(output_format, directory, tmp_path):
    expected = {name: x.astype(jnp.bfloat16) for name, x in loaded(directory).items()}
    run(directory, tmp_path / "half", output_format, dtype="bfloat16")
    assert_same(loaded(tmp_path / "half"), expected)
    # Back: what bfloat16 holds, float32 holds as well.
    run(tmp_path / "half", tmp_path / "whole", output_format, dtype="float32")
    assert_same(
        loaded(tmp_path / "whole"), {name: x.astype(np.float32) for name, x in expected.items()}
    )
    if output_format == "huggingface":
        settings = json.loads((tmp_path / "half" / "config.json").read_text())
        assert settings["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize("output_format", FORMATS)
def test_a_dry_run_shows_every_parameter_and_writes_nothing(
    output_format, directory, tmp_path, capsys
):
    run(directory, tmp_path / "out", output_format, dry_run=True, dtype="bfloat16")
    printed = capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    row = {
        "huggingface": r"lm_head.weight (40, 12) bfloat16 model.safetensors: lm_head.weight",
        "t5x": "decoder/logits_dense/kernel (12, 40) bfloat16 model.safetensors: lm_head.weight",
    }.get(output_format, "decoder/logits_dense/kernel (12, 40) bfloat16")
    assert row in " ".join(printed.split())
    total = sum(x.size for x in loaded(directory).values())
    assert f"{len(loaded(directory))} arrays, {total:,} numbers, " in printed


def test_what_exists_is_not_written_over(directory, tmp_path):
    (tmp_path / "out" / "checkpoint_0").mkdir(parents=True)
    (tmp_path / "out" / "checkpoint_0" / "mine").write_text("mine")
    for output_format in FORMATS:
        with pytest.raises(UsageError, match=r"--output: expected a directory that does not exist"):
            run(directory, tmp_path / "out", output_format)
    assert (tmp_path / "out" / "checkpoint_0" / "mine").read_text() == "mine"


@pytest.mark.parametrize("output_format", FORMATS[1:])
def test_an_earlier_step_than_the_newest_is_written_as_well(output_format, directory, tmp_path):
    for step in (7, 0):
        run(directory, tmp_path / "out", output_format)
        if step:
            (tmp_path / "out" / "checkpoint_0").rename(tmp_path / "out" / f"checkpoint_{step}")
    assert_same(loaded(tmp_path / "out" / "checkpoint_0"), loaded(directory))


@pytest.mark.parametrize("output_format", FORMATS[1:])
def test_no_checkpoints_go_into_a_model(output_format, directory):
    with pytest.raises(UsageError, match=r"expected a directory for checkpoints, found a model at"):
        run(directory, directory, output_format)


def test_a_vocabulary_that_does_not_fit_is_found_before_the_work(directory, tmp_path):
    (tmp_path / "garbage.model").write_text("garbage")
    for path, message in (
        (tmp_path / "garbage.model", "expected a sentencepiece model at"),
        (tmp_path / "spiece.model", "a model with 40 rows .*; found 117. Give"),
    ):
        with pytest.raises(UsageError, match=message):
            run(directory, tmp_path / "out", "huggingface", vocabulary=str(path), dry_run=True)


def test_an_evaluation_that_is_none_is_found_before_the_work(directory, tmp_path):
    (tmp_path / "evaluation.json").write_text('{"cut": 0.5, "comparison": {}, "original": {}}')
    with pytest.raises(UsageError, match=r"--evaluation: expected what tnt_jax.evaluate writes"):
        run(
            directory,
            tmp_path / "out",
            "huggingface",
            evaluation=str(tmp_path / "evaluation.json"),
        )
    assert not (tmp_path / "out").exists()


def test_the_card_of_a_conversion(directory, tmp_path):
    for dtype, fact in (
        ("float32", "no weight was changed"),
        ("bfloat16", "weights are stored as bfloat16 instead of float32"),
    ):
        run(directory, tmp_path / dtype, "huggingface", dtype=dtype)
        assert fact in (tmp_path / dtype / "README.md").read_text()


def test_an_error_half_way_leaves_no_model(directory, tmp_path, monkeypatch):
    run(directory, tmp_path / "t5x", "t5x")
    (tmp_path / "t5x" / "checkpoint_0" / "target.token_embedder.embedding" / "0.0").unlink()
    for output_format in FORMATS:
        output = tmp_path / "out" / output_format
        with pytest.raises(UsageError, match="is damaged"):
            run(tmp_path / "t5x", output, output_format)
        with pytest.raises(UsageError):
            pretrained.open_checkpoint(str(output))
        assert not list((tmp_path / "out").rglob("*.unfinished"))


@pytest.mark.parametrize("output_format", FORMATS)
def test_what_a_killed_conversion_left_is_deleted(output_format, directory, tmp_path, monkeypatch):
    """A program that is killed leaves what is on the disk half-way: here that is copied."""
    place, killed = tmp_path / "place", tmp_path / "killed"
    progress = convert._progress

    def half_way(names, *title):
        for number, name in enumerate(progress(names, *title)):
            yield name
            if number == 0:
                shutil.copytree(place, killed)

    monkeypatch.setattr(convert, "_progress", half_way)
    place.mkdir()
    run(directory, place / "out", output_format)
    monkeypatch.undo()
    for left in place.rglob(".*.unfinished"):
        raise AssertionError(left)
    if output_format in ("orbax", "t5x_orbax"):  # not begun there
        (killed / "out/checkpoint_0.orbax-checkpoint-tmp/params").mkdir(parents=True)
    else:
        assert list(killed.rglob(".*.unfinished/*"))
    (killed / ".out.json.0123456789abcdef0123456789abcdef.unfinished").mkdir()  # another's
    run(directory, killed / "out", output_format)
    names = [
        {path.relative_to(folder / "out").parts[:2] for path in (folder / "out").rglob("*")}
        for folder in (place, killed)
    ]
    assert names[0] == names[1]
    assert len(list(killed.iterdir())) == 2 + (killed / ".out.held").exists()


def test_a_description_is_written_whole_or_not_at_all(tmp_path):
    """Half of it was taken for that of another model, by every later run."""
    write_directory(tmp_path / "in")
    settings = json.loads((tmp_path / "in/config.json").read_text()) | {"long": "x" * 3000}
    (tmp_path / "in/config.json").write_text(json.dumps(settings))
    with full_disk(2000), pytest.raises(OSError, match="File too large"):
        run(tmp_path / "in", tmp_path / "out", "t5x")
    run(tmp_path / "in", tmp_path / "out", "t5x")
    description = tmp_path / "out/huggingface/config.json"
    assert json.loads(description.read_text()) == settings


def test_settings_that_do_not_exist(directory):
    with pytest.raises(UsageError, match=r"--output_format: expected huggingface, t5x, t5x_orbax"):
        run(directory, "out", "torch")
    with pytest.raises(UsageError, match=r"--dtype: expected float32 or bfloat16, found float16"):
        run(directory, "out", "orbax", dtype="float16")
    with pytest.raises(UsageError, match=r"--scan_layers goes with"):
        run(directory, "out", "orbax", scan_layers=True)
    with pytest.raises(UsageError, match=r"--evaluation: expected none .* found numbers\.json"):
        run(directory, "out", "orbax", evaluation="numbers.json")


def test_a_model_without_a_tokenizer(directory, tmp_path, capsys):
    run(directory, tmp_path / "t5x", "t5x")
    shutil.rmtree(tmp_path / "t5x" / "huggingface")  # as T5X writes its checkpoints
    run(tmp_path / "t5x", tmp_path / "without", "huggingface")
    assert "comes without a tokenizer" in capsys.readouterr().out
    assert not (tmp_path / "without" / "spiece.model").exists()
    run(tmp_path / "t5x", tmp_path / "with", "huggingface", vocabulary=str(directory))
    assert pretrained.vocabulary(str(tmp_path / "with")).size == 36


# ------------------------------------------------------------------------------- The command line


def test_the_command(directory, tmp_path, capsys):
    arguments = [f"--input={directory}", f"--output={tmp_path / 'out'}"]
    with pytest.raises(SystemExit) as stopped:
        convert._main([*arguments, "--output_format=t5x", "--dtype=bfloat16", "--scan_layers"])
    assert stopped.value.code == 0
    assert "optimizer state is not" in capsys.readouterr().out
    found = pretrained.open_checkpoint(str(tmp_path / "out"))
    assert (found.kind, found.scan_layers) == ("T5X", True)

    with pytest.raises(SystemExit) as stopped:
        convert._main([*arguments, "--output_format=t5x"])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("tnt_jax.convert: error: --output: expected")
    assert error.count("\n") == 1


def test_a_gin_file_says_what_the_parameters_must_fit(directory, tmp_path, capsys):
    arguments = [f"--input={directory}", f"--output={tmp_path / 'out'}", "--output_format=orbax"]
    with pytest.raises(SystemExit) as stopped:
        convert._main([*arguments, "--gin_file=models/t5_1_1_tiny.gin"])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert "does not fit the model settings" in error
    assert "decoder/decoder_norm/scale is (12,) instead of (32,)" in error
    (tmp_path / "fits.gin").write_text(
        """
        include "models/t5_1_1_tiny.gin"
        from tnt_jax.models import t5
        VOCAB_SIZE = 40
        t5.T5Config.emb_dim = 12
        t5.T5Config.num_encoder_layers = 3
        t5.T5Config.head_dim = 4
        t5.T5Config.mlp_dim = 20
        """.replace("        ", "")
    )
    with pytest.raises(SystemExit) as stopped:
        convert._main([*arguments, f"--gin_file={tmp_path / 'fits.gin'}", "--dry_run"])
    assert stopped.value.code == 0, capsys.readouterr().err
