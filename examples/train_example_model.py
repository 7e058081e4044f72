"""Train the bundled example model on the text of Python's standard library.

    python examples/train_example_model.py --out examples/pystd-5m --tokens 16e6

A Llama of five million parameters with a byte-level BPE of 1024 tokens; every width is a multiple of 128. The text is
the standard library of the Python that runs it, with its test suite; the evaluation and calibration splits (see
slimlm.data.stdlib) are never trained on. Matrices are trained with Muon, the rest with AdamW; the learning rate warms
up, stays, and falls linearly to zero over the last 40 %. Two cores do about ten million tokens an hour.
"""

import argparse
import math
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from slimlm.data.stdlib import stdlib_documents

VOCABULARY = 1024
CONTEXT = 512


def train_tokenizer(documents: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of the documents, with one special token for begin and end."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
        model_max_length=CONTEXT,
    )


def new_model() -> LlamaForCausalLM:
    """The model with random weights."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config)


def stream(tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> torch.Tensor:
    """The tokens of all documents, one after another, int16 `[tokens]`."""
    rows = tokenizer(documents)["input_ids"]
    return torch.tensor([token for row in rows for token in row], dtype=torch.int16)


@torch.no_grad()
def perplexity(model: LlamaForCausalLM, tokens: torch.Tensor) -> float:
    """The perplexity on tokens `[count]`, cut into windows of the context."""
    windows = tokens[: len(tokens) // CONTEXT * CONTEXT].view(-1, CONTEXT).long()
    total = sum(model(w, labels=w).loss.item() * len(w) for w in windows.split(8))
    return math.exp(total / len(windows))


def rate(progress: float) -> float:
    """Share of the top learning rate at this share of the training."""
    return min(progress / 0.02, 1.0, (1.0 - progress) / 0.4)


def main() -> None:
    """Train the tokenizer and the model, and save both every 200 steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=float, default=16e6)
    parser.add_argument("--batch", type=int, default=16, help="windows of 512 tokens per step")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    documents = list(stdlib_documents("train", with_tests=True))
    tokenizer = train_tokenizer(documents)
    train = stream(tokenizer, documents)
    held_out = stream(tokenizer, list(stdlib_documents("evaluation")))[: 64 * CONTEXT]
    print(f"{len(train) / 1e6:.1f} M tokens of text to train on", flush=True)

    model = new_model()
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    optimizers = [
        torch.optim.Muon(matrices, lr=0.01, weight_decay=0.05, adjust_lr_fn="original"),
        torch.optim.AdamW(others, lr=0.003, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    top = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]

    steps = int(options.tokens) // (options.batch * CONTEXT)
    starts = torch.cat(
        [torch.randperm(len(train) // CONTEXT) for _ in range(1 + steps * options.batch * CONTEXT // len(train))]
    )
    offset = torch.arange(CONTEXT)
    forward = torch.compile(model)
    began = time.time()
    for step in range(steps):
        for optimizer, rates in zip(optimizers, top, strict=True):
            for group, lr in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = lr * rate(step / steps)
        rows = starts[step * options.batch : (step + 1) * options.batch] * CONTEXT
        batch = train[rows[:, None] + offset].long()
        with torch.autocast("cpu", torch.bfloat16):
            logits = forward(batch).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if step % 20 == 0:
            speed = (step + 1) * options.batch * CONTEXT / (time.time() - began)
            print(f"step {step}/{steps} loss {loss.item():.3f} {speed:.0f} tokens/s", flush=True)
        if step % 200 == 199 or step == steps - 1:
            print(f"step {step} held-out perplexity {perplexity(model, held_out):.3f}", flush=True)
            save(model, tokenizer, options.out)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write model, in float16, and tokenizer to a folder."""
    half = new_model()
    half.load_state_dict(model.state_dict())
    half.to(torch.float16).save_pretrained(out)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    main()
