"""Single weights: which there are, which of them stay, and how the others become zeros that last.

A pruned weight is an exact zero in the stored tensor, and the tensor's name stands in
`Program.sparse`, which keeps the zeros while training goes on. There is no mask in the graph: every
tool that looks at weights (folding, quantisation, surgery, exporters, storage) sees an ordinary
tensor and keeps its zeros, because scaling, slicing and symmetric grids do.
"""

import math
from collections.abc import Mapping
from typing import Literal, Self

import torch
from pydantic import BaseModel, Field, model_validator
from torch import Tensor

from laconic.program.freezing import freeze, is_frozen, thaw
from laconic.program.program import FAKES, STORED, Program
from laconic.program.sites import Sites
from laconic.solvers.finite import refuse_broken
from laconic.solvers.quantization.weight_sites import (
    choose_sites,
    weight_sites,
)
from laconic.statistics.layers import Layer, layers

Keep = dict[str, Tensor]
Scope = Literal["tensor", "global"]
BYTES = "zeros make the file smaller; dense runtimes are not faster for them"


class Amount(BaseModel):
    """How many weights go: a part, all but the best `count`, or all that score below a threshold.

    Attributes:
        ratio: part of the weights that goes, from 0 to below 1.
        count: keep so many weights, those with the highest scores; takes the place of `ratio`.
        threshold: keep the weights that score at least that; takes the place of `ratio`.
        scope: "tensor": `ratio` and `count` hold for every tensor; "global": for all of them
            together, so that tensors with low scores lose more.
    """

    ratio: float = Field(default=0.5, ge=0, lt=1)
    count: int | None = Field(default=None, ge=1)
    threshold: float | None = Field(default=None, ge=0)
    scope: Scope = "global"

    @model_validator(mode="after")
    def _one_amount(self) -> Self:
        given = {"ratio", "count", "threshold"} & self.model_fields_set
        held = {name for name in given if getattr(self, name) is not None}
        if len(held) > 1:
            raise ValueError(f"{' and '.join(sorted(held))} exclude each other: give one of them")
        return self

    def kept(self, scores: Mapping[str, Tensor]) -> Keep:
        """Tensor → which of its weights stay, bool of its shape.

        Args:
            scores: tensor → what each weight is worth, not negative. Ties go to the later weight.
        """
        if self.threshold is not None:
            return {name: score >= self.threshold for name, score in scores.items()}
        if self.scope == "tensor" or not scores:
            return {name: highest(s, self._left(s.numel())) for name, s in scores.items()}
        joined = torch.cat([score.flatten() for score in scores.values()])
        chosen = highest(joined, self._left(joined.numel()))
        parts = chosen.split([score.numel() for score in scores.values()])
        pairs = zip(scores.items(), parts, strict=True)
        return {name: part.reshape(score.shape) for (name, score), part in pairs}

    def _left(self, size: int) -> int:
        wanted = size - round(self.ratio * size) if self.count is None else self.count
        return min(wanted, size)


def highest(score: Tensor, count: int) -> Tensor:
    """The `count` highest scores, bool of the same shape; of equal ones the later stay."""
    drop = score.numel() - count
    if drop <= 0:
        return torch.ones_like(score, dtype=torch.bool)
    flat = score.flatten()
    edge = flat.kthvalue(drop).values
    keep = flat > edge
    ties = (flat == edge).nonzero()[:, 0]
    keep[ties[drop - int((flat < edge).sum()) :]] = True
    return keep.reshape(score.shape)


def highest_in_rows(score: Tensor, count: int) -> Tensor:
    """The `count` highest of each row of `[..., columns]`; of equal ones the later stay."""
    order = score.argsort(dim=-1, stable=True)
    keep = torch.zeros_like(score, dtype=torch.bool)
    return keep.scatter_(-1, order[..., max(score.shape[-1] - count, 0) :], True)


def patterned(score: Tensor, n: int, m: int) -> Tensor:
    """The `n` highest of every `m` neighbours along the last dimension; a rest stays whole."""
    whole = score.shape[-1] // m * m
    blocks = score[..., :whole].unflatten(-1, (-1, m))
    keep = torch.ones_like(score, dtype=torch.bool)
    keep[..., :whole] = highest_in_rows(blocks, n).flatten(-2)
    return keep


class Pruning:
    """One Program whose single weights are pruned: opened, scored by somebody, closed.

    Attributes:
        program: a copy on the device, its quantised weights as float master copies.
        bare: the same without the quantisation of weights, to collect statistics with.
        names: the chosen weights, canonical.
        notes: sentences for the outcome.
        figures: filled by `close`.
    """

    def __init__(self, program: Program, sites: Sites, device: torch.device) -> None:
        """Open `program`, which is left as it is.

        Raises:
            RecipeError: sites that match nothing.
            DataError: a parameter holds NaN or infinite values.
        """
        refuse_broken(program)
        self._frozen = is_frozen(program)
        self._home = _device(program)
        self._away = device != self._home
        copied = thaw(program) if self._frozen else program.clone()
        self.program = copied.to(device) if self._away else copied
        self.bare = _bare(self.program)
        self.notes: list[str] = []
        self.figures: dict[str, object] = {}
        found, refused = weight_sites(self.bare)
        self.notes += [note.replace("stays float", "not pruned") for note in refused]
        self.notes += [f"{site.name}: a look-up table, its rows are not multiplied"
                       for site in found if site.is_table]  # fmt: skip
        weights = [site.name for site in found if not site.is_table]
        self.names = choose_sites(program, sites, weights)
        stored = sum(node.target in STORED for node in self.bare.graph.nodes)
        if stored:
            self.notes.append(
                f"{stored} weights are stored in another form: prune before the step that wrote it"
            )
        if not self.names:
            self.notes.append("nothing to prune: no float weight multiplies an activation")

    def weights(self) -> dict[str, Tensor]:
        """The chosen weights."""
        return {name: self.program.tensor(name).detach() for name in self.names}

    def layers(self) -> dict[str, list[Layer]]:
        """Weight → the layers of `bare` that read it; others are noted and left out of `names`."""
        found: dict[str, list[Layer]] = {}
        for layer in layers(self.bare):
            found.setdefault(layer.weight, []).append(layer)
        for name in self.names:
            if name not in found:
                self.notes.append(f"{name}: stays, its operator's inputs are not rows of columns")
        self.names = [name for name in self.names if name in found]
        return {name: found[name] for name in self.names}

    def write(self, name: str, weight: Tensor, keep: Tensor) -> None:
        """Store `weight` with zeros where `keep` is False, and let them last."""
        self.program.set_tensor(name, zeroed(weight, keep).to(self.program.tensor(name)))
        self.program.sparse |= {name}

    def close(self, keep: Mapping[str, Tensor]) -> Program:
        """Zero what is not kept; the program in the state it was opened in."""
        for name, stays in keep.items():
            if not bool(stays.all()):
                self.write(name, self.program.tensor(name).detach(), stays)
        return self.finish()

    def finish(self) -> Program:
        """The program in the state it was opened in, with figures and notes about its zeros."""
        counts = {name: _counts(tensor) for name, tensor in self.weights().items()}
        total = sum(size for _, size in counts.values())
        self.figures["kept"] = {name: list(pair) for name, pair in counts.items()}
        self.figures["sparsity"] = 1 - sum(kept for kept, _ in counts.values()) / max(total, 1)
        self.notes += [
            f"{name}: none of its {size} weights is left, its outputs are constant"
            for name, (kept, size) in counts.items() if size and not kept
        ]  # fmt: skip
        made = freeze(self.program) if self._frozen else self.program
        made = made.to(self._home) if self._away else made
        made.recompile()
        return made


def zeroed(weight: Tensor, keep: Tensor) -> Tensor:
    """`weight` with exact (positive) zeros where `keep` is False."""
    return weight.masked_fill(~keep, 0.0)


def _counts(tensor: Tensor) -> tuple[int, int]:
    return int(tensor.count_nonzero()), math.prod(tensor.shape)


def _device(program: Program) -> torch.device:
    return next((tensor.device for _, tensor in program.tensors()), torch.device("cpu"))


def _bare(program: Program) -> Program:
    """A copy whose weights reach their operators without quantisation nodes."""
    made = program.clone()
    for node in list(made.graph.nodes):
        if node.target in FAKES and node.args[0].op == "get_attr":
            node.replace_all_uses_with(node.args[0])
            made.graph.erase_node(node)
    made.propagate()
    made.recompile()
    return made
