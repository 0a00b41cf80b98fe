r"""Tokenises and marks records beforehand, for every run that trains on them.

`train` does that itself, where nobody has: this needs no accelerator and no model. The same command
on several hosts that share a folder makes a part on each. A command that was stopped goes on from
the parts that are whole.

Example:
    python -m tnt_jax.prepare --gin_file=runs/prepare.gin --gin.RECORDS=annotated.jsonl \
      --gin.VOCABULARY_PATH=spiece.model \
      --gin.TASK_FEATURE_LENGTHS='{"inputs": 512, "targets": 128}'
"""

import dataclasses
from collections.abc import Mapping

from tnt_jax.data import datasets
from tnt_jax.runtime import program
from tnt_jax.runtime.errors import UsageError


def prepare(*, dataset: datasets.RecordFiles, task_feature_lengths: Mapping[str, int]) -> int:
    """Makes the examples of records, unless they are there, and says where they lie.

    Args:
        dataset: the records; they lie beside its file, or in its `examples_dir`.
        task_feature_lengths: "inputs" and "targets" of the runs, in tokens.

    Returns:
        The number of examples.

    Raises:
        UsageError: a record has a mistake, or the folder cannot be written.
    """
    folder = dataset.examples_dir or f"{dataset.files}.examples"
    folders = dataclasses.replace(dataset, examples_dir=folder).folders()
    examples = dataset.make(task_feature_lengths, folders)
    if examples is None:
        raise UsageError(
            f"EXAMPLES_DIR: expected a local folder that can be written, found {folder}."
        )
    datasets.log_lost(examples, task_feature_lengths, dataset.files)
    return len(examples)


if __name__ == "__main__":
    program.run("tnt_jax.prepare", "prepare")
