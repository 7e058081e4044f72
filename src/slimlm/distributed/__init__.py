"""Several processes that work on one run, on one machine or on many: what passes between them, and who is alive."""
