#!/usr/bin/env bash
# Trains with several processes on this machine's CPU, connected over loopback like the hosts of a TPU slice, to try
# out a run on several hosts without having them.
#
#     launch/local_processes.sh 2 --config=configs/nano.py --workdir=runs/two
#     launch/local_processes.sh 2 launch/main_job.sh
#     DEVICES=4 launch/local_processes.sh 2 …          four devices per process instead of one
#
# Arguments: the number of processes, then the arguments of melt_jax.train, or a command and its arguments.
# Needs: Python 3.11 or later. Sets up .venv first, or uses the interpreter PYTHON_RUN.
#
# Process 0 prints here; process i prints to process<i>.log in the folder LOGS (default: a new folder).
# SIGTERM and Ctrl-C reach all processes as SIGTERM.
# The exit status is 75 or 76 if a process requests a restart with it, else the highest status of any process.
set -euo pipefail
processes=${1:?the number of processes}
shift
source "$(dirname "$0")/setup.sh"
case ${1:-} in
-* | '') command=("$python" -m melt_jax.train) ;;
*) command=() ;;
esac

export JAX_PLATFORMS=cpu
export XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=${DEVICES:-1}"
export MELT_PROCESSES=$processes
port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
export MELT_COORDINATOR=127.0.0.1:$port
logs=${LOGS:-$(mktemp -d)}
mkdir -p "$logs"

pids=()
for ((i = 0; i < processes; i++)); do
    if ((i == 0)); then
        MELT_PROCESS=$i "${command[@]}" "$@" &
    else
        MELT_PROCESS=$i "${command[@]}" "$@" >"$logs/process$i.log" 2>&1 &
    fi
    pids+=($!)
done
# One process would be enough, but a scheduler signals all of them too.
trap 'kill -TERM "${pids[@]}" 2>/dev/null || true' TERM INT

highest=0 again=0
for i in "${!pids[@]}"; do
    status=0
    wait "${pids[i]}" || status=$?
    while kill -0 "${pids[i]}" 2>/dev/null; do # a signal to this script interrupts wait
        status=0
        wait "${pids[i]}" || status=$?
    done
    echo "process $i: status $status"
    ((status <= highest)) || highest=$status
    ((status != 75 && status != 76)) || again=$status
done
((processes == 1)) || echo "logs of the other processes: $logs"
exit $((again ? again : highest))
