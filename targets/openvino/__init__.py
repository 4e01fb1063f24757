"""The CPU backend: OpenVINO with PagedAttention."""
