"""What the three examples share: real digits, a small CNN trained on them, a narrower Program."""

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import laconic


def data() -> tuple[TensorDataset, TensorDataset]:
    """scikit-learn's 1,797 scanned digits as [n, 1, 8, 8] in 0..1: 1,397 to train, 400 to test."""
    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(found.target)
    return TensorDataset(images[:1397], labels[:1397]), TensorDataset(images[1397:], labels[1397:])


def network() -> nn.Module:
    """[batch, 1, 8, 8] -> [batch, 10] logits."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Dropout(0.1),
        nn.Flatten(), nn.Linear(32 * 4 * 4, 10),
    )  # fmt: skip


def program() -> laconic.Program:
    """A captured network; `laconic.compress(...).program` and `laconic.load(path)` are the same."""
    torch.manual_seed(0)
    return laconic.capture(network(), (torch.zeros(2, 1, 8, 8),))


def batches(dataset: TensorDataset, shuffle: bool) -> DataLoader[tuple[Tensor, ...]]:
    """Batches of 64."""
    return DataLoader(dataset, batch_size=64, shuffle=shuffle)


@torch.no_grad()
def accuracy(model: nn.Module, dataset: TensorDataset) -> float:
    """In per cent."""
    model.eval()
    images, labels = dataset.tensors
    return 100 * (model(images).argmax(1) == labels).float().mean().item()
