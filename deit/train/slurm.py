"""The few questions that trainings and their launcher ask Slurm, through its command line tools."""

from __future__ import annotations

import re
import subprocess

_PATIENCE = 60.0  # seconds that a busy controller may take to answer


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    """Run a Slurm tool; one that is missing or does not answer counts as failed."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE)
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(command, 1, "", str(error))


def job_states(job_id: str) -> list[str]:
    """Slurm's states (RUNNING, COMPLETING, ...) of the job: one, or one for each task of an array.

    None at all if Slurm does not say.
    """
    shown = _run("scontrol", "--oneliner", "show", "job", job_id).stdout
    if states := re.findall(r"\bJobState=(\S+)", shown):
        return states
    # The controller forgets a finished job after minutes, accounting does not.
    table = _run("sacct", "-X", "-n", "-P", "-o", "State", "-j", job_id).stdout
    return [line.split()[0] for line in table.splitlines() if line]  # CANCELLED by 1000


def has_forgotten(job_id: str) -> bool:
    """Whether the controller answers that it knows no such job (any more)."""
    return "Invalid job id" in _run("scontrol", "show", "job", job_id).stderr


def control(action: str, job_id: str) -> str | None:
    """`requeue` a running job or `release` a held one. Returns what went wrong, or None."""
    done = _run("scontrol", action, job_id)
    return None if done.returncode == 0 else done.stderr.strip() or f"scontrol {action} failed"
