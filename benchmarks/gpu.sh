#!/usr/bin/env bash
# All that a single GPU can show, in one call (docs/gpu.md). The same as megatron-dwm benchmark gpu, without an
# installation:
#
#   bash benchmarks/gpu.sh --output runs/gpu
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
exec "${PYTHON:-python3}" -m megatron_dwm.cli.main benchmark gpu "$@"
