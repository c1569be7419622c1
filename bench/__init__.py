"""Benchmarks: speed and memory beside public peers, and what the method does on the tiny world."""
