"""Selection rules of the CUDA backend, one a file: the stages of each, and the launches that compute them."""
