#!/usr/bin/env bash
# Run scripts/setup.sh in a fresh Debian root, as a user without rights, twice. For a machine with
# debootstrap and root; takes some minutes and a few GB. Not part of the test suite.
#   bash tests/clean_root.sh /var/tmp/clean-root
set -euo pipefail
root="${1:?usage: bash tests/clean_root.sh FOLDER}"
here="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

if [[ ! -x "$root/usr/bin/python3" ]]; then
  debootstrap --variant=minbase --include=python3,python3-venv,git,ca-certificates \
    stable "$root" ${DEBIAN_MIRROR:+"$DEBIAN_MIRROR"}
fi
# What this machine knows of its network, and nothing else.
cp /etc/resolv.conf "$root/etc/resolv.conf"
[[ -f /etc/pip.conf ]] && cp /etc/pip.conf "$root/etc/pip.conf"
cp -r /etc/ssl/certs/. "$root/etc/ssl/certs/" 2>/dev/null || true
chroot "$root" id recipe >/dev/null 2>&1 || chroot "$root" useradd --create-home recipe
mountpoint -q "$root/proc" || mount -t proc proc "$root/proc"
trap 'umount "$root/proc"' EXIT

rm -rf "$root/home/recipe/recipe"
git clone --quiet "$here" "$root/home/recipe/recipe"
chroot "$root" chown -R recipe:recipe /home/recipe

inside() { # keeps pip's settings, drops the rest of the environment
  local keep
  keep="$(env | grep -E '^(PIP_|SSL_CERT|REQUESTS_CA|https?_proxy|no_proxy)' || true)"
  chroot --userspec=recipe:recipe "$root" /usr/bin/env -i HOME=/home/recipe \
    PATH=/usr/local/bin:/usr/bin:/bin ${keep:+$keep} bash -c "cd ~/recipe && $1"
}
inside "bash scripts/setup.sh"
echo "--- again: nothing to do"
inside "time bash scripts/setup.sh"
inside ".venv/bin/python -m scripts.plan --config configs/llama3-8b-a100.yaml | head -3"
