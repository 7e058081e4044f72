"""PEQA: scales alone.

Kim, Lee, Kim, Park, Yoo, Kwon, Lee: Memory-Efficient Fine-Tuning of Compressed Large Language Models via sub-4-bit Integer
Quantization. arXiv 2305.14152, equation 2: W = (s0 + ds) * (W_int - z), and ds is trained.

Departures: the loss is the KL divergence from the original, where the paper trains on a task's text; scales are trained as
factors of their first values, so that none changes its sign; scales of an adapter's factors are trained, too.
"""

from slimlm.core.parts.trainable import Trains
from slimlm.tuning.tuner import Loss, Tuner

TUNER = Tuner(
    summary="scales alone, towards the original's predictions (PEQA, arXiv 2305.14152)",
    trains=Trains.SCALES,
    loss=Loss(divergence=1.0),
    rate=0.004,
)
