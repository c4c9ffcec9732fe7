#!/usr/bin/env bash
# Trains with several processes on this machine's CPU, joined over loopback as the hosts of a TPU slice are: for trying
# out what several hosts do, without any.
#
#     launch/local_processes.sh 2 --config=configs/nano.py --workdir=runs/two
#     DEVICES=4 launch/local_processes.sh 2 …          four devices to each process instead of one
#
# Arguments: the number of processes, then those of melt_jax.train. Needs: Python 3.11 or later; sets up .venv by
# itself, or takes the interpreter of PYTHON_RUN. The first process prints here; the others write to process<i>.log in
# LOGS (a new folder). SIGTERM and Ctrl-C are passed on to all as SIGTERM. Leaves with 75 or 76 where the run asks to be
# started again, else with the highest status.
set -euo pipefail
processes=${1:?the number of processes}
shift
if [ -n "${PYTHON_RUN:-}" ]; then
    python=$PYTHON_RUN
    cd "$(dirname "$0")/.."
else
    source "$(dirname "$0")/setup.sh"
fi

export JAX_PLATFORMS=cpu
export XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=${DEVICES:-1}"
export MELT_PROCESSES=$processes
port=$($python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
export MELT_COORDINATOR=127.0.0.1:$port
logs=${LOGS:-$(mktemp -d)}
mkdir -p "$logs"

pids=()
for ((i = 0; i < processes; i++)); do
    if ((i == 0)); then
        MELT_PROCESS=$i $python -m melt_jax.train "$@" &
    else
        MELT_PROCESS=$i $python -m melt_jax.train "$@" >"$logs/process$i.log" 2>&1 &
    fi
    pids+=($!)
done
# One process that gets the signal is enough for them to stop together; all of them is what a scheduler does.
trap 'kill -TERM "${pids[@]}" 2>/dev/null || true' TERM INT

highest=0 again=0
for i in "${!pids[@]}"; do
    status=0
    wait "${pids[i]}" || status=$?
    while kill -0 "${pids[i]}" 2>/dev/null; do # a signal to this script ends a wait early
        status=0
        wait "${pids[i]}" || status=$?
    done
    echo "process $i: status $status"
    ((status <= highest)) || highest=$status
    ((status != 75 && status != 76)) || again=$status
done
((processes == 1)) || echo "the other processes wrote to $logs"
exit $((again ? again : highest))
