"""Benchmarks: each prints a table, and as its last line one line of JSON: what is required and what was measured."""
