"""Records as TFRecord files of `tf.train.Example`: the same fields as in JSONL."""

import itertools
import math
import os
from collections.abc import Iterable
from typing import Any

import tensorflow as tf
from google.protobuf.message import DecodeError

from tnt_jax.data import records
from tnt_jax.runtime import files
from tnt_jax.runtime.errors import UsageError


def write(path: str | os.PathLike, rows: Iterable[records.Record]) -> None:
    """Writes records, one feature per field.

    `negative_spans` are flattened to start, end, start, end, ... and `negative_token_ids` to
    position, id, position, id, ...; fields that are not ours go into `extra`, as JSON. An absent
    feature is an absent field: `negative_spans` without values says "nothing unwanted".
    """

    def of_text(text):
        return tf.train.Feature(bytes_list=tf.train.BytesList(value=[text.encode()]))

    def of_ints(values):
        return tf.train.Feature(int64_list=tf.train.Int64List(value=values))

    with files.replacing(path) as unfinished, tf.io.TFRecordWriter(os.fspath(unfinished)) as file:
        for record in rows:
            features = {
                name: of_text(getattr(record, name))
                for name in ("id", "inputs", "targets", "annotator")
            }
            if record.target_ids is not None:
                features["target_ids"] = of_ints(record.target_ids)
            if record.negative_spans is not None:
                features["negative_spans"] = of_ints(itertools.chain(*record.negative_spans))
            if record.negative_token_ids:
                features["negative_token_ids"] = of_ints(itertools.chain(*pairs(record)))
            if record.extra:
                features["extra"] = of_text(record.as_text(record.extra))
            example = tf.train.Example(features=tf.train.Features(feature=features))
            file.write(example.SerializeToString())


def read(path: str | os.PathLike) -> list[records.Record]:
    """Reads what `write` wrote: a file, or the files that a glob pattern names.

    Raises:
        UsageError: no file or no record, a damaged file, a field of the wrong type or out of range
            (named as `file:record`), or an id used twice.
    """

    def located():
        for file in files.matching_files(path):
            _check_lengths(file)
            try:
                for number, row in enumerate(tf.data.TFRecordDataset(str(file)), start=1):
                    where = f"{file}:{number}"
                    example = tf.train.Example.FromString(row.numpy())
                    yield where, records.Record.from_json(_json_fields(example, where), where)
            except (tf.errors.DataLossError, DecodeError) as error:
                raise UsageError(_damaged(file, str(error))) from error

    return records.data_set(located(), path)


def pairs(record: records.Record) -> list[tuple[int, int]]:
    """`negative_token_ids` as rows (position, id)."""
    return [(position, i) for position, ids in record.negative_token_ids for i in ids]


def _damaged(file: Any, reason: str) -> str:
    return f"{file}: damaged, or no TFRecord file of tf.train.Example: {reason}"


def _check_lengths(file: Any) -> None:
    """Raises a UsageError unless every record ends within the file.

    TensorFlow makes room for as many bytes as a record says it has before it looks for them; of a
    number that is large enough the process dies.
    """
    size, end = files.size_of(file), 0
    with file.open("rb") as content:
        while end < size:
            content.seek(end)
            header = content.read(12)  # the length, and its checksum
            start, end = end, end + 16 + int.from_bytes(header[:8], "little")
            if end > size:
                raise UsageError(
                    _damaged(file, f"the record at byte {start} ends at {end}, the file at {size}.")
                )


def _json_fields(example: tf.train.Example, where: str) -> dict[str, Any]:
    """What the JSON object of the same record would hold."""
    fields: dict[str, Any] = {}
    for name, feature in example.features.feature.items():
        kind = feature.WhichOneof("kind")
        values = list(getattr(feature, kind).value) if kind else []
        if kind == "bytes_list":
            try:
                texts = [value.decode() for value in values]
            except UnicodeDecodeError as error:
                raise UsageError(f"{where}: {name}: not UTF-8 ({error.reason}).") from None
            fields[name] = texts[0] if len(texts) == 1 else texts
        elif name in ("negative_spans", "negative_token_ids") and kind != "float_list":
            if len(values) % 2:
                raise UsageError(f"{where}: {name}: expected pairs, found {len(values)} values.")
            fields[name] = [list(pair) for pair in zip(values[::2], values[1::2], strict=True)]
            if name == "negative_token_ids":
                by_position = itertools.groupby(fields[name], key=lambda pair: pair[0])
                fields[name] = [[position, [i for _, i in of]] for position, of in by_position]
        else:
            if kind == "float_list" and not all(map(math.isfinite, values)):
                raise UsageError(
                    f"{where}: {name}: expected finite numbers, found {values!r:.60}. Leave the "
                    "feature out."
                )
            fields[name] = values
    if "extra" not in fields:
        return fields
    extra = fields.pop("extra")
    where = f"{where}: extra"
    found = files.parse_line(extra.encode(), where) if isinstance(extra, str) else None
    if not isinstance(found, dict):
        raise UsageError(f"{where}: expected a JSON object, as text, found {str(extra)[:60]!r}.")
    return {**found, **fields}
