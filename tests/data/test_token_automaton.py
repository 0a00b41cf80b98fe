"""What is removed is what the annotator would mark: compared with it, token by token."""

import dataclasses
import json
import random
import tracemalloc
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import tiny_tokenizers
from hypothesis import given
from hypothesis import strategies as st

from tnt_jax import annotators
from tnt_jax.annotators import phrases
from tnt_jax.data import records, words
from tnt_jax.data.text_automaton import Automaton
from tnt_jax.data.token_automaton import (
    BEGINNING,
    Innocent,
    Listed,
    Reading,
    TokenAutomaton,
)
from tnt_jax.models import masking
from tnt_jax.runtime.errors import UsageError
from tnt_jax.tokenizers import hub_tokenizer, tokenization

# Few characters, so that entries, words and their joints collide often: apostrophes, hyphens,
# joints of digits, accents in two orders, letters of two folds, a symbol of two characters, letters
# of scripts without spaces, with marks of their own, Korean syllables that begin or end alike, an
# emoji.
ALPHABET = (
    "abBsS''\u2019  -\u2010.,:14e\u00e9\u0301\u0323\u00df\u017f\ufb01$\u2260"
    "\u65e5\u672c\u304b\u304c\u3099\u0e07\u0e48\u0e31"
    "\ubc14\ubc29\ubcf4\uc544\uc559\u2764\ufe0f"
)
ENTRIES = [
    *("city", "the", "the city", "city centre", "city centre place", "caf\u00e9", "caf", "it's"),
    *("4.5", "4", "don't", "don", "a b", "a b a", "a", "'s", "$", "\u65e5\u672c", "s"),
]

# "Japan" and "fool" in Chinese, "fool" in Thai and the same without its tone mark, a Japanese
# letter and the one that a mark makes of it; and how they may go on.
UNSPACED_ENTRIES = [
    *("\u65e5\u672c", "\u65e5\u672c\u9152", "\u672c", "\u50bb\u74dc", "\u0e42\u0e07\u0e48"),
    *(
        "\u0e42\u0e07",
        "\u304b",
        "\u304c",
        "ab\u65e5",
        "\u50bb \u65e5",
        "\u65e54.5",
        "\u65e5's",
        "\u65e5'a",
    ),
]

texts = st.text(alphabet=ALPHABET, max_size=14)


# --- Characters -----------------------------------------------------------------------------------


@given(
    entries=st.lists(
        st.text(alphabet=ALPHABET, max_size=6) | st.sampled_from(UNSPACED_ENTRIES), max_size=5
    ),
    text=texts | st.lists(st.sampled_from(UNSPACED_ENTRIES), max_size=4).map("".join),
    cs=st.booleans(),
)
def test_an_automaton_finds_what_annotators_mark(entries, text, cs):
    """However the text goes on: at every character."""
    automaton = Automaton.of(entries, case_sensitive=cs)
    listed = phrases.Phrases(
        ((entry, entry) for entry in entries if words.keys(entry)), case_sensitive=cs
    )
    name_of = {number: path for path, number in automaton.phrase_of.items()}
    for end in range(len(text) + 1):
        expected = [
            words.keys(text[first:last], case_sensitive=cs)
            for first, last, _ in listed.longest_mentions(text[:end])
        ]
        # A set of mentions at one character has no order and no repeats.
        found = [name_of[number] for number in automaton.read(text[:end])[1]]
        assert set(found) == set(expected)


def test_syllables_of_no_listed_word_are_as_any_other_letter():
    """Korean has 11,172 syllables, and hundreds of them begin with parts of the listed ones."""
    automaton = Automaton.of(["\ubc14\ubcf4", "\uba4d\uccad\uc774", "\ub3c4\ub451"])
    syllables = [text for text in automaton.class_of if len(text) > 1]
    # The seven, and three of them without the consonant that they end with.
    assert len(syllables) == 7 + 3
    classes = automaton.char_classes()
    assert classes[0xBC29] == classes[ord("x")] != classes[0xBC14]


# --- Tokens ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vocabularies(tmp_path_factory):
    root = tmp_path_factory.mktemp("vocabularies")
    found = {
        kind: hub_tokenizer.HubTokenizer(str(tiny_tokenizers.KINDS[kind](root / kind)))
        for kind in ("gpt2", "llama2", "mistral")
    }
    said = ["the city centre (a b) is in the cafe, 4.5 don't it's a place", "a b abc city"]
    tokenization.train_sentencepiece([*said, "caf\u00e9 '$"], root / "small.model", vocab_size=35)
    fallback = tiny_tokenizers.byte_fallback_sentencepiece(root / "fallback.model", said, 300)
    unspaced = ["".join(UNSPACED_ENTRIES), "\u4f60\u662f\u50bb\u74dc", "\u65e5 a ab s 4 . ' -"]
    tokenization.train_sentencepiece(unspaced, root / "unspaced.model", vocab_size=30)
    return found | {
        "unspaced": tokenization.SentencePiece(str(root / "unspaced.model")),
        "bytes": tokenization.Bytes(extra_ids=3),
        "sentencepiece": tokenization.SentencePiece(str(root / "small.model"), extra_ids=2),
        "fallback": tokenization.SentencePiece(str(fallback)),
    }


KINDS = ("gpt2", "llama2", "mistral", "bytes", "sentencepiece", "fallback")
kinds = pytest.mark.parametrize("kind", KINDS)


def sayable(vocabulary):
    silent = vocabulary.end_ids | vocabulary.never_said
    return [i for i in range(vocabulary.size) if i not in silent]


def tempting(vocabulary, entries):
    """Ids that say a part of an entry."""
    said = {i: vocabulary.decode([i]).strip().casefold() for i in sayable(vocabulary)}
    return [i for i, text in said.items() if any(text in e.casefold() for e in entries)]


@kinds
def test_a_token_is_removed_where_an_annotator_would_mark_it_and_nowhere_else(
    kind, vocabularies, tmp_path
):
    """All tokens, after prefixes of which each token was chosen among those that are left."""
    compare_with_a_lexicon(vocabularies[kind], ENTRIES, random.Random(kind), tmp_path)


@pytest.mark.parametrize("kind", ["bytes", "gpt2", "fallback", "unspaced"])
def test_it_is_in_scripts_without_spaces(kind, vocabularies, tmp_path):
    compare_with_a_lexicon(vocabularies[kind], UNSPACED_ENTRIES, random.Random(kind), tmp_path)


def test_what_is_listed_is_removed_within_a_sentence_without_spaces(vocabularies):
    """By hand: the last piece of "you are a fool" in Chinese is removed, and no other."""
    sentence = "\u4f60\u662f\u50bb\u74dc"
    for kind in ("bytes", "fallback", "unspaced"):
        vocabulary = vocabularies[kind]
        compiled = TokenAutomaton.of(["\u50bb\u74dc"], vocabulary)
        flags, reading, is_removed = compiled.flags(()), BEGINNING, []
        for token in vocabulary.encode(sentence):
            is_removed.append(token in compiled.removed(reading, flags))
            reading = compiled.read(reading, token)
        assert is_removed == [False] * (len(is_removed) - 1) + [True]


def compare_with_a_lexicon(vocabulary, listed_texts, rng, tmp_path):
    for number in range(3):
        entries = rng.sample(listed_texts, 4)
        (tmp_path / "list.txt").write_text("\n".join(entries))
        lexicon = annotators.Lexicon(path=str(tmp_path / "list.txt"), case_sensitive=number == 2)
        listed = lexicon.unwanted(None)
        compiled = listed.compiled(vocabulary)
        flags, reading, ids = compiled.flags(()), BEGINNING, []
        near = tempting(vocabulary, entries)
        for _ in range(6):
            expected = {
                token
                for token in sayable(vocabulary)
                if lexicon.annotate(
                    records.Record(id="", inputs="", targets=vocabulary.decode([*ids, token]))
                ).spans
            }
            found = {*compiled.removed(reading, flags).tolist()} & {*sayable(vocabulary)}
            assert found == expected, (entries, vocabulary.decode(ids))
            left = [token for token in near if token not in found] or sayable(vocabulary)
            ids.append(rng.choice(left))
            reading = compiled.read(reading, ids[-1])


@kinds
def test_no_adversary_says_what_a_gazetteer_marks(kind, vocabularies, tmp_path):
    """Entries hold one another, and some of each row may be said.

    Whoever chooses among what a mask leaves never has something marked in an output that ends, nor
    in one that goes on but for what a longer entry, which may be said, is still to make right.
    """
    vocabulary, rng = vocabularies[kind], random.Random(kind)
    entries = ENTRIES[:-3]  # which a letter begins
    (tmp_path / "list.json").write_text(json.dumps({"value": entries}))
    gazetteer = annotators.Gazetteer(path=str(tmp_path / "list.json"))
    rows = [
        records.Record(id="", inputs=" ; ".join(rng.sample(entries, rng.randint(0, 3))))
        for _ in range(40)
    ]
    listed = [gazetteer.unwanted(row) for row in rows]
    compiled = listed[0].compiled(vocabulary)
    flags = np.stack([compiled.flags(of.allowed) for of in listed])
    mask = masking.Mask(masking.Tables.of(compiled, vocabulary.size + 2), flags)
    removed, read = jax.jit(masking.removed), jax.jit(masking.read)
    can_be_said = np.zeros((len(rows), vocabulary.size + 2), bool)
    can_be_said[:, [*sayable(vocabulary), *vocabulary.end_ids]] = True
    near = tempting(vocabulary, entries)

    readings, ids, has_ended = masking.begin(len(rows)), [[] for _ in rows], [False] * len(rows)
    num_compared = 0
    for _ in range(10):
        is_left = can_be_said & ~np.asarray(removed(mask, readings, jnp.asarray(can_be_said)))
        chosen = []
        for row, record in enumerate(rows):
            reading = Reading(int(readings.state[row]), int(readings.within[row]))
            is_to_mend = bool(flags[row, compiled.flag_places.end_in(reading.state)])
            if not is_to_mend:  # tables on devices and here say the same
                here = np.ones(vocabulary.size, bool)
                here[compiled.removed(reading, flags[row])] = False
                here &= can_be_said[row, : vocabulary.size]
                np.testing.assert_array_equal(here, is_left[row, : vocabulary.size])
                num_compared += 1
            some = [token for token in near if is_left[row, token]]
            left = some if some and rng.random() < 0.8 else np.flatnonzero(is_left[row]).tolist()
            token = vocabulary.end_id if has_ended[row] else rng.choice(left)
            chosen.append(token)
            if token in vocabulary.end_ids:
                has_ended[row] = True
                text = vocabulary.decode(ids[row])
                assert not gazetteer.annotate(dataclasses.replace(record, targets=text)).spans
            else:
                ids[row].append(token)
        readings = read(mask.tables, readings, jnp.array(chosen))
        for row, record in enumerate(rows):
            text = vocabulary.decode(ids[row])
            spans = gazetteer.annotate(dataclasses.replace(record, targets=text)).spans
            is_to_mend = flags[row, compiled.flag_places.end_in(int(readings.state[row]))]
            assert bool(spans) == bool(is_to_mend and not has_ended[row]), text
    assert num_compared > 100


def test_a_longer_text_that_may_be_said_is_all_that_may_follow():
    """By hand, in bytes: "rice boat" may be said, "rice" may not."""
    vocabulary = tokenization.Bytes()
    compiled = TokenAutomaton.of(["rice", "rice boat"], vocabulary)
    flags = compiled.flags(["rice boat"])[None]
    mask = masking.Mask(masking.Tables.of(compiled, vocabulary.size), flags)

    @jax.jit
    def removed_at(readings):
        return masking.removed(mask, readings, jnp.ones((1, vocabulary.size), bool))[0]

    def left_after(text):
        reading = BEGINNING
        for token in vocabulary.encode(text):
            reading = compiled.read(reading, token)
        removed = removed_at(masking.Readings(*map(jnp.atleast_1d, reading)))
        return {chr(i - 3) for i in np.flatnonzero(~removed).tolist() if 3 <= i < 3 + 128}

    assert {"e", "E", "x", " "} <= left_after("ric")
    spaces = {chr(i) for i in range(128) if chr(i).isspace()} | {"-"}
    assert left_after("rice") == spaces
    assert left_after("rice ") == {"b", "B"} | (spaces - {"-"})
    assert left_after("rice-BO") == {"a", "A"}
    # It is whole; as "boats" it would be "rice" and another word.
    after = left_after("rice boat")
    assert {" ", ".", "-"} <= after and not {"s", "S", "1"} & after


def test_innocent_words_that_hold_a_listed_text_are_said():
    """ "pub" takes nothing from "public", but where the cut is between its letters and the rest."""
    vocabulary = tokenization.Bytes()
    compiled = TokenAutomaton.of(["pub"], vocabulary)
    flags = compiled.flags(())
    reading = BEGINNING
    for token in vocabulary.encode("republic pu"):
        removed = compiled.removed(reading, flags)
        assert not len(removed)
        reading = compiled.read(reading, token)
    assert compiled.removed(reading, flags).tolist() == vocabulary.encode("Bb")


def test_words_that_are_innocent_too_are_as_if_all_were_given_at_once():
    automaton = Automaton.of(["new york", "new delhi city", "york", "Riverside", "old"])
    begun = {state for of in automaton.begun for state in of}
    for many in ([], ["new", "yes"], ["delft", "rival"]):
        for few in (["new"], ["York", "yorker"], ["river bar"], ["delhi", "ode", "new"], ["x"]):
            together = Innocent([*many, *few]).states(automaton)
            apart = Innocent(many).and_also(few).states(automaton)
            assert {s for s in begun if together[s]} == {s for s in begun if apart[s]}


def test_a_run_of_letters_without_an_end_takes_no_room():
    tracemalloc.start()
    innocent = Innocent(["acgt" * 25_000])
    adds = innocent.may_add(Automaton.of(["answer", "bad"]))
    assert not adds("x" * 100_000) and adds("b" * 100_000)
    assert tracemalloc.get_traced_memory()[1] < 20_000_000
    tracemalloc.stop()


@pytest.mark.parametrize("can_spell", [False, True])
def test_nothing_leads_to_a_text_that_the_vocabulary_cannot_spell_from_there(can_spell):
    """What may begin "parkside" stays if a token goes on; else it is what it says."""
    said = [b"the", b" park", b"s", b" a", b" parkside", b"z", *([b"ide"] if can_spell else [])]
    vocabulary = types.SimpleNamespace(token_bytes=tuple(said), run_ids=(), says_broken=False)
    compiled = TokenAutomaton.of(("park", "parks", "parkside"), vocabulary)
    flags = compiled.flags(["parkside"])
    reading = compiled.read(BEGINNING, 0)
    removed = [said[i] for i in compiled.removed(reading, flags)]
    assert removed == ([] if can_spell else [b" park"])
    if can_spell:
        for token in (1, 2):
            reading = compiled.read(reading, token)
        mask = masking.Mask(masking.Tables.of(compiled, len(said)), flags[None])
        at = masking.Readings(*map(jnp.atleast_1d, reading))
        left = ~masking.removed(mask, at, jnp.ones((1, len(said)), bool))[0]
        assert [said[i] for i in np.flatnonzero(left)] == [b"ide"]


def test_a_text_that_is_a_whole_file_is_refused():
    """A list without line ends; what repeats in it would take gigabytes."""
    listed = Listed(("dirty", "[" * 100_000))
    with pytest.raises(
        UsageError, match=r"at most 2,000 characters.* of 100,000: '\[{40}' \.\.\. S"
    ):
        listed.compiled(tokenization.Bytes())
