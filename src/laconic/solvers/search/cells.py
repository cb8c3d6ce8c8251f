"""Networks made from nothing: a cell space like NAS-Bench-201's, and a search that pays its way.

A cell has four nodes; each of its six edges is nothing, the identity, 3x3 average pooling, or a
1x1 or 3x3 convolution behind a ReLU and before a batch norm: 15,625 cells. A network is a stem,
three stages of cells with twice the channels each, a residual block of stride 2 between them, and a
linear head (Dong & Yang 2020, arXiv 2001.00326; there with 16 channels and 5 cells a stage).

The search ranks many cells by zero-cost proxies at their random start, trains the best for a short
time and the best of those for longer (successive halving). Its price is counted in multiply-adds of
training, proxies included, so that a random search of the same price stands beside it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional

from laconic.core.progress import SILENT, Progress
from laconic.core.task import Task
from laconic.program.capture import capture
from laconic.program.cost import cost
from laconic.program.program import Program
from laconic.program.sites import Sites
from laconic.solvers.search.proxies import PROXIES
from laconic.solvers.teaching.learning import trainable
from laconic.statistics.batches import Batches
from laconic.training.distillation import Distillation
from laconic.training.evaluation import mean_score
from laconic.training.feed import mixed
from laconic.training.job import Job
from laconic.training.loop import train
from laconic.training.plan import Plan
from laconic.training.processes import Processes

Cell = tuple[int, ...]
"""For each edge its operation."""
OPERATIONS = ("none", "skip_connect", "avg_pool_3x3", "nor_conv_1x1", "nor_conv_3x3")
EDGES = ((1, 0), (2, 0), (2, 1), (3, 0), (3, 1), (3, 2))
"""To which node, from which."""
_TRAINING = 3  # forward, gradients of inputs, gradients of weights
_ETA = 4
_PROXIES = ("synflow", "zico")


def named(cell: Cell) -> str:
    """A cell as NAS-Bench-201 writes it.

    >>> named((4, 0, 1, 0, 0, 1))
    '|nor_conv_3x3~0|+|none~0|skip_connect~1|+|none~0|none~1|skip_connect~2|'
    """
    parts = {to: "|" for to, _ in EDGES}
    for (to, source), operation in zip(EDGES, cell, strict=True):
        parts[to] += f"{OPERATIONS[operation]}~{source}|"
    return "+".join(parts.values())


def is_connected(cell: Cell) -> bool:
    """Whether the input reaches the output of a cell.

    >>> is_connected((4, 0, 0, 0, 0, 4)), is_connected((4, 0, 0, 0, 1, 0))
    (False, True)
    """
    reached = {0}
    for (to, source), operation in zip(EDGES, cell, strict=True):
        if operation and source in reached:
            reached.add(to)
    return 3 in reached


def random_cell(generator: torch.Generator) -> Cell:
    """A connected cell, each edge drawn evenly."""
    while True:
        draw = torch.randint(len(OPERATIONS), (len(EDGES),), generator=generator)
        cell = tuple(int(operation) for operation in draw)
        if is_connected(cell):
            return cell


class CellNet(nn.Module):
    """[batch, 3, height, width] → [batch, classes]: stem, three stages of one cell, head."""

    def __init__(self, cell: Cell, channels: int, repeats: int, classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [
            nn.Conv2d(3, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        ]  # fmt: skip
        for stage in range(3):
            if stage:
                layers.append(_Reduction(channels))
                channels *= 2
            layers += [_Cell(cell, channels) for _ in range(repeats)]
        self.body = nn.Sequential(*layers, nn.BatchNorm2d(channels), nn.ReLU())
        self.head = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)))


def _convolution(inputs: int, outputs: int, side: int, stride: int = 1) -> nn.Module:
    return nn.Sequential(
        nn.ReLU(),
        nn.Conv2d(inputs, outputs, side, stride, side // 2, bias=False),
        nn.BatchNorm2d(outputs),
    )


class _Cell(nn.Module):
    """The sum of what comes in over the edges, node by node."""

    def __init__(self, cell: Cell, channels: int) -> None:
        super().__init__()
        self.cell = cell
        for place, operation in enumerate(cell):
            if operation >= 3:
                side = 1 if operation == 3 else 3
                self.add_module(f"edge{place}", _convolution(channels, channels, side))

    def forward(self, x: Tensor) -> Tensor:
        values: dict[int, Tensor] = {0: x}
        for place, ((to, source), operation) in enumerate(zip(EDGES, self.cell, strict=True)):
            if operation == 0 or source not in values:
                continue
            came = values[source]
            if operation == 2:
                came = functional.avg_pool2d(came, 3, 1, 1, count_include_pad=False)
            elif operation >= 3:
                came = self.get_submodule(f"edge{place}")(came)
            values[to] = values[to] + came if to in values else came
        return values[3]


class _Reduction(nn.Module):
    """A residual block of stride 2 to twice the channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.one = _convolution(channels, 2 * channels, 3, 2)
        self.two = _convolution(2 * channels, 2 * channels, 3)
        self.past = nn.Conv2d(channels, 2 * channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        past = self.past(functional.avg_pool2d(x, 2, ceil_mode=True))
        return past + self.two(self.one(x))


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Where cells are tried.

    Attributes:
        task: training and validation data, labelled.
        example: an input batch, [2, 3, height, width].
        classes: outputs.
        channels: of the first stage.
        repeats: cells in a stage.
        batch: samples in a training batch, for the price.
        plan: how a network is trained; its steps are given with each training.
        seed: of the order of the data, and with a cell's number of its random start.
    """

    task: Task
    example: Tensor
    classes: int
    channels: int = 8
    repeats: int = 1
    batch: int = 128
    plan: Plan = field(default_factory=lambda: Plan(lr=0.1, evaluations=1))
    seed: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    progress: Progress = SILENT
    _made: dict[Cell, Program] = field(default_factory=dict[Cell, Program], repr=False)

    def network(self, cell: Cell) -> Program:
        """A cell's network at its random start (He et al. 2015), the same each time."""
        if cell not in self._made:
            self._made[cell] = self._captured(cell)
        return self._made[cell].clone()

    def _captured(self, cell: Cell) -> Program:
        model = CellNet(cell, self.channels, self.repeats, self.classes).eval()
        generator = torch.Generator().manual_seed(mixed(self.seed, *cell))
        with torch.no_grad():
            for tensor in model.parameters():
                if tensor.ndim > 1:
                    spread = (2 / tensor[0].numel()) ** 0.5
                    tensor.copy_(torch.randn(tensor.shape, generator=generator) * spread)
        model.head.bias.data.zero_()
        return capture(model, (self.example,))

    def trained(self, cell: Cell, steps: int) -> "Tried":
        """A cell's network trained on the labels for so many steps."""
        program = self.network(cell).train()
        objective = Distillation(
            task=self.task, student=program, teacher=_silent, outputs=1, device=self.device,
            alpha=0.0,
        )  # fmt: skip
        plan = self.plan.of_steps(steps)
        settled = plan.settled(program, self.device, 1)
        train(
            Job(
                program=program, names=trainable(program, Sites()), objective=objective,
                loader=self.task.batches("train"), plan=settled, seed=self.seed,
                device=self.device, progress=self.progress,
            )
        )  # fmt: skip
        score = mean_score(
            program, self.task, self.task.batches("validation"), self.device,
            settled.precision, Processes.current(),
        )  # fmt: skip
        score = score if self.task.higher_is_better else -score
        return Tried(cell, score, steps, self.price(program, steps), program)

    def price(self, program: Program, steps: int) -> int:
        """Multiply-adds of so many training steps."""
        return _TRAINING * cost(program).macs * self.batch * steps

    def promise(self, cells: Sequence[Cell]) -> tuple[list[float], int]:
        """The mean rank of each cell by the proxies, more is better; and what that cost."""
        ranks, spent = torch.zeros(len(cells), dtype=torch.float64), 0
        programs = [self.network(cell) for cell in cells]
        for name in _PROXIES:
            found = torch.tensor([self._proxy(name, program) for program in programs])
            ranks += found.argsort().argsort() / (len(cells) * len(_PROXIES))
            spent += sum(self.price(program, 1) for program in programs)
        return ranks.tolist(), spent

    def _proxy(self, name: str, program: Program) -> float:
        batches = list(Batches(program, self.task, self.batch, None, self.batch))
        labels = torch.arange(self.batch) % self.classes

        def loss(outputs: Tensor) -> Tensor:
            return functional.cross_entropy(outputs, labels[: len(outputs)], reduction="sum")

        return PROXIES[name](program, batches, loss)


@dataclass(frozen=True)
class Tried:
    """A cell, its score (higher is better), how long it was trained, and what that cost."""

    cell: Cell
    score: float
    steps: int
    price: int
    program: Program = field(repr=False, compare=False)


@dataclass(frozen=True)
class Searched:
    """What a search came to: its trials in order, and what all of it cost in multiply-adds."""

    tried: tuple[Tried, ...]
    price: int

    @property
    def best(self) -> Tried:
        """The best of those that were trained longest."""
        longest = max(trial.steps for trial in self.tried)
        return max((t for t in self.tried if t.steps == longest), key=lambda trial: trial.score)


def halving(bench: Bench, drawn: int, trained: int, steps: int) -> Searched:
    """Proxies on many cells, training of the best ones, a quarter of them for `steps` steps.

    Args:
        bench: where cells are tried.
        drawn: cells that the proxies rank.
        trained: of those, how many are trained for a quarter of `steps`.
        steps: of the last rung.
    """
    generator = torch.Generator().manual_seed(bench.seed)
    cells = _distinct(lambda: random_cell(generator), drawn)
    promise, price = bench.promise(cells)
    ranked = sorted(zip(promise, cells, strict=True), reverse=True)
    tried: list[Tried] = []
    alive, length = [cell for _, cell in ranked[:trained]], max(steps // _ETA, 1)
    while True:
        rung = [bench.trained(cell, length) for cell in alive]
        tried += rung
        price += sum(trial.price for trial in rung)
        if length >= steps:
            return Searched(tuple(tried), price)
        rung.sort(key=lambda trial: -trial.score)
        alive, length = [t.cell for t in rung[: max(len(rung) // _ETA, 1)]], steps


def at_random(bench: Bench, price: int, steps: int) -> Searched:
    """Random cells, each trained for `steps` steps, until `price` multiply-adds are spent."""
    generator = torch.Generator().manual_seed(mixed(bench.seed, 1))
    tried: list[Tried] = []
    spent, seen = 0, set[Cell]()
    while spent < price:
        cell = random_cell(generator)
        if cell not in seen:
            seen.add(cell)
            tried.append(bench.trained(cell, steps))
            spent += tried[-1].price
    return Searched(tuple(tried), spent)


def _distinct(draw: Callable[[], Cell], count: int) -> list[Cell]:
    found: dict[Cell, None] = {}
    while len(found) < count:
        found[draw()] = None
    return list(found)


def _silent(flat: Sequence[Tensor], number: int) -> list[Tensor]:
    """A teacher that is not asked."""
    del flat, number
    return []
