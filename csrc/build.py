"""Build the CPU kernels: every `csrc/*.cpp` into one shared library, with whatever C++ compiler there is.

`hatch_build.py` calls `install` when the package is built. By hand, into the source tree:

    python csrc/build.py                              # src/slimlm/kernels/slimlm_cpu.so and its record slimlm_cpu.json
    python csrc/build.py --out other/slimlm_cpu.so   # somewhere else; SLIMLM_KERNEL_LIBRARY makes slimlm use it
    python csrc/build.py --compiler                   # print the compiler that would be taken; status 1 where there is none

The end of a file's name says what it is compiled for: `gemm_avx512.cpp` gets the flags of the variant `avx512` below and is
left out where they make no sense or the compiler refuses them; a file without such an end is plain. For each variant that the
library does not have, all files are compiled with `-DSLIMLM_NO_<VARIANT>`, by which the dispatcher knows.

CXX names the compiler; CXXFLAGS, LDFLAGS and (on macOS) ARCHFLAGS are heeded. SLIMLM_KERNELS says what an install does where
nothing can be built: `auto` (the default) records the reason, `require` fails; `off` builds nothing. Only the standard library
is needed.
"""

import argparse
import dataclasses
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

SOURCES = Path(__file__).resolve().parent
LIBRARY = SOURCES.parent / "src/slimlm/kernels/slimlm_cpu.so"
"""The same name on Linux and macOS: ctypes does not care, and the package looks for one file."""
COMMON = ("-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-pthread", "-fno-math-errno")
STATIC_RUNTIME = ("-static-libstdc++", "-static-libgcc", "-Wl,--exclude-libs,ALL")
"""The C++ runtime inside the library and hidden there, so that it cannot meet another version of it in torch."""
WAYS = ("auto", "require", "off")


class NotBuiltError(Exception):
    """Why there is no library."""


@dataclass(frozen=True)
class Variant:
    """Files that need more than the architecture's baseline."""

    name: str
    architecture: str
    """as the compiler calls what it compiles for: x86_64 or aarch64"""
    flags: tuple[str, ...]
    apple_flags: tuple[str, ...] | None = None
    """where they differ on macOS"""
    other_flags: tuple[str, ...] | None = None
    """the same to a compiler that refuses `flags`"""


# From few to many features: see `_objects_in_link_order`.
VARIANTS = (
    Variant("avx2", "x86_64", ("-mavx2", "-mfma", "-mf16c")),
    Variant(
        "avx512",
        "x86_64",
        ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni", "-mfma", "-mf16c"),
    ),
    Variant("neon", "aarch64", ()),
    # zig takes processors, not architectures.
    Variant("neondot", "aarch64", ("-march=armv8.2-a+dotprod",), apple_flags=(), other_flags=("-mcpu=generic+dotprod",)),
)
PORTABLE = "portable"
OWN_FLAGS = {"variant_portable.cpp": ("-O2",)}
"""Of single files, after those of all. GCC 12 compiles this one in half the time at -O2, and the result is no slower."""


@dataclass(frozen=True)
class Record:
    """What was built, or why nothing was. It lies next to the library as JSON, and `slimlm doctor` reads it."""

    reason: str | None = None
    """why there is no library; None where there is one"""
    compiler: str | None = None
    version: str | None = None
    architecture: str | None = None
    flags: list[str] = field(default_factory=list)
    """of every file"""
    variants: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    """variants that the library does not have, each with the reason"""


def install(library: Path, way: str, *, sources: Path = SOURCES, load: bool = True) -> Record:
    """Build the library as SLIMLM_KERNELS asks, and write its record next to it.

    An older library in that place never survives: it is replaced, or removed where nothing was built.

    Raises:
        NotBuiltError: `way` is `require` and nothing could be built, or it is no way at all.
    """
    if way not in WAYS:
        raise NotBuiltError(f"SLIMLM_KERNELS={way}: it is one of {', '.join(WAYS)}")
    try:
        if way == "off":
            raise NotBuiltError("SLIMLM_KERNELS=off was set when slimlm was installed")
        record = build(library, sources=sources, load=load)
    except NotBuiltError as error:
        if way == "require":
            raise NotBuiltError(f"SLIMLM_KERNELS=require, but the CPU kernels were not built: {error}") from None
        library.unlink(missing_ok=True)
        record = Record(reason=str(error))
    text = json.dumps(dataclasses.asdict(record), indent=1) + "\n"
    library.with_suffix(".json").write_text(text, encoding="utf-8")
    return record


def build(library: Path, *, sources: Path = SOURCES, extra: Sequence[str] = (), load: bool = True) -> Record:
    """Compile and link; `extra` flags come last and win. With `load`, a library that this Python cannot open is refused.

    Raises:
        NotBuiltError: no compiler, no sources, or one of them is wrong.
    """
    files = sorted(sources.glob("*.cpp"))
    if not files:
        raise NotBuiltError("csrc holds no .cpp files")
    compiler = find_compiler()
    environment = _environment()
    with tempfile.TemporaryDirectory(prefix="slimlm-kernels-") as name:
        folder = Path(name)
        tool = _Compiler(compiler, folder, environment)
        architecture, apple = tool.target()
        flags, left_out = _choose(files, tool, architecture, apple=apple)
        defines = [f"-DSLIMLM_NO_{variant.upper()}" for variant in left_out]
        common = [*COMMON, *defines, f"-I{sources}"]
        # From the end of the alphabet: the variants take longest, the portable one most of all, so they begin first.
        wanted = [file for file in reversed(files) if variant_of(file) in flags]

        def compiled(file: Path) -> Path:
            made = folder / f"{file.stem}.o"
            own = (*flags[variant_of(file)], *OWN_FLAGS.get(file.name, ()))
            tool.run(*common, *own, "-c", str(file), "-o", str(made), *extra, about=file.name)
            return made

        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            objects = dict(zip(wanted, pool.map(compiled, wanted), strict=True))
        linked = folder / "linked.so"
        # A sanitizer replaces parts of the C++ runtime, which it can only do where that is shared.
        shared_runtime = apple or any(flag.startswith("-fsanitize") for flag in extra)
        static = () if shared_runtime or not tool.accepts("-shared", "-fPIC", *STATIC_RUNTIME) else STATIC_RUNTIME
        ordered = [str(made) for made in _objects_in_link_order(objects)]
        link_flags = shlex.split(os.environ.get("LDFLAGS", ""))
        tool.run(*link_flags, "-shared", "-pthread", *ordered, *static, "-o", str(linked), *extra, about="the library")
        if load and not os.environ.get("ARCHFLAGS"):
            _refuse_unloadable(linked)
        _put(linked, library)
        return Record(
            compiler=shlex.join(compiler),
            version=tool.version(),
            architecture=architecture,
            flags=[*COMMON, *static, *extra],
            variants=[name for name in (*[v.name for v in reversed(VARIANTS)], PORTABLE) if name in flags],
            left_out=left_out,
        )


def find_compiler() -> list[str]:
    """The command of the C++ compiler: CXX, which may hold options too, or the first of c++, g++ and clang++ on PATH.

    Raises:
        NotBuiltError: there is none, or this is Windows.
    """
    if sys.platform == "win32":
        raise NotBuiltError("the CPU kernels are not built on Windows yet")
    path = os.environ.get("PATH", "")
    asked = shlex.split(os.environ.get("CXX", ""))
    if asked:
        if shutil.which(asked[0], path=path) is None:
            raise NotBuiltError(f"CXX names the C++ compiler {asked[0]}, which is not there")
        return asked
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name, path=path) is not None:
            return [name]
    raise NotBuiltError("no C++ compiler was found: none of c++, g++ and clang++ is on PATH, and CXX is not set")


def variant_of(file: Path) -> str:
    """The variant that a file's name ends in, or `portable`."""
    return next((v.name for v in VARIANTS if file.stem.endswith(f"_{v.name}")), PORTABLE)


def _choose(
    files: Sequence[Path], tool: "_Compiler", architecture: str, *, apple: bool
) -> tuple[dict[str, tuple[str, ...]], dict[str, str]]:
    """The flags of each variant to build, and the reason for each that is left out."""
    flags: dict[str, tuple[str, ...]] = {PORTABLE: ()}
    left_out = {}
    for variant in VARIANTS:
        own = variant.apple_flags if apple and variant.apple_flags is not None else variant.flags
        ways = [way for way in (own, variant.other_flags) if way is not None]
        if variant.architecture != architecture:
            left_out[variant.name] = f"it is for {variant.architecture}; the compiler compiles for {architecture}"
        elif not any(variant_of(file) == variant.name for file in files):
            left_out[variant.name] = f"csrc holds no *_{variant.name}.cpp"
        elif (taken := next((way for way in ways if tool.accepts("-c", *way)), None)) is None:
            left_out[variant.name] = f"the compiler refuses {' '.join(own)}"
            print(f"slimlm: CPU kernels without {variant.name}: {left_out[variant.name]}", file=sys.stderr)
        else:
            flags[variant.name] = taken
    return flags, left_out


def _objects_in_link_order(objects: dict[Path, Path]) -> list[Path]:
    """The plain files first, then the variants from few features to many.

    Of an inline function that several files compile, the linker keeps the first copy. In this order that copy runs on every
    processor on which one of its callers runs.
    """
    order = [PORTABLE, *[variant.name for variant in VARIANTS]]
    return [objects[file] for file in sorted(objects, key=lambda file: (order.index(variant_of(file)), file.name))]


def _environment() -> dict[str, str]:
    """This process's, with messages in English; on macOS built for the oldest system that a wheel of ours names."""
    environment = {**os.environ, "LC_ALL": "C"}
    if sys.platform == "darwin":
        environment.setdefault("MACOSX_DEPLOYMENT_TARGET", "11.0")
    return environment


class _Compiler:
    """A compiler's command, and a folder for what it writes."""

    def __init__(self, command: Sequence[str], folder: Path, environment: dict[str, str]) -> None:
        # CXXFLAGS come before our own flags: where they disagree, as on -O, ours win.
        own = shlex.split(environment.get("CXXFLAGS", ""))
        arch = shlex.split(environment.get("ARCHFLAGS", "")) if sys.platform == "darwin" else []
        self.bare = list(command)
        self.command = [*command, *own, *arch]
        self.folder = folder
        self.environment = environment
        self.probe = folder / "probe.cpp"
        self.probe.write_text("int slimlm_probe() { return 0; }\n", encoding="utf-8")

    def run(self, *arguments: str, about: str) -> str:
        """What it prints.

        Raises:
            NotBuiltError: it fails, with the end of what it said.
        """
        done = self._started(self.command, arguments)
        if done.returncode != 0:
            said = "\n".join((done.stderr or done.stdout).strip().splitlines()[-20:])
            raise NotBuiltError(
                f"{shlex.join(self.bare)} failed at {about}, status {done.returncode}: {said or 'it says nothing'}"
            )
        return done.stdout

    def accepts(self, *flags: str) -> bool:
        """Whether a trivial file compiles (and links, without `-c`) with these flags."""
        made = self.folder / "probe.out"
        return self._started(self.command, (*flags, str(self.probe), "-o", str(made))).returncode == 0

    def target(self) -> tuple[str, bool]:
        """The architecture compiled for, and whether it is Apple's."""
        said = self.run("-dM", "-E", str(self.probe), about="telling what it compiles for")
        macros = {line.split()[1] for line in said.splitlines() if line.startswith("#define ")}
        found = [name for name in ("x86_64", "aarch64") if f"__{name}__" in macros]
        return found[0] if found else "another architecture", "__APPLE__" in macros

    def version(self) -> str:
        """The first line that it says of itself."""
        said = self._started(self.bare, ("--version",)).stdout.strip().splitlines()
        return said[0] if said else "unknown"

    def _started(self, command: Sequence[str], arguments: Sequence[str]) -> "subprocess.CompletedProcess[str]":
        try:
            return subprocess.run(
                [*command, *arguments],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                env=self.environment,
                encoding="utf-8",
                errors="replace",
            )
        except OSError as error:
            raise NotBuiltError(f"{shlex.join(self.bare)} cannot be started: {error}") from None


def _refuse_unloadable(library: Path) -> None:
    """Open the library in a process of its own, as slimlm will."""
    code = "import ctypes, sys; ctypes.CDLL(sys.argv[1]).slimlm_abi()"
    done = subprocess.run(
        [sys.executable, "-I", "-c", code, str(library)], stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    if done.returncode != 0:
        said = done.stderr.strip().splitlines()
        raise NotBuiltError(f"the library was built but does not load: {said[-1] if said else f'status {done.returncode}'}")


def _put(made: Path, library: Path) -> None:
    """Move into place in one step: a process that has the old library open keeps the old file."""
    library.parent.mkdir(parents=True, exist_ok=True)
    beside = library.with_name(f".{library.name}.{os.getpid()}")
    try:
        shutil.copy(made, beside)
        beside.replace(library)
    finally:
        beside.unlink(missing_ok=True)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Build slimlm's CPU kernels.")
    parser.add_argument("--out", type=Path, default=LIBRARY, help="the library to write; its record goes next to it")
    parser.add_argument("--extra", default="", help="flags for every compilation and the link, in one string")
    parser.add_argument("--no-load", action="store_true", help="do not try to open the library (for cross-compilers)")
    parser.add_argument("--compiler", action="store_true", help="print the compiler that would be taken and build nothing")
    asked = parser.parse_args()
    try:
        if asked.compiler:
            print(shlex.join(find_compiler()))
            return 0
        record = build(asked.out, extra=shlex.split(asked.extra), load=not asked.no_load)
    except NotBuiltError as error:
        print(f"slimlm: {error}", file=sys.stderr)
        return 1
    text = json.dumps(dataclasses.asdict(record), indent=1) + "\n"
    asked.out.with_suffix(".json").write_text(text, encoding="utf-8")
    print(f"{asked.out}: {', '.join(record.variants)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
