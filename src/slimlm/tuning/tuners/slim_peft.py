"""SLiM's fine-tuning, with our settings: adapters alone.

Mozaffari, Yazdanbakhsh, Dehnavi: SLiM: One-shot Quantization and Sparsity with Low-rank Approximation for LLM Weight
Compression. arXiv 2410.09615, section 3.4: base and masks are frozen, the adapters are trained, rounded ones through the
straight-through estimator, by Adafactor with rates that fall linearly.

Departures: the loss is the KL divergence from the original and not the next token's, a step takes 4,096 tokens and not 65,536
(300,000 tokens are then 73 steps and not 4), and rates are relative to a tensor's size. The authors' code trains embeddings,
norms and lm_head as well, and reads a hundred times the tokens that the paper states; here neither is so. The paper's settings
are in slim_peft_paper.py.
"""

from slimlm.core.parts.trainable import Trains
from slimlm.tuning.tuner import Loss, Tuner

TUNER = Tuner(
    summary="adapters alone, towards the original's predictions (SLiM, arXiv 2410.09615, our settings)",
    trains=Trains.ADAPTERS,
    loss=Loss(divergence=1.0),
    optimizer="adafactor",
    rate=0.02,
    schedule="linear",
)
