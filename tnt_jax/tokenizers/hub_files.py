"""The files of a model's directory that say how it reads and writes text, and what each states."""

import pathlib
from collections.abc import Mapping
from typing import Any

from etils import epath

from tnt_jax.runtime import files
from tnt_jax.runtime.errors import UsageError

TOKENIZER = "tokenizer.json"
SETTINGS = "tokenizer_config.json"
GENERATION = "generation_config.json"
# What says how a model reads and writes text: copied, never rewritten.
FILES = (
    TOKENIZER,
    SETTINGS,
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "tokenizer.model",
)
# What decides what `loaded_tokenizer` makes of them.
READ = (TOKENIZER, SETTINGS, GENERATION, "special_tokens_map.json", "config.json")


def is_known(tokenizer: Mapping[str, Any]) -> bool:
    """Whether the content of a `tokenizer.json` is of a kind that `HubTokenizer` reads."""
    return model_type(tokenizer) == "BPE"


def model_type(tokenizer: Mapping[str, Any]) -> str | None:
    """Which algorithm the content of a `tokenizer.json` is of, such as "BPE"."""
    model = tokenizer.get("model") or {}
    return model.get("type", "BPE" if "merges" in model else None)  # old files do not state it


def settings(folder: epath.Path, name: str) -> Mapping[str, Any]:
    """What a JSON file of a directory says; nothing where it is not there."""
    return files.read_object(folder / name) if (folder / name).exists() else {}


def control_texts(folder: epath.Path) -> dict[str, str]:
    """How `bos_token`, `eos_token` and others that a directory states are written."""
    found = {}
    for name in ("special_tokens_map.json", SETTINGS):
        for key, value in settings(folder, name).items():
            text = value.get("content") if isinstance(value, Mapping) else value
            if key.endswith("_token") and isinstance(text, str):
                found[key] = text
    return found


def end_ids(
    folder: epath.Path, names: Mapping[int, str], eos_token: str | None, where: str
) -> tuple[int, ...]:
    """The ids that end an output, of the added tokens: no word of the vocabulary ends a text.

    Those of `generation_config.json`, which transformers and vLLM follow; `config.json` may keep a
    default that was never the model's, and counts where the former states none. The tokenizer's own
    `eos_token` is an end besides, as in vLLM.
    """
    config = settings(folder, "config.json")
    stated = settings(folder, GENERATION).get("eos_token_id")
    if stated is None:
        stated = config.get("eos_token_id")
    if stated is None:
        stated = (config.get("text_config") or {}).get("eos_token_id")
    ids = [] if stated is None else [stated] if isinstance(stated, int) else list(stated)
    ids += [i for i, name in names.items() if name == eos_token]
    if not ids:
        raise UsageError(
            f"{where}: expected an id that ends a text, found none. Set eos_token_id in "
            f"{GENERATION}, or eos_token in {SETTINGS}."
        )
    for i in ids:
        if i not in names:
            raise UsageError(
                f"{where}: expected eos_token_id to be ids of added tokens, found {i!r}, which is "
                f"none of them. Correct it in {GENERATION}, or in config.json."
            )
    return tuple(dict.fromkeys(ids))


def check_added(folder: epath.Path, names: Mapping[int, str], where: str) -> None:
    """The settings list tokens as well: none may be there alone."""
    for i, one in (settings(folder, SETTINGS).get("added_tokens_decoder") or {}).items():
        if names.get(int(i)) != one["content"]:
            raise UsageError(
                f"{where}: expected the tokens of {SETTINGS}, found id {i} to be "
                f"{names.get(int(i))!r} in place of {one['content']!r}. Save the tokenizer again, "
                "with save_pretrained of transformers."
            )


def beyond_rows(folder: epath.Path, added: Mapping[int, Mapping[str, Any]]) -> set[int]:
    """The control tokens that the model of the same directory has no row for, and never sees.

    Gemma 3's text models share a tokenizer with those that see images: its last id stands for a
    piece of one.
    """
    num_rows = settings(folder, "config.json").get("vocab_size")
    if not isinstance(num_rows, int):
        return set()
    return {i for i, one in added.items() if i >= num_rows and one["special"]}


def versions(folder: pathlib.Path) -> tuple[tuple[int, int, int] | None, ...]:
    """What tells the files that are `READ` from others in their place."""
    found = []
    for name in READ:
        try:
            state = (folder / name).stat()
        except OSError:  # most have not all of them
            found.append(None)
        else:
            found.append((state.st_ino, state.st_size, state.st_mtime_ns))
    return tuple(found)
