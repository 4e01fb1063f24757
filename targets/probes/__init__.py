"""Readers of single facts. Each takes the root of a file system, so that a recorded machine can stand in."""
