"""A function of one record, over the records of files, on Apache Beam.

The work is divided into parts of lines. Workers read their part of the input and write their part
of the result beside the output. The program that starts the job reads each record once before, to
check it, and once after, to put them in order; it holds none of them. Input, output and the files
that the function needs must lie on a file system that every worker sees, and workers need tnt_jax.
"""

import io
import pathlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

from etils import epath

from tnt_jax.data import records
from tnt_jax.data.records import Record
from tnt_jax.runtime import console, files
from tnt_jax.runtime.errors import UsageError
from tnt_jax.runtime.output_parts import names_of_ours

LINES_PER_PART = 1000  # seconds of work for a slow annotator: little is lost with a worker


class _Part(NamedTuple):
    number: int
    file: str
    first_line: int
    start: int  # in bytes
    size: int  # in bytes


def map_records(
    function: Callable[[Record], Record | None],
    input: str,
    output: str,
    options: Sequence[str],
    lines_per_part: int = LINES_PER_PART,
) -> Iterator[Record | None]:
    """What the function makes of each record, in the order of the records.

    The results are those of a loop over `records.iterate(input)`, mistakes included.

    Args:
      function: Picklable; None leaves a record out.
      input: A JSONL file or a glob.
      output: A folder beside this file, with the same name and `.beam`, holds what workers write,
        until it has been read here.
      options: Pipeline options of Beam, as on its command line: `["--runner=DirectRunner"]`.
      lines_per_part: Lines that one worker takes at a time.

    Raises:
      UsageError: A file is in an object store, the folder holds what is not ours, Beam is not
        installed, the input has a mistake, or the function found one.
    """
    for path in (input, output):
        if files.is_remote(path):
            raise UsageError(
                "beam_options: expected files on a disk that all workers see, found "
                f"{path}. Copy the records there, or annotate without Beam."
            )
    folder = pathlib.Path(f"{output}.beam").absolute()
    names_of_ours(epath.Path(folder))
    try:
        import apache_beam  # pyright: ignore[reportMissingImports]
        from apache_beam.options import (  # pyright: ignore[reportMissingImports]
            pipeline_options,
        )
    except ModuleNotFoundError as error:
        raise UsageError(
            f"beam_options: Apache Beam cannot be imported ({error}). It asks for an older "
            "protobuf than ours, and works with ours: pip install 'tnt_jax[beam-needs]', then "
            "pip install --no-deps apache-beam==2.77.0"
        ) from error
    parts = _divide(input, lines_per_part)
    shutil.rmtree(folder, ignore_errors=True)  # of a job that was stopped
    folder.mkdir(parents=True)
    try:
        with apache_beam.Pipeline(
            options=pipeline_options.PipelineOptions(list(options))
        ) as pipeline:
            _ = (
                pipeline
                | "parts" >> apache_beam.Create(parts)
                | "spread" >> apache_beam.Reshuffle()
                | "records" >> apache_beam.Map(partial(_work, function=function, folder=folder))
            )
        for part in parts:
            yield from _results(part, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _divide(input: str, lines_per_part: int) -> list[_Part]:
    """Parts in order, after a look at every record."""
    num_records = records.survey(input).num_records
    parts: list[_Part] = []
    for file in map(str, files.matching_files(input)):
        start = 0
        with pathlib.Path(file).open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if number % lines_per_part == 1 % lines_per_part:
                    parts.append(
                        _Part(len(parts), str(pathlib.Path(file).absolute()), number, start, 0)
                    )
                parts[-1] = parts[-1]._replace(size=parts[-1].size + len(line))
                start += len(line)
    console.log(f"{input}: {num_records} records in {len(parts)} parts, on Apache Beam.")
    return parts


def _work(part: _Part, function: Callable[[Record], Record | None], folder: pathlib.Path) -> None:
    """One worker's share: what comes of a part, or its mistake, in a file."""
    with pathlib.Path(part.file).open("rb") as file:
        file.seek(part.start)
        lines = io.BytesIO(file.read(part.size))
    name = folder / str(part.number)
    try:
        located = records.located(lines, part.file, part.first_line)
        made = [function(record) for _, record in located]
    except UsageError as error:
        # A mistake is the user's: for Beam it would be a failure, to be tried again.
        with files.replacing(name.with_suffix(".mistake")) as unfinished:
            unfinished.write_text(str(error), encoding="utf-8")
        return
    with files.replacing(name.with_suffix(".jsonl")) as unfinished:
        unfinished.write_text(
            "".join("\n" if record is None else record.to_line() for record in made), "utf-8"
        )


def _results(part: _Part, folder: pathlib.Path) -> Iterator[Record | None]:
    name = folder / str(part.number)
    mistake = name.with_suffix(".mistake")
    if mistake.exists():
        raise UsageError(mistake.read_text("utf-8"))
    made = name.with_suffix(".jsonl")
    if not made.exists():
        raise UsageError(
            f"beam_options: expected the workers to write {made}, which is not there. Input and "
            "output must lie on a file system that every worker sees."
        )
    with made.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            where = f"{made}:{number}"
            yield (Record.from_json(files.parse_line(line, where), where) if line.strip() else None)
