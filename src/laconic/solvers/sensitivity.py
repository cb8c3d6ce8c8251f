"""How far each single change moves a Program's outputs."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from laconic.core.progress import Progress
from laconic.program.program import DYNAMIC_QUANTIZE, FAKES, Program
from laconic.statistics.walk import Order, Walk


@torch.no_grad()
def output_errors(
    program: Program,
    changes: Mapping[str, Sequence[fx.Node]],
    batches: Sequence[Sequence[Tensor]],
    progress: Progress,
) -> dict[str, float]:
    """Relative squared error of the outputs when one change at a time is switched on.

    Args:
        program: with a fake-quantisation node for every change; they count as switched off.
        changes: name → its fake-quantisation nodes.
        batches: flat inputs.
        progress: moved on by one a change.

    Returns:
        name → `|outputs with it - outputs|^2 / |outputs|^2` over all float outputs.
    """
    order = Order(program)
    ends = len(order.nodes) - 1
    results: Any = program.output_node.args[0]
    power = 0.0
    error = dict.fromkeys(changes, 0.0)
    starts = {name: min(order.place[n] for n in nodes) for name, nodes in changes.items()}
    names = sorted(changes, key=lambda name: starts[name])
    with progress.task("measuring sensitivity", len(names) * len(batches)) as bar:
        for batch in batches:
            walk = Walk(program, batch, order)
            forks: dict[str, Walk] = {}
            for name in names:  # the walk stops in front of every change and leaves a fork there
                walk.run(starts[name], _off(walk, set()))
                forks[name] = walk.fork()
            walk.run(ends, _off(walk, set()), hold=results)
            plain = [walk.values[node] for node in results]
            power += sum(float(v.double().square().sum()) for v in plain if v.is_floating_point())
            for name in names:
                fork = forks.pop(name)
                fork.run(ends, _off(fork, set(changes[name])), hold=results)
                for node, value in zip(results, plain, strict=True):
                    if value.is_floating_point():
                        off = fork.values[node].double() - value.double()
                        error[name] += float(off.square().sum())
                bar.advance()
    return {name: value / max(power, 1e-30) for name, value in error.items()}


def _off(walk: Walk, on: set[fx.Node]) -> Any:
    """A visitor that lets values through every fake quantisation but those in `on`."""

    def visit(node: fx.Node, value: Any) -> Any:
        if node.target in (DYNAMIC_QUANTIZE, *FAKES) and node not in on:
            return walk.input(node, 0)
        return value

    return visit
