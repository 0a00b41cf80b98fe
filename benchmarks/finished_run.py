"""What benchmarks make of a finished quickstart or sweep: its original, prompts and gazetteer.

run = finished_run.FinishedRun(pathlib.Path("runs/quickstart"), pathlib.Path("elsewhere"))
run.generate(run.original, run.train_prompts, run.folder / "said.jsonl", SAMPLED)
"""

import dataclasses
import pathlib
from typing import Any

import optax

from tnt_jax import annotate, annotators, generate, objectives, train
from tnt_jax.checkpoints import pretrained
from tnt_jax.data import datasets, records
from tnt_jax.evaluation import results
from tnt_jax.models import decoding
from tnt_jax.training import settings

LENGTHS = {"inputs": 56, "targets": 64}
DECODERS = {  # those of the run
    "greedy": decoding.Decoding(max_length=48),
    "sampled": decoding.Decoding(max_length=48, temperature=1.0),
}
STEPS = 240


@dataclasses.dataclass
class FinishedRun:
    """The run's folder, and one to write to."""

    run: pathlib.Path
    folder: pathlib.Path

    def __post_init__(self):
        self.vocabulary = pretrained.vocabulary(str(self.run / "vocabulary.model"), extra_ids=0)
        self.original = self.run / "original/model"
        self.train_prompts = self.run / "corpus/mine.jsonl"
        self.eval_prompts = self.run / "corpus/eval.jsonl"
        self.gazetteer = self.run / "corpus/gazetteer.json"

    def generate(
        self,
        model: pathlib.Path,
        prompts: pathlib.Path,
        output: pathlib.Path,
        decoder: decoding.Decoding,
        annotator: Any,
        seed: int = 0,
    ) -> None:
        """Writes the model's outputs, marked by the annotator, unless they are there."""
        if output.exists():
            return
        unmarked = self.folder / f"unmarked.{output.name}"
        generate.generate(
            output=str(unmarked),
            prompts=str(prompts),
            checkpoint_path=str(model),
            model=pretrained.FromCheckpoint(),
            vocabulary=self.vocabulary,
            decoder=decoder,
            task_feature_lengths=LENGTHS,
            batch_size=256,
            seed=seed,
        )
        self.annotate(unmarked, output, annotator)

    def annotate(self, unmarked: pathlib.Path, output: pathlib.Path, annotator: Any) -> None:
        """Writes the records with the annotator's marks."""
        alternatives = self.vocabulary if annotator.alternatives else None
        annotate.annotate(
            output=str(output), input=str(unmarked), annotator=annotator, vocabulary=alternatives
        )

    def train(self, name: str, marks: pathlib.Path, start: pathlib.Path | None = None):
        """Trains TNRF on the marks; returns the model's folder."""
        model = self.folder / name
        train.train(
            model_dir=str(model),
            model=pretrained.FromCheckpoint(),
            objective=objectives.TntObjective(
                negative_term="reverse_kl", positive_term="forward_kl", negative_weight=2.0
            ),
            dataset=datasets.RecordFiles(
                files=str(marks), vocabulary=self.vocabulary, clean_per_marked=3
            ),
            original_choice=settings.OriginalChoice(path=str(self.original)),
            update=settings.Update(
                batch_size=32,
                task_feature_lengths=LENGTHS,
                optimizer=optax.adam(optax.cosine_decay_schedule(3e-4, STEPS)),
            ),
            schedule=settings.Schedule(
                train_steps=STEPS, start_path=None if start is None else str(start)
            ),
        )
        return model

    def measure(self, model: pathlib.Path, decoder: str, annotator: Any) -> results.Row:
        """How much of the unwanted a model cut, and what it kept, on the prompts for evaluation."""
        settings = DECODERS[decoder]
        output = self.folder / f"{model.name}.{decoder}.jsonl"
        self.generate(model, self.eval_prompts, output, settings, annotator)
        before = self.run / f"original/{decoder}.annotated.jsonl"
        return results.measure(*records.read_pairs(str(before), str(output)))


def gazetteer(path: pathlib.Path, *, alternatives: bool = False) -> annotators.Gazetteer:
    """The annotator of a file of values: the run's own, or a part of it."""
    return annotators.Gazetteer(path=str(path), alternatives=alternatives)
