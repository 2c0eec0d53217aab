"""eval.py: evaluates trained models and the negatives they are trained with.

report     runs/NAME/model-*.safetensors, on the test pairs -> report.md, report.svg, metrics.json
compare    methods x seeds, on the test pairs -> compare.md, .json, .svg; --valid: compare-valid.*
tune       the same number of trials for each method, on validation -> tuned.json, tuned.md
estimate   how long run.sh will take
recommend  one user's top items, and the items nearest to the LLM's negatives

Metrics are over the full ranking of all items that a user has not interacted with in train (and
valid, when testing). Example: python eval.py report --run runs/NAME
"""

import html, json, math, re, shlex, subprocess, sys
from collections import namedtuple
from contextlib import suppress
from functools import cache
from itertools import pairwise, product
from pathlib import Path
from timeit import Timer

import numpy as np
import torch

import backbones as bb
from backbones import (
    Parser, SystemExit2, UnseenSampler, best_epoch, contains, digests, dns, fail, json_digest,
    load_data, load_negatives, load_tensors, mixgcf, ndcg, number, output_name, pair_keys,
    rank_unseen, ranking_hits, read_jsonl, read_meta, row_of, run_cli, user_rows, write_atomic)
from hnlmrec import LikelyFalse, given_id, load_recommender, nearest_items

# ==== 1. Metrics of hits (n, >= k) bool, by rank, and relevant (n,), as ndcg's -> (n,) float64 ====
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
    place = torch.arange(1, hits[:, :k].shape[1] + 1, device=hits.device).double()
    return (hits[:, :k] / place).max(1).values


METRICS = {"Recall": recall, "NDCG": ndcg, "Precision": precision, "HitRate": hit_rate, "MRR": mrr}
# what the tables show; the others go into the JSON files
COLUMNS = ["Recall@10", "Recall@20", "NDCG@10", "NDCG@20"]
GROUPS = ["Q1", "Q2", "Q3", "Q4", "I1", "I2", "I3", "I4", "popularity", "coverage", "Gini"]
FORMS = {"popularity": ".0f", "coverage": ".1%", "Gini": ".3f", "seconds": ".0f",
         "seconds of all steps": ".0f"}  # the other columns: .4f


def seen_before(data, split):
    """What a ranking leaves out, from user_rows: train pairs, and valid ones too when testing."""
    pairs = data["train"] if split == "valid" else torch.cat([data["train"], data["valid"]])
    return user_rows(pairs, data["n_users"])


def evaluate(model, data, split="test", ks=(10, 20)):
    """Metrics of every user with a pair in `split` (valid or test) -> users (n,), {name@k: (n,)
    float64}, and the lists behind them (n, min(max(ks), I)): item ids, best first, -1 where a user
    has fewer unseen items. model: any module with n_users, n_items and scores(users (B,)), which
    returns a new (B, I). Raises SystemExit2 for an empty split."""
    if not len(data[split]):
        fail(f"data.safetensors: has no {split} pairs to evaluate on; prepare data that have some")
    seen = seen_before(data, split)
    users, hits, relevant, ranked = ranking_hits(model, data[split], seen, max(ks))
    values = {f"{name}@{k}": metric(hits, relevant, k) for name, metric in METRICS.items()
              for k in ks}
    return users, values, ranked


def list_statistics(users, ranked, data, split="test"):
    """What the lists `ranked` (n, k) of users (n,) contain -> I1 … I4: recall of held-out pairs, by
    quarter of the items by train popularity (I1 least; NaN without a pair); popularity: mean train
    count of a recommended item; coverage: share of items recommended to anybody; Gini: inequality
    of how often an item is recommended, 0 (all equally) to 1."""
    # over pairs, not users: a user has too few pairs to share them out among quarters
    n_items, real = data["n_items"], ranked >= 0
    count, recommended = torch.bincount(data["train"][:, 1], minlength=n_items), ranked[real]
    pairs = torch.stack([users[:, None].expand_as(ranked)[real], recommended], 1)
    hit = contains(pair_keys(pairs, n_items), *data[split].T, n_items).double()
    quarter = quartiles(count)[data[split][:, 1]]
    # the Gini index by its formula for sorted values; items recommended to nobody count as 0
    frequency = torch.bincount(recommended, minlength=n_items).double().sort().values
    weight = 2 * torch.arange(1, n_items + 1).double() - n_items - 1
    by_quarter = {f"I{q + 1}": float(hit[quarter == q].mean()) for q in range(4)}
    return by_quarter | {"popularity": float(count[recommended].double().mean()),
                         "coverage": float((frequency > 0).double().mean()),
                         "Gini": float(weight @ frequency / (n_items * frequency.sum()))}


def quartiles(count):
    """Counts (n,) -> quarter 0 (lowest) … 3 of each."""
    # argsort twice gives ranks, so quarters have equal size, or one more; equal counts may be split
    return count.argsort(stable=True).argsort() * 4 // len(count)


def paired_bootstrap(difference, draws=10_000, seed=0):
    """Two-sided test of the mean of paired per-user differences (n,) against zero: users drawn with
    replacement (percentile bootstrap, Efron, 1979) -> (mean, ends of the 95 % interval, p), p being
    2 (draws in the smaller tail + 1) / (draws + 1), or 2 / 2^n if that is more."""
    difference, rng = np.asarray(difference, np.float64), np.random.default_rng(seed)
    n, means = len(difference), np.empty(draws)
    if difference.ndim != 1 or not np.isfinite(difference).all():  # NaN would lie in neither tail
        fail("paired bootstrap: give one number a user; leave out users without a held-out item, "
             "who have no metric")
    # a draw at a time: all at once would hold draws x users
    for draw in range(draws):
        means[draw] = difference[rng.integers(0, n, n)].mean()
    # + 1: what was measured counts as one of the draws, so that no p is 0
    tail = (min(np.sum(means <= 0), np.sum(means >= 0)) + 1) / (draws + 1)
    tail = max(tail, 0.5**n)  # by chance, n differences are all above 0 (or all below) this often
    return difference.mean(), *np.quantile(means, [0.025, 0.975]), min(1.0, 2 * tail)


def holm(p_values):
    """Holm's correction (1979) of m p-values: the lowest times m, the next times m - 1 …, none
    below the one before it -> corrected, in the order given."""
    p, order = np.array(p_values, np.float64), np.argsort(p_values, kind="stable")
    steps = np.arange(len(p), 0, -1) * p[order]
    p[order] = np.maximum.accumulate(steps).clip(max=1)
    return p.tolist()

# ==== 2. False hard negatives: negatives that are held-out positives ==============================
# at most this many pairs per rate: enough for a standard error below .14 percentage points
MOST = 2**17


def fhns_rates(users, items, data):
    """Share of negatives that are held-out positives (valid or test) of their user: users (n,),
    items (n, k), best first, -1 for none -> FHNS@1, and FHNS@10 where there are ten."""
    n_items, real = data["n_items"], items >= 0
    held = pair_keys(torch.cat([data["valid"], data["test"]]), n_items)
    false = contains(held, users[:, None], items.clamp(min=0), n_items) & real  # (n, k)
    return {f"FHNS@{k}": float(false[:, :k].sum() / real[:, :k].sum().clamp(min=1))
            for k in (1, 10) if items.shape[1] >= k}


@torch.no_grad()
def fhns_of_samplers(model, data, m, seed=0, likely=None):
    """FHNS, over train pairs, of negatives that samplers draw by a trained backbone's scores:
    uniform, DNS (best of m), MixGCF; and of its own top items. With likely (U, n), a judge's likely
    false negatives, best first, two more rows: DNS that avoids these, and the items themselves."""
    # the same candidates for all, so that the samplers differ only in their choice
    generator, seen = torch.Generator().manual_seed(seed), user_rows(data["train"], model.n_users)
    some = torch.randperm(len(data["train"]), generator=generator)[:MOST].sort().values
    (u, i), n_items = data["train"][some].T, model.n_items
    candidates = UnseenSampler(data["train"], model.n_users, n_items)(u, m, generator)  # (n, m)
    # in parts, since scoring all candidates at once would gather (n, m, D)
    (users, items), item_layers = model(), model.layers()[1]
    parts = list(zip(u.split(4096), i.split(4096), candidates.split(4096)))
    hardest = [dns(model.score, users[a], items, c) for a, _, c in parts]
    synthetic = [mixgcf(users[a], item_layers, p, c, model.pool, generator) for a, p, c in parts]
    # MixGCF's negatives are vectors, so the items nearest to them stand in
    nearest = nearest_items(torch.cat(synthetic), u, items, seen, 10)
    everyone, of_pair = u.unique(return_inverse=True)  # each is ranked once
    found = {"uniform": (u, candidates[:, :1]), "DNS": (u, torch.cat(hardest)[:, None]),
             "MixGCF, nearest items": (u, nearest),
             "the model's own top items": (u, rank_unseen(model, everyone, seen, 10)[of_pair])}
    if likely is not None:  # as in training; nothing is drawn by the shares here, so any will do
        penalty = LikelyFalse(likely, torch.ones(likely.shape), n_items).penalty
        clear = [dns(model.score, users[a], items, c, penalty=penalty(a, c)) for a, _, c in parts]
        found |= {"DNS kept clear of the judge's items": (u, torch.cat(clear)[:, None]),
                  "the judge's likely items": (u, likely[u].long())}
    return {name: fhns_rates(*negatives, data) for name, negatives in found.items()}


def fhns_of_vectors(pairs, vectors, items, data):
    """fhns_rates of the items (I, D) nearest to vectors (n, D), generated for pairs (n, 2)."""
    rows = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0))[:MOST]
    users, seen = pairs[rows, 0], user_rows(data["train"], data["n_users"])
    return fhns_rates(users, nearest_items(vectors[rows], users, items, seen, 10), data)

# ==== The method ends here. What follows are programs =============================================
# ---- 3. What can be compared, by name ------------------------------------------------------------
# One row of a table. `hnlmrec.py blend` makes it if it has parts, `backbones.py pretrain` if its
# kind is in BASELINES (except RLMRec-Con), else `hnlmrec.py train`. kind: closed form, sampler,
# baseline (another paper's model), text (untrained), ours, control. flags: for that command, after
# those of the row `like` and their tuned flags. needs: files of the run it reads. parts: rows or
# files to blend; of A|B, the better in a blend (valid). stem: `report` reads model-STEM.safetensors
Method = namedtuple("Method", "kind flags needs like parts stem", defaults=("", (), "", (), ""))
BASELINES = ("closed form", "sampler", "baseline")
TEXTS, JUDGE, JUDGED = "texts.safetensors", "judge.safetensors", "judge's negatives"
CLOSED, EVERY = ("RP3β", "EASE"), ("ItemKNN", "RP3β", "EASE", "RNS", "DNS", "MixGCF")
# a plain backbone: no generated negative, no text. A row's further flags come after these
PLAIN = "--negatives none --alpha 0 --lambda1 0 --lambda-s 0 --text-init 0"
METHODS = {name: Method("closed form", f"--backbone {stem}", stem=stem) for name, stem in (
    ("Popularity", "pop"), ("ItemKNN", "itemknn"), ("RP3β", "rp3"), ("EASE", "ease"))}
METHODS |= {name: Method("sampler", f"--sampler {name.lower()}", stem=name.lower())
            for name in ("RNS", "PNS", "DNS", "MixGCF", "AHNS")}
METHODS |= {
    "DNS(M,N)": Method("sampler", "--sampler dns --n 2"),
    "Softmax": Method("baseline", "--loss softmax --cosine", stem="softmax"),
    # 2 layers and tau .15 (Games: .2): its authors' values. What lr follows from a large batch is
    # too high for its MLP (Toys & Games: valid NDCG@20 .0666 with 8e-3, .0734 with 1e-3)
    "AlphaRec": Method("baseline", "--loss softmax --cosine --layers 2 --tau 0.15 --lr 0.001 "
                       "--text-vectors " + TEXTS, (TEXTS,), stem="alpharec"),
    # L_sem, its loss, is added to DNS with BPR; a user's text is the sum of the train items'
    "RLMRec-Con": Method("baseline", PLAIN + " --lambda-s 0.01", (TEXTS,), stem="rlmrec"),
    "text similarity": Method("text", parts=(TEXTS,)),
    "RP3β + text similarity": Method("text", parts=("RP3β", TEXTS)),
    "HNLMRec, as in the paper": Method("ours", "--paper", ("negatives",), stem="paper"),
    "HNLMRec, as in the paper, projector trained": Method(
        "ours", "--train-projector", ("negatives",), "HNLMRec, as in the paper"),
    "HNLMRec": Method("ours", "", ("negatives", TEXTS), stem="hnlmrec"),
    JUDGED: Method("ours", PLAIN + " --lambda-f 1", (JUDGE,), stem="judged"),
    "judge alone": Method("ours", parts=(JUDGE,)),
    "in full": Method("ours", parts=(f"{JUDGED}|DNS", JUDGE, *CLOSED), stem="full"),
    "in full, with the judge's negatives": Method("control", parts=(JUDGED, JUDGE, *CLOSED)),
    "in full, with DNS": Method("control", parts=("DNS", JUDGE, *CLOSED)),
    "in full, without the judge in the score": Method("control", parts=(JUDGED, *CLOSED)),
    "in full, without the closed forms": Method("control", parts=(f"{JUDGED}|DNS", JUDGE)),
    "DNS and closed forms": Method("control", parts=("DNS", *CLOSED)),
    "judge and closed forms": Method("control", parts=(JUDGE, *CLOSED)),
    "all baselines in one score": Method("control", parts=EVERY),
    "all baselines and text similarity in one score": Method("control", parts=(*EVERY, TEXTS)),
    "DNS kept clear of the judge's items": Method("control", PLAIN + " --keep-clear judge",
                                                  (JUDGE,)),
    # an oracle: it knows the validation positives and avoids them; test ones stay among its draws
    "DNS kept clear of validation positives": Method("control", PLAIN + " --keep-clear valid")}
# HNLMRec with one thing changed; but --control replaces the items' texts, too
for _row, _flags in (
        ("random vectors", "--control random"), ("no semantic alignment", "--lambda-s 0"),
        ("vectors shuffled between pairs", "--control shuffled"),
        ("random initial vectors", "--text-init 0"), ("no self-attention", "--no-attention"),
        ("no alignment of z", "--lambda1 0"), ("no generated negative", "--alpha 0 --lambda1 0")):
    METHODS[_row] = Method("control", _flags, ("negatives", TEXTS), "HNLMRec")
METHODS["texts as a bag of words"] = Method("control", "--text-vectors texts-words.safetensors",
                                            ("negatives", "texts-words.safetensors"), "HNLMRec")
# a file that rows need -> flags of the command that makes it, which may name another such file
MAKING = {TEXTS: "", JUDGE: f"--text-vectors {TEXTS}", "negatives": "",
          "negatives-zeroshot": "--no-finetune", "sft-nocf": "--soft-tokens 0",
          "sft-mixgcf": "--mine mixgcf", "sft-template": "--profiles profiles-template.jsonl",
          "profiles-template.jsonl": "--profiles template"}
for _name, _row in (("zeroshot", "LLM not fine-tuned"), ("nocf", "no CF tokens"),
                    ("mixgcf", "targets mined by MixGCF"), ("template", "template profiles")):
    _file = f"negatives-{_name}"
    MAKING.setdefault(_file, f"--sft sft-{_name}")
    METHODS[_row] = Method("control", f"--negatives {_file}", (_file, TEXTS), "HNLMRec")
# judges of other texts
for _name, _row, _flags in (
        ("words", "bag of words", "--layers 0"),
        ("shuffled", "shuffled texts", "--control shuffled"),
        ("random", "random weights", "--control random"), ("tfidf", "TF-IDF", "--control tfidf"),
        ("profiles", "metadata and profiles", "--profiles profiles.jsonl")):
    _texts, _file = (f"{first}-{_name}.safetensors" for first in ("texts", "judge"))
    MAKING |= {_texts: _flags, _file: f"--text-vectors {_texts}"}
    METHODS[f"{JUDGED}, {_row}"] = Method("control", f"--judge {_file}", (_file,), JUDGED)
    METHODS[f"in full, by {'a ' * (_name == 'words')}{_row}"] = Method(
        "control", parts=(f"{JUDGED}, {_row}|DNS", _file, *CLOSED))

# the rows that `compare` has without --methods
TABLE = ("ItemKNN", *CLOSED, "RNS", "DNS", "MixGCF", "AlphaRec", "RLMRec-Con",
         "text similarity", "RP3β + text similarity", "HNLMRec, as in the paper", "HNLMRec", JUDGED,
         f"{JUDGED}, bag of words", f"{JUDGED}, shuffled texts", "judge alone", "in full",
         "in full, by a bag of words", "in full, by shuffled texts",
         "all baselines in one score", "all baselines and text similarity in one score")
# claims: a row; names or kinds of its rivals, of which the best on validation is taken; words
CLAIMS = (("in full", BASELINES, ", the best baseline by validation"),
          (JUDGED, ("sampler",), ", the best sampler by validation"),
          ("HNLMRec", ("sampler",), ", the best sampler by validation"),
          ("in full", ("all baselines in one score",), ""),
          ("in full", ("all baselines and text similarity in one score",), ""))


def fits(name, backbone):
    """Whether a row can be trained on a backbone: NeuMF scores by an MLP, which has no cosine."""
    products = bb.BACKBONES[backbone].score is bb.Backbone.score
    return products or "--cosine" not in METHODS[name].flags


def missing_file(run, name):
    """The first file that a row or one of its parts needs and the run lacks, or None."""
    parts = [one for part in METHODS[name].parts for one in part.split("|")]
    for file in (*METHODS[name].needs, *parts):
        if file in METHODS:
            file = missing_file(run, file)
        if file and not ((run / file).exists() or (run / f"{file}-00000.safetensors").exists()):
            return file
    return None


def making_of(run, file):
    """The commands that make a file, for the end of a message."""
    flags, command = MAKING.get(file, ""), bb.writer_of(run / file)
    before = [making_of(run, word) for word in flags.split() if word in MAKING]
    command += " --llm …" * ("llm_negatives.py" in command) + f" {flags}" * bool(flags)
    return ", then ".join([*before, f"`{command}`"])

# ---- 4. One writer of tables: a report is a comparison, one file per row -------------------------
# A row to evaluate. key: its name in the JSON file; label: in tables; method: in METHODS ("" for a
# person's own); kind: as Method has it; paths: of its model files, one per seed
Row = namedtuple("Row", "key label method kind paths")


def seconds_behind(run, path):
    """{path: seconds of its command, 0 of `prepare`} for a file and all .safetensors behind it."""
    meta, found = bb.read_header(path), {}
    if meta:  # empty for a .jsonl, a missing file or a person's own
        # a blend's `seconds` include its parts', which the loop below adds: so its own alone
        blend = meta["settings"].get("command") == "blend"
        found[path] = meta["history"][0]["seconds"] if blend else meta.get("seconds", 0.0)
        for name in meta["settings"].get("inputs", {}):
            for file in bb.files_of(run / name):
                found |= seconds_behind(run, file)
    return found


class Comparison:
    """Evaluates rows on one split and makes tables, tests and a picture. ndcg {key:
    NDCG@20 by seed and user (S, n)}, figures {key: {column: (S,)}}; result: for the JSON file."""
    def __init__(self, run, rows, data, split="test"):
        self.run, self.rows, self.data, self.split = run, rows, data, split
        self.ndcg, self.figures, self.with_z, self.chart = {}, {}, {}, ""
        self.result = {"data": data["digest"], "methods": {}, "tests": {}}
        for row in rows:
            ndcg, found = zip(*(self.evaluate_file(path, row.label) for path in row.paths))
            self.ndcg[row.key] = np.stack(ndcg)
            self.figures[row.key] = {c: np.array([each[c] for each in found]) for c in found[0]}
        self.seeds, self.users = len(rows[0].paths), data[split][:, 0].unique()
        # without a baseline something has to stand in for one
        self.rival = self.best(BASELINES) or rows[0]

    @cache  # each file once: a closed form serves all seeds
    def evaluate_file(self, path, label):
        model, meta, tensors = load_recommender(path, self.data)
        if "z" in tensors:  # projected generated negatives
            self.with_z.setdefault(label, tensors)
        users, values, ranked = evaluate(model, self.data, self.split)
        activity = torch.bincount(self.data["train"][:, 0], minlength=model.n_users)
        quarter, best = quartiles(activity)[users], best_epoch(meta["history"])
        # rows are chosen by it, so it must cover all users; training may have ranked only some
        valid = best["valid_ndcg@20"]
        if meta["settings"].get("eval_users"):
            scores = values if self.split == "valid" else evaluate(model, self.data, "valid")[1]
            valid = float(scores["NDCG@20"].mean())
        ndcg, seconds = values["NDCG@20"], seconds_behind(self.run, path)
        figures = {name: float(value.mean()) for name, value in values.items()}
        figures |= {f"Q{q + 1}": float(ndcg[quarter == q].mean()) for q in range(4)}
        return ndcg, {**figures, **list_statistics(users, ranked, self.data, self.split),
                      "valid NDCG@20": valid, "best epoch": best["epoch"],
                      "seconds": seconds[path], "seconds of all steps": sum(seconds.values())}

    def mean(self, row, column="valid NDCG@20"):
        return float(self.figures[row.key][column].mean())

    def best(self, wanted):
        """The best row, by validation, whose name in METHODS or kind is in `wanted`; or None."""
        # never by test pairs, which would favour whoever is lucky there
        rows = [row for row in self.rows if row.method in wanted or row.kind in wanted]
        return max(rows, key=self.mean, default=None)

    @cache  # claims and sections both need it; on large data it takes seconds
    def difference(self, row, other):
        """NDCG@20 of one row minus another's, by users' means over seeds -> dict: mean; low and
        high, the ends of its 95 % interval; p; by seed: the mean of each seed."""
        by_user = self.ndcg[row.key] - self.ndcg[other.key]  # (S, n)
        # mean over seeds first: a second seed is not a second user
        test = zip(("mean", "low", "high", "p"), paired_bootstrap(by_user.mean(0)))
        return {**dict(test), "by seed": by_user.mean(1).tolist()}

    def claims(self):
        """The lines on CLAIMS, p corrected over all of them (Holm); figures go into self.result."""
        lines, self.result["claims"] = [], []
        found = [(row, rival, words) for name, wanted, words in CLAIMS
                 if (row := self.best((name,))) and (rival := self.best(wanted))]
        corrected = holm([self.difference(row, rival)["p"] for row, rival, _ in found])
        for (row, rival, words), p in zip(found, corrected):
            test = self.difference(row, rival)
            self.result["claims"].append(
                {"row": row.key, "against": rival.key, **test, "p by Holm": p})
            word = "above" if test["mean"] > 0 else "below"
            word = word if p < 0.05 else "not shown to differ from"
            scores = [f"{self.mean(which, 'NDCG@20'):.4f}" for which in (row, rival)]
            p = "< .001" if p < 0.001 else f"{p:.3f}"
            lines += ["", f"**{markdown(row.label)}: {word} {markdown(rival.label)}**{words}. Test "
                      f"NDCG@20 {' and '.join(scores)}, {interval(test)}, p {p}."]
        return lines

    def sections(self, out):
        """The lines of all tables; the picture goes into self.chart, figures into self.result."""
        main, differences, groups, tests = [], [], [], {}
        for row in self.rows:
            figures = {column: self.mean(row, column) for column in self.figures[row.key]}
            text = {column: "–" if math.isnan(x) else f"{x:{FORMS.get(column, '.4f')}}"
                    for column, x in figures.items()}
            for column in COLUMNS if len({*row.paths}) > 1 else ():
                text[column] += f" ± {self.figures[row.key][column].std(ddof=1):.4f}"
            main.append([row.label, *(text[column] for column in (*COLUMNS, "valid NDCG@20"))])
            # against the rival. No p here: with one in each row, some would be small by chance
            against = ["", ""]
            if row != self.rival:
                test = tests[row] = self.difference(row, self.rival)
                against = [interval(test), f"{sum(d > 0 for d in test['by seed'])}/{self.seeds}"]
                self.result["tests"][row.key] = {"against": self.rival.key} | {
                    key: value for key, value in test.items() if key != "p"}
            differences.append([row.label, *against, text["seconds"], text["seconds of all steps"]])
            groups.append([row.label, *(text[column] for column in GROUPS)])
            # JSON has no NaN: a quarter without a pair becomes null
            figures = {column: None if math.isnan(x) else x for column, x in figures.items()}
            by_seed = self.figures[row.key]["NDCG@20"].tolist()
            self.result["methods"][row.key] = figures | {"by seed": by_seed}
        pair = "validation" if self.split == "valid" else self.split
        count = f"{len(self.users):,} of {self.data['n_users']:,}"
        cold = (~torch.isin(self.users, self.data["train"][:, 0])).sum()
        unknown = (f" {cold:,} of them have no train pair; for these, most rows rank by untrained "
                   "vectors or by item number.") * bool(cold)
        lines = ["", f"Users with a {pair} pair: {count}.{unknown}", "",
                 *markdown_table(["method", *COLUMNS, "valid NDCG@20"], main)]
        if tests:
            ends = ([test[end] for test in tests.values()] for end in ("mean", "low", "high"))
            title = f"{self.split} NDCG@20 minus {self.rival.label}, 95 % intervals"
            self.chart = svg_chart(title, [row.label for row in tests], *ends)
            best = ", the best baseline by validation" * (self.rival.kind in BASELINES)
            lines += ["", "## Differences", "", f"From {markdown(self.rival.label)}{best}; 95 % "
                      "intervals by paired bootstrap over users. s: seconds of the row's command; "
                      "s, all steps: plus those that made its files, except prepare, profile.", "",
                      *markdown_table(["method", "NDCG@20", "seeds above", "s", "s, all steps"],
                                      differences), "", f"![differences]({out}.svg)"]
        return [*lines, "", "## Sparse users, unpopular items", "",
                "NDCG@20 of users by quarter of their train count (Q1 fewest); recall by quarter "
                "of the item's train popularity (I1 least popular); mean train count of what is "
                "recommended, share of the catalogue recommended, Gini index.", "",
                *markdown_table(["method", *GROUPS], groups)]


def interval(test):
    return f"{test['mean']:+.4f} [{test['low']:+.4f}, {test['high']:+.4f}]"

# ---- report -------------------------------------------------------------------------------------
def report(args):
    """Evaluate all model-*.safetensors on the test pairs -> report.md, report.svg, metrics.json."""
    run, data = Path(args.run), load_data(args.run)
    comparison = Comparison(run, rows_of_run(run), data)
    # a report can do without any of these, and says which ones the run lacks
    absent = [name for name in ("in full", JUDGED, "HNLMRec") if not comparison.best((name,))]
    absent += ["a baseline"] * (not comparison.best(BASELINES))
    absent += ["a second model"] * (len(comparison.rows) == 1)
    absent += [file for file in (TEXTS, JUDGE) if not (run / file).exists()]
    # first what a person wants to know: who is ahead, and how to read it
    lines = [f"# Report: {markdown(run.name)}", *comparison.claims(), "",
             "NDCG@20 is 1 when a user's held-out items head the list of twenty, 0 when none is in "
             "it. Each verdict comes with its 95 % interval and its p; only p is corrected, by "
             "Holm's method. This is one seed; `python eval.py compare --run "
             f"{shlex.quote(str(run))}` trains each method with several, at its default flags."]
    lines += ["", f"Left out, since the run lacks them: {', '.join(absent)}."] if absent else []
    lines += [*comparison.sections("report"), *example_lines(comparison), *fhns_lines(comparison)]
    if (run / "steps.tsv").exists():  # by run.sh
        text = (run / "steps.tsv").read_text("utf-8", "replace")
        steps = [line.split("\t") for line in text.splitlines()]
        lines += ["", "## Steps of the last start", "", *markdown_table(["step", "seconds"], steps)]
    write_page(run / "report.md", lines, run / "metrics.json", comparison.result, comparison.chart)


def write_page(page, lines, file, result, chart=""):
    write_atomic(page, ("\n".join(lines) + "\n").encode("utf-8", "replace"))
    if chart:
        write_atomic(page.with_suffix(".svg"), chart.encode())
    write_atomic(file, (json.dumps(result, indent=1) + "\n").encode())
    print("\n".join([*lines, "", f"wrote {page} and {file}"]))


def is_row(name, made):
    """Whether a file's settings, `made`, are a row's, except for flags that `tune` varies."""
    method, command = METHODS[name], made.get("command")
    if method.parts:  # "in full"; run.sh leaves out closed forms that do not fit
        own = ["|".join(f"model-{METHODS[row].stem}.safetensors" if row in METHODS else row
                        for row in part.split("|")) for part in method.parts]
        return command == "blend" and {own[0], JUDGE} <= {*made["parts"].split(",")} <= {*own}
    same = command == training_of(name, {}, "lightgcn", 0)[1]
    flags = dict(re.findall(r"--(\S+) ?([^-\s]\S*)?", method.flags))
    for flag, value in flags.items():
        found = made.get(flag.replace("-", "_"))
        # a switch is on; a weight that is tuned is not 0; all else is as in the row
        on = not value or flag in SPACES.get(name, ())
        same &= bool(found) if on else str(found) in (value, f"{value}.0")
    # nor has it more than the row, whose flags do not name what is off by default: it is no
    # ablation, control or oracle, nor does it read files of one
    usual = {"loss": "bpr", "n": 1, "control": "none", "attention": True, "keep-clear": "none",
             "paper": False, "train-projector": False, "hinge": 0.0, "lambda-f": 0.0}
    usual |= ({"text-vectors": None} if command == "pretrain" else
              {"sampler": "rns" if "paper" in flags else "dns"})
    for flag, value in usual.items():
        same &= flag in flags or made.get(flag.replace("-", "_"), value) == value
    same &= "alpha" in flags or bool(made.get("alpha", 1) and made.get("lambda1", 1))
    others = {*MAKING} - {TEXTS, JUDGE, "negatives"}
    same &= others.isdisjoint(made.get(flag) for flag in ("negatives", "judge", "text_vectors"))
    return same and (made.get("negatives", "none") != "none") == ("negatives" in method.needs)


def rows_of_run(run):
    """A row for each model-*.safetensors of a run, in the order of METHODS, a person's own last."""
    paths = {path.stem.removeprefix("model-"): path
             for path in sorted(run.glob("model-?*.safetensors"))}
    if not paths:
        fail(f"{run}: no model-*.safetensors; run `{bb.writer_of(run / 'model-rns.safetensors')}`")
    made = {stem: read_meta(path)["settings"] for stem, path in paths.items()}
    rows = [Row(method.stem, name, name, method.kind, (paths.pop(method.stem),))
            for name, method in METHODS.items()
            if method.stem in made and is_row(name, made[method.stem])]
    # the rest are the user's own, or not what their name says; those by `pretrain` are baselines
    stems = [method.stem for method in METHODS.values()]
    for stem, path in paths.items():
        kind = "baseline" if made[stem].get("command") == "pretrain" else "ours"
        rows.append(Row(stem, path.name if stem in stems else stem, "", kind, (path,)))
    return rows


def example_lines(comparison, k=5):
    """An example user, with a test pair: k titles of items liked, recommended (by "in full" where
    there is such a row, else by the last row), and nearest to the projected z."""
    run, data, rows = comparison.run, comparison.data, comparison.rows
    users, items = (read_jsonl(run / name) for name in ("users.jsonl", "items.jsonl"))
    # the first user who is in the most of these: train pairs, each model's generated negatives
    having = [data["train"], *(z["z_pairs"] for z in comparison.with_z.values())]
    found = sum(torch.isin(comparison.users, pairs[:, 0]).int() for pairs in having)
    user = int(comparison.users[found.argmax()])
    held = set(data["test"][data["test"][:, 0] == user, 1].tolist())

    def titles(ids):
        note = " (**a held-out positive**)"
        return "; ".join(markdown(items[i]["title"]) + note * (i in held) for i in ids if i >= 0)

    last = comparison.best(("in full",)) or rows[-1]
    model, _, _ = load_recommender(last.paths[0], data)
    liked = data["train"][data["train"][:, 0] == user, 1].tolist()
    best = rank_unseen(model, torch.tensor([user]), seen_before(data, "test"), k)[0]
    lines = ["", f"## An example: user {markdown(users[user]['raw'])}", "",
             f"- liked ({min(k, len(liked))} of {len(liked)}): {titles(liked[:k])}",
             f"- recommended ({markdown(last.label)}): {titles(best.tolist())}"]
    for label, tensors in comparison.with_z.items():
        _, near = nearest_to_z(tensors, data, user, k)
        by_rank = list(dict.fromkeys(near.T[near.T >= 0].tolist()))  # each vector's nearest first
        lines.append(f"- negatives from the LLM ({markdown(label)}): "
                     f"{titles(by_rank[:k]) or 'none was generated for this user'}")
    return lines


def nearest_to_z(tensors, data, user, k):
    """The k real items nearest to each of a user's projected z -> pairs (n, 2), item ids (n, k)."""
    mine = tensors["z_pairs"][:, 0] == user
    pairs, seen = tensors["z_pairs"][mine], user_rows(data["train"], data["n_users"])
    return pairs, nearest_items(tensors["z"][mine], pairs[:, 0], tensors["item"], seen, k)


def fhns_lines(comparison):
    """The section on false hard negatives: of samplers, of the run's generated negatives, and of
    projected z. Its rates also go into comparison.result."""
    run, data, fhns = comparison.run, comparison.data, {}
    m, chosen = bb.sized_to_data(data)[3], ""
    likely = load_tensors(run / JUDGE)[0]["likely"] if (run / JUDGE).exists() else None
    # one model's scores serve all samplers; a sampler's row is the plainest, as no text is in it
    row = next((row for row in comparison.rows if row.kind == "sampler"), None)
    if row:
        model, _, _ = load_recommender(row.paths[0], data)
        fhns = fhns_of_samplers(model, data, m, likely=likely)
        chosen = f" Samplers choose among {m} candidates, by the scores of {markdown(row.label)}."
    for shard in sorted(run.glob("negatives-*00000.safetensors")):
        name = shard.name.removesuffix("-00000.safetensors")
        made = load_negatives(run, name, data)
        # fine-tuning's head aims at centred item vectors
        items = load_tensors(run / made["cf"])[0]["item"]
        fhns[f"generated ({name})"] = fhns_of_vectors(
            made["pairs"], made["vector"], items - items.mean(0), data)
    for label, tensors in comparison.with_z.items():
        fhns[f"{label}, projected z"] = fhns_of_vectors(
            tensors["z_pairs"], tensors["z"], tensors["item"], data)
    comparison.result["fhns"], columns = fhns, ("FHNS@1", "FHNS@10")
    table = [[name, *(f"{row[c]:.2%}" if c in row else "" for c in columns)]
             for name, row in fhns.items()]
    return ["", "## False hard negatives", "", "Share of negatives that are held-out positives of "
            "their user (valid or test). For a vector, the nearest items outside train stand "
            f"in. Over train pairs, {MOST:,} at most.{chosen}", "",
            *markdown_table(["negatives", *columns], table)] if fhns else []

# ---- 5. compare: a cell is one command, echoed, that trains one model or blends some -------------
def compare(args):
    """Train the models that are missing, evaluate all and test their differences -> OUT.md,
    OUT.json, OUT.svg. --valid: on the validation pairs, best row first; no test pair is read."""
    run, data, split = Path(args.run), load_data(args.run), "valid" if args.valid else "test"
    out = args.out or ("compare-valid" if args.valid else "compare")
    page = page_of(run, out, "compare", "# Comparison: ")
    if args.valid:  # choices are made by its result, so nothing may read a test pair
        del data["test"]
    # an entry with its flags is one row. TABLE's rows may lack files; those asked for may not
    entries, left_out = {}, []
    for entry in map(str.strip, args.methods.split(";") if args.methods else TABLE):
        name, mark, words = entry.partition("--")
        name = name.strip()
        if args.methods:
            check_row(run, name, METHODS, args.backbone)
        elif not fits(name, args.backbone):
            left_out.append(f"{name} (not for {args.backbone})")
            continue
        elif missing := missing_file(run, name):
            left_out.append(f"{name} (no {missing})")
            continue
        entries[entry] = name, words_of(f"--methods {name}", mark.strip() + words)
    # train everything before any evaluation, so that failures come early
    cells, rows = Cells(args, data["digest"]), []
    for entry, (name, words) in entries.items():
        files = [cells.file(name, words, seed) for seed in range(args.seeds)]
        if all(files):
            paths = tuple(run / file for file in files)
            rows.append(Row(entry, entry, name, METHODS[name].kind, paths))
    left_out += [f"{name} ({message})" for name, message in cells.failed.items()]
    if not rows:
        fail(f"--methods: no row is left; left out: {'; '.join(left_out)}")
    comparison = Comparison(run, rows, data, split)
    lines = [f"# Comparison: {markdown(run.name)}", "",
             f"{data['n_users']:,} users, {data['n_items']:,} items, {len(data['train']):,} train "
             f"pairs, one split, one seed of judge and LLM; {args.backbone}, seeds: {args.seeds}"
             + " (mean ± sd)" * (args.seeds > 1) + "; each model at its best validation epoch."
             + f" Flags by trials ({args.tuned})." * bool(args.tuned)
             + f" All with {markdown(args.flags)}." * bool(args.flags)
             + " The pairs below chose these epochs: for choices, not for claims." * args.valid]
    lines += ["", f"Left out: {markdown('; '.join(left_out))}."] if left_out else []
    untuned = [name for name, _ in entries.values() if METHODS[name].kind != "closed form"
               and not METHODS[name].parts and not {name, METHODS[name].like} & {*SPACES}]
    if args.tuned and untuned:
        lines += ["", f"At default flags, without trials: {'; '.join(untuned)}."]
    if args.valid:
        rows.sort(key=comparison.mean, reverse=True)
        lines += comparison.sections(out)
    else:
        lines += [*comparison.claims(), *comparison.sections(out), *fhns_lines(comparison)]
    write_page(page, lines, page.with_suffix(".json"), comparison.result, comparison.chart)


def page_of(run, out, command, first):
    """The path of OUT.md. Raises SystemExit2 for a page there that does not begin with `first`."""
    page = run / f"{output_name('--out', out, f'eval.py {command}')}.md"
    there = [path for end in (".md", ".json", ".svg") if (path := page.with_suffix(end)).exists()]
    # the page is written first of the three: without it, the others are not ours
    if there and not (there[0] == page and page.read_text("utf-8", "replace").startswith(first)):
        fail(f"--out {out}: {there[0]} was not written by `{command}`; choose another name")
    return page


def check_row(run, name, rows, backbone):
    """Raise SystemExit2 for a name not among `rows`, not for this backbone, or without files."""
    rows = [row for row in rows if fits(row, backbone)]
    if name not in rows:
        fail(f"--methods {name}: is none of {'; '.join(rows)}")
    if missing := missing_file(run, name):
        fail(f"--methods {name}: needs {missing}, which is not in {run}; make it with "
             f"{making_of(run, missing)}")


def words_of(flag, text):
    """A string of flags as words. Raises SystemExit2 for one that compare or tune sets itself."""
    for word in text.split():
        if word.split("=")[0] in ("--run", "--backbone", "--seed", "--out", "--force"):
            fail(f"{flag}: {word} is set by each training itself; leave it out")
    return text.split()


def training_of(name, tuned, backbone, seed, more=()):
    """The command that trains a row, as words: the script, the flags of the row that it is `like`,
    its own flags, each followed by the tuned ones (from read_tuned), then `more`."""
    method, words = METHODS[name], []
    # in this order: if a flag is given twice, the last one counts
    for row in filter(None, (method.like, name)):
        words += METHODS[row].flags.split()
        if tuned and row in SPACES:
            if row not in tuned.get(backbone, {}):
                fail(f"--tuned: {row} on {backbone} is not in it; run `python eval.py tune --run … "
                     f'--budget … --methods "{row}" --backbone {backbone}`')
            words += tuned[backbone][row]["words"]
    for word in {"--sampler", "--loss"} & {*words} & {flag.split("=")[0] for flag in more}:
        fail(f"{name}: its {word} is what it is named for; leave {word} out of your flags")
    # RLMRec-Con is a baseline, but its loss is a term of ours, so `train` makes it
    ours = method.kind not in BASELINES or "--negatives" in words
    script = ["hnlmrec.py", "train"] if ours else ["backbones.py", "pretrain"]
    if method.kind != "closed form":
        script += ["--backbone", backbone, "--seed", str(seed)]
    return [*script, *words, *more]


class Cells:
    """Makes the files of rows in compare/, each once. One that is there is reused, unless what it
    was made from has changed (an error) or --force is given."""
    def __init__(self, args, digest):
        self.args, self.run, self.failed = args, Path(args.run), {}
        self.flags = words_of("--flags", args.flags)
        self.tuned = read_tuned(self.run / args.tuned, digest) if args.tuned else {}
        # the best of more trials is better, so all need equally many; JUDGED may have 1: see tune
        budgets = {trial["trials"] for name, trial in self.tuned.get(args.backbone, {}).items()
                   if name != JUDGED or trial["trials"] > 1}
        if len(budgets) > 1:
            fail(f"--tuned {args.tuned}: methods had {min(budgets)} to {max(budgets)} trials; run "
                 "`python eval.py tune` with one --budget for all")

    def file(self, name, words, seed):
        """Make a row's file, with `words` as further flags -> its name in the run, "" for a closed
        form that failed (too large, say). Raises SystemExit2 if a blend has no use for words."""
        if name not in METHODS:  # a part that is a file of the run
            return name
        method, seeded, parts = METHODS[name], f"-{self.args.backbone}-seed{seed}", []
        for part in method.parts:
            files = []
            for one in part.split("|"):
                # a blend passes its flags to the parts it trains (of A|B, only to A)
                plain = files or METHODS.get(one, method).kind == "closed form"
                files.append(self.file(one, [] if plain else words, seed))
            parts.append("|".join(files))
        command = ["hnlmrec.py", "blend", "--parts", ",".join(filter(None, parts))]
        seedless = method.kind == "closed form"
        if not parts:
            more = words if seedless else [*self.flags, *words]
            command = training_of(name, self.tuned, self.args.backbone, seed, more)
        elif seeded not in command[-1]:  # no part is trained
            seedless = True
            if words:
                fail(f"--methods {name}: nothing is trained for it; leave {words[0]} out")
        # the digest: other flags give another file. Without a seed, one file serves all seeds
        slug = re.sub("[^a-z0-9]+", "-", name.lower()).strip("-") + ("" if seedless else seeded)
        out = f"compare/{slug}-{json_digest(command)[:6]}.safetensors"
        return self.make(name, out, *command)

    @cache  # so that with --force, too, each is made only once
    def make(self, name, out, *command):
        if (self.run / out).exists() and not self.args.force:
            read_meta(self.run / out, check=True)
            return out
        try:
            program(*command, "--run", self.run, "--out", out, *["--force"] * self.args.force)
        except SystemExit2 as error:
            if METHODS[name].kind != "closed form":
                raise
            # such as EASE, if its items x items do not fit into memory; blends do without it
            self.failed[name] = error.message
            return ""
        return out


def program(script, *words):
    """Run one of our scripts as a command. Raises SystemExit2 with its last line when it fails."""
    words = [str(word) for word in words]
    print("$", script, *words, flush=True)
    done = subprocess.run([sys.executable, str(Path(__file__).with_name(script)), *words],
                          capture_output=True, text=True, check=False,
                          close_fds=False)  # run.sh's lock stays held while a trial lives
    if done.returncode:
        message = (done.stderr.strip() or "no message").splitlines()[-1]
        fail(f"{script} {' '.join(words[:3])} …: {message.removeprefix('error: ')}")

# ---- 6. tune -------------------------------------------------------------------------------------
# Every method gets equally many trials (JUDGED may have 1: see tune), on validation: random search
# (Bergstra and Bengio, JMLR 2012), but mostly steps from the best so far. No test pair is read.
# SPACES has method -> {flag: its values in order, since a step goes to the next one up or down}.
# lambda-s: .001 suits MovieLens-1M, .03 Toys and Video Games, and .1 was too much on all five tried
TRAINED = {"lr": [3e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3], "dim": [64, 128, 256, 512],
           "reg": [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1]}
M = TRAINED | {"m": [0.25, 0.5, 1, 2, 4]}  # m: factors of the M that sized_to_data gives
SOFTMAX = TRAINED | {"tau": [0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 1], "shared": [64, 256, 1024]}
SPACES = {
    "RNS": TRAINED, "PNS": TRAINED | {"beta": [0, 0.25, 0.5, 0.75, 1]}, "DNS": M, "MixGCF": M,
    "AHNS": M, "Softmax": SOFTMAX, "AlphaRec": SOFTMAX,
    "RLMRec-Con": M | {"lambda-s": [1e-3, 0.01, 0.03, 0.1], "tau-c": [0.05, 0.1, 0.2, 0.5, 1]},
    "HNLMRec, as in the paper": TRAINED | {
        "alpha": [1e-4, 1e-3, 1e-2, 0.1, 0.3], "lambda1": [1e-4, 1e-3, 1e-2, 0.1, 1],
        "tau-c": [0.05, 0.1, 0.2, 0.5, 1]},
    "HNLMRec": M | {"text-init": [0, 1], "lambda-s": [0, 1e-3, 0.01, 0.03], "alpha": [0, 0.02]},
    JUDGED: M | {"lambda-f": [0.1, 0.3, 1, 3], "gamma": [0.05, 0.1, 0.2, 0.5]}}
# the second and third trials, except of HNLMRec: wide vectors are far better with a strong L2 on
# sparse data, with a weaker one on most dense data, and single steps take long to get there. Where
# one of the two is no use, it costs no more than a short run
WIDE = ["--dim 128 --reg 0.01", "--dim 128 --reg 0.001"]
# HNLMRec's second and third: without its parts, which is DNS; with texts as initial vectors alone.
# lambda1 stays: it reaches only the projector, which later trials with alpha need trained
FIRST = {"HNLMRec": ["--alpha 0 --lambda-s 0 --text-init 0",
                     "--alpha 0 --lambda-s 0 --text-init 1"]}


def space_of(name, data, texts=True, widest=512):
    """A method's space for these data, as strings; without texts, flags that need them are 0."""
    space = dict(SPACES[name])
    # vectors of 512 numbers only where they take less than 120 MB
    if (data["n_users"] + data["n_items"]) * 512 > 3e7:
        widest = min(widest, 256)
    space["dim"] = [dim for dim in space["dim"] if dim <= widest]
    if "m" in space:
        space["m"] = [max(1, round(times * bb.sized_to_data(data)[3])) for times in space["m"]]
    if not texts:
        space |= {flag: [0] for flag in ("text-init", "lambda-s") if flag in space}
        if name == "RLMRec-Con":  # its tau-c is then read by nothing, and refused
            del space["tau-c"]
    return {flag: [f"{value:g}" for value in values] for flag, values in space.items()}


def next_point(name, space, before, rng):
    """Flags of a method's next trial: its defaults, then FIRST's or WIDE's, then the best of
    `before` with one flag moved to a neighbour; every fourth time a random point."""
    first = ["", *FIRST.get(name, WIDE if "128" in space.get("dim", []) else [])]
    if len(before) < len(first):
        return first[len(before)].split()
    defaults = before[0].get("defaults", {})
    # as {flag: value}, so that the order of flags does not matter
    tried = [dict(zip(row["words"][::2], row["words"][1::2])) for row in before]
    best = tried[before.index(best_trial(before))]
    for _ in range(20):  # attempts at a point not yet tried: there may be none
        point = {f"--{flag}": values[rng.integers(len(values))] for flag, values in space.items()}
        if len(before) % 4:  # one step: most random points are poor, and cost a short run
            flag = list(point)[rng.integers(len(point))]
            values = space[flag[2:]]
            now = best.get(flag, defaults.get(flag))
            if now in values and len(values) > 1:  # else any value: a default may lie between two
                at = values.index(now)
                beside = values[max(at - 1, 0):at] + values[at + 1:at + 2]
                point[flag] = beside[rng.integers(len(beside))]
            point = best | {flag: point[flag]}
        point = {flag: value for flag, value in point.items() if value != defaults.get(flag)}
        if point not in tried:
            break
    return [word for flag_and_value in point.items() for word in flag_and_value]


def best_trial(trials):
    """The first trial with the highest validation NDCG@20; if trial 0 fails, `tune` ends."""
    return max((row for row in trials if row["valid"] is not None), key=lambda row: row["valid"])


def run_trial(run, out, command, before):
    """One trial of tune, its model in `out`; `before`: the method's earlier ones. The first runs in
    full, others a fifth of the epochs, the better half then in full -> dict: "short", "valid":
    validation NDCG@20 of each run, or None; "failed": why; the first's "defaults" {flag: value}."""
    def train(*more):
        """-> {epoch: validation NDCG@20}, the settings of the model's file."""
        program(*command, *more, "--run", run, "--out", out, "--force")
        meta = read_meta(run / out)
        return {row["epoch"]: row["valid_ndcg@20"] for row in meta["history"]}, meta["settings"]

    if not before:  # not caught if it fails: the flags are the user's, and all trials share them
        scores, settings = train()
        # its own first epochs stand for a short run
        few = max(1, settings["epochs"] // 5)
        early = [score for epoch, score in scores.items() if epoch <= few]
        # with these, next_point leaves out flags that have their default value
        defaults = {f"--{name.replace('_', '-')}": f"{value:g}" for name, value in settings.items()
                    if isinstance(value, (int, float))}
        return {"short": max(early, default=None), "valid": max(scores.values()),
                "defaults": defaults}
    found, epochs = {"short": None, "valid": None}, float(before[0]["defaults"]["--epochs"])
    few = max(1, int(epochs) // 5)
    try:
        scores, _ = train("--epochs", few)
        found["short"] = max(scores.values())
        # successive halving (Jamieson and Talwalkar, AISTATS 2016): the better half goes on
        shorts = [row["short"] for row in before if row["short"] is not None]
        if sum(other > found["short"] for other in shorts) < (len(shorts) + 1) / 2:
            # a short run that stopped by itself would stop there again
            if max(scores) == few:
                scores, _ = train()
            found["valid"] = max(scores.values())
    except SystemExit2 as error:
        print(f"failed: {error.message}")
        found["failed"] = error.message
    return found


def tune(args):
    """Search each method's space by --budget trials, one per line of OUT.jsonl: a killed search
    resumes where it stopped -> OUT.json: the flags of each method's best trial; OUT.md: a table."""
    run, data = Path(args.run), load_data(args.run)
    page = page_of(run, args.out, "tune", "| method | trials")
    log = page.with_suffix(".jsonl")
    names = args.methods.split(";") if args.methods else [
        name for name in SPACES if fits(name, args.backbone)]
    trials = {name.strip(): [] for name in names}
    for name in trials:
        check_row(run, name, SPACES, args.backbone)
    flags = words_of("--flags", args.flags)
    # earlier trials by plan (inputs and flags); --force drops these methods' on this backbone
    former, file = read_jsonl(log) if log.exists() else [], log.with_suffix(".json")
    if not all("plan" in row for row in former):
        fail(f"{log}: was not written by `tune`; choose another --out")
    done = {json_digest(row["plan"]): row for row in former if not args.force
            or row["method"] not in trials or args.backbone not in row["plan"]["command"]}
    methods = read_tuned(file, data["digest"], anew=args.force or not file.exists())
    # where the judge ranks no better than popularity on validation, texts say nothing
    paths = [path for path in (run / JUDGE, run / "model-pop.safetensors") if path.exists()]
    known = [best_epoch(read_meta(path)["history"])["valid_ndcg@20"] for path in paths]
    texts = len(known) < 2 or known[0] > known[1]  # judge, popularity
    if not texts:
        print("the judge ranks no better than popularity: trials only move text parts to 0")
    # a round is one trial of each method, so that a stopped search leaves them even
    for n, (name, before) in product(range(args.budget), trials.items()):
        if n and name == JUDGED and not texts:
            continue  # nothing to search
        # a generator per trial, so that it does not matter which other methods are searched
        rng = np.random.default_rng([args.seed, n, *name.encode()])
        words = next_point(name, space_of(name, data, texts, args.widest), before, rng)
        command = training_of(name, {}, args.backbone, args.seed, [*flags, *words])
        # files that flags name are inputs too
        named = [file for flag, file in pairwise(command) if file != "none"
                 and flag in ("--text-vectors", "--judge", "--cf", "--negatives")]
        plan = {"trial": n, "command": command, "data": data["digest"],
                "inputs": digests(run, *{*METHODS[name].needs, *named})}
        key = json_digest(plan)
        # what failed is tried again: the disk may have been full
        if key not in done or "failed" in done[key]:
            out = f"compare/tune-{key[:6]}.safetensors"
            done[key] = {"method": name, "plan": plan, "words": words, "model": out,
                         **run_trial(run, out, command, before)}
            write_atomic(log, "".join(json.dumps(row) + "\n" for row in done.values()).encode())
        before.append(done[key])
        # the best one's model is kept, so that nobody has to train it again
        best = best_trial(before)
        for other in (row for row in before if row is not best):
            (run / other["model"]).unlink(missing_ok=True)
    # add each method's best to what earlier searches found
    table = []
    for name, rows in trials.items():
        best = best_trial(rows)
        if not (run / best["model"]).exists():  # it was deleted since
            program(*best["plan"]["command"], "--run", run, "--out", best["model"], "--force")
        counts = {"trials": len(rows), "in full": sum(row["valid"] is not None for row in rows)}
        methods.setdefault(args.backbone, {})[name] = best | counts
        table.append([name, *counts.values(), f"{rows[0]['valid']:.4f}", f"{best['valid']:.4f}",
                      " ".join(best["words"]) or "defaults"])
    header = ["method", "trials", "in full", "valid NDCG@20, defaults", "best", "flags"]
    write_page(page, markdown_table(header, table), file,
               {"data": data["digest"], "methods": methods})


def read_tuned(path, digest, anew=False):
    """The file of `tune` -> {backbone: {method: its best trial}}. If it is missing, damaged or of
    another split: {} with `anew`, else raises SystemExit2."""
    why = "is missing, or is not by `tune`"
    with suppress(ValueError, KeyError, TypeError, FileNotFoundError):
        tuned = json.loads(path.read_text())
        if tuned["data"] == digest:
            return tuned["methods"]
        why = "was tuned on another data.safetensors"
    if anew:
        return {}
    fail(f"{path}: {why}; run `python eval.py tune --run {shlex.quote(str(path.parent))} --out "
         f"{path.stem} --force`")

# ---- Estimate: what run.sh will take -------------------------------------------------------------
# The numbers in `estimate` are seconds of run.sh's parts, measured on one machine (two idle cores,
# AMX in bf16). The look-up below took REFERENCE there; what it takes here scales them
REFERENCE = 7.2e-4  # seconds


def estimate(args):
    """Print roughly how long `bash run.sh` takes on this data with LightGCN and SmolLM2."""
    data = load_data(args.run)
    n, users, items = len(data["train"]), data["n_users"], data["n_items"]
    batch, _, epochs, _ = bb.sized_to_data(data)
    # LightGCN's step: pairs along the edges, vectors of all nodes, the batch itself
    step = 6e-8 * n + 3e-7 * (users + items) + 1.8e-6 * batch
    # early stopping ends most trainings sooner; with FAST=1 all have 20 epochs
    ranking = 3e-9 * users * items  # of all users: a validation, every five epochs
    training = (20 if args.fast else 0.75 * epochs) * (math.ceil(n / batch) * step + ranking / 5)
    # the LLM's: profiles, fine-tuning, generation, reading; 2000 and 12,000 are run.sh's limits
    written = sum(min(args.llm_rows or n, n) for n in (users, items))
    pairs = min(2000 if args.llm_rows else n, 4 * users)
    read = min(12_000 if args.llm_rows else items, items)
    llm = written / 9 + 60 + items / 120 + pairs / 70 + read / 100
    # EASE inverts tables, or is refused at once; the others take some 70 validations
    closed = 17 + 7.4e-11 * items**3 * (items <= bb.EASE_ITEMS) + 110 * ranking
    parts = {"LLM": llm, "judge": 5 + 1.5e-3 * n, "closed forms": closed,
             "trainings": (5 if args.trials else 7) * training,  # five, some slow; four with trials
             "trials": 1.6 * args.trials * training, "report": 5 + 4.5e-7 * users * items}
    if args.fast:  # 4 layers, a few profiles; three epochs of the judge with one dropout
        parts |= {"LLM": 0.3 * llm, "judge": 0.15 * parts["judge"]}
    # training mostly looks up vectors, bound by memory: judged by a matrix product, some machines
    # would seem 1.5 times as fast as they are. The fastest of 50: the others were disturbed
    table, rows = torch.randn(2**15, 64), torch.randint(2**15, (2**16,))
    speed = REFERENCE / min(Timer(lambda: table.index_select(0, rows)).repeat(50, 1))
    total = sum(parts.values()) / speed
    print(f"estimate: about {max(1, round(total / 60))} minutes ("
          + ", ".join(f"{name} {value / speed:.0f} s" for name, value in parts.items())
          + f"); {n:,} train pairs, this machine at {speed:.0%} of the one that was timed")

# ---- recommend; tables and pictures --------------------------------------------------------------
@torch.no_grad()
def recommend(args):
    """Print a user's best unseen items, and the items nearest to the LLM's negatives for them."""
    run, data = Path(args.run), load_data(args.run)
    users, items = (read_jsonl(run / name) for name in ("users.jsonl", "items.jsonl"))
    user = users[0]["raw"] if args.user is None else args.user
    row = row_of(users, user, "--user", run / "users.jsonl")
    titles = [item["title"] for item in items]
    if args.k > len(items):
        fail(f"--k {args.k}: the catalogue has {len(items)} items; give at most that")
    digests(run, args.model)  # refuses a model that was made from another run's pairs
    model, _, tensors = load_recommender(run / args.model, data)
    # what the user liked, and the best of the rest; a user may have fewer than k unseen items
    liked = data["train"][data["train"][:, 0] == row, 1].tolist()
    more = f"; … ({len(liked)} items)" if len(liked) > 8 else ""  # eight fit on two lines
    print(f"user {user} liked: {'; '.join(titles[n] for n in liked[:8])}{more}")
    if not liked:
        print("note: this user has no train pair, so the order is by popularity at best")
    one = torch.tensor([row])
    best, = rank_unseen(model, one, seen_before(data, "test"), args.k)
    scores, = model.scores(one)
    print("recommended:")
    for rank, item in enumerate(best[best >= 0].tolist(), 1):
        print(f"  {rank:>3}  {scores[item]:8.4f}  {titles[item]}")
    # vectors have no titles, so the items nearest to the negatives stand in
    if "z" in tensors:
        pairs, near = nearest_to_z(tensors, data, row, 3)
        if len(pairs):
            print("hard negatives the LLM made (liked item -> items nearest to the vector):")
        for (_, item), group in zip(pairs[: args.k].tolist(), near.tolist()):
            print(f"       {titles[item]} -> " + "; ".join(titles[n] for n in group if n >= 0))


def one_line(text):
    """Any text, such as a file's name, as one line that XML can hold."""
    return re.sub("[^ -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "?", " ".join(text.split()))


def markdown(text):
    """A name or title as one line of plain text in Markdown: no markup, no end of a cell."""
    return re.sub(r"[|<>&\[\]`*\\_~$]", lambda found: f"&#{ord(found[0])};", one_line(text))


def markdown_table(header, rows):
    """Rows of cells -> the lines of a Markdown table; the first column is free text."""
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    for name, *cells in rows:
        lines.append("| " + " | ".join([markdown(name), *map(str, cells)]) + " |")
    return lines


def svg_chart(title, labels, means, lows, highs):
    """Dots with intervals about a dashed line at 0, a row per label, as SVG text: labels any text;
    means, lows, highs (n,) finite numbers."""
    # about five ticks at round values. A dot shows its value by position, not by length, so the
    # axis need not begin at zero. It includes zero all the same, to show which side a dot is on
    low, high = min(*lows, 0.0), max(*highs, 0.0)
    rough = max(high - low, 1e-9) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= 0.999 * rough)
    decimals = max(0, -math.floor(math.log10(step) + 1e-6))
    first, last = math.floor(low / step + 1e-6), math.ceil(high / step - 1e-6)
    ticks = [n * step for n in range(first, max(last, first + 1) + 1)]
    # pixels: eight a letter of the longest label, 200 for the numbers on the right
    left, plot, row, top = 24 + 8 * max(map(len, labels)), 340, 22, 44
    bottom, scale = top + row * len(labels), plot / (ticks[-1] - ticks[0])
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + plot + 200}" '
             f'height="{bottom + 34}" font-family="DejaVu Sans, Verdana, sans-serif" '
             'font-size="12">', '<rect width="100%" height="100%" fill="white"/>']

    def x(value):
        return f"{left + (value - ticks[0]) * scale:.1f}"

    def line(x1, x2, y1, y2, style):
        parts.append(f'<line x1="{x(x1)}" x2="{x(x2)}" y1="{y1}" y2="{y2}" {style}/>')

    def text(at, y, words, style=""):
        parts.append(f'<text x="{at}" y="{y}"{style}>{html.escape(one_line(words))}</text>')

    # the title, the grid with its numbers, the line at 0
    text(12, 20, title, ' font-size="14"')
    for tick in ticks:
        line(tick, tick, top - 8, bottom, 'stroke="#ddd"')
        text(x(tick), bottom + 16, f"{tick + 0.0:.{decimals}f}", ' class="tick" '
             'text-anchor="middle" fill="#555"')
    line(0.0, 0.0, top - 8, bottom, 'stroke="#c33" stroke-dasharray="4 3"')
    # of each label: name, interval, dot, numbers
    for n, (label, mean, low, high) in enumerate(zip(labels, means, lows, highs)):
        y = top + row * n + 6
        text(12, y + 4, label)
        line(low, high, y, y, 'class="interval" stroke="#26c" stroke-width="2"')
        parts.append(f'<circle cx="{x(mean)}" cy="{y}" r="4" fill="#26c"/>')
        text(left + plot + 16, y + 4, f"{mean:.4f} [{low:.4f}, {high:.4f}]")
    return "\n".join([*parts, "</svg>\n"])

# ---- Command line --------------------------------------------------------------------------------
def main(argv=None):
    parser = Parser(prog="eval.py", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for command in (report, compare, tune, estimate, recommend):
        text = " ".join(command.__doc__.split())
        p = commands.add_parser(command.__name__, help=text, description=text)
        p.set_defaults(program=command)
        p.add_argument("--run", required=True, metavar="DIR", help="run folder")

    def add(names, flag, text, **more):
        for name in names.split():
            commands.choices[name].add_argument(flag, help=text, **more)

    # what trains many models
    for name, rows, out in (("compare", METHODS, None), ("tune", SPACES, "tuned")):
        add(name, "--methods", 'names separated by ";", such as "DNS;MixGCF". In compare, each may '
            'have flags ("HNLMRec --tau-c 0.1"), which a blend passes to the parts it trains (of '
            "alternatives, only to the first). Default: all in tune; in compare, the usual rows "
            "whose files the run has. Names: " + "; ".join(rows), default="")
        add(name, "--out", "name of the output files, without the ending", default=out)
    add("compare tune", "--backbone", "backbone of every trained model", default="lightgcn")
    add("compare tune", "--flags", "of each training, in one string (--flags=--cosine)", default="")
    add("compare tune", "--force", "train again, even if the file exists", action="store_true")
    add("tune", "--budget", "trials per method", type=number(int, 1), default=20)
    add("tune", "--widest", "largest --dim to be tried", type=number(int, 64), default=512)
    add("tune", "--seed", "seed of search and trainings", type=number(int, 0), default=0)
    add("compare", "--seeds", "train with seeds 0 to N-1", type=number(int, 1), default=5)
    add("compare", "--tuned", "take each method's flags from a file of `tune` (tuned.json)",
        nargs="?", const="tuned.json", metavar="FILE")
    add("compare", "--valid", "evaluate on validation; read no test pair", action="store_true")
    # what run.sh is about to do: it passes these
    whole = {"type": number(int, 0), "default": 0}
    add("estimate", "--llm-rows", "profiles of users, and of items, by the LLM; 0: all", **whole)
    add("estimate", "--trials", "trials for each of the two tuned methods", **whole)
    add("estimate", "--fast", "the run has FAST=1", action="store_true")
    add("recommend", "--user", "id as in the ratings file; default: the first user", metavar="ID",
        type=given_id)
    add("recommend", "--k", "items to show", type=number(int, 1), default=10)
    add("recommend", "--model", "model, judge or blend inside the run folder",
        default="model-hnlmrec.safetensors")
    args = parser.parse_args(argv)
    args.program(args)


if __name__ == "__main__":
    run_cli(main)
