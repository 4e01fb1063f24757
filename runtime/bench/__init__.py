"""Benchmarks: latency, throughput and serving load."""
