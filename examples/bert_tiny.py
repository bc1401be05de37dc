"""BERT-Tiny (2 layers of 128) for two text classification tasks: tokens, training, export.

`splitquant_bert_tiny.py` uses it. Nothing is pre-trained: embeddings and layers are learned from
the task's own texts, which takes a minute or two on two cores. Needs the `torch` extra.

A tasks folder holds `bert_vocab/vocab.txt` (WordPiece of bert-base-uncased),
`sms_spam/SMSSpamCollection` and `dair_emotion/{train,val,test}.txt`.
"""

from __future__ import annotations

import copy
import math
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.nn import functional

import fourfold

LENGTH = 64
WIDTH, HEADS, LAYERS, INNER = 128, 2, 2, 512
DROPOUT = 0.1
BATCH = 64
UNKNOWN, LAST_SPECIAL = 100, 103  # ids of [UNK] and [MASK]
UNKNOWN_SHARE = 0.1
EMOTIONS = ("sadness", "joy", "love", "anger", "fear", "surprise")

Array = np.ndarray


@dataclass(frozen=True)
class Texts:
    """Token ids int64 [n, LENGTH], padded with zeros, and labels int64 [n]."""

    ids: Array
    labels: Array

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, chosen: Array) -> Texts:
        """Return the texts at these indices."""
        return Texts(self.ids[chosen], self.labels[chosen])

    def feeds(self) -> dict[str, Array]:
        """Return the arrays by the model's input names, and the labels."""
        mask = (self.ids != 0).astype(np.int64)
        return {"input_ids": self.ids, "attention_mask": mask, "labels": self.labels}


@dataclass(frozen=True)
class Task:
    """A classification task, and how long to train for it."""

    name: str
    classes: int
    epochs: int
    train: Texts
    val: Texts
    test: Texts


class WordPiece:
    """BERT's uncased tokenizer.

    Args:
        words: The vocabulary, a line a piece; the line's number is the token's id.
    """

    def __init__(self, words: list[str]) -> None:
        self.size = len(words)
        self._ids = {word: number for number, word in enumerate(words)}
        self._pieces = cache(self._split)  # most words come again and again

    def encode(self, texts: list[str]) -> Array:
        """Return ids int64 [texts, LENGTH]: [CLS], as many pieces as fit, [SEP], zeros."""
        rows = np.zeros((len(texts), LENGTH), np.int64)
        for row, text in zip(rows, texts, strict=True):
            pieces = [piece for word in _words(text) for piece in self._pieces(word)]
            ids = [self._ids["[CLS]"], *pieces[: LENGTH - 2], self._ids["[SEP]"]]
            row[: len(ids)] = ids
        return rows

    def _split(self, word: str) -> list[int]:
        """Return the ids of the longest pieces from left to right, or of [UNK] alone."""
        found: list[int] = []
        start = 0
        while start < len(word):
            prefix = "##" if start else ""
            ends = range(len(word), start, -1)
            end = next((e for e in ends if prefix + word[start:e] in self._ids), None)
            if end is None:
                return [self._ids["[UNK]"]]
            found.append(self._ids[prefix + word[start:end]])
            start = end
        return found


def _words(text: str) -> list[str]:
    """Return lowercase words without accents; every punctuation mark is a word."""
    plain = unicodedata.normalize("NFD", text.lower())
    return "".join(_spaced(sign) for sign in plain).split()


def _spaced(sign: str) -> str:
    """Return a character as the tokenizer reads it."""
    kind = unicodedata.category(sign)
    if kind == "Mn":
        return ""
    # BERT takes all of ASCII that is no letter, digit or blank as punctuation: $ + < ^ ` too.
    mark = kind[0] == "P" or (sign.isascii() and sign.isprintable() and not sign.isalnum())
    return f" {sign} " if mark else sign


def read_tasks(folder: Path) -> tuple[dict[str, Callable[[int | None], Task]], int]:
    """Return what loads each task by name (with other epochs than its own), and the vocabulary."""
    words = (folder / "bert_vocab/vocab.txt").read_text(encoding="utf-8").split("\n")
    tokens = WordPiece(words[:-1] if not words[-1] else words)
    loaders: dict[str, Callable[[int | None], Task]] = {
        "sms_spam": lambda epochs: _sms_spam(folder / "sms_spam", tokens, epochs or 8),
        "emotion": lambda epochs: _emotion(folder / "dair_emotion", tokens, epochs or 5),
    }
    return loaders, tokens.size


def _emotion(folder: Path, tokens: WordPiece, epochs: int) -> Task:
    """Return DAIR emotion in its own three parts."""

    def part(name: str) -> Texts:
        lines = (folder / f"{name}.txt").read_text(encoding="utf-8").splitlines()
        pairs = [line.rsplit(";", 1) for line in lines if line.strip()]
        labels = np.array([EMOTIONS.index(label) for _, label in pairs], np.int64)
        return Texts(tokens.encode([text for text, _ in pairs]), labels)

    return Task("emotion", len(EMOTIONS), epochs, part("train"), part("val"), part("test"))


def _sms_spam(folder: Path, tokens: WordPiece, epochs: int) -> Task:
    """Return SMS Spam, of each class every fifth message for the test, every tenth to validate."""
    lines = (folder / "SMSSpamCollection").read_text(encoding="utf-8").split("\n")
    pairs = [line.split("\t", 1) for line in lines if line]
    labels = np.array([label == "spam" for label, _ in pairs], np.int64)
    every = Texts(tokens.encode([text for _, text in pairs]), labels)
    order = np.random.default_rng(0).permutation(len(every))
    turn = np.empty(len(every), np.int64)
    for label in (0, 1):
        ones = order[labels[order] == label]
        turn[ones] = np.arange(len(ones)) % 10
    train, val, test = (np.flatnonzero(part) for part in (turn > 2, turn == 2, turn < 2))
    return Task("sms_spam", 2, epochs, every.take(train), every.take(val), every.take(test))


class Layer(nn.Module):  # type: ignore[misc]  # torch is read as untyped
    """One encoder layer: attention and a feed-forward net, each with LayerNorm behind its sum."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.attended = (
            nn.Linear(WIDTH, WIDTH) for _ in range(4)
        )
        self.inner, self.outer = nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH)
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.drop = nn.Dropout(DROPOUT)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Return [n, tokens, WIDTH] of the same; `mask` [n, 1, 1, tokens] is added to scores."""
        scores = _heads(self.query(x)) @ _heads(self.key(x)).transpose(2, 3)
        shares = self.drop(functional.softmax(scores / math.sqrt(WIDTH // HEADS) + mask, -1))
        mixed = (shares @ _heads(self.value(x))).transpose(1, 2).flatten(2)
        x = self.first(x + self.drop(self.attended(mixed)))
        return self.second(x + self.drop(self.outer(functional.gelu(self.inner(x)))))


def _heads(x: Tensor) -> Tensor:
    """Return [n, HEADS, tokens, WIDTH / HEADS] of [n, tokens, WIDTH]."""
    return x.unflatten(2, (HEADS, WIDTH // HEADS)).transpose(1, 2)


class BertTiny(nn.Module):  # type: ignore[misc]  # torch is read as untyped
    """BERT-Tiny without token types: token ids and their mask to logits."""

    def __init__(self, vocabulary: int, classes: int) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary, WIDTH, sparse=True)
        self.positions = nn.Embedding(LENGTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.drop = nn.Dropout(DROPOUT)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.pooler = nn.Linear(WIDTH, WIDTH)
        self.classifier = nn.Linear(WIDTH, classes)
        for part in self.modules():
            if isinstance(part, nn.Embedding):
                nn.init.normal_(part.weight, std=0.02)
            if isinstance(part, nn.Linear):
                # BERT's 0.02 is for long pre-training; with it the layers of so short a training
                # hardly take part, and embeddings alone tell the classes.
                nn.init.kaiming_normal_(part.weight, nonlinearity="relu")
                nn.init.zeros_(part.bias)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return logits [n, classes] of ids and mask [n, tokens]."""
        places = self.positions.weight[: input_ids.shape[1]]
        x = self.drop(self.norm(self.words(input_ids) + places))
        # A finite number for "minus infinity": a row of nothing but padding stays finite.
        mask = (1.0 - attention_mask[:, None, None].to(x.dtype)) * -1e4
        for layer in self.layers:
            x = layer(x, mask)
        return self.classifier(self.drop(torch.tanh(self.pooler(x[:, 0]))))


def train(task: Task, vocabulary: int, seed: int) -> BertTiny:
    """Train from random weights; return the best epoch by validation, in evaluation mode."""
    torch.manual_seed(seed)
    draw = torch.Generator().manual_seed(seed)
    net = BertTiny(vocabulary, task.classes)
    dense = [value for name, value in net.named_parameters() if name != "words.weight"]
    # A batch meets a few hundred of 30,522 words: only their rows are moved.
    optimizers = (
        torch.optim.AdamW(dense, weight_decay=0.01),
        torch.optim.SparseAdam([net.words.weight]),
    )
    steps = task.epochs * len(_batches(task.train, draw))
    schedules = [
        torch.optim.lr_scheduler.OneCycleLR(
            optimizer, rate, total_steps=steps, pct_start=0.1, cycle_momentum=False
        )
        for optimizer, rate in zip(optimizers, (3e-4, 1e-3), strict=True)
    ]
    best, kept = -1.0, net.state_dict()
    for _ in range(task.epochs):
        net.train()
        for ids, labels in _batches(task.train, draw):
            logits = net(_with_unknowns(ids, draw), (ids != 0).long())
            loss = functional.cross_entropy(logits, labels)
            net.zero_grad()
            loss.backward()
            for one in (*optimizers, *schedules):
                one.step()
        net.eval()
        score = accuracy(net, task.val)
        if score >= best:
            best, kept = score, copy.deepcopy(net.state_dict())
    net.load_state_dict(kept)
    _fill_unseen(net, task.train)
    return net


def _batches(texts: Texts, draw: torch.Generator) -> list[tuple[Tensor, Tensor]]:
    """Return ids and labels in random batches of texts of similar length, cut to the longest."""
    lengths = (texts.ids != 0).sum(axis=1)
    order = torch.randperm(len(texts), generator=draw).numpy()
    found = []
    for start in range(0, len(order), 16 * BATCH):
        pool = order[start : start + 16 * BATCH]
        pool = pool[np.argsort(lengths[pool], kind="stable")]
        found += [pool[first : first + BATCH] for first in range(0, len(pool), BATCH)]
    mixed = [found[n] for n in torch.randperm(len(found), generator=draw).tolist()]
    return [
        (torch.from_numpy(part.ids[:, : lengths[chosen].max()]), torch.from_numpy(part.labels))
        for chosen in mixed
        for part in (texts.take(chosen),)
    ]


def _with_unknowns(ids: Tensor, draw: torch.Generator) -> Tensor:
    """Return ids in which some words are [UNK], so that no single word is relied on."""
    hidden = torch.rand(ids.shape, generator=draw) < UNKNOWN_SHARE
    return ids.masked_fill(hidden & (ids > LAST_SPECIAL), UNKNOWN)


def _fill_unseen(net: BertTiny, texts: Texts) -> None:
    """Give every word that was never trained the row of [UNK] instead of random numbers."""
    table = net.words.weight.detach()
    seen = torch.zeros(len(table), dtype=torch.bool)
    seen[torch.from_numpy(texts.ids).unique()] = True
    table[~seen] = table[UNKNOWN].clone()


def accuracy(net: BertTiny, texts: Texts) -> float:
    """Return the percentage of texts whose largest logit is at the label."""
    with torch.no_grad():
        hits = [
            net(ids, (ids != 0).long()).argmax(1) == labels
            for ids, labels in _batches(texts, torch.Generator().manual_seed(0))
        ]
    return float(torch.cat(hits).double().mean() * 100)


def export(net: BertTiny) -> ir.Model:
    """Return the network as ONNX: ids and mask int64 [n, LENGTH] to `logits` [n, classes]."""
    rows = torch.export.Dim("n")
    # Two tensors: one given twice would be taken for one input.
    examples = torch.ones(2, LENGTH, dtype=torch.int64), torch.ones(2, LENGTH, dtype=torch.int64)
    model = fourfold.export(
        net, examples, dynamic_shapes={"input_ids": {0: rows}, "attention_mask": {0: rows}}
    )
    model.graph.outputs[0].name = "logits"
    return model
