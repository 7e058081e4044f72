"""Tiny random models of the real transformers classes, what compression makes of them, and the command line in this process."""

import os
import pickle
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Workers that run side by side (pytest -n) share the cores; torch and the commands that tests start read this.
if (workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))) > 1:
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))
# As `import slimlm` would choose before torch: what a run tells the user must not depend on how busy the machine is.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch
from filelock import FileLock
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    StableLmConfig,
    StableLmForCausalLM,
)

import slimlm
from slimlm.cli.app import main
from slimlm.record import Record
from slimlm.runtime.cpu import bindings, native
from tests.fake_cuda import FakeCuda, install

needs_kernels = pytest.mark.skipif(native.library() is None, reason=f"no CPU kernels: {native.status().reason}")
KERNEL_VARIANTS: list[str] = [] if (library := native.library()) is None else library.slimlm_variants().decode().split()
"""The variants of the CPU kernels that this processor can run, best first."""

VOCABULARY = 256
WIDE = {"vocab_size": VOCABULARY, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA_LIKE = {**WIDE, "intermediate_size": 88, "num_key_value_heads": 2, "max_position_embeddings": 64}
ENDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}

FAMILIES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA_LIKE, **ENDS, attention_bias=True, mlp_bias=True)),
    "llama-tied": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA_LIKE, **ENDS, tie_word_embeddings=True)),
    "mistral-window": lambda: MistralForCausalLM(MistralConfig(**LLAMA_LIKE, **ENDS, sliding_window=16)),
    "qwen2-mixed-attention": lambda: Qwen2ForCausalLM(
        Qwen2Config(
            **LLAMA_LIKE,
            **ENDS,
            use_sliding_window=True,
            sliding_window=16,
            max_window_layers=1,
            layer_types=["full_attention", "sliding_attention"],
        )
    ),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**LLAMA_LIKE, **ENDS, head_dim=16)),
    "opt": lambda: OPTForCausalLM(
        OPTConfig(**WIDE, **ENDS, ffn_dim=96, max_position_embeddings=64, word_embed_proj_dim=48, dropout=0.0)
    ),
    "opt-projected": lambda: OPTForCausalLM(
        OPTConfig(
            **WIDE,
            **ENDS,
            ffn_dim=96,
            max_position_embeddings=64,
            word_embed_proj_dim=24,
            do_layer_norm_before=False,
            dropout=0.0,
        )
    ),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, n_embd=48, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0)
    ),
}
MIXTURES = {
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**LLAMA_LIKE, **ENDS, num_local_experts=3, num_experts_per_tok=2)),
    # Its first block is dense.
    "qwen3-moe": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            **LLAMA_LIKE,
            **ENDS,
            head_dim=16,
            moe_intermediate_size=40,
            num_experts=4,
            num_experts_per_tok=2,
            norm_topk_prob=True,
            mlp_only_layers=[0],
        )
    ),
    # Experts transposed, with biases, and the rows of gate and up in turn.
    "gpt-oss": lambda: GptOssForCausalLM(
        GptOssConfig(
            **LLAMA_LIKE,
            **ENDS,
            head_dim=16,
            num_local_experts=4,
            num_experts_per_tok=2,
            sliding_window=16,
            layer_types=["sliding_attention", "full_attention"],
        )
    ),
}
MORE_FAMILIES = {
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(**LLAMA_LIKE, **ENDS, head_dim=16, query_pre_attn_scalar=16, sliding_window=16)
    ),
    "gemma3": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(
            **LLAMA_LIKE,
            **ENDS,
            head_dim=16,
            query_pre_attn_scalar=16,
            sliding_window=16,
            layer_types=["sliding_attention", "full_attention"],
        )
    ),
    "phi3": lambda: Phi3ForCausalLM(Phi3Config(**LLAMA_LIKE, **ENDS)),
    "gpt-neox": lambda: GPTNeoXForCausalLM(
        GPTNeoXConfig(**WIDE, **ENDS, intermediate_size=96, max_position_embeddings=64, rotary_pct=0.5)
    ),
    "falcon": lambda: FalconForCausalLM(FalconConfig(**WIDE, **ENDS, new_decoder_architecture=False, multi_query=True)),
    "falcon-alibi": lambda: FalconForCausalLM(
        FalconConfig(
            **WIDE,
            **ENDS,
            new_decoder_architecture=False,
            multi_query=False,
            parallel_attn=False,
            alibi=True,
            bias=True,
        )
    ),
    "falcon-new": lambda: FalconForCausalLM(FalconConfig(**WIDE, **ENDS, new_decoder_architecture=True, num_kv_heads=2)),
    "stablelm": lambda: StableLmForCausalLM(
        StableLmConfig(**LLAMA_LIKE, **ENDS, use_parallel_residual=True, qk_layernorm=True, partial_rotary_factor=0.5)
    ),
    **MIXTURES,
}
ALL_FAMILIES = {**FAMILIES, **MORE_FAMILIES}


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte; the byte 0 doubles as the beginning of a sequence."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=alphabet[0], eos_token=alphabet[0])


def random_model(family: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A random model whose logits are far from constant."""
    torch.manual_seed(0)
    model = {**ALL_FAMILIES, **FAMILIES}[family]().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
            elif parameter.ndim > 1:
                parameter.normal_(std=0.15)
            elif not parameter.any():
                # Norms that multiply by one more than their weight.
                parameter.normal_(std=0.1)
    return model.to(dtype)


def save(model: PreTrainedModel, folder: Path) -> Path:
    """A model folder as a user has it."""
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 6000 bytes of made-up text."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    generator = torch.Generator().manual_seed(1)
    words = ["alpha", "beta", "gamma", "delta", "one", "two", "three", "river", "stone", "tree"]
    drawn = torch.randint(len(words), (1200,), generator=generator)
    path.write_text(" ".join(words[i] for i in drawn))
    return path


@pytest.fixture(params=[*sorted(FAMILIES), "gemma2", "mixtral"])
def family(request: pytest.FixtureRequest) -> str:
    """Families in turn, of those with an unusual embedding or head and of mixtures one."""
    return str(request.param)


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama in float16 with its tokenizer."""
    return save(random_model("llama", torch.float16), tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(params=KERNEL_VARIANTS)
def variant(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each variant of the CPU kernels that this processor can run, in use."""
    before = bindings.active_variant()
    bindings.use_variant(request.param)
    yield request.param
    bindings.use_variant(before)


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    """torch.cuda with two fake GPUs."""
    return install(monkeypatch)


@dataclass(frozen=True)
class Checkpoint:
    """A compressed model and its original. Many tests share the folders: a test that changes one copies it first."""

    dense: Path
    out: Path
    record: Record


class Checkpoints:
    """Random models, each compressed once, whichever test and whichever worker asks first."""

    def __init__(self, root: Path, text: Path) -> None:
        self._root = root
        self._text = text
        root.mkdir(exist_ok=True)

    def __call__(self, family: str = "llama", dtype: torch.dtype = torch.float16, recipe: str = "slim") -> Checkpoint:
        """The model of this family and dtype, compressed by a shipped recipe on eight samples of 48 tokens."""
        folder = self._root / f"{family}-{dtype}-{recipe}"
        record = folder / "record.pickle"
        with FileLock(folder.with_suffix(".lock")):
            if not record.is_file():
                save(random_model(family, dtype), folder / "dense")
                options: dict[str, Any] = {"recipe": recipe, "data": str(self._text), "samples": 8, "length": 48}
                made = slimlm.compress(folder / "dense", folder / "out", device="cpu", **options)
                record.write_bytes(pickle.dumps(made.record))
        return Checkpoint(folder / "dense", folder / "out", pickle.loads(record.read_bytes()))


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Checkpoints:
    """Compressed models that all tests share."""
    root = tmp_path_factory.getbasetemp()
    return Checkpoints((root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "checkpoints", text_file)


@pytest.fixture(scope="session")
def packed(checkpoints: Checkpoints) -> Path:
    """The tiny Llama in float16, compressed by `slim`."""
    return checkpoints().out


class Line:
    """Types a command line into this process, and gives what came of it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch = monkeypatch
        self.capsys = capsys

    def __call__(self, *arguments: object) -> tuple[int, str, str]:
        """The exit status, standard output and standard error."""
        self.monkeypatch.setattr(sys, "argv", ["slimlm", *map(str, arguments)])
        self.capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        printed = self.capsys.readouterr()
        return int(ended.value.code or 0), printed.out, printed.err

    def refused(self, *arguments: object) -> str:
        """The message of a refusal: status 2, nothing on standard output, no traceback."""
        status, out, err = self(*arguments)
        assert status == 2
        assert out == ""
        assert "Traceback" not in err
        return " ".join(err.split())


@pytest.fixture
def line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Line:
    """The command line."""
    return Line(monkeypatch, capsys)
