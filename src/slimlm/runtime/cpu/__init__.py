"""The CPU kernels: their library, their functions and the processor that they run on."""
