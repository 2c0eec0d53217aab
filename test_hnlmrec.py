"""Tests against oracles: brute force, closed forms, dense algebra, hand-worked cases.
`bash run.sh test` runs them."""

import ast
import builtins
import contextlib
import dis
import gzip
import io
import itertools
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree
from argparse import Namespace
from collections import Counter
from functools import cache, partial
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

# no test needs a network, nor a GPU: a look-up of a model that is not there would take 20 s
os.environ.update(HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="", TZ="Asia/Tokyo")
time.tzset()  # far from UTC, which is the zone of a date that names none

import peft
import transformers
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedTokenizerFast

import backbones
import eval as evaluation
import hnlmrec
import llm_negatives

torch.set_num_threads(1)  # all is tiny: a second thread costs more than it brings
HERE = Path(__file__).resolve().parent
PROGRAMS = {"hnlmrec.py": hnlmrec, "backbones.py": backbones, "llm_negatives.py": llm_negatives,
            "eval.py": evaluation}
N_USERS, N_ITEMS = SIZE = 12, 30


def random_pairs():
    """(N, 2) pairs without repeats, sorted by user, then item."""
    generator = seeded()
    items = [torch.randperm(N_ITEMS, generator=generator)[:8].sort().values for _ in range(N_USERS)]
    return torch.stack([torch.arange(N_USERS).repeat_interleave(8), torch.cat(items)], 1)


def split_data():
    """train, valid, test of random_pairs: 6, 1 and 1 of each user's 8."""
    pairs = random_pairs().view(N_USERS, 8, 2)
    return {"train": pairs[:, :6].reshape(-1, 2), "valid": pairs[:, 6], "test": pairs[:, 7],
            "n_users": N_USERS, "n_items": N_ITEMS}


def rigged(users, items):
    """An MF whose vectors are given."""
    model = backbones.MF(len(users), len(items), users.shape[1])
    model.embedding.data = torch.cat([users, items])
    return model


def rigged_scores():
    """A recommender of random vectors, and its scores (U, I)."""
    users, items = torch.randn(N_USERS + N_ITEMS, 4, generator=seeded(2)).split(SIZE)
    return rigged(users, items), users @ items.T


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(autouse=True)
def seed_of_all():
    """Each test draws the same numbers whatever ran before it."""
    torch.manual_seed(0)


def by_score(scores, seen):
    """The items not in `seen`, the highest score first, equal ones by id: brute force."""
    return sorted({*range(len(scores))} - {*seen}, key=lambda i: (-float(scores[i]), i))


def items_of(pairs, user):
    return set(pairs[pairs[:, 0] == user, 1].tolist())


def message_of(call, *args, **more):
    """The one line with which a call ends the program."""
    with pytest.raises(SystemExit) as error:
        call(*args, **more)
    message = error.value.message  # printable: without a line end; nothing is quoted at length
    assert error.value.code == message and message.isprintable() and len(message) < 2000
    return message


def cli(script, *args):
    """A program's main() run here, without the seconds of a new process -> what it prints."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        PROGRAMS[script].main([str(arg) for arg in args])
    return out.getvalue()


def assert_same_loss(ours, oracle, learned, rel=1e-5, atol=1e-6, **more):
    """Two losses are the same, and their gradients -> the first's gradients."""
    assert ours.item() == pytest.approx(oracle.item(), rel=rel)
    one, other = (torch.autograd.grad(x, learned, allow_unused=True, retain_graph=True)
                  for x in (ours, oracle))
    for a, b in zip(one, other):
        assert (a is b is None) or torch.allclose(a, b, atol=atol, **more)
    return one


refused = partial(message_of, cli)
alike = partial(torch.allclose, rtol=1e-3, atol=1e-5)
eval_main, eval_refused = partial(cli, "eval.py"), partial(refused, "eval.py")
run_prepare = partial(cli, "hnlmrec.py", "prepare")
refusal = partial(refused, "hnlmrec.py", "prepare")


# ---- backbones.py: ranking and metrics -----------------------------------------------------------
def test_metrics_hand_worked():
    hits, relevant = torch.eye(4)[[0, 3, 2]].bool(), torch.tensor([3, 1, 1])
    hits[:, 3], hits[0, 2] = False, True  # at places 1 and 3 of 3 relevant, none of 1, at 3 of 1
    second = 1 / math.log2(3)
    for name, k, values in (("recall", 4, [2 / 3, 0, 1]), ("precision", 4, [1 / 2, 0, 1 / 4]),
                            ("hit_rate", 4, [1, 0, 1]), ("mrr", 4, [1, 0, 1 / 3]),
                            ("ndcg", 4, [(1 + 1 / 2) / (1 + second + 1 / 2), 0, 1 / 2]),
                            # the ideal list is cut at k: with 3 relevant and k = 2 it holds two
                            ("ndcg", 2, [1 / (1 + second), 0, 0]), ("recall", 2, [1 / 3, 0, 0])):
        assert getattr(evaluation, name)(hits, relevant, k).tolist() == pytest.approx(values)


def test_full_ranking_against_brute_force():
    data, (model, scores) = split_data(), rigged_scores()
    second = next(i for i in range(N_ITEMS) if [2, i] not in random_pairs().tolist())
    test = torch.cat([data["test"][2:], torch.tensor([[2, second]])])  # users 0 and 1 have none
    seen = backbones.user_rows(data["train"], N_USERS)
    users, hits, relevant, _ = backbones.ranking_hits(model, test, seen, 10)
    assert users.tolist() == list(range(2, N_USERS)) and relevant.tolist() == [2] + [1] * 9
    ranked = [by_score(scores[u], items_of(data["train"], u))[:10] for u in users.tolist()]
    oracle = [[i in items_of(test, u) for i in row] for u, row in zip(users.tolist(), ranked)]
    assert hits.tolist() == oracle and any(map(any, oracle))
    # validation: the mean over all users, or over the same few each time
    ndcg = backbones.ndcg(*backbones.ranking_hits(model, data["valid"], seen, 20)[1:3], 20)
    some = ndcg[torch.randperm(N_USERS, generator=seeded())[:5]]
    for n, mean in ((None, ndcg.mean()), (5, some.mean())):
        assert backbones.validation(model, data, users=n)() == pytest.approx(float(mean))


def test_top_k_breaks_ties_by_index_and_a_ranking_in_parts_is_the_ranking():
    order = torch.rand(50, 200, generator=seeded()).argsort(1).float()
    # many are equal; the 20th and 21st alone; some of the 20 alone; all but 15, left out or not
    few = order.where(order > 184, torch.tensor([0, -torch.inf])[torch.arange(50) % 2, None])
    for wide in (order % 4, order + (order == 179), (order / 10).floor(), few, few.double()):
        ranked = [by_score(row, ())[:20] for row in wide.tolist()]
        assert backbones.top_k(wide, 20).tolist() == ranked
    assert backbones.top_k(order[:, :3] % 2, 5).tolist() == [
        by_score(row, ()) for row in (order[:, :3] % 2).tolist()]
    table, users = torch.randn(7, 9, generator=seeded()), torch.arange(7)
    seen = backbones.user_rows(torch.tensor([[2, 4], [6, 0]]), 7)
    whole, parts = (backbones.best_unseen(lambda rows: table[rows], users, seen, 3, 9, cells)
                    for cells in (2**23, 20))
    assert torch.equal(whole, parts) and 4 not in whole[2]


def test_nearest_items_and_rankings_hold_no_seen_item_even_when_few_are_left():
    train, users = split_data()["train"], torch.tensor([0, 3, 3, 7, 9, 11])
    z, items = (torch.randn(n, 4, generator=seeded(n)) for n in (6, N_ITEMS))
    near = hnlmrec.nearest_items(z, users, items, backbones.user_rows(train, N_USERS), 5)
    for row, user, vector in zip(near.tolist(), users.tolist(), z):
        assert row == by_score(F.cosine_similarity(vector[None], items), items_of(train, user))[:5]
    few = backbones.user_rows(torch.tensor([[0, i] for i in range(8)]), 1)
    model, modes = rigged(torch.ones(1, 2), torch.ones(10, 2)), []
    model.register_forward_hook(lambda model, *_: modes.append(model.training))
    assert backbones.rank_unseen(model, users[:1], few, 5).tolist() == [[8, 9, -1, -1, -1]]
    assert modes == [False] and model.training  # without dropout; then as it was


@pytest.mark.parametrize("n_items, most, flags, band", [
    (1008, 300, (0, 0), (200, 300)), (14, 10, (0, 0), (3, 4)), (14, 12, (0, 0), (3, 4)),
    (99, 30, (5, 60), (5, 60)), (99, 30, (0, 15), (15, 15)), (99, 30, (40, 0), (40, 40))])
def test_mined_negatives_are_the_band_which_is_a_share_of_the_catalogue(
        n_items, most, flags, band, capsys):
    train = torch.tensor([[0, 0]] * most + [[1, 0]])  # one of two users has seen most
    data = {"n_items": n_items, "train": train}
    assert backbones.mining_band(data, *flags) == band
    assert ("1 users have fewer than 4 unseen" in capsys.readouterr().out) == (most == 12)
    assert f"above {n_items}" in message_of(backbones.mining_band, data, 1, n_items + 1)
    train = split_data()["train"]
    model = backbones.build_backbone("lightgcn", N_USERS, N_ITEMS, 8, train)
    mine = partial(backbones.mine_hard_negatives, model)
    mined, scores = mine(train, torch.arange(N_USERS), 2, 6), model()[0] @ model()[1].T
    for u in range(N_USERS):
        assert mined[u].tolist() == by_score(scores[u].detach(), items_of(train, u))[1:6]
    # who has fewer unseen items: the last ones, in order; of too few, the first again
    few = torch.tensor([[0, i] for i in range(N_ITEMS - 4)])
    best = by_score(scores[0].detach(), items_of(few, 0))
    assert mine(few, torch.tensor([0]), 3, 5).tolist() == [best[1:]]
    assert mine(few, torch.tensor([0]), 1, 6).tolist() == [[best[0]] * 2 + best]
    everything = torch.tensor([[2, i] for i in range(N_ITEMS)])
    assert "user row 2: has all" in message_of(mine, everything, torch.arange(4), 2, 5)


def test_bands_are_mined_once_and_for_those_alone_who_are_asked_for(monkeypatch):
    train, ranked = split_data()["train"], []
    model = backbones.build_backbone("mf", N_USERS, N_ITEMS, 8, train)
    mined = backbones.mine_hard_negatives(model, train, torch.arange(N_USERS), 2, 6)
    bands = backbones.Bands(model, train, 2, 6)
    monkeypatch.setattr(model, "scores", lambda users, scores=model.scores: (
        ranked.extend(users.tolist()), scores(users))[1])
    for users in ([3, 1, 3], [1], [0, 3, 5]):
        assert torch.equal(bands[torch.tensor(users)], mined[users])
    assert ranked == [1, 3, 0, 5]


# ---- Backbones -----------------------------------------------------------------------------------
def dense_adjacency(pairs):
    a = torch.zeros(N_USERS + N_ITEMS, N_USERS + N_ITEMS)
    a[pairs[:, 0], N_USERS + pairs[:, 1]] = 1
    a += a.T.clone()
    scale = a.sum(1).clamp(min=1) ** -0.5  # a row without an edge is 0 whatever its scale
    return scale[:, None] * a * scale


@pytest.mark.parametrize("name", ["lightgcn", "ngcf"])
def test_graphs_against_dense_oracles(name):
    pairs = random_pairs()[:40]  # the last users have no edge
    model, a = backbones.build_backbone(name, *SIZE, 4, pairs, 3).eval(), dense_adjacency(pairs)
    graph, x = backbones.normalized_adjacency(pairs, *SIZE).to_dense(), model.embedding
    assert torch.allclose(graph, a) and torch.equal(graph, graph.T)
    oracle = sum([x, a @ x, a @ a @ x, a @ a @ a @ x]) / 4
    if name == "ngcf":
        hops = [x]
        for w1, w2 in zip(model.w1, model.w2):  # NGCF eq. 3-4, summed over all pairs of nodes
            own, affinity = x @ w1.weight.T, (x[:, None] * x) @ w2.weight.T  # (n, d), (to, from, d)
            messages = (a[..., None] * (own + affinity)).sum(1)
            x = F.leaky_relu(own + w1.bias + w2.bias + messages, 0.2)
            hops.append(F.normalize(x, dim=1))
        oracle = torch.cat(hops, 1)
    ours, weight = torch.cat([*model()]), torch.randn(oracle.shape)
    assert torch.allclose(ours, oracle, atol=1e-5)
    assert torch.allclose(model.pool(model.layers()[0]), ours[:N_USERS], atol=1e-6)
    if name == "ngcf":  # weights of Glorot and Bengio; a tenth of each message is dropped
        most = max(linear.weight.abs().max().item() for linear in [*model.w1, *model.w2])
        assert most == pytest.approx(math.sqrt(6 / 8), rel=0.2)
        dropped = (model.train().layers()[0][:, 1:] == 0).double().mean().item()
        assert dropped == pytest.approx(0.1, abs=0.06) and model.eval()
    assert_same_loss((ours * weight).sum(), (oracle * weight).sum(), [*model.parameters()],
                     rel=1e-4, atol=1e-5)
    # a subclass of LightGCN that joins the hops in its own way is heard
    form = type("Last", (type(model),), {"pool": lambda self, layers: layers[..., -1, :]})
    model.__class__ = form
    assert torch.allclose(torch.cat([*model()]), torch.cat(model.layers())[:, -1], atol=1e-6)


@pytest.mark.parametrize("name", ["lightgcn", "mf"])
def test_vectors_made_of_texts_against_dense_algebra(name):
    """AlphaRec's form: the mean of the train items' texts, an MLP, hops, norm 1; no free vector."""
    pairs, text = random_pairs()[:40], torch.randn(N_ITEMS, 6) * 3 + 1  # the last users have none
    text[:, 5] = 2.0  # alike for all: says nothing
    model = backbones.build_backbone(name, *SIZE, 4, pairs, 2, True, text)
    standard, has = (text - text.mean(0)) / text.std(0).clamp(min=1e-3), torch.zeros(SIZE)
    has[tuple(pairs.T)] = 1
    rows = torch.cat([has @ standard / has.sum(1, keepdim=True).clamp(min=1), standard])
    first, _, second = model.texts.mlp
    e = F.leaky_relu(rows @ first.weight.T + first.bias) @ second.weight.T + second.bias
    a = dense_adjacency(pairs)
    e = (e + a @ e + a @ a @ e) / 3 if name == "lightgcn" else e
    assert torch.allclose(torch.cat([*model()]), F.normalize(e, dim=1), atol=1e-5)
    assert all(part.startswith("texts.mlp") for part in model.state_dict())
    step = backbones.make_softmax_step(model, pairs, reg=0.1, n=20, tau=0.5)
    step(torch.arange(9), seeded(3))[0].backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize("name", ["lightgcn", "ngcf", "mf", "neumf"])
def test_scores_are_those_of_pairs_propagated_once_in_eval_mode_and_never_stale(name):
    train, calls, users = split_data()["train"], [], torch.tensor([7, 0, 7])
    model, other = (backbones.build_backbone(name, *SIZE, 4, train, 2) for _ in "12")
    if name == "neumf":  # whose MLP would see next to nothing
        model.embedding.data *= 100
    of_users, items = model()
    one_by_one = [[model.score(u, i).item() for i in items] for u in of_users]
    assert torch.allclose(model.score_all(of_users, items), torch.tensor(one_by_one), atol=1e-6)
    if name == "neumf":  # starts as MF plus an MLP of the other halves
        (u, v), (i, j), (one, _, two, _) = of_users.split(2, 1), items.split(2, 1), model.mlp
        pairs = torch.cat([v.repeat_interleave(N_ITEMS, 0), j.repeat(N_USERS, 1)], 1)
        deep = F.relu(F.relu(pairs @ one.weight.T + one.bias) @ two.weight.T + two.bias)
        oracle = u @ i.T + deep.sum(1).view(SIZE)
        assert torch.allclose(torch.tensor(one_by_one), oracle, atol=1e-5)
    model.register_forward_hook(lambda *_: calls.append(1))

    def checked(before=None):
        vectors, items = model()
        ours = model.scores(users)
        assert torch.equal(ours, model.score_all(vectors[users], items))
        assert before is None or not torch.equal(ours, before)
        return ours

    model.scores(users), model.scores(users)
    assert len(calls) == 2  # in train mode each time: dropout, and parameters that move
    before = model.eval() and checked().clone()
    calls.clear()
    model.scores(users).fill_(0)  # a new tensor each time
    assert torch.equal(model.scores(users), before) and not calls
    model.load_state_dict(other.state_dict())
    before, step = checked(before), backbones.make_step(model, "rns", train, reg=0)
    fit_mf(model, step, lambda: 0.0, len(train), epochs=1, batch_size=64)
    model.eval()
    checked(before)
    # float64 stands for another device: the graph moves with the model, and is not saved
    single, double = model()[0], model.to(torch.float64)()[0]
    assert double.dtype == torch.float64 and torch.allclose(double.float(), single, atol=1e-6)
    assert "adjacency" not in model.state_dict()


# ---- Closed forms --------------------------------------------------------------------------------
def dense_item_knn(x, shrink, idf):
    x = x * np.log(N_ITEMS / (1 + x.sum(1, keepdims=True))) if idf else x
    norm = np.sqrt(np.outer((x**2).sum(0), (x**2).sum(0))) + shrink
    return x.T @ x / np.where(norm > 0, norm, 1) * (1 - np.eye(N_ITEMS))


def dense_rp3beta(x, alpha, beta, unit):
    """Step by step: from item i to each of its users, from there to each of the user's items."""
    to_user, to_item = (x / np.maximum(x.sum(n, keepdims=True), 1) for n in (0, 1))
    walk = (to_user.T**alpha @ to_item**alpha) * (1 - np.eye(N_ITEMS))
    walk /= np.maximum(x.sum(0), 1) ** beta
    return walk / np.maximum(walk.sum(1, keepdims=True), 1e-9) if unit else walk


def highest(table, k):
    """The k highest of each row, equal ones by column; all else 0."""
    place = table.argsort(stable=True, dim=1, descending=True)[:, :k]
    return torch.zeros_like(table).scatter(1, place, table.gather(1, place))


def dense_ease(x, ridge):
    p = np.linalg.inv(x.T @ x + ridge * np.eye(x.shape[1]))
    return -p / np.diag(p) * (1 - np.eye(len(p)))


@pytest.mark.parametrize("ours, oracle, constants", [
    (backbones.item_knn, dense_item_knn, (7.0, 0)), (backbones.item_knn, dense_item_knn, (0.0, 1)),
    (backbones.rp3beta, dense_rp3beta, (0.6, 0.3, 0)), (backbones.ease, dense_ease, (3.0,)),
    (backbones.rp3beta, dense_rp3beta, (0.6, 0.3, 1)), (backbones.popularity, None, ())])
def test_closed_forms_against_dense_algebra(ours, oracle, constants, monkeypatch):
    """Weights, scores and ranking; a user and an item without a train pair are no trouble."""
    train, x = split_data()["train"], np.zeros((N_USERS, N_ITEMS))
    train = train[(train[:, 0] != 3) & (train[:, 1] != 5)]
    x[tuple(train.T.numpy())] = 1
    weight, users = ours(train, N_USERS, N_ITEMS, *constants), torch.tensor([3, 0, 7, 0])
    model, everyone = backbones.ItemWeights(weight, train, N_USERS), torch.arange(N_USERS)
    lonely = torch.tensor([[0, 0], [1, 0]])  # a catalogue of one item
    one = backbones.ItemWeights(ours(lonely, 2, 1, *constants), lonely, 2)
    assert one.scores(torch.arange(2)).shape == (2, 1)
    weightless = ours(torch.tensor([[0, 0], [0, 1]]), 1, 3, *constants)  # by idf: ln(3 / 3)
    assert weightless.to_dense().isfinite().all()
    scores = np.tile(x.sum(0), (N_USERS, 1))  # popularity's: equal counts go by id
    if oracle:
        dense = oracle(x, *constants)
        assert (weight.layout is torch.strided) == (oracle is dense_ease)
        assert weight.to_dense().numpy() == pytest.approx(dense, abs=1e-5)
        assert model.scores(users).numpy() == pytest.approx((x @ dense)[users], abs=1e-5)
        scores = model.scores(everyone)
        # where torch has no MKL it has no product of two CSR tables
        product = torch.Tensor.__matmul__

        def without_mkl(a, b):
            assert {a.layout, b.layout} != {torch.sparse_csr}
            return product(a, b)

        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "__matmul__", without_mkl)
            patch.setattr(torch.backends.mkl, "is_available", lambda: False)
            assert torch.equal(model.scores(everyone), scores)
    ranked = backbones.rank_unseen(model, everyone, backbones.user_rows(train, N_USERS), N_ITEMS)
    for u, row in enumerate(ranked.tolist()):
        assert [i for i in row if i >= 0] == by_score(scores[u], items_of(train, u))
    if oracle in (dense_item_knn, dense_rp3beta):  # topk: of each item that is scored
        kept = ours(train, N_USERS, N_ITEMS, *constants, topk=4).to_dense()
        table = weight.to_dense()
        if oracle is dense_rp3beta:  # before that of each item of the history
            table = highest(ours(train, N_USERS, N_ITEMS, *constants[:2]).to_dense(), 4)
            table /= table.sum(1, keepdim=True).clamp(min=1e-9) if constants[2] else 1
        assert torch.allclose(kept, highest(table.T, 4).T) and (kept != 0).sum() > 3 * N_ITEMS / 2


def test_ease_bears_a_small_ridge_or_names_it_and_large_tables_are_refused():
    """Items with equal users make X'X singular: float32 was off by .2 at 1e-6."""
    x = np.zeros((4, 5))
    x[[0, 0, 1, 1, 2, 2, 3], [0, 1, 0, 1, 2, 3, 4]] = x[:, 2] = 1
    pairs = torch.tensor(np.argwhere(x))
    for ridge in (1e-2, 1e-5, 1e-6):
        ours = backbones.ease(pairs, 4, 5, ridge).numpy()
        assert ours == pytest.approx(dense_ease(x, ridge), abs=1e-4)
    assert "--ridge 1e-10" in message_of(backbones.ease, pairs, 4, 5, 1e-10)
    assert "40000 x 40000 weights" in message_of(backbones.ease, pairs, 4, 40_000)


# ---- Samplers, losses and steps ------------------------------------------------------------------
@pytest.mark.parametrize("beta", [None, 0.0, 0.75, 2.0])
def test_samplers_are_exact(beta):
    """UnseenSampler is uniform, or goes by (count + 1) ** beta, also for a user who has two unseen
    items, and nearly no weight, left."""
    two_unseen = [[N_USERS, i] for i in range(N_ITEMS) if i not in (7, 20)]
    popular = [[N_USERS + 1 + n, 0] for n in range(999)] + [[0, 0]]
    pairs = torch.cat([random_pairs(), torch.tensor(two_unseen + popular)]).unique(dim=0)
    pairs = torch.cat([pairs, pairs[:5]])  # a pair given twice is no second item
    widths = None if beta is None else backbones.popularity_widths(pairs, N_ITEMS, beta)
    sampler = backbones.UnseenSampler(pairs, N_USERS + 1000, N_ITEMS, widths)
    count = torch.bincount(pairs[:, 1], minlength=N_ITEMS)
    for user in (0, 5, N_USERS):
        seen = pairs[pairs[:, 0] == user, 1].unique()
        draws = sampler(torch.full((400,), user), 100, seeded(user)).flatten()
        assert not torch.isin(draws, seen).any()
        weight = (beta or 0) * (count.double() + 1).log()
        weight[seen] = -torch.inf
        expected = weight.softmax(0) * len(draws)
        apart = torch.bincount(draws, minlength=N_ITEMS) - expected
        chi2, degrees = (apart**2 / expected.clamp(min=1e-9)).sum(), N_ITEMS - len(seen) - 1
        # mean + 4 standard deviations, and a little for few degrees
        assert chi2 < degrees + 4 * math.sqrt(2 * degrees) + 4
    full = torch.tensor([[0, 0], [0, 1], [1, 0]])
    for widths in (None, backbones.popularity_widths(full, 2, 9000)):  # nothing overflows
        assert "user row 0" in message_of(backbones.UnseenSampler, full, 2, 2, widths)


def test_no_catalogue_overflows():
    """3M users, 4M items: user * items goes far beyond 32 bits."""
    users, items = 3_000_000, 4_000_000
    heavy = torch.tensor([10, 1_475_000, users - 1])
    own = torch.cat([torch.randperm(items, generator=seeded(n))[:4000] for n in range(3)])
    pairs = torch.stack([heavy.repeat_interleave(4000), own], 1)
    for kind in (torch.int64, torch.int32):  # ids of 32 bits, too
        pairs, heavy = pairs.to(kind), heavy.to(kind)
        keys = backbones.pair_keys(pairs, items)
        assert backbones.contains(keys, *pairs.T, items).all()
        for widths in (None, backbones.popularity_widths(pairs, items)):
            drawn = backbones.UnseenSampler(pairs, users, items, widths)(heavy, 2000, seeded())
            assert 0 <= drawn.min() and drawn.max() < items
            assert not backbones.contains(keys, heavy[:, None], drawn, items).any()
        assert torch.equal(backbones.user_rows(pairs, users)[1][-4000:], own[-4000:].sort()[0])
        assert not backbones.contains(keys[:0], *pairs.T, items).any()  # among none


def test_dns_and_ahns_against_brute_force():
    users, items = (torch.randn(n, 4, generator=seeded(n)) for n in (6, N_ITEMS))
    candidates = torch.randint(N_ITEMS, (6, 5), generator=seeded())
    positives = torch.randint(N_ITEMS, (6,), generator=seeded(1))
    score, s = rigged(users, items).score, users @ items.T
    dns = partial(backbones.dns, score, users, items, candidates)
    ranked = [sorted(row, key=lambda c, b=b: -s[b, c]) for b, row in enumerate(candidates.tolist())]
    assert dns().tolist() == [row[0] for row in ranked]
    picked = torch.stack([dns(2, seeded(n)) for n in range(20)])
    assert [set(picked[:, b].tolist()) for b in range(6)] == [set(row[:2]) for row in ranked]
    penalty = torch.randn(6, 5, generator=seeded(2)) * 3
    penalty[0, :4] = torch.inf  # these are ruled out
    best = (s.gather(1, candidates) - penalty).argmax(1, keepdim=True)
    assert dns(penalty=penalty).tolist() == candidates.gather(1, best)[:, 0].tolist()
    assert dns(penalty=penalty)[0] == candidates[0, 4] and (dns(penalty=penalty) != dns()).any()
    chosen = backbones.ahns(score, users, items, positives, candidates, 1.0, 0.5, -2).tolist()
    for b, j in enumerate(chosen):
        target = 0.5 / (s[b, positives[b]] + 1)
        assert j == min(candidates[b].tolist(), key=lambda c: abs(s[b, c] - target))
    # vectors so wide that rows are scored in three parts, the last one shorter
    users, items = (torch.randn(n, 2**13, generator=seeded(n)) for n in (7, N_ITEMS))
    candidates, s = torch.randint(N_ITEMS, (7, 5), generator=seeded()), users @ items.T
    scored = backbones.score_candidates(rigged(users, items).score, users, items, candidates)
    assert torch.allclose(scored, s.gather(1, candidates), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", ["lightgcn", "ngcf"])  # hops averaged, and side by side
def test_mixgcf_against_loops(name):
    model = backbones.build_backbone(name, N_USERS, N_ITEMS, 4, random_pairs(), 2).eval()
    user_layers, item_layers = model.layers()
    u, i = torch.tensor([0, 1, 2]), torch.tensor([3, 4, 5])
    candidates, users = torch.arange(6, 15).view(3, 3), model.pool(user_layers)[u]
    ours = backbones.mixgcf(users, item_layers, i, candidates, model.pool, seeded(3))
    generator, hops = seeded(3), []
    for k in range(3):
        share = torch.rand((3, 1), generator=generator)[..., None]
        query = users if name == "lightgcn" else user_layers[u, k]
        mixed = share * item_layers[i, k][:, None] + (1 - share) * item_layers[candidates, k]
        hops.append(mixed[range(3), (mixed * query[:, None]).sum(2).argmax(1)])
    oracle = sum(hops) / 3 if name == "lightgcn" else torch.cat(hops, 1)
    assert torch.allclose(ours, oracle, atol=1e-6)
    weight = torch.randn(ours.shape)  # gradients reach the positive and the chosen candidate
    assert_same_loss((ours * weight).sum(), (oracle * weight).sum(), [*model.parameters()])


class Tripled(backbones.Backbone):
    """A backbone of one's own: its vectors are not its parameters."""
    def layers(self):
        return [3 * vectors[:, None] for vectors in self.ego()]


@pytest.mark.parametrize("name, sampler", [
    *itertools.product(["mf", "lightgcn", "own"], ["rns", "pns", "dns", "mixgcf", "ahns"]),
    ("neumf", "dns")])
def test_a_step_is_bpr_and_l2_on_what_its_sampler_draws(name, sampler):
    """The baseline's, and HNLMRec's with all of its own terms at 0."""
    train, rows = split_data()["train"], torch.arange(0, 72, 3)
    model = (Tripled(N_USERS, N_ITEMS, 4) if name == "own" else
             backbones.build_backbone(name, N_USERS, N_ITEMS, 4, train, 2))
    model.embedding.data /= model.embedding.data.std()  # so that scores differ
    constants = {"m": 3, "n": 2, "beta": 0.5}
    draw = backbones.make_sampler(model, sampler, train, **constants)
    bare = hnlmrec.HNLMRec(model, draw, train, alpha=0, lambda1=0, lambda_s=0, reg=0.1)
    assert list(bare.modules_trained()) == ["backbone"]
    (u, i), (users, items), (ego_users, ego_items) = train[rows].T, model(), model.ego()
    assert "no branch" in message_of(backbones.make_sampler(model, "hard", train), u, i, None)
    sample = draw(u, i, seeded(5))
    j = sample.negative_ids
    # what it draws, drawn again
    generator, negatives = seeded(5), items[j]
    widths = backbones.popularity_widths(train, N_ITEMS, 0.5) if sampler == "pns" else None
    candidates = backbones.UnseenSampler(train, *SIZE, widths)(
        u, 1 if sampler in ("rns", "pns") else 3, generator)
    chosen, scored = candidates[:, 0], (model.score, users[u], items)
    if sampler == "dns":
        chosen = backbones.dns(*scored, candidates, 2, generator)
    if sampler == "ahns":
        chosen = backbones.ahns(*scored, i, candidates)
    if sampler == "mixgcf":
        negatives = backbones.mixgcf(
            users[u], model.layers()[1], i, candidates, model.pool, generator)
    assert torch.equal(j, chosen)
    score = model.score if name == "neumf" else lambda x, y: (x * y).sum(1)
    bpr = F.softplus(score(users[u], negatives) - score(users[u], items[i])).mean()
    l2 = sum(v.pow(2).sum() for v in (ego_users[u], ego_items[i], ego_items[j])) / 48
    for step in (backbones.make_step(model, sampler, train, reg=0.1, **constants), bare.loss):
        loss, logs = step(rows, seeded(5))
        assert logs["bpr"] == pytest.approx(bpr.item(), rel=1e-5)
        assert_same_loss(loss, bpr + 0.1 * l2, [*model.parameters()])


@pytest.mark.parametrize("name, cosine", [("mf", True), ("lightgcn", False), ("neumf", False)])
def test_softmax_step_against_loops(name, cosine):
    """Loss and gradients over the drawn items that are none of the user's own."""
    train, drawn = split_data()["train"], torch.randperm(N_ITEMS, generator=seeded(3))[:20].tolist()
    own_first = train[:, 1].tolist().index(drawn[0])  # a row's own item may be the first drawn
    rows, drawn = torch.tensor([0, 1, own_first ^ 1]), set(drawn)
    model = backbones.build_backbone(name, N_USERS, N_ITEMS, 4, train, 2, cosine)
    step = backbones.make_softmax_step(model, train, reg=0.1, n=20, tau=0.5)
    (users, items), (ego_users, ego_items), total = model(), model.ego(), 0.0
    if cosine:
        users, items = (F.normalize(v, dim=1) for v in model.ego())
    for u, i in train[rows].tolist():
        own = items_of(train, u)
        assert own & drawn
        up, *rest = (model.score(users[u], items) / 0.5).exp()[[i, *(drawn - own)]]
        total -= torch.log(up / (up + sum(rest)))
        total += 0.1 * (ego_users[u].pow(2).sum() + ego_items[i].pow(2).sum()) / 2
    assert_same_loss(step(rows, seeded(3))[0], total / 3, [*model.parameters()])
    # a user who has every drawn item has no negative, and no loss
    step = backbones.make_softmax_step(model, train, reg=0.0, n=1, tau=0.5)
    loss, _ = step(torch.tensor([own_first]), seeded(3))
    loss.backward()
    assert loss == 0 and all(p.grad is None or not p.grad.any() for p in model.parameters())


# ---- The training loop ---------------------------------------------------------------------------
def fit_mf(model, step, validate, n_rows=4, **more):
    settings = {"epochs": 3, "batch_size": 2, "lr": 0.1, "eval_every": 1, "patience": 9, "seed": 0}
    return backbones.fit({"m": model}, step, n_rows, validate, **settings | more)


def test_fit_keeps_the_best_state_and_stops_after_a_while_or_where_it_is_not_finite():
    model, states, orders = rigged(torch.randn(2, 2), torch.randn(3, 2)), [], {}
    for seed in (0, 0, 1):  # every row once an epoch, in an order of the seed's
        rows = []
        fit_mf(model, lambda part, _, rows=rows: (rows.extend(part.tolist()),
                                                  (model.embedding.sum(), {}))[1],
               lambda: 0.0, 9, epochs=2, seed=seed)
        assert sorted(rows[:9]) == sorted(rows[9:]) == list(range(9)) and rows[:9] != rows[9:]
        assert orders.setdefault(seed, rows) == rows
    assert orders[0] != orders[1]

    def validate():
        states.append(model.eval().embedding.detach().clone())
        return [-5.0, -1, -3, -1, 0][len(states) - 1]  # whatever its scale; the first of equal ones

    def trained(rows, generator):
        assert model.training  # though validation may leave it in eval mode
        return model.embedding.sum(), {"bpr": len(rows)}

    state, history = fit_mf(model, trained, validate, 3, epochs=9, patience=2)
    assert torch.equal(state["m.embedding"], states[1])
    assert [row["valid_ndcg@20"] for row in history] == [-5, -1, -3, -1]
    assert backbones.best_epoch(history) is history[1]
    # a mean over rows, in batches of two and one
    assert history[0]["bpr"] == 5 / 3 and history[0]["loss"] > history[1]["loss"]
    # every second epoch and the last; patience counts validations
    for patience, epochs in ((9, [2, 4, 5]), (1, [2, 4])):
        _, history = fit_mf(model, trained, lambda: 0.0, epochs=5, eval_every=2, patience=patience)
        assert [row["epoch"] for row in history] == epochs
    done = []

    def step(rows, generator):
        done.append(rows)
        return model.embedding.sum() * (math.nan if len(done) == 4 else 1.0), {"bpr": 1.5}

    message = message_of(fit_mf, model, step, lambda: 0.0, n_rows=6)
    assert len(done) == 4 and "nan at step 4 (epoch 2, {'bpr': 1.5})" in message
    assert model.embedding.isfinite().all()
    assert "validation is nan at epoch 1" in message_of(fit_mf, model, step, lambda: math.nan)


@pytest.mark.parametrize("decay", [False, True])
def test_fit_against_adam_by_hand_with_its_learning_rate(decay):
    """Six steps on sum(x^2): x by Kingma and Ba; with decay the learning rates are .6, .5 … .1."""
    model, x, m, v = rigged(torch.ones(1, 1), torch.ones(1, 1)), 1.0, 0.0, 0.0
    for n in range(1, 7):
        m, v = 0.9 * m + 0.1 * 2 * x, 0.999 * v + 0.001 * (2 * x) ** 2
        lr = 0.6 - 0.1 * (n - 1) if decay else 0.6
        x -= lr * (m / (1 - 0.9**n)) / (math.sqrt(v / (1 - 0.999**n)) + 1e-8)
    state, _ = fit_mf(model, lambda *_: (model.embedding.pow(2).sum(), {}),
                      itertools.count(0.0).__next__, n_rows=3, lr=0.6, decay=decay)
    assert state["m.embedding"].flatten().tolist() == pytest.approx([x, x], rel=1e-4)


def test_processes_share_the_rows_and_draw_apart(monkeypatch):
    """Each row is one process's, its negatives come from a generator of its own, gradients are
    averaged after each step; start and validation are those that process 0 sends."""
    model, seen, averaged = rigged(torch.ones(1, 1), torch.ones(1, 1)), ([], []), []
    monkeypatch.setattr(backbones, "world", lambda: 2)
    monkeypatch.setattr(backbones, "average_gradients", averaged.append)
    monkeypatch.setattr(backbones.dist, "broadcast", lambda score, source: score.fill_(0.5))
    for rank, own in enumerate(seen):
        with torch.no_grad():
            model.embedding.fill_(rank)

        def step(rows, generator, own=own):
            assert own or (model.embedding == 0.5).all()
            own.append((rows.tolist(), torch.rand(1, generator=generator).item()))
            return model.embedding.sum(), {}

        monkeypatch.setattr(backbones, "rank", lambda rank=rank: rank)
        _, history = fit_mf(model, step, lambda: 0.1, 8, batch_size=4, epochs=1)
        assert history[0]["valid_ndcg@20"] == 0.5
    (rows, draws), (others, apart) = (zip(*own) for own in seen)
    assert sorted(sum([*rows, *others], [])) == list(range(8)) and {*map(len, rows)} == {2}
    assert len(averaged) == 4 and not set(draws) & set(apart)


@pytest.mark.parametrize("n, n_items, given, expected", [
    (44287, 1008, {}, (2048, 1e-3, 200, 8)),  # MovieLens-100K
    (124813, 11924, {}, (16384, 8e-3, 200, 32)),  # full Toys & Games
    (124813, 11924, {"batch_size": 2048, "m": 3}, (2048, 1e-3, 200, 3)),
    (124813, 11924, {"lr": 0.5, "epochs": 300}, (16384, 0.5, 300, 32)),
    # 2,000,000 / 8 = 250,000; 31 steps an epoch, 4e9 / (31 x 2,000,000) = 64.5
    (2_000_000, 10**6, {}, (65536, 8e-3, 64, 64)), (50_000_000, 100, {}, (65536, 8e-3, 10, 4))])
def test_what_follows_from_the_size_of_the_data(n, n_items, given, expected):
    data = {"train": torch.empty(n, 0), "n_items": n_items}
    assert backbones.sized_to_data(data, **given) == expected


def test_a_world_size_without_torchrun_never_waits_and_a_signal_ends_a_wait(small_run, monkeypatch):
    words = [HERE / "backbones.py", "pretrain", "--run", small_run, "--epochs", "2"]
    torchrun = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost",
                "MASTER_PORT": "0", "TORCHELASTIC_RUN_ID": "x", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen([sys.executable, *words], env=os.environ | torchrun, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as waiting:
        assert "waiting for 2 processes" in waiting.stdout.readline()
        waiting.terminate()
        assert waiting.wait(timeout=60) == -15
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert message_of(backbones.start_processes, "cpu").startswith("WORLD_SIZE: is set")
    for rank in ("", "x"):
        for name, value in (torchrun | {"RANK": rank}).items():
            monkeypatch.setenv(name, value)
        assert "torchrun did not start" in message_of(backbones.start_processes, "cpu")
    monkeypatch.setenv("RANK", "0")
    assert "more processes than" in message_of(backbones.start_processes, "cuda")  # tests have none
    read = ["read", "--run", "x", "--llm", "x"]
    assert "read` is one process" in message_of(llm_negatives.main, read)
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert backbones.start_processes("cpu") == "cpu"


# ---- Files of a run: nothing stale, damaged or of another kind is used or overwritten ------------
@pytest.fixture
def small_run(tmp_path):
    """A run folder with data.safetensors alone."""
    run, data = tmp_path / "run|<b>", split_data() | {"settings": {"command": "prepare"}}
    tensors = {name: data.pop(name) for name in ("train", "valid", "test")}
    backbones.save_tensors(run / "data.safetensors", tensors, data)
    return run


def test_line_search_ends_where_no_single_step_is_better():
    for seed in range(20):
        table = torch.rand(4, 3, generator=seeded(seed))
        point, score = backbones.line_search(
            lambda a, b, table=table: float(table[a, b]), {"a": range(4), "b": range(3)})
        # in any table the end is best in each line
        assert score == table[point["a"], :].max() == table[:, point["b"]].max()


def test_popularity_keeps_the_order_of_large_counts():
    many, few = (torch.stack([torch.arange(n), torch.full((n,), item)], 1)
                 for n, item in ((2100, 11_999), (2099, 0)))
    weight = backbones.popularity(torch.cat([few, many]), 2100, 12_000)
    assert backbones.top_k(weight, 2).tolist() == [[11_999, 0]]


def test_closed_forms_at_once_do_without_those_that_do_not_fit(small_run, monkeypatch):
    heavy = torch.stack([torch.zeros(11_600), torch.arange(11_600)], 1).long()  # one has all items
    assert "would not fit; raise prepare's --k-core, or leave out users with the most pairs (one " \
        "has 11600)" in message_of(backbones.item_knn, heavy, 1, 11_600)
    run = ("backbones.py", "pretrain", "--run", small_run, "--backbone", "closed")
    monkeypatch.setattr(backbones, "ease", lambda *_: backbones.fail("ease: 1 x 1 would not fit"))
    assert "ease: left out, since ease: 1 x 1" in cli(*run)
    made = {path.stem for path in small_run.glob("model-*")}
    assert made == {"model-pop", "model-itemknn", "model-rp3"}
    save_model(small_run / "model-ease.safetensors", 0)  # of other data: nobody may take it
    assert "model-ease.safetensors" in message_of(cli, *run)  # an old file is not "left out"
    assert "ease: left out" in cli(*run, "--force")
    assert not (small_run / "model-ease.safetensors").exists()
    monkeypatch.setattr(backbones, "item_knn", lambda *_: backbones.fail("1 items: too many"))
    assert "too many" in message_of(cli, *run, "--force")
    # one closed form alone reads no samplers, and is one model
    cli(*run[:-1], "pop", "--sampler", "rns", "dns", "--out", "model-ours.safetensors")


def test_closed_forms_and_softmax_by_command(small_run, monkeypatch):
    run, data = small_run, backbones.load_data(small_run)
    pretrain = partial(cli, "backbones.py", "pretrain", "--run", run, "--dim", 8, "--epochs", 2)
    shape = (data["train"], N_USERS, N_ITEMS)
    direct = {"itemknn": backbones.item_knn(*shape, 5.0, 1, 3), "ease": backbones.ease(*shape, 9.0),
              "rp3": backbones.rp3beta(*shape, 0.5, 0.2, 1, 3), "pop": backbones.popularity(*shape)}
    flags = {"itemknn": "--shrink 5 --idf 1 --topk 3", "ease": "--ridge 9", "pop": "",
             "rp3": "--rp3-alpha 0.5 --rp3-beta 0.2 --unit 1 --topk 3"}
    for name, weight in direct.items():
        words = ["--backbone", name, *flags[name].split(), "--out", f"model-{name}.safetensors"]
        pretrain(*words)
        model, meta, _ = backbones.load_model(run / words[-1], data)
        assert torch.equal(model.weight.to_dense(), weight.to_dense())
        assert meta["history"][0]["valid_ndcg@20"] == backbones.validation(model, data)()
        before = (run / words[-1]).read_bytes()
        pretrain(*words, "--lr", 1, "--seed", 8)
        assert (run / words[-1]).read_bytes() == before
    # what is left out is chosen on validation, in two searches; the second tries topk last
    searches, search = [], backbones.line_search
    monkeypatch.setattr(backbones, "line_search", lambda score_of, grid, *point: (
        searches.append([*grid, *point]), search(score_of, grid, *point))[1])
    pretrain("--backbone", "rp3", "--rp3-beta", "0.2", "--out", "model-best.safetensors")
    assert searches[0] == searches[1][3::-1] and searches[1][4]["topk"] == 0
    model, meta, _ = backbones.load_model(run / "model-best.safetensors", data)
    best = max(row["valid_ndcg@20"] for row in meta["history"])  # several choices may share it
    assert any(torch.equal(model.weight.to_dense(), backbones.rp3beta(
        *shape, row["rp3_alpha"], 0.2, row["unit"], row["topk"]).to_dense())
        for row in meta["history"] if row["valid_ndcg@20"] == best)
    names = ("rp3_beta", "rp3_alpha", "unit", "topk")
    tried = {tuple(row[name] for name in names) for row in meta["history"]}
    assert {beta for beta, *_ in tried} == {0.2} and len(meta["history"]) == len(tried) > 8
    for several, names, *words in ((["rns", "dns"], ["rns", "dns"], "--m", 3, "--sampler"),
                                   (["closed"], backbones.CLOSED_FORMS, "--backbone")):
        pretrain(*words, *several, "--force")  # in one start, each as by itself
        for name in names:
            pretrain(*words, name, "--out", "model-one.safetensors", "--force")
            both = backbones.digests(run, "model-one.safetensors", f"model-{name}.safetensors")
            assert len(set(both.values())) == 1  # of the settings and the tensors
    save_file({"text": torch.randn(N_ITEMS, 5)}, run / "own.safetensors")
    for name, *words in (["softmax"], ["alpharec", "--text-vectors", "own.safetensors"]):
        words += ["--loss", "softmax", "--cosine", "--out", f"model-{name}.safetensors"]
        pretrain(*words)
        model, meta, tensors = backbones.load_model(run / words[-1], data)
        for ours, end in zip(model(), ("user", "item")):
            assert torch.allclose(ours, tensors[end])
            assert torch.allclose(ours.norm(dim=1), torch.ones(len(ours)))
        best = max(row["valid_ndcg@20"] for row in meta["history"])
        assert backbones.validation(model, data)() == pytest.approx(best)
    save_file({"text": torch.randn(N_ITEMS, 5)}, run / "own.safetensors")  # other texts
    assert "not ours; name another" in message_of(backbones.load_tensors, run / "own.safetensors")
    assert re.search("own.safetensors.*--force", message_of(pretrain, *words))


def test_lines_of_a_file_are_whole_and_named(tmp_path):
    lines = tmp_path / "items.jsonl"
    for end in ("", "\n"):
        lines.write_text('{"raw": "a\u2028b"}\n{"raw": "c"}' + end, encoding="utf-8")
        assert [row["raw"] for row in backbones.read_jsonl(lines)] == ["a\u2028b", "c"]
    lines.write_text('{"raw": "a"}\n{"raw": "c"}\n{"ra')
    assert "line 3 is not whole" in message_of(backbones.read_jsonl, lines)


def test_texts_of_ones_own_are_checked(tmp_path):
    path, hole = tmp_path / "texts.safetensors", torch.zeros(N_ITEMS, 3)
    hole[7, 1] = math.nan
    for tensors, message in (({"a": torch.zeros(29, 3)}, "a is (29, 3), not (30, width)"),
                             ({"a": hole}, "a[7, 1] is NaN or infinite; fix that row"),
                             ({}, "holds no texts")):
        save_file(tensors, path)
        assert message in message_of(backbones.load_texts, tmp_path, path.name, split_data())
    path.write_bytes(b"no")
    assert "cannot be read" in message_of(backbones.load_texts, tmp_path, str(path), split_data())


def test_messages_name_the_command_that_makes_a_file(tmp_path):
    for name, command in (
            ("adapter-2/adapter_config.json", "llm_negatives.py finetune --run R … --name sft-2"),
            ("compare/HNLMRec.safetensors", "eval.py compare --run R …"),
            ("model-full.safetensors", "hnlmrec.py blend --run R … --out model-full.safetensors")):
        assert backbones.writer_of(Path("R") / name) == f"python {command}"
    # a model of a name of one's own says itself who wrote it
    backbones.save_tensors(tmp_path / "model-mine.safetensors", {"a": torch.zeros(1)},
                           {"settings": {"command": "train"}})
    assert "hnlmrec.py train" in backbones.writer_of(tmp_path / "model-mine.safetensors")


def test_a_failed_write_names_its_file_and_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "x"
    backbones.write_atomic(path, b"older")
    os.link(path, tmp_path / "reader")  # who has the file open keeps reading the one it opened
    backbones.write_atomic(path, b"old")
    assert (tmp_path / "reader").read_bytes() == b"older"
    (tmp_path / "reader").unlink()
    monkeypatch.setattr(os, "fsync", lambda _: os.write(-1, b""))
    with pytest.raises(OSError) as error:
        backbones.write_atomic(path, b"new")
    assert error.value.filename == str(path)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("raised, status, line", [
    (KeyboardInterrupt(), 130, "stopped; finished steps are kept"),
    (OSError(28, "Disk full", "cf.safetensors"), 2, "error: cf.safetensors: Disk full; fix that"),
    (RuntimeError("CUDA out of memory"), 2, "error: out of memory; lower --batch-size"),
    (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED"), 2, "error: out of memory; lower --batch-size"),
    (RuntimeError("CUDA error: an illegal memory access"), None, ""),  # no lack of memory: raised
    (backbones.SystemExit2("one\n  line"), 2, "error: one line"),
    (["--run", ""], 2, "error: an argument is empty"),
    (["--run="], 2, "error: an argument is empty")])
def test_programs_end_in_one_line(raised, status, line, monkeypatch, capsys):
    if isinstance(raised, list):  # flags, of which an empty one ends it before it begins
        monkeypatch.setattr(sys, "argv", raised)
        raised = AssertionError
    monkeypatch.setattr(backbones.signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "stdout", None)
    with pytest.raises(SystemExit if status else RuntimeError) as error:
        backbones.run_cli(Mock(side_effect=raised))
    said = capsys.readouterr().err.strip()
    assert getattr(error.value, "code", None) == status and said.startswith(line)
    assert "\n" not in said


def test_progress_says_rate_and_time_left(monkeypatch, capsys):
    monkeypatch.setattr(backbones.time, "time", iter([0.0, 10, 12, 30, 40]).__next__)
    progress = backbones.Progress("train", 10, "epochs")
    for done in (2, 3, 6, 10):  # the first says nothing about speed, the second is too soon
        progress.update(done, "loss 1")
    assert capsys.readouterr().out.splitlines() == ["train 6/10 epochs  0.2/s  20 s left  loss 1",
                                                    "train 10/10 epochs  0.3/s  0 s left  loss 1"]


# ---- hnlmrec.py, the method: e⁻ and its losses, the texts, the judge, the blend ------------------
def test_projector_attends_over_the_set():
    """Slot 0 asks and all K answer, as PyTorch's own attention has it; the others are a set."""
    hidden = (torch.randn(20, 16) * torch.tensor([300.0] + 15 * [1.0])).half()
    hidden[:, 5] = 4.0  # alike for all: says nothing
    p, sets = hnlmrec.Projector(hidden, 8, width=8), hidden[:6].float().view(2, 3, 16)
    x = p.inward((sets - hidden.float().mean(0)) / hidden.float().std(0).clamp(min=1e-3))
    slot = F.scaled_dot_product_attention(p.query(x[:, :1]), p.key(x), p.value(x))[:, 0]
    _, one, _, two = p.mlp
    inner = F.gelu(F.layer_norm(x[:, 0] + slot, (8,)) @ one.weight.T + one.bias)
    assert torch.allclose(p(sets), inner @ two.weight.T + two.bias, atol=1e-5)
    assert torch.allclose(p(sets[:, [0, 2, 1]]), p(sets), atol=1e-6)
    other = sets.clone()
    other[0, 2] += 300  # informs slot 0 of its own row alone
    assert not torch.allclose(p(sets)[0], p(other)[0]) and torch.equal(p(sets)[1], p(other)[1])
    alone = hnlmrec.Projector(hidden, 8, width=8, attention=False)
    assert torch.equal(alone(sets), alone(other))


def test_negative_table_prefers_own_vectors_and_counts_the_rest():
    """User 0 has a vector of one of its two pairs, user 1 of both, user 2 of none."""
    train = torch.tensor([[0, 1], [0, 2], [1, 0], [1, 5], [2, 3]])
    table = hnlmrec.NegativeTable(train[[1, 3, 2]], train, 3, 6)  # in any order of items
    assert (table.own, table.without) == (3, 1)
    chosen = table(torch.arange(5), 40, seeded())
    assert chosen[1:4, 0].tolist() == [0, 2, 1]
    assert [set(row.tolist()) for row in chosen] == [{0}, {0}, {1, 2}, {1, 2}, {-1}]
    for generated in (train[[3, 1]], train[:0]):
        assert "sort" in message_of(hnlmrec.NegativeTable, generated, train, 3, 6)


def test_losses_of_pairs_against_direct_sums():
    (z, i, m), tau = (torch.randn(4, 5, requires_grad=True) for _ in range(3)), 0.5
    ids, e = torch.tensor([0, 1, 0, 2]), (F.cosine_similarity(z[:, None], m, 2) / tau).exp()
    rest = (e * (ids[:, None] != ids)).sum(1) + (F.cosine_similarity(z, i) / tau).exp()
    align = -torch.log(e.diag() / (e.diag() + rest)).mean()
    assert_same_loss(hnlmrec.alignment_loss(z, i, m, ids, tau), align, [z, m])
    semantic = -torch.log(e.diag() / e.sum(1)).mean()
    assert_same_loss(hnlmrec.semantic_alignment(z, m, tau), semantic, [z, m])


def test_texts_of_users_and_the_start_against_svd():
    """A user's text is the sum of the train items'. The items' start is U S of their centred texts
    (signs are free), a user's the sum over the train items; random where a text is too narrow."""
    text = torch.randn(20, 9).half()
    train = torch.tensor([[0, 3], [0, 7], [1, 3], [3, 1], [3, 2], [3, 19]])
    x = F.normalize((text.float() - text.float().mean(0)) / text.float().std(0), dim=1)
    semantic = hnlmrec.SemanticProjector(text, train, 4, 5)
    assert torch.allclose(semantic.user[0], F.normalize(x[3] + x[7], dim=0), atol=1e-6)
    users, items = semantic(torch.tensor([1]), torch.tensor([0, 3]))
    assert torch.allclose(users[0], items[1], atol=1e-6)  # a user with one item reads as that item
    assert torch.allclose(items, semantic.mlp(x[[0, 3]]), atol=1e-6)
    assert_same_loss(users.sum(), semantic.mlp(x[3]).sum(), [*semantic.parameters()])
    start = hnlmrec.text_start(text, train, 4, 3, 0.1)
    u, s, _ = torch.linalg.svd((x - x.mean(0)).double(), full_matrices=False)
    items = u[:, :3] * s[:3]
    users = torch.stack([items[[3, 7]].sum(0), items[3], 0 * items[0], items[[1, 2, 19]].sum(0)])
    for ours, whole in ((start[4:], items), (start[:4], users)):
        whole = whole.flip(1) * 0.1 / whole.pow(2).mean().sqrt()
        assert torch.allclose(ours.double().abs(), whole.abs(), atol=1e-5)
    # on both sides zeros would stay zeros: the gradient of one side is the other
    more = hnlmrec.text_start(text, train, 4, 200, 0.1)[:, 9:]
    assert more.shape == (24, 191) and more.std().item() == pytest.approx(0.1, rel=0.05)


def hnlmrec_parts(form=hnlmrec.HNLMRec, backbone="mf", generated=None, **more):
    """A small backbone, its projector, and the method (or the paper's form of it) around both."""
    train = split_data()["train"]
    generated = train if generated is None else generated
    model = backbones.build_backbone(backbone, N_USERS, N_ITEMS, 8, train)
    hidden = torch.randn(len(generated), 16).half()
    projector = hnlmrec.Projector(hidden, 8, width=8)
    method = form(
        model, backbones.make_sampler(model, "rns", train), train, projector=projector,
        hidden=hidden, table=hnlmrec.NegativeTable(generated, train, N_USERS, N_ITEMS),
        mined=backbones.mine_hard_negatives(model, train, torch.arange(N_USERS), 1, 5),
        semantic=hnlmrec.SemanticProjector(torch.randn(N_ITEMS, 16), train, N_USERS, 8),
        likely=hnlmrec.LikelyFalse(split_data()["test"][:, 1:], torch.ones(N_USERS, 1), N_ITEMS),
        **{"lambda_s": 0.0, "reg": 0.0, "k": 2} | more)
    method.align_rows, method.refresh = 16, 1
    return model, projector, method, train


@pytest.mark.parametrize("backbone, without", [
    ("mf", []), ("lightgcn", [*range(18, 24), *range(31, 36), *range(42, 48)])])
def test_the_step_is_the_sum_of_its_five_terms(backbone, without):
    """Loss and gradients, drawn again and gathered pair by pair: BPR's gradient stops at z, that of
    L_align at the items. K 1, one mined and one likely item, so that no more is drawn. Of users 3
    and 7, who have no generated vector, e⁻ is e_j and L_align sees nothing; of user 5 only the
    first pair has one."""
    generated = split_data()["train"][[n for n in range(72) if n not in without]]
    model, projector, method, train = hnlmrec_parts(
        backbone=backbone, generated=generated, alpha=0.4, lambda1=0.7, k=1, reg=0.01,
        lambda_s=0.5, lambda_f=2.0, gamma=0.3, tau_c=0.3)
    method.align_rows, method.semantic_rows, method.mined = 30, 60, method.mined[:, :1]
    assert [*method.modules_trained()] == ["backbone", "projector", "semantic"]
    model.embedding.data *= 30 if backbone == "mf" else 4  # so that the L2 term counts
    loss, logs = method.loss(torch.arange(len(train)), seeded(3))

    pairs, generator, (u, i), n = generated.tolist(), seeded(3), train.T, len(train)
    method.table(torch.arange(n), 1, generator)  # the step draws the pair's z first
    j = backbones.UnseenSampler(train, N_USERS, N_ITEMS)(u, 1, generator)[:, 0]
    (users, items), z, rows, of_row = model(), projector(method.hidden[:, None]), [], []
    for row, (a, b) in enumerate(train.tolist()):
        vectors = [pairs.index([a, b])] if [a, b] in pairs else []
        vectors += [k for k, pair in enumerate(pairs) if pair[0] == a]
        rows, of_row = rows + [row] * bool(vectors), of_row + vectors[:1]
    assert method.table.without == n - len(rows) == (12 if without else 0)
    e_u, e_i, e_j, e_f = users[u], items[i], items[j], items[split_data()["test"][u, 1]]
    own, negative = z[of_row].detach(), e_j.clone()
    scale = e_j[rows].detach().norm(dim=1) / own.norm(dim=1)
    negative[rows] = 0.4 * own * scale[:, None] + 0.6 * e_j[rows]
    bpr, above, below = (-F.logsigmoid((e_u * (up - down)).sum(1)).mean() for up, down in (
        (e_i, negative), (e_f, negative), (e_i, e_f)))
    ego_users, ego_items = model.ego()
    l2 = sum(v.pow(2).sum() for v in (ego_users[u], ego_items[i], ego_items[j])) / 2 / n
    first, (some_users, some_items) = rows[:30], (v[:60].unique() for v in (u, i))
    align = hnlmrec.alignment_loss(z[of_row[:30]], items[i[first]].detach(),
                                   items[method.mined[u[first], 0]].detach(), u[first], 0.3)
    semantic = sum(hnlmrec.semantic_alignment(v, t, 0.3) for v, t in zip(
        (users[some_users], items[some_items]), method.semantic(some_users, some_items)))
    terms = {"bpr": bpr, "align": align, "semantic": semantic, "false": above + 0.3 * below}
    assert logs == pytest.approx({name: term.item() for name, term in terms.items()}, rel=1e-5)
    l2_false = ego_items[split_data()["test"][u, 1]].pow(2).sum() / 2 / n
    total = bpr + 0.01 * l2 + 0.7 * align + 0.5 * semantic + 2 * (terms["false"] + 0.01 * l2_false)
    assert_same_loss(loss, total, [*method.parameters()], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("hinge, without", [(0.0, 0), (0.3, 18)])
def test_the_papers_step_is_its_formula(hinge, without):
    """Loss and gradients, drawn again and written out; K 1, so that z is that of the pair's own
    vector. Without one (the first pairs, of whole users) e⁻ is e_j and L_CL is left out."""
    model, projector, method, train = hnlmrec_parts(
        hnlmrec.PaperHNLMRec, generated=split_data()["train"][without:], alpha=0.4, lambda1=0.7,
        k=1, reg=0.01, tau_c=0.3, hinge=hinge, train_projector=bool(hinge))
    assert [*method.modules_trained()] == ["backbone", "projector"][:2 if hinge else 1]
    loss, logs = method.loss(torch.arange(len(train)), seeded(3))
    with torch.set_grad_enabled(bool(hinge)):
        z = projector(method.hidden[:, None])
    (users, items), (u, i) = model(), train.T
    j = backbones.UnseenSampler(train, *SIZE)(u, 1, seeded(3))[:, 0]
    e_u, e_i, e_j = users[u], items[i], items[j]
    gap = (e_u * (e_i - torch.cat([e_j[:without], 0.4 * z + 0.6 * e_j[without:]]))).sum(1)
    ranking = torch.clamp(0.3 - gap, min=0) if hinge else -F.logsigmoid(gap)
    up, down = (torch.exp(F.cosine_similarity(e_u, v)[without:] / 0.3)
                for v in (e_i, torch.cat([e_j[:without], z])))
    squares = sum(v.pow(2).sum(1) for v in (e_u, e_i, e_j))
    total = (ranking + 0.01 * squares / 2).mean() - 0.7 * torch.log(up / (up + down)).mean()
    assert set(logs) == {"contrast", "hinge" if hinge else "bpr"}
    learned = [model.embedding, *projector.mlp.parameters()]  # the latter only if asked for
    grads = assert_same_loss(loss, total, learned)
    assert [g is None or not g.any() for g in grads] == [False] + [not hinge] * len(grads[1:])


@pytest.mark.parametrize("form", [hnlmrec.HNLMRec, hnlmrec.PaperHNLMRec])
def test_a_batch_of_users_without_generated_vectors_is_plain_bpr(form):
    model, _, method, train = hnlmrec_parts(form, generated=split_data()["train"][18:])
    loss, generator = method.loss(torch.arange(18), seeded(3))[0], seeded(3)
    if form is hnlmrec.HNLMRec:  # which draws the pairs' vectors first
        method.table(torch.arange(18), 1, generator)
    bpr, _ = backbones.make_step(model, "rns", train, reg=0.0)(torch.arange(18), generator)
    assert_same_loss(loss, bpr, [model.embedding])


@pytest.mark.parametrize("form", [hnlmrec.HNLMRec, hnlmrec.PaperHNLMRec])
def test_all_that_a_step_draws_comes_from_its_generator(form, monkeypatch):
    """So do L_align's targets, each any of the items mined for its user."""
    _, _, method, train = hnlmrec_parts(form, k=3, lambda_f=1.0)
    method.likely = hnlmrec.LikelyFalse(split_data()["test"][:, 1:].expand(-1, 3) - torch.arange(3),
                                        torch.ones(N_USERS, 3), N_ITEMS)
    losses, targets, read, align = [], [], [], hnlmrec.alignment_loss
    attend = method.projector.attend
    method.projector.attend = lambda sets: (read.append(sets.shape[1]), attend(sets))[1]
    monkeypatch.setattr(hnlmrec, "alignment_loss", lambda z, i, mined, *more: (
        targets.extend(mined[:6]), align(z, i, mined, *more))[1])
    for seed in (3, 3, 4):
        method.steps = 0
        losses.append(method.loss(torch.arange(len(train)), seeded(seed))[0].item())
    assert losses[0] == losses[1] != losses[2] and set(read) == {3}  # K vectors of each user
    if form is hnlmrec.HNLMRec:  # six of user 0, three times
        used = {*torch.cdist(torch.stack(targets), method.backbone()[1]).argmin(1).tolist()}
        assert len(used) > 2 and used <= {*method.mined[0].tolist()}


def test_z_of_every_generated_vector_is_made_anew_every_few_steps():
    """z of row n: the projector on it and K - 1 of the same user's, drawn anew at each refresh."""
    pairs = torch.cartesian_prod(torch.arange(3), torch.arange(1700))  # more than are read at once
    hidden, table = torch.randn(5100, 16), hnlmrec.NegativeTable(pairs, pairs, 3, 1700)
    projector, seen = hnlmrec.Projector(hidden, 8, width=8), []
    method = hnlmrec.HNLMRec(None, None, pairs, projector=projector, table=table, hidden=hidden,
                             k=3)
    method.refresh = 4
    for _ in range(9):
        z = method.z_of_all(seeded(1 + len(seen)))
        if not seen or z is not seen[-1]:
            seen.append(z)
            others = table.others(pairs[:, 0], 2, seeded(len(seen)))
            assert torch.equal(pairs[others, 0], pairs[:, :1].expand(-1, 2))
            sets = torch.cat([torch.arange(5100)[:, None], others], 1)
            assert torch.allclose(z, projector(hidden[sets]), atol=1e-6)
    assert len(seen) == 3 and not z.requires_grad  # steps 1, 5 and 9


def test_whiten_against_the_inverse_root_of_the_covariance():
    """Rows of norm 1, and their cosines those of the texts times C^-1/2 (with numpy); of two axes
    with hardly any variance neither is blown up; several readings count alike."""
    text = torch.randn(20, 5) * torch.tensor([5, 1, 1, 1, 0.2]) + 3
    centred = (text - text.mean(0)).double().numpy()
    values, axes = np.linalg.eigh(centred.T @ centred)
    white = centred @ (axes * values**-0.5) @ axes.T
    white = F.normalize(torch.from_numpy(white).float(), dim=1)
    for given, tolerance in ((text, 1e-4), (torch.cat([text, 1e-6 * torch.randn(20, 2)], 1), 1e-3)):
        ours = hnlmrec.whiten(given)
        assert torch.allclose(ours @ ours.T, white @ white.T, atol=tolerance)
    assert torch.equal(hnlmrec.whiten(torch.ones(4, 3)), torch.zeros(4, 3))
    readings = [text, torch.randn(20, 3)]
    both, other = hnlmrec.whitened_texts(readings), hnlmrec.whiten(readings[1])
    cosines = (white @ white.T + other @ other.T) / 2
    assert both.shape == (20, 8) and torch.allclose(both @ both.T, cosines, atol=1e-4)
    # the untrained similarity: summed over the user's train items, in a loop
    train = torch.tensor([[0, 3], [0, 7], [1, 3], [3, 1], [3, 2], [3, 19]])
    scores = hnlmrec.TextSimilarity(readings, train, 4).scores(torch.tensor([3, 2, 0]))
    for row, own in zip(scores, ([1, 2, 19], [], [3, 7])):
        assert torch.allclose(row, cosines[own].sum(0), atol=1e-4)


def judge_by_cosines(maps, history, j, left_out=None):
    """The formula of hnlmrec.Judge for one user with these train items, and item j."""
    own, beta = [*(set(history) - {left_out})], (10 * maps.tenth_log_beta).exp()
    history, item = maps.text[own] @ maps.history_map.weight.T, maps.item_map.weight @ maps.text[j]
    mean = (beta * (F.cosine_similarity(history, item, 1) - 1)).logsumexp(0) - math.log(len(own))
    return maps.log_scale.exp() * (mean / beta + 1) + maps.bias[j]


def small_judge(train):
    maps = hnlmrec.JudgeMaps([torch.randn(N_ITEMS, 5), torch.randn(N_ITEMS, 4)], train, 6, beta=3)
    assert torch.allclose(maps.bias, (train[:, 1].bincount(minlength=N_ITEMS) + 1).sqrt().log())
    assert torch.equal(maps.tables()["history"], maps.tables()["item"])  # untrained: texts alone
    assert maps.tables()["shape"].tolist() == pytest.approx([1 / 0.07, 3], rel=1e-5)
    for parameter in (maps.history_map.weight, maps.item_map.weight, maps.bias):
        torch.nn.init.normal_(parameter)
    return maps


def test_a_wider_reading_of_the_same_texts_is_the_same_judge():
    """Turned into a wider space texts keep their inner products; with a narrow map the judge begins
    with their strongest axes, and there with the best cosines of that rank."""
    text, turn = torch.randn(N_ITEMS, 6) * torch.arange(1, 7), torch.randn(12, 12)
    wide = F.pad(text, (0, 6)) @ torch.linalg.qr(turn).Q
    data = split_data()["train"]
    narrow, wide, short = (
        hnlmrec.JudgeMaps([x, torch.randn(N_ITEMS, 4)], data, width)
        for x, width in ((text, 6), (wide, 6), (text, 2)))
    rows, others, few = (F.normalize(maps.tables()["item"]) for maps in (narrow, wide, short))
    assert torch.allclose(rows @ rows.T, others @ others.T, atol=1e-3)
    assert [len(maps.tables()["item"].T) for maps in (narrow, short)] == [6, 2]
    assert hnlmrec.JudgeMaps([text], data, 99).tables()["item"].shape == (N_ITEMS, 6)
    u, _, _ = torch.linalg.svd(text - text.mean(0), full_matrices=False)
    best = F.normalize(u[:, :2])  # whitened, all axes weigh alike
    assert torch.allclose(few @ few.T, best @ best.T, atol=1e-3)


@pytest.mark.parametrize("most", [64, 2])
def test_judge_step_against_loops_over_the_left_out_items(most):
    """Over pairs, with the history without the judged item and the mask; an item drawn twice counts
    twice. most 2: two of a user's items, drawn anew for each generator, judged by the other."""
    train, users, seen = split_data()["train"][2:], torch.tensor([2, 0, 5]), set()
    maps = small_judge(train)
    step = hnlmrec.make_judge_step(maps, train, N_USERS, 40, most=most)
    for seed in (3, 4, 5, 6) if most == 2 else (3,):
        generator, losses = seeded(seed), []
        order = torch.rand(16, generator=generator, dtype=torch.float64)  # user 0 has 4, others 6
        drawn = torch.randint(N_ITEMS, (40,), generator=generator).tolist()
        for u, order in zip(users.tolist(), order.split([6, 4, 6])):
            own = train[train[:, 0] == u, 1]
            taken = own[order.argsort()[:most]].tolist()
            seen.add((u, *sorted(taken)))
            for i in taken:
                judged = [i, *(j for j in drawn if j not in own.tolist())]
                scores = [judge_by_cosines(maps, taken, j, left_out=i) for j in judged]
                losses.append(torch.stack(scores).logsumexp(0) - scores[0])
        loss, _ = step(users, seeded(seed))
        assert_same_loss(loss, torch.stack(losses).mean(), list(maps.parameters()), atol=1e-4)
    assert len(seen) == 3 if most > 6 else len(seen) > 6


def test_judge_step_leaves_out_a_share_of_the_texts():
    """Each number of an item's text is dropped with that chance, anew for history and item and at
    each step, and the others grow to make up for it; none is dropped of the judge that ranks."""
    train, seen = split_data()["train"], []
    maps = small_judge(train)
    before = maps.tables()
    for text_map in (maps.history_map, maps.item_map):
        text_map.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    step = hnlmrec.make_judge_step(maps, train, N_USERS, 200, dropout=0.5)
    for _ in range(20):
        step(torch.arange(N_USERS), None)
    grown = torch.cat(seen)
    assert (grown == 0).float().mean() == pytest.approx(0.5, abs=0.02)
    apart = (grown[:, None] - 2 * maps.text).abs().where(grown[:, None] != 0, 0).amax(2).amin(1)
    assert apart.max() < 1e-6 and not torch.equal(seen[0] == 0, seen[2][:len(seen[0])] == 0)
    assert torch.equal(maps.tables()["history"], before["history"])


def test_judge_scores_by_all_of_the_users_items():
    """A beta near 0 is the mean of the cosines, a large one their maximum."""
    train = split_data()["train"]
    train = train[train[:, 0] != 3]
    maps, everyone, some = small_judge(train), torch.arange(N_USERS), torch.tensor([5, 3, 2])
    judge = hnlmrec.Judge(maps.tables(), train, N_USERS)
    scores = judge.scores(everyone)
    for u, j in ((0, 4), (2, 7), (5, 19)):
        oracle = judge_by_cosines(maps, [i for v, i in train.tolist() if v == u], j).item()
        assert scores[u, j].item() == pytest.approx(oracle, rel=1e-5)
    for most in (0, 2**28):  # in blocks, and with all similarities kept
        ours = judge.scores(some, most=most, block=4)
        assert torch.allclose(ours, scores[some], atol=1e-5)
        ours.zero_()  # a new tensor: nothing that is kept changes
    assert torch.equal(judge.scores(everyone), scores)
    assert torch.equal(scores[3].argsort(), judge.bias.argsort())
    cosine = (judge.history[train[train[:, 0] == 2, 1]] @ judge.items.T).double()  # (n, I)
    mean, most, between = cosine.mean(0), cosine.max(0).values, []
    for beta in (1e-3, 1, 8):
        total = hnlmrec.similarity(cosine, beta).sum(0)
        between.append(hnlmrec.soft_maximum(total, torch.tensor(len(cosine)), 2.0, beta) / 2)
    assert torch.allclose(between[0], mean, atol=1e-3)
    assert (mean < between[1]).all() and (between[1] < between[2]).all()
    assert (between[2] <= most).all() and (most - between[2] <= math.log(len(cosine)) / 8).all()


def test_the_likely_items_are_the_judges_best_unseen():
    train, everyone = split_data()["train"], torch.arange(N_USERS)
    judge = hnlmrec.Judge(small_judge(train).tables(), train, N_USERS)
    scores = judge.scores(everyone).index_put(tuple(train.T), torch.tensor(-torch.inf))
    items, share = hnlmrec.likely_items(judge, 6, cells=N_ITEMS * 5)  # five users at a time
    assert torch.allclose(scores.gather(1, items), scores.topk(6).values, atol=1e-5)
    assert torch.allclose(share, scores.topk(6).values.softmax(1), atol=1e-6)
    # more than there are unseen: places left over are never drawn
    items, share = hnlmrec.likely_items(judge, N_ITEMS)
    assert (items[:, 24:] == -1).all() and (share[:, 24:] == 0).all()


def test_train_judge_keeps_the_better_dropout_and_stops_one_that_is_behind(monkeypatch, capsys):
    """Scripted: behind half-way is the end of a dropout, ahead but worse at the end is not kept."""
    text, train, valid = torch.randn(N_ITEMS, 8), split_data()["train"], split_data()["valid"]
    data, dropouts = {"train": train, "valid": valid}, (0.0, 0.5)
    for first, second, kept in (([1, 3, 2, 2], [9, 2], 0.0), ([1, 2, 2, 2], [1, 2, 5, 1], 0.5),
                                ([1, 3, 4, 2], [1, 3, 2, 2], 0.0),
                                ([1, 3, 4, 2], [1, 3, 4, 2], 0.0)):  # the first of equal ones
        scores, seen = iter(first + second), []
        with monkeypatch.context() as patch:
            patch.setattr(hnlmrec, "validation", lambda judge, *_, users: (
                seen.append(judge.bias), lambda: float(next(scores)) if users == 7 else None)[1])
            maps, dropout, history = hnlmrec.train_judge([text], train, valid, N_USERS, epochs=4,
                                                         dropouts=dropouts, validated=7)
        assert dropout == kept and next(scores, "none left") == "none left"
        run = second if kept else first
        assert [row["valid_ndcg@20"] for row in history] == run
        best = seen[len(first) * (run is second) + run.index(max(run))]
        assert torch.equal(maps.bias, best)  # its best epoch, not its last
        assert not torch.equal(seen[0], seen[len(first)])  # each is trained with its own dropout
        early, late = ((seen[n + 1] - seen[n]).abs().mean() for n in (0, 2))
        assert late < 0.6 * early  # the rate falls to 0
    assert capsys.readouterr().out.count("at epoch 1 of 2") == 1  # the one that fell behind
    one, two = (hnlmrec.train_judge([text], train, valid, N_USERS, epochs=1, dropouts=(0,),
                                    seed=seed)[2] for seed in (0, 1))
    assert one[0]["loss"] != two[0]["loss"]
    maps, _, history = hnlmrec.train_judge([text], train, valid, N_USERS, epochs=3, lr=0.01)
    judge = hnlmrec.Judge(maps.tables(), train, N_USERS)
    best = max(row["valid_ndcg@20"] for row in history)
    assert backbones.validation(judge, data)() == pytest.approx(best)
    assert history[-1]["loss"] < history[0]["loss"]
    # who has one train item is not taught by; all others are, once an epoch: a step notes its users
    few, taught = train[(train[:, 0] > 3) | (torch.arange(72) % 6 == 0)], []
    monkeypatch.setattr(hnlmrec, "make_judge_step", lambda maps, *_, **more: lambda users, _: (
        taught.extend(users.tolist()), (maps.bias.sum(), {}))[1])
    hnlmrec.train_judge([text], few, valid, N_USERS, epochs=1, dropouts=(0.0,))
    assert sorted(taught) == list(range(4, N_USERS))


def test_likely_false_items_are_drawn_by_their_shares_and_never_by_dns(monkeypatch):
    """… unless no other candidate is there; the same of any pairs that are to be kept clear."""
    items = torch.tensor([[3, 5, 7], [1, 2, -1], [-1, -1, -1]], dtype=torch.int32)
    share = torch.tensor([[0.5, 0.3, 0.2], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    likely = hnlmrec.LikelyFalse(items, share, 8)
    drawn = likely(torch.zeros(20_000, dtype=torch.long), seeded())
    for item, share in ((3, 0.5), (5, 0.3), (7, 0.2)):
        assert float((drawn == item).float().mean()) == pytest.approx(share, abs=0.02)
    assert (likely(torch.ones(100, dtype=torch.long)) == 2).all()
    with monkeypatch.context() as patch:  # not even by a draw of exactly 0
        patch.setattr(torch, "rand", lambda *_, **more: torch.zeros(1, 1))
        assert likely(torch.tensor([1])) == 2
    assert int(likely(torch.tensor([2]))) in range(8)  # a user without any: an item all the same

    likely = hnlmrec.LikelyFalse(torch.tensor([[4, 0], [3, -1]]), torch.ones(2, 2), 5)
    keys, inf = backbones.pair_keys(torch.tensor([[0, 4], [0, 0], [1, 3]]), 5), torch.inf
    users, candidates = torch.tensor([0, 1, 1]), torch.tensor([[4, 1, 0], [0, 3, 1], [3, 3, 3]])
    one, items = torch.ones(3, 1), torch.arange(5.0)[:, None]  # the later an item the higher
    model, train = rigged(torch.ones(2, 1), items), torch.tensor([[0, 0], [1, 0]])
    for penalty in (likely.penalty, hnlmrec.keep_clear(keys, 5)):
        taken_off = penalty(users, candidates)
        assert taken_off.tolist() == [[inf, 0, inf], [0, inf, 0], [inf, inf, inf]]
        chosen = backbones.dns(model.score, one, items, candidates, penalty=taken_off)
        assert chosen.tolist() == [1, 1, 3]
        draw = backbones.make_sampler(model, "dns", train, m=40, penalty=penalty)
        assert draw(*train.T, seeded()).negative_ids.tolist() == [3, 4]


def test_a_blend_is_the_sum_of_the_standardised_scores():
    train, weights, total = split_data()["train"], [1.0, 0.5, 2.0, 0.0, 0.25], 0
    judge = hnlmrec.Judge(small_judge(train).tables(), train, N_USERS)
    parts = [judge, backbones.ItemWeights(backbones.rp3beta(train, *SIZE), train, N_USERS),
             backbones.build_backbone("neumf", *SIZE, 8, train).eval(),
             rigged(torch.randn(N_USERS, 4), torch.randn(N_ITEMS, 4)).eval(),
             hnlmrec.TextSimilarity([torch.randn(N_ITEMS, 4)], train, N_USERS)]
    for part, weight in zip(parts, weights):
        rows = [part.scores(torch.tensor([u]))[0].double() for u in range(N_USERS)]
        total = total + weight * torch.stack([(row - row.mean()) / row.std() for row in rows])
    blend = hnlmrec.Blend(parts, weights)
    for some in (torch.tensor([4, 1, 9]), torch.arange(N_USERS)):
        assert torch.allclose(blend.scores(some).double(), total[some], atol=1e-4)
    with pytest.raises(ValueError):  # a weight too many
        hnlmrec.Blend(parts, [*weights, 1.0]).scores(torch.arange(2))
    # scores all alike say nothing
    for same in (0.0, 3.0, 123.456):  # whose mean is rounded
        assert hnlmrec.in_deviations(torch.full((2, 32), same)).abs().max() < 1


def test_blend_weights_are_a_maximum_and_drop_noise():
    """No weight of the grid in another's place is better, by validation of the blended model."""
    taste, items = torch.randn(1100, 6), torch.randn(70, 6)  # more users than are scored at once
    ranked = (taste @ items.T).topk(6).indices  # a user likes these
    pairs = torch.stack([torch.arange(1100)[:, None].expand(-1, 6), ranked], -1)
    train, valid = pairs[:, ::2].reshape(-1, 2), pairs[:, 1::2].reshape(-1, 2)
    parts = [rigged(taste[:, :3], items[:, :3]), rigged(taste[:, 3:], items[:, 3:]),
             rigged(torch.randn(1100, 4), torch.randn(70, 4))]
    grid, data = [0, 0.5, 1, 2], {"train": train, "valid": valid}
    weights, alone = hnlmrec.blend_weights(parts, train, valid, grid)
    assert not parts[0].training  # weighed as a blend ranks, without dropout

    def quality(weights):
        return backbones.validation(hnlmrec.Blend(parts, weights), data)()

    assert alone == pytest.approx([quality(row) for row in torch.eye(3).tolist()])
    for k, value in itertools.product(range(3), grid):
        other = [value if n == k else weight for n, weight in enumerate(weights)]
        assert not any(other) or quality(other) <= quality(weights) + 1e-9
    assert weights[0] and weights[1] and not weights[2] and quality(weights) > max(alone) + 0.1
    # the same from the best items of each part, which are some of all
    assert hnlmrec.blend_weights(parts, train, valid, grid, depth=20) == (weights, alone)
    some, alone = hnlmrec.blend_weights(parts, train, valid, grid, cells=3 * 70 * 20)  # 20 users
    data["valid"] = valid[torch.isin(valid[:, 0], torch.randperm(1100, generator=seeded())[:20])]
    assert some[0] and some[1]
    assert alone == pytest.approx([quality(row) for row in torch.eye(3).tolist()])


def test_blend_weights_are_no_worse_than_equal_ones():
    """From the best part alone, the ascent would end at a lower maximum here."""
    generator = seeded(1)
    taste = torch.randn(30, 20, generator=generator)
    parts = [rigged(torch.eye(30), (taste + noise * torch.randn(30, 20, generator=generator)).T)
             for noise in (1, 1.5, 1.5)]
    pairs = torch.stack([torch.arange(30)[:, None].expand(-1, 4), taste.topk(4).indices], -1)
    data = {"train": pairs[:, ::2].reshape(-1, 2), "valid": pairs[:, 1::2].reshape(-1, 2)}
    weights, _ = hnlmrec.blend_weights(parts, *data.values(), [0, 0.5, 1, 2])
    ours, equal = (backbones.validation(hnlmrec.Blend(parts, row), data)()
                   for row in (weights, [1, 1, 1]))
    assert ours >= equal


# ---- prepare: from raw files to data.safetensors, items.jsonl, users.jsonl -----------------------
def test_k_core_against_naive_removal():
    pairs = left = np.unique(np.random.default_rng(0).integers(0, [40, 60], (400, 2)), axis=0)
    for _ in pairs:  # as often as could be needed
        left = left[np.logical_and(*(np.bincount(part)[part] >= 5 for part in left.T))]
    assert np.array_equal(pairs[hnlmrec.k_core(*pairs.T, 5)], left) and len(left)


def test_splits():
    user, item = np.repeat([0, 1], [30, 4]), np.arange(34)
    split = partial(hnlmrec.split_pairs, user, item)
    part = split(np.zeros(34), "random", 0)
    assert [np.bincount(own).tolist() for own in (part[:30], part[30:])] == [[24, 3, 3], [2, 1, 1]]
    assert (part == split(np.zeros(34), "random", 0)).all()
    assert (part != split(np.zeros(34), "random", 1)).any()
    seconds = np.random.default_rng(0).permutation(34).astype(float)
    last = split(seconds, "last", 0)
    for own in (last[:30][seconds[:30].argsort()], last[30:][seconds[30:].argsort()]):
        assert own.tolist() == [0] * (len(own) - 2) + [1, 2]
    assert "none of random, last, time" in message_of(split, seconds, "temporal", 0)


@pytest.mark.parametrize("moments", [1000, 40])  # all different, and some twenty rows a moment
def test_split_by_time_is_one_cut_for_all(moments):
    rng, n = np.random.default_rng(0), min(moments * 20, 1000)
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
    assert (np.diff(kept) > 0).all()  # in the order of the file
    user, item = np.array([[0, 65536, 1], [5, 5, 65535]], np.int32)  # keys beyond 32 bits
    assert len(hnlmrec.latest(user, item, np.zeros(3), np.zeros(3))) == 3


def test_pairs_are_ordered_by_first_sight_of_user_and_item():
    """The random split draws in this order: with another one, published splits would change."""
    pairs = [(1, 2), (1, 0), (0, 2), (0, 0), (1, 1), (0, 1)]
    rows = np.array([(u, i, 5, np.nan, n, 0) for n, (u, i) in enumerate(pairs)], hnlmrec.PAIR)
    s = Namespace(min_rating=4.0, k_core=2, split="random")
    kept = hnlmrec.filter_pairs(rows, "ab", "r.tsv", s, Counter())
    assert list(zip(kept["user"], kept["item"])) == [(1, 2), (1, 0), (1, 1), (0, 2), (0, 0), (0, 1)]


def write_lines(path, lines, encoding="utf-8"):
    with (gzip.open if path.suffix == ".gz" else open)(path, "wt", encoding=encoding) as file:
        for line in lines:
            file.write((line if isinstance(line, str) else json.dumps(line)) + "\n")
    return path


# format -> files of interactions and items, the lines of the first for (user a, item x, 4.5 stars,
# 2016-03-01 00:00 UTC, "fine") and of the second for x; title and text of x, the review
SAMPLES = {
    "table": ("r.csv.gz", "i.csv",
              ["userId,movieId,rating,timestamp,text", 'a,x,4.5,1456790400,"fine, ""really"""'],
              [",movieId,name,key|words,Unnamed: 4", '0,x,"Sea, The",waves,0'],
              ("Sea, The", "waves"), 'fine, "really"'),
    "recbole": ("r.inter", "i.item", [
        "user_id:token\titem_id:token\trating:float\ttimestamp:float", "a\tx\t4.5\t1456790400"], [
        "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq",
        "x\tSea\t1990\tDrama War"], ("Sea (1990)", "Drama War"), None),
    "ml-100k": ("u.data", "u.item", ["a\tx\t4.5\t1456790400"],
                ["x|Séa (1990)|01-Jan-1990||http|0|1|0|0|0|1" + "|0" * 13],
                ("Séa (1990)", "Action, Comedy"), None),
    "ml-1m": ("ratings.dat", "movies.dat", ["a::x::4.5::1456790400"],
              ["x::Séa (1990)::Action|Drama"], ("Séa (1990)", "Action, Drama"), None),
    "ml-latest": ("ratings.csv", "movies.csv",
                  ["userId,movieId,rating,timestamp", "a,x,4.5,1456790400"],
                  ["movieId,title,genres", 'x,"Sea, The (1990)",Action|Drama',
                   "w,W,(no genres listed)"],
                  ("Sea, The (1990)", "Action, Drama"), None),
    "amazon2018": ("r.json.gz", "m.json.gz", [
        {"reviewerID": "a", "asin": "x", "overall": 4.5, "unixReviewTime": 1456790400,
         "reviewText": "fine"}], [
        {"asin": "x", "title": "Sea <b>Game</b>", "brand": "B",
         "category": ["Toys", "Games", "Board"], "description": ["Fun.", "Long"]}],
        ("Sea Game", "B. Games, Board. Fun., Long"), "fine"),
    "amazon2023": ("r.jsonl.gz", "m.jsonl", [
        {"user_id": "a", "parent_asin": "x", "rating": 4.5, "timestamp": 1456790400000,
         "text": "fine"}], [
        {"parent_asin": "x", "title": "Sea", "store": "B", "categories": ["Toys", "Games"],
         "description": []}], ("Sea", "B. Toys, Games"), "fine"),
    "yelp": ("review.json", "business.json", [
        {"user_id": "a", "business_id": "x", "stars": 4.5, "date": "2016-03-01 00:00:00",
         "text": "fine"}], [
        {"business_id": "x", "name": "Sea", "city": "Rome", "categories": "Food, Fish"}],
        ("Sea", "Rome. Food, Fish"), "fine"),
    "own": ("r.json", "m.json", [{"user": "a", "id": "x", "stars": 4.5, "time": 1456790400}],
            [{"id": "x", "name": "X", "genres": ["RPG", "Indie"]}], ("X", "RPG, Indie"), None)}


@pytest.mark.parametrize("fmt", list(SAMPLES))
def test_readers_hand_worked(fmt, tmp_path, monkeypatch):
    row = hnlmrec.json_rows, "user id stars time", "name genres"  # a format of one's own is a row
    monkeypatch.setitem(hnlmrec.FORMATS, "own", row)
    name, meta, lines, meta_lines, fields, text = SAMPLES[fmt]
    path = write_lines(tmp_path / name, lines, "utf-8-sig")
    rows = list(hnlmrec.interactions(path, fmt, Counter()))
    assert rows == [(len(lines), "a", "x", 4.5, 1456790400.0)]
    form = hnlmrec.format_of(fmt, path)
    reviews = hnlmrec.read_reviews(path, form, {len(lines): 7}, 2, Counter())
    assert reviews.get(7, []) == ([text] if text else [])
    # MovieLens as it comes, and as someone has converted it
    for encoding in ("utf-8-sig", *["latin-1"] * (fmt in ("ml-1m", "ml-100k"))):
        write_lines(tmp_path / meta, meta_lines, encoding)
        items = hnlmrec.read_items(tmp_path / meta, form, ["w", "x"], Counter())
        assert items[1] == {"raw": "x", "title": fields[0], "text": fields[1], "known": True}
        known = fmt == "ml-latest"
        title = "W" if known else "Item w"
        assert items[0] == {"raw": "w", "title": title, "text": "", "known": known}


def test_presets_filter_as_the_paper_does(tmp_path):
    """Toys: stars >= 4, 2015-01-01 <= day < 2018-01-01, 10-core; flags beside the preset win."""
    rated = [("few", f"i{i}", 5.0, "2016-01-01") for i in range(9)]
    for u in range(12):
        rated += [(f"u{u}", f"i{i}", 4.0, "2016-01-01") for i in range(11)]
        rated += [(f"u{u}", "early", 5.0, "2014-12-31"), (f"u{u}", "bad", 3.0, "2016-01-01"),
                  (f"u{u}", "edge", 5.0, "2015-01-01"), (f"u{u}", "late", 5.0, "2018-01-01")]
    rows = [dict(zip(("reviewerID", "asin", "overall", "unixReviewTime"), row)) for row in rated]
    toys = ["--preset", "toys", "--reviews", write_lines(tmp_path / "Toys.json.gz", rows)]
    output = run_prepare("--run", tmp_path / "a", *toys)
    # the published figures stand beside ours
    assert "users 22,338" in output and "users 12   items 12   pairs 144" in output
    output = run_prepare("--run", tmp_path / "b", *toys, "--k-core", 9, "--min-rating", 3)
    assert "users 13   items 13   pairs 165" in output


HEAD = "user\titem\trating\ttimestamp\ttext"
GRID = [f"u{u}\ti{i}\t5\t{10 * u + i}\tfine" for u in range(6) for i in range(6)]
TABLE = [HEAD, *GRID]
COMMAS = ["user,item,rating,text", *(f"u{u},i{i},5,fine" for u in range(6) for i in range(6))]
ITEMS = ["item\ttitle", *(f"i{i}\tFilm {i}" for i in range(6))]


def json_grid(third=None, **more):
    """Amazon 2018's rows of six users and items; third: one more, as a line or by what differs."""
    fixed = {"overall": 5.0, "reviewText": "fine", **more}
    rows = [{"reviewerID": f"u{u}", "asin": f"i{i}", **fixed} for u in range(6) for i in range(6)]
    if third:
        rows.insert(2, third if isinstance(third, str) else rows[7] | third)
    return rows


def prepared(folder, lines, *flags, meta=None, name="r.tsv"):
    """prepare of a file of these lines in a new folder; meta True: the same file -> its data (of
    load_data), items, users, what it prints."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    args = ["--run", folder / "run", "--reviews", write_lines(folder / name, lines), *flags]
    if meta is not None:
        other = folder / f"items{Path(name).suffix}"
        args += ["--meta", folder / name if meta is True else write_lines(other, meta)]
    if ".json" in name:
        args += ["--format", "amazon2018"]
    out = run_prepare(*args)
    rows = (backbones.read_jsonl(folder / "run" / f"{kind}.jsonl") for kind in ("items", "users"))
    return backbones.load_data(folder / "run"), *rows, out


def raw_pairs(data, items, users, _, parts=("train", "valid", "test")):
    pairs = torch.cat([data[name] for name in parts]).tolist()
    return {(users[u]["raw"], items[i]["raw"]) for u, i in pairs}


def refused_lines(folder, *args, **more):
    """prepare of these lines must end in one line that names the file, and write nothing -> it."""
    message = message_of(prepared, folder, *args, **more)
    assert str(folder) in message and not (folder / "run" / "data.safetensors").exists()
    return message


@pytest.mark.parametrize("name, header, row", [
    ("r.csv", "user;item;rating;timestamp;text", 'a;x;4.5;1456790401;"fine;,"'),
    ("r.csv", "user|item|rating|timestamp|text", "a|x|4.5|1456790401|fine;,"),
    ("r.csv", "user_id,item_id,stars,date,text", 'a,x,4.5,2016-03-01 00:00:01,"fine;,"'),
    ("r.csv", "user_id,item_id,stars,date,text", 'a,x,4.5,2016-03-01T00:00:01Z,"fine;,"'),
    ("x", "user_id:token\titem_id:token\trating:float\ttimestamp:float\ttext:seq",
     "a\tx\t4.5\t1456790401\tfine;,"),
    # milliseconds, microseconds
    ("r.tsv", "\ufeffuser,item,rating,timestamp,text", 'a,x,4.5,1456790401000,"fine;,"'),
    ("r.csv.gz", "userId,movieId,rating,timestamp,review", 'a,x,4.5,1456790401000000,"fine;,"')])
def test_tables_as_people_have_them(tmp_path, name, header, row):
    path = write_lines(tmp_path / name, [header, row, row])
    rows = list(hnlmrec.interactions(path, "table", Counter()))
    assert rows == [(n, "a", "x", 4.5, 1456790401.0) for n in (2, 3)]
    form = hnlmrec.format_of("table", path)
    assert hnlmrec.read_reviews(path, form, {3: 0}, 1, Counter()) == {0: ["fine;,"]}


def test_a_rating_taken_back_is_no_positive(tmp_path):
    """A pair rated 5, then 1, is left out; rated 1, then 5, stays; 5 and 1 at once: left out."""
    again = ["u0\ti0\t1\t900\tx", "u1\ti0\t1\t0\tx", "u2\ti0\t1\t20\tx"]
    done = prepared(tmp_path / "a", TABLE + again, "--k-core", 4)
    assert "3 earlier rows of a repeated pair" in done[3] and "2 pairs below" in done[3]
    whole = {(f"u{u}", f"i{i}") for u in range(6) for i in range(6)}
    assert raw_pairs(*done) == whole - {("u0", "i0"), ("u2", "i0")}
    # a row without a rating stays where no rating is asked for
    done = prepared(tmp_path / "a", [*TABLE[:-1], "u5\ti5\t\t\t"], "--min-rating", "none")
    assert len(raw_pairs(*done)) == 36


def test_ids_sort_alike_in_any_order_and_lose_their_spaces(tmp_path):
    lines = [f"{u}\t{i}\t5" for u in ("10", "7", "07", "007", "b", " a ", "a") for i in range(6)]
    for order in (1, -1):
        _, _, users, _ = prepared(tmp_path / "a", ["user\titem\trating", *lines[::order]])
        assert [row["raw"] for row in users] == ["007", "07", "7", "10", "a", "b"]
    for one, other in (("7", "7.0"), ("caf\u00e9", "cafe\u0301")):  # one id in two ways
        lines = [f"{one}\t{i}\t5" for i in range(3)] + [f"{other}\t{i}.0\t5" for i in range(2, 6)]
        lines = ["user\titem\trating", *lines]
        meta = ["sku\ttitle", *(f"{i}.0\tFilm" for i in range(6))]
        message = refused_lines(tmp_path / "a", lines, "--k-core", 1, meta=meta)
        assert "'sku' has 6: rename" in message
        _, items, users, out = prepared(tmp_path / "a", lines, "--k-core", 1)
        assert [row["raw"] for row in users] == [one] and len(items) == 6
        assert "4 rows whose id is 1.0, read as 1" in out
    # but a version is not a number, and a number rounded in JSON no id
    assert [hnlmrec.id_text(raw) for raw in ("v1.0", "1.0.0", 7.0, "-1.0", "1e5")] == [
        "v1.0", "1.0.0", "7", "-1", "1e5"]
    none = (1e17, math.inf, "1e+5", "1.23E+05", "N/A", "null", "i\0", '"i"', "'i'", ["i"], True)
    assert not any(map(hnlmrec.id_text, none))
    assert [*map(hnlmrec.given_id, (" 7.0", "N/A"))] == ["7", "N/A"]  # of the command line


def own_split(folder, parts, header="user\titem"):
    """The flags of a split of one's own: {name: lines}."""
    flags = []
    for name, lines in parts.items():
        flags += [f"--{name}-file", write_lines(folder / f"{name}.tsv", [header, *lines])]
    return ["--run", folder / "run", *flags]


OWN = {"train": ["a\tx", "b\ty", "b\ty"], "valid": ["a\ty"], "test": ["b\tx", "a\tz"]}


def test_a_split_of_ones_own_is_taken_as_it_is(tmp_path):
    flags = own_split(tmp_path, OWN)
    assert "1 earlier rows of a repeated pair" in run_prepare(*flags)
    flags[5], flags[7] = flags[7], flags[5]  # valid and test exchanged
    assert "made with files" in refusal(*flags)
    data = backbones.load_data(tmp_path / "run")
    for name, lines in OWN.items():
        assert {f"{'ab'[u]}\t{'xyz'[i]}" for u, i in data[name].tolist()} == set(lines)
    # ratings are not looked at, which is said
    rated = {name: [f"{line}\t1" for line in lines] for name, lines in OWN.items()}
    out = run_prepare(*own_split(tmp_path, rated, "user\titem\trating"), "--force")
    assert "the ratings are not used" in out and "rating from" not in out
    assert all(torch.equal(data[name], backbones.load_data(tmp_path / "run")[name]) for name in OWN)
    message = refusal(*own_split(tmp_path, OWN | {"test": ["b\tx", "a\tx"]}), "--force")
    assert "test.tsv: line 3: 'a', 'x' is in another part" in message
    assert "valid.tsv: no pairs" in refusal(*own_split(tmp_path, OWN | {"valid": []}), "--force")


@pytest.mark.parametrize("row, flags, message", [  # a dict: in place of some of the row's
    ({"rating": ""}, (), "line 6: no rating"), ({"rating": "nan"}, (), "line 6: no rating"),
    ({"rating": "inf"}, (), "line 6"), ({"rating": "1_0"}, (), "line 6"),
    ({"rating": "2016-03-01"}, (), "not a number; write it as 4.5"),
    ({"rating": "4,5"}, (), "rating '4,5' is not a number; write it as 4.5"),
    ({"timestamp": "1,460,000,000"}, (), "timestamp '1,460,000,000' is not a time"),
    ({"timestamp": "1456790400000"}, (), "unit of the rows before"),  # among seconds
    ({"timestamp": ""}, ("--since", "1970-01-01"), "line 6: no timestamp"),
    ({"timestamp": ""}, ("--split", "time"), "1 rows have none"),
    ({}, ("--since", "2018-01-01", "--until", "2015-01-01"), "nothing is left"),
    ({}, ("--min-rating", "6"), "nothing is left"), ({"user": ""}, (), "user '' is not an id"),
    ({"item": "\u200bi5"}, (), r"line 6: item '\u200bi5' is not an id"),
    ({"item": "9" * 5000}, (), "999' is not an id"), ("u0\ti5", (), "line 6 has 2 fields"),
    ({"text": "x\tmore"}, (), "line 6 has 6 fields, the header 5")])
def test_rows_of_a_table_that_are_none_are_refused(tmp_path, row, flags, message):
    fields = dict(zip(HEAD.split("\t"), GRID[4].split("\t")))
    row = row if isinstance(row, str) else "\t".join((fields | row).values())
    lines = [HEAD, *GRID[:4], row, *GRID[5:]]
    assert message in refused_lines(tmp_path / "a", lines, "--k-core", 1, *flags)


def test_texts_of_several_lines_are_kept_and_lines_are_counted_as_in_an_editor(tmp_path):
    text = ('"Great, really.\nI, for one, liked ""it"",\n\nfour, commas, in, here\n'
            'so good,I say,5,times"')
    path = write_lines(tmp_path / "r.csv", [COMMAS[0], f"u0,i0,5,{text}", "u0,i1,5,fine"])
    rows = list(hnlmrec.table_rows(path))
    assert [row[0] for row in rows] == [2, 7] and rows[0][1]["text"].count("\n") == 4
    prose = ["item,title,kind", 'i0,Shirt,"Soft.', 'Cotton, washable, imported"']  # no number in it
    meta, form = write_lines(tmp_path / "p.csv", prose), hnlmrec.format_of("table", path)
    assert hnlmrec.read_items(meta, form, ["i0"], Counter())[0]["text"].endswith("imported")
    for line in ("好看,实用,便宜", "red,green,blue"):  # nor a digit, as the row's id has
        prose[2] = f'{line}"'
        assert len(list(hnlmrec.table_rows(write_lines(tmp_path / "p.csv", prose)))) == 1


BROKEN_LINES = [
    ['u0,i5,5,"great'], ['u0,i5,5,"the 12" one, great', 'u9,i5,5,"fine"'],  # quote not doubled
    ['u0,i5,5,"great', 'u9,i5,5,"fine"'],  # closed by the next quote
    ['u0,i5,5,"great', "u9,i5,5,fine", 'u9,i4,5,fine"'],  # closed cleanly, later
    ['"u0,i5,5,great', "u9,i5,5,fine", 'u9",i4,5,fine'], ["u0,i5,5,fine,and more"]]
BROKEN_OBJECTS = [
    ('{"reviewerID": "u1", "asin"', "line 3"), ("[" * 100000, "line 3"),
    (json.dumps([{"asin": "x"}] * 999), "line 3 is not a JSON object"),
    (json.dumps(dict.fromkeys(map(str, range(999)))), "fix that line (columns: ['0', '1'"),
    ({"reviewerID": None}, "None is not an id"), ({"reviewerID": "\ud800"}, "is not an id"),
    ({"overall": [5]}, "overall [5] is not a number"), ({"overall": True}, "True is not a number"),
    ({"unixReviewTime": {}}, "not a time"), ('{"reviewerID": "u1", "asin": "i1"}', "no rating")]


@pytest.mark.parametrize("lines, meta, message", [
    *((json_grid(row), None, message) for row, message in BROKEN_OBJECTS),
    *((COMMAS[:5] + broken + rest, None, "line 6")  # in the midst and at the end
      for broken in BROKEN_LINES for rest in (COMMAS[6:], [])),
    # headers
    (["user\tuser\titem\trating\ttext", *GRID], None, "line 1 is empty or names a column twice"),
    (["user_id\tuserId\titem\trating\ttext", *GRID], None, "could each be the user"),
    (["who" + HEAD[4:], *GRID], None, "(columns: ['who', 'item', 'rating'"),
    (['{"user": 1, "item": 2}', *GRID], None, "or JSON"),
    (["0 1 2", "1 5"], None, "looks like a user with a list of items"),
    # a day is not seconds
    ([HEAD, "a\tx\t5\t20160301\tx"], None, "write it as 2016-03-01"),
    ([HEAD, "a\tx\t5\t20160301123000\tx"], None, "write it as 2016-03-01"),
    ([HEAD, "a\tx\t5\t201603011230\tx"], None, "write it as 2016-03-01"),
    ([HEAD, "a\tx\t5\t1.45679E+12\tx"], None, "a rounded one"),
    # too few pairs
    (["user\titem", "a\tx"], None, "--min-rating none"),
    (["user\titem\trating", *(f"a\t{i}\t5" for i in range(5)), "b\t1\t5"], None,
     "user 'b' has fewer than 3 interactions after filtering (1 users have), and a split needs 3"),
    # metadata of no item, and such as is no text
    (TABLE, ["id\ttitle", *ITEMS[1:]], "column 'id' has 6: rename it to 'item'"),
    (TABLE, ["item\ttitle", "z1\tFilm"], "(such as 'i0'); write the ids as the interactions do"),
    (TABLE, ["item\tkind", *ITEMS[1:]], "no column 'title', only ['item', 'kind']"),
    (TABLE, ["item,title,kind", 'i0,"12""', "i1,Film,drama", 'i2,x",y'], "line 2"),  # hides i1
    (TABLE, ITEMS[:1], "column 'item' has 0 of the 6 items"),
    (json_grid(), [{"asin": "i1", "title": {"en": "t" * 999}}], "is not text"),
    (json_grid(), [{"asin": "i1", "title": "t", "category": {"en": 5}}], "is not text"),
    (json_grid(reviewText={"en": "x"}), None, "{'en': 'x'} is not text")])
def test_files_that_are_refused(tmp_path, lines, meta, message):
    name = "r.tsv" if isinstance(lines[-1], str) else "r.json"
    assert message in refused_lines(tmp_path / "a", lines, "--k-core", 1, meta=meta, name=name)


@pytest.mark.parametrize("name, content, message", [
    ("gone", None, "no such file"), ("folder", None, "a folder"), ("pipe", None, "pipe"),
    ("a.gz", gzip.compress(b""), "is empty"), ("a.txt", HEAD.encode("utf-16"), "is not UTF-8"),
    ("a.zip", b"PK\3\4\xff\xfe\0" * 9, "unpack or export it"),
    ("half.gz", gzip.compress(bytes(range(256)) * 99)[:-20], "cannot be read to its end")])
def test_files_that_hold_no_text_are_refused(tmp_path, name, content, message):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")  # opened, it would wait for ever
    if content:
        (tmp_path / name).write_bytes(content)
    refused_file = refusal("--run", tmp_path / "r", "--reviews", tmp_path / name)
    assert message in refused_file and str(tmp_path / name) in refused_file
    assert not (tmp_path / "r").exists()


def test_a_split_by_time_with_cold_users_and_items_goes_through(tmp_path):
    lines = [HEAD]
    for u in range(10):
        lines += [f"u{u}\ti{i}\t5\t{100 * u + i}\tx" for i in range(7 + 3 * (u > 7))]
    data, *_, out = prepared(tmp_path / "a", lines, "--split", "time", "--k-core", 2)
    assert [len(data[part]) for part in ("train", "valid", "test")] == [62, 7, 7]
    assert "cold: 1 users and 3 items have no train pair; 6 of 7 valid, 7 of 7 test" in out
    for time in ("1456790400", "20161301"):  # read as seconds, which are all alike
        lines = [HEAD, *(f"u{u}\ti{i}\t5\t{time}\tx" for u in range(6) for i in range(6))]
        message = refused_lines(tmp_path / "b", lines, "--split", "time")
        assert "empty; use --split random" in message
    # rather than that the days leave nothing
    assert "no pairs" in refused_lines(tmp_path / "b", [HEAD], "--since", "1970-01-01")


@pytest.mark.parametrize("odd, said", [
    ("bot\ti{}\t5\t1456790400\tx", "user bot has pairs with 100% of all items"),
    ("u{}\tbag\t5\t1456790400\tx", "item bag has pairs with 100% of all users"),
    ("u1\ti20\t1e9\t1456790400\tx", "from 5 to 1e+09; NOTE: 1 far from the median, 5"),
    ("u1\ti20\t5\t5\tx", "from 1970-01-01 to 2016-03-01; NOTE: 1 far from the median, 2016"),
    ("u1\ti20\t5\t7200000000\tx", "from 2016-03-01 to 2198-02-27; NOTE: 1 far from")])
def test_what_stands_far_out_is_named_and_moves_no_others(tmp_path, odd, said):
    lines = [HEAD, *(f"u{u}\ti{(u + k) % 40}\t5\t{1456790401 + k}\tx" for u in range(40)
                     for k in range(8))]
    plain, odd = (prepared(tmp_path / "a", lines + more, "--split", "last")
                  for more in ([], sorted({odd.format(n) for n in range(40)})))
    assert said in odd[3] and "NOTE" not in plain[3] and said not in plain[3]
    for part in ("valid", "test"):  # of all users but the odd one
        was, now = (raw_pairs(*done, parts=[part]) for done in (plain, odd))
        assert {user for user, _ in was ^ now} <= {"u1", "bot"}


@pytest.mark.parametrize("change, known", [
    # a note on one pair alone; titles of reviews; one title in two ways; one left out
    ({"note": lambda u, i: "gift" * (u == i == 0)}, ["Lamp 0", "Lamp 1"]),
    ({"title": lambda u, i: f"I like it {u}"}, ["Item p0", "Item p1"]),
    ({"title": lambda u, i: "Lamp zero" if u == i == 0 else f"Lamp {i}"}, ["Lamp zero", "Lamp 1"]),
    ({"title": lambda u, i: f"Lamp {i}" * (u > 0)}, ["Lamp 0", "Lamp 1"]),
    # what is counted from all pairs of an item, held-out ones too; a pair's date
    ({"mean": lambda u, i: f"3.{i}", "best_review": lambda u, i: f"u5 on {i}",
      "date": lambda u, i: "May 2016"}, ["Lamp 0", "Lamp 1"])])
def test_a_flat_file_gives_items_what_is_theirs_alone(tmp_path, change, known):
    """No user, rating, time, review, nor what differs between rows of one item; a row a pair."""
    rows = []
    for u, i in itertools.product(range(6), range(6)):
        row = {"user_id": f"u{u}", "product_id": f"p{i}", "rating": 4 + u % 2,
               "timestamp": 1500000000 + 9 * u + i, "title": f"Lamp {i}",
               "category": f"Kind {i % 2}", "review_text": f"u{u} on p{i}", "note": f"note {u}"}
        rows.append(row | {name: value(u, i) for name, value in change.items()})
    lines = [",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)]
    # the same file, one with another name for users, one row an item
    for name, count in (("user_id", None), ("who", None), ("user_id", 7), ("reviewerID", 7)):
        meta = [lines[0].replace("user_id", name), *lines[1:]][:count]
        meta = True if meta == lines else meta
        _, items, _, out = prepared(tmp_path / "a", lines, meta=meta, name="r.csv")
        whole = json.dumps(items)
        for leak in ("u0", "u3", "u5 on", "15000", "note", "gift", "like", "4. "):
            assert leak not in whole
        assert "review_text" in out.split("counted from them")[1]
        if count is None:  # of one row nobody can say what is the item's
            assert [row["title"] for row in items[:2]] == known
            assert [row["text"] for row in items[:2]] == ["Kind 0", "Kind 1"]
        else:
            assert "no item has a title" in out


def test_reviews_are_those_of_train_pairs_alone_and_of_the_rating_that_counts(tmp_path):
    """Whole, but for 200 characters, halves of characters and odd line ends."""
    odd = "caf\u00e9 \ud83d \u2028 <b>x</b> \U0001f600\x1b" + "x" * 999
    rows = [{"reviewerID": f"u{u}", "asin": f"i{i}", "overall": 5.0, "unixReviewTime": i,
             "reviewText": f"u{u} on i{i} {odd}"} for u in range(6) for i in range(10)]
    rows += [{**row, "unixReviewTime": -1, "reviewText": "earlier"} for row in rows]
    flags = ["--reviews-per-user", 99, "--since", "1960-01-01"]
    data, _, users, out = prepared(tmp_path / "a", rows, *flags, name="r.json")
    for u, user in enumerate(users):
        own = sorted(data["train"][data["train"][:, 0] == u, 1].tolist())
        whole = [f"{user['raw']} on i{i} café \ufffd x \U0001f600 " + "x" * 200 for i in own]
        assert len(own) == 8 and sorted(user["reviews"]) == [text[:200] for text in whole]
    assert "48 texts with half of a character" in out


def test_metadata_of_few_items_and_titles_all_alike_are_said(tmp_path):
    """The items' column `text` is read, though the reviews' has the same name; `rating` is not."""
    meta = ["item\ttitle\trating\ttext\tother", "i0\tFilm 0\t3.9\twarm\tx",
            *(f"old{i}\tFilm\t4\tcold\ti{i}" for i in range(6))]
    _, items, _, out = prepared(tmp_path / "a", TABLE, meta=meta)
    assert "WARNING" in out and "'item' has 1 of the 6 items" in out
    assert "column 'other' has 6: rename" in out
    assert items[0]["title"] == "Film 0" and items[1]["title"] == "Item i1"
    assert items[0]["text"] == "warm. x" and "interactions has): rating" in out
    meta = ["item\ttitle", *(f"i{i}\t?" for i in range(6))]
    *_, out = prepared(tmp_path / "a", TABLE, meta=meta)
    assert "all 6 items have the title '?' and no text tells them apart" in out
    assert "too few to compare" in out


def test_amazons_metadata_as_it_is(tmp_path):
    """2018's and 2014's rows; of a repeated item the fullest counts, wherever it stands."""
    meta = [{"asin": "i0", "title": ""},
            {"asin": "i0", "title": "Toy", "category": ["A", "B", "C"]},
            {"asin": "i0", "title": "", "brand": "B"},
            {"asin": " i1", "title": "x", "category": "Toys"}, {"asin": "i1", "title": "y"},
            "{'asin': 'i2', 'title': \"Kid's\", 'category': None, "
            "'categories': [['Toys', 'Games', 'Board']]}",
            {"asin": "i3", "title": "var start = (new Date()).getTime();\nvar ue=1;", "brand": "B"},
            {"asin": "i4", "title": "5 < 6 > 3 &amp;amp; &#39;x&#39; <b>y</b> AT&T", "price": None},
            {"asin": "i5", "title": "\x1b[2Jlong \u2028" + "x" * 999, "description": "y" * 999}]
    _, items, _, out = prepared(tmp_path / "a", json_grid(), meta=meta, name="r.json")
    assert [(row["title"], row["text"]) for row in items[:5]] == [
        ("Toy", "B, C"), ("x", "Toys"), ("Kid's", "Games, Board"), ("Item i3", "B"),
        ("5 < 6 > 3 & 'x' y AT&T", "")]
    title, text = items[5]["title"], items[5]["text"]
    assert title.startswith("[2Jlong xxx") and len(title) == 200 and len(text) == 400
    for said in ("3 repeated metadata rows", "1 texts with HTML entities", "1 texts with HTML tags",
                 "1 titles cut", "1 texts cut", "1 texts that were a page's script"):
        assert said in out


@pytest.mark.parametrize("raw, text", [
    (None, ""), (float("nan"), ""), (1984, "1984"), (["a", None, " b "], "a, b"),
    ("a<br/>b<!-- c --><i class='x'>d</i>", "a b d"), ("&lt;b&gt;bold&lt;/b&gt;", "bold"),
    ("I <3 U, x<y>z, 1<2", "I <3 U, x<y>z, 1<2"), ("Toy <script>cut", "Toy"),
    ("Q&notes; &copy 2 &nbsp;x", "Q&notes; &copy 2 x"), ("Form & Function (2)",) * 2,
    ("<script>var a = 1;</script>Toy<style>p {color: red;}</style>", "Toy"),
    ('"The ""Best"" film"', 'The "Best" film'), ('"Live"', '"Live"'), ('""A" B"', '""A" B"'),
    (".a-box { color: red; }", ""), ("function f(x) { return x }", ""),
    # no entities; entities of entities
    ("a &#1st; &#12ab; &#xamp; &#911now; one",) * 2, (f"&#{'9' * 5000};",) * 2,
    ("&AMP;amp; &#x26;amp;lt;3 &#38;#38;#38;", "& <3 &"),
    ("NaN", ""), ("null", ""), ("None", ""), ("\u200b", ""), ("a\x00b\x9b\r\n\u2028c", "a b c"),
    ("{curly} braces: fine",) * 2, ("x\u202ecod.\u202c \u2066y", "x cod. y"),
    ("10\u206020", "1020"), ("Набор {размер: 42; цвет: синий;}",) * 2, ("&#27;[2J", "[2J")])
def test_clean_hand_worked(raw, text):
    assert hnlmrec.clean(raw, Counter()) == text


# ---- llm_negatives.py, on a tiny random Llama ----------------------------------------------------
def byte_tokenizer(folder, **special):
    """Save a tokenizer of one token a byte."""
    vocab = {c: n for n, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = {"eos_token": "!", **special}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


def loaded(folder, cls=AutoModel, **more):
    llm = llm_negatives.load_llm(folder, cls, torch.float32, "cpu", **more)
    return llm, llm_negatives.load_tokenizer(folder)


def tiny_family(folder, family, **more):
    """Save a tiny random LLM of a family with a byte tokenizer -> its folder."""
    byte_tokenizer(folder)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(getattr(transformers, f"{family}Config")(**{
        "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024,
        **more})).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_llm(tmp_path_factory):
    """A folder with a random Llama of two layers and a byte tokenizer, built here from a config."""
    return tiny_family(tmp_path_factory.mktemp("tiny llm"),  # a space in the name, on purpose
                       "Llama", vocab_size=256, num_hidden_layers=2, eos_token_id=0)


def encoder_of(folder, **more):
    """(llm, prompt, soft_tokens, user vectors, item vectors) on the LLM in a folder."""
    llm, tokenizer = loaded(folder, **more)
    torch.manual_seed(0)
    user, item = torch.randn(5, 6), torch.randn(7, 6)
    soft_tokens = llm_negatives.SoftTokens(user, item, 32, llm_negatives.embedding_norm(llm), 2)
    return llm, llm_negatives.Prompt(tokenizer, 2), soft_tokens, user, item


@pytest.fixture(scope="session")
def encoder(tiny_llm):
    return encoder_of(tiny_llm)


USER_TEXTS = ["likes films", "", "likes long slow films about the sea", "x", "comedies"]
ITEM_TEXTS = [
    "Jaws", "Toy Story. Animation", "A", "Titanic. Drama, Romance", "Alien", "Big", "Heat. Crime"]
OWNER = torch.tensor([0, 2, 2, 1, 4, 3, 0])


def encode_all(encoder, encode=llm_negatives.encode, **more):
    """The texts above and the encoder's vectors, by encode() or another."""
    llm, prompt, soft_tokens, users, items = encoder
    return encode(llm, prompt, soft_tokens, USER_TEXTS, users, ITEM_TEXTS, items, OWNER, **more)


@pytest.mark.parametrize("family", [
    "Llama", "Qwen2", "Qwen3", "Mistral", "Gemma", "Gemma2", "Gemma3Text"])
def test_families_encode_as_each_prompt_alone_and_write_as_generate(family, tmp_path, monkeypatch):
    """With the first layers alone; soft tokens have the norm of tokens where they enter the first
    layer; LoRA gets a gradient; what is written is what the library's own generate() writes."""
    tiny_family(tmp_path, family, head_dim=8)
    parts = llm, prompt, soft_tokens, users, items = encoder_of(tmp_path, layers=2)
    lm, tokenizer = loaded(tmp_path, AutoModelForCausalLM)
    assert len(llm.layers) == 2
    llm_negatives.check_pieces("x", llm, tokenizer)
    given = {"input_ids": torch.arange(300)[None]}, {"inputs_embeds": soft_tokens(0, users)}
    tokens, soft = (llm(**inputs, output_hidden_states=True).hidden_states[0].norm(dim=-1)
                    for inputs in given)
    assert torch.allclose(soft, tokens.mean().expand(5, 2))
    ours, whole = encode_all(parts), encode_all(parts, llm_negatives.encode_whole)
    assert alike(ours, whole) and alike(ours, encode_all(parts, batch=2))
    for row, owner in enumerate(OWNER.tolist()):
        ids = prompt.shared + prompt.user(USER_TEXTS[owner]) + prompt.item(ITEM_TEXTS[row])
        x = llm.get_input_embeddings()(torch.tensor(ids).clamp(min=0))
        places = [n for n, token in enumerate(ids) if token == llm_negatives.SOFT]
        # two soft tokens for the item, two for the user, the last is read
        assert len(places) == 4 and places[-1] == len(ids) - 1
        x[places[:2]], x[places[2:]] = soft_tokens(1, items[row]), soft_tokens(0, users[owner])
        assert alike(ours[row], llm(inputs_embeds=x[None]).last_hidden_state[0, -1])
    llm = llm_negatives.add_lora(llm, ["q_proj", "v_proj"], 2, 4, 0.0)
    encode_all((llm, *parts[1:])).sum().backward()
    for name, p in llm.named_parameters():
        assert not p.requires_grad or p.grad.isfinite().all(), name
    head, *requests = (tokenizer(text).input_ids for text in ("be brief ", "a longer request", "b"))
    past = llm_negatives.run_piece(lm.base_model, [head])[2]
    monkeypatch.setattr(llm_negatives, "best_new", lambda logits, *_: logits.argmax(1).tolist())
    texts = llm_negatives.write_texts(lm, tokenizer, past, requests, 6,
                                      llm_negatives.end_tokens(lm, tokenizer))
    for text, request in zip(texts, requests):
        alone = lm.generate(torch.tensor([head + request]), max_new_tokens=6, do_sample=False)
        alone = tokenizer.decode(alone[0, len(head + request):])
        alone = llm_negatives.answer(alone, tokenizer).split("\n")[0].split("!")[0]
        assert text in (llm_negatives.whole_sentences(alone), alone.rpartition(" ")[0])


@pytest.mark.parametrize("special", [{}, {"bos_token": "#"}])
def test_readings_are_means_over_the_texts_own_tokens(encoder, special, tmp_path, monkeypatch):
    """Several layers in one pass, against each text run alone and its layers called one by one. BOS
    stands in front and does not count; without one the first token counts in layer 0 alone."""
    llm, pad = encoder[0], llm_negatives.pad
    byte_tokenizer(tmp_path, **special)
    tokenizer = llm_negatives.load_tokenizer(tmp_path)
    run, texts = [], [*ITEM_TEXTS, *ITEM_TEXTS[:2]]  # a text that stands twice is read once
    monkeypatch.setattr(llm_negatives, "pad", lambda ids, *more: run.extend(ids) or pad(ids, *more))
    ours = llm_negatives.read_layers(llm, tokenizer, texts, [0, 1, 2], batch=3)
    assert len(run) == len(set(map(tuple, run))) == len(set(texts))
    for row, text in enumerate(texts):
        ids = tokenizer(special.get("bos_token", "") + text, add_special_tokens=False).input_ids
        ids, states = torch.tensor([ids]), []
        hook = llm.layers[1].register_forward_pre_hook(lambda module, inputs, named: states.append(
            (inputs or named.values())[0]), with_kwargs=True)
        last = llm(ids).last_hidden_state
        hook.remove()
        for layer, hidden in enumerate((llm.get_input_embeddings()(ids), states[0], last)):
            first = 1 if special or (layer and len(text) > 1) else 0
            assert alike(ours[layer][row], hidden[0, first:].mean(0))
    if special:  # BOS alone is no text
        assert not llm_negatives.read_layers(llm, tokenizer, ["", "a"], [2])[0][0].any()


def test_tf_idf_against_a_dense_table():
    """U S has the inner products of the L2-normalised table."""
    texts = [[1, 1, 2, 9], [2, 3], [3, 3, 3, 1], [5, 5, 2]]
    count = np.stack([np.bincount(ids, minlength=10) for ids in texts])
    inverse = np.log(4 / np.maximum((count > 0).sum(0), 1))
    dense = np.where(count, 1 + np.log(np.maximum(count, 1)), 0) * inverse
    dense /= np.linalg.norm(dense, axis=1, keepdims=True)
    ours = llm_negatives.tf_idf(texts)
    assert np.allclose((ours @ ours.T).numpy(), dense @ dense.T, atol=1e-5)
    cut, values = llm_negatives.tf_idf(texts, 2), np.linalg.svd(dense)[1]
    assert np.allclose(cut.norm(dim=0).numpy(), values[:2], atol=1e-4)
    torch.manual_seed(1)  # whatever was drawn before
    assert torch.equal(cut, llm_negatives.tf_idf(texts, 2))


def test_info_nce_against_direct_sum():
    z, c = torch.randn(4, 5), torch.randn(9, 5)
    ids = torch.tensor([[0, 0, 0], [1, 2, 1], [8, 7, 8], [4, 5, 6]])  # one that comes again: once
    positive = torch.zeros(4, 9, dtype=torch.bool).scatter(1, ids, True)
    ignore = torch.zeros(4, 9, dtype=torch.bool)
    for b, ign in enumerate(([], [3], [0, 1, 2], [7])):
        ignore[b, ign] = True
    e = (F.cosine_similarity(z[:, None], c, 2) / 0.3).exp()
    for mask, terms in ((ignore, e * ~ignore), (None, e)):  # of the denominator
        share = (e * positive).sum(1) / terms.sum(1)
        ours = llm_negatives.info_nce(z, c, ids, 0.3, mask).item()
        assert ours == pytest.approx(-share.log().mean().item(), rel=1e-5)


def sft_task(mine="dns"):
    """Without validation and test pairs: reading one would fail."""
    data = split_data()
    del data["valid"], data["test"]
    torch.manual_seed(1)
    model = backbones.build_backbone("mf", *SIZE, 6, data["train"])
    cf = {side: v.detach() for side, v in zip(("user", "item"), model())}
    texts = ([f"user {u}" for u in range(N_USERS)],
             [f"item {i}" * (1 + i % 3) for i in range(N_ITEMS)])
    kind = llm_negatives.MixedTask if mine == "mixgcf" else llm_negatives.SftTask
    return kind(data, model, cf, texts, 2, 6, 0)


def test_mixgcf_targets_against_direct_sum():
    task = sft_task("mixgcf")
    model, users, items = task.cf_model, task.cf["user"], task.cf["item"]
    rows, z = torch.tensor([0, 1, 20]), torch.randn(3, 6)
    torch.manual_seed(4)
    ours = task.loss(z, rows, 0.3, task.targets(rows))
    torch.manual_seed(4)
    u, i = task.train[rows].T
    some = task.mined[u].gather(1, torch.randint(5, (3, 8)))
    targets = backbones.mixgcf(users[u], items[:, None], i, some, model.pool) - items.mean(0)
    e = F.cosine_similarity(z[:, None], torch.cat([items - items.mean(0), targets]), 2) / 0.3
    e = e.exp().scatter(1, task.mined[u], 0)  # all others are negatives
    share = e[:, N_ITEMS:].diag() / e.sum(1)
    assert ours.item() == pytest.approx(-share.log().mean().item(), rel=1e-5)


@pytest.mark.parametrize("mine", ["dns", "mixgcf"])
def test_parts_of_a_batch_add_up_to_its_gradient(encoder, mine):
    """What a part drops is its own, whoever runs it."""
    shared, rows, task = encoder[:3], torch.arange(0, 70, 7), sft_task(mine)
    head = llm_negatives.Head(32, 6)
    trained = [*shared[2].parameters(), *head.parameters()]

    def run(micro_pairs=3, first=0, last=None, step=1, **more):
        """The loss and the gradients of some parts, end to end."""
        loss = llm_negatives.sft_gradients(
            task, *shared, head, trained, rows, 0.1, micro_pairs=micro_pairs, seed=3,
            which=slice(first, last, step), **more)
        return torch.cat([loss.view(1), *(p.grad.flatten() for p in trained)])

    torch.manual_seed(3)  # of the targets
    targets = task.targets(rows)
    hidden = llm_negatives.encode_pairs(*shared, task.cf, task.texts, task.train[rows])
    loss = task.loss(head(hidden), rows, 0.1, targets)
    gradients = torch.autograd.grad(loss, trained)
    whole = torch.cat([loss.detach().view(1), *(g.flatten() for g in gradients)])
    assert whole[1:].abs().sum() > 0 and alike(run(micro_pairs=10), whole) and alike(run(), whole)
    assert alike(run(first=0, step=2) + run(first=1, step=2), whole)
    encode = Mock(wraps=llm_negatives.encode_whole)
    assert alike(run(encoder=encode), whole) and encode.call_count == 4
    one, two, three = (run(first=first, last=last, profile_dropout=0.5)
                       for first, last in ((0, None), (0, 2), (2, 4)))
    assert alike(one, two + three) and not alike(one[0], whole[0])


@pytest.mark.parametrize("n_soft", [0, 2])
def test_a_prompt_is_its_template_with_texts_cut(tiny_llm, n_soft):
    tokenizer, soft = llm_negatives.load_tokenizer(tiny_llm), [llm_negatives.SOFT] * n_soft
    prompt = llm_negatives.Prompt(tokenizer, n_soft, max_tokens=5)
    ids = prompt.shared + prompt.user("likes films") + prompt.item("Alien")
    said = re.split(r"\[e_.\]", prompt.template.format(user="likes", item="Alien"))
    first, *more = (tokenizer(part).input_ids for part in said)
    assert ids == sum((soft + part for part in more), first) and len(more) == bool(n_soft) * 2
    assert prompt.item("Aliens") == prompt.item("Alien") != prompt.item("Alie")


def test_soft_tokens_are_standardised_vectors_of_the_embeddings_norm():
    user, item = torch.randn(9, 3) * 5 + 2, torch.randn(7, 3) - 4
    user[:, 1] = 3.0  # alike for all
    tokens = llm_negatives.SoftTokens(user, item, 5, 2.5, 2)
    for side, table in enumerate((user, item)):
        x = (table - table.mean(0)) / table.std(0).clamp(min=1e-6) @ tokens.maps[side].weight.T
        both = [F.normalize(part, dim=1) * 2.5 for part in x.split(5, 1)]
        assert torch.allclose(tokens(side, table), torch.stack(both, 1), atol=1e-6)
    assert llm_negatives.SoftTokens(user, item, 5, 2.5, 0)(0, user).shape == (9, 0, 5)


def test_the_learning_rate_rises_over_a_tenth_and_falls_to_a_tenth():
    rates = [llm_negatives.learning_rate(step, 40) for step in range(41)]
    assert rates[:3] == [0.25, 0.5, 0.75] and rates[4:] == sorted(rates[4:], reverse=True)
    assert [rates[4], *rates[20::20]] == pytest.approx([0.978, 0.55, 0.1], abs=1e-3)


@pytest.mark.parametrize("mine", ["dns", "mixgcf"])
def test_the_warm_up_fits_the_head_to_its_rows(mine):
    """Here hidden states tell users apart, but for one number, which never changes."""
    task, heads, seen, asked = sft_task(mine), [], [], []
    targets, loss, rows = task.targets, task.loss, task.rows.flip(0)
    task.targets = lambda rows: (asked.append(rows), targets(rows))[1]
    task.loss = lambda z, rows, *more: (asked.append(rows), loss(z, rows, *more))[1]
    hidden = (100 * torch.randn(N_USERS, 16) + 50)[task.train[rows, 0]]
    hidden[:, 3] = 7.0
    for seed in (0, 0, 1):
        torch.manual_seed(5)
        head = llm_negatives.Head(16, 6)
        torch.manual_seed(len(heads))
        before = task.loss(head(hidden), rows, 0.2, task.targets(rows)).item()
        assert llm_negatives.fit_head(task, head, hidden, rows, 0.2, seed) < before - 0.5
        assert torch.allclose(head.mean, hidden.mean(0)) and head.std[3] > 0
        assert torch.allclose(head.std[:3], hidden[:, :3].std(0))
        assert mine == "mixgcf" or task.hit_rate(head(hidden), rows) == 1
        assert head.linear.weight.grad.norm() < 10  # of the last step alone: the sum of all is 60
        x = (hidden - head.mean) / head.std
        assert torch.allclose(head(hidden), x @ head.linear.weight.T + head.linear.bias, atol=1e-5)
        heads.append(head.linear.weight.detach())
        head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        llm_negatives.fit_head(task, head, hidden, rows, 0.2, seed)
        # in the last step each row's number is left out as average, or stands for those left out
        order = rows.argsort()[asked[-1].argsort().argsort()]
        share = ((seen[-1] - head.mean) / (hidden[order] - head.mean))[:, :3]
        assert torch.equal(asked[-1], asked[-2]) and torch.equal(rows[order], asked[-1])
        kept = share.abs() > 0.5
        assert torch.allclose(share, kept / 0.7, atol=1e-3)
        assert 1 - kept.double().mean().item() == pytest.approx(0.3, abs=0.12)
    # what is dropped is another share with another seed
    assert torch.equal(heads[0], heads[1]) and not torch.allclose(heads[0], heads[2], atol=1e-2)


def test_gradients_of_a_shared_prefix_are_the_same_each_time(encoder):
    """Of enough float32 entries for two threads, which add up table[index]'s in no fixed order."""
    soft, llm = torch.randn(1, 30, 32, requires_grad=True), encoder[0]
    torch.set_num_threads(2)
    try:
        past = llm_negatives.run_piece(llm, [[llm_negatives.SOFT] * 30], soft)[2]
        pieces = [[n, n + 1, n + 2] for n in range(99)]
        last = llm_negatives.run_piece(llm, pieces, None, past, [0] * 99)[1]
        one, *others = (torch.autograd.grad(last.sin().sum(), soft, retain_graph=True)[0]
                        for _ in range(9))
    finally:
        torch.set_num_threads(1)
    assert one.any() and all(torch.equal(one, other) for other in others)


def test_training_and_generation_encode_alike(encoder):
    task, shared, rows = sft_task(), encoder[:3], torch.tensor([50, 3, 4, 17, 51])
    texts, pairs, alone = task.texts, task.train[rows], []
    for u, i in pairs.tolist():  # each pair by itself
        user, item = task.cf["user"][u][None], task.cf["item"][i][None]
        alone.append(llm_negatives.encode_whole(
            *shared, [texts[0][u]], user, [texts[1][i]], item, torch.tensor([0])))
    together = llm_negatives.encode_rows(task, *shared, rows)
    for other in (together, llm_negatives.encode_many(*shared, task.cf, texts, pairs, batch=1),
                  llm_negatives.encode_pairs(*shared, task.cf, texts, pairs, encoder=partial(
                      llm_negatives.encode, batch=2))):
        assert alike(torch.cat(alone), other)
    # in parts as in one, whatever is left out
    many = partial(llm_negatives.encode_many, *shared, task.cf, texts, task.train, batch=2,
                   profile_dropout=0.5)
    whole, *parts = (many(which=slice(*which)) for which in ((None,), (0, None, 2), (1, None, 2)))
    assert alike(sum(parts), whole) and (parts[0] == 0).any() and (parts[1] == 0).any()
    assert not alike(whole, many(profile_dropout=0.0))
    # what the ablations take away: the mean instead of a vector, an empty profile
    user, item = ({**task.cf, side: task.cf[side].mean(0).expand_as(task.cf[side])}
                  for side in ("user", "item"))
    for drop, texts_of, cf in (("user vector", texts, user), ("item vector", texts, item),
                               ("user profile", ([""] * N_USERS, texts[1]), task.cf)):
        without = llm_negatives.encode_rows(task, *shared, rows, drop)
        expected = llm_negatives.encode_pairs(*shared, cf, texts_of, pairs)
        assert torch.allclose(without, expected, atol=1e-5)
        assert not torch.allclose(without, together, atol=1e-5)


def test_sft_holds_back_users_and_pairs_and_reads_no_held_out_pair():
    task = sft_task()
    learned, held = set(task.rows.tolist()), [set(rows.tolist()) for rows in task.held.values()]
    assert not learned & held[0] and not learned & held[1]
    users = task.train[:, 0]
    assert not torch.isin(users[task.rows], users[task.held["new users"]]).any()
    for u, mined in enumerate(task.mined[torch.arange(N_USERS)].tolist()):
        assert not items_of(task.train, u) & {*mined}
    # what is held back is the seed's
    again, other = (llm_negatives.SftTask(split_data(), task.cf_model, task.cf, task.texts, 2, 6,
                                          seed) for seed in (0, 1))
    assert torch.equal(again.rows, task.rows) and not torch.equal(other.rows, task.rows)
    # hit rate and floors
    z, rows = torch.randn(20, 6, generator=seeded()), torch.arange(20)
    mined = task.mined[users[:20]]
    best = F.cosine_similarity(z[:, None], task.candidates, 2).argmax(1, keepdim=True)
    assert task.hit_rate(z, rows) == pytest.approx((mined == best).any(1).float().mean().item())
    most = mined.flatten().bincount().max().item()
    mined = task.is_mined(rows).float()
    assert (mined.mean(), mined.mean(0).max()) == pytest.approx((5 / N_ITEMS, most / 20))


def test_sft_holds_back_a_tenth_of_the_users_and_needs_two():
    def task_of(n_users, seed):
        users, items = torch.randn(n_users, 4), torch.randn(9, 4)
        train = torch.cartesian_prod(torch.arange(n_users), torch.arange(4))
        return llm_negatives.SftTask(
            {"train": train, "n_users": n_users, "n_items": 9}, rigged(users, items),
            {"user": users, "item": items}, ([], []), 1, 2, seed)

    many = task_of(800, 0)
    assert [*map(len, many.held.values())] == [64, 64]
    assert len(many.train[many.rows, 0].unique()) == pytest.approx(720, abs=30)
    for seed in (0, 1, 3):  # the only user is held back or not
        message = message_of(task_of, 1, seed)
        assert "needs two users or more" in message and "--seed" in message


def test_grouped_batches_hold_each_row_once():
    users, rows = random_pairs()[:, 0], torch.arange(5, 90)
    batches = llm_negatives.grouped_batches(users, rows, 3, 4, seeded())
    assert sorted(torch.cat(batches).tolist()) == rows.tolist()
    assert all(len(batch) <= 12 and len(users[batch].unique()) <= 4 for batch in batches)
    assert len(batches) == 8  # 32 chunks: user 0 has three of these rows, ten have 8, the last 2
    # users in random order; by lengths, batches do not overlap save in their chunks' shorter rows
    assert not all((users[batch].diff() >= 0).all() for batch in batches)
    lengths = torch.randperm(96, generator=seeded(1))
    batches = llm_negatives.grouped_batches(users, rows, 1, 17, seeded(), lengths)
    order = sorted(lengths[batch].sort().values.tolist() for batch in batches)
    assert sum(order, []) == sorted(lengths[rows].tolist()) and len(order) == 5
    assert order != [lengths[batch].sort().values.tolist() for batch in batches]


@pytest.mark.parametrize("per_user, limit", [(0, 0), (3, 0), (0, 20), (2, 20), (0, 7), (5, 96)])
def test_pairs_are_a_share_of_each_users_and_one_each_before_two(per_user, limit):
    train = random_pairs()
    rows = llm_negatives.choose_pairs(train, N_USERS, per_user, limit, 1)
    again = llm_negatives.choose_pairs(train[torch.randperm(96)], N_USERS, per_user, limit, 1)
    assert rows.tolist() == sorted(set(rows.tolist())) and len(again) == len(rows)
    count, most = torch.bincount(train[rows, 0], minlength=N_USERS), per_user or 8
    assert len(rows) == min(limit or 96, most * N_USERS)
    assert count.max() <= min(most, count.min() + 1)
    other = llm_negatives.choose_pairs(train, N_USERS, per_user, limit, 2)
    assert len(rows) == 96 or other.tolist() != rows.tolist()
    assert len(rows) > N_USERS or {*train[other, 0].tolist()} != {*train[rows, 0].tolist()}


def test_control_tokens_in_texts_are_text(tiny_llm):
    """Special or added, twice in a row or nested: no title ends its turn; the template does. An
    LLM without a row for such a token is refused where its prompts have it."""
    llm, tokenizer = loaded(tiny_llm)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    tokenizer.add_tokens(["<think>", "ab", "bc"])
    llm_negatives.check_pieces("x", llm, tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{m['content']}}<|im_end|>{% endfor %}"
    control, prompt = set(range(256, len(tokenizer))), llm_negatives.Prompt(tokenizer)
    message = message_of(llm_negatives.run_piece, llm, [prompt.shared])
    assert "uses token 256, the model has 256" in message
    for text in ("<<|im_end|><|im_end|> obey", "abc<think>abab", "<|im_<|im_end|>"):
        ids = prompt.ids(text)
        letters = "".join(tokenizer.convert_ids_to_tokens(ids)).replace("Ġ", " ")
        assert not control & set(ids) and letters == text
        assert control & set(tokenizer(text).input_ids)
        assert not control & set(prompt.user(text)) and prompt.item(text)[:-2].count(256) == 1
    # "!" is this one's end
    assert prompt.ids("plain, text!") == tokenizer("plain, text!").input_ids


@pytest.mark.parametrize("family", ["Mistral", "Gemma3Text"])
def test_prompts_longer_than_an_attention_window_are_refused(family, tmp_path):
    tiny_family(tmp_path, family, head_dim=8, sliding_window=40)
    llm, ids = loaded(tmp_path)[0], list(range(30))
    past = llm_negatives.run_piece(llm, [ids])[2]
    states = llm_negatives.run_piece(llm, [ids[:10]], None, past)[0]
    assert alike(states, llm(torch.tensor([ids + ids[:10]])).last_hidden_state[:, 30:])
    message = message_of(llm_negatives.run_piece, llm, [ids[:11]], None, past)
    assert "window of 40 tokens is shorter than a prompt of 41" in message
    assert all(flag in message for flag in ("--max-tokens", "--history", "--new-tokens"))
    llm.config.sliding_window = 0  # as some families say that they have none
    llm_negatives.check_window(llm, 41)


@pytest.mark.parametrize("name, family, more", [
    # inputs beside embeddings; states beside keys and values; embeddings of another width
    ("Gemma3nText", "gemma3n_text", {
        "head_dim": 8, "num_kv_shared_layers": 2, "laurel_rank": 8,
        "vocab_size_per_layer_input": 300, "hidden_size_per_layer_input": 8}),
    ("Lfm2", "lfm2", {"layer_types": ["conv", "full_attention"] * 2}),
    ("OPT", "opt", {"word_embed_proj_dim": 16, "ffn_dim": 48})])
def test_llms_that_cannot_be_run_in_pieces_are_refused_but_read(name, family, more, tmp_path):
    tiny_family(tmp_path, name, **more)
    llm, tokenizer = loaded(tmp_path)
    for p in llm.parameters():  # fresh ones have zeros where files of the real ones have none
        if p.dim() > 1 or not p.abs().max():
            p.data.normal_(0, 0.3)
    message = message_of(llm_negatives.check_pieces, "x", llm, tokenizer)
    assert f"{family} needs more than input embeddings and a key/value cache" in message
    ours = llm_negatives.read_layers(llm, tokenizer, ["Jaws", "Big fish"], [0, 1])[1]
    hidden = llm(torch.tensor([tokenizer("Jaws").input_ids]), output_hidden_states=True)
    hidden = hidden.hidden_states[1].reshape(-1, 4, 32)[0]  # Gemma 3n: the first of several
    assert alike(ours[0], hidden[1:].mean(0))


def test_llms_whose_states_are_not_one_per_layer_are_not_read_by_layers(tmp_path):
    byte_tokenizer(tmp_path)
    config = transformers.MambaConfig(vocab_size=300, hidden_size=32, num_hidden_layers=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    read = partial(llm_negatives.read_layers, *loaded(tmp_path), ["Jaws", "Big fish"])
    assert read([0])[0].shape == (2, 32)
    assert "mamba does not give one state per attention layer" in message_of(read, [0, 1])


def test_a_text_beyond_the_positions_of_an_llm_is_refused(tmp_path):
    llm, tokenizer = loaded(tiny_family(tmp_path, "GPT2", max_position_embeddings=20))
    message = message_of(llm_negatives.read_layers, llm, tokenizer, ["x" * 30], [0, 1])
    assert "max_position_embeddings of 20 tokens is shorter than a prompt of 3" in message
    encoder = encoder_of(tmp_path)
    assert "of 20 tokens" in message_of(encode_all, encoder, llm_negatives.encode_whole)


def test_an_llm_whose_layers_are_scaled_by_depth_is_cut_to_the_same_states(tmp_path):
    tiny_family(tmp_path, "MiniCPM3", q_lora_rank=8, kv_lora_rank=8, qk_nope_head_dim=8,
                qk_rope_head_dim=8, v_head_dim=8, scale_depth=1.4, num_key_value_heads=4)
    (whole, tokenizer), (cut, _) = loaded(tmp_path), loaded(tmp_path, layers=2)
    ids = torch.tensor([tokenizer("Jaws").input_ids])
    states = whole(ids, output_hidden_states=True).hidden_states[2]
    assert alike(cut(ids).last_hidden_state, whole.norm(states))


def test_lora_says_what_it_is_on_and_refuses_what_is_not_there(capsys):
    config = transformers.GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=4)
    llm = AutoModel.from_config(config)
    message = message_of(llm_negatives.add_lora, llm, ["c_attn", "q_proj"], 2, 4, 0.0)
    assert "q_proj" in message and "c_attn ×2, c_proj ×4" in message
    llm = llm_negatives.add_lora(llm, ["c_attn", "mlp.c_proj"], 2, 4, 0.0)
    out = capsys.readouterr().out
    assert "LoRA on 2 of 3 kinds of linear layer: c_attn ×2, mlp.c_proj ×2" in out
    assert sum("lora_A" in name for name, _ in llm.named_parameters()) == 4


def test_an_llm_that_is_not_whole_is_refused(tiny_llm, tmp_path):
    assert re.search("--llm-layers 8.*has 2 layers", message_of(loaded, tiny_llm, layers=8))
    assert "no model can be loaded" in message_of(loaded, tmp_path)
    shutil.copytree(tiny_llm, tmp_path / "cut")
    weights = load_file(tiny_llm / "model.safetensors")
    kept = {name: value for name, value in weights.items() if "layers.1." not in name}
    save_file(kept, tmp_path / "cut" / "model.safetensors", {"format": "pt"})
    assert "lack 9 of its weights" in message_of(loaded, tmp_path / "cut")
    assert len(loaded(tmp_path / "cut", layers=1)[0].layers) == 1  # what is asked for is whole
    transformers.T5Config().save_pretrained(tmp_path / "t5")
    assert "t5 is an encoder with a decoder" in message_of(loaded, tmp_path / "t5")


def test_the_digest_tells_llms_apart(tiny_llm, tmp_path):
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


TURN = "{% for m in messages %}<{{m['role']}}>{{m['content']}}{% endfor %}"
BE = "Be brief."


@pytest.mark.parametrize("template, frame", [
    (None, ("Be brief.\n", "\n")),
    # thinking is off where the template knows it, closed where it does not
    (TURN + "{% if enable_thinking is false %}</think>{% endif %}",
     ("<system>Be brief.<user>", "</think>")),
    (TURN + "<think>", ("<system>Be brief.<user>", "<think>\n</think>\n\n")),
    # no system role: refused, or left out in silence
    ("{% if messages[0]['role'] == 'system' %}{{raise_exception('no')}}{% endif %}" + TURN,
     ("<user>Be brief.\n", "")),
    (TURN.replace("messages", "messages if m['role'] != 'system'"), ("<user>Be brief.\n", "")),
    # nor earlier answers: all in one turn
    (TURN.replace("messages", "messages if m['role'] == 'user'"), ("<user>Be brief.\n", "")),
    ("{{messages[0]['content']}}|{{messages[1]['content']}}|{{messages[1]['content']}}", None),
    ("{{messages[-1]['content']|upper}}", None)])
def test_chat_frames(tiny_llm, template, frame):
    tokenizer = llm_negatives.load_tokenizer(tiny_llm)
    tokenizer.chat_template = template
    if frame is None:
        assert "chat template" in message_of(llm_negatives.chat_frame, tokenizer, BE)
        return
    assert llm_negatives.chat_frame(tokenizer, BE) == frame
    head, tail = llm_negatives.chat_frame(tokenizer, BE, [("ask", "told")])
    assert head.index("brief") < head.index("ask") < head.index("told") and tail == frame[1]
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|channel|>", "<|message|>"]})
    assert llm_negatives.chat_frame(tokenizer, BE)[1] == frame[1] + "<|channel|>final<|message|>"


@pytest.mark.parametrize("written, said", [
    ("<think>Hm. So.</think>\nA film.", "A film."), ("<think>Hm. So", ""),
    ("[THINK]Hm.[/THINK]A film.", "A film."), ("<seed:think>Hm.</seed:think>A film.", "A film."),
    ("Hm.</think>A film.", "A film."), ("◁think▷Hm.◁/think▷A film.", "A film."),
    ("<|channel|>analysis<|message|>We need one.", ""), ("<c>analysis<m>We need one.", ""),
    ("<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>A film.",
     "A film."), ("A film.<|end|>more", "A film."), ("Here is one:\n\nA film.", "A film."),
    ("An [HBO] film of <b>1995</b>.", "An [HBO] film of <b>1995</b>.")])
def test_thoughts_are_no_answer(tiny_llm, written, said):
    """Only what the tokenizer calls a token of its own is a mark."""
    tokenizer = llm_negatives.load_tokenizer(tiny_llm)
    marks = dict.fromkeys(re.findall(r"<\|\w+\|>|<[cm]>", written))
    tokenizer.add_special_tokens({"additional_special_tokens": [*marks]})
    assert llm_negatives.answer(written, tokenizer) == said


def test_an_answer_ends_at_every_end_that_is_named_anywhere(tiny_llm):
    """eos, the generation config's, and what the template puts after a user's or its own turn."""
    model, tokenizer = loaded(tiny_llm, AutoModelForCausalLM)
    model.generation_config.eos_token_id = [5, 7]
    eos = tokenizer.eos_token_id
    assert llm_negatives.end_tokens(model, tokenizer) == {eos, 5, 7}
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|eot|>", "<|end|>"]})
    tokenizer.chat_template = ("{% for m in messages %}{{m['content']}}{% if m['role'] == 'user' %}"
                               "<|eot|>{% else %}<|end|>{% endif %}{% endfor %}")
    assert llm_negatives.end_tokens(model, tokenizer) == {eos, 5, 7, 256, 257}
    past = llm_negatives.run_piece(model.base_model, [[1, 2]])[2]
    write = partial(llm_negatives.write_texts, model, tokenizer, past, [[3]], 5)
    first = int(model(torch.tensor([[1, 2, 3]])).logits[0, -1].argmax())
    assert write({999}) != [""] and write({first}) == [""]


def test_number_format_is_the_processors_not_a_timing(monkeypatch):
    for flags, dtype in (("avx2 avx512f", "float32"), ("avx2 amx_bf16", "bfloat16")):
        monkeypatch.setattr(Path, "read_text", lambda *args, flags=flags: f"flags\t: {flags}\n")
        monkeypatch.setattr(os.path, "exists", lambda path: True)
        assert llm_negatives.pick_dtype("auto", "cpu") == dtype
    assert llm_negatives.pick_dtype("fp16", "cpu") == "float16"


@pytest.mark.parametrize("text, first, whole", [
    ("A film for everyone. Then", "A film for everyone.", True), ("A 5.", None, False),
    ('A "quiet film." It', 'A "quiet film."', True), (" One.\nTwo! And a half", "One. Two!", True),
    ("a gritty, grit-", "a gritty, grit", False), ("Made in 1995. It", "Made in 1995.", True),
    ("Meet Me in St. Louis", None, False), ("فيلم جميل؟ ثم", "فيلم جميل؟", True),
    ("这款5.1声道音响适合家庭影院爱好者。", None, True), ("एक फिल्म। और", "एक फिल्म।", True),
    ("For Jeopardy! fans", None, False), ("A film by J. Doe", None, False),
    ("In the U.S. too", None, False), ("For fans of Dr.", None, False),
    ("Rated 3.5 by", None, False), ("一部电影｡", None, True),
    ("A fan of Rocky 5. It", "A fan of Rocky 5.", True), ("Calm. A 5.", "Calm.", True)])
def test_sentences(text, first, whole):
    assert llm_negatives.whole_sentences(text) == (first or text)
    assert llm_negatives.is_whole(text) == whole


def test_a_sentence_ends_its_row_alone(tiny_llm, monkeypatch):
    """Rows that end early leave the batch; the others are written as if alone."""
    model, tokenizer = loaded(tiny_llm, AutoModelForCausalLM)
    for p in model.parameters():  # larger weights, so that a word depends on all before it
        p.data *= 8 if p.dim() > 1 else 1
    texts = ("be brief ", "a", "bc", "d e", "f", "g")
    head, *requests = (tokenizer(text).input_ids for text in texts)
    past = llm_negatives.run_piece(model.base_model, [head])[2]
    best_new, rows = llm_negatives.best_new, []

    def alone(request, letter="none"):
        ids = []
        while len(ids) < 9 and letter not in tokenizer.decode(ids):
            scores = model(torch.tensor([head + request + ids])).logits[:, -1]
            ids += best_new(scores, [ids], tokenizer)
        return ids

    letter = tokenizer.decode(alone(requests[0])[3:4])  # a "sentence" ends where it is written
    monkeypatch.setattr(llm_negatives, "is_whole", lambda text: letter in text)
    monkeypatch.setattr(llm_negatives, "sentence_ends", lambda text: [len(text)])
    monkeypatch.setattr(llm_negatives, "answer", lambda text, _: text)
    monkeypatch.setattr(llm_negatives, "whole_sentences", str)
    monkeypatch.setattr(llm_negatives, "best_new", lambda scores, written, tokenizer: (
        rows.append(len(written)) or best_new(scores, written, tokenizer)))
    texts = llm_negatives.write_texts(model, tokenizer, past, requests, 9, {999})
    whole = [alone(request, letter) for request in requests]
    assert texts == [tokenizer.decode(ids).split("\n")[0] for ids in whole]
    assert len({*map(len, whole)}) > 1 and sum(rows) == sum(map(len, whole))


def test_no_two_tokens_are_written_twice_but_digits_are():
    """" X and X", and a pair that is there already; what is left when all have been written."""
    words = Namespace(decode=lambda ids: [" drama", " and", " comedy", "0", ",", "す"][ids[0]])

    def chosen(ids, *order):
        scores = torch.full((1, 8), -9.0)
        scores[0, list(order)] = torch.arange(len(order), 0, -1.0)
        return llm_negatives.best_new(scores, [ids], words)[0]

    assert chosen([], 0, 1) == 0 and chosen([0, 1], 0, 2) == 2 and chosen([0], 0, 1) == 1
    assert chosen([0, 1, 2, 0], 1, 2, 4) == 4 and chosen([0, 1, 2, 4, 2], 0, 1) == 0
    assert chosen([3, 3, 3], 3, 1) == 3 and chosen([0, 4, 2, 0], 4, 1) == 4
    assert chosen([5, 5], 5, 1) == 5  # one letter


@pytest.mark.parametrize("sentence, fault", [
    ("A dark film about two old friends, for fans of slow drama.", ""), ("…", "empty"),
    ("A board game of trading and building houses.", "prompt"), ("Jaws is a Jaws.", "title"),
    ("Item: Jaws. A film about a shark.", "prompt"), ("", "empty"),
    ("Liked items: - Fargo: A gritty one.", "prompt"), ("A classic, a classic.", "loop"),
    ("A group of old friends save a group of old friends.", "loop"),
    ("A film for those who love the", "cut"), ("A film for fans of Dr. No.", ""),
    ("一部紧张刺激的科幻电影，适合喜欢科幻电影和冒险的观众。", ""), ("For ages 3 to 5.", ""),
    ("भारतीय इतिहास और संस्कृति पर आधारित यह उपन्यास उन पाठकों के लिए है जिन्हें राजाओं, युद्धों "
     "और प्रेम की पुरानी कहानियाँ पढ़ना अच्छा लगता है।", ""),
    ("Для любителей романа «Кто виноват?»", ""),
    ("หนังสือเกี่ยวกับประวัติศาสตร์ เหมาะสำหรับผู้อ่านที่ชอบเรื่องราวในอดีต", ""),
    ("一款关于贸易与建设的桌面游戏，适合喜欢计划的玩家．", ""), ("桌游。", "title")])
def test_faults_of_profiles(sentence, fault):
    assert llm_negatives.fault_of(sentence, "Jaws (1975)") == fault


# ---- A run of every step: from a ratings file to the report --------------------------------------
@pytest.fixture(scope="session")
def raw(tmp_path_factory):
    """Ratings and items: two groups of users, each with its own half of the items."""
    folder, rng, lines = tmp_path_factory.mktemp("raw data"), np.random.default_rng(0), [HEAD]
    for u in range(30):
        for n, i in enumerate(rng.permutation(20)[:12] + 20 * (u % 2)):
            lines.append(f"u{u}\ti{i}\t{4 + n % 2}\t{n}\t{'fine' * (u % 2)}")
        lines.append(f"u{u}\ti{(u * 7) % 40}\t1\t99\t")  # a low rating of an item, to be left out
    write_lines(folder / "interactions.tsv", lines)
    items = [f"i{i}\tFilm {i}\tgroup {i // 20}" for i in range(40)]
    write_lines(folder / "items.tsv", ["item\ttitle\tkeywords", *items])
    return folder


BUDGET = ["--dim", 8, "--epochs", 4, "--eval-every", 2]
BAND = ["--mine-first", 1, "--mine-last", 5]
BARE = "--negatives none --alpha 0 --lambda1 0 --lambda-s 0 --text-init 0".split()
PARTS = "model-judged.safetensors,judge.safetensors,model-rp3.safetensors,model-ease.safetensors"
PROFILE = "profile --new-tokens 4 --history 2 --llm-rows 10 --dtype fp32"
TUNE = ("finetune --llm-layers 0 --mine-first 1 --mine-last 5 --warmup-pairs 64 --dtype fp32 "
        "--save-every 2 --steps 4")


def steps_of(llm, raw):
    """{file: the words that make it in `finished`}, in order."""
    pretrain, train, llm = ["backbones.py", "pretrain"], ["hnlmrec.py", "train"], ["--llm", llm]
    steps = {
        "data": ["hnlmrec.py", "prepare", "--reviews", raw / "interactions.tsv", "--meta",
                 raw / "items.tsv"],
        "cf": [*pretrain, *BUDGET, "--sampler", "dns"],
        "profiles.jsonl": ["llm_negatives.py", *PROFILE.split(), *llm],
        "sft": ["llm_negatives.py", *TUNE.split(), *llm],
        "negatives": ["llm_negatives.py", "generate", *llm, "--pairs-per-user", 3],
        "texts": ["llm_negatives.py", "read", *llm, "--layers", "0,2"],
        "judge": ["hnlmrec.py", "judge", "--epochs", 2],
        "model-hnlmrec": [*train, *BUDGET, *BAND, "--alpha", 0.3],
        "model-judged": [*train, *BUDGET, *BARE, "--lambda-f", 1],
        "model-rns": [*pretrain, *BUDGET, "--eval-users", 3],
        "model-rp3": [*pretrain, "--backbone", "rp3"],
        "model-ease": [*pretrain, "--backbone", "ease"],
        "model-full": ["hnlmrec.py", "blend", "--parts", PARTS], "report": ["eval.py", "report"]}
    return {name: words + ["--out", f"{name}.safetensors"] * ("model" in name)
            for name, words in steps.items()}


def run_step(run, words, *more):
    return cli(*words[:2], "--run", run, *words[2:], *more)


@pytest.fixture(scope="session")
def finished(raw, tiny_llm, tmp_path_factory):
    """A run folder in which every step has been run; no test changes it."""
    run = tmp_path_factory.mktemp("my runs") / "one"
    for words in steps_of(tiny_llm, raw).values():
        run_step(run, words)
    (run / "notes.md").write_text("mine")
    (run / "picture.svg").write_text("mine")
    return run


@pytest.fixture
def copied(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "copy")


# ---- In two processes as in one ------------------------------------------------------------------
def work_of_one_process():
    """Commands one after another, as most of a command's time goes into imports."""
    dist = torch.distributed
    start = dist.init_process_group
    dist.init_process_group = lambda *args, **more: dist.is_initialized() or start(*args, **more)
    for command in sys.argv[1:]:
        script, *words = shlex.split(command)
        PROGRAMS[script].main(words)


def assert_same_update(one, other):
    """Adam divides by the gradient's size: an entry whose gradient is rounding noise may move
    either way, by lr = 5e-4 a step."""
    assert all(torch.allclose(one[key], other[key], atol=2.2e-3) for key in one)
    close = torch.cat([(one[key] - other[key]).abs().flatten() < 1e-5 for key in one])
    assert close.float().mean() > 0.99


def test_gradients_are_averaged_over_processes(monkeypatch):
    """Beside a process whose gradients are 3 everywhere; Adam would hide a factor."""
    monkeypatch.setattr(backbones, "world", lambda: 2)
    monkeypatch.setattr(backbones.dist, "all_reduce", lambda tensor: tensor.add_(3))
    one, two, none = (torch.zeros(2, requires_grad=True) for _ in range(3))
    one.grad, two.grad = torch.tensor([1.0, 5.0]), torch.tensor([-3.0, 0.0])
    backbones.average_gradients([one, none, two])
    assert [p.grad.tolist() for p in (one, two, none)] == [[2, 4], [0, 1.5], [1.5, 1.5]]


def test_two_processes_make_what_one_makes(copied, tiny_llm, raw):
    run, commands = copied, []
    for name, *more in (("profiles.jsonl", "--batch-size", 3, "--out", "profiles-two.jsonl"),
                        ("sft", "--name", "sft-two"), ("negatives", "--out", "negatives-two"),
                        ("model-hnlmrec", "--out", "model-two.safetensors")):
        commands.append(shlex.join(map(str, [*steps_of(tiny_llm, raw)[name], "--run", run, *more])))
    script = run / "two.py"
    script.write_text("import test_hnlmrec as t\nt.backbones.run_cli(t.work_of_one_process)\n")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--"]
    done = subprocess.run([*torchrun, script, *commands], capture_output=True, text=True,
                          check=False, timeout=600,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)})
    assert done.returncode == 0 and done.stdout.count("wrote") == 3, done.stdout + done.stderr

    # gradients added up, profiles and shards shared out: the same update, the same files
    profiles, shared = ((run / f"profiles{two}.jsonl").read_text().splitlines()
                        for two in ("", "-two"))
    assert sorted(shared[1:]) == sorted(profiles[1:])
    assert_same_update(tuned(run, "sft"), tuned(run, "sft-two"))
    one, two = negatives(run), negatives(run, "negatives-two")
    assert torch.equal(one["pairs"], two["pairs"])
    assert torch.allclose(one["hidden"], two["hidden"], atol=2e-3)
    # each draws negatives; the parameters move from the same start as with one process
    data = backbones.load_data(run)
    model, meta, two = backbones.load_model(run / "model-two.safetensors", data)
    one = load_file(run / "model-hnlmrec.safetensors")
    for name, value in hnlmrec.build(run, Namespace(**meta["settings"]), data).named_parameters():
        moves = [(tensors[name] - value).detach().flatten() for tensors in (one, two)]
        assert name == "projector.key.bias" or all(move.abs().max() > 1e-4 for move in moves), name
        assert name != "backbone.embedding" or F.cosine_similarity(*moves, 0) > 0.5
    best = max(row["valid_ndcg@20"] for row in meta["history"])
    assert backbones.validation(model, data)() == pytest.approx(best)


# ---- The programs of llm_negatives.py ------------------------------------------------------------
def llm_main(run, llm, words, *more):
    llm = ["--llm", llm] if llm else []
    return cli("llm_negatives.py", *words.split(), "--run", run, *llm, *more)


def killed_after(call, *args):
    call(*args)
    raise KeyboardInterrupt


llm_refused = partial(message_of, llm_main)


def tuned(run, name):
    """All that fine-tuning learned: the tensors of NAME.safetensors and of its adapter."""
    adapter = run / name.replace("sft", "adapter") / "adapter_model.safetensors"
    return {**backbones.load_tensors(run / f"{name}.safetensors")[0], **load_file(adapter)}


def tune(run, llm, name, *flags):
    llm_main(run, llm, TUNE, "--name", name, *flags)
    return tuned(run, name)


def negatives(run, name="negatives"):
    return backbones.load_negatives(run, name, backbones.load_data(run))


def test_profiles_are_the_llms_for_the_busiest_else_metadata(copied, tiny_llm, monkeypatch):
    data, written = backbones.load_data(copied), []
    items, rows = (backbones.read_jsonl(copied / f"{kind}.jsonl") for kind in ("items", "users"))

    def write(model, tokenizer, past, requests, new_tokens, ends):
        texts = ["".join(tokenizer.convert_ids_to_tokens(ids)) for ids in requests]
        texts = [text.replace("Ġ", " ").replace("Ċ", "\n") for text in texts]
        written.extend(texts)
        return [f"Good film number {text[6:20]} for people who like slow quiet nights." if n else ""
                for n, text in enumerate(texts)]

    monkeypatch.setattr(llm_negatives, "write_texts", write)
    out = llm_main(copied, tiny_llm, PROFILE, "--out", "profiles-x.jsonl", "--batch-size", 4)
    assert "14 written by the LLM, 56 from metadata, of which 6 replace a sentence" in out
    assert "10 items," in out and "10 users," in out and "(empty 6)" in out
    popular = torch.bincount(data["train"][:, 1]).argsort(descending=True, stable=True)
    asked = {text.split(".")[0] for text in written if text.startswith("Item")}
    assert asked == {f"Item: {items[i]['title']}" for i in popular[:10].tolist()}
    users = [text for text in written if text.startswith("Liked")]
    assert len(users) == 10 and all(text.endswith("\nEnjoys") for text in users)
    busiest = torch.bincount(data["train"][:, 0]).argsort(descending=True, stable=True)[:10]
    reviewed = sum(bool(rows[u]["reviews"]) for u in busiest.tolist())
    assert sum("They wrote: fine" in text for text in users) == reviewed > 0
    # killed in the third batch: nothing is made again, and each batch saves what is there
    path, written[:], saves, save = copied / "profiles-y.jsonl", [], [], backbones.write_atomic
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(llm_negatives, "write_atomic", lambda *args: saves.append(save(*args)))
        patch.setattr(llm_negatives, "write_texts", lambda *args: (
            write(*args) if len(written) < 8 else killed_after(list)))
        llm_main(copied, tiny_llm, PROFILE, "--out", path.name, "--batch-size", 4)
    saved = path.read_text()
    assert len(saved.splitlines()) == 39 and len(saves) == 2
    llm_main(copied, tiny_llm, PROFILE, "--out", path.name, "--batch-size", 4)
    assert path.read_text() == (copied / "profiles-x.jsonl").read_text()
    assert path.read_text().startswith(saved) and len(written) == 20
    assert "made with seed=0, now 1" in llm_refused(copied, tiny_llm, PROFILE, "--seed", 1)
    llm_main(copied, None, "profile --profiles template --out profiles-t.jsonl")
    of_users, of_items = llm_negatives.load_profiles(copied, "profiles-t.jsonl")
    assert of_items[7] == f"{items[7]['title']}. {items[7]['text']}"
    assert of_users[0].startswith("Likes Film ")


def test_generated_vectors_are_the_fine_tuned_encoders(finished, tiny_llm, monkeypatch):
    """The prompt is rendered once: a template may print the date, so what fine-tuning, or a first
    start of `profile`, wrote down is taken."""
    monkeypatch.setattr(llm_negatives, "chat_frame", lambda *args: pytest.fail("rendered again"))
    cf, _ = backbones.load_tensors(finished / "cf.safetensors")
    texts, shard = llm_negatives.load_profiles(finished), negatives(finished)
    assert len(shard["pairs"]) == 90 and shard["hidden"].dtype == torch.float16
    with torch.no_grad():
        for lora in (True, False):
            llm, prompt, soft_tokens, head, meta = llm_negatives.load_sft(
                finished, "sft", tiny_llm, "cpu", lora)
            assert list(prompt.frame) == meta["frame"]
            hidden = llm_negatives.encode_pairs(llm, prompt, soft_tokens, cf, texts, shard["pairs"])
            assert torch.allclose(hidden, shard["hidden"].float(), atol=2e-3) == lora
            if lora:
                vector = head(shard["hidden"].float())
                assert torch.allclose(vector, shard["vector"].float(), atol=1e-2)
    header = json.loads((finished / "profiles.jsonl").read_text().splitlines()[0])
    args = Namespace(llm=tiny_llm, dtype="float32", device="cpu", force=False)
    file = llm_negatives.Profiles(args, finished / "profiles.jsonl", header["settings"])
    file.start_llm()
    assert set(file.frames) == {"item", "user"} and len(file.made) == 70


def test_generation_resumes_by_shards_that_belong_together(copied, tiny_llm, monkeypatch):
    monkeypatch.setattr(backbones, "SHARD_USERS", 10)
    monkeypatch.setattr(llm_negatives, "SHARD_USERS", 10)
    again = "generate --pairs-per-user 3 --out negatives-x"
    llm_main(copied, tiny_llm, again)
    shards = sorted(copied.glob("negatives-x-*.safetensors"))
    whole = [backbones.read_meta(path)["digest"] for path in shards]
    assert [set((load_file(p)["pairs"][:, 0] // 10).tolist()) for p in shards] == [{0}, {1}, {2}]
    shards[1].unlink()
    assert "1 of 3 shards to make" in llm_main(copied, tiny_llm, again)
    assert [backbones.read_meta(path)["digest"] for path in shards] == whole
    assert re.search("seed=0, now 1.*--force", llm_refused(copied, tiny_llm, again, "--seed", 1))
    load = partial(negatives, copied, "negatives-x")
    joined = load()
    assert torch.equal(joined["pairs"], torch.cat([load_file(path)["pairs"] for path in shards]))
    assert joined["cf"] == "cf.safetensors"
    # of another fine-tuning they would be other vectors
    shutil.copy(copied / "sft.safetensors", copied / "sft-x.safetensors")
    shutil.copytree(copied / "adapter", copied / "adapter-x")
    message = llm_refused(copied, tiny_llm, again, "--sft", "sft-x")
    assert re.search(r"inputs=.*sft\.safe.*, now .*sft-x\.safe.*--force", message)
    tensors, meta = backbones.load_tensors(shards[1])
    meta["settings"]["seed"] = 1
    backbones.save_tensors(shards[1], tensors, meta)
    assert f"{shards[1]}: was made with other settings than {shards[0].name}" in message_of(load)
    shards[0].unlink()
    assert f"{shards[0]}: no such file; make it with `python llm_neg" in message_of(load)
    # a shard of users that there were once goes with --force, else digests would count it
    shutil.copy(shards[2], copied / "negatives-x-00003.safetensors")
    llm_main(copied, tiny_llm, again, "--force")
    assert sorted(copied.glob("negatives-x-*.safetensors")) == shards


def test_in_bf16_the_adapter_is_bf16_and_says_the_same(copied, tiny_llm, monkeypatch):
    """Trained in float32, run in the LLM's format. Before LoRA has learned, it is not run."""
    watched = Mock(wraps=llm_negatives.fit_head)
    monkeypatch.setattr(llm_negatives, "fit_head", watched)
    monkeypatch.setattr(llm_negatives, "PROFILE_DROPOUT", 0)
    tune(copied, tiny_llm, "sft-bf16", "--dtype", "bf16")
    adapter = load_file(copied / "adapter-bf16" / "adapter_model.safetensors")
    assert {value.dtype for value in adapter.values()} == {torch.float32}
    (task, _, hidden, rows, *_), both = watched.call_args_list[0].args, []
    for lora in (False, True):
        llm, prompt, soft_tokens, *_ = llm_negatives.load_sft(
            copied, "sft-bf16", tiny_llm, "cpu", lora)
        assert {p.dtype for p in llm.parameters()} == {torch.bfloat16}
        both.append(llm_negatives.encode_rows(task, llm, prompt, soft_tokens, rows))
    # as in training: rounded angles of rotary positions would be another encoder
    assert all(buffer.dtype == torch.float32 for buffer in llm.buffers())
    assert F.cosine_similarity(both[0], hidden).min() > 0.999
    llm = llm.float()  # the oracle: the same adapter in float32
    with torch.no_grad():
        for name, p in llm.named_parameters():
            if "lora" in name:
                p.copy_(adapter[name.replace(".default", "")])
    exact = llm_negatives.encode_rows(task, llm, prompt, soft_tokens, rows)
    assert F.cosine_similarity(both[1], exact).min() > 0.999
    assert (both[1] - exact).norm() < (both[0] - exact).norm() / 3


def test_fine_tuning_resumes_where_it_was_killed_or_the_disk_was_full(
        copied, tiny_llm, monkeypatch):
    def full_disk(self, folder, **more):
        Path(folder).mkdir()
        raise llm_negatives.SafetensorError("No space left on device")

    whole, save = tuned(copied, "sft"), partial(killed_after, llm_negatives.save_tensors)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(llm_negatives, "save_tensors", save)
        tune(copied, tiny_llm, "sft-cut")
    # another number format is another result
    message = message_of(tune, copied, tiny_llm, "sft-cut", "--dtype", "bf16")
    assert "dtype=float32, now bfloat16" in message and "--force" in message
    (copied / ".adapter-cut.tmp").mkdir()  # of a process killed earlier
    with monkeypatch.context() as patch:
        patch.setattr(peft.PeftModel, "save_pretrained", full_disk)
        patch.setattr(llm_negatives, "sft_gradients", Mock(wraps=llm_negatives.sft_gradients))
        assert "No space left" in message_of(tune, copied, tiny_llm, "sft-cut")
        assert llm_negatives.sft_gradients.call_count == 2  # after step 2 of 4
    assert not list(copied.glob(".adapter*")) and not list(copied.glob("adapter-cut*"))
    out = llm_main(copied, tiny_llm, TUNE, "--name", "sft-cut")
    assert "resumes after step 4 of 4" in out and "skip" not in out
    assert not list(copied.glob("*partial*"))
    again = tuned(copied, "sft-cut")
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_what_is_not_finite_says_how_to_go_on(copied, tiny_llm, tmp_path):
    message = message_of(tune, copied, tiny_llm, "sft-nan", "--lr", 1e30, "--save-every", 1)
    assert "lower --lr" in message and "--force" in message
    assert "--force" in message_of(tune, copied, tiny_llm, "sft-nan")  # without it: refused
    tune(copied, tiny_llm, "sft-nan", "--force")
    # shards are float16, whatever --dtype was
    large = shutil.copytree(tiny_llm, tmp_path / "large llm")
    weights = load_file(large / "model.safetensors")
    weights["model.norm.weight"] *= 3e5
    save_file(weights, large / "model.safetensors", {"format": "pt"})
    tune(copied, large, "sft-large", "--steps", 0)
    message = llm_refused(copied, large, "generate --sft sft-large --out negatives-large")
    assert "NaN or infinite" in message and "another LLM" in message


def test_checkpointing_does_not_change_the_step(copied, tiny_llm, monkeypatch):
    monkeypatch.setattr(llm_negatives, "PROFILE_DROPOUT", 0)
    monkeypatch.setattr(llm_negatives, "LORA_DROPOUT", 0)
    plain = tune(copied, tiny_llm, "sft-plain", "--steps", 2)
    other = tune(copied, tiny_llm, "sft-other", "--steps", 2, "--checkpointing", "--micro-pairs", 3)
    assert_same_update(plain, other)


def test_variants_of_fine_tuning_make_negatives_of_their_own(copied, tiny_llm):
    """No CF vectors in the prompt; MixGCF's targets; template profiles; no LoRA step."""
    template, made = "profiles-template.jsonl", [negatives(copied)["hidden"]]
    llm_main(copied, None, f"profile --profiles template --out {template}")
    for name, *flags in (("nocf", "--soft-tokens", 0), ("mixgcf", "--mine", "mixgcf"),
                         ("template", "--profiles", template),
                         ("head", "--steps", 0, "--epochs", 9)):
        tune(copied, tiny_llm, f"sft-{name}", *flags)
        llm_main(copied, tiny_llm, f"generate --pairs-per-user 3 --sft sft-{name} --out "
                 f"negatives-{name}")
        made.append(negatives(copied, f"negatives-{name}")["hidden"])
        assert not any(torch.equal(made[-1], other) for other in made[:-1])
    # of some users a pair; without fine-tuning h is what it is without a LoRA step
    for name, flags in (("few", "--sft sft-head"), ("zeroshot", "--no-finetune")):
        out = llm_main(copied, tiny_llm, f"generate --pairs 12 {flags} --out negatives-{name}")
        assert "18 users without a pair" in out
    few, zeroshot = negatives(copied, "negatives-few"), negatives(copied, "negatives-zeroshot")
    assert len(few["pairs"]) == 12 and torch.equal(few["hidden"], zeroshot["hidden"])
    assert not torch.equal(few["vector"], zeroshot["vector"])  # its head is not trained either
    # steps beside epochs, which --paper sets, win
    assert backbones.read_meta(copied / "sft-head.safetensors")["losses"] == []
    llm_main(copied, tiny_llm, TUNE.partition(" --steps")[0] + " --name sft-epochs --epochs 0.2")
    assert len(backbones.read_meta(copied / "sft-epochs.safetensors")["losses"]) == 2


def test_wrong_adapters_llms_and_profiles_are_refused(copied, tiny_llm, tmp_path):
    new = "generate --pairs-per-user 3 --out negatives-new"
    other = tiny_family(tmp_path / "other llm", "Llama", vocab_size=256, num_hidden_layers=2)
    assert "another LLM" in llm_refused(copied, other, new)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        whole = (copied / "adapter" / name).read_bytes()
        (copied / "adapter" / name).write_bytes(whole + b" ")
        assert f"another adapter/{name}" in llm_refused(copied, tiny_llm, new)
        (copied / "adapter" / name).write_bytes(whole)
    path = copied / "profiles.jsonl"
    whole = path.read_text()
    path.write_text(whole.rsplit("\n", 2)[0] + "\n")
    tune_new = copied, tiny_llm, TUNE, "--name", "sft-new"
    assert "1 profiles are missing" in llm_refused(*tune_new)
    for text in (whole.split("\n", 1)[1], whole.split("\n")[0] + "\n{}\n",
                 whole.replace('"inputs"', '"in"', 1)):
        path.write_text(text)
        for words in (tune_new, (copied, tiny_llm, PROFILE)):  # nor does `profile` resume from it
            assert "is not what `profile` writes" in llm_refused(*words)


def test_readings_and_their_controls(copied, tiny_llm):
    (llm, tokenizer), made = loaded(tiny_llm), {}
    items = backbones.read_jsonl(copied / "items.jsonl")
    texts = [f"{row['title']}. {row['text']}" for row in items]
    oracle = llm_negatives.read_layers(llm, tokenizer, texts, [0, 1, 2])
    # a profile is read behind the metadata
    llm_main(copied, tiny_llm, "profile --profiles template --out profiles-r.jsonl")
    path = copied / "profiles-r.jsonl"
    path.write_text(path.read_text().replace('"profile": "group 1"', '"profile": "A sequel."'))
    for name, layers, flags in (
            ("two", "01", ""), ("all", "012", "--layers 2,0,1"), ("words", "0", "--layers 0"),
            ("s", "01", "--control shuffled"), ("r", "01", "--control random --seed 1"),
            ("tfidf", "0", "--control tfidf"), ("last", "2", "--layers 2"),
            ("most", "01", "--most 5"), ("profiles", "0", f"--layers 0 --profiles {path.name}")):
        file = f"texts-{name}.safetensors"
        llm_main(copied, tiny_llm, f"read --dtype fp32 --out {file} {flags}")
        assert list(load_file(copied / file)) == [f"layer0{k}" for k in layers]
        made[name] = backbones.load_texts(copied, file, backbones.load_data(copied))
    assert torch.allclose(made["last"][0], oracle[2], atol=1e-5)
    for name in ("two", "all", "words"):  # a layer is the same whatever else is asked
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(made[name], oracle))
    # the same rows, of other items
    shuffled, random, real = (torch.unique((1e4 * text).round(), dim=0)
                              for text in (made["s"][0], made["r"][0], oracle[0]))
    assert torch.equal(shuffled, real) and not torch.equal(random, real)
    assert not torch.allclose(made["s"][0], oracle[0], atol=1e-3)
    ids = [llm_negatives.text_ids(tokenizer, text) for text in texts]
    assert torch.equal(made["tfidf"][0], llm_negatives.tf_idf(ids))
    both = [text + " A sequel." * text.endswith("group 1") for text in texts]
    expected = llm_negatives.read_layers(llm, tokenizer, both, [0])[0]
    assert torch.allclose(made["profiles"][0], expected, atol=1e-5)
    # --most: the others have their words, and the mean of what the layers read
    train = backbones.load_data(copied)["train"]
    popular = torch.bincount(train[:, 1], minlength=40).argsort(descending=True, stable=True)[:5]
    words, deep = made["most"]
    expected = oracle[1][popular].mean(0).expand(40, -1).clone()
    expected[popular] = oracle[1][popular]
    assert torch.allclose(words, oracle[0], atol=1e-5) and torch.allclose(deep, expected, atol=1e-5)


@pytest.mark.parametrize("program, command, trainer, rank", [
    (llm_negatives, "finetune", "finetune", "lora_rank"),
    (hnlmrec, "train", "train_hnlmrec", "dim")])
def test_paper_is_a_preset_and_flags_beside_it_win(program, command, trainer, rank, monkeypatch):
    seen = []
    monkeypatch.setattr(program, trainer, seen.append)
    for flags in ([], ["--paper"], ["--paper", f"--{rank.replace('_', '-')}", "4"]):
        program.main([command, "--run", "x", *flags])
    plain, paper, mixed = map(vars, seen)
    assert {name: paper[name] for name in program.PAPER} == program.PAPER
    assert {name for name in plain if plain[name] != paper[name]} <= {*program.PAPER, "paper"}
    assert mixed == paper | {rank: 4}


# ---- eval.py: metrics, false hard negatives ------------------------------------------------------
@pytest.mark.parametrize("split", ["valid", "test"])
def test_evaluate_and_list_statistics_against_loops(split):
    data, (model, scores) = split_data(), rigged_scores()
    data[split] = data[split][data[split][:, 0] != 7]  # a user without a pair there
    users, values, ranked = evaluation.evaluate(model, data, split, (3, 5))
    assert users.tolist() == [u for u in range(N_USERS) if u != 7]
    count = np.bincount(data["train"][:, 1], minlength=N_ITEMS)
    by_count, found = sorted(range(N_ITEMS), key=lambda i: (count[i], i)), [[], [], [], []]
    for n, u in enumerate(users.tolist()):
        seen = items_of(data["train"], u)
        seen |= items_of(data["valid"], u) if split == "test" else set()
        best = by_score(scores[u], seen)[:5]
        assert ranked[n].tolist() == best
        held, = items_of(data[split], u)  # one item, so that the ideal DCG is 1
        rank = best.index(held) + 1 if held in best else math.inf
        for name, value in (("Recall@5", rank < 6), ("Precision@5", (rank < 6) / 5),
                            ("MRR@5", 1 / rank), ("HitRate@3", rank < 4),
                            ("NDCG@5", 1 / math.log2(rank + 1))):
            assert values[name][n] == pytest.approx(float(value))
        found[by_count.index(held) * 4 // N_ITEMS].append(held in best)
    ours = evaluation.list_statistics(users, ranked, data, split)
    recalls = [np.mean(hits) if hits else math.nan for hits in found]
    assert [ours[f"I{q}"] for q in range(1, 5)] == pytest.approx(recalls, nan_ok=True)
    times = np.bincount(ranked.flatten(), minlength=N_ITEMS)
    assert ours["coverage"] == pytest.approx((times > 0).mean())
    assert ours["popularity"] == pytest.approx(np.average(count, weights=times))
    gini = np.abs(np.subtract.outer(times, times)).sum() / (2 * N_ITEMS * times.sum())
    assert ours["Gini"] == pytest.approx(gini)
    empty = message_of(evaluation.evaluate, model, data | {split: data[split][:0]}, split)
    assert f"no {split} pair" in empty


def test_empty_places_of_a_list_are_no_items():
    """User 1's would be looked up as user 0's item 2, which is a test pair."""
    data = {"train": torch.tensor([[0, 0], [1, 1], [1, 2]]), "valid": torch.tensor([[0, 1]]),
            "test": torch.tensor([[0, 2], [1, 0]]), "n_users": 2, "n_items": 3}
    users, values, ranked = evaluation.evaluate(rigged(torch.ones(2, 1), torch.ones(3, 1)), data)
    assert ranked.tolist() == [[2, -1, -1], [0, -1, -1]] and values["Recall@10"].tolist() == [1, 1]
    few = evaluation.list_statistics(users[1:], ranked[1:], data)
    assert few["coverage"] == pytest.approx(1 / 3) and few["popularity"] == 1


def test_paired_bootstrap_against_the_normal_law():
    rng = np.random.default_rng(0)
    for shift in (0.0, 0.05, 0.12):
        d = rng.normal(shift, 1, 2000)
        mean, low, high, p = evaluation.paired_bootstrap(d, draws=20_000)
        error = d.std() / math.sqrt(len(d))
        assert mean == pytest.approx(d.mean())
        near = partial(pytest.approx, abs=0.1 * error)
        assert low == near(mean - 1.96 * error) and high == near(mean + 1.96 * error)
        assert p == pytest.approx(math.erfc(abs(mean) / error / math.sqrt(2)), abs=0.02)
    # n of one sign come so with 2 / 2^n, by chance alone; from 14 on the draws say more
    for n in (1, 3, 5, 20):
        *_, p = evaluation.paired_bootstrap(np.full(n, 0.01))
        assert p == pytest.approx(max(2 / 2**n, 2 / 10_001))
    assert evaluation.paired_bootstrap([0.1, -0.1])[3] == 1
    for wrong in ([0.1, math.nan], np.ones((2, 9))):  # two seeds are no two users
        assert "one number a user" in message_of(evaluation.paired_bootstrap, wrong)


def test_holm_hand_worked_and_against_its_step_down_test():
    given = np.array([0.01, 0.04, 0.03])
    assert evaluation.holm(given) == pytest.approx([0.03, 0.06, 0.06]) and given[1] == 0.04
    assert evaluation.holm([0.7, 0.6]) == [1.0, 1.0] and evaluation.holm([]) == []
    for m in (1, 4, 9):
        p = np.random.default_rng(m).random(m) ** 3
        ours = evaluation.holm(list(p))
        for level in (0.01, 0.05, 0.3):  # rejected are those before the first that is kept
            kept = np.maximum.accumulate(np.sort(p) > level / np.arange(m, 0, -1))
            assert {*np.argsort(p)[~kept]} == {i for i in range(m) if ours[i] <= level}


def test_fhns_of_vectors_against_brute_force():
    data, items = split_data(), torch.randn(N_ITEMS, 4)
    pairs, vectors = data["train"], torch.randn(len(data["train"]), 4)
    ours, hits = evaluation.fhns_of_vectors(pairs, vectors, items, data), []
    for (u, _), v in zip(pairs.tolist(), vectors):
        held = items_of(data["valid"], u) | items_of(data["test"], u)
        best = by_score(F.cosine_similarity(v[None], items), items_of(data["train"], u))
        hits.append([len(held & {*best[:k]}) / k for k in (1, 10)])
    assert list(ours.values()) == pytest.approx(np.mean(hits, 0))
    # an empty place is no negative, nor is it item 0
    data["test"][0, 1] = 0
    u, i = data["test"][:1].T
    few = torch.cat([i, torch.full((9,), -1)])[None]
    assert evaluation.fhns_rates(u, few, data) == {"FHNS@1": 1.0, "FHNS@10": 1.0}
    assert evaluation.fhns_rates(u, few[:, 1:3], data) == {"FHNS@1": 0.0}


def test_fhns_of_samplers_against_brute_force(monkeypatch):
    """At the top by its definition, uniform by its expectation; DNS kept clear takes no listed
    item; MixGCF's vectors stand for the items nearest to them."""
    data, (model, scores) = split_data(), rigged_scores()
    best = [by_score(row, items_of(data["train"], u)) for u, row in enumerate(scores)]
    data["test"][:6, 1] = torch.tensor([row[0] for row in best[:6]])  # the hardest is a false one
    data["train"] = data["train"].repeat(200, 1)  # many draws; three times as many of four users
    of_four = data["train"][data["train"][:, 0] < 4]
    data["train"] = torch.cat([data["train"], of_four, of_four])
    held = [items_of(data["valid"], u) | items_of(data["test"], u) for u in range(N_USERS)]
    likely = torch.tensor([(sorted(own) + [29] * 9)[:10] for own in held]).int()
    rates = evaluation.fhns_of_samplers(model, data, 60, likely=likely)
    top, uniform, hardest = (
        np.average([len(own & {*row[:k]}) / len(row[:k]) for own, row in zip(held, best)],
                   weights=[3] * 4 + [1] * (N_USERS - 4)) for k in (10, N_ITEMS, 1))
    assert rates["the model's own top items"]["FHNS@10"] == pytest.approx(top)
    assert rates["uniform"]["FHNS@1"] == pytest.approx(uniform, abs=0.01)
    assert rates["DNS"]["FHNS@1"] == pytest.approx(hardest, abs=0.15) and hardest > 0.4
    assert rates["DNS kept clear of the judge's items"]["FHNS@1"] == 0
    assert rates["the judge's likely items"]["FHNS@1"] == 1
    assert set(rates["MixGCF, nearest items"]) == {"FHNS@1", "FHNS@10"}
    data["train"] = data["train"][:72]
    one, two, other = (evaluation.fhns_of_samplers(model, data, 8, seed) for seed in (1, 1, 2))
    assert one == two != other
    users, items = model()
    monkeypatch.setattr(evaluation, "mixgcf", lambda of_pairs, *_: items[
        data["test"][torch.cdist(of_pairs, users).argmin(1), 1]])
    rates = evaluation.fhns_of_samplers(model, data, 2)["MixGCF, nearest items"]
    assert rates["FHNS@1"] == 1 > rates["FHNS@10"]
    monkeypatch.setattr(evaluation, "MOST", 24)  # of too many pairs some, of all users
    monkeypatch.setattr(evaluation, "fhns_rates", lambda users, *_: users)
    users = evaluation.fhns_of_samplers(model, data, 2)["uniform"]
    assert len(users) == 24 and len(users.unique()) > 6


# ---- eval.py: report, compare, tune, recommend ---------------------------------------------------
def save_model(path, seed, command="pretrain", valid=0.1, inputs=(), **more):
    """A file as `pretrain` writes it, of random vectors."""
    table = torch.randn(N_USERS + N_ITEMS, 4, generator=seeded(seed))
    run = path.parent.parent if path.parent.name == "compare" else path.parent
    settings = {"command": command, "backbone": "mf", "layers": 1, "epochs": 200, "loss": "bpr",
                "negatives": "negatives" if command == "train" else "none",
                "sampler": "dns" if command == "train" else path.stem.removeprefix("model-"),
                "inputs": backbones.digests(run, "data.safetensors", *inputs)}
    backbones.save_tensors(
        path, {"backbone.embedding": table, "item": table[N_USERS:].clone(), **more},
        {"settings": settings, "seconds": 2.0,
         "history": [{"epoch": 3, "valid_ndcg@20": valid, "seconds": 1.5}]})


@pytest.fixture
def eval_run(small_run):
    """A run with data, two samplers, closed forms, texts, a judge and a model with z."""
    run, data = small_run, split_data()
    for name, count in (("items", N_ITEMS), ("users", N_USERS)):
        rows = [{"raw": f"{name[0]}{k}", "title": f"Film [{k}]"} for k in range(count)]
        write_lines(run / f"{name}.jsonl", rows)
    for n, name in enumerate(("cf", "model-rns", "model-dns", "model-x<y")):
        save_model(run / f"{name}.safetensors", n)
    for form in ("pop", "rp3", "ease"):
        words = ["pretrain", "--run", str(run), "--backbone", form, "--out"]
        backbones.main([*words, f"model-{form}.safetensors"])
    backbones.save_tensors(run / "texts.safetensors", {"layer00": torch.randn(N_ITEMS, 6)}, {
        "settings": {"command": "read", "inputs": backbones.digests(run, "items.jsonl")},
        "seconds": 5.0})
    history, item = F.normalize(torch.randn(2, N_ITEMS, 3), dim=2)
    save_model(run / "judge.safetensors", 0, "judge", 0.9, ["texts.safetensors"], history=history,
               bias=torch.zeros(N_ITEMS), shape=torch.tensor([5.0, 2.0]), item=item,
               share=torch.full((N_USERS, 10), 0.1),
               likely=torch.arange(10).expand(N_USERS, 10).int())
    save_model(run / "model-hnlmrec.safetensors", 5, "train", z=torch.randn(8, 4).half(),
               z_pairs=data["train"][:8])
    return run


def ndcg_of(path, data, split="test"):
    model, _, _ = hnlmrec.load_recommender(path, data)
    return evaluation.evaluate(model, data, split)[1]["NDCG@20"].numpy()  # of each user


def test_report_says_what_its_figures_say(eval_run):
    (eval_run / "steps.tsv").write_text("prepare\t3\ntrain|x\t41\n")
    page, data = eval_main("report", "--run", eval_run), backbones.load_data(eval_run)
    found = json.loads((eval_run / "metrics.json").read_text())
    assert page.startswith("# Report: run&#124;&#60;b&#62;\n")
    assert (eval_run / "report.md").read_text() in page
    rows = found["methods"]  # in the order of METHODS, a person's own last
    assert list(rows) == ["pop", "rp3", "ease", "rns", "dns", "hnlmrec", "x<y"]
    for stem, row in rows.items():
        scores = ndcg_of(eval_run / f"model-{stem}.safetensors", data)
        assert row["NDCG@20"] == pytest.approx(scores.mean())
    # the rival is named by validation; the claim in words is that of the figures
    rival = max(set(rows) - {"hnlmrec"}, key=lambda row: rows[row]["valid NDCG@20"])
    for stem, test in found["tests"].items():
        assert test["against"] == rival and "p" not in test
        assert test["mean"] == pytest.approx(rows[stem]["NDCG@20"] - rows[rival]["NDCG@20"])
    claim, = found["claims"]
    assert (claim["row"], claim["against"]) == ("hnlmrec", "rns")
    word = "above" if claim["low"] > 0 else "below"
    word = "not shown to differ from" if claim["low"] < 0 < claim["high"] else word
    assert f"**HNLMRec: {word} RNS**, the best sampler by validation" in page
    # the first table is the small one; anybody's names keep it whole
    table = page.split("\n\n| ")[1].split("\n\n")[0].splitlines()
    assert table[0] == "method | Recall@10 | Recall@20 | NDCG@10 | NDCG@20 | valid NDCG@20 |"
    assert len(table) == 2 + len(rows) and all(line.count("|") == 7 for line in table[1:])
    sparse = page.split("## Sparse users")[1].split("\n\n| ")[1].split("\n\n")[0].splitlines()
    assert [f" {rows[stem]['Q1']:.4f} " for stem in rows] == [x.split("|")[2] for x in sparse[2:]]
    assert "x&#60;y" in page and "| train&#124;x | 41 |" in page
    assert "lacks them: in full, judge's negatives.\n" in page
    for start in ("- liked (5 of 6): Film &#91;", "- recommended (x&#60;y): Film &#91;",
                  "- negatives from the LLM (HNLMRec): Film &#91;"):
        assert page.split(start)[1].split("\n")[0].count("; Film") == 4
    assert {"uniform", "the judge's likely items", "HNLMRec, projected z"} <= set(found["fhns"])
    assert len(xml.etree.ElementTree.parse(eval_run / "report.svg").findall(".//{*}circle")) == 6


def test_a_file_is_a_row_of_the_report_only_if_it_was_made_as_that_row(monkeypatch, eval_run):
    made = []
    for program, name in ((backbones, "pretrain"), (hnlmrec, "train_hnlmrec")):
        monkeypatch.setattr(program, name, lambda args: made.append(backbones.settings_of(args)))
    rows = [name for name, row in evaluation.METHODS.items()
            if row.stem and not row.parts and row.kind != "closed form"]
    for name in rows:
        words = evaluation.training_of(name, {}, "lightgcn", 0)
        for more in ([], ["--dim", 8, "--m", 3]):
            cli(*words, *more, "--run", "x", "--out", "x.safetensors")
            assert [row for row in rows if evaluation.is_row(row, made[-1])] == [name]
        if name == "DNS":
            assert not evaluation.is_row(name, made[-1] | {"n": 2})  # DNS(M, N)
        # controls, ablations, oracles, another sampler, the files of another row
        for odd in ({"control": "random"}, {"attention": False}, {"keep_clear": "valid"},
                    {"sampler": "pns"}, {"lambda_f": 0.5}, {"train_projector": True},
                    {"hinge": 0.3}, {"judge": "judge-words.safetensors"}, {"alpha": 0.0},
                    {"lambda1": 0.0}, {"negatives": "negatives-zeroshot"},
                    {"text_vectors": "texts-tfidf.safetensors"}):
            tuned = name == evaluation.JUDGED and "lambda_f" in odd
            if made[-1]["command"] == "train" and not tuned and odd.items() - made[-1].items():
                assert not evaluation.is_row(name, made[-1] | odd), (name, odd)
    judged, judge, rp3 = (f"{stem}.safetensors" for stem in ("model-judged", "judge", "model-rp3"))
    for parts, full in (([f"{judged}|model-dns.safetensors", judge, rp3], True),
                        ([f"{judged}|model-dns.safetensors", judge], True),
                        ([judged, judge], False), ([judged, "model-dns.safetensors", judge], False),
                        ([f"{judged}|model-dns.safetensors", rp3], False), ([judge, rp3], False),
                        ([judge, "model-x.safetensors"], False)):
        settings = {"command": "blend", "parts": ",".join(parts)}
        assert evaluation.is_row("in full", settings) == full
    # a closed form under a sampler's name
    shutil.copy(eval_run / "model-pop.safetensors", eval_run / "model-mixgcf.safetensors")
    page = eval_main("report", "--run", eval_run)
    assert "| model-mixgcf.safetensors |" in page and "| MixGCF |" not in page


def test_users_without_a_train_pair_are_counted_and_no_example(eval_run):
    data, rows = backbones.load_data(eval_run), evaluation.rows_of_run(eval_run)
    for first, shown, count in ((0, "u0", ""), (1, "u1", " 1 of them"), (2, "u0", " 2 of them")):
        cold = {**data, "train": data["train"][data["train"][:, 0] >= first]}
        found = evaluation.Comparison(eval_run, rows, cold)
        # u0 and u1 alone have a generated negative: with neither it is the first
        assert evaluation.example_lines(found)[1] == f"## An example: user {shown}"
        said = found.sections("x")[1]
        assert said.startswith(f"Users with a test pair: 12 of 12.{count}")
        assert ("no train pair" in said) == bool(count)


@pytest.mark.parametrize("kept, said", [
    ("rns", "a second model, texts"), ("hnlmrec", "a baseline")])
def test_a_run_of_one_model_has_a_report_that_says_what_is_left_out(eval_run, kept, said):
    for path in eval_run.glob("*.safetensors"):
        if path.stem not in ("data", f"model-{kept}"):
            path.unlink()
    page = eval_main("report", "--run", eval_run)
    assert said in page.split("Left out")[1].split("\n")[0] and "An example" in page
    assert "## Differences" not in page
    (eval_run / f"model-{kept}.safetensors").unlink()
    assert "no model-" in (message := eval_refused("report", "--run", eval_run))
    assert "--out model-rns.safetensors`" in message  # by itself pretrain makes cf.safetensors


def test_seconds_of_a_row_are_those_of_all_its_files_once(eval_run):
    parts = ["model-judged.safetensors", "judge.safetensors"]
    save_model(eval_run / parts[0], 8, inputs=["judge.safetensors", "cf.safetensors"])
    save_model(eval_run / "compare" / "full.safetensors", 9, "blend", inputs=parts)
    found = evaluation.seconds_behind(eval_run, eval_run / "compare" / "full.safetensors")
    # of a blend its own; data have none; model, judge, texts, cf
    assert list(found.values()) == [1.5, 0, 2, 2, 5, 2]
    # a person's own vectors, outside the run, have none
    own, path = eval_run.parent / "own.safetensors", eval_run / "model-own.safetensors"
    save_file({"text": torch.zeros(N_ITEMS, 2)}, own)
    save_model(path, 8, inputs=[str(own)])
    assert list(evaluation.seconds_behind(eval_run, path).values()) == [2, 0]


def test_recommend_shows_the_best_and_the_items_nearest_to_z(eval_run):
    data, flags = backbones.load_data(eval_run), ["recommend", "--run", eval_run, "--user"]
    for name in ("model-hnlmrec", "judge"):
        file = f"{name}.safetensors"
        out = eval_main(*flags, "u1", "--k", 30, "--model", file)
        scores = hnlmrec.load_recommender(eval_run / file, data)[0].scores(torch.tensor([1]))[0]
        best = by_score(scores, items_of(data["train"], 1) | items_of(data["valid"], 1))[:30]
        lines = out.split("recommended:\n")[1].split("\nhard negatives")[0].splitlines()
        assert [line.split(None, 2)[2] for line in lines] == [f"Film [{i}]" for i in best]
        assert float(lines[0].split()[1]) == pytest.approx(float(scores[best[0]]), abs=1e-4)
    first = eval_main(*flags, "u0", "--k", 2)
    assert first.split("vector):\n")[1].count(" -> ") == 2
    assert eval_main(*flags[:-1], "--k", 2) == first  # without --user


def test_the_estimate_adds_up_and_less_work_takes_less(eval_run, monkeypatch):
    # a machine on which one look-up is not disturbed
    monkeypatch.setattr(evaluation.Timer, "repeat", lambda _, n, each: [0.3] * (n - 1) + [0.0016])
    found = []
    for flags in ("--llm-rows 0", "--llm-rows 5 --trials 4", "--llm-rows 5 --fast"):
        out = eval_main("estimate", "--run", eval_run, *flags.split())
        assert "this machine at 45% of" in out  # 7.2e-4 s / .0016 s
        found.append({name: int(n) for name, n in re.findall(r"(\w[\w ]*?) (\d+) s", out)})
        minutes = int(re.search(r"about (\d+) minutes", out)[1])
        assert minutes == pytest.approx(sum(found[-1].values()) / 60, abs=1)
    data = backbones.load_data(eval_run)
    for n_items in (23_170, 23_171):  # EASE refuses more items, at once
        monkeypatch.setattr(evaluation, "load_data", lambda _, n=n_items: data | {"n_items": n})
        out = eval_main("estimate", "--run", eval_run)
        found.append(int(re.search(r"closed forms (\d+) s", out)[1]))
    whole, few, fast, most, more = found
    assert more < most / 10
    assert fast["LLM"] < few["LLM"] < whole["LLM"] and fast["trainings"] < whole["trainings"]
    assert whole["trials"] == 0 < few["trials"]


@pytest.fixture
def commands(monkeypatch):
    """In place of evaluation.program: closed forms, save itemknn, and blends are made, all else is
    random vectors that the command decides -> the commands so far. A training's score is that of
    its learning rate: best at 2e-3, none above 4e-3; 40 epochs show half of it."""
    done = []

    def program(script, *words):
        words = [str(word) for word in words]
        done.append(" ".join([script, *words]))
        flags = dict(zip(words, words[1:]))
        lr = float(flags.get("--lr", 1e-3))
        if "itemknn" in words or lr > 4e-3:
            evaluation.fail("itemknn: would not fit" if "itemknn" in words else "the loss is nan")
        if words[0] == "blend" or "--seed" not in words:
            return PROGRAMS[script].main(words)
        worse = abs(math.log(lr / 2e-3)) / (20 if flags.get("--epochs") == "40" else 10)
        seed = int(backbones.json_digest(words[:words.index("--out")]), 16) % 997
        save_model(Path(flags["--run"]) / flags["--out"], seed, valid=1 - worse)

    monkeypatch.setattr(evaluation, "program", program)
    return done


def test_compare_makes_each_cell_once_and_evaluates_it(eval_run, commands):
    def files(*parts):
        """What was made by commands that have these parts."""
        return [re.search(r"--out (\S+)", command)[1] for command in commands
                if all(part in command for part in parts)]

    def count(*parts):
        return len(files(*parts))

    rows = ["RNS", "DNS --lr 2e-3", "EASE --ridge 5", "judge's negatives", "in full",
            "in full --dim 8", "text similarity", "all baselines in one score"]
    flags = ["compare", "--run", eval_run, "--seeds", 2, "--flags", "--epochs 1", "--methods"]
    page = eval_main(*flags, ";".join(rows))
    # a spread only where seeds have models of their own
    for name in rows:
        line = next(line for line in page.splitlines() if line.startswith(f"| {name} | 0."))
        assert ("±" in line) == (name not in ("EASE --ridge 5", "text similarity"))
    # trained are RNS, DNS twice, the judge's negatives twice and MixGCF, two seeds each
    assert [count("--seed", part) for part in ("rns", "dns", "2e-3", "--lambda-f 1", "mixgcf")] == [
        2, 4, 2, 4, 2]
    assert count("--dim 8") == 2 and count("--epochs 1") == 12
    # closed forms, and blends of files alone, once for all seeds; their flags are their own
    assert count("--backbone ease") == 2 and count("--ridge 5") == count("--parts texts") == 1
    assert "Left out: ItemKNN (itemknn: would not fit)." in page and count("itemknn") == 1
    for command in commands:
        if "--parts compare" in command:  # parts are of the blend's seed
            assert len(set(re.findall("seed[0-9]", command))) == 1
    found = json.loads((eval_run / "compare.json").read_text())
    assert list(found["methods"]) == rows
    # claims: the declared ones, against the best by validation, corrected together
    best = {name: max((row for row in rows if row.split(" --")[0] in names),
                      key=lambda row: found["methods"][row]["valid NDCG@20"])
            for name, names in (("baseline", ("RNS", "DNS", "EASE")), ("in full", ("in full",)))}
    claims, sampler = found["claims"], "DNS --lr 2e-3"
    assert [(claim["row"], claim["against"]) for claim in claims] == [
        (best["in full"], best["baseline"]), ("judge's negatives", sampler),
        (best["in full"], "all baselines in one score")]
    assert [claim["p by Holm"] for claim in claims] == evaluation.holm([c["p"] for c in claims])
    # a difference is of users' means over seeds
    data = backbones.load_data(eval_run)
    judged, other = (np.mean([ndcg_of(eval_run / file, data) for file in files(part)], 0)
                     for part in ("--lambda-f 1 --epochs 1 --run", "--lr 2e-3"))
    expected = evaluation.paired_bootstrap(judged - other)
    assert [claims[1][key] for key in ("mean", "low", "high", "p")] == pytest.approx(expected)
    # again nothing is made; with --force all, each once
    before = len(commands)
    eval_main(*flags, ";".join(rows[:6]))
    assert len(commands) == before
    eval_main(*flags, "DNS;in full", "--force")
    assert len(commands) == before + 8 and all("--force" in c for c in commands[before:])


def test_the_large_table_on_validation(eval_run, commands, monkeypatch):
    """It ranks the rows, reads no test pair, and leaves out what the run lacks."""
    load = evaluation.load_data  # without test pairs: any use of them fails
    monkeypatch.setattr(evaluation, "load_data", lambda run: load(run) | {"test": None})
    page = eval_main("compare", "--run", eval_run, "--seeds", 1, "--valid")
    found = json.loads((eval_run / "compare-valid.json").read_text())
    assert "seeds: 1; each model" in page  # without "mean ± sd"
    assert "claims" not in found and "fhns" not in found and "False hard" not in page
    _, _, left_out, _, table, *_ = page.split("\n\n")
    rows, found = [float(line.split()[-2]) for line in table.splitlines()[2:]], found["methods"]
    assert rows == sorted(rows, reverse=True) and len(rows) == len(found) > 9
    scores = ndcg_of(eval_run / "model-ease.safetensors", evaluation.load_data(eval_run), "valid")
    assert found["EASE"]["NDCG@20"] == pytest.approx(scores.mean())
    for name, why in (("HNLMRec", "no negatives"), ("in full, by a bag of words", "no judge-words"),
                      ("ItemKNN", "itemknn: would not fit")):
        assert f"{name} ({why}" in left_out and name not in found
    assert {"AlphaRec", "in full", "all baselines in one score"} <= set(found)
    assert "no row is left" in eval_refused("compare", "--run", eval_run, "--methods", "ItemKNN")
    assert "AlphaRec (not for neumf)" in eval_main(
        "compare", "--run", eval_run, "--seeds", 1, "--valid", "--backbone", "neumf")


def test_rows_have_flags_of_their_programs_and_files_that_can_be_made():
    helps = {"backbones.py": help_of("backbones.py", "pretrain"),
             "hnlmrec.py": help_of("hnlmrec.py", "train")}
    for name, method in evaluation.METHODS.items():
        script, _, *words = evaluation.training_of(name, {}, "mf", 0)
        words += [f"--{flag}" for flag in evaluation.SPACES.get(name, ())]
        assert all(f"{flag} " in helps[script] for flag in words if flag.startswith("--"))
        assert method.kind in (*evaluation.BASELINES, "text", "ours", "control")
        for part in filter(None, "|".join(method.parts).split("|")):
            assert part in evaluation.METHODS or re.fullmatch(r"(judge|texts).*safetensors", part)
        missing = evaluation.missing_file(Path("nowhere"), name)
        assert missing is None or "`python " in evaluation.making_of(Path("nowhere"), missing)
    names = {name for name, *_ in evaluation.CLAIMS} | set(evaluation.TABLE)
    assert names <= set(evaluation.METHODS)
    words = evaluation.training_of("judge's negatives, bag of words", {}, "mf", 3)
    assert words[-4:] == ["--lambda-f", "1", "--judge", "judge-words.safetensors"]
    # what a program says last is the error
    message = message_of(evaluation.program, "backbones.py", "pretrain", "--run", "nowhere")
    assert re.search("nowhere.*no such file.*prepare", message)


def test_tune_halves_resumes_and_picks_the_best(eval_run, commands, monkeypatch):
    run, methods, program = eval_run, "RNS; HNLMRec", evaluation.program
    flags = ["tune", "--run", run, "--budget", 12, "--methods"]
    save_model(run / "negatives-00000.safetensors", 0)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(evaluation, "program", lambda *words: (
            program(*words) if len(commands) < 8 else killed_after(list)))
        eval_main(*flags, methods)
    kept = backbones.read_jsonl(run / "tuned.jsonl")
    eval_main(*flags, methods)
    rows = backbones.read_jsonl(run / "tuned.jsonl")
    assert len(kept) > 3 and rows[:len(kept)] == kept and len(rows) == 12 + 12
    found = json.loads((run / "tuned.json").read_text())["methods"]["lightgcn"]
    for name in ("RNS", "HNLMRec"):
        trials = [row for row in rows if row["method"] == name]
        assert trials[0]["words"] == [] and trials[0]["short"] <= trials[0]["valid"]
        assert "defaults" in trials[0] and "defaults" not in trials[1]
        for n, trial in enumerate(trials[1:], 1):
            # halving: trained in full when fewer than half of all short runs are better
            shorts = [t["short"] for t in trials[:n + 1] if "failed" not in t]
            better = sum(short > shorts[-1] for short in shorts)
            assert "failed" in trial or (trial["valid"] is not None) == (better < len(shorts) / 2)
            # each fourth a random point
            if n % 4 == 0:
                assert len(trial["words"]) == 2 * len(evaluation.SPACES[name])
        best = max((t for t in trials if t["valid"] is not None), key=lambda t: t["valid"])
        assert (found[name]["words"], found[name]["trials"]) == (best["words"], 12)
        # its model is kept, and no other
        model = backbones.read_meta(run / found[name]["model"])
        assert model["history"][0]["valid_ndcg@20"] == best["valid"]
    # fixed ones; plain DNS is always among HNLMRec's; some trials went no further
    assert [rows[n]["words"][3] for n in (2, 4)] == ["0.01", "0.001"]  # RNS, --reg
    assert rows[3]["words"] == "--alpha 0 --lambda-s 0 --text-init 0".split()
    assert any(row["valid"] is None for row in rows) and len(list(run.glob("compare/*"))) == 2
    before, page = len(commands), (run / "tuned.json").read_bytes()
    failed = sum("failed" in row for row in rows)
    eval_main(*flags, methods)  # all there; what failed is tried again
    assert len(commands) == before + failed and (run / "tuned.json").read_bytes() == page
    model = run / found["RNS"]["model"]
    model.unlink()
    eval_main(*flags, methods)  # the best one's model alone is made again
    assert failed and len(commands) == before + 2 * failed + 1 and model.exists()
    rows = backbones.read_jsonl(run / "tuned.jsonl")
    for more in ((), ("--force",)):  # what was found of other methods stays
        before = len(commands)
        eval_main(*flags, "DNS", *more)
        assert list(json.loads((run / "tuned.json").read_text())["methods"]["lightgcn"]) == [
            "RNS", "HNLMRec", "DNS"]
        assert backbones.read_jsonl(run / "tuned.jsonl")[:24] == rows
        assert len(commands) >= before + 12


def test_compare_takes_the_tuned_flags(eval_run, commands):
    run = eval_run
    save_model(run / "negatives-00000.safetensors", 0)
    eval_main("tune", "--run", run, "--budget", 4, "--methods", "RNS;HNLMRec")
    tuned = evaluation.read_tuned(run / "tuned.json", backbones.load_data(run)["digest"])
    own = tuned["lightgcn"]["HNLMRec"]["words"]
    words = evaluation.training_of("no self-attention", tuned, "lightgcn", 1, ["--k", "2"])
    assert words[6:] == [*own, "--no-attention", "--k", "2"]  # and what makes it another
    compare = ["compare", "--run", run, "--tuned", "--methods"]
    for name, lacking in (("MixGCF", "MixGCF"), ("judge's negatives, TF-IDF", "judge's negatives")):
        message = message_of(evaluation.training_of, name, tuned, "lightgcn", 1)
        assert f"{lacking} on lightgcn is not in it" in message
        assert "tune --run … --budget …" in message
    eval_main(*compare, "RNS;DNS(M,N)", "--seeds", 1, "--valid")  # `tune` knows no DNS(M,N)
    page = (run / "compare-valid.md").read_text()
    assert "At default flags, without trials: DNS(M,N).\n" in page
    eval_main("tune", "--run", run, "--budget", 3, "--methods", "DNS")
    assert "had 3 to 4 trials" in eval_refused(*compare, "DNS")
    for text, message in (("{", "not by `tune`"), ('{"data": "x", "methods": {}}', "another data")):
        (run / "tuned.json").write_text(text)
        assert message in eval_refused(*compare, "DNS")


def test_a_short_run_that_stopped_by_itself_is_not_repeated(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(evaluation, "program", lambda *words: calls.append(words))

    def run_trial(scores, before, **settings):
        """After `before`, where a training shows these scores {epoch: score}."""
        history = [{"epoch": n, "valid_ndcg@20": score} for n, score in scores.items()]
        monkeypatch.setattr(evaluation, "read_meta", lambda path: {
            "history": history, "settings": settings})
        before = [{"short": one, "defaults": {"--epochs": "100"}} for one in before]
        return evaluation.run_trial(tmp_path, "x", ["backbones.py"], before)

    for last, runs in ((10, 1), (20, 2)):  # of a fifth of 100 epochs
        calls.clear()
        found = run_trial({5: 0.2, last: 0.1}, [None])
        assert (len(calls), found["short"], found["valid"]) == (runs, 0.2, 0.2)
    # the better half goes on: not the second of two, but one of two that are alike
    assert run_trial({5: 0.2, 20: 0.1}, [0.3])["valid"] is None
    assert run_trial({5: 0.2, 20: 0.1}, [0.2])["valid"] == 0.2
    # of the first trial's own epochs the best, and the best of the first fifth; of four, one
    scores = {2: 0.1, 3: 0.3, 4: 0.2, 9: 0.5, 10: 0.4}
    assert run_trial(scores, [], epochs=20, lr=0.001, backbone="mf") == {
        "short": 0.3, "valid": 0.5, "defaults": {"--epochs": "20", "--lr": "0.001"}}
    assert run_trial({1: 0.1, 3: 0.3}, [], epochs=4)["short"] == 0.1


def test_what_is_known_before_the_first_trial_decides_what_is_tried(eval_run, commands):
    """A judge that ranks no better than popularity: trials only move text parts to 0."""
    run, methods = eval_run, "HNLMRec;judge's negatives"
    save_model(run / "negatives-00000.safetensors", 0)
    tensors, meta = backbones.load_tensors(run / "judge.safetensors")
    meta["history"] = backbones.read_meta(run / "model-pop.safetensors")["history"]
    backbones.save_tensors(run / "judge.safetensors", tensors, meta)
    eval_main("tune", "--run", run, "--budget", 5, "--methods", methods)
    rows = backbones.read_jsonl(run / "tuned.jsonl")
    assert [row["method"] for row in rows].count("judge's negatives") == 1
    point = dict(zip(rows[-1]["words"][::2], rows[-1]["words"][1::2]))  # a random one
    assert point["--text-init"] == point["--lambda-s"] == "0" and len(point) == 7
    # one trial beside five: there was nothing to search
    eval_main("compare", "--run", run, "--tuned", "--valid", "--methods", "judge's negatives")


def test_a_trial_near_the_best_moves_one_flag_to_a_neighbour():
    space = {"lr": ["1", "2", "3", "4"], "m": ["5", "6", "8"], "k": ["7"]}
    before = [{"words": [], "valid": 0.1}, {"words": ["--lr", "2", "--k", "7"], "valid": 0.3},
              {"words": ["--lr", "4"], "valid": 0.2}]
    rng = np.random.default_rng(0)
    seen = Counter(" ".join(evaluation.next_point("RNS", space, before, rng)) for _ in range(300))
    of_lr, of_m = {"--lr 1 --k 7", "--lr 3 --k 7"}, "--lr 2 --k 7 --m "
    assert set(seen) == {*of_lr, of_m + "5", of_m + "6", of_m + "8"}
    assert min(seen.values()) > 30  # a default that is not known goes to any value
    before[0]["defaults"] = {"--m": "8"}
    moves = {" ".join(evaluation.next_point("RNS", space, before, rng)) for _ in range(100)}
    assert moves == {*of_lr, of_m + "6"}
    before[2] = {"words": ["--k", "7", "--lr", "1"], "valid": 0.2}  # --lr 1 --k 7 was tried
    moves = {" ".join(evaluation.next_point("RNS", space, before, rng)) for _ in range(100)}
    assert moves == {"--lr 3 --k 7", of_m + "6"}
    # before that, defaults and wide vectors, where a search may have these
    for widest, words in ((64, None), (128, ["--dim", "128", "--reg", "0.01"])):
        wide = evaluation.space_of("RNS", {"n_users": 5, "n_items": 9}, widest=widest)
        assert evaluation.next_point("RNS", wide, [], rng) == []
        assert (evaluation.next_point("RNS", wide, before[:1], rng) == words) == (words is not None)
    small, large = ({"n_users": n, "n_items": 1000, "train": random_pairs()} for n in (5, 10**5))
    assert evaluation.space_of("DNS", small)["dim"] == ["64", "128", "256", "512"]
    assert evaluation.space_of("DNS", large)["dim"] == ["64", "128", "256"]
    assert evaluation.space_of("DNS", small, widest=130)["dim"] == ["64", "128"]
    assert evaluation.space_of("DNS", small)["m"] == ["2", "4", "8", "16", "32"]  # M is 8
    for name, flags in (("DNS", {}), ("HNLMRec", {"text-init": ["0"], "lambda-s": ["0"]})):
        whole, bare = (evaluation.space_of(name, small, texts) for texts in (True, False))
        assert bare == whole | flags and (not flags or bare != whole)
    # nothing would read its temperature, and `train` refuses what nothing reads
    assert "tau-c" not in evaluation.space_of("RLMRec-Con", small, False)


def test_a_chart_shows_its_numbers_where_they_are():
    means, lows, highs = [0.061, -0.02, 0.3], [0.05, -0.04, 0.29], [0.07, 0.01, 0.302]
    root = xml.etree.ElementTree.fromstring(evaluation.svg_chart(
        "t & <u>\x1b", ["a <b> & \x07\x00\ud800 c", "Ünï 映画", ""], means, lows, highs).encode())

    def read(path, key):
        return np.array([float(e.get(key)) for e in root.findall(f".//{{*}}{path}")])

    ticks = [float(e.text) for e in root.findall(".//{*}text[@class='tick']")]
    to_value = np.poly1d(np.polyfit(read("text[@class='tick']", "x"), ticks, 1))
    for path, key, values in (
            ("text[@class='tick']", "x", ticks), ("circle", "cx", means),
            ("line[@class='interval']", "x1", lows), ("line[@class='interval']", "x2", highs),
            ("line[@stroke-dasharray='4 3']", "x1", [0])):
        near = pytest.approx(values, abs=(ticks[-1] - ticks[0]) / 1000)
        assert to_value(read(path, key)) == near, path
    words = {e.text for e in root.findall(".//{*}text")}
    assert {"a <b> & ??? c", "Ünï 映画", "0.0610 [0.0500, 0.0700]"} <= words
    evaluation.svg_chart("all alike", ["a"], [0.0], [0.0], [0.0])  # no division by zero


# ---- The README ----------------------------------------------------------------------------------
FLAG = r"(?<![\w-])--[a-z][\w-]*"


def readme(begin, end):
    return (HERE / "README.md").read_text(encoding="utf-8").split(begin, 1)[1].split(end, 1)[0]


def code_block(text, kind=""):
    return text.split(f"```{kind}\n", 1)[1].split("```", 1)[0]


def test_the_first_snippet_prints_what_the_readme_says(capsys):
    section = readme("## Thirty seconds", "\n## ")
    exec(code_block(section, "python"), {})
    assert capsys.readouterr().out == code_block(section.split("```python")[1].split("```", 1)[1])


def copy_table():
    """Rows of the table: (module, pieces, names to take along); a word in bold is their file."""
    rows, module = [], None
    for line in readme("## Copy this piece", "\n## ").splitlines():
        if line.startswith("| **"):
            module = PROGRAMS[line.split("**")[1]]
        elif line.startswith("| `"):
            rows.append((module, *(cell.split("`")[1::2] for cell in line.split("|")[1:3])))
    return rows


@cache
def code_of(module):
    """{name: syntax tree} of the functions, classes and constants at the top of a file."""
    nodes = ast.parse(Path(module.__file__).read_text(encoding="utf-8")).body
    named = [(node, one) for node in nodes for one in [node, *getattr(node, "targets", [])]]
    return {getattr(one, "name", getattr(one, "id", None)): node for node, one in named}


def global_names(code):
    """Names that compiled code, or any code within it, looks up outside itself."""
    found = {instruction.argval for instruction in dis.get_instructions(code)
             if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    return found.union(*(global_names(c) for c in code.co_consts if hasattr(c, "co_code")))


@pytest.mark.parametrize("row", copy_table(), ids=lambda row: row[1][0])
def test_a_pasted_piece_runs_and_finds_what_it_finds_in_its_file(row):
    """So it does there what it does here, on every path: the same code with the same names."""
    (module, pieces, along), plain = row, {}
    known = code_of(backbones) | code_of(module)
    code = compile(ast.Module([known[name] for name in along + pieces], []), "pasted", "exec")
    exec(code_block(readme("## Copy this piece", "\n| "), "python"), plain)
    taken, here = global_names(code) - {*dir(builtins), "__name__"}, vars(backbones) | vars(module)
    assert taken - set(plain) <= {*along, *pieces} and not set(plain) & {*along, *pieces}
    assert all(plain[name] is here[name] for name in taken & set(plain) - {"fail"})
    # one makes what the caller hands in; everything else in the row is needed by the code
    assert set(along) - taken <= {"normalized_adjacency"} and len(along) <= 4
    exec(code, plain)


def help_of(script, *words):
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        PROGRAMS[script].main([*words, "--help"])
    return out.getvalue()


def test_readme_and_run_sh_name_no_flag_that_the_programs_lack():
    known = {(script, command): {*re.findall(FLAG, help_of(script, command))} for script in PROGRAMS
             for command in re.search(r"\{([\w,]+)\}", help_of(script))[1].split(",")}
    every = {"--nproc-per-node"}.union(*known.values())  # torchrun's
    for path in (HERE / "run.sh", HERE / "README.md"):
        text = path.read_text(encoding="utf-8").replace("\\\n", " ").split("# ---- settings", 1)[-1]
        for step in re.findall(r"\bstep (\w+\.py) (\w+)(.*)", text):
            # --patience stands within a string for --flags
            lacking = {*re.findall(FLAG, step[2])} - known.get(step[:2], set()) - {"--patience"}
            assert not lacking, f"run.sh: {step[:2]} has no {lacking}"
        for line in text.splitlines():
            lacking = {*re.findall(FLAG, line)} - every
            assert not lacking, f"{path.name}: no program has {lacking}: {line.strip()[:90]}"


def test_run_sh_is_bash_3_2():
    """It parses, has no syntax of bash 4, takes no array for a plain word, and guards each array
    that may be empty, which bash 3.2 counts as unset."""
    subprocess.run(["bash", "-n", HERE / "run.sh"], check=True)
    for name, value in (("FAST", "yes"), ("META", "items.tsv")):  # refused, not passed over
        done = subprocess.run(["bash", HERE / "run.sh"], env={"PATH": os.environ["PATH"],
                              name: value}, capture_output=True, text=True, check=False)
        assert done.returncode == 2 and name in done.stderr
    code = re.sub(r"(?s)<<'EOF'\n.*?\nEOF\n", "\n", (HERE / "run.sh").read_text(encoding="utf-8"))
    code = re.sub(r"(?m)(^|\s)#.*$", "", code)
    for newer in (r"\$\{\w+(\[[@*]\])?[,^@]", r"\b(mapfile|readarray|coproc)\b", r"\|&", "&>>",
                  r"\b(declare|local|typeset) -\w*[An]", r";;?&", r"\$\{\w+\[-\d", r"wait -n",
                  r"\[\[ -v", r"printf '%\("):
        assert not re.search(newer, code), newer
    for name in set(re.findall(r"\b(\w+)\+?=\(", code)):
        assert not re.search(rf"\${{?{name}\b(?!\[)", code), f"${name}: its first word alone"
        first = re.findall(rf"\b{name}=\(\s*(.*?)\s*\)", code)  # literal words: never empty
        unguarded = code.replace(f'${{{name}[@]+"${{{name}[@]}}"}}', "")
        assert f"{{{name}[@]" not in unguarded or all(re.match("[-\\w]", w) for w in first), name


# ---- The real programs, from a ratings file to the report ----------------------------------------
def test_pipeline_makes_every_file(finished, tiny_llm, raw):
    rows = json.loads((finished / "metrics.json").read_text())["methods"]
    assert set(rows) == {"hnlmrec", "judged", "rns", "rp3", "ease", "full"}
    for stem, row in rows.items():  # by all users' validation, even where a training ranked a few
        path = finished / f"model-{stem}.safetensors"
        whole = ndcg_of(path, backbones.load_data(finished), "valid").mean()
        assert row["valid NDCG@20"] == pytest.approx(whole, abs=1e-6)
    for name, words in steps_of(tiny_llm, raw).items():  # and nothing is to be made again
        assert name == "report" or "skip:" in run_step(finished, words), words


def test_trace_follows_a_pair(finished, monkeypatch):
    data = backbones.load_data(finished)
    items, users = (backbones.read_jsonl(finished / f"{kind}.jsonl") for kind in ("items", "users"))
    shard, _ = backbones.load_tensors(finished / "negatives-00000.safetensors")
    (u, i), trace = shard["pairs"][5].tolist(), ["trace", "--run", finished, "--user"]
    out = cli("hnlmrec.py", *trace, users[u]["raw"], "--item", items[i]["raw"])
    model, _, cf = backbones.load_model(finished / "cf.safetensors", data)
    assert f"score {cf['user'][u] @ cf['item'][i]:.3f}" in out
    assert f"norm {shard['hidden'][5].float().norm():.3f}" in out
    mined = backbones.mine_hard_negatives(model, data["train"], torch.tensor([u]), 1, 5)[0].tolist()
    assert "ranks 1–5: " + "; ".join(items[n]["title"] for n in mined) in out.split("4. mined")[1]
    prompt = out.split("5. prompt")[1].split("6. generated")[0]
    assert llm_negatives.INSTRUCTION in prompt and f"{items[i]['title']}." in prompt
    trained, _, _ = backbones.load_model(finished / "model-hnlmrec.safetensors", data)
    assert f"score as trained {trained.scores(torch.tensor([u]))[0, i]:.3f}" in out
    assert "projector 0.0000" not in out and "backbone 0.0000" not in out
    with monkeypatch.context() as patch:  # a model that is older than a weight
        load = backbones.load_tensors
        patch.setattr(backbones, "load_tensors", lambda *words: (
            (found := load(*words))[1]["settings"].pop("lambda_f", None), found)[1])
        assert out == cli("hnlmrec.py", *trace, users[u]["raw"], "--item", items[i]["raw"])
    # without --item, the user's first pair with a generated vector of its own
    first = int(shard["pairs"][shard["pairs"][:, 0] == u][0, 1])
    out = cli("hnlmrec.py", *trace, users[u]["raw"])
    start = shard["pairs"][0, 0]  # and without --user, the first pair of all
    assert cli("hnlmrec.py", *trace[:-1]) == cli("hnlmrec.py", *trace, users[start]["raw"])
    assert f"item {items[first]['raw']} -> row {first}:" in out
    held = items[data["test"][data["test"][:, 0] == u][0, 1]]["raw"]
    assert "no train pair" in refused("hnlmrec.py", *trace, users[u]["raw"], "--item", held)
    # of a pair without a vector of its own, h, z and the step are made of one other vector
    made, rows = {tuple(pair) for pair in shard["pairs"].tolist()}, []
    u, i = next(pair for pair in data["train"].tolist() if tuple(pair) not in made)
    draw = hnlmrec.NegativeTable.__call__
    monkeypatch.setattr(hnlmrec.NegativeTable, "__call__",
                        lambda *words: (rows.append(draw(*words)), rows[-1])[1])
    out = cli("hnlmrec.py", *trace, users[u]["raw"], "--item", items[i]["raw"])
    assert "(it has none: this is of the pair with" in out
    assert len({int(some[0, 0]) for some in rows[:-1]}) == 1  # the last are L_align's
    monkeypatch.setattr(backbones, "row_of", lambda *_: 30)  # the row of a user without train pairs
    assert "--user u1: has no train pair" in refused("hnlmrec.py", *trace, "u1")


def test_flags_reach_what_trains(finished, monkeypatch):
    """`build` reads neither validation nor test pairs, but for --keep-clear valid."""
    data, penalties, make = backbones.load_data(finished), [], backbones.make_sampler
    settings = backbones.read_meta(finished / "model-hnlmrec.safetensors")["settings"]
    monkeypatch.setattr(backbones, "make_sampler", lambda *words, penalty, **more: (
        penalties.append(penalty), make(*words, penalty=penalty, **more))[1])
    alone = {name: value for name, value in data.items() if name not in ("valid", "test")}

    def build(data=alone, **flags):
        return hnlmrec.build(finished, Namespace(**settings | flags), data)

    real, moved, noise, plain = (build(**flags) for flags in (
        {}, {"control": "shuffled"}, {"control": "random"}, {"text_init": 0.0}))
    for table in (lambda method: method.hidden, lambda method: method.semantic.item):
        ours, other, unlike = (table(method) for method in (real, moved, noise))
        assert not torch.allclose(ours, other, atol=0.1) and unlike.dtype == ours.dtype
        rows, others = (set(map(tuple, (1e3 * part).round().tolist())) for part in (ours, other))
        assert rows == others and torch.cdist(unlike.float(), ours.float()).min() > 0.1
    text = backbones.load_texts(finished, "texts.safetensors", data)[1]  # the middle one of two
    start = hnlmrec.text_start(text, data["train"], 30, 8, real.backbone.std)
    assert torch.equal(real.backbone.embedding, start)
    assert not torch.allclose(moved.backbone.embedding, start, atol=0.1)
    half = (start + plain.backbone.embedding) / 2
    assert torch.allclose(build(text_init=0.5).backbone.embedding, half, atol=1e-6)
    build(keep_clear="judge")
    likely = backbones.load_tensors(finished / "judge.safetensors")[0]["likely"].long()
    assert penalties[0] is None and (penalties[-1](torch.arange(30), likely) == torch.inf).all()
    build(data, keep_clear="valid")
    listed = penalties[-1](torch.arange(30), torch.arange(40).expand(30, -1)) == torch.inf
    assert sorted(listed.nonzero().tolist()) == sorted(data["valid"].tolist())


def test_a_search_is_of_the_files_that_its_flags_name(eval_run, commands):
    for times in (1, 1, 2):
        if times > len(commands):  # at first, and other texts of the same name
            save_file({"text": torch.randn(N_ITEMS, 5)}, eval_run / "own.safetensors")
        eval_main("tune", "--run", eval_run, "--methods", "AlphaRec", "--budget", 1, "--flags",
                  "--text-vectors own.safetensors")
        assert len(commands) == times


@pytest.mark.parametrize("more", [[], ["--train-projector"]])
def test_the_papers_form_trains(copied, more):
    name = "model-paper.safetensors"
    cli("hnlmrec.py", "train", "--run", copied, "--paper", "--hinge", 0.3, "--dim", 8,
        "--epochs", 2, "--eval-every", 1, *more, "--out", name)
    tensors, meta = backbones.load_tensors(copied / name)
    assert {"hinge", "contrast"} <= set(meta["history"][0])
    method = hnlmrec.build(copied, Namespace(**meta["settings"]), backbones.load_data(copied))
    start = backbones.state_of({"projector": method.projector})
    assert any(not torch.equal(tensors[key], start[key]) for key in start) == bool(more)
    out = cli("hnlmrec.py", "trace", "--run", copied, "--user", "u0", "--model", name)
    assert "contrast" in out and "projector 0.0000" not in out and "a batch of one" not in out
    assert ("projector" in out.split("9. gradient")[1]) == bool(more)


def test_text_vectors_of_ones_own(copied, monkeypatch):
    """What was read, given as a file of one's own, changes nothing; others do."""
    train = ["train", "--run", copied, *BUDGET, *BAND, "--alpha", 0.3, "--out", "own.safetensors"]
    path = copied.parent / "text.safetensors"
    train, judge = [*train, "--text-vectors", path], [
        "judge", "--run", copied, "--epochs", 1, "--out", "judge-x.safetensors", "--text-vectors"]
    save_file(load_file(copied / "texts.safetensors"), path)
    cli("hnlmrec.py", *train)
    ours, theirs = (load_file(copied / f"{name}.safetensors") for name in ("own", "model-hnlmrec"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    cli("hnlmrec.py", *judge, path)
    monkeypatch.chdir(path.parent)  # the file is the same one from anywhere
    assert "skip: " in cli("hnlmrec.py", *train[:-1], path.name)
    save_file({"text": torch.randn(40, 3)}, path)
    assert "text.safetensors than the one" in refused("hnlmrec.py", *train)  # another file
    cli("hnlmrec.py", *train, "--force")
    assert not torch.equal(load_file(copied / "own.safetensors")["user"], theirs["user"])
    layers = [torch.full((40, 1), float(n)) for n in range(3)]  # in the order of their numbers
    save_file(dict(zip(("layer10", "layer20", "layer9"), (layers[1], layers[2], layers[0]))), path)
    read = backbones.load_texts(copied, path, backbones.load_data(copied))
    assert [float(layer[0]) for layer in read] == [0, 1, 2]
    save_file({"text": torch.ones(40, 3)}, path)
    assert "alike for all items" in refused("hnlmrec.py", *train, "--force")
    assert "judge: left out, since" in cli("hnlmrec.py", *judge, path, "--force")
    assert not (copied / "judge-x.safetensors").exists()  # that of the former texts


def test_judge_and_blend_go_through(copied):
    judge, data = ["judge", "--run", copied, "--epochs", 2], backbones.load_data(copied)
    tensors, meta = backbones.load_tensors(copied / "judge.safetensors")
    tried = {}
    for dropout in (0.0, 0.5):
        cli("hnlmrec.py", *judge, "--dropout", dropout, "--out", f"judge-{dropout}.safetensors")
        other, of_other = backbones.load_tensors(copied / f"judge-{dropout}.safetensors")
        tried[dropout] = max(row["valid_ndcg@20"] for row in of_other["history"])
        same = all(torch.equal(other[name], tensors[name]) for name in tensors)
        assert same == (dropout == meta["dropout"])
    assert tried[meta["dropout"]] == max(tried.values())
    assert tensors["likely"].shape == (30, 20) and len(meta["history"]) == 2
    cli("hnlmrec.py", *judge, "--seed", 1, "--out", "judge-seed.safetensors")
    other, _ = backbones.load_tensors(copied / "judge-seed.safetensors")
    assert not torch.equal(other["item"], tensors["item"])
    out = cli("hnlmrec.py", "blend", "--run", copied, "--parts", PARTS, "--force")
    printed = re.findall(r"blend: (\S+), alone valid NDCG@20 (\S+), weight (\S+)\n", out)
    names, alone, weights = zip(*printed)
    parts = [backbones.load_model(copied / name, data)[0] for name in names if "model" in name]
    parts.insert(1, hnlmrec.Judge(tensors, data["train"], 30))
    assert list(alone) == [f"{backbones.validation(part, data)():.4f}" for part in parts]
    blend, meta, _ = hnlmrec.load_recommender(copied / "model-full.safetensors", data)
    oracle, users = hnlmrec.Blend(parts, list(map(float, weights))), torch.arange(30)
    assert torch.allclose(blend.scores(users), oracle.scores(users), atol=1e-5)
    other = shutil.copytree(copied, copied.parent / "compare") / "model-full.safetensors"
    assert hnlmrec.load_recommender(other, data)[1] == meta  # a run may have this name
    assert backbones.validation(blend, data)() == meta["history"][0]["valid_ndcg@20"]
    assert not blend.parts[0].training  # ranked without dropout, before and after
    # of alternatives the one that the whole is better with, wherever it stands
    scores, rns, judge = {}, "model-rns.safetensors", "judge.safetensors"
    for choice in (rns, judge, f"{rns}|{judge}", f"{judge}|{rns}"):
        cli("hnlmrec.py", "blend", "--run", copied, "--parts", choice, "--out",
            "model-choice.safetensors", "--force")
        meta = backbones.read_meta(copied / "model-choice.safetensors")
        scores[choice] = meta["history"][0]["valid_ndcg@20"], meta["parts"]
    (worse, _), (better, parts) = sorted(list(scores.values())[:2])
    assert worse < better and list(scores.values())[2:] == [(better, parts)] * 2
    texts, _, _ = hnlmrec.load_recommender(copied / "texts.safetensors", data)
    readings = backbones.load_texts(copied, "texts.safetensors", data)
    oracle = hnlmrec.TextSimilarity(readings, data["train"], 30)
    assert len(readings) == 2 and torch.equal(texts.scores(users), oracle.scores(users))


# ---- Lineage: no result of parts that do not belong together; every message's fix works ----------
def follow(run, steps, file):
    """Make a file, doing what each refusal's message says -> the files that were made again."""
    made, force = [], []
    while len(made) < 20:
        try:
            run_step(run, steps[file], *force)
            return made
        except SystemExit as error:
            if "; delete " in error.message:
                Path(error.message.split(": ")[0]).unlink()
            words = shlex.split(re.findall("`python ([^`]+)`", error.message)[-1].replace(" …", ""))
            flags = dict(zip(words, words[1:]))
            name = flags.get("--out", flags.get("--name", "data")).removesuffix(".safetensors")
            assert words[:2] == steps[name][:2], error.message
            if name == file:
                force = ["--force"]
            else:
                made += [*follow(run, steps | {name: [*steps[name], *words[2:]]}, name), name]
    raise AssertionError(made)


def test_another_split_is_followed_by_the_messages_own_words(copied, finished, tiny_llm, raw):
    """`prepare --force` makes all former files stale: profiles quote what are test pairs now."""
    steps = steps_of(tiny_llm, raw)
    steps["data"] += ["--seed", 3]
    run_step(copied, steps["data"], "--force")
    # and those of the run with the former split are no models of this one
    for script, command, name in (
            ("eval.py", "recommend --model", "rns"), ("eval.py", "recommend --model", "full"),
            ("hnlmrec.py", "trace --model", "hnlmrec"), ("hnlmrec.py", "blend --parts", "rns")):
        model = finished / f"model-{name}.safetensors"
        message = refused(script, *command.split(), model, "--run", copied)
        assert "pairs of another run" in message
    message = message_of(run_step, copied, steps["model-full"])  # blends are stale by their parts
    assert "was made with another data.safetensors than the one that is there" in message
    made = [follow(copied, steps, name) for name in ("model-hnlmrec", "model-full", "report")]
    assert made == [["cf", "profiles.jsonl", "sft", "negatives", "texts"],
                    ["judge", "model-judged", "model-rp3", "model-ease"], ["model-rns"]]
    digest = backbones.load_data(copied)["digest"]
    for path in copied.glob("*.safetensors"):
        settings = backbones.read_meta(path, check=True)["settings"]
        assert path.stem == "data" or settings["inputs"]["data.safetensors"] == digest


def test_what_was_made_from_stale_files_is_stale(copied, tiny_llm, raw):
    """A judge of the former texts is in no blend, though the judge's own file is as it was."""
    shutil.rmtree(copied / "adapter")  # what lies further back and is gone is missed by nobody
    cli(*RECOMMEND, "--run", copied)
    steps = steps_of(tiny_llm, raw)
    steps["texts"] += ["--layers", "0"]
    run_step(copied, steps["texts"], "--force")
    for name in ("model-judged", "model-full"):
        message = message_of(run_step, copied, steps[name])
        assert "judge.safetensors: was made with another texts.safetensors than" in message
    assert follow(copied, steps, "model-full") == ["judge", "model-judged"]
    # what was written beside is checked, too
    (copied / "users.jsonl").write_text((copied / "users.jsonl").read_text() + "\n")
    with pytest.raises(SystemExit, match="another users.jsonl"):
        backbones.check_inputs(copied / "x", {"judge.safetensors": backbones.read_meta(
            copied / "judge.safetensors")["digest"]})


def test_a_set_of_negatives_is_its_shards(tmp_path):
    for name in ("negatives-00000", "negatives-00001", "negatives-x-00000", "negatives-x"):
        (tmp_path / f"{name}.safetensors").touch()
    (tmp_path / "negatives").touch()  # a file of the same name is none of them
    for name, found in (("negatives", ["negatives-00000", "negatives-00001"]),
                        ("negatives-x", ["negatives-x-00000"]),
                        ("negatives-y", ["negatives-y-00000"]), ("judge.safetensors", ["judge"])):
        assert [path.stem for path in backbones.files_of(tmp_path / name)] == found


@pytest.mark.parametrize("name", ["items.jsonl", "cf", "profiles.jsonl", "texts", "judge",
                                  "model-hnlmrec", "model-judged"])
def test_what_was_deleted_is_made_again_and_all_else_stays(copied, tiny_llm, raw, name):
    """The same settings give the same digest: nothing that was made from it is made anew."""
    def now():
        return backbones.digests(copied, *(path.name for path in copied.glob("*.safetensors")))

    before, steps = now(), steps_of(tiny_llm, raw)
    (copied / (name if "." in name else f"{name}.safetensors")).unlink()
    torch.manual_seed(99)
    made = [follow(copied, steps, file) for file in ("negatives", "model-hnlmrec", "model-full")]
    expected = {"items.jsonl": ["data"], "model-hnlmrec": []}.get(name, [name])
    assert sum(made, []) == expected and now() == before


RECOMMEND = ("eval.py", "recommend", "--user", "u1")
READERS = {  # file -> who reads it
    "data.safetensors": ("backbones.py", "pretrain"),
    "texts.safetensors": ("hnlmrec.py", "judge", "--out", "judge-new.safetensors"),
    "cf.safetensors": ("hnlmrec.py", "train", "--out", "new.safetensors"),
    "negatives-00000.safetensors": ("hnlmrec.py", "train", "--out", "new.safetensors"),
    "judge.safetensors": ("hnlmrec.py", "blend", "--parts", PARTS, "--out", "new.safetensors"),
    "model-hnlmrec.safetensors": RECOMMEND, "items.jsonl": RECOMMEND, "users.jsonl": RECOMMEND,
    "sft.safetensors": ("llm_negatives.py", "generate", "--out", "negatives-new", "--llm")}


@pytest.mark.parametrize("name", list(READERS))
def test_damaged_files_are_named_by_whoever_reads_them(copied, name, tiny_llm):
    """Gone, cut in half, with one bit or one digit or one line changed, with a NaN."""
    path, (script, *words) = copied / name, READERS[name]
    words += [tiny_llm] if words[-1] == "--llm" else []
    whole = path.read_bytes()
    edits = [whole[: len(whole) // 2], whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:], None]
    edits += [whole.replace(b"seed", b"Seed", 1)] if path.suffix == ".safetensors" else [
        b"".join(reversed(whole.splitlines(keepends=True)))]
    for edit in edits:
        path.unlink()
        if edit is not None:
            path.write_bytes(edit)
        assert edit != whole and name in refused(script, *words, "--run", copied)
        path.write_bytes(whole)
    if "model" in name:
        tensors, meta = backbones.load_tensors(path)
        tensors["item"][7, 2] = math.nan
        message = message_of(backbones.save_tensors, path, tensors, meta)
        assert "item[7, 2] is NaN or infinite" in message and path.read_bytes() == whole


# command -> flags that it refuses, and a part of its line
BAD_FLAGS = {
    "backbones.py pretrain": [
        ("--sampler dns --n 20", "m is 4; lower"), ("--n 2", "read by --sampler dns"),
        ("--beta 0.5", "--beta: is read by pns alone"), ("--tau 1", "by softmax alone"),
        ("--loss softmax --sampler pns --beta 0.5", "draws uniformly"),
        ("--loss softmax --beta 0.5", "by pns"), ("--loss softmax --sampler dns", "draws unif"),
        ("--shared 9", "by softmax alone"),
        ("--backbone ease", "no vectors"), ("--backbone closed --out x.safetensors", "go to model"),
        ("--sampler rns dns --out x.safetensors", "go to model-"),
        ("--topk 3", "lightgcn has no such"), ("--text-vectors none", "read --run"),
        ("--text-vectors x --backbone neumf", "not for neumf"),
        ("--epochs -1", r"-1 is outside \[0, 2147483647\]"), ("--dim two", "not of type int"),
        ("--loss softmax --sampler rns dns", "makes one model"), ("--epo 1", "--epo"),
        (f"--seed {2**64}", "--seed"), ("--device cuda:99", "'cuda:99' .*'cpu'"),
        ("--backbone neumf --dim 33 --out x.safetensors", "--dim 33"),
        ("--run nowhere", "nowhere/data.safetensors: no such file; make it with `python hnlm"),
        ("--out sft-x.safetensors", "sft names files of `python llm_negatives.py finetune`"),
        # --force overwrites no file of another command's either
        ("--out model-hnlmrec.safetensors --force", "`train` writes"), ("--cosine", "needs --loss"),
        ("--out x.jsonl", "as x-2.safetensors"), ("--seed 1", "seed=0, now 1.* --force`"),
        ("--out ../x.safetensors", "give a plain name")],
    "hnlmrec.py prepare": [
        ("", "--reviews: give"), ("--train-file x", "all of --train-file"),
        ("--reviews x --min-rating nan", "nan"), ("--reviews x --since 2016-13-01", "--since"),
        *((f"--train-file x --valid-file x --test-file x {flag} {value}", f"{flag}: does not apply")
          for flag, value in (("--min-rating", 4), ("--k-core", 5), ("--preset", "toys"),
                              ("--reviews", "x")))],
    "hnlmrec.py train": [
        ("--negatives none", "--alpha: needs .*; give 0"),
        ("--lambda1 0 --mine-first 3 --out model-x.safetensors", "--mine-first: nothing reads it"),
        ("--negatives none --alpha 0", "--lambda1: needs generated vectors"),
        ("--negatives none --alpha 0 --lambda1 0 --paper", "--paper: needs generated vec"),
        ("--paper --mine-last 9", "--mine-last: nothing reads it"),
        ("--paper --lambda-s 0.1", "--lambda-s: the paper's form has no such term"),
        ("--paper --lambda-f 1", "--lambda-f: the paper's form has no such term"),
        ("--hinge 0.3", "--hinge: is part of the paper's form; add --paper"),
        ("--train-projector", "--train-projector: is part of the paper's form"),
        ("--keep-clear judge --sampler rns", "--keep-clear: only dns takes a penalty"),
        ("--keep-clear valid --lambda-f 1", "--keep-clear: beside --lambda-f dns keeps"),
        ("--negatives none --alpha 0 --lambda1 0 --lambda-s 0 --text-init 0 --control random",
         "--control: nothing reads it"),
        ("--gamma 1", "--gamma: nothing reads it"), ("--judge x", "--judge: nothing"),
        *((f"{evaluation.PLAIN} --lambda-f 1 {words}", "nothing reads it") for words in (
               "--k 2", "--no-attention", "--cf x", "--mine-last 9", "--tau-c 1",
               "--text-vectors x")),
        ("--lambda1 inf", "not finite"), ("--alpha 1.5", r"1.5 is outside \[0, 1\]"),
        ("--tau-c 0", r"0 is outside \(0, inf\]"), ("--out texts.safetensors", "names files of"),
        ("--control cleared", "invalid choice: 'cleared'"), ("", "now .* --force`"),
        ("--lambda-f 1 --judge cf.safetensors --out x.safetensors", "not a judge; name"),
        ("--lambda-f 1 --judge judge-x.safetensors --out x.safetensors", "hnlmrec.py judge --run")],
    "hnlmrec.py judge": [
        ("--text-vectors model-ease.safetensors --out judge-x.safetensors", "holds no texts"),
        ("--likely 0", r"0 is outside \[1,"), ("--dropout 0 1", r"1 is outside \[0, 0.95\]"),
        ("--out model-judged.safetensors --force", "--out"), ("--lr 0.1", "now 0.1.* --force`")],
    "hnlmrec.py blend": [
        ("", "required: --parts"), ("--parts ,|,", "--parts ,.,: name one file or more"),
        ("--parts cf.safetensors,cf.safetensors --out x.safetensors", "file or more, each once"),
        ("--parts ./model-full.safetensors --out model-full.safetensors --force", "own inputs"),
        ("--parts cf.safetensors", "parts=.*, now .* --force`")],
    "llm_negatives.py profile": [
        ("--out users.jsonl --force", "--out 'users.jsonl'"), ("--llm-rows -1", "--llm-rows"),
        ("--out profiles-x.jsonl --llm nowhere", "--llm nowhere")],
    "llm_negatives.py finetune": [
        ("--name cf --force", "--name 'cf'"), ("--name sft-2.partial", "--name 'sft-2.partial'"),
        ("--warmup-pairs 1 --force", "--warmup-pairs 1"), ("--tau-s 0", "--tau-s"),
        ("--mine-first 5 --mine-last 1 --force", "--mine-first 5"), ("--epochs inf", "--epochs"),
        ("--name sft-x --llm-layers 0 --lora-targets no", "--lora-targets no"),
        ("--name sft-x --cf model-rp3.safetensors", "model-rp3.safetensors: is a closed form")],
    "llm_negatives.py generate": [
        ("--sft cf --out negatives-y", "--sft 'cf'"), ("--out Negatives", "--out 'Neg")],
    "llm_negatives.py read": [
        ("--layers 0,9 --out texts-x.safetensors", r"has layers 0 \(its token embeddings\) to 2"),
        ("--layers -1 --out texts-x.safetensors", "give numbers of layers"),
        ("--out judge.safetensors --force", "--out 'judge"), ("--control no", "--control"),
        ("--control tfidf --layers 0 --out texts-x.safetensors", "has no layers"),
        ("--layers 0 --most 5 --out texts-x.safetensors", "--most: layers above 0")],
    "eval.py compare": [
        ("--methods XYZ", "is none of Popularity"), ("--flags '--dim 8 --seed 5'", "by each"),
        ("--methods 'DNS --out=x'", "by each"), ("--out Metrics", "names files of"),
        ("--methods 'judge alone --lr 0.1'", "nothing is trained for it"),
        ("--out notes", "notes.md was not written by `compare`"),
        ("--out picture", "picture.svg was not written"), ("--methods DNS --tuned", "tuned.json"),
        ("--methods DNS --flags '--sampler rns'", "leave --sampler out"),
        ("--methods 'AlphaRec --loss=bpr'", "leave --loss out"), ("--out x.json", "'x.json'"),
        ("--methods 'LLM not fine-tuned'", "generate --run"),
        ("--methods 'in full, by a bag of words'", "--text-vectors texts-words.safetensors`")],
    "eval.py tune": [
        ("--out report", "names files of"), ("--methods EASE", "is none of RNS"),
        ("--out notes", "not written by `tune`"),
        ("--methods AlphaRec --backbone neumf", "is none of RNS")],
    "eval.py recommend": [
        ("--user u0 --k 41", "catalogue has 40"), ("--user x", "--user x: no such id"),
        ("--user u0 --model sft.safetensors", "not a trained recommender")],
    "hnlmrec.py trace": [
        ("--user x", "--user x: no such id"),
        ("--user u1 --model model-rns.safetensors", "without generated negatives"),
        ("--user u1 --model model-judged.safetensors", "without generated negatives")]}


@pytest.mark.parametrize("command, words, message", [
    (command, *row) for command, rows in BAD_FLAGS.items() for row in rows])
def test_refused_flags_change_no_file(finished, tiny_llm, monkeypatch, command, words, message):
    def now():
        return {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}

    monkeypatch.setattr(evaluation, "program", lambda *_: pytest.fail("a step was run"))
    before, words = now(), [*command.split(), *shlex.split(words)]
    words += ["--run", finished] if "--run" not in words else []
    words += ["--llm", tiny_llm] if "llm" in command and "--llm" not in words else []
    assert re.search(message, refused(*words))
    assert now() == before


def test_prepare_killed_between_its_files_leaves_no_mixture(copied, raw, tmp_path, monkeypatch):
    other, real = tmp_path / "items.tsv", backbones.write_atomic
    other.write_text((raw / "items.tsv").read_text().replace("Film", "Tome"))
    flags = ["prepare", "--run", copied, "--reviews", raw / "interactions.tsv", "--meta"]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(backbones, "write_atomic", partial(killed_after, real))
        cli("hnlmrec.py", *flags, other, "--force")
    assert "no such file" in refused("hnlmrec.py", "train", "--run", copied)
    cli("hnlmrec.py", *flags, raw / "items.tsv")
    assert "Tome" not in (copied / "items.jsonl").read_text()
    moved = shutil.copy(raw / "items.tsv", tmp_path / "moved.tsv")  # contents decide, not names
    assert "skip:" in cli("hnlmrec.py", *flags, moved)
    shutil.copy(other, moved)  # of the same size
    assert "made with files" in refused("hnlmrec.py", *flags, moved)


@pytest.mark.parametrize("program", ["backbones.py pretrain --backbone pop", "eval.py report"])
def test_a_closed_pipe_or_an_ascii_terminal_costs_no_result(copied, program):
    run = copied.rename(copied.with_name("copié"))  # its name is printed
    script, *words = shlex.split(program)
    out = "report.md" if "report" in words else "model-new.safetensors"
    (run / out).unlink(missing_ok=True)
    words = shlex.join([sys.executable, str(HERE / script), *words, "--run", str(run)])
    words += " | true" if "report" in words else f" --out {out} > /dev/full"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", words], text=True, capture_output=True,
                          check=False, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and not done.stderr and (run / out).exists()
