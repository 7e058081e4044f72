"""Opening a compressed model and writing text with it."""
