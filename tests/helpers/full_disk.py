"""What whoever writes sees of a disk that is full."""

import contextlib
import resource


@contextlib.contextmanager
def full_disk(num_bytes):
    """No file grows beyond this size."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
