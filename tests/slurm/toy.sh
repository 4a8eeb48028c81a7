#!/usr/bin/env bash
# A SLURM of one machine, for the tests: toy.sh start FOLDER PORT, toy.sh stop FOLDER, toy.sh guard FOLDER PID.
# Nodes n1 and n2 (partition debug), and n3, where jobs of partition high take the place of those of partition low.
# No accounting, no cgroups, no systemd; any user. GPUs are stand-ins, so that CUDA_VISIBLE_DEVICES is set.
set -uo pipefail
act=$1
dir=$2
export SLURM_CONF=$dir/slurm.conf
mark="# ${dir//\//_}"

configure() {
  local host user port
  host=$(hostname -s) user=$(id -un) port=$1
  cat <<CONF
ClusterName=curvlab
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmUser=$user
SlurmdUser=$user
AuthType=auth/munge
AuthInfo=socket=$dir/munge.socket,cred_expire=5
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool-%n
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd-%n.pid
SlurmctldLogFile=$dir/log/slurmctld
SlurmdLogFile=$dir/log/slurmd-%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
ReturnToService=2
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=2,sched_min_interval=0,batch_sched_delay=0,bf_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
KillWait=5
MinJobAge=3600
GresTypes=gpu
CONF
  for n in 1 2 3; do
    echo "NodeName=n$n NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + n)) CPUs=6 RealMemory=8000 Gres=gpu:4"
  done
  echo "PartitionName=debug Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP"
  echo "PartitionName=low Nodes=n3 MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=30"
  echo "PartitionName=high Nodes=n3 MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF"
}

start() {
  mkdir -p "$dir"/{munge,state,log}
  chmod 755 "$dir"
  chmod 700 "$dir/munge"
  (umask 077 && head -c 1024 /dev/urandom >"$dir/munge/key")
  configure "$1" >"$SLURM_CONF"
  echo "Name=gpu File=/dev/tty[1-4]" >"$dir/gres.conf"
  for n in 1 2 3; do # rank 0's address is the name of its node
    if ! getent hosts "n$n" >/dev/null && [ -w /etc/hosts ]; then echo "127.0.0.1 n$n $mark" >>/etc/hosts; fi
  done
  munged --force --num-threads=2 --socket="$dir/munge.socket" --key-file="$dir/munge/key" \
    --pid-file="$dir/munged.pid" --log-file="$dir/munge/log" --seed-file="$dir/munge/seed" || return 1
  slurmctld -f "$SLURM_CONF" || return 1
  # Jobs give way to other tests, some of which look at the clock.
  for n in 1 2 3; do nice -n 10 slurmd -f "$SLURM_CONF" -N "n$n" || return 1; done
  for _ in $(seq 100); do
    if [ "$(scontrol -o show node 2>/dev/null | grep -c 'State=IDLE ')" -ge 3 ]; then return 0; fi
    sleep 0.2
  done
  return 1
}

stop() {
  local pid
  timeout 10 scancel --quiet --user="$(id -un)" 2>/dev/null
  for _ in $(seq 40); do
    [ -z "$(timeout 5 squeue -h 2>/dev/null)" ] && break
    sleep 0.2
  done
  for file in "$dir"/slurmd-*.pid "$dir/slurmctld.pid" "$dir/munged.pid"; do
    [ -s "$file" ] || continue
    pid=$(cat "$file")
    # The number may be another's by now: ours has this folder in its command line or environment.
    cat "/proc/$pid/cmdline" "/proc/$pid/environ" 2>/dev/null | tr '\0' '\n' | grep -qF "$dir/" || continue
    kill "$pid"
    for _ in $(seq 5); do
      kill -0 "$pid" 2>/dev/null || break
      sleep 0.2
    done
    kill -9 "$pid" 2>/dev/null
  done
  if [ -w /etc/hosts ] && grep -qF "$mark" /etc/hosts; then
    grep -vF "$mark" /etc/hosts >"$dir/hosts"
    cat "$dir/hosts" >/etc/hosts # a file that is mounted cannot be replaced
  fi
  rm -f "$dir"/*.pid
}

case "$act" in
  start) start "$3" ;;
  stop) stop ;;
  guard) # whatever becomes of the tests, nothing is left running
    while kill -0 "$3" 2>/dev/null; do sleep 1; done
    stop
    ;;
esac
