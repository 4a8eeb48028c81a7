"""How batch systems are told: a table of directives for SLURM, and one for MSUB (CEA's Bridge, over SLURM)."""

from __future__ import annotations

from dataclasses import dataclass

from training.command.cluster import Job
from training.errors import UserError, did_you_mean


@dataclass(frozen=True)
class System:
    """A batch system.

    Attributes:
        name: for `system=`.
        prefix: what a line of directives begins with.
        submit: the command that takes a script.
        run: the command within a job that starts processes.
        here: the variable that has the folder which the job was submitted from.
        ending: of a script's name.
    """

    name: str
    prefix: str
    submit: str
    run: str
    here: str
    ending: str

    def directives(self, job: Job) -> list[tuple[str, list[str]]]:
        """Flags in groups, each with a word on what they ask for."""
        return (_slurm if self.name == "slurm" else _msub)(job)

    def step(self, *raw: str, nodes: int = 0, tasks: int = 0, cpus: int = 0) -> str:
        """The command that starts processes on the machines of a job.

        Args:
            raw: flags of srun.
            nodes: on how many machines; 0: all.
            tasks: how many processes; 0: all of the job's.
            cpus: cores of each; 0: as the job says.
        """
        short = self.name == "msub"
        names = ("-N ", "-n ", "-c ") if short else ("--nodes=", "--ntasks=", "--cpus-per-task=")
        words = [f"{name}{number}" for name, number in zip(names, (nodes, tasks, cpus), strict=True) if number]
        if raw:
            words += [f'-E "{" ".join(raw)}"'] if short else raw
        return " ".join([self.run, *words])


SYSTEMS = {
    "slurm": System("slurm", "#SBATCH", "sbatch", "srun", "SLURM_SUBMIT_DIR", ".sbatch"),
    "msub": System("msub", "#MSUB", "ccc_msub", "ccc_mprun", "BRIDGE_MSUB_PWD", ".sh"),
}


def find(name: str) -> System:
    """The system of that name.

    Raises:
        UserError: there is none.
    """
    if name not in SYSTEMS:
        known = ", ".join(SYSTEMS)
        raise UserError(f"system must be one of {known}, got {name!r}{did_you_mean(name, SYSTEMS)}.")
    return SYSTEMS[name]


def _clock(seconds: int) -> str:
    days, rest = divmod(seconds, 86400)
    clock = f"{rest // 3600:02d}:{rest // 60 % 60:02d}:{rest % 60:02d}"
    return f"{days}-{clock}" if days else clock


def _shape(job: Job) -> tuple[int, int]:
    """Tasks on each machine and cores of each, as the job asks for them: of torchrun there is one a machine."""
    if job.launcher == "torchrun":
        return 1, job.cpus * job.processes
    return job.processes, job.cpus


def _raw(job: Job) -> list[tuple[str, list[str]]]:
    """Flags that SLURM alone has a name for."""
    limit = f"%{job.array}" if job.array else ""
    return [
        ("GPUs on each machine", [f"--gpus-per-node={job.gpus}"] if job.gpus else []),
        ("the kind of machine", [f"--constraint={job.constraint}"] if job.constraint else []),
        ("an element for each run of the sweep, so many at once",
         [f"--array=0-{job.jobs - 1}{limit}"] if job.array else []),
        ("seconds before the end, and when others take precedence, runs are asked to save and stop ...",
         [f"--signal=USR1@{job.signal}"] if job.signal else []),
        ("... and the job may come back to the queue, its output going on in the same file",
         ["--requeue", "--open-mode=append"] if job.requeue else ["--no-requeue"]),
        ("whom to tell of the end", [f"--mail-user={job.mail}", "--mail-type=END,FAIL"] if job.mail else []),
        ("further flags", list(job.flags)),
    ]  # fmt: skip


def _slurm(job: Job) -> list[tuple[str, list[str]]]:
    tasks, cpus = _shape(job)
    output = f"{job.logs}/%x_%A_%a.out" if job.array else f"{job.logs}/%x_%j.out"
    return [
        ("name, and where the output goes", [f"--job-name={job.name}", f"--output={output.removeprefix('./')}"]),
        ("machines, processes on each, cores of each process",
         [f"--nodes={job.nodes}", f"--ntasks-per-node={tasks}", f"--cpus-per-task={cpus}"]),
        ("memory of each machine", [f"--mem={job.memory}"] if job.memory else []),
        ("time limit", [f"--time={_clock(job.seconds)}"]),
        ("who pays", [f"--account={job.account}"] if job.account else []),
        ("the queue", [f"--partition={job.partition}"] if job.partition else []),
        ("its quality of service", [f"--qos={job.qos}"] if job.qos else []),
        ("no one else on the machines", ["--exclusive"] if job.exclusive else []),
        *_raw(job),
    ]  # fmt: skip


def _msub(job: Job) -> list[tuple[str, list[str]]]:
    tasks, cpus = _shape(job)
    raw = [flag for _, flags in _raw(job) for flag in flags]
    share = max(1, int(job.gigabytes * 1000 / (tasks * cpus))) if job.memory else 0
    output = f"{job.logs}/{job.name}_%I.out".removeprefix("./")
    return [
        ("name, and where the output goes", [f"-r {job.name}", f"-o {output}", f"-e {output}"]),
        ("machines, processes on all of them, cores of each process",
         [f"-N {job.nodes}", f"-n {job.nodes * tasks}", f"-c {cpus}"]),
        ("memory of each core, in MB", [f"-M {share}"] if share else []),
        ("time limit, in seconds", [f"-T {job.seconds}"]),
        ("the project", [f"-A {job.account}"] if job.account else []),
        ("the partition", [f"-q {job.partition}"] if job.partition else []),
        ("its quality of service", [f"-Q {job.qos}"] if job.qos else []),
        ("file systems that the job uses", [f"-m {','.join(job.filesystems)}"] if job.filesystems else []),
        ("no one else on the machines", ["-x"] if job.exclusive else []),
        ("flags of SLURM: " + "; ".join(_why(job)), [f'-E "{" ".join(raw)}"'] if raw else []),
    ]  # fmt: skip


def _why(job: Job) -> list[str]:
    return [why.strip(". ") for why, flags in _raw(job) if flags and why != "further flags"]
