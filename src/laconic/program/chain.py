"""A Program taken apart where its inputs decide: a chain of smaller Programs and how they connect.

A standard graph has no early return. What feeds only the `there` side of a `laconic.choose` is
needed for the rows that go there; so the graph falls into pieces that always run, and bodies that
run on the rows that were chosen. Bodies nest: an exit behind an exit, a skipped block in a late
stage. The pieces are Programs like any other, of the same tensors; how they connect is plain data,
a `Plan`, which is all that a runtime needs beside its files. The chain gives what the static
Program gives: rows must not depend on each other, as in every network in eval mode.

A choice stays a `where` inside its piece if what its body needs does not have the batch in front.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NotRequired, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from laconic.program.flow import Flow, Run
from laconic.program.members import alone
from laconic.program.program import Program
from laconic.program.signature import Signature

Array = NDArray[Any]


class Step(TypedDict):
    """One step of a plan: a piece that runs, or a choice (then `rows` is there).

    A piece `run` reads the values `takes` and makes `gives`. A choice runs `steps` on the rows
    where `rows` is True: they see those rows of `takes`; the values `there` they end with replace
    the rows of `otherwise`, which makes `gives`.
    """

    takes: list[str]
    gives: list[str]
    run: NotRequired[int]
    rows: NotRequired[str]
    steps: NotRequired[list["Step"]]
    there: NotRequired[list[str]]
    otherwise: NotRequired[list[str]]


class Plan(TypedDict):
    """How pieces connect, by names of values; `whole` are those that have no rows."""

    inputs: list[str]
    outputs: list[str]
    whole: list[str]
    steps: list[Step]


@dataclass(frozen=True)
class Chain:
    """Pieces of a Program and the plan that connects them."""

    plan: Plan
    pieces: tuple[Program, ...]

    @property
    def decides(self) -> bool:
        """Whether anything can be left out, row by row."""
        return any("rows" in step for step in self.plan["steps"])

    def run(self, inputs: Sequence[Array]) -> list[Array]:
        """Flat arrays in, flat arrays out, by torch: what the static Program gives."""
        return execute(self.plan, inputs, [_eager(piece) for piece in self.pieces])


def split(program: Program) -> Chain:
    """Take `program` apart at its choices; without any, the chain has one piece.

    The pieces share memory with `program`.
    """
    whole = alone(program)
    made = whole.clone()  # its graph is read only; shapes are found on it
    builder = _Builder(made)
    chain = builder.build()
    program.share()
    return chain


def execute(
    plan: Plan, inputs: Sequence[Array], pieces: Sequence[Callable[[list[Array]], list[Array]]]
) -> list[Array]:
    """Run a plan on flat inputs; rows that were not chosen cost nothing."""
    values = dict(zip(plan["inputs"], inputs, strict=True))
    _follow(plan["steps"], values, pieces, plan["whole"])
    return [values[name] for name in plan["outputs"]]


def _follow(
    steps: Iterable[Step],
    values: dict[str, Array],
    pieces: Sequence[Callable[[list[Array]], list[Array]]],
    whole: Sequence[str],
) -> None:
    for step in steps:
        if "run" in step:
            found = pieces[step["run"]]([values[name] for name in step["takes"]])
            values.update(zip(step["gives"], found, strict=True))
            continue
        assert "rows" in step and "steps" in step and "there" in step and "otherwise" in step
        rows = values[step["rows"]]
        count = int(np.count_nonzero(rows))
        kept = [values[name] for name in step["otherwise"]]
        if count:
            every = count == len(rows)
            inner = {name: values[name] for name in whole if name in values}
            for name in step["takes"]:
                inner[name] = values[name] if every else values[name][rows]
            _follow(step["steps"], inner, pieces, whole)
            made = [inner[name] for name in step["there"]]
            kept = (
                made if every else [_merged(*pair, rows) for pair in zip(kept, made, strict=True)]
            )
        values.update(zip(step["gives"], kept, strict=True))


def _merged(kept: Array, made: Array, rows: Array) -> Array:
    result = kept.copy()
    result[rows] = made
    return result


def _eager(piece: Program) -> Callable[[list[Array]], list[Array]]:
    def run(arrays: list[Array]) -> list[Array]:
        with torch.no_grad():
            found = piece.run_flat(*(torch.from_numpy(np.ascontiguousarray(a)) for a in arrays))
        return [tensor.numpy() for tensor in found]

    return run


class _Builder:
    """Turns the steps of a `Flow` into pieces and a plan."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._flow = Flow(program)
        self._pieces: list[Program] = []
        self._crossing = dict.fromkeys(program.placeholders)

    def build(self) -> Chain:
        results: Any = self._program.output_node.args[0]
        steps = self._steps(self._flow.steps(), {*results})
        _renumber(steps, len(self._pieces) - 1)
        plan = Plan(
            inputs=_names(self._program.placeholders),
            outputs=_names(results),
            whole=_names(node for node in self._crossing if not self._flow.has_rows(node)),
            steps=steps,
        )
        return Chain(plan, tuple(self._pieces[::-1]))

    def _steps(self, runs: Sequence[Run], results: set[fx.Node]) -> list[Step]:
        """Plain steps; a piece gives what later steps, or the `results`, read."""
        made: list[Step] = []
        wanted = set(results)
        for run in reversed(runs):
            made.append(self._choice(run) if run.members else self._piece(run, wanted))
            wanted |= {*run.takes, *run.operands()}
        return made[::-1]

    def _piece(self, run: Run, wanted: set[fx.Node]) -> Step:
        gives = [node for node in run.nodes if node in wanted]
        self._crossing |= dict.fromkeys(gives)
        self._pieces.append(_program(self._program, self._flow, run, gives))
        return Step(run=len(self._pieces) - 1, takes=_names(run.takes), gives=_names(gives))

    def _choice(self, run: Run) -> Step:
        there = [run.operand(member, 1) for member in run.members]
        return Step(
            rows=run.operand(run.members[0], 0).name,
            takes=_names(node for node in run.takes if self._flow.has_rows(node)),
            steps=self._steps(run.body, {*there}),
            there=_names(there),
            otherwise=_names(run.operand(member, 2) for member in run.members),
            gives=_names(run.members),
        )


def _renumber(steps: Iterable[Step], last: int) -> None:
    """Pieces were made from the end; count them from the beginning."""
    for step in steps:
        if "run" in step:
            step["run"] = last - step["run"]
        _renumber(step.get("steps", ()), last)


def _names(nodes: Iterable[fx.Node]) -> list[str]:
    return [node.name for node in nodes]


def _program(program: Program, flow: Flow, run: Run, gives: Sequence[fx.Node]) -> Program:
    """The nodes of a run as a Program of its own, over the same memory."""
    graph = fx.Graph()
    made: dict[fx.Node, fx.Node] = {}
    for take in run.takes:
        made[take] = graph.placeholder(take.name)
        made[take].meta = dict(take.meta)
    example, dims = [_zeros(take) for take in run.takes], [flow.dims[take] for take in run.takes]
    copied = {*run.nodes, *flow.free(run.nodes)}
    for node in program.graph.nodes:
        if node in copied and node not in made:
            source = flow.measured(node, run.takes) if node not in run.nodes else None
            if source is None or node.args[0] in made:
                made[node] = graph.node_copy(node, made.__getitem__)
            else:
                made[node] = graph.call_function(node.target, (made[source[0]], source[1]))
                made[node].meta = dict(node.meta)
    graph.output(tuple(made[node] for node in gives))
    targets = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
    names = {program.aliases.get(name, name) for name in targets}
    names_in_order = [name for name, _ in program.tensors() if name in names]
    placeholders = [node.name for node in graph.nodes if node.op == "placeholder"]
    piece = Program(
        graph,
        {name: program.tensor(name) for name in names_in_order},
        _signature(placeholders, len(gives)),
        example,
        dynamic=dict(zip(placeholders, dims, strict=True)),
        aliases={alias: name for alias, name in program.aliases.items() if name in names},
        sparse=program.sparse & names,
    )
    piece.share()
    return piece


def _zeros(node: fx.Node) -> Tensor:
    return torch.zeros(node.meta["shape"], dtype=node.meta["dtype"])


def _signature(inputs: Sequence[str], outputs: int) -> Signature:
    arguments: dict[str, Any] = {name: {"tensor": i} for i, name in enumerate(inputs)}
    output = {"tuple": [{"tensor": i} for i in range(outputs)]}
    return Signature(arguments, output, len(inputs), tuple(inputs))
