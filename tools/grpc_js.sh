#!/usr/bin/env bash
# Installs Node's gRPC client from npm into .tools/grpc-js/, for the tests of clients in other languages.
# If that is impossible, one line says so, and those tests skip themselves.
set -euo pipefail
cd "$(dirname "$0")/.."

client=1.14.7
loader=0.8.1
folder=.tools/grpc-js-$client

[ -d "$folder/node_modules/@grpc/proto-loader" ] && exit 0
if ! command -v npm >/dev/null; then
    echo "grpc-js: skipped: npm (Node.js) is not installed"
    exit 0
fi
mkdir -p "$folder"
if ! npm install --prefix "$folder" --no-save --no-package-lock --no-audit --no-fund --loglevel=error \
    "@grpc/grpc-js@$client" "@grpc/proto-loader@$loader"; then
    echo "grpc-js: skipped: npm could not install @grpc/grpc-js@$client"
    exit 0
fi
ln -sfn "grpc-js-$client" .tools/grpc-js
