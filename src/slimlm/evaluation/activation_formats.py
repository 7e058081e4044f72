"""The names of the 8-bit activation formats, in a module of their own so that naming them imports no torch."""

from typing import Literal

ActivationFormat = Literal["fp8", "int8-token", "int8-group"]
"""float8 E4M3 with one scale per tensor; int8 with one scale per token; int8 with one scale per 128 inputs of a token."""
