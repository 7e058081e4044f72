"""Calibration: the samples, what blocks are given on them, and the statistics that methods need."""
