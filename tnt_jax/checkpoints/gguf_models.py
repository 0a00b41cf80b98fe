"""A model in a GGUF file: its network, its weights, and what Hugging Face has beside them."""

import functools
import os

from etils import epath

from tnt_jax.checkpoints import gguf_causal_lm, gguf_files, gguf_tokenizer, huggingface
from tnt_jax.runtime import files
from tnt_jax.runtime.errors import UsageError


def read(path: epath.Path) -> tuple[huggingface.Model, str | None]:
    """The network and the weights of a file, and how they were quantised; no weight is read yet.

    Raises:
      UsageError: It is damaged, or of a kind that is not read.
    """
    file = gguf_files.read(path)
    settings = gguf_causal_lm.config_of(file)
    # Before tensors are laid out by numbers of heads, which it checks.
    huggingface.network_config(settings, str(path), is_tied=True)
    stored = gguf_causal_lm.tensors_of(file, settings)
    return huggingface.of_tensors(stored, settings, str(path), str(path)), file.quantisation


def description(path: epath.Path) -> epath.Path:
    """A directory with `config.json`, and the tokenizer's files if it is of a kind that is read.

    Raises:
      UsageError: The file is damaged, or of a kind that is not read.
    """
    return _described(path, files.version_of(path))[0]


def tokenizer(path: epath.Path) -> epath.Path:
    """The same directory, with a tokenizer.

    Raises:
      UsageError: The file is damaged, or it or its tokenizer is of a kind that is not read.
    """
    folder, problem = _described(path, files.version_of(path))
    if problem is not None:
        raise UsageError(problem)
    return folder


@functools.cache
def _described(path: epath.Path, version: tuple[int, int]) -> tuple[epath.Path, str | None]:
    """The directory of `description`, made once; and why it has no tokenizer, if it has none."""
    file = gguf_files.read(path)
    settings = gguf_causal_lm.config_of(file)
    # Messages about what is in it name the file.
    folder = epath.Path(files.temporary_folder("gguf") / path.name)
    folder.mkdir()
    problem = None
    try:
        gguf_tokenizer.write(folder, file.settings, os.fspath(path))
        settings |= gguf_tokenizer.special_ids(file.settings)
    except UsageError as error:
        problem = str(error)
    (folder / huggingface.CONFIG).write_text(files.json_text(settings))
    return folder, problem
