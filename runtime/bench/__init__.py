"""Measuring an engine offline, and any OpenAI endpoint over HTTP."""
