"""Functional-SAM in a hand-written PyTorch training loop: a character model of this file, in a few seconds."""

from pathlib import Path

import torch
from torch import nn

from fsam_core.torch import FunctionalSAM, LinearHead, MicroBatches, Step

CONTEXT, WIDTH, VOCABULARY = 8, 64, 256
text = torch.tensor(list(Path(__file__).read_bytes()))


class Model(nn.Module):
    """The last CONTEXT characters, embedded and mixed, as hidden states for the next one."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.mix = nn.Sequential(nn.Flatten(), nn.Linear(CONTEXT * WIDTH, WIDTH), nn.GELU(), nn.Dropout(0.1))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def trunk(self, inputs):
        return self.mix(self.embedding(inputs))


def features(model, batch):
    inputs, labels = batch
    return LinearHead(model.trunk(inputs), model.head.weight, labels)


def draw(size=64):
    start = torch.randint(len(text) - CONTEXT, (size,))
    window = text[start[:, None] + torch.arange(CONTEXT + 1)]
    return window[:, :-1], window[:, -1]


torch.manual_seed(0)
model = Model()
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95))
step = Step(model, optimizer, FunctionalSAM(rho=0.1, precondition="adam"), features=features, clip_norm=1.0)
for i in range(300):
    loss = step(MicroBatches([draw(), draw()]))  # two micro-batches, one gradient
    if i % 50 == 0 or i == 299:
        print(f"step {i:3d}  loss {loss:.3f}  |g| {step.info.grad_norm:.3f}  |ε| {step.info.perturbation_norm:.3f}")
