r"""Finds the tokens that made outputs bad, given one label for each output.

Reads labelled records, and writes them with marks. A head on the original's decoder states learns
from labelled outputs of the original how likely each prefix is to end well. In bad outputs, the
tokens at which this probability falls are marked. Heads are cross-fitted: no output is scored by a
head that saw it, or another output for the same input, in training.

Every record also gets `values`, one for each prefix of its tokens, beginning with the empty one.
A bad record gets `blame`: the share of the fall that each token caused and, as the last entry, the
share that no token is blamed for. With BLAME_AS_STRENGTH, a mark has its tokens' blame as its
strength. `OUTPUT.values.json` says how good the values are.

With LOOK_AHEAD=k, every record, good or bad, gets strengths for the k likeliest next tokens at each
position (`look_ahead`): a token after which fewer texts end well is lowered, one after which more
do is raised. They are `negative_token_ids`, which make no output bad. Marks that were given stay.
Spans that were found only show where something was found: they have the strength 0.01, unless
BLAME_AS_STRENGTH says otherwise, and the larger strength of a token counts.

The outputs should be samples (TEMPERATURE=1.0 in `generate`): then a value estimates how the
original's continuations end. Without LABEL_FIELD, an output is bad if it has negative_spans; they
are kept as `given_spans` and compared with the marks found.

Example:
    python -m tnt_jax.localize --gin_file=models/from_checkpoint.gin --gin_file=runs/localize.gin \
      --gin.CHECKPOINT_PATH=original --gin.LABEL_FIELD=unwanted --gin.RECORDS=labelled.jsonl \
      --gin.OUTPUT=localized.jsonl
"""

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from tnt_jax import annotators
from tnt_jax.checkpoints import opened_model, pretrained
from tnt_jax.data import records, removed_everywhere
from tnt_jax.localization import continuations, look_ahead, marking, prefix_values, value_heads
from tnt_jax.models import decoding, sharding
from tnt_jax.models.network_config import NetworkConfig
from tnt_jax.runtime import console, files, holding, memory, operative_config, program, seeds
from tnt_jax.runtime.errors import UsageError
from tnt_jax.training import original_cache

_WEAK = 0.6  # area under the curve of whole outputs; marks of such heads are mostly wrong


@dataclasses.dataclass(frozen=True, kw_only=True)
class MonteCarlo:
    """How to check values against sampled continuations of the same prefixes.

    Attributes:
      annotator: Says which continuations are bad: those in which it marks anything.
      num_prefixes: Number of prefixes, each of another record, with a number of tokens drawn
        uniformly.
      num_samples: Number of continuations of each prefix.
      temperature: Temperature of sampling; 1 is the original itself.
    """

    annotator: annotators.Annotator
    num_prefixes: int = 50
    num_samples: int = 32
    temperature: float = 1.0

    def __post_init__(self):
        if self.num_prefixes < 2 or self.num_samples < 2 or self.temperature <= 0:
            raise UsageError(
                "MonteCarlo: expected num_prefixes and num_samples of at least 2 and a temperature "
                f"above 0, found {self.num_prefixes}, {self.num_samples} and {self.temperature}."
            )

    def is_good(self, row: records.Record) -> bool:
        """Whether the annotator marks nothing in an output.

        Raises:
          UsageError: It does not know the output.
        """
        annotation = self.annotator.annotate(row)
        if annotation is None:
            raise UsageError(
                "MonteCarlo.annotator: expected one that can judge any text, found "
                f"{self.annotator.description}, which does not know continuations."
            )
        return not annotation.spans


@dataclasses.dataclass(frozen=True, kw_only=True)
class OriginalModel:
    """Whose outputs are looked at, and how that model is run.

    Attributes:
      checkpoint_path: The original's checkpoint.
      model: The network's settings, or that they are the checkpoint's.
      task_feature_lengths: Tokens of "inputs" and "targets"; no token beyond is marked.
      batch_size: Number of records that the original is run on at a time.
      mesh_shape: Devices per mesh axis; None puts all on `data`.
      states_folder: Folder of its decoder states; None is beside the records, as for training.
    """

    checkpoint_path: str
    model: NetworkConfig | pretrained.FromCheckpoint
    task_feature_lengths: Mapping[str, int]
    batch_size: int = 32
    mesh_shape: sharding.MeshShape | None = None
    states_folder: str | None = None

    def open(self, vocabulary: Any) -> opened_model.OpenedModel:
        """Opens the model, and compares it with the vocabulary."""
        return opened_model.open_model(
            self.checkpoint_path,
            self.model,
            vocabulary,
            batch_size=self.batch_size,
            num_tokens=sum(self.task_feature_lengths.values()),
            mesh_shape=self.mesh_shape,
        )


def localize(
    *,
    output: str,
    input: str,
    original_model: OriginalModel,
    vocabulary: Any,
    label_field: str | None = None,
    training: prefix_values.Training | None = None,
    threshold: prefix_values.Threshold | None = None,
    num_folds: int = 4,
    seed: int = 0,
    check: MonteCarlo | None = None,
    blame_as_strength: bool = False,
    ahead: look_ahead.LookAhead | None = None,
) -> dict[str, Any]:
    """Writes every record of `input` with its marks, in order, and how good the values are.

    Args:
      output: The JSONL file to write; it appears only when it is whole.
      input: A JSONL file (or glob) of records: outputs of the original.
      original_model: The model whose outputs these are.
      vocabulary: The tokeniser of inputs and outputs.
      label_field: The field of a record that is true (or 1) where its output is bad. None takes
        those as bad that have negative spans.
      training: How heads are trained; None is `prefix_values.Training()`.
      threshold: What makes a token negative; None is `prefix_values.Threshold()`.
      num_folds: Parts that the inputs are split in; each is valued by a head of the others.
      seed: Random seed of heads, folds, and the check's prefixes and samples.
      check: Compares values with sampled continuations; None does not.
      blame_as_strength: Whether the strength of a mark is the blame of its tokens together, and
        0.01 where that is less; False marks with 1.
      ahead: How to make strengths of the values of next tokens; None makes none.

    Returns:
      What was written to `<output>.values.json`.

    Raises:
      UsageError: A setting, a record, a label or the checkpoint does not fit; or another run writes
        this output.
    """
    if num_folds < 2:
        raise UsageError(f"NUM_FOLDS: expected at least 2, found {num_folds}.")
    seeds.check(seed)
    operative_config.check_writable(output, "OUTPUT", {"RECORDS": input})
    training = training or prefix_values.Training()
    threshold = threshold or prefix_values.Threshold()
    with holding.output(output, "OUTPUT"):
        folder = original_model.states_folder
        folder = folder or original_cache.default_folder(input, f"{output}.states")
        original_cache.check_folder(folder)
        rows = records.read_records(input)
        is_bad = _labels(rows, label_field)
        if check is not None:  # its continuations come last, after hours it may be
            unknown = f"{rows[0].targets} and nothing more"
            check.is_good(records.Record(id="", inputs=rows[0].inputs, targets=unknown))
        folds = _folds(rows, is_bad, num_folds, seed)
        with memory.explained(
            memory.inference_advice("BATCH_SIZE", "TASK_FEATURE_LENGTHS"),
            BATCH_SIZE=original_model.batch_size,
            TASK_FEATURE_LENGTHS=original_model.task_feature_lengths,
        ):
            opened = original_model.open(vocabulary)
            outputs = value_heads.OriginalOutputs(
                rows,
                opened,
                task_feature_lengths=original_model.task_feature_lengths,
                batch_size=original_model.batch_size,
                states_folder=folder,
                is_ended=ahead is not None,
            )
            heads = value_heads.fit_heads(outputs, ~is_bad, folds, training, seed)
            all_values = value_heads.values_of(outputs, heads)
        values = all_values if ahead is None else [of_row[:-1] for of_row in all_values]
        found = [
            threshold.negative(v) if bad else np.zeros(len(v) - 1, bool)
            for v, bad in zip(values, is_bad, strict=True)
        ]
        source = label_field or f"negative_spans of {rows[0].annotator or 'unknown'}"
        name = (
            f"SequenceValues({source}, original={outputs.digest}, {threshold}, {training}, "
            f"num_folds={num_folds}, seed={seed}"
            f"{', blame_as_strength=True' if blame_as_strength else ''}"
            f"{f', {ahead}' if ahead else ''})"
        )
        extras = _extra_fields(rows, is_bad, values, label_field is None)
        marked = [
            dataclasses.replace(
                marking.mark(
                    row,
                    is_negative,
                    vocabulary,
                    prefix_values.blame(v) if blame_as_strength else None,
                    is_sure=ahead is None,
                ),
                annotator=name,
                extra=extra,
            )
            for row, is_negative, v, extra in zip(rows, found, values, extras, strict=True)
        ]
        result = _quality(values, is_bad, found)
        if label_field is None:
            result["agreement"] = marking.agreement(rows, marked, vocabulary)
        holding.check()
        if ahead is None:
            removed_everywhere.write_records(output, marked, None)
        else:
            strengths = look_ahead.Strengths(
                outputs,
                opened.model,
                opened.params,
                vocabulary,
                heads=heads,
                values=all_values,
                settings=ahead,
                batch_size=original_model.batch_size,
                input_length=original_model.task_feature_lengths["inputs"],
            )
            given = rows if label_field is None else None
            _write_ahead(output, input, marked, given, strengths)
            result["look_ahead"] = strengths.numbers()
        if check is not None:
            result["monte_carlo"] = _check(
                check, rows, outputs, values, opened, original_model, seed
            )
        files.write_json(f"{output}.values.json", result)
        operative_config.write(output)
        _print(output, result)
        _warn_of_chance(result)
        return result


def _write_ahead(
    output: str,
    input: str,
    marked: Iterable[records.Record],
    given: Sequence[records.Record] | None,
    strengths: look_ahead.Strengths,
) -> None:
    """Writes records with strengths that look ahead, and the marks that were given: they stay."""
    ids: tuple[int, ...] = ()
    if given is not None:
        ids = removed_everywhere.of_records(input)
        marked = map(_with_marks_of, marked, given)
    everywhere = removed_everywhere.Ids(ids, {}) if ids else None
    removed_everywhere.write_records(output, strengths.add_to(marked), everywhere)


# ------------------------------------------------------------------------------ What is given


def _labels(rows: Sequence[records.Record], field: str | None) -> np.ndarray:
    """Whether each output is bad."""
    labels = []
    for row in rows:
        records.check_output(row)
        if field is None:
            if row.negative_spans is None:
                raise UsageError(
                    f"record {row.id!r} has no negative_spans: expected annotated records, or "
                    "LABEL_FIELD, the field that is true where an output is bad."
                )
            labels.append(row.has_unwanted_text)
            continue
        label = row.extra.get(field)
        if label not in (0, 1):  # True and False are equal to them
            raise UsageError(
                f"record {row.id!r}: LABEL_FIELD={field}: expected true or 1 for a bad output, "
                f"false or 0 for a good one, found {label!r}; its fields: {sorted(row.to_json())}."
            )
        labels.append(bool(label))
    return np.array(labels)


def _folds(
    rows: Sequence[records.Record], is_bad: np.ndarray, num_folds: int, seed: int
) -> np.ndarray:
    """The fold of each record: by its inputs, so that a head never saw the input before."""
    digests = [hashlib.sha256(f"{seed}/{row.prompt}".encode()).digest() for row in rows]
    folds = np.array([int.from_bytes(digest[:8], "big") % num_folds for digest in digests])
    for fold in range(num_folds):
        labels = is_bad[folds != fold]
        if labels.all() or not labels.any():
            raise UsageError(
                f"expected good and bad outputs in every choice of {num_folds - 1} of {num_folds} "
                f"folds, found {int(is_bad.sum())} bad of {len(rows)}, and none, or only bad ones, "
                f"without fold {fold}. More outputs of both kinds, for more inputs, are needed."
            )
    return folds


# --------------------------------------------------------------------------------- The values


def _quality(
    values: Sequence[np.ndarray], is_bad: np.ndarray, found: Sequence[np.ndarray]
) -> dict[str, Any]:
    is_good = ~is_bad
    result: dict[str, Any] = {
        "num_records": len(values),
        "num_bad": int(is_bad.sum()),
        "num_bad_with_marks": sum(bool(marks.any()) for marks in found),
        "num_marked_tokens": sum(int(marks.sum()) for marks in found),
        "brier_of_a_constant": float(is_good.mean() * is_bad.mean()),
    }
    for where, index in (("start", 0), ("end", -1)):
        scores = np.array([of_row[index] for of_row in values], np.float64)
        result[f"brier_at_{where}"] = float(np.mean((scores - is_good) ** 2))
        result[f"auc_at_{where}"] = prefix_values.area_under_curve(scores, is_good)
    return result


def _check(
    check: MonteCarlo,
    rows: Sequence[records.Record],
    outputs: value_heads.OriginalOutputs,
    values: Sequence[np.ndarray],
    opened: opened_model.OpenedModel,
    original_model: OriginalModel,
    seed: int,
) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    chosen = rng.permutation(len(rows))[: check.num_prefixes]
    lengths = [int(rng.integers(len(values[index]))) for index in chosen]
    prefixes = [
        continuations.Prefix(rows[index], tuple(outputs.tokens[index][:length].tolist()))
        for index, length in zip(chosen, lengths, strict=True)
    ]
    sampled = continuations.sample(
        prefixes,
        opened.model,
        opened.params,
        opened.vocabulary,
        decoding.within_vocabulary(
            decoding.Decoding(
                max_length=original_model.task_feature_lengths["targets"],
                temperature=check.temperature,
            ),
            opened.vocabulary,
            opened.model.config,
        ),
        num_samples=check.num_samples,
        input_length=original_model.task_feature_lengths["inputs"],
        batch_size=original_model.batch_size,
        seed=seed,
    )

    shares = continuations.shares_of_good(sampled, check.is_good)
    of_head = np.array([values[i][length] for i, length in zip(chosen, lengths, strict=True)])
    compared = prefix_values.compare_estimates(of_head, shares, check.num_samples)
    return {
        **compared._asdict(),
        "prefixes": [
            {
                "id": rows[i].id,
                "num_tokens": n,
                "value": prefix_values.short(value),
                "share": float(share),
            }
            for i, n, value, share in zip(chosen, lengths, of_head, shares, strict=True)
        ],
    }


# ---------------------------------------------------------------------------------- The marks


def _with_marks_of(row: records.Record, given: records.Record) -> records.Record:
    """The record with what was given to remove, in place of what was found."""
    extra = {name: value for name, value in row.extra.items() if name != "given_spans"}
    return dataclasses.replace(given, annotator=row.annotator, extra=extra)


def _extra_fields(
    rows: Sequence[records.Record],
    is_bad: np.ndarray,
    values: Sequence[np.ndarray],
    keep_spans: bool,
) -> Iterator[dict[str, Any]]:
    """What each record gets beside its marks."""
    for row, bad, of_row in zip(rows, is_bad, values, strict=True):
        extra = {**row.extra, "values": [prefix_values.short(value) for value in of_row]}
        if bad:
            extra["blame"] = [prefix_values.short(share) for share in prefix_values.blame(of_row)]
        if keep_spans:
            extra["given_spans"] = [list(span) for span in row.negative_spans or ()]
        yield extra


def _print(output: str, result: Mapping[str, Any]) -> None:
    numbers = {**result, **result.get("agreement", {}), **result.get("monte_carlo", {})}
    rows = [
        (name.replace("_", " "), str(value) if isinstance(value, int) else f"{value:.3f}")
        for name, value in numbers.items()
        if isinstance(value, int | float)
    ]
    console.table(rows, columns=(output, ""))


def _warn_of_chance(result: Mapping[str, Any]) -> None:
    """Says so where the heads do not tell bad outputs from good ones: they find nothing then."""
    bad, good = result["num_bad"], result["num_records"] - result["num_bad"]
    deviation = ((bad + good + 1) / (12 * bad * good)) ** 0.5  # Mann and Whitney's, of chance alone
    if result["auc_at_end"] >= max(_WEAK, 0.5 + 2 * deviation):
        return
    console.log(
        f"auc_at_end is {result['auc_at_end']:.2f}: the heads tell bad outputs from good ones "
        f"little better than chance (0.5 ± {deviation:.2f}), so their marks mean little. Give more "
        f"labelled outputs, of both kinds (there are {bad} bad and {good} good ones), more "
        "NUM_UPDATES, or labels that depend on what the output says."
    )


if __name__ == "__main__":
    program.run("tnt_jax.localize", "localize")
