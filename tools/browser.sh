#!/usr/bin/env bash
# Installs what the tests of the page need beside Python: axe-core from npm into .tools/, and Debian's Chromium.
# Chromium is installed only in continuous integration (CI is set) and by root; elsewhere one line says how to get it.
# What cannot be installed is named, and the tests that need it skip themselves.
set -euo pipefail
cd "$(dirname "$0")/.."

version=4.14.1
folder=.tools/axe-core-$version

if [ ! -f "$folder/node_modules/axe-core/axe.min.js" ]; then
    if ! command -v npm >/dev/null; then
        echo "axe-core: skipped: npm (Node.js) is not installed"
    else
        mkdir -p "$folder"
        npm install --prefix "$folder" --no-save --no-package-lock --no-audit --no-fund --loglevel=error \
            "axe-core@$version" || echo "axe-core: skipped: npm could not install axe-core@$version"
    fi
fi
[ -f "$folder/node_modules/axe-core/axe.min.js" ] && ln -sfn "axe-core-$version" .tools/axe-core

for name in chromium chromium-browser google-chrome; do
    command -v "$name" >/dev/null && exit 0
done
if [ -z "${CI:-}" ] || [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "chromium: not installed; the tests of the page need it: apt-get install chromium"
    exit 0
fi
export DEBIAN_FRONTEND=noninteractive
if ! { apt-get update -qq && apt-get install -qq --no-install-recommends chromium >/dev/null; }; then
    echo "chromium: skipped: apt-get could not install it"
fi
