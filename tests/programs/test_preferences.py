"""Preference data for TRL: which outputs are paired, in which form, and what is left out."""

import json
import pathlib

import pytest

from tnt_jax import preferences
from tnt_jax.data import records
from tnt_jax.runtime import program

RUN = ["--gin_file=runs/preferences.gin"]


@pytest.fixture(autouse=True)
def working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(path, *rows):
    """Annotated records: id, prompt, output, and the unwanted word in it or None."""
    found = []
    for name, prompt, text, unwanted in rows:
        start = text.index(unwanted) if unwanted else 0
        fields = {
            "id": name,
            "targets": text,
            "negative_spans": [[start, start + len(unwanted)]] if unwanted else [],
            **({"inputs": prompt} if isinstance(prompt, str) else {"messages": prompt}),
        }
        found.append(json.dumps(fields) + "\n")
    pathlib.Path(path).write_text("".join(found))


CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "A pub?"}]
ORIGINAL = (
    ("a", "the pub", "a dirty pub", "dirty"),
    ("b", CHAT, "A loud pub. \u00fc", "loud"),
    ("c", "the inn", "an inn", None),
    ("d", "the bar", "a dirty bar", "dirty"),
    ("e", "the cafe", "a loud cafe", "loud"),
)
CHOSEN = (
    ("e", "the cafe", "a noisy loud cafe", "noisy"),
    ("b", CHAT, "A pub.", None),
    ("a", "the pub", "a small pub", None),
    ("c", "the inn", "an old inn", None),
    ("f", "the den", "a den", None),
)
REPLIES = [[{"role": "assistant", "content": text}] for text in ("A pub.", "A loud pub. \u00fc")]


def lines(path):
    return [json.loads(line) for line in pathlib.Path(path).read_text("utf-8").splitlines()]


def test_pairs_by_id_and_what_is_left_out(capsys):
    write("original.jsonl", *ORIGINAL)
    write("chosen.jsonl", *CHOSEN)
    files = ["ORIGINAL_RECORDS=original.jsonl", "CHOSEN_RECORDS=chosen.jsonl", "OUTPUT=pairs.jsonl"]
    with pytest.raises(SystemExit) as stopped:
        given = [*RUN, *(f"--gin.{one}" for one in files)]
        program.run("tnt_jax.preferences", "preferences", given)
    assert stopped.value.code == 0
    assert lines("pairs.jsonl") == [
        {"prompt": "the pub", "chosen": "a small pub", "rejected": "a dirty pub"},
        {"prompt": CHAT, "chosen": REPLIES[0], "rejected": REPLIES[1]},
    ]
    assert (
        "pairs.jsonl: 2 lines for DPO. Left out: 1 in which nothing is marked, 1 without an output "
        "in CHOSEN_RECORDS, 1 whose chosen output is marked, too, 1 of CHOSEN_RECORDS without one "
        "in ORIGINAL_RECORDS." in capsys.readouterr().out
    )


def test_a_text_as_the_message_of_a_user():
    write("original.jsonl", *ORIGINAL[:2])
    write("chosen.jsonl", *CHOSEN[1:3])
    preferences.preferences(
        output="pairs.jsonl",
        original_records="original.jsonl",
        chosen_records="chosen.jsonl",
        as_messages=True,
    )
    found = lines("pairs.jsonl")
    assert found[0]["prompt"] == [{"role": "user", "content": "the pub"}]
    assert found[0]["rejected"] == [{"role": "assistant", "content": "a dirty pub"}]
    assert found[1] == {"prompt": CHAT, "chosen": REPLIES[0], "rejected": REPLIES[1]}


def test_every_output_is_judged_once():
    write("original.jsonl", *ORIGINAL[:3])
    write("chosen.jsonl", *CHOSEN[1:3], ("g", "the inn", "an inn", None))
    found = preferences.preferences(
        output="judged.jsonl",
        original_records="original.jsonl",
        chosen_records="chosen.jsonl",
        output_format="kto",
    )
    assert found == {"written": 5, "said before to the same prompt": 1}
    assert lines("judged.jsonl") == [
        {"prompt": "the pub", "completion": "a dirty pub", "label": False},
        {"prompt": CHAT, "completion": REPLIES[1], "label": False},
        {"prompt": "the inn", "completion": "an inn", "label": True},
        {"prompt": CHAT, "completion": REPLIES[0], "label": True},
        {"prompt": "the pub", "completion": "a small pub", "label": True},
    ]


def test_an_output_that_is_marked_by_a_token_is_unwanted():
    """`localize` marks so what has no text, such as the end of an output that stops too early."""
    marks = {"said": [[1, [1]]], "another": [[1, [5]]], "raised": [[1, [1], -0.5]], "none": []}
    rows = [
        {
            **{"id": name, "inputs": name, "targets": "x", "target_ids": [7, 1]},
            **{"negative_spans": [], "negative_token_ids": ids},
        }
        for name, ids in marks.items()
    ]
    pathlib.Path("marked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write("chosen.jsonl", *((name, name, "y", None) for name in marks))
    files = {"original_records": "marked.jsonl", "output": "out.jsonl"}
    preferences.preferences(**files, chosen_records=None, output_format="kto")
    assert [line["label"] for line in lines("out.jsonl")] == [False, True, True, True]
    found = preferences.preferences(**files, chosen_records="chosen.jsonl")
    assert found == {"written": 1, "in which nothing is marked": 3}
    assert lines("out.jsonl") == [{"prompt": "said", "chosen": "y", "rejected": "x"}]


def test_what_is_written_can_be_read_as_records():
    """Our reader knows TRL's `prompt` and `completion`."""
    write("original.jsonl", *ORIGINAL[:2])
    preferences.preferences(
        output="judged.jsonl",
        original_records="original.jsonl",
        chosen_records=None,
        output_format="kto",
    )
    before, after = (records.read_records(f"{name}.jsonl") for name in ("original", "judged"))
    for one, other in zip(before, after, strict=True):
        assert (one.inputs, one.messages, one.targets) == (
            *(other.inputs, other.messages),
            other.targets,
        )


@pytest.mark.parametrize(
    ("chosen", "output_format", "message"),
    [
        (None, "dpo", "CHOSEN_RECORDS: expected annotated outputs for the same prompts"),
        (CHOSEN, "ppo", "OUTPUT_FORMAT: expected one of dpo, kto, found 'ppo'"),
        ([("a", "the tub", "a tub", None)], "dpo", "record 'a' has another prompt than in"),
        ([("a", "the pub", "a dirty pub", "dirty")], "dpo", "none. Left out of the 5 records in"),
        ([("a", "the pub", "a dirty pub", None)], "dpo", "1 whose two outputs are the same"),
    ],
)
def test_mistakes(chosen, output_format, message):
    write("original.jsonl", *ORIGINAL)
    if chosen is not None:
        write("chosen.jsonl", *chosen)
    with pytest.raises(preferences.UsageError, match=message):
        preferences.preferences(
            output="pairs.jsonl",
            original_records="original.jsonl",
            chosen_records=None if chosen is None else "chosen.jsonl",
            output_format=output_format,
        )
    assert not pathlib.Path("pairs.jsonl").exists()


def test_records_that_nobody_annotated_are_refused():
    write("original.jsonl", *ORIGINAL)
    pathlib.Path("chosen.jsonl").write_text(
        '{"id": "a", "inputs": "the pub", "targets": "a pub"}\n'
    )
    with pytest.raises(preferences.UsageError, match=r"^record 'a' of chosen"):
        preferences.preferences(
            output="pairs.jsonl", original_records="original.jsonl", chosen_records="chosen.jsonl"
        )
