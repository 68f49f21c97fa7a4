#!/usr/bin/env bash
# Recompile cpu.txt, cuda.txt and dev.txt from pyproject.toml. Maintainers only; users install the results.
#
# The files hold bare pins, no addresses, so that they work behind any mirror. `triton` is left out of the
# CPU flavour: it has no CPU backend, vLLM disables it there, and it costs a gigabyte.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
common=(--quiet --no-annotate --no-header --no-emit-find-links --no-emit-index-url
        --python-version 3.11 --python-platform x86_64-manylinux_2_28)
out=scripts/requirements

env -u UV_FIND_LINKS uv pip compile "${common[@]}" --extra cuda pyproject.toml -o "$out/cuda.txt"
UV_FIND_LINKS="${UV_FIND_LINKS:-${PIP_FIND_LINKS:-}}" \
    uv pip compile "${common[@]}" --no-emit-package triton --extra cpu pyproject.toml -o "$out/cpu.txt"
# Beside the CPU flavour; packages that either flavour brings (trl names torch) are left to it.
shared=($(sed -n 's/==.*//p' "$out/cpu.txt" | sed 's/^/--no-emit-package /'))
UV_FIND_LINKS="${UV_FIND_LINKS:-${PIP_FIND_LINKS:-}}" \
    uv pip compile "${common[@]}" "${shared[@]}" --no-emit-package triton --group dev -c "$out/cpu.txt" -o "$out/dev.txt"
wc -l "$out"/*.txt
