"""Requests to describe a restaurant, for a model that was told to follow instructions."""

import itertools
import json
import os
import pathlib
import random
from collections.abc import Mapping, Sequence
from typing import Any

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

_INSTRUCTION = "Write one sentence that describes this restaurant."
# What a prompt may state beside what the database has. They are ours.
_KINDS = ("pub", "coffee shop", "restaurant")
_RATINGS = ("1 out of 5", "3 out of 5", "5 out of 5", "low", "average", "high")
# What a sentence may claim of a restaurant in a word, and its other names.
_CLAIMS: Mapping[str, Mapping[str, Sequence[str]]] = {
    "award": {
        "Michelin-starred": ["Michelin", "Michelin star", "Michelin stars"],
        "award-winning": ["award winning", "awards"],
    },
    "family": {"family-friendly": ["kid-friendly", "families"]},
    "place": {
        name: []
        for name in (
            *("Cambridge", "Oxford", "London", "Dublin", "Edinburgh", "Paris", "Barcelona", "Rome"),
            *("Milan", "Tuscany", "Istanbul", "Mumbai", "Delhi", "Bangkok", "Beijing", "Shanghai"),
            *("Hong Kong", "Tokyo", "New York", "San Francisco", "Los Angeles"),
        )
    }
    | {"riverside": ["riverfront"], "seaside": ["seafront"], "countryside": []},
    "food": {
        "Italian": ["Italy"],
        "French": ["France"],
        "Mediterranean": [],
        "Spanish": ["Spain"],
        "Mexican": ["Mexico"],
        "Japanese": ["Japan", "sushi"],
        "Chinese": ["China"],
        "Indian": ["India"],
        "Thai": ["Thailand"],
        "Korean": ["Korea"],
        "Vietnamese": ["Vietnam"],
        "Turkish": ["Turkey"],
        "Greek": ["Greece"],
        "Lebanese": ["Lebanon"],
        "Moroccan": ["Morocco"],
        "African": ["Africa"],
        "Caribbean": [],
        "German": ["Germany"],
        "Portuguese": ["Portugal"],
        "Irish": ["Ireland"],
        "Scottish": ["Scotland"],
        "British": ["English"],
        "American": [],
        "Asian": ["Asia"],
        "European": ["Europe"],
        "international": [],
        "seafood": [],
        "vegetarian": ["vegan"],
    },
}


def restaurants(
    output_dir: str | os.PathLike,
    *,
    seed: int = 0,
    eval_fraction: float = 0.5,
    num_train_prompts: int = 256,
    num_eval_prompts: int = 256,
    source_dir: str | os.PathLike | None = None,
) -> dict[str, int]:
    """Writes requests to describe a restaurant of Cambridge, of which two things are stated.

        Write one sentence that describes this restaurant. name: Curry Garden, customer rating: low

    Names and what is stated come from the venues of ConvLab-3 (Apache-2.0); kinds and ratings are
    ours. A restaurant is in one of the two files.

    Files written to `output_dir`: train.jsonl and eval.jsonl, prompts; unrelated.jsonl, prompts of
    other kinds; gazetteer.json, what a sentence may claim of a restaurant in a word, for
    `annotators.Gazetteer`.

    Args:
        output_dir: folder, created if need be.
        seed: decides the split, and which prompts are chosen.
        eval_fraction: part of the restaurants kept for evaluation.
        num_train_prompts: number of prompts in train.jsonl, as far as there are so many.
        num_eval_prompts: number of prompts in eval.jsonl, as far as there are so many.
        source_dir: the folder of the package convlab; None means the installed one.

    Returns:
        The number of restaurants and of records in each file, by name.

    Raises:
        UsageError: the package or one of its files is missing, or `eval_fraction` leaves nothing
            for one of the files.
    """
    source = package_dir("convlab", "convlab==3.0.1", source_dir)
    found = {
        _title(row["name"]): row
        for row in read_json(source / "human_eval" / "db" / "restaurant_db.json")
    }
    eval_names = held_out(found, eval_fraction, seed)
    splits: dict[str, list[Record]] = {}
    for split, number in (("train", num_train_prompts), ("eval", num_eval_prompts)):
        prompts = [
            f"{_INSTRUCTION} name: {name}, {stated}"
            for name in sorted(found)
            if (name in eval_names) == (split == "eval")
            for stated in _statements(found[name])
        ]
        random.Random(f"{seed} {split}").shuffle(prompts)
        splits[split] = [
            Record(id=f"{split}-{k}", inputs=prompt) for k, prompt in enumerate(prompts[:number])
        ]
    check_not_empty(eval_fraction, **splits)
    counts = write_splits(output_dir, splits | {"unrelated": instructions()})
    with files.replacing(pathlib.Path(output_dir) / "gazetteer.json") as unfinished:
        text = json.dumps(_CLAIMS, indent=2, ensure_ascii=False)
        unfinished.write_text(text + "\n", encoding="utf-8")
    return {"restaurants": len(found), **counts}


def _statements(row: Mapping[str, Any]) -> list[str]:
    """What a prompt says of a restaurant beside its name, one thing each."""
    fields = (("food", "food"), ("area", "area"), ("price", "pricerange"))
    known = [f"{slot}: {row[field]}" for slot, field in fields if row.get(field)]
    kinds = (f"type: {kind}" for kind in _KINDS)
    return [*known, *itertools.chain(kinds, (f"customer rating: {r}" for r in _RATINGS))]


def _title(name: str) -> str:
    """With a capital on each word: "the missing sock" is "The Missing Sock"."""
    return " ".join(word[:1].upper() + word[1:] for word in name.split())
