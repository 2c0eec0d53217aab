"""backbones.py: the recommenders, their negative samplers and the training loop that all methods share.

In:   runs/NAME/data.safetensors (train, valid, test pairs), written by `python hnlmrec.py prepare`.
Out:  runs/NAME/cf.safetensors (user (U, D), item (I, D)), the collaborative-filtering vectors the LLM step starts from,
      or runs/NAME/model-METHOD.safetensors, a trained baseline for the report.

Read it top to bottom: interactions, negative samplers, backbones, losses, mining, full ranking, metrics, the training loop;
then the files of a run, errors and progress, the command line. Nothing here imports the other scripts, so
that this file can be copied on its own.

Alone:  python backbones.py pretrain --run runs/NAME --backbone lightgcn --sampler dns --out model-dns.safetensors
"""

import argparse
import hashlib
import io
import json
import os
import sys
import time
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

# --------------------------------------------------------------------------------------------------
# Interactions: sorted keys instead of a dense users x items mask
# --------------------------------------------------------------------------------------------------

def pair_keys(pairs, n_items):
    """(N, 2) pairs -> (N,) sorted int64 keys user * n_items + item, for membership by binary search."""
    return (pairs[:, 0] * n_items + pairs[:, 1]).sort().values


def contains(keys, users, items, n_items):
    """Is each (user, item) among the sorted `keys` of pair_keys? users and items broadcast; bool of their shape."""
    query = users * n_items + items
    if not len(keys):
        return torch.zeros_like(query, dtype=torch.bool)
    return keys[torch.searchsorted(keys, query).clamp(max=len(keys) - 1)] == query


def user_rows(pairs, n_users):
    """Pairs sorted by user, then item, as compressed rows: (indptr (U+1,), items (N,)), both int64."""
    order = (pairs[:, 0] * (pairs[:, 1].max() + 1 if len(pairs) else 1) + pairs[:, 1]).argsort()
    indptr = torch.zeros(n_users + 1, dtype=torch.int64, device=pairs.device)
    indptr[1:] = torch.bincount(pairs[:, 0], minlength=n_users).cumsum(0)
    return indptr, pairs[order, 1]


def take(table, index):
    """Rows of a table: (N, D), (…) -> (…, D). As table[index], but with a backward pass that adds in a fixed order: that of
    plain indexing adds from many threads at once on a CPU, so two runs with one seed would drift apart. On a CPU index_select's
    does so in half the time of embedding's; on a GPU only embedding's keeps the order."""
    if table.device.type == "cpu":
        return table.index_select(0, index.flatten()).unflatten(0, index.shape)
    return F.embedding(index, table)

# --------------------------------------------------------------------------------------------------
# Negative samplers. Each takes a batch of (user, positive) and returns negatives; none has a Python loop over pairs.
# --------------------------------------------------------------------------------------------------

class UnseenSampler:
    """Draw items a user has not interacted with, with probability proportional to an item weight: exact, no rejection.

    Uniform weights give RNS (Rendle et al., BPR, 2009); popularity ** beta gives PNS (Mikolov et al., 2013, beta 0.75).

    How: put the weights of the unseen items end to end and draw a point r. With a user's seen items s_0 < s_1 < …, the
    unseen weight before s_k is c_k = cum(s_k) - (seen weight before s_k). The number of c_k <= r says how much seen weight
    lies before the point, and one more binary search in cum() gives the item. All users share one sorted array of keys
    user * stride + c_k. Weights are whole numbers, so that no rounding can ever return a seen item. Memory: O(pairs).

    Raises SystemExit2 for a user who has seen every item: there is nothing to sample."""

    def __init__(self, pairs, n_users, n_items, beta=0.0):
        popularity = torch.bincount(pairs[:, 1], minlength=n_items).double()
        # +1 keeps an item without a train interaction reachable; 2**20 steps keep popularity ** beta to six digits
        weight = ((popularity + 1) ** beta * 2**20).round().long() if beta else torch.ones_like(popularity).long()
        self.cum, self.uniform = F.pad(weight.cumsum(0), (1, 0)), not beta  # (I+1,)
        indptr, items = user_rows(pairs, n_users)
        self.seen = F.pad(weight[items].cumsum(0), (1, 0))  # (N+1,) seen weight, over all users in row order
        self.start = start = self.seen[indptr[:-1]]  # (U,) where each user's own seen weight begins
        users = torch.repeat_interleave(torch.arange(n_users, device=pairs.device), indptr.diff())
        self.stride = int(self.cum[-1]) + 1
        self.keys = users * self.stride + self.cum[items] - (self.seen[:-1] - start[users])
        self.free = self.cum[-1] - (self.seen[indptr[1:]] - start)  # (U,) weight left to draw from
        if (self.free <= 0).any():
            fail(f"user row {int((self.free <= 0).nonzero()[0])}: has interacted with all {n_items} items, "
                 "so no negative exists; remove that user or add items")

    def __call__(self, users, n, generator=None):
        """users (B,) int64 -> items (B, n) int64, drawn independently."""
        point = torch.randint(2**62, (len(users), n), generator=generator, device=users.device) % self.free[users][:, None]
        before = torch.searchsorted(self.keys, users[:, None] * self.stride + point, right=True)  # (B, n)
        point = point + self.seen[before] - self.start[users][:, None]
        return point if self.uniform else torch.searchsorted(self.cum, point, right=True) - 1  # uniform: item n begins at n


def dns(score, users, items, candidates, top=1, pick=None, penalty=None):
    """Dynamic negative sampling (Zhang et al., SIGIR 2013): the highest scored of M candidates; for top = N > 1, one drawn
    uniformly from the N highest: DNS(M, N) (Shi et al., WWW 2023). pick (B,), in 0..N - 1: which
    one; left out, drawn here.

    score: the backbone's score function; users (B, D), items (I, D), candidates (B, M) -> item ids (B,). penalty (B, M), in
    standard deviations of the row's scores, is taken off first: it keeps the choice clear of likely false negatives."""
    with torch.no_grad():
        scores = score(users[:, None], items[candidates])  # (B, M)
        if penalty is not None:
            scores = scores / scores.std(1, keepdim=True).clamp(min=1e-12) - penalty
        ranked = scores.topk(top, dim=1).indices  # (B, N)
        if pick is None:
            pick = torch.randint(top, (len(ranked),), device=ranked.device)
        return candidates.gather(1, ranked.gather(1, pick[:, None]))[:, 0]


def ahns(score, users, items, positives, candidates, alpha=1.0, beta=0.1, power=-2):
    """Adaptive hardness (Lai et al., AHNS, AAAI 2024, eq. 6): of M candidates the one whose score is nearest to
    beta * (score(positive) + alpha) ** (power + 1), so a high scored positive gets an easy negative and the reverse. The
    defaults are the published constants; power is a whole number, since the base can be below zero.

    users (B, D), items (I, D), positives (B,), candidates (B, M) -> item ids (B,)."""
    with torch.no_grad():
        target = beta * (score(users, items[positives])[:, None] + alpha) ** (power + 1)  # (B, 1)
        return candidates.gather(1, (score(users[:, None], items[candidates]) - target).abs().argmin(1, keepdim=True))[:, 0]


def mixgcf(users, item_layers, positives, candidates, pool, generator=None, shares=None):
    """MixGCF (Huang et al., KDD 2021): synthetic negatives by positive mixing (eq. 6) and hop mixing (eq. 7-9).

    users (B, D); item_layers (I, K, d), one slice a hop; positives (B,); candidates (B, M) -> vectors (B, D).
    Each candidate is drawn towards the positive by a random share (shares (K, B); left out, drawn
    here from `generator`), then each hop of the result is taken from the candidate that scores
    highest at that hop. Gradients flow to the chosen candidates and the positives.
    Hop by hop, so that the largest tensor is (B, M, d)."""
    hops = []
    if shares is None:
        # one share a pair and hop, the same for its M candidates: were it drawn for each candidate, the best one would
        # nearly always be the one drawn closest to the positive, and training stalls (measured: valid NDCG@20 .19, not .22)
        shape = item_layers.shape[1], len(positives)
        shares = torch.rand(shape, generator=generator, device=candidates.device)
    for k, share in enumerate(shares[:, :, None]):  # (B, 1)
        layer = item_layers[:, k]  # (I, d)
        # with mean pooling the user is compared as it is at every hop; with concatenation each hop has its own slice
        query = users if users.shape[1] == layer.shape[1] else users.unflatten(1, (-1, layer.shape[1]))[:, k]
        with torch.no_grad():  # choose first, then rebuild the chosen one alone: backward never sees (B, M, d)
            # the positive's part of the mix is the same for all candidates, so it cannot change which one is highest
            best = torch.einsum("bd,bmd->bm", query, layer[candidates]).argmax(1, keepdim=True)  # (B, 1)
        hops.append(share * take(layer, positives) + (1 - share) * take(layer, candidates.gather(1, best)[:, 0]))
    return pool(torch.stack(hops, 1))


def make_sampler(model, sampler, pairs, *, m=8, n=1, beta=0.75, penalty=None):
    """One of the samplers as a function of a batch: sample(u (B,), i (B,), generator) -> all users (U, D), all items (I, D), and the
    batch's users, positives and negatives (B, D) each, with the negatives' item ids (B,) (of mixgcf, whose negatives are
    no items, that of its first candidate, for the L2 term). Where processes share a batch, the last
    four are of this one's rows (share_of); what is random is drawn for the whole batch by all of
    them, so that it does not depend on their number.

    sampler: rns, pns, dns, mixgcf or ahns; pairs (N, 2) train; m: candidates of dns, mixgcf and ahns; n: dns draws from the
    n best; beta: pns's popularity exponent; penalty: dns's, as a function of users (B,) and candidates (B, M)."""
    draw = UnseenSampler(pairs, model.n_users, model.n_items, beta if sampler == "pns" else 0.0)

    def sample(u, i, generator):
        candidates = share_of(draw(u, 1 if sampler in ("rns", "pns") else m, generator))  # (B, M)
        if sampler == "mixgcf":
            user_layers, item_layers = model.layers()
            user_vectors, item_vectors = model.pool(user_layers), model.pool(item_layers)
            shape = len(u), item_layers.shape[1]
            shares = share_of(torch.rand(shape, generator=generator, device=u.device)).T  # (K, B)
        else:
            user_vectors, item_vectors = model()
        if sampler == "dns":
            pick = share_of(torch.randint(n, (len(u),), generator=generator, device=u.device))
        u, i = share_of(u), share_of(i)
        users, items = take(user_vectors, u), take(item_vectors, i)
        if sampler == "mixgcf":
            negatives = mixgcf(users, item_layers, i, candidates, model.pool, shares=shares)
            return user_vectors, item_vectors, users, items, negatives, candidates[:, 0]
        if sampler == "dns":
            cleared = penalty and penalty(u, candidates)
            j = dns(model.score, users, item_vectors, candidates, n, pick, cleared)
        elif sampler == "ahns":
            j = ahns(model.score, users, item_vectors, i, candidates)
        else:
            j = candidates[:, 0]
        return user_vectors, item_vectors, users, items, take(item_vectors, j), j

    return sample

# --------------------------------------------------------------------------------------------------
# Backbones: layers() gives every hop, pool() joins the hops, forward() = pool(layers())
# --------------------------------------------------------------------------------------------------

def normalized_adjacency(pairs, n_users, n_items):
    """D^-1/2 A D^-1/2 of the bipartite graph (LightGCN eq. 3, NGCF eq. 8 without self loops) as a sparse CSR (U+I, U+I).

    pairs (N, 2) without repeats. Symmetric, so the same matrix serves forward and backward. No row may be NaN: a node
    without an edge gets zeros."""
    n = n_users + n_items
    user, item = pairs[:, 0], pairs[:, 1] + n_users
    degree = torch.bincount(torch.cat([user, item]), minlength=n).float()
    scale = degree.clamp(min=1).rsqrt()
    value = scale[user] * scale[item]
    index = torch.stack([torch.cat([user, item]), torch.cat([item, user])])
    with warnings.catch_warnings():  # torch calls its CSR support beta once a process; the products used here are tested
        warnings.filterwarnings("ignore", message=".*[Ss]parse.*")
        return torch.sparse_coo_tensor(index, torch.cat([value, value]), (n, n)).coalesce().to_sparse_csr()


class SymmetricMatmul(torch.autograd.Function):
    """adjacency @ x for a symmetric sparse adjacency: backward multiplies by the same matrix, no transpose is ever built."""

    @staticmethod
    def forward(ctx, adjacency, x):
        ctx.adjacency = adjacency
        return adjacency @ x

    @staticmethod
    def backward(ctx, grad):
        return None, ctx.adjacency @ grad


class Backbone(nn.Module):
    """What HNLMRec, the samplers and the evaluation ask of a recommender.

    forward() -> (users (U, D), items (I, D)); layers() the same per hop, (U, K, d) and (I, K, d); ego() the parameters
    that the L2 term acts on. Scores are inner products unless a subclass says otherwise."""

    propagates = False  # True when forward() is more than the parameters themselves
    std = 0.01  # of the initial vectors; propagation averages, so the graph backbones start larger

    def __init__(self, n_users, n_items, dim):
        super().__init__()
        self.n_users, self.n_items, self.dim = n_users, n_items, dim
        self.embedding = nn.Parameter(torch.empty(n_users + n_items, dim))  # users first, then items
        nn.init.normal_(self.embedding, std=self.std)

    def ego(self):
        return self.embedding.split([self.n_users, self.n_items])

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
    """LightGCN (He et al., SIGIR 2020): E^(k+1) = A E^(k) (eq. 8), and the mean over hops 0..K (eq. 4)."""

    propagates, std = True, 0.1

    def __init__(self, n_users, n_items, dim, adjacency, n_layers=3):
        super().__init__(n_users, n_items, dim)
        self.adjacency, self.n_layers = adjacency, n_layers

    def layers(self):
        hops = [self.embedding]
        for _ in range(self.n_layers):
            hops.append(SymmetricMatmul.apply(self.adjacency, hops[-1]))
        return torch.stack(hops, 1).split([self.n_users, self.n_items])

    def forward(self):  # the same as pool(layers()), without holding all hops at once
        total = hop = self.embedding
        for _ in range(self.n_layers):
            hop = SymmetricMatmul.apply(self.adjacency, hop)
            total = total + hop
        return (total / (self.n_layers + 1)).split([self.n_users, self.n_items])


class NGCF(Backbone):
    """NGCF (Wang et al., SIGIR 2019), matrix form, eq. 7: E' = LeakyReLU((A + I) E W1 + A E ⊙ E W2), with message dropout
    (on E') and node dropout (on A's edges), hops L2-normalised and concatenated, so that D = (n_layers + 1) * dim."""

    propagates, std = True, 0.1

    def __init__(self, n_users, n_items, dim, adjacency, n_layers=3, message_dropout=0.1, node_dropout=0.0):
        super().__init__(n_users, n_items, dim)
        self.adjacency, self.message_dropout, self.node_dropout = adjacency, message_dropout, node_dropout
        self.w1 = nn.ModuleList(nn.Linear(dim, dim) for _ in range(n_layers))
        self.w2 = nn.ModuleList(nn.Linear(dim, dim) for _ in range(n_layers))
        for linear in [*self.w1, *self.w2]:
            nn.init.xavier_uniform_(linear.weight)

    def dropped_adjacency(self):
        """The adjacency with each edge kept with probability 1 - node_dropout, both directions together, rescaled."""
        a = self.adjacency
        if not (self.training and self.node_dropout):
            return a
        row = torch.repeat_interleave(torch.arange(a.shape[0], device=a.device), a.crow_indices().diff())
        low, high = torch.minimum(row, a.col_indices()), torch.maximum(row, a.col_indices())
        edge = torch.unique(low * a.shape[0] + high, return_inverse=True)[1]  # both directions share one number
        keep = torch.rand(int(edge.max()) + 1, device=a.device) >= self.node_dropout
        values = a.values() * keep[edge] / (1 - self.node_dropout)
        return torch.sparse_csr_tensor(a.crow_indices(), a.col_indices(), values, a.shape)

    def layers(self):
        adjacency, x = self.dropped_adjacency(), self.embedding
        hops = [x]
        for w1, w2 in zip(self.w1, self.w2):
            side = SymmetricMatmul.apply(adjacency, x)
            x = F.leaky_relu(w1(side + x) + w2(side * x), 0.2)
            x = F.dropout(x, self.message_dropout, self.training)
            hops.append(F.normalize(x, dim=1))
        return torch.stack(hops, 1).split([self.n_users, self.n_items])

    def pool(self, layers):
        return layers.flatten(-2)


class NeuMF(Backbone):
    """NeuMF (He et al., NCF, WWW 2017): a GMF half and an MLP half, each on its own dim/2 of the embedding, joined by a
    linear layer (eq. 12). There is no inner product to rank with, so score_all walks the catalogue in chunks."""

    def __init__(self, n_users, n_items, dim):
        super().__init__(n_users, n_items, dim)
        half = dim // 2
        self.mlp = nn.Sequential(nn.Linear(2 * half, half), nn.ReLU(), nn.Linear(half, half), nn.ReLU())
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
        chunk = max(1, 2**22 // max(1, len(users) * self.dim))  # about 16 MiB of activations at a time
        return torch.cat([self.score(users[:, None], part[None]) for part in items.split(chunk)], 1)


def build_backbone(name, n_users, n_items, dim, train, n_layers=3):
    """One of mf, lightgcn, ngcf, neumf, on the device of `train` (N, 2)."""
    if name == "mf":
        model = MF(n_users, n_items, dim)
    elif name == "neumf":
        model = NeuMF(n_users, n_items, dim)
    else:
        adjacency = normalized_adjacency(train, n_users, n_items)
        model = {"lightgcn": LightGCN, "ngcf": NGCF}[name](n_users, n_items, dim, adjacency, n_layers)
    return model.to(train.device)

# --------------------------------------------------------------------------------------------------
# Losses, and the step that every baseline trains with
# --------------------------------------------------------------------------------------------------

def bpr_loss(positive_score, negative_score):
    """BPR (Rendle et al., 2009): -mean ln sigmoid(positive - negative), written as softplus so that it cannot overflow."""
    return F.softplus(negative_score - positive_score).mean()


def l2_loss(*vectors):
    """Half the squared norm, summed over the given (B, d) tensors and averaged over B: LightGCN's reg term."""
    return sum((vector * vector).sum() for vector in vectors) / (2 * len(vectors[0]))


def make_step(model, sampler, pairs, *, reg, m=8, n=1, beta=0.75):
    """The baseline training step: BPR with negatives of one sampler, plus L2 on the batch's own embeddings. Arguments as
    make_sampler's. Returns step(rows, generator) for `fit`, whose loss is that of this process's
    share of the rows."""
    sample, (users_of, items_of) = make_sampler(model, sampler, pairs, m=m, n=n, beta=beta), pairs.T.contiguous()

    def step(rows, generator):
        u, i = users_of[rows], items_of[rows]  # (B,), (B,)
        _, _, users, items, negatives, j = sample(u, i, generator)
        u, i, weight = share_of(u), share_of(i), share_weight(len(rows))
        bpr = bpr_loss(model.score(users, items), model.score(users, negatives)) * weight
        if not reg:
            return bpr, {"bpr": bpr.item()}
        ego_users, ego_items = model.ego()
        if model.propagates:
            l2 = l2_loss(take(ego_users, u), take(ego_items, i), take(ego_items, j))
        else:  # what was gathered for the scores are the parameters themselves
            l2 = l2_loss(users, items, take(ego_items, j) if sampler == "mixgcf" else negatives)
        return bpr + reg * weight * l2, {"bpr": bpr.item()}

    return step

# --------------------------------------------------------------------------------------------------
# CF-mined hard negatives: what the LLM learns to imitate
# --------------------------------------------------------------------------------------------------

@torch.no_grad()
def mine_hard_negatives(model, train, first=5, last=60):
    """Each user's unseen items at ranks first..last of the pre-trained backbone's full ranking: a band below the very top,
    where held-out positives are densest. Reads train pairs alone.

    train (N, 2) -> item ids (U, last - first + 1), best rank first. Several processes mine for
    every world()-th user each. Raises SystemExit2 when a user has too few unseen items for the
    band."""
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
    """Indices (B, k) of the k highest of scores (B, I), highest first; equal scores go by index, lowest first.

    torch.topk leaves the order of ties open, and looks at each score with care. So: cut a row into blocks, for the k highest
    lie in the k blocks with the highest maxima, and only those are searched. One more than k are taken, to see a tie across
    the border; rows with a tie pay for a full stable sort."""
    n, more = scores.shape[1], min(k + 1, scores.shape[1])
    width = round((n / more) ** 0.5)  # the fewest scores to search: n / width maxima, then more * width
    if width < 2:
        values, index = scores.topk(more, dim=1)
    else:
        blocks = n // width  # column c belongs to block c % blocks, so that maxima run along contiguous memory
        best = scores[:, : width * blocks].unflatten(1, (width, blocks)).amax(1).topk(min(more, blocks), dim=1, sorted=False).indices
        columns = (best[:, None] + torch.arange(0, width * blocks, blocks, device=best.device)[:, None]).flatten(1)
        rest = torch.arange(width * blocks, n, device=best.device).expand(len(best), -1)  # fewer than `width` columns
        columns = torch.cat([columns, rest], 1)  # (B, about width * (k+1))
        values, place = scores.gather(1, columns).topk(more, dim=1)
        index = columns.gather(1, place)
    tied = (values[:, 1:] == values[:, :-1]).any(1)  # -inf, what is left out of the ranking, ties too
    if tied.any():
        index[tied] = scores[tied].sort(dim=1, descending=True, stable=True).indices[:, :more]
    return index[:, :k]


@torch.no_grad()
def rank_unseen(model, users, seen, k, cells=2**23):
    """The k best unseen items of each user, in chunks of users so that no more than `cells` scores
    are held at once.

    users (n,) ids; seen: (indptr, items) of user_rows, the pairs to leave out -> item ids (n, k). A user with fewer than k
    unseen items gets -1 in the places left."""
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

    vectors (n, D), users (n,), items (I, D), seen: sorted pair_keys -> item ids (n, k)."""
    items, chunk = F.normalize(items.float(), dim=-1), max(1, cells // len(items))
    result = users.new_empty(len(users), min(k, len(items)))
    last = int(users.max()) if len(users) else -1
    bounds = torch.arange(last + 2, device=users.device) * len(items)
    seen = torch.searchsorted(seen, bounds), seen % len(items)  # as user_rows has it
    for part, user, nearest in zip(vectors.split(chunk), users.split(chunk), result.split(chunk)):
        scores = F.normalize(part.float(), dim=-1) @ items.T  # (B, I)
        nearest.copy_(top_k(leave_out(scores, user, seen), k))
    return result


def leave_out(scores, users, seen):
    """Set the scores of the users' seen items to -inf, in place: scores (B, I), users (B,), seen as
    rank_unseen's -> scores."""
    indptr, items = seen
    start, count = indptr[users], indptr[users + 1] - indptr[users]
    row = torch.repeat_interleave(torch.arange(len(users), device=users.device), count)
    before = count.cumsum(0) - count  # (B,) seen items of the users above
    offset = torch.arange(len(row), device=users.device) - before[row]
    scores.view(-1).index_fill_(0, row * scores.shape[1] + items[start[row] + offset], -torch.inf)
    return scores


def ranking_hits(model, pairs, seen, k):
    """Full-ranking hits for every user who has a pair in `pairs`.

    pairs (N, 2) to find; seen: user_rows of the pairs left out of the ranking -> users (n,), hits (n, k) bool in rank order,
    relevant (n,) the number of pairs of each user. Users without a pair are not in the result: they have no metric."""
    relevant = torch.bincount(pairs[:, 0], minlength=model.n_users)
    users = relevant.nonzero()[:, 0]
    ranked = rank_unseen(model, users, seen, k)  # (n, k)
    hits = contains(pair_keys(pairs, model.n_items), users[:, None], ranked, model.n_items) & (ranked >= 0)
    return users, hits, relevant[users]

# --------------------------------------------------------------------------------------------------
# Ranking metrics: hits (n, K) bool in rank order and relevant (n,) -> one number a user, (n,) float64
# --------------------------------------------------------------------------------------------------

def ndcg(hits, relevant, k):
    """NDCG@k per user with binary gains (Järvelin and Kekäläinen, 2002); the ideal list is cut at k too.

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
    left out of the ranking. users: how many users are ranked, the same ones each time; left out,
    all. Several processes rank every world()-th user each."""
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

def fit(modules, step, n_rows, validate, *, epochs, batch_size, lr, eval_every, patience, seed, label="train"):
    """Train all parameters of `modules` with Adam and keep the state of the best validation.

    modules: {name: nn.Module}; one optimizer over all of them, so none can be forgotten. step(rows (B,), generator) ->
    (loss, {name: float}) on those rows of the train pairs. validate() -> float, higher is better; never the test split.
    Stops after `patience` validations without a new best. Returns (best state {name.parameter: tensor}, history list).

    Under torchrun every process gets the same rows, its step returns the loss of its share of them
    (share_of, times share_weight), and the gradients' mean over the processes, that of the whole
    batch, is what all of them step with. The history's losses are then those of process 0's share.

    Raises SystemExit2 when the loss is not finite, naming the step."""
    parameters = [p for module in modules.values() for p in module.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=lr, fused=True)  # one pass over each parameter instead of ten
    generator = torch.Generator(parameters[0].device).manual_seed(seed)
    best, best_state, history, done, start = -1.0, None, [], 0, time.time()
    progress = Progress(label, epochs, "epochs")
    for epoch in range(1, epochs + 1):
        total, logs = 0.0, {}
        for module in modules.values():
            module.train()
        for rows in torch.randperm(n_rows, generator=generator, device=generator.device).split(batch_size):
            loss, values = step(rows, generator)
            done += 1
            if not torch.isfinite(loss):
                fail(f"{label}: the loss is {loss.item()} at step {done} (epoch {epoch}, {values}); lower --lr "
                     f"(now {lr}) or check the input vectors for NaN")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            average_gradients(parameters)
            optimizer.step()
            total += float(loss.detach()) * len(rows)
            for name, value in values.items():
                logs[name] = logs.get(name, 0.0) + value * len(rows)
        if epoch % eval_every == 0 or epoch == epochs:
            score = validate()
            logs = {name: value / n_rows for name, value in logs.items()}
            history.append({"epoch": epoch, "loss": total / n_rows, "valid_ndcg@20": score, "seconds": time.time() - start, **logs})
            if score > best:
                best, best_epoch = score, epoch
                best_state = {f"{name}.{key}": value.detach().clone()
                              for name, module in modules.items() for key, value in module.state_dict().items()}
            elif (epoch - best_epoch) // eval_every >= patience:
                break
        progress.update(epoch, f"loss {total / n_rows:.4f}  valid NDCG@20 {max(best, 0):.4f}")
    print(f"{label}: best valid NDCG@20 {best:.4f} at epoch {best_epoch} of {epoch}, {time.time() - start:.0f} s", flush=True)
    return best_state, history


def pretrain(args):
    """Train one backbone with one sampler; write its best state and its user/item vectors."""
    out, data = Path(args.run) / args.out, load_data(args.run)
    settings = {key: value for key, value in vars(args).items() if key not in ("run", "out", "force", "device", "command", "export")}
    settings["data"] = data["digest"]
    if not up_to_date(out, settings, "python backbones.py pretrain", args.force):
        train_baseline(args, data, settings, out)
    if args.export and not rank():
        tensors, meta = load_tensors(out, "python backbones.py pretrain")
        save_tensors(Path(args.run) / args.export, {name: tensors[name] for name in ("user", "item")}, {"settings": meta["settings"]})
        print(f"wrote {Path(args.run) / args.export}: user {tuple(tensors['user'].shape)}, item {tuple(tensors['item'].shape)}, "
              "rows as in users.jsonl and items.jsonl")


def train_baseline(args, data, settings, out):
    """The training of `pretrain`, from the data of load_data to the file `out`."""
    _, _, device = start_processes(args.device)
    torch.manual_seed(args.seed)
    train = data["train"].to(device)
    data = {**data, "train": train, "valid": data["valid"].to(device)}
    model = build_backbone(args.backbone, data["n_users"], data["n_items"], args.dim, train, args.layers)
    step = make_step(model, args.sampler, train, reg=args.reg, m=args.m, n=args.n, beta=args.beta)
    start = time.time()
    validate = validation(model, data, users=args.eval_users)
    state, history = fit({"backbone": model}, step, len(train), validate, epochs=args.epochs,
                         batch_size=args.batch_size, lr=args.lr, eval_every=args.eval_every, patience=args.patience,
                         seed=args.seed, label=f"{args.backbone} {args.sampler}")
    if rank():
        return
    restore({"backbone": model}, state)
    users, items = model.eval()()
    save_tensors(out, {**state, "user": users, "item": items},
                 {"settings": settings, "n_users": data["n_users"], "n_items": data["n_items"], "history": history,
                  "seconds": time.time() - start})
    print(f"wrote {out}")

# --------------------------------------------------------------------------------------------------
# The files of a run: data, models, generated negatives
# --------------------------------------------------------------------------------------------------

def load_data(run):
    """Read runs/NAME/data.safetensors.

    Returns a dict: train, valid, test int64 (N, 2); n_users, n_items; digest (of the file); settings."""
    path = Path(run) / "data.safetensors"
    tensors, meta = load_tensors(path, f"python hnlmrec.py prepare --run {run}")
    return {**tensors, "n_users": meta["n_users"], "n_items": meta["n_items"], "digest": file_digest(path),
            "settings": meta["settings"]}


def load_model(path, maker, data):
    """Rebuild a trained backbone from its file -> (model, meta, all tensors).

    Raises SystemExit2 when it was trained on another split than `data` (a dict of load_data)."""
    tensors, meta = load_tensors(path, maker, data["train"].device)
    s = meta["settings"]
    if s["data"] != data["digest"]:
        fail(f"{path}: was trained on another data.safetensors; make it again with `{maker} --force`")
    model = build_backbone(s["backbone"], meta["n_users"], meta["n_items"], s["dim"], data["train"], s["layers"])
    restore({"backbone": model}, tensors)
    return model.eval(), meta, tensors


def load_negatives(run, name, digest):
    """Join the shards NAME-00000.safetensors … and NAME-items.safetensors -> dict: pairs (n, 2), hidden (n, H) f16, vector (n, d)
    f16, text (I, H) f16, digest of them all.

    Raises SystemExit2 when a shard is missing, or was made for another split."""
    paths = [path for path in sorted(Path(run).glob(f"{name}-?????.safetensors")) if path.stem[-5:].isdigit()]
    maker = f"python llm_negatives.py generate --run {run}"
    if not paths:
        fail(f"{Path(run) / name}-00000.safetensors: no such file; make it with `{maker}`")
    n_shards, paths = len(paths), [*paths, Path(run) / f"{name}-items.safetensors"]
    parts, metas = zip(*(load_tensors(path, maker) for path in paths))
    for path, meta in zip(paths, metas):
        if meta["settings"]["data"] != digest:
            fail(f"{path}: was made for another split than {Path(run) / 'data.safetensors'}; run `{maker} --force`")
        if meta["settings"] != metas[0]["settings"]:
            fail(f"{path}: was made with other settings than {paths[0].name}; run `{maker} --force`")
    if n_shards != metas[0]["settings"]["shards"]:
        fail(f"{Path(run) / name}: {n_shards} of {metas[0]['settings']['shards']} shards are there; run `{maker}` to make the rest")
    # one shard after the other: files are read when they are copied, and let go of before the next
    *parts, items = parts
    n, done = sum(len(part["pairs"]) for part in parts), 0
    joined = {key: value.new_empty(n, *value.shape[1:]) for key, value in parts[0].items()}
    while parts:
        part = parts.pop(0)
        for key, value in part.items():
            joined[key][done : done + len(value)] = value
        done += len(value)
    digest = hashlib.sha256("+".join(file_digest(path) for path in paths).encode()).hexdigest()[:16]
    return {**joined, "text": items["text"], "digest": digest}


def restore(modules, state):
    """Load {prefix.name: tensor} into {prefix: module}."""
    for prefix, module in modules.items():
        module.load_state_dict({key.removeprefix(prefix + "."): value for key, value in state.items() if key.startswith(prefix + ".")})


def row_of(rows, raw, flag, path):
    """The number of the row with this raw id. Raises SystemExit2 naming the flag when there is none."""
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
        self.message = " ".join(str(message).split())

    def __str__(self):
        return self.message


def run_cli(main):
    """Run `main()` as a program: our errors become one line and status 2, Ctrl-C ends quietly with status 130."""
    try:
        main()
    except SystemExit2 as error:
        print(f"error: {error.message}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped; finished steps are kept, run the same command to go on", file=sys.stderr)
        sys.exit(130)
    except OSError as error:  # a full disk or an unwritable folder: the temporary file is gone, the old file untouched
        print(f"error: {error.filename or 'output'}: {error.strerror or error}; mend that and run again", file=sys.stderr)
        sys.exit(2)


def write_atomic(path, data):
    """Write bytes to a temporary name, then rename: a reader sees the old file or the new one, never half of one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
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
    """Save {name: tensor} with a JSON-able dict `meta` (settings, digests of the inputs) as safetensors metadata."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomic(path, save(tensors, metadata={"hnlmrec": json.dumps(meta, sort_keys=True)}))


def load_tensors(path, maker, device="cpu"):
    """Read ({name: tensor}, meta) back. `maker` is the command that writes the file, for the error message.

    Raises SystemExit2 when the file is missing, truncated or not ours."""
    path = Path(path)
    if not path.exists():
        fail(f"{path}: no such file; make it with `{maker}`")
    try:
        with safe_open(str(path), framework="pt", device=str(device)) as file:
            meta, names = json.loads((file.metadata() or {})["hnlmrec"]), file.keys()
            return {name: file.get_tensor(name) for name in names}, meta
    except (SafetensorError, KeyError, ValueError) as error:
        fail(f"{path}: not a readable file of this program ({type(error).__name__}: {error}); delete it and run `{maker}` again")


def file_digest(path):
    """The first 16 hex digits of a file's sha256."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


def require_digest(path, maker):
    """The digest of an input file; one clear line when it is not there."""
    if not Path(path).exists():
        fail(f"{path}: no such file; make it with `{maker}`")
    return file_digest(path)


def read_meta(path, maker):
    """The metadata of one of our safetensors files, without its tensors."""
    try:
        with safe_open(str(path), framework="pt") as file:
            return json.loads((file.metadata() or {})["hnlmrec"])
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        fail(f"{path}: not a readable file of this program ({type(error).__name__}); delete it and run `{maker}` again")


def up_to_date(path, settings, maker, force=False):
    """True when `path` was made with exactly these settings (inputs' digests included): the step can be skipped.

    Raises SystemExit2 when it was made with others, so that nothing stale is used and nothing is overwritten unasked."""
    path = Path(path)
    if force or not path.exists():
        return False
    old = read_meta(path, maker).get("settings", {})
    settings = json.loads(json.dumps(settings))
    for name in sorted(set(old) | set(settings)):
        if old.get(name) != settings.get(name):
            fail(f"{path}: made with {name}={old.get(name)}, now {name}={settings.get(name)}; "
                 f"add --force to `{maker}` to remake it, or choose another folder")
    print(f"skip: {path} is up to date")
    return True


def read_jsonl(path, maker, growing=False):
    """All rows of a JSON-lines file. growing: the file is written line by line, so that a last line without its end, of a program
    killed while writing, is left out; in any other file it is an error."""
    path = Path(path)
    if not path.exists():
        fail(f"{path}: no such file; make it with `{maker}`")
    rows = []
    for n, line in enumerate(path.read_text(encoding="utf-8").splitlines(keepends=True), 1):
        if not line.endswith("\n") and growing:
            break
        try:
            rows.append(json.loads(line))
        except ValueError:
            fail(f"{path}: line {n} is not whole; delete the file and run `{maker}` again")
    return rows


class Progress:
    """Rate and time left: one rewritten line on a terminal, at most one plain line each 20 seconds in a file."""

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
        line = f"{self.label} {done}/{self.total} {self.unit}  {rate:.1f}/s  {left:.0f} s left  {extra}".rstrip()
        end = "\n" if not self.tty or done >= self.total else ""
        print(f"\r\033[K{line}" if self.tty else line, end=end, flush=True)

# --------------------------------------------------------------------------------------------------
# Several processes (torchrun): each does every world()-th part of the work, process 0 does the
# talking and the writing
# --------------------------------------------------------------------------------------------------

def start_processes(device):
    """-> (rank, world, device): (0, 1, device) unless torchrun started this program. Each process
    takes its own GPU."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        if device == "cuda":
            device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
        if rank():
            sys.stdout = io.StringIO()
    return rank(), world(), device


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
    for tensor in tensors if world() > 1 else ():
        dist.all_reduce(tensor)


def average_gradients(parameters):
    """The mean of each gradient over all processes, in place."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    sum_over(gradients)
    for gradient in gradients if world() > 1 else ():
        gradient /= world()

# --------------------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------------------

def number(kind, low, high=float("inf"), open_low=False):
    """An argparse type: a number of `kind` in [low, high] (or (low, high]), with a message that names the range."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number ({kind.__name__})") from None
        if not (low < value if open_low else low <= value) or not value <= high:
            raise argparse.ArgumentTypeError(f"{text} is outside {'(' if open_low else '['}{low}, {high}]")
        return value

    return parse


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """--help with a flag, its meaning and its default on one line where the terminal is wide enough; no default where there is
    none, or where the flag is a switch."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=40)

    def _get_help_string(self, action):
        return action.help if action.default in (None, "") or isinstance(action.default, bool) else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse with Help, and with one line, no usage dump, on a bad flag (exit status 2)."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs, formatter_class=Help)

    def error(self, message):
        fail(f"{message} (see `python {self.prog} --help`)")


def add_training_flags(parser):
    """The flags that a baseline and HNLMRec share: the same backbone, the same budget."""
    group = parser.add_argument_group("backbone and training budget")
    group.add_argument("--backbone", choices=["mf", "lightgcn", "ngcf", "neumf"], default="lightgcn", help="recommender")
    group.add_argument("--dim", type=number(int, 2), default=64, help="embedding width d")
    group.add_argument("--layers", type=number(int, 1), default=3, help="propagation layers of lightgcn and ngcf")
    group.add_argument("--epochs", type=number(int, 1), default=200, help="passes over the train pairs, at most")
    group.add_argument("--batch-size", type=number(int, 1), default=2048, help="pairs a step")
    group.add_argument("--lr", type=number(float, 0, open_low=True), default=1e-3, help="Adam's learning rate")
    group.add_argument("--reg", type=number(float, 0), default=1e-4, help="weight of the L2 term, lambda2")
    group.add_argument("--eval-every", type=number(int, 1), default=5, help="epochs between validations")
    group.add_argument("--eval-users", type=number(int, 1), metavar="N",
                       help="users that a validation ranks, the same each time (left out: all)")
    group.add_argument("--patience", type=number(int, 1), default=6, help="validations without a new best before stopping")
    group.add_argument("--seed", type=number(int, 0), default=0, help="decides initial weights, batches and negatives")
    parser.add_argument("--run", required=True, metavar="DIR", help="run folder, as made by `hnlmrec.py prepare`")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--force", action="store_true", help="remake the output though it was made with other settings")


def main(argv=None):
    parser = Parser(prog="backbones.py", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    p = commands.add_parser("pretrain", help="train a backbone with one negative sampler",
                            epilog="example: python backbones.py pretrain --run runs/demo --sampler dns --out model-dns.safetensors")
    add_training_flags(p)
    p.add_argument("--sampler", choices=["rns", "pns", "dns", "mixgcf", "ahns"], default="rns", help="negative sampler")
    p.add_argument("--m", type=number(int, 1), default=8, help="candidates of dns, mixgcf and ahns, items")
    p.add_argument("--n", type=number(int, 1), default=1, help="dns draws from the n highest of its m candidates")
    p.add_argument("--beta", type=number(float, 0), default=0.75, help="popularity exponent of pns")
    p.add_argument("--out", default="cf.safetensors", help="output file inside the run folder")
    p.add_argument("--export", metavar="FILE", help="also write the user and item vectors alone, to FILE inside the run folder")
    args = parser.parse_args(argv)
    if args.n > args.m:
        fail(f"--n {args.n}: larger than --m {args.m}; dns draws from the n highest of m candidates")
    pretrain(args)


if __name__ == "__main__":
    run_cli(main)
    end_processes()
