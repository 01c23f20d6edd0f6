"""Ours: DeepFM through `stream_ctr.learn.network_learner.NetworkLearner.learn`."""

from __future__ import annotations

import itertools
import os
from typing import Any

import numpy as np
from examples import field_sizes, full_batches, measured, options, parse

from stream_ctr.learn.device import choose_device, choose_precision
from stream_ctr.learn.network_learner import NetworkLearner
from stream_ctr.learn.spec import LearnerSpec
from stream_ctr.learn.thread_pool import set_up_process


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--precision", choices=["auto", "fp32", "bf16"], required=True)
    parser.add_argument("--fields", type=int, default=0, help="needed if there is no sizes.json")
    parser.add_argument("--table-bits", type=int, default=0)
    parser.add_argument(
        "--events-per-example",
        type=float,
        default=1.0,
        help="count events instead of examples; some events are clicks",
    )
    arguments = parse(parser)
    set_up_process()  # as `stream-ctr run` does
    precision: Any = choose_precision(arguments.precision, choose_device(arguments.device))
    sizes = [] if arguments.fields else field_sizes(arguments.data)
    bits = arguments.table_bits or (sum(sizes) - 1).bit_length()
    spec = LearnerSpec(
        model="deepfm",
        fields=arguments.fields or len(sizes),
        embedding_dim=arguments.embedding_dim,
        hidden=tuple(arguments.hidden),
        table_bits=bits,
        batch_size=arguments.batch,
        precision=precision,
    )
    learner = NetworkLearner(spec, device=arguments.device, threads=os.cpu_count() or 1)
    batches = [
        (ids.numpy(), labels.numpy().astype(np.uint8), None)
        for ids, labels in full_batches(arguments.data, arguments.batch)
    ]
    pairs = itertools.pairwise(itertools.cycle(batches))

    def step() -> None:
        batch, following = next(pairs)
        learner.learn(*batch, following=following)

    count = arguments.batch * arguments.events_per_example
    measured(step, arguments, note=f"{precision}, 2^{bits} rows", count=count)


if __name__ == "__main__":
    main()
