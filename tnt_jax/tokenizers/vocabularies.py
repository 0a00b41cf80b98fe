"""The vocabulary of a model: from a sentencepiece file or from a tokenizer's files, and back.

Hugging Face's files (`spiece.model`, `tokenizer.json`, `tokenizer_config.json`) become the
tokeniser with the same ids. A `tokenizer.json` alone, as transformers 5 writes it, holds all of a
sentencepiece model: its pieces with their scores, and how text is normalised. One of BPE, as
decoder-only models have, is read as it is (`hub_tokenizer`).
"""

import base64
import datetime
import re
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath
from sentencepiece import sentencepiece_model_pb2

from tnt_jax.runtime import console, files
from tnt_jax.runtime.errors import UsageError, naming_file
from tnt_jax.tokenizers import chat, hub_files, hub_tokenizer, templates, tokenization
from tnt_jax.tokenizers.hub_files import TOKENIZER

T5_EXTRA_IDS = 100
_BYT5_EXTRA_IDS = 125
_MOST_EXTRA_IDS = 100_000
_SENTENCEPIECE = "spiece.model"
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_EXTRA_ID = re.compile(r"<extra_id_(\d+)>")
# A model has rows up to here beyond the ids of its vocabulary: 32,128 for T5's 32,100, 151,936 for
# the 151,665 of Qwen, and 102,400 for the 100,015 of DeepSeek LLM 7B.
_MOST_PADDING = 128
_MOST_PADDING_OF_HUB = 4096

_protos: Any = sentencepiece_model_pb2  # protobuf makes its classes when it is imported
_Pieces = _protos.ModelProto


def of_file(path: str, extra_ids: int | None = None) -> tokenization.SentencePiece:
    """The vocabulary of a sentencepiece model, with `extra_ids` (None: T5's 100) after its own."""
    extra_ids = _checked(T5_EXTRA_IDS if extra_ids is None else extra_ids)
    return tokenization.SentencePiece(path, extra_ids)


def _checked(extra_ids: int) -> int:
    """Each of them becomes a piece in memory, however many a file says that there are."""
    if not 0 <= extra_ids <= _MOST_EXTRA_IDS:
        raise UsageError(
            f"EXTRA_IDS: expected 0 to {_MOST_EXTRA_IDS:,} ids after the pieces of the vocabulary, "
            f"found {extra_ids:,}."
        )
    return extra_ids


def has_tokenizer(folder: epath.Path) -> bool:
    """Whether a directory says how text is tokenised."""
    names = (_SENTENCEPIECE, TOKENIZER)
    return any((folder / name).exists() for name in names) or _is_bytes(_settings(folder))


def of_directory(folder: epath.Path, extra_ids: int | None = None) -> tokenization.Tokeniser:
    """The vocabulary of a directory's tokenizer.

    Args:
      folder: With `spiece.model`, with `tokenizer.json` (of T5, or BPE as decoder-only models have
        it), or of ByT5, whose tokens are bytes.
      extra_ids: After the pieces; None takes what the directory says.

    Raises:
      UsageError: There is no tokenizer, or one of another kind.
    """
    try:
        return _of_directory(folder, extra_ids)
    except UsageError:
        raise
    except (AttributeError, IndexError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise UsageError(
            f"{folder}: expected a tokenizer as transformers writes T5's, found files of one that "
            f"cannot be read: {type(error).__name__}: {error}."
        ) from error


def _of_directory(folder: epath.Path, extra_ids: int | None) -> tokenization.Tokeniser:
    settings = _settings(folder)
    if _is_bytes(settings):
        return tokenization.Bytes(
            _checked(_byt5_extra_ids(folder, settings) if extra_ids is None else extra_ids)
        )
    if not has_tokenizer(folder):
        raise UsageError(
            f"VOCABULARY_PATH: expected {_SENTENCEPIECE} or {TOKENIZER} in {folder}, found "
            "neither. "
            + (
                f"From tokenizer.model, AutoTokenizer.from_pretrained({str(folder)!r})"
                f".save_pretrained({str(folder)!r}) of transformers makes {TOKENIZER}."
                if (folder / "tokenizer.model").exists()
                else "Set VOCABULARY_PATH to the sentencepiece model that this model was trained "
                "with."
            )
        )
    tokenizer = _json(folder / TOKENIZER)
    has_pieces = (folder / _SENTENCEPIECE).exists()
    if not has_pieces and hub_files.is_known(tokenizer):
        if extra_ids:
            raise UsageError(
                f"EXTRA_IDS: expected None, for {folder} has all tokens of its model, found "
                f"{extra_ids}."
            )
        return hub_tokenizer.HubTokenizer(str(folder))
    if has_pieces:
        file = str(folder / _SENTENCEPIECE)
        with naming_file(file):
            content = (folder / _SENTENCEPIECE).read_bytes()
        pieces = _parse(content, file)
    else:
        file = None
        pieces = _from_tokenizer_json(tokenizer, str(folder / TOKENIZER))
    added = _added_tokens(folder, tokenizer, {piece.piece for piece in pieces.pieces})
    numbers = [int(match[1]) for name in added if (match := _EXTRA_ID.fullmatch(name))]
    is_standard = len(numbers) == len(added) and numbers == list(range(len(numbers)))[::-1]
    if not is_standard:
        # Tokens that somebody added: pieces of their own, after T5's extra ids.
        others = [name for name in added if not _EXTRA_ID.fullmatch(name)]
        console.log(
            f"Warning: {folder} has {len(others)} tokens that T5 does not ({', '.join(others[:4])}"
            f"{' ...' if others[4:] else ''}). Beside spaces transformers tokenises such text "
            "otherwise; give target_ids in records that have them."
        )
        for name in added:
            # As T5's extra ids are named: they own the space before them.
            piece = f"\u2581{name}" if _EXTRA_ID.fullmatch(name) else name
            pieces.pieces.add(piece=piece, score=0.0, type=_Pieces.SentencePiece.USER_DEFINED)
        return of_file(_temporary_file(pieces), 0)
    if extra_ids is None:
        stated = settings.get("extra_ids")
        extra_ids = len(numbers) or (T5_EXTRA_IDS if stated is None else int(stated))
    return of_file(file or _temporary_file(pieces), extra_ids)


def with_template(
    vocabulary: tokenization.Tokeniser,
    chat_template: str | None,
    date: str | None,
    kwargs: Mapping[str, Any] | None = None,
) -> tokenization.Tokeniser:
    """The same vocabulary, whose prompts are written by a chat template where there is one.

    Args:
      vocabulary: The tokeniser of a directory.
      chat_template: "auto" is the directory's own, if it has one; None is none; else a file.
      date: What a template that writes today's date writes, as YYYY-MM-DD; None is today.
      kwargs: Further variables for the template, such as `enable_thinking`.

    Raises:
      UsageError: The file is none, the date is none, there are such variables and no template, or
        the vocabulary is not of a chat model.
    """
    template_kwargs = templates.kwargs_of(kwargs)
    try:
        date = None if date is None else datetime.date.fromisoformat(date).isoformat()
    except (TypeError, ValueError):
        raise UsageError(
            f"CHAT_DATE: expected a date as YYYY-MM-DD or None, found {date!r:.60}."
        ) from None
    if not isinstance(vocabulary, hub_tokenizer.HubTokenizer):
        if chat_template in ("auto", None):
            _refuse_kwargs(template_kwargs)
            return vocabulary
        raise UsageError(
            f'CHAT_TEMPLATE: expected "auto" or None for this model, which is no chat model, '
            f"found {chat_template!r}."
        )
    folder = epath.Path(vocabulary.folder)
    if chat_template is None or (chat_template == "auto" and not templates.has_template(folder)):
        _refuse_kwargs(template_kwargs)
        return vocabulary
    if chat_template == "auto":
        template = templates.of_directory(folder, vocabulary)
    else:
        template = templates.of_file(chat_template, vocabulary)
    return chat.ChatTokenizer(
        vocabulary.folder, template.source, template.where, date, template_kwargs
    )


def _refuse_kwargs(kwargs: str) -> None:
    if kwargs != templates.NO_KWARGS:
        raise UsageError(
            "CHAT_TEMPLATE_KWARGS: expected a model with a chat template, found one without, or "
            f"CHAT_TEMPLATE=None. Leave {kwargs:.100} out."
        )


def _settings(folder: epath.Path) -> Mapping[str, Any]:
    return _json(folder / "tokenizer_config.json")


def _json(path: epath.Path) -> Mapping[str, Any]:
    return files.read_object(path) if path.exists() else {}


def _is_bytes(settings: Mapping[str, Any]) -> bool:
    return str(settings.get("tokenizer_class", "")).startswith("ByT5")


def _byt5_extra_ids(folder: epath.Path, settings: Mapping[str, Any]) -> int:
    # transformers writes extra_ids 0 and lists them as tokens; which list depends on its version.
    listed = set(_added_tokens(folder, {}, set()))
    for key in ("additional_special_tokens", "extra_special_tokens"):
        listed.update(str(token) for token in settings.get(key) or ())
    num_listed = sum(_EXTRA_ID.fullmatch(name) is not None for name in listed)
    return num_listed or int(settings.get("extra_ids", _BYT5_EXTRA_IDS))


def _parse(content: bytes, where: str) -> _Pieces:
    try:
        return _Pieces.FromString(content)
    except Exception as error:  # protobuf's DecodeError, of whichever implementation
        raise UsageError(f"{where}: expected a sentencepiece model: {error}.") from error


def _added_tokens(folder: epath.Path, tokenizer: Mapping[str, Any], pieces: set[str]) -> list[str]:
    """Tokens after the pieces of the sentencepiece model, in the order of their ids."""
    by_id = {int(entry["id"]): entry["content"] for entry in tokenizer.get("added_tokens", ())}
    by_id |= {int(i): token for token, i in _json(folder / "added_tokens.json").items()}
    for i, entry in _settings(folder).get("added_tokens_decoder", {}).items():
        by_id[int(i)] = entry["content"]
    vocabulary = tokenizer.get("model", {}).get("vocab", ())
    if isinstance(vocabulary, list):
        by_id |= {i: name for i, (name, _) in enumerate(vocabulary) if _EXTRA_ID.fullmatch(name)}
    return [name for _, name in sorted(by_id.items()) if name not in pieces]


def _from_tokenizer_json(tokenizer: Mapping[str, Any], where: str) -> _Pieces:
    model = tokenizer.get("model", {})
    if model.get("type") != "Unigram" or model.get("unk_id") != 2:
        raise UsageError(
            f"{where}: expected BPE, or sentencepiece's unigram model as T5 has it (Unigram, "
            f"unknown 2), found {model.get('type')} with unknown {model.get('unk_id')}."
        )
    kind = _Pieces.SentencePiece
    pieces = _Pieces()
    for i, (piece, score) in enumerate(model["vocab"]):
        if _EXTRA_ID.fullmatch(piece):
            continue
        of_piece = {0: kind.CONTROL, 1: kind.CONTROL, 2: kind.UNKNOWN}.get(i, kind.NORMAL)
        if model.get("byte_fallback") and _BYTE.fullmatch(piece):
            of_piece = kind.BYTE
        pieces.pieces.add(piece=piece, score=score, type=of_piece)
    trainer, normalizer = pieces.trainer_spec, pieces.normalizer_spec
    trainer.model_type = _protos.TrainerSpec.UNIGRAM
    trainer.vocab_size = len(pieces.pieces)
    trainer.byte_fallback = bool(model.get("byte_fallback"))
    trainer.pad_id, trainer.eos_id, trainer.unk_id, trainer.bos_id = 0, 1, 2, -1
    trainer.pad_piece, trainer.eos_piece, trainer.unk_piece = (
        piece.piece for piece in pieces.pieces[:3]
    )
    charsmap = _find(tokenizer.get("normalizer"), "precompiled_charsmap")
    if charsmap is not None:
        normalizer.precompiled_charsmap = base64.b64decode(charsmap)
    normalizer.add_dummy_prefix = True
    normalizer.remove_extra_whitespaces = True
    normalizer.escape_whitespaces = True
    return pieces


def _find(value: Any, key: str) -> Any:
    """The value of a key, wherever it is nested."""
    if isinstance(value, dict):
        if value.get(key) is not None:
            return value[key]
        value = list(value.values())
    if isinstance(value, list):
        return next((found for x in value if (found := _find(x, key)) is not None), None)
    return None


def _temporary_file(pieces: _Pieces) -> str:
    """A file, because seqio, where a task has this vocabulary, reads it from one."""
    folder = files.temporary_folder("vocabulary")
    (folder / _SENTENCEPIECE).write_bytes(pieces.SerializeToString())
    return str(folder / _SENTENCEPIECE)


# ------------------------------------------------------------------------------------- Writing


def write(folder: epath.Path, vocabulary: tokenization.Tokeniser) -> None:
    """Writes a vocabulary as the tokenizer files of a directory of Hugging Face's."""
    if isinstance(vocabulary, hub_tokenizer.HubTokenizer):
        vocabulary.copy_files(folder)
        return
    settings: dict[str, Any] = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    if isinstance(vocabulary, tokenization.SentencePiece):
        settings |= {"tokenizer_class": "T5Tokenizer", "extra_ids": vocabulary.extra_ids}
        content = epath.Path(vocabulary.sentencepiece_model_file).read_bytes()
        (folder / _SENTENCEPIECE).write_bytes(content)
    elif isinstance(vocabulary, tokenization.Bytes):
        settings |= {"tokenizer_class": "ByT5Tokenizer", "extra_ids": vocabulary.extra_ids}
    (folder / "tokenizer_config.json").write_text(files.json_text(settings))


# ------------------------------------------------------------------------------------- Checking


def check_size(vocabulary: tokenization.Tokeniser, model_size: int) -> None:
    """Raises a UsageError unless a vocabulary and a model's rows can belong together."""
    is_of_hub = isinstance(vocabulary, hub_tokenizer.HubTokenizer)
    most = _MOST_PADDING_OF_HUB if is_of_hub else _MOST_PADDING
    if not vocabulary.size <= model_size <= vocabulary.size + most:
        raise UsageError(
            f"VOCABULARY: expected the vocabulary of a model with {model_size} rows "
            f"(vocab_size): as many ids, or up to {most:,} fewer; found "
            f"{vocabulary.size}. Give the vocabulary, and EXTRA_IDS, that the model was trained "
            "with."
        )


def check_same(
    vocabulary: tokenization.Tokeniser, folder: epath.Path, where: str | None = None
) -> None:
    """Raises a UsageError where a model comes with a tokenizer that has other pieces.

    Args:
      vocabulary: The tokeniser of inputs and targets.
      folder: The folder with the model's own tokeniser.
      where: The model's path, for the message; None is the folder.
    """
    where = where or str(folder)
    if not has_tokenizer(folder):
        return
    own = of_directory(folder)
    tokenization.check_vocabulary(own)
    pieces, own_pieces = _pieces(vocabulary), _pieces(own)
    num_shared = min(len(pieces), len(own_pieces))
    for i in range(num_shared):
        if pieces[i] != own_pieces[i]:
            raise UsageError(
                f"VOCABULARY_PATH: expected the vocabulary of the model in {where}, found "
                f"another: id {i} is {own_pieces[i]!r} there and {pieces[i]!r} here. Set "
                f"VOCABULARY_PATH to {where}."
            )


def _pieces(vocabulary: tokenization.Tokeniser) -> Sequence[str | None]:
    if isinstance(vocabulary, hub_tokenizer.HubTokenizer):
        return vocabulary.pieces()
    if not isinstance(vocabulary, tokenization.SentencePiece):
        return [f"byte {i}" for i in range(vocabulary.size)]
    return vocabulary.processor.id_to_piece(list(range(vocabulary.size - vocabulary.extra_ids)))
