# Sets this machine up, once: a virtual environment in .venv with what requirements.txt names, and libtpu where there is
# a TPU. Sourced by the scripts beside it; when requirements.txt has changed, or this was interrupted, it begins anew.
# Needs Python 3.11 or later with venv, and a package index. PYTHON=… takes another interpreter than python3.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if ! [ -x .venv/bin/python ] || ! cmp -s requirements.txt .venv/installed.txt; then
    if ! "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
        echo "${PYTHON:-python3}: expected Python 3.11 or later, found $("${PYTHON:-python3}" --version 2>&1 || true);" \
            "PYTHON=python3.11, or a path, chooses another" >&2
        exit 1
    fi
    echo "setting up .venv (once; some minutes)"
    "${PYTHON:-python3}" -m venv --clear .venv
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --upgrade pip
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
    if compgen -G '/dev/accel*' >/dev/null || compgen -G '/dev/vfio/[0-9]*' >/dev/null; then
        .venv/bin/python -m pip install --quiet --disable-pip-version-check 'jax[tpu]'
    fi
    cp requirements.txt .venv/installed.txt # the last thing: without it the next start begins anew
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
python=.venv/bin/python
