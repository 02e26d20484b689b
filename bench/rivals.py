"""Training loops that a user would write in the worker's place: nothing but the mathematics, data in memory.

`bare_loop` trains the worker's own model; `NanoGPT` is a GPT-2 of the same shape in the manner of Karpathy's nanoGPT
(fused query, key and value, `scaled_dot_product_attention`, tied embeddings), written anew. Both: bf16 autocast and
`torch.compile` on CUDA, fused AdamW, clipping, gradient accumulation over micro-batches, no logging and no checkpoints.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy, gelu, scaled_dot_product_attention

from cbtm_common.shards import read_shard


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Of a GPT-2, and of the batches it is trained on, in sequences."""

    layers: int
    heads: int
    width: int
    vocabulary: int
    sequence: int
    global_batch: int
    # In one forward pass of the rivals; of the worker too on CUDA, which finds its own on a CPU.
    micro_batch: int

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.sequence * self.global_batch


class _Block(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.ln_1, self.ln_2 = nn.LayerNorm(shape.width), nn.LayerNorm(shape.width)
        self.qkv = nn.Linear(shape.width, 3 * shape.width)
        self.proj = nn.Linear(shape.width, shape.width)
        self.up, self.down = nn.Linear(shape.width, 4 * shape.width), nn.Linear(4 * shape.width, shape.width)

    def forward(self, x_BLD: torch.Tensor) -> torch.Tensor:
        B, L, D = x_BLD.shape
        q, k, v = (
            t.view(B, L, self.heads, D // self.heads).transpose(1, 2)
            for t in self.qkv(self.ln_1(x_BLD)).split(D, dim=2)
        )
        mixed = scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(B, L, D)
        x_BLD = x_BLD + self.proj(mixed)
        hidden: torch.Tensor = x_BLD + self.down(gelu(self.up(self.ln_2(x_BLD)), approximate="tanh"))
        return hidden


class NanoGPT(nn.Module):
    """Returns the mean cross-entropy of tokens [B, L + 1]."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.token, self.position = (
            nn.Embedding(shape.vocabulary, shape.width),
            nn.Embedding(shape.sequence, shape.width),
        )
        self.blocks = nn.ModuleList(_Block(shape) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.width)
        self.head = nn.Linear(shape.width, shape.vocabulary, bias=False)
        self.head.weight = self.token.weight
        for parameter in self.parameters():
            if parameter.dim() >= 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens_BS: torch.Tensor) -> torch.Tensor:
        inputs_BL = tokens_BS[:, :-1]
        x_BLD = self.token(inputs_BL) + self.position(torch.arange(inputs_BL.shape[1], device=inputs_BL.device))
        for block in self.blocks:
            x_BLD = block(x_BLD)
        logits_BLV = self.head(self.norm(x_BLD))
        return cross_entropy(logits_BLV.flatten(0, 1), tokens_BS[:, 1:].flatten())


class BareModel(nn.Module):
    """transformers' model as a user has it, its loss as in `NanoGPT`."""

    def __init__(self, directory: Path) -> None:
        super().__init__()
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="sdpa", dtype=torch.float32)
        self.train()

    def forward(self, tokens_BS: torch.Tensor) -> torch.Tensor:
        logits_BLV = self.model(input_ids=tokens_BS[:, :-1], use_cache=False).logits
        return cross_entropy(logits_BLV.flatten(0, 1), tokens_BS[:, 1:].flatten())


def rival_loop(model: nn.Module, shape: Shape, shard: Path, device: torch.device) -> Callable[[int], float]:
    """A function that trains so many steps and returns tokens a second. The first steps are done here."""
    cuda = device.type == "cuda"
    model.to(device)
    loss_of: Callable[[torch.Tensor], torch.Tensor] = torch.compile(model) if cuda else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    tokens = torch.from_numpy(read_shard(shard).tokens.astype(np.int64))
    micro_steps = shape.global_batch // shape.micro_batch
    offsets = torch.arange(shape.sequence + 1)

    def batch() -> torch.Tensor:
        starts = torch.randint(len(tokens) - shape.sequence - 1, (shape.micro_batch, 1))
        picked = tokens[starts + offsets]
        return picked.pin_memory().to(device, non_blocking=True) if cuda else picked

    def train(steps: int) -> float:
        started = time.perf_counter()
        for _ in range(steps):
            for _ in range(micro_steps):
                with torch.autocast("cuda", dtype=torch.bfloat16) if cuda else contextlib.nullcontext():
                    loss = loss_of(batch()) / micro_steps
                loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if cuda:
            torch.cuda.synchronize()
        return steps * shape.tokens / (time.perf_counter() - started)

    train(3)
    return train
