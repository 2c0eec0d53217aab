"""backbones.py: recommenders, negative samplers and the training loop that all methods share.

In:   runs/NAME/data.safetensors (train, valid, test pairs), written by `python hnlmrec.py prepare`.
Out:  runs/NAME/cf.safetensors: user (U, D), item (I, D), the collaborative-filtering vectors that
      the LLM step starts from; or runs/NAME/model-METHOD.safetensors, a trained or closed-form
      baseline for the report.

Read it top to bottom: interactions, negative samplers, backbones, closed forms, losses, mining,
full ranking, metrics, the training loop; then the files of a run, errors and progress, several
processes, the command line. Nothing here imports the other scripts, so that this file can be copied
on its own.

Alone:  python backbones.py pretrain --run runs/NAME --backbone lightgcn --sampler dns \\
            --out model-dns.safetensors
"""

import argparse
import hashlib
import io
import json
import math
import os
import re
import shlex
import shutil
import signal
import sys
import time
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import nn

# --------------------------------------------------------------------------------------------------
# Interactions: sorted keys instead of a dense users x items mask
# --------------------------------------------------------------------------------------------------

def pair_keys(pairs, n_items):
    """(N, 2) pairs -> (N,) sorted int64 keys user * n_items + item, for membership by binary
    search."""
    return (pairs[:, 0] * n_items + pairs[:, 1]).sort().values


def contains(keys, users, items, n_items):
    """Is each (user, item) among the sorted `keys` of pair_keys? users and items broadcast; bool of
    their shape."""
    query = users * n_items + items
    if not len(keys):
        return torch.zeros_like(query, dtype=torch.bool)
    return keys[torch.searchsorted(keys, query).clamp(max=len(keys) - 1)] == query


def user_rows(pairs, n_users):
    """Pairs sorted by user, then item, as compressed rows: (indptr (U+1,), items (N,)), both
    int64."""
    order = (pairs[:, 0] * (pairs[:, 1].max() + 1 if len(pairs) else 1) + pairs[:, 1]).argsort()
    indptr = torch.zeros(n_users + 1, dtype=torch.int64, device=pairs.device)
    indptr[1:] = torch.bincount(pairs[:, 0], minlength=n_users).cumsum(0)
    return indptr, pairs[order, 1]


def rows_of(rows, users):
    """The items of some users: rows as user_rows gives them, users (B,) -> (n,) places in `users`
    and (n,) items, in order of both."""
    indptr, items = rows
    start, count = indptr[users], indptr[users + 1] - indptr[users]
    place = torch.repeat_interleave(torch.arange(len(users), device=users.device), count)
    before = torch.repeat_interleave(count.cumsum(0) - count, count)
    offset = torch.arange(len(place), device=users.device) - before
    return place, items[start[place] + offset]


def own_among(drawn, users, rows, n_items):
    """Which of some items are a user's own, found without a table of users x items: drawn (n,)
    distinct items, users (B,), rows as user_rows gives them -> (m,) places in `users` and (m,)
    places in `drawn`, which index a (B, n) tensor together."""
    slot = torch.full((n_items,), -1, device=drawn.device)  # item -> its place in `drawn`
    slot[drawn] = torch.arange(len(drawn), device=drawn.device)
    row, own = rows_of(rows, users)
    among = slot[own] >= 0
    return row[among], slot[own[among]]


def take(table, index):
    """Rows of a table: (N, D), (…) -> (…, D). As table[index], but with a backward pass that
    adds in a fixed order: that of plain indexing adds from many threads at once on a CPU, so two
    runs with one seed would drift apart. On a CPU index_select's does so in half the time of
    embedding's; on a GPU only embedding's keeps the order."""
    if table.device.type == "cpu":
        return table.index_select(0, index.flatten()).unflatten(0, index.shape)
    return F.embedding(index, table)


def sum_of_train_items(items, train, n_users):
    """The sum of each user's train items: items (I, H), train (N, 2) -> (U, H)."""
    total = items.new_zeros(n_users, items.shape[1])
    for part in train.split(2**16):  # all train pairs' vectors at once would be N x H
        total.index_add_(0, part[:, 0], items[part[:, 1]])
    return total


def whiten(text):
    """Texts (I, H) float, one row an item -> (I, H), rows of norm 1 whose inner products are the
    cosines of whitened texts: centred, turned to principal axes, each axis divided by its deviation
    (otherwise what all texts share would decide). An axis with less than 1e-4 of the largest
    variance counts as having that much, so that rounding is not blown up."""
    centred = text - text.mean(0)
    variance, axes = torch.linalg.eigh(centred.T @ centred)  # (H,), (H, H)
    # + 1e-24: texts all alike give zeros
    scale = variance.clamp(min=variance[-1] * 1e-4 + 1e-24) ** -0.5
    return F.normalize(centred @ axes * scale, dim=1)

# --------------------------------------------------------------------------------------------------
# Negative samplers. Each takes a batch of (user, positive) and returns negatives; none has a Python
# loop over pairs
# --------------------------------------------------------------------------------------------------

class UnseenSampler:
    """Draw items a user has not interacted with, with probability proportional to an item weight:
    exact, no rejection.

    Uniform weights give RNS (Rendle et al., BPR, 2009); popularity ** beta gives PNS (Mikolov et
    al., 2013, beta 0.75).

    How: put the weights of the unseen items end to end and draw a point r. With a user's seen items
    s_0 < s_1 < …, the unseen weight before s_k is c_k = cum(s_k) - (seen weight before s_k). The
    number of c_k <= r says how much seen weight lies before the point, and one more binary search
    in cum() gives the item. All users share one sorted array of keys user * stride + c_k. Weights
    are whole numbers, so that no rounding can ever return a seen item. Memory: O(pairs).

    Pairs given twice count once. Raises SystemExit2 for a user who has seen every item: there is
    nothing to sample."""

    def __init__(self, pairs, n_users, n_items, beta=0.0):
        keys = pair_keys(pairs, n_items).unique_consecutive()
        pairs = torch.stack([keys // n_items, keys % n_items], 1)  # (N, 2)
        # +1 keeps an item without a train interaction reachable
        weight = (torch.bincount(pairs[:, 1], minlength=n_items).double() + 1) ** beta
        # 2**20 steps keep popularity ** beta to six digits; fewer where keys would not fit 63 bits
        steps = min(2.0**20, 2.0**61 / (n_users * float(weight.sum()))) if beta else 1.0
        if steps < 1:
            fail(f"--beta {beta}: popularity ** beta of {n_items} items and {n_users} users does "
                 "not fit into 63 bits; lower it")
        weight = (weight * steps).round().long()
        self.cum, self.uniform = F.pad(weight.cumsum(0), (1, 0)), not beta  # (I+1,)
        indptr, items = user_rows(pairs, n_users)
        # seen weight, over all users in row order, and where each user's own begins
        self.seen = F.pad(weight[items].cumsum(0), (1, 0))  # (N+1,)
        self.start = start = self.seen[indptr[:-1]]  # (U,)
        users = torch.repeat_interleave(torch.arange(n_users, device=pairs.device), indptr.diff())
        self.stride = int(self.cum[-1]) + 1
        self.keys = users * self.stride + self.cum[items] - (self.seen[:-1] - start[users])
        self.free = self.cum[-1] - (self.seen[indptr[1:]] - start)  # (U,) weight left to draw from
        full = (self.free <= 0).nonzero()
        if len(full):
            fail(f"user row {int(full[0])}: has interacted with all {n_items} items, so no "
                 "negative exists; remove that user or add items")

    def __call__(self, users, n, generator=None):
        """users (B,) int64 -> items (B, n) int64, drawn independently."""
        shape, u = (len(users), n), users[:, None]  # u (B, 1)
        point = torch.randint(2**62, shape, generator=generator, device=users.device)
        point = point % self.free[u]  # (B, n)
        before = torch.searchsorted(self.keys, u * self.stride + point, right=True)  # (B, n)
        point = point + self.seen[before] - self.start[u]
        if self.uniform:  # item n begins at n
            return point
        return torch.searchsorted(self.cum, point, right=True) - 1


def dns(score, users, items, candidates, top=1, pick=None, penalty=None):
    """Dynamic negative sampling (Zhang et al., SIGIR 2013): the highest scored of M candidates; for
    top = N > 1, one drawn uniformly from the N highest: DNS(M, N) (Shi et al., WWW 2023). pick
    (B,), in 0..N - 1: which one; left out, drawn here.

    score(users (…, D), items (…, D)) -> (…), with leading dimensions that broadcast: a
    backbone's `score`, or any function of that shape. users (B, D), items (I, D), candidates (B, M)
    int64 -> item ids (B,). top at most M. penalty (B, M), in standard deviations of the row's
    scores, is taken off first: it keeps the choice clear of likely false negatives. No gradient."""
    with torch.no_grad():
        scores = score(users[:, None], take(items, candidates))  # (B, M)
        if penalty is not None:
            scores = scores / scores.std(1, keepdim=True).clamp(min=1e-12) - penalty
        ranked = scores.topk(top, dim=1).indices  # (B, N)
        if pick is None:
            pick = torch.randint(top, (len(ranked),), device=ranked.device)
        return candidates.gather(1, ranked.gather(1, pick[:, None]))[:, 0]


def ahns(score, users, items, positives, candidates, alpha=1.0, beta=0.1, power=-2):
    """Adaptive hardness (Lai et al., AHNS, AAAI 2024, eq. 6): of M candidates the one whose score
    is nearest to beta * (score(positive) + alpha) ** (power + 1), so a high scored positive gets an
    easy negative and the reverse. The defaults are the published constants; power is a whole
    number, since the base can be below zero.

    score as dns's; users (B, D), items (I, D), positives (B,), candidates (B, M) -> item ids (B,).
    No gradient."""
    with torch.no_grad():
        target = beta * (score(users, items[positives])[:, None] + alpha) ** (power + 1)  # (B, 1)
        distance = (score(users[:, None], take(items, candidates)) - target).abs()  # (B, M)
        return candidates.gather(1, distance.argmin(1, keepdim=True))[:, 0]


def mixgcf(users, item_layers, positives, candidates, pool, generator=None, shares=None):
    """MixGCF (Huang et al., KDD 2021): synthetic negatives by positive mixing (eq. 6) and hop
    mixing (eq. 7-9).

    users (B, D); item_layers (I, K, d), one slice a hop; positives (B,); candidates (B, M) ->
    vectors (B, D). pool((B, K, d)) -> (B, D) joins the hops as the backbone does: D = d for a mean
    (a MF has K = 1), D = K d for a concatenation.
    Each candidate is drawn towards the positive by a random share (shares (K, B); left out, drawn
    here from `generator`), then each hop of the result is taken from the candidate that scores
    highest at that hop. Gradients flow to the chosen candidates and the positives.
    Hop by hop, so that the largest tensor is (B, M, d)."""
    hops = []
    if shares is None:
        # one share a pair and hop, the same for its M candidates: were it drawn for each candidate,
        # the best one would nearly always be the one drawn closest to the positive, and training
        # stalls (measured: valid NDCG@20 .19, not .22)
        shape = item_layers.shape[1], len(positives)
        shares = torch.rand(shape, generator=generator, device=candidates.device)
    for k, share in enumerate(shares[:, :, None]):  # (B, 1)
        layer = item_layers[:, k]  # (I, d)
        # with mean pooling the user is compared as it is at every hop; with concatenation each hop
        # has its own slice
        query = users
        if users.shape[1] != layer.shape[1]:
            query = users.unflatten(1, (-1, layer.shape[1]))[:, k]  # (B, d)
        # choose first, then rebuild the chosen one alone: backward never sees (B, M, d). The
        # positive's part of the mix is the same for all candidates, so it cannot change which one
        # is highest
        with torch.no_grad():
            scores = torch.einsum("bd,bmd->bm", query, take(layer, candidates))  # (B, M)
            best = candidates.gather(1, scores.argmax(1, keepdim=True))[:, 0]  # (B,)
        hops.append(share * take(layer, positives) + (1 - share) * take(layer, best))
    return pool(torch.stack(hops, 1))


class Sample(NamedTuple):
    """What make_sampler's function gives for a batch. All vectors carry the model's gradient."""

    all_users: torch.Tensor  # (U, D)
    all_items: torch.Tensor  # (I, D)
    users: torch.Tensor  # (B, D), the batch's
    positives: torch.Tensor  # (B, D)
    negatives: torch.Tensor  # (B, D)
    negative_ids: torch.Tensor  # (B,), their items; mixgcf's are none: those of first candidates


def make_sampler(model, sampler, pairs, *, m=8, n=1, beta=0.75, penalty=None):
    """One of the samplers as a function of a batch: sample(u (B,), i (B,), generator) -> Sample.
    Where processes share a batch, what is of the batch is of this one's rows (share_of); what is
    random is drawn for the whole batch by all of them, so that it does not depend on their number.

    model: a Backbone, or any module with n_users, n_items, score as dns's and
    forward() -> (users (U, D), items (I, D)); for mixgcf also layers() and pool().
    sampler: rns, pns, dns, mixgcf or ahns; pairs (N, 2) train; m: candidates of dns, mixgcf and
    ahns; n: dns draws from the n best; beta: pns's popularity exponent; penalty: dns's, as a
    function of users (B,) and candidates (B, M)."""
    draw = UnseenSampler(pairs, model.n_users, model.n_items, beta if sampler == "pns" else 0.0)

    def sample(u, i, generator):
        candidates = share_of(draw(u, 1 if sampler in ("rns", "pns") else m, generator))  # (B, M)
        # all vectors as they are now: hops, which mixgcf mixes, or their pool
        if sampler == "mixgcf":
            user_layers, item_layers = model.layers()
            all_users, all_items = model.pool(user_layers), model.pool(item_layers)
            shape = item_layers.shape[1], len(u)
            shares = torch.rand(shape, generator=generator, device=u.device)
            shares = share_of(shares.T).T  # (K, B)
        else:
            all_users, all_items = model()
        if sampler == "dns":
            pick = share_of(torch.randint(n, (len(u),), generator=generator, device=u.device))

        # nothing is drawn from here on, so this process's rows suffice
        u, i = share_of(u), share_of(i)
        users, positives = take(all_users, u), take(all_items, i)  # (B, D)
        if sampler == "mixgcf":
            negatives = mixgcf(users, item_layers, i, candidates, model.pool, shares=shares)
            return Sample(all_users, all_items, users, positives, negatives, candidates[:, 0])

        # the others choose one of the candidates: j (B,)
        if sampler == "dns":
            cleared = penalty and penalty(u, candidates)
            j = dns(model.score, users, all_items, candidates, n, pick, cleared)
        elif sampler == "ahns":
            j = ahns(model.score, users, all_items, i, candidates)
        else:
            j = candidates[:, 0]
        return Sample(all_users, all_items, users, positives, take(all_items, j), j)

    return sample

# --------------------------------------------------------------------------------------------------
# Backbones: layers() gives every hop, pool() joins the hops, forward() = pool(layers())
# --------------------------------------------------------------------------------------------------

def normalized_adjacency(pairs, n_users, n_items):
    """D^-1/2 A D^-1/2 of the bipartite graph (LightGCN eq. 3, NGCF eq. 8 without self loops) as a
    sparse CSR (U+I, U+I).

    pairs (N, 2) without repeats. Symmetric, so the same matrix serves forward and backward. No row
    may be NaN: a node without an edge gets zeros."""
    n = n_users + n_items
    user, item = pairs[:, 0], pairs[:, 1] + n_users
    degree = torch.bincount(torch.cat([user, item]), minlength=n).float()
    scale = degree.clamp(min=1).rsqrt()
    value = scale[user] * scale[item]
    index = torch.stack([torch.cat([user, item]), torch.cat([item, user])])
    # torch calls its CSR support beta once a process; the products used here are tested
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*[Ss]parse.*")
        adjacency = torch.sparse_coo_tensor(index, torch.cat([value, value]), (n, n)).coalesce()
        return adjacency.to_sparse_csr()


class SymmetricMatmul(torch.autograd.Function):
    """adjacency @ x for a symmetric sparse adjacency: backward multiplies by the same matrix, no
    transpose is ever built.

    SymmetricMatmul.apply(adjacency (n, n), x (n, d)) -> (n, d). The adjacency gets no gradient, and
    that it is symmetric is not checked."""

    @staticmethod
    def forward(ctx, adjacency, x):
        ctx.adjacency = adjacency
        return adjacency @ x

    @staticmethod
    def backward(ctx, grad):
        return None, ctx.adjacency @ grad


class Backbone(nn.Module):
    """What HNLMRec, the samplers and the evaluation ask of a recommender.

    forward() -> (users (U, D), items (I, D)); layers() the same per hop, (U, K, d) and (I, K, d);
    ego() the parameters that the L2 term acts on, (U, d) and (I, d). Scores are inner products
    unless a subclass says otherwise."""

    propagates = False  # True when forward() is more than the parameters themselves
    std = 0.01  # of the initial vectors; propagation averages, so the graph backbones start larger

    def __init__(self, n_users, n_items, dim):
        super().__init__()
        self.n_users, self.n_items, self.dim = n_users, n_items, dim
        # users first, then items
        self.embedding = nn.Parameter(torch.empty(n_users + n_items, dim))
        nn.init.normal_(self.embedding, std=self.std)
        self.texts = None  # a TextVectors, which then makes what `embedding` would be

    def start(self):
        return self.embedding if self.texts is None else self.texts()  # (U + I, d)

    def ego(self):
        return self.start().split([self.n_users, self.n_items])

    def layers(self):
        users, items = self.ego()
        return users[:, None], items[:, None]  # (U, 1, d), (I, 1, d)

    def pool(self, layers):
        """(…, K, d) -> (…, D)."""
        return layers.mean(-2)

    def forward(self):
        users, items = self.layers()
        return self.pool(users), self.pool(items)

    def score(self, users, items):
        """users (…, D), items (…, D) -> (…); leading dimensions broadcast."""
        return (users * items).sum(-1)

    def score_all(self, users, items):
        """users (B, D), items (I, D) -> (B, I)."""
        return users @ items.T


class MF(Backbone):
    """Matrix factorisation (Rendle et al., BPR-MF, 2009): two embedding tables."""

    def forward(self):
        return self.ego()


class LightGCN(Backbone):
    """LightGCN (He et al., SIGIR 2020): E^(k+1) = A E^(k) (eq. 8), then the mean over hops 0..K
    (eq. 4).

    adjacency (U+I, U+I): normalized_adjacency of the train pairs. A buffer, so that `.to` moves it;
    not in the state_dict, since the train pairs give it back."""

    propagates, std = True, 0.1

    def __init__(self, n_users, n_items, dim, adjacency, n_layers=3):
        super().__init__(n_users, n_items, dim)
        self.register_buffer("adjacency", adjacency, persistent=False)
        self.n_layers = n_layers

    def layers(self):
        hops = [self.start()]
        for _ in range(self.n_layers):
            hops.append(SymmetricMatmul.apply(self.adjacency, hops[-1]))
        return torch.stack(hops, 1).split([self.n_users, self.n_items])

    def forward(self):  # the same as pool(layers()), without holding all hops at once
        total = hop = self.start()
        for _ in range(self.n_layers):
            hop = SymmetricMatmul.apply(self.adjacency, hop)
            total = total + hop
        return (total / (self.n_layers + 1)).split([self.n_users, self.n_items])


class NGCF(Backbone):
    """NGCF (Wang et al., SIGIR 2019), matrix form, eq. 7:
    E' = LeakyReLU((A + I) E W1 + A E ⊙ E W2), with message dropout (on E'), hops L2-normalised
    and concatenated, so that D = (n_layers + 1) * dim.

    adjacency as LightGCN's."""

    propagates, std = True, 0.1

    def __init__(self, n_users, n_items, dim, adjacency, n_layers=3, message_dropout=0.1):
        super().__init__(n_users, n_items, dim)
        self.register_buffer("adjacency", adjacency, persistent=False)
        self.message_dropout = message_dropout
        self.w1 = nn.ModuleList(nn.Linear(dim, dim) for _ in range(n_layers))
        self.w2 = nn.ModuleList(nn.Linear(dim, dim) for _ in range(n_layers))
        for linear in [*self.w1, *self.w2]:
            nn.init.xavier_uniform_(linear.weight)

    def layers(self):
        x = self.start()
        hops = [x]
        for w1, w2 in zip(self.w1, self.w2):
            side = SymmetricMatmul.apply(self.adjacency, x)
            x = F.leaky_relu(w1(side + x) + w2(side * x), 0.2)
            x = F.dropout(x, self.message_dropout, self.training)
            hops.append(F.normalize(x, dim=1))
        return torch.stack(hops, 1).split([self.n_users, self.n_items])

    def pool(self, layers):
        return layers.flatten(-2)


class NeuMF(Backbone):
    """NeuMF (He et al., NCF, WWW 2017): a GMF half and an MLP half, each on its own dim/2 of the
    embedding, joined by a linear layer (eq. 12). There is no inner product to rank with, so
    score_all walks the catalogue in chunks."""

    def __init__(self, n_users, n_items, dim):
        super().__init__(n_users, n_items, dim)
        half = dim // 2
        self.mlp = nn.Sequential(
            nn.Linear(2 * half, half), nn.ReLU(), nn.Linear(half, half), nn.ReLU())
        self.out = nn.Linear(2 * half, 1, bias=False)
        nn.init.ones_(self.out.weight)  # start as MF plus a small MLP term

    def forward(self):
        return self.ego()

    def score(self, users, items):
        users, items = torch.broadcast_tensors(users, items)
        (user_g, user_m), (item_g, item_m) = users.chunk(2, -1), items.chunk(2, -1)
        joined = torch.cat([user_g * item_g, self.mlp(torch.cat([user_m, item_m], -1))], -1)
        return self.out(joined)[..., 0]

    def score_all(self, users, items):
        # about 16 MiB of activations at a time
        chunk = max(1, 2**22 // max(1, len(users) * self.dim))
        return torch.cat([self.score(users[:, None], part[None]) for part in items.split(chunk)], 1)


class TextVectors(nn.Module):
    """What a backbone starts from, made of frozen texts by an MLP of two layers, in place of free
    vectors: with LightGCN and the softmax of cosines, AlphaRec (Sheng et al., "Language
    Representations Can be What Recommenders Need", ICLR 2025). A user's text is the mean of those
    of the train items. Texts are standardised first, beyond the paper: some axes of an LLM's hidden
    states dwarf the rest.

    forward() -> (U + I, dim), users first. text (I, H) float; train (N, 2), on the same device."""

    def __init__(self, text, train, n_users, dim):
        super().__init__()
        text = (text - text.mean(0)) / text.std(0).clamp(min=1e-3)
        count = torch.bincount(train[:, 0], minlength=n_users).clamp(min=1)
        users = sum_of_train_items(text, train, n_users) / count[:, None]
        self.register_buffer("text", torch.cat([users, text]), persistent=False)  # (U + I, H)
        width = text.shape[1]
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.LeakyReLU(), nn.Linear(width, dim))

    def forward(self):
        return self.mlp(self.text)


def build_backbone(name, n_users, n_items, dim, train, n_layers=3, cosine=False, text=None):
    """One of mf, lightgcn, ngcf, neumf, or pop (an MF of width 1), on the device of `train` (N, 2).

    text (I, H): it starts from TextVectors of them.
    cosine: forward() gives vectors of norm 1, so that inner products are cosines in training, in
    the ranking and in the saved file alike."""
    if name == "neumf" and dim % 2:
        fail(f"--dim {dim}: neumf gives half of it to each of its two parts; give an even number")
    if name in ("mf", "pop"):
        model = MF(n_users, n_items, dim if name == "mf" else 1)
    elif name == "neumf":
        model = NeuMF(n_users, n_items, dim)
    else:
        adjacency = normalized_adjacency(train, n_users, n_items)
        form = {"lightgcn": LightGCN, "ngcf": NGCF}[name]
        model = form(n_users, n_items, dim, adjacency, n_layers)
    if text is not None:
        model.embedding, model.texts = None, TextVectors(text, train, n_users, dim)
    if cosine:
        model.register_forward_hook(unit_vectors)
    return model.to(train.device)


def unit_vectors(_, __, vectors):
    """A forward hook: users (U, D), items (I, D) -> the same with norm 1."""
    return tuple(F.normalize(x, dim=-1) for x in vectors)

# --------------------------------------------------------------------------------------------------
# Closed forms: recommenders computed from the train pairs, without training. X (U, I) is the 0/1
# matrix of the train pairs; a user's scores are the user's row of X times item weights W (I, I).
# Nothing here holds users x items
# --------------------------------------------------------------------------------------------------

CLOSED_FORMS = {  # name -> the flags it reads
    "pop": (), "itemknn": ("shrink", "topk", "max_gib"), "ease": ("ridge", "max_gib"),
    "rp3": ("rp3_alpha", "rp3_beta", "topk", "max_gib")}


class ByNumber(nn.Module):
    """A recommender whose scores are no inner product of a user's and an item's vector: what stands
    for the vector is the user's or item's number, (U, 1) and (I, 1), so that ranking and evaluation
    treat it as any backbone. A subclass has score_all(users (B, 1), items (J, 1)) -> (B, J).

    train (N, 2): the train pairs, whose items a score is made of."""

    def __init__(self, n_users, n_items, train):
        super().__init__()
        self.n_users, self.n_items, self.train_rows = n_users, n_items, user_rows(train, n_users)

    def forward(self):
        device = self.train_rows[0].device
        return [torch.arange(n, device=device)[:, None] for n in (self.n_users, self.n_items)]

    def score(self, users, items):
        """users (…, 1), items (…, 1) -> (…); leading dimensions broadcast."""
        users, items = torch.broadcast_tensors(users[..., 0], items[..., 0])
        some, place = users.unique(return_inverse=True)
        return self.score_all(some[:, None], self()[1])[place, items]


class ItemWeights(ByNumber):
    """score(u, i) = sum of W[j, i] over the train items j of u; 0 for a user without a train pair.

    weight (I, I), dense or sparse CSR; train (N, 2)."""

    def __init__(self, weight, train, n_users):
        super().__init__(n_users, len(weight), train)
        self.weight = weight

    def score_all(self, users, items):
        """users (B, 1), items (J, 1) -> (B, J)."""
        place, seen = rows_of(self.train_rows, users[:, 0])
        return sum_of_rows(self.weight, place, seen, len(users)).index_select(1, items[:, 0])


def sum_of_rows(weight, place, seen, n_users):
    """The sum of the rows of weight (I, J), dense or sparse CSR, over each user's seen items: place
    (P,) and seen (P,) as rows_of gives them -> (n_users, J)."""
    one = torch.ones(len(seen), device=seen.device)
    profile = sparse_rows(place, seen, one, (n_users, len(weight)))  # the users' rows of X
    total = profile @ weight
    return total if total.layout is torch.strided else total.to_dense()


def soft_maximum(total, count, scale, beta):
    """Between mean and maximum: s (ln(mean of exp(beta (c - 1))) / beta + 1) of some cosines c, of
    which total is the sum of exp(beta (c - 1)) and count the number. beta near 0 gives s times
    their mean, a large one s times the largest."""
    mean = total / count.clamp(min=1)
    return scale * (mean.clamp(min=1e-12).log() / beta + 1)


class HistoryKernel(ByNumber):
    """A judge's score of user and item (llm_negatives.Judge), by the likeness of the item to each
    of the user's train items k, the likest counting most:

        score(u, j) = s (ln(mean over k of exp(beta (cos(h_k, v_j) - 1))) / beta + 1) + b_j

    history, items (I, k): h and v, rows of length 1; bias (I,): b; scale: s; beta: sharpness;
    train (N, 2). A user without a train pair has the biases alone, in order. Up to 16,384 items the
    I x I exponentials are kept, since an item is in many users' histories."""

    def __init__(self, history, items, bias, scale, beta, train, n_users):
        super().__init__(n_users, len(items), train)
        self.history, self.items, self.bias = history, items, bias
        self.scale, self.beta = float(scale), float(beta)
        self.kept = None  # (I, I), see score_all

    def exponentials(self, some, items):
        """Item ids (P,) and (J,) -> exp(beta (cosine - 1)), (P, J)."""
        cosine = self.history[some] @ self.items[items].T
        return cosine.sub_(1).mul_(self.beta).exp_()

    @torch.no_grad()
    def score_all(self, users, items, rows=2**12, most=2**28):
        """users (B, 1), items (J, 1) -> (B, J). most: I x I up to which all is kept; beyond, no
        more than `rows` x J are held at once."""
        place, own = rows_of(self.train_rows, users[:, 0])
        if self.n_items**2 <= most:
            if self.kept is None:
                everything = torch.arange(self.n_items, device=own.device)
                kept = self.bias.new_empty(self.n_items, self.n_items)
                for part, block in zip(everything.split(rows), kept.split(rows)):
                    block.copy_(self.exponentials(part, everything))
                self.kept = kept
            total = sum_of_rows(self.kept, place, own, len(users)).index_select(1, items[:, 0])
        else:
            total = self.bias.new_zeros(len(users), len(items))
            for at, some in zip(place.split(rows), own.split(rows)):
                total.index_add_(0, at, self.exponentials(some, items[:, 0]))
        count = torch.bincount(place, minlength=len(users))[:, None]
        return soft_maximum(total, count, self.scale, self.beta).add_(self.bias[items[:, 0]])


class Blended(ByNumber):
    """score(u, i) = e_u · e_i + w_u kernel(u, i): what `hnlmrec.py blend` writes where the judge is
    part of it. embedding (U + I, D), users first; kernel: a HistoryKernel; share (U,): w."""

    def __init__(self, embedding, kernel, share, train):
        super().__init__(len(share), len(embedding) - len(share), train)
        self.user, self.item = embedding.split([self.n_users, self.n_items])
        self.kernel, self.share = kernel, share

    def score_all(self, users, items):
        """users (B, 1), items (J, 1) -> (B, J)."""
        scores = self.kernel.score_all(users, items).mul_(self.share[users])
        return scores.addmm_(self.user[users[:, 0]], self.item[items[:, 0]].T)


def sparse_rows(row, column, value, shape):
    """A sparse CSR matrix from its entries, in order of their row: row, column, value (n,)."""
    indptr = F.pad(torch.bincount(row, minlength=shape[0]).cumsum(0), (1, 0))
    with warnings.catch_warnings():  # torch calls its CSR support beta, once a process
        warnings.filterwarnings("ignore", message=".*[Ss]parse.*")
        return torch.sparse_csr_tensor(indptr, column, value, shape)


def item_products(pairs, user_weight, n_items, entries=2**24):
    """X' diag(user_weight) X, some rows (at most `entries` numbers) at a time; with weights of 1
    these are the numbers of users that two items share.

    pairs (N, 2), user_weight (U,) -> yields (the block's items (C,), block (C, I) dense)."""
    everyone = torch.arange(len(user_weight), device=pairs.device)
    users, items = rows_of(user_rows(pairs, len(user_weight)), everyone)
    one = torch.ones(len(users), device=pairs.device)
    matrix = sparse_rows(users, items, one, (len(user_weight), n_items))  # X
    by_item = user_rows(pairs.flip(1), n_items)
    for block in torch.arange(n_items, device=pairs.device).split(max(1, entries // n_items)):
        place, users = rows_of(by_item, block)
        left = sparse_rows(place, users, user_weight[users], (len(block), len(user_weight)))
        yield block, (left @ matrix).to_dense()


def sparse_weights(blocks, topk, max_gib):
    """Blocks (items (C,), dense (C, I)) -> sparse CSR (I, I) without the diagonal; topk > 0 keeps
    the `topk` highest of each row.

    Raises SystemExit2 when the weights take more than max_gib GiB, at 12 bytes each."""
    rows, columns, values, count = [], [], [], 0
    for items, block in blocks:
        block[torch.arange(len(items), device=items.device), items] = 0
        if 0 < topk < block.shape[1]:
            best = block.topk(topk, dim=1)
            block = torch.zeros_like(block).scatter_(1, best.indices, best.values)
        row, column = block.nonzero().T
        count += len(row)
        if count * 12 > max_gib * 2**30:
            fail(f"--max-gib {max_gib:g}: the item weights take more than that; raise it, or give "
                 "--topk to keep fewer")
        rows.append(items[row])
        columns.append(column)
        values.append(block[row, column])
    shape = (block.shape[1], block.shape[1])
    return sparse_rows(torch.cat(rows), torch.cat(columns), torch.cat(values), shape)


def item_knn(pairs, n_users, n_items, shrink=20.0, topk=0, max_gib=2.0):
    """ItemKNN (Sarwar et al., WWW 2001), cosine with shrinkage (Bell and Koren, ICDM 2007):
    W_ij = n_ij / (sqrt(n_i n_j) + shrink), with n_ij the number of users who have both items.

    pairs (N, 2) -> sparse (I, I)."""
    norm = torch.bincount(pairs[:, 1], minlength=n_items).float().sqrt()
    shared = item_products(pairs, torch.ones(n_users, device=pairs.device), n_items)
    weights = ((items, block / (norm[items, None] * norm + shrink).clamp(min=1e-9))
               for items, block in shared)
    return sparse_weights(weights, topk, max_gib)


def rp3beta(pairs, n_users, n_items, alpha=0.4, beta=0.3, topk=0, max_gib=2.0):
    """RP3beta (Paudel et al., ACM TiiS 2017): a random walk user -> item -> user -> item, each
    step's probability to the power alpha, the popularity of its end taken out to the power beta:
    W_ij = n_i^-alpha (sum_u x_ui x_uj n_u^-alpha) n_j^-beta. The first step's probability is the
    same for all of a user's items, so it is left out.

    pairs (N, 2) -> sparse (I, I)."""
    of_user = torch.bincount(pairs[:, 0], minlength=n_users).clamp(min=1).float()
    of_item = torch.bincount(pairs[:, 1], minlength=n_items).clamp(min=1).float()
    walks = item_products(pairs, of_user**-alpha, n_items)
    weights = ((items, of_item[items, None] ** -alpha * block * of_item**-beta)
               for items, block in walks)
    return sparse_weights(weights, topk, max_gib)


def ease(pairs, n_users, n_items, ridge=200.0, max_gib=2.0):
    """EASE (Steck, WWW 2019): the W of least ||X - X W||^2 + ridge ||W||^2 with a zero diagonal.
    With P = (X'X + ridge I)^-1: W_ij = -P_ij / P_jj (eq. 8). Float32, one Cholesky factorisation.

    pairs (N, 2) -> dense (I, I). Raises SystemExit2 when W takes more than max_gib GiB; three times
    that is needed at the peak."""
    gib = 4 * n_items**2 / 2**30
    if gib > max_gib:
        fail(f"--max-gib {max_gib:g}: ease's {n_items} x {n_items} weights take {gib:.3g} GiB; "
             "raise it where three times that fits into memory, or take --backbone rp3")
    gram = torch.empty(n_items, n_items, device=pairs.device)
    for items, block in item_products(pairs, torch.ones(n_users, device=pairs.device), n_items):
        gram[items] = block
    gram.diagonal().add_(ridge)
    torch.linalg.cholesky(gram, out=gram)
    inverse = torch.cholesky_inverse(gram)
    del gram
    return inverse.div_(-inverse.diagonal().clone()).fill_diagonal_(0)


def popularity(pairs, n_users, n_items):
    """The number of train pairs of an item, alike for all -> an MF of width 1: 1 and the count."""
    model = MF(n_users, n_items, 1).to(pairs.device)
    # less a share of 1 that grows with the id: equal counts are in order already, and no ranking
    # has to sort its ties
    count = torch.bincount(pairs[:, 1], minlength=n_items)
    count = count - torch.arange(n_items, device=pairs.device) / n_items
    model.embedding.data = torch.cat([torch.ones_like(count[:1]).expand(n_users), count])[:, None]
    return model

# --------------------------------------------------------------------------------------------------
# Losses, and the step that every baseline trains with
# --------------------------------------------------------------------------------------------------

def bpr_loss(positive_score, negative_score):
    """BPR (Rendle et al., 2009): -mean ln sigmoid(positive - negative), written as softplus so that
    it cannot overflow. Scores (B,), (B,) -> scalar."""
    return F.softplus(negative_score - positive_score).mean()


def sampled_softmax_loss(positive_score, negative_scores, tau=1.0):
    """Softmax cross-entropy of one positive against N negatives (sampled softmax: Jean et al., ACL
    2015; for recommenders Wu et al., "On the Effectiveness of Sampled Softmax Loss for Item
    Recommendation", TOIS 2024): -mean ln e^(s_p / tau) / (e^(s_p / tau) + sum_n e^(s_n / tau)).
    No logQ correction: it would be the same for all negatives, which are drawn uniformly.

    positive_score (B,), negative_scores (B, N), -inf where item n is no negative of b -> scalar."""
    scores = torch.cat([positive_score[:, None], negative_scores], 1) / tau  # (B, 1 + N)
    return (scores.logsumexp(1) - scores[:, 0]).mean()


def l2_loss(*vectors):
    """Half the squared norm, summed over the given (B, d) tensors and averaged over B: LightGCN's
    reg term. Give it the parameters of the batch (`ego()`), not what propagation makes of them."""
    return sum((vector * vector).sum() for vector in vectors) / (2 * len(vectors[0]))


def make_step(model, sampler, pairs, *, reg, m=8, n=1, beta=0.75):
    """The baseline training step: BPR with negatives of one sampler, plus L2 on the batch's own
    embeddings. Arguments as make_sampler's; the model also has ego() and propagates, as a Backbone.
    Returns step(rows, generator) for `fit`, whose loss is that of this process's share of the
    rows."""
    draw = make_sampler(model, sampler, pairs, m=m, n=n, beta=beta)
    users_of, items_of = pairs.T.contiguous()

    def step(rows, generator):
        u, i = users_of[rows], items_of[rows]  # (B,), (B,)
        sample = draw(u, i, generator)
        u, i, j, weight = share_of(u), share_of(i), sample.negative_ids, share_weight(len(rows))

        # the positive above the negative
        users, positives, negatives = sample.users, sample.positives, sample.negatives
        bpr = bpr_loss(model.score(users, positives), model.score(users, negatives)) * weight
        if not reg:
            return bpr, {"bpr": bpr.item()}

        # L2 on the parameters behind them, not on what propagation makes of these
        ego_users, ego_items = model.ego()
        if model.propagates:
            l2 = l2_loss(take(ego_users, u), take(ego_items, i), take(ego_items, j))
        else:  # what was gathered for the scores are the parameters themselves
            l2 = l2_loss(users, positives, take(ego_items, j) if sampler == "mixgcf" else negatives)
        return bpr + reg * weight * l2, {"bpr": bpr.item()}

    return step


def make_softmax_step(model, pairs, *, reg, n, tau):
    """The step of --loss softmax: n items, drawn each step uniformly and without repeats, are the
    negatives of every row, save the user's own train items; L2 on the pair's own embeddings.

    model: a Backbone, or any module with n_users, n_items, forward(), score(), score_all() and
    ego() as it has. pairs (N, 2) train -> step(rows, generator) for `fit`, whose loss is that of
    this process's share of the rows."""
    train_rows = user_rows(pairs, model.n_users)

    def step(rows, generator):
        u, i = share_of(pairs[rows]).T
        weight = share_weight(len(rows))
        user_vectors, item_vectors = model()
        users, items = take(user_vectors, u), take(item_vectors, i)  # (B, D)

        # the negatives that all rows share
        drawn = torch.randperm(model.n_items, generator=generator, device=u.device)[:n]
        scores = model.score_all(users, take(item_vectors, drawn))  # (B, n)

        # less those that are a row's own train items
        own = torch.zeros_like(scores, dtype=torch.bool)
        own[own_among(drawn, u, train_rows, model.n_items)] = True
        scores = scores.masked_fill(own, -torch.inf)

        # the positive above all of them, and L2
        loss = sampled_softmax_loss(model.score(users, items), scores, tau)
        logs = {"softmax": loss.item()}
        if reg:
            ego_users, ego_items = model.ego()
            loss = loss + reg * l2_loss(take(ego_users, u), take(ego_items, i))
        return loss * weight, logs

    return step

# --------------------------------------------------------------------------------------------------
# CF-mined hard negatives: what the LLM learns to imitate
# --------------------------------------------------------------------------------------------------

BAND = 0.1985, 0.298  # of the catalogue: ranks 200-300 of the 1,008 items of MovieLens-100K


def mining_band(data, first=0, last=0):
    """The ranks first..last that are mined, 1 the best. Where one is 0 it is a share of the
    catalogue (BAND), but never beyond what the user with the fewest unseen items has.

    data: a dict of load_data. Raises SystemExit2 for a band that ends before it begins."""
    fewest = data["n_items"] - int(torch.bincount(data["train"][:, 0]).max())  # unseen items
    share = [max(1, min(fewest, round(part * data["n_items"]))) for part in BAND]
    first, last = first or min(share[0], last or share[0]), last or max(share[1], first)
    if first > last:
        fail(f"--mine-first {first}: lies after --mine-last {last}; give the better rank first")
    return first, last


@torch.no_grad()
def mine_hard_negatives(model, train, first, last):
    """Each user's unseen items at ranks first..last of the pre-trained backbone's full ranking: a
    band below the very top, where held-out positives are densest. Reads train pairs alone.

    model as rank_unseen's, with n_users and n_items; train (N, 2) -> item ids
    (U, last - first + 1), best rank first. Several processes mine for every world()-th user each.
    Raises SystemExit2 when a user has too few unseen items for the band."""
    seen = user_rows(train, model.n_users)
    if model.n_items - int(seen[0].diff().max()) < last:
        fail(f"--mine-last {last}: some user has fewer than {last} unseen items; lower it")
    mined = torch.zeros(model.n_users, last - first + 1, dtype=torch.int64, device=train.device)
    for part in share_of(torch.arange(model.n_users, device=train.device)).split(2**16):
        mined[part] = rank_unseen(model, part, seen, last)[:, first - 1:]
    sum_over([mined])
    return mined

# --------------------------------------------------------------------------------------------------
# Full ranking: top-k of all unseen items
# --------------------------------------------------------------------------------------------------

def top_k(scores, k):
    """Indices (B, k) of the k highest of scores (B, I), highest first; equal scores go by index,
    lowest first: the first k of scores.sort(dim=1, descending=True, stable=True).indices.

    torch.topk leaves the order of ties open, and looks at each score with care. So: cut a row into
    blocks, for the k highest lie in the k blocks with the highest maxima, and only those are
    searched. One more than k are taken, to see a tie across the border; rows with a tie pay for the
    full stable sort."""
    n, more, device = scores.shape[1], min(k + 1, scores.shape[1]), scores.device
    # the fewest scores to search: n / width maxima, then more * width
    width = round((n / more) ** 0.5)
    if width < 2:
        values, index = scores.topk(more, dim=1)
    else:
        # column c belongs to block c % blocks, so that maxima run along contiguous memory; fewer
        # than `width` columns are left over
        blocks = n // width
        maxima = scores[:, : width * blocks].unflatten(1, (width, blocks)).amax(1)  # (B, blocks)
        best = maxima.topk(min(more, blocks), dim=1, sorted=False).indices
        in_block = torch.arange(0, width * blocks, blocks, device=device)
        columns = (best[:, None] + in_block[:, None]).flatten(1)
        left_over = torch.arange(width * blocks, n, device=device).expand(len(scores), -1)
        columns = torch.cat([columns, left_over], 1)  # (B, about width * (k+1))
        values, place = scores.gather(1, columns).topk(more, dim=1)
        index = columns.gather(1, place)
    tied = (values[:, 1:] == values[:, :-1]).any(1)  # what is left out of the ranking, -inf, too
    if tied.any():
        index[tied] = scores[tied].sort(dim=1, descending=True, stable=True).indices[:, :more]
    return index[:, :k]


@torch.no_grad()
def rank_unseen(model, users, seen, k, cells=2**23):
    """The k best unseen items of each user, in chunks of users so that no more than `cells` scores
    are held at once.

    model: a Backbone, or any module with forward() -> (users (U, D), items (I, D)) and
    score_all(users (B, D), items (I, D)) -> (B, I), a new tensor each time: it is written into.
    users (n,) ids; seen: (indptr, items) of user_rows, the pairs to leave out -> item ids (n, k). A
    user with fewer than k unseen items gets -1 in the places left."""
    was_training, _ = model.training, model.eval()
    user_vectors, item_vectors = model()
    model.train(was_training)
    chunk = max(1, cells // len(item_vectors))
    # one table at once: many small ones between the scores would leave holes in the memory
    result = users.new_empty(len(users), min(k, len(item_vectors)))
    for part, ranked in zip(users.split(chunk), result.split(chunk)):
        scores = leave_out(model.score_all(user_vectors[part], item_vectors), part, seen)
        index = top_k(scores, k)
        ranked.copy_(index.masked_fill(scores.gather(1, index) == -torch.inf, -1))
    return result


@torch.no_grad()
def nearest_items(vectors, users, items, seen, k, cells=2**23):
    """The k items nearest to each vector by cosine, the user's train items left out, since those
    are known positives; no more than `cells` cosines are held at once.

    vectors (n, D), users (n,), items (I, D), seen: sorted pair_keys -> item ids (n, k); -1 where a
    user has fewer than k items left."""
    items, chunk = F.normalize(items.float(), dim=-1), max(1, cells // len(items))
    result = users.new_empty(len(users), min(k, len(items)))
    last = int(users.max()) if len(users) else -1
    bounds = torch.arange(last + 2, device=users.device) * len(items)
    seen = torch.searchsorted(seen, bounds), seen % len(items)  # as user_rows has it
    for part, user, nearest in zip(vectors.split(chunk), users.split(chunk), result.split(chunk)):
        scores = leave_out(F.normalize(part.float(), dim=-1) @ items.T, user, seen)  # (B, I)
        index = top_k(scores, k)
        nearest.copy_(index.masked_fill(scores.gather(1, index) == -torch.inf, -1))
    return result


def leave_out(scores, users, seen):
    """Set the scores of the users' seen items to -inf, in place: scores (B, I), users (B,), seen as
    rank_unseen's -> scores."""
    row, items = rows_of(seen, users)
    scores.view(-1).index_fill_(0, row * scores.shape[1] + items, -torch.inf)
    return scores


def ranking_hits(model, pairs, seen, k):
    """Full-ranking hits for every user who has a pair in `pairs`.

    model as rank_unseen's, with n_users and n_items.
    pairs (N, 2) to find; seen: user_rows of the pairs left out of the ranking -> users (n,), hits
    (n, k) bool in rank order, relevant (n,) the number of pairs of each user. Users without a pair
    are not in the result: they have no metric."""
    relevant = torch.bincount(pairs[:, 0], minlength=model.n_users)
    users = relevant.nonzero()[:, 0]
    ranked = rank_unseen(model, users, seen, k)  # (n, k)
    found = contains(pair_keys(pairs, model.n_items), users[:, None], ranked, model.n_items)
    return users, found & (ranked >= 0), relevant[users]

# --------------------------------------------------------------------------------------------------
# Ranking metrics: hits (n, K) bool in rank order and relevant (n,) -> one number a user, (n,)
# float64
# --------------------------------------------------------------------------------------------------

def ndcg(hits, relevant, k):
    """NDCG@k per user with binary gains (Järvelin and Kekäläinen, 2002); the ideal list is cut
    at k too.

    hits (n, >=k) bool in rank order, relevant (n,) -> (n,) in [0, 1]."""
    discount = 1 / torch.log2(torch.arange(2, k + 2, device=hits.device).double())  # (k,)
    ideal = discount.cumsum(0)[relevant.clamp(max=k) - 1]
    return (hits[:, :k] * discount[: hits.shape[1]]).sum(1) / ideal


def recall(hits, relevant, k):
    """Share of a user's held-out items among the first k."""
    return hits[:, :k].double().sum(1) / relevant


def precision(hits, relevant, k):
    """Share of the first k that are held-out items."""
    return hits[:, :k].double().sum(1) / k


def hit_rate(hits, relevant, k):
    """1 when any of the first k is a held-out item."""
    return hits[:, :k].any(1).double()


def mrr(hits, relevant, k):
    """1 / rank of the first held-out item, 0 when it is not among the first k."""
    rank = torch.arange(1, hits[:, :k].shape[1] + 1, device=hits.device).double()
    return (hits[:, :k] / rank).max(1).values


def validation(model, data, k=20, users=None):
    """-> validate(): mean NDCG@k of the model as it then is, on the validation pairs, train pairs
    left out of the ranking. model as ranking_hits's; data: a dict with train and valid (N, 2), as
    load_data gives it. users: how many users are ranked, the same ones each time; left out,
    all. Several processes rank every world()-th user each."""
    if not len(data["valid"]):
        fail("data.safetensors: has no validation pair, and they choose the best epoch; "
             "prepare it with some")
    seen, own = user_rows(data["train"], model.n_users), data["valid"]
    if users:
        everyone = own[:, 0].unique()
        some = torch.randperm(len(everyone), generator=torch.Generator().manual_seed(0))[:users]
        own = own[torch.isin(own[:, 0], everyone[some.to(own.device)])]
    own = own[own[:, 0] % world() == rank()]

    def validate():
        _, hits, relevant = ranking_hits(model, own, seen, k)
        total = torch.stack([ndcg(hits, relevant, k).sum(), relevant.count_nonzero()])
        sum_over([total])
        return float(total[0] / total[1])

    return validate

# --------------------------------------------------------------------------------------------------
# The training loop: baselines and HNLMRec differ in `step` alone
# --------------------------------------------------------------------------------------------------

def fit(modules, step, n_rows, validate, *, epochs, batch_size, lr, eval_every, patience, seed,
        label="train", decay=False):
    """Train all parameters of `modules` with Adam and keep the state of the best validation.

    modules: {name: nn.Module}; one optimizer over all of them, so none can be forgotten. step(rows
    (B,), generator) -> (loss, {name: float}) on those rows of the train pairs. validate() -> float,
    higher is better; never the test split. Stops after `patience` validations without a new best.
    With `decay` the learning rate falls step by step, in a line from lr to 0 after the last epoch.
    Returns (best state {name.parameter: tensor}, history list).

    Under torchrun every process gets the same rows, its step returns the loss of its share of them
    (share_of, times share_weight), and the gradients' mean over the processes, that of the whole
    batch, is what all of them step with. The history's losses are then those of process 0's share.

    Raises SystemExit2 when the loss or the validation is not finite, naming the step or the
    epoch."""
    parameters = []
    for module in modules.values():
        parameters += module.parameters()
    # fused: one pass over each parameter instead of ten
    optimizer = torch.optim.Adam(parameters, lr=lr, fused=True)
    generator = torch.Generator(parameters[0].device).manual_seed(seed)
    best, best_state, history, done, start = -math.inf, None, [], 0, time.time()
    n_steps = epochs * -(-n_rows // batch_size)
    progress = Progress(label, epochs, "epochs")
    for epoch in range(1, epochs + 1):
        # every train pair once, in random order
        total, logs = 0.0, {}
        for module in modules.values():
            module.train()
        order = torch.randperm(n_rows, generator=generator, device=generator.device)
        for rows in order.split(batch_size):
            loss, values = step(rows, generator)
            done += 1
            if not torch.isfinite(loss):
                fail(f"{label}: the loss is {loss.item()} at step {done} (epoch {epoch}, "
                     f"{values}); lower --lr (now {lr}) or check the input vectors for NaN")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            average_gradients(parameters)
            if decay:
                optimizer.param_groups[0]["lr"] = lr * (1 - (done - 1) / n_steps)
            optimizer.step()
            # weighted, so that a short last batch counts for what it is
            total += float(loss.detach()) * len(rows)
            for name, value in values.items():
                logs[name] = logs.get(name, 0.0) + value * len(rows)

        # validation: a better state is kept, and a while without one is the end
        if epoch % eval_every == 0 or epoch == epochs:
            score = validate()
            if not math.isfinite(score):
                fail(f"{label}: the validation is {score} at epoch {epoch}; lower --lr (now {lr})")
            logs = {name: value / n_rows for name, value in logs.items()}
            history.append({"epoch": epoch, "loss": total / n_rows, "valid_ndcg@20": score,
                            "seconds": time.time() - start, **logs})
            if score > best:
                best, best_epoch = score, epoch
                best_state = {}
                for name, module in modules.items():
                    for key, value in module.state_dict().items():
                        # a copy: the next steps change the parameters in place
                        best_state[f"{name}.{key}"] = value.clone()
            elif (epoch - best_epoch) // eval_every >= patience:
                break
        progress.update(epoch, f"loss {total / n_rows:.4f}  valid NDCG@20 {max(best, 0):.4f}")
    print(f"{label}: best valid NDCG@20 {best:.4f} at epoch {best_epoch} of {epoch}, "
          f"{time.time() - start:.0f} s", flush=True)
    return best_state, history


def sized_to_data(data, batch_size=0, lr=0.0, epochs=0, m=0):
    """What follows from the number N of train pairs and I of items, where 0 is given -> batch size,
    learning rate, epochs, M (candidates of dns, mixgcf and ahns).

    Batch size: 2,048 up to 2**16 pairs; beyond, the power of two just below N / 8, in 16,384 …
        65,536: a step of a graph backbone propagates over the whole graph, so that with one batch
        size for all N an epoch's time would grow as N squared.
    Learning rate: 1e-3 at 2,048 and in proportion to the batch (Goyal et al., 2017), at most 8e-3.
    Epochs: 200, and so few that epochs x steps x N stays below 4e9, which is about an hour of
        LightGCN on two cores, but at least 10.
    M: the power of two nearest to sqrt(I) / 4, in 4 … 64: the best item of M has rank I / M on
        average, and the right rank grows with the catalogue.
    Chosen by validation on two sets: MovieLens-100K (N 44,287, I 1,008: 2,048, 1e-3, M 8) and full
    Toys & Games (124,813, 11,924: 16,384, 8e-3, M 32); elsewhere a rule of thumb.

    data: a dict of load_data."""
    n = len(data["train"])
    if not batch_size:
        power = int(math.log2(max(n, 1) / 8))
        batch_size = 2048 if n < 2**16 else 2 ** min(max(power, 14), 16)
    lr = lr or min(1e-3 * batch_size / 2048, 8e-3)
    epochs = epochs or min(max(int(4e9 / (math.ceil(n / batch_size) * n)), 10), 200)
    m = m or 2 ** min(max(round(math.log2(data["n_items"] ** 0.5 / 4)), 2), 6)
    return batch_size, lr, epochs, m


def pretrain(args):
    """Train one backbone with one sampler; write its best state and its user/item vectors."""
    run, data = Path(args.run), load_data(args.run)
    out = run / output_name("--out", args.out, "backbones.py pretrain", ".safetensors")
    args.batch_size, args.lr, args.epochs, args.m = sized_to_data(
        data, args.batch_size, args.lr, args.epochs, args.m)
    if args.n > args.m:
        fail(f"--n {args.n}: dns draws from the n highest of m candidates, and m is {args.m}; "
             "lower --n or raise --m")

    # what the file depends on: made with these settings from these inputs, it is there already
    settings = settings_of(args, *sum(CLOSED_FORMS.values(), ()))
    if args.backbone in CLOSED_FORMS:  # no seed, no training: only its own constants are read
        settings = {"command": "pretrain", "backbone": args.backbone, "seed": None}
        settings |= {"dim": 1, "layers": 0}
        settings |= {name: getattr(args, name) for name in CLOSED_FORMS[args.backbone]}
    settings["inputs"] = stamp(run, "data.safetensors")
    text = None
    if args.text_vectors:
        path = run / args.text_vectors
        path = path if path.exists() else args.text_vectors
        text = read_text_vectors(path, data["n_items"])
        settings["text_digest"] = file_digest(path)
    if up_to_date(out, settings, force=args.force):
        return
    if args.backbone in CLOSED_FORMS:
        compute_baseline(args, data, settings, out)
    else:
        train_baseline(args, data, settings, out, text)


def train_baseline(args, data, settings, out, text=None):
    """The training of `pretrain`, from the data of load_data to the file `out`. text (I, H): what
    --text-vectors names."""
    device = start_processes(args.device)
    torch.manual_seed(args.seed)
    train = data["train"].to(device)
    data = {**data, "train": train, "valid": data["valid"].to(device)}
    if text is not None:
        text = text.to(device)

    # the backbone, and one step of its loss
    model = build_backbone(args.backbone, data["n_users"], data["n_items"], args.dim, train,
                           args.layers, args.cosine, text)
    if args.loss == "softmax":
        step = make_softmax_step(model, train, reg=args.reg, n=args.shared, tau=args.tau)
    else:
        step = make_step(model, args.sampler, train, reg=args.reg, m=args.m, n=args.n,
                         beta=args.beta)

    # train, until validation gets no better
    loss = args.sampler if args.loss == "bpr" else args.loss
    start = time.time()
    validate = validation(model, data, users=args.eval_users)
    state, history = fit({"backbone": model}, step, len(train), validate, epochs=args.epochs,
                         batch_size=args.batch_size, lr=args.lr, eval_every=args.eval_every,
                         patience=args.patience, seed=args.seed, label=f"{args.backbone} {loss}")
    if rank():
        return

    # the best state, and beside its parameters the vectors that everything else reads
    restore({"backbone": model}, state)
    users, items = model.eval()()
    if text is not None:  # the vectors alone, which load_model makes an MF of
        state = {"backbone.embedding": torch.cat([users, items])}
    tensors = {**state, "user": users, "item": items}
    check_finite(out, tensors, "nothing was written; lower --lr and run again")
    save_tensors(out, tensors,
                 {"settings": settings, "n_users": data["n_users"], "n_items": data["n_items"],
                  "history": history, "seconds": time.time() - start})
    print(f"wrote {out}")


def compute_baseline(args, data, settings, out):
    """The computation of a closed form for `pretrain`, from the data of load_data to `out`."""
    device = start_processes(args.device)
    start, train = time.time(), data["train"].to(device)
    shape = (data["n_users"], data["n_items"])
    if args.backbone == "pop":
        model = popularity(train, *shape)
    elif args.backbone == "ease":
        model = ItemWeights(ease(train, *shape, args.ridge, args.max_gib), train, shape[0])
    elif args.backbone == "itemknn":
        weight = item_knn(train, *shape, args.shrink, args.topk, args.max_gib)
        model = ItemWeights(weight, train, shape[0])
    else:
        weight = rp3beta(train, *shape, args.rp3_alpha, args.rp3_beta, args.topk, args.max_gib)
        model = ItemWeights(weight, train, shape[0])

    # one epoch for its history, so that reports read it as any model
    score = validation(model, {"train": train, "valid": data["valid"].to(device)})()
    if rank():
        return
    seconds = time.time() - start
    history = [{"epoch": 0, "valid_ndcg@20": score, "seconds": seconds}]
    save_tensors(out, closed_form_tensors(model), {
        "settings": settings, "n_users": shape[0], "n_items": shape[1], "history": history,
        "seconds": seconds})
    print(f"{args.backbone}: valid NDCG@20 {score:.4f}, {seconds:.0f} s\nwrote {out}")

# --------------------------------------------------------------------------------------------------
# The files of a run: data, models, generated negatives
# --------------------------------------------------------------------------------------------------

def load_data(run):
    """Read runs/NAME/data.safetensors.

    Returns a dict: train, valid, test int64 (N, 2); n_users, n_items; digest; settings."""
    tensors, meta = load_tensors(Path(run) / "data.safetensors")
    return {**tensors, **{key: meta[key] for key in ("n_users", "n_items", "digest", "settings")}}


def load_model(path, maker="", data=None):
    """Rebuild a trained backbone from its file -> (model, meta, all tensors). data: a dict of
    load_data.

    Raises SystemExit2 when the file holds something else, or was trained on another split (as
    load_tensors)."""
    tensors, meta = load_tensors(path, maker, data["train"].device)
    s = meta["settings"]
    if s.get("command") not in ("pretrain", "train", "blend"):
        fail(f"{path}: holds what `{s.get('command')}` writes, not a trained recommender; "
             "name one, such as cf.safetensors")
    if "judge.history" in tensors:
        parts = {name.removeprefix("judge."): tensor for name, tensor in tensors.items()
                 if name.startswith("judge.")}
        kernel = kernel_of(parts, data["train"], meta["n_users"])
        return Blended(tensors["backbone.embedding"], kernel, parts["share"], data["train"]), \
            meta, tensors
    if "value" in tensors or "weight" in tensors:
        model = ItemWeights(closed_form_weights(tensors), data["train"], meta["n_users"])
        return model, meta, tensors
    plain = s["command"] == "pretrain" and s.get("text_vectors")
    dim = tensors["backbone.embedding"].shape[1]
    model = build_backbone("mf" if plain else s["backbone"], meta["n_users"], meta["n_items"], dim,
                           data["train"], s["layers"], s.get("cosine", False))
    restore({"backbone": model}, tensors)
    return model.eval(), meta, tensors


KERNEL = ("history", "item", "bias", "shape")  # what a judge's score is made of, in its file


def kernel_of(tensors, train, n_users):
    """The judge's score from its tensors: history (I, k), item (I, k), bias (I,), shape (2,), the
    scale and the sharpness beta -> HistoryKernel."""
    history, items, bias, (scale, beta) = (tensors[name].float() for name in KERNEL)
    return HistoryKernel(history, items, bias, scale, beta, train, n_users)


def closed_form_tensors(model):
    """What the file of a closed form holds: popularity's is that of an MF; item weights are dense,
    or the three parts of a CSR."""
    if isinstance(model, MF):
        return {"backbone.embedding": model.embedding}
    weight = model.weight
    if weight.layout is torch.strided:
        return {"weight": weight}
    parts = (weight.crow_indices(), weight.col_indices(), weight.values())
    return dict(zip(("indptr", "column", "value"), parts))


def closed_form_weights(tensors):
    """closed_form_tensors back -> weight (I, I), dense or sparse CSR."""
    if "weight" in tensors:
        return tensors["weight"]
    count = tensors["indptr"].diff()
    row = torch.repeat_interleave(torch.arange(len(count), device=count.device), count)
    return sparse_rows(row, tensors["column"], tensors["value"], (len(count), len(count)))


def read_text_vectors(path, n_items):
    """The tensor `text` (I, H) of a safetensors file: a vector of each item, as in items.jsonl.

    Raises SystemExit2 when it is not there, has another shape, or a row that is not finite."""
    try:
        text = load_file(path)["text"]
    except FileNotFoundError:
        fail(f"--text-vectors {path}: no such file")
    except KeyError:
        fail(f"--text-vectors {path}: has no tensor `text`; name it so")
    except (SafetensorError, OSError) as error:
        fail(f"--text-vectors {path}: cannot be read as safetensors ({error})")
    if text.ndim != 2 or len(text) != n_items or not text.shape[1]:
        fail(f"--text-vectors {path}: text is {tuple(text.shape)}, not ({n_items}, width); give a "
             "row for each item, as in items.jsonl")
    bad = (~text.isfinite().all(1)).nonzero()
    if len(bad):
        fail(f"--text-vectors {path}: row {int(bad[0])} of text is not finite; mend that row")
    return text.float()


def load_negatives(run, name, digest=None):
    """Join the shards NAME-00000.safetensors … and NAME-items.safetensors -> dict: pairs (n, 2),
    hidden (n, H) f16, vector (n, d) f16, text (I, H) f16; digest of them all. digest: of the split
    they have to be for (load_data's); None: the run's.

    Raises SystemExit2 when a shard is missing, was made from other files than the run's, or with
    other settings than the rest."""
    run, paths = Path(run), shards(run, name)
    metas = [read_meta(path, check=True) for path in paths]
    for path, meta in zip(paths, metas):
        if meta["settings"] != metas[0]["settings"]:
            fail(f"{path}: was made with other settings than {paths[0].name}; "
                 f"run `{maker_of(path)} --force`")
    s = metas[0]["settings"]
    if digest not in (None, s["inputs"]["data.safetensors"]):
        fail(f"{paths[0]}: was made for another split; run `{maker_of(paths[0])} --force`")
    if len(paths) - 1 != s["shards"]:
        fail(f"{run / name}: {len(paths) - 1} of {s['shards']} shards are there; "
             f"run `{maker_of(paths[0])}` to make the rest")

    # one shard after the other into tables made at once, so that no shard is held twice
    n, done = sum(tensor_shape(path, "pairs")[0] for path in paths[:-1]), 0
    for path in paths[:-1]:
        part, _ = load_tensors(path)
        if not done:
            joined = {key: part[key].new_empty(n, *part[key].shape[1:])
                      for key in ("pairs", "hidden", "vector")}
        for key, table in joined.items():
            table[done:done + len(part[key])] = part[key]
        done += len(part["pairs"])
    text = load_tensors(paths[-1])[0]["text"]
    return {**joined, "text": text, "digest": stamp(run, name)[name]}


def tensor_shape(path, name):
    """The shape of one tensor of a safetensors file, from its header alone."""
    with safe_open(str(path), framework="pt") as file:
        return file.get_slice(name).get_shape()


def shards(run, name):
    """The paths of a set of generated negatives: its shards, then its items; where none is there,
    those that should be."""
    output_name("--negatives", name, "llm_negatives.py generate", word="negatives")
    run = Path(run)
    paths = sorted(run.glob(f"{name}-[0-9][0-9][0-9][0-9][0-9].safetensors"))
    return [*(paths or [run / f"{name}-00000.safetensors"]), run / f"{name}-items.safetensors"]


def restore(modules, state):
    """Load {prefix.name: tensor} into {prefix: module}."""
    for prefix, module in modules.items():
        start = f"{prefix}."
        module.load_state_dict({name.removeprefix(start): value for name, value in state.items()
                                if name.startswith(start)})


def row_of(rows, raw, flag, path):
    """The number of the row with this raw id. Raises SystemExit2 naming the flag when there is
    none."""
    row = next((n for n, row in enumerate(rows) if row["raw"] == raw), None)
    if row is None:
        fail(f"{flag} {raw}: no such id in {path} (for example {rows[0]['raw']})")
    return row

# --------------------------------------------------------------------------------------------------
# Files, errors, progress: what every step of the pipeline needs
# --------------------------------------------------------------------------------------------------

def fail(message):
    """End the program with one line on standard error and exit status 2."""
    raise SystemExit2(message)


class SystemExit2(SystemExit):
    """A SystemExit with status 2 that keeps its one-line message, so that tests can read it."""

    def __init__(self, message):
        super().__init__(2)
        self.message = printable(" ".join(str(message).split()))

    def __str__(self):
        return self.message


def printable(text):
    """Control characters, and those that turn the direction of writing, as visible escapes: titles
    and ids are data."""
    return CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", str(text))


CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")


class Output:
    """Standard output that costs no result: what a terminal would obey or cannot show is escaped,
    and once its reader is gone the rest goes nowhere."""

    def __init__(self, file):
        file.reconfigure(errors="backslashreplace")
        self.file = file

    def __getattr__(self, name):
        return getattr(self.file, name)

    def write(self, text):
        self.attempt(self.file.write, printable(text))

    def flush(self):
        self.attempt(self.file.flush)

    def attempt(self, call, *args):
        try:
            call(*args)
        except OSError:  # a closed pipe, a full disk; what is in the buffer must go somewhere too
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())


def run_cli(main):
    """Run `main()` as a program: our errors become one line and status 2, Ctrl-C ends quietly with
    status 130."""
    sys.stdout = Output(sys.stdout or open(os.devnull, "w"))
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # kill ends it as Ctrl-C does
    try:
        main()
        sys.stdout.flush()
    except SystemExit2 as error:
        print(f"error: {error.message}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped; finished steps are kept, run the same command to go on", file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        # a full disk or an unwritable folder: the temporary file is gone, the old file untouched
        print(f"error: {error.filename or 'output'}: {error.strerror or error}; mend that and run "
              "again", file=sys.stderr)
        sys.exit(2)
    except (RuntimeError, MemoryError) as error:
        if "memory" not in f"{type(error).__name__} {error}".lower():
            raise
        print("error: out of memory; lower --batch-size, --m or --k, or --dim", file=sys.stderr)
        sys.exit(2)


def write_atomic(path, data):
    """Write bytes to a temporary name, then rename: a reader sees the old file or the new one,
    never half of one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")  # the same each time: killed ones do not add up
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        error.filename = str(path)  # a full disk names no file of its own accord
        raise
    finally:
        temporary.unlink(missing_ok=True)


def save_tensors(path, tensors, meta):
    """Save {name: tensor} with a JSON-able dict `meta` as safetensors metadata. Its lineage is in
    three places: meta["settings"], with the `command` that writes the file, its flags, and
    `inputs`, the stamp() of all it is made from; meta["beside"] (optional), the stamp() of what was
    written with it; meta["digest"], of settings, beside and tensors, which is added here: what
    others' stamps name this file by. A rerun that comes to the same gets the same digest."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    meta = json.loads(json.dumps(meta))
    meta["digest"] = tensors_digest(meta, tensors)
    meta["checksum"] = json_digest(meta)
    write_atomic(path, save(tensors, metadata={"hnlmrec": json.dumps(meta)}))


def load_tensors(path, maker="", device="cpu"):
    """Read ({name: tensor}, meta) back. `maker`: the command that writes the file, for the error
    message, where its name does not say so.

    Raises SystemExit2 when the file is missing, truncated, not ours or broken, has a NaN, or when a
    file that it was made from or with is no longer the one it was. 0.1 s per 100 MB."""
    path, maker = Path(path), maker or maker_of(path)
    meta = read_meta(path, maker, check=True)
    with safe_open(str(path), framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    if tensors_digest(meta, tensors) != meta["digest"]:
        fail(f"{path}: its bytes are not those that were written; "
             f"delete it and run `{maker}` again")
    check_finite(path, tensors, f"delete it and run `{maker}` again")
    return {name: tensor.to(device) for name, tensor in tensors.items()}, meta


def read_meta(path, maker="", check=False):
    """The metadata of one of our files, without its tensors. check: also that its inputs, and what
    was written beside it, are still those that it was made from and with. Raises SystemExit2 as
    load_tensors."""
    path, maker = Path(path), maker or maker_of(path)
    if not path.exists():
        fail(f"{path}: no such file; make it with `{maker}`")
    try:
        with safe_open(str(path), framework="pt") as file:
            meta = json.loads((file.metadata() or {})["hnlmrec"])
            whole = meta.pop("checksum") == json_digest(meta)
    except (SafetensorError, KeyError, ValueError, AttributeError, OSError) as error:
        fail(f"{path}: not a readable file of this program ({type(error).__name__}); "
             f"delete it and run `{maker}` again")
    if not whole:
        fail(f"{path}: its bytes are not those that were written; "
             f"delete it and run `{maker}` again")
    if check:
        check_inputs(path, meta["settings"].get("inputs", {}), maker)
        check_inputs(path, meta.get("beside", {}), maker)
    return meta


def stamp(run, *names):
    """{name: digest} of files of a run: what a step keeps in settings["inputs"] of all that it
    writes. One of our tensor files goes by the digest in its header, which costs nothing and is
    checked when its tensors are read; any other by the sha256 of its bytes; a name without an
    ending is a set of generated negatives. Raises SystemExit2 for what is not there."""
    digests = {}
    for name in names:
        path = Path(run) / name
        if name.startswith("negatives") and path.suffix not in (".safetensors", ".jsonl"):
            digests[name] = json_digest(stamp(run, *(shard.name for shard in shards(run, name))))
            continue
        if not path.is_file():
            fail(f"{path}: no such file; make it with `{maker_of(path)}`")
        # adapter/ is written by peft
        ours = path.suffix == ".safetensors" and path.parent == Path(run)
        digests[name] = read_meta(path)["digest"] if ours else file_digest(path)
    return digests


def check_inputs(path, inputs, maker):
    """Raise SystemExit2 unless every file that `path` was made from or with, {name: digest}, is
    still that one."""
    run = path.parent
    if not (run / "data.safetensors").exists():  # a cell: compare/ is a folder of the run
        run = run.parent
    for name, digest in inputs.items():
        if stamp(run, name)[name] != digest:
            fail(f"{path}: was made with another {name} than the one that is there; "
                 f"put the former back, or run `{maker} --force`")


def tensors_digest(meta, tensors):
    """16 hex digits of the settings, what was written beside, and each tensor's name, type, shape
    and bytes."""
    digest = hashlib.sha256(json_digest([meta["settings"], meta.get("beside")]).encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def json_digest(value):
    """16 hex digits of a JSON-able value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def file_digest(path):
    """The first 16 hex digits of a file's sha256."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()[:16]


def check_finite(path, tensors, mend):
    """Raise SystemExit2, naming file, tensor and row, when a value is NaN or infinite."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            row = int((~torch.isfinite(tensor)).nonzero()[0, 0]) if tensor.dim() else 0
            fail(f"{path}: {name} has a NaN or infinity in row {row}; {mend}")


# first word of a file's name -> the command that writes it; other names are trained models'
MAKERS = {
    "data": "hnlmrec.py prepare", "items": "hnlmrec.py prepare", "users": "hnlmrec.py prepare",
    "profiles": "llm_negatives.py profile", "sft": "llm_negatives.py finetune",
    "adapter": "llm_negatives.py finetune", "negatives": "llm_negatives.py generate",
    "judge": "llm_negatives.py judge", "report": "eval.py report", "metrics": "eval.py report",
    "compare": "eval.py compare", "sweep": "eval.py sweep"}


def maker_of(path):
    """The command that writes this file of a run, for the ends of error messages; … where it
    takes flags that only the reader knows."""
    run, name = Path(path).parent, Path(path).name
    if run.name == "compare":  # a cell
        run, name = run.parent, name if name.startswith("sweep") else "compare"
    elif run.name.startswith("adapter"):  # LoRA's folder
        run, name = run.parent, run.name
    stem = re.sub(r"(-\d{5}|-items)?(\.partial)?\.(safetensors|jsonl|json|md)$", "", name)
    word = re.split("[-.]", stem)[0]
    model = "hnlmrec.py train" if "hnlmrec" in stem else "backbones.py pretrain"
    if stem.startswith("model-hnlmrec-full"):
        model = "hnlmrec.py blend"
    command = MAKERS.get(word, model)
    if command.startswith("llm_negatives.py finetune"):
        flags = f"--name sft{stem.removeprefix(word)}"
    elif command.endswith("generate"):
        flags = f"--out {stem}"
    else:
        flags = f"--out {name}" if command == model or word == "profiles" else "…"
    return f"python {command} --run {shlex.quote(str(run))} {flags}"


def output_name(flag, name, command, suffix="", word=""):
    """`name`, where a flag may call an output of `command` so: a plain name inside the run folder,
    that begins with `word` if given, and with no word that stands for files of another command
    (MAKERS). Cells lie in compare/.

    Raises SystemExit2 otherwise."""
    plain = name.removeprefix("compare/") if suffix == ".safetensors" else name
    if not re.fullmatch(rf"\w[\w.-]*{re.escape(suffix)}", plain):
        fail(f"{flag} {name!r}: give a plain name, of letters, digits, '-', '_' and '.', "
             f"that ends in '{suffix}'")
    first = re.split("[-.]", plain.lower())[0]
    if word and first != word:
        fail(f"{flag} {name}: has to begin with {word}, for example {word}-2{suffix}")
    if plain == name and MAKERS.get(first, command) != command:
        fail(f"{flag} {name}: names that begin with {first} are for files of "
             f"`python {MAKERS[first]}`; choose another")
    return name


def up_to_date(path, settings, maker="", force=False):
    """True when `path` was made with exactly these settings, `inputs` included, and what was
    written beside it is there: the step can be skipped.

    Raises SystemExit2 when it was made with others, so that nothing stale is used and nothing is
    overwritten unasked; and, with force too, when it is not a file of the same command."""
    path = Path(path)
    if not path.exists():
        return False
    maker, settings = maker or maker_of(path), json.loads(json.dumps(settings))
    meta = read_meta(path, maker)
    old = meta["settings"]
    if old.get("command") != settings.get("command"):
        fail(f"{path}: holds what `{old.get('command')}` writes, not `{settings.get('command')}`; "
             "choose another name")
    if force:
        return False
    for name in sorted(set(old) | set(settings)):
        if name == "inputs" or old.get(name) == settings.get(name):
            continue
        fail(f"{path}: made with {name}={old.get(name)}, now {name}={settings.get(name)}; "
             f"run `{maker} --force` to remake it, or choose another folder")
    for name in meta.get("beside", {}):
        if not (path.parent / name).exists():
            print(f"{path.parent / name} is gone: making it and {path.name} again")
            return False
    load_tensors(path, maker)  # that its inputs are still the same, and its own bytes
    print(f"skip: {path} is up to date")
    return True


def settings_of(args, *others):
    """The flags that decide what a step writes: all but where it runs and the names in `others`."""
    left_out = ("run", "out", "force", "device", *others)
    return {name: value for name, value in vars(args).items() if name not in left_out}


def read_jsonl(path, maker="", growing=False):
    """All rows of a JSON-lines file. growing: the file is written line by line, so that a last line
    without its end, of a program killed while writing, is left out; in any other file it is an
    error."""
    path = Path(path)
    maker = maker or maker_of(path)
    if not path.exists():
        fail(f"{path}: no such file; make it with `{maker}`")
    # no other character ends a line
    rows, lines = [], path.read_bytes().decode(errors="replace").split("\n")
    last = lines.pop()
    if last and not growing:
        lines.append(last)
    for n, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            fail(f"{path}: line {n} is not whole; delete the file and run `{maker}` again")
    return rows


class Progress:
    """Rate and time left: one rewritten line on a terminal, at most one plain line each 20 seconds
    in a file."""

    def __init__(self, label, total, unit):
        self.label, self.total, self.unit = label, total, unit
        self.start = self.shown = time.time()
        self.first = None
        self.tty = sys.stdout.isatty()

    def update(self, done, extra=""):
        now = time.time()
        if self.first is None:
            self.first = (done, now)  # what a resumed run found finished says nothing about speed
            return
        if done < self.total and now - self.shown < (0.2 if self.tty else 20):
            return
        self.shown = now
        rate = (done - self.first[0]) / max(now - self.first[1], 1e-9)
        left = (self.total - done) / rate if rate else float("inf")
        line = f"{self.label} {done}/{self.total} {self.unit}  {rate:.1f}/s  {left:.0f} s left"
        line = f"{line}  {extra}".rstrip()
        end = "\n" if not self.tty or done >= self.total else ""
        if self.tty:  # a line wider than the terminal would not be rewritten
            width = max(10, shutil.get_terminal_size().columns - 1)
            line = "\r" + line[:width].ljust(width)
        print(line, end=end, flush=True)

# --------------------------------------------------------------------------------------------------
# Several processes (torchrun): each does every world()-th part of the work, process 0 does the
# talking and the writing
# --------------------------------------------------------------------------------------------------

def start_processes(device):
    """-> the device of this process: `device`, or a GPU of its own under torchrun. Processes of
    other ranks than 0 print nothing."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        if device == "cuda":
            device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
        if rank():
            sys.stdout = io.StringIO()
    return device


def end_processes():
    """End a process of torchrun's once all have done their work. Gloo's threads race the
    interpreter's end: in one run of ten torch 2.13 aborts there, and with destroy_process_group
    torch 2.6 hangs. All files are written, so leave without that end."""
    if world() > 1:
        dist.barrier()
        if dist.get_backend() == "nccl":
            dist.destroy_process_group()
        else:
            sys.__stdout__.flush()
            os._exit(0)


def rank():
    """This process's number, from 0."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world():
    """The number of processes that share the work."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def share_of(rows):
    """This process's rows of a batch: every world()-th from its rank on, as a view; with one
    process all of them. With fewer rows than processes the last row serves several; it counts once
    (share_weight)."""
    return rows[min(rank(), len(rows) - 1) :: world()]


def share_weight(n):
    """What a mean over this process's share of n rows is multiplied with, so that the mean over the
    processes is that over the n rows: 1 where all have equally many."""
    return len(range(rank(), n, world())) * world() / n


def sum_over(tensors):
    """Add each tensor up over all processes, in place."""
    if world() > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)


def from_first(value):
    """The value that the process of rank 0 has, for all."""
    box = [value]
    if world() > 1:
        dist.broadcast_object_list(box)
    return box[0]


def average_gradients(parameters):
    """The mean of each gradient over all processes, in place."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    sum_over(gradients)
    if world() > 1:
        for gradient in gradients:
            gradient /= world()

# --------------------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------------------

def number(kind, low, high=None, open_low=False):
    """An argparse type: a finite number of `kind` in [low, high] (or (low, high]), with a message
    that names the range."""
    high = (2**31 - 1 if kind is int else math.inf) if high is None else high

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            said = f"{text!r} is not a number ({kind.__name__})"
            raise argparse.ArgumentTypeError(said) from None
        inside = (low < value if open_low else low <= value) and value <= high
        if not inside or not math.isfinite(value):
            bracket = "(" if open_low else "["
            raise argparse.ArgumentTypeError(f"{text} is outside {bracket}{low}, {high}]")
        return value

    return parse


def several(kind):
    """An argparse type: a list of values of the argparse type `kind`, comma-separated."""
    return lambda text: [kind(part) for part in text.split(",")]


def device_name(text):
    """An argparse type: cpu, cuda or cuda:N, where this machine has it."""
    if not re.fullmatch(r"cpu|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"{text!r}: give cpu, cuda or cuda:N")
    if text != "cpu" and int(text[5:] or 0) >= torch.cuda.device_count():
        raise argparse.ArgumentTypeError(
            f"{text}: PyTorch sees {torch.cuda.device_count()} GPUs; give cpu, or mend the driver")
    return text


class Parser(argparse.ArgumentParser):
    """argparse with defaults in --help, no abbreviations, and one line, no usage dump, on a bad
    flag (exit status 2)."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs, allow_abbrev=False,
                         formatter_class=argparse.ArgumentDefaultsHelpFormatter)

    def error(self, message):
        fail(f"{message} (see `python {self.prog} --help`)")


def add_run_flags(parser):
    """The flags of every step that makes a file of a run, on a device."""
    parser.add_argument("--run", required=True, metavar="DIR",
                        help="run folder, as made by `hnlmrec.py prepare`")
    parser.add_argument("--device", type=device_name, help="cpu, cuda or cuda:N",
                        default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--force", action="store_true",
                        help="remake the output though it was made with other settings")


def add_training_flags(parser, more=()):
    """The flags that a baseline and HNLMRec share: the same backbone, the same budget. more:
    further choices of --backbone."""
    group = parser.add_argument_group("backbone and training budget")
    group.add_argument("--backbone", choices=["mf", "lightgcn", "ngcf", "neumf", *more],
                       default="lightgcn", help="recommender")
    group.add_argument("--dim", type=number(int, 2), default=64, help="embedding width d")
    group.add_argument("--layers", type=number(int, 1), default=3,
                       help="propagation layers of lightgcn and ngcf")
    group.add_argument("--epochs", type=number(int, 0), default=0,
                       help="passes over the train pairs, at most; 0: 200, of large sets fewer")
    group.add_argument("--batch-size", type=number(int, 0), default=0,
                       help="pairs a step; 0: 2048, from 65,536 train pairs on 16,384 to 65,536")
    group.add_argument("--lr", type=number(float, 0), default=0.0,
                       help="Adam's learning rate; 0: 1e-3 x batch size / 2048, at most 8e-3")
    group.add_argument("--reg", type=number(float, 0), default=1e-4,
                       help="weight of the L2 term, lambda2")
    group.add_argument("--eval-every", type=number(int, 1), default=5,
                       help="epochs between validations")
    group.add_argument("--eval-users", type=number(int, 1), metavar="N",
                       help="users that a validation ranks, the same each time (left out: all)")
    group.add_argument("--patience", type=number(int, 1), default=6,
                       help="validations without a new best before stopping")
    group.add_argument("--seed", type=number(int, 0), default=0,
                       help="decides initial weights, batches and negatives")
    add_run_flags(parser)


def add_band_flags(group):
    """The flags of mining_band, which fine-tuning and HNLMRec's training share."""
    for name, share, which in (("first", BAND[0], "best"), ("last", BAND[1], "last")):
        group.add_argument(f"--mine-{name}", type=number(int, 0), default=0,
                           help=f"{which} rank of the mined band; 0: {100 * share:.4g} %% of the "
                                "catalogue")


def main(argv=None):
    parser = Parser(prog="backbones.py", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    p = commands.add_parser(
        "pretrain", help="train a backbone with one negative sampler",
        epilog="example: python backbones.py pretrain --run runs/demo --sampler dns "
               "--out model-dns.safetensors")
    add_training_flags(p, CLOSED_FORMS)
    p.add_argument("--sampler", choices=["rns", "pns", "dns", "mixgcf", "ahns"], default="rns",
                   help="negative sampler")
    p.add_argument("--m", type=number(int, 0, 2**16), default=0,
                   help="candidates of dns, mixgcf and ahns; 0: 4 to 64, by the number of items")
    p.add_argument("--n", type=number(int, 1), default=1,
                   help="dns draws from the n highest of its m candidates")
    p.add_argument("--beta", type=number(float, 0), default=0.75, help="popularity exponent of pns")
    p.add_argument("--loss", choices=["bpr", "softmax"], default="bpr",
                   help="softmax: over the positive and --shared negatives, no sampler")
    p.add_argument("--shared", type=number(int, 1), default=256,
                   help="softmax's negatives, drawn each step and shared by the batch")
    p.add_argument("--tau", type=number(float, 0, open_low=True), default=0.2,
                   help="softmax's temperature")
    p.add_argument("--cosine", action="store_true",
                   help="softmax of cosines; the saved vectors have norm 1")
    p.add_argument("--text-vectors", metavar="FILE",
                   help="safetensors file, in the run folder or elsewhere, with `text` (I, H): an "
                        "MLP of these in place of free vectors; AlphaRec, with --loss softmax "
                        "--cosine")
    g = p.add_argument_group(
        "closed forms: --backbone pop, itemknn, rp3, ease; they read no other flag")
    g.add_argument("--shrink", type=number(float, 0), default=20.0,
                   help="itemknn: added to the denominator of the cosine, users")
    g.add_argument("--rp3-alpha", type=number(float, 0), default=0.4,
                   help="rp3: exponent of the transition probabilities")
    g.add_argument("--rp3-beta", type=number(float, 0), default=0.3,
                   help="rp3: exponent of the popularity taken out")
    g.add_argument("--topk", type=number(int, 0), default=0,
                   help="itemknn and rp3: neighbours kept of each item (0: all)")
    g.add_argument("--ridge", type=number(float, 0, open_low=True), default=200.0,
                   help="ease: weight of its L2 term, lambda")
    g.add_argument("--max-gib", type=number(float, 0, open_low=True), default=2.0,
                   help="refuse item x item weights above this size, GiB")
    p.add_argument("--out", default="cf.safetensors", help="output file inside the run folder")
    args = parser.parse_args(argv)
    if args.backbone in CLOSED_FORMS and args.out == "cf.safetensors":
        fail(f"--backbone {args.backbone}: has no vectors for the LLM step; give --out "
             f"model-{args.backbone}.safetensors")
    if args.cosine and (args.loss != "softmax" or args.backbone == "neumf"):
        fail("--cosine: needs --loss softmax, and a backbone that scores by inner products: mf, "
             "lightgcn or ngcf")
    if args.text_vectors and args.backbone not in ("mf", "lightgcn", "ngcf"):
        fail(f"--text-vectors: is for mf, lightgcn and ngcf, not {args.backbone}; leave it out")
    pretrain(args)


if __name__ == "__main__":
    run_cli(main)
    end_processes()
