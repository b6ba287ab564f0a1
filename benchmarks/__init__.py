"""Benchmarks: ratios against peers and limits."""
