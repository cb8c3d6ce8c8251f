"""Running a Program's graph node by node, holding no value longer than somebody needs it."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor, fx
from torch.fx.node import map_arg

from laconic.core.errors import DataError
from laconic.program.program import Program

Visit = Callable[[fx.Node, Any], Any]
Enter = Callable[[fx.Node, tuple[Any, ...]], tuple[Any, ...]]


class Order:
    """The nodes of a graph in order, and where each value is used last."""

    def __init__(self, program: Program) -> None:
        self.nodes = list(program.graph.nodes)
        self.place = {node: i for i, node in enumerate(self.nodes)}
        self.last_use: dict[fx.Node, int] = {}
        self.dead_after: dict[int, list[fx.Node]] = {}
        for node, place in self.place.items():
            last = max((self.place[user] for user in node.users), default=place)
            self.last_use[node] = last
            self.dead_after.setdefault(last, []).append(node)


class Walk:
    """One batch on its way through a graph; `values` holds what later nodes still need.

    Parameters are fetched when a node uses them, so a weight that was replaced on the way is used
    as it is then.
    """

    def __init__(
        self,
        program: Program,
        inputs: Sequence[Tensor],
        order: Order | None = None,
        *,
        enter: Enter | None = None,
    ) -> None:
        """`enter` may replace the arguments of a node before it runs."""
        self.program = program
        self.order = order or Order(program)
        self.values: dict[fx.Node, Any] = {}
        self._inputs = dict(zip(program.placeholders, inputs, strict=True))
        self._enter = enter
        self.next = 0

    def run(self, end: int, visit: Visit | None = None, hold: Iterable[fx.Node] = ()) -> None:
        """Run all nodes before position `end`.

        Args:
            end: position in `order.nodes` of the first node that is not run.
            visit: called with each node and its value; what it returns replaces the value.
            hold: nodes whose values must not be dropped.
        """
        held = set(hold)
        while self.next < end:
            node = self.order.nodes[self.next]
            value = self._value(node)
            if visit is not None:
                value = visit(node, value)
            self.values[node] = value
            for dead in self.order.dead_after.get(self.next, ()):
                if dead not in held:
                    self.values.pop(dead, None)
            self.next += 1

    def input(self, node: fx.Node, number: int) -> Any:
        """The value of a node's argument `number`."""
        return self._argument(node.args[number])

    def fork(self) -> "Walk":
        """Another walk at the same place; values are shared, not copied."""
        made = Walk(self.program, tuple(self._inputs.values()), self.order)
        made.values, made.next = dict(self.values), self.next
        return made

    def nbytes(self) -> int:
        """Memory that the held values take (parameters not counted)."""
        return sum(_nbytes(v) for n, v in self.values.items() if n.op != "get_attr")

    def _value(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            return self._inputs[node]
        if node.op == "get_attr":
            return self.program.tensor(str(node.target))
        if node.op == "output":
            return self._argument(node.args[0])
        args, kwargs = self._argument(node.args), self._argument(node.kwargs)
        if self._enter is not None:
            args = self._enter(node, args)
        try:
            return node.target(*args, **kwargs)  # type: ignore[operator]
        except RuntimeError as error:
            first = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
            raise DataError(
                f"{node.target} fails on calibration data: {first}",
                where=f"{node.name} ({node.meta.get('origin') or 'top level'})",
            ) from error

    def _argument(self, argument: Any) -> Any:
        return map_arg(argument, self._fetch)

    def _fetch(self, node: fx.Node) -> Any:
        if node.op == "get_attr":
            return self.program.tensor(str(node.target))
        return self.values[node]


def _nbytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, (tuple, list)):
        return sum(_nbytes(item) for item in value)
    return 0
