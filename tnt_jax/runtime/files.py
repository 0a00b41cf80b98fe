"""JSON files that somebody else wrote: of whatever is in one comes a value or a message."""

import os
from typing import Any

from etils import epath

from tnt_jax.data import records
from tnt_jax.runtime.errors import UsageError, naming_file, system_error

MOST_BYTES = 2**28  # the largest tokenizers take a tenth of it


def read(path: str | os.PathLike, setting: str = "") -> Any:
    """The value in a file.

    Args:
        path: local, or anything that `etils.epath` opens.
        setting: that names it, for messages.

    Raises:
        UsageError: there is no such file, it is not JSON, or larger than any that is expected.
        OSError: the system does not let it be read.
    """
    file = epath.Path(path)
    try:
        size = records.size_of(file)
        if size > MOST_BYTES:
            reason = f"it has {size:,} bytes, and {MOST_BYTES:,} are the most"
        else:
            with naming_file(file):
                content = file.read_bytes()
            value = records.parse(content.decode("utf-8-sig"))
            records.check_depth(content, value)
            if not records.has_half_pairs(content, value):
                return value
            reason = "half a surrogate pair (\\ud800 to \\udfff), which is no text"
    except UnicodeDecodeError as error:
        reason = f"not UTF-8 ({error.reason} at byte {error.start})"
    except records.NotFiniteError as error:
        reason = f"it holds {error}"
    except ValueError as error:
        reason = f"not JSON: {error}"
    except RecursionError:
        reason = "nested too deeply"
    except OSError as error:
        if system_error(error) is not None:
            raise
        reason = error.strerror or type(error).__name__
    where = f"{setting}: " if setting else ""
    raise UsageError(f"{where}expected a JSON file, found {path}: {reason}.")


def read_object(path: str | os.PathLike, setting: str = "") -> dict[str, Any]:
    """The object in a file; raises a UsageError also where it is another kind of value."""
    found = read(path, setting)
    if not isinstance(found, dict):
        raise UsageError(
            f"{f'{setting}: ' if setting else ''}{path}: expected a JSON object, found "
            f"{type(found).__name__}."
        )
    return found
