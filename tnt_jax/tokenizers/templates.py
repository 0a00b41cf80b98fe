"""Chat templates: a conversation as the prompt that a chat model was trained on.

A template is the model's own program, in jinja2's language, that writes a conversation as one text.
It is rendered in another process (`template_renderer`). Its words may become control tokens; what
the users said never does, however it is spelt.
"""

import contextlib
import dataclasses
import functools
import json
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from etils import epath

from tnt_jax.runtime import files
from tnt_jax.runtime.errors import UsageError, naming_file
from tnt_jax.tokenizers import conversations, hub_files, hub_tokenizer, template_renderer

TEMPLATE = "chat_template.jinja"
Message = Mapping[str, str]

_MOST_BYTES_OF_TEMPLATE = 2**20  # the largest have a twentieth
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
    def _renderer(self) -> template_renderer.Renderer:
        if found := _STAND_IN.search(self.source + self.kwargs):
            raise UsageError(
                f"{self.where}: expected a chat template without private-use characters, found "
                f"U+{ord(found[0]):X}. Take it out."
            )
        return template_renderer.Renderer(self.source, self.where, self.date)


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
