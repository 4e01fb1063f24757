"""What happens per request: server, scheduler, KV cache, sampling parameters."""
