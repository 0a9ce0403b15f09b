#!/bin/sh
# Install avl-edge on a Jetson without a container, from this source tree.
#
#   sudo tools/deploy/install.sh TORCH_INDEX [ROOT]
#
# The program goes to /opt/avl-edge, the command to /usr/local/bin, the units to /etc/systemd/system, profiles to
# /var/lib/avl-edge, which belongs to the user avl-edge. Run it again to bring all of it up to date. With ROOT, the
# folder of another system's files, nothing is started.
set -eu

fail() {
    echo "install.sh: $1" >&2
    exit 2
}

[ $# -eq 1 ] || [ $# -eq 2 ] || fail "give TORCH_INDEX, the package index with torch for this JetPack"
index=$1
root=${2:-}
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
source=$(dirname "$(dirname "$here")")
[ -n "$root" ] || [ "$(id -u)" -eq 0 ] || fail "it writes to /opt and /etc: run it with sudo"

mkdir -p "$root/opt/avl-edge/source" "$root/usr/local/bin" "$root/etc/systemd/system" "$root/var/lib/avl-edge"
for part in LICENSE README.md pyproject.toml setup.py avl_edge engines plugins profiles tools/deploy; do
    mkdir -p "$(dirname "$root/opt/avl-edge/source/$part")"
    rm -rf "$root/opt/avl-edge/source/$part"
    cp -R "$source/$part" "$root/opt/avl-edge/source/$part"
done
"$here/install_packages.sh" "$root/opt/avl-edge/venv" "$root/opt/avl-edge/source" "$index"
ln -sf /opt/avl-edge/venv/bin/avl-edge "$root/usr/local/bin/avl-edge"
for unit in "$here"/*.service "$here"/*.path; do
    install -m 644 "$unit" "$root/etc/systemd/system/"
done
[ -z "$root" ] || exit 0

id avl-edge > /dev/null 2>&1 || useradd --system --home-dir /var/lib/avl-edge --shell /usr/sbin/nologin avl-edge
chown avl-edge: /var/lib/avl-edge
systemctl daemon-reload
echo "installed: try avl-edge doctor, and systemctl enable --now avl-edge-profile@demo.path"
