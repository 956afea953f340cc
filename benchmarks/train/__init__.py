"""A training step on a real model, ours against stock transformers and peft: python -m benchmarks.train."""
