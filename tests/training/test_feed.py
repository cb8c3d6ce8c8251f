"""The order of the data: fixed by the seed, taken up anywhere, other people's randomness untouched."""

import random

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from laconic.core.errors import DataError
from laconic.training.feed import Feed, beginnings, forked

DATA = TensorDataset(torch.arange(20))


class Drawing:
    """Augments with three global generators."""

    def __len__(self):
        return 4

    def __iter__(self):
        for i in range(4):
            yield i, torch.rand(()).item(), random.random(), np.random.rand()


class Told:
    """Is told the pass it is in."""

    def __init__(self):
        self.epoch = 99

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        return iter([(self.epoch, i) for i in range(3)])


class Counting:
    """Counts its passes itself."""

    def __init__(self):
        self.passes = 0

    def __iter__(self):
        self.passes += 1
        return iter([(self.passes, i) for i in range(3)])


MAKERS = {
    "list": lambda: [10, 11, 12],
    "shuffled": lambda: DataLoader(DATA, batch_size=6, shuffle=True),
    "own generator": lambda: DataLoader(
        DATA, batch_size=6, shuffle=True, generator=torch.Generator().manual_seed(5)
    ),
    "drawing": Drawing,
    "told": Told,
    "counting": Counting,
}


def plain(batch):
    return [t.tolist() for t in batch] if isinstance(batch, list) else batch


def stream(loader, skip, count):
    with forked():
        feed = Feed(loader, seed=7)
        feed.skip(skip)
        return [plain(feed.take()) for _ in range(count)]


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("skip", [1, 3, 4, 7, 8])
def test_skipped_equals_gone_through(name, skip):
    whole = stream(MAKERS[name](), 0, 12)
    assert stream(MAKERS[name](), skip, 12 - skip) == whole[skip:]


@pytest.mark.parametrize("name", [name for name in MAKERS if name != "counting"])
def test_a_used_loader_gives_the_same_again(name):
    loader = MAKERS[name]()
    assert stream(loader, 0, 7) == stream(loader, 0, 7)


def test_passes_differ_and_looking_ahead_changes_nothing():
    loader = MAKERS["shuffled"]()
    whole = stream(loader, 0, 8)
    assert whole[:4] != whole[4:]
    assert sorted(x for batch in whole[:4] for x in batch[0]) == list(range(20))
    with forked():
        feed = Feed(loader, seed=7)
        assert [plain(b) for b in feed.look_ahead(3)] == whole[:3]
        assert [plain(feed.take()) for _ in range(8)] == whole


def test_global_generators_are_as_before():
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    stream(Drawing(), 2, 5)
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]


@pytest.mark.parametrize("loader", [[], iter(()), iter([1, 2])])
def test_empty_and_once_only_loaders_are_refused(loader):
    with forked(), pytest.raises(DataError, match="gives no batches"):
        feed = Feed(loader, seed=0)
        for _ in range(3):
            feed.take()


def test_length_of_a_pass_without_len():
    with forked():
        assert Feed(Told(), seed=0).batches_per_epoch() == 3


def test_the_first_batch_is_told_from_others_whatever_it_holds():
    batches = [
        (torch.zeros(2), {"names": np.array(["a", "bc"])}, None),
        (torch.zeros(2), {"names": np.array(["a", "bd"])}, None),
        (torch.zeros(1, 2), {"names": np.array(["a", "bc"])}, None),
        (torch.zeros(2, dtype=torch.bfloat16), [True, 2.0], "text"),
        (torch.zeros(()), np.array([object()]), object()),
    ]
    with forked():
        told = [Feed([batch], 0).beginning() for batch in batches]
        again = [Feed([batch], 0).beginning() for batch in batches]
    assert len(set(told)) == len(batches)
    assert told == again


def test_data_are_told_by_how_they_begin_where_they_begin_alike():
    class Anew(Told):
        def __iter__(self):
            return iter([np.random.default_rng().random()])

    shuffled = DataLoader(DATA, batch_size=5, shuffle=True)
    other = DataLoader(TensorDataset(torch.arange(1, 21)), batch_size=5, shuffle=True)
    state = torch.get_rng_state()
    first = beginnings([shuffled, [1, 2], other, None, Anew(), iter([1])])
    assert torch.equal(torch.get_rng_state(), state)
    assert first == beginnings([shuffled, [1, 2], other, None, Anew(), iter([1])])
    assert len(set(first[:3])) == 3
    assert all(first[:3])
    assert first[3:] == [""] * 3


def test_loaders_that_come_again_say_so():
    class Turning(Told):
        period = 6

    assert Feed([1, 2, 3], 0).period == 3
    assert Feed(Turning(), 0).period == 6
    assert Feed(Told(), 0).period is None
    assert Feed(DataLoader(DATA), 0).period is None
