"""eval.py: what the trained models are worth, and what their negatives are.

report     runs/NAME/model-*.safetensors -> report.md and metrics.json. This, and nothing before it, reads the test pairs.
compare    methods x backbones x seeds, ablations and controls -> compare.md, compare.json, pictures.
sweep      values of one flag, ranked on validation -> sweep-FLAG.md and a picture. Reads no test pair.
recommend  one user's top items with titles and scores, and beside them the negatives the LLM made for that user.

Metrics are over the full ranking of all items a user has not interacted with in train (and valid, when testing). Equal
scores rank by item id, lowest first. Users without a test pair have no metric: they are left out and counted.

Alone:  python eval.py report --run runs/NAME
"""

import hashlib
import html
import json
import math
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from backbones import (
    Parser,
    Progress,
    UnseenSampler,
    contains,
    dns,
    fail,
    hit_rate,
    load_data,
    load_model,
    load_negatives,
    load_tensors,
    mixgcf,
    mrr,
    ndcg,
    nearest_items,
    number,
    pair_keys,
    precision,
    rank_unseen,
    ranking_hits,
    read_jsonl,
    read_meta,
    recall,
    row_of,
    run_cli,
    user_rows,
    write_atomic,
)

# --------------------------------------------------------------------------------------------------
# Metrics of a model
# --------------------------------------------------------------------------------------------------

COLUMNS = [f"{name}@{k}" for name in ("Recall", "NDCG") for k in (10, 20)]  # what the tables show
METRICS = {"Recall": recall, "NDCG": ndcg, "Precision": precision, "HitRate": hit_rate, "MRR": mrr}


def evaluate(model, data, split="test", ks=(10, 20)):
    """Metrics of every user with a pair in `split`.

    Returns users (n,), {name@k: (n,) float64}, and the number of users without a pair there."""
    seen = data["train"] if split == "valid" else torch.cat([data["train"], data["valid"]])
    users, hits, relevant = ranking_hits(model, data[split], user_rows(seen, model.n_users), max(ks))
    values = {f"{name}@{k}": metric(hits, relevant, k) for name, metric in METRICS.items() for k in ks}
    return users, values, model.n_users - len(users)


def list_statistics(model, data, k=20):
    """What a model recommends and to whom it is right, on the test pairs -> dict.

    Recall@k and the other metrics: per user (n,), with `users`; item_recall: Recall@k over the test pairs of each quarter of the items by train
    popularity; popularity: mean train count of a recommended item; coverage: share of the catalogue that is recommended to
    anybody; gini: inequality of how often items are recommended, 0 (all alike) to 1."""
    users, values, _ = evaluate(model, data, "test", (10, k))
    seen = torch.cat([data["train"], data["valid"]])
    ranked = rank_unseen(model, users, user_rows(seen, model.n_users), k)  # (n, k)
    count = torch.bincount(data["train"][:, 1], minlength=model.n_items)
    quarter = quartiles(count)
    recommended = pair_keys(torch.stack([users[:, None].expand_as(ranked)[ranked >= 0], ranked[ranked >= 0]], 1), model.n_items)
    hit = contains(recommended, *data["test"].T, model.n_items)
    shown = torch.bincount(ranked[ranked >= 0], minlength=model.n_items).double().sort().values
    rank = torch.arange(1, model.n_items + 1).double()
    return {"users": users, **values, "item_recall": [float(hit[quarter[data["test"][:, 1]] == q].double().mean()) for q in range(4)],
            "popularity": float(count[ranked[ranked >= 0]].double().mean()), "coverage": float((shown > 0).double().mean()),
            "gini": float((2 * rank - model.n_items - 1) @ shown / (model.n_items * shown.sum()))}


def quartiles(count):
    """Counts (n,) -> quarter 0 (lowest) … 3 of each; equal counts may fall on both sides of a border, by index."""
    place = torch.empty_like(count)
    place[count.argsort(stable=True)] = torch.arange(len(count))
    return place * 4 // len(count)


def paired_bootstrap(difference, draws=10_000, seed=0):
    """Two-sided p that the mean of paired per-user differences (n,) is zero: users drawn with replacement (Efron, 1979; for
    rankings, Sakai, SIGIR 2006) -> (mean, low and high end of the 95 % interval, p)."""
    difference = np.asarray(difference, np.float64)
    rng = np.random.default_rng(seed)
    means = np.array([difference[rng.integers(0, len(difference), len(difference))].mean() for _ in range(draws)])
    below = (np.sum(means <= 0) + 1) / (draws + 1)
    return difference.mean(), *np.quantile(means, [0.025, 0.975]), min(1.0, 2 * min(below, (np.sum(means >= 0) + 1) / (draws + 1)))


def spread(values):
    """mean and standard deviation over seeds (n - 1), as numbers."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0

# --------------------------------------------------------------------------------------------------
# False hard negatives: negatives that are held-out positives
# --------------------------------------------------------------------------------------------------

def fhns_rate(users, items, held_keys, n_items):
    """Share of negatives that are held-out positives of their user: users (n,), items (n, k), held_keys from pair_keys of
    valid + test pairs -> float. An item of -1 (no such item) counts in neither."""
    real = items >= 0
    return float((contains(held_keys, users[:, None], items.clamp(min=0), n_items) & real).sum() / real.sum())


MOST = 2**17  # pairs or users that a rate is taken over; the standard error of one below 10 % is
              # then below 0.1 points


def some_of(n, generator=None):
    """All of n rows, or MOST of them at random, ascending -> row numbers."""
    if n <= MOST:
        return torch.arange(n)
    return torch.randperm(n, generator=generator)[:MOST].sort().values


def fhns_of_samplers(model, data, m, seed):
    """FHNS@1 of what the samplers hand a trained model for train pairs (all, or MOST of them):
    uniform, DNS (the best of m), and the item nearest to MixGCF's synthetic vector; FHNS@10 for the
    ten best of the draw where a sampler ranks."""
    generator = torch.Generator().manual_seed(seed)
    u, i = data["train"][some_of(len(data["train"]), generator)].T
    held = pair_keys(torch.cat([data["valid"], data["test"]]), model.n_items)
    candidates = UnseenSampler(data["train"], model.n_users, model.n_items)(u, m, generator)
    rates = {"uniform": {"FHNS@1": fhns_rate(u, candidates[:, :1], held, model.n_items),
                         "FHNS@10": fhns_rate(u, candidates[:, :10], held, model.n_items)}}
    with torch.no_grad():
        users, items = model()
        chosen = torch.cat([dns(model.score, users[a], items, c)[:, None] for a, c in zip(u.split(4096), candidates.split(4096))])
        rates["DNS"] = {"FHNS@1": fhns_rate(u, chosen, held, model.n_items)}
        _, item_layers = model.layers()
        synthetic = torch.cat([mixgcf(users[a], item_layers, p, c, model.pool, generator)
                               for a, p, c in zip(u.split(4096), i.split(4096), candidates.split(4096))])
        nearest = nearest_items(synthetic, u, items, pair_keys(data["train"], model.n_items), 10)
        rates["MixGCF, nearest items"] = {"FHNS@1": fhns_rate(u, nearest[:, :1], held, model.n_items),
                                          "FHNS@10": fhns_rate(u, nearest, held, model.n_items)}
    everyone = some_of(model.n_users, generator)
    top = rank_unseen(model, everyone, user_rows(data["train"], model.n_users), 10)
    rates["the model's own top items"] = {"FHNS@1": fhns_rate(everyone, top[:, :1], held, model.n_items),
                                          "FHNS@10": fhns_rate(everyone, top, held, model.n_items)}
    return rates


def fhns_of_vectors(pairs, vectors, items, data, n_items):
    """FHNS of generated vectors (all, or MOST of them) through their nearest real items: pairs
    (n, 2), vectors (n, D), items (I, D)."""
    rows = some_of(len(pairs), torch.Generator().manual_seed(0))
    pairs, vectors = pairs[rows], vectors[rows]
    held = pair_keys(torch.cat([data["valid"], data["test"]]), n_items)
    nearest = nearest_items(vectors, pairs[:, 0], items, pair_keys(data["train"], n_items), 10)
    return {"FHNS@1": fhns_rate(pairs[:, 0], nearest[:, :1], held, n_items), "FHNS@10": fhns_rate(pairs[:, 0], nearest, held, n_items)}

# --------------------------------------------------------------------------------------------------
# Report
# --------------------------------------------------------------------------------------------------

NAMES = {"rns": "RNS", "pns": "PNS", "dns": "DNS", "mixgcf": "MixGCF", "ahns": "AHNS", "hnlmrec": "HNLMRec"}


def report(args):
    """Evaluate every model-*.safetensors of the run on the test pairs; write report.md and metrics.json."""
    run, data = Path(args.run), load_data(args.run)
    paths = sorted(run.glob("model-*.safetensors"))
    if not paths:
        fail(f"{run}: no model-*.safetensors; train one with `python backbones.py pretrain` or `python hnlmrec.py train`")
    order = list(NAMES)
    paths.sort(key=lambda p: (order.index(p.stem[6:]) if p.stem[6:] in order else len(order), p.name))
    metrics, models = {"data": data["digest"], "methods": {}}, {}
    for path in paths:
        model, meta, tensors = load_model(path, "python hnlmrec.py train", data)
        _, values, skipped = evaluate(model, data)
        best = best_epoch(meta)
        row = {name: float(value.mean()) for name, value in values.items()}
        row |= {"valid NDCG@20": best["valid_ndcg@20"], "best epoch": best["epoch"], "seconds": meta["seconds"],
                "backbone": meta["settings"]["backbone"], "seed": meta["settings"]["seed"]}
        if not all(math.isfinite(row[name]) for name in COLUMNS):
            fail(f"{path}: its metrics are not finite; train it again with --force")
        metrics["methods"][path.stem[6:]] = row
        models[path.stem[6:]] = (model, tensors)
    metrics["users tested"], metrics["users without a test pair"] = data["n_users"] - skipped, skipped

    lines = [f"# Report: {run.name}", "", (f"{data['n_users']:,} users, {data['n_items']:,} items; train {len(data['train']):,}, "
             f"valid {len(data['valid']):,}, test {len(data['test']):,} pairs. Full ranking; each model at its best validation "
             f"epoch; {data['n_users'] - skipped:,} users tested, {skipped} without a test pair."), ""]
    lines += markdown_table(["method", "backbone", *COLUMNS, "valid NDCG@20", "best epoch", "seconds"], [
        [NAMES.get(name, name), row["backbone"], *(f"{row[c]:.4f}" for c in COLUMNS), f"{row['valid NDCG@20']:.4f}",
         row["best epoch"], f"{row['seconds']:.0f}"] for name, row in metrics["methods"].items()])

    reference = next((models[name] for name in ("rns", "dns") if name in models), next(iter(models.values())))[0]
    lines += fhns_section(run, data, reference, metrics, args.m, {
        f"{NAMES.get(name, name)}, projected z": (tensors["z_pairs"], tensors["z"], tensors["item"]) for name, (_, tensors) in models.items() if "z" in tensors})
    if (run / "sft.safetensors").exists():
        log = read_meta(run / "sft.safetensors", "python llm_negatives.py finetune")["log"]
        metrics["sft"] = log
        lines += ["", "## Fine-tuning", "", (f"Loss at chance {log['chance_loss']:.3f}, last steps "
                  f"{(sum(log['steps'][-10:]) / max(1, len(log['steps'][-10:]))):.3f}. How often the item nearest to the generated "
                  f"vector is a mined hard negative, on held-back train pairs; floors: uniform {log['uniform_floor']:.3f}, the best "
                  f"single item for everybody {log['popularity_floor']:.3f}."), ""]
        sets = sorted({name for rates in log["hit_rates"].values() for name in rates})
        lines += markdown_table(["", *sets], [[name, *(f"{rates[s]:.3f}" if s in rates else "" for s in sets)]
                                              for name, rates in log["hit_rates"].items()])
    print("\n".join(lines))
    write_atomic(run / "report.md", ("\n".join(lines) + "\n").encode())
    write_atomic(run / "metrics.json", (json.dumps(metrics, indent=1) + "\n").encode())
    print(f"\nwrote {run / 'report.md'} and {run / 'metrics.json'}")


def fhns_section(run, data, model, result, m=8, projected=None):
    """Lines of the table of false hard negatives: what the samplers hand `model`, every set of generated negatives of the run,
    and projected {name: (pairs, vectors, items)}. Also put into result["fhns"]."""
    fhns, paths = fhns_of_samplers(model, data, m, 0), sorted(run.glob("negatives*-00000.safetensors"))
    items = load_tensors(run / "cf.safetensors", "python backbones.py pretrain")[0]["item"] if paths else None
    for path in paths:
        name = path.name[: -len("-00000.safetensors")]
        made = load_negatives(run, name, data["digest"])
        # the head's space is that of the centred item vectors (llm_negatives.SftTask)
        fhns[f"HNLMRec, generated ({name})"] = fhns_of_vectors(made["pairs"], made["vector"], items - items.mean(0), data, data["n_items"])
    for name, (pairs, vectors, trained) in (projected or {}).items():
        fhns[name] = fhns_of_vectors(pairs, vectors, trained, data, data["n_items"])
    result["fhns"] = fhns
    return ["", "## False hard negatives", "", ("Share of negatives that are held-out (valid or test) positives of their user; for a "
            "vector, its nearest real items that the user has no train pair with. "
            f"Over {MOST:,} pairs or users at most."), "",
            *markdown_table(["negatives", "FHNS@1", "FHNS@10"], [
                [name, *(f"{row[c]:.2%}" if c in row else "" for c in ("FHNS@1", "FHNS@10"))] for name, row in fhns.items()])]


def best_epoch(meta):
    """The row of a model's history with the best validation: that of the state in its file."""
    return max(meta["history"], key=lambda row: row["valid_ndcg@20"])

# --------------------------------------------------------------------------------------------------
# Compare: methods x backbones x seeds on one split. A cell is one command, echoed, that trains one model
# --------------------------------------------------------------------------------------------------

BASELINES = {"RNS": "--sampler rns", "PNS": "--sampler pns", "DNS": "--sampler dns", "DNS(M,N)": "--sampler dns --m 24 --n 2",
             "MixGCF": "--sampler mixgcf", "AHNS": "--sampler ahns"}
OURS = {
    "HNLMRec": "", "HNLMRec, cleared negatives": "--clear 0.3",
    # the values of --paper once more, or those of --hnlmrec-flags, tuned for ours, would win
    "HNLMRec, as in the paper": "--paper --lr 1e-3 --reg 1e-4 --sampler rns --clear 0 --alpha 1e-4 "
                                "--lambda1 1e-3 --tau-c 0.2 --lambda-s 0 --text-init 0",
}
ABLATIONS = {
    "random vectors": "--control random", "vectors shuffled between pairs": "--control shuffled",
    "cleared by shuffled texts": "--clear 0.3 --control cleared",
    "no semantic alignment": "--lambda-s 0", "random initial vectors": "--text-init 0", "no generated negative": "--alpha 0 --lambda1 0",
    "no self-attention": "--no-attention", "no alignment of z": "--lambda1 0",
}
LLM_ABLATIONS = {  # name -> the negatives it trains with, and the steps of llm_negatives.py that make them: minutes each
    "LLM not fine-tuned": ("negatives-zeroshot", ["generate --no-finetune --out negatives-zeroshot"]),
    "item texts as bags of words": ("negatives-words", ["generate --bag-of-words --out negatives-words"]),
    "no CF tokens in the prompt": ("negatives-nocf", ["finetune --soft-tokens 0 --name sft-nocf", "generate --sft sft-nocf --out negatives-nocf"]),
    "template profiles": ("negatives-template", [
        "profile --profiles template --out profiles-template.jsonl", "finetune --profiles profiles-template.jsonl --name sft-template",
        "generate --sft sft-template --out negatives-template"]),
    "targets mined by MixGCF": ("negatives-mixgcf", ["finetune --mine mixgcf --name sft-mixgcf", "generate --sft sft-mixgcf --out negatives-mixgcf"]),
}
LLM_FLAGS = ("tau-s", "lora-rank")  # a sweep over one of these fine-tunes anew for each value


def compare(args):
    """Train all cells that are not there yet, evaluate them on the test pairs, write compare.md, compare.json and pictures."""
    run, data = Path(args.run), load_data(args.run)
    seeds, every = range(args.seeds), {name: f"{words} {args.baseline_flags}".split() for name, words in BASELINES.items()}
    ours = OURS | ABLATIONS | {name: f"--negatives {negatives}" for name, (negatives, _) in LLM_ABLATIONS.items()}
    every |= {name: f"{args.hnlmrec_flags} {words}".split() for name, words in ours.items()}
    methods = []
    for entry in args.methods.split(";") if args.methods else [*BASELINES, *OURS]:
        name, *words = entry.strip().partition(" --")  # "MixGCF --lr 2e-3": a method with flags of its own
        if name not in every:
            fail(f"--methods {name}: no such method; choose from {'; '.join(every)}")
        if name in methods:
            fail(f"--methods: {name} is there twice, and a method is one row; compare the second one's flags in another --out")
        every[name] += "".join(words).split()
        methods.append(name)
    more = [*(ABLATIONS if args.ablations or args.llm_ablations else ()), *(LLM_ABLATIONS if args.llm_ablations else ())]
    backbones = args.backbones.split(",")
    plan = dict.fromkeys([(name, backbone) for backbone in backbones for name in methods] + [(name, backbones[0]) for name in more])
    for name, _ in plan:  # one after the other, on all cores
        if name in LLM_ABLATIONS:
            make_negatives(run, *LLM_ABLATIONS[name], args.llm, args.pairs_per_user)
    cells = [("backbones.py" if name in BASELINES else "hnlmrec.py", name, [*args.flags.split(), *every[name]], backbone, seed)
             for name, backbone in plan for seed in seeds]
    paths = dict(zip([(name, backbone, seed) for _, name, _, backbone, seed in cells], make_cells(run, cells, args.jobs)))

    rows, digests, progress = {}, {}, Progress("evaluate", len(paths), "cells")  # rows: (method, backbone) -> list over seeds
    for n, ((name, backbone, _), path) in enumerate(paths.items(), 1):
        model, meta, _ = load_model(path, "python eval.py compare", data)
        best = best_epoch(meta)["valid_ndcg@20"]
        source, digest = (meta["settings"].get(name) for name in ("negatives", "negatives_digest"))  # None for the baselines
        if digests.setdefault(source, digest) != digest:
            fail(f"{path}: was trained with other {source}-*.safetensors than the cells before it; delete {run / 'compare'} and run again")
        rows.setdefault((name, backbone), []).append(list_statistics(model, data, 20) | {"valid": best, "seconds": meta["seconds"]})
        progress.update(n)
    # … -> arrays with seeds as the first axis: metrics per user (S, n), the rest (S,) or (S, 4)
    table = {key: {column: np.array([np.asarray(cell[column]) for cell in cells]) for column in cells[0]} for key, cells in rows.items()}
    result = {"data": data["digest"], "seeds": list(seeds), "tests": {}, "cells": {" | ".join(key): {
        column: (v.mean(1) if column in COLUMNS else v).tolist() for column, v in cell.items() if column in (*COLUMNS, *LIST_COLUMNS)} for key, cell in table.items()}}
    lines = [f"# Comparison: {run.name}", "",
             (f"{data['n_users']:,} users, {data['n_items']:,} items, train {len(data['train']):,} pairs; one split, one set of generated "
             f"negatives; {len(seeds)} seeds of training; mean ± sd over seeds. Each model at its best validation epoch.")]
    for backbone in dict.fromkeys(backbone for _, backbone in plan):
        lines += backbone_section(run, args.out, backbone, {name: cell for (name, b), cell in table.items() if b == backbone}, data, result["tests"])
    lines += fhns_section(run, data, load_model(next(iter(paths.values())), "", data)[0], result)
    print("\n".join(lines))
    write_atomic(run / f"{args.out}.md", ("\n".join(lines) + "\n").encode())
    write_atomic(run / f"{args.out}.json", (json.dumps(result, indent=1) + "\n").encode())
    print(f"\nwrote {run / args.out}.md and {args.out}.json")


LIST_COLUMNS = ["valid", "seconds", "item_recall", "popularity", "coverage", "gini"]


def backbone_section(run, out, backbone, table, data, tests):
    """Lines of one backbone's part of the comparison, and its picture. table {method: {column: array over seeds}}; what the
    paired tests find is also put into `tests`."""
    # the rival is named by validation, as every choice is
    best = max((name for name in table if name in BASELINES), key=lambda name: table[name]["valid"].mean(), default=next(iter(table)))

    def against(name, other):
        """[mean, interval, p] of per-user NDCG@20 (each user's mean over seeds), and the difference seed by seed."""
        difference = table[name]["NDCG@20"] - table[other]["NDCG@20"]  # (S, n)
        return (*paired_bootstrap(difference.mean(0)), difference.mean(1).tolist())

    main, bias = [], []
    quarter = quartiles(torch.bincount(data["train"][:, 0], minlength=data["n_users"])).numpy()
    for name, cell in table.items():
        mean, low, high, p, by_seed = against(name, best)
        tests[f"{name} | {backbone}"] = {"against": best, "mean": mean, "low": low, "high": high, "p": p, "by seed": by_seed}
        verdict = f"{mean:+.4f} [{low:+.4f}, {high:+.4f}], p {p:.3f}, {sum(d > 0 for d in by_seed)}/{len(by_seed)} seeds"
        main.append([name, *("{:.4f} ± {:.4f}".format(*spread(cell[column].mean(1))) for column in COLUMNS), f"{cell['valid'].mean():.4f}",
                     "" if name == best else verdict, f"{cell['seconds'].mean():.0f}"])
        groups = [cell["NDCG@20"][:, quarter[cell["users"][0]] == q].mean() for q in range(4)]
        bias.append([name, *(f"{v:.4f}" for v in (*groups, *cell["item_recall"].mean(0))), f"{cell['popularity'].mean():.0f}",
                     f"{cell['coverage'].mean():.1%}", f"{cell['gini'].mean():.3f}"])
    write_atomic(run / f"{out}-{backbone}.svg", svg_chart(f"test NDCG@20, {backbone}", list(table), *zip(*(
        spread(cell["NDCG@20"].mean(1)) for cell in table.values()))).encode())
    lines = ["", f"## {backbone}", "",
             (f"NDCG@20 against {best}, the best baseline on validation: mean difference, 95 % interval and p by paired bootstrap over "
             "users (each user's mean over seeds); seeds in which it is above."), "",
             *markdown_table(["method", *COLUMNS, "valid NDCG@20", f"against {best}", "s"], main), "", f"![test NDCG@20]({out}-{backbone}.svg)"]
    if "HNLMRec" in table:
        lines += ["", "HNLMRec minus each other row, NDCG@20:", "", *markdown_table(["row", "difference", "p"], [
            [name, f"{d[0]:+.4f} [{d[1]:+.4f}, {d[2]:+.4f}]", f"{d[3]:.3f}"] for name in table if name != "HNLMRec" for d in [against("HNLMRec", name)]])]
    return [*lines, "", f"### Sparse users, unpopular items, popularity bias ({backbone})", "",
            ("NDCG@20 of users by quarter of their train count (Q1 fewest); Recall@20 of test pairs by quarter of their item's train "
            "popularity (I1 least popular); mean train count of a recommended item, share of the catalogue recommended, Gini index; means over seeds."), "",
            *markdown_table(["method", "Q1", "Q2", "Q3", "Q4", "I1", "I2", "I3", "I4", "popularity", "coverage", "Gini"], bias)]


def sweep(args):
    """Train HNLMRec (or the baseline of --method) with each value of one flag, and rank the values on validation. Reads no test pair."""
    run, flag, values, cells = Path(args.run), args.flag.replace("_", "-"), args.values.split(","), []
    for value in values:
        words = [f"--{flag}", value]
        if flag in LLM_FLAGS:
            words, sft = ["--negatives", f"negatives-{flag}-{value}"], f"sft-{flag}-{value}"
            make_negatives(run, words[1], [f"finetune --{flag} {value} --name {sft}", f"generate --sft {sft} --out {words[1]}"], args.llm, args.pairs_per_user)
        words = [*args.flags.split(), *args.method.split(), *words]
        cells += [("backbones.py" if args.method else "hnlmrec.py", f"sweep {flag} {value}", words, args.backbone, seed) for seed in range(args.seeds)]
    best = [best_epoch(read_meta(path, "python eval.py sweep"))["valid_ndcg@20"] for path in make_cells(run, cells, args.jobs)]
    charts = [spread(best[at:at + args.seeds]) for at in range(0, len(best), args.seeds)]
    rows = [[value, "{:.4f} ± {:.4f}".format(*chart)] for value, chart in zip(values, charts)]
    out = args.out or f"sweep-{flag}"
    lines = [f"## {flag}", "", *markdown_table([flag, f"valid NDCG@20, {args.seeds} seeds"], rows), "", f"![{flag}]({out}.svg)"]
    print("\n".join(lines))
    write_atomic(run / f"{out}.svg", svg_chart(f"valid NDCG@20 by {flag}", values, *zip(*charts), line=True).encode())
    write_atomic(run / f"{out}.md", ("\n".join(lines) + "\n").encode())
    print(f"wrote {run / out}.md")


def program(script, *words):
    """Run one of our scripts as a command of its own. Raises SystemExit2 with its own last line when it fails."""
    command = [sys.executable, str(Path(__file__).with_name(script)), *map(str, words)]
    print("$ " + " ".join([script, *map(str, words)]) + "\n", end="", flush=True)  # one write: threads may print at once
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        fail(f"{script} {' '.join(map(str, words[:3]))} …: {(done.stderr.strip() or 'no message').splitlines()[-1]}")


def make_negatives(run, name, steps, llm, pairs_per_user):
    """Fine-tune and generate a variant's negatives, unless they are there: their items file is written last."""
    for step in () if (run / f"{name}-items.safetensors").exists() else steps:
        more = ["--pairs-per-user", pairs_per_user] if step.startswith("generate") else []
        program("llm_negatives.py", *step.split(), "--run", run, "--llm", llm, *more)


def make_cell(run, script, name, words, backbone, seed):
    """Train one cell, by backbones.py or hnlmrec.py, unless its file is there -> the path of the model."""
    flags = hashlib.sha256(" ".join(words).encode()).hexdigest()[:6]  # other flags are another cell
    out = Path("compare") / ("-".join(re.sub(r"[^a-z0-9]+", "-", part.lower()).strip("-") for part in (name, backbone, f"seed{seed}", flags)) + ".safetensors")
    if not (run / out).exists():
        program(script, "pretrain" if script == "backbones.py" else "train", "--run", run, "--backbone", backbone, "--seed", seed, *words, "--out", out)
    return run / out


def make_cells(run, cells, jobs):
    """Cells (script, name, words, backbone, seed), `jobs` at a time, each a process of its own -> the paths of their models."""
    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(lambda cell: make_cell(run, *cell), cells))

# --------------------------------------------------------------------------------------------------
# Recommend
# --------------------------------------------------------------------------------------------------

def recommend(args):
    """Print one user's best unseen items, and the items nearest to the negatives that the LLM made for that user."""
    run, data = Path(args.run), load_data(args.run)
    users, items = (read_jsonl(run / name, f"python hnlmrec.py prepare --run {run}") for name in ("users.jsonl", "items.jsonl"))
    row = row_of(users, args.user, "--user", run / "users.jsonl")
    if args.k > len(items):
        fail(f"--k {args.k}: the catalogue has {len(items)} items; give at most that")
    model, _, tensors = load_model(run / args.model, "python hnlmrec.py train", data)
    title = lambda n: items[n]["title"]
    liked = data["train"][data["train"][:, 0] == row, 1].tolist()
    print(f"user {args.user} liked: " + "; ".join(map(title, liked[:8])) + (f"; … ({len(liked)} items)" if len(liked) > 8 else ""))
    seen = torch.cat([data["train"], data["valid"]])
    with torch.no_grad():
        vectors, item_vectors = model()
        best = rank_unseen(model, torch.tensor([row]), user_rows(seen, data["n_users"]), args.k)[0]
        scores = model.score(vectors[row][None], item_vectors[best])
    print("recommended:")
    for rank, (item, score) in enumerate(zip(best.tolist(), scores.tolist()), 1):
        print(f"  {rank:>3}  {score:8.4f}  {title(item)}")
    if "z" in tensors:
        mine = (tensors["z_pairs"][:, 0] == row).nonzero()[:, 0][: args.k]
        pairs = tensors["z_pairs"][mine]
        near = nearest_items(tensors["z"][mine], pairs[:, 0], item_vectors, pair_keys(data["train"], data["n_items"]), 3)
        print("hard negatives the LLM made (liked item -> items nearest to the vector):")
        for (_, item), group in zip(pairs.tolist(), near.tolist()):
            print(f"       {title(item)} -> " + "; ".join(map(title, group)))

# --------------------------------------------------------------------------------------------------
# Tables and pictures
# --------------------------------------------------------------------------------------------------

def markdown_table(header, rows):
    """Rows of cells -> the lines of a Markdown table."""
    return ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header),
            *("| " + " | ".join(str(cell) for cell in row) + " |" for row in rows)]


def svg_chart(title, labels, means, spreads, line=False):
    """One small picture: bars (or a line) of means with error bars of one spread, as SVG text. No plotting package."""
    low, high = min(m - s for m, s in zip(means, spreads)), max(m + s for m, s in zip(means, spreads))
    low, high = (low - 0.5 * (high - low + 1e-9), high + 0.1 * (high - low + 1e-9))
    width, left, top, height = 90 * len(labels) + 80, 60, 30, 200
    y = lambda v: top + height * (1 - (v - low) / (high - low))
    x = [left + 90 * n + 45 for n in range(len(labels))]
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{top + height + 60}" font-family="sans-serif" font-size="11">',
             f'<rect width="100%" height="100%" fill="white"/><text x="{left}" y="16" font-size="13">{html.escape(title)}</text>']
    for k in range(5):
        v = low + (high - low) * k / 4
        parts.append(f'<line x1="{left}" x2="{width - 20}" y1="{y(v):.1f}" y2="{y(v):.1f}" stroke="#ddd"/><text x="4" y="{y(v) + 4:.1f}">{v:.4f}</text>')
    if line:
        parts.append('<polyline fill="none" stroke="#36c" stroke-width="2" points="' + " ".join(f"{a},{y(m):.1f}" for a, m in zip(x, means)) + '"/>')
    for n, (a, m, s) in enumerate(zip(x, means, spreads)):
        if not line:
            parts.append(f'<rect x="{a - 28}" width="56" y="{y(m):.1f}" height="{top + height - y(m):.1f}" fill="#8ab4e8"/>')
        parts.append(f'<line x1="{a}" x2="{a}" y1="{y(m - s):.1f}" y2="{y(m + s):.1f}" stroke="black" stroke-width="1.5"/>')
        for k, word in enumerate(str(labels[n]).split(" ", 2)):
            parts.append(f'<text x="{a}" y="{top + height + 15 + 13 * k}" text-anchor="middle">{html.escape(word[:16])}</text>')
    return "\n".join([*parts, "</svg>\n"])

# --------------------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------------------

def main(argv=None):
    parser = Parser(prog="eval.py", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    p = commands.add_parser("report", help="evaluate all models of a run on its test pairs", epilog="example: python eval.py report --run runs/demo")
    p.add_argument("--run", required=True, metavar="DIR", help="run folder")
    p.add_argument("--m", type=number(int, 1), default=8, help="candidates of DNS and MixGCF in the table of false hard negatives")
    for name, text, example in (("compare", "train methods x seeds and test the differences", "--seeds 5 --ablations"),
                                ("sweep", "try values of one flag on validation", "--flag tau_c --values 0.05,0.1,0.2,0.5")):
        p = commands.add_parser(name, help=text, description=text, epilog=f"example: python eval.py {name} --run runs/ml-100k {example}")
        p.add_argument("--run", required=True, metavar="DIR", help="run folder in which `bash run.sh` has finished")
        p.add_argument("--seeds", type=number(int, 1), default=5, help="seeds 0 … N-1 of training")
        p.add_argument("--llm", default="assets/SmolLM2-135M-Instruct", help="LLM of the variants that have to be fine-tuned")
        p.add_argument("--pairs-per-user", type=number(int, 0), default=8, help="as `llm_negatives.py generate`, for the variants")
        p.add_argument("--flags", default="", help="further flags of every training, in one string")
        p.add_argument("--out", default="compare" if name == "compare" else "", help="first part of the report's names, inside the run folder (a sweep's: sweep-FLAG)")
        p.add_argument("--jobs", type=number(int, 1), default=1, help="cells at a time; set OMP_NUM_THREADS=1 beside it")
        if name == "compare":
            p.add_argument("--backbones", default="lightgcn", help="comma-separated; the ablations run with the first")
            p.add_argument("--methods", default="", help="semicolon-separated names instead of all, ablations included, each with flags of its own if wanted")
            p.add_argument("--baseline-flags", default="", help="further flags of the baselines, in one string")
            p.add_argument("--hnlmrec-flags", default="", help="further flags of HNLMRec and its ablations, in one string")
            p.add_argument("--ablations", action="store_true", help="also the controls and the ablations of training")
            p.add_argument("--llm-ablations", action="store_true", help="these, and the ablations that fine-tune or generate anew")
        else:
            p.add_argument("--flag", required=True, help="flag of `hnlmrec.py train`, or tau_s or lora_rank of fine-tuning")
            p.add_argument("--values", required=True, help="comma-separated values")
            p.add_argument("--method", default="", help="flags that choose a baseline instead, for example '--sampler dns'")
            p.add_argument("--backbone", default="lightgcn", help="backbone")
    p = commands.add_parser("recommend", help="show one user's recommendations", epilog="example: python eval.py recommend --run runs/demo --user 196")
    p.add_argument("--run", required=True, metavar="DIR", help="run folder")
    p.add_argument("--user", required=True, metavar="RAW_ID", help="the user's id as in the ratings file")
    p.add_argument("--k", type=number(int, 1), default=10, help="items to show")
    p.add_argument("--model", default="model-hnlmrec.safetensors", help="model file inside the run folder")
    args = parser.parse_args(argv)
    {"report": report, "compare": compare, "sweep": sweep, "recommend": recommend}[args.command](args)


if __name__ == "__main__":
    run_cli(main)
