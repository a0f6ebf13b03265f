"""Functional-SAM in nanoGPT's training loop: a GPT of its outline, micro-batches, warm-up, clipping."""

from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from fsam_core.torch import FunctionalSAM, MicroBatches, Schedule, Step, from_model

layers, width, heads, block_size, vocabulary = 2, 96, 4, 64, 256
batch_size, gradient_accumulation_steps, max_iters, warmup, learning_rate, grad_clip = 8, 2, 120, 10, 3e-3, 1.0
text = torch.frombuffer(bytearray(Path(torch.__file__).with_name("functional.py").read_bytes()), dtype=torch.uint8)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.Dropout(0.1))

    def forward(self, x):
        B, T, D = x.shape
        q, k, v = self.attn(self.ln_1(x)).view(B, T, 3, heads, D // heads).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(attended.transpose(1, 2).reshape(B, T, D))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    def __init__(self):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocabulary, width), nn.Embedding(block_size, width)
        self.h, self.ln_f = nn.Sequential(*(Block() for _ in range(layers))), nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, vocabulary, bias=False)
        self.lm_head.weight = self.wte.weight
        for embedding in (self.wte, self.wpe):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, idx, targets=None):
        logits = self.lm_head(self.ln_f(self.h(self.wte(idx) + self.wpe.weight[: idx.shape[1]])))
        return logits, None if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def get_batch():
    start = torch.randint(len(text) - block_size - 1, (batch_size, 1))
    window = text[start + torch.arange(block_size + 1)].long()
    return window[:, :-1], window[:, 1:]


torch.manual_seed(0)
model = GPT()
optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(1, (i + 1) / warmup))
step = Step(
    model,
    optimizer,
    FunctionalSAM(rho=0.2, precondition="adam", fraction=1 / 4),  # the correction on a quarter of the batch
    features=from_model("lm_head", labels=1),  # a batch is (x, y), and the model is called as model(x, y)
    schedule=Schedule(start=20),  # plain AdamW before
    clip_norm=grad_clip,
)
for iter_num in range(max_iters):
    loss = step(MicroBatches([get_batch() for _ in range(gradient_accumulation_steps)]))
    schedule.step()
    if iter_num % 20 == 0 or iter_num == max_iters - 1:
        print(f"iter {iter_num:3d}  loss {loss:.3f}  |g| {step.info.grad_norm:.3f}")
