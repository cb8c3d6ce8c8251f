"""Matrix products: `linear`, `matmul`, `bmm`, `addmm`, `einsum` and their kin.

Multiply-adds: the product of all sizes, summed axis included; biases are not counted.
"""

from torch import fx

from laconic.program.axes import Term
from laconic.program.equations import Arguments, Dims, Equations, Row


def linear(see: Equations, node: fx.Node, a: Arguments) -> Dims:
    """Input [..., in], weight [out, in], bias [out] → [..., out]."""
    x, weight, bias = see.dims(a["input"]), see.dims(a["weight"]), see.dims(a["bias"])
    *rows, into = weight  # a weight of one dimension has no rows
    see.same(x[-1], into, node)
    see.role(a["weight"], len(rows), "consumer")
    see.count(node, *x[:-1], *weight)
    for row in rows:
        see.role(a["weight"], 0, "producer")
        for term in bias:
            see.same(row, term, node)
    return (*x[:-1], *rows)


def matmul(see: Equations, node: fx.Node, a: Arguments) -> Dims:
    """As numpy: vectors, matrices, and stacks of matrices that broadcast."""
    left, right = node.args[0], node.args[1]
    one, other = see.dims(left), see.dims(right)
    vector = len(other) < 2
    inner = other[-2:][0]
    see.same(one[-1], inner, node)
    batch = see.broadcast(node, one[:-2], other[:-2])
    rows, columns = one[-2:-1], () if vector else other[-1:]
    see.count(node, *batch, *rows, *columns, inner)
    if len(other) == 2:
        see.role(right, 0, "consumer")
        see.role(right, 1, "producer")
    if len(batch) >= 2:
        see.hint(batch[-1], "heads", "heads_per_kv")
        see.hint(inner, "head_dim")
        see.hint(other[-1], "head_dim")
    del a
    return (*batch, *rows, *columns)


def addmm(see: Equations, node: fx.Node, a: Arguments) -> Dims:
    """Self + mat1 [n, k] @ mat2 [k, m]."""
    one, other = see.dims(a["mat1"]), see.dims(a["mat2"])
    see.same(one[1], other[0], node)
    see.count(node, one[0], other[1], one[1])
    see.role(a["mat2"], 0, "consumer")
    see.role(a["mat2"], 1, "producer")
    return see.broadcast(node, (one[0], other[1]), see.dims(a["self"]))


def baddbmm(see: Equations, node: fx.Node, a: Arguments) -> Dims:
    """Self + batch1 [b, n, k] @ batch2 [b, k, m]."""
    one, other = see.dims(a["batch1"]), see.dims(a["batch2"])
    see.same(one[0], other[0], node)
    see.same(one[2], other[1], node)
    see.count(node, one[0], one[1], other[2], one[2])
    return see.broadcast(node, (one[0], one[1], other[2]), see.dims(a["self"]))


def einsum(see: Equations, node: fx.Node, a: Arguments) -> Dims:
    """One letter is one axis; multiply-adds are the product of all letters."""
    operands = [see.dims(tensor) for tensor in a["tensors"]]
    left, _, right = a["equation"].replace(" ", "").partition("->")
    letters: dict[str, Term] = {}
    stacked: Dims = ()
    for word, dims in zip(left.split(","), operands, strict=True):
        head, dots, tail = word.partition("...")
        extra = len(dims) - len(head) - len(tail)
        if dots:
            stacked = see.broadcast(node, stacked, dims[len(head) : len(head) + extra])
        pairs = [
            *zip(head, dims, strict=False),
            *zip(tail, dims[len(dims) - len(tail) :], strict=True),
        ]
        for letter, term in pairs:
            if letters.setdefault(letter, term).size == 1:
                letters[letter] = term
            see.same(letters[letter], term, node)
    if "->" not in a["equation"]:
        right = "..." * bool(stacked) + "".join(sorted(k for k in letters if left.count(k) == 1))
    if len(operands) > 1:
        see.count(node, *stacked, *letters.values())
    head, dots, tail = right.partition("...")
    middle = stacked if dots else ()
    return (*(letters[k] for k in head), *middle, *(letters[k] for k in tail))


def outer(see: Equations, node: fx.Node, a: Arguments) -> Dims:
    """Every element with every element."""
    result = (*see.dims(node.args[0]), *see.dims(node.args[1]))
    del a
    see.count(node, *result)
    return result


ROWS: dict[str, Row] = {
    "aten.linear": linear,
    "aten.addmm": addmm,
    "aten.baddbmm": baddbmm,
    "aten.einsum": einsum,
    "aten.outer": outer,
}
ROWS.update({f"aten.{name}": matmul for name in ("matmul", "mm", "bmm", "mv", "dot")})
