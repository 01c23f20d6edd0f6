"""Ours: `stream_ctr.learner.Learner.learn`."""

from __future__ import annotations

import itertools
import os

import numpy as np
from examples import each, field_sizes, measured, options, parse

from stream_ctr.learn.learner import NetworkLearner, choose_device, choose_precision
from stream_ctr.learn.thread_pool import set_up_process


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--precision", choices=["auto", "fp32", "bf16"], required=True)
    parser.add_argument(
        "--fields", type=int, default=0, help="where there is no sizes.json to tell"
    )
    parser.add_argument("--table-bits", type=int, default=0)
    parser.add_argument(
        "--events-per-example",
        type=float,
        default=1.0,
        help="count events, of which some are clicks, not examples",
    )
    arguments = parse(parser)
    set_up_process()  # as `stream-ctr run` does
    precision = choose_precision(arguments.precision, choose_device(arguments.device))
    sizes = [] if arguments.fields else field_sizes(arguments.data)
    bits = arguments.table_bits or (sum(sizes) - 1).bit_length()
    learner = NetworkLearner(
        "deepfm", fields=arguments.fields or len(sizes), embedding_dim=arguments.embedding_dim, hidden=arguments.hidden,
        table_bits=bits, batch_size=arguments.batch, precision=precision, device=arguments.device, threads=os.cpu_count() or 1,
    )  # fmt: skip
    whole = [
        (ids.numpy(), labels.numpy().astype(np.uint8), None)
        for ids, labels in each(arguments.data, arguments.batch)
    ]
    pairs = itertools.pairwise(itertools.cycle(whole))

    def step() -> None:
        batch, following = next(pairs)
        learner.learn(*batch, following=following)

    measured(
        step,
        arguments,
        note=f"{precision}, 2^{bits} rows",
        count=arguments.batch * arguments.events_per_example,
    )


if __name__ == "__main__":
    main()
