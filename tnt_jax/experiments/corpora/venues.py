"""Sentences about venues, and the slots that they say: data to text, from the package convlab."""

import collections
import itertools
import os
import pathlib
import random
import re
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import NamedTuple

from tnt_jax.data import records
from tnt_jax.data.records import Record
from tnt_jax.experiments.corpora.split import check_not_empty, held_out, package_dir, read_json
from tnt_jax.runtime import files
from tnt_jax.runtime.errors import UsageError

_PLACEHOLDER = re.compile(r"#\w+-\w+-(\w+)#")
_DOMAINS = ("restaurant", "hotel", "attraction")
_ACTS = ("inform", "recommend", "select")
# The slots of a sentence and the fields of a venue that fill them, in the order of an input. Left
# out: entrance fees, which venues state as "2.50 pounds", "free" and whole sentences; numbers of
# matching venues and booking references, which no single venue has; parking and internet, which
# sentences put into words of their own.
_FIELD_OF_SLOT = {
    "Name": "name",
    "Type": "type",
    "Food": "food",
    "Area": "area",
    "Price": "pricerange",
    "Stars": "stars",
    "Addr": "address",
    "Phone": "phone",
    "Post": "postcode",
}
# "free" is the price range of attractions alone: an entrance fee again.
_UNKNOWN = ("", "?", "free", None)
# How people write a value that the venues' files spell differently.
_SPELLING = {
    "concerthall": "concert hall",
    "mutliple sports": "multiple sports",
    "swimmingpool": "swimming pool",
}
# Left out. "the place is in the north" does not name it, and "a" begins any sentence's next words.
_AMBIGUOUS_NAMES = ("the place", "a and b guest house")
_OTHER_NAMES = {
    "area": {"centre": ["center", "central", "centrally"]},
    "pricerange": {
        "cheap": ["cheaply", "cheaper", "inexpensive"],
        "moderate": ["moderately"],
        "expensive": ["expensively", "pricey"],
    },
    "type": {
        "guesthouse": ["guest house", "guesthouses", "guest houses"],
        "nightclub": ["night club", "nightclubs", "night clubs"],
        "theatre": ["theater", "theatres", "theaters"],
    },
}


class _Sentence(NamedTuple):
    """What someone wrote for a dialogue act, with {field} where a value belongs."""

    domain: str
    act: str
    fields: tuple[str, ...]
    text: str


class _Filling(NamedTuple):
    """A sentence, and a venue that has a value for each of its fields."""

    sentence: _Sentence
    venue: Mapping[str, str]
    inputs: str

    @property
    def targets(self) -> str:
        text = re.sub(r"(\ban? )?\{(\w+)\}", self._value, self.sentence.text)
        # "the {name}" is filled with "the gandhi", "{name} restaurant" with "efes restaurant".
        return re.sub(r"\b([a-z]+) \1\b", r"\1", text)

    def _value(self, placeholder: re.Match) -> str:
        article, value = placeholder[1] or "", self.venue[placeholder[2]]
        if article:
            article = "an " if re.match(r"(?!eu|uni|one)[aeiou]", value) else "a "
        return article + value


def venues(
    output_dir: str | os.PathLike,
    *,
    seed: int = 0,
    domains: Sequence[str] = _DOMAINS,
    venues_per_sentence: int = 4,
    eval_venues_per_sentence: int = 3,
    eval_fraction: float = 0.2,
    num_mining_prompts: int = 10_000,
    source_dir: str | os.PathLike | None = None,
) -> dict[str, int]:
    """Writes a data-to-text corpus about the restaurants, hotels and attractions of Cambridge.

    The sentences were written by people for MultiWOZ; ConvLab-3 (Apache-2.0) keeps them by dialogue
    act, with the values taken out, and the venues beside them. Each is filled from several venues,
    in lower case:

        inputs   restaurant inform | name: curry garden | food: indian | area: centre
        targets  curry garden is an indian restaurant in the centre.

    So the inputs state exactly what the targets may say. A few sentences state a value that their
    act does not hold; they stay, for they are what teaches a model to invent.

    Files written to `output_dir`:
        train.jsonl: pairs.
        mine.jsonl: further inputs for the acts of the training sentences.
        eval.jsonl: pairs whose inputs, and whose sentences, occur in neither of the others.
        gazetteer.json: every name, type, food, area, price range and number of stars, for
            `annotators.Gazetteer`.

    Args:
        output_dir: folder, created if need be.
        seed: decides the split and which venues fill a sentence.
        domains: the kinds of venues: "restaurant", "hotel", "attraction".
        venues_per_sentence: number of venues that fill a training sentence.
        eval_venues_per_sentence: number of venues that fill an evaluation sentence.
        eval_fraction: part of the sentences, and of the inputs, kept for evaluation.
        num_mining_prompts: number of inputs in mine.jsonl, as far as there are so many.
        source_dir: the folder of the package convlab; None means the installed one.

    Returns:
        The number of sentences and of records in each file, by name.

    Raises:
        UsageError: the package or one of its files is missing, a domain is unknown, or
            `eval_fraction` leaves nothing for training or for evaluation.
    """
    if not domains or not set(domains) <= set(_DOMAINS):
        raise UsageError(f"domains: expected some of {_DOMAINS}, found {tuple(domains)}.")
    source = package_dir("convlab", "convlab==3.0.1", source_dir)
    sentences = [s for s in _read_sentences(source) if s.domain in domains]
    venues_of = {domain: _read_venues(source, domain) for domain in domains}

    fillings = [
        filling
        for sentence in sentences
        for filling in _fillings(sentence, venues_of[sentence.domain])
    ]
    # From here on the order is random, and an act comes as often as people wrote about it.
    random.Random(seed).shuffle(fillings)

    # The same words can serve several acts: they are one sentence, on one side of the split.
    texts = {sentence.text for sentence in sentences}
    eval_texts = held_out(texts, eval_fraction, seed)
    eval_inputs = held_out({filling.inputs for filling in fillings}, eval_fraction, seed)
    for_training, for_evaluation = [], []
    for filling in fillings:
        if filling.sentence.text in eval_texts and filling.inputs in eval_inputs:
            for_evaluation.append(filling)
        elif filling.sentence.text not in eval_texts and filling.inputs not in eval_inputs:
            for_training.append(filling)

    train = _at_most(venues_per_sentence, for_training, key=lambda filling: filling.sentence)
    trained_inputs = {filling.inputs for filling in train}
    mine = _at_most(1, for_training, key=lambda filling: filling.inputs)
    mine = [filling for filling in mine if filling.inputs not in trained_inputs]
    mine = mine[:num_mining_prompts]
    evaluation = _at_most(1, for_evaluation, key=lambda filling: filling.inputs)
    evaluation = _at_most(
        eval_venues_per_sentence, evaluation, key=lambda filling: filling.sentence
    )

    check_not_empty(eval_fraction, train=train, eval=evaluation)
    output_dir = pathlib.Path(output_dir)
    for split, chosen in (("train", train), ("eval", evaluation)):
        pairs = (
            Record(
                id=f"{split}-{number}",
                inputs=filling.inputs,
                targets=filling.targets,
                extra={"sentence": filling.sentence.text},
            )
            for number, filling in enumerate(chosen)
        )
        records.write_records(output_dir / f"{split}.jsonl", pairs)
    prompts = (
        Record(id=f"mine-{number}", inputs=filling.inputs) for number, filling in enumerate(mine)
    )
    records.write_records(output_dir / "mine.jsonl", prompts)
    with files.replacing(output_dir / "gazetteer.json") as unfinished:
        names = _gazetteer(itertools.chain.from_iterable(venues_of.values()))
        unfinished.write_text(files.json_text(names), encoding="utf-8")
    return {
        "sentences": len(texts),
        "train": len(train),
        "mine": len(mine),
        "eval": len(evaluation),
    }


def _read_sentences(source: pathlib.Path) -> list[_Sentence]:
    """The sentences whose placeholders are exactly the slots of their act, each slot once."""
    acts = read_json(source / "nlg" / "template" / "multiwoz" / "auto_system_template_nlg.json")
    sentences = set()
    for name, texts_of_slots in acts.items():
        domain, _, act = name.lower().partition("-")
        if domain not in _DOMAINS or act not in _ACTS:
            continue
        for slot_names, texts in texts_of_slots.items():
            slots = [slot for slot in slot_names.split(";") if slot]
            if not set(slots) <= _FIELD_OF_SLOT.keys():
                continue
            for text in texts:
                found = [slot.capitalize() for slot in _PLACEHOLDER.findall(text)]
                # An act with two names is about two venues, and we fill from one.
                if sorted(found) != sorted(slots) or len(set(found)) < len(found):
                    continue
                text = _PLACEHOLDER.sub(
                    lambda match: "{" + _FIELD_OF_SLOT[match[1].capitalize()] + "}", text
                )
                fields = tuple(f for s, f in _FIELD_OF_SLOT.items() if s in slots)
                sentences.add(_Sentence(domain=domain, act=act, fields=fields, text=_tidy(text)))
    return sorted(sentences)


def _tidy(text: str) -> str:
    """Undoes the tokenisation of MultiWOZ ("it 's", "i do n't know .") and the capitals."""
    text = " ".join(text.lower().split())
    text = re.sub(r" ?' ?(s|m|re|ve|ll|d)\b", r"'\1", text)
    text = re.sub(r" n't\b", "n't", text)
    text = re.sub(r" ([.,?!;:])", r"\1", text)
    # Half of the sentences leave it to the value to say what it counts.
    return re.sub(r"\{stars\}(?! stars?\b)", "{stars} stars", text)


def _read_venues(source: pathlib.Path, domain: str) -> list[dict[str, str]]:
    """The known fields of each venue, in lower case."""
    found = []
    for entry in read_json(source / "human_eval" / "db" / f"{domain}_db.json"):
        venue = {
            field: " ".join(entry[field].lower().split()).strip(" ,")
            for field in _FIELD_OF_SLOT.values()
            if entry.get(field) not in _UNKNOWN
        }
        venue = {field: _SPELLING.get(value, value) for field, value in venue.items()}
        if venue["name"] not in _AMBIGUOUS_NAMES:
            found.append(venue)
    return found


def _fillings(sentence: _Sentence, all_venues: Iterable[Mapping[str, str]]) -> list[_Filling]:
    """The sentence filled from every venue that can; venues with the same inputs count once."""
    filling_of_inputs = {}
    for venue in all_venues:
        if venue.keys() >= set(sentence.fields):
            slots = (f"{field}: {venue[field]}" for field in sentence.fields)
            inputs = " | ".join([f"{sentence.domain} {sentence.act}", *slots])
            filling_of_inputs[inputs] = _Filling(sentence=sentence, venue=venue, inputs=inputs)
    return list(filling_of_inputs.values())


def _at_most(
    limit: int, fillings: Iterable[_Filling], *, key: Callable[[_Filling], Hashable]
) -> list[_Filling]:
    """The first fillings of each key, as many as the limit says."""
    num_taken = collections.Counter()
    taken = []
    for filling in fillings:
        if num_taken[key(filling)] < limit:
            num_taken[key(filling)] += 1
            taken.append(filling)
    return taken


def _gazetteer(all_venues: Iterable[Mapping[str, str]]) -> dict[str, dict[str, list[str]]]:
    """{field: {value: [further names]}} for what a sentence can get wrong in a word."""
    values = collections.defaultdict(set)
    for venue in all_venues:
        for field in ("name", "type", "food", "area", "pricerange"):
            if field in venue:
                # Without "the", which begins much else that may stand in the place of a name.
                values[field].add(venue[field].removeprefix("the "))
    # A domain is named in every input of its own, and elsewhere in offers of further help.
    values["type"] -= set(_DOMAINS)
    gazetteer = {
        field: {value: _OTHER_NAMES.get(field, {}).get(value, []) for value in sorted(found)}
        for field, found in values.items()
    }
    for value, others in gazetteer["type"].items():
        if not others:
            others.append(value + "s")
    # The name "stars: 4" is how the inputs say it. A bare 4 could be anything.
    gazetteer["stars"] = {
        f"{number} star": [f"{number} stars", f"{word} star", f"{word} stars", f"stars: {number}"]
        for number, word in enumerate(("zero", "one", "two", "three", "four", "five"))
    }
    return gazetteer
