"""Statistics of a linear layer's inputs: one file each, of one class.

The folder is the list (`slimlm.core.registry.statistics`).

A statistic stands in `core` because methods, which know nothing but `core`, name its class in their `needs`. Calibration feeds
the needed ones and knows none by name.
"""
