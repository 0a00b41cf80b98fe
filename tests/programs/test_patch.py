"""`python -m tnt_jax.patch` from end to end, on the rooms of `helpers.rooms` in two orders."""

import contextlib
import dataclasses
import io
import itertools
import json
import math
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys

import gin
import pytest
from helpers import rooms, tiny_tokenizers
from helpers.chat_templates import TEMPLATES
from helpers.full_disk import full_disk

from tnt_jax import convert, patch
from tnt_jax.data import records, removed_everywhere
from tnt_jax.patching import asked, choices, search
from tnt_jax.runtime import preemption, program, stages

# Flags of a quick patch: what is given is not chosen.
QUICK = {"gin.OPTIMIZER": "@optax.adam", "gin.LEARNING_RATE": 3e-3, "cut": 0.75}
T5 = {"model": "model", "prompts": "prompts.txt", "words": "words.txt"}


@pytest.fixture(scope="module", autouse=True)
def working_directory(tmp_path_factory):
    """All paths are relative to it: a T5 of Hugging Face's that learned the rooms, and prompts."""
    folder = tmp_path_factory.mktemp("world")
    rooms.write_world(folder)
    with contextlib.chdir(folder), rooms.devices_seen():
        rows = rooms.make_hub_model("model")
        pathlib.Path("prompts.txt").write_text("".join(row.inputs + "\n" for row in rows))
        yield


def run(output, **flags):
    """Runs the program; returns its exit status."""
    given = {"output": output, **T5, **flags}
    arguments = [
        f"--{name}" if value is True else f"--{name}={value}"
        for name, value in given.items()
        if value is not None
    ]
    with pytest.raises(SystemExit) as stopped:
        program.run("tnt_jax.patch", "patch", asked.gin_arguments(arguments))
    gin.clear_config()
    return stopped.value.code


@dataclasses.dataclass
class Done:
    """A folder, what was printed, and `patch.json`."""

    folder: pathlib.Path
    printed: str

    @property
    def numbers(self):
        return json.loads((self.folder / "patch.json").read_text())

    def records(self, name):
        return records.read_records(self.folder / name)


def done(output, **flags):
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert run(output, **flags) == 0
    return Done(pathlib.Path(output), printed.getvalue())


@pytest.fixture(scope="module")
def patched(working_directory):
    before = contents("model")
    found = done("patched", **QUICK)
    assert contents("model") == before, "the input model was written to"
    return found


def contents(folder):
    files = [path for path in pathlib.Path(folder).rglob("*") if path.is_file()]
    return {str(path): path.read_bytes() for path in files}


def look_name(look):
    attempt = look["attempt"]
    of_round = "" if attempt["round"] == 1 else f"round {attempt['round']}, "
    return f"TNFF, {of_round}weight {attempt['weight']:g}, update {look['updates']}"


def taken(numbers):
    return {name: numbers[name] for name in ("weight", "round", "updates")}


def unwanted(rows):
    return sum(bool(rooms.UNWANTED.search(row.targets)) for row in rows)


# --- A T5 -----------------------------------------------------------------------------------------


def test_it_reaches_the_wish_on_prompts_that_it_has_not_seen(patched):
    before = patched.records("original/greedy.annotated.jsonl")
    after = patched.records("TNFF/greedy.annotated.jsonl")
    assert len(before) == len(after) == 24
    assert unwanted(before) > 8
    numbers = patched.numbers
    assert numbers["unwanted_before"] == unwanted(before) / 24
    assert numbers["unwanted_after"] == unwanted(after) / 24
    assert numbers["cut"] == pytest.approx(1 - unwanted(after) / unwanted(before))
    assert numbers["cut"] > 0.5
    low, high = numbers["cut_interval"]
    assert low <= numbers["cut"] <= high
    assert 0 < numbers["kl_elsewhere"] < 1
    assert numbers["is_wish_fulfilled_on_choice_prompts"] is True


def test_what_is_learned_chosen_by_and_reported_on_are_different_prompts(patched):
    parts = [
        {row.inputs for row in patched.records(f"prompts/{name}.jsonl")}
        for name in ("train", "choice", "report")
    ]
    assert [len(part) for part in parts] == [72, 24, 24]
    assert len(set().union(*parts)) == 120
    looked_at = {
        row.inputs
        for file in patched.folder.glob("looks/*/greedy.jsonl")
        for row in records.read_records(file)
    }
    assert looked_at == parts[1]


def test_of_the_looks_that_are_enough_it_takes_the_nearest_to_the_original(patched):
    looks = patched.numbers["looks"]
    before = unwanted(patched.records("choice/greedy.jsonl"))
    cuts = []
    for look in looks:
        name = f"looks/{look_name(look)}/greedy.jsonl"
        cuts.append(1 - unwanted(patched.records(name)) / before)
        assert look["cut"] == pytest.approx(cuts[-1])
    enough = 0.75 + (0.75 * 0.25 / before) ** 0.5
    fulfil = [look for look, cut in zip(looks, cuts, strict=True) if cut >= enough]
    nearest = max(fulfil, key=lambda look: look["bleu"])
    # Four looks brought nothing better, or there were no more.
    assert len(looks) - 1 - looks.index(nearest) == 4 or len(looks) == 20
    as_near = [look for look in fulfil if look["bleu"] >= nearest["bleu"] - 1]
    best = max(as_near, key=lambda look: (look["cut"], look["bleu"]))
    assert taken(patched.numbers) == {**best["attempt"], "updates": best["updates"]}


def test_it_prints_choices_looks_a_table_examples_and_how_to_load_it(patched):
    printed = patched.printed
    assert "learning rate: 0.003 - given (--gin.LEARNING_RATE)" in printed
    assert "outputs in an update: 16 - " in printed
    for choice in patched.numbers["choices"]:
        assert f"{choice['what']}: " in printed
        assert f"({choice['flag']})" in printed
    for look in patched.numbers["looks"]:
        assert re.search(rf"update {look['updates']}: .* a cut of {look['cut']:.1%}", printed)
    assert printed.count("           prompt    ") == 5
    assert printed.index("the worst one: ") < printed.index("change    mended")
    assert "from transformers import AutoModelForSeq2SeqLM" in printed
    assert f"--gin_file={patched.folder.absolute() / 'pipeline.gin'}" in printed
    # What the programs say that it calls is in a file.
    assert "\n[" not in printed
    assert "examples have marks" in (patched.folder / "log.txt").read_text()


def test_the_model_that_is_handed_back_says_what_the_report_says(patched):
    assert patched.numbers["model"] == str(patched.folder.absolute() / "TNFF" / "huggingface")
    by_name = {choice["what"]: choice["value"] for choice in patched.numbers["choices"]}
    settings = {
        "MAX_LENGTH": by_name["longest output"],
        "CHECKPOINT_PATH": patched.numbers["model"],
        "PROMPTS": "patched/prompts/report.jsonl",
        "OUTPUT": "again.jsonl",
        "VOCABULARY_PATH": "model",
        "EXTRA_IDS": None,
    }
    assert rooms.run("generate", settings) == 0
    said = {row.id: row.targets for row in records.read_records("again.jsonl")}
    of_report = patched.records("TNFF/greedy.annotated.jsonl")
    assert said == {row.id: row.targets for row in of_report}


def test_the_pipeline_that_it_prints_makes_the_same_bits(patched):
    line = patched.printed[patched.printed.index("The same by pipeline: ") :].splitlines()[0]
    words = shlex.split(line.removeprefix("The same by pipeline: "))
    assert words[:3] == ["python", "-m", "tnt_jax.pipeline"]
    assert rooms.run_program("pipeline", words[3:]) == 0
    rooms.assert_same_state("patched/TNFF/model", "patched-again/TNFF/model")
    for name in ("training_outputs/greedy.annotated.jsonl", "TNFF/greedy.tokens.jsonl"):
        assert (patched.folder / name).read_bytes() == pathlib.Path(
            "patched-again", name
        ).read_bytes()


def test_so_does_that_of_a_later_round(monkeypatch):
    """Whichever look is enough or the best one, here the last is taken: of the third round."""
    monkeypatch.setattr(choices, "threshold", lambda *of: math.inf)
    monkeypatch.setattr(search._Search, "_best", lambda self: self._looks[-1])
    found = done("rounds", **QUICK, **{"gin.TRAIN_STEPS": 2})
    assert taken(found.numbers) == {"weight": 90, "round": 3, "updates": 2}
    learned = found.records("looks/round 3/rounds.merged.jsonl")
    later = [row for row in learned if "(round " in row.id]
    assert len(learned) - len(later) == 72
    # What is said again is there once, and of what is new only what is unwanted.
    assert all(row.negative_spans for row in later)
    line = found.printed[found.printed.index("The same by pipeline: ") :].splitlines()[0]
    words = shlex.split(line.removeprefix("The same by pipeline: "))
    assert rooms.run_program("pipeline", words[3:]) == 0
    rooms.assert_same_state("rounds/TNFF/model", "rounds-again/TNFF/model")


def results_of(folder):
    """All that a patch came to, but for paths and times."""
    folder = pathlib.Path(folder)
    names = ["prompts/train.jsonl", "TNFF/greedy.annotated.jsonl", "TNFF/greedy.evaluation.json"]
    found = {name: (folder / name).read_text() for name in names}
    found["pipeline.gin"] = (
        (folder / "pipeline.gin").read_text().replace(str(folder.absolute()), "")
    )
    numbers = json.loads((folder / "patch.json").read_text())
    changing = ("seconds", "model", "loads", "report", "same_by_pipeline")
    found["patch.json"] = {name: x for name, x in numbers.items() if name not in changing}
    return found


def test_stopped_wherever_and_started_again_it_ends_in_the_same_files(patched, monkeypatch):
    """Behind stages whose note does not say yet that they are done."""
    number, stops = itertools.count(1), {2, 3, 6, 9, 14}
    noted = stages._noted

    @contextlib.contextmanager
    def stopped(*arguments):
        """A stage that has to be run."""
        with noted(*arguments):
            yield
            if next(number) in stops:
                raise preemption.Preempted("the machine is taken away")

    monkeypatch.setattr(stages, "_noted", stopped)
    statuses = []
    while not statuses or statuses[-1] == preemption.EXIT_STATUS:
        statuses.append(run("stopped", **QUICK))
    assert statuses == [preemption.EXIT_STATUS] * len(stops) + [0]
    assert results_of("stopped") == results_of("patched")
    rooms.assert_same_state("stopped/TNFF/model", "patched/TNFF/model")


def test_a_search_whose_time_was_over_is_not_begun_anew(monkeypatch):
    """One look, and no time for a second; the same command; and one with more time.

    In that time more outputs could be made, but the looks that are kept learned from these.
    """
    monkeypatch.setattr(choices, "threshold", lambda *of: math.inf)
    monkeypatch.setattr(choices, "PILOT", 40)
    monkeypatch.setattr(
        choices, "training_outputs", lambda *of, **settings: (40, "so many are enough")
    )
    flags = {**QUICK, "gin.TRAIN_STEPS": 2}  # one look at each of three attempts
    little = done("no_time", **flags, time="0.01s").numbers
    assert (len(little["looks"]), little["ended_because"]) == (1, search.TIME_IS_OVER)
    assert done("no_time", **flags, time="0.01s").numbers["looks"] == little["looks"]
    longer = done("no_time", **flags, time="1h")
    more = longer.numbers["looks"]
    assert [look["attempt"]["round"] for look in more] == [1, 2, 3]
    assert more[0] == little["looks"][0]
    text = "outputs to learn from: 40 - as many as the looks so far are of; 72 take another folder"
    assert text in longer.printed
    (of_outputs,) = (c for c in longer.numbers["choices"] if c["what"] == "outputs to learn from")
    assert (of_outputs["value"], of_outputs["flag"]) == (40, "--output")


def test_looks_of_a_command_that_was_stopped_count_where_the_time_is_short(monkeypatch):
    """They take no time: what is taken is the best of them, not the first."""
    looks = []

    def stop_after_the_fourth(self, of_attempt):
        looks.append(of_attempt[-1])
        if len(looks) == 4:
            raise preemption.Preempted("the machine is taken away")
        return False

    with monkeypatch.context() as first:
        first.setattr(search._Search, "_brings_no_more", stop_after_the_fourth)
        assert run("short", **QUICK) == preemption.EXIT_STATUS
    found = done("short", **QUICK, time="0.01s").numbers
    assert [look["updates"] for look in found["looks"]] == [look.updates for look in looks]
    assert {look.cut for look in looks} == {1.0}
    assert found["updates"] == max(looks, key=lambda look: look.bleu).updates > looks[0].updates


def test_a_round_that_there_was_no_time_for_is_begun_by_a_later_command(monkeypatch):
    """The model that it needs has made room for the one that was taken."""
    monkeypatch.setattr(choices, "threshold", lambda *of: math.inf)
    with monkeypatch.context() as first:
        first.setattr(search._Search, "_seconds_of_outputs", lambda self: math.inf)
        little = done("later", **QUICK).numbers
    assert little["ended_because"] == search.TIME_IS_OVER
    assert {look["attempt"]["round"] for look in little["looks"]} == {1}
    assert little["updates"] < little["looks"][-1]["updates"]
    more = done("later", **QUICK, time="1h").numbers["looks"]
    assert more[: len(little["looks"])] == little["looks"]
    assert {look["attempt"]["round"] for look in more} == {1, 2, 3}


def test_a_sigterm_in_a_leg_and_the_same_command(patched):
    flags = [f"--{name}={value}" for name, value in (T5 | QUICK).items()]
    command = [sys.executable, "-m", "tnt_jax.patch", "--output=terminated", *flags]
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        for line in process.stdout:
            if ", update 5: " in line:
                process.send_signal(signal.SIGTERM)
                break
        process.stdout.read()
    assert process.returncode == preemption.EXIT_STATUS
    assert run("terminated", **QUICK) == 0
    assert results_of("terminated") == results_of("patched")


def test_the_same_command_again_does_nothing_anew(patched):
    before = {path: path.stat().st_mtime_ns for path in patched.folder.rglob("*.jsonl")}
    again = done("patched", **QUICK)
    assert before == {path: path.stat().st_mtime_ns for path in patched.folder.rglob("*.jsonl")}
    assert again.numbers["cut"] == patched.numbers["cut"]


def test_a_dry_run_leaves_its_pilot_to_the_run():
    dry = done("dry", dry_run=True, **QUICK)
    assert re.search(
        r"An update takes \d+\.\d\d s, an output \d+\.\d\d s: \d+:\d\d if", dry.printed
    )
    assert re.search(r"Memory, at its peak so far: [1-9]?\d\.\d\d GiB", dry.printed)
    shown = [line for line in dry.printed.splitlines() if "[[" in line]
    assert len(shown) == 10
    assert all(re.search(r"\[\[(dirty|noisy)\]\]", line) for line in shown)
    left = {path.name for path in dry.folder.iterdir()}
    assert left == {"pilot", "prompts", "stages", "log.txt", "so_far.gin"} | {
        "patch_inputs.json",
        "operative_config.gin",
    }
    pilot = dry.folder / "pilot" / "greedy.jsonl"
    before = pilot.stat().st_mtime_ns
    done("dry", **ONE_LOOK)
    assert pilot.stat().st_mtime_ns == before
    assert not (dry.folder / "so_far.gin").exists()


# --- What is asked for ----------------------------------------------------------------------------

WEIGHT = {"gin.tnff/objectives.TntObjective.negative_weight": 3}
ONE_LOOK = {**QUICK, **WEIGHT, "gin.TRAIN_STEPS": 2}


def test_a_wish_that_is_not_fulfilled_is_said_plainly():
    found = done("little", **WEIGHT, **{"gin.TRAIN_STEPS": 2, "gin.settings.Schedule.seed": 7})
    assert found.numbers["is_wish_fulfilled_on_choice_prompts"] is False
    (look,) = found.numbers["looks"]
    assert (look["attempt"], look["updates"]) == ({"weight": 3, "round": 1}, 2)
    assert "Not fulfilled: no attempt up to weight 3 was enough." in found.printed
    assert "at_every_position=True" in found.printed
    assert "Not the whole wish: " in found.printed
    # What was given is what was done.
    run_json = json.loads((found.folder / "TNFF/model/run.json").read_text())
    assert (run_json["seed"], run_json["batch_size"]) == (7, 16)
    assert run_json["objective"]["negative_weight"] == 3


def test_both_ways_to_decode_are_learned_from_and_looked_at():
    rows = [*rooms.corpus(), *map(rooms.turned, rooms.corpus())]
    records.write_records("ours.jsonl", [dataclasses.replace(row, targets="") for row in rows])
    found = done("both", prompts="ours.jsonl", decoding="both", format="orbax", **ONE_LOOK)
    assert set(found.numbers["decoders"]) == {"greedy", "sampled"}
    (look,) = found.numbers["looks"]
    before = {
        decoder: unwanted(found.records(f"choice/{decoder}.jsonl"))
        for decoder in ("greedy", "sampled")
    }
    cuts = [1 - look["unwanted"][decoder] / before[decoder] for decoder in before]
    assert look["cut"] == pytest.approx(min(cuts))
    cut, worse = min((of["cut"], name) for name, of in found.numbers["decoders"].items())
    assert f": {cut:.1%} of the unwanted {worse} outputs are gone (95 %: " in found.printed
    assert (found.numbers["cut"], found.numbers["decoder"]) == (cut, worse)
    assert found.numbers["is_wish_fulfilled"] == (cut >= found.numbers["wish"])
    merged = found.records("training_outputs/greedy and sampled.merged.jsonl")
    assert {row.extra["name"] for row in merged} <= set(rooms.NAMES)
    assert len(merged) > 72
    assert found.numbers["model"].endswith("both/TNFF/model")


@pytest.mark.parametrize("kind", ["records", "spans"])
def test_outputs_that_people_marked_are_learned_from(kind):
    """What they marked is then looked for in new outputs."""
    rows = [*rooms.marked_corpus(), *map(rooms.turned, rooms.marked_corpus())]
    flags = {"words": None, kind: f"{kind}.jsonl"}
    records.write_records(f"{kind}.jsonl", rows[:118])
    everywhere = []
    if kind == "records":
        flags["prompts"] = None
        everywhere = [7]
        ids = removed_everywhere.Ids(everywhere, {})
        removed_everywhere.write_records("records.jsonl", rows[:118], ids)
    else:
        said = [dataclasses.replace(row, negative_spans=None) for row in rows]
        records.write_records("said.jsonl", said)
        flags["prompts"] = "said.jsonl"
    found = done(kind, **flags, **ONE_LOOK)
    assert (found.folder / "marked_texts.txt").read_text() == "dirty\nnoisy\n"
    learned = found.records("prompts/train.jsonl")
    by_id = {row.id: row for row in rows}
    for row in learned:
        assert row.negative_spans == by_id[row.id].negative_spans
        assert row.targets == by_id[row.id].targets
    # 118 of 120: a fifth for each of the others.
    assert len(learned) == 118 - 24 - 24
    assert ("2 of 120 outputs are left out: nobody marked them." in found.printed) == (
        kind == "spans"
    )
    assert "looked at for the 2 texts that are marked" in found.printed
    assert not (found.folder / "training_outputs").exists()
    run_json = json.loads((found.folder / "TNFF/model/run.json").read_text())
    assert run_json["objective"]["removed_everywhere"] == everywhere
    assert found.numbers["unwanted_before"] > 0.3


def test_prompts_from_standard_input_and_a_function(monkeypatch):
    pathlib.Path("states.py").write_text(
        "import re\n\ndef find(inputs, targets):\n"
        "    return [match.span() for match in re.finditer('dirty|noisy', targets)]\n"
    )
    monkeypatch.syspath_prepend(".")
    text = pathlib.Path("prompts.txt").read_bytes() + b"small acorn\r\n\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text)))
    flags = {"words": None, "prompts": "-", "function": "states:find"}
    found = done("from_stdin", **flags, **ONE_LOOK)
    assert "1 of 121 prompts repeat another one, and are left out." in found.printed
    assert "alternatives: name what would be just as wrong" in found.printed
    assert found.numbers["annotator"].startswith("PythonFunction(states:find")


# --- A chat model ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chat_model(working_directory):
    """A tiny Qwen 3 that learned the rooms, as a Hugging Face directory."""
    pathlib.Path("tiny_qwen.gin").write_text(
        'include "models/causal_lm_tiny.gin"\n\n'
        "from tnt_jax.models import causal_lm_config\n\nVOCAB_SIZE = 416\n"
        'causal_lm_config.CausalLMConfig.query_key_norm = "head"\n'
    )
    rows = records.read_records("corpus.jsonl")
    texts = [text for row in rows for text in (row.inputs, row.targets, "user assistant")]
    tiny_tokenizers.qwen("tokenizer", chat_template=TEMPLATES["qwen"], texts=texts)
    settings = {
        "VOCABULARY_PATH": "tokenizer",
        "EXTRA_IDS": None,
        "TASK_FEATURE_LENGTHS": {"inputs": 32, "targets": 16},
        "LEARNING_RATE": 1e-2,
        "RECORDS": "corpus.jsonl",
        "ANNOTATED": False,
        "INITIAL_CHECKPOINT_PATH": None,
        "TRAIN_STEPS": 250,
        "MODEL_DIR": "chat",
    }
    files, defaults = rooms.RUNS["train"]
    given = [f"--gin_file={file}" for file in ("tiny_qwen.gin", *files[1:])]
    given += ["--gin_file=objectives/fine_tune.gin"]
    given += [f"--gin.{name}={value}" for name, value in {**defaults, **settings}.items()]
    assert rooms.run_program("train", given) == 0
    convert.convert(input="chat", output="chat_model", output_format="huggingface")
    return "chat_model"


def test_a_chat_model_gets_adapters(chat_model):
    rate = {"gin.LEARNING_RATE": 1e-2, "cut": 0.75}
    found = done("chat_patched", model=chat_model, format="peft", **rate)
    assert found.numbers["cut"] > 0.5
    by_name = {choice["what"]: choice["value"] for choice in found.numbers["choices"]}
    assert by_name["what is trained"] == "adapters_off"
    assert by_name["layers with adapters"] == 1  # of 2 or 3
    assert found.numbers["model"].endswith("TNFF/peft")
    assert pathlib.Path(found.numbers["model"], "adapter_config.json").is_file()
    assert (found.folder / "TNFF/huggingface/config.json").is_file()
    assert "from peft import AutoPeftModelForCausalLM" in found.printed


# --- From Python ----------------------------------------------------------------------------------


def test_from_python_it_returns_what_it_shows(patched):
    found = patch.patch(
        model="model",
        prompts="prompts.txt",
        output="patched",
        unwanted=patch.Unwanted(words="words.txt"),
        cut=0.75,
        settings=["OPTIMIZER=@optax.adam", "LEARNING_RATE=0.003"],
    )
    gin.clear_config()
    assert found.model == patched.numbers["model"]
    assert found.numbers["cut"] == patched.numbers["cut"]
    assert found.table[0][0] == "unwanted outputs"
    assert len(found.examples) == 5
    assert pathlib.Path(found.report).is_file()


# --- Mistakes: one line, before anything is written -----------------------------------------------


def mistake(capsys, output="mistaken", **flags):
    capsys.readouterr()
    assert run(output, **flags) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    assert error.startswith("tnt_jax.patch: error: ")
    return error.removeprefix("tnt_jax.patch: error: ").rstrip()


def file(name, text):
    pathlib.Path(name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return name


LINES = "".join(f"prompt {number}\n" for number in range(100))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"model": "nowhere"}, "expected a checkpoint or a model directory, found nothing at"),
        ({"model": "words.txt"}, "expected a directory with a model, found a file at words.txt."),
        ({"prompts": "none.txt"}, "--prompts: expected a file of prompts (JSONL, a .csv or .tsv, "),
        ({"prompts": "model"}, "--prompts: expected a file of prompts (JSONL, a .csv or .tsv,"),
        ({"prompts": ("p.txt", "\n\n")}, "--prompts: expected prompts, one a line, found none in"),
        ({"prompts": ("p.txt", "one\ntwo\none\n")}, "--prompts: expected at least 60 different "),
        ({"prompts": ("p.jsonl", '{"text": "a"}\n')}, "p.jsonl:1: the field 'inputs' is missing;"),
        ({"prompts": ("p.jsonl", "a\n")}, "p.jsonl:1: not JSON: "),
        ({"prompts": ("p.jsonl", '{"inputs": " "}\n')}, "--prompts: expected a text in each pro"),
        ({"prompts": ("p.txt", b"caf\xe9\n")}, "--prompts: p.txt:1: not UTF-8 (unexpected end of"),
        ({"eval_prompts": ("p.txt", "a\nb\n")}, "--eval_prompts: expected at least 4 different pr"),
        ({"eval_prompts": "prompts.txt"}, "--eval_prompts: expected other prompts than --prompts"),
        ({"words": "none.txt"}, "--words: expected a file, found nothing at none.txt."),
        ({"words": ("w.txt", "# nothing\n")}, "Lexicon.path: "),
        ({"words": None}, "expected one of --words, --values, --spans, "),
        ({"entities": True}, "expected one of --words, --values, --spans, --entities, --classifi"),
        ({"words": None, "values": ("v.json", "[1]")}, "Gazetteer.path: "),
        ({"words": None, "function": "nowhere:f"}, "PythonFunction.function: no module 'nowhere'"),
        ({"records": "prompts.txt", "words": None}, "--prompts: expected a file of prompts, or --"),
        (
            {"prompts": None, "words": None, "records": ("r.jsonl", '{"inputs": "a"}\n')},
            "--records: expected outputs with negative_spans, found none in record 'r:1' (targets)",
        ),
        (
            {"words": None, "spans": ("s.jsonl", '{"id": "x", "negative_spans": []}\n')},
            "--spans: expected prompts with the outputs that people marked (targets), found 120 of",
        ),
        (
            {"words": None, "labels": "bad", "prompts": ("l.jsonl", '{"inputs": "a"}\n')},
            "--labels: expected outputs (targets) whose field 'bad' is true where they are bad and",
        ),
        ({"cut": 90}, "--cut: expected more than 0, at most 1, found 90: 0.9 is 90 %."),
        ({"cut": "most"}, "argument --cut: invalid float value: 'most' (see --help)"),
        (
            {"time": "30"},
            "argument --time: expected a time such as 90s, 30m or 2h, found '30' (see",
        ),
        ({"decoding": "beam"}, "argument --decoding: invalid choice: 'beam'"),
        ({"format": "onnx"}, "argument --format: invalid choice: 'onnx'"),
        ({"modle": "x"}, "unrecognized arguments: --modle=x (see --help)"),
        ({"gin.TRAIN_STPES": 3}, "--gin.TRAIN_STPES: no gin file reads %TRAIN_STPES; did you mean"),
        ({"gin.BATCH_SIZE": "many"}, "--gin.BATCH_SIZE: expected int, found 'many'."),
        ({"gin.OUTPUT_DIR": "x"}, "--gin.OUTPUT_DIR: --output sets this. Use that, and leave this"),
        ({"gin_file": "none.gin"}, "--gin_file: no gin file 'none.gin'"),
        *(
            ({"gin_file": ("own.gin", f"{name} = 'x'\n")}, f"{name}: --{flag} sets this, and a ")
            for name, flag in (
                ("OUTPUT_DIR", "output"),
                ("TRAIN_PROMPTS", "prompts"),
                ("EVAL_PROMPTS", "eval_prompts"),
                ("TRAINING_RECORDS", "records"),
            )
        ),
        (
            {
                "gin_file": (
                    "own.gin",
                    "ORIGINAL_CHECKPOINT_PATH = 'tiny'\nVOCABULARY_PATH = 'model'\n",
                )
            },
            "ORIGINAL_CHECKPOINT_PATH: --model sets this, and a --gin_file or a --gin.NAME=VALUE ",
        ),
        (
            {"gin.experiment.Experiment.output_dir": "x"},
            "OUTPUT_DIR: --output sets this, and a --gin_file or a --gin.NAME=VALUE has set it to",
        ),
        ({"gin.ARMS": "[]"}, "ARMS: expected one arm to train, found none."),
        ({"output": "gs://bucket/out"}, "--output: expected a local folder, found "),
        (
            {"format": "peft", "gin.ORIGINAL": "cached"},
            "--format=peft: expected ORIGINAL='adapters_off', found 'cached'. Leave one out.",
        ),
        ({"gin.NUM_ROUNDS": 0}, "NUM_ROUNDS: expected none, or 1, found 0: patch adds rounds"),
        ({"gin.NUM_ROUNDS": 2}, "NUM_ROUNDS: expected none, or 1, found 2: patch adds rounds"),
        ({"output": "model/out"}, "--output: expected a folder outside the model's, found "),
    ],
)
def test_a_mistake_is_one_line(capsys, flags, message):
    flags = {
        name: file(*value) if isinstance(value, tuple) else value for name, value in flags.items()
    }
    with contextlib.redirect_stdout(io.StringIO()):
        assert mistake(capsys, **flags).startswith(message)
    assert not pathlib.Path("mistaken").exists()


def test_a_model_without_a_model_or_without_an_output(capsys):
    for arguments in (["--prompts=prompts.txt"], ["--gin.X"]):
        with pytest.raises(SystemExit) as stopped:
            asked.gin_arguments(arguments)
        assert stopped.value.code == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_a_list_that_the_model_never_says_ends_with_that(capsys):
    words = file("zebra.txt", "zebra\n")
    found = mistake(capsys, "never", words=words)
    assert found.startswith("the model never says it: none of 72 outputs has anything unwanted")
    assert "/never/pilot" in found


def test_what_is_too_rare_ends_with_what_would_do(capsys):
    words = file("rare.txt", "acorn\n")
    found = mistake(capsys, "rare", words=words)
    assert re.match(r"too rare: \d+ of (64|72) outputs have something unwanted", found)
    # Wrong marks may be the reason: a dry run shows them.
    assert run("rare", words=words, dry_run=True) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("tnt_jax.patch: error: too rare: ")
    assert "[[acorn]]" in shown.out


@pytest.mark.usefixtures("reads_left_alone")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_full_disk_ends_with_that_and_the_same_command_goes_on(patched, capsys):
    """What Orbax's other threads were about to write is thrown away with them."""
    with full_disk(30_000):  # prompts and outputs are smaller, a checkpoint is not
        found = mistake(capsys, "full_disk", **QUICK)
    assert found.startswith("cannot write: File too large. Make room ")
    assert [*pathlib.Path("full_disk").glob("looks/*")] == []
    assert run("full_disk", **QUICK) == 0
    assert results_of("full_disk") == results_of("patched")


def test_the_folder_of_another_patch_is_refused(patched, capsys):
    before = contents("patched")
    shutil.copytree("model", "other_model", dirs_exist_ok=True)
    other = file("other_words.txt", "dirty\n")
    for flags, what in (
        ({"words": other}, r"another list of what is unwanted: --words \("),
        ({"model": "other_model"}, "another model: "),
        ({"prompts": file("less.txt", LINES)}, "other prompts: "),
    ):
        found = mistake(capsys, "patched", **flags)
        assert re.match(rf"--output: \S+/patched holds a patch with {what}", found), found
    assert contents("patched") == before
    assert "found other files in " in mistake(capsys, ".")
    pathlib.Path("full").mkdir(exist_ok=True)
    file("full/notes.txt", "mine")
    assert "found other files in " in mistake(capsys, "full")
    # What a command leaves that is killed before it has noted anything is no other file.
    pathlib.Path("killed").mkdir(exist_ok=True)
    for name in (".held", "log.txt"):
        file(f"killed/{name}", "")
    assert asked.check_folder(pathlib.Path("killed"), {"model": "m"}) == {"model": "m"}


def test_the_same_files_under_other_paths_are_the_same_patch(patched):
    again = done(
        str(patched.folder.absolute()),
        **{name: str(pathlib.Path(path).absolute()) for name, path in T5.items()},
        **QUICK,
    )
    assert again.numbers["cut"] == patched.numbers["cut"]


def test_a_finished_patch_makes_room_for_one_with_another_wish(patched, monkeypatch, capsys):
    """Stopped meanwhile it is none: no model and no numbers of the wish before are left."""
    shutil.copytree("patched", "other_wish")

    def stop(*arguments):
        raise preemption.Preempted("the machine is taken away")

    with monkeypatch.context() as stopped:
        stopped.setattr(search, "search", stop)
        assert run("other_wish", **QUICK | {"cut": 0.8}) == preemption.EXIT_STATUS
    assert "The patch that is finished in " in capsys.readouterr().out
    gone = ["patch.json", "report.html", "TNFF/huggingface"]
    assert all(pathlib.Path("patched", name).exists() for name in gone)
    assert not any(pathlib.Path("other_wish", name).exists() for name in gone)
    numbers = done("other_wish", **QUICK | {"cut": 0.8}).numbers
    assert numbers["wish"] == 0.8
    assert all(pathlib.Path("other_wish", name).exists() for name in gone)


def test_a_list_that_has_changed_is_refused(capsys):
    words = file("mine.txt", "zebra\n")
    mistake(capsys, "changed", words=words)
    file("mine.txt", "zebra\nlion\n")
    assert "holds a patch with another list" in mistake(capsys, "changed", words=words)


def test_help_fits_a_screen(capsys):
    with pytest.raises(SystemExit) as stopped:
        asked.gin_arguments(["--help"], patch.__doc__)
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert len(text.splitlines()) <= 44
    assert "python -m tnt_jax.patch --model=google/flan-t5-small" in text
