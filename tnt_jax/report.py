r"""Writes one HTML file that shows what an update did: numbers, trade-offs, every changed output.

The file needs no network and no server. The input is the folder of a pipeline, the files that the
other programs wrote, the results of a sweep, or several of these.

Example:
    python -m tnt_jax.report --gin_file=runs/report.gin --gin.PIPELINE_DIR=runs/quickstart \
      --gin.OUTPUT=report.html
"""

import collections
import contextlib
import dataclasses
import hashlib
import math
import pathlib
import random
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from tnt_jax.data import records
from tnt_jax.evaluation import arm_files, changes, diagnosis, evaluations, report_page, text_metrics
from tnt_jax.evaluation.results import (
    Row,
    cut_of,
    from_evaluation,
    from_results,
    training_of,
)
from tnt_jax.runtime import console, files, operative_config, program
from tnt_jax.runtime.errors import UsageError

_DRAWN = 5  # one in so many outputs of a page that cannot show all is drawn


def report(
    *,
    output: str,
    pipeline_dir: str | None = None,
    original_records: str | None = None,
    current_records: str | None = None,
    evaluation: str | None = None,
    tokens: str | None = None,
    results: str | None = None,
    title: str = "Before and after the update",
    num_records: int = 5000,
) -> None:
    """Writes the page.

    Args:
      output: The HTML file to write.
      pipeline_dir: OUTPUT_DIR of `tnt_jax.pipeline`: every arm and decoder in it is shown.
      original_records: Annotated outputs of the original.
      current_records: Annotated outputs of the patched model, for the same ids.
      evaluation: What `tnt_jax.evaluate` wrote about these two. None counts what texts alone tell.
      tokens: What it wrote as TOKENS_OUTPUT.
      results: A sweep's JSON file, `{"rows": [...]}`; `evaluation.results.Shown` has the fields.
      title: The page's title.
      num_records: The most outputs to show of each arm and decoder: the worst changes, and a fifth
        drawn from the others. If there are more, OUTPUT.outputs.jsonl has all of them.

    Raises:
      UsageError: There is nothing to show, NUM_RECORDS is below 0, or files are missing, malformed
        or of different runs.
    """
    if num_records < 0:
        raise UsageError(f"NUM_RECORDS: expected the most outputs to show, found {num_records}.")
    reads = {
        "ORIGINAL_RECORDS": original_records,
        "CURRENT_RECORDS": current_records,
        "EVALUATION": evaluation,
        "TOKENS": tokens,
        "RESULTS": results,
    }
    operative_config.check_writable(output, "OUTPUT", reads)
    _check_settings(pipeline_dir, original_records, current_records, evaluation, tokens, results)
    sources = _Files()
    rows: list[Row] = []
    comparisons: list[report_page.Comparison] = []
    with _Shown(f"{output}.outputs.jsonl", num_records) as shown:
        if pipeline_dir is not None:
            of_pipeline = _of_pipeline(sources, pathlib.Path(pipeline_dir), shown)
            rows += [row for row, _ in of_pipeline]
            comparisons += [comparison for _, comparison in of_pipeline]
        if original_records is not None and current_records is not None:
            row, comparison = _compare(
                sources,
                original_records,
                current_records,
                evaluation=None if evaluation is None else sources.read_json(evaluation),
                tokens=tokens,
                row={"objective": "patched", "decoder": "outputs", "task": "records"},
                shown=shown,
            )
            rows.append(row)
            comparisons.append(comparison)
    if results is not None:
        rows += from_results(sources.read_json(results), results)
    page = report_page.write(
        title=title,
        rows=rows,
        comparisons=comparisons,
        files=sources.described,
        settings=sources.settings,
    )
    files.write_text(output, page)
    operative_config.write(output)
    num_shown = sum(len(comparison.outputs) for comparison in comparisons)
    link = output if files.is_remote(output) else pathlib.Path(output).resolve().as_uri()
    console.log(
        f"{output}: {len(rows)} results and {num_shown} outputs. Open it in a browser ({link})."
    )


def _check_settings(
    pipeline_dir: str | None,
    original_records: str | None,
    current_records: str | None,
    evaluation: str | None,
    tokens: str | None,
    results: str | None,
) -> None:
    if (original_records is None) != (current_records is None):
        raise UsageError(
            "report: expected ORIGINAL_RECORDS and CURRENT_RECORDS together, found "
            f"{'only the second' if original_records is None else 'only the first'}."
        )
    if original_records is None:
        for name, value in (("EVALUATION", evaluation), ("TOKENS", tokens)):
            if value is not None:
                raise UsageError(
                    f"{name}: expected ORIGINAL_RECORDS and CURRENT_RECORDS, which it is about, "
                    "beside it; found neither."
                )
    if pipeline_dir is None and original_records is None and results is None:
        raise UsageError(
            "report: expected something to show, found nothing. Set PIPELINE_DIR (the OUTPUT_DIR "
            "of a pipeline), ORIGINAL_RECORDS and CURRENT_RECORDS, or RESULTS."
        )


# ---------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------


class _Files:
    """Reads files, and notes what each of them was and which settings made it.

    Attributes:
      described: (path, bytes, SHA-256) of each file that was read.
      settings: (path, text) of the settings that lie beside them.
    """

    def __init__(self):
        self.described: dict[str, tuple[int, str]] = {}
        self.settings: dict[str, str] = {}

    def note(self, path: str | pathlib.Path) -> None:
        for file in files.matching_files(path):
            content = file.read_bytes()
            self.described[str(file)] = len(content), hashlib.sha256(content).hexdigest()
            self.note_settings(file.with_name(f"{file.name}.gin"))

    def note_settings(self, path: pathlib.Path) -> None:
        if path.is_file():
            # An object store's path decodes strictly, so bytes are read.
            self.settings[str(path)] = path.read_bytes().decode("utf-8", "replace")

    def read_json(self, path: str | pathlib.Path) -> Any:
        value = files.read(path)
        self.note(path)
        return value

    def read_tokens(self, path: str, ids: Iterable[str]) -> list[dict[str, Any]]:
        """The lines of TOKENS_OUTPUT, for outputs with these ids."""
        known, found = set(ids), []
        for file in files.matching_files(path):
            # A text may hold other line separators, at which `splitlines` would cut it.
            lines = enumerate(file.read_bytes().split(b"\n"), start=1)
            found += [_tokens(line, f"{file}:{i}", known) for i, line in lines if line.strip()]
        self.note(path)
        return found


def _tokens(line: bytes, where: str, known: Collection[str]) -> dict[str, Any]:
    parsed = files.parse_line(line, where)
    row = parsed if isinstance(parsed, dict) else {}
    name = row.get("id")
    lengths = {_length_of(row.get(field), field) for field in report_page.TOKEN_FIELDS}
    if len(lengths) != 1 or None in lengths or not isinstance(name, str):
        raise UsageError(
            f"{where}: expected an object that evaluate wrote as TOKENS_OUTPUT, with an id and, of "
            f"one length, {', '.join(report_page.TOKEN_FIELDS)}."
        )
    if name not in known:
        raise UsageError(
            f"{where}: the id {name!r} is in no record. Expected the tokens of the same outputs."
        )
    return row


def _length_of(values: Any, field: str) -> int | None:
    """The length of a list of pieces, or of numbers or nulls; None if `values` is no such list."""
    types = str if field == "pieces" else int | float | None
    is_list = isinstance(values, list) and all(isinstance(value, types) for value in values)
    return len(values) if is_list else None


# ---------------------------------------------------------------------------------------------
# A pipeline, a pair of files
# ---------------------------------------------------------------------------------------------


def _of_pipeline(
    sources: _Files, root: pathlib.Path, shown: "_Shown"
) -> list[tuple[Row, report_page.Comparison]]:
    summary = root / "summary.json"
    if not summary.is_file():
        raise UsageError(
            f"PIPELINE_DIR: expected the OUTPUT_DIR of a pipeline that has finished, found no "
            f"{summary}."
        )
    found = sources.read_json(summary)
    evaluations = found.get("evaluations") if isinstance(found, Mapping) else None
    if not isinstance(evaluations, Mapping) or not all(
        isinstance(by_decoder, Mapping) for by_decoder in evaluations.values()
    ):
        raise UsageError(
            f"{summary}: expected what a pipeline wrote, evaluations by arm and decoder, found "
            f"{str(found)[:60]!r}."
        )
    training = found.get("training", {})
    if not isinstance(training, Mapping) or not all(
        isinstance(of_arm, Mapping) for of_arm in training.values()
    ):
        raise UsageError(
            f"{summary}: training: expected alpha, seed and steps by arm, found {training!r:.60}."
        )
    sources.note_settings(root / "operative_config.gin")
    pairs = []
    for arm, by_decoder in evaluations.items():
        stated = training_of(training.get(arm, {}), f"{summary}: training: {arm}")
        for decoder, evaluation in by_decoder.items():
            of_arm = arm_files.ArmFiles(root, arm)
            tokens = of_arm.tokens(decoder)
            pairs.append(
                _compare(
                    sources,
                    str(arm_files.ArmFiles(root, "original").annotated(decoder)),
                    str(of_arm.annotated(decoder)),
                    evaluation=evaluation,
                    tokens=str(tokens) if tokens.is_file() else None,
                    row={"objective": arm, "decoder": decoder, "task": root.name, **stated},
                    shown=shown,
                )
            )
    for note in sorted((root / "stages").glob("*.json")):
        if note.stem != "report":  # the one that is running
            sources.note_settings(note)
    return pairs


def _compare(
    sources: _Files,
    original_records: str,
    current_records: str,
    *,
    evaluation: Any | None,
    tokens: str | None,
    row: Mapping[str, Any],
    shown: "_Shown",
) -> tuple[Row, report_page.Comparison]:
    original, current = records.read_pairs(original_records, current_records)
    sources.note(original_records)
    sources.note(current_records)
    numbers = evaluations.parse(_numbers(original, current) if evaluation is None else evaluation)
    counted = int(numbers.original.unwanted_outputs.denominator)
    if counted != len(original):
        raise UsageError(
            f"the evaluation is of {counted} outputs, but {original_records} has {len(original)}. "
            "Expected the evaluation of the same files: run python -m tnt_jax.evaluate again."
        )
    found = [
        changes.change(one, other)
        for one, other in console.progress(
            list(zip(original, current, strict=True)),
            f"comparing {row['objective']}, {row['decoder']}",
        )
    ]
    kinds = collections.Counter(change.kind for change in found)
    places, num_drawn = shown.choose(found)
    if len(places) < len(found):
        names = {"task": row["task"], "arm": row["objective"], "decoder": row["decoder"]}
        shown.write_all(names, original, current, found)
    comparison = report_page.Comparison(
        task=row["task"],
        arm=row["objective"],
        decoder=row["decoder"],
        num_outputs=len(original),
        annotator=records.annotator_of(original[0], current[0]),
        kinds={kind: kinds[kind] for kind in changes.KINDS},
        signs=diagnosis.signs(numbers, kinds["newly unwanted"]),
        notes=diagnosis.notes(numbers.certificate),
        outputs=[(original[i].id, original[i].inputs, found[i]) for i in places],
        num_drawn=num_drawn,
        all_outputs=pathlib.Path(shown.path).name,
        tokens=sources.read_tokens(tokens, (r.id for r in original)) if tokens else [],
    )
    return from_evaluation(numbers, row), comparison


class _Shown(contextlib.ExitStack):
    """Which outputs are in the page; all of them are in a file, if they are more.

    Args:
      path: The file's path; it appears when this ends, if `write_all` was called.
      num_records: The most outputs of each comparison in the page.
    """

    def __init__(self, path: str, num_records: int):
        super().__init__()
        self.path, self._num_records, self._file = path, num_records, None

    def choose(self, found: Sequence[changes.Change]) -> tuple[list[int], int]:
        """Places of the outputs in the page, and how many of them, the last ones, were drawn."""
        places = changes.worst_first(found)
        if len(places) <= self._num_records:
            return places, 0
        num_drawn = self._num_records // _DRAWN
        num_worst = self._num_records - num_drawn
        drawn = random.Random(0).sample(range(num_worst, len(places)), num_drawn)
        return [*places[:num_worst], *(places[i] for i in sorted(drawn))], num_drawn

    def write_all(
        self,
        names: Mapping[str, str],
        original: Sequence[records.Record],
        current: Sequence[records.Record],
        found: Sequence[changes.Change],
    ) -> None:
        """Adds the outputs of a comparison to the file, in the order of the records."""
        if self._file is None:
            unfinished = self.enter_context(files.replacing(self.path))
            self._file = self.enter_context(unfinished.open("w", encoding="utf-8"))
        for one, other, change in zip(original, current, found, strict=True):
            line = {
                **names,
                **{"id": one.id, "input": one.inputs, "kind": change.kind},
                **{"share": round(change.share, 4), "signs": change.signs},
                **{"original": one.targets, "current": other.targets},
                **{"original_spans": one.negative_spans, "current_spans": other.negative_spans},
            }
            self._file.write(files.as_json(line) + "\n")


def _numbers(
    original: Sequence[records.Record], current: Sequence[records.Record]
) -> dict[str, Any]:
    """What `tnt_jax.evaluate` writes, as far as it takes no vocabulary; lengths are in words."""
    texts = [[row.targets for row in rows] for rows in (original, current)]
    is_unwanted = [[row.has_unwanted_text for row in rows] for rows in (original, current)]
    before, after = map(text_metrics.summary, texts, is_unwanted)
    for found, outputs in zip((before, after), texts, strict=True):
        found["mean_length"] = math.fsum(len(text.split()) for text in outputs) / len(outputs)
    comparison = text_metrics.compare(texts[0], texts[1], is_unwanted[0])
    return {
        "original": before,
        "current": after,
        "comparison": dataclasses.asdict(comparison),
        "cut": cut_of(before["unwanted_outputs"]["value"], after["unwanted_outputs"]["value"]),
    }


if __name__ == "__main__":
    program.run("tnt_jax.report", "report")
