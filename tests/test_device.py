"""The choice of a device and of a precision."""

from __future__ import annotations

import pytest
import torch

from stream_ctr.errors import ConfigError
from stream_ctr.learn.device import choose_device, choose_precision

CPU = torch.device("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_cuda_without_a_gpu_is_a_clear_error() -> None:
    with pytest.raises(ConfigError, match="no CUDA GPU"):
        choose_device("cuda")


def test_one_of_several_gpus_can_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(ConfigError, match=r"cuda:2: this machine has 2 GPU\(s\)"):
        choose_device("cuda:2")


@pytest.mark.parametrize("has_gpu", [True, False])
def test_auto_is_the_gpu_where_there_is_one(has_gpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    assert choose_device("auto").type == ("cuda" if has_gpu else "cpu")
    assert choose_device("cpu").type == "cpu"


@pytest.mark.parametrize("has_bfloat16", [True, False])
def test_bfloat16_is_chosen_where_the_processor_has_it_and_warned_of_elsewhere(
    has_bfloat16: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    capabilities = {"avx2": True, "avx512_bf16": has_bfloat16}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert choose_precision("auto", CPU) == ("bf16" if has_bfloat16 else "fp32")
    assert choose_precision("fp32", CPU) == "fp32"
    assert not caplog.records
    assert choose_precision("bf16", CPU) == "bf16"
    assert ("they take many times as long as those of fp32" in caplog.text) is not has_bfloat16
