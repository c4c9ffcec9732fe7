#!/usr/bin/env bash
# The paper's benchmarks: AIME24, AIME25, AMC23, MATH500, OlympiadBench and GPQA, pass@1 over several samples.
#
#     launch/benchmarks.sh MELT-1.6B
#     launch/benchmarks.sh MELT-1.6B runs/benchmarks batch_size=64,tensor=4 --repeats=16 --tasks=melt_aime24
#
# Arguments: the model folder, the folder of results, further settings of --model_args, then flags of melt_jax.lm_eval.
# Needs: the extra `eval` (.venv/bin/pip install -e '.[eval]'), network access for the data, and GPQA's terms accepted.
#
# Sampling, new tokens and the number of samples are those of launch/benchmarks/_sampled_yaml. Rerun the command to resume
# an interrupted evaluation.
# Never run against the real data: it was tested with local rows in place of each data set (tests/test_benchmarks.py).
set -euo pipefail
source "$(dirname "$0")/setup.sh"
checkpoint=${1:?"expected a model folder; see the first lines of $0"}
output=${2:-runs/benchmarks}
settings=${3:-batch_size=32}
shift $(($# < 3 ? $# : 3))

"$python" -m melt_jax.lm_eval --model_args="checkpoint=$checkpoint,think_end_token=</think>,$settings" \
    --tasks=melt_paper --include_path=launch/benchmarks --apply_chat_template --use_cache="$output/cache" \
    --output_path="$output" --log_samples "$@"
