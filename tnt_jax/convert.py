r"""Converts a model between Hugging Face's, T5X's and our own formats.

The input is a Hugging Face directory (or its name on the hub), a GGUF file, a T5X checkpoint
(legacy or Orbax, with scanned layers or not), or a model of ours. The program finds out which.
Output formats:

  huggingface  config.json, safetensors, the tokenizer, a model card; transformers loads it
  t5x          OUTPUT/checkpoint_<step>, msgpack and zarr: T5X's legacy format
  t5x_orbax    OUTPUT/checkpoint_<step>/state
  orbax        OUTPUT/checkpoint_<step>/params, a model directory of tnt_jax
  peft         adapter_config.json, safetensors, a model card: what a run with
               ORIGINAL="adapters_off" or "adapters_cached" trained, without its original; peft
               loads it onto that

Parameters and the step are carried over, optimizer state is not. What a checkpoint has no place
for (config.json, the tokenizer) is written to OUTPUT/huggingface, for the way back.

Example:
    python -m tnt_jax.convert --input=patched --output=patched-hf --output_format=huggingface
"""

import argparse
import contextlib
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import flax.traverse_util
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from tnt_jax.checkpoints import (
    checkpoint_kinds,
    digests,
    huggingface,
    lazy_arrays,
    model_card,
    orbax,
    peft,
    pretrained,
    t5x,
    trained_parts,
)
from tnt_jax.checkpoints.lazy_arrays import LazyArray
from tnt_jax.models.network_config import NetworkConfig
from tnt_jax.runtime import console, files, holding, program
from tnt_jax.runtime.errors import UsageError
from tnt_jax.tokenizers import vocabularies

_FORMATS = ("huggingface", "t5x", "t5x_orbax", "orbax", "peft")
_DIRECTORIES = ("huggingface", "peft")  # the others write a checkpoint among others
_DTYPES = {"float32": np.dtype(np.float32), "bfloat16": jnp.dtype(jnp.bfloat16)}


def convert(
    *,
    input: str,
    output: str,
    output_format: str,
    dtype: str | None = None,
    dry_run: bool = False,
    scan_layers: bool = False,
    vocabulary: str | None = None,
    evaluation: str | None = None,
    model: NetworkConfig | pretrained.FromCheckpoint | None = None,
) -> str:
    """Writes a model in another format.

    Args:
      input: A model, of any kind.
      output: The directory to write, which appears when it is whole.
      output_format: "huggingface", "t5x", "t5x_orbax", "orbax" or "peft".
      dtype: "float32" or "bfloat16"; None keeps what the input has.
      dry_run: True prints the table of parameters and writes nothing.
      scan_layers: Stacks T5X's layers, as its `scalable_t5` has them.
      vocabulary: A sentencepiece model, or a directory with a tokenizer, for an input without one.
      evaluation: A JSON file of `tnt_jax.evaluate`, for the model card.
      model: Settings that the parameters must fit; None takes them from the input.

    Returns:
      What was written, or would be.

    Raises:
      UsageError: The input is none, or does not fit; the output exists, has no such network, or is
        written by another run.
    """
    if output_format not in _FORMATS:
        raise UsageError(f"--output_format: expected {', '.join(_FORMATS)}, found {output_format}.")
    if dtype is not None and dtype not in _DTYPES:
        raise UsageError(f"--dtype: expected float32 or bfloat16, found {dtype}.")
    is_t5x = output_format in ("t5x", "t5x_orbax")
    if scan_layers and not is_t5x:
        raise UsageError("--scan_layers goes with --output_format=t5x or t5x_orbax.")
    if vocabulary is not None and output_format == "peft":
        raise UsageError(
            "--vocabulary: expected none with --output_format=peft, because the tokenizer is the "
            f"base model's; found {vocabulary}. Leave it out."
        )
    if evaluation is not None and output_format not in ("huggingface", "peft"):
        raise UsageError(
            "--evaluation: expected none with --output_format=t5x, t5x_orbax or orbax, which have "
            f"no model card to show it in; found {evaluation}. Leave it out."
        )
    source = pretrained.open_checkpoint(input)
    # Before the original is read, all of it.
    adapters = peft.trained(source) if output_format == "peft" else None
    source.check_original()
    config = pretrained.config_of(model or pretrained.FromCheckpoint(), source)
    weights = {
        name: _cast(source.weights[name], dtype, output_format)
        for name in huggingface.parameter_names(config)
    }
    settings = _settings(source, config, is_needed=not is_t5x)
    if is_t5x:
        config, weights = t5x.as_t5x_has_it(config, weights)
    numbers = _read_evaluation(evaluation)
    if vocabulary is not None:
        pretrained.check_vocabulary(pretrained.vocabulary(vocabulary), config, None)
    target = _target(output, output_format, source.step)
    if adapters is None:
        laid_out = _laid_out(weights, config, output_format, scan_layers)
    else:
        laid_out = peft.to_stored(adapters, weights, config, _DTYPES[dtype or "float32"])
    if dry_run:
        _print_plan(laid_out, source, target)
        return str(target)

    files.check_directory(target.parent, "--output")
    if output_format in _DIRECTORIES:
        held = holding.output(target, "--output")
    else:
        held = holding.folder(target.parent, "--output")
    with held:
        _target(output, output_format, source.step)  # another run may have ended meanwhile
        if output_format == "huggingface":
            _write_huggingface(target, weights, config, source, settings, numbers, vocabulary)
        elif adapters is not None:
            _write_peft(target, laid_out, config, source, adapters, numbers)
        else:
            _describe(target.parent, source, settings, vocabulary)
            if output_format == "t5x":
                t5x.write_legacy(target, laid_out, source.step, _progress)
            else:
                _write_orbax(target, laid_out, source.step, output_format)
    if dtype == "bfloat16" and adapters is None and not is_t5x:
        _log_rounding(source, weights)
    _log_what_is_lost(source, config, is_t5x=is_t5x)
    written = len(weights if adapters is None else laid_out)
    console.log(f"{target}: {written} parameters from {source.path} ({source.kind}).")
    return str(target)


def _log_what_is_lost(
    source: pretrained.Pretrained, config: NetworkConfig, *, is_t5x: bool
) -> None:
    """Says what the two formats do not state, and what the weights have lost before."""
    if is_t5x:
        console.log("Parameters and step are carried over; optimizer state is not.")
        if not t5x.is_inferred(config):
            console.log(
                f"Warning: T5X's files do not show mlp_activations = {config.mlp_activations}: set "
                "them in T5X's gin file."
            )
    is_described = (source.description / huggingface.CONFIG).exists()
    if source.output_format in ("t5x", "t5x_orbax") and not is_described:
        console.log(
            f"T5X's files do not state the activation: {config.mlp_activations} is taken from the "
            "names of the parameters."
        )
    noted = ((source.run or {}).get("original") or {}).get("quantisation")
    if quantisation := source.quantisation or noted:
        console.log(
            f"The weights come from {quantisation}: the original that a patch keeps to is the "
            "quantised one."
        )


def _settings(
    source: pretrained.Pretrained, config: NetworkConfig, *, is_needed: bool
) -> dict[str, Any]:
    """The input's `config.json` if it has one, else a new one where it is needed."""
    if (source.description / huggingface.CONFIG).exists():
        return huggingface.read_config(source.description)
    return huggingface.new_config(config) if is_needed else {}


def _log_rounding(source: pretrained.Pretrained, weights: Mapping[str, LazyArray]) -> None:
    """Says how much of what a run changed is lost where its weights are rounded to bfloat16."""
    noted = (source.run or {}).get("original") or {}
    if noted.get("path") is None:
        return
    try:
        original = pretrained.open_checkpoint(noted["path"]).weights
        if digests.of_files({name: original[name] for name in weights}) != noted["digest"]:
            raise UsageError(f"{noted['path']} has other weights now than the run started from.")
    except (KeyError, UsageError, OSError) as error:
        console.log(f"What rounding to bfloat16 did to the patch cannot be said: {error}")
        return
    squares = np.zeros(2)
    num_changed = num_undone = 0
    for name in _progress(list(weights), "comparing with the original"):
        before, after = original[name], source.weights[name]
        for part in lazy_arrays.parts(after.shape):
            old, new = (array[part].astype(np.float32) for array in (before, after))
            rounded = weights[name][part]
            is_changed = new != old
            squares += [
                np.square(difference, dtype=np.float64).sum()
                for difference in (rounded.astype(np.float32) - new, new - old)
            ]
            num_changed += int(is_changed.sum())
            num_undone += int((is_changed & (rounded == old.astype(rounded.dtype))).sum())
    if num_changed:
        lost, patch = np.sqrt(squares)
        console.log(
            f"Rounding to bfloat16 moved the weights by {lost / patch:.1%} of what training did "
            f"(root mean squares), and {num_undone / num_changed:.1%} of the weights that training "
            "changed are the original's again. --dtype=float32 keeps the patch whole; so does "
            "--output_format=peft for adapters."
        )


def _read_evaluation(path: str | None) -> dict[str, Any] | None:
    if path is None:
        return None
    found = files.read_object(epath.Path(path).expanduser(), "--evaluation")
    try:
        model_card.numbers(found)  # what is missing is missed now, not when the weights are written
        return found
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise UsageError(
            f"--evaluation: expected what tnt_jax.evaluate writes, found {path}: {error}."
        ) from error


def _target(output: str, output_format: str, step: int) -> epath.Path:
    """The directory that will be written; it must not be there yet."""
    folder = files.absolute(output)
    if output_format not in _DIRECTORIES:
        checkpoint_kinds.check_takes_checkpoints(folder, "--output")
    target = folder if output_format in _DIRECTORIES else folder / f"checkpoint_{step}"
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UsageError(
            f"--output: expected a directory that does not exist or is empty, found {target}. "
            "Delete it or choose another."
        )
    return target


def _cast(array: LazyArray, dtype: str | None, output_format: str) -> LazyArray:
    """An array in the type that it is written in; checkpoints have no place for float16."""
    if dtype is not None:
        return array.astype(_DTYPES[dtype])
    is_narrow = array.dtype == np.float16 and output_format != "huggingface"
    return array.astype(np.dtype(np.float32)) if is_narrow else array


def _laid_out(
    weights: Mapping[str, LazyArray], config: NetworkConfig, output_format: str, scan_layers: bool
) -> dict[str, LazyArray]:
    if output_format == "huggingface":
        return huggingface.to_stored(weights, config)
    return t5x.stacked(weights) if scan_layers else dict(weights)


def _print_plan(
    laid_out: Mapping[str, LazyArray], source: pretrained.Pretrained, target: epath.Path
) -> None:
    rows = [
        (name, str(array.shape), array.dtype.name, array.source) for name, array in laid_out.items()
    ]
    console.table(rows, columns=("parameter", "shape", "type", "from"), title=f"{target}")
    count = sum(math.prod(array.shape) for array in laid_out.values())
    size = sum(math.prod(array.shape) * array.dtype.itemsize for array in laid_out.values())
    console.log(
        f"{len(rows)} arrays, {count:,} numbers, {size / 1e9:.3g} GB, from {source.path} "
        f"({source.kind}). Everything fits; nothing was written (--dry_run)."
    )


def _progress(items, title="writing"):
    return console.progress(items, title, len(items))


def _write_huggingface(
    target: epath.Path,
    weights: Mapping[str, LazyArray],
    config: NetworkConfig,
    source: pretrained.Pretrained,
    settings: dict[str, Any],
    evaluation: Mapping[str, Any] | None,
    vocabulary: str | None,
) -> None:
    with _moved_when_whole(target, huggingface.CONFIG) as unfinished:
        huggingface.write_weights(unfinished, weights, config, progress=_progress)
        has_tokenizer = _copy_description(source, unfinished, vocabulary)
        dtypes = sorted({array.dtype.name for array in weights.values()})
        key = "dtype" if "dtype" in settings else "torch_dtype"
        settings = settings | {key: dtypes[-1]}
        settings.pop("_name_or_path", None)
        settings |= huggingface.family_of_network(config).always_said(config)
        card = model_card.write(
            family=huggingface.family_of_network(config),
            name=target.name,
            source=os.fspath(source.path),
            dtype=" and ".join(dtypes),
            stored_dtype=" and ".join(
                sorted({source.weights[name].dtype.name for name in weights})
            ),
            quantisation=source.quantisation,
            step=source.step,
            run=source.run,
            evaluation=evaluation,
            has_tokenizer=has_tokenizer,
        )
        (unfinished / "README.md").write_text(card)
        (unfinished / huggingface.CONFIG).write_text(files.json_text(settings))


def _write_peft(
    target: epath.Path,
    laid_out: Mapping[str, LazyArray],
    network: NetworkConfig,
    source: pretrained.Pretrained,
    adapters: trained_parts.Adapters,
    evaluation: Mapping[str, Any] | None,
) -> None:
    base = peft.base_of(adapters)
    with _moved_when_whole(target, peft.CONFIG) as unfinished:
        family = huggingface.family_of_network(network)
        config = peft.new_config(adapters, laid_out, family)
        peft.write(unfinished, laid_out, config)
        (dtype,) = {array.dtype.name for array in laid_out.values()}
        card = model_card.write_of_adapters(
            family=family,
            name=target.name,
            base=base.name,
            is_on_hub=base.revision is not None,
            is_loadable=base.is_loadable,
            dtype=dtype,
            step=source.step,
            run=source.run or {},
            evaluation=evaluation,
        )
        (unfinished / "README.md").write_text(card)
    if not base.is_loadable:
        console.log(
            f"Warning: PEFT loads adapters onto a Hugging Face directory, and their original, "
            f"{base.name} ({adapters.original.kind}), is none that transformers reads. python -m "
            f"tnt_jax.convert --input={base.name} --output=BASE --output_format=huggingface makes "
            f"one: name it as base_model_name_or_path in {target / peft.CONFIG}."
        )


@contextlib.contextmanager
def _moved_when_whole(target: epath.Path, last: str) -> Iterator[epath.Path]:
    """Yields a local directory beside the target, or a temporary one, and moves it there at last.

    Args:
      target: The directory that is written, or an empty one.
      last: The file that goes last into a bucket: with it the directory counts.
    """
    if files.is_remote(target):
        # Of its own: the lock is on the target, and another one may have the same name.
        with tempfile.TemporaryDirectory(prefix="tnt_jax-") as folder:
            local = epath.Path(folder)
            yield local
            target.mkdir(parents=True, exist_ok=True)
            for file in sorted(local.iterdir(), key=lambda file: file.name == last):
                file.copy(target / file.name)
        return
    unfinished = files.new_folder_beside(target)
    try:
        yield unfinished
        if target.exists():  # empty
            target.rmdir()
        unfinished.rename(target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _copy_description(
    source: pretrained.Pretrained, folder: epath.Path, vocabulary: str | None
) -> bool:
    """Copies what is neither weights nor settings; returns whether a tokenizer is among it."""
    if vocabulary is not None:
        vocabularies.write(folder, pretrained.vocabulary(vocabulary))
    for name in huggingface.OTHER_FILES:
        is_tokenizer = name in huggingface.TOKENIZER_FILES
        if (source.description / name).exists() and not (vocabulary and is_tokenizer):
            (folder / name).write_bytes((source.description / name).read_bytes())
    if vocabularies.has_tokenizer(folder):
        return True
    console.log(
        f"Warning: {source.path} comes without a tokenizer, so there is none in the output. To add "
        "it, pass --vocabulary with the path of a spiece.model, or of a directory that has one."
    )
    return False


def _write_orbax(
    target: epath.Path, laid_out: Mapping[str, LazyArray], step: int, output_format: str
) -> None:
    """All parameters are in memory: Orbax writes them at once."""
    arrays = {name: laid_out[name].load() for name in _progress(list(laid_out))}
    params = flax.traverse_util.unflatten_dict(arrays, sep="/")
    if output_format == "t5x_orbax":
        state = {"target": params, "state": {"step": np.int32(step), "param_states": {}}}
        items = {t5x.ORBAX_ITEM: ocp.args.PyTreeSave(state)}
    else:
        items = {orbax.PARAMS: ocp.args.StandardSave(params)}
    orbax.save_items(target.parent, step, items)


def _describe(
    model_dir: epath.Path,
    source: pretrained.Pretrained,
    settings: Mapping[str, Any],
    vocabulary: str | None,
) -> None:
    """Writes what the formats of checkpoints have no place for beside them."""
    if not settings and vocabulary is None:
        return
    folder = model_dir / orbax.DESCRIPTION
    if (folder / huggingface.CONFIG).exists() and huggingface.read_config(folder) != settings:
        raise UsageError(
            f"--output: {model_dir} has checkpoints of another model, as {folder} says. Choose "
            "another directory."
        )
    folder.mkdir(parents=True, exist_ok=True)
    _copy_description(source, folder, vocabulary)
    if settings:
        files.write_json(folder / huggingface.CONFIG, settings)


def gin_arguments(arguments: list[str]) -> list[str]:
    """The command line as `program.run` takes it: each flag a setting of `convert`."""
    parser = argparse.ArgumentParser(
        prog="python -m tnt_jax.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--input", required=True, metavar="MODEL", help="a model, of any kind")
    parser.add_argument("--output", required=True, metavar="DIR", help="the directory to write")
    parser.add_argument("--output_format", required=True, choices=_FORMATS)
    parser.add_argument("--dtype", choices=_DTYPES, help="of the output; as the input has it")
    parser.add_argument(
        "--dry_run", action="store_true", help="check, print the parameters, write nothing"
    )
    parser.add_argument(
        "--scan_layers", action="store_true", help="stack T5X's layers, as its scalable_t5 does"
    )
    parser.add_argument(
        "--vocabulary", metavar="FILE", help="a tokenizer, for an input that has none"
    )
    parser.add_argument(
        "--evaluation", metavar="FILE", help="of tnt_jax.evaluate, for the model card"
    )
    parser.add_argument(
        "--gin_file",
        action="append",
        default=[],
        metavar="FILE",
        help="a file of gin_configs/models that the parameters must fit",
    )
    flags = vars(parser.parse_args(arguments))
    gin_files = flags.pop("gin_file")
    settings = [f"--gin_file={name}" for name in gin_files]
    if gin_files:
        settings.append("--gin.convert.convert.model=%MODEL")
    for name, value in flags.items():
        if value is not None:
            text = repr(value) if isinstance(value, str) else value
            settings.append(f"--gin.convert.convert.{name}={text}")
    return settings


def _main(arguments: list[str]) -> None:
    program.run("tnt_jax.convert", "convert", gin_arguments(arguments))


if __name__ == "__main__":
    _main(sys.argv[1:])
