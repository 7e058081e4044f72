"""Dense models: opened, read lazily, and taken apart into blocks and linear layers."""
