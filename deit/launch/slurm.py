"""The few questions a running job asks Slurm, through its command line tools."""

from __future__ import annotations

import os
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor

_PATIENCE = 60.0  # seconds that a busy controller may take to answer


def _run(command: list[str], timeout: float = _PATIENCE) -> subprocess.CompletedProcess[str]:
    """Run a Slurm tool; one that is missing or does not answer counts as failed."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(command, 1, "", str(error))


def job_state(job_id: str) -> str | None:
    """Slurm's state of the job, such as RUNNING or COMPLETING; None if Slurm does not say."""
    shown = _run(["scontrol", "--oneliner", "show", "job", job_id]).stdout
    match = re.search(r"\bJobState=(\w+)", shown)
    if match:
        return match[1]
    # The controller forgets a finished job after minutes, accounting does not.
    table = _run(["sacct", "-X", "-n", "-P", "-o", "State", "-j", job_id]).stdout.split()
    return table[0] if table else None


def requeue(job_id: str) -> str | None:
    """Put the running job back into the queue. Returns what went wrong, or None."""
    done = _run(["scontrol", "requeue", job_id])
    return None if done.returncode == 0 else done.stderr.strip() or "scontrol requeue failed"


def silent_nodes() -> list[str]:
    """The nodes of the job this runs in that do not start a process when asked to."""
    listed = _run(["scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]])
    nodes = listed.stdout.split()
    with ThreadPoolExecutor(max_workers=16) as pool:
        answers = list(pool.map(_answers, nodes))
    return [node for node, answer in zip(nodes, answers, strict=True) if not answer]


def _answers(node: str) -> bool:
    # Overlapping, so that it starts beside whatever else the job still runs there. As a variable,
    # because releases that know no overlap ignore it.
    variables = ["env", "SLURM_OVERLAP=1"]
    command = ["srun", "-w", node, "-N1", "-n1", "--ntasks-per-node=1", "--mem=0", "true"]
    return _run(variables + command).returncode == 0
