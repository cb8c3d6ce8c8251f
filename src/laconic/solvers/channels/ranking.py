"""Which indices of a group are the good ones; and groups put into that order, best first.

A sub-network of a supernet keeps the leading indices of every group, so the tensors are sorted
once, before training: a permutation of an axis wherever it stands computes the same network.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from laconic.core.errors import RecipeError
from laconic.core.suggest import nearest
from laconic.program.groups import Group
from laconic.program.program import Program
from laconic.program.surgery import sliced
from laconic.solvers.channels.selection import load
from laconic.solvers.importance.base import Scene
from laconic.solvers.layers import branch_importance
from laconic.solvers.search.elastic import Elastic
from laconic.solvers.search.search_space import Space
from laconic.solvers.setting import Setting
from laconic.statistics.batches import Batches, Flat
from laconic.statistics.gradients import sampled_loss

_BATCH = 128  # samples that go through the network side by side
_EXACT = 1e-3  # of the outputs' size: what sorting may change, sums being taken in another order


def rank(
    elastic: Elastic,
    space: Space,
    importance: str,
    samples: int,
    context: Setting,
    notes: list[str],
) -> dict[str, list[int]]:
    """Knob → its indices, or the branches of its stage, best first.

    Args:
        elastic: the Program.
        space: whose width and depth knobs are ranked.
        importance: a score of `solvers/importance` for groups; branches by their influence.
        samples: calibration samples that a score sees, at most.
        context: data and seed.
        notes: gets a sentence about what a score had to fall back to.

    Raises:
        RecipeError: there is no such score.
        DataError: calibration data that a score needs and that are missing or do not fit.
    """
    program, score = elastic.program, load(importance)
    sites = [knob.site for knob in space.knobs if knob.kind == "width"]
    stages = {knob.site for knob in space.knobs if knob.kind == "depth"}
    batches: Sequence[Flat] = ()
    if stages or (sites and score.needs_data):
        device = next((t.device for _, t in program.tensors()), context.device)
        batches = list(Batches(program, context.task, samples, device, _BATCH))
    found: dict[str, list[int]] = {}
    if sites:
        chosen = [elastic.groups.find(site) for site in sites]
        loss = sampled_loss(context.task, context.generator())
        scene = Scene(program, chosen, batches, loss, context.seed, context.progress, notes)
        for name, removal in load(importance).removals(scene).items():
            found[f"width:{name}"] = removal.order.flip(0).tolist()
    for stage in elastic.stages:
        if stage.name in stages:
            units = [[branch] for branch in stage.branches]
            worth = torch.tensor(branch_importance.influence(program, units, batches))
            found[f"depth:{stage.name}"] = worth.argsort(descending=True, stable=True).tolist()
    return found


@torch.no_grad()
def sort(
    program: Program, elastic: Elastic, order: Mapping[str, Sequence[int]], notes: list[str]
) -> dict[str, list[int]]:
    """Put groups into an order, in place of their tensors; the network computes what it did.

    A group whose places mean something (a table made inside the graph) is left as it is, with a
    note.

    Args:
        program: changed; `elastic` was made of it, and stays what it was.
        elastic: its groups.
        order: group → all its indices.
        notes: sentences are added.

    Returns:
        What was done: `order` less the groups that were left.
    """
    groups = _groups(elastic, order)
    before = program.run_flat(*_inputs(program))
    whole = {name: program.tensor(name) for group in groups.values() for name in _names(group)}
    _permute(program, groups, order)
    if _same(before, program.run_flat(*_inputs(program))):
        return {name: list(indices) for name, indices in order.items()}
    for name, tensor in whole.items():
        program.set_tensor(name, tensor)
    done: dict[str, list[int]] = {}
    for name, group in groups.items():
        held = {one: program.tensor(one) for one in _names(group)}
        _permute(program, {name: group}, order)
        if _same(before, program.run_flat(*_inputs(program))):
            done[name] = list(order[name])
            continue
        notes.append(f"{name}: not sorted, the places of its indices mean something")
        for one, tensor in held.items():
            program.set_tensor(one, tensor)
    return done


def _groups(elastic: Elastic, order: Mapping[str, Sequence[int]]) -> dict[str, Group]:
    """The groups that are meant, in graph order.

    Raises:
        RecipeError: an unknown group, or indices that are no order of all of its.
    """
    known = {group.name: group for group in elastic.groups}
    for name, indices in order.items():
        if name not in known:
            raise RecipeError(f"no group {name!r}", where="order", hint=nearest(name, known))
        if sorted(indices) != list(range(known[name].size)):
            raise RecipeError(
                f"{len(indices)} indices that are not all of 0 to {known[name].size - 1}",
                where=f"order, {name}",
            )
    return {name: group for name, group in known.items() if name in order}


def _permute(
    program: Program, groups: Mapping[str, Group], order: Mapping[str, Sequence[int]]
) -> None:
    for name, group in groups.items():
        for member in group.members:
            places = _places(group.index(member), torch.as_tensor(order[name]))
            moved = sliced(program.tensor(member.tensor).detach(), {member.dim: places})
            program.set_tensor(member.tensor, moved)


def _places(index: Tensor, order: Tensor) -> Tensor:
    """Where each position of a dimension takes its value from.

    index: of every position its index in the group, or -1; order: `[size]`, the index that comes
    to each place.

    >>> _places(torch.tensor([-1, 0, 1, 0, 1]), torch.tensor([1, 0])).tolist()
    [0, 2, 1, 4, 3]
    """
    places = torch.arange(len(index))
    belongs = index >= 0
    rows = index[belongs].argsort(stable=True).reshape(len(order), -1)  # [size, repeats]
    positions = places[belongs]
    places[positions[rows].flatten()] = positions[rows[order]].flatten()
    return places


def _names(group: Group) -> list[str]:
    return list(dict.fromkeys(member.tensor for member in group.members))


def _inputs(program: Program) -> list[Tensor]:
    device = next((t.device for _, t in program.tensors()), torch.device("cpu"))
    return [tensor.to(device) for tensor in program.example]


def _same(before: Sequence[Tensor], after: Sequence[Tensor]) -> bool:
    """Whether outputs differ by no more than another order of summation explains."""
    for one, two in zip(before, after, strict=True):
        if not one.is_floating_point():
            continue
        size = float(one.abs().max()) if one.numel() else 0.0
        if one.numel() and float((one - two).abs().max()) > _EXACT * max(size, 1e-6):
            return False
    return True
