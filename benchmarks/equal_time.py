r"""What the last layers alone come to in the time of all, and what cached states bring beside them.

    python benchmarks/equal_time.py --task=smollm2 --corpus=runs/demo/corpus --output=equal
    python benchmarks/equal_time.py --task=t5 --corpus=runs/quickstart/corpus --output=equal_t5 \
      --original=runs/quickstart/original/model

SmolLM2 on the demonstration's task (adapters), after `make demo`; the T5 of `make quickstart` on
its task (full parameters, greedy outputs alone), after that. Every variant learns from the same
outputs with TNFF, for as long as the first one takes for its updates: an update of each is timed,
the states that are cached are paid for, and what is left of the time is filled with updates, over
which the learning rate falls. Time is processor time, which another program on the machine hardly
lengthens.

Takes 50 minutes of processor time for SmolLM2, 10 for the T5, and about 4 GB (memory estimated).
"""

import argparse
import dataclasses
import os
import pathlib
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import gin
import report

from tnt_jax import objectives, pipeline
from tnt_jax.experiments.experiment import Changes
from tnt_jax.experiments.experiment_run import ExperimentRun, open_run
from tnt_jax.runtime import holding, program
from tnt_jax.training import settings


@dataclasses.dataclass(frozen=True)
class Task:
    """A pipeline, and what is compared on it.

    Attributes:
      flags: Of the pipeline.
      variants: ORIGINAL and TRAINED_LAYERS; the first one sets the time.
      updates: Of the first one.
      probe: Few updates and more of them: the difference is timed.
      decay: The gin name of the updates over which the learning rate falls.
    """

    flags: tuple[str, ...]
    variants: tuple[tuple[str, int | None], ...]
    updates: int
    probe: tuple[int, int]
    decay: str


TASKS = {
    "smollm2": Task(
        flags=("--gin_file=experiments/demo.gin",),
        variants=(("adapters_off", None), ("adapters_off", 10), ("adapters_cached", 10)),
        updates=80,
        probe=(2, 10),
        decay="optax.warmup_cosine_decay_schedule.decay_steps",
    ),
    "t5": Task(
        flags=(
            *("--gin_file=models/from_checkpoint.gin", "--gin_file=runs/pipeline.gin"),
            *("--gin.ANNOTATOR=@annotators.Gazetteer", "--gin.CLEAN_PER_MARKED=3"),
            *("--gin.TASK_FEATURE_LENGTHS={'inputs': 64, 'targets': 48}", "--gin.MAX_LENGTH=48"),
            *("--gin.OPTIMIZER=@optax.adam", "--gin.GENERATE_BATCH_SIZE=256"),
            "--gin.LEARNING_RATE=@optax.cosine_decay_schedule()",
            *("--gin.optax.cosine_decay_schedule.init_value=3e-4", "--gin.TRAIN_STEPS=240"),
            "--gin.optax.cosine_decay_schedule.decay_steps=240",
        ),
        variants=(("parameters", None), ("cached", None), ("parameters", 2), ("cached", 2)),
        updates=480,
        probe=(20, 120),
        decay="optax.cosine_decay_schedule.decay_steps",
    ),
}
FILES = {
    "smollm2": {"CORPUS_DIR": "", "experiment.Experiment.corpus": None},
    "t5": {
        "TRAIN_PROMPTS": "mine.jsonl",
        "EVAL_PROMPTS": "eval.jsonl",
        "annotators.Gazetteer.path": "gazetteer.json",
    },
}


def opened(task: str, flags: argparse.Namespace, updates: int) -> ExperimentRun:
    """The experiment, with a learning rate that falls over so many updates."""
    values = {
        name: None if file is None else str(flags.corpus / file)
        for name, file in FILES[task].items()
    }
    values |= {"OUTPUT_DIR": str(flags.output), TASKS[task].decay: updates}
    if flags.original is not None:
        values["ORIGINAL_CHECKPOINT_PATH"] = str(flags.original)
    gin.clear_config()
    program.configure(
        "tnt_jax.pipeline",
        "pipeline",
        [*TASKS[task].flags, *(f"--gin.{name}={value!r}" for name, value in values.items())],
    )
    return open_run(program.bound_arguments(pipeline.pipeline, ("experiment",))["experiment"])


def row(task: str, flags: argparse.Namespace, variant: tuple[str, int | None], seconds: float):
    """Times an update of a variant, trains it for so long, and evaluates it.

    Args:
      task: Its name.
      flags: Of the command line.
      variant: ORIGINAL and TRAINED_LAYERS.
      seconds: Of processor time that it has; 0 is that of its task's updates.

    Returns:
      The seconds, and the cells of a row.
    """
    kind, layers = variant
    of_task = TASKS[task]
    name = f"{kind}, {'all layers' if layers is None else f'last {layers}'}"
    objective = objectives.named("TNFF", negative_weight=flags.weight)

    def train(label: str, updates: int, decay: int) -> tuple[str, float, ExperimentRun]:
        experiment = opened(task, flags, decay)
        files = experiment.make_training_outputs()
        choice = settings.OriginalChoice(
            path=experiment.original,
            kind=kind,
            trained_layers=layers,
            states_dir=str(flags.output / "states" / name) if kind.endswith("cached") else None,
        )
        changes = Changes(train={"original_choice": choice}, schedule={"train_steps": updates})
        began = time.process_time()
        checkpoint = experiment.train(f"{name}{label}", objective, files, changes=changes)
        return checkpoint, time.process_time() - began, experiment

    few, many = of_task.probe
    # A probe may end within the warm-up, over which no learning rate falls: it has the task's.
    _, with_states, _ = train(", states", few, of_task.updates)
    _, of_few, _ = train(", few", few, of_task.updates)
    _, of_many, _ = train(", many", many, of_task.updates)
    an_update = (of_many - of_few) / (many - few)
    states = max(with_states - of_few, 0.0) if kind.endswith("cached") else 0.0
    seconds = seconds or of_task.updates * an_update
    updates = round((seconds - states) / an_update)
    checkpoint, _, experiment = train("", updates, updates)
    evaluation = experiment.evaluate(name, checkpoint, experiment.first_decoder)
    certificate = evaluation.certificate
    assert certificate is not None
    return seconds, (
        *(name, an_update, states, updates, f"{evaluation.cut:.1%}"),
        f"{evaluation.comparison.bleu:.1f}",
        f"{certificate.positive_collateral:.4f}",
        f"{certificate.negative_collateral:.3f}",
    )


def main() -> None:
    """Prints one table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", choices=("smollm2", "t5"), required=True)
    parser.add_argument("--corpus", type=pathlib.Path, required=True, help="of that pipeline")
    parser.add_argument("--original", type=pathlib.Path, help="of the T5: the model")
    parser.add_argument("--output", type=pathlib.Path, required=True, help="an empty folder")
    parser.add_argument("--weight", type=float, default=10.0, help="of TNFF's negative term")
    flags = parser.parse_args()
    flags.output.mkdir(parents=True, exist_ok=True)
    if any(flags.output.iterdir()):  # what is done already takes no time
        parser.error(f"--output: expected an empty folder, found files in {flags.output}.")
    seconds, rows = 0.0, []
    with holding.folder(str(flags.output), "OUTPUT_DIR"):
        for variant in TASKS[flags.task].variants:
            seconds, cells = row(flags.task, flags, variant, seconds)
            rows.append(cells)
    report.heading()
    columns = ("processor s an update", "for states", "updates", "cut", "BLEU")
    report.table(("", *columns, "KL elsewhere", "collateral at marks"), rows)


if __name__ == "__main__":
    main()
