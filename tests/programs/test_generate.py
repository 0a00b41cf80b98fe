"""How prompts are put into batches, and that neither batches nor devices change an output."""

import collections
import contextlib
import dataclasses
import itertools
import json
import pathlib
import re

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import golden_model, rooms
from helpers.huggingface_model import write_directory
from hypothesis import strategies as st

from tnt_jax import annotators, generate
from tnt_jax.data import records
from tnt_jax.data.token_automaton import Listed
from tnt_jax.models import masking, sharding
from tnt_jax.tokenizers import tokenization

# --- The plan -------------------------------------------------------------------------------------


@hypothesis.given(st.lists(st.integers(1, 300), min_size=1, max_size=80), st.integers(1, 6))
def test_every_prompt_fits_and_is_in_one_batch(lengths, batch_size):
    batches = generate._plan(lengths, batch_size, longest=100)
    indices = [index for batch in batches for index in batch.indices]
    assert sorted(indices) == list(range(len(lengths)))
    assert [lengths[index] for index in indices] == sorted(lengths, reverse=True)
    assert all(len(batch.indices) == batch_size for batch in batches[:-1])
    for batch in batches:
        assert max(min(lengths[index], 100) for index in batch.indices) <= batch.width <= 100
    assert len({batch.width for batch in batches}) <= min(5, 1 + len(batches) // 4)


def test_widths_by_hand():
    """Sixteen batches of two may have five widths, and need four; three batches have one."""
    lengths = [5, 30, 31, 70, 90, 200] + [5] * 26
    widths = [batch.width for batch in generate._plan(lengths, 2, longest=512)]
    # 200 and 90 share a batch, 70 and 31, 30 and 5.
    assert widths == [208, 80, 32] + [16] * 13
    assert [batch.width for batch in generate._plan(lengths[:6], 2, longest=512)] == [208] * 3


@hypothesis.given(st.lists(st.integers(1, 9), min_size=1, max_size=20), st.integers(1, 4))
def test_no_other_widths_would_pad_less(needed, num_widths):
    found = generate._few_widths(needed, num_widths)
    assert all(width >= n for width, n in zip(found, needed, strict=True))
    assert len(set(found)) <= num_widths
    least = min(
        sum(min(width for width in widths if width >= n) for n in needed)
        for widths in itertools.combinations_with_replacement(sorted(set(needed)), num_widths)
        if max(widths) == max(needed)
    )
    assert sum(found) == least


def test_the_next_batch_is_begun_before_one_is_fetched():
    events = []

    class Decoded:
        def __init__(self, batch):
            self.width = batch.width
            events.append(f"start {self.width}")

        @property
        def tokens(self):
            events.append(f"fetch {self.width}")
            return np.array([[self.width]])

    batches = [generate._Batch([], width) for width in (3, 2, 1)]
    for batch, tokens in generate._one_ahead(batches, Decoded):
        events.append(f"got {batch.width}, {tokens[0, 0]}")
    assert events == [
        *("start 3", "start 2", "fetch 3", "got 3, 3"),
        *("start 1", "fetch 2", "got 2, 2", "fetch 1", "got 1, 1"),
    ]
    assert list(generate._one_ahead([], Decoded)) == []


# --- What must not come up ------------------------------------------------------------------------


class Mask:
    """Bans some words, but for those of the inputs; supports the inputs as a whole."""

    def __init__(self, *words, inputs=()):
        self.words = tuple(dict.fromkeys((*words, *inputs)))

    def unwanted(self, record):
        return Listed(self.words, tuple(text for text in self.words if text == record.inputs))

    def innocent_words(self, text):
        return text.split()


def removed_after(masks, row, vocabulary, text):
    """What a mask removes after a text of a row, as bytes."""
    mask = masks.of_batch([row])
    ids = jnp.array(vocabulary.encode(text))

    @jax.jit
    def removed_at_end(tables, flags):
        def read(place, readings):
            return masking.read(tables, readings, ids[place][None])

        readings = jax.lax.fori_loop(0, len(ids), read, masking.begin(1))
        everything = jnp.ones((1, vocabulary.size), bool)
        return masking.removed(masking.Mask(tables, flags), readings, everything)[0]

    removed = removed_at_end(*mask)
    return {chr(i - 3) for i in np.flatnonzero(removed).tolist() if 3 <= i < 259}


def test_prompts_in_which_the_same_may_be_said_share_it():
    vocabulary = tokenization.Bytes()
    inputs = ["b a", "", "c", "b a", "c"]
    rows = [records.Record(id=str(n), inputs=text) for n, text in enumerate(inputs)]
    masks = generate.Masks.of(rows, Mask("a", inputs=("b a", "c")), vocabulary)
    assert masks.kind_of.tolist() == [0, 1, 2, 0, 2] and len(masks.kinds) == 3
    flags = masks.of_batch([4, 0, 2]).flags
    np.testing.assert_array_equal(flags, [masks.of_batch([n]).flags[0] for n in (2, 3, 4)])
    assert (flags[0] != flags[1]).any()
    assert removed_after(masks, 1, vocabulary, "x ") == {"a", "A", "c", "C"}
    assert removed_after(masks, 4, vocabulary, "x ") == {"a", "A"}
    # "b a" holds what may not be said by itself.
    assert removed_after(masks, 1, vocabulary, "b ") == {"a", "A", "c", "C"}
    assert removed_after(masks, 0, vocabulary, "b ") == {"c", "C"}


def test_starts_that_are_banned_by_hand(tmp_path):
    """What begins a word, but for the words that may be said."""
    vocabulary = tokenization.Bytes()
    mask = Mask("zoo", "zebra", "bee", inputs=("zoo", "a"))
    rows = [records.Record(id=str(n), inputs=text) for n, text in enumerate(["y", "zoo", "a"])]
    masks = generate.Masks.of(rows, mask, vocabulary, generate.MaskPlace(at="start"))
    starts = [removed_after(masks, row, vocabulary, "x ") for row in range(3)]
    assert starts == [{*"azbAZB"}, {*"abAB"}, {*"bzBZ"}]
    # Where "zoo" may be said, "zebra" is removed where they part.
    assert removed_after(masks, 1, vocabulary, "z") == {"e", "E"}

    # "zinc" and "by" begin as "zoo" and "bee" do.
    outputs = [records.Record(id=str(n), inputs="", targets="zinc by zinc by") for n in range(2)]
    records.write_records(tmp_path / "outputs.jsonl", outputs)
    place = generate.MaskPlace(at="start", innocent=str(tmp_path / "outputs.jsonl"))
    masks = generate.Masks.of(rows, mask, vocabulary, place)
    starts = [removed_after(masks, row, vocabulary, "x ") for row in range(3)]
    assert starts == [{*"aA"}, {*"aA"}, set()]
    assert removed_after(masks, 0, vocabulary, "z") == {*"eEoO"}


def test_words_of_the_prompt_may_begin_as_banned_ones_do():
    """The name of a place may be said where another place, which begins so, is banned."""
    vocabulary = tokenization.Bytes()
    mask = Mask("Riverside", "New Delhi", "old town")
    inputs = ["The River Bar", "a bar", "the Newt, in a new town", "the Rivers", "Riverside"]
    rows = [records.Record(id=str(n), inputs=text) for n, text in enumerate(inputs)]
    rows.append(records.Record(id="5", inputs="", messages=(("user", "The river"),)))
    masks = generate.Masks.of(rows, mask, vocabulary, generate.MaskPlace(at="start"))
    starts = [removed_after(masks, row, vocabulary, "x ") for row in range(6)]
    assert starts == [{*"nNoO"}, {*"rRnNoO"}, {*"rRoO"}, {*"nNoO"}, {*"nNoO"}, {*"nNoO"}]
    # What leaves the word of the prompt is removed, and so is what makes a banned text whole.
    assert removed_after(masks, 0, vocabulary, "x Rive") == set()
    assert removed_after(masks, 0, vocabulary, "x River") == {"s", "S"}
    assert removed_after(masks, 3, vocabulary, "x River") == set()
    assert removed_after(masks, 3, vocabulary, "x Riversid") == {"e", "E"}
    # Behind "new", which is the prompt's own, " Delhi" is not.
    assert removed_after(masks, 2, vocabulary, "x new ") == {*"dDrRoO"}
    assert removed_after(masks, 2, vocabulary, "x new") == set()
    # Those that may say the same share what is wrong.
    assert masks.kind_of.tolist() == [0, 1, 2, 3, 4, 0]
    at_end = generate.Masks.of(rows, mask, vocabulary)
    assert (
        not any(own for _, own in at_end.kinds)
        and removed_after(at_end, 1, vocabulary, "x Rive") == set()
    )


def test_a_list_of_words_is_held_once(tmp_path):
    (tmp_path / "words.txt").write_text("\n".join(f"word{n}" for n in range(500)))
    words = annotators.Lexicon(path=str(tmp_path / "words.txt"))
    rows = [records.Record(id=str(n), inputs="") for n in range(5000)]
    one, many = (generate.Masks.of(some, words, tokenization.Bytes()) for some in (rows[:1], rows))
    assert many.of_batch([3, 4999]).flags.shape == (2, one.of_batch([0]).flags.shape[1])
    assert len(many.kinds) == 1
    sizes = [[array.nbytes for array in jax.tree.leaves(masks.tables)] for masks in (one, many)]
    assert sizes[0] == sizes[1] and sum(sizes[0]) < 8_000_000


# --- The outputs ----------------------------------------------------------------------------------

# That of `rooms.MODEL`.
CONFIG = dataclasses.replace(
    golden_model.CONFIG,
    vocab_size=rooms.VOCAB_SIZE,
    num_encoder_layers=1,
    num_decoder_layers=1,
)


@pytest.fixture(scope="module", autouse=True)
def working_directory(tmp_path_factory):
    """The world of `rooms`, prompts of one to eleven rooms, and a model of random numbers.

    The numbers are the same on every machine, and such that the model does not hesitate: when each
    is off by a ten-thousandth of itself, it still says the same, greedily, sampled and by beams. So
    nothing here hangs on how a sum is rounded.
    """
    folder = tmp_path_factory.mktemp("world")
    rooms.write_world(folder)
    write_directory(folder / "model", CONFIG, scale=0.3)
    with contextlib.chdir(folder), rooms.devices_seen(8):
        rows = rooms.corpus()
        prompts = [
            records.Record(
                id=str(n), inputs=" ".join(row.inputs for row in rows[n : n + 1 + n % 11])
            )
            for n in range(45)
        ]
        records.write_records("prompts.jsonl", prompts)
        yield


@pytest.fixture(scope="module")
def fluent():
    """A model that says a state of every room."""
    rooms.train_original("fluent", 150, LEARNING_RATE=1e-2)
    return "fluent"


def outputs(name, **settings):
    """The generated ids of every prompt, in order."""
    defaults = {
        "PROMPTS": "prompts.jsonl",
        "CHECKPOINT_PATH": "model",
        "OUTPUT": f"{name}.jsonl",
        "TASK_FEATURE_LENGTHS": {"inputs": 40},
        "BATCH_SIZE": 8,
    }
    assert rooms.run("generate", defaults | settings) == 0
    found = records.read_records(f"{name}.jsonl")
    assert [row.id for row in found] == [str(n) for n in range(45)]
    return [row.target_ids for row in found]


@pytest.mark.parametrize("decoder", [{}, {"TEMPERATURE": 1.0}], ids=["greedy", "sampling"])
def test_outputs_do_not_depend_on_the_batches(decoder, monkeypatch, capsys):
    bucketed = outputs("bucketed", **decoder)
    assert len(set(bucketed)) > 10
    printed = capsys.readouterr().out
    assert re.search(r"\d outputs/s, \d+ tokens/s, in input widths of 16, 32\.", printed)
    # As they come, all in one width.
    monkeypatch.setattr(
        generate,
        "_plan",
        lambda lengths, batch_size, longest: [
            generate._Batch(list(range(len(lengths)))[start : start + batch_size], longest)
            for start in range(0, len(lengths), batch_size)
        ],
    )
    assert outputs("unsorted", **decoder) == bucketed


def test_an_end_of_the_user_ends_an_output(capsys):
    """What is said up to it is what is said without it, and nothing stands after it."""
    free = outputs("free")
    end = collections.Counter(id_ for ids in free for id_ in ids[1:-1]).most_common(1)[0][0]
    assert 5 < sum(end in ids for ids in free) < 45
    capsys.readouterr()
    expected = [ids[: ids.index(end) + 1] if end in ids else ids for ids in free]
    assert outputs("stopped", **{"decoding.Decoding.end_ids": (end,)}) == expected
    unended = sum(not {1, end} & {*ids} for ids in expected)
    assert f"45 outputs, of which {unended} do not end" in capsys.readouterr().out


MASKED = {"MASK": "@annotators.Lexicon()", "annotators.Lexicon.path": "said.txt"}


@pytest.mark.parametrize(
    "decoder",
    [{}, {"NUM_BEAMS": 3}, MASKED, MASKED | {"NUM_BEAMS": 2}],
    ids=["greedy", "beams", "masked", "masked_beams"],
)
def test_eight_devices_give_the_tokens_of_one(decoder, monkeypatch):
    pathlib.Path("said.txt").write_text("fern\njade\nquiet\n")  # what it says most often
    meshes = []

    def make_mesh(shape, devices):
        # The first run is on one device, whatever it asks for.
        meshes.append(make_real_mesh(shape, devices if meshes else devices[:1]))
        return meshes[-1]

    make_real_mesh = sharding.make_mesh
    monkeypatch.setattr(sharding, "make_mesh", make_mesh)
    expected = outputs("one", **decoder)
    for sizes in [(2, 4, 1), (4, 1, 2), (2, 2, 2)]:
        names = ("DATA_DEVICES", "FSDP_DEVICES", "MODEL_DEVICES")
        assert outputs("eight", **decoder, **dict(zip(names, sizes, strict=True))) == expected
        assert tuple(meshes[-1].shape.values()) == sizes


@pytest.mark.parametrize("list_style", [str.upper, str.title])
@pytest.mark.parametrize("name", ["Lexicon", "Gazetteer"])
@pytest.mark.parametrize(
    "decoder", [{}, {"TEMPERATURE": 1.0}, {"NUM_BEAMS": 2}], ids=["greedy", "sampling", "beams"]
)
def test_nothing_is_left_of_what_a_mask_has(name, list_style, decoder, fluent):
    """A list in another case than the outputs, which say one of its words in every sentence."""
    listed = [list_style(word) for word in rooms.STATES.values()]
    if name == "Lexicon":
        pathlib.Path("listed").write_text("\n".join(listed))
    else:
        pathlib.Path("listed").write_text(json.dumps({"state": listed}))
    annotator = getattr(annotators, name)(path="listed")
    settings = {
        "PROMPTS": "corpus.jsonl",
        "CHECKPOINT_PATH": fluent,
        "OUTPUT": "masked.jsonl",
    }
    mask = {"MASK": f"@annotators.{name}()", f"annotators.{name}.path": "listed"}

    def marked_texts(more):
        assert rooms.run("generate", settings | decoder | more) == 0
        for row in records.read_records("masked.jsonl"):
            for span in annotator.annotate(row).spans:
                yield row.targets[span.start : span.end]

    assert len([*marked_texts({})]) >= 30  # of 60 outputs
    assert [*marked_texts(mask)] == []


def test_the_place_of_a_mask_is_one_of_two(capsys):
    settings = {"PROMPTS": "prompts.jsonl", "CHECKPOINT_PATH": "model", "OUTPUT": "masked.jsonl"}
    assert rooms.run("generate", settings | {"MASK_AT": "middle"}) == 2
    assert "MASK_AT: expected one of end, start, found 'middle'." in capsys.readouterr().err


@pytest.mark.parametrize("more", [{}, {"MASK_INNOCENT": "outputs.jsonl"}])
def test_the_place_of_a_mask_needs_a_mask(more, capsys):
    settings = {"PROMPTS": "prompts.jsonl", "CHECKPOINT_PATH": "model", "OUTPUT": "masked.jsonl"}
    assert rooms.run("generate", settings | more | {"MASK_AT": "start"}) == 2
    assert "MASK_AT is set, to 'start', and MASK is None. Set MASK" in capsys.readouterr().err


def test_the_words_of_a_mask_are_not_written_over(capsys):
    pathlib.Path("said.txt").write_text("fern\n")
    pathlib.Path("known.jsonl").write_text('{"inputs": "", "targets": "the fern room"}\n')
    settings = {"PROMPTS": "prompts.jsonl", "CHECKPOINT_PATH": "model", "OUTPUT": "known.jsonl"}
    assert rooms.run("generate", settings | MASKED | {"MASK_INNOCENT": "known.jsonl"}) == 2
    assert "expected None with MASK_AT='end', which lets every" in capsys.readouterr().err
    of_mask = MASKED | {"MASK_AT": "start", "MASK_INNOCENT": "known.jsonl"}
    assert rooms.run("generate", settings | of_mask) == 2
    assert "MASK_INNOCENT" in capsys.readouterr().err
    assert "the fern room" in pathlib.Path("known.jsonl").read_text()


def test_a_mask_that_is_a_class_lacks_its_parentheses(capsys):
    settings = {"PROMPTS": "prompts.jsonl", "CHECKPOINT_PATH": "model", "OUTPUT": "masked.jsonl"}
    assert rooms.run("generate", settings | {"MASK": "@annotators.Lexicon"}) == 2
    assert "expected Annotator or None, found @annotators.Lexicon" in capsys.readouterr().err
