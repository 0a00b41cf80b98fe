"""The report as a file: what is in it, what is refused. test_report_browser.py opens it."""

import base64
import contextlib
import hashlib
import html.parser
import json
import pathlib
import re

import gin
import pytest
from helpers import outputs

from tnt_jax import report
from tnt_jax.checkpoints import model_card
from tnt_jax.data import records
from tnt_jax.evaluation import changes, results
from tnt_jax.runtime import program
from tnt_jax.runtime.errors import UsageError

NUMBER = 60


@pytest.fixture(autouse=True)
def working_directory(tmp_path):
    with contextlib.chdir(tmp_path):
        outputs.write_pair(pathlib.Path(), NUMBER)
        yield


PAIR = {"original_records": "original.jsonl", "current_records": "patched.jsonl"}


def written(**settings):
    report.report(output="report.html", **settings)
    return Page(pathlib.Path("report.html").read_text("utf-8"))


class Page(html.parser.HTMLParser):
    """The page as a browser sees it: its elements, scripts and JSON."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.scripts, self.islands, self.texts = [], [], {}, []
        self._open = None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._open = dict(attrs) if tag == "script" else None

    def handle_data(self, data):
        if self._open is None:
            self.texts.append(data)
        elif self._open.get("type") == "application/json":
            self.islands[self._open["id"]] = json.loads(data)
        else:
            self.scripts.append(data)

    def handle_endtag(self, tag):
        self._open = None


def test_a_file_of_no_tokens_is_one():
    """`evaluate` writes one where num_token_records is 0."""
    pathlib.Path("none.jsonl").touch()
    page = written(**PAIR, tokens="none.jsonl")
    assert "outputs-0" in page.islands and not page.islands.get("tokens-0")


def test_texts_of_models_stay_texts():
    page = written(**PAIR, tokens="tokens.jsonl", title="<i>title</i>")
    assert {tag for tag, _ in page.tags}.isdisjoint({"b", "i", "img", "textarea"})
    assert sum(tag == "script" for tag, _ in page.tags) == 5
    assert set(page.islands) == {"data", "outputs-0", "tokens-0"}
    (hostile,) = (row for row in page.islands["outputs-0"] if row["id"] == outputs.HOSTILE.id)
    assert hostile["input"] == outputs.HOSTILE.inputs
    assert "".join(text for text, _ in hostile["original"]) == outputs.HOSTILE.targets
    assert outputs.HOSTILE.annotator in "".join(page.texts)
    assert "<i>title</i>" in page.texts


def test_nothing_is_loaded_and_no_other_script_may_run():
    page = written(**PAIR)
    for _, attributes in page.tags:
        assert not {"src", "srcset", "onclick", "onload", "onerror"} & set(attributes)
        assert attributes.get("href", "#").startswith("#")
    (policy,) = (a["content"] for _, a in page.tags if "http-equiv" in a)
    assert policy.startswith("default-src 'none';")
    allowed = re.findall(r"'sha256-([^']+)'", policy)
    digests = [hashlib.sha256(script.encode()).digest() for script in page.scripts]
    assert allowed == [base64.b64encode(digest).decode() for digest in digests]


def test_every_output_is_there_the_worst_first():
    page = written(**PAIR)
    rows = page.islands["outputs-0"]
    original, current = records.read_pairs("original.jsonl", "patched.jsonl")
    assert {row["id"] for row in rows} == {row.id for row in original}
    order = list(changes.KINDS)
    ranks = [order.index(row["kind"]) for row in rows]
    assert ranks == sorted(ranks)
    kinds = page.islands["data"]["comparisons"][0]["kinds"]
    assert sum(kinds.values()) == NUMBER
    newly = sum(
        bool(after.negative_spans) and not before.negative_spans
        for before, after in zip(original, current, strict=True)
    )
    assert kinds["newly unwanted"] == newly == 1


def test_a_page_that_cannot_show_all_has_the_worst_and_a_sample_and_a_file_has_all():
    ids = [row["id"] for row in written(**PAIR).islands["outputs-0"]]
    assert not pathlib.Path("report.html.outputs.jsonl").exists()
    found = [row["id"] for row in written(**PAIR, num_records=16).islands["outputs-0"]]
    assert found[:13] == ids[:13]
    drawn = [ids.index(name) for name in found[13:]]
    assert len(drawn) == 3 and drawn == sorted({*drawn}) and drawn[0] >= 13 and drawn[-1] > 16
    assert found == [row["id"] for row in written(**PAIR, num_records=16).islands["outputs-0"]]
    content = pathlib.Path("report.html.outputs.jsonl").read_bytes().decode()
    lines = [json.loads(line) for line in content.split("\n")[:-1]]
    for line, one, other in zip(
        lines, *records.read_pairs("original.jsonl", "patched.jsonl"), strict=True
    ):
        assert (line["id"], line["input"]) == (one.id, one.inputs)
        assert (line["original"], line["current"]) == (one.targets, other.targets)
        assert [tuple(span) for span in line["current_spans"]] == list(other.negative_spans)


def test_numbers_without_an_evaluation_are_those_of_the_texts():
    page = written(**PAIR)
    (row,) = page.islands["data"]["rows"]
    # Numbers 10 to 50 of 59 are unwanted; the patched model mends them all, and spoils the last.
    assert row["unwanted_rate_before"] == pytest.approx(5 / NUMBER)
    assert row["unwanted_rate_after"] == pytest.approx(1 / NUMBER)
    assert row["cut"] == pytest.approx(0.8)
    assert "5 of 60 outputs were unwanted, 1 are now" in "".join(page.texts)


def test_files_are_named_with_their_digests_and_settings():
    pathlib.Path("patched.jsonl.gin").write_text("SEED = 3  # <b>\n")
    page = written(**PAIR)
    told = "".join(page.texts)
    for name in ("original.jsonl", "patched.jsonl"):
        assert hashlib.sha256(pathlib.Path(name).read_bytes()).hexdigest() in told
    assert "SEED = 3  # <b>\n" in page.texts


def test_a_sweep_alone():
    pathlib.Path("results.json").write_text(json.dumps(outputs.results()))
    data = written(results="results.json").islands["data"]
    assert len(data["rows"]) == 96
    assert len(data["groups"]) == 48
    assert data["comparisons"] == []


def row(**fields):
    known = {"task": "t", "objective": "o", "decoder": "d", "unwanted_rate_before": 0.2}
    found = {"rows": [{**known, "unwanted_rate_after": 0.1, "bleu": 70.0, **fields}]}
    return results.from_results(found, "results.json")[0]


def test_a_tag_tells_the_best_from_others():
    """Where every arm is a best trade-off, the tag would say nothing."""
    more, less = {"unwanted_rate_after": 0.05, "bleu": 60.0}, {"unwanted_rate_after": 0.1}
    for bleu, tags in ((70.0, 0), (50.0, 1)):
        rows = [
            {"task": "t", "decoder": "d", "unwanted_rate_before": 0.2, "objective": name, **numbers}
            for name, numbers in {"TNFF": more, "UL+LL": {**less, "bleu": bleu}}.items()
        ]
        pathlib.Path("two.json").write_text(json.dumps({"rows": rows}))
        found = "".join(written(results="two.json").texts)
        assert found.count("best trade-off") == tags + 1  # and the note below the table


def test_what_the_original_repeats_stands_in_its_line():
    pathlib.Path("results.json").write_text(json.dumps({"rows": [{
        "task": "t", "decoder": "d", "objective": "TNFF", "unwanted_rate_before": 0.2,
        "unwanted_rate_after": 0.1, "bleu": 70.0,
        "repeated_phrase_rate": 0.123, "repeated_phrase_rate_before": 0.456,
    }]}))  # fmt: skip
    texts = written(results="results.json").texts
    assert texts.index("45.6%") < texts.index("12.3%")


def test_seeds_and_steps_are_whole_numbers():
    rows = [{**one, "seed": 20240601, "steps": 1234567} for one in outputs.results()["rows"][:1]]
    pathlib.Path("large.json").write_text(json.dumps({"rows": rows}))
    page = written(results="large.json")
    (shown,) = (one["shown"] for one in page.islands["data"]["rows"])
    assert (shown["seed"], shown["steps"]) == ("20240601", "1234567")
    assert written(**PAIR, num_records=0).islands["outputs-0"] == []


def test_means_over_seeds():
    rows = [
        row(alpha=1.0, seed=0, bleu=70.0, unwanted_rate_after=0.1, residual=0.5),
        row(alpha=2.0, seed=0, bleu=50.0, unwanted_rate_after=0.02),
        row(alpha=1.0, seed=1, bleu=74.0, unwanted_rate_after=0.06),
    ]
    one, other = results.over_seeds(rows, results.SETTINGS)
    assert (one["num_seeds"], one["bleu"], one["residual"]) == (2, 72.0, 0.5)
    assert one["cut"] == pytest.approx(0.6)
    assert (other["num_seeds"], other["residual"]) == (1, None)


def test_the_front():
    """(cut, BLEU): (0.5, 80) and (0.9, 60) are on it, (0.5, 70) and (0.8, 60) are not."""
    rows = [
        row(objective=str(i), unwanted_rate_after=0.2 * (1 - cut), bleu=bleu)
        for i, (cut, bleu) in enumerate([(0.5, 80.0), (0.5, 70.0), (0.9, 60.0), (0.8, 60.0)])
    ]
    rows.append(row(decoder="other", bleu=1.0))
    # Better than all, but no model: a sweep's own tables leave it out of the frontier, too.
    rows.append(row(objective="decode mask", unwanted_rate_after=0.0, bleu=99.0))
    found = results.over_seeds(rows, results.SETTINGS)
    assert [row.get("is_pareto") for row in found] == [True, False, True, False, True, None]
    pathlib.Path("results.json").write_text(json.dumps({"rows": rows}))
    # Who is alone with a decoder has no better trade-off than anybody.
    assert written(results="results.json").texts.count("best trade-off") == 2


EVALUATION = outputs.evaluation(NUMBER)


def test_an_evaluation():
    pathlib.Path("evaluation.json").write_text(json.dumps(EVALUATION))
    page = written(**PAIR, evaluation="evaluation.json")
    (found,) = page.islands["data"]["rows"]
    assert (found["bleu"], found["residual"], found["collateral"]) == (81.5, 0.25, None)
    told = "".join(page.texts)
    assert "1.500" in told  # the original's residual
    assert "length drift: not seen. mean length 14.0 before, 14.0 now" in told


def test_graded_marks_have_no_residual_of_the_original():
    """A part of what is marked may stay, so the smallest cost is no residual."""
    certificate = {**EVALUATION["certificate"], "num_graded": 9, "num_removed_everywhere": 4}
    evaluation = {**EVALUATION, "certificate": certificate}
    pathlib.Path("evaluation.json").write_text(json.dumps(evaluation))
    page = written(**PAIR, evaluation="evaluation.json")
    (row,) = page.islands["data"]["rows"]
    assert (row["smallest_cost"], row["num_graded"]) == (1.5, 9)
    told = "".join(page.texts)
    assert "1.500" not in told
    assert "9 of the ids to remove have a strength below 1." in told
    assert "4 ids are removed at every position" in told


def test_a_pipeline():
    root = pathlib.Path("run")
    outputs.write_pair(root, NUMBER)
    for arm in ("TNRF, twice", "UL+LL"):
        for folder, name in (("original", "original"), (arm, "patched")):
            (root / folder).mkdir(exist_ok=True)
            content = (root / f"{name}.jsonl").read_text()
            (root / folder / "greedy.annotated.jsonl").write_text(content)
    (root / "tokens.jsonl").rename(root / "TNRF, twice" / "greedy.tokens.jsonl")
    evaluations = {arm: {"greedy": EVALUATION} for arm in ("TNRF, twice", "UL+LL")}
    training = {"TNRF, twice": {"alpha": 2.0, "seed": 3, "steps": 720}}
    summary = {"evaluations": evaluations, "num_rounds": 3, "training": training}
    (root / "summary.json").write_text(json.dumps(summary))
    (root / "operative_config.gin").write_text("OUTPUT_DIR = 'run'\n")
    page = written(pipeline_dir="run")
    data = page.islands["data"]
    assert [(r["objective"], r["alpha"], r["steps"], r["seed"]) for r in data["rows"]] == [
        ("TNRF, twice", 2.0, 720, 3),
        ("UL+LL", None, None, None),
    ]
    assert {c["decoder"] for c in data["comparisons"]} == {"greedy"}
    assert (len(page.islands["tokens-0"]), len(page.islands["tokens-1"])) == (30, 0)
    assert "OUTPUT_DIR = 'run'\n" in page.texts


@pytest.mark.parametrize("value", ["x", [], True, 10**400])
def test_how_an_arm_was_trained_is_numbers(value):
    summary = {"evaluations": {"TNRF": {}}, "training": {"TNRF": {"alpha": value}}}
    pathlib.Path("damaged").mkdir()
    pathlib.Path("damaged/summary.json").write_text(json.dumps(summary))
    message = r"^damaged/summary\.json: training: TNRF: alpha: expected a number or null, found "
    with pytest.raises(UsageError, match=message):
        report.report(output="report.html", pipeline_dir="damaged")


def test_the_program(capsys):
    settings = {"OUTPUT": "report.html", "ORIGINAL_RECORDS": "original.jsonl"}
    settings |= {"CURRENT_RECORDS": "patched.jsonl"}
    arguments = [f"--gin.{name}={value}" for name, value in settings.items()]
    with pytest.raises(SystemExit) as stopped:
        program.run("tnt_jax.report", "report", ["--gin_file=runs/report.gin", *arguments])
    gin.clear_config()
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert f"report.html: 1 results and {NUMBER} outputs" in printed
    assert pathlib.Path("report.html").resolve().as_uri() in printed


def test_numbers_of_a_certificate_that_were_not_finite_are_left_out():
    """They are null in the file."""
    certificate = dict.fromkeys(EVALUATION["certificate"])
    evaluation = {**EVALUATION, "annotator": "a list", "certificate": certificate}
    pathlib.Path("null.json").write_text(json.dumps(evaluation))
    page = written(**PAIR, evaluation="null.json")
    (row,) = page.islands["data"]["rows"]
    assert (row["bleu"], row["residual"], row["collateral_elsewhere"]) == (81.5, None, None)
    told = model_card.numbers(evaluation)
    assert told == model_card.numbers({**evaluation, "certificate": None})
    known = model_card.numbers({**evaluation, "certificate": EVALUATION["certificate"]})
    assert [line for line in known if line not in told] == [
        "| KL to the original at unmarked tokens, nats | | 0.1250 |"
    ]


def test_mistakes():
    pathlib.Path("evaluation.json").write_text(json.dumps(EVALUATION))
    lines = pathlib.Path("patched.jsonl").read_text().split("\n")[:-1]
    pathlib.Path("fewer.jsonl").write_text("\n".join(lines[:-1]))
    for name, content in (
        ("no_rows.json", "{}"),
        ("bad_row.json", '{"rows": [{"task": "t"}]}'),
        ("bad_type.json", json.dumps({"rows": [{**outputs.results()["rows"][0], "bleu": "80"}]})),
        ("broken.json", "{"),
        ("not_finite.json", '{"rows": [NaN]}'),
        ("other.json", json.dumps({**EVALUATION, "original": {}})),
        ("tokens_without_kl.jsonl", '{"id": "room-1", "pieces": ["a"]}\n'),
        ("tokens_of_others.jsonl", json.dumps(outputs.tokens_of(outputs.pair(999)[0]))),
    ):
        pathlib.Path(name).write_text(content)
    for settings, message in (
        ({}, "expected something to show, found nothing"),
        ({"original_records": "original.jsonl"}, "together, found only the first"),
        ({"current_records": "original.jsonl"}, "together, found only the second"),
        ({"pipeline_dir": "run", "tokens": "tokens.jsonl"}, "TOKENS: expected ORIGINAL_RECORDS"),
        ({"pipeline_dir": "nowhere"}, "found no nowhere/summary.json"),
        ({"results": "nowhere.json"}, "nowhere.json: No such file"),
        ({"results": "broken.json"}, "expected a JSON file, found broken.json"),
        ({"results": "not_finite.json"}, "found not_finite.json: it holds NaN, which JSON does"),
        ({"results": "no_rows.json"}, 'expected {"rows": [...]}'),
        ({"results": "bad_row.json"}, "row 1: expected objective, decoder, unwanted_rate_before"),
        ({"results": "bad_type.json"}, "row 1: bleu: expected a number, found '80'"),
        ({**PAIR, "current_records": "fewer.jsonl"}, "expected outputs for the same records"),
        ({**PAIR, "evaluation": "other.json"}, "with original, current, comparison and cut"),
        ({**PAIR, "tokens": "tokens_without_kl.jsonl"}, "tokens_without_kl.jsonl:1: expected"),
        ({**PAIR, "tokens": "tokens_of_others.jsonl"}, "the id 'room-999' is in no record"),
        ({**PAIR, "num_records": -5}, "NUM_RECORDS: expected the most outputs to show, found -5"),
    ):
        with pytest.raises(UsageError, match=re.escape(message)):
            report.report(output="report.html", **settings)
    outputs.write_pair(pathlib.Path("larger"), NUMBER + 1)
    with pytest.raises(UsageError, match=r"is of 60 outputs, but larger/original\.jsonl has 61"):
        report.report(
            output="report.html",
            original_records="larger/original.jsonl",
            current_records="larger/patched.jsonl",
            evaluation="evaluation.json",
        )
