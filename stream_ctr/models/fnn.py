"""FNN: a network over embeddings that a factorization machine was trained to.

Zhang, Du, Wang, "Deep Learning over Multi-field Categorical Data", ECIR 2016:

    z_i = [w_i, V_i1, ..., V_iK] x_i        from an FM that was trained before
    y   = MLP([z_1, ..., z_F])

The model starts as an FM and learns as one: this is the pre-training. Then the network takes over,
and learning goes on through `w` and `V`, as in the authors' fine-tuning. At that point the network
has learned nothing, so in a stream its first predictions are worse than the FM's last ones.

The authors' z also contains the FM's constant, which is one number for all examples; the bias of
the first layer takes its place. They use tanh in the network; the DeepFM paper, whose table this
repository repeats, uses relu. Common implementations have no FM and leave `w` out: that is an
embedding under a network, without the pre-training that Table 1 lists for FNN.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Generator, Tensor, nn

from stream_ctr.models.fm import FM
from stream_ctr.models.layers import MLP, Tape
from stream_ctr.models.products import FieldSums
from stream_ctr.models.terms import Terms


class FNN(nn.Module):
    """`w` [B, F], `v` [B, F, K] -> logits [B].

    The logits are those of `fm` while `pretraining` is true. `begin_network` sets it to false, and
    from then on the logits are those of the network.

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
        # 1 once the network has begun. It is a buffer so that the weights record the phase.
        self.register_buffer("network", torch.zeros(()))
        self.pretraining = True
        self.register_load_state_dict_post_hook(_read_phase)  # type: ignore[no-untyped-call]

    def begin_network(self) -> None:
        """End the pre-training: from now on the logits are those of the network."""
        self.get_buffer("network").fill_(1.0)
        self.pretraining = False

    def forward(
        self,
        w: Tensor,
        v: Tensor,
        *,
        sums: FieldSums | None = None,
        generator: Generator | None = None,
    ) -> Tensor:
        if self.pretraining:
            y_fm: Tensor = self.fm(w, v, sums=sums)
            return y_fm
        return self.deep_logits(w, v, generator=generator)

    @property
    def terms(self) -> Terms:
        """The terms of the present phase."""
        return FM.terms if self.pretraining else Terms(network_w=True)

    def deep_logits(
        self, w: Tensor, v: Tensor, *, generator: Generator | None = None, tape: Tape | None = None
    ) -> Tensor:
        z = torch.cat([w.unsqueeze(2), v], dim=2)  # [B, F, K + 1]
        logits: Tensor = self.deep(z.flatten(1), generator, tape)
        return logits


def _read_phase(model: nn.Module, _: object) -> None:
    assert isinstance(model, FNN)
    model.pretraining = not bool(model.get_buffer("network"))
