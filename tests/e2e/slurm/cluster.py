"""A real SLURM cluster of one node on loopback: munged, slurmctld and slurmd, for the time of a test."""

from __future__ import annotations

import contextlib
import os
import pwd
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_dwm.runtime.rendezvous import free_port

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "sinfo")

# The CPUs are a claim that config_overrides makes slurmd accept: several tasks then fit on a small machine.
# No plugin here needs cgroups or accounting. A requeued job waits until the credentials of its former start have
# expired: 20 seconds in place of two minutes. Everything else is SLURM's default.
SLURM_CONF = """\
ClusterName=loopback
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={controller_port}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmUser={user}
StateSaveLocation={folder}/state
SlurmdPort={node_port}
SlurmdPidFile={folder}/slurmd.pid
SlurmdSpoolDir={folder}/spool
SlurmdUser={user}
SlurmdParameters=config_overrides
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=20
CredType=cred/munge
MailProg=/bin/true
KillWait=2
MessageTimeout=60
MinJobAge=86400
MpiDefault=none
ProctrackType=proctrack/linuxproc
ReturnToService=2
SelectType=select/linear
TaskPlugin=task/none
NodeName=localhost NodeAddr=127.0.0.1 CPUs=16 RealMemory=4000
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=main Nodes=localhost Default=YES MaxTime=INFINITE PriorityTier=1 GraceTime=120
PartitionName=urgent Nodes=localhost MaxTime=INFINITE PriorityTier=10
"""

# Daemons are commonly beside the PATH of users other than root.
PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
START_LIMIT_S = 120
LAST_STATES = {
    "COMPLETED",
    "FAILED",
    "CANCELLED",
    "TIMEOUT",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "BOOT_FAIL",
    "DEADLINE",
}

_NONE: Mapping[str, str] = {}


class ClusterError(Exception):
    """The cluster does not start or has stopped working; the message ends with its daemons' logs."""


@dataclass(frozen=True)
class Job:
    """A finished job."""

    state: str
    """SLURM's word for how it ended, such as COMPLETED or FAILED."""
    log: str


class Cluster:
    """A running cluster; :func:`running_cluster` makes one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._daemons: dict[str, subprocess.Popen] = {}
        controller_port, node_port = free_port(), free_port()
        configuration = folder / "slurm.conf"
        configuration.write_text(
            SLURM_CONF.format(folder=folder, user=_user(), controller_port=controller_port, node_port=node_port)
        )
        # Where the tests themselves run inside a SLURM job, its variables must not reach this cluster's jobs.
        outside = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH_", "SRUN_"))}
        self.environment = {**outside, "PATH": PATH, "SLURM_CONF": str(configuration)}

    def run_job(
        self,
        script: Path,
        *arguments: str,
        options: Sequence[str],
        folder: Path,
        environment: Mapping[str, str],
    ) -> Job:
        """Submit ``script`` with ``sbatch`` from ``folder`` and wait until it has ended, however late.

        Args:
            arguments: of the script.
            options: of ``sbatch``.
            environment: added to the job's environment.

        Raises:
            ClusterError: ``sbatch`` refuses the job, or the cluster breaks while the job waits or runs.
        """
        job_id = self.submit(
            script, *arguments, options=["--no-requeue", *options], folder=folder, environment=environment
        )
        return self.wait(job_id, folder)

    def submit(
        self,
        script: Path,
        *arguments: str,
        options: Sequence[str],
        folder: Path,
        environment: Mapping[str, str],
    ) -> str:
        """Submit ``script`` as :meth:`run_job` does, and return the job's number."""
        command = ["sbatch", "--parsable", "--output=job-%j.log", *options, str(script), *arguments]
        return self._call(*command, folder=folder, environment=environment).strip()

    def wait(self, job_id: str, folder: Path) -> Job:
        """Wait until a job submitted from ``folder`` has ended, however late."""
        log = folder / f"job-{job_id}.log"
        while (state := self._job_state(job_id)) not in LAST_STATES:
            self._check_health()
            time.sleep(1)
        text = log.read_text() if log.exists() else "(the job wrote no log)\n"
        if state != "COMPLETED":  # what SLURM reports about it
            text += self._call("scontrol", "show", "job", job_id) + self._daemon_logs()
        return Job(state, text)

    def start(self) -> None:
        """Start the daemons and wait until the node takes jobs."""
        for name in ("state", "spool"):
            (self.folder / name).mkdir()
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        munge_files = [f"--{kind}={self.folder}/munge.{kind}" for kind in ("socket", "pid-file", "seed-file")]
        self._launch("munged", "--foreground", f"--key-file={key}", *munge_files)
        self.wait_for("socket of munged", (self.folder / "munge.socket").exists)
        self._launch("slurmctld", "-D", "-c")
        self._launch("slurmd", "-D", "-N", "localhost")
        self.wait_for("idle node", lambda: self._node_state() == "idle")

    def stop(self) -> None:
        """End what still runs: jobs first, because slurmd would leave their processes behind."""
        busy = ("allocated", "completing")
        try:
            if self._node_state() in busy:
                self._call("scancel", "--full", f"--user={_user()}")
                self.wait_for("idle node", lambda: self._node_state() not in busy)
        finally:
            for daemon in reversed(self._daemons.values()):
                daemon.terminate()
                daemon.wait()

    def _launch(self, *command: str) -> None:
        name, *arguments = command
        program = shutil.which(name, path=PATH)
        assert program is not None
        with open(self.folder / f"{name}.log", "wb") as log:
            self._daemons[name] = subprocess.Popen(
                [program, *arguments],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def wait_for(self, what: str, is_met: Callable[[], bool]) -> None:
        """Wait until a condition is met.

        Raises:
            ClusterError: it is not met in time, or a daemon has ended.
        """
        deadline = time.monotonic() + START_LIMIT_S
        while not is_met():
            self._check_daemons()
            if time.monotonic() > deadline:
                raise self._error(f"no {what} after {START_LIMIT_S} s")
            time.sleep(0.2)

    def _check_daemons(self) -> None:
        for name, daemon in self._daemons.items():
            if daemon.poll() is not None:
                raise self._error(f"{name} ended with exit code {daemon.returncode}")

    def _check_health(self) -> None:
        self._check_daemons()
        state = self._node_state()
        if state.startswith(("down", "drain", "fail")):
            raise self._error(f"the node is {state}")

    def _node_state(self) -> str:
        """Return ``idle``, ``allocated``, ``down*``, ...; nothing while the controller does not answer."""
        return self._run("sinfo", "--noheader", "--format=%T").stdout.strip()

    def _job_state(self, job_id: str) -> str:
        found = re.search(r"JobState=(\w+)", self._call("scontrol", "show", "job", job_id))
        assert found is not None
        return found[1]

    def _call(self, *command: str, folder: Path | None = None, environment: Mapping[str, str] = _NONE) -> str:
        done = self._run(*command, folder=folder, environment=environment)
        if done.returncode:
            raise self._error(f"{' '.join(command)}: {done.stderr.strip()}")
        return done.stdout

    def _run(
        self, *command: str, folder: Path | None = None, environment: Mapping[str, str] = _NONE
    ) -> subprocess.CompletedProcess[str]:
        environment = {**self.environment, **environment}
        return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)

    def _error(self, message: str) -> ClusterError:
        return ClusterError(f"{message}\n{self._daemon_logs()}")

    def _daemon_logs(self) -> str:
        return "\n".join(f"--- {name}\n{(self.folder / f'{name}.log').read_text()}" for name in self._daemons)


@contextlib.contextmanager
def running_cluster() -> Iterator[Cluster]:
    """Start a cluster for the time of the ``with`` block.

    Raises:
        ClusterError: SLURM or munge is not installed, or a daemon does not start.
    """
    missing = [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]
    if missing:
        raise ClusterError(f"no {', '.join(missing)} on PATH: install Debian's packages slurm-wlm and munge")
    # Not pytest's tmp_path: munge requires that everybody may read the socket's folder, and its path must be short.
    with tempfile.TemporaryDirectory(prefix="slurm-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        cluster = Cluster(folder)
        try:
            cluster.start()
            yield cluster
        finally:
            cluster.stop()


def _user() -> str:
    return pwd.getpwuid(os.geteuid()).pw_name
