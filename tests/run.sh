#!/usr/bin/env bash
# Check the code: lint, format, types and every test. Arguments go to pytest: bash tests/run.sh -k weights -x
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit

bash tools/setup_env.sh || exit
source .venv/bin/activate

# One test starts a SLURM cluster of its own, one opens a page in a browser. Where their programs cannot be installed here,
# tests/conftest.py deselects those tests and says so; with REQUIRE_ALL_TESTS=1 they fail.
packages=()
PATH=$PATH:/usr/sbin type slurmctld slurmd munged sbatch &>/dev/null || packages+=(slurm-wlm munge)
type chromium &>/dev/null || packages+=(chromium)
if ((${#packages[@]})) && [[ $EUID == 0 ]] && type apt-get &>/dev/null; then
    echo "installing Debian's packages ${packages[*]} for the SLURM and the browser test"
    export DEBIAN_FRONTEND=noninteractive
    log=$(apt-get -q update 2>&1 && apt-get -qy install --no-install-recommends "${packages[@]}" 2>&1) || echo "$log" >&2
fi

# Tests compute on one thread, and nothing may be fetched while they run. Without bytecode every interpreter would
# compile the package anew.
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
unset PYTHONDONTWRITEBYTECODE

status=0
ruff check . || status=1
ruff format --check . || status=1
# Beside the tests, which leave the cores idle now and then; its output is printed last.
mkdir -p build
mypy >build/mypy.log 2>&1 &  # what pyproject.toml names
types=$!
# Four files at a time, though two cores are enough: runs of several processes take turns, and tests of SLURM wait.
pytest -n 4 --dist loadfile --no-loadscope-reorder "$@" || status=1
wait $types || status=1
cat build/mypy.log
exit $status
