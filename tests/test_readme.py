"""What the README shows works as it stands."""

import re
from pathlib import Path

import pytest

from benchmarks.fetch import smollm2

ROOT = Path(__file__).parents[1]
MODELS = {
    "path/or/name/of/a/decoder": ROOT / "tests" / "data" / "reference" / "llama",
    "path/or/name/of/an/adapter": ROOT / "tests" / "data" / "reference" / "llama-lora",
}
REAL_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


def python_examples() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S | re.M)


@pytest.mark.parametrize("number", range(len(python_examples())))
def test_python_example_runs(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    example = python_examples()[number]
    for placeholder, folder in MODELS.items():
        example = example.replace(placeholder, folder.as_posix())
    if REAL_MODEL in example:
        try:
            example = example.replace(REAL_MODEL, smollm2.fetch().as_posix())
        except smollm2.FetchError as error:
            pytest.skip(str(error))
    names: dict = {}
    exec(compile(example, f"README.md, example {number + 1}", "exec"), names)
    if "scores" in names:
        assert names["scores"].shape == (1, 2)
        assert (tmp_path / "my-encoder" / "model.safetensors").exists()


def test_every_path_it_links_to_exists() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / target).exists(), target
