"""Conversations in records: their roles, and the forms in which TRL writes them."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from tnt_jax.runtime.errors import UsageError

# A template may put a role within the name of a control token ("<|user|>"), so not any text is one.
ROLES = ("system", "developer", "user", "assistant", "tool")
_REPLY = "assistant"
# What TRL hands a template beside roles and contents. We do not: prompts would lack it silently.
# Of a record's fields, the setting that says the same for all records.
_OF_RECORDS = {"tools": '{"tools": [...]}', "chat_template_kwargs": "{...}"}
_OF_MESSAGES = ("tool_calls", "tool_call_id", "name", "reasoning_content", "thinking")
_NOTHING = ("[]", "{}", "null")  # where a table has such a column as JSON


def as_record(fields: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """The fields of an object as a record has them, whichever form they came in.

    Args:
        fields: those of the object, with `inputs`, with `messages`, or with TRL's `prompt`. Beside
            messages, a `prompt` that is a text is a field like any other: UltraChat has there what
            was said first.
        where: its place, for messages.

    Raises:
        UsageError: a conversation is none or has what no template is given here, or what the model
            was told or replied is given twice.
    """
    given = {name for name, value in fields.items() if value is not None}
    if "inputs" not in given and "messages" in given:
        twice = ["completion"] * ("completion" in given)
        twice += ["prompt"] * isinstance(fields.get("prompt"), list)
        if twice:
            raise UsageError(
                f"{where}: expected messages, or prompt and completion, found messages and "
                f"{' and '.join(twice)}. Leave one of the two out."
            )
    elif "inputs" not in given and "prompt" in given:
        fields = _from_pair(fields, where)
    elif "messages" not in given:
        return fields
    if fields.get("messages") is None:
        return fields
    for name, for_all in _OF_RECORDS.items():
        if fields.get(name) and fields[name] not in _NOTHING:
            raise UsageError(
                f"{where}: {name}: expected nothing, for a conversation is its roles and contents, "
                f"found {_shown(fields[name])}. Leave it out, or give it for all records: "
                f"CHAT_TEMPLATE_KWARGS={for_all}."
            )
    messages = _checked(fields["messages"], f"{where}: messages")
    reply = None
    if messages[-1]["role"] == _REPLY:
        *messages, last = messages
        reply = last["content"]
    if reply is not None:
        if fields.get("targets") is not None:
            raise UsageError(
                f"{where}: messages: expected the conversation before the reply, which is in "
                "targets, found one that ends with the assistant's turn. Leave that turn out, or "
                "leave targets out."
            )
        fields = {**fields, "targets": reply}
    if not messages:
        raise UsageError(
            f"{where}: messages: expected a conversation before the assistant's turn, found none."
        )
    fields = {**fields, "messages": messages}
    if fields.get("inputs") is None:
        fields = {**fields, "inputs": text_of(messages)}
    return fields


def _from_pair(fields: Mapping[str, Any], where: str) -> dict[str, Any]:
    """TRL's `prompt` and `completion`, as the fields that we have for them."""
    prompt, completion = fields["prompt"], fields.get("completion")
    rest = {name: value for name, value in fields.items() if name not in ("prompt", "completion")}
    if isinstance(prompt, str):
        rest["inputs"] = prompt
    else:
        rest["messages"] = _checked(prompt, f"{where}: prompt")
    if isinstance(completion, list):
        turns = _checked(completion, f"{where}: completion")
        if len(turns) != 1 or turns[0]["role"] != _REPLY:
            raise UsageError(
                f"{where}: completion: expected one turn of the assistant, found "
                f"{_shown(completion)}. Make a record of each reply."
            )
        completion = turns[0]["content"]
    if completion is not None:
        if rest.get("targets") is not None:
            raise UsageError(
                f"{where}: expected completion or targets, found both. Leave one of them out."
            )
        rest["targets"] = completion
    return rest


def _checked(messages: Any, where: str) -> list[dict[str, str]]:
    """Messages of a role and a text each; fields that no template reads are left out.

    Raises:
        UsageError: They are none.
    """
    if not isinstance(messages, list) or not messages:
        raise UsageError(
            f"{where}: expected a list of messages, found {_shown(messages)}: each has a role "
            f"({', '.join(ROLES)}) and a content that is a text."
        )
    for number, message in enumerate(messages):
        check(message, f"{where}[{number}]")
    return [{"role": one["role"], "content": one["content"]} for one in messages]


def check(message: Any, where: str) -> None:
    """Raises a UsageError unless a message has a role, a text and nothing more for a template."""
    content = message.get("content") if isinstance(message, Mapping) else None
    if not isinstance(content, str) or message.get("role") not in ROLES:
        raise UsageError(
            f"{where}: expected a role ({', '.join(ROLES)}) and a content that is a text, found "
            f"{_shown(message)}."
        )
    for name in _OF_MESSAGES:
        if message.get(name):
            raise UsageError(
                f"{where}: expected a role and a content alone, which the chat template is given, "
                f"found {name}: {_shown(message[name])}. Leave it out, or write it into the text."
            )


def text_of(messages: Sequence[Mapping[str, str]]) -> str:
    """All that is said in a conversation, for whoever looks for words in it."""
    return "\n\n".join(message["content"] for message in messages)


def _shown(value: Any) -> str:
    return f"{json.dumps(value, default=str):.100}"
