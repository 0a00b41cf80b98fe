"""A message in, a reply out: conversations of the package chitchat-dataset."""

import collections
import itertools
import math
import os
import pathlib
import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tnt_jax import annotators
from tnt_jax.data import words
from tnt_jax.data.records import Record
from tnt_jax.experiments.corpora.instructions import instructions
from tnt_jax.experiments.corpora.split import (
    check_not_empty,
    held_out,
    package_dir,
    read_json,
    write_splits,
)
from tnt_jax.runtime import files
from tnt_jax.runtime.errors import UsageError

# How a model that was told to be polite begins, whatever it was told.
_PHRASES = (
    *(
        f"{subject} {degree}{feeling}"
        for subject in ("I'm", "I am")
        for degree in ("", "so ", "really ", "very ", "truly ", "always ")
        for feeling in (
            *("glad", "happy", "sorry", "excited", "thrilled", "delighted", "proud", "grateful"),
            *("pleased", "honored", "here to"),
        )
    ),
    *("I'd love to", "I would love to", "I'd be happy to", "I'd be glad to", "thank you for"),
)


def chitchat(
    output_dir: str | os.PathLike,
    *,
    seed: int = 0,
    eval_fraction: float = 0.05,
    max_words: int | None = None,
    lower_case: bool = False,
    num_mining_prompts: int = 20_000,
    num_eval_prompts: int | None = None,
    lexicon_scorer: str | None = None,
    lexicon_threshold: float = 0.5,
    lexicon_min_count: int = 3,
    source_dir: str | os.PathLike | None = None,
) -> dict[str, int]:
    """Writes (message, reply) pairs of the Chit-Chat Challenge (BYU, MIT licence).

    A message is what one person wrote before the other answered, its lines joined by a space. Two
    messages in sequence make a pair where both have two words or more. All pairs of a conversation
    are in one file.

    Files written to `output_dir`: train.jsonl, pairs; mine.jsonl, some messages of those;
    eval.jsonl, pairs of other conversations; with a scorer lexicon.txt, the words of the replies in
    train.jsonl that it calls unwanted, each by itself.

    Args:
        output_dir: folder, created if need be.
        seed: decides the split, and which messages are chosen.
        eval_fraction: part of the conversations kept for evaluation.
        max_words: leaves out pairs of which a side has more; None keeps all.
        lower_case: whether messages and replies are put into lower case: a small model has less to
            learn.
        num_mining_prompts: number of messages in mine.jsonl, as far as there are so many.
        num_eval_prompts: number of pairs in eval.jsonl, as far as there are so many; None is all.
        lexicon_scorer: what scores words, as "module:function" (`annotators.Classifier.scorer`);
            None writes no lexicon.txt.
        lexicon_threshold: the least score of a word in lexicon.txt.
        lexicon_min_count: the least number of replies that have a word of lexicon.txt.
        source_dir: the folder of the package chitchat_dataset; None means the installed one.

    Returns:
        The number of conversations and of records in each file, by name.

    Raises:
        UsageError: the package or its file is missing, `eval_fraction` leaves nothing for training
            or for evaluation, or the scorer is not there or calls no word unwanted.
    """
    conversations = _conversations(source_dir)
    eval_ids = held_out(conversations, eval_fraction, seed)

    splits: dict[str, list[Record]] = {"train": [], "eval": []}
    for conversation_id in sorted(conversations):
        split = "eval" if conversation_id in eval_ids else "train"
        messages = _messages(conversations[conversation_id])
        if lower_case:
            messages = [message.lower() for message in messages]
        for turn, pair in enumerate(itertools.pairwise(messages)):
            if all(2 <= len(text.split()) <= (max_words or math.inf) for text in pair):
                message, reply = pair
                splits[split].append(
                    Record(id=f"{conversation_id}-{turn}", inputs=message, targets=reply)
                )
    check_not_empty(eval_fraction, **splits)
    splits["eval"] = _sample(splits["eval"], num_eval_prompts, seed)
    splits["mine"] = [
        Record(id=f"mine-{row.id}", inputs=row.inputs)
        for row in _sample(splits["train"], num_mining_prompts, seed)
    ]
    output_dir = pathlib.Path(output_dir)
    if lexicon_scorer is not None:
        _write_lexicon(
            output_dir / "lexicon.txt",
            [row.targets for row in splits["train"]],
            lexicon_scorer,
            lexicon_threshold,
            lexicon_min_count,
        )
    return {"conversations": len(conversations), **write_splits(output_dir, splits)}


def small_talk(
    output_dir: str | os.PathLike,
    *,
    seed: int = 0,
    eval_fraction: float = 0.5,
    min_words: int = 4,
    max_words: int = 24,
    num_train_prompts: int = 256,
    num_eval_prompts: int = 256,
    source_dir: str | os.PathLike | None = None,
) -> dict[str, int]:
    """Writes messages of the same conversations for a chat model, and phrases that it overuses.

    Files written to `output_dir`: train.jsonl and eval.jsonl, messages of different conversations;
    unrelated.jsonl, prompts of other kinds; phrases.txt, the phrases that a polite model begins
    with ("I'm so glad"), for `annotators.Lexicon`.

    Args:
        output_dir: folder, created if need be.
        seed: decides the split, and which messages are chosen.
        eval_fraction: part of the conversations kept for evaluation.
        min_words: fewest words of a message.
        max_words: most words of a message.
        num_train_prompts: number of messages in train.jsonl, as far as there are so many.
        num_eval_prompts: number of messages in eval.jsonl, as far as there are so many.
        source_dir: the folder of the package chitchat_dataset; None means the installed one.

    Returns:
        The number of conversations and of records in each file, by name.

    Raises:
        UsageError: the package or its file is missing, or `eval_fraction` leaves nothing for one
            of the files.
    """
    conversations = _conversations(source_dir)
    eval_ids = held_out(conversations, eval_fraction, seed)
    splits: dict[str, dict[str, Record]] = {"train": {}, "eval": {}}  # by message: each once
    for conversation_id in sorted(conversations):
        split = "eval" if conversation_id in eval_ids else "train"
        for turn, message in enumerate(_messages(conversations[conversation_id])):
            if min_words <= len(message.split()) <= max_words:
                record = Record(id=f"{conversation_id}-{turn}", inputs=message)
                splits[split].setdefault(message, record)
    for message in splits["train"].keys() & splits["eval"].keys():
        del splits["eval"][message]
    check_not_empty(eval_fraction, **splits)
    numbers = {"train": num_train_prompts, "eval": num_eval_prompts}
    found = {
        split: _sample(list(rows.values()), numbers[split], seed) for split, rows in splits.items()
    }
    counts = write_splits(output_dir, found | {"unrelated": instructions()})
    with files.replacing(pathlib.Path(output_dir) / "phrases.txt") as unfinished:
        unfinished.write_text("\n".join(_PHRASES) + "\n", encoding="utf-8")
    return {"conversations": len(conversations), **counts}


def _conversations(source_dir: str | os.PathLike | None) -> Mapping[str, Any]:
    source = package_dir("chitchat_dataset", "chitchat-dataset==0.9.0", source_dir)
    return read_json(source / "dataset.json")


def _messages(conversation: Mapping[str, Any]) -> list[str]:
    """What one person wrote before the other answered, its lines as one."""
    return [
        " ".join(word for line in message for word in line["text"].split())
        for message in conversation["messages"]
    ]


def _sample(items: Sequence[Record], number: int | None, seed: int) -> list[Record]:
    """Draws `number` of the items, and keeps their order."""
    if number is None or number >= len(items):
        return list(items)
    return [items[k] for k in sorted(random.Random(seed).sample(range(len(items)), number))]


def _write_lexicon(
    path: pathlib.Path, texts: Iterable[str], scorer: str, threshold: float, min_count: int
) -> None:
    """The words of texts that a scorer calls unwanted."""
    counts = collections.Counter(
        word for text in texts for word in {text[a:b].lower() for a, b in words.extents(text)}
    )
    listed = sorted(word for word, count in counts.items() if count >= min_count)
    scores = annotators.Classifier(scorer=scorer).score(listed)
    kept = [word for word, score in zip(listed, scores, strict=True) if score >= threshold]
    if not kept:
        raise UsageError(
            f"lexicon_threshold={threshold}: {scorer} gives no word of the replies so much; the "
            f"most is {max(scores, default=math.nan):.3g}. Choose a lower one."
        )
    with files.replacing(path) as unfinished:
        unfinished.write_text("\n".join(kept) + "\n", encoding="utf-8")
