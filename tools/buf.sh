#!/usr/bin/env bash
# Checks proto/ with buf: its lint rules, and compatibility with the released contract in proto-released/.
#   tools/buf.sh           installs buf if it is missing, then checks
#   tools/buf.sh install   only installs it
# buf comes from npm and goes into .tools/. If that is impossible, one line says that the check was skipped.
set -euo pipefail
cd "$(dirname "$0")/.."

version=1.75.0
folder=.tools/buf-$version
buf=$folder/node_modules/.bin/buf

if [ ! -x "$buf" ]; then
    if ! command -v npm >/dev/null; then
        echo "buf: skipped, proto/ was not checked: npm (Node.js) is not installed"
        exit 0
    fi
    mkdir -p "$folder"
    if ! npm install --prefix "$folder" --no-save --no-package-lock --no-audit --no-fund --loglevel=error \
        "@bufbuild/buf@$version"; then
        echo "buf: skipped, proto/ was not checked: npm could not install @bufbuild/buf@$version"
        exit 0
    fi
    ln -sfn "${buf#.tools/}" .tools/buf
fi
[ "${1:-}" = install ] && exit 0

"$buf" lint
"$buf" breaking --against proto-released
echo "buf: proto/ follows the lint rules and breaks nothing of proto-released/"
