r"""Compiles the train step of a run for devices that are not here, and says whether it fits.

For a TPU this is the real program by the real compiler (libtpu: `pip install 'tnt_jax[tpu]'`), on
a machine that has only a CPU. Give it the gin files and settings of the run itself. You may leave
out what the step does not depend on (RECORDS, MODEL_DIR, ...).

--topology names the devices: "v5e:2x4", "v5p:4x4x4", "v6e:4x4", "v4:2x2x1", or "local" for those of
this machine. For a named TPU, no TPU of this machine is used, so this may run beside a program
that computes on it.

Exit status: 0, it fits, or the memory of a device is not known; 3, it does not fit; 2, with one
line on stderr, a setting does not work.

Example:
    python -m tnt_jax.precompile --topology=v5e:2x4 --gin_file=models/t5_1_1_xl.gin \
      --gin_file=objectives/tnrf.gin --gin_file=runs/train.gin --gin.FSDP_DEVICES=8
"""

import contextlib
import dataclasses
import importlib.metadata
import os
import pathlib
import re
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import jax

from tnt_jax import objectives, train
from tnt_jax.checkpoints import pretrained
from tnt_jax.data.batches import feature_shapes
from tnt_jax.data.layouts import CAUSAL
from tnt_jax.models.network_config import NetworkConfig
from tnt_jax.runtime import console, files, program
from tnt_jax.runtime.errors import UsageError
from tnt_jax.training import compiled_step, settings
from tnt_jax.training.trainer import Trainer, make_trainer

EXIT_STATUS = 3  # where a step does not fit

# GiB of each device, as its vendor states it, by what libtpu calls it: "v5" is v5p.
HBM = {"v4": 32, "v5e": 16, "v5": 95, "v6e": 32, "tpu7x": 96}

# What the compiler says of a program that does not fit: what it needs, and what there is.
_DOES_NOT_FIT = (
    re.compile(r"Used (\S+) of (\S+) hbm"),
    re.compile(r"\(([\d.]+\S)\) exceeds available HBM \((\S+?)\)"),
)


def precompile(
    *,
    topology: str = "local",
    num_negative_ids: int = 1,
    has_strengths: bool = False,
    num_shared: int = 0,
    output: str | None = None,
    program_text: str | None = None,
) -> dict[str, Any]:
    """Compiles the step that `train.train` is bound to, and prints what it takes.

    Args:
      topology: Which devices, as above.
      num_negative_ids: Ids removed at a position, at most; a run takes them from its data.
      has_strengths: Whether marks of the data have strengths below 1.
      num_shared: Tokens that all inputs of the data begin with, which are computed once; those of
        a decoder-only model that are not packed.
      output: A JSON file for the numbers; None writes none.
      program_text: A file for the compiled program as text; None writes none.

    Returns:
      What it prints.

    Raises:
      UsageError: A setting does not fit, or the topology is not known.
    """
    for name, path in (("output", output), ("program_text", program_text)):
        if path is not None:
            files.check_writable(path, f"precompile.{name}")
    found = program.bound_arguments(train.train, ("model", "objective", "update"))
    # The path is left out where it is not given: a model file then says what the network is.
    fields = ("kind", "states_dir", "adapter_rank", "adapter_alpha", "trained_layers")
    choice = program.bound_arguments(settings.OriginalChoice, fields, ("path",))
    report = compile_step(
        devices_of(topology),
        original_choice=settings.OriginalChoice(**{"path": None, **choice}),
        num_negative_ids=num_negative_ids,
        has_strengths=has_strengths,
        num_shared=num_shared,
        program_text=program_text,
        **found,
    )
    report = {"topology": topology, **report}
    if output is not None:
        files.write_json(output, report)
    _print(report)
    return report


def devices_of(topology: str) -> Sequence[Any]:
    """The devices of a topology; none of them need be here.

    Those of a TPU can only be compiled for. JAX, if it has not begun, then computes on the CPU.

    Raises:
      UsageError: It is not known, or libtpu is missing.
    """
    if topology == "local":
        return jax.devices()
    # libtpu would ask the metadata server of a cloud machine where it is.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    # Without one it asks as well, and complains. Here it is of no account: the topology counts.
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")
    # It would refuse to be loaded while another process has it, whose chips are not needed here.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    if not os.environ.get("JAX_PLATFORMS"):
        jax.config.update("jax_platforms", "cpu")
    from jax.experimental import topologies

    try:
        # On a v4, JAX has a device for each chip, not for each of its two cores.
        settings: dict[str, Any] = {}
        if topology.startswith("v4:"):
            settings["chip_config_name"] = "megacore"
        # A host has 2 x 2 chips or, says libtpu 0.0.42.1 only when told so, fewer.
        sides = [int(side) for side in re.findall(r"\d+", topology.partition(":")[2])]
        if 1 in sides[:2]:
            settings["chips_per_host_bounds"] = [*(min(2, side) for side in sides[:2]), 1]
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology, **settings)
        return found.devices
    except Exception as error:  # of whatever type libtpu raises
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise UsageError(
            "--topology: expected local or a TPU such as v5e:2x4, v5p:2x2x1 or v6e:4x4, and libtpu "
            f"(pip install 'tnt_jax[tpu]'); found {topology!r}: {reason}"
        ) from error


def compile_step(
    devices: Sequence[Any],
    *,
    model: NetworkConfig | pretrained.FromCheckpoint,
    objective: objectives.TntObjective,
    update: settings.Update,
    original_choice: settings.OriginalChoice,
    num_negative_ids: int = 1,
    has_strengths: bool = False,
    num_shared: int = 0,
    program_text: str | None = None,
) -> dict[str, Any]:
    """Compiles a step for devices.

    Args:
      devices: From `devices_of`.
      model: The network's settings, or that they are the original's.
      objective: The loss per token.
      update: How an update is computed.
      original_choice: Which model is the original, and where its logits come from.
      num_negative_ids: Largest number of ids removed at a position.
      has_strengths: Whether marks have strengths below 1.
      num_shared: Tokens that all inputs begin with.
      program_text: A file for the compiled program as text; None writes none.

    Returns:
      "fits" (None where the devices' memory is not known), "bytes" by kind, "collectives", and what
      else is printed; where the compiler itself finds that it does not fit, "bytes" are its words.
    """
    source = (
        None if original_choice.path is None else pretrained.open_checkpoint(original_choice.path)
    )
    trainer = make_trainer(
        config=pretrained.config_of(model, source),
        objective=objective,
        original_choice=original_choice,
        update=update,
        devices=devices,
    )
    layout, longest = trainer.model.network.feature_layout, update.task_feature_lengths["inputs"]
    if num_shared and not (layout == CAUSAL and not update.pack and 0 < num_shared < longest):
        raise UsageError(
            "precompile.num_shared: expected 0 or, for a decoder-only model with PACK=False, fewer "
            f"than the {longest} tokens of an input (TASK_FEATURE_LENGTHS), found {num_shared}."
        )
    batch = trainer.abstract_batch(
        feature_shapes(
            update.task_feature_lengths,
            update.batch_size,
            num_negative_ids,
            pack=update.pack,
            feature_layout=layout,
            has_strengths=has_strengths,
            num_shared=num_shared,
        )
    )
    report: dict[str, Any] = {
        "device": devices[0].device_kind,
        "mesh": dict(trainer.model.mesh.shape),
        "num_params": sum(leaf.size for leaf in jax.tree.leaves(trainer.model.abstract_params)),
        "batch_size": update.batch_size,
        "lengths": dict(update.task_feature_lengths),
        "original": original_choice.kind,
        "jax": jax.__version__,
        "libtpu": _libtpu_version() if devices[0].platform == "tpu" else None,
    }
    began = time.monotonic()
    try:
        compiled, text, assigned = _compile(trainer.lower(batch), devices[0].platform)
    except jax.errors.JaxRuntimeError as error:
        return {**report, "fits": False, **_wanted(error), **_advice(trainer)}
    report["compile_seconds"] = round(time.monotonic() - began, 1)
    state = trainer.abstract_state
    report["bytes"] = compiled_step.memory(
        compiled,
        {
            "parameters": state.params,
            "original": trainer.abstract_original,
            "optimizer": state.opt_state,
            "batch": batch,
        },
        assigned,
    )
    report["collectives"] = [dataclasses.asdict(each) for each in compiled_step.collectives(text)]
    if program_text is not None:
        files.write_text(program_text, text)
    limit = _limit(devices[0])
    report["of"] = limit
    report["fits"] = None if limit is None else report["bytes"]["total"] <= limit
    return report if report["fits"] is not False else {**report, **_advice(trainer)}


def _compile(lowered: Any, platform: str) -> tuple[Any, str, int | None]:
    """A compiled program, its text, and the memory that the compiler gave it if it says so."""
    if platform != "tpu":
        compiled = lowered.compile()
        return compiled, compiled.as_text(), None
    # JAX cannot read back some programs for v5p and v6e: their text is written while they compile.
    with tempfile.TemporaryDirectory() as folder:
        options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        compiled = lowered.compile(compiler_options=options)
        (text,) = pathlib.Path(folder).glob("*.after_optimizations.txt")
        assigned = None
        for report in pathlib.Path(folder).glob("*-memory-usage-report.txt"):
            assigned = compiled_step.assigned_bytes(report.read_text("utf-8"))
        return compiled, text.read_text("utf-8"), assigned


def _libtpu_version() -> str | None:
    """The version of the installed libtpu package; None if it is not a package."""
    for name in ("libtpu", "libtpu-nightly"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return None


def _wanted(error: jax.errors.JaxRuntimeError) -> dict[str, str]:
    """What a program needs that does not fit, in the compiler's words."""
    text = str(error)
    for form in _DOES_NOT_FIT:
        if found := form.search(text):
            return {"used": found[1], "of": found[2]}
    if "RESOURCE_EXHAUSTED" not in text and "Oom" not in text:
        raise error
    reason = next(iter(text.splitlines()), "")
    return {"used": f"more ({reason})", "of": "a device's memory"}


def _limit(device: Any) -> int | None:
    """Bytes of a device's memory, where they are known."""
    kind = device.device_kind.lower().removeprefix("tpu ").replace(" lite", "e")
    if kind in HBM:
        return HBM[kind] * compiled_step.GIB
    try:
        return (device.memory_stats() or {}).get("bytes_limit")
    except (jax.errors.JaxRuntimeError, AttributeError, NotImplementedError):
        return None


def _advice(trainer: Trainer) -> dict[str, str]:
    return {"advice": f"try {'; '.join(trainer.memory_advice())}"}


def _print(report: dict[str, Any]) -> None:
    mesh = " x ".join(f"{axis} {size}" for axis, size in report["mesh"].items())
    title = (
        f"{report['num_params'] / 1e9:.2f} billion parameters on {report['topology']} "
        f"({report['device']}), {mesh}; {report['batch_size']} rows of "
        f"{report['lengths']['inputs']} and {report['lengths']['targets']} tokens; original: "
        f"{report['original']}"
    )
    console.log(title)
    libtpu = f", libtpu {report['libtpu']}" if report["libtpu"] else ""
    console.log(f"Compiler: that of JAX {report['jax']}{libtpu}.")
    if "bytes" in report:
        rows = [
            (name, f"{number / compiled_step.GIB:.3f}") for name, number in report["bytes"].items()
        ]
        console.table(rows, columns=("on each device", "GiB"))
        rows = [
            (
                each["operation"],
                each["shape"],
                f"{each['num_bytes'] / 2**20:.2f}",
                each["count"],
                "by the data" if each["times"] is None else each["times"],
            )
            for each in report["collectives"][:12]
        ]
        left_out = len(report["collectives"]) - len(rows)
        console.table(rows, columns=("collective", "result", "MiB", "in the program", "each runs"))
        if left_out:
            console.log(f"and {left_out} smaller ones.")
        console.log(f"Compiled in {report['compile_seconds']} s.")
    if report["fits"] is None:
        console.log("How much memory such a device has is not known here.")
        return
    total = report["bytes"]["total"] / compiled_step.GIB if "bytes" in report else None
    of = report["of"] / compiled_step.GIB if total is not None else report["of"]
    if report["fits"]:
        console.log(f"It fits: {total:.2f} of {of:.0f} GiB.")
    else:
        used = f"{total:.2f} of {of:.0f} GiB" if total is not None else f"{report['used']} of {of}"
        console.log(f"It does not fit: {used}. To make it fit, {report['advice']}.")


if __name__ == "__main__":
    program.run(
        "tnt_jax.precompile",
        "precompile",
        flags=("topology",),
        needs_all=False,
        status_of=lambda report: EXIT_STATUS if report["fits"] is False else 0,
    )
