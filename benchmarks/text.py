"""Text for learning from an embedder, cut anew every pass.

A student that has seen the same sentences for ten passes fits them (cosine 0.986) and not others
(0.95). The original labels any text, so new text is made from what there is: phrases, the
beginning of one joined to the end of another, windows of running text.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.data import data_folder

Batch = dict[str, Tensor]
BEGIN, END = 101, 102  # [CLS] and [SEP] of BERT's vocabulary
WINDOW = (3, 48)  # tokens, both ends included


def running(folder: Path | None = None) -> list[str]:
    """WikiText-2 (valid, test) and tiny Shakespeare as pieces of 400 words."""
    folder = folder or data_folder()
    files = ("wikitext2/valid.txt", "wikitext2/test.txt", "tinyshakespeare/input.txt")
    found: list[str] = []
    for name in files:
        words = (folder / name).read_text(encoding="utf-8").replace("<unk>", "").split()
        found += [" ".join(words[i : i + 400]) for i in range(0, len(words), 400)]
    return found


class Spliced:
    """Batches of `size` new texts, `count` batches a pass: what they hold depends on its number.

    Passes are numbered from `seed` on.

    Three in ten are phrases as they stand, three in ten the beginning of one and the end of
    another, four in ten windows of running text. Texts of like length share a batch.
    """

    def __init__(
        self, phrases: Sequence[str], pieces: Sequence[str], tokenizer: Callable[..., Any],
        size: int = 64, count: int = 1_000, seed: int = 0,
    ) -> None:  # fmt: skip
        self.size, self.count, self.seed, self.passes = size, count, seed, 0

        def tokens(texts: Sequence[str]) -> list[list[int]]:
            found = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
            return [ids for ids in found if ids]

        self.phrases, self.pieces = tokens(phrases), tokens(pieces)

    def __len__(self) -> int:
        return self.count

    def set_epoch(self, epoch: int) -> None:
        """The next pass is number `epoch`."""
        self.passes = epoch

    def _text(self, draw: random.Random) -> list[int]:
        """The tokens of one text, at least one, without beginning and end."""
        kind = draw.random()
        first = draw.choice(self.phrases)
        if kind < 0.3:
            return first
        if kind < 0.6:
            second = draw.choice(self.phrases)
            head, tail = draw.randint(1, len(first)), draw.randint(0, len(second))
            return first[:head] + second[tail:]
        piece, length = draw.choice(self.pieces), draw.randint(*WINDOW)
        start = draw.randint(0, max(len(piece) - length, 0))
        return piece[start : start + length]

    def __iter__(self) -> Iterator[tuple[Batch, None]]:
        draw = random.Random(self.seed + self.passes)
        self.passes += 1
        texts = sorted((self._text(draw) for _ in range(self.size * self.count)), key=len)
        starts = list(range(0, len(texts), self.size))
        draw.shuffle(starts)
        for start in starts:
            yield padded(texts[start : start + self.size]), None


def padded(texts: Sequence[Sequence[int]]) -> Batch:
    """`input_ids`, `attention_mask`, int64 `[texts, longest + 2]`."""
    longest = max(map(len, texts)) + 2
    ids = torch.zeros(len(texts), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, text in enumerate(texts):
        ids[row, : len(text) + 2] = torch.tensor([BEGIN, *text, END])
        mask[row, : len(text) + 2] = 1
    return {"input_ids": ids, "attention_mask": mask}
