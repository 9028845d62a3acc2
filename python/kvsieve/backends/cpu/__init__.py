"""Rust kernels for tensors on the CPU."""
