"""What is needed next is made while the devices work on what came before. Standard library only."""

import collections
import concurrent.futures
from collections.abc import Callable, Generator, Iterable
from typing import TypeVar

Item = TypeVar("Item")
Made = TypeVar("Made")


def iterate(
    make: Callable[[Item], Made], items: Iterable[Item], size: int = 2
) -> Generator[Made, None, None]:
    """Yields `make(item)` for every item, in order; a thread makes the next ones meanwhile.

    An exception of `make`, KeyboardInterrupt too, is raised where its result would have come. When
    the generator ends or is closed (`contextlib.closing`), whatever the reason, what is being made
    is finished, what is waiting is dropped, and no thread is left.

    Args:
        make: what the thread calls, one item after the other.
        items: what it is called with.
        size: how many results, made or being made, are kept beside the one that is in use.
    """
    thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="prefetch")
    waiting: collections.deque[concurrent.futures.Future[Made]] = collections.deque()
    try:
        for item in items:
            waiting.append(thread.submit(make, item))
            if len(waiting) > size:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        thread.shutdown(cancel_futures=True)
