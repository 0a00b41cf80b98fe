"""Rounds: marks brought together by input and prefix, in whatever order they were found."""

import collections
import itertools
import tracemalloc

import jax.numpy as jnp
import numpy as np
import pytest

from tnt_jax import objectives
from tnt_jax.data import marks, records, removed_everywhere, rounds
from tnt_jax.runtime.errors import UsageError
from tnt_jax.tokenizers import tokenization

VOCABULARY = tokenization.Bytes()  # id = byte + 3


def record(name, targets, spans=(), inputs="in", further=()):
    return records.Record(
        id=name,
        inputs=inputs,
        targets=targets,
        target_ids=(*(byte + 3 for byte in targets.encode()), 1),
        negative_spans=tuple(spans),
        negative_token_ids=tuple(further),
    )


def ids(letters):
    return tuple(sorted(ord(letter) + 3 for letter in letters))


def removed(rows):
    """By (input, prefix), what must go there."""
    found = {}
    for row in rows:
        for position, of_position in row.negative_token_ids:
            key = row.inputs, row.target_ids[:position]
            assert found.setdefault(key, set(of_position)) == set(of_position)
    return found


def test_outputs_share_marks_where_their_prefixes_agree():
    first = [record("1", "ab", [(1, 2)]), record("2", "xb", [(1, 2)], inputs="other")]
    second = [record("1", "ac", [(1, 2)]), record("2", "ad")]
    merged = rounds.merge([first, second], VOCABULARY)
    assert [row.id for row in merged] == ["1", "2", "1 (round 2)", "2 (round 2)"]
    both = ((1, ids("bc")),)
    # "ad" is clean, but after "a" two things are unwanted. The other input knows of one alone.
    assert [row.negative_token_ids for row in merged] == [both, ((1, ids("b")),), both, both]
    assert merged[3].negative_spans == ()


def test_what_was_said_before_is_kept_once_with_all_marks():
    first = [record("1", "ab", [(0, 1)])]
    second = [record("1", "ab", [(1, 2)], further=[(0, ids("z"))])]
    (row,) = rounds.merge([first, second], VOCABULARY)
    assert row.id == "1"
    assert row.negative_token_ids == ((0, ids("az")), (1, ids("b")))


def test_clean_outputs_of_later_rounds_can_be_left_out():
    """Those of the first round stay; the marks of all are still of all."""
    first = [record("1", "ab", [(1, 2)]), record("2", "xy")]
    second = [record("1", "ac", [(1, 2)]), record("2", "xz"), record("3", "ad")]
    merged = rounds.merge([first, second], VOCABULARY, keep_clean=False)
    assert [row.id for row in merged] == ["1", "2", "1 (round 2)"]
    assert removed(merged) == removed(rounds.merge([first, second], VOCABULARY)[:3])
    # Ids to remove are marks, too, whether a span has them or not.
    second = [record("3", "ad", further=[(1, ids("b"))]), record("4", "ae")]
    merged = rounds.merge([first, second], VOCABULARY, keep_clean=False)
    assert [row.id for row in merged] == ["1", "2", "3 (round 2)"]


def test_no_name_is_given_twice_where_a_round_was_merged_before():
    """Outputs of two decoders are brought together as rounds are, and a second round follows."""
    decoders = rounds.merge([[record("1", "ab")], [record("1", "ac")]], VOCABULARY)
    merged = rounds.merge([decoders, [record("1", "ad")], [record("1", "ae")]], VOCABULARY)
    assert [row.id for row in merged] == ["1", "1 (round 2)", "1 (round 2, 2)", "1 (round 3)"]


def test_the_order_of_rounds_makes_no_difference_to_what_is_desired():
    """A then B, B then A, A and B at once: the same distributions, bit for bit."""
    of_a = [record("1", "ab", [(0, 1)]), record("2", "cb", [(1, 2)])]
    of_b = [record("1", "cd", [(1, 2)]), record("2", "zb", [(0, 1)])]
    orders = [*itertools.permutations([of_a, of_b]), [[*of_a, *of_b]]]
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(1, 1, 384)), jnp.float32)
    found = []
    for order in orders:
        by_prefix = removed(rounds.merge(order, VOCABULARY))
        found.append(
            {
                key: np.asarray(
                    objectives.desired_log_probs(logits, jnp.asarray([[sorted(of_key)]]))
                )
                for key, of_key in by_prefix.items()
            }
        )
    assert len(found[0]) == 2  # after nothing, and after "c"
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        for key, values in other.items():
            np.testing.assert_array_equal(values, found[0][key])


def test_marks_are_those_that_training_reads():
    """The ids that a record's spans imply are in the ledger's entries too."""
    (row,) = rounds.merge([[record("1", "abc", [(1, 3)])]], VOCABULARY)
    pairs = marks.mark_tokens(row, VOCABULARY).negative_pairs.tolist()
    assert pairs == [[1, ord("b") + 3], [2, ord("c") + 3]]


def test_a_merge_leaves_it_to_training_whether_first_tokens_alone_count():
    merged = rounds.merge([[record("1", "abc", [(1, 3)])], [record("2", "abd")]], VOCABULARY)
    pairs = [
        marks.mark_tokens(row, VOCABULARY, "first_token").negative_pairs.tolist() for row in merged
    ]
    assert pairs == [[[1, ord("b") + 3]], [[1, ord("b") + 3], [2, ord("c") + 3]]]


def test_a_merge_keeps_what_is_removed_by_its_id_within_a_span():
    """What would complete a longer word, say; or is the first token of another output's span."""
    own = record("1", "abc", [(1, 3)], further=[(2, ids("c"))])
    other = record("2", "xyz", [(1, 3)]), record("3", "xyzw", [(2, 3)])
    merged = rounds.merge([[own, *other]], VOCABULARY)
    pairs = [
        marks.mark_tokens(row, VOCABULARY, "first_token").negative_pairs.tolist() for row in merged
    ]
    b, c, y, z = ids("b"), ids("c"), ids("y"), ids("z")
    assert pairs == [[[1, *b], [2, *c]], [[1, *y], [2, *z]], [[1, *y], [2, *z]]]


def test_of_several_strengths_the_largest_is_kept():
    b, c = ids("b"), ids("c")
    first = [record("1", "ab", [(1, 2, 0.25)]), record("2", "ac", [(1, 2, 0.5)])]
    second = [record("3", "ab", [(1, 2, 0.75)]), record("4", "ad")]
    merged = rounds.merge([first, second], VOCABULARY)
    assert [row.id for row in merged] == ["1", "2", "4 (round 2)"]
    # Its own span says less than the later round: the entry adds to it.
    both = ((1, b, 0.75), (1, c, 0.5))
    assert [row.negative_token_ids for row in merged] == [both] * 3
    assert [row.negative_spans for row in merged] == [((1, 2, 0.25),), ((1, 2, 0.5),), ()]
    for row in merged:
        marked = marks.mark_tokens(row, VOCABULARY)
        assert marked.negative_pairs.tolist() == [[1, *b], [1, *c]]
        assert marked.negative_strengths.tolist() == [0.75, 0.5]
    for row in rounds.merge([second, first], VOCABULARY):  # in whatever order
        assert marks.mark_tokens(row, VOCABULARY).negative_strengths.tolist() == [0.75, 0.5]
    # What is raised stays so, unless another output lowers it.
    d = ids("d")
    raised = record("6", "ad", further=((1, d, -2.0), (1, b, -3.0), (0, d, -4.0)))
    for rows in ([first, [raised]], [[raised], first]):
        for row in rounds.merge(rows, VOCABULARY):
            marked = marks.mark_tokens(row, VOCABULARY)
            found = zip(*marked.negative_pairs.T.tolist(), marked.negative_strengths, strict=True)
            assert list(found) == [(0, *d, -4.0), (1, *b, 0.25), (1, *c, 0.5), (1, *d, -2.0)]
    # What goes altogether goes, whoever says so.
    certain = rounds.merge([first, [record("5", "ab", [(1, 2)])]], VOCABULARY)
    assert certain[1].negative_token_ids == ((1, b), (1, c, 0.5))


# Of 16 ids and more; the last two are equal, and are two objects, as of two files.
SHARED = [tuple(range(90, 110)), tuple(range(95, 130)), *(tuple(range(110, 80, -1)) for _ in "12")]


def random_record(rng, name):
    """One or two letters of an alphabet of three; spans, short lists, shared sets, strengths."""
    targets = "".join(rng.choice(list("abc"), rng.integers(1, 4)))

    def strength(least):
        return rng.choice([1.0, 1.0, 0.5, 0.25, least])

    spans = [
        records.with_strength(start, int(rng.integers(start + 1, len(targets) + 1)), strength(0.75))
        for start in range(len(targets))
        if rng.random() < 0.3
    ]
    further = [
        records.with_strength(position, ids_there, strength(-2.0))
        for position in range(len(targets) + 1)
        for ids_there in (SHARED[rng.integers(4)], tuple(rng.integers(97, 135, 2).tolist()))
        if rng.random() < 0.4
    ]
    return record(name, targets, spans, inputs=str(rng.choice(["in", "other"])), further=further)


def merged_plainly(rows):
    """What `merge` says of each output, with one dict for each prefix; a byte is a token."""
    removed, first = collections.defaultdict(dict), collections.defaultdict(set)

    def key(row, position):
        return row.inputs, row.target_ids[:position]

    for row in rows:
        marks_of_row = [
            (position, row.target_ids[position], records.strength_of(span), position == span[0])
            for span in row.negative_spans
            for position in range(span[0], span[1])
        ] + [
            (entry[0], id_, records.strength_of(entry), True)
            for entry in row.negative_token_ids
            for id_ in entry[1]
        ]
        for position, id_, strength, is_first in marks_of_row:
            ids_there = removed[key(row, position)]
            ids_there[id_] = max(strength, ids_there.get(id_, strength))
            if is_first:
                first[key(row, position)].add(id_)
    found = {}
    for row in rows:
        entries = []
        for position, said in enumerate(row.target_ids):
            own = [records.strength_of(s) for s in row.negative_spans if s[0] <= position < s[1]]
            by_strength = collections.defaultdict(list)
            for id_, strength in sorted(removed[key(row, position)].items()):
                is_said_by_spans = id_ == said and own and strength <= max(own)
                if not is_said_by_spans or id_ in first[key(row, position)]:
                    by_strength[strength].append(id_)
            entries += [
                records.with_strength(position, tuple(by_strength[strength]), strength)
                for strength in sorted(by_strength, reverse=True)
            ]
        found.setdefault((row.inputs, row.target_ids), (row.id, tuple(entries)))
    return [(name, *output, entries) for output, (name, entries) in found.items()]


@pytest.mark.parametrize("seed", range(20))
def test_shared_sets_come_to_what_a_dict_of_all_ids_says(seed):
    rng = np.random.default_rng(seed)
    rows = [random_record(rng, str(number)) for number in range(60)]
    merged = rounds.merge([rows], VOCABULARY)
    # The spans of an output are those of the first record that has it.
    firsts = {(row.inputs, row.target_ids): row for row in reversed(rows)}
    assert [row.negative_spans for row in merged] == [
        firsts[row.inputs, row.target_ids].negative_spans for row in merged
    ]
    found = [(row.id, row.inputs, row.target_ids, row.negative_token_ids) for row in merged]
    assert found == merged_plainly(rows)


def test_records_that_share_a_long_set_share_it_after_a_merge():
    """Written out for each mark they take a hundred times the memory."""
    vocabulary = tokenization.Bytes(extra_ids=2500)
    long = tuple(range(97, 2597))  # the letters are among them
    rows = [
        record(str(number), "abc", [(1, 2)], inputs=f"in {number}", further=[(1, long)])
        for number in range(1000)
    ]
    rows += [record("more", "abc", inputs="in 0", further=[(1, (2600,)), (1, long[1:], 0.5)])]
    tracemalloc.start()
    try:
        merged = rounds.merge([rows], vocabulary)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < 5_000_000
    assert merged[0].negative_token_ids == ((1, (*long, 2600)),)
    assert {id(row.negative_token_ids[0][1]) for row in merged[1:]} == {id(long)}


def test_ids_that_are_removed_everywhere_are_brought_together(tmp_path):
    paths = [str(tmp_path / f"{name}.jsonl") for name in ("a", "b", "c", "merged")]
    for path, ids in zip(paths, ([5, 3], None, [4, 3]), strict=False):
        everywhere = removed_everywhere.Ids(ids, {}) if ids else None
        removed_everywhere.write_records(path, [record(path, "ab")], everywhere)
    rounds.merge_files(output=paths[3], rounds=paths[:3], vocabulary=VOCABULARY)
    assert removed_everywhere.of_records(paths[3]) == (3, 4, 5)
    assert removed_everywhere.of_records(str(tmp_path / "[bc].jsonl")) == (3, 4)
    rounds.merge_files(output=paths[3], rounds=[paths[1]], vocabulary=VOCABULARY)
    assert removed_everywhere.of_records(paths[3]) == ()
    # What belongs to other records goes into no merge.
    records.write_records(paths[0], [record("x", "ab")])
    with pytest.raises(UsageError, match=r"a\.jsonl\.everywhere\.json: expected ids that "):
        rounds.merge_files(output=paths[3], rounds=paths[:3], vocabulary=VOCABULARY)
    assert removed_everywhere.of_records(paths[3]) == ()
