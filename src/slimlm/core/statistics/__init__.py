"""Statistics of a linear layer's inputs: one file each, of one class.

The folder is the list (`slimlm.core.registry.statistics`).

Statistics are in `core` because methods, which import nothing but `core`, name their classes in `needs`. Calibration adds
batches to those that are needed, and names none of them.
"""
