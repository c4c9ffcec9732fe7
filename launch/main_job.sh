#!/usr/bin/env bash
# The main job: turns an Ouro checkpoint into a MELT in two phases of distillation.
#
#     launch/main_job.sh                                       the embedded LoopLM, about four minutes on two cores
#     launch/main_job.sh configs/ouro_1_4b.py ByteDance/Ouro-1.4B-Thinking gs://BUCKET/melt \
#         --config.data.path=gs://BUCKET/traces
#
# Arguments: the config, the LoopLM (a published folder, in a bucket or not, or its name on the Hugging Face Hub), the
# workdir (a folder, in a bucket or not), then overrides of the config.
# Needs: Python 3.11 or later. Sets up .venv first.
#
# Publishes the model of the last phase in <workdir>/melt, with weights of the LoopLM's dtype.
# Rerun the command to resume an interrupted job.
# On several hosts that share the folders, run the same command on each; process 0 converts and publishes.
set -euo pipefail
source "$(dirname "$0")/setup.sh"
config=${1:-configs/nano.py}
published=${2:-melt_jax/assets/ouro_nano}
workdir=${3:-runs/nano}
shift $(($# < 3 ? $# : 3))

"$python" -m melt_jax.convert --input="$published" --output="$workdir/teacher" --to=orbax --keep_existing
"$python" -m melt_jax.train --config="$config" --workdir="$workdir" --config.teacher="$workdir/teacher" "$@"
"$python" -m melt_jax.convert --input="$workdir" --output="$workdir/melt" --to=published \
    --dtype_of="$workdir/teacher" --overwrite
echo "MELT published in $workdir/melt"
