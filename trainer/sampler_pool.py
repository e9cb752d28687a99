"""Worker processes that end with the build: at an interruption, and when the parent is killed."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import TypeVar

import torch

_T = TypeVar("_T")


def map_in_processes(
    make: Callable[[str], _T], names: Sequence[str], workers: int
) -> Generator[tuple[str, _T]]:
    """`(name, make(name))` in the order in which they are finished; begun in the order of `names`.

    Closing the generator, or an exception in it, ends the processes in the middle of their work.
    """
    # Not fork: a child of a process that has run torch may hang on its threads' locks.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_prepare_worker) as pool:
        try:
            futures = {pool.submit(make, name): name for name in names}
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BaseException:
            _terminate(pool)
            raise


def _terminate(pool: ProcessPoolExecutor) -> None:
    # Shutting down alone lets each worker finish its task and the one fetched ahead: half a minute.
    processes = list(pool._processes.values())
    pool.shutdown(wait=False, cancel_futures=True)
    for process in processes:
        process.terminate()


def _prepare_worker() -> None:
    # A terminal sends Ctrl-C to all processes: the parent is the one that answers it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    torch.set_num_threads(1)


def _exit_with_parent() -> None:
    """Waits for the end of the parent: one that is killed with SIGKILL cannot end its workers."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "runs in a worker only"
    parent.join()
    os._exit(1)
