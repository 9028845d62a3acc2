"""CUDA kernels for tensors on an NVIDIA GPU, loaded with CuPy."""
