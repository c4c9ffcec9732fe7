# Creates the virtual environment .venv with the packages of requirements.txt. A machine with a TPU also gets libtpu and
# the packages for buckets, one with NVIDIA GPUs JAX's CUDA packages. The first run takes some minutes. The other scripts
# of this folder source this one; launch/test.sh sets extra=test to add the test tools.
#
# Starts over if requirements.txt has changed or an earlier setup was interrupted.
# Needs: Python 3.11 or later with venv, and a package index.
# PYTHON=… is the interpreter that creates .venv (default: python3).
# CUDA=cuda12 installs the packages for drivers older than 580 (default: cuda13).
# PYTHON_RUN=… is an interpreter that has all packages; it is used instead of .venv.
cd "$(dirname "${BASH_SOURCE[0]}")/.."

pip_install() { PYTHONWARNINGS=ignore .venv/bin/python -m pip install --quiet --disable-pip-version-check "$@"; }
has_tpu() { compgen -G '/dev/accel*' >/dev/null || compgen -G '/dev/vfio/[0-9]*' >/dev/null; }
has_gpu() { compgen -G '/dev/nvidia[0-9]*' >/dev/null; }

lacks_packages() { ! [ -x .venv/bin/python ] || ! cmp -s requirements.txt .venv/installed.txt; }
lacks_test_tools() { [ "${extra:-}" = test ] && ! cmp -s pyproject.toml .venv/installed_test.toml; }

set_up() (
    set -e
    flock 9 2>/dev/null || true # hosts that share the folder wait for the first; some systems have no flock
    if lacks_packages; then
        if ! "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
            echo "${PYTHON:-python3}: expected Python 3.11 or later, found" \
                "$("${PYTHON:-python3}" --version 2>&1 || true); choose another with PYTHON=python3.11 or a path" >&2
            exit 1
        fi
        echo "setting up .venv (some minutes, once)"
        "${PYTHON:-python3}" -m venv --clear .venv
        pip_install --upgrade pip
        pip_install -e .
        if has_tpu; then pip_install -e '.[gcs]' 'jax[tpu]'; fi
        if has_gpu; then pip_install "jax[${CUDA:-cuda13}]"; fi
        cp requirements.txt .venv/installed.txt # last: without this file the next run starts over
    fi
    if lacks_test_tools; then
        echo "adding the test tools to .venv"
        pip_install -e '.[test]'
        cp pyproject.toml .venv/installed_test.toml
    fi
)

if [ -n "${PYTHON_RUN:-}" ]; then
    python=$PYTHON_RUN
else
    python=.venv/bin/python
    if lacks_packages || lacks_test_tools; then
        set_up 9>>.venv.lock
        # shellcheck disable=SC2181 # as a condition, the function would not stop at errors
        if [ $? != 0 ]; then exit 1; fi
    fi
    # The test tools include libtpu, which prints errors on machines without a TPU.
    if ! has_tpu && ! has_gpu; then export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"; fi
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
