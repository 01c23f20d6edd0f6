"""Compiles each Triton kernel as it is launched, without a GPU.

    python tests/support/compile_kernels.py

Prints one JSON object a line: a kernel, a capability, and what is known of the code. A kernel that
updates rows is `ordered` when a barrier lies between its last load and the stores behind it.
Otherwise a warp could read what another one has written.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from stream_ctr.learn import triton_kernels, triton_online
from stream_ctr.learn.table import Rates, Table
from stream_ctr.models import FieldSums
from stream_ctr.models.terms import Terms

CAPABILITIES = (80, 90)
# Embeddings, their width, and the optimiser.
TABLES = (
    (1, 10, "online"),
    (2, 10, "online"),
    (1, 100, "online"),
    (2, 512, "online"),
    (1, 10, "adagrad"),
    (2, 10, "adam"),
    (1, 512, "adagrad"),
    (2, 512, "adam"),
)
# Those of DeepFM, FM, the network of FNN, IPNN and LR & DNN: all at the first shape, and
# those of DeepFM at every one.
TERMS = (
    Terms(linear=True, pairs=True),
    Terms(linear=True, pairs=True, network=False),
    Terms(network_w=True),
    Terms(),
    Terms(linear=True),
)
_TYPES = {torch.float32: "*fp32", torch.float64: "*fp64", torch.int32: "*i32", torch.int64: "*i64"}
_MEMORY = re.compile(r"^\s*(?:@\S+ )?(ld\.global|st\.global|bar\.sync|bar\.warp\.sync)\S*", re.M)
_VECTOR = re.compile(r"ld\.global\.v4")
_FIELDS = 39


def type_of(argument: object) -> str:
    if isinstance(argument, torch.Tensor):
        return _TYPES[argument.dtype]
    return {int: "i32", float: "fp32"}[type(argument)]


def facts(
    kernel: Any, arguments: tuple[Any, ...], constants: Mapping[str, Any], warps: int
) -> Iterator[dict[str, Any]]:
    """Yield what is known of a kernel's code for each capability."""
    names = [parameter.name for parameter in kernel.params if not parameter.is_constexpr]
    signature = dict(zip(names, map(type_of, arguments), strict=True))
    # Memory of torch is aligned, and a launch tells the compiler so.
    attributes = {
        (kernel.arg_names.index(name),): [["tt.divisibility", 16]]
        for name, type_name in signature.items()
        if type_name.startswith("*")
    }
    signature |= dict.fromkeys(constants, "constexpr")
    for capability in CAPABILITIES:
        source = ASTSource(
            fn=kernel, signature=signature, constexprs=dict(constants), attrs=attributes
        )
        target = GPUTarget("cuda", capability, 32)
        built = triton.compile(source, target=target, options={"num_warps": warps})
        ptx = built.asm["ptx"]
        yield {
            "kernel": kernel.__name__,
            "capability": capability,
            "constants": dict(constants),
            "warps": warps,
            "shared": built.metadata.shared,
            "compiled": len(built.asm["cubin"]) > 0,
            "atomic": "atom." in ptx or "red.global" in ptx,
            "ordered": is_ordered(ptx),
            "wide_loads": len(_VECTOR.findall(ptx)),
        }


def is_ordered(ptx: str) -> bool:
    """Return True if a barrier follows the last load from global memory and precedes the stores.

    >>> is_ordered("ld.global.b32 a;\\nbar.sync 0;\\nst.global.b32 b;")
    True
    >>> is_ordered("bar.sync 0;\\nld.global.b32 a;\\nst.global.b32 b;")
    False
    """
    operations = [match.group(1) for match in _MEMORY.finditer(ptx)]
    last_load = len(operations) - 1 - operations[::-1].index("ld.global")
    behind = operations[last_load + 1 :]
    return len(behind) > 1 and behind[0].startswith("bar") and "st.global" in behind


def launches() -> Iterator[dict[str, Any]]:
    """Yield the facts of every kernel, at the shapes of `TABLES`."""
    found: list[dict[str, Any]] = []

    def compiled(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        warps = options.pop("num_warps")
        found.extend(facts(kernel, arguments, options, warps))

    JITFunction.run = compiled
    for embeddings, k, optimizer in TABLES:
        launch(Table(bits=4, embedding_dim=k, embeddings=embeddings, rates=Rates(optimizer)))
        yield from found
        found.clear()


def launch(table: Table) -> None:
    """Launch the kernels of a step on a batch of 8 examples."""
    ids = torch.zeros(8, _FIELDS, dtype=torch.int32)
    w, v = torch.zeros(8, _FIELDS), torch.zeros(8, _FIELDS, table.width)
    values = w if table.embedding_dim == 10 else None
    triton_kernels.gather(
        table, ids, values, w, v, FieldSums(torch.zeros(8, table.width), torch.zeros(8))
    )
    count = torch.tensor(8, dtype=torch.int32)
    skip = torch.tensor(0.0)
    if table.rates.optimizer != "online":
        update = triton_kernels.Update(table, examples=8, fields=_FIELDS)
        update.sort(ids)
        update(w, v, count, skip, torch.tensor(1.0))
        return
    zeros = torch.zeros(8)
    batch = triton_online.OnlineBatch(
        count, zeros, values, w, v, zeros, w, v, zeros.double(), zeros
    )
    first_shape = (table.embeddings, table.embedding_dim) == TABLES[0][:2]
    for terms in TERMS if first_shape else TERMS[:1]:
        rows = triton_online.OnlineRows(table, terms, examples=8, fields=_FIELDS)
        rows.sort(ids)
        rows.step(batch, torch.zeros(2, dtype=torch.float64))
    rows.compact(ids.numel())
    rows.broken(ids.numel())
    rows.write_back(ids.numel(), skip)


if __name__ == "__main__":
    for line in launches():
        print(json.dumps(line), flush=True)
