"""SLiM's fine-tuning as the paper has it: adapters alone, on text.

Mozaffari, Yazdanbakhsh, Dehnavi: SLiM: One-shot Quantization and Sparsity with Low-rank Approximation for LLM Weight
Compression. arXiv 2410.09615, section 3.4 and appendices A, K and T: Adafactor, a linear schedule, the usual rate of the
Hugging Face Trainer (5e-5, gradients clipped to 1), batches of 64 windows of 1,024 tokens, 300,000 tokens.

Departures: tokens are counted as tokens, so that 300,000 of them are four steps, where the authors' code reads 30,000 windows;
embeddings, norms and lm_head do not move, which that code trains as well; values are float32 and not bfloat16.
"""

from slimlm.core.parts.trainable import Trains
from slimlm.tuning.tuner import Loss, Tuner

TUNER = Tuner(
    summary="adapters alone, on the text (SLiM, arXiv 2410.09615, the paper's settings)",
    trains=Trains.ADAPTERS,
    loss=Loss(next_token=1.0),
    optimizer="adafactor",
    rate=5e-5,
    relative=False,
    schedule="linear",
    clip=1.0,
    batch=64,
    length=1024,
)
