"""What runs on the cluster: one `TrainingJob` a process, which survives time limit and preemption.

The signals of Slurm become a stop request: training saves at the next update, on all processes at
the same one, and rank 0 puts the job back into the queue. It then starts here again, with the same
job id, in the same folder, and `--resume auto` goes on at that update.

| what happens | signals | what the job does |
| --- | --- | --- |
| the time limit nears, `scancel --signal=USR2` | USR2 | saves, requeues itself |
| preemption | TERM, on some clusters USR2 too | saves, requeues itself |
| `scancel` | TERM | saves, ends: Slurm says that the job is ending |
| a node dies | none | Slurm requeues it; goes on from the last checkpoint |
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from deit.errors import UserError, one_line_errors
from deit.launch import slurm

if TYPE_CHECKING:
    from submitit import JobEnvironment
    from submitit.core.utils import DelayedSubmission

START = "--- start"
"""Begins a start's part of the error log, which a requeued job goes on with."""
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR2)
# Below the range from which systems hand out ports to outgoing connections.
_PORTS = (20_000, 32_000)


class TrainingJob:
    """deit/main.py with `argv` as one process of a job; %j in `argv` is the job's id."""

    def __init__(self, argv: list[str]) -> None:
        self.argv = argv

    def __call__(self) -> None:
        import submitit

        env = submitit.JobEnvironment()
        # submitit's local controller makes a folder of the name before %j is filled in.
        with contextlib.suppress(OSError):
            Path(os.environ["SUBMITIT_FOLDER"]).rmdir()  # only if it is empty
        print(START, file=sys.stderr, flush=True)
        # An error of an earlier start would count as this one's result.
        env.paths.result_pickle.unlink(missing_ok=True)
        status = one_line_errors(lambda: self._train(env))
        if status:
            sys.exit(status)

    def checkpoint(self) -> DelayedSubmission:
        """submitit's hook for a signal before training has installed its handlers: start again."""
        from submitit.core.utils import DelayedSubmission

        return DelayedSubmission(self)

    def _train(self, env: JobEnvironment) -> None:
        _export_rendezvous(env)
        from deit.main import main
        from deit.train.args import parse_args
        from deit.train.run import LAST
        from deit.train.stopping import request_stop, stop_reason

        def on_signal(number: int, frame: FrameType | None) -> None:
            request_stop(signal.Signals(number).name)

        args = parse_args([word.replace("%j", env.job_id) for word in self.argv])
        if args.overwrite:
            raise UserError(
                "--overwrite would remove the job's own state at its next start: remove the folder "
                "by hand, or choose another --output-dir"
            )
        args.output_dir = args.output_dir or str(env.paths.folder)
        if not args.eval and (not args.resume or (Path(args.output_dir) / LAST).exists()):
            args.resume = "auto"
        for number in STOP_SIGNALS:
            signal.signal(number, on_signal)
        main(args)
        reason = stop_reason()
        if reason:
            _leave(env, reason)


def _export_rendezvous(env: JobEnvironment) -> None:
    """Set the variables that torchrun sets, as `deit.train.distributed` reads them."""
    from submitit.helpers import TorchDistributedEnvironment

    # All processes of a start draw the same port, another start another: sockets may linger, and
    # a node may run several jobs.
    start = f"{env.paths.folder} {env.job_id} {os.environ.get('SLURM_RESTART_COUNT', '0')}"
    os.environ["MASTER_PORT"] = str(random.Random(start).randint(*_PORTS))
    TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)


def _leave(env: JobEnvironment, reason: str) -> None:
    """After a stop: requeue from rank 0 unless the job is meant to end. Leaves the process."""
    if env.global_rank == 0:
        if env.cluster == "slurm":
            _requeue_slurm_job(env.raw_job_id, reason)
        elif reason != signal.SIGTERM.name:
            env._requeue(0)  # exits with the code that submitit's local controller restarts on
    # Not by returning: submitit would record a finished job.
    sys.exit(0)


def _requeue_slurm_job(job_id: str, reason: str) -> None:
    state = slurm.job_state(job_id)
    if state != "RUNNING":
        print(f"stopped ({reason}); not requeued: Slurm says {state}", flush=True)
        return
    problem = slurm.control("requeue", job_id)
    if problem:
        raise UserError(f"saved, but could not requeue job {job_id}: {problem}")
    print(f"stopped ({reason}); job {job_id} is back in the queue", flush=True)
