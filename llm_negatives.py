"""llm_negatives.py: an LLM makes hard negatives, and judges which negatives are likely false.

Three steps make the negatives; the judge, the fourth, needs only the data.

profile   items.jsonl, users.jsonl, data.safetensors (train pairs) -> profiles.jsonl: a sentence on
          who would enjoy an item, and a sentence on what a user enjoys, written by the LLM (or
          built from metadata: --profiles template).
finetune  cf.safetensors + profiles.jsonl -> adapter/ (LoRA, peft's format) + sft.safetensors
          (soft-token maps, head). h(u, i) is the LLM's hidden state at the last prompt token,
          z = head(h), and InfoNCE pulls z to the CF vectors of the hard negatives mined for u, away
          from those of i, of u's other train items and of the rest of the catalogue:
              L = -ln( sum_{j in mined(u)} exp(cos(z, e_j) / tau_s)
                       / sum_{j} exp(cos(z, e_j) / tau_s) )
generate  the same prompts, the same encode(), the same adapter -> negatives-00000.safetensors …:
          h and z of train pairs; negatives-items.safetensors: the LLM's reading of each item.
judge     items.jsonl, data.safetensors (train pairs) -> judge.safetensors: by a frozen LLM's
          reading of the texts alone, what a user likes (how like an item is to the user's items:
          history, item (I, k)), and of each user the likely false hard negatives (U, n), for
          `hnlmrec.py train --lambda-f` and `blend`.

The method comes first (prompt, encoding, fine-tuning, judge, generation), then profiles, then the
loading of LLMs and files.

Alone:  python llm_negatives.py finetune --run runs/NAME --llm assets/SmolLM2-135M-Instruct
More than one GPU:  torchrun --nproc-per-node N -- llm_negatives.py finetune … (also profile and
generate)
"""

import functools
import hashlib
import json
import math
import os
import re
import shutil
import time
import warnings
from argparse import Namespace
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers import logging as transformers_logging
from transformers.cache_utils import DynamicLayer
from transformers.pytorch_utils import Conv1D

from backbones import (
    Parser,
    Progress,
    add_band_flags,
    add_run_flags,
    check_finite,
    check_inputs,
    end_processes,
    fail,
    fit,
    from_first,
    kernel_of,
    leave_out,
    load_data,
    load_model,
    load_tensors,
    mine_hard_negatives,
    mining_band,
    mixgcf,
    number,
    output_name,
    own_among,
    rank,
    read_jsonl,
    read_meta,
    restore,
    rows_of,
    run_cli,
    sampled_softmax_loss,
    save_tensors,
    settings_of,
    several,
    soft_maximum,
    stamp,
    start_processes,
    sum_over,
    take,
    up_to_date,
    user_rows,
    validation,
    whiten,
    world,
    write_atomic,
)

# --------------------------------------------------------------------------------------------------
# The hybrid prompt: text plus soft tokens, in four pieces so that what is shared is computed once
# shared instruction | user: profile | item: title and profile | ask, with the item vector and the
# user vector. The user vector comes last, so that the hidden state that is read, of the last token,
# starts from e_u itself and gathers the item and the texts by attention. Measured on ML-100K,
# frozen LLM of 8 layers, a head fitted on 3,000 pairs: e_u of users unseen in fitting is read back
# linearly from h with R2 .39, and the nearest item is a mined one for .93 of held-back pairs; with
# each vector after its own text, as in "User: … [vector] Item: … [vector]", R2 .03 and .78.
# --------------------------------------------------------------------------------------------------

SOFT = -1  # in a list of token ids: "a soft token goes here"
INSTRUCTION = ("Name a hard negative: an item close to this user's taste that the user would still "
               "not choose.")


class Prompt:
    """Token ids of the prompt's pieces for one tokenizer. SOFT marks the places of the soft tokens;
    n_soft = 0 is the prompt of the ablation without CF vectors. `tokens` counts the ids that were
    run, for the log.

    frame: (head, tail), the chat template around the pieces as chat_frame() gave it to an earlier
    step, since a template may print the date; None: rendered now. Pieces are tokenized one by one,
    in training and generation alike, so that a prefix is the same ids for all its items."""

    def __init__(self, tokenizer, n_soft=1, max_tokens=48, frame=None):
        self.tokenizer, self.n_soft, self.max_tokens = tokenizer, n_soft, max_tokens
        self.frame = head, tail = frame or chat_frame(tokenizer, INSTRUCTION)
        self.tokens, soft = 0, [SOFT] * n_soft
        self.shared, self.ask = frame_ids(tokenizer, head), frame_ids(tokenizer, tail)
        self.template = head + "User: {user}\nItem: {item}" + tail  # for people
        if n_soft:
            self.ask = frame_ids(tokenizer, tail + "Item vector:") + soft
            self.ask += self.ids(" User vector:") + soft
            self.template += "Item vector:[e_i] User vector:[e_u]"

    def ids(self, text):
        """Any text -> ids, as nothing but text."""
        return text_ids(self.tokenizer, text)

    def user(self, text):
        """profile -> ids."""
        return self.ids("User: ") + self.ids(text)[: self.max_tokens]

    def item(self, text):
        """title and profile -> ids, followed by the ask, whose last token is the one that is
        read."""
        return self.ids("\nItem: ") + self.ids(text)[: self.max_tokens] + self.ask


class SoftTokens(nn.Module):
    """Learned maps R^d -> n_soft * R^H, one for users and one for items, scaled to the LLM's own
    token-embedding norm.

    CF vectors are standardised first (each dimension, over all users or items): their mean, which
    every user shares and which is mostly popularity, would otherwise fill the token."""

    def __init__(self, user, item, hidden_size, norm, n_soft=1):
        super().__init__()
        self.n_soft, self.hidden_size = n_soft, hidden_size
        mean, std = [user.mean(0), item.mean(0)], [user.std(0), item.std(0)]
        self.register_buffer("norm", torch.as_tensor(float(norm)))
        self.register_buffer("mean", torch.stack(mean))  # (2, d)
        self.register_buffer("std", torch.stack(std).clamp(min=1e-6))
        self.maps = nn.ModuleList()
        for _ in range(2 if n_soft else 0):
            self.maps.append(nn.Linear(user.shape[1], n_soft * hidden_size, bias=False))

    def forward(self, side, vectors):
        """side 0 users, 1 items; vectors (B, d) -> (B, n_soft, H), each of norm `norm`."""
        if not self.n_soft:
            return vectors.new_zeros(len(vectors), 0, self.hidden_size)
        x = self.maps[side]((vectors - self.mean[side]) / self.std[side])
        return F.normalize(x.unflatten(-1, (self.n_soft, -1)), dim=-1) * self.norm


class Head(nn.Module):
    """z = W (h - mean) / std + b, from the LLM's hidden state to CF space: (B, H) -> (B, d). mean
    and std are of the frozen LLM's hidden states: a few of its dimensions are a hundred times
    larger than the rest and would drown them."""

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
    ids = [piece + [0] * (length - len(piece)) for piece in pieces]
    mask = [[1] * len(piece) + [0] * (length - len(piece)) for piece in pieces]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def encode_whole(llm, prompt, soft_tokens, user_texts, user_vectors, item_texts, item_vectors,
                 owner):
    """What encode() computes, written plainly: each pair's whole prompt in one forward pass without
    a cache. Slower, but the only form that gradient checkpointing allows, and the oracle that
    encode() is tested against. Arguments and result as encode()."""
    device = user_vectors.device
    prefixes = [prompt.user(text) for text in user_texts]
    pieces = []
    for own, text in zip(owner.tolist(), item_texts):
        pieces.append(prompt.shared + prefixes[own] + prompt.item(text))
    prompt.tokens += sum(map(len, pieces))
    ids, mask = pad(pieces, device)
    x = llm.get_input_embeddings()(ids.clamp(min=0))  # (R, L, H)
    soft = torch.cat([soft_tokens(1, item_vectors), soft_tokens(0, user_vectors)[owner]], 1)
    x = x.masked_scatter((ids == SOFT)[..., None], soft.to(x.dtype))
    hidden = llm(inputs_embeds=x, attention_mask=mask, use_cache=False).last_hidden_state
    return hidden[torch.arange(len(ids), device=device), mask.sum(1) - 1].float()


def encode(llm, prompt, soft_tokens, user_texts, user_vectors, item_texts, item_vectors, owner,
           batch=0, instruction=None):
    """h(u, i): the hidden state of the last prompt token. The one encoder of training and
    generation.

    llm: a decoder without its language-model head (AutoModel), as for run_piece; prompt: a Prompt
    of its tokenizer; soft_tokens: a SoftTokens of its width, with the prompt's n_soft.
    user_texts G strings, user_vectors (G, d); item_texts R strings, item_vectors (R, d); owner (R,)
    int64: which of the G users each item belongs to -> (R, H) float32. The instruction runs once, a
    user once, an item suffix once a pair.
    batch: suffixes a call, those of like length together, so that little of it is padding; 0: all
    in one call. instruction: the past of an earlier call's run_piece(llm, [prompt.shared]), where
    no gradient is wanted; None: it is run here."""
    device = user_vectors.device
    prefixes = [prompt.user(text) for text in user_texts]
    pieces = [prompt.item(text) for text in item_texts]
    longest = len(prompt.shared) + max(map(len, prefixes)) + max(map(len, pieces))

    # the instruction once for all, each user once on top of it
    if longest <= attention_window(llm):
        prompt.tokens += sum(map(len, prefixes))
        past = instruction or run_piece(llm, [prompt.shared])[2]
        first = torch.zeros(len(prefixes), dtype=torch.int64, device=device)
        past = run_piece(llm, prefixes, None, past, first)[2]
    else:  # padding between pieces would use up part of the window: run whole prompts
        past = None
        for row, own in enumerate(owner.tolist()):
            pieces[row] = prompt.shared + prefixes[own] + pieces[row]
    prompt.tokens += sum(map(len, pieces))

    # the suffixes, each on top of its user; item's soft tokens before the user's, as in the prompt
    soft = torch.cat([soft_tokens(1, item_vectors), soft_tokens(0, user_vectors)[owner]], 1)
    order = torch.arange(len(pieces), device=device)
    if batch:
        order = torch.tensor([len(piece) for piece in pieces], device=device).argsort(stable=True)
    result = []
    for part in order.split(batch or len(order)):
        hidden, mask, _ = run_piece(llm, [pieces[r] for r in part], soft[part], past, owner[part])
        last = mask.sum(1) - 1  # the last real token of each row
        result.append(hidden[torch.arange(len(part), device=device), last].float())
    return torch.cat(result)[order.argsort()]


def run_piece(llm, pieces, soft=None, past=None, owner=None):
    """Run one piece of the prompt on top of what is cached.

    llm: a decoder whose output has last_hidden_state (AutoModel, or model.base_model of a causal
    LM: not the causal LM itself, whose output is logits), that takes inputs_embeds, position_ids
    and a key/value cache.
    pieces: B id lists; soft (B, n_soft, H) or None, the vectors for the SOFT places; past:
    (key/value list, mask (P, L0)) of an earlier piece or None; owner (B,): which row of `past` each
    piece follows, None: row b follows row b.
    Returns hidden states (B, L, H), mask (B, L), and the new past for (key/values, mask (B, L0 +
    L)). Padding may sit between the pieces: masks leave it out and positions are counted over real
    tokens only, so a row's hidden states are those of its own prompt run alone, as long as no
    attention window (attention_window) is shorter than L0 + L."""
    # what goes in: embeddings of the ids, vectors in the SOFT places
    ids, mask = pad(pieces, llm.get_input_embeddings().weight.device)
    x = llm.get_input_embeddings()(ids.clamp(min=0))  # (B, L, H)
    if soft is not None:
        x = x.masked_scatter((ids == SOFT)[..., None], soft.to(x.dtype))

    # what came before, one past for each row: a copy, unless it is a cache that may be written into
    full, cache, in_place = mask, DynamicCache(), False
    if past is not None:
        keys_values, past_mask = past
        if owner is not None:
            past_mask = past_mask[owner]
            keys_values = [(keys[owner], values[owner]) for keys, values in keys_values]
        full = torch.cat([past_mask, mask], 1)  # (B, L0 + L)
        in_place = isinstance(keys_values, DynamicCache)
        cache = keys_values if in_place else DynamicCache(keys_values)

    # padding has no position of its own: the token after it goes on where the one before it was
    position = (full.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1]:]  # (B, L)
    out = llm(inputs_embeds=x, attention_mask=full, position_ids=position, past_key_values=cache,
              use_cache=True)
    if not in_place:
        keys_values = [(layer[0], layer[1]) for layer in out.past_key_values]
    return out.last_hidden_state, mask, (keys_values, full)


def attention_window(llm):
    """Tokens that the LLM's narrowest layer looks back over; infinity where every layer sees all.
    The libraries measure it in cache slots, padding included."""
    config = llm.config.get_text_config()
    names = ("sliding_window", "attention_chunk_size", "window_size")
    windows = [getattr(config, name, None) for name in names]
    return min((window for window in windows if isinstance(window, int)), default=math.inf)


def encode_pairs(llm, prompt, soft_tokens, cf, texts, pairs, drop="", profile_dropout=0.0,
                 encoder=encode):
    """h(u, i) for pairs (n, 2), with cf {"user": (U, d), "item": (I, d)} and texts (user profiles,
    item texts) -> (n, H). Training and generation both come through here; llm, prompt, soft_tokens
    as for encode().

    drop: '', 'user vector', 'user profile', 'item vector': what the prompt goes without (a vector
    is replaced by the mean of all, a profile by nothing). profile_dropout: share of the users whose
    profile is left out at random, so that the LLM cannot lean on recognising a known user's text
    alone. encoder: encode or encode_whole."""
    users, owner = pairs[:, 0].unique(return_inverse=True)
    blank = torch.rand(len(users)) < profile_dropout
    profiles = []
    for n, user in enumerate(users.tolist()):
        left_out = drop == "user profile" or blank[n]
        profiles.append("" if left_out else texts[0][user])
    titles = [texts[1][item] for item in pairs[:, 1].tolist()]
    user_vectors, item_vectors = cf["user"][users], cf["item"][pairs[:, 1]]
    if drop == "user vector":
        user_vectors = cf["user"].mean(0).expand_as(user_vectors)
    if drop == "item vector":
        item_vectors = cf["item"].mean(0).expand_as(item_vectors)
    return encoder(llm, prompt, soft_tokens, profiles, user_vectors, titles, item_vectors, owner)

# --------------------------------------------------------------------------------------------------
# Fine-tuning, supervised, with InfoNCE against CF-mined hard negatives
# --------------------------------------------------------------------------------------------------

def info_nce(z, candidates, positive, tau, ignore=None):
    """InfoNCE with one or more positives a row (van den Oord et al., 2018; MIL-NCE, Miech et al.,
    CVPR 2020): -ln( sum_positive exp(s / tau) / sum_{not ignored} exp(s / tau) ), s the cosine.

    z (B, d), candidates (C, d), positive (B, C) bool, ignore (B, C) bool: candidates left out of
    the sum, the mask against false negatives (a positive is never left out) -> scalar mean over B.
    A row without a positive makes the loss infinite: leave such rows out."""
    scores = F.normalize(z, dim=-1) @ F.normalize(candidates, dim=-1).T / tau  # (B, C)
    if ignore is not None:
        scores = scores.masked_fill(ignore & ~positive, -torch.inf)
    of_positives = scores.masked_fill(~positive, -torch.inf).logsumexp(1)
    return (scores.logsumexp(1) - of_positives).mean()


class SftTask:
    """The data of fine-tuning, from train pairs and CF vectors alone: who is held back, what was
    mined, the candidates.

    data: a dict of load_data. cf_model: a Backbone on those pairs; cf: its vectors, {"user" (U, d),
    "item" (I, d)}. texts: U user profiles and I item texts, as load_profiles returns them. first,
    last: the band, ranks of a user's unseen items from 1. mine: "dns", the band itself, or
    "mixgcf", the vector that MixGCF makes of the pair and some of the band. seed: who is held
    back."""

    def __init__(self, data, cf_model, cf, texts, first, last, seed, mine="dns"):
        self.cf, self.texts, self.train, self.mine = cf, texts, data["train"], mine
        self.cf_model = cf_model
        self.item_layers = cf_model.layers()[1].detach()  # (I, K, d), for mixgcf
        self.mined = mine_hard_negatives(cf_model, self.train, first, last)  # (U, M)
        # centred, so that cosine compares what tells items apart and not the direction that all
        # popular items share
        self.candidates = cf["item"] - cf["item"].mean(0)  # (I, d)

        # two held-back sets of train pairs: new pairs of users that SFT does see, and pairs of
        # users it never sees
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self.train), generator=generator)
        new_user = torch.rand(data["n_users"], generator=generator) < 0.1
        is_new = new_user[self.train[order, 0].cpu()]
        known = order[~is_new]
        n_held = min(128, max(1, len(known) // 10))
        self.held = {"known users": known[:n_held], "new users": order[is_new][:128]}
        self.rows = known[n_held:]  # (N,) rows of train that SFT learns from
        self.generator = generator

    def is_mined(self, rows):
        """(R, I) bool: the mined hard negatives of each row's user; made for a batch, never for all
        users at once."""
        users = self.train[rows, 0]
        none = torch.zeros(len(rows), len(self.candidates), dtype=torch.bool, device=users.device)
        return none.scatter_(1, self.mined[users], True)

    def loss(self, z, rows, tau):
        """InfoNCE over the whole catalogue: positives are u's mined items, everything else pushes
        away, the item i and u's other train items included. With mine='mixgcf' the one positive is
        the vector that MixGCF makes of the pair and 8 of the mined items; the mined items
        themselves are left out of the sum, since they are no worse."""
        mined = self.is_mined(rows)
        if self.mine == "dns":
            return info_nce(z, self.candidates, mined, tau)
        u, i = self.train[rows].T
        pick = torch.randint(self.mined.shape[1], (len(u), 8), device=u.device)
        some = self.mined[u].gather(1, pick)
        synthetic = mixgcf(self.cf["user"][u], self.item_layers, i, some, self.cf_model.pool)
        synthetic = synthetic - self.cf["item"].mean(0)  # (R, d)
        own = torch.eye(len(z), dtype=torch.bool, device=z.device)
        candidates = torch.cat([self.candidates, synthetic])
        positive = torch.cat([torch.zeros_like(mined), own], 1)
        return info_nce(z, candidates, positive, tau, torch.cat([mined, torch.zeros_like(own)], 1))

    def hit_rate(self, z, rows):
        """How often the item nearest to z (cosine, whole catalogue) is one mined for the pair's
        user."""
        scores = F.normalize(z, dim=-1) @ F.normalize(self.candidates, dim=-1).T
        return self.is_mined(rows).gather(1, scores.argmax(1)[:, None]).float().mean().item()

    def floors(self, rows):
        """(uniform chance, popularity floor: the hit rate of the best single item for everybody) on
        these rows."""
        mined = self.is_mined(rows).float()
        return mined.mean().item(), mined.mean(0).max().item()


def grouped_batches(users, rows, per_user, groups, generator, lengths=None):
    """Shuffle rows into batches of `groups` chunks, each chunk up to `per_user` rows of one user,
    so that a user's prefix is run once for several items. users (N,) of all train rows; rows (R,);
    lengths (N,): how long each row's prompt is, so that chunks of like length share a batch and
    little is padded -> list of int64 tensors, in random order."""
    # each user's rows in random order, cut into chunks
    rows = rows[torch.randperm(len(rows), generator=generator)]
    rows = rows[users[rows].argsort(stable=True)]
    chunks = []
    for own in rows.split(users[rows].unique_consecutive(return_counts=True)[1].tolist()):
        chunks += own.split(per_user)
    order = torch.randperm(len(chunks), generator=generator).tolist()
    if lengths is not None:  # sorted within windows of 8 batches: near random, yet seldom padded
        longest = [int(lengths[chunk].max()) for chunk in chunks]
        shuffled, order = order, []
        for at in range(0, len(chunks), 8 * groups):
            order += sorted(shuffled[at:at + 8 * groups], key=longest.__getitem__)

    # chunks into batches, the batches in random order
    batches = []
    for at in range(0, len(order), groups):
        batches.append(torch.cat([chunks[k] for k in order[at:at + groups]]))
    return [batches[k] for k in torch.randperm(len(batches), generator=generator).tolist()]


@torch.no_grad()
def encode_rows(task, llm, prompt, soft_tokens, rows, drop="", profile_dropout=0.0, batch=64,
                label=""):
    """encode_pairs over many rows of train, grouped by user -> h (R, H) in the order of `rows`.
    Each process encodes its share. batch: suffixes a call, of like length among four times as many
    rows."""
    order = task.train[rows, 0].argsort(stable=True)
    instruction = run_piece(llm, [prompt.shared])[2]
    encoder = functools.partial(encode, batch=batch, instruction=instruction)
    progress = Progress(label, len(order), "pairs") if label else None
    hidden_size = llm.config.get_text_config().hidden_size
    result = torch.zeros(len(rows), hidden_size, device=task.train.device)
    for n, at in enumerate(order.split(4 * batch)):
        if n % world() == rank():
            torch.manual_seed(n)  # what is left out does not depend on which process encodes it
            result[at] = encode_pairs(llm, prompt, soft_tokens, task.cf, task.texts,
                                      task.train[rows[at]], drop, profile_dropout, encoder)
        if progress:
            progress.update(min(len(order), (n + 1) * 4 * batch))
    sum_over([result])
    return result


def fit_head(task, head, hidden, rows, tau, steps=300, lr=3e-3, dropout=0.3, seed=0):
    """Warm-up: train the head alone on the frozen LLM's hidden states (N, H), so that LoRA starts
    from a head that already reads what the soft tokens and the text brought (linear probing, then
    fine-tuning: Kumar et al., ICLR 2022) -> the last loss."""
    head.mean.copy_(hidden.mean(0))
    head.std.copy_(hidden.std(0).clamp(min=1e-4))
    generator = torch.Generator(hidden.device).manual_seed(seed)
    optimizer = torch.optim.Adam(head.parameters(), lr=lr)
    for _ in range(steps):
        pick = torch.randperm(len(rows), generator=generator, device=hidden.device)[:2048]
        h = hidden[pick]
        # dropout around the mean: what is left out reads as average
        keep = torch.rand(h.shape, generator=generator, device=h.device) >= dropout
        z = head(head.mean + (h - head.mean) * keep / (1 - dropout))
        loss = task.loss(z, rows[pick], tau)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def report_held(task, llm, prompt, soft_tokens, head, label, drops=("",)):
    """Print and return hit rates on both held-back sets: {label: {set: rate}}."""
    result = {}
    for drop in drops:
        name = f"{label}, without the {drop}" if drop else label
        rates = {}
        for held, rows in task.held.items():
            if len(rows):
                hidden = encode_rows(task, llm, prompt, soft_tokens, rows, drop)
                rates[held] = task.hit_rate(head(hidden), rows)
        result[name] = rates
        shown = [f"{held} {rate:.3f}   " for held, rate in rates.items()]
        print(f"  hit rate {name:<45}" + "".join(shown), flush=True)
    return result


def learning_rate(step, steps):
    """Share of the full rate at `step` of `steps`, counted from 0: the smaller of two curves."""
    warm_up = (step + 1) / max(1, steps // 10)  # rises to 1 over a tenth of the steps
    decay = 0.55 + 0.45 * math.cos(math.pi * step / max(1, steps))  # falls from 1 to a tenth
    return min(warm_up, decay)


def sft_gradients(task, llm, prompt, soft_tokens, head, trained, rows, tau, *, micro_pairs, seed,
                  profile_dropout=0.0, encoder=encode):
    """Loss of one step on rows (B,) of train, its gradient left in .grad of the parameters
    `trained`. Parts of `micro_pairs` pairs go one after the other, so that few activations are held
    at once, and every process takes each world()-th part; the gradients add up to those of the
    whole batch."""
    loss = torch.zeros((), device=rows.device)
    for p in trained:  # zeros, not None: every process brings a gradient for every parameter
        p.grad = torch.zeros_like(p)
    for n, part in enumerate(rows.split(micro_pairs)):
        if n % world() == rank():
            # dropout is the part's own: a resumed run repeats it
            torch.manual_seed(seed * 1009 + n)
            hidden = encode_pairs(llm, prompt, soft_tokens, task.cf, task.texts, task.train[part],
                                  "", profile_dropout, encoder)
            part_loss = task.loss(head(hidden), part, tau) * len(part) / len(rows)
            part_loss.backward()
            loss += part_loss.detach()
    sum_over([loss, *(p.grad for p in trained)])
    return loss.item()


def add_lora(llm, targets, rank, alpha, dropout):
    """LoRA (Hu et al., ICLR 2022) on the linear layers named in `targets`, its weights float32
    whatever the LLM's. Prints what it is on; raises SystemExit2 when a name matches no linear
    layer, so that no part of what was asked for is left out in silence."""
    linear = {name: module for name, module in llm.named_modules()
              if isinstance(module, (nn.Linear, Conv1D))}
    names = Counter(name.rpartition(".")[2] for name in linear)
    found, transposed = [], False
    for target in targets:
        matched = [name for name in linear if f".{name}".endswith(f".{target}")]
        if not matched:
            there = ", ".join(f"{name} ×{count}" for name, count in names.items())
            fail(f"--lora-targets {target}: the LLM has no linear layer of this name; name some of "
                 f"those it has: {there or 'none'}")
        found.append(f"{target} ×{len(matched)}")
        transposed |= isinstance(linear[matched[0]], Conv1D)  # GPT-2 keeps its weights as (in, out)
    print(f"LoRA on {len(found)} of {len(names)} kinds of linear layer: {', '.join(found)}")
    llm = get_peft_model(llm, LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout,
                                         target_modules=targets, fan_in_fan_out=transposed,
                                         init_lora_weights=True))
    for p in llm.parameters():
        if p.requires_grad:
            p.data = p.data.float()
    return llm


def build_encoder(args, cf, dtype, device, frame=None):
    """What fine-tuning trains, LoRA in the LLM included -> (llm, prompt, soft_tokens, head).

    args: the flags of `finetune`; cf {"user": (U, d), "item": (I, d)}; frame: as Prompt's. Seeds
    torch's generator with args.seed."""
    llm = load_llm(args.llm, AutoModel, dtype, device, args.llm_layers)
    tokenizer = load_tokenizer(args.llm)
    frame = frame or from_first(chat_frame(tokenizer, INSTRUCTION))
    prompt = Prompt(tokenizer, args.soft_tokens, args.max_tokens, frame)

    # into the LLM and out of it: R^d -> R^H, R^H -> R^d
    hidden_size = llm.config.get_text_config().hidden_size
    torch.manual_seed(args.seed)
    soft_tokens = SoftTokens(cf["user"], cf["item"], hidden_size, embedding_norm(llm),
                             args.soft_tokens).to(device)
    head = Head(hidden_size, cf["item"].shape[1]).to(device)

    # LoRA, and how the layers are run
    if args.checkpointing:
        llm.gradient_checkpointing_enable({"use_reentrant": False})
    if device == "cpu":  # the fused attention's backward pass takes longer there, a step by a third
        llm.set_attn_implementation("eager")
    targets = [name.strip() for name in args.lora_targets.split(",")]
    llm = add_lora(llm, targets, args.lora_rank, args.lora_alpha, args.lora_dropout)
    return llm, prompt, soft_tokens, head


def trained_parameters(llm, soft_tokens, head):
    """{name: parameter} of LoRA, and of the soft-token maps and the head."""
    lora, maps = {}, {}
    for name, p in llm.named_parameters():
        if p.requires_grad:
            lora[f"lora.{name}"] = p
    for prefix, module in (("soft", soft_tokens), ("head", head)):
        maps |= {f"{prefix}.{name}": p for name, p in module.named_parameters()}
    return lora, maps


def finetune_settings(args, dtype):
    """What the result depends on: flags, the number format that --dtype stands for here, inputs."""
    run = Path(args.run)
    settings = settings_of(args, "name", "paper", "save_every", "checkpointing")
    return settings | {
        "dtype": dtype_name(dtype), "llm": llm_digest(args.llm),
        "inputs": stamp(run, "data.safetensors", args.cf, args.profiles)}


def training_order(task, warmup_pairs, steps, per_user, groups):
    """The order of the data, the same whoever asks: passes over the train pairs, of which the first
    `warmup_pairs` are for the head alone -> (rows (W,), list of `steps` batches of rows)."""
    users, items = task.train.cpu().T
    lengths = torch.tensor([len(text) for text in task.texts[1]])[items]
    size, order, n = groups * per_user, [], 0
    while n < warmup_pairs + steps * size:
        order += grouped_batches(users, task.rows.cpu(), per_user, groups, task.generator, lengths)
        n = sum(map(len, order))
    order = torch.cat(order).to(task.train.device)
    return order[:warmup_pairs], order[warmup_pairs:].split(size)[:steps]


def warm_up(task, llm, prompt, soft_tokens, head, rows, args):
    """Before the first LoRA step: a head fitted on the bare LLM's hidden states of `rows`, and its
    hit rates -> the log so far."""
    held = torch.cat(list(task.held.values()))
    chance, popular = task.floors(held)
    n_items, n_mined = len(task.candidates), task.mined.shape[1]
    log = {"steps": [], "chance_loss": math.log(n_items / n_mined),
           "uniform_floor": chance, "popularity_floor": popular}
    print(f"finetune: {len(task.rows)} train pairs, {len(held)} held back; loss at chance "
          f"ln({n_items}/{n_mined}) = {log['chance_loss']:.3f}; hit-rate floors: uniform "
          f"{chance:.3f}, popularity {popular:.3f}", flush=True)
    log["hit_rates"] = {}
    if len(rows):
        hidden = encode_rows(task, llm, prompt, soft_tokens, rows, label="warm-up",
                             profile_dropout=args.profile_dropout)
        loss = fit_head(task, head, hidden, rows, args.tau_s, seed=args.seed)
        print(f"warm-up: head fitted on {len(rows)} pairs of the frozen LLM, loss {loss:.3f}",
              flush=True)
        log["hit_rates"] = report_held(task, llm, prompt, soft_tokens, head, "after warm-up")
    return log


def finetune(args):
    """Fine-tune LoRA, the soft-token maps and the head; write adapter/ and sft.safetensors. Goes on
    after a kill from the last state that was saved. Raises SystemExit2 when an input is missing,
    when the output was made with other settings, or when the loss is no number."""
    run, data, start = Path(args.run), load_data(args.run), time.time()
    name = output_name("--name", args.name, "llm_negatives.py finetune", word="sft")
    if args.warmup_pairs == 1:
        fail("--warmup-pairs 1: one pair has no deviation to standardise by; give 0, or 2 or more")
    out, adapter = run / f"{name}.safetensors", run / adapter_folder(name)
    partial = out.with_suffix(".partial.safetensors")

    # finished with these settings: nothing to do; half-finished: go on from there
    args.mine_first, args.mine_last = mining_band(data, args.mine_first, args.mine_last)
    device = start_processes(args.device)
    dtype = pick_dtype(args.dtype, device)
    settings = finetune_settings(args, dtype)
    if up_to_date(out, settings, force=args.force):
        return
    if rank() == 0:
        clear_litter(run, out.name, partial.name, adapter.name)
    saved = load_partial(partial, settings, args.force)

    # the data: train pairs, what CF mined for their users, texts
    data["train"] = data["train"].to(device)
    model, _, cf = load_model(run / args.cf, data=data)
    task = SftTask(data, model, cf, load_profiles(run, args.profiles), args.mine_first,
                   args.mine_last, args.seed, args.mine)
    steps, size = args.steps, args.users_per_step * args.items_per_user
    if args.epochs:
        steps = math.ceil(args.epochs * len(task.rows) / size)
    warm, batches = training_order(task, args.warmup_pairs, steps, args.items_per_user,
                                   args.users_per_step)

    # the encoder; a resumed run keeps the chat template's rendering, which may print the date
    llm, prompt, soft_tokens, head = build_encoder(
        args, cf, dtype, device, saved.meta["frame"] if saved else None)
    # checkpointing runs layers twice, so that no cache can be kept
    encoder = encode_whole if args.checkpointing else encode

    # Adam with two rates: LoRA's, and that of the maps and the head
    lora, maps = trained_parameters(llm, soft_tokens, head)
    trained = [*lora.values(), *maps.values()]
    optimizer = torch.optim.AdamW([{"params": list(lora.values()), "lr": args.lr},
                                   {"params": list(maps.values()), "lr": args.lr_maps}],
                                  weight_decay=0.01)
    # what a saved state holds: the parameters, and what the warm-up standardises by
    kept = lora | maps | {"head.mean": head.mean, "head.std": head.std}

    # start: from the saved state, or with the head's warm-up
    done = 0
    if saved:
        done, log = saved.meta["step"], saved.meta["log"]
        restore_partial(saved.tensors, kept, optimizer)
        print(f"finetune: going on after step {done} of {steps}")
    else:
        with llm.disable_adapter():  # LoRA begins at zero: it would cost a third and add nothing
            log = warm_up(task, llm, prompt, soft_tokens, head, warm, args)
        log["dtype"] = dtype_name(dtype)
        if world() > 1:  # all go on from the same numbers, to the last bit
            for value in kept.values():
                dist.broadcast(value.data, 0)

    # LoRA, maps and head together
    progress, prompt.tokens, begin = Progress("finetune", steps, "steps"), 0, time.time()
    llm.train()
    for k in range(done, steps):
        # one step; its seed is the step's own, so that a resumed run draws what a whole one would
        for group, rate in zip(optimizer.param_groups, (args.lr, args.lr_maps)):
            group["lr"] = rate * learning_rate(k, steps)
        loss = sft_gradients(task, llm, prompt, soft_tokens, head, trained, batches[k], args.tau_s,
                             micro_pairs=args.micro_pairs, seed=args.seed * 1_000_003 + k,
                             profile_dropout=args.profile_dropout, encoder=encoder)
        if not math.isfinite(loss):
            fail(f"finetune: the loss is {loss} at step {k + 1}; lower --lr (now {args.lr}) or use "
                 "--dtype fp32")
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        # what a person sees, and what a killed run goes on from
        log["steps"].append(round(loss, 4))
        recent, speed = log["steps"][-10:], prompt.tokens * world() / (time.time() - begin)
        progress.update(k + 1, f"loss {sum(recent) / len(recent):.3f}  {speed:.0f} tokens/s")
        if rank() == 0 and ((k + 1) % args.save_every == 0 or k + 1 == steps):
            save_partial(partial, settings, prompt.frame, k + 1, kept, optimizer, log)

    # what was learned, and what it takes from each part of the prompt
    llm.eval()
    drops = ("", "user vector", "user profile", "item vector")
    log["hit_rates"] |= report_held(task, llm, prompt, soft_tokens, head, "after", drops)

    # write: the adapter first, for the second file names it by its digest
    if rank() == 0:
        save_adapter(llm, adapter, f"it goes on from {partial.name}")
        tensors = state_of({"soft": soft_tokens, "head": head})
        check_finite(out, tensors, "lower --lr, use --dtype fp32, or give --warmup-pairs more "
                     "than 1, with --force")
        save_tensors(out, tensors, {
            "settings": settings, "beside": stamp(run, *adapter_files(adapter)),
            "frame": prompt.frame, "prompt": prompt.template, "dim": cf["item"].shape[1],
            "dtype": dtype_name(dtype), "log": log, "seconds": time.time() - start})
        partial.unlink(missing_ok=True)
        print(f"wrote {adapter} and {out}, {time.time() - start:.0f} s")

# --------------------------------------------------------------------------------------------------
# The judge: what the texts, as the LLM reads them, say a user likes. Its label is one that the CF
# vectors do not hold: a train item left out of its user's own text, to be found again among the
# rest of the catalogue. What it then ranks high and the user has not seen is a likely false hard
# negative. Beyond the paper.
# --------------------------------------------------------------------------------------------------

class Judge(nn.Module):
    """A user's liking of an item by texts alone, learned maps on what a frozen LLM reads: how like
    the item is to each of the user's train items k, the likest counting most,

        score(u, j) = s soft-max over k of cos(W_h t_k, W_i t_j) + b_j
        soft-max of some c = ln(mean of exp(beta (c - 1))) / beta + 1

    with t_j the whitened readings of item j's text at several layers, one after the other. The item
    that is judged is none of the k. One train item that is much like j says more than the mean of
    all: people have more than one taste. W_h and W_i start as identities, so that an untrained
    judge compares the texts as they are; b starts at half the log popularity.

    readings: a list of (I, H) float, one a layer, row i of item i; train (N, 2); width: k, of the
    maps; beta: the sharpness it starts with, near 0 for the mean over k. forward() -> the
    HistoryKernel that ranks, without gradient."""

    def __init__(self, readings, train, n_users, width=576, beta=4.0):
        super().__init__()
        text = F.normalize(torch.cat([whiten(layer) for layer in readings], 1), dim=1)
        popularity = torch.bincount(train[:, 1], minlength=len(text)).float()
        self.n_users, self.n_items, self.train_pairs = n_users, len(text), train
        self.register_buffer("text", text, persistent=False)  # (I, T)
        width = min(width, text.shape[1])
        self.history_map = nn.Linear(text.shape[1], width, bias=False)
        self.item_map = nn.Linear(text.shape[1], width, bias=False)
        nn.init.eye_(self.history_map.weight)
        nn.init.eye_(self.item_map.weight)
        self.bias = nn.Parameter(0.5 * (popularity + 1).log())  # (I,)
        self.scale = nn.Parameter(torch.tensor(1 / 0.07).log())
        # in tens: Adam's steps are of one size for all, and this has further to go than a weight
        self.log_beta = nn.Parameter(torch.tensor(float(beta)).log() / 10)

    def history_vectors(self, text):
        """Rows of self.text (B, T) -> (B, k), of length 1: items as a user's."""
        return F.normalize(self.history_map(text), dim=1)

    def item_vectors(self, text):
        """Rows of self.text (B, T) -> (B, k), of length 1: items as those that are judged."""
        return F.normalize(self.item_map(text), dim=1)

    def beta(self):
        return (10 * self.log_beta).exp()

    def kernel(self, cosine):
        return (self.beta() * (cosine - 1)).exp()

    def soft_maximum(self, total, count):
        return soft_maximum(total, count, self.scale.exp(), self.beta())

    @torch.no_grad()
    def tensors(self):
        """What its score is made of, as backbones.kernel_of takes it."""
        return {"history": self.history_vectors(self.text), "item": self.item_vectors(self.text),
                "bias": self.bias.detach(), "shape": torch.stack([self.scale.exp(), self.beta()])}

    def forward(self):
        return kernel_of(self.tensors(), self.train_pairs, self.n_users)


def make_judge_step(judge, train, n_negatives, most=64, dropout=0.0):
    """A step for backbones.fit over users: softmax of each of a user's train items, left out in
    turn, against `n_negatives` items of the whole catalogue, drawn uniformly and shared by the
    batch; the user's other train items among them push nothing away. Of a user with more than
    `most` train items that many are drawn, anew each time. `dropout`: the share of each text's
    numbers that is left out, drawn anew at each step, so that maps of few users' data do not lean
    on single ones (Srivastava et al., JMLR 2014). train (N, 2), at least two pairs of each user
    that is stepped on -> step(users (B,), generator) -> (scalar, {})."""
    train_rows = user_rows(train, judge.n_users)

    def step(users, generator):
        # their train items, P in all: each one's user (its place in the batch) and slot there
        place, own = rows_of(train_rows, users)
        order = torch.rand(len(own), generator=generator, device=own.device, dtype=torch.float64)
        order = (place + order).argsort()
        place, own = place[order], own[order]
        count = torch.bincount(place, minlength=len(users))
        slot = torch.arange(len(own), device=own.device) - (count.cumsum(0) - count)[place]
        place, own, slot = place[slot < most], own[slot < most], slot[slot < most]
        count = count.clamp(max=most)

        # each item is mapped once; one drawn c times counts c-fold in the softmax
        drawn = torch.randint(judge.n_items, (n_negatives,), generator=generator, device=own.device)
        drawn, times = drawn.unique(return_counts=True)  # (N,), (N,)
        items, at = own.unique(return_inverse=True)
        history = judge.history_vectors(F.dropout(judge.text[items], dropout))
        history = take(history, at)  # (P, k)
        items, at = torch.cat([own, drawn]).unique(return_inverse=True)
        vectors = judge.item_vectors(F.dropout(judge.text[items], dropout))
        own_vectors, vectors = take(vectors, at).split([len(own), len(drawn)])

        # positives: each item by its user's others, as (B, S, S) with S slots a user
        padded = history.new_zeros(2, len(users), int(count.max()), history.shape[1])
        by_user = [empty.index_put((place, slot), rows)
                   for empty, rows in zip(padded, (history, own_vectors))]
        likeness = judge.kernel(by_user[0] @ by_user[1].mT)  # (B, S, S): of history, of item
        slots = torch.arange(likeness.shape[1], device=own.device)
        counts = (slots < count[:, None])[:, :, None] & (slots[:, None] != slots)
        total = (likeness * counts).sum(1)[place, slot]  # (P,)
        others = count[place] - 1
        positive = judge.soft_maximum(total, others) + judge.bias[own]  # (P,)

        # negatives: each drawn item by all of the user's but the one left out
        likeness = judge.kernel(history @ vectors.T)  # (P, N)
        total = likeness.new_zeros(len(users), len(drawn)).index_add(0, place, likeness)
        total = take(total, place) - likeness
        negative = judge.soft_maximum(total, others[:, None]) + judge.bias[drawn] + times.log()
        mine = own_among(drawn, users[place], train_rows, judge.n_items)
        negative = negative.index_put(mine, negative.new_tensor(-torch.inf))
        return sampled_softmax_loss(positive, negative), {}

    return step


@torch.no_grad()
def likely_items(kernel, n):
    """The n items that the judge ranks highest of those the user has not seen, and how likely each
    is beside the others: (U, n) int64, (U, n) shares that add up to 1. -1 and share 0 where a user
    has fewer unseen items. kernel: a HistoryKernel, whose train items are the seen ones."""
    (everyone, every_item), items, share = kernel(), [], []
    for users in everyone.split(max(1, 2**23 // kernel.n_items)):  # (B, 1)
        scores = kernel.score_all(users, every_item)  # (B, I)
        scores = leave_out(scores, users[:, 0], kernel.train_rows)
        best, listed = scores.topk(n)
        items.append(listed.masked_fill(best == -torch.inf, -1))
        share.append(best.softmax(1).nan_to_num())
    return torch.cat(items), torch.cat(share)


def item_readings(args, layers, dtype, device):
    """What the LLM, or the control in its place, reads of each item's title and metadata ->
    read_layers' list of (I, H)."""
    texts = titles_and_texts(Path(args.run))
    torch.manual_seed(args.seed)
    if args.control == "shuffled":  # each text given to another item
        order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(args.seed))
        texts = [texts[n] for n in order.tolist()]
    llm = load_llm(args.llm, AutoModel, dtype, device, max(1, layers[-1]))  # 0 would be all
    if args.control == "random":  # the same architecture, that has read nothing yet
        llm = AutoModel.from_config(llm.config).to(device, dtype).eval()
    return read_layers(llm, Prompt(load_tokenizer(args.llm)), texts, layers)


def train_judge(judge, train, valid, taught, *, dropout=0.0, n_negatives=1024, epochs=8,
                batch_size=0, lr=1e-3, seed=0, validated=5000):
    """Train the judge's maps and keep the epoch that is best on the valid pairs (N', 2) of the same
    `validated` users each time. taught (n,): the users that teach it; batch_size: pairs a step; 0:
    a 64th of the train pairs, 256 to 2,048: small data, small batches. Returns (its validation
    NDCG@20, history of fit)."""
    step = make_judge_step(judge, train, n_negatives, dropout=dropout)
    pairs = batch_size or min(2048, max(256, 2 ** round(math.log2(len(train) / 64))))
    torch.manual_seed(seed)  # of what is dropped

    def validate():
        return validation(judge(), {"train": train, "valid": valid}, users=validated)()

    state, history = fit(
        {"judge": judge}, lambda rows, generator: step(taught[rows], generator), len(taught),
        validate, epochs=epochs, batch_size=max(2, pairs * judge.n_users // len(train)), lr=lr,
        decay=True, eval_every=1, patience=epochs, seed=seed, label=f"judge, dropout {dropout:g}")
    restore({"judge": judge}, state)
    return max(row["valid_ndcg@20"] for row in history), history


def fit_judge(args):
    """Fit the judge on a frozen LLM's readings; write its score and each user's likely items."""
    run, data, start = Path(args.run), load_data(args.run), time.time()
    out = run / output_name("--out", args.out, "llm_negatives.py judge", ".safetensors", "judge")
    device = start_processes(args.device)
    dtype = pick_dtype(args.dtype, device)

    # a file made with these settings from these inputs need not be made again
    layers = judge_layers(args.layers, args.llm)
    args.layers = ",".join(map(str, layers))
    settings = settings_of(args, "paper") | {
        "dtype": dtype_name(dtype), "llm": llm_digest(args.llm),
        "inputs": stamp(run, "data.safetensors", "items.jsonl")}
    if up_to_date(out, settings, force=args.force):
        return

    # the judge, on what the LLM reads of the items
    readings = item_readings(args, layers, dtype, device)
    print(f"judge: {len(readings[0])} texts read at layers {args.layers}, "
          f"{time.time() - start:.0f} s", flush=True)
    train, valid = data["train"].to(device), data["valid"].to(device)

    # who teaches it: each user of two or more pairs, but for a share that stands for new users
    generator = torch.Generator().manual_seed(args.seed)
    untaught = (torch.rand(data["n_users"], generator=generator) < args.untaught).to(device)  # (U,)
    enough = torch.bincount(train[:, 0], minlength=data["n_users"]) > 1
    taught = (enough & ~untaught).nonzero()[:, 0]
    if not len(taught):
        fail(f"--untaught {args.untaught:g}: leaves no user of two or more train pairs to teach "
             "the judge; give less")

    # once with each dropout: validation, of users that teach it, chooses
    valid, best = valid[~untaught[valid[:, 0]]], -math.inf
    for tried in args.dropout:
        model = Judge(readings, train, data["n_users"], args.width, args.sharpness).to(device)
        score, losses = train_judge(
            model, train, valid, taught, dropout=tried, n_negatives=args.negatives,
            epochs=args.epochs, batch_size=args.batch_size, lr=args.lr, seed=args.seed)
        if score > best:
            best, judge, dropout, history = score, model, tried, losses

    # its score, and what it holds for likely
    tensors = judge.tensors()
    kernel = kernel_of(tensors, train, data["n_users"])
    likely, share = likely_items(kernel, min(args.likely, data["n_items"]))
    tensors |= {"likely": likely.int(), "share": share,
                "text": readings[len(layers) // 2]}  # of the middle one, for --text-vectors
    if args.untaught:
        tensors["untaught"] = untaught.nonzero()[:, 0]
    check_finite(out, tensors, "lower --lr and run again with --force")
    save_tensors(out, tensors, {"settings": settings, "dropout": dropout, "history": history,
                                "seconds": time.time() - start})
    print(f"wrote {out}, dropout {dropout:g}, {time.time() - start:.0f} s")


def judge_layers(text, llm):
    """--layers as a list of numbers; where it is empty, the token embeddings and the layers at two
    fifths and two thirds of the LLM's depth: 0, 12, 20 of 30. Raises SystemExit2 for a layer that
    the LLM lacks."""
    try:
        config = AutoConfig.from_pretrained(llm, trust_remote_code=False)
    except Exception as error:  # noqa: BLE001 as in load_llm
        fail(f"--llm {llm}: no model can be loaded from it ({type(error).__name__}: "
             f"{str(error)[:200]}); give a local folder or a Hugging Face id")
    depth = config.get_text_config().num_hidden_layers
    if not text:
        return sorted({0, round(depth * 2 / 5), round(depth * 2 / 3)})
    try:
        layers = sorted({int(layer) for layer in text.split(",")})
    except ValueError:
        fail(f"--layers {text}: give numbers of layers, such as 0,12,20")
    if layers[0] < 0 or layers[-1] > depth:
        fail(f"--layers {text}: {llm} has layers 0 (its token embeddings) to {depth}; give some of "
             "these")
    return layers


def titles_and_texts(run):
    """What is read of each item, in the order of the contiguous ids: its title and metadata."""
    return [f"{row['title']}. {row['text']}" for row in read_jsonl(run / "items.jsonl")]


@torch.no_grad()
def read_layers(llm, prompt, texts, layers, batch=64, max_tokens=64):
    """What the LLM makes of each text alone, at several layers: the mean of a layer's hidden states
    over the text's tokens -> a list of (I, H) float32, one a layer.

    llm: a decoder without its language-model head (AutoModel); prompt: any Prompt of its tokenizer;
    layers: 0 is the token embeddings, a bag of words, the control for what the layers add; -1 the
    last layer, after the final norm. The first token is left out: it takes the attention that goes
    nowhere, and its state is a hundred times larger than the rest (Xiao et al., attention sinks,
    ICLR 2024)."""
    order = sorted(range(len(texts)), key=lambda k: len(texts[k]))  # like lengths together
    embedding, width = llm.get_input_embeddings(), llm.config.get_text_config().hidden_size
    device = embedding.weight.device
    result = [torch.zeros(len(texts), width, device=device) for _ in layers]
    progress = Progress("read", len(texts), "texts")
    for at in range(0, len(order), batch):
        part = order[at:at + batch]
        ids, mask = pad([prompt.ids(texts[k])[:max_tokens] for k in part], device)
        hidden = [embedding(ids)]  # (B, L, H)
        if any(layers):  # a bag of words needs no layer run
            out = llm(input_ids=ids, attention_mask=mask, use_cache=False,
                      output_hidden_states=True)
            hidden += out.hidden_states[1:]
        weight = mask.float()
        weight[:, 0] = (mask.sum(1) == 1).float()  # a text of one token is all there is
        weight /= weight.sum(1, keepdim=True)
        for layer, rows in zip(layers, result):
            rows[part] = torch.einsum("bl,blh->bh", weight, hidden[layer].float())
        progress.update(at + len(part))
    return result

# --------------------------------------------------------------------------------------------------
# Generation, offline, in shards
# --------------------------------------------------------------------------------------------------

def choose_pairs(train, n_users, per_user, seed):
    """Up to `per_user` train rows of each user (0: all), the same ones for a seed -> row numbers
    (n,), sorted by user."""
    indptr = F.pad(torch.bincount(train[:, 0], minlength=n_users).cumsum(0), (1, 0))
    generator = torch.Generator().manual_seed(seed)
    key = torch.rand(len(train), generator=generator, dtype=torch.float64)
    order = torch.argsort(train[:, 0].double() + key * 0.999)  # by user, random within a user
    place = torch.arange(len(train)) - indptr[train[order, 0]]
    chosen = order[place < per_user] if per_user else order
    n_items = int(train[:, 1].max()) + 1
    return chosen[torch.argsort(train[chosen, 0] * n_items + train[chosen, 1])]


def user_blocks(users, batch):
    """Cut rows that are sorted by user into blocks of whole users of about `batch` rows -> list of
    index tensors. A block is over `batch` only where one user is."""
    blocks, start, end = [], 0, 0
    for count in users.unique_consecutive(return_counts=True)[1].tolist():
        if end - start and end - start + count > batch:
            blocks.append(torch.arange(start, end))
            start = end
        end += count
    return [*blocks, torch.arange(start, end)]


def cut_shards(rows, users, size):
    """Cut rows (n,) that are sorted by user into shards of at least `size`, whole users in each;
    the last may be smaller -> list of int64 tensors. users (n,) of the rows."""
    changes = (users[1:] != users[:-1]).nonzero()[:, 0] + 1
    shards, start = [], 0
    for end in [*changes.tolist(), len(rows)]:
        if end - start >= size or end == len(rows):
            shards.append(rows[start:end])
            start = end
    return shards


def load_encoder(run, args, tuned, device):
    """Fine-tuned (llm, prompt, soft_tokens, head), checked against the run's CF vectors, and the
    vectors. Without args.finetune the zero-shot ablation: the LLM as it came, maps untrained."""
    llm, prompt, soft_tokens, head, _ = load_sft(run, args.sft, args.llm, device, args.finetune)
    if not args.finetune:
        torch.manual_seed(args.seed)
        for module in (*soft_tokens.maps, head.linear):
            module.reset_parameters()
    cf, _ = load_tensors(run / tuned.cf, device=device)
    return llm, prompt, soft_tokens, head, cf


def shard_paths(run, args, settings, n):
    """The paths of the n shards. What an earlier run has finished stays, when it was made with
    these settings (else SystemExit2); with --force it is removed."""
    old = sorted(run.glob(f"{args.out}-?????.safetensors"))
    if args.force and rank() == 0:
        for path in old:
            path.unlink()
    elif not args.force:
        for path in old:
            if read_meta(path)["settings"] != settings:
                up_to_date(path, settings)  # ends here, naming what differs
            load_tensors(path)  # a broken shard ends it too
    if world() > 1:  # no process looks for shards before they are gone
        dist.barrier()
    return [run / f"{args.out}-{k:05d}.safetensors" for k in range(n)]


def write_shard(path, pairs, hidden, head, settings):
    """Write a shard: pairs (n, 2), h (n, H) float16 and z = head(h). Raises SystemExit2 where h is
    beyond float16, or z is not finite."""
    if not torch.isfinite(hidden).all():
        fail(f"generate: hidden states of {path.name} are not finite in float16; use --dtype "
             "fp32 in finetune")
    vector = head(hidden.to(pairs.device).float()).half()  # (n, d)
    check_finite(path, {"vector": vector}, "use --dtype fp32 in finetune")
    save_tensors(path, {"pairs": pairs, "hidden": hidden, "vector": vector}, {"settings": settings})


@torch.no_grad()
def generate(args):
    """Write negatives-*.safetensors: pairs (n, 2), hidden f16 (n, H) = h(u, i), vector f16 (n, d) =
    head(h); and negatives-items.safetensors: text f16 (I, H), read_layers() of titles and metadata
    at the last layer, for the semantic alignment.

    A shard holds whole users; finished shards are kept when the run goes on after a kill. Memory is
    flat in the number of pairs: a shard is written when its users are done."""
    run, data = Path(args.run), load_data(args.run)
    device = start_processes(args.device)
    output_name("--out", args.out, "llm_negatives.py generate", word="negatives")
    sft = f"{args.sft}.safetensors"

    # what the result depends on; CF vectors and profiles are those of fine-tuning
    tuned = Namespace(**read_meta(run / sft)["settings"])
    if tuned.command != "finetune":
        fail(f"--sft {args.sft}: {run / sft} holds what `{tuned.command}` writes; give the --name "
             "of a fine-tuning")
    settings = {"command": "generate", "llm": llm_digest(args.llm),
                "inputs": stamp(run, "data.safetensors", sft, tuned.cf, tuned.profiles)}
    for name in ("pairs_per_user", "seed", "finetune", "read_items", "shard_pairs"):
        settings[name] = getattr(args, name)

    # the shards, and which of them an earlier run has finished
    rows = choose_pairs(data["train"], data["n_users"], args.pairs_per_user, args.seed)
    shards = cut_shards(rows, data["train"][rows, 0], args.shard_pairs)
    settings["shards"] = len(shards)
    todo, made = [], 0
    for path, part in zip(shard_paths(run, args, settings, len(shards)), shards):
        if not path.exists():
            todo.append((path, part))
            made += len(part)
    items_path, has_items = run / f"{args.out}-items.safetensors", False
    if items_path.exists():
        has_items = read_meta(items_path)["settings"] == settings
    if not todo and has_items:
        print(f"skip: {len(shards)} shards {args.out}-*.safetensors and {items_path.name} are up "
              "to date")
        return

    # the encoder; the instruction, alike for all pairs, is run once
    llm, prompt, soft_tokens, head, cf = load_encoder(run, args, tuned, device)
    texts, train = load_profiles(run, tuned.profiles), data["train"].to(device)
    instruction = run_piece(llm, [prompt.shared])[2]
    in_batches = functools.partial(encode, batch=args.batch_size, instruction=instruction)

    # the pairs: each process makes shards of its own, and goes on where an earlier run was killed
    done, mine = len(rows) - made, todo[rank()::world()]
    total = done + sum(len(part) for _, part in mine)
    progress, begin = Progress("generate", total, "pairs"), time.time()
    progress.update(done)
    for path, part in mine:
        hidden = torch.empty(len(part), head.mean.shape[0], dtype=torch.float16)  # (n, H)
        # many users at a time, so that there are many suffixes to sort by length
        for at in user_blocks(train[part, 0].cpu(), 8 * args.batch_size):
            hidden[at] = encode_pairs(llm, prompt, soft_tokens, cf, texts, train[part[at]],
                                      encoder=in_batches).half().cpu()
            done += len(at)
            progress.update(done, f"{prompt.tokens / (time.time() - begin):.0f} tokens/s")
        write_shard(path, train[part], hidden, head, settings)

    # the items' texts alone; their file comes last and says that all is there
    if rank() == 0:
        text = read_layers(
            llm, prompt, titles_and_texts(run), [-1 if args.read_items else 0])[0]
        save_tensors(items_path, {"text": text.half()}, {"settings": settings})
    if world() > 1:
        dist.barrier()

    # how fast it was; the other processes' shards are taken to be of like length
    seconds = time.time() - begin
    speed = prompt.tokens * world() / seconds
    print(f"generate: {made} pairs in {seconds:.0f} s, {speed:.0f} tokens/s; {len(shards)} shards "
          f"{args.out}-*.safetensors and {items_path.name} are there")

# --------------------------------------------------------------------------------------------------
# Profiles (the paper's system prompt, item metadata -> item profile, sampled history ->
# user profile)
# --------------------------------------------------------------------------------------------------

ITEM_SYSTEM = "You describe, in one short sentence, what an item is like and who would enjoy it."
USER_SYSTEM = ("You describe, in one short sentence, the taste of a person from the items they "
               "liked.")
PLACE = "<<pieces>>"  # stands for the user's turn while a chat template is rendered
# a mark after a word of four letters or more, not one as in "Mr. " or "U.S. ", and a space
SENTENCE_END = re.compile(r"\w{4,}[\"')\]]*[.!?][\"')\]]*\s")


def item_request(item):
    """The user turn for one row of items.jsonl."""
    return f"Item: {item['title']}. {item['text']}".strip()


def user_request(history, reviews):
    """The user turn for one user: history is a list of (title, profile), reviews a list of the
    user's own texts."""
    lines = [f"- {title}: {profile}" for title, profile in history]
    lines += [f"They wrote: {text}" for text in reviews]
    return "Liked items:\n" + "\n".join(lines)


def first_sentence(text):
    """One line, cut after the last full sentence end if there is one, so that a token limit leaves
    no half sentence."""
    text = " ".join(text.split())
    end = max(text.rfind(mark) for mark in ".!?")
    return text[: end + 1] if end > 0 else text


def answer(text):
    """What was said, without what was thought: <think>…</think> of reasoning models left out."""
    return re.sub(r"<think>.*?(</think>|$)", "", text, flags=re.DOTALL).lstrip()


def chat_frame(tokenizer, system):
    """What the model's chat format puts before and after a user turn that follows the instruction
    `system`, up to where the answer begins -> (head, tail). Plain text where the tokenizer has no
    template; both in the user turn where it knows no system role; a template that can think is told
    not to. Rendered once for a step, then kept: it may print the date."""
    if not tokenizer.chat_template:
        return f"{tokenizer.bos_token or ''}{system}\n", "\n"
    turns = [{"role": "system", "content": system}, {"role": "user", "content": PLACE}]
    options = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": False}
    try:
        text = tokenizer.apply_chat_template(turns, **options)
    except Exception:  # noqa: BLE001 jinja's raise_exception("System role not supported")
        turns = [{"role": "user", "content": f"{system}\n{PLACE}"}]
        text = tokenizer.apply_chat_template(turns, **options)
    if text.count(PLACE) != 1:
        fail("--llm: its chat template prints the user's turn "
             f"{text.count(PLACE)} times; give an LLM whose template prints it once")
    head, tail = text.split(PLACE)
    if tail.rstrip().endswith("<think>"):  # thoughts are always opened: close them
        tail += "\n</think>\n\n"
    return head, tail


def frame_ids(tokenizer, text):
    """Token ids of a part of the chat template, in which control tokens are control tokens."""
    return tokenizer(text, add_special_tokens=False).input_ids


@functools.lru_cache(maxsize=4)
def control_tokens(tokenizer):
    """A pattern of the strings that the tokenizer reads as one token of its own ("<|im_end|>")."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values()}
    added |= set(tokenizer.all_special_tokens)
    # runs of spaces, and single characters, are text; the longest first, as the tokenizer does
    words = [word for word in added if len(word) > 1 and not word.isspace()]
    words.sort(key=len, reverse=True)
    return re.compile("|".join(map(re.escape, words)) or "(?!)")


def text_ids(tokenizer, text):
    """Token ids of titles, reviews and profiles: of nothing but text. A control token that is
    spelled out in it is cut after its first character and tokenised in parts, so that no title can
    end its turn in the prompt. Unlike split_special_tokens=True this holds for added tokens that
    are not called special too ("<think>"), and for every kind of tokenizer."""
    ids, found = [], control_tokens(tokenizer).search(text)
    while found:
        cut = found.start() + 1
        ids += tokenizer(text[:cut], add_special_tokens=False).input_ids
        text = text[cut:]
        found = control_tokens(tokenizer).search(text)
    return ids + tokenizer(text, add_special_tokens=False).input_ids


class RoomyLayer(DynamicLayer):
    """One layer of the key/value cache, of keys and values (B, heads, L, head width), with room for
    `room` more tokens: they are written in place, where the library copies all that came before."""

    def __init__(self, keys, values, room):
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values
        self.buffers = [F.pad(keys, (0, 0, 0, room)), F.pad(values, (0, 0, 0, room))]

    def update(self, keys, values, *args, **kwargs):
        start = self.keys.shape[2]
        end = start + keys.shape[2]
        for buffer, new in zip(self.buffers, (keys, values)):
            buffer[:, :, start:end] = new
        self.keys, self.values = (buffer[:, :, :end] for buffer in self.buffers)
        return self.keys, self.values


def with_room(past, rows, room):
    """The past of these rows alone, as run_piece takes it, in a cache with room for more tokens."""
    keys_values, mask = past
    cache = DynamicCache()
    for keys, values, *_ in keys_values:
        cache.layers.append(RoomyLayer(keys[rows], values[rows], room))
    return cache, mask[rows]


@torch.no_grad()
def write_texts(model, tokenizer, head, requests, new_tokens):
    """Greedy decoding in a batch, each row up to the end of its first sentence.

    model: a causal LM; head: run_piece(model.base_model, [ids])[2] of the ids that all prompts
    begin with, run once for all batches; requests: B id lists, the rest of each prompt, best of
    like length -> (list of B sentences, number of tokens read and written). The same on each run.
    Rows that have ended leave the batch, a quarter of it at a time, since that copies the cache of
    the others."""
    base, to_logits, device = model.base_model, model.get_output_embeddings(), model.device
    ends = {tokenizer.eos_token_id}
    told = model.generation_config.eos_token_id  # some models end a turn with another token
    ends |= set(told) if isinstance(told, list) else {told}

    # read the requests, all after the one head
    first = torch.zeros(len(requests), dtype=torch.int64, device=device)
    hidden, mask, past = run_piece(base, requests, None, head, first)
    last = hidden[torch.arange(len(requests), device=device), mask.sum(1) - 1]  # (B, H)
    alive, ended = list(range(len(requests))), set()  # rows of the batch; those that are done
    written, n_tokens = [[] for _ in requests], sum(map(len, requests))
    for step in range(new_tokens):
        # write one token in each row, and see which rows are at their end
        n_tokens += len(alive)
        for row, token in zip(alive, to_logits(last).argmax(1).tolist()):
            if row in ended:
                continue
            if token not in ends:
                written[row].append(token)
                text = answer(tokenizer.decode(written[row], skip_special_tokens=True))
            if token in ends or SENTENCE_END.search(text):
                ended.add(row)
        if len(ended) == len(written) or step == new_tokens - 1:
            break
        # read it, on top of all before
        places = [place for place, row in enumerate(alive) if row not in ended]
        if step == 0 or len(places) <= 0.75 * len(alive):
            past = with_room(past, torch.tensor(places, device=device), new_tokens - step)
            alive = [alive[place] for place in places]
        pieces = [written[row][-1:] or [0] for row in alive]
        hidden, _, past = run_piece(base, pieces, None, past)
        last = hidden[:, 0]
    texts = [answer(tokenizer.decode(row, skip_special_tokens=True)) for row in written]
    return [first_sentence(text) for text in texts], n_tokens


class Writer:
    """The LLM that writes profiles. frames: {kind: (head, tail)} of the chat template, as an
    earlier start of this step fixed them; empty: rendered now."""

    def __init__(self, llm, dtype, device, new_tokens, batch_size, frames):
        self.model = load_llm(llm, AutoModelForCausalLM, dtype, device)
        self.tokenizer, self.frames = load_tokenizer(llm), frames
        self.new_tokens, self.batch_size = new_tokens, batch_size
        if not frames:
            for kind, system in (("item", ITEM_SYSTEM), ("user", USER_SYSTEM)):
                frames[kind] = from_first(chat_frame(self.tokenizer, system))
        self.tokens, self.written, self.empty, self.start = 0, 0, 0, time.time()

    def batches(self, requests):
        """Row numbers in batches of like length, the shortest first. Of equal length where an
        attention window is shorter than a prompt: padding would use up part of it."""
        lengths = [len(ids) for ids in requests]
        exact = max(lengths, default=0) + self.new_tokens > attention_window(self.model) // 2
        batches = []
        for row in sorted(range(len(requests)), key=lengths.__getitem__):
            full = not batches or len(batches[-1]) == self.batch_size
            if full or (exact and lengths[batches[-1][0]] != lengths[row]):
                batches.append([])
            batches[-1].append(row)
        return batches

    def write(self, kind, requests):
        """Sentences for requests (list of strings): yields (row numbers, texts) batch by batch.
        Each process writes every world()-th batch, and all get all: users' prompts quote items'
        profiles."""
        head, tail = self.frames[kind]
        tail = frame_ids(self.tokenizer, tail)
        ids = [text_ids(self.tokenizer, text) + tail for text in requests]
        past = run_piece(self.model.base_model, [frame_ids(self.tokenizer, head)])[2]
        batches = self.batches(ids)
        for at in range(0, len(batches), world()):
            parts = batches[at:at + world()]
            result = ([], 0)
            if rank() < len(parts):
                result = write_texts(self.model, self.tokenizer, past,
                                     [ids[row] for row in parts[rank()]], self.new_tokens)
            results = [result]
            if world() > 1:
                results = [None] * world()
                dist.all_gather_object(results, result)
            for rows, (texts, tokens) in zip(parts, results):
                self.tokens += tokens
                self.written += len(rows)
                self.empty += texts.count("")
                yield rows, texts

    def speed(self):
        return f"{self.tokens / (time.time() - self.start):.0f} tokens/s"


class ProfileFile:
    """profiles.jsonl while it grows: first the settings and the chat template's frames, then a line
    a profile. made: {(kind, raw id): text} of what an earlier start has written, kept."""

    def __init__(self, path, header, made, total):
        self.made, self.progress = made, Progress("profile", total, "profiles")
        if rank() == 0:  # whole lines alone; new ones are appended
            lines = [header]
            for (kind, raw), text in made.items():
                lines.append({"kind": kind, "raw": raw, "profile": text})
            write_atomic(path, "".join(json.dumps(line) + "\n" for line in lines).encode())
        self.file = open(path if rank() == 0 else os.devnull, "a", encoding="utf-8")

    def add(self, kind, raws, texts, extra=""):
        for raw, text in zip(raws, texts):
            self.made[kind, raw] = text
            self.file.write(json.dumps({"kind": kind, "raw": raw, "profile": text}) + "\n")
        self.file.flush()
        self.progress.update(len(self.made), extra)


def started_profiles(path, settings, force):
    """({(kind, raw id): text}, frames) of a profiles.jsonl that is there, finished or not. Raises
    SystemExit2 when it was made with other settings, unless force."""
    if force or not path.exists():
        return {}, {}
    rows = read_jsonl(path, growing=True)
    if not rows:
        return {}, {}
    old = rows[0].get("settings", {})
    differ = [f"{name}={old.get(name)}, now {name}={settings[name]}" for name in settings
              if old.get(name) != settings[name]]
    if differ:
        fail(f"{path}: made with {'; '.join(differ)}; add --force to "
             "`python llm_negatives.py profile` to remake it, or choose another --out")
    made = {(row["kind"], row["raw"]): row["profile"] for row in rows[1:]}
    return made, rows[0].get("frames", {})


def draw_histories(train, n_users, size, seed):
    """Up to `size` train items of each user at random, drawn for all users in order, so that a
    resumed run asks for the same ones -> list of lists of item rows."""
    indptr, rows = user_rows(train, n_users)
    generator = torch.Generator().manual_seed(seed)
    histories = []
    for u in range(n_users):
        own = rows[indptr[u]:indptr[u + 1]]
        histories.append(own[torch.randperm(len(own), generator=generator)[:size]].tolist())
    return histories


def profile_items(items, chosen, file, writer):
    """Profiles of the items that `file` lacks: of the rows in `chosen` the LLM's sentence, of the
    others, and where its answer is empty, what is known of the item."""
    todo = [n for n, row in enumerate(items) if ("item", row["raw"]) not in file.made]
    plain = [n for n in todo if n not in chosen]
    raws = [items[n]["raw"] for n in plain]
    file.add("item", raws, [items[n]["text"] for n in plain])
    asked = [n for n in todo if n in chosen]
    if not asked:
        return
    for rows, texts in writer.write("item", [item_request(items[n]) for n in asked]):
        own = [items[asked[row]] for row in rows]
        texts = [text or item["text"] for item, text in zip(own, texts)]
        file.add("item", [item["raw"] for item in own], texts, writer.speed())


def profile_users(users, items, histories, chosen, file, writer):
    """Profiles of the users that `file` lacks: of the rows in `chosen` the LLM's sentence on the
    items of their histories and these items' profiles, of the others the titles alone."""
    todo = [n for n, row in enumerate(users) if ("user", row["raw"]) not in file.made]
    for n in todo:
        if n not in chosen:
            titles = "; ".join(items[i]["title"] for i in histories[n])
            file.add("user", [users[n]["raw"]], [f"Likes {titles}."])
    asked, requests = [n for n in todo if n in chosen], []
    for n in asked:
        history = [(items[i]["title"], file.made["item", items[i]["raw"]]) for i in histories[n]]
        requests.append(user_request(history, users[n].get("reviews", [])[:2]))
    if not asked:
        return
    for rows, texts in writer.write("user", requests):
        file.add("user", [users[asked[row]]["raw"] for row in rows], texts, writer.speed())


def profile(args):
    """Write profiles.jsonl, items first, since users' prompts quote their items' profiles. Goes on
    after a kill. Raises SystemExit2 when the file was made with other settings."""
    run, data = Path(args.run), load_data(args.run)
    items = read_jsonl(run / "items.jsonl")
    users = read_jsonl(run / "users.jsonl")
    path = run / output_name("--out", args.out, "llm_negatives.py profile", ".jsonl", "profiles")
    device = start_processes(args.device)
    dtype, by_llm = pick_dtype(args.dtype, device), args.profiles == "llm"

    # what the profiles depend on, and which of them an earlier start has written
    settings = {"command": "profile", "inputs": stamp(run, "data.safetensors"),
                "profiles": args.profiles, "history": args.history,
                "new_tokens": args.new_tokens, "llm_rows": args.llm_rows, "seed": args.seed,
                "llm": llm_digest(args.llm) if by_llm else "",
                "dtype": dtype_name(dtype) if by_llm else ""}
    made, frames = started_profiles(path, settings, args.force)
    total, earlier = len(items) + len(users), len(made)
    if earlier == total:
        print(f"skip: {path} is up to date")
        return
    if rank() == 0:
        clear_litter(run, path.name)

    # the writer comes first: it fixes the chat template's frames, which the file keeps
    writer = None
    if by_llm:
        writer = Writer(args.llm, dtype, device, args.new_tokens, args.batch_size, frames)
    file = ProfileFile(path, {"settings": settings, "frames": frames}, made, total)
    start = time.time()

    # whom the LLM writes for: the most popular items and the first users, or all of them
    popularity = torch.bincount(data["train"][:, 1], minlength=data["n_items"])
    ranked = popularity.argsort(descending=True, stable=True).tolist()
    limit = (args.llm_rows or total) if by_llm else 0

    # items, then users by some of their train items
    profile_items(items, set(ranked[:limit]), file, writer)
    histories = draw_histories(data["train"], data["n_users"], args.history, args.seed)
    profile_users(users, items, histories, set(range(limit)), file, writer)

    # how many by whom
    written = f"{total - earlier} from metadata"
    if by_llm:
        plain = total - earlier - writer.written
        written = f"{writer.written} written by the LLM, {plain} from metadata"
        if writer.empty:
            written += f" ({writer.empty} empty answers: an item's metadata stand in for them)"
        written += f", {writer.speed()}, read and written"
    print(f"profile: {written}, {earlier} of an earlier start, {time.time() - start:.0f} s")
    print(f"wrote {path}")

# --------------------------------------------------------------------------------------------------
# The LLM: loading, digest, number format
# --------------------------------------------------------------------------------------------------

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_dtype(name, device):
    """auto, fp32, bf16 or fp16 -> torch dtype. auto is bf16 where the processor has instructions
    for it (GPU: as CUDA says; CPU: AVX512-BF16, AMX or Arm's BF16), else fp32. Nothing is timed:
    one machine decides alike at each start."""
    if name != "auto":
        return DTYPES[name]
    has_bf16 = False
    if str(device).startswith("cuda"):
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    elif str(device) == "cpu" and os.path.exists("/proc/cpuinfo"):
        flags = set(Path("/proc/cpuinfo").read_text().split())
        has_bf16 = not flags.isdisjoint({"avx512_bf16", "amx_bf16", "bf16"})
    return torch.bfloat16 if has_bf16 else torch.float32


def dtype_name(dtype):
    """torch.bfloat16 -> 'bfloat16', as it stands in files."""
    return str(dtype).removeprefix("torch.")


def load_tokenizer(llm):
    """The tokenizer of a Hugging Face id or a local folder."""
    try:
        return AutoTokenizer.from_pretrained(llm, trust_remote_code=False)
    except Exception as error:  # noqa: BLE001 many kinds; all mean the same to the user
        fail(f"--llm {llm}: no tokenizer can be loaded from it ({type(error).__name__}: "
             f"{str(error)[:200]}); give a local folder or a Hugging Face id that this machine can "
             "reach")


def load_llm(llm, cls, dtype, device, layers=0):
    """The model of a Hugging Face id or a local folder, in eval mode, frozen. layers > 0 keeps only
    the first layers; the rest is neither loaded nor run. cls: AutoModel (hidden states, no logits)
    or AutoModelForCausalLM. Raises SystemExit2 when there are fewer layers, or when the files lack
    some of the weights: the library would draw them at random. No code of the model's own is run,
    and no pickle is read."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)  # renamed arguments in the libraries
    options = {"trust_remote_code": False}
    try:
        config = AutoConfig.from_pretrained(llm, **options)
        depth = config.get_text_config().num_hidden_layers
        if layers:
            config.get_text_config().num_hidden_layers = min(layers, depth)
        model, loaded = cls.from_pretrained(llm, config=config, dtype=dtype, use_safetensors=True,
                                            output_loading_info=True, **options)
    except Exception as error:  # noqa: BLE001 as above
        fail(f"--llm {llm}: no model can be loaded from it ({type(error).__name__}: "
             f"{str(error)[:200]}); give a local folder with config.json and safetensors weights, "
             "or a Hugging Face id that this machine can reach")
    if layers > depth:
        fail(f"--llm-layers {layers}: {llm} has {depth} layers; give {depth} or less, or 0 for all")
    lacking = sorted(loaded["missing_keys"]) + sorted(map(str, loaded["mismatched_keys"]))
    if lacking:
        fail(f"--llm {llm}: its files lack {len(lacking)} of its weights (the first: "
             f"{lacking[0]}); download or convert the model again")
    return model.requires_grad_(False).eval().to(device)


@torch.no_grad()
def embedding_norm(llm):
    """Mean norm of what the embedding gives, over the vocabulary. Not that of its weights: Gemma's
    embedding scales them."""
    embed = llm.get_input_embeddings()
    ids = torch.arange(embed.weight.shape[0], device=embed.weight.device)
    return torch.cat([embed(part).float().norm(dim=1) for part in ids.split(4096)]).mean()


def llm_digest(llm):
    """What tells one LLM from another: 16 hex digits of the sha256 of all files of a local folder
    that a model is loaded from (config, tokenizer, chat template, weights); of a hub id, its name
    and commit. Whole files, each time: about a second a gigabyte, less than loading takes, and a
    stored digest could be one of former files."""
    folder = Path(llm)
    if not folder.is_dir():
        try:
            config = AutoConfig.from_pretrained(llm, trust_remote_code=False)
        except Exception as error:  # noqa: BLE001 as above
            fail(f"--llm {llm}: neither a local folder nor a Hugging Face id that this machine can "
                 f"reach ({type(error).__name__}: {str(error)[:200]})")
        return f"{llm}@{getattr(config, '_commit_hash', None)}"
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if not name.startswith(".") and path.suffix in LLM_FILES and path.is_file():
            digest.update(f"{name} {path.stat().st_size} ".encode())
            with open(path, "rb") as file:
                while block := file.read(2**20):
                    digest.update(block)
    return digest.hexdigest()[:16]


LLM_FILES = {".json", ".jinja", ".txt", ".model", ".tiktoken", ".safetensors", ".bin"}

# --------------------------------------------------------------------------------------------------
# Files: profiles in, adapter and fine-tuned maps out, half-finished states
# --------------------------------------------------------------------------------------------------

def load_profiles(run, name="profiles.jsonl"):
    """Profiles in the order of the contiguous ids -> (user profiles list[str], item texts
    list[str]).

    An item's text is its title, then its profile. Raises SystemExit2 when profiles are missing."""
    run = Path(run)
    maker = f"python llm_negatives.py profile --run {run} --out {name}"
    users, items = read_jsonl(run / "users.jsonl"), read_jsonl(run / "items.jsonl")
    rows = read_jsonl(run / name, maker, growing=True)
    settings = rows[0].get("settings", {}) if rows and isinstance(rows[0], dict) else {}
    whole = all({"kind", "raw", "profile"} <= set(row) for row in rows[1:])
    if settings.get("command") != "profile" or not whole:
        fail(f"{run / name}: is not what `profile` writes; delete it and run `{maker}`, or name "
             "another with --profiles")
    check_inputs(run / name, settings["inputs"], maker)
    made = {(row["kind"], row["raw"]): row["profile"] for row in rows[1:]}
    missing = []
    for kind, group in (("user", users), ("item", items)):
        missing += [row["raw"] for row in group if (kind, row["raw"]) not in made]
    if missing:
        fail(f"{run / name}: {len(missing)} profiles are missing, the first for {missing[0]!r}; "
             f"run `{maker}` again")
    of_users = [made["user", row["raw"]] for row in users]
    return of_users, [f"{row['title']}. {made['item', row['raw']]}" for row in items]


def adapter_folder(name):
    """sft -> adapter, sft-template -> adapter-template: LoRA's folder beside NAME.safetensors."""
    return "adapter" + name.removeprefix("sft")


def adapter_files(adapter):
    """An adapter's weights and its config, which says how they are scaled, as names in the run."""
    return [f"{adapter.name}/adapter_model.safetensors", f"{adapter.name}/adapter_config.json"]


def save_adapter(llm, adapter, then):
    """Write LoRA's folder beside its place, then rename it: none is seen half-written. then: what a
    run after a failure does, for the message."""
    temporary = adapter.with_name(f".{adapter.name}.{os.getpid()}.tmp")
    try:
        llm.save_pretrained(temporary)
        # peft writes this list from a set: sorted, two runs give one file
        config = json.loads((temporary / "adapter_config.json").read_text())
        config["target_modules"] = sorted(config["target_modules"])
        (temporary / "adapter_config.json").write_text(json.dumps(config, indent=2))
        shutil.rmtree(adapter, ignore_errors=True)
        os.replace(temporary, adapter)
    except (OSError, SafetensorError) as error:
        fail(f"{adapter}: cannot be written ({error}); make room and run again, {then}")
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def clear_litter(run, *names):
    """Remove what killed processes have left half-written under these names."""
    for name in names:
        for path in run.glob(f".{name}.*.tmp"):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def state_of(modules):
    """{prefix: module} -> {prefix.name: tensor}, what backbones.restore undoes."""
    tensors = {}
    for prefix, module in modules.items():
        for name, value in module.state_dict().items():
            tensors[f"{prefix}.{name}"] = value
    return tensors


def load_sft(run, name, llm, device, lora=True):
    """The fine-tuned encoder of NAME.safetensors -> (llm, prompt, soft_tokens, head, meta). Refuses
    an adapter of another LLM, and one that does not belong to NAME.safetensors; an adapter that
    cannot be loaded is an error, never skipped. lora=False leaves the LLM as it came (with the maps
    and head of `name`)."""
    maker = f"python llm_negatives.py finetune --run {run}"
    if name != "sft":
        maker += f" --name {name}"
    path, adapter = run / f"{name}.safetensors", run / adapter_folder(name)
    tensors, meta = load_tensors(path, maker, device)
    s = Namespace(**meta["settings"])
    if s.llm != llm_digest(llm):
        fail(f"{path}: was fine-tuned on another LLM than --llm {llm}; give that one, or run "
             f"`{maker} --force`")
    model = load_llm(llm, AutoModel, getattr(torch, meta["dtype"]), device, s.llm_layers)
    if lora:
        try:
            # to the LLM's number format, so that nothing is converted in each layer
            dtype = model.dtype
            model = PeftModel.from_pretrained(model, adapter).to(dtype).eval()
        except Exception as error:  # noqa: BLE001 as above
            fail(f"{adapter}: does not fit --llm {llm} ({type(error).__name__}: "
                 f"{str(error)[:200]}); run `{maker} --force`")
    d, hidden_size = meta["dim"], model.config.get_text_config().hidden_size
    some = torch.zeros(2, d)
    soft_tokens = SoftTokens(some, some, hidden_size, 1.0, s.soft_tokens).to(device)
    head = Head(hidden_size, d).to(device)
    restore({"soft": soft_tokens, "head": head}, tensors)
    prompt = Prompt(load_tokenizer(llm), s.soft_tokens, s.max_tokens, meta["frame"])
    return model, prompt, soft_tokens.eval(), head.eval(), meta


def save_partial(path, settings, frame, step, modules, optimizer, log):
    """Everything that training needs to go on after `step` steps: weights, Adam's moments, the
    log."""
    tensors = dict(modules)
    for n, state in optimizer.state_dict()["state"].items():
        for key, value in state.items():
            tensors[f"adam.{n}.{key}"] = torch.as_tensor(value)
    save_tensors(path, tensors, {"settings": settings, "frame": frame, "step": step, "log": log})


def load_partial(path, settings, force=False):
    """A state that save_partial wrote -> Namespace(tensors, meta), or None when there is nothing to
    go on from. Raises SystemExit2 when it is of other settings, another number format among them;
    with force it is left aside."""
    if not path.exists():
        return None
    old, new = read_meta(path)["settings"], json.loads(json.dumps(settings))
    differ = [name for name in sorted(set(old) | set(new)) if old.get(name) != new.get(name)]
    if not differ:
        tensors, meta = load_tensors(path)
        return Namespace(tensors=tensors, meta=meta)
    if not force:
        name = differ[0]
        fail(f"{path}: half-finished with {name}={old.get(name)}, now {name}={new.get(name)}; "
             "give that again to go on, or add --force to `python llm_negatives.py finetune` to "
             "start anew")
    print(f"{path}: half-finished with other settings ({', '.join(differ)}); starting anew")
    return None


def restore_partial(tensors, modules, optimizer):
    """Put weights and Adam's moments of a saved state back in their places."""
    for key, p in modules.items():
        p.data.copy_(tensors[key])
    state = optimizer.state_dict()
    for key, value in tensors.items():
        if key.startswith("adam."):
            _, n, name = key.split(".")
            state["state"].setdefault(int(n), {})[name] = value
    optimizer.load_state_dict(state)

# --------------------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------------------

# what the paper states; LoRA's alpha is its library's default, as in the published code
PAPER = {"llm": "meta-llama/Meta-Llama-3-8B-Instruct", "llm_layers": 0, "dtype": "bf16",
         "lora_rank": 32, "lora_alpha": 8.0, "lora_dropout": 0.05,
         "lr": 2e-5, "tau_s": 0.05, "epochs": 5.0}


def main(argv=None):
    parser = Parser(prog="llm_negatives.py", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)

    def command(name, text, example):
        example = f"example: python llm_negatives.py {name} --run runs/demo {example}"
        p = commands.add_parser(name, help=text, description=text, epilog=example)
        add_run_flags(p)
        p.add_argument("--llm", default="assets/SmolLM2-135M-Instruct",
                       help="local folder or Hugging Face id of a causal LM")
        p.add_argument("--paper", action="store_true",
                       help="the paper's LLM and settings; flags given beside it win")
        p.add_argument("--seed", type=number(int, 0), default=0,
                       help="decides every random choice of this step")
        if name != "generate":  # which takes what fine-tuning took
            p.add_argument("--dtype", choices=["auto", *DTYPES], default="auto",
                           help="weights of the LLM; LoRA's own are fp32")
        return p

    p = command("profile", "write a text profile of each user and item", "--profiles template")
    p.add_argument("--profiles", choices=["llm", "template"], default="llm",
                   help="who writes them; template uses metadata alone")
    p.add_argument("--history", type=number(int, 1), default=4,
                   help="train items quoted in a user's prompt")
    p.add_argument("--new-tokens", type=number(int, 1), default=40, help="tokens written at most")
    p.add_argument("--llm-rows", type=number(int, 0), default=0,
                   help="users and items that the LLM writes for; 0: all")
    p.add_argument("--batch-size", type=number(int, 1), default=64,
                   help="prompts a call")
    p.add_argument("--out", default="profiles.jsonl", help="output file inside the run folder")

    p = command("finetune", "LoRA fine-tuning with InfoNCE against CF-mined hard negatives",
                "--steps 100")
    p.add_argument("--cf", default="cf.safetensors", help="CF vectors, inside the run folder")
    p.add_argument("--profiles", default="profiles.jsonl", help="profiles, inside the run folder")
    p.add_argument("--name", default="sft",
                   help="first part of the output's name: NAME.safetensors, and adapter/ or "
                        "adapter-…/")
    g = p.add_argument_group("what is learned")
    g.add_argument("--mine", choices=["dns", "mixgcf"], default="dns",
                   help="targets: the mined items, or MixGCF's mixture of them")
    add_band_flags(g)
    g.add_argument("--tau-s", type=number(float, 0, open_low=True), default=0.05,
                   help="InfoNCE temperature")
    g.add_argument("--soft-tokens", type=number(int, 0), default=1,
                   help="soft tokens for each CF vector; 0: none (an ablation)")
    g.add_argument("--max-tokens", type=number(int, 1), default=48,
                   help="tokens of a profile at most; longer ones are cut")
    g.add_argument("--profile-dropout", type=number(float, 0, 1), default=0.2,
                   help="share of users trained without their profile")
    g = p.add_argument_group("the LLM and LoRA")
    g.add_argument("--llm-layers", type=number(int, 0), default=8,
                   help="first layers that are kept; 0: all")
    g.add_argument("--lora-rank", type=number(int, 1), default=8, help="LoRA r")
    g.add_argument("--lora-alpha", type=number(float, 0, open_low=True), default=16,
                   help="LoRA alpha")
    g.add_argument("--lora-dropout", type=number(float, 0, 1), default=0.05, help="LoRA dropout")
    g.add_argument("--lora-targets", default="q_proj,k_proj,v_proj,o_proj",
                   help="linear layers with LoRA, by name")
    g = p.add_argument_group("steps")
    g.add_argument("--warmup-pairs", type=number(int, 0), default=2048,
                   help="pairs the head is fitted on before LoRA; 0: none")
    g.add_argument("--steps", type=number(int, 0), default=60, help="LoRA steps")
    g.add_argument("--epochs", type=number(float, 0), default=0,
                   help="passes over the train pairs instead of --steps; 0: --steps counts")
    g.add_argument("--users-per-step", type=number(int, 1), default=16, help="users a step")
    g.add_argument("--items-per-user", type=number(int, 1), default=2,
                   help="pairs of each user in a step, at most")
    g.add_argument("--micro-pairs", type=number(int, 1), default=16,
                   help="pairs whose activations are held at once")
    g.add_argument("--checkpointing", action="store_true",
                   help="gradient checkpointing: less memory, more time, no shared prefix")
    g.add_argument("--lr", type=number(float, 0, open_low=True), default=5e-4,
                   help="learning rate of LoRA")
    g.add_argument("--lr-maps", type=number(float, 0, open_low=True), default=3e-4,
                   help="learning rate of soft-token maps and head")
    g.add_argument("--save-every", type=number(int, 1), default=20,
                   help="steps between the states that a killed run goes on from")

    p = command("generate", "write the hard negatives' vectors for the train pairs",
                "--pairs-per-user 8")
    p.add_argument("--sft", default="sft", help="the --name that fine-tuning was given")
    p.add_argument("--pairs-per-user", type=number(int, 0), default=0,
                   help="train pairs of each user; 0: all")
    p.add_argument("--no-finetune", dest="finetune", action="store_false",
                   help="zero-shot ablation: the LLM and maps before fine-tuning")
    p.add_argument("--bag-of-words", dest="read_items", action="store_false",
                   help="ablation: items' texts as means of token embeddings, no layer run")
    p.add_argument("--out", default="negatives", help="first part of the shards' names")
    p.add_argument("--batch-size", type=number(int, 1), default=96, help="pairs a call")
    p.add_argument("--shard-pairs", type=number(int, 1), default=2048,
                   help="pairs a shard, at least")

    p = command("judge", "fit what the texts say a user likes; list likely false hard negatives",
                "--layers 0,12,20")
    p.add_argument("--layers", default="",
                   help="layers whose readings are used, comma-separated; 0: a bag of words (left "
                        "out: 0 and those at 2/5 and 2/3 of the depth)")
    p.add_argument("--control", choices=["none", "shuffled", "random"], default="none",
                   help="what a judge is worth: texts given to other items, or an LLM of random "
                        "weights")
    p.add_argument("--untaught", type=number(float, 0, 1), default=0,
                   help="share of the users that teach it nothing: what it is worth to new users")
    p.add_argument("--width", type=number(int, 1), default=576, help="width k of its vectors")
    p.add_argument("--sharpness", type=number(float, 0, open_low=True), default=4,
                   help="beta at the start, how much a user's likest items count more than the "
                        "rest; near 0: all alike")
    p.add_argument("--negatives", type=number(int, 1), default=1024,
                   help="items a step that each left-out item is told apart from")
    p.add_argument("--likely", type=number(int, 1), default=20,
                   help="likely false hard negatives listed of each user")
    p.add_argument("--dropout", type=several(number(float, 0, 0.95)), default="0,0.5",
                   help="shares of the texts' numbers left out while it learns, comma-separated; "
                        "each is tried and validation chooses")
    p.add_argument("--epochs", type=number(int, 1), default=8, help="passes over the users")
    p.add_argument("--batch-size", type=number(int, 0), default=0,
                   help="pairs a step; 0: a 64th of the train pairs, 256 to 2,048")
    p.add_argument("--lr", type=number(float, 0, open_low=True), default=1e-3,
                   help="learning rate of the first step; it falls to 0")
    p.add_argument("--out", default="judge.safetensors", help="output file inside the run folder")

    args = parser.parse_args(argv)
    if args.paper:  # the paper's values as defaults, and once more
        p = commands.choices[args.command]
        p.set_defaults(**{key: value for key, value in PAPER.items() if key in vars(args)})
        args = parser.parse_args(argv)
    programs = {"profile": profile, "finetune": finetune, "judge": fit_judge, "generate": generate}
    programs[args.command](args)


if __name__ == "__main__":
    run_cli(main)
    end_processes()
