"""Runs GPU kernels without a GPU: Triton's sources, the PTX compiled from them, and CUDA C++ (see each module)."""
