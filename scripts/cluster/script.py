"""The script of a batch job: directives, environment, what is started, and what becomes of its end."""

from __future__ import annotations

import textwrap

from scripts.cluster import systems
from scripts.cluster.systems import System
from training.command.cluster import Job, quoted

WIDTH = 116


def render(job: Job, command: str, title: str = "") -> str:
    """The script.

    Args:
        job: what is to run.
        command: that made it, for the first lines.
        title: a sentence on what it is.
    """
    system = systems.find(job.system)
    parts = [_head(job, system, command, title), _environment(job, system), _end(job), _start(job, system)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _head(job: Job, system: System, command: str, title: str) -> str:
    lines = ["#!/usr/bin/env bash", *_comment(title or _title(job)), *_comment(f"Written by: {command}"), "#"]
    for why, flags in system.directives(job):
        if flags:
            lines += [*_comment(why), *(f"{system.prefix} {flag}" for flag in flags)]
    return "\n".join(lines)


def _title(job: Job) -> str:
    if job.array:
        return f"A sweep of {job.jobs} runs, a job each. Launched again, it skips what has ended and resumes the rest."
    if job.side:
        return (
            f"A sweep of {job.jobs} runs in one allocation, {job.side} side by side, each with "
            f"{'a GPU' if job.gpus else 'cores'} of its own."
        )
    several = job.nodes * job.processes > 1
    how = f" by {job.nodes} × {job.processes} processes, which {job.launcher} starts" if several else ""
    return f"{'A sweep, run after run' if job.overrides[:1] == ['-m'] else 'One run'}{how}."


def _comment(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent="# ", subsequent_indent="#   ", break_on_hyphens=False)


def _environment(job: Job, system: System) -> str:
    head = ["# The environment. What fails here ends the job.", "set -eo pipefail", f'cd "${system.here}"']
    return "\n".join([*head, *job.environment_lines()])


def _end(job: Job) -> str:
    """What is done when the runs have ended: with their exit code, or back to the queue."""
    head = f"""\
        # A run that is asked to stop saves and ends with code 75. Launchers hide codes: it leaves word in a file, too.
        # 138 and 143: the signal came before training began, or a launcher passed it on.
        export CURVLAB_STOPPED="{job.logs}/.stopped_$SLURM_JOB_ID"
        rm -f "$CURVLAB_STOPPED"
        """
    again = f"""\
        finish() {{
          case "$1" in
            0) exit 0 ;;
            75 | 138 | 143) ;;
            *) if [ ! -e "$CURVLAB_STOPPED" ]; then exit "$1"; fi ;;
          esac
          rm -f "$CURVLAB_STOPPED"
          if [ "${{SLURM_RESTART_COUNT:-0}}" -ge {job.requeue} ]; then
            echo "stopped and saved, and not queued again after ${{SLURM_RESTART_COUNT:-0}} restarts" >&2
            exit 75
          fi
          job=${{SLURM_ARRAY_JOB_ID:+${{SLURM_ARRAY_JOB_ID}}_}}${{SLURM_ARRAY_TASK_ID:-$SLURM_JOB_ID}}
          # What scancel ends is to stay so.
          scontrol --oneliner show job "$job" | grep -q "JobState=RUNNING" || exit 75
          scontrol requeue "$job" ||
            echo "could not be queued again: submit this script again to continue" >&2
          exit 75
        }}"""
    return textwrap.dedent(head) + textwrap.dedent(again)


def _start(job: Job, system: System) -> str:
    if job.side:
        return _side_by_side(job, system)
    lines = []
    if job.array:
        lines += ["# Which run of the sweep this is.", 'export CURVLAB_SWEEP_JOB="$SLURM_ARRAY_TASK_ID"']
    several = job.nodes * job.processes > 1
    if job.launcher == "torchrun":
        lines += [
            "# One torchrun a machine. It dies of the signal that its workers save at, so it is to ignore it.",
            f'head=$({system.step("--relative=0", nodes=1, tasks=1)} hostname -s)',
            'export ENDPOINT="$head:$((20000 + SLURM_JOB_ID % 12000))"',
        ]
        start = f"torchrun --nnodes={job.nodes} --nproc-per-node={job.processes}"
        start += ' --rdzv-backend=c10d --rdzv-id="$SLURM_JOB_ID" --rdzv-endpoint="$ENDPOINT"'
        torchrun = start.replace("torchrun", f"{job.python} -m torch.distributed.run", 1)
        step = system.step(nodes=job.nodes, tasks=job.nodes, cpus=job.cpus * job.processes)
        lines += [f"""start='trap "" USR1; exec {torchrun} "$@"'"""]
        words = [f"{step} bash -c \"$start\" torchrun", "train.py"]
    else:
        raw = ["--kill-on-bad-exit=1"] if several else []
        words = [f"{system.step(*raw, cpus=job.cpus)} {job.python}", "train.py"]
    lines += [_wrapped([*words, *_arguments(job)], " || code=$?"), 'finish "${code:-0}"']
    return "\n".join(lines)


def _side_by_side(job: Job, system: System) -> str:
    raw = ["--exact", *(["--gpus-per-task=1"] if job.gpus else [])]
    step = system.step(*raw, "$memory", nodes=1, tasks=1, cpus=job.cpus)
    lines = [
        "# Each run is a step of its own, with its share of the memory; those that find no room wait for their turn.",
        f'memory=${{SLURM_MEM_PER_NODE:+--mem=$((SLURM_MEM_PER_NODE / {job.processes}))M}}',
        f"for run in $(seq 0 {job.jobs - 1}); do",
        "  export CURVLAB_SWEEP_JOB=$run",
        textwrap.indent(_wrapped([f"{step} {job.python}", "train.py", *_arguments(job)], " &"), "  "),
        "  pids+=($!)",
        "done",
        "failed=0",
        'for pid in "${pids[@]}"; do',
        "  code=0",
        '  wait "$pid" || code=$?',
        '  case "$code" in 75 | 138 | 143) stopped=75 ;; 0) ;; *) failed=$((failed + 1)) ;; esac',
        "done",
        f'if [ "$failed" -gt 0 ]; then echo "$failed of {job.jobs} runs failed" >&2; fi',
        'finish "${stopped:-$((failed > 0))}"',
    ]
    return "\n".join(lines)


def _arguments(job: Job) -> list[str]:
    """What train.py is told: where a sweep's runs are the sweep says; a single run's are this job's, also later on."""
    given = {text.partition("=")[0].lstrip("+") for text in job.overrides}
    runs = f"{job.scratch}/runs" if job.scratch else "runs"
    sweeps = [f"paths.sweeps={job.scratch}/multirun"] if job.scratch and "paths.sweeps" not in given else []
    plain = [text for text in job.overrides if text not in ("-m", "--multirun")]
    if job.array or job.side or len(plain) < len(job.overrides):
        return ["-m", *map(quoted, [*plain, *sweeps])]
    own = [] if {"resume", "paths.runs"} & given else [f"paths.runs={runs}/job_$SLURM_JOB_ID", "resume=auto"]
    return [*map(quoted, [*plain, *own])]


def _wrapped(words: list[str], end: str) -> str:
    """A command over as many lines as it needs."""
    lines, line = [], words[0]
    for word in words[1:]:
        if len(line) + len(word) + 1 > WIDTH - len(end) - 2:
            lines.append(line)
            line = f"  {word}"
        else:
            line += f" {word}"
    return " \\\n".join([*lines, line]) + end
