"""backbones.py: recommenders, negative samplers and the training loop that all methods share.

In:   runs/NAME/data.safetensors (train, valid and test pairs), written by `hnlmrec.py prepare`.
Out:  runs/NAME/cf.safetensors: user (U, D) and item (I, D), the collaborative-filtering vectors
      that the LLM step starts from; or runs/NAME/model-METHOD.safetensors, a baseline.

Part 1 goes straight from (user, item) pairs to a trained LightGCN, part 2 has further baselines,
and part 3 is the program. Nothing here imports the other scripts: the file stands alone.
Try:  python backbones.py pretrain --run runs/NAME --sampler dns --out model-dns.safetensors
"""

import argparse, contextlib, ctypes, functools, hashlib, io, json, math, os, re, shlex, shutil
import signal, sys, time, warnings
from collections import namedtuple
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import nn

# torch warns once that its sparse matrices are in beta, and unchecked; the products here are tested
warnings.filterwarnings("ignore", message="Sparse (CSR tensor|invariant checks)")

# ==== 1. From pairs to a trained LightGCN =========================================================
# Shapes: U users, I items, N pairs, B rows of a batch, M candidates, K hops (layer 0 included) of
# width d, joined to final vectors of width D. `fail` raises SystemExit2, with a one-line message
# A dense users x items mask of large data would not fit, so pairs are kept as sorted keys or rows

def pair_keys(pairs, n_items):
    """(N, 2) pairs -> (N,) sorted int64 keys user * n_items + item, looked up by binary search."""
    return (pairs[:, 0].long() * n_items + pairs[:, 1]).sort().values


def contains(keys, users, items, n_items):
    """Whether each (user, item) is among the keys of pair_keys; users and items broadcast."""
    query = users.long() * n_items + items
    if not len(keys):
        return torch.zeros_like(query, dtype=torch.bool)
    return keys[torch.searchsorted(keys, query).clamp(max=len(keys) - 1)] == query


def user_rows(pairs, n_users):
    """Pairs (N, 2) -> indptr (U + 1,), items (N,): u has items[indptr[u]:indptr[u + 1]], sorted."""
    width = pairs[:, 1].max() + 1 if len(pairs) else 1
    order = (pairs[:, 0].long() * width + pairs[:, 1]).argsort()
    count = torch.bincount(pairs[:, 0], minlength=n_users)
    return F.pad(count.cumsum(0), (1, 0)), pairs[order, 1]


def rows_of(rows, users):
    """All items of users (B,); rows: from user_rows -> places in `users` (n,) and items (n,)."""
    indptr, items = rows
    count = indptr[users + 1] - indptr[users]
    place = torch.repeat_interleave(torch.arange(len(users), device=users.device), count)
    # a user's shift: from where the row starts in the result to where it starts in `items`
    shift = indptr[users] - (count.cumsum(0) - count)
    return place, items[torch.arange(len(place), device=users.device) + shift[place]]


def take(table, index):
    """table[index] with a deterministic backward pass: table (N, D), index (…) -> (…, D)."""
    # on a CPU the backward pass of table[index] adds in no fixed order: runs with one seed drift
    # apart. index_select's is faster than embedding's, and deterministic, but on a CPU only
    if table.device.type == "cpu":
        return table.index_select(0, index.flatten()).unflatten(0, index.shape)
    return F.embedding(index, table)

# ---- Propagation: layers() gives every hop, pool() joins the hops, forward() = pool(layers()) ----
def sparse_csr(row, column, value, shape):
    """A sparse CSR matrix from its entries: row, column, value (n,), no (row, column) twice."""
    entries = torch.sparse_coo_tensor(torch.stack([row, column]), value, shape)
    return entries.coalesce().to_sparse_csr()


def normalized_adjacency(pairs, n_users, n_items):
    """D^-1/2 A D^-1/2 of the graph of pairs (LightGCN eq. 3; NGCF eq. 8): CSR (U + I, U + I)."""
    user, item = pairs[:, 0], pairs[:, 1] + n_users
    source, target = torch.cat([user, item]), torch.cat([item, user])
    # a node without an edge has scale inf, but is in no entry of the matrix: its row is all zeros
    scale = torch.bincount(source, minlength=n_users + n_items).float().rsqrt()
    return sparse_csr(source, target, scale[source] * scale[target], (len(scale), len(scale)))


class SymmetricMatmul(torch.autograd.Function):
    """apply(adjacency (n, n), x (n, d)) -> adjacency @ x; adjacency: symmetric, no gradient."""
    @staticmethod
    def forward(ctx, adjacency, x):
        ctx.adjacency = adjacency
        return adjacency @ x

    @staticmethod
    def backward(ctx, grad):  # by the same matrix, so that no transpose is built
        return None, ctx.adjacency @ grad


class Backbone(nn.Module):
    """A recommender made of user and item vectors. forward() -> (users (U, D), items (I, D));
    layers(): the same for each hop, (U, K, d) and (I, K, d); ego(): the vectors before propagation,
    for the L2 term, (U, d) and (I, d). Scores are inner products unless a subclass overrides them.
    Ranking needs only n_items and scores(users (B,)) -> (B, I), which closed forms have too."""

    propagates = False  # True: __init__ takes a graph
    std = 0.01  # of the initial vectors: propagation averages, so graph backbones start larger

    def __init__(self, n_users, n_items, dim):
        super().__init__()
        self.n_users, self.n_items, self.dim = n_users, n_items, dim
        self.embedding = nn.Parameter(torch.empty(n_users + n_items, dim))  # users, then items
        nn.init.normal_(self.embedding, std=self.std)
        self.texts = None  # AlphaRec: a TextVectors, whose output replaces `embedding`
        self.final = None  # forward()'s result, kept by scores() until train(), eval() or loading
        self.register_load_state_dict_post_hook(lambda module, _: setattr(module, "final", None))

    def start(self):
        return self.embedding if self.texts is None else self.texts()  # (U + I, d)

    def ego(self):
        return self.start().split([self.n_users, self.n_items])

    def layers(self):
        return [vectors[:, None] for vectors in self.ego()]  # (U, 1, d), (I, 1, d)

    def pool(self, layers):
        return layers.mean(-2)  # (…, K, d) -> (…, D)

    def forward(self):
        return [self.pool(layers) for layers in self.layers()]

    def score(self, users, items):
        return (users * items).sum(-1)  # (…, D), (…, D) -> (…); leading dimensions broadcast

    def score_all(self, users, items):
        return users @ items.T  # users (B, D), items (I, D) -> (B, I)

    @torch.no_grad()
    def scores(self, users):
        """Scores of users (B,) over all items -> (B, I), a new tensor. In eval mode the graph is
        propagated once for all calls until train(), eval() or load_state_dict()."""
        if self.training or self.final is None:
            self.final = self()
        return self.score_all(self.final[0][users], self.final[1])

    def train(self, mode=True):
        # fit calls this before the optimizer's steps and rank_unseen after: drop the kept vectors
        self.final = None
        return super().train(mode)


class MF(Backbone):
    """Matrix factorisation (Rendle et al., BPR-MF, 2009): two embedding tables."""


class LightGCN(Backbone):
    """LightGCN (He et al., SIGIR 2020): E^(k+1) = A E^(k) (eq. 7), then the mean over all hops, the
    first included (eq. 4). adjacency (U + I, U + I): normalized_adjacency of the train pairs."""

    propagates, std = True, 0.1

    def __init__(self, n_users, n_items, dim, adjacency, n_layers=3):
        super().__init__(n_users, n_items, dim)
        # a buffer, so that `.to` moves it; not saved, since it is rebuilt from the train pairs
        self.register_buffer("adjacency", adjacency, persistent=False)
        self.n_layers = n_layers

    def layers(self):
        hops = [self.start()]
        for _ in range(self.n_layers):
            hops.append(SymmetricMatmul.apply(self.adjacency, hops[-1]))
        return torch.stack(hops, 1).split([self.n_users, self.n_items])

    def forward(self):  # Backbone.forward with one hop in memory
        if type(self) is not LightGCN:  # a subclass may have layers() or pool() of its own
            return super().forward()
        total = hop = self.start()
        for _ in range(self.n_layers):
            hop = SymmetricMatmul.apply(self.adjacency, hop)
            total = total + hop
        return (total / (self.n_layers + 1)).split([self.n_users, self.n_items])

# ---- Losses --------------------------------------------------------------------------------------
def bpr_loss(positive_score, negative_score):
    """BPR (Rendle et al., 2009): -mean ln sigmoid(positive - negative); scores (B,) -> scalar."""
    return F.softplus(negative_score - positive_score).mean()  # -ln sigmoid that cannot overflow


def l2_loss(*vectors):
    """Half the squared norm, summed over (B, d) tensors, averaged over B: LightGCN's L2 term."""
    return sum((vector * vector).sum() for vector in vectors) / (2 * len(vectors[0]))

# ---- Negative samplers: a batch of (user, positive) -> negatives, without a loop over pairs ------
class UnseenSampler:
    """Draws items that a user has not interacted with, independently: uniformly (RNS: Rendle et
    al., BPR, 2009) or in proportion to widths (I,), int64, at least 1: users (B,), n -> items
    (B, n). Raises SystemExit2 if a user has every item."""
    def __init__(self, pairs, n_users, n_items, widths=None):
        # items lie side by side, item i up to ends[i]; a user's seen items are cut out, and the
        # others moved together, to a width of `free`. A draw r below it is moved up by the width of
        # the seen items cut out at r or before: if items 1 and 3 are seen, of width 1, the cuts are
        # at 1 and 2, and r = 1 gives item 2. Binary search finds them, as all users share
        # one sorted array of keys, user * stride + place. Duplicate pairs count once
        self.uniform = widths is None
        widths = torch.ones(n_items, device=pairs.device).long() if self.uniform else widths
        keys = pair_keys(pairs, n_items).unique_consecutive()
        users, items = keys // n_items, keys % n_items
        self.ends, self.seen = widths.cumsum(0), F.pad(widths[items].cumsum(0), (1, 0))
        count = torch.bincount(users, minlength=n_users)
        end = count.cumsum(0)  # of a user's keys
        self.before, self.stride = self.seen[end - count], self.ends[-1]  # width of earlier keys
        self.free = self.stride - (self.seen[end] - self.before)
        place = (self.ends - widths)[items] - (self.seen[:-1] - self.before[users])
        self.keys = users * self.stride + place
        if len(full := (self.free <= 0).nonzero()):
            fail(f"user row {int(full[0])}: has all {n_items} items: no negative; remove the user")

    def __call__(self, users, n, generator=None):
        u = users[:, None].long()  # (B, 1)
        # limits differ between users: draw from a far larger range, so that the modulo bias is tiny
        r = torch.randint(2**62, (len(users), n), generator=generator, device=users.device)
        r = r % self.free[u]  # (B, n)
        cut = self.seen[torch.searchsorted(self.keys, u * self.stride + r, right=True)]
        r = r + cut - self.before[u]
        return r if self.uniform else torch.searchsorted(self.ends, r, right=True)


@torch.no_grad()
def score_candidates(score, users, items, candidates):
    """A backbone's `score` of users (B, D) and candidates (B, M), ids of items (I, D) -> (B, M)."""
    # a few rows at a time: on a CPU, 512 KiB stay in cache, so it takes a third of the time
    size = (2**17 if items.is_cpu else 2**26) // (candidates.shape[1] * items.shape[1]) or 1
    return torch.cat([score(u[:, None], take(items, c))  # (size, M)
                      for u, c in zip(users.split(size), candidates.split(size))])


def dns(score, users, items, candidates, top=1, generator=None, penalty=None):
    """Dynamic negative sampling (Zhang et al., SIGIR 2013): the highest-scoring of M candidates;
    for top > 1, a random one of the `top` highest: DNS(M, N) (Shi et al., WWW 2023). No gradient.
    score: a backbone's; users (B, D), items (I, D), candidates (B, M): item ids; penalty (B, M):
    subtracted from the scores -> item ids (B,)."""
    scores = score_candidates(score, users, items, candidates)  # (B, M)
    if penalty is not None:
        scores = scores - penalty
    ranked = scores.topk(top, dim=1).indices  # (B, top)
    pick = torch.randint(top, (len(ranked), 1), generator=generator, device=ranked.device)
    return candidates.gather(1, ranked.gather(1, pick))[:, 0]


def mixgcf(users, item_layers, positives, candidates, pool, generator=None):
    """MixGCF (Huang et al., KDD 2021): synthetic negatives by positive mixing (eq. 6) and hop
    mixing (eq. 7-9). users (B, D); item_layers (I, K, d); positives (B,), candidates (B, M): ids;
    pool((B, K, d)) -> (B, D) joins the hops as the backbone does -> vectors (B, D)."""
    # Gradients flow to the chosen candidates and the positives. Each pair and hop draws one random
    # share of the positive for all M candidates: if each had its own, the one with the largest
    # would often win, and training would gain less (MovieLens-100K: valid NDCG@20 .238, not .257)
    shape, hops = (item_layers.shape[1], len(positives)), []
    shares = torch.rand(shape, generator=generator, device=candidates.device)  # (K, B)
    for k, (layer, share) in enumerate(zip(item_layers.unbind(1), shares[:, :, None])):
        layer = layer.contiguous()  # (I, d): rows side by side are gathered faster; share (B, 1)
        # hop k meets the whole user vector (mean pooling: D = d) or its k-th slice (joined: D > d)
        query = users.unflatten(1, (-1, layer.shape[1]))  # (B, 1 or K, d)
        query = query[:, min(k, query.shape[1] - 1)]  # (B, d)
        # choose first, then rebuild the chosen one alone: backward never sees (B, M, d). The
        # positive's part of the mix is the same for all candidates, so it cannot change the choice
        scores = score_candidates(lambda u, i: (u @ i.mT)[:, 0], query, layer, candidates)
        best = candidates.gather(1, scores.argmax(1, keepdim=True))[:, 0]  # (B, M) -> (B,)
        hops.append(share * take(layer, positives) + (1 - share) * take(layer, best))
    return pool(torch.stack(hops, 1))


SAMPLERS = "rns", "pns", "dns", "mixgcf", "ahns"
# all_users (U, D), all_items (I, D); users, positives, negatives of the batch, each (B, D);
# negative_ids (B,): items for the L2 term; for mixgcf's synthetic negatives, the first candidates
Sample = namedtuple("Sample", "all_users all_items users positives negatives negative_ids")


def make_sampler(model, sampler, pairs, *, m=8, n=1, beta=0.75, penalty=None):
    """A sampler as a function of a batch: sample(u (B,), i (B,), generator) -> Sample.
    model: a Backbone; sampler: one of SAMPLERS; pairs (N, 2): train; m: number of candidates for
    dns, mixgcf and ahns; n: dns's `top`; beta: pns's popularity exponent; penalty: for dns, a
    function of users (B,) and candidates (B, M)."""
    widths = popularity_widths(pairs, model.n_items, beta) if sampler == "pns" else None
    draw = UnseenSampler(pairs, model.n_users, model.n_items, widths)

    def sample(u, i, generator):
        candidates = draw(u, 1 if sampler in ("rns", "pns") else m, generator)  # (B, M)
        # MixGCF mixes hop by hop; the others need pooled vectors alone
        layers = model.layers() if sampler == "mixgcf" else None
        all_users, all_items = map(model.pool, layers) if layers else model()
        users, positives, j = take(all_users, u), take(all_items, i), candidates[:, 0]
        # all but MixGCF choose one of the candidates: j (B,)
        if sampler == "dns":
            j = dns(model.score, users, all_items, candidates, n, generator,
                    penalty and penalty(u, candidates))
        elif sampler == "ahns":
            j = ahns(model.score, users, all_items, i, candidates)
        elif sampler not in ("rns", "pns", "mixgcf"):
            fail(f"sampler {sampler!r}: has no branch in make_sampler")
        negatives = (mixgcf(users, layers[1], i, candidates, model.pool, generator) if layers
                     else take(all_items, j))
        return Sample(all_users, all_items, users, positives, negatives, j)

    return sample

# ---- Full ranking: the top k of all unseen items, by any recommender's scores(users) -> (B, I) ---
def top_k(scores, k):
    """Ids (B, min(k, I)) of the highest scores (B, I), best first; ties go to the lowest id."""
    k = min(k, scores.shape[1])
    values, index = scores.topk(min(k + 1, scores.shape[1]), dim=1)
    # torch.topk takes any of equal scores. If score k + 1 equals score k, take all above them,
    # then the lowest ids. A full sort of these rows would take two to four times as long
    tied = values[:, k - 1] == values[:, -1]
    rows, last, index = scores[tied], values[tied, k - 1:k], index[:, :k]
    back = torch.arange(rows.shape[1], 0, -1, dtype=torch.int32, device=rows.device)
    key = torch.where(rows == last, back, 0).masked_fill(rows > last, 2**31 - 1)
    index[tied] = key.topk(k, dim=1).indices
    index = index.sort(1).values  # by id, which the stable sort keeps among equal scores
    order = scores.gather(1, index).sort(dim=1, descending=True, stable=True).indices
    return index.gather(1, order)


def leave_out(scores, users, seen):
    """Set the users' seen items (seen: from user_rows) to -inf in scores (B, I), contiguous."""
    row, items = rows_of(seen, users)
    scores.view(-1).index_fill_(0, row * scores.shape[1] + items, -torch.inf)
    return scores


def best_unseen(scores_at, users, seen, k, n_items, cells=2**23):
    """The k best unseen items of users (n,). scores_at(places in `users` (b,)) -> (b, I), a tensor
    to overwrite; seen: from user_rows; cells: scores held at once, 2**23 being 32 MiB -> item ids
    (n, min(k, I)), best first, -1 where a user has fewer unseen items."""
    # one result for all: many small ones, allocated between the scores, would fragment memory
    result = users.new_empty(len(users), min(k, n_items))
    for rows in torch.arange(len(users), device=users.device).split(max(1, cells // n_items)):
        scores = leave_out(scores_at(rows), users[rows], seen)
        index = top_k(scores, k)
        result[rows] = index.masked_fill(scores.gather(1, index) == -torch.inf, -1)
    return result


@torch.no_grad()
def rank_unseen(model, users, seen, k):
    """The k best unseen items of users (n,) by a module with n_items and scores(), which returns
    a new tensor; seen: user_rows to leave out -> ids (n, min(k, I)), best first, padded with -1."""
    was_training = model.training
    model.eval()
    ranked = best_unseen(lambda rows: model.scores(users[rows]), users, seen, k, model.n_items)
    model.train(was_training)
    return ranked

# ---- CF-mined hard negatives: what the LLM learns to imitate -------------------------------------
# Shares of the catalogue: ranks 200-300 of MovieLens-100K's 1,008 items. Better ranks hold many
# items that the user would like: with ranks 5-60 as fine-tuning's targets, 4.3 % of the items
# nearest to the generated vectors are validation positives, several times the share of all items
BAND = 0.1985, 0.298


def mining_band(data, first=0, last=0):
    """The mined ranks first..last, 1 the best; 0: BAND's share of the catalogue. data: load_data's.
    Raises SystemExit2 if last < first, or if last is beyond the catalogue."""
    n_items, count = data["n_items"], torch.bincount(data["train"][:, 0])
    low, high = (max(1, round(part * n_items)) for part in BAND)
    # if only one end is given, the other moves if it has to
    first, last = first or min(low, last or low), last or max(high, first)
    if not first <= last <= n_items:
        fail(f"--mine-first {first}, --mine-last {last}: must not fall, nor be above {n_items}")
    if few := int((count > n_items - last).sum()):
        print(f"{few} users have fewer than {last} unseen items: their last ones are mined instead")
    return first, last


@torch.no_grad()
def mine_hard_negatives(model, train, users, first, last):
    """The unseen items at ranks first..last of a trained recommender's full ranking for users (n,),
    from train (N, 2) alone; users with fewer get their last ones (the best is repeated if need be)
    -> ids (n, last - first + 1). Raises SystemExit2 for a user who has all items."""
    seen = user_rows(train, model.n_users)
    end = (model.n_items - seen[0].diff()[users]).clamp(max=last)  # (n,)
    if not end.all():
        fail(f"user row {int(users[end.argmin()])}: has all {model.n_items} items; remove the user")
    back = torch.arange(first - last - 1, 0, device=users.device)  # (L,): places from the end
    # some users at a time: the ranks down to `last` take three times the band's memory
    size = max(1, 2**26 // last)
    return torch.cat([rank_unseen(model, u, seen, last).gather(1, (e[:, None] + back).clamp(min=0))
                      for u, e in zip(users.split(size), end.split(size))])


class Bands:
    """mine_hard_negatives on demand: bands[users (n,)] -> (n, L). Each user is ranked once. For
    large data, the bands of all users, a tenth of U x I, would not fit in memory."""
    def __init__(self, model, train, first, last):
        self.mine = lambda users: mine_hard_negatives(model, train, users, first, last)
        self.place = torch.full((model.n_users,), -1, device=train.device)  # user -> row of items
        self.items = self.mine(self.place[:0])  # (users so far, L)

    def __getitem__(self, users):
        new = users[self.place[users] < 0].unique()
        if len(new):
            self.place[new] = torch.arange(len(new), device=new.device) + len(self.items)
            self.items = torch.cat([self.items, self.mine(new)])
        return self.items[self.place[users]]

# ---- The training step and the loop: baselines and HNLMRec differ in the step alone --------------
def make_step(model, sampler, pairs, *, reg, **options):
    """The baselines' step for `fit`: BPR with one sampler's negatives, plus L2 on the batch's own
    parameters. Arguments as make_sampler's -> step(rows (B,), generator)."""
    sample_negatives = make_sampler(model, sampler, pairs, **options)
    users_of, items_of = pairs.T.contiguous()

    def step(rows, generator):
        u, i = users_of[rows], items_of[rows]  # (B,), (B,)
        _, _, users, positives, negatives, j = sample_negatives(u, i, generator)
        bpr = bpr_loss(model.score(users, positives), model.score(users, negatives))
        if not reg:  # a term of weight 0 would take nearly half of an MF step
            return bpr, {"bpr": bpr.item()}
        # L2 on the parameters (AlphaRec: its MLP's output), not on what propagation makes of them
        ego_users, ego_items = model.ego()
        l2 = l2_loss(take(ego_users, u), take(ego_items, i), take(ego_items, j))
        return bpr + reg * l2, {"bpr": bpr.item()}

    return step


def fit(modules, step, n_rows, validate, *, epochs, batch_size, lr, eval_every, patience, seed,
        label="train", decay=False, stop=None):
    """Train `modules` {name: nn.Module} with Adam and leave them in their best state. step(rows
    (B,) in range(n_rows), generator) -> (loss, {name: float} to log); validate() -> float, higher
    is better. Stops after `patience` validations without a new best, or when stop(history) is
    true. decay: the learning rate falls linearly to 0. Raises SystemExit2 when the loss or a
    validation is not finite. -> (best state {name.parameter: tensor}, history)."""
    modules = nn.ModuleDict(modules)
    parameters = list(modules.parameters())
    for p in parameters if world() > 1 else ():  # all processes start alike, to the last bit
        dist.broadcast(p.data, 0)
    # fused: one pass over each parameter instead of seven
    optimizer = torch.optim.Adam(parameters, lr=lr, fused=True)
    device = parameters[0].device
    generator = torch.Generator(device).manual_seed(seed)
    # several processes share the order of the rows, and each draws negatives of its own
    draws = generator if world() == 1 else torch.Generator(device).manual_seed(seed + 1 + rank())
    best, history, done = -math.inf, [], 0
    n_steps = epochs * math.ceil(n_rows / batch_size)  # for decay
    progress, start = Progress(label, epochs, "epochs"), time.time()
    for epoch in range(1, epochs + 1):
        logs = {}
        modules.train()
        order = torch.randperm(n_rows, generator=generator, device=device)
        for rows in order.split(batch_size):
            loss, values = step(rows[rank()::world()] if len(rows) >= world() else rows, draws)
            done += 1
            value = loss.item()  # once: on a GPU each look at a number waits for the step
            if not math.isfinite(value):
                fail(f"{label}: the loss is {value} at step {done} (epoch {epoch}, {values}); "
                     f"lower --lr (now {lr}), or a weight that is huge")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            average_gradients(parameters)
            if decay:
                optimizer.param_groups[0]["lr"] = lr * (1 - (done - 1) / n_steps)
            optimizer.step()
            # weighted by size, so that a short last batch counts for less
            for name, mean in {**values, "loss": value}.items():
                logs[name] = logs.get(name, 0.0) + mean * len(rows)
        logs = {name: value / n_rows for name, value in logs.items()}
        if epoch % eval_every == 0 or epoch == epochs:
            score = torch.tensor(validate(), dtype=torch.float64, device=device)
            if world() > 1:  # process 0's for all: they must stop at the same epoch
                dist.broadcast(score, 0)
            score = score.item()
            if not math.isfinite(score):
                fail(f"{label}: the validation is {score} at epoch {epoch}; lower --lr (now {lr})")
            history.append({"epoch": epoch, "valid_ndcg@20": score, "seconds": time.time() - start,
                            **logs})
            if score > best:
                best, best_at, best_state = score, epoch, state_of(modules)
            if (epoch - best_at) // eval_every >= patience or stop and stop(history):
                epochs = progress.total = epoch  # stop below; Progress ends its line at the total
        shown = f"  valid NDCG@20 {best:.4f}" if history else ""  # not yet validated
        progress.update(epoch, f"loss {logs['loss']:.4f}{shown}")
        if epoch == epochs:
            break
    print(f"{label}: best valid NDCG@20 {best:.4f} at epoch {best_at} of {epoch}, "
          f"{time.time() - start:.0f} s", flush=True)
    restore(modules, best_state)
    return best_state, history


def best_epoch(history):
    """The row of fit's history with the best validation score: that of the state it restored."""
    return max(history, key=lambda row: row["valid_ndcg@20"])


def state_of(modules):
    """{prefix: module} -> {prefix.name: tensor}, copies, since training changes them in place."""
    return {name: value.clone() for name, value in nn.ModuleDict(modules).state_dict().items()}


def restore(modules, state):
    """Load {prefix.name: tensor} into {prefix: module}: the inverse of state_of."""
    nn.ModuleDict(modules).load_state_dict(
        {name: value for name, value in state.items() if name.split(".")[0] in modules})


def ranking_hits(model, pairs, seen, k):
    """Rank items for the users in held-out `pairs` (N, 2); model, seen, k: rank_unseen's -> users
    (n,); hits (n, k; I if I < k) bool, by rank: is the item in the user's pairs; relevant (n,):
    the number of the user's pairs; ranked (n, k): item ids, padded with -1."""
    relevant = torch.bincount(pairs[:, 0], minlength=model.n_users)
    users = relevant.nonzero()[:, 0]  # without a pair there is no metric
    ranked = rank_unseen(model, users, seen, k)  # (n, k)
    found = contains(pair_keys(pairs, model.n_items), users[:, None], ranked, model.n_items)
    # the key of the padding, -1, is that of the previous user's last item: hence ranked >= 0
    return users, found & (ranked >= 0), relevant[users], ranked


def ndcg(hits, relevant, k):
    """NDCG@k per user (Järvelin and Kekäläinen, 2002), binary gains, the ideal list cut at k:
    hits (n, k or more; I if I < k) bool, by rank, relevant (n,), at least 1 -> (n,) in [0, 1]."""
    discount = 1 / torch.log2(torch.arange(2, k + 2, device=hits.device).double())  # (k,)
    ideal = discount.cumsum(0)[relevant.clamp(max=k) - 1]
    return (hits[:, :k] * discount[: hits.shape[1]]).sum(1) / ideal


def validation(model, data, k=20, users=None):
    """-> validate(): the model's mean NDCG@k on data["valid"] (N, 2); items of data["train"] (N, 2)
    are not ranked. users: how many users to rank, the same ones at each call; None: all."""
    seen, pairs = user_rows(data["train"], model.n_users), data["valid"]
    everyone = pairs[:, 0].unique()
    some = torch.randperm(len(everyone), generator=torch.Generator().manual_seed(0))[:users]
    pairs = pairs[torch.isin(pairs[:, 0], everyone[some.to(pairs.device)])]

    def validate():
        _, hits, relevant, _ = ranking_hits(model, pairs, seen, k)
        return float(ndcg(hits, relevant, k).mean())

    return validate

# ==== 2. Further baselines: nothing here is needed for a LightGCN =================================
class NGCF(Backbone):
    """NGCF (Wang et al., SIGIR 2019), eq. 7: E' = LeakyReLU((A + I) E W1 + (A E ⊙ E) W2), with
    message dropout; layer 0 and the L2-normalised hops, concatenated: D = (n_layers + 1) * dim."""

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
        hops = [x := self.start()]
        for w1, w2 in zip(self.w1, self.w2):
            side = SymmetricMatmul.apply(self.adjacency, x)
            x = F.leaky_relu(w1(side + x) + w2(side * x), 0.2)
            x = F.dropout(x, self.message_dropout, self.training)
            hops.append(F.normalize(x, dim=1))
        return torch.stack(hops, 1).split([self.n_users, self.n_items])

    def pool(self, layers):
        return layers.flatten(-2)


class NeuMF(Backbone):
    """NeuMF (He et al., NCF, WWW 2017): GMF and MLP on half the embedding each, joined (eq. 12)."""
    def __init__(self, n_users, n_items, dim):
        if dim % 2:
            fail(f"--dim {dim}: neumf halves it; give an even number")
        super().__init__(n_users, n_items, dim)
        half = dim // 2
        self.mlp = nn.Sequential(nn.Linear(dim, half), nn.ReLU(), nn.Linear(half, half), nn.ReLU())
        self.out = nn.Linear(dim, 1, bias=False)
        nn.init.ones_(self.out.weight)  # equal weights, though the MLP's part is larger at first

    def score(self, users, items):
        users, items = torch.broadcast_tensors(users, items)
        (user_g, user_m), (item_g, item_m) = users.chunk(2, -1), items.chunk(2, -1)
        joined = torch.cat([user_g * item_g, self.mlp(torch.cat([user_m, item_m], -1))], -1)
        return self.out(joined)[..., 0]

    def score_all(self, users, items):
        # no inner product to rank by: score the catalogue in chunks of about 16 MiB at most
        chunk = max(1, 2**22 // max(1, len(users) * self.dim))
        return torch.cat([self.score(users[:, None], part[None]) for part in items.split(chunk)], 1)


def standardised(text):
    """Text vectors (I, H), I > 1 -> float32, mean 0 and deviation 1 per dimension (constant: 0)."""
    # a few dimensions of an LLM's hidden states are up to 50 times larger and would drown the rest
    text = text.float()
    return (text - text.mean(0)) / text.std(0).clamp(min=1e-3)


class TextVectors(nn.Module):
    """AlphaRec (Sheng et al., ICLR 2025): a two-layer MLP on frozen text vectors (I, H); a
    user's is the mean over the user's train items. forward() -> (U + I, dim), users first."""
    def __init__(self, text, train, n_users, dim):
        super().__init__()
        text = standardised(text)  # not in the paper, which takes texts as they are
        count = torch.bincount(train[:, 0], minlength=n_users).clamp(min=1)
        users = sum_of_rows(text, *train.T, n_users) / count[:, None]
        self.register_buffer("text", torch.cat([users, text]), persistent=False)  # (U + I, H)
        width = text.shape[1]
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.LeakyReLU(), nn.Linear(width, dim))

    def forward(self):
        return self.mlp(self.text)


BACKBONES = {"mf": MF, "lightgcn": LightGCN, "ngcf": NGCF, "neumf": NeuMF}


def build_backbone(name, n_users, n_items, dim, train, n_layers=3, cosine=False, text=None):
    """One of BACKBONES, on the device of `train` (N, 2). cosine: vectors of norm 1. text (I, H):
    start from its TextVectors. Raises SystemExit2 for neumf with an odd dim."""
    form, graph = BACKBONES[name], ()
    if form.propagates:
        graph = normalized_adjacency(train, n_users, n_items), n_layers
    model = form(n_users, n_items, dim, *graph)
    if text is not None:
        text = text.to(train.device)
        model.embedding, model.texts = None, TextVectors(text, train, n_users, dim)
    # so inner products are cosines in training, in ranking and from the file
    if cosine:
        model.register_forward_hook(lambda _, __, ends: [F.normalize(x, dim=-1) for x in ends])
    return model.to(train.device)

# ---- Samplers and sampled softmax ----------------------------------------------------------------
def popularity_widths(pairs, n_items, beta=0.75):
    """Widths for UnseenSampler in proportion to (train count + 1) ** beta (PNS: Mikolov et al.,
    2013): pairs (N, 2) -> int64 (I,), 2**40 in all; below 1 becomes 1, so that all are drawn."""
    # + 1 keeps an item without a train pair reachable; logarithms, so that nothing overflows
    count = torch.bincount(pairs[:, 1], minlength=n_items).double()
    return ((beta * (count + 1).log()).softmax(0) * 2**40).round().long().clamp(min=1)


@torch.no_grad()
def ahns(score, users, items, positives, candidates, alpha=0.1, beta=0.4, power=-2):
    """Adaptive hardness (Lai et al., AHNS, AAAI 2024, eq. 6): of M candidates, the one whose score
    is nearest to beta * (score(positive) + alpha) ** (power + 1), so that a high-scoring positive
    gets an easy negative, and vice versa. score, users (B, D), items (I, D), candidates (B, M): as
    for dns; positives (B,) -> item ids (B,). No gradient."""
    # of the authors' settings, the one that validates best (8-core of Toys & Games: .058; with the
    # 1 and .1 of their code: .052); power is a whole number, since the base can be negative
    target = beta * (score(users, take(items, positives)) + alpha) ** (power + 1)  # (B,)
    distance = score_candidates(score, users, items, candidates) - target[:, None]
    return candidates.gather(1, distance.abs().argmin(1, keepdim=True))[:, 0]  # (B, M) -> (B,)


def sampled_softmax_loss(positive_score, negative_scores, tau=1.0, row=None):
    """Softmax cross-entropy of positives (B,) against N negatives each: negative_scores (B, N), or
    (b, N) where positives share rows, row (B,) being each one's; -inf to leave one out
    (Jean et al., ACL 2015; for recommenders Wu et al., TOIS 2024) -> scalar."""
    # no logQ correction: for uniform draws it is one constant for every score, which cancels.
    # softplus(n - p) = -ln(exp(p) / (exp(p) + exp(n))), n being the negatives' logsumexp
    # the clamp: if all of a positive's negatives are left out, its loss and gradient are 0
    negative = (negative_scores / tau).clamp(min=-1e30).logsumexp(1)  # (B,) or (b,)
    negative = negative if row is None else take(negative, row)
    return F.softplus(negative - positive_score / tau).mean()


def own_among(drawn, users, rows, n_items):
    """Which of the distinct items `drawn` (n,) each of `users` (B,) has; rows: from user_rows
    -> places in `users` (m,) and in `drawn` (m,), together an index into a (B, n) table."""
    slot = torch.full((n_items,), -1, device=drawn.device)  # item -> its place in `drawn`
    slot[drawn] = torch.arange(len(drawn), device=drawn.device)
    row, own = rows_of(rows, users)
    among = slot[own] >= 0
    return row[among], slot[own[among]]


def make_softmax_step(model, pairs, *, reg, n, tau):
    """The step of --loss softmax for `fit`: n items, drawn each step without repeats, are the
    negatives of every row; L2 on the pair. tau: temperature -> step(rows (B,), generator)."""
    train_rows = user_rows(pairs, model.n_users)

    def step(rows, generator):
        u, i = pairs[rows].T
        user_vectors, item_vectors = model()
        # all rows share the negatives, and a user's rows their scores: one matrix product
        drawn = torch.randperm(model.n_items, generator=generator, device=u.device)[:n]
        users, row = u.unique(return_inverse=True)  # (b,), (B,)
        scores = model.score_all(take(user_vectors, users), take(item_vectors, drawn))  # (b, n)
        # not the user's own train items
        own = own_among(drawn, users, train_rows, model.n_items)
        scores = scores.index_put(own, scores.new_tensor(-torch.inf))
        # rank the positive above all of them; L2 leaves out the shared negatives
        positive = model.score(take(user_vectors, u), take(item_vectors, i))  # (B,)
        softmax = loss = sampled_softmax_loss(positive, scores, tau, row)
        if reg:
            ego_users, ego_items = model.ego()
            loss = loss + reg * l2_loss(take(ego_users, u), take(ego_items, i))
        return loss, {"softmax": softmax.item()}

    return step

# ---- Closed forms: computed from the train pairs, without training -------------------------------
# X (U, I) is the 0/1 matrix of the train pairs; a user's scores are the user's row of X times item
# weights W (I, I). CLOSED_FORMS: name -> its flags, in the order of its function's parameters, each
# with the values that validation chooses from if the flag is not given. RP3beta's exponents lie
# between 0 and 1; fewer neighbours (topk) remove the noise of rare items. idf (of users) and unit
# (of items) are weightings from the code of Ferrari Dacrema et al. (RecSys 2019)
TOPK = (0, 5, 10, 20, 50, 100, 200)  # 0: all
CLOSED_FORMS = {
    "pop": {}, "itemknn": {"shrink": (0.0, 20.0, 100.0, 300.0), "idf": (0, 1), "topk": TOPK},
    "rp3": {"rp3_alpha": (0.2, 0.4, 0.6, 0.8, 1.0), "rp3_beta": (0.0, 0.15, 0.3, 0.45, 0.6, 0.8),
            "unit": (0, 1), "topk": TOPK},
    # a coarse grid: a factor of three changes little, and 12,000 items take half a minute a value
    "ease": {"ridge": (10.0, 30.0, 100.0, 300.0, 1000.0)}}


class ItemWeights(nn.Module):
    """A recommender: score(u, i) = sum of W[j, i] over u's train items j. weight (I, I), dense or
    sparse CSR, or (1, I): alike for all users; train (N, 2)."""
    def __init__(self, weight, train, n_users):
        super().__init__()
        self.n_users, self.n_items, self.weight = n_users, weight.shape[1], weight
        self.train_rows = user_rows(train, n_users)

    def scores(self, users):
        if len(self.weight) == 1 < self.n_items:
            return self.weight.repeat(len(users), 1)
        return sum_of_rows(self.weight, *rows_of(self.train_rows, users), len(users))


def sum_of_rows(weight, place, items, n):
    """Row p of the result is the sum of weight[i] over all (p, i) in place, items (P,): rows_of's
    results, or the users and items of train pairs. weight (I, J), dense or CSR -> (n, J)."""
    one = torch.ones(len(items), device=items.device, dtype=weight.dtype)
    rows = sparse_csr(place, items, one, (n, len(weight)))
    if weight.layout == torch.sparse_csr and not torch.backends.mkl.is_available():
        rows, weight = rows.to_sparse_coo(), weight.to_sparse_coo()  # CSR x CSR needs MKL on a CPU
    return (rows @ weight).to_dense()


def popularity(pairs, n_users, n_items):
    """Each item's number of train pairs, the same for all users -> weights (1, I)."""
    return torch.bincount(pairs[:, 1], minlength=n_items).float()[None]


def co_occurrence(pairs, user_weight, n_items):
    """X' diag(user_weight (U,)) X; with weights of 1, the numbers of users that two items share ->
    its entries: row, column, value (n,). Raises SystemExit2 where it would not fit."""
    count = torch.bincount(pairs[:, 0], minlength=len(user_weight))
    if min(int((count**2).sum()), n_items**2) > 2**27:  # entries: 70 bytes each at item_knn's peak
        fail(f"{n_items} items: too many share users, the table would not fit; raise prepare's "
             f"--k-core, or leave out users with the most pairs (one has {int(count.max())})")
    (user, item), one = pairs.T, torch.ones(len(pairs), device=pairs.device)
    right = sparse_csr(user, item, one, (len(count), n_items)).to_sparse_coo()
    left = sparse_csr(item, user, user_weight[user], (n_items, len(count))).to_sparse_coo()
    product = torch.sparse.mm(left, right).coalesce()  # COO, as in sum_of_rows
    return *product.indices(), product.values()


def strongest(entries, by, topk):
    """The entries (row, column, value), (n,) each, that are above 0 and among the topk highest of
    their row (by 0) or column (by 1) -> the same three, in the same order. topk 0: all."""
    kept = entries[2].nonzero()[:, 0]
    if topk:
        group = entries[by]
        # by group, the highest first: two stable sorts, so that equal ones stay in their order
        kept = kept[entries[2][kept].argsort(descending=True, stable=True)]
        kept = kept[group[kept].argsort(stable=True)]
        count = torch.bincount(group[kept])
        before = (count.cumsum(0) - count)[group[kept]]
        kept = kept[torch.arange(len(kept), device=kept.device) - before < topk].sort().values
    return [part[kept] for part in entries]


def item_weights(row, column, value, n_items):
    """Entries (n,) by row, then column -> W, sparse CSR (I, I)."""
    # not by sparse_csr, which would sort once more, in twice the memory
    indptr = F.pad(torch.bincount(row, minlength=n_items).cumsum(0), (1, 0))
    return torch.sparse_csr_tensor(indptr, column, value, (n_items, n_items))


def item_knn(pairs, n_users, n_items, shrink=20.0, idf=0, topk=0):
    """ItemKNN (Sarwar et al., WWW 2001), cosine with shrinkage (Bell and Koren, ICDM 2007):
    W_ij = n_ij / (sqrt(n_i n_j) + shrink), n_ij users have both. idf: a user of n_u items counts
    as ln(I / (1 + n_u))^2 users, in n_i as well (TF-IDF). W_ii = 0. topk: neighbours kept for each
    scored item j. pairs (N, 2) -> sparse CSR (I, I)."""
    of_user = torch.bincount(pairs[:, 0], minlength=n_users).float()
    weight = (n_items / (1 + of_user)).log() ** 2 if idf else torch.ones_like(of_user)
    norm = torch.bincount(pairs[:, 1], weight[pairs[:, 0]], minlength=n_items).float().sqrt()
    row, column, shared = co_occurrence(pairs, weight, n_items)
    shared = shared * (row != column)  # an item is not its own neighbour
    value = shared / (norm[row] * norm[column] + shrink).clamp(min=1e-12)  # a user may weigh 0
    return item_weights(*strongest((row, column, value), 1, topk), n_items)


def rp3beta(pairs, n_users, n_items, alpha=0.4, beta=0.3, unit=0, topk=0):
    """RP3beta (Paudel et al., ACM TiiS 2017): a random walk user -> item -> user -> item with
    step probabilities to the power alpha, divided by the last item's popularity to the power beta:
    W_ij = n_i^-alpha (sum_u x_ui x_uj n_u^-alpha) n_j^-beta, W_ii = 0. Of each row i the topk
    highest stay (unit: scaled to sum 1), then of each column. pairs (N, 2) -> sparse CSR (I, I)."""
    # the first step's probability is the same for all of a user's items, so it is left out
    of_user = torch.bincount(pairs[:, 0], minlength=n_users).clamp(min=1).float()
    of_item = torch.bincount(pairs[:, 1], minlength=n_items).clamp(min=1).float()
    row, column, walks = co_occurrence(pairs, of_user**-alpha, n_items)
    value = of_item[row] ** -alpha * walks * of_item[column] ** -beta * (row != column)
    row, column, value = strongest((row, column, value), 0, topk)
    if unit:
        value = value / torch.bincount(row, value).float()[row]
    return item_weights(*strongest((row, column, value), 1, topk), n_items)


EASE_ITEMS = 23_170  # 4 GiB for a table in float64; at the peak there are two, plus co_occurrence's


def ease(pairs, n_users, n_items, ridge=200.0):
    """EASE (Steck, WWW 2019): the W that minimises ||X - X W||^2 + ridge ||W||^2, diagonal 0.
    With P = (X'X + ridge I)^-1: W_ij = -P_ij / P_jj (eq. 8). pairs (N, 2) -> dense (I, I). Raises
    SystemExit2 for more than EASE_ITEMS items, or a ridge too small to invert with."""
    if n_items > EASE_ITEMS:
        fail(f"ease: {n_items} x {n_items} weights would not fit into memory; take --backbone rp3")
    row, column, shared = co_occurrence(pairs, torch.ones(n_users, device=pairs.device), n_items)
    gram = torch.zeros(n_items, n_items, dtype=torch.float64, device=pairs.device)
    gram[row, column] = shared.double()
    # the largest row sum bounds X'X's eigenvalues; a ratio of 1e10 leaves 6 of float64's 16 digits
    if float(gram.sum(1).max()) > 1e10 * ridge:
        fail(f"--ridge {ridge:g}: is too small to solve with on this data; raise it")
    gram.diagonal().add_(ridge)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram, out=gram), out=gram)
    return inverse.div_(-inverse.diagonal().clone()).fill_diagonal_(0).float()

# ==== 3. The method ends here. What follows are programs, files, errors, processes ===============
def sized_to_data(data, batch_size=0, lr=0.0, epochs=0, m=0):
    """Batch size, lr, epochs and M; those given as 0 follow from N train pairs and I items."""
    # chosen by validation on two sets: MovieLens-100K (N 44,287, I 1,008: 2,048, 1e-3, M 8) and
    # full Toys & Games (124,813, 11,924: 16,384, 8e-3, M 32); elsewhere a rule of thumb
    n = len(data["train"])
    if not batch_size:
        # a step propagates over the whole graph: with a fixed batch size an epoch's time would grow
        # as N squared. So from 2**16 pairs on: a power of two, about N / 8, from 2**14 to 2**16
        batch_size = 2048 if n < 2**16 else 2 ** min(max(int(math.log2(n / 8)), 14), 16)
    # in proportion to the batch (Goyal et al., 2017), as far as Adam allows
    lr = lr or min(1e-3 * batch_size / 2048, 8e-3)
    # epochs x steps x N below 4e9: about an hour of LightGCN on two cores; but 10 epochs at least
    epochs = epochs or min(max(int(4e9 / (math.ceil(n / batch_size) * n)), 10), 200)
    # sqrt(I) / 4: the best of M has rank I / M on average, and the right rank grows with I.
    # 4 to 64: fewer give nothing hard, and to score more would take most of a step
    m = m or 2 ** min(max(round(math.log2(data["n_items"] ** 0.5 / 4)), 2), 6)
    return batch_size, lr, epochs, m


def pretrain(args):
    """Train one backbone with one sampler, or compute a closed form; write its file."""
    run, data = Path(args.run), load_data(args.run)
    out = run / output_name("--out", args.out, "backbones.py pretrain", ".safetensors")
    args.batch_size, args.lr, args.epochs, args.m = sized_to_data(
        data, args.batch_size, args.lr, args.epochs, args.m)
    if args.n > (args.m if args.sampler == "dns" and args.loss == "bpr" else 1):
        fail(f"--n {args.n}: is read by --sampler dns alone, and m is {args.m}; lower --n")
    # what the file depends on; one made with these settings and inputs is not made again
    closed, text, inputs = args.backbone in CLOSED_FORMS, None, ["data.safetensors"]
    if args.text_vectors:
        args.text_vectors = text_input(run, args.text_vectors)
        readings = load_texts(run, args.text_vectors, data)
        text = readings[len(readings) // 2]  # the middle layer's: most of the meaning
        inputs.append(args.text_vectors)
    settings = settings_of(args) | {"inputs": digests(run, *inputs)}
    if closed:  # no seed, no training: it reads its own constants alone
        names = ("command", "backbone", "inputs", *CLOSED_FORMS[args.backbone])
        settings = {name: settings.get(name) for name in names} | {"seed": None}
    if skip(out, settings, args.force):
        return
    # closed forms on a CPU: cuSPARSE may return zeros for sparse products as large as theirs
    device, start = start_processes("cpu" if closed else args.device), time.time()
    data |= {name: data[name].to(device) for name in ("train", "valid")}
    tensors, history = (compute_closed_form if closed else train_baseline)(args, data, text)
    if rank() == 0:  # several processes train together, one writes
        save_tensors(out, tensors, {"settings": settings, "history": history,
                                    "seconds": time.time() - start})
        print(f"wrote {out}")


def train_baseline(args, data, text):
    """Train for `pretrain`; text (I, H): AlphaRec's, else None -> tensors of the file, history."""
    torch.manual_seed(args.seed)
    train, sampler = data["train"], args.sampler
    model = build_backbone(args.backbone, data["n_users"], data["n_items"], args.dim, train,
                           args.layers, args.cosine, text)
    if args.loss == "softmax":
        step = make_softmax_step(model, train, reg=args.reg, n=args.shared, tau=args.tau)
    else:
        step = make_step(model, sampler, train, reg=args.reg, m=args.m, n=args.n, beta=args.beta)
    label = f"{args.backbone} {sampler if args.loss == 'bpr' else args.loss}"
    state, history = fit(
        {"backbone": model}, step, len(train), validation(model, data, users=args.eval_users),
        epochs=args.epochs, batch_size=args.batch_size, lr=args.lr, eval_every=args.eval_every,
        patience=args.patience, seed=args.seed, label=label)
    with torch.no_grad():
        users, items = model.eval()()
    if text is not None:  # of AlphaRec only the final vectors are kept; load_model reads them as MF
        state = {"backbone.embedding": torch.cat([users, items])}
    # load_model needs the parameters, everything else the final vectors
    return {**state, "user": users, "item": items}, history


def compute_closed_form(args, data, _):
    """A closed form for `pretrain`, from the data of load_data; constants that were not given are
    chosen by validation -> tensors of its file, history: a row for each choice tried."""
    start, name, history = time.time(), args.backbone, []
    shape = (data["train"], data["n_users"], data["n_items"])
    form = {"pop": popularity, "itemknn": item_knn, "rp3": rp3beta, "ease": ease}[name]
    form = functools.lru_cache(maxsize=1)(form)  # the last table alone: all would not fit
    # given constants stay, the others are searched: here, not in `tune`, since nothing is trained
    grid = {flag: [vars(args)[flag]] if flag in args else values
            for flag, values in CLOSED_FORMS[name].items()}

    @functools.cache  # each choice once
    def score_of(*constants):
        score = validation(ItemWeights(form(*shape, *constants), *shape[:2]), data)()
        # epoch 0, so that reports read it as any model's
        history.append({"epoch": 0, "valid_ndcg@20": score, "seconds": time.time() - start,
                        **dict(zip(grid, constants))})
        return score

    constants, score = line_search(score_of, grid)
    if "topk" in grid:  # search again from all neighbours, topk last: one search may miss them
        point = constants | {"topk": grid["topk"][0]}
        again = line_search(score_of, dict(reversed(grid.items())), point)
        constants, score = max((constants, score), again, key=lambda found: found[1])
    words = "".join(f", --{flag.replace('_', '-')} {value:g}" for flag, value in constants.items())
    print(f"{name}: valid NDCG@20 {score:.4f}{words}; {len(history)} tried, "
          f"{time.time() - start:.0f} s")
    weight = form(*shape, *constants.values())
    if weight.layout is torch.strided:
        return {"weight": weight}, history
    # a file holds dense tensors: the three parts of a CSR
    return {"indptr": weight.crow_indices(), "column": weight.col_indices(),
            "value": weight.values()}, history


def line_search(score_of, grid, point=None):
    """Coordinate ascent from a `point` of the grid {name: values in order}, by default its middle:
    take the best value of one name at a time until none improves -> (point {name: value}, score).
    score_of(*values of a point) should be cached, since points recur."""
    point = point or {name: values[(len(values) - 1) // 2] for name, values in grid.items()}
    before = None
    while point != before:
        before = point
        for name in reversed(grid):  # topk, the last, goes first: otherwise it ends up worse
            point = max((point | {name: value} for value in grid[name]),
                        key=lambda tried: score_of(*tried.values()))
    return point, score_of(*point.values())

# ---- The files of a run: data, models, texts, generated negatives --------------------------------
def load_data(run):
    """data.safetensors -> a dict: train, valid, test (N, 2); n_users, n_items; digest; settings."""
    tensors, meta = load_tensors(Path(run) / "data.safetensors")
    return {**tensors, **{key: meta[key] for key in ("n_users", "n_items", "digest", "settings")}}


def load_model(path, data):
    """A backbone or closed form from its file, on the device of data["train"] -> (model in eval
    mode, meta, all tensors). SystemExit2 for other files, or if their split has changed."""
    # a closed form's file has item weights, dense or as the parts of a CSR; a backbone's its state
    tensors, meta = load_tensors(path, data["train"].device)
    s, shape = meta["settings"], (data["n_users"], data["n_items"])
    if "indptr" in tensors:
        parts = [tensors[name] for name in ("indptr", "column", "value")]
        tensors["weight"] = torch.sparse_csr_tensor(*parts, shape[1:] * 2)
    if "weight" in tensors:
        return ItemWeights(tensors["weight"], data["train"], shape[0]).eval(), meta, tensors
    if s.get("command") not in ("pretrain", "train"):
        fail(f"{path}: holds what `{s.get('command')}` writes, not a trained recommender; name one")
    # AlphaRec's file has its final vectors alone
    name = "mf" if s["command"] == "pretrain" and s.get("text_vectors") else s["backbone"]
    model = build_backbone(name, *shape, tensors["backbone.embedding"].shape[1], data["train"],
                           s["layers"], s.get("cosine", False))
    restore({"backbone": model}, tensors)
    return model.eval(), meta, tensors


def load_texts(run, name, data):
    """Vectors of the items' texts, from `llm_negatives.py read` or the user's own file -> float32
    (I, H) per layer, on the device of data["train"]. Raises SystemExit2 for a bad shape or NaN."""
    path, n_items = Path(run) / text_input(run, name), data["n_items"]
    try:  # readings of another catalogue, and damaged ones, are refused
        made = read_header(path).get("settings", {}).get("command")  # None: a file of one's own
        tensors = load_tensors(path)[0] if made else load_file(path)
    except (SafetensorError, OSError) as error:
        fail(f"{path}: cannot be read as safetensors ({error}); name another file")
    wrong = [f"{key} is {tuple(text.shape)}" for key, text in tensors.items()
             if text.ndim != 2 or len(text) != n_items or not text.shape[1]]
    if wrong or not tensors or made not in (None, "read"):
        fail(f"{path}: {[*wrong, 'holds no texts'][0]}, not ({n_items}, width) of `read` or yours")
    check_finite(path, tensors, "fix that row")
    names = sorted(tensors, key=lambda name: (len(name), name))  # layer2 before layer10
    return [tensors[name].float().to(data["train"].device) for name in names]


def text_input(run, name):
    """A file of texts as named in settings["inputs"]: outside the run folder by its whole path.
    Raises SystemExit2 when it is in neither place."""
    if (Path(run) / name).exists():
        return name
    if not Path(name).exists():
        command = writer_of(Path(run) / (name if name.startswith("texts") else "texts.safetensors"))
        fail(f"--text-vectors {name}: no such file, in {run} or here; make it with `{command}`")
    return str(Path(name).resolve())


SHARD_USERS = 1024  # users per shard of generated negatives: a killed run loses one shard at most


def shards(name, n_users):
    """The file names of a set of generated negatives, a shard for each SHARD_USERS users."""
    output_name("--negatives", name, "llm_negatives.py generate", word="negatives")
    return [f"{name}-{k:05d}.safetensors" for k in range(-(-n_users // SHARD_USERS))]


def load_negatives(run, name, data):
    """Generated negatives, joined from their shards -> a dict: pairs (n, 2), hidden (n, H) f16,
    vector (n, d) f16; cf, the name of the CF model's file. Raises SystemExit2 for a missing shard,
    or one made with other settings."""
    # all shards or an error: training would not notice that a block of users lacks its vectors
    paths = [Path(run) / shard for shard in shards(name, data["n_users"])]
    parts, metas = zip(*(load_tensors(path) for path in paths))
    for path, meta in zip(paths, metas):
        if meta["settings"] != metas[0]["settings"]:
            fail(f"{path}: was made with other settings than {paths[0].name}; run "
                 f"`{writer_of(path)} --force`")
    joined = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    # inputs, in order: data, fine-tuning, CF model, profiles; `vector` is in the CF model's space
    return {**joined, "cf": list(metas[0]["settings"]["inputs"])[2]}


def row_of(rows, raw, flag, path):
    """The number of the row with this raw id. Raises SystemExit2 naming the flag if none has it."""
    row = next((n for n, row in enumerate(rows) if row["raw"] == raw), None)
    if row is None:
        fail(f"{flag} {raw}: no such id in {path} (for example {rows[0]['raw']})")
    return row

# ---- Lineage: each file names its settings and the digests of what it was made from --------------
def save_tensors(path, tensors, meta, remedy="lower --lr and run again"):
    """Save {name: tensor}, all finite or SystemExit2, and a JSON-able dict `meta` in the header."""
    # meta["settings"]: the `command` that writes the file, its flags, and `inputs`, the digests of
    # all it is made from; meta["beside"] (optional): those of what was written with it
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    check_finite(path, tensors, f"nothing was written; {remedy}")
    meta = json.loads(json.dumps(meta))  # a copy, as it will be read back: tuples become lists
    # the digest covers settings and tensors, not times: the same result has the same digest
    meta["digest"] = digest_of_tensors(meta, tensors)
    meta["checksum"] = json_digest(meta)
    write_atomic(path, save(tensors, metadata={"hnlmrec": json.dumps(meta)}))


def load_tensors(path, device="cpu"):
    """Read ({name: tensor}, meta) back. Raises SystemExit2 when the file is missing, not ours or
    damaged, or when a file that it was made from has changed since."""
    meta, tensors = read_meta(path, check=True), load_file(path)
    if digest_of_tensors(meta, tensors) != meta["digest"]:
        fail(f"{path}: its bytes are not as written; delete it and run `{writer_of(path)}` again")
    return {name: tensor.to(device) for name, tensor in tensors.items()}, meta


def read_header(path):
    """The metadata of a safetensors file of ours, {} of any other file."""
    try:
        with safe_open(str(path), framework="pt") as file:
            return json.loads((file.metadata() or {})["hnlmrec"])
    except (SafetensorError, KeyError, ValueError, OSError):
        return {}


def read_meta(path, check=False):
    """The metadata of one of our files, checked as in load_tensors. check: check its inputs too."""
    if not Path(path).exists():
        fail(f"{path}: no such file; make it with `{writer_of(path)}`")
    meta = read_header(path)
    if meta.pop("checksum", None) != json_digest(meta):
        fail(f"{path}: is damaged or not ours; name another, or delete it and run "
             f"`{writer_of(path)}` again")
    if check:
        check_inputs(path, made_from(meta))
    return meta


def made_from(meta):
    """{name: digest} of what a file was made from, and of what was written beside it."""
    return meta.get("settings", {}).get("inputs", {}) | meta.get("beside", {})


def digests(run, *names):
    """{name: digest} of files of a run, for settings["inputs"]. SystemExit2 for one not there."""
    # our tensor files have theirs in the header; a name such as `negatives` is a set of shards
    found, run = {}, Path(run)
    for name in names:
        path = run / name
        parts = files_of(path)
        if parts != [path]:
            found[name] = json_digest(digests(run, *(part.name for part in parts)))
        elif path.is_file():
            meta = read_header(path)
            found[name] = meta.get("digest") or file_digest(path)
            # another run's train pairs may be test pairs here
            split = meta.get("settings", {}).get("inputs", {}).get("data.safetensors")
            if split and run_of(path).resolve() != run.resolve() and split != digests(
                    run, "data.safetensors")["data.safetensors"]:
                fail(f"{path}: was made from the pairs of another run; name one that was made here")
        else:
            fail(f"{path}: no such file; make it with `{writer_of(path)}`")
    return found


def files_of(path):
    """[path]; for a set of generated negatives its shards: those that exist, else the first."""
    if not path.name.startswith("negatives") or path.suffix in (".safetensors", ".jsonl"):
        return [path]
    first = [path.with_name(name) for name in shards(path.name, 1)]  # refuses all but a plain name
    return sorted(path.parent.glob(f"{path.name}-{'[0-9]' * 5}.safetensors")) or first


def run_of(path):
    """The run folder of a file: its own, or the one that its compare/ or adapter/ lies in."""
    folder = Path(path).parent
    inside = re.match("compare$|adapter", folder.name)
    return folder.parent if inside and not (folder / "data.safetensors").exists() else folder


def check_inputs(path, inputs):
    """Raise SystemExit2 unless everything `path` was made from, {name: digest}, is unchanged."""
    run = run_of(path)
    for name, digest in inputs.items():
        if digests(run, name)[name] != digest:
            fail(f"{path}: was made with another {name} than the one that is there; "
                 f"put the former back, or run `{writer_of(path)} --force`")
        # then the inputs' own inputs, if they exist: a judge is stale once its texts have changed
        for file in files_of(run / name):
            older = made_from(read_header(file)).items()
            check_inputs(file, {one: digest for one, digest in older
                                if files_of(run_of(file) / one)[0].exists()})


def skip(path, settings, force=False):
    """True when `path` was made with exactly these settings, `inputs` included. Raises SystemExit2
    if it was made by another command or, unless force, with other settings."""
    # so that nothing stale is used, and nothing is overwritten unasked
    path, new = Path(path), json.loads(json.dumps(settings))
    if not path.exists():
        return False
    meta = read_meta(path)
    old = meta["settings"]
    if old.get("command") != new.get("command"):
        fail(f"{path}: holds what `{old.get('command')}` writes; choose another name")
    if path.resolve() in [(run_of(path) / name).resolve() for name in new.get("inputs", ())]:
        fail(f"{path}: is one of its own inputs; choose another name")
    if force:
        return False
    # compare the inputs by name only: load_tensors, below, has a message for changed ones
    old, new = ({**each, "inputs": sorted(each.get("inputs", {}))} for each in (old, new))
    differ = [f"{key}={old.get(key)}, now {new.get(key)}" for key in sorted({**old, **new})
              if old.get(key) != new.get(key)]
    if differ:
        fail(f"{path}: made with {'; '.join(differ)}; run `{writer_of(path)} --force` to remake it")
    for name in meta.get("beside", {}):
        if not (path.parent / name).exists():
            print(f"{path.parent / name} is gone: making it and {path.name} again")
            return False
    load_tensors(path)  # for its checks: inputs and bytes must be unchanged
    print(f"skip: {path} is up to date")
    return True


def settings_of(args, *others):
    """The flags that decide what a step writes: without run, out, force, device and `others`."""
    left_out = ("run", "out", "force", "device", *others)
    return {name: value for name, value in vars(args).items() if name not in left_out}


def digest_of_tensors(meta, tensors):
    """16 hex digits of the settings, what was written beside, and all tensors."""
    digest = hashlib.sha256(json_digest([meta["settings"], meta.get("beside")]).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def json_digest(value):
    """16 hex digits of a JSON-able value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def file_digest(path):
    """The first 16 hex digits of a file's sha256, cached: many files have the same input."""
    stat = os.stat(path)
    return digest_as_of(path, stat.st_mtime_ns, stat.st_size)


@functools.lru_cache(maxsize=64)  # by path, time and size: a changed file is read again
def digest_as_of(path, *_):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()[:16]


def check_finite(path, tensors, remedy):
    """Raise SystemExit2, naming file, tensor and place, when a value is NaN or infinite."""
    for name, tensor in tensors.items():
        if len(bad := (~torch.isfinite(tensor)).nonzero()):
            fail(f"{path}: {name}{bad[0].tolist()} is NaN or infinite; {remedy}")


# the first word of a file's name -> the command that writes it; for models see writer_of
WRITERS = {
    "data": "hnlmrec.py prepare", "items": "hnlmrec.py prepare", "users": "hnlmrec.py prepare",
    "profiles": "llm_negatives.py profile", "sft": "llm_negatives.py finetune",
    "adapter": "llm_negatives.py finetune", "negatives": "llm_negatives.py generate",
    "texts": "llm_negatives.py read", "judge": "hnlmrec.py judge", "report": "eval.py report",
    "metrics": "eval.py report", "compare": "eval.py compare", "tuned": "eval.py tune"}


def writer_of(path):
    """The command that writes a file of a run, for messages; … for flags that only users know."""
    run = run_of(path)
    name = Path(path).relative_to(run).parts[0]  # of a file in a folder, the folder's
    stem = re.sub(r"(-\d{5})?(\.partial)?\.\w+$", "", name)
    first = re.split("[-.]", stem)[0]
    command = WRITERS.get(first)
    if not command:  # a model's header says what wrote it; if it is missing, its name tells
        guess = "blend" if "full" in stem else "train" if re.search("hnlmrec|judged", stem) else ""
        made = read_header(path).get("settings", {}).get("command", guess)
        command = f"hnlmrec.py {made}" if made in ("train", "blend") else "backbones.py pretrain"
    # how a command is told the name, where it is not by --out FILE
    flags = {"finetune": f" --name sft{stem.removeprefix(first)}", "generate": f" --out {stem}",
             "prepare": "", "report": "", "compare": "", "tune": ""}
    flag = flags.get(command.split()[1], f" --out {name}")
    return f"python {command} --run {shlex.quote(str(run))} …{flag}"


def output_name(flag, name, command, suffix="", word=""):
    """`name`, if `command` may write a file of that name. Else SystemExit2, naming `flag`."""
    # a plain name, or one in compare/; its first word is `word`, if given, and no other command's
    plain = name.removeprefix("compare/") if suffix == ".safetensors" else name
    first, dot = re.split("[-.]", plain)[0], "." if suffix else ""  # sft.partial is another file
    if not re.fullmatch(rf"\w[\w{dot}-]*{re.escape(suffix)}", plain) or word not in ("", first):
        fail(f"{flag} {name!r}: give a plain name (a-z, 0-9, -_.), such as {word or 'x'}-2{suffix}")
    if plain == name and (owner := WRITERS.get(first.lower(), command)) != command:
        fail(f"{flag} {name}: {first} names files of `python {owner}`; choose another")
    return name


def read_jsonl(path):
    """All rows of a JSON-lines file. Raises SystemExit2 for a missing file or a broken line."""
    if not Path(path).exists():
        fail(f"{path}: no such file; make it with `{writer_of(path)}`")
    # "\n" alone ends a line: splitlines() would cut texts at other characters
    lines, rows = Path(path).read_bytes().decode(errors="replace").removesuffix("\n"), []
    for n, line in enumerate(lines.split("\n"), 1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            fail(f"{path}: line {n} is not whole; delete the file, run `{writer_of(path)}` again")
    return rows


def write_atomic(path, data):
    """Write bytes to a temporary name, then rename: a reader sees the old file or the new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")  # a fixed name: killed runs leave one file
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        error.filename = str(path)  # a full disk's error names no file
        raise
    finally:
        temporary.unlink(missing_ok=True)

# ---- Errors, output, progress --------------------------------------------------------------------
class SystemExit2(SystemExit):
    """A SystemExit with a one-line message; status 2 by run_cli, 1 in other people's programs."""
    def __init__(self, message):
        self.message = " ".join(str(message).split())
        super().__init__(self.message)


def fail(message):
    """Raise SystemExit2: one line on standard error, and under run_cli status 2."""
    raise SystemExit2(message)


class Output(io.FileIO):
    """Standard output; once the pipe is closed or the disk full, it drops the rest silently."""
    def write(self, data):
        with contextlib.suppress(OSError):
            return super().write(data)
        return len(data)


def run_cli(main):
    """Run `main()` as a program: known errors end in a line and status 2, Ctrl-C, kill in 130."""
    # what the terminal cannot show is escaped; where output is closed, sys.stdout is None
    sys.stdout = io.TextIOWrapper(
        io.BufferedWriter(Output(1, "w", closefd=False)), sys.stdout.encoding, "backslashreplace",
        line_buffering=True) if sys.stdout else open(os.devnull, "w")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # glibc returns freed blocks of a few MiB to the system at once, and each step gets them back
    # page by page. Keeping 1 GiB saves a quarter of a DNS step, a third of one with L_false
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt:
        mallopt(-1, 2**30)  # M_TRIM_THRESHOLD
        mallopt(-3, 2**25)  # M_MMAP_THRESHOLD, its highest value
    try:
        if {"", "--run="} & {*sys.argv}:  # from a shell variable that is not set
            fail("an argument is empty; give it a value or leave it out")
        main()
        if world() > 1:
            dist.barrier()
        # leave now: Python takes half a second to take torch apart, and gloo's threads race it
        # (torch 2.13 aborts, 2.6 hangs)
        sys.stdout.flush()
        os._exit(0)
    except SystemExit2 as error:
        message = error.message
    except KeyboardInterrupt:
        print("\nstopped; finished steps are kept; run the same command to resume", file=sys.stderr)
        sys.exit(130)
    except OSError as error:  # a full disk, an unwritable folder: the old file is untouched
        message = f"{error.filename or 'output'}: {error.strerror or error}; fix that, run it again"
    except (RuntimeError, MemoryError) as error:
        if not re.search("out of memory|alloc|ALLOC|MemoryError", repr(error)):
            raise
        message = "out of memory; lower --batch-size, --micro-pairs, --m, --k or --dim"
    print(f"error: {message}", file=sys.stderr, flush=True)
    if world() > 1:
        os._exit(2)
    sys.exit(2)


class Progress:
    """Rate and time left: one rewritten line on a terminal, a line every 20 seconds in a file."""
    def __init__(self, label, total, unit):
        self.label, self.total, self.unit = label, total, unit
        self.shown, self.first, self.tty = time.time(), None, sys.stdout.isatty()

    def update(self, done, extra=""):
        now = time.time()
        if self.first is None:  # what a resumed run finds finished says nothing about speed
            self.first = (done, now)
            return
        if done < self.total and now - self.shown < (0.2 if self.tty else 20):
            return
        self.shown, rate = now, (done - self.first[0]) / max(now - self.first[1], 1e-9)
        line = f"{self.label} {done}/{self.total} {self.unit}  {rate:.1f}/s  "
        line += f"{(self.total - done) / max(rate, 1e-9):.0f} s left  {extra}".rstrip()
        # a line wider than the terminal would not be rewritten
        width = max(10, shutil.get_terminal_size().columns - 1)
        print(f"\r{line[:width]:{width}}" if self.tty else line, flush=True,
              end="\n" if not self.tty or done >= self.total else "")

# ---- Processes of torchrun -----------------------------------------------------------------------
def start_processes(device):
    """-> the device of this process: `device`; for cuda under torchrun, its own GPU."""
    if os.environ.get("WORLD_SIZE", "") in ("", "0", "1") or world() > 1:  # alone, or started
        return device
    # without torchrun no other process would come, and this one would wait in vain
    numbers = [os.environ.get(name, "") for name in ("RANK", "LOCAL_RANK", "MASTER_PORT")]
    if "TORCHELASTIC_RUN_ID" not in os.environ or not all(map(str.isdecimal, numbers)):
        fail("WORLD_SIZE: is set, but torchrun did not start this; unset it, or run `torchrun "
             "--nproc-per-node N -- SCRIPT …`")
    if device != "cpu":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        if int(os.environ["LOCAL_RANK"]) >= torch.cuda.device_count():
            fail("--device: torchrun started more processes than there are GPUs; lower its "
                 "--nproc-per-node")
        torch.cuda.set_device(device)
    # processes wait for each other in C++, where Python's handlers do not run: signals end them
    for which in (signal.SIGINT, signal.SIGTERM):
        signal.signal(which, signal.SIG_DFL)
    if os.environ["RANK"] != "0":
        sys.stdout = io.StringIO()  # process 0 alone prints
    print(f"waiting for {os.environ['WORLD_SIZE']} processes", flush=True)
    # a week: at the end all wait for the one with the longest work; if one dies, torchrun ends all
    dist.init_process_group("gloo" if device == "cpu" else "nccl", timeout=timedelta(days=7),
                            device_id=None if device == "cpu" else torch.device(device))
    return device


def rank():
    """This process's number, from 0."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world():
    """The number of processes that share the work."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def average_gradients(parameters):
    """Average each gradient over all processes, in place, as DistributedDataParallel does."""
    for p in parameters if world() > 1 else ():
        # another process's rows may reach parameters that these do not: all take part, or it hangs
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        dist.all_reduce(p.grad)
        p.grad /= world()

# ---- Command line --------------------------------------------------------------------------------
def number(kind, low, high=None, open_low=False):
    """An argparse type: a finite number of `kind` in [low, high], with open_low in (low, high]."""
    high = (2**31 - 1 if kind is int else math.inf) if high is None else high

    def parse(text):
        with contextlib.suppress(ValueError):
            value = kind(text)
            if low <= value <= high and math.isfinite(value) and (value > low or not open_low):
                return value
        raise argparse.ArgumentTypeError(
            f"{text} is outside {'[('[open_low]}{low}, {high}], not finite or not of type "
            f"{kind.__name__}")

    return parse


class Parser(argparse.ArgumentParser):
    """argparse with defaults in --help, no abbreviations, one line and status 2 on a bad flag."""
    def __init__(self, **kwargs):
        super().__init__(**kwargs, allow_abbrev=False,
                         formatter_class=argparse.ArgumentDefaultsHelpFormatter)

    def error(self, message):
        fail(f"{message} (see `python {self.prog} --help`)")


def add_flags(parser, *rows):
    """Flags that take a value: rows (flag, argparse type, default, help)."""
    for flag, kind, default, text in rows:
        parser.add_argument(flag, type=kind, default=default, help=text)


def add_run_flags(parser, out=None, device=True):
    """The flags of every step that makes a file of a run, by default `out`, on a device."""
    parser.add_argument("--run", required=True, metavar="DIR", help="folder of the run")
    parser.add_argument("--force", action="store_true", help="remake this command's output")
    if out:
        parser.add_argument("--out", default=out, help="output file inside the run folder")
    if device:
        # device_count() also counts GPUs whose driver is too old for this torch
        gpus = [f"cuda:{n}" for n in range(torch.cuda.is_available() and torch.cuda.device_count())]
        devices = ["cuda", *gpus, "cpu"] if gpus else ["cpu"]
        parser.add_argument("--device", choices=devices, default=devices[0],
                            help="device to compute on, of those PyTorch sees")


def add_training_flags(parser, out, more=(), **sampler):
    """The flags of baselines and HNLMRec. more: choices of --backbone; sampler: for --sampler."""
    group = parser.add_argument_group("backbone and training budget")
    group.add_argument("--backbone", choices=[*BACKBONES, *more], default="lightgcn", help="model")
    group.add_argument("--sampler", choices=SAMPLERS, help="negative sampler of e_j", **sampler)
    add_flags(
        group, ("--dim", number(int, 2), 64, "embedding width d"),
        ("--layers", number(int, 1), 3, "propagation layers of lightgcn and ngcf"),
        ("--epochs", number(int, 0), 0, "passes over train pairs; 0: 200, fewer for large data"),
        ("--batch-size", number(int, 0), 0, "pairs per step; 0: 2048, up to 65,536 for large data"),
        ("--lr", number(float, 0), 0.0, "of Adam; 0: 1e-3 x batch size / 2048, at most 8e-3"),
        ("--reg", number(float, 0), 1e-4, "weight of the L2 term, lambda2"),
        ("--eval-every", number(int, 1), 5, "epochs between validations"),
        ("--eval-users", number(int, 1), None, "users ranked per validation; if left out, all"),
        ("--patience", number(int, 1), 6, "validations without a new best before stopping"),
        ("--seed", number(int, 0), 0, "decides initial weights, batches and negatives"),
        ("--m", number(int, 0, 2**16), 0, "candidates of dns, mixgcf, ahns; 0: by number of items"))
    add_run_flags(parser, out)


def add_band_flags(group):
    """The flags of mining_band, which fine-tuning and HNLMRec's training share."""
    for name, share in zip(("first", "last"), BAND):
        text = f"{name} rank of the mined band; 0: {100 * share:.4g} %% of the catalogue"
        add_flags(group, (f"--mine-{name}", number(int, 0), 0, text))


def main(argv=None):
    parser = Parser(prog="backbones.py", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("pretrain", help="train a backbone, or compute a closed form")
    add_training_flags(p, "cf.safetensors", (*CLOSED_FORMS, "closed"), default=["rns"], nargs="+")
    p.add_argument("--loss", choices=["bpr", "softmax"], default="bpr", help="softmax: no sampler")
    p.add_argument("--cosine", action="store_true", help="softmax of cosines: vectors of norm 1")
    p.add_argument("--text-vectors", metavar="FILE", help="AlphaRec: texts.safetensors or your own")
    add_flags(
        p, ("--n", number(int, 1), 1, "dns draws from the n highest of its m candidates"),
        ("--beta", number(float, 0, 2), 0.75, "popularity exponent of pns"),
        ("--shared", number(int, 1), 256, "softmax's negatives, the same for all of a batch"),
        ("--tau", number(float, 0, open_low=True), 0.2, "softmax's temperature"))
    unset = argparse.SUPPRESS  # not among the args, so not among the settings either
    add_flags(
        p.add_argument_group("closed forms (pop, itemknn, rp3, ease; closed: all), which read "
                             "no training flag; what is left out is chosen by validation"),
        ("--shrink", number(float, 0), unset, "itemknn: added to the denominator of the cosine"),
        ("--idf", number(int, 0, 1), unset, "itemknn: 1: users with few items count more"),
        ("--rp3-alpha", number(float, 0), unset, "rp3: exponent of the transition probabilities"),
        ("--rp3-beta", number(float, 0), unset, "rp3: exponent of the popularity taken out"),
        ("--unit", number(int, 0, 1), unset, "rp3: 1: each history item's weights sum to 1"),
        ("--topk", number(int, 0), unset, "itemknn, rp3: neighbours of each item; 0: all"),
        ("--ridge", number(float, 0, open_low=True), unset, "ease: weight of its L2 term, lambda"))
    args = parser.parse_args(argv)
    closed = args.backbone == "closed"
    if args.backbone in CLOSED_FORMS:
        args.sampler = args.sampler[:1]  # not read: one model
    several = closed or len(args.sampler) > 1
    if several and args.out != "cf.safetensors":
        fail(f"--out {args.out}: several models go to model-NAME.safetensors; leave it out")
    if args.backbone in CLOSED_FORMS and args.out == "cf.safetensors":
        fail(f"--backbone {args.backbone}: has no vectors for cf.safetensors; give another --out")
    if args.loss == "softmax" and args.sampler != p.get_default("sampler"):
        fail("--sampler: --loss softmax draws uniformly and makes one model; leave it out")
    products = BACKBONES.get(args.backbone, Backbone).score is Backbone.score
    if args.cosine and not (products and args.loss == "softmax"):
        fail("--cosine: needs --loss softmax, and mf, lightgcn or ngcf, whose scores are products")
    for flag in set().union(*CLOSED_FORMS.values()) - {*CLOSED_FORMS.get(args.backbone, ())}:
        if flag in args:
            fail(f"--{flag.replace('_', '-')}: {args.backbone} has no such constant; leave it out")
    reads = args.sampler if args.loss == "bpr" else [args.loss]
    for flag, reader in (("beta", "pns"), ("tau", "softmax"), ("shared", "softmax")):
        if getattr(args, flag) != p.get_default(flag) and set(reads) != {reader}:
            fail(f"--{flag}: is read by {reader} alone; leave it out")
    if args.text_vectors and not (products and args.backbone in BACKBONES):
        fail(f"--text-vectors: is not for {args.backbone}; leave it out")
    # several models in one Python process; `closed` leaves out forms that refuse large data
    for name in CLOSED_FORMS if closed else args.sampler:
        out = f"model-{name}.safetensors" if several else args.out
        one = {"backbone" if closed else "sampler": name, "out": out}
        try:
            pretrain(argparse.Namespace(**vars(args) | one))
        except SystemExit2 as error:
            if not closed or "would not fit" not in error.message:
                raise
            if args.force:  # an older file may have been made from other data
                (Path(args.run) / out).unlink(missing_ok=True)
            print(f"{name}: left out, since {error.message}")


if __name__ == "__main__":
    run_cli(main)
