"""GFlowGR in one file: fine-tuning generative recommenders by generative flow networks (arXiv 2506.16114v1).

A generative recommender writes an item as a short path of codes, so it is a policy on a tree whose leaves are
the items. Trained on clicks alone (SFT), it takes all else for negative. GFlowGR adds paths of unclicked
items, chosen from easy to hard by a collaborative model, rewards each path, and adds a loss that is zero
where the probability of each path is its share of all reward:

    item text --TF-IDF, SVD--> vectors --RQ-VAE--> codes ------------------------------+
    histories --SASRec--> scores --curriculum--> K unclicked items --> reward, weight -+-> DB / TB loss -> T5
    recommendations <-- beam search over the trie of all items' codes <----------------------------------- T5

    python gflowgr.py --loss tb                       a toy world, nothing to download
    python gflowgr.py --loss tb --dataset beauty      Amazon Beauty, all stages

Beauty, LETTER's codes, test R@10, 3 seeds, n = 22,363, H200: SASRec 0.0728, SFT 0.0657, then TB 0.0654.

Shapes, everywhere (S, S': tokens and keys of one call):
    B  rows, or histories       T  items in a history      N  items in the catalogue     U  users
    P  paths per history: 1 observed + K augmented         L  codes per item             C  codes per level
    W  beams                    d  width of a vector       H  attention heads            M  memory's tokens
    Q  histories of one row, which is cut at Q places, else 1 (what is per history has B * Q for B)
The id N pads short histories. A trajectory y = (y_1 .. y_L) walks s_0 -> s_1 -> .. -> s_L down a tree: every
state has one parent, so log P_B = 0, and P_F(s_l | s_{l-1}) is the generator's p(y_l | x, y_<l).
"""
from __future__ import annotations

import copy
import dataclasses
import itertools
import math
from typing import Callable, Iterator, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn, optim

import data as datasets
from data import DataError, Journal, Run, knob


# ============================================================================================= 1. settings

@dataclasses.dataclass(frozen=True)
class Config(datasets.RunSettings):
    """What flags set, beside data.py's. [paper]: as the paper, TIGER or LETTER has it; [ours]: our choice."""
    backbone: str = knob("tiger", "backbone", "TIGER's RQ-VAE, or LETTER's", ("tiger", "letter"))
    codes: str = knob("", "backbone", "ready codes: a NAME.index.json; letter: those that LETTER published")
    levels: int = knob(3, "codes", "codebooks, LETTER: 4; one more code tells twins apart [paper]", below=26)
    codebook_size: int = knob(256, "codes", "codes per level, C [paper]")
    code_dim: int = knob(32, "codes", "dimensions of a code vector [paper]")
    commitment: float = knob(0.25, "codes", "weight of the commitment loss [paper]")
    code_epochs: int = knob(250, "codes", "passes of the RQ-VAE over the items [ours]")
    alignment: float = knob(0.1, "letter", "weight of alignment with SASRec; LETTER's script: 0.01 [ours]")
    even_codes: float = knob(1e-4, "letter", "weight of LETTER's diversity of codes [paper]")
    temperature: float = knob(0.7, "temperature", "of LETTER's softmax, 0.7 to 1 [paper]", low=0.01)
    max_history: int = knob(20, "training", "items of a history that the models see [paper]")
    weight_decay: float = knob(0.01, "training", "decoupled weight decay of SASRec and the generator [ours]")
    sasrec_dim: int = knob(128, "sasrec", "width of SASRec [ours]")
    sasrec_layers: int = knob(2, "sasrec", "layers of SASRec [ours]")
    sasrec_heads: int = knob(2, "sasrec", "attention heads of SASRec [ours]")
    sasrec_dropout: float = knob(0.4, "sasrec", "dropout of SASRec [ours]", below=1)
    sasrec_length: int = knob(50, "sasrec", "items of a window in SASRec's training, >= max_history [ours]")
    sasrec_batch: int = knob(768, "sasrec", "targets in a SASRec batch, at most, or one row [ours]")
    sasrec_lr: float = knob(1e-3, "sasrec", "peak learning rate of SASRec [ours]")
    sasrec_pool: int = knob(50_000, "sasrec", "items a step ranks; of a larger catalogue, a sample [ours]")
    sasrec_epochs: int = knob(30, "sasrec", "passes over the users' sequences [ours]")
    d_model: int = knob(128, "sft", "width of the generator, d [paper]")
    heads: int = knob(4, "sft", "attention heads, H; TIGER has 6 [ours]")
    d_kv: int = knob(32, "sft", "dimensions of a head; TIGER has 64 [ours]")
    d_ff: int = knob(512, "sft", "width of the feed-forward layers; TIGER has 1024 [ours]")
    layers: int = knob(3, "sft", "layers of the encoder, and of the decoder; TIGER has 4 [ours]")
    dropout: float = knob(0.1, "sft", "dropout of the generator [paper]", below=1)
    beam: int = knob(20, "sft", "beams of the constrained search, W; R@20 needs 20 [paper]", low=20)
    encoder: str = knob("causal", "sft", "items see those before [ours], or all [paper]", ("causal", "full"))
    softmax: str = knob("trie", "sft", "over codes leading to items [ours], or all [paper]", ("trie", "all"))
    batch: int = knob(256, "sft", "targets in a batch, at most, or one row [ours]")
    lr: float = knob(0.02, "sft", "peak rate of AdamW, relative to a weight's size [ours]")
    sft_epochs: float = knob(20.0, "sft", "passes over the training pairs by SFT [ours]", low=0.001)
    loss: str = knob("tb", "finetune", "fine-tuning method; sft goes on with SFT",
                     ("sft", "db", "tb", "dpo", "sdpo", "sprec", "ipa", "ppo", "grpo", "smooth", "exact"))
    from_scratch: bool = knob(False, "finetune", "fine-tune an untrained generator, for both trainings' time")
    finetune_epochs: float = knob(3.0, "finetune", "length: the time of so many SFT passes [ours]", low=1e-3)
    finetune_lr: float = knob(0.003, "finetune", "peak rate of AdamW in the fine-tuning [ours]")
    lam: float = knob(0.01, "lambda", "lambda of Eq. 7, weight of what tb, db and ipa add [ours]")
    share: float = knob(0.125, "share", "share of targets with further paths [ours]", low=1e-3, below=1.001)
    pool: int = knob(512, "pool", "random items that unclicked ones are chosen from, per batch [ours]")
    reward: str = knob("aug,cf,sim", "reward", "parts of the reward [paper]",
                       ("aug,cf,sim", "aug,cf", "aug,sim", "cf,sim", "aug", "cf", "sim"))
    scale: str = knob("minmax", "reward", "of r_cs: min-max, or softmax [ours]", ("minmax", "softmax"))
    k: int = knob(4, "gflownet", "augmented trajectories beside the observed one, K [ours]")
    sampler: str = knob("curriculum", "gflownet", "of augmented items", ("curriculum", "random", "none"))
    easiest: float = knob(-3.0, "gflownet", "beta of the curriculum at the start [ours]", low=-100)
    hardest: float = knob(3.0, "gflownet", "beta of the curriculum at the end [ours]", low=-100)
    confidence: bool = knob(True, "gflownet", "weight each trajectory by Eq. 8 [paper]")
    z: str = knob("user", "gflownet", "one Z for each user [ours], or a scalar [paper]", ("user", "scalar"))
    smoothing: float = knob(0.1, "smoothing", "share of SFT's target that smooth and exact spread", below=1)
    beta: float = knob(1.0, "beta", "beta of dpo, sdpo and ipa [paper]")
    negatives: int = knob(3, "negatives", "random negatives of sdpo [paper]")
    sprec_beta: float = knob(0.1, "sprec", "beta of sprec [paper]")
    iterations: int = knob(5, "sprec", "self-play iterations of sprec, of two steps or more [paper]")
    group: int = knob(16, "policy", "draws from the policy for each history, of ppo and grpo [paper]", low=2)
    clip: float = knob(0.2, "policy", "how far the ratio of ppo and grpo may leave 1 [paper]")
    kl: float = knob(1e-3, "policy", "weight of the KL to the reference in ppo and grpo [paper]")


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
    centres = points[torch.randint(len(points), (k,), device=points.device)]
    for _ in range(iterations):                     # of two equal centres one stays empty, and so moves on
        nearest = torch.cdist(points, centres).argmin(1)
        count = torch.bincount(nearest, minlength=k)[:, None]
        total = torch.zeros_like(centres).index_add_(0, nearest, points)
        others = points[torch.randint(len(points), (k,), device=points.device)]
        centres = torch.where(count > 0, total / count.clamp(min=1), others)
    return centres


class ResidualQuantiser(nn.Module):
    """Codebooks of C vectors, one per level; each quantises what the levels before it left (TIGER, 3.1)."""

    def __init__(self, levels: int, size: int, dim: int, commitment: float = 0.25):
        super().__init__()
        self.codebooks = nn.Parameter(torch.randn(levels, size, dim))
        self.register_buffer("clusters", torch.zeros(levels, size, dtype=torch.long))     # even_codes_loss
        self.commitment = commitment

    @torch.no_grad()
    def initialise(self, x: Tensor) -> None:
        """Set the codebooks to k-means centres of the residuals of x (n, d), level by level."""
        for codebook in self.codebooks:
            codebook.copy_(kmeans(x, len(codebook)))
            x = x - codebook[torch.cdist(x, codebook).argmin(1)]

    @torch.no_grad()
    def restart_dead_codes(self, x: Tensor) -> None:
        """Move each code that no row of x (n, d) uses to the residual of a random row."""
        codes, _, _, residuals = self(x)
        for codebook, chosen, residual in zip(self.codebooks, codes.T, residuals):
            dead = torch.bincount(chosen, minlength=len(codebook)) == 0
            codebook[dead] = residual[torch.randint(len(x), (int(dead.sum()),), device=x.device)]

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
        self.encoder, self.decoder = (nn.Sequential(*[
            layer for pair in zip(w, w[1:]) for layer in (nn.Linear(*pair), nn.ReLU())][:-1])
            for w in (widths, widths[::-1]))
        self.quantiser = ResidualQuantiser(levels, size, dim, commitment)

    def forward(self, x: Tensor) -> tuple[Tensor, Quantised]:
        """x (B, d_in) -> loss (scalar): reconstruction + quantisation; and the quantised batch."""
        quantised = self.quantiser(self.encoder(x))
        return F.mse_loss(self.decoder(quantised.value), x) + quantised.loss, quantised


def alignment_loss(value: Tensor, collaborative: Tensor) -> Tensor:
    """LETTER's alignment: each quantised item (B, d) must find its own frozen vector (B, d) -> scalar."""
    return F.cross_entropy(value @ collaborative.detach().T, torch.arange(len(value), device=value.device))


def even_codes_loss(codebook: Tensor, cluster: Tensor, codes: Tensor) -> Tensor:
    """LETTER's diversity: pulls each chosen code to a random one of its cluster and pushes it off all others,
    so that codes are used evenly -> scalar. codebook (C, d), cluster (C,), codes (B,)."""
    own = F.one_hot(codes, len(codebook)).bool()                                    # (B, C)
    partner = (cluster[codes][:, None] == cluster) & ~own
    label = torch.rand(own.shape, device=own.device).masked_fill(~partner, -1).argmax(1)
    label = label.masked_fill(~partner.any(1), -100)                                # alone: left out
    logits = (codebook[codes] @ codebook.T).masked_fill(own, -torch.inf)
    return F.cross_entropy(logits, label, reduction="sum") / len(codes)


def unique_paths(codes: Tensor) -> Tensor:
    """Append a code that counts items of equal codes: (N, L) -> (N, L + 1), all rows different (TIGER)."""
    _, group = torch.unique(codes, dim=0, return_inverse=True)
    order = torch.argsort(group, stable=True)                   # equal codes side by side, by item id
    size, last = torch.bincount(group), torch.empty_like(group)
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
        """History (B, T), padded on the right -> states (B, T, d). State t has seen the items 0 .. t only."""
        length = history.shape[1]
        x = self.dropout(self.item(history) + self.position.weight[:length])
        mask = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        for block in self.blocks:
            x = block(x, src_mask=mask, is_causal=True)
        return self.norm(x)

    def scores(self, history: Tensor, ends: Tensor | None = None) -> Tensor:
        """History (B, T), none empty -> each item's score as the next one (B, N), float32: in bf16 the best
        would tie; or (B * Q, N), for the Q histories of a row that end at the places `ends` (Q,)."""
        rows = torch.arange(len(history), device=history.device)[:, None]
        last = (history != self.item.padding_idx).sum(1, keepdim=True) - 1
        state = self(history)[rows, last if ends is None else ends].flatten(0, 1).float()
        with torch.autocast(state.device.type, enabled=False):
            return state @ self.item.weight[:-1].T

    def loss(self, history: Tensor, target: Tensor, pool: int) -> Tensor:
        """Cross-entropy of the next item over the whole catalogue, at every position -> scalar. [ours]: the
        original draws one negative per item; the full softmax is stronger. Of a catalogue of more than `pool`
        items, that many random ones stand for the rest. history, target (B, T)."""
        state, label, n_items = self(history).flatten(0, 1), target.flatten(), self.item.padding_idx
        if pool >= n_items:
            logits = state @ self.item.weight[:-1].T                                # (B * T, N)
        else:
            others = torch.randint(n_items, (pool,), device=state.device)
            own = (state * self.item(label)).sum(-1, keepdim=True)
            wrong = (state @ self.item(others).T).masked_fill(others == label[:, None], -torch.inf)
            logits, label = torch.cat([own, wrong], 1), label.masked_fill(label < n_items, 0)   # 0: own
        return F.cross_entropy(logits.float(), label, ignore_index=n_items)


# =================================================================================================== 4. T5

class Dropout(nn.Module):
    """Dropout whose mask is a window, at a random place, of one long strip of masks, shared by all layers: on
    a CPU, drawing one random number per element costs more than the layer that it follows."""

    def __init__(self, p: float):
        super().__init__()
        self.p, self.strip = p, torch.empty(0)

    def forward(self, x: Tensor, onto: Tensor | None = None) -> Tensor:
        """dropout(x), added to `onto` where that is given."""
        if not self.training or self.p == 0 or x.device.type != "cpu" or torch.compiler.is_compiling():
            x = F.dropout(x, self.p, self.training)
            return x if onto is None else onto + x
        places, size = 1 << 24, x.numel()
        if len(self.strip) < places + size or self.strip.dtype != x.dtype:
            noise = torch.rand(places + 2 * size, generator=torch.Generator().manual_seed(0))
            self.strip = (noise >= self.p).to(x.dtype) / (1 - self.p)       # longer: the same, and more
        mask = self.strip.narrow(0, int(torch.randint(places, ())), size).view(x.shape)     # 0 at a rate of p
        return x * mask if onto is None else torch.addcmul(onto, x, mask)


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps) * weight, in the type of x."""

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu":      # torch's own goes by way of float32; CUDA's autocast leaves it there
            return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * self.weight.to(x.dtype)
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), 1e-6).to(x.dtype)


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
        return self.kv(x).unflatten(-1, (2 * self.heads, -1)).transpose(1, 2).chunk(2, 1)

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

    def forward(self, x: Tensor, bias: Tensor, memory=None, past=None) -> tuple[Tensor, tuple]:
        """x (B * Q * P, S, d) -> x, and the keys and values (B * Q * P, H, S', d_kv) for later steps. memory:
        keys, values (B, H, M, d_kv) and bias of the rows; all Q * P paths of a row ask the same memory, so it
        is never repeated (an encoder has Q = P = 1). past: keys and values of earlier steps."""
        h = self.norms[0](x)
        present = self.attention.keys_values(h)
        if past is not None:
            present = tuple(torch.cat(pair, 2) for pair in zip(past, present))
        x = self.dropout(self.attention(h, *present, bias), onto=x)
        if self.cross is not None:
            h = self.norms[1](x).view(len(memory[0]), -1, x.shape[-1])              # (B, Q * P * S, d)
            x = self.dropout(self.cross(h, *memory).view(x.shape), onto=x)
        h = self.wo(self.dropout(self.wi(self.norms[-1](x)).relu()))
        return self.dropout(h, onto=x), present


def relative_buckets(distance: Tensor, two_sided: bool, buckets=32, furthest=128) -> Tensor:
    """T5's bucket of each distance, a key's position - a query's: int64 of the same shape. Half of the
    buckets hold one distance each, the others grow logarithmically up to `furthest`."""
    buckets //= 1 + two_sided
    offset = (distance > 0) * two_sided * buckets
    distance = distance.abs() if two_sided else (-distance).clamp(min=0)
    exact = buckets // 2
    growth = torch.log(distance.clamp(min=1) / exact) / math.log(furthest / exact)
    return offset + torch.where(distance < exact, distance,
                                (exact + (growth * (buckets - exact)).long()).clamp(max=buckets - 1))


class Memory(NamedTuple):
    """What the decoder knows of a batch of histories."""
    layers: list        # per decoder layer: keys and values, (B, H, M, d_kv) each
    bias: Tensor        # (B, 1, Q, M): -inf where a row is padded, or goes on after the history


class T5(nn.Module):
    """The standard T5 (Raffel et al. 2020) and a flow head. Token 0 pads and starts, 1 + l * C + c is code c
    of level l; C, n_codes, is the highest code + 1. [ours]: if causal, an item sees none after it."""

    def __init__(self, levels: int, n_codes: int, d_model=128, heads=4, d_kv=32, d_ff=512, layers=3,
                 dropout=0.1, temperature=1.0, causal=False):
        super().__init__()
        self.levels, self.n_codes, self.causal = levels, n_codes, causal
        self.scale = d_model ** -0.5 / temperature
        self.embedding, self.dropout = nn.Embedding(1 + levels * n_codes, d_model), Dropout(dropout)
        self.encoder, self.decoder = (nn.ModuleList(
            Block(d_model, heads, d_kv, d_ff, self.dropout, decoder) for _ in range(layers))
            for decoder in (False, True))
        self.encoder_bias, self.decoder_bias = nn.Embedding(32, heads), nn.Embedding(32, heads)
        for table in (self.encoder_bias, self.decoder_bias):
            nn.init.normal_(table.weight, std=d_model ** -0.5)
        self.encoder_norm, self.decoder_norm = RMSNorm(d_model), RMSNorm(d_model)
        self.flow = linear(d_model, 1, d_model ** -0.5)
        self.scalar_z = nn.Parameter(torch.ones(()))    # see `term`; steps are relative to its size, so not 0

    def embed(self, tokens: Tensor) -> Tensor:
        """Tokens (..) -> (.., d). Under autocast the residual stream has autocast's type from here on."""
        x, device = self.embedding(tokens), tokens.device.type
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        return self.dropout(x)

    def encode(self, tokens: Tensor, ends: Tensor | None = None) -> Memory:
        """Tokens (B, M) of rows that hold an item, 0 where padded -> Memory. Runs once for all paths; if
        causal, also for the Q histories of a row that end at the places `ends` (Q,)."""
        assert ends is None or self.causal, "a full encoder has seen what comes after an end"
        x, position = self.embed(tokens), torch.arange(tokens.shape[1], device=tokens.device)
        item, pad = position // self.levels, (tokens == 0)[:, None, None]           # pad: (B, 1, 1, M)
        bias = self.encoder_bias(relative_buckets(position - position[:, None], True)).permute(2, 0, 1)
        later = (item > item[:, None]) & self.causal
        bias = bias.to(x.dtype).masked_fill(later | pad, -torch.inf)                # (B, H, M, M)
        for block in self.encoder:
            x, _ = block(x, bias)
        x, ends = self.dropout(self.encoder_norm(x)), item[-1:] if ends is None else ends
        hidden = (item > ends[:, None]) | pad                                       # (B, 1, Q, M)
        return Memory([block.cross.keys_values(x) for block in self.decoder],
                      torch.zeros_like(hidden, dtype=x.dtype).masked_fill(hidden, -torch.inf))

    def decode(self, tokens: Tensor, memory: Memory, past=None, depth=None, apart=False) -> tuple:
        """Tokens (B, Q * P, S), from 0 on, of P paths for each of a row's Q histories in turn -> states
        (B, Q * P, S, d), cache. State l is s_l: it has read y_1 .. y_l, predicts y_{l+1}. After `past`, the
        cache of earlier steps, S counts new ones. Of a tree: depth (S,); apart (S, S): no attention there."""
        steps, cache = tokens.shape[2], []
        if depth is None:
            depth = torch.arange(steps + (past[0][0].shape[2] if past else 0), device=tokens.device)
        x, distance = self.embed(tokens).flatten(0, 1), depth - depth[-steps:, None]    # (BQP, S, d), (S, S')
        bias = self.decoder_bias(relative_buckets(distance, False)).permute(2, 0, 1)
        bias = bias.masked_fill((distance > 0) | apart, -torch.inf).to(x.dtype)
        mask = memory.bias.repeat_interleave(tokens[0].numel() // memory.bias.shape[2], 2)  # (B, 1, QPS, M)
        for i, block in enumerate(self.decoder):
            x, present = block(x, bias, (*memory.layers[i], mask), past[i] if past else None)
            cache.append(present)
        return self.dropout(self.decoder_norm(x)).view(*tokens.shape, -1), cache

    def decode_paths(self, tokens: Tensor, memory: Memory) -> Tensor:
        """`decode` of P paths a history, (B * Q, P, S) -> (B * Q, P, S, d), as a tree: s_0 is done once."""
        (_, paths, steps), device = tokens.shape, tokens.device
        depth = F.pad(torch.arange(1, steps, device=device).repeat(paths), (1, 0))
        path = F.pad(torch.arange(paths, device=device).repeat_interleave(steps - 1), (1, 0), value=-1)
        apart = (path != path[:, None]) & (path >= 0)       # [who, whom]: another path; all may see s_0
        tree = torch.cat([tokens[:, 0, :1], tokens[..., 1:].flatten(1)], 1)
        tree = tree.view(len(memory.bias), -1, tree.shape[1])                     # (B, Q, 1 + P * (S - 1))
        state = self.decode(tree, memory, None, depth, apart)[0].flatten(0, 1)[:, None]
        after = state[:, 0, 1:].unflatten(1, (paths, steps - 1))
        return torch.cat([state[..., :1, :].expand(-1, paths, -1, -1), after], 2)

    def code_logits(self, state: Tensor, level: int) -> Tensor:
        """States s_level (.., d) -> logits (.., C) of the next code, by T5's tied and scaled embeddings."""
        table = self.embedding.weight[1 + level * self.n_codes:1 + (level + 1) * self.n_codes]
        return (state * self.scale) @ table.T.to(state.dtype)


# ================================================================================================= 5. trie

class Trie:
    """Which prefixes of codes lead to items: a tree in O(items) memory, its nodes numbered level by level.
    The children of node n are neighbours: first_child[n] .. first_child[n] + n_children[n] - 1, and code[c]
    leads to child c. path[i], L + 1 nodes, leads from the root, node 0, to item i."""

    def __init__(self, codes: Tensor, all_codes=False):
        """codes (N, L), rows all different; ValueError when two share a path. all_codes: see `log_probs`."""
        base, start, count, node = int(codes.max()) + 1, 0, 1, torch.zeros_like(codes[:, 0])
        path, code, first, n_children, self.width = [node], [node[:1]], [], [], []
        for column in codes.T:
            key, local = torch.unique((node - start) * base + column, return_inverse=True)   # (parent, code)
            code.append(key % base)
            n_children.append(children := torch.bincount(key // base, minlength=count))
            first.append(start + count + children.cumsum(0) - children)
            self.width.append(int(children.max()))              # most children of any node of this level
            start, count = start + count, len(key)
            node = start + local                                # each item's node, one level down
            path.append(node)
        if count != len(codes):                                 # each item needs a leaf of its own
            raise ValueError(f"{len(codes)} items have only {count} different paths of codes")
        self.path, self.code = torch.stack(path, 1), torch.cat(code)
        self.first_child, self.n_children = torch.cat(first), torch.cat(n_children)
        self.first_leaf, self.leaf_item, self.all_codes = start, torch.argsort(local), all_codes

    def log_probs(self, logits: Tensor, node: Tensor, level: int) -> tuple[Tensor, Tensor]:
        """Logits (.., C) at nodes (..) of a level -> children (.., width[level]) and the log-probability of
        each, -inf where a node has fewer: over all C if all_codes, nearly TIGER's, else over those that lead
        to an item [ours]. Then those of all items sum to one, and TB has its optimum at p = R(y) / Z(x)."""
        slot = torch.arange(self.width[level], device=node.device)
        real = slot < self.n_children[node][..., None]
        child = self.first_child[node][..., None] + slot * real         # the first one where there is none
        logits = logits.float().log_softmax(-1) if self.all_codes else logits.float()
        allowed = logits.gather(-1, self.code[child]).masked_fill(~real, -torch.inf)
        return child, allowed if self.all_codes else allowed.log_softmax(-1)

    def flows(self, leaf: Tensor) -> Tensor:
        """What ends in each item (B, N) -> what flows through each node (B, nodes): all that is below it."""
        flow, leaf = leaf.new_zeros(len(self.code), len(leaf)), leaf.T.contiguous()     # rows add up faster
        for nodes in self.path.T:
            flow.index_add_(0, nodes, leaf)
        return flow.T


# ========================================================================================= 6. trajectories

class Catalogue(NamedTuple):
    """All items as paths of codes."""
    codes: Tensor       # (N, L)
    tokens: Tensor      # (N + 1, L) the generator's tokens; the last row, of the padding, is 0
    trie: Trie
    semantic: int       # how many leading codes carry meaning: a last one that tells twins apart does not

    @classmethod
    def of(cls, codes: Tensor, semantic: int, all_codes=False) -> Catalogue:
        """codes (N, L) -> Catalogue."""
        tokens = 1 + codes + (int(codes.max()) + 1) * torch.arange(codes.shape[1], device=codes.device)
        return cls(codes, F.pad(tokens, (0, 0, 0, 1)), Trie(codes, all_codes), semantic)

    def read(self, model: T5, history: Tensor, ends: Tensor | None = None) -> Memory:
        """Rows (B, T), read once by the generator's encoder: whole, or as far as the places `ends` (Q,)."""
        return model.encode(self.tokens[history].flatten(1), ends)


def path_log_probs(model: T5, catalogue: Catalogue, memory: Memory, items: Tensor, flow=None) -> tuple:
    """How likely each step of the paths of items (B, P) is, after B histories that the encoder has read ->
    log_pf (B, P, L), [.., l] being log P_F(s_{l+1} | s_l); the flow head's output (B, P, L) of s_0 .. s_{L-1}
    and, if given a flow (B, nodes), mean_log (B, P, L), the mean of log P_F over where it goes from s_l."""
    state = model.decode_paths(F.pad(catalogue.tokens[items][..., :-1], (1, 0)), memory)
    trie, path, log_pf, mean_log = catalogue.trie, catalogue.trie.path[items], [], []
    for level in range(model.levels):
        node, logits = path[..., level], model.code_logits(state[..., level, :], level)
        child, log_probs = trie.log_probs(logits, node, level)
        slot = path[..., level + 1] - trie.first_child[node]
        log_pf.append(log_probs.gather(-1, slot[..., None]).squeeze(-1))
        if flow is not None:
            weight = flow.gather(1, child.flatten(1)).view_as(child) * (log_probs != -torch.inf)
            mean_log.append((weight * log_probs.masked_fill(weight == 0, 0)).sum(-1) / weight.sum(-1))
    head, mean_log = model.flow(state).squeeze(-1).float(), torch.stack(mean_log, -1) if mean_log else None
    return torch.stack(log_pf, -1), head, mean_log


def curriculum_sample(scores: Tensor, pool: Tensor, exclude: Tensor, k: int, beta: float) -> Tensor:
    """K items per user, easy ones (low scores) at beta < 0, hard at beta > 0, any at 0 (Section 3.1): Gumbel
    top-K draws without replacement from softmax(beta * z), z the standardised score. [ours]: the draw, and a
    batch's pool. scores (B, N') of it, pool (N',) ids, k or more not in exclude (B, T) -> ids (B, k)."""
    z = (scores - scores.mean(1, keepdim=True)) / scores.std(1, correction=0, keepdim=True).clamp(min=1e-6)
    gumbel = -(-torch.rand_like(z).log()).log()
    clicked = (pool[:, None] == exclude[:, None]).any(-1)                           # (B, N')
    return pool[(beta * z + gumbel).masked_fill(clicked, -torch.inf).topk(k).indices]


# =============================================================================================== 7. reward

def reward(r_aug: Tensor, r_cs: Tensor, r_sim: Tensor, parts: str = "aug,cf,sim", floor=1e-4) -> Tensor:
    """R = r_aug + r_cs + r_sim (Section 3.2), each (B, P) in [0, 1]: was the item clicked, SASRec's score of
    it, the share of codes as in the clicked one. [ours]: at least `floor`, so that its log is finite."""
    terms = {"aug": r_aug, "cf": r_cs, "sim": r_sim}
    return sum(terms[part] for part in parts.split(",")).clamp(min=floor)


def collaborative_score(scores: Tensor, scale: str = "minmax") -> Tensor:
    """r_cs in [0, 1] of all items, from the collaborative model's scores (B, N) -> (B, N). [ours]: scaled by
    their minimum and maximum; or, by their softmax, an item's probability over that of the best."""
    low, high = scores.amin(1, keepdim=True), scores.amax(1, keepdim=True)
    return (scores - high).exp() if scale == "softmax" else (scores - low) / (high - low).clamp(min=1e-6)


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
    log_pf, log_flow (.., L), log_reward (..) -> (..)."""
    flow_out = torch.cat([log_flow[..., 1:], log_reward[..., None]], -1)
    return (log_flow + log_pf - flow_out).square().sum(-1)


def trajectory_balance(log_pf: Tensor, log_flow: Tensor, log_reward: Tensor) -> Tensor:
    """Eq. 6: (log Z + sum_l log P_F(s_l | s_{l-1}) - log R)^2 with log Z = log F(s_0). [ours]: the rewards of
    two users do not sum to the same number, so Z is the user's. log_pf, log_flow (.., L), log_reward (..)."""
    return (log_flow[..., 0] + log_pf.sum(-1) - log_reward).square()


def dpo(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """S-DPO (Chen et al. 2024): -log sigmoid(-logsumexp_j beta (D-_j - D+)), D = log p - log p_ref; with one
    rejected path, DPO (Rafailov et al. 2023). chosen D+ (B,), rejected D- (B, K) -> (B,)."""
    return -F.logsigmoid(-(beta * (rejected - chosen[:, None])).logsumexp(1))


def ipa(log_ratio: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """IPA: DPO of the path of best reward against that of the worst. log_ratio D, rewards (B, P) -> (B,)."""
    best, worst = rewards.argmax(1, keepdim=True), rewards.argmin(1, keepdim=True)
    return dpo(log_ratio.gather(1, best).squeeze(1), log_ratio.gather(1, worst), beta)


def clipped_loss(log_p: Tensor, log_old, log_ref, advantage, clip: float, kl: float) -> Tensor:
    """-min(r A, clip(r, 1 - e, 1 + e) A), r = p / p_old (Schulman et al. 2017, Eq. 7); + kl * (q - 1 - log q)
    with q = p_ref / p (Shao et al. 2024, Eq. 4). (B, P) each. [ours]: a path is one action."""
    ratio, log_q = (log_p - log_old).exp(), log_ref - log_p
    gain = torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
    return kl * (log_q.exp() - 1 - log_q) - gain


def ppo(log_p: Tensor, log_old, log_ref, rewards, value, clip: float, kl: float) -> Tensor:
    """PPO: the advantage is A = R - V(x); A^2 / 2 trains V. value (B,), the others (B, P) -> (B,)."""
    error = rewards - value[:, None]
    return (clipped_loss(log_p, log_old, log_ref, error.detach(), clip, kl) + 0.5 * error.square()).mean(1)


def grpo(log_p: Tensor, log_old: Tensor, log_ref: Tensor, rewards: Tensor, clip: float, kl: float) -> Tensor:
    """GRPO: the advantage is a reward's standard score in its group. (B, P) each -> (B,)."""
    mean, spread = rewards.mean(1, keepdim=True), rewards.std(1, correction=0, keepdim=True)
    advantage = (rewards - mean) / (spread + 1e-4)
    return clipped_loss(log_p, log_old, log_ref, advantage, clip, kl).mean(1)


class Paths(NamedTuple):
    """P paths for each history, the observed one first, and what an objective may ask of them."""
    items: Tensor       # (B, P)
    reward: Tensor      # (B, P) R
    weight: Tensor      # (B, P) w of Eq. 8
    log_known: Tensor | float = 0.0     # (B, P, L), tb (B, 1, 1): log of all R below s_l but for the click
    flow: Tensor | None = None      # (B, nodes) each node's weight among its siblings, never 0
    log_old: Tensor | None = None   # (B, P) log p by the policy that drew them
    log_ref: Tensor | None = None   # (B, P) log p by the reference policy
    log_pf: Tensor | None = None    # (B, P, L) log P_F of each step, by the generator in training
    log_flow: Tensor | None = None  # (B, P, L) log F of s_0 .. s_{L-1}: what the head says, + log_known
    mean_log: Tensor | None = None  # (B, P, L) the mean log P_F of where the flow goes

    def balance(self, objective: Callable) -> Tensor:
        """The sum over paths of w * L_GFN -> (B,)."""
        return (self.weight * objective(self.log_pf, self.log_flow, self.reward.log())).sum(1)

    def log_ratios(self) -> tuple[Tensor, Tensor]:
        """D = log p - log p_ref of the observed path (B,), and of the others (B, P - 1)."""
        log_ratio = self.log_pf.sum(-1) - self.log_ref
        return log_ratio[:, 0], log_ratio[:, 1:]

    def drawn(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """log p, log p_old, log p_ref and R of the paths beside the observed one, (B, P - 1) each."""
        return tuple(x[:, 1:] for x in (self.log_pf.sum(-1), self.log_old, self.log_ref, self.reward))


class Method(NamedTuple):
    """A way of fine-tuning: where paths beside the observed one come from, and the objective put on all."""
    source: str             # random, curriculum: sampled items; beam, draws: by `old`; none; all: all scored
    paths: Callable         # Config -> how many of those
    groups: tuple           # of settings that it has
    cost: float             # time of its step over SFT's, about what was measured (README)
    objective: Callable     # (Paths, Config) -> (B,)
    with_sft: bool = False  # is SFT's loss, of all targets, added?
    flow: Callable | None = None    # (Trie, scores (B, N)) -> the flow (B, nodes) that mean_log follows


METHODS = {
    "sft": Method("none", lambda c: 0, (), 1.0, lambda y, c: sft(y.log_pf[:, 0])),
    "db": Method("curriculum", lambda c: c.k, ("lambda", "pool", "share", "reward", "gflownet"), 1.5,
                 lambda y, c: c.lam * y.balance(detailed_balance), with_sft=True),
    "tb": Method("curriculum", lambda c: c.k, ("lambda", "pool", "share", "reward", "gflownet"), 1.4,
                 lambda y, c: c.lam * y.balance(trajectory_balance), with_sft=True),
    "dpo": Method("random", lambda c: 1, ("pool", "share", "beta"), 0.8,
                  lambda y, c: dpo(*y.log_ratios(), c.beta)),
    "sdpo": Method("random", lambda c: c.negatives, ("pool", "share", "beta", "negatives"), 0.9,
                   lambda y, c: dpo(*y.log_ratios(), c.beta)),
    "sprec": Method("draws", lambda c: 1, ("share", "sprec"), 1.0,  # [ours]: draws, no clicks; p_ref: `old`
                    lambda y, c: (y.items[:, 0] != y.items[:, 1]) * dpo(*y.log_ratios(), c.sprec_beta)),
    "ipa": Method("beam", lambda c: c.beam, ("lambda", "share", "reward", "beta"), 3.4,
                  lambda y, c: c.lam * ipa(y.log_ratios()[1], y.reward[:, 1:], c.beta), with_sft=True),
    "ppo": Method("draws", lambda c: c.group, ("share", "reward", "policy"), 2.5,   # V(x): the flow at s_0
                  lambda y, c: ppo(*y.drawn(), y.log_flow[:, 0, 0], c.clip, c.kl)),
    "grpo": Method("draws", lambda c: c.group, ("share", "reward", "policy"), 2.5,
                   lambda y, c: grpo(*y.drawn(), c.clip, c.kl)),
    # Two controls of ours: label smoothing, and distillation of SASRec, at the nodes of the observed path.
    "smooth": Method("none", lambda c: 0, ("smoothing",), 1.0, lambda y, c: torch.lerp(
                     sft(y.log_pf[:, 0]), sft(y.mean_log[:, 0]), c.smoothing),
                     flow=lambda trie, scores: torch.ones_like(trie.code).float().expand(len(scores), -1)),
}
METHODS["exact"] = METHODS["smooth"]._replace(source="all", cost=1.3,      # spread as SASRec's softmax is
                                              flow=lambda trie, s: trie.flows(s.softmax(1).clamp(min=1e-20)))


class FineTuning:
    """A method at work: the generator in training, the frozen models that it asks, and the catalogue."""

    def __init__(self, model: T5, sasrec: SASRec, catalogue: Catalogue, cfg: Config):
        self.model, self.sasrec, self.catalogue, self.cfg = model, sasrec, catalogue, cfg
        source, self.old, self.reference = METHODS[cfg.loss].source, None, None
        if source in ("random", "beam", "draws"):       # the policy as it began
            self.reference = copy.deepcopy(model).eval().requires_grad_(False)
        if source in ("beam", "draws"):                 # the policy that draws; for sprec the reference, too
            self.old = self.reference if cfg.loss == "sprec" else copy.deepcopy(self.reference)

    def refresh(self, step: int, steps: int) -> None:
        """After at most 8 training steps, for sprec after an iteration, `old` becomes the policy of now."""
        times = self.cfg.iterations if self.cfg.loss == "sprec" else math.ceil(steps / 8)
        if self.old is not None and step * times // steps > (step - 1) * times // steps:
            self.old.load_state_dict(self.model.state_dict())

    @torch.no_grad()
    def trajectories(self, method: Method, history: Tensor, target: Tensor, progress, ends=None) -> Paths:
        """The observed items, those beside them (unclicked: not of this row), their reward, and what frozen
        models say where it is asked. history (B, T), target (B, 1), or (B, T) at the places `ends` (Q,)."""
        cfg, catalogue, n_items = self.cfg, self.catalogue, len(self.catalogue.codes)
        source, n = cfg.sampler if method.source == "curriculum" else method.source, method.paths(cfg)
        items, log_old, log_ref = (target if ends is None else target[:, ends]).reshape(-1, 1), None, None
        scored = source == "all" or "reward" in method.groups       # else SASRec is not asked: zeros for it
        scores = self.sasrec.scores(history, ends) if scored else (0.0 * items).expand(-1, n_items)
        if source in ("curriculum", "random"):
            pool = torch.randperm(n_items, device=target.device)[:cfg.pool]
            beta = cfg.easiest + progress * (cfg.hardest - cfg.easiest) if source == "curriculum" else 0.0
            clicked = torch.cat([history, target], 1).repeat_interleave(len(items) // len(history), 0)
            items = torch.cat([items, curriculum_sample(scores[:, pool], pool, clicked, n, beta)], 1)
        if source in ("beam", "draws"):
            memory, draws = catalogue.read(self.old, history, ends), source == "draws"
            drawn = beam_search(self.old, catalogue, memory, n if draws else min(n, n_items), draws)[0]
            items = torch.cat([items, drawn], 1)
            if draws:
                log_ref = log_old = path_log_probs(self.old, catalogue, memory, items)[0].sum(-1)
        if self.reference not in (None, self.old) and n:        # its own; of sprec that is `old`
            memory = catalogue.read(self.reference, history, ends)
            log_ref = path_log_probs(self.reference, catalogue, memory, items)[0].sum(-1)
        r_aug = (items == items[:, :1]).float()
        r_all = collaborative_score(scores, cfg.scale) if "reward" in method.groups else scores     # a dummy
        r_cs = r_all.gather(1, items)
        r_sim = shared_codes(catalogue.codes[items][..., :catalogue.semantic])
        min_max = collaborative_score(scores).gather(1, items) if scored and cfg.scale != "minmax" else r_cs
        weight = confidence(r_aug, min_max) if cfg.confidence else torch.ones_like(r_cs)  # softmax: clicks ~0
        known = self.log_known(r_all, items) if "gflownet" in method.groups else 0.0
        flow = method.flow and method.flow(catalogue.trie, scores)
        return Paths(items, reward(r_aug, r_cs, r_sim, cfg.reward), weight, known, flow, log_old, log_ref)

    def log_known(self, r_cs: Tensor, items: Tensor) -> Tensor:
        """Log of the reward below s_0 .. s_{L-1} of the paths of items (B, P) as if nothing were clicked, by
        all r_cs (B, N) -> (B, P, L); for tb, which asks for no other, of s_0 alone, (B, 1, 1)."""
        trie, no = self.catalogue.trie, torch.zeros_like(r_cs[:, :1])
        leaf, node = reward(no, r_cs, no, self.cfg.reward).expand_as(r_cs), trie.path[items][..., :-1]
        if self.cfg.loss == "tb":
            return leaf.sum(1).log()[:, None, None]
        return trie.flows(leaf).gather(1, node.flatten(1)).view_as(node).log()

    def term(self, method: Method, history: Tensor, target: Tensor, progress: float, ends, memory) -> Tensor:
        """A method's objective, its mean over the targets but the padding; see `loss`. No memory: read it."""
        model, catalogue, target = self.model, self.catalogue, target.view(len(history), -1)
        real = target < len(catalogue.codes)        # padding: a clicked item stands for it
        paths = self.trajectories(method, history, target.where(real, history[:, :1]), progress, ends)
        real = real if ends is None else real[:, ends]              # of a few ends perhaps none
        memory = memory or catalogue.read(model, history, ends)
        log_pf, log_flow, mean_log = path_log_probs(model, catalogue, memory, paths.items, paths.flow)
        log_flow = log_flow + paths.log_known       # the head learns the rest; from 0 it would learn Z first
        if "gflownet" in method.groups and self.cfg.z == "scalar":
            log_z = 10 * (model.scalar_z - 1) + math.log(len(catalogue.codes))      # log N at first; 10: rate
            log_flow = torch.cat([log_z.expand_as(log_flow[..., :1]), log_flow[..., 1:]], -1)
        paths = paths._replace(log_pf=log_pf, log_flow=log_flow, mean_log=mean_log)
        return (method.objective(paths, self.cfg) * real.flatten()).sum() / real.sum().clamp(min=1)

    def loss(self, history: Tensor, target: Tensor, progress: float) -> Tensor:
        """The method's loss, its mean over targets -> scalar; Eq. 7 for tb and db. Gradients reach the model
        alone. history (B, T), progress in [0, 1], target (B,) or, of a causal encoder, (B, T): the item after
        each item, N where padded. [ours]: but for SFT's loss and the controls, of a share of the targets."""
        cfg, n, loss, memory = self.cfg, len(history), 0.0, None
        ends = torch.arange(target.shape[1], device=target.device) if target.dim() == 2 else None
        first_half = cfg.loss == "sprec" and 1e-9 < progress * cfg.iterations % 1 <= 0.5    # SFT, then DPO
        method = METHODS["sft" if first_half else cfg.loss]
        if method.with_sft:         # one reading for both terms; ipa's second, without dropout, has its own
            memory = None if self.reference is not None else self.catalogue.read(self.model, history, ends)
            loss = self.term(METHODS["sft"], history, target, progress, ends, memory)
        if self.reference is not None and method.source != "none":
            self.model.eval()       # dropout's noise would enter p / p_ref; `fit` calls train() again
        if "share" in method.groups:        # few targets of many rows: those of one user are much alike
            n_ends = target[0].numel()
            q = torch.randperm(n_ends, device=history.device)[:math.ceil(cfg.share * n_ends)]
            b = torch.randperm(n, device=q.device)[:max(1, round(cfg.share * n * n_ends / len(q)))]
            history, target, ends = history[b], target[b], None if ends is None else q
            memory = memory and Memory([(k[b], v[b]) for k, v in memory.layers], memory.bias[b][:, :, q])
        return loss + self.term(method, history, target, progress, ends, memory)


# ============================================================================================= 9. training

def fit(model: nn.Module, title: str, loss_of: Callable, batches: Iterator[Tensor], steps: int,
        optimiser: optim.Optimizer, journal: Journal, dtype=torch.float32, evaluations=0, validate=None,
        after: Callable = lambda step: None, **others: nn.Module) -> None:
    """The one loop that trains all models. loss_of(rows, progress) -> scalar; validate() -> metrics, whose
    N@10 chooses the state to end with (else the last); after(step) follows a step. A training that was cut
    off goes on from the journal's snapshot, which holds `others`, too. Raises DataError."""
    weights, device = list(model.parameters()), next(model.parameters()).device
    rate = optim.lr_scheduler.LambdaLR(optimiser, lambda step: min(       # warm-up, then half a cosine
        20 * (step + 1) / steps, 0.5 * (1 + math.cos(math.pi * step / steps))))
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    checks = {round(steps * i / evaluations) for i in range(1, evaluations + 1)}
    parts = dict(model=model, optimiser=optimiser, rate=rate, scaler=scaler, **others)
    with datasets.Progress(title, steps, journal, parts, checks) as progress:
        start, best, best_score = progress.resume()
        for step, rows in enumerate(itertools.islice(batches, start, None), start + 1):
            if not model.training:          # train() walks through all modules
                model.train()
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):    # of matrix products
                loss = loss_of(rows, step / steps)
            scaler.scale(loss).backward()
            scaler.unscale_(optimiser)
            nn.utils.clip_grad_norm_(weights, 1.0)
            scaler.step(optimiser)
            scaler.update()
            optimiser.zero_grad(set_to_none=True)
            after(step)
            rate.step()
            metrics = validate() if step in checks else {}
            if metrics and metrics["N@10"] > best_score:
                best, best_score = copy.deepcopy(model.state_dict()), metrics["N@10"]
            progress.done(step, loss.detach_(), metrics, (best, best_score))    # its graph ends with the step
    model.load_state_dict(best or model.state_dict())


# =================================================================================== 10. decoding, metrics

@torch.no_grad()
def beam_search(model: T5, catalogue: Catalogue, memory: Memory, beam: int, draws=False) -> tuple:
    """The most likely items (B, W) that W beams find after histories that the encoder has read, best first,
    and their log p; or W draws, code by code. All users and all beams step together along the trie, so each
    ends at an item; where the catalogue has fewer items than beams, the rest of the row is N with -inf."""
    trie, (rows, _, histories, _), device = catalogue.trie, memory.bias.shape, memory.bias.device
    which = torch.arange(rows * histories, device=device)[:, None]                  # history: (B * Q, 1)
    token = node = torch.zeros_like(which).expand(-1, beam if draws else 1)
    score = torch.zeros(token.shape, device=device)
    for level in range(model.levels):
        past = [(keys[parent], values[parent]) for keys, values in past] if level else None
        state, past = model.decode(token.reshape(rows, -1, 1), memory, past)
        state = state.view(*token.shape, -1)                                        # (B, 1 or W, d)
        child, log_probs = trie.log_probs(model.code_logits(state, level), node, level)
        total, width = (score[..., None] + log_probs).flatten(1), child.shape[-1]
        if draws:                           # the argmax of log p + Gumbel noise is a draw from p
            noise = -torch.empty_like(log_probs).exponential_().log()
            best = (log_probs + noise).argmax(-1) + width * torch.arange(beam, device=device)
        else:
            best = total.topk(min(beam, total.shape[1])).indices
        score = total.gather(1, best)
        parent = (which * node.shape[1] + best // width).flatten()      # each beam's row in the cache before
        node = child.flatten(1).gather(1, best)
        token = 1 + level * model.n_codes + trie.code[node]
    n_items, missing = len(catalogue.codes), beam - score.shape[1]
    items = trie.leaf_item[node - trie.first_leaf].masked_fill(score == -torch.inf, n_items)
    return F.pad(items, (0, missing), value=n_items), F.pad(score, (0, missing), value=-torch.inf)


def ranking_metrics(recommended: Tensor, target: Tensor) -> dict[str, float]:
    """R@k, the share of users whose next item is among the first k, and N@k, the mean of 1 / log2(1 + rank).
    recommended (U, W) item ids, best first; target (U,)."""
    hit = (recommended == target[:, None]).double()
    gain = hit / torch.log2(torch.arange(hit.shape[1], device=hit.device).double() + 2)
    return ({f"R@{k}": hit[:, :k].sum(1).mean().item() for k in (1, 5, 10, 20)}
            | {f"N@{k}": gain[:, :k].sum(1).mean().item() for k in (5, 10, 20)})


# ================================================================================================ 11. main

def needs(cfg: Config) -> dict[str, tuple[str, ...]]:
    """Stage -> the groups of settings that its result depends on: the key of its cache."""
    letter, sasrec = cfg.backbone == "letter", ("data", "training", "sasrec")
    made = () if cfg.codes else ("vectors", "codes", *(*sasrec, "letter") * letter)
    codes, tuning = ("data", "backbone", *made), ("sasrec", "finetune", *METHODS[cfg.loss].groups)
    sft = (*codes, "training", "sft", *("temperature",) * letter)
    return dict(sasrec=sasrec, vectors=("data", *made[:1]), codes=codes, sft=sft, finetune=sft + tuning)


def train_codes(run: Run, vectors: Tensor, collaborative: Tensor, journal: Journal) -> Tensor:
    """Train an RQ-VAE on item vectors (N, d_in), LETTER's on SASRec's (N, dim) too -> codes (N, L)."""
    cfg, steps = run.cfg, run.cfg.code_epochs * math.ceil(len(vectors) / 1024)
    alignment, even_codes = (cfg.alignment, cfg.even_codes) if cfg.backbone == "letter" else (0, 0)
    model = RQVAE(vectors.shape[1], cfg.levels, cfg.codebook_size, cfg.code_dim, cfg.commitment)
    quantiser = model.to(run.device).quantiser

    def loss_of(rows: Tensor, progress: float) -> Tensor:
        loss, quantised = model(vectors[rows])
        if alignment:
            loss = loss + alignment * alignment_loss(quantised.value, collaborative[rows])
        if even_codes:
            levels = zip(quantiser.codebooks, quantiser.clusters, quantised.codes.T)
            loss = loss + even_codes * sum(even_codes_loss(*level) for level in levels) / cfg.levels
        return loss

    @torch.no_grad()
    def tidy(step: int) -> None:
        if step % max(steps // 15, 1) == 0:
            if step < 0.8 * steps:                  # afterwards the codes must come to rest
                (quantiser.restart_dead_codes if step else quantiser.initialise)(model.encoder(vectors))
            if even_codes:
                quantiser.clusters.copy_(torch.stack([datasets.balanced_clusters(
                    codebook, kmeans(codebook, min(10, len(codebook)))) for codebook in quantiser.codebooks]))

    tidy(0)
    batches = datasets.length_batches(torch.zeros(len(vectors)), 1024, steps, cfg.seed)     # shuffled
    optimiser = optim.AdamW(model.parameters(), 1e-3, weight_decay=0.0, fused=True)
    fit(model, "codes", datasets.graphed(model, loss_of), batches, steps, optimiser, journal, after=tidy)
    with torch.no_grad():
        return model(vectors)[1].codes


def item_codes(run: Run, sasrec: SASRec) -> Catalogue:
    """Each item as a path of codes of its own, from --codes or the backbone; also written in that format."""
    cfg = run.cfg

    def build(journal: Journal) -> dict:
        if cfg.codes:
            codes = run.inputs["codes"]
            if codes.shape[1] > 1 and torch.equal(unique_paths(codes[:, :-1]), codes):  # it only counts twins
                codes = codes[:, :-1]
        else:
            result = run.stage("vectors", lambda _: {"vectors": run.item_vectors()})
            collaborative = datasets.principal_vectors(sasrec.item.weight[:-1], cfg.code_dim)
            codes = train_codes(run, result["vectors"].to(run.device), collaborative, journal).cpu()
        twins = len(codes.unique(dim=0)) < len(codes)
        return {"codes": unique_paths(codes) if twins else codes, "semantic": codes.shape[1]}

    result = run.stage("codes", build)
    run.publish(result["codes"])
    return Catalogue.of(result["codes"].to(run.device), result["semantic"], cfg.softmax == "all")


def train_sasrec(run: Run) -> SASRec:
    """The collaborative model, trained on every user's training sequence and frozen from then on."""
    cfg, length = run.cfg, max(run.cfg.sasrec_length, run.cfg.max_history)  # all in use get trained
    torch.manual_seed(cfg.seed)
    model = SASRec(run.data.n_items, cfg.sasrec_dim, cfg.sasrec_layers, cfg.sasrec_heads, cfg.sasrec_dropout,
                   length).to(run.device)

    def build(journal: Journal) -> dict:
        pairs = datasets.split(run.data, length)["train"].to(run.device).windows(length)
        steps = cfg.sasrec_epochs * math.ceil(pairs.n_targets / cfg.sasrec_batch)
        optimiser = optim.AdamW(model.parameters(), cfg.sasrec_lr, weight_decay=cfg.weight_decay, fused=True)
        return run.train("sasrec", model, lambda history: datasets.top(model.scores(history), 20),
                         lambda history, target, _: model.loss(history, target, cfg.sasrec_pool), pairs,
                         cfg.sasrec_batch, steps, optimiser, journal)

    return run.trained("sasrec", model, build).requires_grad_(False)


def generator(cfg: Config, catalogue: Catalogue) -> T5:
    """An untrained generator of the size that the settings name."""
    return T5(catalogue.codes.shape[1], int(catalogue.codes.max()) + 1, cfg.d_model, cfg.heads, cfg.d_kv,
              cfg.d_ff, cfg.layers, cfg.dropout, cfg.temperature if cfg.backbone == "letter" else 1.0,
              cfg.encoder == "causal")


def train_generator(run: Run, stage: str, catalogue: Catalogue, sasrec: SASRec, initial: dict) -> T5:
    """Stage sft: SFT, from scratch. Stage finetune: --loss, from `initial`, or from scratch if so set."""
    cfg = run.cfg if stage == "finetune" else dataclasses.replace(run.cfg, loss="sft", from_scratch=True)
    torch.manual_seed(run.seed(stage))
    model = run.compiled(generator(cfg, catalogue).to(run.device), "encoder", "decoder")

    def build(journal: Journal) -> dict:
        pairs = run.parts["train"]
        epochs = cfg.finetune_epochs * (stage == "finetune") + cfg.sft_epochs * cfg.from_scratch
        if not cfg.from_scratch:
            datasets.load_state(model, initial, run.folder("sft"))
        steps = max(1, round(epochs * math.ceil(pairs.n_targets / cfg.batch) / METHODS[cfg.loss].cost))
        tuning = FineTuning(model, sasrec, catalogue, cfg)
        lr = cfg.lr if cfg.from_scratch else cfg.finetune_lr
        optimiser = datasets.relative_adamw(model, lr, cfg.weight_decay)
        result = run.train(cfg.loss, model, lambda history: beam_search(
                               model, catalogue, catalogue.read(model, history), cfg.beam)[0],
                           tuning.loss, pairs, cfg.batch, steps, optimiser, journal, old=tuning.old,
                           after=lambda step: tuning.refresh(step, steps), graphs=cfg.loss != "sprec")
        return {**result, "codes": catalogue.codes.cpu(), "semantic": catalogue.semantic}   # for `recommend`

    return run.trained(stage, model, build)


@torch.no_grad()
def recommend(run_folder, history: list[int], k: int = 10) -> list[int]:
    """The k best next items after a history of item ids, oldest first, by a trained generator: run_folder is
    that of an SFT or a fine-tuning, as "runs/toy/tb-0123456789". Raises DataError."""
    cfg, kept, history = datasets.read_generator(run_folder, Config, history, k)
    catalogue = Catalogue.of(kept["codes"], kept["semantic"], cfg.softmax == "all")
    model = datasets.load_state(generator(cfg, catalogue), kept["state"], run_folder)
    memory = catalogue.read(model, torch.tensor([history[-cfg.max_history:]]))
    return beam_search(model, catalogue, memory, max(k, cfg.beam))[0][0, :k].tolist()


def run_all(cfg: Config) -> tuple[str, dict]:
    """All stages in order, each one kept; returns the tables of results, and the results."""
    method = METHODS[cfg.loss]
    drawn = method.source == "random" or method.source == "curriculum" and cfg.sampler != "none"
    run = Run(cfg, needs, fit, ranking_metrics, unclicked=method.paths(cfg) if drawn else 0)
    sasrec = train_sasrec(run)
    catalogue = item_codes(run, sasrec)
    print(datasets.code_figures(catalogue.codes[:, :catalogue.semantic], sasrec.item.weight[:-1]))
    start = train_generator(run, "sft", catalogue, sasrec, {})
    train_generator(run, "finetune", catalogue, sasrec, start.state_dict())
    return datasets.summary(run, sasrec.scores, collaborative_score)


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code: 0; 1 for bad input, 2 a wrong flag, 130 Ctrl-C, 143 SIGTERM."""
    return datasets.guarded(lambda: datasets.for_each_seed(run_all, datasets.command_line(
        Config, argv, "gflowgr.py", __doc__.splitlines()[0])))


if __name__ == "__main__":
    raise SystemExit(main())
