r"""What examples cost before the first update, while they are read, and in which format.

    TNT_JAX_SHARED=/folder python benchmarks/data_path.py --examples=100000

Records are the posts of SemEval-2021 task 5 with their marks, as replies to the messages of
chitchat-dataset ("posts"), and pairs of its messages without marks ("messages"), repeated with new
ids; the vocabulary is T5's. TNT_JAX_SHARED has data/toxic_spans/tsd_train.csv and
data/t5_vocab/sentencepiece.model. Every measurement is in a process of its own. "A million" is ten
times what 100,000 took: nothing here is more than linear but a sort of ids (0.1 s a million).

- Making: processor seconds of all processes, and seconds on the clock, from records to files; and,
  "in memory", what a start took and takes where none are kept.
- Formats: the same examples as Arrow's IPC file, mapped, and as an ArrayRecord of one record a
  group; microseconds of a random example, read into NumPy arrays.
- Starts: a second start of `train` (T5 1.1 tiny, 16 rows) with so many examples and with 1,000, to
  the end of its first update; the largest resident set after 40 updates; `input_wait_fraction`.
- Memory: what loading a data set and making 640 batches of 16 rows adds to the resident set of a
  process without JAX, at most. (That of `train` differs by 20 MB from run to run.)
- Packing: microseconds of processor time an example, planned anew.

`--tables making starts` prints these two alone. "A million" is a real one with --examples=1000000.
Takes 10 minutes of two cores with --examples=100000, 2 GB of memory, and 300 MB of disk.
"""

import argparse
import ast
import contextlib
import csv
import functools
import json
import os
import pathlib
import resource
import sys
import tempfile
import time

import numpy as np
import report

LENGTHS = {"inputs": 64, "targets": 128}
NUM_READ = 20_000


def vocabulary():
    """T5's."""
    from tnt_jax.tokenizers import tokenization

    folder = pathlib.Path(os.environ["TNT_JAX_SHARED"]) / "data"
    return tokenization.SentencePiece(str(folder / "t5_vocab" / "sentencepiece.model"), 100)


def write_records(folder, number):
    """Writes posts.jsonl, messages.jsonl and few.jsonl, which has the first 1,000 posts."""
    from tnt_jax.experiments.corpora import chitchat

    chitchat(folder / "chitchat")
    pairs = [json.loads(line) for line in (folder / "chitchat" / "train.jsonl").open()]
    source = pathlib.Path(os.environ["TNT_JAX_SHARED"]) / "data" / "toxic_spans" / "tsd_train.csv"
    with source.open(encoding="utf-8") as file:
        posts = [(row["text"], spans_of(row["spans"])) for row in csv.DictReader(file)]

    def write(name, count, targets_of):
        with (folder / name).open("w", encoding="utf-8") as file:
            for n in range(count):
                targets, spans = targets_of(n)
                row = {"id": f"r{n}", "inputs": pairs[n % len(pairs)]["inputs"]}
                row |= {"targets": targets, "negative_spans": spans}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")

    write("posts.jsonl", number, lambda n: posts[n % len(posts)])
    write("few.jsonl", 1000, lambda n: posts[n % len(posts)])
    write("messages.jsonl", number, lambda n: (pairs[n % len(pairs)]["targets"], []))


def spans_of(text):
    """Stretches of characters, from a list of all of their places."""
    spans = []
    for place in sorted(ast.literal_eval(text)):
        if spans and spans[-1][1] == place:
            spans[-1][1] += 1
        else:
            spans.append([place, place + 1])
    return spans


def processor_seconds():
    """How much this process has used so far, and the processes that it has waited for."""
    used = [resource.getrusage(w) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


# ------------------------------------------------------------------ Each in a process of its own


def make(path, num_processes):
    """Makes examples: in memory, where there are no processes to make them."""
    from tnt_jax.data import datasets, example_maker

    example_maker._num_processes = lambda: num_processes
    folder = f"{path}.{num_processes}.examples" if num_processes else None
    dataset = datasets.RecordFiles(files=path, vocabulary=vocabulary(), examples_dir=folder)
    datasets._SMALLEST = 2**60
    before, began = processor_seconds(), time.perf_counter()
    examples = dataset.load(LENGTHS)
    number = len(examples)
    return [(processor_seconds() - before) / number, (time.perf_counter() - began) / number]


def read(path, kind):
    """Writes examples in a format, and reads some at random; seconds of each, and bytes."""
    from tnt_jax.data import datasets
    from tnt_jax.data.examples import take as take_examples
    from tnt_jax.data.examples import to_bytes

    dataset = datasets.RecordFiles(
        files=path, vocabulary=vocabulary(), examples_dir=f"{path}.1.examples"
    )
    examples = dataset.load(LENGTHS)
    chosen = np.random.default_rng(0).integers(0, len(examples), NUM_READ)
    began = processor_seconds()
    if kind == "arrow":
        take, file = arrow(path, examples)
    elif kind == "array_record":
        take, file = array_record(path, (to_bytes(example) for example in examples))
    else:
        take, file = (
            functools.partial(take_examples, examples),
            next(pathlib.Path(f"{path}.1.examples").glob("*/rows.bin")),
        )
    wrote, before = processor_seconds() - began, resident()
    began = processor_seconds()
    for start in range(0, NUM_READ, 32):
        take(chosen[start : start + 32])
    seconds = processor_seconds() - began
    wrote = None if kind == "flat" else 1e6 * wrote / len(examples)
    size = pathlib.Path(file).stat().st_size / len(examples)
    return [wrote, 1e6 * seconds / NUM_READ, size, (resident() - before) / 1e6]


def resident():
    """Bytes that this process has in memory now, mapped files included."""
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def arrow(path, examples):
    """Columns of lists of int32, in an IPC file that is mapped."""
    import pyarrow as pa

    schema = pa.schema([(name, pa.list_(pa.int32())) for name in ("inputs", "targets", "marks")])
    file = f"{path}.arrow"
    with pa.OSFile(file, "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for start in range(0, len(examples), 10_000):
            some = examples[start : start + 10_000]
            columns = [
                [example.inputs for example in some],
                [example.targets for example in some],
                [example.negative_pairs.reshape(-1) for example in some],
            ]
            writer.write_batch(pa.record_batch([pa.array(c) for c in columns], schema=schema))
    table = pa.ipc.open_file(pa.memory_map(file)).read_all()

    def take(indices):
        rows = table.take(indices)
        return [
            [rows.column(name)[row].values.to_numpy() for name in schema.names]
            for row in range(len(indices))
        ]

    return take, file


def array_record(path, contents):
    """A record for each example, in groups of one."""
    from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]

    file = f"{path}.array_record"
    writer = array_record_module.ArrayRecordWriter(file, "group_size:1,uncompressed")
    for content in contents:
        writer.write(content)
    writer.close()
    reader = array_record_module.ArrayRecordReader(file)
    return lambda indices: [
        np.frombuffer(content, np.int32) for content in reader.read(indices.tolist())
    ], file


def start(path, num_updates):
    """Trains for some updates; processor seconds, seconds, bytes at most, part spent waiting."""
    import optax

    from tnt_jax import objectives, train
    from tnt_jax.data import datasets
    from tnt_jax.models import t5_config
    from tnt_jax.training import settings

    began = time.perf_counter()
    tiny = t5_config.T5Config(
        vocab_size=32128,
        emb_dim=32,
        num_heads=2,
        num_encoder_layers=2,
        num_decoder_layers=2,
        head_dim=16,
        mlp_dim=64,
        mlp_activations=("gelu", "linear"),
        logits_via_embedding=False,
    )
    with tempfile.TemporaryDirectory() as model_dir:
        train.train(
            model_dir=model_dir,
            model=tiny,
            objective=objectives.TntObjective(
                negative_term="reverse_kl", positive_term="forward_kl"
            ),
            dataset=datasets.RecordFiles(
                files=path, vocabulary=vocabulary(), examples_dir=f"{path}.1.examples"
            ),
            original_choice=settings.OriginalChoice(path=None),
            update=settings.Update(
                batch_size=16, task_feature_lengths=LENGTHS, optimizer=optax.adafactor(1e-3)
            ),
            schedule=settings.Schedule(train_steps=num_updates, log_every=num_updates),
        )
        lines = pathlib.Path(model_dir, "metrics.jsonl").read_text().splitlines()
    waited = json.loads(lines[-1])["input_wait_fraction"]
    return [processor_seconds(), time.perf_counter() - began, report.peak(), waited]


def hold(path, is_packed):
    """Bytes that a data set and its batches add to the largest resident set."""
    from tnt_jax.data import datasets
    from tnt_jax.data.batches import Batches
    from tnt_jax.data.examples import digest

    known = vocabulary()
    known.encode("the tokeniser's own memory")
    before = resident()
    examples = datasets.RecordFiles(
        files=path, vocabulary=known, examples_dir=f"{path}.1.examples"
    ).load(LENGTHS)
    digest(examples)
    batches = Batches(examples, 16, LENGTHS, seed=0, pack=bool(is_packed))
    batches.padding()
    for k in range(640):
        batches.batch(k)
    return report.peak() - before


def memory(folder, number):
    """Rows: what a data set adds, of many examples and of few."""
    for is_packed, said in ((0, "unpacked"), (1, "packed, planned"), (1, "packed, planned before")):
        few, many = (
            in_a_process("hold", folder / f"{name}.jsonl", is_packed) / 1e6
            for name in ("few", "posts")
        )
        yield said, few, many, (many - few) * 1e6 / (number - 1000)


def pack(path):
    """Microseconds of processor time that placing an example takes, and examples a row."""
    from tnt_jax.data import datasets, packing
    from tnt_jax.data.examples import lengths_of
    from tnt_jax.data.layouts import CAUSAL, ENCODER_DECODER

    dataset = datasets.RecordFiles(
        files=path, vocabulary=vocabulary(), examples_dir=f"{path}.1.examples"
    )
    lengths = lengths_of(dataset.load(LENGTHS))
    found = []
    for layout in (ENCODER_DECODER, CAUSAL):
        sizes = layout.sizes(lengths, LENGTHS)
        before = time.process_time()
        rows = packing.pack(sizes, layout.capacity(LENGTHS))
        found.append((time.process_time() - before) * 1e6 / len(sizes))
        found.append(len(sizes) / len(rows))
    return found


# ------------------------------------------------------------------------------------- The tables


def in_a_process(name, *arguments):
    """What one of the functions above finds in a process of its own."""
    found = report.apart(__file__, ["--measure", name, *map(str, arguments)])
    if found is None:
        raise SystemExit(1)
    return found


def making(folder, _):
    """Rows: processor seconds and seconds a million."""
    for kind in ("posts", "messages"):
        for number, said in ((0, "in memory"), (1, "files, 1 process"), (2, "files, 2 processes")):
            found = in_a_process("make", folder / f"{kind}.jsonl", number)
            yield (kind, said, *(1e6 * seconds for seconds in found))


def formats(folder, _):
    """Rows: writing, random reads, bytes an example, and what reading adds to the resident set."""
    for kind, said in (
        ("flat", "flat arrays"),
        ("arrow", "Arrow"),
        ("array_record", "ArrayRecord"),
    ):
        yield (said, *in_a_process("read", folder / "posts.jsonl", kind))


def starts(folder, number):
    """Rows: a start with few examples, with many, and what a million more would take."""
    in_a_process("make", folder / "few.jsonl", 1)
    in_a_process("start", folder / "few.jsonl", 1)  # what the compile cache keeps
    few, many = {}, {}
    for name, found in (("few", few), ("posts", many)):
        path = folder / f"{name}.jsonl"
        used, seconds, _, _ = in_a_process("start", path, 1)
        _, _, peak, waited = in_a_process("start", path, 40)
        found |= {"used": used, "seconds": seconds, "peak": peak / 1e6, "waited": waited}
    for count, found in ((1000, few), (number, many)):
        yield (f"{count:,}", *list(found.values())[:3], f"{found['waited']:.1%}")
    a_million = 1e6 / (number - 1000)
    more = [(many[name] - few[name]) * a_million for name in ("used", "seconds", "peak")]
    yield ("a million more", *more, "-")


def packing(folder, _):
    """Rows: what planning a row takes, and how much goes into one."""
    found = in_a_process("pack", folder / "posts.jsonl")
    return zip(("encoder and decoder", "decoder alone"), found[::2], found[1::2], strict=True)


# Of each table the titles of its columns, with the number of examples, and what makes its rows.
TABLES = {
    "making": (("records", "examples are made", "processor s a million", "s a million"), making),
    "formats": (
        ("format", "written, us", "a random one, us", "bytes", "reading adds, MB"),
        formats,
    ),
    "starts": (
        ("examples", "processor s to the end", "s", "largest resident set, MB", "waiting"),
        starts,
    ),
    "memory": (("batches", "1,000 examples, MB", "{}, MB", "a million more, MB"), memory),
    "packing": (("layout", "us an example", "examples a row"), packing),
}


def main():
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--examples", type=int, default=100_000)
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES))
    parser.add_argument("--measure", nargs="+", help="for the processes that this one starts")
    flags = parser.parse_args()
    if flags.measure:
        name, *arguments = flags.measure
        arguments = [int(text) if text.isdecimal() else text for text in arguments]
        with contextlib.redirect_stdout(sys.stderr):
            found = globals()[name](*arguments)
        print(json.dumps(found))
        return
    report.heading(is_apart=True)
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch)
        write_records(folder, flags.examples)
        for name in flags.tables:
            head, rows = TABLES[name]
            report.table(
                [title.format(f"{flags.examples:,}") for title in head],
                rows(folder, flags.examples),
            )
            print(flush=True)


if __name__ == "__main__":
    main()
