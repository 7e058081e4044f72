"""Each reader gives what the program that defines the format gives; packers are written here where that one needs a GPU."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from slimlm.core.errors import ModelError
from slimlm.models import awq, compressed_tensors, fp8, gptq, mxfp4
from slimlm.models.codes import Codes, Decoded

Tensors = dict[str, Tensor]


def whole(found: Decoded, name: str) -> Tensor:
    weight = found.weights[name]
    made = torch.cat(list(weight.make()))
    assert made.shape == weight.shape and made.dtype == torch.float32
    return made


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def codes_of(bits: int, *shape: int) -> Tensor:
    return torch.randint(2**bits, shape, generator=torch.Generator().manual_seed(bits), dtype=torch.int64)


def stream(codes: Tensor, bits: int) -> Tensor:
    """Whole numbers `[rows, count]` as int32 words, one bit after another: the published layout, in the plainest way."""
    rows, count = codes.shape
    words = torch.zeros(rows, -(-count * bits // 32), dtype=torch.int64)
    for i in range(count):
        for b in range(bits):
            words[:, (i * bits + b) // 32] |= ((codes[:, i] >> b) & 1) << ((i * bits + b) % 32)
    return words.where(words < 2**31, words - 2**32).int()


def fp8_layer(rows: int = 6, columns: int = 8) -> Tensors:
    return {
        "l.weight": drawn(rows, columns).to(torch.float8_e4m3fn),
        "l.weight_scale_inv": drawn(rows // 2, columns // 4, seed=1).abs(),
    }


FP8 = {"quant_method": "fp8", "weight_block_size": [2, 4]}


def test_float8_with_blocks_is_what_transformers_makes_of_it() -> None:
    tensors = fp8_layer()
    expected = Fp8Dequantize(None)._dequantize_one(tensors["l.weight"], tensors["l.weight_scale_inv"], torch.float32)
    assert torch.equal(whole(fp8.read(Codes("m", FP8, tensors)), "l.weight"), expected)


def test_the_last_block_may_be_cut() -> None:
    values, scales = torch.ones(3, 5).to(torch.float8_e4m3fn), torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    found = whole(fp8.read(Codes("m", FP8, {"l.weight": values, "l.weight_scale_inv": scales})), "l.weight")
    assert found.tolist() == [[1, 1, 1, 1, 2], [1, 1, 1, 1, 2], [3, 3, 3, 3, 4]]


def test_scales_that_are_exponents_are_powers_of_two() -> None:
    tensors = {"l.weight": torch.ones(2, 4).to(torch.float8_e4m3fn), "l.weight_scale_inv": torch.tensor([[130]]).byte()}
    assert whole(fp8.read(Codes("m", FP8, tensors)), "l.weight").unique().tolist() == [8]


def test_mxfp4_is_what_transformers_makes_of_it() -> None:
    blocks, scales = codes_of(8, 2, 6, 3, 16).byte(), (codes_of(4, 2, 6, 3) + 118).byte()
    tensors = {"e.gate_up_proj_blocks": blocks, "e.gate_up_proj_scales": scales}
    found = whole(mxfp4.read(Codes("m", {"quant_method": "mxfp4"}, tensors)), "e.gate_up_proj")
    assert torch.equal(found, convert_moe_packed_tensors(blocks, scales, dtype=torch.float32))


def gptq_layer(bits: int, offset: int, inputs: int = 32, out: int = 32, size: int = 16) -> tuple[Tensors, Tensor]:
    """A layer in GPTQ's layout, whose own packer is not used since it comes with kernels for GPUs, and its weight."""
    groups = inputs // size
    codes, zeros, scales = codes_of(bits, inputs, out), codes_of(bits, groups, out).clamp(min=1), drawn(groups, out).half()
    index = torch.arange(inputs).flip(0) // size
    weight = ((codes - zeros[index]) * scales[index].float()).T
    tensors = {
        "l.qweight": stream(codes.T, bits).T.contiguous(),
        "l.qzeros": stream(zeros - offset, bits),
        "l.scales": scales,
        "l.g_idx": index.int(),
    }
    return tensors, weight


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("form", "offset"), [("gptq", 1), ("gptq_v2", 0)])
def test_gptq_is_read_with_its_order_and_its_zero_points(bits: int, form: str, offset: int) -> None:
    tensors, weight = gptq_layer(bits, offset)
    about = {"bits": bits, "group_size": 16, "checkpoint_format": form}
    assert torch.equal(whole(gptq.read(Codes("m", about, tensors)), "l.weight"), weight)


def test_awq_is_read_in_its_interleaved_order() -> None:
    codes, zeros, scales = codes_of(4, 8, 16), codes_of(4, 2, 16), drawn(2, 16).half()
    order = [0, 2, 4, 6, 1, 3, 5, 7]

    def packed(values: Tensor) -> Tensor:
        return stream(values.unflatten(1, (-1, 8))[:, :, order].flatten(1), 4)

    tensors = {"l.qweight": packed(codes), "l.qzeros": packed(zeros), "l.scales": scales}
    index = torch.arange(8) // 4
    expected = ((codes - zeros[index]) * scales[index].float()).T
    found = whole(awq.read(Codes("m", {"bits": 4, "group_size": 4, "version": "gemm"}, tensors)), "l.weight")
    assert torch.equal(found, expected)


def ct_config(form: str, **weights: Any) -> dict[str, Any]:
    return {"format": form, "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}}


SCHEMES: dict[str, dict[str, Any]] = {
    **{
        f"int{bits} by groups": {"num_bits": bits, "type": "int", "strategy": "group", "group_size": 16}
        for bits in (2, 3, 4, 8)
    },
    "asymmetric": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 16, "symmetric": False},
    "asymmetric by rows": {"num_bits": 4, "type": "int", "strategy": "channel", "symmetric": False},
    "float8 by rows": {"num_bits": 8, "type": "float", "strategy": "channel"},
    "float8": {"num_bits": 8, "type": "float", "strategy": "tensor"},
    "float8 by blocks": {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [4, 16]},
    "int8 as it is": {"num_bits": 8, "type": "int", "strategy": "channel"},
    "MXFP8": {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 32, "scale_dtype": torch.uint8},
}


def compressed(weight: Tensor, name: str) -> tuple[Tensors, Tensor, str]:
    """What compressed-tensors stores of a weight under one of `SCHEMES`, what it makes of that, and its format."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**SCHEMES[name]))
    args, (rows, columns) = scheme.weights, weight.shape
    tiles = {"tensor": (rows, columns), "channel": (1, columns), "group": (1, args.group_size), "block": (4, 16)}
    tile = tiles[SCHEMES[name]["strategy"]]
    cut = weight.unflatten(1, (-1, tile[1])).unflatten(0, (-1, tile[0]))
    scale, zero = calculate_qparams(cut.amin((1, 3)), cut.amax((1, 3)), args)
    forms = {"int8 as it is": "int-quantized", "MXFP8": "mxfp8-quantized"}
    form = forms.get(name, "float-quantized" if args.type == "float" else "pack-quantized")
    compressor = BaseCompressor.get_value_from_registry(form)
    stored = compressor.compress({"weight": weight, "weight_scale": scale, "weight_zero_point": zero}, scheme)
    made = compressor.decompress(dict(stored), scheme)["weight"].float()
    return {key: tensor for key, tensor in stored.items() if tensor is not None}, made, form


@pytest.mark.parametrize("name", SCHEMES)
def test_compressed_tensors_is_what_its_own_program_makes_of_it(name: str) -> None:
    pytest.importorskip("compressed_tensors", reason="the program that writes the format is an extra of the tests")
    stored, expected, form = compressed(drawn(12, 64), name)
    tensors = {f"l.{key}": tensor for key, tensor in stored.items()}
    found = compressed_tensors.read(Codes("m", ct_config(form, **SCHEMES[name]), tensors))
    assert torch.equal(whole(found, "l.weight"), expected)


def test_each_layer_of_a_mixture_is_read_in_its_own_format() -> None:
    pytest.importorskip("compressed_tensors", reason="the program that writes the format is an extra of the tests")
    layers = {"a.q_proj": "int4 by groups", "a.o_proj": "float8 by rows", "a.up_proj": "MXFP8"}
    tensors, expected, groups = {}, {}, {}
    for seed, (layer, name) in enumerate(layers.items()):
        stored, expected[layer], form = compressed(drawn(12, 64, seed=seed), name)
        tensors |= {f"{layer}.{key}": tensor for key, tensor in stored.items()}
        targets = ["Linear"] if layer == "a.up_proj" else [f"re:.*{layer.removeprefix('a.')}"]
        groups[name] = {"targets": targets, "weights": SCHEMES[name], "format": form}
    found = compressed_tensors.read(Codes("m", {"format": "mixed-precision", "config_groups": groups}, tensors))
    assert found.weights.keys() == {f"{layer}.weight" for layer in layers}
    for layer in layers:
        assert torch.equal(whole(found, f"{layer}.weight"), expected[layer]), layer
    assert found.form == "compressed-tensors, int4, groups of 16; float8, a scale for each channel; float8, groups of 32"


GPTQ4 = {"bits": 4, "group_size": 16}
REFUSED: dict[str, tuple[Any, dict[str, Any], Tensors, str]] = {
    "no scales": (fp8, FP8, {"l.weight": fp8_layer()["l.weight"]}, r"codes l\.weight and no l\.weight_scale_inv"),
    "scales of other blocks": (fp8, {"weight_block_size": [128, 128]}, fp8_layer(), r"\[3, 2\].* it is \[1, 1\]"),
    "blocks that are none": (fp8, {"weight_block_size": [0, 4]}, fp8_layer(), "two whole numbers above 0"),
    "nothing in float8": (fp8, FP8, {"l.weight": torch.ones(2, 2)}, "hold no tensor in float8"),
    "MXFP4 without scales": (mxfp4, {}, {"e.w_blocks": torch.zeros(1, 2, 1, 16).byte()}, r"no e\.w_scales"),
    "another format of GPTQ": (gptq, {**GPTQ4, "checkpoint_format": "marlin"}, gptq_layer(4, 1)[0], "'marlin'"),
    "5 bits": (gptq, {**GPTQ4, "bits": 5}, gptq_layer(4, 1)[0], "bits = 5; slimlm reads 2, 3, 4, 8"),
    "other bits than stored": (gptq, {**GPTQ4, "bits": 8}, gptq_layer(4, 1)[0], r"l\.qweight has the shape"),
    "other groups than stored": (gptq, {**GPTQ4, "group_size": 8}, gptq_layer(4, 1)[0], r"l\.scales has the shape \[2, 32\]"),
    "AWQ for vectors": (awq, {"bits": 4, "version": "gemv"}, {}, "'gemv'; slimlm reads gemm"),
    "nvfp4": (compressed_tensors, ct_config("nvfp4-pack-quantized"), {}, "'nvfp4-pack-quantized'"),
    "marlin-24": (compressed_tensors, ct_config("marlin-24"), {}, "'marlin-24'"),
    "2:4": (
        compressed_tensors,
        {"config_groups": {}, "sparsity_config": {"format": "sparse-24-bitmask"}},
        {},
        "sparsity_config",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_in_words_that_say_what_would_work(name: str) -> None:
    reader, about, tensors, words = REFUSED[name]
    with pytest.raises(ModelError, match=rf"{words}.*What works: the original model"):
        reader.read(Codes("m", about, tensors))


def test_a_group_beyond_the_last_is_refused() -> None:
    tensors, _ = gptq_layer(4, 1)
    tensors["l.g_idx"][3] = 2
    with pytest.raises(ModelError, match=r"l\.g_idx names a group beyond the 2"):
        gptq.read(Codes("m", GPTQ4, tensors))
