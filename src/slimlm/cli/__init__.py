"""The command line: one file per verb. Nothing here imports torch or transformers before a verb runs."""

from slimlm.cli.app import main

__all__ = ["main"]
