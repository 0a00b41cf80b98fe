"""Chat templates: a conversation as the prompt that a chat model was trained on.

A template is the model's own program, in jinja2's language, that writes a conversation as one text.
It is rendered in another process (`template_process`). Its words may become control tokens; what
the users said never does, however it is spelt.
"""

import contextlib
import dataclasses
import datetime
import functools
import json
import os
import pathlib
import re
import selectors
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from etils import epath

from tnt_jax.data import conversations, hub_files, hub_tokenizer, template_process
from tnt_jax.runtime import files
from tnt_jax.runtime.errors import UsageError, naming_file

TEMPLATE = "chat_template.jinja"
Message = Mapping[str, str]

_MOST_BYTES_OF_TEMPLATE = 2**20  # the largest have a twentieth
# What rendering one prompt may take: a thousand times what templates do.
_MOST_SECONDS = 10  # of a processor
_MOST_SECONDS_WAITING = 120  # of a clock, on a machine that is busy
_MOST_BYTES = 2**29
_MOST_CHARACTERS = 2**24
# Private-use characters that stand for contents, one each.
_FIRST_STAND_IN, _LAST_STAND_IN = 0xF0000, 0xFFFFD
_STAND_IN = re.compile(f"([{chr(_FIRST_STAND_IN)}-{chr(_LAST_STAND_IN)}])")
_END_OF_THOUGHT = "</think>"
# How tokens that structure a conversation are written: "<｜User｜>", "[INST]".
_CONTROL = re.compile(r"<.+>|\[.+\]")
NO_KWARGS = "{}"

# A question and a reply that no text holds, to ask a template what it writes around them.
_QUESTION = {"role": "user", "content": chr(_FIRST_STAND_IN)}
_REPLY = {"role": "assistant", "content": chr(_FIRST_STAND_IN + 1)}

# A stretch of a prompt, and whether the names of control tokens in it mean these tokens.
Part = tuple[str, bool]


@dataclasses.dataclass(frozen=True)
class _WithMoreControl(hub_tokenizer.HubTokenizer):
    """A tokeniser with control tokens beside those of its file.

    Attributes:
        names: how the further ones are written.
    """

    names: frozenset[str]

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.folder, self.names)

    @property
    def _more_control_names(self) -> frozenset[str]:
        return self.names


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """The chat template of a model.

    Attributes:
        source: the template, in jinja2's language.
        tokeniser: the model's tokeniser; the template may write its control tokens, and
            `more_control_names`.
        where: it comes from, for messages.
        date: what a template that writes today's date writes, as YYYY-MM-DD, so that a prompt has
            the same ids tomorrow; None is today.
        kwargs: further variables for the template, as a JSON object: transformers calls them
            `chat_template_kwargs`.
    """

    source: str
    tokeniser: hub_tokenizer.HubTokenizer
    where: str = TEMPLATE
    date: str | None = None
    kwargs: str = NO_KWARGS

    def __reduce__(self) -> tuple[Any, ...]:
        # What a copy or another process gets: a renderer of its own.
        return type(self), (self.source, self.tokeniser, self.where, self.date, self.kwargs)

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """The text of a conversation.

        Args:
            messages: each with a "role", one of `conversations.ROLES`, and its "content", a text.
            add_generation_prompt: whether the beginning of a reply comes last.

        Raises:
            UsageError: a message is none, or the template does not take them.
        """
        _check(messages)
        return self._render(messages, add_generation_prompt=add_generation_prompt)[0]

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """The ids of a conversation up to where the reply begins.

        A BOS is there if the template writes one. Of the control tokens that users' texts spell
        none is there.

        Raises:
            UsageError: a message is none, the template does not take them or leaves one out, or
                what it writes cannot be told from what is said.
        """
        _check(messages)
        return self._reader.markup_ids(self._parts(messages))

    def encode_reply(self, text: str) -> hub_tokenizer.Encoded:
        """The ids of a reply, as they are in a conversation that is tokenised as a whole.

        So a tokenizer that puts a space before a text puts none behind the line break that ends
        the prompt; and white space that the template writes around a reply is there.

        Returns:
            The ids behind those of the prompt, without the end; extents are in the text.
        """
        before, blank, behind = self._around_reply
        if not text or self.has_plain_replies:
            return self._reader.encode_with_extents(text)
        return self._reader.encode_between(before, text, blank=blank, behind=behind)

    @functools.cached_property
    def has_plain_replies(self) -> bool:
        """Whether a reply has the ids that it has as a text by itself."""
        _, blank, behind = self._around_reply
        return not (self._reader.prepends or blank or behind)

    @functools.cached_property
    def more_control_names(self) -> frozenset[str]:
        """The added tokens that it writes, although the tokenizer's file calls them text.

        Such are "<｜User｜>" and "<｜Assistant｜>" of DeepSeek's distilled models. Pairs such as
        "<think>" and "</think>" are none: a model writes them itself.
        """
        texts = self.tokeniser.text_names
        names = {
            name
            for name in texts
            if _CONTROL.fullmatch(name)
            and not (name[0] == "<" and {f"</{name[1:]}", f"<{name[2:]}"} & {*texts})
        }
        written = [self.source]
        # Templates put a role between "<|" and "|>". Not every template takes a system's turn.
        for roles in (["user", "assistant", "user"], ["system", "user"]):
            if any(name not in written[0] for name in names):
                stand_ins = [
                    {"role": role, "content": chr(_FIRST_STAND_IN + i)}
                    for i, role in enumerate(roles)
                ]
                with contextlib.suppress(UsageError):
                    written += self._render(stand_ins, add_generation_prompt=True)
        return frozenset(name for name in names if any(name in text for text in written))

    @functools.cached_property
    def _reader(self) -> hub_tokenizer.HubTokenizer:
        """The tokeniser, which knows all control tokens that the template writes."""
        return _WithMoreControl(self.tokeniser.folder, self.more_control_names)

    @functools.cached_property
    def _around_reply(self) -> tuple[str, str, str]:
        """What is written around a reply.

        Returns:
            The end of the prompt, from the last thing on that no token reaches across; and white
            space that the template writes before a reply, and between it and its end.
        """
        whole, behind = self._with_reply
        prompt = whole
        with contextlib.suppress(UsageError):  # not every template takes a question alone
            (prompt,) = self._render([_QUESTION], add_generation_prompt=True)
        blank = whole.removeprefix(prompt) if whole.startswith(prompt) else ""
        behind, is_ended, _ = behind.partition(str(self._reader.pieces()[self.end_of_turn_id]))
        borders = "|".join(map(re.escape, [*self._reader.control_names, _QUESTION["content"]]))
        places = [found.start() for found in re.finditer(borders, prompt)]
        return (
            prompt[places[-1] if places else 0 :],
            blank if blank.isspace() else "",
            behind if is_ended and behind.isspace() else "",
        )

    @functools.cached_property
    def _with_reply(self) -> tuple[str, str]:
        """A question and what comes before its reply, and what comes behind that."""
        (text,) = self._render([_QUESTION, _REPLY], add_generation_prompt=False)
        before, _, behind = text.rpartition(_REPLY["content"])
        return before, behind

    @functools.cached_property
    def end_of_turn_id(self) -> int:
        """The end that the template writes behind a reply; the tokeniser's own if it writes none.

        Of the ends that the model's files state, if it writes one of them; else the first control
        token there. Some files state the end of a text alone: those of Qwen's base models, which
        have a template, and of many models that were trained on conversations later.

        Raises:
            UsageError: the template does not take a question and a reply.
        """
        reader = self._reader
        ids = reader.markup_ids([(self._with_reply[1], True)])
        names, begin = reader.pieces(), reader.control_texts.get("bos_token")
        others = {i for i in reader.control_ids if names[i] != begin}
        for ends in (reader.end_ids, others):
            if found := [i for i in ids if i in ends]:
                return found[0]
        return reader.end_id

    def _parts(self, messages: Sequence[Message]) -> list[Part]:
        """The prompt in parts: what the template writes, and what is said.

        The conversation is rendered twice: as it is, and with a stand-in for each content. All that
        the second text has beside stand-ins was written without any content being known, so names
        of control tokens in it are the template's. If the contents in the place of their stand-ins
        give the first text, to the letter, that text is cut up there: a name that it has within a
        content, or across its border, is what somebody said. Templates trim contents, and some
        leave the thoughts of earlier replies out: each content may be there in these forms.

        What a template that does something else with contents makes of them (capitals, say) is
        taken as it is where no content has a character with which such a name begins or ends, and
        the two texts have the same names in the same order: then no content had a part in one.
        """
        stand_ins = [
            message | {"content": chr(_FIRST_STAND_IN + i)}
            if message["content"].strip()
            else message
            for i, message in enumerate(map(dict, messages))
        ]
        text, pattern = self._render(messages, stand_ins, add_generation_prompt=True)
        for message, stand_in in zip(messages, stand_ins, strict=True):
            if message["content"].strip() and stand_in["content"] not in pattern:
                raise UsageError(
                    f"{self.where}: expected a chat template that writes all messages, found one "
                    f"that leaves out what the role {message['role']!r} says. Give that text to "
                    "another role."
                )
        parts = _cut(text, pattern, [message["content"] for message in messages])
        if parts is not None:
            return parts
        names = self._reader.control_names
        edges = {name[end] for name in names for end in (0, -1)}
        is_clear = not any(edges.intersection(message["content"]) for message in messages)
        if not is_clear or _in(text, names) != _in(pattern, names):
            raise UsageError(
                f"{self.where}: expected a chat template that writes messages as they are, found "
                "one that changes them, so that control tokens which they spell cannot be told "
                f"from its own. Leave out {' '.join(sorted(edges))} in the messages, or give "
                "another template."
            )
        return [(text, True)]

    def _render(self, *conversations: Sequence[Message], add_generation_prompt: bool) -> list[str]:
        known = self.tokeniser.control_texts
        settings = [
            {
                **known,
                "tools": None,
                "documents": None,
                **json.loads(self.kwargs),
                "messages": [
                    {"role": message["role"], "content": message["content"]}
                    for message in conversation
                ],
                "add_generation_prompt": add_generation_prompt,
            }
            for conversation in conversations
        ]
        return self._renderer.render(settings)

    @functools.cached_property
    def _renderer(self) -> "_Renderer":
        if found := _STAND_IN.search(self.source + self.kwargs):
            raise UsageError(
                f"{self.where}: expected a chat template without private-use characters, found "
                f"U+{ord(found[0]):X}. Take it out."
            )
        return _Renderer(self.source, self.where, self.date)


@dataclasses.dataclass(frozen=True)
class ChatTokenizer(hub_tokenizer.HubTokenizer):
    """The tokeniser of a chat model: prompts are conversations, and a text is what a user says.

    Attributes:
        folder: the folder with the tokenizer's files.
        source: the chat template, in jinja2's language.
        where: it comes from, for messages.
        date: what a template that writes today's date writes, as YYYY-MM-DD; None is today.
        kwargs: further variables for the template, as a JSON object.
    """

    source: str
    where: str = TEMPLATE
    date: str | None = None
    kwargs: str = NO_KWARGS

    def __reduce__(self) -> tuple[Any, ...]:
        # What a copy or another process gets: no loaded tokenizer.
        return type(self), (self.folder, self.source, self.where, self.date, self.kwargs)

    @functools.cached_property
    def template(self) -> ChatTemplate:
        """The template, which may write this tokeniser's control tokens."""
        tokeniser = hub_tokenizer.HubTokenizer(self.folder)
        return ChatTemplate(self.source, tokeniser, self.where, self.date, self.kwargs)

    @property
    def _more_control_names(self) -> frozenset[str]:
        return self.template.more_control_names

    @property
    def end_id(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The end of the assistant's turn."""
        return self.template.end_of_turn_id

    @functools.cached_property
    def _ends(self) -> frozenset[int]:
        return self.template.tokeniser.end_ids | {self.end_id}

    def prompt_ids(self, text: str, messages: Sequence[tuple[str, str]] = ()) -> list[int]:
        """The ids of a conversation, or of one turn of a user who says a text."""
        turns = messages or [("user", text)]
        return self.template.prompt_ids(
            [{"role": role, "content": content} for role, content in turns]
        )

    def encode_reply(self, text: str, inputs: str) -> list[int]:
        """See `Tokeniser.encode_reply`."""
        if self.template.has_plain_replies:  # to measure takes most of the time
            return self.encode(text)
        return self.encode_reply_with_extents(text, inputs).ids

    def encode_reply_with_extents(self, text: str, inputs: str) -> hub_tokenizer.Encoded:
        """See `Tokeniser.encode_reply_with_extents`."""
        del inputs
        return self.template.encode_reply(text)

    def copy_files(self, folder: epath.Path) -> None:
        """Copies the tokenizer's files, and writes the template where it is not the model's own.

        Whoever reads the directory then asks as this tokeniser does, and stops where it does.
        """
        super().copy_files(folder)
        plain = self.template.tokeniser
        if not has_template(folder) or of_directory(folder, plain).source != self.source:
            (folder / TEMPLATE).write_text(self.source)
        if self.end_id not in plain.end_ids:
            ends = {"eos_token_id": [*sorted(plain.end_ids), self.end_id]}
            stated = hub_files.settings(folder, hub_files.GENERATION)
            (folder / hub_files.GENERATION).write_text(files.json_text({**stated, **ends}))

    @property
    def _of_prompts(self) -> tuple[str, ...]:
        texts = self.control_texts
        named = {name: texts[name] for name in texts if re.search(rf"\b{name}\b", self.source)}
        # Where there is nothing more, digests are those that earlier runs have noted.
        more = [json.dumps(named, sort_keys=True)] if named else []
        if self.kwargs != NO_KWARGS:
            more.append(f"chat_template_kwargs: {self.kwargs}")
        if names := self._more_control_names:
            more.append(f"control tokens: {json.dumps(sorted(names))}")
        return self.source, str(self.date), *more


def kwargs_of(value: Any) -> str:
    """`ChatTemplate.kwargs` for a mapping, or for None.

    Raises:
        UsageError: it is none, or has what a template is not given so.
    """
    value = {} if value is None else value
    refusal = UsageError(
        "CHAT_TEMPLATE_KWARGS: expected a mapping of names to values that JSON has, such as "
        f'{{"enable_thinking": False}}, found {value!r:.100}.'
    )
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise refusal
    if own := sorted({"messages", "add_generation_prompt"}.intersection(value)):
        raise UsageError(
            f"CHAT_TEMPLATE_KWARGS: expected names that are not set otherwise, found {own[0]!r}. "
            "Leave it out."
        )
    try:
        return json.dumps(dict(value), sort_keys=True, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        raise refusal from None


def has_template(folder: epath.Path) -> bool:
    """Whether a model's directory has a chat template."""
    if (folder / TEMPLATE).exists():
        return True
    settings = folder / hub_files.SETTINGS
    return settings.exists() and bool(files.read_object(settings).get("chat_template"))


def of_file(path: str, tokeniser: hub_tokenizer.HubTokenizer) -> ChatTemplate:
    """A chat template from a file.

    Raises:
        UsageError: the file is none.
    """
    file = epath.Path(path).expanduser()
    if not file.is_file():
        raise UsageError(
            f'CHAT_TEMPLATE: expected "auto", None or a file with a chat template, found {path!r}.'
        )
    return ChatTemplate(_read(file), tokeniser, str(file))


def of_directory(
    folder: epath.Path, tokeniser: hub_tokenizer.HubTokenizer, name: str = "default"
) -> ChatTemplate:
    """The chat template of a model's directory.

    Args:
        folder: with `chat_template.jinja`, else with `chat_template` in `tokenizer_config.json`.
        tokeniser: the model's tokeniser.
        name: which one, where there are several.

    Raises:
        UsageError: there is none.
    """
    file = folder / TEMPLATE
    if file.exists():
        return ChatTemplate(_read(file), tokeniser, str(file))
    settings = folder / hub_files.SETTINGS
    where = f"{settings}: chat_template"
    found = files.read_object(settings).get("chat_template") if settings.exists() else None
    if isinstance(found, list):
        named = {one.get("name"): one.get("template") for one in found if isinstance(one, dict)}
        if not isinstance(named.get(name), str):
            raise UsageError(
                f"{where}: expected one named {name!r}, found {', '.join(map(repr, named))}. Name "
                "one of these."
            )
        found = named[name]
    if not isinstance(found, str):
        raise UsageError(
            f"{folder}: expected {TEMPLATE}, or chat_template in {hub_files.SETTINGS}, found "
            "neither. Give prompts as text, or use a model that was trained to chat."
        )
    return ChatTemplate(found, tokeniser, where)


def _read(file: epath.Path) -> str:
    size = files.size_of(file)
    if size > _MOST_BYTES_OF_TEMPLATE:
        raise UsageError(
            f"{file}: expected a chat template of at most {_MOST_BYTES_OF_TEMPLATE:,} bytes, found "
            f"{size:,}. Fetch the model's files again."
        )
    with naming_file(file):
        content = file.read_bytes()
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{file}: expected a chat template in UTF-8, found {error.reason} at byte "
            f"{error.start}. Fetch the model's files again."
        ) from error


def _check(messages: Sequence[Message]) -> None:
    """Raises a UsageError unless these are messages."""
    most = _LAST_STAND_IN - _FIRST_STAND_IN
    if not 0 < len(messages) <= most:
        raise UsageError(f"messages: expected 1 to {most:,} of them, found {len(messages):,}.")
    for number, message in enumerate(messages):
        conversations.check(message, f"messages[{number}]")


def _forms(content: str) -> list[str]:
    """The forms in which templates write a content: as it is, trimmed, without its thoughts."""
    found = {}
    for text in (content, content.rpartition(_END_OF_THOUGHT)[2]):
        for blanks in (None, "\n"):
            for form in (text, text.strip(blanks), text.lstrip(blanks), text.rstrip(blanks)):
                found[form] = None
    return list(found)


def _cut(text: str, pattern: str, contents: Sequence[str]) -> list[Part] | None:
    """Cuts a text up where a pattern has stand-ins for contents; None where it is no such text."""
    # By the places to which the text is as the pattern says: the parts up to there, the last first.
    reached: dict[int, tuple[Any, ...]] = {0: ()}
    for number, piece in enumerate(_STAND_IN.split(pattern)):
        is_said = number % 2 == 1
        forms = _forms(contents[ord(piece) - _FIRST_STAND_IN]) if is_said else [piece]
        reached = {
            place + len(form): ((form, not is_said), before)
            for place, before in reached.items()
            for form in forms
            if text.startswith(form, place)
        }
    if len(text) not in reached:
        return None
    parts, before = [], reached[len(text)]
    while before:
        part, before = before
        parts.append(part)
    return parts[::-1]


def _in(text: str, names: Collection[str]) -> list[str]:
    """The names that a text has, in order."""
    return re.findall("|".join(map(re.escape, sorted(names, key=len, reverse=True))), text)


# ------------------------------------------------------------------------------ Another process


class _Renderer:
    """A process that renders one template; it is started when it is needed, and again if it ended.

    Threads may share it. It ends with this object, or when this process does.
    """

    def __init__(self, source: str, where: str, date: str | None):
        self._source = source
        self._where = where
        self._date = date
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0  # the process that started it: a fork of that one starts its own
        self._finalizer: Any = None

    def render(self, settings: Sequence[Mapping[str, Any]]) -> list[str]:
        """The template's texts, one for each mapping of names to values; all say the same time.

        Raises:
            UsageError: the template is wrong, refuses, or takes too much.
        """
        request = {"settings": settings, "now": self._date or datetime.datetime.now().isoformat()}
        with self._lock:
            answer = self._ask(json.dumps(request))
        if "texts" in answer:
            return answer["texts"]
        if "refusal" in answer:
            found = f"one that refuses them: {_line(answer['refusal'])}"
            advice = "Change the messages or their roles"
        else:
            found = f"one that fails: {_line(answer['error'])}"
            advice = "Give the model another template"
        raise UsageError(
            f"{self._where}: expected a chat template that renders these messages, found {found}. "
            f"{advice}."
        )

    def _ask(self, request: str) -> dict[str, Any]:
        process = self._running()
        assert process.stdin is not None
        try:
            process.stdin.write(request.encode() + b"\n")
            process.stdin.flush()
            line = self._line(process)
        except BrokenPipeError:
            line = b""
        if not line.endswith(b"\n"):
            self.close()
            return {"error": f"it takes more than {_MOST_SECONDS} seconds, or all memory"}
        return json.loads(line)

    def _line(self, process: subprocess.Popen[bytes]) -> bytes:
        """A line of what it answers; less where it ends or the time is over before."""
        assert process.stdout is not None
        until = time.monotonic() + _MOST_SECONDS_WAITING
        parts, size = [], 0
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while not (parts and parts[-1].endswith(b"\n")):
                if not selector.select(max(until - time.monotonic(), 0)):
                    break
                part = os.read(process.stdout.fileno(), 2**16)
                size += len(part)
                if not part or size > _MOST_BYTES:
                    break
                parts.append(part)
        return b"".join(parts)

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._owner == os.getpid():
            return self._process
        process = subprocess.Popen(
            # -P: what lies beside the program is not what it imports.
            [sys.executable, "-P", str(pathlib.Path(template_process.__file__))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for us: it ends when its input does
        )
        self._process, self._owner = process, os.getpid()
        self._finalizer = weakref.finalize(self, _end, process, self._owner)
        start = {
            "source": self._source,
            "bytes": _MOST_BYTES,
            "seconds": _MOST_SECONDS,
            "characters": _MOST_CHARACTERS,
        }
        assert process.stdin is not None
        process.stdin.write(json.dumps(start).encode() + b"\n")
        return process

    def close(self) -> None:
        """Ends the process; the next request starts another."""
        if self._finalizer is not None:
            self._finalizer()
        self._process = None


def _end(process: subprocess.Popen[bytes], owner: int) -> None:
    if os.getpid() == owner:
        process.kill()
        process.communicate()


def _line(text: str) -> str:
    """What somebody else wrote, as one line."""
    return json.dumps(" ".join(text.split()), ensure_ascii=False)
