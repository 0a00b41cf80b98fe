"""Text corpora that come with pip packages, or lie in a file, turned into files of records.

Each function reads the package's JSON files without importing the package, and writes JSONL that
depends on the package's version and the seed alone.
"""

from tnt_jax.experiments.corpora.chitchat import chitchat, small_talk
from tnt_jax.experiments.corpora.e2e import E2E_SLOTS, e2e, e2e_gazetteer, read_e2e
from tnt_jax.experiments.corpora.restaurants import restaurants
from tnt_jax.experiments.corpora.split import package_file
from tnt_jax.experiments.corpora.venues import venues

__all__ = [
    "E2E_SLOTS",
    "chitchat",
    "e2e",
    "e2e_gazetteer",
    "package_file",
    "read_e2e",
    "restaurants",
    "small_talk",
    "venues",
]
