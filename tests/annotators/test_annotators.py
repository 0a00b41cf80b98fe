import json
import pathlib
import pickle
import re
import tempfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tnt_jax import annotate as annotate_program
from tnt_jax import annotators
from tnt_jax.annotators import beam_jobs, innocent
from tnt_jax.annotators.denials import Denials
from tnt_jax.annotators.lexicon import line_of
from tnt_jax.annotators.phrases import Phrases
from tnt_jax.data import records, words
from tnt_jax.data.text_automaton import Automaton
from tnt_jax.data.token_automaton import Listed
from tnt_jax.runtime.errors import UsageError
from tnt_jax.tokenizers import tokenization


@pytest.fixture
def lexicon(tmp_path):
    def make(*entries, **settings):
        path = tmp_path / "words.txt"
        path.write_text("\n".join(entries), encoding="utf-8")
        return annotators.Lexicon(path=str(path), **settings)

    return make


@pytest.fixture
def gazetteer(tmp_path):
    def make(values_by_type, **settings):
        path = tmp_path / "values.json"
        path.write_text(json.dumps(values_by_type), encoding="utf-8")
        return annotators.Gazetteer(path=str(path), **settings)

    return make


def annotate(annotator, inputs, targets):
    return annotator.annotate(records.Record(id="a", inputs=inputs, targets=targets))


def marked(annotator, targets, inputs=""):
    return [targets[s.start : s.end] for s in annotate(annotator, inputs, targets).spans]


# -----------------------------------------------------------------------------
# Lexicon
# -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entry", "targets", "expected"),
    [
        ("ass", "class assess bass assassin", []),
        ("cunt", "Scunthorpe United", []),
        ("ass", "An ass. ASS! (ass)", ["ass", "ASS", "ass"]),
        ("ass", "half-ass, non\u2011ass and ass-like", ["ass", "ass", "ass"]),
        ("ass", "ass_hole ass2 2ass", []),
        ("don", "don't don\u2019t", []),
        ("don't", "don\u2019t", ["don\u2019t"]),
        ("idiot", "the idiot's and the idiot\u2019s", ["idiot", "idiot"]),
        ("rosa's bar", "Rosa's Bar or Rosa 's bar", ["Rosa's Bar", "Rosa 's bar"]),
        ("4", "4.5 1,4 14 4:30 4", ["4"]),
        ("4", "I give it 4.", ["4"]),
        (
            "4 star",
            "a 4-star, 4  star, 4\nstar, 4. star, 4 - star",
            ["4-star", "4  star", "4\nstar"],
        ),
        ("£20-25", "for £20-25, not £20-250", ["£20-25"]),
        ("f*ck", "f*ck f*cking fck", ["f*ck"]),
        ("a$$", "a$$", ["a$$"]),
        ("cafe", "caf\u00e9 cafe\u0301", []),
        ("caf\u00e9", "CAFE\u0301 Caf\u00e9", ["CAFE\u0301", "Caf\u00e9"]),
        ("straße", "STRASSE", ["STRASSE"]),
        ("дурак", "Дурак дураки", ["Дурак"]),
        ("कि", "किताब कि", ["कि"]),
        # Without spaces: within a sentence, also where it is a part of a longer word.
        ("傻瓜", "你是傻瓜吗？傻 瓜，傻。瓜", ["傻瓜", "傻 瓜"]),
        ("瓜", "西瓜", ["瓜"]),
        ("ばか", "お前はばかだ。ぱか", ["ばか"]),
        ("โง่", "คุณโง่มาก โง", ["โง่"]),
        ("は\u3099か", "ばか はか", ["ばか"]),
        ("SM女王", "sm女王様", ["sm女王"]),
        ("ass", "我ass我 assess", ["ass"]),
        ("바보", "너는 바보 바보야", ["바보"]),  # Korean has spaces
    ],
)
def test_lexicon_finds_whole_words_only(lexicon, entry, targets, expected):
    assert marked(lexicon(entry), targets) == expected


def test_offsets_are_code_points(lexicon):
    (span,) = annotate(lexicon("bad"), "", "\U0001f600\u00e9 bad").spans
    assert (span.start, span.end) == (3, 6)


def test_first_then_longest_entry_wins(lexicon):
    annotator = lexicon("son", "son of a", "son of a gun", "gun show")
    assert marked(annotator, "son of a gun show, son of an") == ["son of a gun", "son"]


def test_case_sensitive_compares_letters_as_they_are(lexicon):
    annotator = lexicon("Dick", "rat", case_sensitive=True)
    assert marked(annotator, "Dick's dick, RAT, rat") == ["Dick", "rat"]
    (span,) = annotate(annotator, "", "Dick").spans
    assert span.alternatives == ("rat",)  # "Rat" would not have been marked


@pytest.mark.parametrize(
    ("entry", "forms"),
    [
        ("fool", "fools fooled fooling"),
        ("kiss", "kisses kissed kissing"),
        ("bitch", "bitches bitched bitching"),
        ("bully", "bullies bullied bullying"),
        ("slay", "slays slayed slaying"),
        ("smile", "smiles smiled smiling"),
        ("see", "sees seed seeing"),
        ("lie", "lies lied lying"),
        ("untie", "unties untied untying"),
        ("slap", "slaps slapped slapping"),
        ("idiot", "idiots idioted idioting"),
        ("fix", "fixes fixed fixing"),
        ("big fool", "big fools big fooled big fooling"),
    ],
)
def test_inflections(lexicon, entry, forms):
    annotator = lexicon(entry, inflections=True)
    others = (" ".join(f) for f in zip(*[iter(forms.split())] * len(entry.split()), strict=True))
    assert marked(annotator, f"{entry}; {forms}") == [entry, *others]
    assert marked(lexicon(entry), forms) == []


def test_inflections_follow_the_spelling_rules(lexicon):
    annotator = lexicon("slap", "smile", "bully", "fix", "die", inflections=True)
    wrong = "slaping smileing bullyed fixxed smil slappings diing dieing"
    assert marked(annotator, wrong) == []


def test_comments_and_blank_lines_are_skipped(lexicon):
    annotator = lexicon("\ufeff# not a word", "", "  fool  ", "   ", "#fool too")
    assert marked(annotator, "not a word, fool too") == ["fool"]


@pytest.mark.parametrize("text", ["#ad", r"\#ad", r"\\#ad", r"\ad", "#", "ad #1"])
def test_a_text_that_begins_with_a_comments_sign_can_be_listed(lexicon, text):
    line = line_of(text)
    assert not line.startswith("#")
    assert (line == text) == ("#" not in text.lstrip("\\")[:1])
    assert marked(lexicon("# a comment", line), f"see {text} there") == [text]


def test_lexicon_alternatives_are_the_entries_in_every_casing(lexicon):
    annotator = lexicon("idiot", "Fool", "old rat")
    forms = {"idiot", "Idiot", "Fool", "fool"}
    forms |= {"old rat", "Old rat", "Old Rat", "old-rat", "Old-rat", "Old-Rat"}
    spans = annotate(annotator, "", "idiot, Fool, OLD RAT").spans
    assert set(spans[0].alternatives) == forms - {"idiot"}
    assert set(spans[1].alternatives) == forms - {"Fool"}
    # What stands in capitals may go on in capitals.
    assert set(spans[2].alternatives) == forms | {"IDIOT", "FOOL", "OLD-RAT"}
    assert all(len(set(span.alternatives)) == len(span.alternatives) for span in spans)
    (span,) = annotate(lexicon("idiot", "fool", alternatives=False), "", "idiot").spans
    assert span.alternatives == ()


def test_a_capital_does_not_hide_the_listed_form(gazetteer):
    """A text that begins with a marked value may go on in lower case, as the list has it."""
    values = {"rating": ["Michelin-starred"], "family": ["family-friendly"]}
    (span,) = annotate(gazetteer(values), "", "Michelin-starred pub.").spans
    assert {"family-friendly", "Family-friendly"} <= set(span.alternatives)
    (span,) = annotate(gazetteer(values), "", "a family friendly pub").spans
    assert {"Michelin-starred", "michelin-starred"} <= set(span.alternatives)


def test_lexicon_everywhere_is_all_that_it_would_mark(lexicon):
    settings = {"at_every_position": True}
    assert lexicon("rat", "Fool").everywhere() is None
    everywhere = lexicon("rat", "Fool", case_sensitive=True, **settings).everywhere()
    assert everywhere == Listed(("rat", "Fool"), case_sensitive=True)
    annotator = lexicon("rat", "Fool", inflections=True, **settings)
    everywhere = annotator.everywhere()
    assert {"rat", "ratting", "Fool", "Fools"} <= set(everywhere.texts)
    assert len(set(everywhere.texts)) == len(everywhere.texts)
    assert all(marked(annotator, text) == [text] for text in everywhere.texts)
    # What it marks is the same; nothing may come up in any record, whatever that says.
    assert marked(annotator, "a rat and a cat") == ["rat"]
    assert annotate(annotator, "", "a cat").unwanted == everywhere
    assert annotate(lexicon("rat"), "", "a cat").unwanted is None


def test_lexicon_marks_also_what_the_inputs_say(lexicon):
    assert marked(lexicon("rat"), "a rat", inputs="rat") == ["rat"]


# -----------------------------------------------------------------------------
# Gazetteer
# -----------------------------------------------------------------------------

VENUES = {
    "name": ["the cambridge blue", "cambridge", "pizza hut", "Café Brazil"],
    "area": {"city centre": ["centre", "city center"], "north": [], "riverside": []},
    "food": {"british": ["english"], "indian": [], "north indian": []},
    "price": ["high", "cheap"],
    "rating": ["high", "low"],
    "地点": ["河边", "市中心"],
}


@pytest.mark.parametrize(
    ("inputs", "targets", "expected"),
    [
        ("area = north", "It is in the north.", []),
        ("area = north", "It is by the Riverside.", ["Riverside"]),
        ("AREA[RIVERSIDE]", "by the riverside", []),
        ("area = centre", "in the city center", []),  # another name of the same value
        ("food = british", "English and Indian food", ["Indian"]),
        ("food = north indian", "north indian food in the north", []),  # within a longer name
        ("food = indian", "north indian food", ["north indian"]),
        ("area = north ; food = indian", "north indian food", ["north indian"]),
        ("name = the cambridge blue", "The Cambridge Blue, Cambridge", []),
        ("name = cambridge", "the cambridge blue in cambridge", ["the cambridge blue"]),
        ("rating = high", "a high price", []),  # some type's value of that name is supported
        ("northern", "the north", ["north"]),
        ("", "northern indians", []),
        ("name = Cafe\u0301 Brazil", "CAFÉ  Brazil", []),
        ("地点是河边。", "它在河边，离市中心不远。", ["市中心"]),
        ("", "", []),
    ],
)
def test_gazetteer_marks_what_the_inputs_do_not_state(gazetteer, inputs, targets, expected):
    assert marked(gazetteer(VENUES), targets, inputs=inputs) == expected


def test_gazetteer_alternatives_and_supported(gazetteer):
    values = {"area": {"north": ["northern"], "south": []}, "food": ["thai", "high tea"]}
    annotation = annotate(gazetteer(values), "food = thai", "South of it. in the south")
    at_start, later = annotation.spans
    forms = {"north", "North", "northern", "Northern", "south", "South"}
    forms |= {"high tea", "High tea", "High Tea", "high-tea", "High-tea", "High-Tea"}
    assert set(at_start.alternatives) == forms - {"South"}
    assert set(later.alternatives) == forms - {"south"}
    assert annotation.supported == ("thai", "Thai", "THAI")

    annotation = annotate(gazetteer(values, alternatives=False), "food = thai", "south")
    assert annotation.spans == (annotators.Span(start=0, end=5),)


def test_a_name_shared_with_a_supported_value_is_no_alternative(gazetteer):
    values = {"price": ["High", "low"], "rating": {"top": ["high"]}}
    annotation = annotate(gazetteer(values), "rating = top", "low")
    assert annotation.spans[0].alternatives == ("Low",)
    assert set(annotation.supported) >= {"High", "top", "high"}


def test_without_a_vocabulary_nothing_can_be_removed_at_every_position(gazetteer):
    """Each record removes something else there, so only `mark` can tell."""
    annotator = gazetteer({"area": ["north", "south"]}, at_every_position=True)
    row = records.Record(id="1", inputs="in the north", targets="a pub in the south")
    with pytest.raises(UsageError, match=r"at every position: expected a vocabulary .* found None"):
        annotate_program.mark(row, annotator, None)


def test_gazetteer_at_every_position_bans_what_is_not_supported(gazetteer):
    values = {"area": {"north": ["northern"], "south": []}, "food": ["thai"]}
    annotator = gazetteer(values, at_every_position=True)
    assert annotator.everywhere() is None  # it depends on the inputs
    unwanted = {
        inputs: annotate(annotator, inputs, "it is good").unwanted for inputs in ("north, thai", "")
    }
    assert all(set(of.texts) == {"north", "northern", "south", "thai"} for of in unwanted.values())
    assert set(unwanted["north, thai"].allowed) == {"north", "northern", "thai"}
    assert unwanted[""].allowed == ()
    plain = gazetteer(values)
    assert annotate(plain, "", "it is good").unwanted is None
    assert marked(annotator, "thai in the south") == marked(plain, "thai in the south")


# -----------------------------------------------------------------------------
# Both
# -----------------------------------------------------------------------------

LISTED = [
    "Crowne Plaza Hotel",
    "THE PUNTER",
    "family-friendly",
    "o'reilly's",
    "Café Rouge",
    "4 star",
]


@pytest.mark.parametrize("list_style", [str, str.lower, str.upper, str.title])
@pytest.mark.parametrize("text_style", [str.lower, str.upper, str.title, str.capitalize])
@pytest.mark.parametrize("listed", LISTED)
def test_what_is_marked_is_what_is_removed(lexicon, gazetteer, listed, list_style, text_style):
    """In whatever case a list is written, and the text: both rules mean the same text."""
    listed, text = list_style(listed), text_style(listed)
    if text_style is str.title:
        text = text.replace("'S", "'s")
    spellings = {text, text.replace("-", " "), text.replace(" ", "-"), text.replace("'", "\u2019")}
    row = records.Record(id="a", inputs="it is good", targets=text)
    everywhere = {"at_every_position": True}
    for annotator in (lexicon(listed, **everywhere), gazetteer({"value": [listed]}, **everywhere)):
        assert all(marked(annotator, spelt) == [spelt] for spelt in spellings)
        unwanted = annotator.unwanted(row)
        assert annotator.annotate(row).unwanted == unwanted
        find = finder_of(unwanted)
        assert all(find(spelt) for spelt in spellings)
        assert not find(text[:-1])
    supporting = gazetteer({"value": [listed, "other"]})
    assert spellings <= set(annotate(supporting, listed, "other").supported)
    supported = supporting.unwanted(records.Record(id="a", inputs=listed))
    assert supported.allowed == (listed,)


def finder_of(unwanted):
    """A function that tells whether the automaton of a list finds something in a text."""
    automaton = Automaton.of(unwanted.texts, case_sensitive=unwanted.case_sensitive)
    return lambda text: bool(automaton.read(text)[1])


@pytest.mark.parametrize("listed", LISTED)
def test_a_case_sensitive_list_removes_what_it_marks(lexicon, listed):
    annotator = lexicon(listed, case_sensitive=True)
    unwanted = annotator.unwanted(records.Record(id="a", inputs="", targets=""))
    find = finder_of(unwanted)
    for spelt in (listed, listed.replace("-", " "), listed.replace("'", "\u2019")):
        assert find(spelt) and marked(annotator, spelt) == [spelt]
    assert not find(listed.swapcase())


def test_a_value_that_is_denied_is_not_supported(gazetteer):
    """ "familyFriendly: no" says nothing for "family-friendly", "yes" does."""
    values = {"family": {"family-friendly": ["familyFriendly"]}, "food": ["no", "thai"]}
    plain, told = gazetteer(values), gazetteer(values, denials=("no", "not at all"))
    text = "a family-friendly place"
    for inputs in ("familyFriendly: no", "familyFriendly[no], thai", "familyFriendly = NOT at all"):
        assert marked(plain, text, inputs) == []
        assert marked(told, text, inputs) == ["family-friendly"]
        assert "family-friendly" not in told.unwanted(records.Record(id="a", inputs=inputs)).allowed
    for inputs in ("familyFriendly: yes", "familyFriendly, no", "familyFriendly: none"):
        assert marked(told, text, inputs) == []
    # It is stated elsewhere.
    assert marked(told, text, "familyFriendly: no. It is family friendly.") == []
    assert "denials=no|not at all" in told.description


@pytest.mark.parametrize(
    "denied",
    [
        '{"familyFriendly": "no"}',
        '{"familyFriendly": ["no"], "area": "north"}',
        "familyFriendly\uff1ano",
        "familyFriendly\uff1a\u201cno\u201d\uff0carea\uff1anorth",
        "familyFriendly: \u201cno\u201d",
        "familyFriendly: \u201eno\u201c",
        "familyFriendly: \u2018no\u2019",
        "familyFriendly: **no**",
        "**familyFriendly:** no",
        "- **familyFriendly**: `no`\n- area: north",
        "| familyFriendly | no |",
        "|familyFriendly|**no**|\n|area|north|",
        "familyFriendly -> no",
        "familyFriendly->no; area->north",
        "familyFriendly=no",
        "[familyFriendly]: no",
        "(familyFriendly: no)",
        "familyFriendly (no), area (north)",
        "familyFriendly: (no)",
        "familyFriendly:\n  no  \nnorth",
        "familyFriendly: not  at all | area: north",
        "family\u2011friendly: None",
        "Family friendly: none\u2028area: north",
    ],
)
def test_forms_in_which_a_value_is_denied(gazetteer, denied):
    values = {"family": {"family-friendly": ["familyFriendly"]}, "area": ["north"]}
    told = gazetteer(values, denials=("no", "not at all", "none"))
    assert marked(told, "a family-friendly place", denied) == ["family-friendly"]
    assert marked(told, "in the north", denied) == ([] if "north" in denied else ["north"])


@pytest.mark.parametrize(
    "stated",
    [
        "area: riverside (no parking)",
        "area: riverside | no parking",
        "area: riverside: no problem",
        "area: riverside: no's",
        "area: riverside -> not",
        "area: riverside > no",
        "area: riverside; no",
        "area: riverside no",
        "area: riverside: **no** problem",
        "area: riverside: yes (no)",
        "no: riverside",
        "riverside: no way, it is by the river",
        ": no, -> no, > no; riverside",
    ],
)
def test_a_value_is_stated_unless_what_follows_denies_it(gazetteer, stated):
    told = gazetteer({"area": ["riverside", "north"]}, denials=("no", "not at all"))
    assert marked(told, "by the riverside", stated) == []


@given(
    name=st.sampled_from(["north", "Punter (pub)", "4", "河边"]),
    closing=st.text(alphabet=" \"'*`)]}\u201d", max_size=6),
    separator=st.sampled_from([":", " = ", "|", "->", "[", " (", "\uff1a"]),
    opening=st.text(alphabet=" \"'*`([{\u201c", max_size=6),
    value=st.sampled_from(["no", "NOT  at all", "不", "(none)"]),
    emphasis=st.text(alphabet=" *`", max_size=6),
    end=st.sampled_from(["", "\n", ",", ";", ".", "|", ")", "]", "}", '"', "\u201d"]),
    before=st.sampled_from(["", "x ", "x: ", "no. ", "| "]),
    after=st.sampled_from(["", " x", " problem: no"]),
)
def test_marks_around_a_name_and_its_denial_do_not_count(
    name, closing, separator, opening, value, emphasis, end, before, after
):
    found = Denials(["no", "not at all", "不", "(none)"])
    named = before + name
    told = f" {closing} {separator} {opening}{value}{emphasis}"
    rest = end + after if end else ""
    assert len(named) in found.ends(named + told + rest)
    assert len(named) not in found.ends(f"{named}{told} problem{rest}")
    assert len(named) not in found.ends(f"{named} {value}{emphasis}{rest}")


@pytest.mark.parametrize(
    ("piece", "number"),
    [
        ("riverside: ", 30_000),
        ("é: no problem ", 30_000),
        ('riverside""": no ', 20_000),
        ("*", 60_000),
    ],
)
def test_long_inputs_are_read_once(gazetteer, piece, number):
    """Seconds; minutes or hours if for each name the rest of the text, or all of it, were read."""
    told = gazetteer({"area": ["*", "riverside", "é"]}, denials=("no", "*"))
    assert marked(told, "riverside", f"{piece * number}riverside") == []


def test_description_names_settings_and_content_but_not_the_folder(lexicon, gazetteer, tmp_path):
    first = lexicon("rat")
    again = tmp_path / "elsewhere"
    again.mkdir()
    (again / "words.txt").write_text("rat", encoding="utf-8")
    assert annotators.Lexicon(path=str(again / "words.txt")).description == first.description
    assert lexicon("cat").description != first.description
    assert lexicon("rat", inflections=True).description != first.description
    assert first.description.startswith("Lexicon(words.txt:")
    # Such lists were found otherwise before: their marks are not those of the same list then.
    assert first.description.endswith("at_every_position=False)")
    assert lexicon("\u50bb\u74dc").description.endswith(", letters_are_words=True)")
    assert gazetteer(VENUES).description.startswith("Gazetteer(values.json:")


def test_annotators_travel_to_other_processes(lexicon, gazetteer):
    for annotator in (lexicon("rat"), gazetteer({"animal": ["rat"]})):
        copy = pickle.loads(pickle.dumps(annotator))
        assert annotate(copy, "", "a rat") == annotate(annotator, "", "a rat")
        assert len(annotate(copy, "", "a rat").spans) == 1


@pytest.mark.parametrize("make", [annotators.Lexicon, annotators.Gazetteer])
def test_unreadable_files_name_the_setting(make, tmp_path):
    with pytest.raises(UsageError, match=rf"{make.__name__}\.path.*absent\.txt"):
        make(path=str(tmp_path / "absent.txt"))
    latin = tmp_path / "latin.txt"
    latin.write_bytes("café".encode("latin-1"))
    with pytest.raises(UsageError, match=r"UTF-8.*latin\.txt"):
        make(path=str(latin))


def test_a_list_of_nothing_is_a_mistake(lexicon):
    with pytest.raises(UsageError, match="lists nothing"):
        lexicon("", "# only a comment")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "names no value"),
        ("{}", "names no value"),
        ('{"area": []}', "names no value"),
        ('{"area": "north"}', "type 'area' must be a list"),
        ('{"area": ["north", 4]}', "type 'area' must be a list of non-blank strings"),
        ('{"area": [" "]}', "non-blank"),
        ('{"area": {"north": "up"}}', "value 'north' of type 'area'"),
        ('{"area": {"": []}}', "non-blank"),
    ],
)
def test_a_malformed_gazetteer_is_a_mistake(tmp_path, content, message):
    path = tmp_path / "values.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(UsageError, match=message):
        annotators.Gazetteer(path=str(path))


# Few characters, so that entries, words and their joints collide often.
texts = st.text(alphabet="abS'\u2019 -.,1\u0301é\U0001f600\n", max_size=30)


@given(entries=st.lists(texts, max_size=5), targets=texts, inflections=st.booleans())
def test_spans_are_sorted_disjoint_within_the_text_and_repeatable(entries, targets, inflections):
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "words.txt"
        path.write_text("\n".join([*entries, "a"]), encoding="utf-8")
        annotator = annotators.Lexicon(path=str(path), inflections=inflections)
    annotation = annotate(annotator, "", targets)
    edges = [edge for span in annotation.spans for edge in (span.start, span.end)]
    assert all(span.start < span.end for span in annotation.spans)
    assert edges == sorted(edges)
    assert all(0 <= edge <= len(targets) for edge in edges)
    assert annotate(annotator, "", targets) == annotation


phrases = st.lists(st.sampled_from(["red", "sea", "bass", "bar"]), min_size=1, max_size=3).map(
    " ".join
)


@given(
    values=st.lists(phrases, min_size=1, max_size=8, unique=True),
    num_supported=st.integers(0, 8),
    value_index=st.integers(0, 7),
    style=st.sampled_from([str, str.upper, str.title]),
)
def test_a_value_is_marked_exactly_when_the_inputs_do_not_hold_it(
    values, num_supported, value_index, style
):
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "values.json"
        path.write_text(json.dumps({"thing": values}), encoding="utf-8")
        annotator = annotators.Gazetteer(path=str(path))
    stated = values[:num_supported]
    value = values[value_index % len(values)]
    supported = any(f" {value} " in f" {phrase} " for phrase in stated)

    inputs = "things: " + " ; ".join(stated)
    targets = f"They have {style(value)}, as you see."
    expected = [] if supported else [style(value)]
    assert marked(annotator, targets, inputs=inputs) == expected


# -----------------------------------------------------------------------------
# Long texts
# -----------------------------------------------------------------------------

TEXTS = st.lists(
    st.sampled_from(["New", "York", "no", ":", "=", "(", "-", " ", "  ", "4", ".", "'s", "x", "é"])
).map("".join)


@pytest.mark.parametrize("case_sensitive", [False, True])
@given(TEXTS)
def test_words_outside_are_those_in_no_mention(case_sensitive, text):
    listed = ["New York", "no", "4"]
    found = Phrases(((t, t) for t in listed), case_sensitive=case_sensitive)
    inside = {
        place for start, end, _ in found.longest_mentions(text) for place in range(start, end)
    }
    expected = [text[start:end] for start, end in words.extents(text) if start not in inside]
    assert found.outside(text) == (
        expected if case_sensitive else [word.lower() for word in expected]
    )


def test_a_case_sensitive_list_lets_words_of_the_prompt_begin(lexicon):
    """ "McDonald" is none of "McDonnell", and its D is a capital."""
    entries = lexicon("McDonnell", "iPad", case_sensitive=True)
    assert entries.innocent_words("the McDonald farm, an iPad") == [
        "the",
        "McDonald",
        "farm",
        ",",
        "an",
    ]


@pytest.mark.parametrize(
    ("said", "counts"),
    [
        ({"Michelin": 60, "Michel": 2}, False),  # two slips
        ({"Michelin": 60, "Michel": 5}, True),
        ({"Michelin": 20, "Michel": 2}, True),  # too many to be slips of twenty
        ({"Michelin": 60, "Mic": 2}, True),  # three letters say little
        ({"Michelin": 60, "Mice": 2}, True),
        ({"plain": 60, "Michel": 2}, True),
        ({"plain": 60, "Michel": 1}, False),
        ({"plain": 3000, "Michel": 2}, False),
    ],
)
def test_a_word_of_outputs_is_innocent_if_it_is_no_slip(tmp_path, lexicon, said, counts):
    texts = [f"a {word} star" for word, number in said.items() for _ in range(number)]
    rows = [records.Record(id=str(n), inputs="", targets=text) for n, text in enumerate(texts)]
    records.write_records(tmp_path / "outputs.jsonl", rows)
    found = innocent.words(str(tmp_path / "outputs.jsonl"), lexicon("Michelin star", "Michelin"))
    assert "a" in found and "michelin" not in found
    assert (list(said)[-1].lower() in found) == counts


class Bees:
    """Marks the word "bee", and would mark "bat" as well; knows no innocent words by itself."""

    description = "Bees()"

    def annotate(self, record):
        spans = [m.span() for m in re.finditer(r"\bbee\b", record.targets)]
        return annotators.Annotation(
            spans=tuple(annotators.Span(start=a, end=b, alternatives=["bat"]) for a, b in spans)
        )

    def everywhere(self):
        return None


def test_words_around_the_marks_of_any_annotator_are_innocent(tmp_path):
    """ "bat" begins with the byte of "by", which two outputs say: that one stays."""
    vocabulary = tokenization.Bytes()
    paths = [str(tmp_path / name) for name in ("with.jsonl", "without.jsonl", "out.jsonl")]
    for path, texts in zip(paths, (["a bee by by", "by"], ["a bee", "a cow"]), strict=False):
        records.write_records(
            path,
            [records.Record(id=str(n), inputs="", targets=text) for n, text in enumerate(texts)],
        )
    removed = []
    for path in paths[:2]:
        annotate_program.annotate(
            output=paths[2], input=path, annotator=Bees(), vocabulary=vocabulary
        )
        removed.append([row.negative_token_ids for row in records.read_records(paths[2])])
    b, *_ = vocabulary.prompt_ids("b")
    # With nothing innocent, "bat" is removed where the mark begins; the mark removes that byte too.
    assert removed == [[(), ()], [((2, (b,)),), ()]]


class SomeBees(Bees):
    """Knows no record whose text begins with "un"."""

    def annotate(self, record):
        return None if record.targets.startswith("un") else super().annotate(record)


def test_records_that_an_annotator_does_not_know_say_nothing_of_words(tmp_path):
    """Theirs are no unwanted ones, beside which a word that looks like them would be a slip."""
    texts = ["a beekeeper"] * 2 + ["unknown beekeepers"] * 60
    rows = [records.Record(id=str(n), inputs="", targets=text) for n, text in enumerate(texts)]
    records.write_records(tmp_path / "outputs.jsonl", rows)
    found = innocent.words(str(tmp_path / "outputs.jsonl"), SomeBees())
    assert "beekeeper" in found and "beekeepers" not in found


def test_apache_beam_is_refused_files_in_an_object_store():
    for paths in (("gs://b/in.jsonl", "out.jsonl"), ("in.jsonl", "gs://b/out.jsonl")):
        with pytest.raises(UsageError, match=r"that all workers see, found gs://b/.*\. Copy"):
            next(iter(beam_jobs.map_records(lambda row: row, *paths, [])))
