"""From a graph to equations between axes: walks the nodes and asks each operator's row.

Rows live in `operators/`, one file a family. A row is a function `(see, node, arguments)` that
states its equations through `see`, names the constants that a size stands in, counts
multiply-adds, and returns the terms of its output. An operator without a row freezes every axis it
touches and is reported by name.
"""

import operator
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import fx

from laconic.program import axes, rewrites
from laconic.program.axes import Atom, Term
from laconic.program.program import Program

Dims: TypeAlias = tuple[Term, ...]
Arguments: TypeAlias = dict[str, Any]
Row: TypeAlias = Callable[["Equations", fx.Node, Arguments], "Dims | list[Dims]"]


class Equations:
    """The solved equations of one program.

    Attributes:
        terms: node → a term for every dimension (a list of them for several outputs).
        tensors: tensor name → a term for every dimension.
        rewrites: constants that follow a size.
        multiply_adds: node → products of terms whose sizes multiply to multiply-adds.
        unknown: operator name → nodes nobody described.
        roles: (tensor name, dimension) → "producer" or "consumer".
    """

    def __init__(self, program: Program) -> None:
        from laconic.program.operators import table

        self.program = program
        self.terms: dict[fx.Node, Dims | list[Dims]] = {}
        self.tensors: dict[str, Dims] = {}
        self.rewrites: list[rewrites.Rewrite] = []
        self.multiply_adds: dict[fx.Node, list[Dims]] = {}
        self.unknown: dict[str, list[fx.Node]] = {}
        self.roles: dict[tuple[str, int], str] = {}
        self._table = table()
        if any("shape" not in node.meta for node in program.graph.nodes if node.op != "output"):
            program.propagate()
        for node in program.graph.nodes:
            self._visit(node)

    # walking ------------------------------------------------------------------------------

    def _visit(self, node: fx.Node) -> None:
        if node.op == "placeholder":
            shape = node.meta["shape"]
            self.terms[node] = tuple(
                Atom(size, f"input {node.name}, dimension {dim}") for dim, size in enumerate(shape)
            )
        elif node.op == "get_attr":
            self.terms[node] = self.tensor(str(node.target))
        elif node.op == "output":
            for number, source in enumerate(node.all_input_nodes):
                self._freeze_all(source, f"output {number} of the model")
        elif node.meta.get("dtype") is not None:
            self.terms[node] = self._call(node)

    def tensor(self, name: str) -> Dims:
        """Terms of a parameter or buffer."""
        name = self.program.aliases.get(name, name)
        if name not in self.tensors:
            shape = self.program.tensor(name).shape
            self.tensors[name] = tuple(Atom(size) for size in shape)
        return self.tensors[name]

    def _call(self, node: fx.Node) -> Dims | list[Dims]:
        if node.target is operator.getitem:
            source, index = node.args
            assert isinstance(source, fx.Node) and isinstance(index, int)
            return self.terms[source][index]  # type: ignore[return-value]
        row = self._table.get(operator_name(node)) or self._pointwise(node)
        if row is None:
            return self._unfollowed(node, "nobody has described this operator")
        before = len(self.rewrites)
        try:
            found = row(self, node, arguments(node))
        except (
            ArithmeticError,
            AssertionError,
            AttributeError,
            LookupError,
            TypeError,
            ValueError,
        ):
            found = ()  # a use the row does not foresee: reported below like an unknown operator
        if _shape(found) == _as_shapes(node):
            return found
        del self.rewrites[before:]
        self.multiply_adds.pop(node, None)
        return self._unfollowed(node, "its row does not cover this use")

    def _pointwise(self, node: fx.Node) -> Row | None:
        tags = getattr(node.target, "tags", ())
        return self._table["pointwise"] if torch.Tag.pointwise in tags else None

    def _unfollowed(self, node: fx.Node, text: str) -> Dims | list[Dims]:
        self.unknown.setdefault(operator_name(node), []).append(node)
        why = f"{self.place(node)}: {text}"
        for source in node.all_input_nodes:
            self._freeze_all(source, why)
        shapes = node.meta["shape"]
        if _is_several(node):
            return [tuple(Atom(size, why) for size in shape or ()) for shape in shapes]
        return tuple(Atom(size, why) for size in shapes)

    def _freeze_all(self, node: fx.Node, why: str) -> None:
        found = self.terms.get(node, ())
        for entry in found:
            for term in entry if isinstance(entry, tuple) else (entry,):
                axes.freeze(term, why)

    # what rows use ------------------------------------------------------------------------

    def place(self, node: fx.Node) -> str:
        """How a node is named to people: operator, node, module path."""
        origin = node.meta.get("origin")
        return f"{operator_name(node)} {node.name}" + (f" in {origin}" if origin else "")

    def dims(self, value: Any) -> Dims:
        """Terms of a tensor argument; none for a number or None."""
        found = self.terms.get(value, ()) if isinstance(value, fx.Node) else ()
        return found if isinstance(found, tuple) else ()

    def same(self, left: Term, right: Term, node: fx.Node) -> None:
        """State that two terms index the same thing."""
        if left.size == right.size:
            axes.unify(left, right, self.place(node))

    def broadcast(self, node: fx.Node, *operands: Dims) -> Dims:
        """State that shapes broadcast against each other; the terms of the result."""
        result: list[Term] = []
        for place in range(max((len(dims) for dims in operands), default=0), 0, -1):
            column = [dims[-place] for dims in operands if len(dims) >= place]
            wide = [term for term in column if term.size != 1] or column[:1]
            for term in wide[1:]:
                self.same(wide[0], term, node)
            result.append(wide[0])
        return tuple(result)

    def pieces(self, node: fx.Node, term: Term, cuts: Sequence[int]) -> list[Term] | None:
        """The axis cut at interior offsets; None, and frozen, where it cannot be cut."""
        found = axes.split(term, cuts)
        if found is None:
            self.freeze(node, "cannot be cut there", term)
        return found

    def freeze(self, node: fx.Node, why: str, *terms: Term) -> None:
        """Let `terms` keep their size because of `node`."""
        for term in terms:
            axes.freeze(term, f"{self.place(node)}: {why}")

    def rigid(self, node: fx.Node, why: str, *sizes: int) -> Dims:
        """New axes of fixed size."""
        return tuple(Atom(size, f"{self.place(node)}: {why}") for size in sizes)

    def hint(self, term: Term, name: str, inner: str | None = None) -> None:
        """What an axis is, for the name of its group; `inner` names further factors."""
        names = [name, *([inner] if inner else [])]
        for atom, word in zip(axes.atoms(term), names, strict=False):
            atom.hint = atom.hint or word

    def role(self, value: Any, dim: int, role: str) -> None:
        """Say that dimension `dim` of a stored tensor is what an operator produces or consumes."""
        if not isinstance(value, fx.Node):
            return
        if value.op == "get_attr":
            name = str(value.target)
            self.roles.setdefault((self.program.aliases.get(name, name), dim), role)
            return
        step = _BACK.get(operator_name(value))
        if step is not None:
            self.role(value.args[0], step(value, dim % len(self.dims(value))), role)

    def count(self, node: fx.Node, *terms: Term) -> None:
        """Count multiply-adds: the product of the sizes of `terms`, for the whole batch."""
        self.multiply_adds.setdefault(node, []).append(tuple(terms))

    def size(self, node: fx.Node, argument: str, term: Term) -> None:
        """State that an integer argument is the size of a term."""
        self.rewrites.append(rewrites.Size(node, argument, term))

    def sizes(self, node: fx.Node, argument: str, terms: Sequence[Term | None]) -> None:
        """State that the integers of a list argument are sizes of terms (None: not a size)."""
        self.rewrites.append(rewrites.Sizes(node, argument, tuple(terms)))

    def rewrite(self, rewrite: rewrites.Rewrite) -> None:
        """Any other constant that follows a size."""
        self.rewrites.append(rewrite)


def operator_name(node: fx.Node) -> str:
    """`aten.linear` for `aten.linear.default`."""
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.name.replace("::", ".")
    return getattr(node.target, "__name__", str(node.target))


def arguments(node: fx.Node) -> Arguments:
    """All arguments of a node by the names of the operator's schema, defaults included."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return dict(enumerate(node.args)) | node.kwargs  # type: ignore[return-value]
    found: Arguments = {}
    for place, slot in enumerate(node.target._schema.arguments):
        if place < len(node.args):
            found[slot.name] = node.args[place]
        elif slot.name in node.kwargs:
            found[slot.name] = node.kwargs[slot.name]
        else:
            found[slot.name] = slot.default_value if slot.has_default_value() else None
    return found


def _is_several(node: fx.Node) -> bool:
    return isinstance(node.meta["dtype"], tuple)


def _as_shapes(node: fx.Node) -> Any:
    shape = node.meta["shape"]
    return [tuple(s or ()) for s in shape] if _is_several(node) else tuple(shape)


def _shape(found: Dims | list[Dims]) -> Any:
    if isinstance(found, list):
        return [tuple(term.size for term in dims) for dims in found]
    return tuple(term.size for term in found)


def _same_dim(_: fx.Node, dim: int) -> int:
    return dim


def _transposed(node: fx.Node, dim: int) -> int:
    first, second = (int(d) % len(node.meta["shape"]) for d in node.args[1:3])  # type: ignore[arg-type]
    return {first: second, second: first}.get(dim, dim)


def _permuted(node: fx.Node, dim: int) -> int:
    order = arguments(node)["dims"]
    return int(order[dim]) % len(order)


_BACK: dict[str, Callable[[fx.Node, int], int]] = {
    "laconic.fake_quantize": _same_dim,
    "laconic.dequantize": _same_dim,
    "laconic.fake_levels": _same_dim,
    "laconic.levels": _same_dim,
    "laconic.lookup": _same_dim,
    "aten.to": _same_dim,
    "aten._weight_norm": _same_dim,
    "aten.t": lambda _, dim: 1 - dim,
    "aten.transpose": _transposed,
    "aten.permute": _permuted,
}
