"""eval.py: what the trained models are worth, and what their negatives are.

report     runs/NAME/model-*.safetensors -> report.md, report.svg and metrics.json. This and
           compare read the test pairs, and nothing before them does.
judge      what texts and LLM know of validation positives beyond CF -> judge.json. No test pair.
compare    methods x backbones x seeds, ablations and controls, on the test pairs -> compare.md,
           compare.json, pictures.
tune       as many trials for each method, on validation -> tuned.json. No test pair.
sweep      values of one flag, ranked on validation -> sweep-FLAG.md and a picture. No test pair.
recommend  one user's top items with titles and scores, and beside them the negatives the LLM made
           for that user.

Metrics are over the full ranking of all items a user has not interacted with in train (and valid,
when testing). Equal scores rank by item id, lowest first. Users without a test pair have no metric:
they are left out and counted.

Alone:  python eval.py report --run runs/NAME
"""

import html
import json
import math
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from backbones import (
    CLOSED_FORMS,
    Parser,
    Progress,
    SystemExit2,
    UnseenSampler,
    contains,
    dns,
    fail,
    file_digest,
    hit_rate,
    json_digest,
    kernel_of,
    load_data,
    load_model,
    load_negatives,
    load_tensors,
    maker_of,
    mixgcf,
    mrr,
    ndcg,
    nearest_items,
    number,
    output_name,
    pair_keys,
    precision,
    printable,
    rank_unseen,
    ranking_hits,
    read_jsonl,
    read_meta,
    recall,
    row_of,
    run_cli,
    sized_to_data,
    user_rows,
    whiten,
    write_atomic,
)

# --------------------------------------------------------------------------------------------------
# Metrics of a model
# --------------------------------------------------------------------------------------------------

COLUMNS = ["Recall@10", "Recall@20", "NDCG@10", "NDCG@20"]  # what the tables show
METRICS = {"Recall": recall, "NDCG": ndcg, "Precision": precision, "HitRate": hit_rate, "MRR": mrr}


def evaluate(model, data, split="test", ks=(10, 20)):
    """Metrics of every user with a pair in `split`.

    Returns users (n,), {name@k: (n,) float64}, and the number of users without a pair there."""
    if not len(data[split]):
        fail(f"data.safetensors: has no {split} pair to measure by; prepare it with some")
    seen = data["train"] if split == "valid" else torch.cat([data["train"], data["valid"]])
    seen = user_rows(seen, model.n_users)
    users, hits, relevant = ranking_hits(model, data[split], seen, max(ks))
    values = {}
    for name, metric in METRICS.items():
        for k in ks:
            values[f"{name}@{k}"] = metric(hits, relevant, k)
    return users, values, model.n_users - len(users)


def list_statistics(model, data, k=20):
    """What a model recommends and to whom it is right, on the test pairs -> dict.

    Recall@k and the other metrics: per user (n,), with `users`; item_recall: Recall@k over the test
    pairs of each quarter of the items by train popularity; popularity: mean train count of a
    recommended item; coverage: share of the catalogue that is recommended to anybody; gini:
    inequality of how often items are recommended, 0 (all alike) to 1."""
    users, values, _ = evaluate(model, data, "test", (10, k))
    seen = torch.cat([data["train"], data["valid"]])
    ranked = rank_unseen(model, users, user_rows(seen, model.n_users), k)  # (n, k)
    count = torch.bincount(data["train"][:, 1], minlength=model.n_items)
    quarter = quartiles(count)
    hit = hit_pairs(ranked, users, data["test"], model.n_items)
    shown = torch.bincount(ranked[ranked >= 0], minlength=model.n_items).double().sort().values
    rank = torch.arange(1, model.n_items + 1).double()
    of_pair = quarter[data["test"][:, 1]]
    return {"users": users, **values,
            "item_recall": [float(hit[of_pair == q].double().mean()) for q in range(4)],
            "popularity": float(count[ranked[ranked >= 0]].double().mean()),
            "coverage": float((shown > 0).double().mean()),
            "gini": float((2 * rank - model.n_items - 1) @ shown / (model.n_items * shown.sum()))}


def hit_pairs(ranked, users, pairs, n_items):
    """Which pairs (N, 2) are among the ranked items (n, k) of their user? users (n,); an item of -1
    is none -> (N,) bool."""
    real = ranked >= 0
    recommended = torch.stack([users[:, None].expand_as(ranked)[real], ranked[real]], 1)
    return contains(pair_keys(recommended, n_items), *pairs.T, n_items)


UNSEEN = ("users seen", "users unseen", "items seen", "items unseen")  # in train, at test


def unseen_scores(model, data, users, values, k=20):
    """Scores apart of what train has seen and what it has not, from evaluate's users and values:
    NDCG@k of the users, Recall@k over the test pairs by their item -> {name of UNSEEN: score}; a
    group without anything in it is left out."""
    u, i = data["train"].T
    new_users, new_items = ~torch.isin(users, u), ~torch.isin(data["test"][:, 1], i)
    ndcg_of, groups = values[f"NDCG@{k}"], {}
    if new_users.any():
        groups |= {"users seen": ndcg_of[~new_users], "users unseen": ndcg_of[new_users]}
    if new_items.any():
        seen = user_rows(torch.cat([data["train"], data["valid"]]), model.n_users)
        ranked = rank_unseen(model, users, seen, k)
        hit = hit_pairs(ranked, users, data["test"], model.n_items).double()
        groups |= {"items seen": hit[~new_items], "items unseen": hit[new_items]}
    return {name: float(scores.mean()) for name, scores in groups.items() if len(scores)}


def unseen_section(data, methods):
    """Lines on the test users and items that train has not seen; methods {name: row of metrics}."""
    u, i = data["test"].T
    new_users = u[~torch.isin(u, data["train"][:, 0])]
    new_items = i[~torch.isin(i, data["train"][:, 1])]
    lines = ["", "## Users and items unseen in train", "",
             (f"{len(new_users.unique())} of {len(u.unique()):,} test users, "
              f"{len(new_items.unique())} of {len(i.unique()):,} test items ({len(new_items)} of "
              f"{len(i):,} test pairs).")]
    if not len(new_users) and not len(new_items):
        return lines
    rows = []
    for name, row in methods.items():
        scores = [f"{row[group]:.4f}" if group in row else "" for group in UNSEEN]
        rows.append([NAMES.get(name, name), *scores])
    return [*lines, "", "NDCG@20 of the users, Recall@20 over the test pairs by their item:", "",
            *markdown_table(["method", *UNSEEN], rows)]


def quartiles(count):
    """Counts (n,) -> quarter 0 (lowest) … 3 of each; equal counts may fall on both sides of a
    border, by index."""
    place = torch.empty_like(count)
    place[count.argsort(stable=True)] = torch.arange(len(count))
    return place * 4 // len(count)


def paired_bootstrap(difference, draws=10_000, seed=0):
    """Two-sided p that the mean of paired per-user differences (n,) is zero: users drawn with
    replacement (Efron, 1979; for rankings, Sakai, SIGIR 2006) -> (mean, low and high end of the
    95 % interval, p)."""
    difference = np.asarray(difference, np.float64)
    rng = np.random.default_rng(seed)
    n, means = len(difference), np.empty(draws)
    for draw in range(draws):
        means[draw] = difference[rng.integers(0, n, n)].mean()
    below = (np.sum(means <= 0) + 1) / (draws + 1)
    above = (np.sum(means >= 0) + 1) / (draws + 1)
    interval = np.quantile(means, [0.025, 0.975])
    return difference.mean(), *interval, min(1.0, 2 * min(below, above))


def spread(values):
    """mean and standard deviation over seeds (n - 1), as numbers."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0

# --------------------------------------------------------------------------------------------------
# False hard negatives: negatives that are held-out positives
# --------------------------------------------------------------------------------------------------

def fhns_rate(users, items, held_keys, n_items):
    """Share of negatives that are held-out positives of their user: users (n,), items (n, k),
    held_keys from pair_keys of valid + test pairs -> float. An item of -1 (no such item) counts in
    neither."""
    real = items >= 0
    false = contains(held_keys, users[:, None], items.clamp(min=0), n_items) & real
    return float(false.sum() / real.sum().clamp(min=1))


MOST = 2**17  # pairs or users that a rate is taken over; the standard error of one below 10 % is
              # then below 0.1 points


def some_of(n, generator=None):
    """All of n rows, or MOST of them at random, ascending -> row numbers."""
    if n <= MOST:
        return torch.arange(n)
    return torch.randperm(n, generator=generator)[:MOST].sort().values


def fhns_rates(users, items, held_keys, n_items):
    """fhns_rate of the first negative and of the first ten, best first: items (n, 10)."""
    return {"FHNS@1": fhns_rate(users, items[:, :1], held_keys, n_items),
            "FHNS@10": fhns_rate(users, items[:, :10], held_keys, n_items)}


def fhns_of_samplers(model, data, m, seed, likely=None):
    """FHNS@1 of what the samplers hand a trained model for train pairs (all, or MOST of them):
    uniform, DNS (the best of m), DNS kept clear of the items that a judge lists as a user's likely
    false hard negatives, these items themselves (likely (U, n), best first), and the item nearest
    to MixGCF's synthetic vector; FHNS@10 for the ten best of the draw where a sampler ranks."""
    # one draw of candidates for all samplers
    generator = torch.Generator().manual_seed(seed)
    u, i = data["train"][some_of(len(data["train"]), generator)].T  # (n,)
    n_items, train_keys = model.n_items, pair_keys(data["train"], model.n_items)
    held = pair_keys(torch.cat([data["valid"], data["test"]]), n_items)
    candidates = UnseenSampler(data["train"], model.n_users, n_items)(u, m, generator)  # (n, m)
    rates = {"uniform": fhns_rates(u, candidates, held, n_items)}
    with torch.no_grad():
        users, items = model()
        # DNS, in parts, since it gathers (B, m, D)
        chosen, cleared = [], []
        for a, c in zip(u.split(4096), candidates.split(4096)):
            chosen.append(dns(model.score, users[a], items, c)[:, None])
            if likely is not None:
                listed = (c[:, :, None] == likely[a][:, None]).any(2)  # (B, M)
                penalty = listed.float().masked_fill(listed, torch.inf)
                cleared.append(dns(model.score, users[a], items, c, penalty=penalty)[:, None])
        rates["DNS"] = {"FHNS@1": fhns_rate(u, torch.cat(chosen), held, n_items)}
        if likely is not None:
            rates["DNS kept clear by the judge"] = {
                "FHNS@1": fhns_rate(u, torch.cat(cleared), held, n_items)}
        # MixGCF, whose negatives are no items: by the nearest ones
        _, item_layers = model.layers()
        synthetic = []
        for a, p, c in zip(u.split(4096), i.split(4096), candidates.split(4096)):
            synthetic.append(mixgcf(users[a], item_layers, p, c, model.pool, generator))
        nearest = nearest_items(torch.cat(synthetic), u, items, train_keys, 10)
        rates["MixGCF, nearest items"] = fhns_rates(u, nearest, held, n_items)
    # what lies at the very top, by the model and by the judge
    everyone = some_of(model.n_users, generator)
    top = rank_unseen(model, everyone, user_rows(data["train"], model.n_users), 10)
    rates["the model's own top items"] = fhns_rates(everyone, top, held, n_items)
    if likely is not None:
        rates["the judge's likely items"] = fhns_rates(
            everyone, likely[everyone, :10].long(), held, n_items)
    return rates


def fhns_of_vectors(pairs, vectors, items, data, n_items):
    """FHNS of generated vectors (all, or MOST of them) through their nearest real items: pairs
    (n, 2), vectors (n, D), items (I, D)."""
    rows = some_of(len(pairs), torch.Generator().manual_seed(0))
    users, vectors = pairs[rows, 0], vectors[rows]
    held = pair_keys(torch.cat([data["valid"], data["test"]]), n_items)
    nearest = nearest_items(vectors, users, items, pair_keys(data["train"], n_items), 10)
    return fhns_rates(users, nearest, held, n_items)

# --------------------------------------------------------------------------------------------------
# Judges: how much a score of users and items knows of held-out positives that CF does not, in nats.
# Seconds, and no recommender is trained
# --------------------------------------------------------------------------------------------------

def logistic_regression(x, y, ridge=1e-3, steps=50):
    """Weights (F,) of P(y = 1) = sigmoid(x w) by Newton's method (Bishop, PRML, 2006, 4.3.3): the
    minimum of the negative log-likelihood + ridge / 2 * |w|^2.

    x (n, F), y (n,) of 0 and 1, both float64. The ridge keeps w finite where y is separable."""
    def loss(w):
        return F.softplus(x @ w).sum() - y @ (x @ w) + ridge / 2 * w @ w

    w = x.new_zeros(x.shape[1])
    for _ in range(steps):
        p = torch.sigmoid(x @ w)  # (n,)
        gradient = x.T @ (p - y) + ridge * w
        hessian = (x * (p * (1 - p))[:, None]).T @ x  # (F, F)
        hessian.diagonal().add_(ridge)
        step = torch.linalg.solve(hessian, gradient)
        while loss(w - step) > loss(w):  # a full step can overshoot, a short enough one cannot
            step = step / 2
        w = w - step
        if step.abs().max() < 1e-9:
            break
    return w


def cross_fitted(x, y, half):
    """Log-odds (n,) of each row by the logistic regression of the rows of the other half: x (n, F),
    y (n,), half (n,) bool."""
    log_odds = torch.empty_like(y)
    for part in (half, ~half):
        log_odds[part] = x[part] @ logistic_regression(x[~part], y[~part])
    return log_odds


def auc(score, label):
    """Probability that a positive scores above a negative, one half where they are equal (Mann and
    Whitney, 1947): score (n,), label (n,) bool -> float."""
    n = label.sum()
    wins = ranks(score)[label].sum() - n * (n + 1) / 2
    return float(wins / (n * (len(label) - n)))


def ranks(values):
    """Values (n,) -> their ranks (n,) float64, 1 the lowest; equal ones share their mean rank."""
    _, place, count = values.unique(return_inverse=True, return_counts=True)
    return (count.cumsum(0) - (count.double() - 1) / 2)[place]


def fit_of_features(features, label, user, n_users, seed=0):
    """How well features tell the positives among pairs, users cross-fitted in two random halves.

    features: list of (n,); label (n,) bool; user (n,) ids -> each user's log-likelihood in nats
    (U,) float64, and the AUC."""
    x = torch.stack(features, 1).double()
    x = (x - x.mean(0)) / x.std(0).clamp(min=1e-12)
    x, y = torch.cat([torch.ones_like(x[:, :1]), x], 1), label.double()
    half = torch.randperm(n_users, generator=torch.Generator().manual_seed(seed)) % 2 == 0
    log_odds = cross_fitted(x, y, half[user])
    nats = y * log_odds - F.softplus(log_odds)
    return nats.new_zeros(n_users).index_add_(0, user, nats), auc(log_odds, label)


TOP = 50  # unseen items of each user, the best of a CF model, that judges are measured on


@torch.no_grad()
def cf_candidates(model, data, labels="valid", top=TOP):
    """The pairs judges are measured on: of each user the `top` best unseen items of a CF model.

    labels: valid, or test, where what is in valid counts as seen too -> items (U, top), -1 where a
    user has fewer unseen ones; and of the others (n,), user by user: the label (bool: is in
    `labels`), the users, and what CF says of them: [score, log-odds of the score's quantile among
    all pairs', log rank, log(1 + train count)]. Without the quantile a score with long tails, such
    as RP3beta's, tells less than it knows, and each judge seems to add more than it does."""
    seen = data["train"] if labels == "valid" else torch.cat([data["train"], data["valid"]])
    everyone, top = torch.arange(model.n_users), min(top, model.n_items)
    items = rank_unseen(model, everyone, user_rows(seen, model.n_users), top)  # (U, top)
    user_vectors, item_vectors = model()
    scores = []
    for part in everyone.split(1024):
        chosen = item_vectors[items[part].clamp(min=0)]  # (B, top, D)
        scores.append(model.score(user_vectors[part][:, None], chosen))
    user, place = (items >= 0).nonzero().T
    item = items[user, place]
    label = contains(pair_keys(data[labels], model.n_items), user, item, model.n_items)
    score = torch.cat(scores)[user, place]
    quantile = torch.logit((ranks(score) - 0.5) / len(score))
    count = torch.bincount(data["train"][:, 1], minlength=model.n_items)
    cf = [score, quantile, (place + 1.0).log(), (count[item] + 1.0).log()]
    return items, label, user, cf


@torch.no_grad()
def kernel_scores(kernel, candidates, users=256):
    """Scores of a backbones.ByNumber, such as the judge's, in blocks of users: candidates (U, top)
    of cf_candidates -> (n,)."""
    (everyone, items), scores = kernel(), []
    for u, c in zip(everyone.split(users), candidates.split(users)):
        scores.append(kernel.score_all(u, items).gather(1, c.clamp(min=0)))
    return torch.cat(scores)[candidates >= 0]


def factor_scores(users, items, candidates):
    """Inner products: users (U, k), items (I, k), candidates (U, top) of cf_candidates -> (n,)."""
    scores = []
    for u, c in zip(users.split(512), candidates.split(512)):
        scores.append(torch.einsum("uk,unk->un", u, items[c.clamp(min=0)]))
    return torch.cat(scores)[candidates >= 0]


def text_judge(text, train, n_users):
    """Cosine of an item's whitened text with the sum over the user's train items, as factors: text
    (I, H), train (N, 2) -> users (U, H), items (I, H)."""
    items = whiten(text.float())
    users = items.new_zeros(n_users, items.shape[1]).index_add_(0, train[:, 0], items[train[:, 1]])
    return F.normalize(users, dim=1), items


def find_judges(run, data, parts=False):
    """Whatever in the run scores users and items: yields (name, score, and for some the ids of the
    users whose pairs count), with score(candidates (U, top) of cf_candidates) -> (n,); with
    parts=True each judge of a file without its texts too. Raises SystemExit2 for a file of another
    split or of a wrong shape."""
    for name, *factors in chain(text_judges(run, data), generated_judges(run, data)):
        yield name, partial(factor_scores, *factors)
    yield from file_judges(run, data, parts)


def item_texts(run):
    """The item texts of each set of negatives: yields (name of the set, texts (I, H) float16, are
    they bags of words?)."""
    for path in sorted(run.glob("negatives*-items.safetensors")):
        tensors, meta = load_tensors(path)
        name = path.name[: -len("-items.safetensors")]
        yield name, tensors["text"], not meta["settings"]["read_items"]


def text_judges(run, data, shuffles=3):
    """Judges by the items' texts of each set of negatives: yields (name, users (U, k), items (I,
    k)), whose inner product is the score; sets with equal texts have one, by the first one's name.
    Also by the first set's texts shuffled between items, some times over: what a judge that knows
    nothing can seem to know by chance."""
    judged = []
    for name, text, bag_of_words in item_texts(run):
        if any(torch.equal(text, other) for other in judged):
            continue
        kind = "bag of words" if bag_of_words else "texts"
        yield f"{kind} ({name})", *text_judge(text, data["train"], data["n_users"])
        judged.append(text)
    for seed in range(shuffles if judged else 0):
        generator = torch.Generator().manual_seed(seed)
        text = judged[0][torch.randperm(data["n_items"], generator=generator)]
        yield f"shuffled texts {seed}", *text_judge(text, data["train"], data["n_users"])


def generated_judges(run, data):
    """Judges by the cosine of an item's centred CF vector with the mean direction of the vectors
    generated for the user, as text_judges yields them; sets with equal vectors (such as one that
    differs in its bags of words alone) have one, by the first one's name."""
    judged = []
    for path in sorted(run.glob("negatives*-00000.safetensors")):
        name = path.name[: -len("-00000.safetensors")]
        made = load_negatives(run, name, data["digest"])
        if any(torch.equal(made["vector"], other) for other in judged):
            continue
        judged.append(made["vector"])
        vectors = F.normalize(made["vector"].float(), dim=1)
        users = vectors.new_zeros(data["n_users"], vectors.shape[1])
        users.index_add_(0, made["pairs"][:, 0], vectors)
        # the head's space is that of the centred item vectors (llm_negatives.SftTask)
        items = load_tensors(run / "cf.safetensors")[0]["item"]
        yield (f"generated vectors ({name})", F.normalize(users, dim=1),
               F.normalize(items - items.mean(0), dim=1))


def file_judges(run, data, parts=False):
    """Judges in files of their own, judge*.safetensors, as find_judges yields them: those that
    `llm_negatives.py judge` wrote, or anybody's with tensors user (U, k) and item (I, k), whose
    inner product is the score. One that was taught on layer 0 alone is a bag of words. Of one that
    some users taught nothing (`judge --untaught`), their pairs alone count."""
    for path in sorted(run.glob("judge*.safetensors")):
        tensors, meta = load_tensors(path)
        if "data.safetensors" not in meta["settings"].get("inputs", {}):
            fail(f"{path}: does not say for which split it was made; make it again, with the stamp "
                 "of data.safetensors in its settings' inputs")
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        ours = "history" in shapes
        k = shapes.get("history" if ours else "user", ("k",))[-1]
        needed = {"user": (data["n_users"], k), "item": (data["n_items"], k)}
        if ours:
            needed = {"history": (data["n_items"], k), "item": (data["n_items"], k),
                      "bias": (data["n_items"],), "shape": (2,)}
        if shapes | needed != shapes:
            fail(f"{path}: needs tensors {needed}, has {shapes}; make it again")

        # the judge as it is, and with the mean text in the place of the user's or the item's
        words = meta["settings"].get("layers") == "0"
        name = f"bag of words ({path.stem})" if words else path.stem
        some = [tensors["untaught"]] if "untaught" in tensors else []
        if ours:
            yield name, kernel_judge(tensors, data), *some
            for of, table in (("user", "history"), ("item", "item")) if parts else ():
                mean = tensors[table].float().mean(0).expand(tensors[table].shape)
                yield f"{name}, mean {of}", kernel_judge(tensors | {table: mean}, data)
        else:
            factors = tensors["user"].float(), tensors["item"].float()
            yield name, partial(factor_scores, *factors), *some
            for other, *without in without_texts(name, *factors) if parts else ():
                yield other, partial(factor_scores, *without)


def kernel_judge(tensors, data):
    """A judge's tensors -> its score, as find_judges yields it."""
    return partial(kernel_scores, kernel_of(tensors, data["train"], data["n_users"]))


def without_texts(name, users, items):
    """A judge of two tables with one of its texts taken away: yields (name, users, items), the mean
    user's vector for all users, and the mean item's for all items."""
    yield f"{name}, mean user", users.mean(0).expand_as(users), items
    # a column in which all users are alike weighs the items' bias, which is no text: it stays
    bias = (users == users[0]).all(0)
    yield f"{name}, mean item", users, torch.where(bias, items, items.mean(0))


def measure_judges(model, data, judges, labels="valid", top=TOP):
    """How much each judge adds to what a CF model trained on train alone knows of the positives of
    `labels` (valid or test) among its own `top` best unseen items of each user.

    judges: (name, score) as find_judges yields them, any iterable; a third part, ids (n,), names
    the users whose gain is summed -> dict: labels, top, pairs, positives, rows {name: {AUC, of all
    users, "over CF": gain, "over CF and bag of words": gain}}, each gain as gain_interval's; the
    bag of words is the last judge whose name begins so: the taught one where there is one. No rows
    where none of the pairs is a positive, or all are. Raises SystemExit2 when a judge's score is
    not finite."""
    candidates, label, user, cf = cf_candidates(model, data, labels, top)
    positives, rows = int(label.sum()), {}
    result = {"labels": labels, "top": top, "pairs": len(label), "positives": positives,
              "rows": rows}
    if not 0 < positives < len(label):
        return result
    # what each judge says of these pairs, and whose gain counts
    scores, counted, everyone = {}, {}, torch.arange(model.n_users)
    for name, score, *some in judges:
        scores[name] = score(candidates)
        counted[name] = some[0] if some else everyone
        if not torch.isfinite(scores[name]).all():
            fail(f"judge {name}: has scores that are not finite; make its file again")

    # what is known without a judge: CF alone, and CF with a bag of words
    whole = [name for name in scores if not name.endswith((", mean user", ", mean item"))]
    words = next((name for name in reversed(whole) if name.startswith("bag of words")), None)
    base, own_auc = fit_of_features(cf, label, user, model.n_users)
    rows["CF alone"] = {"AUC": own_auc}
    if words:
        known = [*cf, scores[words]]
        known_base, _ = fit_of_features(known, label, user, model.n_users)

    # what each adds, user by user: the log-likelihood with it minus that without
    for name, score in scores.items():
        fit, own_auc = fit_of_features([*cf, score], label, user, model.n_users)
        own, whose = int(label[torch.isin(user, counted[name])].sum()), counted[name]
        rows[name] = {"AUC": own_auc, "over CF": gain_interval((fit - base)[whose], own)}
        if words and name != words:
            fit, _ = fit_of_features([*known, score], label, user, model.n_users)
            gain = gain_interval((fit - known_base)[whose], own)
            rows[name]["over CF and bag of words"] = gain
    return result


def gain_interval(gain, positives):
    """Each user's gain in log-likelihood (U,) -> {nats, per 1000 positives}: [total, low and high
    end of its 95 % interval by bootstrap over users]."""
    total = len(gain) * np.array(paired_bootstrap(gain, draws=2000)[:3])
    return {"nats": total.tolist(), "per 1000 positives": (total * 1000 / positives).tolist()}


def judge_lines(result):
    """Lines of the table of measure_judges; `cf` of the result names the CF model."""
    lines = [f"{result['positives']:,} {result['labels']} positives among {result['pairs']:,} "
             f"pairs: the {result['top']} best unseen items of each user by {result['cf']}. "
             "Logistic regression of \"is a positive\" on CF score, its quantile, log rank, log "
             "popularity and the judge, users cross-fitted in two halves: AUC, and gain in "
             "log-likelihood (nats, and nats per 1,000 positives) with its 95 % interval by "
             "bootstrap over users. How far from 0 chance alone comes is what the shuffled texts "
             "show."]
    if not result["rows"]:
        return [f"Of {result['pairs']:,} pairs {result['positives']:,} are positives, so there is "
                "nothing to tell apart."]
    rows = []
    for name, row in result["rows"].items():
        cells = [name, f"{row['AUC']:.4f}"]
        for known in ("over CF", "over CF and bag of words"):
            for unit in ("nats", "per 1000 positives"):
                gain = row[known][unit] if known in row else None
                cells.append("{:+.1f} [{:+.1f}, {:+.1f}]".format(*gain) if gain else "")
        rows.append(cells)
    header = ["judge", "AUC", "nats over CF", "per 1,000", "nats over CF + bag of words",
              "per 1,000"]
    return [*lines, "", *markdown_table(header, rows)]


def report_judges(args):
    """Measure the run's judges on the validation pairs -> judge.json. Reads no test pair."""
    run, data = Path(args.run), load_data(args.run)
    model, _, _ = load_model(run / args.cf, data=data)
    judges = find_judges(run, data, args.parts)
    result = measure_judges(model, data, judges, "valid", args.top)
    result |= {"data": data["digest"], "cf": args.cf}
    if not result["rows"]:
        fail(f"--top {args.top}: {result['positives']} of the {result['pairs']} best unseen items "
             "are validation positives, nothing to tell apart; raise it or give another --cf")
    write_atomic(run / "judge.json", (json.dumps(result, indent=1) + "\n").encode())
    print("\n".join(judge_lines(result)))
    if not any(name.startswith("bag of words") for name in result["rows"]):
        print("\nno bag of words to compare with: make it with `python llm_negatives.py generate "
              f"--run {run} --bag-of-words --out negatives-words`")
    print(f"\nwrote {run / 'judge.json'}")


def judge_section(run, data, cf, metrics):
    """The report's lines on the run's judges, by the validation and by the test pairs; none where
    there is no judge. What is measured also goes into metrics["judges"]."""
    lines, metrics["judges"] = [], {}
    if next(find_judges(run, data), None) is None:
        return lines
    model, _, _ = load_model(run / cf, data=data)
    for labels in ("valid", "test"):
        result = measure_judges(model, data, find_judges(run, data), labels) | {"cf": cf}
        metrics["judges"][labels] = result
        title = f"## What the judges know beyond CF: {labels} pairs"
        lines += ["", title, "", *judge_lines(result)]
    return lines

# --------------------------------------------------------------------------------------------------
# Report
# --------------------------------------------------------------------------------------------------

NAMES = {"pop": "Popularity", "itemknn": "ItemKNN", "rp3": "RP3β", "ease": "EASE",
         "rns": "RNS", "pns": "PNS", "dns": "DNS", "mixgcf": "MixGCF", "ahns": "AHNS",
         "softmax": "Softmax", "alpharec": "AlphaRec", "hnlmrec": "HNLMRec",
         "hnlmrec-full": "HNLMRec in full"}


def report(args):
    """Evaluate every model-*.safetensors of the run on the test pairs; write report.md and
    metrics.json."""
    run, data = Path(args.run), load_data(args.run)
    paths = sorted(run.glob("model-*.safetensors"))
    if not paths:
        fail(f"{run}: no model-*.safetensors; train one with `python backbones.py pretrain` or "
             "`python hnlmrec.py train`")
    # in the order of NAMES, others after them
    place = {name: n for n, name in enumerate(NAMES)}
    paths.sort(key=lambda path: (place.get(path.stem[6:], len(place)), path.name))

    # every model on the test pairs
    models, rows, per_user = evaluate_models(paths, data)
    tested = len(next(iter(per_user.values())))
    skipped = data["n_users"] - tested
    metrics = {"data": data["digest"], "methods": rows, "users tested": tested,
               "users without a test pair": skipped}

    # first what a person wants to know, then the table of all models
    with_z = [name for name, (_, tensors) in models.items() if "z" in tensors]
    ours = "hnlmrec" if "hnlmrec" in with_z else next(iter(with_z), None)
    lines = [f"# Report: {markdown(run.name)}", *verdict_section(run, metrics, per_user, ours)]
    lines += example_section(run, data, *models[ours or next(iter(models))])
    lines += ["", "## All models", "",
              (f"{data['n_users']:,} users, {data['n_items']:,} items; "
               f"train {len(data['train']):,}, valid {len(data['valid']):,}, "
               f"test {len(data['test']):,} pairs. Full ranking; each model at its best validation "
               f"epoch; {tested:,} users tested, {skipped} without a test pair."), "",
              *models_table(rows)]

    lines += unseen_section(data, rows)

    # what the negatives are; the samplers' are those of a model trained without ours
    trained = [name for name, row in rows.items() if row["backbone"] not in CLOSED_FORMS]
    name = next((name for name in ("rns", "dns", *trained) if name in models), None)
    reference = models[name][0] if name else None
    projected = {}
    for name in with_z:
        z = models[name][1]
        projected[f"{NAMES.get(name, name)}, projected z"] = z["z_pairs"], z["z"], z["item"]
    lines += fhns_section(run, data, reference, metrics, args.m, projected)

    # what the judges know, what fine-tuning learned
    lines += judge_section(run, data, args.cf, metrics)
    if (run / "sft.safetensors").exists():
        metrics["sft"] = read_meta(run / "sft.safetensors")["log"]
        lines += finetuning_section(metrics["sft"])
    write_atomic(run / "report.md", ("\n".join(lines) + "\n").encode())
    write_atomic(run / "metrics.json", (json.dumps(metrics, indent=1) + "\n").encode())
    print("\n".join(lines))
    print(f"\nwrote {run / 'report.md'} and {run / 'metrics.json'}")


def evaluate_models(paths, data):
    """Every model on the test pairs, by the name in its file's -> {name: (model, tensors)},
    {name: row of metrics, means over users}, {name: NDCG@20 of the users tested (n,)}."""
    models, rows, per_user = {}, {}, {}
    for path in paths:
        name = path.stem[6:]  # model-NAME
        model, meta, tensors = load_model(path, data=data)
        users, values, _ = evaluate(model, data)
        best = best_epoch(meta)
        row = {metric: float(value.mean()) for metric, value in values.items()}
        row |= {"valid NDCG@20": best["valid_ndcg@20"], "best epoch": best["epoch"],
                "seconds": meta["seconds"], "backbone": meta["settings"]["backbone"],
                "seed": meta["settings"]["seed"]}
        if not all(math.isfinite(row[column]) for column in COLUMNS):
            fail(f"{path}: its metrics are not finite; train it again with --force")
        rows[name] = row | unseen_scores(model, data, users, values)
        models[name] = (model, tensors)
        per_user[name] = values["NDCG@20"].numpy()
    return models, rows, per_user


def models_table(methods):
    """Lines of the report's table of all models: {name: row of evaluate_models}."""
    rows = []
    for name, row in methods.items():
        scores = [f"{row[column]:.4f}" for column in (*COLUMNS, "valid NDCG@20")]
        rows.append([NAMES.get(name, name), row["backbone"], *scores, row["best epoch"],
                     f"{row['seconds']:.0f}"])
    header = ["method", "backbone", *COLUMNS, "valid NDCG@20", "best epoch", "seconds"]
    return markdown_table(header, rows)


def finetuning_section(log):
    """The report's lines on the log of `llm_negatives.py finetune`."""
    steps = log["steps"][-10:]
    lines = ["", "## Fine-tuning", "",
             (f"Loss at chance {log['chance_loss']:.3f}, last steps "
              f"{sum(steps) / max(1, len(steps)):.3f}. How often the item nearest to the generated "
              "vector is a mined hard negative, on held-back train pairs; floors: uniform "
              f"{log['uniform_floor']:.3f}, the best single item for everybody "
              f"{log['popularity_floor']:.3f}."), ""]
    sets = sorted(set().union(*log["hit_rates"].values()))
    rows = []
    for name, rates in log["hit_rates"].items():
        rows.append([name, *(f"{rates[s]:.3f}" if s in rates else "" for s in sets)])
    return [*lines, *markdown_table(["", *sets], rows)]


def verdict_section(run, metrics, per_user, ours):
    """The report's opening: is `ours` above the best baseline, by how much, and report.svg, every
    model's difference from that baseline. per_user {model: NDCG@20 of the users tested (n,)}; ours:
    None when the run has no model with the LLM's negatives. What is found goes into metrics too."""
    valid = {name: row["valid NDCG@20"] for name, row in metrics["methods"].items()}
    baselines = [name for name in per_user if name != ours and not name.startswith("hnlmrec")]
    if not baselines or len(per_user) < 2:
        return ["", "There is nothing to compare here yet. A baseline: `python backbones.py "
                f"pretrain --run {run} --sampler dns --out model-dns.safetensors`."]
    best = max(baselines, key=valid.get)  # the rival is named by validation, as every choice is
    others = [name for name in per_user if name != best]

    # every model against it, and the picture
    rival, metrics["tests"], tests = NAMES.get(best, best), {}, {}
    for name in others:
        tests[name] = mean, low, high, p = paired_bootstrap(per_user[name] - per_user[best])
        metrics["tests"][name] = {"against": best, "mean": float(mean), "low": float(low),
                                  "high": float(high), "p": float(p)}
    means, lows, highs, _ = zip(*(tests[name] for name in others))
    write_atomic(run / "report.svg", svg_chart(
        f"test NDCG@20 minus that of {rival}, 95 % intervals", [NAMES.get(n, n) for n in others],
        means, lows, highs, reference=0.0).encode())

    # ours in words
    lines = []
    for name in dict.fromkeys((ours, "hnlmrec-full")):
        if name not in tests:
            continue
        mean, low, high, p = tests[name]
        level = per_user[best].mean()
        word = "beats" if low > 0 else "falls behind" if high < 0 else "is level with"
        lines += ["", f"**{NAMES.get(name, name)} {word} {rival}**, the best baseline on "
                  f"validation: NDCG@20 on the test pairs is {per_user[name].mean():.4f} against "
                  f"{level:.4f}, a difference of {mean:+.4f} ({mean / max(level, 1e-12):+.1%}), "
                  f"95 % interval [{low:+.4f}, {high:+.4f}], "
                  f"p {'< 0.001' if p < 0.001 else f'{p:.3f}'} (paired bootstrap over users)."]
    lines += ["", "NDCG@20 is 1 when a user's held-out items head the list of twenty and 0 when "
              "none is in it. One seed of training: how far another would move these numbers, "
              f"`python eval.py compare --run {run} --seeds 5` measures.", "",
              f"![NDCG@20 minus that of {markdown(rival)}](report.svg)"]
    return lines


def example_section(run, data, model, tensors, k=5):
    """What the first user with a test pair gets: k titles liked, recommended, and held against the
    user as negatives by the LLM (the real items nearest to the projected z)."""
    items = read_jsonl(run / "items.jsonl")
    users = read_jsonl(run / "users.jsonl")
    user = int(data["test"][:, 0].min())
    held = set(data["test"][data["test"][:, 0] == user, 1].tolist())

    def titles(ids):
        note = " (**a held-out positive**)"
        return "; ".join(markdown(items[i]["title"]) + note * (i in held) for i in ids)

    liked = data["train"][data["train"][:, 0] == user, 1].tolist()
    seen = user_rows(torch.cat([data["train"], data["valid"]]), data["n_users"])
    best = rank_unseen(model, torch.tensor([user]), seen, min(k, len(items)))[0]
    lines = ["", f"## An example: user {markdown(users[user]['raw'])}", "",
             f"- liked ({min(k, len(liked))} of {len(liked)}): {titles(liked[:k])}",
             f"- recommended: {titles(best[best >= 0].tolist())}"]
    if "z" in tensors:
        mine = (tensors["z_pairs"][:, 0] == user).nonzero()[:, 0]
        near = nearest_items(tensors["z"][mine], tensors["z_pairs"][mine, 0], tensors["item"],
                             pair_keys(data["train"], data["n_items"]), min(k, len(items)))
        by_rank = dict.fromkeys(near.T[near.T >= 0].tolist())  # the nearest of each vector first
        lines.append(f"- negatives from the LLM: {titles(list(by_rank)[:k])}")
    return lines


def fhns_section(run, data, model, result, m=8, projected=None):
    """Lines of the table of false hard negatives: what the samplers hand `model` (None: no such
    rows), every set of generated negatives of the run, and projected {name: (pairs, vectors,
    items)}. Also put into result["fhns"]. No lines when there is none of them."""
    # the samplers
    likely = None
    if (run / "judge.safetensors").exists():
        likely = load_tensors(run / "judge.safetensors")[0]["likely"]
    fhns = fhns_of_samplers(model, data, m, 0, likely) if model else {}

    # what the LLM generated, and what a projector made of it
    paths = sorted(run.glob("negatives*-00000.safetensors"))
    items = load_tensors(run / "cf.safetensors")[0]["item"] if paths else None
    for path in paths:
        name = path.name[: -len("-00000.safetensors")]
        made = load_negatives(run, name, data["digest"])
        # the head's space is that of the centred item vectors (llm_negatives.SftTask)
        fhns[f"HNLMRec, generated ({name})"] = fhns_of_vectors(
            made["pairs"], made["vector"], items - items.mean(0), data, data["n_items"])
    for name, (pairs, vectors, trained) in (projected or {}).items():
        fhns[name] = fhns_of_vectors(pairs, vectors, trained, data, data["n_items"])
    result["fhns"] = fhns
    if not fhns:
        return []

    # the table
    columns, rows = ("FHNS@1", "FHNS@10"), []
    for name, row in fhns.items():
        rows.append([name, *(f"{row[c]:.2%}" if c in row else "" for c in columns)])
    return ["", "## False hard negatives", "",
            ("Share of negatives that are held-out (valid or test) positives of their user; for a "
             "vector, its nearest real items that the user has no train pair with. "
             f"Over {MOST:,} pairs or users at most."), "",
            *markdown_table(["negatives", *columns], rows)]


def best_epoch(meta):
    """The row of a model's history with the best validation: that of the state in its file."""
    return max(meta["history"], key=lambda row: row["valid_ndcg@20"])

# --------------------------------------------------------------------------------------------------
# Compare: methods x backbones x seeds on one split. A cell is one command, echoed, that trains one
# model
# --------------------------------------------------------------------------------------------------

# closed forms have a backbone of their own, and no seed
CLOSED = {"Popularity": "pop", "ItemKNN": "itemknn", "RP3β": "rp3", "EASE": "ease"}
BASELINES = {**dict.fromkeys(CLOSED, ""), "Softmax": "--loss softmax --cosine",
             "RNS": "--sampler rns", "PNS": "--sampler pns", "DNS": "--sampler dns",
             "DNS(M,N)": "--sampler dns --m 24 --n 2",
             "MixGCF": "--sampler mixgcf", "AHNS": "--sampler ahns",
             # 2 layers and tau .15 as its authors have them
             "AlphaRec": "--text-vectors judge.safetensors --loss softmax --cosine --layers 2 "
                         "--tau 0.15"}
OURS = {
    "HNLMRec": "", "HNLMRec, cleared negatives": "--clear 0.3",
    # the values of --paper once more, or those of --hnlmrec-flags, tuned for ours, would win
    "HNLMRec, as in the paper": "--paper --lr 1e-3 --reg 1e-4 --sampler rns --clear 0 --alpha 1e-4 "
                                "--lambda1 1e-3 --tau-c 0.2 --lambda-s 0 --text-init 0",
}
ABLATIONS = {
    "random vectors": "--control random", "vectors shuffled between pairs": "--control shuffled",
    "cleared by shuffled texts": "--clear 0.3 --control cleared",
    "no semantic alignment": "--lambda-s 0", "random initial vectors": "--text-init 0",
    "no generated negative": "--alpha 0 --lambda1 0",
    "no self-attention": "--no-attention", "no alignment of z": "--lambda1 0",
}
# nothing of the LLM but the likely false hard negatives of a judge, on a plain backbone: name ->
# the judge's file, and the flags of llm_negatives.py that make it
ALONE = ("--negatives none --alpha 0 --lambda1 0 --lambda-s 0 --text-init 0 --clear 0 "
         "--lambda-f 1 --judge ")
JUDGED = {
    "judged negatives alone": ("judge.safetensors", ""),
    "judged by a bag of words": ("judge-words.safetensors", "--layers 0"),
    "judged by shuffled texts": ("judge-shuffled.safetensors", "--control shuffled"),
    "judged by an LLM of random weights": ("judge-random.safetensors", "--control random"),
}
# several in one score (`hnlmrec.py blend`): name -> the trained row, the judge's file, and the
# baselines beside them. The last three are what run.sh ends with, and the same less its parts
BESIDE = ("RP3β", "EASE")
EVERY = ("ItemKNN", "RP3β", "EASE", "RNS", "DNS", "MixGCF")
FULL = {
    "HNLMRec in full": ("judged negatives alone", "judge.safetensors", BESIDE),
    "in full, without the generated negatives": ("DNS", "judge.safetensors", BESIDE),
    "in full, without the judge in the score": ("judged negatives alone", "none", BESIDE),
    "in full, without the closed forms": ("judged negatives alone", "judge.safetensors", ()),
    "in full, by a bag of words": (
        "judged by a bag of words", "judge-words.safetensors", BESIDE),
    "DNS and closed forms": ("DNS", "none", BESIDE),
    "judge and closed forms": ("none", "judge.safetensors", BESIDE),
    "judge alone": ("none", "judge.safetensors", ()),
    "HNLMRec, judge and all baselines": ("HNLMRec", "judge.safetensors", EVERY),
    "HNLMRec and all baselines": ("HNLMRec", "none", EVERY),
    "all baselines in one score": ("none", "none", EVERY),
}
# name -> the negatives it trains with, and the steps of llm_negatives.py that make them, minutes
# each
LLM_ABLATIONS = {
    "LLM not fine-tuned": (
        "negatives-zeroshot", ["generate --no-finetune --out negatives-zeroshot"]),
    "item texts as bags of words": (
        "negatives-words", ["generate --bag-of-words --out negatives-words"]),
    "no CF tokens in the prompt": (
        "negatives-nocf", ["finetune --soft-tokens 0 --name sft-nocf",
                           "generate --sft sft-nocf --out negatives-nocf"]),
    "template profiles": (
        "negatives-template", ["profile --profiles template --out profiles-template.jsonl",
                               "finetune --profiles profiles-template.jsonl --name sft-template",
                               "generate --sft sft-template --out negatives-template"]),
    "targets mined by MixGCF": (
        "negatives-mixgcf", ["finetune --mine mixgcf --name sft-mixgcf",
                             "generate --sft sft-mixgcf --out negatives-mixgcf"]),
}
LLM_FLAGS = ("tau-s", "lora-rank")  # a sweep over one of these fine-tunes anew for each value


def compare(args):
    """Train all cells that are not there yet, evaluate them on the test pairs, write compare.md,
    compare.json and pictures."""
    run, data, seeds = Path(args.run), load_data(args.run), range(args.seeds)
    report_name(run, args.out, "compare")

    # the rows; a flag that a row has already must not come again with --flags
    flags = words_of("--flags", args.flags, CELL_FLAGS)
    every = flags_of_methods(args)
    plan = planned_rows(args, wanted_methods(args.methods, every))
    for name, _ in plan:
        words_of("--flags", args.flags, every[name])
    tuned = read_tuned(run / args.tuned, data["digest"]) if args.tuned else None

    def cell_of(name, backbone, seed):
        """The training behind a row, as make_cells takes it."""
        words = tuned_words(tuned, name, backbone, every[name]) if tuned else every[name]
        script = "backbones.py" if name in BASELINES else "hnlmrec.py"
        own = (CLOSED[name], 0) if name in CLOSED else (backbone, seed)  # one for all of them
        return (script, name, (*flags, *words), *own)

    # train what is not there, and evaluate all of it
    make_inputs(run, args, plan)
    paths = train_rows(run, plan, seeds, cell_of, args.jobs, args.force)
    table = evaluate_rows(paths, data)
    result = {"data": data["digest"], "seeds": list(seeds), "tests": {}, "cells": {}}
    for key, cell in table.items():
        result["cells"][" | ".join(key)] = means_of_cell(cell)

    # a section and a picture for each backbone
    lines = [f"# Comparison: {markdown(run.name)}", "",
             (f"{data['n_users']:,} users, {data['n_items']:,} items, train "
              f"{len(data['train']):,} pairs; one split, one set of generated negatives; "
              f"{len(seeds)} seeds of training; mean ± sd over seeds. Each model at its best "
              "validation epoch.")]
    if tuned:
        trials = set()
        for of_backbone in tuned.values():
            trials |= {row["trials"] for name, row in of_backbone.items() if SPACES.get(name)}
        low, high = min(trials, default=1), max(trials, default=1)
        span = f"{low}" if low == high else f"{low} to {high}"
        lines += ["", f"Flags by {span} trials a method on validation ({args.tuned})."]
    for backbone in dict.fromkeys(backbone for _, backbone in plan):
        part = {name: cell for (name, other), cell in table.items() if other == backbone}
        lines += backbone_section(run, args.out, backbone, part, data, result["tests"])
    # the samplers' false hard negatives, by the first model that is trained
    trained = next((path for (name, *_), path in paths.items() if name not in CLOSED), None)
    reference = load_model(trained, data=data)[0] if trained else None
    lines += fhns_section(run, data, reference, result)

    # write
    write_atomic(run / f"{args.out}.md", ("\n".join(lines) + "\n").encode())
    write_atomic(run / f"{args.out}.json", (json.dumps(result, indent=1) + "\n").encode())
    print("\n".join(lines))
    print(f"\nwrote {run / args.out}.md and {args.out}.json")


def flags_of_methods(args):
    """{method: the words of its flags}, of every row there is."""
    baseline_flags = words_of("--baseline-flags", args.baseline_flags, CELL_FLAGS)
    hnlmrec_flags = words_of("--hnlmrec-flags", args.hnlmrec_flags, CELL_FLAGS)
    every = {name: words.split() + baseline_flags for name, words in BASELINES.items()}
    ours = OURS | ABLATIONS
    ours |= {name: f"--negatives {shards}" for name, (shards, _) in LLM_ABLATIONS.items()}
    ours |= {name: ALONE + judge for name, (judge, _) in JUDGED.items()}
    every |= {name: hnlmrec_flags + words.split() for name, words in ours.items()}
    return every | {name: [] for name in FULL}  # what they blend has flags


def wanted_methods(text, every):
    """--methods -> the names in it; "MixGCF --lr 2e-3" is a method with flags of its own, which
    `every`, of flags_of_methods, then holds too. Raises SystemExit2 for a name that is none."""
    wanted, methods = [*BASELINES, *OURS], []
    if text:
        wanted = text.split(";")
    for entry in wanted:
        name, *words = entry.strip().partition(" --")
        if name not in every:
            fail(f"--methods {name}: no such method; choose from {'; '.join(every)}")
        if name in methods:
            fail(f"--methods: {name} is there twice, and a method is one row; compare the second "
                 "one's flags in another --out")
        every[name] += words_of(f"--methods {name}", "".join(words), CELL_FLAGS)
        methods.append(name)
        if name in FULL and "".join(words):
            fail(f"--methods {name}: has no flags of its own; give them to the rows that it blends")
    return methods


def planned_rows(args, methods):
    """The rows (method, backbone), each once: the methods on all backbones, ablations on the
    first."""
    backbones, rows, ablations = args.backbones.split(","), [], []
    for backbone in backbones:
        rows += [(name, backbone) for name in methods]
    if args.ablations or args.llm_ablations:
        ablations += ABLATIONS
    if args.llm_ablations:
        ablations += LLM_ABLATIONS
    return list(dict.fromkeys([*rows, *((name, backbones[0]) for name in ablations)]))


def make_inputs(run, args, plan):
    """Make what the trainings of the rows read and the run lacks, judges and variants of the
    negatives, one after the other, each on all cores."""
    judges = {JUDGED[name][0] for name, _ in plan if name in JUDGED}
    judges |= {FULL[name][1] for name, _ in plan if name in FULL}
    judges |= {"judge.safetensors" for name, _ in plan if name == "AlphaRec"}
    for judge, words in JUDGED.values():
        if judge in judges and not (run / judge).exists():
            program("llm_negatives.py", "judge", "--run", run, "--llm", args.llm, *words.split(),
                    "--out", judge)
    for name, _ in plan:
        if name in LLM_ABLATIONS:
            make_negatives(run, *LLM_ABLATIONS[name], args.llm, args.pairs_per_user, args.force)


def train_rows(run, plan, seeds, cell_of, jobs, force):
    """The models of all rows -> {(method, backbone, seed): path}. cell_of(method, backbone, seed):
    a training as make_cells takes it; equal ones are one cell."""
    # the trainings of the rows themselves, and of what the rows of FULL blend
    cells, parts = {}, {}
    for name, backbone in plan:
        for seed in seeds:
            if name in FULL:
                trained, _, beside = FULL[name]
                names = [trained, *beside] if trained != "none" else beside
                parts[name, backbone, seed] = [cell_of(part, backbone, seed) for part in names]
            else:
                cells[name, backbone, seed] = cell_of(name, backbone, seed)
    unique = dict.fromkeys(cells.values())
    for of_row in parts.values():
        unique |= dict.fromkeys(of_row)
    models = dict(zip(unique, make_cells(run, list(unique), jobs, force)))

    # the blends of these; of closed forms alone, one serves all seeds
    for (name, backbone, seed), of_row in parts.items():
        trained, judge, _ = FULL[name]
        files = [str(models[part].relative_to(run)) for part in of_row]
        model, beside = ("none", files) if trained == "none" else (files[0], files[1:])
        words = ("--model", model, "--judge", judge, "--beside", ",".join(beside))
        own = (backbone, seed if any(part[3] == backbone for part in of_row) else 0)
        cells[name, backbone, seed] = ("hnlmrec.py", name, words, *own)
    unique = [cell for cell in dict.fromkeys(cells.values()) if cell not in models]
    models |= dict(zip(unique, make_cells(run, unique, jobs, force)))

    # in the order of the plan
    paths = {}
    for name, backbone in plan:
        for seed in seeds:
            paths[name, backbone, seed] = models[cells[name, backbone, seed]]
    return paths


def evaluate_rows(paths, data):
    """Test metrics of every model of train_rows -> {(method, backbone): {column: array, seeds the
    first axis}}: metrics (S, n) by user, item_recall (S, 4), the others (S,). A file that serves
    several rows is evaluated once."""
    rows, statistics, progress = {}, {}, Progress("evaluate", len(paths), "cells")
    for n, ((name, backbone, _), path) in enumerate(paths.items(), 1):
        if path not in statistics:
            model, meta, _ = load_model(path, data=data)
            statistics[path] = list_statistics(model, data, 20)
            best = best_epoch(meta)["valid_ndcg@20"]
            statistics[path] |= {"valid": best, "seconds": meta["seconds"]}
        rows.setdefault((name, backbone), []).append(statistics[path])
        progress.update(n)
    return {key: stacked(over_seeds) for key, over_seeds in rows.items()}


LIST_COLUMNS = ["valid", "seconds", "item_recall", "popularity", "coverage", "gini"]


def stacked(cells):
    """Cells of equal columns -> {column: array with the cells as the first axis}."""
    table = {}
    for column in cells[0]:
        table[column] = np.array([np.asarray(cell[column]) for cell in cells])
    return table


def means_of_cell(cell):
    """{column: array over seeds} -> what compare.json keeps of it, metrics as means over users."""
    kept = {}
    for column, values in cell.items():
        if column in (*COLUMNS, *LIST_COLUMNS):
            kept[column] = (values.mean(1) if column in COLUMNS else values).tolist()
    return kept


def backbone_section(run, out, backbone, table, data, tests):
    """Lines of one backbone's part of the comparison, and its picture. table {method: {column:
    array over seeds}}; what the paired tests find is also put into `tests`."""
    # the rival is named by validation, as every choice is
    valid = {name: cell["valid"].mean() for name, cell in table.items()}
    baselines = [name for name in table if name in BASELINES]
    best = max(baselines, key=valid.get, default=next(iter(table)))

    def against(name, other):
        """[mean, interval, p] of per-user NDCG@20 (each user's mean over seeds), and the difference
        seed by seed."""
        difference = table[name]["NDCG@20"] - table[other]["NDCG@20"]  # (S, n)
        return (*paired_bootstrap(difference.mean(0)), difference.mean(1).tolist())

    # a row of each of the two tables for every method
    main, bias = [], []
    quarter = torch.bincount(data["train"][:, 0], minlength=data["n_users"])
    quarter = quartiles(quarter).numpy()
    for name, cell in table.items():
        mean, low, high, p, by_seed = against(name, best)
        tests[f"{name} | {backbone}"] = {"against": best, "mean": mean, "low": low, "high": high,
                                         "p": p, "by seed": by_seed}
        verdict = (f"{mean:+.4f} [{low:+.4f}, {high:+.4f}], p {p:.3f}, "
                   f"{sum(d > 0 for d in by_seed)}/{len(by_seed)} seeds")
        scores = ["{:.4f} ± {:.4f}".format(*spread(cell[column].mean(1))) for column in COLUMNS]
        main.append([name, *scores, f"{valid[name]:.4f}", "" if name == best else verdict,
                     f"{cell['seconds'].mean():.0f}"])
        # sparse users, unpopular items
        of_user = quarter[cell["users"][0]]
        groups = [cell["NDCG@20"][:, of_user == q].mean() for q in range(4)]
        groups = [f"{value:.4f}" for value in (*groups, *cell["item_recall"].mean(0))]
        bias.append([name, *groups, f"{cell['popularity'].mean():.0f}",
                     f"{cell['coverage'].mean():.1%}", f"{cell['gini'].mean():.3f}"])

    # the picture
    seeds = len(table[best]["valid"])
    spreads = {name: spread(cell["NDCG@20"].mean(1)) for name, cell in table.items()}
    write_atomic(run / f"{out}-{backbone}.svg", chart_of_spreads(
        f"test NDCG@20, {backbone}: mean and sd over {seeds} seeds; dashed: {best}", list(table),
        list(spreads.values()), spreads[best][0]).encode())

    # the text around them
    header = ["method", *COLUMNS, "valid NDCG@20", f"against {best}", "s"]
    lines = ["", f"## {backbone}", "",
             (f"NDCG@20 against {best}, the best baseline on validation: mean difference, 95 % "
              "interval and p by paired bootstrap over users (each user's mean over seeds); seeds "
              "in which it is above."), "",
             *markdown_table(header, main), "", f"![test NDCG@20]({out}-{backbone}.svg)"]
    # ours against every row, since the best baseline is not the only one that matters
    ours = next((name for name in ("HNLMRec in full", "HNLMRec") if name in table), None)
    if ours:
        rows = []
        for name in table:
            if name != ours:
                mean, low, high, p, _ = against(ours, name)
                rows.append([name, f"{mean:+.4f} [{low:+.4f}, {high:+.4f}]", f"{p:.3f}"])
        lines += ["", f"{ours} minus each other row, NDCG@20:", "",
                  *markdown_table(["row", "difference", "p"], rows)]
    header = ["method", "Q1", "Q2", "Q3", "Q4", "I1", "I2", "I3", "I4", "popularity", "coverage",
              "Gini"]
    return [*lines, "", f"### Sparse users, unpopular items, popularity bias ({backbone})", "",
            ("NDCG@20 of users by quarter of their train count (Q1 fewest); Recall@20 of test "
             "pairs by quarter of their item's train popularity (I1 least popular); mean train "
             "count of a recommended item, share of the catalogue recommended, Gini index; means "
             "over seeds."), "", *markdown_table(header, bias)]


def sweep(args):
    """Train HNLMRec (or the baseline of --method) with each value of one flag, and rank the values
    on validation. Reads no test pair."""
    run, flag, values = Path(args.run), args.flag.replace("_", "-"), args.values.split(",")
    out = args.out or f"sweep-{flag}"
    report_name(run, out, "sweep")

    # flags of all cells; the one that is swept is none of them
    taken = CELL_FLAGS + words_of("--flag", f"--{flag}", CELL_FLAGS)
    if flag in LLM_FLAGS:
        taken.append("--negatives")
    more = words_of("--flags", args.flags, taken) + words_of("--method", args.method, taken)

    # the cells, and the negatives that those of fine-tuning's flags train with
    script, cells = "backbones.py" if args.method else "hnlmrec.py", []
    for value in values:
        words = [f"--{flag}", value]
        if flag in LLM_FLAGS:
            words, sft = ["--negatives", f"negatives-{flag}-{value}"], f"sft-{flag}-{value}"
            steps = [f"finetune --{flag} {value} --name {sft}",
                     f"generate --sft {sft} --out {words[1]}"]
            make_negatives(run, words[1], steps, args.llm, args.pairs_per_user, args.force)
        words = [*more, *words]
        for seed in range(args.seeds):
            cells.append((script, f"sweep {flag} {value}", words, args.backbone, seed))

    # each one's best validation
    paths = make_cells(run, cells, args.jobs, args.force)
    best = [best_epoch(read_meta(path, check=True))["valid_ndcg@20"] for path in paths]

    # the table and the picture: mean and sd over the seeds of each value
    charts = [spread(best[at:at + args.seeds]) for at in range(0, len(best), args.seeds)]
    rows = [[value, "{:.4f} ± {:.4f}".format(*chart)] for value, chart in zip(values, charts)]
    table = markdown_table([flag, f"valid NDCG@20, {args.seeds} seeds"], rows)
    lines = [f"# Sweep: {flag}", "", *table, "", f"![{flag}]({out}.svg)"]
    write_atomic(run / f"{out}.svg", chart_of_spreads(
        f"valid NDCG@20 by {flag}: mean and sd over {args.seeds} seeds", values, charts).encode())
    write_atomic(run / f"{out}.md", ("\n".join(lines) + "\n").encode())
    print("\n".join(lines))
    print(f"wrote {run / out}.md")


def program(script, *words):
    """Run one of our scripts as a command of its own. Raises SystemExit2 with its own last line
    when it fails."""
    command = [sys.executable, str(Path(__file__).with_name(script)), *map(str, words)]
    # one write: threads may print at once
    print("$ " + " ".join([script, *map(str, words)]) + "\n", end="", flush=True)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        message = (done.stderr.strip() or "no message").splitlines()[-1]
        fail(f"{script} {' '.join(map(str, words[:3]))} …: {message}")


CELL_FLAGS = ["--run", "--backbone", "--seed", "--out", "--force"]  # what a cell sets itself


def words_of(flag, text, taken):
    """The words of a string of further flags. Raises SystemExit2 where it has one that is `taken`:
    it would be lost in silence."""
    words = text.split()
    for word in words:
        if word.startswith("--") and word.split("=")[0] in taken:
            fail(f"{flag}: {word} is set for each cell by itself; leave it out")
    return words


def report_name(run, out, command):
    """Raise SystemExit2 unless `out` may be the first part of the names of what `command` writes
    (compare or sweep)."""
    output_name("--out", out, f"eval.py {command}")
    start, old = {"compare": "# Comparison: ", "sweep": "# Sweep: "}[command], run / f"{out}.md"
    if old.exists():
        ours = old.read_text(encoding="utf-8").startswith(start)
    else:
        ours = not (run / f"{out}.json").exists()
    if not ours:
        fail(f"--out {out}: {old} is there and not by `{command}`; choose another name")


def make_negatives(run, name, steps, llm, pairs_per_user, force=False):
    """Fine-tune and generate a variant's negatives, unless they are there: their items file is
    written last."""
    items = run / f"{name}-items.safetensors"
    if items.exists() and not force:
        maker = f"python eval.py compare --run {run} …"
        made = read_meta(items, maker, check=True)["settings"]["pairs_per_user"]
        if made != pairs_per_user:
            fail(f"{items}: made with --pairs-per-user {made}, now {pairs_per_user}; "
                 f"give that, or run `{maker} --force`")
        return
    for step in steps:
        more = ["--pairs-per-user", pairs_per_user] if step.startswith("generate") else []
        program("llm_negatives.py", *step.split(), "--run", run, "--llm", llm, *more,
                *["--force"] * force)


def make_cell(run, force, script, name, words, backbone, seed):
    """Train one cell, by backbones.py or hnlmrec.py, unless its file is there -> the path of the
    model. Raises SystemExit2 where it was made from other files than those of the run."""
    slug = [re.sub(r"[^a-z0-9]+", "-", part.lower()).strip("-") for part in (name, backbone)]
    # other flags are another cell
    out = Path("compare") / f"{'-'.join(slug)}-seed{seed}-{json_digest(words)[:6]}.safetensors"
    if (run / out).exists() and not force:
        read_meta(run / out, check=True)
    else:
        command = ["train", "--backbone", backbone, "--seed", seed]
        if script == "backbones.py":
            command[0] = "pretrain"
        elif name in FULL:
            command = ["blend"]
        program(script, *command, "--run", run, *words, "--out", out, *["--force"] * force)
    return run / out


def make_cells(run, cells, jobs, force=False):
    """Cells (script, name, words, backbone, seed), `jobs` at a time, each a process of its own ->
    the paths of their models."""
    def one(cell):
        return make_cell(run, force, *cell)

    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(one, cells))

# --------------------------------------------------------------------------------------------------
# Tune: the same number of trials for every method, on validation: random search (Bergstra and
# Bengio, JMLR 2012) and steps from the best so far, in turn. Reads no test pair
# --------------------------------------------------------------------------------------------------

TRAINED = {"lr": ("log", 3e-4, 1e-2), "reg": ("log", 1e-6, 1e-1)}
M = [0.25, 0.5, 1, 2, 4, 8]  # times the M that follows the catalogue's size
# method -> {flag: the values to choose from, or (scale, low, high)}. --dim is the same for all: 64
SPACES = {
    "Popularity": {},
    "ItemKNN": {"shrink": ("log", 0.1, 1000), "topk": [0, 10, 20, 50, 100, 200]},
    "RP3β": {"rp3-alpha": ("linear", 0, 1), "rp3-beta": ("linear", 0, 1),
             "topk": [0, 50, 100, 200]},
    "EASE": {"ridge": ("log", 10, 3000)},
    "RNS": TRAINED,
    "PNS": TRAINED | {"beta": ("linear", 0, 1)},
    "DNS": TRAINED | {"m": M},
    "DNS(M,N)": TRAINED | {"m": [1, 2, 4, 8], "n": [2, 3, 4, 8]},
    "MixGCF": TRAINED | {"m": M},
    "AHNS": TRAINED | {"m": M},
    "Softmax": TRAINED | {"tau": ("log", 0.05, 1), "shared": [64, 256, 1024]},
    "AlphaRec": TRAINED | {"tau": ("log", 0.05, 1), "shared": [64, 256, 1024]},
    "HNLMRec": TRAINED | {
        "m": M, "text-init": [0, 1], "lambda-s": [0, 0.01], "clear": [0, 0.3], "alpha": [0, 0.02],
        "lambda-f": [0, 0.3, 1], "gamma": [0.1, 0.2, 0.5]},
    "judged negatives alone": TRAINED | {
        "m": M, "lambda-f": [0.1, 0.3, 1, 3], "gamma": [0.05, 0.1, 0.2, 0.5]},
    "HNLMRec, as in the paper": TRAINED | {
        "alpha": ("log", 1e-4, 0.3), "lambda1": ("log", 1e-4, 1), "tau-c": ("log", 0.05, 1)},
}
# a method's trials 1, 2 …, before the searched ones: HNLMRec without any of its parts, that is DNS;
# with the judge's likely false negatives alone; with the texts as initial vectors alone
OFF = "--alpha 0 --lambda1 0 --lambda-s 0 --clear 0 "
FIRST = {"HNLMRec": [OFF + "--text-init 0 --lambda-f 0", OFF + "--text-init 0 --lambda-f 1",
                     OFF + "--text-init 1 --lambda-f 0"]}


def as_word(flag, value, m):
    """A value of SPACES as a command's word, numbers with three digits. m: the M that follows the
    catalogue's size."""
    if flag == "m":
        value = max(1, round(value * m))
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def draw(space, rng, m):
    """One random point of a space of SPACES, as words of a command."""
    words = []
    for flag, values in space.items():
        if isinstance(values, list):
            value = values[rng.integers(len(values))]
        elif values[0] == "log":
            value = math.exp(rng.uniform(math.log(values[1]), math.log(values[2])))
        else:
            value = rng.uniform(values[1], values[2])
        words += [f"--{flag}", as_word(flag, value, m)]
    return words


def near(words, space, rng, m):
    """The point `words` with one flag of its space moved: to a neighbour in a list, by a normal
    step of a sixth of its range on a scale. A flag that has its default is drawn at random."""
    flag = list(space)[rng.integers(len(space))]
    values, drawn = space[flag], draw({flag: space[flag]}, rng, m)
    if f"--{flag}" not in words:
        return [*words, *drawn]
    at = words.index(f"--{flag}") + 1
    moved = drawn[1]
    if isinstance(values, list):
        listed = [as_word(flag, value, m) for value in values]
        if words[at] in listed:
            i = listed.index(words[at])
            beside = [word for word in listed[max(i - 1, 0):i + 2] if word != words[at]]
            moved = beside[rng.integers(len(beside))] if beside else words[at]
    else:
        scale, low, high = values
        old, step = float(words[at]), rng.normal() / 6
        value = old + step * (high - low) if scale == "linear" else old * (high / low) ** step
        moved = as_word(flag, min(max(value, low), high), m)
    return [*words[:at], moved, *words[at + 1:]]


def tune(args):
    """Search each method's space by `budget` trials: the method's defaults (trial 0), those of
    FIRST, then, in turn, a random point and the best so far with one flag moved.

    A trial is one command and one line of OUT.jsonl, so a killed search goes on where it was;
    OUT.json holds the flags of the best trial by validation NDCG@20, for `compare --tuned`."""
    run, log = Path(args.run), Path(args.run) / f"{args.out}.jsonl"
    names = [name.strip() for name in args.methods.split(";")] if args.methods else list(SPACES)
    names, judge = list(dict.fromkeys(names)), run / "judge.safetensors"
    output_name("--out", args.out, "eval.py tune")
    for name in names:
        if name not in SPACES:
            fail(f"--methods {name}: has no declared space; choose from {'; '.join(SPACES)}")
        reads_judge = name == "AlphaRec" or "lambda-f" in SPACES[name]
        if reads_judge and not judge.exists():
            fail(f"{judge}: no such file, and trials of {name} read it; make it with "
                 f"`{maker_of(judge)}`")

    # what the trials depend on: lines of another split, seed or set of flags are refused
    data = load_data(run)
    shared = {"data": data["digest"], "seed": args.seed, "flags": args.flags}
    paths = sorted(run.glob("negatives-[0-9]*.safetensors"))
    paths += [run / "negatives-items.safetensors", run / "cf.safetensors", judge]
    digests = [file_digest(path) for path in paths if path.exists()]  # of what HNLMRec reads
    llm = json_digest(digests)
    *_, m = sized_to_data(data)
    rows = []
    if log.exists() and not args.force:
        rows = read_jsonl(log, "python eval.py tune", growing=True)
    done = {(row["method"], row["backbone"], row["trial"]): row for row in rows}

    def trial(name, n):
        """Row n of a method, of which all before it are done."""
        backbone = CLOSED.get(name, args.backbone)
        own = name in BASELINES and name != "AlphaRec"  # reads nothing of the LLM's
        row = {"method": name, "backbone": backbone, "trial": n}
        row |= shared if own else shared | {"llm": llm}
        rng = np.random.default_rng([args.seed, n, *name.encode()])
        first = ["", *FIRST.get(name, [])]
        if n < len(first):
            row["words"] = first[n].split()
        elif n % 2:
            row["words"] = draw(SPACES[name], rng, m)
        else:
            before = [done[name, backbone, i] for i in range(n)]
            best = best_trial(before)
            tried = [row["words"] for row in before]
            for _ in range(20):  # a point that was not tried yet, if there is one
                row["words"] = near(best["words"], SPACES[name], rng, m)
                if row["words"] not in tried:
                    break
        return row

    # a round is one trial of each method; those of a round may run beside each other
    with ThreadPoolExecutor(args.jobs) as pool:
        for n in range(args.budget):
            todo = []
            for name in names:
                if n and not SPACES[name]:
                    continue
                row = trial(name, n)
                old = done.get((name, row["backbone"], n))
                if old is None:
                    todo.append(row)
                elif {key: old.get(key) for key in row} != row:
                    fail(f"{log}: trial {n} of {name} was made from other inputs, flags or space; "
                         "give --force to make its trials anew, or choose another --out")
            # one at a time in this thread, where Ctrl-C ends it at once
            for row in (map if args.jobs == 1 else pool.map)(tune_trial, [run] * len(todo), todo):
                rows.append(row)
                done[row["method"], row["backbone"], n] = row
                write_atomic(log, "".join(json.dumps(row) + "\n" for row in rows).encode())

    groups, methods, table = {}, {}, []
    for row in rows:
        groups.setdefault((row["backbone"], row["method"]), []).append(row)
    for (backbone, name), trials in groups.items():
        best, failed = best_trial(trials), sum(row["valid"] is None for row in trials)
        entry = {key: best[key] for key in ("words", "valid", "trial")}
        entry |= {"trials": len(trials), "failed": failed}
        methods.setdefault(backbone, {})[name] = entry
        table.append([name, backbone, len(trials), entry["failed"], f"{trials[0]['valid']:.4f}",
                      f"{best['valid']:.4f}", best["trial"],
                      " ".join(best["words"]) or "its defaults"])
    result = {**shared, "methods": methods}
    header = ["method", "backbone", "trials", "failed", "valid NDCG@20, defaults", "best",
              "its trial", "its flags"]
    print("\n".join(markdown_table(header, table)))
    write_atomic(run / f"{args.out}.json", (json.dumps(result, indent=1) + "\n").encode())
    print(f"\nwrote {run / args.out}.json")


def best_trial(trials):
    """The first of the trials with the highest validation NDCG@20; trial 0 never fails."""
    return max((row for row in trials if row["valid"] is not None), key=lambda row: row["valid"])


def tune_trial(run, row):
    """Train one trial and throw the model away -> the row with its "valid": NDCG@20, None when
    training failed. The failure of trial 0, the defaults, is an error: no flag of ours made it."""
    script, command, words = command_of(row["method"])
    name = f"tune {row['method']} {row['backbone']} {row['trial']}"
    out = Path("compare") / (re.sub("[^a-z0-9]+", "-", name.lower()) + ".safetensors")
    words = [*row["flags"].split(), *words, *row["words"]]
    try:
        program(script, command, "--run", run, "--backbone", row["backbone"], "--seed", row["seed"],
                *words, "--out", out, "--force")
        meta = read_meta(run / out, "python eval.py tune")
        return row | {"valid": best_epoch(meta)["valid_ndcg@20"]}
    except SystemExit2 as error:
        if row["trial"] == 0:
            raise
        print(f"failed: {error.message}")
        return row | {"valid": None, "failed": error.message}
    finally:
        (run / out).unlink(missing_ok=True)


def command_of(name):
    """A method's program, its command there and the method's own flags."""
    if name in BASELINES:
        return "backbones.py", "pretrain", BASELINES[name].split()
    if name in JUDGED:
        return "hnlmrec.py", "train", (ALONE + JUDGED[name][0]).split()
    return "hnlmrec.py", "train", OURS[name].split()


def read_tuned(path, digest):
    """tuned.json of `tune` -> {backbone: {method: its entry}}.

    Raises SystemExit2 when it is not there, was made on another split, or with unequal budgets."""
    if not path.exists():
        fail(f"{path}: no such file; make it with `python eval.py tune --run {path.parent}`")
    try:
        tuned = json.loads(path.read_text())
        tuned = {key: tuned[key] for key in ("data", "methods")}
    except (ValueError, KeyError):
        fail(f"{path}: is not what `python eval.py tune` writes; delete it and run that again")
    if tuned["data"] != digest:
        fail(f"{path}: was tuned on another data.safetensors; run `python eval.py tune` again")
    budgets = {}
    for methods in tuned["methods"].values():
        for name, entry in methods.items():
            if SPACES.get(name) and name not in CLOSED:  # closed forms cost seconds, not minutes
                budgets[entry["trials"]] = name
    if len(budgets) > 1:
        (low, one), *_, (high, other) = sorted(budgets.items())
        fail(f"{path}: {one} had {low} trials, {other} {high}; run `python eval.py tune` with one "
             "--budget for all")
    return tuned["methods"]


def tuned_words(tuned, name, backbone, words):
    """A method's flags with its tuned ones. A variant of HNLMRec that was not tuned by itself takes
    HNLMRec's, and its own flags on top: they are what makes it another variant."""
    methods = tuned.get(CLOSED.get(name, backbone), {})
    if name in methods:
        return [*words, *methods[name]["words"]]
    if name in JUDGED and "judged negatives alone" in methods:  # another judge, the same settings
        return [*words, *methods["judged negatives alone"]["words"]]
    if name in BASELINES or "HNLMRec" not in methods:
        fail(f"--tuned: {name} on {backbone} is not in it; run `python eval.py tune --methods "
             f"\"{name}\"`")
    return [*methods["HNLMRec"]["words"], *words]

# --------------------------------------------------------------------------------------------------
# Recommend
# --------------------------------------------------------------------------------------------------

def recommend(args):
    """Print one user's best unseen items, and the items nearest to the negatives that the LLM made
    for that user."""
    run, data = Path(args.run), load_data(args.run)
    users, items = (read_jsonl(run / name) for name in ("users.jsonl", "items.jsonl"))
    row = row_of(users, args.user, "--user", run / "users.jsonl")
    if args.k > len(items):
        fail(f"--k {args.k}: the catalogue has {len(items)} items; give at most that")
    model, _, tensors = load_model(run / args.model, data=data)
    titles = [item["title"] for item in items]

    # what the user liked, and the best of the rest
    liked = data["train"][data["train"][:, 0] == row, 1].tolist()
    rest = f"; … ({len(liked)} items)" if len(liked) > 8 else ""
    print(f"user {args.user} liked: " + "; ".join(titles[n] for n in liked[:8]) + rest)
    seen = torch.cat([data["train"], data["valid"]])
    with torch.no_grad():
        vectors, item_vectors = model()
        best = rank_unseen(model, torch.tensor([row]), user_rows(seen, data["n_users"]), args.k)[0]
        best = best[best >= 0]  # a user may have fewer than k unseen items
        scores = model.score(vectors[row][None], item_vectors[best])
    print("recommended:")
    for rank, (item, score) in enumerate(zip(best.tolist(), scores.tolist()), 1):
        print(f"  {rank:>3}  {score:8.4f}  {titles[item]}")

    # the negatives' vectors, shown by real items
    if "z" in tensors:
        mine = (tensors["z_pairs"][:, 0] == row).nonzero()[:, 0][: args.k]
        pairs = tensors["z_pairs"][mine]
        train_keys = pair_keys(data["train"], data["n_items"])
        near = nearest_items(tensors["z"][mine], pairs[:, 0], item_vectors, train_keys, 3)
        print("hard negatives the LLM made (liked item -> items nearest to the vector):")
        for (_, item), group in zip(pairs.tolist(), near.tolist()):
            print(f"       {titles[item]} -> " + "; ".join(titles[n] for n in group if n >= 0))

# --------------------------------------------------------------------------------------------------
# Tables and pictures
# --------------------------------------------------------------------------------------------------

def markdown(text):
    """A name or title as one line of plain text in Markdown: no markup, no end of a table's
    cell."""
    text = " ".join(printable(text).split())
    return re.sub(r"[|<>&\[\]`*\\]", lambda found: f"&#{ord(found[0])};", text)


def markdown_table(header, rows):
    """Rows of cells -> the lines of a Markdown table. The first column holds names, which may be
    anybody's."""
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    for name, *cells in rows:
        lines.append("| " + " | ".join([markdown(name), *map(str, cells)]) + " |")
    return lines


def one_line(text):
    """Any text as one line that XML can hold: controls as visible escapes, and "?" for what has no
    place in it."""
    line = " ".join(printable(text).split()).encode("utf-8", "replace").decode()
    return re.sub("[\ufffe\uffff]", "?", line)


def axis_ticks(low, high):
    """About five round values from at most `low` to at least `high`, and the decimals they need."""
    rough = max(high - low, 1e-9) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= 0.999 * rough)
    first, last = math.floor(low / step + 1e-6), math.ceil(high / step - 1e-6)
    ticks = [n * step for n in range(first, max(last, first + 1) + 1)]
    return ticks, max(0, -math.floor(math.log10(step) + 1e-6))


def svg_chart(title, labels, means, lows, highs, reference=None):
    """Dots with intervals, one row a label, as SVG text. No plotting package.

    labels any text; means, lows, highs (n,) finite numbers; reference: a dashed line at this value.
    A dot says its value by its place and not by a length, so that the axis, with round ticks that
    hold all intervals, need not begin at zero; mean and interval stand beside it in numbers."""
    # what the axis spans, and where things stand, in pixels
    labels = [one_line(label) for label in labels]
    marks = [] if reference is None else [reference]
    ticks, decimals = axis_ticks(min([*lows, *marks]), max([*highs, *marks]))
    left, plot, row, top = 24 + 8 * max(map(len, labels)), 340, 22, 44
    width, bottom = left + plot + 200, top + row * len(labels)
    scale = plot / (ticks[-1] - ticks[0])

    def x(value):
        return f"{left + (value - ticks[0]) * scale:.1f}"

    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{bottom + 34}"'
             ' font-family="DejaVu Sans, Verdana, sans-serif" font-size="12">',
             '<rect width="100%" height="100%" fill="white"/>',
             f'<text x="12" y="20" font-size="14">{html.escape(one_line(title))}</text>']
    # the grid with its numbers, then the dashed line
    for tick in ticks:
        parts.append(f'<line class="tick" x1="{x(tick)}" x2="{x(tick)}" y1="{top - 8}"'
                     f' y2="{bottom}" stroke="#ddd"/>')
        parts.append(f'<text class="tick" x="{x(tick)}" y="{bottom + 16}" text-anchor="middle"'
                     f' fill="#555">{tick + 0.0:.{decimals}f}</text>')
    for mark in marks:
        parts.append(f'<line x1="{x(mark)}" x2="{x(mark)}" y1="{top - 8}" y2="{bottom}"'
                     ' stroke="#c33" stroke-dasharray="4 3"/>')
    # a row a label: name, interval, dot, numbers
    for n, (label, mean, low, high) in enumerate(zip(labels, means, lows, highs)):
        y = top + row * n + 6
        parts.append(f'<text x="12" y="{y + 4}">{html.escape(label)}</text>')
        parts.append(f'<line class="interval" x1="{x(low)}" x2="{x(high)}" y1="{y}" y2="{y}"'
                     ' stroke="#26c" stroke-width="2"/>')
        parts.append(f'<circle cx="{x(mean)}" cy="{y}" r="4" fill="#26c"/>')
        parts.append(f'<text x="{left + plot + 16}" y="{y + 4}">{mean:.4f}'
                     f' [{low:.4f}, {high:.4f}]</text>')
    return "\n".join([*parts, "</svg>\n"])


def chart_of_spreads(title, labels, spreads, reference=None):
    """svg_chart of (mean, sd) pairs: the interval is one standard deviation to each side."""
    means = [mean for mean, _ in spreads]
    lows = [mean - sd for mean, sd in spreads]
    highs = [mean + sd for mean, sd in spreads]
    return svg_chart(title, labels, means, lows, highs, reference)

# --------------------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------------------

def add_cell_flags(parser):
    """The flags that compare and sweep share: those of training many cells."""
    parser.add_argument("--run", required=True, metavar="DIR",
                        help="run folder in which `bash run.sh` has finished")
    parser.add_argument("--seeds", type=number(int, 1), default=5,
                        help="seeds 0 to N-1 of training")
    parser.add_argument("--llm", default="assets/SmolLM2-135M-Instruct",
                        help="LLM of the variants that have to be fine-tuned")
    parser.add_argument("--pairs-per-user", type=number(int, 0), default=4,
                        help="as `llm_negatives.py generate`, for the variants")
    parser.add_argument("--flags", default="",
                        help="further flags of every training, in one string")
    parser.add_argument("--force", action="store_true", help="train all cells anew")
    parser.add_argument("--jobs", type=number(int, 1), default=1,
                        help="cells at a time; set OMP_NUM_THREADS=1 beside it")


def main(argv=None):
    parser = Parser(prog="eval.py", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    p = commands.add_parser("report", help="evaluate all models of a run on its test pairs",
                            epilog="example: python eval.py report --run runs/demo")
    p.add_argument("--run", required=True, metavar="DIR", help="run folder")
    p.add_argument("--m", type=number(int, 1), default=8,
                   help="candidates of DNS and MixGCF in the table of false hard negatives")
    p.add_argument("--cf", default="cf.safetensors", help="model whose best items are judged")
    p = commands.add_parser("judge", help="what texts and LLM know beyond CF, on validation",
                            epilog="example: python eval.py judge --run runs/demo")
    p.add_argument("--run", required=True, metavar="DIR", help="run folder")
    p.add_argument("--cf", default="cf.safetensors", help="model whose best items are judged")
    p.add_argument("--top", type=number(int, 1), default=TOP, help="unseen items of each user")
    p.add_argument("--parts", action="store_true",
                   help="also each judge in a file without its users' texts, and without its "
                        "items'")
    p = commands.add_parser(
        "tune", help="choose each method's flags by trials on validation",
        epilog="example: python eval.py tune --run runs/ml-100k --methods 'DNS;EASE' --budget 20")
    p.add_argument("--run", required=True, metavar="DIR",
                   help="run folder in which `bash run.sh` has finished")
    p.add_argument("--methods", default="",
                   help=f"semicolon-separated, of {'; '.join(SPACES)} (left out: all)")
    p.add_argument("--budget", type=number(int, 1), default=20,
                   help="trials a method; the first is its defaults")
    p.add_argument("--seed", type=number(int, 0), default=0,
                   help="decides the trials and their trainings")
    p.add_argument("--backbone", default="lightgcn", help="backbone of the trained methods")
    p.add_argument("--flags", default="", help="further flags of every training, in one string")
    p.add_argument("--out", default="tuned", help="names OUT.json and OUT.jsonl in the run folder")
    p.add_argument("--force", action="store_true", help="make all trials of OUT.jsonl anew")
    p.add_argument("--jobs", type=number(int, 1), default=1,
                   help="trials at a time; set OMP_NUM_THREADS=1 beside it")
    text = "train methods x seeds and test the differences"
    p = commands.add_parser("compare", help=text, description=text,
                            epilog="example: python eval.py compare --run runs/ml-100k --seeds 5 "
                                   "--ablations")
    add_cell_flags(p)
    p.add_argument("--out", default="compare",
                   help="first part of the report's names, inside the run folder")
    p.add_argument("--backbones", default="lightgcn",
                   help="comma-separated; the ablations run with the first")
    p.add_argument("--methods", default="",
                   help="semicolon-separated names instead of all, ablations included, each with "
                        "flags of its own if wanted")
    p.add_argument("--baseline-flags", default="",
                   help="further flags of the baselines, in one string")
    p.add_argument("--hnlmrec-flags", default="",
                   help="further flags of HNLMRec and its ablations, in one string")
    p.add_argument("--tuned", nargs="?", const="tuned.json", metavar="FILE",
                   help="take each method's flags from this file of `tune` (tuned.json)")
    p.add_argument("--ablations", action="store_true",
                   help="also the controls and the ablations of training")
    p.add_argument("--llm-ablations", action="store_true",
                   help="these, and the ablations that fine-tune or generate anew")
    text = "try values of one flag on validation"
    p = commands.add_parser("sweep", help=text, description=text,
                            epilog="example: python eval.py sweep --run runs/ml-100k --flag tau_c "
                                   "--values 0.05,0.1,0.2,0.5")
    add_cell_flags(p)
    p.add_argument("--out", default="",
                   help="first part of the report's names, inside the run folder (left out: "
                        "sweep-FLAG)")
    p.add_argument("--flag", required=True,
                   help="flag of `hnlmrec.py train`, or tau_s or lora_rank of fine-tuning")
    p.add_argument("--values", required=True, help="comma-separated values")
    p.add_argument("--method", default="",
                   help="flags that choose a baseline instead, for example '--sampler dns'")
    p.add_argument("--backbone", default="lightgcn", help="backbone")
    p = commands.add_parser("recommend", help="show one user's recommendations",
                            epilog="example: python eval.py recommend --run runs/demo --user 196")
    p.add_argument("--run", required=True, metavar="DIR", help="run folder")
    p.add_argument("--user", required=True, metavar="RAW_ID",
                   help="the user's id as in the ratings file")
    p.add_argument("--k", type=number(int, 1), default=10, help="items to show")
    p.add_argument("--model", default="model-hnlmrec.safetensors",
                   help="model file inside the run folder")
    args = parser.parse_args(argv)
    programs = {"report": report, "judge": report_judges, "tune": tune, "compare": compare,
                "sweep": sweep, "recommend": recommend}
    programs[args.command](args)


if __name__ == "__main__":
    run_cli(main)
