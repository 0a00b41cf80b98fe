import copy
import hashlib
import itertools
import json
import pickle
import re
import types
import unicodedata

import hypothesis
import pytest
import tokenizers
from etils import epath
from helpers import tiny_tokenizers
from helpers.chat_templates import TEMPLATES
from hypothesis import strategies as st

from tnt_jax.checkpoints import pretrained
from tnt_jax.data import mark_alternatives, marks, records
from tnt_jax.runtime import settings_json
from tnt_jax.runtime.errors import UsageError
from tnt_jax.tokenizers import hub_tokenizer, loaded_tokenizer, tokenization, vocabularies
from tnt_jax.training import resume

KINDS = list(tiny_tokenizers.KINDS)
BYTE_LEVEL = {"gpt2", "qwen", "llama3"}
kinds = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("tokenizers")
    return {kind: write(root / kind) for kind, write in tiny_tokenizers.KINDS.items()}


@pytest.fixture(scope="module")
def tokenisers(folders):
    return {kind: hub_tokenizer.HubTokenizer(str(folder)) for kind, folder in folders.items()}


@pytest.fixture(scope="module")
def libraries(folders):
    """The package itself, on the file as it is."""
    return {
        kind: tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        for kind, folder in folders.items()
    }


def changed(folder, change):
    content = json.loads((folder / "tokenizer.json").read_text())
    change(content)
    (folder / "tokenizer.json").write_text(json.dumps(content))


def ids_of(tokeniser, *names):
    numbers = {name: i for i, name in enumerate(tokeniser.pieces())}
    return [numbers[name] for name in names]


# Emoji with joiners, combining marks, scripts, white space, control tokens as text, and what a
# piece writes for a space or a byte.
FRAGMENTS = [
    *("the house", " city", "riverside", " (", ").", "42", "'s", " ", "  ", "\n", "\t", "\r\n"),
    *(
        "é",
        "e\u0301",
        "q\u0323\u0301",
        "한",
        "\u1112\u1161\u11ab",
        "日本",
        "語",
        "🤖",
        "👩‍👩‍👧",
        "👍🏽",
    ),
    *(
        "<|im_end|>",
        "<|eot_id|>",
        "</s>",
        "<s>",
        "<end_of_turn>",
        "<think>",
        "[INST]",
        "<|im_",
        "|>",
    ),
    *("<0x41>", "Ġ", "▁", "\u200b", "\ufffd", "\x00", "\ue000"),
]
texts = st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=3), max_size=8).map("".join)
fuzzed = hypothesis.settings(
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture], deadline=None
)


def as_read(kind, text):
    """The text that a tokeniser of the kind reads, as its documentation has it."""
    if kind == "qwen":
        return unicodedata.normalize("NFC", text)
    return text if kind in BYTE_LEVEL else text.replace("▁", " ")


# --- Text and ids ---------------------------------------------------------------------------------


@kinds
@fuzzed
@hypothesis.given(text=texts)
def test_a_text_comes_back_and_its_extents_cover_it(kind, tokenisers, text):
    tokeniser = tokenisers[kind]
    encoded = tokeniser.encode_with_extents(text)
    assert encoded.ids == tokeniser.encode(text)
    if kind != "mistral" or not text.startswith((" ", "▁")):  # it puts no space where there is one
        assert tokeniser.decode(encoded.ids) == as_read(kind, text)
    extents = encoded.extents
    assert len(extents) == len(encoded.ids)
    assert all(0 <= start <= end <= len(text) for start, end in extents)
    # They follow each other, or share a character.
    said = [extent for extent in extents if extent[0] < extent[1]]
    assert said == sorted(said)
    assert all(b_end >= a_end for (_, a_end), (_, b_end) in itertools.pairwise(said))
    owned = {place for start, end in said for place in range(start, end)}
    blanks = " " if kind in BYTE_LEVEL else " ▁"
    assert {i for i, character in enumerate(text) if character not in blanks} <= owned
    assert not any(text[start] in blanks or text[end - 1] in blanks for start, end in said)


@kinds
@fuzzed
@hypothesis.given(text=texts)
def test_extents_of_given_ids_are_those_of_the_text(kind, tokenisers, text):
    """Two ways: the offsets that the package states, and our own decoding."""
    tokeniser = tokenisers[kind]
    encoded = tokeniser.encode_with_extents(text)
    decoded, extents = tokeniser.extents(encoded.ids)
    if decoded == text:
        assert extents == encoded.extents
    again = tokeniser.encode_with_extents(decoded)
    if again.ids == encoded.ids:
        assert tokeniser.extents(again.ids) == (decoded, again.extents)


@kinds
@fuzzed
@hypothesis.given(data=st.data())
def test_any_ids_decode_as_the_package_says(kind, tokenisers, libraries, data):
    tokeniser = tokenisers[kind]
    ids = data.draw(st.lists(st.integers(0, tokeniser.size + 9), max_size=12))
    text, extents = tokeniser.extents(ids)
    spoken = ids[: tokenization.find_end(ids, tokeniser.end_ids)]
    assert text == tokeniser.decode(ids) == libraries[kind].decode(spoken, skip_special_tokens=True)
    assert len(extents) == len(ids)
    owned = {place for start, end in extents for place in range(start, end)}
    assert {i for i, character in enumerate(text) if character != " "} == owned - {
        i for i, character in enumerate(text) if character == " "
    }
    silent = tokeniser.never_said | tokeniser.end_ids
    assert all(start == end for i, (start, end) in zip(ids, extents, strict=True) if i in silent)
    # Our own decoding says the same as what the package's says of ever longer prefixes.
    by_prefixes = tokeniser._by_prefixes(spoken, text)
    if "\ufffd" not in text:
        trimmed = [hub_tokenizer._trimmed(text, extent, " ") for extent in by_prefixes]
        said = [b for b, i in zip(trimmed, spoken, strict=True) if i not in silent and b[0] < b[1]]
        own = [e for e in extents[: len(spoken)] if e[0] < e[1]]
        assert {p for e in said for p in range(*e)} == {p for e in own for p in range(*e)}


@kinds
@fuzzed
@hypothesis.given(text=texts)
def test_plain_text_has_the_ids_of_the_package(kind, tokenisers, libraries, text):
    tokeniser = tokenisers[kind]
    hypothesis.assume(not any(name in text for name in tokeniser.control_names))
    expected = libraries[kind].encode(text, add_special_tokens=False).ids
    assert tokeniser.encode(text) == expected
    assert tokeniser.markup_ids([(text, True)]) == expected


@kinds
def test_control_tokens_come_from_markup_alone(kind, tokenisers, libraries):
    tokeniser = tokenisers[kind]
    for i in sorted(tokeniser.never_said | tokeniser.end_ids):
        name = tokeniser.pieces()[i]
        text = f"the {name} city"
        ids = tokeniser.encode(text)
        assert not {*ids} & (tokeniser.never_said | tokeniser.end_ids)
        assert tokeniser.decode(ids) == text
        assert tokeniser.markup_ids([(text, False)]) == ids
        marked = tokeniser.markup_ids([(text, True)])
        assert i in marked
        assert marked == libraries[kind].encode(text, add_special_tokens=False).ids
        # Half of it in a user's text is no control token.
        assert i not in tokeniser.markup_ids([(f"the {name[:2]}", True), (name[2:], False)])


@kinds
@pytest.mark.parametrize(
    ("prompt", "reply"),
    [
        ("Which place?", " house in the city"),
        ("Which place?", "\nhouse"),
        ("user:\n", "house in the city"),
        ("Which place?", "  日本 café"),
    ],
)
def test_a_reply_goes_on_with_a_prompt_that_is_a_text(kind, prompt, reply, tokenisers, libraries):
    """TRL's completions begin with the space that parts them from the prompt."""
    tokeniser, library = tokenisers[kind], libraries[kind]
    record = records.Record(id="", inputs=prompt, targets=reply, negative_spans=((2, 4),))
    found = marks.mark_tokens(record, tokeniser).target_ids.tolist()
    joint = [*marks.prompt_ids(record, tokeniser), *found[:-1]]
    assert joint == library.encode(prompt + reply).ids
    encoded = tokeniser.encode_reply_with_extents(reply, prompt)
    assert encoded.ids == tokeniser.encode_reply(reply, prompt) == found[:-1]
    owned = {place for start, end in encoded.extents for place in range(start, end)}
    assert owned == {place for place, one in enumerate(reply) if one != " "}


def test_a_word_is_parted_from_a_prompt_that_ends_in_a_word(tokenisers):
    """A model says the space between them, which decoding leaves out of the reply's text."""
    tokeniser = tokenisers["llama2"]
    for prompt in ("Which place?", ""):
        ids = tokeniser.encode_reply("house", prompt)
        assert [tokeniser.pieces()[i] for i in ids] == ["▁house"]
    assert [tokeniser.pieces()[i] for i in tokeniser.encode_reply(" house", "")] == ["▁", "▁house"]


def test_a_control_token_is_not_put_together_from_pieces(tmp_path):
    """Llama 2 has "</s>" in its vocabulary; a merge that makes it would be one letter away."""
    folder = tiny_tokenizers.llama2(tmp_path)
    content = json.loads((folder / "tokenizer.json").read_text())
    for piece in ("<", "/", "s", ">", "</", "s>"):
        content["model"]["vocab"].setdefault(piece, len(content["model"]["vocab"]))
    content["model"]["merges"] += [["<", "/"], ["s", ">"], ["</", "s>"]]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    library.encode_special_tokens = True
    assert 2 in library.encode("</s>").ids
    tokeniser = hub_tokenizer.HubTokenizer(str(folder))
    ids = tokeniser.encode("</s>")
    assert [tokeniser.pieces()[i] for i in ids] == ["▁", "</", "s>"]
    assert tokeniser.decode(ids) == "</s>"


def test_extents_that_are_known(tokenisers):
    gpt2, llama2 = tokenisers["gpt2"], tokenisers["llama2"]
    robot = ids_of(gpt2, "Ġ", *("ð", "Ł", "¤", "ĸ"))
    end = ids_of(gpt2, "<|endoftext|>")
    # Four bytes, one character; then an end, and what comes after it.
    assert gpt2.extents([*robot, *end, *robot]) == (" 🤖", [(1, 1), *[(1, 2)] * 4, *[(2, 2)] * 6])
    a_robot = ids_of(llama2, "▁", "<0xF0>", "<0x9F>", "<0xA4>", "<0x96>", "▁", "a")
    assert llama2.extents(a_robot) == ("🤖 a", [(0, 0), *[(0, 1)] * 4, (2, 2), (2, 3)])
    # Bytes that form no character are what the package says: one sign, or one each.
    assert gpt2.extents(robot[1:3]) == ("\ufffd", [(0, 1), (0, 1)])
    assert llama2.extents(a_robot[1:3]) == ("\ufffd\ufffd", [(0, 1), (1, 2)])
    assert gpt2.extents([]) == llama2.extents([]) == ("", [])


def test_an_accent_that_is_composed_marks_its_letter(tokenisers):
    text = "a e\u0301 b"
    record = records.Record(id="r", inputs="", targets=text, negative_spans=((3, 4),))
    result = marks.mark_tokens(record, tokenisers["qwen"])
    ids = result.negative_pairs[:, 1].tolist()
    assert tokenisers["qwen"].decode(ids).strip() == "é"
    encoded = tokenisers["qwen"].encode_with_extents("e\u0301 x")
    assert {extent for extent in encoded.extents if extent[0] < extent[1]} == {(0, 2), (3, 4)}


def test_added_tokens_are_text_unless_they_are_control_tokens(tokenisers):
    qwen = tokenisers["qwen"]
    (think, start) = ids_of(qwen, "<think>", "<|im_start|>")
    assert qwen.encode("<think>") == [think]
    assert qwen.extents([think, start, think]) == ("<think><think>", [(0, 7), (7, 7), (7, 14)])


# --- Ends and what is never said ------------------------------------------------------------------


def test_ends_and_control_tokens(tokenisers):
    gpt2, qwen, gemma = (tokenisers[kind] for kind in ("gpt2", "qwen", "gemma"))
    assert gpt2.end_ids == {gpt2.end_id} == {*ids_of(gpt2, "<|endoftext|>")}
    assert gpt2.never_said == frozenset()
    # Its ids 0 and 1 are words, and its padding is an end.
    assert qwen.end_ids == {*ids_of(qwen, "<|im_end|>", "<|endoftext|>")}
    assert [qwen.end_id] == ids_of(qwen, "<|im_end|>")
    assert qwen.never_said == {*ids_of(qwen, "<|im_start|>")}
    assert qwen.decode([0, 1]) == '!"'
    assert gemma.never_said == {*ids_of(gemma, "<pad>", "<bos>", "<unk>", "<start_of_turn>")}
    assert gemma.unknown_id == 3
    assert qwen.unknown_id is None


@kinds
def test_a_prompt_begins_with_the_models_bos_and_has_no_end(kind, tokenisers, libraries):
    tokeniser = tokenisers[kind]
    prompt = tokeniser.prompt_ids("the house")
    assert prompt == libraries[kind].encode("the house", add_special_tokens=True).ids
    assert not tokeniser.end_ids & {*prompt}


def test_an_end_behind_a_text_is_left_out_and_a_bos_that_is_an_end_is_not(tmp_path):
    folder = tiny_tokenizers.gpt2(tmp_path)
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    end = tokenizer.token_to_id("<|endoftext|>")
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|endoftext|> $A <|endoftext|>", special_tokens=[("<|endoftext|>", end)]
    )
    tokenizer.enable_padding(length=40)
    tokenizer.enable_truncation(2)
    tokenizer.save(str(folder / "tokenizer.json"))
    tokeniser = hub_tokenizer.HubTokenizer(str(folder))
    text = "the house is wonderful"
    assert tokeniser.prompt_ids(text) == [end, *tokeniser.encode(text)]
    assert tokeniser.decode(tokeniser.encode(text)) == text


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ({"generation_config.json": {"eos_token_id": "<|endoftext|>"}}, 2),
        ({"config.json": {"eos_token_id": ["<|endoftext|>", "<|im_start|>"]}}, 3),
        ({"config.json": {"text_config": {"eos_token_id": "<|endoftext|>"}}}, 2),
        # A default of a class that was never the model's.
        (
            {
                "generation_config.json": {"eos_token_id": "<|endoftext|>"},
                "config.json": {"eos_token_id": 2},
            },
            2,
        ),
        ({}, 1),
        ({"tokenizer_config.json": {}, "special_tokens_map.json": {"eos_token": "<|im_end|>"}}, 1),
        ({"tokenizer_config.json": {"eos_token": {"content": "<|im_end|>", "special": True}}}, 1),
    ],
)
def test_where_ends_are_stated(tmp_path, tokenisers, written, expected):
    """The first so many of these three."""
    names = ["<|im_end|>", "<|endoftext|>", "<|im_start|>"]
    ids = dict(zip(names, ids_of(tokenisers["qwen"], *names), strict=True))
    folder = tiny_tokenizers.qwen(tmp_path)
    (folder / "generation_config.json").unlink()
    for file, content in written.items():
        text = json.dumps(content)
        if "eos_token_id" in text:
            for name, token_id in ids.items():
                text = text.replace(f'"{name}"', str(token_id))
        (folder / file).write_text(text)
    tokeniser = hub_tokenizer.HubTokenizer(str(folder))
    assert tokeniser.end_ids == {ids[name] for name in names[:expected]}
    assert tokeniser.end_id == ids["<|im_end|>"]


def test_a_number_without_a_token_is_never_said(tmp_path):
    folder = tiny_tokenizers.llama2(tmp_path)
    (missing,) = ids_of(hub_tokenizer.HubTokenizer(str(folder)), "<0x00>")
    changed(folder, lambda content: content["model"]["vocab"].pop("<0x00>"))
    tokeniser = hub_tokenizer.HubTokenizer(str(folder))
    assert missing in tokeniser.never_said
    assert tokeniser.pieces()[missing] is None
    assert tokeniser.extents([missing]) == ("", [(0, 0)])


def test_ids_other_than_those_stated_are_a_usage_error(tmp_path):
    """The package counts added tokens on from the number of others, whatever the file states."""
    folder = tiny_tokenizers.qwen(tmp_path)
    changed(folder, lambda content: content["model"]["vocab"].pop("Ā"))
    with pytest.raises(UsageError, match="expected every token to have the id that is stated"):
        tokenization.check_vocabulary(hub_tokenizer.HubTokenizer(str(folder)))


def test_a_number_far_beyond_those_of_the_tokens_is_a_usage_error(tmp_path):
    """Lists of four thousand million pieces would be made."""
    folder = tiny_tokenizers.qwen(tmp_path)
    changed(folder, lambda content: content["model"]["vocab"].update({"Ā": 2**32 - 1}))
    message = r"expected the ids of \d+ tokens, found one of 4,294,967,295\. Fetch"
    with pytest.raises(UsageError, match=message):
        tokenization.check_vocabulary(hub_tokenizer.HubTokenizer(str(folder)))


# --- Alternatives ---------------------------------------------------------------------------------


@kinds
def test_continuations_are_the_tokens_of_the_whole_text(kind, tokenisers):
    tokeniser = tokenisers[kind]
    strings = ["riverside", "city centre", "日本", "🤖"]
    for prefix, before in [("it is in the", " "), ("it is {", "")]:
        num_before = len(tokeniser.encode(prefix))
        found = tokeniser.continuations(before, strings)
        for string, tokens in zip(strings, found, strict=True):
            whole = tokeniser.encode(prefix + before + string)
            assert [i for i, _ in tokens] == whole[num_before:]
            # Nothing but a lone space spells none of the string.
            spelt = [i for i, spells in tokens if spells]
            assert tokeniser.decode(spelt).strip() == string
    begun = tokeniser.continuations(None, strings)
    assert [[i for i, _ in tokens] for tokens in begun] == [*map(tokeniser.encode, strings)]
    assert tokeniser.continuations(" ", []) == []


@kinds
def test_the_place_of_an_alternative_is_before_its_space(kind, tokenisers):
    tokeniser = tokenisers[kind]
    text = "in the 日 (riverside)"
    encoded = tokeniser.encode_with_extents(text)
    for position, (start, end) in enumerate(encoded.extents):
        if start == end or start == 0 or encoded.extents[position - 1] == (start, end):
            continue
        place = tokeniser.place_of(encoded.ids, position)
        assert (place.before == " ") == (text[start - 1] == " ")
        assert place.start == position - (place.space is not None)
        rest = tokeniser.decode(encoded.ids[place.start :])
        assert rest.strip() == text[start:]


@kinds
def test_alternatives_are_removed_where_they_would_begin(kind, tokenisers):
    tokeniser = tokenisers[kind]
    text = "the place in the city centre"
    ids = tokeniser.encode(text)
    span = text.index("city"), len(text)
    removed = mark_alternatives.token_ids(tokeniser, ids, span, ["riverside", "日本"])
    expected = {}
    for other in ("riverside", "日本"):
        whole = tokeniser.encode(text[: span[0]] + other)
        where = next(i for i, pair in enumerate(zip(ids, whole, strict=False)) if len({*pair}) > 1)
        if tokeniser.decode([ids[0], whole[where]]).strip() != "the":  # a lone space says nothing
            expected.setdefault(where, set()).add(whole[where])
    assert {where: {*some} for where, some in removed} == expected


# --- Files ----------------------------------------------------------------------------------------


def test_a_copy_has_no_loaded_tokenizer_and_the_same_ids(tokenisers):
    tokeniser = tokenisers["llama3"]
    assert tokeniser.size
    again = pickle.loads(pickle.dumps(tokeniser))
    assert "_loaded" not in vars(again)
    assert again == tokeniser == copy.deepcopy(tokeniser)
    assert again.encode("in the city") == tokeniser.encode("in the city")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["model"].update(type="WordPiece"), "found WordPiece with ByteLevel, NFC"),
        (lambda c: c.update(normalizer={"type": "Lowercase"}), "found BPE with ByteLevel, Lowerc"),
        (lambda c: c.update(decoder=None), "found BPE with NFC"),
        (lambda c: c["model"].update(merges=[["no", "such"]]), "cannot be read: Exception: "),
        (lambda c: c["model"].update(vocab=7), "cannot be read: AttributeError: "),
        (lambda c: c["added_tokens"][0].update(id=3), "found"),
    ],
)
def test_a_tokenizer_of_another_kind_is_a_usage_error(tmp_path, change, message):
    folder = tiny_tokenizers.qwen(tmp_path)
    changed(folder, change)
    with pytest.raises(UsageError, match=re.escape(message)) as caught:
        tokenization.check_vocabulary(hub_tokenizer.HubTokenizer(str(folder)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("generation_config.json", {"eos_token_id": [0]}, "found 0, which is none of them"),
        ("generation_config.json", {"eos_token_id": 9999}, "found 9999, which is none of them"),
        ("generation_config.json", {"eos_token_id": "x"}, "found 'x', which is none of them"),
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": {"500": {"content": "<new>"}}},
            "found id 500 to be None in place of '<new>'",
        ),
    ],
)
def test_files_that_disagree_are_a_usage_error(tmp_path, name, content, message):
    folder = tiny_tokenizers.qwen(tmp_path)
    (folder / name).write_text(json.dumps(content))
    with pytest.raises(UsageError, match=re.escape(message)):
        tokenization.check_vocabulary(hub_tokenizer.HubTokenizer(str(folder)))


def test_a_tokenizer_that_states_no_end_is_a_usage_error(tmp_path):
    folder = tiny_tokenizers.gpt2(tmp_path)
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(UsageError, match="expected an id that ends a text, found none"):
        tokenization.check_vocabulary(hub_tokenizer.HubTokenizer(str(folder)))


def test_the_library_s_text_is_taken_where_ours_differs(tmp_path):
    """Metaspace's decoder drops every space of the first token."""
    folder = tiny_tokenizers.mistral(tmp_path)
    changed(
        folder,
        lambda c: c.update(
            decoder={
                "type": "Metaspace",
                "replacement": "▁",
                "prepend_scheme": "first",
                "split": False,
            }
        ),
    )
    changed(folder, lambda c: c["model"]["vocab"].update({"▁▁": len(c["model"]["vocab"])}))
    changed(folder, lambda c: c["model"]["merges"].append(["▁", "▁"]))
    tokeniser = hub_tokenizer.HubTokenizer(str(folder))
    ids = ids_of(tokeniser, "▁▁", "h", "<s>", "▁", "o")
    assert tokeniser.extents(ids) == ("h o", [(0, 0), (0, 1), (1, 1), (2, 2), (2, 3)])


# --- Directories ----------------------------------------------------------------------------------


@kinds
def test_a_directory_has_its_tokeniser_and_a_copy_the_same(kind, folders, tokenisers, tmp_path):
    vocabulary = vocabularies.of_directory(epath.Path(folders[kind]))
    assert vocabulary == tokenisers[kind]
    (tmp_path / "tokenizer_config.json").write_text("{}")  # what is there is not written over
    (tmp_path / "chat_template.jinja").write_text("")
    vocabularies.write(epath.Path(tmp_path), vocabulary)
    assert (tmp_path / "tokenizer.json").read_bytes() == (
        folders[kind] / "tokenizer.json"
    ).read_bytes()
    assert (tmp_path / "tokenizer_config.json").read_text() == "{}"
    vocabularies.check_same(vocabulary, epath.Path(folders[kind]))


def test_runs_tell_tokenizers_apart_by_their_files(tokenisers, folders, tmp_path):
    described = settings_json.describe(tokenisers["qwen"])
    tokenisers["qwen"].copy_files(epath.Path(tmp_path))
    moved = hub_tokenizer.HubTokenizer(str(tmp_path))
    assert settings_json.describe(moved) == described == resume._describe_vocabulary(moved)
    (tmp_path / "generation_config.json").unlink()  # one end less
    changed_ends = hub_tokenizer.HubTokenizer(str(tmp_path))
    others = [changed_ends, *(tokenisers[kind] for kind in KINDS if kind != "qwen")]
    assert described not in [*map(settings_json.describe, others)]


def test_another_tokenizer_is_not_taken_for_the_models(folders, tokenisers):
    with pytest.raises(UsageError, match=r"id \d+ is .* there and .* here"):
        vocabularies.check_same(tokenisers["llama2"], epath.Path(folders["gemma"]))


def test_a_model_may_have_rows_to_spare_but_none_too_few(tokenisers):
    tokeniser = tokenisers["qwen"]
    for num_rows in (tokeniser.size, tokeniser.size + 271, tokeniser.size + 2385):
        vocabularies.check_size(tokeniser, num_rows)
    for num_rows in (tokeniser.size - 1, tokeniser.size + 4097):
        with pytest.raises(UsageError, match="or up to 4,096 fewer; found"):
            vocabularies.check_size(tokeniser, num_rows)
    with pytest.raises(UsageError, match="or up to 128 fewer; found 259"):
        vocabularies.check_size(tokenization.Bytes(), 259 + 129)


def test_it_has_no_ids_of_ours_behind_its_own(folders):
    with pytest.raises(UsageError, match=r"EXTRA_IDS: expected None, .* found 100"):
        vocabularies.of_directory(epath.Path(folders["qwen"]), 100)


def test_control_tokens_that_the_model_has_no_row_for_are_none_of_its(tmp_path):
    """Gemma 3's text models come with the tokenizer of those that see images."""
    folder = tiny_tokenizers.gemma(tmp_path)
    before = hub_tokenizer.HubTokenizer(str(folder))
    last = before.size
    (folder / "config.json").write_text(json.dumps({"vocab_size": last, "eos_token_id": 1}))
    token = {"id": last, "content": "<image_soft_token>", "special": True}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    changed(folder, lambda content: content["added_tokens"].append(token | flags))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["added_tokens_decoder"] = {str(last): {"content": "<image_soft_token>"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    tokeniser = hub_tokenizer.HubTokenizer(str(folder))
    assert tokeniser.size == last
    vocabularies.check_size(tokeniser, last)
    assert tokeniser.pieces() == before.pieces()
    assert tokeniser.never_said == before.never_said
    text = "the <image_soft_token> house"
    assert tokeniser.encode(text) == before.encode(text)
    assert tokeniser.decode(tokeniser.encode(text)) == text
    # What may be in a text would be missing.
    word = token | flags | {"special": False}
    changed(folder, lambda content: content["added_tokens"].__setitem__(-1, word))
    with pytest.raises(UsageError, match=rf"model with {last} rows .* found {last + 1}"):
        vocabularies.check_size(hub_tokenizer.HubTokenizer(str(folder)), last)


@pytest.mark.parametrize(
    ("tokenizer_class", "add_bos_token", "has_bos"),
    [
        ("LlamaTokenizerFast", True, True),
        ("LlamaTokenizer", False, False),
        ("GemmaTokenizer", True, True),
        ("PreTrainedTokenizerFast", True, False),
        ("Qwen2Tokenizer", True, False),
    ],
)
def test_a_bos_by_a_setting(tokenizer_class, add_bos_token, has_bos, tmp_path):
    """These classes put it there whatever tokenizer.json says; DeepSeek's models have them."""
    folder = tiny_tokenizers.llama3(tmp_path)
    changed(folder, lambda content: content.pop("post_processor"))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": tokenizer_class, "add_bos_token": add_bos_token}
    settings["bos_token"] = "<|begin_of_text|>"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    tokeniser = hub_tokenizer.HubTokenizer(str(folder))
    before = ids_of(tokeniser, "<|begin_of_text|>") if has_bos else []
    assert tokeniser.prompt_ids("the house") == [*before, *tokeniser.encode("the house")]


def test_a_bos_that_a_setting_takes_away(tmp_path):
    folder = tiny_tokenizers.llama2(tmp_path)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "LlamaTokenizer", "add_bos_token": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    tokeniser = hub_tokenizer.HubTokenizer(str(folder))
    assert tokeniser.prompt_ids("the house") == tokeniser.encode("the house")


def test_the_digest_is_of_the_bos_that_settings_put_there(tmp_path):
    """Kept examples, and resuming, go by it."""
    folder = tiny_tokenizers.llama2(tmp_path)
    settings = json.loads((folder / "tokenizer_config.json").read_text())

    def found(**changes):
        (folder / "tokenizer_config.json").write_text(json.dumps(settings | changes))
        tokeniser = hub_tokenizer.HubTokenizer(str(folder))
        return len(tokeniser.prompt_ids("house")), tokeniser.tokenizer_digest

    of_class = {"tokenizer_class": "LlamaTokenizer"}
    with_bos = found(**of_class, add_bos_token=True)
    without = found(**of_class, add_bos_token=False)
    assert with_bos[0] == without[0] + 1
    assert with_bos[1] != without[1]
    # Where the settings say what the file says, the digest is the one that 0.2.0 noted.
    hashed = hashlib.sha256((folder / "tokenizer.json").read_bytes())
    (end,) = ids_of(hub_tokenizer.HubTokenizer(str(folder)), "</s>")
    hashed.update(json.dumps([[end], end]).encode())
    assert with_bos == found() == (with_bos[0], hashed.hexdigest())


def test_a_tokenizer_is_parsed_once_while_its_files_are_the_same(tmp_path, monkeypatch):
    """It takes seconds for a large one, and programs open it several times."""
    folder = tiny_tokenizers.qwen(tmp_path, chat_template=TEMPLATES["qwen"])
    read, parse = [], tokenizers.Tokenizer.from_str
    counting = types.SimpleNamespace(from_str=lambda text: read.append(text) or parse(text))
    monkeypatch.setattr(loaded_tokenizer, "tokenizers", types.SimpleNamespace(Tokenizer=counting))
    vocabulary = pretrained.vocabulary(str(folder))
    assert vocabulary.end_id in vocabulary.end_ids
    vocabularies.check_same(vocabulary, epath.Path(folder))
    assert vocabulary.prompt_ids("Hi")
    assert len(read) == 1
    # Another file in its place is read, also in a folder of the same relative name.
    settings = folder / "generation_config.json"
    settings.write_text(json.dumps({"eos_token_id": vocabulary.end_id}))
    assert hub_tokenizer.HubTokenizer(str(folder)).end_ids == {vocabulary.end_id}
    assert len(read) == 2
    found = []
    for kind in ("gemma", "mistral"):
        tiny_tokenizers.KINDS[kind](tmp_path / kind / "model")
        monkeypatch.chdir(tmp_path / kind)
        found.append(hub_tokenizer.HubTokenizer("model").pieces())
    assert found[0] != found[1]
    vocabulary.template._renderer.close()


def test_a_prompt_that_a_model_could_not_go_on_with_is_a_usage_error(tokenisers):
    """A model with a BOS goes on with that."""
    empty = records.Record(id="row 7", inputs="")
    assert marks.prompt_ids(empty, tokenisers["gemma"]) == ids_of(tokenisers["gemma"], "<bos>")
    with pytest.raises(UsageError, match="record 'row 7': expected a prompt of at least one token"):
        marks.prompt_ids(empty, tokenisers["gpt2"])
