"""The formats that the programs read: a small valid input of each, and how it is read.

For `fuzz.py`. Each has a function that writes a valid input, and one that reads it as the programs
do. What both need, and nothing damages, is in `COMMON`, which `write_common` fills.
"""

import contextlib
import dataclasses
import functools
import io
import json
import pathlib
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import gin
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from tnt_jax import annotate, annotators, convert, report
from tnt_jax.checkpoints import orbax, pretrained
from tnt_jax.data import (
    batches,
    datasets,
    example_maker,
    mark_alternatives,
    records,
    removed_everywhere,
)
from tnt_jax.data.examples import COLUMNS, Example
from tnt_jax.data.layouts import CAUSAL
from tnt_jax.models import adapters, sharding, t5
from tnt_jax.models.model import Model
from tnt_jax.patching import prompt_files, search
from tnt_jax.patching.unwanted import Unwanted
from tnt_jax.runtime import gin_files, output_parts, program, stages
from tnt_jax.tokenizers import tokenization, vocabularies
from tnt_jax.training import original_cache
from tnt_jax.watching import metric_writers

sys.path.append(str(pathlib.Path(__file__).parents[1] / "tests"))
from helpers import gguf_writer, outputs, rooms, tiny_tokenizers
from helpers.chat_templates import TEMPLATES
from helpers.huggingface_model import TINY, write_directory

Folder = pathlib.Path
LENGTHS = {"inputs": 8, "targets": 16}
COMMON = "common"


@dataclasses.dataclass(frozen=True)
class Format:
    """A format of files.

    Attributes:
      write: Fills an empty folder, seen from the folder that has `COMMON`.
      read: Reads a folder, as programs do.
      share: How many inputs it gets, compared with others.
      pattern: Of the files that are damaged.
    """

    write: Callable[[Folder], None]
    read: Callable[[Folder], None]
    share: float = 1.0
    pattern: str = "**/*"


def write_json(path: Folder, value: Any) -> None:
    """Writes JSON, as most of these files are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def write_lines(path: Folder, rows: Sequence[Any]) -> None:
    """Writes JSONL."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_common(folder: Folder) -> None:
    """Writes a vocabulary, a chat model's tokenizer and a list of words."""
    folder.mkdir()
    rooms.write_world(folder)
    tiny_tokenizers.qwen(folder / "qwen", chat_template=TEMPLATES["qwen"])


@functools.cache
def vocabulary() -> Any:
    """T5's vocabulary, which nothing damages."""
    return tokenization.SentencePiece(f"{COMMON}/vocabulary.model", 0)


@functools.cache
def chat_vocabulary() -> Any:
    """A chat model's vocabulary, which nothing damages."""
    return pretrained.vocabulary(f"{COMMON}/qwen", chat_date="2026-01-01")


def rows_of_records() -> list[dict[str, Any]]:
    """Records with all fields: spans and ids with and without strengths."""
    found = []
    for number, row in enumerate(rooms.marked_corpus()[:8]):
        spans = [list(span) for span in row.negative_spans or ()]
        fields = {**row.to_json(), "negative_spans": spans, "annotator": "by hand", "bad": True}
        if number % 2:
            fields["target_ids"] = [*vocabulary().encode(row.targets), 1]
            fields["negative_token_ids"] = [[3, [7, 9]], [2, [4], 0.25], [1, [5, 6], -2.0]]
        else:
            fields["negative_spans"] = [[*span, 0.5] for span in spans]
        found.append(fields)
    return found


# --------------------------------------------------------------------------------------- Records


def write_records(folder: Folder) -> None:
    """Annotated records, with ids that are removed everywhere."""
    rows = [records.Record.from_json(row, "rows:1") for row in rows_of_records()]
    everywhere = removed_everywhere.Ids([5, 9], {"words": ["dirty"]})
    removed_everywhere.write_records(folder / "records.jsonl", rows, everywhere)


def read_records(folder: Folder) -> None:
    """Reads records as `train` does, in both of its ways, and writes them as `annotate` does."""
    path = str(folder / "records.jsonl")
    rows = records.read_records(path)
    records.write_records(folder / "again.jsonl", rows)
    data = datasets.RecordFiles(files=path, vocabulary=vocabulary())
    data.removed_everywhere()
    for _ in batches.batch_for_eval(data.load(LENGTHS), 4, LENGTHS):
        pass
    dataclasses.replace(data, examples_dir=str(folder / "kept")).load(LENGTHS)


def write_prompts(folder: Folder) -> None:
    """Prompts as text and as JSONL, and outputs with marks and labels."""
    rows = [row.to_json() for row in rooms.marked_corpus()]
    for number, row in enumerate(rows):
        row["bad"] = number % 2 == 0
    texts = [row["inputs"] for row in rows]
    (folder / "prompts.txt").write_text("\n".join(texts) + "\n")
    write_lines(folder / "prompts.jsonl", [{"inputs": text} for text in texts])
    write_lines(folder / "outputs.jsonl", rows)
    write_lines(folder / "eval.jsonl", [{"id": text, "inputs": f"the {text}"} for text in texts])
    marks = [{"id": row["id"], "negative_spans": row["negative_spans"]} for row in rows]
    write_lines(folder / "marks.jsonl", marks)


def read_prompts(folder: Folder) -> None:
    """Reads prompts as `patch` does, with each way to say what is unwanted."""

    def path(name: str) -> str:
        return str(folder / name)

    for prompts, unwanted in (
        (path("prompts.txt"), Unwanted(words=f"{COMMON}/words.txt")),
        (path("prompts.jsonl"), Unwanted(words=f"{COMMON}/words.txt")),
        (path("outputs.jsonl"), Unwanted(spans=path("marks.jsonl"))),
        (path("outputs.jsonl"), Unwanted(labels="bad")),
        (None, Unwanted(records=path("outputs.jsonl"))),
    ):
        prompt_files.Texts.read(prompts, path("eval.jsonl"), unwanted)


def write_chat(folder: Folder) -> None:
    """Conversations in our form and in TRL's."""
    user = {"role": "user", "content": "Which place in the city centre?"}
    system = {"role": "system", "content": "user assistant system"}
    reply = {"role": "assistant", "content": "the café is cheap."}
    marks = {"negative_spans": [[4, 8]]}
    write_lines(
        folder / "records.jsonl",
        [
            {"id": "a", "messages": [system, user], "targets": "the house", **marks},
            {"id": "b", "messages": [user, reply, user, reply], **marks},
            {"id": "c", "prompt": [user], "completion": [reply], **marks},
            {"id": "d", "prompt": "the area", "completion": "in the area", **marks},
        ],
    )


def read_chat(folder: Folder) -> None:
    """Reads conversations as `train` does for a chat model."""
    path = str(folder / "records.jsonl")
    data = datasets.RecordFiles(files=path, vocabulary=chat_vocabulary())
    examples = data.load(LENGTHS)
    for _ in batches.batch_for_eval(examples, 4, LENGTHS, feature_layout=CAUSAL):
        pass


def write_lists(folder: Folder) -> None:
    """What each annotator reads."""
    values = {"state": {"dirty": ["filthy"], "noisy": []}, "size": ["small", "large"]}
    (folder / "words.txt").write_text("# unwanted\ndirty\nnoisy rooms\ncafé\n")
    write_json(folder / "values.json", values)
    write_lines(folder / "marks.jsonl", rows_of_records())
    rows = [("the acorn room is small and dirty.", [28, 29, 30, 31, 32]), ('a "quoted", text', [])]
    lines = ['"{}","{}"'.format(text.replace('"', '""'), spans) for text, spans in rows]
    (folder / "marks.csv").write_text("text,spans\n" + "\n".join(lines) + "\n")


def read_lists(folder: Folder) -> None:
    """Marks an output by each of the files, as `annotate` does."""
    record = records.Record.from_json(rows_of_records()[0], "rows:1")
    by_text = {"match": "text", "unmatched": "leave_out"}
    for annotator in (
        annotators.Lexicon(path=str(folder / "words.txt"), at_every_position=True),
        annotators.Gazetteer(path=str(folder / "values.json"), at_every_position=True),
        annotators.Spans(path=str(folder / "marks.jsonl"), unmatched="leave_out"),
        annotators.Spans(path=str(folder / "marks.csv"), **by_text),
    ):
        completions = mark_alternatives.Completions(vocabulary())
        annotate.mark(record, annotator, vocabulary(), completions=completions)


# ------------------------------------------------------------------------------------------- gin


def write_gin(folder: Folder) -> None:
    """A run file of somebody's own, in several files."""
    whole = (gin_files.GIN_CONFIGS / "runs" / "train.gin").read_text("utf-8")
    (folder / "run.gin").write_text('include "damaged/model.gin"\n' + whole)
    (folder / "model.gin").write_text((Folder(COMMON) / "tiny.gin").read_text("utf-8"))
    settings = {"RECORDS": "nowhere.jsonl", "INITIAL_CHECKPOINT_PATH": "nowhere"}
    settings |= {"MODEL_DIR": "model", "TASK_FEATURE_LENGTHS": LENGTHS, "BATCH_SIZE": 16}
    settings |= {"LEARNING_RATE": 3e-3, "TRAIN_STEPS": 20, "VOCABULARY_PATH": "vocabulary.model"}
    text = "".join(f"{name} = {value!r}\n" for name, value in settings.items())
    (folder / "own.gin").write_text(f"import optax\n\n{text}OPTIMIZER = @optax.adam\n")


def read_gin(folder: Folder) -> None:
    """All that `train` does with its settings before it begins."""
    names = ("run.gin", "objectives/tnrf.gin", "own.gin")
    files = [str(folder / name) if "/" not in name else name for name in names]
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # warnings of macros that nothing reads
            program.configure("tnt_jax.train", "train", [f"--gin_file={name}" for name in files])
    finally:
        gin.clear_config()


# ------------------------------------------------------------------------------------ Tokenizers


def write_hub_tokenizers(folder: Folder) -> None:
    """BPE of each kind, with chat templates, each in a folder."""
    for name, make in tiny_tokenizers.KINDS.items():
        settings = {"chat_template": TEMPLATES[name]} if name in TEMPLATES else {}
        make(folder / name, **settings)


def read_hub_tokenizers(folder: Folder) -> None:
    """The one that is damaged, as programs open and use it."""
    for kind in sorted(folder.iterdir()):
        if is_unchanged(kind):
            continue
        use_vocabulary(pretrained.vocabulary(str(kind), chat_template=None))


def use_vocabulary(found: Any) -> None:
    """What is done with a vocabulary before and in a run."""
    tokenization.check_vocabulary(found)
    for text in (*tiny_tokenizers.TEXTS, "", "a" * 200):
        ids = found.encode(text)
        found.decode(ids)
        found.extents(np.array(ids, np.int32))
    found.token_bytes  # noqa: B018 - a property that reads all pieces


def write_t5_tokenizers(folder: Folder) -> None:
    """A sentencepiece file, one in a directory, a `tokenizer.json` of T5's, and ByT5's."""
    shutil.copy(f"{COMMON}/vocabulary.model", folder / "vocabulary.model")
    texts = [*tiny_tokenizers.TEXTS, *(row["targets"] for row in rows_of_records())]
    tiny_tokenizers.byte_fallback_sentencepiece(folder / "bytes.model", texts, 320)
    for name in ("directory", "unigram", "byt5"):
        (folder / name).mkdir()
    vocabularies.write(epath.Path(folder / "directory"), vocabulary())
    write_json(folder / "directory" / "added_tokens.json", {"<extra_id_0>": 38, "<new>": 39})
    added = [{"id": 6 - i, "content": f"<extra_id_{i}>"} for i in range(2)]
    model = {
        "type": "Unigram",
        "unk_id": 2,
        "byte_fallback": False,
        "vocab": [["<pad>", 0.0], ["</s>", 0.0], ["<unk>", 0.0], ["▁the", -1.0], ["▁a", -2.0]],
    }
    content = {"added_tokens": added, "normalizer": None, "model": model}
    write_json(folder / "unigram" / "tokenizer.json", content)
    write_json(folder / "unigram" / "tokenizer_config.json", {"extra_ids": 2})
    settings = {"tokenizer_class": "ByT5Tokenizer", "extra_ids": 2}
    settings |= {"added_tokens_decoder": {"259": {"content": "<extra_id_0>"}}}
    write_json(folder / "byt5" / "tokenizer_config.json", settings)


def read_t5_tokenizers(folder: Folder) -> None:
    """The one that is damaged."""
    for path in sorted(folder.iterdir()):
        if not is_unchanged(path):
            use_vocabulary(pretrained.vocabulary(str(path)))


def write_templates(folder: Folder) -> None:
    """A chat template as a file."""
    (folder / "chat_template.jinja").write_text(TEMPLATES["qwen"])
    for path in Folder(COMMON, "qwen").iterdir():
        shutil.copy(path, folder)


def read_templates(folder: Folder) -> None:
    """The prompt of a conversation."""
    found: Any = pretrained.vocabulary(str(folder), chat_date="2026-01-01")
    pairs = (("user", "Which hotel?"), ("assistant", "None."), ("user", "Why {{ 1 }}?"))
    if hasattr(found, "template"):  # else it was lost, and the tokenizer has none
        try:
            found.prompt_ids("", pairs)
        finally:
            found.template._renderer.close()


# ---------------------------------------------------------------------------------------- Models


def write_t5(folder: Folder) -> None:
    """A directory of Hugging Face's."""
    write_directory(folder)
    own = tokenization.SentencePiece(f"{COMMON}/vocabulary.model", 0)
    vocabularies.write(epath.Path(folder), own)
    write_json(folder / "generation_config.json", {"max_length": 20, "eos_token_id": 1})


def write_sharded(folder: Folder) -> None:
    """The same, in several files with an index."""
    write_directory(folder, max_shard_bytes=9000)


def read_model(folder: Folder) -> None:
    """Every weight, and all of them on the device, with the vocabulary."""
    opened = pretrained.open_checkpoint(str(folder))
    for array in opened.weights.values():
        array.load()
    config = pretrained.config_of(pretrained.FromCheckpoint(), opened)
    model = Model(config=config, mesh=sharding.make_mesh(sharding.MeshShape()))
    opened.restore(model.abstract_params)
    if (opened.description / "tokenizer_config.json").exists():
        own = pretrained.vocabulary(str(folder), chat_template=None)
        pretrained.check_vocabulary(own, config, opened)


def write_causal(folder: Folder) -> None:
    """A decoder-only model in a directory, with its tokenizer."""
    shutil.copytree(f"{COMMON}/qwen", folder, dirs_exist_ok=True)
    gguf_writer.write_directory(folder, vocab_size=num_ids(folder))


def num_ids(folder: Folder) -> int:
    """The ids of a `tokenizer.json`."""
    content = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    ids = [*content["model"]["vocab"].values(), *(one["id"] for one in content["added_tokens"])]
    return max(ids) + 1


def write_gguf(folder: Folder) -> None:
    """GGUF files with byte-level BPE, in two types."""
    with tempfile.TemporaryDirectory() as other:
        source = Folder(other)
        write_causal(source)
        tokenizer = gguf_writer.byte_level(source, "qwen2")
        for kind in ("F32", "Q8_0"):
            path = folder / f"{kind}.gguf"
            gguf_writer.write_model(path, source, kind, tokenizer)


def read_gguf(folder: Folder) -> None:
    """The file that is damaged, with its tokenizer."""
    for path in sorted(folder.iterdir()):
        if not is_unchanged(path):
            read_model(path)

            use_vocabulary(pretrained.vocabulary(str(path), chat_template=None))


def writer_of_checkpoint(output_format: str, **settings: Any) -> Callable[[Folder], None]:
    """Writes a model in one of our formats or T5X's."""

    def write(folder: Folder) -> None:

        with tempfile.TemporaryDirectory() as other:
            source = Folder(other) / "model"
            write_t5(source)
            with contextlib.redirect_stdout(io.StringIO()):
                convert.convert(
                    input=str(source), output=str(folder), output_format=output_format, **settings
                )

    return write


def write_adapters(folder: Folder) -> None:
    """A run of adapters, with its notes, beside a model."""
    write_t5(Folder("beside"))
    added = adapters.init(t5.T5(TINY).abstract_params(), 2, jax.random.key(0))
    run = {
        "original": {"path": "beside", "digest": "0"},
        "adapters": {"alpha": 4.0, "rank": 2, "beside": "beside"},
        "data": {"num_examples": 1},
    }
    items = {"params": ocp.args.StandardSave(added), "run": ocp.args.JsonSave(run)}
    orbax.save_items(epath.Path(folder).absolute(), 0, items)


def read_adapters(folder: Folder) -> None:
    """Loads every array of a checkpoint with adapters, as `convert` does."""
    opened = pretrained.open_checkpoint(str(folder))
    for array in opened.weights.values():
        array.load()


# ----------------------------------------------------------------------------- Reports and notes


def write_report(folder: Folder) -> None:
    """A pipeline's folder, a pair of files with all that belongs to it, and a sweep's results."""
    outputs.write_pair(folder, 6, num_tokens=2)
    write_json(folder / "results.json", {"rows": outputs.results()["rows"][:4]})
    evaluation = {"annotator": "a list", **outputs.evaluation(6)}
    write_json(folder / "evaluation.json", evaluation)
    pipeline = folder / "pipeline"
    for arm in ("original", "TNRF"):
        (pipeline / arm).mkdir(parents=True)
    shutil.copy(folder / "original.jsonl", pipeline / "original" / "greedy.annotated.jsonl")
    shutil.copy(folder / "patched.jsonl", pipeline / "TNRF" / "greedy.annotated.jsonl")
    summary = {
        "evaluations": {"TNRF": {"greedy": evaluation}},
        "training": {"TNRF": {"alpha": 1.0, "seed": 0, "steps": 20}},
    }
    write_json(pipeline / "summary.json", summary)
    write_json(pipeline / "stages" / "train.json", {"described": None, "done": True})


def read_report(folder: Folder) -> None:
    """Reads evaluations and results as `report` and `convert --evaluation` do."""

    def path(name: str) -> str:
        return str(folder / name)

    with contextlib.redirect_stdout(io.StringIO()):
        report.report(
            output="report.html",
            original_records=path("original.jsonl"),
            current_records=path("patched.jsonl"),
            evaluation=path("evaluation.json"),
            tokens=path("tokens.jsonl"),
            results=path("results.json"),
        )
        report.report(output="report.html", pipeline_dir=path("pipeline"))
        convert._read_evaluation(path("evaluation.json"))


def write_examples(folder: Folder) -> None:
    """Examples in files, as `prepare` makes them, with what is kept beside them."""
    shutil.copy(f"{COMMON}/corpus.jsonl", "examples.jsonl")
    data = datasets.RecordFiles(
        files="examples.jsonl", vocabulary=vocabulary(), annotated=False, examples_dir=str(folder)
    )
    with contextlib.redirect_stdout(io.StringIO()):
        read_examples_of(data.load(LENGTHS))


def read_examples_of(examples: Any) -> None:
    """What training reads of a table of examples."""
    for name in COLUMNS:
        examples.column(name)
    examples.row_digests()
    examples.has_ids_below(100)
    order = examples.kept("order", lambda: np.arange(len(examples)))
    examples.take(np.asarray(order))
    for _ in batches.batch_for_eval(examples, 16, LENGTHS):
        pass


def read_examples(folder: Folder) -> None:
    """Reads stored examples as `train` does, which finds them by a digest of its settings."""
    data = datasets.RecordFiles(
        files="examples.jsonl", vocabulary=vocabulary(), annotated=False, examples_dir=str(folder)
    )
    with contextlib.redirect_stdout(io.StringIO()):
        read_examples_of(data.load(LENGTHS))


def states_in(folder: Folder) -> tuple[Any, list[Any]]:
    """Cached states of the original, and examples that have some."""
    ids = np.arange(2, 8, dtype=np.int32)
    examples = [Example(ids[:n], ids[:n], np.zeros((0, 2), np.int32)) for n in (3, 4, 5)]
    return original_cache.OriginalStates(str(folder), "of", LENGTHS), examples


def write_states(folder: Folder) -> None:
    """States of the original, as a run with ORIGINAL="cached" keeps them."""
    for dtype in (np.float32, jnp.bfloat16):
        place = folder / np.dtype(dtype).name
        states, examples = states_in(place)
        states.keep(examples, np.ones((len(examples), LENGTHS["targets"], 4), dtype))
        states.flush()


def read_states(folder: Folder) -> None:
    """Reads cached states as `train` does."""
    for place in sorted(folder.iterdir()):
        states, examples = states_in(place)
        if not states.missing([states.key(example) for example in examples]):
            for example in examples:
                states.of(example)


def write_notes(folder: Folder) -> None:
    """What runs leave for those that go on."""
    with contextlib.redirect_stdout(io.StringIO()):
        stages.Stages(folder / "run").run(
            "train", write_nothing, output=str(folder / "run" / "made"), inputs={}, settings={}
        )
        parts = output_parts.Parts(str(folder / "output.jsonl"), [1, 1], {"of": "these"})
        for part in parts.missing:
            parts.add(part, ['{"id": "a"}\n'], {"outputs": 1})
    with metric_writers.StepLines(folder / "metrics.jsonl") as lines:
        for step in range(4):
            lines.write(step, {"loss": 0.5 * step})
    for _ in work_of(folder / "kept").made():
        pass
    look = search.Look(
        attempt=search.Attempt(weight=1.0), updates=8, cut=0.5, bleu=90.0, unwanted={"greedy": 3}
    )
    found = search.Found(best=look, files="a", is_enough=True, looks=[look], reason="enough")
    search.write_note(folder / "search.json", {"enough": 1}, found)


def work_of(folder: Folder) -> Any:
    """The making of examples, in parts."""
    settings = {"marks": "whole", "loss_until": "end", "annotated": False}
    path = f"{COMMON}/corpus.jsonl"
    plan = example_maker.make_plan(path, vocabulary(), LENGTHS, settings)
    return example_maker._Work(folder / plan.key, plan)


def write_nothing(*, output: str) -> None:
    """A stage."""
    Folder(output).mkdir(parents=True, exist_ok=True)


def read_notes(folder: Folder) -> None:
    """Reads notes as the programs do when they go on after a stop."""
    with contextlib.redirect_stdout(io.StringIO()):
        run = stages.Stages(folder / "run")
        run.seconds("train")
        output = str(folder / "run" / "made")
        run.run("train", write_nothing, output=output, inputs={}, settings={})
        parts = output_parts.Parts(str(folder / "output.jsonl"), [1, 1], {"of": "these"})
        for part in parts.missing:
            parts.add(part, ['{"id": "a"}\n'], {"outputs": 1})
        parts.join(removed_everywhere.replacing(folder / "output.jsonl", None))
    work_of(folder / "kept").join()
    with metric_writers.StepLines(folder / "metrics.jsonl", 2) as lines:
        lines.write(3, {"loss": 1.0})
    search.read_note(folder / "search.json", {"enough": 1})


FORMATS = {
    "records": Format(write_records, read_records, 1.5),
    "prompts": Format(write_prompts, read_prompts),
    "chat": Format(write_chat, read_chat),
    "lists": Format(write_lists, read_lists, 1.5),
    "gin": Format(write_gin, read_gin, 1.5),
    "hub_tokenizers": Format(write_hub_tokenizers, read_hub_tokenizers, 1.5),
    "t5_tokenizers": Format(write_t5_tokenizers, read_t5_tokenizers),
    "templates": Format(write_templates, read_templates, 1, "*.j*"),
    "huggingface": Format(write_t5, read_model),
    "sharded": Format(write_sharded, read_model),
    "causal": Format(write_causal, read_model),
    "gguf": Format(write_gguf, read_gguf, 1.5),
    "t5x": Format(writer_of_checkpoint("t5x"), read_model),
    "t5x_scanned": Format(writer_of_checkpoint("t5x", scan_layers=True), read_model),
    "t5x_orbax": Format(writer_of_checkpoint("t5x_orbax"), read_model),
    "orbax": Format(writer_of_checkpoint("orbax"), read_model),
    "adapters": Format(write_adapters, read_adapters),
    "report": Format(write_report, read_report),
    "examples": Format(write_examples, read_examples),
    "states": Format(write_states, read_states),
    "notes": Format(write_notes, read_notes),
}


is_first = [False]  # whether what is valid is read for the first time


def is_unchanged(path: Folder) -> bool:
    """Whether what is at a path is as it was written, and was read before."""
    if is_first[0]:
        return False
    whole = Folder("valid", *path.parts[1:])

    def content(of: Folder) -> Any:
        if of.is_symlink() or not of.is_dir():
            return of.read_bytes() if of.is_file() else None
        return {one.name: content(one) for one in of.iterdir()}

    return whole.exists() and content(path) == content(whole)
