"""The data and trained weights are what their README says."""

import pytest
import torch
from benchmarks.data import cifar10, greyscale, sst2

from benchmarks import models

pytestmark = pytest.mark.data


def test_cifar_splits_are_the_stated_rows(data_dir):
    everything = cifar10("all", data_dir)
    validation, test = cifar10("validation", data_dir), cifar10("test", data_dir)
    assert (len(validation), len(test), len(everything)) == (5_000, 5_000, 10_000)
    assert torch.equal(validation.labels, everything.labels[:5_000])
    assert torch.equal(test.labels, everything.labels[5_000:])
    assert (test.pixels[0] == everything.pixels[5_000]).all()
    assert torch.equal(everything.labels.bincount(), torch.full((10,), 1_000))


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_the_last_training_images_are_validation(data_dir, name):
    held = {split: greyscale(name, split, data_dir) for split in ("train", "validation", "test")}
    sizes = {split: tuple(pixels.shape) for split, (pixels, _) in held.items()}
    rows = {"train": 50_000, "validation": 10_000, "test": 10_000}
    assert sizes == {split: (count, 28, 28) for split, count in rows.items()}
    labels = torch.cat([held[split][1] for split in ("train", "validation")])
    assert len(labels.bincount()) == 10
    if name == "fashion_mnist":
        assert torch.equal(labels.bincount(), torch.full((10,), 6_000))


def test_sst2_has_the_stated_sizes(data_dir):
    sizes = {split: len(sst2(split, data_dir)) for split in ("train", "dev", "test")}
    assert sizes == {"train": 60_614, "dev": 6_735, "test": 872}
    assert sum(label for _, label in sst2("test", data_dir)) == 444


@pytest.mark.parametrize(
    ("name", "least"), [("resnet20", 88.0), ("resnet56", 90.0), ("resnet8", 83.0)]
)
def test_trained_weights_classify(data_dir, name, least):
    """On the first 500 validation rows: three standard errors below the stated accuracy at most."""
    images = cifar10("validation", data_dir)[:500]
    if name == "resnet8":
        path = data_dir / "resnet8_mlperf_tiny" / "resnet8.safetensors"
        model, pixels = models.resnet8(path), images.tensor(normalise=False)
    else:
        path = data_dir / "resnet_cifar10" / f"{name}.safetensors"
        model, pixels = models.cifar_resnet(int(name[6:]), path), images.tensor()
    with torch.inference_mode():
        right = (model(pixels).argmax(1) == images.labels).float().mean().item()
    assert 100 * right >= least
