#!/usr/bin/env bash
# Set up and run the main job on this machine, no GPU needed: make a tiny model and watch it learn by asynchronous RL.
#
#   scripts/quickstart.sh [overrides]      e.g. scripts/quickstart.sh seed=1 async.max_lag=4
#
# Overrides are those of `pipelinerl train`. Everything is written below the checkout: models/ and outputs/.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scripts/install.sh cpu
.venv/bin/pipelinerl make-tiny
exec .venv/bin/pipelinerl train experiment=quickstart "$@"
