#!/usr/bin/env bash
# A sweep of 4 runs in one allocation, 4 side by side, each with a GPU of its own.
# Written by: python scripts/submit.py cluster=msub name=side_by_side gpus=4 cpus=8 side=4 --
#   optimizer=sgd,adamw,kfac,adafisher model=resnet18 dataset=cifar10
#
# name, and where the output goes
#MSUB -r side_by_side
#MSUB -o side_by_side_%I.out
#MSUB -e side_by_side_%I.out
# machines, processes on all of them, cores of each process
#MSUB -N 1
#MSUB -n 4
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

# Each run is a step of its own, with its share of the memory; those that find no room wait for their turn.
memory=${SLURM_MEM_PER_NODE:+--mem=$((SLURM_MEM_PER_NODE / 4))M}
for run in $(seq 0 3); do
  export CURVLAB_SWEEP_JOB=$run
  ccc_mprun -N 1 -n 1 -c 8 -E "--exact --gpus-per-task=1 $memory" python train.py -m \
    optimizer=sgd,adamw,kfac,adafisher model=resnet18 dataset=cifar10 &
  pids+=($!)
done
failed=0
for pid in "${pids[@]}"; do
  code=0
  wait "$pid" || code=$?
  case "$code" in 75 | 138 | 143) stopped=75 ;; 0) ;; *) failed=$((failed + 1)) ;; esac
done
if [ "$failed" -gt 0 ]; then echo "$failed of 4 runs failed" >&2; fi
finish "${stopped:-$((failed > 0))}"
