"""Records of conversations: our own form, those of TRL, and what is refused."""

import re

import numpy as np
import pytest

from tnt_jax.data import rounds
from tnt_jax.data.marks import MarkedTarget
from tnt_jax.data.records import Record, read_records
from tnt_jax.runtime.errors import UsageError

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "Which hotel?"}
REPLY = {"role": "assistant", "content": "The Ritz."}
PAIRS = (("system", "Be brief."), ("user", "Which hotel?"))


def record(**fields):
    return Record.from_json(fields, "file.jsonl:7")


def test_messages_are_the_prompt_and_their_texts_the_inputs():
    found = record(messages=[SYSTEM, USER], targets="The Ritz.", negative_spans=[[4, 8]])
    assert found == Record(
        id="file:7",
        inputs="Be brief.\n\nWhich hotel?",
        messages=PAIRS,
        targets="The Ritz.",
        negative_spans=((4, 8),),
    )
    assert Record.from_json(found.to_json(), "") == found


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": [SYSTEM, USER, REPLY]},
        {"prompt": [SYSTEM, USER], "completion": [REPLY]},
        {"prompt": [SYSTEM, USER], "completion": "The Ritz."},
    ],
)
def test_what_trl_writes(fields):
    found = record(**fields, label=True, negative_spans=[[4, 8]])
    assert (found.messages, found.targets) == (PAIRS, "The Ritz.")
    assert found.extra == {"label": True}


def test_a_pair_of_texts_and_a_prompt_alone():
    found = record(prompt="Which hotel?", completion="The Ritz.")
    assert (found.inputs, found.targets, found.messages) == ("Which hotel?", "The Ritz.", ())
    assert record(prompt=[USER]).messages == PAIRS[1:]
    # Where there are inputs, a field of that name is not ours.
    assert record(inputs="a", prompt=3).extra == {"prompt": 3}


def test_a_text_named_prompt_beside_messages_is_no_conversation():
    """UltraChat has the first turn there: what was said later is in the inputs, too."""
    later = [SYSTEM, USER, REPLY, {"role": "user", "content": "In Paris?"}]
    found = record(messages=[*later, {"role": "assistant", "content": "Yes."}], prompt="Be brief.")
    assert found.inputs == "Be brief.\n\nWhich hotel?\n\nThe Ritz.\n\nIn Paris?"
    assert (len(found.messages), found.targets) == (4, "Yes.")
    assert found.extra == {"prompt": "Be brief."}


def test_inputs_beside_messages_stay():
    found = record(inputs="hotels", messages=[USER])
    assert (found.inputs, found.messages) == ("hotels", PAIRS[1:])
    assert found.prompt != record(inputs="hotels").prompt


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"messages": "Hi"}, 'messages: expected a list of messages, found "Hi": each has a role'),
        ({"messages": []}, "messages: expected a list of messages, found []"),
        ({"messages": [SYSTEM, "Hi"]}, "messages[1]: expected a role (system, developer, user"),
        ({"messages": [{"role": "bot", "content": ""}]}, "messages[0]: expected a role"),
        (
            {"messages": [{"role": "user", "content": [{"text": "a"}]}]},
            "and a content that is a te",
        ),
        ({"messages": [REPLY]}, "messages: expected a conversation before the assistant's turn"),
        (
            {"messages": [USER, REPLY], "targets": "The Savoy."},
            "messages: expected the conversation before the reply, which is in targets",
        ),
        ({"prompt": [USER], "completion": [USER]}, "completion: expected one turn of the assista"),
        (
            {"prompt": [USER], "completion": "a", "targets": "b"},
            "completion or targets, found both",
        ),
        ({"prompt": 3}, "prompt: expected a list of messages, found 3"),
        (
            {"messages": [USER], "completion": "The Ritz."},
            "expected messages, or prompt and completion, found messages and completion. Leave",
        ),
        (
            {"messages": [USER, REPLY], "prompt": [USER], "completion": [REPLY]},
            "found messages and completion and prompt.",
        ),
        (
            {"messages": [USER, REPLY], "tools": [{"name": "book"}]},
            'tools: expected nothing, for a conversation is its roles and contents, found [{"name"'
            ': "book"}]. Leave it out, or give it for all records: CHAT_TEMPLATE_KWARGS={"tools": ',
        ),
        (
            {"prompt": [USER], "completion": [REPLY], "chat_template_kwargs": {"x": False}},
            "chat_template_kwargs: expected nothing, for a conversation is its roles and contents, "
            'found {"x": false}. Leave it out, or give it for all records: CHAT_TEMPLATE_KWARGS=',
        ),
        (
            {"messages": [USER, {**REPLY, "tool_calls": [{"id": 1}]}, USER]},
            "messages[1]: expected a role and a content alone, which the chat template is given, "
            'found tool_calls: [{"id": 1}]. Leave it out, or write it into the text.',
        ),
        ({"prompt": [{**USER, "name": "Ann"}]}, "prompt[0]: expected a role and a content alone"),
        (
            {"prompt": [USER], "completion": [{**REPLY, "reasoning_content": "Hm."}]},
            'found reasoning_content: "Hm."',
        ),
    ],
)
def test_what_is_refused(fields, message):
    with pytest.raises(UsageError, match=rf"file\.jsonl:7: .*{re.escape(message)}"):
        record(**fields)


def test_what_says_nothing_and_what_is_no_templates_is_taken():
    """Tables have a column for all rows: null where there is nothing."""
    empty = {"tool_calls": None, "name": None, "reasoning_content": ""}
    found = record(
        messages=[{**SYSTEM, **empty}, {**USER, "weight": 1}, {**REPLY, "tool_calls": []}],
        tools=None,
        chat_template_kwargs={},
    )
    assert (found.messages, found.targets) == (PAIRS, "The Ritz.")
    # A field of that name beside a text is not ours.
    assert record(inputs="a", tools=["saw"]).extra == {"tools": ["saw"]}
    assert record(messages=[USER, REPLY], tools="[]").targets == REPLY["content"]


def test_lines_of_a_file(tmp_path):
    (tmp_path / "chat.jsonl").write_text(
        '{"messages": [{"role": "user", "content": "a"}]}\n'
        '{"messages": [{"role": "user", "content": 5}]}\n'
    )
    with pytest.raises(UsageError, match=r"chat\.jsonl:2: messages\[0\]: expected a role"):
        read_records(tmp_path / "chat.jsonl")


def test_marks_of_one_conversation_are_not_those_of_another():
    """One question after two system turns is two prompts, though the inputs are equal."""
    ids, marked = np.array([3, 4], np.int32), np.array([[1, 4]], np.int32)
    ledger = rounds.Ledger()
    asked = record(messages=[SYSTEM, USER], inputs="same")
    ledger.add(asked.prompt, MarkedTarget(ids, marked, np.zeros(2, np.int32), 0))
    assert ledger.removed(asked.prompt, ids) == {1: rounds.Removed({4: 1.0})}
    assert ledger.removed(record(messages=[USER], inputs="same").prompt, ids) == {}
