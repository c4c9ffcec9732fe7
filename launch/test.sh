#!/usr/bin/env bash
# Checks style and types, then runs the tests in two processes. Sets up .venv first.
#
#     launch/test.sh                      everything
#     launch/test.sh -m "not slow"        the fast tests
#
# Arguments: those of pytest. Needs: Python 3.11 or later.
set -euo pipefail
extra=test
source "$(dirname "$0")/setup.sh"
"$python" -m ruff check .
"$python" -m ruff format --check .
PYRIGHT_PYTHON_IGNORE_WARNINGS=1 "$python" -m pyright # otherwise it looks for a newer version on the network
exec "$python" -m pytest -n 2 "$@"
