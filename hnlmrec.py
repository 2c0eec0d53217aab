"""hnlmrec.py: the first and the last step of the pipeline: the data, and the recommender trained
with the LLM's negatives.

prepare   raw ratings and item metadata -> data.safetensors (train, valid, test), items.jsonl,
          users.jsonl
train     data + cf.safetensors + negatives-*.safetensors -> model-hnlmrec.safetensors: backbone
          and projector, trained with
              z   = MLP(self-attention over K generated vectors of the user)   the projector
              e⁻  = alpha z + (1 - alpha) e_j, j a sampled item                mixing, z detached
              L   = BPR(e_u, e_i, e⁻) + lambda1 L_align(z; e_i, mined)
                    + lambda_s L_sem(e_u, e_i; LLM texts) + lambda2 ‖Θ‖²       HNLMRec
          and with --paper as the paper has it: PaperHNLMRec
trace     prints one (user, item) pair's way from the raw line to the gradient, with the values of a
          finished run

Alone:  python hnlmrec.py prepare --run runs/NAME --reviews ratings.tsv --meta items.tsv
        python hnlmrec.py train --run runs/NAME
"""

import calendar
import csv
import gzip
import json
import math
import re
import time
import zlib
from argparse import Namespace
from array import array
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from backbones import (
    Parser,
    add_training_flags,
    bpr_loss,
    build_backbone,
    end_processes,
    fail,
    file_digest,
    fit,
    l2_loss,
    load_data,
    load_model,
    load_negatives,
    load_tensors,
    make_sampler,
    mine_hard_negatives,
    nearest_items,
    number,
    pair_keys,
    rank,
    read_jsonl,
    require_digest,
    restore,
    row_of,
    run_cli,
    save_tensors,
    share_of,
    share_weight,
    start_processes,
    take,
    up_to_date,
    validation,
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


def sum_of_train_items(items, train, n_users):
    """The sum of each user's train items: items (I, H), train (N, 2) -> (U, H)."""
    total = items.new_zeros(n_users, items.shape[1])
    for part in train.split(2**16):  # all train pairs' vectors at once would be N x H
        total.index_add_(0, part[:, 0], items[part[:, 1]])
    return total


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
    centred = text - text.mean(0)
    values, vectors = torch.linalg.eigh(centred.T @ centred)
    scale = values.clamp(min=values[-1] * 1e-4) ** -0.5  # directions that hardly vary stay small
    items = F.normalize(centred @ vectors * scale, dim=1)
    return sum_of_train_items(items, train, n_users), items


class Relevance:
    """How well an item fits a user by two tables of factors, in standard deviations of that user's
    fit over all items: (x - mean) / std with x = users[u] · items[j]. What should fit the user is a
    likely false negative, and `backbones.dns` can be kept clear of it. Beyond the paper.

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


class HNLMRec(nn.Module):
    """Backbone, projector and semantic projector, trained together: `loss` is one step of

        L = BPR(e_u, e_i, e⁻) + lambda1 L_align + lambda_s L_sem + lambda2 ‖Θ‖².

    backbone: has forward() -> users (U, D), items (I, D), score() and ego(), as backbones.Backbone.
    projector, semantic: a Projector and a SemanticProjector into the same D.
    sample: draws e_j, as backbones.make_sampler returns it; with dns, the highest scored of a few.
    table: a NegativeTable; hidden (n, H): the generated vectors that its rows number.
    mined (U, M): item ids, each user's CF-mined hard negatives. pairs (N, 2): the train pairs.
    settings: a Namespace with
        alpha       share of z in e⁻                  tau_c       temperature of L_align and L_sem
        lambda1     weight of L_align                 align_rows  pairs that L_align sees, a step
        lambda_s    weight of L_sem                   k           generated vectors in a set
        reg         lambda2, weight of the L2 term    refresh     steps between new values of z
    All tensors on one device."""

    def __init__(
            self, backbone, projector, semantic, sample, table, hidden, mined, pairs, settings):
        super().__init__()
        self.backbone, self.projector, self.semantic = backbone, projector, semantic
        self.sample, self.table, self.settings = sample, table, settings
        self.hidden, self.mined, self.pairs = hidden, mined, pairs
        self.z, self.steps = None, 0  # see z_of_all

    def loss(self, rows, generator):
        """Rows (B,) of the train pairs -> (scalar, {term: float}). A step for backbones.fit.

        Where processes share the rows, BPR and L2 are of this one's share; L_align and L_sem, which
        contrast a batch's rows with each other and see few of them, are computed by all alike."""
        s = self.settings
        u, i = self.pairs[rows].T  # (B,), (B,)
        own = share_of(self.table(rows, 1, generator)[:, 0])  # (B,) each pair's generated vector
        user_vectors, item_vectors, users, items, negatives, j = self.sample(u, i, generator)

        # BPR: the positive e_i above e⁻. Its gradient stops at z: it would teach the projector to
        # make easy negatives
        if s.alpha:
            negatives = mix(self.z_of_all(generator)[own], negatives, s.alpha)
        bpr = bpr_loss(self.backbone.score(users, items), self.backbone.score(users, negatives))
        logs = {"bpr": bpr.item()}

        # L2, of the parameters behind the batch's users, positives and sampled items
        ego_users, ego_items = self.backbone.ego()
        l2 = l2_loss(take(ego_users, share_of(u)), take(ego_items, share_of(i)), take(ego_items, j))
        loss = (bpr + s.reg * l2) * share_weight(len(rows))

        # L_align, on the first rows: z near one of the user's mined items. It trains the projector
        # alone, towards where the backbone has these items now
        if s.lambda1:
            a = slice(0, s.align_rows)
            z = self.projector(self.hidden[self.table(rows[a], s.k, generator)])  # (A, D)
            pick = torch.randint(
                self.mined.shape[1], (len(z),), generator=generator, device=u.device)
            mined = take(item_vectors, self.mined[u[a], pick])  # (A, D)
            positives = take(item_vectors, i[a])  # (A, D)
            align = alignment_loss(z, positives.detach(), mined.detach(), u[a], s.tau_c)
            loss = loss + s.lambda1 * align
            logs["align"] = align.item()

        # L_sem, on twice as many rows: e_u and e_i near their projected texts
        if s.lambda_s:
            some_users, some_items = (ids[: 2 * s.align_rows].unique() for ids in (u, i))
            user_texts, item_texts = self.semantic(some_users, some_items)
            meaning = (semantic_alignment(take(user_vectors, some_users), user_texts, s.tau_c)
                       + semantic_alignment(take(item_vectors, some_items), item_texts, s.tau_c))
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
        _, _, users, items, negatives, j = self.sample(u, i, generator)
        u, i = share_of(u), share_of(i)

        # e⁻: the projected vectors mixed into the sampled items
        z = self.projector(self.hidden[share_of(self.table(rows, s.k, generator))])  # (B, D)
        negatives = s.alpha * z + (1 - s.alpha) * negatives

        # BPR, or the hinge of the published code: the positive e_i above e⁻
        scores = self.backbone.score(users, items), self.backbone.score(users, negatives)
        ranking = hinge_loss(*scores, s.hinge) if s.hinge else bpr_loss(*scores)

        # L_CL: e_u near e_i and far from z
        contrast = paper_contrastive_loss(users, items, z, s.tau_c)

        # L2, of the parameters behind the batch's users, positives and sampled items
        ego_users, ego_items = self.backbone.ego()
        l2 = l2_loss(take(ego_users, u), take(ego_items, i), take(ego_items, j))
        logs = {"hinge" if s.hinge else "bpr": ranking.item(), "contrast": contrast.item()}
        return (ranking + s.lambda1 * contrast + s.reg * l2) * share_weight(len(rows)), logs

# --------------------------------------------------------------------------------------------------
# train: the program around the loss
# --------------------------------------------------------------------------------------------------

# What the paper and its published code state of this stage; their alpha on Toys is 0.01
PAPER = {"dim": 512, "layers": 3, "batch_size": 10_000, "lr": 1e-3, "reg": 1e-4, "sampler": "rns",
         "alpha": 1e-4, "lambda1": 1e-3, "tau_c": 0.2, "lambda_s": 0.0, "text_init": 0.0}


def train(args):
    """Train backbone and projector together; write the state of the best validation."""
    check_flags(args)
    run, out, data = Path(args.run), Path(args.run) / args.out, load_data(args.run)

    # a file made with these settings from these inputs need not be made again
    settings = {key: value for key, value in vars(args).items()
                if key not in ("run", "out", "force", "device", "command")}
    made = load_negatives(run, args.negatives, data["digest"])
    settings["data"], settings["negatives_digest"] = data["digest"], made["digest"]
    settings["cf_digest"] = require_digest(
        run / args.cf, f"python backbones.py pretrain --run {run}")
    if up_to_date(out, settings, "python hnlmrec.py train", args.force):
        return

    # everything that trains, on the device of the train pairs
    _, _, device = start_processes(args.device)
    data |= {name: data[name].to(device) for name in ("train", "valid")}
    method = build(run, args, data, made)
    own, n = method.table.own, len(data["train"])
    print(f"train: {own} of {n} train pairs have a generated negative of their own; "
          f"the other {n - own} use their user's other ones", flush=True)

    # train; what the file keeps is the state of the best validation, not the last one
    start, modules = time.time(), dict(method.named_children())
    state, history = fit(
        modules, method.loss, n, validation(method.backbone, data, users=args.eval_users),
        epochs=args.epochs,
        batch_size=args.batch_size, lr=args.lr, eval_every=args.eval_every, patience=args.patience,
        seed=args.seed, label=f"{args.backbone} hnlmrec")
    if rank():
        return
    restore(modules, state)

    # the vectors that rank, and for the report z of each generated pair; K is the pair alone, so
    # that it is repeatable
    with torch.no_grad():
        users, items = method.backbone.eval()()
        z = torch.cat([method.projector(part[:, None]) for part in method.hidden.split(4096)])
    vectors = {"user": users, "item": items, "z": z.half(), "z_pairs": made["pairs"]}
    save_tensors(out, {**state, **vectors},
                 {"settings": settings, "n_users": data["n_users"], "n_items": data["n_items"],
                  "history": history, "own_negatives": own, "seconds": time.time() - start})
    print(f"wrote {out}")


def check_flags(args):
    """Raises SystemExit2 for flags of `train` that would have no effect beside the others."""
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

    # the hard negatives that the CF model mines, which z is to lie near
    maker = f"python backbones.py pretrain --run {run}"
    cf_model, _, _ = load_model(run / settings.cf, maker, data)
    mined = mine_hard_negatives(cf_model, train, settings.mine_first, settings.mine_last)

    # what the LLM made, or what the control puts in its place
    torch.manual_seed(settings.seed)
    made = controlled(made, settings.control, settings.seed)
    hidden, text = made["hidden"].to(device), made["text"].to(device)
    table = NegativeTable(made["pairs"].to(device), train, n_users, n_items)

    # the modules; the backbone may start from the texts
    backbone = build_backbone(
        settings.backbone, n_users, n_items, settings.dim, train, settings.layers)
    width = backbone()[0].shape[1]  # D, which with ngcf is not --dim
    projector = Projector(made["hidden"], width, settings.projector_width, settings.attention)
    projector = projector.to(device)
    semantic = SemanticProjector(text, train, n_users, width).to(device)
    if settings.text_init:
        part, vectors = settings.text_init, backbone.embedding.data
        start = text_start(semantic.item, train, n_users, vectors.shape[1], backbone.std)
        vectors.copy_(part * start + (1 - part) * vectors)

    # the sampler of e_j, kept clear of what the texts say the user would like
    penalty = None
    if settings.clear:
        texts = semantic.item
        if settings.control == "cleared":
            generator = torch.Generator().manual_seed(settings.seed)
            texts = texts[torch.randperm(n_items, generator=generator).to(device)]
        penalty = Relevance(*text_factors(texts, train, n_users), gain=settings.clear)
    sample = make_sampler(backbone, settings.sampler, train, m=settings.m, penalty=penalty)

    form = PaperHNLMRec if settings.paper else HNLMRec
    return form(backbone, projector, semantic, sample, table, hidden, mined, train, settings)


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
    made = load_negatives(run, settings.negatives, data["digest"])
    method = build(run, settings, data, made)
    restore(dict(method.named_children()), tensors)
    cf, _ = load_tensors(run / settings.cf, f"python backbones.py pretrain --run {run}")

    # the pair
    maker = f"python hnlmrec.py prepare --run {run}"
    users, items = read_jsonl(run / "users.jsonl", maker), read_jsonl(run / "items.jsonl", maker)
    titles = [item["title"] for item in items]
    u, i, row = find_pair(args, data, users, items)
    print(f"1. data       user {args.user} -> row {u}, item {items[i]['raw']} -> row {i}: "
          f"{titles[i]}; train pair number {row} of {len(data['train'])}")

    # what goes into the LLM, what comes out, and the step that trains with it
    trace_prompt(run, settings, users[u], items[i], u, i, titles, method.mined, cf)
    trace_negative(settings, data, made, method, row, titles, cf)
    trace_step(method, row)


def find_pair(args, data, users, items):
    """The rows of the user and of the item, and the number of their train pair."""
    u = row_of(users, args.user, "--user", Path(args.run) / "users.jsonl")
    own = [items[i]["raw"] for i in data["train"][data["train"][:, 0] == u, 1].tolist()]
    if args.item is not None and args.item not in own:
        fail(f"--item {args.item}: user {args.user} has no train pair with it "
             f"(for example {', '.join(own[:5])})")
    i = row_of(items, args.item or own[0], "--item", Path(args.run) / "items.jsonl")
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
    mark = [titles[n] + (" (mined)" if n in method.mined[u] else "") for n in near.tolist()]
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
    print(f"8. step       e_u·e_i {score:.3f}; loss {loss.item():.4f} = {terms} and L2\n"
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
    preset = PRESETS.get(args.preset, {})
    for name in ("format", "min_rating", "since", "until", "k_core"):
        if getattr(args, name) is None:
            setattr(args, name, preset.get(name, {"format": "table", "min_rating": "4", "k_core": 5}.get(name)))
    own = {"train": args.train_file, "valid": args.valid_file, "test": args.test_file}
    own = {name: path for name, path in own.items() if path}
    if own and len(own) < 3:
        fail("--train-file, --valid-file and --test-file go together; give all three")
    if not own and not args.reviews:
        fail("--reviews: give the interactions file (or --train-file, --valid-file and --test-file)")
    sources = list(own.values()) or [args.reviews]
    for path in [*sources, *filter(None, [args.meta])]:
        if not Path(path).is_file():
            fail(f"{path}: no such file; check --reviews, --meta and the three split files")
    settings = {name: getattr(args, name) for name in ("format", "min_rating", "since", "until", "k_core", "split", "seed", "reviews_per_user")}
    settings["files"] = {Path(path).name: Path(path).stat().st_size for path in [*sources, *filter(None, [args.meta])]}
    if up_to_date(out, settings, "python hnlmrec.py prepare", args.force):
        return

    min_rating = -np.inf if str(args.min_rating) == "none" else number(float, -1e9)(str(args.min_rating))
    since, until = (parse_day(day, flag) if day else default
                    for day, flag, default in ((args.since, "--since", -np.inf), (args.until, "--until", np.inf)))
    if own:
        user, item, part, names_u, names_i, total = read_own_split(own, args.format)
    else:
        user, item, seconds, names_u, names_i, total = read_interactions(args.reviews, args.format, min_rating, since, until)
        order = np.lexsort((-np.nan_to_num(seconds), item, user))  # of repeated pairs keep the latest
        first = np.append(True, (np.diff(user[order]) != 0) | (np.diff(item[order]) != 0)) if len(order) else np.zeros(0, bool)
        keep = order[first]
        user, item, seconds = user[keep], item[keep], seconds[keep]
        core = k_core(user, item, args.k_core)
        if not core.any():
            fail(f"{args.reviews}: nothing is left of {len(user)} interactions after --min-rating {args.min_rating} and "
                 f"--k-core {args.k_core}; lower one of them")
        user, item, seconds = user[core], item[core], seconds[core]
        if args.split == "last" and np.isnan(seconds).any():
            fail(f"{args.reviews}: --split last needs a timestamp in each row; use --split random")
        part = None

    # contiguous ids, in order of the raw id, so that they do not depend on the order of the file
    kept_u, kept_i = np.unique(user), np.unique(item)
    kept_u, kept_i = (np.array(sorted(kept, key=lambda code: natural(names[code]))) for kept, names in ((kept_u, names_u), (kept_i, names_i)))
    to_u, to_i = np.full(len(names_u), -1), np.full(len(names_i), -1)
    to_u[kept_u], to_i[kept_i] = np.arange(len(kept_u)), np.arange(len(kept_i))
    user, item = to_u[user], to_i[item]
    if part is None:
        part = split_pairs(user, item, seconds, args.split, args.seed)
    raw_u, raw_i = [names_u[code] for code in kept_u], [names_i[code] for code in kept_i]

    pairs = np.stack([user, item], 1)
    parts = {name: pairs[part == code] for code, name in enumerate(("train", "valid", "test"))}
    parts = {name: p[np.lexsort((p[:, 1], p[:, 0]))] for name, p in parts.items()}
    items = read_items(args.meta, args.format, raw_i)
    reviews = read_reviews(sources[0], args.format, raw_u, raw_i, parts["train"], args.reviews_per_user)
    users = [{"raw": raw, "reviews": reviews.get(code, [])} for code, raw in enumerate(raw_u)]

    lines = summarize(parts, len(raw_u), len(raw_i), items)
    print(f"prepare: {total:,} rows read")
    if preset.get("published"):
        print("  the paper prints: users {:,}   items {:,}   pairs {:,}".format(*preset["published"]))
    print("\n".join(lines))
    for name, rows in (("items.jsonl", items), ("users.jsonl", users)):
        write_atomic(run / name, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
    save_tensors(out, {name: torch.from_numpy(p) for name, p in parts.items()},
                 {"settings": settings, "n_users": len(raw_u), "n_items": len(raw_i), "seed": args.seed,
                  "items": file_digest(run / "items.jsonl"), "users": file_digest(run / "users.jsonl")})
    print(f"wrote {out}, items.jsonl, users.jsonl")


def k_core(user, item, k):
    """Drop users and items with fewer than k interactions until none is left. int (N,), (N,) -> bool (N,) kept."""
    keep = np.ones(len(user), bool)
    while k > 1:
        ok = (np.bincount(user, keep)[user] >= k) & (np.bincount(item, keep)[item] >= k) & keep
        if ok.sum() == keep.sum():
            break
        keep = ok
    return keep


def split_pairs(user, item, seconds, how, seed, valid=0.1, test=0.1):
    """Give each interaction to a part: 0 train, 1 valid, 2 test, user by user.

    how: 'random' (a seeded share of each user's items, at least one each) or 'last' (the last in time is test, the one
    before it valid). user, item, seconds (N,) -> int (N,). Raises SystemExit2 for a user with fewer than 3."""
    count = np.bincount(user)
    if (count[user] < 3).any():
        row = int(np.argmax(count[user] < 3))
        fail(f"user code {user[row]} has {count[user[row]]} interaction(s) after filtering, and a split needs 3; use --k-core 3 or more")
    key = np.random.default_rng(seed).random(len(user)) if how == "random" else -seconds
    order = np.lexsort((item, key, user))  # by user, then key; the item breaks ties in time the same way each run
    place = np.empty(len(user), np.int64)
    place[order] = np.arange(len(user)) - np.repeat(np.cumsum(count) - count, count)
    if how == "random":
        n_test, n_valid = (np.maximum(1, (count * share).astype(int))[user] for share in (test, valid))
    else:
        n_test = n_valid = 1
    return np.where(place < n_test, 2, np.where(place < n_test + n_valid, 1, 0))


def read_interactions(path, fmt, min_rating, since, until):
    """Stream a file into three arrays; memory grows with the rows kept and the distinct ids, never with the text.

    Returns user (N,), item (N,) int64 codes, seconds (N,) float64, user names, item names, rows read."""
    users, items, seen_rating, seen_time, total = {}, {}, False, False, 0
    u, i, t = array("q"), array("q"), array("d")
    start = time.time()
    for user, item, rating, seconds, _ in interactions(path, fmt):
        total += 1
        if total % 1_000_000 == 0:
            print(f"  read {total:,} rows, kept {len(u):,}, {total / (time.time() - start):,.0f} rows/s", flush=True)
        seen_rating |= not math.isnan(rating)
        seen_time |= not math.isnan(seconds)
        if rating < min_rating or seconds < since or seconds >= until:  # NaN compares false: no rating, no filter
            continue
        u.append(users.setdefault(user, len(users)))
        i.append(items.setdefault(item, len(items)))
        t.append(seconds)
    if not total:
        fail(f"{path}: no rows; is --format {fmt} right?")
    if min_rating > -np.inf and not seen_rating:
        fail(f"{path}: no rating column, so --min-rating {min_rating} cannot be applied; give --min-rating none")
    if (since > -np.inf or until < np.inf) and not seen_time:
        fail(f"{path}: no timestamp column, so --since and --until cannot be applied; leave them out")
    return np.array(u), np.array(i), np.array(t), list(users), list(items), total


def read_own_split(own, fmt):
    """The user's own three files, taken as they are: no rating filter, no core. A pair in two parts is an error."""
    users, items, rows = {}, {}, {}
    for code, (name, path) in enumerate(own.items()):
        for user, item, *_ in interactions(path, fmt):
            pair = (users.setdefault(user, len(users)), items.setdefault(item, len(items)))
            if rows.setdefault(pair, code) != code:
                fail(f"{path}: user {user}, item {item} is in another part too; each pair belongs to one of train, valid, test")
    pairs = np.array(list(rows))
    return pairs[:, 0], pairs[:, 1], np.array(list(rows.values())), list(users), list(items), len(rows)


def natural(name):
    """Sort key: whole numbers by value, before everything else by text."""
    return (0, int(name), "") if name.isdecimal() else (1, 0, name)


def parse_day(day, flag):
    """2015-01-01 -> seconds since 1970, UTC."""
    try:
        return calendar.timegm(datetime.fromisoformat(day).timetuple())
    except ValueError:
        fail(f"{flag} {day}: not a date; write it as 2015-01-01")


def summarize(parts, n_users, n_items, items):
    """The printed statistics, one list of lines."""
    pairs = np.concatenate(list(parts.values()))
    lines = [f"  users {n_users:,}   items {n_items:,}   pairs {len(pairs):,}   density {len(pairs) / n_users / n_items:.3%}   "
             + "   ".join(f"{name} {len(part):,}" for name, part in parts.items())]
    for axis, name in ((0, "user"), (1, "item")):
        q = np.quantile(np.bincount(pairs[:, axis], minlength=(n_users, n_items)[axis]), [0, 0.25, 0.5, 0.75, 1])
        lines.append(f"  pairs per {name}: min {q[0]:.0f}, quartiles {q[1]:.0f} {q[2]:.0f} {q[3]:.0f}, max {q[4]:.0f}")
    lines.append(f"  items with a title {np.mean([bool(r['known']) for r in items]):.1%}, with further text "
                 f"{np.mean([bool(r['text']) for r in items]):.1%}; for example:")
    lines += [f"    {row['raw']}: {row['title']} | {row['text'][:90]}" for row in items[:: max(1, len(items) // 3)][:3]]
    return lines


def read_items(path, fmt, raw_items):
    """Metadata of the kept items, in id order -> rows {raw, title, text, known}. An item without a title gets its raw id."""
    found, form, wanted = {}, FORMATS[fmt], set(raw_items)
    for n, row in form["meta"](path) if path else ():
        raw = str(row.get(form["item"], ""))
        if raw in wanted and raw not in found:
            try:
                found[raw] = form["fields"](row)
            except KeyError as error:
                fail(f"{path}: line {n} has no column {error} (found: {', '.join(list(row)[:8])}); --format {fmt} needs it")
    return [{"raw": raw, "title": found.get(raw, ("", ""))[0] or f"Item {raw}", "text": found.get(raw, ("", ""))[1],
             "known": bool(found.get(raw, ("", ""))[0])} for raw in raw_items]


def read_reviews(path, fmt, raw_users, raw_items, train, per_user, limit=200):
    """A second pass over the file for review texts: up to `per_user` of each user, of train pairs alone, so that no word
    about a validation or test item reaches a profile -> {user id: [text]}."""
    if not per_user or not FORMATS[fmt]["columns"][4]:
        return {}
    u, i = {raw: n for n, raw in enumerate(raw_users)}, {raw: n for n, raw in enumerate(raw_items)}
    keys, texts = set((train[:, 0] * len(raw_items) + train[:, 1]).tolist()), {}
    for user, item, _, _, text in interactions(path, fmt):
        if text and user in u and item in i and u[user] * len(raw_items) + i[item] in keys:
            own = texts.setdefault(u[user], [])
            if len(own) < per_user:
                own.append(clean(text)[:limit])
    return texts

# --------------------------------------------------------------------------------------------------
# prepare, part 2: readers. Each yields rows as they stand in the file; nothing is held.
# interactions: (user, item, rating or None, seconds since 1970 or None, text)      items: (item, title, text)
# --------------------------------------------------------------------------------------------------

def interactions(path, fmt):
    """(user, item, rating, seconds, text) of each row; rating and seconds are NaN, text None, where the file has none.

    Raises SystemExit2 for a missing column or a value that is no number, naming the file and the line."""
    form = FORMATS[fmt]
    user_c, item_c, rating_c, time_c, text_c = form["columns"]
    for n, row in form["rows"](path):
        if user_c not in row or item_c not in row:
            missing = user_c if user_c not in row else item_c
            fail(f"{path}: line {n} has no column {missing!r} (found: {', '.join(list(row)[:8])}); "
                 f"--format {fmt} needs {user_c} and {item_c}")
        try:
            rating = float(row[rating_c]) if row.get(rating_c) not in (None, "") else float("nan")
            seconds = form["time"](row[time_c]) if row.get(time_c) not in (None, "") else float("nan")
        except (ValueError, TypeError):
            fail(f"{path}: line {n}: {rating_c} {row.get(rating_c)!r} or {time_c} {row.get(time_c)!r} is not a value; "
                 "mend that line")
        yield str(row[user_c]), str(row[item_c]), rating, seconds, row.get(text_c)


@contextmanager
def open_text(path, encoding="utf-8"):
    """A text file, gzip-compressed when its name says so. newline="" leaves quoted line ends to csv.

    Raises SystemExit2 when it is not there, is cut off, or holds something else than text."""
    path = Path(path)
    if not path.is_file():
        fail(f"{path}: no such file; check --reviews and --meta")
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding=encoding, newline="") as file:
            yield file
    except (EOFError, gzip.BadGzipFile, zlib.error, UnicodeDecodeError, csv.Error) as error:
        fail(f"{path}: cannot be read to its end ({type(error).__name__}: {error}); is the download whole, and --format right?")


def table_rows(path, sep="\t", columns=None, encoding="utf-8"):
    """Rows of a delimited file as dicts. columns: the names, when the file has no header line. RecBole's header types
    (`user_id:token`) are dropped. A tab-separated file has no quoting; a comma-separated one follows the csv rules."""
    csv.field_size_limit(2**31 - 1)  # a review can be longer than the csv module's own limit
    with open_text(path, encoding) as file:
        if len(sep) > 1:  # MovieLens 1M's "::"
            reader = (line.rstrip("\r\n").split(sep) for line in file)
        else:
            reader = csv.reader(file, delimiter=sep, quoting=csv.QUOTE_MINIMAL if sep == "," else csv.QUOTE_NONE)
        names = columns or [name.split(":")[0].strip().lstrip("\ufeff") for name in next(reader, [])]
        for n, row in enumerate(reader, 1 if columns else 2):
            if row and len(row) < len(names) and not columns:
                fail(f"{path}: line {n} has {len(row)} fields, the header has {len(names)}; mend that line")
            if row:
                yield n, dict(zip(names, row))


def json_rows(path):
    """Rows of a JSON-lines file (.json or .jsonl, also .gz)."""
    with open_text(path) as file:
        for n, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield n, json.loads(line)
                except ValueError:
                    fail(f"{path}: line {n} is not JSON; these files hold one JSON object a line")


def clean(value):
    """Metadata to one line of text: lists joined, HTML tags and runs of white space removed."""
    if isinstance(value, (list, tuple)):
        value = ", ".join(clean(v) for v in value if v)
    return " ".join(re.sub(r"<[^>]+>", " ", str(value or "")).split())


def join_text(*parts, limit=400):
    """Non-empty parts as sentences, at most `limit` characters."""
    return ". ".join(part for part in map(clean, parts) if part)[:limit]


def recbole_fields(row):
    """Title and text of a row of a RecBole .item file, whose columns differ from dataset to dataset."""
    name = next((column for column in ("movie_title", "title", "name") if column in row), None)
    if name is None:
        raise KeyError("title")
    title = f"{row[name]} ({row['release_year']})" if row.get("release_year") else row[name]
    return clean(title), join_text(*(value for column, value in row.items() if column not in ("item_id", name, "release_year")))


# rows: reads the interactions; columns: the names of user, item, rating, time, text; time: that column's value -> seconds;
# meta: reads the items; item: the name of the id; fields: row -> (title, text)
FORMATS = {
    "table": {"rows": lambda p: table_rows(p, "," if ".csv" in Path(p).name else "\t"),
              "columns": ("user", "item", "rating", "timestamp", "text"), "time": float,
              "meta": lambda p: table_rows(p, "," if ".csv" in Path(p).name else "\t"), "item": "item",
              "fields": lambda r: (r["title"], join_text(*[v for k, v in r.items() if k not in ("item", "title")]))},
    "recbole": {"rows": table_rows, "columns": ("user_id", "item_id", "rating", "timestamp", None), "time": float,
                "meta": table_rows, "item": "item_id", "fields": lambda r: recbole_fields(r)},
    "ml-100k": {"rows": lambda p: table_rows(p, "\t", ["user", "item", "rating", "time"]),
                "columns": ("user", "item", "rating", "time", None), "time": float,
                "meta": lambda p: table_rows(p, "|", ["item", "title", "date", "video", "url", *ML100K_GENRES], "latin-1"),
                "item": "item", "fields": lambda r: (r["title"], ", ".join(g for g in ML100K_GENRES if r.get(g) == "1"))},
    "ml-1m": {"rows": lambda p: table_rows(p, "::", ["user", "item", "rating", "time"], "latin-1"),
              "columns": ("user", "item", "rating", "time", None), "time": float,
              "meta": lambda p: table_rows(p, "::", ["item", "title", "genres"], "latin-1"), "item": "item",
              "fields": lambda r: (r["title"], r["genres"].replace("|", ", "))},
    "ml-latest": {"rows": lambda p: table_rows(p, ","), "columns": ("userId", "movieId", "rating", "timestamp", None), "time": float,
                  "meta": lambda p: table_rows(p, ","), "item": "movieId",
                  "fields": lambda r: (r["title"], r["genres"].replace("|", ", "))},
    "amazon2018": {"rows": json_rows, "columns": ("reviewerID", "asin", "overall", "unixReviewTime", "reviewText"), "time": float,
                   "meta": json_rows, "item": "asin",
                   "fields": lambda r: (clean(r.get("title")), join_text(r.get("brand"), (r.get("category") or [])[-2:], r.get("description")))},
    "amazon2023": {"rows": json_rows, "columns": ("user_id", "parent_asin", "rating", "timestamp", "text"),
                   "time": lambda t: float(t) / 1000, "meta": json_rows, "item": "parent_asin",
                   "fields": lambda r: (clean(r.get("title")), join_text(r.get("store"), (r.get("categories") or [])[-2:], r.get("description")))},
    "yelp": {"rows": json_rows, "columns": ("user_id", "business_id", "stars", "date", "text"),
             "time": lambda t: calendar.timegm(datetime.fromisoformat(t).timetuple()),
             "meta": json_rows, "item": "business_id", "fields": lambda r: (clean(r.get("name")), join_text(r.get("city"), r.get("categories")))},
}
ML100K_GENRES = [
    "unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama", "Fantasy",
    "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western"]
# the paper's filters; published: users, items, interactions as the paper prints them
PRESETS = {
    "toys": {"format": "amazon2018", "min_rating": 4.0, "since": "2015-01-01", "until": "2018-01-01", "k_core": 10, "published": (22338, 9023, 200511)},
    "cds": {"format": "amazon2018", "min_rating": 4.0, "since": "2014-01-01", "until": "2016-01-01", "k_core": 10, "published": (19385, 8279, 186535)},
    "yelp2018": {"format": "yelp", "min_rating": 4.0, "since": "2015-01-01", "until": "2018-01-01", "k_core": 10, "published": (29832, 16781, 513976)},
    "electronics2023": {"format": "amazon2023", "min_rating": 3.0, "since": "2010-01-01", "until": "2018-01-01", "k_core": 10,
                        "published": (97570, 44669, 178259)},
    "ml-100k": {"format": "ml-100k", "min_rating": 4.0, "k_core": 5, "published": None},
    "ml-1m": {"format": "ml-1m", "min_rating": 4.0, "k_core": 5, "published": None},
}

# --------------------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------------------

def main(argv=None):
    parser = Parser(prog="hnlmrec.py", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    p = commands.add_parser("prepare", help="read, filter, split",
                            epilog="example: python hnlmrec.py prepare --run runs/demo --format recbole --reviews ml-100k.inter --meta ml-100k.item")
    p.add_argument("--run", required=True, metavar="DIR", help="folder for this run's files, made if needed")
    g = p.add_argument_group("raw files")
    g.add_argument("--format", choices=list(FORMATS), metavar="NAME", help="%(choices)s (preset's, else table: TSV or CSV with a header)")
    g.add_argument("--reviews", metavar="FILE", help="interactions, .gz read directly")
    g.add_argument("--meta", metavar="FILE", help="item metadata; without it items have no text")
    g.add_argument("--reviews-per-user", type=number(int, 0), default=2, metavar="N", help="review texts kept for a user's profile, of train pairs alone")
    g = p.add_argument_group("filters")
    g.add_argument("--preset", choices=list(PRESETS), metavar="NAME", help="format and filters of %(choices)s; flags given beside it win")
    g.add_argument("--min-rating", metavar="STARS", help="keep ratings of at least this many, or `none` (preset's, else 4)")
    g.add_argument("--since", metavar="DAY", help="keep interactions from this day on, as 2015-01-01, UTC")
    g.add_argument("--until", metavar="DAY", help="keep interactions before this day")
    g.add_argument("--k-core", type=number(int, 1), metavar="N", help="interactions each user and item must have (preset's, else 5)")
    g = p.add_argument_group("split")
    g.add_argument("--split", choices=["random", "last"], default="random", help="80/10/10 a user, or each user's last two in time")
    g.add_argument("--seed", type=number(int, 0), default=0, help="decides the random split")
    g.add_argument("--train-file", metavar="FILE", help="your own split instead, with --valid-file and --test-file")
    g.add_argument("--valid-file", metavar="FILE", help="your own split's validation pairs")
    g.add_argument("--test-file", metavar="FILE", help="your own split's test pairs")
    p.add_argument("--force", action="store_true", help="remake the output though it was made with other settings")

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
    g.add_argument("--m", type=number(int, 1), default=8, help="its uniform candidates")
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
    g.add_argument("--k", type=number(int, 1), default=4,
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
    g.add_argument("--cf", default="cf.safetensors",
                   help="CF vectors that the alignment's hard negatives are mined with")
    g.add_argument("--mine-first", type=number(int, 1), default=200,
                   help="best rank of the mined band")
    g.add_argument("--mine-last", type=number(int, 1), default=300,
                   help="last rank of the mined band")

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
    {"prepare": prepare, "train": train, "trace": trace}[args.command](args)


if __name__ == "__main__":
    run_cli(main)
    end_processes()
