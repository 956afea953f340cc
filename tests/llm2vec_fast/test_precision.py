"""dtype "auto", by device and by what the processor can do."""

from __future__ import annotations

import pytest
import torch

from llm2vec_fast.precision import choose_dtype, cpu_bfloat16_features


def pretend(monkeypatch: pytest.MonkeyPatch, avx512_bf16: bool, amx: bool) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)


@pytest.mark.parametrize(("avx512_bf16", "amx"), [(True, False), (False, True), (True, True)])
def test_a_cpu_with_bfloat16_instructions_uses_them(monkeypatch, avx512_bf16, amx):
    pretend(monkeypatch, avx512_bf16, amx)
    choice = choose_dtype("auto", "cpu")
    assert choice.dtype == torch.bfloat16
    assert ("AVX512-BF16" in choice.reason, "AMX" in choice.reason) == (avx512_bf16, amx)


def test_a_cpu_without_them_does_not(monkeypatch):
    pretend(monkeypatch, False, False)
    choice = choose_dtype(None, torch.device("cpu"))
    assert choice.dtype == torch.float32
    assert "neither AVX512-BF16 nor AMX" in choice.reason


def test_a_pytorch_without_the_probes_is_taken_for_a_cpu_without(monkeypatch):
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported", raising=False)
    monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported", raising=False)
    assert cpu_bfloat16_features() == []


def test_other_devices():
    assert choose_dtype("auto", "mps").dtype == torch.float32
    assert choose_dtype("auto", "xpu").dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["bfloat16", "bf16", "torch.bfloat16", torch.bfloat16])
def test_what_is_asked_for_is_taken(monkeypatch, name):
    pretend(monkeypatch, False, False)
    assert choose_dtype(name, "cpu").dtype == torch.bfloat16


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="dtype='int4' is unknown: choose auto or one of float32"):
        choose_dtype("int4", "cpu")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_with_bfloat16_uses_it():
    choice = choose_dtype("auto", "cuda")
    assert choice.dtype == (torch.bfloat16 if torch.cuda.get_device_capability() >= (8, 0) else torch.float32)
