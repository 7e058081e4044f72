#!/usr/bin/env bash
# Run tests of the kernels on an x86-64 machine without AVX-512 against a library whose AVX-512 variant is emulated (slowly):
#
#     csrc/emulate.sh tests/runtime/cpu/test_kernels.py [more of pytest's arguments]
#
# Those tests run every variant that the library offers. PYTHON names the interpreter, CXX the compiler.
set -euo pipefail

if [ $# -eq 0 ]; then
    sed -n '2,6s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
    exit 2
fi

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"$python" "$here/build.py" --out "$work/slimlm_cpu.so" --extra "-DSLIMLM_EMULATED -mno-avx512f"
SLIMLM_KERNEL_LIBRARY="$work/slimlm_cpu.so" "$python" -m pytest "$@"
