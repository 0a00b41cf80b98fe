"""The tokenizer in a GGUF file as the files that a directory of Hugging Face's has.

A file has the tokens with their types, and how they are put together: the merges of byte-level BPE
("gpt2") with the name of what splits words, or the scores of a sentencepiece model ("llama"). What
such a name stands for is known here for some. Others are refused: another split gives other ids.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from tnt_jax.runtime.errors import UsageError
from tnt_jax.tokenizers import hub_files

_PREFIX = "tokenizer.ggml."
_TEMPLATE = "tokenizer.chat_template"
# The types of tokens, by the numbers that stand for them.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
_SPACE = "▁"
_REFUSED = "Set VOCABULARY_PATH to a directory with the tokenizer of this model."

# What llama.cpp, too, takes for the end of a text and, here if the template writes it, of a turn.
_ENDS_OF_TEXTS = {"<|endoftext|>", "<|end_of_text|>"}
_ENDS_OF_TURNS = {"<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>", "<|eom_id|>"}

# ------------------------------------------------------------------------------- Splitting words


def _split(pattern: str) -> list[dict[str, Any]]:
    return [
        {
            "type": "Split",
            "pattern": {"Regex": pattern},
            "behavior": "Isolated",
            "invert": False,
        },
        _byte_level(use_regex=False),
    ]


def _byte_level(**settings: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, **settings}


def _words(digits: str) -> str:
    """The pattern of Llama 3 and Qwen, which differ in how many digits are together."""
    return (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
        + digits
        + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


# What `tokenizer.ggml.pre` stands for: steps that split, and whether a BOS comes before a text.
_LLAMA_3 = _split(_words(r"\p{N}{1,3}"))
_SPLITS: dict[str, list[dict[str, Any]]] = {
    "gpt-2": [_byte_level(use_regex=True)],
    "smollm": [{"type": "Digits", "individual_digits": True}, _byte_level(use_regex=True)],
    "llama-bpe": _LLAMA_3,
    "smaug-bpe": _LLAMA_3,  # SmolLM 3 has it: without a BOS before a text
    "qwen2": _split(_words(r"\p{N}")),
}
_COMPOSED = ("qwen2",)  # NFC before a text is split
_WITH_BOS = ("llama-bpe",)
# A word that is a token is that one, whatever the merges say.
_WHOLE_WORDS = ("llama-bpe", "smaug-bpe")


# ------------------------------------------------------------------------------------ The files


def write(folder: epath.Path, settings: Mapping[str, Any], where: str) -> None:
    """Writes `tokenizer.json` and what else says how a model reads and writes text.

    Args:
      folder: An existing directory.
      settings: The settings of a GGUF file, by their names there.
      where: The file's path, for messages.

    Raises:
      UsageError: It has a tokenizer of another kind, or none that can be read.
    """
    try:
        tokens, kinds = _tokens(settings)
        model = _value(settings, "model", str)
        if model == "gpt2":
            tokenizer = _byte_level_bpe(settings, tokens, kinds)
        elif model == "llama":
            tokenizer = _sentencepiece_bpe(settings, tokens, kinds)
        else:
            raise UsageError(f"{_PREFIX}model: expected gpt2 or llama, found {model!r:.40}.")
        ends = end_ids(settings)
        if not ends:
            raise UsageError(f"expected {_PREFIX}eos_token_id, found no such setting.")
    except UsageError as error:
        raise UsageError(f"{where}: {error} {_REFUSED}") from error
    contents = {
        hub_files.TOKENIZER: tokenizer,
        hub_files.SETTINGS: _config(settings, tokens),
        hub_files.GENERATION: special_ids(settings),
    }
    for name, content in contents.items():
        text = json.dumps(content, ensure_ascii=False, allow_nan=False)
        (folder / name).write_text(text + "\n", encoding="utf-8")


def special_ids(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The ids that begin, end and fill texts, as `config.json` has them."""
    ends = end_ids(settings)
    found = {
        "bos_token_id": _id(settings, "bos"),
        "eos_token_id": ends[0] if len(ends) == 1 else list(ends),
        "pad_token_id": _id(settings, "padding"),
    }
    return {name: value for name, value in found.items() if value not in (None, [])}


def end_ids(settings: Mapping[str, Any]) -> tuple[int, ...]:
    """The ids that end an output: those that are stated, and what the chat template writes.

    A file states one, where the model's own `generation_config.json` has several.
    """
    ids = [_id(settings, name) for name in ("eos", "eot", "eom")]
    template = settings.get(_TEMPLATE)
    if isinstance(template, str):
        tokens, kinds = _tokens(settings)
        unknown = _id(settings, "unknown")  # which SmolLM 2 calls so, too
        ids += [
            i
            for i in np.flatnonzero(kinds == _CONTROL).tolist()
            if (tokens[i] in _ENDS_OF_TURNS and tokens[i] in template)
            or (tokens[i] in _ENDS_OF_TEXTS and i != unknown)
        ]
    return tuple(dict.fromkeys(i for i in ids if i is not None))


def _config(settings: Mapping[str, Any], tokens: Sequence[str]) -> dict[str, Any]:
    """A `tokenizer_config.json`."""
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
    }
    for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("padding", "pad"), ("unknown", "unk")):
        if (i := _id(settings, ours)) is not None:
            config[f"{theirs}_token"] = tokens[i]
    if isinstance(settings.get(_TEMPLATE), str):
        config["chat_template"] = settings[_TEMPLATE]
    return config


# ------------------------------------------------------------------------------------ The tokens


def _value(settings: Mapping[str, Any], name: str, kind: type, default: Any = None) -> Any:
    value = settings.get(f"{_PREFIX}{name}", default)
    if not isinstance(value, kind):
        what = "no such setting" if value is None else f"{type(value).__name__}"
        raise UsageError(f"{_PREFIX}{name}: expected {kind.__name__}, found {what}.")
    return value


def _id(settings: Mapping[str, Any], name: str) -> int | None:
    """The id of a token that the settings name, if they do."""
    key = f"{_PREFIX}{name}_token_id"
    if (value := settings.get(key)) is None:
        return None
    count = len(_value(settings, "tokens", list))
    if type(value) is not int or not 0 <= value < count:
        raise UsageError(f"{key}: expected an id below {count:,}, found {value!r:.40}.")
    return value


def _tokens(settings: Mapping[str, Any]) -> tuple[list[str], np.ndarray]:
    """The tokens and their types, in the order of their ids."""
    tokens = _value(settings, "tokens", list)
    kinds = settings.get(f"{_PREFIX}token_type")
    if kinds is None:
        kinds = np.full(len(tokens), _NORMAL)
    if not isinstance(kinds, np.ndarray) or len(kinds) != len(tokens):
        found = f"{len(kinds)} types" if isinstance(kinds, np.ndarray) else "no list of numbers"
        raise UsageError(
            f"{_PREFIX}token_type: expected a type for each of {len(tokens)} tokens, found {found}."
        )
    if not tokens or not np.isin(kinds, range(_NORMAL, _BYTE + 1)).all():
        found = sorted({*np.asarray(kinds).tolist()} - {*range(_NORMAL, _BYTE + 1)})
        raise UsageError(
            f"{_PREFIX}token_type: expected numbers from {_NORMAL} to {_BYTE}, found "
            f"{', '.join(map(str, found[:4])) or 'none'}."
        )
    return tokens, kinds


def _vocabulary(tokens: Sequence[str], kinds: np.ndarray) -> dict[str, int]:
    """The ids of tokens; numbers that the network has rows for, and nothing else, have none."""
    used = np.flatnonzero(kinds != _UNUSED).tolist()
    vocabulary = {tokens[i]: i for i in used}
    if len(vocabulary) != len(used) or not used:
        twice = next((i for i in used if vocabulary[tokens[i]] != i), None)
        found = (
            "none"
            if twice is None
            else f"{tokens[twice]!r:.60} with the ids {twice} and {vocabulary[tokens[twice]]}"
        )
        raise UsageError(f"{_PREFIX}tokens: expected each token once, found {found}.")
    return vocabulary


def _tokenizer(
    vocabulary: Mapping[str, int],
    kinds: np.ndarray,
    model: Mapping[str, Any],
    *,
    normalizer: Mapping[str, Any] | None,
    splits: Sequence[Mapping[str, Any]],
    decoder: Mapping[str, Any],
    bos: tuple[str, int] | None,
    is_normalized: bool = False,
) -> dict[str, Any]:
    """A `tokenizer.json`.

    Args:
      vocabulary: All tokens with their ids.
      kinds: The type of each id.
      model: The settings of BPE.
      normalizer: What is done to a text first.
      splits: What splits it into words.
      decoder: What makes text of tokens.
      bos: The token that comes before a text, and its id.
      is_normalized: Whether tokens that are text are looked up in what the normalizer makes.
    """
    added = [
        {
            "id": i,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": is_normalized and _SPACE in token,
            "special": bool(kinds[i] != _USER_DEFINED),
        }
        for token, i in vocabulary.items()
        if kinds[i] in (_UNKNOWN, _CONTROL, _USER_DEFINED)
    ]
    post_processor = None
    if bos is not None:
        token, i = bos
        text = {"Sequence": {"id": "A", "type_id": 0}}
        post_processor = {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": token, "type_id": 0}}, text],
            "pair": [text, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {token: {"id": token, "ids": [i], "tokens": [token]}},
        }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": normalizer,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": list(splits)} if splits else None,
        "post_processor": post_processor,
        "decoder": decoder,
        "model": {"type": "BPE", **model, "vocab": dict(vocabulary)},
    }


def _bos(
    settings: Mapping[str, Any], tokens: Sequence[str], *, default: bool
) -> tuple[str, int] | None:
    """The token that comes before a text, and its id, if one does."""
    i = _id(settings, "bos")
    if i is None or not _value(settings, "add_bos_token", bool, default):
        return None
    return tokens[i], i


# ----------------------------------------------------------------------------------- Byte-level


def _byte_level_bpe(
    settings: Mapping[str, Any], tokens: Sequence[str], kinds: np.ndarray
) -> dict[str, Any]:
    split = settings.get(f"{_PREFIX}pre")
    if not isinstance(split, str) or split not in _SPLITS:
        raise UsageError(f"{_PREFIX}pre: expected {', '.join(_SPLITS)}, found {split!r:.40}.")
    vocabulary = _vocabulary(tokens, kinds)
    merges = []
    for merge in _value(settings, "merges", list):
        left, space, right = merge.partition(" ")
        if not space or not {left, right, left + right} <= vocabulary.keys():
            raise UsageError(
                f"{_PREFIX}merges: expected pairs of tokens that make a token, found {merge!r:.60}."
            )
        merges.append([left, right])
    model = {
        "unk_token": None,
        "byte_fallback": False,
        "ignore_merges": split in _WHOLE_WORDS,
        "merges": merges,
    }
    return _tokenizer(
        vocabulary,
        kinds,
        model,
        normalizer={"type": "NFC"} if split in _COMPOSED else None,
        splits=_SPLITS[split],
        decoder=_byte_level(use_regex=True),
        bos=_bos(settings, tokens, default=split in _WITH_BOS),
    )


# -------------------------------------------------------------------------------- Sentencepiece


def _sentencepiece_bpe(
    settings: Mapping[str, Any], tokens: Sequence[str], kinds: np.ndarray
) -> dict[str, Any]:
    changes = _value(settings, "remove_extra_whitespaces", bool, False)
    if changes or f"{_PREFIX}precompiled_charsmap" in settings:
        found = "remove_extra_whitespaces=True" if changes else "precompiled_charsmap"
        raise UsageError(
            f"expected a tokenizer that takes a text as it is, found {_PREFIX}{found}."
        )
    scores = settings.get(f"{_PREFIX}scores")
    if not isinstance(scores, np.ndarray) or len(scores) != len(tokens):
        raise UsageError(f"{_PREFIX}scores: expected a score for each of {len(tokens)} tokens.")
    # The converter writes tokens that users defined with spaces; the others have this sign.
    tokens = [
        token.replace(" ", _SPACE) if kind == _USER_DEFINED else token
        for token, kind in zip(tokens, kinds.tolist(), strict=True)
    ]
    vocabulary = _vocabulary(tokens, kinds)
    unknown = np.flatnonzero(kinds == _UNKNOWN).tolist()
    model = {
        "unk_token": tokens[unknown[0]] if unknown else None,
        "byte_fallback": bool((kinds == _BYTE).any()),
        "fuse_unk": True,
        "ignore_merges": False,
        "merges": _merges(tokens, kinds, scores),
    }
    has_prefix = _value(settings, "add_space_prefix", bool, True)
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    prepend = {"type": "Prepend", "prepend": _SPACE}
    steps: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if has_prefix:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return _tokenizer(
        vocabulary,
        kinds,
        model,
        normalizer={"type": "Sequence", "normalizers": [prepend, replace]}
        if has_prefix
        else replace,
        splits=(),
        decoder={"type": "Sequence", "decoders": steps},
        bos=_bos(settings, tokens, default=True),
        is_normalized=not has_prefix,
    )


_LONGEST = 512  # characters of a token that merges make


def _merges(tokens: Sequence[str], kinds: np.ndarray, scores: np.ndarray) -> list[list[str]]:
    """The pairs that make a token, the one of the highest score first.

    Sentencepiece joins the two neighbours whose joint token has the highest score. It knows no
    pairs: any two tokens that make one are joined. Tokens that were defined, and bytes, stay whole.
    """
    normal = np.flatnonzero(kinds == _NORMAL).tolist()
    ids = {tokens[i]: i for i in normal}
    if any(len(token) > _LONGEST for token in ids):
        raise UsageError(f"{_PREFIX}tokens: expected at most {_LONGEST} characters each.")
    merges = []
    for token, i in ids.items():
        halves = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        pairs = [(left, right) for left, right in halves if left in ids and right in ids]
        pairs.sort(key=lambda pair: (ids[pair[0]], ids[pair[1]]))
        merges += [(float(scores[i]), left, right) for left, right in pairs]
    # Of equal scores the longer left half first, as transformers has it.
    merges.sort(key=lambda one: (one[0], len(one[1]), len(one[2])), reverse=True)
    return [[left, right] for _, left, right in merges]
