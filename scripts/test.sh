#!/usr/bin/env bash
# Set up and run the tests. Arguments go to pytest:
#
#   scripts/test.sh                  everything (tests that need a GPU skip themselves where there is none)
#   scripts/test.sh tests/unit       the quick tier: no Ray, no vLLM, no DeepSpeed
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$root"
scripts/install.sh

# One thread per process: the tests run several processes on few cores.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}" WANDB_MODE=offline
exec .venv/bin/python -m pytest "$@"
