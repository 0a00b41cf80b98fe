"""What kinds of models there are in files; and finding the one that a setting names.

The user names a path and nothing else. A model of the Hugging Face hub is downloaded.
"""

import dataclasses
import functools
import os
import re
from collections.abc import Callable

import orbax.checkpoint as ocp
from etils import epath

from tnt_jax.checkpoints import gguf_files, gguf_models, huggingface, orbax, t5x
from tnt_jax.checkpoints.safetensors_files import INDEX, WEIGHTS, hub_name
from tnt_jax.runtime import files
from tnt_jax.runtime.errors import UsageError, system_error

# ------------------------------------------------------------------------------------- Kinds


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of model in files.

    Attributes:
      name: The name that people read.
      is_one: Tells whether a path is one.
      looked_for: What is looked for in a directory; None where it is a file.
      output_format: The setting of `tnt_jax.convert` that writes this kind, or the nearest one.
      description: Gives the folder in which its `config.json` and tokenizer lie, if it has any.
      is_of_orbax: Whether Orbax says when one is whole.
    """

    name: str
    is_one: Callable[[epath.Path], bool]
    looked_for: str | None
    output_format: str
    description: Callable[[epath.Path], epath.Path]
    is_of_orbax: bool = False


def _has_weights(folder: epath.Path) -> bool:
    """Whether a folder is one of Hugging Face's. Weights that are not read are refused later."""
    names = (
        WEIGHTS,
        INDEX,
        "pytorch_model.bin",
        "flax_model.msgpack",
    )
    has_weights = any((folder / name).exists() for name in names)
    return (folder / huggingface.CONFIG).exists() and (
        has_weights or not (folder / orbax.DESCRIPTION).exists()
    )


def _beside(folder: epath.Path) -> epath.Path:
    return folder.parent / orbax.DESCRIPTION


# A path is of the first kind that it is one of.
KINDS = (
    Kind(
        name="Hugging Face",
        is_one=_has_weights,
        looked_for=f"{huggingface.CONFIG} and {WEIGHTS} (Hugging Face)",
        output_format="huggingface",
        description=lambda folder: folder,
    ),
    Kind(
        name="tnt_jax",
        is_one=lambda folder: (folder / orbax.PARAMS).is_dir(),
        looked_for="params (tnt_jax)",
        output_format="orbax",
        description=_beside,
        is_of_orbax=True,
    ),
    Kind(
        name="T5X",
        is_one=lambda folder: (folder / t5x.CHECKPOINT_FILE).is_file(),
        looked_for="a file named checkpoint (T5X)",
        output_format="t5x",
        description=_beside,
    ),
    Kind(
        name="T5X (Orbax)",
        is_one=lambda folder: (folder / t5x.ORBAX_ITEM / "_METADATA").is_file(),
        looked_for="state/_METADATA (T5X with Orbax)",
        output_format="t5x_orbax",
        description=_beside,
        is_of_orbax=True,
    ),
    Kind(
        name="GGUF",
        is_one=gguf_files.is_gguf,
        looked_for=None,
        output_format="huggingface",
        description=gguf_models.description,
    ),
)


def kind_of(folder: epath.Path) -> Kind | None:
    """The kind of a model that a path is; None where it is none."""
    return next((kind for kind in KINDS if kind.is_one(folder)), None)


def description_of(folder: epath.Path) -> epath.Path:
    """Where a checkpoint's `config.json` and tokenizer lie, if it has any."""
    kind = kind_of(folder)
    return _beside(folder) if kind is None else kind.description(folder)


# ---------------------------------------------------------------------------- Finding a model


def is_model(folder: epath.Path) -> bool:
    """Whether a directory is itself a model, of whichever kind."""
    return kind_of(folder) is not None


def check_takes_checkpoints(folder: epath.Path, setting: str) -> None:
    """Raises a UsageError where checkpoints would come to lie within a model of another kind."""
    if folder.is_dir() and is_model(folder):
        raise UsageError(
            f"{setting}: expected a directory for checkpoints, found a model at {folder}. Choose "
            "another directory."
        )


def _is_whole(folder: epath.Path) -> bool:
    """Whether a checkpoint of a known kind is not one that is being written."""
    kind = kind_of(folder)
    return kind is not None and (
        not kind.is_of_orbax or ocp.path.step.is_checkpoint_finalized(folder)
    )


def find(path: str) -> epath.Path:
    """The checkpoint that a setting names.

    Itself, the newest `checkpoint_<step>` in a model directory, or a model of the Hugging Face hub,
    which is downloaded into its cache.

    Raises:
      UsageError: There is none.
    """
    is_there, given = _is_there(path), files.absolute(path)
    if not is_there:
        _check_may_look(os.fspath(given))
        return _from_hub(path)
    if given.is_file() and given.name == t5x.CHECKPOINT_FILE:
        given = given.parent  # T5X takes the path of the file as well
    if not given.is_dir():
        if kind_of(given):
            return given
        raise UsageError(
            f"expected a directory with a model, found a file at {path}. Of files, only GGUF is "
            "read."
        )
    _check_may_look(f"{given}/.")
    if kind_of(given):
        return given
    steps = {
        int(match[1]): folder
        for folder in given.iterdir()
        if (match := re.fullmatch(r"checkpoint_(\d+)", folder.name)) and _is_whole(folder)
    }
    if not steps:
        looked_for = "; ".join(kind.looked_for for kind in KINDS if kind.looked_for)
        content = sorted(file.name for file in given.iterdir())
        shown = ", ".join(content[:8]) + (" ..." if content[8:] else "")
        is_near = any(name.lower().endswith(gguf_files.SUFFIX) for name in content)
        hint = " Of a GGUF file, give the path of the file itself." if is_near else ""
        raise UsageError(
            f"expected a model at {path}, found no kind that is known. Looked there, and in "
            f"checkpoint_<step> folders, for: {looked_for}. The directory has "
            f"{shown or 'nothing in it'}.{hint}"
        )
    return steps[max(steps)]


def find_noted(path: str) -> epath.Path:
    """The checkpoint that a run noted, where it lay then.

    A model of the hub lay in the cache of that machine and user: here it is in another one, or is
    downloaded, in the same revision.

    Raises:
      UsageError: There is none.
    """
    if _is_there(path):
        return find(path)
    try:
        of_hub = hub_name(epath.Path(path))
        return find(path) if of_hub is None else _asked_of_hub(*of_hub, missing=_missing(path))
    except UsageError as error:
        raise UsageError(
            f"{error} Bring it back there, or put a link there to where it is now."
        ) from error


def _is_there(path: str) -> bool:
    """Whether anything is at a path; raises a UsageError where it cannot be read."""
    try:
        return files.absolute(path).exists()
    except Exception as error:
        if not files.is_remote(path):
            raise
        # A scheme that etils does not know, or whatever the client of a bucket raises.
        reason = next(iter(str(error).splitlines()), "")
        raise UsageError(
            f"expected a path that can be read, found {path}: {type(error).__name__}: {reason}."
        ) from error


def revision(path: str) -> str | None:
    """The commit of a model that a setting names on the Hugging Face hub; None of another's.

    Raises:
      UsageError: There is none.
    """
    if files.is_remote(path) or files.absolute(path).exists():
        return None
    return find(path).name


def _check_may_look(path: str) -> None:
    """Raises an OSError where nothing seems to be at a local path that may not be looked at."""
    if files.is_remote(path):
        return
    try:
        os.stat(path)  # noqa: PTH116 (pathlib drops the dot of "folder/.")
    except OSError as error:
        if (said := system_error(error)) is not None:
            raise said from error


# --------------------------------------------------------------------------- Hugging Face's hub


def _missing(path: str) -> str:
    return f"expected a checkpoint or a model directory, found nothing at {path}"


def _from_hub(path: str) -> epath.Path:
    missing = _missing(path)
    owner, _, name = path.partition("/")
    is_part = [re.fullmatch(r"\w[\w.-]*", part) is not None for part in (owner, name)]
    if is_part[0] and not name:
        raise UsageError(
            f"{missing}. A model of the Hugging Face hub is named with its owner, such as "
            "google/flan-t5-small."
        )
    if not all(is_part):
        raise UsageError(f"{missing}.")
    if epath.Path(owner).exists():
        raise UsageError(
            f"{missing}. The Hugging Face hub was not asked, because there is a {owner} here."
        )
    return _asked_of_hub(path, missing=missing)


def _asked_of_hub(name: str, commit: str | None = None, *, missing: str) -> epath.Path:
    """A model of the hub in its cache, of one commit or the newest; `missing` begins messages."""
    try:
        return _downloaded(name, commit)
    except ImportError:  # of the extra `hub`
        raise UsageError(
            f"{missing}. If it is a model of the Hugging Face hub: pip install huggingface-hub."
        ) from None
    except Exception as error:  # of the hub's, of its HTTP client's or of the network's
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        asked = "" if commit is None else f" ({name}, {commit})"
        raise UsageError(
            f"{missing}, nor on the Hugging Face hub{asked}: {reason.removesuffix('.')}."
        ) from error


@functools.cache
def _downloaded(name: str, commit: str | None = None) -> epath.Path:
    """A model of the hub in its cache; for a process the same one, whatever its owner does."""
    import huggingface_hub

    files = [huggingface.CONFIG, "*.safetensors", INDEX, *huggingface.OTHER_FILES]
    others = ["consolidated*", "*/*"]  # the same weights again, or those of another program
    return epath.Path(
        huggingface_hub.snapshot_download(
            name, revision=commit, allow_patterns=files, ignore_patterns=others
        )
    )
