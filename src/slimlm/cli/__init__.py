"""The command line: one file per verb."""

from slimlm.cli.app import main

__all__ = ["main"]
