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

from submitit import JobEnvironment
from submitit.helpers import Checkpointable, TorchDistributedEnvironment

from deit.errors import UserError, one_line_errors
from deit.launch.status import START
from deit.train import slurm
from deit.train.args import parse_args
from deit.train.folder import LAST

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR2)


class TrainingJob(Checkpointable):
    """deit/main.py with `argv` as one process of a job; %j in `argv` is the job's id.

    `Checkpointable` answers a signal that comes before training has installed its handlers: the
    job starts again.
    """

    def __init__(self, argv: list[str]) -> None:
        self.argv = argv

    def __call__(self) -> None:
        env = JobEnvironment()
        # submitit's local controller makes a folder of the name before %j is filled in.
        with contextlib.suppress(OSError):
            Path(os.environ["SUBMITIT_FOLDER"]).rmdir()  # only if it is empty
        print(START, file=sys.stderr, flush=True)
        if status := one_line_errors(lambda: self._train(env)):
            sys.exit(status)

    def _train(self, env: JobEnvironment) -> None:
        # All processes of a start draw the same port, another start another: sockets may linger,
        # and a node may run several jobs. From 32768 on systems give ports to connections.
        start = f"{env.paths.folder} {env.job_id} {os.environ.get('SLURM_RESTART_COUNT', '0')}"
        os.environ["MASTER_PORT"] = str(random.Random(start).randint(20_000, 32_000))
        # The variables that torchrun sets, as `deit.train.distributed` reads them.
        TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)

        from deit.main import main  # torch comes with it
        from deit.train.stopping import request_stop, stop_reason

        def on_signal(number: int, frame: FrameType | None) -> None:
            request_stop(signal.Signals(number).name)

        args = parse_args([word.replace("%j", env.job_id) for word in self.argv])
        args.output_dir = args.output_dir or str(env.paths.folder)
        if not args.eval and (not args.resume or os.path.lexists(Path(args.output_dir) / LAST)):
            args.resume = "auto"
        for number in STOP_SIGNALS:
            signal.signal(number, on_signal)
        main(args)
        if reason := stop_reason():
            _leave(env, reason)


def _leave(env: JobEnvironment, reason: str) -> None:
    """After a stop: requeue from rank 0 unless the job is meant to end. Leaves the process."""
    if env.global_rank == 0 and env.cluster == "slurm":
        job_id = env.job_id  # of an array the task, where the raw one may mean all of its tasks
        state = next(iter(slurm.job_states(job_id)), None)
        if state != "RUNNING":
            outcome = f"not requeued: Slurm says {state}"
        elif problem := slurm.control("requeue", job_id):
            raise UserError(f"saved, but could not requeue job {job_id}: {problem}")
        else:
            outcome = f"job {job_id} is back in the queue"
        print(f"stopped ({reason}); {outcome}", flush=True)
    elif env.global_rank == 0 and reason != signal.SIGTERM.name:
        env._requeue(0)  # exits with the code that submitit's local controller restarts on
    # Not by returning: submitit would record a finished job.
    sys.exit(0)
