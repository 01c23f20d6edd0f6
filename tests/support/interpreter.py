"""Triton's interpreter, which runs the GPU kernels on the CPU where there is no GPU.

Triton reads the variable when it is imported. Import this module before any that imports Triton.
"""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
