"""Tests against oracles: brute force, closed forms, dense algebra, hand-worked cases.
`bash run.sh test` runs them."""

import argparse
import ast
import builtins
import bz2
import calendar
import contextlib
import dis
import functools
import gzip
import inspect
import io
import itertools
import json
import lzma
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import xml.etree.ElementTree
from argparse import Namespace
from collections import Counter
from datetime import datetime, timezone
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

import backbones
import eval as evaluation
import hnlmrec
import llm_negatives

HERE = Path(__file__).resolve().parent
N_USERS, N_ITEMS = 12, 30


def random_pairs(seed=0, n_users=N_USERS, n_items=N_ITEMS, per_user=8):
    """(N, 2) pairs without repeats, sorted by user, then item."""
    generator, pairs = torch.Generator().manual_seed(seed), []
    for u in range(n_users):
        items = torch.randperm(n_items, generator=generator)[:per_user].sort().values
        pairs.append(torch.stack([torch.full((per_user,), u), items], 1))
    return torch.cat(pairs)


def split_data(seed=0):
    """train, valid, test of random_pairs: 6, 1 and 1 of each user's 8."""
    pairs = random_pairs(seed).view(N_USERS, 8, 2)
    return {"train": pairs[:, :6].reshape(-1, 2), "valid": pairs[:, 6], "test": pairs[:, 7],
            "n_users": N_USERS, "n_items": N_ITEMS}


def rigged(users, items):
    """An MF whose vectors are given."""
    model = backbones.MF(len(users), len(items), users.shape[1])
    model.embedding.data = torch.cat([users, items])
    return model


# --------------------------------------------------------------------------------------------------
# Metrics and ranking
# --------------------------------------------------------------------------------------------------


def test_metrics_hand_worked():
    hits, relevant = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0]]).bool(), torch.tensor([3, 1])
    assert backbones.recall(hits, relevant, 4).tolist() == [2 / 3, 0]
    assert backbones.precision(hits, relevant, 4).tolist() == [0.5, 0]
    assert backbones.hit_rate(hits, relevant, 4).tolist() == [1, 0]
    assert backbones.mrr(hits, relevant, 4).tolist() == [1, 0]
    dcg, ideal = 1 + 1 / 2, 1 + 1 / math.log2(3) + 1 / 2
    assert backbones.ndcg(hits, relevant, 4).tolist() == pytest.approx([dcg / ideal, 0])
    # the ideal list is cut at k: with 3 relevant and k = 2 it holds two
    first = 1 / (1 + 1 / math.log2(3))
    assert backbones.ndcg(hits, relevant, 2).tolist() == pytest.approx([first, 0])
    third = torch.tensor([[False, False, True]])
    assert backbones.mrr(third, torch.tensor([1]), 3).item() == pytest.approx(1 / 3)


def by_score(scores, seen):
    """The items not in `seen`, the highest score first, equal ones by id: brute force."""
    unseen = [i for i in range(len(scores)) if i not in seen]
    return sorted(unseen, key=lambda i: (-float(scores[i]), i))


def brute_force_metrics(scores, data, k):
    rows = {}
    for u, own in enumerate(scores.tolist()):
        held = [i for v, i in data["test"].tolist() if v == u]
        if not held:
            continue
        seen = {i for name in ("train", "valid") for v, i in data[name].tolist() if v == u}
        gains = [i in held for i in by_score(own, seen)[:k]]
        dcg = sum(g / math.log2(n + 2) for n, g in enumerate(gains))
        ideal = sum(1 / math.log2(n + 2) for n in range(min(k, len(held))))
        first = gains.index(True) + 1 if any(gains) else math.inf
        rows[u] = {"Recall": sum(gains) / len(held), "NDCG": dcg / ideal,
                   "Precision": sum(gains) / k, "HitRate": float(any(gains)), "MRR": 1 / first}
    return rows


@pytest.mark.parametrize("rounded", [False, True])  # rounded scores are full of ties
def test_full_ranking_against_brute_force(rounded):
    data, generator = split_data(), torch.Generator().manual_seed(1)
    second = next(i for i in range(N_ITEMS) if [2, i] not in random_pairs().tolist())
    data["test"] = torch.cat([data["test"][2:], torch.tensor([[2, second]])])
    users = torch.randn(N_USERS, 4, generator=generator)
    items = torch.randn(N_ITEMS, 4, generator=generator)
    if rounded:
        users, items = users.round(), items.round()
    ids, values, skipped = evaluation.evaluate(rigged(users, items), data, "test", ks=(3, 10))
    assert skipped == 2 and ids.tolist() == list(range(2, N_USERS))
    for k in (3, 10):
        oracle = brute_force_metrics(users @ items.T, data, k)
        for name in evaluation.METRICS:
            expected = [oracle[u][name] for u in ids.tolist()]
            assert values[f"{name}@{k}"].tolist() == pytest.approx(expected)


def test_top_k_breaks_ties_by_index():
    scores = torch.tensor([[1.0, 2, 2, 1, 2, 0, 1]])
    assert backbones.top_k(scores, 5).tolist() == [[1, 2, 4, 0, 3]]
    wide = torch.randint(0, 4, (50, 200), generator=torch.Generator().manual_seed(0)).float()
    oracle = [by_score(row, ())[:20] for row in wide.tolist()]
    assert backbones.top_k(wide, 20).tolist() == oracle


def test_a_user_with_few_unseen_items_gets_no_seen_one():
    pairs = torch.tensor([[0, i] for i in range(8)])
    model, seen = rigged(torch.ones(1, 2), torch.ones(10, 2)), backbones.user_rows(pairs, 1)
    ranked = backbones.rank_unseen(model, torch.tensor([0]), seen, 5)
    assert ranked.tolist() == [[8, 9, -1, -1, -1]]


# --------------------------------------------------------------------------------------------------
# Backbones
# --------------------------------------------------------------------------------------------------


def dense_adjacency(pairs):
    a = torch.zeros(N_USERS + N_ITEMS, N_USERS + N_ITEMS)
    for u, i in pairs.tolist():
        a[u, N_USERS + i] = a[N_USERS + i, u] = 1
    degree = a.sum(1)
    scale = torch.where(degree > 0, degree.clamp(min=1) ** -0.5, 0.0)
    return torch.diag(scale) @ a @ torch.diag(scale)


def test_adjacency_against_dense_formula():
    pairs = random_pairs()[:40]  # the last users have no edge
    ours = backbones.normalized_adjacency(pairs, N_USERS, N_ITEMS).to_dense()
    assert torch.allclose(ours, dense_adjacency(pairs)) and torch.equal(ours, ours.T)


def test_lightgcn_against_dense_oracle():
    pairs = random_pairs()
    model = backbones.build_backbone("lightgcn", N_USERS, N_ITEMS, 4, pairs, 3)
    a = dense_adjacency(pairs)
    e = model.embedding.detach().clone().requires_grad_()
    hops = [e, a @ e, a @ a @ e, a @ a @ a @ e]
    oracle = sum(hops) / 4
    users, items = model()
    assert torch.allclose(torch.cat([users, items]), oracle, atol=1e-6)
    assert torch.allclose(model.pool(model.layers()[0]), users, atol=1e-6)
    weight = torch.randn(N_USERS + N_ITEMS, 4)
    (torch.cat([users, items]) * weight).sum().backward()
    (oracle * weight).sum().backward()
    assert torch.allclose(model.embedding.grad, e.grad, atol=1e-6)


@pytest.mark.parametrize("name", ["lightgcn", "mf"])
def test_vectors_made_of_texts_against_dense_algebra(name):
    """AlphaRec's form: the mean of the train items' texts, an MLP, hops, norm 1; no free vector."""
    torch.manual_seed(0)
    pairs, text = random_pairs()[:40], torch.randn(N_ITEMS, 6) * 3 + 1  # the last users have none
    model = backbones.build_backbone(name, N_USERS, N_ITEMS, 4, pairs, 2, True, text)
    standard = (text - text.mean(0)) / text.std(0)
    rows = torch.zeros(N_USERS + N_ITEMS, 6)
    rows[N_USERS:] = standard
    for u in range(N_USERS):
        own = [standard[i] for user, i in pairs.tolist() if user == u]
        if own:
            rows[u] = sum(own) / len(own)
    first, _, second = model.texts.mlp
    hidden = rows @ first.weight.T + first.bias
    e = torch.where(hidden > 0, hidden, 0.01 * hidden) @ second.weight.T + second.bias
    a = dense_adjacency(pairs)
    e = (e + a @ e + a @ a @ e) / 3 if name == "lightgcn" else e
    users, items = model()
    assert torch.allclose(torch.cat([users, items]), F.normalize(e, dim=1), atol=1e-5)
    assert all(part.startswith("texts.mlp") for part in model.state_dict())
    step = backbones.make_softmax_step(model, pairs, reg=0.1, n=20, tau=0.5)
    step(torch.arange(9), torch.Generator().manual_seed(3))[0].backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters())


def test_ngcf_against_dense_oracle():
    pairs = random_pairs()
    model = backbones.build_backbone("ngcf", N_USERS, N_ITEMS, 4, pairs, 2).eval()
    a = dense_adjacency(pairs)
    x = model.embedding
    hops = [x]
    for w1, w2 in zip(model.w1, model.w2):
        rows = []
        for node in range(len(x)):  # NGCF eq. 3-4, node by node
            message = x[node] @ w1.weight.T + w1.bias + w2.bias
            for other in range(len(x)):
                alike = (x[other] * x[node]) @ w2.weight.T
                message = message + a[node, other] * (x[other] @ w1.weight.T + alike)
            rows.append(F.leaky_relu(message, 0.2))
        x = torch.stack(rows)
        hops.append(F.normalize(x, dim=1))
    assert torch.allclose(torch.cat(model()), torch.cat(hops, 1), atol=1e-5)


@pytest.mark.parametrize("name", ["lightgcn", "ngcf"])
def test_the_adjacency_moves_with_the_model_and_is_not_saved(name):
    model = backbones.build_backbone(name, N_USERS, N_ITEMS, 4, random_pairs(), 2).eval()
    single, double = model()[0], model.to(torch.float64)()[0]  # float64 stands for another device
    assert double.dtype == torch.float64 and torch.allclose(double.float(), single, atol=1e-6)
    assert "adjacency" not in model.state_dict()


def test_neumf_ranks_as_it_scores():
    model = backbones.build_backbone("neumf", N_USERS, N_ITEMS, 8, random_pairs())
    users, items = model()
    one_by_one = torch.stack([torch.stack([model.score(u, i) for i in items]) for u in users])
    assert torch.allclose(model.score_all(users, items), one_by_one, atol=1e-6)
    with pytest.raises(SystemExit):  # two equal halves
        backbones.build_backbone("neumf", N_USERS, N_ITEMS, 7, random_pairs())


def pairs_with_gaps():
    """The train pairs of split_data without those of user 3 and of item 5, and X (U, I) float64."""
    train = split_data()["train"]
    train = train[(train[:, 0] != 3) & (train[:, 1] != 5)]
    x = np.zeros((N_USERS, N_ITEMS))
    x[tuple(train.T.numpy())] = 1
    return train, x


def dense_item_knn(x, shrink):
    w = np.zeros((N_ITEMS, N_ITEMS))
    for i in range(N_ITEMS):
        for j in range(N_ITEMS):
            shared, norm = (x[:, i] * x[:, j]).sum(), math.sqrt(x[:, i].sum() * x[:, j].sum())
            if i != j and shared:
                w[i, j] = shared / (norm + shrink)
    return w


def dense_rp3beta(x, alpha, beta):
    """Step by step: from item i to each of its users, from there to each of the user's items."""
    w = np.zeros((N_ITEMS, N_ITEMS))
    for i in range(N_ITEMS):
        for u in np.flatnonzero(x[:, i]):
            for j in np.flatnonzero(x[u]):
                if i != j:
                    to_user, to_item = 1 / x[:, i].sum(), 1 / x[u].sum()
                    w[i, j] += to_user**alpha * to_item**alpha / x[:, j].sum() ** beta
    return w


def dense_ease(x, ridge):
    p = np.linalg.inv(x.T @ x + ridge * np.eye(N_ITEMS))
    w = -p / np.diag(p)
    np.fill_diagonal(w, 0)
    return w


@pytest.mark.parametrize("ours, oracle, constants", [
    (backbones.item_knn, dense_item_knn, (7.0,)), (backbones.item_knn, dense_item_knn, (0.0,)),
    (backbones.rp3beta, dense_rp3beta, (0.6, 0.3)), (backbones.ease, dense_ease, (3.0,))])
def test_closed_forms_against_dense_algebra(ours, oracle, constants):
    """Weights, scores and ranking; a user and an item without a train pair are no trouble."""
    train, x = pairs_with_gaps()
    weight, dense = ours(train, N_USERS, N_ITEMS, *constants), oracle(x, *constants)
    assert (weight.layout is torch.strided) == (oracle is dense_ease)
    assert weight.to_dense().numpy() == pytest.approx(dense, abs=1e-5)
    model, scores = backbones.ItemWeights(weight, train, N_USERS), torch.tensor(x @ dense)
    users, items = model()
    assert model.score_all(users, items).numpy() == pytest.approx(scores.numpy(), abs=1e-5)
    some = torch.tensor([[0, 3], [3, 7]])
    ours_some = model.score(users[some][:, :, None], items[[2, 2, 9]])
    assert ours_some.numpy() == pytest.approx(scores[some][:, :, [2, 2, 9]].numpy(), abs=1e-5)
    data = split_data() | {"train": train}
    _, values, _ = evaluation.evaluate(model, data, "test", ks=(3,))
    expected = brute_force_metrics(model.score_all(users, items), data, 3)
    assert values["NDCG@3"].tolist() == pytest.approx([expected[u]["NDCG"] for u in range(N_USERS)])


@pytest.mark.parametrize("ours", [backbones.item_knn, backbones.rp3beta])
def test_topk_keeps_the_highest_neighbours_and_blocks_change_nothing(ours, monkeypatch):
    train, _ = pairs_with_gaps()
    whole = ours(train, N_USERS, N_ITEMS).to_dense()
    kept = ours(train, N_USERS, N_ITEMS, topk=4).to_dense()
    assert torch.equal(kept[kept != 0], whole[kept != 0])
    highest = F.pad(whole.topk(4).values, (0, N_ITEMS - 4))
    assert torch.equal(kept.sort(descending=True).values, highest)
    products = functools.partial(backbones.item_products, entries=4 * N_ITEMS)
    monkeypatch.setattr(backbones, "item_products", products)
    assert torch.equal(ours(train, N_USERS, N_ITEMS).to_dense(), whole)
    with pytest.raises(SystemExit) as error:
        ours(train, N_USERS, N_ITEMS, max_gib=1e-6)
    assert "--topk" in error.value.message


def test_popularity_ranks_by_train_count_then_by_id():
    train, x = pairs_with_gaps()
    model, rows = backbones.popularity(train, N_USERS, N_ITEMS), backbones.user_rows(train, N_USERS)
    ranked = backbones.rank_unseen(model, torch.arange(N_USERS), rows, N_ITEMS)
    for u, row in enumerate(ranked.tolist()):
        unseen = [i for i in range(N_ITEMS) if not x[u, i]]
        oracle = sorted(unseen, key=lambda i: (-x[:, i].sum(), i))
        assert [i for i in row if i >= 0] == oracle


# --------------------------------------------------------------------------------------------------
# Samplers
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.0, 0.75])
def test_sampler_is_exact(beta):
    two_unseen = [[N_USERS, i] for i in range(N_ITEMS) if i not in (7, 20)]
    pairs = torch.cat([random_pairs(), torch.tensor(two_unseen)])
    sampler = backbones.UnseenSampler(pairs, N_USERS + 1, N_ITEMS, beta)
    popularity = torch.bincount(pairs[:, 1], minlength=N_ITEMS).double()
    for user in (0, 5, N_USERS):
        seen = pairs[pairs[:, 0] == user, 1]
        generator = torch.Generator().manual_seed(user)
        draws = sampler(torch.full((400,), user), 100, generator).flatten()
        assert not torch.isin(draws, seen).any()
        weight = (popularity + 1) ** beta
        weight[seen] = 0
        expected = weight / weight.sum() * len(draws)
        free = expected > 0
        apart = (torch.bincount(draws, minlength=N_ITEMS) - expected)[free]
        chi2 = (apart**2 / expected[free]).sum()
        degrees = int(free.sum()) - 1
        # mean + 4 standard deviations, and a little for few degrees
        assert chi2 < degrees + 4 * math.sqrt(2 * degrees) + 4


def test_sampler_takes_a_repeated_pair_once():
    pairs, draws = random_pairs(), []
    for rows in (pairs, torch.cat([pairs, pairs[:30]])):
        sampler = backbones.UnseenSampler(rows, N_USERS, N_ITEMS, 0.75)
        draws.append(sampler(torch.arange(N_USERS), 50, torch.Generator().manual_seed(0)))
    assert torch.equal(*draws)


def test_weights_that_would_not_fit_into_63_bits_are_scaled_or_refused():
    """Item 0 has every user but the last, whom popularity ** 5 therefore gives nothing else."""
    n = 1000
    seeded = torch.Generator().manual_seed
    pairs = torch.stack([torch.arange(n), torch.zeros(n, dtype=torch.int64)], 1)
    pairs[-1, 1] = 1
    sampler = backbones.UnseenSampler(pairs, n, 4, beta=5.0)
    assert set(sampler(torch.tensor([n - 1]), 100, seeded(0)).flatten().tolist()) == {0}
    draws = sampler(torch.tensor([n - 2]), 3400, seeded(0)).flatten()  # weights 0, 2**5, 1, 1
    expected = [0, 3200, 100, 100]
    assert torch.bincount(draws, minlength=4).tolist() == pytest.approx(expected, abs=50)
    with pytest.raises(SystemExit) as error:
        backbones.UnseenSampler(pairs, n, 4, beta=12.0)
    assert "--beta 12.0" in error.value.message


def test_a_user_who_has_seen_everything_is_refused():
    with pytest.raises(SystemExit) as error:
        backbones.UnseenSampler(torch.tensor([[0, 0], [0, 1], [1, 0]]), 2, 2)
    assert error.value.code == 2 and "user row 0" in error.value.message


def test_dns_and_ahns_against_brute_force():
    generator = torch.Generator().manual_seed(0)
    users = torch.randn(6, 4, generator=generator)
    items = torch.randn(N_ITEMS, 4, generator=generator)
    candidates = torch.randint(N_ITEMS, (6, 5), generator=generator)
    positives = torch.randint(N_ITEMS, (6,), generator=generator)
    score = rigged(users, items).score
    s = users @ items.T
    ranked = []
    for b, own in enumerate(candidates.tolist()):
        ranked.append(sorted(own, key=lambda c, b=b: -s[b, c]))
    assert backbones.dns(score, users, items, candidates).tolist() == [own[0] for own in ranked]
    for _ in range(5):
        for b, j in enumerate(backbones.dns(score, users, items, candidates, top=2).tolist()):
            assert j in ranked[b][:2]
    penalty = torch.randn(6, 5, generator=generator)
    cleared = backbones.dns(score, users, items, candidates, penalty=penalty).tolist()
    for b, j in enumerate(cleared):  # the best in standard deviations of the scores, less penalty
        own = s[b, candidates[b]].numpy()
        assert j == candidates[b, (own / np.std(own, ddof=1) - penalty[b].numpy()).argmax()]
    assert cleared != backbones.dns(score, users, items, candidates).tolist()
    chosen = backbones.ahns(score, users, items, positives, candidates, 1.0, 0.5, -2).tolist()
    for b, j in enumerate(chosen):
        target = 0.5 / (s[b, positives[b]] + 1)
        assert j == min(candidates[b].tolist(), key=lambda c: abs(s[b, c] - target))


def test_mixgcf_against_loops():
    pairs, generator = random_pairs(), torch.Generator()
    model = backbones.build_backbone("lightgcn", N_USERS, N_ITEMS, 4, pairs, 2)
    user_layers, item_layers = model.layers()
    u, i = torch.tensor([0, 1, 2]), torch.tensor([3, 4, 5])
    candidates, users = torch.arange(6, 15).view(3, 3), model.pool(user_layers)[u]
    ours = backbones.mixgcf(users, item_layers, i, candidates, model.pool, generator.manual_seed(3))
    generator.manual_seed(3)
    hops = []
    for k in range(3):
        share = torch.rand((3, 1), generator=generator)
        rows = []
        for b in range(3):
            positive, others = item_layers[i[b], k], item_layers[candidates[b], k]
            mixed = share[b] * positive + (1 - share[b]) * others
            rows.append(max(mixed, key=lambda v: float(users[b] @ v)))
        hops.append(torch.stack(rows))
    assert torch.allclose(ours, sum(hops) / 3, atol=1e-6)


def test_mined_negatives_are_the_band_and_never_train_pairs():
    data = split_data()
    model = backbones.build_backbone("lightgcn", N_USERS, N_ITEMS, 8, data["train"])
    mined = backbones.mine_hard_negatives(model, data["train"], 2, 6)
    scores = model()[0] @ model()[1].T
    for u in range(N_USERS):
        seen = set(data["train"][data["train"][:, 0] == u, 1].tolist())
        assert mined[u].tolist() == by_score(scores[u], seen)[1:6]


@pytest.mark.parametrize("n_items, most, flags, band", [
    (1008, 300, (0, 0), (200, 300)), (14, 6, (0, 0), (3, 4)), (14, 12, (0, 0), (2, 2)),
    (1008, 300, (5, 60), (5, 60)),
    (1008, 300, (0, 50), (50, 50)), (1008, 300, (400, 0), (400, 400))])
def test_the_mined_band_is_a_share_of_the_catalogue_unless_given(n_items, most, flags, band):
    train = torch.stack([torch.zeros(most, dtype=torch.int64), torch.arange(most)], 1)
    assert backbones.mining_band({"train": train, "n_items": n_items}, *flags) == band


def test_a_reversed_band_is_refused():
    with pytest.raises(SystemExit) as error:
        backbones.mining_band({"train": random_pairs(), "n_items": N_ITEMS}, 5, 1)
    assert "--mine-first 5: lies after --mine-last 1" in error.value.message


def test_nearest_items_are_never_train_items_even_when_too_few_are_left():
    pairs = torch.tensor([[0, i] for i in range(8)])
    user, seen = torch.tensor([0]), backbones.pair_keys(pairs, 10)
    near = backbones.nearest_items(torch.ones(1, 2), user, torch.rand(10, 2), seen, 4)
    assert sorted(near[0].tolist()) == [-1, -1, 8, 9]
    held = backbones.pair_keys(torch.tensor([[0, 8]]), 10)
    assert evaluation.fhns_rate(user, near, held, 10) == 0.5


# --------------------------------------------------------------------------------------------------
# Losses, projector, mixing
# --------------------------------------------------------------------------------------------------


def test_sampled_softmax_against_direct_sum():
    generator, tau, total = torch.Generator().manual_seed(0), 0.3, 0.0
    p, n = torch.randn(4, generator=generator), torch.randn(4, 6, generator=generator)
    n[1, 2:4] = -torch.inf  # no negatives of row 1
    for b in range(4):
        up = math.exp(p[b] / tau)
        total -= math.log(up / (up + sum(math.exp(s / tau) for s in n[b].tolist())))
    assert backbones.sampled_softmax_loss(p, n, tau).item() == pytest.approx(total / 4, rel=1e-5)


@pytest.mark.parametrize("name, cosine", [("mf", True), ("lightgcn", False), ("neumf", False)])
def test_softmax_step_against_loops(name, cosine):
    """The loss over the drawn items that are none of the user's own; each backbone's own score."""
    torch.manual_seed(0)
    train = split_data()["train"]
    model = backbones.build_backbone(name, N_USERS, N_ITEMS, 4, train, 2, cosine)
    step = backbones.make_softmax_step(model, train, reg=0.1, n=20, tau=0.5)
    rows = torch.tensor([0, 1, 40])
    loss, _ = step(rows, torch.Generator().manual_seed(3))
    drawn = torch.randperm(N_ITEMS, generator=torch.Generator().manual_seed(3))[:20].tolist()
    users, items = model()
    if cosine:
        users, items = (F.normalize(v, dim=1) for v in model.ego())
    total, (ego_users, ego_items) = 0.0, model.ego()
    for u, i in train[rows].tolist():
        own = train[train[:, 0] == u, 1].tolist()
        assert set(own) & set(drawn)
        scores = (model.score(users[u], items) / 0.5).tolist()
        up, rest = math.exp(scores[i]), [math.exp(scores[j]) for j in set(drawn) - set(own)]
        total -= math.log(up / (up + sum(rest)))
        total += 0.1 * (ego_users[u].pow(2).sum() + ego_items[i].pow(2).sum()).item() / 2
    assert loss.item() == pytest.approx(total / 3, rel=1e-5)


def test_info_nce_against_direct_sum():
    generator = torch.Generator().manual_seed(0)
    z, c = torch.randn(4, 5, generator=generator), torch.randn(9, 5, generator=generator)
    positive, ignore = torch.zeros(4, 9, dtype=torch.bool), torch.zeros(4, 9, dtype=torch.bool)
    for b, (pos, ign) in enumerate((([0], []), ([1, 2], [3]), ([8], [0, 1, 2]), ([4, 5, 6], [6]))):
        positive[b, pos], ignore[b, ign] = True, True
    total = 0.0
    for b in range(4):
        e = [math.exp(float(F.cosine_similarity(z[b], c[k], 0)) / 0.3) for k in range(9)]
        up = sum(e[k] for k in range(9) if positive[b, k])
        total -= math.log(up / sum(e[k] for k in range(9) if positive[b, k] or not ignore[b, k]))
    ours = llm_negatives.info_nce(z, c, positive, 0.3, ignore).item()
    assert ours == pytest.approx(total / 4, rel=1e-5)
    # the mask leaves terms out of the denominator
    assert llm_negatives.info_nce(z, c, positive, 0.3).item() > ours


def test_alignment_against_direct_sum():
    generator = torch.Generator().manual_seed(0)
    z, i, m = (torch.randn(4, 5, generator=generator) for _ in range(3))
    ids, tau, total = [0, 1, 0, 2], 0.5, 0.0

    def e(a, b):
        return math.exp(float(F.cosine_similarity(a, b, 0)) / tau)

    for b in range(4):
        rest = sum(e(z[b], m[c]) for c in range(4) if ids[c] != ids[b])
        total -= math.log(e(z[b], m[b]) / (e(z[b], m[b]) + rest + e(z[b], i[b])))
    ours = hnlmrec.alignment_loss(z, i, m, torch.tensor(ids), tau)
    assert ours.item() == pytest.approx(total / 4, rel=1e-5)


def test_paper_contrastive_loss_hand_worked():
    """tau 0.5; row 1: cos(e_u, e_i) 1, cos(e_u, z) 0; row 2: 0.6 and 0.8, whatever the lengths."""
    e_u, e_i = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([[3.0, 0.0], [0.8, 0.6]])
    z = torch.tensor([[0.0, 5.0], [6.0, 8.0]])
    first = -math.log(math.exp(2) / (math.exp(2) + math.exp(0)))  # 0.1269
    second = -math.log(math.exp(1.2) / (math.exp(1.2) + math.exp(1.6)))  # 0.9130
    assert first == pytest.approx(0.1269, abs=1e-4) and second == pytest.approx(0.9130, abs=1e-4)
    vectors = [v.requires_grad_() for v in (e_u, e_i, z)]
    loss = hnlmrec.paper_contrastive_loss(*vectors, 0.5)
    assert loss.item() == pytest.approx((first + second) / 2, rel=1e-6)
    loss.backward()
    assert all(v.grad[1].abs().sum() > 0 for v in vectors)  # into all three
    with torch.no_grad():  # z is the negative: a step against its gradient leads away from e_u
        moved = z - 0.1 * z.grad
        assert F.cosine_similarity(e_u, moved)[1] < F.cosine_similarity(e_u, z)[1]


def test_hinge_hand_worked():
    positive, negative = torch.tensor([1.0, 0.5, 0.0]), torch.tensor([0.0, 0.4, 1.0])
    assert hnlmrec.hinge_loss(positive, negative, 0.3).item() == pytest.approx((0 + 0.2 + 1.3) / 3)


def test_semantic_alignment_against_direct_sum():
    generator = torch.Generator().manual_seed(0)
    v, t = (torch.randn(5, 3, generator=generator, requires_grad=True) for _ in range(2))
    ours, total = hnlmrec.semantic_alignment(v, t, 0.4), 0.0
    for a in range(5):
        e = [math.exp(F.cosine_similarity(v[a], t[b], 0).item() / 0.4) for b in range(5)]
        total -= math.log(e[a] / sum(e))
    assert ours.item() == pytest.approx(total / 5, rel=1e-5)
    ours.backward()
    assert v.grad.abs().sum() > 0 and t.grad.abs().sum() > 0


def test_a_users_text_is_the_mean_of_the_train_items_texts():
    text, train = torch.randn(4, 6), torch.tensor([[0, 1], [0, 3], [1, 2]])
    semantic = hnlmrec.SemanticProjector(text, train, 2, 5)
    x = F.normalize((text - text.mean(0)) / text.std(0), dim=1)
    of_users = F.normalize(torch.stack([x[1] + x[3], x[2]]), dim=1)
    assert torch.allclose(semantic.user, of_users, atol=1e-6)
    users, items = semantic(torch.tensor([1]), torch.tensor([0, 2]))
    assert torch.allclose(users[0], items[1], atol=1e-6)  # a user with one item reads as that item


def test_text_start_against_svd():
    """The items' start is U S of their centred texts (signs are free), a user's the sum over the
    train items; a narrow text is padded."""
    torch.manual_seed(0)
    text = torch.randn(20, 9)
    train = torch.tensor([[0, 3], [0, 7], [1, 3], [3, 1], [3, 2], [3, 19]])
    start = hnlmrec.text_start(text, train, 4, 3, 0.1)
    u, s, _ = torch.linalg.svd((text - text.mean(0)).double(), full_matrices=False)
    items = u[:, :3] * s[:3]
    users = torch.stack([items[[3, 7]].sum(0), items[3], 0 * items[0], items[[1, 2, 19]].sum(0)])
    for ours, whole in ((start[4:], items), (start[:4], users)):
        whole = whole.flip(1) * 0.1 / whole.pow(2).mean().sqrt()
        assert torch.allclose(ours.double().abs(), whole.abs(), atol=1e-5)
        assert float(ours.pow(2).mean().sqrt()) == pytest.approx(0.1)
    assert torch.allclose(hnlmrec.text_start(text, train, 4, 12, 0.1)[:, 9:], torch.zeros(24, 3))


def judge_by_loops(judge, history, j, left_out=None):
    """The formula of llm_negatives.Judge for one user with these train items, and item j."""
    item = judge.item_map.weight @ judge.text[j]
    beta, likeness = judge.beta(), []
    for k in history:
        if k != left_out:
            cosine = F.cosine_similarity(judge.history_map.weight @ judge.text[k], item, 0)
            likeness.append(beta * (cosine - 1))
    mean = torch.stack(likeness).logsumexp(0) - math.log(len(likeness))
    return judge.scale.exp() * (mean / beta + 1) + judge.bias[j]


def small_judge(train, width=6):
    torch.manual_seed(0)
    readings = [torch.randn(N_ITEMS, 5), torch.randn(N_ITEMS, 4)]
    judge = llm_negatives.Judge(readings, train, N_USERS, width, beta=3)
    torch.nn.init.normal_(judge.history_map.weight)
    torch.nn.init.normal_(judge.item_map.weight)
    torch.nn.init.normal_(judge.bias)
    text = F.normalize(torch.cat([backbones.whiten(layer) for layer in readings], 1), dim=1)
    assert torch.allclose(judge.text, text)
    return judge


def test_judge_step_against_loops_over_the_left_out_items():
    """The step's loss and gradients against loops over pairs, with the cosines, the history without
    the judged item and the mask; an item drawn twice counts twice."""
    train = split_data()["train"]
    judge, users = small_judge(train), torch.tensor([2, 0, 5])
    generator = torch.Generator().manual_seed(3)
    own = {u: [j for v, j in train.tolist() if v == u] for u in users.tolist()}
    torch.rand(sum(map(len, own.values())), generator=generator, dtype=torch.float64)  # the order
    drawn = torch.randint(N_ITEMS, (40,), generator=generator)
    assert drawn.bincount().max() > 2 and any(int(j) in own[2] for j in drawn)
    losses = []
    for history in own.values():
        for i in history:
            judged = [i, *(j for j in drawn.tolist() if j not in history)]
            scores = torch.stack([judge_by_loops(judge, history, j, left_out=i) for j in judged])
            losses.append(scores.logsumexp(0) - scores[0])
    step = llm_negatives.make_judge_step(judge, train, 40)
    loss, _ = step(users, torch.Generator().manual_seed(3))
    oracle, learned = torch.stack(losses).mean(), list(judge.parameters())
    assert loss.item() == pytest.approx(oracle.item(), rel=1e-5)
    for ours, theirs in zip(*(torch.autograd.grad(x, learned) for x in (loss, oracle))):
        assert torch.allclose(ours, theirs, atol=2e-5)


def test_judge_step_leaves_out_a_share_of_the_texts():
    """Each number of an item's text is dropped with that chance, anew for history and item and at
    each step, and the others grow to make up for it; none is dropped of the judge that ranks."""
    train = split_data()["train"]
    judge, seen = small_judge(train), []
    before = judge()
    for text_map in (judge.history_map, judge.item_map):
        text_map.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    step = llm_negatives.make_judge_step(judge, train, 200, dropout=0.5)
    for _ in range(20):
        step(torch.arange(N_USERS), None)
    texts, grown = judge.text, torch.cat(seen)
    assert (grown == 0).float().mean() == pytest.approx(0.5, abs=0.02)
    near = (grown[:, None] - 2 * texts).abs().where(grown[:, None] != 0, 0).amax(2).amin(1)
    assert near.max() < 1e-6
    assert not torch.equal(seen[0] == 0, seen[2][:len(seen[0])] == 0)
    assert torch.equal(judge().history, before.history)


def test_judge_step_takes_some_of_a_long_history():
    """With two slots a user each item is judged by one other, drawn anew for each generator."""
    train = split_data()["train"]
    judge, users = small_judge(train), torch.tensor([1])
    own = [j for v, j in train.tolist() if v == 1]
    assert len(own) > 3
    step, seen = llm_negatives.make_judge_step(judge, train, 25, most=2), set()
    for seed in range(8):
        loss, _ = step(users, torch.Generator().manual_seed(seed))
        generator = torch.Generator().manual_seed(seed)
        order = torch.rand(len(own), generator=generator, dtype=torch.float64).argsort()[:2]
        pair, drawn = [own[n] for n in order], torch.randint(N_ITEMS, (25,), generator=generator)
        seen.add(tuple(pair))
        losses = []
        for i in pair:
            judged = [i, *(j for j in drawn.tolist() if j not in own)]
            scores = torch.stack([judge_by_loops(judge, pair, j, left_out=i) for j in judged])
            losses.append(scores.logsumexp(0) - scores[0])
        assert loss.item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)
    assert len(seen) > 3


def test_history_kernel_scores_by_all_of_the_users_items():
    """The kernel that ranks against loops, in blocks of any size; near 0 beta is the mean of the
    cosines and a large one their maximum; a user without a train pair gets the biases' order."""
    train = split_data()["train"]
    train = train[train[:, 0] != 3]
    judge = small_judge(train)
    kernel = judge()
    users, items = kernel()
    assert users.shape == (N_USERS, 1) and items.shape == (N_ITEMS, 1)
    scores = kernel.score_all(users, items)
    for u, j in ((0, 4), (2, 7), (5, 19)):
        history = [i for v, i in train.tolist() if v == u]
        oracle = judge_by_loops(judge, history, j).item()
        assert scores[u, j].item() == pytest.approx(oracle, rel=1e-5)
        assert kernel.score(users[u], items[j]).item() == pytest.approx(oracle, rel=1e-5)
    some = torch.tensor([[5], [2]])
    for most in (0, 2**28):  # in blocks, and with all of them kept
        ours = kernel.score_all(some, items, rows=3, most=most)
        assert torch.allclose(ours, scores[some[:, 0]], atol=1e-5)
    assert torch.equal(scores[3].argsort(), judge.bias.argsort())
    cosine = (kernel.history[train[train[:, 0] == 2, 1]] @ kernel.items.T).double()  # (n, I)
    assert len(cosine) > 1
    mean, most, between = cosine.mean(0), cosine.max(0).values, []
    for beta in (1e-3, 1, 8):
        total = (beta * (cosine - 1)).exp().sum(0)
        between.append(backbones.soft_maximum(total, torch.tensor(len(cosine)), 2.0, beta) / 2)
    assert torch.allclose(between[0], mean, atol=1e-3)
    assert (mean < between[1]).all() and (between[1] < between[2]).all() and (
        between[2] <= most).all()
    assert (most - between[2] <= math.log(len(cosine)) / 8).all()


def test_judge_finds_what_the_texts_decide_and_lists_it():
    """Two groups of users, each liking its own half of the items, which the texts tell apart."""
    generator = torch.Generator().manual_seed(0)
    half = torch.arange(40) % 2
    text = torch.randn(40, 8, generator=generator) + 3 * (half[:, None] == 0)
    pairs = []
    for u in range(30):
        some = torch.randperm(20, generator=generator)[:4]
        items = (half == u % 2).nonzero()[:, 0][some].sort().values
        pairs.append(torch.stack([torch.full((4,), u), items], 1))
    pairs = torch.cat(pairs)
    kernel = llm_negatives.Judge([text], pairs, 30)()
    items, share = llm_negatives.likely_items(kernel, 6)
    own = half[items] == (torch.arange(30) % 2)[:, None]
    assert own.float().mean() > 0.9
    seen = backbones.pair_keys(pairs, 40)
    assert not backbones.contains(seen, torch.arange(30)[:, None], items, 40).any()
    users, every = kernel()
    scores = kernel.score_all(users, every).gather(1, items)
    assert torch.allclose(share, scores.softmax(1), atol=1e-6)
    assert (scores.diff(dim=1) <= 1e-5).all()
    # more than there are unseen: places left over are never drawn
    items, share = llm_negatives.likely_items(kernel, 40)
    assert (items[:, 36:] == -1).all() and (share[:, 36:] == 0).all()
    drawn = hnlmrec.LikelyFalse(items, share)(torch.arange(30).repeat(50), generator)
    assert not backbones.contains(seen, torch.arange(30).repeat(50), drawn, 40).any()


def test_likely_false_items_are_drawn_by_their_shares():
    likely = hnlmrec.LikelyFalse(torch.tensor([[3, 5, 7], [1, 2, -1]]),
                                 torch.tensor([[0.5, 0.3, 0.2], [0.0, 1.0, 0.0]]))
    drawn = likely(torch.zeros(20_000, dtype=torch.long), torch.Generator().manual_seed(0))
    for item, share in ((3, 0.5), (5, 0.3), (7, 0.2)):
        assert float((drawn == item).float().mean()) == pytest.approx(share, abs=0.02)
    assert (likely(torch.ones(100, dtype=torch.long)) == 2).all()


def test_false_hard_negatives_stand_between_positive_and_negative():
    """L_false of a step, by hand: above e⁻, below the positive, and its L2."""
    data = split_data()
    train = data["train"]
    model = backbones.MF(N_USERS, N_ITEMS, 4)
    torch.nn.init.normal_(model.embedding)
    settings = Namespace(alpha=0, lambda1=0, lambda_s=0, reg=0.1, lambda_f=2.0, gamma=0.3)
    likely = hnlmrec.LikelyFalse(data["test"][:, 1:], torch.ones(N_USERS, 1))
    draw = backbones.make_sampler(model, "rns", train)
    rows, generators = torch.tensor([1, 9]), [torch.Generator().manual_seed(0) for _ in range(2)]
    method = hnlmrec.HNLMRec(model, None, None, draw, None, None, None, train, settings, likely)
    loss, logs = method.loss(rows, generators[0])
    _, _, users, items, negatives, j = draw(*train[rows].T, generators[1])
    false = model.ego()[1][data["test"][train[rows, 0], 1]]
    s_p, s_n, s_f = ((users * v).sum(1) for v in (items, negatives, false))
    l2 = [float((v**2).sum()) / 4 for v in (users, items, negatives, false)]
    above, below = F.softplus(s_n - s_f).mean(), F.softplus(s_f - s_p).mean()
    expected = F.softplus(s_n - s_p).mean() + 0.1 * sum(l2[:3])
    expected = expected + 2 * (above + 0.3 * below + 0.1 * l2[3])
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert logs["false"] == pytest.approx(above.item(), rel=1e-5)


def test_dns_takes_no_likely_false_one_while_another_candidate_is_there():
    listed = torch.tensor([[4, 2], [3, -1]])
    likely = hnlmrec.LikelyFalse(listed, torch.tensor([[0.5, 0.5], [1.0, 0.0]]))
    users, candidates = torch.tensor([0, 1, 1]), torch.tensor([[4, 1, 2], [0, 3, 1], [3, 3, 3]])
    inf = torch.inf
    penalty = likely.penalty(users, candidates)
    assert penalty.tolist() == [[inf, 0, inf], [0, inf, 0], [inf, inf, inf]]
    one, items = torch.ones(3, 1), torch.arange(5.0)[:, None]  # the later an item the higher
    score = rigged(one, items).score
    assert backbones.dns(score, one, items, candidates).tolist() == [4, 3, 3]
    assert backbones.dns(score, one, items, candidates, penalty=penalty).tolist() == [1, 1, 3]


def test_blended_vectors_rank_as_the_sum_of_the_standardised_scores():
    generator, parts = torch.Generator().manual_seed(0), []
    for width in (3, 7, 2):
        parts.append([torch.randn(n, width, generator=generator, dtype=torch.float64)
                      for n in (5, 12)])
    expected = 0
    for (users, items), weight in zip(parts, (1, 0.5, 0)):
        score = users @ items.T
        score = (score - score.mean(1, keepdim=True)) / score.std(1, keepdim=True)
        expected += weight * score
    users, items = hnlmrec.blend_vectors(parts, (1, 0.5, 0))
    assert users.shape == (5, 10) and torch.allclose(users @ items.T, expected)


def test_a_blend_with_the_judge_is_the_sum_of_both():
    """Weights and scores of a blend with a model that is no inner product: as of the same scores
    given as two tables, and the sum by hand."""
    train = split_data()["train"]
    kernel, generator = small_judge(train)(), torch.Generator().manual_seed(2)
    users, items = kernel()
    table = kernel.score_all(users, items)
    z = (table - table.mean(1, keepdim=True)) / table.std(1, keepdim=True)
    everyone = torch.arange(N_USERS)
    assert torch.allclose(hnlmrec.standardised(kernel, everyone), z, atol=1e-4)
    as_factors = table, torch.eye(N_ITEMS)
    assert torch.allclose(hnlmrec.standardised(as_factors, everyone), z, atol=1e-4)
    assert torch.allclose(hnlmrec.deviations(kernel, users=4), table.std(1), rtol=1e-5)
    model = [torch.randn(n, 3, generator=generator) for n in (N_USERS, N_ITEMS)]
    for parts, other in (([kernel, model], [as_factors, model]),
                         ([model, kernel], [model, as_factors])):
        split = train, split_data()["valid"], [0, 0.5, 1]
        ours, theirs = (hnlmrec.blend_weights(some, *split) for some in (parts, other))
        assert ours[0] == theirs[0] and ours[1] == pytest.approx(theirs[1])
    share = torch.rand(N_USERS, generator=generator)
    blended = backbones.Blended(torch.cat(model), kernel, share, train)
    oracle = model[0] @ model[1].T + share[:, None] * table
    assert torch.allclose(blended.score_all(*blended()), oracle, atol=1e-4)
    some, few = torch.tensor([[4], [1]]), torch.tensor([[7], [2], [9]])
    assert torch.allclose(blended.score_all(some, few), oracle[some, few[:, 0]], atol=1e-4)
    assert torch.allclose(blended.score(some, few[:2]), oracle[some[:, 0], few[:2, 0]], atol=1e-4)


def test_blend_weights_are_a_maximum_and_drop_noise():
    """No weight of the grid in another's place is better, by the validation of the blended model;
    the part that says what the other lacks gets a weight, noise gets none."""
    generator = torch.Generator().manual_seed(1)
    taste, items = (torch.randn(n, 6, generator=generator) for n in (60, 40))
    ranked = (taste @ items.T).topk(6).indices  # a user likes these
    user = torch.arange(60)[:, None].expand(-1, 6)
    pairs = torch.stack([user, ranked], -1)
    train, valid = pairs[:, ::2].reshape(-1, 2), pairs[:, 1::2].reshape(-1, 2)
    noise = torch.randn(60, 4, generator=generator), torch.randn(40, 4, generator=generator)
    parts = [(taste[:, :3], items[:, :3]), (taste[:, 3:], items[:, 3:]), noise]
    grid = [0, 0.5, 1, 2]
    weights, alone = hnlmrec.blend_weights(parts, train, valid, grid)

    def quality(weights):
        users, vectors = hnlmrec.blend_vectors(parts, weights)
        model = backbones.MF(60, 40, users.shape[1])
        model.embedding.data = torch.cat([users, vectors])
        return backbones.validation(model, {"train": train, "valid": valid})()

    best = quality(weights)
    assert alone == pytest.approx([quality(row) for row in torch.eye(3).tolist()])
    for k in range(3):
        for value in grid:
            other = [value if n == k else weight for n, weight in enumerate(weights)]
            assert not any(other) or quality(other) <= best + 1e-9
    assert weights[0] and weights[1] and best > max(alone) + 0.1 and not weights[2]
    some, _ = hnlmrec.blend_weights(parts, train, valid, grid, cells=3 * 40 * 20)  # 20 users
    assert some[0] and some[1]


def test_factors_of_item_weights_give_their_scores():
    """Whole where the rank allows it; else the best approximation there is of that rank."""
    train = torch.tensor([[0, 1], [0, 2], [1, 0], [2, 3], [2, 1], [2, 0], [3, 4], [3, 1]])
    dense = torch.rand(5, 5, generator=torch.Generator().manual_seed(0))
    row, column = torch.ones(5, 5).nonzero().T
    for weight in (dense, backbones.sparse_rows(row, column, dense.flatten(), (5, 5))):
        model = backbones.ItemWeights(weight, train, 4)
        users, items = hnlmrec.factors(model, train, rank=5)
        scores = model.score_all(*model())
        assert torch.allclose(users @ items.T, scores, atol=1e-5)
        users, items = hnlmrec.factors(model, train, rank=2)
        u, s, v = torch.linalg.svd(dense)
        one = torch.zeros(4, 5).index_put_(tuple(train.T), torch.tensor(1.0))
        assert users.shape == (4, 2)
        assert torch.allclose(users @ items.T, one @ (u[:, :2] * s[:2]) @ v[:2], atol=1e-4)


def test_text_relevance_against_the_inverse_root_of_the_covariance():
    """Whitening by C^-1/2 turns the texts but keeps their cosines; here user by user and item by
    item, with numpy."""
    torch.manual_seed(0)
    text = torch.randn(20, 5) * torch.tensor([5, 1, 1, 1, 0.2]) + 3
    train = torch.tensor([[0, 3], [0, 7], [1, 3], [2, 1], [2, 2], [2, 19]])
    centred = (text - text.mean(0)).double().numpy()
    values, vectors = np.linalg.eigh(centred.T @ centred)
    white = centred @ (vectors * values**-0.5) @ vectors.T
    unit = white / np.linalg.norm(white, axis=1, keepdims=True)
    users, everything = torch.arange(3), torch.arange(20).expand(3, -1)
    relevance = hnlmrec.Relevance(*hnlmrec.text_factors(text, train, 3))(users, everything)
    for u in range(3):
        fit = sum(unit @ unit[j] for v, j in train.tolist() if v == u)
        assert relevance[u].numpy() == pytest.approx((fit - fit.mean()) / fit.std(ddof=1), abs=2e-5)


def test_relevance_of_any_factors_against_the_dense_table():
    """The candidates' relevance is that of the whole table of users x items; a user whom all items
    fit alike has none."""
    generator = torch.Generator().manual_seed(0)
    users = torch.randn(300, 7, generator=generator).requires_grad_()  # a learned judge's
    items = torch.randn(40, 7, generator=generator) + 5
    users.data[11] = 0
    u = torch.randint(300, (290,), generator=generator)
    candidates = torch.randint(40, (290, 6), generator=generator)
    relevance = hnlmrec.Relevance(users, items, gain=0.3)
    ours, fit = relevance(u, candidates), (users @ items.T).detach().double()
    dense = 0.3 * (fit - fit.mean(1, keepdim=True)) / fit.std(1, keepdim=True).clamp(min=1e-12)
    assert torch.allclose(ours.double(), dense[u[:, None], candidates], atol=1e-5)
    assert not ours.requires_grad
    assert relevance(torch.tensor([11]), candidates[:1]).tolist() == [[0.0] * 6]
    assert sum(x.numel() for x in vars(relevance).values()) == (300 + 40) * 7  # no dense table


def test_clearing_changes_which_item_is_the_negative():
    """With a penalty far above any score the step takes, of the candidates, the one whose text fits
    the user least."""
    model, _, _, train = hnlmrec_parts(alpha=0.0, lambda1=0.0, sampler="dns")
    relevance = torch.randn(N_USERS, N_ITEMS, generator=torch.Generator().manual_seed(1))
    u, i = train.T
    # as draw() draws them
    uniform, generator = backbones.UnseenSampler(train, N_USERS, N_ITEMS), torch.Generator()
    candidates = uniform(u, 6, generator.manual_seed(2))

    def penalty(users, candidates):
        return 1e6 * relevance[users[:, None], candidates]

    draw = backbones.make_sampler(model, "dns", train, m=6, penalty=penalty)
    chosen = draw(u, i, generator.manual_seed(2)).negative_ids
    least = relevance[u[:, None], candidates].argmin(1)
    assert chosen.tolist() == candidates[torch.arange(len(u)), least].tolist()


def test_bpr_is_minus_log_sigmoid():
    p, n = torch.tensor([0.3, -2.0]), torch.tensor([0.1, 1.0])
    total = -sum(math.log(1 / (1 + math.exp(b - a))) for a, b in zip(p, n))
    assert backbones.bpr_loss(p, n).item() == pytest.approx(total / 2)


def hnlmrec_parts(alpha, lambda1, sampler="dns", form=hnlmrec.HNLMRec, **more):
    """A small backbone, its projector, and the method (or the paper's form of it) around both."""
    torch.manual_seed(0)
    train = split_data()["train"]
    model = backbones.build_backbone("mf", N_USERS, N_ITEMS, 8, train)
    hidden = torch.randn(len(train), 16).half()
    projector = hnlmrec.Projector(hidden, 8, width=8)
    mined = backbones.mine_hard_negatives(model, train, 1, 5)
    table = hnlmrec.NegativeTable(train, train, N_USERS, N_ITEMS)
    semantic = hnlmrec.SemanticProjector(torch.randn(N_ITEMS, 16), train, N_USERS, 8)
    settings = {"alpha": alpha, "lambda1": lambda1, "lambda_s": 0.0, "tau_c": 0.2, "reg": 0.0,
                "k": 2, "align_rows": 16, "refresh": 1, "hinge": 0.0, "lambda_f": 0.0}
    settings = Namespace(**settings | more)
    draw = backbones.make_sampler(model, sampler, train, m=1)
    method = form(model, projector, semantic, draw, table, hidden, mined, train, settings)
    return model, projector, method, train


def test_bpr_gives_the_projector_no_gradient_and_alignment_does():
    model, projector, method, train = hnlmrec_parts(alpha=0.5, lambda1=0.0)
    method.loss(torch.arange(len(train)), torch.Generator().manual_seed(0))[0].backward()
    assert model.embedding.grad.abs().sum() > 0
    assert all(p.grad is None for p in projector.parameters())
    _, projector, method, train = hnlmrec_parts(alpha=0.5, lambda1=1.0)
    method.loss(torch.arange(len(train)), torch.Generator().manual_seed(0))[0].backward()
    for name, p in projector.named_parameters():
        assert name == "key.bias" or p.grad.abs().sum() > 0, name


def test_the_step_is_the_sum_of_its_four_terms():
    """Drawn again and gathered pair by pair; K 1 and one mined item, so that no more is drawn."""
    model, projector, method, train = hnlmrec_parts(
        alpha=0.4, lambda1=0.7, sampler="rns", k=1, reg=0.01, lambda_s=0.5, align_rows=10)
    method.mined = method.mined[:, :1]
    model.embedding.data *= 30  # so that the L2 term counts
    loss, logs = method.loss(torch.arange(len(train)), torch.Generator().manual_seed(3))

    generator, (u, i) = torch.Generator().manual_seed(3), train.T
    method.table(torch.arange(len(train)), 1, generator)  # the step draws the pair's z first
    j = backbones.UnseenSampler(train, N_USERS, N_ITEMS)(u, 1, generator)[:, 0]
    (users, items), z = model(), projector(method.hidden[:, None])
    bpr = l2 = 0.0
    for n, (a, b, c) in enumerate(zip(u.tolist(), i.tolist(), j.tolist())):
        negative = 0.4 * z[n] * items[c].norm() / z[n].norm() + 0.6 * items[c]
        bpr = bpr - torch.log(torch.sigmoid(users[a] @ (items[b] - negative))) / len(train)
        l2 = l2 + (users[a] @ users[a] + items[b] @ items[b] + items[c] @ items[c]) / 2 / len(train)
    mined = torch.stack([items[method.mined[a, 0]] for a in u[:10].tolist()])
    align = hnlmrec.alignment_loss(z[:10], items[i[:10]], mined, u[:10], 0.2)
    some_users, some_items = sorted(set(u[:20].tolist())), sorted(set(i[:20].tolist()))
    user_texts, item_texts = method.semantic(some_users, some_items)
    semantic = (hnlmrec.semantic_alignment(users[some_users], user_texts, 0.2)
                + hnlmrec.semantic_alignment(items[some_items], item_texts, 0.2))
    total = bpr + 0.01 * l2 + 0.7 * align + 0.5 * semantic
    assert loss.item() == pytest.approx(total.item(), rel=1e-5)
    terms = {"bpr": bpr.item(), "align": align.item(), "semantic": semantic.item()}
    assert logs == pytest.approx(terms, rel=1e-5)


@pytest.mark.parametrize("hinge", [0.0, 0.3])
def test_the_papers_step_is_its_formula(hinge):
    """Loss and gradients, drawn again and written out pair by pair; K 1, so that z is that of the
    pair's own vector."""
    model, projector, method, train = hnlmrec_parts(
        0.4, 0.7, "rns", hnlmrec.PaperHNLMRec, k=1, reg=0.01, hinge=hinge)
    parameters = [model.embedding, *projector.mlp.parameters()]
    loss, logs = method.loss(torch.arange(len(train)), torch.Generator().manual_seed(3))
    ours = torch.autograd.grad(loss, parameters)

    (u, i), generator = train.T, torch.Generator().manual_seed(3)
    j = backbones.UnseenSampler(train, N_USERS, N_ITEMS)(u, 1, generator)[:, 0]
    (users, items), z = model(), projector(method.hidden[:, None])
    total = 0.0
    for n, (a, b, c) in enumerate(zip(u.tolist(), i.tolist(), j.tolist())):
        e_u, e_i, e_j = users[a], items[b], items[c]
        gap = e_u @ e_i - e_u @ (0.4 * z[n] + 0.6 * e_j)
        ranking = torch.clamp(0.3 - gap, min=0) if hinge else -torch.log(torch.sigmoid(gap))
        up, down = (torch.exp(F.cosine_similarity(e_u, v, 0) / 0.2) for v in (e_i, z[n]))
        squares = e_u @ e_u + e_i @ e_i + e_j @ e_j
        total = total + ranking - 0.7 * torch.log(up / (up + down)) + 0.01 * squares / 2
    total = total / len(train)
    assert loss.item() == pytest.approx(total.item(), rel=1e-5) and "contrast" in logs
    for one, other in zip(ours, torch.autograd.grad(total, parameters)):
        assert torch.allclose(one, other, atol=1e-6) and one.abs().sum() > 0


def test_alpha_zero_is_plain_bpr_and_alpha_one_is_z_alone():
    z, e = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    hnlmrec.mix(z, e, 0.5).sum().backward()
    assert torch.allclose(e.grad, torch.full((3, 4), 0.5))
    assert torch.equal(hnlmrec.mix(z, e, 0.0), e)
    only_z = hnlmrec.mix(z, e, 1.0)
    assert torch.allclose(F.cosine_similarity(only_z, z), torch.ones(3))
    assert torch.allclose(only_z.norm(dim=1), e.norm(dim=1))
    model, _, method, train = hnlmrec_parts(alpha=0.0, lambda1=0.0)
    rows, generator, (u, i) = torch.arange(len(train)), torch.Generator(), train.T
    ours = method.loss(rows, generator.manual_seed(5))[0]
    method.table(rows, 1, generator.manual_seed(5))  # the step draws the pair's z first
    j = backbones.UnseenSampler(train, N_USERS, N_ITEMS)(u, 1, generator)[:, 0]
    users, items = model()
    s = users @ items.T
    assert ours.item() == pytest.approx(backbones.bpr_loss(s[u, i], s[u, j]).item(), rel=1e-6)


@pytest.mark.parametrize("sampler", ["rns", "pns", "dns", "mixgcf", "ahns"])
def test_without_z_the_step_is_that_of_its_sampler(sampler):
    """alpha 0 and no alignment: the same loss and gradient as the baseline's, with each sampler."""
    model, _, method, train = hnlmrec_parts(alpha=0.0, lambda1=0.0, sampler=sampler)
    rows, generator = torch.arange(len(train)), torch.Generator().manual_seed(5)
    loss = method.loss(rows, generator)[0]
    loss.backward()
    ours, model.embedding.grad = model.embedding.grad, None
    method.table(rows, 1, generator.manual_seed(5))  # the step draws the pair's z first
    baseline = backbones.make_step(model, sampler, train, reg=0.0, m=1)(rows, generator)[0]
    baseline.backward()
    assert loss.item() == pytest.approx(baseline.item(), rel=1e-6)
    assert torch.allclose(ours, model.embedding.grad, atol=1e-7)


def test_nearest_items_are_the_nearest_unseen_ones():
    train, generator = split_data()["train"], torch.Generator().manual_seed(0)
    z = torch.randn(6, 4, generator=generator)
    items = torch.randn(N_ITEMS, 4, generator=generator)
    users = torch.tensor([0, 3, 3, 7, 9, 11])
    ours = backbones.nearest_items(z, users, items, backbones.pair_keys(train, N_ITEMS), 5)
    for row, (user, vector) in enumerate(zip(users.tolist(), z)):
        seen = set(train[train[:, 0] == user, 1].tolist())
        order = by_score(F.cosine_similarity(vector[None], items), seen)
        assert ours[row].tolist() == order[:5]


def pretend(monkeypatch, rank, world):
    """Let this process take itself for the rank-th of `world`."""
    monkeypatch.setattr(backbones, "rank", lambda: rank)
    monkeypatch.setattr(backbones, "world", lambda: world)


@pytest.mark.parametrize(
    "kind", ["dns", "mixgcf", "softmax", hnlmrec.HNLMRec, hnlmrec.PaperHNLMRec])
@pytest.mark.parametrize("n_rows", [71, 2])
def test_the_shares_of_three_processes_make_the_batch(kind, n_rows, monkeypatch):
    """The mean of three processes' gradients is one process's gradient, with uneven shares and with
    fewer rows than processes."""
    if isinstance(kind, str):
        train = split_data()["train"]
        model = backbones.build_backbone("lightgcn", N_USERS, N_ITEMS, 8, train)
        if kind == "softmax":
            step = backbones.make_softmax_step(model, train, reg=0.1, n=9, tau=0.5)
        else:
            step = backbones.make_step(model, kind, train, reg=0.1, m=5, n=2)
        modules = [model]
    else:
        model, projector, method, train = hnlmrec_parts(
            0.3, 1.0, form=kind, lambda_s=0.5, reg=0.1, lambda_f=2.0, gamma=0.3)
        method.likely = hnlmrec.LikelyFalse(
            torch.randint(N_ITEMS, (N_USERS, 3)), torch.rand(N_USERS, 3))
        step, modules = method.loss, [model, projector, method.semantic]
    parameters = [p for module in modules for p in module.parameters()]
    rows = torch.randperm(len(train), generator=torch.Generator().manual_seed(1))[:n_rows]

    def gradients():
        for p in parameters:
            p.grad = None
        step(rows, torch.Generator().manual_seed(5))[0].backward()
        found = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        return torch.cat([gradient.flatten() for gradient in found])

    one, three = gradients(), []
    for number in range(3):
        pretend(monkeypatch, number, 3)
        three.append(gradients())
    assert one.abs().sum() > 0 and torch.allclose(sum(three) / 3, one, atol=1e-6)
    assert not torch.allclose(three[0], three[1], atol=1e-6)


def test_a_validation_of_some_users_is_their_mean():
    data = split_data()
    model = rigged(torch.randn(N_USERS, 4), torch.randn(N_ITEMS, 4))
    users, values, _ = evaluation.evaluate(model, data, "valid", ks=(20,))
    assert backbones.validation(model, data)() == pytest.approx(float(values["NDCG@20"].mean()))
    some = torch.randperm(N_USERS, generator=torch.Generator().manual_seed(0))[:5]
    mean = float(values["NDCG@20"][some].mean())
    assert backbones.validation(model, data, users=5)() == pytest.approx(mean)


def test_every_parameter_is_trained():
    model, projector, method, train = hnlmrec_parts(alpha=0.5, lambda1=1.0)
    parameters = dict([*projector.named_parameters(), *model.named_parameters()])
    before = {name: p.clone() for name, p in parameters.items()}
    modules = {"backbone": model, "projector": projector}
    backbones.fit(modules, method.loss, len(train), lambda: 0.0, epochs=2, batch_size=32, lr=0.01,
                  eval_every=1, patience=9, seed=0)
    still = [name for name, p in parameters.items() if torch.equal(p, before[name])]
    assert set(still) <= {"key.bias"}  # softmax is blind to a constant in all keys


def test_fit_keeps_a_state_whatever_the_scale_of_the_validation():
    model, fit = rigged(torch.randn(2, 2), torch.randn(3, 2)), functools.partial(
        backbones.fit, n_rows=4, epochs=2, batch_size=2, lr=0.1, eval_every=1, patience=9, seed=0)

    def step(rows, generator):
        return model.embedding.sum(), {}

    state, history = fit({"backbone": model}, step, validate=lambda: -5.0)
    assert "backbone.embedding" in state and history[0]["valid_ndcg@20"] == -5
    with pytest.raises(SystemExit):
        fit({"backbone": model}, step, validate=lambda: math.nan)


def test_fit_returns_the_best_state_not_the_last():
    model, _, method, train = hnlmrec_parts(alpha=0.0, lambda1=0.0)
    scores, states = iter([0.1, 0.5, 0.3]), []

    def validate():
        states.append(model.embedding.detach().clone())
        return next(scores)

    state, history = backbones.fit(
        {"backbone": model}, method.loss, len(train), validate, epochs=3, batch_size=32, lr=0.1,
        eval_every=1, patience=9, seed=0)
    assert torch.equal(state["backbone.embedding"], states[1])
    assert [row["valid_ndcg@20"] for row in history] == [0.1, 0.5, 0.3]


@pytest.mark.parametrize("decay", [False, True])
def test_fit_against_adam_by_hand_with_its_learning_rate(decay):
    """Three epochs of two steps on sum(x^2): x by the formulas of Kingma and Ba; with decay the six
    learning rates are .6, .5 … .1."""
    model, x, m, v = rigged(torch.ones(1, 1), torch.ones(1, 1)), 1.0, 0.0, 0.0
    for n in range(1, 7):
        m, v = 0.9 * m + 0.1 * 2 * x, 0.999 * v + 0.001 * (2 * x) ** 2
        lr = 0.6 - 0.1 * (n - 1) if decay else 0.6
        x -= lr * (m / (1 - 0.9**n)) / (math.sqrt(v / (1 - 0.999**n)) + 1e-8)
    scores = iter(range(3))
    state, _ = backbones.fit(
        {"backbone": model}, lambda rows, generator: (model.embedding.pow(2).sum(), {}), 3,
        lambda: float(next(scores)), epochs=3, batch_size=2, lr=0.6, eval_every=1, patience=9,
        seed=0, decay=decay)
    assert state["backbone.embedding"].flatten().tolist() == pytest.approx([x, x], rel=1e-4)


@pytest.mark.parametrize("n, n_items, given, expected", [
    (44287, 1008, {}, (2048, 1e-3, 200, 8)),  # MovieLens-100K
    (124813, 11924, {}, (16384, 8e-3, 200, 32)),  # full Toys & Games
    (124813, 11924, {"batch_size": 2048, "m": 3}, (2048, 1e-3, 200, 3)),
    (124813, 11924, {"lr": 0.5, "epochs": 300}, (16384, 0.5, 300, 32)),
    # 2,000,000 / 8 = 250,000; 31 steps an epoch, 4e9 / (31 x 2,000,000) = 64.5
    (2_000_000, 10**6, {}, (65536, 8e-3, 64, 64)),
    (50_000_000, 100, {}, (65536, 8e-3, 10, 4)),
])
def test_what_follows_from_the_size_of_the_data(n, n_items, given, expected):
    data = {"train": torch.empty(n, 0), "n_items": n_items}
    assert backbones.sized_to_data(data, **given) == expected


def test_a_loss_that_is_not_finite_stops_training_at_its_step():
    model, done = rigged(torch.ones(2, 2), torch.ones(3, 2)), []

    def step(rows, generator):
        done.append(rows)
        return model.embedding.sum() * (float("nan") if len(done) == 4 else 1.0), {"bpr": 1.5}

    with pytest.raises(backbones.SystemExit2) as error:
        backbones.fit({"backbone": model}, step, 6, lambda: 0.0, epochs=9, batch_size=2, lr=0.1,
                      eval_every=1, patience=9, seed=0, label="mf")
    assert len(done) == 4 and "nan at step 4 (epoch 2, {'bpr': 1.5})" in str(error.value)
    assert model.embedding.isfinite().all()


def test_projector_attends_over_the_set():
    hidden = torch.randn(20, 16)
    projector = hnlmrec.Projector(hidden, 8, width=8)
    one, other = hidden[:6].view(2, 3, 16), hidden[:6].view(2, 3, 16).clone()
    other[0, 2] += 3
    a, b = projector(one), projector(other)
    # slot 2 informs slot 0 of its own row alone
    assert not torch.allclose(a[0], b[0]) and torch.equal(a[1], b[1])
    # a set: the order of the others does not matter
    assert torch.allclose(projector(one[:, [0, 2, 1]]), a, atol=1e-6)
    alone = hnlmrec.Projector(hidden, 8, width=8, attention=False)
    assert torch.equal(alone(one), alone(other))


def test_negative_table_prefers_own_vectors_and_counts_the_rest():
    train = torch.tensor([[0, 1], [0, 2], [1, 0], [1, 5]])
    generated = train[1:]
    table = hnlmrec.NegativeTable(generated, train, 2, 6)
    assert table.own == 3
    chosen = table(torch.tensor([0, 1, 2, 3]), 4, torch.Generator().manual_seed(0))
    assert chosen[1:, 0].tolist() == [0, 1, 2] and chosen[0].tolist() == [0] * 4
    assert set(chosen[2:].flatten().tolist()) == {1, 2}
    with pytest.raises(SystemExit) as error:
        hnlmrec.NegativeTable(generated[:1], train, 2, 6)
    assert "no generated negative" in error.value.message
    with pytest.raises(SystemExit) as error:
        hnlmrec.NegativeTable(generated[[1, 0, 2]], train, 2, 6)
    assert "ascending order" in error.value.message


def test_fhns_against_loops():
    data, generator = split_data(), torch.Generator().manual_seed(0)
    items, pairs = torch.randn(N_ITEMS, 4, generator=generator), data["train"]
    vectors = torch.randn(len(pairs), 4, generator=generator)
    ours, hits = evaluation.fhns_of_vectors(pairs, vectors, items, data, N_ITEMS), {1: 0, 10: 0}
    for (u, _), v in zip(pairs.tolist(), vectors):
        seen, held = set(), set()
        for name, own in (("train", seen), ("valid", held), ("test", held)):
            own |= {i for w, i in data[name].tolist() if w == u}
        order = by_score(F.cosine_similarity(v[None], items), seen)
        for k in hits:
            hits[k] += len(held & set(order[:k])) / k
    assert ours["FHNS@1"] == pytest.approx(hits[1] / len(pairs))
    assert ours["FHNS@10"] == pytest.approx(hits[10] / len(pairs))


def test_unseen_users_and_items_are_scored_apart():
    train, x = pairs_with_gaps()
    data = split_data() | {"train": train}
    torch.manual_seed(2)
    model = rigged(torch.randn(N_USERS, 4), torch.randn(N_ITEMS, 4))
    users, values, _ = evaluation.evaluate(model, data)
    ours = evaluation.unseen_scores(model, data, users, values)
    oracle = brute_force_metrics(model.ego()[0] @ model.ego()[1].T, data, 20)
    others = [oracle[u]["NDCG"] for u in range(N_USERS) if u != 3]
    assert ours["users unseen"] == pytest.approx(oracle[3]["NDCG"])
    assert ours["users seen"] == pytest.approx(sum(others) / len(others))
    # one test pair a user, so that its Recall is its pair's
    new = {u for u, i in data["test"].tolist() if not x[:, i].any()}
    for name, group in (("items unseen", new), ("items seen", set(range(N_USERS)) - new)):
        assert ours[name] == pytest.approx(sum(oracle[u]["Recall"] for u in group) / len(group))
    lines = evaluation.unseen_section(data, {"rns": ours})
    items = {i for _, i in data["test"].tolist()}
    unseen = sum(not x[:, i].any() for i in items)
    assert f"1 of 12 test users, {unseen} of {len(items)} test items ({len(new)} of" in lines[3]
    assert lines[-1].startswith("| RNS | ")
    user_0 = torch.tensor([[0, i] for i in range(N_ITEMS)])
    whole = split_data() | {"train": torch.cat([split_data()["train"], user_0])}
    assert evaluation.unseen_scores(model, whole, users, values) == {}
    assert len(evaluation.unseen_section(whole, {"rns": {}})) == 4


def test_paired_bootstrap_against_the_normal_law():
    rng = np.random.default_rng(0)
    for shift in (0.0, 0.05, 0.12):
        d = rng.normal(shift, 1, 2000)
        mean, low, high, p = evaluation.paired_bootstrap(d, draws=20_000)
        error = d.std() / math.sqrt(len(d))
        assert mean == pytest.approx(d.mean())
        near = functools.partial(pytest.approx, abs=0.1 * error)
        assert low == near(mean - 1.96 * error) and high == near(mean + 1.96 * error)
        assert p == pytest.approx(math.erfc(abs(mean) / error / math.sqrt(2)), abs=0.02)


def log_odds_world(n_users=300, top=40, seed=0):
    """Labels drawn from log-odds -3 + cf + 1.5 hidden -> user (n,), label, cf, hidden, log-odds."""
    generator = torch.Generator().manual_seed(seed)
    cf, hidden = torch.randn(2, n_users * top, generator=generator, dtype=torch.float64)
    log_odds = -3 + cf + 1.5 * hidden
    label = torch.rand(len(cf), generator=generator, dtype=torch.float64) < torch.sigmoid(log_odds)
    return torch.arange(n_users).repeat_interleave(top), label, cf, hidden, log_odds


def test_logistic_regression_against_lbfgs_and_a_closed_form():
    _, label, cf, hidden, _ = log_odds_world(20)
    x, y = torch.stack([torch.ones_like(cf), cf, hidden], 1), label.double()
    w = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([w], max_iter=200, tolerance_grad=1e-10,
                                  line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.binary_cross_entropy_with_logits(x @ w, y, reduction="sum") + 0.5 * w @ w
        loss.backward()
        return loss

    optimizer.step(closure)
    ours = evaluation.logistic_regression(x, y, ridge=1.0)
    assert ours.tolist() == pytest.approx(w.tolist(), abs=1e-6)
    # an intercept alone: the log-odds of the share of positives
    share = y.mean()
    ours = evaluation.logistic_regression(x[:, :1], y, ridge=0.0)
    assert float(ours) == pytest.approx(float(torch.log(share / (1 - share))))
    # separable: the ridge keeps it finite
    x = torch.tensor([[1.0, -300], [1, -1], [1, 1], [1, 500]], dtype=torch.float64)
    ours = evaluation.logistic_regression(x, torch.tensor([0.0, 0, 1, 1], dtype=torch.float64))
    assert torch.isfinite(ours).all() and 1 < ours[1] < 20
    # tails so long that full Newton steps run away: the gradient is 0 all the same
    generator = torch.Generator().manual_seed(47507)
    x = torch.randn(200, 4, generator=generator, dtype=torch.float64)
    x = x.sign() * (6 * x.abs()).exp()
    x = torch.cat([torch.ones(200, 1), (x - x.mean(0)) / x.std(0)], 1)
    y = (torch.rand(200, generator=generator) < 0.1).double()
    ours = evaluation.logistic_regression(x, y)
    gradient = x.T @ (torch.sigmoid(x @ ours) - y) + 1e-3 * ours
    assert gradient.abs().max() < 1e-6


def test_auc_against_all_pairs():
    generator = torch.Generator().manual_seed(0)
    score = torch.randint(0, 6, (60,), generator=generator).double()  # full of ties
    label = torch.rand(60, generator=generator) < 0.3
    wins = (score[label][:, None] > score[~label]).double()
    wins += 0.5 * (score[label][:, None] == score[~label])
    assert evaluation.auc(score, label) == pytest.approx(float(wins.mean()))


def test_cross_fitting_reads_the_other_half_alone():
    """Where the two halves contradict each other, each is predicted as the other has it."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 1, generator=generator, dtype=torch.float64)
    half = torch.arange(400) < 150
    y = torch.where(half, x[:, 0] > 0, x[:, 0] < 0).double()
    y[::7] = 1 - y[::7]
    log_odds = evaluation.cross_fitted(x, y, half)
    assert (log_odds[half] * x[half, 0] < 0).all() and (log_odds[~half] * x[~half, 0] > 0).all()
    other = y.clone()
    other[half] = 1 - other[half]  # a half's own labels say nothing of its own prediction
    assert torch.equal(evaluation.cross_fitted(x, other, half)[half], log_odds[half])


def test_a_judge_that_knows_the_log_odds_gains_what_it_knows():
    user, label, cf, hidden, log_odds = log_odds_world()
    y = label.double()
    base, base_auc = evaluation.fit_of_features([cf], label, user, 300)
    full, full_auc = evaluation.fit_of_features([cf, hidden], label, user, 300)
    # what the true log-odds give, less one nat for the weights that have to be found
    known = y * log_odds - F.softplus(log_odds)
    assert float(full.sum()) == pytest.approx(float(known.sum()), abs=6)
    by_user = known.new_zeros(300).index_add_(0, user, known)
    assert torch.allclose(full, by_user, atol=0.5) and full_auc > base_auc + 0.1
    # without it the best there is: P(y | cf), by quadrature over the hidden part
    node, weight = (torch.from_numpy(part) for part in np.polynomial.hermite_e.hermegauss(40))
    p = torch.sigmoid(-3 + cf[:, None] + 1.5 * node) @ weight / weight.sum()
    blind = y * p.log() + (1 - y) * (1 - p).log()
    gain = evaluation.gain_interval(full - base, int(label.sum()))
    mean, low, high = gain["nats"]
    assert mean == pytest.approx(float(known.sum() - blind.sum()), abs=8) and 0 < low < mean < high
    assert gain["per 1000 positives"][0] == pytest.approx(1000 * mean / float(y.sum()))
    # one that is shuffled knows nothing, and neither does what CF says already
    mixed = hidden[torch.randperm(len(hidden), generator=torch.Generator().manual_seed(1))]
    for nothing in (mixed, 2 * cf + 1):
        fit, _ = evaluation.fit_of_features([cf, nothing], label, user, 300)
        assert abs(float((fit - base).sum())) < 5


def test_a_judge_without_its_texts_keeps_its_biases():
    users, items = torch.randn(6, 4), torch.randn(9, 4)
    users[:, 3] = 1
    (no_user, *one), (no_item, *other) = evaluation.without_texts("it", users, items)
    assert (no_user, no_item) == ("it, mean user", "it, mean item")
    scores = users @ items.T
    assert torch.allclose(one[0] @ one[1].T, scores.mean(0).expand(6, 9), atol=1e-5)
    text = users[:, :3] @ items[:, :3].T
    assert torch.allclose(other[0] @ other[1].T, text.mean(1)[:, None] + items[:, 3], atol=1e-5)


def test_gains_of_some_users_alone():
    """A judge that knows all of two users and nothing of the others; the bag of words is the last
    that is whole."""
    data, generator = split_data(), torch.Generator().manual_seed(3)
    model = rigged(torch.randn(N_USERS, 4, generator=generator),
                   torch.randn(N_ITEMS, 4, generator=generator))
    noise = torch.randn(N_USERS, N_ITEMS, generator=generator), torch.eye(N_ITEMS)

    def judged(users, items):
        return partial(evaluation.factor_scores, users, items)

    judges = [("bag of words (untaught)", judged(torch.ones(N_USERS, 1), torch.ones(N_ITEMS, 1))),
              ("bag of words (taught)", judged(*noise)), ("whole", judged(*noise)),
              ("two", judged(*noise), torch.tensor([1, 4])),
              ("rest", judged(*noise), torch.tensor(sorted({*range(N_USERS)} - {1, 4})))]
    for name, *without in evaluation.without_texts("bag of words (taught)", *noise):
        judges.append((name, judged(*without)))
    rows = evaluation.measure_judges(model, data, judges, top=20)["rows"]
    for known in ("over CF", "over CF and bag of words"):
        whole, two, rest = [rows[name][known]["nats"][0] for name in ("whole", "two", "rest")]
        assert whole == pytest.approx(two + rest, abs=1e-6) and abs(two) < abs(whole) + abs(rest)
    assert "over CF and bag of words" not in rows["bag of words (taught)"]
    _, label, user, _ = evaluation.cf_candidates(model, data, top=20)
    own, two = int(label[(user == 1) | (user == 4)].sum()), rows["two"]["over CF"]
    assert two["per 1000 positives"][0] == pytest.approx(1000 * two["nats"][0] / own)


@pytest.mark.parametrize("labels, top", [("valid", 7), ("test", 26)])
def test_cf_candidates_against_loops(labels, top):
    data, generator = split_data(), torch.Generator().manual_seed(3)
    users = torch.randn(N_USERS, 4, generator=generator)
    items = torch.randn(N_ITEMS, 4, generator=generator)
    ours = evaluation.cf_candidates(rigged(users, items), data, labels, top)
    candidates, label, user, (score, quantile, rank, popularity) = ours
    factors = evaluation.factor_scores(users, items, candidates)
    expected = []
    for u in range(N_USERS):
        own = {name: {i for v, i in data[name].tolist() if v == u} for name in data if
               torch.is_tensor(data[name])}
        seen = own["train"] | (own["valid"] if labels == "test" else set())
        unseen = sorted(set(range(N_ITEMS)) - seen, key=lambda i: -float(users[u] @ items[i]))
        for place, i in enumerate(unseen[:top], 1):
            count = sum(j == i for _, j in data["train"].tolist())
            expected.append([u, int(i in own[labels]), float(users[u] @ items[i]),
                             math.log(place), math.log(count + 1)])
    columns = torch.stack([user, label, score, rank, popularity], 1)
    assert columns.tolist() == [pytest.approx(row, abs=1e-5) for row in expected]
    assert factors.tolist() == pytest.approx([row[2] for row in expected], abs=1e-5)
    below = [sum(other[2] < row[2] for other in expected) + 0.5 for row in expected]
    odds = [share / (len(expected) - share) for share in below]
    assert quantile.exp().tolist() == pytest.approx(odds)


def test_whiten_against_the_inverse_root_of_the_covariance():
    """Rows of norm 1, and their cosines those of the texts times C^-1/2 (with numpy); of two axes
    with hardly any variance neither is blown up."""
    torch.manual_seed(0)
    text = torch.randn(20, 5) * torch.tensor([5, 1, 1, 1, 0.2]) + 3
    centred = (text - text.mean(0)).double().numpy()
    values, axes = np.linalg.eigh(centred.T @ centred)
    white = centred @ (axes * values**-0.5) @ axes.T
    white /= np.linalg.norm(white, axis=1, keepdims=True)
    ours = backbones.whiten(text)
    assert (ours @ ours.T).flatten().tolist() == pytest.approx((white @ white.T).ravel(), abs=1e-4)
    flat = torch.cat([text, 1e-6 * torch.randn(20, 2)], 1)
    assert torch.allclose(backbones.whiten(flat).pow(2).sum(1), torch.ones(20))
    ours = backbones.whiten(flat)
    assert (ours @ ours.T).flatten().tolist() == pytest.approx((white @ white.T).ravel(), abs=1e-3)


def test_list_statistics_against_loops():
    data, generator = split_data(), torch.Generator().manual_seed(2)
    users = torch.randn(N_USERS, 4, generator=generator)
    model = rigged(users, torch.randn(N_ITEMS, 4, generator=generator))
    ours, scores = evaluation.list_statistics(model, data, 5), model.ego()[0] @ model.ego()[1].T
    count = [sum(i == j for _, j in data["train"].tolist()) for i in range(N_ITEMS)]
    order = sorted(range(N_ITEMS), key=lambda i: (count[i], i))
    quarter = {i: place * 4 // N_ITEMS for place, i in enumerate(order)}
    shown, hits, total = [0] * N_ITEMS, [0] * 4, [0] * 4
    for u in range(N_USERS):
        seen = {i for name in ("train", "valid") for v, i in data[name].tolist() if v == u}
        best = by_score(scores[u], seen)[:5]
        for i in best:
            shown[i] += 1
        for v, i in data["test"].tolist():
            if v == u:
                total[quarter[i]] += 1
                hits[quarter[i]] += i in best
    assert ours["item_recall"] == pytest.approx([h / n for h, n in zip(hits, total)])
    assert ours["coverage"] == pytest.approx(sum(n > 0 for n in shown) / N_ITEMS)
    mean = sum(n * c for n, c in zip(shown, count)) / sum(shown)
    assert ours["popularity"] == pytest.approx(mean)
    gini = sum(abs(a - b) for a in shown for b in shown) / (2 * N_ITEMS * sum(shown))
    assert ours["gini"] == pytest.approx(gini)


# --------------------------------------------------------------------------------------------------
# prepare
# --------------------------------------------------------------------------------------------------


def test_k_core_against_naive_removal():
    rng = np.random.default_rng(0)
    pairs = np.unique(rng.integers(0, [40, 60], (400, 2)), axis=0)
    left = [tuple(p) for p in pairs]
    while True:
        users, items = [u for u, _ in left], [i for _, i in left]
        smaller = [(u, i) for u, i in left if users.count(u) >= 5 and items.count(i) >= 5]
        if len(smaller) == len(left):
            break
        left = smaller
    assert [tuple(p) for p in pairs[hnlmrec.k_core(pairs[:, 0], pairs[:, 1], 5)]] == left and left


def test_splits():
    user, item = np.repeat([0, 1], [30, 4]), np.arange(34)
    part = hnlmrec.split_pairs(user, item, np.zeros(34), "random", 0)
    assert np.bincount(part[:30]).tolist() == [24, 3, 3]
    assert np.bincount(part[30:]).tolist() == [2, 1, 1]
    assert (part == hnlmrec.split_pairs(user, item, np.zeros(34), "random", 0)).all()
    assert (part != hnlmrec.split_pairs(user, item, np.zeros(34), "random", 1)).any()
    seconds = np.random.default_rng(0).permutation(34).astype(float)
    last = hnlmrec.split_pairs(user, item, seconds, "last", 0)
    for u in (0, 1):
        own = np.flatnonzero(user == u)[np.argsort(seconds[user == u])]
        assert last[own[-1]] == 2 and last[own[-2]] == 1 and (last[own[:-2]] == 0).all()


@pytest.mark.parametrize("moments", [1000, 40])  # all different, and some twenty rows a moment
def test_split_by_time_is_one_cut_for_all(moments):
    rng = np.random.default_rng(0)
    n = min(moments * 20, 1000)
    seconds = rng.permutation(np.arange(n) % moments).astype(float)
    user, item = rng.integers(0, 50, n), np.arange(n)
    part = hnlmrec.split_pairs(user, item, seconds, "time", 0)
    train, valid, test = (seconds[part == code] for code in range(3))
    assert train.max() < valid.min() and valid.max() < test.min()
    off = np.abs(np.bincount(part) - [0.8 * n, 0.1 * n, 0.1 * n]).max()
    assert off <= (moments < n) * n / moments


def test_the_latest_row_of_a_pair_against_loops():
    rng = np.random.default_rng(0)
    user, item, rating = rng.integers(0, [[5], [6], [3]], (3, 200))
    seconds = np.where(rng.random(200) < 0.2, np.nan, rng.integers(0, 4, 200))
    expected = {}
    for row in zip(user, item, rating, np.nan_to_num(seconds, nan=-1)):
        old = expected.get(row[:2], (-2, 0))  # later wins; at equal times the lower rating does
        expected[row[:2]] = max(old, (row[3], -row[2]))
    user, item = user.astype(np.int32), item.astype(np.int32)
    kept = hnlmrec.latest(user, item, rating.astype(float), seconds)
    found = {(user[n], item[n]): (np.nan_to_num(seconds[n], nan=-1), -rating[n]) for n in kept}
    assert found == expected and len(kept) == len(expected)
    user, item = np.array([[0, 65536, 1], [5, 5, 65535]], np.int32)  # keys beyond 32 bits
    assert len(hnlmrec.latest(user, item, np.zeros(3), np.zeros(3))) == 3


def test_pairs_are_ordered_by_first_sight_of_user_and_item():
    """The random split draws in this order: with another one, published splits would change."""
    user, item = np.array([1, 1, 0, 0, 1, 0]), np.array([2, 0, 2, 0, 1, 1])
    five, none = np.full(6, 5.0), np.full(6, np.nan)
    rows = hnlmrec.Interactions(user, item, five, none, np.arange(6), "ab", "xyz")
    kept = hnlmrec.filter_pairs(rows, "r.tsv", Namespace(min_rating=4.0, k_core=2), Counter())
    assert list(zip(kept.user, kept.item)) == [(1, 2), (1, 0), (1, 1), (0, 2), (0, 0), (0, 1)]


def write_lines(path, lines, encoding="utf-8"):
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding=encoding) as file:
        for line in lines:
            file.write((line if isinstance(line, str) else json.dumps(line)) + "\n")
    return path


# format -> interactions file, its lines for (user a, item x, 4.5 stars, 2016-03-01 00:00 UTC,
# "fine"), items file, its lines for x; title and text of x, the review
SAMPLES = {
    "table": (
        "r.csv.gz",
        ["user,item,rating,timestamp,text", 'a,x,4.5,1456790400,"fine, ""really"""'],
        "i.csv", ["item,title,keywords", 'x,"Sea, The",waves'],
        ("Sea, The", "waves"), 'fine, "really"'),
    "recbole": (
        "r.inter",
        ["user_id:token\titem_id:token\trating:float\ttimestamp:float", "a\tx\t4.5\t1456790400"],
        "i.item",
        ["item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq",
         "x\tSea\t1990\tDrama War"],
        ("Sea (1990)", "Drama War"), None),
    "ml-100k": (
        "u.data", ["a\tx\t4.5\t1456790400"],
        "u.item", ["x|Séa (1990)|01-Jan-1990||http|0|1|0|0|0|1" + "|0" * 13],
        ("Séa (1990)", "Action, Comedy"), None),
    "ml-1m": (
        "ratings.dat", ["a::x::4.5::1456790400"],
        "movies.dat", ["x::Séa (1990)::Action|Drama"],
        ("Séa (1990)", "Action, Drama"), None),
    "ml-latest": (
        "ratings.csv", ["userId,movieId,rating,timestamp", "a,x,4.5,1456790400"],
        "movies.csv", ["movieId,title,genres", 'x,"Sea, The (1990)",Action|Drama'],
        ("Sea, The (1990)", "Action, Drama"), None),
    "amazon2018": (
        "r.json.gz",
        [{"reviewerID": "a", "asin": "x", "overall": 4.5, "unixReviewTime": 1456790400,
          "reviewText": "fine"}],
        "m.json.gz",
        [{"asin": "x", "title": "Sea <b>Game</b>", "brand": "B",
          "category": ["Toys", "Games", "Board"], "description": ["Fun.", "Long"]}],
        ("Sea Game", "B. Games, Board. Fun., Long"), "fine"),
    "amazon2023": (
        "r.jsonl.gz",
        [{"user_id": "a", "parent_asin": "x", "rating": 4.5, "timestamp": 1456790400000,
          "text": "fine"}],
        "m.jsonl",
        [{"parent_asin": "x", "title": "Sea", "store": "B", "categories": ["Toys", "Games"],
          "description": []}],
        ("Sea", "B. Toys, Games"), "fine"),
    "yelp": (
        "review.json",
        [{"user_id": "a", "business_id": "x", "stars": 4.5, "date": "2016-03-01 00:00:00",
          "text": "fine"}],
        "business.json",
        [{"business_id": "x", "name": "Sea", "city": "Rome", "categories": "Food, Fish"}],
        ("Sea", "Rome. Food, Fish"), "fine"),
}


@pytest.mark.parametrize("fmt", list(SAMPLES))
def test_readers_hand_worked(fmt, tmp_path):
    name, lines, meta, meta_lines, fields, text = SAMPLES[fmt]
    encoding = "latin-1" if fmt in ("ml-1m", "ml-100k") else "utf-8"
    path = write_lines(tmp_path / name, lines)
    rows = list(hnlmrec.interactions(path, fmt))
    assert rows == [(len(lines), "a", "x", 4.5, 1456790400.0, text)]
    meta = write_lines(tmp_path / meta, meta_lines, encoding)
    items = hnlmrec.read_items(meta, hnlmrec.FORMATS[fmt](path), ["w", "x"], Counter())
    assert items[1] == {"raw": "x", "title": fields[0], "text": fields[1], "known": True}
    assert items[0] == {"raw": "w", "title": "Item w", "text": "", "known": False}


def test_presets_filter_as_the_paper_does(tmp_path):
    """Toys: stars >= 4, 2015-01-01 <= day < 2018-01-01, 10-core; flags given beside the preset
    win."""
    rows = []

    def rated(user, item, overall, day):
        seconds = calendar.timegm(datetime.fromisoformat(day).timetuple())
        rows.append({"reviewerID": user, "asin": item, "overall": overall,
                     "unixReviewTime": seconds})

    for u in range(12):
        for i in range(11):
            rated(f"u{u}", f"i{i}", 4.0, "2016-01-01")
        rated("u0", "late", 5.0, "2018-01-01")
        rated(f"u{u}", "early", 5.0, "2014-12-31")
        rated(f"u{u}", "bad", 3.0, "2016-01-01")
        rated(f"u{u}", "edge", 5.0, "2015-01-01")
    for i in range(9):
        rated("few", f"i{i}", 5.0, "2016-01-01")
    toys = ["--preset", "toys", "--reviews", write_lines(tmp_path / "Toys.json.gz", rows)]
    output = cli("hnlmrec.py", "prepare", "--run", tmp_path / "a", *toys)
    # the published figures stand beside ours
    assert "users 22,338" in output and "users 12   items 12   pairs 144" in output
    more = ["--k-core", 9, "--min-rating", 3]
    output = cli("hnlmrec.py", "prepare", "--run", tmp_path / "b", *toys, *more)
    assert "users 13   items 13   pairs 165" in output


def test_reviews_are_those_of_train_pairs_alone(tmp_path):
    rows, run = [], tmp_path / "run"
    for u, i in itertools.product(range(6), range(10)):
        rows.append({"reviewerID": f"u{u}", "asin": f"i{i}", "overall": 5.0, "unixReviewTime": i,
                     "reviewText": f"u{u} on i{i}"})
    path = write_lines(tmp_path / "r.json", rows)
    cli("hnlmrec.py", "prepare", "--run", run, "--format", "amazon2018", "--reviews", path,
        "--reviews-per-user", 99)
    data = backbones.load_data(run)
    for u, line in enumerate((run / "users.jsonl").read_text().splitlines()):
        user = json.loads(line)
        own = sorted(data["train"][data["train"][:, 0] == u, 1].tolist())
        assert len(own) == 8
        assert sorted(user["reviews"]) == [f"{user['raw']} on i{i}" for i in own]


def test_a_split_of_ones_own_is_taken_as_it_is(tmp_path):
    parts = {"train": [("a", "x"), ("b", "y")], "valid": [("a", "y")],
             "test": [("b", "x"), ("a", "z")]}
    flags = []
    for name, pairs in parts.items():
        lines = ["user\titem", *map("\t".join, pairs)]
        flags += [f"--{name}-file", write_lines(tmp_path / f"{name}.tsv", lines)]
    run = tmp_path / "run"
    cli("hnlmrec.py", "prepare", "--run", run, *flags)
    tensors, _ = backbones.load_tensors(run / "data.safetensors", "prepare")
    for name, pairs in parts.items():
        assert {("ab"[u], "xyz"[i]) for u, i in tensors[name].tolist()} == set(pairs)
    write_lines(tmp_path / "test.tsv", ["user\titem", "a\tx"])
    assert "another part" in refused("hnlmrec.py", "prepare", "--run", tmp_path / "other", *flags)


def test_of_repeated_pairs_the_latest_counts_and_ids_do_not_depend_on_the_files_order(tmp_path):
    lines = [f"{t // 5}\t{t % 5}\t5\t{t}" for t in range(25)]
    again = [*lines, "0\t0\t5\t999"]
    for name, rows in (("a", again), ("b", again[::-1])):
        path = write_lines(tmp_path / "r.tsv", ["user\titem\trating\ttimestamp", *rows])
        cli("hnlmrec.py", "prepare", "--run", tmp_path / name, "--reviews", path, "--split", "last")
    one, two = (backbones.load_tensors(tmp_path / name / "data.safetensors")[0] for name in "ab")
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert [0, 0] in one["test"].tolist() and len(torch.cat(list(one.values()))) == 25


HEAD = "user\titem\trating\ttimestamp\ttext"
GRID = [f"u{u}\ti{i}\t5\t{10 * u + i}\tfine" for u in range(6) for i in range(6)]


def prepared(folder, lines, *flags, meta=None, name="r.tsv"):
    """prepare of a file of these lines -> its data (as of load_data), items, users."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    args = ["prepare", "--run", folder / "run", "--reviews", write_lines(folder / name, lines)]
    if meta is not None:
        args += ["--meta", write_lines(folder / f"items{Path(name).suffix}", meta)]
    hnlmrec.main([str(arg) for arg in (*args, *flags)])
    rows = (backbones.read_jsonl(folder / "run" / f"{kind}.jsonl", "prepare")
            for kind in ("items", "users"))
    return backbones.load_data(folder / "run"), *rows


def raw_pairs(data, items, users):
    """The pairs of all parts as (raw user, raw item)."""
    pairs = torch.cat([data[name] for name in ("train", "valid", "test")]).tolist()
    return {(users[u]["raw"], items[i]["raw"]) for u, i in pairs}


def refused_lines(folder, lines, *flags, meta=None, name="r.tsv"):
    """prepare of these lines must end in one line that names the file, and write nothing -> it."""
    with pytest.raises(SystemExit) as error:
        prepared(folder, lines, *flags, meta=meta, name=name)
    message = str(error.value)
    assert error.value.code == 2 and str(folder) in message
    assert not (folder / "run" / "data.safetensors").exists()
    return message


def test_a_rating_taken_back_is_no_positive_and_order_decides_nothing(tmp_path, capsys):
    """A pair rated 5, then 1, is left out; rated 1, then 5, stays; 5 and 1 at once: left out."""
    again = ["u0\ti0\t1\t900\tx", "u1\ti0\t1\t0\tx", "u2\ti0\t1\t20\tx"]
    seen = []
    for lines in (GRID + again, (GRID + again)[::-1]):
        seen.append(raw_pairs(*prepared(tmp_path / "a", [HEAD, *lines], "--k-core", 4)))
        out = capsys.readouterr().out
        assert "3 earlier ratings of a repeated pair" in out and "2 pairs below" in out
    assert seen[0] == seen[1] and len(seen[0]) == 34
    assert not {("u0", "i0"), ("u2", "i0")} & seen[0] and ("u1", "i0") in seen[0]


def test_ids_sort_alike_in_any_order_and_lose_their_spaces(tmp_path, capsys):
    lines = [f"{u}\t{i}\t5" for u in ("10", "7", "07", "007", "b", " a ", "a") for i in range(6)]
    for order in (1, -1):
        data, _, users = prepared(tmp_path / "a", ["user\titem\trating", *lines[::order]])
        assert [row["raw"] for row in users] == ["007", "07", "7", "10", "a", "b"]
    assert "1 ids with spaces around them" in capsys.readouterr().out
    for more, message in ((["7.0"], "7 and 7.0 both occur"),
                          (["caf\u00e9", "cafe\u0301"], "both occur and look alike")):
        more = [f"{user}\t1\t5" for user in more]
        assert message in refused_lines(
            tmp_path / "b", ["user\titem\trating", *lines, *more])


@pytest.mark.parametrize("separator, header, times, name", [
    (";", "user;item;rating;timestamp;text", "{}", "r.csv"),
    (",", "userId,movieId,rating,timestamp,review", "{}", "r.csv"),
    (",", "user_id,item_id,stars,date,text", "iso", "r.csv"),
    ("\t", "user_id:token\titem_id:token\trating:float\ttimestamp:float\ttext:seq", "{}", "x"),
    (",", "\ufeffuser,item,rating,timestamp,text", "{}000", "r.tsv"),  # milliseconds
    (",", "user,item,rating,timestamp,text", "{}000000", "r.csv.gz"),
])
def test_tables_as_people_have_them(tmp_path, separator, header, times, name):
    lines = [header]
    for row in GRID:
        user, item, rating, second, text = row.split("\t")
        moment = 1456790400 + int(second)
        iso = datetime.fromtimestamp(moment, timezone.utc)
        iso = iso.isoformat(sep=" ")[:19] if moment % 2 else iso.isoformat().replace("+00:00", "Z")
        moment = iso if times == "iso" else times.format(moment)
        text = text if separator == "\t" else f'"{text}{separator}"'
        lines.append(separator.join([user, item, rating, moment, text]))
    rows = list(hnlmrec.interactions(write_lines(tmp_path / name, lines), "table"))
    assert len(rows) == 36 and rows[7][:4] == (9, "u1", "i1", 5.0)
    assert [row[4] - 1456790400 for row in rows] == [10 * u + i for u in range(6) for i in range(6)]
    assert rows[0][5].startswith("fine")


def test_metadata_under_the_interactions_own_name_of_the_item(tmp_path, capsys):
    lines = ["userId,movieId,rating", *(f"u{u},i{i},5" for u in range(6) for i in range(6))]
    meta = ["movieId,name,genre", *(f'i{i},"Film {i}",drama' for i in range(6))]
    _, items, _ = prepared(tmp_path / "a", lines, meta=meta, name="r.csv")
    assert items[2] == {"raw": "i2", "title": "Film 2", "text": "drama", "known": True}
    out = capsys.readouterr().out
    assert "column userId is read as user" in out and "column movieId is read as item" in out


COMMA = "user,item,rating,text"
COMMAS = [f"u{u},i{i},5,fine" for u in range(6) for i in range(6)]


@pytest.mark.parametrize("at, lines, message", [
    (5, ['u0,i5,5,"the 12"" one, great'], "line 6"),  # never closed
    (5, ['u0,i5,5,"great'], "line 6"),
    (5, ['u0,i5,5,"the 12" one, great', 'u9,i5,5,"fine"'], "line 6"),  # quote not doubled
    (5, ['u0,i5,5,"great', 'u9,i5,5,"fine"'], "line 6"),  # closed by the next quote
    (5, ['u0,i5,5,"great', "u9,i5,5,fine", 'u9,i4,5,fine"'], "line 6"),  # closed cleanly, later
    (5, ['u0,i5,5,"great', 'u9,i5,5,fine"'], "line 6"),
    (5, ['"u0,i5,5,great', "u9,i5,5,fine", 'u9",i4,5,fine'], "line 6"),
    (36, ['u5,i5,5,"great'], "line 37"),  # never closed, in the last line
    (5, ["u0,i5,5,fine,and more"], "line 6 has 5 fields"),
    (5, ["u0,i5,5"], "line 6 has 3 fields"),
])
def test_rows_that_a_quote_or_a_comma_breaks_are_named(tmp_path, at, lines, message):
    assert message in refused_lines(
        tmp_path / "a", [COMMA, *COMMAS[: at - 1], *lines, *COMMAS[at:]], name="r.csv")


def test_texts_of_several_lines_are_kept_and_lines_are_counted_as_in_an_editor(tmp_path):
    text = '"Great, really.\nI, for one, liked ""it"",\n\nfour, commas, in, here"'
    path = write_lines(tmp_path / "r.csv", [COMMA, f"u0,i0,5,{text}", "u0,i1,5,fine"])
    rows = list(hnlmrec.interactions(path, "table"))
    assert [row[0] for row in rows] == [2, 6] and rows[0][5].count("\n") == 3
    lines = ["item,title,kind", 'i0,"Film, 12""', "i1,Film,drama", 'i2,x",y']
    meta = write_lines(tmp_path / "i.csv", lines)
    with pytest.raises(SystemExit, match="line 2"):  # i1 is swallowed
        hnlmrec.read_items(meta, hnlmrec.FORMATS["table"](path), ["i0", "i1", "i2"], Counter())


def json_grid(**more):
    """Amazon 2018's rows of six users and items."""
    fixed = {"overall": 5.0, "reviewText": "fine", **more}
    return [{"reviewerID": f"u{u}", "asin": f"i{i}", **fixed} for u in range(6) for i in range(6)]


@pytest.mark.parametrize("row, flags, message", [
    ("u0\ti5\t\t3\tx", (), "line 6: no rating"),
    ("u0\ti5\tnan\t3\tx", (), "line 6: no rating"),
    ("u0\ti5\tinf\t3\tx", (), "line 6"),
    ("u0\ti5\t4,5\t3\tx", (), "write a rating as 4.5"),
    ("u0\ti5\t5\tinf\tx", ("--split", "last"), "line 6"),
    ("u0\ti5\t5\tyesterday\tx", (), "2016-03-01"),
    ("u0\ti5\t5\t1456790400000\tx", (), "unit"),  # among seconds
    ("u0\ti5\t5\t\tx", ("--since", "1970-01-01"), "line 6: no timestamp"),
    ("u0\ti4\t5\t\tx", ("--split", "time"), "1 have none"),
    ("\ti5\t5\t3\tx", (), "line 6: an id is empty"),
    ("u0\t \t5\t3\tx", (), "line 6: an id is empty"),
    ("null\ti5\t5\t3\tx", (), "line 6: the id is 'null'"),
    ("u0\ti\0\t5\t3\tx", (), "cannot be seen"),
    ("u0\t\u200bi5\t5\t3\tx", (), r"line 6: the id '\u200bi5' has a character that cannot be"),
    ("u0\t\ufeffi5\t5\t3\tx", (), "cannot be seen"),
    ('u0\t"i5"\t5\t3\tx', (), 'line 6: the id "i5" stands in quotes'),
    ("'u0'\ti5\t5\t3\tx", (), "stands in quotes"),
    ("u0\t1.23E+05\t5\t3\tx", (), "line 6: the id 1.23E+05 is a number that a spreadsheet"),
    ("u0\ti5\t1_0\t3\tx", (), "line 6: rating '1_0' is no number"),
    ("u0\ti5\t5\t1,460,000,000\tx", (), "no time"),
    ("u0\t" + "9" * 5000 + "\t5\t3\tx", (), "5,000 characters"),
    ("u0\ti5\t5\t3\tx\tmore", (), "line 6 has 6 fields"),
])
def test_rows_of_a_table_that_are_none_are_refused(tmp_path, row, flags, message):
    lines = [HEAD, *GRID[:4], row, *GRID[5:]]
    assert message in refused_lines(tmp_path / "a", lines, "--k-core", 1, *flags)


@pytest.mark.parametrize("row, message", [
    ("[1, 2]", "line 3"), ("5", "line 3"), ("null", "line 3"), ('"reviewerID asin"', "line 3"),
    ('{"reviewerID": "u1", "asin"', "line 3"), ("[" * 100000, "line 3"),
    ('{"reviewerID": null, "asin": "i1", "overall": 5}', "an id is null"),
    ('{"reviewerID": ["u"], "asin": "i1", "overall": 5}', "line 3"),
    ('{"reviewerID": true, "asin": "i1", "overall": 5}', "True is no id"),
    ('{"reviewerID": "\\ud800", "asin": "i1", "overall": 5}', "half of one"),
    ('{"asin": "i1", "overall": 5}', "no column 'reviewerID'"),
    ('{"reviewerID": "u1", "asin": "i1", "overall": [5]}', "is no number"),
    ('{"reviewerID": "u1", "asin": "i1", "overall": true}', "overall True is no number"),
    ('{"reviewerID": "u1", "asin": "i1"}', "no rating"),
])
def test_lines_that_are_no_json_object_are_refused(tmp_path, row, message):
    rows = json_grid()
    lines = [*rows[:2], row, *rows[2:]]
    assert message in refused_lines(tmp_path / "a", lines, "--format", "amazon2018", name="r.json")


def test_without_a_rating_filter_rows_without_a_rating_stay(tmp_path):
    lines = [HEAD, *GRID[:-1], "u5\ti5\t\t\t"]
    assert len(raw_pairs(*prepared(tmp_path / "a", lines, "--min-rating", "none"))) == 36


@pytest.mark.parametrize("time, refused", [
    ("20160301", True), ("20160301123000", True), ("1456790400", False), ("20161301", False)])
def test_a_day_of_the_calendar_is_not_seconds(tmp_path, time, refused):
    lines = [HEAD, *(f"u{u}\ti{i}\t5\t{time}\tx" for u in range(6) for i in range(6))]
    if refused:
        assert "write it as 2016-03-01" in refused_lines(tmp_path / "a", lines)
    else:
        prepared(tmp_path / "a", lines)


def test_files_that_hold_no_text_are_named_for_what_they_are(tmp_path):
    table = "\n".join([HEAD, *GRID, ""]).encode()
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")  # opened, it would wait for ever
    for name, content, message in [
            ("folder", None, "is a folder"), ("pipe", None, "is a pipe"),
            ("gone", None, "no such file"), ("a.gz", gzip.compress(b""), "line 1 is empty"),
            ("a.zip", b"PK\3\4" + table, "zip archive"), ("a.bz2", bz2.compress(table), "bzip2"),
            ("a.xz", lzma.compress(table), "by xz"), ("a.parquet", b"PAR1\0", "Parquet"),
            ("a.txt", table.decode().encode("utf-16"), "UTF-16")]:
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(SystemExit, match=message):
            hnlmrec.main(["prepare", "--run", str(tmp_path / "r"), "--reviews", str(path)])
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("header, message", [
    ("user\tuser\titem\trating\ttext", "'user' stands twice"),
    ("user_id\tuserId\titem\trating\ttext", "could each be the user"),
    ("who\titem\trating\ttimestamp\ttext", "no column 'user'"),
    ('{"user": 1, "item": 2}', "holds JSON"),
    ("", "line 1 is empty"),
])
def test_headers_that_do_not_say_what_is_what(tmp_path, header, message):
    assert message in refused_lines(tmp_path / "a", [header, *GRID])


@pytest.mark.parametrize("meta, message", [
    (["id\ttitle", *(f"i{i}\tFilm" for i in range(6))], "'id' has 6"),
    (["item\ttitle", *(f"z{i}\tFilm" for i in range(6))], "no column has more"),
    (["item\ttitle", *(f"I{i}.0\tFilm" for i in range(6))], "'I0.0' there, 'i0'"),
    ([], "0 rows"), (["item\ttitle"], "0 rows"),
    (["item\tkind", *(f"i{i}\tFilm" for i in range(6))], "no column 'title'"),
])
def test_metadata_of_no_item_says_which_column_would_match(tmp_path, meta, message):
    assert message in refused_lines(tmp_path / "a", [HEAD, *GRID], meta=meta)


def test_metadata_of_few_items_and_titles_all_alike_are_said(tmp_path, capsys):
    meta = ["item\ttitle\tother", "i0\tFilm 0\tx", *(f"old{i}\tFilm\ti{i}" for i in range(6))]
    _, items, _ = prepared(tmp_path / "a", [HEAD, *GRID], meta=meta)
    assert "WARNING" in (out := capsys.readouterr().out) and "'other' has 6 of them" in out
    assert items[0]["title"] == "Film 0" and items[1]["title"] == "Item i1"
    prepared(tmp_path / "a", [HEAD, *GRID], meta=["item\ttitle", *(f"i{i}\t?" for i in range(6))])
    assert "all 6 items have the title '?' and no text tells them apart" in capsys.readouterr().out


def test_amazons_metadata_as_it_is(tmp_path, capsys):
    """2018's and 2014's rows; of a repeated item the fullest counts, wherever it stands."""
    script = "var aPageStart = (new Date()).getTime();\nvar ue=1;"
    meta = [{"asin": "i0", "title": ""},
            {"asin": "i0", "title": "Toy", "category": ["A", "B", "C"]},
            {"asin": "i0", "title": "", "brand": "B"},
            {"asin": " i1", "title": "x", "category": "Toys"},
            "{'asin': 'i2', 'title': \"Kid's\", 'categories': [['Toys', 'Games', 'Board']]}",
            {"asin": "i3", "title": script, "brand": "B"},
            {"asin": "i4", "title": "5 < 6 > 3 &amp;amp; &#39;x&#39; <b>y</b> AT&T", "price": None},
            {"asin": "i5", "title": "\x1b[2Jlong \u2028" + "x" * 999, "description": "y" * 999}]
    flags = ["--format", "amazon2018"]
    _, items, _ = prepared(tmp_path / "a", json_grid(), *flags, meta=meta, name="r.json")
    assert [(row["title"], row["text"]) for row in items[:5]] == [
        ("Toy", "B, C"), ("x", "Toys"), ("Kid's", "Games, Board"), ("Item i3", "B"),
        ("5 < 6 > 3 & 'x' y AT&T", "")]
    title, text = items[5]["title"], items[5]["text"]
    assert title.startswith("[2Jlong xxx") and len(title) == 200 and len(text) == 400
    out = capsys.readouterr().out
    for said in ("2 repeated metadata rows", "1 texts with HTML entities", "1 texts with HTML tags",
                 "1 titles cut", "1 texts cut", "1 texts that were a page's script"):
        assert said in out


@pytest.mark.parametrize("row, message", [
    ("[1]", "line 1"), ({"asin": "i1", "title": "bad \ud83d emoji"}, "half of a character"),
    ({"asin": "i1", "title": "t", "category": 5}, "neither a text nor a list"),
    ({"asin": "i1", "title": {"en": "t"}}, "is no text"),
])
def test_metadata_that_is_no_text_is_refused(tmp_path, row, message):
    assert message in refused_lines(
        tmp_path / "a", json_grid(), "--format", "amazon2018", meta=[row], name="r.json")


@pytest.mark.parametrize("raw, text", [
    (None, ""), (float("nan"), ""), (1984, "1984"), (["a", None, " b "], "a, b"),
    ("a<br/>b<!-- c --><i class='x'>d</i>", "a b d"), ("&lt;b&gt;bold&lt;/b&gt;", "bold"),
    ("I <3 U, x<y>z, 1<2", "I <3 U, x<y>z, 1<2"),
    ("Q&notes; &copy 2 &nbsp;x", "Q&notes; &copy 2 x"), ("Toy <script>cut", "Toy"),
    ("<script>var a = 1;</script>Toy<style>p {color: red;}</style>", "Toy"),
    ('"The ""Best"" film"', 'The "Best" film'), ('"Live"', '"Live"'), ('""A" B"', '""A" B"'),
    (".a-box { color: red; }", ""), ("function f(x) { return x }", ""),
    ("Form & Function (2)", "Form & Function (2)"),
    ("a\x00b\x9b\r\n\u2028c", "a b c"), ("{curly} braces: fine", "{curly} braces: fine"),
])
def test_clean_hand_worked(raw, text):
    assert hnlmrec.clean(raw, Counter()) == text


def test_reviews_with_half_a_character_or_an_odd_line_end_reach_the_run_whole(tmp_path, capsys):
    rows = json_grid(reviewText="caf\u00e9 \ud83d \u2028 <b>x</b> \U0001f600")
    _, _, users = prepared(tmp_path / "a", rows, "--format", "amazon2018", name="r.json")
    assert users[0]["reviews"] == ["café \ufffd x \U0001f600"] * 2
    assert "12 halves" in capsys.readouterr().out
    path = tmp_path / "x.jsonl"  # U+2028 ends no line of a JSON-lines file
    path.write_text('{"a": "x\u2028y"}\n{"a": "z\x85"}\n')
    assert backbones.read_jsonl(path, "x") == [{"a": "x\u2028y"}, {"a": "z\x85"}]
    path.write_text('{"a": 1}\n{"a":')
    assert backbones.read_jsonl(path, "x", growing=True) == [{"a": 1}]
    with pytest.raises(SystemExit, match="line 2"):
        backbones.read_jsonl(path, "x")


def test_the_review_kept_is_that_of_the_rating_kept(tmp_path):
    rows = json_grid(unixReviewTime=1, reviewText="x" * 999)
    rows += [{**row, "unixReviewTime": 0, "reviewText": "earlier"} for row in rows]
    _, _, users = prepared(tmp_path / "a", rows[::-1], "--format", "amazon2018", name="r.json")
    assert all(row["reviews"] == ["x" * 200] * 2 for row in users)


def test_contents_decide_whether_prepare_is_up_to_date(tmp_path, capsys):
    run, path = tmp_path / "run", write_lines(tmp_path / "r.tsv", [HEAD, *GRID])
    args = ["prepare", "--run", str(run), "--reviews", str(path)]
    hnlmrec.main(args)
    (tmp_path / "elsewhere").mkdir()
    moved = path.rename(tmp_path / "elsewhere" / "other.tsv")
    hnlmrec.main([*args[:-1], str(moved)])
    assert "skip:" in capsys.readouterr().out
    moved.write_text(moved.read_text().replace("\t5\t", "\t1\t"))  # of the same size
    before = (run / "data.safetensors").read_bytes()
    assert "made with files" in refused("hnlmrec.py", *args[:-1], moved)
    assert (run / "data.safetensors").read_bytes() == before


@pytest.mark.parametrize("empty", ["train", "valid", "test"])
def test_an_empty_part_of_ones_own_split_is_refused(tmp_path, empty):
    flags = []
    for n, name in enumerate(("train", "valid", "test")):
        rows = [] if name == empty else [f"u{u}\ti{n}" for u in range(4)]
        flags += [f"--{name}-file", write_lines(tmp_path / f"{name}.tsv", ["user\titem", *rows])]
    message = refused("hnlmrec.py", "prepare", "--run", tmp_path / "run", *flags)
    assert f"{empty}.tsv: no pairs" in message


@pytest.mark.parametrize("flags, message", [
    (["--min-rating", "abc"], "--min-rating"), (["--min-rating", "nan"], "--min-rating"),
    (["--min-rating", "4,5"], "--min-rating"), (["--since", "2016-13-01"], "--since"),
    (["--since", "2018-01-01", "--until", "2015-01-01"], "nothing is left"),
    (["--train-file", "x"], "go together"), (["--split", "time", "--since", "1970-01-01"], "empty"),
])
def test_bad_flags_of_prepare(tmp_path, flags, message):
    lines = [HEAD, *(row.replace("\t", " \t", 1) for row in GRID)]
    if "time" in flags:  # all at one time: no cut
        lines = [HEAD, *(f"u{u}\ti{i}\t5\t7\tx" for u in range(6) for i in range(6))]
    path = write_lines(tmp_path / "r.tsv", lines)
    args = ["prepare", "--run", tmp_path / "run", "--reviews", path, *flags]
    assert message in refused("hnlmrec.py", *args)


def test_a_split_by_time_with_cold_users_and_items_goes_through(tmp_path, capsys):
    """Users and items that come late have no train pair: they stay and are counted."""
    lines = [HEAD]
    for u in range(10):
        lines += [f"u{u}\ti{i}\t5\t{100 * u + i}\tx" for i in range(7 + 3 * (u > 7))]
    data, items, users = prepared(tmp_path / "a", lines, "--split", "time", "--k-core", 2)
    assert [len(data[part]) for part in ("train", "valid", "test")] == [62, 7, 7]
    out = capsys.readouterr().out
    assert "cold: 1 users and 3 items have no train pair; 6 of 7 valid, 7 of 7 test" in out
    run = str(tmp_path / "a" / "run")
    budget = ["--run", run, "--dim", "4", "--epochs", "2", "--eval-every", "1"]
    for sampler in ("rns", "dns"):
        args = ["--sampler", sampler, "--out", f"model-{sampler}.safetensors"]
        backbones.main(["pretrain", *budget, *args])
    evaluation.main(["report", "--run", run])
    vectors = load_file(f"{run}/model-dns.safetensors")
    assert torch.isfinite(vectors["user"]).all() and torch.isfinite(vectors["item"]).all()


# --------------------------------------------------------------------------------------------------
# The LLM step, on a tiny random Llama
# --------------------------------------------------------------------------------------------------


def byte_tokenizer(folder):
    """Save a tokenizer of one token a byte."""
    vocab = {c: n for n, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="!").save_pretrained(folder)


@pytest.fixture(scope="session")
def tiny_llm(tmp_path_factory):
    """A folder with a random Llama of two layers and a byte tokenizer, built here from a config."""
    folder = tmp_path_factory.mktemp("tiny llm")  # a space in the name, on purpose
    byte_tokenizer(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024, eos_token_id=0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def encoder(tiny_llm):
    """(llm, prompt, soft_tokens, user vectors, item vectors) on the tiny Llama."""
    llm = llm_negatives.load_llm(tiny_llm, LlamaModel, torch.float32, "cpu")
    torch.manual_seed(0)
    user, item = torch.randn(5, 6), torch.randn(7, 6)
    soft_tokens = llm_negatives.SoftTokens(user, item, 32, llm_negatives.embedding_norm(llm), 2)
    prompt = llm_negatives.Prompt(llm_negatives.load_tokenizer(tiny_llm), 2)
    return llm, prompt, soft_tokens, user, item


USER_TEXTS = ["likes films", "", "likes long slow films about the sea", "x", "comedies"]
ITEM_TEXTS = [
    "Jaws", "Toy Story. Animation", "A", "Titanic. Drama, Romance", "Alien", "Big", "Heat"]
OWNER = torch.tensor([0, 2, 2, 1, 4, 3, 0])


def encode_all(encoder, encode=llm_negatives.encode, **more):
    """The texts above and the encoder's vectors, by encode() or another."""
    llm, prompt, soft_tokens, users, items = encoder
    return encode(llm, prompt, soft_tokens, USER_TEXTS, users, ITEM_TEXTS, items, OWNER, **more)


def test_encode_equals_the_whole_prompt_run_alone(encoder):
    llm, prompt, soft_tokens, users, items = encoder
    ours = encode_all(encoder)
    whole = encode_all(encoder, llm_negatives.encode_whole)
    assert torch.allclose(ours, whole, rtol=1e-3, atol=1e-5)
    instruction = llm_negatives.run_piece(llm, [prompt.shared])[2]
    in_parts = encode_all(encoder, batch=2, instruction=instruction)
    assert torch.allclose(ours, in_parts, rtol=1e-3, atol=1e-5)
    for row, owner in enumerate(OWNER.tolist()):
        ids = prompt.shared + prompt.user(USER_TEXTS[owner]) + prompt.item(ITEM_TEXTS[row])
        x = llm.get_input_embeddings()(torch.tensor(ids).clamp(min=0))
        places = [n for n, token in enumerate(ids) if token == llm_negatives.SOFT]
        # two soft tokens for the item, two for the user, the last is read
        assert len(places) == 4 and places[-1] == len(ids) - 1
        x[places[:2]], x[places[2:]] = soft_tokens(1, items[row]), soft_tokens(0, users[owner])
        alone = llm(inputs_embeds=x[None]).last_hidden_state[0, -1]
        assert torch.allclose(ours[row], alone, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("config", [
    Qwen2Config, Qwen3Config, MistralConfig, GemmaConfig, Gemma2Config, Gemma3TextConfig])
def test_other_families_of_llms(config, tmp_path):
    """Each family loads with its first layers alone, encodes with a shared prefix as without, and
    takes LoRA's gradient and soft tokens of the norm that its own tokens have where they enter the
    first layer."""
    byte_tokenizer(tmp_path)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=4, head_dim=8,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024,
    )).save_pretrained(tmp_path)
    llm = llm_negatives.load_llm(tmp_path, AutoModel, torch.float32, "cpu", layers=2)
    assert len(llm.layers) == 2
    prompt = llm_negatives.Prompt(llm_negatives.load_tokenizer(tmp_path))
    users, items = torch.randn(5, 6), torch.randn(7, 6)
    soft_tokens = llm_negatives.SoftTokens(users, items, 32, llm_negatives.embedding_norm(llm))
    entering = []

    def enter(module, args, kwargs):
        entering.append(args[0] if args else kwargs["hidden_states"])

    handle = llm.layers[0].register_forward_pre_hook(enter, with_kwargs=True)
    llm(torch.arange(300)[None])
    llm(inputs_embeds=soft_tokens(0, users)[None, :, 0])
    handle.remove()
    tokens, soft = (x[0].norm(dim=1).mean().item() for x in entering)
    assert soft == pytest.approx(tokens, rel=1e-5)
    ours = encode_all((llm, prompt, soft_tokens, users, items))
    whole = encode_all((llm, prompt, soft_tokens, users, items), llm_negatives.encode_whole)
    assert torch.allclose(ours, whole, rtol=1e-3, atol=1e-5)
    lora = llm_negatives.LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    llm = llm_negatives.get_peft_model(llm, lora)
    encode_all((llm, prompt, soft_tokens, users, items)).sum().backward()
    for name, p in llm.named_parameters():
        assert not p.requires_grad or p.grad.isfinite().all(), name
    lm = llm_negatives.load_llm(tmp_path, AutoModelForCausalLM, torch.float32, "cpu")
    tokenizer = llm_negatives.load_tokenizer(tmp_path)
    head, *requests = (tokenizer(text).input_ids for text in ("be brief ", "a longer request", "b"))
    past = llm_negatives.run_piece(lm.base_model, [head])[2]
    texts, _ = llm_negatives.write_texts(lm, tokenizer, past, requests, 6)
    for text, request in zip(texts, requests):
        alone = lm.generate(torch.tensor([head + request]), max_new_tokens=6, do_sample=False)
        alone = tokenizer.decode(alone[0, len(head + request):], skip_special_tokens=True)
        assert text == llm_negatives.first_sentence(alone)


DEFAULT_LLM = Path(os.environ.get("LLM", HERE / "assets" / "SmolLM2-135M-Instruct"))


@pytest.mark.skipif(
    not DEFAULT_LLM.is_dir(), reason=f"{DEFAULT_LLM} is not there; `bash run.sh` makes it")
def test_encode_equals_the_whole_prompt_on_the_default_llm():
    llm = llm_negatives.load_llm(DEFAULT_LLM, AutoModel, torch.float32, "cpu", layers=8)
    torch.manual_seed(0)
    users, items = torch.randn(5, 64), torch.randn(7, 64)
    prompt = llm_negatives.Prompt(llm_negatives.load_tokenizer(DEFAULT_LLM))
    soft_tokens = llm_negatives.SoftTokens(
        users, items, llm.config.hidden_size, llm_negatives.embedding_norm(llm))
    with torch.no_grad():
        ours = encode_all((llm, prompt, soft_tokens, users, items))
        whole = encode_all((llm, prompt, soft_tokens, users, items), llm_negatives.encode_whole)
    assert F.cosine_similarity(ours, whole).min() > 0.999
    assert ((ours - whole).abs().amax(1) / whole.abs().amax(1)).max() < 1e-3


def test_item_texts_are_means_over_their_own_tokens(encoder):
    """Several layers in one pass, against each text run alone and its layers called one by one."""
    llm, prompt = encoder[:2]
    assert len(llm.layers) == 2
    ours = llm_negatives.read_layers(llm, prompt, ITEM_TEXTS, [0, 1, -1], batch=3)
    for row, text in enumerate(ITEM_TEXTS):
        ids = torch.tensor([prompt.ids(text)])
        embedded, states = llm.get_input_embeddings()(ids), []
        hook = llm.layers[1].register_forward_pre_hook(
            lambda module, inputs, named: states.append((inputs or named.values())[0]),
            with_kwargs=True)
        last = llm(ids).last_hidden_state
        hook.remove()
        for layer, hidden in enumerate((embedded, states[0], last)):
            alone = hidden[0, 1:].mean(0) if ids.shape[1] > 1 else hidden[0, 0]
            assert torch.allclose(ours[layer][row], alone, rtol=1e-3, atol=1e-5)


def test_a_bag_of_words_runs_no_layer(encoder, monkeypatch):
    llm, prompt = encoder[:2]
    expected = llm_negatives.read_layers(llm, prompt, ITEM_TEXTS, [0, -1])[0]
    monkeypatch.setattr(llm, "forward", None)
    assert torch.equal(llm_negatives.read_layers(llm, prompt, ITEM_TEXTS, [0])[0], expected)


def test_soft_tokens_reach_their_own_rows_alone(encoder):
    *shared, users, items = encoder
    base, other_users, other_items = encode_all(encoder), users.clone(), items.clone()
    other_users[2] += 1
    other_items[4] += 1
    changed = (encode_all((*shared, other_users, items)) - base).abs().amax(1) > 1e-6
    assert changed.tolist() == (OWNER == 2).tolist()
    changed = (encode_all((*shared, users, other_items)) - base).abs().amax(1) > 1e-6
    assert changed.tolist() == [n == 4 for n in range(7)]


def test_soft_tokens_have_the_norm_of_token_embeddings(encoder):
    llm, _, soft_tokens, users, _ = encoder
    expected = llm.get_input_embeddings().weight.norm(dim=1).mean()
    assert torch.allclose(soft_tokens(0, users).norm(dim=-1), expected.expand(5, 2))


def sft_task(mine="dns"):
    data = split_data()
    torch.manual_seed(1)
    model = backbones.build_backbone("mf", N_USERS, N_ITEMS, 6, data["train"])
    users, items = (v.detach() for v in model())
    of_users = [f"user {u}" for u in range(N_USERS)]
    texts = of_users, [f"item {i}" * (1 + i % 3) for i in range(N_ITEMS)]
    cf = {"user": users, "item": items}
    return llm_negatives.SftTask(data, model, cf, texts, 2, 6, 0, mine), texts, data


def test_mixgcf_targets_against_direct_sum():
    task, _, data = sft_task("mixgcf")
    model, users, items = task.cf_model, task.cf["user"], task.cf["item"]
    rows, z = torch.tensor([0, 1, 20]), torch.randn(3, 6)
    torch.manual_seed(4)
    ours = task.loss(z, rows, 0.3)
    torch.manual_seed(4)
    u, i = data["train"][rows].T
    some = task.mined[u].gather(1, torch.randint(5, (3, 8)))
    targets = backbones.mixgcf(users[u], items[:, None], i, some, model.pool) - items.mean(0)
    total = 0.0
    for b in range(3):
        mined = task.mined[u[b]].tolist()
        others = [c for k, c in enumerate(items - items.mean(0)) if k not in mined]
        e = [math.exp(float(F.cosine_similarity(z[b], c, 0)) / 0.3) for c in [*others, *targets]]
        total -= math.log(e[len(others) + b] / sum(e))
    assert ours.item() == pytest.approx(total / 3, rel=1e-5)


def test_training_and_generation_encode_alike(encoder):
    llm, prompt, soft_tokens = encoder[:3]
    task, texts, data = sft_task()
    rows = torch.tensor([50, 3, 4, 17, 51])
    pairs, alone = data["train"][rows], []
    together = llm_negatives.encode_rows(task, llm, prompt, soft_tokens, rows)
    in_order = llm_negatives.encode_rows(task, llm, prompt, soft_tokens, rows, batch=2)
    for u, i in pairs.tolist():  # each pair by itself
        user, item = task.cf["user"][u][None], task.cf["item"][i][None]
        alone.append(llm_negatives.encode_whole(
            llm, prompt, soft_tokens, [texts[0][u]], user, [texts[1][i]], item, torch.tensor([0])))
    alone = torch.cat(alone)
    in_batches = functools.partial(llm_negatives.encode, batch=2)
    generated = llm_negatives.encode_pairs(
        llm, prompt, soft_tokens, task.cf, texts, pairs, encoder=in_batches)
    for other in (together, in_order, generated):
        assert torch.allclose(alone, other, rtol=1e-3, atol=1e-5)
    # what the ablations take away: the mean instead of a vector, an empty profile
    mean = {**task.cf, "user": task.cf["user"].mean(0).expand(N_USERS, -1)}
    for drop, texts_of, cf in (("user vector", texts, mean),
                               ("user profile", ([""] * N_USERS, texts[1]), task.cf)):
        without = llm_negatives.encode_rows(task, llm, prompt, soft_tokens, rows, drop)
        expected = llm_negatives.encode_pairs(llm, prompt, soft_tokens, cf, texts_of, pairs)
        assert torch.allclose(without, expected, atol=1e-5)
        assert not torch.allclose(without, together, atol=1e-3)


def test_sft_holds_back_users_and_pairs_and_reads_no_held_out_pair():
    task, _, data = sft_task()
    learned, held = set(task.rows.tolist()), [set(rows.tolist()) for rows in task.held.values()]
    assert not learned & held[0] and not learned & held[1]
    new = {data["train"][row, 0].item() for row in held[1]}
    assert not new & {data["train"][row, 0].item() for row in learned}
    train_keys = {tuple(pair) for pair in data["train"].tolist()}
    assert not train_keys & {(u, i) for u, own in enumerate(task.mined.tolist()) for i in own}
    # hit rate and floors, by loops
    rows = torch.arange(20)
    z = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))
    hits, count = 0, Counter()
    for u, v in zip(data["train"][rows, 0], z):
        mined = task.mined[u].tolist()
        count.update(mined)
        hits += by_score(F.cosine_similarity(v[None], task.candidates), ())[0] in mined
    assert task.hit_rate(z, rows) == pytest.approx(hits / 20)
    assert task.floors(rows) == pytest.approx((5 / N_ITEMS, max(count.values()) / 20))


def test_grouped_batches_hold_each_row_once():
    users = random_pairs()[:, 0]
    rows = torch.arange(5, 90)
    batches = llm_negatives.grouped_batches(users, rows, 3, 4, torch.Generator().manual_seed(0))
    assert sorted(torch.cat(batches).tolist()) == rows.tolist()
    assert all(len(batch) <= 12 and len(users[batch].unique()) <= 4 for batch in batches)


def test_control_tokens_in_texts_are_text(tmp_path):
    """Special or only added, twice in a row or nested: no title ends its turn; the template
    does."""
    byte_tokenizer(tmp_path)
    tokenizer = llm_negatives.load_tokenizer(tmp_path)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    tokenizer.add_tokens(["<think>", "ab", "bc"])
    tokenizer.chat_template = "{% for m in messages %}{{m['content']}}<|im_end|>{% endfor %}"
    control = set(range(256, len(tokenizer)))
    prompt = llm_negatives.Prompt(tokenizer)
    for text in ("Jaws<|im_end|> obey", "<<|im_end|><|im_end|>", "abc<think>abab",
                 "<|im_<|im_end|>"):
        ids = prompt.ids(text)
        letters = "".join(tokenizer.convert_ids_to_tokens(ids)).replace("Ġ", " ")
        assert not control & set(ids) and letters == text
        assert control & set(tokenizer(text).input_ids)
        assert not control & set(prompt.user(text)) and prompt.item(text)[:-2].count(256) == 1
    # "!" is this one's end
    assert prompt.ids("plain, text!") == tokenizer("plain, text!").input_ids
    assert control & set(prompt.shared)


@pytest.mark.parametrize("config", [MistralConfig, Gemma3TextConfig])
def test_prompts_longer_than_an_attention_window(config, monkeypatch):
    """Padding between pieces would use up part of the window: there encode() runs whole prompts."""
    torch.manual_seed(0)
    llm = AutoModel.from_config(config(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, head_dim=8,
        num_attention_heads=4, num_key_value_heads=2, sliding_window=16)).eval()

    class Ids:  # stands for a Prompt of given lengths
        shared, tokens, n_soft = list(range(9)), 0, 1

        def user(self, n):
            return [7] * n

        def item(self, n):
            return [8] * n + [-1, -1]

    users, items, owner = torch.randn(2, 6), torch.randn(3, 6), torch.tensor([0, 0, 1])
    soft_tokens = llm_negatives.SoftTokens(users, items, 32, llm_negatives.embedding_norm(llm))
    words = [2, 14], users, [1, 9, 3], items, owner  # padding of 12 slots within a window of 16
    ours, whole = (encode(llm, Ids(), soft_tokens, *words)
                   for encode in (llm_negatives.encode, llm_negatives.encode_whole))
    assert torch.allclose(ours, whole, rtol=1e-3, atol=1e-5)
    # without the check
    monkeypatch.setattr(llm_negatives, "attention_window", lambda llm: math.inf)
    ours = llm_negatives.encode(llm, Ids(), soft_tokens, *words)
    assert not torch.allclose(ours, whole, atol=1e-3)


def test_lora_says_what_it_is_on_and_refuses_what_is_not_there(capsys):
    llm = AutoModel.from_config(GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=4))
    with pytest.raises(SystemExit) as error:
        llm_negatives.add_lora(llm, ["c_attn", "q_proj"], 2, 4, 0.0)
    assert "q_proj" in error.value.message and "c_attn ×2, c_proj ×4" in error.value.message
    llm = llm_negatives.add_lora(llm, ["c_attn", "mlp.c_proj"], 2, 4, 0.0)
    out = capsys.readouterr().out
    assert "LoRA on 2 of 3 kinds of linear layer: c_attn ×2, mlp.c_proj ×2" in out
    assert sum("lora_A" in name for name, _ in llm.named_parameters()) == 4


def test_an_llm_that_is_not_whole_is_refused(tiny_llm, tmp_path):
    """Fewer layers than asked for, or weights that are not in the files: never random ones."""
    load = functools.partial(
        llm_negatives.load_llm, cls=AutoModel, dtype=torch.float32, device="cpu")
    with pytest.raises(SystemExit) as error:
        load(tiny_llm, layers=8)
    assert "--llm-layers 8" in error.value.message and "has 2 layers" in error.value.message
    shutil.copytree(tiny_llm, tmp_path / "cut")
    weights = load_file(tiny_llm / "model.safetensors")
    kept = {name: value for name, value in weights.items() if "layers.1." not in name}
    save_file(kept, tmp_path / "cut" / "model.safetensors", {"format": "pt"})
    with pytest.raises(SystemExit) as error:
        load(tmp_path / "cut")
    assert "lack 9 of its weights" in error.value.message
    assert len(load(tmp_path / "cut", layers=1).layers) == 1  # what is asked for is whole


def test_the_digest_tells_llms_apart(tiny_llm, tmp_path):
    """Any byte of the weights, the tokenizer or the chat template."""
    copy, digests = tmp_path / "copy", {llm_negatives.llm_digest(tiny_llm)}
    shutil.copytree(tiny_llm, copy)
    assert llm_negatives.llm_digest(copy) in digests
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        whole = (copy / name).read_bytes()
        (copy / name).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        digests.add(llm_negatives.llm_digest(copy))
    (copy / "chat_template.jinja").write_text("{{messages[0]['content']}}")
    digests.add(llm_negatives.llm_digest(copy))
    assert len(digests) == 5


def test_chat_frames(tiny_llm):
    """No template; no system role; thinking off where the template knows it, closed where not."""
    tokenizer = llm_negatives.load_tokenizer(tiny_llm)
    assert llm_negatives.chat_frame(tokenizer, "Be brief.") == ("Be brief.\n", "\n")
    turn = "{% for m in messages %}<{{m['role']}}>{{m['content']}}{% endfor %}"
    tokenizer.chat_template = turn + "{% if enable_thinking is false %}</think>{% endif %}"
    frame = ("<system>Be brief.<user>", "</think>")
    assert llm_negatives.chat_frame(tokenizer, "Be brief.") == frame
    tokenizer.chat_template = turn + "<think>"
    assert llm_negatives.chat_frame(tokenizer, "Be brief.")[1] == "<think>\n</think>\n\n"
    no_system = "{% if messages[0]['role'] == 'system' %}{{raise_exception('no')}}{% endif %}"
    tokenizer.chat_template = no_system + turn
    assert llm_negatives.chat_frame(tokenizer, "Be brief.") == ("<user>Be brief.\n", "")
    assert llm_negatives.answer("<think>Hm. So.</think>\nA film.") == "A film."
    assert llm_negatives.answer("<think>Hm. So") == ""


def test_number_format_is_the_processors_not_a_timing(monkeypatch):
    for flags, dtype in (("avx2 avx512f", torch.float32), ("avx2 amx_bf16", torch.bfloat16)):
        monkeypatch.setattr(Path, "read_text", lambda *args, flags=flags: f"flags\t: {flags}\n")
        monkeypatch.setattr(os.path, "exists", lambda path: True)
        assert llm_negatives.pick_dtype("auto", "cpu") == dtype


@pytest.mark.parametrize("text, ended", [
    ("A film for everyone. Then", True), ("With Mr. Holland", False), ("Rated 3.5 by", False),
    ('A "quiet film." It', True), ("A film for everyone.", False), ("In the U.S. too", False)])
def test_sentence_end(text, ended):
    assert bool(llm_negatives.SENTENCE_END.search(text)) == ended


def test_a_sentence_ends_its_row_alone(tiny_llm, monkeypatch):
    """Rows that end early leave the batch; the others go on as if alone."""
    model = llm_negatives.load_llm(tiny_llm, AutoModelForCausalLM, torch.float32, "cpu")
    tokenizer = llm_negatives.load_tokenizer(tiny_llm)
    texts = ("be brief ", "a", "bc", "d e", "f", "g")
    head, *requests = (tokenizer(text).input_ids for text in texts)
    past = llm_negatives.run_piece(model.base_model, [head])[2]
    whole = [model.generate(torch.tensor([head + request]), max_new_tokens=9, do_sample=False)[0]
             for request in requests]
    whole = [ids[len(head + request):].tolist() for ids, request in zip(whole, requests)]
    letter = tokenizer.decode(whole[0][3:4])  # a "sentence" ends where this one is written
    monkeypatch.setattr(llm_negatives, "SENTENCE_END", re.compile(re.escape(letter)))
    monkeypatch.setattr(llm_negatives, "first_sentence", str)
    texts, tokens = llm_negatives.write_texts(model, tokenizer, past, requests, 9)
    lengths = []
    for ids, text in zip(whole, texts):
        ends = [n + 1 for n in range(len(ids)) if letter in tokenizer.decode(ids[:n + 1])]
        lengths.append(min([*ends, len(ids)]))
        assert text == llm_negatives.answer(tokenizer.decode(ids[:lengths[-1]], True))
    assert min(lengths) < max(lengths)


def test_first_sentence():
    assert llm_negatives.first_sentence(" One.\nTwo! And a half") == "One. Two!"
    assert llm_negatives.first_sentence("no end") == "no end"


# --------------------------------------------------------------------------------------------------
# The README: its first snippet, and each piece of "Copy this piece" pasted into an empty file
# --------------------------------------------------------------------------------------------------


def readme(begin, end):
    text = (HERE / "README.md").read_text(encoding="utf-8")
    return text.split(begin, 1)[1].split(end, 1)[0]


def code_block(text, kind=""):
    return text.split(f"```{kind}\n", 1)[1].split("```", 1)[0]


def test_the_first_snippet_prints_what_the_readme_says(capsys):
    section = readme("## Thirty seconds", "\n## ")
    exec(code_block(section, "python"), {})
    assert capsys.readouterr().out == code_block(section.split("```python")[1].split("```", 1)[1])


def copy_table():
    """Rows of the table: {first piece: (module, pieces, names to take along)}. A word in bold names
    the file of the rows below it; "row of `x`" takes along all that x's row names."""
    rows, module = {}, None
    for line in readme("## Copy this piece", "\n## ").splitlines():
        if line.startswith("| **"):
            module = PROGRAMS[line.split("**")[1]]
        elif line.startswith("| `"):
            first, second = line.split("|")[1:3]
            pieces, along = first.split("`")[1::2], []
            for word in second.strip(" –").split(", "):
                name = word.strip("`")
                if word.startswith("row of `"):  # which stands above, so that it is known by now
                    along += sum(rows[word.split("`")[1]][1:], [])
                elif name:
                    along.append(name)
            rows[pieces[0]] = (module, pieces, along)
    return rows


@functools.cache
def sources(module):
    """{name: source} of the functions, classes and constants at the top of a file."""
    text, found = Path(module.__file__).read_text(encoding="utf-8"), {}
    lines = text.splitlines()
    for node in ast.parse(text).body:
        names = [node.name] if hasattr(node, "name") else []
        targets = getattr(node, "targets", [])
        names += [target.id for target in targets if isinstance(target, ast.Name)]
        found |= dict.fromkeys(names, "\n".join(lines[node.lineno - 1:node.end_lineno]))
    return found


def global_names(code):
    """Names that compiled code, or any code within it, looks up outside itself."""
    found = set()
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            found.add(instruction.argval)
    return found.union(*(global_names(c) for c in code.co_consts if hasattr(c, "co_code")))


def toy_fit(p, encoder):
    layer = torch.nn.Linear(2, 1)

    def step(rows, generator):
        return layer(torch.ones(len(rows), 2)).pow(2).mean(), {"loss": 0.0}

    state, history = p["fit"]({"m": layer}, step, 4, lambda: 1.0, epochs=2, batch_size=2, lr=0.1,
                              eval_every=1, patience=1, seed=0)
    assert set(state) == {"m.weight", "m.bias"} and len(history) == 2


def toy_encode(p, encoder):
    llm, prompt, soft_tokens, users, items = encoder
    ours = p["encode"](llm, prompt, soft_tokens, USER_TEXTS, users, ITEM_TEXTS, items, OWNER)
    assert torch.allclose(ours, encode_all(encoder), atol=1e-6)


def toy_backbones(p, encoder):
    adjacency = p["normalized_adjacency"](random_pairs(), N_USERS, N_ITEMS)
    for name in ("LightGCN", "NGCF", "MF", "NeuMF"):
        graph = [adjacency] if name in ("LightGCN", "NGCF") else []
        users, items = (model := p[name](N_USERS, N_ITEMS, 4, *graph).eval())()
        scores = model.score_all(users, items)  # (U, I)
        assert torch.allclose(scores[2], model.score(users[2], items), atol=1e-5)
        model.score(users[:3], items[:3]).sum().backward()


def toy_text_vectors(p, encoder):
    text, train = torch.randn(7, 4), torch.tensor([[0, 1], [0, 6], [1, 3]])
    made = p["TextVectors"](text, train, 2, 3)
    assert made().shape == (9, 3)
    assert torch.allclose(made()[1], made()[2 + 3])  # user 1 has item 3 alone


def toy_samplers(p, encoder):
    model, candidates = rigged(torch.randn(3, 4), torch.randn(6, 4)), torch.arange(6).view(3, 2)
    (users, items), positives = model(), candidates[:, 0]
    best = model.score(users[:, None], items[candidates]).argmax(1, keepdim=True)
    negatives = p["dns"](model.score, users, items, candidates)
    assert torch.equal(negatives, candidates.gather(1, best)[:, 0])
    assert p["ahns"](model.score, users, items, positives, candidates).shape == (3,)
    assert p["mixgcf"](users, items[:, None], positives, candidates, model.pool).shape == (3, 4)


def toy_ranking(p, encoder):
    model = rigged(torch.ones(2, 1), torch.arange(5.0)[:, None])
    seen = torch.tensor([[0, 4], [1, 0]])
    ranked = p["rank_unseen"](model, torch.arange(2), p["user_rows"](seen, 2), 2)
    assert ranked.tolist() == [[3, 2], [4, 3]]


def toy_stage_two(p, encoder):
    z = p["Projector"](torch.randn(20, 8), 4)(torch.randn(6, 3, 8))
    loss = p["alignment_loss"](z, torch.randn(6, 4), torch.randn(6, 4), torch.arange(6) // 2, 0.2)
    mixed = p["mix"](z, torch.randn(6, 4), 0.5)
    (loss + p["semantic_alignment"](mixed, torch.randn(6, 4), 0.2)).backward()


def toy_sampler(p, encoder):
    drawn = p["UnseenSampler"](random_pairs(), N_USERS, N_ITEMS)(torch.arange(N_USERS), 50)
    keys = backbones.pair_keys(random_pairs(), N_ITEMS)
    assert not backbones.contains(keys, torch.arange(N_USERS)[:, None], drawn, N_ITEMS).any()


def toy_band(p, encoder):
    model = rigged(torch.ones(2, 1), torch.arange(5.0)[:, None])
    band = p["mine_hard_negatives"](model, torch.tensor([[0, 4], [1, 0]]), 2, 3)
    assert band.tolist() == [[2, 1], [3, 2]]


def toy_closed_forms(p, encoder):
    pairs = random_pairs()
    for name in ("item_knn", "rp3beta", "ease"):
        weight = p[name](pairs, N_USERS, N_ITEMS)
        users, items = (model := p["ItemWeights"](weight, pairs, N_USERS))()
        rows = torch.zeros(N_USERS, N_ITEMS).index_put(tuple(pairs.T), torch.ones(()))  # X
        assert torch.allclose(model.score_all(users, items), rows @ weight.to_dense(), atol=1e-5)


def toy_losses(p, encoder):
    assert p["bpr_loss"](torch.zeros(2), torch.zeros(2)).item() == pytest.approx(math.log(2))
    assert p["l2_loss"](torch.ones(2, 3)).item() == 1.5


def toy_metrics(p, encoder):
    hits, relevant = torch.tensor([[True, False]]), torch.tensor([1])
    names = ("ndcg", "recall", "precision", "hit_rate", "mrr")
    assert [p[name](hits, relevant, 2).item() for name in names] == [1, 1, 0.5, 1, 1]


def toy_info_nce(p, encoder):
    positive = torch.tensor([[True, False, False]])
    loss = p["info_nce"](torch.ones(1, 2), torch.ones(3, 2), positive, 0.1)
    assert loss.item() == pytest.approx(math.log(3))


def toy_batches(p, encoder):
    rows, lengths = torch.arange(20), torch.arange(96)
    batches = p["grouped_batches"](random_pairs()[:, 0], rows, 2, 3, torch.Generator(), lengths)
    assert torch.cat(batches).sort().values.tolist() == rows.tolist()


def toy_text_start(p, encoder):
    start = p["text_start"](torch.randn(N_ITEMS, 9), random_pairs(), N_USERS, 4, 0.1)
    assert start.shape == (N_USERS + N_ITEMS, 4)


def toy_relevance(p, encoder):
    users, items = p["text_factors"](torch.randn(N_ITEMS, 9), random_pairs(), N_USERS)
    fit, everything = users @ items.T, torch.arange(N_ITEMS).expand(N_USERS, -1)
    oracle = (fit - fit.mean(1, keepdim=True)) / fit.std(1, keepdim=True)
    ours = p["Relevance"](users, items)(torch.arange(N_USERS), everything)
    assert torch.allclose(ours, oracle, atol=1e-4)


def toy_judge(p, encoder):
    train = torch.tensor([(u, 10 * (u % 2) + (u + n) % 10) for u in range(20) for n in range(6)])
    taste, other = (torch.arange(20) < 10).float(), torch.arange(20) % 2.0  # other: 3 of each 6
    judge = p["Judge"]([taste[:, None], other[:, None]], train, 20)
    loss, _ = p["make_judge_step"](judge, train, 16)(torch.arange(20), None)
    loss.backward()
    assert judge.item_map.weight.grad.abs().sum() > 0
    items, share = p["likely_items"](judge(), 4)
    assert torch.equal(items // 10, (torch.arange(20) % 2)[:, None].expand(-1, 4))
    assert torch.allclose(share.sum(1), torch.ones(20))


def toy_likely(p, encoder):
    share = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    likely = p["LikelyFalse"](torch.tensor([[4, 2], [3, 1]]), share)
    assert likely(torch.tensor([0, 1, 0])).tolist() == [2, 3, 2]


def toy_blend(p, encoder):
    own, judge = [torch.randn(5, 3), torch.randn(7, 3)], [torch.randn(5, 4), torch.randn(7, 4)]
    users, items = p["blend_vectors"]([own, judge], [1.0, 2.0])
    z = []
    for u, i in (own, judge):
        score = u @ i.T
        z.append((score - score.mean(1, keepdim=True)) / score.std(1, keepdim=True))
    assert torch.allclose(users @ items.T, z[0] + 2 * z[1], atol=1e-4)


def toy_hnlmrec(p, encoder):
    """One step with all terms; its BPR and L_false are those of the scores."""
    train = torch.tensor([(u, (u + n) % 8) for u in range(6) for n in range(3)])
    backbone, hidden = backbones.MF(6, 8, 4), torch.randn(len(train), 5)
    text, negative = torch.randn(8, 9), torch.tensor([7, 6, 5, 4, 3, 2] * 3)
    table = p["NegativeTable"](train, train, 6, 8)
    settings = Namespace(alpha=0.02, lambda1=1, lambda_s=0.01, lambda_f=1, gamma=0.2, reg=0,
                         tau_c=0.2, align_rows=8, k=2, refresh=1)

    def draw(u, i, generator):
        users, items = backbone()
        return backbones.Sample(users, items, users[u], items[i], items[negative], negative)

    def likely(users, generator):
        return (users + 4) % 8

    method = p["HNLMRec"](
        backbone, p["Projector"](hidden, 4), p["SemanticProjector"](text, train, 6, 4), draw,
        table, hidden, torch.arange(12).view(6, 2) % 8, train, settings, likely)
    loss, logs = method.loss(torch.arange(18), None)
    loss.backward()
    assert set(logs) == {"bpr", "false", "align", "semantic"}
    (u, i), (users, items) = train.T, backbone()
    e_j = items[negative]
    z = method.z / method.z.norm(dim=1, keepdim=True) * e_j.norm(dim=1, keepdim=True)
    e = 0.02 * z + 0.98 * e_j
    below = (users[u] * e).sum(1)
    bpr = F.softplus(below - (users[u] * items[i]).sum(1)).mean()
    false = F.softplus(below - (users[u] * items[(u + 4) % 8]).sum(1)).mean()
    assert logs["bpr"] == pytest.approx(bpr.item(), abs=1e-5)
    assert logs["false"] == pytest.approx(false.item(), abs=1e-5)


def toy_core(p, encoder):
    kept = p["k_core"](np.array([0, 0, 1, 1, 2]), np.array([0, 1, 0, 1, 0]), 2)
    assert kept.tolist() == [True, True, True, True, False]
    parts = p["split_pairs"](np.repeat([0, 1], 3), np.arange(6), np.arange(6.0), "last", 0)
    assert parts.tolist() == [0, 1, 2, 0, 1, 2]


def toy_bootstrap(p, encoder):
    assert p["paired_bootstrap"](np.ones(5), draws=20)[:3] == (1, 1, 1)


TOYS = {
    "UnseenSampler": toy_sampler, "dns": toy_samplers, "TextVectors": toy_text_vectors,
    "LightGCN": toy_backbones,
    "item_knn": toy_closed_forms, "bpr_loss": toy_losses, "rank_unseen": toy_ranking,
    "mine_hard_negatives": toy_band,
    "ndcg": toy_metrics, "fit": toy_fit, "run_piece": toy_encode,
    "info_nce": toy_info_nce, "grouped_batches": toy_batches, "Projector": toy_stage_two,
    "text_start": toy_text_start, "text_factors": toy_relevance, "HNLMRec": toy_hnlmrec,
    "Judge": toy_judge, "LikelyFalse": toy_likely, "blend_vectors": toy_blend, "k_core": toy_core,
    "paired_bootstrap": toy_bootstrap,
}


def pasted_code(row):
    module, pieces, along = row
    known = sources(backbones) | sources(module)
    return compile("\n\n".join(known[name] for name in [*along, *pieces]), "pasted", "exec")


@pytest.mark.parametrize("piece", list(TOYS))
def test_a_pasted_piece_runs_with_what_its_row_takes_along(piece, encoder):
    row = next(row for row in copy_table().values() if piece in row[1])
    (_, pieces, along), plain, code = row, {}, pasted_code(row)
    exec(code_block(readme("## Copy this piece", "\n| "), "python"), plain)
    # what the pasted code looks up, on paths that the toys do not take either
    taken = global_names(code) - set(plain) - set(dir(builtins)) - {"__name__"}
    assert taken <= {*along, *pieces}
    # these make what the caller hands in; everything else in the row is needed by the code
    made = {"normalized_adjacency", "user_rows", "NegativeTable", "Projector", "SemanticProjector"}
    assert set(along) - taken <= made
    exec(code, plain)
    TOYS[piece](plain, encoder)


def test_every_piece_of_the_copy_table_is_run():
    """By a toy that names it, or from another piece of its row."""
    named = "".join(map(inspect.getsource, TOYS.values()))
    for row in copy_table().values():
        inner = global_names(pasted_code(row))
        for piece in row[1]:
            assert f'"{piece}"' in named or piece in inner


# --------------------------------------------------------------------------------------------------
# The real programs, from a ratings file to the report
# --------------------------------------------------------------------------------------------------


PROGRAMS = {"hnlmrec.py": hnlmrec, "backbones.py": backbones, "llm_negatives.py": llm_negatives,
            "eval.py": evaluation}


def process(*words):
    """Run Python with these words, as a user does -> what it prints. It must end with status 0."""
    done = subprocess.run(
        [sys.executable, *map(str, words)], capture_output=True, text=True, check=False, cwd=HERE,
        env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def cli(script, *args):
    """Run a program's main() here, without the seconds that a new process needs -> what it
    prints."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        PROGRAMS[script].main([str(arg) for arg in args])
    return out.getvalue()


def refused(script, *args):
    """Run a program's main() here; it must end with status 2 -> its one line."""
    with pytest.raises(SystemExit) as error:
        PROGRAMS[script].main([str(arg) for arg in args])
    assert error.value.code == 2 and "\n" not in error.value.message
    return error.value.message


@pytest.fixture(scope="session")
def raw(tmp_path_factory):
    """A ratings file and an items file: two groups of users, each with its own half of the
    items."""
    folder, rng = tmp_path_factory.mktemp("raw data"), np.random.default_rng(0)
    lines = ["user\titem\trating\ttimestamp"]
    for u in range(30):
        for n, i in enumerate(rng.permutation(20)[:12] + 20 * (u % 2)):
            lines.append(f"u{u}\ti{i}\t{4 + n % 2}\t{n}")
        lines.append(f"u{u}\ti{(u * 7) % 40}\t1\t99")  # a low rating of an item, to be left out
    (folder / "interactions.tsv").write_text("\n".join(lines) + "\n")
    items = [f"i{i}\tFilm {i}\tgroup {i // 20}" for i in range(40)]
    write_lines(folder / "items.tsv", ["item\ttitle\tkeywords", *items])
    return folder


BUDGET = ["--dim", 8, "--epochs", 4, "--eval-every", 2]
BAND = ["--mine-first", 1, "--mine-last", 5]
SHARDS = ["--pairs-per-user", 3, "--shard-pairs", 40]


def steps_of(llm, raw):
    """The flags with which `finished` is made."""
    return {"prepare": ["--reviews", raw / "interactions.tsv", "--meta", raw / "items.tsv"],
            "pretrain": [*BUDGET, "--sampler", "dns"],
            "profile": ["--llm", llm, "--new-tokens", 4, "--history", 2, "--llm-rows", 10],
            "finetune": ["--llm", llm, "--llm-layers", 0, *BAND, "--warmup-pairs", 64, "--steps", 3,
                         "--dtype", "fp32"],
            "generate": ["--llm", llm, *SHARDS],
            "train": [*BUDGET, *BAND, "--alpha", 0.3]}


@pytest.fixture(scope="session")
def finished(raw, tiny_llm, tmp_path_factory):
    """A run folder in which every step has been run."""
    run = tmp_path_factory.mktemp("my runs") / "one"
    flags, here = steps_of(tiny_llm, raw), ["--run", run]
    cli("hnlmrec.py", "prepare", *here, *flags["prepare"])
    cli("backbones.py", "pretrain", *here, *flags["pretrain"])
    cli("llm_negatives.py", "profile", *here, *flags["profile"])
    cli("llm_negatives.py", "finetune", *here, *flags["finetune"])
    cli("llm_negatives.py", "generate", *here, *flags["generate"])
    cli("hnlmrec.py", "train", *here, *flags["train"])
    cli("backbones.py", "pretrain", *here, *BUDGET, "--out", "model-rns.safetensors")
    cli("eval.py", "report", *here)
    return run


def test_pipeline_makes_every_file(finished):
    metrics = json.loads((finished / "metrics.json").read_text())
    assert set(metrics["methods"]) == {"hnlmrec", "rns"}
    assert all(0 <= row["NDCG@20"] <= 1 for row in metrics["methods"].values())
    report = (finished / "report.md").read_text()
    assert "HNLMRec, generated" in report
    # the opening: the verdict in figures that follow from the table, an example user, a picture
    rows, test = metrics["methods"], metrics["tests"]["hnlmrec"]
    assert test["against"] == "rns"
    assert test["mean"] == pytest.approx(rows["hnlmrec"]["NDCG@20"] - rows["rns"]["NDCG@20"])
    word = "beats" if test["low"] > 0 else "falls behind" if test["high"] < 0 else "is level with"
    opening = report.split("## All models")[0]
    assert f"HNLMRec {word} RNS" in opening and f"{test['mean']:+.4f} (" in opening
    assert len(opening.split("- recommended: ")[1].split("\n")[0].split("; ")) == 5
    assert len(opening.split("- negatives from the LLM: ")[1].split("\n")[0].split("; ")) == 5
    picture = xml.etree.ElementTree.parse(finished / "report.svg")
    assert len(picture.findall(".//{*}circle")) == 1
    assert len(list(finished.glob("negatives-0*.safetensors"))) == 3
    tensors, _ = backbones.load_tensors(finished / "negatives-00000.safetensors", "generate")
    assert tensors["hidden"].dtype == torch.float16
    assert tensors["hidden"].shape == (len(tensors["pairs"]), 32)
    data = backbones.load_data(finished)
    assert set(map(tuple, tensors["pairs"].tolist())) <= set(map(tuple, data["train"].tolist()))
    recommend = ["recommend", "--run", finished, "--user", "u3", "--k", 3]
    assert "recommended:" in cli("eval.py", *recommend)


def test_trace_follows_a_pair(finished):
    data = backbones.load_data(finished)
    items = [json.loads(line) for line in (finished / "items.jsonl").read_text().splitlines()]
    users = [json.loads(line) for line in (finished / "users.jsonl").read_text().splitlines()]
    shard, _ = backbones.load_tensors(finished / "negatives-00000.safetensors", "generate")
    u, i = shard["pairs"][5].tolist()
    trace = ["trace", "--run", finished, "--user", users[u]["raw"]]
    out = cli("hnlmrec.py", *trace, "--item", items[i]["raw"])
    cf, _ = backbones.load_tensors(finished / "cf.safetensors", "pretrain")
    assert f"e_u·e_i {cf['user'][u] @ cf['item'][i]:.3f}" in out
    assert f"norm {shard['hidden'][5].float().norm():.3f}" in out
    model, _, _ = backbones.load_model(finished / "cf.safetensors", "pretrain", data)
    first = int(backbones.mine_hard_negatives(model, data["train"], 1, 5)[u, 0])
    assert items[first]["title"] in out.split("4. mined")[1]
    prompt = out.split("5. prompt")[1].split("6. generated")[0]
    assert llm_negatives.INSTRUCTION in prompt and f"Item: {items[i]['title']}." in prompt
    assert prompt.strip().endswith("User vector:[e_u]")
    assert "projector 0.0000" not in out and "backbone 0.0000" not in out
    held = data["test"][data["test"][:, 0] == u][0, 1]
    # without --item, a pair of the user that has a generated vector of its own
    _, _, row = hnlmrec.find_pair(argparse.Namespace(run=finished, user=users[u]["raw"], item=None),
                                  data, users, items, torch.tensor([[u + 1, i], [u, i]]))
    assert data["train"][row].tolist() == [u, i]
    assert "no model of" in refused("hnlmrec.py", *trace, "--model", "model-rns.safetensors")
    assert "no train pair" in refused("hnlmrec.py", *trace, "--item", items[held]["raw"])


def test_clear_reaches_the_step_and_its_control_shuffles_the_texts(finished, monkeypatch):
    """build hands dns the relevance of the LLM's texts, times --clear; with `--control cleared`
    that of the same rows in another order."""
    data, seen, penalties = backbones.load_data(finished), [], []
    settings = backbones.read_meta(finished / "model-hnlmrec.safetensors")["settings"]
    made = backbones.load_negatives(finished, settings["negatives"], data["digest"])

    def build(**flags):
        return hnlmrec.build(finished, Namespace(**settings | flags), data, made)

    factors, make = hnlmrec.text_factors, hnlmrec.make_sampler

    def watched_factors(text, *rest):
        seen.append(text)
        return factors(text, *rest)

    def watched_sampler(*words, penalty, **more):
        penalties.append(penalty)
        return make(*words, penalty=penalty, **more)

    monkeypatch.setattr(hnlmrec, "text_factors", watched_factors)
    monkeypatch.setattr(hnlmrec, "make_sampler", watched_sampler)
    for control in ("none", "cleared"):
        method = build(clear=2.0, control=control)
    u, candidates = torch.tensor([0, 2]), torch.tensor([[1, 3, 0], [2, 2, 4]])
    alone = hnlmrec.Relevance(*factors(seen[0], data["train"], data["n_users"]))
    assert torch.allclose(penalties[0](u, candidates), 2 * alone(u, candidates))
    assert torch.equal(seen[0], method.semantic.item) and not torch.equal(seen[1], seen[0])
    assert torch.equal(seen[1].sort(0).values, seen[0].sort(0).values)
    build(clear=0.0)
    assert len(seen) == 2 and penalties[2] is None


def test_the_controls_replace_what_the_llm_made(finished):
    """`shuffled` moves whole vectors to other pairs and items; `random` keeps nothing but the
    shapes; `none` changes nothing."""
    data = backbones.load_data(finished)
    made = backbones.load_negatives(finished, "negatives", data["digest"])
    assert all(hnlmrec.controlled(made, "none", 0)[name] is made[name] for name in made)
    shuffled, random = (hnlmrec.controlled(made, control, 0) for control in ("shuffled", "random"))
    for name in ("hidden", "vector", "text"):
        assert not torch.equal(shuffled[name], made[name])
        assert random[name].shape == made[name].shape
        assert torch.equal(shuffled[name].sort(0).values, made[name].sort(0).values)
        assert not torch.equal(random[name].sort(0).values, made[name].sort(0).values)
    assert torch.equal(shuffled["pairs"], made["pairs"])


def test_paper_is_a_preset_that_trains_and_flags_beside_it_win(copied, monkeypatch, capsys):
    seen = []
    with monkeypatch.context() as patch:
        patch.setattr(hnlmrec, "train_hnlmrec", seen.append)
        for flags in ((), ("--paper",), ("--paper", "--alpha", "0.01", "--dim", "64")):
            hnlmrec.main(["train", "--run", "x", *flags])
    plain, paper, mixed = map(vars, seen)
    assert {name: paper[name] for name in hnlmrec.PAPER} == hnlmrec.PAPER
    assert {name for name in plain if plain[name] != paper[name]} <= {*hnlmrec.PAPER, "paper"}
    assert mixed == paper | {"alpha": 0.01, "dim": 64}
    words = evaluation.OURS["HNLMRec, as in the paper"].split()
    with monkeypatch.context() as patch:  # the row of the comparison holds the preset's values
        patch.setattr(hnlmrec, "train_hnlmrec", seen.append)
        tuned = ["--lr", "5", "--lambda-s", "9", "--clear", "1"]
        hnlmrec.main(["train", "--run", "x", *tuned, *words])
    assert vars(seen[-1]) == paper

    out = ["--out", "model-paper.safetensors"]
    budget = "--dim 8 --epochs 2 --eval-every 1 --mine-first 1 --mine-last 5".split()
    hnlmrec.main(["train", "--run", str(copied), "--paper", "--hinge", "0.3", *budget, *out])
    tensors, meta = backbones.load_tensors(copied / "model-paper.safetensors", "train")
    usual, _ = backbones.load_tensors(copied / "model-hnlmrec.safetensors", "train")
    assert set(tensors) == set(usual) and {"hinge", "contrast"} <= set(meta["history"][0])
    users = [json.loads(line) for line in (copied / "users.jsonl").read_text().splitlines()]
    pair = ["--user", users[0]["raw"], "--model", "model-paper.safetensors"]
    hnlmrec.main(["trace", "--run", str(copied), *pair])
    out = capsys.readouterr().out
    assert "contrast" in out and "projector 0.0000" not in out


def test_the_papers_llm_settings_and_flags_beside_them_win(monkeypatch):
    seen = []
    monkeypatch.setattr(llm_negatives, "finetune", seen.append)
    for flags in ((), ("--paper",), ("--paper", "--lora-rank", "4")):
        llm_negatives.main(["finetune", "--run", "x", *flags])
    plain, paper, mixed = map(vars, seen)
    assert {name: paper[name] for name in llm_negatives.PAPER} == llm_negatives.PAPER
    assert {name for name in plain if plain[name] != paper[name]} <= {*llm_negatives.PAPER, "paper"}
    assert mixed == paper | {"lora_rank": 4}


def test_judges_of_a_run(copied, capsys):
    """All kinds of judges are found; one that holds the labels knows nearly all, on validation the
    validation pairs', in the report the test pairs' too; files that do not fit are refused."""
    data = backbones.load_data(copied)
    text, meta = backbones.load_tensors(copied / "negatives-items.safetensors", "generate")
    words = {"settings": meta["settings"] | {"read_items": False}}
    stamped = {"settings": {"inputs": backbones.stamp(copied, "data.safetensors")}}
    backbones.save_tensors(copied / "negatives-words-items.safetensors",
                           {"text": torch.randn_like(text["text"].float()).half()}, words)
    for name in ("valid", "test"):
        table = torch.zeros(data["n_users"], data["n_items"])
        table[data[name][:, 0], data[name][:, 1]] = 1
        factors = {"user": table, "item": torch.eye(data["n_items"])}
        backbones.save_tensors(copied / f"judge-{name}.safetensors", factors, stamped)
    evaluation.main(["judge", "--run", str(copied)])
    out, result = capsys.readouterr().out, json.loads((copied / "judge.json").read_text())
    rows, positives = result["rows"], result["positives"]
    assert set(rows) == {
        "CF alone", "texts (negatives)", "bag of words (negatives-words)", "shuffled texts 0",
        "shuffled texts 1", "shuffled texts 2", "generated vectors (negatives)", "judge-valid",
        "judge-test"}
    assert all(name in out for name in rows) and positives == len(data["valid"])  # top 50 of 40
    share = positives / result["pairs"]
    entropy = -1000 * (math.log(share) + (1 / share - 1) * math.log(1 - share))  # a thousand's
    known = rows["judge-valid"]
    assert known["AUC"] == 1 and known["over CF"]["per 1000 positives"][0] > 0.7 * entropy
    assert known["over CF and bag of words"]["nats"][1] > 0
    assert "over CF and bag of words" not in rows["bag of words (negatives-words)"]
    assert rows["judge-test"]["AUC"] < 0.9

    evaluation.main(["report", "--run", str(copied)])
    judged = json.loads((copied / "metrics.json").read_text())["judges"]
    assert judged["valid"]["rows"] == rows and judged["test"]["rows"]["judge-test"]["AUC"] == 1
    assert "judge-test" in (copied / "report.md").read_text()
    square, huge = torch.eye(data["n_items"]), torch.full((data["n_items"], data["n_items"]), 3e38)
    other = {"settings": {"inputs": {"data.safetensors": "0" * 16}}}
    for factors, meta, message in (
            ({"user": table}, stamped, "needs tensors"),
            ({"user": table, "item": table.clone()}, stamped, "needs tensors"),
            ({"history": square, "item": square.clone()}, stamped, "needs tensors"),
            ({"user": 9 + table, "item": huge}, stamped, "not finite"),
            ({"user": table, "item": square}, {"settings": {}}, "which split"),
            ({"user": table, "item": square}, other, "another data.safetensors")):
        backbones.save_tensors(copied / "judge-valid.safetensors", factors, meta)
        assert message in refused("eval.py", "judge", "--run", copied)


def in_process(script, *words):
    """evaluation.program without the seconds that a new process needs."""
    print("$ ", script, *words)
    cli(script, *words)


def test_compare_and_sweep(copied, tiny_llm, monkeypatch):
    """A second call keeps the cells; the tables hold every method; the pictures are XML."""
    band, short = "--mine-first 1 --mine-last 5", "--dim 8 --epochs 2 --eval-every 1"
    monkeypatch.setattr(evaluation, "program", in_process)
    monkeypatch.setattr(evaluation, "BASELINES", {"DNS": "--sampler dns"})
    ours = {"HNLMRec": f"{band} --clear 0.3 --control cleared"}
    monkeypatch.setattr(evaluation, "OURS", ours)
    flags = ["--run", copied, "--llm", tiny_llm, "--seeds", 2, "--flags", short]

    def run(command, *words):
        return cli("eval.py", command, *flags, *words)

    first = run("compare")
    assert first.count("$ ") == 4 and "| HNLMRec |" in first and "2 seeds of training" in first
    cell = json.loads((copied / "compare.json").read_text())["cells"]["DNS | lightgcn"]
    path, = (copied / "compare").glob("dns-lightgcn-seed1-*.safetensors")
    data = backbones.load_data(copied)
    model, _, _ = backbones.load_model(path, data=data)
    _, values, _ = evaluation.evaluate(model, data)
    assert cell["NDCG@20"][1] == pytest.approx(float(values["NDCG@20"].mean()))
    assert "$ " not in run("compare")
    # DNS alone is made again, with flags of its own
    assert run("compare", "--methods", "DNS --m 2;HNLMRec", "--out", "other").count("$ ") == 2
    by_itself = "set for each cell by itself"
    for more in (["--flags", "--dim 8 --seed 5"], ["--flags", "--sampler rns"],
                 ["--hnlmrec-flags", "--backbone mf"], ["--methods", "DNS --out=x"]):
        assert by_itself in refused("eval.py", "compare", "--run", copied, *more)
    twice = ["--flag", "m", "--values", 2, "--flags", "--m 3"]
    assert by_itself in refused("eval.py", "sweep", "--run", copied, *twice)
    twice = ["--methods", "DNS;DNS --m 2"]
    assert "DNS is there twice" in refused("eval.py", "compare", *flags, *twice)
    out = run("sweep", "--flag", "alpha", "--values", "0,0.5", "--flags",
              f"{short} --sampler rns {band}")
    assert out.count("$  hnlmrec.py train") == 4
    out = run("sweep", "--flag", "m", "--values", "2", "--method", "--sampler dns")
    assert out.count("$  backbones.py pretrain") == 2
    assert (copied / "sweep-alpha.md").exists()
    for picture in ("compare-lightgcn.svg", "sweep-alpha.svg"):
        assert len(xml.etree.ElementTree.parse(copied / picture).findall(".//{*}circle")) == 2


def test_a_chart_shows_its_numbers_where_they_are():
    """The dots and interval ends, read back through the tick marks, are the values given."""
    means, lows, highs = [0.061, -0.02, 0.3], [0.05, -0.04, 0.29], [0.07, 0.01, 0.302]
    labels = ["a <b> & \x07\x00\ud800 c", "Ünï 映画", ""]
    text = evaluation.svg_chart("t & <u>\x1b", labels, means, lows, highs, reference=0.0)
    root = xml.etree.ElementTree.fromstring(text.encode())

    def find(kind, name):
        return [e for e in root.findall(f".//{{*}}{kind}") if e.get("class") == name]

    ticks = [(float(e.get("x")), float(e.text)) for e in find("text", "tick")]
    (x0, v0), (x1, v1) = ticks[0], ticks[-1]

    def value(x):
        return v0 + (float(x) - x0) * (v1 - v0) / (x1 - x0)

    near = functools.partial(pytest.approx, abs=(v1 - v0) / 1000)
    assert v0 <= -0.04 and v1 >= 0.302
    assert [value(x) for x, _ in ticks] == near([v for _, v in ticks])
    assert [value(e.get("cx")) for e in root.findall(".//{*}circle")] == near(means)
    assert [value(e.get("x1")) for e in find("line", "interval")] == near(lows)
    assert [value(e.get("x2")) for e in find("line", "interval")] == near(highs)
    words = [e.text for e in root.findall(".//{*}text")]
    shown = {"a <b> & \\u0007\\u0000? c", "Ünï 映画", "0.0610 [0.0500, 0.0700]"}
    assert shown <= set(words)
    evaluation.svg_chart("all alike", ["a"], [0.5], [0.5], [0.5])  # no division by zero


def test_closed_forms_and_softmax_by_command(copied, capsys):
    """Each is saved, loaded, reported and recommended from as any model."""
    data, pretrain = backbones.load_data(copied), ["pretrain", "--run", str(copied)]
    train, shape = data["train"], (data["n_users"], data["n_items"])
    assert "m is 4; lower --n" in refused("backbones.py", *pretrain, "--n", "20", "--force")
    direct = {"itemknn": backbones.item_knn(train, *shape, 5.0, 3),
              "rp3": backbones.rp3beta(train, *shape, 0.5, 0.2, 3),
              "ease": backbones.ease(train, *shape, 9.0)}
    flags = "--shrink 5 --topk 3 --rp3-alpha 0.5 --rp3-beta 0.2 --ridge 9".split()
    for name in ("pop", *direct):
        words = [*pretrain, "--backbone", name, *flags, "--out", f"model-{name}.safetensors"]
        backbones.main(words)
        model, meta, _ = backbones.load_model(copied / f"model-{name}.safetensors", "", data)
        if name in direct:
            assert torch.equal(model.weight.to_dense(), direct[name].to_dense())
        assert evaluation.best_epoch(meta)["valid_ndcg@20"] == backbones.validation(model, data)()
        backbones.main([*words, "--lr", "1", "--seed", "8"])  # which it does not read
        assert "skip:" in capsys.readouterr().out
        assert "no vectors" in refused("backbones.py", *pretrain, "--backbone", name)
    large = [*pretrain, "--backbone", "ease", "--max-gib", "1e-6", "--out", "new.safetensors"]
    assert "40 x 40 weights" in refused("backbones.py", *large)

    soft = "--loss softmax --cosine --dim 8 --epochs 1 --out model-softmax.safetensors"
    backbones.main([*pretrain, *soft.split()])
    model, _, tensors = backbones.load_model(copied / "model-softmax.safetensors", "", data)
    assert all(torch.equal(ours, tensors[name]) for ours, name in zip(model(), ("user", "item")))
    assert torch.allclose(tensors["item"].norm(dim=1), torch.ones(len(tensors["item"])))
    assert "--cosine: needs" in refused("backbones.py", *pretrain, "--cosine")
    # AlphaRec's row, its texts named by a file of the run
    words = evaluation.BASELINES["AlphaRec"].replace("judge", "negatives-items").split()
    words += "--dim 8 --epochs 2 --out model-alpharec.safetensors".split()
    backbones.main([*pretrain, *words])
    model, meta, tensors = backbones.load_model(copied / "model-alpharec.safetensors", "", data)
    assert all(torch.allclose(a, tensors[name]) for a, name in zip(model(), ("user", "item")))
    valid = backbones.validation(model, data)()
    assert evaluation.best_epoch(meta)["valid_ndcg@20"] == pytest.approx(valid)
    assert "no such file" in refused("backbones.py", *pretrain, "--text-vectors", "none")
    assert "not neumf" in refused(
        "backbones.py", *pretrain, "--text-vectors", "none", "--backbone", "neumf")

    evaluation.main(["report", "--run", str(copied)])
    report = (copied / "report.md").read_text()
    for name in ("Popularity", "ItemKNN", "RP3β", "EASE", "Softmax", "AlphaRec", "RNS"):
        assert f"| {name} |" in report
    recommend = ["recommend", "--run", str(copied), "--user", "u3"]
    evaluation.main([*recommend, "--model", "model-ease.safetensors"])
    assert "recommended:" in capsys.readouterr().out
    for path in (*copied.glob("model-*"), *copied.glob("negatives*")):
        if path.stem != "model-rp3":
            path.unlink()
    evaluation.main(["report", "--run", str(copied)])  # closed forms alone: no sampler to look at
    assert "False hard negatives" not in (copied / "report.md").read_text()


def test_tune_picks_the_best_and_goes_on_where_it_was_killed(tmp_path, monkeypatch):
    """With a score of the learning rate in place of training: best at 2e-3, no score above 6e-3."""
    assert "llm_negatives.py judge" in refused(
        "eval.py", "tune", "--run", tmp_path, "--methods", "HNLMRec")
    (tmp_path / "judge.safetensors").touch()
    done, kill_at, data = [], 7, split_data()
    counts = {name: data.pop(name) for name in ("n_users", "n_items")}
    backbones.save_tensors(tmp_path / "data.safetensors", data, {**counts, "settings": {}})

    def train(script, command, *words):
        words = dict(zip(words[::2], words[1::2]))
        done.append(float(words.get("--lr", 1e-3)))
        if len(done) == kill_at:
            raise KeyboardInterrupt
        if done[-1] > 6e-3:
            evaluation.fail("the loss is nan")
        score = 1 - abs(math.log(done[-1] / 2e-3)) / 10
        meta = {"settings": {}, "history": [{"epoch": 1, "valid_ndcg@20": score}]}
        backbones.save_tensors(tmp_path / words["--out"], {"x": torch.zeros(1)}, meta)

    monkeypatch.setattr(evaluation, "program", train)
    flags = ["tune", "--run", str(tmp_path), "--budget", "12",
             "--methods", "Popularity;RNS;HNLMRec"]
    with pytest.raises(KeyboardInterrupt):
        evaluation.main(flags)
    with open(tmp_path / "tuned.jsonl", "a") as file:
        file.write('{"method": "RN')  # and a line that was cut off
    before, kill_at = len(backbones.read_jsonl(tmp_path / "tuned.jsonl", "", growing=True)), 0
    done.clear()
    evaluation.main(flags)
    assert before == 6 and len(done) == 1 + 12 + 12 - before
    trials = backbones.read_jsonl(tmp_path / "tuned.jsonl", "")
    found = json.loads((tmp_path / "tuned.json").read_text())["methods"]
    for name in ("RNS", "HNLMRec"):
        words = [t["words"] for t in trials if t["method"] == name]
        first = 1 if name == "RNS" else 4
        flags_of = [dict(zip(w[::2], w[1::2])) for w in words]
        rates = [float(f.get("--lr", 1e-3)) for f in flags_of]
        # in turn a random point, and the best before with one flag moved
        for n in range(first, 12):
            before = [m for m in range(n) if rates[m] <= 6e-3]
            best = flags_of[min(before, key=lambda m: abs(math.log(rates[m] / 2e-3)))]
            moved = [flag for flag, value in flags_of[n].items() if best.get(flag) != value]
            assert set(best) <= set(flags_of[n])
            assert len(moved) <= 1 if n % 2 == 0 else words[n][0] == "--lr" and len(moved) > 1
        # DNS itself is always among HNLMRec's: nothing of the LLM or the judge
        off = "alpha lambda1 lambda-s clear text-init lambda-f".split()
        assert name == "RNS" or words[1] == " ".join(f"--{flag} 0" for flag in off).split()
        assert words[0] == [] and all(3e-4 <= rate <= 1e-2 for rate in rates)
        entry = found["lightgcn"][name]
        whole = [rate for rate in rates if rate <= 6e-3]
        best = min(whole, key=lambda rate: abs(math.log(rate / 2e-3)))
        assert f"--lr {best:.3g}" in " ".join(entry["words"]) and entry["trials"] == 12
        assert entry["failed"] == sum(rate > 6e-3 for rate in rates)
    assert found["pop"]["Popularity"]["trials"] == 1
    assert any(t["valid"] is None for t in trials) and not list(tmp_path.glob("compare/*"))

    first = (tmp_path / "tuned.json").read_bytes()
    evaluation.main(flags)  # all there
    assert len(done) == 19 and (tmp_path / "tuned.json").read_bytes() == first
    assert "give --force" in refused("eval.py", *flags, "--seed", "1")
    assert "are for files of" in refused("eval.py", *flags, "--out", "report")
    evaluation.main(["tune", "--run", str(tmp_path), "--methods", "Popularity", "--force"])
    assert len(backbones.read_jsonl(tmp_path / "tuned.jsonl", "")) == 1  # all anew
    evaluation.main(flags)
    assert json.loads((tmp_path / "tuned.json").read_bytes()) == json.loads(first)
    assert "no declared space" in refused("eval.py", *flags, "--methods", "MF")

    # what compare takes from it: a variant of HNLMRec has its own flags on top of HNLMRec's
    digest = backbones.load_data(tmp_path)["digest"]
    tuned = evaluation.read_tuned(tmp_path / "tuned.json", digest)
    own = found["lightgcn"]["HNLMRec"]["words"]
    words = functools.partial(evaluation.tuned_words, tuned)
    assert words("HNLMRec", "lightgcn", ["--k", "2"]) == ["--k", "2", *own]
    assert words("no self-attention", "lightgcn", ["--no-attention"]) == [*own, "--no-attention"]
    assert words("Popularity", "mf", []) == []
    compare = ["compare", "--run", str(tmp_path), "--tuned", "--methods"]
    assert "EASE on lightgcn is not in it" in refused("eval.py", *compare, "EASE")
    evaluation.main([*flags, "--methods", "EASE", "--budget", "2"])  # closed forms: any budget
    assert evaluation.read_tuned(tmp_path / "tuned.json", digest)["ease"]["EASE"]["trials"] == 2
    evaluation.main([*flags, "--methods", "DNS", "--budget", "3"])
    assert "DNS had 3 trials" in refused("eval.py", *compare, "DNS")
    (tmp_path / "tuned.json").write_text("{")
    assert "delete it" in refused("eval.py", *compare, "DNS")


def test_a_trial_near_the_best_moves_one_flag_by_a_step():
    rng, space = np.random.default_rng(0), evaluation.SPACES["DNS"]
    words, seen = "--lr 0.001 --reg 0.01 --m 8".split(), {"--lr": [], "--reg": [], "--m": []}
    for _ in range(900):
        moved = evaluation.near(words, space, rng, 8)
        assert moved[::2] == words[::2]
        for flag, old, new in zip(words[::2], words[1::2], moved[1::2]):
            if new != old:
                seen[flag].append(float(new))
    assert 250 < len(seen["--m"]) < 350 and set(seen["--m"]) == {4, 16}  # neighbours of 8 in M
    # a normal step of a sixth of the range, on a log scale, kept within it
    for flag, old, low, high in (("--lr", 1e-3, 3e-4, 1e-2), ("--reg", 1e-2, 1e-6, 1e-1)):
        steps = np.log(np.array(seen[flag]) / old) / np.log(high / low)
        assert abs(steps.std() - 1 / 6) < 0.03 and abs(np.median(steps)) < 0.03
        assert low <= min(seen[flag]) and max(seen[flag]) <= high
    only = evaluation.near([], {"m": [3]}, rng, 2)  # a default is drawn, a lone value stays
    assert only == ["--m", "6"] == evaluation.near(only, {"m": [3]}, rng, 2)


def test_declared_spaces_are_flags_of_their_programs(capsys):
    helps = {}
    for script, command in (("backbones.py", "pretrain"), ("hnlmrec.py", "train")):
        with pytest.raises(SystemExit):
            PROGRAMS[script].main([command, "--help"])
        helps[script] = capsys.readouterr().out
    for name, space in evaluation.SPACES.items():
        script, _, words = evaluation.command_of(name)
        assert all(f"{flag} " in helps[script] for flag in [w for w in words if w[:2] == "--"])
        assert all(f"--{flag} " in helps[script] for flag in space)


def test_compare_computes_a_closed_form_once(copied, monkeypatch):
    """One cell for all seeds and backbones; its scores are those of the closed form itself."""
    calls, data = [], backbones.load_data(copied)
    monkeypatch.setattr(evaluation, "program",
                        lambda *words: calls.append(words) or in_process(*words))
    evaluation.main(["compare", "--run", str(copied), "--seeds", "2", "--backbones", "mf,lightgcn",
                     "--methods", "EASE --ridge 5;Popularity"])
    assert len(calls) == 2
    cells = json.loads((copied / "compare.json").read_text())["cells"]
    weight = backbones.ease(data["train"], data["n_users"], data["n_items"], 5.0)
    model = backbones.ItemWeights(weight, data["train"], data["n_users"])
    _, values, _ = evaluation.evaluate(model, data)
    expected = float(values["NDCG@20"].mean())
    assert cells["EASE | mf"]["NDCG@20"] == pytest.approx([expected, expected])


def test_compare_blends_the_files_that_a_row_names(copied, monkeypatch):
    """A row of FULL is `blend` of its parts' cells, each of its own seed; its score that of the
    blend of these files."""
    calls = []
    monkeypatch.setattr(evaluation, "program",
                        lambda *words: calls.append(words) or in_process(*words))
    full = {"a": ("DNS", "none", ("RP3β",)), "b": ("none", "none", ("RNS", "EASE")),
            "c": ("none", "none", ("RP3β", "EASE"))}
    monkeypatch.setattr(evaluation, "FULL", full)
    evaluation.main(["compare", "--run", str(copied), "--seeds", "2", "--backbones", "mf",
                     "--flags", "--dim 4 --epochs 1", "--methods", "a;b;c"])
    blends = [dict(zip(words[2::2], words[3::2])) for words in calls if words[1] == "blend"]
    assert len(calls) == 2 + 2 + 2 + 5 and len(blends) == 5  # c holds closed forms alone: one seed
    for n, seed in enumerate((0, 1)):
        assert f"dns-mf-seed{seed}" in blends[n]["--model"] and "rp3" in blends[n]["--beside"]
        assert blends[2 + n]["--model"] == "none" == blends[2 + n]["--judge"]
        assert f"rns-mf-seed{seed}" in blends[2 + n]["--beside"]
    data, cells = backbones.load_data(copied), json.loads(
        (copied / "compare.json").read_text())["cells"]
    for name, blend in (("a", blends[1]), ("b", blends[3]), ("c", blends[4])):
        out = blend["--out"]
        model, _, _ = backbones.load_model(copied / out, data=data)
        _, values, _ = evaluation.evaluate(model, data)
        assert cells[f"{name} | mf"]["NDCG@20"][1] == pytest.approx(float(values["NDCG@20"].mean()))


def test_text_vectors_of_ones_own(copied):
    """The LLM's own vectors, given as a file, change nothing; others do; bad files are refused."""
    flags = "--dim 8 --epochs 4 --eval-every 2 --mine-first 1 --mine-last 5 --alpha 0.3"
    settings = ["train", "--run", str(copied), *flags.split(), "--out", "own.safetensors",
                "--text-vectors"]
    text = load_file(copied / "negatives-items.safetensors")["text"]
    path = copied / "text.safetensors"
    save_file({"text": text}, path)
    hnlmrec.main([*settings, str(path)])
    ours, theirs = (load_file(copied / f"{name}.safetensors") for name in ("own", "model-hnlmrec"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    save_file({"text": torch.randn(40, 3)}, path)
    assert "text_digest" in refused("hnlmrec.py", *settings, path)  # the same name, another file
    hnlmrec.main([*settings, str(path), "--force"])
    assert not torch.equal(load_file(copied / "own.safetensors")["user"], theirs["user"])
    hole = torch.zeros(40, 3)
    hole[7, 1] = torch.nan
    for tensors, message in (({"text": torch.zeros(39, 3)}, "not (40, width)"),
                             ({"text": hole}, "row 7"), ({"texts": hole}, "no tensor `text`")):
        save_file(tensors, path)
        assert message in refused("hnlmrec.py", *settings, path)
    path.write_bytes(b"no")
    assert "cannot be read" in refused("hnlmrec.py", *settings, path)
    assert "no such file" in refused("hnlmrec.py", *settings, copied / "none")


def test_generated_vectors_are_the_fine_tuned_encoders(finished, tiny_llm):
    """The adapter is really in: the shard equals encode() with adapter/ loaded, and differs from
    the bare LLM."""
    cf, _ = backbones.load_tensors(finished / "cf.safetensors", "pretrain")
    texts = llm_negatives.load_profiles(finished)
    shard, _ = backbones.load_tensors(finished / "negatives-00000.safetensors", "generate")
    with torch.no_grad():
        for lora in (True, False):
            llm, prompt, soft_tokens, head, _ = llm_negatives.load_sft(
                finished, "sft", tiny_llm, "cpu", lora)
            hidden = llm_negatives.encode_pairs(llm, prompt, soft_tokens, cf, texts, shard["pairs"])
            assert torch.allclose(hidden, shard["hidden"].float(), atol=2e-3) == lora
            if lora:
                vector = head(shard["hidden"].float())
                assert torch.allclose(vector, shard["vector"].float(), atol=1e-2)


def test_in_bf16_the_adapter_is_bf16_and_says_the_same(copied, tiny_llm, monkeypatch):
    """Trained in float32, run in the LLM's format. Before LoRA has learned, it is not run."""
    seen, fit_head = [], llm_negatives.fit_head

    def watched(task, head, hidden, rows, *args, **more):
        seen.append((task, hidden, rows))
        return fit_head(task, head, hidden, rows, *args, **more)

    monkeypatch.setattr(llm_negatives, "fit_head", watched)
    tune(copied, tiny_llm, "sft-bf16", "--dtype", "bf16", "--profile-dropout", 0)
    adapter = load_file(copied / "adapter-bf16" / "adapter_model.safetensors")
    assert {value.dtype for value in adapter.values()} == {torch.float32}
    task, frozen, rows = seen[0]
    both = []
    for lora in (False, True):
        llm, prompt, soft_tokens, *_ = llm_negatives.load_sft(
            copied, "sft-bf16", tiny_llm, "cpu", lora)
        assert {p.dtype for p in llm.parameters()} == {torch.bfloat16}
        both.append(llm_negatives.encode_rows(task, llm, prompt, soft_tokens, rows))
    llm = llm.float()  # the oracle: the same adapter in float32
    with torch.no_grad():
        for name, p in llm.named_parameters():
            if "lora" in name:
                p.copy_(adapter[name.replace(".default", "")])
    exact = llm_negatives.encode_rows(task, llm, prompt, soft_tokens, rows)
    assert F.cosine_similarity(both[1], exact).min() > 0.999
    assert (both[1] - exact).norm() < (both[0] - exact).norm() / 3


def test_a_finished_step_is_skipped_and_a_changed_one_refused(finished, raw):
    before = (finished / "cf.safetensors").read_bytes()
    pretrain = ["pretrain", "--run", finished, *BUDGET, "--sampler", "dns"]
    assert "skip:" in process(HERE / "backbones.py", *pretrain)
    assert "seed=0, now seed=1" in refused("backbones.py", *pretrain, "--seed", 1)
    again = ["--run", finished, "--reviews", raw / "interactions.tsv", "--seed", 3]
    assert "made with" in refused("hnlmrec.py", "prepare", *again)
    assert (finished / "cf.safetensors").read_bytes() == before


def test_generation_goes_on_where_it_was_killed(finished, tiny_llm):
    shards = sorted(finished.glob("negatives-0*.safetensors"))
    whole = [path.read_bytes() for path in shards]
    shards[1].unlink()
    again = ["generate", "--run", finished, "--llm", tiny_llm, *SHARDS]
    assert "missing" not in cli("llm_negatives.py", *again)
    assert [path.read_bytes() for path in shards] == whole
    assert "skip:" in cli("llm_negatives.py", *again)


TUNE = ["--llm-layers", 0, *BAND, "--warmup-pairs", 64, "--dtype", "fp32", "--save-every", 2,
        "--steps", 4]


def tuned(run, name):
    """All that fine-tuning learned: the tensors of NAME.safetensors and of its adapter."""
    adapter = load_file(run / llm_negatives.adapter_folder(name) / "adapter_model.safetensors")
    return {**backbones.load_tensors(run / f"{name}.safetensors", "finetune")[0], **adapter}


def tune(run, llm, name, *flags):
    where = ["--run", run, "--llm", llm, "--name", name]
    llm_negatives.main([str(word) for word in ("finetune", *where, *TUNE, *flags)])
    return tuned(run, name)


@pytest.fixture
def copied(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "copy")
    return tmp_path / "copy"


def test_fine_tuning_goes_on_where_it_was_killed(copied, tiny_llm, monkeypatch, capsys):
    whole, real = tune(copied, tiny_llm, "sft-whole"), llm_negatives.save_partial

    def killed_after_saving(*args):
        real(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(llm_negatives, "save_partial", killed_after_saving)
    with pytest.raises(KeyboardInterrupt):
        tune(copied, tiny_llm, "sft-cut")
    monkeypatch.setattr(llm_negatives, "save_partial", real)
    with pytest.raises(SystemExit) as error:  # another number format is another result
        tune(copied, tiny_llm, "sft-cut", "--dtype", "bf16")
    assert "half-finished with dtype=float32, now dtype=bfloat16" in error.value.message
    capsys.readouterr()
    again = tune(copied, tiny_llm, "sft-cut")
    assert "going on after step 2 of 4" in capsys.readouterr().out
    assert not list(copied.glob("*partial*"))
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_the_prompt_is_rendered_once(finished, tiny_llm, monkeypatch):
    """A template may print the date: generation takes what fine-tuning wrote down, and a resumed
    `profile` what its first start did."""
    monkeypatch.setattr(llm_negatives, "chat_frame", lambda *args: pytest.fail("rendered again"))
    *_, meta = llm_negatives.load_sft(finished, "sft", tiny_llm, "cpu")
    _, prompt, *_ = llm_negatives.load_sft(finished, "sft", tiny_llm, "cpu")
    assert list(prompt.frame) == meta["frame"] and llm_negatives.INSTRUCTION in prompt.frame[0]
    header = json.loads((finished / "profiles.jsonl").read_text().splitlines()[0])
    _, frames = llm_negatives.started_profiles(
        finished / "profiles.jsonl", header["settings"], False)
    assert set(frames) == {"item", "user"}
    llm_negatives.Writer(tiny_llm, torch.float32, "cpu", 3, 2, frames)


def test_an_adapter_that_cannot_be_written_leaves_no_litter(copied, tiny_llm, monkeypatch):
    def full_disk(self, folder, **more):
        Path(folder).mkdir()
        raise llm_negatives.SafetensorError("No space left on device")

    (copied / ".adapter-full.1.tmp").mkdir()  # of a process killed earlier
    with monkeypatch.context() as patch:
        patch.setattr(llm_negatives.PeftModel, "save_pretrained", full_disk)
        with pytest.raises(SystemExit) as error:
            tune(copied, tiny_llm, "sft-full")
    assert "No space left" in error.value.message and not list(copied.glob(".adapter*"))
    tune(copied, tiny_llm, "sft-full")
    config = copied / "adapter-full" / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 16', '"lora_alpha": 17'))
    with pytest.raises(SystemExit) as error:
        llm_negatives.load_sft(copied, "sft-full", tiny_llm, "cpu")
    assert "made with another adapter" in error.value.message


def test_judge_its_negatives_and_its_blend_go_through(copied, tiny_llm, capsys):
    """The judge's file feeds training without generated vectors, the blend and the report; the
    weight is the best on validation; another control gives another judge."""
    run = ["--run", str(copied)]
    read = ["judge", *run, "--llm", str(tiny_llm), "--layers", "0,2", "--epochs", "2",
            "--dtype", "fp32"]
    llm_negatives.main(read)
    control = ["--control", "random", "--seed", "1", "--out", "judge-random.safetensors"]
    llm_negatives.main([*read, *control])
    real, random = (backbones.load_tensors(copied / f"{name}.safetensors")[0]
                    for name in ("judge", "judge-random"))
    assert real["likely"].shape == (backbones.load_data(copied)["n_users"], 20)
    # each dropout is tried, and the better of the two by validation is what is written
    meta, tried = backbones.read_meta(copied / "judge.safetensors"), {}
    for dropout in (0, 0.5):
        out = f"judge-{dropout}.safetensors"
        llm_negatives.main([*read, "--dropout", str(dropout), "--out", out])
        other = backbones.read_meta(copied / out)
        tried[dropout] = max(row["valid_ndcg@20"] for row in other["history"])
        if dropout == meta["dropout"]:
            assert other["history"][0]["loss"] == meta["history"][0]["loss"]
    assert max(row["valid_ndcg@20"] for row in meta["history"]) == max(tried.values())
    assert tried[meta["dropout"]] == max(tried.values())
    assert not torch.equal(real["history"], random["history"])
    for layers in ("0,x", "0,3", "-1"):
        with pytest.raises(SystemExit) as error:
            llm_negatives.main([*read, "--layers", layers, "--out", "judge-bad.safetensors"])
        assert "--layers" in error.value.message
    assert llm_negatives.judge_layers("", str(tiny_llm)) == [0, 1]  # of two layers
    bare = "--negatives none --alpha 0 --lambda1 0 --lambda-s 0 --text-init 0".split()
    train = ["train", *run, "--dim", "8", "--epochs", "2", "--eval-every", "1", *bare]
    hnlmrec.main([*train, "--lambda-f", "1", "--out", "model-hnlmrec-soft.safetensors"])
    with pytest.raises(SystemExit) as error:
        hnlmrec.main([*train, "--alpha", "0.1", "--out", "model-hnlmrec-bad.safetensors"])
    assert "--alpha" in error.value.message
    assert not (copied / "model-hnlmrec-bad.safetensors").exists()
    backbones.main(["pretrain", *run, "--backbone", "ease", "--out", "model-ease.safetensors"])
    blend = ["blend", *run, "--model", "model-hnlmrec-soft.safetensors", "--weights", "0,0.5,1",
             "--beside", "model-ease.safetensors"]
    capsys.readouterr()
    hnlmrec.main(blend)
    printed = re.findall(r"alone valid NDCG@20 (\S+), weight (\S+)\n", capsys.readouterr().out)
    data = backbones.load_data(copied)
    model, meta, _ = backbones.load_model(copied / "model-hnlmrec-full.safetensors", data=data)
    assert backbones.validation(model, data)() == pytest.approx(meta["history"][0]["valid_ndcg@20"])
    assert meta["history"][0]["valid_ndcg@20"] >= max(float(alone) for alone, _ in printed) - 1e-4
    assert [float(weight) for _, weight in printed] == list(meta["weights"].values())
    for (alone, _), name in zip(printed, meta["weights"]):
        # what is blended is the model itself, EASE's item weights and the judge's kernel too
        if name.startswith("model"):
            part, _, _ = backbones.load_model(copied / name, data=data)
        else:
            part = backbones.kernel_of(real, data["train"], data["n_users"])
        assert alone == f"{backbones.validation(part, data)():.4f}"
    hnlmrec.main(blend)
    assert "skip" in capsys.readouterr().out
    for flag, value in (("--weights", "0,nan"), ("--weights", "1e39"), ("--weights=-1", None),
                        ("--judge", "cf.safetensors"), ("--judge", "negatives-items.safetensors")):
        words = [flag, value] if value else [flag]
        message = refused("hnlmrec.py", *blend, *words, "--out", "model-bad.safetensors")
        assert flag[:8] in message and not (copied / "model-bad.safetensors").exists()
    message = refused("hnlmrec.py", *train, "--lambda-f", "1", "--judge", "cf.safetensors", "--out",
                      "model-bad.safetensors")
    assert "not a judge" in message
    itself = ["--model", "model-hnlmrec-full.safetensors", "--force"]
    assert "is one of the models" in refused("hnlmrec.py", "blend", *run, *itself)
    assert "is there twice" in refused("hnlmrec.py", *blend[:-1], "judge.safetensors")
    again = ["--model", "none", "--judge", "judge-random.safetensors"]
    again += ["--beside", "model-judged.safetensors", "--out", "model-bad.safetensors"]
    hnlmrec.main(["blend", *run, "--model", "none", "--out", "model-judged.safetensors"])
    judged, _, _ = backbones.load_model(copied / "model-judged.safetensors", data=data)
    kernel = backbones.kernel_of(real, data["train"], data["n_users"])
    users, items = kernel()
    ours, scores = (model.score_all(users, items) for model in (judged, kernel))
    scores = (scores - scores.mean(1, keepdim=True)) / scores.std(1, keepdim=True)
    assert torch.allclose(ours - ours.mean(1, keepdim=True), scores, atol=1e-4)
    assert "is a blend with a judge" in refused("hnlmrec.py", "blend", *run, *again)
    assert "nothing is left" in refused(
        "hnlmrec.py", "blend", *run, "--model", "none", "--judge", "none")
    assert "hnlmrec.py blend" in backbones.maker_of(copied / "model-hnlmrec-full.safetensors")
    # texts alone, without a generated vector: the start is theirs
    words = ["--text-init", "1", "--text-vectors", str(copied / "judge.safetensors"),
             "--epochs", "1"]
    hnlmrec.main([*train, *words, "--lr", "1e-30", "--out", "model-hnlmrec-text.safetensors"])
    model, _, _ = backbones.load_model(copied / "model-hnlmrec-text.safetensors", data=data)
    semantic = hnlmrec.SemanticProjector(real["text"].float(), data["train"], model.n_users, 8)
    start = hnlmrec.text_start(semantic.item, data["train"], model.n_users, 8, model.std)
    assert torch.allclose(model.embedding, start, atol=1e-5)
    save_file({"text": torch.ones(data["n_items"], 3)}, copied / "alike.safetensors")
    message = refused("hnlmrec.py", "train", *run, *BAND, "--out",
                      "model-bad.safetensors", "--text-vectors", copied / "alike.safetensors")
    assert "alike" in message
    # users that teach nothing: a bag of words, of which their pairs alone count
    llm_negatives.main([*read[:-6], "--layers", "0", "--epochs", "1", "--untaught", "0.3",
                        "--out", "judge-new.safetensors"])
    new = backbones.load_tensors(copied / "judge-new.safetensors", "")[0]
    assert 0 < len(new["untaught"]) < data["n_users"] and not torch.equal(
        new["history"], real["history"])
    evaluation.main(["judge", *run, "--parts"])
    out = capsys.readouterr().out
    for name in ("judge-random", "judge, mean user", "judge, mean item", "words (judge-new)"):
        assert name in out


def test_checkpointing_and_parts_do_not_change_the_step(copied, tiny_llm):
    flags = ["--steps", 2, "--lora-dropout", 0, "--profile-dropout", 0]
    plain = tune(copied, tiny_llm, "sft-plain", *flags)
    for name, more in (("checkpointing", ["--checkpointing"]), ("parts", ["--micro-pairs", 3])):
        assert_same_update(plain, tune(copied, tiny_llm, f"sft-{name}", *flags, *more))


def assert_same_update(one, other):
    """Adam divides by the gradient's size: an entry whose gradient is rounding noise may move
    either way, by lr = 5e-4 a step."""
    assert all(torch.allclose(one[key], other[key], atol=1.1e-3) for key in one)
    close = torch.cat([(one[key] - other[key]).abs().flatten() < 1e-5 for key in one])
    assert close.float().mean() > 0.99


TORCHRUN = ["-m", "torch.distributed.run", "--nproc-per-node", 2, "--"]
# commands one after another in a process of torchrun's, the last as torchrun itself would run it:
# most of a command's time goes into the import of transformers
COMMANDS = """
import runpy, shlex, sys
import torch.distributed as dist
sys.path.insert(0, sys.argv[1])
import llm_negatives
*first, last = map(shlex.split, sys.argv[2:])
start = dist.init_process_group
dist.init_process_group = lambda *args: dist.is_initialized() or start(*args)
for words in first:
    llm_negatives.main(words)
sys.argv, sys.stdout = ["llm_negatives.py", *last], sys.__stdout__
runpy.run_path(llm_negatives.__file__, run_name="__main__")
"""


def test_two_processes_do_what_one_does(copied, tiny_llm, raw, tmp_path):
    """Gradients averaged, profiles and shards shared out: the same update as one process with the
    same batch, the same files."""
    one, run = tune(copied, tiny_llm, "sft-one"), ["--run", copied, "--llm", tiny_llm]
    profile = ["profile", *run, *steps_of(tiny_llm, raw)["profile"], "--batch-size", 3]
    commands = []
    for words in ([*profile, "--out", "profiles-two.jsonl"],
                  ["finetune", *run, "--name", "sft-two", *TUNE],
                  ["generate", *run, *SHARDS, "--out", "negatives-two"]):
        commands.append(shlex.join(map(str, words)))
    (tmp_path / "commands.py").write_text(COMMANDS)
    process(*TORCHRUN, tmp_path / "commands.py", HERE, *commands)
    profiles = (copied / "profiles.jsonl").read_text().splitlines()
    shared = (copied / "profiles-two.jsonl").read_text().splitlines()
    assert sorted(shared) == sorted(profiles)
    assert_same_update(one, tuned(copied, "sft-two"))
    for path in copied.glob("negatives-0*"):
        a, _ = backbones.load_tensors(path)
        b, _ = backbones.load_tensors(copied / path.name.replace("negatives", "negatives-two"))
        assert torch.equal(a["pairs"], b["pairs"])
        assert torch.allclose(a["hidden"], b["hidden"], atol=2e-3)


def test_variants_of_fine_tuning_reach_the_recommender(copied, tiny_llm, monkeypatch, capsys):
    """No CF vectors in the prompt; MixGCF's targets; template profiles: each makes negatives of its
    own."""
    monkeypatch.setattr(evaluation, "program", in_process)
    run = ["--run", copied, "--llm", tiny_llm]
    template = "profiles-template.jsonl"
    cli("llm_negatives.py", "profile", *run, "--profiles", "template", "--out", template)
    words = " ".join(map(str, [*TUNE, "--steps", 1]))
    made, steps = {}, [f"finetune --soft-tokens 0 --name sft-nocf {words}",
                       "generate --sft sft-nocf --out negatives-nocf"]
    for count in (2, 0):  # as `eval.py compare` makes them: once
        evaluation.make_negatives(copied, "negatives-nocf", steps, tiny_llm, 2)
        assert capsys.readouterr().out.count("$ ") == count
    made["nocf"] = backbones.load_negatives(copied, "negatives-nocf")["hidden"]
    usual = tune(copied, tiny_llm, "sft-usual", "--steps", 1)
    for name, flags in (("mixgcf", ["--mine", "mixgcf"]), ("template", ["--profiles", template])):
        other = tune(copied, tiny_llm, f"sft-{name}", *flags, "--steps", 1)
        assert not all(torch.equal(usual[key], other[key]) for key in usual)
        cli("llm_negatives.py", "generate", *run, "--sft", f"sft-{name}", "--pairs-per-user", 2,
            "--out", f"negatives-{name}")
        made[name] = backbones.load_negatives(copied, f"negatives-{name}")["hidden"]
    assert not torch.equal(made["nocf"], made["mixgcf"])
    assert not torch.equal(made["template"], made["mixgcf"])
    (copied / "profiles.jsonl").rename(copied / "old.jsonl")
    message = refused("llm_negatives.py", "generate", *run, "--out", "negatives-new")
    assert "profiles.jsonl: no such file" in message


def test_wrong_adapters_and_negatives_are_refused(copied, finished, tiny_llm, tmp_path):
    run, other = copied, tmp_path / "other llm"
    shutil.copytree(tiny_llm, other)
    model = LlamaForCausalLM.from_pretrained(tiny_llm)
    model.lm_head.weight.data *= 2
    model.save_pretrained(other)
    generate = ["generate", "--run", run, *SHARDS]
    for path in run.glob("negatives-*"):
        path.unlink()
    assert "another LLM" in refused("llm_negatives.py", *generate, "--llm", other)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        whole = (run / "adapter" / name).read_bytes()
        (run / "adapter" / name).write_bytes(whole + b" ")
        message = refused("llm_negatives.py", *generate, "--llm", tiny_llm)
        assert f"another adapter/{name}" in message
        (run / "adapter" / name).write_bytes(whole)
    for path in finished.glob("negatives-*"):
        shutil.copy(path, run)
    tensors, meta = backbones.load_tensors(run / "data.safetensors", "prepare")
    tensors["valid"], tensors["test"] = tensors["test"], tensors["valid"]
    backbones.save_tensors(run / "data.safetensors", tensors, meta)
    train = ["train", "--run", run, *BUDGET, "--out", "new.safetensors"]
    assert "another data.safetensors" in refused("hnlmrec.py", *train)
    assert "another data.safetensors" in refused("eval.py", "report", "--run", run)
    (run / "cf.safetensors").write_bytes((run / "cf.safetensors").read_bytes()[:500])
    finetune = ["finetune", "--run", run, "--llm", tiny_llm, "--force"]
    assert "not a readable file" in refused("llm_negatives.py", *finetune)


def test_two_runs_with_one_seed_are_identical(copied, tiny_llm, raw):
    before, _ = backbones.load_tensors(copied / "model-hnlmrec.safetensors")
    (copied / "model-hnlmrec.safetensors").unlink()
    torch.manual_seed(99)
    cli("hnlmrec.py", "train", "--run", copied, *steps_of(tiny_llm, raw)["train"])
    after, _ = backbones.load_tensors(copied / "model-hnlmrec.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_gradients_are_averaged_over_processes(monkeypatch):
    """Beside a process whose gradients are 3 everywhere."""
    monkeypatch.setattr(backbones, "world", lambda: 2)
    monkeypatch.setattr(backbones.dist, "all_reduce", lambda tensor: tensor.add_(3))
    one, two, none = (torch.zeros(2, requires_grad=True) for _ in range(3))
    one.grad, two.grad = torch.tensor([1.0, 5.0]), torch.tensor([-3.0, 0.0])
    backbones.average_gradients([one, none, two])
    assert one.grad.tolist() == [2, 4] and two.grad.tolist() == [0, 1.5] and none.grad is None


def test_training_over_two_processes_is_that_of_one(copied, tiny_llm, raw):
    """Mining, training and validation shared out: the model file that one process writes. Adam
    divides a gradient by its own size, so where it is next to nothing, rounding may turn an update
    over (lr 1e-3 a step)."""
    out = process(*TORCHRUN, HERE / "hnlmrec.py", "train", "--run", copied,
                  *steps_of(tiny_llm, raw)["train"], "--out", "model-two.safetensors")
    assert out.count("wrote") == 1
    one, meta = backbones.load_tensors(copied / "model-hnlmrec.safetensors", "train")
    two, other = backbones.load_tensors(copied / "model-two.safetensors", "train")
    assert one.keys() == two.keys()
    apart = {name: (one[name].float() - two[name].float()).abs().flatten() for name in one}
    assert max(float(d.max()) for d in apart.values()) < 9e-3
    assert (torch.cat(list(apart.values())) < 1e-5).float().mean() > 0.99
    for a, b in zip(meta["history"], other["history"]):
        assert a["valid_ndcg@20"] == pytest.approx(b["valid_ndcg@20"]) and a["epoch"] == b["epoch"]


def test_mining_and_profiles_do_not_read_valid_or_test(finished):
    """Swap valid and test for other pairs: mined items and the pairs that are learned from stay the
    same."""
    data = backbones.load_data(finished)
    model, _, _ = backbones.load_model(finished / "cf.safetensors", "pretrain", data)
    texts = llm_negatives.load_profiles(finished)
    other = {**data, "valid": data["valid"][:1], "test": data["test"][:1]}
    users, items = (v.detach() for v in model())
    cf = {"user": users, "item": items}
    one, two = (llm_negatives.SftTask(d, model, cf, texts, 1, 5, 0) for d in (data, other))
    assert torch.equal(one.mined, two.mined) and torch.equal(one.rows, two.rows)


# --------------------------------------------------------------------------------------------------
# Lineage: no result of parts that do not belong together; every message's mend works
# --------------------------------------------------------------------------------------------------


def follow(steps, script, *args):
    """Run a command; while it is refused, do what the message says, then try again
    -> the commands that were needed."""
    done = []
    while len(done) < 12:
        try:
            PROGRAMS[script].main([str(arg) for arg in args])
            return done
        except SystemExit as error:
            mend = re.findall("`python ([^`]+)`", error.message)[-1].replace(" …", "")
            mend = shlex.split(mend)
            done.append(f"{mend[1]}{' --force' if '--force' in mend else ''}")
            if "; delete " in error.message:
                Path(error.message.split(": ")[0]).unlink()
            follow(steps, mend[0], *mend[1:], *steps[mend[1]])
    raise AssertionError(done)


def test_another_split_is_followed_by_the_messages_own_words(copied, tiny_llm, raw):
    """After `prepare --force` nothing of the former split is used: its profiles quote pairs that
    are test pairs now."""
    steps = steps_of(tiny_llm, raw)
    steps["prepare"] += ["--seed", 3]
    hnlmrec.main(list(map(str, ["prepare", "--run", copied, *steps["prepare"], "--force"])))
    train = ["train", "--run", copied, *steps["train"]]
    assert "was made with another data.safetensors" in refused("hnlmrec.py", *train)
    follow(steps, "hnlmrec.py", *train, "--force")
    digest = backbones.load_data(copied)["digest"]
    for name in ("cf", "sft", "negatives-00000", "negatives-items", "model-hnlmrec"):
        settings = backbones.read_meta(copied / f"{name}.safetensors", check=True)["settings"]
        assert settings["inputs"]["data.safetensors"] == digest
    first = json.loads((copied / "profiles.jsonl").read_text().splitlines()[0])
    assert first["settings"]["inputs"] == {"data.safetensors": digest}
    assert "model-rns.safetensors" in refused("eval.py", "report", "--run", copied)


@pytest.mark.parametrize("name", ["items.jsonl", "cf.safetensors", "profiles.jsonl"])
def test_what_was_deleted_is_made_again_and_all_else_stays(copied, tiny_llm, raw, name):
    """The same settings give the same digest: nothing that was made from it is made anew."""
    def digests():
        return backbones.stamp(copied, *(path.name for path in copied.glob("*.safetensors")))

    before, steps = digests(), steps_of(tiny_llm, raw)
    if name == "adapter":
        shutil.rmtree(copied / name)
        (copied / "negatives-00001.safetensors").unlink()  # or nobody asks for it
    else:
        (copied / name).unlink()
    assert follow(steps, "llm_negatives.py", "generate", "--run", copied, *steps["generate"])
    assert not follow(steps, "hnlmrec.py", "train", "--run", copied, *steps["train"])
    assert (copied / name).exists() and digests() == before


@pytest.mark.parametrize("name, edit", [
    ("items.jsonl", lambda b: b.replace(b"Film", b"Book")),
    ("items.jsonl", lambda b: b.split(b"\n", 1)[1]),
    ("users.jsonl", lambda b: b"".join(reversed(b.splitlines(keepends=True)))),
    # one bit of the tensors, one digit of the metadata
    ("model-hnlmrec.safetensors", lambda b: b[:-9] + bytes([b[-9] ^ 1]) + b[-8:]),
    ("model-hnlmrec.safetensors", lambda b: b.replace(b"ndcg@20\\\": 0.", b"ndcg@20\\\": 1.")),
])
def test_edited_files_are_refused_by_whoever_reads_them(copied, name, edit):
    whole = (copied / name).read_bytes()
    (copied / name).write_bytes(edit(whole))
    assert (copied / name).read_bytes() != whole
    assert name in refused("eval.py", "recommend", "--run", copied, "--user", "u3")
    assert name in refused("eval.py", "report", "--run", copied)


def test_a_nan_is_named_with_file_and_row(copied):
    path = copied / "model-rns.safetensors"
    tensors, meta = backbones.load_tensors(path)
    tensors["item"][7, 2] = math.nan
    backbones.save_tensors(path, tensors, meta)
    message = refused("eval.py", "report", "--run", copied)
    assert f"{path}: item has a NaN or infinity in row 7" in message


def test_cells_of_former_negatives_or_vectors_are_refused(copied, tiny_llm):
    """compare, sweep and the negatives they make: none is new because its file is there."""
    flags = ["--run", copied, "--llm", tiny_llm, "--seeds", 1,
             "--flags", "--dim 8 --epochs 1 --mine-first 1 --mine-last 5"]
    sweep = ["sweep", *flags, "--flag", "alpha", "--values", "0.5"]
    evaluation.main(list(map(str, sweep)))
    cell = next((copied / "compare").glob("sweep-alpha*"))
    pretrain = ["pretrain", "--run", copied, "--dim", 8, "--epochs", 1, "--seed", 3, "--force"]
    backbones.main(list(map(str, pretrain)))
    message = refused("eval.py", *sweep)
    assert str(cell) in message and "another cf.safetensors" in message
    with pytest.raises(SystemExit):
        evaluation.make_negatives(copied, "negatives", [], tiny_llm, 3)


@pytest.mark.parametrize("script, args", [
    ("backbones.py", ["pretrain", "--out", "data.safetensors"]),
    ("backbones.py", ["pretrain", "--out", "sft-x.safetensors"]),
    ("backbones.py", ["pretrain", "--out", "x.jsonl"]), ("backbones.py", ["pretrain", "--out", ""]),
    ("backbones.py", ["pretrain", "--out", "../x.safetensors"]),
    ("backbones.py", ["pretrain", "--out", "*.safetensors"]),
    ("hnlmrec.py", ["train", "--out", "negatives-items.safetensors"]),
    ("hnlmrec.py", ["train", "--out", "cf.safetensors"]),
    ("llm_negatives.py", ["profile", "--out", "users.jsonl"]),
    ("llm_negatives.py", ["profile", "--out", "data.safetensors"]),
    ("llm_negatives.py", ["finetune", "--name", ""]),
    ("llm_negatives.py", ["finetune", "--name", "cf"]),
    ("llm_negatives.py", ["generate", "--out", "*"]),
    ("llm_negatives.py", ["generate", "--out", "/x/negatives"]),
    ("eval.py", ["compare", "--out", "metrics"]),
    ("eval.py", ["sweep", "--flag", "alpha", "--values", "1", "--out", "report"]),
    ("eval.py", ["compare", "--out", "notes"]),
])
def test_outputs_of_another_kind_are_never_overwritten(copied, script, args):
    (copied / "notes.md").write_text("mine")
    before = {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()}
    force = [] if script == "eval.py" else ["--force"]
    message = refused(script, *args, "--run", copied, *force)
    assert any(flag in message for flag in ("--out", "--name", "writes"))
    assert all(path.read_bytes() == data for path, data in before.items())


def test_prepare_killed_between_its_files_leaves_no_mixture(copied, raw, tmp_path, monkeypatch):
    other, real = tmp_path / "items.tsv", hnlmrec.write_atomic
    other.write_text((raw / "items.tsv").read_text().replace("Film", "Tome"))

    def killed(path, data):
        real(path, data)
        raise KeyboardInterrupt

    monkeypatch.setattr(hnlmrec, "write_atomic", killed)
    flags = ["prepare", "--run", str(copied), "--reviews", str(raw / "interactions.tsv")]
    with pytest.raises(KeyboardInterrupt):
        hnlmrec.main([*flags, "--meta", str(other), "--force"])
    monkeypatch.setattr(hnlmrec, "write_atomic", real)
    assert "no such file" in refused("hnlmrec.py", "train", "--run", copied)
    hnlmrec.main([*flags, "--meta", str(raw / "items.tsv")])
    assert "Tome" not in (copied / "items.jsonl").read_text()


def test_a_closed_pipe_or_an_ascii_terminal_costs_no_result(copied):
    """The report is written though nobody reads, or can read, what is printed."""
    run = copied.rename(copied.with_name("copié"))  # its name is printed
    command = shlex.join([sys.executable, str(HERE / "eval.py"), "report", "--run", str(run)])
    (run / "report.md").unlink()
    for end in ("| true", "> /dev/full"):
        done = subprocess.run(["bash", "-o", "pipefail", "-c", f"{command} {end}"], text=True,
                              capture_output=True, check=False, cwd=HERE,
                              env={**os.environ, "PYTHONIOENCODING": "ascii"})
        assert done.returncode == 0 and "Traceback" not in done.stderr
        (run / "report.md").rename(run / "old.md")  # it was written


def test_names_are_plain_text_wherever_they_are_shown():
    nasty = "a|b <img src=x> [x](y)\n\x1b[2J"
    row = evaluation.markdown_table(["method", "n"], [[nasty, 1]])[2]
    assert row.count("|") == 3 and not any(mark in row for mark in ("<", "\x1b", "\n", "]("))
    xml.etree.ElementTree.fromstring(evaluation.svg_chart(nasty, [nasty], [0.1], [0.09], [0.11]))
    assert backbones.printable("\x1b[2J\u202e") == "\\u001b[2J\\u202e"
    assert backbones.printable("Amélie – 愛\n") == "Amélie – 愛\n"


@pytest.mark.parametrize("lines, message", [
    (["user\trating", "a\t5"], "no column 'item'"),
    (["user\titem\trating", "a\tb\tfive"], "line 2"),
    (["user\titem\trating", "a\tb"], "line 2 has 2 fields"),
    (["user\titem\trating", "a\tb\t5"], "nothing is left"),
    (["user\titem"] + [f"{u}\t{i}" for u in "abcdef" for i in range(6)], "--min-rating none"),
])
def test_bad_ratings_files(tmp_path, lines, message):
    path = tmp_path / "bad.tsv"
    path.write_text("\n".join(lines) + "\n")
    assert message in refused("hnlmrec.py", "prepare", "--run", tmp_path / "run", "--reviews", path)
    assert not (tmp_path / "run" / "data.safetensors").exists()


def test_truncated_and_unwritable_files_are_named(copied, tmp_path):
    """Every kind of file cut in half is refused by the step that reads it, in one line that names
    it; a failed write names its file too and leaves nothing behind."""
    for name, script, args in (
            ("data.safetensors", "backbones.py", ["pretrain"]),
            ("cf.safetensors", "hnlmrec.py", ["train", "--out", "new.safetensors"]),
            ("negatives-00000.safetensors", "hnlmrec.py", ["train"]),
            ("negatives-items.safetensors", "hnlmrec.py", ["train"]),
            ("model-hnlmrec.safetensors", "eval.py", ["report"]),
            ("items.jsonl", "eval.py", ["recommend", "--user", "u1"]),
            ("sft.safetensors", "llm_negatives.py", ["generate"])):
        whole = (copied / name).read_bytes()
        (copied / name).write_bytes(whole[: len(whole) // 2])
        assert name in refused(script, *args, "--run", copied)
        (copied / name).write_bytes(whole)
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError) as error:  # a folder stands where the file should go
        backbones.write_atomic(tmp_path / "taken", b"x")
    assert error.value.filename == str(tmp_path / "taken")
    assert not list(tmp_path.glob("*tmp"))


def test_a_cut_off_download_is_refused(tmp_path):
    rows = [{"reviewerID": f"u{n}", "asin": "x", "overall": 5.0} for n in range(500)]
    path = write_lines(tmp_path / "r.json.gz", rows)
    path.write_bytes(path.read_bytes()[:-200])
    message = refused("hnlmrec.py", "prepare", "--run", tmp_path / "run", "--format", "amazon2018",
                      "--reviews", path)
    assert str(path) in message and "cannot be read to its end" in message


def test_a_user_with_two_items_is_refused(tmp_path):
    rows = [f"a\t{i}\t5" for i in range(5)]
    path = write_lines(
        tmp_path / "few.tsv", ["user\titem\trating", *rows, "b\t1\t5", "b\t2\t5"])
    message = refused("hnlmrec.py", "prepare", "--run", tmp_path / "run", "--reviews", path,
                      "--k-core", 1)
    assert "a split needs 3" in message


@pytest.mark.parametrize("script, args", [
    ("eval.py", ["judge", "--run", "x", "--top", "0"]),
    ("hnlmrec.py", ["train", "--run", "x", "--alpha", "1.5"]),
    ("hnlmrec.py", ["train", "--run", "x", "--tau-c", "0"]),
    ("hnlmrec.py", ["train", "--run", "x", "--clear", "0.3", "--sampler", "rns"]),
    ("hnlmrec.py", ["train", "--run", "x", "--control", "cleared"]),
    ("hnlmrec.py", ["train", "--run", "x", "--hinge", "0.3"]),
    ("hnlmrec.py", ["train", "--run", "x", "--paper", "--lambda-s", "0.1"]),
    ("backbones.py", ["pretrain", "--run", "x", "--epochs", "-1"]),
    ("backbones.py", ["pretrain", "--run", "x", "--nonsense"]),
    ("eval.py", ["report", "--run", "no such folder"]),
    ("backbones.py", ["pretrain", "--run", "x", "--device", "gpu"]),
    ("hnlmrec.py", ["train", "--run", "x", "--device", "mps"]),
    ("llm_negatives.py", ["profile", "--run", "x", "--device", "cuda:99"]),
    ("backbones.py", ["pretrain", "--run", "x", "--seed", 2**64]),
    ("llm_negatives.py", ["finetune", "--run", "x", "--epochs", "inf"]),
    ("backbones.py", ["pretrain", "--run", "x", "--epo", "1"]),
    ("llm_negatives.py", ["finetune", "--run", "x", "--tau-s", "-1"]),
    ("llm_negatives.py", ["profile", "--run", "no such folder"]),
])
def test_bad_flags_end_in_one_line(script, args):
    refused(script, *args)
