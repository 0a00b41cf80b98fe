r"""Generates outputs for prompts, greedily, by sampling or by beam search.

Reads and writes JSONL. Every output record keeps the prompt's id and other fields, and gains
`targets` and the exact `target_ids`. A reference text in `targets` moves to `reference`. Sampling
noise depends only on the seed and the record's id, so two equal models give the same samples.

Prompts of similar lengths are decoded together, the longest first, in a few widths of inputs, each
of which is compiled once. The outputs do not depend on this; they are written in the order of the
prompts.

Until all outputs are there, the finished parts are in `OUTPUT.parts/`. After a stop, the same
command makes what is missing. Several processes share the work. Each has its own mesh on its own
devices; the outputs do not depend on the number of processes.

Example:
    python -m tnt_jax.generate --gin_file=models/t5_1_1_base.gin --gin_file=runs/generate.gin \
      --gin.CHECKPOINT_PATH=original/checkpoint_1000 --gin.VOCABULARY_PATH=spiece.model \
      --gin.PROMPTS=prompts.jsonl --gin.OUTPUT=outputs.jsonl
"""

import collections
import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from tnt_jax.annotators import innocent, interface, phrases
from tnt_jax.checkpoints import digests, opened_model, pretrained
from tnt_jax.data import marks, records, removed_everywhere
from tnt_jax.data.layouts import CAUSAL, num_shared_by
from tnt_jax.data.token_automaton import Innocent, Listed, TokenAutomaton
from tnt_jax.models import decoding, masking, sharding
from tnt_jax.models.model import Model
from tnt_jax.models.network_config import NetworkConfig
from tnt_jax.runtime import (
    console,
    memory,
    operative_config,
    output_parts,
    processes,
    program,
    seeds,
    settings_json,
)
from tnt_jax.runtime.errors import UsageError
from tnt_jax.tokenizers import tokenization

_WIDTH_MULTIPLE = 16  # so that files of nearly equal lengths share a compiled program
_MOST_WIDTHS = 5  # per file: each is a program of its own
_BATCHES_PER_WIDTH = 4  # a program is worth compiling for so many batches
_MASK_AT = ("end", "start")
_MOST_KINDS = 1024  # of prompts, by what may be said: so many are remembered
_OUTPUTS_PER_PART = 256  # about so many are lost with a process that is killed


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskPlace:
    """Which token of a masked text is removed.

    Attributes:
      at: "end" removes the token that would complete a text. "start" also removes the token with
        which a text begins, unless a text that is right may begin so: what alternatives are removed
        by where a mark begins. It reads better where a first token is most of a word, and takes
        away innocent words where it is not.
      innocent: With "start", a file of records with outputs of the model: while an ordinary word of
        theirs, or of the prompt, may begin as a masked text does, nothing is removed that does not
        complete the text. None knows those of the prompt alone.

    Raises:
      UsageError: `at` is something else, or does not go with `innocent`.
    """

    at: str = "end"
    innocent: str | None = None

    def __post_init__(self):
        if self.at not in _MASK_AT:
            raise UsageError(f"MASK_AT: expected one of {', '.join(_MASK_AT)}, found {self.at!r}.")
        if self.innocent is not None and self.at == "end":
            raise UsageError(
                "MASK_INNOCENT: expected None with MASK_AT='end', which lets every word begin, "
                f"found {self.innocent!r}. Set MASK_AT='start', or leave it out."
            )


AT_THE_END = MaskPlace()


class _Batch(NamedTuple):
    indices: list[int]  # of its prompts
    width: int  # of their inputs, in tokens


def generate(
    *,
    output: str,
    prompts: Any,
    checkpoint_path: str,
    model: NetworkConfig | pretrained.FromCheckpoint,
    vocabulary: Any,
    decoder: decoding.Decoding,
    task_feature_lengths: Mapping[str, int],
    batch_size: int,
    mesh_shape: sharding.MeshShape | None = None,
    seed: int = 0,
    mask: interface.Annotator | None = None,
    mask_place: MaskPlace = AT_THE_END,
) -> None:
    """Writes one record for every prompt, in order.

    Args:
      output: The JSONL file to write; it appears only when it is whole.
      prompts: A file (or glob) of records, or a `tasks.SeqioDataset`.
      checkpoint_path: A checkpoint, or a model directory for its newest.
      model: The network's settings, or that they are the checkpoint's.
      vocabulary: The tokeniser of inputs and outputs.
      decoder: How to choose the tokens.
      task_feature_lengths: Tokens of "inputs"; longer ones are cut, and counted.
      batch_size: Prompts decoded together.
      mesh_shape: Devices of this process per mesh axis; None puts all on `data`.
      seed: Random seed of sampling.
      mask: An annotator that knows beforehand what it would mark (`interface.Mask`: `Lexicon`,
        `Gazetteer`): its texts never come up, however they are cut up. None masks nothing.
      mask_place: Which token of a masked text is removed.

    Raises:
      UsageError: A setting, the prompts or the checkpoint does not fit.
    """
    if task_feature_lengths.get("inputs", 0) < 1:
        raise UsageError(
            "TASK_FEATURE_LENGTHS: expected a positive number of tokens for 'inputs', found "
            f"{dict(task_feature_lengths)}."
        )
    if mask is None and mask_place != AT_THE_END:
        raise UsageError(
            f"MASK_AT is set, to {mask_place.at!r}, and MASK is None. Set MASK, too, or leave it "
            "out."
        )
    seeds.check(seed)
    operative_config.check_writable(
        output,
        "OUTPUT",
        {
            "PROMPTS": prompts if isinstance(prompts, str) else None,
            "MASK_INNOCENT": None if mask is None else mask_place.innocent,
        },
    )
    opened = opened_model.open_model(
        checkpoint_path,
        model,
        vocabulary,
        batch_size=batch_size,
        num_tokens=task_feature_lengths["inputs"] + decoder.max_length,
        mesh_shape=mesh_shape,
        devices=jax.local_devices(),
    )
    decoder = decoding.within_vocabulary(decoder, vocabulary, opened.model.config)
    rows = read_prompts(prompts, vocabulary)
    inputs = _Inputs.of(rows, vocabulary, opened.model, task_feature_lengths["inputs"])
    masks = None
    if mask is not None:
        vocab_size = opened.model.config.vocab_size
        masks = Masks.of(rows, mask, vocabulary, mask_place, vocab_size).on(opened.model.mesh)
    batches = _plan([len(ids) for ids in inputs.ids], batch_size, inputs.longest)
    explained = functools.partial(
        memory.explained,
        memory.inference_advice("BATCH_SIZE", "MAX_LENGTH", "NUM_BEAMS", "TASK_FEATURE_LENGTHS"),
        BATCH_SIZE=batch_size,
        MAX_LENGTH=decoder.max_length,
        NUM_BEAMS=decoder.num_beams,
        TASK_FEATURE_LENGTHS=task_feature_lengths,
    )
    with explained():
        params = opened.params

    def start(batch: _Batch) -> decoding.Decoded:
        tokens = [inputs.ids[index] for index in batch.indices]
        names = [rows[index].id for index in batch.indices]
        return opened.model.decode(
            params,
            tokens,
            batch.width,
            decoder,
            batch_size,
            row_keys=decoding.record_keys(seed, names) if decoder.temperature else None,
            mask=None if masks is None else masks.of_batch(batch.indices),
            num_shared=inputs.num_shared_by(tokens),
        )

    sizes = output_parts.sizes(len(batches), math.ceil(_OUTPUTS_PER_PART / batch_size))
    batches_of = list(_in_turn(batches, sizes))
    work = {
        "program": "generate",
        "model": opened.model.config,
        "parameters": digests.of_params(params),
        "prompts": records.digest(rows),
        "vocabulary": vocabulary,
        "decoder": decoder,
        "mask": None if masks is None else {"at": mask_place.at, **masks.describe()},
        "task_feature_lengths": task_feature_lengths,
        "batch_size": batch_size,
        "seed": seed,
    }
    with output_parts.opened(output, sizes, settings_json.describe(work)) as job:
        began = time.monotonic()
        with explained():
            _make_parts(job, batches_of, start, rows, vocabulary, decoder)
        job.wait_for_all()
        seconds = time.monotonic() - began
        job.join(
            removed_everywhere.replacing(output, None),
            [[i for batch in of_part for i in batch.indices] for of_part in batches_of],
        )
        operative_config.write(output)
        _log_end(output, job, batches, decoder, seconds)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Inputs:
    """What the model is given.

    Attributes:
      ids: The token ids of each prompt.
      longest: Tokens at which they are cut.
      num_shared: How many tokens those that are not cut begin with alike.
    """

    ids: Sequence[Sequence[int]]
    longest: int
    num_shared: int

    @classmethod
    def of(
        cls, rows: Sequence[records.Record], vocabulary: Any, model: Model, longest: int
    ) -> "_Inputs":
        """Tokenises all prompts; says how many are cut."""
        ids = [marks.prompt_ids(row, vocabulary) for row in rows]
        if num_cut := sum(len(of_row) > longest for of_row in ids):
            console.log(
                f"{num_cut} of {len(rows)} inputs are cut at {longest} tokens "
                "(TASK_FEATURE_LENGTHS)."
            )
        num_shared = 0
        if model.network.feature_layout == CAUSAL:
            num_shared = num_shared_by(of_row for of_row in ids if len(of_row) <= longest)
        return cls(ids=ids, longest=longest, num_shared=num_shared)

    def num_shared_by(self, batch: Sequence[Sequence[int]]) -> int:
        """How many tokens a batch begins with alike: what is cut has lost its beginning."""
        return self.num_shared if max(map(len, batch)) <= self.longest else 0


def _make_parts(
    job: output_parts.Parts,
    batches_of: Sequence[Sequence[_Batch]],
    start: Callable[[_Batch], decoding.Decoded],
    rows: Sequence[records.Record],
    vocabulary: Any,
    decoder: decoding.Decoding,
) -> None:
    """Makes the outputs of this process's parts that are not there yet."""
    own = [(part, batch) for part in job.missing for batch in batches_of[part]]
    decoded = _one_ahead([batch for _, batch in own], start)
    num_own = sum(len(batch.indices) for _, batch in own)
    for (part, _), (batch, tokens) in console.progress(
        zip(own, decoded, strict=True),
        f"generating {num_own} outputs, in batches",
        total=len(own),
    ):
        made = [
            _output(rows[index], of_row, vocabulary, decoder)
            for index, of_row in zip(batch.indices, tokens, strict=False)  # filler is last
        ]
        job.add(part, [row.to_line() for row in made], _counts(made, decoder.end_ids))


def _in_turn(batches: Sequence[_Batch], sizes: Sequence[int]) -> Iterator[list[_Batch]]:
    """The batches of each part: consecutive ones."""
    left = iter(batches)
    return (list(itertools.islice(left, size)) for size in sizes)


def _counts(made: Sequence[records.Record], end_ids: Collection[int]) -> dict[str, int]:
    generated = [row.target_ids or () for row in made]
    return {
        "outputs": len(generated),
        "tokens": sum(map(len, generated)),
        "unended": sum(set(end_ids).isdisjoint(ids) for ids in generated),
    }


def _log_end(
    output: str,
    job: output_parts.Parts,
    batches: Sequence[_Batch],
    decoder: decoding.Decoding,
    seconds: float,
) -> None:
    widths = ", ".join(map(str, sorted({batch.width for batch in batches})))
    new = job.new_counts
    speed = (
        f" With compilation: {new['outputs'] / seconds:.1f} outputs/s, "
        f"{new['tokens'] / seconds:.0f} tokens/s, in input widths of {widths}."
    )
    console.log(
        f"{output}: {job.counts['outputs']} outputs, of which {job.counts['unended']} do not end "
        f"within {decoder.max_length} tokens (MAX_LENGTH).{speed if new else ''}"
    )


def check_are_prompts(prompts: Any, setting: str) -> None:
    """Raises a UsageError, which names the setting, unless they are a file or a seqio task."""
    if not isinstance(prompts, str) and not hasattr(prompts, "mixture_or_task_name"):
        raise UsageError(
            f"{setting}: expected a file (or a glob pattern), or @tasks.SeqioDataset(), found "
            f"{prompts!r:.60}. A pattern names several files: 'parts/*.jsonl'."
        )


def read_prompts(prompts: Any, vocabulary: Any) -> list[records.Record]:
    """The prompts of a file (or glob) of records, or of a `tasks.SeqioDataset`."""
    if isinstance(prompts, str):
        return records.read_records(prompts)
    check_are_prompts(prompts, "PROMPTS")
    from tnt_jax.data import tasks  # here, because TensorFlow takes seconds to import

    return tasks.prompts_from_task(prompts.mixture_or_task_name, prompts.split, vocabulary)


@dataclasses.dataclass(frozen=True, eq=False)
class Masks:
    """What must not come up in each output.

    Attributes:
      tables: The list's tables, on the devices.
      compiled: The list.
      innocent: Words that may begin as listed texts do, in every output.
      kinds: What decides what is wrong: what is listed, and the words of prompts that may begin so.
      kind_of: `[N]`, for each prompt its index in `kinds`: prompts in which the same may be said
        share one.
    """

    tables: masking.Tables
    compiled: TokenAutomaton
    innocent: Innocent
    kinds: tuple[tuple[Listed, tuple[str, ...]], ...]
    kind_of: np.ndarray

    @classmethod
    def of(
        cls,
        rows: Sequence[records.Record],
        mask: Any,
        vocabulary: Any,
        place: MaskPlace = AT_THE_END,
        num_ids: int = 0,
    ) -> "Masks":
        """All that a mask says of all prompts, for a model of at least so many ids."""
        if not isinstance(mask, interface.Mask):
            raise UsageError(
                "MASK: expected an annotator that knows beforehand what it would mark (Lexicon, "
                f"Gazetteer), found {type(mask).__name__}."
            )
        is_at_start = place.at == "start"
        listed = [mask.unwanted(row) for row in rows]
        first = listed[0] if listed else Listed(())
        compiled = first.compiled(vocabulary, removes_starts=is_at_start)
        words = innocent.words(place.innocent, mask) if place.innocent else ()
        known = Innocent(words, case_sensitive=first.case_sensitive)
        own: list[tuple[str, ...]] = [()] * len(rows)
        if is_at_start:
            adds = known.may_add(compiled.automaton)
            forms = functools.cache(lambda word: tuple(filter(adds, phrases.forms([word]))))
            own = [
                tuple(sorted({form for word in of for form in forms(word)}))
                for of in (innocent.of_prompt(row, mask) for row in rows)
            ]
        number_of: dict[tuple[Listed, tuple[str, ...]], int] = {}
        kind_of = [
            number_of.setdefault(kind, len(number_of)) for kind in zip(listed, own, strict=True)
        ]
        return cls(
            tables=masking.Tables.of(compiled, max(num_ids, vocabulary.size)),
            compiled=compiled,
            innocent=known,
            kinds=tuple(number_of),
            kind_of=np.array(kind_of, np.int32),
        )

    def on(self, mesh: jax.sharding.Mesh) -> "Masks":
        """The same with its tables on all devices of a mesh: once, and not for every batch."""
        tables = jax.device_put(self.tables, sharding.replicated(mesh))
        return dataclasses.replace(self, tables=tables)

    def of_batch(self, indices: Sequence[int]) -> masking.Mask:
        """The mask of the prompts with these indices."""
        kinds = self.kind_of[list(indices)].tolist()
        # Not of all prompts beforehand: there may be as many kinds as prompts.
        return masking.Mask(self.tables, np.stack([self._flags(kind) for kind in kinds]))

    @functools.cached_property
    def _flags(self) -> Callable[[int], np.ndarray]:
        """What is wrong for a kind; the last ones are kept."""

        @functools.lru_cache(_MOST_KINDS)
        def flags(kind: int) -> np.ndarray:
            listed, own = self.kinds[kind]
            return self.compiled.flags(listed.allowed, self.innocent.and_also(own))

        return flags

    def describe(self) -> dict[str, Any]:
        """All that decides what is removed."""
        return {
            "texts": self.kinds[0][0].texts if self.kinds else (),
            "allowed": [listed.allowed for listed, _ in self.kinds],
            "of": self.kind_of,
            "own": [own for _, own in self.kinds],
            "innocent": sorted(self.innocent.words),
        }


def _plan(lengths: Sequence[int], batch_size: int, longest: int) -> list[_Batch]:
    """Prompts by falling length, in batches that are little wider than their longest prompt.

    The longest come first: what does not fit into memory is known at once.

    Args:
      lengths: Tokens of every prompt.
      batch_size: Prompts in a batch; the last may have fewer.
      longest: No width is above it; longer prompts are cut.
    """
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    together = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    needed = [
        min(longest, -(-lengths[of[0]] // _WIDTH_MULTIPLE) * _WIDTH_MULTIPLE) for of in together
    ]
    num_widths = min(_MOST_WIDTHS, 1 + len(together) // _BATCHES_PER_WIDTH)
    return [_Batch(*of) for of in zip(together, _few_widths(needed, num_widths), strict=True)]


def _few_widths(needed: Sequence[int], num_widths: int) -> list[int]:
    """Widths at least as large as those needed, few distinct ones, and of those the least sum."""
    number = collections.Counter(needed)
    distinct = sorted(number)
    upto = [0, *itertools.accumulate(number[n] for n in distinct)]

    @functools.cache
    def best(end: int, num_left: int) -> tuple[float, tuple[int, ...]]:
        """The sum, and the widths, for the `end` smallest of those needed."""
        if end == 0 or num_left == 0:
            return (0.0 if end == 0 else float("inf")), ()
        width = distinct[end - 1]
        return min(
            (total + width * (upto[end] - upto[begin]), (*widths, width))
            for begin in range(end)
            for total, widths in [best(begin, num_left - 1)]
        )

    _, widths = best(len(distinct), num_widths)
    return [min(width for width in widths if width >= n) for n in needed]


def _one_ahead(
    batches: Sequence[_Batch], start: Callable[[_Batch], decoding.Decoded]
) -> Iterator[tuple[_Batch, np.ndarray]]:
    """Yields each batch with its tokens, `[B, L]`.

    The devices have begun with the next batch by then: they work while the host writes text. No
    more than two batches are on the devices.
    """
    started = None
    for batch in batches:
        before, started = started, (batch, start(batch))
        if before:
            yield before[0], np.asarray(before[1].tokens)
    if started:
        yield started[0], np.asarray(started[1].tokens)


def _output(
    row: records.Record, tokens: np.ndarray, vocabulary: Any, decoder: decoding.Decoding
) -> records.Record:
    ids = tokenization.said(tokens, decoder.end_ids)
    extra = dict(row.extra)
    if row.targets:
        extra.setdefault("reference", row.targets)
    return records.Record(
        id=row.id,
        inputs=row.inputs,
        messages=row.messages,
        targets=vocabulary.decode(ids),
        target_ids=ids,
        extra=extra,
    )


if __name__ == "__main__":
    program.run("tnt_jax.generate", "generate", processes_run=processes.Kind.APART)
