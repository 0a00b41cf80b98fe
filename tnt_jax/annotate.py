r"""Marks what is unwanted in outputs: reads records, writes them with `negative_spans`.

The annotator says which stretches of each output must go. It may also name alternatives, texts
that would be just as wrong in that place. Their first tokens are removed, too
(`negative_token_ids`); otherwise the probability of the marked token moves to the next wrong one.
A token is not removed for an alternative if it also begins an ordinary word of the outputs, as
"▁the" begins both "the" and "the gardenia". Alternatives, and texts to remove at every position,
become token ids, so they need the model's vocabulary.

Texts to remove at every position are removed where the next token would complete one, however the
text is cut up. If a token completes one wherever it stands, and in every record, its id goes to a
separate file (`<output>.everywhere.json`), which `train` reads with the records.

Until all records are marked, the finished parts are in `OUTPUT.parts/`. After a stop, the same
command marks what is missing. Several processes share the work, or Apache Beam marks large files
(annotate.beam_options). The output is the same, byte for byte.

Example:
    python -m tnt_jax.annotate --gin_file=runs/annotate_lexicon.gin --gin.LEXICON=phrases.txt \
      --gin.VOCABULARY_PATH=spiece.model --gin.RECORDS=outputs.jsonl --gin.OUTPUT=annotated.jsonl
"""

import collections
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from tnt_jax import annotators
from tnt_jax.annotators import beam_jobs, innocent, phrases
from tnt_jax.data import mark_alternatives, marks, negative_sets, records, removed_everywhere
from tnt_jax.data.token_automaton import Listed
from tnt_jax.runtime import (
    console,
    files,
    holding,
    operative_config,
    output_parts,
    processes,
    program,
    settings_json,
)
from tnt_jax.runtime.errors import UsageError
from tnt_jax.tokenizers import tokenization

_RECORDS_PER_PART = 5000  # at most so many are lost with a process that is killed
_NO_VOCABULARY = (
    "the annotator removes texts at every position: expected a vocabulary to turn them into token "
    "ids, found None. Set annotate.vocabulary."
)


def annotate(
    *,
    output: str,
    input: str,
    annotator: annotators.Annotator,
    vocabulary: Any | None = None,
    beam_options: Sequence[str] | None = None,
) -> None:
    """Writes every record of `input` with its marks, in order, but for those it does not know.

    Where the annotator has texts to remove at every position of every record, the ids that
    complete one wherever they stand go to `<output>.everywhere.json`, not into each record
    (`removed_everywhere`).

    Args:
      output: The JSONL file to write; it appears only when it is whole.
      input: A JSONL file (or glob) of records with targets.
      annotator: Decides what is unwanted.
      vocabulary: The tokeniser; None marks spans alone, without alternatives.
      beam_options: None marks in a loop, here and in the other processes. A list, such as
        `["--runner=DirectRunner"]`, does it on Apache Beam with these options (`beam_jobs`).

    Raises:
      UsageError: The records, the annotator's files or the vocabulary do not fit.
    """
    if beam_options is not None and processes.count() > 1:
        raise UsageError(
            "beam_options: expected one process, which has workers of Apache Beam's; found "
            f"{processes.count()}. Unset {processes.VARIABLE}, or leave beam_options at None."
        )
    operative_config.check_writable(output, "OUTPUT", {"RECORDS": input})
    if vocabulary is not None:
        tokenization.check_vocabulary(vocabulary)
    elif annotator.everywhere() is not None:
        raise UsageError(_NO_VOCABULARY)
    everywhere = _everywhere(annotator, vocabulary)
    mark_one = functools.partial(
        mark,
        annotator=annotator,
        vocabulary=vocabulary,
        removed_everywhere=everywhere.ids,
        completions=None if vocabulary is None else mark_alternatives.Completions(vocabulary),
        continuations=(
            None
            if vocabulary is None
            else mark_alternatives.Continuations(
                vocabulary, functools.partial(innocent.words, input, annotator)
            )
        ),
    )
    _check_outputs(input)
    before = files.versions_of(input)
    if beam_options is None:
        found = records.survey(input)
        work = {
            "program": "annotate",
            "records": found.digest,
            "annotator": annotator.description,
            "settings": annotator,
            "vocabulary": vocabulary,
        }
        sizes = output_parts.sizes(found.num_records, _RECORDS_PER_PART)
        with output_parts.opened(output, sizes, settings_json.describe(work)) as job:
            names, last = negative_sets.Names(), None
            for part, made in _marked(input, sizes, job.missing, mark_one):
                if part != last:  # each has the lines of its own sets
                    names.forget()
                    last = part
                job.add(part, [] if made is None else names.lines_of(made), {_kind(made): 1})
            _check_unchanged(input, before)
            job.wait_for_all()
            job.join(removed_everywhere.replacing(output, everywhere.to_write(annotator)))
            _write_rest(output, annotator, everywhere, job.counts)
    else:
        counts: collections.Counter[str] = collections.Counter()

        def counted() -> Iterator[records.Record]:
            for made in beam_jobs.map_records(mark_one, input, output, beam_options):
                counts[_kind(made)] += 1
                if made is not None:
                    yield made
            _check_unchanged(input, before)

        with holding.output(output, "OUTPUT"):
            removed_everywhere.write_records(output, counted(), everywhere.to_write(annotator))
            _write_rest(output, annotator, everywhere, counts)


def _check_outputs(path: str) -> None:
    """Raises a UsageError for a file of prompts with empty targets: one may be empty, not all."""
    first = list(itertools.islice(records.iterate(path), 100))
    if not any(row.targets or row.target_ids or row.is_prompt for row in first):
        raise UsageError(
            f"{path}: expected outputs of the original model (tnt_jax.generate writes them), found "
            f"that the targets of the first {len(first)} records are empty: these are prompts."
        )


def _marked(
    input: str,
    sizes: Sequence[int],
    parts: Sequence[int],
    mark_one: Callable[[records.Record], records.Record | None],
) -> Iterator[tuple[int, records.Record | None]]:
    """What comes of each record of some parts, with the part's number."""
    own = frozenset(parts)
    number = sum(sizes[part] for part in own)
    rows = records.iterate(input, lambda place: place // _RECORDS_PER_PART in own)
    part_of_rows = (part for part in sorted(own) for _ in range(sizes[part]))
    num_marked = 0
    progress = console.progress(rows, f"annotating {number} records", number)
    for row, part in zip(progress, part_of_rows, strict=False):
        yield part, mark_one(row)
        num_marked += 1
    if num_marked < number:
        raise _changed(input)


def _check_unchanged(path: str, before: Mapping[str, tuple[int, int]]) -> None:
    """Raises a UsageError where records are not those that were there: parts would not belong."""
    if files.versions_of(path) != before:
        raise _changed(path)


def _changed(path: str) -> UsageError:
    return UsageError(
        f"{path}: expected the records that were there at the start, found that they were written, "
        "replaced or deleted since. Let nothing write them while they are annotated, and give the "
        "same command again."
    )


def _kind(made: records.Record | None) -> str:
    if made is None:
        return "left out"
    return "marked" if made.has_unwanted_text else "clean"


def _write_rest(
    output: str,
    annotator: annotators.Annotator,
    everywhere: "_Everywhere",
    counts: collections.Counter[str],
) -> None:
    """Writes what belongs beside the output, and logs what is in it."""
    if everywhere.texts:
        _log_everywhere(output, everywhere)
    operative_config.write(output)
    num_marked, num_known = counts["marked"], counts["marked"] + counts["clean"]
    console.log(
        f"{output}: {num_marked} of {num_known} outputs have something unwanted "
        f"({num_marked / max(num_known, 1):.1%}), by {annotator.description}."
    )
    if counts["left out"]:
        console.log(
            f"{output}: {counts['left out']} of {counts.total()} records are left out: the "
            "annotator does not know them."
        )


def mark(
    row: records.Record,
    annotator: annotators.Annotator,
    vocabulary: Any | None,
    continuations: mark_alternatives.Continuations | None = None,
    removed_everywhere: frozenset[int] = frozenset(),
    completions: mark_alternatives.Completions | None = None,
) -> records.Record | None:
    """The record with the annotator's spans and, given a vocabulary, its alternatives.

    Earlier `negative_token_ids` are replaced, as the spans are. None where the annotator does not
    know the record. A token that begins one of the innocent words of `continuations` is not removed
    on account of an alternative that it does not spell out. What is unwanted at every position
    needs no mark for the ids that are `removed_everywhere`. A record that gets `negative_token_ids`
    gets `target_ids`, too, if it has none and they decode to its text. `continuations` and
    `completions` keep what is the same for many records.

    Raises:
      UsageError: The record is a prompt, or its ids are of another vocabulary.
    """
    records.check_output(row)
    annotation = annotator.annotate(row)
    if annotation is None:
        return None
    if annotation.unwanted and vocabulary is None:
        raise UsageError(_NO_VOCABULARY)
    entries: list[records.TokenIds] = []
    target_ids = row.target_ids
    has_alternatives = any(span.alternatives for span in annotation.spans)
    if vocabulary is not None and (has_alternatives or annotation.unwanted):
        ids, extents = marks.ids_and_extents(row, vocabulary)
        for span in annotation.spans:
            found = mark_alternatives.token_ids(
                vocabulary,
                ids,
                (span.start, span.end),
                span.alternatives,
                annotation.supported,
                continuations,
                (row.targets, extents),
            )
            entries += (records.with_strength(*entry, span.strength) for entry in found)
        if annotation.unwanted:
            completions = completions or mark_alternatives.Completions(vocabulary)
            entries += completions.ids(ids, annotation.unwanted, removed_everywhere)
        # Another tokeniser would remove other tokens. It refuses a record with ids of this one.
        if target_ids is None and entries and vocabulary.decode(ids) == row.targets:
            target_ids = tuple(ids)
    return dataclasses.replace(
        row,
        target_ids=target_ids,
        negative_spans=tuple(
            records.with_strength(span.start, span.end, span.strength) for span in annotation.spans
        ),
        negative_token_ids=_one_by_position(entries),
        annotator=annotator.description,
    )


def _one_by_position(entries: Sequence[records.TokenIds]) -> tuple[records.TokenIds, ...]:
    """The entries, sorted; those at one position made one for each strength."""
    if len({entry[0] for entry in entries}) == len(entries):
        return tuple(sorted(entries, key=lambda entry: entry[0]))
    removed: dict[int, dict[int, float]] = {}  # by position, ids and strengths
    for entry in entries:
        strengths, strength = removed.setdefault(entry[0], {}), records.strength_of(entry)
        for i in entry[1]:
            strengths[i] = max(strength, strengths.get(i, 0.0))
    return marks.token_id_entries(removed)


@dataclasses.dataclass(frozen=True)
class _Everywhere:
    """An annotator's texts to remove at every position of every record, in a vocabulary."""

    texts: tuple[str, ...]
    ids: frozenset[int]  # that complete one wherever they stand
    longer: tuple[str, ...]  # of which there is no such id
    unspelt: tuple[str, ...]  # they would take an unknown token

    def to_write(self, annotator: annotators.Annotator) -> removed_everywhere.Ids | None:
        """What goes beside the records; None where there are no such texts."""
        if not self.texts:
            return None
        more = {
            "left_out": list(self.longer),
            "unspelt": list(self.unspelt),
            "annotator": annotator.description,
        }
        return removed_everywhere.Ids(self.ids, more)


def _everywhere(annotator: annotators.Annotator, vocabulary: Any) -> _Everywhere:
    listed = annotator.everywhere()
    if listed is None:
        return _Everywhere((), frozenset(), (), ())
    compiled = listed.compiled(vocabulary)
    ids, held = compiled.removed_everywhere()
    unspelt = {text for text in listed.texts if not _can_spell(vocabulary, text, listed)}
    return _Everywhere(
        listed.texts,
        ids=frozenset(ids.tolist()),
        longer=tuple(
            text
            for text in listed.texts
            if text not in unspelt and held.isdisjoint(compiled.automaton.numbers([text]))
        ),
        unspelt=tuple(text for text in listed.texts if text in unspelt),
    )


def _can_spell(vocabulary: Any, text: str, listed: Listed) -> bool:
    ways = phrases.forms([text], case_sensitive=listed.case_sensitive)
    return any(vocabulary.unknown_id not in vocabulary.encode(way) for way in ways)


def _log_everywhere(output: str, everywhere: _Everywhere) -> None:
    console.log(
        f"{removed_everywhere.file_of(output)}: {len(everywhere.ids)} ids to remove at every "
        f"position. {len(everywhere.longer)} of {len(everywhere.texts)} texts are more than one "
        f"token: they are not among them{_examples(everywhere.longer)}, but marked in the records, "
        "wherever the next token would complete one."
        + (
            f" {len(everywhere.unspelt)} are ignored{_examples(everywhere.unspelt)}: the "
            "vocabulary spells them with an unknown token."
            if everywhere.unspelt
            else ""
        )
    )


def _examples(texts: Sequence[str]) -> str:
    return f" (such as {', '.join(map(repr, texts[:3]))})" if texts else ""


if __name__ == "__main__":
    program.run("tnt_jax.annotate", "annotate", processes_run=processes.Kind.APART)
