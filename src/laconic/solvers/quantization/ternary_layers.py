"""Weights of three values, the positive and the negative one trained by themselves.

A master weight above a threshold counts as `p`, below minus the threshold as `-n`, else as 0; `p`
and `n` are parameters of their own (Zhu et al., "Trained Ternary Quantization", arXiv 1612.01064).
Their gradients are those of the elements that have their value; the master's goes through, times
the value that it stands for, or 1 where that is 0. While it trains this is a handful of ordinary
nodes in front of `laconic.lookup`; in the end the weight is a codebook of three values, the middle
one exactly 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from laconic.forms.codebook import Codebook
from laconic.program.program import LOOKUP, Program
from laconic.solvers.quantization import insertion
from laconic.solvers.quantization.learned_steps import LearnedStep
from laconic.solvers.quantization.weight_sites import WeightSite, weight_sites

_aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class TernaryWeight:
    """A weight of three values while it trains; names of nodes and tensors.

    Attributes:
        weight: the master weight.
        scale: `n` and `p`, `[2]`, or `[slices, 2]` along `axis`.
        axis: what they belong to, or None.
        trained: the node that takes the weight's place in training.
        threshold: as a part of the largest magnitude of the weight.
        count: how many weights share a pair.
    """

    weight: str
    scale: str
    axis: int | None
    trained: str
    threshold: float
    count: int

    @property
    def step(self) -> LearnedStep:
        """Its pair as steps that learn."""
        return LearnedStep(
            node=self.trained, scale=self.scale, weight=None, gradient=(self.count**-0.5,),
            ends=((0, 1),),
        )  # fmt: skip


def insert_weight(
    program: Program, site: WeightSite, axis: int | None, threshold: float
) -> TernaryWeight:
    """Let the operators of a weight read three values instead; recompile and propagate afterwards.

    Args:
        program: to change.
        site: the weight.
        axis: a pair of values for each of its slices; None: one pair.
        threshold: as a part of the largest magnitude of the weight.
    """
    first, *others = site.holders
    for other in others:
        other.replace_all_uses_with(first)
        program.graph.erase_node(other)
    users = list(first.users)
    weight = program.tensor(site.name).detach()
    axis = None if axis is None else axis % weight.ndim
    pair = nn.Parameter(first_values(weight, axis, threshold))
    scale = program.add_tensor(f"{site.name}_scale", pair)
    graph, call = program.graph, program.graph.call_function
    with graph.inserting_before(_earliest(program, users)):
        plain = call(_aten.detach.default, (first,))
        largest = call(_aten.amax.default, (call(_aten.abs.default, (plain,)),))
        limit = call(_aten.mul.Scalar, (largest, threshold))
        above = call(_aten.gt.Tensor, (plain, limit))
        below = call(_aten.lt.Tensor, (plain, call(_aten.neg.default, (limit,))))
        ends = [call(_aten.to.dtype, (side, torch.int8)) for side in (above, below)]
        codes = call(_aten.sub.Tensor, tuple(ends))
        held = graph.get_attr(scale)
        low, high = (call(_aten.select.int, (held, -1, place)) for place in (0, 1))
        columns = [call(_aten.neg.default, (low,)), call(_aten.zeros_like.default, (low,)), high]
        values = call(_aten.stack.default, (columns, -1))
        value = call(LOOKUP, (codes, values, axis, 1, -1, True))
        size = call(_aten.abs.default, (call(_aten.detach.default, (value,)),))
        zeros = call(_aten.type_as.default, (call(_aten.eq.Scalar, (codes, 0)), value))
        slope = call(_aten.add.Tensor, (size, zeros))
        nothing = call(_aten.sub.Tensor, (first, plain))
        made = call(_aten.add.Tensor, (value, call(_aten.mul.Tensor, (nothing, slope))))
    made.meta = dict(first.meta)
    for user in users:
        user.replace_input_with(first, made)
    return TernaryWeight(
        weight=site.name,
        scale=scale,
        axis=axis,
        trained=made.name,
        threshold=threshold,
        count=weight.numel() // max(pair.numel() // 2, 1),
    )


def _earliest(program: Program, users: Sequence[Any]) -> Any:
    """The first of some nodes in graph order."""
    wanted = set(users)
    return next(node for node in program.graph.nodes if node in wanted)


def first_values(weight: Tensor, axis: int | None, threshold: float) -> Tensor:
    """`n` and `p` that fit best: the mean magnitudes beyond the threshold, float32 `[..., 2]`.

    A slice without any takes the threshold itself.
    """
    wide = weight.detach().float()
    rows = wide.reshape(1, -1) if axis is None else wide.movedim(axis, 0).flatten(1)
    limit = threshold * wide.abs().amax()
    found: list[Tensor] = []
    for side in (rows < -limit, rows > limit):
        total = (rows.abs() * side).sum(1)
        mean = total / side.sum(1).clamp(min=1)
        found.append(torch.where(mean > 0, mean, limit.clamp(min=torch.finfo(mean.dtype).tiny)))
    return torch.stack(found, -1).reshape(2 if axis is None else (-1, 2))


@torch.no_grad()
def as_floats(program: Program, weights: Sequence[TernaryWeight]) -> None:
    """Store the three values themselves in the weights' places: the same outputs, bit for bit."""
    nodes = {node.name: node for node in program.graph.nodes}
    for held in weights:
        node = nodes[held.trained]
        through: Any = node.args[1]
        inside: Any = through.args[0].args[0]
        codes = _codes(program.tensor(held.weight).detach(), held.threshold)
        pair = program.tensor(held.scale).detach()
        values = torch.stack([-pair[..., 0], torch.zeros_like(pair[..., 0]), pair[..., 1]], -1)
        program.set_tensor(held.weight, LOOKUP(codes, values, held.axis, 1, -1, True))
        node.replace_all_uses_with(inside)
    program.graph.eliminate_dead_code()
    program.drop_unused()
    program.recompile()


def _codes(weight: Tensor, threshold: float) -> Tensor:
    """-1, 0 or 1 for each weight, as the nodes in front of a look-up compute them."""
    bound = weight.abs().amax() * threshold
    return (weight > bound).to(torch.int8) - (weight < -bound).to(torch.int8)


@torch.no_grad()
def settle(program: Program, weights: Sequence[TernaryWeight]) -> None:
    """Turn stored values into codebooks: `as_floats`, and perhaps batch norm, went before.

    A slice has at most one positive and one negative value; where all slices have the same, there
    is one book.
    """
    names = {held.weight for held in weights}
    axes = {held.weight: held.axis for held in weights}
    for site in weight_sites(program)[0]:
        if site.name in names:
            held = program.tensor(site.name).detach()
            form = _book(held, axes[site.name] if axes[site.name] is not None else site.axis)
            program.set_tensor(site.name, form.codes)
            insertion.insert_lookup(program, site, nn.Parameter(form.values), form)
    program.recompile()


def _book(weight: Tensor, axis: int | None) -> Codebook:
    codes = torch.sign(weight).to(torch.int8)
    rows = weight.reshape(1, -1) if axis is None else weight.movedim(axis, 0).flatten(1)
    ends = rows.amin(1).clamp(max=0), rows.amax(1).clamp(min=0)
    values = torch.stack([ends[0], torch.zeros_like(ends[0]), ends[1]], -1)
    widest = torch.stack([values[:, 0].amin(), values.new_zeros(()), values[:, 2].amax()])
    if axis is None or torch.equal(torch.take(widest, codes.long() + 1), weight):
        return Codebook(codes, widest, None, 1, -1, True)
    return Codebook(codes, values, axis, 1, -1, True)
