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
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "unshare")
NODES = ("n1", "n2")

_CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
# Jobs meet at ports that follow from their numbers, which those of another cluster must not have.
FirstJobId={controller_port}
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
{node_lines}
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


def _free_ports(count: int) -> list[int]:
    """Below those that the system gives to connections, and that trainings under Slurm meet at."""
    ports: set[int] = set()
    while len(ports) < count:
        port = random.SystemRandom().randrange(10000, 20000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            ports.add(port)
    return list(ports)


class Cluster:
    """The daemons whose files lie in `folder`."""

    def __init__(self, folder: Path, cpus: int = 8) -> None:
        """`cpus`: what each node pretends to have."""
        self.folder = folder.resolve()
        self.cpus = cpus
        self.env = os.environ | {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def up(self, timeout: float = 60) -> None:
        """Start everything and wait until both nodes are idle.

        Raises:
            RuntimeError: they are not within `timeout` seconds; the message has the logs' ends.
        """
        for name in ("state", "key", *(f"spool.{node}" for node in NODES)):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o755)  # munge wants its socket's folder accessible
        self._write_files()
        socket_path, key = self.folder / "munge.sock", self.folder / "key"
        munge = ["munged", "--force", f"--socket={socket_path}", f"--key-file={key}/munge.key"]
        munge += [f"--seed-file={key}/munge.seed", f"--pid-file={self.folder}/munged.pid"]
        munge += [f"--log-file={self.folder}/munged.log"]
        self._run(munge)
        self._run(["slurmctld", "-f", self.env["SLURM_CONF"]])
        for node in NODES:
            self.start_node(node)
        deadline = time.monotonic() + timeout
        while self.query("sinfo", "-h", "-p", "low", "-t", "idle", "-o", "%D") != str(len(NODES)):
            if time.monotonic() > deadline:
                self.down()
                raise RuntimeError(f"Slurm did not come up:\n{self.logs()}")
            time.sleep(0.2)

    def _write_files(self) -> None:
        key = self.folder / "key"
        key.chmod(0o700)
        (key / "munge.key").write_bytes(os.urandom(128))
        (key / "munge.key").chmod(0o600)
        host = socket.gethostname().split(".")[0]
        controller_port, *ports = _free_ports(1 + len(NODES))
        node_lines = "\n".join(
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} "
            f"CPUs={self.cpus} RealMemory=4000 State=UNKNOWN"
            for node, port in zip(NODES, ports, strict=True)
        )
        (self.folder / "slurm.conf").write_text(
            _CONF.format(
                host=host,
                controller_port=controller_port,
                folder=self.folder,
                node_lines=node_lines,
            )
        )
        # slurmd loads a cgroup plugin in any case; this one does nothing that nobody asks for.
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        hosts = Path("/etc/hosts").read_text() + "".join(f"127.0.0.1 {n}\n" for n in NODES)
        (self.folder / "hosts").write_text(hosts)
        (self.folder / "env.sh").write_text(f"export SLURM_CONF={self.env['SLURM_CONF']}\n")

    def start_node(self, node: str) -> None:
        """Start (or bring back) the slurmd of `node`."""
        script = 'hostname "$1"; mount --bind "$2/hosts" /etc/hosts; '
        script += 'exec slurmd -f "$2/slurm.conf" -N "$1"'
        self._run(["unshare", "-u", "-m", "sh", "-c", script, "sh", node, str(self.folder)])

    def kill_node(self, node: str) -> None:
        """Kill `node`'s slurmd and everything that runs there, as a power cut does."""
        slurmd = int((self.folder / f"slurmd.{node}.pid").read_text())
        namespace = os.readlink(f"/proc/{slurmd}/ns/uts")
        for number in (signal.SIGSTOP, signal.SIGKILL):  # none is to see another's end
            for entry in Path("/proc").iterdir():
                with contextlib.suppress(OSError):  # ended in the meantime, or not ours to look at
                    if entry.name.isdigit() and os.readlink(entry / "ns" / "uts") == namespace:
                        os.kill(int(entry.name), number)

    def query(self, *command: str) -> str:
        """The output of a Slurm tool, stripped; empty if it fails."""
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=60)
        return done.stdout.strip()

    def command(self, *command: str) -> None:
        """Run a Slurm tool that must not fail."""
        subprocess.run(command, env=self.env, check=True, timeout=60)

    def down(self) -> None:
        """Cancel all jobs and end all daemons."""
        self.query("scancel", "--full", "--signal=KILL", "-u", "root")
        self.query("scancel", "-u", "root")
        for _ in range(50):
            if not self.query("squeue", "-h", "-t", "R,CG"):
                break
            time.sleep(0.2)
        pids = [int(path.read_text()) for path in self.folder.glob("*.pid")]
        for number in (signal.SIGTERM, signal.SIGKILL):
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
            deadline = time.monotonic() + 5
            while time.monotonic() < deadline and any(Path(f"/proc/{p}").exists() for p in pids):
                time.sleep(0.1)

    def logs(self, lines: int = 15) -> str:
        """The ends of all daemons' logs."""
        parts = []
        for path in sorted(self.folder.glob("*.log")):
            end = path.read_text(errors="replace").splitlines()[-lines:]
            parts.append(f"--- {path.name}\n" + "\n".join(end))
        return "\n".join(parts)

    def _run(self, command: list[str]) -> None:
        # Daemons keep inherited pipes open, so their output goes nowhere but into their logs.
        subprocess.run(
            command,
            env=self.env,
            check=True,
            timeout=60,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in ("up", "down"):
        sys.exit("usage: cluster.py up|down FOLDER")
    if reason := why_unavailable():
        sys.exit(f"error: {reason}")
    cluster = Cluster(Path(sys.argv[2]))
    cluster.up() if sys.argv[1] == "up" else cluster.down()
