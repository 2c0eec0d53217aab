"""eval.py: what the trained models are worth, and what their negatives are.

report     runs/NAME/model-*.safetensors -> report.md and metrics.json. This, and nothing before it, reads the test pairs.
recommend  one user's top items with titles and scores, and beside them the negatives the LLM made for that user.

Metrics are over the full ranking of all items a user has not interacted with in train (and valid, when testing). Equal
scores rank by item id, lowest first. Users without a test pair have no metric: they are left out and counted.

Alone:  python eval.py report --run runs/NAME
"""

import json
import math
from pathlib import Path

import torch

from backbones import (Parser, UnseenSampler, contains, dns, fail, load_data, load_model, load_negatives, load_tensors, mixgcf, ndcg, nearest_items,
                       number, pair_keys, rank_unseen, ranking_hits, read_meta, run_cli, user_rows, write_atomic)

# ---------------------------------------------------------------------------------------------------------------------
# Ranking metrics: hits (n, K) bool in rank order and relevant (n,) -> one number a user, (n,) float64
# ---------------------------------------------------------------------------------------------------------------------


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


METRICS = {"Recall": recall, "NDCG": ndcg, "Precision": precision, "HitRate": hit_rate, "MRR": mrr}


def evaluate(model, data, split="test", ks=(10, 20)):
    """Metrics of every user with a pair in `split`.

    Returns users (n,), {name@k: (n,) float64}, and the number of users without a pair there."""
    seen = data["train"] if split == "valid" else torch.cat([data["train"], data["valid"]])
    users, hits, relevant = ranking_hits(model, data[split], seen, max(ks))
    values = {f"{name}@{k}": metric(hits, relevant, k) for name, metric in METRICS.items() for k in ks}
    return users, values, model.n_users - len(users)


# ---------------------------------------------------------------------------------------------------------------------
# False hard negatives: negatives that are held-out positives
# ---------------------------------------------------------------------------------------------------------------------


def fhns_rate(users, items, held_keys, n_items):
    """Share of negatives that are held-out positives of their user: users (n,), items (n, k), held_keys from pair_keys of
    valid + test pairs -> float. An item of -1 (no such item) counts in neither."""
    real = items >= 0
    return float((contains(held_keys, users[:, None], items.clamp(min=0), n_items) & real).sum() / real.sum())


def fhns_of_samplers(model, data, m, seed):
    """FHNS@1 of what the samplers hand a trained model for each train pair: uniform, DNS (the best of m), and the item
    nearest to MixGCF's synthetic vector; FHNS@10 for the ten best of the draw where a sampler ranks."""
    generator = torch.Generator().manual_seed(seed)
    u, i = data["train"].T
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
    top = rank_unseen(model, torch.arange(model.n_users), user_rows(data["train"], model.n_users), 10)
    everyone = torch.arange(model.n_users)
    rates["the model's own top items"] = {"FHNS@1": fhns_rate(everyone, top[:, :1], held, model.n_items),
                                          "FHNS@10": fhns_rate(everyone, top, held, model.n_items)}
    return rates


def fhns_of_vectors(pairs, vectors, items, data, n_items):
    """FHNS of generated vectors through their nearest real items: pairs (n, 2), vectors (n, D), items (I, D)."""
    held = pair_keys(torch.cat([data["valid"], data["test"]]), n_items)
    nearest = nearest_items(vectors, pairs[:, 0], items, pair_keys(data["train"], n_items), 10)
    return {"FHNS@1": fhns_rate(pairs[:, 0], nearest[:, :1], held, n_items), "FHNS@10": fhns_rate(pairs[:, 0], nearest, held, n_items)}


# ---------------------------------------------------------------------------------------------------------------------
# Report
# ---------------------------------------------------------------------------------------------------------------------

NAMES = {"rns": "RNS", "pns": "PNS", "dns": "DNS", "mixgcf": "MixGCF", "ahns": "AHNS", "hnlmrec": "HNLMRec",
         "hnlmrec-alpha0": "HNLMRec, alpha 0 (grounded candidates alone)"}


def markdown_table(header, rows):
    """Rows of cells -> the lines of a Markdown table."""
    return ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header),
            *("| " + " | ".join(str(cell) for cell in row) + " |" for row in rows)]


def report(args):
    """Evaluate every model-*.safetensors of the run on the test pairs; write report.md and metrics.json."""
    run, data = Path(args.run), load_data(args.run)
    paths = sorted(run.glob("model-*.safetensors"))
    if not paths:
        fail(f"{run}: no model-*.safetensors; train one with `python backbones.py pretrain` or `python hnlmrec.py train`")
    order = list(NAMES)
    paths.sort(key=lambda p: (order.index(p.stem[6:]) if p.stem[6:] in order else len(order), p.name))
    metrics, models = {"data": data["digest"], "methods": {}}, {}
    columns = [f"{name}@{k}" for name in ("Recall", "NDCG") for k in (10, 20)]
    for path in paths:
        model, meta, tensors = load_model(path, "python hnlmrec.py train", data)
        _, values, skipped = evaluate(model, data)
        best = max(meta["history"], key=lambda row: row["valid_ndcg@20"])
        row = {name: float(value.mean()) for name, value in values.items()}
        row |= {"valid NDCG@20": best["valid_ndcg@20"], "best epoch": best["epoch"], "seconds": meta["seconds"],
                "backbone": meta["settings"]["backbone"], "seed": meta["settings"]["seed"]}
        if not all(math.isfinite(row[name]) for name in columns):
            fail(f"{path}: its metrics are not finite; train it again with --force")
        metrics["methods"][path.stem[6:]] = row
        models[path.stem[6:]] = (model, tensors)
    metrics["users tested"], metrics["users without a test pair"] = data["n_users"] - skipped, skipped

    lines = [f"# Report: {run.name}", "", f"{data['n_users']:,} users, {data['n_items']:,} items; train {len(data['train']):,}, "
             f"valid {len(data['valid']):,}, test {len(data['test']):,} pairs. Full ranking; each model at its best validation "
             f"epoch; {data['n_users'] - skipped:,} users tested, {skipped} without a test pair.", ""]
    lines += markdown_table(["method", "backbone", *columns, "valid NDCG@20", "best epoch", "seconds"], [
        [NAMES.get(name, name), row["backbone"], *(f"{row[c]:.4f}" for c in columns), f"{row['valid NDCG@20']:.4f}",
         row["best epoch"], f"{row['seconds']:.0f}"] for name, row in metrics["methods"].items()])

    reference = next((models[name] for name in ("rns", "dns") if name in models), next(iter(models.values())))[0]
    fhns = fhns_of_samplers(reference, data, args.m, 0)
    if (run / "negatives-00000.safetensors").exists() and (run / "cf.safetensors").exists():
        pairs, _, vector, _ = load_negatives(run, "negatives", data["digest"])
        items = load_tensors(run / "cf.safetensors", "python backbones.py pretrain")[0]["item"]
        # the head's space is that of the centred item vectors (llm_negatives.SftTask)
        fhns["HNLMRec, generated (CF space)"] = fhns_of_vectors(pairs, vector, items - items.mean(0), data, data["n_items"])
    for name, (_, tensors) in models.items():
        if "z" in tensors:
            fhns[f"{NAMES.get(name, name)}, projected z"] = fhns_of_vectors(tensors["z_pairs"], tensors["z"], tensors["item"], data, data["n_items"])
    metrics["fhns"] = fhns
    lines += ["", "## False hard negatives", "", "Share of negatives that are held-out (valid or test) positives of their user; for a "
              "vector, its nearest real items that the user has no train pair with.", ""]
    lines += markdown_table(["negatives", "FHNS@1", "FHNS@10"], [
        [name, *(f"{row[c]:.2%}" if c in row else "" for c in ("FHNS@1", "FHNS@10"))] for name, row in fhns.items()])
    if (run / "sft.safetensors").exists():
        log = read_meta(run / "sft.safetensors", "python llm_negatives.py finetune")["log"]
        metrics["sft"] = log
        lines += ["", "## Fine-tuning", "", f"Loss at chance {log['chance_loss']:.3f}, last steps "
                  f"{(sum(log['steps'][-10:]) / max(1, len(log['steps'][-10:]))):.3f}. How often the item nearest to the generated "
                  f"vector is a mined hard negative, on held-back train pairs; floors: uniform {log['uniform_floor']:.3f}, the best "
                  f"single item for everybody {log['popularity_floor']:.3f}.", ""]
        sets = sorted({name for rates in log["hit_rates"].values() for name in rates})
        lines += markdown_table(["", *sets], [[name, *(f"{rates[s]:.3f}" if s in rates else "" for s in sets)]
                                              for name, rates in log["hit_rates"].items()])
    print("\n".join(lines))
    write_atomic(run / "report.md", ("\n".join(lines) + "\n").encode())
    write_atomic(run / "metrics.json", (json.dumps(metrics, indent=1) + "\n").encode())
    print(f"\nwrote {run / 'report.md'} and {run / 'metrics.json'}")


# ---------------------------------------------------------------------------------------------------------------------
# Recommend
# ---------------------------------------------------------------------------------------------------------------------


def recommend(args):
    """Print one user's best unseen items, and the items nearest to the negatives that the LLM made for that user."""
    run, data = Path(args.run), load_data(args.run)
    users, items = ([json.loads(line) for line in (run / name).read_text(encoding="utf-8").splitlines()]
                    for name in ("users.jsonl", "items.jsonl"))
    row = next((n for n, user in enumerate(users) if user["raw"] == args.user), None)
    if row is None:
        fail(f"--user {args.user}: no such user in {run / 'users.jsonl'} (for example {users[0]['raw']})")
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


def main(argv=None):
    parser = Parser(prog="eval.py", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    p = commands.add_parser("report", help="evaluate all models of a run on its test pairs", epilog="example: python eval.py report --run runs/demo")
    p.add_argument("--run", required=True, metavar="DIR", help="run folder")
    p.add_argument("--m", type=number(int, 1), default=12, help="candidates of DNS and MixGCF in the table of false hard negatives")
    p = commands.add_parser("recommend", help="show one user's recommendations", epilog="example: python eval.py recommend --run runs/demo --user 196")
    p.add_argument("--run", required=True, metavar="DIR", help="run folder")
    p.add_argument("--user", required=True, metavar="RAW_ID", help="the user's id as in the ratings file")
    p.add_argument("--k", type=number(int, 1), default=10, help="items to show")
    p.add_argument("--model", default="model-hnlmrec.safetensors", help="model file inside the run folder")
    args = parser.parse_args(argv)
    {"report": report, "recommend": recommend}[args.command](args)


if __name__ == "__main__":
    run_cli(main)
