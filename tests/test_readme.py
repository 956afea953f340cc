"""What the README and the training guide show works as it stands."""

import re
from pathlib import Path

import pytest

from benchmarks.fetch import smollm2

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "docs/training.md")
MODELS = {
    "path/or/name/of/a/decoder": ROOT / "tests" / "data" / "reference" / "llama",
    "path/or/name/of/an/adapter": ROOT / "tests" / "data" / "reference" / "llama-lora",
}
REAL_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


def python_examples() -> list[tuple[str, str]]:
    """Each with where it stands."""
    return [
        (f"{page}, example {number}", example)
        for page in PAGES
        for number, example in enumerate(
            re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.S | re.M), 1
        )
    ]


@pytest.mark.parametrize(("place", "example"), python_examples(), ids=[place for place, _ in python_examples()])
def test_python_example_runs(place: str, example: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("sentences.txt").write_text("".join(f"a sentence of number {i}\n" for i in range(8)))
    for placeholder, folder in MODELS.items():
        example = example.replace(placeholder, folder.as_posix())
    if REAL_MODEL in example:
        try:
            example = example.replace(REAL_MODEL, smollm2.fetch().as_posix())
        except smollm2.FetchError as error:
            pytest.skip(str(error))
    names: dict = {}
    exec(compile(example, place, "exec"), names)
    if "scores" in names:
        assert names["scores"].shape == (1, 2)
        assert (tmp_path / "my-encoder" / "model.safetensors").exists()


@pytest.mark.parametrize("page", PAGES)
def test_every_path_it_links_to_exists(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / page).parent.joinpath(target).exists(), target
