"""Packaging: the `kernels` folder is installed as `llm2vec_fast.kernels`, never as a top-level `kernels`."""

from setuptools import find_packages, setup

PRODUCT = find_packages(include=["llm2vec_fast", "llm2vec_fast.*"])
KERNELS = ["llm2vec_fast.kernels", *(f"llm2vec_fast.kernels.{name}" for name in find_packages("kernels"))]

setup(
    name="llm2vec-fast",
    version="0.1.0",
    packages=PRODUCT + KERNELS,
    package_dir={"llm2vec_fast": "llm2vec_fast", "llm2vec_fast.kernels": "kernels"},
    python_requires=">=3.10",
    install_requires=["torch>=2.8", "triton>=3.6; platform_system == 'Linux'", "transformers>=5.2", "peft>=0.18"],
    entry_points={"console_scripts": ["llm2vec-fast=llm2vec_fast.cli:main"]},
)
