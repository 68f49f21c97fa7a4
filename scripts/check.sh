#!/usr/bin/env bash
# Static checks: formatting and lint (ruff), types (mypy), layering (import-linter), shell syntax.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scripts/install.sh

bin=.venv/bin
"$bin/ruff" format --check .
"$bin/ruff" check .
"$bin/mypy"
"$bin/lint-imports" --no-cache
for script in scripts/*.sh scripts/*/*.sh .ci/run; do bash -n "$script"; done
echo "check.sh: all checks passed"
