"""Packaging: the `kernels` folder is installed as `llm2vec_fast.kernels`, never as a top-level `kernels`."""

from pathlib import Path

from setuptools import find_packages, setup

PRODUCT = find_packages(include=["llm2vec_fast", "llm2vec_fast.*"])
KERNELS = ["llm2vec_fast.kernels", *(f"llm2vec_fast.kernels.{name}" for name in find_packages("kernels"))]

REQUIRED = [
    "torch>=2.10",
    "triton>=3.6; platform_system == 'Linux'",
    "transformers>=5.2",
    "peft>=0.18",
    "filelock>=3.12",
    "huggingface_hub>=1.0",
    "numpy>=1.26",
    "psutil>=6",
    "pyarrow>=17",
    "rich>=13.7",
    "safetensors>=0.5",
    "tokenizers>=0.22",
    "tqdm>=4.66",
    "typer>=0.19",
]
GGUF = ["gguf>=0.10"]
TRAIN = ["accelerate>=1.10", "datasets>=4", "pyyaml>=6"]
EVAL = ["scipy>=1.11", "seqeval>=1.2"]
REPRODUCE = [*TRAIN, *EVAL, "matplotlib>=3.8", "mwparserfromhell>=0.6.6"]
BENCH = ["pytest-benchmark>=5", "sentence-transformers>=6.2"]
# ruff is held to one release series: each series formats a little differently.
TEST = [
    *GGUF,
    *REPRODUCE,
    "hypothesis>=6.100",
    "pytest>=8.4",
    "pytest-benchmark>=5",
    "pytest-timeout>=2.3",
    "pytest-xdist>=3.6",
    "ruff>=0.17,<0.18",
    "setuptools>=77",
]

setup(
    name="llm2vec-fast",
    version="0.1.0",  # the only place; code that wants it asks importlib.metadata
    description="Turn any decoder-only language model into a fast text encoder",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="the llm2vec-fast authors",
    license_expression="MIT",
    license_files=["LICENSE"],
    keywords=["embeddings", "sentence embeddings", "LLM2Vec", "transformers", "Triton"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Environment :: Console",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Text Processing :: Linguistic",
        "Typing :: Typed",
    ],
    packages=PRODUCT + KERNELS,
    package_dir={"llm2vec_fast": "llm2vec_fast", "llm2vec_fast.kernels": "kernels"},
    package_data={"llm2vec_fast": ["py.typed", "training/configs/*/*.yaml", "adapters/*/*"]},
    python_requires=">=3.10",
    install_requires=REQUIRED,
    extras_require={
        "gguf": GGUF,
        "train": TRAIN,
        "eval": EVAL,
        "reproduce": REPRODUCE,
        "flash-attn": ["flash-attn>=2.7; platform_system == 'Linux'"],
        "bench": BENCH,
        "test": TEST,
        "dev": sorted({*BENCH, *TEST}),
    },
    entry_points={"console_scripts": ["llm2vec-fast=llm2vec_fast.cli:main"]},
)
