"""One compression run: its configuration, one block at a time, what is written at the end, and how it is resumed."""
