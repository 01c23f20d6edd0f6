"""FNN, the FM-initialised network (Zhang, Du, Wang, "Deep Learning over Multi-field Categorical Data", ECIR 2016).

    z_i = [w_i, V_i1, ..., V_iK] x_i        from an FM that was trained before
    y   = MLP([z_1, ..., z_F])

It begins as an FM and learns as one: that is the pre-training. Then the network takes over, and learning goes on through `w` and `V`, as
their fine-tuning does. The network has learned nothing by then: in a stream its first predictions are worse than the FM's last.

Their z also has the FM's constant, which is one number for all examples: the bias of the first layer plays its part. They have tanh in the
network; the DeepFM paper, whose table this repeats, gives it relu. Common implementations have no FM at all and leave `w` out: that is an
embedding under a network, without the pre-training that Table 1 gives FNN a line for.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from stream_ctr.models.fm import FM
from stream_ctr.models.layers import MLP


class FNN(nn.Module):
    """`w` [B, F], `v` [B, F, K] -> logits [B]: those of `fm` while `pretraining`, which `begin_network` ends.

    >>> model = FNN(fields=3, embedding_dim=4, hidden=[8])
    >>> model.pretraining, model(torch.ones(2, 3), torch.zeros(2, 3, 4)).tolist()
    (True, [3.0, 3.0])
    """

    def __init__(
        self,
        *,
        fields: int,
        embedding_dim: int,
        hidden: Sequence[int] = (400, 400, 400),
        activation: str = "relu",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.fm = FM()
        self.deep = MLP(
            fields * (embedding_dim + 1), hidden, activation=activation, dropout=dropout
        )
        self.register_buffer(
            "network", torch.zeros(())
        )  # 1: it has begun; a weight, so that whoever loads those knows
        self.pretraining = True
        self.register_load_state_dict_post_hook(_read_phase)  # type: ignore[no-untyped-call]

    def begin_network(self) -> None:
        self.get_buffer("network").fill_(1.0)
        self.pretraining = False

    def forward(self, w: Tensor, v: Tensor) -> Tensor:
        model, inputs = (
            (self.fm, (w, v))
            if self.pretraining
            else (self.deep, (torch.cat([w.unsqueeze(2), v], dim=2).flatten(1),))
        )
        logits: Tensor = model(*inputs)
        return logits


def _read_phase(model: nn.Module, _: object) -> None:
    assert isinstance(model, FNN)
    model.pretraining = not bool(model.get_buffer("network"))
