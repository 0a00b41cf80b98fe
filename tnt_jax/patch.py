r"""Patches a model: it stops saying what is unwanted, and changes as little else as possible.

The model answers your prompts; what is unwanted in its answers is marked; it is trained until the
wish (--cut) is fulfilled on prompts that it did not learn from. Lengths, batches, what is trained,
the learning rate and the weight are chosen from your prompts and this machine, and printed with
their reasons. The same command goes on after a stop. docs/patch.md has every rule.

Example:
    python -m tnt_jax.patch --model=google/flan-t5-small --prompts=prompts.jsonl \
      --words=words.txt --output=patched
"""

import os
import pathlib
import sys
from collections.abc import Sequence
from typing import NoReturn

from tnt_jax.patching import choices, patch_run, prompt_files
from tnt_jax.patching.asked import (
    INPUTS,
    LOG,
    Asked,
    check_folder,
    gin_arguments,
)
from tnt_jax.patching.unwanted import Unwanted
from tnt_jax.runtime import console, files, holding, program
from tnt_jax.runtime.errors import UsageError


def patch(
    *,
    model: str,
    prompts: str | None,
    output: str,
    unwanted: Unwanted,
    cut: float = 0.9,
    decoding: str = "greedy",
    seconds: float = 1800.0,
    eval_prompts: str | None = None,
    output_format: str = "same",
    dry_run: bool = False,
    gin_files: Sequence[str] = (),
    settings: Sequence[str] = (),
) -> patch_run.Patched | None:
    """Patches a model until the wish is fulfilled, or as far as it goes.

    Called from Python, it replaces what gin has been told.

    Args:
      model: A directory, a GGUF file, a name on the Hugging Face hub or a T5X checkpoint. It is
        never written to.
      prompts: A file as `prompt_files.read` takes it; None with `Unwanted.records`.
      output: The folder for everything.
      unwanted: What the model must not say.
      cut: The wish: the share of unwanted outputs that shall be gone.
      decoding: "greedy", "sampled" or "both".
      seconds: That all may take from now on, as far as can be foreseen; the first look and the
        report are always made.
      eval_prompts: Prompts to choose by and to report on; None keeps back some of `prompts`.
      output_format: "same" as the model came in, "huggingface", "peft", "t5x" or "orbax".
      dry_run: Says what would be done, how long it would take and how much memory, and stops.
      gin_files: Further settings, which win over what is chosen.
      settings: Further ones, "NAME=VALUE", which win over those.

    Returns:
      What came of it; None of a dry run.

    Raises:
      UsageError: A flag, a file or the model does not fit; `output` holds another patch; the model
        says nothing unwanted, or too rarely.
    """
    if files.is_remote(output):
        raise UsageError(f"--output: expected a local folder, found {output}.")
    asked = Asked(
        model=os.path.expanduser(model),  # noqa: PTH111 - a name of the hub stays one
        prompts=prompts,
        root=pathlib.Path(output).expanduser().absolute(),
        unwanted=unwanted,
        cut=cut,
        decoding=decoding,
        seconds=seconds,
        eval_prompts=eval_prompts,
        output_format=output_format,
        gin_files=gin_files,
        settings=settings,
    )
    texts = prompt_files.Texts.read(asked.prompts, asked.eval_prompts, unwanted)
    asked.check(texts, patch_run.configure)
    inputs = asked.describe(texts)
    inputs = check_folder(asked.root, inputs)
    with holding.folder(asked.root, "--output"), console.logging_to(asked.root / LOG):
        files.write_json(asked.root / INPUTS, inputs)
        return patch_run.PatchRun(asked, texts, choices.Machine(**inputs["machine"])).run(dry_run)


def main() -> NoReturn:
    """The console script `tnt-patch`."""
    if "" not in sys.path:
        sys.path.insert(0, "")  # as of `python -m`, for --function
    _main(sys.argv[1:])


def _main(arguments: Sequence[str]) -> NoReturn:
    program.run("tnt_jax.patch", "patch", gin_arguments(arguments, __doc__))


if __name__ == "__main__":
    _main(sys.argv[1:])
