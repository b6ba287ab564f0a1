"""Experiments: one module per paper, readable from top to bottom."""
