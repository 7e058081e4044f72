#!/usr/bin/env bash
# Run tests of the kernels against a library built with AddressSanitizer and UndefinedBehaviorSanitizer:
#
#     csrc/sanitize.sh tests/runtime/cpu/test_native.py [more of pytest's arguments]
#
# The library goes into a temporary folder, and SLIMLM_KERNEL_LIBRARY leads slimlm to it. PYTHON names the interpreter, CXX the
# compiler. Linux with g++, or with a clang++ whose sanitizers can be preloaded.
set -euo pipefail

if [ $# -eq 0 ]; then
    sed -n '2,7s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
    exit 2
fi

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

compiler=$("$python" "$here/build.py" --compiler)
extra="-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -O1 -g"
case $($compiler --version) in *clang*) extra="$extra -shared-libasan" ;; esac
# Without the sanitizer's library in front, the kernels' cannot be opened: so it is not tried during the build.
"$python" "$here/build.py" --out "$work/slimlm_cpu.so" --extra "$extra" --no-load

# AddressSanitizer must come first, and the C++ runtime with it: its hook for exceptions looks for the one behind it.
preload=
for library in libasan.so libclang_rt.asan-$(uname -m).so libstdc++.so; do
    path=$($compiler -print-file-name="$library")
    if [ -e "$path" ]; then preload="$preload${preload:+:}$path"; fi
done

# Python and torch keep memory until the process ends: leaks are not looked for. Nothing is captured (-s), because a sanitizer
# that ends the process would take its report with it.
LD_PRELOAD=$preload ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 SLIMLM_KERNEL_LIBRARY="$work/slimlm_cpu.so" \
    "$python" -m pytest -s "$@"
