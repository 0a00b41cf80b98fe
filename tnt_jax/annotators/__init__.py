"""The annotators there are, under the names that settings give them: `@annotators.Lexicon`.

Each takes a record and says which stretches of its targets must go, and perhaps what else would be
just as wrong there (`tnt_jax.annotators.interface`). All are deterministic, and describe themselves
with their settings in every record that they mark.

Imports `data`, `tokenizers` and `runtime`.
"""

from tnt_jax.annotators.classifier import Classifier
from tnt_jax.annotators.entities import Entities
from tnt_jax.annotators.gazetteer import Gazetteer
from tnt_jax.annotators.interface import Annotation, Annotator, Span
from tnt_jax.annotators.lexicon import Lexicon
from tnt_jax.annotators.noisy import Noisy
from tnt_jax.annotators.python_function import PythonFunction
from tnt_jax.annotators.spans import Spans

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
