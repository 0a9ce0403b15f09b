#!/usr/bin/env bash
# Runs a Python program with this tree on an emulated Arm processor, that of a Jetson AGX Orin as near as qemu has it.
#
#     dpkg --add-architecture arm64 && apt-get update && apt-get install g++-aarch64-linux-gnu qemu-user   # once
#     tools/arm/run.sh examples/ask.py examples/cockpit.png "What is the speed?"
#
# Debian 12's Python 3.11 for Arm, the oldest torch that the package takes (2.5), and the CPU kernel, cross-compiled, go
# into a folder avl-edge-arm in $AVL_EDGE_ARM (by default ~/.cache; 700 MB). It shows that things work there, never how
# fast.
set -euo pipefail

if [ $# -eq 0 ]; then
    echo "usage: tools/arm/run.sh PROGRAM.py [ARGUMENT...], or -c CODE, or -m MODULE" >&2
    exit 2
fi
tree=$(cd "$(dirname "$0")/../.." && pwd)
folder=${AVL_EDGE_ARM:-$HOME/.cache}/avl-edge-arm  # removed as a whole where it is not complete
debs=(libc6 libstdc++6 libgcc-s1 zlib1g libbz2-1.0 liblzma5 libffi8 libssl3 libexpat1 libsqlite3-0 libcrypt1
    python3.11-minimal libpython3.11-minimal libpython3.11-stdlib)
wheels=("numpy<2.4" jinja2 "pillow>=11.1" pyyaml rich safetensors tokenizers typer
    filelock fsspec networkx sympy==1.13.1 typing_extensions)

if [ ! -e "$folder/ready" ]; then
    for program in aarch64-linux-gnu-g++ qemu-aarch64 "$tree/.venv/bin/python"; do
        command -v "$program" > /dev/null || { echo "$program is missing: see the head of $0, and make demo" >&2; exit 1; }
    done
    rm -rf "$folder"
    mkdir -p "$folder/debs" "$folder/wheels" "$folder/system" "$folder/packages/avl_edge-0.dist-info"
    (cd "$folder/debs" && apt-get download -q "${debs[@]/%/:arm64}")
    for deb in "$folder"/debs/*.deb; do dpkg -x "$deb" "$folder/system"; done
    take=("$tree/.venv/bin/python" -m pip download -q -d "$folder/wheels" --only-binary=:all: --python-version 3.11)
    for tag in manylinux_2_28 manylinux_2_27 manylinux_2_17 manylinux2014; do take+=(--platform "${tag}_aarch64"); done
    "${take[@]}" --no-deps torch==2.5.1  # whose own list asks for packages of other processors
    "${take[@]}" "${wheels[@]}"
    for wheel in "$folder"/wheels/*.whl; do "$tree/.venv/bin/python" -m zipfile -e "$wheel" "$folder/packages"; done
    printf 'Metadata-Version: 2.1\nName: avl-edge\nVersion: 0\n' > "$folder/packages/avl_edge-0.dist-info/METADATA"
    touch "$folder/ready"
fi

# The package is copied, so that the kernel for Arm does not lie beside the one for this machine.
rm -rf "$folder/tree"
mkdir "$folder/tree"
cp -r "$tree"/{avl_edge,engines,plugins,profiles} "$folder/tree"
rm -f "$folder"/tree/avl_edge/attention/_core_attention.*
if [ ! -e "$folder/kernel.so" ] || [ -n "$(find "$tree/plugins/cpu" -newer "$folder/kernel.so" -type f)" ]; then
    aarch64-linux-gnu-g++ -std=c++17 -O3 -fPIC -shared -o "$folder/kernel.so" "$tree/plugins/cpu/core_attention.cpp"
fi
cp "$folder/kernel.so" "$folder/tree/avl_edge/attention/_core_attention.cpython-311-aarch64-linux-gnu.so"

exec env PYTHONHOME="$folder/system/usr" PYTHONPATH="$folder/tree:$folder/packages" \
    qemu-aarch64 -cpu cortex-a76 -L "$folder/system" "$folder/system/usr/bin/python3.11" "$@"
