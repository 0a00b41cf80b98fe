"""Slots of a restaurant, and what someone wrote about it: the E2E data, from its CSV files."""

import csv
import itertools
import os
import pathlib
import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence

from tnt_jax.data import records
from tnt_jax.data.records import Record
from tnt_jax.experiments.corpora.split import check_not_empty, held_out
from tnt_jax.runtime import files
from tnt_jax.runtime.errors import UsageError

# `familyFriendly` is left out of what is marked: its values are yes and no.
E2E_SLOTS = ("name", "near", "food", "area", "eatType", "priceRange", "customer rating")

# How people say a value in other words.
_E2E_OTHER_NAMES = {
    "area": {"city centre": ["centre", "center", "city center"], "riverside": ["river"]},
    "eatType": {"restaurant": ["restaurants"], "pub": ["pubs"], "coffee shop": ["coffee shops"]},
    "priceRange": {
        "cheap": ["inexpensive", "low price", "low priced", "low cost"],
        "less than £20": ["under £20", "below £20"],
        "moderate": ["moderately", "average price", "average priced", "mid price", "mid priced"],
        "£20-25": ["£20 - £25", "£20-£25", "£20 to £25", "between £20 and £25"],
        "high": ["expensive", "high price", "high priced", "pricey"],
        "more than £30": ["over £30", "above £30"],
    },
    "customer rating": {
        "low": ["poorly rated", "poor"],
        "average": ["averagely rated"],
        "high": ["highly rated", "excellent"],
        **{
            f"{digit} out of 5": [
                *(f"{n} {joint} {five}" for joint in ("out of", "of") for five in ("5", "five")),
                *(f"{n} star{s}" for s in ("", "s")),
            ]
            for digit, word in (("1", "one"), ("3", "three"), ("5", "five"))
            for n in (digit, word)
        },
    },
}

E2eRow = tuple[list[tuple[str, str]], str]  # slots with their values, and the text


def read_e2e(path: str | os.PathLike) -> list[E2eRow]:
    """The rows of a CSV file of the E2E NLG data set (CC BY-SA 4.0).

    Raises:
        UsageError: the file is missing, or is none of those.
    """
    try:
        with pathlib.Path(path).open(encoding="utf-8", newline="") as file:
            rows = [(row["mr"], row["ref"]) for row in csv.DictReader(file)]
    except (FileNotFoundError, UnicodeDecodeError, KeyError, csv.Error) as error:
        raise UsageError(
            f"{path}: expected a CSV file of E2E with the columns mr and ref: "
            f"{type(error).__name__}: {error}."
        ) from error
    return [
        ([(s.strip(), value) for s, value in re.findall(r"([\w ]+)\[(.+?)\]", mr)], text)
        for mr, text in rows
    ]


def e2e_gazetteer(rows: Iterable[E2eRow]) -> dict[str, dict[str, list[str]]]:
    """{slot: {value: [further names]}} of all values in the data."""
    values: dict[str, dict[str, list[str]]] = {slot: {} for slot in E2E_SLOTS}
    for slots, _ in rows:
        for slot, value in slots:
            if slot in values:
                values[slot][value] = _E2E_OTHER_NAMES.get(slot, {}).get(value, [])
    return values


def e2e(
    output_dir: str | os.PathLike,
    *,
    source_file: str | os.PathLike,
    seed: int = 0,
    eval_fraction: float = 0.2,
    num_mining_prompts: int = 6000,
    num_eval_prompts: int = 1200,
) -> dict[str, int]:
    """Writes E2E as a data-to-text corpus in lower case: slots of a restaurant, a text about it.

    Its writers sometimes say what no slot does, and so does a model that learns from them. Further
    prompts are made by leaving slots out, never the name.

    Files written to `output_dir`: train.jsonl, pairs; mine.jsonl, further inputs, made of those of
    training; eval.jsonl, inputs made of slots that were held out; gazetteer.json, for
    `annotators.Gazetteer`.

    Args:
        output_dir: folder, created if need be.
        source_file: a CSV file of the data set; its devset will do.
        seed: decides the split and which slots are left out.
        eval_fraction: part of the lists of slots kept for evaluation.
        num_mining_prompts: number of inputs in mine.jsonl, as far as there are so many.
        num_eval_prompts: number of inputs in eval.jsonl, as far as there are so many.

    Returns:
        The number of records in each file, by name.

    Raises:
        UsageError: the file is missing, or `eval_fraction` leaves nothing for training or for
            evaluation.
    """
    rows = read_e2e(source_file)

    def inputs_of(slots: Iterable[tuple[str, str]]) -> str:
        return " | ".join(f"{slot}: {value}" for slot, value in slots).lower()

    by_inputs: dict[str, list[E2eRow]] = {}
    for slots, text in rows:
        by_inputs.setdefault(inputs_of(sorted(slots)), []).append((slots, text))
    kept_back = held_out(by_inputs, eval_fraction, seed)
    train, parts = [], {"mine": dict[str, None](), "eval": dict[str, None]()}
    for name, of_inputs in by_inputs.items():
        slots = of_inputs[0][0]
        parts["eval" if name in kept_back else "mine"] |= dict.fromkeys(_fewer(slots, inputs_of))
        if name not in kept_back:
            train += [(inputs_of(slots), text.lower()) for slots, text in of_inputs]
    known = {inputs for inputs, _ in train}
    chosen = {}
    for (name, found), number in zip(
        parts.items(), (num_mining_prompts, num_eval_prompts), strict=True
    ):
        fresh = sorted(set(found) - known)
        random.Random(seed).shuffle(fresh)
        chosen[name] = fresh[:number]
        known |= set(chosen[name])
    check_not_empty(eval_fraction, train=train, **chosen)
    output_dir = pathlib.Path(output_dir)
    prompts = {name: [(i, records.NO_TARGETS) for i in of] for name, of in chosen.items()}
    pairs = {"train": train, **prompts}
    for split, of_split in pairs.items():
        written = (
            Record(id=f"{split}-{number}", inputs=inputs, targets=text)
            for number, (inputs, text) in enumerate(of_split)
        )
        records.write_records(output_dir / f"{split}.jsonl", written)
    with files.replacing(output_dir / "gazetteer.json") as unfinished:
        unfinished.write_text(files.json_text(e2e_gazetteer(rows)), encoding="utf-8")
    return {split: len(of_split) for split, of_split in pairs.items()}


def _fewer(
    slots: Sequence[tuple[str, str]], inputs_of: Callable[[Iterable[tuple[str, str]]], str]
) -> Iterator[str]:
    """Inputs of all slots, and of all but one or two of them; the name always stays."""
    others = [slot for slot in slots if slot[0] != "name"]
    for number in range(3):
        for left_out in itertools.combinations(others, number):
            kept = [slot for slot in slots if slot not in left_out]
            if len(kept) > 1:
                yield inputs_of(kept)
