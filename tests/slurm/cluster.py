"""A real Slurm of four nodes on this machine: munged, slurmctld and a slurmd a node, in a folder and on ports of its own."""

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "squeue")
NODES = ("n0", "n1", "n2", "n3")
STARTING_S = 60.0  # far more than daemons need; a test that waits longer for one has found it dead
CPUS, MEMORY_MB = 4, 4000  # a node, whatever this machine has
FINAL = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY")

# A requeued job may start again when its credentials have expired (5 s is the least), not after two minutes. A dead node is
# noticed within a minute. Jobs of the partition `urgent` put those of `normal` back in the queue, which get their --signal first.
CONF = """
ClusterName=h3scale
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={place}/munge.socket,cred_expire=5
CredType=cred/munge
SlurmctldPidFile={place}/slurmctld.pid
SlurmctldLogFile={place}/slurmctld.log
StateSaveLocation={place}/state
SlurmdPidFile={place}/slurmd-%n.pid
SlurmdLogFile={place}/slurmd-%n.log
SlurmdSpoolDir={place}/spool-%n
SlurmdParameters=config_overrides
SlurmctldParameters=preempt_send_user_signal
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
ReturnToService=2
MpiDefault=none
SlurmctldTimeout=30
SlurmdTimeout=10
InactiveLimit=0
KillWait=5
MinJobAge=3600
{nodes}
PartitionName=normal Nodes=ALL Default=YES State=UP MaxTime=INFINITE PriorityTier=1 GraceTime={grace_s}
PartitionName=urgent Nodes=ALL State=UP MaxTime=INFINITE PriorityTier=2
"""
GRACE_S = 60  # from a preemption to the end of the job's processes


def missing_programs() -> list[str]:
    """What of Slurm is not installed here."""
    return [program for program in PROGRAMS if shutil.which(program) is None]


def wait_for(what: str, found: Callable[[], object], limit_s: float = STARTING_S) -> None:
    """Returns when `found` gives something true; TimeoutError that says for what it has waited."""
    deadline = time.monotonic() + limit_s
    while not found():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {limit_s:.0f} s")
        time.sleep(0.2)


@dataclass
class Cluster:
    """A Slurm that runs; `environment` is what its commands need."""

    place: Path
    environment: dict[str, str]

    def call(self, *words: object, check: bool = True, **options: object) -> subprocess.CompletedProcess[str]:
        """A command in this cluster's environment."""
        command = [str(word) for word in words]
        environment = {**self.environment, **options.pop("env", {})}  # type: ignore[dict-item]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, **options)  # type: ignore[call-overload]
        assert not check or done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done  # type: ignore[no-any-return]

    def job(self, number: str) -> dict[str, str]:
        """What `scontrol show job` says: JobState, ExitCode, Restarts, ..."""
        said = self.call("scontrol", "--oneliner", "show", "job", number).stdout
        return dict(word.split("=", 1) for word in said.split() if "=" in word)

    def wait_for_state(self, number: str, *states: str, limit_s: float = 300.0) -> dict[str, str]:
        """The job, when it is in one of the states (without any: at its end)."""

        def reached() -> bool:
            return self.job(number)["JobState"] in (states or FINAL)

        wait_for(f"job {number} {states or 'ended'} (is {self.job(number)['JobState']})", reached, limit_s)
        return self.job(number)

    def start_node(self, name: str) -> None:
        """Starts a node's slurmd and waits until Slurm uses it."""
        self.call("slurmd", "-N", name, "-f", self.place / "slurm.conf")

        def idle() -> bool:
            return self.call("sinfo", "--noheader", "--nodes", name, "--format=%t").stdout.split()[:1] == ["idle"]

        wait_for(f"node {name}", idle)

    def kill_node(self, name: str) -> None:
        """What a power cut does: slurmd and everything that it has started are gone at once."""
        daemon = int((self.place / f"slurmd-{name}.pid").read_text())
        for process in [psutil.Process(daemon), *self.processes(name)]:
            _signal(process, signal.SIGKILL)

    def processes(self, node: str | None = None) -> list[psutil.Process]:
        """What runs in this cluster, or of jobs on one node: scripts, ranks and the slurmstepd above them, daemons."""
        found = {process.pid: process for process in psutil.process_iter() if self._has(process, node)}
        for process in list(found.values()):
            with suppress(psutil.NoSuchProcess):
                above = process.parent()  # a slurmstepd writes its title over its environment
                if above and above.name() == "slurmstepd":
                    found[above.pid] = above
        return list(found.values())

    def _has(self, process: psutil.Process, node: str | None) -> bool:
        try:
            words = process.environ()
        except psutil.Error:
            return False
        return words.get("SLURM_CONF") == str(self.place / "slurm.conf") and node in (None, words.get("SLURMD_NODENAME"))


@contextmanager
def running(place: Path, environment: dict[str, str]) -> Iterator[Cluster]:
    """Starts the cluster in the folder, and ends everything of it, also after a failure."""
    cluster = Cluster(place, {**environment, "SLURM_CONF": str(place / "slurm.conf")})
    ports = iter(_free_ports(1 + len(NODES)))
    host = socket.gethostname().split(".")[0]
    port = next(ports)
    nodes = "\n".join(
        f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={next(ports)} CPUs={CPUS} RealMemory={MEMORY_MB}"
        for name in NODES
    )
    conf = CONF.format(host=host, port=port, place=place, nodes=nodes, grace_s=GRACE_S)
    (place / "slurm.conf").write_text(conf, encoding="utf-8")
    (place / "state").mkdir()
    try:
        _start_munge(cluster)
        cluster.call("slurmctld", "-f", place / "slurm.conf")
        wait_for("slurmctld", lambda: " is UP" in cluster.call("scontrol", "ping", check=False).stdout)
        for name in NODES:
            cluster.start_node(name)
        yield cluster
    finally:
        _end(cluster)


def _start_munge(cluster: Cluster) -> None:
    place = cluster.place
    (place / "munge.key").write_bytes(os.urandom(128))
    (place / "munge.key").chmod(0o400)
    files = {"socket": "socket", "key-file": "key", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
    cluster.call("munged", "--force", *[f"--{option}={place}/munge.{name}" for option, name in files.items()])
    wait_for("munged", (place / "munge.socket").exists)


def _end(cluster: Cluster) -> None:
    """Ends jobs, then daemons by their pid files, then whatever is left of either."""
    left = {process.pid: process for process in cluster.processes()}
    daemons = [int(path.read_text()) for path in sorted(cluster.place.glob("*.pid"), key=lambda path: path.name == "munge.pid")]
    for pid in [pid for pid in left if pid not in daemons]:
        _signal(left[pid], signal.SIGKILL)
    for pid in daemons:
        with suppress(psutil.NoSuchProcess):
            left[pid] = psutil.Process(pid)
            _signal(left[pid], signal.SIGTERM)
    _, alive = psutil.wait_procs(list(left.values()), timeout=5)
    for process in alive:
        _signal(process, signal.SIGKILL)
    psutil.wait_procs(alive, timeout=5)


def _signal(process: psutil.Process, number: int) -> None:
    with suppress(psutil.NoSuchProcess):
        process.send_signal(number)


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]
