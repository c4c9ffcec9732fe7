#!/usr/bin/env bash
# Runs the linter and the tests; arguments go to pytest. Needs: Python 3.11 or later; sets up .venv by itself.
set -euo pipefail
source "$(dirname "$0")/setup.sh"
$python -m ruff check melt_jax configs launch tests
exec $python -m pytest -n 2 "$@"  # two at a time
