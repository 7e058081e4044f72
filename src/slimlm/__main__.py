"""`python -m slimlm`, which launchers such as torchrun need."""

from slimlm.cli import main

main()
