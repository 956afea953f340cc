"""What `benchmarks/gpu_suite.py` runs on a GPU: one small file a section."""

from .place import make_importable

make_importable()
