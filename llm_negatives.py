"""llm_negatives.py: an LLM reads items, writes profiles, makes hard negatives.

read      items.jsonl -> texts.safetensors: a frozen LLM's mean hidden states of each item's title
          and metadata, one tensor (I, H) per layer, for the judge, the initial vectors and L_sem.
profile   items.jsonl, users.jsonl, train pairs -> profiles.jsonl: a sentence on what an item is
          like and who would enjoy it, and one on what a user enjoys.
finetune  cf.safetensors, profiles.jsonl -> adapter/ (LoRA, peft's format), sft.safetensors
          (soft-token maps, head). h(u, i) is the LLM's hidden state at the last prompt token;
          z = head(h) lies in the space of the centred CF item vectors c_j (hnlmrec.py's z is its
          projector's output instead). InfoNCE pulls z towards the hard negatives mined for u:
              L = -ln( sum_{j in mined(u)} exp(cos(z, c_j) / tau_s)
                       / sum_{j} exp(cos(z, c_j) / tau_s) )
generate  same prompts and encoder -> negatives-00000.safetensors …: h, head(h) of train pairs.

The method comes first: prompt and encoding, fine-tuning, generation, reading, profiles. Then come
the programs, the loading of LLMs and the command line.

One process:   python llm_negatives.py finetune --run runs/NAME
Several GPUs:  torchrun --nproc-per-node N -- llm_negatives.py finetune --run runs/NAME
"""

import contextlib, functools, hashlib, io, json, math, os, re, shutil, time, unicodedata, warnings
from argparse import BooleanOptionalAction, Namespace
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers import logging as transformers_logging
from transformers.pytorch_utils import Conv1D

from backbones import (
    SHARD_USERS, Bands, Parser, Progress, add_band_flags, add_flags, add_run_flags, check_finite,
    check_inputs, digests, fail, files_of, load_data, load_model, load_tensors, mining_band,
    mixgcf, number, output_name, rank, read_jsonl, run_cli, save_tensors, settings_of, shards, skip,
    start_processes, user_rows, world, write_atomic, writer_of)

# ==== 1. The hybrid prompt and its encoding: text plus soft tokens ================================
# Shapes: U users, I items, N train pairs, d numbers of a CF vector (D in backbones.py), H of a
# hidden state, L tokens, B rows of a batch, R pairs of G users. `fail` raises SystemExit2
# The prompt has four pieces; what several prompts share is computed once:
#     instruction | user: profile | item: title and profile | item vector, user vector
# The user vector comes last, so that h, the last token's hidden state, starts from e_u and gathers
# the rest by attention. On ML-100K (frozen LLM of 8 layers, head fitted on 3,000 pairs) a linear
# map recovers e_u of new users from h with R2 .5; the hit rate is .86 on held-back pairs of known
# users, .2 on those of new ones. With each vector right after its text: .1, .6, .2.

SOFT = -1  # in a list of token ids: "a soft token goes here"
INSTRUCTION = ("Name a hard negative: an item close to this user's taste that the user would still "
               "not choose.")
PLACE = "<<pieces>>"  # stands for the text of the user's turn while a chat template is rendered
# the mark that opens a reasoning LLM's thoughts (<think>); the closing one has a slash (</think>)
THINK = re.compile(r"[<\[◁][\w:]*(?:think|thought|reason)\w*[>\]▷]", re.IGNORECASE)


def chat_frame(tokenizer, instruction, examples=()):
    """What a chat template puts before and after the text of a user's turn -> (head, tail); plain
    lines where there is no template. examples: pairs (request, answer), as turns before it. Raises
    SystemExit2 unless the template prints the instruction, and the user's text exactly once."""
    contents = [instruction, *sum(examples, ()), PLACE]
    roles = ["system", *["user", "assistant"] * len(examples), "user"]
    turns = [{"role": role, "content": text} for role, text in zip(roles, contents)]
    text = (tokenizer.bos_token or "") + "\n".join([*contents, ""])
    # n contents go into the first turn. If a template ignores or refuses the system role, the first
    # user turn carries it too (n = 2); if it refuses the examples, one turn carries everything
    for n in (1, 2, len(turns)) if tokenizer.chat_template else ():
        first = {"role": "system" if n == 1 else "user", "content": "\n".join(contents[:n])}
        try:  # turn thinking off, where the template has it
            text = tokenizer.apply_chat_template([first, *turns[n:]], tokenize=False,
                                                 add_generation_prompt=True, enable_thinking=False)
        except Exception:  # noqa: BLE001 jinja's raise_exception("System role not supported")
            text = ""
        if all(part in text for part in contents):
            break
        text = ""
    if text.count(PLACE) != 1:
        fail("--llm: its chat template must print the instruction, and the user's turn once; "
             "give an LLM whose template does")
    head, tail = text.split(PLACE)
    # close the thoughts that the template opens; where an LLM has channels, open the answer's
    opened = THINK.findall(tail)
    if opened and tail.rstrip().endswith(opened[-1]):
        tail += f"\n{opened[-1][0]}/{opened[-1][1:]}\n\n"
    if {"<|channel|>", "<|message|>"} <= set(tokenizer.get_added_vocab()) and "final" not in tail:
        tail += "<|channel|>final<|message|>"
    return head, tail


def frame_ids(tokenizer, text):
    """Token ids of a part of a chat template; unlike in text_ids, control tokens count as such."""
    return tokenizer(text, add_special_tokens=False).input_ids


@functools.lru_cache(maxsize=4)
def control_tokens(tokenizer):
    """A pattern of the strings that the tokenizer reads as one token of its own ("<|im_end|>")."""
    # runs of spaces, and single characters, are text
    words = [word for word in {*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens}
             if len(word) > 1 and not word.isspace()]
    return re.compile("|".join(map(re.escape, words)) or "(?!)")


def text_ids(tokenizer, text):
    """Token ids of titles, reviews and profiles: text and nothing else."""
    # a control token in a text is cut after its first character, so that no title can end its turn;
    # split_special_tokens=True: in some tokenizers only, and not for tokens like "<think>"
    ids = []
    while found := control_tokens(tokenizer).search(text):
        ids += frame_ids(tokenizer, text[: found.start() + 1])
        text = text[found.start() + 1:]
    return ids + frame_ids(tokenizer, text)


class Prompt:
    """The prompt's pieces as token ids; `template` shows the whole. n_soft: soft tokens per CF
    vector, 0 for none (ablation); max_tokens: of each text; frame: from chat_frame(), or None."""
    def __init__(self, tokenizer, n_soft=1, max_tokens=48, frame=None):
        self.tokenizer, self.max_tokens = tokenizer, max_tokens
        self.frame = head, tail = frame or chat_frame(tokenizer, INSTRUCTION)
        # tokenized piece by piece, so that a prefix has the same ids for all its items
        self.shared, self.ask = frame_ids(tokenizer, head), frame_ids(tokenizer, tail)
        self.template = head + "User: {user}\nItem: {item}" + tail  # for people
        # the vectors stand after the turn's end, right before what the LLM would write
        if n_soft:
            soft = [SOFT] * n_soft
            self.ask = frame_ids(tokenizer, tail + "Item vector:") + soft
            self.ask += self.ids(" User vector:") + soft
            self.template += "Item vector:[e_i] User vector:[e_u]"

    def ids(self, text):
        return text_ids(self.tokenizer, text)

    def user(self, text):
        """profile -> ids."""
        return self.ids("User: ") + self.ids(text)[: self.max_tokens]

    def item(self, text):
        """title and profile -> ids, up to the token whose hidden state is read."""
        return self.ids("\nItem: ") + self.ids(text)[: self.max_tokens] + self.ask


class SoftTokens(nn.Module):
    """Learned linear maps, one of users and one of items: a CF vector (d,) -> (n_soft, H), each row
    scaled to `norm`, that of the LLM's token embeddings. user (U, d), item (I, d): CF vectors."""
    def __init__(self, user, item, hidden_size, norm, n_soft=1):
        super().__init__()
        self.n_soft, self.hidden_size = n_soft, hidden_size
        self.register_buffer("norm", torch.as_tensor(float(norm)))
        # standardised first: the mean, which every user shares and which is mostly popularity,
        # would otherwise be a part of every token (on ML-100K 13 % of e_u's mean square)
        self.register_buffer("mean", torch.stack([user.mean(0), item.mean(0)]))  # (2, d)
        self.register_buffer("std", torch.stack([user.std(0), item.std(0)]).clamp(min=1e-6))
        self.maps = nn.ModuleList(nn.Linear(user.shape[1], n_soft * hidden_size, bias=False)
                                  for _ in range(2 if n_soft else 0))

    def forward(self, side, vectors):
        """side 0 users, 1 items; vectors (B, d) -> (B, n_soft, H) of norm `norm`, the mean's 0."""
        if not self.n_soft:
            return vectors.new_zeros(len(vectors), 0, self.hidden_size)
        x = self.maps[side]((vectors - self.mean[side]) / self.std[side])
        return F.normalize(x.unflatten(-1, (self.n_soft, -1)), dim=-1) * self.norm


def pad(pieces, llm):
    """List of id lists -> ids (B, L) and mask (B, L) int64, padded on the right, on the LLM's
    device. Raises SystemExit2 for an id beyond the LLM's embeddings."""
    table, length = llm.get_input_embeddings().weight, max(map(len, pieces))
    ids = torch.tensor([piece + [0] * (length - len(piece)) for piece in pieces])
    mask = [[1] * len(piece) + [0] * (length - len(piece)) for piece in pieces]
    # on a GPU such an id would fail later, in an assertion that does not say where
    if (ids >= len(table)).any():
        fail(f"--llm: its tokenizer or chat template uses token {ids.max()}, the model has "
             f"{len(table)}; resize the model's embeddings, or give another LLM")
    return ids.to(table.device), torch.tensor(mask, device=table.device)


def encode_whole(llm, prompt, soft_tokens, user_texts, user_vectors, item_texts, item_vectors,
                 owner):
    """h(u, i), the hidden state of the last prompt token, after the LLM's final norm, written
    plainly: each pair's whole prompt in one forward pass, no cache.

    llm: a decoder without its language-model head; prompt: a Prompt; soft_tokens: a SoftTokens;
    G user_texts, user_vectors (G, d); R item_texts, item_vectors (R, d); owner (R,): which of the G
    users each item belongs to -> (R, H) float32."""
    # slower than encode(), which is tested against this. Gradient checkpointing needs this version:
    # it runs each layer twice and would fill a cache twice
    prefixes = [prompt.shared + prompt.user(text) for text in user_texts]
    pieces = [prefixes[user] + prompt.item(text) for user, text in zip(owner.tolist(), item_texts)]
    ids, mask = pad(pieces, llm)
    check_window(llm, ids.shape[1])
    # SOFT, -1, has no embedding: look up any; soft vectors then fill its places in order
    x = llm.get_input_embeddings()(ids.clamp(min=0))  # (R, L, H)
    soft = torch.cat([soft_tokens(1, item_vectors), soft_tokens(0, user_vectors[owner])], 1)
    x = x.masked_scatter((ids == SOFT)[..., None], soft.to(x.dtype))
    hidden = llm(inputs_embeds=x, attention_mask=mask, use_cache=False).last_hidden_state
    return hidden[torch.arange(len(ids), device=ids.device), mask.sum(1) - 1].float()


def encode(llm, prompt, soft_tokens, user_texts, user_vectors, item_texts, item_vectors, owner,
           batch=0):
    """What encode_whole() computes, faster: what several prompts share is run once. Arguments and
    result as there. batch: items per call, 0: all."""
    prefixes = [prompt.user(text) for text in user_texts]
    pieces = [prompt.item(text) for text in item_texts]

    # the instruction once for all, each user once on top of it
    past = run_piece(llm, [prompt.shared])[2]
    past = run_piece(llm, prefixes, None, past, [0] * len(prefixes))[2]

    # the items, each on top of its user; the item's soft tokens before the user's, as in the prompt
    soft = torch.cat([soft_tokens(1, item_vectors), soft_tokens(0, user_vectors[owner])], 1)
    # each call gets similar lengths, so that little is padding; a single call keeps the order
    result, order = [], torch.arange(len(pieces), device=owner.device)
    if batch:
        order = torch.tensor([len(p) for p in pieces], device=owner.device).argsort(stable=True)
    for part in order.split(batch or len(order)):
        last = run_piece(llm, [pieces[r] for r in part.tolist()], soft[part], past, owner[part])[1]
        result.append(last.float())
    return torch.cat(result)[order.argsort()]


def run_piece(llm, pieces, soft=None, past=None, owner=slice(None)):
    """Run one piece of the prompt on top of what is cached.

    pieces: B id lists; soft (B, S, H): vectors for the S SOFT places of each, in order; past: the
    third result of an earlier call; owner: the row of `past` that each piece continues (left out:
    piece b continues row b) -> hidden states (B, L, H); each row's at its last token (B, H); new
    past: (keys and values per layer, mask (B, L0 + L))."""
    # what goes in: embeddings of the ids, vectors in the SOFT places
    ids, mask = pad(pieces, llm)
    x = llm.get_input_embeddings()(ids.clamp(min=0))  # (B, L, H)
    if soft is not None:
        x = x.masked_scatter((ids == SOFT)[..., None], soft.to(x.dtype))

    # what came before, a copy for each row
    full, cache = mask, DynamicCache()
    if past is not None:
        keys_values, past_mask = past
        owner = torch.arange(len(past_mask), device=mask.device)[owner]  # (B,)
        full = torch.cat([past_mask[owner], mask], 1)  # (B, L0 + L)
        # index_select: on a CPU the gradient of keys[owner] would be added up in no fixed order
        cache = DynamicCache([(keys.index_select(0, owner), values.index_select(0, owner))
                              for keys, values in keys_values])
    check_window(llm, full.shape[1])

    # padding has no position of its own, so that a row's hidden states are those of its own prompt
    position = (full.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1]:]  # (B, L)
    out = llm(inputs_embeds=x, attention_mask=full, position_ids=position, past_key_values=cache,
              use_cache=True)
    keys_values, hidden = [layer[:2] for layer in out.past_key_values], out.last_hidden_state
    last = hidden[torch.arange(len(ids), device=ids.device), mask.sum(1) - 1]  # (B, H)
    return hidden, last, (keys_values, full)


def check_window(llm, length, windows="sliding_window attention_chunk_size window_size"):
    """Refuse a prompt longer than the LLM's attention window, or than its positions."""
    # padding counts in a window: a shorter one would make a row depend on the others' lengths
    config = llm.config.get_text_config()
    for name in [*windows.split(), "max_position_embeddings"]:
        window = getattr(config, name, None)
        if isinstance(window, int) and 0 < window < length:  # some LLMs write 0 for none
            fail(f"--llm: its {name} of {window} tokens is shorter than a prompt of {length}; "
                 "lower --max-tokens, --history or --new-tokens, or give another LLM")


def encode_pairs(llm, prompt, soft_tokens, cf, texts, pairs, drop="", profile_dropout=0.0,
                 encoder=encode):
    """h(u, i) of pairs (n, 2) -> (n, H). cf: {"user" (U, d), "item" (I, d)}; texts: (user profiles,
    item texts); encoder: encode or encode_whole; drop: a part to leave out, 'user vector', 'user
    profile' or 'item vector'; profile_dropout: share of users without a profile."""
    # each user once, with the place of each pair's user among them
    users, owner = pairs[:, 0].unique(return_inverse=True)
    # some go without a profile, so that the LLM cannot rely on recognising a known user's text
    blank = (torch.rand(len(users)) < profile_dropout) | (drop == "user profile")
    profiles = ["" if blank[n] else texts[0][user] for n, user in enumerate(users.tolist())]
    items = [texts[1][item] for item in pairs[:, 1].tolist()]
    user_vectors, item_vectors = cf["user"][users], cf["item"][pairs[:, 1]]
    # the mean vector says nothing about this user or item
    if drop == "user vector":
        user_vectors = cf["user"].mean(0).expand_as(user_vectors)
    if drop == "item vector":
        item_vectors = cf["item"].mean(0).expand_as(item_vectors)
    return encoder(llm, prompt, soft_tokens, profiles, user_vectors, items, item_vectors, owner)

# ==== 2. Fine-tuning, supervised, with InfoNCE against CF-mined hard negatives ====================
class Head(nn.Module):
    """z = W (h - mean) / std + b, from the LLM's hidden state to CF space: (B, H) -> (B, d)."""
    def __init__(self, hidden_size, dim):
        super().__init__()
        # of the frozen LLM's hidden states, set by fit_head() and not changed after: a few of their
        # dimensions are ten to fifty times larger than the rest and would drown them
        self.register_buffer("mean", torch.zeros(hidden_size))
        self.register_buffer("std", torch.ones(hidden_size))
        self.linear = nn.Linear(hidden_size, dim)

    def forward(self, hidden):
        return self.linear((hidden - self.mean) / self.std)


def info_nce(z, candidates, positive, tau, ignore=None):
    """InfoNCE with one or more positives a row (van den Oord et al., 2018; MIL-NCE, Miech et al.,
    CVPR 2020): -ln( sum_positive exp(s / tau) / sum_{not ignored} exp(s / tau) ), s the cosine.

    z (B, d), candidates (C, d), positive (B, P): ids, repeats count once; ignore (B, C) bool:
    candidates left out of the second sum, never positives -> scalar mean over B."""
    scores = F.normalize(z, dim=-1) / tau @ F.normalize(candidates, dim=-1).T  # (B, C)
    # only P of a row's C scores are exponentiated again: C is the whole catalogue
    positive = positive.sort(1).values
    again = F.pad(positive[:, 1:] == positive[:, :-1], (1, 0))  # (B, P)
    of_positives = scores.gather(1, positive).masked_fill(again, -torch.inf).logsumexp(1)
    if ignore is not None:
        scores = scores.masked_fill(ignore, -torch.inf)
    return (scores.logsumexp(1) - of_positives).mean()


class SftTask:
    """Data and loss of supervised fine-tuning; no valid or test pair is read. data: load_data's;
    cf_model: a Backbone; cf: its vectors, {"user" (U, d), "item" (I, d)}; texts: (user profiles,
    item texts); first, last: the mined ranks. Raises SystemExit2 for one user, or no pair left."""
    def __init__(self, data, cf_model, cf, texts, first, last, seed):
        self.cf, self.texts, self.train, self.cf_model = cf, texts, data["train"], cf_model
        self.mined = Bands(cf_model, self.train, first, last)
        # centred, so that cosine compares what tells items apart and not the direction that all
        # popular items share
        self.candidates = cf["item"] - cf["item"].mean(0)  # (I, d): c_j
        # Held back: pairs of users that fine-tuning sees, and all pairs of a tenth of the users,
        # which it never sees. With 64 of each, hit rates have a standard error of .0625 at most.
        self.generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self.train), generator=self.generator)
        new_user = torch.rand(data["n_users"], generator=self.generator) < 0.1
        is_new = new_user[self.train[order, 0].cpu()]
        known = order[~is_new]
        n_held = min(64, max(1, len(known) // 10))
        self.held = {"known users": known[:n_held], "new users": order[is_new][:64]}
        self.rows = known[n_held:]  # (N,) rows of train to learn from
        if data["n_users"] < 2 or not len(self.rows):
            fail("--run: fine-tuning needs two users or more, some of them not held back; "
                 f"{len(self.rows)} train pairs are left; give more data, or another --seed")

    def is_mined(self, rows):
        """(R, I) bool: the mined hard negatives of each row's user; (U, I) would be too large."""
        users = self.train[rows, 0]
        none = torch.zeros(len(rows), len(self.candidates), dtype=torch.bool, device=users.device)
        return none.scatter_(1, self.mined[users], True)

    def targets(self, rows):
        """Extra targets of a batch: none here, MixGCF's mixtures in MixedTask."""

    def loss(self, z, rows, tau, targets=None, first=0):
        """InfoNCE of z (R, d) over the whole catalogue: the user's mined items are positives, all
        others negatives, even u's train items. Only MixedTask uses targets and first."""
        return info_nce(z, self.candidates, self.mined[self.train[rows, 0]], tau)

    def hit_rate(self, z, rows):
        """How often the item nearest to z (cosine, whole catalogue) is one mined for the user."""
        scores = F.normalize(z, dim=-1) @ F.normalize(self.candidates, dim=-1).T
        return self.is_mined(rows).gather(1, scores.argmax(1)[:, None]).float().mean().item()


def sft_gradients(task, llm, prompt, soft_tokens, head, trained, rows, tau, *, micro_pairs, seed,
                  profile_dropout=0.0, encoder=encode, which=slice(None)):
    """One step's loss, the mean over rows (B,) of train -> scalar, its gradient left in .grad of
    the parameters `trained`. micro_pairs: pairs per part; which: a slice, the parts run here."""
    torch.manual_seed(seed)
    targets, loss = task.targets(rows), torch.zeros((), device=rows.device)
    for p in trained:  # zeros, not None: sum_over() needs a gradient even where no part is run here
        p.grad = torch.zeros_like(p)
    # memory holds the activations of one part at a time; the parts' gradients add up to the batch's
    for n, part in list(enumerate(rows.split(micro_pairs)))[which]:
        torch.manual_seed(seed * 1009 + n)  # differs for 1009 parts; same in any process or run
        hidden = encode_pairs(llm, prompt, soft_tokens, task.cf, task.texts, task.train[part], "",
                              profile_dropout, encoder)
        part_loss = task.loss(head(hidden), part, tau, targets, n * micro_pairs)
        part_loss = part_loss * len(part) / len(rows)
        part_loss.backward()
        loss += part_loss.detach()
    return loss


class MixedTask(SftTask):
    """SftTask whose positives are MixGCF's mixtures of a pair and mined items, not the items."""
    @functools.cached_property
    def item_layers(self):
        return self.cf_model.layers()[1].detach()  # (I, K, d)

    def targets(self, rows):
        """What MixGCF makes of each row's pair and 8 of its user's mined items -> (B, d)."""
        u, i = self.train[rows].T
        band = self.mined[u]  # (B, ranks of the band)
        pick = torch.randint(band.shape[1], (len(u), 8), device=u.device)  # make_sampler's 8
        some = band.gather(1, pick)
        mixed = mixgcf(self.cf["user"][u], self.item_layers, i, some, self.cf_model.pool)
        return mixed - self.cf["item"].mean(0)

    def loss(self, z, rows, tau, targets=None, first=0):
        """InfoNCE of z (R, d) over the catalogue and the batch's targets (B, d); the only positive
        of a row is its own target. z belongs to rows first … first + R - 1 of the batch."""
        candidates = torch.cat([self.candidates, targets])  # (I + B, d)
        own = len(self.candidates) + first + torch.arange(len(z), device=z.device)
        # mined items are as good as their mixture, so they are not negatives
        ignore = F.pad(self.is_mined(rows), (0, len(targets)))  # (R, I + B)
        return info_nce(z, candidates, own[:, None], tau, ignore)


def grouped_batches(users, rows, per_user, groups, generator, lengths=None):
    """Shuffle rows (R,) into batches of `groups` chunks, each of up to `per_user` rows of one user.
    users (N,), lengths (N,) of prompts: of all train rows -> list of int64 tensors."""
    # each user's rows in random order, cut into chunks: the items of one share the user's prefix
    rows = rows[torch.randperm(len(rows), generator=generator)]
    rows = rows[users[rows].argsort(stable=True)]
    chunks = []
    for of_user in rows.split(users[rows].unique_consecutive(return_counts=True)[1].tolist()):
        chunks += of_user.split(per_user)
    chunks = [chunks[k] for k in torch.randperm(len(chunks), generator=generator).tolist()]
    # sorted by length within windows of 8 batches: nearly random, yet little padding
    if lengths is not None:
        shuffled, chunks = chunks, []
        for at in range(0, len(shuffled), 8 * groups):
            chunks += sorted(shuffled[at:at + 8 * groups], key=lambda own: int(lengths[own].max()))
    batches = [torch.cat(chunks[at:at + groups]) for at in range(0, len(chunks), groups)]
    return [batches[k] for k in torch.randperm(len(batches), generator=generator).tolist()]


def fit_head(task, head, hidden, rows, tau, seed=0):
    """Warm-up: fit the head alone, mean and std first, on the frozen LLM's hidden states (N, H) of
    rows (N,): LoRA starts from a head that can read them (Kumar et al., ICLR 2022) -> last loss."""
    head.mean.copy_(hidden.mean(0))
    head.std.copy_(hidden.std(0).clamp(min=1e-4))
    generator = torch.Generator(hidden.device).manual_seed(seed)
    torch.manual_seed(seed)  # MixGCF's targets draw from the global generator
    # 300 steps at 3e-3 take half a minute of one core, longer with more items; more steps do not
    # raise the held-back hit rates; dropout .3, since 2,048 pairs are few for so many weights
    optimizer, dropout = torch.optim.Adam(head.parameters(), lr=3e-3), 0.3
    for _ in range(300):
        pick = torch.randperm(len(rows), generator=generator, device=hidden.device)[:2048]
        h = hidden[pick]
        # around the mean: a dropped entry reads as average
        keep = torch.rand(h.shape, generator=generator, device=h.device) >= dropout
        z = head(head.mean + (h - head.mean) * keep / (1 - dropout))
        loss = task.loss(z, rows[pick], tau, task.targets(rows[pick]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def learning_rate(step, steps):
    """Share of the full rate at `step` of `steps`, counted from 0: a linear rise or a half cosine,
    whichever is smaller."""
    # the usual schedule: Adam's moments are noisy at first, and late steps should be small
    warm_up = (step + 1) / max(1, steps // 10)  # rises to 1 over a tenth of the steps
    decay = 0.55 + 0.45 * math.cos(math.pi * step / max(1, steps))  # falls from 1 to a tenth
    return min(warm_up, decay)


def add_lora(llm, targets, r, alpha, dropout):
    """Put LoRA (Hu et al., ICLR 2022) on the linear layers named in `targets`, in float32 whatever
    the LLM's format. Prints which they are; raises SystemExit2 when a name matches no layer."""
    from peft import LoraConfig, get_peft_model  # here, since it takes two seconds to import

    # GPT-2's linear layers are Conv1D, which keeps its weights as (in, out)
    linear = [f".{name}" for name, module in llm.named_modules()
              if isinstance(module, (nn.Linear, Conv1D))]
    kinds = Counter(name.rpartition(".")[2] for name in linear)
    # a target is the end of a layer's path, as in peft, which silently skips one without a match
    found = {target: sum(name.endswith(f".{target}") for name in linear) for target in targets}
    on = ", ".join(f"{name} ×{count}" for name, count in found.items())
    if not all(found.values()):
        there = ", ".join(f"{name} ×{count}" for name, count in kinds.items())
        fail(f"--lora-targets {','.join(targets)}: a name matches no linear layer ({on}); choose "
             f"from those the LLM has: {there or 'none'}")
    print(f"LoRA on {len(found)} of {len(kinds)} kinds of linear layer: {on}")
    warnings.filterwarnings("ignore", message="fan_in_fan_out")  # peft sets it as Conv1D needs
    return get_peft_model(llm, LoraConfig(
        r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets))

# ==== 3. Generation, offline ======================================================================
def choose_pairs(train, n_users, per_user=0, limit=0, seed=0):
    """Which train pairs (N, 2) get a generated negative -> row numbers (n,), sorted by pair.
    per_user: limit per user; limit: in all, one pair of each user before a second; 0: no limit."""
    # users one after another, the pairs of each in random order
    generator = torch.Generator().manual_seed(seed)
    key = torch.rand(len(train), generator=generator, dtype=torch.float64)
    order = torch.argsort(train[:, 0].double() + key * 0.999)  # below user + 1 despite rounding
    # each pair's place among those of its user, from 0
    count = torch.bincount(train[:, 0], minlength=n_users)
    place = torch.arange(len(train)) - (count.cumsum(0) - count)[train[order, 0]]
    if per_user:
        order, place = order[place < per_user], place[place < per_user]
    # first places before second ones, users in random order
    if limit:
        user = torch.randperm(n_users, generator=generator)[train[order, 0]]
        order = order[(place * n_users + user).argsort()[:limit]]
    return order[torch.argsort(train[order, 0] * (int(train[:, 1].max()) + 1) + train[order, 1])]


@torch.no_grad()
def encode_many(llm, prompt, soft_tokens, cf, texts, pairs, *, drop="", profile_dropout=0.0,
                batch=64, which=slice(None), label=""):
    """encode_pairs over many pairs (n, 2) -> (n, H) float32. batch: pairs per call; which: a slice,
    the blocks run here (rows of others stay zero); label: the progress line's, "" for no line."""
    encoder = functools.partial(encode, batch=batch)
    hidden = torch.zeros(len(pairs), llm.config.get_text_config().hidden_size, device=pairs.device)
    # by user; a block is four calls of `batch` pairs, among which encode() sorts by length
    order = pairs[:, 0].argsort(stable=True)
    blocks = order.split(4 * batch) if len(order) else ()  # of none, split makes an empty block
    blocks, done = list(enumerate(blocks))[which], 0
    progress = Progress(label, sum(len(at) for _, at in blocks), "pairs")
    for n, at in blocks:
        torch.manual_seed(n)  # drops the same profiles, whichever process runs it
        hidden[at] = encode_pairs(llm, prompt, soft_tokens, cf, texts, pairs[at], drop,
                                  profile_dropout, encoder)
        done += len(at)
        if label:
            progress.update(done)
    return hidden

# ==== 4. Reading: what a frozen LLM makes of each text alone ======================================
READ_TOKENS = 64  # at which a text is cut


@torch.no_grad()
def read_layers(llm, tokenizer, texts, layers, batch=64, max_tokens=READ_TOKENS):
    """For each layer, the mean hidden state over each text's tokens -> a list of (I, H) float32.
    llm: a decoder without its head; layers: their numbers, 0 for the token embeddings (a bag of
    words); the last layer of `llm` is read after its final norm."""
    # The first position absorbs unneeded attention, and its state is a hundred times larger than
    # the rest (Xiao et al., attention sinks, ICLR 2024). So the beginning-of-sequence token (BOS)
    # goes in front and is left out of the mean. Where a tokenizer has none, the text's own first
    # token is left out, except in layer 0: token embeddings involve no attention
    sink = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    # each text once: in bf16 a text that stands in two batches would have two readings
    once = {text: k for k, text in enumerate(dict.fromkeys(texts))}
    places, texts = [once[text] for text in texts], list(once)
    order = sorted(range(len(texts)), key=lambda k: len(texts[k]))  # similar lengths together
    embedding, result = llm.get_input_embeddings(), [[] for _ in layers]
    device, progress = embedding.weight.device, Progress("read", len(texts), "texts")
    for at in range(0, len(order), batch):
        part = order[at:at + batch]
        ids, mask = pad([sink + text_ids(tokenizer, texts[k])[:max_tokens] for k in part], llm)
        hidden = [embedding(ids)]  # (B, L, H)
        if any(layers):  # a bag of words needs no layer run
            check_window(llm, ids.shape[1], "")  # no window matters: padding comes last
            hidden += llm(input_ids=ids, attention_mask=mask, use_cache=False,
                          output_hidden_states=True).hidden_states[1:]
            # Mamba and RWKV number their states otherwise; in a few LLMs a layer has two, or none
            config = llm.config.get_text_config()
            if (len(hidden) != 1 + config.num_hidden_layers
                    or not hasattr(config, "num_attention_heads")):
                fail(f"--llm: {config.model_type} does not give one state per attention layer; "
                     "read --layers 0, or give another LLM")
        for layer, rows in zip(layers, result):
            weight = mask.float()
            if sink or layer:  # without BOS, a text's only token is kept
                weight[:, 0] = 0 if sink else (mask.sum(1) == 1).float()
            weight /= weight.sum(1, keepdim=True).clamp(min=1)
            # Gemma 3n has several versions of its states, of which the first is active
            states = hidden[layer] if hidden[layer].dim() == 3 else hidden[layer][0]
            rows.append(torch.einsum("bl,blh->bh", weight, states.float()))
        progress.update(at + len(part))
    back = torch.tensor(order, device=device).argsort()[places]
    return [torch.cat(rows)[back] for rows in result]


def tf_idf(id_lists, width=512):
    """Latent semantic analysis (Deerwester et al., 1990) of texts as lists of token ids: rows of
    (1 + ln tf) ln(I / df), of length 1; U S of their SVD -> (I, k) float32, k <= `width`."""
    # the entries of the sparse table: a row per text, a column per token that occurs
    counts = sorted(Counter((row, t) for row, ids in enumerate(id_lists) for t in ids).items())
    row, token = torch.tensor([pair for pair, _ in counts]).T
    _, token, df = token.unique(return_inverse=True, return_counts=True)
    tf = torch.tensor([float(count) for _, count in counts])
    value = (1 + tf.log()) * (len(id_lists) / df[token]).log()
    norm = torch.zeros(len(id_lists)).index_add_(0, row, value**2).sqrt()
    value = value / norm[row].clamp(min=1e-12)
    table = torch.sparse_coo_tensor(torch.stack([row, token]), value, (len(id_lists), len(df)),
                                    check_invariants=False)
    with torch.random.fork_rng([]):
        torch.manual_seed(0)  # the SVD starts from random directions, more than are kept
        u, s, _ = torch.svd_lowrank(table, q=min(width + 64, *table.shape), niter=8)
    return (u * s)[:, :width]

# ==== 5. Profiles: a sentence per item, and per user ==============================================
# A system prompt, as in the paper; an item's metadata -> item profile; titles and profiles of some
# of a user's train items -> user profile. Worked examples stand before the request as turns: the
# shared prefix is run once, so they cost little, and a small LLM then writes about the item
# instead of "A classic, a classic." Of the examples tried, these had the fewest words copied into
# its answers.

SYSTEM = {
    "item": "You describe, in one short sentence, what an item is like and who would enjoy it.",
    "user": "You describe, in one short sentence, the taste of a person from the items they liked."}
EXAMPLES = {"item": (
    ("Item: Settlers of Catan. Board game Strategy",
     "A board game of trading and building settlements, for players who like to plan."),
    ("Item: Abbey Road. Vinyl Rock",
     "A rock album of rich harmonies, for listeners who enjoy melodic guitar music.")), "user": (
    ("Liked: Settlers of Catan (A board game of trading and building) Ticket to Ride (A game of "
     "railways)", "Enjoys clever games with friends, of planning, trading and building."),
    ("Liked: Abbey Road (A classic rock album) Kind of Blue (A calm jazz record)",
     "Enjoys melodic records, rich harmonies and calm solos."))}
# how each answer begins: about a user a small LLM would begin by copying the list
BEGINNING = {"item": "", "user": "Enjoys"}
WITHOUT_LLM = {"item": "{}", "user": "Likes {}."}  # filled with an item's text, a user's titles

# abbreviations: their full stop does not end a sentence
ABBREVIATIONS = ("mr mrs ms dr st jr sr prof mt ft gen lt col sgt capt rev vol no inc ltd co vs "
                 "etc feat ed").split()
FULL_STOPS = "。｡．！？।॥؟۔։።။។"  # of other scripts


def sentence_ends(text):
    """Where sentences end in `text` -> list of ints, each the place right after a stop."""
    ends = []
    for mark in re.finditer(rf"[.!?]+[\"'”’“»)\]]*(?=\s|$)|[{FULL_STOPS}]+[”’」』）]*", text):
        word = re.search(r"[^\s(\"'“‘]*$", text[:mark.start()])[0]
        # a stop that belongs to its word: "L.A.", "J.", "Dr."; a final "5." may be a cut-off "5.1"
        inside = ("." in word or word.lower() in ABBREVIATIONS or re.fullmatch(r"[^\W\d]", word)
                  or mark.end() == len(text) and re.search(r"(^|\D)\d{1,2}$", word))
        # nor does a sentence end before a small letter: "Super Mario Bros. fans", "Jeopardy! fans"
        goes_on = text[mark.end():].lstrip()[:1].islower()
        if not goes_on and (text[mark.start()] != "." or not inside):
            ends.append(mark.end())
    return ends


def whole_sentences(text):
    """One line, up to the last sentence's end; without an end, up to the last word."""
    # a token limit must not leave half a sentence
    text = " ".join(text.split())
    ends = sentence_ends(text)
    return text[:ends[-1]] if ends else text.rstrip(" ,;:-–—")


def is_whole(text):
    """Whether a text that is being written holds a whole sentence or line."""
    # a stop after a long lower-case word ends a sentence, whatever the next token would be
    ends = sentence_ends(text)
    return "\n" in text or bool(ends) and (
        ends[0] < len(text) or bool(re.search(rf"\b[a-z]{{4,}}[.!?]$|[{FULL_STOPS}]$", text)))


def answer(text, tokenizer):
    """An LLM's answer without its thoughts: <think>…</think>, [THINK]…[/THINK], channels
    ("<|channel|>analysis<|message|>…"). "" while it holds only thoughts."""
    # what follows the last closing mark, which is THINK with a slash after the bracket
    text = re.split(THINK.pattern.replace("◁]", "◁]/"), text, flags=re.IGNORECASE)[-1]
    text = THINK.split(text)[0]  # without a thought that has not ended
    said, *parts = control_tokens(tokenizer).split(text)
    if parts and not said.strip():  # channels: the answer is the part after the name "final"
        final = [part for name, part in zip(parts, parts[1:]) if name.strip() == "final"]
        said = final[-1] if final else ""
    return re.sub(r"^[^\n]{,80}:\s*\n", "", said).lstrip()  # without "Here is the sentence:"


def words_of(text):
    # kana and Han are written without spaces: there each character counts
    one = r"\u3040-\u30ff\u3400-\u9fff"
    # accents and vowel signs are not \w and would cut words: leave them out, except in Thai and
    # Lao, where nothing else separates words
    text = "".join(c for c in text.lower()
                   if unicodedata.category(c)[0] != "M" or "ก" < c <= "\u0eff")
    return re.findall(rf"[{one}]|[^\W{one}]+", text)


def runs_of(words, n):
    """Every run of n words, with its count."""
    return Counter(tuple(words[k:k + n]) for k in range(len(words) - n + 1))


def fault_of(sentence, title):
    """What is wrong with a sentence -> "empty", "prompt" (it repeats a text of the prompt), "loop"
    (it repeats itself), "title" (and no more), "cut" (it has no end), or "" for a good profile."""
    words = words_of(sentence)
    # seven words in a row are not a coincidence; a small LLM's own phrases share five or six
    shown = sum((*EXAMPLES["item"], *EXAMPLES["user"]), tuple(SYSTEM.values()))
    copied = any(runs_of(words, 7) & runs_of(words_of(text), 7) for text in shown)
    request = words[:1] in (["item"], ["liked"]) or sentence.count(": ") > 1  # a request's form
    # four words in a row that recur, over 7 characters in all: four Han characters may be one word
    again = any(n > 1 and sum(map(len, run)) > 7 for run, n in runs_of(words, 4).items())
    new = set(words) - {*words_of(title), "a", "an", "the", "is"}
    faults = {"empty": not words, "prompt": copied or request,
              "loop": again or len(set(words)) < 0.6 * len(words), "title": len(new) < 3,
              # a letter of Thai or Lao, which have no full stop, counts as an end
              "cut": not re.search(rf"[.!?…{FULL_STOPS}ก-\u0eff][\"'”’“»)\]」』）]*$", sentence)}
    return next((fault for fault, found in faults.items() if found), "")


def end_tokens(model, tokenizer):
    """Ids that end an answer -> set of ints (and None, where a name is missing)."""
    # the tokenizer and the generation config may each name another one
    named = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])}
    # Llama-3-8B-Instruct as published in April 2024 names its end of a turn in neither, so what the
    # chat template puts right after a turn is one too
    turns = [{"role": role, "content": PLACE} for role in ("user", "assistant")]
    if tokenizer.chat_template:
        with contextlib.suppress(Exception):  # a template may want other turns
            for after in tokenizer.apply_chat_template(turns, tokenize=False).split(PLACE)[1:]:
                if control_tokens(tokenizer).match(after):
                    ends.update(frame_ids(tokenizer, after)[:1])
    return ends


def best_new(logits, written, tokenizer):
    """Greedy choice among the 8 best tokens that avoids repeated pairs, "X X" and "X and X" (Paulus
    et al., 2018: triples), since small LLMs loop. logits (B, V), written: B id lists -> B ids."""
    def is_new(token, ids):
        again = token in ids[-2:] or (*ids[-1:], token) in zip(ids, ids[1:])
        # only tokens with two letters in a row are barred: digits (2000), commas and single
        # letters, which are whole tokens in some scripts, may repeat
        return not again or not re.search(r"[^\W\d]{2}", tokenizer.decode([token]))

    chosen = []
    for best, ids in zip(logits.topk(8).indices.tolist(), written):
        chosen.append(next((token for token in best if is_new(token, ids)), best[0]))
    return chosen


@torch.no_grad()
def write_texts(model, tokenizer, past, requests, new_tokens, ends):
    """Decode a batch, each row up to the end of its first sentence.

    model: a causal LM; past: run_piece(model.base_model, [ids])[2] of the ids that all prompts
    begin with; requests: B id lists, the rest of each prompt, best of similar length; ends: ids
    that end an answer -> list of B sentences."""
    base, to_logits, device = model.base_model, model.get_output_embeddings(), model.device
    # read the requests, all on top of the one past
    _, last, (keys_values, full) = run_piece(base, requests, None, past, [0] * len(requests))
    check_window(model, full.shape[1] + new_tokens)
    cache, alive = DynamicCache(keys_values), list(range(len(requests)))
    written, texts = [[] for _ in requests], [""] * len(requests)
    for step in range(new_tokens):
        # one more token per unfinished text; `row` counts in requests, `place` in what is left
        chosen = best_new(to_logits(last), [written[row] for row in alive], tokenizer)
        unfinished = []
        for place, (row, token) in enumerate(zip(alive, chosen)):
            if token not in ends:
                written[row].append(token)
                texts[row] = answer(tokenizer.decode(written[row]), tokenizer)
                if not is_whole(texts[row]):
                    unfinished.append(place)
        if not unfinished or step == new_tokens - 1:
            break
        # rows that have ended leave the batch; read the new token on top of all before
        if len(unfinished) < len(alive):
            cache.batch_select_indices(torch.tensor(unfinished, device=device))
            alive, full = [alive[place] for place in unfinished], full[unfinished]
        full = F.pad(full, (0, 1), value=1)  # (B, L0 + L + step + 1)
        ids = torch.tensor([written[row][-1:] for row in alive], device=device)
        last = base(input_ids=ids, attention_mask=full, position_ids=full.sum(1, keepdim=True) - 1,
                    past_key_values=cache, use_cache=True).last_hidden_state[:, 0]
    # a text cut by the token limit may end within a word, which is dropped
    for row in (alive[place] for place in unfinished):
        if not sentence_ends(texts[row]):
            texts[row] = (texts[row].rpartition(" ")[0] or texts[row]).rstrip(".")
    return [whole_sentences(text.split("\n")[0]) for text in texts]

# ==== The method ends here. Programs: finetune, generate, read, profile ===========================
LORA_DROPOUT = 0.05  # the paper's
PROFILE_DROPOUT = 0.2  # share of users whose profile is left blank: the LLM must not rely on it
LR_MAPS = 3e-4  # of soft-token maps and head: below LoRA's default, since the head is fitted first
ITEMS_PER_USER = 2  # a user's pairs drawn together: they share a prefix, yet a step has many users


def encode_rows(task, llm, prompt, soft_tokens, rows, drop="", dropout=0.0, label=""):
    """encode_many of rows of train -> (R, H). Each process encodes its share of the blocks."""
    hidden = encode_many(llm, prompt, soft_tokens, task.cf, task.texts, task.train[rows], drop=drop,
                         profile_dropout=dropout, which=slice(rank(), None, world()), label=label)
    sum_over([hidden])  # rows are zero where another process encodes them
    return hidden


def report_held(task, llm, prompt, soft_tokens, head, label, drops=("",)):
    """Print hit rates on both held-back sets."""
    for drop in drops:
        columns = ""
        for held, rows in task.held.items():
            if len(rows):
                hidden = encode_rows(task, llm, prompt, soft_tokens, rows, drop)
                columns += f"{held} {task.hit_rate(head(hidden), rows):.3f}   "
        name = f"{label}, without the {drop}" if drop else label
        print(f"  hit rate {name:<45}{columns}")


def load_encoder(llm, s, cf, device, frame=None):
    """The encoder before fine-tuning -> (llm, prompt, soft_tokens, head). llm: folder or id; s: the
    settings of `finetune`; cf: {"user" (U, d), "item" (I, d)}; frame: as Prompt's."""
    model, tokenizer = load_llm(llm, AutoModel, s.dtype, device, s.llm_layers), load_tokenizer(llm)
    # all use process 0's frame; a given one is not sent: in generate() a process may have no work
    frame = frame or from_all(chat_frame(tokenizer, INSTRUCTION))[0]
    prompt = Prompt(tokenizer, s.soft_tokens, s.max_tokens, frame)
    check_pieces(llm, model, tokenizer)
    # into the LLM and out of it: R^d -> R^H, R^H -> R^d
    hidden_size = model.config.get_text_config().hidden_size
    torch.manual_seed(s.seed)
    soft_tokens = SoftTokens(cf["user"], cf["item"], hidden_size, embedding_norm(model),
                             s.soft_tokens).to(device)
    return model, prompt, soft_tokens, Head(hidden_size, cf["item"].shape[1]).to(device)


def prepare_training(args, cf, frame):
    """load_encoder and LoRA -> (encoder, optimizer, {name: tensor} that a saved state holds)."""
    llm, prompt, soft_tokens, head = load_encoder(args.llm, args, cf, args.device, frame)
    if args.checkpointing:
        if not llm.supports_gradient_checkpointing:
            fail(f"--checkpointing: {llm.config.model_type} does not support it; leave it out")
        llm.gradient_checkpointing_enable({"use_reentrant": False})
    # on a CPU the backward pass of the fused attention makes a step in bf16 a third longer
    if args.device == "cpu":
        llm.set_attn_implementation("eager")
    targets = args.lora_targets.replace(" ", "").split(",")
    llm = add_lora(llm, targets, args.lora_rank, args.lora_alpha, LORA_DROPOUT)
    # two groups, since train_lora() gives LoRA a rate of its own
    lora = {f"lora.{name}": p for name, p in llm.named_parameters() if p.requires_grad}
    maps = dict(nn.ModuleDict({"soft": soft_tokens, "head": head}).named_parameters())
    optimizer = torch.optim.AdamW([{"params": [*lora.values()]}, {"params": [*maps.values()]}])
    # also saved: the mean and std that the warm-up sets, and Adam's state, made here and not in its
    # first step, so that a saved one can be copied into it. Adam keeps its step count on the CPU
    kept = lora | maps | {"head.mean": head.mean, "head.std": head.std}
    for name, p in (lora | maps).items():
        state = {"step": torch.zeros(()), "exp_avg": torch.zeros_like(p),
                 "exp_avg_sq": torch.zeros_like(p)}
        optimizer.state[p] = state
        kept |= {f"adam.{moment}.{name}": value for moment, value in state.items()}
    return (llm, prompt, soft_tokens, head), optimizer, kept


def training_order(task, warmup_pairs, steps, size):
    """Passes over the train pairs -> (rows (W,) for the head alone, `steps` batches of `size`)."""
    # characters stand for tokens: what counts is that similar lengths share a batch
    users, items = task.train.cpu().T
    lengths = torch.tensor([len(text) for text in task.texts[1]])[items]
    order = task.rows[:0].cpu()
    while len(order) < warmup_pairs + steps * size:
        batches = grouped_batches(users, task.rows.cpu(), ITEMS_PER_USER, size // ITEMS_PER_USER,
                                  task.generator, lengths)
        order = torch.cat([order, *batches])
    order = order.to(task.train.device)
    return order[:warmup_pairs], order[warmup_pairs:].split(size)[:steps]


def warm_up(task, llm, prompt, soft_tokens, head, rows, args):
    """Fit the head on the frozen LLM's hidden states of `rows`."""
    # two baselines for the hit rates printed below; neither needs an LLM. The best item is found on
    # these very rows, which makes its rate a little too high
    held = torch.cat(list(task.held.values()))
    share = task.is_mined(held).float().mean(0)  # (I,)
    chance, popular = share.mean().item(), share.max().item()
    n_items, n_mined, at_chance = len(task.candidates), task.mined.items.shape[1], ""
    if args.mine == "dns":  # with MixGCF each pair has one positive, not n_mined
        at_chance = f"loss at chance ln({n_items}/{n_mined}) = {math.log(n_items / n_mined):.3f}; "
    print(f"finetune: {len(task.rows)} train pairs, {len(held)} held back; mined ranks "
          f"{args.mine_first}–{args.mine_last} of {n_items}; {at_chance}hit rates without an LLM: "
          f"chance {chance:.3f}, best single item {popular:.3f}")
    if len(rows):
        hidden = encode_rows(task, llm, prompt, soft_tokens, rows, "", PROFILE_DROPOUT, "warm-up")
        loss = fit_head(task, head, hidden, rows, args.tau_s, args.seed)
        print(f"warm-up: head fitted on {len(rows)} pairs of the frozen LLM, loss {loss:.3f}")
        report_held(task, llm, prompt, soft_tokens, head, "after warm-up")


def train_lora(task, encoder, batches, args, optimizer, losses, save):
    """Train LoRA, maps and head with AdamW, a step per batch. losses: of the steps already done;
    their batches are skipped, and each new step appends its own. save(): every --save-every
    steps."""
    llm = encoder[0]
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    steps, progress = len(batches), Progress("finetune", len(batches), "steps")
    llm.train()
    for k in range(len(losses), steps):
        # one step; its seed is the step's own, so that a resumed run draws what a whole one would
        for group, rate in zip(optimizer.param_groups, (args.lr, LR_MAPS)):
            group["lr"] = rate * learning_rate(k, steps)
        loss = sft_gradients(task, *encoder, trained, batches[k], args.tau_s,
                             micro_pairs=args.micro_pairs, seed=args.seed * 1_000_003 + k,
                             profile_dropout=PROFILE_DROPOUT, which=slice(rank(), None, world()),
                             encoder=encode_whole if args.checkpointing else encode)
        sum_over([loss, *(p.grad for p in trained)])  # each process ran its share of the parts
        if not math.isfinite(loss):
            fail(f"finetune: the loss is {loss} at step {k + 1}; lower --lr or use --dtype fp32, "
                 "with --force")
        # norms are about 10 here, so this scales each step: all batches count alike
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        # what a person sees, and what a killed run resumes from
        losses.append(round(loss.item(), 4))
        recent = losses[-10:]
        progress.update(k + 1, f"loss {sum(recent) / len(recent):.3f}")
        if rank() == 0 and ((k + 1) % args.save_every == 0 or k + 1 == steps):
            save()
    llm.eval()


def finetune(args):
    """Fine-tune LoRA, the soft-token maps and the head; write adapter/ and sft.safetensors."""
    run, data, start = Path(args.run), load_data(args.run), time.time()
    name = output_name("--name", args.name, "llm_negatives.py finetune", word="sft")
    if args.warmup_pairs == 1:
        fail("--warmup-pairs 1: one pair has no deviation to standardise by; give 0, or 2 or more")
    out, partial = run / f"{name}.safetensors", run / f"{name}.partial.safetensors"
    # settings hold the band itself, not the 0 that stands for it
    args.mine_first, args.mine_last = mining_band(data, args.mine_first, args.mine_last)
    # finished with these settings: nothing to do; half-finished: resume from there
    args.dtype = pick_dtype(args.dtype, args.device)
    settings = settings_of(args, "name", "paper", "save_every", "checkpointing") | {
        "llm": llm_digest(args.llm),
        "inputs": digests(run, "data.safetensors", args.cf, args.profiles)}
    if skip(out, settings, args.force):
        return
    with contextlib.redirect_stdout(io.StringIO()):  # it would print "skip", but this resumes
        resumed = skip(partial, settings, args.force)
    state, saved = load_tensors(partial) if resumed else ({}, {})
    # the data: train pairs, what CF mined for their users, texts
    data["train"] = data["train"].to(args.device)
    model, _, cf = load_model(run / args.cf, data)
    if "item" not in cf:
        fail(f"--cf {args.cf}: is a closed form, which has no vectors; give a backbone's file")
    task = (MixedTask if args.mine == "mixgcf" else SftTask)(
        data, model, cf, load_profiles(run, args.profiles), args.mine_first, args.mine_last,
        args.seed)
    steps, size = args.steps, args.users_per_step * ITEMS_PER_USER
    if steps is None:  # 60 end within a minute or two, and LoRA learns little after them
        steps = math.ceil(args.epochs * len(task.rows) / size) if args.epochs else 60
    warm, batches = training_order(task, args.warmup_pairs, steps, size)
    task.mined[task.train[torch.cat([warm, *batches]), 0].unique()]  # mines for them in one go
    # the encoder; a resumed run keeps the chat template's rendering, which may print the date
    encoder, optimizer, kept = prepare_training(args, cf, saved.get("frame"))
    for name, value in state.items():
        kept[name].data.copy_(value)
    # from the saved state, or with the head's warm-up
    losses = saved.get("losses", [])
    if saved:
        print(f"finetune: resumes after step {len(losses)} of {steps}")
    else:  # LoRA still adds zero: running it would cost up to a third and change nothing
        with encoder[0].disable_adapter():
            warm_up(task, *encoder, warm, args)
    for value in kept.values() if world() > 1 else ():  # all start alike, to the last bit
        if value.dim():  # Adam's counts, on the CPU, are alike
            dist.broadcast(value.data, 0)
    meta = {"settings": settings, "frame": encoder[1].frame, "losses": losses}
    train_lora(task, encoder, batches, args, optimizer, losses,
               functools.partial(save_tensors, partial, kept, meta))
    # hit rates of the whole prompt, then without one part each: what each adds
    drops = ("", "user vector", "user profile", "item vector")
    report_held(task, *encoder, "after fine-tuning", drops)
    if rank() == 0:
        save_tuned(out, *encoder, meta | {"seconds": time.time() - start})
        partial.unlink(missing_ok=True)


def save_tuned(out, llm, prompt, soft_tokens, head, meta):
    """Write the adapter's folder, then NAME.safetensors, which names the adapter by its digest."""
    # if fine-tuning went wrong, write nothing
    adapter = out.with_name("adapter" + out.stem.removeprefix("sft"))
    tensors = nn.ModuleDict({"soft": soft_tokens, "head": head}).state_dict()
    check_finite(out, tensors, "lower --lr, use --dtype fp32 or more --warmup-pairs, with --force")
    # peft holds a set: sort it, so that two runs give the same file
    config = llm.peft_config["default"]
    config.target_modules = sorted(config.target_modules)
    # in a temporary folder, so that nobody sees an adapter half-written
    temporary = adapter.with_name(f".{adapter.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        llm.save_pretrained(temporary)
        shutil.rmtree(adapter, ignore_errors=True)
        os.replace(temporary, adapter)
    except (OSError, SafetensorError) as error:
        fail(f"{adapter}: cannot be written ({error}); make room and run again")
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    # weights, and the config, which says how they are scaled
    beside = [f"{adapter.name}/adapter_model.safetensors", f"{adapter.name}/adapter_config.json"]
    save_tensors(out, tensors, {
        **meta, "prompt": prompt.template, "beside": digests(out.parent, *beside)})
    print(f"wrote {adapter} and {out}, {meta['seconds']:.0f} s")


def load_sft(run, name, llm, device, lora=True):
    """The fine-tuned encoder of NAME.safetensors -> (llm, prompt, soft_tokens, head, meta). lora:
    False leaves the LLM as it came. Raises SystemExit2 for another LLM or adapter."""
    path = Path(run) / f"{name}.safetensors"
    tensors, meta = load_tensors(path, device)
    s = Namespace(**meta["settings"])
    if s.llm != llm_digest(llm):
        fail(f"{path}: was fine-tuned on another LLM than --llm {llm}; give that one, or run "
             f"`{writer_of(path)} --force`")
    # any vectors of width d will do here: load_state_dict() replaces all that is made from them
    some = dict.fromkeys(("user", "item"), tensors["soft.mean"].cpu())  # (2, d)
    model, prompt, soft_tokens, head = load_encoder(llm, s, some, device, meta["frame"])
    nn.ModuleDict({"soft": soft_tokens, "head": head}).load_state_dict(tensors)
    if lora:
        from peft import PeftModel  # here, since it takes two seconds to import
        adapter = path.with_name("adapter" + name.removeprefix("sft"))
        try:  # in the LLM's number format, so that nothing is converted in each layer
            model = PeftModel.from_pretrained(model, adapter, autocast_adapter_dtype=False,
                                              torch_device="cpu").eval()  # else by way of a GPU
        except Exception as error:  # noqa: BLE001 as in from_library
            fail(f"{adapter}: does not fit --llm {llm} ({type(error).__name__}: "
                 f"{str(error)[:200]}); run `{writer_of(path)} --force`")
    return model, prompt, soft_tokens.eval(), head.eval(), meta


def generate(args):
    """Write negatives-*.safetensors, a shard for each block of users: pairs (n, 2), hidden f16
    (n, H) = h(u, i), vector f16 (n, d) = head(h)."""
    run, data, start = Path(args.run), load_data(args.run), time.time()
    output_name("--out", args.out, "llm_negatives.py generate", word="negatives")
    # what the result depends on; load_negatives() takes the third input for the CF model's file
    sft = output_name("--sft", args.sft, "llm_negatives.py finetune", word="sft") + ".safetensors"
    meta = load_tensors(run / sft)[1]
    tuned = meta["settings"]
    if tuned["command"] != "finetune" or "beside" not in meta:  # or a half-finished one
        fail(f"--sft {args.sft}: {run / sft} holds what `{tuned['command']}` writes; give the "
             "--name of a finished fine-tuning")
    settings = settings_of(args, "paper", "batch_size", "sft") | {
        "llm": llm_digest(args.llm),
        "inputs": digests(run, "data.safetensors", sft, tuned["cf"], tuned["profiles"])}
    # which shards are missing, and whose pairs they hold
    paths = [run / name for name in shards(args.out, data["n_users"])]
    todo = [k for k, path in enumerate(paths) if not skip(path, settings, args.force)]
    for old in {*files_of(run / args.out)} - {*paths} if args.force else ():  # of more users
        old.unlink(missing_ok=True)
    todo = from_all(todo)[0]  # one list for all: another process may write already
    rows = choose_pairs(data["train"], data["n_users"], args.pairs_per_user, args.pairs, args.seed)
    users, train = data["train"][rows, 0], data["train"].to(args.device)
    print(f"generate: {len(rows)} pairs, {len(todo)} of {len(paths)} shards to make; "
          f"{data['n_users'] - len(users.unique())} users without a pair")
    # each process makes its own shards, and loads the LLM only if it has some to make
    mine = todo[rank()::world()]
    if mine:
        llm, prompt, soft_tokens, head, _ = load_sft(run, args.sft, args.llm, args.device,
                                                     args.finetune)
        cf, _ = load_tensors(run / tuned["cf"], args.device)
        texts = load_profiles(run, tuned["profiles"])
        # the zero-shot ablation: maps and head are untrained too, except the head's mean and std
        if not args.finetune:
            torch.manual_seed(args.seed)
            for module in (*soft_tokens.maps, head.linear):
                module.reset_parameters()
    for k in mine:
        begin = time.time()
        pairs = train[rows[users // SHARD_USERS == k]]
        hidden = encode_many(llm, prompt, soft_tokens, cf, texts, pairs, batch=args.batch_size,
                             label=f"generate {paths[k].name}").half()  # inf above 65,504
        with torch.no_grad():
            tensors = {"hidden": hidden, "vector": head(hidden.float()).half()}
        save_tensors(paths[k], {"pairs": pairs, **tensors},
                     {"settings": settings, "seconds": time.time() - begin},
                     "use --dtype fp32 in finetune, else another LLM")
    print(f"generate: {len(mine)} shards made, {len(paths)} are there, {time.time() - start:.0f} s")


def read(args):
    """Write texts.safetensors: what the LLM, or a control, makes of each item, layer00 … (I, H)."""
    run, data, start = Path(args.run), load_data(args.run), time.time()
    out = run / output_name("--out", args.out, "llm_negatives.py read", ".safetensors", "texts")
    # which layers: by default the embeddings and those at two fifths and two thirds of the depth
    config = from_library(args.llm, "model", AutoConfig.from_pretrained)
    depth = config.get_text_config().num_hidden_layers
    if args.control == "tfidf" and args.layers:
        fail("--control tfidf: has no layers, so --layers does not apply; leave it out")
    layers = args.layers or f"0,{round(depth * 2 / 5)},{round(depth * 2 / 3)}"
    if not re.fullmatch(r"\d+(,\d+)*", layers) or max(map(int, layers.split(","))) > depth:
        fail(f"--layers {layers}: {args.llm} has layers 0 (its token embeddings) to {depth}; give "
             "numbers of layers, such as 0,12")
    layers = [0] if args.control == "tfidf" else sorted(set(map(int, layers.split(","))))
    if args.most and not any(layers):
        fail("--most: layers above 0 alone are limited to popular items; leave it out")
    # a file made with these settings and inputs is not made again
    args.dtype = pick_dtype(args.dtype, args.device)
    inputs = ["data.safetensors", "items.jsonl"] + ([args.profiles] if args.profiles else [])
    settings = settings_of(args, "paper") | {
        "layers": layers, "llm": llm_digest(args.llm), "inputs": digests(run, *inputs)}
    if skip(out, settings, args.force):
        return
    # the texts, in the order of the contiguous ids; a profile that is the metadata adds nothing
    items = read_jsonl(run / "items.jsonl")
    texts = [f"{row['title']}. {row['text']}" for row in items]
    for n, told in enumerate(load_profiles(run, args.profiles)[1] if args.profiles else ()):
        if told != texts[n]:
            texts[n] += " " + told.removeprefix(f"{items[n]['title']}. ")
    tokenizer = load_tokenizer(args.llm)
    torch.manual_seed(args.seed)
    if args.control == "shuffled":  # texts given to items at random
        texts = [texts[n] for n in torch.randperm(len(texts)).tolist()]
    if args.control == "tfidf":
        readings = [tf_idf([text_ids(tokenizer, text) for text in texts])]
    else:
        try:
            # one layer more than is read: the final norm changes the states of the last one
            llm = load_llm(args.llm, AutoModel, args.dtype, args.device, min(layers[-1] + 1, depth))
        except SystemExit:  # a family whose layers depend on each other cannot be cut
            llm = load_llm(args.llm, AutoModel, args.dtype, args.device)
        if args.control == "random":  # the same architecture, untrained
            llm = AutoModel.from_config(llm.config).to(args.device, llm.dtype).eval()
        # layer 0 for all items, other layers only for the most popular ones: these layers take time
        readings = [] if layers[0] else read_layers(llm, tokenizer, texts, [0])
        popular = busiest(data["train"][:, 1], len(texts), args.most)
        some, deep = [texts[n] for n in popular], [layer for layer in layers if layer]
        for reading in read_layers(llm, tokenizer, some, deep) if deep else ():
            readings.append(reading.mean(0).repeat(len(texts), 1))  # (I, H), for those not read
            readings[-1][popular] = reading
        if deep and len(popular) < len(texts):
            print(f"read: the layers ran on the {len(popular)} most popular of {len(texts)} items; "
                  f"the others get {'layer 0 and ' * (not layers[0])}the mean of these items")
        if long := sum(len(text_ids(tokenizer, text)) > READ_TOKENS for text in texts):
            print(f"read: {long} of {len(texts)} texts are cut after {READ_TOKENS} tokens")
    tensors = {f"layer{layer:02d}": reading for layer, reading in zip(layers, readings)}
    save_tensors(out, tensors, {"settings": settings, "seconds": time.time() - start},
                 "use --dtype fp32")
    print(f"wrote {out}: {len(texts)} texts, layers {layers}, {time.time() - start:.0f} s")


def busiest(column, count, most):
    """The `most` busiest (0: all) of `count` users or items, by pairs in column (N,) -> list."""
    pairs = torch.bincount(column, minlength=count)
    return pairs.argsort(descending=True, stable=True)[:most or None].tolist()


def read_profiles(path):
    """profiles.jsonl -> (its settings, the chat template's frames, {(kind, raw id): profile})."""
    head, *rows = read_jsonl(path)
    with contextlib.suppress(KeyError, TypeError):  # rows of another shape
        made = {(row["kind"], row["raw"]): row["profile"] for row in rows}
        settings = head["settings"]
        if settings["command"] == "profile" and settings["inputs"]:
            return settings, head["frames"], made
    fail(f"{path}: is not what `profile` writes; name another, or run `{writer_of(path)}`")


class Profiles:
    """profiles.jsonl in the making, and the LLM that writes it. made: {(kind, raw id): text} so
    far; frames: {kind: (head, tail)}. Both go on from what an earlier start wrote. Raises
    SystemExit2 when that was made with other settings, unless --force."""
    def __init__(self, args, path, settings):
        self.args, self.path, self.settings = args, path, settings
        self.frames, self.made, self.faults, old = {}, {}, Counter(), settings
        if path.exists() and not args.force:
            old, self.frames, self.made = read_profiles(path)
        differ = [f"{name}={old.get(name)}, now {value}" for name, value in settings.items()
                  if old.get(name) != value]
        if differ:
            fail(f"{path}: made with {'; '.join(differ)}; run `{writer_of(path)} --force` to "
                 "remake it, or choose another --out")
        # one start for all: process 0 may write before another one reads
        self.frames, self.made = from_all((self.frames, self.made))[0]

    def start_llm(self):
        args = self.args
        self.model = load_llm(args.llm, AutoModelForCausalLM, args.dtype, args.device)
        self.tokenizer = tokenizer = load_tokenizer(args.llm)
        # rendered by the first start alone, since a template may print the date
        self.frames = from_all(self.frames or {
            kind: chat_frame(tokenizer, SYSTEM[kind], EXAMPLES[kind]) for kind in SYSTEM})[0]
        check_pieces(args.llm, self.model.base_model, tokenizer)
        self.ends = end_tokens(self.model, tokenizer)

    def save(self):
        lines = [{"settings": self.settings, "frames": self.frames}]
        lines += [{"kind": kind, "raw": raw, "profile": text}
                  for (kind, raw), text in self.made.items()]
        if rank() == 0:
            write_atomic(self.path, "".join(json.dumps(line) + "\n" for line in lines).encode())

    def add(self, kind, rows, requests, titles, texts):
        """Add the missing profiles of all items or users (rows, titles, texts: one each). The
        LLM writes those in `requests` {number: text}; `texts` fills in the rest and faulty ones."""
        keys = [(kind, row["raw"]) for row in rows]
        plain = [WITHOUT_LLM[kind].format(text) for text in texts]
        self.made |= {key: plain[n] for n, key in enumerate(keys) if n not in requests}
        todo, size = [n for n in sorted(requests) if keys[n] not in self.made], self.args.batch_size
        if todo:  # the answer's beginning is given, as a part of the prompt
            head, tail = self.frames[kind]
            tail = frame_ids(self.tokenizer, tail + BEGINNING[kind])
            ids = {n: text_ids(self.tokenizer, requests[n]) + tail for n in todo}
            past = run_piece(self.model.base_model, [frame_ids(self.tokenizer, head)])[2]
            # similar lengths together, so that little is padding
            todo.sort(key=lambda n: len(ids[n]))
        progress = Progress(f"profile {kind}s", len(todo), "written")
        progress.update(0)
        # each process writes a batch, then shares it: users' prompts quote items' profiles
        for at in range(0, len(todo), size * world()):
            numbers, written = todo[at:at + size * world()], []
            if mine := numbers[size * rank():][:size]:
                written = write_texts(self.model, self.tokenizer, past, [ids[n] for n in mine],
                                      self.args.new_tokens, self.ends)
            # each sentence is checked before anything else reads it
            for n, text in zip(numbers, sum(from_all(written), [])):
                text = f"{BEGINNING[kind]} {text}".strip() if text else ""
                fault = fault_of(text, titles[n])
                self.faults[fault] += 1
                self.made[keys[n]] = plain[n] if fault else text
            self.save()  # a crash loses a batch at most
            progress.update(at + len(numbers))
        # a measure of quality that needs no human reader
        if requests:
            distinct = len({self.made[keys[n]] for n in requests}) / len(requests)
            print(f"profile: {len(requests)} {kind}s, {distinct:.1%} distinct")


def profile(args):
    """Write profiles.jsonl, items first, since users' prompts quote their items' profiles. Resumes
    after a kill."""
    run, data, start = Path(args.run), load_data(args.run), time.time()
    items, users = read_jsonl(run / "items.jsonl"), read_jsonl(run / "users.jsonl")
    path = run / output_name("--out", args.out, "llm_negatives.py profile", ".jsonl", "profiles")
    # what the profiles depend on, and which of them an earlier start has written
    by_llm = args.profiles == "llm"
    args.dtype = pick_dtype(args.dtype, args.device) if by_llm else ""
    settings = settings_of(args, "paper", "batch_size") | {
        "inputs": digests(run, "data.safetensors"), "llm": llm_digest(args.llm) if by_llm else ""}
    file = Profiles(args, path, settings)
    total, earlier = len(items) + len(users), len(file.made)
    if earlier == total:
        print(f"skip: {path} is up to date")
        return
    # the LLM writes for the most popular items and the users with most pairs
    active, popular = [], []
    if by_llm:
        file.start_llm()
        popular = busiest(data["train"][:, 1], len(items), args.llm_rows)
        active = busiest(data["train"][:, 0], len(users), args.llm_rows)
    # items, by their metadata
    titles, texts = [row["title"] for row in items], [row["text"] for row in items]
    requests = {n: f"Item: {titles[n]}. {texts[n]}".strip() for n in popular}
    file.add("item", items, requests, titles, texts)
    # users, by some of their train items and these items' profiles; drawn for all in order, so that
    # a resumed run asks for the same
    (indptr, rows), histories = user_rows(data["train"], len(users)), []
    generator = torch.Generator().manual_seed(args.seed)
    for of_user in rows.split(indptr.diff().tolist()):
        pick = torch.randperm(len(of_user), generator=generator)[:args.history]
        histories.append([items[i] for i in of_user[pick].tolist()])
    titles = ["; ".join(item["title"] for item in history) for history in histories]
    requests = {}
    for n in active:
        words = ["Liked:"]
        for item in histories[n]:
            # a profile's first clause says what the item is; "for readers who …" would be copied
            clause = re.split("[,;，；]", file.made["item", item["raw"]])[0].rstrip(". ")
            words.append(f"{item['title']} ({clause})" if clause else item["title"])
        words += [f"They wrote: {text}" for text in users[n].get("reviews", [])]
        requests[n] = " ".join(words)
    file.add("user", users, requests, titles, titles)
    file.save()
    good = file.faults.pop("", 0)
    faults = ", ".join(f"{fault} {count}" for fault, count in file.faults.items())
    print(f"profile: {good} written by the LLM, {total - earlier - good} from metadata, of which "
          f"{sum(file.faults.values())} replace a sentence with a fault ({faults or 'none'})")
    print(f"wrote {path}, {earlier} of an earlier start, {time.time() - start:.0f} s")


def load_profiles(run, name="profiles.jsonl"):
    """-> (user profiles, item texts: title, then profile), lists of strings by contiguous id."""
    path, texts = Path(run) / name, []
    settings, _, made = read_profiles(path)
    check_inputs(path, settings["inputs"])  # of this split
    for kind in ("user", "item"):
        group = read_jsonl(path.parent / f"{kind}s.jsonl")
        missing = [row["raw"] for row in group if (kind, row["raw"]) not in made]
        if missing:
            fail(f"{path}: {len(missing)} profiles are missing, the first for {missing[0]!r}; "
                 f"run `{writer_of(path)}` again")
        texts.append([(f"{row['title']}. " if kind == "item" else "") + made[kind, row["raw"]]
                      for row in group])
    return tuple(texts)


def sum_over(tensors):
    """Add each tensor up over all processes, in place."""
    for tensor in tensors if world() > 1 else ():
        dist.all_reduce(tensor)


def from_all(value):
    """Each process's value, in order of rank -> list."""
    values = [value] * world()
    if world() > 1:
        dist.all_gather_object(values, value)
    return values

# ==== The LLM: loading, checks, number format, digest =============================================
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def pick_dtype(name, device):
    """auto, fp32, bf16 or fp16 -> the name of a torch dtype."""
    # auto is bf16 where the processor has instructions for it (GPU: if CUDA says so; CPU, on Linux
    # only: AVX512-BF16, AMX or Arm's BF16). Nothing is timed, so a machine always decides the same
    has_bf16 = False
    if str(device).startswith("cuda"):
        has_bf16 = torch.cuda.get_device_capability(device)[0] >= 8  # of this GPU, not of the first
    elif os.path.exists("/proc/cpuinfo"):
        flags = set(Path("/proc/cpuinfo").read_text().split())
        has_bf16 = not flags.isdisjoint({"avx512_bf16", "amx_bf16", "bf16"})
    return DTYPES.get(name) or DTYPES["bf16" if has_bf16 else "fp32"]


def from_library(llm, what, load, **options):
    """load(llm, …), a from_pretrained of the library, or a one-line error."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)  # renamed arguments in the libraries
    try:  # no code of the model's own is run
        return load(llm, trust_remote_code=False, **options)
    except Exception as error:  # noqa: BLE001 many kinds; all mean the same to the user
        fail(f"--llm {llm}: no {what} can be loaded from it ({type(error).__name__}: "
             f"{str(error)[:200]}); give a folder with safetensors, or a Hugging Face id in reach")


def load_tokenizer(llm):
    """The tokenizer of a Hugging Face id or a local folder."""
    return from_library(llm, "tokenizer", AutoTokenizer.from_pretrained)


def load_llm(llm, cls, dtype, device, layers=0):
    """The model of a Hugging Face id or a local folder, in eval mode, frozen. layers: how many of
    its layers to keep, 0: all. cls: AutoModel (hidden states) or AutoModelForCausalLM (logits).
    Raises SystemExit2 when there are fewer layers, or when weights are missing."""
    config = from_library(llm, "model", AutoConfig.from_pretrained)
    if getattr(config, "is_encoder_decoder", False):
        fail(f"--llm {llm}: {config.model_type} is an encoder with a decoder; give a causal LM")
    text = config.get_text_config()
    depth = text.num_hidden_layers
    if layers > depth:
        fail(f"--llm-layers {layers}: {llm} has {depth} layers; give {depth} or less, or 0 for all")
    text.num_hidden_layers = layers or depth
    if getattr(text, "scale_depth", 0):  # MiniCPM: what a layer adds is scaled by the depth
        text.scale_depth *= math.sqrt(text.num_hidden_layers / depth)
    model, loaded = from_library(llm, "model", cls.from_pretrained, config=config, dtype=dtype,
                                 use_safetensors=True, output_loading_info=True)  # no pickle
    # the library would silently fill in random weights for those that are missing
    missing = sorted(loaded["missing_keys"]) + sorted(map(str, loaded["mismatched_keys"]))
    if missing:
        fail(f"--llm {llm}: its files lack {len(missing)} of its weights (the first: "
             f"{missing[0]}); download or convert the model again")
    return model.requires_grad_(False).eval().to(device)


@torch.no_grad()
def check_pieces(name, llm, tokenizer):
    """Refuse an LLM that cannot be run in pieces."""
    # a plain call and two of run_piece, with padding in between, must give the same hidden states.
    # One check replaces a list of unsupported families: per-layer embeddings, states of linear
    # attention and positions that count padding all show here
    ids, why = text_ids(tokenizer, "Two old friends sail around the world alone."), "other states"
    try:
        plain = llm(input_ids=pad([ids], llm)[0]).last_hidden_state[0].float()
        past = run_piece(llm, [ids[:3], ids[:3] * 8])[2]  # the first row has 21 places of padding
        states = run_piece(llm, [ids[3:], ids[3:]], None, past)[0][0].float()
        off = ((states - plain[3:]).norm() / plain[3:].norm()).item()
        width = llm.config.get_text_config().hidden_size  # of soft tokens and of h
        if (llm.get_input_embeddings().weight.shape[1], plain.shape[1]) != (width, width):
            off, why = math.inf, "vectors of two widths"
    except Exception as error:  # noqa: BLE001 each family fails in its own way
        off, why = math.inf, f"{type(error).__name__}: {str(error)[:80]}"
    if not off < (1e-3 if llm.dtype == torch.float32 else 0.1):  # rounding alone: 1e-6 and .01
        fail(f"--llm {name}: {llm.config.model_type} needs more than input embeddings and a "
             f"key/value cache ({why}); give another LLM; `read` works with this one")


@torch.no_grad()
def embedding_norm(llm):
    """Mean norm of what the embedding gives, over the vocabulary."""
    # not of its weights: Gemma's embedding scales them
    embed = llm.get_input_embeddings()
    ids = torch.arange(embed.weight.shape[0], device=embed.weight.device)
    return torch.cat([embed(part).float().norm(dim=1) for part in ids.split(4096)]).mean()


def llm_digest(llm):
    """What tells LLMs apart: 16 hex digits of a folder's model files, or a hub id and commit."""
    if not Path(llm).is_dir():
        config = from_library(llm, "model", AutoConfig.from_pretrained)
        return f"{llm}@{getattr(config, '_commit_hash', None)}"
    # whole files, each time: about a second a gigabyte, more than loading cached ones takes
    digest, read_from = hashlib.sha256(), "json jinja txt model tiktoken safetensors bin".split()
    for path in sorted(Path(llm).rglob("*")):
        name = str(path.relative_to(llm))
        if not name.startswith(".") and path.suffix[1:] in read_from and path.is_file():
            digest.update(f"{name} {path.stat().st_size} ".encode())
            with open(path, "rb") as file:
                while block := file.read(2**20):
                    digest.update(block)
    return digest.hexdigest()[:16]

# ==== Command line ================================================================================
# what the paper states; LoRA's alpha is its library's default, as in the published code
PAPER = {"llm": "meta-llama/Meta-Llama-3-8B-Instruct", "llm_layers": 0, "dtype": "bf16",
         "lora_rank": 32, "lora_alpha": 8.0, "lr": 2e-5, "tau_s": 0.05, "epochs": 5.0}


def main(argv=None):
    parser = Parser(prog="llm_negatives.py", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    # types of arguments: int from 0, int from 1, float above 0
    count, some, above = number(int, 0), number(int, 1), number(float, 0, open_low=True)

    def command(name, text, example, out=None):
        example = f"example: python llm_negatives.py {name} --run runs/demo {example}"
        p = commands.add_parser(name, help=text, description=text, epilog=example)
        add_run_flags(p, out)
        p.add_argument("--llm", default="assets/SmolLM2-135M-Instruct",
                       help="local folder or Hugging Face id of a causal LM")
        p.add_argument("--paper", action="store_true",
                       help="the paper's LLM and settings; explicit flags override them")
        p.add_argument("--seed", type=count, default=0, help="decides all random choices")
        if name != "generate":  # which takes what fine-tuning took
            p.add_argument("--dtype", choices=["auto", *DTYPES], default="auto", help="of the LLM")
        return p

    p = command("read", f"a frozen LLM's reading of each item's first {READ_TOKENS} tokens of text",
                "--layers 0,12,20", "texts.safetensors")
    p.add_argument("--layers", default="",
                   help="such as 0,12; 0: a bag of words; left out: 0, 2/5 and 2/3 of the depth")
    p.add_argument("--control", choices=["none", "shuffled", "random", "tfidf"], default="none",
                   help="texts of other items, an LLM of random weights, or TF-IDF (whole texts)")
    p.add_argument("--most", type=count, default=0, help="popular items the layers read; 0: all")
    p.add_argument("--profiles", metavar="FILE", help="profiles in the run, read after metadata")

    p = command("profile", "write a text profile of each user and item", "--profiles template",
                "profiles.jsonl")
    p.add_argument("--profiles", choices=["llm", "template"], default="llm",
                   help="who writes them; template uses metadata alone")
    p.add_argument("--history", type=some, default=4, help="train items that make a user's profile")
    p.add_argument("--new-tokens", type=some, default=40, help="tokens written at most")
    p.add_argument("--llm-rows", type=count, default=0,
                   help="most popular items, and most active users, the LLM writes for; 0: all")
    p.add_argument("--batch-size", type=some, default=64, help="prompts per call")

    p = command("finetune", "LoRA with InfoNCE against CF-mined hard negatives", "--steps 100")
    p.add_argument("--mine", choices=["dns", "mixgcf"], default="dns",
                   help="targets: the mined items, or MixGCF's mixture of them")
    add_band_flags(p)
    p.add_argument("--checkpointing", action="store_true", help="less memory, but slower steps")
    add_flags(
        p, ("--cf", str, "cf.safetensors", "CF vectors, inside the run folder"),
        ("--profiles", str, "profiles.jsonl", "profiles, inside the run folder"),
        ("--name", str, "sft", "output name, such as sft-2 (LoRA: adapter-2/)"),
        ("--tau-s", above, 0.05, "InfoNCE temperature"),
        ("--soft-tokens", count, 1, "per CF vector; 0: none (ablation)"),
        ("--max-tokens", some, 48, "tokens kept of a user's profile, and of an item's whole text"),
        ("--llm-layers", count, 8, "first layers to keep; 0: all"),
        ("--lora-rank", some, 8, "LoRA r"), ("--lora-alpha", above, 16, "LoRA alpha"),
        ("--lora-targets", str, "q_proj,k_proj,v_proj,o_proj", "linear layers"),
        ("--warmup-pairs", count, 2048, "pairs for the head; 0: none"),
        ("--steps", count, None, "LoRA steps (60, or those of --epochs)"),
        ("--epochs", number(float, 0), 0, "passes over the pairs, if --steps is left out"),
        ("--users-per-step", some, 16, "a step has twice as many pairs, mostly two per user"),
        ("--micro-pairs", some, 16,
         "pairs per part of a step: held in memory at once, shared out by torchrun"),
        ("--lr", above, 5e-4, "learning rate of LoRA"),
        ("--save-every", some, 20, "steps a killed run may lose"))

    p = command("generate", "write the hard negatives of the train pairs", "--pairs-per-user 8")
    p.add_argument("--finetune", action=BooleanOptionalAction, default=True,
                   help="use the fine-tuned LLM; --no-finetune: the original, a zero-shot ablation")
    add_flags(
        p, ("--sft", str, "sft", "the --name that fine-tuning was given"),
        ("--pairs-per-user", count, 0, "pairs per user at most; 0: all"),
        ("--pairs", count, 0, "pairs in all at most, one of each user before any second; 0: all"),
        ("--batch-size", some, 96, "prompts per call; up to four times as many user prefixes"),
        ("--out", str, "negatives", "first part of the shards' names"))

    args = parser.parse_args(argv)
    if args.paper:  # parse again, with the paper's values as defaults
        values = {name: value for name, value in PAPER.items() if name in vars(args)}
        commands.choices[args.command].set_defaults(**values)
        args = parser.parse_args(argv)
    if args.command != "read":
        args.device = start_processes(args.device)
    elif os.environ.get("WORLD_SIZE", "") not in ("", "0", "1"):
        fail("WORLD_SIZE: `read` is one process; start it without torchrun")
    programs = {"read": read, "profile": profile, "finetune": finetune, "generate": generate}
    programs[args.command](args)


if __name__ == "__main__":
    run_cli(main)
