"""Triton's interpreter, which runs the GPU kernels on the CPU where there is no GPU.

Triton reads the variable when it is imported. Import this module before any that imports Triton.
"""

from __future__ import annotations

import os
from typing import Any

import torch

INTERPRETED = not torch.cuda.is_available()

if INTERPRETED:
    os.environ["TRITON_INTERPRET"] = "1"


def prepare_language_once() -> None:
    """Prepare Triton's language for the functions that kernels call once for each module of them.

    The interpreter does it in each call, although nothing undoes it as long as the kernel runs.
    That takes nearly half of the time of a kernel.
    """
    from triton.runtime.interpreter import InterpretedFunction

    prepared: set[str] = set()
    call = InterpretedFunction.__call__

    def called(function: Any, *args: Any, **options: Any) -> Any:
        if function.fn.__module__ in prepared:
            return function.rewrite()(*args, **options)
        prepared.add(function.fn.__module__)
        return call(function, *args, **options)

    InterpretedFunction.__call__ = called
