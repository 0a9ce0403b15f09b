#!/bin/sh
# Install avl-edge into a virtual environment over the device's own packages.
#
#   install_packages.sh VENV SOURCE TORCH_INDEX
#
# torch comes from TORCH_INDEX, alone; everything else from the ordinary index with that torch held fast, so that no
# dependency can bring another, and with the cuda-python of the device's CUDA. TensorRT is the device's: the environment
# sees the system's packages.
set -eu

fail() {
    echo "install_packages.sh: $1" >&2
    exit 2
}

[ $# -eq 3 ] || fail "give three arguments: VENV SOURCE TORCH_INDEX"
venv=$1
source=$2
index=$3
check="$source/tools/deploy/check_packages.py"

case "$index" in
    "") fail "TORCH_INDEX is empty: give the index with torch for this JetPack (for 6.2: jp6/cu126)" ;;
    *pypi.org* | *pythonhosted.org*) fail "$index has no torch for a Jetson: give the index for this JetPack" ;;
esac

python3 -m venv --system-site-packages "$venv"
pip() { "$venv/bin/python" -m pip --no-cache-dir --disable-pip-version-check "$@"; }

"$venv/bin/python" "$check" tensorrt
"$venv/bin/python" "$check" cuda > "$venv/cuda.txt"
pip install --no-deps --index-url "$index" "torch>=2.5,<3"
"$venv/bin/python" "$check" torch > "$venv/torch.txt"
pip install --constraint "$venv/cuda.txt" --constraint "$venv/torch.txt" --editable "${source}[cuda,export]"
[ "$("$venv/bin/python" "$check" torch)" = "$(cat "$venv/torch.txt")" ] || fail "a dependency has replaced torch"
