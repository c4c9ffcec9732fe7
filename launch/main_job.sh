#!/usr/bin/env bash
# The main job: an Ouro checkpoint in, two phases of distillation, a MELT that answers out.
#
#     launch/main_job.sh                                       the embedded LoopLM, five minutes on two cores
#     launch/main_job.sh configs/ouro_1_4b.py Ouro-1.4B-Thinking runs/melt_1_6b --config.data.path=data/traces
#
# Arguments: config, published folder of the LoopLM, workdir, then overrides of the config.
# Needs: Python 3.11 or later; sets up .venv by itself. Started again, it goes on from where it was. The MELT is
# published in bfloat16 where the LoopLM's config.json states that dtype, else in float32.
set -euo pipefail
source "$(dirname "$0")/setup.sh"
config=${1:-configs/nano.py}
published=${2:-melt_jax/assets/ouro_nano}
workdir=${3:-runs/nano}
shift $(($# < 3 ? $# : 3))

dtype=float32 # that of training
if grep -Eq '"(torch_)?dtype": *"bfloat16"' "$published/config.json"; then dtype=bfloat16; fi
[ -d "$workdir/teacher" ] || $python -m melt_jax.convert --input="$published" --output="$workdir/teacher" --to=orbax
$python -m melt_jax.train --config="$config" --workdir="$workdir" --config.teacher="$workdir/teacher" "$@"
$python -m melt_jax.convert --input="$workdir/alignment/model" --output="$workdir/melt" --to=published \
    --dtype="$dtype" --overwrite
echo "the MELT model, in published form: $workdir/melt"
