"""How good a sub-network is with the weights it inherits.

Its batch norms are measured anew on calibration data, then it is scored on validation data: the
task's metric where there are labels, else minus its distance to what the original gives on
calibration data. Evaluations are kept in a file beside the run, so that another search of the same
space, or the same one taken up again, pays for none of them twice.
"""

import json
from collections.abc import Mapping, Sequence, Sized
from math import ceil
from pathlib import Path
from typing import Any, cast

import torch
from torch.utils.data import DataLoader, Subset

from laconic.core.task import Loader, Task
from laconic.program.program import Program
from laconic.solvers.recalibrate import norms, recalibrate
from laconic.solvers.search.elastic import Elastic, Order
from laconic.solvers.search.search_space import Member
from laconic.solvers.setting import Setting
from laconic.solvers.teaching.task_loss import TaskLoss
from laconic.statistics.batches import Batches, Flat
from laconic.statistics.convoy import affordable
from laconic.training.evaluation import labelled, mean_score
from laconic.training.plan import computes_bf16
from laconic.training.precision import autocast
from laconic.training.processes import Processes

_BATCH = 128  # calibration samples that go through the network side by side


class Kept:
    """JSON values by key in a file that grows line by line; without a file, in memory.

    A file is used by runs of one identity; another one's is begun anew. A last line that was cut
    short is left out.
    """

    def __init__(self, folder: Path | None, identity: str) -> None:
        """`folder`: where the file lies; None keeps nothing on disk."""
        self._path = None if folder is None else folder / "evaluations.jsonl"
        self._held: dict[str, Any] = {}
        if self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        lines = self._path.read_text().splitlines() if self._path.exists() else []
        if lines[:1] == [identity]:
            for line in lines[1:]:
                try:
                    key, value = json.loads(line)
                except ValueError:
                    continue  # the run ended while this one was written
                self._held[key] = value
        text = [identity, *(json.dumps(pair) for pair in self._held.items())]
        self._path.write_text("\n".join(text) + "\n")

    def get(self, key: str) -> Any:
        """The value of a key, or None."""
        return self._held.get(key)

    def put(self, key: str, value: Any) -> None:
        """Keep a value."""
        self._held[key] = value
        if self._path is not None:
            with self._path.open("a") as file:
                file.write(json.dumps([key, value]) + "\n")


class Judge:
    """Scores members, higher is better.

    Attributes:
        evaluated: how many members were run, not counting those that were known.
        labelled: whether scores are the task's metric.
    """

    def __init__(
        self,
        elastic: Elastic,
        order: Order,
        setting: Setting,
        kept: Kept,
        *,
        samples: int,
        validation: int,
    ) -> None:
        """Prepare.

        Args:
            elastic: the whole network.
            order: which indices are the good ones.
            setting: data, original, device.
            kept: what is known already.
            samples: calibration samples that batch norms are measured on.
            validation: samples that a member is scored on, at most.
        """
        self._elastic, self._order, self._kept = elastic, order, kept
        self._task, self._device = setting.task, setting.device
        self._samples, self._validation = samples, validation
        self._original = setting.original
        self._precision = "bf16" if computes_bf16(setting.device) else "fp32"
        self.labelled = labelled(setting.task)
        self.evaluated = 0

    def __call__(self, member: Member, share: float = 1.0) -> float:
        """The score of a member on a share of the validation samples.

        Raises:
            DataError: data that are missing or do not fit.
        """
        key = json.dumps([sorted(member.items()), self._samples, round(self._validation * share)])
        known = self._kept.get(key)
        if known is None:
            known = self.score(self._elastic.cut(member, self._order, checked=False).program, share)
            self.evaluated += 1
            self._kept.put(key, known)
        return known

    def score(self, program: Program, share: float = 1.0) -> float:
        """The score of a Program, whose batch norms are measured anew in place."""
        _move(program, self._device)
        self.recalibrate(program)
        samples = max(round(self._validation * share), 1)
        if not self.labelled:
            loss = TaskLoss(self._task, self._original, samples, self._device)
            return -loss(program)
        held = some_of(self._task, samples)
        mean = mean_score(
            program, self._task, held, self._device, self._precision, Processes.current()
        )
        return mean if self._task.higher_is_better else -mean

    def shown(self, score: float) -> float:
        """A score as people read it: the metric in its unit and direction; a loss as it is."""
        if not self.labelled:
            return -score
        return score * self._task.scale * (1 if self._task.higher_is_better else -1)

    def recalibrate(self, program: Program) -> None:
        """Measure the batch norms of a sub-network, if it has any; it stays where it is."""
        if not norms(program):
            return
        home = _move(program, self._device)
        most = min(self._samples, affordable(program))
        batches: list[Flat] = list(Batches(program, self._task, most, self._device, _BATCH))
        with torch.no_grad(), autocast(self._device, self._precision):
            recalibrate(program, batches)
        _move(program, home)


def _move(program: Program, device: torch.device) -> torch.device:
    """Bring a program to a device; where it was."""
    home = next((tensor.device for _, tensor in program.tensors()), device)
    if home != device:
        program.to(device)
    return home


def some_of(task: Task, samples: int) -> Loader:
    """Validation batches with about so many samples.

    They are spread evenly over a list or a `DataLoader`'s data set, for data that were not shuffled
    often stand class by class. Of other iterables they are the leading ones.
    """
    loader = task.validation
    assert loader is not None
    if isinstance(loader, (list, tuple)):
        held = cast("Sequence[Any]", loader)
        each = _length(task.split(held[0])[0]) if held else 1
        return [held[place] for place in _places(len(held), ceil(samples / max(each, 1)))]
    if isinstance(loader, DataLoader):
        whole = cast("DataLoader[Any]", loader)
        if isinstance(whole.dataset, Sized) and whole.batch_size is not None:
            part = Subset(whole.dataset, _places(len(whole.dataset), samples))
            return DataLoader(
                part, whole.batch_size, collate_fn=whole.collate_fn, num_workers=whole.num_workers
            )
    found: list[Any] = []
    seen = 0
    for batch in loader:
        if seen >= samples:
            break
        found.append(batch)
        seen += _length(task.split(batch)[0])
    return found


def _places(count: int, wanted: int) -> list[int]:
    """`wanted` of so many places, evenly spread; all where they are no more."""
    return (
        [place * count // wanted for place in range(wanted)] if wanted < count else [*range(count)]
    )


def _length(inputs: Any) -> int:
    values = list(inputs.values()) if isinstance(inputs, Mapping) else list(inputs)
    return next((len(v) for v in values if isinstance(v, torch.Tensor) and v.ndim), 1)
