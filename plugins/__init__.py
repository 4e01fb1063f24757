"""Hand-written kernels, compiled ahead of time for a compute capability."""
