"""Benchmarks, run from a checkout: `python -m benchmarks.retrieval`, `.sts`, `.demo`."""
