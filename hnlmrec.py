"""hnlmrec.py: the recommender trained with the LLM's negatives and the judge, and its data.

prepare   ratings and item metadata -> data.safetensors, items.jsonl, users.jsonl
judge     texts, data .safetensors -> judge.safetensors: a score of how well an item's text
          fits a user, and each user's likely false negatives. Runs no LLM
train     data, cf, negatives-*, texts (and judge) .safetensors -> model-hnlmrec.safetensors
              z   = MLP(self-attention over K generated vectors of the user)   Projector
              e⁻  = alpha z + (1 - alpha) e_j, j a sampled item                mix
              L   = BPR(e_u, e_i, e⁻) + lambda1 L_align(z; e_i, mined) + lambda_s L_sem(e_u, e_i;
                    texts) + lambda_f L_false(e_u; e_i > e_f > e⁻) + lambda2 ‖Θ‖²    HNLMRec
          and with --paper as the paper has it: PaperHNLMRec
blend     several recommenders -> model-full.safetensors: one score, weights by validation
trace     follows one (user, item) pair from the raw line to the gradient

The method comes first: negatives and losses, the judge, further pieces. Then the programs.

Example: python hnlmrec.py prepare --run runs/NAME --reviews ratings.tsv --meta items.tsv
         python hnlmrec.py train --run runs/NAME
"""

import ast, codecs, csv, functools, gzip, html.entities, io, json, math, re, time, unicodedata, zlib
from argparse import BooleanOptionalAction, Namespace
from collections import Counter, defaultdict, namedtuple
from contextlib import suppress
from datetime import datetime, timezone
from itertools import chain, product
from pathlib import Path
from reprlib import repr as quote  # a value in a message: escaped, and cut

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import backbones as bb
from backbones import (  # the method's names are bare, so that its pieces can be pasted
    Parser, best_epoch, bpr_loss, contains, fail, fit, l2_loss, leave_out, line_search, ndcg,
    number, own_among, pair_keys, rank, restore, rows_of, run_cli, sampled_softmax_loss,
    standardised, sum_of_rows, take, top_k, user_rows, validation)

# ==== 1. The negative e⁻ and the loss =============================================================
# Shapes: U users, I items, N train pairs, n generated vectors, B rows of a batch, K vectors of one
# user, L ranks of a band; D numbers of a final vector, H of a hidden state or a text, W of a map

class Projector(nn.Module):
    """Self-attention over K generated vectors of one user, then an MLP into the recommender's space
    (paper, stage 2): (B, K, H) -> z (B, D). Slot 0, the vector that z stands for, is the only
    query; what it attends to is added to it. hidden (n, H), n at least 2: generated vectors, whose
    mean and deviation standardise h. attention=False leaves only the MLP (an ablation)."""
    def __init__(self, hidden, dim, width=128, attention=True):
        super().__init__()
        # standardised, as a few dimensions of an LLM's states dwarf the rest; one may be constant
        self.register_buffer("mean", hidden.float().mean(0))
        self.register_buffer("std", hidden.float().std(0).clamp(min=1e-3))
        self.inward = nn.Linear(hidden.shape[1], width)
        self.query = self.key = self.value = None
        if attention:  # one head is enough: one query, slot 0, and K = 4 keys
            self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, dim))

    def forward(self, hidden):
        return self.attend(self.read(hidden))

    def read(self, hidden):
        """(…, H) -> (…, W), each vector by itself."""
        return self.inward((hidden.float() - self.mean) / self.std)

    def attend(self, x):
        """(B, K, W) -> (B, D): slot 0, informed by the others."""
        slot = x[:, 0]
        if self.query is not None:  # slot 0 attends to all K
            weight = torch.einsum("bw,bkw->bk", self.query(slot), self.key(x)) / x.shape[-1] ** 0.5
            slot = slot + torch.einsum("bk,bkw->bw", weight.softmax(-1), self.value(x))  # (B, W)
        return self.mlp(slot)


class NegativeTable:
    """Which generated vectors a train pair uses: its own first, then random ones of its user, drawn
    with replacement, so that its own may come again.

    generated (n, 2): the (user, item) pair of each generated vector, none twice, users ascending;
    train (N, 2): the pairs that are trained on. `own` counts the train pairs with a vector of their
    own, `without` those whose user has none at all; the rest use their user's other vectors."""
    def __init__(self, generated, train, n_users, n_items):
        if not len(generated) or (generated[:, 0].diff() < 0).any():
            fail("generated: no pair, or users not ascending; sort pairs and vectors by user")
        self.users, self.train_users = generated[:, 0], train[:, 0]
        # user u's vectors are rows start[u] … start[u] + count[u] - 1
        self.count = torch.bincount(self.users, minlength=n_users)
        self.start = self.count.cumsum(0) - self.count
        # a train pair's own vector is found by binary search among the generated pairs' keys
        keys, order = (generated[:, 0].long() * n_items + generated[:, 1]).sort()
        query = train[:, 0].long() * n_items + train[:, 1]
        at = torch.searchsorted(keys, query).clamp(max=len(keys) - 1)
        self.row = torch.where(keys[at] == query, order[at], -1)  # (N,) each pair's own, -1: none
        self.own = int((self.row >= 0).sum())
        self.without = int((self.count[self.train_users] == 0).sum())

    def __call__(self, rows, k, generator=None):
        """Train rows (B,) -> rows of the generated vectors (B, k); -1 where a user has none."""
        users, first = self.train_users[rows], self.row[rows]
        chosen = self.others(users, k, generator)
        chosen[:, 0] = torch.where(first >= 0, first, chosen[:, 0])
        return chosen.masked_fill((self.count[users] == 0)[:, None], -1)

    def others(self, users, k, generator=None):
        """Users (B,) -> k random rows of each user's vectors (B, k), any rows if there are none."""
        # one draw for all users, however many vectors each has; the modulo's bias is negligible
        point = torch.randint(2**31, (len(users), k), generator=generator, device=users.device)
        return self.start[users][:, None] + point % self.count[users][:, None].clamp(min=1)


def mix(z, sampled, alpha):
    """e⁻ = alpha z' + (1 - alpha) e_j: z, sampled (B, D) -> (B, D). z' is z scaled to the
    norm of e_j (the paper: z as is). That norm gets no gradient, z only through its direction."""
    # the norm of z means nothing, since L_align trains by cosines. PaperHNLMRec mixes z as it is
    z = F.normalize(z, dim=-1) * sampled.detach().norm(dim=-1, keepdim=True)
    return alpha * z + (1 - alpha) * sampled


def alignment_loss(z, positives, mined, user_ids, tau):
    """L_align, the only loss that trains the projector (ours; the paper's is L_CL): it pulls z to
    e_m, a hard negative mined for its user, and away from its e_i and other users' e_m': mean of
    -ln( exp(c_m) / (exp(c_m) + sum exp(c_m') + exp(c_i)) ),  c_x = cos(z, e_x) / tau.

    z, positives, mined (B, D), gradient into all three (HNLMRec detaches the last two); user_ids
    (B,): rows of one user are not each other's negatives -> scalar."""
    z, positives, mined = (F.normalize(v, dim=-1) for v in (z, positives, mined))
    # rows of one user share their mined items; an item mined for another user too stays a negative
    same = user_ids[:, None] == user_ids[None]
    same.fill_diagonal_(False)
    scores = (z @ mined.T).masked_fill(same, -torch.inf)  # (B, B)
    liked = (z * positives).sum(-1, keepdim=True)  # (B, 1): e_i is one more negative here
    target = torch.arange(len(z), device=z.device)
    return F.cross_entropy(torch.cat([scores, liked], 1) / tau, target)


def paper_contrastive_loss(e_u, e_i, z, tau):
    """L_CL, the paper's own alignment loss, z the negative of the pair (e_u; e_i): the mean of
    -ln( exp(p) / (exp(p) + exp(n)) ),  p = cos(e_u, e_i) / tau,  n = cos(e_u, z) / tau.

    e_u, e_i, z (B, D), gradient into all three -> scalar."""
    positive = F.cosine_similarity(e_u, e_i) / tau  # (B,)
    negative = F.cosine_similarity(e_u, z) / tau  # (B,)
    # L_CL = ln(1 + exp(n - p)), which softplus computes without overflow
    return F.softplus(negative - positive).mean()


def semantic_alignment(vectors, texts, tau):
    """L_sem (RLMRec-Con, Ren et al., WWW 2024), InfoNCE between rows: vectors (A, D) of A users or
    items, texts (A, D): theirs, projected; gradient into both -> scalar."""
    scores = F.normalize(vectors, dim=-1) @ F.normalize(texts, dim=-1).T / tau  # (A, A)
    return F.cross_entropy(scores, torch.arange(len(scores), device=scores.device))


class HNLMRec(nn.Module):
    """Backbone, projector and semantic projector, trained together: `loss` is one step of

        L = BPR(e_u, e_i, e⁻) + lambda1 L_align + lambda_s L_sem + lambda_f L_false + lambda2 ‖Θ‖²

        L_false = BPR(e_u, e_f, e⁻) + gamma BPR(e_u, e_i, e_f), f from `likely`

    (‖Θ‖² by l2_loss; f's has weight lambda_f lambda2). backbone: a Backbone; draw: from
    make_sampler, for e_j; with L_false its penalty is likely.penalty. pairs (N, 2): train. For z:
    projector; hidden (n, H): generated vectors; table: a NegativeTable of them; mined: Bands.
    semantic: a SemanticProjector; likely: a LikelyFalse. What a weight of 0 turns off may be
    None."""

    # pairs per step that L_align and L_sem see: more only cost time
    align_rows, semantic_rows = 128, 1024
    refresh = 20  # steps between new values of z for BPR: old and new have a cosine of about .9

    # reg: lambda2; gamma weighs e_i > e_f; tau_c: temperature of L_align and L_sem; k: K
    def __init__(self, backbone, draw, pairs, *, projector=None, table=None, hidden=None,
                 mined=None, semantic=None, likely=None, alpha=0.02, lambda1=1.0, lambda_s=0.01,
                 lambda_f=0.0, gamma=0.2, reg=1e-4, tau_c=0.2, k=4):
        super().__init__()
        self.backbone, self.projector, self.semantic = backbone, projector, semantic
        self.draw, self.pairs, self.likely = draw, pairs, likely
        self.table, self.hidden, self.mined, self.k = table, hidden, mined, k
        self.alpha, self.lambda1, self.lambda_s, self.reg = alpha, lambda1, lambda_s, reg
        self.lambda_f, self.gamma, self.tau_c = lambda_f, gamma, tau_c
        self.z, self.steps = None, 0  # what z_of_all keeps between its refreshes

    def modules_trained(self):
        """{name: module} for `fit`, without those that are None."""
        return dict(self.named_children())

    def loss(self, rows, generator):
        """For `fit`: rows (B,) of the pairs, B >= 1 -> (scalar, {term: its unweighted value})."""
        u, i = self.pairs[rows].T  # (B,), (B,)
        # which generated vector: the pair's own, else another of its user's; -1: none
        made = self.table(rows, 1, generator)[:, 0] if self.table else None  # (B,)
        sample = self.draw(u, i, generator)
        users, positives, negatives = sample.users, sample.positives, sample.negatives  # e_j so far

        # BPR: the positive e_i above e⁻. No gradient enters z: it would teach the projector to
        # make easy negatives. A user without vectors, -1 in `made`, has e⁻ = e_j: row -1 is unused
        if self.alpha:
            mixed = mix(self.z_of_all(generator)[made], negatives, self.alpha)
            negatives = torch.where((made >= 0)[:, None], mixed, negatives)
        bpr = bpr_loss(self.backbone.score(users, positives), self.backbone.score(users, negatives))

        # L2, of the parameters behind users, positives and sampled items (in L_false behind f, too)
        ego_users, ego_items = self.backbone.ego()
        l2 = l2_loss(take(ego_users, u), take(ego_items, i), take(ego_items, sample.negative_ids))
        loss, logs = bpr + self.reg * l2, {"bpr": bpr.item()}

        # L_false: a likely false negative f stands above e⁻ and below the positive, so that what
        # the texts say of the user reaches the vectors
        if self.lambda_f:
            f = self.likely(u, generator)  # (B,)
            false_score = self.backbone.score(users, take(sample.all_items, f))  # (B,)
            above = bpr_loss(false_score, self.backbone.score(users, negatives))
            below = bpr_loss(self.backbone.score(users, positives), false_score)
            false = above + self.gamma * below
            loss = loss + self.lambda_f * (false + self.reg * l2_loss(take(ego_items, f)))
            logs["false"] = false.item()

        # L_align, on the first rows: z near one of the user's mined items. It trains only
        # the projector, towards the current vectors of these items
        a = rows[made >= 0][:self.align_rows] if self.lambda1 else rows[:0]  # (A,): what it sees
        if len(a):
            u_a, i_a = self.pairs[a].T
            z = self.projector(self.hidden[self.table(a, self.k, generator)])  # (A, D)
            band, items = self.mined[u_a], sample.all_items.detach()  # (A, L), (I, D)
            pick = torch.randint(band.shape[1], (len(a), 1), generator=generator, device=a.device)
            mined = take(items, band.gather(1, pick)[:, 0])  # (A, D)
            align = alignment_loss(z, take(items, i_a), mined, u_a, self.tau_c)
            loss = loss + self.lambda1 * align
            logs["align"] = align.item()

        # L_sem, on the first rows: e_u and e_i near their projected texts
        if self.lambda_s:
            some_users, some_items = (ids[:self.semantic_rows].unique() for ids in (u, i))
            user_texts, item_texts = self.semantic(some_users, some_items)
            user_vectors = take(sample.all_users, some_users)
            item_vectors = take(sample.all_items, some_items)
            semantic = (semantic_alignment(user_vectors, user_texts, self.tau_c)
                        + semantic_alignment(item_vectors, item_texts, self.tau_c))
            loss = loss + self.lambda_s * semantic
            logs["semantic"] = semantic.item()
        return loss, logs

    @torch.no_grad()
    def z_of_all(self, generator):
        """z of every generated vector (n, D), without gradient, made anew every `refresh` steps."""
        if self.steps % self.refresh == 0:
            rows = torch.arange(len(self.hidden), device=self.hidden.device)
            others = self.table.others(self.table.users, self.k - 1, generator)
            sets = torch.cat([rows[:, None], others], 1)  # (n, K)
            # each vector is read once, though it stands in many sets
            x = torch.cat([self.projector.read(part) for part in self.hidden.split(4096)])  # (n, W)
            self.z = torch.cat([self.projector.attend(x[part]) for part in sets.split(4096)])
        self.steps += 1
        return self.z


class PaperHNLMRec(HNLMRec):
    """The paper's own form of the loss, with the options of its published code:

        e⁻  = alpha z + (1 - alpha) e_j
        L   = BPR(e_u, e_i, e⁻) + lambda1 L_CL(e_u, e_i, z) + lambda2 ‖Θ‖².

    z is not rescaled. As in the published code the projector is in no optimizer, unless
    train_projector: BPR's gradient then trains it too, towards easy negatives. hinge: above 0, the
    margin of a hinge in place of BPR. The paper's weights are in PAPER."""
    def __init__(self, *args, hinge=0.0, train_projector=False, **kwargs):
        super().__init__(*args, **kwargs)
        self.hinge, self.train_projector = hinge, train_projector

    def modules_trained(self):
        named = {"backbone": self.backbone, "projector": self.projector}
        return named if self.train_projector else {"backbone": self.backbone}

    def loss(self, rows, generator):
        # the batch's users, positives and sampled items e_j
        u, i = self.pairs[rows].T  # (B,), (B,)
        sample = self.draw(u, i, generator)

        # e⁻: z mixed into e_j in the rows (A of B) whose user has generated vectors
        sets = self.table(rows, self.k, generator)  # (B, K)
        has = (sets[:, 0] >= 0).nonzero()[:, 0]  # (A,)
        ids, place = sets[has].unique(return_inverse=True)  # each vector is read once
        with torch.set_grad_enabled(self.train_projector):
            z = self.projector.attend(take(self.projector.read(self.hidden[ids]), place))  # (A, D)
        mixed = self.alpha * z + (1 - self.alpha) * take(sample.negatives, has)
        negatives = sample.negatives.index_copy(0, has, mixed)  # (B, D)

        # the positive e_i above e⁻: BPR, as the paper prints, or the hinge of its published code
        positive_score = self.backbone.score(sample.users, sample.positives)  # (B,)
        negative_score = self.backbone.score(sample.users, negatives)  # (B,)
        if self.hinge:
            ranking = F.relu(self.hinge - (positive_score - negative_score)).mean()
        else:
            ranking = bpr_loss(positive_score, negative_score)

        # L_CL: e_u near e_i and far from z; L2 as in HNLMRec
        contrast = ranking.new_zeros(())
        if len(has):
            pair = take(sample.users, has), take(sample.positives, has)
            contrast = paper_contrastive_loss(*pair, z, self.tau_c)
        ego_users, ego_items = self.backbone.ego()
        l2 = l2_loss(take(ego_users, u), take(ego_items, i), take(ego_items, sample.negative_ids))
        logs = {"hinge" if self.hinge else "bpr": ranking.item(), "contrast": contrast.item()}
        return ranking + self.lambda1 * contrast + self.reg * l2, logs

# ==== 2. The judge ================================================================================
# The judge predicts what a user likes from texts, as a frozen LLM reads them. In training, one item
# is left out of a user's history, and the judge has to rank it above items drawn at random. Unseen
# items that it then ranks high are likely false negatives. Beyond the paper

def whiten(text):
    """Texts (I, H) -> (I, H), rows of length 1 whose inner products are cosines of whitened texts:
    centred, rotated to principal axes (strongest last), each divided by its deviation, or by a
    hundredth of the largest deviation if that is more."""
    # standardising each dimension is not enough: a few strong axes, each spread over many
    # dimensions, would decide the cosines
    text = text.float()
    centred = text - text.mean(0)
    variance, axes = torch.linalg.eigh(centred.T @ centred)  # (H,), (H, H)
    # the floor, 1e-4 of the largest variance, keeps noise and rounding small. In an LLM's middle
    # layers, where one axis has 98 % of the variance, most axes lie below it; in layer 0 few do.
    # + 1e-24: no division by 0 where texts are all alike
    scale = variance.clamp(min=variance[-1] * 1e-4 + 1e-24) ** -0.5
    return F.normalize(centred @ axes * scale, dim=1)


def whitened_texts(readings):
    """Readings (text vectors, one (I, H) per layer), whitened -> (I, T) of length 1, joined."""
    return F.normalize(torch.cat([whiten(layer) for layer in readings], 1), dim=1)


def similarity(cosine, beta):
    """exp(beta (cosine - 1)), the summand of soft_maximum. The - 1 keeps it at most 1."""
    return (beta * (cosine - 1)).exp()


def soft_maximum(total, count, scale, beta):
    """scale (ln(mean of exp(beta (c - 1))) / beta + 1) of some cosines c: total is the sum of their
    similarity(c, beta), count their number. beta near 0: scale times the mean cosine; large: scale
    times the largest, as long as that mean is above 1e-12."""
    # its input is a sum: Judge.scores adds rows of one table; training subtracts one item
    return scale * ((total / count.clamp(min=1)).clamp(min=1e-12).log() / beta + 1)


class Judge(nn.Module):
    """A text-based recommender: an item's score is its bias plus its similarity to the user's train
    items k, above all to the most similar one:

        score(u, j) = b_j + soft_maximum over k of cos(h_k, v_j).

    tables, from JudgeMaps.tables(): history (I, W): h; item (I, W): v; bias (I,): b; shape (2,):
    scale and beta of soft_maximum. h and v have length 1. train (N, 2). A user without a train pair
    is ranked by the biases alone."""
    def __init__(self, tables, train, n_users):
        super().__init__()
        self.history, self.items, self.bias, shape = (
            tables[name].float() for name in ("history", "item", "bias", "shape"))
        self.scale, self.beta = shape.tolist()
        self.n_users, self.n_items = n_users, len(self.items)
        self.train_rows = user_rows(train, n_users)
        self.kept = None  # (I, I), see scores

    @torch.no_grad()
    def scores(self, users, most=2**28, block=None):
        """users (B,) -> (B, I), a new tensor."""
        block = block or min(2**11, 2**25 // self.n_items + 1)  # items; 128 MiB of similarities
        place, own = rows_of(self.train_rows, users)
        # an item is in many histories: for up to 16,384 items, all similarities are cached (1 GiB)
        if self.n_items**2 <= most:
            if self.kept is None:
                self.kept = self.bias.new_empty(self.n_items, self.n_items)
                for rows in torch.arange(self.n_items, device=own.device).split(block):
                    self.kept[rows] = similarity(self.history[rows] @ self.items.T, self.beta)
            total = sum_of_rows(self.kept, place, own, len(users))  # (B, I)
        else:
            total = self.bias.new_zeros(len(users), self.n_items)
            for at, rows in zip(place.split(block), own.split(block)):
                alike = similarity(self.history[rows] @ self.items.T, self.beta)  # (P, I)
                total.index_add_(0, at, alike)
        count = torch.bincount(place, minlength=len(users))[:, None]
        return soft_maximum(total, count, self.scale, self.beta) + self.bias


class JudgeMaps(nn.Module):
    """What the judge learns: two linear maps of the items' texts, history_map for a history's items
    and item_map for judged ones, a bias per item, scale and beta. tables() -> a Judge's `tables`.

    readings: a list of (I, H), one per layer; train (N, 2); width: W; beta: its initial value. At
    first the maps are identities, the bias is ln(1 + count) / 2, scale 1 / .07."""

    # width 576: the default LLM's own; wider maps overfit small data. beta 4: a cosine of .9
    # then counts five times as much as one of .5
    def __init__(self, readings, train, width=576, beta=4.0):
        super().__init__()
        text = whitened_texts(readings)
        self.register_buffer("text", text, persistent=False)  # (I, T)
        width = min(width, text.shape[1])
        self.history_map = nn.Linear(text.shape[1], width, bias=False)
        self.item_map = nn.Linear(text.shape[1], width, bias=False)
        # identities: an untrained judge compares the W strongest axes of the first reading, which
        # `whiten` puts last; if that has fewer than W, also the weakest of the next reading
        first = max(0, readings[0].shape[1] - width)
        for linear in (self.history_map, self.item_map):
            nn.init.zeros_(linear.weight)
            linear.weight.data[:, first:first + width].fill_diagonal_(1)
        # starts at half the log popularity. With uniform negatives the best bias would be all of
        # it, were popular items not also more similar to histories, which covers a part
        count = torch.bincount(train[:, 1], minlength=len(text)).float()
        self.bias = nn.Parameter(0.5 * (count + 1).log())  # (I,)
        self.log_scale = nn.Parameter(torch.tensor(1 / 0.07).log())  # CLIP's temperature
        # ln beta / 10: Adam moves every parameter by about lr a step, and ln beta has further to go
        self.tenth_log_beta = nn.Parameter(torch.tensor(float(beta)).log() / 10)

    def shape(self):
        """(scale, beta) of soft_maximum."""
        return self.log_scale.exp(), (10 * self.tenth_log_beta).exp()

    @torch.no_grad()
    def tables(self):
        """{name: tensor} of a judge's file: history, item (I, W), bias (I,), shape (2,)."""
        return {"history": F.normalize(self.history_map(self.text), dim=1),
                "item": F.normalize(self.item_map(self.text), dim=1),
                "bias": self.bias.detach().clone(), "shape": torch.stack(self.shape())}


def make_judge_step(maps, train, n_users, n_negatives=1024, most=64, dropout=0.0):
    """A step for `fit`, whose rows are users. Each train item of a user is left out in
    turn; the user's others score it and n_negatives items, drawn uniformly for the batch, of
    which the user's train items do not count. Loss: softmax, averaged over left-out items. most:
    train items per user; dropout: share of text entries set to 0 (Srivastava et al., JMLR 2014);
    both drawn each step.

    train (N, 2) -> step(users (B,), of two train pairs or more, generator) -> (scalar, {})."""
    # 1,024 negatives: a batch's table is (P, N), and time grows with it. 64 items of a user: one
    # who has thousands would fill the batch, and (B, 64, 64) below grows as the square
    train_rows, n_items = user_rows(train, n_users), len(maps.text)

    def step(users, generator):
        # their train items, P in all: each one's user (its place in the batch) and slot there
        place, own = rows_of(train_rows, users)
        order = torch.rand(len(own), generator=generator, device=own.device, dtype=torch.float64)
        order = (place + order).argsort()  # shuffled within a user, since only `most` are kept
        place, own = place[order], own[order]
        count = torch.bincount(place, minlength=len(users))
        slot = torch.arange(len(own), device=own.device) - (count.cumsum(0) - count)[place]
        place, own, slot = place[slot < most], own[slot < most], slot[slot < most]
        count = count.clamp(max=most)

        # each item is mapped once; one drawn c times counts c-fold in the softmax
        drawn = torch.randint(n_items, (n_negatives,), generator=generator, device=own.device)
        drawn, times = drawn.unique(return_counts=True)  # (N,), (N,)
        items, at = own.unique(return_inverse=True)
        mapped = maps.history_map(F.dropout(maps.text[items], dropout))
        history = take(F.normalize(mapped, dim=1), at)  # (P, W)
        items, at = torch.cat([own, drawn]).unique(return_inverse=True)
        mapped = maps.item_map(F.dropout(maps.text[items], dropout))
        judged = take(F.normalize(mapped, dim=1), at)  # (P + N, W)
        own_vectors, drawn_vectors = judged.split([len(own), len(drawn)])

        # positives: each item scored by its user's others, as (B, S, S) with S slots per user
        scale, beta = maps.shape()
        empty = history.new_zeros(len(users), int(count.max()), history.shape[1])  # (B, S, W)
        past, left_out = (empty.index_put((place, slot), x) for x in (history, own_vectors))
        alike = similarity(past @ left_out.mT, beta)  # (B, S, S): user, history item, left-out one
        slots = torch.arange(alike.shape[1], device=own.device)
        # a filled slot of the history, and not the item that is left out itself
        is_other = (slots < count[:, None])[:, :, None] & (slots[:, None] != slots)
        total = (alike * is_other).sum(1)[place, slot]  # (P,)
        others = count[place] - 1
        positive = soft_maximum(total, others, scale, beta) + maps.bias[own]  # (P,)

        # negatives: each drawn item, scored by all of the user's items but the left-out one
        alike = similarity(history @ drawn_vectors.T, beta)  # (P, N)
        of_user = alike.new_zeros(len(users), len(drawn)).index_add(0, place, alike)  # (B, N)
        total = take(of_user, place) - alike  # (P, N)
        negative = soft_maximum(total, others[:, None], scale, beta)
        negative = negative + maps.bias[drawn] + times.log()
        among = own_among(drawn, users[place], train_rows, n_items)
        negative = negative.index_put(among, negative.new_tensor(-torch.inf))
        return sampled_softmax_loss(positive, negative), {}

    return step


@torch.no_grad()
def likely_items(judge, n, cells=2**23):
    """The n <= I unseen items that the judge ranks highest for each user, (U, n) int64, and their
    shares (U, n), a softmax of the n scores; -1 and share 0 where a user has fewer. judge: a Judge;
    cells: scores held at once."""
    # some users at a time: all scores at once would be U x I
    items, share = [], []
    everyone = torch.arange(judge.n_users, device=judge.bias.device)
    for users in everyone.split(max(1, cells // judge.n_items)):
        scores = leave_out(judge.scores(users), users, judge.train_rows)
        best, listed = scores.topk(n)
        items.append(listed.masked_fill(best == -torch.inf, -1))
        share.append(best.softmax(1).nan_to_num())
    return torch.cat(items), torch.cat(share)


class LikelyFalse:
    """For each user in the batch, samples one unseen item that the judge thinks the user would
    like: users (B,) -> items (B,). items (U, n) ids, -1: none; share (U, n): how often each is
    drawn. n_items: I."""
    def __init__(self, items, share, n_items):
        self.listed, self.border = items.long(), share.cumsum(1)  # (U, n), (U, n)
        user, place = (self.listed >= 0).nonzero().T
        listed = torch.stack([user, self.listed[user, place]], 1)
        self.penalty = keep_clear(pair_keys(listed, n_items), n_items)  # dns avoids them

    def __call__(self, users, generator=None):
        border = self.border[users]  # (B, n)
        point = torch.rand(len(users), 1, generator=generator, device=users.device)
        # right=True: a share of 0 is never drawn. A user with nothing listed would get item 0, but
        # then has no unseen item, and the samplers refuse such a user at the start
        place = torch.searchsorted(border, point * border[:, -1:], right=True)
        drawn = self.listed[users].gather(1, place.clamp(max=border.shape[1] - 1))[:, 0]
        return drawn.clamp(min=0)


def keep_clear(keys, n_items):
    """A penalty for `dns` (top 1) that rules out the (user, item) pairs of sorted pair_keys while
    another candidate remains: users (B,), candidates (B, M) -> (B, M), infinite or 0."""
    def penalty(users, candidates):
        listed = contains(keys, users[:, None], candidates, n_items)
        return torch.zeros(listed.shape, device=listed.device).masked_fill(listed, torch.inf)

    return penalty

# ==== 3. Further pieces, beyond the paper (which names L_sem but gives no form) ==================
# Item texts as vectors of the recommender (for L_sem, and to start from), and as a score

class SemanticProjector(nn.Module):
    """Texts in the recommender's space: user ids (A,), item ids (B,) -> (A, D), (B, D), an MLP of
    the items' texts, and of their sum over the user's train items, as rows of length 1. text
    (I, H), row i of item i; train (N, 2), on the same device; dim: D."""
    def __init__(self, text, train, n_users, dim, width=128):
        super().__init__()
        # rows of length 1 first, so that a user's items count equally. Not saved: they are rebuilt
        # from the texts' file
        items = F.normalize(standardised(text), dim=1)
        users = sum_of_rows(items, *train.T, n_users)
        self.register_buffer("item", items, persistent=False)  # (I, H)
        self.register_buffer("user", F.normalize(users, dim=1, out=users), persistent=False)
        self.mlp = nn.Sequential(
            nn.Linear(text.shape[1], width), nn.LeakyReLU(), nn.Linear(width, dim))

    def forward(self, users, items):
        return self.mlp(self.user[users]), self.mlp(self.item[items])


def text_start(text, train, n_users, dim, std):
    """Initial vectors made from the texts: an item's is its text projected onto the first `dim`
    principal components, a user's the sum of the train items' vectors; both are scaled to
    a root mean square of std, like random vectors. Beyond the paper.

    text (I, H), train (N, 2) -> (U + I, dim), users first; columns beyond H are random."""
    # unlike the judge's texts these are not whitened, which would give all components equal weight
    text = F.normalize(standardised(text), dim=1)
    # the covariance's eigenvectors, of which eigh gives the largest last
    centred = text - text.mean(0)
    components = torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -dim:]
    items = centred @ components  # (I, min(dim, H))
    users = sum_of_rows(items, *train.T, n_users)
    # the clamp: zeros, which identical texts may give, stay zeros
    scaled = [x * std / x.pow(2).mean().clamp(min=1e-24) ** 0.5 for x in (users, items)]
    # further columns are random: at zero on both sides plain BPR would give them no gradient
    more = torch.randn(len(users) + len(items), dim - items.shape[1], device=items.device) * std
    return torch.cat([torch.cat(scaled), more], 1)


class TextSimilarity(nn.Module):
    """The judge's untrained rival: score(u, j) = the sum of the cosines of whitened texts of j and
    each of u's train items. readings: a list of (I, H); train (N, 2)."""
    def __init__(self, readings, train, n_users):
        super().__init__()
        self.items = whitened_texts(readings)  # (I, T)
        self.users = sum_of_rows(self.items, *train.T, n_users)  # (U, T)
        self.n_users, self.n_items = n_users, len(self.items)

    def scores(self, users):
        return self.users[users] @ self.items.T

# ---- The judge's training ------------------------------------------------------------------------
def train_judge(readings, train, valid, n_users, *, dropouts=(0.0, 0.5), epochs=8, lr=1e-3, seed=0,
                validated=5000):
    """Fit the maps with each dropout; after the first, stop half-way if behind the best so far;
    keep those that are best on validation. readings: a list of (I, H); train, valid (N, 2);
    validated: how many users are ranked after each epoch -> (maps, dropout, history of fit)."""
    # small data, small batches: users with about N / 64 train pairs in all, 256 to 2,048
    pairs = min(2048, max(256, 2 ** round(math.log2(len(train) / 64))))
    # a user with one train pair has no history to find it by
    taught = (torch.bincount(train[:, 0], minlength=n_users) > 1).nonzero()[:, 0]
    # every epoch is validated, on 5,000 users: their NDCG's standard error is about .003. No run
    # stops early, since the learning rate falls to 0 in the last epoch, except a loser (`behind`)
    best = None
    for dropout in dropouts:
        maps = JudgeMaps(readings, train).to(train.device)
        step = make_judge_step(maps, train, n_users, dropout=dropout)
        torch.manual_seed(seed)  # of what is dropped

        def validate():
            judge = Judge(maps.tables(), train, n_users)
            return validation(judge, {"train": train, "valid": valid}, users=validated)()

        def behind(history):  # behind the best dropout half-way: its other epochs are not run
            if not best or len(history) != epochs // 2:
                return False
            return history[-1]["valid_ndcg@20"] < best[-1][len(history) - 1]["valid_ndcg@20"]

        _, history = fit(
            {"maps": maps}, lambda rows, generator: step(taught[rows], generator), len(taught),
            validate, epochs=epochs, batch_size=max(2, pairs * n_users // len(train)), lr=lr,
            eval_every=1, patience=epochs, seed=seed, label=f"judge, dropout {dropout:g}",
            decay=True, stop=behind)
        score = best_epoch(history)["valid_ndcg@20"]
        if best is None or len(history) == epochs and score > best[0]:
            best = score, maps, dropout, history
    return best[1:]

# ---- The blend: several recommenders in one score, weights by validation -------------------------
def in_deviations(scores):
    """Scores (B, I) standardised by user: less the mean, over the standard deviation, both of all
    items, seen or not."""
    centred = scores - scores.mean(1, keepdim=True)
    rounding = 1e-6 * scores.abs().amax(1, keepdim=True)  # all that is left where scores are equal
    return centred / scores.std(1, keepdim=True).clamp(min=rounding + 1e-12)


class Blend(nn.Module):
    """score(u, ·) = the sum over the parts of weight * in_deviations(part's scores). parts: a list
    of recommenders; weights: a number each, 0 leaves a part out."""
    def __init__(self, parts, weights):
        super().__init__()
        self.parts, self.weights = nn.ModuleList(parts), weights
        self.n_users, self.n_items = parts[0].n_users, parts[0].n_items
        self.eval()  # its parts are trained already: their dropout is off, whoever ranks by it

    @torch.no_grad()
    def scores(self, users):
        total = 0
        for part, weight in zip(self.parts, self.weights, strict=True):
            if weight:
                total = total + weight * in_deviations(part.scores(users))
        return total


# the weights tried for each part; the search starts at 1. They differ by factors of two: within
# such a factor NDCG hardly changes
BLEND_GRID = (0, 0.125, 0.25, 0.5, 1, 2, 4)


@torch.no_grad()
def blend_weights(parts, train, valid, grid=BLEND_GRID, depth=64, cells=2**28):
    """The weights with the highest validation NDCG@20, by coordinate ascent: from 1, each in turn
    takes the grid value that is best with the others fixed (ties: the lowest), until none
    changes. A part that does not help here gets 0; noise may help by chance.

    parts: recommenders; train, valid (N, 2); grid: numbers >= 0, 0 first; depth: per user, only
    each part's best `depth` items are compared; cells: scores held -> (weights, each part's NDCG@20
    alone)."""
    # the users to rank: all, or a random part if these would not fit. Of the items, the best of
    # each part: what none has among its 64 best hardly enters the sum's 20 best (on four data sets
    # the weights are as with all items). On Toys & Games all items would fit for a quarter of the
    # users alone, whose weights are worse for the rest (in full .0928, not .0935)
    n_users, n_items = parts[0].n_users, parts[0].n_items
    width = min(n_items, depth * len(parts))  # C
    users, most = valid[:, 0].unique(), max(1, cells // (len(parts) * width))
    some = torch.randperm(len(users), generator=torch.Generator().manual_seed(0))[:most]
    users = users[some.sort().values.to(users.device)]  # (n,)
    seen, keys = user_rows(train, n_users), pair_keys(valid, n_items)
    relevant = torch.bincount(valid[:, 0], minlength=n_users)[users]
    scores, held = [[] for _ in parts], []  # (n, C) of each part; which of the items are wanted
    parts = [part.eval() for part in parts]  # as Blend has them
    for u in users.split(max(1, 2**22 // n_items)):
        rows = [leave_out(in_deviations(part.scores(u)), u, seen) for part in parts]
        items = torch.arange(n_items, device=u.device).expand(len(u), -1)
        if width < n_items:  # by id, so that of equal scores the lowest id wins, as in a ranking
            items = torch.cat([row.topk(depth).indices for row in rows], 1).sort(1).values
        again = F.pad(items[:, 1:] == items[:, :-1], (1, 0))  # an item that several parts rank high
        held.append(contains(keys, u[:, None], items, n_items) & ~again)  # (b, C)
        for table, row in zip(scores, rows):
            table.append(row.gather(1, items).masked_fill(again, -torch.inf))
    scores, held = [torch.cat(table) for table in scores], torch.cat(held)

    @functools.cache
    def quality(*weights):
        if not any(weights):  # all scores alike: no ranking
            return -1.0
        total = torch.zeros_like(scores[0])
        for part, weight in zip(scores, weights):
            if weight:  # a table can be hundreds of MB
                total.add_(part, alpha=weight)
        return float(ndcg(held.gather(1, top_k(total, 20)), relevant, 20).mean())

    alone = [quality(*row) for row in torch.eye(len(parts)).tolist()]
    # not from the best part alone: the ascent would end there if no other part helps by itself,
    # though two together would. reversed: line_search begins with the last name
    equal = dict.fromkeys(range(len(parts)), 1)
    best, _ = line_search(quality, {k: grid for k in reversed(equal)}, equal)
    return [float(weight) for weight in best.values()], alone

# ==== 4. The method ends here. What follows are programs ==========================================
# Loading, judge, train, blend, trace, prepare

def load_recommender(path, data):
    """Any recommender from its file, on the device of data["train"] (a dict of load_data) -> (model
    with scores(), meta, tensors): a backbone or closed form; a judge; a blend, which names its
    parts; items' texts, ranked by TextSimilarity."""
    # a file's header names the command that wrote it
    path = Path(path)
    command = bb.read_header(path).get("settings", {}).get("command")
    if command == "judge":
        tensors, meta = bb.load_tensors(path, data["train"].device)
        return Judge(tensors, data["train"], data["n_users"]), meta, tensors
    if command == "blend":
        tensors, meta = bb.load_tensors(path)
        # parts are named as seen from the run folder
        parts = [load_recommender(bb.run_of(path) / name, data)[0] for name in meta["parts"]]
        return Blend(parts, tensors["weights"].tolist()), meta, tensors
    # texts from `read`, or the user's own vectors, which name no command; load_model refuses others
    if command == "read" or not command and path.exists() and not path.stem.startswith("model-"):
        readings = bb.load_texts(path.parent, path.name, data)
        meta = bb.read_header(path) or {"settings": {}}
        return TextSimilarity(readings, data["train"], data["n_users"]), meta, {}
    return bb.load_model(path, data)


def fit_judge(args):
    """Fit the judge on the items' texts; write its score and each user's likely false negatives."""
    run, data, start = Path(args.run), bb.load_data(args.run), time.time()
    out = run / bb.output_name("--out", args.out, "hnlmrec.py judge", ".safetensors", "judge")
    # a judge made with these settings from these inputs need not be made again
    args.text_vectors = bb.text_input(run, args.text_vectors)
    inputs = bb.digests(run, "data.safetensors", args.text_vectors)
    settings = bb.settings_of(args) | {"inputs": inputs}
    if bb.skip(out, settings, args.force):
        return
    device = bb.start_processes(args.device)
    train, valid = data["train"].to(device), data["valid"].to(device)
    readings = bb.load_texts(run, args.text_vectors, data | {"train": train})
    # nothing to learn from is not an error: say so, leave the judge out, go on
    alike = all((text == text[0]).all() for text in readings)
    if alike or (torch.bincount(train[:, 0]) < 2).all():
        out.unlink(missing_ok=True)  # with --force there may be a judge of an earlier start
        print("judge: left out, since " + (f"{args.text_vectors} is alike for all items" if alike
                                           else "no user has two train pairs"))
        return

    maps, dropout, history = train_judge(
        readings, train, valid, data["n_users"], dropouts=args.dropout, epochs=args.epochs,
        lr=args.lr, seed=args.seed)
    if rank():
        return

    # its score, and what it thinks each user would like
    tensors = maps.tables()
    likely, share = likely_items(Judge(tensors, train, data["n_users"]),
                                 min(args.likely, data["n_items"]))
    tensors |= {"likely": likely.int(), "share": share}
    bb.save_tensors(out, tensors, {"settings": settings, "dropout": dropout, "history": history,
                                   "seconds": time.time() - start})
    print(f"wrote {out}, dropout {dropout:g}, {time.time() - start:.0f} s")


# What the paper and its published code state of this stage; their alpha on Toys is 0.01
PAPER = {"dim": 512, "layers": 3, "batch_size": 10_000, "lr": 1e-3, "reg": 1e-4, "sampler": "rns",
         "alpha": 1e-4, "lambda1": 1e-3, "tau_c": 0.2, "lambda_s": 0.0, "text_init": 0.0}
# HNLMRec's arguments that are numbers (the others default to None): each has a flag of its name
WEIGHTS = [name for name, default in HNLMRec.__init__.__kwdefaults__.items() if default is not None]


def check_flags(args, default):
    """Raise SystemExit2 for flags of `train` that clash, and for some that nothing reads.
    default(name): a flag's default."""
    plain, texts = args.negatives == "none", args.lambda_s or args.text_init
    likely, made = args.lambda_f or args.keep_clear == "judge", args.alpha or args.lambda1
    unread = "nothing reads it with these flags; leave it out"
    # which flags; whether they have to be left out; why
    for names, wrong, why in (
            ("alpha lambda1", plain, "needs generated vectors; give 0, or leave --negatives out"),
            ("paper", plain, "needs generated vectors; leave it or --negatives none out"),
            ("lambda_s lambda_f", args.paper, "the paper's form has no such term; leave it out"),
            ("hinge train_projector", not args.paper, "is part of the paper's form; add --paper"),
            ("keep_clear", args.sampler != "dns", "only dns takes a penalty; add --sampler dns"),
            ("keep_clear", args.lambda_f and args.keep_clear == "valid",
             "beside --lambda-f dns keeps clear of the judge's items; leave one of the two out"),
            ("attention k", not made, unread), ("judge", not likely, unread),
            ("cf mine_first mine_last", not args.lambda1 or args.paper, unread),
            ("gamma", not args.lambda_f, unread), ("text_vectors", not texts, unread),
            ("tau_c", not args.lambda1 and not args.lambda_s, unread),
            ("control", not made and not texts, unread)):
        for name in names.split():
            # alpha and lambda1 even at their defaults: what they weigh is not there
            off = 0 if name in ("alpha", "lambda1") else default(name)
            if wrong and getattr(args, name) != off:
                fail(f"--{name.replace('_', '-')}: {why}")


def train_hnlmrec(args):
    """Train backbone and projector together; write the state of the best validation."""
    run, data = Path(args.run), bb.load_data(args.run)
    out = run / bb.output_name("--out", args.out, "hnlmrec.py train", ".safetensors")

    # what is 0 on the command line follows from the data
    args.mine_first, args.mine_last = bb.mining_band(data, args.mine_first, args.mine_last)
    args.batch_size, args.lr, args.epochs, args.m = bb.sized_to_data(
        data, args.batch_size, args.lr, args.epochs, args.m)

    # a file made with these settings from these inputs need not be made again
    inputs = ["data.safetensors"]
    if args.negatives != "none":
        inputs += [args.cf, args.negatives]
    if args.lambda_s or args.text_init:
        args.text_vectors = bb.text_input(run, args.text_vectors)
        inputs.append(args.text_vectors)
    if args.lambda_f or args.keep_clear == "judge":
        inputs.append(args.judge)
    settings = bb.settings_of(args) | {"inputs": bb.digests(run, *inputs)}
    if bb.skip(out, settings, args.force):
        return

    # everything that trains, on the device of the train pairs
    start, device = time.time(), bb.start_processes(args.device)
    data |= {name: data[name].to(device) for name in ("train", "valid")}
    method = build(run, args, data)
    n, table = len(data["train"]), method.table
    if table:
        if args.lambda1 and not args.paper:  # in one go: L_align needs only these users' bands
            method.mined[table.users.unique()]
        others = n - table.own - table.without
        print(f"train: of {n} train pairs {table.own} have a generated negative of their own, "
              f"{others} take another of their user's, {table.without} have none", flush=True)
    _, history = fit(
        method.modules_trained(), method.loss, n,
        validation(method.backbone, data, users=args.eval_users), epochs=args.epochs,
        batch_size=args.batch_size, lr=args.lr, eval_every=args.eval_every, patience=args.patience,
        seed=args.seed, label=f"{args.backbone} hnlmrec")
    if rank():
        return

    # saved: the state that was best on validation; the vectors to rank by; for the report, z of
    # each generated vector by itself (K = 1: no random draw, so that it is repeatable)
    tensors = bb.state_of(dict(method.named_children()))
    with torch.no_grad():
        tensors["user"], tensors["item"] = method.backbone.eval()()
        if table and (args.alpha or args.lambda1):  # else nothing has read or trained z
            z = [method.projector(part[:, None]) for part in method.hidden.split(4096)]
            tensors |= {"z": torch.cat(z).half(), "z_pairs": method.generated["pairs"]}
    bb.save_tensors(out, tensors, {
        "settings": settings, "history": history, "seconds": time.time() - start})
    print(f"wrote {out}")


def build(run, args, data):
    """What trains, from the run's files and the flags of `train` (a Namespace) -> HNLMRec, or
    PaperHNLMRec with --paper. data: from load_data. Seeds torch's global generator."""
    train, n_users, n_items = data["train"], data["n_users"], data["n_items"]
    torch.manual_seed(args.seed)

    # texts and generated vectors, or what a control puts in their place
    text, generated, parts = None, None, {}
    generator = torch.Generator().manual_seed(args.seed)  # of the control
    if args.negatives != "none":
        generated = bb.load_negatives(run, args.negatives, data)
        if len(generated["hidden"]) < 2:
            fail(f"--negatives {args.negatives}: is one vector, without deviation; generate more")
        hidden = controlled(generated["hidden"], args.control, generator)
    if args.lambda_s or args.text_init:
        readings = bb.load_texts(run, args.text_vectors, data)
        text = readings[len(readings) // 2]  # the middle layer's: the most meaning
        if (text == text[0]).all():
            fail(f"{args.text_vectors}: is alike for all items; give --lambda-s 0 --text-init 0")
        text = controlled(text, args.control, generator)

    # the backbone, which may start from the texts
    backbone = bb.build_backbone(args.backbone, n_users, n_items, args.dim, train, args.layers)
    width = backbone()[0].shape[1]  # D, which with ngcf is not --dim
    if generated:
        parts["projector"] = Projector(hidden, width, attention=args.attention).to(train.device)
    if text is not None:
        parts["semantic"] = SemanticProjector(text, train, n_users, width).to(train.device)
    if args.text_init:
        start = text_start(text, train, n_users, backbone.embedding.shape[1], backbone.std)
        backbone.embedding.data.lerp_(start, args.text_init)

    # the sampler of e_j. A penalty, which only dns reads, keeps it clear of likely false negatives
    # or, as an oracle that shows what better negatives could gain, of validation positives
    penalty = None
    if args.lambda_f or args.keep_clear == "judge":
        tensors, _ = bb.load_tensors(run / args.judge, train.device)
        if "likely" not in tensors:
            fail(f"--judge {args.judge}: is not a judge; name judge.safetensors or another")
        parts["likely"] = LikelyFalse(tensors["likely"], tensors["share"], n_items)
        penalty = parts["likely"].penalty
    if args.keep_clear == "valid":
        penalty = keep_clear(pair_keys(data["valid"], n_items), n_items)
    draw = bb.make_sampler(backbone, args.sampler, train, m=args.m, penalty=penalty)

    # the generated vectors, and the hard negatives that the CF model mines, which z is to lie near
    if generated:
        cf_model, _, _ = bb.load_model(run / args.cf, data)
        parts["mined"] = bb.Bands(cf_model, train, args.mine_first, args.mine_last)
        parts["hidden"] = hidden.to(train.device)
        parts["table"] = NegativeTable(generated["pairs"].to(train.device), train, n_users, n_items)
    parts |= {name: getattr(args, name) for name in WEIGHTS}
    if args.paper:
        parts |= {"hinge": args.hinge, "train_projector": args.train_projector}
    method = (PaperHNLMRec if args.paper else HNLMRec)(backbone, draw, train, **parts)
    method.generated = generated
    return method


def controlled(vectors, control, generator):
    """Does the LLM matter? Its vectors (n, H), or in their place: `random`, pure noise; `shuffled`,
    its own vectors, assigned to pairs or items at random."""
    if control == "random":
        return torch.randn(vectors.shape, generator=generator).to(vectors)
    if control == "shuffled":
        return vectors[torch.randperm(len(vectors), generator=generator)]
    return vectors


def blend(args):
    """Combine several recommenders into one score, with the weights that are best on validation; a
    part that does not help there gets weight 0. Of alternatives, A|B, it takes the one that makes
    the better blend there. The file holds the weights and the names of the parts' files."""
    run, data, start = Path(args.run), bb.load_data(args.run), time.time()
    out = run / bb.output_name("--out", args.out, "hnlmrec.py blend", ".safetensors")
    choices = [re.findall("[^|]+", part) for part in re.findall("[^,]+", args.parts)]
    names = list(chain(*choices))
    if not names or len({(run / name).resolve() for name in names}) < len(names):
        fail(f"--parts {args.parts}: name one file or more, each once")
    # the parts' digests are among the settings: once a part is remade, the blend is refused
    settings = bb.settings_of(args) | {"inputs": bb.digests(run, "data.safetensors", *names)}
    if bb.skip(out, settings, args.force):
        return

    # the parts, and their weights by validation, with each choice of alternatives
    loaded = {name: load_recommender(run / name, data) for name in names}
    seconds = sum(meta.get("seconds", 0.0) for _, meta, _ in loaded.values())
    best = -1.0, None, None  # score, chosen parts, weights
    for chosen in product(*filter(None, choices)):
        parts = [loaded[name][0] for name in chosen]
        weights, alone = blend_weights(parts, data["train"], data["valid"])
        score = validation(Blend(parts, weights), data)()
        for name, weight, value in zip(chosen, weights, alone):
            print(f"blend: {name}, alone valid NDCG@20 {value:.4f}, weight {weight:g}")
        print(f"blend: together {score:.4f}", flush=True)
        if score > best[0]:
            best = score, chosen, weights

    # written so that everything reads it as any model
    score, chosen, weights = best
    bb.save_tensors(out, {"weights": torch.tensor(weights)}, {
        "settings": settings, "parts": chosen, "seconds": seconds + time.time() - start,
        "history": [{"epoch": 0, "valid_ndcg@20": score, "seconds": time.time() - start}]})
    print(f"wrote {out} of {', '.join(chosen)}: valid NDCG@20 {score:.4f}")

# ---- trace: one (user, item) pair from the raw line to the gradient ------------------------------
def trace(args):
    """Print how one train pair passes through the pipeline, with the values of a finished run.
    Changes nothing."""
    # the run as it was trained
    run, data = Path(args.run), bb.load_data(args.run)
    bb.digests(run, args.model)  # refuses a model of other pairs
    tensors, meta = bb.load_tensors(run / args.model)
    # and one from another run with the same pairs but other negatives
    bb.check_inputs(run / Path(args.model).name, bb.made_from(meta))
    s = Namespace(**dict.fromkeys(WEIGHTS, 0) | meta["settings"])  # 0: newer than the model
    if s.command != "train" or s.negatives == "none":
        fail(f"--model {args.model}: was trained without generated negatives, so none can be "
             "followed; give another")
    method = build(run, s, data)
    restore(dict(method.named_children()), tensors)

    # the pair; without --user and --item the first with a generated vector of its own
    users, items = bb.read_jsonl(run / "users.jsonl"), bb.read_jsonl(run / "items.jsonl")
    made, train = method.generated["pairs"], data["train"]
    user = users[made[0, 0]]["raw"] if args.user is None else args.user
    u = bb.row_of(users, user, "--user", run / "users.jsonl")
    of_user = train[train[:, 0] == u, 1].tolist()  # empty in some splits by time, or the user's own
    i = next(iter(made[made[:, 0] == u, 1].tolist() + of_user), None)
    if args.item is not None:
        i = bb.row_of(items, args.item, "--item", run / "items.jsonl")
    if i not in of_user:
        named = ", ".join(items[n]["raw"] for n in of_user[:5]) or "none"
        asked = f" with --item {args.item}" * (args.item is not None)
        fail(f"--user {user}: has no train pair{asked} (it has: {named})")
    row = int((train == torch.tensor([u, i])).all(1).nonzero())
    steps = trace_steps(run, s, data, method.eval(), users, items, row)
    for n, (title, text) in enumerate(steps, 1):
        print(f"{n}. {title:11}" + text.replace("\n", "\n" + 14 * " "))


def trace_steps(run, s, data, method, users, items, row):
    """Yield (title, text) of each step on the way of train pair `row`. s: the model's settings."""
    (u, i), titles = method.pairs[row].tolist(), [item["title"] for item in items]
    user, item, whose = users[u]["raw"], items[i]["raw"], torch.tensor([u])
    # the pair's own generated vector, or where it has none that of another of the user's pairs
    draw = torch.Generator().manual_seed(0)
    sets = method.table(torch.tensor([row]), method.k, draw)  # (1, K), for z too
    if (at := int(sets[0, 0])) < 0:
        fail(f"--user {user}: has no generated vector to follow; give another user")
    yield "data", (f"user {user} -> row {u}, item {item} -> row {i}: {titles[i]}; "
                   f"train pair {row} of {len(method.pairs)}")

    # into the LLM: a shard's header names its fine-tuning, whose header names the profiles
    inputs = bb.read_meta(run / bb.shards(s.negatives, 1)[0])["settings"]["inputs"]
    sft = bb.read_meta(run / next(name for name in inputs if name.startswith("sft")))
    _, *rows = bb.read_jsonl(run / sft["settings"]["profiles"])
    profiles = {(one["kind"], one["raw"]): one["profile"] for one in rows}
    of_user, of_item = profiles["user", user], profiles["item", item]
    yield "profiles", f"item: {of_item}\nuser: {of_user}"
    generated = method.generated
    cf_model, _, cf = bb.load_model(run / generated["cf"], data)
    scores, mined = cf_model.scores(whose)[0], method.mined[whose][0].tolist()
    yield "CF", (f"e_u {vector_text(cf['user'][u])}\ne_i {vector_text(cf['item'][i])}\nscore "
                 f"{scores[i]:.3f}: rank {int((scores > scores[i]).sum()) + 1} of {len(scores)}")
    named = "; ".join(titles[n] for n in mined[:5])
    seen = user_rows(data["train"], data["n_users"])
    last = min(s.mine_last, len(scores) - int(seen[0].diff()[u]))  # of a user with few unseen items
    yield "mined", f"unseen ranks {max(1, last - s.mine_last + s.mine_first)}–{last}: {named}; …"
    prompt = sft["prompt"].replace("{user}", of_user)
    yield "prompt", prompt.replace("{item}", f"{titles[i]}. {of_item}")

    # out of it
    other = int(generated["pairs"][at, 1])
    note = "" if other == i else f" (it has none: this is of the pair with {titles[other]})"
    note += f" (not what the model had: --control {s.control})" * (s.control != "none")
    # generated vectors live in the space of the centred CF item vectors (llm_negatives.SftTask)
    centred = cf["item"] - cf["item"].mean(0)
    nearest = nearest_items(generated["vector"][at][None], whose, centred, seen, 5)
    named = [titles[n] + " (mined)" * (n in mined)
             for n in nearest[0].tolist() if n >= 0]
    yield "generated", (f"h {vector_text(generated['hidden'][at].float())}{note}\n"
                        f"items nearest to head(h): {'; '.join(named)}")
    with torch.no_grad():
        z = method.projector(method.hidden[sets])[0]
        vectors = [table[n] for table, n in zip(method.backbone(), (u, i))]
    of_u, of_i = (F.cosine_similarity(z, vector, 0) for vector in vectors)
    yield "projector", f"z {vector_text(z)}; cos(z, e_u) {of_u:.3f}, cos(z, e_i) {of_i:.3f}"

    # a step with this pair alone, in training mode: with dropout where the backbone has any
    score = float(method.backbone.scores(whose)[0, i])
    method.backbone.train()
    loss, logs = method.loss(torch.tensor([row]), draw.manual_seed(0))
    loss.backward()
    terms = ", ".join(f"{name} {value:.4f}" for name, value in logs.items())
    # in a batch of one align's only negative is the positive, and semantic has none
    yield "step", (f"score as trained {score:.3f}; loss of this pair alone {loss.item():.4f}; "
                   f"terms, unweighted: {terms}")
    norms = []
    for name, module in method.modules_trained().items():
        gradients = [p.grad for p in module.parameters() if p.grad is not None]
        if gradients:  # a part whose terms have weight 0 has none
            norms.append(f"{name} {float(nn.utils.get_total_norm(gradients)):.4f}")
    yield "gradient", f"norm: {', '.join(norms)}"


@torch.no_grad()
def nearest_items(vectors, users, items, seen, k):
    """The k items nearest to each vector by cosine, the user's seen items left out: vectors (n, D),
    users (n,), items (I, D), seen: from user_rows -> item ids (n, min(k, I)), padded with -1."""
    items = F.normalize(items.float(), dim=-1)
    return bb.best_unseen(lambda rows: F.normalize(vectors[rows].float(), dim=-1) @ items.T,
                          users, seen, k, len(items))


def vector_text(vector):
    """A vector's first entries and its norm, for printing."""
    return f"[{', '.join(f'{v:.3f}' for v in vector[:4].tolist())}, …] norm {vector.norm():.3f}"

# ---- prepare: raw ratings and item metadata -> data.safetensors, items.jsonl, users.jsonl --------
PARTS = ("train", "valid", "test")
# user and item as codes; rating, and seconds since 1970 (NaN: none); where the row stands
PAIR = np.dtype([("user", "i4"), ("item", "i4"), ("rating", "f8"), ("seconds", "f8"),
                 ("line", "i8"), ("part", "i1")])


def prepare(args):
    """Raw files -> data.safetensors, items.jsonl, users.jsonl."""
    s, files, published = prepare_settings(args)
    run, out, counts = Path(args.run), Path(args.run) / "data.safetensors", Counter()
    if bb.skip(out, vars(s), args.force):  # files of the same contents under the same settings
        return
    own, source = s.split == "own", next(iter(files.values()))
    # interactions: one row per pair, the latest, since a withdrawn rating is no positive
    read, users, items = read_pairs(files, s, counts)
    form = format_of(s.format, source)
    unread = [name for name in next(form.rows(source))[1] if name and name not in form[:5]]
    if FORMATS[s.format][0] is table_rows and unread:  # one may be meant, by an unknown name
        print(f"  not read as {', '.join(ROLES)} of a pair: {', '.join(unread)}")
    rows = read[latest(*(read[name] for name in ("user", "item", "rating", "seconds")))]
    counts["earlier rows of a repeated pair"] += len(read) - len(rows)
    if not own:
        rows = filter_pairs(rows, users, source, s, counts)
    # contiguous ids, in order of the raw id; train, valid, test, sorted by user, then item
    rows["user"], users = renumber(rows["user"], users)
    rows["item"], items = renumber(rows["item"], items)
    if not own:
        rows["part"] = split_pairs(*(rows[name] for name in ("user", "item", "seconds")),
                                   s.split, s.seed)
    pairs, parts = np.stack([rows["user"], rows["item"]], 1).astype(np.int64), {}
    order = np.lexsort((rows["item"], rows["user"]))
    for code, name in enumerate(PARTS):
        parts[name] = pairs[order[rows["part"][order] == code]]
        if not len(parts[name]):
            fail(f"{source}: --split {s.split} leaves {name} empty; use --split random")
    # texts: of the items, and of the train pairs' reviews alone
    items = read_items(files.get("meta"), form, items, counts)
    user_of_line = dict(rows[["line", "user"]][rows["part"] == 0].tolist())
    reviews = read_reviews(source, form, user_of_line, s.reviews_per_user, counts)
    users = [{"raw": raw, "reviews": reviews[n]} for n, raw in enumerate(users)]
    # the data last, since it has the others' digests: a killed `prepare` never looks complete
    out.unlink(missing_ok=True)
    for name, lines in (("items.jsonl", items), ("users.jsonl", users)):
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        bb.write_atomic(run / name, text.encode())
    bb.save_tensors(out, {name: torch.from_numpy(pairs) for name, pairs in parts.items()},
                    {"settings": vars(s), "n_users": len(users), "n_items": len(items),
                     "seed": s.seed, "beside": bb.digests(run, "items.jsonl", "users.jsonl")})
    print(f"prepare: {counts.pop('rows'):,} rows read")
    print("".join(f"  {n:,} {what}\n" for what, n in counts.items() if n), end="")
    if published:
        print("  the paper prints: users {:,}   items {:,}   pairs {:,}".format(*published))
    print_summary(read, parts, users, items)
    print(f"wrote {out}, items.jsonl, users.jsonl")


def prepare_settings(args):
    """Flags -> settings, {role: path} of the raw files, the paper's statistics."""
    files = {name: getattr(args, f"{name}_file") for name in PARTS}
    own = any(files.values())
    if not (all(files.values()) if own else args.reviews):
        fail("--reviews: give a file, or all of --train-file, --valid-file and --test-file")
    # a filter that is not applied must not look as if it were
    for name in ("reviews", "preset", "min_rating", "since", "until", "k_core", "split"):
        if own and getattr(args, name) is not None:
            fail(f"--{name.replace('_', '-')}: does not apply beside --train-file: your own split "
                 "is taken as it is; leave it out" + ", or give --format" * (name == "preset"))
    # the defaults, overridden by the preset's values, then by the flags given
    s = {"format": "table", "min_rating": "none" if own else 4.0, "since": None, "until": None,
         "k_core": 1 if own else 5, "split": "own" if own else "random"}
    *preset, published = PRESETS.get(args.preset, [None])
    s |= dict(zip(s, preset)) | {name: getattr(args, name) for name in s
                                 if getattr(args, name) is not None}
    # the files that were given; each is read three times at most, never held whole
    files = (files if own else {"reviews": args.reviews}) | {"meta": args.meta}
    files = {role: path for role, path in files.items() if path}
    written = [(Path(args.run) / f"{name}s.jsonl").resolve() for name in ("item", "user")]
    for path in files.values():
        if Path(path).resolve() in written:
            fail(f"{path}: `prepare` writes a file of that name; move it, or give another --run")
        if not Path(path).is_file():  # a pipe could not be read twice
            fail(f"{path}: no such file, or a folder, pipe or device; give a file")
    # digests, not paths: an edited file is noticed, and a moved one is the same file
    s |= {"seed": args.seed, "reviews_per_user": args.reviews_per_user, "command": "prepare",
          "files": {role: bb.file_digest(path) for role, path in files.items()}}
    return Namespace(**s), files, published


def filter_pairs(rows, users, path, s, counts):
    """Rating filter, then core. PAIR (N,), one row a pair, in the order of the file -> PAIR (P,),
    by first appearance."""
    if s.min_rating != "none":
        low = rows["rating"] < s.min_rating
        counts[f"pairs below --min-rating {s.min_rating:g}"] += int(low.sum())
        rows = rows[~low]
    core = k_core(rows["user"], rows["item"], s.k_core)
    counts[f"pairs outside the {s.k_core}-core"] += int((~core).sum())
    if not core.any():
        fail(f"{path}: nothing is left ({dict(counts)}); lower --k-core or --min-rating, or widen "
             "the date range")
    # a random split draws its numbers in this order: with another one, all of them would change
    first = [np.unique(rows[name], return_index=True, return_inverse=True)[1:]
             for name in ("item", "user")]
    order = np.lexsort([at[code] for at, code in first])
    rows = rows[order[core[order]]]
    # a split that the rows do not allow is refused
    none, count = np.isnan(rows["seconds"]).sum(), np.bincount(rows["user"])
    few = np.flatnonzero((count > 0) & (count < 3))
    if s.split != "random" and none:
        fail(f"{path}: --split {s.split} needs times, {none:,} rows have none; use --split random")
    if len(few) and (s.split != "time" or len(rows) < 3):
        fail(f"{path}: user {quote(users[few[0]])} has fewer than 3 interactions after filtering "
             f"({len(few):,} users have), and a split needs 3; use another --k-core")
    return rows


def latest(user, item, rating, seconds):
    """The latest row of each (user, item) -> indices, int (P,), ascending. Where times are equal or
    missing, it is the one with the lowest rating; if these are equal too, the first."""
    pair = user.astype(np.int64) * (item.max(initial=0) + 1) + item
    order = np.lexsort((rating, -seconds, pair))  # NaN comes last in each
    return np.sort(order[np.diff(pair[order], prepend=-1) != 0])


def k_core(user, item, k):
    """Drop users and items with fewer than k interactions until all that remain have k or more.
    user, item (N,): int codes -> bool (N,), which interactions are kept."""
    # dropping a user may make an item too rare, which may make another user too rare, and so on
    keep = np.ones(len(user), bool)
    while k > 1:
        ok = (np.bincount(user, keep)[user] >= k) & (np.bincount(item, keep)[item] >= k) & keep
        if ok.sum() == keep.sum():
            break
        keep = ok
    return keep


def split_pairs(user, item, seconds, how, seed, valid=0.1, test=0.1):
    """Give each interaction to a part: 0 train, 1 valid, 2 test.

    how: 'random', user by user a seeded share of the items, at least one each; 'last', user by
    user the last in time is test, the one before it valid (both need 3 interactions a user);
    'time', one cut in time for all: train is earlier than valid, valid earlier than test.
    user, item, seconds (N,) -> int (N,)."""
    if how not in ("random", "last", "time"):
        fail(f"split {how!r}: is none of random, last, time")
    if how == "time":  # rows with equal times stay together: the shares may be far off
        n_valid, n_test = (max(1, int(len(user) * share)) for share in (valid, test))
        valid_from, test_from = np.sort(seconds)[[-n_valid - n_test, -n_test]]
        return np.where(seconds >= test_from, 2, np.where(seconds >= valid_from, 1, 0))
    # place of each row within its user, in random order or the latest first: the first are test
    count = np.bincount(user)
    key = np.random.default_rng(seed).random(len(user)) if how == "random" else -seconds
    order = np.lexsort((item, key, user))  # the item breaks ties in time the same way each run
    place = np.empty(len(user), np.int64)
    place[order] = np.arange(len(user)) - np.repeat(np.cumsum(count) - count, count)
    shares = (test, valid) if how == "random" else (0, 0)  # and one at least
    n_test, n_valid = (np.maximum(1, (count * share).astype(int))[user] for share in shares)
    return np.where(place < n_test, 2, np.where(place < n_test + n_valid, 1, 0))


def read_pairs(files, s, counts):
    """Stream the interactions -> PAIR (N,), raw users, raw items; no text is held. Raises
    SystemExit2 for a row that a filter cannot judge."""
    own, by_day, by_rating = s.split == "own", s.since or s.until, s.min_rating != "none"
    since, until = iso_seconds(s.since or "1000-01-01"), iso_seconds(s.until or "3000-01-01")
    # users and items are numbered as they first appear; part_of finds a pair that is in two parts
    users, items, part_of = {}, {}, {}

    def rows(path, part):
        before = counts["rows"]
        for n, user, item, stars, moment in interactions(path, s.format, counts):
            counts["rows"] += 1
            if counts["rows"] % 1_000_000 == 0:
                print(f"  read {counts['rows']:,} rows", flush=True)
            # a filter that cannot judge a row must not let it pass; x != x is NaN
            if by_day and moment != moment:
                fail(f"{path}: line {n}: no timestamp, as --since and --until need; fix that line")
            if by_day and not since <= moment < until:
                counts["rows outside --since and --until"] += 1
                continue
            if by_rating and stars != stars:
                fail(f"{path}: line {n}: no rating, or its column has another name; fix that, or "
                     "give --min-rating none")
            pair = users.setdefault(user, len(users)), items.setdefault(item, len(items))
            if own and part_of.setdefault(pair, part) != part:
                fail(f"{path}: line {n}: {quote(user)}, {quote(item)} is in another part too")
            yield *pair, stars, moment, n, part
        if counts["rows"] == before:
            fail(f"{path}: no pairs; is --format {s.format} right?")

    # one file that is split here, or three that are split already
    paths = [path for role, path in files.items() if role != "meta"]
    pairs = np.fromiter(chain(*map(rows, paths, range(3))), PAIR)
    if own:  # taken as it is, but for rows that come twice
        if not np.isnan(pairs["rating"]).all():
            print("  the ratings are not used: all pairs of your own split count")
        pairs["rating"] = pairs["seconds"] = np.nan
    return pairs, [*users], [*items]


def id_text(raw):
    """An id as text, the same however it was written: without spaces around it, 1.0 as 1, é as one
    character. None if it is not an id."""
    if isinstance(raw, (bool, dict, list)):
        return None
    name = unicodedata.normalize("NFC", str(raw)).strip()
    number = name.removesuffix(".0")
    if number.removeprefix("-").isdecimal():
        name = number
    return name if 0 < len(name) <= 200 and not NO_ID.search(name) else None


# not an id: what programs write for a missing one; one in quotes, or rounded by a spreadsheet; one
# with a control, zero-width or direction character, or with half of a character
NO_ID = re.compile(
    r"^(?:null|none|nan|inf|#?n/a|<na>|([\"']).*\1|\d(?:[.,]\d+)?e\+\d\d?)$|[\x00-\x1f\x7f-\x9f\xad"
    r"\u200b-\u200f\u2028-\u202e\u2060\u2066-\u2069\ufeff\ud800-\udfff]", re.I)


def given_id(text):
    """An id from the command line, in the form that the run's files have it."""
    return id_text(text) or text  # if it is not an id, `row_of` will not find it and says so


def renumber(codes, names):
    """Codes (N,) of the kept rows -> 0 … n-1 in the order of the raw ids, the n raw ids."""
    kept, codes = np.unique(codes, return_inverse=True)
    kept = [names[code] for code in kept]
    # the order of the file must not decide the numbers. Numeric ids go by value, 01 before 1
    keys = [(int(name) if name.isascii() and name.isdecimal() else math.inf, name)
            for name in kept]
    order = np.array(sorted(range(len(kept)), key=keys.__getitem__))
    return order.argsort()[codes], [kept[n] for n in order]


def interactions(path, fmt, counts):
    """(line, user, item, rating, seconds) of each row; NaN for a missing number. Times: ISO dates,
    or seconds, milli-, micro- or nanoseconds since 1970, in one unit throughout the file."""
    form, unit = format_of(fmt, path), 0  # unit of the times: not known yet
    for n, row in form.rows(path):
        ids = [row.get(form.user), row.get(form.item)]
        pair = [id_text(one) for one in ids]
        if pair != ids and pair != [str(one).strip() for one in ids]:
            counts["rows whose id is 1.0, read as 1, or é in two characters, read as one"] += 1
        if None in pair:
            name = form[pair.index(None)]
            fail(f"{path}: line {n}: {name} {quote(row.get(name))} is not an id (no such column, "
                 "empty, null, quoted, rounded, too long or with unseen characters); fix that line "
                 f"(columns: {quote([*row])})")
        # an empty field, or nan, is NaN; all else that is not a number is refused, never ignored
        name, wrong = form.rating, "not a number; write it as 4.5"
        try:
            rating = parse_number(row.get(name))
            name, wrong = form.timestamp, (
                "not a time, a rounded one, a day, or not in the unit of the rows before; write it "
                "as 2016-03-01 12:30:00, or all in seconds since 1970")
            moment = parse_number(row.get(name), dates=True)
            # the unit of the times follows from the first of them, and all others have to agree
            if moment and moment == moment:
                size = abs(moment)
                # as seconds, 20160301 would be a day of August 1970
                day = not unit and CALENDAR.fullmatch(f"{size:.0f}")
                unit = unit or next((u for u in (1, 1e3, 1e6) if size < 7.3e9 * u), 1e9)
                # after 2200 (7.3e9 s) or, in finer units, before 1973 (1e8 s): another unit
                if day or size >= 7.3e9 * unit or unit > 1 and size < 1e8 * unit:
                    raise ValueError
        except ValueError:
            fail(f"{path}: line {n}: {name} {quote(row.get(name))} is {wrong}")
        yield n, *pair, rating, moment / (unit or 1)


# float() would also take 1_0, inf and true
NUMBER = re.compile(r"nan|[-+]?[\d.]{1,99}(?:e[-+]?\d\d?)?", re.I)
ROUNDED = re.compile(r"\d[.,]\d{1,7}e\+?\d\d", re.I)
CALENDAR = re.compile(r"(?:19|20)\d\d(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])(?:\d{4}(?:\d\d)?)?")


def parse_number(value, dates=False):
    """A number, with `dates` also an ISO date; NaN for an empty field or nan; else ValueError."""
    if value is None or value == "":
        return math.nan
    text = str(value).strip()
    # times that a spreadsheet rounded, such as 8.81251E+11, would give many pairs the same moment
    if NUMBER.fullmatch(text) and not (dates and ROUNDED.fullmatch(text)):
        return float(text)
    return iso_seconds(text if dates else "")  # "" is no date: ValueError


def iso_seconds(text):
    """2016-03-01 or 2016-03-01 12:30:00 -> seconds since 1970, UTC where it names no zone."""
    moment = datetime.fromisoformat(text.strip().replace("Z", "+00:00"))
    return (moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)).timestamp()

# ---- prepare: texts of items and reviews ---------------------------------------------------------
OF_PAIRS, LETTER = re.compile("rating|review|score|comment", re.I), re.compile(r"[^\W\d_]")


def read_items(path, form, raw_items, counts):
    """Metadata of the kept items -> rows {raw, title, text, known} in their order; of an
    item's several rows, the fullest counts. Raises SystemExit2 for a file that has none of them."""
    # found {id: {column: text}}; seen {id: number of rows}; held {column: the wanted ids that it
    # has before line 10,000, to suggest the right one}; differ {column: ids whose rows differ}
    found, seen, wanted = {}, Counter(), set(raw_items)
    held, differ = defaultdict(set), defaultdict(set)
    for n, row in form.meta(path) if path else ():
        for name, value in row.items() if n < 10_000 else ():
            held[name] |= wanted & {id_text(value)}
        raw = id_text(row.get(form.item))
        if raw not in wanted:
            continue
        fields = item_fields(row, form, counts, f"{path}: line {n}")
        old = found.get(raw, fields)
        found[raw] = max(old, fields, key=fullness)
        seen[raw] += 1
        for name in fields:  # a title that only one row has is not a second title
            other = fields[name].casefold() != old[name].casefold()
            if other and (name != "title" or fields[name] and old[name]):
                differ[name].add(raw)
    # ids under another column, or of another data set: nobody wants items without their texts
    if path and len(found) < len(wanted) / 2:
        best = max(held, key=lambda name: len(held[name]), default=form.item)
        remedy = "write the ids as the interactions do"
        if len(held[best]) > len(found):
            remedy = f"column {quote(best)} has {len(held[best]):,}: rename it to {form.item!r}"
        said = (f"{path}: column {form.item!r} has {len(found):,} of the {len(wanted):,} items "
                f"(such as {quote(min(wanted))}); {remedy}, or give another file or --format")
        if not found:
            fail(said)
        print(f"  WARNING: {said}")
    columns = next(iter(found.values()), {}).keys()
    # flat: one file of pairs and metadata, a row for a pair
    repeated = sum(n > 1 for n in seen.values())
    flat = repeated > len(found) / 2 or any(is_called(name, "user") for name in held)
    counts["repeated metadata rows (fullest kept)"] += 0 if flat else seen.total() - len(found)
    left_out = columns & set(form[:4]) - {"title"}  # about pairs; `text` may be the item's
    for name in columns if flat else ():
        # leave out what differs between rows of one item, or has a name that columns about pairs
        # have; and numbers, which may be counted from held-out pairs, such as a mean rating
        about = (differ[name] or OF_PAIRS.search(name) or any(is_called(name, r) for r in ROLES)
                 or not any(LETTER.search(fields[name]) for fields in found.values()))
        if name == "title":  # a few are written in two ways; over a fifth: reviews' titles
            about = len(differ[name]) > repeated / 5
        if about or not repeated:  # where no item has two rows, nobody can tell
            left_out.add(name)
    if left_out:
        print("  left out of the items' texts, as about pairs or counted from them (to keep one, "
              "use one row per item, no column of users, and a name that no column of the "
              "interactions has): " + ", ".join(sorted(left_out)))
    # a row for every item, found or not; cut, since an LLM's prompt has to hold several of them
    items = []
    for raw in raw_items:
        *_, known, text = fullness(found.get(raw, {"title": ""}), left_out)
        counts["titles cut to 200 characters"] += len(known) > 200
        counts["texts cut to 400 characters"] += len(text) > 400
        items.append({"raw": raw, "title": known[:200].rstrip() or f"Item {raw}",
                      "text": text[:400].rstrip(), "known": bool(known)})
    return items


def fullness(fields, left_out=()):
    """Sort key of an item's fields, without the columns left out: (whether there is a title, length
    of all, title, the other texts as one). Equal keys: equal texts, unless columns are left out."""
    title, *texts = ("" if name in left_out else text for name, text in fields.items())
    text = ". ".join(filter(None, texts))
    return bool(title), len(title) + len(text), title, text


def item_fields(row, form, counts, where):
    """A metadata row -> {column: text}, first the title, here always `title`. Raises SystemExit2
    for a table without a title."""
    # in a person's own table the title has any usual name, and all other columns are text
    own, year = form.texts == ["*"], row.get(form.year)
    title = own and column_of(row, "title", where) or form.title
    if title not in row and form.meta is table_rows:  # JSON objects may lack a field
        fail(f"{where}: no column {title!r}, only {quote([*row])}")
    fields = {"title": f"{row[title]} ({year})" if year and row.get(title) else row.get(title)}
    used = ("", form.item, form.year, title)
    for name in [name for name in row if name not in used] if own else form.texts:
        value = row.get(name) or ""
        if "categor" in name and isinstance(value, list):
            # the end of a category path, or of the last of several paths, is the most specific
            value = (value[-1] if isinstance(value[-1], list) else value)[-2:]
        if name == "genres" and isinstance(value, str) and not own:  # Action|Drama, or 0/1 columns
            value = value.replace("(no genres listed)", "").replace("|", ", ") or [
                one for one in GENRES if row.get(one) == "1"]
        fields[name] = value
    return {name: clean(value, counts, where) for name, value in fields.items()}


def read_reviews(path, form, user_of_line, per_user, counts, limit=200):
    """A second pass, for up to `per_user` review texts of each user -> {user id: [text]}.
    user_of_line: {line: user id} of train pairs, so that no other reaches a profile."""
    texts = defaultdict(list)
    # without a column of texts the file is not read again
    for n, row in form.rows(path) if per_user and form.text else ():
        if n in user_of_line and len(texts[user_of_line[n]]) < per_user:
            text = clean(row.get(form.text), counts, f"{path}: line {n}")
            counts[f"reviews cut to {limit} characters"] += len(text) > limit
            if text:
                texts[user_of_line[n]].append(text[:limit].rstrip())
    return texts


HALF = re.compile(r"[\ud800-\udfff]")  # of a character: valid in JSON, not in UTF-8
JOINED = {0x2060: None, 0xfeff: None}  # without width, and no space for a line to break at
# control characters, those that turn text round, and most others without width (not marks)
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u200b\u202a-\u202e\u2066-\u2069]+")
QUOTED = re.compile(r'"(?:[^"]|"")*"')  # csv rules of quoting, in a file with tabs
ENTITY = re.compile(r"&(#\d{1,7};|#[xX][0-9a-fA-F]{1,6};|\w+;)")
TAG = re.compile(
    r"<!--.*?-->|</?(?:a|abbr|b|big|blockquote|body|br|center|cite|code|dd|div|dl|dt|em|embed|font|"
    r"form|h[1-6]|head|hr|html|i|iframe|img|input|li|link|meta|ol|object|p|param|pre|s|script|"
    r"small|span|strike|strong|style|sub|sup|table|tbody|td|th|thead|title|tr|tt|u|ul)"
    r"(?:\s[^<>]*)?/?>", re.I | re.S)
BLOCK = re.compile(r"<(script|style)\b[^<>]*>.*?(?:</\1\s*>|$)", re.I | re.S)
# what a page's own program or style sheet looks like when its tags are gone
PROGRAM = re.compile(r"(?as)\bvar \w+ ?=.*;|\bfunction ?\w* ?\([^)]*\) ?\{|\(new Date\(\)\)|"
                     r"\bdocument\.\w+[(.=]|[\w-] ?\{(?=[^{}]*\})[^{}]*[\w-] ?:[^{}][^{};]*;")


def clean(value, counts, where=""):
    """A raw field as one line of text: lists joined, HTML entities decoded, tags, scripts, control
    characters and runs of white space taken out. counts: a Counter of repairs. Raises SystemExit2,
    which says where, for anything but text."""
    if isinstance(value, (list, tuple)):
        return ", ".join(filter(None, (clean(one, counts, where) for one in value)))
    if isinstance(value, (bool, dict)):
        fail(f"{where}: {quote(value)} is not text; fix that line")
    # a year is a number in JSON, NaN is none
    text = HALF.sub("\ufffd", str(value))
    if value is None or text.lower() in ("nan", "null", "none", "<na>"):
        return ""
    counts["texts with half of a character (replaced)"] += text != str(value)
    # a table with tabs that a csv writer made
    if '""' in text and QUOTED.fullmatch(text):
        counts["texts in quotes as csv writes them (taken off)"] += 1
        text = text[1:-1].replace('""', '"')
    # &amp;amp; occurs in the wild; what is not an entity (AT&T, Q&notes;) stays as it is
    decoded, further = None, text
    while decoded != further:
        decoded = further
        further = ENTITY.sub(lambda x: html.unescape(x[0]) if x[1][0] == "#" else
                             html.entities.html5.get(x[1], x[0]), decoded)
    counts["texts with HTML entities (decoded)"] += decoded != text
    plain = TAG.sub(" ", BLOCK.sub(" ", decoded))
    counts["texts with HTML tags (taken out)"] += plain != decoded
    if PROGRAM.search(plain):
        counts["texts that were a page's script or style (left out)"] += 1
        return ""
    return " ".join(CONTROL.sub(" ", plain.translate(JOINED)).split())

# ---- prepare: readers, which yield (line, {column: value}) row by row; formats; summary ----------
# cp1252 is Latin-1, with quotes and dashes in place of some control characters
codecs.register_error(
    "latin", lambda bad: (bad.object[bad.start:bad.end].decode("cp1252", "replace"), bad.end))


def text_lines(path, errors="strict"):
    """The lines of a UTF-8 text file, plain or gzipped. errors="latin" reads bytes that are not
    UTF-8 as Latin-1. Raises SystemExit2 if the file cannot be unpacked or decoded."""
    try:
        with open(path, "rb") as file:
            whole = gzip.open(file) if file.peek(2)[:2] == b"\x1f\x8b" else file
            # -sig: without a byte-order mark; csv wants the line ends as they are
            yield from io.TextIOWrapper(whole, "utf-8-sig", errors, newline="")
    except (EOFError, gzip.BadGzipFile, zlib.error, UnicodeDecodeError) as error:
        fail(f"{path}: cannot be read to its end, is not UTF-8 text or gzip: unpack or export it, "
             f"or download it again ({error})")


def table_rows(path, header=""):
    """(line, {column: value}) of a delimited file. header: given for a file without one. Raises
    SystemExit2 for a malformed header or row, and for a quote that is left open."""
    csv.field_size_limit(2**20)  # a review can be long, a field of a MiB is a quote left open
    # without a header: MovieLens, which is in Latin-1 where nobody has converted it
    lines = text_lines(path, "latin" if header else "strict")
    # the first line shows whether this can be a table, the header which separator it has
    start = next(lines, "")
    first, lines = header or start, chain([header, start] if header else [start], lines)
    if re.match(r"[{[]|\d+( \d+)+\s*$", start):
        fail(f"{path}: line 1 is {quote(start)}: looks like a user with a list of items, or JSON; "
             "one pair per row is read, under the header user, item; for JSON give its --format")
    sep = max("\t", ",", ";", "|", "::", key=first.count)
    if sep == "::":  # MovieLens 1M's: csv takes one character
        sep, lines = "\x1f", (line.replace("::", "\x1f") for line in lines)
    # comma and semicolon use csv quoting, the other separators none
    quoting = csv.QUOTE_MINIMAL if sep in ",;" else csv.QUOTE_NONE
    reader = csv.reader(lines, delimiter=sep, quoting=quoting, strict=True)
    end, added = 0, bool(header)  # lines are numbered as in the file
    try:
        # without RecBole's types, user_id:token, and pandas' index
        columns = [re.sub(r"Unnamed: .*|:.*", "", name).strip() for name in next(reader)]
        if not any(columns) or max(columns.count(name) for name in columns if name) > 1:
            fail(f"{path}: line 1 is empty or names a column twice: {quote(first)}")
        end = reader.line_num - added
        for row in reader:  # a row may span lines: from `line` to `end`
            line, end = end + 1, reader.line_num - added
            if row and len(row) != len(columns):
                fail(f"{path}: line {line} has {len(row)} fields, the header {len(columns)}")
            # a quote left open swallows whole rows. A text's line looks like one if it has as
            # many fields, numbers where this row has them, no space after a comma, and in its
            # first field one word, with a digit if this row has
            inner = chain(*(y.split("\n")[1:] for y in row)) if end > line else ()
            for inside in (x.rstrip("\r").split(sep) for x in inner):
                unlike = (b.startswith(" ") or NUMBER.fullmatch(a) and not NUMBER.fullmatch(b)
                          for a, b in zip(row, inside))
                alike = re.search(r"\d", inside[0]) or not re.search(r"\d", row[0])
                alike = alike and len(inside) == len(row) and len(inside[0].split()) == 1
                if alike and not any(unlike):
                    fail(f"{path}: line {line}: its quote has whole rows inside; close it")
            if row:
                yield line, dict(zip(columns, row))
    except csv.Error as error:
        fail(f"{path}: line {end + 1}: {error}: a quote is not closed, or not doubled; fix it")


def json_rows(path):
    """(line, object) of a JSON-lines file, blank lines skipped; SystemExit2 for any other line."""
    for n, line in enumerate(text_lines(path), 1):
        if not line.strip():
            continue
        # Amazon 2014's metadata are Python literals; literal_eval runs no code
        row = None
        for parse in (json.loads, ast.literal_eval):
            with suppress(ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
                row = parse(line)
                break
        if not isinstance(row, dict):
            fail(f"{path}: line {n} is not a JSON object ({quote(line.strip())}); one object per "
                 "line is read (`jq -c .[] FILE` makes them of an array)")
        yield n, row


ROLES = ("user", "item", "rating", "timestamp", "text")
GENRES = ("unknown Action Adventure Animation Children's Comedy Crime Documentary Drama Fantasy "
          "Film-Noir Horror Musical Mystery Romance Sci-Fi Thriller War Western").split()
# name: (reader; the interactions' columns in the order of ROLES, the last ones may be missing; the
# metadata's title and text columns (title+year: the year goes behind it, *: all other columns; the
# id's column has the interactions' name); if the files have no header line, the headers of both)
FORMATS = {
    "table": (table_rows, "user item rating timestamp text", "title *"),
    "recbole": (table_rows, "user_id item_id rating timestamp", "title+release_year *"),
    "ml-100k": (table_rows, "user item rating timestamp", "title genres",
                "user\titem\trating\ttimestamp", "|".join(["item|title|date|video|url", *GENRES])),
    "ml-1m": (table_rows, "user item rating timestamp", "title genres",
              "user::item::rating::timestamp", "item::title::genres"),
    "ml-latest": (table_rows, "userId movieId rating timestamp", "title genres"),
    "amazon2018": (json_rows, "reviewerID asin overall unixReviewTime reviewText",
                   "title brand category categories description"),  # categories: in 2014
    "amazon2023": (json_rows, "user_id parent_asin rating timestamp text",  # variants share one id
                   "title store categories description"),
    "yelp": (json_rows, "user_id business_id stars date text", "name city categories"),
}
# the paper's filters: format, --min-rating, --since, --until, --k-core; users, items, pairs as the
# paper prints them (electronics2023's cannot be a 10-core's: 1.8 pairs a user)
PRESETS = {
    "toys": ("amazon2018", 4.0, "2015-01-01", "2018-01-01", 10, (22338, 9023, 200511)),
    "cds": ("amazon2018", 4.0, "2014-01-01", "2016-01-01", 10, (19385, 8279, 186535)),
    "yelp2018": ("yelp", 4.0, "2015-01-01", "2018-01-01", 10, (29832, 16781, 513976)),
    "electronics2023": ("amazon2023", 3.0, "2010-01-01", "2018-01-01", 10, (97570, 44669, 178259)),
}
# other usual names of a table's columns, in lower case, without spaces and underscores
SYNONYMS = {"user": "userid uid reviewerid", "rating": "stars overall score", "title":
            "name movietitle itemname", "timestamp": "time date datetime unixreviewtime", "item":
            "itemid iid movieid bookid productid businessid asin parentasin", "text":
            "review reviewtext"}
# the interactions' columns; readers of both files; the metadata's title, texts, year
Format = namedtuple("Format", [*ROLES, "rows", "meta", "title", "texts", "year"])


def format_of(name, path):
    """The Format of this name; a table's columns are found in the header of its interactions."""
    reader, columns, texts, *headers = FORMATS[name]
    rows, meta = [functools.partial(reader, header=one) for one in headers] or [reader, reader]
    columns = [*columns.split(), *[None] * 5][:5]  # None: there is no such column
    title, *texts = texts.split()
    title, _, year = title.partition("+")
    if name == "table":
        # without a row its header is not seen: read_pairs says so
        header = next(table_rows(path), (1, {}))[1]
        columns = [column_of(header, role, path) for role in ROLES]
        columns[:2] = columns[0] or "user", columns[1] or "item"
    return Format(*columns, rows, meta, title, texts, year or None)


def is_called(name, role):
    """Whether a column of this name usually plays this role."""
    return re.sub(r"[\s_-]", "", name).lower() in (role, *SYNONYMS[role].split())


def column_of(names, role, path):
    """The column that plays a role: the one of that name, else the only one of a usual name."""
    found = [role] if role in names else [name for name in names if is_called(name, role)]
    if len(found) > 1:
        fail(f"{path}: columns {quote(found)} could each be the {role}; rename one")
    return next(iter(found), None)


def print_summary(rows, parts, users, items):
    """Print what was read, PAIR (N,), and its split, {name: pairs (N, 2)}; users, items: rows."""
    # the ranges show what no filter catches: a rating of 1e9, a time in 1970
    for name, write in (("rating", "{:g}".format),
                        ("seconds", lambda x: str(np.datetime64(int(x), "s"))[:10])):
        values = rows[name][~np.isnan(rows[name])]
        if not len(values):
            continue
        low, middle, high = np.quantile(values, [0, 0.5, 1])
        far = 100 * max(abs(middle), 1)
        if name == "seconds":  # 20 years; positions in a history, small numbers, are not dates
            far = 20 * 365.25 * 86400 if middle > 1e8 else np.inf
        odd = (np.abs(values - middle) > far).sum()
        note = f"; NOTE: {odd:,} far from the median, {write(middle)}" if odd else ""
        print(f"  {name} from {write(low)} to {write(high)}{note}")
    n_users, n_items, pairs = len(users), len(items), np.concatenate(list(parts.values()))
    sizes = "   ".join(f"{name} {len(part):,}" for name, part in parts.items())
    print(f"  users {n_users:,}   items {n_items:,}   pairs {len(pairs):,}   "
          f"density {len(pairs) / n_users / n_items:.3%}   {sizes}")
    cold = []
    for axis, (name, ids, others) in enumerate((("user", users, items), ("item", items, users))):
        count = np.bincount(pairs[:, axis], minlength=len(ids))
        q = np.quantile(count, [0, 0.25, 0.5, 0.75, 1])
        print(f"  pairs per {name}: min, quartiles, max", *(f"{count:.0f}" for count in q))
        # a crawler, or an item in every basket, says nothing, and distorts the rest
        if q[4] >= max(0.8 * len(others), 3 * q[2]):
            print(f"  note: {name} {ids[count.argmax()]['raw']} has pairs with "
                  f"{q[4] / len(others):.0%} of all {'users' if axis else 'items'}")
        cold.append(np.bincount(parts["train"][:, axis], minlength=len(ids)) == 0)
    # without a train pair nothing can be learnt; such pairs stay in valid and test
    if cold[0].any() or cold[1].any():
        of = ", ".join(f"{(cold[0][p[:, 0]] | cold[1][p[:, 1]]).sum():,} of {len(p):,} {name}"
                       for name, p in parts.items() if name != "train")
        print(f"  cold: {cold[0].sum():,} users and {cold[1].sum():,} items have no train pair; "
              f"{of} pairs are theirs (kept)")
    if min(n_users, n_items) < 50:
        print("  note: fewer than 50 users or items: too few to compare methods")
    # the texts, which an LLM is to read
    known, text = (np.mean([bool(row[name]) for row in items]) for name in ("known", "text"))
    print(f"  items with a title {known:.1%}, with further text {text:.1%}; such as:")
    for row in items[:: max(1, n_items // 3)][:3]:
        print(f"    {row['raw']}: {row['title']} | {row['text'][:90]}")
    titles, texts = ({row[name] for row in items} for name in ("title", "text"))
    if not known or len(titles) == 1 < n_items:
        alike = f"all {n_items:,} items have the title {quote(min(titles))}"
        print(f"  WARNING: {alike if known else 'no item has a title'}"
              f"{' and no text tells them apart' * (len(texts) == 1)}; see --meta")

# ---- Command line --------------------------------------------------------------------------------
def main(argv=None):
    parser = Parser(prog="hnlmrec.py", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)

    def stars(text):
        return text if text == "none" else number(float, -1e9, 1e9)(text)

    def date(text):  # kept as text; a ValueError is argparse's message
        iso_seconds(text)
        return text

    def command(name, text, example=""):
        example = f"example: python hnlmrec.py {name} --run runs/demo {example}"
        return commands.add_parser(name, help=text, epilog=example)

    texts = ("what `llm_negatives.py read` wrote, or item vectors of your own: one tensor (I, H), "
             "or more, in the order of items.jsonl")

    p = command("prepare", "read, filter, split",
                "--format recbole --reviews ml-100k.inter --meta ml-100k.item")
    bb.add_run_flags(p, device=False)
    p.add_argument("--format", choices=list(FORMATS), help="of both files (preset's, else table: a "
                   "header line, then fields separated by tabs, commas, semicolons, bars or ::)")
    p.add_argument("--reviews", metavar="FILE", help="interactions, .gz read directly")
    p.add_argument("--meta", metavar="FILE", help="item metadata; without it items have no text")
    bb.add_flags(
        p, ("--reviews-per-user", number(int, 0), 2, "reviews of train pairs in a user's profile"),
        ("--k-core", number(int, 1), None, "interactions each user and item must have (preset's, "
         "else 5)"), ("--seed", number(int, 0), 0, "of a random split; the rows' order counts too"))
    p.add_argument("--preset", choices=list(PRESETS), help="its format and filters; flags win")
    p.add_argument("--min-rating", type=stars, help="keep ratings of at least this many stars; "
                   "`none`: all (preset's, else 4); of a repeated pair the latest counts")
    p.add_argument("--since", type=date, help="keep pairs from this day on: 2015-01-01, UTC")
    p.add_argument("--until", type=date, help="keep pairs before this day")
    p.add_argument("--split", choices=["random", "last", "time"], help="80/10/10 per user, at "
                   "least one each (default), each user's last two, or 80/10/10 by one cut in time")
    for name in PARTS:
        p.add_argument(f"--{name}-file", metavar="FILE", help="your own split: give all three")

    p = command("judge", "learn what the texts say a user likes; list likely false negatives")
    bb.add_run_flags(p, "judge.safetensors")
    bb.add_flags(
        p, ("--text-vectors", str, "texts.safetensors", texts),
        ("--likely", number(int, 1), 20, "likely false negatives to list for each user"),
        ("--epochs", number(int, 1), 8, "passes over the users"),
        ("--lr", number(float, 0, open_low=True), 1e-3, "learning rate at first; it falls to 0"),
        ("--seed", number(int, 0), 0, "decides draws and dropout"))
    p.add_argument("--dropout", nargs="+", type=number(float, 0, 0.95), default=[0.0, 0.5],
                   help="dropout rates of the text vectors, each tried; "
                        "validation chooses")

    p = command("train", "train backbone and projector with the LLM's negatives", "--alpha 0.5")
    bb.add_training_flags(p, "model-hnlmrec.safetensors", default="dns")
    g = p.add_argument_group("the paper's own form")
    g.add_argument("--paper", action="store_true",
                   help="z as the negative of (e_u; e_i), the projector in no optimizer, and: "
                   + ", ".join(f"{name.replace('_', '-')} {value}" for name, value in PAPER.items())
                   + "; explicit flags override these")
    g.add_argument("--train-projector", action="store_true",
                   help="with --paper: the projector is trained")
    g.add_argument("--hinge", type=number(float, 0), default=0.0, metavar="MARGIN",
                   help="a hinge in place of BPR, as in the published code with 0.3; 0: BPR")
    g = p.add_argument_group("the negative e⁻ and the losses")
    share, weight = number(float, 0, 1), number(float, 0)
    bb.add_flags(
        g, ("--alpha", share, 0.02, "share of z in the negative e⁻, at most 1"),
        ("--lambda1", weight, 1.0, "weight of the alignment loss of z"),
        ("--lambda-s", weight, 0.01, "weight of the semantic alignment (e_u, e_i; items' texts)"),
        ("--lambda-f", weight, 0.0, "weight of L_false: e⁻ < likely false items < positives"),
        ("--gamma", weight, 0.2, "within L_false, weight of positives > likely false items"),
        ("--text-init", share, 1.0, "share of the items' texts in the initial vectors, at most 1"),
        ("--tau-c", number(float, 0, open_low=True), 0.2, "temperature of the alignment losses"),
        ("--k", number(int, 1, 2**16), 4, "generated vectors that the self-attention sees"))
    g.add_argument("--attention", action=BooleanOptionalAction, default=True,
                   help="self-attention in the projector; --no-attention is an ablation")
    g.add_argument("--keep-clear", choices=["none", "judge", "valid"], default="none",
                   help="items that dns takes only if it must: the judge's likely ones (--lambda-f "
                        "implies it), or the user's validation positives, an oracle")
    g = p.add_argument_group("what it is trained with")
    bb.add_flags(
        g, ("--negatives", str, "negatives", "first part of the shards' names, or `none`"),
        ("--text-vectors", str, "texts.safetensors", texts),
        ("--judge", str, "judge.safetensors", "likely items of --lambda-f and --keep-clear judge"),
        ("--cf", str, "cf.safetensors", "CF vectors that L_align's hard negatives are mined with"))
    g.add_argument("--control", choices=["none", "random", "shuffled"], default="none",
                   help="replace the LLM's vectors, to see what they are worth")
    bb.add_band_flags(g)

    p = command("blend", "put several recommenders into one score, weights by validation",
                "--parts 'model-judged.safetensors|model-dns.safetensors,judge.safetensors'")
    bb.add_run_flags(p, "model-full.safetensors", device=False)
    p.add_argument("--parts", required=True, metavar="FILES",
                   help="models, judges or texts inside the run folder, comma-separated; A|B: "
                        "whichever makes the better blend on validation")

    p = command("trace", "follow one (user, item) pair through a finished run", "--user 196")
    p.add_argument("--run", required=True, metavar="DIR", help="folder of a finished run")
    p.add_argument("--user", metavar="ID", type=given_id, help="the user's id in the ratings file; "
                   "default: the first with a generated negative")
    p.add_argument("--item", metavar="ID", type=given_id,
                   help="a train item of that user; left out: the first with a generated negative")
    p.add_argument("--model", default="model-hnlmrec.safetensors", help="model file of `train`")
    args = parser.parse_args(argv)
    if args.command == "train":
        flags = commands.choices["train"]
        if args.paper:  # parse again, with the paper's values as defaults
            flags.set_defaults(**PAPER)
            args = parser.parse_args(argv)
        check_flags(args, flags.get_default)
    programs = {"prepare": prepare, "judge": fit_judge, "train": train_hnlmrec, "blend": blend,
                "trace": trace}
    programs[args.command](args)


if __name__ == "__main__":
    run_cli(main)
