"""What `patch` is asked for: its flags, what it refuses, and the folder of another patch."""

import argparse
import dataclasses
import json
import os
import pathlib
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import jax

from tnt_jax.checkpoints import pretrained
from tnt_jax.data import layouts
from tnt_jax.experiments.experiment import Arm, Experiment
from tnt_jax.models import families
from tnt_jax.patching import choices, pipeline_gin, prompt_files
from tnt_jax.patching.choices import Choice
from tnt_jax.patching.unwanted import Unwanted
from tnt_jax.runtime import files, holding, memory, stages
from tnt_jax.runtime.errors import UsageError

FORMATS = ("same", "huggingface", "peft", "t5x", "orbax")
INPUTS = "patch_inputs.json"  # in the folder: what its patch is of
LOG = "log.txt"  # the same: what programs said


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked:
    """The arguments of `patch`, checked as far as that needs no file."""

    model: str
    prompts: str | None
    root: pathlib.Path
    unwanted: Unwanted
    cut: float
    decoding: str
    seconds: float
    eval_prompts: str | None
    output_format: str
    gin_files: Sequence[str]
    settings: Sequence[str]

    def __post_init__(self):
        if not 0 < self.cut <= 1:
            raise UsageError(
                f"--cut: expected more than 0, at most 1, found {self.cut:g}: 0.9 is 90 %."
            )
        for flag, value, known in (
            ("--decoding", self.decoding, pipeline_gin.DECODERS),
            ("--format", self.output_format, FORMATS),
        ):
            if value not in known:
                raise UsageError(f"{flag}: expected {', '.join(known)}, found {value!r}.")
        if self.seconds <= 0:
            raise UsageError(f"--time: expected more than 0 seconds, found {self.seconds:g}.")
        if (self.prompts is None) != (self.unwanted.kind == "records"):
            found = "none" if self.prompts is None else self.prompts
            raise UsageError(
                f"--prompts: expected a file of prompts, or --records, which has its own; found "
                f"{found}{'' if self.prompts is None else ' and --records'}."
            )
        if self.unwanted.file is not None and not pathlib.Path(self.unwanted.file).is_file():
            raise UsageError(
                f"--{self.unwanted.kind}: expected a file, found nothing at {self.unwanted.file}."
            )

    @property
    def is_model_local(self) -> bool:
        """Whether the model is a path, not a name."""
        return pathlib.Path(self.model).exists()

    def gin(self, folder: pathlib.Path) -> pipeline_gin.PipelineGin:
        """What writes the settings of a pipeline in a folder."""
        return pipeline_gin.PipelineGin(
            model=self.model,
            folder=folder,
            unwanted=self.unwanted,
            decoding=self.decoding,
            own_files=self.gin_files,
            settings=self.settings,
        )

    def describe(self, texts: prompt_files.Texts) -> dict[str, Any]:
        """What the folder's patch is of: with other values it is another one."""
        device = jax.devices()[0]
        stats = device.memory_stats() if device.platform != "cpu" else None
        return {
            "model": os.path.realpath(self.model) if self.is_model_local else self.model,
            "model_files": stages.fingerprint(self.model),
            "prompts": texts.digest,
            "unwanted": {
                "kind": self.unwanted.kind,
                "what": stages.fingerprint(self.unwanted.file)
                if self.unwanted.file
                else getattr(self.unwanted, self.unwanted.kind),
            },
            "machine": {
                "platform": device.platform,
                "num_devices": jax.device_count(),
                "num_bytes": (stats or {}).get("bytes_limit") or memory.host_bytes(),
            },
        }

    def check(
        self,
        texts: prompt_files.Texts,
        configure: Callable[[pipeline_gin.PipelineGin, Sequence[str]], tuple[Experiment, Arm]],
    ) -> None:
        """Opens all that is named, and writes nothing.

        Args:
          texts: The prompts.
          configure: Has gin read what was written, and further flags.

        Raises:
          UsageError: Something does not fit.
        """
        opened = pretrained.open_checkpoint(self.model)
        if self.root == opened.path or opened.path in self.root.parents:
            raise UsageError(
                f"--output: expected a folder outside the model's, found {self.root}: the model is "
                "never written to."
            )
        for name in self.settings:
            if not re.fullmatch(r"(\w+/)*\w+(\.\w+)*=.*", name, re.DOTALL):
                raise UsageError(f"--gin.{name}: expected --gin.NAME=VALUE")
        # Where they are chosen whatever the machine, what does not fit them is found now.
        needs_adapters = self.output_format == "peft" or is_decoder_only(opened.config)
        adapters = Choice(what="what is trained", macro="ORIGINAL", value="adapters_off", reason="")
        with tempfile.TemporaryDirectory() as folder:
            place = pathlib.Path(folder)
            texts.write_words(place)
            gin = self.gin(place)
            gin.write([adapters] if needs_adapters else [], has_own=False)
            # As flags, so that what is wrong is said of flags.
            flags = [f"--gin_file={name}" for name in self.gin_files]
            flags += gin.flags
            experiment, _ = configure(gin, flags)
            if not self.unwanted.labels:  # whose list of words is still to be found
                experiment.annotator()
        pretrained.check_vocabulary(experiment.vocabulary(), opened.config, opened)
        if self.output_format == "t5x" and is_decoder_only(opened.config):
            raise UsageError(
                f"--format=t5x: expected a T5, found a decoder-only model at {self.model}."
            )
        kind = gin.given.get("ORIGINAL")
        fitting = (None, choices.UNKNOWN, "adapters_off", "adapters_cached")
        if self.output_format == "peft" and kind not in fitting:
            raise UsageError(
                f"--format=peft: expected ORIGINAL='adapters_off', found {kind!r}. Leave one out."
            )


def is_decoder_only(config: Any) -> bool:
    """Whether a network's settings are those of a decoder-only model."""
    return families.network_of(config).feature_layout == layouts.CAUSAL


def check_folder(root: pathlib.Path, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What the folder holds, if it is this patch; raises a UsageError where it is another one."""
    note = root / INPUTS
    if not note.is_file():
        # A command that was killed at its start has left no more than these.
        own = {LOG, holding.NOTE}
        if root.exists() and (
            not root.is_dir() or any(file.name not in own for file in root.iterdir())
        ):
            raise UsageError(
                "--output: expected a folder that is empty or not there yet, or that this command "
                f"made, found other files in {root}. Give another --output."
            )
        return dict(inputs)
    before = files.read_object(note, "--output")
    for name, what in (
        ("model", "another model"),
        ("model_files", "a model that has changed since"),
        ("prompts", "other prompts"),
        ("unwanted", "another list of what is unwanted"),
    ):
        if before.get(name) != json.loads(json.dumps(inputs[name])):
            raise UsageError(
                f"--output: {root} holds a patch with {what}: {_short(before.get(name))}, now "
                f"{_short(inputs[name])}. Give another --output, or delete that folder."
            )
    # Where it goes on with other memory, what was chosen stays.
    was, now = before.get("machine"), inputs["machine"]
    names = ("platform", "num_devices")
    is_alike = isinstance(was, dict) and all(was.get(name) == now[name] for name in names)
    return {**inputs, "machine": was if is_alike else now}


def _short(value: Any) -> str:
    is_unwanted = isinstance(value, Mapping)
    return f"--{value.get('kind')} ({value.get('what')})" if is_unwanted else str(value)


# ---------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"tnt_jax.patch: error: {message} (see --help)\n")


def _seconds(text: str) -> float:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(s|m|h)", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"expected a time such as 90s, 30m or 2h, found {text!r}")
    return float(found[1]) * {"s": 1, "m": 60, "h": 3600}[found[2]]


def _parser(description: str | None) -> _Parser:
    parser = _Parser(
        prog="python -m tnt_jax.patch",
        usage="%(prog)s --model=MODEL --prompts=FILE --output=FOLDER --words=FILE [...]",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--model", required=True, help="a directory, GGUF file, hub name or T5X checkpoint")
    add("--prompts", metavar="FILE", help="JSONL, a .csv or .tsv, or one prompt a line; - is stdin")
    add("--output", required=True, metavar="FOLDER", help="for everything that is written")
    what = parser.add_argument_group("what is unwanted, one of")
    what.add_argument("--words", metavar="FILE", help="words and phrases, one a line")
    what.add_argument("--values", metavar="FILE", help="a gazetteer: values the prompt must state")
    what.add_argument("--spans", metavar="FILE", help="people's marks in outputs of --prompts")
    what.add_argument("--entities", action="store_true", help="names the prompt does not support")
    what.add_argument("--classifier", action="store_true", help="what a classifier calls profane")
    what.add_argument("--function", metavar="MODULE:NAME", help="(inputs, targets) -> spans")
    what.add_argument("--labels", metavar="FIELD", help="true where the output of a prompt is bad")
    what.add_argument("--records", metavar="FILE", help="outputs that are marked already")
    rest = parser.add_argument_group("how far, and what else")
    rest.add_argument("--cut", type=float, default=0.9, help="share of them to be gone (0.9)")
    rest.add_argument("--decoding", choices=pipeline_gin.DECODERS, default="greedy")
    rest.add_argument(
        "--time", type=_seconds, default=1800.0, help="a budget: 90s, 30m (default), 2h"
    )
    rest.add_argument("--eval_prompts", metavar="FILE", help="to choose by and to report on")
    rest.add_argument("--format", choices=FORMATS, default="same", help="of the patched model")
    rest.add_argument("--dry_run", action="store_true", help="what it would do, take and change")
    rest.add_argument("--gin_file", action="append", default=[], metavar="FILE", help="settings")
    rest.add_argument("--gin.NAME", metavar="VALUE", help="any setting of pipeline")
    return parser


def gin_arguments(arguments: Sequence[str], description: str | None = None) -> list[str]:
    """The command line as `program.run` takes it: each flag a setting of `patch`.

    Args:
      arguments: Those of the command line.
      description: What --help says before the flags.
    """
    own = [argument for argument in arguments if argument.startswith("--gin.")]
    parser = _parser(description)
    flags = vars(parser.parse_args([each for each in arguments if each not in own]))
    if without := [each for each in own if "=" not in each]:
        parser.error(f"{without[0]}: expected --gin.NAME=VALUE")
    unwanted = {
        field.name: flags[field.name] for field in dataclasses.fields(Unwanted) if flags[field.name]
    }
    values = {
        "model": flags["model"],
        "prompts": flags["prompts"],
        "output": flags["output"],
        "cut": flags["cut"],
        "decoding": flags["decoding"],
        "seconds": flags["time"],
        "eval_prompts": flags["eval_prompts"],
        "output_format": flags["format"],
        "dry_run": flags["dry_run"],
        "gin_files": flags["gin_file"],
        "settings": [each.removeprefix("--gin.") for each in own],
    }
    settings = [f"--gin.patch.patch.{name}={value!r}" for name, value in values.items()]
    settings += [f"--gin.patch.Unwanted.{name}={value!r}" for name, value in unwanted.items()]
    return [*settings, "--gin.patch.patch.unwanted=@patch.Unwanted()"]
