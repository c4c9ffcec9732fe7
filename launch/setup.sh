# Sets this machine up, once: a virtual environment in .venv with what requirements.txt names. Sourced by the scripts beside it.
# Needs Python 3.11 or later with venv, and a package index. PYTHON=… takes another interpreter.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if ! cmp -s requirements.txt .venv/installed.txt; then
    echo "setting up .venv (once; some minutes)"
    "${PYTHON:-python3}" -m venv .venv
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --upgrade pip
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
    if compgen -G '/dev/accel*' >/dev/null || compgen -G '/dev/vfio/[0-9]*' >/dev/null; then
        .venv/bin/python -m pip install --quiet --disable-pip-version-check 'jax[tpu]'
    fi
    cp requirements.txt .venv/installed.txt
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
python=.venv/bin/python
