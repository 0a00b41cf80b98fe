r"""How well annotators find what is unwanted, against truths that none of them made.

    TNT_JAX_SHARED=/folder python benchmarks/annotators.py

Toxic words: SemEval-2021's posts with the characters that people marked, as data/toxic_spans of
that folder. The score is the task's own: the mean over posts of the characters' F1, which is 1
where both sides mark nothing. The word list is learned on the training posts: words that are inside
marks often enough, both thresholds chosen on every third training post for a list of the others.
Other rows are `Classifier` on alt-profanity-check at three thresholds. All on the trial posts.

Values that the input does not state: E2E's human references, as data/e2e. People wrote each for a
list of slots. One slot is taken out of the list, so that what they wrote about it is unsupported,
in whatever words. Recall is the share of (reference, slot) pairs in which `Gazetteer` marks more
than it does with the whole list; precision the share of its marks that go when the slot is given
back. No string is compared for that; both are too low, for people left out slots, and stated what
no slot says. `familyFriendly` is left out, whose values are yes and no.

The needed package alt-profanity-check is installed by `pip install -e '.[text]'`.

Takes 4 minutes of one core and 0.4 GB of memory (estimated, not measured).
"""

import argparse
import collections
import csv
import itertools
import json
import os
import pathlib
import tempfile
import time

import report

from tnt_jax import annotators
from tnt_jax.data import records, words
from tnt_jax.experiments import corpora

PACKAGES = ("numpy", "scikit-learn", "alt-profanity-check")
SHARES = (0.3, 0.4, 0.5, 0.6, 0.7)
COUNTS = (1, 2, 3, 5, 10)
THRESHOLDS = (0.3, 0.5, 0.8)


def main():
    """Prints both tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--posts", type=int, help="of the trial posts, the first so many")
    arguments = parser.parse_args()
    if not os.environ.get("TNT_JAX_SHARED"):
        raise SystemExit("set TNT_JAX_SHARED to a folder with data/toxic_spans and data/e2e")
    data = pathlib.Path(os.environ["TNT_JAX_SHARED"]) / "data"
    report.heading(PACKAGES)
    toxic_words(data / "toxic_spans", arguments.posts)
    print()
    unsupported_values(data / "e2e" / "devset.csv")


# -----------------------------------------------------------------------------
# Toxic words
# -----------------------------------------------------------------------------


def toxic_words(folder, num_posts):
    """Prints F1 and time of each annotator on SemEval's trial posts."""
    train = read_posts(folder / "tsd_train.csv")
    trial = read_posts(folder / "tsd_trial.csv")[:num_posts]
    with tempfile.TemporaryDirectory() as scratch:
        held_out = train[::3]
        counts = count_words([post for i, post in enumerate(train) if i % 3])
        scores = {
            (share, count): score(word_list(scratch, counts, share, count), held_out)
            for share, count in itertools.product(SHARES, COUNTS)
        }
        share, count = max(scores, key=scores.__getitem__)
        learned = word_list(scratch, count_words(train), share, count)
        rows = [[f"word list, in marks {share:.0%} of {count} times or more", learned]]
        rows += [
            [f"Classifier, threshold {threshold}", annotators.Classifier(threshold=threshold)]
            for threshold in THRESHOLDS
        ]
        columns = [f"{len(trial)} posts", "F1 of characters", "ms a post"]
        report.table(columns, scores_of(rows, trial))


def scores_of(rows, posts):
    """F1 of each named annotator, and its time."""
    for name, annotator in rows:
        start = time.perf_counter()
        found = score(annotator, posts)
        milliseconds = 1e3 * (time.perf_counter() - start) / len(posts)
        yield name, f"{found:.3f}", f"{milliseconds:.1f}"


def read_posts(path):
    """Pairs of a text and the set of its marked characters."""
    with path.open(encoding="utf-8", newline="") as file:
        return [(row["text"], set(json.loads(row["spans"]))) for row in csv.DictReader(file)]


def count_words(posts):
    """For each word: how often it is wholly inside marks, and how often it is there."""
    counts = collections.defaultdict(lambda: [0, 0])
    for text, marked in posts:
        for start, end in words.extents(text):
            count = counts[words.key(text[start:end])]
            count[0] += marked.issuperset(range(start, end))
            count[1] += 1
    return counts


def word_list(folder, counts, share, count):
    """An annotator of the words that pass both thresholds."""
    chosen = sorted(
        word
        for word, (inside, total) in counts.items()
        if total >= count and inside >= share * total and not word.startswith("#")
    )
    path = pathlib.Path(folder) / "phrases.txt"
    path.write_text("\n".join(chosen), encoding="utf-8")
    return annotators.Lexicon(path=str(path), alternatives=False)


def score(annotator, posts):
    """SemEval's: the mean over posts of the F1 of characters."""
    total = 0.0
    for text, marked in posts:
        spans = annotator.annotate(records.Record(id="", inputs="", targets=text)).spans
        found = {i for span in spans for i in range(span.start, span.end)}
        both = len(found) + len(marked)
        total += 2 * len(found & marked) / both if both else 1.0
    return total / len(posts)


# -----------------------------------------------------------------------------
# Unsupported values
# -----------------------------------------------------------------------------


def unsupported_values(path):
    """Prints recall and precision of `Gazetteer` for each slot of E2E."""
    rows = corpora.read_e2e(path)
    with tempfile.TemporaryDirectory() as scratch:
        file = pathlib.Path(scratch) / "gazetteer.json"
        file.write_text(json.dumps(corpora.e2e_gazetteer(rows)), encoding="utf-8")
        gazetteer = annotators.Gazetteer(path=str(file), alternatives=False)
    counts = {slot: [0, 0, 0, 0] for slot in corpora.E2E_SLOTS}  # pairs, found, marks, right marks
    num_marked = 0
    for slots, text in rows:
        before = marks(gazetteer, slots, text)
        num_marked += bool(before)
        for left_out in slots:
            if left_out[0] not in corpora.E2E_SLOTS:
                continue
            found = marks(gazetteer, [slot for slot in slots if slot != left_out], text)
            new = found - before
            for i, more in enumerate((1, bool(new), len(found), len(new))):
                counts[left_out[0]][i] += more
    counts["all"] = [sum(column) for column in zip(*counts.values(), strict=True)]
    report.table(
        ["slot taken out", "pairs", "recall", "precision"],
        [
            [slot, f"{pairs:,}", f"{found / pairs:.1%}", f"{right / number:.1%}"]
            for slot, (pairs, found, number, right) in counts.items()
        ],
    )
    print(f"\nMarks with the whole list, in {num_marked:,} of {len(rows):,} references.")


def marks(annotator, slots, text):
    """The stretches of the text that are marked when the input states these slots."""
    inputs = ", ".join(f"{slot}[{value}]" for slot, value in slots)
    record = records.Record(id="", inputs=inputs, targets=text)
    return {(span.start, span.end) for span in annotator.annotate(record).spans}


if __name__ == "__main__":
    main()
