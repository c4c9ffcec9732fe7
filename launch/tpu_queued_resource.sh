#!/usr/bin/env bash
# Trains on Cloud TPU machines of a queued resource, and gets new ones when these are taken, until the run has ended.
#
#     ZONE=us-east5-b ACCELERATOR=v6e-16 RUNTIME=v2-alpha-tpuv6e NFS=10.0.0.2:/melt \
#         launch/tpu_queued_resource.sh melt-1 --config=configs/ouro_1_4b.py --workdir=/mnt/melt/runs/melt_1_6b \
#         --config.teacher=/mnt/melt/Ouro-1.4B-Thinking --config.data.path=/mnt/melt/data/traces
#
# Arguments: a name for the queued resource and its node, then those of melt_jax.train.
# Needs: gcloud with a project and a login; a git clone, whose HEAD is copied; and NFS, a share (such as Filestore) that
# the machines can reach, which holds the teacher and the prepared data, gets the run, and outlives the machines: each
# mounts it at /mnt/melt. Every host runs the same command; JAX finds the others by itself.
# Environment, beside the four above: PROVISION="--spot" (or "", or "--reserved"), POLL=30 (seconds between looks at the
# queue), RESTARTS=10 (starts in a row on machines that are still there), KEEP=1 (leaves the machines at the end).
set -euo pipefail
cd "$(dirname "$0")/.."
name=${1:?the name of the queued resource}
shift
: "${ZONE:?}" "${ACCELERATOR:?}" "${RUNTIME:?}" "${NFS:?}"

queue() { # verb, arguments
    local verb=$1
    shift
    gcloud compute tpus queued-resources "$verb" "$name" --zone="$ZONE" "$@"
}
state() { # NONE where it was never asked for, UNKNOWN where gcloud does not answer
    local found
    found=$(gcloud compute tpus queued-resources list --zone="$ZONE" --filter="name~/$name\$" \
        --format='value(state.state)') || found=UNKNOWN
    echo "${found:-NONE}"
}
everywhere() { queue ssh --worker=all --node=all --command="$1"; }

# Waits until the machines are there, asking for them where they were not asked for or are gone.
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
            echo "$name is $now: asking again"
            queue delete --force --quiet || true
            ;;
        *) echo "$name is $now" ;;
        esac
        sleep "${POLL:-30}"
    done
}

# The code, the share and the environment on every host; quick where they are there already.
prepare() {
    git archive --format=tar.gz --output="$archive" HEAD &&
        gcloud compute tpus queued-resources scp "$archive" "$name:melt_jax.tar.gz" \
            --zone="$ZONE" --worker=all --node=all &&
        everywhere "set -e
            mkdir -p melt_jax
            tar -xzf melt_jax.tar.gz -C melt_jax
            sudo apt-get update -q >/dev/null
            sudo apt-get install -qy nfs-common python3.11-venv >/dev/null
            sudo mkdir -p /mnt/melt
            mountpoint -q /mnt/melt || sudo mount -t nfs $NFS /mnt/melt
            cd melt_jax
            PYTHON=python3.11 bash -c 'set -e; source launch/setup.sh'"
}

# One start of the run, to its end; a process that a lost connection left behind saves and leaves first.
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
        echo "the run has ended"
        [ -n "${KEEP:-}" ] || queue delete --force --quiet
        exit 0
    fi
    sleep "${POLL:-30}" # a machine that is being taken is not at once reported as gone
    if [ "$(state)" = ACTIVE ]; then
        # 75 preempted, 76 stalled, 134 ended by JAX for a lost neighbour, 255 the connection was lost
        case $status in 75 | 76 | 134 | 255) restarts=$((restarts + 1)) ;; *) restarts=$((${RESTARTS:-10} + 1)) ;; esac
        if ((restarts > ${RESTARTS:-10})); then
            echo "the run left with status $status; the machines of $name are still there" >&2
            exit "$status"
        fi
    else
        restarts=0
    fi
    echo "status $status: starting again"
done
