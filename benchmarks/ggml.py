"""llama.cpp's matrix products, through ggml's shared libraries, which llama-cpp-python brings.

Only as much of their C interface is declared as that takes.
"""

import ctypes
from ctypes import c_char_p, c_int, c_int64, c_size_t, c_void_p
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

TYPES = {"F16": 1, "Q4_0": 2, "Q8_0": 8, "Q4_K": 12}
"""ggml's numbers of its tensor types; they are part of its file format and do not change."""
REPACKED = "CPU_REPACK"
"""The buffer type whose tensors ggml lays out for its vector instructions, as llama.cpp does when it loads a model."""

_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "ggml_new_tensor_2d": (c_void_p, [c_void_p, c_int, c_int64, c_int64]),
    "ggml_mul_mat": (c_void_p, [c_void_p] * 3),
    "ggml_new_graph": (c_void_p, [c_void_p]),
    "ggml_build_forward_expand": (None, [c_void_p] * 2),
    "ggml_row_size": (c_size_t, [c_int, c_int64]),
    "ggml_quantize_chunk": (c_size_t, [c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p]),
    "ggml_free": (None, [c_void_p]),
    "ggml_backend_alloc_ctx_tensors_from_buft": (c_void_p, [c_void_p] * 2),
    "ggml_backend_buffer_free": (None, [c_void_p]),
    "ggml_backend_buft_name": (c_char_p, [c_void_p]),
    "ggml_backend_tensor_set": (None, [c_void_p, c_void_p, c_size_t, c_size_t]),
    "ggml_backend_tensor_get": (None, [c_void_p, c_void_p, c_size_t, c_size_t]),
    "ggml_backend_graph_compute": (c_int, [c_void_p] * 2),
    "ggml_backend_reg_dev_get": (c_void_p, [c_void_p, c_size_t]),
    "ggml_backend_reg_get_proc_address": (c_void_p, [c_void_p, c_char_p]),
    "ggml_backend_cpu_buffer_type": (c_void_p, []),
    "ggml_backend_cpu_init": (c_void_p, []),
    "ggml_backend_cpu_reg": (c_void_p, []),
    "ggml_backend_cpu_set_n_threads": (None, [c_void_p, c_int]),
}


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", ctypes.c_bool))


class Library:
    """ggml's functions, with their signatures."""

    def __init__(self, folder: Path) -> None:
        opened = [ctypes.CDLL(str(folder / f"lib{name}.so"), ctypes.RTLD_GLOBAL) for name in ("ggml-base", "ggml-cpu")]
        for name, (result, arguments) in _SIGNATURES.items():
            function = next(getattr(library, name) for library in opened if hasattr(library, name))
            function.restype, function.argtypes = result, arguments
            setattr(self, name.removeprefix("ggml_"), function)
        self._init = opened[0].ggml_init
        self._init.restype, self._init.argtypes = c_void_p, [_InitParams]

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"ggml_{name} is not among the functions that are used here")

    def context(self) -> int:
        """Room for the descriptions of tensors, not for their values."""
        return self._init(_InitParams(4_000_000, None, True))


@cache
def library() -> Library:
    """The library; raises ImportError or OSError where there is none."""
    spec = find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        raise ImportError("llama-cpp-python, which brings ggml, is not installed")
    return Library(Path(spec.origin).parent / "lib")


def encoded(weight: np.ndarray, kind: str) -> np.ndarray:
    """A float32 weight `[out, in]` as ggml stores it, uint8 `[out, bytes]`."""
    rows, columns = weight.shape
    if kind == "F16":
        return weight.astype(np.float16).view(np.uint8)
    ggml = library()
    stored = np.empty((rows, ggml.row_size(TYPES[kind], columns)), np.uint8)
    source = np.ascontiguousarray(weight, np.float32)
    ggml.quantize_chunk(TYPES[kind], source.ctypes.data, stored.ctypes.data, 0, rows, columns, None)
    return stored


@cache
def repacked_type() -> int | None:
    """The buffer type of repacked tensors, where this build has it."""
    ggml = library()
    registry = ggml.backend_cpu_reg()
    address = ggml.backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
    if not address:
        return None
    listed = ctypes.CFUNCTYPE(ctypes.POINTER(c_void_p), c_void_p)(address)(ggml.backend_reg_dev_get(registry, 0))
    for kind in listed or ():
        if kind is None:
            return None
        if ggml.backend_buft_name(kind).decode() == REPACKED:
            return int(kind)
    return None


class Weights:
    """Copies of one encoded weight in ggml's memory."""

    def __init__(self, stored: np.ndarray, kind: str, shape: tuple[int, int], copies: int, *, repacked: bool) -> None:
        ggml = library()
        self.shape = shape
        self.context = ggml.context()
        self.tensors = [ggml.new_tensor_2d(self.context, TYPES[kind], shape[1], shape[0]) for _ in range(copies)]
        place = repacked_type() if repacked else ggml.backend_cpu_buffer_type()
        self.buffer = ggml.backend_alloc_ctx_tensors_from_buft(self.context, place)
        if not self.buffer:
            raise MemoryError(f"ggml has no memory for {copies} copies of {stored.nbytes} bytes")
        for tensor in self.tensors:
            ggml.backend_tensor_set(tensor, stored.ctypes.data, 0, stored.nbytes)

    def __del__(self) -> None:
        library().backend_buffer_free(self.buffer)
        library().free(self.context)


class Products:
    """One graph that multiplies an input `[batch, in]` by some of the copies, with a number of threads."""

    def __init__(self, weights: Weights, tensors: list[int], x: np.ndarray, backend: int) -> None:
        ggml = library()
        self.weights, self.backend = weights, backend
        self.size = (x.shape[0], weights.shape[0])
        self.context = ggml.context()
        given = ggml.new_tensor_2d(self.context, 0, x.shape[1], x.shape[0])
        self.results = [ggml.mul_mat(self.context, tensor, given) for tensor in tensors]
        self.buffer = ggml.backend_alloc_ctx_tensors_from_buft(self.context, ggml.backend_cpu_buffer_type())
        source = np.ascontiguousarray(x, np.float32)
        ggml.backend_tensor_set(given, source.ctypes.data, 0, source.nbytes)
        self.graph = ggml.new_graph(self.context)
        for result in self.results:
            ggml.build_forward_expand(self.graph, result)

    def __call__(self) -> "Products":
        if library().backend_graph_compute(self.backend, self.graph):
            raise RuntimeError("ggml could not compute its graph")
        return self

    def last(self) -> np.ndarray:
        """The last product, float32 `[batch, out]`."""
        found = np.empty(self.size, np.float32)
        library().backend_tensor_get(self.results[-1], found.ctypes.data, 0, found.nbytes)
        return found

    def __del__(self) -> None:
        library().backend_buffer_free(self.buffer)
        library().free(self.context)


@cache
def backend(threads: int) -> int:
    """ggml's CPU with this many threads."""
    found = library().backend_cpu_init()
    library().backend_cpu_set_n_threads(found, threads)
    return found
