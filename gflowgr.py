"""GFlowGR in one file: fine-tuning generative recommenders with generative flow networks (arXiv 2506.16114).

A generative recommender writes an item as a short path of codes, so it is a policy on a tree whose leaves are
the items. Trained on clicks alone (SFT), it takes all else for negative. GFlowGR adds paths of unclicked
items, chosen from easy to hard by a collaborative model, rewards each path, and adds a loss that is zero
where the probability of each path is its share of all reward:

    item text --TF-IDF, SVD--> vectors --RQ-VAE--> codes ------------------------------+
    histories --SASRec--> scores --curriculum--> K unclicked items --> reward, weight -+-> DB / TB loss -> T5
    recommendations <-- beam search over the trie of all items' codes <----------------------------------- T5

    python gflowgr.py --loss tb                       a toy world, nothing to download
    python gflowgr.py --loss tb --dataset beauty      Amazon Beauty, all stages
    python gflowgr.py --loss db --dataset beauty      after that: only the last stage is trained anew

Shapes, everywhere:
    B  histories in a batch     T  items in a history      N  items in the catalogue     U  users
    P  paths per history: 1 observed + K augmented         L  codes per item             C  codes per level
    W  beams                    d  width of a vector       H  attention heads            M  memory's tokens
The id N pads short histories. A trajectory y = (y_1 .. y_L) walks s_0 -> s_1 -> .. -> s_L down a tree: every
state has one parent, so log P_B = 0, and P_F(s_l | s_{l-1}) is the generator's p(y_l | x, y_<l).
"""
from __future__ import annotations

import contextlib
import dataclasses
import math
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable, Iterator, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import data as datasets
from data import DataError

# ============================================================================================= 1. settings


def knob(default, group: str, text: str, choices: tuple = (), below: float = 1e9):
    """One setting: its default, the group of settings it belongs to, its meaning, and what it may be."""
    return field(default=default, metadata={"group": group, "help": text, "choices": choices, "below": below})


@dataclass(frozen=True)
class Config:
    """Every setting, once. [paper]: as the paper, TIGER or LETTER has it; [ours]: left open, or we differ."""
    dataset: str = knob("toy", "data", "toy, beauty, yelp, instruments, or a folder of your own")
    seed: int = knob(42, "data", "fixes every random choice: on a CPU two runs print the same table")

    item_vectors: str = knob("", "vectors", "a .npy file of your own item vectors, not TF-IDF + SVD")
    vector_dim: int = knob(128, "vectors", "dimensions of the TF-IDF + SVD item vectors [ours]")

    codes: str = knob("", "codes", "a NAME.index.json of ready codes (LETTER's format), not our RQ-VAE's")
    levels: int = knob(3, "codes", "codebooks; one more code makes each path unique [paper]", below=26)
    codebook_size: int = knob(256, "codes", "codes per level, C [paper]")
    code_dim: int = knob(32, "codes", "dimensions of a code vector [paper]")
    commitment: float = knob(0.25, "codes", "weight of the commitment loss [paper]")
    code_epochs: int = knob(250, "codes", "passes of the RQ-VAE over the items [ours]")

    max_history: int = knob(20, "training", "items of a history that the models see [paper]")
    weight_decay: float = knob(0.01, "training", "decoupled weight decay of SASRec and the generator [ours]")
    evaluations: int = knob(8, "training", "how often a training is validated (NDCG@10) [ours]", below=1000)
    valid_users: int = knob(4000, "training", "users of these validations; at the end all count [ours]")
    precision: str = knob("auto", "training", "of the matrix products; fp16 (CUDA) with gradient scaling",
                          ("auto", "bf16", "fp16", "fp32"))

    sasrec_dim: int = knob(128, "sasrec", "width of SASRec [ours]")
    sasrec_layers: int = knob(2, "sasrec", "layers of SASRec [ours]")
    sasrec_heads: int = knob(2, "sasrec", "attention heads of SASRec [ours]")
    sasrec_dropout: float = knob(0.4, "sasrec", "dropout of SASRec [ours]", below=1)
    sasrec_length: int = knob(50, "sasrec", "last items of a user's sequence that SASRec trains on [ours]")
    sasrec_batch: int = knob(128, "sasrec", "sequences in a SASRec batch [ours]")
    sasrec_lr: float = knob(1e-3, "sasrec", "peak learning rate of SASRec [ours]")
    sasrec_epochs: int = knob(30, "sasrec", "passes over the users' sequences [ours]")

    d_model: int = knob(128, "sft", "width of the generator, d [paper]")
    heads: int = knob(4, "sft", "attention heads, H; TIGER has 6 [ours]")
    d_kv: int = knob(32, "sft", "dimensions of a head; TIGER has 64 [ours]")
    d_ff: int = knob(512, "sft", "width of the feed-forward layers; TIGER has 1024 [ours]")
    layers: int = knob(3, "sft", "layers of the encoder, and of the decoder; TIGER has 4 [ours]")
    dropout: float = knob(0.1, "sft", "dropout of the generator [paper]", below=1)
    beam: int = knob(20, "sft", "beams of the constrained search, W [paper]")
    batch: int = knob(256, "sft", "histories in a batch, B [ours]")
    lr: float = knob(0.01, "sft", "peak rate of Adafactor, relative to a weight's size [ours]")
    sft_epochs: float = knob(10.0, "sft", "passes over the training pairs by SFT [ours]")

    loss: str = knob("tb", "finetune", "fine-tuning method; sft goes on with SFT", ("sft", "db", "tb"))
    from_scratch: bool = knob(False, "finetune", "fine-tune an untrained generator, for both trainings' time")
    finetune_epochs: float = knob(3.0, "finetune", "length, in passes of SFT; costly steps are fewer [ours]")
    finetune_lr: float = knob(0.003, "finetune", "peak rate of Adafactor in the fine-tuning [ours]")
    k: int = knob(4, "finetune", "augmented trajectories beside the observed one, K [ours]")
    lam: float = knob(0.01, "finetune", "lambda of Eq. 7, the weight of the GFlowNet term [ours]")
    sampler: str = knob("curriculum", "finetune", "augmented items: [paper], or two ablations",
                        ("curriculum", "random", "none"))
    hardness: float = knob(3.0, "finetune", "b: the curriculum's beta rises from -b to +b [ours]")
    pool: int = knob(512, "finetune", "random items that the curriculum chooses from, per batch [ours]")
    reward: str = knob("aug,cf,sim", "finetune", "parts of the reward, any of aug, cf, sim [paper]")
    reward_floor: float = knob(0.01, "finetune", "smallest reward, so that its log is finite [ours]")
    confidence: bool = knob(True, "finetune", "weight each trajectory by Eq. 8 [paper]")
    z: str = knob("user", "finetune", "one Z for each user [ours], or a scalar [paper]", ("user", "scalar"))

    data_dir: str = knob("data", "run", "where the datasets lie")
    runs_dir: str = knob("runs", "run", "where every stage's result is kept")
    device: str = knob("auto", "run", "auto (CUDA where there is one), cpu or cuda")


PRESETS = {"toy": dict(levels=2, codebook_size=32, d_model=64, d_kv=16, d_ff=256, layers=2, batch=64,
                       sft_epochs=4.0, finetune_epochs=2.0, evaluations=4, valid_users=1000)}


# ================================================================================================ 2. codes


class Quantised(NamedTuple):
    """What a residual quantiser says of a batch."""
    codes: Tensor       # (B, L) int64
    value: Tensor       # (B, d) sum of the chosen code vectors; its gradient passes straight to the input
    loss: Tensor        # scalar: codebook loss + commitment loss
    residuals: Tensor   # (L, B, d) what each level had to explain


@torch.no_grad()
def kmeans(points: Tensor, k: int, iterations: int = 20) -> Tensor:
    """Lloyd's algorithm: centres (k, d) of points (n, d). An empty cluster is put onto a random point."""
    def random_points() -> Tensor:
        return points[torch.randint(len(points), (k,), device=points.device)]

    centres = random_points()                   # of two equal centres one stays empty, and so moves on
    for _ in range(iterations):
        nearest = torch.cdist(points, centres).argmin(1)
        count = torch.bincount(nearest, minlength=k)[:, None]
        total = torch.zeros_like(centres).index_add_(0, nearest, points)
        centres = torch.where(count > 0, total / count.clamp(min=1), random_points())
    return centres


class ResidualQuantiser(nn.Module):
    """Codebooks of C vectors, one per level; each quantises what the levels before it left (TIGER, 3.1)."""

    def __init__(self, levels: int, size: int, dim: int, commitment: float = 0.25):
        super().__init__()
        self.codebooks = nn.Parameter(torch.randn(levels, size, dim))
        self.commitment = commitment

    @torch.no_grad()
    def initialise(self, x: Tensor) -> None:
        """Set the codebooks to k-means centres of the residuals of x (n, d), level by level."""
        for codebook in self.codebooks:
            codebook.copy_(kmeans(x, len(codebook)))
            x = x - codebook[torch.cdist(x, codebook).argmin(1)]

    @torch.no_grad()
    def restart_dead_codes(self, x: Tensor) -> int:
        """Move each code that no row of x (n, d) uses to the residual of a random row; returns how many."""
        codes, _, _, residuals = self(x)
        moved = 0
        for codebook, chosen, residual in zip(self.codebooks, codes.T, residuals):
            dead = torch.bincount(chosen, minlength=len(codebook)) == 0
            codebook[dead] = residual[torch.randint(len(x), (int(dead.sum()),), device=x.device)]
            moved += int(dead.sum())
        return moved

    def forward(self, x: Tensor) -> Quantised:
        """x (B, d) -> Quantised; its loss sums mse(sg(r), q) + commitment * mse(r, sg(q)) over levels."""
        residual, value, loss, codes, residuals = x, torch.zeros_like(x), x.new_zeros(()), [], []
        for codebook in self.codebooks:
            residuals.append(residual)
            codes.append(torch.cdist(residual.detach(), codebook.detach()).argmin(1))
            chosen = codebook[codes[-1]]
            loss = loss + F.mse_loss(chosen, residual.detach()) \
                + self.commitment * F.mse_loss(residual, chosen.detach())
            value = value + chosen
            # Subtracting the straight-through value would zero the commitment's gradient from level 2 on.
            residual = residual - chosen.detach()
        return Quantised(torch.stack(codes, 1), x + (value - x).detach(), loss, torch.stack(residuals))


class RQVAE(nn.Module):
    """Item vectors (B, d_in) -> latent (B, dim) -> residual codes -> reconstruction (B, d_in)."""

    def __init__(self, d_in: int, levels: int, size: int, dim: int, commitment: float = 0.25):
        super().__init__()
        widths = (d_in, 256, 128, dim)
        self.encoder, self.decoder = self.mlp(widths), self.mlp(widths[::-1])
        self.quantiser = ResidualQuantiser(levels, size, dim, commitment)

    @staticmethod
    def mlp(widths: tuple[int, ...]) -> nn.Sequential:
        """Linear layers of these widths with ReLU between them."""
        layers = [layer for i, o in zip(widths, widths[1:]) for layer in (nn.Linear(i, o), nn.ReLU())]
        return nn.Sequential(*layers[:-1])

    def forward(self, x: Tensor) -> tuple[Tensor, Quantised]:
        """x (B, d_in) -> loss (scalar): reconstruction + quantisation; and the quantised batch."""
        quantised = self.quantiser(self.encoder(x))
        return F.mse_loss(self.decoder(quantised.value), x) + quantised.loss, quantised


def unique_paths(codes: Tensor) -> Tensor:
    """Append a code that counts items of equal codes: (N, L) -> (N, L + 1), all rows different (TIGER)."""
    _, group = torch.unique(codes, dim=0, return_inverse=True)
    order = torch.argsort(group, stable=True)                   # equal codes side by side, by item id
    size = torch.bincount(group)
    last = torch.empty_like(group)
    last[order] = torch.arange(len(group), device=group.device) - (size.cumsum(0) - size)[group[order]]
    return torch.cat([codes, last[:, None]], 1)


# =============================================================================================== 3. SASRec


class SASRec(nn.Module):
    """Self-attentive sequential recommendation: scores every item as the next (Kang and McAuley 2018)."""

    def __init__(self, n_items: int, dim: int, layers: int, heads: int, dropout: float, max_length: int):
        super().__init__()
        self.item = nn.Embedding(n_items + 1, dim, padding_idx=n_items)
        self.position = nn.Embedding(max_length, dim)
        nn.init.normal_(self.item.weight[:-1], std=0.02)
        nn.init.normal_(self.position.weight, std=0.02)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(dim, heads, 4 * dim, dropout, batch_first=True, norm_first=True)
            for _ in range(layers))
        self.norm, self.dropout = nn.LayerNorm(dim), nn.Dropout(dropout)

    def forward(self, history: Tensor) -> Tensor:
        """History (B, T), padded on the right -> states (B, T, d). Causal: state t has seen the items 0 .. t
        only, so the padding behind it never matters."""
        length = history.shape[1]
        x = self.dropout(self.item(history) + self.position.weight[:length])
        mask = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        for block in self.blocks:
            x = block(x, src_mask=mask, is_causal=True)
        return self.norm(x)

    def last(self, history: Tensor) -> tuple[Tensor, Tensor]:
        """Index of each history's last item: (rows, columns), each (B,)."""
        rows = torch.arange(len(history), device=history.device)
        return rows, (history != self.item.padding_idx).sum(1) - 1

    def scores(self, history: Tensor) -> Tensor:
        """History (B, T) -> each item's score as the next one (B, N), float32: in bf16 the best would tie."""
        state = self(history)[self.last(history)].float()
        with torch.autocast(state.device.type, enabled=False):
            return state @ self.item.weight[:-1].T

    def loss(self, history: Tensor, target: Tensor) -> Tensor:
        """Cross-entropy of the next item over the whole catalogue, at every position -> scalar. [ours]: the
        original draws one negative per item; the full softmax is stronger. history (B, T), target (B,)."""
        following = torch.cat([history[:, 1:], torch.full_like(history[:, :1], self.item.padding_idx)], 1)
        following[self.last(history)] = target
        real = following != self.item.padding_idx
        logits = self(history)[real] @ self.item.weight[:-1].T                      # (positions, N)
        return F.cross_entropy(logits.float(), following[real])


# =================================================================================================== 4. T5


class Dropout(nn.Module):
    """Dropout whose mask is a window, at a random place, of one long strip of masks, shared by all layers: on
    a CPU, drawing one random number per element costs more than the layer that it follows."""

    def __init__(self, p: float):
        super().__init__()
        self.p, self.strip = p, torch.empty(0)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0 or x.device.type != "cpu":
            return F.dropout(x, self.p, self.training)
        size = max(1 << 24, 2 * x.numel())
        if len(self.strip) < 2 * x.numel() or self.strip.dtype != x.dtype:
            noise = torch.rand(size, generator=torch.Generator().manual_seed(size))
            self.strip = (noise >= self.p).to(x.dtype) / (1 - self.p)
        start = int(torch.randint(len(self.strip) - x.numel(), ()))
        return x * self.strip[start:start + x.numel()].view(x.shape)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, in the type of x."""

    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), 1e-6)


def linear(d_in: int, d_out: int, std: float) -> nn.Linear:
    """A linear layer without bias, its weights drawn from N(0, std^2)."""
    layer = nn.Linear(d_in, d_out, bias=False)
    nn.init.normal_(layer.weight, std=std)
    return layer


class Attention(nn.Module):
    """T5's multi-head attention: no biases, unscaled dot products, an additive position bias."""

    def __init__(self, d_model: int, heads: int, d_kv: int, dropout: Dropout):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.q = linear(d_model, heads * d_kv, (d_model * d_kv) ** -0.5)
        self.kv = linear(d_model, 2 * heads * d_kv, d_model ** -0.5)
        self.o = linear(heads * d_kv, d_model, (heads * d_kv) ** -0.5)

    def split(self, x: Tensor) -> Tensor:
        """(B, S, H * d_kv) -> (B, H, S, d_kv)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, S, d) -> keys and values, (B, H, S, d_kv) each."""
        keys, values = self.kv(x).chunk(2, -1)
        return self.split(keys), self.split(values)

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        """Queries from x (B, S, d) over S' keys; bias (.., S, S') is added to the logits -> (B, S, d)."""
        logits = self.split(self.q(x)) @ keys.transpose(-1, -2) + bias
        weights = self.dropout(logits.softmax(-1, dtype=torch.float32).to(values.dtype))
        return self.o((weights @ values).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Self-attention, in a decoder cross-attention too, and a ReLU feed-forward: x + f(norm(x)) each."""

    def __init__(self, d_model: int, heads: int, d_kv: int, d_ff: int, dropout: Dropout, decoder: bool):
        super().__init__()
        self.dropout = dropout
        self.norms = nn.ModuleList(RMSNorm(d_model) for _ in range(3 if decoder else 2))
        self.attention = Attention(d_model, heads, d_kv, dropout)
        self.cross = Attention(d_model, heads, d_kv, dropout) if decoder else None
        self.wi, self.wo = linear(d_model, d_ff, d_model ** -0.5), linear(d_ff, d_model, d_ff ** -0.5)

    def forward(self, x: Tensor, bias: Tensor, memory: tuple | None = None,
                past: tuple | None = None) -> tuple[Tensor, tuple]:
        """x (B * P, S, d) -> x, and the keys and values (B * P, H, S', d_kv) that a later step attends to.

        memory: keys, values (B, H, M, d_kv) and bias of the histories; the P paths of a history all ask the
        same memory, so it is never repeated (an encoder has P = 1). past: keys and values of earlier steps.
        """
        h = self.norms[0](x)
        present = self.attention.keys_values(h)
        if past is not None:
            present = tuple(torch.cat(pair, 2) for pair in zip(past, present))
        x = x + self.dropout(self.attention(h, *present, bias))
        if self.cross is not None:
            h = self.norms[1](x).view(len(memory[0]), -1, x.shape[-1])              # (B, P * S, d)
            x = x + self.dropout(self.cross(h, *memory).view(x.shape))
        h = self.wo(self.dropout(self.wi(self.norms[-1](x)).relu()))
        return x + self.dropout(h), present


def relative_buckets(queries: int, keys: int, two_sided: bool, buckets=32, furthest=128) -> Tensor:
    """T5's bucket of each relative position, key - query: (queries, keys) int64. Half of the buckets hold one
    distance each, the others grow logarithmically up to `furthest`. The queries are the last of the keys."""
    distance = torch.arange(keys) - torch.arange(keys - queries, keys)[:, None]
    offset = torch.zeros_like(distance)
    if two_sided:
        buckets //= 2
        offset, distance = (distance > 0) * buckets, -distance.abs()
    distance = (-distance).clamp(min=0)
    exact = buckets // 2
    growth = torch.log(distance.clamp(min=1) / exact) / math.log(furthest / exact)
    return offset + torch.where(distance < exact, distance,
                                (exact + (growth * (buckets - exact)).long()).clamp(max=buckets - 1))


class Memory(NamedTuple):
    """What the decoder knows of a batch of histories."""
    layers: list        # per decoder layer: keys and values, (B, H, M, d_kv) each
    bias: Tensor        # (B, 1, 1, M): -inf where a history is padded


class T5(nn.Module):
    """The standard T5 (Raffel et al. 2020) and a flow head. Token 0 pads and starts, 1 + l * C + c is code c
    of level l. Each level has tokens of its own, so what comes next is a choice among C codes."""

    def __init__(self, levels: int, n_codes: int, d_model=128, heads=4, d_kv=32, d_ff=512, layers=3,
                 dropout=0.1):
        super().__init__()
        self.levels, self.n_codes, self.d_model = levels, n_codes, d_model
        self.embedding = nn.Embedding(1 + levels * n_codes, d_model)
        self.dropout = Dropout(dropout)
        self.encoder, self.decoder = (nn.ModuleList(
            Block(d_model, heads, d_kv, d_ff, self.dropout, decoder) for _ in range(layers))
            for decoder in (False, True))
        self.encoder_bias, self.decoder_bias = nn.Embedding(32, heads), nn.Embedding(32, heads)
        for table in (self.encoder_bias, self.decoder_bias):
            nn.init.normal_(table.weight, std=d_model ** -0.5)
        self.encoder_norm, self.decoder_norm = RMSNorm(d_model), RMSNorm(d_model)
        self.flow = linear(d_model, 1, d_model ** -0.5)
        self.scalar_z = nn.Parameter(torch.ones(()))    # log Z / 10 of all users, for --z scalar: near 1, so
        #                                                 that an optimiser of relative steps can move it

    def embed(self, tokens: Tensor) -> Tensor:
        """Tokens (..) -> (.., d). Under autocast the residual stream has autocast's type from here on."""
        x, device = self.embedding(tokens), tokens.device.type
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        return self.dropout(x)

    def encode(self, tokens: Tensor) -> Memory:
        """Tokens (B, M) of histories, 0 where padded -> Memory. Runs once per history, whatever the paths."""
        x, length = self.embed(tokens), tokens.shape[1]
        mask = torch.zeros_like(tokens, dtype=x.dtype).masked_fill(tokens == 0, -torch.inf)[:, None, None]
        buckets = relative_buckets(length, length, True).to(x.device)
        bias = self.encoder_bias(buckets).permute(2, 0, 1).to(x.dtype) + mask       # (B, H, M, M)
        for block in self.encoder:
            x, _ = block(x, bias)
        x = self.dropout(self.encoder_norm(x))
        return Memory([block.cross.keys_values(x) for block in self.decoder], mask)

    def decode(self, tokens: Tensor, memory: Memory, past: list | None = None) -> tuple[Tensor, list]:
        """Tokens (B, P, S) of P paths per history, the very first being 0 -> states (B, P, S, d), the cache.

        State l is s_l: it has read y_1 .. y_l and predicts y_{l+1}. With the cache of the steps before as
        `past`, S counts only the new ones.
        """
        steps = tokens.shape[2]
        total = steps + (past[0][0].shape[2] if past else 0)
        x = self.embed(tokens).flatten(0, 1)                                        # (B * P, S, d)
        buckets = relative_buckets(steps, total, False).to(x.device)
        future = torch.full((steps, total), -torch.inf, device=x.device).triu(total - steps + 1)
        bias = (self.decoder_bias(buckets).permute(2, 0, 1) + future).to(x.dtype)   # (H, S, S')
        cache = []
        for i, block in enumerate(self.decoder):
            x, present = block(x, bias, (*memory.layers[i], memory.bias), past[i] if past else None)
            cache.append(present)
        return self.dropout(self.decoder_norm(x)).view(*tokens.shape, -1), cache

    def code_logits(self, state: Tensor, level: int) -> Tensor:
        """States s_level (.., d) -> logits (.., C) of the next code, by T5's tied and scaled embeddings."""
        table = self.embedding.weight[1 + level * self.n_codes:1 + (level + 1) * self.n_codes]
        return (state * self.d_model ** -0.5) @ table.T.to(state.dtype)

    def log_flow(self, state: Tensor) -> Tensor:
        """States (.., d) -> log F (..), float32."""
        return self.flow(state).squeeze(-1).float()


# ================================================================================================= 5. trie


class Trie:
    """Which prefixes of codes are items: a tree in O(items) memory, its nodes numbered level by level.

    The children of node n are neighbours: first_child[n] .. first_child[n] + n_children[n] - 1, and code[c]
    leads to child c. path[i], L + 1 nodes, leads from the root, node 0, to item i. With three items of codes
    (0, 5), (2, 1), (0, 7) the root has the children 1 (code 0) and 2 (code 2), node 1 the leaves 3 (code 5)
    and 4 (code 7), node 2 the leaf 5 (code 1), and the paths are (0, 1, 3), (0, 2, 5), (0, 1, 4).
    """

    def __init__(self, codes: Tensor):
        """codes (N, L), rows all different; ValueError when two items share a path."""
        base, start, count, node = int(codes.max()) + 1, 0, 1, torch.zeros_like(codes[:, 0])
        path, code, first, n_children, self.width = [node], [node[:1]], [], [], []
        for column in codes.T:
            key, local = torch.unique((node - start) * base + column, return_inverse=True)
            n_children.append(torch.bincount(key // base, minlength=count))
            first.append(start + count + n_children[-1].cumsum(0) - n_children[-1])
            code.append(key % base)
            self.width.append(int(n_children[-1].max()))         # most children of any node of this level
            start, count = start + count, len(key)
            node = start + local
            path.append(node)
        if count != len(codes):
            raise ValueError(f"{len(codes)} items have only {count} different paths of codes")
        self.path, self.code = torch.stack(path, 1), torch.cat(code)
        self.first_child, self.n_children = torch.cat(first), torch.cat(n_children)
        self.first_leaf, self.leaf_item = start, torch.argsort(local)

    def children(self, node: Tensor, level: int) -> tuple[Tensor, Tensor]:
        """Nodes (..) of one level -> their children (.., width[level]), and which of those are real."""
        slot = torch.arange(self.width[level], device=node.device)
        real = slot < self.n_children[node][..., None]
        return self.first_child[node][..., None] + slot * real, real    # the first one where there is none

    def item(self, leaf: Tensor) -> Tensor:
        """Nodes (..) of the last level -> item ids (..)."""
        return self.leaf_item[leaf - self.first_leaf]

    def log_probs(self, logits: Tensor, node: Tensor, level: int) -> tuple[Tensor, Tensor]:
        """Logits (.., C) at nodes (..) -> children (.., width) and their log-probabilities, -inf if not real.

        Normalised over the codes that lead to an item: so the probabilities of all items sum to one, and
        trajectory balance has its optimum at p(y | x) = R(y) / Z(x) exactly. [ours]
        """
        child, real = self.children(node, level)
        allowed = logits.float().gather(-1, self.code[child])
        return child, allowed.masked_fill(~real, -torch.inf).log_softmax(-1)


# ========================================================================================= 6. trajectories


class Catalogue(NamedTuple):
    """All items as paths of codes."""
    codes: Tensor       # (N, L)
    tokens: Tensor      # (N + 1, L) the generator's tokens; the last row, of the padding, is 0
    trie: Trie
    semantic: int       # how many leading codes carry meaning: a last one that tells twins apart does not

    @classmethod
    def of(cls, codes: Tensor, semantic: int) -> Catalogue:
        """codes (N, L) -> Catalogue."""
        width = int(codes.max()) + 1
        tokens = 1 + codes + width * torch.arange(codes.shape[1], device=codes.device)
        return cls(codes, F.pad(tokens, (0, 0, 0, 1)), Trie(codes), semantic)


def path_log_probs(model: T5, catalogue: Catalogue, history: Tensor, items: Tensor) -> tuple[Tensor, Tensor]:
    """How likely each step of the paths of items (B, P) is, given histories (B, T).

    -> log_pf (B, P, L), [.., l] being log P_F(s_{l+1} | s_l), and log_flow (B, P, L) of s_0 .. s_{L-1}.
    """
    memory = model.encode(catalogue.tokens[history].flatten(1))
    state, _ = model.decode(F.pad(catalogue.tokens[items][..., :-1], (1, 0)), memory)
    path, log_pf = catalogue.trie.path[items], []
    for level in range(model.levels):
        node, logits = path[..., level], model.code_logits(state[..., level, :], level)
        _, log_probs = catalogue.trie.log_probs(logits, node, level)
        slot = path[..., level + 1] - catalogue.trie.first_child[node]
        log_pf.append(log_probs.gather(-1, slot[..., None]).squeeze(-1))
    return torch.stack(log_pf, -1), model.log_flow(state)


def curriculum_sample(scores: Tensor, pool: Tensor, exclude: Tensor, k: int, beta: float) -> Tensor:
    """K items per user, easy ones (low scores) at beta < 0, hard ones at beta > 0, any at 0 (Section 3.1).

    Gumbel top-K, a draw without replacement from softmax(beta * z), z the standardised score. [ours]: the
    temperature makes the paper's order soft, the pool makes a step cost O(B * M).
    scores (B, M) of the pool's items, pool (M,) ids, exclude (B, T) ids never drawn -> ids (B, k).
    """
    z = (scores - scores.mean(1, keepdim=True)) / scores.std(1, keepdim=True).clamp(min=1e-6)
    gumbel = -torch.empty_like(z).exponential_().log()
    clicked = (pool[:, None] == exclude[:, None]).any(-1)                           # (B, M)
    return pool[(beta * z + gumbel).masked_fill(clicked, -torch.inf).topk(k).indices]


@torch.no_grad()
def trajectories(sasrec: SASRec, cfg: Config, history: Tensor, target: Tensor,
                 progress: float) -> tuple[Tensor, Tensor]:
    """The observed item, then K unclicked ones: ids (B, P), and their collaborative scores r_cs (B, P).

    r_cs in [0, 1] is SASRec's score, min-max scaled over the catalogue for this user. [ours]
    history (B, T), target (B,), progress of the training in [0, 1].
    """
    items, scores = target[:, None], sasrec.scores(history)                         # (B, 1), (B, N)
    if cfg.sampler != "none":
        pool = torch.randperm(scores.shape[1], device=scores.device)[:cfg.pool]
        beta = cfg.hardness * (2 * progress - 1) if cfg.sampler == "curriculum" else 0.0
        clicked = torch.cat([history, items], 1)
        items = torch.cat([items, curriculum_sample(scores[:, pool], pool, clicked, cfg.k, beta)], 1)
    low, high = scores.amin(1, keepdim=True), scores.amax(1, keepdim=True)
    return items, (scores.gather(1, items) - low) / (high - low).clamp(min=1e-6)


# =============================================================================================== 7. reward


def reward(r_aug: Tensor, r_cs: Tensor, r_sim: Tensor, parts: str = "aug,cf,sim") -> Tensor:
    """R = r_aug + r_cs + r_sim (Section 3.2), each (B, P) in [0, 1]: was the item clicked, how does the
    collaborative model score it, what share of its codes does it have in common with the clicked item."""
    terms = {"aug": r_aug, "cf": r_cs, "sim": r_sim}
    return sum(terms[part] for part in parts.split(","))


def shared_codes(codes: Tensor) -> Tensor:
    """r_sim: at which share of the positions the codes (B, P, L) equal those of the first path -> (B, P)."""
    return (codes == codes[:, :1]).float().mean(-1)


def confidence(r_aug: Tensor, r_cs: Tensor) -> Tensor:
    """Eq. 8, w = 1 - |r_aug - r_cs|: little where the click and the collaborative model disagree. (B, P)."""
    return 1 - (r_aug - r_cs).abs()


# =========================================================================================== 8. objectives


def sft(log_pf: Tensor) -> Tensor:
    """Eq. 1: -sum_l log p(y_l | x, y_<l). log_pf (.., L) of observed paths -> (..)."""
    return -log_pf.sum(-1)


def detailed_balance(log_pf: Tensor, log_flow: Tensor, log_reward: Tensor) -> Tensor:
    """Eq. 5: sum_l (log F(s_{l-1}) + log P_F(s_l | s_{l-1}) - log F(s_l))^2 with log F(s_L) = log R.

    log_pf, log_flow (.., L), log_reward (..) -> (..).
    """
    flow_out = torch.cat([log_flow[..., 1:], log_reward[..., None]], -1)
    return (log_flow + log_pf - flow_out).square().sum(-1)


def trajectory_balance(log_pf: Tensor, log_flow: Tensor, log_reward: Tensor) -> Tensor:
    """Eq. 6: (log Z + sum_l log P_F(s_l | s_{l-1}) - log R)^2 with log Z = log F(s_0). [ours]: the rewards of
    two users do not sum to the same number, so Z is the user's. log_pf, log_flow (.., L), log_reward (..)."""
    return (log_flow[..., 0] + log_pf.sum(-1) - log_reward).square()


class Method(NamedTuple):
    """A fine-tuning method: the objective on the trajectories, observed and augmented ones."""
    objective: Callable | None  # (log_pf, log_flow, log_reward) -> (B, P) of the 1 + K paths, added to SFT
    cost: float                 # time of its training step over SFT's, measured on two cores (README)


METHODS = {
    "sft": Method(None, 1.0),
    "db": Method(detailed_balance, 1.5),
    "tb": Method(trajectory_balance, 1.5),
}


def method_loss(model: T5, sasrec: SASRec, catalogue: Catalogue, cfg: Config, history: Tensor, target: Tensor,
                progress: float) -> Tensor:
    """Eq. 7: L_SFT + lambda * sum over {observed, K augmented} of w * L_GFN, its mean over B -> scalar.

    history (B, T), target (B,), progress in [0, 1]. No gradient reaches SASRec or the reward.
    """
    method = METHODS[cfg.loss]
    if method.objective is None:
        return sft(path_log_probs(model, catalogue, history, target[:, None])[0][:, 0]).mean()
    items, r_cs = trajectories(sasrec, cfg, history, target, progress)              # (B, P)
    r_aug = (items == target[:, None]).float()
    r_sim = shared_codes(catalogue.codes[items][..., :catalogue.semantic])
    log_reward = reward(r_aug, r_cs, r_sim, cfg.reward).clamp(min=cfg.reward_floor).log()
    weight = confidence(r_aug, r_cs) if cfg.confidence else torch.ones_like(r_cs)
    log_pf, log_flow = path_log_probs(model, catalogue, history, items)
    log_z = 10 * model.scalar_z if cfg.z == "scalar" else log_flow[:, :1, :1]   # one, whatever dropout says
    log_flow = torch.cat([log_z.expand_as(log_flow[..., :1]), log_flow[..., 1:]], -1)
    balance = method.objective(log_pf, log_flow, log_reward)                        # (B, P)
    return (sft(log_pf[:, 0]) + cfg.lam * (weight * balance).sum(1)).mean()


# ============================================================================================= 9. training


def compute_type(device: torch.device, wanted: str) -> torch.dtype:
    """The type of the matrix products: what is wanted, else bf16 where the processor has it, else fp16 on
    CUDA and float32 on a CPU. Raises DataError for fp16 on a CPU."""
    if wanted == "fp16" and device.type == "cpu":
        raise DataError("--precision fp16 needs a GPU; use bf16 or fp32 on a CPU")
    if wanted != "auto":
        return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[wanted]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    with contextlib.suppress(OSError):          # only Linux tells; float32 is right everywhere
        if re.search(r"\b(amx_bf16|avx512_bf16)\b", Path("/proc/cpuinfo").read_text()):
            return torch.bfloat16
    return torch.float32


def mixed_precision(device: torch.device, dtype: torch.dtype):
    """Autocast of matrix products to `dtype`; weights, losses and the optimiser stay float32."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def length_batches(lengths: Tensor, batch: int, steps: int) -> Iterator[Tensor]:
    """Rows (B,) of `steps` batches, each of histories of almost equal length, so that little is padded. Which
    rows of a length go together, and in which order the batches come, changes every epoch."""
    while steps > 0:
        chunks = torch.argsort(lengths + torch.rand(len(lengths), device=lengths.device)).split(batch)
        for i in torch.randperm(len(chunks))[:steps].tolist():
            yield chunks[i]
        steps -= len(chunks)


def schedule(progress: float, warmup: float = 0.05) -> float:
    """Factor of the learning rate at progress in [0, 1]: a linear warm-up, then a cosine down to zero."""
    return min(progress / warmup, 0.5 * (1 + math.cos(math.pi * progress)))


def fit(model: nn.Module, title: str, loss_of: Callable, batches: Iterator[Tensor], steps: int,
        optimiser: torch.optim.Optimizer, log: Callable, dtype: torch.dtype = torch.float32,
        evaluations: int = 0, validate: Callable | None = None,
        after: Callable = lambda step: None) -> dict[str, Tensor]:
    """Train any model of this file: the one loop for all of them.

    loss_of(rows, progress) -> scalar; validate() -> metrics, of which N@10 chooses the state that is returned
    (the last one without validation); after(step) runs behind every step. Raises DataError: loss not finite.
    """
    device, peak = next(model.parameters()).device, optimiser.param_groups[0]["lr"]
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    checks = {round(steps * (i + 1) / evaluations) for i in range(evaluations)}
    best, best_score, metrics = None, -1.0, {}
    with tqdm(desc=title, total=steps, unit="step", disable=None, leave=False) as bar:
        for step, rows in enumerate(batches, 1):
            optimiser.param_groups[0]["lr"] = peak * schedule(step / steps)
            model.train()
            with mixed_precision(device, dtype):
                loss = loss_of(rows, step / steps)
            scaler.scale(loss).backward()
            scaler.unscale_(optimiser)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimiser)
            scaler.update()
            optimiser.zero_grad(set_to_none=True)
            after(step)
            if step in checks:
                metrics = validate()
                if metrics["N@10"] > best_score:
                    best, best_score = copy_state(model), metrics["N@10"]
            if step % 50 == 0 or step in checks or step == steps:       # not always: it waits for the device
                if not math.isfinite(value := loss.item()):
                    raise DataError(f"{title}: the loss is {value} at step {step}; lower rates or weights")
                log({"step": step, "loss": value, **(metrics if step in checks else {})})
                if bar.disable and step in checks:                              # piped output has no bar
                    print(f"  {title} step {step:,} of {steps:,}: loss {value:.3f}, "
                          f"valid N@10 {metrics['N@10']:.4f}", flush=True)
                speed = f"{step * len(rows) / max(bar.format_dict['elapsed'], 1e-9):,.0f}"
                latest = {"valid N@10": f"{metrics['N@10']:.4f}"} if metrics else {}
                bar.set_postfix({"loss": f"{value:.3f}", "rows/s": speed, **latest})
            bar.update()
    return best or copy_state(model)


def copy_state(model: nn.Module) -> dict[str, Tensor]:
    """A copy of a model's weights on the CPU."""
    return {name: weight.detach().cpu().clone() for name, weight in model.state_dict().items()}


# =================================================================================== 10. decoding, metrics


@torch.no_grad()
def beam_search(model: T5, catalogue: Catalogue, history: Tensor, beam: int) -> tuple[Tensor, Tensor]:
    """The most likely items that W beams find for histories (B, T): ids (B, W), best first, and their log p.

    All users and all beams step together. A beam walks along the trie, so it ends at an item; where the
    catalogue has fewer items than beams, the rest of the row is N with -inf.
    """
    trie, users = catalogue.trie, torch.arange(len(history), device=history.device)[:, None]
    memory = model.encode(catalogue.tokens[history].flatten(1))
    token = node = torch.zeros_like(users)
    score, past = torch.zeros(users.shape, device=history.device), None
    for level in range(model.levels):
        state, past = model.decode(token[..., None], memory, past)
        logits = model.code_logits(state[..., 0, :], level)
        child, log_probs = trie.log_probs(logits, node, level)                      # (B, W, width)
        total = (score[..., None] + log_probs).flatten(1)
        score, best = total.topk(min(beam, total.shape[1]))
        parent = (users * node.shape[1] + best // child.shape[-1]).flatten()        # the beams that go on
        past = [(keys[parent], values[parent]) for keys, values in past]
        node = child.flatten(1).gather(1, best)
        token = 1 + level * model.n_codes + trie.code[node]
    n_items, missing = len(catalogue.codes), beam - score.shape[1]
    items = trie.item(node).masked_fill(score == -torch.inf, n_items)
    return F.pad(items, (0, missing), value=n_items), F.pad(score, (0, missing), value=-torch.inf)


def ranking_metrics(recommended: Tensor, target: Tensor) -> dict[str, float]:
    """R@k, the share of users whose next item is among the first k, and N@k, the mean of 1 / log2(1 + rank).

    recommended (U, W) item ids, best first; target (U,).
    """
    hit = (recommended == target[:, None]).double()
    gain = hit / torch.log2(torch.arange(hit.shape[1], device=hit.device).double() + 2)
    return {**{f"R@{k}": hit[:, :k].sum(1).mean().item() for k in (1, 5, 10, 20)},
            **{f"N@{k}": gain[:, :k].sum(1).mean().item() for k in (5, 10, 20)}}


# ================================================================================================ 11. main

NEEDS = {  # stage -> the groups of settings that its result depends on: the key of its cache
    "vectors": ("data", "vectors"),
    "codes": ("data", "vectors", "codes"),
    "sasrec": ("data", "training", "sasrec"),
    "sft": ("data", "vectors", "codes", "training", "sft"),
    "finetune": ("data", "vectors", "codes", "training", "sasrec", "sft", "finetune"),
}


class Run(datasets.Stages):
    """One command: its settings, device and data, and its stages, each of them done once and then kept."""

    def __init__(self, cfg: Config):
        if cfg.device.startswith("cuda") and int(cfg.device[5:] or 0) >= torch.cuda.device_count():
            raise DataError(f"--device {cfg.device}: torch sees no such device; use --device cpu")
        self.device = torch.device(cfg.device if cfg.device != "auto"
                                   else "cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = compute_type(self.device, cfg.precision)
        self.data = datasets.load(cfg.dataset, Path(cfg.data_dir), cfg.seed)
        if self.data.offsets.diff().max() < 4:
            raise DataError(f"{self.data.name}: no user has the 4 interactions that a training pair needs")
        unclicked = min(cfg.pool, self.data.n_items) - cfg.max_history - 1
        if METHODS[cfg.loss].objective and cfg.sampler != "none" and cfg.k > unclicked:
            raise DataError(f"--k {cfg.k}: only {max(unclicked, 0)} items of a pool are surely unclicked; "
                            "change --k, --max-history or --pool, or use --sampler none")
        cfg = dataclasses.replace(cfg, precision=str(self.dtype)[6:], item_vectors="" if cfg.codes
                                  else cfg.item_vectors)
        super().__init__(cfg, NEEDS, self.data)
        self.parts = {part: examples.to(self.device)
                      for part, examples in datasets.split(self.data, cfg.max_history).items()}
        order = torch.randperm(self.data.n_users, generator=torch.Generator().manual_seed(cfg.seed))
        self.valid_rows = order[:cfg.valid_users].sort().values.to(self.device)

    @torch.no_grad()
    def score(self, model: nn.Module, recommend: Callable, part: str, rows: Tensor | None = None) -> dict:
        """Item-level metrics of a model's recommendations (histories -> ids (B, 20)) for users of a part."""
        examples, found = self.parts[part], []
        rows = torch.arange(len(examples), device=self.device) if rows is None else rows
        order = torch.argsort((examples.end - examples.start)[rows], stable=True)
        model.eval()
        with mixed_precision(self.device, self.dtype):
            for chunk in tqdm(rows[order].split(256), desc=f"scoring: {part}", disable=None, leave=False):
                found.append(recommend(examples.batch(chunk)[0]))
        recommended = torch.cat(found)[torch.argsort(order)]
        metrics = ranking_metrics(recommended, examples.items[examples.end[rows]])
        if self.data.liked is not None and len(rows) == self.data.n_users:
            metrics["liked"] = datasets.liked_unseen(recommended, self.data)
        return metrics

    def train(self, stage: str, model: nn.Module, recommend: Callable, loss_of: Callable,
              batches: Iterator[Tensor], steps: int, optimiser: torch.optim.Optimizer, log: Callable) -> dict:
        """Fit a recommender, choose its state on validation users, score all of them and, once, the test."""
        state = fit(model, stage, loss_of, batches, steps, optimiser, log, self.dtype, self.cfg.evaluations,
                    lambda: self.score(model, recommend, "valid", self.valid_rows))
        model.load_state_dict(state)
        result = {"state": state}
        for part in ("valid", "test"):
            result[part] = self.score(model, recommend, part)
            log({"scored": part})
        return result


def train_codes(run: Run, vectors: Tensor, log: Callable) -> dict:
    """Train the RQ-VAE on item vectors (N, d_in) and read off every item's codes."""
    cfg, steps = run.cfg, run.cfg.code_epochs * math.ceil(len(vectors) / 1024)
    model = RQVAE(vectors.shape[1], cfg.levels, cfg.codebook_size, cfg.code_dim, cfg.commitment)
    model.to(run.device)
    with torch.no_grad():
        model.quantiser.initialise(model.encoder(vectors))

    def restart(step: int) -> None:
        if step % max(steps // 15, 1) == 0 and step < 0.8 * steps:  # afterwards the codes must come to rest
            with torch.no_grad():
                model.quantiser.restart_dead_codes(model.encoder(vectors))

    batches = length_batches(torch.zeros(len(vectors), device=run.device), 1024, steps)
    optimiser = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.0, fused=True)
    fit(model, "codes", lambda rows, _: model(vectors[rows])[0], batches, steps, optimiser, log,
        after=restart)
    with torch.no_grad():
        loss, (codes, *_) = model(vectors)
    figures = {"loss": loss.item(), "collision_rate": 1 - len(codes.unique(dim=0)) / len(codes),
               "usage": [len(column.unique()) / cfg.codebook_size for column in codes.T]}
    return {"codes": unique_paths(codes).cpu(), "semantic": cfg.levels, "figures": figures}


def item_codes(run: Run) -> Catalogue:
    """Stages 1 and 2: item vectors, then every item as a unique path of codes, by our RQ-VAE or from --codes.
    The codes are also written in LETTER's format, so that others can use them."""
    cfg, data = run.cfg, run.data

    def given(log) -> dict:
        codes = datasets.read_codes(Path(cfg.codes), data.n_items)
        unique = len(codes.unique(dim=0)) == len(codes)
        return {"codes": codes if unique else unique_paths(codes), "semantic": codes.shape[1]}

    def learnt(log) -> dict:
        vectors = run.stage("vectors", lambda log: {
            "vectors": datasets.read_vectors(Path(cfg.item_vectors), data.n_items) if cfg.item_vectors
            else datasets.text_vectors(data.texts, cfg.vector_dim, cfg.seed)})["vectors"]
        return train_codes(run, vectors.to(run.device), log)

    result = run.stage("codes", given if cfg.codes else learnt)
    index = run.folder("codes") / f"{data.name}.index.json"
    if not index.exists():
        datasets.write_atomically(index, datasets.format_codes(result["codes"]).encode())
    return Catalogue.of(result["codes"].to(run.device), result["semantic"])


def train_sasrec(run: Run) -> SASRec:
    """Stage 3: the collaborative model, trained on every user's training sequence and frozen from then on."""
    cfg = run.cfg
    length = max(cfg.sasrec_length, cfg.max_history)    # else positions that are used would not be trained
    torch.manual_seed(cfg.seed)
    model = SASRec(run.data.n_items, cfg.sasrec_dim, cfg.sasrec_layers, cfg.sasrec_heads, cfg.sasrec_dropout,
                   length).to(run.device)

    def build(log) -> dict:
        train = datasets.split(run.data, length)["train"].to(run.device)
        whole = F.pad(train.user.diff() != 0, (0, 1), value=True).nonzero()[:, 0]   # each user's last pair
        steps = cfg.sasrec_epochs * math.ceil(len(whole) / cfg.sasrec_batch)
        batches = length_batches((train.end - train.start)[whole], cfg.sasrec_batch, steps)
        optimiser = torch.optim.AdamW(model.parameters(), cfg.sasrec_lr, weight_decay=cfg.weight_decay,
                                      fused=True)
        return run.train("sasrec", model, lambda history: datasets.top(model.scores(history), 20),
                         lambda rows, _: model.loss(*train.batch(whole[rows])), batches, steps,
                         optimiser, log)

    state = run.stage("sasrec", build)["state"]
    return datasets.load_state(model, state, run.folder("sasrec")).requires_grad_(False)


def train_generator(run: Run, stage: str, catalogue: Catalogue, sasrec: SASRec, initial: dict) -> T5:
    """Stages 4 and 5: SFT of a fresh generator; fine-tuning by --loss from its state, `initial`."""
    cfg = run.cfg if stage == "finetune" else dataclasses.replace(run.cfg, loss="sft", from_scratch=True)
    torch.manual_seed(cfg.seed)
    model = T5(catalogue.codes.shape[1], int(catalogue.codes.max()) + 1, cfg.d_model, cfg.heads, cfg.d_kv,
               cfg.d_ff, cfg.layers, cfg.dropout).to(run.device)

    def build(log) -> dict:
        train, epochs = run.parts["train"], cfg.finetune_epochs if stage == "finetune" else 0
        if cfg.from_scratch:
            epochs += cfg.sft_epochs
        else:
            datasets.load_state(model, initial, run.folder("sft"))
        steps = max(1, round(epochs * math.ceil(len(train) / cfg.batch) / METHODS[cfg.loss].cost))
        # T5's own optimiser: its steps are relative to a weight's size, 1 in an embedding, 0.05 in a matrix.
        optimiser = torch.optim.Adafactor(model.parameters(), cfg.lr if cfg.from_scratch else cfg.finetune_lr,
                                          weight_decay=cfg.weight_decay)
        return run.train(
            cfg.loss, model, lambda history: beam_search(model, catalogue, history, cfg.beam)[0],
            lambda rows, progress: method_loss(model, sasrec, catalogue, cfg, *train.batch(rows), progress),
            length_batches(train.end - train.start, cfg.batch, steps), steps, optimiser, log)

    return datasets.load_state(model, run.stage(stage, build)["state"], run.folder(stage))


PAPER_R10 = {("beauty", "SFT"): 0.0558, ("beauty", "then tb"): 0.0651,     # Table 1, TIGER
             ("yelp", "SFT"): 0.0334, ("yelp", "then tb"): 0.0404}


def results_table(run: Run) -> str:
    """Test metrics of popularity, SASRec, SFT and the method; the paper's R@10 of its Table 1 (TIGER)."""
    top = datasets.top(datasets.popularity(run.data)[None], 20)
    target = run.data.items[run.data.offsets[1:] - 1]
    rows = [("popularity", ranking_metrics(top.expand(len(target), -1), target), {})]
    rows += [(label, run.results[stage]["test"], run.results[stage]) for label, stage in
             (("SASRec", "sasrec"), ("SFT", "sft"), (f"then {run.cfg.loss}", "finetune"))]
    names = list(rows[1][1])
    table = [["test", *names, "valid R@10", "paper R@10", "seconds"]]
    for label, test, result in rows:
        paper = PAPER_R10.get((run.cfg.dataset, label))
        cells = [test.get(name) for name in names] + [result.get("valid", {}).get("R@10"), paper]
        table.append([label, *("" if value is None else f"{value:.4f}" for value in cells),
                      f"{result['seconds']:.0f}" if result else ""])
    return datasets.aligned(table)


def run_all(cfg: Config) -> str:
    """All stages in order, each one kept; returns the table of results."""
    run = Run(cfg)
    print(f"{run.data.name}: {run.data.n_users:,} users, {run.data.n_items:,} items, "
          f"{len(run.parts['train']):,} training pairs; {run.device}, {run.cfg.precision}, seed {cfg.seed}",
          flush=True)
    catalogue = item_codes(run)
    sasrec = train_sasrec(run)
    start = train_generator(run, "sft", catalogue, sasrec, {})
    train_generator(run, "finetune", catalogue, sasrec, start.state_dict())
    return results_table(run)


def check(cfg: Config) -> Config:
    """The settings, if they make sense together. Raises DataError."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", cfg.device):
        raise DataError(f"--device {cfg.device} is not auto, cpu, cuda or cuda:N")
    parts = cfg.reward.split(",")
    if not set(parts) <= {"aug", "cf", "sim"} or len(set(parts)) != len(parts):
        raise DataError(f"--reward {cfg.reward} must name any of aug, cf, sim, once each, commas between")
    if cfg.reward_floor < 1e-30:
        raise DataError(f"--reward-floor {cfg.reward_floor} must be above 0, for the log of a reward of 0")
    if cfg.sasrec_dim % cfg.sasrec_heads:
        raise DataError(f"--sasrec-dim {cfg.sasrec_dim} is no multiple of --sasrec-heads {cfg.sasrec_heads}")
    return cfg


def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit code: 0, 1 for bad input, 130 for Ctrl-C (and 2 for a wrong flag)."""
    try:
        settings = datasets.command_line(Config, PRESETS, argv, "gflowgr.py", __doc__.splitlines()[0])
        print(run_all(check(settings)))
        return 0
    except (DataError, OSError, MemoryError, RuntimeError) as error:
        print(datasets.explain(error), file=sys.stderr)
    except KeyboardInterrupt:
        print("\nstopped: finished stages are kept, the same command goes on after them", file=sys.stderr)
        return 130
    return 1


if __name__ == "__main__":
    sys.exit(main())
