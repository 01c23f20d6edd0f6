"""Arrays for snapshots, and death before each step that touches the disk."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from stream_ctr.snapshots import snapshot
from support.processes import in_child

TENSORS: dict[str, dict[str, Any]] = {
    "model": {
        "table": np.arange(12, dtype=np.float32).reshape(3, 4),
        "bias": np.array(0.5, np.float32),
    },
    "joiner": {
        "id_hash": np.array([0, 1, 2**64 - 1], np.uint64),
        "time": np.array([-1, 2**62], np.int64),
        "label": np.array([], np.bool_),
    },
}
DIED = 9
STEPS = ("mkdir", "fsync", "rename", "replace", "unlink", "rmdir")


def equal_tensors(
    one: Mapping[str, Mapping[str, Any]], other: Mapping[str, Mapping[str, Any]]
) -> bool:
    """Return whether two sets of arrays agree in names, types, shapes and every bit."""

    def bits(tensors: Mapping[str, Mapping[str, Any]]) -> dict[tuple[str, str], object]:
        arrays = {
            (stem, name): np.asarray(array)
            for stem, named in tensors.items()
            for name, array in named.items()
        }
        return {key: (a.dtype, a.shape, a.tobytes()) for key, a in arrays.items()}

    return one.keys() == other.keys() and bits(one) == bits(other)


def flip_bit(path: Path, position: int) -> None:
    """Flip a bit of the byte at `position`."""
    data = bytearray(path.read_bytes())
    data[position] ^= 0x40
    path.write_bytes(data)


def crash_at_each_step(work: Callable[[], object], inspect: Callable[[], object]) -> int:
    """Run `work` in children that die before step 0, 1, 2, ...; call `inspect` after each death.

    Returns the number of steps, which are the system calls that touch the disk.
    """

    def doomed(step: int) -> Callable[[], None]:
        def run() -> None:
            _die_before_step(step)
            work()

        return run

    for step in range(100):
        if (code := in_child(doomed(step))) == 0:
            return step
        assert code == DIED
        inspect()
    raise AssertionError("the work did not end")


def _die_before_step(step: int) -> None:
    """Make the step-th call from here on end this process, as SIGKILL would."""
    remaining = [step]

    def guarded(call: Callable[..., Any]) -> Callable[..., Any]:
        def guarded_call(*args: Any, **keywords: Any) -> Any:
            if remaining[0] == 0:
                os._exit(DIED)
            remaining[0] -= 1
            return call(*args, **keywords)

        return guarded_call

    for name in STEPS:
        setattr(os, name, guarded(getattr(os, name)))
    save_file = snapshot.safetensors.numpy.save_file  # type: ignore[attr-defined]
    snapshot.safetensors.numpy.save_file = guarded(save_file)  # type: ignore[attr-defined]
