"""Handing a `JobSpec` to submitit: Slurm's sbatch, or processes on this machine.

submitit writes the sbatch script, one log a process, and the pickled job that a requeued run starts
from again.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from submitit import Job, LocalExecutor, SlurmExecutor
from submitit.core.utils import FailedJobError, FailedSubmissionError

from deit.errors import UserError, one_line
from deit.launch.cluster import SBATCH_OPTIONS
from deit.launch.job import TrainingJob
from deit.launch.spec import LAUNCHER, JobSpec, Task
from deit.launch.status import RECORD
from deit.train import slurm
from deit.train.args import config_dict
from deit.train.folder import LAST

_REPOSITORY = shlex.quote(str(Path(__file__).resolve().parents[2]))
# This interpreter, which finds this code, deaf to the stop signals until the job has installed its
# handlers. By default they kill; a job preempted while Python still starts would be lost, where one
# that lives on is requeued by Slurm.
_START = f'export PYTHONPATH={_REPOSITORY}"${{PYTHONPATH:+:$PYTHONPATH}}"; trap "" TERM USR2; '
_PYTHON = shlex.join(["sh", "-c", _START + 'exec "$0" "$@"', sys.executable])
# Processes whose partner's node died fail minutes before Slurm misses the node, and then requeues
# the job by itself. So a failed job in which a node starts nothing any more waits for that.
_TEARDOWN = [
    "status=$?",
    "[ $status = 0 ] || srun --overlap -n $SLURM_NNODES --ntasks-per-node=1 true || sleep 900",
    "exit $status",
]


def submit(spec: JobSpec) -> None:
    """Submit `spec` and tell on stdout what was started and how to follow and stop it.

    Raises:
        UserError: Slurm is not there, or refuses the job, or the job would fail.
    """
    local = spec.asked.local
    if not local and shutil.which("sbatch") is None:
        raise UserError(
            "Slurm is not on this machine (no sbatch command): submit on a login node of your "
            "cluster, or add --local to train here"
        )
    from deit.launch.preflight import check  # with torch, which a dry run does without

    check(spec)
    # A job's number names its folder. One that starts before that is made fails without a log.
    executor = _local_executor(spec) if local else _slurm_executor(spec, hold=True)
    try:
        with _silenced():
            jobs = executor.submit_array([TrainingJob(task.argv) for task in spec.tasks])
    except (FailedJobError, FailedSubmissionError) as error:
        raise UserError(f"sbatch refused the job: {one_line(error)}") from error
    except OSError as error:
        raise UserError(
            f"cannot write the job's files: {one_line(error)}; a job that was submitted before "
            "that is held back: see squeue --me, and scancel it"
        ) from error
    print(spec.describe())
    try:
        for task, job in zip(spec.tasks, jobs, strict=True):
            _record(spec, task, job)
    except BaseException as error:  # the folder is another's, the disk is full, or Ctrl-C
        for job in jobs:
            job.cancel(check=False)
        outcome = f"job {', '.join(job.job_id for job in jobs)} is cancelled"
        if isinstance(error, UserError):
            raise UserError(f"{error}; {outcome}") from error
        print(outcome, file=sys.stderr, flush=True)
        raise
    if not local and not spec.asked.sbatch.get("hold"):
        job_id = jobs[0].job_id.partition("_")[0]
        if problem := slurm.control("release", job_id):
            raise UserError(
                f"job {job_id} is submitted but held back ({problem}): "
                f"scontrol release {job_id} starts it"
            )


def dry_run(spec: JobSpec) -> str:
    """What `submit` would do: the sbatch script and the resolved configuration. Submits nothing."""
    parts = [f"# {spec.describe()}"]
    if spec.asked.local:
        parts.append(f"# {spec.processes} local processes, logs in {spec.asked.job_dir}")
    else:
        executor = _slurm_executor(spec)
        if len(spec.tasks) > 1:
            executor.parameters["map_count"] = len(spec.tasks)
        parts.append(executor._make_submission_file_text(executor._submitit_command_str, ""))
    for number, task in enumerate(spec.tasks):
        title = f", array task {number}: {task.title}" if task.title else ""
        options = vars(task.args) | {"output_dir": task.args.output_dir or spec.asked.job_dir}
        parts.append(f"# configuration{title}\n{json.dumps(config_dict(options), indent=2)}")
        parts.append(f"# by hand\n{spec.command(task)}")
    return "\n\n".join(parts)


class _AnywhereExecutor(SlurmExecutor):
    """One that can be made where there is no Slurm."""

    @classmethod
    def affinity(cls) -> int:  # submitit's look for srun
        return 2


def _slurm_executor(spec: JobSpec, **also: bool) -> SlurmExecutor:
    """`also` are further flags of sbatch."""
    asked = spec.asked
    executor = _AnywhereExecutor(asked.job_dir, python=_PYTHON)
    flags = {name: getattr(asked, name) for name in SBATCH_OPTIONS}
    flags |= {"gres": spec.gres, "requeue": True} | asked.sbatch | also
    executor.update_parameters(
        job_name=asked.job_name or spec.name,
        nodes=asked.nodes,
        ntasks_per_node=asked.ngpus,
        cpus_per_task=asked.cpus_per_task or max(1, spec.tasks[0].args.num_workers),
        time=asked.time,
        signal_delay_s=asked.signal_delay,
        setup=asked.setup,
        # A process that fails ends the job at once: the others would wait for it for ever.
        srun_args=["--kill-on-bad-exit=1"],
        teardown=_TEARDOWN,
        # False stands for a flag that is not to be given.
        additional_parameters={
            name: value for name, value in flags.items() if value is not None and value is not False
        },
    )
    return executor


def _local_executor(spec: JobSpec) -> LocalExecutor:
    asked = spec.asked
    executor = LocalExecutor(asked.job_dir, python=_PYTHON)
    executor.update_parameters(
        tasks_per_node=asked.ngpus,
        gpus_per_node=0 if spec.gres is None else asked.ngpus,
        timeout_min=asked.time,
        signal_delay_s=asked.signal_delay,
    )
    return executor


@contextlib.contextmanager
def _silenced() -> Iterator[None]:
    """Send what the body, and the processes that it starts, print nowhere.

    submitit prints sbatch's complaint, which the one-line error repeats. Its local controller would
    keep a pipe that it inherits open for as long as the training runs.
    """
    sys.stdout.flush()
    kept = {stream: os.dup(stream) for stream in (1, 2)}
    with open(os.devnull, "w") as nowhere:
        for stream in kept:
            os.dup2(nowhere.fileno(), stream)
    try:
        yield
    finally:
        sys.stdout.flush()
        for stream, copy in kept.items():
            os.dup2(copy, stream)
            os.close(copy)


def _record(spec: JobSpec, task: Task, job: Job) -> None:
    """Write into the job's folder what it is, and tell how to follow and stop it."""
    from deit.saving import write_text

    folder, asked = job.paths.folder, spec.asked
    # Job ids come again (process ids, a new Slurm), and a folder's checkpoint is gone on with.
    if "%j" in asked.job_dir and (folder / LAST).exists():
        raise UserError(
            f"{folder} holds another run, whose job had the same id: move it away, or continue "
            f"it with --job-dir {folder}"
        )
    output_dir = task.args.output_dir.replace("%j", job.job_id)
    record = {
        "job_id": job.job_id,
        "name": spec.name,
        "recipe": asked.recipe,
        "local": asked.local,
        "epochs": task.args.epochs,
        "output_dir": os.path.abspath(output_dir) if output_dir else "",
        "submitted": time.strftime("%Y-%m-%d %H:%M:%S"),
        "command": spec.command(task),
        "resources": vars(asked),
    }
    write_text(folder / RECORD, json.dumps(record, indent=2) + "\n")
    print(f"job {job.job_id}" + (f" ({task.title})" if task.title else ""))
    print(f"  folder  {folder}")
    print(f"  log     tail -F {job.paths.stdout}")
    print(f"  status  {LAUNCHER} status {folder}")
    print(f"  stop    {'kill' if asked.local else 'scancel'} {job.job_id}", flush=True)
