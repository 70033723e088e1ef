"""A SLURM of two nodes on this machine in a folder of its own, run by root without systemd."""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

# names that every machine resolves, as ranks have to find the first node
NODES = ("127.0.0.1", "127.0.0.2")
NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")


def obstacle():
    """Why no SLURM can be brought up here, or nothing."""
    missing = [name for name in NEEDED if shutil.which(name) is None]
    if missing:
        return f"no {', '.join(missing)}: install slurm-wlm and munge"
    return "only root can run slurmd for its jobs" if os.geteuid() else ""


def _free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Cluster:
    """Brings up munged, slurmctld and a slurmd for each node; as a context it takes them down.

    Args:
        folder: Where configuration, state and logs go.
    """

    def __init__(self, folder):
        self.folder = Path(folder)
        self.daemons = []
        self.nodes = {}
        self.environment = os.environ | {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def __enter__(self):
        munge, host = self.folder / "munge", socket.gethostname()
        for name in ("munge", "state", *(f"spool-{node}" for node in NODES)):
            (self.folder / name).mkdir(mode=0o700, parents=True)
        key = munge / "key"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o600)
        files = {"socket": "socket", "key-file": "key", "log-file": "log", "pid-file": "pid", "seed-file": "seed"}
        self._start("munged", "--foreground", "--force", *(f"--{flag}={munge / name}" for flag, name in files.items()))
        self._wait(lambda: (munge / "socket").exists(), "munged")
        settings = {
            "ClusterName": "test",
            "SlurmctldHost": f"{host}(127.0.0.1)",
            "SlurmctldPort": _free_port(),
            "SlurmUser": "root",
            "AuthType": "auth/munge",
            "AuthInfo": f"socket={munge / 'socket'}",
            "CredType": "cred/munge",
            "ProctrackType": "proctrack/linuxproc",
            "TaskPlugin": "task/none",
            "SelectType": "select/cons_tres",
            "SelectTypeParameters": "CR_CPU",
            "SwitchType": "switch/none",
            "AccountingStorageType": "accounting_storage/none",
            "JobAcctGatherType": "jobacct_gather/none",
            "MpiDefault": "none",
            "ReturnToService": 2,
            "JobRequeue": 1,
            "KillWait": 5,
            # tasks share the processors there are
            "SlurmdParameters": "config_overrides",
            "StateSaveLocation": self.folder / "state",
            "SlurmdSpoolDir": self.folder / "spool-%n",
            "SlurmctldPidFile": self.folder / "slurmctld.pid",
            "SlurmdPidFile": self.folder / "slurmd-%n.pid",
            "SlurmctldLogFile": self.folder / "slurmctld.log",
            "SlurmdLogFile": self.folder / "slurmd-%n.log",
            "PartitionName": "all Nodes=ALL Default=YES MaxTime=INFINITE State=UP",
        }
        lines = [f"{name}={value}" for name, value in settings.items()]
        lines += [f"NodeName={name} NodeHostname={host} NodeAddr={name} Port={_free_port()} CPUs=4" for name in NODES]
        (self.folder / "slurm.conf").write_text("\n".join(lines) + "\n")
        self._start("slurmctld", "-D", "-f", self.folder / "slurm.conf")
        for name in NODES:
            self.start_node(name)
        return self

    def __exit__(self, *_):
        if (self.folder / "slurm.conf").exists():
            self.run("scancel", "--user=root", check=False)
        for daemon in reversed(self.daemons):
            daemon.terminate()
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()

    def start_node(self, name):
        """Start the daemon of a node, and wait until jobs can run there."""
        self.nodes[name] = self._start("slurmd", "-D", "-N", name, "-f", self.folder / "slurm.conf")
        state = ("sinfo", "--noheader", "--Node", f"--nodes={name}", "--format=%T")
        self._wait(lambda: self.run(*state, check=False).strip() == "idle", f"the node {name}")

    def _start(self, *command):
        with (self.folder / f"{command[0]}.out").open("a") as log:
            daemon = subprocess.Popen(list(map(str, command)), stdout=log, stderr=log, env=self.environment)
        self.daemons.append(daemon)
        return daemon

    def _wait(self, true, what, seconds=30):
        deadline = time.monotonic() + seconds
        while not true():
            logs = {path.name: path.read_text()[-1000:] for path in self.folder.glob("*.out")}
            assert time.monotonic() < deadline, f"{what} did not come up: {logs}"
            time.sleep(0.1)

    def run(self, *command, check=True):
        """The output of a command of SLURM's."""
        done = subprocess.run(
            list(map(str, command)), env=self.environment, capture_output=True, text=True, check=False, timeout=60
        )
        assert not check or done.returncode == 0, done.stderr
        return done.stdout

    def submit(self, script, *arguments, folder, tasks, options=(), environment=None):
        """Submit a script of the project's for a node without GPUs; returns the job's number."""
        small = ("--gpus-per-node=0", "--cpus-per-task=1", f"--ntasks-per-node={tasks}", f"--chdir={folder}")
        command = ["sbatch", "--parsable", *small, *options, script, *arguments]
        done = subprocess.run(
            list(map(str, command)),
            env=self.environment | (environment or {}),
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def job(self, number):
        """What SLURM says of a job."""
        text = self.run("scontrol", "show", "--oneliner", "job", number)
        return dict(field.split("=", 1) for field in text.split() if "=" in field)

    def tasks(self, number):
        """Processes of a job's step, by rank."""
        found = {}
        for node in NODES:
            # a node without processes of the job is an error
            lines = self.run("scontrol", "listpids", f"{number}.0", node, check=False).splitlines()
            columns = (line.split() for line in lines[1:])
            found |= {int(rank): int(pid) for pid, _, _, _, rank in columns if rank != "-"}
        return found

    def kill_node(self, name, task):
        """Kill the daemon of a node, the task that runs there, and what SLURM started for the task."""
        parent = int(Path(f"/proc/{task}/stat").read_text().rpartition(")")[2].split()[1])
        self.nodes[name].kill()
        self.nodes[name].wait(30)
        for pid in (parent, task):
            os.kill(pid, signal.SIGKILL)

    def wait(self, number, true, seconds=600):
        """Wait until something is true of a job, without the delay that SLURM gives a requeued one."""
        deadline = time.monotonic() + seconds
        while True:
            job = self.job(number)
            if true(job):
                return job
            assert time.monotonic() < deadline, job
            if job["JobState"] == "PENDING" and job["Restarts"] != "0":
                # SLURM refuses a start within the second of the kill: the new credential would be no newer than that
                time.sleep(1.1)
                self.run("scontrol", "update", f"JobId={number}", "StartTime=now", check=False)
            time.sleep(0.2)
