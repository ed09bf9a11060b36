"""Work on several cores at once, its results in order."""

import os
from collections import deque
from concurrent.futures import ThreadPoolExecutor


def in_order(work, items, threads=None, errors=(), window=None, stop=lambda: None):
    """Yield (item, work(item)) in the items' order. Closing it waits for the work that is under way, and begins none.

    threads  how many (none: one for each core)
    errors   exceptions that stand in place of a result when they are raised
    window   how many items are under way at most (none: 4 for each thread)
    stop     called at the end, before the wait
    """
    threads = threads or len(os.sched_getaffinity(0))
    waiting, pool = deque(), ThreadPoolExecutor(threads)

    def first():
        item, future = waiting.popleft()
        return item, future.exception() if isinstance(future.exception(), errors) else future.result()

    try:
        for item in items:
            waiting.append((item, pool.submit(work, item)))
            if len(waiting) >= (window or 4 * threads):
                yield first()
        while waiting:
            yield first()
    finally:
        stop()
        pool.shutdown(cancel_futures=True)
