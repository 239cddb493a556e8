#!/usr/bin/env bash
# Makes .venv with loraf, its tools and a vLLM build, at the tested versions of constraints.txt.
# PYTHON: the interpreter; EXTRAS: the extras of pyproject.toml to install.
#
# torch for the CPU comes from the folders in UV_FIND_LINKS or PIP_FIND_LINKS where they hold it, else from PyTorch's
# own index (uv knows it as `--torch-backend cpu`). The default index has only CUDA builds of several GB.
set -euo pipefail
cd "$(dirname "$0")/.."

"${PYTHON:-python3}" - <<'PY'
import sys
if sys.version_info < (3, 11):
    sys.exit(f"loraf needs Python 3.11 or newer, this is {sys.version.split()[0]}: say `make PYTHON=/path/to/python3.11 …`")
PY

[ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
.venv/bin/python -m pip install --quiet "uv>=0.9"

links="${UV_FIND_LINKS:-${PIP_FIND_LINKS:-}}"
extras="${EXTRAS:-cpu,dev}"
options=()
if [ -n "$links" ]; then
    export UV_FIND_LINKS="${links// /,}"
fi
if [[ ",$extras," == *,cpu,* ]] && ! ls ${links//,/ }/torch-*+cpu-*.whl >/dev/null 2>&1; then
    options+=(--torch-backend cpu)
fi
.venv/bin/uv pip install --python .venv/bin/python --compile-bytecode --constraints constraints.txt "${options[@]}" --editable ".[$extras]"
touch .venv/.ready
