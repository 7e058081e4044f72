"""Other programs' products by 4-bit weights, as contenders: torch's own kernel, ONNX Runtime and llama.cpp's ggml.

Each is a function of shape, threads and effort that gives its entries, or raises MissingError with the reason why it has none
here. All multiply by the same random float32 weight, rounded as that program rounds it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec

import torch
from torch import Tensor

from slimlm.bench.layer_speed import Call, Contender, Effort

_AT_ONCE = 16_000_000
"""Bytes of the weights that one call of another program goes through, so that calling it costs next to nothing."""


class MissingError(Exception):
    """Why a competitor is not measured."""


@dataclass(frozen=True)
class Entry:
    """A contender and the weight that it multiplies by."""

    contender: Contender
    bits_per_weight: float
    weight: Callable[[], Tensor]
    """float32 `[out, in]`, for the error of the arithmetic"""


def entry(contender: Contender, shape: tuple[int, int], weight: Callable[[], Tensor]) -> Entry:
    """With the bits per weight that its bytes come to."""
    return Entry(contender, 8 * contender.bytes / (shape[0] * shape[1]), weight)


@cache
def random_weight(shape: tuple[int, int]) -> Tensor:
    """Float32 `[out, in]`, of root mean square 1 / sqrt(in)."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)) / shape[1] ** 0.5


@cache
def rounded(shape: tuple[int, int], group: int) -> tuple[Tensor, Tensor]:
    """Codes 0 to 15 (8 stands for zero) uint8 `[out, in]` and scales `[out, in / group]` of the random weight."""
    out, width = shape
    if width % group:
        raise MissingError(f"{width} inputs are no multiple of the group of {group}")
    grouped = random_weight(shape).view(out, -1, group)
    scale = grouped.abs().amax(dim=-1) / 7
    codes = (grouped / scale[..., None]).round().clamp(-8, 7) + 8
    return codes.to(torch.uint8).view(shape), scale


def dense_of(shape: tuple[int, int], group: int, scale_type: torch.dtype) -> Tensor:
    """What those codes stand for with scales of this type."""
    codes, scale = rounded(shape, group)
    return (codes.float() - 8) * scale.to(scale_type).float().repeat_interleave(group, dim=1)


# torch


def torch_int4(shape: tuple[int, int], threads: int, effort: Effort) -> list[Entry]:
    """The kernel behind torchao's int4 weights on a CPU, which wants bfloat16 activations."""
    if not hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu"):
        raise MissingError("this torch has no _weight_int4pack_mm_for_cpu")
    found = []
    for group in (32, 128):
        codes, scale = rounded(shape, group)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
        scales = torch.stack([scale, torch.zeros_like(scale)], dim=-1).transpose(0, 1).contiguous().bfloat16()
        size = packed.nbytes + scales.nbytes
        copies = [(packed.clone(), scales.clone()) for _ in range(effort.copies(size))]
        calls = partial(_torch_int4_calls, copies, group)
        contender = Contender(f"torch int4 g{group}, bfloat16 activations", size, calls)
        found.append(entry(contender, shape, partial(dense_of, shape, group, torch.bfloat16)))
    return found


def _torch_int4_calls(copies: Sequence[tuple[Tensor, Tensor]], group: int, x: Tensor) -> list[Call]:
    product, own = torch.ops.aten._weight_int4pack_mm_for_cpu, x.bfloat16()
    return [partial(product, own, packed, group, scales) for packed, scales in copies]


# ONNX Runtime


def onnx_runtime(shape: tuple[int, int], threads: int, effort: Effort) -> list[Entry]:
    """MatMulNBits with 8-bit activations (accuracy level 4), blocks of 32 and 128.

    One session runs through several copies of the weight, a node each, so that the cost of a call is shared. The size
    counts codes and float32 scales; what the kernel packs them into is its own affair.
    """
    absent = [name for name in ("onnxruntime", "onnx") if find_spec(name) is None]
    if absent:
        raise MissingError(f"{' and '.join(absent)} not installed (python -m pip install onnxruntime onnx)")
    found = []
    for block in (32, 128):
        codes, scale = rounded(shape, block)
        pairs = codes.view(shape[0], -1, block // 2, 2)
        packed = pairs[..., 0] | pairs[..., 1] << 4
        size = packed.nbytes + scale.nbytes
        products = max(1, _AT_ONCE // size)
        sessions = [
            _session(shape, block, packed, scale, products, threads) for _ in range(-(-effort.copies(size) // products))
        ]
        calls = partial(_onnx_calls, sessions)
        contender = Contender(f"ONNX Runtime MatMulNBits b{block}", size, calls, products, lambda ys: torch.from_numpy(ys[-1]))
        found.append(entry(contender, shape, partial(dense_of, shape, block, torch.float32)))
    return found


def _session(shape: tuple[int, int], block: int, packed: Tensor, scale: Tensor, nodes: int, threads: int) -> object:
    """A session of a graph in which one input is multiplied by several copies of the weight."""
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    out, width = shape
    weights, products, results = [], [], []
    options = {"K": width, "N": out, "bits": 4, "block_size": block, "accuracy_level": 4}
    for i in range(nodes):
        weights += [numpy_helper.from_array(packed.numpy(), f"B{i}"), numpy_helper.from_array(scale.flatten().numpy(), f"s{i}")]
        products.append(helper.make_node("MatMulNBits", ["x", f"B{i}", f"s{i}"], [f"y{i}"], domain="com.microsoft", **options))
        results.append(helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, ["batch", out]))
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", width])
    graph = helper.make_graph(products, "products", [given], results, weights)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads, settings.inter_op_num_threads = threads, 1
    # Nodes alike must stay apart.
    settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(model.SerializeToString(), settings, providers=["CPUExecutionProvider"])


def _onnx_calls(sessions: Sequence[object], x: Tensor) -> list[Call]:
    given = {"x": x.float().numpy()}
    return [partial(session.run, None, given) for session in sessions]  # type: ignore[attr-defined]


# llama.cpp


def ggml_products(shape: tuple[int, int], threads: int, effort: Effort) -> list[Entry]:
    """ggml's Q4_0, Q4_K, Q8_0 and F16; the 4-bit ones also in the layout that llama.cpp repacks them into."""
    try:
        import gguf
    except ImportError as error:
        raise MissingError("gguf is not installed (python -m pip install gguf)") from error
    try:
        import ggml

        ggml.library()
    except (ImportError, OSError, StopIteration) as error:
        raise MissingError(f"{error} (python -m pip install llama-cpp-python; it is compiled then)") from error
    found = []
    for kind in ggml.TYPES:
        if kind == "Q4_K" and shape[1] % 256:
            continue
        stored = ggml.encoded(random_weight(shape).numpy(), kind)
        number = gguf.GGMLQuantizationType[kind]
        weight = partial(_gguf_dense, stored, number)
        products = max(1, _AT_ONCE // stored.nbytes)
        calls_wanted = max(2, -(-effort.copies(stored.nbytes) // products))
        for repacked in (False, True) if kind.startswith("Q4") and ggml.repacked_type() else (False,):
            copies = ggml.Weights(stored, kind, shape, calls_wanted * products, repacked=repacked)
            calls = partial(_ggml_calls, copies, products, threads)
            name = f"ggml {kind}{', repacked' if repacked else ''}"
            contender = Contender(name, stored.nbytes, calls, products, lambda made: torch.from_numpy(made.last()))
            found.append(entry(contender, shape, weight))
    return found


def _gguf_dense(stored: object, number: object) -> Tensor:
    import gguf

    return torch.from_numpy(gguf.quants.dequantize(stored, number).astype("float32"))


def _ggml_calls(copies: object, products: int, threads: int, x: Tensor) -> list[Call]:
    import ggml

    tensors = copies.tensors  # type: ignore[attr-defined]
    pieces = [tensors[i : i + products] for i in range(0, len(tensors), products)]
    return [ggml.Products(copies, piece, x.numpy(), ggml.backend(threads)) for piece in pieces]


COMPETITORS: dict[str, Callable[[tuple[int, int], int, Effort], list[Entry]]] = {
    "torch int4": torch_int4,
    "ONNX Runtime": onnx_runtime,
    "ggml": ggml_products,
}
