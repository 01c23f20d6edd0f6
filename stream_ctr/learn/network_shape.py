"""The shapes of a network, of the paper's systems and of models of other packages.

>>> spec = LearnerSpec(model="fm", fields=2, crosses=1, embedding_dim=4)
>>> network_shape(spec)
NetworkShape(columns=2, width=4, dense={'dense.bias': ()})
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from stream_ctr.learn.dense_part import DENSE, PARTS, expected_shapes
from stream_ctr.learn.spec import LearnerSpec


class NetworkShape(NamedTuple):
    """The sizes of a network, apart from the number of its rows.

    It reads `columns` ids of an example, and `width` coordinates and a first-order weight of each
    row. `dense` maps the names of the parameters of its dense part to their shapes.
    """

    columns: int
    width: int
    dense: Mapping[str, tuple[int, ...]]


def network_shape(spec: LearnerSpec) -> NetworkShape:
    """Return the shapes of the network that `spec` describes, which must not be "lr".

    Raises `ConfigError` or its subclass `UnknownModel` for a model that this process does not know.
    """
    if spec.model not in PARTS:
        # Only torch can describe the module of another package.
        from stream_ctr.learn.learner import described_network

        return NetworkShape(*described_network(spec))
    part = PARTS[spec.model]
    dense = {name: shape for name, shape in expected_shapes(spec).items() if name.startswith(DENSE)}
    return NetworkShape(part.columns(spec), part.width(spec), dense)
