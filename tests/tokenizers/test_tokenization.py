import copy
import itertools
import pickle
import re

import hypothesis
import numpy as np
import pytest
import sentencepiece
import seqio
from helpers import tiny_tokenizers
from hypothesis import strategies as st

from tnt_jax.data import mark_alternatives, marks, records
from tnt_jax.data.token_automaton import Listed
from tnt_jax.runtime.errors import UsageError
from tnt_jax.tokenizers import tokenization

TEXTS = [
    f"{name} is a wonderful {food} place in the {area} ({area})."
    for name, food, area in itertools.product(
        ["Wagamama", "The Eagle", "Clowns", "Cocum", "Strada"],
        ["Japanese", "English", "Indian", "Italian"],
        ["city centre", "riverside", "countryside"],
    )
]


@pytest.fixture(scope="module")
def small_vocabulary(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocabulary") / "small.model"
    tokenization.train_sentencepiece(TEXTS, path, vocab_size=56, user_defined_symbols=["#NAME#"])
    return tokenization.SentencePiece(str(path))


@pytest.fixture(scope="module")
def byte_fallback_vocabulary(tmp_path_factory):
    """What users may bring: unknown characters spelt in bytes."""
    path = tmp_path_factory.mktemp("vocabulary") / "fallback.model"
    tiny_tokenizers.byte_fallback_sentencepiece(path, TEXTS, 305)
    return tokenization.SentencePiece(str(path))


@pytest.fixture(scope="module")
def t5_vocabulary(shared_data):
    path = shared_data / "data" / "t5_vocab" / "sentencepiece.model"
    return tokenization.SentencePiece(str(path), extra_ids=100)


BYTES = tokenization.Bytes()


def pieces(vocabulary, ids):
    return [vocabulary.processor.id_to_piece(int(i)) for i in ids]


def marked(vocabulary, targets, *unwanted, **fields):
    """(texts of the marked tokens, the marking itself), for spans given as their texts."""
    spans = tuple((targets.index(text), targets.index(text) + len(text)) for text in unwanted)
    record = records.Record(id="r", inputs="", targets=targets, negative_spans=spans, **fields)
    result = marks.mark_tokens(record, vocabulary)
    positions, ids = result.negative_pairs.T
    np.testing.assert_array_equal(result.target_ids[positions], ids)
    if isinstance(vocabulary, tokenization.Bytes):
        return [bytes([i - 3]) for i in ids], result
    return pieces(vocabulary, ids), result


# --- Known ids and extents ------------------------------------------------------------------------


def test_the_t5_vocabulary_gives_the_published_ids(t5_vocabulary):
    assert tokenization.check_vocabulary(t5_vocabulary) == 32_100
    text = "The house is wonderful."
    ids = t5_vocabulary.prompt_ids(text)
    assert ids == [37, 629, 19, 1627, 5, 1]
    assert t5_vocabulary.extents(ids) == (
        text,
        [(0, 3), (4, 9), (10, 12), (13, 22), (22, 23), (23, 23)],
    )


def test_an_extent_leaves_out_the_leading_space_and_special_tokens(small_vocabulary):
    ids = small_vocabulary.processor.piece_to_id(["▁centre", "#NAME#", "▁", "a", ").", "▁("])
    assert small_vocabulary.extents([*ids, 0, 1, ids[0]]) == (
        "centre#NAME# a). (",
        [(0, 6), (6, 12), (13, 13), (13, 14), (14, 16), (17, 18), *[(18, 18)] * 3],
    )


def test_unknown_pieces_and_ids_beyond_the_vocabulary_are_question_marks(small_vocabulary):
    a = small_vocabulary.processor.piece_to_id("a")
    assert small_vocabulary.extents([a, 2, a, 99]) == (
        "a ⁇ a ⁇ ",
        [(0, 1), (2, 3), (4, 5), (6, 7)],
    )


def test_extra_ids_are_text(t5_vocabulary):
    text, extents = t5_vocabulary.extents([37, 32_099, 629])
    assert [text[start:end] for start, end in extents] == ["The", "<extra_id_0>", "house"]


def test_a_byte_stands_for_its_whole_character():
    ids = BYTES.prompt_ids("a é😀")
    text, extents = BYTES.extents([*ids[:3], 0, *ids[3:]])
    assert text == "a é😀"
    assert extents == [(0, 1), (2, 2), (2, 3), (2, 2), (2, 3), *[(3, 4)] * 4, (4, 4)]


def test_bytes_that_form_no_character_stand_for_nothing():
    whole, broken = list("é".encode()), list("日".encode())[:2]
    ids = [byte + 3 for byte in [*broken, *whole, *broken, ord("x")]]
    assert BYTES.extents(ids) == (
        "éx",
        [(0, 0), (0, 0), (0, 1), (0, 1), (1, 1), (1, 1), (1, 2)],
    )


def test_fallback_bytes_stand_for_their_whole_character(byte_fallback_vocabulary):
    targets = "a 日 place"
    texts, _ = marked(byte_fallback_vocabulary, targets, "日")
    assert texts == ["<0xE6>", "<0x97>", "<0xA5>"]
    ids = byte_fallback_vocabulary.prompt_ids(targets)
    assert marked(byte_fallback_vocabulary, targets, "日", target_ids=tuple(ids))[0] == texts


vocabulary_names = pytest.mark.parametrize(
    "name", ["small_vocabulary", "byte_fallback_vocabulary", "bytes"]
)


def vocabulary_called(name, request):
    return BYTES if name == "bytes" else request.getfixturevalue(name)


@vocabulary_names
@hypothesis.settings(suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.given(data=st.data())
def test_extents_lie_in_order_in_the_decoded_text(name, request, data):
    vocabulary = vocabulary_called(name, request)
    # Ten more ids than there are: a model's padding rows.
    token_ids = st.integers(0, vocabulary.size + 9)
    ids = data.draw(st.lists(token_ids, max_size=12))
    text, extents = vocabulary.extents(ids)
    assert text == vocabulary.decode(ids)
    assert len(extents) == len(ids)
    assert all(0 <= start <= end <= len(text) for start, end in extents)
    owned = {i for start, end in extents for i in range(start, end)}
    assert {i for i, character in enumerate(text) if character != " "} <= owned
    # Nothing but the "?" of unknown tokens lies beside a space that a token owns.
    assert not any(
        text[start] == " " or text[end - 1] == " " for start, end in extents if start < end
    )


def test_pieces_are_the_targets_cut_up(t5_vocabulary):
    record = records.Record(id="r", inputs="", targets="The house is small.")
    assert marks.pieces(record, t5_vocabulary) == ["The", " house", " is", " small", ".", ""]
    # One character in three bytes is said once, and what was cut before its end has no EOS.
    euro = records.Record(id="r", inputs="", targets="a €", target_ids=(100, 35, 229, 133, 175))
    assert marks.pieces(euro, BYTES) == ["a", " ", "€", "", ""]
    nothing = records.Record(id="r", inputs="", targets="", target_ids=(1,))
    assert marks.pieces(nothing, BYTES) == [""]
    no_token = records.Record(id="r", inputs="", targets="", target_ids=())
    assert marks.pieces(no_token, t5_vocabulary) == []


@vocabulary_names
@hypothesis.settings(suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.given(data=st.data())
def test_there_are_as_many_pieces_as_tokens(name, request, data):
    vocabulary = vocabulary_called(name, request)
    ids = data.draw(st.lists(st.integers(3, vocabulary.size - 1), max_size=6))
    ids += data.draw(st.sampled_from([[], [1]]))
    text = vocabulary.decode(ids)
    row = records.Record(id="r", inputs="", targets=text, target_ids=tuple(ids))
    pieces = marks.pieces(row, vocabulary)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == text


# --- Marking --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("unwanted", "expected"),
    [
        ("riverside", ["riverside"]),
        (" riverside ", ["riverside"]),  # a span may take the spaces along
        ("ver", ["riverside"]),  # part of a token marks the token
        ("(riverside).", ["▁(", "riverside", ")."]),
        (")", [")."]),
        ("the r", ["t", "h", "e", "riverside"]),  # not the lone "▁" between them
    ],
)
def test_a_token_is_negative_when_its_extent_overlaps(small_vocabulary, unwanted, expected):
    texts, result = marked(small_vocabulary, "It is in the riverside (riverside).", unwanted)
    assert texts == expected
    assert result.num_spans_without_token == 0
    assert result.target_ids[-1] == 1
    assert result.negative_pairs.dtype == result.target_ids.dtype == np.int32


def test_spans_count_code_points_not_bytes(t5_vocabulary):
    targets = "Café 😀 in riverside, 東京 ok"
    assert marked(t5_vocabulary, targets, "riverside")[0] == ["▁river", "side"]
    assert marked(t5_vocabulary, targets, "😀")[0] == ["<unk>"]
    assert marked(t5_vocabulary, targets, "京")[0] == ["<unk>"]
    texts, _ = marked(BYTES, targets, "é 😀")
    assert b"".join(texts) == "é😀".encode()


def test_spans_lie_in_the_text_as_given_though_the_tokeniser_normalises_it(t5_vocabulary):
    # Ligature, tab, two spaces, full-width letters, a combining accent and a vulgar fraction become
    # other characters, and other numbers of them.
    targets = "ﬁne\tＨouse  cafe\u0301 ½ ok"
    for unwanted, expected in [
        ("ﬁne", ["▁fine"]),
        ("Ｈouse", ["▁House"]),
        ("cafe\u0301", ["▁café"]),
        ("½", ["▁1", "<unk>", "2"]),
        ("ok", ["▁", "ok"]),
    ]:
        texts, _ = marked(t5_vocabulary, targets, unwanted)
        assert texts == [piece for piece in expected if piece != "▁"]


def test_a_span_without_token_is_counted(small_vocabulary):
    record = records.Record(
        id="r", inputs="", targets="in the city", negative_spans=((2, 3), (7, 8))
    )
    result = marks.mark_tokens(record, small_vocabulary)
    assert result.num_spans_without_token == 1
    assert pieces(small_vocabulary, result.negative_pairs[:, 1]) == ["▁c"]


@pytest.mark.parametrize(
    ("targets", "unwanted", "expected"),
    [
        ("good \u200b bad", "\u200b", []),
        ("good \u200b bad", " \u200b ", []),
        ("good \u200bbad", "\u200b", []),
        ("good\ufeff bad", "\ufeff", []),
        ("good bad\x01", "\x01", []),
        ("\u200egood bad", "\u200e", []),
        ("\x01good bad", "\x01", []),
        ("good b\x01ad", "\x01", []),  # in the middle of a token
        # What is dropped does not hide what is not.
        ("good \u200b bad", "\u200b bad", ["▁bad"]),
        ("good \u200b bad", "good \u200b", ["▁good"]),
        ("good\x01 bad", "d\x01 b", ["▁good", "▁bad"]),
        ("good b\x01ad", "b\x01", ["▁bad"]),
        ("good \u200b½", "½", ["▁1", "<unk>", "2"]),  # three tokens spell it, whatever is before it
    ],
)
def test_a_mark_on_what_is_dropped_is_a_span_without_token(
    t5_vocabulary, targets, unwanted, expected
):
    texts, result = marked(t5_vocabulary, targets, unwanted)
    assert texts == expected
    assert result.num_spans_without_token == (not expected)


@pytest.mark.parametrize("name", ["t5_vocabulary", "small_vocabulary"])
def test_every_character_that_is_dropped_marks_nothing(name, request):
    """It is dropped if the ids are those of the text without it, or with a space in its place."""
    vocabulary = request.getfixturevalue(name)
    characters = [chr(i) for i in (*range(0x2A00), *range(0xFE00, 0x10000))]
    num_dropped = 0
    for before, after in [("the ", " river"), ("the riv", "er"), ("the", " river"), ("", "the")]:
        texts = [before + character + after for character in characters]
        without = vocabulary.processor.encode([before + after, f"{before} {after}"])
        span = (len(before), len(before) + 1)
        for number, ids in enumerate(vocabulary.processor.encode(texts)):
            is_dropped = ids in without
            if is_dropped or number % 20 == 0:  # of the others a few, for marking takes longer
                record = records.Record(
                    id="r", inputs="", targets=texts[number], negative_spans=(span,)
                )
                result = marks.mark_tokens(record, vocabulary)
                assert (not len(result.negative_pairs)) == is_dropped, ascii(texts[number])
                assert result.num_spans_without_token == is_dropped
            num_dropped += is_dropped
    assert num_dropped > 4 * 50


def test_no_annotation_marks_nothing(small_vocabulary):
    for spans in (None, ()):
        record = records.Record(id="r", inputs="", targets="in the city", negative_spans=spans)
        assert marks.mark_tokens(record, small_vocabulary).negative_pairs.shape == (0, 2)


def test_exact_ids_are_kept(small_vocabulary):
    text = "It is in the riverside."
    sampled = {
        tuple(
            small_vocabulary.processor.encode(text, enable_sampling=True, alpha=0.2, nbest_size=-1)
        )
        for _ in range(30)
    }
    assert len(sampled) > 3
    for ids in sampled:
        texts, result = marked(small_vocabulary, text, "riverside", target_ids=(*ids, 1))
        np.testing.assert_array_equal(result.target_ids, [*ids, 1])
        assert "".join(texts) == "riverside"
    # A generation that met the length limit has no EOS, and gets none.
    np.testing.assert_array_equal(marked(small_vocabulary, text, target_ids=ids)[1].target_ids, ids)


def test_further_ids_are_removed_beside_the_marked_ones(small_vocabulary):
    record = records.Record(
        id="r",
        inputs="",
        targets="the riverside",
        negative_spans=((4, 13),),
        negative_token_ids=((6, (9, 7, 9)), (5, (25,)), (0, (8, 2))),
    )
    result = marks.mark_tokens(record, small_vocabulary)
    assert pieces(small_vocabulary, result.target_ids) == [
        *("▁", "t", "h", "e", "▁", "riverside", "</s>")
    ]
    own = result.target_ids[5]
    assert own == 25  # listed and marked: removed once
    assert result.negative_pairs.tolist() == [[0, 2], [0, 8], [5, 25], [6, 7], [6, 9]]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_ids": (5, 1)}, "target_ids decode to 'a', but targets is 'the city'"),
        ({"target_ids": (5, 1, 0)}, "go on after the EOS (id 1) at position 1"),
        ({"negative_token_ids": ((0, (56,)),)}, "has id 56, but the vocabulary has 56 ids"),
        ({"negative_token_ids": ((40, (5,)),)}, "has position 40, but its targets have"),
    ],
)
def test_marks_that_do_not_fit_are_usage_errors(small_vocabulary, fields, message):
    record = records.Record(id="r7", inputs="", targets="the city", **fields)
    with pytest.raises(UsageError, match=re.escape(message)) as caught:
        marks.mark_tokens(record, small_vocabulary)
    assert "record 'r7'" in str(caught.value)


# What T5's normalisation drops, in a word and beside a space: of no width, a mark of direction, a
# byte order mark, a control.
DROPPED = "\u200b\u200e\ufeff\x01"
# Characters whose normal form is their own, known and unknown, white space, and what is dropped.
characters = st.sampled_from(f"aeilnrstw Wé日😀.,()\t  {DROPPED}")


def says(vocabulary, character):
    """Whether a token stands for the character: with bytes, one does for all but the space."""
    if vocabulary is BYTES:
        return character != " "
    return not character.isspace() and character not in DROPPED


@vocabulary_names
@hypothesis.settings(suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.given(text=st.text(characters, min_size=1, max_size=20), data=st.data())
def test_marked_tokens_cover_the_spans(name, request, text, data):
    vocabulary = vocabulary_called(name, request)
    start = data.draw(st.integers(0, len(text) - 1))
    end = data.draw(st.integers(start + 1, len(text)))
    record = records.Record(id="r", inputs="", targets=text, negative_spans=((start, end),))
    result = marks.mark_tokens(record, vocabulary)
    ids, extents = marks.ids_and_extents(record, vocabulary)
    assert result.target_ids.tolist() == vocabulary.prompt_ids(text) == ids
    covered = {i for p in result.negative_pairs[:, 0] for i in range(*extents[p])}
    wanted = {i for i in range(start, end) if says(vocabulary, text[i])}
    assert wanted <= covered
    assert result.num_spans_without_token == (not wanted)
    assert bool(len(result.negative_pairs)) == bool(wanted)
    for first, last in [(a, b - 1) for a, b in extents if a < b]:
        assert says(vocabulary, text[first]) and says(vocabulary, text[last])
    for position in set(range(len(ids))) - set(result.negative_pairs[:, 0].tolist()):
        assert not wanted & set(range(*extents[position]))
    # The exact ids of a text that decodes to itself mark the same tokens.
    if vocabulary.decode(ids) == text:
        exact = records.Record(**{**vars(record), "target_ids": tuple(ids)})
        again = marks.mark_tokens(exact, vocabulary)
        np.testing.assert_array_equal(again.negative_pairs, result.negative_pairs)


# --- Alternatives ---------------------------------------------------------------------------------


def first_token_ids(tokeniser, before, strings):
    """The id of each string's first token; None for a lone "▁", which says nothing yet."""
    first = [tokens[0] for tokens in tokeniser.continuations(before, strings)]
    return [first_id if reaches else None for first_id, reaches in first]


def test_first_tokens_know_where_they_stand(t5_vocabulary):
    strings = ["riverside", "city centre", "日本", "Ask"]
    after_space = first_token_ids(t5_vocabulary, " ", strings)
    assert pieces(t5_vocabulary, [after_space[i] for i in (0, 1, 3)]) == ["▁river", "▁city", "▁Ask"]
    assert after_space[2] is None  # "▁" and then unknown: the "▁" says nothing yet
    assert first_token_ids(t5_vocabulary, None, strings) == after_space
    after_bracket = first_token_ids(t5_vocabulary, "", strings)
    assert pieces(t5_vocabulary, after_bracket) == ["riv", "city", "<unk>", "A"]
    # Each equals the token in the whole text.
    for prefix, first_ids in [("it is in the ", after_space), ("it is (", after_bracket)]:
        num_before = len(t5_vocabulary.encode(prefix))
        for index in (0, 1, 3):
            text = prefix + strings[index]
            whole = t5_vocabulary.encode(text)
            assert whole[num_before] == first_ids[index]


def test_first_tokens_of_bytes_are_first_bytes():
    assert first_token_ids(BYTES, " ", ["riverside", "日"]) == [
        ord("r") + 3,
        0xE6 + 3,
    ]


def alternatives_by_piece(vocabulary, text, span_text, alternatives, occurrence=0):
    ids = vocabulary.prompt_ids(text)
    start = [match.start() for match in re.finditer(re.escape(span_text), text)][occurrence]
    entries = mark_alternatives.token_ids(
        vocabulary, ids, (start, start + len(span_text)), alternatives
    )
    return {
        (position, pieces(vocabulary, [ids[position]])[0]): set(pieces(vocabulary, removed))
        for position, removed in entries
    }


def test_alternatives_begin_at_the_boundary_of_the_marked_token(t5_vocabulary):
    text = "Ask is in the riverside (riverside)."
    places = ["city centre", "riverside", "日本"]
    assert alternatives_by_piece(t5_vocabulary, text, "riverside", places) == {
        (4, "▁river"): {"▁city", "▁river"}
    }
    assert alternatives_by_piece(t5_vocabulary, text, "riverside", places, occurrence=1) == {
        (7, "riv"): {"city", "riv"}  # an unknown token stands for much else than "日本"
    }


def test_alternatives_depart_before_or_after_a_lone_space(small_vocabulary):
    # "riverside" is "▁", "riverside" here; "city" is "▁c", ...; "Zoo" cannot be spelt.
    assert alternatives_by_piece(
        small_vocabulary, "in the riverside", "riverside", ["city", "Zoo", "countryside"]
    ) == {(6, "▁"): {"▁c"}, (7, "riverside"): {"countryside"}}
    # Whatever came before them: here an id that only a padding row of the model has.
    space, riverside = small_vocabulary.processor.piece_to_id(["▁", "riverside"])
    assert mark_alternatives.token_ids(
        small_vocabulary, [99, space, riverside], (4, 6), ["countryside"]
    ) == ((2, (small_vocabulary.processor.piece_to_id("countryside"),)),)


def test_alternatives_keep_what_their_token_holds_before_the_span(small_vocabulary):
    # The token "riverside" begins before the span; every alternative here would begin with its "r".
    assert alternatives_by_piece(small_vocabulary, "in the riverside", "side", ["city"]) == {}
    # "▁centre" begins before "entre"; with "ity" it would be "▁c", "ity": "▁c" is innocent.
    assert (
        alternatives_by_piece(small_vocabulary, "the centre", "entre", ["ity", "ountryside"]) == {}
    )
    # With "entre" it is "▁centre" again, and that token does say "entre".
    assert alternatives_by_piece(small_vocabulary, "the centre", "entre", ["ity", "entre"]) == {
        (4, "▁centre"): {"▁centre"}
    }


def test_a_span_without_token_has_no_alternatives(small_vocabulary):
    ids = small_vocabulary.prompt_ids("in the city")
    assert mark_alternatives.token_ids(small_vocabulary, ids, (2, 3), ["city"]) == ()


def test_alternatives_make_a_valid_record(small_vocabulary):
    text = "in the riverside"
    ids = small_vocabulary.prompt_ids(text)
    record = records.Record(
        id="r",
        inputs="",
        targets=text,
        target_ids=tuple(ids),
        negative_spans=((7, 16),),
        negative_token_ids=mark_alternatives.token_ids(
            small_vocabulary, ids, (7, 16), ["city", "Zoo"]
        ),
    )
    pairs = marks.mark_tokens(record, small_vocabulary).negative_pairs
    assert [(p, *pieces(small_vocabulary, [i])) for p, i in pairs.tolist()] == [
        (6, "▁c"),
        (7, "riverside"),
    ]


def test_a_blank_alternative_is_a_usage_error(small_vocabulary):
    with pytest.raises(UsageError, match="blank"):
        mark_alternatives.token_ids(
            small_vocabulary, small_vocabulary.encode("the city"), (4, 8), ["city", " "]
        )


@pytest.mark.parametrize("kind", ["t5", "small", "fallback", "bytes"])
def test_a_shared_list_removes_what_its_texts_do_one_by_one(
    kind, t5_vocabulary, small_vocabulary, byte_fallback_vocabulary
):
    """Another computation: each alternative is tokenised by itself, for each span."""
    vocabulary = {
        "t5": t5_vocabulary,
        "small": small_vocabulary,
        "fallback": byte_fallback_vocabulary,
        "bytes": BYTES,
    }[kind]
    random = np.random.default_rng(0)
    words = [
        "city",
        "centre",
        "riverside",
        "The",
        "the",
        "Zoo",
        "English",
        "Eagle",
        "é",
        "½",
        "日本",
    ]

    def some(number):
        return [" ".join(random.choice(words, random.integers(1, 3))) for _ in range(number)]

    innocent = some(6)
    continuations = mark_alternatives.Continuations(vocabulary, innocent)

    def first(before, space, text):
        ((*tokens,),) = vocabulary.continuations(before, [text])
        after = bool(tokens) and tokens[0][0] == space
        rest = tokens[after:]
        return rest and (after, *rest[0], len(rest) == 1)

    def removed_one_by_one(ids, text, extents, span, texts, supported):
        touched = [i for i, (a, b) in enumerate(extents) if max(a, span[0]) < min(b, span[1])]
        if not touched:
            return set()
        place = vocabulary.place_of(ids, touched[0])
        before = place.before + text[extents[touched[0]][0] : span[0]]
        right = {f[:2] for t in supported if (f := first(before, place.space, t))}
        harmless = {f[:2] for t in innocent if (f := first(before, place.space, t))}
        return {
            (place.start + f[0], f[1])
            for t in texts
            if (f := first(before, place.space, t))
            and f[2]
            and f[1] != vocabulary.unknown_id
            and f[:2] not in right
            and (f[3] or f[:2] not in harmless)
        }

    lists = [tuple(dict.fromkeys(some(30))) for _ in range(2)]
    num_shared = 0
    for _ in range(60):
        text = " ".join(some(4))
        text = text.replace(" ", random.choice([" ", "  ", "\n", " ("]), 1)
        encoded = vocabulary.encode_with_extents(text)
        ids, extents = [*encoded.ids, 1], [*encoded.extents, (len(text), len(text))]
        start, end = sorted(random.choice(len(text) + 1, 2, replace=False).tolist())
        texts, supported = lists[random.integers(2)], some(2)
        marked = text[start:end]
        left = [t for t in texts if t != marked]
        others = mark_alternatives.AllBut(texts, marked)
        assert others == tuple(left) and len(others) == len(left) and bool(others) == bool(left)
        expected = removed_one_by_one(ids, text, extents, (start, end), left, supported)
        for alternatives in (others, tuple(left)):
            found = mark_alternatives.token_ids(
                vocabulary,
                ids,
                (start, end),
                alternatives,
                supported,
                continuations,
                (text, extents),
            )
            assert all(entry[1] == tuple(sorted({*entry[1]})) for entry in found)
            pairs = {(where, i) for where, some_ids in found for i in some_ids}
            # Among many, the marked token itself is left where it is: the span removes it.
            touched = [i for i, (a, b) in enumerate(extents) if max(a, start) < min(b, end)][:1]
            own = {(where, ids[where]) for where in touched}
            assert pairs - own == expected - own and pairs >= expected
            num_shared += pairs != expected
            if alternatives is not others:
                assert pairs == expected
    assert kind != "small" or num_shared == 0


def test_spans_that_share_a_long_list_share_the_ids(t5_vocabulary):
    listed = ("north", "south", "east", "west", "river", "city", "lake", "hill", "road", "park")
    listed += tuple(word.capitalize() for word in listed)
    continuations = mark_alternatives.Continuations(t5_vocabulary)
    text = "the city and the lake and (north)"
    ids = t5_vocabulary.prompt_ids(text)
    found = {}
    for word in ("city", "lake", "north"):
        span = text.index(word), text.index(word) + len(word)
        ((position, removed),) = mark_alternatives.token_ids(
            t5_vocabulary, ids, span, mark_alternatives.AllBut(listed, word), (), continuations
        )
        assert ids[position] in removed
        found[word] = removed
    assert found["city"] is found["lake"] and found["north"] is not found["city"]


# --- What would complete a text -------------------------------------------------------------------


def completions_by_piece(vocabulary, text, texts, allowed=(), but=()):
    ids = vocabulary.prompt_ids(text)
    listed = Listed((*texts, *allowed), tuple(allowed))
    found = mark_alternatives.Completions(vocabulary).ids(ids, listed, but)
    return {position: set(pieces(vocabulary, removed)) for position, removed in found}


def test_completions_are_a_decoding_mask_at_every_position(t5_vocabulary):
    """ "▁", "in", "▁the", "▁river", "s", ...: only what would make the name whole is removed."""
    text = "in the river bank"
    tokens = pieces(t5_vocabulary, t5_vocabulary.prompt_ids(text))
    river = tokens.index("▁river")
    riverside = pieces(t5_vocabulary, t5_vocabulary.encode("riverside"))
    assert riverside == ["▁river", "side"]
    # A name of one token goes at every position, one of two after its first token.
    found = completions_by_piece(t5_vocabulary, text, ["bank", "riverside"])
    everywhere = {"▁bank", "▁Bank"}
    assert set(found) == set(range(len(tokens)))
    assert all(everywhere <= removed for removed in found.values())
    assert [position for position, removed in found.items() if "side" in removed] == [river + 1]
    # At the beginning, and after a space, the name is a token without its own space, too.
    assert "bank" in found[0] and "bank" not in found[river + 1]
    # But for ids that are removed everywhere anyway.
    bank = t5_vocabulary.encode("bank")
    without = completions_by_piece(t5_vocabulary, text, ["bank", "riverside"], (), bank)
    assert without == {position: removed - {"▁bank"} for position, removed in found.items()}


def test_completions_leave_what_supported_texts_need(t5_vocabulary):
    text = "in the river bank"
    # "river" may not come up, but "riverside" may, and begins with the same token.
    found = completions_by_piece(t5_vocabulary, text, ["river"], ["riverside"])
    assert not any("▁river" in removed for removed in found.values())
    found = completions_by_piece(t5_vocabulary, text, ["river"], ["city"])
    assert all("▁river" in removed for removed in found.values()) and len(found) == 5


def test_a_supported_text_keeps_no_longer_one_that_ends_with_it(t5_vocabulary):
    """ "bank" may be said, "river bank" may not: it begins earlier, and is what would be marked."""
    found = completions_by_piece(t5_vocabulary, "in the river bank", ["river bank", "in"], ["bank"])
    places = {position for position, removed in found.items() if "▁bank" in removed}
    tokens = pieces(t5_vocabulary, t5_vocabulary.encode("in the river bank"))
    assert places == {tokens.index("▁river") + 1}


def test_alternatives_are_tokenised_once_for_each_place(t5_vocabulary, monkeypatch):
    tokenised = []

    def tokens_after(vocabulary, before, texts):
        tokenised.extend(texts)
        return real_tokens_after(vocabulary, before, texts)

    real_tokens_after = mark_alternatives._tokens_after
    monkeypatch.setattr(mark_alternatives, "_tokens_after", tokens_after)
    continuations = mark_alternatives.Continuations(t5_vocabulary, ["the", "city"])
    ids = t5_vocabulary.prompt_ids("in the bank and the bank")
    for span in [(7, 11), (20, 24), (7, 11)]:
        arguments = (t5_vocabulary, ids, span, ["river", "city hall"], ["lake"])
        found = mark_alternatives.token_ids(*arguments, continuations)
        assert found == mark_alternatives.token_ids(
            *arguments, mark_alternatives.Continuations(t5_vocabulary, ["the", "city"])
        )
        assert [pieces(t5_vocabulary, removed) for _, removed in found] == [["▁river"]]
    # By the one that all spans share, and by the other three, once each.
    assert sorted(tokenised) == sorted(["river", "city hall", "lake", "the", "city"] * 4)


def test_what_cannot_be_spelt_bans_nothing(small_vocabulary):
    """An unknown token stands for any other unknown text, too."""
    assert completions_by_piece(small_vocabulary, "in the city", ["Zoo"]) == {}


def test_completions_of_other_texts_are_other_ones(t5_vocabulary):
    """Those of the last texts are remembered."""
    completions = mark_alternatives.Completions(t5_vocabulary)
    ids = t5_vocabulary.prompt_ids("in the bank")
    found = [completions.ids(ids, Listed((text,))) for text in ("bank", "river", "bank")]
    assert found[0] == found[2] != found[1]


# --- seqio has the same ids and texts -------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["small_vocabulary", "byte_fallback_vocabulary", "t5_vocabulary", "bytes"]
)
@hypothesis.settings(suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.given(text=st.text(max_size=30), data=st.data())
def test_ids_and_texts_are_those_of_seqio(name, request, text, data):
    """They agree on any text and any ids: ends, padding, extra ids, a model's padding rows."""
    vocabulary = vocabulary_called(name, request)
    theirs = (
        seqio.ByteVocabulary()
        if name == "bytes"
        else seqio.SentencePieceVocabulary(
            vocabulary.sentencepiece_model_file, vocabulary.extra_ids
        )
    )
    assert (vocabulary.size, vocabulary.unknown_id) == (theirs.vocab_size, theirs.unk_id)
    assert vocabulary.end_ids == {vocabulary.end_id} == {theirs.eos_id}
    ids = theirs.encode(text)
    assert vocabulary.encode(text) == ids
    assert vocabulary.prompt_ids(text) == [*ids, theirs.eos_id]
    encoded = vocabulary.encode_with_extents(text)
    assert encoded.ids == ids
    assert len(encoded.extents) == len(ids)
    assert all(0 <= start <= end <= len(text) for start, end in encoded.extents)
    drawn = data.draw(st.lists(st.integers(0, vocabulary.size + 9), max_size=12))
    for one in (ids, drawn):
        assert vocabulary.decode(one) == vocabulary.extents(one)[0] == theirs.decode(one)


def test_a_copy_has_no_loaded_model_and_the_same_ids(small_vocabulary):
    """gin copies what it passes; other processes get a pickled one."""
    again = pickle.loads(pickle.dumps(small_vocabulary))
    assert "processor" not in vars(again)
    assert again == small_vocabulary == copy.deepcopy(small_vocabulary)
    assert again.encode("in the city") == small_vocabulary.encode("in the city")


# --- Vocabularies ---------------------------------------------------------------------------------


def test_training_is_repeatable_and_uses_the_ids_of_t5(small_vocabulary, tmp_path):
    processor = small_vocabulary.processor
    assert [processor.pad_id(), processor.eos_id(), processor.unk_id(), processor.bos_id()] == [
        *(0, 1, 2, -1)
    ]
    assert tokenization.check_vocabulary(small_vocabulary) == 56
    again = tmp_path / "new folder" / "again.model"
    tokenization.train_sentencepiece(
        iter(TEXTS), again, vocab_size=56, user_defined_symbols=["#NAME#"]
    )
    assert again.read_bytes() == processor.serialized_model_proto()
    assert [file.name for file in again.parent.iterdir()] == ["again.model"]


def test_a_long_text_is_trained_on(tmp_path):
    path = tmp_path / "long.model"
    tokenization.train_sentencepiece([" ".join(TEXTS), "Ωmega"], path, vocab_size=57)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    assert processor.unk_id() not in processor.encode("Ωmega is wonderful")


def test_a_vocabulary_that_cannot_be_trained_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match="expected texts, found none"):
        tokenization.train_sentencepiece([" "], tmp_path / "v.model", vocab_size=56)
    with pytest.raises(UsageError, match=r"vocab_size=900: .*Please set it to a value <="):
        tokenization.train_sentencepiece(TEXTS, tmp_path / "v.model", vocab_size=900)
    assert list(tmp_path.iterdir()) == []


def test_an_unusable_vocabulary_is_a_usage_error(tmp_path):
    missing = tokenization.SentencePiece(str(tmp_path / "nowhere.model"))
    with pytest.raises(UsageError, match=r"sentencepiece model at .*nowhere\.model"):
        tokenization.check_vocabulary(missing)
    (tmp_path / "text.model").write_text("no model")
    broken = tokenization.SentencePiece(str(tmp_path / "text.model"))
    with pytest.raises(UsageError, match=r"sentencepiece model at .*text\.model"):
        tokenization.check_vocabulary(broken)
    with (tmp_path / "default.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(TEXTS), model_writer=file, vocab_size=55, minloglevel=2
        )
    default_ids = tokenization.SentencePiece(str(tmp_path / "default.model"))
    with pytest.raises(UsageError, match="found padding -1 and EOS 2"):
        tokenization.check_vocabulary(default_ids)
    with pytest.raises(UsageError, match="found PassThroughVocabulary"):
        tokenization.check_vocabulary(seqio.PassThroughVocabulary(9))
    assert tokenization.check_vocabulary(BYTES) == 259


# --- Read off, or asked for -----------------------------------------------------------------------

_BITS = [
    *"the house",
    " ",
    "  ",
    "\n",
    "\u00a0",
    "½",
    "\u200b",
    "e\u0301",
    "😂",
    "<extra_id_0>",
    "▁",
]


@hypothesis.settings(max_examples=300)
@hypothesis.given(st.lists(st.sampled_from([*_BITS, "the ", "house"]), max_size=12).map("".join))
def test_extents_that_are_read_off_are_sentencepieces_own(small_vocabulary, text):
    """Where the pieces are the text; elsewhere sentencepiece is asked anyway."""
    ids = [*small_vocabulary.encode(text), small_vocabulary.end_id]
    found = small_vocabulary.encode_with_extents(text), small_vocabulary.extents(ids)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenization.SentencePiece, "_read_off", lambda *_: None)
        asked = small_vocabulary.encode_with_extents(text), small_vocabulary.extents(ids)
    assert found == asked


def test_extents_are_read_off_where_only_white_space_differs(small_vocabulary, monkeypatch):
    monkeypatch.setattr(tokenization, "_piece_extents", None)
    text = " the\n\n house  "
    ids, extents, _ = small_vocabulary.encode_with_extents(text)
    assert small_vocabulary.decode(ids) == "the house"
    assert "".join(text[start:end] for start, end in extents) == "thehouse"


def test_a_piece_that_is_no_utf_8_is_found_when_the_model_is_loaded(tmp_path):
    """sentencepiece itself takes it, and fails when the piece comes up."""
    file = tmp_path / "vocabulary.model"
    tokenization.train_sentencepiece(["the house is wonderful"], file, vocab_size=17)
    content = file.read_bytes()
    place = content.index(b"\xe2\x96\x81")
    file.write_bytes(content[:place] + b"\xff" + content[place + 1 :])
    with pytest.raises(UsageError, match=r"a sentencepiece model at .*'utf-8' codec can't decode"):
        tokenization.check_vocabulary(tokenization.SentencePiece(str(file), 0))
