"""Text by name (files, the hub, Python's standard library), and windows of tokens cut from it."""
