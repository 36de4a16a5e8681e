"""The few questions a running job asks Slurm, through its command line tools."""

from __future__ import annotations

import re
import socket
import subprocess
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime

_PATIENCE = 60.0  # seconds that a busy controller may take to answer
_CONNECT = 15.0  # seconds in which a node that is alive takes a connection


def _run(command: list[str], timeout: float = _PATIENCE) -> subprocess.CompletedProcess[str]:
    """Run a Slurm tool; one that is missing or does not answer counts as failed."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(command, 1, "", str(error))


def _describe(kind: str, name: str) -> list[dict[str, str]]:
    """What `scontrol show` says about a job, or about each of a list of nodes."""
    shown = _run(["scontrol", "--oneliner", "show", kind, name]).stdout
    return [dict(re.findall(r"(\w+)=(\S+)", line)) for line in shown.splitlines() if "=" in line]


def job_state(job_id: str) -> str | None:
    """Slurm's state of the job, such as RUNNING or COMPLETING; None if Slurm does not say."""
    for job in _describe("job", job_id):
        return job.get("JobState")
    # The controller forgets a finished job after minutes, accounting does not.
    table = _run(["sacct", "-X", "-n", "-P", "-o", "State", "-j", job_id]).stdout.split()
    return table[0] if table else None


def requeue(job_id: str) -> str | None:
    """Put the running job back into the queue. Returns what went wrong, or None."""
    return _command("requeue", job_id)


def release(job_id: str) -> str | None:
    """Let the held job start. Returns what went wrong, or None."""
    return _command("release", job_id)


def _command(*words: str) -> str | None:
    done = _run(["scontrol", *words])
    return None if done.returncode == 0 else done.stderr.strip() or f"scontrol {words[0]} failed"


def lost_nodes(job_id: str) -> list[str]:
    """The nodes of a running job that are dead, or came back to life after the job had started.

    The daemons themselves are asked, because the controller may take minutes to miss a node.
    """
    job = next(iter(_describe("job", job_id)), {})
    config = _run(["scontrol", "show", "config"]).stdout
    usual_port = re.search(r"^SlurmdPort\s*=\s*(\d+)", config, re.M)

    def is_lost(node: dict[str, str]) -> bool:
        if "DOWN" in node["State"] or _is_later(node.get("SlurmdStartTime"), job.get("StartTime")):
            return True
        port = node.get("Port") or (usual_port[1] if usual_port else "6818")
        try:
            address = (node.get("NodeAddr", node["NodeName"]), int(port))
            socket.create_connection(address, timeout=_CONNECT).close()
        except OSError:
            return True
        return False

    nodes = _describe("node", job.get("NodeList", ""))
    with ThreadPoolExecutor(max_workers=16) as pool:
        lost = list(pool.map(is_lost, nodes))
    return [node["NodeName"] for node, gone in zip(nodes, lost, strict=True) if gone]


def _is_later(one: str | None, other: str | None) -> bool:
    """Whether Slurm's time `one` is after `other`; False if one of them is not known."""
    try:
        return datetime.fromisoformat(one or "") > datetime.fromisoformat(other or "")
    except ValueError:
        return False
