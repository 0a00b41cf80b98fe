"""From labels of whole outputs to marks, on a model that says unwanted words half of the time."""

import contextlib
import json
import pathlib
import random
import re

import numpy as np
import pytest
from helpers import rooms

from tnt_jax.data import marks, records
from tnt_jax.localization import marking
from tnt_jax.patching import asked
from tnt_jax.tokenizers import tokenization

FOLDER_SETTINGS = {
    "RECORDS": "labelled.jsonl",
    "OUTPUT": "localized.jsonl",
    "LABEL_FIELD": "unwanted",
    "NUM_FOLDS": 2,
    "NUM_UPDATES": 200,
    "prefix_values.Training.batch_size": 32,
    "prefix_values.Training.width": 64,
}


@pytest.fixture(scope="module", autouse=True)
def working_directory(tmp_path_factory):
    """The world of `rooms`, where any room may be dirty or clean; 960 samples with their labels."""
    folder = tmp_path_factory.mktemp("world")
    rooms.write_world(folder)
    rng = random.Random(0)
    with contextlib.chdir(folder), rooms.devices_seen():
        corpus = [
            records.Record(
                id=f"{row.id} {number}",
                inputs=row.inputs,
                targets=row.targets.replace(row.targets.split()[-1], f"{state}."),
            )
            for row in rooms.corpus()
            for number, state in enumerate(rng.choices(["dirty", "clean", "noisy", "quiet"], k=16))
        ]
        records.write_records("corpus.jsonl", corpus)
        rooms.train_original("original", 80, LEARNING_RATE=1e-2)
        sampled = {"CHECKPOINT_PATH": "original", "OUTPUT": "sampled.jsonl", "TEMPERATURE": 1.0}
        sampled |= {"BATCH_SIZE": 96}
        assert rooms.run("generate", sampled) == 0
        marked = {"RECORDS": "sampled.jsonl", "OUTPUT": "marked.jsonl", "ALTERNATIVES": False}
        assert rooms.run("annotate", marked) == 0
        labelled = [
            records.Record(
                id=row.id,
                inputs=row.inputs,
                targets=row.targets,
                target_ids=row.target_ids,
                extra={"unwanted": bool(row.negative_spans)},
            )
            for row in records.read_records("marked.jsonl")
        ]
        records.write_records("labelled.jsonl", labelled)
        yield


def localize(**settings):
    assert rooms.run("localize", FOLDER_SETTINGS | settings) == 0
    output = {**FOLDER_SETTINGS, **settings}["OUTPUT"]
    quality = json.loads(pathlib.Path(f"{output}.values.json").read_text())
    return records.read_records(output), quality


@pytest.fixture(scope="module")
def localized():
    return localize()


def vocabulary():
    return tokenization.SentencePiece("vocabulary.model", extra_ids=0)


def test_labels_alone_lead_to_the_unwanted_words(localized):
    found, quality = localized
    true = records.read_records("marked.jsonl")
    assert [row.id for row in found] == [row.id for row in true]
    bad = [pair for pair in zip(found, true, strict=True) if pair[1].negative_spans]
    assert quality["num_bad"] == len(bad)
    # How many it says, the original's training decides: enough of both kinds to learn from.
    assert 100 < len(bad) < len(true) - 100
    right = sum(
        any(a < y and x < b for a, b in after.negative_spans for x, y in before.negative_spans)
        for after, before in bad
    )
    num_spans = sum(len(after.negative_spans) for after, _ in bad)
    num_right = sum(
        any(a < y and x < b for x, y in before.negative_spans)
        for after, before in bad
        for a, b in after.negative_spans
    )
    assert right > 0.9 * len(bad) and num_right > 0.9 * num_spans
    # Only the token that decides is marked, not what follows from it.
    assert np.mean([b - a for after, _ in bad for a, b in after.negative_spans]) < 3
    assert all(row.negative_spans == () for row in found if not row.extra["unwanted"])
    assert quality["auc_at_end"] > 0.95
    assert quality["brier_at_end"] < 0.1 < quality["brier_at_start"]
    assert quality["brier_of_a_constant"] == pytest.approx(
        len(bad) / len(found) * (1 - len(bad) / len(found))
    )


def test_every_prefix_has_a_value_and_a_bad_output_its_blame(localized):
    for row in localized[0]:
        values, blame = row.extra["values"], row.extra.get("blame")
        num_tokens = len([i for i in row.target_ids if i != vocabulary().end_id])
        assert len(values) == num_tokens + 1  # the empty prefix has one too
        assert all(0 <= value <= 1 for value in values)
        assert (blame is not None) == row.extra["unwanted"]
        if blame:
            assert len(blame) == len(values) and sum(blame) == pytest.approx(1, abs=0.01)
            assert min(blame) >= 0
        assert row.annotator.startswith("SequenceValues(unwanted, original=")


def test_marks_are_what_training_removes(localized):
    """A token without text, the lone space before a word, is removed by its id."""
    pieces = vocabulary().processor
    removed = set()
    for row in localized[0]:
        for position, (token,) in row.negative_token_ids:
            assert row.target_ids[position] == token and row.negative_spans
            removed.add(pieces.id_to_piece(token))
        pairs = marks.mark_tokens(row, vocabulary()).negative_pairs
        assert bool(len(pairs)) == bool(row.negative_spans)
    assert removed <= {"\u2581"}


def test_blame_as_strength():
    """Pieces of a word add up; a lone space has its own; no mark is below 0.01."""
    row = records.Record(id="a", inputs="", targets="dirty and noisy")
    ids, extents = marks.ids_and_extents(row, vocabulary())
    is_negative = np.zeros(len(ids), bool)
    first = [i for i, (a, b) in enumerate(extents) if a < b and b <= 5]
    last = [i for i, (a, b) in enumerate(extents) if a >= 10 and a < b]
    is_negative[[*first, *last]] = True
    blame = np.zeros(len(ids) + 1)
    blame[first] = 0.6 / len(first)
    found = marking.mark(row, is_negative, vocabulary(), blame)
    assert found.negative_spans == ((0, 5, 0.6), (10, 15, 0.01))
    blame[last] = 1.0  # rounding may take a sum above 1
    found = marking.mark(row, is_negative, vocabulary(), blame)
    assert found.negative_spans == ((0, 5, 0.6), (10, 15))
    certain = marking.mark(row, is_negative, vocabulary())
    assert certain.negative_spans == ((0, 5), (10, 15))


def test_the_same_again_is_the_same_bytes(localized, capsys):
    first = pathlib.Path("localized.jsonl").read_bytes()
    localize(OUTPUT="again.jsonl")
    assert "better than chance" not in capsys.readouterr().out
    assert pathlib.Path("again.jsonl").read_bytes() == first


def test_who_cannot_judge_continuations_is_refused_at_once(capsys):
    settings = {
        **{"OUTPUT": "unchecked.jsonl", "CHECK": "@localize.MonteCarlo()"},
        **{"localize.MonteCarlo.annotator": "@annotators.Spans()"},
        **{"annotators.Spans.path": "marked.jsonl", "annotators.Spans.unmatched": "leave_out"},
    }
    assert rooms.run("localize", FOLDER_SETTINGS | settings) == 2
    said = capsys.readouterr()
    assert "MonteCarlo.annotator: expected one that can judge any text" in said.err
    assert "head" not in said.out and not pathlib.Path("unchecked.jsonl").exists()


def test_marks_that_are_given_are_labels_and_then_the_truth():
    """And values agree with sampled continuations of the same prefixes."""
    settings = {"RECORDS": "marked.jsonl", "LABEL_FIELD": None, "OUTPUT": "compared.jsonl"}
    check = {
        "CHECK": "@localize.MonteCarlo()",
        "localize.MonteCarlo.annotator": "@annotators.Lexicon()",
        "annotators.Lexicon.path": "words.txt",
        "localize.MonteCarlo.num_prefixes": 40,
        "localize.MonteCarlo.num_samples": 16,
    }
    rows, quality = localize(**settings, **check)
    agreement = quality["agreement"]
    assert agreement["precision"] > 0.9 and agreement["spans_found"] > 0.9
    assert agreement["chance"] < 0.6
    for row, before in zip(rows, records.read_records("marked.jsonl"), strict=True):
        assert row.extra["given_spans"] == [list(span) for span in before.negative_spans]
    sampled = quality["monte_carlo"]
    assert len(sampled["prefixes"]) == 40
    assert sampled["correlation"] > 0.85 and sampled["explained"] > 0.7
    by_id = {row.id: row for row in rows}
    for prefix in sampled["prefixes"]:
        assert prefix["value"] == by_id[prefix["id"]].extra["values"][prefix["num_tokens"]]


def test_labels_that_mean_nothing_find_nothing(capsys):
    rows = records.read_records("labelled.jsonl")
    labels = [row.extra["unwanted"] for row in rows]
    random.Random(0).shuffle(labels)
    true = {row.id: row.negative_spans for row in records.read_records("marked.jsonl")}
    shuffled = [
        records.Record(
            id=row.id,
            inputs=row.inputs,
            targets=row.targets,
            target_ids=row.target_ids,
            negative_spans=true[row.id],
            extra={"unwanted": label},
        )
        for row, label in zip(rows, labels, strict=True)
    ]
    records.write_records("shuffled.jsonl", shuffled)
    found, quality = localize(RECORDS="shuffled.jsonl", OUTPUT="nothing.jsonl")
    assert quality["auc_at_end"] == pytest.approx(0.5, abs=0.08)
    assert "little better than chance" in capsys.readouterr().out
    spans = [(row, span) for row in found for span in row.negative_spans]
    right = sum(any(a < y and x < b for x, y in true[row.id]) for row, (a, b) in spans)
    assert right < 0.2 * quality["num_bad"]


def test_an_empty_output_has_the_value_of_nothing_said():
    rows = records.read_records("labelled.jsonl")
    for label in (0, 1):
        name = f"ended {label}"
        extra = {"unwanted": label}
        rows.append(records.Record(id=name, inputs=rows[label].inputs, targets="", extra=extra))
    records.write_records("with_empty.jsonl", rows)
    found, _ = localize(RECORDS="with_empty.jsonl", OUTPUT="of_empty.jsonl")
    for row in found[-2:]:
        assert (row.targets, row.negative_spans, row.is_prompt) == ("", (), False)
        assert len(row.extra["values"]) == 1  # of the empty prefix; the end is no part of it


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"LABEL_FIELD": "bad"},
            "record 'small acorn 0': LABEL_FIELD=bad: expected true or 1 for ",
        ),
        (
            {"LABEL_FIELD": None},
            "record 'small acorn 0' has no negative_spans: expected annotated ",
        ),
        (
            {"RECORDS": "prompts.jsonl"},
            "record 'prompts:1' has no targets. Expected outputs of the ",
        ),
        (
            {"RECORDS": "good.jsonl"},
            "expected good and bad outputs in every choice of 1 of 2 folds",
        ),
        ({"NUM_FOLDS": 1}, "NUM_FOLDS: expected at least 2, found 1."),
        ({"THRESHOLD_RATIO": 0.0}, "Threshold.ratio: expected above 0 and at most 1, found 0.0"),
        ({"OUTPUT": "/proc/output"}, "OUTPUT: expected a file that can be written, found "),
    ],
)
def test_mistakes_are_told_in_a_line(settings, message, capfd):
    pathlib.Path("prompts.jsonl").write_text('{"inputs": "small acorn", "unwanted": true}\n')
    good = [row for row in records.read_records("labelled.jsonl") if not row.extra["unwanted"]]
    records.write_records("good.jsonl", good)
    assert rooms.run("localize", FOLDER_SETTINGS | settings) != 0
    assert message in capfd.readouterr().err


def test_patch_learns_from_labels_of_whole_outputs(optimised):
    """Several outputs of each of 60 prompts; those of a prompt are all learned from, or none."""
    flags = {
        "model": "original",
        "prompts": "labelled.jsonl",
        "labels": "unwanted",
        "output": "patched",
        "decoding": "sampled",
        "cut": 0.5,
        "gin.VOCABULARY_PATH": "vocabulary.model",
        "gin.EXTRA_IDS": 0,
        "gin.OPTIMIZER": "@optax.adam",
        "gin.LEARNING_RATE": 3e-3,
    }
    arguments = asked.gin_arguments([f"--{name}={value}" for name, value in flags.items()])
    assert rooms.run_program("patch", arguments) == 0
    learned = records.read_records("patched/prompts/train.jsonl")
    prompts = {row.inputs for row in learned}
    assert len(prompts) == 36
    labelled = [row for row in records.read_records("labelled.jsonl") if row.inputs in prompts]
    assert len(learned) == len({(row.inputs, row.targets) for row in labelled})
    assert all(row.extra["unwanted"] for row in learned if row.negative_spans)
    # Found from labels alone; good states are not among them.
    found = pathlib.Path("patched/marked_texts.txt").read_text()
    assert {"dirty", "noisy"} <= set(re.findall(r"\w+", found))
    assert not {"clean", "quiet"} & set(re.findall(r"\w+", found))
    # They are not needed any more, and may be larger than the model.
    assert not list(pathlib.Path("patched/prompts").glob("*.states"))
    numbers = json.loads(pathlib.Path("patched/patch.json").read_text())
    assert numbers["unwanted_before"] > 0.2
    assert numbers["cut"] > 0.5


# --- Looking ahead --------------------------------------------------------------------------------

AHEAD = {"LOOK_AHEAD": 6, "OUTPUT": "ahead.jsonl"}


@pytest.fixture(scope="module")
def looked_ahead():
    return localize(**AHEAD)


def strengths_of(row, piece):
    """The strength of each piece that may come after the first token that is this piece."""
    pieces = vocabulary().processor
    place = row.target_ids.index(pieces.piece_to_id(piece)) + 1
    return {
        pieces.id_to_piece(i): records.strength_of(mark)
        for mark in row.negative_token_ids
        for i in mark[1]
        if mark[0] == place
    }


def test_every_output_gets_strengths_where_it_is_decided(looked_ahead):
    """After "and" a lone space leads to "dirty" or "noisy", and "clean" is a token of its own.

    Of the texts a share g is good: the space goes, and "clean" is raised by 1 / g.
    """
    rows, quality = looked_ahead
    decided = [row for row in rows if row.target_ids.count(vocabulary().encode("and")[0])]
    assert len(decided) > 0.9 * len(rows)
    found = [strengths_of(row, "\u2581and") for row in decided]
    num_good = sum(not row.extra["unwanted"] for row in rows)
    for label in (True, False):
        of_label = [
            of_row
            for of_row, row in zip(found, decided, strict=True)
            if row.extra["unwanted"] == label
        ]
        for piece, expected in (("\u2581", 1.0), ("\u2581clean", 1 - len(rows) / num_good)):
            mean = np.mean([of_row.get(piece, 0.0) for of_row in of_label])
            assert mean == pytest.approx(expected, abs=0.15)
    assert quality["look_ahead"]["num_lowered"] > 0 < quality["look_ahead"]["num_raised"]
    assert 0.9 < quality["look_ahead"]["probability_looked_at"] <= 1
    assert quality["look_ahead"]["difference_of_values"] < 0.1


def test_looking_ahead_leaves_the_labels_and_the_values_as_they_are(looked_ahead, localized):
    """Spans only say where: they have the least strength. Heads have seen one position more."""
    for row, plain in zip(looked_ahead[0], localized[0], strict=True):
        assert bool(row.negative_spans) <= row.extra["unwanted"]
        assert all(records.strength_of(span) == 0.01 for span in row.negative_spans)
        assert len(row.extra["values"]) == len(plain.extra["values"])
        assert all(entry[0] < len(row.target_ids) for entry in row.negative_token_ids)
        # What was said in a good output is lowered somewhere, and makes it no bad one.
        assert bool(row.negative_spans) == row.says_unwanted
    assert "LookAhead(num_tokens=6, least_strength=-9.0" in looked_ahead[0][0].annotator
    assert looked_ahead[1]["auc_at_end"] > 0.95


def test_looking_ahead_again_is_the_same_bytes(looked_ahead):
    first = pathlib.Path("ahead.jsonl").read_bytes()
    localize(**AHEAD | {"OUTPUT": "ahead_again.jsonl"})
    assert pathlib.Path("ahead_again.jsonl").read_bytes() == first


def test_marks_that_are_given_stay(looked_ahead):
    settings = {"RECORDS": "marked.jsonl", "LABEL_FIELD": None, "OUTPUT": "given_ahead.jsonl"}
    rows, quality = localize(**AHEAD | settings)
    assert quality["agreement"]["precision"] > 0.8
    for row, before in zip(rows, records.read_records("marked.jsonl"), strict=True):
        assert row.negative_spans == before.negative_spans
        assert "given_spans" not in row.extra
        given = marks.mark_tokens(before, vocabulary()).negative_pairs.tolist()
        now = marks.mark_tokens(row, vocabulary())
        strengths = dict(
            zip(map(tuple, now.negative_pairs.tolist()), now.negative_strengths, strict=True)
        )
        assert all(strengths[tuple(pair)] == 1 for pair in given)
        assert len(strengths) > len(given)


def test_what_looks_ahead_is_trained_on(looked_ahead, optimised):
    """Graded removal from labels alone: with a lone space gone, hardly any room is unwanted."""
    settings = {"RECORDS": "ahead.jsonl", "MODEL_DIR": "patched_ahead", "TRAIN_STEPS": 120}
    settings |= {"objectives.TntObjective.negative_term": "forward_kl"}
    assert rooms.run("train", settings) == 0
    sampled = {"CHECKPOINT_PATH": "patched_ahead", "OUTPUT": "after.jsonl", "TEMPERATURE": 1.0}
    assert rooms.run("generate", sampled | {"PROMPTS": "labelled.jsonl", "BATCH_SIZE": 96}) == 0
    marked = {"RECORDS": "after.jsonl", "OUTPUT": "after_marked.jsonl", "ALTERNATIVES": False}
    assert rooms.run("annotate", marked) == 0
    rates = [
        np.mean([bool(row.negative_spans) for row in records.read_records(path)])
        for path in ("marked.jsonl", "after_marked.jsonl")
    ]
    assert rates[1] < 0.25 * rates[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"LOOK_AHEAD": -1}, "LookAhead.num_tokens: expected at least 1, found -1"),
        ({"LOOK_AHEAD": 999}, "LOOK_AHEAD: expected at most the 37 tokens that the model can say"),
        (
            {"LOOK_AHEAD": 2, "look_ahead.settings_of.least_strength": -200},
            "LookAhead.least_strength: expected from -99 to 0, found -200",
        ),
    ],
)
def test_mistakes_in_looking_ahead_are_told_in_a_line(settings, message, capfd):
    assert rooms.run("localize", FOLDER_SETTINGS | settings | {"OUTPUT": "mistaken.jsonl"}) != 0
    assert message in capfd.readouterr().err
    assert not pathlib.Path("mistaken.jsonl").exists()
