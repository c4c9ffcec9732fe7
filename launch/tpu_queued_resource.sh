#!/usr/bin/env bash
# Trains on the Cloud TPU machines of a queued resource. Until the run is complete, requests new machines whenever they
# are preempted.
#
#     ZONE=us-east5-b ACCELERATOR=v6e-16 RUNTIME=v2-alpha-tpuv6e \
#         launch/tpu_queued_resource.sh melt-1 --config=configs/ouro_1_4b.py --workdir=gs://BUCKET/runs/melt_1_6b \
#         --config.teacher=gs://BUCKET/Ouro-1.4B-Thinking --config.data.path=gs://BUCKET/data/traces
#
# Arguments: a name for the queued resource and its node, then the arguments of melt_jax.train.
#
# Needs:
# - gcloud with a project and a login;
# - a git clone, whose HEAD is copied to the machines;
# - a bucket in the region of the machines, which their service account may read and write. It contains the teacher and
#   the prepared data, and receives the run.
#
# Every host runs the same command; JAX finds the other hosts.
#
# Environment, besides the three variables above:
#   NFS=10.0.0.2:/melt   a network share that each machine mounts at /mnt/melt, to use paths there instead of a bucket
#   PROVISION="--spot"   flags of the request; may be empty, or "--reserved"
#   POLL=30              seconds between polls of the queue
#   RESTARTS=10          consecutive restarts on the same machines
#   KEEP=1               keep the machines when the run is complete
set -euo pipefail
cd "$(dirname "$0")/.."
name=${1:?a name for the queued resource}
shift
: "${ZONE:?}" "${ACCELERATOR:?}" "${RUNTIME:?}"

queue() { # verb, arguments
    local verb=$1
    shift
    gcloud compute tpus queued-resources "$verb" "$name" --zone="$ZONE" "$@"
}
state() { # NONE: never requested; UNKNOWN: gcloud does not answer
    local found
    found=$(gcloud compute tpus queued-resources list --zone="$ZONE" --filter="name~/$name\$" \
        --format='value(state.state)') || found=UNKNOWN
    echo "${found:-NONE}"
}
everywhere() { queue ssh --worker=all --node=all --command="$1"; }

# Waits until the machines are ready. Requests them if there is no request, or again if it was preempted or failed.
provide() {
    local now
    while now=$(state) && [ "$now" != ACTIVE ]; do
        case $now in
        NONE)
            # shellcheck disable=SC2086 # PROVISION may be several flags
            queue create --async --node-id="$name" --accelerator-type="$ACCELERATOR" --runtime-version="$RUNTIME" \
                ${PROVISION---spot}
            ;;
        SUSPENDED | FAILED)
            echo "$name is $now: requesting it again"
            queue delete --force --quiet || true
            ;;
        *) echo "$name is $now" ;;
        esac
        sleep "${POLL:-30}"
    done
}

# Sets up the code, the share, if any, and the Python environment on every host. Quick if they are set up already.
prepare() {
    git archive --format=tar.gz --output="$archive" HEAD &&
        gcloud compute tpus queued-resources scp "$archive" "$name:melt_jax.tar.gz" \
            --zone="$ZONE" --worker=all --node=all &&
        everywhere "set -e
            mkdir -p melt_jax
            tar -xzf melt_jax.tar.gz -C melt_jax
            sudo apt-get update -q >/dev/null
            sudo apt-get install -qy ${NFS:+nfs-common} python3.11-venv >/dev/null
            if [ -n '${NFS:-}' ]; then
                sudo mkdir -p /mnt/melt
                mountpoint -q /mnt/melt || sudo mount -t nfs '${NFS:-}' /mnt/melt
            fi
            cd melt_jax
            PYTHON=python3.11 bash -c 'set -e; source launch/setup.sh'"
}

# Runs the training command on every host. A process left by a lost connection first saves and exits.
train() {
    everywhere "cd melt_jax
        kill -TERM \$(cat train.pid 2>/dev/null) 2>/dev/null
        exec flock --timeout 900 train.lock bash -c 'source launch/setup.sh
            echo \$\$ >train.pid
            exec \$python -m melt_jax.train --config.run.stall_seconds=900 \"\$@\"' train $(printf '%q ' "$@")"
}

archive=$(mktemp --suffix=.tar.gz)
trap 'rm -f "$archive"' EXIT
restarts=0
while true; do
    provide
    status=0
    { prepare && train "$@"; } || status=$?
    if [ "$status" = 0 ]; then
        echo "the run is complete"
        [ -n "${KEEP:-}" ] || queue delete --force --quiet
        exit 0
    fi
    sleep "${POLL:-30}" # a preemption is not reported immediately
    if [ "$(state)" = ACTIVE ]; then
        # 75: preempted; 76: stalled; 134: aborted by JAX because a process was lost; 255: connection lost
        case $status in 75 | 76 | 134 | 255) restarts=$((restarts + 1)) ;; *) restarts=$((${RESTARTS:-10} + 1)) ;; esac
        if ((restarts > ${RESTARTS:-10})); then
            echo "the run exited with status $status; the machines of $name are kept" >&2
            exit "$status"
        fi
    else
        restarts=0
    fi
    echo "status $status: restarting"
done
