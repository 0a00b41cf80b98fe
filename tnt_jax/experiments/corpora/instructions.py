"""Questions and instructions of all kinds, which have nothing to do with what is patched."""

from tnt_jax.data.records import Record

_ABOUT = (
    "Explain {} in one sentence.",
    "Write a short poem about {}.",
    "List three facts about {}.",
    "What would you tell a child about {}?",
)
_TOPICS = (
    *("the moon", "bicycles", "photosynthesis", "the number zero", "volcanoes", "bees", "gravity"),
    *("the Roman Empire", "computers", "rivers", "vaccines", "chess", "paper", "earthquakes"),
    *("glaciers", "the human heart"),
)
_OTHERS = (
    "What is the capital of Norway?",
    "How many days are there in a leap year?",
    "Translate into French: good morning.",
    "What is 17 plus 25?",
    "Which planet is the largest?",
    "Write a polite letter that declines an invitation.",
    "Give me a name for a grey cat.",
    "What is the opposite of ancient?",
    "Sort these by size: an ant, a whale, a dog.",
    "How does one boil an egg?",
    "Write a Python function that adds two numbers.",
    "Who wrote Romeo and Juliet?",
    "Summarize in five words: the train was late because of snow on the tracks.",
    "Why is the sky blue?",
    "Correct the grammar: he go to school yesterday.",
    "What should I pack for a hike?",
)


def instructions() -> list[Record]:
    """Eighty general instructions, always the same; they are ours.

    An update that was made for another task should not change what a model answers to these
    (`Experiment.unrelated_prompts`).
    """
    prompts = [*(about.format(topic) for topic in _TOPICS for about in _ABOUT), *_OTHERS]
    return [Record(id=f"unrelated-{k}", inputs=prompt) for k, prompt in enumerate(prompts)]
