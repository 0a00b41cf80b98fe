r"""Tokenises and marks records beforehand, for every run that trains on them.

`train` does that itself, where nobody has: this needs no accelerator and no model. The same command
on several hosts that share a folder makes a part on each. A command that was stopped goes on from
the parts that are whole. Examples of one local file of 16 MiB or more lie beside it, where runs
look for them; otherwise set EXAMPLES_DIR to a local folder, here and in the runs.

Example:
    python -m tnt_jax.prepare --gin_file=runs/prepare.gin --gin.RECORDS=annotated.jsonl \
      --gin.VOCABULARY_PATH=spiece.model \
      --gin.TASK_FEATURE_LENGTHS='{"inputs": 512, "targets": 128}'
"""

from collections.abc import Mapping

from tnt_jax.data import datasets
from tnt_jax.runtime import program
from tnt_jax.runtime.errors import UsageError


def prepare(*, dataset: datasets.RecordFiles, task_feature_lengths: Mapping[str, int]) -> int:
    """Makes the examples of records, unless they are there, and says where they lie.

    Args:
        dataset: the records; examples of one large local file lie beside it, all others in its
            `examples_dir`.
        task_feature_lengths: "inputs" and "targets" of the runs, in tokens.

    Returns:
        The number of examples.

    Raises:
        UsageError: a record has a mistake, the folder cannot be written, or no run would look
            there.
    """
    if not dataset.can_be_kept:
        raise UsageError(
            "VOCABULARY: expected a tokeniser of this project, whose examples can be kept, found "
            f"{type(dataset.vocabulary).__name__}. Start the runs without `prepare`: they make "
            "examples in memory."
        )
    folders = dataset.folders()
    if not folders:
        raise UsageError(
            "EXAMPLES_DIR: expected a local folder, unless RECORDS is one local file of 16 MiB or "
            f"more, beside which runs look; RECORDS is {dataset.files}, and EXAMPLES_DIR was found "
            "None. Set EXAMPLES_DIR to a local folder, here and in the runs."
        )
    examples = dataset.make(task_feature_lengths, folders)
    if examples is None:
        raise UsageError(
            f"EXAMPLES_DIR: expected a local folder that can be written, found {folders[0]}. Set "
            "it to one, here and in the runs."
        )
    datasets.log_lost(examples, task_feature_lengths, dataset.files)
    return len(examples)


if __name__ == "__main__":
    program.run("tnt_jax.prepare", "prepare")
