"""The build hook: a wheel with the CPU kernels where a C++ compiler is found, a pure one where not (see csrc/build.py).

A wheel is built from a temporary library, so that a checkout stays as it was; an editable install leaves it in `src/`.
"""

import importlib.util
import os
import sys
import sysconfig
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from hatchling.builders.macos import process_macos_plat_tag

INSIDE = "slimlm/kernels/slimlm_cpu"


class KernelHook(BuildHookInterface):
    """Adds the library, its record and the platform's tag to a wheel."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """`version` is `standard` or `editable`."""
        builder = load_builder(Path(self.root))
        self.folder = None if version == "editable" else tempfile.TemporaryDirectory(prefix="slimlm-wheel-")
        place = Path(self.root, "src", INSIDE) if self.folder is None else Path(self.folder.name, "slimlm_cpu")
        library, record = place.with_suffix(".so"), place.with_suffix(".json")
        self.app.display_info("slimlm: compiling the CPU kernels, where there is a C++ compiler; 34 s on two idle cores")
        try:
            made = builder.install(library, os.environ.get("SLIMLM_KERNELS") or "auto")
        except builder.NotBuiltError as error:
            self.app.abort(f"slimlm: {error}")
        if made.reason is not None:
            self.app.display_warning(f"slimlm: installed without CPU kernels: {made.reason}")
        if version == "editable":
            return
        build_data["force_include"][str(record)] = f"{INSIDE}.json"
        if made.reason is None:
            build_data["force_include"][str(library)] = f"{INSIDE}.so"
            build_data["pure_python"] = False
            # Any Python 3: the library knows nothing of Python, ctypes opens it.
            build_data["tag"] = f"py3-none-{platform_tag()}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Drop the temporary library."""
        if self.folder is not None:
            self.folder.cleanup()


def platform_tag() -> str:
    """Of this machine, or of the one that ARCHFLAGS and MACOSX_DEPLOYMENT_TARGET name."""
    tag = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    return process_macos_plat_tag(tag, compat=False) if sys.platform == "darwin" else tag


def load_builder(root: Path) -> ModuleType:
    """csrc/build.py, which is no part of any package."""
    path = root / "csrc/build.py"
    spec = importlib.util.spec_from_file_location("slimlm_kernel_build", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
