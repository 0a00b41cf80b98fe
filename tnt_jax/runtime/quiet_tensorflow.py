"""TensorFlow is imported without what its C++ code writes to stderr."""

import contextlib
import importlib.abc
import os
import re
import sys
import tempfile
from collections.abc import Iterator

# "I0000 00:00:1795514381.121605   27673 cudart_stub.cc:31] Could not find cuda drivers ..."
_NATIVE_LOG_LINE = re.compile(rb"[IW]\d{4} |WARNING: All log messages before absl::InitializeLog")


@contextlib.contextmanager
def _without_native_log() -> Iterator[None]:
    """Drops log lines that C++ code writes to stderr meanwhile; everything else comes through."""
    sys.stderr.flush()
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as captured:
        os.dup2(captured.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(stderr, 2)
            os.close(stderr)
            captured.seek(0)
            for line in captured:
                if not _NATIVE_LOG_LINE.match(line):
                    os.write(2, line)


class _QuietTensorFlow(importlib.abc.MetaPathFinder):
    """Imports TensorFlow without the lines that it prints whatever TF_CPP_MIN_LOG_LEVEL is."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname != "tensorflow":
            return None
        # It stays: libraries ask for the spec, to see whether TensorFlow is there, and import it
        # later, with a spec of its own.
        specs = (
            finder.find_spec(fullname, path, target)
            for finder in sys.meta_path
            if finder is not self
        )
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_quietly(module):
                with _without_native_log():
                    execute(module)

            spec.loader.exec_module = execute_quietly
        return spec


def install() -> None:
    """Keeps a later import of TensorFlow quiet; does nothing if it has been imported already."""
    if "tensorflow" not in sys.modules:
        sys.meta_path.insert(0, _QuietTensorFlow())
