"""Tuners, one in each file; its name is the method's."""
