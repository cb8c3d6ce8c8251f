"""The masked reference: what a pruned program has to compute, found without cutting anything.

Runs the *original* graph with every stored slice that `changes` dropped set to zero. Beside every
value runs a mask of the elements that are alive: dead ones are held at zero, and statistics (norms,
means, softmax, sums, extremes) are taken over the living. Sizes stay the original ones, so every
constant that an operator derives from a size keeps its original value. Nothing here knows about
groups, terms or surgery: masks follow from the slices of the stored tensors alone.
"""

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from laconic.core.errors import LaconicError
from laconic.program.equations import arguments, operator_name
from laconic.program.program import Program
from laconic.testing.masks import Arguments, all_alive, rule_of, whole


@torch.no_grad()
def masked(
    program: Program, changes: Mapping[str, Mapping[int, Tensor]], inputs: Sequence[Tensor] = ()
) -> tuple[Tensor, ...]:
    """Outputs of the original program with all slices that `changes` dropped set to zero.

    Args:
        program: the original.
        changes: tensor name → dimension → kept positions, as `cut` returns them.
        inputs: flat inputs; the program's examples if none.

    Raises:
        LaconicError: an operator meets dead elements, and its rule is not known here.
    """
    return tuple(Living(program, changes).run(*(inputs or program.example)))


class Living(fx.Interpreter):
    """Runs values and, beside them, which of their elements are alive."""

    def __init__(self, program: Program, changes: Mapping[str, Mapping[int, Tensor]]) -> None:
        super().__init__(program, graph=program.graph)
        self.program = program
        self.changes = changes
        self.alive: dict[fx.Node, Any] = {}
        self.node = next(iter(program.graph.nodes))

    def run_node(self, n: fx.Node) -> Any:
        """One node: its value, with the mask kept beside it."""
        self.node = n
        if n.op == "get_attr":
            value = self.program.tensor(str(n.target)).detach()
            alive = torch.ones(value.shape, dtype=torch.bool)
            for dim, kept in self.changes.get(str(n.target), {}).items():
                line = torch.zeros(value.shape[dim], dtype=torch.bool)
                line[kept] = True
                alive &= line.view([-1 if d == dim else 1 for d in range(value.ndim)])
        elif n.op == "call_function":
            value, alive = self._call(n)
        else:
            value = super().run_node(n)
            alive = all_alive(value) if n.op == "placeholder" else None
        self.alive[n] = alive
        return _zeroed(value, alive)

    def _call(self, n: fx.Node) -> tuple[Any, Any]:
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        if n.target is operator.getitem:
            source, index = n.args
            return args[0][index], self.alive[source][index]  # type: ignore[index]
        values = map_arg(arguments(n), lambda m: self.env[m])
        masks = map_arg(arguments(n), lambda m: self.alive.get(m))
        rule = rule_of(n)
        if rule is not None:
            return rule(self, dict(values), dict(masks))  # type: ignore[call-overload]
        result = n.target(*args, **kwargs)  # type: ignore[operator]
        dead = [m.name for m in n.all_input_nodes if not whole(self.alive.get(m))]
        if dead:
            raise LaconicError(
                f"{operator_name(n)} meets dead elements of {', '.join(dead)}",
                where=self.program_place(n),
                hint="the masked reference has no rule for this operator",
            )
        return result, all_alive(result)

    def program_place(self, n: fx.Node) -> str:
        """A node for people."""
        return f"{n.name} in {n.meta.get('origin') or 'top level'}"

    def again(self, changed: Arguments | None = None) -> Any:
        """The operator of the current node once more, with some arguments exchanged."""
        n = self.node
        given: Arguments = dict(map_arg(arguments(n), lambda m: self.env[m]))  # type: ignore[call-overload]
        given |= changed or {}
        slots = n.target._schema.arguments  # type: ignore[union-attr]
        plain = [given[s.name] for s in slots if not s.kwarg_only]
        named = {s.name: given[s.name] for s in slots if s.kwarg_only}
        viewed = operator_name(n) == "aten.view"  # strides may differ from the original run's
        target: Any = torch.ops.aten.reshape.default if viewed else n.target
        return target(*plain, **named)


def _zeroed(value: Any, alive: Any) -> Any:
    if isinstance(value, Tensor):
        return value if whole(alive) else torch.where(alive, value, torch.zeros_like(value))
    if isinstance(value, (tuple, list)):
        pairs = zip(value, alive, strict=True) if alive is not None else ((v, None) for v in value)
        return [_zeroed(item, mask) for item, mask in pairs]
    return value
