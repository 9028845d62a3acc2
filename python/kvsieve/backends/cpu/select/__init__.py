"""Selection rules of the CPU backend, one a file: each makes the Rust core's implementation of itself."""
