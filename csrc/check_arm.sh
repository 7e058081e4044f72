#!/usr/bin/env bash
# Compile the kernels for 64-bit ARM on another machine: that they compile and link, not that they are right.
# The cross-compiler is CXX, or aarch64-linux-gnu-g++, or zig (as a program, or python's package ziglang).
# Status 77 where there is none. PYTHON names the interpreter.
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
