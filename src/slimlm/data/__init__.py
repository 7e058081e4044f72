"""Text by name: documents from files, the hub, Python's standard library or the model itself; token windows."""
