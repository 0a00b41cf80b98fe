"""Package metadata. Tool settings are in pyproject.toml."""

import pathlib
import re

import setuptools

ROOT = pathlib.Path(__file__).parent
VERSION = re.search(
    r'^__version__ = "(.+)"$', (ROOT / "tnt_jax" / "__init__.py").read_text("utf-8"), re.MULTILINE
).group(1)
README = ROOT / "README.md"

setuptools.setup(
    name="tnt_jax",
    version=VERSION,
    description="Targeted Negative Training: make a T5 model stop saying what was marked.",
    long_description=README.read_text("utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=setuptools.find_packages(include=["tnt_jax", "tnt_jax.*"]),
    python_requires=">=3.11",
    # Python 3.11 resolves to JAX 0.10 and Python 3.12 to JAX 0.12: both must work.
    install_requires=[
        "absl-py>=2.1",
        "etils[epath]>=1.9",
        "flax>=0.12",
        "gin-config>=0.5",
        "jax>=0.10",
        "numpy>=2.0",
        "optax>=0.2.6",
        "orbax-checkpoint>=0.11.30",
        "rich>=13.7",
        "rouge-score>=0.1.2",
        "sacrebleu>=2.4",
        "sentencepiece>=0.2",
        "seqio>=0.0.20",
        "tensorflow>=2.19",
        "tensorflow-datasets>=4.9.9",
    ],
    extras_require={
        # Accelerators: pick the one that the machine has.
        "tpu": ["jax[tpu]>=0.10"],
        "gpu": ["jax[cuda12]>=0.10"],
        # Annotators and scorers that read text with a trained model.
        "text": ["alt-profanity-check>=1.5", "spacy>=3.8"],
        # Message and reply pairs for tnt_jax.corpora.chitchat.
        "chitchat": ["chitchat-dataset==0.9.0"],
        "test": [
            "basedpyright>=1.31",
            "beartype>=0.21",
            "chitchat-dataset==0.9.0",
            "hypothesis>=6.130",
            "jaxtyping>=0.3.3",
            "pytest>=8.4",
            "ruff>=0.12",
        ],
    },
    classifiers=[
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
