#!/usr/bin/env bash
# Set up and run the tests. Arguments go to pytest:
#
#   scripts/test.sh                  everything, two files at a time (tests that need a GPU skip themselves without one)
#   scripts/test.sh tests/unit       the quick tier: no Ray, no vLLM, no DeepSpeed
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$root"
scripts/install.sh

# One thread per process: the tests run several processes on few cores.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}" WANDB_MODE=offline
# By file, in order: what the tests of a file share is started once, and the slow ones come first. Each half waits a lot.
[ $# -gt 0 ] || set -- -n 2 --dist loadfile --no-loadscope-reorder
exec .venv/bin/python -m pytest "$@"
