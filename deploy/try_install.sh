#!/usr/bin/env bash
# Runs deploy/install.sh in a fresh Debian 12, then serves the embedded model there as the image would: as the user
# loraf, on a read-only root. Needs root, Debian's mmdebstrap, network and about 6 GB below $TMPDIR. Removes everything.
#
#   deploy/try_install.sh [cpu|cuda]
#
# PIP_FIND_LINKS: a folder with a wheel of torch for the CPU, if PyTorch's own index cannot be reached.
set -euo pipefail

build=${1:-cpu}
source=$(cd "$(dirname "$0")/.." && pwd)
# A mount namespace of its own: mounts vanish with it.
if [ -z "${IN_NAMESPACE:-}" ]; then
    IN_NAMESPACE=1 exec unshare --mount --pid --fork --kill-child "$0" "$build"
fi

work=$(mktemp -d "${TMPDIR:-/tmp}/loraf-install-XXXXXX")
root=$work/root
clean() {
    umount --recursive --lazy "$root" 2>/dev/null || true
    sleep 1
    rm -rf --one-file-system "$work"
}
trap clean EXIT

mmdebstrap --quiet --variant=minbase --include=ca-certificates bookworm "$root"
mount --bind "$root" "$root"
mount -t proc proc "$root/proc"
mount --rbind /dev "$root/dev"
mount --rbind -o ro /sys "$root/sys"
cp /etc/resolv.conf "$root/etc/resolv.conf"
mkdir -p "$root/src"
mount --bind -o ro "$source" "$root/src"
mount -o remount,bind,ro "$root/src"
passed=()
if [ -n "${SSL_CERT_FILE:-}" ]; then  # where downloads pass through a proxy with an authority of its own
    cp "$SSL_CERT_FILE" "$root/authorities.pem"
    passed+=(SSL_CERT_FILE=/authorities.pem PIP_CERT=/authorities.pem)
fi
if [ -n "${PIP_FIND_LINKS:-}" ]; then
    mkdir -p "$root/wheels"
    mount --bind "$PIP_FIND_LINKS" "$root/wheels"
    passed+=(PIP_FIND_LINKS=/wheels)
fi
path=PATH=/opt/loraf/bin:/usr/sbin:/usr/bin:/sbin:/bin

env -i "$path" "${passed[@]}" chroot "$root" /src/deploy/install.sh "$build"
umount "$root/src"
if [ -d "$root/wheels" ]; then umount "$root/wheels"; fi

# As the image: nothing but /cache and /tmp can be written.
mkdir -p "$work/cache" && chown 10001:10001 "$work/cache"
mount --bind "$work/cache" "$root/cache"
mount -t tmpfs tmpfs "$root/tmp"
mount -o remount,bind,ro "$root"

# shellcheck disable=SC2207  # one assignment a word
inside=(env -i $(sed -n 's/^ENV //p' "$source/deploy/Dockerfile") "$(command -v chroot)" --userspec 10001:10001 "$root")
step() { printf '\n== %s\n' "$*"; }
step "a read-only root"
if chroot "$root" touch /here 2>/dev/null; then echo "the root can be written" >&2; exit 1; fi
step "serve the embedded model"
log=$work/log
"${inside[@]}" loraf-serve --model tiny --backend resident --dtype float32 >"$log" 2>&1 &
server=$!
for _ in $(seq 150); do
    if "${inside[@]}" loraf-client health --timeout 5 >/dev/null 2>&1; then break; fi
    if ! kill -0 "$server" 2>/dev/null; then break; fi
    sleep 2
done
"${inside[@]}" loraf-client health || { cat "$log" >&2; exit 1; }
grep "loraf-serve:" "$log"
step "ask"
"${inside[@]}" loraf-client generate "Reverse: kitten" --base --max-tokens 8
step "SIGTERM"
kill -TERM "$server"
wait "$server"
tail -n 2 "$log"
echo "exit status 0"
