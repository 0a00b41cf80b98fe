r"""Writes marked outputs as preference data for TRL's DPO and KTO trainers.

For DPO a line has `prompt`, `rejected` (an output of the original in which something is marked) and
`chosen` (what was said to the same prompt under the mask, or by a patched model, if nothing is
marked in that). For KTO it has `prompt`, `completion` and `label`: false for outputs in which
something is marked, true for all others. A prompt is a text, or messages where the record has them;
then so are the outputs. TRL applies a chat template to messages alone: AS_MESSAGES makes a message
of a text, for a model that was given it through its template.

Example:
    python -m tnt_jax.preferences --gin_file=runs/preferences.gin \
      --gin.ORIGINAL_RECORDS=annotated.jsonl --gin.CHOSEN_RECORDS=masked.annotated.jsonl \
      --gin.OUTPUT=pairs.jsonl
"""

import collections
import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tnt_jax.data import records
from tnt_jax.runtime import console, files, holding, operative_config, program
from tnt_jax.runtime.errors import UsageError

FORMATS = ("dpo", "kto")


def preferences(
    *,
    output: str,
    original_records: str,
    chosen_records: str | None,
    output_format: str = "dpo",
    as_messages: bool = False,
) -> dict[str, int]:
    """Writes the file, and says what was left out.

    Args:
      output: The JSONL file to write.
      original_records: Annotated outputs of the original, a JSONL file (or glob).
      chosen_records: Annotated outputs of the original under the mask, or of a patched model. An
        output belongs to the one of the original's with the same id, whose prompt must be the same.
        None, for KTO, writes the original's outputs alone.
      output_format: "dpo" or "kto".
      as_messages: Writes a prompt that is a text as the message of a user.

    Returns:
      How many lines there are ("written"), and how many outputs were left out, by the reason.

    Raises:
      UsageError: Records are not annotated or do not fit each other, or nothing is left.
    """
    if output_format not in FORMATS:
        raise UsageError(
            f"OUTPUT_FORMAT: expected one of {', '.join(FORMATS)}, found {output_format!r}."
        )
    if chosen_records is None and output_format == "dpo":
        raise UsageError(
            "CHOSEN_RECORDS: expected annotated outputs for the same prompts, which DPO prefers; "
            "found None. Generate with MASK or with a patched model, and annotate; or set "
            "OUTPUT_FORMAT to kto."
        )
    reads = {"ORIGINAL_RECORDS": original_records, "CHOSEN_RECORDS": chosen_records}
    operative_config.check_writable(output, "OUTPUT", reads)
    original = _annotated(original_records)
    others = [] if chosen_records is None else _annotated(chosen_records)
    if as_messages:
        original, others = ([_with_messages(row) for row in rows] for rows in (original, others))
    left_out: collections.Counter[str] = collections.Counter()
    if output_format == "dpo":
        lines = list(_pairs(original, others, left_out))
    else:
        lines = list(_judged([*original, *others], left_out))
    counts = ", ".join(f"{number} {why}" for why, number in left_out.items()) or "none"
    if not lines:
        raise UsageError(
            f"expected at least one line to write, found none. Left out of the {len(original)} "
            f"records in {original_records}: {counts}. Give outputs to more prompts, or others in "
            "which nothing is marked."
        )
    with holding.output(output, "OUTPUT"), files.replacing(output) as unfinished:
        with unfinished.open("w", encoding="utf-8") as file:
            for line in lines:
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
        operative_config.write(output)
    console.log(f"{output}: {len(lines)} lines for {output_format.upper()}. Left out: {counts}.")
    return {"written": len(lines), **left_out}


def _annotated(path: str) -> list[records.Record]:
    rows = records.read_records(path)
    for row in rows:
        records.check_annotated(row, path)
    return rows


def _with_messages(row: records.Record) -> records.Record:
    return dataclasses.replace(row, messages=row.messages or (("user", row.inputs),))


def _pairs(
    original: Sequence[records.Record],
    others: Sequence[records.Record],
    left_out: collections.Counter[str],
) -> Iterator[dict[str, Any]]:
    """DPO's lines; counts in `left_out` what makes none."""
    by_id = {row.id: row for row in others}
    for row in original:
        other = by_id.pop(row.id, None)
        if other is not None and other.prompt != row.prompt:
            raise UsageError(
                f"CHOSEN_RECORDS: record {row.id!r} has another prompt than in ORIGINAL_RECORDS. "
                "Expected outputs for the same prompts, told by their ids."
            )
        if not row.says_unwanted:
            left_out["in which nothing is marked"] += 1
        elif other is None:
            left_out["without an output in CHOSEN_RECORDS"] += 1
        elif other.says_unwanted:
            left_out["whose chosen output is marked, too"] += 1
        elif other.targets == row.targets:
            left_out["whose two outputs are the same"] += 1
        else:
            yield {
                "prompt": _prompt(row),
                "chosen": _reply(row, other.targets),
                "rejected": _reply(row, row.targets),
            }
    if by_id:
        left_out["of CHOSEN_RECORDS without one in ORIGINAL_RECORDS"] += len(by_id)


def _judged(
    rows: Sequence[records.Record], left_out: collections.Counter[str]
) -> Iterator[dict[str, Any]]:
    """KTO's lines, each output of a prompt once; counts repeated ones in `left_out`."""
    seen = set()
    for row in rows:
        if (row.prompt, row.targets) in seen:
            left_out["said before to the same prompt"] += 1
            continue
        seen.add((row.prompt, row.targets))
        yield {
            "prompt": _prompt(row),
            "completion": _reply(row, row.targets),
            "label": not row.says_unwanted,
        }


def _prompt(row: records.Record) -> str | list[Mapping[str, str]]:
    """What the model was given: messages, or a text."""
    return [{"role": r, "content": text} for r, text in row.messages] or row.inputs


def _reply(row: records.Record, text: str) -> str | list[Mapping[str, str]]:
    """An output in the form of the record's prompt: a list of messages, or a text."""
    return [{"role": "assistant", "content": text}] if row.messages else text


if __name__ == "__main__":
    program.run("tnt_jax.preferences", "preferences")
