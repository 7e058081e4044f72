"""What a run will need, before it: layers, bits, tokens, memory, disk and time; and whether that is there."""
