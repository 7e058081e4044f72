#!/usr/bin/env bash
# Compile the kernels for 64-bit ARM on another machine, and run csrc/check/variants.cpp where there is an emulator.
# The cross-compiler is CXX, or aarch64-linux-gnu-g++, or zig (as a program, or python's package ziglang); the emulator is
# qemu-aarch64, or qemu-aarch64-static. Status 77 where there is no compiler. PYTHON names the interpreter.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

if [ -z "${CXX:-}" ]; then
    if command -v aarch64-linux-gnu-g++ >/dev/null; then
        CXX=aarch64-linux-gnu-g++
    elif command -v zig >/dev/null; then
        CXX="zig c++ -target aarch64-linux-gnu"
    elif "$python" -c "import ziglang" 2>/dev/null; then
        CXX="$python -m ziglang c++ -target aarch64-linux-gnu"
    else
        echo "there is no compiler for aarch64: install g++-aarch64-linux-gnu, or python -m pip install ziglang" >&2
        exit 77
    fi
fi
export CXX

"$python" "$here/build.py" --out "$work/slimlm_cpu.so" --no-load
# A refused flag or a compiler for something else is no failure to the build, but it is one here.
for variant in neondot neon portable; do
    "$python" -c 'import json, sys; sys.exit(sys.argv[2] not in json.load(open(sys.argv[1]))["variants"])' \
        "$work/slimlm_cpu.json" "$variant" || { echo "$variant was not built by $CXX" >&2; cat "$work/slimlm_cpu.json" >&2; exit 1; }
done
echo "compiled for aarch64 by $CXX"

emulator=$(command -v qemu-aarch64 || command -v qemu-aarch64-static || true)
if [ -z "$emulator" ]; then
    echo "not run: there is no qemu-aarch64"
    exit 0
fi
# A program without shared libraries needs none of another system's; zig has such a C library in musl.
compiler=${CXX/linux-gnu /linux-musl }
compiler=${compiler/%linux-gnu/linux-musl}
case $CXX in *zig*) ;; *) compiler=$CXX ;; esac
dot=-march=armv8.2-a+dotprod
$compiler $dot -x c++ -c /dev/null -o "$work/probe.o" 2>/dev/null || dot=-mcpu=generic+dotprod
objects=()
for file in pack pool dispatch compression sweep compression_portable variant_portable variant_neon variant_neondot check/variants; do
    flags=
    if [ "$file" = variant_neondot ]; then flags=$dot; fi
    objects+=("$work/${file##*/}.o")
    $compiler -O2 -std=c++17 -fno-math-errno $flags -c "$here/$file.cpp" -o "${objects[-1]}"
done
$compiler -static -pthread "${objects[@]}" -o "$work/variants"
"$emulator" -cpu max "$work/variants"
