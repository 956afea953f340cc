"""Benchmarks, and the real model and texts they and the demo run on. Not part of the installed package."""
