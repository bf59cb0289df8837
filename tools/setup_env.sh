#!/usr/bin/env bash
# Make .venv in the repository's root: the project (editable), its pinned dependencies and the test tools.
#
#   bash tools/setup_env.sh                              uses python3.11, or else any Python from 3.10 on
#   PYTHON=/path/to/python bash tools/setup_env.sh       uses that one
#   VENV=.venv-newest MEGATRON_CORE=0.19.2 bash tools/setup_env.sh
#                                                        makes another folder, with another megatron-core
#
# Returns at once when the folder is complete for the present pyproject.toml and constraints.txt. Where the user's own
# python has a torch that sees a CUDA device, that torch is used and not installed again. pip's settings
# (PIP_INDEX_URL, pip.conf, ...) apply: they decide whether torch comes as a CPU or as a CUDA build.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly TORCH=torch==2.13.0
readonly VENV=${VENV:-.venv}
readonly STAMP=$VENV/complete

fail() {
    echo "error: $*" >&2
    exit 2
}

# What an environment depends on; the folder's path is in its scripts.
fingerprint() {
    { pwd && echo "${MEGATRON_CORE:-}" && cat pyproject.toml constraints.txt tools/setup_env.sh; } | sha256sum
}

# Print constraints.txt, with the given megatron-core in the place of its own.
constraints() {
    sed "${MEGATRON_CORE:+s/^megatron-core==.*/megatron-core==$MEGATRON_CORE/}" constraints.txt
}

# Print the first of the given commands that is a Python from 3.10 on and can make environments.
find_python() {
    local candidate without_venv=
    for candidate in "$@"; do
        "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || continue
        if "$candidate" -c 'import ensurepip, venv' 2>/dev/null; then
            echo "$candidate"
            return
        fi
        without_venv=$candidate
    done
    [[ -z $without_venv ]] ||
        fail "$without_venv has no venv module; install it (Debian: python3-venv) or set PYTHON to another Python"
    fail "no Python from 3.10 on among: $*; install one or set PYTHON to its path"
}

has_cuda_torch() {
    "$1" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null
}

# Let the environment see the packages of Python $1 after its own. Unlike --system-site-packages this also works when $1
# belongs to a virtual environment. The packages that its torch needs must stay as they are: print the constraints on
# standard input without them.
share_packages_of() {
    local site_packages
    site_packages=$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    "$1" -c '
import site
folders = site.getsitepackages() + [site.getusersitepackages()] * bool(site.ENABLE_USER_SITE)
print(*(f"import site; site.addsitedir({folder!r})" for folder in folders), sep="\n")
' >"$site_packages/shared_packages.pth"
    "$1" -c '
import importlib.metadata, re, sys
def name(requirement): return re.sub("[-_.]+", "-", re.match(r"[\w.-]*", requirement)[0]).lower()
needed = {name(requirement) for requirement in importlib.metadata.requires("torch") or ()}
print(*(line for line in sys.stdin if name(line) not in needed), sep="")
'
}

if [[ -x $VENV/bin/python && -f $STAMP && $(fingerprint) == "$(<"$STAMP")" ]]; then
    exit 0
fi

# Others may use the folder that a link leads to, and making the environment anew would empty it.
[[ ! -L $VENV ]] || fail "$VENV is a link to $(readlink -f "$VENV"); remove the link, or bring that environment up to date"

read -ra with_torch <<<"${PYTHON:-python3 python}"
read -ra known <<<"${PYTHON:-python3.11 python3 python3.12 python3.10}"
cuda_python=
for candidate in "${with_torch[@]}"; do
    if has_cuda_torch "$candidate"; then
        cuda_python=$candidate
        break
    fi
done
if [[ -n $cuda_python ]]; then known=("$cuda_python"); fi
python=$(find_python "${known[@]}")

echo "making $VENV with $("$python" --version) (this once, some minutes)"
"$python" -m venv --clear "$VENV"
requirements=(-e '.[test]' -c "$VENV/constraints.txt")
if [[ -n $cuda_python ]]; then
    constraints | share_packages_of "$python" >"$VENV/constraints.txt"
    unset PIP_CONSTRAINT # pins of the shared packages' environment; ours decide in the new one
else
    constraints >"$VENV/constraints.txt"
    requirements+=("$TORCH")
fi
# One line a package, so that a slow download is seen to move.
"$VENV/bin/python" -m pip install --disable-pip-version-check "${requirements[@]}" |
    sed -un -e 's/^Collecting \([^ ]*\).*/  \1/p' -e 's/^Installing collected packages.*/  installing/p' ||
    fail "pip could not install the dependencies (its message is above); fix that and run this again"
fingerprint >"$STAMP"
echo "$VENV: $("$VENV/bin/python" --version) with the packages of constraints.txt; activate it by: source $VENV/bin/activate"
