r"""Generates outputs for prompts, greedily, by sampling or by beam search: JSONL in, JSONL out.

Every output record keeps the prompt's id and other fields and gains `targets` and the exact
`target_ids`; a reference text in `targets` moves to `reference`. Sampling noise depends on the seed
and the record's id alone, so two models that agree give the same sample.

Example:
    python -m tnt_jax.generate --gin_file=models/t5_1_1_base.gin --gin_file=runs/generate.gin \
      --gin.CHECKPOINT_PATH=original/checkpoint_1000 --gin.VOCABULARY_PATH=spiece.model \
      --gin.PROMPTS=prompts.jsonl --gin.OUTPUT=outputs.jsonl
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from tnt_jax import (
    assembly,
    decoding,
    feature_converters,
    pretrained,
    program,
    records,
    run_config,
    run_log,
    sharding,
    t5,
    tokenization,
)
from tnt_jax.array_types import PyTree
from tnt_jax.errors import UsageError

_WIDTH_MULTIPLE = 16  # so that files of nearly equal lengths share a compiled program


def generate(
    *,
    output: str,
    prompts: Any,
    checkpoint_path: str,
    model: t5.T5Config | pretrained.FromCheckpoint,
    vocabulary: Any,
    decoder: decoding.Decoding,
    task_feature_lengths: Mapping[str, int],
    batch_size: int,
    mesh_shape: sharding.MeshShape | None = None,
    seed: int = 0,
) -> None:
    """Writes one record for every prompt, in order.

    Args:
      output: The JSONL file to write; it appears only when it is whole.
      prompts: A file (or glob) of records, or a `tasks.SeqioDataset`.
      checkpoint_path: A checkpoint, or a model directory for its newest.
      model: The network's settings, or that they are the checkpoint's.
      vocabulary: A seqio vocabulary, of inputs and outputs.
      decoder: How to choose the tokens.
      task_feature_lengths: Tokens of "inputs"; longer ones are cut, and counted.
      batch_size: Prompts decoded together.
      mesh_shape: Devices per mesh axis; None puts all on `data`.
      seed: Of sampling.

    Raises:
      UsageError: A setting, the prompts or the checkpoint does not fit.
    """
    if jax.process_count() > 1:
        raise UsageError(
            f"generate runs in one process, found {jax.process_count()}: split the prompts into "
            "files and run it once per host."
        )
    if task_feature_lengths.get("inputs", 0) < 1:
        raise UsageError(
            "TASK_FEATURE_LENGTHS: expected a positive number of tokens for 'inputs', found "
            f"{dict(task_feature_lengths)}."
        )
    records.check_writable(output, "OUTPUT")
    mesh = sharding.make_mesh(mesh_shape or sharding.MeshShape())
    sharding.check_batch_size(batch_size, 1, mesh)
    config = pretrained.config_of(model, checkpoint_path)
    network = assembly.Model(config=config, mesh=mesh)
    vocab_size = pretrained.check_vocabulary(vocabulary, config, checkpoint_path)
    # T5's embedding has more rows than its vocabulary has ids: those stand for no text.
    unused = range(vocab_size, config.vocab_size)
    decoder = dataclasses.replace(decoder, banned_ids=(*decoder.banned_ids, *unused))
    rows = _read(prompts, vocabulary)
    params = network.restore(checkpoint_path)

    inputs, num_cut = _inputs(rows, vocabulary, task_feature_lengths)
    if num_cut:
        run_log.log(
            f"{num_cut} of {len(rows)} inputs are cut at {inputs.shape[1]} tokens "
            "(TASK_FEATURE_LENGTHS)."
        )
    outputs = [
        _output(row, ids, vocabulary)
        for row, ids in zip(
            rows,
            _decode(inputs, [row.id for row in rows], params, network, decoder, batch_size, seed),
            strict=True,
        )
    ]
    records.write_records(output, outputs)
    run_config.write(output)
    num_unended = sum(decoder.eos_id not in (row.target_ids or ()) for row in outputs)
    run_log.log(
        f"{output}: {len(outputs)} outputs, of which {num_unended} do not end within "
        f"{decoder.max_length} tokens."
    )


def _read(prompts: Any, vocabulary: Any) -> list[records.Record]:
    if isinstance(prompts, str):
        return records.read_records(prompts)
    from tnt_jax import tasks  # here, because TensorFlow takes seconds to import

    return tasks.prompts_from_task(prompts.mixture_or_task_name, prompts.split, vocabulary)


def _inputs(
    rows: Sequence[records.Record], vocabulary: Any, task_feature_lengths: Mapping[str, int]
) -> tuple[np.ndarray, int]:
    """Input ids `[N, Ti]` padded with 0, and how many were cut (they keep their EOS)."""
    longest = task_feature_lengths["inputs"]
    ids = [tokenization.encode(vocabulary, row.inputs, add_eos=True) for row in rows]
    width = -(-max(map(len, ids)) // _WIDTH_MULTIPLE) * _WIDTH_MULTIPLE
    inputs = feature_converters.pad_inputs(ids, min(longest, width))
    return inputs, sum(len(of_row) > longest for of_row in ids)


def _decode(
    inputs: np.ndarray,
    ids: Sequence[str],
    params: PyTree,
    network: assembly.Model,
    decoder: decoding.Decoding,
    batch_size: int,
    seed: int,
):
    """Yields the generated ids of every row, EOS included, padding dropped."""
    num_fill = -len(inputs) % batch_size
    inputs = np.pad(inputs, ((0, num_fill), (0, 0)))
    keys = decoding.record_keys(seed, [*ids, *[""] * num_fill]) if decoder.temperature else None
    starts = range(0, len(inputs), batch_size)
    for start in run_log.progress(starts, f"generating {len(ids)} outputs"):
        rows = slice(start, start + batch_size)
        batch = sharding.put_batch({"tokens": inputs[rows]}, network.mesh)
        decoded = decoding.decode(
            params,
            batch["tokens"],
            None if keys is None else jax.device_put(keys[rows], batch["tokens"].sharding),
            config=network.config,
            decoding=decoder,
        )
        for tokens in np.asarray(decoded.tokens)[: len(ids) - start]:
            yield tuple(int(token) for token in np.trim_zeros(tokens, "b"))


def _output(row: records.Record, ids: tuple[int, ...], vocabulary: Any) -> records.Record:
    extra = dict(row.extra)
    if row.targets:
        extra.setdefault("reference", row.targets)
    return records.Record(
        id=row.id,
        inputs=row.inputs,
        targets=tokenization.decode(vocabulary, ids),
        target_ids=ids,
        extra=extra,
    )


if __name__ == "__main__":
    program.run("tnt_jax.generate", "generate")
