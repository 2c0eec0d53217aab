"""Tests against oracles: brute force, closed forms, dense algebra, hand-worked cases. `bash run.sh test` runs them."""

import calendar
import functools
import gzip
import json
import math
import os
import shutil
import subprocess
import sys
import xml.etree.ElementTree
from argparse import Namespace
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
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
    generator = torch.Generator().manual_seed(seed)
    return torch.cat([torch.stack([torch.full((per_user,), u), torch.randperm(n_items, generator=generator)[:per_user].sort().values], 1)
                      for u in range(n_users)])


def split_data(seed=0):
    """train, valid, test of random_pairs: 6, 1 and 1 of each user's 8."""
    pairs = random_pairs(seed).view(N_USERS, 8, 2)
    return {"train": pairs[:, :6].reshape(-1, 2), "valid": pairs[:, 6], "test": pairs[:, 7], "n_users": N_USERS, "n_items": N_ITEMS}


def rigged(users, items):
    """An MF whose vectors are given."""
    model = backbones.MF(len(users), len(items), users.shape[1])
    model.embedding.data = torch.cat([users, items])
    return model


# ---------------------------------------------------------------------------------------------------------------------
# Metrics and ranking
# ---------------------------------------------------------------------------------------------------------------------


def test_metrics_hand_worked():
    hits, relevant = torch.tensor([[True, False, True, False], [False, False, False, False]]), torch.tensor([3, 1])
    assert backbones.recall(hits, relevant, 4).tolist() == [2 / 3, 0]
    assert backbones.precision(hits, relevant, 4).tolist() == [0.5, 0]
    assert backbones.hit_rate(hits, relevant, 4).tolist() == [1, 0]
    assert backbones.mrr(hits, relevant, 4).tolist() == [1, 0]
    dcg, ideal = 1 + 1 / 2, 1 + 1 / math.log2(3) + 1 / 2
    assert backbones.ndcg(hits, relevant, 4).tolist() == pytest.approx([dcg / ideal, 0])
    # the ideal list is cut at k: with 3 relevant and k = 2 it holds two
    assert backbones.ndcg(hits, relevant, 2).tolist() == pytest.approx([1 / (1 + 1 / math.log2(3)), 0])
    assert backbones.mrr(torch.tensor([[False, False, True]]), torch.tensor([1]), 3).item() == pytest.approx(1 / 3)


def brute_force_metrics(scores, data, k):
    rows = {}
    for u, own in enumerate(scores.tolist()):
        held = [i for v, i in data["test"].tolist() if v == u]
        if not held:
            continue
        seen = {i for name in ("train", "valid") for v, i in data[name].tolist() if v == u}
        ranked = sorted((i for i in range(len(own)) if i not in seen), key=lambda i: (-own[i], i))[:k]
        gains = [i in held for i in ranked]
        dcg = sum(g / math.log2(n + 2) for n, g in enumerate(gains))
        ideal = sum(1 / math.log2(n + 2) for n in range(min(k, len(held))))
        first = gains.index(True) + 1 if any(gains) else math.inf
        rows[u] = {"Recall": sum(gains) / len(held), "NDCG": dcg / ideal, "Precision": sum(gains) / k, "HitRate": float(any(gains)), "MRR": 1 / first}
    return rows


@pytest.mark.parametrize("rounded", [False, True])  # rounded scores are full of ties
def test_full_ranking_against_brute_force(rounded):
    data, generator = split_data(), torch.Generator().manual_seed(1)
    data["test"] = torch.cat([data["test"][2:], torch.tensor([[2, 29]]) if [2, 29] not in random_pairs().tolist() else data["test"][:0]])
    users, items = torch.randn(N_USERS, 4, generator=generator), torch.randn(N_ITEMS, 4, generator=generator)
    if rounded:
        users, items = users.round(), items.round()
    ids, values, skipped = evaluation.evaluate(rigged(users, items), data, "test", ks=(3, 10))
    assert skipped == 2 and ids.tolist() == list(range(2, N_USERS))
    for k in (3, 10):
        oracle = brute_force_metrics(users @ items.T, data, k)
        for name in evaluation.METRICS:
            assert values[f"{name}@{k}"].tolist() == pytest.approx([oracle[u][name] for u in ids.tolist()])


def test_top_k_breaks_ties_by_index():
    scores = torch.tensor([[1.0, 2, 2, 1, 2, 0, 1]])
    assert backbones.top_k(scores, 5).tolist() == [[1, 2, 4, 0, 3]]
    wide = torch.randint(0, 4, (50, 200), generator=torch.Generator().manual_seed(0)).float()
    oracle = [sorted(range(200), key=lambda i: (-row[i], i))[:20] for row in wide.tolist()]
    assert backbones.top_k(wide, 20).tolist() == oracle


def test_a_user_with_few_unseen_items_gets_no_seen_one():
    pairs = torch.tensor([[0, i] for i in range(8)])
    ranked = backbones.rank_unseen(rigged(torch.ones(1, 2), torch.ones(10, 2)), torch.tensor([0]), backbones.user_rows(pairs, 1), 5)
    assert ranked.tolist() == [[8, 9, -1, -1, -1]]


# ---------------------------------------------------------------------------------------------------------------------
# Backbones
# ---------------------------------------------------------------------------------------------------------------------


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
    model, a = backbones.build_backbone("lightgcn", N_USERS, N_ITEMS, 4, pairs, 3), dense_adjacency(pairs)
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


def test_ngcf_against_dense_oracle():
    pairs = random_pairs()
    model, a = backbones.build_backbone("ngcf", N_USERS, N_ITEMS, 4, pairs, 2).eval(), dense_adjacency(pairs)
    x = model.embedding
    hops = [x]
    for w1, w2 in zip(model.w1, model.w2):
        rows = []
        for node in range(len(x)):  # NGCF eq. 3-4, node by node
            message = x[node] @ w1.weight.T + w1.bias + w2.bias
            for other in range(len(x)):
                message = message + a[node, other] * (x[other] @ w1.weight.T + (x[other] * x[node]) @ w2.weight.T)
            rows.append(F.leaky_relu(message, 0.2))
        x = torch.stack(rows)
        hops.append(F.normalize(x, dim=1))
    assert torch.allclose(torch.cat(model()), torch.cat(hops, 1), atol=1e-5)


def test_ngcf_node_dropout_keeps_both_directions_of_an_edge():
    model = backbones.NGCF(N_USERS, N_ITEMS, 4, backbones.normalized_adjacency(random_pairs(), N_USERS, N_ITEMS), node_dropout=0.5)
    full, dropped = model.adjacency.to_dense(), model.dropped_adjacency().to_dense()
    assert torch.equal(dropped, dropped.T)
    kept = dropped != 0
    assert 0.3 < kept.sum() / (full != 0).sum() < 0.7 and torch.allclose(dropped[kept], full[kept] * 2)


def test_neumf_ranks_as_it_scores():
    model = backbones.build_backbone("neumf", N_USERS, N_ITEMS, 8, random_pairs())
    users, items = model()
    one_by_one = torch.stack([torch.stack([model.score(u, i) for i in items]) for u in users])
    assert torch.allclose(model.score_all(users, items), one_by_one, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Samplers
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.0, 0.75])
def test_sampler_is_exact(beta):
    pairs = torch.cat([random_pairs(), torch.tensor([[N_USERS, i] for i in range(N_ITEMS) if i not in (7, 20)])])  # a user with two unseen
    sampler = backbones.UnseenSampler(pairs, N_USERS + 1, N_ITEMS, beta)
    popularity = torch.bincount(pairs[:, 1], minlength=N_ITEMS).double()
    for user in (0, 5, N_USERS):
        seen = pairs[pairs[:, 0] == user, 1]
        draws = sampler(torch.full((400,), user), 100, torch.Generator().manual_seed(user)).flatten()
        assert not torch.isin(draws, seen).any()
        weight = (popularity + 1) ** beta
        weight[seen] = 0
        expected = weight / weight.sum() * len(draws)
        free = expected > 0
        chi2 = ((torch.bincount(draws, minlength=N_ITEMS) - expected)[free] ** 2 / expected[free]).sum()
        degrees = int(free.sum()) - 1
        assert chi2 < degrees + 4 * math.sqrt(2 * degrees) + 4  # mean + 4 standard deviations, and a little for few degrees


def test_a_user_who_has_seen_everything_is_refused():
    with pytest.raises(SystemExit) as error:
        backbones.UnseenSampler(torch.tensor([[0, 0], [0, 1], [1, 0]]), 2, 2)
    assert error.value.code == 2 and "user row 0" in error.value.message


def test_dns_and_ahns_against_brute_force():
    generator = torch.Generator().manual_seed(0)
    users, items = torch.randn(6, 4, generator=generator), torch.randn(N_ITEMS, 4, generator=generator)
    candidates, positives = torch.randint(N_ITEMS, (6, 5), generator=generator), torch.randint(N_ITEMS, (6,), generator=generator)
    score = rigged(users, items).score
    s = users @ items.T
    assert backbones.dns(score, users, items, candidates).tolist() == [max(c, key=lambda j: s[b, j]) for b, c in enumerate(candidates.tolist())]
    for _ in range(5):
        for b, j in enumerate(backbones.dns(score, users, items, candidates, top=2).tolist()):
            assert j in sorted(candidates[b].tolist(), key=lambda c: -s[b, c])[:2]
    penalty = torch.randn(6, 5, generator=generator)
    cleared = backbones.dns(score, users, items, candidates, penalty=penalty).tolist()
    for b, j in enumerate(cleared):  # the best of the scores in their own standard deviations, less the penalty
        own = s[b, candidates[b]].numpy() / np.std(s[b, candidates[b]].numpy(), ddof=1) - penalty[b].numpy()
        assert j == candidates[b, own.argmax()]
    assert cleared != backbones.dns(score, users, items, candidates).tolist()
    for b, j in enumerate(backbones.ahns(score, users, items, positives, candidates, alpha=1.0, beta=0.5, power=-2).tolist()):
        target = 0.5 / (s[b, positives[b]] + 1)
        assert j == min(candidates[b].tolist(), key=lambda c: abs(s[b, c] - target))


def test_mixgcf_against_loops():
    pairs, generator = random_pairs(), torch.Generator()
    model = backbones.build_backbone("lightgcn", N_USERS, N_ITEMS, 4, pairs, 2)
    user_layers, item_layers = model.layers()
    u, i = torch.tensor([0, 1, 2]), torch.tensor([3, 4, 5])
    candidates, users = torch.tensor([[6, 7, 8], [9, 10, 11], [12, 13, 14]]), model.pool(user_layers)[u]
    ours = backbones.mixgcf(users, item_layers, i, candidates, model.pool, generator.manual_seed(3))
    generator.manual_seed(3)
    hops = []
    for k in range(3):
        share = torch.rand((3, 1), generator=generator)
        rows = []
        for b in range(3):
            mixed = [share[b] * item_layers[i[b], k] + (1 - share[b]) * item_layers[c, k] for c in candidates[b]]
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
        ranked = sorted((i for i in range(N_ITEMS) if i not in seen), key=lambda i: (-scores[u, i].item(), i))
        assert mined[u].tolist() == ranked[1:6]


# ---------------------------------------------------------------------------------------------------------------------
# Losses, projector, mixing
# ---------------------------------------------------------------------------------------------------------------------


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
    assert llm_negatives.info_nce(z, c, positive, 0.3, ignore).item() == pytest.approx(total / 4, rel=1e-5)
    assert llm_negatives.info_nce(z, c, positive, 0.3).item() > total / 4  # the mask leaves terms out of the denominator


def test_alignment_against_direct_sum():
    generator = torch.Generator().manual_seed(0)
    z, i, m = (torch.randn(4, 5, generator=generator) for _ in range(3))
    ids, tau, total = [0, 1, 0, 2], 0.5, 0.0
    cos = lambda a, b: float(F.cosine_similarity(a, b, 0))
    for b in range(4):
        up = math.exp(cos(z[b], m[b]) / tau)
        rest = sum(math.exp(cos(z[b], m[c]) / tau) for c in range(4) if ids[c] != ids[b])
        total -= math.log(up / (up + rest + math.exp(cos(z[b], i[b]) / tau)))
    assert hnlmrec.alignment_loss(z, i, m, torch.tensor(ids), tau).item() == pytest.approx(total / 4, rel=1e-5)


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
    v, t = torch.randn(5, 3, generator=generator, requires_grad=True), torch.randn(5, 3, generator=generator, requires_grad=True)
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
    assert torch.allclose(semantic.user, F.normalize(torch.stack([x[1] + x[3], x[2]]), dim=1), atol=1e-6)
    users, items = semantic(torch.tensor([1]), torch.tensor([0, 2]))
    assert torch.allclose(users[0], items[1], atol=1e-6)  # a user with one item reads as that item


def test_text_start_against_svd():
    """The items' start is U S of their centred texts (signs are free), a user's the sum over the train items; a narrow text is padded."""
    torch.manual_seed(0)
    text, train = torch.randn(20, 9), torch.tensor([[0, 3], [0, 7], [1, 3], [3, 1], [3, 2], [3, 19]])
    start = hnlmrec.text_start(text, train, 4, 3, 0.1)
    u, s, _ = torch.linalg.svd((text - text.mean(0)).double(), full_matrices=False)
    items = u[:, :3] * s[:3]
    users = torch.stack([items[[3, 7]].sum(0), items[3], 0 * items[0], items[[1, 2, 19]].sum(0)])
    for ours, whole in ((start[4:], items), (start[:4], users)):
        whole = whole.flip(1) * 0.1 / whole.pow(2).mean().sqrt()
        assert torch.allclose(ours.double().abs(), whole.abs(), atol=1e-5) and float(ours.pow(2).mean().sqrt()) == pytest.approx(0.1)
    assert torch.allclose(hnlmrec.text_start(text, train, 4, 12, 0.1)[:, 9:], torch.zeros(24, 3))


def test_text_relevance_against_the_inverse_root_of_the_covariance():
    """Whitening by C^-1/2 turns the texts but keeps their cosines; here user by user and item by item, with numpy."""
    torch.manual_seed(0)
    text, train = torch.randn(20, 5) * torch.tensor([5, 1, 1, 1, 0.2]) + 3, torch.tensor([[0, 3], [0, 7], [1, 3], [2, 1], [2, 2], [2, 19]])
    centred = (text - text.mean(0)).double().numpy()
    values, vectors = np.linalg.eigh(centred.T @ centred)
    white = centred @ (vectors * values**-0.5) @ vectors.T
    unit = white / np.linalg.norm(white, axis=1, keepdims=True)
    users, everything = torch.arange(3), torch.arange(20).expand(3, -1)
    relevance = hnlmrec.Relevance(*hnlmrec.text_factors(text, train, 3))(users, everything)
    for u in range(3):
        fit = np.array([sum(unit[i] @ unit[j] for v, j in train.tolist() if v == u) for i in range(20)])
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
    """With a penalty far above any score the step takes, of the candidates, the one whose text fits the user least."""
    model, _, _, train = hnlmrec_parts(alpha=0.0, lambda1=0.0, sampler="dns")
    relevance = torch.randn(N_USERS, N_ITEMS, generator=torch.Generator().manual_seed(1))
    u, i = train.T
    candidates = backbones.UnseenSampler(train, N_USERS, N_ITEMS)(u, 6, torch.Generator().manual_seed(2))  # as sample draws them
    sample = backbones.make_sampler(model, "dns", train, m=6, penalty=lambda users, candidates: 1e6 * relevance[users[:, None], candidates])
    chosen = sample(u, i, torch.Generator().manual_seed(2))[-1]
    assert chosen.tolist() == [min(c, key=lambda j: float(relevance[user, j])) for user, c in zip(u.tolist(), candidates.tolist())]


def test_bpr_is_minus_log_sigmoid():
    p, n = torch.tensor([0.3, -2.0]), torch.tensor([0.1, 1.0])
    assert backbones.bpr_loss(p, n).item() == pytest.approx(-sum(math.log(1 / (1 + math.exp(-(a - b)))) for a, b in zip(p, n)) / 2)


def hnlmrec_parts(alpha, lambda1, sampler="dns", form=hnlmrec.HNLMRec, **more):
    """A small backbone, its projector, and the method (or the paper's form of it) around both."""
    torch.manual_seed(0)
    train = split_data()["train"]
    model, hidden = backbones.build_backbone("mf", N_USERS, N_ITEMS, 8, train), torch.randn(len(train), 16).half()
    projector = hnlmrec.Projector(hidden, 8, width=8)
    mined = backbones.mine_hard_negatives(model, train, 1, 5)
    table = hnlmrec.NegativeTable(train, train, N_USERS, N_ITEMS)
    semantic = hnlmrec.SemanticProjector(torch.randn(N_ITEMS, 16), train, N_USERS, 8)
    settings = {"alpha": alpha, "lambda1": lambda1, "lambda_s": 0.0, "tau_c": 0.2, "reg": 0.0,
                "k": 2, "align_rows": 16, "refresh": 1, "hinge": 0.0}
    settings = Namespace(**settings | more)
    sample = backbones.make_sampler(model, sampler, train, m=1)
    method = form(model, projector, semantic, sample, table, hidden, mined, train, settings)
    return model, projector, method, train


def test_bpr_gives_the_projector_no_gradient_and_alignment_does():
    model, projector, method, train = hnlmrec_parts(alpha=0.5, lambda1=0.0)
    method.loss(torch.arange(len(train)), torch.Generator().manual_seed(0))[0].backward()
    assert model.embedding.grad.abs().sum() > 0 and all(p.grad is None for p in projector.parameters())
    _, projector, method, train = hnlmrec_parts(alpha=0.5, lambda1=1.0)
    method.loss(torch.arange(len(train)), torch.Generator().manual_seed(0))[0].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for name, p in projector.named_parameters() if name != "key.bias")


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
    assert torch.allclose(F.cosine_similarity(only_z, z), torch.ones(3)) and torch.allclose(only_z.norm(dim=1), e.norm(dim=1))
    model, _, method, train = hnlmrec_parts(alpha=0.0, lambda1=0.0)
    rows, generator = torch.arange(len(train)), torch.Generator().manual_seed(5)
    ours = method.loss(rows, generator)[0]
    draw, generator = backbones.UnseenSampler(train, N_USERS, N_ITEMS), torch.Generator().manual_seed(5)
    hnlmrec.NegativeTable(train, train, N_USERS, N_ITEMS)(rows, 1, generator)  # the step draws the pair's z first
    j = draw(train[:, 0], 1, generator)[:, 0]
    users, items = model()
    s = users @ items.T
    assert ours.item() == pytest.approx(backbones.bpr_loss(s[train[:, 0], train[:, 1]], s[train[:, 0], j]).item(), rel=1e-6)


@pytest.mark.parametrize("sampler", ["rns", "pns", "dns", "mixgcf", "ahns"])
def test_without_z_the_step_is_that_of_its_sampler(sampler):
    """alpha 0 and no alignment: the same loss and gradient as the baseline's, with each sampler."""
    model, _, method, train = hnlmrec_parts(alpha=0.0, lambda1=0.0, sampler=sampler)
    rows, generator = torch.arange(len(train)), torch.Generator().manual_seed(5)
    loss = method.loss(rows, generator)[0]
    loss.backward()
    ours, model.embedding.grad = model.embedding.grad, None
    generator.manual_seed(5)
    hnlmrec.NegativeTable(train, train, N_USERS, N_ITEMS)(rows, 1, generator)  # the step draws the pair's z first
    baseline = backbones.make_step(model, sampler, train, reg=0.0, m=1)(rows, generator)[0]
    baseline.backward()
    assert loss.item() == pytest.approx(baseline.item(), rel=1e-6) and torch.allclose(ours, model.embedding.grad, atol=1e-7)


def test_nearest_items_are_the_nearest_unseen_ones():
    train, generator = split_data()["train"], torch.Generator().manual_seed(0)
    z, items, users = torch.randn(6, 4, generator=generator), torch.randn(N_ITEMS, 4, generator=generator), torch.tensor([0, 3, 3, 7, 9, 11])
    ours = backbones.nearest_items(z, users, items, backbones.pair_keys(train, N_ITEMS), 5)
    for row, (user, vector) in enumerate(zip(users.tolist(), z)):
        seen = set(train[train[:, 0] == user, 1].tolist())
        order = sorted((i for i in range(N_ITEMS) if i not in seen), key=lambda i: -float(F.cosine_similarity(vector, items[i], 0)))
        assert ours[row].tolist() == order[:5]


def pretend(monkeypatch, rank, world):
    """Let this process take itself for the rank-th of `world`."""
    monkeypatch.setattr(backbones, "rank", lambda: rank)
    monkeypatch.setattr(backbones, "world", lambda: world)


@pytest.mark.parametrize("kind", ["dns", "mixgcf", hnlmrec.HNLMRec, hnlmrec.PaperHNLMRec])
@pytest.mark.parametrize("n_rows", [71, 2])
def test_the_shares_of_three_processes_make_the_batch(kind, n_rows, monkeypatch):
    """The mean of three processes' gradients is one process's gradient, with uneven shares and with
    fewer rows than processes."""
    if isinstance(kind, str):
        train = split_data()["train"]
        model = backbones.build_backbone("lightgcn", N_USERS, N_ITEMS, 8, train)
        step, modules = backbones.make_step(model, kind, train, reg=0.1, m=5, n=2), [model]
    else:
        model, projector, method, train = hnlmrec_parts(0.3, 1.0, form=kind, lambda_s=0.5, reg=0.1)
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
    before = {name: p.clone() for name, p in [*projector.named_parameters(), *model.named_parameters()]}
    modules = {"backbone": model, "projector": projector}
    backbones.fit(modules, method.loss, len(train), lambda: 0.0, epochs=2, batch_size=32, lr=0.01,
                  eval_every=1, patience=9, seed=0)
    still = [name for name, p in [*projector.named_parameters(), *model.named_parameters()] if torch.equal(p, before[name])]
    assert set(still) <= {"key.bias"}  # softmax is blind to a constant in all keys


def test_fit_returns_the_best_state_not_the_last():
    model, _, method, train = hnlmrec_parts(alpha=0.0, lambda1=0.0)
    scores, states = iter([0.1, 0.5, 0.3]), []
    validate = lambda: states.append(model.embedding.detach().clone()) or next(scores)
    state, history = backbones.fit(
        {"backbone": model}, method.loss, len(train), validate, epochs=3, batch_size=32, lr=0.1,
        eval_every=1, patience=9, seed=0)
    assert torch.equal(state["backbone.embedding"], states[1]) and [h["valid_ndcg@20"] for h in history] == [0.1, 0.5, 0.3]


def test_a_loss_that_is_not_finite_stops_training_at_its_step():
    model, done = rigged(torch.ones(2, 2), torch.ones(3, 2)), []

    def step(rows, generator):
        done.append(rows)
        return model.embedding.sum() * (float("nan") if len(done) == 4 else 1.0), {"bpr": 1.5}

    with pytest.raises(backbones.SystemExit2) as error:
        backbones.fit({"backbone": model}, step, 6, lambda: 0.0, epochs=9, batch_size=2, lr=0.1, eval_every=1, patience=9, seed=0, label="mf")
    assert len(done) == 4 and "nan at step 4 (epoch 2, {'bpr': 1.5})" in str(error.value)
    assert model.embedding.isfinite().all()


def test_projector_attends_over_the_set():
    hidden = torch.randn(20, 16)
    projector = hnlmrec.Projector(hidden, 8, width=8)
    one, other = hidden[:6].view(2, 3, 16), hidden[:6].view(2, 3, 16).clone()
    other[0, 2] += 3
    a, b = projector(one), projector(other)
    assert not torch.allclose(a[0], b[0]) and torch.equal(a[1], b[1])  # slot 2 informs slot 0 of its own row alone
    swapped = one[:, [0, 2, 1]]
    assert torch.allclose(projector(swapped), a, atol=1e-6)  # a set: the order of the others does not matter
    alone = hnlmrec.Projector(hidden, 8, width=8, attention=False)
    assert torch.equal(alone(one), alone(other))


def test_negative_table_prefers_own_vectors_and_counts_the_rest():
    train, generated = torch.tensor([[0, 1], [0, 2], [1, 0], [1, 5]]), torch.tensor([[0, 2], [1, 0], [1, 5]])
    table = hnlmrec.NegativeTable(generated, train, 2, 6)
    assert table.own == 3
    chosen = table(torch.tensor([0, 1, 2, 3]), 4, torch.Generator().manual_seed(0))
    assert chosen[1:, 0].tolist() == [0, 1, 2] and chosen[0].tolist() == [0] * 4 and set(chosen[2:].flatten().tolist()) == {1, 2}
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
        seen, held = ({i for name in names for w, i in data[name].tolist() if w == u} for names in (["train"], ["valid", "test"]))
        order = sorted((i for i in range(N_ITEMS) if i not in seen), key=lambda i: -float(F.cosine_similarity(v, items[i], 0)))
        for k in hits:
            hits[k] += len(held & set(order[:k])) / k
    assert ours["FHNS@1"] == pytest.approx(hits[1] / len(pairs)) and ours["FHNS@10"] == pytest.approx(hits[10] / len(pairs))


def test_paired_bootstrap_against_the_normal_law():
    rng = np.random.default_rng(0)
    for shift in (0.0, 0.05, 0.12):
        d = rng.normal(shift, 1, 2000)
        mean, low, high, p = evaluation.paired_bootstrap(d, draws=20_000)
        error = d.std() / math.sqrt(len(d))
        assert mean == pytest.approx(d.mean()) and low == pytest.approx(mean - 1.96 * error, abs=0.1 * error) and high == pytest.approx(mean + 1.96 * error, abs=0.1 * error)
        assert p == pytest.approx(math.erfc(abs(mean) / error / math.sqrt(2)), abs=0.02)


def test_list_statistics_against_loops():
    data, generator = split_data(), torch.Generator().manual_seed(2)
    model = rigged(torch.randn(N_USERS, 4, generator=generator), torch.randn(N_ITEMS, 4, generator=generator))
    ours, scores = evaluation.list_statistics(model, data, 5), model.ego()[0] @ model.ego()[1].T
    count = [sum(i == j for _, j in data["train"].tolist()) for i in range(N_ITEMS)]
    order = sorted(range(N_ITEMS), key=lambda i: (count[i], i))
    quarter = {i: place * 4 // N_ITEMS for place, i in enumerate(order)}
    shown, hits, total = [0] * N_ITEMS, [0] * 4, [0] * 4
    for u in range(N_USERS):
        seen = {i for name in ("train", "valid") for v, i in data[name].tolist() if v == u}
        best = sorted((i for i in range(N_ITEMS) if i not in seen), key=lambda i: -scores[u, i].item())[:5]
        for i in best:
            shown[i] += 1
        for v, i in data["test"].tolist():
            if v == u:
                total[quarter[i]] += 1
                hits[quarter[i]] += i in best
    assert ours["item_recall"] == pytest.approx([h / n for h, n in zip(hits, total)])
    assert ours["coverage"] == pytest.approx(sum(n > 0 for n in shown) / N_ITEMS)
    assert ours["popularity"] == pytest.approx(sum(n * c for n, c in zip(shown, count)) / sum(shown))
    gini = sum(abs(a - b) for a in shown for b in shown) / (2 * N_ITEMS * sum(shown))
    assert ours["gini"] == pytest.approx(gini)


# ---------------------------------------------------------------------------------------------------------------------
# prepare
# ---------------------------------------------------------------------------------------------------------------------


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
    assert np.bincount(part[:30]).tolist() == [24, 3, 3] and np.bincount(part[30:]).tolist() == [2, 1, 1]
    assert (part == hnlmrec.split_pairs(user, item, np.zeros(34), "random", 0)).all()
    assert (part != hnlmrec.split_pairs(user, item, np.zeros(34), "random", 1)).any()
    last = hnlmrec.split_pairs(user, item, np.random.default_rng(0).permutation(34).astype(float), "last", 0)
    seconds = np.random.default_rng(0).permutation(34)
    for u in (0, 1):
        own = np.flatnonzero(user == u)[np.argsort(seconds[user == u])]
        assert last[own[-1]] == 2 and last[own[-2]] == 1 and (last[own[:-2]] == 0).all()


def write_lines(path, lines, encoding="utf-8"):
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding=encoding) as file:
        file.write("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


# format -> interactions file, its lines for (user a, item x, 4.5 stars, 2016-03-01 00:00 UTC, "fine"), items file, its lines for x
SAMPLES = {
    "table": ("r.csv.gz", ["user,item,rating,timestamp,text", 'a,x,4.5,1456790400,"fine, ""really"""'], "i.csv",
              ["item,title,keywords", 'x,"Sea, The",waves'], ("Sea, The", "waves"), 'fine, "really"'),
    "recbole": ("r.inter", ["user_id:token\titem_id:token\trating:float\ttimestamp:float", "a\tx\t4.5\t1456790400"], "i.item",
                ["item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq", "x\tSea\t1990\tDrama War"], ("Sea (1990)", "Drama War"), None),
    "ml-100k": ("u.data", ["a\tx\t4.5\t1456790400"], "u.item", ["x|Séa (1990)|01-Jan-1990||http|0|1|0|0|0|1" + "|0" * 13],
                ("Séa (1990)", "Action, Comedy"), None),
    "ml-1m": ("ratings.dat", ["a::x::4.5::1456790400"], "movies.dat", ["x::Séa (1990)::Action|Drama"], ("Séa (1990)", "Action, Drama"), None),
    "ml-latest": ("ratings.csv", ["userId,movieId,rating,timestamp", "a,x,4.5,1456790400"], "movies.csv",
                  ["movieId,title,genres", 'x,"Sea, The (1990)",Action|Drama'], ("Sea, The (1990)", "Action, Drama"), None),
    "amazon2018": ("r.json.gz", [{"reviewerID": "a", "asin": "x", "overall": 4.5, "unixReviewTime": 1456790400, "reviewText": "fine"}],
                   "m.json.gz", [{"asin": "x", "title": "Sea <b>Game</b>", "brand": "B", "category": ["Toys", "Games", "Board"], "description": ["Fun.", "Long"]}],
                   ("Sea Game", "B. Games, Board. Fun., Long"), "fine"),
    "amazon2023": ("r.jsonl.gz", [{"user_id": "a", "parent_asin": "x", "rating": 4.5, "timestamp": 1456790400000, "text": "fine"}],
                   "m.jsonl", [{"parent_asin": "x", "title": "Sea", "store": "B", "categories": ["Toys", "Games"], "description": []}],
                   ("Sea", "B. Toys, Games"), "fine"),
    "yelp": ("review.json", [{"user_id": "a", "business_id": "x", "stars": 4.5, "date": "2016-03-01 00:00:00", "text": "fine"}],
             "business.json", [{"business_id": "x", "name": "Sea", "city": "Rome", "categories": "Food, Fish"}], ("Sea", "Rome. Food, Fish"), "fine"),
}


@pytest.mark.parametrize("fmt", list(SAMPLES))
def test_readers_hand_worked(fmt, tmp_path):
    name, lines, meta, meta_lines, fields, text = SAMPLES[fmt]
    encoding = "latin-1" if fmt in ("ml-1m", "ml-100k") else "utf-8"
    rows = list(hnlmrec.interactions(write_lines(tmp_path / name, lines), fmt))
    assert rows == [("a", "x", 4.5, 1456790400.0, text)]
    items = hnlmrec.read_items(write_lines(tmp_path / meta, meta_lines, encoding), fmt, ["w", "x"])
    assert items[1] == {"raw": "x", "title": fields[0], "text": fields[1], "known": True}
    assert items[0] == {"raw": "w", "title": "Item w", "text": "", "known": False}


def test_presets_filter_as_the_paper_does(tmp_path):
    """Toys: stars >= 4, 2015-01-01 <= day < 2018-01-01, 10-core; flags given beside the preset win."""
    day = lambda text: calendar.timegm(datetime.fromisoformat(text).timetuple())
    rows = [{"reviewerID": f"u{u}", "asin": f"i{i}", "overall": 4.0, "unixReviewTime": day("2016-01-01")} for u in range(12) for i in range(11)]
    rows += [{"reviewerID": "u0", "asin": "late", "overall": 5.0, "unixReviewTime": day("2018-01-01")}] * 12
    rows += [{"reviewerID": f"u{u}", "asin": "early", "overall": 5.0, "unixReviewTime": day("2014-12-31")} for u in range(12)]
    rows += [{"reviewerID": f"u{u}", "asin": "bad", "overall": 3.0, "unixReviewTime": day("2016-01-01")} for u in range(12)]
    rows += [{"reviewerID": f"u{u}", "asin": "edge", "overall": 5.0, "unixReviewTime": day("2015-01-01")} for u in range(12)]
    rows += [{"reviewerID": "few", "asin": f"i{i}", "overall": 5.0, "unixReviewTime": day("2016-01-01")} for i in range(9)]
    path = write_lines(tmp_path / "Toys.json.gz", rows)
    output = cli("hnlmrec.py", "prepare", "--run", tmp_path / "a", "--preset", "toys", "--reviews", path)
    assert "users 22,338" in output and "users 12   items 12   pairs 144" in output  # the published figures stand beside ours
    output = cli("hnlmrec.py", "prepare", "--run", tmp_path / "b", "--preset", "toys", "--reviews", path, "--k-core", 9, "--min-rating", 3)
    assert "users 13   items 13   pairs 165" in output


def test_reviews_are_those_of_train_pairs_alone(tmp_path):
    rows = [{"reviewerID": f"u{u}", "asin": f"i{i}", "overall": 5.0, "unixReviewTime": i, "reviewText": f"u{u} on i{i}"} for u in range(6) for i in range(10)]
    run = tmp_path / "run"
    cli("hnlmrec.py", "prepare", "--run", run, "--format", "amazon2018", "--reviews", write_lines(tmp_path / "r.json", rows), "--reviews-per-user", 99)
    data = backbones.load_data(run)
    for u, line in enumerate((run / "users.jsonl").read_text().splitlines()):
        user = json.loads(line)
        own = sorted(data["train"][data["train"][:, 0] == u, 1].tolist())
        assert sorted(user["reviews"]) == sorted(f"{user['raw']} on i{i}" for i in own) and len(own) == 8


def test_a_split_of_ones_own_is_taken_as_it_is(tmp_path):
    parts = {"train": [("a", "x"), ("b", "y")], "valid": [("a", "y")], "test": [("b", "x"), ("a", "z")]}
    flags = []
    for name, pairs in parts.items():
        flags += [f"--{name}-file", write_lines(tmp_path / f"{name}.tsv", ["user\titem", *map("\t".join, pairs)])]
    run = tmp_path / "run"
    cli("hnlmrec.py", "prepare", "--run", run, *flags)
    tensors, _ = backbones.load_tensors(run / "data.safetensors", "prepare")
    for name, pairs in parts.items():
        assert {("ab"[u], "xyz"[i]) for u, i in tensors[name].tolist()} == set(pairs)
    write_lines(tmp_path / "test.tsv", ["user\titem", "a\tx"])
    assert "another part" in refused("hnlmrec.py", "prepare", "--run", tmp_path / "other", *flags)


def test_of_repeated_pairs_the_latest_counts_and_ids_do_not_depend_on_the_files_order(tmp_path):
    lines = [f"{u}\t{i}\t5\t{t}" for t, (u, i) in enumerate((u, i) for u in range(5) for i in range(5))]
    again = [*lines, "0\t0\t5\t999"]
    for name, rows in (("a", again), ("b", again[::-1])):
        path = write_lines(tmp_path / "r.tsv", ["user\titem\trating\ttimestamp", *rows])
        cli("hnlmrec.py", "prepare", "--run", tmp_path / name, "--reviews", path, "--split", "last")
    one, two = (backbones.load_tensors(tmp_path / name / "data.safetensors", "prepare")[0] for name in "ab")
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert [0, 0] in one["test"].tolist() and len(torch.cat(list(one.values()))) == 25


# ---------------------------------------------------------------------------------------------------------------------
# The LLM step, on a tiny random Llama
# ---------------------------------------------------------------------------------------------------------------------


def byte_tokenizer(folder):
    """Save a tokenizer of one token a byte."""
    tokenizer = Tokenizer(models.BPE(vocab={c: n for n, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="!").save_pretrained(folder)


@pytest.fixture(scope="session")
def tiny_llm(tmp_path_factory):
    """A folder with a random Llama of two layers and a byte tokenizer, built here from a config."""
    folder = tmp_path_factory.mktemp("tiny llm")  # a space in the name, on purpose
    byte_tokenizer(folder)
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=256, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, max_position_embeddings=1024, eos_token_id=0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def encoder(tiny_llm):
    """(llm, prompt, soft_tokens, user vectors, item vectors) on the tiny Llama."""
    llm = llm_negatives.load_llm(tiny_llm, LlamaModel, torch.float32, "cpu")
    torch.manual_seed(0)
    user, item = torch.randn(5, 6), torch.randn(7, 6)
    soft_tokens = llm_negatives.SoftTokens(user, item, 32, llm_negatives.embedding_norm(llm), 2)
    return llm, llm_negatives.Prompt(llm_negatives.load_tokenizer(tiny_llm), 2), soft_tokens, user, item


USER_TEXTS = ["likes films", "", "likes long slow films about the sea", "x", "comedies"]
ITEM_TEXTS = ["Jaws", "Toy Story. Animation", "A", "Titanic. Drama, Romance", "Alien", "Big", "Heat"]
OWNER = torch.tensor([0, 2, 2, 1, 4, 3, 0])


def encode_all(encoder, user=None, item=None):
    llm, prompt, soft_tokens, users, items = encoder
    return llm_negatives.encode(llm, prompt, soft_tokens, USER_TEXTS, users if user is None else user, ITEM_TEXTS,
                                items if item is None else item, OWNER)


def test_encode_equals_the_whole_prompt_run_alone(encoder):
    llm, prompt, soft_tokens, users, items = encoder
    ours = encode_all(encoder)
    whole = llm_negatives.encode_whole(llm, prompt, soft_tokens, USER_TEXTS, users, ITEM_TEXTS, items, OWNER)
    assert torch.allclose(ours, whole, rtol=1e-3, atol=1e-5)
    in_parts = llm_negatives.encode(llm, prompt, soft_tokens, USER_TEXTS, users, ITEM_TEXTS, items, OWNER, batch=2,
                                    instruction=llm_negatives.run_piece(llm, [prompt.shared])[2])
    assert torch.allclose(ours, in_parts, rtol=1e-3, atol=1e-5)
    for row, owner in enumerate(OWNER.tolist()):
        ids = prompt.shared + prompt.user(USER_TEXTS[owner]) + prompt.item(ITEM_TEXTS[row])
        x = llm.get_input_embeddings()(torch.tensor(ids).clamp(min=0))
        places = [n for n, token in enumerate(ids) if token == llm_negatives.SOFT]
        assert len(places) == 4 and places[-1] == len(ids) - 1  # two soft tokens for the item, two for the user, the last is read
        x[places[:2]], x[places[2:]] = soft_tokens(1, items[row]), soft_tokens(0, users[owner])
        alone = llm(inputs_embeds=x[None]).last_hidden_state[0, -1]
        assert F.cosine_similarity(ours[row], alone, 0) > 0.99999 and torch.allclose(ours[row], alone, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("config", [Qwen2Config, Qwen3Config, MistralConfig, GemmaConfig, Gemma2Config, Gemma3TextConfig])
def test_other_families_of_llms(config, tmp_path):
    """Each family loads with its first layers alone, encodes with a shared prefix as without, and takes LoRA's gradient and
    soft tokens of the norm that its own tokens have where they enter the first layer."""
    byte_tokenizer(tmp_path)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config(vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
                                            num_key_value_heads=2, head_dim=8, max_position_embeddings=1024)).save_pretrained(tmp_path)
    llm = llm_negatives.load_llm(tmp_path, AutoModel, torch.float32, "cpu", layers=2)
    assert len(llm.layers) == 2
    prompt, users, items = llm_negatives.Prompt(llm_negatives.load_tokenizer(tmp_path)), torch.randn(5, 6), torch.randn(7, 6)
    soft_tokens = llm_negatives.SoftTokens(users, items, 32, llm_negatives.embedding_norm(llm))
    entering = []
    handle = llm.layers[0].register_forward_pre_hook(lambda module, args, kwargs: entering.append((args or (kwargs["hidden_states"],))[0]), with_kwargs=True)
    llm(torch.arange(300)[None])
    llm(inputs_embeds=soft_tokens(0, users)[None, :, 0])
    handle.remove()
    tokens, soft = (x[0].norm(dim=1).mean().item() for x in entering)
    assert soft == pytest.approx(tokens, rel=1e-5)
    ours, whole = (encode(llm, prompt, soft_tokens, USER_TEXTS, users, ITEM_TEXTS, items, OWNER)
                   for encode in (llm_negatives.encode, llm_negatives.encode_whole))
    assert torch.allclose(ours, whole, rtol=1e-3, atol=1e-5)
    llm = llm_negatives.get_peft_model(llm, llm_negatives.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    llm_negatives.encode(llm, prompt, soft_tokens, USER_TEXTS, users, ITEM_TEXTS, items, OWNER).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in llm.parameters() if p.requires_grad)
    lm = llm_negatives.load_llm(tmp_path, AutoModelForCausalLM, torch.float32, "cpu")
    together, _ = llm_negatives.write_texts(lm, llm_negatives.load_tokenizer(tmp_path), ["a longer request", "b"], 3)
    assert together == [llm_negatives.write_texts(lm, llm_negatives.load_tokenizer(tmp_path), [text], 3)[0][0] for text in ("a longer request", "b")]


DEFAULT_LLM = Path(os.environ.get("LLM", HERE / "assets" / "SmolLM2-135M-Instruct"))


@pytest.mark.skipif(not DEFAULT_LLM.is_dir(), reason=f"{DEFAULT_LLM} is not there; `bash run.sh` makes it")
def test_encode_equals_the_whole_prompt_on_the_default_llm():
    llm = llm_negatives.load_llm(DEFAULT_LLM, AutoModel, torch.float32, "cpu", layers=8)
    torch.manual_seed(0)
    users, items, prompt = torch.randn(5, 64), torch.randn(7, 64), llm_negatives.Prompt(llm_negatives.load_tokenizer(DEFAULT_LLM))
    soft_tokens = llm_negatives.SoftTokens(users, items, llm.config.hidden_size, llm_negatives.embedding_norm(llm))
    with torch.no_grad():
        ours, whole = (encode(llm, prompt, soft_tokens, USER_TEXTS, users, ITEM_TEXTS, items, OWNER)
                       for encode in (llm_negatives.encode, llm_negatives.encode_whole))
    assert F.cosine_similarity(ours, whole).min() > 0.999
    assert ((ours - whole).abs().amax(1) / whole.abs().amax(1)).max() < 1e-3


@pytest.mark.parametrize("read", [True, False])
def test_item_texts_are_means_over_their_own_tokens(encoder, read):
    llm, prompt = encoder[:2]
    ours = llm_negatives.encode_items(llm, prompt, ITEM_TEXTS, read, batch=3)
    for row, text in enumerate(ITEM_TEXTS):
        ids = torch.tensor([prompt.ids(text)])
        hidden = (llm(ids).last_hidden_state if read else llm.get_input_embeddings().weight[ids])[0]
        alone = hidden[1:].mean(0) if len(hidden) > 1 else hidden[0]
        assert torch.allclose(ours[row], alone, rtol=1e-3, atol=1e-5)


def test_soft_tokens_reach_their_own_rows_alone(encoder):
    users, items = encoder[3:]
    base, other_user, other_item = encode_all(encoder), users.clone(), items.clone()
    other_user[2] += 1
    other_item[4] += 1
    changed = (encode_all(encoder, user=other_user) - base).abs().amax(1) > 1e-6
    assert changed.tolist() == (OWNER == 2).tolist()
    changed = (encode_all(encoder, item=other_item) - base).abs().amax(1) > 1e-6
    assert changed.tolist() == [n == 4 for n in range(7)]


def test_soft_tokens_have_the_norm_of_token_embeddings(encoder):
    llm, _, soft_tokens, users, _ = encoder
    expected = llm.get_input_embeddings().weight.norm(dim=1).mean()
    assert torch.allclose(soft_tokens(0, users).norm(dim=-1), expected.expand(5, 2))


def sft_task(encoder):
    data = split_data()
    torch.manual_seed(1)
    model = backbones.build_backbone("mf", N_USERS, N_ITEMS, 6, data["train"])
    users, items = model.ego()
    texts = ([f"user {u}" for u in range(N_USERS)], [f"item {i}" * (1 + i % 3) for i in range(N_ITEMS)])
    return llm_negatives.SftTask(data, model, {"user": users.detach(), "item": items.detach()}, texts, 2, 6, 0), texts, data


def test_mixgcf_targets_against_direct_sum(encoder):
    data = split_data()
    torch.manual_seed(1)
    model = backbones.build_backbone("mf", N_USERS, N_ITEMS, 6, data["train"])
    users, items = (v.detach() for v in model())
    task = llm_negatives.SftTask(data, model, {"user": users, "item": items}, ([""] * N_USERS, [""] * N_ITEMS), 2, 6, 0, "mixgcf")
    rows, z = torch.tensor([0, 1, 20]), torch.randn(3, 6)
    torch.manual_seed(4)
    ours = task.loss(z, rows, 0.3)
    torch.manual_seed(4)
    u, i = data["train"][rows].T
    some = task.mined[u].gather(1, torch.randint(5, (3, 8)))
    targets = backbones.mixgcf(users[u], items[:, None], i, some, model.pool) - items.mean(0)
    total = 0.0
    for b in range(3):
        others = [c for k, c in enumerate(items - items.mean(0)) if k not in task.mined[u[b]].tolist()]
        e = [math.exp(float(F.cosine_similarity(z[b], c, 0)) / 0.3) for c in [*others, *targets]]
        total -= math.log(e[len(others) + b] / sum(e))
    assert ours.item() == pytest.approx(total / 3, rel=1e-5)


def test_training_and_generation_encode_alike(encoder):
    llm, prompt, soft_tokens = encoder[:3]
    task, texts, data = sft_task(encoder)
    rows = torch.tensor([50, 3, 4, 17, 51])
    together, in_order = (encode(task, llm, prompt, soft_tokens, rows) for encode in (llm_negatives.encode_rows, functools.partial(llm_negatives.encode_rows, batch=2)))
    u, i = data["train"][rows].T
    alone = torch.cat([llm_negatives.encode_whole(llm, prompt, soft_tokens, [texts[0][u[r]]], task.cf["user"][u[r]][None], [texts[1][i[r]]], task.cf["item"][i[r]][None],
                                                  torch.tensor([0])) for r in range(5)])  # each pair by itself
    generated = llm_negatives.encode_pairs(llm, prompt, soft_tokens, task.cf, texts, data["train"][rows], encoder=functools.partial(llm_negatives.encode, batch=2))
    assert all(torch.allclose(alone, other, rtol=1e-3, atol=1e-5) for other in (together, in_order, generated))
    # what the ablations take away: the mean instead of a vector, an empty profile
    for drop, texts_of, cf in (("user vector", texts, {**task.cf, "user": task.cf["user"].mean(0).expand(N_USERS, -1)}), ("user profile", ([""] * N_USERS, texts[1]), task.cf)):
        without = llm_negatives.encode_rows(task, llm, prompt, soft_tokens, rows, drop)
        assert torch.allclose(without, llm_negatives.encode_pairs(llm, prompt, soft_tokens, cf, texts_of, data["train"][rows]), atol=1e-5)
        assert not torch.allclose(without, together, atol=1e-3)


def test_sft_holds_back_users_and_pairs_and_reads_no_held_out_pair(encoder):
    task, _, data = sft_task(encoder)
    learned, held = set(task.rows.tolist()), [set(rows.tolist()) for rows in task.held.values()]
    assert not learned & held[0] and not learned & held[1]
    new = {data["train"][row, 0].item() for row in held[1]}
    assert not new & {data["train"][row, 0].item() for row in learned}
    train_keys = {tuple(pair) for pair in data["train"].tolist()}
    assert not train_keys & {(u, i) for u, own in enumerate(task.mined.tolist()) for i in own}
    # hit rate and floors, by loops
    rows = torch.arange(20)
    z = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))
    hits = [max(range(N_ITEMS), key=lambda i: F.cosine_similarity(v, task.candidates[i], 0).item()) in task.mined[data["train"][r, 0]].tolist()
            for r, v in zip(rows, z)]
    assert task.hit_rate(z, rows) == pytest.approx(sum(hits) / 20)
    best = max(sum(i in task.mined[data["train"][r, 0]].tolist() for r in rows) for i in range(N_ITEMS)) / 20
    assert task.floors(rows) == pytest.approx((5 / N_ITEMS, best))


def test_grouped_batches_hold_each_row_once():
    users = random_pairs()[:, 0]
    rows = torch.arange(5, 90)
    batches = llm_negatives.grouped_batches(users, rows, 3, 4, torch.Generator().manual_seed(0))
    assert sorted(torch.cat(batches).tolist()) == rows.tolist()
    assert all(len(batch) <= 12 and len(users[batch].unique()) <= 4 for batch in batches)


def test_first_sentence():
    assert llm_negatives.first_sentence(" One.\nTwo! And a half") == "One. Two!"
    assert llm_negatives.first_sentence("no end") == "no end"


# ---------------------------------------------------------------------------------------------------------------------
# The real programs, from a ratings file to the report
# ---------------------------------------------------------------------------------------------------------------------


PROGRAMS = {"hnlmrec.py": hnlmrec, "backbones.py": backbones, "llm_negatives.py": llm_negatives, "eval.py": evaluation}


def cli(script, *args):
    """Run one of our programs as a user does; returns its output."""
    done = subprocess.run([sys.executable, str(HERE / script), *map(str, args)], capture_output=True, text=True, check=False, cwd=HERE)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def refused(script, *args):
    """Run a program's main() here, without the seconds a new process needs; it must end with status 2 -> its one line."""
    with pytest.raises(SystemExit) as error:
        PROGRAMS[script].main([str(arg) for arg in args])
    assert error.value.code == 2 and "\n" not in error.value.message
    return error.value.message


@pytest.fixture(scope="session")
def raw(tmp_path_factory):
    """A ratings file and an items file: two groups of users, each with its own half of the items."""
    folder, rng = tmp_path_factory.mktemp("raw data"), np.random.default_rng(0)
    lines = ["user\titem\trating\ttimestamp"]
    for u in range(30):
        for n, i in enumerate(rng.permutation(20)[:12] + 20 * (u % 2)):
            lines.append(f"u{u}\ti{i}\t{4 + n % 2}\t{n}")
        lines.append(f"u{u}\ti{(u * 7) % 40}\t1\t99")  # a low rating of an item, to be left out
    (folder / "interactions.tsv").write_text("\n".join(lines) + "\n")
    (folder / "items.tsv").write_text("item\ttitle\tkeywords\n" + "".join(f"i{i}\tFilm {i}\tgroup {i // 20}\n" for i in range(40)))
    return folder


@pytest.fixture(scope="session")
def finished(raw, tiny_llm, tmp_path_factory):
    """A run folder in which every step has been run."""
    run = tmp_path_factory.mktemp("my runs") / "one"
    budget = ["--run", run, "--dim", 8, "--epochs", 4, "--eval-every", 2]
    cli("hnlmrec.py", "prepare", "--run", run, "--reviews", raw / "interactions.tsv", "--meta", raw / "items.tsv")
    cli("backbones.py", "pretrain", *budget, "--sampler", "dns")
    cli("llm_negatives.py", "profile", "--run", run, "--llm", tiny_llm, "--new-tokens", 4, "--history", 2, "--llm-rows", 10)
    cli("llm_negatives.py", "finetune", "--run", run, "--llm", tiny_llm, "--llm-layers", 0, "--mine-first", 1, "--mine-last", 5,
        "--warmup-pairs", 64, "--steps", 3, "--dtype", "fp32")
    cli("llm_negatives.py", "generate", "--run", run, "--llm", tiny_llm, "--pairs-per-user", 3, "--shard-pairs", 40)
    cli("hnlmrec.py", "train", *budget, "--mine-first", 1, "--mine-last", 5, "--alpha", 0.3)
    cli("backbones.py", "pretrain", *budget, "--out", "model-rns.safetensors")
    cli("eval.py", "report", "--run", run)
    return run


def test_pipeline_makes_every_file(finished):
    metrics = json.loads((finished / "metrics.json").read_text())
    assert set(metrics["methods"]) == {"hnlmrec", "rns"}
    assert all(0 <= row["NDCG@20"] <= 1 for row in metrics["methods"].values())
    assert "HNLMRec, generated" in (finished / "report.md").read_text()
    assert len(list(finished.glob("negatives-0*.safetensors"))) == 3
    tensors, _ = backbones.load_tensors(finished / "negatives-00000.safetensors", "generate")
    assert tensors["hidden"].dtype == torch.float16 and tensors["hidden"].shape == (len(tensors["pairs"]), 32)
    data = backbones.load_data(finished)
    assert set(map(tuple, tensors["pairs"].tolist())) <= set(map(tuple, data["train"].tolist()))
    assert "recommended:" in cli("eval.py", "recommend", "--run", finished, "--user", "u3", "--k", 3)


def test_trace_follows_a_pair(finished):
    data = backbones.load_data(finished)
    items = [json.loads(line) for line in (finished / "items.jsonl").read_text().splitlines()]
    users = [json.loads(line) for line in (finished / "users.jsonl").read_text().splitlines()]
    shard, _ = backbones.load_tensors(finished / "negatives-00000.safetensors", "generate")
    u, i = shard["pairs"][5].tolist()
    out = cli("hnlmrec.py", "trace", "--run", finished, "--user", users[u]["raw"], "--item", items[i]["raw"])
    cf, _ = backbones.load_tensors(finished / "cf.safetensors", "pretrain")
    assert f"e_u·e_i {cf['user'][u] @ cf['item'][i]:.3f}" in out and f"norm {shard['hidden'][5].float().norm():.3f}" in out
    model, _, _ = backbones.load_model(finished / "cf.safetensors", "pretrain", data)
    assert items[int(backbones.mine_hard_negatives(model, data["train"], 1, 5)[u, 0])]["title"] in out.split("4. mined")[1]
    prompt = out.split("5. prompt")[1].split("6. generated")[0]
    assert llm_negatives.INSTRUCTION in prompt and f"Item: {items[i]['title']}." in prompt and prompt.strip().endswith("User vector:[e_u]")
    assert "projector 0.0000" not in out and "backbone 0.0000" not in out
    held = data["test"][data["test"][:, 0] == u][0, 1]
    trace = ["trace", "--run", finished, "--user", users[u]["raw"]]
    assert "no model of" in refused("hnlmrec.py", *trace, "--model", "model-rns.safetensors")
    assert "no train pair" in refused("hnlmrec.py", *trace, "--item", items[held]["raw"])


def test_clear_reaches_the_step_and_its_control_shuffles_the_texts(finished, monkeypatch):
    """build hands dns the relevance of the LLM's texts, times --clear; with `--control cleared`
    that of the same rows in another order."""
    data, seen, penalties = backbones.load_data(finished), [], []
    settings = backbones.load_tensors(finished / "model-hnlmrec.safetensors", "train")[1]["settings"]
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
        patch.setattr(hnlmrec, "train", seen.append)
        for flags in ((), ("--paper",), ("--paper", "--alpha", "0.01", "--dim", "64")):
            hnlmrec.main(["train", "--run", "x", *flags])
    plain, paper, mixed = map(vars, seen)
    assert {name: paper[name] for name in hnlmrec.PAPER} == hnlmrec.PAPER
    assert {name for name in plain if plain[name] != paper[name]} <= {*hnlmrec.PAPER, "paper"}
    assert mixed == paper | {"alpha": 0.01, "dim": 64}
    words = evaluation.OURS["HNLMRec, as in the paper"].split()
    with monkeypatch.context() as patch:  # the row of the comparison holds the preset's values
        patch.setattr(hnlmrec, "train", seen.append)
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


def test_compare_and_sweep(copied, tiny_llm, capsys):
    """Cells by real commands; a second call keeps them; the tables hold every method; the pictures are XML."""
    flags = ["--run", str(copied), "--llm", str(tiny_llm), "--seeds", "2", "--flags", "--dim 8 --epochs 2 --eval-every 1"]
    run = lambda *words: evaluation.main([words[0], *flags, *words[1:]])
    monkey = {"DNS": "--sampler dns", "HNLMRec": "--mine-first 1 --mine-last 5"}
    evaluation.BASELINES, evaluation.OURS, old = {"DNS": monkey["DNS"]}, {"HNLMRec": monkey["HNLMRec"] + " --clear 0.3 --control cleared"}, (evaluation.BASELINES, evaluation.OURS)
    try:
        run("compare")
        first = capsys.readouterr().out
        assert first.count("$ ") == 4 and "| HNLMRec |" in first and "2 seeds of training" in first
        result = json.loads((copied / "compare.json").read_text())
        cell = result["cells"]["DNS | lightgcn"]
        model, _, _ = backbones.load_model(next((copied / "compare").glob("dns-lightgcn-seed1-*.safetensors")), "", data := backbones.load_data(copied))
        assert cell["NDCG@20"][1] == pytest.approx(float(evaluation.evaluate(model, data)[1]["NDCG@20"].mean()))
        run("compare")
        assert "$ " not in capsys.readouterr().out
        run("compare", "--methods", "DNS --m 2;HNLMRec", "--out", "other")
        assert capsys.readouterr().out.count("$ ") == 2  # DNS alone, with flags of its own
        assert "DNS is there twice" in refused("eval.py", "compare", *flags, "--methods", "DNS;DNS --m 2")
        run("sweep", "--flag", "alpha", "--values", "0,0.5", "--flags", f"--dim 8 --epochs 2 --eval-every 1 --sampler rns {monkey['HNLMRec']}")
        assert capsys.readouterr().out.count("$ hnlmrec.py train") == 4
        run("sweep", "--flag", "m", "--values", "2", "--method", monkey["DNS"])
        assert capsys.readouterr().out.count("$ backbones.py pretrain") == 2
        assert (copied / "sweep-alpha.md").exists()
    finally:
        evaluation.BASELINES, evaluation.OURS = old
    for picture in ("compare-lightgcn.svg", "sweep-alpha.svg"):
        xml.etree.ElementTree.parse(copied / picture)


def test_generated_vectors_are_the_fine_tuned_encoders(finished, tiny_llm):
    """The adapter is really in: the shard equals encode() with adapter/ loaded, and differs from the bare LLM."""
    cf, texts = backbones.load_tensors(finished / "cf.safetensors", "pretrain")[0], llm_negatives.load_profiles(finished)
    shard, _ = backbones.load_tensors(finished / "negatives-00000.safetensors", "generate")
    with torch.no_grad():
        for lora in (True, False):
            llm, prompt, soft_tokens, head, _ = llm_negatives.load_sft(finished, "sft", tiny_llm, "cpu", lora)
            hidden = llm_negatives.encode_pairs(llm, prompt, soft_tokens, cf, texts, shard["pairs"])
            assert torch.allclose(hidden, shard["hidden"].float(), atol=2e-3) == lora
            if lora:
                assert torch.allclose(head(shard["hidden"].float()), shard["vector"].float(), atol=1e-2)


def test_a_finished_step_is_skipped_and_a_changed_one_refused(finished, raw):
    before = (finished / "cf.safetensors").read_bytes()
    budget = ["--run", finished, "--dim", 8, "--epochs", 4, "--eval-every", 2, "--sampler", "dns"]
    assert "skip:" in cli("backbones.py", "pretrain", *budget)
    assert "seed=0, now seed=1" in refused("backbones.py", "pretrain", *budget, "--seed", 1)
    assert "wrote" in cli("backbones.py", "pretrain", *budget, "--export", "vectors.safetensors")
    whole, alone = load_file(finished / "cf.safetensors"), load_file(finished / "vectors.safetensors")
    assert set(alone) == {"user", "item"} and all(torch.equal(whole[name], alone[name]) for name in alone)
    assert "made with" in refused("hnlmrec.py", "prepare", "--run", finished, "--reviews", raw / "interactions.tsv", "--seed", 3)
    assert (finished / "cf.safetensors").read_bytes() == before


def test_generation_goes_on_where_it_was_killed(finished, tiny_llm):
    shards = sorted(finished.glob("negatives-0*.safetensors"))
    whole = [path.read_bytes() for path in shards]
    shards[1].unlink()
    again = ["generate", "--run", finished, "--llm", tiny_llm, "--pairs-per-user", 3, "--shard-pairs", 40]
    assert "missing" not in cli("llm_negatives.py", *again)
    assert [path.read_bytes() for path in shards] == whole
    assert "skip:" in cli("llm_negatives.py", *again)


TUNE = ["--llm-layers", 0, "--mine-first", 1, "--mine-last", 5, "--warmup-pairs", 64, "--dtype", "fp32", "--save-every", 2, "--steps", 4]


def tuned(run, name):
    """All that fine-tuning learned: the tensors of NAME.safetensors and of its adapter."""
    adapter = load_file(run / llm_negatives.adapter_folder(name) / "adapter_model.safetensors")
    return {**backbones.load_tensors(run / f"{name}.safetensors", "finetune")[0], **adapter}


def tune(run, llm, name, *flags):
    llm_negatives.main(list(map(str, ["finetune", "--run", run, "--llm", llm, "--name", name, *TUNE, *flags])))
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
    capsys.readouterr()
    again = tune(copied, tiny_llm, "sft-cut")
    assert "going on after step 2 of 4" in capsys.readouterr().out and not list(copied.glob("*partial*"))
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_checkpointing_and_parts_do_not_change_the_step(copied, tiny_llm):
    flags = ["--steps", 2, "--lora-dropout", 0, "--profile-dropout", 0]
    plain = tune(copied, tiny_llm, "sft-plain", *flags)
    for name, more in (("sft-checkpointing", ["--checkpointing"]), ("sft-parts", ["--micro-pairs", 3])):
        other = tune(copied, tiny_llm, name, *flags, *more)
        # Adam divides by the gradient's size: an entry whose gradient is rounding noise may move either way by lr = 5e-4
        assert all(torch.allclose(plain[key], other[key], atol=1.1e-3) for key in plain)
        close = torch.cat([(plain[key] - other[key]).abs().flatten() < 1e-5 for key in plain])
        assert close.float().mean() > 0.99


def test_two_processes_do_what_one_does(copied, tiny_llm):
    """Gradients averaged, profiles and shards shared out: the same update as one process with the same batch, the same files."""
    one = tune(copied, tiny_llm, "sft-one")
    two = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--", str(HERE / "llm_negatives.py")]
    run = ["--run", str(copied), "--llm", str(tiny_llm)]
    for args in (["profile", *run, "--new-tokens", 4, "--history", 2, "--llm-rows", 10, "--batch-size", 3, "--out", "profiles-two.jsonl"],
                 ["finetune", *run, "--name", "sft-two", *TUNE],
                 ["generate", *run, "--pairs-per-user", 3, "--shard-pairs", 40, "--out", "negatives-two"]):
        done = subprocess.run([*two, *map(str, args)], capture_output=True, text=True, check=False, cwd=HERE, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stdout + done.stderr
    lines = [sorted((copied / name).read_text().splitlines()) for name in ("profiles.jsonl", "profiles-two.jsonl")]
    assert lines[0] == lines[1]
    both = tuned(copied, "sft-two")
    assert all(torch.allclose(one[key], both[key], atol=1.1e-3) for key in one)
    assert torch.cat([(one[key] - both[key]).abs().flatten() < 1e-5 for key in one]).float().mean() > 0.99
    for path in copied.glob("negatives-0*"):
        a, b = (backbones.load_tensors(p, "generate")[0] for p in (path, path.with_name(path.name.replace("negatives", "negatives-two"))))
        assert torch.equal(a["pairs"], b["pairs"]) and torch.allclose(a["hidden"], b["hidden"], atol=2e-3)


def test_variants_of_fine_tuning_reach_the_recommender(copied, tiny_llm, capsys):
    """No CF vectors in the prompt; MixGCF's targets; template profiles: each makes negatives of its own."""
    run = ["--run", copied, "--llm", tiny_llm]
    cli("llm_negatives.py", "profile", *run, "--profiles", "template", "--out", "profiles-template.jsonl")
    made, steps = {}, ["finetune --soft-tokens 0 --name sft-nocf " + " ".join(map(str, [*TUNE, "--steps", 1])), "generate --sft sft-nocf --out negatives-nocf"]
    for count in (2, 0):  # as `eval.py compare` makes them: once
        evaluation.make_negatives(copied, "negatives-nocf", steps, tiny_llm, 2)
        assert capsys.readouterr().out.count("$ ") == count
    made["nocf"] = backbones.load_negatives(copied, "negatives-nocf", backbones.file_digest(copied / "data.safetensors"))["hidden"]
    for name, flags in (("mixgcf", ["--mine", "mixgcf"]), ("template", ["--profiles", "profiles-template.jsonl"])):
        tune(copied, tiny_llm, f"sft-{name}", *flags, "--steps", 1)
        llm_negatives.main(list(map(str, ["generate", *run, "--sft", f"sft-{name}", "--out", f"negatives-{name}", "--pairs-per-user", 2])))
        made[name] = backbones.load_negatives(copied, f"negatives-{name}", backbones.file_digest(copied / "data.safetensors"))["hidden"]
    assert not torch.equal(made["nocf"], made["mixgcf"]) and not torch.equal(made["template"], made["mixgcf"])
    (copied / "profiles.jsonl").rename(copied / "old.jsonl")
    assert "profiles.jsonl: no such file" in refused("llm_negatives.py", "generate", *run, "--out", "negatives-new")


def test_wrong_adapters_and_negatives_are_refused(finished, tiny_llm, tmp_path):
    run = tmp_path / "copy"
    shutil.copytree(finished, run)
    other = tmp_path / "other llm"
    shutil.copytree(tiny_llm, other)
    torch.manual_seed(9)
    LlamaForCausalLM.from_pretrained(tiny_llm).apply(lambda m: m.reset_parameters() if isinstance(m, torch.nn.Linear) else None).save_pretrained(other)
    generate = ["generate", "--run", run, "--pairs-per-user", 3, "--shard-pairs", 40]
    for path in run.glob("negatives-*"):
        path.unlink()
    assert "another LLM" in refused("llm_negatives.py", *generate, "--llm", other)
    (run / "adapter" / "adapter_model.safetensors").write_bytes(b"\0" * 100)
    assert "adapter" in refused("llm_negatives.py", *generate, "--llm", tiny_llm)
    for path in finished.glob("negatives-*"):
        shutil.copy(path, run)
    tensors, meta = backbones.load_tensors(run / "data.safetensors", "prepare")
    tensors["valid"], tensors["test"] = tensors["test"], tensors["valid"]
    backbones.save_tensors(run / "data.safetensors", tensors, meta)
    budget = ["--run", run, "--dim", 8, "--epochs", 4, "--eval-every", 2, "--out", "new.safetensors"]
    assert "another split" in refused("hnlmrec.py", "train", *budget)
    assert "another data" in refused("eval.py", "report", "--run", run)
    (run / "cf.safetensors").write_bytes((run / "cf.safetensors").read_bytes()[:500])
    assert "not a readable file" in refused("llm_negatives.py", "finetune", "--run", run, "--llm", tiny_llm, "--force")


def test_two_runs_with_one_seed_are_identical(finished, tmp_path):
    run = tmp_path / "twin"
    shutil.copytree(finished, run)
    (run / "model-hnlmrec.safetensors").unlink()
    cli("hnlmrec.py", "train", "--run", run, "--dim", 8, "--epochs", 4, "--eval-every", 2, "--mine-first", 1, "--mine-last", 5, "--alpha", 0.3)
    a, b = (backbones.load_tensors(folder / "model-hnlmrec.safetensors", "train")[0] for folder in (finished, run))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_training_over_two_processes_is_that_of_one(finished, tmp_path):
    """Mining, training and validation shared out: the model file that one process writes. Adam
    divides a gradient by its own size, so where it is next to nothing, rounding may turn an update
    over (lr 1e-3 a step)."""
    run = tmp_path / "two"
    shutil.copytree(finished, run)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", 2, "--"]
    command += [HERE / "hnlmrec.py", "train", "--run", run, "--out", "model-two.safetensors"]
    command += ["--dim", 8, "--epochs", 4, "--eval-every", 2, "--mine-first", 1, "--mine-last", 5]
    done = subprocess.run(
        [*map(str, command), "--alpha", "0.3"], capture_output=True, text=True, check=False,
        cwd=HERE, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("wrote") == 1
    one, meta = backbones.load_tensors(run / "model-hnlmrec.safetensors", "train")
    two, other = backbones.load_tensors(run / "model-two.safetensors", "train")
    assert one.keys() == two.keys()
    apart = {name: (one[name].float() - two[name].float()).abs().flatten() for name in one}
    assert max(float(d.max()) for d in apart.values()) < 9e-3
    assert (torch.cat(list(apart.values())) < 1e-5).float().mean() > 0.99
    for a, b in zip(meta["history"], other["history"]):
        assert a["valid_ndcg@20"] == pytest.approx(b["valid_ndcg@20"]) and a["epoch"] == b["epoch"]


def test_mining_and_profiles_do_not_read_valid_or_test(finished, tmp_path):
    """Swap valid and test for other pairs: profiles' requests, mined items and CF vectors stay the same."""
    data = backbones.load_data(finished)
    model, _, _ = backbones.load_model(finished / "cf.safetensors", "pretrain", data)
    texts = llm_negatives.load_profiles(finished)
    other = {**data, "valid": data["valid"][:1], "test": data["test"][:1]}
    users, items = (v.detach() for v in model())
    one, two = (llm_negatives.SftTask(d, model, {"user": users, "item": items}, texts, 1, 5, 0) for d in (data, other))
    assert torch.equal(one.mined, two.mined) and torch.equal(one.rows, two.rows)


@pytest.mark.parametrize("lines, message", [
    (["user\trating", "a\t5"], "no column 'item'"),
    (["user\titem\trating", "a\tb\tfive"], "line 2"),
    (["user\titem\trating", "a\tb"], "line 2 has 2 fields"),
    (["user\titem\trating", "a\tb\t5"], "nothing is left"),
    (["user\titem"] + [f"{u}\t{i}" for u in "abcdef" for i in range(6)], "no rating column"),
])
def test_bad_ratings_files(tmp_path, lines, message):
    path = tmp_path / "bad.tsv"
    path.write_text("\n".join(lines) + "\n")
    assert message in refused("hnlmrec.py", "prepare", "--run", tmp_path / "run", "--reviews", path)
    assert not (tmp_path / "run" / "data.safetensors").exists()


def test_truncated_and_unwritable_files_are_named(copied, tmp_path):
    """Every kind of file cut in half is refused by the step that reads it, in one line that names it; a failed write names its file
    too and leaves nothing behind."""
    for name, script, args in (("data.safetensors", "backbones.py", ["pretrain"]), ("cf.safetensors", "hnlmrec.py", ["train", "--out", "new.safetensors"]),
                               ("negatives-00000.safetensors", "hnlmrec.py", ["train"]), ("negatives-items.safetensors", "hnlmrec.py", ["train"]),
                               ("model-hnlmrec.safetensors", "eval.py", ["report"]), ("items.jsonl", "eval.py", ["recommend", "--user", "u1"]),
                               ("sft.safetensors", "llm_negatives.py", ["generate"])):
        whole = (copied / name).read_bytes()
        (copied / name).write_bytes(whole[: len(whole) // 2])
        assert name in refused(script, *args, "--run", copied)
        (copied / name).write_bytes(whole)
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError) as error:  # a folder stands where the file should go
        backbones.write_atomic(tmp_path / "taken", b"x")
    assert error.value.filename == str(tmp_path / "taken") and [p.name for p in tmp_path.iterdir() if p.name.endswith("tmp")] == []


def test_a_cut_off_download_is_refused(tmp_path):
    path = write_lines(tmp_path / "r.json.gz", [{"reviewerID": f"u{n}", "asin": "x", "overall": 5.0} for n in range(500)])
    path.write_bytes(path.read_bytes()[:-200])
    message = refused("hnlmrec.py", "prepare", "--run", tmp_path / "run", "--format", "amazon2018", "--reviews", path)
    assert str(path) in message and "cannot be read to its end" in message


def test_a_user_with_two_items_is_refused(tmp_path):
    path = tmp_path / "few.tsv"
    path.write_text("user\titem\trating\n" + "".join(f"a\t{i}\t5\n" for i in range(5)) + "b\t1\t5\nb\t2\t5\n")
    assert "a split needs 3" in refused("hnlmrec.py", "prepare", "--run", tmp_path / "run", "--reviews", path, "--k-core", 1)


@pytest.mark.parametrize("script, args", [
    ("hnlmrec.py", ["train", "--run", "x", "--alpha", "1.5"]), ("hnlmrec.py", ["train", "--run", "x", "--tau-c", "0"]),
    ("hnlmrec.py", ["train", "--run", "x", "--clear", "0.3", "--sampler", "rns"]), ("hnlmrec.py", ["train", "--run", "x", "--control", "cleared"]),
    ("hnlmrec.py", ["train", "--run", "x", "--hinge", "0.3"]),
    ("hnlmrec.py", ["train", "--run", "x", "--paper", "--lambda-s", "0.1"]),
    ("backbones.py", ["pretrain", "--run", "x", "--epochs", "-1"]), ("backbones.py", ["pretrain", "--run", "x", "--nonsense"]),
    ("backbones.py", ["pretrain", "--run", "x", "--n", "20"]), ("eval.py", ["report", "--run", "no such folder"]),
    ("llm_negatives.py", ["finetune", "--run", "x", "--tau-s", "-1"]), ("llm_negatives.py", ["profile", "--run", "no such folder"]),
])
def test_bad_flags_end_in_one_line(script, args):
    refused(script, *args)
