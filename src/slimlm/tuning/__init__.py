"""Gradient descent on what compression left continuous."""
