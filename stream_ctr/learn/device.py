"""The choice of a device and of a precision."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch

from stream_ctr.errors import ConfigError

_log = logging.getLogger(__name__)
_BFLOAT16 = ("avx512_bf16", "amx_bf16", "bf16")  # capabilities of x86 and of Arm


def choose_device(name: str) -> torch.device:
    """Return the device `name`; "auto" is the GPU where there is one, and "cuda:1" the second.

    Raises `ConfigError` when there is no such GPU.

    >>> choose_device("cpu")
    device(type='cpu')
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device {name}: no CUDA GPU is available here; use --device cpu or auto")
    if device.index is not None and device.index >= (count := torch.cuda.device_count()):
        raise ConfigError(f"device {name}: this machine has {count} GPU(s); they count from cuda:0")
    return device


def choose_precision(name: str, device: torch.device) -> str:
    """Return "bf16" or "fp32".

    "auto" is "bf16" where bfloat16 products take half the time of float32 products, and "fp32"
    elsewhere. Logs a warning when `name` is "bf16" and the processor has no such products.

    >>> choose_precision("fp32", torch.device("cpu"))
    'fp32'
    """
    has_bfloat16 = _has_bfloat16(device)
    if name == "bf16" and not has_bfloat16:
        _log.warning(
            "learn.precision = bf16: this processor has no bfloat16 products, "
            "so they take many times as long as those of fp32"
        )
    if name == "auto":
        return "bf16" if has_bfloat16 else "fp32"
    return name


def _has_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # Older releases of torch do not report the capabilities of a CPU.
    capabilities: Mapping[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(name) for name in _BFLOAT16)
