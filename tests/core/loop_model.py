"""A small model that is trained in the loops of others, and its `features`."""

from __future__ import annotations

import torch
from torch import nn

from fsam_core.torch import SAM, FunctionalSAM, LinearHead, LogitSAM, Plain, Step

D, V, RHO = 6, 11, 0.3
METHODS = {"plain": Plain(), "sam": SAM(RHO), "functional": FunctionalSAM(RHO), "logit": LogitSAM(RHO)}


class Model(nn.Module):
    def __init__(self, sparse: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(V, D, sparse=sparse)
        self.mix, self.head = nn.Linear(D, D), nn.Linear(D, V, bias=False)
        self.double()

    def trunk(self, x):
        return torch.tanh(self.mix(self.embedding(x)))


def features(model, batch):
    x, y = batch
    return LinearHead(model.trunk(x), model.head.weight, y)


def batch_of(seed: int = 0, rows: int = 8):
    return list(torch.randint(0, V, (2, rows, 3), generator=torch.Generator().manual_seed(seed)).unbind())


def made(method=None, of=features, model=None, **options):
    model = model or Model()
    return model, Step(
        model, torch.optim.AdamW(model.parameters(), lr=0.01), method or FunctionalSAM(RHO), features=of, **options
    )
