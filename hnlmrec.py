"""hnlmrec.py: the data, and the recommender trained with the LLM's negatives and its judge.

prepare   raw ratings and item metadata -> data.safetensors (train, valid, test), items.jsonl,
          users.jsonl
train     data + cf.safetensors + negatives-*.safetensors (+ judge.safetensors for L_false)
          -> model-hnlmrec.safetensors: backbone and projector, trained with
              z   = MLP(self-attention over K generated vectors of the user)   the projector
              e⁻  = alpha z + (1 - alpha) e_j, j a sampled item                mixing, z detached
              L   = BPR(e_u, e_i, e⁻) + lambda1 L_align(z; e_i, mined)
                    + lambda_s L_sem(e_u, e_i; LLM texts)
                    + lambda_f L_false(e_u; e_i > e_f > e⁻, f likely false)
                    + lambda2 ‖Θ‖²                                             HNLMRec
          and with --paper as the paper has it: PaperHNLMRec
blend     a trained model + judge.safetensors (+ further models, closed forms among them)
          -> model-hnlmrec-full.safetensors: all in one score, each in standard deviations of the
          user's scores, weights by validation
trace     prints one (user, item) pair's way from the raw line to the gradient, with the values of a
          finished run

The method comes first, then train, blend and trace, then prepare and the readers of its files.

Alone:  python hnlmrec.py prepare --run runs/NAME --reviews ratings.tsv --meta items.tsv
        python hnlmrec.py train --run runs/NAME
"""

import ast
import csv
import gzip
import html
import html.entities
import json
import math
import re
import time
import unicodedata
import zlib
from argparse import Namespace
from array import array
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from datetime import datetime, timezone
from functools import partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from backbones import (
    KERNEL,
    MF,
    Blended,
    HistoryKernel,
    ItemWeights,
    Parser,
    add_band_flags,
    add_training_flags,
    bpr_loss,
    build_backbone,
    check_finite,
    contains,
    end_processes,
    fail,
    file_digest,
    fit,
    kernel_of,
    l2_loss,
    leave_out,
    load_data,
    load_model,
    load_negatives,
    load_tensors,
    make_sampler,
    mine_hard_negatives,
    mining_band,
    ndcg,
    nearest_items,
    number,
    output_name,
    pair_keys,
    rank,
    read_jsonl,
    read_text_vectors,
    restore,
    row_of,
    run_cli,
    save_tensors,
    settings_of,
    share_of,
    share_weight,
    sized_to_data,
    stamp,
    start_processes,
    sum_of_train_items,
    take,
    top_k,
    up_to_date,
    user_rows,
    validation,
    whiten,
    write_atomic,
)

# --------------------------------------------------------------------------------------------------
# The method: a projector brings what the LLM generated into the recommender's space; mixing and
# alignment train with it
# --------------------------------------------------------------------------------------------------

class Projector(nn.Module):
    """Self-attention over the K generated vectors of one user, then an MLP into the recommender's
    space (paper, stage 2).

    forward: generated vectors (B, K, H) -> z (B, D), the projection of slot 0, informed by the
    other K - 1.

    sample_hidden (n, H): any generated vectors of the kind that forward will see, n at least 2.
    Only their mean and standard deviation are kept, with which the LLM's hidden states, of which a
    few dimensions dwarf the rest, are standardised. dim: D. attention=False leaves the MLP alone
    (an ablation)."""

    def __init__(self, sample_hidden, dim, width=128, attention=True):
        super().__init__()
        self.register_buffer("mean", sample_hidden.float().mean(0))
        self.register_buffer("std", sample_hidden.float().std(0).clamp(min=1e-3))
        self.inward = nn.Linear(sample_hidden.shape[1], width)
        self.query = self.key = self.value = None
        if attention:
            self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, dim))

    def forward(self, hidden):
        return self.attend(self.read(hidden))

    def read(self, hidden):
        """(…, H) -> (…, W), one vector at a time."""
        return self.inward((hidden.float() - self.mean) / self.std)

    def attend(self, x):
        """(B, K, W) -> (B, D): slot 0, informed by the others."""
        slot = x[:, 0]
        if self.query is not None:  # slot 0 asks, all K answer
            weight = torch.einsum("bw,bkw->bk", self.query(slot), self.key(x)) / x.shape[-1] ** 0.5
            slot = slot + torch.einsum("bk,bkw->bw", weight.softmax(-1), self.value(x))  # (B, W)
        return self.mlp(slot)


def mix(z, sampled, alpha):
    """e⁻ = alpha z + (1 - alpha) e_j, as in the paper, with z first given the norm of e_j, since
    alignment, which trains it, sees directions only. z, sampled (B, D) -> (B, D)."""
    z = F.normalize(z, dim=-1) * sampled.detach().norm(dim=-1, keepdim=True)
    return alpha * z + (1 - alpha) * sampled


def alignment_loss(z, positives, mined, user_ids, tau):
    """L_align, the only loss that trains the projector: z must lie near a CF-mined hard negative of
    its user, not near those of other users nor near the positive: InfoNCE(z; e_m against the
    batch's other e_m' and e_i), cosine, temperature tau_c.

    z, positives, mined (B, D); user_ids (B,): rows of one user are no negatives of each other
    -> scalar."""
    z, positives, mined = (F.normalize(v, dim=-1) for v in (z, positives, mined))
    same = user_ids[:, None] == user_ids[None]
    same.fill_diagonal_(False)
    scores = (z @ mined.T).masked_fill(same, -torch.inf)  # (B, B)
    own = (z * positives).sum(-1, keepdim=True)  # (B, 1)
    target = torch.arange(len(z), device=z.device)
    return F.cross_entropy(torch.cat([scores, own], 1) / tau, target)


def paper_contrastive_loss(e_u, e_i, z, tau):
    """L_CL, the paper's own alignment loss: z is the negative of the pair (e_u; e_i),

        L_CL = -ln( exp(p) / (exp(p) + exp(n)) ),  p = cos(e_u, e_i) / tau,  n = cos(e_u, z) / tau.

    e_u, e_i, z (B, D), gradient into all three -> scalar, the mean over B."""
    positive = F.cosine_similarity(e_u, e_i) / tau  # (B,)
    negative = F.cosine_similarity(e_u, z) / tau  # (B,)
    # L_CL = ln(1 + exp(n - p)), which softplus computes without overflow
    return F.softplus(negative - positive).mean()


def hinge_loss(positive_score, negative_score, margin):
    """max(0, margin - (positive - negative)), the mean over the batch: scores (B,) -> scalar. The
    paper prints BPR; its published code has this in BPR's place, with a margin of 0.3."""
    return F.relu(margin - (positive_score - negative_score)).mean()


def semantic_alignment(vectors, texts, tau):
    """InfoNCE between rows: vectors (A, D), the backbone's of A users or items, against texts
    (A, D), their projected texts -> scalar. Both sides get the gradient, so that what the LLM reads
    shapes e_u and e_i (the form of RLMRec-Con, Ren et al., WWW 2024)."""
    scores = F.normalize(vectors, dim=-1) @ F.normalize(texts, dim=-1).T / tau  # (A, A)
    return F.cross_entropy(scores, torch.arange(len(scores), device=scores.device))


class SemanticProjector(nn.Module):
    """The LLM's text vectors in the recommender's space. A user is the mean of the texts of the
    user's train items.

    forward: user ids (A,), item ids (B,) -> (A, D), (B, D), an MLP of the standardised texts.
    text (I, H), row i of item i, any float type; train (N, 2), on the same device; dim: D."""

    def __init__(self, text, train, n_users, dim, width=128):
        super().__init__()
        text = text.float()
        text = F.normalize((text - text.mean(0)) / text.std(0).clamp(min=1e-3), dim=1)
        user_text = sum_of_train_items(text, train, n_users)
        F.normalize(user_text, dim=1, out=user_text)  # in place: it is the largest table here
        self.register_buffer("item", text, persistent=False)  # (I, H)
        self.register_buffer("user", user_text, persistent=False)  # (U, H)
        self.mlp = nn.Sequential(
            nn.Linear(text.shape[1], width), nn.LeakyReLU(), nn.Linear(width, dim))

    def forward(self, users, items):
        return self.mlp(self.user[users]), self.mlp(self.item[items])


def text_start(text, train, n_users, dim, std):
    """Initial vectors that already say what the texts say: of an item the first `dim` principal
    components of the texts, of a user the sum over the train items; both scaled to the mean square
    that random ones would have, std squared. Beyond the paper.

    text (I, H), train (N, 2) -> (U + I, dim), users first; zeros where a text is narrower."""
    centred = text - text.mean(0)
    components = torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -dim:]
    items = centred @ components  # (I, min(dim, H))
    users = sum_of_train_items(items, train, n_users)
    scaled = [x * std / x.pow(2).mean() ** 0.5 for x in (users, items)]
    return F.pad(torch.cat(scaled), (0, dim - items.shape[1]))


def text_factors(text, train, n_users):
    """What the texts say of each pair of a user and an item, as an inner product: of an item its
    text, whitened (otherwise what all texts share would decide) and of length 1, of a user the sum
    over the train items, so that the product is a sum of cosines. Beyond the paper.

    text (I, H) float32, train (N, 2) -> users (U, H), items (I, H)."""
    items = whiten(text)
    return sum_of_train_items(items, train, n_users), items


class Relevance:
    """How well an item fits a user by two tables of factors, in standard deviations of that user's
    fit over all items: (x - mean) / std with x = users[u] · items[j]. What should fit the user is
    a likely false negative, and `backbones.dns` can be kept clear of it. Beyond the paper.

    users (U, k), items (I, k), float32, on one device: those of text_factors, or of any judge whose
    score is an inner product. Memory: 4 k (U + I) bytes, never users x items.
    Called with user ids (B,) and candidates' item ids (B, M) -> gain * relevance (B, M), float32,
    which is what `dns` and `make_sampler` take as `penalty`."""

    @torch.no_grad()
    def __init__(self, users, items, gain=1.0):
        # once the items are centred, a user's mean over all of them is 0 and the variance is
        # u C u', with C the covariance of the items; so both can be put into the factors
        self.items = items - items.mean(0)
        covariance = self.items.T @ self.items / (len(items) - 1)  # (k, k)
        self.users = torch.empty_like(users)
        for some, scaled in zip(users.split(2**14), self.users.split(2**14)):
            variance = (some @ covariance * some).sum(1, keepdim=True)  # (2**14, 1)
            torch.mul(some, gain / variance.clamp(min=1e-24).sqrt(), out=scaled)

    @torch.no_grad()
    def __call__(self, users, candidates):
        parts = []
        for u, c in zip(users.split(128), candidates.split(128)):  # so that (128, M, k) is gathered
            parts.append(torch.einsum("bk,bmk->bm", self.users[u], self.items[c]))
        return torch.cat(parts)


def blend_vectors(parts, weights):
    """Several recommenders in one score that is an inner product again, so that any index can serve
    it: the sum over them of weight z(e_u · e_i), z being the score in standard deviations of the
    user's scores over all items (up to a constant a user, which ranks nothing).

    parts: a list of (users (U, D), items (I, D)), D differing; weights: one number each ->
    users (U, sum of D), items (I, sum of D), of those parts whose weight is not 0."""
    users, items = [], []
    for (part_users, part_items), weight in zip(parts, weights):
        if weight:
            scaled = Relevance(part_users, part_items, weight)
            users.append(scaled.users)
            items.append(scaled.items)
    return torch.cat(users, 1), torch.cat(items, 1)


@torch.no_grad()
def standardised(part, users):
    """A recommender's scores of some users over all items, in standard deviations of each user's:
    part, two tables of vectors (U, D) and (I, D), or a backbones.ByNumber; users (n,) ->
    (n, I)."""
    if isinstance(part, nn.Module):
        some, items = part()
        scores = part.score_all(some[users], items)
        return scores.sub_(scores.mean(1, keepdim=True)).div_(deviation(scores))
    scaled = Relevance(*part)
    return scaled.users[users] @ scaled.items.T


def deviation(scores):
    """Standard deviation of each user's scores (n, I) -> (n, 1), no less than 1e-12."""
    return scores.std(1, keepdim=True).clamp(min=1e-12)


@torch.no_grad()
def deviations(model, users=256):
    """The standard deviation of each user's scores over all items, of a backbones.ByNumber, in
    blocks of users -> (U,)."""
    everyone, items = model()
    parts = [deviation(model.score_all(some, items)) for some in everyone.split(users)]
    return torch.cat(parts)[:, 0]


@torch.no_grad()
def blend_weights(parts, train, valid, grid, cells=2**28):
    """The weights of a blend with the highest validation NDCG@20, by coordinate ascent: from the
    best part alone, each weight in turn takes the value of the grid that is best beside the others,
    until none improves. A part that does not help keeps weight 0.

    parts: a list of what `standardised` takes; train, valid (N, 2); grid: numbers >= 0, 0 among
    them -> (weights, each part's NDCG@20 alone). Some users stand for all where parts x users x
    items is above `cells`, which bounds the memory: 4 bytes each."""
    # the users that are ranked, and what their lists should hold
    first = parts[0]
    n_users, n_items = map(len, first() if isinstance(first, nn.Module) else first)
    users, most = valid[:, 0].unique(), max(1, cells // (len(parts) * n_items))
    some = torch.randperm(len(users), generator=torch.Generator().manual_seed(0))[:most]
    users = users[some.sort().values.to(users.device)]  # (n,)
    seen, keys = user_rows(train, n_users), pair_keys(valid, n_items)
    relevant = torch.bincount(valid[:, 0], minlength=n_users)[users]
    scores = [standardised(part, users) for part in parts]  # (n, I) each

    def quality(total):
        ranked = top_k(leave_out(total, users, seen), 20)  # (n, 20)
        return float(ndcg(contains(keys, users[:, None], ranked, n_items), relevant, 20).mean())

    # from the best part alone (a clone, since quality() writes into what it is given)
    alone = [quality(score.clone()) for score in scores]
    best, improved = max(alone), True
    weights = [0.0] * len(parts)
    weights[alone.index(best)] = 1.0

    # one weight at a time, the others held, until a whole round changes none
    while improved:
        improved = False
        for k, score in enumerate(scores):
            rest, others = torch.zeros_like(score), 0
            for other, weight in enumerate(weights):
                if other != k and weight:
                    rest.add_(scores[other], alpha=weight)
                    others += 1
            for value in grid:
                if not value and not others:  # all scores alike: the order of the ids, no ranking
                    continue
                found = quality(rest.add(score, alpha=value))
                if found > best:
                    best, weights[k], improved = found, value, True
    return weights, alone


@torch.no_grad()
def factors(model, train, rank):
    """A trained recommender as two tables whose inner product is its score -> users (U, D), items
    (I, D). Of a Backbone its own vectors. Item weights W become W ~ A B' by a truncated SVD of that
    rank (Halko, Martinsson and Tropp, SIAM Review 2011), the user being the sum of A's rows over
    the train items; exact where there are no more items than `rank`."""
    if not isinstance(model, ItemWeights):
        return model()
    weight = model.weight
    if weight.layout is not torch.strided:
        weight = weight.to_sparse_coo()
    if model.n_items <= rank:
        left, right = weight.to_dense(), torch.eye(model.n_items, device=weight.device)
    else:
        with torch.random.fork_rng(devices=[]):  # the same factors each time
            torch.manual_seed(0)
            few = min(rank + 64, model.n_items)  # a few more make the first `rank` good
            left, value, right = torch.svd_lowrank(weight, q=few)
        left, right = (left * value)[:, :rank], right[:, :rank]
    return sum_of_train_items(left, train, model.n_users), right


class NegativeTable:
    """Which K generated vectors belong to a train pair: its own first, then others of its user.

    generated (n, 2): the (user, item) pair of each generated vector, none twice, users ascending;
    train (N, 2): the pairs that are trained on, on the same device. `own` is the number of train
    pairs with a vector of their own; the others use their user's other vectors instead: a counted
    fallback.

    Raises SystemExit2 for a user without any, since noise in its place would look like a result,
    and for pairs whose users are not in ascending order."""

    def __init__(self, generated, train, n_users, n_items):
        self.users, self.train_users = generated[:, 0], train[:, 0]
        if (self.users.diff() < 0).any():
            fail("negatives: their pairs are not in ascending order of the user; "
                 "run `python llm_negatives.py generate` with --force")
        # user u's vectors are rows start[u] … start[u] + count[u] - 1
        self.count = torch.bincount(self.users, minlength=n_users)
        self.start = self.count.cumsum(0) - self.count
        empty = (self.count[self.train_users] == 0).nonzero()
        if len(empty):
            fail(f"negatives: user row {int(train[empty[0], 0])} has train pairs but no generated "
                 "negative; run `python llm_negatives.py generate` with --pairs-per-user 1 or more")
        keys, order = (generated[:, 0] * n_items + generated[:, 1]).sort()
        query = train[:, 0] * n_items + train[:, 1]
        at = torch.searchsorted(keys, query).clamp(max=len(keys) - 1)
        self.row = torch.where(keys[at] == query, order[at], -1)  # (N,) each pair's own, -1: none
        self.own = int((self.row >= 0).sum())

    def __call__(self, rows, k, generator=None):
        """Train rows (B,) -> rows of the generated vectors (B, K), the pair's own (or its stand-in)
        first. A user with fewer than K vectors has some of them more than once."""
        chosen, own = self.others(self.train_users[rows], k, generator), self.row[rows]
        chosen[:, 0] = torch.where(own >= 0, own, chosen[:, 0])
        return chosen

    def others(self, users, k, generator=None):
        """Users (B,) -> k rows of each one's generated vectors, drawn at random (B, k)."""
        point = torch.randint(2**31, (len(users), k), generator=generator, device=users.device)
        return self.start[users][:, None] + point % self.count[users][:, None]


class LikelyFalse:
    """Draws, for each user of a batch, one unseen item that a judge holds for likely to be liked: a
    false hard negative. items (U, n) ids, share (U, n) >= 0, how often each is drawn; of a user
    without any (shares all 0) the first is drawn. users (B,) -> items (B,)."""

    def __init__(self, items, share):
        self.listed, self.border = items.long(), share.cumsum(1)  # (U, n), (U, n)

    def __call__(self, users, generator=None):
        border = self.border[users]  # (B, n)
        point = torch.rand(len(users), 1, generator=generator, device=users.device)
        place = torch.searchsorted(border, point * border[:, -1:], right=True)
        drawn = self.listed[users].gather(1, place.clamp(max=border.shape[1] - 1))[:, 0]
        return drawn.clamp(min=0)

    def penalty(self, users, candidates):
        """What keeps `dns` from taking a likely one as e⁻ while there is another candidate: users
        (B,), candidates (B, M) -> (B, M), infinite where the candidate is listed, else 0."""
        listed = torch.zeros_like(candidates, dtype=torch.bool)
        for column in self.listed[users].T:  # (B,): no (B, M, n) is held
            listed |= candidates == column[:, None]
        return listed.float().masked_fill(listed, torch.inf)


class HNLMRec(nn.Module):
    """Backbone, projector and semantic projector, trained together: `loss` is one step of

        L = BPR(e_u, e_i, e⁻) + lambda1 L_align + lambda_s L_sem
            + lambda_f L_false + lambda2 ‖Θ‖².

    backbone: has forward() -> users (U, D), items (I, D), score() and ego(), as backbones.Backbone.
    projector, semantic: a Projector and a SemanticProjector into the same D.
    draw: draws e_j, as backbones.make_sampler returns it; with dns, the highest scored of a few.
    table: a NegativeTable; hidden (n, H): the generated vectors that its rows number.
    mined (U, M): item ids, each user's CF-mined hard negatives. pairs (N, 2): the train pairs.
    settings: a Namespace with
        alpha       share of z in e⁻                  tau_c       temperature of L_align and L_sem
        lambda1     weight of L_align                 align_rows  pairs that L_align sees, a step
        lambda_s    weight of L_sem                   k           generated vectors in a set
        reg         lambda2, weight of the L2 term    refresh     steps between new values of z
        lambda_f    weight of L_false                 gamma       of it, of positive above false
    likely: a LikelyFalse, for L_false. All tensors on one device."""

    def __init__(
            self, backbone, projector, semantic, draw, table, hidden, mined, pairs, settings,
            likely=None):
        super().__init__()
        self.backbone, self.projector, self.semantic = backbone, projector, semantic
        self.draw, self.table, self.settings = draw, table, settings
        self.hidden, self.mined, self.pairs, self.likely = hidden, mined, pairs, likely
        self.z, self.steps = None, 0  # see z_of_all

    def loss(self, rows, generator):
        """Rows (B,) of the train pairs -> (scalar, {term: float}). A step for backbones.fit.

        Where processes share the rows, BPR, L2 and L_false are of this one's share; L_align and
        L_sem, which contrast a batch's rows with each other and see few of them, are computed by
        all alike."""
        s = self.settings
        u, i = self.pairs[rows].T  # (B,), (B,)
        if self.table:  # (B,) each pair's generated vector
            own = share_of(self.table(rows, 1, generator)[:, 0])
        sample = self.draw(u, i, generator)
        users, positives, negatives = sample.users, sample.positives, sample.negatives

        # BPR: the positive e_i above e⁻. Its gradient stops at z: it would teach the projector to
        # make easy negatives
        if s.alpha:
            negatives = mix(self.z_of_all(generator)[own], negatives, s.alpha)
        bpr = bpr_loss(self.backbone.score(users, positives), self.backbone.score(users, negatives))
        logs = {"bpr": bpr.item()}

        # L2, of the parameters behind the batch's users, positives and sampled items
        ego_users, ego_items = self.backbone.ego()
        l2 = l2_loss(take(ego_users, share_of(u)), take(ego_items, share_of(i)),
                     take(ego_items, sample.negative_ids))
        loss = (bpr + s.reg * l2) * share_weight(len(rows))

        # L_false: an unseen item f that the judge holds for a likely false hard negative stands
        # above e⁻ and below the positive, so that what the texts say of the user reaches the
        # vectors
        if s.lambda_f:
            f = share_of(self.likely(u, generator))  # (B,)
            false_score = self.backbone.score(users, take(sample.all_items, f))  # (B,)
            above = bpr_loss(false_score, self.backbone.score(users, negatives))
            below = bpr_loss(self.backbone.score(users, positives), false_score)
            false = above + s.gamma * below + s.reg * l2_loss(take(ego_items, f))
            loss = loss + s.lambda_f * false * share_weight(len(rows))
            logs["false"] = above.item()

        # L_align, on the first rows: z near one of the user's mined items. It trains the projector
        # alone, towards where the backbone has these items now
        if s.lambda1:
            a = slice(0, s.align_rows)
            z = self.projector(self.hidden[self.table(rows[a], s.k, generator)])  # (A, D)
            pick = torch.randint(
                self.mined.shape[1], (len(z),), generator=generator, device=u.device)
            items = sample.all_items.detach()
            mined = take(items, self.mined[u[a], pick])  # (A, D)
            align = alignment_loss(z, take(items, i[a]), mined, u[a], s.tau_c)
            loss = loss + s.lambda1 * align
            logs["align"] = align.item()

        # L_sem, on twice as many rows: e_u and e_i near their projected texts
        if s.lambda_s:
            some_users, some_items = (ids[: 2 * s.align_rows].unique() for ids in (u, i))
            user_texts, item_texts = self.semantic(some_users, some_items)
            user_vectors = take(sample.all_users, some_users)
            item_vectors = take(sample.all_items, some_items)
            meaning = (semantic_alignment(user_vectors, user_texts, s.tau_c)
                       + semantic_alignment(item_vectors, item_texts, s.tau_c))
            loss = loss + s.lambda_s * meaning
            logs["semantic"] = meaning.item()
        return loss, logs

    @torch.no_grad()
    def z_of_all(self, generator):
        """z of every generated vector (n, D), without gradient, made anew every `refresh` steps:
        between two of them a z hardly moves."""
        if self.steps % self.settings.refresh == 0:
            rows = torch.arange(len(self.hidden), device=self.hidden.device)
            others = self.table.others(self.table.users, self.settings.k - 1, generator)
            sets = torch.cat([rows[:, None], others], 1)  # (n, K)
            # each vector is read once, though it stands in many sets
            x = torch.cat([self.projector.read(part) for part in self.hidden.split(4096)])  # (n, W)
            self.z = torch.cat([self.projector.attend(x[part]) for part in sets.split(4096)])
        self.steps += 1
        return self.z


class PaperHNLMRec(HNLMRec):
    """The paper's own form of the loss, with what its published code adds:

        e⁻  = alpha z + (1 - alpha) e_j
        L   = BPR(e_u, e_i, e⁻) + lambda1 L_CL(e_u, e_i, z) + lambda2 ‖Θ‖²

    z is made of the batch's own generated vectors, as it comes out of the projector, and carries
    the gradient of both losses. Arguments as HNLMRec's. Of the settings alpha, lambda1, reg, tau_c
    and k are used, and hinge: above 0, the margin of a hinge in place of BPR."""

    def loss(self, rows, generator):
        s = self.settings
        u, i = self.pairs[rows].T  # (B,), (B,)
        sample = self.draw(u, i, generator)
        u, i = share_of(u), share_of(i)

        # e⁻: the projected vectors mixed into the sampled items
        z = self.projector(self.hidden[share_of(self.table(rows, s.k, generator))])  # (B, D)
        negatives = s.alpha * z + (1 - s.alpha) * sample.negatives

        # BPR, or the hinge of the published code: the positive e_i above e⁻
        positive_score = self.backbone.score(sample.users, sample.positives)  # (B,)
        negative_score = self.backbone.score(sample.users, negatives)  # (B,)
        if s.hinge:
            ranking = hinge_loss(positive_score, negative_score, s.hinge)
        else:
            ranking = bpr_loss(positive_score, negative_score)

        # L_CL: e_u near e_i and far from z
        contrast = paper_contrastive_loss(sample.users, sample.positives, z, s.tau_c)

        # L2, of the parameters behind the batch's users, positives and sampled items
        ego_users, ego_items = self.backbone.ego()
        l2 = l2_loss(take(ego_users, u), take(ego_items, i), take(ego_items, sample.negative_ids))
        logs = {"hinge" if s.hinge else "bpr": ranking.item(), "contrast": contrast.item()}
        return (ranking + s.lambda1 * contrast + s.reg * l2) * share_weight(len(rows)), logs

# --------------------------------------------------------------------------------------------------
# train and blend: the programs around the loss
# --------------------------------------------------------------------------------------------------

# What the paper and its published code state of this stage; their alpha on Toys is 0.01
PAPER = {"dim": 512, "layers": 3, "batch_size": 10_000, "lr": 1e-3, "reg": 1e-4, "sampler": "rns",
         "alpha": 1e-4, "lambda1": 1e-3, "tau_c": 0.2, "lambda_s": 0.0, "text_init": 0.0}


def load_generated(run, name, data, text_vectors=None):
    """load_negatives, with a person's own item vectors (read_text_vectors) as the items' texts;
    None for the name `none`: a run without generated vectors."""
    if name == "none":
        return None
    made = load_negatives(run, name, data["digest"])
    if text_vectors:
        made["text"] = read_text_vectors(text_vectors, data["n_items"])
    return made


def train_hnlmrec(args):
    """Train backbone and projector together; write the state of the best validation."""
    check_flags(args)
    run, data = Path(args.run), load_data(args.run)
    out = run / output_name("--out", args.out, "hnlmrec.py train", ".safetensors")

    # what is 0 on the command line follows from the data
    args.mine_first, args.mine_last = mining_band(data, args.mine_first, args.mine_last)
    args.batch_size, args.lr, args.epochs, args.m = sized_to_data(
        data, args.batch_size, args.lr, args.epochs, args.m)

    # a file made with these settings from these inputs need not be made again
    settings = settings_of(args)
    made = load_generated(run, args.negatives, data, args.text_vectors)
    settings["inputs"] = stamp(run, "data.safetensors")
    if made:
        settings["inputs"] |= stamp(run, args.cf, args.negatives)
        settings["negatives_digest"] = made["digest"]
    if args.lambda_f:
        settings["inputs"] |= stamp(run, args.judge)
    if args.text_vectors:
        settings["text_digest"] = file_digest(args.text_vectors)
    if up_to_date(out, settings, force=args.force):
        return

    # everything that trains, on the device of the train pairs
    device = start_processes(args.device)
    data |= {name: data[name].to(device) for name in ("train", "valid")}
    method = build(run, args, data, made)
    own, n = method.table.own if made else 0, len(data["train"])
    if made:
        print(f"train: {own} of {n} train pairs have a generated negative of their own; "
              f"the other {n - own} use their user's other ones", flush=True)

    # train; what the file keeps is the state of the best validation, not the last one
    start, modules = time.time(), dict(method.named_children())
    state, history = fit(
        modules, method.loss, n, validation(method.backbone, data, users=args.eval_users),
        epochs=args.epochs, batch_size=args.batch_size, lr=args.lr, eval_every=args.eval_every,
        patience=args.patience, seed=args.seed, label=f"{args.backbone} hnlmrec")
    if rank():
        return
    restore(modules, state)

    # the vectors that rank, and for the report z of each generated pair; K is the pair alone, so
    # that it is repeatable
    with torch.no_grad():
        users, items = method.backbone.eval()()
        vectors = {"user": users, "item": items}
        if made:
            z = torch.cat([method.projector(part[:, None]) for part in method.hidden.split(4096)])
            vectors |= {"z": z.half(), "z_pairs": made["pairs"]}

    # write, unless something is not finite
    check_finite(out, state | vectors, "nothing was written; lower --lr and run again")
    save_tensors(out, {**state, **vectors},
                 {"settings": settings, "n_users": data["n_users"], "n_items": data["n_items"],
                  "history": history, "own_negatives": own, "seconds": time.time() - start})
    print(f"wrote {out}")


def blend_names(args):
    """The files that are blended, in order, by the flags of `blend`. Raises SystemExit2 for none,
    or for one that is there twice."""
    names = [name for name in (args.model, args.judge) if name != "none"]
    names += [name for name in args.beside.split(",") if name]
    if not names:
        fail("--model none --judge none: nothing is left to blend; name one, or --beside FILES")
    for name in names:
        if names.count(name) > 1:
            fail(f"--beside {name}: is there twice, or is --model or --judge too; name it once")
    if args.out in names:
        fail(f"--out {args.out}: is one of the models that are blended; choose another name")
    return names


def blend(args):
    """Put a trained model, the judge of texts and other trained models into one score, with the
    weights that are best on validation; what does not help there gets none. Writes a model like any
    other: one inner product, beside which the judge keeps its own score (backbones.Blended)."""
    run, data, start = Path(args.run), load_data(args.run), time.time()
    out = run / output_name("--out", args.out, "hnlmrec.py blend", ".safetensors")
    try:
        grid = [float(weight) for weight in args.weights.split(",")]
    except ValueError:
        grid = []
    if not grid or not all(0 <= weight <= 1000 for weight in grid):  # nan is not either
        fail(f"--weights {args.weights}: give numbers from 0 to 1000, comma-separated, such as "
             "0,0.5,1")
    names = blend_names(args)

    # what each file holds: the judge its score, the others a model
    parts, seconds, seed, judge = [], 0.0, 0, None
    for name in names:
        if name == args.judge:
            judge = load_judge(run / name)
            parts.append(kernel_of(judge, data["train"], data["n_users"]))
            continue
        model, meta, _ = load_model(run / name, data=data)
        flag = "--model" if name == args.model else "--beside"
        if meta["settings"]["backbone"] == "neumf":
            fail(f"{flag} {name}: the score of neumf is no inner product; give another model")
        if isinstance(model, Blended):
            fail(f"{flag} {name}: is a blend with a judge already; name what it was made of")
        if name == args.model:  # its seed is the blend's too, and its time is part of the blend's
            seconds, seed = meta["seconds"], meta["settings"]["seed"]
        parts.append(model)
    settings = settings_of(args) | {
        "inputs": stamp(run, "data.safetensors", *names), "backbone": "mf", "layers": 0,
        "dim": 0, "seed": seed}  # 0: as wide as its vectors, which the weights decide
    if up_to_date(out, settings, force=args.force):
        return

    # each but the judge as two tables of vectors, (U, D) and (I, D), in the place of its model
    for k, part in enumerate(parts):
        if not isinstance(part, HistoryKernel):
            parts[k] = factors(part, data["train"], args.rank)

    # their weights
    weights, alone = blend_weights(parts, data["train"], data["valid"], grid)
    for name, weight, own in zip(names, weights, alone):
        print(f"blend: {name}, alone valid NDCG@20 {own:.4f}, weight {weight:g}", flush=True)

    # one score: the inner products as one, then the judge in standard deviations of each user's
    weight_of, vectors = dict(zip(names, weights)), []
    for name, part in zip(names, parts):
        if name != args.judge and weight_of[name]:
            vectors.append((part, weight_of[name]))
    if not vectors:  # the judge alone
        vectors = [((torch.zeros(data["n_users"], 1), torch.zeros(data["n_items"], 1)), 1.0)]
    users, items = blend_vectors(*zip(*vectors))
    tensors = {"backbone.embedding": torch.cat([users, items]), "user": users, "item": items}
    if weight_of.get(args.judge):
        kernel = parts[names.index(args.judge)]
        share = weight_of[args.judge] / deviations(kernel)  # (U,)
        tensors |= {f"judge.{name}": judge[name] for name in KERNEL} | {"judge.share": share}
        blended = Blended(tensors["backbone.embedding"], kernel, share, data["train"])
    else:  # a plain MF whose vectors are given
        blended = MF(data["n_users"], data["n_items"], users.shape[1])
        blended.embedding.data = tensors["backbone.embedding"]
    score = validation(blended, data)()

    # written so that everything reads it as any model
    history = [{"epoch": 0, "valid_ndcg@20": score, "seconds": time.time() - start}]
    save_tensors(out, tensors, {
        "settings": settings, "n_users": data["n_users"], "n_items": data["n_items"],
        "history": history, "weights": weight_of, "seconds": seconds + time.time() - start})
    print(f"wrote {out}: {users.shape[1]} numbers a user and item"
          f"{' and the judge' if weight_of.get(args.judge) else ''}, valid NDCG@20 {score:.4f}")


def load_judge(path, device="cpu"):
    """What `llm_negatives.py judge` wrote -> dict: its score as kernel_of takes it, likely (U, n)
    int32, share (U, n) float32. Raises SystemExit2 for another kind of file, as well as
    load_tensors."""
    tensors, meta = load_tensors(path, device=device)
    command = meta["settings"].get("command")
    if command != "judge":
        fail(f"{path}: holds what `{command}` writes, not a judge; name one "
             "with --judge, such as judge.safetensors")
    if "history" not in tensors:
        fail(f"{path}: is of an older version, which had another score; make it again with "
             "`python llm_negatives.py judge`")
    return tensors


TEXT_FLAGS = ("lambda_s", "text_init", "clear")  # these need the items' texts alone


def check_flags(args):
    """Raises SystemExit2 for flags of `train` that do not go together."""
    if args.negatives == "none":
        for name in ("alpha", "lambda1", "paper", "lambda_s", "text_init", "clear"):
            if getattr(args, name) and not (args.text_vectors and name in TEXT_FLAGS):
                fail(f"--negatives none: --{name.replace('_', '-')} needs generated vectors; give "
                     "it as 0, or run `python llm_negatives.py generate`")
        if args.control in ("random", "shuffled"):
            fail(f"--negatives none: --control {args.control} needs generated vectors")
    if args.clear and args.sampler != "dns":
        fail(f"--clear {args.clear:g}: only dns ranks candidates, so it needs --sampler dns, "
             f"not {args.sampler}")
    if args.control == "cleared" and not args.clear:
        fail("--control cleared: shuffles the texts that --clear uses, so it needs --clear above 0")
    if args.paper and args.lambda_s:
        fail(f"--lambda-s {args.lambda_s:g}: the paper's form has no semantic alignment; "
             "leave out --paper or --lambda-s")
    if args.hinge and not args.paper:
        fail(f"--hinge {args.hinge:g}: is part of the paper's form, so it needs --paper")


def build(run, settings, data, made):
    """What trains, from the run's files -> HNLMRec, or PaperHNLMRec with settings.paper.

    settings: a Namespace, the flags of `train`; data as of load_data and made as of load_negatives.
    On the device of data["train"]. Seeds torch's global generator with settings.seed."""
    train, n_users, n_items = data["train"], data["n_users"], data["n_items"]
    device = train.device

    # the judge's likely false hard negatives
    likely = None
    if settings.lambda_f:
        judged = load_judge(run / settings.judge, device)
        likely = LikelyFalse(judged["likely"], judged["share"])

    # the hard negatives that the CF model mines, which z is to lie near
    mined = None
    if made:
        maker = f"python backbones.py pretrain --run {run}"
        cf_model, _, _ = load_model(run / settings.cf, maker, data)
        mined = mine_hard_negatives(cf_model, train, settings.mine_first, settings.mine_last)

    # what the LLM made, or what the control puts in its place
    torch.manual_seed(settings.seed)
    text = table = hidden = None
    if made:
        made = controlled(made, settings.control, settings.seed)
        hidden, text = made["hidden"].to(device), made["text"].to(device)
        table = NegativeTable(made["pairs"].to(device), train, n_users, n_items)
    elif settings.text_vectors:
        text = read_text_vectors(settings.text_vectors, n_items).to(device)
    needs_text = settings.lambda_s or settings.text_init or settings.clear
    if needs_text and (text == text[0]).all():
        fail(f"{settings.text_vectors or settings.negatives}: the vectors of all items' texts are "
             "alike, so they say nothing; give --lambda-s 0 --text-init 0 --clear 0")

    # the modules; the backbone may start from the texts
    backbone = build_backbone(
        settings.backbone, n_users, n_items, settings.dim, train, settings.layers)
    width = backbone()[0].shape[1]  # D, which with ngcf is not --dim
    projector = semantic = None
    if made:
        projector = Projector(made["hidden"], width, settings.projector_width, settings.attention)
        projector = projector.to(device)
    if text is not None:
        semantic = SemanticProjector(text, train, n_users, width).to(device)
    if settings.text_init:
        part, vectors = settings.text_init, backbone.embedding.data
        start = text_start(semantic.item, train, n_users, vectors.shape[1], backbone.std)
        vectors.copy_(part * start + (1 - part) * vectors)

    # the sampler of e_j, kept clear of what the texts say the user would like
    penalties = []
    if likely:
        penalties.append(likely.penalty)
    if settings.clear:
        texts = semantic.item
        if settings.control == "cleared":
            generator = torch.Generator().manual_seed(settings.seed)
            texts = texts[torch.randperm(n_items, generator=generator).to(device)]
        penalties.append(Relevance(*text_factors(texts, train, n_users), gain=settings.clear))

    def penalty(users, candidates):
        return sum(part(users, candidates) for part in penalties)

    draw = make_sampler(backbone, settings.sampler, train, m=settings.m,
                        penalty=penalty if penalties else None)

    form = PaperHNLMRec if settings.paper else HNLMRec
    return form(
        backbone, projector, semantic, draw, table, hidden, mined, train, settings, likely)


def controlled(made, control, seed):
    """Does the LLM matter? What load_negatives gives, with the LLM's vectors replaced: `random`, by
    vectors that know nothing; `shuffled`, by the LLM's own, each given to another pair or item."""
    generator = torch.Generator().manual_seed(seed)
    made = dict(made)
    if control == "random":
        for name in ("hidden", "vector", "text"):
            made[name] = torch.randn(made[name].shape, generator=generator).half()
    elif control == "shuffled":
        order = torch.randperm(len(made["hidden"]), generator=generator)
        made["hidden"], made["vector"] = made["hidden"][order], made["vector"][order]
        made["text"] = made["text"][torch.randperm(len(made["text"]), generator=generator)]
    return made

# --------------------------------------------------------------------------------------------------
# trace: one (user, item) pair from the raw line to the gradient
# --------------------------------------------------------------------------------------------------

def trace(args):
    """Print how one train pair passes through the pipeline, with the real values of a finished run.
    Changes nothing."""
    # the run as it was trained
    run, data = Path(args.run), load_data(args.run)
    tensors, meta = load_tensors(run / args.model, f"python hnlmrec.py train --run {run}")
    settings = Namespace(**meta["settings"])
    if "paper" not in settings:
        fail(f"--model {args.model}: is no model of this version's `hnlmrec.py train`; "
             "give another, or train it again with --force")
    made = load_generated(run, settings.negatives, data, getattr(settings, "text_vectors", None))
    if made is None:
        fail(f"--model {args.model}: was trained with --negatives none, so no generated vector can "
             "be followed; give another")
    method = build(run, settings, data, made)
    restore(dict(method.named_children()), tensors)
    cf, _ = load_tensors(run / settings.cf, f"python backbones.py pretrain --run {run}")

    # the pair
    maker = f"python hnlmrec.py prepare --run {run}"
    users, items = read_jsonl(run / "users.jsonl", maker), read_jsonl(run / "items.jsonl", maker)
    titles = [item["title"] for item in items]
    u, i, row = find_pair(args, data, users, items, made["pairs"])
    print(f"1. data       user {args.user} -> row {u}, item {items[i]['raw']} -> row {i}: "
          f"{titles[i]}; train pair number {row} of {len(data['train'])}")

    # what goes into the LLM, what comes out, and the step that trains with it
    trace_prompt(run, settings, users[u], items[i], u, i, titles, method.mined, cf)
    trace_negative(settings, data, made, method, row, titles, cf)
    trace_step(method, row)


def find_pair(args, data, users, items, generated):
    """The rows of the user and of the item, and the number of their train pair. Without --item the
    user's first pair that has a generated vector of its own: generated (n, 2) are all that have."""
    u = row_of(users, args.user, "--user", Path(args.run) / "users.jsonl")
    own = [items[i]["raw"] for i in data["train"][data["train"][:, 0] == u, 1].tolist()]
    if args.item is not None and args.item not in own:
        fail(f"--item {args.item}: user {args.user} has no train pair with it "
             f"(for example {', '.join(own[:5])})")
    first = next(iter(generated[generated[:, 0] == u, 1].tolist()), None)
    item = args.item or (own[0] if first is None else items[first]["raw"])
    i = row_of(items, item, "--item", Path(args.run) / "items.jsonl")
    return u, i, int((data["train"] == torch.tensor([u, i])).all(1).nonzero())


def trace_prompt(run, settings, user, item, u, i, titles, mined, cf):
    """What goes into the LLM: profiles, CF vectors, mined items, the prompt."""
    # what the LLM wrote of both; the first row of the file holds its settings
    rows = read_jsonl(
        run / "profiles.jsonl", f"python llm_negatives.py profile --run {run}", growing=True)
    profiles = {(row["kind"], row["raw"]): row["profile"] for row in rows[1:]}
    user_profile, item_profile = profiles["user", user["raw"]], profiles["item", item["raw"]]
    print(f"2. profiles   item: {item_profile}\n              user: {user_profile}")

    # the CF model's vectors, and what it thinks of the pair
    scores = cf["item"] @ cf["user"][u]
    place = int((scores > scores[i]).sum()) + 1
    print(f"3. CF         e_u {shown(cf['user'][u])}\n              e_i {shown(cf['item'][i])}\n"
          f"              e_u·e_i {scores[i]:.3f}: rank {place} of {len(scores)}")

    # the items that L_align draws z to
    print(f"4. mined      unseen ranks {settings.mine_first}–{settings.mine_last}: "
          + "; ".join(titles[n] for n in mined[u, :5].tolist()) + "; …")

    # the prompt as fine-tuning built it
    _, sft = load_tensors(
        run / "sft.safetensors", f"python llm_negatives.py finetune --run {run}")
    prompt = sft["prompt"].replace("{user}", user_profile)
    prompt = prompt.replace("{item}", f"{titles[i]}. {item_profile}")
    print("5. prompt     " + prompt.replace("\n", "\n              "))


def trace_negative(settings, data, made, method, row, titles, cf):
    """What comes out of the LLM for train pair `row`: the generated vector, and z made of it."""
    # the pair's own vector or, where it has none, that of another pair of the user
    u, i = data["train"][row].tolist()
    made = controlled(made, settings.control, settings.seed)
    at = int(method.table(torch.tensor([row]), 1)[0, 0])
    of = ""
    if made["pairs"][at].tolist() != [u, i]:
        other = titles[int(made["pairs"][at, 1])]
        of = f" (it has none of its own: that of the user's pair with {other})"

    # the generated vectors live in the space of the centred CF item vectors (llm_negatives.SftTask)
    centred, seen = cf["item"] - cf["item"].mean(0), pair_keys(data["train"], len(titles))
    near = nearest_items(made["vector"][at][None], torch.tensor([u]), centred, seen, 5)[0]
    mark = [titles[n] + (" (mined)" if n in method.mined[u] else "")
            for n in near.tolist() if n >= 0]
    print(f"6. generated  h {shown(made['hidden'][at].float())}{of}\n"
          f"              nearest real items: {'; '.join(mark)}")

    # the projector's z, beside the trained backbone's vectors
    rows = method.table(torch.tensor([row]), settings.k, torch.Generator().manual_seed(0))
    with torch.no_grad():
        z = method.projector(method.hidden[rows])[0]
        users, items = method.backbone.eval()()
    print(f"7. projector  z {shown(z)}; cos(z, e_u) {F.cosine_similarity(z, users[u], 0):.3f}, "
          f"cos(z, e_i) {F.cosine_similarity(z, items[i], 0):.3f}")


def trace_step(method, row):
    """One training step on train pair `row` alone: its losses and its gradient."""
    # the score that it starts from
    u, i = method.pairs[row].tolist()
    with torch.no_grad():
        users, items = method.backbone.eval()()
        score = float((users[u] * items[i]).sum())

    # one batch of one pair
    method.backbone.train()
    loss, logs = method.loss(torch.tensor([row]), torch.Generator().manual_seed(0))
    loss.backward()
    terms = ", ".join(f"{name} {value:.4f}" for name, value in logs.items())
    print(f"8. step       e_u·e_i as trained {score:.3f}; loss {loss.item():.4f} = {terms} and L2\n"
          f"9. gradient   norm: backbone {gradient_norm(method.backbone):.4f}, "
          f"projector {gradient_norm(method.projector):.4f}")


def shown(vector):
    """A vector's first entries and its norm, for printing."""
    return f"[{', '.join(f'{v:.3f}' for v in vector[:4].tolist())}, …] norm {vector.norm():.3f}"


def gradient_norm(module):
    """The norm of the gradient of all of a module's parameters."""
    squares = [float(p.grad.pow(2).sum()) for p in module.parameters() if p.grad is not None]
    return sum(squares) ** 0.5

# --------------------------------------------------------------------------------------------------
# prepare, part 1: the program; filter, core, split
# --------------------------------------------------------------------------------------------------

def prepare(args):
    """Raw files -> data.safetensors, items.jsonl, users.jsonl."""
    run, out = Path(args.run), Path(args.run) / "data.safetensors"
    s, files, published = prepare_settings(args)
    own = "train" in files
    # files of the same contents under the same settings: nothing to do
    s.files = {role: file_digest(path) for role, path in files.items()}
    s.command = "prepare"
    if up_to_date(out, vars(s), force=args.force):
        return

    # interactions: one row a pair
    counts, source = Counter(), files["train" if own else "reviews"]
    form = FORMATS[s.format](source)
    if own:
        rows, part = read_own_split(files, s.format, counts)
    else:
        rows = read_interactions(files["reviews"], s, counts)
        rows = filter_pairs(rows, files["reviews"], s, counts)
    # contiguous ids, in order of the raw id
    user, raw_users = renumber(rows.user, rows.users)
    item, raw_items = renumber(rows.item, rows.items)
    # train, valid, test
    if not own:
        check_split(user, raw_users, rows.seconds, files["reviews"], s)
        part = split_pairs(user, item, rows.seconds, s.split, s.seed)
    pairs = np.stack([user, item], 1)
    pairs = {name: pairs[part == code] for code, name in enumerate(PARTS)}
    for name, of_part in pairs.items():
        pairs[name] = of_part[np.lexsort((of_part[:, 1], of_part[:, 0]))]
        if not len(of_part):
            fail(f"{source}: --split {s.split} leaves the {name} part empty; "
                 "use --split random, or more pairs")
    # texts: of the items, and of the train pairs' reviews alone
    items = read_items(files.get("meta"), form, raw_items, counts)
    of_row = dict(zip(rows.row[part == 0].tolist(), user[part == 0].tolist()))
    reviews = read_reviews(source, s.format, of_row, s.reviews_per_user, counts)
    users = [{"raw": raw, "reviews": reviews.get(n, [])} for n, raw in enumerate(raw_users)]

    # write, the data last: it names the rest. Killed between the files, nothing is taken for whole
    out.unlink(missing_ok=True)
    for name, lines in (("items.jsonl", items), ("users.jsonl", users)):
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        write_atomic(run / name, text.encode())
    save_tensors(out, {name: torch.from_numpy(of_part) for name, of_part in pairs.items()},
                 {"settings": vars(s), "n_users": len(users), "n_items": len(items),
                  "seed": s.seed, "beside": stamp(run, "items.jsonl", "users.jsonl")})

    # say what was read, left out and repaired
    print(f"prepare: {counts.pop('rows'):,} rows read")
    for what, n in counts.items():
        if n:
            print(f"  {n:,} {what}")
    if s.format == "table":
        for role, column in zip(ROLES, form):
            if column not in (role, None):
                print(f"  column {column} is read as {role}")
    if published:
        print("  the paper prints: users {:,}   items {:,}   pairs {:,}".format(*published))
    print("\n".join(summarize(pairs, len(users), items, rows.seconds, "meta" in files)))
    print(f"wrote {out}, items.jsonl, users.jsonl")


def prepare_settings(args):
    """Flags -> settings (a Namespace), {role: path} of the raw files, the paper's statistics.

    Raises SystemExit2 for files that are missing or do not go together."""
    # the defaults, over them the preset's, over these the flags that were given
    chosen = {"format": "table", "min_rating": 4.0, "since": None, "until": None, "k_core": 5}
    chosen |= PRESETS.get(args.preset, {})
    published = chosen.pop("published", None)
    for name in chosen:
        if getattr(args, name) is not None:
            chosen[name] = getattr(args, name)
    s = Namespace(**chosen, split=args.split, seed=args.seed,
                  reviews_per_user=args.reviews_per_user)

    # one file that is split here, or three that are split already
    own = {name: getattr(args, f"{name}_file") for name in PARTS}
    if any(own.values()):
        if not all(own.values()):
            fail("--train-file, --valid-file and --test-file go together; give all three")
        if args.reviews:
            fail("--reviews: is split here, --train-file, --valid-file and --test-file are not; "
                 "give one or the other")
        files = own
    elif args.reviews:
        files = {"reviews": args.reviews}
    else:
        fail("--reviews: give the interactions file (or --train-file, --valid-file, --test-file)")
    if args.meta:
        files["meta"] = args.meta
    for path in files.values():
        check_file(path)
    return s, files, published


PARTS = ("train", "valid", "test")


class Interactions(NamedTuple):
    """Interactions as arrays (N,): codes of user and item, rating and seconds since 1970 (NaN:
    none), the row's number in the file; the raw ids by code."""

    user: np.ndarray
    item: np.ndarray
    rating: np.ndarray
    seconds: np.ndarray
    row: np.ndarray
    users: list
    items: list

    def at(self, index):
        """The rows of this index, int or bool (N,)."""
        return self._replace(**{name: getattr(self, name)[index]
                                for name in ("user", "item", "rating", "seconds", "row")})


def filter_pairs(rows, path, s, counts):
    """The latest row of each pair, then the rating filter, then the core: a rating that was taken
    back does not make a positive. Interactions -> Interactions, ordered by first sight."""
    keep = latest(rows.user, rows.item, rows.rating, rows.seconds)
    counts["earlier ratings of a repeated pair"] += len(rows.user) - len(keep)
    rows = rows.at(keep)
    if s.min_rating != "none":
        low = rows.rating < s.min_rating
        counts[f"pairs below --min-rating {s.min_rating:g}"] += int(low.sum())
        rows = rows.at(~low)
    core = k_core(rows.user, rows.item, s.k_core)
    counts[f"pairs outside the {s.k_core}-core"] += int((~core).sum())
    if not core.any():
        fail(f"{path}: nothing is left ({counts['rows']:,} rows; "
             + ", ".join(f"{n:,} {what}" for what, n in counts.items() if n and what != "rows")
             + "); lower --k-core or --min-rating, or widen --since and --until")
    # the split draws its random numbers in this order
    first_user, first_item = (np.full(len(names), rows.row.max() + 1)
                              for names in (rows.users, rows.items))
    np.minimum.at(first_user, rows.user, rows.row)
    np.minimum.at(first_item, rows.item, rows.row)
    rows = rows.at(core)
    return rows.at(np.lexsort((first_item[rows.item], first_user[rows.user])))


def latest(user, item, rating, seconds):
    """Of each (user, item) the row latest in time -> their indices, int (P,).

    Where times are equal or missing, the lowest rating: the order of the file decides nothing."""
    pair = user.astype(np.int64) * (item.max(initial=0) + 1) + item
    order = np.lexsort((rating, -seconds, pair))  # NaN comes last in each
    return order[np.diff(pair[order], prepend=-1) != 0]


def k_core(user, item, k):
    """Drop users and items with fewer than k interactions until none is left.

    int (N,), (N,) -> bool (N,) kept."""
    keep = np.ones(len(user), bool)
    while k > 1:
        ok = (np.bincount(user, keep)[user] >= k) & (np.bincount(item, keep)[item] >= k) & keep
        if ok.sum() == keep.sum():
            break
        keep = ok
    return keep


def check_split(user, raw_users, seconds, path, s):
    """Refuse a split that the rows do not allow, naming the user or the rows."""
    if s.split != "random" and np.isnan(seconds).any():
        fail(f"{path}: --split {s.split} needs a timestamp in each row, "
             f"{np.isnan(seconds).sum():,} have none; use --split random")
    few = np.flatnonzero(np.bincount(user) < 3)
    if s.split != "time" and len(few):
        fail(f"{path}: user {raw_users[few[0]]} has fewer than 3 interactions after filtering "
             f"({len(few):,} users have), and a split needs 3; use --k-core 3 or more")


def split_pairs(user, item, seconds, how, seed, valid=0.1, test=0.1):
    """Give each interaction to a part: 0 train, 1 valid, 2 test.

    how: 'random', user by user a seeded share of the items, at least one each; 'last', user by
    user the last in time is test, the one before it valid (both want 3 interactions a user);
    'time', one cut in time for all: train is earlier than valid, valid earlier than test.
    user, item, seconds (N,) -> int (N,)."""
    if how == "time":  # rows of one moment stay together: the shares are nearly met
        n_valid, n_test = (max(1, int(len(user) * share)) for share in (valid, test))
        valid_from, test_from = np.sort(seconds)[[-n_valid - n_test, -n_test]]
        return np.where(seconds >= test_from, 2, np.where(seconds >= valid_from, 1, 0))

    # place of each row within its user, in random order or the latest first: the first are test
    count = np.bincount(user)
    key = np.random.default_rng(seed).random(len(user)) if how == "random" else -seconds
    order = np.lexsort((item, key, user))  # the item breaks ties in time the same way each run
    place = np.empty(len(user), np.int64)
    place[order] = np.arange(len(user)) - np.repeat(np.cumsum(count) - count, count)
    n_test = n_valid = 1
    if how == "random":
        n_test, n_valid = (np.maximum(1, (count * share).astype(int))[user]
                           for share in (test, valid))
    return np.where(place < n_test, 2, np.where(place < n_test + n_valid, 1, 0))


def read_interactions(path, s, counts):
    """Stream a file into arrays; memory grows with the rows and the distinct ids, never with the
    text. Rows outside --since and --until are left out, ratings are not judged yet.

    Returns Interactions. Raises SystemExit2 for a row that a filter cannot judge."""
    since, until = parse_day(s.since, "--since", -np.inf), parse_day(s.until, "--until", np.inf)
    by_day, by_rating = s.since or s.until, s.min_rating != "none"
    users, items = Ids(), Ids()
    user, item, row = array("i"), array("i"), array("q")
    rating, seconds = array("d"), array("d")
    total, outside, start = 0, 0, time.time()
    for n, raw_user, raw_item, stars_given, moment, _ in interactions(path, s.format):
        # every row has a number, those that are left out too: read_reviews counts again
        total += 1
        if total % 1_000_000 == 0:
            print(f"  read {total:,} rows, {total / (time.time() - start):,.0f} rows/s", flush=True)
        # a filter that cannot judge a row must not let it pass
        if by_day and not since <= moment < until:
            if moment != moment:  # NaN
                fail(f"{path}: line {n}: no timestamp, so --since and --until cannot be applied; "
                     "mend that line, or leave them out")
            outside += 1
            continue
        if by_rating and stars_given != stars_given:
            fail(f"{path}: line {n}: no rating, so --min-rating {s.min_rating:g} cannot be "
                 "applied; mend or delete such lines, or give --min-rating none to keep them all")
        # numbers alone are kept: a code for an id
        try:
            user.append(users[raw_user])
            item.append(items[raw_item])
        except (ValueError, TypeError) as error:
            fail(f"{path}: line {n}: {error}; mend or delete that line")
        rating.append(stars_given)
        seconds.append(moment)
        row.append(total)
    if not total:
        fail(f"{path}: no rows; is --format {s.format} right?")
    counts["rows"] += total
    counts["rows outside --since and --until"] += outside
    columns = (np.array(column) for column in (user, item, rating, seconds, row))
    return Interactions(*columns, users.checked(path, counts), items.checked(path, counts))


def read_own_split(files, fmt, counts):
    """The user's own three files, taken as they are: no rating filter, no core.

    Returns Interactions, part int (N,). Raises SystemExit2 for a pair in two parts, or a part
    without pairs."""
    users, items, part_of, row_of_pair = Ids(), Ids(), {}, {}
    for code, name in enumerate(PARTS):
        path, before, total = files[name], len(part_of), 0
        for n, raw_user, raw_item, *_ in interactions(path, fmt):
            total += 1
            try:
                pair = users[raw_user], items[raw_item]
            except (ValueError, TypeError) as error:
                fail(f"{path}: line {n}: {error}; mend or delete that line")
            if part_of.setdefault(pair, code) != code:
                fail(f"{path}: line {n}: user {raw_user}, item {raw_item} is in another part too; "
                     "each pair belongs to one of train, valid, test")
            row_of_pair.setdefault(pair, total)
        if len(part_of) == before:
            fail(f"{path}: no pairs; --{name}-file needs at least one")
        counts["rows"] += total
    counts["repeated rows"] += counts["rows"] - len(part_of)

    # what was not read here, rating and time, is nothing
    pairs, none = np.array(list(part_of)), np.full(len(part_of), np.nan)
    rows = Interactions(pairs[:, 0], pairs[:, 1], none, none, np.array(list(row_of_pair.values())),
                        users.checked(path, counts), items.checked(path, counts))
    return rows, np.array(list(part_of.values()))


class Ids(dict):
    """Raw id -> code 0, 1, 2 … by first sight; `names`: the ids by code.

    Spaces around an id are no part of it. Looking up what cannot be an id raises ValueError, or
    TypeError for a list."""

    def __init__(self):
        super().__init__()
        self.names, self.spaced = [], 0

    def __missing__(self, raw):  # once for each distinct id
        name = id_text(raw)
        self.spaced += name != raw and isinstance(raw, str)
        code = self.get(name)
        if code is None:
            code = self[name] = len(self.names)
            self.names.append(name)
        self[raw] = code
        return code

    def checked(self, path, counts):
        """The ids by code. Raises SystemExit2 when one id is written in two ways: 1 and 1.0, or é
        as one character and as two."""
        composed = {}
        for name in self.names:
            if name.endswith(".0") and name[:-2] in self:
                fail(f"{path}: ids {name[:-2]} and {name} both occur; write one id in one way")
            if not name.isascii():
                other = composed.setdefault(unicodedata.normalize("NFC", name), name)
                if other != name:
                    fail(f"{path}: ids {ascii(other)} and {ascii(name)} both occur and look alike; "
                         "write one id in one way")
        counts["ids with spaces around them (taken off)"] += self.spaced
        return self.names


def id_text(raw):
    """An id as text. Raises ValueError when it is null, empty, or no id."""
    if raw is None:
        raise ValueError("an id is null")
    if isinstance(raw, (bool, dict)) or raw != raw:
        raise ValueError(f"{raw} is no id")
    name = str(int(raw) if isinstance(raw, float) and raw.is_integer() else raw).strip()
    if not name:
        raise ValueError("an id is empty")
    if name.lower() in ("null", "none", "nan", "<na>"):
        raise ValueError(f"the id is {name!r}, which other programs write where there is none")
    if len(name) > 1 and name[0] == name[-1] and name[0] in "\"'":
        raise ValueError(f"the id {name} stands in quotes that this table's separator does not "
                         "take off")
    if ROUNDED.fullmatch(name):
        raise ValueError(f"the id {name} is a number that a spreadsheet has rounded")
    if len(name) > 200:
        raise ValueError(f"an id of {len(name):,} characters ({name[:20]}…), 200 are allowed")
    if NOT_IN_IDS.search(name):
        raise ValueError(f"the id {ascii(name)} has a character that cannot be seen, "
                         "or half of one")
    return name


def renumber(codes, names):
    """Codes (N,) of the kept rows -> 0 … n-1 in the order of the raw ids, the n raw ids."""
    kept = sorted(np.unique(codes).tolist(), key=lambda code: natural(names[code]))
    new = np.full(len(names), -1)
    new[kept] = np.arange(len(kept))
    return new[codes], [names[code] for code in kept]


def natural(name):
    """Sort key: whole numbers by value, before everything else by text; 1, 01, 001 in one order."""
    if name.isascii() and name.isdecimal():
        digits = name.lstrip("0")
        return 0, len(digits), digits, name
    return 1, 0, name, name


def stars(text):
    """--min-rating: a finite number, or 'none' for no filter."""
    return text if text == "none" else number(float, -1e9, 1e9)(text)


def parse_day(day, flag, default=None):
    """2015-01-01 -> seconds since 1970, UTC; `default` when there is no day."""
    if not day:
        return default
    try:
        return iso_seconds(day)
    except ValueError:
        fail(f"{flag} {day}: not a date; write it as 2015-01-01")


def summarize(parts, n_users, items, seconds, with_meta):
    """The printed statistics, a list of lines."""
    # how many, how dense, how long the tails
    n_items, pairs = len(items), np.concatenate(list(parts.values()))
    sizes = "   ".join(f"{name} {len(part):,}" for name, part in parts.items())
    lines = [f"  users {n_users:,}   items {n_items:,}   pairs {len(pairs):,}   "
             f"density {len(pairs) / n_users / n_items:.3%}   {sizes}"]
    for axis, (name, n) in enumerate((("user", n_users), ("item", n_items))):
        q = np.quantile(np.bincount(pairs[:, axis], minlength=n), [0, 0.25, 0.5, 0.75, 1])
        lines.append(f"  pairs per {name}: min {q[0]:.0f}, quartiles {q[1]:.0f} {q[2]:.0f} "
                     f"{q[3]:.0f}, max {q[4]:.0f}")
    if not np.isnan(seconds).all():
        first, last = (datetime.fromtimestamp(t, timezone.utc)
                       for t in (np.nanmin(seconds), np.nanmax(seconds)))
        lines.append(f"  times: {first:%Y-%m-%d} to {last:%Y-%m-%d}")
    lines += cold_lines(parts, n_users, n_items)

    # the texts, which an LLM is to read
    titled = np.mean([bool(row["known"]) for row in items])
    further = np.mean([bool(row["text"]) for row in items])
    lines.append(f"  items with a title {titled:.1%}, with further text {further:.1%}; "
                 "for example:")
    for row in items[:: max(1, n_items // 3)][:3]:
        lines.append(f"    {row['raw']}: {row['title']} | {row['text'][:90]}")
    if with_meta:
        alike = len({row["title"] for row in items}) == 1 < n_items
        texts = " and no text tells them apart" if len({row["text"] for row in items}) == 1 else ""
        if alike:
            lines.append(f"  WARNING: all {n_items:,} items have the title {items[0]['title']!r}"
                         f"{texts}: nothing can be learnt from it; is --meta the right file?")
    return lines


def cold_lines(parts, n_users, n_items):
    """What the split leaves without a train pair: such users and items cannot be learnt from
    behaviour. Their pairs stay in valid and test. -> no line when there are none."""
    train, lines = parts["train"], []
    cold_user = np.bincount(train[:, 0], minlength=n_users) == 0
    cold_item = np.bincount(train[:, 1], minlength=n_items) == 0
    if cold_user.any() or cold_item.any():
        of = ", ".join(f"{(cold_user[p[:, 0]] | cold_item[p[:, 1]]).sum():,} of {len(p):,} {name}"
                       for name, p in parts.items() if name != "train")
        lines.append(f"  cold: {cold_user.sum():,} users and {cold_item.sum():,} items have no "
                     f"train pair; {of} pairs are theirs (kept)")
    return lines


# --------------------------------------------------------------------------------------------------
# prepare, part 2: the texts of items and reviews
# --------------------------------------------------------------------------------------------------

def read_items(path, form, raw_items, counts, title_limit=200, text_limit=400):
    """Metadata of the kept items, in id order -> rows {raw, title, text, known}. An item without a
    title gets its raw id; of an item's repeated rows the fullest counts.

    Raises SystemExit2 when no item is found, naming the column that would match."""
    found, wanted = {}, set(raw_items)

    def is_row(row):
        return metadata_id(row, form) in wanted

    # title and text of each item that is wanted; the rest of the file is passed over
    rows = []
    if path:
        rows = form.meta(path, is_row)
    for n, row in rows:
        raw = metadata_id(row, form)
        if raw not in wanted:
            continue
        try:
            title, texts = form.fields(row)
            texts = (clean(text, counts) for text in texts)
            fields = clean(title, counts), ". ".join(filter(None, texts))
        except KeyError as error:
            fail(f"{path}: line {n} has no column {error} (found: {', '.join(list(row)[:8])})")
        except ValueError as error:
            fail(f"{path}: line {n}: {error}; mend that line")
        if raw in found:
            counts["repeated metadata rows (the fullest counts)"] += 1
            fields = max(found[raw], fields, key=fullness)
        found[raw] = fields
    if path and len(found) < len(wanted) / 2:
        explain_missing(path, form, wanted, len(found))

    # a row for every item, found or not
    items = []
    for raw in raw_items:
        title, text = found.get(raw, ("", ""))
        counts[f"titles cut to {title_limit} characters"] += len(title) > title_limit
        counts[f"texts cut to {text_limit} characters"] += len(text) > text_limit
        title, text = title[:title_limit].rstrip(), text[:text_limit].rstrip()
        items.append({"raw": raw, "title": title or f"Item {raw}", "text": text,
                      "known": bool(title)})
    return items


def metadata_id(row, form):
    """The item id of a metadata row, None where there is none."""
    try:
        return id_text(row.get(form.key))
    except (ValueError, TypeError):
        return None


def fullness(fields):
    """Sort key of (title, text): one with a title first, then the longer; no ties but equals."""
    title, text = fields
    return bool(title), len(title) + len(text), title, text


def explain_missing(path, form, wanted, n_found):
    """Say that metadata lacks most items, and which column has them, exactly or written otherwise
    (1.0 or 01 against 1, small letters). Raises SystemExit2 when it has none of the items."""
    # each column's ids: those that are wanted as they stand, and those that would be
    alike = {loose(raw): raw for raw in wanted}
    exact, other, example, n_rows = {}, {}, {}, 0
    for _, row in form.meta(path, None):
        n_rows += 1
        for column, value in row.items():
            if not isinstance(value, (str, int, float)):
                continue
            raw, value = alike.get(loose(value)), str(value).strip()
            if value in wanted:
                exact.setdefault(column, set()).add(value)
            elif raw is not None:
                other.setdefault(column, set()).add(raw)
                example.setdefault(column, f"{value!r} there, {raw!r} in the interactions")

    # the column with most of either, if it has more than the one that was read
    best, near = (max(found, key=lambda column: len(found[column]), default=None)
                  for found in (exact, other))
    if best not in (None, form.key) and len(exact[best]) > n_found:
        mend = (f"its column {best!r} has {len(exact[best]):,} of them: rename that column to "
                f"{form.key!r}, or give the --format that reads it")
    elif near is not None and len(other[near]) > n_found:
        mend = (f"its column {near!r} would match {len(other[near]):,} of them if ids were written "
                f"alike ({example[near]}): write them alike")
    else:
        mend = "no column has more of them; is it the metadata of these interactions?"
    said = (f"{path}: column {form.key!r} of {n_rows:,} rows has {n_found:,} of the "
            f"{len(wanted):,} items; {mend}")
    if not n_found:
        fail(said)
    print(f"  WARNING: {said}", flush=True)


def loose(value):
    """An id as somebody else may have written it: 1.0 and 01 like 1, small letters."""
    return str(value).strip().lower().removesuffix(".0").lstrip("0")


def read_reviews(path, fmt, user_of_row, per_user, counts, limit=200):
    """A second pass over the file for review texts: up to `per_user` of each user. user_of_row:
    {number of a row: user id} of the train pairs' rows, so that no word about a validation or test
    item reaches a profile -> {user id: [text]}."""
    if not per_user or not FORMATS[fmt](path).text:
        return {}
    texts = {}
    for row, (n, *_, text) in enumerate(interactions(path, fmt), 1):
        own = texts.setdefault(user_of_row[row], []) if text and row in user_of_row else None
        if own is None or len(own) == per_user:
            continue
        try:
            whole, broken = SURROGATES.subn("\ufffd", text)
            text = clean(whole, counts)
        except (ValueError, TypeError) as error:
            fail(f"{path}: line {n}: {error}; mend that line")
        counts["halves of a character in reviews (replaced)"] += broken
        counts[f"reviews cut to {limit} characters"] += len(text) > limit
        if text:
            own.append(text[:limit].rstrip())
    return texts


SURROGATES = re.compile(r"[\ud800-\udfff]")  # half of a character: valid in JSON, not in UTF-8
NOT_IN_IDS = re.compile(
    r"[\x00-\x1f\x7f-\x9f\xad\u200b-\u200f\u2028-\u202e\u2060\ufeff\ud800-\udfff]")
ROUNDED = re.compile(r"\d[.,]\d+E\+\d\d")  # 1.23E+05
TAG = re.compile(
    r"<!--.*?-->|</?(?:a|abbr|b|big|blockquote|body|br|center|cite|code|dd|div|dl|dt|em|embed|font|"
    r"form|h[1-6]|head|hr|html|i|iframe|img|input|li|link|meta|ol|object|p|param|pre|s|script|"
    r"small|span|strike|strong|style|sub|sup|table|tbody|td|th|thead|title|tr|tt|u|ul)"
    r"(?:\s[^<>]*)?/?>", re.I | re.S)
BLOCK = re.compile(r"<(script|style)\b[^<>]*>.*?(?:</\1\s*>|$)", re.I | re.S)
# what a page's own program or style sheet looks like when its tags are gone
PROGRAM = re.compile(r"\bvar \w+ ?=.*;|\bfunction ?\w* ?\([^)]*\) ?\{|\(new Date\(\)\)|"
                     r"\bdocument\.\w+[(.=]|[.#]?[\w-]+ ?\{[^{}]*[\w-]+ ?:[^{}]+;[^{}]*\}", re.S)


def clean(value, counts):
    """A raw field as one line of text: lists joined, HTML entities decoded, tags, scripts, control
    characters and runs of white space taken out. `5 < 6 > 3` is no tag.

    counts: a Counter of repairs. Raises ValueError for what is no text: a dict, half of a
    character."""
    if value is None or value != value:  # NaN
        return ""
    if isinstance(value, (list, tuple)):
        return ", ".join(filter(None, (clean(one, counts) for one in value)))
    if isinstance(value, (bool, dict)):
        raise ValueError(f"{str(value)[:40]} is no text")
    text = str(value)
    if SURROGATES.search(text):
        raise ValueError(f"{ascii(text[:40])} holds half of a character (a lone surrogate)")
    if '""' in text and QUOTED.fullmatch(text):
        counts["texts in quotes as csv writes them (taken off)"] += 1
        text = text[1:-1].replace('""', '"')
    decoded = text
    while (further := ENTITY.sub(decode, decoded)) != decoded:  # &amp;amp; is found in the wild
        decoded = further
    counts["texts with HTML entities (decoded)"] += decoded != text
    plain = TAG.sub(" ", BLOCK.sub(" ", decoded))
    counts["texts with HTML tags (taken out)"] += plain != decoded
    if PROGRAM.search(plain):
        counts["texts that were a page's script or style (left out)"] += 1
        return ""
    return " ".join(CONTROL.sub(" ", plain).split())


CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]+")
QUOTED = re.compile(r'"(?:[^"]|"")*"')  # csv rules of quoting, in a file with tabs
ENTITY = re.compile(r"&(?:#\d+|#[xX][0-9a-fA-F]+|\w+);")


def decode(match):
    """The character of an HTML entity; as it stands when it is none (AT&T, Q&notes;)."""
    entity = match[0]
    known = entity[1] == "#" or entity[1:] in html.entities.html5
    return html.unescape(entity) if known else entity

# --------------------------------------------------------------------------------------------------
# prepare, part 3: readers. Each yields rows as they stand in the file; nothing is held.
# --------------------------------------------------------------------------------------------------

def interactions(path, fmt):
    """(line, user, item, rating, seconds, text) of each row; rating and seconds are NaN, text None,
    where the file has none. Times may be seconds, milli-, micro- or nanoseconds since 1970, one
    unit a file, or ISO dates (UTC where they name no zone).

    Raises SystemExit2 for a missing column or a value that is no number, naming file and line."""
    form, unit = FORMATS[fmt](path), 0  # unit of the times: not known yet

    def is_row(row):  # of a line inside quotes: is it a row that a quote left open has swallowed?
        try:
            numbers = [parse_number(row.get(form.rating)), parse_time(row.get(form.time))]
        except ValueError:
            return False
        if any(x == x for x in numbers):  # one is there: not NaN
            return True
        ids = row.get(form.user), row.get(form.item)
        return all(ids) and not any(" " in name for name in ids)

    for n, row in form.rows(path, is_row):
        try:
            user, item = row[form.user], row[form.item]
        except KeyError as error:
            fail(f"{path}: line {n} has no column {error} (found: {', '.join(list(row)[:8])}); "
                 f"--format {fmt} needs {form.user} and {form.item}")
        # a number, or nothing; never something else that is taken for nothing
        try:
            rating, moment = parse_number(row.get(form.rating)), parse_time(row.get(form.time))
        except (ValueError, TypeError):
            fail(f"{path}: line {n}: {form.rating} {row.get(form.rating)!r} is no number, or "
                 f"{form.time} {row.get(form.time)!r} no time; write a rating as 4.5, a time in "
                 "seconds since 1970 or as 2016-03-01 12:30:00")
        # the unit of the times follows from the first of them, and all others have to agree
        if moment:
            size = abs(moment)
            if not unit and moment == moment:  # the first time of the file that is there
                unit = next((u for u in (1, 1e3, 1e6, 1e9) if size < 7.3e9 * u), 0)  # year 2200
                if CALENDAR.fullmatch(f"{size:.0f}"):
                    fail(f"{path}: line {n}: {form.time} {row[form.time]!r} is a day of the "
                         "calendar, not seconds since 1970; write it as 2016-03-01")
            if size >= 7.3e9 * unit or unit > 1 and size < 1e8 * unit:  # NaN is neither
                fail(f"{path}: line {n}: {form.time} {row[form.time]!r} is no time in the unit of "
                     "the rows before, or none at all; write seconds since 1970")
        yield n, user, item, rating, moment / (unit or 1), row.get(form.text)


# 20160301 or 20160301123000; as seconds or microseconds they would be some day of August 1970
CALENDAR = re.compile(r"(?:19|20)\d\d(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])(?:\d{6})?")


def parse_number(value):
    """A field as a number, NaN where it is empty. Raises ValueError for anything else: what Python
    alone reads as one, 1_0 and true, is none."""
    if value is None or value == "":
        return math.nan
    number = float(value)
    if math.isinf(number) or value is True or value is False:
        raise ValueError(value)
    if isinstance(value, str) and "_" in value:
        raise ValueError(value)
    return number


def parse_time(value):
    """A number, or the seconds since 1970 of an ISO date; NaN where the field is empty."""
    try:
        return parse_number(value)
    except ValueError:
        return iso_seconds(value)


def iso_seconds(text):
    """2016-03-01, 2016-03-01 12:30:00, 2016-03-01T12:30:00Z -> seconds since 1970; UTC where it
    names no zone. Raises ValueError for anything else."""
    moment = datetime.fromisoformat(text.strip().replace("Z", "+00:00"))
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=timezone.utc)
    return moment.timestamp()


@contextmanager
def open_text(path, encoding="utf-8-sig"):  # -sig: without the mark that some programs put first
    """A text file, gzip-compressed when it begins as one. newline="" leaves quoted line ends to
    csv.

    Raises SystemExit2 when it is not there, is cut off, or holds something else than text."""
    path = Path(path)
    check_file(path)
    with open(path, "rb") as file:
        start = file.read(6)
    for mark, what in OTHER_FILES.items():
        if start.startswith(mark):
            fail(f"{path}: is {what}; text in UTF-8 is read, plain or as .gz")
    opener = gzip.open if start.startswith(b"\x1f\x8b") else open
    try:
        with opener(path, "rt", encoding=encoding, newline="") as file:
            yield file
    except (EOFError, gzip.BadGzipFile, zlib.error, UnicodeDecodeError) as error:
        fail(f"{path}: cannot be read to its end ({type(error).__name__}: {error}); is the "
             f"download whole, the text {encoding.removesuffix('-sig')}, and --format right?")


def check_file(path):
    """Raises SystemExit2 when there is no such file, or none that can be read from its start more
    than once."""
    path = Path(path)
    if not path.exists():
        fail(f"{path}: no such file; check --reviews, --meta and the three split files")
    if not path.is_file():
        kind = "a folder" if path.is_dir() else "a pipe or device"
        fail(f"{path}: is {kind}; give a file, since it is read more than once")


# how files begin that are not read, and what they are
OTHER_FILES = {b"PK\x03\x04": "a zip archive (unpack it)",
               b"BZh": "compressed by bzip2 (unpack it)",
               b"\xfd7zXZ\0": "compressed by xz (unpack it)",
               b"\x28\xb5\x2f\xfd": "compressed by zstd (unpack it)",
               b"PAR1": "a Parquet file (export it as csv)",
               b"\xff\xfe": "text in UTF-16 (save it as UTF-8)",
               b"\xfe\xff": "text in UTF-16 (save it as UTF-8)"}


def table_rows(path, is_row=None, sep=None, columns=None, encoding="utf-8-sig"):
    """(line, {column: value}) of each row of a delimited file.

    sep: left out, that of the first line.
    columns: the names, when the file has no header line. Comma and semicolon go with the csv rules
    of quoting, the others with none. is_row: tells a row from a line of text, to find rows that
    a quote swallowed. Raises SystemExit2 for a row with too few or too many fields, a quote that
    is never closed or closed rows later, and a column named twice."""
    csv.field_size_limit(2**20)  # a review can be long, a field of a MiB is a quote left open
    with open_text(path, encoding) as file:
        # the first line says what separates the fields, and is read again with the rest
        first = first_line(path, file)
        sep = sep or separator(first)
        lines = chain([first] if first else [], file)
        if len(sep) > 1:  # MovieLens 1M's "::"
            reader = (line.rstrip("\r\n").split(sep) if line.strip() else [] for line in lines)
        else:
            quoting = csv.QUOTE_MINIMAL if sep in ",;" else csv.QUOTE_NONE
            reader = csv.reader(lines, delimiter=sep, quoting=quoting, strict=True)
        names, line, end = columns, 1, 0  # a row may span lines: from `line` to `end`
        try:
            for row in reader:
                line, end = end + 1, getattr(reader, "line_num", end + 1)
                if names is None:
                    names = header_names(path, row)
                elif row:
                    if len(row) != len(names):
                        fail(f"{path}: line {line} has {len(row)} fields, the header has "
                             f"{len(names)}; mend that line (a separator inside a field wants "
                             "quotes around it, a quote inside quotes is doubled)")
                    if end > line and is_row and swallowed(row, names, sep, is_row):
                        fail(f"{path}: line {line}: a quote opened there is closed {end - line} "
                             "lines later, with whole rows inside; close or double it")
                    yield line, dict(zip(names, row))
        except csv.Error as error:
            fail(f"{path}: line {end + 1}: {error}: a quote is opened and not closed, or stands "
                 "inside quotes without being doubled; mend that line")


def first_line(path, file):
    """The first line of a table. Raises SystemExit2 where it is JSON."""
    line = next(file, "")
    if line.startswith(("{", "[")):
        fail(f"{path}: holds JSON, not a table; give the --format that reads it")
    return line


def separator(line):
    """That of tab, comma, semicolon and bar which a table's first line has most of."""
    return max("\t,;|", key=line.count)


def header_names(path, row):
    """Column names of a header line; RecBole's types (`user_id:token`) are dropped."""
    if not any(row):
        fail(f"{path}: line 1 is empty; a table begins with its header")
    names = [name.split(":")[0].strip() for name in row]
    twice = next((name for name in names if name and names.count(name) > 1), None)
    if twice:
        fail(f"{path}: column {twice!r} stands twice in the header; rename one of them")
    return names


def swallowed(row, names, sep, is_row):
    """Whether a field that spans lines holds lines that are rows of their own."""
    for field in row:
        for line in field.split("\n")[1:]:
            fields = line.rstrip("\r").split(sep)
            if len(fields) == len(names) and is_row(dict(zip(names, fields))):
                return True
    return False


def json_rows(path, is_row=None):
    """(line, object) of each line of a JSON-lines file; lines of 2014's metadata, which are
    Python literals, too. is_row is for tables. Raises SystemExit2 for any other line."""
    with open_text(path) as file:
        for n, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = python_literal(line)
            if not isinstance(row, dict):
                fail(f"{path}: line {n} is no JSON object ({line.strip()[:30]} …); these files "
                     "hold one JSON object a line (`jq -c .[] FILE` makes them of an array)")
            yield n, row


def python_literal(line):
    """A line of the form {'asin': 'x'}; None when it is none. Evaluates no code."""
    try:
        return ast.literal_eval(line.strip()) if line.lstrip().startswith("{") else None
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return None

# --------------------------------------------------------------------------------------------------
# prepare, part 4: the formats, one function each: path of the interactions -> Format
# --------------------------------------------------------------------------------------------------

class Format(NamedTuple):
    """How a format's two files are read. Columns that a file lacks are None."""

    user: str  # columns of the interactions
    item: str
    rating: str
    time: str
    text: str
    key: str  # the metadata's column of item ids
    fields: Callable  # metadata row -> title, [further texts], both as they stand in the file
    rows: Callable = json_rows  # reads the interactions: path, is_row -> (line, row) of each
    meta: Callable = json_rows  # reads the metadata, in the same way


def table(path):
    """A table with a header line: user, item and, if there, rating, timestamp, text. Its metadata:
    item, title, and all further columns as text. Other usual names of columns are understood."""
    names = header(path)
    user, item, rating, time, text = (column_of(names, role, path) for role in ROLES)

    def fields(row):
        title = column_of(list(row), "title", "the metadata")
        others = (value for name, value in row.items() if name not in ("", key, title))
        return row[title or "title"], others

    # the metadata's ids stand under the name that the interactions give them, or under `item`
    key = item or "item"
    return Format(user or "user", item or "item", rating, time, text, key, fields,
                  rows=table_rows, meta=table_rows)


ROLES = ("user", "item", "rating", "timestamp", "text")
# in small letters, without spaces and underscores
SYNONYMS = {"user": ("userid", "uid", "reviewerid"), "rating": ("stars", "overall", "score"),
            "item": ("itemid", "iid", "movieid", "bookid", "productid", "businessid", "asin",
                     "parentasin"),
            "timestamp": ("time", "date", "datetime", "unixreviewtime"),
            "text": ("review", "reviewtext"), "title": ("name", "movietitle", "itemname")}


def header(path):
    """The column names in a table's first line."""
    with open_text(path) as file:
        first = first_line(path, file)
    return header_names(path, next(csv.reader([first], delimiter=separator(first)), []))


def column_of(names, role, path):
    """The column that plays a role: the one of that name, else the only one of another usual name,
    else None. Raises SystemExit2 when there are two of those."""
    if role in names:
        return role
    found = [name for name in names
             if re.sub(r"[\s_]", "", name).lower() in (role, *SYNONYMS[role])]
    if len(found) > 1:
        fail(f"{path}: columns {' and '.join(found)} could each be the {role}; "
             f"rename the right one to {role}")
    return found[0] if found else None


def recbole(path):
    """RecBole's atomic files .inter and .item, whose title column differs from set to set."""

    def fields(row):
        name = next((column for column in ("movie_title", "title", "name") if column in row), None)
        if name is None:
            raise KeyError("title")
        year = row.get("release_year")
        others = (value for column, value in row.items()
                  if column not in ("item_id", name, "release_year"))
        return f"{row[name]} ({year})" if year else row[name], others

    tabs = partial(table_rows, sep="\t")
    return Format("user_id", "item_id", "rating", "timestamp", None, "item_id", fields, tabs, tabs)


def ml_100k(path):
    """MovieLens 100K: u.data (tabs) and u.item (bars, Latin-1, a 0/1 column for each genre)."""

    def fields(row):
        return row["title"], [", ".join(genre for genre in ML100K_GENRES if row[genre] == "1")]

    columns = ["item", "title", "date", "video", "url", *ML100K_GENRES]
    return Format("user", "item", "rating", "time", None, "item", fields,
                  partial(table_rows, sep="\t", columns=["user", "item", "rating", "time"]),
                  partial(table_rows, sep="|", columns=columns, encoding="latin-1"))


ML100K_GENRES = [
    "unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary",
    "Drama", "Fantasy", "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi",
    "Thriller", "War", "Western"]


def title_and_genres(row):
    """The fields of MovieLens' later sets, genres as Action|Drama."""
    return row["title"], [row["genres"].replace("|", ", ")]


def ml_1m(path):
    """MovieLens 1M: ratings.dat and movies.dat, both with `::`, the second in Latin-1."""
    columns = ["user", "item", "rating", "time"]
    return Format("user", "item", "rating", "time", None, "item", title_and_genres,
                  partial(table_rows, sep="::", columns=columns, encoding="latin-1"),
                  partial(table_rows, sep="::", columns=["item", "title", "genres"],
                          encoding="latin-1"))


def ml_latest(path):
    """MovieLens latest, 10M to 32M: ratings.csv and movies.csv."""
    commas = partial(table_rows, sep=",")
    return Format("userId", "movieId", "rating", "timestamp", None, "movieId", title_and_genres,
                  commas, commas)


def amazon2018(path):
    """Amazon Reviews 2018, and 2014, whose categories are a list of paths. The last two categories
    are the narrowest."""

    def fields(row):
        categories = row.get("category") or row.get("categories")
        return row.get("title"), [row.get("brand"), last_two(categories), row.get("description")]

    return Format("reviewerID", "asin", "overall", "unixReviewTime", "reviewText", "asin", fields)


def amazon2023(path):
    """Amazon Reviews 2023. An item's id is parent_asin: its variants share one."""

    def fields(row):
        store, categories = row.get("store"), last_two(row.get("categories"))
        return row.get("title"), [store, categories, row.get("description")]

    return Format("user_id", "parent_asin", "rating", "timestamp", "text", "parent_asin", fields)


def yelp(path):
    """The Yelp Open Dataset: review.json and business.json."""

    def fields(row):
        return row.get("name"), [row.get("city"), row.get("categories")]

    return Format("user_id", "business_id", "stars", "date", "text", "business_id", fields)


def last_two(categories):
    """The end of a path of categories, or of the last path of several; a string is one category."""
    if categories is None or isinstance(categories, str):
        return categories
    if not isinstance(categories, list):
        raise ValueError(f"the category {str(categories)[:40]} is neither a text nor a list")
    if categories and isinstance(categories[-1], list):
        categories = categories[-1]
    return categories[-2:]


FORMATS = {"table": table, "recbole": recbole, "ml-100k": ml_100k, "ml-1m": ml_1m,
           "ml-latest": ml_latest, "amazon2018": amazon2018, "amazon2023": amazon2023, "yelp": yelp}
# the paper's filters; published: users, items, interactions as the paper prints them
PRESETS = {
    "toys": {"format": "amazon2018", "min_rating": 4.0, "since": "2015-01-01",
             "until": "2018-01-01", "k_core": 10, "published": (22338, 9023, 200511)},
    "cds": {"format": "amazon2018", "min_rating": 4.0, "since": "2014-01-01",
            "until": "2016-01-01", "k_core": 10, "published": (19385, 8279, 186535)},
    "yelp2018": {"format": "yelp", "min_rating": 4.0, "since": "2015-01-01",
                 "until": "2018-01-01", "k_core": 10, "published": (29832, 16781, 513976)},
    "electronics2023": {"format": "amazon2023", "min_rating": 3.0, "since": "2010-01-01",
                        "until": "2018-01-01", "k_core": 10, "published": (97570, 44669, 178259)},
    "ml-100k": {"format": "ml-100k", "min_rating": 4.0, "k_core": 5},
    "ml-1m": {"format": "ml-1m", "min_rating": 4.0, "k_core": 5},
}

# --------------------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------------------

def main(argv=None):
    parser = Parser(prog="hnlmrec.py", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    p = commands.add_parser(
        "prepare", help="read, filter, split",
        epilog="example: python hnlmrec.py prepare --run runs/demo --format recbole "
               "--reviews ml-100k.inter --meta ml-100k.item")
    p.add_argument("--run", required=True, metavar="DIR",
                   help="folder for this run's files, made if needed")
    g = p.add_argument_group("raw files")
    g.add_argument("--format", choices=list(FORMATS), metavar="NAME",
                   help="%(choices)s (preset's, else table: a header line, then rows separated by "
                        "tabs, commas or semicolons)")
    g.add_argument("--reviews", metavar="FILE", help="interactions, .gz read directly")
    g.add_argument("--meta", metavar="FILE", help="item metadata; without it items have no text")
    g.add_argument("--reviews-per-user", type=number(int, 0), default=2, metavar="N",
                   help="review texts kept for a user's profile, of train pairs alone")
    g = p.add_argument_group("filters")
    g.add_argument("--preset", choices=list(PRESETS), metavar="NAME",
                   help="format and filters of %(choices)s; flags given beside it win")
    g.add_argument("--min-rating", type=stars, metavar="STARS",
                   help="keep ratings of at least this many, or `none` (preset's, else 4); of a "
                        "repeated pair the latest counts")
    g.add_argument("--since", metavar="DAY",
                   help="keep interactions from this day on, as 2015-01-01, UTC")
    g.add_argument("--until", metavar="DAY", help="keep interactions before this day")
    g.add_argument("--k-core", type=number(int, 1), metavar="N",
                   help="interactions each user and item must have (preset's, else 5)")
    g = p.add_argument_group("split")
    g.add_argument("--split", choices=["random", "last", "time"], default="random",
                   help="80/10/10 a user, each user's last two in time, or 80/10/10 of all pairs "
                        "by one cut in time")
    g.add_argument("--seed", type=number(int, 0), default=0, help="decides the random split")
    g.add_argument("--train-file", metavar="FILE",
                   help="your own split instead, with --valid-file and --test-file")
    g.add_argument("--valid-file", metavar="FILE", help="your own split's validation pairs")
    g.add_argument("--test-file", metavar="FILE", help="your own split's test pairs")
    p.add_argument("--force", action="store_true",
                   help="remake the output though it was made with other settings")

    p = commands.add_parser(
        "train", help="train backbone and projector with the LLM's negatives",
        epilog="example: python hnlmrec.py train --run runs/demo --alpha 0.5")
    add_training_flags(p)
    p.add_argument("--out", default="model-hnlmrec.safetensors",
                   help="output file inside the run folder")
    g = p.add_argument_group("the paper's own form")
    g.add_argument("--paper", action="store_true",
                   help="z as the negative of (e_u; e_i), and the paper's settings: "
                   + ", ".join(f"{name.replace('_', '-')} {value}" for name, value in PAPER.items())
                   + "; flags given beside it win")
    g.add_argument("--hinge", type=number(float, 0), default=0.0, metavar="MARGIN",
                   help="a hinge in place of BPR, as in the published code with 0.3; 0: BPR")
    g = p.add_argument_group("the negative e⁻")
    g.add_argument("--alpha", type=number(float, 0, 1), default=0.02, help="share of z in it")
    g.add_argument("--sampler", choices=["rns", "pns", "dns", "mixgcf", "ahns"], default="dns",
                   help="negative sampler of e_j")
    g.add_argument("--m", type=number(int, 0, 2**16), default=0,
                   help="its uniform candidates; 0: 4 to 64, by the number of items")
    g.add_argument("--clear", type=number(float, 0), default=0.0, metavar="G",
                   help="dns takes the candidate of highest score - G x relevance of its text to "
                        "the user, both in standard deviations")
    g = p.add_argument_group("the other losses")
    g.add_argument("--lambda1", type=number(float, 0), default=1.0,
                   help="weight of the alignment loss of z")
    g.add_argument("--lambda-s", type=number(float, 0), default=0.01,
                   help="weight of the semantic alignment (e_u, e_i; the items' texts)")
    g.add_argument("--tau-c", type=number(float, 0, open_low=True), default=0.2,
                   help="temperature of the alignment losses")
    g.add_argument("--align-rows", type=number(int, 2), default=512,
                   help="pairs a step that the alignment loss sees")
    g.add_argument("--text-init", type=number(float, 0, 1), default=1.0,
                   help="share of the items' texts in the initial vectors; the rest is random")
    g = p.add_argument_group("the projector")
    g.add_argument("--k", type=number(int, 1, 2**16), default=4,
                   help="generated vectors of the user that the self-attention sees")
    g.add_argument("--projector-width", type=number(int, 1), default=128, help="its width")
    g.add_argument("--no-attention", dest="attention", action="store_false",
                   help="ablation: projector without self-attention")
    g.add_argument("--refresh", type=number(int, 1), default=20,
                   help="steps between new values of z for BPR")
    g = p.add_argument_group("what it is trained with")
    g.add_argument("--negatives", default="negatives", help="first part of the shards' names")
    g.add_argument("--control", choices=["none", "random", "shuffled", "cleared"], default="none",
                   help="replace the LLM's vectors, to see what they are worth; cleared: shuffle "
                        "the texts of --clear alone")
    g.add_argument("--lambda-f", type=number(float, 0), default=0.0,
                   help="weight of L_false: likely false hard negatives above e⁻, below the "
                        "positives")
    g.add_argument("--gamma", type=number(float, 0), default=0.2,
                   help="within L_false, weight of the positive above the likely false one")
    g.add_argument("--judge", default="judge.safetensors", metavar="FILE",
                   help="where L_false has them from, of `llm_negatives.py judge`")
    g.add_argument("--text-vectors", metavar="FILE",
                   help="safetensors file with your own item vectors, `text` (I, H), rows as in "
                        "items.jsonl, in place of the LLM's reading")
    g.add_argument("--cf", default="cf.safetensors",
                   help="CF vectors that the alignment's hard negatives are mined with")
    add_band_flags(g)

    p = commands.add_parser(
        "blend", help="put a trained model, the judge of texts and other models into one score",
        epilog="example: python hnlmrec.py blend --run runs/demo")
    p.add_argument("--run", required=True, metavar="DIR", help="run folder")
    p.add_argument("--model", default="model-hnlmrec.safetensors",
                   help="trained model, or `none`")
    p.add_argument("--judge", default="judge.safetensors",
                   help="what `llm_negatives.py judge` wrote, or `none`")
    p.add_argument("--beside", default="", metavar="FILES",
                   help="other trained models, comma-separated, such as closed forms")
    p.add_argument("--rank", type=number(int, 1), default=1024,
                   help="numbers an item that a closed form may take; fewer items are exact")
    p.add_argument("--weights", default="0,0.125,0.25,0.5,1,2,4",
                   help="weights to choose from, on validation")
    p.add_argument("--force", action="store_true",
                   help="remake the output though it was made with other settings")
    p.add_argument("--out", default="model-hnlmrec-full.safetensors", help="output file")

    p = commands.add_parser(
        "trace", help="follow one (user, item) pair through a finished run",
        epilog="example: python hnlmrec.py trace --run runs/demo --user 196")
    p.add_argument("--run", required=True, metavar="DIR",
                   help="run folder in which `bash run.sh` has finished")
    p.add_argument("--user", required=True, metavar="RAW_ID",
                   help="the user's id as in the ratings file")
    p.add_argument("--item", metavar="RAW_ID",
                   help="a train item of that user (left out: the first)")
    p.add_argument("--model", default="model-hnlmrec.safetensors",
                   help="model file inside the run folder")
    args = parser.parse_args(argv)
    if args.command == "train" and args.paper:  # the paper's values as defaults, and once more
        commands.choices["train"].set_defaults(**PAPER)
        args = parser.parse_args(argv)
    programs = {"prepare": prepare, "train": train_hnlmrec, "blend": blend, "trace": trace}
    programs[args.command](args)


if __name__ == "__main__":
    run_cli(main)
    end_processes()
