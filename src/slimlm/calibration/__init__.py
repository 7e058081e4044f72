"""Calibration: the samples, the blocks' inputs on them, and the statistics that steps need.

samples.py           the calibration samples: drawn from text, or written by the model
capture.py           the inputs of blocks, and running one block on them
stages.py            which layers of a block share an input, in the order in which inputs are computed
measurement.py       the needed statistics of a block's layers, over all batches and ranks
output_residuals.py  the difference of the original block's outputs and a block's own, for statistics of it
"""
