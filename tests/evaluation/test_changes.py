import hypothesis
import pytest
from hypothesis import strategies as st

from tnt_jax.data import records
from tnt_jax.evaluation import changes

C, U = changes.CHANGED, changes.UNWANTED


def row(targets, *unwanted):
    spans = tuple((targets.index(text), targets.index(text) + len(text)) for text in unwanted)
    return records.Record(id="r", inputs="i", targets=targets, negative_spans=spans)


def test_a_mended_output():
    change = changes.change(
        row("the room is small and dirty today.", "dirty"), row("the room is small and very clean.")
    )
    assert change.kind == "mended"
    # "dirty today." of seven words and "very clean." of seven have no counterpart.
    assert change.share == pytest.approx(4 / 14)
    assert change.lengths == (7, 7)
    assert change.original == (("the room is small and ", 0), ("dirty", C | U), (" today.", C))
    assert change.current == (("the room is small and ", 0), ("very clean.", C))


@pytest.mark.parametrize(
    ("before", "after", "kind", "signs"),
    [
        (row("a b"), row("a b"), "unchanged", ()),
        (row("a bad", "bad"), row("a bad", "bad"), "unchanged", ()),
        (row("a b"), row("a c"), "other words", ()),
        (row("a b"), row("a bad", "bad"), "newly unwanted", ()),
        (row("a b"), row("bad bad", "bad"), "newly unwanted", ("repeated word",)),
        (row("a bad", "bad"), row("the bad", "bad"), "still unwanted", ()),
        (row("a bad", "bad"), row("a good"), "mended", ()),
        (row("a bad", "bad"), row("a good good"), "damaged", ("repeated word",)),
        (row("a b"), row("a \u2047 b"), "damaged", ("unknown token",)),
        (row("a a b"), row("a a c"), "other words", ()),  # it stuttered before
        (row(""), row("a"), "other words", ()),
        (row("a  b\nc"), row("a b c"), "white space", ()),
        (row("a b"), row("a b "), "white space", ()),
        (row("a bad", "bad"), row("a  bad", "bad"), "still unwanted", ()),
    ],
)
def test_kinds(before, after, kind, signs):
    change = changes.change(before, after)
    assert (change.kind, change.signs) == (kind, signs)
    assert (change.share == 0) == (before.targets.split() == after.targets.split())


def test_white_space_that_differs_is_marked():
    change = changes.change(row("a  b\nc d"), row(" a b c d"))
    assert change.original == (("a", 0), ("  ", C), ("b", 0), ("\n", C), ("c d", 0))
    assert change.current == ((" ", C), ("a", 0), (" ", C), ("b", 0), (" ", C), ("c d", 0))


class NoMatcher:
    """Stands for difflib where it would take minutes."""

    def __init__(self, _, one, other, **__):
        assert not one or not other


def test_outputs_that_repeat_a_word_are_compared_at_once(monkeypatch):
    """By hand: of 800 and 400 "the" 400 have a counterpart, of 400 "a" none."""
    monkeypatch.setattr(changes.difflib, "SequenceMatcher", NoMatcher)
    change = changes.change(row("the " * 800), row("the a " * 400))
    assert change.share == pytest.approx(1 - 800 / 1600)
    assert "".join(piece for piece, _ in change.original) == "the " * 800
    assert "".join(piece for piece, _ in change.current) == "the a " * 400


def longest_common(one, other):
    """The length of a longest common subsequence, by the textbook's table."""
    table = [[0] * (len(other) + 1) for _ in range(len(one) + 1)]
    for i, a in enumerate(one):
        for j, b in enumerate(other):
            longer = max(table[i][j + 1], table[i + 1][j])
            table[i + 1][j + 1] = table[i][j] + 1 if a == b else longer
    return table[-1][-1]


@hypothesis.given(st.text("abc", max_size=12), st.text("abcd", max_size=12))
def test_without_difflib_as_many_words_as_possible_have_a_counterpart(before, after):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(changes, "_MOST_PAIRS", -1)
        change = changes.change(row(" ".join(before)), row(" ".join(after)))
    kept = [
        "".join(piece if not marks & C else " " for piece, marks in pieces).split()
        for pieces in (change.original, change.current)
    ]
    assert kept[0] == kept[1]
    assert len(kept[0]) == longest_common(before, after)
    total = len(before) + len(after)
    assert change.share == pytest.approx(1 - 2 * len(kept[0]) / total if total else 0)


def test_the_worst_first():
    found = [
        changes.change(row("a b c d"), row("a b c d")),
        changes.change(row("a b c d"), row("a b c x")),
        changes.change(row("a b c d"), row("x y z d")),
        changes.change(row("a bad", "bad"), row("a good")),
        changes.change(row("a b"), row("a bad", "bad")),
    ]
    assert changes.worst_first(found) == [4, 2, 1, 3, 0]


@hypothesis.given(st.text("ab \n", max_size=12), st.text("ab \n", max_size=12), st.data())
def test_pieces_are_the_texts_and_marks_are_where_they_were(before, after, data):
    spans = []
    if after:
        start = data.draw(st.integers(0, len(after) - 1))
        spans = [(start, data.draw(st.integers(start + 1, len(after))))]
    current = records.Record(id="r", inputs="i", targets=after, negative_spans=tuple(spans))
    change = changes.change(row(before), current)
    for pieces, text in ((change.original, before), (change.current, after)):
        assert "".join(piece for piece, _ in pieces) == text
        assert all(piece for piece, _ in pieces)
    marked = [bool(marks & U) for piece, marks in change.current for _ in piece]
    assert marked == [any(s <= i < e for s, e in spans) for i in range(len(after))]
    # What is not marked as changed is the same in both, word by word.
    kept = [
        "".join(piece if not marks & C else " " for piece, marks in pieces).split()
        for pieces in (change.original, change.current)
    ]
    assert kept[0] == kept[1]


def test_the_share_of_long_texts_is_counted_as_that_of_short_ones():
    """By a longest common subsequence, however often words repeat: the second half is another."""
    for number in (10, 1000):
        before = row("a b " * number + "c d " * number)
        after = row("a b " * number + "e f " * number)
        assert changes.change(before, after).share == pytest.approx(0.5)
        both = row("b a " * number + "c d " * number)  # of "a b a b" and "b a b a" three are one
        found = changes.change(before, both).share
        assert found == pytest.approx(1 - (4 * number - 1) / (4 * number))
