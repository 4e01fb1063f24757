"""What the kernels compute, in numpy and float32: the tests' yardstick, written without looking at how they do it."""
