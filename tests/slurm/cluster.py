"""A real Slurm of one node: Debian's slurm-wlm and munge, with ports, keys and folders of its own."""

import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "squeue", "setpriv")
GRACE_S = 4  # between the first word of a pre-emption and the end of the job

CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A requeued job waits as long as a credential lives.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=2,bf_interval=2
# Two cores, whatever the machine has.
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
# Under this name the processes of a job find each other.
NodeName=localhost NodeHostname={host} NodeAddr=127.0.0.1 Port={node_port} CPUs=2 State=UNKNOWN
PartitionName=low Nodes=localhost PriorityTier=1 PreemptMode=REQUEUE GraceTime={grace} MaxTime=INFINITE State=UP
PartitionName=high Nodes=localhost PriorityTier=2 PreemptMode=OFF MaxTime=INFINITE State=UP
"""


class CannotStartError(Exception):
    """Why there can be no Slurm here."""


class Cluster:
    """A Slurm that runs.

    Attributes:
        environment: for processes that use it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}

    def call(self, *command: str) -> str:
        """Output of a command of Slurm."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
        return done.stdout

    def submit(self, command: str, *options: str) -> str:
        """Number of a new batch job."""
        return self.call("sbatch", "--parsable", "--output=/dev/null", *options, f"--wrap={command}").strip()

    def jobs(self) -> dict[str, str]:
        """State of each job that is not over; those of an array are called ``NUMBER_TASK``."""
        lines = self.call("squeue", "--noheader", "--array", "--format=%i %T").splitlines()
        return dict(line.split() for line in lines)

    def describe(self, job: str) -> dict[str, str]:
        """What Slurm knows of a job, by Slurm's own names."""
        words = self.call("scontrol", "--oneliner", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)


@contextmanager
def slurm_cluster() -> Iterator[Cluster]:
    """Start a cluster, and leave nothing of it running.

    Raises:
        CannotStartError: something that it needs is missing, or it does not come up.
    """
    missing = [name for name in NEEDED if shutil.which(name) is None]
    if missing:
        raise CannotStartError(f"needs {', '.join(missing)}: apt-get install slurm-wlm munge")
    if os.geteuid() != 0:
        raise CannotStartError("Slurm's daemons need root to start jobs")
    with ExitStack() as stack:
        # Not in pytest's folder: the path of a socket has no more than 108 characters.
        place = tempfile.TemporaryDirectory(prefix="slurm-", ignore_cleanup_errors=True)
        folder = Path(stack.enter_context(place))
        cluster = Cluster(folder)
        _write_files(folder)
        files = [f"--{kind}-file={folder}/munge.{kind}" for kind in ("key", "pid", "log", "seed")]
        munged = ("munged", "--foreground", "--force", f"--socket={folder}/munge.socket", *files)
        stack.enter_context(_daemon(cluster, *munged))
        _wait_until((folder / "munge.socket").exists, "munged opens no socket", folder / "munged.out")
        stack.enter_context(_daemon(cluster, "slurmctld", "-D"))
        stack.enter_context(_daemon(cluster, "slurmd", "-D", "-N", "localhost"))
        stack.callback(_end_jobs, cluster)
        _wait_until(lambda: _is_idle(cluster), "the node does not come up", folder / "slurmd.log")
        yield cluster


def _write_files(folder: Path) -> None:
    with socket.socket() as first, socket.socket() as second:
        for one in (first, second):
            one.bind(("127.0.0.1", 0))
        ports = [one.getsockname()[1] for one in (first, second)]
    host = socket.gethostname().partition(".")[0]
    for name in ("state", "spool"):
        (folder / name).mkdir()
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o600)
    text = CONFIG.format(folder=folder, host=host, controller_port=ports[0], node_port=ports[1], grace=GRACE_S)
    (folder / "slurm.conf").write_text(text)


@contextmanager
def _daemon(cluster: Cluster, *command: str) -> Iterator[None]:
    """Run a daemon in the foreground; it also ends with this process, should that be killed."""
    with (cluster.folder / f"{command[0]}.out").open("w") as output:
        daemon = subprocess.Popen(
            ["setpriv", "--pdeathsig", "TERM", *command],
            env=cluster.environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        yield
    finally:
        daemon.terminate()
        try:
            daemon.wait(timeout=15)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()


def _is_idle(cluster: Cluster) -> bool:
    try:
        return "State=IDLE" in cluster.call("scontrol", "show", "node", "localhost")
    except RuntimeError:  # the controller does not answer yet
        return False


def _end_jobs(cluster: Cluster) -> None:
    """Jobs outlive the daemons, so they end first."""
    try:
        for job in cluster.jobs():
            cluster.call("scancel", job)
        wait_until(lambda: not cluster.jobs(), 30)
    except (RuntimeError, TimeoutError):
        pass


def wait_until(holds: Callable[[], bool], seconds: float) -> None:
    """Return as soon as something holds.

    Raises:
        TimeoutError: it did not in that time.
    """
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            raise TimeoutError(f"not within {seconds} s")
        time.sleep(0.2)


def _wait_until(holds: Callable[[], bool], otherwise: str, log: Path) -> None:
    try:
        wait_until(holds, 30)
    except TimeoutError:
        tail = log.read_text().splitlines()[-3:] if log.exists() else []
        raise CannotStartError(f"{otherwise}: {' | '.join(tail)}") from None
