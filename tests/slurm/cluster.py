"""A Slurm of two nodes on one machine, for the tests in this folder and for trying things out.

    apt-get install --no-install-recommends slurm-wlm munge
    python tests/slurm/cluster.py up slurm-test && . slurm-test/env.sh && sinfo
    python tests/slurm/cluster.py down slurm-test

Needs root. Each slurmd gets a host name and an /etc/hosts of its own (`unshare`), so that the nodes
n1 and n2 resolve and the processes of a node can be told apart. Partition `high` evicts jobs of
`low`, the default one.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "unshare")
NODES = ("n1", "n2")

_CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
# Jobs meet at ports that follow from their numbers, which those of another cluster must not have.
FirstJobId={port}
SlurmUser=root
SlurmdUser=root
# cred_expire is also what a requeued job waits, and what the start of a step may take.
AuthInfo=socket={folder}/munge.sock,cred_expire=10
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
SlurmdParameters=config_overrides
SlurmdTimeout=60
KillWait=10
MinJobAge=3600
JobRequeue=1
ReturnToService=2
{nodes}
PartitionName=low  Nodes=ALL Default=YES State=UP PriorityTier=1  PreemptMode=REQUEUE GraceTime=20
PartitionName=high Nodes=ALL Default=NO  State=UP PriorityTier=10 PreemptMode=OFF
"""


def why_unavailable() -> str | None:
    """Why no cluster can be started here, or None."""
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        return f"no {', '.join(missing)}: apt-get install slurm-wlm munge"
    if os.geteuid() != 0:
        return "starting Slurm needs root"
    if subprocess.run(["unshare", "-u", "-m", "true"], capture_output=True).returncode:
        return "unshare is not permitted here"
    return None


def _free_port() -> int:
    """Below those that the system gives to connections, and that trainings under Slurm meet at."""
    while True:
        port = random.SystemRandom().randrange(10000, 20000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port


class Cluster:
    """The daemons whose files lie in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self.env = os.environ | {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def up(self, timeout: float = 60) -> None:
        """Start everything and wait until both nodes are idle.

        Raises:
            RuntimeError: they are not within `timeout` seconds; the message has the logs' ends.
        """
        folder, key = self.folder, self.folder / "key"
        for path in (folder / "state", key, *(folder / f"spool.{node}" for node in NODES)):
            path.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o755)  # munge wants its socket's folder accessible
        key.chmod(0o700)
        (key / "munge.key").write_bytes(os.urandom(128))
        (key / "munge.key").chmod(0o600)
        host = socket.gethostname().split(".")[0]
        nodes = "\n".join(
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={_free_port()} "
            "CPUs=8 RealMemory=4000 State=UNKNOWN"
            for node in NODES
        )
        conf = _CONF.format(host=host, port=_free_port(), folder=folder, nodes=nodes)
        (folder / "slurm.conf").write_text(conf)
        # slurmd loads a cgroup plugin in any case; this one does nothing that nobody asks for.
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        hosts = Path("/etc/hosts").read_text() + "".join(f"127.0.0.1 {n}\n" for n in NODES)
        (folder / "hosts").write_text(hosts)
        (folder / "env.sh").write_text(f"export SLURM_CONF={self.env['SLURM_CONF']}\n")
        munge = ["munged", "--force", f"--socket={folder}/munge.sock"]
        munge += [f"--key-file={key}/munge.key", f"--seed-file={key}/munge.seed"]
        self._start(*munge, f"--pid-file={folder}/munged.pid", f"--log-file={folder}/munged.log")
        self._start("slurmctld", "-f", f"{folder}/slurm.conf")
        for node in NODES:
            self.start_node(node)
        idle = ("sinfo", "-h", "-p", "low", "-t", "idle", "-o", "%D")
        if not wait_until(lambda: self.query(*idle) == str(len(NODES)), timeout):
            self.down()
            raise RuntimeError(f"Slurm did not come up:\n{self.logs()}")

    def start_node(self, node: str) -> None:
        """Start (or bring back) the slurmd of `node`."""
        script = 'hostname "$1"; mount --bind "$2/hosts" /etc/hosts; '
        script += 'exec slurmd -f "$2/slurm.conf" -N "$1"'
        self._start("unshare", "-u", "-m", "sh", "-c", script, "sh", node, str(self.folder))

    def kill_node(self, node: str) -> None:
        """Kill `node`'s slurmd and everything that runs there, as a power cut does."""
        slurmd = int((self.folder / f"slurmd.{node}.pid").read_text())
        namespace = os.readlink(f"/proc/{slurmd}/ns/uts")
        for number in (signal.SIGSTOP, signal.SIGKILL):  # none is to see another's end
            for entry in Path("/proc").iterdir():
                with contextlib.suppress(OSError):  # ended in the meantime, or not ours to look at
                    if entry.name.isdigit() and os.readlink(entry / "ns" / "uts") == namespace:
                        os.kill(int(entry.name), number)

    def query(self, *command: str, check: bool = False) -> str:
        """The output of a Slurm tool, stripped; empty if it fails and `check` allows that."""
        done = subprocess.run(
            command, env=self.env, check=check, stdout=subprocess.PIPE, text=True, timeout=60
        )
        return done.stdout.strip()

    def down(self) -> None:
        """Cancel all jobs and end all daemons."""
        self.query("scancel", "--full", "--signal=KILL", "-u", "root")
        self.query("scancel", "-u", "root")
        wait_until(lambda: not self.query("squeue", "-h", "-t", "R,CG"), 10)
        pids = [int(path.read_text()) for path in self.folder.glob("*.pid")]
        for number in (signal.SIGTERM, signal.SIGKILL):
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
            wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), 5)

    def logs(self, lines: int = 15) -> str:
        """The ends of all daemons' logs."""
        return "\n".join(
            "\n".join([f"--- {path.name}", *path.read_text(errors="replace").splitlines()[-lines:]])
            for path in sorted(self.folder.glob("*.log"))
        )

    def _start(self, *command: str) -> None:
        # Daemons keep inherited pipes open, so their output goes nowhere but into their logs.
        streams = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
        subprocess.run(command, env=self.env, check=True, timeout=60, **streams)


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    """Until `condition` holds; False if that takes longer."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in ("up", "down"):
        sys.exit("usage: cluster.py up|down FOLDER")
    if reason := why_unavailable():
        sys.exit(f"error: {reason}")
    cluster = Cluster(Path(sys.argv[2]))
    cluster.up() if sys.argv[1] == "up" else cluster.down()
