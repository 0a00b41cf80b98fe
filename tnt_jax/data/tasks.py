"""Examples from seqio tasks and mixtures. Importing this imports seqio and TensorFlow.

Any seqio task can be trained on whose features are `inputs` and `targets` (token ids) and, where
something is unwanted, `negative_ids`: rows (position, id) of ids to remove at target positions. A
feature `loss_mask` is used if there is one, and so is `negative_strengths`, a number up to 1 for
each of these rows. `record_task` makes such a task from files of records.
Your own task takes any seqio source, say `seqio.TfdsDataSource("your_data:1.0.0")`, renames its
fields to those of a record, and goes on with

    preprocessors=[..., tasks.tokenize_and_mark],
    output_features=tasks.record_features(vocabulary)

in a module that is named as MIXTURE_OR_TASK_MODULE (`tnt_jax.data.paper_tasks` is one).
"""

import contextlib
import dataclasses
import difflib
import functools
import importlib
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from tnt_jax.data import datasets, records, removed_everywhere
from tnt_jax.data.examples import Example, id_of, unique_pairs
from tnt_jax.data.marks import example_from_record, log_spans_without_token, prompt_ids
from tnt_jax.data.t5patches_layout import t5patches_target
from tnt_jax.runtime import console
from tnt_jax.runtime.errors import UsageError, system_error
from tnt_jax.tokenizers import tokenization

# --- Tokenisers -----------------------------------------------------------------------------------


class _SeqioPieces(tokenization.SentencePiece):
    """The pieces of a seqio vocabulary, with what it overrides in the model of its file."""

    vocabulary: seqio.SentencePieceVocabulary

    def __init__(self, vocabulary: seqio.SentencePieceVocabulary):
        super().__init__(vocabulary.sentencepiece_model_file, vocabulary.extra_ids)
        object.__setattr__(self, "vocabulary", vocabulary)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.vocabulary,)

    @functools.cached_property
    def processor(self) -> Any:
        """The loaded model: of the file, to say what is wrong with it, and then seqio's."""
        _ = super().processor
        return self.vocabulary.tokenizer


def tokeniser(vocabulary: seqio.Vocabulary | tokenization.Tokeniser) -> tokenization.Tokeniser:
    """Returns the tokeniser with the ids of a seqio vocabulary.

    Raises:
        UsageError: the vocabulary is of a kind that has no tokeniser here.
    """
    if isinstance(vocabulary, seqio.SentencePieceVocabulary):
        return _SeqioPieces(vocabulary)
    if isinstance(vocabulary, seqio.ByteVocabulary):
        return tokenization.Bytes(vocabulary.extra_ids)
    if isinstance(vocabulary, seqio.Vocabulary):
        raise UsageError(
            "vocabulary: expected a seqio SentencePieceVocabulary or ByteVocabulary, found "
            f"{type(vocabulary).__name__}."
        )
    return vocabulary


def seqio_vocabulary(vocabulary: seqio.Vocabulary | tokenization.Tokeniser) -> seqio.Vocabulary:
    """Returns the seqio vocabulary with the ids of a tokeniser, for the features of a task.

    Raises:
        UsageError: seqio has none for a tokeniser of this kind.
    """
    if isinstance(vocabulary, seqio.Vocabulary):
        return vocabulary
    if isinstance(vocabulary, tokenization.SentencePiece):
        return seqio.SentencePieceVocabulary(
            vocabulary.sentencepiece_model_file, vocabulary.extra_ids
        )
    if isinstance(vocabulary, tokenization.Bytes):
        return seqio.ByteVocabulary(vocabulary.extra_ids)
    raise UsageError(
        "vocabulary: expected a tokeniser that seqio has, too (tokenization.SentencePiece or "
        f"tokenization.Bytes), found {type(vocabulary).__name__}."
    )


# --- Preprocessors and tasks ----------------------------------------------------------------------


def record_features(
    vocabulary: seqio.Vocabulary | tokenization.Tokeniser,
) -> dict[str, seqio.Feature]:
    """The `output_features` of a task that `tokenize_and_mark` or `t5patches_mode` ends."""
    vocabulary = seqio_vocabulary(vocabulary)
    return {
        "inputs": seqio.Feature(vocabulary),
        "targets": seqio.Feature(vocabulary),
        "negative_ids": seqio.Feature(vocabulary, add_eos=False, rank=2),
        "negative_strengths": seqio.Feature(
            vocabulary, add_eos=False, required=False, dtype=tf.float32
        ),
        "loss_mask": seqio.Feature(vocabulary, add_eos=False, required=False),
    }


def tokenize_and_mark(
    dataset: tf.data.Dataset,
    output_features: Mapping[str, seqio.Feature],
    marks: str = "whole",
    loss_until: str = "end",
) -> tf.data.Dataset:
    """Preprocessor for seqio: from the fields of a record to token ids.

    For other marks than whole spans: `functools.partial(tokenize_and_mark, marks=...)`.

    Args:
        dataset: rows with `inputs` and `targets` (strings) and, where there are any, `id` (string),
            `target_ids` `[T]` (empty means not known), `negative_spans` `[N, 2]` and
            `negative_token_ids` `[N, 2]` rows (position, id), and the strengths of both, `[N]`, as
            `negative_span_strengths` and `negative_token_strengths` (empty means 1). Other fields
            stay.
        output_features: the task's features, which have its vocabularies.
        marks: what of a span counts as marked; see `datasets.RecordFiles`.
        loss_until: where the loss of a marked target ends; see `datasets.RecordFiles`.

    Returns:
        A data set of `inputs`, `targets` and `negative_ids` (token ids, EOS included),
        `negative_strengths` and `loss_mask`, with the texts as `inputs_pretokenized` and
        `targets_pretokenized`, and, to count what is lost, `span_numbers` and
        `num_spans_without_token`.
        Where a record has a mistake, iteration fails with the message of a UsageError.
    """
    vocabulary = tokeniser(output_features["targets"].vocabulary)

    def with_strengths(marks, strengths, name, field):
        if len(strengths) not in (0, len(marks)):
            raise UsageError(
                f"record {name!r}: {field}: expected a strength for each of {len(marks)} marks, "
                f"found {len(strengths)}."
            )
        strengths = strengths.astype(float).tolist() or [1.0] * len(marks)
        return zip(marks.tolist(), strengths, strict=True)

    def marked(name, inputs, targets, target_ids, spans, pairs, span_strengths, token_strengths):
        name = id_of(name)
        spans = with_strengths(spans, span_strengths, name, "negative_span_strengths")
        pairs = with_strengths(pairs, token_strengths, name, "negative_token_strengths")
        record = records.Record(
            id=name,
            inputs=inputs.decode(),
            targets=targets.decode(),
            target_ids=tuple(target_ids.tolist()) or None,
            negative_spans=tuple(
                records.with_strength(start, end, strength) for (start, end), strength in spans
            ),
            negative_token_ids=tuple(
                records.with_strength(position, (i,), strength) for (position, i), strength in pairs
            ),
        )
        example, num_spans_without_token = example_from_record(
            record, vocabulary, marks, loss_until
        )
        loss_mask, strengths = example.loss_mask, example.negative_strengths
        if strengths is None:
            strengths = np.ones(len(example.negative_pairs))
        return (
            example.inputs,
            example.targets,
            example.negative_pairs,
            strengths.astype(np.float32),
            np.ones_like(example.targets) if loss_mask is None else loss_mask,
            example.span_numbers,
            np.int32(num_spans_without_token),
        )

    def of_fields(fields):
        numbers = {
            name: tf.cast(fields[name], dtype) if name in fields else tf.zeros(shape, dtype)
            for name, shape, dtype in [
                ("target_ids", [0], tf.int32),
                ("negative_spans", [0, 2], tf.int32),
                ("negative_token_ids", [0, 2], tf.int32),
                ("negative_span_strengths", [0], tf.float32),
                ("negative_token_strengths", [0], tf.float32),
            ]
        }
        inputs, targets, negative_ids, strengths, loss_mask, span_numbers, num_without = (
            tf.numpy_function(
                marked,
                [fields.get("id", ""), fields["inputs"], fields["targets"], *numbers.values()],
                [*[tf.int32] * 3, tf.float32, *[tf.int32] * 3],
            )
        )
        return {
            **{name: value for name, value in fields.items() if name not in numbers},
            "inputs_pretokenized": fields["inputs"],
            "targets_pretokenized": fields["targets"],
            "inputs": tf.ensure_shape(inputs, [None]),
            "targets": tf.ensure_shape(targets, [None]),
            "negative_ids": tf.ensure_shape(negative_ids, [None, 2]),
            "negative_strengths": tf.ensure_shape(strengths, [None]),
            "loss_mask": tf.ensure_shape(loss_mask, [None]),
            "span_numbers": tf.ensure_shape(span_numbers, [None]),
            "num_spans_without_token": tf.ensure_shape(num_without, []),
        }

    return dataset.map(of_fields, num_parallel_calls=tf.data.AUTOTUNE)


def t5patches_mode(mode: str) -> Callable[[tf.data.Dataset], tf.data.Dataset]:
    """Returns a seqio preprocessor that reads the layout which google/t5patches published.

    It takes `inputs`, `negative_targets` and `corrected_targets`, all token ids, and makes
    `targets`, `negative_ids` and `loss_mask`: `t5patches_target` says how.

    Args:
        mode: one of `T5PATCHES_MODES`.

    Raises:
        UsageError: no such mode.
    """
    nothing = np.zeros(0, np.int32)
    t5patches_target(nothing, nothing, mode)  # fail here on a misspelt mode

    def of_fields(fields):
        targets, negative_ids, loss_mask = tf.numpy_function(
            lambda negative, corrected: t5patches_target(negative, corrected, mode),
            [fields["negative_targets"], fields["corrected_targets"]],
            [tf.int32] * 3,
        )
        return {
            **fields,
            "inputs": tf.cast(fields["inputs"], tf.int32),
            "targets": tf.ensure_shape(targets, [None]),
            "negative_ids": tf.ensure_shape(negative_ids, [None, 2]),
            "loss_mask": tf.ensure_shape(loss_mask, [None]),
        }

    return lambda dataset: dataset.map(of_fields, num_parallel_calls=tf.data.AUTOTUNE)


class _RecordSource(seqio.FunctionDataSource):
    """A source that knows its files of records, of each split."""

    def __init__(self, dataset_fn: Callable, files: Mapping[str, str]):
        super().__init__(dataset_fn, splits=tuple(files))
        self.files = files


def record_task(
    name: str,
    files: Mapping[str, str],
    vocabulary: seqio.Vocabulary | tokenization.Tokeniser,
    *,
    annotated: bool = True,
    marks: str = "whole",
    loss_until: str = "end",
) -> seqio.Task:
    """Registers files of records as a seqio task.

    Args:
        name: the task's name.
        files: a JSONL file, or a glob pattern, for each split.
        vocabulary: the tokeniser of inputs and targets.
        annotated: whether a record that nobody annotated is an error.
        marks: what of a span counts as marked; see `datasets.RecordFiles`.
        loss_until: where the loss of a marked target ends; see `datasets.RecordFiles`.
    """
    shapes = {
        "id": tf.TensorSpec([], tf.string),
        "inputs": tf.TensorSpec([], tf.string),
        "targets": tf.TensorSpec([], tf.string),
        "target_ids": tf.TensorSpec([None], tf.int32),
        "negative_spans": tf.TensorSpec([None, 2], tf.int32),
        "negative_token_ids": tf.TensorSpec([None, 2], tf.int32),
        "negative_span_strengths": tf.TensorSpec([None], tf.float32),
        "negative_token_strengths": tf.TensorSpec([None], tf.float32),
    }

    def dataset_fn(split, shuffle_files, seed=None):
        del shuffle_files, seed  # tnt_jax shuffles examples: Batches
        file = files[split]
        rows = datasets.check_trainable(records.read_records(file), file, annotated)
        for of_ids in removed_everywhere.files_of(file):
            console.log(
                f"{of_ids}: ids that an annotator removes at every position. tnt_jax.train removes "
                "them there; T5X does if objectives.TntObjective.removed_everywhere is bound "
                "(docs/howto_t5x.md)."
            )
        for record in rows:
            if record.messages:  # seqio's vocabularies are of no chat model
                prompt_ids(record, tokeniser(vocabulary))

        def of_rows():
            for record in rows:
                entries = record.negative_token_ids
                pairs = [(entry[0], i) for entry in entries for i in entry[1]]
                yield {
                    "id": record.id,
                    "inputs": record.inputs,
                    "targets": record.targets,
                    "target_ids": record.target_ids or (),
                    "negative_spans": np.reshape(record.offsets, (-1, 2)),
                    "negative_token_ids": np.reshape(pairs, (-1, 2)),
                    "negative_span_strengths": [
                        records.strength_of(span) for span in record.negative_spans or ()
                    ],
                    "negative_token_strengths": [
                        records.strength_of(entry) for entry in entries for _ in entry[1]
                    ],
                }

        return tf.data.Dataset.from_generator(of_rows, output_signature=shapes)

    return seqio.TaskRegistry.add(
        name,
        # seqio's protocol wants a number of examples that seqio's own sources need not know.
        source=_RecordSource(dataset_fn, files),  # pyright: ignore[reportArgumentType]
        preprocessors=[functools.partial(tokenize_and_mark, marks=marks, loss_until=loss_until)],
        output_features=record_features(vocabulary),
    )


# --- Loading --------------------------------------------------------------------------------------


def find_task(name: str, module: str | None = None) -> seqio.Task | seqio.Mixture:
    """The registered task or mixture.

    Args:
        name: MIXTURE_OR_TASK_NAME.
        module: MIXTURE_OR_TASK_MODULE, imported first so that it can register its tasks.

    Raises:
        UsageError: there is no such module or no such name.
    """
    if module:
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name and not f"{module}.".startswith(f"{error.name}."):
                raise  # the module is there, and itself misses another
            raise UsageError(
                f"MIXTURE_OR_TASK_MODULE: no module {module!r}. Expected an importable name such "
                "as 'tnt_jax.data.paper_tasks'; your own must lie in the working directory or on "
                "PYTHONPATH."
            ) from error
    names = {*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()}
    if name not in names:
        close = difflib.get_close_matches(name, names, n=3) or sorted(names)[:10]
        raise UsageError(
            f"MIXTURE_OR_TASK_NAME: no seqio task or mixture {name!r}; there are {close}. Set "
            "MIXTURE_OR_TASK_MODULE to the module that registers it."
        )
    return seqio.get_mixture_or_task(name)


def load_examples(
    task: str | seqio.Task | seqio.Mixture,
    task_feature_lengths: Mapping[str, int],
    split: str,
    vocabulary: tokenization.Tokeniser | None = None,
) -> list[Example]:
    """Reads one epoch of a task or mixture into memory, unshuffled and uncut.

    The epoch of a mixture holds every example at least once, and the examples of its tasks in the
    proportions of their rates: tasks that have too few for their rate are repeated.

    Args:
        task: the task, or the name of a registered one.
        task_feature_lengths: "inputs" and "targets"; given to preprocessors that ask for them.
        split: such as "train".
        vocabulary: to use instead of the task's own.

    Raises:
        UsageError: no such task or split, a TFDS data set that cannot be read, features that are
            not those of a record, or marks that do not fit their targets.
    """
    task = find_task(task) if isinstance(task, str) else task
    if isinstance(task, seqio.Task):
        return _load_task(task, task_feature_lengths, split, vocabulary)
    parts = [part for part in task.tasks if task.get_rate(part) > 0 and split in _splits(part)]
    if not parts:
        raise UsageError(f"mixture {task.name!r}: none of its tasks has a split {split!r}.")
    loaded = [_load_task(part, task_feature_lengths, split, vocabulary) for part in parts]
    rates = [task.get_rate(part) for part in parts]
    scale = max(len(examples) / rate for examples, rate in zip(loaded, rates, strict=True))
    return [
        example
        for examples, rate in zip(loaded, rates, strict=True)
        for example in itertools.islice(itertools.cycle(examples), round(rate * scale))
    ]


def prompts_from_task(
    task: str | seqio.Task | seqio.Mixture,
    split: str,
    vocabulary: tokenization.Tokeniser | None = None,
) -> list[records.Record]:
    """Reads texts to generate from: `inputs`, and the reference as `targets`.

    Texts are those before tokenisation if the task keeps them (as `inputs_pretokenized`), else they
    are decoded from its ids. A prompt whose id was used before, as the tasks of a mixture may, has
    its place as its id.

    Args:
        task: the task, or the name of a registered one.
        split: such as "validation".
        vocabulary: to use instead of the task's own.

    Raises:
        UsageError: as in `load_examples`.
    """
    task = find_task(task) if isinstance(task, str) else task
    located = [
        (_place(part, split, number), _prompt(row, part, split, number, vocabulary))
        for part in seqio.get_subtasks(task)
        for number, row in enumerate(_rows(part, None, split, vocabulary))
    ]
    return records.data_set(_named_apart(located, task.name), f"task {task.name!r}")


def _prompt(
    row: Mapping[str, Any],
    task: seqio.Task,
    split: str,
    number: int,
    vocabulary: tokenization.Tokeniser | None,
) -> records.Record:
    texts = {}
    for name, feature in task.output_features.items():
        if name in ("inputs", "targets"):
            text = row.get(f"{name}_pretokenized")
            texts[name] = (
                tokeniser(vocabulary or feature.vocabulary).decode(row[name])
                if text is None
                else text.decode()
            )
    return records.Record(id=_row_id(row, task, split, number), **texts)


def _named_apart(
    located: Sequence[tuple[str, records.Record]], task_name: str
) -> list[tuple[str, records.Record]]:
    """The prompts; those whose id was used before have their place as their id."""
    used: set[str] = set()
    named = []
    for place, prompt in located:
        again = prompt.id in used
        used.add(prompt.id)
        named.append((place, dataclasses.replace(prompt, id=place) if again else prompt))
    if num_renamed := len(named) - len(used):
        console.log(
            f"{task_name}: {num_renamed} of {len(named)} prompts have an id that was used before; "
            "in place of it they have the task's name, the split and their number."
        )
    return named


@dataclasses.dataclass(frozen=True, kw_only=True)
class SeqioDataset:
    """A data set that is a registered seqio task or mixture.

    Attributes:
        mixture_or_task_name: the name of the task or mixture.
        split: such as "train".
        mixture_or_task_module: imported first, so that it can register the task.
        vocabulary_override: a tokeniser or seqio vocabulary to use instead of the task's own; None
            takes that one.

    Raises:
        UsageError: there is no such module or task, or it has no targets.
    """

    mixture_or_task_name: str
    split: str = "train"
    mixture_or_task_module: str | None = None
    vocabulary_override: Any = None

    def __post_init__(self):
        task = find_task(self.mixture_or_task_name, self.mixture_or_task_module)
        if "targets" not in task.output_features:
            raise _feature_error(task, "targets", list(task.output_features))

    @property
    def vocabulary(self) -> tokenization.Tokeniser:
        """The tokeniser with the ids that `load` gives."""
        task = find_task(self.mixture_or_task_name)
        return tokeniser(self.vocabulary_override or task.output_features["targets"].vocabulary)

    def removed_everywhere(self) -> tuple[int, ...]:
        """What belongs to the files of records that the task, or the mixture's tasks, read."""
        found = find_task(self.mixture_or_task_name, self.mixture_or_task_module)
        files = {
            of.source.files[self.split]
            for of in seqio.get_subtasks(found)
            if isinstance(of.source, _RecordSource) and self.split in of.source.files
        }
        return tuple(sorted({id_ for file in files for id_ in removed_everywhere.of_records(file)}))

    def load(self, task_feature_lengths: Mapping[str, int]) -> list[Example]:
        """Reads one epoch into memory: see `load_examples`."""
        tokenization.check_vocabulary(self.vocabulary)
        examples = load_examples(
            self.mixture_or_task_name, task_feature_lengths, self.split, self.vocabulary_override
        )
        datasets.log_lost(examples, task_feature_lengths, self.mixture_or_task_name)
        return examples


def _load_task(
    task: seqio.Task,
    task_feature_lengths: Mapping[str, int],
    split: str,
    vocabulary: tokenization.Tokeniser | None,
) -> list[Example]:
    examples = []
    num_spans_without_token = 0
    end_ids = _end_ids(task, vocabulary)
    for number, row in enumerate(_rows(task, task_feature_lengths, split, vocabulary)):
        for name in ("inputs", "targets"):
            if name not in row or row[name].ndim != 1 or row[name].dtype.kind != "i":
                raise _feature_error(task, name, sorted(row))
        num_targets = len(row["targets"])
        pairs = row.get("negative_ids", np.zeros((0, 2), np.int32))
        strengths = row.get("negative_strengths")
        loss_mask = row.get("loss_mask", np.ones(num_targets, np.int32))
        numbers = row.get("span_numbers")
        if numbers is not None and len(numbers) != num_targets:
            numbers = None  # a later preprocessor has changed the targets
        name = _row_id(row, task, split, number)
        if not np.isin(pairs[:, 0], range(num_targets)).all():
            raise UsageError(
                f"task {task.name!r}, {name!r}: negative_ids has position {pairs[:, 0].max()}, but "
                f"there are {num_targets} targets. Expected rows (position, id)."
            )
        if strengths is not None and not (
            len(strengths) == len(pairs)
            and all(map(records.is_strength_of_ids, np.asarray(strengths).tolist()))
        ):
            raise UsageError(
                f"task {task.name!r}, {name!r}: negative_strengths: expected a number from "
                f"{records.LEAST_STRENGTH:g} to 1, but not 0, for each of {len(pairs)} rows of "
                f"negative_ids, found {np.asarray(strengths).tolist()[:20]}."
            )
        pairs, strengths = unique_pairs(pairs, strengths)
        if len(loss_mask) != num_targets or not np.isin(loss_mask, (0, 1)).all():
            raise UsageError(
                f"task {task.name!r}, {name!r}: loss_mask: expected {num_targets} values, each "
                f"0 or 1, found {loss_mask.tolist()}."
            )
        examples.append(
            Example(
                inputs=row["inputs"],
                targets=row["targets"],
                negative_pairs=pairs,
                negative_strengths=strengths,
                loss_mask=loss_mask * (row["targets"] != 0),  # seqio's padding
                span_numbers=numbers,
                id=name,
                keeps_last_input=bool(np.isin(row["inputs"][-1:], end_ids).any()),
            )
        )
        num_spans_without_token += int(row.get("num_spans_without_token", 0))
    if not examples:
        raise UsageError(f"task {task.name!r}: its split {split!r} has no examples.")
    log_spans_without_token(num_spans_without_token, task.name)
    return examples


def _end_ids(task: seqio.Task, vocabulary: tokenization.Tokeniser | None) -> list[int]:
    """The ids that end an input: those of `vocabulary`, or of the task's own."""
    if vocabulary is not None:
        return sorted(vocabulary.end_ids)
    feature = task.output_features.get("inputs")
    end_id = None if feature is None else feature.vocabulary.eos_id
    return [] if end_id is None else [end_id]


def _rows(
    task: seqio.Task,
    task_feature_lengths: Mapping[str, int] | None,
    split: str,
    vocabulary: tokenization.Tokeniser | None,
) -> Iterator[dict[str, Any]]:
    """One epoch of a task as NumPy arrays, in order, nothing cut."""
    if vocabulary is not None:
        features = {
            name: dataclasses.replace(feature, vocabulary=seqio_vocabulary(vocabulary))
            for name, feature in task.output_features.items()
        }
        task = task.replace(output_features=features)
    if split not in (splits := _splits(task)):
        raise UsageError(f"task {task.name!r}: no split {split!r}; it has {splits}.")
    # Preprocessors may draw random numbers. (seqio's own seed argument would have to be accepted by
    # every function that serves as a source.)
    tf.random.set_seed(0)
    with _reading(task):
        dataset = task.get_dataset(
            sequence_length=task_feature_lengths,
            split=split,
            shuffle=False,
            trim_output_features=False,
            try_in_mem_cache=False,  # for repeated reading; this reads once
        )
    try:
        yield from dataset.as_numpy_iterator()
    except tf.errors.OpError as error:
        # TensorFlow turns an exception in a preprocessor into text.
        mistake = re.search(r"UsageError: (.*)", error.message)
        if mistake is None:
            raise
        raise UsageError(f"task {task.name!r}: {mistake[1]}") from error


def _splits(task: seqio.Task) -> list[str]:
    with _reading(task):
        return list(task.splits)


@contextlib.contextmanager
def _reading(task: seqio.Task) -> Iterator[None]:
    """Says in one line why a task cannot be read."""
    try:
        yield
    except Exception as error:
        # seqio raises ValueError for a task that does not fit together. TFDS raises whatever its
        # builders, their downloads and the packages that they miss raise.
        tfds_name = getattr(getattr(task.source, "tfds_dataset", None), "name", None)
        if isinstance(error, UsageError) or not (tfds_name or isinstance(error, ValueError)):
            raise
        if (said := system_error(error)) is not None:
            raise said from error
        reason = str(error).partition("\n")[0]
        message = f"task {task.name!r} cannot be read: {reason}"
        if tfds_name:
            message += (
                f" (Prepare the data set with `tfds build {tfds_name}` where there is a network, "
                "and set TFDS_DATA_DIR to its folder.)"
            )
        raise UsageError(message) from error


def _row_id(row: Mapping[str, Any], task: seqio.Task, split: str, number: int) -> str:
    if "id" in row:
        return id_of(row["id"])
    return _place(task, split, number)


def _place(task: seqio.Task, split: str, number: int) -> str:
    return f"{task.name}/{split}:{number}"


def _feature_error(task: seqio.Task | seqio.Mixture, name: str, found: Sequence[str]) -> UsageError:
    return UsageError(
        f"task {task.name!r}: expected token ids as feature {name!r}, found the features {found}. "
        "End its preprocessors with tasks.tokenize_and_mark."
    )
