"""Text made anew every pass."""

from typing import Any

import torch
from benchmarks.text import BEGIN, END, Spliced, padded

PHRASES = ["ab", "cdef", ""]
PIECES = ["g" * 200, "h" * 10]


def letters(texts: list[str], **_: Any) -> dict[str, list[list[int]]]:
    """A tokenizer of letters."""
    return {"input_ids": [[ord(letter) for letter in text] for text in texts]}


def spliced() -> Spliced:
    return Spliced(PHRASES, PIECES, letters, size=8, count=50)


def told(batches: Spliced) -> list[list[int]]:
    """The texts of a pass without padding, beginning and end."""
    return [
        ids[mask.bool()].tolist()[1:-1]
        for batch, _ in batches
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]


def test_a_pass_depends_on_its_number_alone() -> None:
    first, again = spliced(), spliced()
    one, two = told(first), told(first)
    again.set_epoch(1)
    assert told(again) == two != one


def test_texts_are_phrases_joined_phrases_and_windows() -> None:
    found = {"".join(map(chr, text)) for text in told(spliced())}
    assert len(told(spliced())) == 400
    assert {"ab", "cdef", "abf"} <= found
    assert all(text for text in found), "no text is empty"
    windows = [text for text in found if text.startswith("g")]
    assert windows and all(3 <= len(text) <= 48 for text in windows)


def test_padding_is_masked() -> None:
    batch = padded([[7], [8, 9, 10]])
    assert batch["input_ids"].tolist() == [[BEGIN, 7, END, 0, 0], [BEGIN, 8, 9, 10, END]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert batch["input_ids"].dtype == torch.int64
