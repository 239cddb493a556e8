#!/usr/bin/env bash
# Creates .venv with loraf, its tools and a vLLM build, at the tested versions of constraints.txt.
# PYTHON: the interpreter. EXTRAS: the extras of pyproject.toml to install.
#
# torch for the CPU comes from a folder named by UV_FIND_LINKS or PIP_FIND_LINKS if it has a wheel for this Python,
# otherwise from PyTorch's own index (`--torch-backend cpu`). The default index has only CUDA builds of several GB.
set -euo pipefail
cd "$(dirname "$0")/.."

python="${PYTHON:-python3}"
"$python" - <<'PY'
import sys
if sys.version_info < (3, 11):
    sys.exit(f"loraf requires Python 3.11 or newer, but {sys.executable} is {sys.version.split()[0]}. "
             "Choose another one with `make PYTHON=/path/to/python3.11 …`.")
PY

[ -x .venv/bin/python ] || "$python" -m venv .venv
.venv/bin/python -m pip install --quiet "uv>=0.9"

links="${UV_FIND_LINKS:-${PIP_FIND_LINKS:-}}"
extras="${EXTRAS:-cpu,dev}"
tag=$(.venv/bin/python -c 'import sys; print("cp%d%d" % sys.version_info[:2])')
options=()
if [ -n "$links" ]; then
    export UV_FIND_LINKS="${links// /,}"
fi
torch=""
for folder in ${links//,/ }; do
    torch+=$(compgen -G "$folder/torch-*+cpu-$tag-*.whl" || true)
done
if [[ ",$extras," == *,cpu,* ]] && [ -z "$torch" ]; then
    options+=(--torch-backend cpu)
fi
.venv/bin/uv pip install --python .venv/bin/python --compile-bytecode "${options[@]}" \
    --constraints constraints.txt --build-constraints build-constraints.txt --editable ".[$extras]"
touch .venv/.ready
