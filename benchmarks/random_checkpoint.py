"""Random layers and models in slimlm's own formats, already packed: nothing is compressed, so they cost seconds.

    python benchmarks/random_checkpoint.py OUT --size 1b          # or 110m, tiny; --embedding-bits 16: bfloat16 there

They say how fast a model of that size is and nothing else.
"""

import argparse
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerFast

from llama_shape import LlamaShape
from slimlm.core import grid
from slimlm.core.parts.base import Part
from slimlm.core.parts.codebook import Codebook
from slimlm.core.parts.elementwise import Elementwise
from slimlm.core.parts.low_rank import LowRank
from slimlm.core.parts.pack import EmbeddingEntry, LayerEntry, Parts
from slimlm.core.parts.pruned import Pruned
from slimlm.core.parts.uniform import Uniform
from slimlm.models.structure import blocks_of, linears_of
from slimlm.recipe import AS_STORED, check_embedding_bits
from slimlm.runtime.embedding import CompressedEmbedding
from slimlm.runtime.linear import CompressedLinear
from slimlm.storage import checkpoint
from slimlm.storage.entries import Description

_TWO_OF_FOUR = torch.tensor(
    [[1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 1], [0, 1, 1, 0], [0, 1, 0, 1], [0, 0, 1, 1]], dtype=torch.bool
)
# Such that outputs are about as large as inputs in every size here.
_BASE, _ADAPTER = 0.5, 0.1


SIZES = {
    "tiny": LlamaShape(64, 128, 2, 4, 2, vocabulary=256, context=256),
    "110m": LlamaShape(768, 2048, 12, 12, 12),
    "1b": LlamaShape(2048, 5632, 22, 32, 4),
}
"""The second and third have about 134 million and 1.1 billion parameters, embeddings and head included."""


# Layers


@dataclass(frozen=True)
class Kind:
    """How a random layer is stored; 4 bits throughout."""

    group_size: grid.GroupSize
    sparse: bool = True
    table: bool = False
    rank: float = 0.0
    """of the adapter, as a share of the smaller side; 0: none"""

    def parts(self, shape: tuple[int, int], generator: torch.Generator) -> Parts:
        """Random parts of this kind for a weight `[out, in]`."""
        base: Elementwise = (codebook if self.table else uniform)(shape, self.group_size, _BASE, generator)
        first: Part = Pruned(base, two_of_four(shape, generator), "2:4") if self.sparse else base
        rank = int(self.rank * min(shape))
        return Parts(first, adapter=low_rank(shape, rank, generator) if rank else None)


def uniform(shape: tuple[int, int], group_size: grid.GroupSize, size: float, generator: torch.Generator) -> Uniform:
    """4-bit codes on the even grid; the weights' root mean square is about `size` over the root of the inputs."""
    codes = torch.randint(-7, 8, shape, generator=generator, dtype=torch.int8)
    return Uniform(codes, _scale(shape, group_size, size / 4.3, generator), 4, group_size)


def codebook(shape: tuple[int, int], group_size: grid.GroupSize, size: float, generator: torch.Generator) -> Codebook:
    """4-bit indices into a table of uneven levels."""
    index = torch.randint(0, 16, shape, generator=generator, dtype=torch.uint8)
    levels = torch.linspace(-1.5, 1.5, 16).pow(3)
    return Codebook(index, levels.half(), _scale(shape, group_size, size / 1.4, generator), 4, group_size)


def tokens_by_width(shape: tuple[int, int], bits: int, generator: torch.Generator) -> Uniform:
    """An embedding or a head as recipe `best-24` stores it; the weights' root mean square is about 0.02."""
    top = grid.top_code(bits)
    codes = torch.randint(-top, top + 1, shape, generator=generator, dtype=torch.int8)
    return Uniform(codes, _scale(shape, 32, 0.02 * 3**0.5 / top * shape[1] ** 0.5, generator), bits, 32)


def _scale(shape: tuple[int, int], group_size: grid.GroupSize, size: float, generator: torch.Generator) -> Tensor:
    spread = 0.75 + 0.5 * torch.rand(grid.scale_shape(shape, group_size), generator=generator)
    return (spread * size / shape[1] ** 0.5).half()


def two_of_four(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """A random mask, bool `[out, in]`."""
    rows = torch.randint(len(_TWO_OF_FOUR), (shape[0], shape[1] // 4), generator=generator)
    return _TWO_OF_FOUR[rows].reshape(shape)


def low_rank(shape: tuple[int, int], rank: int, generator: torch.Generator) -> LowRank:
    """An adapter of 4-bit factors in groups of 128."""
    left, right = (uniform((rank, side), 128, _ADAPTER, generator) for side in shape)
    return LowRank(left, right)


# Models


def best_like(name: str) -> Kind:
    """What recipe `best-24` may make of a layer: 2:4 in groups of 32, an adapter, and a table in some layers, here in most."""
    return Kind(32, table=not name.endswith(("o_proj", "down_proj")), rank=0.1)


def write(out: Path, size: LlamaShape, *, seed: int = 0, embedding_bits: int = 8) -> dict[str, Any]:
    """Write a packed checkpoint of random parts to a new folder; gives weights and bits per weight of the blocks' layers.

    embedding_bits: of embedding and head, 4 to 8; 16: both in bfloat16.
    """
    check_embedding_bits(embedding_bits, "embedding_bits")
    generator = torch.Generator().manual_seed(seed)
    config, model = size.config(), size.meta_model()
    tensors: dict[str, Tensor] = {}
    layers: dict[str, LayerEntry] = {}
    for block, module in blocks_of(model).items():
        for name, linear in linears_of(module).items():
            full, shape = f"{block}.{name}", (linear.out_features, linear.in_features)
            layer = CompressedLinear.from_parts(best_like(name).parts(shape, generator), None)
            layers[full] = layer.describe()
            tensors |= {f"{full}.{key}": value for key, value in layer.packed().items()}
    bits = sum(8 * tensor.numel() * tensor.element_size() for tensor in tensors.values())
    weights = sum(entry.shape[0] * entry.shape[1] for entry in layers.values())
    embeddings: dict[str, EmbeddingEntry] = {}
    if embedding_bits != AS_STORED:
        shape = (size.vocabulary, size.width)
        embedding = CompressedEmbedding.from_part(tokens_by_width(shape, embedding_bits, generator), torch.float32)
        head = CompressedLinear.from_parts(Parts(tokens_by_width(shape, embedding_bits, generator)), None)
        embeddings["model.embed_tokens"], layers["lm_head"] = embedding.describe(), head.describe()
        tensors |= {f"model.embed_tokens.{key}": value for key, value in embedding.packed().items()}
        tensors |= {f"lm_head.{key}": value for key, value in head.packed().items()}
    for name, parameter in model.named_parameters():
        if name.removesuffix(".weight") not in layers.keys() | embeddings.keys():
            tensors[name] = outside(name, parameter.shape, generator).bfloat16()
    figures = {"weights": weights, "bits_per_weight": bits / weights}
    with checkpoint.written_beside(out) as folder:
        checkpoint.write_weights(folder, tensors)
        checkpoint.write_config(folder, config.to_dict(), Description(layers, embeddings))
        GenerationConfig(bos_token_id=0, eos_token_id=0, pad_token_id=0).save_pretrained(folder)
        tokenizer().save_pretrained(folder)
        checkpoint.write_record(folder, {"made_up": "random parts; no recipe, no figures", **figures})
    return figures


def outside(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """A random tensor for what lies outside the compressed layers: ones for norms, small numbers for embeddings and head."""
    return torch.ones(shape) if "norm" in name else 0.02 * torch.randn(shape, generator=generator)


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, so that the folder can be used like any model's."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    found = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    found.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=found, bos_token=alphabet[0], eos_token=alphabet[0])


def main() -> None:
    """Write one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--size", choices=SIZES, default="1b")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--embedding-bits", type=int, default=8, help="of embedding and head: 4 to 8, or 16 for bfloat16")
    parser.add_argument("--replace", action="store_true", help="remove what is there")
    arguments = parser.parse_args()
    if arguments.replace:
        shutil.rmtree(arguments.out, ignore_errors=True)
    checkpoint.refuse_occupied(arguments.out)
    began = time.monotonic()
    figures = write(arguments.out, SIZES[arguments.size], seed=arguments.seed, embedding_bits=arguments.embedding_bits)
    seconds = time.monotonic() - began
    print(f"{figures['weights']} weights in the blocks, {figures['bits_per_weight']:.2f} bits each, in {seconds:.0f} s")


if __name__ == "__main__":
    main()
