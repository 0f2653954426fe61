"""A SLURM cluster of one machine for tests: munged, slurmctld and slurmd in a temporary folder.

Nothing outside that folder is read or written, the ports are free ones, and all of it ends with the
context. SLURM believes what the configuration says of the machine, so it may have more CPUs than
there are, and needs neither systemd nor cgroups nor a database.
"""

import contextlib
import getpass
import os
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta
from pathlib import Path

DAEMONS = ("munged", "slurmctld", "slurmd")
PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
CONFIG = """
ClusterName=test
SlurmctldHost=localhost
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/{proctrack}
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,sched_min_interval=0,batch_sched_delay=0,bf_interval=1
KillWait=10
ReturnToService=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=localhost CPUs={cpus} RealMemory=4096 State=UNKNOWN
PartitionName=main Nodes=localhost Default=YES MaxTime=60 PriorityTier=1
PartitionName=urgent Nodes=localhost MaxTime=60 PriorityTier=2
"""


def missing() -> str:
    """The reason why no cluster can run here; "" if one can."""
    gone = [name for name in DAEMONS if shutil.which(name, path=PATH) is None]
    return f"no {', '.join(gone)} (Debian: slurm-wlm, munge)" if gone else ""


class Cluster:
    """One that runs: `environment` names it to SLURM's commands."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.environment = {"SLURM_CONF": f"{folder}/slurm.conf"}

    def ask(self, *command: str) -> str:
        """The output of a command of SLURM."""
        return subprocess.run(
            command,
            env={**os.environ, **self.environment},
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        ).stdout

    def jobs(self, what: str = "%i", *words: str) -> list[str]:
        """A line per job in the queue, in squeue's format."""
        return self.ask("squeue", "--noheader", "--array", f"--format={what}", *words).split("\n")[
            :-1
        ]

    def hurry(self) -> None:
        """Lets requeued jobs begin in two seconds. SLURM makes them wait two minutes.

        Not at once: slurmd may still be clearing away the job's last life, and its new script.
        """
        soon = datetime.now() + timedelta(seconds=10)
        for line in self.jobs("%i|%r|%S", "--states=PENDING"):
            number, reason, begin = line.split("|")
            if reason == "BeginTime" and begin != "N/A" and datetime.fromisoformat(begin) > soon:
                self.ask("scontrol", "update", f"JobId={number}", "StartTime=now+2")


@contextlib.contextmanager
def running(cpus: int = 4, proctrack: str = "linuxproc") -> Iterator[Cluster]:
    """A cluster with one idle node. It ends with its jobs and daemons."""
    # Not pytest's folder: a socket's path is short, and munged wants its folder open to all.
    with tempfile.TemporaryDirectory(prefix="slurm") as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        folder.chmod(0o755)
        for part in ("munge", "state", "spool"):
            (folder / part).mkdir(mode=0o755)
        config = CONFIG.format(
            user=getpass.getuser(),
            folder=folder,
            ports=_free_ports(2),
            cpus=cpus,
            proctrack=proctrack,
        )
        (folder / "slurm.conf").write_text(config)
        cluster = Cluster(folder)
        for command in _daemons(folder):
            stack.enter_context(_daemon(cluster, command))
        _wait_until_idle(cluster)
        stack.callback(_cancel_all, cluster)
        stop = threading.Event()
        thread = threading.Thread(target=_hurry_until, args=(cluster, stop))
        thread.start()
        stack.callback(thread.join)
        stack.callback(stop.set)
        yield cluster


def _daemons(folder: Path) -> list[list[str]]:
    munge = folder / "munge"
    (munge / "key").write_bytes(os.urandom(128))
    (munge / "key").chmod(0o400)
    return [
        ["munged", "--foreground", f"--key-file={munge}/key", f"--socket={munge}/socket",
         f"--pid-file={munge}/pid", f"--log-file={munge}/log", f"--seed-file={munge}/seed"],
        ["slurmctld", "-D", "-f", f"{folder}/slurm.conf"],
        ["slurmd", "-D", "-N", "localhost", "-f", f"{folder}/slurm.conf"],
    ]  # fmt: skip


@contextlib.contextmanager
def _daemon(cluster: Cluster, command: Sequence[str]) -> Iterator[None]:
    with open(cluster.folder / f"{command[0]}.out", "wb") as output:
        process = subprocess.Popen(
            command,
            env={**os.environ, **cluster.environment, "PATH": PATH},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_until_idle(cluster: Cluster) -> None:
    end = time.monotonic() + 30
    while True:
        try:
            if "idle" in cluster.ask("sinfo", "--noheader", "--format=%T"):
                return
        except subprocess.CalledProcessError as error:
            said = error.stderr
        else:
            said = "no node is idle"
        if time.monotonic() > end:
            logs = [
                path.read_text(errors="replace")[-2000:] for path in cluster.folder.glob("*.out")
            ]
            raise TimeoutError("\n".join(["SLURM did not start", said, *logs]))
        time.sleep(0.1)


def _cancel_all(cluster: Cluster) -> None:
    cluster.ask("scancel", f"--user={os.getuid()}")
    end = time.monotonic() + 30
    while cluster.jobs() and time.monotonic() < end:
        time.sleep(0.1)


def _hurry_until(cluster: Cluster, stop: threading.Event) -> None:
    while not stop.wait(0.5):
        # A job may be cancelled just now; a busy machine may make SLURM late.
        with contextlib.suppress(subprocess.CalledProcessError, subprocess.TimeoutExpired):
            cluster.hurry()


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("localhost", 0))
        return [each.getsockname()[1] for each in sockets]
