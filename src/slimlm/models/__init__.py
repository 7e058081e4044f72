"""Where a transformers model keeps its blocks and linear layers, and how to open one."""
