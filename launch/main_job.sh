#!/usr/bin/env bash
# The main job: turns an Ouro checkpoint into a MELT in two phases of distillation.
#
#     launch/main_job.sh                                       the embedded LoopLM, five minutes on two cores
#     launch/main_job.sh configs/ouro_1_4b.py Ouro-1.4B-Thinking runs/melt_1_6b --config.data.path=data/traces
#
# Arguments: the config, the published folder of the LoopLM, the workdir, then overrides of the config.
# Needs: Python 3.11 or later. Sets up .venv first.
#
# Publishes the MELT in <workdir>/melt, in bfloat16 if the LoopLM's config.json states that dtype, else in float32.
# Rerun the command to resume an interrupted job.
# On several hosts that share the folders, run the same command on each; process 0 converts and publishes.
set -euo pipefail
source "$(dirname "$0")/setup.sh"
config=${1:-configs/nano.py}
published=${2:-melt_jax/assets/ouro_nano}
workdir=${3:-runs/nano}
shift $(($# < 3 ? $# : 3))

dtype=float32 # as in training
if grep -Eqs '"(torch_)?dtype": *"bfloat16"' "$published/config.json"; then dtype=bfloat16; fi
"$python" -m melt_jax.convert --input="$published" --output="$workdir/teacher" --to=orbax --keep_existing
"$python" -m melt_jax.train --config="$config" --workdir="$workdir" --config.teacher="$workdir/teacher" "$@"
"$python" -m melt_jax.convert --input="$workdir/alignment/model" --output="$workdir/melt" --to=published \
    --dtype="$dtype" --overwrite
echo "MELT published in $workdir/melt"
