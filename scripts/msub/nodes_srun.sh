#!/usr/bin/env bash
# One run by 2 × 4 processes, which srun starts.
# Written by: python scripts/submit.py cluster=msub name=nodes_srun nodes=2 gpus=4 cpus=8 -- optimizer=kfac
#   model=resnet50 dataset=cifar100
#
# name, and where the output goes
#MSUB -r nodes_srun
#MSUB -o nodes_srun_%I.out
#MSUB -e nodes_srun_%I.out
# machines, processes on all of them, cores of each process
#MSUB -N 2
#MSUB -n 8
#MSUB -c 8
# time limit, in seconds
#MSUB -T 86400
# file systems that the job uses
#MSUB -m work,scratch
# flags of SLURM: GPUs on each machine; seconds before the end, and when others take precedence, runs are asked to
#   save and stop; and the job may come back to the queue, its output going on in the same file
#MSUB -E "--gpus-per-node=4 --signal=USR1@120 --requeue --open-mode=append"

# The environment. What fails here ends the job.
set -eo pipefail
cd "$BRIDGE_MSUB_PWD"
source .venv/bin/activate
export OMP_NUM_THREADS=8
export HF_HUB_OFFLINE=1 WANDB_MODE=offline  # python -m data.fetch NAME brings data beforehand

# A run that is asked to stop saves and ends with code 75. Launchers hide codes: it leaves word in a file, too.
# 138 and 143: the signal came before training began, or a launcher passed it on.
export CURVLAB_STOPPED="./.stopped_$SLURM_JOB_ID"
rm -f "$CURVLAB_STOPPED"
finish() {
  case "$1" in
    0) exit 0 ;;
    75 | 138 | 143) ;;
    *) if [ ! -e "$CURVLAB_STOPPED" ]; then exit "$1"; fi ;;
  esac
  rm -f "$CURVLAB_STOPPED"
  if [ "${SLURM_RESTART_COUNT:-0}" -ge 20 ]; then
    echo "stopped and saved, and not queued again after ${SLURM_RESTART_COUNT:-0} restarts" >&2
    exit 75
  fi
  job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_}${SLURM_ARRAY_TASK_ID:-$SLURM_JOB_ID}
  # What scancel ends is to stay so.
  scontrol --oneliner show job "$job" | grep -q "JobState=RUNNING" || exit 75
  scontrol requeue "$job" ||
    echo "could not be queued again: submit this script again to continue" >&2
  exit 75
}

ccc_mprun -c 8 -E "--kill-on-bad-exit=1" python train.py optimizer=kfac model=resnet50 dataset=cifar100 \
  "paths.runs=runs/job_$SLURM_JOB_ID" resume=auto || code=$?
finish "${code:-0}"
