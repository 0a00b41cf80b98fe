"""The two tasks of the paper as seqio tasks: name this module as MIXTURE_OR_TASK_MODULE.

`xsum_summaries`: summarise a news article (invented facts). `civil_comments_replies`: reply to a
comment on a news site (insults). Source: Zhang, Ranganath and Tafvizi, arXiv 2406.13660.

They supply human examples: to fine-tune the original model on, and prompts for it to generate from.
Its annotated outputs come back as files of records.

The vocabulary is T5's, at its public address. Name another one in the data set's settings
(`SeqioDataset.vocabulary_override`) where that cannot be reached.
"""

import seqio
import tensorflow as tf

from tnt_jax.data import tasks

T5_VOCABULARY = seqio.SentencePieceVocabulary(
    "gs://t5-data/vocabs/cc_all.32000.100extra/sentencepiece.model", extra_ids=100
)


def _summaries(dataset: tf.data.Dataset) -> tf.data.Dataset:
    return dataset.map(
        lambda article: {
            "inputs": tf.strings.join(["summarize: ", article["document"]]),
            "targets": article["summary"],
        }
    )


def _replies(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """Pairs a comment with the one that it answers; comments that answer none are left out."""
    return dataset.filter(lambda comment: tf.strings.length(comment["parent_text"]) > 0).map(
        lambda comment: {
            "id": comment["id"],
            "inputs": tf.strings.join(["reply: ", comment["parent_text"]]),
            "targets": comment["text"],
        }
    )


# The splits are stated so that importing this module reads no data set. XSum has to be downloaded
# by hand: https://www.tensorflow.org/datasets/catalog/xsum says how.
_SPLITS = ["train", "validation", "test"]

for _name, _source, _preprocessor in [
    ("xsum_summaries", seqio.TfdsDataSource("xsum:1.1.0", splits=_SPLITS), _summaries),
    (
        "civil_comments_replies",
        seqio.TfdsDataSource("civil_comments/CivilComments:1.2.4", splits=_SPLITS),
        _replies,
    ),
]:
    seqio.TaskRegistry.add(
        _name,
        source=_source,  # pyright: ignore[reportArgumentType]  # see tasks.record_task
        preprocessors=[_preprocessor, tasks.tokenize_and_mark],
        output_features=tasks.record_features(T5_VOCABULARY),
    )
