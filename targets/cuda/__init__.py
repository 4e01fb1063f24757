"""The NVIDIA backend: a compiler that needs no GPU, and an executor that needs neither torch nor Triton."""
