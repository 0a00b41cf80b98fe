import dataclasses
import itertools
import re

import numpy as np
import pytest
import seqio
import tensorflow as tf
import tensorflow_datasets as tfds

from tnt_jax.data import (
    datasets,
    mark_alternatives,
    marks,
    paper_tasks,
    records,
    removed_everywhere,
    tasks,
)
from tnt_jax.data.batches import Batches
from tnt_jax.data.t5patches_layout import T5PATCHES_MODES, t5patches_target
from tnt_jax.runtime.errors import UsageError
from tnt_jax.tokenizers import tokenization

LENGTHS = {"inputs": 32, "targets": 24}

TEXTS = [
    f"{name} is a wonderful {food} place in the {area}."
    for name, food, area in itertools.product(
        ["Wagamama", "The Eagle", "Clowns", "Cocum"],
        ["Japanese", "English", "Indian", "Italian"],
        ["city centre", "riverside", "countryside"],
    )
]


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocabulary") / "small.model"
    tokenization.train_sentencepiece([*TEXTS, "abcdefghij"], path, vocab_size=50)
    return tokenization.SentencePiece(str(path))


@pytest.fixture(autouse=True)
def registries():
    """Every test registers what it likes; the tasks of the paper stay."""
    kept = {*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()}
    yield
    for registry in (seqio.TaskRegistry, seqio.MixtureRegistry):
        for name in set(registry.names()) - kept:
            registry.remove(name)


def texts_of(vocabulary, *names, **settings):
    """The features of a plain task of seqio."""
    own = tasks.seqio_vocabulary(vocabulary)
    return {name: seqio.Feature(own, **settings) for name in names or ("inputs", "targets")}


def annotated_records(vocabulary):
    """Sixty records with exact ids, marks and alternatives; every third one is clean."""
    rows = []
    for number, text in enumerate(TEXTS):
        ids = vocabulary.prompt_ids(text)
        start = text.index("the ") + 4
        span = (start, len(text) - 1)
        is_clean = number % 3 == 0
        rows.append(
            records.Record(
                id=f"row {number}",
                inputs=f"venue {number}, café",
                targets=text,
                target_ids=tuple(ids) if number % 2 else None,
                negative_spans=() if is_clean else (span, (0, 2)),
                negative_token_ids=()
                if is_clean
                else mark_alternatives.token_ids(vocabulary, ids, span, ["city", "riverside"]),
                annotator="test",
                extra={"number": number},
            )
        )
    return rows


def assert_same_examples(left, right):
    assert [e.id for e in left] == [e.id for e in right]
    for one, other in zip(left, right, strict=True):
        for name in ("inputs", "targets", "negative_pairs"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
            assert getattr(one, name).dtype == np.int32
        if one.negative_strengths is None:
            assert other.negative_strengths is None
        else:
            np.testing.assert_array_equal(one.negative_strengths, other.negative_strengths)


# --- Records as a data set ------------------------------------------------------------------------


def write_tf_examples(path, rows):
    """The fields of records as features; those that hold lists of lists are flat."""

    def feature(values):
        if isinstance(values, str):
            return tf.train.Feature(bytes_list=tf.train.BytesList(value=[values.encode()]))
        flat = tf.nest.flatten(values)
        return tf.train.Feature(int64_list=tf.train.Int64List(value=flat))

    with tf.io.TFRecordWriter(path) as file:
        for row in rows:
            values = {
                "id": row.id,
                "inputs": row.inputs,
                "targets": row.targets,
                "target_ids": row.target_ids or (),
                "negative_spans": row.negative_spans,
                "negative_token_ids": [(at, i) for at, ids in row.negative_token_ids for i in ids],
            }
            features = {name: feature(value) for name, value in values.items()}
            example = tf.train.Example(features=tf.train.Features(feature=features))
            file.write(example.SerializeToString())


def test_files_and_tasks_give_the_same_examples(vocabulary, tmp_path):
    rows = annotated_records(vocabulary)
    jsonl, tfrecord = str(tmp_path / "rows.jsonl"), str(tmp_path / "rows.tfrecord")
    records.write_records(jsonl, rows)
    write_tf_examples(tfrecord, rows)
    expected = [marks.mark_tokens(row, vocabulary) for row in rows]
    from_files = datasets.RecordFiles(files=jsonl, vocabulary=vocabulary).load(LENGTHS)
    for example, row, marked in zip(from_files, rows, expected, strict=True):
        assert example.id == row.id
        assert example.inputs.tolist() == [*vocabulary.encode(row.inputs), 1]
        np.testing.assert_array_equal(example.targets, marked.target_ids)
        np.testing.assert_array_equal(example.negative_pairs, marked.negative_pairs)
    assert sum(len(example.negative_pairs) == 0 for example in from_files) == 16

    # docs/howto_t5x.md
    text = tf.io.FixedLenFeature([], tf.string)
    ints = tf.io.FixedLenSequenceFeature([], tf.int64, allow_missing=True)
    pairs = tf.io.FixedLenSequenceFeature([2], tf.int64, allow_missing=True)
    described = {"id": text, "inputs": text, "targets": text, "target_ids": ints}
    described |= {"negative_spans": pairs, "negative_token_ids": pairs}
    seqio.TaskRegistry.add(
        "from_tfrecord",
        source=seqio.TFExampleDataSource({"train": tfrecord}, described),
        preprocessors=[tasks.tokenize_and_mark],
        output_features=tasks.record_features(vocabulary),
    )
    tasks.record_task("from_jsonl", {"train": jsonl, "validation": jsonl}, vocabulary)
    for dataset in (
        tasks.SeqioDataset(mixture_or_task_name="from_jsonl"),
        tasks.SeqioDataset(mixture_or_task_name="from_jsonl", split="validation"),
        tasks.SeqioDataset(mixture_or_task_name="from_tfrecord"),
    ):
        assert dataset.vocabulary.encode("the city") == vocabulary.encode("the city")
        assert_same_examples(dataset.load(LENGTHS), from_files)


def test_a_task_of_records_has_what_is_removed_everywhere(vocabulary, tmp_path, capsys):
    """And a mixture has what its tasks have, of the split that is read."""
    rows = [records.Record(id="r", inputs="a", targets="the city", negative_spans=())]
    for name, numbers in {"one": (5, 3), "two": (4,), "other": (9,), "none": ()}.items():
        ids = removed_everywhere.Ids(numbers, {}) if numbers else None
        removed_everywhere.write_records(tmp_path / f"{name}.jsonl", rows, ids)
    path = {name: str(tmp_path / f"{name}.jsonl") for name in ("one", "two", "other", "none")}
    tasks.record_task("everywhere", {"train": path["one"], "test": path["other"]}, vocabulary)
    tasks.record_task("elsewhere", {"train": path["two"], "test": path["none"]}, vocabulary)
    seqio.MixtureRegistry.add("both_places", [("everywhere", 1), ("elsewhere", 1)])

    def found(name, split="train"):
        return tasks.SeqioDataset(mixture_or_task_name=name, split=split).removed_everywhere()

    assert (found("everywhere"), found("elsewhere")) == ((3, 5), (4,))
    assert found("both_places") == (3, 4, 5)
    assert (found("both_places", "test"), found("elsewhere", "test")) == ((9,), ())
    # T5X reads a task without asking for them: the log says that they are there.
    tasks.SeqioDataset(mixture_or_task_name="elsewhere").load(LENGTHS)
    said = capsys.readouterr().out
    assert f"{path['two']}.everywhere.json: ids that an annotator removes" in said


def test_strengths_go_through_tasks(vocabulary, tmp_path):
    path = str(tmp_path / "rows.jsonl")
    rows = [
        dataclasses.replace(
            row,
            negative_spans=tuple((*span, 0.25) for span in row.negative_spans[:1])
            + row.negative_spans[1:],
            negative_token_ids=tuple((*entry, 0.5) for entry in row.negative_token_ids),
        )
        for row in annotated_records(vocabulary)
    ]
    records.write_records(path, rows)
    from_files = datasets.RecordFiles(files=path, vocabulary=vocabulary).load(LENGTHS)
    found = {
        s for e in from_files if e.negative_strengths is not None for s in e.negative_strengths
    }
    assert found == {0.25, 0.5, 1.0}
    for example, row in zip(from_files, rows, strict=True):
        assert (example.negative_strengths is None) == (not row.negative_spans)
    tasks.record_task("graded", {"train": path}, vocabulary)
    assert_same_examples(
        tasks.SeqioDataset(mixture_or_task_name="graded").load(LENGTHS), from_files
    )


def test_strengths_of_your_own_task(vocabulary):
    row = {"inputs": [7, 1], "targets": [5, 6, 1], "negative_ids": [[1, 6], [0, 5], [1, 6]]}
    signature = {
        "inputs": INTS,
        "targets": INTS,
        "negative_ids": tf.TensorSpec([None, 2], tf.int32),
    }
    signature["negative_strengths"] = tf.TensorSpec([None], tf.float32)

    def load(name, strengths):
        seqio.TaskRegistry.add(
            name,
            source=of_rows([row | {"negative_strengths": strengths}], **signature),
            output_features=tasks.record_features(vocabulary),
        )
        return tasks.load_examples(name, LENGTHS, "train")

    (example,) = load("own", [0.25, 1.0, 0.5])
    assert example.negative_pairs.tolist() == [[0, 5], [1, 6]]
    assert example.negative_strengths.tolist() == [1.0, 0.5]
    for name, strengths in (("none", [0.0, 1, 1]), ("nan", [np.nan, 1, 1]), ("few", [1.0])):
        with pytest.raises(UsageError, match="a number from -99 to 1, but not 0, for each of 3 "):
            load(name, strengths)


def test_mining_keeps_marked_records(vocabulary, tmp_path):
    path = str(tmp_path / "rows.jsonl")
    records.write_records(path, annotated_records(vocabulary))
    examples = datasets.RecordFiles(files=path, vocabulary=vocabulary, clean_per_marked=0.25).load(
        LENGTHS
    )
    assert sorted(len(e.negative_pairs) > 0 for e in examples) == [False] * 8 + [True] * 32


def test_clean_outputs_alone(vocabulary, tmp_path, capsys):
    """Clean is where nothing that was said is marked, by a span or by an earlier round."""
    path = str(tmp_path / "rows.jsonl")
    text = TEXTS[0]
    said = vocabulary.prompt_ids(text)
    other = next(i for i in said if i != said[2])
    rows = [
        records.Record(id=name, inputs="a", targets=text, negative_spans=spans, **more)
        for name, spans, more in (
            ("clean", (), {}),
            ("span", ((0, 3),), {}),
            ("earlier round", (), {"negative_token_ids": ((2, (said[2],)),)}),
            ("alternative alone", (), {"negative_token_ids": ((2, (other,)),)}),
        )
    ]
    records.write_records(path, rows)
    examples = datasets.RecordFiles(files=path, vocabulary=vocabulary, only_clean=True)
    assert [e.id for e in examples.load(LENGTHS)] == ["clean", "alternative alone"]
    assert "2 of 4 examples, those in which nothing is marked; 2 are left out" in (
        capsys.readouterr().out
    )
    records.write_records(path, rows[1:3])
    with pytest.raises(UsageError, match="something is marked in all 2 of them"):
        examples.load(LENGTHS)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"annotated": False}, "only_clean needs annotated records"),
        ({"clean_per_marked": 3}, "expected clean_per_marked=None, found 3"),
    ],
)
def test_clean_outputs_alone_with_what_contradicts_it(vocabulary, settings, message):
    with pytest.raises(UsageError, match=message):
        datasets.RecordFiles(files="x", vocabulary=vocabulary, only_clean=True, **settings)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"inputs": "a", "targets": "a"}, "has no negative_spans: nobody annotated it"),
        ({"inputs": "a", "negative_spans": ()}, "has no targets"),
        (
            {"inputs": "a", "targets": "b", "negative_spans": (), "target_ids": (1,)},
            "target_ids decode to '', but targets is 'b'",
        ),
        (
            {
                "inputs": "a",
                "messages": (("system", "Be brief."), ("user", "a")),
                "targets": "b",
                "negative_spans": (),
            },
            "messages: expected a model with a chat template, found one without",
        ),
    ],
)
def test_records_that_cannot_be_trained_on_are_usage_errors(vocabulary, tmp_path, row, message):
    path = str(tmp_path / "rows.jsonl")
    records.write_records(path, [records.Record(id="r1", **row)])
    tasks.record_task("bad", {"train": path}, vocabulary)
    for dataset in (
        datasets.RecordFiles(files=path, vocabulary=vocabulary),
        tasks.SeqioDataset(mixture_or_task_name="bad"),
    ):
        with pytest.raises(UsageError, match=f"(?s)'r1' ?.*{re.escape(message)}") as caught:
            dataset.load(LENGTHS)
        assert "\n" not in str(caught.value)


def test_plain_fine_tuning_needs_no_annotation(vocabulary, tmp_path):
    path = str(tmp_path / "rows.jsonl")
    records.write_records(path, [records.Record(id="r", inputs="a", targets="the city")])
    (example,) = datasets.RecordFiles(files=path, vocabulary=vocabulary, annotated=False).load(
        LENGTHS
    )
    assert example.negative_pairs.shape == (0, 2)


def test_cut_marks_and_spans_without_token_are_told(vocabulary, tmp_path, caplog):
    path = str(tmp_path / "rows.jsonl")
    spans = ((3, 4), (0, 5), (7, 8))  # the second one begins before the cut
    records.write_records(
        path, [records.Record(id="r", inputs="abc", targets="the city", negative_spans=spans)]
    )
    tasks.record_task("told", {"train": path}, vocabulary)
    for dataset in (
        datasets.RecordFiles(files=path, vocabulary=vocabulary),
        tasks.SeqioDataset(mixture_or_task_name="told"),
    ):
        caplog.clear()
        (example,) = dataset.load({"inputs": 1, "targets": 5})
        num_lost = int((example.negative_pairs[:, 0] >= 5).sum())
        assert num_lost > 0
        told = " ".join(record.getMessage() for record in caplog.records)
        assert "1 negative spans touch no token" in told
        assert (
            "1 inputs and 1 targets of 1 examples are cut; 1 negative spans and "
            f"{num_lost} ids to remove lie beyond the cut and are lost." in told
        )


# --- seqio ----------------------------------------------------------------------------------------


def of_rows(rows, **signature):
    """A source that holds `rows` as split "train"."""

    def dataset_fn(split, shuffle_files):
        return tf.data.Dataset.from_generator(lambda: iter(rows), output_signature=signature)

    return seqio.FunctionDataSource(dataset_fn, splits=["train"])


INTS = tf.TensorSpec([None], tf.int32)


def test_your_own_task_needs_only_token_ids(vocabulary):
    rows = [{"inputs": [7, 1], "targets": [5, 6, 1]}, {"inputs": [8, 9, 1], "targets": [1]}]
    seqio.TaskRegistry.add(
        "plain",
        source=of_rows(rows, inputs=INTS, targets=INTS),
        output_features=texts_of(vocabulary),
    )
    examples = tasks.load_examples("plain", LENGTHS, "train")
    assert [e.inputs.tolist() for e in examples] == [[7, 1], [8, 9, 1]]
    assert [e.targets.tolist() for e in examples] == [[5, 6, 1], [1]]
    assert [e.id for e in examples] == ["plain/train:0", "plain/train:1"]


def test_text_of_your_own_task_is_marked(vocabulary):
    rows = [{"inputs": "a", "targets": "the riverside", "negative_spans": [[4, 13], [0, 3]]}]
    signature = {
        "inputs": tf.TensorSpec([], tf.string),
        "targets": tf.TensorSpec([], tf.string),
        "negative_spans": tf.TensorSpec([None, 2], tf.int64),
    }
    seqio.TaskRegistry.add(
        "marked",
        source=of_rows(rows, **signature),
        preprocessors=[tasks.tokenize_and_mark],
        output_features=tasks.record_features(vocabulary),
    )
    (example,) = tasks.load_examples("marked", LENGTHS, "train")
    marked = [vocabulary.processor.id_to_piece(int(i)) for i in example.negative_pairs[:, 1]]
    assert "".join(marked) == "theriverside"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"negative_ids": [[2, 5]]}, "'bad/train:0': negative_ids has position 2, but there are 2"),
        ({"loss_mask": [1]}, "'bad/train:0': loss_mask: expected 2 values, each 0 or 1, found [1]"),
        ({"loss_mask": [1, -1]}, "each 0 or 1, found [1, -1]"),
    ],
)
def test_features_that_do_not_fit_are_usage_errors(vocabulary, row, message):
    row = {
        "inputs": [1],
        "targets": [5, 1],
        "negative_ids": np.zeros((0, 2)),
        "loss_mask": [1, 1],
        **row,
    }
    seqio.TaskRegistry.add(
        "bad",
        source=of_rows(
            [row],
            inputs=INTS,
            targets=INTS,
            negative_ids=tf.TensorSpec([None, 2], tf.int32),
            loss_mask=INTS,
        ),
        output_features=tasks.record_features(vocabulary),
    )
    with pytest.raises(UsageError, match=re.escape(message)):
        tasks.load_examples("bad", LENGTHS, "train")


def test_a_task_without_targets_is_a_usage_error(vocabulary):
    seqio.TaskRegistry.add(
        "no_targets",
        source=of_rows([{"inputs": [1]}], inputs=INTS),
        output_features={"inputs": seqio.Feature(tasks.seqio_vocabulary(vocabulary))},
    )
    with pytest.raises(UsageError, match="expected token ids as feature 'targets'"):
        tasks.SeqioDataset(mixture_or_task_name="no_targets")
    with pytest.raises(UsageError, match="expected token ids as feature 'targets'"):
        tasks.load_examples("no_targets", LENGTHS, "train")


def test_unknown_names_are_usage_errors(vocabulary, tmp_path):
    with pytest.raises(
        UsageError, match=r"no seqio task or mixture 'xsum_sumaries'; there are \['xsum_summaries'"
    ) as caught:
        tasks.SeqioDataset(mixture_or_task_name="xsum_sumaries")
    assert "MIXTURE_OR_TASK_MODULE" in str(caught.value)
    with pytest.raises(UsageError, match=r"no module 'tnt_jax\.papertasks'"):
        tasks.find_task("xsum_summaries", module="tnt_jax.papertasks")
    tasks.record_task("mine", {"train": str(tmp_path / "nowhere.jsonl")}, vocabulary)
    with pytest.raises(UsageError, match=r"no split 'test'; it has \['train'\]"):
        tasks.load_examples("mine", LENGTHS, "test")
    with pytest.raises(UsageError, match=r"nowhere\.jsonl: no such file"):
        tasks.load_examples("mine", LENGTHS, "train")


def test_a_tfds_data_set_that_is_not_there_is_a_usage_error(vocabulary, tmp_path):
    source = seqio.TfdsDataSource(
        "no_such_data:1.0.0", tfds_data_dir=str(tmp_path), splits=["train"]
    )
    seqio.TaskRegistry.add("absent", source=source, output_features=texts_of(vocabulary, "targets"))
    with pytest.raises(UsageError, match=r"'absent' cannot be read: .*`tfds build no_such_data"):
        tasks.load_examples("absent", LENGTHS, "train")


def test_a_mixture_keeps_every_example_and_its_rates(vocabulary):
    for name, number in (("rare", 2), ("common", 6)):
        rows = [{"inputs": [1], "targets": [5, 1]}] * number
        seqio.TaskRegistry.add(
            name,
            source=of_rows(rows, inputs=INTS, targets=INTS),
            output_features=texts_of(vocabulary),
        )
    seqio.MixtureRegistry.add("even", ["rare", "common"], default_rate=1)
    seqio.MixtureRegistry.add("uneven", [("rare", 1), ("common", 6)])

    def names(mixture):
        return [e.id for e in tasks.load_examples(mixture, LENGTHS, "train")]

    common = [f"common/train:{n}" for n in range(6)]
    assert sorted(names("even")) == sorted(common + ["rare/train:0", "rare/train:1"] * 3)
    assert sorted(names("uneven")) == sorted(common * 2 + ["rare/train:0", "rare/train:1"])
    with pytest.raises(UsageError, match="none of its tasks has a split 'test'"):
        tasks.load_examples("even", LENGTHS, "test")


def test_random_preprocessors_draw_the_same_every_time(vocabulary):
    @seqio.map_over_dataset(num_seeds=1)
    def random_target(row, seed):
        target = tf.random.stateless_uniform([3], seed, 0, 30, tf.int32)
        return {**row, "targets": target}

    seqio.TaskRegistry.add(
        "random",
        source=of_rows([{"inputs": [1]}] * 4, inputs=INTS),
        preprocessors=[random_target],
        output_features=texts_of(vocabulary),
    )
    one, other = (
        [e.targets.tolist() for e in tasks.load_examples("random", LENGTHS, "train")] for _ in "ab"
    )
    assert one == other
    assert one[0] != one[1]


def test_the_t5patches_layout_is_read_in_its_modes(vocabulary):
    rows = [
        {"inputs": [7, 8, 5, 1], "negative_targets": [3, 9, 1], "corrected_targets": [3, 8, 4, 1]},
        {"inputs": [8, 1], "negative_targets": [4, 1], "corrected_targets": [4, 1]},
    ]
    for mode in T5PATCHES_MODES:
        seqio.TaskRegistry.add(
            mode,
            source=of_rows(
                rows,
                inputs=tf.TensorSpec([None], tf.int64),
                negative_targets=INTS,
                corrected_targets=INTS,
            ),
            preprocessors=[tasks.t5patches_mode(mode)],
            output_features=tasks.record_features(vocabulary),
        )
        for row, example in zip(rows, tasks.load_examples(mode, LENGTHS, "train"), strict=True):
            targets, pairs, loss_mask = t5patches_target(
                np.array(row["negative_targets"]), np.array(row["corrected_targets"]), mode
            )
            np.testing.assert_array_equal(example.targets, targets)
            np.testing.assert_array_equal(example.negative_pairs, pairs)
            np.testing.assert_array_equal(example.loss_mask, loss_mask)
    with pytest.raises(UsageError, match="expected one of"):
        tasks.t5patches_mode("frist")


def test_prompts_are_the_texts_or_else_decoded(vocabulary, tmp_path):
    path = str(tmp_path / "rows.jsonl")
    rows = [records.Record(id="r", inputs="café", targets="the city", negative_spans=())]
    records.write_records(path, rows)
    tasks.record_task("texts", {"train": path}, vocabulary)
    assert tasks.prompts_from_task("texts", "train") == [
        records.Record(id="r", inputs="café", targets="the city")
    ]
    ids = vocabulary.prompt_ids("the city")
    seqio.TaskRegistry.add(
        "ids",
        source=of_rows([{"inputs": ids, "targets": [1]}], inputs=INTS, targets=INTS),
        output_features=texts_of(vocabulary),
    )
    assert tasks.prompts_from_task("ids", "train") == [
        records.Record(id="ids/train:0", inputs="the city", targets="")
    ]


@pytest.mark.parametrize("marked", [False, True])
def test_ids_may_be_numbers_and_repeat(vocabulary, marked, capsys):
    """TFDS has numbers as ids, and the tasks of a mixture may have the same ones."""
    rows = [{"id": number, "inputs": "the city", "targets": "the city"} for number in (7, 8, 7)]
    texts = {name: tf.TensorSpec([], tf.string) for name in ("inputs", "targets")}
    for name in ("one", "other"):
        seqio.TaskRegistry.add(
            name,
            source=of_rows(rows, id=tf.TensorSpec([], tf.int64), **texts),
            preprocessors=[tasks.tokenize_and_mark if marked else seqio.preprocessors.tokenize],
            output_features=tasks.record_features(vocabulary)
            if marked
            else texts_of(vocabulary, add_eos=False),
        )
    seqio.MixtureRegistry.add("both", ["one", "other"], default_rate=1.0)
    examples = tasks.load_examples("one", LENGTHS, "train")
    assert [example.id for example in examples] == ["7", "8", "7"]
    found = tasks.prompts_from_task("both", "train")
    places = ["one/train:2", "other/train:0", "other/train:1", "other/train:2"]
    assert [prompt.id for prompt in found] == ["7", "8", *places]
    assert {prompt.inputs for prompt in found} == {"the city"}
    said = "both: 4 of 6 prompts have an id that was used before; in place of it they have"
    assert said in capsys.readouterr().out


# --- The tasks of the paper -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["xsum_summaries", "civil_comments_replies"])
def test_the_tasks_of_the_paper_run_on_mock_data(vocabulary, name):
    with tfds.testing.mock_data(num_examples=5):
        prompts = tasks.prompts_from_task(name, "validation", vocabulary)
        dataset = tasks.SeqioDataset(
            mixture_or_task_name=name,
            mixture_or_task_module="tnt_jax.data.paper_tasks",
            vocabulary_override=vocabulary,
        )
        examples = dataset.load(LENGTHS)
        assert dataset.vocabulary is vocabulary
    assert len(prompts) == len(examples) == 5
    prefix = {"xsum_summaries": "summarize: ", "civil_comments_replies": "reply: "}[name]
    assert all(p.inputs.startswith(prefix) and len(p.inputs) > len(prefix) for p in prompts)
    assert all(p.targets for p in prompts)
    batches = Batches(examples, 4, LENGTHS, seed=0)
    features = batches[0]
    assert features["encoder_input_tokens"].shape == (4, 32)
    assert (features["decoder_negative_ids"] == -1).all()
    assert (features["decoder_loss_mask"].sum(axis=1) > 1).all()
    assert features["decoder_target_tokens"].max() < vocabulary.size


def test_comments_that_answer_nothing_are_left_out():
    rows = [
        {"id": "a", "parent_text": "", "text": "first"},
        {"id": "b", "parent_text": "why?", "text": "because"},
    ]
    signature = dict.fromkeys(("id", "parent_text", "text"), tf.TensorSpec([], tf.string))
    dataset = paper_tasks._replies(
        tf.data.Dataset.from_generator(lambda: iter(rows), output_signature=signature)
    )
    assert list(dataset.as_numpy_iterator()) == [
        {"id": b"b", "inputs": b"reply: why?", "targets": b"because"}
    ]


# --- What of a mark counts ------------------------------------------------------------------------


def test_first_tokens_alone_and_loss_until_the_first_negative(tmp_path, vocabulary):
    """From files and through seqio alike: spans of several tokens, two of them in a record."""
    files = str(tmp_path / "rows.jsonl")
    rows = annotated_records(vocabulary)
    records.write_records(files, rows)
    whole = datasets.RecordFiles(files=files, vocabulary=vocabulary).load(LENGTHS)
    first = datasets.RecordFiles(
        files=files, vocabulary=vocabulary, marks="first_token", loss_until="first_negative"
    ).load(LENGTHS)
    task = tasks.record_task(
        "first", {"train": files}, vocabulary, marks="first_token", loss_until="first_negative"
    )
    through_seqio = tasks.load_examples(task, LENGTHS, "train")
    assert_same_examples(first, through_seqio)
    for row, all_marks, one, other in zip(rows, whole, first, through_seqio, strict=True):
        assert all_marks.loss_mask is None
        if not row.negative_spans:
            assert one.loss_mask is None
            assert other.loss_mask.all()
            continue
        # The extents of tokens say where a span begins; alternatives stay as they were.
        _, extents = vocabulary.extents(one.targets)
        starts = [
            next(i for i, (_, end) in enumerate(extents) if start < end)
            for start, _ in row.negative_spans
        ]
        own = {(i, int(one.targets[i])) for i in starts}
        alternatives = {(p, i) for p, ids in row.negative_token_ids for i in ids}
        assert set(map(tuple, one.negative_pairs.tolist())) == own | alternatives
        assert len(all_marks.negative_pairs) > len(one.negative_pairs)
        for example in (one, other):
            assert example.loss_mask.tolist() == [
                int(i <= min(starts)) for i in range(len(example.targets))
            ]


def test_marks_that_there_are_not(tmp_path, vocabulary):
    files = str(tmp_path / "rows.jsonl")
    records.write_records(files, annotated_records(vocabulary))
    for settings in ({"marks": "first"}, {"loss_until": "negative"}):
        (name,) = settings
        with pytest.raises(UsageError, match=f"{name}: expected one of .*, found"):
            datasets.RecordFiles(files=files, vocabulary=vocabulary, **settings).load(LENGTHS)
