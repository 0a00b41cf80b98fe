"""The annotators there are, under the names that settings give them: `@annotators.Lexicon`.

Each takes a record and says which stretches of its targets must go, and perhaps what else would be
just as wrong there (`tnt_jax.annotation` is the interface). All are deterministic, and describe
themselves with their settings in every record that they mark.
"""

from tnt_jax.annotation import Annotation, Annotator, Span
from tnt_jax.classifier import Classifier
from tnt_jax.entities import Entities
from tnt_jax.given_marks import PythonFunction, Spans
from tnt_jax.noise import Noisy
from tnt_jax.word_lists import Gazetteer, Lexicon

__all__ = [
    "Annotation",
    "Annotator",
    "Classifier",
    "Entities",
    "Gazetteer",
    "Lexicon",
    "Noisy",
    "PythonFunction",
    "Span",
    "Spans",
]
