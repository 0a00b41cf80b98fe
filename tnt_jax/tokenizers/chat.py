"""The tokeniser of a chat model: its prompts are conversations, as its template writes them."""

import dataclasses
import functools
import json
import re
from collections.abc import Sequence
from typing import Any

from etils import epath

from tnt_jax.runtime import files
from tnt_jax.tokenizers import hub_files, hub_tokenizer, templates


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
    where: str = templates.TEMPLATE
    date: str | None = None
    kwargs: str = templates.NO_KWARGS

    def __reduce__(self) -> tuple[Any, ...]:
        # What a copy or another process gets: no loaded tokenizer.
        return type(self), (self.folder, self.source, self.where, self.date, self.kwargs)

    @functools.cached_property
    def template(self) -> templates.ChatTemplate:
        """The template, which may write this tokeniser's control tokens."""
        tokeniser = hub_tokenizer.HubTokenizer(self.folder)
        return templates.ChatTemplate(self.source, tokeniser, self.where, self.date, self.kwargs)

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
        if (
            not templates.has_template(folder)
            or templates.of_directory(folder, plain).source != self.source
        ):
            (folder / templates.TEMPLATE).write_text(self.source)
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
        if self.kwargs != templates.NO_KWARGS:
            more.append(f"chat_template_kwargs: {self.kwargs}")
        if names := self._more_control_names:
            more.append(f"control tokens: {json.dumps(sorted(names))}")
        return self.source, str(self.date), *more
