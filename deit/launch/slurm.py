"""The few questions a running job asks Slurm, through its command line tools."""

from __future__ import annotations

import os
import re
import socket
import subprocess
from concurrent.futures import ThreadPoolExecutor

_PATIENCE = 60.0  # seconds that a busy controller may take to answer
_CONNECT = 15.0  # seconds in which a node that is alive takes a connection


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
    """The nodes of the job this runs in that are down or whose slurmd takes no connection.

    Asking the daemons themselves is what makes the answer quick: the controller may take minutes
    to miss a node.
    """
    shown = _run(["scontrol", "--oneliner", "show", "node", os.environ["SLURM_JOB_NODELIST"]])
    config = _run(["scontrol", "show", "config"]).stdout
    default_port = re.search(r"^SlurmdPort\s*=\s*(\d+)", config, re.M)
    nodes = []
    for line in shown.stdout.splitlines():
        values = dict(re.findall(r"\b(NodeName|NodeAddr|Port|State)=(\S+)", line))
        port = values.get("Port") or (default_port[1] if default_port else "6818")
        nodes.append((values["NodeName"], values.get("NodeAddr"), int(port), values["State"]))
    with ThreadPoolExecutor(max_workers=16) as pool:
        answers = list(pool.map(_answers, nodes))
    return [name for (name, *_), answer in zip(nodes, answers, strict=True) if not answer]


def _answers(node: tuple[str, str | None, int, str]) -> bool:
    name, address, port, state = node
    if "DOWN" in state:
        return False
    try:
        socket.create_connection((address or name, port), timeout=_CONNECT).close()
    except OSError:
        return False
    return True
