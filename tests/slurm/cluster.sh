#!/usr/bin/env bash
# A Slurm cluster on this machine, for the tests: munged, slurmctld and a slurmd per virtual node.
#
#   cluster.sh install          Debian's slurm-wlm and munge, as root
#   cluster.sh start DIR NODES  everything lives in DIR; prints what to put into the environment
#   cluster.sh stop DIR         ends the daemons, and what they run, by their ids
set -euo pipefail

readonly PREFIX=gptoss-node # names of the nodes; all of them are this machine

install_packages() {
    if command -v slurmd slurmctld munged >/dev/null; then return; fi
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq
    apt-get install -qq -y --no-install-recommends slurm-wlm munge >/dev/null
}

configure() { # DIR NODES
    local dir=$1 nodes=$2 node port=$((30000 + $$ % 300 * 8)) # another cluster may be here, too
    mkdir -p "$dir/state" "$dir/spool"
    chmod 755 "$dir" # munged refuses a socket's folder that others can write to
    head --bytes 128 /dev/urandom >"$dir/munge.key"
    chmod 400 "$dir/munge.key"
    cat >"$dir/slurm.conf" <<CONF
ClusterName=tests
FirstJobId=$((1 + $$ % 20000))
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmctldPort=$port
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$dir/munge.socket,cred_expire=30 # which is how long a job waits that starts again
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool/%n
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd.%n.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/affinity
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
SlurmdTimeout=10
SlurmdParameters=config_overrides
KillWait=60
MinJobAge=600
UnkillableStepTimeout=120
SchedulerParameters=sched_interval=2,bf_interval=2
CONF
    for ((node = 1; node <= nodes; node++)); do
        echo "NodeName=$PREFIX$node NodeHostname=$(hostname -s) NodeAddr=127.0.0.1" \
            "Port=$((port + node)) CPUs=2 RealMemory=2000" >>"$dir/slurm.conf"
        # Names of nodes lead to machines, as the launchers' rendezvous expects.
        echo "127.0.0.1 $PREFIX$node # $dir" >>/etc/hosts
    done
    cat >>"$dir/slurm.conf" <<CONF
PartitionName=batch Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=9
CONF
}

start() { # DIR NODES
    local dir=$1 nodes=$2 node
    configure "$dir" "$nodes"
    export SLURM_CONF=$dir/slurm.conf
    munged --force --key-file="$dir/munge.key" --socket="$dir/munge.socket" \
        --pid-file="$dir/munged.pid" --log-file="$dir/munged.log" --seed-file="$dir/munge.seed" 2>/dev/null
    slurmctld -c
    for ((node = 1; node <= nodes; node++)); do slurmd -N "$PREFIX$node"; done
    for _ in $(seq 60); do
        if [[ $(sinfo --noheader --partition=batch --states=idle --format=%D) == "$nodes" ]]; then
            echo "SLURM_CONF=$dir/slurm.conf"
            return
        fi
        sleep 0.5
    done
    echo "the nodes did not come up; see the logs in $dir" >&2
    tail -n 5 "$dir"/*.log >&2
    stop "$dir"
    return 1
}

stop() { # DIR
    local dir=$1 environment process
    export SLURM_CONF=$dir/slurm.conf
    scancel --user="$(id -un)" 2>/dev/null || true
    sleep 1
    for environment in /proc/[0-9]*/environ; do # the daemons, and all that they started
        process=$(basename "$(dirname "$environment")")
        if [[ $process != "$$" && $process != "$PPID" ]] &&
            grep -qzxF "SLURM_CONF=$SLURM_CONF" "$environment" 2>/dev/null; then
            kill -KILL "$process" 2>/dev/null || true
        fi
    done
    if [[ -s $dir/munged.pid ]]; then kill "$(<"$dir/munged.pid")" 2>/dev/null || true; fi
    grep -vF "# $dir" /etc/hosts >"$dir/hosts" || true
    cat "$dir/hosts" >/etc/hosts # in place: a container's is a mount
}

case ${1:-} in
    install) install_packages ;;
    start) start "$2" "$3" ;;
    stop) stop "$2" ;;
    *)
        echo "usage: cluster.sh install | start DIR NODES | stop DIR" >&2
        exit 2
        ;;
esac
