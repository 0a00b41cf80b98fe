"""A `tokenizer.json` made ready to use: no text comes to a control token of it.

`hub_tokenizer` says which kinds are known.
"""

import functools
import json
import pathlib
import re
import secrets
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import tokenizers
from etils import epath

from tnt_jax.runtime import files
from tnt_jax.runtime.errors import UsageError
from tnt_jax.tokenizers import hub_files, piece_texts
from tnt_jax.tokenizers.hub_files import SETTINGS, TOKENIZER
from tnt_jax.tokenizers.tokenization import Extent

_SPACES = {True: "Ġ", False: "▁"}  # how a piece writes a space, by whether it is byte-level


class LoadedTokenizer(NamedTuple):
    """A tokenizer.json, ready to use.

    Attributes:
        beginning: encodes what begins a text; decodes.
        continuing: encodes what comes after a text: it puts no space before.
        is_byte_level: which of the two kinds it is.
        prepends: whether a space is put before a text.
        composes: whether characters are composed (NFC) before they are looked up.
        strips: whether decoding leaves out the first space of a text.
        size: one more than the largest id.
        names: the name of every token by its id, as the file has it.
        hidden: by the name of each control token the one that no text holds.
        text_names: the names of the added tokens that are no control tokens.
        silent_ids: control tokens, ends among them.
        end_ids: that end an output, in the order in which they are stated.
        end_id: that is written after a text.
        before_text: ids that are put before a text (BOS).
        is_bos_of_setting: whether the file by itself would put other ids there.
        unknown_id: the id of the unknown token, if there is one.
    """

    beginning: tokenizers.Tokenizer
    continuing: tokenizers.Tokenizer
    is_byte_level: bool
    prepends: bool
    composes: bool
    strips: bool
    size: int
    names: Mapping[int, str]
    hidden: Mapping[str, str]
    text_names: frozenset[str]
    silent_ids: frozenset[int]
    end_ids: tuple[int, ...]
    end_id: int
    before_text: tuple[int, ...]
    is_bos_of_setting: bool
    unknown_id: int | None

    @property
    def space(self) -> str:
        """How a piece writes a space."""
        return _SPACES[self.is_byte_level]

    def piece(self, token_id: int) -> str:
        """How the file writes a token; nothing for a control token or an id that is none."""
        return "" if token_id in self.silent_ids else self.names.get(token_id, "")

    def measure(self, ids: Sequence[int]) -> tuple[str, list[Extent]]:
        """Our own decoding: text, and which of its characters each id has a part in."""
        pieces = [self.piece(i) for i in ids]
        text, extents = piece_texts.measure(pieces, is_byte_level=self.is_byte_level)
        if self.strips and text.startswith(" "):
            text = text[1:]
            extents = [(max(start - 1, 0), max(end - 1, 0)) for start, end in extents]
        return text, extents


def load(folder: str, more_control_names: frozenset[str]) -> LoadedTokenizer:
    """Reads a directory's tokenizer, once while its files are as they are.

    Args:
        folder: the directory.
        more_control_names: added tokens that are control tokens, although the file calls them text.

    Raises:
        UsageError: it cannot be read or is of no kind that is known, or nothing says what ends a
            text.
    """
    where = f"{folder}/{TOKENIZER}"
    try:
        if files.is_remote(folder):
            return _read(folder, more_control_names)
        # A relative one is another after a change of directory.
        place = pathlib.Path(folder).absolute()
        return _read_once(folder, more_control_names, place, hub_files.versions(place))
    except (UsageError, OSError):
        raise
    except BaseException as error:  # what the package raises has no type of its own
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = (str(error).splitlines() or [""])[0]
        raise UsageError(
            f"{where}: expected a tokenizer as the package tokenizers writes it, found one that "
            f"cannot be read: {type(error).__name__}: {reason}. Fetch the model's files again."
        ) from error


@functools.lru_cache(maxsize=4)  # a chat model has up to two
def _read_once(
    folder: str, more_control_names: frozenset[str], place: pathlib.Path, versions: tuple[Any, ...]
) -> LoadedTokenizer:
    del place, versions  # they decide whether it is read again
    return _read(folder, more_control_names)


_MOST_UNUSED = 1024  # numbers that no token has, beside as many as there are tokens


def _read(path: str, more_control_names: frozenset[str]) -> LoadedTokenizer:
    folder, where = epath.Path(path), f"{path}/{TOKENIZER}"
    content = files.read_object(folder / TOKENIZER)
    is_byte_level = _check_kind(content, where)
    names = _names(content)
    if (largest := max(names)) >= 2 * len(names) + _MOST_UNUSED:
        raise UsageError(
            f"{where}: expected the ids of {len(names):,} tokens, found one of {largest:,}. Fetch "
            "the model's files again."
        )
    hub_files.check_added(folder, names, where)
    added = {int(one["id"]): one for one in content.get("added_tokens") or ()}
    eos_token = hub_files.control_texts(folder).get("eos_token")
    end_ids = hub_files.end_ids(folder, {i: names[i] for i in added}, eos_token, where)
    if beyond := hub_files.beyond_rows(folder, added) - {*end_ids}:
        content = _without_tokens(content, beyond)
        names = {i: name for i, name in names.items() if i not in beyond}
        added = {i: one for i, one in added.items() if i not in beyond}
    own = [i for i in end_ids if names[i] == eos_token]
    silent = frozenset(end_ids) | {
        i for i, one in added.items() if one["special"] or names[i] in more_control_names
    }
    hidden_of = {names[i]: _hidden_name(i) for i in silent}
    content = _with_hidden_names(content, hidden_of)
    beginning = tokenizers.Tokenizer.from_str(json.dumps(content))
    for i, name in names.items():
        if beginning.token_to_id(hidden_of.get(name, name)) != i:
            raise UsageError(
                f"{where}: expected every token to have the id that is stated, found {name!r} "
                f"with {beginning.token_to_id(hidden_of.get(name, name))} in place of {i}. Fetch "
                "the model's files again."
            )
    bos_token = hub_files.control_texts(folder).get("bos_token")
    bos_id = next((i for i in silent if names[i] == bos_token), None)
    of_file = _before_text(beginning)
    before_text = _before_text_by_setting(hub_files.settings(folder, SETTINGS), bos_id, of_file)
    beginning.post_processor = None  # pyright: ignore[reportAttributeAccessIssue]
    steps = ("normalizer", "pre_tokenizer")
    prepends = any(_prepends(part) for step in steps for part in _parts(content.get(step)))
    without = {step: _without_prefix(content.get(step)) for step in steps}
    continuing = beginning
    if prepends:
        without = {**content, **without, "post_processor": None}
        continuing = tokenizers.Tokenizer.from_str(json.dumps(without))
    decoders = _types(content.get("decoder"))
    return LoadedTokenizer(
        beginning=beginning,
        continuing=continuing,
        is_byte_level=is_byte_level,
        prepends=prepends,
        composes="NFC" in _types(content.get("normalizer")),
        strips=not is_byte_level
        and ("Strip" in decoders or (prepends and "Metaspace" in decoders)),
        size=max(names) + 1,
        names=names,
        hidden=hidden_of,
        text_names=frozenset(names[i] for i in added if i not in silent),
        silent_ids=silent,
        end_ids=end_ids,
        end_id=(*own, *end_ids)[0],
        before_text=before_text,
        is_bos_of_setting=before_text != of_file,
        unknown_id=beginning.token_to_id(content["model"].get("unk_token") or ""),
    )


# --------------------------------------------------------------------------- What a file is made of


def _parts(part: Any) -> Iterator[Mapping[str, Any]]:
    """The parts of a normalizer, pre-tokenizer or decoder, those of sequences one by one."""
    if part and part["type"] == "Sequence":
        for key in ("normalizers", "pretokenizers", "decoders"):
            for one in part.get(key, ()):
                yield from _parts(one)
    elif part:
        yield part


def _types(part: Any) -> set[str]:
    return {one["type"] for one in _parts(part)}


def _check_kind(content: Mapping[str, Any], where: str) -> bool:
    """Whether a tokenizer is byte-level; a UsageError where it is of neither kind."""
    decoders = _types(content.get("decoder"))
    is_byte_level = "ByteLevel" in decoders
    normalizers = list(_parts(content.get("normalizer")))
    is_plain = all(
        one["type"] in ("NFC", "Prepend")
        or (one["type"] == "Replace" and (one["pattern"], one["content"]) == ({"String": " "}, "▁"))
        for one in normalizers
    )
    is_sentencepiece = bool(decoders & {"ByteFallback", "Metaspace"})
    if not (hub_files.is_known(content) and is_plain and (is_byte_level or is_sentencepiece)):
        found = sorted(decoders | {one["type"] for one in normalizers})
        raise UsageError(
            f"{where}: expected byte-level BPE (GPT-2, Llama 3, Qwen) or BPE with byte fallback "
            "(Llama 2, Gemma, Mistral) that changes no more of a text than NFC does, found "
            f"{hub_files.model_type(content)} with {', '.join(found) or 'no decoder'}. Use another "
            "model."
        )
    return is_byte_level


def _names(content: Mapping[str, Any]) -> dict[int, str]:
    names = {i: piece for piece, i in content["model"]["vocab"].items()}
    added = content.get("added_tokens") or ()
    return names | {int(one["id"]): one["content"] for one in added}


# ----------------------------------------------------------------------------------- Hidden names


def _hidden_name(token_id: int) -> str:
    """A name that nobody can write who does not know it: private-use characters about a secret."""
    return f"\ue000{_SECRET}.{token_id}\ue001"


_SECRET = secrets.token_hex(16)


def _with_hidden_names(content: Mapping[str, Any], hidden_of: Mapping[str, str]) -> dict[str, Any]:
    """The tokenizer with control tokens under hidden names: no text comes to one of them.

    The package's own switch, `encode_special_tokens`, looks no control token up in any text; here
    a template's are looked up in the same text in which a user's are not. Nor does it keep a piece
    of the vocabulary, as "</s>" is in Llama 2's, from being put together out of smaller ones:
    merges that would are left out. What the ids are does not depend on the secret.
    """
    model = dict(content["model"])
    model["dropout"] = None  # the same text, the same ids
    model["vocab"] = {hidden_of.get(name, name): i for name, i in model["vocab"].items()}
    model["merges"] = [one for one in model["merges"] if not _touches(one, hidden_of)]
    if model.get("unk_token"):
        model["unk_token"] = hidden_of.get(model["unk_token"], model["unk_token"])
    added = [
        {**one, "content": hidden_of[one["content"]], "special": True, "normalized": False}
        if one["content"] in hidden_of
        else one
        for one in content.get("added_tokens") or ()
    ]
    return {**content, "model": model, "added_tokens": added, "truncation": None, "padding": None}


def _touches(merge: str | Sequence[str], names: Mapping[str, str]) -> bool:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left in names or right in names or left + right in names


# ------------------------------------------------------------------------------- Before a text


def _without_tokens(content: Mapping[str, Any], ids: Collection[int]) -> dict[str, Any]:
    vocab = {name: i for name, i in content["model"]["vocab"].items() if i not in ids}
    added = [one for one in content["added_tokens"] if int(one["id"]) not in ids]
    return {**content, "model": {**content["model"], "vocab": vocab}, "added_tokens": added}


# The classes of transformers that put a BOS before a text by this setting, whatever the file says.
_BOS_BY_SETTING = re.compile(r"(Code)?(Llama|Gemma)Tokenizer(Fast)?")


def _before_text(tokenizer: tokenizers.Tokenizer) -> tuple[int, ...]:
    """What the file puts before a text: its BOS, if that is. What is put behind is an end."""
    encoding = tokenizer.encode("a", add_special_tokens=True)
    num_before = next((i for i, put in enumerate(encoding.special_tokens_mask) if not put), 0)
    return tuple(encoding.ids[:num_before])


def _before_text_by_setting(
    settings: Mapping[str, Any], bos_id: int | None, of_file: tuple[int, ...]
) -> tuple[int, ...]:
    """What is put before a text where the settings may say otherwise than the file."""
    is_put = settings.get("add_bos_token")
    if is_put is not None and _BOS_BY_SETTING.fullmatch(str(settings.get("tokenizer_class"))):
        return (bos_id,) if is_put and bos_id is not None else ()
    return of_file


def _prepends(part: Mapping[str, Any]) -> bool:
    """Whether a part of a tokenizer puts a space before a text."""
    if part["type"] == "Metaspace":
        return part.get(
            "prepend_scheme", "always" if part.get("add_prefix_space", True) else ""
        ) in (
            "always",
            "first",
        )
    return part["type"] == "Prepend" or bool(part.get("add_prefix_space"))


def _without_prefix(part: Any) -> Any:
    """The same normalizer or pre-tokenizer, but that it puts no space before a text."""
    if not part:
        return part
    if part["type"] == "Sequence":
        (key,) = set(part) - {"type"}
        nested = [one for one in map(_without_prefix, part[key]) if one]
        return {"type": "Sequence", key: nested}
    if part["type"] == "Prepend":
        return None
    if part["type"] == "Metaspace":
        kept = {key: value for key, value in part.items() if key != "add_prefix_space"}
        return {**kept, "prepend_scheme": "never"}
    return {**part, "add_prefix_space": False} if "add_prefix_space" in part else part
