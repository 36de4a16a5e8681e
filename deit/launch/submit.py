"""Handing a `JobSpec` to submitit: Slurm's sbatch, or processes on this machine.

submitit writes the sbatch script, one log a process, and the pickled job that a requeued run starts
from again. It is imported here only, so that nothing else needs it.
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
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from deit.errors import UserError, one_line
from deit.launch import slurm
from deit.launch.job import STOP_SIGNALS, TrainingJob
from deit.launch.preflight import check
from deit.launch.spec import LAUNCHER, JobSpec
from deit.launch.status import RECORD
from deit.train.args import config_dict

if TYPE_CHECKING:
    import submitit

_REPOSITORY = Path(__file__).resolve().parents[2]
# Bounds submitit's own count of time-outs, which `TrainingJob` does not use.
_NO_LIMIT = 1_000_000
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
    if not spec.local and shutil.which("sbatch") is None:
        raise UserError(
            "Slurm is not on this machine (no sbatch command): submit on a login node of your "
            "cluster, or add --local to train here"
        )
    notes = check(spec)
    # A job's number names its folder. One that starts before that is made fails without a log.
    executor = _local_executor(spec) if spec.local else _slurm_executor(spec, {"hold": True})
    jobs = _submit_all(executor, [TrainingJob(spec.argv(task)) for task in range(len(spec.array))])
    print("\n".join([*notes, spec.describe()]))
    with _cancelled_on_failure(jobs):
        _refuse_foreign_folder(spec, jobs)
        for task, job in enumerate(jobs):
            _record(spec, task, job)
    if not spec.local and not spec.resources.sbatch.get("hold"):
        _release(jobs[0].job_id.partition("_")[0])


def dry_run(spec: JobSpec) -> str:
    """What `submit` would do: the sbatch script and the resolved configuration. Submits nothing."""
    parts = [f"# {spec.describe()}"]
    if spec.local:
        parts.append(f"# {spec.resources.processes} local processes, logs in {spec.job_dir}")
    else:
        executor = _slurm_executor(spec)
        if len(spec.array) > 1:
            executor.parameters["map_count"] = len(spec.array)
        parts.append(executor._make_submission_file_text(executor._submitit_command_str, ""))
    for task, own in enumerate(spec.array):
        title = "".join(f", array task {task}: {name} = {value}" for name, value in own.items())
        args = spec.args(task)
        args.output_dir = args.output_dir or spec.job_dir
        parts.append(f"# configuration{title}\n{json.dumps(config_dict(args), indent=2)}")
        parts.append(f"# by hand\n{spec.command(task)}")
    return "\n\n".join(parts)


def _python() -> str:
    """This interpreter, deaf to the stop signals until the job has installed its handlers.

    By default these signals kill; a job preempted while Python still starts would be lost, where
    one that lives on is requeued by Slurm.
    """
    names = " ".join(signal.name.removeprefix("SIG") for signal in STOP_SIGNALS)
    script = f'trap \'\' {names}; exec "$0" "$@"'
    return shlex.join(["sh", "-c", script, sys.executable])


def _slurm_executor(spec: JobSpec, also: dict[str, bool] | None = None) -> submitit.SlurmExecutor:
    """Made on any machine; `also` are further flags of sbatch."""
    from submitit import SlurmExecutor

    class AnywhereExecutor(SlurmExecutor):
        @classmethod
        def affinity(cls) -> int:  # submitit's look for srun
            return 2

    executor = AnywhereExecutor(folder=spec.job_dir, max_num_timeout=_NO_LIMIT, python=_python())
    resources = spec.resources
    path = shlex.quote(str(_REPOSITORY))
    sbatch = {"requeue": True} | resources.sbatch | (also or {})
    names = (
        "mem",
        "partition",
        "account",
        "qos",
        "constraint",
        "mail_user",
        "mail_type",
        "comment",
    )
    chosen = {name: getattr(resources, name) for name in (*names, "gres")}
    executor.update_parameters(
        job_name=resources.job_name or spec.name,
        nodes=resources.nodes,
        ntasks_per_node=resources.ngpus,
        cpus_per_task=resources.cpus_per_task or max(1, spec.args().num_workers),
        time=resources.minutes(),
        signal_delay_s=resources.signal_delay,
        setup=[f'export PYTHONPATH={path}"${{PYTHONPATH:+:$PYTHONPATH}}"', *resources.setup],
        # A process that fails ends the job at once: the others would wait for it for ever.
        srun_args=["--kill-on-bad-exit=1"],
        teardown=_TEARDOWN,
        # False stands for a flag that is not to be given
        additional_parameters={k: v for k, v in sbatch.items() if v is not False},
        **{name: value for name, value in chosen.items() if value is not None},
    )
    return executor


def _local_executor(spec: JobSpec) -> submitit.LocalExecutor:
    from submitit import LocalExecutor

    # The processes inherit this environment; `setup` lines are for another machine's.
    inherited = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(_REPOSITORY), inherited)))
    executor = LocalExecutor(folder=spec.job_dir, max_num_timeout=_NO_LIMIT, python=_python())
    resources = spec.resources
    executor.update_parameters(
        nodes=1,
        tasks_per_node=resources.ngpus,
        gpus_per_node=0 if resources.gres is None else resources.ngpus,
        timeout_min=resources.minutes(),
        signal_delay_s=resources.signal_delay,
    )
    return executor


def _submit_all(executor: submitit.Executor, jobs: list[TrainingJob]) -> list[submitit.Job]:
    """One job, or an array of them where the executor is Slurm's."""
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    with _silenced():
        try:
            return executor.submit_array(jobs)
        except (FailedJobError, FailedSubmissionError) as error:
            raise UserError(f"sbatch refused the job: {one_line(error)}") from error
        except OSError as error:
            raise UserError(
                f"cannot write the job's files: {one_line(error)}; a job that was submitted before "
                "that is held back: see squeue --me, and scancel it"
            ) from error


@contextlib.contextmanager
def _silenced() -> Iterator[None]:
    """Send what the body, and the processes that it starts, print nowhere.

    submitit prints sbatch's complaint, which the one-line error repeats. Its local controller would
    keep a pipe that it inherits open for as long as the training runs.
    """
    sys.stdout.flush()
    kept = os.dup(1), os.dup(2)
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        for number in (1, 2):
            os.dup2(nowhere.fileno(), number)
    try:
        yield
    finally:
        sys.stdout.flush()
        for number, copy in enumerate(kept, start=1):
            os.dup2(copy, number)
            os.close(copy)


@contextlib.contextmanager
def _cancelled_on_failure(jobs: list[submitit.Job]) -> Iterator[None]:
    """Leave no job behind when its folder is another's, when the disk is full, or at Ctrl-C."""
    try:
        yield
    except BaseException as error:
        for job in jobs:
            job.cancel(check=False)
        outcome = f"job {', '.join(job.job_id for job in jobs)} is cancelled"
        if isinstance(error, UserError):
            raise UserError(f"{error}; {outcome}") from error
        print(outcome, file=sys.stderr, flush=True)
        raise


def _refuse_foreign_folder(spec: JobSpec, jobs: list[submitit.Job]) -> None:
    """Job ids come again (process ids, a new Slurm), and a folder's checkpoint is gone on with."""
    folders = [job.paths.folder for job in jobs]
    taken = [folder for folder in folders if (folder / "checkpoint.pth").exists()]
    if "%j" in spec.job_dir and taken:
        raise UserError(
            f"{taken[0]} holds another run, whose job had the same id: move it away, or continue "
            f"it with --job-dir {taken[0]}"
        )


def _record(spec: JobSpec, task: int, job: submitit.Job) -> None:
    """Write into the job's folder what it is, and tell how to follow and stop it."""
    from deit.saving import write_text

    folder = job.paths.folder
    output_dir = spec.options.get("output_dir", "").replace("%j", job.job_id)
    record = {
        "job_id": job.job_id,
        "name": spec.name,
        "recipe": spec.recipe,
        "local": spec.local,
        "epochs": spec.args(task).epochs,
        "output_dir": os.path.abspath(output_dir) if output_dir else "",
        "submitted": time.strftime("%Y-%m-%d %H:%M:%S"),
        "command": spec.command(task),
        "resources": asdict(spec.resources),
    }
    write_text(folder / RECORD, json.dumps(record, indent=2) + "\n")
    title = "".join(f" ({name} {value})" for name, value in spec.array[task].items())
    print(f"job {job.job_id}{title}")
    print(f"  folder  {folder}")
    print(f"  log     tail -F {job.paths.stdout}")
    print(f"  status  {LAUNCHER} status {folder}")
    print(f"  stop    {'kill' if spec.local else 'scancel'} {job.job_id}", flush=True)


def _release(job_id: str) -> None:
    if problem := slurm.control("release", job_id):
        raise UserError(
            f"job {job_id} is submitted but held back ({problem}): "
            f"scontrol release {job_id} starts it"
        )
