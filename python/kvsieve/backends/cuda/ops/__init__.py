"""The CUDA operations, one a file: each declares its arguments once, see :mod:`kvsieve.backends.cuda.ops.declare`."""
