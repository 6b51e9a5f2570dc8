"""GFlowGR in one file: fine-tuning a generative recommender by a generative flow network.

The paper is arXiv 2506.16114v1, whose numbering is used here. A generative recommender writes
an item as a short path of codes, so it is a policy on a tree whose leaves are the items. Trained
on clicks alone (SFT), it takes every other item for wrong. GFlowGR adds paths of other items,
chosen from easy to hard by a collaborative model, gives each path a reward, and moves the
probability of each path towards its share of all reward. Eq. 7 of the paper, the loss, stands in
Section 5 whole:

    item text --TF-IDF, SVD--> vectors --RQ-VAE--> codes ----------------------+
    histories --SASRec--> scores --curriculum--> K items --> reward, weight ---+--> Eq. 7 --> T5
    recommendations <-- beam search over the tree of all items' codes <-----------------------+

    python gflowgr.py --loss tb                        a toy world, nothing to download
    python gflowgr.py --loss tb --dataset beauty       Amazon Beauty, all stages

The file follows the data: 1 codes, 2 SASRec, 3 T5, 4 the tree and its probabilities, 5 GFlowGR,
6 the other methods (may be skipped), 7 settings, 8 the training loop, 9 stages and main. Files,
splits, metrics and tables are in data.py, which knows no model.

Shapes, everywhere:
    B  histories in a batch     T  items in a history         N  items in the catalogue
    P  paths of a history       L  codes of an item           C  codes of a level
    M  tokens of a history      S  tokens of a path so far    W  beams
    H  attention heads          d  width of a vector

Histories are padded on the right with the id N. A state s_l is a history and the first l codes
of an item: s_0 is the root of the tree, s_L a leaf. An action is the next code, a trajectory an
item's path. The forward policy P_F(s_l | s_{l-1}) is the generator's probability of the next
code y_l; the backward policy P_B is 1, as every state has one parent. F(s) is the flow through a
state: the reward of all leaves below it. Z(x) = F(s_0), the flow through the root, is the reward
of all items. In balance P_F(s_l | s_{l-1}) = F(s_l) / F(s_{l-1}); along a path these fractions
cancel to F(s_L) / F(s_0) = R / Z, the probability of an item. Detailed balance (DB) asks for the
first equation, at every step; trajectory balance (TB) for the second, of every path. Z is learned,
not summed up: if p Z = R for all items, then, as their p sum to one, Z must be the sum of all R.

Eq. 1 to 8, Section 3.1, 3.2 and 4.5 are the paper's. TIGER (Rajput et al. 2023) is the kind of
recommender that is fine-tuned here, RQ-VAE and T5; LETTER (Wang et al. 2024) adds two losses to
its RQ-VAE. [paper], [TIGER] and [LETTER] mark what those have; [ours] is a choice of this file,
where the paper is silent, or where measurements favoured another one.

What a run keeps: each stage has a folder RUNS/DATASET/STAGE-KEY. It holds result.pt and, for a
training, metrics.jsonl and, until it ends, snapshot.pt, from which the same command goes on: after
Ctrl-C from the step that was just done, after kill -9 from the last validation. (Codes begin
again.) RUNS/DATASET/results.jsonl has a line for each training that ended.

Left out: pretrained language models (text becomes vectors by TF-IDF; --item-vectors brings your
own), the search for hyper-parameters, and serving.
"""
import argparse
import copy
import dataclasses
import gc
import inspect
import itertools
import math
import os
import re
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import data as datasets
from data import DataError


# =============================================== 1. codes: an item becomes a short path

def nearest(points, centres):
    """The index of the nearest of some centres (k, d) to each of points (n, d): (n,)."""
    return torch.cdist(points, centres).argmin(1)


@torch.no_grad()
def kmeans(points, k, iterations=20):
    """Lloyd's algorithm: centres (k, d) of points (n, d). An empty cluster keeps its
    centre."""
    centres = points[torch.randint(len(points), (k,), device=points.device)]
    for _ in range(iterations):
        own = nearest(points, centres)                                  # (n,)
        count = torch.bincount(own, minlength=k)[:, None]
        total = torch.zeros_like(centres).index_add_(0, own, points)
        centres = torch.where(count > 0, total / count.clamp(min=1), centres)
    return centres


class ResidualQuantiser(nn.Module):
    """L codebooks of C vectors; each quantises what the levels before it left over
    (TIGER, 3.1)."""

    def __init__(self, levels, size, dim, commitment=0.25):
        super().__init__()
        self.codebooks = nn.Parameter(torch.randn(levels, size, dim))
        self.commitment = commitment

    @torch.no_grad()
    def initialise(self, x):
        """Set the codebooks to k-means centres of the residuals of x (n, d), level by
        level."""
        for codebook in self.codebooks:
            codebook.copy_(kmeans(x, len(codebook)))
            x = x - codebook[nearest(x, codebook)]

    @torch.no_grad()
    def restart_dead_codes(self, x):
        """Move each code that no row of x (n, d) uses to the residual of a random
        row."""
        for codebook in self.codebooks:
            code = nearest(x, codebook)                                 # (n,)
            dead = torch.bincount(code, minlength=len(codebook)) == 0   # (C,)
            elsewhere = x[torch.randint(len(x), dead.shape, device=x.device)]
            x = x - codebook[code]
            codebook[dead] = elsewhere[dead]

    def forward(self, x):
        """x (B, d) -> codes (B, L); the sum of the chosen code vectors (B, d), straight
        through (its gradient is x's); the codebook and commitment losses, a scalar."""
        residual = x
        value = torch.zeros_like(x)
        loss = 0.0
        codes = []
        for codebook in self.codebooks:
            code = nearest(residual.detach(), codebook.detach())        # (B,)
            chosen = codebook[code]                                     # (B, d)
            codes.append(code)

            # The code moves to what it stands for, the encoder stays near its code.
            loss += F.mse_loss(chosen, residual.detach())
            loss += self.commitment * F.mse_loss(residual, chosen.detach())

            # The code is subtracted as a constant, so that the residual keeps the
            # gradient of x and commitment trains the encoder at every level. (Minus a
            # straight-through code, whose gradient is x's, it would have none.)
            residual = residual - chosen.detach()
            value = value + chosen
        return torch.stack(codes, 1), x + (value - x).detach(), loss


def mlp(*widths):
    """Linear layers of these widths with ReLU between them."""
    layers = []
    for d_in, d_out in zip(widths, widths[1:]):
        layers += [nn.Linear(d_in, d_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class RQVAE(nn.Module):
    """Vectors (B, d_in) -> latent vectors (B, dim) -> codes -> reconstruction (B, d_in)
    (TIGER, 3.1)."""

    def __init__(self, d_in, levels, size, dim=32):
        super().__init__()
        self.encoder = mlp(d_in, 256, 128, dim)
        self.decoder = mlp(dim, 128, 256, d_in)
        self.quantiser = ResidualQuantiser(levels, size, dim)

    def forward(self, x):
        """x (B, d_in) -> reconstruction and quantisation loss, a scalar; the quantised
        latent vectors (B, dim); codes (B, L)."""
        codes, value, loss = self.quantiser(self.encoder(x))
        return F.mse_loss(self.decoder(value), x) + loss, value, codes


def alignment_loss(value, collaborative):
    """LETTER's alignment: a quantised item (B, d) must find its own collaborative
    vector (B, d)."""
    own = torch.arange(len(value), device=value.device)
    return F.cross_entropy(value @ collaborative.T, own)


def diversity_loss(codebook, codes):
    """LETTER's diversity: pulls each chosen code towards the others of its cluster of the
    codebook, away from all codes beyond, so that codes are used evenly. [ours]:
    all others of the cluster, where LETTER draws one; k-means, where its clusters are
    of equal size. codebook (C, d), codes (B,) -> scalar."""
    fixed = codebook.detach()
    cluster = nearest(fixed, kmeans(fixed, 10))                         # (C,)
    own = F.one_hot(codes, len(codebook))                               # (B, C)
    others = (cluster[codes][:, None] == cluster).float() - own         # (B, C)
    # A code is not its own neighbour. (-inf would make 0 * inf, which is NaN.)
    logits = codebook[codes] @ codebook.T - 1e9 * own
    return F.cross_entropy(logits, others / others.sum(1, True).clamp(min=1))


def train_codes(vectors, levels, size, epochs, collaborative=None, alignment=0.1, diversity=1e-4,
                batch=1024):
    """Train an RQ-VAE on item vectors (N, d_in), LETTER's where collaborative vectors
    (N, 32) are given -> codes (N, levels). diversity [LETTER]; rate, alignment, batch
    [ours]. Items may share their codes: then `unique_paths` in data.py appends a code
    that counts them, and (3, 1), (3, 1), (0, 2) become (3, 1, 0), (3, 1, 1), (0, 2, 0)."""
    model = RQVAE(vectors.shape[1], levels, size).to(vectors.device)
    quantiser = model.quantiser
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    annealing = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, epochs)
    quantiser.initialise(model.encoder(vectors))

    for epoch in tqdm(range(epochs), "codes", disable=None, leave=False):
        for rows in torch.randperm(len(vectors), device=vectors.device).split(batch):
            loss, value, codes = model(vectors[rows])
            if collaborative is not None:
                loss += alignment * alignment_loss(value, collaborative[rows])
                for codebook, code in zip(quantiser.codebooks, codes.T):
                    loss += diversity / levels * diversity_loss(codebook, code)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            optimiser.zero_grad()
        annealing.step()

        # Now and then unused codes move to where items are; at last they rest.
        if epoch % 16 == 15 and epoch < 0.8 * epochs:
            quantiser.restart_dead_codes(model.encoder(vectors))
    return model(vectors)[2]


# =========================== 2. SASRec: the collaborative model, which scores each item

class SASRec(nn.Module):
    """Self-attentive sequential recommendation (Kang and McAuley 2018): scores every
    item as the next."""

    def __init__(self, n_items, dim=128, layers=2, heads=2, dropout=0.4, max_length=20):
        super().__init__()
        self.item = nn.Embedding(n_items + 1, dim, padding_idx=n_items)
        self.position = nn.Embedding(max_length, dim)
        nn.init.normal_(self.item.weight[:-1], std=0.02)
        nn.init.normal_(self.position.weight, std=0.02)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(dim, heads, 4 * dim, dropout, batch_first=True, norm_first=True)
            for _ in range(layers))
        self.norm = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, history):
        """History (B, T) -> states (B, T, d). State t has seen the items 0 .. t alone, so
        no state of an item has seen padding, which is on the right."""
        length = history.shape[1]
        x = self.dropout(self.item(history) + self.position.weight[:length])
        future = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        for block in self.blocks:
            x = block(x, src_mask=future, is_causal=True)
        return self.norm(x)

    def scores(self, history):
        """History (B, T), none empty -> each item's score as the next one (B, N). In
        float32: in bf16 the best items would tie."""
        last = (history != self.item.padding_idx).sum(1) - 1            # (B,)
        rows = torch.arange(len(history), device=history.device)
        state = self(history)[rows, last].float()                       # (B, d)
        with torch.autocast(state.device.type, enabled=False):
            return state @ self.item.weight[:-1].T

    def loss(self, history, target):
        """Cross-entropy of the next item, by the softmax over all items, at every
        position of a window: its mean over each row's targets. history, target (B, T),
        N where padded -> (B,). [ours]: the original draws one negative item for each
        target; the full softmax is stronger."""
        n_items = self.item.padding_idx
        logits = self(history) @ self.item.weight[:-1].T                # (B, T, N)
        loss = F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=n_items,
                               reduction="none").view_as(target)
        return loss.sum(1) / (target != n_items).sum(1)


# ====================================== 3. T5: the generator, a policy with a flow head

class Dropout(nn.Module):
    """Dropout. On a CPU one random number for each element costs more than the layer
    before it: there, a mask is a piece of one long strip of masks, from one of 2^24
    places."""

    def __init__(self, p):
        super().__init__()
        self.p = p
        self.strip = torch.empty(0)

    def forward(self, x):
        if not self.training or self.p == 0 or x.device.type != "cpu":
            return F.dropout(x, self.p, self.training)
        places = 1 << 24
        if len(self.strip) < places + x.numel() or self.strip.dtype != x.dtype:
            # Of a fixed seed: a resumed run, or a longer strip, has the same masks.
            noise = torch.rand(places + 2 * x.numel(), generator=torch.Generator().manual_seed(0))
            self.strip = (noise >= self.p).to(x.dtype) / (1 - self.p)
        start = int(torch.randint(places, ()))
        return x * self.strip[start:start + x.numel()].view(x.shape)


class RMSNorm(nn.Module):
    """T5's norm: x / sqrt(mean(x^2) + 1e-6) * weight, in the type of x."""

    def __init__(self, d):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d))

    def forward(self, x):
        scale = (x.square().mean(-1, True) + 1e-6).rsqrt()
        return x * scale.to(x.dtype) * self.weight.to(x.dtype)


def linear(d_in, d_out, std=None):
    """A linear layer without a bias, as all of T5's, its weights drawn from N(0,
    std^2), with std^2 = 1 / d_in unless said otherwise."""
    layer = nn.Linear(d_in, d_out, bias=False)
    nn.init.normal_(layer.weight, std=std or d_in ** -0.5)
    return layer


class Attention(nn.Module):
    """T5's attention: unscaled dot products, plus a bias for the distance."""

    def __init__(self, d_model, heads, d_kv, dropout):
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        # T5 does not divide its logits by sqrt(d_kv): q's weights begin smaller by that.
        self.q = linear(d_model, heads * d_kv, (d_model * d_kv) ** -0.5)
        self.kv = linear(d_model, 2 * heads * d_kv)
        self.o = linear(heads * d_kv, d_model)

    def keys_values(self, x):
        """x (B, S, d) -> keys and values, (B, H, S, d_kv) each."""
        return self.kv(x).unflatten(-1, (2 * self.heads, -1)).transpose(1, 2).chunk(2, 1)

    def forward(self, x, keys, values, bias):
        """Queries x (B, S, d), keys and values (B, H, S', d_kv), bias (.., S, S')
        -> (B, S, d)."""
        queries = self.q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        logits = queries @ keys.transpose(-1, -2) + bias                # (B, H, S, S')
        weights = logits.softmax(-1).to(values.dtype)   # on a GPU autocast gives float32
        mixed = self.dropout(weights) @ values                          # (B, H, S, d_kv)
        return self.o(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """x + f(norm(x)), f being self-attention, in a decoder cross-attention, and
    feed-forward."""

    def __init__(self, d_model, heads, d_kv, d_ff, dropout, decoder):
        super().__init__()
        self.dropout = dropout
        self.attention = Attention(d_model, heads, d_kv, dropout)
        self.attention_norm = RMSNorm(d_model)
        if decoder:
            self.cross = Attention(d_model, heads, d_kv, dropout)
            self.cross_norm = RMSNorm(d_model)
        self.wi = linear(d_model, d_ff)
        self.wo = linear(d_ff, d_model)
        self.ff_norm = RMSNorm(d_model)

    def forward(self, x, bias, memory=None, past=None):
        """x (B, S, d), in a decoder (B * P, S, d) -> the same, and its keys and values
        for later steps. memory: keys and values (B, H, M, d_kv) of histories, and bias
        (B, 1, 1, M); past: keys and values of earlier steps."""
        h = self.attention_norm(x)
        present = self.attention.keys_values(h)
        if past:
            present = [torch.cat(pair, 2) for pair in zip(past, present)]
        x = x + self.dropout(self.attention(h, *present, bias))

        # All P paths of a history ask the same memory, which is never repeated.
        if memory:
            h = self.cross_norm(x).view(len(memory[0]), -1, x.shape[-1])  # (B, P * S, d)
            x = x + self.dropout(self.cross(h, *memory)).view(x.shape)

        h = self.dropout(self.wi(self.ff_norm(x)).relu())
        return x + self.dropout(self.wo(h)), present


def relative_buckets(distance, two_sided, n=32, furthest=128):
    """T5's bucket of each distance (a key's position less the query's), of any shape:
    half of a side's buckets hold one distance each, the others grow logarithmically up
    to `furthest`."""
    offset = 0
    if two_sided:
        n = n // 2
        offset = n * (distance > 0)
        distance = -distance.abs()
    distance = (-distance).clamp(min=0)
    exact = n // 2
    growth = torch.log(distance.clamp(min=1) / exact) / math.log(furthest / exact)
    far = (exact + (growth * (n - exact)).long()).clamp(max=n - 1)
    return offset + torch.where(distance < exact, distance, far)


class T5(nn.Module):
    """The standard T5 (Raffel et al. 2020) over codes, with a head for the flow. Token
    0 pads and starts; 1 + l * C + c is code c of level l. levels and n_codes are those of
    the finished paths: L is one more than the codebooks where a last code tells twins
    apart, C is 1 + the largest code of any level."""

    def __init__(self, levels, n_codes, d_model, heads, d_kv, d_ff, layers, dropout,
                 temperature=1.0):
        super().__init__()
        self.levels = levels
        self.n_codes = n_codes
        # The embeddings give the logits, too. As their entries are about 1, T5 scales states.
        self.scale = d_model ** -0.5 / temperature
        self.embedding = nn.Embedding(1 + levels * n_codes, d_model)
        self.dropout = Dropout(dropout)
        size = (d_model, heads, d_kv, d_ff, self.dropout)
        self.encoder = nn.ModuleList(Block(*size, decoder=False) for _ in range(layers))
        self.decoder = nn.ModuleList(Block(*size, decoder=True) for _ in range(layers))
        self.encoder_bias = nn.Embedding(32, heads)
        self.decoder_bias = nn.Embedding(32, heads)
        for bias in (self.encoder_bias, self.decoder_bias):
            nn.init.normal_(bias.weight, std=d_model ** -0.5)
        self.encoder_norm = RMSNorm(d_model)
        self.decoder_norm = RMSNorm(d_model)
        self.flow_head = linear(d_model, 1)
        self.log_z = nn.Parameter(torch.zeros(()))  # --z global: log Z of all users, less log N

    def embed(self, tokens):
        """Tokens (..) -> (.., d). Under autocast all vectors have its type from here
        on."""
        x = self.embedding(tokens)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return self.dropout(x)

    def encode(self, tokens):
        """Tokens of histories (B, T, L), 0 where padded -> the memory, once for all
        paths: for each block of the decoder, keys and values (B, H, M, d_kv) and a bias
        (B, 1, 1, M)."""
        tokens = tokens.flatten(1)                                     # (B, M), M = T * L
        x = self.embed(tokens)
        position = torch.arange(tokens.shape[1], device=tokens.device)
        buckets = relative_buckets(position - position[:, None], two_sided=True)
        pad = x.new_zeros(tokens.shape).masked_fill(tokens == 0, -torch.inf)[:, None, None]
        # Contiguous, as the logits are: a bias of another layout takes three times as
        # long to add.
        bias = self.encoder_bias(buckets).permute(2, 0, 1).contiguous()  # (H, M, M)
        bias = bias.to(x.dtype) + pad                                   # (B, H, M, M)
        for block in self.encoder:
            x, _ = block(x, bias)
        x = self.dropout(self.encoder_norm(x))
        return [(*block.cross.keys_values(x), pad) for block in self.decoder]

    def decode(self, tokens, memory, past=None):
        """Tokens (B, P, S) of P paths of each history, 0 first -> states (B, P, S, d),
        a cache. State l is s_l: it has read the codes y_1 .. y_l and predicts y_{l+1}.
        past: the cache of earlier steps; then S counts the new ones."""
        before = past[0][0].shape[2] if past else 0
        position = torch.arange(before + tokens.shape[2], device=tokens.device)
        distance = position - position[before:, None]                   # (S, S')
        x = self.embed(tokens.flatten(0, 1))                            # (B * P, S, d)
        bias = self.decoder_bias(relative_buckets(distance, two_sided=False)).permute(2, 0, 1)
        bias = bias.masked_fill(distance > 0, -torch.inf).to(x.dtype)   # (H, S, S')
        cache = []
        past = past or [None] * len(memory)
        for block, block_memory, block_past in zip(self.decoder, memory, past):
            x, keys_values = block(x, bias, block_memory, block_past)
            cache.append(keys_values)
        return self.dropout(self.decoder_norm(x)).view(*tokens.shape, -1), cache

    def code_logits(self, state, level):
        """States s_level (.., d) -> logits (.., C) of the next code, by T5's tied
        embeddings."""
        first = 1 + level * self.n_codes
        table = self.embedding.weight[first:first + self.n_codes]
        return (state * self.scale) @ table.T.to(state.dtype)


# ================= 4. a policy on a tree: its probabilities, its flows, its best leaves

class Trie:
    """The catalogue as a tree of codes, in O(N) memory. A level's nodes are numbered so
    that the children of a node are neighbours. For the items (0, 1), (0, 2) and (3, 1),
    where "1 (3)" is node 1, to which code 3 leads:

        0 --+-- 0 (0) --+-- 0 (1)  item 0     path = [[0, 0, 0], [0, 0, 1], [0, 1, 2]]
            |           +-- 1 (2)  item 1     code = [0, 3], [1, 2, 1]
            +-- 1 (3) ----- 2 (1)  item 2     first_child = [0], [0, 2]; n_children = [2], [2, 1]
    """

    def __init__(self, codes, semantic=None, all_codes=False):
        """codes (N, L), no two rows the same, else ValueError; semantic: how many
        leading codes say what an item is like (a last one may only count twins), all by
        default; all_codes: see `log_probs`."""
        n_codes = int(codes.max()) + 1
        tokens = 1 + codes + n_codes * torch.arange(codes.shape[1], device=codes.device)
        self.codes = codes
        self.n_codes = n_codes
        self.tokens = F.pad(tokens, (0, 0, 0, 1))  # (N + 1, L), the generator's; 0 for the padding
        self.semantic = codes[:, :semantic]             # (N, L) or (N, L - 1)
        self.all_codes = all_codes

        # Of each level's nodes: the first child and how many there are; of the children:
        # the code that leads to each.
        self.code = []
        self.first_child = []
        self.n_children = []
        self.width = []                         # the most children of any node
        node = torch.zeros_like(codes[:, 0])     # (N,) where each item's path has come to
        path = [node]
        leaves = []
        for column in codes.T:
            leaves.append(torch.bincount(node)[node])           # (N,) the items below
            # A child's key is (its parent, its code). They come sorted, so by parent.
            key, node = torch.unique(node * n_codes + column, return_inverse=True)
            children = torch.bincount(key // n_codes)
            self.code.append(key % n_codes)
            self.first_child.append(children.cumsum(0) - children)
            self.n_children.append(children)
            self.width.append(int(children.max()))
            path.append(node)
        if len(key) != len(codes):
            raise ValueError(f"{len(codes)} items have only {len(key)} different paths of codes")
        self.path = torch.stack(path, 1)     # (N, L + 1) nodes from the root to each item
        self.log_leaves = torch.stack(leaves, 1).log()    # (N, L) of the items below each
        self.leaf_item = torch.argsort(node)                  # (N,) the item of each leaf

    def log_probs(self, logits, node, level):
        """Logits (.., C) at nodes (..) of a level -> children (.., width) and the log
        probability of each, -inf where a node has fewer. [ours]: normalised over the
        codes that lead to an item, so that the probabilities of all items sum to one
        and the optimum of TB is p = R / Z; all_codes: over all C."""
        # Children lie side by side; where a node has few, the first fills the other places.
        slot = torch.arange(self.width[level], device=node.device)
        real = slot < self.n_children[level][node][..., None]           # (.., width)
        child = self.first_child[level][node][..., None] + slot * real
        logits = logits.float()
        if self.all_codes:
            logits = logits.log_softmax(-1)
        log_probs = logits.gather(-1, self.code[level][child]).masked_fill(~real, -torch.inf)
        if not self.all_codes:
            log_probs = log_probs.log_softmax(-1)
        return child, log_probs


def path_log_probs(policy, trie, history, items):
    """How likely is each step to the policy, and what flow does it see at each state?
    history (B, T), items (B, P) -> (B, P, L) each: at l = 0 .. L - 1 the step out of
    s_l, log P_F(s_{l+1} | s_l), and log F(s_l). (F(s_L) is R itself: no head is needed.)"""
    path = trie.path[items]                                             # (B, P, L + 1)
    tokens = F.pad(trie.tokens[items][..., :-1], (1, 0))              # (B, P, L), 0 first
    states, _ = policy.decode(tokens, policy.encode(trie.tokens[history]))  # (B, P, L, d)
    log_pf = []
    for level in range(policy.levels):
        logits = policy.code_logits(states[..., level, :], level)       # (B, P, C)
        child, log_probs = trie.log_probs(logits, path[..., level], level)
        # Children have consecutive numbers, so this is the place of the path's next node.
        slot = path[..., level + 1, None] - child[..., :1]
        log_pf.append(log_probs.gather(-1, slot))                       # (B, P, 1)

    # F(s) is the reward of all items below s: their number times their mean R. So log F
    # starts near the log of their number, and the head learns the rest.
    log_flow = policy.flow_head(states)[..., 0].float() + trie.log_leaves[items]
    return torch.cat(log_pf, -1), log_flow


def gumbel_like(x):
    """Noise such that the argmax of log p + noise is a draw from p, and its top K are K
    draws without replacement."""
    return -torch.empty_like(x).exponential_().log()


@torch.no_grad()
def beam_search(policy, trie, history, width=20):
    """The likeliest items that `width` beams find, best first, and their log p: (B,
    width) each. All beams walk along the trie, so each ends at an item, and no two at
    the same. Needs a catalogue of `width` items or more."""
    memory = policy.encode(trie.tokens[history])
    node = token = history.new_zeros(len(history), 1)                   # (B, W): the root
    log_p = torch.zeros_like(node, dtype=torch.float)
    past = None
    for level in range(policy.levels):
        state, past = policy.decode(token[..., None], memory, past)     # (B, W, 1, d)
        logits = policy.code_logits(state[..., 0, :], level)
        child, log_probs = trie.log_probs(logits, node, level)          # (B, W, children)

        # Of all children of all beams of a history, the best `width`. (Where a level has
        # fewer, fillers at -inf are among them; deeper they lose against real ones.)
        total = (log_p[..., None] + log_probs).flatten(1)              # (B, W * children)
        log_p, best = total.topk(min(width, total.shape[1]))
        node = child.flatten(1).gather(1, best)
        token = 1 + level * policy.n_codes + trie.code[level][node]

        # Each goes on from the keys and values of the beam that it comes from: in the cache,
        # row history * W + beam, W being how many there were before this level.
        first = torch.arange(len(history), device=node.device)[:, None] * child.shape[1]
        beam = (first + best // child.shape[2]).flatten()
        past = [(keys[beam], values[beam]) for keys, values in past]

    return trie.leaf_item[node], log_p


@torch.no_grad()
def draw_items(policy, trie, history, n):
    """n items (B, n) for each history, drawn from the policy code by code, each time among the
    codes that lead to an item: so from p itself, but with all_codes only from near it."""
    memory = policy.encode(trie.tokens[history])
    node = token = history.new_zeros(len(history), n)                   # (B, n): the root
    past = None
    for level in range(policy.levels):
        state, past = policy.decode(token[..., None], memory, past)     # (B, n, 1, d)
        logits = policy.code_logits(state[..., 0, :], level)
        child, log_probs = trie.log_probs(logits, node, level)          # (B, n, children)
        slot = (log_probs + gumbel_like(log_probs)).argmax(-1, keepdim=True)
        node = child.gather(-1, slot)[..., 0]
        token = 1 + level * policy.n_codes + trie.code[level][node]
    return trie.leaf_item[node]


# ============================== 5. GFlowGR: which paths, what they are worth, balance

def curriculum_sample(scores, history, clicked, k, beta, pool=512):
    """K items for each user that are neither clicked nor in the history, easy ones (low
    scores) at beta < 0, hard ones at beta > 0, any at 0 (Section 3.1). scores (B, N),
    history (B, T), clicked (B,) -> ids (B, k). [ours]: the draw, without replacement
    from softmax(beta * z), z being the standardised score, out of a pool of random
    items that the batch shares."""
    ids = torch.randperm(scores.shape[1], device=scores.device)[:pool]  # (N',)
    z = F.layer_norm(scores[:, ids], ids.shape)                         # (B, N')
    known = torch.cat([history, clicked[:, None]], 1)                   # (B, T + 1)
    taken = (ids[:, None] == known[:, None]).any(-1)                    # (B, N')
    preference = (beta * z + gumbel_like(z)).masked_fill(taken, -torch.inf)
    return ids[preference.topk(k).indices]


def collaborative_score(scores):
    """r_cs of every item, from the collaborative model's scores (B, N): into [0, 1] by
    each user's lowest and highest score [ours]. (B, N)."""
    low = scores.amin(1, True)              # on a CPU `aminmax` takes far longer
    high = scores.amax(1, True)
    return (scores - low) / (high - low).clamp(min=1e-6)


def code_similarity(codes, clicked):
    """r_sim: the share of levels at which codes (B, P, L) are the clicked item's
    (B, L)."""
    return (codes == clicked[:, None]).float().mean(-1)


def reward(r_aug, r_cs, r_sim, parts="aug,cs,sim", floor=1e-4):
    """R = r_aug + r_cs + r_sim (Section 3.2), each in [0, 1]: was the item clicked (r_aug: 1
    for the click, 0 for what was augmented), how does the collaborative model score it, how
    many codes does it share with the clicked one. So R is 2 to 3 for a click, 0 to 2 for
    others. `parts` names those that count. [ours]: at least `floor`, so that its log is
    finite."""
    terms = {"aug": r_aug, "cs": r_cs, "sim": r_sim}
    return sum(terms[part] for part in parts.split(",")).clamp(min=floor)


def confidence(r_aug, r_cs):
    """Eq. 8, w = 1 - |r_aug - r_cs|: little where click and collaborative model
    disagree. So w is r_cs for a clicked item, and 1 - r_cs for another one."""
    return 1 - (r_aug - r_cs).abs()


def sft(log_pf):
    """Eq. 1: -sum_l log P_F(s_l | s_{l-1}), of the path of a clicked item. (.., L) ->
    (..)."""
    return -log_pf.sum(-1)


def detailed_balance(log_pf, log_flow, log_reward):
    """Eq. 5: sum_l (log F(s_{l-1}) + log P_F(s_l | s_{l-1}) - log F(s_l))^2, where log
    F(s_L) is log R. log_pf, log_flow (.., L), log_reward (..) -> (..)."""
    flow_in = log_flow + log_pf
    flow_out = torch.cat([log_flow[..., 1:], log_reward[..., None]], -1)
    return (flow_in - flow_out).square().sum(-1)


def trajectory_balance(log_pf, log_flow, log_reward):
    """Eq. 6: (log Z + sum_l log P_F(s_l | s_{l-1}) - log R)^2. log Z is log F(s_0), so
    it is the user's own, as the rewards of two users do not sum to the same [ours].
    Shapes as above; of log_flow only s_0's counts."""
    log_z = log_flow[..., 0]
    return (log_z + log_pf.sum(-1) - log_reward).square()


def gflowgr_loss(policy, teacher, trie, history, clicked, beta, k=4, lam=0.01,
                 balance=trajectory_balance, parts="aug,cs,sim", weigh=True, global_z=False):
    """Eq. 7: L_SFT + lambda * the sum over the clicked item and K augmented ones of w *
    L_GFN. history (B, T), clicked (B,) -> (B,), and what it was made of. Only the
    policy learns. The two parts pull apart: SFT wants p = 1 for the click, balance p =
    R / Z. global_z: one parameter instead of the head at s_0, as the paper has it."""
    with torch.no_grad():
        # Which paths? The clicked item, and K others that are not in the history, easy
        # ones first (3.1).
        scores = teacher.scores(history)                                # (B, N)
        augmented = curriculum_sample(scores, history, clicked, k, beta)  # (B, K)
        items = torch.cat([clicked[:, None], augmented], 1)            # (B, P), P = 1 + K

        # What is each worth (3.2), and how far do the signals agree (Eq. 8)?
        r_aug = (items == clicked[:, None]).float()                     # (B, P)
        r_cs = collaborative_score(scores).gather(1, items)             # (B, P)
        r_sim = code_similarity(trie.semantic[items], trie.semantic[clicked])  # (B, P)
        r = reward(r_aug, r_cs, r_sim, parts)                           # (B, P)
        w = confidence(r_aug, r_cs) if weigh else torch.ones_like(r)    # (B, P)

    # How likely is each step to the policy, and what flow does it see at each state?
    log_pf, log_flow = path_log_probs(policy, trie, history, items)     # (B, P, L) each
    if global_z:
        log_flow[..., 0] = policy.log_z + math.log(len(trie.codes))

    # Balance: how far is each path from it? (By TB: its probability times all the flow
    # should be its reward.)
    loss_gfn = (w * balance(log_pf, log_flow, r.log())).sum(1)          # (B,)
    loss_sft = sft(log_pf[:, 0])                                        # (B,)
    return loss_sft + lam * loss_gfn, {
        "sft": loss_sft, "gfn": loss_gfn, "log Z": log_flow[:, 0, 0], "log p": log_pf.sum(-1),
        "R": r, "w": w, "r_aug": r_aug, "r_cs": r_cs, "r_sim": r_sim, "items": items}


@torch.no_grad()
def all_rewards(teacher, trie, history, clicked, parts="aug,cs,sim"):
    """R of every item (B, N), given the click. Their sum is the exact Z: here all leaves can
    be listed. (R knows the click, the policy does not: where equal histories have
    different next clicks, the learned Z(x) settles between theirs.)"""
    r_aug = F.one_hot(clicked, len(trie.codes)).float()
    r_cs = collaborative_score(teacher.scores(history))
    return reward(r_aug, r_cs, code_similarity(trie.semantic[None], trie.semantic[clicked]), parts)


# =========================== 6. the other methods of the paper's Table 1, and a control

def sft_loss(policy, trie, history, clicked):
    """SFT. Each loss that `objective` calls has this form: models, the tree, histories
    (B, T), clicked items (B,) -> (B,), and a dictionary of what the log should note."""
    log_pf, _ = path_log_probs(policy, trie, history, clicked[:, None])
    return sft(log_pf[:, 0]), {}


def dpo(chosen, rejected, beta):
    """S-DPO (Chen et al. 2024): -log sigmoid(-log sum_j exp(beta (D-_j - D+))), D being
    log p - log p_ref; with one rejected path it is DPO (Rafailov et al. 2023).
    chosen D+ (B,), rejected D- (B, K) -> (B,)."""
    return -F.logsigmoid(-(beta * (rejected - chosen[:, None])).logsumexp(1))


def path_log_p(policy, trie, history, items):
    """log p of whole paths (B, P), without dropout, as its noise alone would move p /
    p_ref away from 1. Leaves the policy so; each step of `Step` sets it to train."""
    policy.eval()
    return path_log_probs(policy, trie, history, items)[0].sum(-1)


def preference_loss(policy, reference, trie, history, chosen, rejected, beta=1.0):
    """`dpo` of items: chosen (B,), rejected (B, K) -> (B,). beta [paper]."""
    items = torch.cat([chosen[:, None], rejected], 1)                   # (B, 1 + K)
    ratio = path_log_p(policy, trie, history, items)
    ratio = ratio - path_log_p(reference, trie, history, items).detach()
    return dpo(ratio[:, 0], ratio[:, 1:], beta)


def dpo_loss(policy, reference, trie, history, clicked, negatives=1):
    """DPO, or S-DPO with several negatives: the clicked item against random ones."""
    alike = torch.zeros(len(history), len(trie.codes), device=history.device)
    random = curriculum_sample(alike, history, clicked, negatives, 0.0)  # (B, K)
    return preference_loss(policy, reference, trie, history, clicked, random), {}


def sprec_loss(policy, old, trie, history, clicked, progress, beta=0.1):
    """SPRec (Gao et al. 2025): each of five iterations of self-play is SFT, then DPO of the
    clicked item against a draw of the policy of the iteration before, which is the
    reference, too. [ours]: a draw of the clicked item counts nothing. beta, 5 [paper]."""
    if progress * 5 % 1 < 0.5:          # as `train_generator` counts them
        return sft_loss(policy, trie, history, clicked)
    drawn = draw_items(old, trie, history, 1)                           # (B, 1)
    loss = preference_loss(policy, old, trie, history, clicked, drawn, beta)
    return loss * (drawn[:, 0] != clicked), {}


def ipa_loss(policy, old, reference, teacher, trie, history, clicked, lam=0.01):
    """IPA: SFT, and DPO of the item of best reward against that of worst, among those
    that a beam search of a recent policy finds. lam [ours]."""
    loss, _ = sft_loss(policy, trie, history, clicked)
    items, _ = beam_search(old, trie, history)                          # (B, W)
    rewards = all_rewards(teacher, trie, history, clicked).gather(1, items)
    order = items.gather(1, rewards.argsort(1, descending=True))
    preference = preference_loss(policy, reference, trie, history, order[:, 0], order[:, -1:])
    return loss + lam * preference, {"R": rewards}


def clipped_loss(log_p, log_old, log_ref, advantage, clip=0.2, kl=1e-3):
    """-min(r A, clip(r, 1 - e, 1 + e) A), r = p / p_old (Schulman et al. 2017, Eq. 7),
    plus kl * (q - 1 - log q), q = p_ref / p (Shao et al. 2024, Eq. 4). (B, P) each.
    clip, kl [paper]; [ours]: a whole path is one action."""
    ratio = (log_p - log_old).exp()
    gain = torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
    log_q = log_ref - log_p
    return kl * (log_q.exp() - 1 - log_q) - gain


def group_advantage(rewards):
    """GRPO's advantage: the standard score of a reward in its group. (B, P)."""
    return F.layer_norm(rewards, rewards.shape[1:], eps=1e-8)


def policy_gradient_loss(policy, old, reference, teacher, trie, history, clicked, critic,
                         group=16):
    """PPO with a critic, GRPO without one, on items that a recent policy draws. [ours]:
    the critic V(x) is what the flow head says at the root. group [paper]."""
    drawn = draw_items(old, trie, history, group)                       # (B, P)
    rewards = all_rewards(teacher, trie, history, clicked).gather(1, drawn)
    policy.eval()                       # as in `path_log_p`
    log_pf, log_flow = path_log_probs(policy, trie, history, drawn)
    # V(x) is what the head itself says: without the log N that `path_log_probs` adds.
    error = rewards - (log_flow[..., 0] - math.log(len(trie.codes)))        # R - V(x)
    advantage = error.detach() if critic else group_advantage(rewards)
    log_old = path_log_p(old, trie, history, drawn).detach()
    log_ref = path_log_p(reference, trie, history, drawn).detach()
    loss = clipped_loss(log_pf.sum(-1), log_old, log_ref, advantage)
    return (loss + 0.5 * critic * error.square()).mean(1), {"R": rewards}


def distillation_loss(policy, teacher, trie, history, clicked, share=0.1):
    """A control of ours: what does it bring to learn from SASRec without a flow
    network? SFT, in which one in ten targets is a draw from SASRec's softmax."""
    with torch.no_grad():
        scores = teacher.scores(history)
        drawn = (scores + gumbel_like(scores)).argmax(1)                # (B,)
        other = torch.rand(drawn.shape, device=drawn.device) < share
    return sft_loss(policy, trie, history, torch.where(other, drawn, clicked))


# ============================================================ 7. settings, command line

def has_bf16():
    """Whether the GPU, or where there is none the CPU, multiplies in bf16."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(False)
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and "bf16" in cpuinfo.read_text()


@dataclasses.dataclass
class Config:
    """All settings. [paper], [TIGER], [LETTER]: as those have it; [ours]: our choice. The
    program reads the comments: one after a setting is its --help; a line of one word
    opens a group, and a stage is kept by the groups of settings that it depends on."""
    # data
    dataset: str = "toy"           # toy, beauty, yelp, instruments; a folder, a .csv
    item_vectors: str = ""         # a .npy file of item vectors, not TF-IDF + SVD
    codes: str = ""                # ready ones: a NAME.index.json; letter: LETTER's own
    # training
    max_history: int = 20          # items of a history that the models see [TIGER]
    precision: str = "bf16" if has_bf16() else "fp32"   # of matrix products; or fp16
    evaluations: int = 8           # validations, and snapshots, of a training [ours]
    valid_users: int = 4000        # users of these validations [ours]
    # codes
    backbone: str = "tiger"        # way to make codes, softmax temperature: tiger, letter
    levels: int = 3                # codebooks, + 1 code for twins [TIGER]; LETTER: 4
    codebook_size: int = 256       # codes of a level, C [TIGER]
    code_epochs: int = 250         # passes of the RQ-VAE over the items [ours]
    # sasrec
    sasrec_dim: int = 128          # width of SASRec [ours]
    sasrec_epochs: int = 30        # passes over the users [ours]
    # sft
    d_model: int = 128             # width of the generator, d [TIGER]
    heads: int = 4                 # attention heads, H [ours]; TIGER: 6
    d_kv: int = 32                 # dimensions of a head [ours]; TIGER: 64
    d_ff: int = 512                # width of feed-forward layers [ours]; TIGER: 1024
    layers: int = 3                # blocks of encoder, of decoder [ours]; TIGER: 4
    dropout: float = 0.1           # dropout of the generator [TIGER]
    softmax: str = "trie"          # over codes that lead to items [ours], all [TIGER]
    batch: int = 256               # training pairs in a batch [TIGER]
    lr: float = 0.02               # peak rate, relative to a weight's size [ours]
    sft_epochs: float = 20.0       # passes of SFT over the training pairs [ours]
    # finetune
    finetune_epochs: float = 3.0   # passes of each fine-tuning [ours]
    finetune_lr: float = 0.003     # peak rate of the fine-tuning [ours]
    # gflownet
    k: int = 4                     # augmented paths beside the clicked one, K [ours]
    lam: float = 0.01              # lambda of Eq. 7 [ours]
    beta: float = 3.0              # curriculum from -b to b [ours]; 0: random items
    reward: str = "aug,cs,sim"     # parts of the reward that count [paper]
    confidence: bool = True        # weight each path by Eq. 8 [paper]
    z: str = "user"                # Z of each user: user [ours]; of all: global [paper]
    # run
    loss: str = "tb"               # of sft,db,tb,dpo,sdpo,sprec,ipa,ppo,grpo,distil; all
    seeds: str = "42"              # a run for each, as 42,43,44; then mean and deviation
    data_dir: str = "data"         # where the datasets lie
    runs_dir: str = "runs"         # where every stage's result is kept
    device: str = "cuda" if torch.cuda.is_available() else "cpu"   # cpu or cuda
    show: int = 0                  # users to show the last loss's Eq. 7 and lists for
    diversity: bool = False        # how varied the lists are (Section 4.5)


# The toy world is small, and so are its models, unless flags say otherwise.
TOY = dict(levels=2, codebook_size=32, d_model=64, d_kv=16, d_ff=256, layers=2, batch=64,
           sft_epochs=6.0, finetune_epochs=2.0, evaluations=4, valid_users=1000)

# What settings may be: a type, one of a few, or several of a few.
TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
CHOICES = {"precision": TYPES, "backbone": ["tiger", "letter"], "softmax": ["trie", "all"],
           "z": ["user", "global"], "device": {"cpu", Config.device}}
LISTS = {"loss": "sft,db,tb,dpo,sdpo,sprec,ipa,ppo,grpo,distil", "reward": "aug,cs,sim"}


def settings_by_group():
    """{group: {setting: its help}}, as the comments of `Config` say."""
    groups = {}
    for line in inspect.getsource(Config).splitlines():
        if match := re.match("    # (.+)", line):
            groups[match[1]] = found = {}
        if match := re.match(r"    (\w+): .+  # (.+)", line):
            found[match[1]] = match[2]
    return groups


GROUPS = settings_by_group()        # as the run began: the file may be edited meanwhile


def command_line(argv=None):
    """The settings that flags name. Raises DataError where a value makes no sense."""
    parser = argparse.ArgumentParser("gflowgr.py", allow_abbrev=False,
                                     description=f"Defaults of the toy world: {TOY}",
                                     usage="python gflowgr.py [--loss tb] [--dataset beauty] ..")
    for title, settings in GROUPS.items():
        group = parser.add_argument_group(title)
        for name, text in settings.items():
            default = getattr(Config, name)
            kind = dict(type=type(default), choices=CHOICES.get(name), metavar=f"{default}")
            if isinstance(default, bool):
                kind = dict(action=argparse.BooleanOptionalAction)
            group.add_argument("--" + name.replace("_", "-"), default=default, help=text, **kind)
    if parser.parse_known_args(argv)[0].dataset == "toy":
        parser.set_defaults(**TOY)
    cfg = Config(**vars(parser.parse_args(argv)))

    if cfg.loss == "all":
        cfg.loss = LISTS["loss"]
    for name, value in vars(cfg).items():
        wrong = name in LISTS and not set(value.split(",")) <= set(LISTS[name].split(","))
        if name == "seeds":
            wrong = not re.fullmatch(r"\d{1,18}(,\d{1,18})*", value)
        if type(value) is int:
            wrong = value < (name not in ("k", "show"))         # at least 1; of these two, 0
            wrong |= name == "sasrec_dim" and value % 2         # it has two heads
        if type(value) is float:
            wrong = not 0 <= value < (1 if name == "dropout" else 1e9)
        if wrong:
            raise DataError(f"--{name.replace('_', '-')} {value} makes no sense; see --help")
    return cfg


# =================================================== 8. training: the one loop, in view

rank = int(os.environ.get("RANK", 0))              # torchrun tells each process who it is
world = int(os.environ.get("WORLD_SIZE", 1))


def join_processes(device):
    """Of several processes, as torchrun starts them, each takes its own GPU and joins
    the others. In a training they begin with the same weights and see the same order of
    batches; each takes its own rows of a batch and draws its own dropout; their
    gradients are added up. Codes and beam searches are not shared out: each process does
    all. Only the first prints and keeps results, and all go on with what it kept."""
    if world > 1:
        if device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
    if rank > 0:
        sys.stdout = open(os.devnull, "w")


def wait_for_all():
    """Let all processes come to this point before any goes on."""
    if world > 1:
        dist.barrier()


def mixed_precision(cfg):
    """A context in which matrix products have the precision of the settings. The
    weights, SASRec's scores of a user, and what the losses are made of are float32."""
    # Without a cache of cast weights (False): a graph would keep an old cast.
    return torch.autocast(cfg.device, TYPES[cfg.precision], cfg.precision != "fp32", False)


class Step(nn.Module):
    """A model and its loss in one module, which a GPU can record as one graph; and for
    losses that compare, two frozen copies of the model: the reference stays as it
    begins, `train` now and then makes the old one equal to today's."""

    def __init__(self, cfg, model, loss_of):
        super().__init__()
        self.cfg = cfg
        self.model = model
        self.loss_of = loss_of
        self.reference = copy.deepcopy(model).requires_grad_(False)
        self.old = copy.deepcopy(self.reference)

    def forward(self, progress, *batch):
        """progress, from 0 to 1, and a batch -> the loss and means to log, all
        scalars."""
        self.model.train()              # the loss may have left it in eval mode
        with mixed_precision(self.cfg):
            loss, seen = self.loss_of(*batch, progress, self.old, self.reference)
        self.loss = loss.mean()
        return self.loss, {name: x.detach().mean() for name, x in seen.items()
                           if x.is_floating_point()}


def relative_adamw(model, lr):
    """AdamW whose rate for each weight is lr times the weight's size (the root of its
    mean square) at the start, about 1 in the codes' embedding and 0.02 to 0.1 in a matrix,
    much as T5's own Adafactor has it [ours]."""
    groups = {}
    for weight in model.parameters():
        size = weight.detach().square().mean().sqrt().item()
        # To one digit, so that there are few groups. log_z begins at 0 and may have to go
        # several units: it counts as a weight of size 10.
        size = f"{size or 10:.0e}"
        groups.setdefault(size, []).append(weight)
    groups = [dict(params=weights, lr=lr * float(size)) for size, weights in groups.items()]
    return torch.optim.AdamW(groups, betas=(0.9, 0.99), fused=True)


@torch.no_grad()
def top_items(cfg, model, search, examples, users):
    """The 20 best items for each of some users (n,), by search(histories): (n, 20)."""
    model.eval()

    # Users whose histories are about equally long go together, so that little is padded.
    order = torch.argsort(examples.length[users], stable=True)
    found = []
    for rows in users[order].split(256 if cfg.device == "cpu" else 1024):
        history, _ = examples.batch(rows)
        with mixed_precision(cfg):
            found.append(search(history).cpu())
    return torch.cat(found)[order.argsort()]


def train(cfg, data, label, folder, model, loss_of, search, pairs, batch, epochs, optimiser,
          renew=None, graph=True):
    """The one loop that trains all recommenders; then the one scoring of the test users
    -> what a stage keeps. pairs: data.py's Examples, of which some rows give a batch of
    histories (B, T) and targets. N@10 of some validation users chooses the state to end
    with; after each `renew` steps the old model becomes today's. A training that was
    cut off goes on from folder/snapshot.pt. Raises DataError, and KeyboardInterrupt
    after Ctrl-C or SIGTERM, when the step is done and all of it is kept."""
    batch = min(batch, len(pairs.end))
    steps = max(math.ceil(epochs * len(pairs.end) / batch), 1)
    batches = datasets.batches(pairs, batch, torch.initial_seed())
    step = Step(cfg, model, loss_of)
    scaler = torch.amp.GradScaler(cfg.device, enabled=cfg.precision == "fp16")

    # The rate: up over the first twentieth of the training, then down half a cosine.
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda done: min(
        20 * (done + 1) / steps, 0.5 * (1 + math.cos(math.pi * done / steps))))
    parts = dict(step=step, optimiser=optimiser, scaler=scaler, schedule=schedule)

    # Leave one out: a user's last item is the test target, the last but one is validation's.
    def validate(users):
        top = top_items(cfg, model, search, data.parts["valid"], users)
        return datasets.ranking_metrics(top, data.items[data.offsets[1:] - 2][users])

    everyone = torch.arange(data.n_users)
    shuffled = torch.randperm(data.n_users, generator=torch.Generator().manual_seed(0))
    every = math.ceil(steps / cfg.evaluations)

    # Start, or go on where a run was cut off: the same state and, in one process on a
    # CPU, the same random numbers.
    at = dict(done=0, seconds=0.0, notes=[], best={}, score=-1.0, random=torch.get_rng_state(),
              code=CODE)
    at.update(datasets.load_tensors(folder / "snapshot.pt"))
    if at["done"]:
        print(f"{label}: goes on after step {at['done']:,} of {steps:,}", flush=True)
        for name, part in parts.items():
            part.load_state_dict(at[name])
    torch.set_rng_state(at["random"])
    if rank > 0:
        torch.manual_seed(torch.initial_seed() + rank)              # dropout of its own
    started = time.perf_counter() - at["seconds"]
    caught = []                         # signals, which wait for the end of a step
    stops = (signal.SIGINT, signal.SIGTERM)
    for number in stops:
        signal.signal(number, lambda *_: caught.append(True))

    bar = tqdm(itertools.islice(batches, at["done"], steps), label, steps, leave=False,
               initial=at["done"], disable=rank > 0 or None)
    for done, rows in enumerate(bar, at["done"] + 1):
        # Of several processes each takes its share of the batch.
        mine = rows[rank::world]
        progress = torch.full((), (done - 1) / steps, device=cfg.device)
        inputs = (progress, *pairs.batch(mine))

        # On a GPU the step becomes a graph: its hundreds of small kernels, one by one,
        # take longer to launch than to run. From then on all batches have these shapes.
        if graph and cfg.device == "cuda":
            graph = False                       # once: this replaces the step's forward
            gc.collect()                        # or an earlier training's graph keeps its memory
            torch.cuda.make_graphed_callables(step, inputs, allow_unused_input=True)
            step.loss.detach_()                 # frees what the recording's gradients hold

        # The step, in mixed precision; in fp16 the loss is scaled up against underflow.
        loss, means = step(*inputs)
        scaler.scale(loss * len(mine) / len(rows)).backward()
        for weight in model.parameters():
            if world > 1 and weight.grad is not None:
                dist.all_reduce(weight.grad)
        scaler.unscale_(optimiser)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimiser)
        scaler.update()
        optimiser.zero_grad()
        schedule.step()
        if renew and done % renew == 0:
            step.old.load_state_dict(model.state_dict())

        # Validate now and then. The best state so far is the one to end with.
        metrics = {}
        if done % every == 0 or done == steps:
            metrics = validate(shuffled[:cfg.valid_users])
            if metrics["N@10"] > at["score"]:
                at.update(score=metrics["N@10"], best=copy.deepcopy(model.state_dict()))

        # Note how it goes, for metrics.jsonl and the bar.
        at["seconds"] = time.perf_counter() - started
        if done % 50 == 0 or metrics:
            note = dict(step=done, seconds=at["seconds"], loss=loss.item(), **metrics,
                        **{name: mean.item() for name, mean in means.items()})
            at["notes"].append(note)
            if not math.isfinite(note["loss"]):
                raise DataError(f"{label}: the loss is {note['loss']} at step {done:,}; "
                                "lower the rate of this training, or --lam")
            told = f"loss {note['loss']:.2f}, best N@10 {max(at['score'], 0):.4f}"
            bar.set_postfix_str(told)

        # Keep all of it after a validation, and where somebody wants to stop: after kill
        # -9 a run goes on from there. (A file appears whole or not at all.)
        stop = len(caught)
        if world > 1:                   # all processes stop after the same step
            stop = torch.tensor(stop, device=cfg.device)
            dist.all_reduce(stop)
        if rank == 0 and (metrics or stop):
            at.update(done=done, random=torch.get_rng_state(),
                      **{name: part.state_dict() for name, part in parts.items()})
            datasets.save_tensors(folder / "snapshot.pt", at)
            datasets.write_lines(folder / "metrics.jsonl", at["notes"])
        if stop:
            raise KeyboardInterrupt(f"{label}: stopped after step {done:,} of {steps:,}")
        if metrics and bar.disable:                 # piped output has lines, not a bar
            print(f"{label}: step {done:,} of {steps:,}, {told}", flush=True)

    for number in stops:
        signal.signal(number, signal.default_int_handler)
    model.load_state_dict(at["best"])
    top = top_items(cfg, model, search, data.parts["test"], everyone)
    return dict(state=model.state_dict(), valid=validate(everyone), seconds=at["seconds"],
                code=at["code"], **datasets.tested(top, data))


# =========================== 9. stages and main: what runs when, and what is kept of it

CODE = datasets.code_hash(__file__, datasets.__file__)      # as the run began


def stage(cfg, data, number, label, groups, inputs, build, *arguments):
    """The result of build(cfg, data, label, folder, *arguments), or what an earlier run
    kept of it in RUNS/DATASET/LABEL-KEY. The key is made of the settings of these
    groups, the seed, the data, and the stage's inputs: what is done anew upstream
    changes the inputs, so that all that follows from it is done anew, too."""
    settings = [getattr(cfg, name) for group in groups.split()
                for name in GROUPS[group]]
    key = datasets.fingerprint([settings, cfg.seeds, data.fingerprint, inputs])
    folder = Path(cfg.runs_dir, data.name, f"{label.replace(' ', '-')}-{key}")
    result = datasets.load_tensors(folder / "result.pt")
    if not result:
        print(f"stage {number} of {3 + len(cfg.loss.split(','))}, {label}", flush=True)
        folder.mkdir(parents=True, exist_ok=True)
        wait_for_all()
        torch.manual_seed(cfg.seeds)
        result = {"code": CODE, **build(cfg, data, label, folder, *arguments)}
        if rank == 0:
            result.update(label=label, config=dataclasses.asdict(cfg))
            datasets.save_tensors(folder / "result.pt", result)
            datasets.report(folder.parent / "results.jsonl", result)
            (folder / "snapshot.pt").unlink(missing_ok=True)
        wait_for_all()
        result = datasets.load_tensors(folder / "result.pt")    # all go on with the same
    print(f"{label:<12}{result['seconds']:8,.1f} s, kept in {folder}", flush=True)
    if result["code"] != CODE:
        print("note: it was made by other code than today's; remove it to do it again")
    return result


def train_sasrec(cfg, data, label, folder, model):
    """Stage 1, the collaborative model: all next items of a user's window at once."""
    def loss_of(history, target, *_):
        return model.loss(history, target), {}

    def search(history):
        return model.scores(history).topk(20).indices

    optimiser = torch.optim.AdamW(model.parameters(), 1e-3, fused=True)
    return train(cfg, data, label, folder, model, loss_of, search, data.parts["windows"], 128,
                 cfg.sasrec_epochs, optimiser)


def make_codes(cfg, data, label, folder, own, collaborative):
    """Stage 2, the codes (N, L) of the items' vectors: those of --item-vectors, or of their
    texts, or SASRec's (N, dim) where there are none. LETTER's way aligns with SASRec's."""
    started = time.perf_counter()
    vectors = datasets.item_vectors(data, own, collaborative).to(cfg.device)
    near = None
    if cfg.backbone == "letter":
        near = datasets.principal_vectors(collaborative, 32).to(cfg.device)
    codes = train_codes(vectors, cfg.levels, cfg.codebook_size, cfg.code_epochs, near)
    return dict(codes=codes, seconds=time.perf_counter() - started)


def generator(cfg, trie, state=None):
    """A generator of the size that the settings name, untrained or in a state."""
    temperature = 0.7 if cfg.backbone == "letter" else 1.0            # [LETTER] has 0.7 to 1
    model = T5(trie.codes.shape[1], trie.n_codes, cfg.d_model, cfg.heads, cfg.d_kv, cfg.d_ff,
               cfg.layers, cfg.dropout, temperature).to(trie.codes.device)
    if state:
        model.load_state_dict(state)
    return model.eval()


def objective(cfg, loss, policy, teacher, trie):
    """The loss that --loss names, as a function of a batch, the progress of the
    training, and the policies of a while ago and of its beginning."""
    # A loss of your own: a branch here and its name in LISTS. If it has settings of its
    # own, they make a group in Config, which `run` adds to the groups of its stage. One
    # that branches by progress goes without a graph, as `train_generator` says of SPRec.
    def loss_of(history, clicked, progress, old=None, reference=None):
        given = (trie, history, clicked)
        if loss == "sft":
            return sft_loss(policy, *given)
        if loss in ("db", "tb"):
            beta = cfg.beta * (2 * progress - 1)             # easy first, hard at the end
            balance = detailed_balance if loss == "db" else trajectory_balance
            return gflowgr_loss(policy, teacher, *given, beta, cfg.k, cfg.lam, balance,
                                cfg.reward, cfg.confidence, cfg.z == "global")
        if loss in ("dpo", "sdpo"):
            return dpo_loss(policy, reference, *given, negatives=1 if loss == "dpo" else 3)
        if loss == "sprec":
            return sprec_loss(policy, old, *given, progress)
        if loss == "ipa":
            return ipa_loss(policy, old, reference, teacher, *given)
        if loss in ("ppo", "grpo"):
            return policy_gradient_loss(policy, old, reference, teacher, *given, loss == "ppo")
        return distillation_loss(policy, teacher, *given)           # distil

    return loss_of


def train_generator(cfg, data, label, folder, loss, trie, teacher, initial, epochs):
    """Stage 3 and on: the generator, trained by one loss, from a state or from
    scratch."""
    policy = generator(cfg, trie, initial)
    optimiser = relative_adamw(policy, cfg.finetune_lr if initial else cfg.lr)
    pairs = data.parts["train"]
    # The steps after which the old policy, whose items ppo, grpo and ipa use, is renewed [ours].
    renew = 8
    if loss == "sprec":                                 # once in each of its 5 iterations
        renew = math.ceil(epochs * len(pairs.end) / min(cfg.batch, len(pairs.end)) / 5)
    result = train(cfg, data, label, folder, policy, objective(cfg, loss, policy, teacher, trie),
                   lambda history: beam_search(policy, trie, history)[0], pairs, cfg.batch, epochs,
                   optimiser, renew, graph=loss != "sprec")  # whose progress no graph can follow
    return dict(result, codes=trie.codes, ids=data.ids)


@torch.no_grad()
def look(cfg, trie, teacher, pairs, users, *results):
    """For some users (B,), what Eq. 7 is made of by each of some results, with the same
    K random items, and beside it the exact log Z for this click, log of the sum of all R."""
    history, clicked = pairs.batch(users)
    rewards = all_rewards(teacher, trie, history, clicked, cfg.reward)
    found = []
    for result in results:
        torch.manual_seed(0)
        loss_of = objective(cfg, "tb", generator(cfg, trie, result["state"]), teacher, trie)
        _, seen = loss_of(history, clicked, progress=0.5)       # beta = 0
        found.append({**seen, "exact log Z": rewards.sum(1).log()})
    return found


def run(cfg):
    """All stages of one seed (cfg.seeds is a number here) in order, each done once and
    then kept -> what the table shows of each."""
    # What goes in. A bad file is told before anything is trained.
    data = datasets.load(cfg.dataset, cfg.data_dir, cfg.seeds, cfg.max_history, cfg.device)
    datasets.check_size(data, cfg.max_history, max(cfg.k, 3))
    print(f"{datasets.figures(data)}; {world} x {cfg.device}, {cfg.precision}, seed {cfg.seeds}")
    codes = datasets.ready_codes(cfg.codes, cfg.dataset, cfg.data_dir, data.n_items)
    own = datasets.read_vectors(cfg.item_vectors, data.n_items)

    # 1: the collaborative model. It is frozen from here on.
    torch.manual_seed(cfg.seeds)
    teacher = SASRec(data.n_items, cfg.sasrec_dim, max_length=cfg.max_history).to(cfg.device)
    first = stage(cfg, data, 1, "SASRec", "training sasrec", [], train_sasrec, teacher)
    teacher.load_state_dict(first["state"])
    teacher.eval().requires_grad_(False)

    # 2: the codes, a path for each item. Where items share theirs, one more code tells
    # them apart, and does not count as likeness.
    if codes is None:
        inputs = [own, first["state"]["item.weight"][:-1]]
        codes = stage(cfg, data, 2, "codes", "codes", inputs, make_codes, *inputs)["codes"]
        print(datasets.code_figures(codes, cfg.codebook_size))
    codes = datasets.unique_paths(codes)
    trie = Trie(codes.to(cfg.device), datasets.semantic_levels(codes), cfg.softmax == "all")

    # 3: SFT, from which all others start, and with which they are compared.
    inputs = [codes]
    start = stage(cfg, data, 3, "SFT", "training codes sft", inputs, train_generator, "sft", trie,
                  teacher, None, cfg.sft_epochs)
    results = {"SASRec": first, "SFT": start}

    # 4 and on: the fine-tunings, all from the same SFT and with equally many steps.
    inputs += [start["state"], first["state"]]
    for number, loss in enumerate(cfg.loss.split(","), 4):
        groups = "training codes sft finetune"
        if loss in ("db", "tb"):
            groups += " gflownet"
        now = stage(cfg, data, number, "then " + loss, groups, inputs, train_generator, loss, trie,
                    teacher, start["state"], cfg.finetune_epochs)
        results["then " + loss] = now

        # Does it balance? The learned beside the exact log Z of 1,000 users, before and after.
        if loss in ("db", "tb"):
            users = torch.arange(data.n_users)[:1000]
            seen = look(cfg, trie, teacher, data.parts["valid"], users, start, now)
            print(datasets.balance(*seen))

    for user in range(min(cfg.show, data.n_users)):
        seen = look(cfg, trie, teacher, data.parts["test"], torch.tensor([user]), start, now)
        print(datasets.case_study(data, user, results, *seen))
    if cfg.diversity:
        print(datasets.diversity_table(results, data))
    return results


@torch.no_grad()
def recommend(folder, history, k=10):
    """The k best next items after a history of items, oldest first, by the generator
    that a run kept in `folder` (as "runs/toy/then-tb-0123456789"), at that run's
    precision. Items are named as in the dataset: by numbers, or by a .csv's own ids.
    Raises DataError."""
    kept = datasets.load_tensors(Path(folder, "result.pt"))
    if "ids" not in kept:
        raise DataError(f"{folder} holds no generator; name one as runs/toy/then-tb-0123456789")
    cfg = Config(**kept["config"])
    cfg.device = "cpu"
    trie = Trie(kept["codes"], all_codes=cfg.softmax == "all")
    ids = kept["ids"]
    if not len(history) or not set(history) <= set(ids) or not 1 <= k <= len(ids):
        raise DataError(f"a history needs items as {ids[0]!r}, and k must be 1 to {len(ids)}")
    recent = torch.tensor([[ids.index(item) for item in history[-cfg.max_history:]]])
    with mixed_precision(cfg):
        items, _ = beam_search(generator(cfg, trie, kept["state"]), trie, recent, max(k, 20))
    return [ids[item] for item in items[0, :k]]


def main(argv=None):
    """The command; returns its exit code."""
    try:
        cfg = command_line(argv)
        join_processes(cfg.device)
        found = [run(dataclasses.replace(cfg, seeds=int(seed))) for seed in cfg.seeds.split(",")]
        print(f"\n{datasets.results_table(found)}\nkept in {cfg.runs_dir}")
        return 0
    except DataError as error:
        message = error
    except (MemoryError, RuntimeError) as error:
        if "allocate" not in str(error):            # as numpy says, and torch, CPU or GPU
            raise
        message = "memory has run out; lower --batch or --max-history"
    except (KeyboardInterrupt, BrokenPipeError) as error:       # Ctrl-C, SIGTERM, | head
        message = f"{str(error) or 'stopped'}; the same command goes on from there"
    except OSError as error:
        message = f"{error}; --data-dir and --runs-dir say where files lie"
    if rank == 0:
        print(f"error: {message}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")            # of a console that has no "±"
    sys.exit(main())
