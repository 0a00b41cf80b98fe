r"""Compares a patched model with its original: what is gone, and what else changed.

Takes the annotated outputs of both models for the same prompts. Given both checkpoints, it also
computes the certificate on the original's outputs. At every position that is the removed
probability that is left (residual), what else moved (collateral), and the smallest cost that any
update would have had. All are in nats.

Example:
    python -m tnt_jax.evaluate --gin_file=models/t5_1_1_base.gin --gin_file=runs/evaluate.gin \
      --gin.ORIGINAL_RECORDS=original.jsonl --gin.CURRENT_RECORDS=patched.jsonl \
      --gin.ORIGINAL_CHECKPOINT_PATH=original/checkpoint_1000 --gin.CHECKPOINT_PATH=patched \
      --gin.VOCABULARY_PATH=spiece.model --gin.OUTPUT=evaluation.json
"""

import dataclasses
import heapq
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import msgspec
import numpy as np

from tnt_jax import objectives
from tnt_jax.checkpoints import digests, opened_model, pretrained
from tnt_jax.data import marks, records, removed_everywhere
from tnt_jax.data.batches import batch_for_eval
from tnt_jax.data.examples import Example, count_graded
from tnt_jax.data.layouts import count_lost
from tnt_jax.evaluation import diagnosis, evaluations, results, text_metrics
from tnt_jax.models import sharding
from tnt_jax.models.network_config import NetworkConfig
from tnt_jax.runtime import console, files, holding, memory, operative_config, program
from tnt_jax.runtime.errors import UsageError
from tnt_jax.tokenizers import tokenization
from tnt_jax.training import load_original, originals, train_step
from tnt_jax.training.original_cache import OriginalStates
from tnt_jax.training.trainer import jit_token_step

# Of each token, in nats: the divergence from what is desired there (from the original itself where
# nothing is removed), its two parts, and the smallest cost that any update had there.
TOKEN_VALUES = ("kl", "residual", "collateral", "smallest_cost")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Certificate:
    """What `evaluate` needs to run both models on the original's outputs.

    Attributes:
      model: The network's settings, the same for both, or that they are the original's.
      original_checkpoint_path: Path of the original.
      checkpoint_path: Path of the patched model.
      task_feature_lengths: Tokens of "inputs" and "targets".
      batch_size: Records computed together.
      mesh_shape: Devices per mesh axis; None puts all on `data`.
      choice_share: The share of the prompts that settings were chosen on, which are left out
        (`results.are_for_choice`).
      states_dir: A local folder for what is the same for every patched model: the original's
        states, and those below the layers that differ. None computes them every time.
    """

    model: NetworkConfig | pretrained.FromCheckpoint
    original_checkpoint_path: str
    checkpoint_path: str
    task_feature_lengths: Mapping[str, int]
    batch_size: int = 32
    mesh_shape: sharding.MeshShape | None = None
    choice_share: float = dataclasses.field(default=0.0, metadata={"omit_default": True})
    states_dir: str | None = dataclasses.field(default=None, compare=False)

    def __post_init__(self):
        if not 0 <= self.choice_share < 1:
            raise UsageError(
                f"Certificate.choice_share: expected 0 to less than 1, found {self.choice_share}."
            )
        if self.states_dir is not None and files.is_remote(self.states_dir):
            raise UsageError(
                "Certificate.states_dir: expected a local folder, because states are read row by "
                f"row, found {self.states_dir}."
            )


def evaluate(
    *,
    output: str,
    original_records: str,
    current_records: str,
    vocabulary: Any,
    mask_records: str | None = None,
    certificate: Certificate | None = None,
    tokens_output: str | None = None,
    num_token_records: int = 200,
    print_table: bool = True,
) -> evaluations.Evaluation:
    """Writes the comparison as JSON, and prints it.

    Args:
      output: The JSON file to write.
      original_records: Annotated outputs of the original.
      current_records: Annotated outputs of the patched model, for the same ids.
      vocabulary: The tokeniser, for counting tokens.
      mask_records: Annotated outputs of the original while what is unwanted is masked (`generate`
        with MASK), for the same ids: what the original says instead, which an update aims at.
        None compares with none.
      certificate: Settings for running the models; None compares texts alone.
      tokens_output: The JSONL file to write the certificate of every token to: of each record its
        `id`, the `pieces` of its targets and, of each piece, the values of `TOKEN_VALUES` in nats
        and whether it `is_negative`. None writes none.
      num_token_records: How many records it gets: those that changed most come first.
      print_table: Whether to print it.

    Returns:
      What was written.

    Raises:
      UsageError: The files do not belong together, a record is not annotated, or another run writes
        this output.
    """
    reads = {
        "ORIGINAL_RECORDS": original_records,
        "CURRENT_RECORDS": current_records,
        "MASK_RECORDS": mask_records,
    }
    operative_config.check_writable(output, "OUTPUT", reads)
    if tokens_output is not None:
        files.check_writable(tokens_output, "TOKENS_OUTPUT", reads)
        if certificate is None:
            raise UsageError(
                "TOKENS_OUTPUT: expected a certificate, which the values of tokens come from, "
                "found CERTIFICATE=None. Leave one of them out."
            )
    tokenization.check_vocabulary(vocabulary)
    with holding.output(output, "OUTPUT"):
        original, current = records.read_pairs(original_records, current_records)
        result: dict[str, Any] = {
            "original": _of_outputs(original, vocabulary),
            "current": _of_outputs(current, vocabulary),
            "comparison": _compare(original, current),
            "annotator": records.annotator_of(original[0], current[0]),
        }
        if mask_records is not None:
            _, masked = records.read_pairs(original_records, mask_records)
            result["mask"] = _of_outputs(masked, vocabulary) | {
                "comparison": _compare(original, masked),
                "to_current": _compare(masked, current),
            }
        result["cut"] = results.cut_of(
            *(result[name]["unwanted_outputs"]["value"] for name in ("original", "current"))
        )
        if certificate is not None:
            num_records = num_token_records if tokens_output else 0
            with memory.explained(
                memory.inference_advice("BATCH_SIZE", "TASK_FEATURE_LENGTHS"),
                BATCH_SIZE=certificate.batch_size,
                TASK_FEATURE_LENGTHS=certificate.task_feature_lengths,
            ):
                result["certificate"], changed = _certificate(
                    original, vocabulary, certificate, num_records
                )
            of_list = _num_removed_everywhere(original_records)
            result["certificate"]["num_removed_everywhere"] = of_list
            holding.check()
            if tokens_output:
                lines = [files.as_json(tokens) + "\n" for tokens in changed]
                files.write_text(tokens_output, "".join(lines))
        text = files.as_json(result, indent=2)
        files.write_text(output, text + "\n")
        operative_config.write(output)
        found = evaluations.parse(json.loads(text))  # without what is not finite
        if print_table:
            columns = ("", "original", "patched")
            console.table(_rows(found), columns=columns, title=f"{output}: {len(original)} outputs")
            if (of := found.certificate) is not None:
                # What is cut was told before the work.
                told = msgspec.structs.replace(of, num_cut_inputs=0, num_cut_targets=0)
                for note in diagnosis.notes(told):
                    console.log(note)
        return found


def _compare(rows: Sequence[records.Record], other: Sequence[records.Record]) -> dict[str, Any]:
    comparison = text_metrics.compare(
        [row.targets for row in rows],
        [row.targets for row in other],
        [row.has_unwanted_text for row in rows],
    )
    return dataclasses.asdict(comparison)


def _of_outputs(rows: Sequence[records.Record], vocabulary: Any) -> dict[str, Any]:
    marked = [_spans_alone(row, vocabulary) for row in rows]
    num_tokens = sum(len(of_row.target_ids) for of_row in marked)
    num_negative = sum(
        len({position for position, _ in of_row.negative_pairs}) for of_row in marked
    )
    return {
        **text_metrics.summary(
            [row.targets for row in rows], [row.has_unwanted_text for row in rows]
        ),
        "unwanted_tokens": dataclasses.asdict(text_metrics.Rate(num_negative, max(num_tokens, 1))),
        "mean_length": num_tokens / len(rows),
    }


def _spans_alone(row: records.Record, vocabulary: Any) -> marks.MarkedTarget:
    """Alternatives are removed where a mark begins, but they are not said: not counted."""
    return marks.mark_tokens(dataclasses.replace(row, negative_token_ids=()), vocabulary)


def _certificate(
    rows: Sequence[records.Record], vocabulary: Any, settings: Certificate, num_records: int
) -> tuple[dict[str, float | None], list[dict[str, Any]]]:
    """The certificate, and that of every token in the `num_records` that changed most."""
    num_rows = len(rows)
    is_chosen_on = results.are_for_choice(rows, settings.choice_share)
    rows = [row for row, left_out in zip(rows, is_chosen_on, strict=True) if not left_out]
    if not rows:
        raise UsageError(
            f"Certificate.choice_share: expected a share that leaves records to compare, found "
            f"{settings.choice_share}, which takes all {num_rows}."
        )
    opened = opened_model.open_model(
        settings.original_checkpoint_path,
        settings.model,
        vocabulary,
        batch_size=settings.batch_size,
        num_tokens=sum(settings.task_feature_lengths.values()),
        mesh_shape=settings.mesh_shape,
    )
    compared, original_params = opened.model, opened.params
    current = pretrained.open_checkpoint(settings.checkpoint_path)
    # Where the last layers alone were trained, those below are computed once for both models.
    kind, current_params = originals.what_differs(
        original_params, current.restore(compared.abstract_computed_params)
    )
    # What is reported does not depend on the objective. It is forward KL, which splits exactly into
    # residual and collateral.
    objective = objectives.TntObjective(negative_term="forward_kl", positive_term="forward_kl")
    examples = marks.examples_from_records(rows, vocabulary, "the original's outputs")
    states: Mapping[str, OriginalStates] = {}
    if settings.states_dir is not None:
        kind = dataclasses.replace(kind, cached_from=compared.config)
        states = load_original.states_of(
            compared,
            original_params,
            [examples],
            features=kind.features(needs_original=True),
            trained_layers=kind.trained_layers,
            digest=digests.of_params(original_params),
            states_folder=settings.states_dir,
            task_feature_lengths=settings.task_feature_lengths,
            batch_size=settings.batch_size,
        )
    step = jit_token_step(compared, objective, kind)
    counts = _counts(examples, settings.task_feature_lengths)
    batches = batch_for_eval(
        examples,
        settings.batch_size,
        settings.task_feature_lengths,
        feature_layout=compared.network.feature_layout,
        num_shared=compared.network.feature_layout.num_shared(
            examples, settings.task_feature_lengths
        ),
    )
    num_batches = -(-len(examples) // settings.batch_size)
    sums: list[dict[str, Any]] = []
    most: list[tuple[float, int, dict[str, np.ndarray]]] = []  # its KL, minus its place, its tokens
    for number, batch in enumerate(
        console.progress(batches, "certificate, in batches", num_batches)
    ):
        first = number * settings.batch_size
        in_batch = examples[first : first + settings.batch_size]
        known = {name: of.of_rows(in_batch, batch[of.like].shape) for name, of in states.items()}
        placed = sharding.put_batch({**batch, **known}, compared.mesh)
        of_batch, values = jax.device_get(step(current_params, original_params, placed))
        sums.append(of_batch)
        is_negative = (batch["decoder_negative_ids"] >= 0).any(axis=-1)
        tokens = {"kl": values.residual + values.collateral, "is_negative": is_negative}
        tokens |= {name: getattr(values, name) for name in TOKEN_VALUES[1:]}
        for row, total in enumerate(tokens["kl"].sum(axis=1)[: len(examples) - first]):
            kept = int(batch["decoder_loss_mask"][row].sum())
            of_row = {name: value[row, :kept] for name, value in tokens.items()}
            most.append((float(total), -(first + row), of_row))
        most = heapq.nlargest(num_records, most, key=lambda entry: entry[:2])
    means = train_step.summarize(train_step.total(sums))
    certificate = {
        # None where there is no such token: nothing was measured.
        "negative_residual": means.get("negative_residual"),
        "negative_collateral": means.get("negative_collateral"),
        "negative_smallest_cost": means.get("negative_smallest_cost"),
        "positive_collateral": means.get("positive_kl"),
        "num_negative": means["num_negative"],
        "num_positive": means["num_positive"],
        **counts,
    }
    changed = [_tokens(rows[-place], of_row, vocabulary) for _, place, of_row in most]
    return certificate, changed


def _counts(examples: Sequence[Example], task_feature_lengths: Mapping[str, int]) -> dict[str, int]:
    """What of the examples the certificate is not of, and how many of their marks are graded."""
    lost = count_lost(examples, task_feature_lengths)
    if lost.num_inputs or lost.num_targets:
        console.log(
            f"{lost.num_inputs} inputs and {lost.num_targets} targets are cut "
            f"(TASK_FEATURE_LENGTHS): the certificate is of what is left, without "
            f"{lost.num_marks} ids to remove that lie beyond."
        )
    return {
        "num_cut_inputs": lost.num_inputs,
        "num_cut_targets": lost.num_targets,
        "num_lost_marks": lost.num_marks,
        "num_graded": count_graded(examples, task_feature_lengths["targets"]),
    }


def _num_removed_everywhere(path: str) -> int:
    """How many ids lie beside records, to remove at every position of all."""
    try:
        return len(removed_everywhere.of_records(path))
    except UsageError:  # those of other records say nothing of these
        return 0


def _tokens(
    record: records.Record, values: Mapping[str, np.ndarray], vocabulary: Any
) -> dict[str, Any]:
    numbers = {name: [float(f"{x:.4g}") for x in values[name]] for name in TOKEN_VALUES}
    is_negative = values["is_negative"].tolist()
    pieces = marks.pieces(record, vocabulary)[: len(is_negative)]
    return {"id": record.id, "pieces": pieces, **numbers, "is_negative": is_negative}


def _rows(found: evaluations.Evaluation) -> list[tuple[str, str, str]]:
    comparison = found.comparison

    def rate(of: evaluations.Outputs, name: str) -> str:
        rate = getattr(of, name)
        return f"{rate.value:.2%} ({rate.numerator} of {rate.denominator})"

    rows = [
        (label, rate(found.original, name), rate(found.current, name))
        for label, name in (
            ("unwanted outputs", "unwanted_outputs"),
            ("unwanted tokens", "unwanted_tokens"),
            ("repeated word", "repeated_word"),
            ("repeated phrase", "repeated_phrase"),
            ("unknown token", "unknown_token"),
            ("distinct outputs", "distinct_outputs"),
            ("distinct trigrams", "distinct_trigrams"),
        )
    ]
    rows += [
        ("cut of unwanted outputs", "", f"{found.cut:.1%}"),
        ("BLEU to the original", "", f"{comparison.bleu:.1f}"),
        ("ROUGE-L to the original", "", f"{comparison.rouge_l:.1f}"),
        ("unchanged outputs", "", f"{comparison.exact_match.value:.1%}"),
    ]
    if (clean := comparison.unchanged_clean) is not None:
        rows.append(("unchanged among clean ones", "", f"{clean.value:.1%}"))
    if (mask := found.mask) is not None:
        to_mask = mask.to_current
        rows += [
            ("BLEU of the mask to the original", "", f"{mask.comparison.bleu:.1f}"),
            ("BLEU to the mask", "", f"{to_mask.bleu:.1f}"),
            ("the mask's outputs", "", f"{to_mask.exact_match.value:.1%}"),
        ]
    if (parts := found.certificate) is not None:
        rows += [
            (label, "", "-" if nats is None else f"{nats:.4f}")
            for label, nats in (
                ("residual at marks (nats)", parts.negative_residual),
                ("collateral at marks (nats)", parts.negative_collateral),
                ("smallest possible cost there", parts.negative_smallest_cost),
                ("KL to the original elsewhere", parts.positive_collateral),
            )
        ]
    return rows


if __name__ == "__main__":
    program.run("tnt_jax.evaluate", "evaluate")
