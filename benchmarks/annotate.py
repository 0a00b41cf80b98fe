r"""What `annotate` costs: processor time and memory, with a short list and with a long one.

    TNT_JAX_SHARED=/folder python benchmarks/annotate.py --records=100000

Records are the posts of SemEval-2021 task 5, repeated with new ids; the vocabulary is T5's.
TNT_JAX_SHARED has data/toxic_spans/tsd_train.csv and data/t5_vocab/sentencepiece.model. The lists
of `Lexicon` are ten insults, and those with the words that are most frequent in the posts after the
first 300: the long one marks 7 words of a post, each with all others as alternatives. A row is a
process of its own. "A million" is what the time came to for so many records; "a million more" is
the difference between both numbers of records, without what a run does once.

Takes 3 minutes of one core and 0.4 GB of memory with --records=100000.
"""

import argparse
import collections
import contextlib
import csv
import json
import os
import pathlib
import sys
import tempfile
import time
from typing import Any

import report

TEN = ["stupid", "idiot", "idiots", "ignorant", "moron", "fool", "loser", "dumb"]
TEN += ["pathetic", "ridiculous"]


def shared(name):
    """The path of a shared file."""
    return pathlib.Path(os.environ["TNT_JAX_SHARED"]) / "data" / name


def write_lists(folder):
    """Writes a list of 10 words and one of 2,000; gives the posts."""
    with shared("toxic_spans/tsd_train.csv").open(encoding="utf-8") as file:
        posts = [row["text"] for row in csv.DictReader(file)]
    counts = collections.Counter(
        word.lower() for post in posts for word in post.split() if word.isalpha() and len(word) > 3
    )
    frequent = [word for word, _ in counts.most_common()[300:] if word not in TEN]
    for number in (10, 2000):
        (folder / f"{number}.txt").write_text("\n".join([*TEN, *frequent][:number]))
    return posts


def measure(folder, num_words, num_records):
    """Processor seconds, bytes at most, bytes of output and of its table, and marks."""
    from tnt_jax import annotate, annotators
    from tnt_jax.data import records
    from tnt_jax.tokenizers import tokenization

    folder = pathlib.Path(folder)
    output = folder / f"{num_words}-{num_records}.marked.jsonl"
    lexicon: Any = annotators.Lexicon(path=str(folder / f"{num_words}.txt"))
    began = time.process_time()
    annotate.annotate(
        output=str(output),
        input=str(folder / f"{num_records}.jsonl"),
        annotator=lexicon,
        vocabulary=tokenization.SentencePiece(str(shared("t5_vocab/sentencepiece.model")), 100),
    )
    used, peak = time.process_time() - began, report.peak()
    table = pathlib.Path(f"{output}.sets.jsonl")
    table_size = table.stat().st_size if table.exists() else 0
    num_marks = sum(len(row.negative_spans or ()) for row in records.iterate(output))
    return [used, peak, output.stat().st_size, table_size, num_marks]


def rows(folder, numbers):
    """What is printed of each list."""
    for num_words in (10, 2000):
        found = {}
        for number in numbers:
            arguments = ["--measure", folder, str(num_words), str(number)]
            found[number] = report.apart(__file__, arguments)
            if found[number] is None:
                raise SystemExit(1)
            used, peak, size, of_table, num_marks = found[number]
            yield (
                *(f"{num_words:,}", f"{number:,}", num_marks / number, 1e6 * used / number),
                *(peak / 1e6, size / number, of_table),
            )
        (few, *before), (many, *after) = (found[number][:2] for number in numbers)
        a_million = 1e6 / (numbers[1] - numbers[0])
        yield (
            *(f"{num_words:,}", "a million more", "", (many - few) * a_million),
            *((after[0] - before[0]) * a_million / 1e6, "", ""),
        )


def main():
    """Prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--records", type=int, default=100_000)
    parser.add_argument("--measure", nargs=3, help="for the processes that this one starts")
    flags = parser.parse_args()
    if flags.measure:
        with contextlib.redirect_stdout(sys.stderr):
            found = measure(flags.measure[0], *map(int, flags.measure[1:]))
        print(json.dumps(found))
        return
    report.heading(("numpy", "sentencepiece", "msgspec"), is_apart=True)
    with tempfile.TemporaryDirectory() as folder:
        posts = write_lists(pathlib.Path(folder))
        numbers = (flags.records // 4, flags.records)
        for number in numbers:
            with (pathlib.Path(folder) / f"{number}.jsonl").open("w", encoding="utf-8") as file:
                for n in range(number):
                    row = {"id": f"r{n}", "inputs": "x", "targets": posts[n % len(posts)]}
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
        head = ("words", "records", "marks a record", "processor s a million")
        head += ("largest resident set, MB", "bytes a record", "bytes of the table")
        report.table(head, rows(folder, numbers))


if __name__ == "__main__":
    main()
