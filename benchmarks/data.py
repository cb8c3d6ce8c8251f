"""The real data of the benchmarks, loaded fast and split as its README states.

CIFAR-10: rows 0-4,999 of the test file are *validation* (for choosing), rows 5,000-9,999 are *test*
(looked at once, at the end). Training images serve training and calibration. The decompressed
arrays are kept in a cache folder outside the repository, so that the second load takes
milliseconds.
"""

import gzip
import hashlib
import lzma
import os
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

VALIDATION = slice(0, 5_000)
TEST = slice(5_000, 10_000)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # what the CIFAR ResNets were trained with

Batch = tuple[Tensor, Tensor]


def data_folder() -> Path:
    """The folder with the data sets: LACONIC_DATA, else `../shared/data` beside the repository.

    Raises:
        FileNotFoundError: there is none; the message says how to name one.
    """
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("LACONIC_DATA", default))
    if not folder.is_dir():
        raise FileNotFoundError(f"no data at {folder}: set LACONIC_DATA to the folder of data sets")
    return folder


def cache_folder() -> Path:
    """Where decompressed arrays are kept: LACONIC_CACHE, else a folder in the system's temp."""
    folder = Path(os.environ.get("LACONIC_CACHE", Path(tempfile.gettempdir()) / "laconic-cache"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def unpacked(path: Path) -> np.ndarray:
    """The array in an `.npy.xz` file, memory-mapped from an uncompressed copy in the cache."""
    stat = path.stat()
    key = hashlib.sha256(f"{path.name} {stat.st_size} {path.parent.name}".encode()).hexdigest()
    copy = cache_folder() / f"{path.name.split('.')[0]}-{key[:12]}.npy"
    if not copy.exists():
        with lzma.open(path) as file:
            array = np.load(file)
        handle, temporary = tempfile.mkstemp(dir=copy.parent, suffix=".tmp")
        with os.fdopen(handle, "wb") as out:
            np.save(out, array)
        Path(temporary).replace(copy)
    return np.load(copy, mmap_mode="r")


@dataclass(frozen=True)
class Images:
    """`pixels`: uint8 [n, height, width, 3]; `labels`: int64 [n]."""

    pixels: np.ndarray
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: slice | Sequence[int]) -> "Images":
        index = rows if isinstance(rows, slice) else np.asarray(rows)
        return Images(self.pixels[index], self.labels[index])

    def tensor(self, *, normalise: bool = True) -> Tensor:
        """All pixels as float32 [n, 3, height, width]: normalised, or raw 0..255."""
        raw = torch.from_numpy(np.array(self.pixels)).permute(0, 3, 1, 2)
        return standardised(raw) if normalise else raw.float().contiguous()


def standardised(raw: Tensor) -> Tensor:
    """uint8 [..., 3, height, width] -> float32, with the trained models' mean and deviation."""
    mean = torch.tensor(MEAN).view(3, 1, 1)
    std = torch.tensor(STD).view(3, 1, 1)
    return ((raw.float() / 255 - mean) / std).contiguous()


def cifar10(split: str, folder: Path | None = None) -> Images:
    """`split`: "train" (50,000), "validation" and "test" (5,000 each), or "all" (both of them)."""
    folder = (folder or data_folder()) / "cifar10"
    stem = "train" if split == "train" else "test"
    rows = {"train": slice(None), "validation": VALIDATION, "test": TEST, "all": slice(None)}[split]
    pixels = unpacked(folder / f"{stem}_images.npy.xz")[rows]
    labels = np.load(folder / f"{stem}_labels.npy")[rows]
    return Images(pixels, torch.from_numpy(labels.astype(np.int64)))


def photographs(folder: Path | None = None) -> Batch:
    """1,000 ImageNet photographs, one a class, as SqueezeNet takes them.

    float32 [1000, 3, 227, 227], BGR less its mean; labels int64 [1000]. Needs Pillow.
    """
    from PIL import Image

    folder = folder or data_folder()
    pixels, labels = np.empty((1_000, 3, 227, 227), np.float32), []
    with tarfile.open(folder / "imagenet_sample1k" / "images.tar") as file:
        for row, member in enumerate(file.getmembers()):
            held: Any = file.extractfile(member)
            image = Image.open(held).convert("RGB")
            if min(image.size) < 227:
                scale = 256 / min(image.size)
                wide, high = (round(scale * side) for side in image.size)
                image = image.resize((wide, high), Image.Resampling.BILINEAR)
            left, top = ((side - 227) // 2 for side in image.size)
            plain = np.asarray(image.crop((left, top, left + 227, top + 227)), np.float32)
            pixels[row] = (plain[:, :, ::-1] - (104.0, 117.0, 123.0)).transpose(2, 0, 1)
            labels.append(int(Path(member.name).name[:4]))
    return torch.from_numpy(pixels), torch.tensor(labels)


def greyscale(name: str, split: str, folder: Path | None = None) -> Batch:
    """uint8 `[n, 28, 28]` and labels of "mnist" or "fashion_mnist".

    `split`: "train" (50,000), "validation" (the last 10,000 training images) or "test" (10,000).
    """
    folder = (folder or data_folder()) / name
    stem = "t10k" if split == "test" else "train"
    rows = {"train": slice(0, 50_000), "validation": slice(50_000, None)}.get(split, slice(None))
    pixels, labels = _decompressed(folder, stem)
    images = np.frombuffer(pixels, np.uint8, offset=16).reshape(-1, 28, 28)[rows]
    numbers = np.frombuffer(labels, np.uint8, offset=8)[rows]
    return torch.from_numpy(images.copy()), torch.from_numpy(numbers.astype(np.int64))


@lru_cache(maxsize=2)
def _decompressed(folder: Path, stem: str) -> tuple[bytes, bytes]:
    """Pixels and labels; benchmarks ask for one split after the other of the same file."""
    names = (f"{stem}-images-idx3-ubyte.gz", f"{stem}-labels-idx1-ubyte.gz")
    pixels, labels = (gzip.decompress((folder / name).read_bytes()) for name in names)
    return pixels, labels


def batches(images: Images, size: int, *, normalise: bool = True) -> list[Batch]:
    """`images` in order as (pixels, labels) batches, ready for a Task's loaders."""
    pixels = images.tensor(normalise=normalise)
    return list(zip(pixels.split(size), images.labels.split(size), strict=True))


class Augmented:
    """A re-iterable of training batches: random 4-pixel-padded crop and flip, new every epoch.

    `pixels` uint8 [n, 3, h, w]. Batches are (float32 normalised, labels). Every pass draws from
    `torch.Generator` seeded with `seed` plus the number of passes begun, so a run repeats exactly.
    With `distinct` so many passes are gone through in turn, and `period` says after how many
    batches the same ones come again, so that a teacher is asked about each once.
    """

    def __init__(
        self, images: Images, size: int, seed: int, *, normalise: bool = True,
        distinct: int | None = None,
    ) -> None:  # fmt: skip
        raw = torch.from_numpy(np.array(images.pixels)).permute(0, 3, 1, 2)
        self.pixels, self.labels = raw.contiguous(), images.labels
        self.size, self.seed, self.normalise = size, seed, normalise
        self.passes, self.distinct = 0, distinct

    @property
    def period(self) -> int | None:
        """After how many batches the same ones come again."""
        return self.distinct and self.distinct * len(self)

    def __len__(self) -> int:
        return len(self.labels) // self.size

    def set_epoch(self, epoch: int) -> None:
        """The next pass is number `epoch`, whatever came before; the training loop says so."""
        self.passes = epoch

    def __iter__(self) -> Iterator[Batch]:
        drawn = self.passes % self.distinct if self.distinct else self.passes
        generator = torch.Generator().manual_seed(self.seed + drawn)
        self.passes += 1
        order = torch.randperm(len(self.labels), generator=generator)
        for rows in order[: len(self) * self.size].split(self.size):
            raw = cropped_and_flipped(self.pixels[rows], generator)
            yield (standardised(raw) if self.normalise else raw.float()), self.labels[rows]


def cropped_and_flipped(raw: Tensor, generator: torch.Generator, padding: int = 4) -> Tensor:
    """Per image: pad with black, cut the original size at a random place, mirror with chance 1/2.

    raw: uint8 [n, channels, height, width] -> the same shape.
    """
    count, _, height, width = raw.shape
    draw = torch.randint(0, 2 * padding + 1, (2, count), generator=generator)
    mirror = torch.rand(count, generator=generator) < 0.5
    rows = draw[0, :, None] + torch.arange(height)
    columns = torch.where(mirror[:, None], torch.arange(width).flip(0), torch.arange(width))
    columns = draw[1, :, None] + columns
    padded = torch.nn.functional.pad(raw, (padding,) * 4)
    sample = torch.arange(count)[:, None, None]
    cut = padded.permute(0, 2, 3, 1)[sample, rows[:, :, None], columns[:, None, :]]
    return cut.permute(0, 3, 1, 2).contiguous()


def sst2(split: str, folder: Path | None = None) -> list[tuple[str, int]]:
    """(sentence, label) pairs of SST-2: "train" 60,614, "dev" 6,735, "test" 872."""
    path = (folder or data_folder()) / "sst2" / f"{split}.tsv"
    if path.exists():
        text = path.read_text(encoding="utf-8")
    else:
        text = gzip.decompress(path.with_name(path.name + ".gz").read_bytes()).decode("utf-8")
    rows = [line.rsplit("\t", 1) for line in text.splitlines()[1:] if line]
    return [(sentence.strip(), int(label)) for sentence, label in rows]


def tokenised(
    texts: Sequence[str], tokenizer: Callable[..., Any], size: int, tokens: int | None = 128
) -> list[dict[str, Tensor]]:
    """Batches of {"input_ids", "attention_mask"}, int64 [size, tokens].

    With `tokens` every batch is padded and cut to that length; with None each batch is as long as
    its longest text.
    """
    found: list[dict[str, Tensor]] = []
    for start in range(0, len(texts), size):
        out = tokenizer(
            list(texts[start : start + size]), return_tensors="pt", truncation=True,
            padding="max_length" if tokens else "longest", max_length=tokens or 128,
        )  # fmt: skip
        found.append({key: out[key] for key in ("input_ids", "attention_mask")})
    return found
