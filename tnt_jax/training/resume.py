"""What a checkpoint remembers of its run, and what must be the same when the run goes on.

The item `run` of a checkpoint is a JSON object:

    original        where it came from, a digest of its parameters, and the log-probabilities that
                    it gives a probe batch; None where the objective needs none
    start           the checkpoint that training started from, and a digest of those parameters
    objective, model, optimizer, data, vocabulary, batch_size, task_feature_lengths, pack, seed,
    adapters, upper_layers
                    what decides the updates, and is compared on a restart (`COMPARED`)
    computed_on     devices, mesh, microbatches: they may change, and change the last bits; and, of
                    microbatches, which units dropout drops
    versions        of Python and of the packages that compute
    config          the gin settings, as `operative_config.gin` has them
    changes         what was changed knowingly, and after which update
    position        of the data: the number of the next batch, which is all that there is to know
    health          the last losses and the updates that were left out (`health`)
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from tnt_jax import objectives
from tnt_jax.checkpoints import digests, pretrained
from tnt_jax.data import shuffling
from tnt_jax.runtime import console, operative_config, processes, settings_json
from tnt_jax.runtime.array_types import PyTree
from tnt_jax.runtime.errors import UsageError
from tnt_jax.training import load_original, run_checkpoints, settings, train_step
from tnt_jax.training.trainer import Trainer

# What must not change unnoticed, and the setting that says it.
COMPARED = {
    "original": "INITIAL_CHECKPOINT_PATH",
    "start": "START_CHECKPOINT_PATH or INITIAL_CHECKPOINT_PATH",
    "objective": "the objective's file",
    "model": "the model's settings",
    "optimizer": "OPTIMIZER and its settings",
    "data": "RECORDS and its settings",
    "vocabulary": "VOCABULARY_PATH",
    "batch_size": "BATCH_SIZE",
    "task_feature_lengths": "TASK_FEATURE_LENGTHS",
    "pack": "PACK",
    "seed": "SEED",
    "adapters": "ORIGINAL, ADAPTER_RANK, ADAPTER_ALPHA and TRAINED_LAYERS",
    "upper_layers": "ORIGINAL and TRAINED_LAYERS",
}

# What else all processes must have alike, and what says it.
_OF_ALL = {
    "checkpoint": "the newest one that each sees in MODEL_DIR",
    "non_finite": "NON_FINITE",
    "keep": "ALLOW_CHANGES, KEEP_BEST or another setting of settings.Keep",
    "samples": "SAMPLE_EVERY, SAMPLE_PROMPTS or another setting of the samples",
    "inference_evaluation": "EVAL_MIXTURE_OR_TASK_NAME or another setting of that evaluation",
}

# These are there only where a part of the model is trained.
_OF_PARTS = ("adapters", "upper_layers")

# Of these the named parts alone are compared; of others everything.
_IDENTITIES = {
    "original": ("digest",),
    "start": ("digest",),
    "data": ("digest",),
    "adapters": ("rank", "alpha", "layers"),
    "upper_layers": ("layers",),
}

# How a network is computed, not what: or compared elsewhere (`orbax`, `adapters`).
_NOT_OF_THE_MODEL = ("class", "attention", "scan_layers", "remat_policy", "adapter_scale")

# What objectives of older versions did not have: where it is left out, it has its default.
_ADDED_TO_OBJECTIVES = {
    field.name: settings_json.describe(field.default)
    for field in dataclasses.fields(objectives.TntObjective)
    if field.metadata.get("omit_default")
}

# Nats for a token, on average. The probe of the same original differs by rounding from machine to
# machine, most in bfloat16; another activation or a wrong matrix makes several nats.
_PROBE_TOLERANCE = 0.1

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tensorstore", "numpy")


def describe(
    trainer: Trainer,
    *,
    update: settings.Update,
    seed: int,
    data: Mapping[str, Any],
    vocabulary: Any,
    part: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """What `run` says before the original is read.

    Args:
      trainer: The run's trainer.
      update: How an update is computed.
      seed: Decides the order of the data and dropout.
      data: Which data it is.
      vocabulary: The vocabulary of its ids.
      part: What is trained, where that is not the whole model: "adapters" or "upper_layers", with
        their settings and what they lie beside.
    """
    optimizer = settings_json.describe(update.optimizer)
    if update.learning_rate_factor != 1:
        optimizer |= {"learning_rate_factor": update.learning_rate_factor}
    return {
        # Its sets are of the data, which has a digest of its own, however its marks are written.
        "objective": settings_json.describe(dataclasses.replace(trainer.objective, sets=())),
        "model": settings_json.describe(trainer.model.config),
        "optimizer": {**optimizer, "max_gradient_norm": update.max_gradient_norm},
        "data": dict(data),
        "vocabulary": _describe_vocabulary(vocabulary),
        "batch_size": update.batch_size,
        "task_feature_lengths": dict(update.task_feature_lengths),
        # Earlier versions packed every epoch anew, and wrote True: that is another order.
        "pack": "planned once" if update.pack else False,
        "seed": seed,
        "computed_on": {
            "devices": jax.device_count(),
            "kind": jax.devices()[0].device_kind,
            "mesh": dict(trainer.model.mesh.shape),
            "processes": jax.process_count(),
            "num_microbatches": trainer.num_microbatches,
            "block_size": trainer.block_size,
            "original": trainer.original_kind.name,
        },
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in _PACKAGES},
        },
        "config": operative_config.text(),
        **part,
    }


def _describe_vocabulary(vocabulary: Any) -> dict[str, Any]:
    if hasattr(vocabulary, "sentencepiece_model_file") or hasattr(vocabulary, "tokenizer_digest"):
        return settings_json.describe(vocabulary)
    # Others are told apart by what they are: what else they hold may be anything.
    return {"class": settings_json.written_name(type(vocabulary)), "size": vocabulary.size}


def check_alike(run: Mapping[str, Any], **more: Any) -> None:
    """Compares what all processes are about to do: each has read its files for itself.

    Args:
      run: From `describe`.
      **more: What else all must have alike, JSON values.

    Raises:
      UsageError: In all processes: something differs.
    """
    if processes.count() == 1:
        return
    own = {**run, **more}
    # Paths may differ, where the files are the same.
    for name in ("config", "versions"):
        own.pop(name)
    own |= {name: _compared(name, own.get(name)) for name in _OF_PARTS}
    _refuse_others("alike", own)


def _refuse_others(place: str, own: Mapping[str, Any]) -> None:
    """Raises a UsageError in all processes where one has another JSON value than the first one.

    Args:
      place: A name, the same in each process: see `processes.gather`.
      own: The values of this process, by their names.
    """
    texts = {name: json.dumps(value, sort_keys=True) for name, value in own.items()}
    digests = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()}
    said = [json.loads(text) for text in processes.gather(place, json.dumps(digests))]
    differing = dict.fromkeys(name for of in said for name in processes.differing(said[0], of))
    if differing:
        labels = COMPARED | _OF_ALL
        names = [f"{name} ({labels[name]})" if name in labels else name for name in differing]
        raise UsageError(
            f"expected the same models, data and settings in all {len(said)} processes, found "
            f"others in some: {', '.join(names)}. Start all of them alike, with the same files: in "
            "one place that all see (gs://, or a folder that their hosts share), or the same on "
            "every host."
        )


class Start(NamedTuple):
    """Where a run begins, or goes on.

    Attributes:
      step: The number of updates so far.
      state: After them.
      loaded_original: What the run needs of its original.
      before: What the checkpoint says; nothing where there is none.
    """

    step: int
    state: train_step.TrainState
    loaded_original: load_original.LoadedOriginal
    before: Mapping[str, Any]


def begin(
    trainer: Trainer,
    saved: run_checkpoints.Checkpoints,
    run: dict[str, Any],
    load: Callable[..., tuple[load_original.LoadedOriginal, PyTree | None]],
    sources: load_original.Sources,
    allow_changes: Sequence[str],
    model_dir: str,
) -> Start:
    """The state to go on from: of the newest checkpoint, if there is one, or a new one.

    Whatever can be compared without reading a model is compared before one is read.

    Args:
      trainer: The run's trainer.
      saved: Its checkpoints.
      run: From `describe`; what the original and the start were is added.
      load: Reads the original, and what a new run (`is_new`) starts from.
      sources: Where both are read from.
      allow_changes: What may differ from the run of the checkpoint, of `COMPARED`.
      model_dir: The model directory, for messages.

    Raises:
      UsageError: The checkpoint is of another run, and which differences make it one; or of another
        model or optimizer; or not all processes see it.
    """
    step = _latest_step(saved)
    before: Mapping[str, Any] = {}
    if step is not None:
        before = saved.run_of(step)
        misfit = None
        try:
            saved.check(step, trainer.abstract_state)
        except UsageError as error:
            misfit = error  # said last: another setting may be the reason, and is named as such
        names = [name for name in COMPARED if name not in ("original", "start")]
        check_same(before, run, names, allow_changes, model_dir, step, fits=misfit is None)
        if misfit is not None:
            raise misfit
    _check_files_alike(trainer, sources, is_new=step is None)
    loaded, params = load(is_new=step is None)
    run["original"] = loaded.identity
    # Hosts may have the files at paths of their own. What all compute together is decided by those
    # of one process, whose paths a checkpoint has.
    paths = [sources.schedule.start_path or sources.choice.path, sources.choice.path]
    start_path, original_path = json.loads(processes.gather("start", json.dumps(paths))[0])

    def digest_of_start() -> str | None:
        if loaded.identity is not None and start_path == original_path:
            return loaded.identity["digest"]
        if "start" in allow_changes:
            return None
        kind = trainer.original_kind
        if params is not None and (kind.is_apart or kind.has_adapters):
            return digests.of_params(params)
        of_original = None if loaded.identity is None else loaded.identity["digest"]
        return digests.of_params(sources.read_start(of_original))

    run["start"] = _start(before, start_path, digest_of_start)
    _refuse_others("models", {name: _compared(name, run[name]) for name in ("original", "start")})
    if step is None:
        assert params is not None
        run["changes"] = []
        return Start(0, trainer.init_state(params), loaded, before)
    check_same(before, run, ("original", "start"), allow_changes, model_dir, step)
    console.log(f"Going on from checkpoint {step} in {model_dir}.")
    _log_differences(before, run)
    return Start(step, saved.restore(step, trainer.abstract_state), loaded, before)


def _latest_step(saved: run_checkpoints.Checkpoints) -> int | None:
    """The step of the newest checkpoint, which all processes go on from; None if there is none.

    Raises:
      UsageError: In all processes: they see different ones.
    """
    said = processes.gather("latest step", json.dumps(saved.latest_step()))
    steps = [step for step in map(json.loads, said) if step is not None]
    newest = max(steps, default=None)

    def is_seen() -> bool:
        if saved.latest_step() != newest:
            saved.reload()  # a network file system may show a folder as it was
        return saved.latest_step() == newest

    processes.is_soon(is_seen)
    _refuse_others("checkpoint", {"checkpoint": saved.latest_step()})
    return newest


def _check_files_alike(trainer: Trainer, sources: load_original.Sources, *, is_new: bool) -> None:
    """Compares the models that all processes are about to read, each from files that it sees.

    Parameters that lie over several hosts have one digest, even if each host has read its part of
    another model. So some of each file are compared before.

    Raises:
      UsageError: In all processes: they differ.
    """
    if processes.count() == 1:
        return
    source, start_path = sources.original_source, sources.schedule.start_path
    found: dict[str, str | None] = {"original": None, "start": None}
    reads_original = trainer.abstract_original is not None or (is_new and start_path is None)
    if reads_original and source is not None:
        found["original"] = source.digest_of_some()
    if is_new and start_path is not None:
        found["start"] = pretrained.open_checkpoint(start_path).digest_of_some()
    _refuse_others("files", found)


def _start(
    before: Mapping[str, Any], path: str | None, digest: Callable[[], str | None]
) -> dict[str, Any]:
    """Where training started from."""
    start = before.get("start")
    if start is not None and start["path"] == path:
        # Whatever is there by now, a run that has started no longer needs it.
        return start
    return {"path": path, "digest": digest()}


def check_allowed(allow_changes: Sequence[str]) -> None:
    """Raises a UsageError unless these are names of `COMPARED`."""
    unknown = [name for name in allow_changes if name not in COMPARED]
    if unknown or isinstance(allow_changes, str):
        raise UsageError(
            f"ALLOW_CHANGES: expected a list of some of {', '.join(COMPARED)}; found "
            f"{allow_changes!r}."
        )


def check_same(
    before: Mapping[str, Any],
    run: dict[str, Any],
    names: Iterable[str],
    allow_changes: Sequence[str],
    model_dir: str,
    step: int,
    *,
    fits: bool = True,
) -> None:
    """Compares what a checkpoint remembers with the run that would go on from it.

    What an older version did not write down is not compared. Changes that are allowed are logged,
    and noted in `run`.

    Args:
      before: What the checkpoint remembers of its run.
      run: What this run notes of itself.
      names: The values to compare, by their names in `COMPARED`.
      allow_changes: Names of the values whose change is meant.
      model_dir: The run's folder, for the message.
      step: The checkpoint's number of updates.
      fits: Whether the checkpoint can be read into the run as it is now.

    Raises:
      UsageError: Something else has changed: all of it is named.
    """
    run.setdefault("changes", list(before.get("changes", [])))
    refused: dict[str, str] = {}
    for name in names:
        if name not in before and name not in _OF_PARTS:
            continue
        difference = _difference(name, before.get(name), run.get(name))
        if difference is None:
            continue
        if name in allow_changes:
            run["changes"].append({"after_update": step, "name": name, "change": difference})
            console.log(f"Going on with a change: {difference}.")
        else:
            refused[name] = difference
    if refused:
        meant = json.dumps(sorted({*refused, *allow_changes})).replace('"', "'")
        advice = (
            "Set it back, choose another MODEL_DIR, or go on knowingly with "
            f'--gin.ALLOW_CHANGES="{meant}".'
            if fits
            else "Set it back, or choose another MODEL_DIR: the checkpoint does not fit the change."
        )
        raise UsageError(
            f"MODEL_DIR {model_dir} holds another run, at update {step}: "
            f"{'; '.join(refused.values())}. {advice}"
        )


def _difference(name: str, before: Any, now: Any) -> str | None:
    """What has changed, for people; None if nothing has."""
    now = json.loads(json.dumps(now))
    label = f"{name} ({COMPARED[name]})"
    was, found = _compared(name, before), _compared(name, now)
    if was == found:
        gap = _probe_gap(before, now) if name == "original" else 0.0
        if gap <= _PROBE_TOLERANCE:
            return None
        return (
            f"{label} has the parameters that it had, but computes otherwise: its "
            f"log-probabilities of a probe batch differ by {gap:.2g} nats a token (the model's "
            "settings, or the versions of what computes)"
        )
    if isinstance(was, dict) and isinstance(found, dict) and "digest" not in was:
        keys = was.keys() | found.keys()
        if name in ("model", "objective"):  # other versions have other settings
            was, found = ({**_ADDED_TO_OBJECTIVES, **of} for of in (was, found))
            keys = (was.keys() & found.keys()).difference(_NOT_OF_THE_MODEL)
        changed = [
            f"{key} was {_short(was.get(key))}, is {_short(found.get(key))}"
            for key in sorted(keys)
            if was.get(key) != found.get(key)
        ]
        return f"{label}: {', '.join(changed)}" if changed else None
    return f"{label} was {_said(name, before)}, is {_said(name, now)}"


def _compared(name: str, value: Any) -> Any:
    """The part of a value that makes it another run's; where something lies does not.

    A setting that is None is as one that an older version did not have.
    """
    parts = _IDENTITIES.get(name)
    if parts is None or value is None:
        return value
    return {part: value[part] for part in parts if value.get(part) is not None}


def _said(name: str, value: Any) -> str:
    if name == "original" and value is None:
        return "none (an objective without divergences)"
    if name == "data":
        number, digest = value["num_examples"], value["digest"]
        is_old = number > shuffling.LARGEST_TABLE and not digest.startswith("rows-")
        how = ", in the order of an earlier version" if is_old else ""
        return f"{number} examples (digest {digest}{how})"
    if name == "pack" and value:
        is_old = value is True
        return f"True{', planned anew in every epoch by an earlier version' if is_old else ''}"
    if name in ("original", "start"):
        path = "a random initialisation" if value["path"] is None else value["path"]
        return f"{path} (digest {value['digest']})" if name == "original" else path
    return "none" if value is None else _short(_compared(name, value))


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= 120 else f"{text[:100]}... ({len(text)} characters)"


def _probe_gap(before: Any, now: Any) -> float:
    """How far the log-probabilities of two originals are apart, in nats a token."""
    if before is None:
        return 0.0
    was, found = (np.array(original["probe"]) for original in (before, now))
    return float(np.abs(was - found).mean()) if was.shape == found.shape else np.inf


def _log_differences(before: Mapping[str, Any], run: Mapping[str, Any]) -> None:
    """Says what has changed that may change: it changes the last bits of the numbers, or masks."""
    changed = [
        f"{name} was {_short(was)}, is {_short(run[part][name])}"
        for part in ("computed_on", "versions")
        for name, was in (before.get(part) or {}).items()
        if name in run[part] and run[part][name] != was
    ]
    if not changed:
        return
    rate, how = run["model"].get("dropout_rate"), "the same up to rounding, not bit by bit"
    if rate and _have_other_masks(before.get("computed_on") or {}, run["computed_on"]):
        how = (
            f"with DROPOUT_RATE={rate}, other units are dropped from here on than would have been; "
            "the batches are the same"
        )
    console.log(f"Computed otherwise than before ({'; '.join(changed)}): {how}.")


def _have_other_masks(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether dropout drops others: microbatches have keys of their own, on each data device."""
    if not {"num_microbatches", "mesh"} <= before.keys():
        return False
    numbers, data = zip(
        *((of["num_microbatches"], of["mesh"]["data"]) for of in (before, now)), strict=True
    )
    return numbers[0] != numbers[1] or (numbers[0] > 1 and data[0] != data[1])
