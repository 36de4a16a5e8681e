"""The life of a loader's workers: how they start, what they leave alone, how they end or die."""

from __future__ import annotations

import signal
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

import torch.distributed as dist
from torch.utils.data import DataLoader

from deit.errors import UserError

# Signals that mean the whole job: the main process acts on them, workers do not.
JOB_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
# Seconds in which the threads of torch.distributed come to rest after a collective.
REST = 0.1


def start_pass(loader: DataLoader) -> Iterator:
    """`iter(loader)`, whose workers are persistent, and are born with JOB_SIGNALS blocked.

    Ctrl-C and cluster managers signal all processes of a job. The main process then saves a
    checkpoint, for which it may need its workers, and ends them itself.

    Among several processes it first waits for threads that end a collective. Such a thread enters
    Python to drop tensors. Up to Python 3.11 a process that is forked while it does hangs in
    `os.fork` for ever: the child takes the lock on the list of threads before it is made anew.
    """
    if loader.num_workers == 0 or loader._iterator is not None:
        return iter(loader)
    if sys.version_info < (3, 12) and dist.is_available() and dist.is_initialized():
        time.sleep(REST)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, JOB_SIGNALS)
    try:
        return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_workers(loader: DataLoader) -> None:
    """End the workers of `loader`, if any: they are asked, and those that hang are killed.

    Workers do not hear the SIGTERM by which torch, and multiprocessing at exit, would end them.
    """
    running, loader._iterator = loader._iterator, None
    if running is not None:
        running._shutdown_workers()
        for worker in running._workers:
            if worker.is_alive():
                worker.kill()
                worker.join()


def worker_death(error: BaseException) -> UserError | None:
    """What to tell if `error` says that a worker was killed, else None.

    Torch reports it from a SIGCHLD handler, so that it can come up in the middle of any statement
    of the main process, not only in the loader. A main process that was just receiving a batch
    finds the connection closed before that. No report of torch's can come after this call.
    """
    told = str(error)
    if isinstance(error, (ConnectionError, EOFError)):
        files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
        if not any("multiprocessing" in Path(file).parts for file in files):
            return None
        told = f"DataLoader worker (pid unknown) is gone: {error}."
    elif not (isinstance(error, RuntimeError) and told.startswith("DataLoader worker (pid")):
        return None
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    return UserError(
        f"{told} Often the machine ran out of memory (fewer --num-workers help) or shared memory "
        "(in a container: a larger /dev/shm)."
    )
