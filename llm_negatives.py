"""llm_negatives.py: the LLM makes the hard negatives, in three steps, each a subcommand.

profile   items.jsonl, users.jsonl, data.safetensors (train pairs) -> profiles.jsonl: a sentence on who would enjoy an item, and
          a sentence on what a user enjoys, written by the LLM (or built from metadata: --profiles template).
finetune  cf.safetensors + profiles.jsonl -> adapter/ (LoRA, peft's format) + sft.safetensors (soft-token maps, head).
          h(u, i) is the LLM's hidden state at the last prompt token, z = head(h), and InfoNCE pulls z to the CF vectors of
          the hard negatives mined for u, away from those of i, of u's other train items and of the rest of the catalogue:
              L = -ln( sum_{j in mined(u)} exp(cos(z, e_j) / tau_s) / sum_{j} exp(cos(z, e_j) / tau_s) )
generate  the same prompts, the same encode(), the same adapter -> negatives-00000.safetensors …: h and z for each train pair.

Alone:  python llm_negatives.py finetune --run runs/NAME --llm assets/SmolLM2-135M-Instruct
More than one GPU:  torchrun --nproc-per-node N -- llm_negatives.py finetune … (also profile and generate)
"""

import functools
import hashlib
import json
import math
import os
import shutil
import time
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers import logging as transformers_logging

from backbones import (
    Parser,
    Progress,
    end_processes,
    fail,
    file_digest,
    load_data,
    load_model,
    load_tensors,
    mine_hard_negatives,
    mixgcf,
    number,
    read_jsonl,
    read_meta,
    require_digest,
    restore,
    run_cli,
    save_tensors,
    start_processes,
    sum_over,
    up_to_date,
    user_rows,
    write_atomic,
)

# --------------------------------------------------------------------------------------------------
# The hybrid prompt: text plus soft tokens, in four pieces so that what is shared is computed once
# shared instruction | user: profile | item: title and profile | ask, with the item vector and the user vector
# The user vector comes last, so that the hidden state that is read, of the last token, starts from e_u itself and gathers the
# item and the texts by attention. Measured on ML-100K, frozen LLM of 8 layers, a head fitted on 3,000 pairs: e_u of users
# unseen in fitting is read back linearly from h with R2 .39, and the nearest item is a mined one for .93 of held-back pairs;
# with each vector after its own text, as in "User: … [vector] Item: … [vector]", R2 .03 and .78.
# --------------------------------------------------------------------------------------------------

SOFT = -1  # in a list of token ids: "a soft token goes here"
INSTRUCTION = "Name a hard negative: an item close to this user's taste that the user would still not choose."


class Prompt:
    """Token ids of the prompt's pieces for one tokenizer. SOFT marks the places of the soft tokens; n_soft = 0 is the prompt of
    the ablation without CF vectors. `tokens` counts the ids given out, for the log.

    Pieces are tokenized one by one, in training and generation alike, so that a prefix is the same ids for all its items."""

    def __init__(self, tokenizer, n_soft=1, max_tokens=48):
        self.tokenizer, self.n_soft, self.max_tokens = tokenizer, n_soft, max_tokens
        head, tail = chat(tokenizer, INSTRUCTION, "<<pieces>>").split("<<pieces>>")
        self.shared = self.ids(head)
        self.tokens, soft = 0, [SOFT] * n_soft
        self.template = head + "User: {user}\nItem: {item}" + tail + ("Item vector:[e_i] User vector:[e_u]" if n_soft else "")  # for people
        self.ask = self.ids(tail + "Item vector:") + soft + self.ids(" User vector:") + soft if n_soft else self.ids(tail)

    def ids(self, text):
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def user(self, text):
        """profile -> ids."""
        return self.count(self.ids("User: ") + self.ids(text)[: self.max_tokens])

    def item(self, text):
        """title and profile -> ids, followed by the ask, whose last token is the one that is read."""
        return self.count(self.ids("\nItem: ") + self.ids(text)[: self.max_tokens] + self.ask)

    def count(self, ids):
        self.tokens += len(ids)
        return ids


class SoftTokens(nn.Module):
    """Learned maps R^d -> n_soft * R^H, one for users and one for items, scaled to the LLM's own token-embedding norm.

    CF vectors are standardised first (each dimension, over all users or items): their mean, which every user shares and
    which is mostly popularity, would otherwise fill the token."""

    def __init__(self, user, item, hidden_size, norm, n_soft=1):
        super().__init__()
        self.n_soft = n_soft
        self.register_buffer("norm", torch.as_tensor(float(norm)))
        self.register_buffer("mean", torch.stack([user.mean(0), item.mean(0)]))  # (2, d)
        self.register_buffer("std", torch.stack([user.std(0), item.std(0)]).clamp(min=1e-6))
        self.hidden_size = hidden_size
        self.maps = nn.ModuleList(nn.Linear(user.shape[1], n_soft * hidden_size, bias=False) for _ in range(2 if n_soft else 0))

    def forward(self, side, vectors):
        """side 0 users, 1 items; vectors (B, d) -> (B, n_soft, H), each of norm `norm`."""
        if not self.n_soft:
            return vectors.new_zeros(len(vectors), 0, self.hidden_size)
        x = self.maps[side]((vectors - self.mean[side]) / self.std[side]).unflatten(-1, (self.n_soft, -1))
        return F.normalize(x, dim=-1) * self.norm


class Head(nn.Module):
    """z = W (h - mean) / std + b, from the LLM's hidden state to CF space: (B, H) -> (B, d). mean and std are of the frozen
    LLM's hidden states: a few of its dimensions are a hundred times larger than the rest and would drown them."""

    def __init__(self, hidden_size, dim):
        super().__init__()
        self.register_buffer("mean", torch.zeros(hidden_size))
        self.register_buffer("std", torch.ones(hidden_size))
        self.linear = nn.Linear(hidden_size, dim)

    def forward(self, hidden):
        return self.linear((hidden - self.mean) / self.std)


def pad(pieces, device):
    """List of id lists -> ids (B, L) and mask (B, L) int64, padded on the right."""
    length = max(map(len, pieces))
    ids = torch.tensor([piece + [0] * (length - len(piece)) for piece in pieces], device=device)
    mask = torch.tensor([[1] * len(piece) + [0] * (length - len(piece)) for piece in pieces], device=device)
    return ids, mask


def encode_whole(llm, prompt, soft_tokens, user_texts, user_vectors, item_texts, item_vectors, owner):
    """The same h(u, i), each pair's whole prompt in one plain forward pass without a cache: slower, but the only form that
    gradient checkpointing allows, and the oracle that encode() is tested against. Arguments and result as encode()."""
    device = user_vectors.device
    prefixes = [prompt.user(text) for text in user_texts]
    ids, mask = pad([prompt.shared + prefixes[own] + prompt.item(text) for own, text in zip(owner.tolist(), item_texts)], device)
    x = llm.get_input_embeddings()(ids.clamp(min=0))
    soft = torch.cat([soft_tokens(1, item_vectors), soft_tokens(0, user_vectors)[owner]], 1)
    x = x.masked_scatter((ids == SOFT)[..., None], soft.to(x.dtype))
    hidden = llm(inputs_embeds=x, attention_mask=mask, use_cache=False).last_hidden_state
    return hidden[torch.arange(len(ids), device=device), mask.sum(1) - 1].float()


def encode(llm, prompt, soft_tokens, user_texts, user_vectors, item_texts, item_vectors, owner, batch=0, instruction=None):
    """h(u, i): the hidden state of the last prompt token. The one encoder of training and generation.

    user_texts G strings, user_vectors (G, d); item_texts R strings, item_vectors (R, d); owner (R,) int64: which of the G
    users each item belongs to -> (R, H) float32. The instruction runs once, a user once, an item suffix once a pair.
    batch: suffixes a call, those of like length together, so that little of it is padding; 0: all in one call. instruction:
    the past of an earlier call's run_piece(llm, [prompt.shared]), where no gradient is wanted; None: it is run here."""
    device = user_vectors.device
    past = instruction or run_piece(llm, [prompt.shared])[2]
    _, _, past = run_piece(llm, [prompt.user(text) for text in user_texts], None, past,
                           torch.zeros(len(user_texts), dtype=torch.int64, device=device))
    soft = torch.cat([soft_tokens(1, item_vectors), soft_tokens(0, user_vectors)[owner]], 1)  # (R, 2 n_soft, H)
    pieces = [prompt.item(text) for text in item_texts]
    order = torch.tensor(sorted(range(len(pieces)), key=lambda r: len(pieces[r])) if batch else range(len(pieces)), device=device)
    result = []
    for part in order.split(batch or len(order)):
        hidden, mask, _ = run_piece(llm, [pieces[r] for r in part], soft[part], past, owner[part])
        result.append(hidden[torch.arange(len(part), device=device), mask.sum(1) - 1].float())  # the last real token of each row
    return torch.cat(result)[order.argsort()]


def run_piece(llm, pieces, soft=None, past=None, owner=None):
    """Run one piece of the prompt on top of what is cached.

    pieces: B id lists; soft (B, n_soft, H) or None, the vectors for the SOFT places; past: (key/value list, mask (P, L0)) of
    an earlier piece or None; owner (B,): which row of `past` each piece follows.
    Returns hidden states (B, L, H), mask (B, L), and the new past for (key/values, mask (B, L0 + L)).
    Padding may sit between the pieces: masks leave it out and positions are counted over real tokens only, so a row's
    hidden states are those of its own prompt run alone."""
    device = llm.get_input_embeddings().weight.device
    ids, mask = pad(pieces, device)
    x = llm.get_input_embeddings()(ids.clamp(min=0))  # (B, L, H)
    if soft is not None:
        x = x.masked_scatter((ids == SOFT)[..., None], soft.to(x.dtype))
    full, cache = mask, DynamicCache()
    if past is not None:
        keys_values, past_mask = past
        full = torch.cat([past_mask[owner], mask], 1)  # (B, L0 + L)
        cache = DynamicCache([(keys[owner], values[owner]) for keys, values in keys_values])
    position = (full.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1]:]
    out = llm(inputs_embeds=x, attention_mask=full, position_ids=position, past_key_values=cache, use_cache=True)
    keys_values = [(layer[0], layer[1]) for layer in out.past_key_values]
    return out.last_hidden_state, mask, (keys_values, full)


def encode_pairs(llm, prompt, soft_tokens, cf, texts, pairs, drop="", profile_dropout=0.0, encoder=encode):
    """h(u, i) for pairs (n, 2), with cf {"user": (U, d), "item": (I, d)} and texts (user profiles, item texts) -> (n, H).
    Training and generation both come through here.

    drop: '', 'user vector', 'user profile', 'item vector': what the prompt goes without (a vector is replaced by the mean of
    all, a profile by nothing). profile_dropout: share of the users whose profile is left out at random, so that the LLM
    cannot lean on recognising a known user's text alone. encoder: encode or encode_whole."""
    users, owner = pairs[:, 0].unique(return_inverse=True)
    blank = torch.rand(len(users)) < profile_dropout
    vectors = [table.mean(0).expand(len(ids), -1) if drop == f"{side} vector" else table[ids]
               for side, table, ids in (("user", cf["user"], users), ("item", cf["item"], pairs[:, 1]))]
    profiles = ["" if drop == "user profile" or blank[n] else texts[0][k] for n, k in enumerate(users)]
    return encoder(llm, prompt, soft_tokens, profiles, vectors[0], [texts[1][k] for k in pairs[:, 1]], vectors[1], owner)

# --------------------------------------------------------------------------------------------------
# Step 2: supervised fine-tuning with InfoNCE against CF-mined hard negatives
# --------------------------------------------------------------------------------------------------

def info_nce(z, candidates, positive, tau, ignore=None):
    """InfoNCE with one or more positives a row (van den Oord et al., 2018; MIL-NCE, Miech et al., CVPR 2020):
    -ln( sum_positive exp(s / tau) / sum_{not ignored} exp(s / tau) ), s the cosine.

    z (B, d), candidates (C, d), positive (B, C) bool, ignore (B, C) bool: candidates left out of the sum, the mask against
    false negatives -> scalar mean over B."""
    scores = F.normalize(z, dim=-1) @ F.normalize(candidates, dim=-1).T / tau  # (B, C)
    if ignore is not None:
        scores = scores.masked_fill(ignore & ~positive, -torch.inf)
    return (scores.logsumexp(1) - scores.masked_fill(~positive, -torch.inf).logsumexp(1)).mean()


class SftTask:
    """The data of fine-tuning, from train pairs and CF vectors alone: who is held back, what was mined, the candidates."""

    def __init__(self, data, cf_model, cf, texts, first, last, seed, mine="dns"):
        self.cf, self.texts, self.train, self.mine, self.cf_model = cf, texts, data["train"], mine, cf_model
        self.item_layers = cf_model.layers()[1].detach()  # (I, K, d), for mixgcf
        self.mined = mine_hard_negatives(cf_model, self.train, first, last)  # (U, M)
        # centred, so that cosine compares what tells items apart and not the direction that all popular items share
        self.candidates = cf["item"] - cf["item"].mean(0)  # (I, d)
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self.train), generator=generator)
        new_user = torch.rand(data["n_users"], generator=generator) < 0.1
        is_new = new_user[self.train[order, 0].cpu()]
        known = order[~is_new]
        n_held = min(256, max(1, len(known) // 10))
        # two held-back sets of train pairs: new pairs of users that SFT does see, and pairs of users it never sees
        self.held = {"known users": known[:n_held], "new users": order[is_new][:256]}
        self.rows = known[n_held:]  # (N,) rows of train that SFT learns from
        self.generator = generator

    def is_mined(self, rows):
        """(R, I) bool: the mined hard negatives of each row's user; made for a batch, never for all users at once."""
        users = self.train[rows, 0]
        return torch.zeros(len(rows), len(self.candidates), dtype=torch.bool, device=users.device).scatter_(1, self.mined[users], True)

    def loss(self, z, rows, tau):
        """InfoNCE over the whole catalogue: positives are u's mined items, everything else pushes away, the item i and u's
        other train items included. With mine='mixgcf' the one positive is the vector that MixGCF makes of the pair and 8 of
        the mined items; the mined items themselves are left out of the sum, since they are no worse."""
        mined = self.is_mined(rows)
        if self.mine == "dns":
            return info_nce(z, self.candidates, mined, tau)
        u, i = self.train[rows].T
        some = self.mined[u].gather(1, torch.randint(self.mined.shape[1], (len(u), 8), device=u.device))
        synthetic = mixgcf(self.cf["user"][u], self.item_layers, i, some, self.cf_model.pool) - self.cf["item"].mean(0)  # (R, d)
        own = torch.eye(len(z), dtype=torch.bool, device=z.device)
        return info_nce(z, torch.cat([self.candidates, synthetic]), torch.cat([torch.zeros_like(mined), own], 1), tau,
                        torch.cat([mined, torch.zeros_like(own)], 1))

    def hit_rate(self, z, rows):
        """How often the item nearest to z (cosine, whole catalogue) is one mined for the pair's user."""
        nearest = (F.normalize(z, dim=-1) @ F.normalize(self.candidates, dim=-1).T).argmax(1)
        return self.is_mined(rows).gather(1, nearest[:, None]).float().mean().item()

    def floors(self, rows):
        """(uniform chance, popularity floor: the hit rate of the best single item for everybody) on these rows."""
        mined = self.is_mined(rows).float()
        return mined.mean().item(), mined.mean(0).max().item()


def grouped_batches(users, rows, per_user, groups, generator, lengths=None):
    """Shuffle rows into batches of `groups` chunks, each chunk up to `per_user` rows of one user, so that a user's prefix
    is run once for several items. users (N,) of all train rows; rows (R,); lengths (N,): how long each row's prompt is, so
    that chunks of like length share a batch and little is padded -> list of int64 tensors, in random order."""
    rows = rows[torch.randperm(len(rows), generator=generator)]
    rows = rows[users[rows].argsort(stable=True)]
    chunks = [part for own in rows.split(users[rows].unique_consecutive(return_counts=True)[1].tolist())
              for part in own.split(per_user)]
    order = torch.randperm(len(chunks), generator=generator).tolist()
    if lengths is not None:  # sorted within windows of 8 batches: still near random, yet seldom padded
        longest = [int(lengths[chunk].max()) for chunk in chunks]
        order = [k for at in range(0, len(order), 8 * groups) for k in sorted(order[at:at + 8 * groups], key=longest.__getitem__)]
    batches = [torch.cat([chunks[k] for k in order[at:at + groups]]) for at in range(0, len(order), groups)]
    return [batches[k] for k in torch.randperm(len(batches), generator=generator).tolist()]


@torch.no_grad()
def encode_rows(task, llm, prompt, soft_tokens, rows, drop="", profile_dropout=0.0, batch=64, label="", rank=0, world=1):
    """encode_pairs over many rows of train, grouped by user -> h (R, H) in the order of `rows`. Each process encodes its share."""
    order = task.train[rows, 0].argsort(stable=True)
    progress = Progress(label, len(order), "pairs") if label else None
    result = torch.zeros(len(rows), llm.config.get_text_config().hidden_size, device=task.train.device)
    for n, at in enumerate(order.split(batch)):
        if n % world == rank:
            torch.manual_seed(n)  # what is left out does not depend on which process encodes it
            result[at] = encode_pairs(llm, prompt, soft_tokens, task.cf, task.texts, task.train[rows[at]], drop, profile_dropout)
        if progress:
            progress.update(min(len(order), (n + 1) * batch))
    sum_over([result])
    return result


def fit_head(task, head, hidden, rows, tau, steps=300, lr=3e-3, dropout=0.3, seed=0):
    """Warm-up: train the head alone on the frozen LLM's hidden states (N, H), so that LoRA starts from a head that already
    reads what the soft tokens and the text brought (linear probing, then fine-tuning: Kumar et al., ICLR 2022)."""
    head.mean.copy_(hidden.mean(0))
    head.std.copy_(hidden.std(0).clamp(min=1e-4))
    generator = torch.Generator(hidden.device).manual_seed(seed)
    optimizer = torch.optim.Adam(head.parameters(), lr=lr)
    for _ in range(steps):
        pick = torch.randperm(len(rows), generator=generator, device=hidden.device)[:2048]
        h = hidden[pick]
        keep = torch.rand(h.shape, generator=generator, device=h.device) >= dropout
        loss = task.loss(head(head.mean + (h - head.mean) * keep / (1 - dropout)), rows[pick], tau)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def report_held(task, llm, prompt, soft_tokens, head, label, drops=("",), rank=0, world=1):
    """Print and return hit rates on both held-back sets: {label: {set: rate}}."""
    result = {}
    for drop in drops:
        name = f"{label}, without the {drop}" if drop else label
        rates = {}
        for held, rows in task.held.items():
            if len(rows):
                hidden = encode_rows(task, llm, prompt, soft_tokens, rows, drop, rank=rank, world=world)
                rates[held] = task.hit_rate(head(hidden), rows)
        result[name] = rates
        print(f"  hit rate {name:<45}" + "".join(f"{held} {rate:.3f}   " for held, rate in rates.items()), flush=True)
    return result


def learning_rate(step, steps):
    """Share of the full rate: linear warm-up over a tenth of the steps, then cosine decay to a tenth of the rate."""
    return min((step + 1) / max(1, steps // 10), 0.55 + 0.45 * math.cos(math.pi * step / max(1, steps)))


def sft_gradients(task, llm, prompt, soft_tokens, head, trained, rows, tau, *, micro_pairs, seed, profile_dropout=0.0, encoder=encode, rank=0, world=1):
    """Loss of one step on rows (B,) of train, its gradient left in .grad of the parameters `trained`. Parts of `micro_pairs`
    pairs go one after the other, so that few activations are held at once, and every process takes each world-th part; the
    gradients add up to those of the whole batch."""
    loss = torch.zeros((), device=rows.device)
    for p in trained:  # zeros, not None: every process brings a gradient for every parameter
        p.grad = torch.zeros_like(p)
    for n, part in enumerate(rows.split(micro_pairs)):
        if n % world == rank:
            torch.manual_seed(seed * 1009 + n)  # dropout is the part's own: a resumed run repeats it
            hidden = encode_pairs(llm, prompt, soft_tokens, task.cf, task.texts, task.train[part], "", profile_dropout, encoder)
            part_loss = task.loss(head(hidden), part, tau) * len(part) / len(rows)
            part_loss.backward()
            loss += part_loss.detach()
    sum_over([loss, *(p.grad for p in trained)])
    return loss.item()


def finetune(args):
    """Fine-tune LoRA, the soft-token maps and the head; write adapter/ and sft.safetensors. Resumes after a kill."""
    run, data = Path(args.run), load_data(args.run)
    out, maker = run / f"{args.name}.safetensors", "python llm_negatives.py finetune"
    settings = {key: value for key, value in vars(args).items() if key not in
                ("run", "force", "device", "command", "name", "preset", "save_every", "checkpointing")}
    settings |= {"data": data["digest"], "llm": llm_digest(args.llm), "cf_digest": require_digest(run / args.cf, "python backbones.py pretrain"),
                 "profiles_digest": require_digest(run / args.profiles, "python llm_negatives.py profile")}
    if up_to_date(out, settings, maker, args.force):
        return
    rank, world, device = start_processes(args.device)
    data["train"] = data["train"].to(device)
    model, _, cf = load_model(run / args.cf, f"python backbones.py pretrain --run {run}", data)
    task = SftTask(data, model, cf, load_profiles(run, args.profiles), args.mine_first, args.mine_last, args.seed, args.mine)
    dtype = pick_dtype(args.dtype, device)
    llm, prompt = load_llm(args.llm, AutoModel, dtype, device, args.llm_layers), Prompt(load_tokenizer(args.llm), args.soft_tokens, args.max_tokens)
    hidden_size = llm.config.get_text_config().hidden_size
    torch.manual_seed(args.seed)
    soft_tokens = SoftTokens(cf["user"], cf["item"], hidden_size, embedding_norm(llm), args.soft_tokens).to(device)
    head = Head(hidden_size, cf["item"].shape[1]).to(device)
    encoder = encode
    if args.checkpointing:
        llm.gradient_checkpointing_enable({"use_reentrant": False})
        encoder = encode_whole
    llm = get_peft_model(llm, LoraConfig(r=args.lora_rank, lora_alpha=args.lora_alpha, lora_dropout=args.lora_dropout,
                                         target_modules=args.lora_targets.split(","), init_lora_weights=True))
    for p in llm.parameters():
        p.data = p.data.float() if p.requires_grad else p.data  # LoRA's own weights in full precision, whatever the LLM's
    lora = {f"lora.{name}": p for name, p in llm.named_parameters() if p.requires_grad}
    others = {f"{prefix}.{name}": p for prefix, module in (("soft", soft_tokens), ("head", head)) for name, p in module.named_parameters()}
    trained = [*lora.values(), *others.values()]
    optimizer = torch.optim.AdamW([{"params": list(lora.values()), "lr": args.lr}, {"params": list(others.values()), "lr": args.lr_maps}], weight_decay=0.01)
    kept = lora | others | {"head.mean": head.mean, "head.std": head.std}
    partial, share = out.with_suffix(".partial.safetensors"), {"rank": rank, "world": world}

    # the order of the data, the same whoever asks: passes over the train pairs, the first pairs for the head alone
    size = args.users_per_step * args.items_per_user
    steps = math.ceil(args.epochs * len(task.rows) / size) if args.epochs else args.steps
    lengths, order = torch.tensor([len(text) for text in task.texts[1]])[data["train"][:, 1].cpu()], []
    while sum(map(len, order)) < args.warmup_pairs + steps * size:
        order += grouped_batches(data["train"][:, 0].cpu(), task.rows.cpu(), args.items_per_user, args.users_per_step, task.generator, lengths)
    order = torch.cat(order).to(device)
    warm, batches = order[: args.warmup_pairs], order[args.warmup_pairs:].split(size)

    start = time.time()
    done, log = load_partial(partial, settings, kept, optimizer)
    if log is None:
        chance, popular = task.floors(torch.cat(list(task.held.values())))
        n_mined = task.mined.shape[1]
        log = {"dtype": str(dtype), "steps": [], "chance_loss": math.log(data["n_items"] / n_mined), "uniform_floor": chance, "popularity_floor": popular}
        print(f"finetune: {len(task.rows)} train pairs, {sum(map(len, task.held.values()))} held back; loss at chance "
              f"ln({data['n_items']}/{n_mined}) = {log['chance_loss']:.3f}; hit-rate floors: uniform {chance:.3f}, popularity {popular:.3f}", flush=True)
        log["hit_rates"] = report_held(task, llm, prompt, soft_tokens, head, "before", **share)
        if len(warm):
            hidden = encode_rows(task, llm, prompt, soft_tokens, warm, profile_dropout=args.profile_dropout, label="warm-up", **share)
            loss = fit_head(task, head, hidden, warm, args.tau_s, seed=args.seed)
            print(f"warm-up: head fitted on {len(warm)} pairs of the frozen LLM, loss {loss:.3f}", flush=True)
            log["hit_rates"] |= report_held(task, llm, prompt, soft_tokens, head, "after warm-up", **share)
        for value in kept.values() if world > 1 else ():
            dist.broadcast(value.data, 0)
    else:
        print(f"finetune: going on after step {done} of {steps}")
    progress, prompt.tokens, begin = Progress("finetune", steps, "steps"), 0, time.time()
    llm.train()
    for k in range(done, steps):
        for group, rate in zip(optimizer.param_groups, (args.lr, args.lr_maps)):
            group["lr"] = rate * learning_rate(k, steps)
        loss = sft_gradients(task, llm, prompt, soft_tokens, head, trained, batches[k], args.tau_s, micro_pairs=args.micro_pairs,
                             seed=args.seed * 1_000_003 + k, profile_dropout=args.profile_dropout, encoder=encoder, **share)
        if not math.isfinite(loss):
            fail(f"finetune: the loss is {loss} at step {k + 1}; lower --lr (now {args.lr}) or use --dtype fp32")
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        log["steps"].append(round(loss, 4))
        recent = log["steps"][-10:]
        progress.update(k + 1, f"loss {sum(recent) / len(recent):.3f}  {prompt.tokens * world / (time.time() - begin):.0f} tokens/s")
        if rank == 0 and ((k + 1) % args.save_every == 0 or k + 1 == steps):
            save_partial(partial, settings, k + 1, kept, optimizer, log)
    llm.eval()
    log["hit_rates"] |= report_held(task, llm, prompt, soft_tokens, head, "after", ("", "user vector", "user profile", "item vector"), **share)
    if rank:
        return
    adapter = run / adapter_folder(args.name)
    temporary = run / f".{adapter.name}.{os.getpid()}.tmp"
    llm.save_pretrained(temporary)
    shutil.rmtree(adapter, ignore_errors=True)
    os.replace(temporary, adapter)
    save_tensors(out, {**{f"soft.{k}": v for k, v in soft_tokens.state_dict().items()}, **{f"head.{k}": v for k, v in head.state_dict().items()}},
                 {"settings": settings, "adapter": file_digest(adapter / "adapter_model.safetensors"),
                  "dim": cf["item"].shape[1], "dtype": str(dtype).removeprefix("torch."), "prompt": prompt.template, "log": log, "seconds": time.time() - start})
    partial.unlink(missing_ok=True)
    print(f"wrote {adapter} and {out}, {time.time() - start:.0f} s")

# --------------------------------------------------------------------------------------------------
# Step 3: generation, offline, in shards
# --------------------------------------------------------------------------------------------------

@torch.no_grad()
def encode_items(llm, prompt, texts, read=True, batch=64):
    """What the LLM makes of each item's text alone: the mean of its last hidden states over the text's tokens -> (I, H) float32.
    Without read, the mean of its token embeddings: a bag of words, the control for what the layers add.
    The first token is left out: it takes the attention that goes nowhere, and its state is a hundred times larger than the
    rest (Xiao et al., attention sinks, ICLR 2024)."""
    order, result, embedding = sorted(range(len(texts)), key=lambda k: len(texts[k])), None, llm.get_input_embeddings()
    for at in range(0, len(order), batch):
        part = order[at:at + batch]
        pieces = [prompt.ids(texts[k])[:64] for k in part]
        ids, mask = pad(pieces, embedding.weight.device)
        hidden = run_piece(llm, pieces)[0] if read else embedding(ids)  # (B, L, H)
        weight = mask.float()
        weight[:, 0] = (mask.sum(1) == 1).float()  # a text of one token is all there is
        if result is None:
            result = hidden.new_zeros(len(texts), hidden.shape[-1], dtype=torch.float32)
        result[part] = torch.einsum("bl,blh->bh", weight, hidden.float()) / weight.sum(1, keepdim=True)
    return result


def choose_pairs(train, n_users, per_user, seed):
    """Up to `per_user` train rows of each user (0: all), the same ones for a seed -> row numbers (n,), sorted by user."""
    indptr = F.pad(torch.bincount(train[:, 0], minlength=n_users).cumsum(0), (1, 0))
    key = torch.rand(len(train), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    order = torch.argsort(train[:, 0].double() + key * 0.999)  # by user, random within a user
    place = torch.arange(len(train)) - indptr[train[order, 0]]
    chosen = order[place < per_user] if per_user else order
    return chosen[torch.argsort(train[chosen, 0] * (int(train[:, 1].max()) + 1) + train[chosen, 1])]


def user_blocks(users, batch):
    """Cut rows that are sorted by user into blocks of whole users of about `batch` rows -> list of index tensors."""
    counts = users.unique_consecutive(return_counts=True)[1].tolist()
    blocks, start, end = [], 0, 0
    for count in counts:
        if end - start and end - start + count > batch:
            blocks.append(torch.arange(start, end))
            start = end
        end += count
    return [*blocks, torch.arange(start, end)]


@torch.no_grad()
def generate(args):
    """Write negatives-*.safetensors: pairs (n, 2), hidden f16 (n, H) = h(u, i), vector f16 (n, d) = head(h); and
    negatives-items.safetensors: text f16 (I, H), encode_items() of titles and metadata, for the semantic alignment.

    A shard holds whole users; finished shards are kept when the run goes on after a kill. Memory is flat in the number of
    pairs: a shard is written when its users are done."""
    run, data = Path(args.run), load_data(args.run)
    sft, sft_maker = run / f"{args.sft}.safetensors", f"python llm_negatives.py finetune --run {run}"
    digest = require_digest(sft, sft_maker)
    tuned = read_meta(sft, sft_maker)["settings"]  # CF vectors and profiles are those of fine-tuning
    cf_path, profiles = run / tuned["cf"], run / tuned["profiles"]
    settings = {"data": data["digest"], "cf": require_digest(cf_path, "python backbones.py pretrain"), "sft": digest,
                "profiles": require_digest(profiles, "python llm_negatives.py profile"),
                "pairs_per_user": args.pairs_per_user, "seed": args.seed, "finetune": args.finetune, "read_items": args.read_items,
                "shard_pairs": args.shard_pairs,
                "llm": llm_digest(args.llm)}
    rows = choose_pairs(data["train"], data["n_users"], args.pairs_per_user, args.seed)
    # shard borders fall between users
    users = data["train"][rows, 0]
    ends = torch.cat([(users[1:] != users[:-1]).nonzero()[:, 0] + 1, torch.tensor([len(rows)])])
    shards, start = [], 0
    for end in ends.tolist():
        if end - start >= args.shard_pairs or end == len(rows):
            shards.append(rows[start:end])
            start = end
    paths = [run / f"{args.out}-{n:05d}.safetensors" for n in range(len(shards))]
    settings["shards"] = len(shards)
    if args.force:
        for path in run.glob(f"{args.out}-?????.safetensors"):
            path.unlink()
    maker = "python llm_negatives.py generate"
    stale = [path for path in run.glob(f"{args.out}-?????.safetensors") if read_meta(path, maker).get("settings") != settings]
    for path in sorted(stale):
        up_to_date(path, settings, maker)  # ends here, naming what differs
    todo, items_path = [(path, part) for path, part in zip(paths, shards) if not path.exists()], run / f"{args.out}-items.safetensors"
    if not todo and items_path.exists() and read_meta(items_path, maker).get("settings") == settings:
        return print(f"skip: {len(paths)} shards {args.out}-*.safetensors and {items_path.name} are up to date")
    if (tuned["cf_digest"], tuned["profiles_digest"], tuned["data"]) != (settings["cf"], settings["profiles"], data["digest"]):
        fail(f"{sft}: was fine-tuned on other CF vectors, profiles or another split; run `{sft_maker} --force`")
    rank, world, device = start_processes(args.device)
    llm, prompt, soft_tokens, head, meta = load_sft(run, args.sft, args.llm, device, lora=args.finetune)
    if not args.finetune:  # the zero-shot ablation: the LLM as it came, maps as they are before any training
        torch.manual_seed(args.seed)
        for module in (*soft_tokens.maps, head.linear):
            module.reset_parameters()
    tensors, _ = load_tensors(cf_path, "python backbones.py pretrain", device)
    if tensors["user"].shape[1] != meta["dim"]:
        fail(f"{cf_path}: vectors of width {tensors['user'].shape[1]}, the fine-tuned head has {meta['dim']}; run `{sft_maker} --force`")
    texts, train = load_profiles(run, tuned["profiles"]), data["train"].to(device)
    made = sum(len(part) for _, part in todo)
    done, todo = len(rows) - made, todo[rank::world]  # each process makes shards of its own
    in_batches = functools.partial(encode, batch=args.batch_size, instruction=run_piece(llm, [prompt.shared])[2])
    progress, begin = Progress("generate", done + sum(len(part) for _, part in todo), "pairs"), time.time()
    progress.update(done)
    for path, part in todo:
        hidden = torch.empty(len(part), head.mean.shape[0], dtype=torch.float16)
        for at in user_blocks(train[part, 0].cpu(), 8 * args.batch_size):  # many users' suffixes to sort by length
            hidden[at] = encode_pairs(llm, prompt, soft_tokens, tensors, texts, train[part[at]], encoder=in_batches).half().cpu()
            done += len(at)
            progress.update(done, f"{prompt.tokens / (time.time() - begin):.0f} tokens/s")
        if not torch.isfinite(hidden).all():
            fail(f"generate: hidden states of {path.name} are not finite in float16; use --dtype fp32 in finetune")
        vector = head(hidden.to(device).float()).half()
        save_tensors(path, {"pairs": train[part], "hidden": hidden, "vector": vector}, {"settings": settings})
    if rank == 0:
        items = read_jsonl(run / "items.jsonl", "python hnlmrec.py prepare")
        text = encode_items(llm, prompt, [f"{row['title']}. {row['text']}" for row in items], args.read_items)
        save_tensors(items_path, {"text": text.half()}, {"settings": settings})
    if world > 1:
        dist.barrier()
    print(f"generate: {made} pairs in {time.time() - begin:.0f} s, {prompt.tokens * world / (time.time() - begin):.0f} tokens/s; "
          f"{len(paths)} shards {args.out}-*.safetensors and {items_path.name} are there")

# --------------------------------------------------------------------------------------------------
# Step 1: profiles (the paper's system prompt, item metadata -> item profile, sampled history -> user profile)
# --------------------------------------------------------------------------------------------------

ITEM_SYSTEM = "You describe, in one short sentence, what an item is like and who would enjoy it."
USER_SYSTEM = "You describe, in one short sentence, the taste of a person from the items they liked."


def item_request(item):
    """The user turn for one row of items.jsonl."""
    return f"Item: {item['title']}. {item['text']}".strip()


def user_request(history, reviews):
    """The user turn for one user: history is a list of (title, profile), reviews a list of the user's own texts."""
    lines = [f"- {title}: {profile}" for title, profile in history] + [f"They wrote: {text}" for text in reviews]
    return "Liked items:\n" + "\n".join(lines)


def first_sentence(text):
    """One line, cut after the last full sentence end if there is one, so that a token limit leaves no half sentence."""
    text = " ".join(text.split())
    end = max(text.rfind(mark) for mark in ".!?")
    return text[: end + 1] if end > 0 else text


def chat(tokenizer, system, user):
    """One system and one user turn, ready for the answer, in the model's chat format; plain text where it has none.
    Models whose template knows no system role get both in the user turn."""
    if not tokenizer.chat_template:
        return f"{tokenizer.bos_token or ''}{system}\n{user}\n"
    try:
        turns = [{"role": "system", "content": system}, {"role": "user", "content": user}]
        return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    except Exception:  # noqa: BLE001 jinja's raise_exception("System role not supported")
        return tokenizer.apply_chat_template([{"role": "user", "content": f"{system}\n{user}"}], tokenize=False,
                                             add_generation_prompt=True)


@torch.no_grad()
def write_texts(model, tokenizer, requests, new_tokens):
    """Greedy, batched, left-padded decoding with the model's key/value cache: list of prompts -> (list of sentences, number of
    tokens read and written). The same on each run."""
    tokenizer.padding_side = "left"
    batch = tokenizer(requests, return_tensors="pt", padding=True, add_special_tokens=False).to(model.device)
    out = model.generate(**batch, max_new_tokens=new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    texts = tokenizer.batch_decode(out[:, batch.input_ids.shape[1]:], skip_special_tokens=True)
    return [first_sentence(text) for text in texts], int(batch.attention_mask.sum()) + out[:, batch.input_ids.shape[1]:].numel()


def profile(args):
    """Write profiles.jsonl, items first, since users' prompts quote their items' profiles. Resumes after a kill."""
    data, run = load_data(args.run), Path(args.run)
    items = read_jsonl(run / "items.jsonl", "python hnlmrec.py prepare")
    users = read_jsonl(run / "users.jsonl", "python hnlmrec.py prepare")
    path, (rank, world, device) = run / args.out, start_processes(args.device)
    settings = {"data": data["digest"], "profiles": args.profiles, "history": args.history, "new_tokens": args.new_tokens,
                "llm_rows": args.llm_rows, "llm": llm_digest(args.llm) if args.profiles == "llm" else "", "seed": args.seed}
    made = {}
    if path.exists() and not args.force:
        rows = read_jsonl(path, "python llm_negatives.py profile", growing=True)
        old = rows[0].get("settings") if rows else settings
        if old != settings:
            differ = [name for name in settings if old.get(name) != settings[name]]
            fail(f"{path}: made with other settings ({', '.join(differ)}); add --force to `python llm_negatives.py profile` "
                 "to remake it, or choose another folder")
        made = {(row["kind"], row["raw"]): row["profile"] for row in rows[1:]}
    total = len(items) + len(users)
    if len(made) == total:
        return print(f"skip: {path} is up to date")

    indptr, rows = user_rows(data["train"], data["n_users"])
    generator = torch.Generator().manual_seed(args.seed)
    histories = []  # drawn for all users in order, so that a resumed run asks for the same items
    for u in range(data["n_users"]):
        own = rows[indptr[u]:indptr[u + 1]]
        histories.append(own[torch.randperm(len(own), generator=generator)[: args.history]].tolist())
    model = tokenizer = None
    if args.profiles == "llm":
        tokenizer = load_tokenizer(args.llm)
        model = load_llm(args.llm, AutoModelForCausalLM, pick_dtype(args.dtype, device), device)

    popularity = torch.bincount(data["train"][:, 1], minlength=data["n_items"])
    limit = args.llm_rows or total
    chosen_items = set(popularity.argsort(descending=True, stable=True)[:limit].tolist())
    kept = [{"settings": settings}] + [{"kind": kind, "raw": raw, "profile": text} for (kind, raw), text in made.items()]
    if rank == 0:  # whole lines alone; new ones are appended below
        write_atomic(path, "".join(json.dumps(line) + "\n" for line in kept).encode())
    progress, written, tokens, start = Progress("profile", total, "profiles"), 0, 0, time.time()
    with open(path if rank == 0 else os.devnull, "a", encoding="utf-8") as file:

        def write(kind, raws, texts):
            for raw, text in zip(raws, texts):
                made[kind, raw] = text
                file.write(json.dumps({"kind": kind, "raw": raw, "profile": text}) + "\n")
            file.flush()
            progress.update(len(made), f"{tokens / (time.time() - start):.0f} tokens/s" if tokens else "")

        for kind, group in (("item", items), ("user", users)):
            todo = [n for n, row in enumerate(group) if (kind, row["raw"]) not in made]
            by_llm = [n for n in todo if args.profiles == "llm" and (n in chosen_items if kind == "item" else n < limit)]
            by_template = sorted(set(todo) - set(by_llm))
            if kind == "item":
                write(kind, [items[n]["raw"] for n in by_template], [items[n]["text"] for n in by_template])
                prompts = {n: item_request(items[n]) for n in by_llm}
            else:
                titles = [[items[i]["title"] for i in histories[n]] for n in by_template]
                write(kind, [users[n]["raw"] for n in by_template], ["Likes " + "; ".join(names) + "." for names in titles])
                prompts = {n: user_request([(items[i]["title"], made["item", items[i]["raw"]]) for i in histories[n]],
                                           users[n].get("reviews", [])[:2]) for n in by_llm}
            by_llm.sort(key=lambda n: len(prompts[n]))  # like lengths together: less padding
            system = ITEM_SYSTEM if kind == "item" else USER_SYSTEM
            for at in range(0, len(by_llm), args.batch_size * world):
                parts = [by_llm[b:b + args.batch_size] for b in range(at, min(at + args.batch_size * world, len(by_llm)), args.batch_size)]
                texts, count = ([], 0) if rank >= len(parts) else write_texts(
                    model, tokenizer, [chat(tokenizer, system, prompts[n]) for n in parts[rank]], args.new_tokens)
                results = [(texts, count)]
                if world > 1:  # everybody needs the items' profiles for the users' prompts
                    results = [None] * world
                    dist.all_gather_object(results, (texts, count))
                for part, (texts, count) in zip(parts, results):
                    tokens, written = tokens + count, written + len(part)
                    write(kind, [group[n]["raw"] for n in part], [text or group[n].get("text", "") for n, text in zip(part, texts)])
    seconds = time.time() - start
    print(f"profile: {written} written by the LLM, {total - written} from metadata or an earlier run, {seconds:.0f} s, "
          f"{tokens / seconds:.0f} tokens/s, read and written")
    print(f"wrote {path}")

# --------------------------------------------------------------------------------------------------
# The LLM: loading, digest, number format
# --------------------------------------------------------------------------------------------------

def pick_dtype(name, device):
    """auto, fp32, bf16 or fp16 -> torch dtype. auto is bf16 where the device multiplies bf16 matrices clearly faster than
    fp32 ones (most GPUs; CPUs with AVX512-BF16 or AMX), found by timing both for a few milliseconds."""
    if name != "auto":
        return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.ones(512, 512, dtype=dtype, device=device)
        laps = []
        for _ in range(6):
            start = time.perf_counter()
            (a @ a).sum().item()
            laps.append(time.perf_counter() - start)
        seconds[dtype] = min(laps[1:])
    return torch.bfloat16 if seconds[torch.bfloat16] * 1.3 < seconds[torch.float32] else torch.float32


def load_tokenizer(llm):
    """The tokenizer of a Hugging Face id or a local folder; a missing pad token becomes the end-of-text token."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(llm)
    except Exception as error:  # noqa: BLE001 the library raises many kinds; all mean the same to the user
        fail(f"--llm {llm}: no tokenizer can be loaded from it ({type(error).__name__}: {str(error)[:200]}); "
             "give a local folder or a Hugging Face id that this machine can reach")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer


def load_llm(llm, cls, dtype, device, layers=0):
    """The model of a Hugging Face id or a local folder, in eval mode, frozen. layers > 0 keeps only the first layers;
    the rest is neither loaded nor run. cls: AutoModel (hidden states, no logits) or AutoModelForCausalLM."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)  # renamed arguments inside the libraries, not the user's to mend
    try:
        model = cls.from_pretrained(llm, dtype=dtype, **({"num_hidden_layers": layers} if layers else {}))
    except Exception as error:  # noqa: BLE001 as above
        fail(f"--llm {llm}: no model can be loaded from it ({type(error).__name__}: {str(error)[:200]}); "
             "give a local folder with config.json and safetensors weights, or a Hugging Face id that this machine can reach")
    return model.requires_grad_(False).eval().to(device)


@torch.no_grad()
def embedding_norm(llm):
    """Mean norm of what the embedding gives, over the vocabulary. Not that of its weights: Gemma's embedding scales them."""
    embed = llm.get_input_embeddings()
    ids = torch.arange(embed.weight.shape[0], device=embed.weight.device)
    return torch.cat([embed(part).float().norm(dim=1) for part in ids.split(4096)]).mean()


def llm_digest(llm):
    """16 hex digits that tell one local model folder from another: its config, and the name, size and first MiB of each
    weight file (an 8B model is not read whole). A hub id stands for itself."""
    folder = Path(llm)
    if not folder.is_dir():
        return llm
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("config.json"), *folder.glob("*.safetensors")]):
        with open(path, "rb") as file:
            digest.update(f"{path.name} {path.stat().st_size}".encode() + file.read(2**20))
    return digest.hexdigest()[:16]

# --------------------------------------------------------------------------------------------------
# Files: profiles in, adapter and fine-tuned maps out, half-finished states
# --------------------------------------------------------------------------------------------------

def load_profiles(run, name="profiles.jsonl"):
    """Profiles in the order of the contiguous ids -> (user profiles list[str], item texts list[str]).

    An item's text is its title, then its profile. Raises SystemExit2 when profiles are missing."""
    maker = f"python llm_negatives.py profile --run {run} --out {name}"
    users = read_jsonl(Path(run) / "users.jsonl", f"python hnlmrec.py prepare --run {run}")
    items = read_jsonl(Path(run) / "items.jsonl", f"python hnlmrec.py prepare --run {run}")
    rows = read_jsonl(Path(run) / name, maker, growing=True)
    made = {(row["kind"], row["raw"]): row["profile"] for row in rows[1:]}
    missing = [raw for kind, group in (("user", users), ("item", items)) for raw in
               (row["raw"] for row in group) if (kind, raw) not in made]
    if missing:
        fail(f"{Path(run) / name}: {len(missing)} profiles are missing, the first for {missing[0]!r}; run `{maker}` again")
    return ([made["user", row["raw"]] for row in users],
            [f"{row['title']}. {made['item', row['raw']]}" for row in items])


def adapter_folder(name):
    """sft -> adapter, sft-template -> adapter-template: LoRA's folder beside NAME.safetensors."""
    return "adapter" + name.removeprefix("sft")


def load_sft(run, name, llm, device, lora=True):
    """The fine-tuned encoder of NAME.safetensors -> (llm, prompt, soft_tokens, head, meta). Refuses an adapter of another LLM or CF width, and
    one that does not belong to sft.safetensors; an adapter that cannot be loaded is an error, never skipped.
    lora=False leaves the LLM as it came (with the maps and head of `name`)."""
    maker = f"python llm_negatives.py finetune --run {run}"
    path, adapter = run / f"{name}.safetensors", run / adapter_folder(name)
    tensors, meta = load_tensors(path, maker, device)
    s = meta["settings"]
    if s["llm"] != llm_digest(llm):
        fail(f"{path}: was fine-tuned on another LLM than --llm {llm}; give that one, or run `{maker} --force`")
    dtype = getattr(torch, meta["dtype"])
    model = load_llm(llm, AutoModel, dtype, device, s["llm_layers"])
    if lora:
        weights = adapter / "adapter_model.safetensors"
        if not weights.exists() or file_digest(weights) != meta["adapter"]:
            fail(f"{adapter}: missing, or not the adapter that {path.name} was saved with; run `{maker} --force`")
        try:
            model = PeftModel.from_pretrained(model, adapter).eval()
        except Exception as error:  # noqa: BLE001 as above
            fail(f"{adapter}: does not fit --llm {llm} ({type(error).__name__}: {str(error)[:200]}); run `{maker} --force`")
    d, hidden_size = meta["dim"], model.config.get_text_config().hidden_size
    soft_tokens = SoftTokens(torch.zeros(2, d), torch.zeros(2, d), hidden_size, 1.0, s["soft_tokens"]).to(device)
    head = Head(hidden_size, d).to(device)
    restore({"soft": soft_tokens, "head": head}, tensors)
    return model, Prompt(load_tokenizer(llm), s["soft_tokens"], s["max_tokens"]), soft_tokens.eval(), head.eval(), meta


def save_partial(path, settings, step, modules, optimizer, log):
    """Everything that training needs to go on after `step` steps: weights, Adam's moments, the log."""
    tensors = {key: p for key, p in modules.items()}
    for n, state in optimizer.state_dict()["state"].items():
        tensors |= {f"adam.{n}.{key}": torch.as_tensor(value) for key, value in state.items()}
    save_tensors(path, tensors, {"settings": settings, "step": step, "log": log})


def load_partial(path, settings, modules, optimizer):
    """Undo save_partial -> (step, log), or (0, None) when there is nothing to go on from."""
    if not path.exists():
        return 0, None
    tensors, meta = load_tensors(path, "python llm_negatives.py finetune")
    if meta["settings"] != json.loads(json.dumps(settings)):
        print(f"{path}: half-finished with other settings; starting anew")
        return 0, None
    for key, p in modules.items():
        p.data.copy_(tensors[key])
    state = optimizer.state_dict()
    for key, value in tensors.items():
        if key.startswith("adam."):
            _, n, name = key.split(".")
            state["state"].setdefault(int(n), {})[name] = value
    optimizer.load_state_dict(state)
    return meta["step"], meta["log"]

# --------------------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------------------

PAPER = {"llm": "meta-llama/Meta-Llama-3-8B-Instruct", "llm_layers": 0, "lora_rank": 32, "lora_alpha": 8.0, "lora_dropout": 0.05, "lr": 2e-5, "tau_s": 0.05,
             "epochs": 5.0, "dtype": "bf16"}  # what the paper states; its alpha of LoRA is not stated


def main(argv=None):
    parser = Parser(prog="llm_negatives.py", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)

    def command(name, text, example):
        p = commands.add_parser(name, help=text, description=text, epilog=f"example: python llm_negatives.py {name} --run runs/demo {example}")
        p.add_argument("--run", required=True, metavar="DIR", help="run folder, as made by `hnlmrec.py prepare`")
        p.add_argument("--llm", default="assets/SmolLM2-135M-Instruct", help="local folder or Hugging Face id of a causal LM")
        p.add_argument("--preset", choices=["paper"], help="the paper's LLM and settings; flags given beside it win")
        p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
        p.add_argument("--seed", type=number(int, 0), default=0, help="decides every random choice of this step")
        p.add_argument("--force", action="store_true", help="remake the output though it was made with other settings")
        return p

    p = command("profile", "write a text profile of each user and item", "--profiles template")
    p.add_argument("--profiles", choices=["llm", "template"], default="llm", help="who writes them; template uses metadata alone")
    p.add_argument("--history", type=number(int, 1), default=4, help="train items quoted in a user's prompt")
    p.add_argument("--new-tokens", type=number(int, 1), default=40, help="tokens written at most")
    p.add_argument("--llm-rows", type=number(int, 0), default=0, help="users and items that the LLM writes for; 0: all")
    p.add_argument("--batch-size", type=number(int, 1), default=32, help="prompts a call (64 takes 4.3 GiB, 32 takes 2.9)")
    p.add_argument("--dtype", choices=["auto", "fp32", "bf16", "fp16"], default="auto", help="weights of the LLM")
    p.add_argument("--out", default="profiles.jsonl", help="output file inside the run folder")

    p = command("finetune", "LoRA fine-tuning with InfoNCE against CF-mined hard negatives", "--steps 100")
    p.add_argument("--cf", default="cf.safetensors", help="CF vectors, inside the run folder")
    p.add_argument("--profiles", default="profiles.jsonl", help="profiles, inside the run folder")
    p.add_argument("--name", default="sft", help="first part of the output's name: NAME.safetensors, and adapter/ or adapter-…/")
    g = p.add_argument_group("what is learned")
    g.add_argument("--mine", choices=["dns", "mixgcf"], default="dns", help="targets: the mined items, or MixGCF's mixture of them")
    g.add_argument("--mine-first", type=number(int, 1), default=200, help="best rank of the mined band")
    g.add_argument("--mine-last", type=number(int, 1), default=300, help="last rank of the mined band")
    g.add_argument("--tau-s", type=number(float, 0, open_low=True), default=0.05, help="InfoNCE temperature")
    g.add_argument("--soft-tokens", type=number(int, 0), default=1, help="soft tokens for each CF vector; 0: none (an ablation)")
    g.add_argument("--max-tokens", type=number(int, 1), default=48, help="tokens of a profile at most; longer ones are cut")
    g.add_argument("--profile-dropout", type=number(float, 0, 1), default=0.2, help="share of users trained without their profile")
    g = p.add_argument_group("the LLM and LoRA")
    g.add_argument("--llm-layers", type=number(int, 0), default=8, help="first layers that are kept; 0: all")
    g.add_argument("--dtype", choices=["auto", "fp32", "bf16", "fp16"], default="auto", help="weights of the LLM; LoRA's own are fp32")
    g.add_argument("--lora-rank", type=number(int, 1), default=8, help="LoRA r")
    g.add_argument("--lora-alpha", type=number(float, 0, open_low=True), default=16, help="LoRA alpha")
    g.add_argument("--lora-dropout", type=number(float, 0, 1), default=0.05, help="LoRA dropout")
    g.add_argument("--lora-targets", default="q_proj,k_proj,v_proj,o_proj", help="linear layers with LoRA, by name")
    g = p.add_argument_group("steps")
    g.add_argument("--warmup-pairs", type=number(int, 0), default=2048, help="pairs the head is fitted on before LoRA; 0: none")
    g.add_argument("--steps", type=number(int, 0), default=60, help="LoRA steps")
    g.add_argument("--epochs", type=number(float, 0), default=0, help="passes over the train pairs instead of --steps; 0: --steps counts")
    g.add_argument("--users-per-step", type=number(int, 1), default=16, help="users a step")
    g.add_argument("--items-per-user", type=number(int, 1), default=2, help="pairs of each user in a step, at most")
    g.add_argument("--micro-pairs", type=number(int, 1), default=8, help="pairs whose activations are held at once")
    g.add_argument("--checkpointing", action="store_true", help="gradient checkpointing: less memory, more time, no shared prefix")
    g.add_argument("--lr", type=number(float, 0, open_low=True), default=5e-4, help="learning rate of LoRA")
    g.add_argument("--lr-maps", type=number(float, 0, open_low=True), default=3e-4, help="learning rate of soft-token maps and head")
    g.add_argument("--save-every", type=number(int, 1), default=20, help="steps between the states that a killed run goes on from")

    p = command("generate", "write the hard negatives' vectors for the train pairs", "--pairs-per-user 8")
    p.add_argument("--sft", default="sft", help="the --name that fine-tuning was given")
    p.add_argument("--pairs-per-user", type=number(int, 0), default=0, help="train pairs of each user; 0: all")
    p.add_argument("--no-finetune", dest="finetune", action="store_false", help="zero-shot ablation: the LLM and maps before fine-tuning")
    p.add_argument("--bag-of-words", dest="read_items", action="store_false", help="ablation: items' texts as means of token embeddings, no layer run")
    p.add_argument("--out", default="negatives", help="first part of the shards' names")
    p.add_argument("--batch-size", type=number(int, 1), default=96, help="pairs a call")
    p.add_argument("--shard-pairs", type=number(int, 1), default=2048, help="pairs a shard, at least")

    args = parser.parse_args(argv)
    if args.preset:
        p = commands.choices[args.command]
        p.set_defaults(**{key: value for key, value in PAPER.items() if key in vars(args)})
        args = parser.parse_args(argv)
    {"profile": profile, "finetune": finetune, "generate": generate}[args.command](args)


if __name__ == "__main__":
    run_cli(main)
    end_processes()
