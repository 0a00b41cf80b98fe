"""The prompts of a user, read from a few kinds of files, and which of them are kept back."""

import collections
import csv
import dataclasses
import hashlib
import io
import json
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

from tnt_jax import annotators
from tnt_jax.annotators import lexicon
from tnt_jax.data import records, removed_everywhere, words
from tnt_jax.patching import choices
from tnt_jax.patching.unwanted import MARKED_TEXTS, Unwanted
from tnt_jax.runtime import files
from tnt_jax.runtime.errors import UsageError, naming_file

STDIN = "-"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parts:
    """Prompts by what they are for; each part is in an order that chance decided.

    Attributes:
      train: To learn from.
      choice: To choose by.
      report: For the numbers at the end: nothing is chosen by them.
    """

    train: Sequence[records.Record]
    choice: Sequence[records.Record]
    report: Sequence[records.Record]


def read(path: str, flag: str) -> list[records.Record]:
    """The prompts of a file, as they come.

    Args:
      path: JSONL of records; a table, .csv or .tsv, with a column "inputs" or "prompt"; or a text
        file with one prompt a line. "-" is standard input. A file whose name does not end with
        .jsonl is JSONL where its first line is a JSON object.
      flag: That names it, for messages.

    Raises:
      UsageError: There is no such file, or a line of it is no prompt.
    """
    name = "stdin" if path == STDIN else path
    content = sys.stdin.buffer.read() if path == STDIN else _content(path, flag)
    lines = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    first = next((line for line in lines if line.strip()), None)
    if first is None:
        raise UsageError(f"{flag}: expected prompts, one a line, found none in {name}.")
    if name.lower().endswith((".csv", ".tsv")):
        found = _of_table(content, name, flag)
    elif name.endswith((".jsonl", ".json")) or _is_object(first):
        found = records.data_set(records.located(lines, name), name)
    else:
        found = [
            records.Record(id=f"{pathlib.PurePath(name).stem}:{number}", inputs=text)
            for number, line in enumerate(lines, start=1)
            if (text := _text(line, f"{flag}: {name}:{number}").strip())
        ]
    if empty := [row.id for row in found if not row.prompt.strip()]:
        raise UsageError(
            f"{flag}: expected a text in each prompt, found none in {len(empty)} of {len(found)}, "
            f"the first one {empty[0]!r}. Leave them out."
        )
    return found


def _of_table(content: bytes, name: str, flag: str) -> list[records.Record]:
    """The prompts of a table with a header; other columns than these and "id" are left aside."""
    try:
        text = content.decode("utf-8-sig")
        delimiter = "\t" if name.lower().endswith(".tsv") else ","
        rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        columns = [column.strip() for column in rows.fieldnames or ()]
        rows.fieldnames = columns
        column = next((of for of in ("inputs", "prompt") if of in columns), None)
        if column is None:
            raise UsageError(
                f'{flag}: {name}: expected a column "inputs" or "prompt", found '
                f"{', '.join(columns)}. Rename one, or write one prompt a line into a .txt."
            )
        stem = pathlib.PurePath(name).stem
        found = [
            (
                f"{name}, row {number}",
                records.Record(
                    id=row.get("id") or f"{stem}:{number}", inputs=(row[column] or "").strip()
                ),
            )
            for number, row in enumerate(rows, start=1)
        ]
    except (UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"{flag}: {name}: expected a table in UTF-8, found {error}.") from error
    return records.data_set(found, name)


def _without_repeats(
    rows: Sequence[records.Record], what: str, of: Callable[[records.Record], Any]
) -> tuple[list[records.Record], list[str]]:
    """The first of all that have the same `of`, and a sentence on how many others there are."""
    different = {of(row): row for row in reversed(rows)}
    kept = [row for row in rows if different[of(row)] is row]
    if len(kept) == len(rows):
        return kept, []
    number = len(rows) - len(kept)
    return kept, [f"{number} of {len(rows)} {what} repeat another one, and are left out."]


def _prompt(row: records.Record) -> str:
    return row.prompt


def _output(label: str | None) -> Callable[[records.Record], Any]:
    """An output with what is said of it: its marks, and its label if that is a field."""

    def of(row: records.Record) -> tuple[Any, ...]:
        marks = row.negative_spans, row.negative_token_ids
        return (row.prompt, row.targets, *marks, repr(row.extra.get(label or "")))

    return of


def _content(path: str, flag: str) -> bytes:
    file = pathlib.Path(path).expanduser()
    if not file.is_file():
        what = "a folder" if file.is_dir() else "nothing"
        raise UsageError(
            f"{flag}: expected a file of prompts (JSONL, a .csv or .tsv, or one a line), found "
            f"{what} at {path}."
        )
    with naming_file(file):
        return file.read_bytes()


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _text(line: bytes, where: str) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{where}: not UTF-8 ({error.reason} at byte {error.start}). Save the file as UTF-8."
        ) from None


def split(
    prompts: Sequence[records.Record], eval_prompts: Sequence[records.Record] | None
) -> Parts:
    """Says what each prompt is for: by its text alone, so that the same one always is for the same.

    Args:
      prompts: Where outputs are given, a prompt may have several: all are to learn from, or none.
      eval_prompts: Those to keep back; None keeps back some of `prompts`.

    Raises:
      UsageError: There are too few, or one is in both.
    """
    in_order = _by_prompt(prompts)
    if eval_prompts is None:
        num_choice, num_report = choices.split_sizes(len(in_order), False)
        kept_back = num_choice + num_report
        return Parts(
            choice=[rows[0] for rows in in_order[:num_choice]],
            report=[rows[0] for rows in in_order[num_choice:kept_back]],
            train=[row for rows in in_order[kept_back:] for row in rows],
        )
    inputs = {row.prompt for row in prompts}
    if seen := [row.id for row in eval_prompts if row.prompt in inputs]:
        raise UsageError(
            f"--eval_prompts: expected other prompts than --prompts has, found {len(seen)} of "
            f"{len(eval_prompts)} there as well, the first one {seen[0]!r}. Leave them out of one."
        )
    kept = [rows[0] for rows in _by_prompt(eval_prompts)]
    num_choice, num_report = choices.split_sizes(len(kept), True)
    return Parts(
        train=[row for rows in in_order for row in rows],
        choice=kept[:num_choice],
        report=kept[num_choice : num_choice + num_report],
    )


def _by_prompt(rows: Sequence[records.Record]) -> list[list[records.Record]]:
    """The records of each prompt, in an order of prompts that chance decided."""
    found: dict[str, list[records.Record]] = {}
    for row in rows:
        found.setdefault(row.prompt, []).append(row)
    return [found[prompt] for prompt in sorted(found, key=_chance)]


def _chance(prompt: str) -> bytes:
    return hashlib.sha256(prompt.encode()).digest()


def write(
    path: pathlib.Path,
    rows: Sequence[records.Record],
    *,
    whole: bool = False,
    everywhere: Sequence[int] = (),
) -> str:
    """Writes prompts, unless the file has them already; returns its path.

    Args:
      path: The file.
      rows: The records with the prompts.
      whole: Whether targets and marks are written, too; else what a model is given, and the fields
        of the user's own.
      everywhere: Ids that are removed at every position of them (`removed_everywhere`).
    """
    if not whole:
        rows = [
            dataclasses.replace(
                row,
                targets=records.NO_TARGETS,
                target_ids=None,
                negative_spans=None,
                negative_token_ids=(),
                annotator="",
            )
            for row in rows
        ]
    if not path.is_file() or not _holds(path, rows, everywhere):
        ids = removed_everywhere.Ids(everywhere, {}) if everywhere else None
        removed_everywhere.write_records(path, rows, ids)
    return str(path)


def _holds(path: pathlib.Path, rows: Sequence[records.Record], everywhere: Sequence[int]) -> bool:
    """Whether a file has these records and ids, as this version writes them or as another did."""
    try:
        if removed_everywhere.of_records(str(path)) != tuple(everywhere):
            return False
        return records.digest(records.read_records(path)) == records.digest(rows)
    except UsageError:
        return False


def marked_texts(rows: Sequence[records.Record]) -> list[str]:
    """The different texts that are marked in outputs, each on one line, sorted.

    White space is left out, which no list finds; all else has a word (`words.extents`). So is what
    has no letter or digit and is left unmarked by most outputs that say it: one full stop that
    somebody marked would make every sentence an unwanted one.
    """
    num_marked = collections.Counter(text for row in rows for text in _marked_in(row))
    signs = {text for text in num_marked if not any(map(str.isalnum, text))}
    num_said = collections.Counter(text for row in rows for text in signs if text in row.targets)
    return sorted(
        text
        for text, number in num_marked.items()
        if text and (text not in signs or number >= num_said[text] / 2)
    )


def _marked_in(row: records.Record) -> set[str]:
    return {" ".join(row.targets[start:end].split()) for start, end in row.offsets}


def words_mostly_marked(rows: Sequence[records.Record]) -> list[str]:
    """The words that are marked, in part at least, in half of the outputs that say them, sorted.

    And in two outputs: what `localize` marks is right more often than not, and no more.
    """
    num_said: collections.Counter[str] = collections.Counter()
    num_marked: collections.Counter[str] = collections.Counter()
    for row in rows:
        said = [(row.targets[a:b].lower(), a, b) for a, b in words.extents(row.targets)]
        num_said.update({word for word, _, _ in said})
        num_marked.update(
            {
                word
                for word, a, b in said
                if any(a < end and start < b for start, end in row.offsets)
            }
        )
    return sorted(
        word for word, number in num_marked.items() if number >= max(num_said[word] / 2, 2)
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Texts:
    """The prompts by what they are for, and outputs that are marked already.

    Attributes:
      parts: Prompts; those to learn from have their marked outputs where these were given.
      digest: A digest of all prompts, and of what is given with them.
      notes: What is to be said of the files.
      marked: What is marked in given outputs; None where none were given, or their marks are still
        to be found.
      everywhere: Ids that are removed at every position of given outputs, sorted.
    """

    parts: Parts
    digest: str
    notes: Sequence[str]
    marked: Sequence[str] | None
    everywhere: tuple[int, ...] = ()

    @classmethod
    def read(cls, prompts: str | None, eval_prompts: str | None, unwanted: Unwanted) -> "Texts":
        """Reads all files of prompts.

        Args:
          prompts: A file, or "-"; None where the marked outputs have them.
          eval_prompts: Those to keep back; None keeps back some of the others.
          unwanted: What the model must not say.

        Raises:
          UsageError: A file does not fit, or there are too few.
        """
        path, flag = (prompts, "--prompts") if prompts else (unwanted.file, "--records")
        assert path is not None
        are_given = unwanted.are_outputs_given
        rows, notes, eval_rows = read(path, flag), [], None
        # An output repeats another one if its marks or its label are the same, too: so marks first.
        if unwanted.kind == "spans":
            rows, notes = _with_spans(rows, str(unwanted.file))
        if are_given:
            rows, note = _without_repeats(rows, "outputs", _output(unwanted.labels))
        else:
            rows, note = _without_repeats(rows, "prompts", _prompt)
        notes += note
        if eval_prompts is not None:
            eval_rows, note = _without_repeats(
                read(eval_prompts, "--eval_prompts"), "kept-back prompts", _prompt
            )
            notes += note
        marked = None
        if unwanted.labels:
            _check_labels(rows, unwanted.labels)
        elif are_given:
            marked = _check_marked(rows, f"--{unwanted.kind}")
            notes += [_about_new_outputs(len(marked)), *_about_left_out(rows, marked)]
        parts = split(rows, eval_rows)
        digest = records.digest([*parts.train, *parts.choice, *parts.report])
        everywhere: tuple[int, ...] = ()
        if unwanted.kind == "records":
            everywhere = removed_everywhere.of_records(path)
        if everywhere:
            digest = hashlib.sha256(repr((digest, everywhere)).encode()).hexdigest()[:16]
            notes.append(
                f"{len(everywhere)} tokens are removed at every position: "
                f"{removed_everywhere.file_of(path)}."
            )
        return cls(parts=parts, digest=digest, notes=notes, marked=marked, everywhere=everywhere)

    def with_marks_found(self, rows: Sequence[records.Record]) -> tuple["Texts", str]:
        """With the outputs to learn from as they were marked, and what is to be said of that.

        Args:
          rows: Those outputs, with marks.

        Raises:
          UsageError: Nothing was found that is mostly unwanted.
        """
        marked = words_mostly_marked(rows)
        if not marked:
            raise UsageError(
                "--labels: expected words that make outputs bad, found none: what is said in bad "
                f"outputs is as often said in good ones ({len(rows)} outputs). Give more labelled "
                "outputs, several for each prompt, or say what is unwanted by --words or --spans."
            )
        return (
            dataclasses.replace(
                self, parts=dataclasses.replace(self.parts, train=rows), marked=marked
            ),
            _about_new_outputs(len(marked)),
        )

    def write_words(self, folder: pathlib.Path) -> None:
        """The list of marked texts, for a lexicon."""
        if self.marked is not None:
            lines = [f"{lexicon.line_of(text)}\n" for text in self.marked]
            files.write_text(folder / MARKED_TEXTS, "".join(lines))


def _about_new_outputs(num_marked: int) -> str:
    return (
        f"New outputs are looked at for the {num_marked} texts that are marked in the given ones: "
        "nobody has marked these outputs."
    )


def _about_left_out(rows: Sequence[records.Record], listed: Sequence[str]) -> list[str]:
    """What is to be said where something is marked that is not in the list of `marked_texts`."""
    known = {*listed}
    found = [row for row in rows if not _marked_in(row).issubset(known)]
    if not found:
        return []
    return [
        f"In {len(found)} of {len(rows)} outputs white space is marked, or a sign that most "
        f"outputs say unmarked, the first one {found[0].id!r}: it is learned from, and not looked "
        "for in new outputs."
    ]


def _check_labels(rows: Sequence[records.Record], field: str) -> None:
    for row in rows:
        label = row.extra.get(field)
        if row.is_prompt or label not in (0, 1):
            found = "no targets" if row.is_prompt else f"{field}={label!r}"
            raise UsageError(
                f"--labels: expected outputs (targets) whose field {field!r} is true where they "
                f"are bad and false where they are good, found {found} in record {row.id!r}."
            )


def _with_spans(
    rows: Sequence[records.Record], path: str
) -> tuple[list[records.Record], list[str]]:
    """Records with the marks of people, and how many nobody marked."""
    annotator = annotators.Spans(path=path, unmatched="leave_out")
    if without := sum(row.is_prompt for row in rows):
        raise UsageError(
            f"--spans: expected prompts with the outputs that people marked (targets), found "
            f"{without} of {len(rows)} without. Give such records as --prompts."
        )
    found = [(row, annotator.annotate(row)) for row in rows]
    marked = [
        dataclasses.replace(
            row,
            negative_spans=tuple(
                records.with_strength(span.start, span.end, span.strength)
                for span in annotation.spans
            ),
            annotator=annotator.description,
        )
        for row, annotation in found
        if annotation is not None
    ]
    if not marked:
        raise UsageError(f"--spans: {path} marks none of the {len(rows)} outputs of --prompts.")
    left_out = len(rows) - len(marked)
    notes = [
        f"{left_out} of {len(rows)} outputs are left out: nobody marked them. (A line with "
        '"negative_spans": [] says that nothing is wrong.)'
    ]
    if all(row.says_unwanted for row in marked):
        notes.append(
            "Every output that somebody looked at has a mark: no clean ones hold the rest in place."
        )
    return marked, notes[not left_out :]


def _check_marked(rows: Sequence[records.Record], flag: str) -> list[str]:
    for row in rows:
        if row.is_prompt or row.negative_spans is None:
            missing = "targets" if row.is_prompt else "negative_spans"
            raise UsageError(
                f"{flag}: expected outputs with negative_spans, found none in record {row.id!r} "
                f"({missing}). A clean output has an empty list."
            )
    texts = marked_texts(rows)
    if not texts:
        raise UsageError(
            f"{flag}: expected something marked in some outputs, found nothing, white space, "
            f"or signs that most outputs say unmarked, in {len(rows)}."
        )
    return texts
