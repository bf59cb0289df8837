#!/usr/bin/env bash
# Run a short part of the tests with the newest megatron-core that is supported, in .venv-newest. It needs Python 3.12 or
# later; without it, print a line and exit with 0. .venv, which tools/setup_env.sh makes, must be complete.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly NEWEST=0.19.2

# Print the path of a Python that megatron-core's newer versions are made for.
find_newer_python() {
    local candidate
    for candidate in python3.12 python3.13 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.1[23].*/bin/python /usr/bin/python3.1[23]; do
        "$candidate" -c 'import sys, ensurepip, venv; assert (3, 12) <= sys.version_info < (3, 14)' 2>/dev/null || continue
        type -P "$candidate"
        return
    done
    return 1
}

if ! python=$(find_newer_python); then
    echo "megatron-core $NEWEST needs Python 3.12 or 3.13, and none is here: nothing was run with it"
    exit 0
fi
VENV=.venv-newest MEGATRON_CORE=$NEWEST PYTHON=$python bash tools/setup_env.sh
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
.venv-newest/bin/python -c "import megatron.core as core; print('tests with megatron-core', core.__version__)"
# Curves, weights and alignments against one process in float64, the commands, and what differs between the versions.
.venv-newest/bin/python -m pytest -n 2 --dist loadfile \
    tests/unit/runtime tests/unit/model tests/unit/training \
    tests/distributed/test_alignment.py tests/distributed/test_weighted_gradient.py \
    tests/e2e/test_planted_code.py tests/e2e/test_layouts.py tests/e2e/test_resume.py
# Checkpoints of one version continue with the other.
.venv/bin/python -m tests.core_versions .venv/bin/python .venv-newest/bin/python
