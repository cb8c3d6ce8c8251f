"""Several models of one graph in one Program: what they share once, what is their own as rows.

A weight that differs between the models is a common part, on a fine grid, plus for each model a
difference on a coarse grid, most of whose codes are zero; the entropy coder of the file makes that
small. Other tensors that differ stand below each other as they are. Tensors that are equal in all
models are stored once.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from laconic.core.errors import DataError, RecipeError
from laconic.program.program import Program
from laconic.solvers.quantization import insertion, ranges
from laconic.solvers.quantization.ranges import Grid
from laconic.solvers.quantization.weight_sites import WeightSite, weight_sites
from laconic.solvers.sharing import common_part

_WIDEST = 127
_APART = 8.0  # between a step by what errors count and one by size alone
_INSIDE = 0.49  # steps from a code within which a value has this code


@dataclass
class Together:
    """What became of several models.

    Attributes:
        program: the joint Program; it computes the first model.
        errors: weight → relative error of each model's, by model.
        notes: what was stored model by model although it was to be shared.
        steps: weight → step of its differences, where models differ.
    """

    program: Program
    errors: dict[str, dict[str, float]] = field(default_factory=dict[str, dict[str, float]])
    notes: list[str] = field(default_factory=list[str])
    steps: dict[str, float] = field(default_factory=dict[str, float])


def check_alike(models: Mapping[str, Program]) -> None:
    """Refuse models whose graphs or tensors do not fit on each other.

    They may differ in the values of tensors, and in the first size of one: the width of a head.

    Raises:
        RecipeError: names the model and the first place where it differs from the first one.
    """
    (first, model), *others = models.items()
    for name, other in others:
        found = _difference(model, other)
        if found:
            raise RecipeError(
                f"{name!r} does not fit on {first!r}: {found}",
                where="share.models others",
                hint="the models have to be one network up to the widths of their heads, captured "
                "alike and brought through the same steps",
            )


def _difference(model: Program, other: Program) -> str:
    """Where two Programs differ, in words; empty if they fit."""
    nodes, theirs = list(model.graph.nodes), list(other.graph.nodes)
    if len(nodes) != len(theirs):
        return f"{len(theirs)} nodes instead of {len(nodes)}"
    places, others = ({n: i for i, n in enumerate(each)} for each in (nodes, theirs))
    for one, two in zip(nodes, theirs, strict=True):
        if one.op != two.op or (one.op != "placeholder" and one.target != two.target):
            return f"{two.name} ({two.target}) stands where {one.name} ({one.target}) is"
        if _plain(one, places) != _plain(two, others):
            return f"{two.name} has other arguments than {one.name}"
    if model.signature != other.signature or model.aliases != other.aliases:
        return "other arguments, outputs or tied tensors"
    held = dict(other.tensors())
    for name, tensor in model.tensors():
        found = held.get(name)
        if found is None or found.dtype != tensor.dtype or found.ndim != tensor.ndim:
            return f"{name} is missing, or of another type or rank"
        if found.shape[1:] != tensor.shape[1:]:
            return f"{name} has shape {list(found.shape)} instead of {list(tensor.shape)}"
    return ""


def _plain(node: fx.Node, places: Mapping[fx.Node, int]) -> Any:
    """Arguments with every node as where it stands."""
    return map_arg((node.args, node.kwargs), lambda source: ("node", places[source]))


def gridded(program: Program, names: Sequence[str], bits: int) -> Program:
    """A Program with these weights on grids of their own: what one model takes without others."""
    made = program.clone()
    for site in weight_sites(made)[0]:
        if site.name in names:
            _on_grid(made, site, made.tensor(site.name).detach(), site.axis, bits)
    made.recompile()
    return made


def join(
    models: Mapping[str, Program],
    names: Sequence[str],
    bits: int,
    error: float,
    counts: Mapping[str, Tensor] | None = None,
) -> Together:
    """One Program of models that fit on each other.

    Args:
        models: by name; the Programs stay as they are.
        names: weights that share.
        bits: of the grid of what is shared, for each output channel.
        error: relative error that the differences may leave in the largest weight: their step is
            `error * sqrt(12)` times its root mean square. A smaller weight gets less, by the root
            of its size: errors of layers add up alike, while bits are paid for elements.
        counts: weight → float64 of its shape, what a squared error of each element counts. Steps
            are then as the root of one over their mean, the largest weight's as without, and in a
            weight the elements that count get more of the bits.

    Raises:
        DataError: weights that are not finite.
    """
    made = Together(next(iter(models.values())).clone())
    program = made.program
    sites = {site.name: site for site in weight_sites(program)[0]}
    program.sparse = frozenset().union(*(model.sparse for model in models.values()))
    step = _steps(models, names, error, counts or {})
    for name, _ in list(program.tensors()):
        held = {key: model.tensor(name).detach() for key, model in models.items()}
        values = list(held.values())
        alike = all(v.shape == values[0].shape for v in values)
        equal = alike and all(torch.equal(values[0], v) for v in values[1:])
        if name not in names:
            if not equal:
                _rows(program, _holders(program, name), held)
        elif equal:
            _on_grid(program, sites[name], values[0], sites[name].axis, bits)
        elif alike and name not in program.sparse:
            price = common_part.prices(counts[name]) if counts and name in counts else None
            made.errors[name] = _shared(program, sites[name], held, bits, (step[name], price))
            if f"{name}_shared" in dict(program.tensors()):
                made.steps[name] = step[name]
        else:
            why = "its zeros would be lost" if alike else "the models' differ in shape"
            made.notes.append(f"{name}: stored model by model, {why}")
            _rows(program, sites[name], held)
            axis = 0 if sites[name].axis == 0 else None
            _on_grid(program, sites[name], torch.cat(values), axis, bits)
    program.recompile()
    return made


def _holders(program: Program, name: str) -> WeightSite:
    """The readers of a tensor that is no weight, as a site."""
    nodes = [
        n for n in program.graph.nodes if n.op == "get_attr" and _canonical(program, n) == name
    ]
    return WeightSite(name, tuple(nodes), (), None, False)


def _canonical(program: Program, node: fx.Node) -> str:
    return program.aliases.get(str(node.target), str(node.target))


def _rows(program: Program, site: WeightSite, held: Mapping[str, Tensor]) -> None:
    """The models' tensors below each other."""
    values = list(held.values())
    if not site.holders:
        return
    scalar = values[0].ndim == 0
    program.set_tensor(site.name, torch.stack(values) if scalar else torch.cat(values))
    sizes = [] if scalar else [len(value) for value in values]
    insertion.insert_member(program, site, None, list(held), sizes)


def _on_grid(
    program: Program, site: WeightSite, weight: Tensor, axis: int | None, bits: int
) -> None:
    _finite(site.name, weight)
    chosen = ranges.weight_grid(weight, axis, "mse", bits)
    insertion.quantize_weight(program, site, axis, chosen)


def _finite(name: str, weight: Tensor) -> None:
    if not bool(torch.isfinite(weight).all()):
        raise DataError("the weight holds NaN or infinite values", where=name)


def _steps(
    models: Mapping[str, Program],
    names: Sequence[str],
    error: float,
    counts: Mapping[str, Tensor],
) -> dict[str, float]:
    """Weight → the step of its differences."""
    made: dict[str, float] = {}
    sizes = {name: next(iter(models.values())).tensor(name).numel() for name in names}
    largest = max(sizes, key=lambda name: sizes[name], default="")
    for name in names:
        squares = [float(m.tensor(name).detach().double().square().mean()) for m in models.values()]
        size = math.sqrt(sum(squares) / len(squares) * sizes[name] / sizes[largest])
        made[name] = max(error * math.sqrt(12) * size, torch.finfo(torch.float32).tiny)
    means = {name: float(counts[name].mean()) for name in names if name in counts}
    if means.get(largest):
        for name, mean in means.items():
            wanted = made[largest] * math.sqrt(means[largest] / mean) if mean else math.inf
            made[name] = min(max(wanted, made[name] / _APART), made[name] * _APART)
    return made


def _shared(
    program: Program,
    site: WeightSite,
    held: Mapping[str, Tensor],
    bits: int,
    how: tuple[float, Tensor | None],
) -> dict[str, float]:
    """A common part on a grid and all differences; the relative error of each model's weight."""
    values = list(held.values())
    for value in values:
        _finite(site.name, value)
    stack = torch.stack(values).double()
    step, price = how
    codes, common = common_part.whole_steps(
        stack / step, common_part.PRICE if price is None else price
    )
    mean = (common * step).to(values[0].dtype)
    fine = ranges.weight_grid(mean, site.axis, "mse", bits)
    base = ranges.on_grid(mean, site.axis, fine)
    left = (stack - base.double()) / step - codes
    aside = left.mean(0).round()  # where this grid is coarser than a step
    codes, left = codes + aside, left - aside
    if not bool(codes.any()):
        program.set_tensor(site.name, mean)
        insertion.quantize_weight(program, site, site.axis, fine)
        return _errors(held, base.double().expand_as(stack), stack)
    # training goes on from here: every value keeps its code, and none stands at the edge of one
    inside = codes + left * (_INSIDE / max(_INSIDE, float(left.abs().max())))
    _insert(program, site, (mean, fine), inside, step, list(held))
    return _errors(held, base.double() + codes * step, stack)


def _insert(
    program: Program,
    site: WeightSite,
    shared: tuple[Tensor, Grid],
    steps: Tensor,
    step: float,
    names: Sequence[str],
) -> None:
    """The node that adds a model's difference to what all share, both on their grids."""
    old, (mean, fine) = program.tensor(site.name), shared
    trains = isinstance(old, nn.Parameter)
    base: Tensor = nn.Parameter(mean, requires_grad=old.requires_grad) if trains else mean
    beside = program.add_tensor(f"{site.name}_shared", base)
    sizes = [len(each) for each in steps]
    program.set_tensor(site.name, (steps * step).flatten(0, 1).to(old))
    made = insertion.insert_member(program, site, beside, names, sizes)
    reader: Any = made.args[1]
    of_base = WeightSite(beside, (reader,), (), site.axis, False)
    insertion.quantize_weight(program, of_base, site.axis, fine)
    top = max(_WIDEST, int(steps.abs().max().round()))
    scale = torch.tensor([step], dtype=torch.float32)
    coarse = Grid(scale, torch.zeros(1, dtype=torch.int32), -top, top)
    insertion.quantize_weight(program, site, 0, coarse)


def _errors(held: Mapping[str, Tensor], made: Tensor, stack: Tensor) -> dict[str, float]:
    away = (made - stack).flatten(1).norm(dim=1)
    norms = stack.flatten(1).norm(dim=1).clamp(min=1e-300)
    return dict(zip(held, (away / norms).tolist(), strict=True))
