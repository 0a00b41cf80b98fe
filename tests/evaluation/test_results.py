"""The numbers of a sweep: by hand, by another implementation, by what must not matter."""

import dataclasses
import itertools
import json
import math
import pathlib
import random
import re

import numpy as np
import pytest
import scipy.stats
from helpers.outputs import evaluation
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.significance import PairedTest

from tnt_jax import sweep
from tnt_jax.data import records
from tnt_jax.evaluation import evaluations, results, tables
from tnt_jax.runtime.errors import UsageError

WORDS = ["the", "a", "old", "new", "house", "tree", "lake", "hill", "red", "blue", "is", "was"]


def outputs(seed, unwanted=0.3, number=200, keep=None, change=0.5):
    """Made-up sentences, some with a mark; or those of `keep`, with a share of words changed."""
    rng = random.Random(seed)
    rows = []
    for i in range(number):
        words = [rng.choice(WORDS) for _ in range(8)] if keep is None else keep[i].targets.split()
        if keep is not None:
            words = [rng.choice(WORDS) if rng.random() < change else word for word in words]
        text = " ".join(words)
        spans = ((0, len(words[0])),) if rng.random() < unwanted else ()
        rows.append(records.Record(id=str(i), inputs=str(i), targets=text, negative_spans=spans))
    return rows


def test_what_is_marked_by_id_alone_is_not_counted():
    """No annotator marks so what the patched model says: its outputs would look better by that."""
    by_id = records.Record(
        **{"id": "0", "inputs": "0", "targets": "the lake", "target_ids": (7, 8, 1)},
        **{"negative_spans": (), "negative_token_ids": ((2, (1,)),)},
    )
    by_span = records.Record(id="1", inputs="1", targets="a hill", negative_spans=((2, 6),))
    clean = dataclasses.replace(by_span, targets="a tree", negative_spans=())
    found = results.measure([by_id, by_span], [by_id, clean])
    assert (found["unwanted_rate_before"], found["unwanted_rate_after"]) == (0.5, 0)
    assert found["unchanged_clean"] == 1
    sure = results.intervals([by_id, by_id, by_span], {"arm": [by_id, by_id, clean]}, "")
    assert (
        sure["arm"]["cut_interval"]
        == results.intervals(
            [dataclasses.replace(by_id, negative_token_ids=())] * 2 + [by_span],
            {"arm": [by_id, by_id, clean]},
            "",
        )["arm"]["cut_interval"]
    )


def row(objective, alpha, cut, bleu, seed=0, **more):
    return {
        "objective": objective, "alpha": alpha, "cut": cut, "bleu": bleu, "seed": seed, **more
    }  # fmt: skip


def test_measures_by_hand():
    texts = ["the the lake", "a red house on a hill", "a red house on a hill", "the ⁇ tree"]
    patched = ["the lake", "a red house on a hill", "the old tree", "the tree"]
    spans = [((0, 3),), ((0, 1),), (), ((4, 5),)]
    original, current = (
        [
            records.Record(id=str(i), inputs="", targets=text, negative_spans=of_row)
            for i, (text, of_row) in enumerate(zip(of, marks, strict=True))
        ]
        for of, marks in ((texts, spans), (patched, [((0, 3),), (), (), ()]))
    )
    found = results.measure(original, current)
    assert found["unwanted_rate_before"] == 3 / 4
    assert found["unwanted_rate_after"] == 1 / 4
    assert found["cut"] == pytest.approx(2 / 3)
    assert found["exact_match"] == 1 / 4
    assert (found["repeated_word_rate_before"], found["repeated_word_rate"]) == (1 / 4, 0)
    assert (found["unknown_token_rate_before"], found["unknown_token_rate"]) == (1 / 4, 0)
    assert (found["distinct_ratio_before"], found["distinct_ratio"]) == (3 / 4, 1)
    # The third is clean, and is not as it was. Trigrams: 1 and twice the same 4, then 4 and 1.
    assert found["unchanged_clean"] == 0
    assert found["distinct_trigram_ratio_before"] == 5 / 9
    assert found["distinct_trigram_ratio"] == 1
    assert "bleu_to_mask" not in found

    masked = [dataclasses.replace(row, targets="the lake") for row in current]
    found = results.measure(original, current, masked)
    assert found["same_as_mask"] == 1 / 4
    assert results.measure(original, current, current)["bleu_to_mask"] == pytest.approx(100)


def test_an_arm_at_the_original_has_changed_nothing():
    original = outputs(0)
    found = results.measure(original, original)
    assert (found["cut"], found["bleu"], found["exact_match"]) == (0, pytest.approx(100), 1)


def test_prompts_are_split_by_their_ids_alone():
    ids = [f"prompt {i}" for i in range(4000)]
    chosen = {name for name in ids if results.is_for_choice(name, 0.25)}
    assert len(chosen) == pytest.approx(1000, abs=100)
    assert {name for name in reversed(ids) if results.is_for_choice(name, 0.25)} == chosen
    assert chosen < {name for name in ids if results.is_for_choice(name, 0.5)}


def test_records_of_one_prompt_are_in_one_half():
    rows = [
        records.Record(id=f"prompt {i}, {k}", inputs=f"asked {i // 2}", targets=str(k))
        for k in range(3)
        for i in range(400)
    ]
    is_chosen = results.are_for_choice(rows, 0.5)
    halves = {}
    for row, chosen in zip(rows, is_chosen, strict=True):
        halves.setdefault(row.inputs, set()).add(chosen)
    assert {len(of_prompt) for of_prompt in halves.values()} == {1}
    number, others = results.num_prompts_for_choice(rows, 0.5)
    assert number + others == 200
    assert number == sum(True in of_prompt for of_prompt in halves.values())
    # Where all prompts differ, each goes by its own id.
    alone = rows[:400:2]
    assert results.are_for_choice(alone, 0.5) == [
        results.is_for_choice(row.id, 0.5) for row in alone
    ]
    # Conversations of the same texts, by other roles, are different prompts.
    turns = [
        records.Record(id=name, inputs="hi", messages=((name, "hi"),))
        for name in ("user", "system", "user again")
    ]
    turns[2] = dataclasses.replace(turns[2], messages=turns[0].messages)
    assert sum(results.num_prompts_for_choice(turns, 0.5)) == 2


def test_outputs_for_one_prompt_are_drawn_together():
    """Copies of outputs are no news: with each five times over, every interval stays."""
    original = outputs(0, number=80, unwanted=0.4)
    arms = {
        "baseline": outputs(1, number=80, keep=original, unwanted=0.1, change=0.5),
        "other": outputs(2, number=80, keep=original, unwanted=0.1, change=0.4),
    }

    def copied(rows):
        return [dataclasses.replace(row, id=f"{row.id} {k}") for k in range(5) for row in rows]

    once = results.intervals(original, arms, "baseline", num_resamples=300)
    often = results.intervals(
        copied(original),
        {name: copied(rows) for name, rows in arms.items()},
        "baseline",
        num_resamples=300,
    )
    for name, of_arm in once.items():
        assert often[name]["cut_interval"] == pytest.approx(of_arm["cut_interval"])
        assert often[name]["bleu_interval"] == pytest.approx(of_arm["bleu_interval"], rel=1e-4)
    assert often["other"]["bleu_p_value"] == pytest.approx(once["other"]["bleu_p_value"], abs=0.01)
    # The same outputs for prompts of their own are.
    apart = [dataclasses.replace(row, inputs=row.id) for row in copied(original)]
    current = copied(arms["other"])
    wide, narrow = (
        results.intervals(rows, {"arm": current}, "", num_resamples=300)["arm"]["cut_interval"]
        for rows in (copied(original), apart)
    )
    assert narrow[1] - narrow[0] < 0.7 * (wide[1] - wide[0])
    # All is gone: of 80 prompts, and not of 400 outputs.
    clean = [dataclasses.replace(row, negative_spans=()) for row in copied(original)]
    low, _ = results.intervals(copied(original), {"arm": clean}, "", num_resamples=20)["arm"][
        "cut_interval"
    ]
    assert low ** sum(bool(row.negative_spans) for row in original) == pytest.approx(0.025)


@pytest.mark.parametrize("num_resampled", [10_000_000, 90 * 7])
def test_what_is_said_to_prompts_that_all_differ_has_the_intervals_of_before(
    num_resampled, monkeypatch
):
    """scipy's and sacrebleu's own, of the outputs as they are, however many are in memory."""
    monkeypatch.setattr(results, "_MOST_RESAMPLED", num_resampled)
    original = outputs(0, number=90, unwanted=0.4)
    arms = {name: outputs(seed, number=90, unwanted=0.2) for seed, name in ((1, "a"), (2, "b"))}
    found = results.intervals(original, arms, "a", num_resamples=200)
    resampled, exchanged = (
        PairedTest(
            [(name, [row.targets for row in rows]) for name, rows in arms.items()],
            {"BLEU": BLEU(force=True)},
            [[row.targets for row in original]],
            test_type=kind,
            n_samples=200,
        )()[1]
        for kind in ("bs", "ar")
    )
    assert [found[name]["bleu_p_value"] for name in exchanged["System"]] == [
        of_name.p_value for of_name in exchanged["BLEU"]
    ]
    for name, of_name in zip(resampled["System"], resampled["BLEU"], strict=True):
        low, high = found[name]["bleu_interval"]
        assert (low, high) == (max(of_name.mean - of_name.ci, 0.0), of_name.mean + of_name.ci)
        before, after = (
            np.array([bool(row.negative_spans) for row in rows], float)
            for rows in (original, arms[name])
        )
        sampled = scipy.stats.bootstrap(
            (before, after),
            lambda one, other, axis: 1 - other.sum(axis=axis) / one.sum(axis=axis),
            paired=True,
            vectorized=True,
            n_resamples=200,
            method="percentile",
            rng=np.random.default_rng(0),
        ).confidence_interval
        assert found[name]["cut_interval"] == [sampled.low, sampled.high]


def test_a_p_value_is_the_share_of_exchanges_that_differ_as_much_in_either_direction():
    """All exchanges of what two arms said to eight prompts, against those that are drawn."""
    original = outputs(0, number=8, unwanted=0.4)
    one, other = (
        outputs(seed, number=8, keep=original, unwanted=0.4, change=share)
        for seed, share in ((1, 0.5), (2, 0.65))
    )

    def difference(swapped):
        texts = [
            [(b if swap else a).targets for a, b, swap in zip(first, second, swapped, strict=True)]
            for first, second in ((one, other), (other, one))
        ]
        reference = [[row.targets for row in original]]
        scores = [BLEU(force=True, effective_order=True).corpus_score(t, reference) for t in texts]
        return abs(scores[0].score - scores[1].score)

    observed = difference([False] * 8)
    share = np.mean(
        [
            difference(swapped) > observed - 1e-9
            for swapped in itertools.product([False, True], repeat=8)
        ]
    )
    assert 0.1 < share < 0.7  # where half of it would be seen
    found = results.intervals(original, {"one": one, "other": other}, "one", num_resamples=4000)
    assert found["other"]["bleu_p_value"] == pytest.approx(share, abs=0.04)


@pytest.mark.parametrize("number", [0, 1, 2, 4])
def test_arms_that_differ_at_few_prompts_may_do_so_by_chance(number):
    """One of them said better things there each time: 2 of 2^number exchanges differ as much."""
    original = outputs(0, number=50, unwanted=0)
    worse = [
        dataclasses.replace(row, targets="no") if i < number else row
        for i, row in enumerate(original)
    ]
    found = results.intervals(original, {"a": original, "b": worse}, "a", num_resamples=2000)
    expected = min(1.0, 2 / 2**number)
    assert found["b"]["bleu_p_value"] == pytest.approx(expected, abs=0.001)


def test_one_prompt_has_no_intervals():
    rows = outputs(0, number=1, unwanted=1)
    nothing = {"cut_interval": None, "bleu_interval": None, "bleu_p_value": None}
    assert results.intervals(rows, {"arm": rows}, "arm") == {"arm": nothing}
    again = [*rows, dataclasses.replace(rows[0], id="again")]
    assert results.intervals(again, {"arm": again}, "") == {"arm": nothing}


def test_intervals_against_the_normal_approximation():
    original = outputs(0, number=600, unwanted=0.4)
    arms = {
        "baseline": outputs(1, number=600, keep=original, unwanted=0.1, change=0.5),
        "better": outputs(2, number=600, keep=original, unwanted=0.1, change=0.2),
        "alike": outputs(3, number=600, keep=original, unwanted=0.1, change=0.5),
    }
    found = results.intervals(original, arms, "baseline", num_resamples=500)
    before = np.array([bool(r.negative_spans) for r in original])
    for name, rows in arms.items():
        after = np.array([bool(r.negative_spans) for r in rows])
        ratio = after.mean() / before.mean()
        low, high = found[name]["cut_interval"]
        assert low < 1 - ratio < high
        # The delta method for a ratio of two means of the same prompts.
        spread = np.std(after - ratio * before, ddof=1) / before.mean() / math.sqrt(len(rows))
        assert (high - low) / 2 == pytest.approx(1.96 * spread, rel=0.2)
        bleu = BLEU(force=True).corpus_score(
            [r.targets for r in rows], [[r.targets for r in original]]
        )
        low, high = found[name]["bleu_interval"]
        assert low < bleu.score < high
    assert found["baseline"]["bleu_p_value"] is None
    assert found["better"]["bleu_p_value"] < 0.01 < found["alike"]["bleu_p_value"]
    # Intervals are of an arm alone; only the test needs two.
    del arms["baseline"]
    for row in found.values():
        row["bleu_p_value"] = None
    for names in (["better", "alike"], ["better"]):
        alone = results.intervals(
            original, {name: arms[name] for name in names}, "baseline", num_resamples=500
        )
        assert alone == {name: found[name] for name in names}


@pytest.mark.parametrize("text", ["yes", "", "你是傻瓜", "คุณโง่มาก"])
def test_an_unchanged_model_has_100_in_every_script(text):
    rows = [
        records.Record(id=str(i), inputs=str(i), targets=text, negative_spans=()) for i in range(5)
    ]
    measured = results.measure(rows, rows)
    assert (measured["bleu"], measured["rouge_l"]) == pytest.approx((100, 100))
    found = results.intervals(rows, {"arm": rows}, "arm", num_resamples=20)
    assert found["arm"]["bleu_interval"] == pytest.approx([100, 100])


def test_an_interval_of_a_cut_is_of_the_number_beside_it_where_nothing_was_unwanted():
    original, current = outputs(0, unwanted=0, number=20), outputs(1, unwanted=0.5, number=20)
    assert results.measure(original, current)["cut"] == 0
    found = results.intervals(original, {"arm": current}, "baseline", num_resamples=20)
    assert found["arm"]["cut_interval"] == [0, 0]


def test_where_all_is_gone_the_interval_says_how_few_that_were():
    """If each of n goes with a chance of `low`, all do in one case of forty: low^n = 2.5 %."""
    original = outputs(0, number=60)
    clean = [dataclasses.replace(row, negative_spans=()) for row in original]
    num_unwanted = sum(bool(row.negative_spans) for row in original)
    low, high = results.intervals(original, {"arm": clean}, "", num_resamples=20)["arm"][
        "cut_interval"
    ]
    assert low**num_unwanted == pytest.approx(0.025)
    assert high == 1
    # Where nothing was unwanted nothing is gone.
    none = results.intervals(clean, {"arm": clean}, "", num_resamples=20)["arm"]
    assert none["cut_interval"] == [0, 0]


def test_no_interval_goes_beyond_its_scale():
    original = outputs(0, number=60)
    current = [*original[:-1], outputs(1, number=1)[0]]
    low, high = results.intervals(original, {"arm": current}, "")["arm"]["bleu_interval"]
    assert 90 < low < high <= 100


def test_a_cut_of_four_fifths_is_no_less():
    """However the quotients are rounded: 7 of 35 left, or 14 of 70, of any number of outputs."""
    for num_left in range(1, 60):
        for num_outputs in range(5 * num_left, 320):
            rates = 5 * num_left / num_outputs, num_left / num_outputs
            assert results.cut_of(*rates) >= 0.8
            assert results.cut_of(rates[0], 2 * rates[1]) >= 0.6
    rows = [
        {"objective": "A", "alpha": 1.0, "bleu": 90.0, "cut": results.cut_of(0.35, 0.07)},
        {"objective": "A", "alpha": 3.0, "bleu": 40.0, "cut": 1.0},
    ]
    rows = [{**row, "seed": seed} for row in rows for seed in range(3)]
    assert results.choose(rows, 0.8) == {"A": (1.0, None)}


def test_the_choice_of_a_weight():
    rows = [
        row("A", 1.0, 0.7, 90.0),
        row("A", 2.0, 0.8, 70.0),
        row("A", 2.0, 0.7, 72.0, seed=1),  # 0.75 on average: enough
        row("A", 4.0, 0.9, 60.0),
        row("B", 1.0, 0.2, 95.0),
        row("B", 9.0, 0.6, 50.0),  # none is enough: the one that cuts most
        row("decode mask", None, 0.99, 97.0),
    ]
    expected = {"A": (2.0, None), "B": (9.0, None), "decode mask": (None, None)}
    for order in (rows, rows[::-1]):
        assert results.choose(order, 0.75) == expected


def test_the_choice_of_a_weight_and_a_rate():
    rows = [
        row("A", 1.0, 0.9, 50.0),
        row("A", 1.0, 0.8, 70.0, rate=0.3),  # the best, if seeds are averaged within the rate alone
        row("A", 1.0, 0.8, 72.0, rate=0.3, seed=1),
        row("A", 2.0, 0.9, 60.0, rate=0.3),
        row("A", 1.0, 0.7, 99.0, rate=0.1),
    ]
    assert results.choose(rows, 0.75) == {"A": (1.0, 0.3)}


@pytest.mark.parametrize(
    ("unwanted", "alphas", "warns"),
    [(4, (1.0, 2.0), True), (5, (1.0, 2.0), False), (4, (1.0,), False)],
)
def test_a_choice_of_weights_by_chance_is_said_to_be_one(unwanted, alphas, warns):
    """By what the first decoder says; with one weight there is no choice."""
    rates = {"greedy": unwanted / 70, "sampled": 30 / 70}
    rows = [
        row("A", alpha, 0.0, 90.0, decoder=decoder, num_outputs=70, unwanted_rate_before=rate)
        for alpha in alphas
        for decoder, rate in rates.items()
    ]
    text = sweep.as_markdown({"chosen": [], "choice_rows": rows}, ["greedy", "sampled"])
    expected = (
        f"of the original's 70 greedy outputs that they are chosen on {unwanted} are unwanted"
    )
    assert (expected in text) == warns
    assert "by chance" not in sweep.as_markdown(
        {"chosen": [], "choice_rows": rows}, ["sampled", "greedy"]
    )


def test_the_frontier():
    rows = [row("A", 1, c, b) for c, b in ((0.5, 90), (0.6, 80), (0.6, 85), (0.55, 70), (0.9, 10))]
    assert results.pareto(rows) == [True, False, True, False, True]
    # Two that are the same do not beat each other.
    assert results.pareto([rows[0], dict(rows[0])]) == [True, True]


def test_seeds_are_averaged():
    rows = [
        row("A", 2.0, 0.7, 60.0, decoder="greedy", residual=0.1),
        row("A", 2.0, 0.8, 64.0, seed=1, decoder="greedy", residual=0.3),
        row("B", 2.0, 0.5, 50.0, decoder="greedy", residual=0.2),
    ]
    first, second = results.over_seeds(rows, ["objective"])
    assert (first["cut"], first["bleu"], first["residual"]) == pytest.approx((0.75, 62.0, 0.2))
    assert first["bleu_sd"] == pytest.approx(math.sqrt(8))
    assert (first["alpha"], first["num_seeds"]) == (2.0, 2)
    assert "seed" not in first
    assert (second["bleu"], second["bleu_sd"], second["num_seeds"]) == (50.0, None, 1)


def test_a_column_without_a_number_is_not_shown():
    rows = [
        row(name, 1.0, 0.9, 80.0, decoder="greedy", num_outputs=9, num_seeds=1, is_pareto=True)
        | {"unwanted_rate_before": 0.5, "repeated_word_rate_before": 0.0}
        | {"distinct_ratio_before": 1.0}
        for name in ("A", "B")
    ]
    without, with_one = (
        tables.as_markdown(found, ["greedy"], in_full=True).splitlines()[2:]
        for found in (rows, [rows[0], {**rows[1], "bleu_p_value": 0.25}])
    )
    assert without[0] == "| arm | alpha | seeds | cut | 95 % | BLEU | 95 % | frontier |"
    assert with_one[0] == "| arm | alpha | seeds | cut | 95 % | BLEU | 95 % | p | frontier |"
    assert with_one[2:] == [
        "| A | 1 | 1 | 90.0% | - | 80.0 | - | - | yes |",
        "| B | 1 | 1 | 90.0% | - | 80.0 | - | 0.250 | yes |",
    ]
    for lines in (without, with_one):
        assert {line.count("|") for line in lines} == {lines[0].count("|")}


def test_the_heading_has_of_the_original_what_the_table_has_of_the_arms():
    of_original = {"unwanted_rate_before": 0.5, "repeated_word_rate_before": 0.0}
    of_original |= {"distinct_ratio_before": 1.0}
    newer = {"repeated_phrase_rate_before": 0.25, "distinct_trigram_ratio_before": 0.375}
    headings = [
        tables.as_markdown(
            [row("A", 1.0, 0.9, 80.0, decoder="greedy", num_outputs=9, num_seeds=1) | found],
            ["greedy"],
            in_full=False,
        ).partition("\n")[0]
        for found in (of_original, of_original | newer)
    ]
    begins = "greedy: 9 prompts, of which the original answers 50.0% with something unwanted; "
    assert headings == [
        begins + "0.0% repeat a word, 100.0% are distinct",
        begins + "0.0% repeat a word, 25.0% a phrase, 100.0% are distinct; "
        "37.5% of the trigrams are distinct",
    ]


def test_the_published_tables_are_those_of_the_published_numbers():
    docs = pathlib.Path(__file__).parents[2] / "docs"
    found = json.loads((docs / "results.json").read_text("utf-8"))
    page, all_columns = (
        (docs / name).read_text("utf-8") for name in ("results.md", "results_tables.md")
    )
    known = []
    for of_sweep in found["sweeps"]:
        decoders = list(dict.fromkeys(row["decoder"] for row in of_sweep["chosen"]))
        full = tables.as_markdown(of_sweep["chosen"], decoders, in_full=True)
        assert f"## {of_sweep['name']}\n\n{full}" in all_columns, of_sweep["name"]
        short = [tables.as_markdown(of_sweep["chosen"], [name], in_full=False) for name in decoders]
        on_page = [text.strip() for text in short if text.strip() in page]
        assert on_page, of_sweep["name"]
        known += on_page
    headings = re.findall(
        r"^.*: \d+ prompts, of which the original answers .*$", page, re.MULTILINE
    )
    assert len(headings) == len(known)  # the page has no other tables
    wanted = {"task", "objective", "alpha", "seed", "steps", "unwanted_rate_before"}
    wanted |= {"unwanted_rate_after", "bleu", "rouge_l", "exact_match", "repeated_word_rate"}
    wanted |= {"unknown_token_rate", "distinct_ratio", "residual", "collateral"}
    for of_row in found["rows"]:
        assert wanted - set(of_row) <= {"residual", "collateral"}  # a mask has no model


def test_an_evaluation_in_a_file_is_what_evaluate_writes(tmp_path):
    path, whole = tmp_path / "evaluation.json", evaluation(6)
    path.write_text(json.dumps(whole))
    found = evaluations.read(path, has_certificate=True)
    assert found.comparison.bleu == whole["comparison"]["bleu"]
    # All of it, but for what is None where it may be left out.
    assert evaluations.parse(found.as_json()) == found
    assert found.as_json() == whole
    path.write_text(json.dumps({**whole, "certificate": None}))
    assert evaluations.read(path).certificate is None
    with pytest.raises(UsageError, match=r"evaluation\.json: expected a certificate, found none"):
        evaluations.read(path, has_certificate=True)
    for content, message in (
        ({**whole, "cut": "x"}, r"evaluation\.json: expected the JSON file .* at `\$\.cut`"),
        ([], "expected a JSON object, found list"),
        (float("nan"), "it holds NaN"),
    ):
        path.write_text(json.dumps(content))
        with pytest.raises(UsageError, match=message):
            evaluations.read(path)
