"""The demo's task: scikit-learn's 1,797 scanned digits, and a small CNN that learns them fast.

Split once: 700 images to train on, 800 to choose on, 297 to look at once, at the end. With an exact
paired test, "at most 0.5 points lost" can be certified from about 600 images without a loss.

The network (24,698 parameters) is no wider than the task needs: with 10,810 parameters it scores
about half a point less, with 40,042 hardly any more (LAB.md has the table).

    laconic compress examples/digits/task.py --max-drop 0.5 --batch 64 --out artifacts/digits
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import laconic


def block(inputs: int, outputs: int) -> list[nn.Module]:
    conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    return [conv, nn.BatchNorm2d(outputs), nn.ReLU()]


def network() -> nn.Sequential:
    return nn.Sequential(
        *block(1, 16), *block(16, 32), nn.MaxPool2d(2),
        *block(32, 32), *block(32, 32), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(32 * 2 * 2, 10),
    )  # fmt: skip


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """Images [1797, 1, 8, 8] in 0..1 and labels, shuffled once."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return images[order], torch.tensor(data.target)[order]


class Shifted:
    """Training batches of 50, in a new order in every pass, shifted by up to one pixel."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.images) // 50

    def __iter__(self):
        for chosen in torch.randperm(len(self.images)).split(50):
            x, y = torch.randint(0, 3, (2,)).tolist()
            padded = F.pad(self.images[chosen], (1, 1, 1, 1))
            yield padded[:, :, y : y + 8, x : x + 8], self.labels[chosen]


def model() -> nn.Module:
    """The trained network."""
    images, labels = digits()
    torch.manual_seed(0)
    net, epochs = network(), 25
    batches = Shifted(images[:700], labels[:700])
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, epochs * len(batches))
    for _ in range(epochs):
        for x, y in batches:
            optimizer.zero_grad()
            F.cross_entropy(net(x), y, label_smoothing=0.05).backward()
            optimizer.step()
            schedule.step()
    return net.eval()


def task() -> laconic.Task:
    """What the network is for."""
    images, labels = digits()
    return laconic.classification(
        train=Shifted(images[:700], labels[:700]),
        calibration=list(images[:700].split(50)),
        validation=list(zip(images[700:1500].split(100), labels[700:1500].split(100), strict=True)),
        test=list(zip(images[1500:].split(100), labels[1500:].split(100), strict=True)),
    )
