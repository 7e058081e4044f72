"""The name of this machine's processor, and which of the instructions it has that the kernels use."""

import platform
import subprocess
import sys
from functools import cache
from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")
_NAMES = {
    # Linux has other names for these than compilers.
    "avx512_vnni": "avx512vnni",
    "asimd": "neon",
    "asimddp": "dotprod",
    # macOS, x86-64 and arm64.
    "avx1.0": "avx",
    "advsimd": "neon",
    "feat_dotprod": "dotprod",
}
INTERESTING = ("avx", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512vnni", "neon", "dotprod")
"""The instructions that the kernels use, by the compilers' names."""


def name() -> str:
    """The processor's name, or the architecture where the system does not report a name."""
    if sys.platform == "darwin":
        return _sysctl("machdep.cpu.brand_string") or platform.machine()
    return _cpuinfo().get("model name") or platform.machine()


@cache
def features() -> frozenset[str]:
    """Those of `INTERESTING` that the processor has; empty where the system does not report them."""
    if sys.platform == "darwin":
        said = _sysctl("machdep.cpu.features") + " " + _sysctl("machdep.cpu.leaf7_features")
        arm = {f: _sysctl(f"hw.optional.{p}") for f, p in (("advsimd", "AdvSIMD"), ("feat_dotprod", "arm.FEAT_DotProd"))}
        said += " " + " ".join(feature for feature, value in arm.items() if value == "1")
    else:
        lines = _cpuinfo()
        said = lines.get("flags") or lines.get("Features") or ""
    return frozenset(_NAMES.get(word, word) for word in said.lower().split()) & frozenset(INTERESTING)


def _cpuinfo() -> dict[str, str]:
    """The first processor's lines on Linux; empty elsewhere."""
    try:
        text = _CPUINFO.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def _sysctl(key: str) -> str:
    """A value of macOS's, empty where there is none."""
    try:
        done = subprocess.run(["/usr/sbin/sysctl", "-n", key], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()
