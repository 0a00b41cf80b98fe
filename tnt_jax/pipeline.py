"""The whole loop in one command: generate, annotate, train, generate again, evaluate, report.

Each stage is one of the other programs with the settings of the gin file; stages exchange files
under OUTPUT_DIR. A stage that has finished with the same settings and the same input files is kept,
one that was interrupted goes on, one whose settings changed is done again with all that follows.

Example, the quickstart:

    python -m tnt_jax.pipeline --gin_file=experiments/quickstart.gin
"""

import contextlib
import dataclasses
import hashlib
import json
import pathlib
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tnt_jax import (
    __version__,
    convert,
    decoding,
    objectives,
    pretrained,
    program,
    records,
    report,
    run_config,
    run_log,
    tokenization,
)
from tnt_jax.errors import UsageError

_FOLDERS = ("original", "training_outputs", "stages")  # under output_dir, beside those of the arms


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to update the original.

    Attributes:
      name: In tables, and of its folder.
      objective: The loss per token.
    """

    name: str
    objective: objectives.TntObjective


@dataclasses.dataclass(frozen=True, kw_only=True)
class NewOriginal:
    """How to make an original where there is none yet.

    Attributes:
      corpus: Writes the corpus, such as `corpora.venues` with its `output_dir` bound.
      records: The pairs to train on, a JSONL file that `corpus` writes.
      vocabulary_path: The sentencepiece model to train on their text.
      vocab_size: Of that model.
      train: `train.train` with its settings bound.
    """

    corpus: Callable[[], Any]
    records: str
    vocabulary_path: str
    vocab_size: int
    train: Callable[..., Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Expectations:
    """What a run should reach; it is checked and reported either way.

    Attributes:
      arm: The arm that should reach it.
      baseline: The arm that it is compared with.
      num_unwanted: Unwanted outputs of the original, at least, with the first decoder.
      unwanted_rate: The same as a share of its outputs.
      cut: Share of the unwanted outputs that `arm` removes, with the first decoder.
      bleu_margin: BLEU to the original's outputs above the baseline's, for each decoder.
    """

    arm: str
    baseline: str
    num_unwanted: int
    unwanted_rate: float
    cut: float
    bleu_margin: Mapping[str, float]


def pipeline(
    *,
    output_dir: str,
    train_prompts: Any,
    eval_prompts: Any,
    vocabulary: Callable[[], Any],
    annotator: Callable[[], Any],
    arms: Sequence[Arm],
    decoders: Mapping[str, decoding.Decoding],
    train: Callable[..., Any],
    generate: Callable[..., Any],
    annotate: Callable[..., Any],
    evaluate: Callable[..., Any],
    certificate: Callable[..., Any],
    original_checkpoint_path: str | None = None,
    new_original: NewOriginal | None = None,
    clean_per_marked: int | float | None = None,
    expectations: Expectations | None = None,
    num_examples: int = 3,
) -> dict[str, Any]:
    """Runs every stage that is not done, prints the table, writes `summary.json` and `report.html`.

    Args:
      output_dir: Of all files of the run.
      train_prompts: Inputs to generate training outputs from: a file (or glob) of records, or a
        `tasks.SeqioDataset`.
      eval_prompts: Other inputs, for the evaluation.
      vocabulary: Makes the vocabulary; called when its file is there.
      annotator: Makes the annotator; called when its files are there.
      arms: What to compare; each is trained from the original on the same annotated outputs.
      decoders: By name. The first one generates the training outputs, all are evaluated.
      train: `train.train` with its settings bound; so are the next three.
      generate: `generate.generate`.
      annotate: `annotate.annotate`.
      evaluate: `evaluate.evaluate`.
      certificate: `evaluate.Certificate`.
      original_checkpoint_path: The original.
      new_original: How to make one, in place of `original_checkpoint_path`.
      clean_per_marked: As in `tasks.RecordFiles`, for the training outputs.
      expectations: To check at the end.
      num_examples: Changed outputs to print.

    Returns:
      What `summary.json` holds.

    Raises:
      UsageError: Settings contradict each other, or a stage found a mistake.
    """
    if (original_checkpoint_path is None) == (new_original is None):
        raise UsageError(
            "pipeline: expected either original_checkpoint_path or new_original, found "
            f"{'neither' if new_original is None else 'both'}."
        )
    names = [arm.name for arm in arms]
    if not arms or not decoders or len({*names, *_FOLDERS}) != len(names) + len(_FOLDERS):
        raise UsageError(
            "pipeline: expected at least one decoder, and arms whose names differ from each other "
            f"and from {', '.join(_FOLDERS)}; found decoders {list(decoders)} and arms {names}."
        )
    from tnt_jax import tasks  # here, because TensorFlow takes seconds to import

    began = time.monotonic()
    root = pathlib.Path(output_dir)
    records.check_writable(root / "summary.json", "OUTPUT_DIR")
    stages = _Stages(root)
    run_config.write(output_dir)

    # ------------------------------------------------------------------------------- The original
    if new_original is not None:
        _make_original(stages, new_original, vocabulary, root)
        original_checkpoint_path = str(pretrained.find(str(root / "original" / "model")))
    assert original_checkpoint_path is not None
    came_as = pretrained.open_checkpoint(original_checkpoint_path)

    # ------------------------------------------------------------------------- Training outputs
    first_decoder = next(iter(decoders))
    marker, shared_vocabulary = annotator(), vocabulary()

    def outputs_of(name: str, checkpoint: str, prompts: Any, decoder: str) -> str:
        """Generates and annotates; returns the annotated file."""
        is_file = isinstance(prompts, str)
        generated = str(root / name / f"{decoder}.jsonl")
        annotated = str(root / name / f"{decoder}.annotated.jsonl")
        stages.run(
            f"{name}: generate, {decoder}",
            generate,
            output=generated,
            inputs={"checkpoint_path": checkpoint} | ({"prompts": prompts} if is_file else {}),
            settings={"vocabulary": shared_vocabulary, "decoder": decoders[decoder]}
            | ({} if is_file else {"prompts": prompts}),
        )
        stages.run(
            f"{name}: annotate, {decoder}",
            annotate,
            output=annotated,
            inputs={"input": generated},
            settings={"vocabulary": shared_vocabulary, "annotator": marker},
            version=marker.description,  # names the contents of a word list, not only its path
        )
        return annotated

    training_outputs = outputs_of(
        "training_outputs", original_checkpoint_path, train_prompts, first_decoder
    )
    original_outputs = {
        decoder: outputs_of("original", original_checkpoint_path, eval_prompts, decoder)
        for decoder in decoders
    }

    # -------------------------------------------------------------------------------- Every arm
    evaluations: dict[str, dict[str, Any]] = {}
    shown: list[str] = []  # files of the arms that the report reads
    for arm in arms:
        model_dir = str(root / arm.name / "model")
        stages.run(
            f"{arm.name}: train",
            train,
            output=model_dir,
            output_name="model_dir",
            inputs={"initial_checkpoint_path": original_checkpoint_path},
            settings={
                "objective": arm.objective,
                "dataset": tasks.RecordFiles(
                    files=training_outputs,
                    vocabulary=shared_vocabulary,
                    clean_per_marked=clean_per_marked,
                ),
            },
            also_depends_on=[training_outputs],
            goes_on=True,
        )
        checkpoint = str(pretrained.find(model_dir))
        evaluations[arm.name] = {}
        for decoder in decoders:
            current_outputs = outputs_of(arm.name, checkpoint, eval_prompts, decoder)
            evaluation = root / arm.name / f"{decoder}.evaluation.json"
            tokens = str(root / arm.name / f"{decoder}.tokens.jsonl")
            shown += [current_outputs, tokens]
            stages.run(
                f"{arm.name}: evaluate, {decoder}",
                evaluate,
                output=str(evaluation),
                inputs={
                    "original_records": original_outputs[decoder],
                    "current_records": current_outputs,
                },
                settings={
                    "vocabulary": shared_vocabulary,
                    "print_table": False,
                    "tokens_output": tokens,
                    "certificate": certificate(
                        original_checkpoint_path=original_checkpoint_path,
                        checkpoint_path=checkpoint,
                    ),
                },
                also_depends_on=[original_checkpoint_path, checkpoint],
            )
            evaluations[arm.name][decoder] = json.loads(evaluation.read_text("utf-8"))
        if came_as.output_format != "orbax":
            stages.run(
                f"{arm.name}: convert",
                _hand_back,
                output=str(root / arm.name / came_as.output_format),
                inputs={
                    "checkpoint": checkpoint,
                    "evaluation": str(root / arm.name / f"{first_decoder}.evaluation.json"),
                },
                settings={
                    "output_format": came_as.output_format,
                    "scan_layers": came_as.scan_layers,
                },
                goes_on=True,
            )

    # ----------------------------------------------------------------------------------- Summary
    checks = _check(expectations, evaluations) if expectations else []
    summary = {"evaluations": evaluations, "expectations": checks}
    run_log.write_json(str(root / "summary.json"), summary)
    page = root / "report.html"
    stages.run(
        "report",
        report.report,
        output=str(page),
        inputs={},
        settings={"pipeline_dir": str(root)},
        also_depends_on=[str(root / "summary.json"), *original_outputs.values(), *shown],
        version=__version__,
    )
    _print_table(evaluations, decoders)
    best = expectations.arm if expectations else arms[0].name
    _print_examples(
        original_outputs[first_decoder],
        str(root / best / f"{first_decoder}.annotated.jsonl"),
        best,
        num_examples,
    )
    for check in checks:
        run_log.log(f"{'reached' if check['reached'] else 'MISSED '}  {check['text']}")
    run_log.log(
        f"Everything is in {root}: the patched model in {root / best / 'model'}, the numbers in "
        f"{root / 'summary.json'}. {time.monotonic() - began:.0f} seconds."
    )
    run_log.log(f"Open {page.resolve().as_uri()} in a browser: before and after, output by output.")
    return summary


def _make_original(
    stages: "_Stages", new: NewOriginal, vocabulary: Callable[[], Any], root: pathlib.Path
) -> None:
    stages.run(
        "corpus", _write_corpus, output=new.records, inputs={}, settings={"corpus": new.corpus}
    )
    stages.run(
        "vocabulary",
        _train_vocabulary,
        output=new.vocabulary_path,
        inputs={"texts_of": new.records},
        settings={"vocab_size": new.vocab_size},
    )
    from tnt_jax import tasks

    stages.run(
        "original: train",
        new.train,
        output=str(root / "original" / "model"),
        output_name="model_dir",
        inputs={},
        settings={
            "dataset": tasks.RecordFiles(
                files=new.records, vocabulary=vocabulary(), annotated=False
            ),
            "initial_checkpoint_path": None,
            "original": "parameters",  # a model from nothing has none, and no adapters
        },
        also_depends_on=[new.records],
        goes_on=True,
    )


def _write_corpus(*, output: str, corpus: Callable[[], Any]) -> None:
    corpus()
    if not pathlib.Path(output).exists():
        raise UsageError(f"new_original: expected its corpus to write {output}; it did not.")


def _train_vocabulary(*, output: str, texts_of: str, vocab_size: int) -> None:
    rows = records.read_records(texts_of)
    texts = [text for row in rows for text in (row.inputs, row.targets)]
    tokenization.train_sentencepiece(texts, output, vocab_size=vocab_size)


def _hand_back(
    *, output: str, checkpoint: str, evaluation: str, output_format: str, scan_layers: bool
) -> None:
    """Writes a patched model in the format that the original came in."""
    if pathlib.Path(output).exists():  # of a run that was stopped
        shutil.rmtree(output)
    convert.convert(
        input=checkpoint,
        output=output,
        output_format=output_format,
        scan_layers=scan_layers,
        evaluation=evaluation if output_format == "huggingface" else None,
    )


class _Stages:
    """Runs stages, and remembers with what settings and inputs each one was run."""

    def __init__(self, root: pathlib.Path):
        self._notes = root / "stages"
        self._number = 0

    def run(
        self,
        name: str,
        function: Callable[..., Any],
        *,
        output: str,
        inputs: Mapping[str, str],
        settings: Mapping[str, Any],
        output_name: str = "output",
        also_depends_on: Sequence[str] = (),
        version: str = "",
        goes_on: bool = False,
    ) -> None:
        """Calls `function(output_name=output, **inputs, **settings)` unless that has been done.

        Args:
          name: Of the stage.
          function: Writes `output`, a file or a directory.
          output: Its path.
          inputs: Files and directories that it reads, by argument.
          settings: Its other arguments.
          output_name: The argument that takes `output`.
          also_depends_on: Further files whose change makes it run again.
          version: A text whose change makes it run again, for what the settings do not show.
          goes_on: Whether `function` goes on from what it finds in `output`, a directory. So what
            other settings left there is deleted first.

        Raises:
          UsageError: There is something to go on from, and it is not known what made it.
        """
        self._number += 1
        note = self._notes / f"{name.replace(': ', '_').replace(', ', '_')}.json"
        described = {
            "function": run_config.describe(function),
            "settings": run_config.describe(dict(settings)),
            "version": version,
            "inputs": {path: _fingerprint(path) for path in (*inputs.values(), *also_depends_on)},
        }
        before: dict[str, Any] = {}
        with contextlib.suppress(OSError, ValueError):
            before = json.loads(note.read_text("utf-8"))
        is_same = before.get("described") == json.loads(json.dumps(described))
        if is_same and before.get("done") and pathlib.Path(output).exists():
            run_log.log(f"[{self._number}] {name}: done before, kept.")
            return
        if goes_on and not is_same and pathlib.Path(output).exists():
            if not before:
                raise UsageError(
                    f"{name}: expected nothing, or what this pipeline made, in {output}; found "
                    f"files, and no {note}. Set another OUTPUT_DIR, or delete the folder."
                )
            shutil.rmtree(output)
        run_log.log(f"[{self._number}] {name}")
        run_log.write_json(str(note), {"described": described, "done": False})
        began = time.monotonic()
        function(**{output_name: output}, **inputs, **settings)
        seconds = round(time.monotonic() - began, 1)
        run_log.write_json(str(note), {"described": described, "done": True, "seconds": seconds})


def _fingerprint(path: str) -> str:
    """Changes when the file, or a file in the directory, does."""
    found = pathlib.Path(path)
    if found.is_dir():
        files = sorted(file for file in found.rglob("*") if file.is_file())
        stats = [(str(file.relative_to(found)), file.stat().st_size) for file in files]
        newest = max((file.stat().st_mtime_ns for file in files), default=0)
        return hashlib.sha256(repr((stats, newest)).encode()).hexdigest()[:16]
    if found.is_file():
        return hashlib.sha256(found.read_bytes()).hexdigest()[:16]
    return "not a local file"  # a glob pattern, or in a bucket: named by its path alone


def _check(
    expected: Expectations, evaluations: Mapping[str, Mapping[str, Any]]
) -> list[dict[str, Any]]:
    decoder = next(iter(evaluations[expected.arm]))
    first = evaluations[expected.arm][decoder]
    unwanted = first["original"]["unwanted_outputs"]
    checks = [
        (
            f"unwanted {decoder} outputs of the original: {unwanted['numerator']}, expected at "
            f"least {expected.num_unwanted}",
            unwanted["numerator"] >= expected.num_unwanted,
        ),
        (
            f"their share: {unwanted['value']:.1%}, expected at least {expected.unwanted_rate:.0%}",
            unwanted["value"] >= expected.unwanted_rate,
        ),
        (
            f"cut by {expected.arm}, {decoder}: {first['cut']:.1%}, expected at least "
            f"{expected.cut:.0%}",
            first["cut"] >= expected.cut,
        ),
    ]
    for name, margin in expected.bleu_margin.items():
        bleu, baseline = (
            evaluations[arm][name]["comparison"]["bleu"]
            for arm in (expected.arm, expected.baseline)
        )
        checks.append(
            (
                f"BLEU to the original, {name}: {expected.arm} {bleu:.1f}, {expected.baseline} "
                f"{baseline:.1f}; expected at least {margin:g} more",
                bleu - baseline >= margin,
            )
        )
    return [{"text": text, "reached": bool(reached)} for text, reached in checks]


def _print_table(
    evaluations: Mapping[str, Mapping[str, Any]], decoders: Mapping[str, decoding.Decoding]
) -> None:
    for decoder in decoders:
        any_arm = next(iter(evaluations.values()))[decoder]
        before = any_arm["original"]
        columns = ("", "unwanted", "cut", "BLEU", "ROUGE-L", "unchanged", "repeats", "KL elsewhere")
        repeats = _percent(before["repeated_word"])
        rows = [("original", _percent(before["unwanted_outputs"]), "", "", "", "", repeats, "")]
        for arm, of_arm in evaluations.items():
            result = of_arm[decoder]
            comparison, after = result["comparison"], result["current"]
            rows.append(
                (
                    arm,
                    _percent(after["unwanted_outputs"]),
                    f"{result['cut']:.1%}",
                    f"{comparison['bleu']:.1f}",
                    f"{comparison['rouge_l']:.1f}",
                    _percent(comparison["exact_match"]),
                    _percent(after["repeated_word"]),
                    f"{result['certificate']['positive_collateral']:.3f}",
                )
            )
        num_outputs = before["unwanted_outputs"]["denominator"]
        run_log.table(
            rows, columns=columns, title=f"{decoder} outputs on {num_outputs} unseen prompts"
        )


def _print_examples(original_path: str, current_path: str, arm: str, number: int) -> None:
    original = records.read_records(original_path)
    current = {row.id: row for row in records.read_records(current_path)}
    changed = [
        (before, current[before.id])
        for before in original
        if before.negative_spans and not current[before.id].negative_spans
    ]
    for before, after in changed[:number]:
        spans = ", ".join(
            repr(before.targets[slice(*span)]) for span in before.negative_spans or ()
        )
        run_log.log(
            f"\n  input     {before.inputs}\n  original  {before.targets}\n"
            f"  {arm:<8}  {after.targets}\n  unwanted  {spans}"
        )


def _percent(rate: Mapping[str, Any]) -> str:
    return f"{rate['value']:.1%} ({rate['numerator']})"


if __name__ == "__main__":
    program.run("tnt_jax.pipeline", "pipeline")
