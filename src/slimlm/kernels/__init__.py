"""The library of C++ kernels: where it is, the processor that it runs on, and its functions for compression."""
