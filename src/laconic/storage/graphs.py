"""A graph as JSON and back, without trusting the JSON.

The graph of a Program becomes Python source when it runs, so every name that comes from a file is
checked before it may stand in a graph, and every operator is looked up in a list.
"""

import keyword
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from laconic.core.errors import StorageError
from laconic.storage import operators
from laconic.storage.codecs import DTYPES

Json = Any

_PLACEHOLDER, _TENSOR = -1, -2
_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")
_MEMORY_FORMATS = {
    "contiguous_format": torch.contiguous_format,
    "preserve_format": torch.preserve_format,
    "channels_last": torch.channels_last,
    "channels_last_3d": torch.channels_last_3d,
}
_NUMBERS = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}
_KINDS = DTYPES | {"complex32": torch.complex32}


# writing ----------------------------------------------------------------------------------


def to_json(graph: fx.Graph, tensors: Sequence[str]) -> dict[str, Json]:
    """The graph as plain data.

    Args:
        graph: a flat graph whose last node is the output.
        tensors: names of the stored tensors, in the order of the file.

    Raises:
        StorageError: an operator that is not on the list, or an argument that is not plain.
    """
    nodes = list(graph.nodes)
    index = {node: i for i, node in enumerate(nodes)}
    number = {name: i for i, name in enumerate(tensors)}
    names: dict[str, int] = {}
    counts: dict[str, int] = {}
    rows: list[list[Json]] = []
    for here, node in enumerate(nodes[:-1]):
        try:
            rows.append(_row(node, here, index, number, names, counts))
        except StorageError as error:
            origin = node.meta.get("origin") or "top level"
            raise StorageError(
                error.message, where=f"{node.name} ({origin})", hint=error.hint
            ) from error
    origins, deltas = _origins(nodes[:-1])
    return {
        "operators": list(names),
        "nodes": rows,
        "output": [_argument(item, len(rows), index) for item in _outputs(nodes[-1])],
        "origins": origins,
        "origin": deltas,
        "grids": [
            [here, *(int(bound) for bound in node.meta["grid"])]
            for here, node in enumerate(nodes)
            if "grid" in node.meta
        ],
    }


def _outputs(node: fx.Node) -> Sequence[Any]:
    if node.op != "output" or not isinstance(node.args[0], (tuple, list)):
        raise StorageError("the last node is not an output that holds a tuple", where=node.name)
    return node.args[0]


def _row(
    node: fx.Node,
    here: int,
    index: Mapping[fx.Node, int],
    tensors: Mapping[str, int],
    names: dict[str, int],
    counts: dict[str, int],
) -> list[Json]:
    if node.op == "placeholder":
        row: list[Json] = [_PLACEHOLDER, str(node.target)]
        return row if node.name == node.target else [*row, node.name]
    if node.op == "get_attr":
        if node.target not in tensors:
            raise StorageError(f"reads {node.target!r}, which the program does not hold")
        row = [_TENSOR, tensors[str(node.target)]]
        automatic = tensor_node_name(str(node.target))
    elif node.op == "call_function":
        target = operators.name_of(node.target)
        arguments = [_argument(value, here, index) for value in node.args]
        row = [names.setdefault(target, len(names)), arguments]
        automatic = call_node_name(target, counts)
    else:
        raise StorageError(f"a {node.op} node; a Program's graph has only operators")
    options = {key: _argument(value, here, index) for key, value in node.kwargs.items()}
    name = None if node.name == automatic else node.name
    return [*row, name, options] if options else [*row, name] if name else row


def tensor_node_name(target: str) -> str:
    """The name a node that reads the tensor `target` has unless the file says otherwise.

    >>> tensor_node_name("0.weight")
    '_0_weight'
    """
    plain = re.sub(r"[^0-9A-Za-z_]", "_", target)
    return f"_{plain}" if plain[:1].isdigit() else plain


def call_node_name(operator: str, counts: dict[str, int]) -> str:
    """The name an operator's node has unless the file says otherwise.

    That is `relu`, `relu_1` and so on; `counts` holds how many nodes of each word came before,
    and is updated.
    """
    word = operator.split(".")[1]
    number = counts.get(word, 0)
    counts[word] = number + 1
    return f"{word}_{number}" if number else word


def _origins(nodes: Sequence[fx.Node]) -> tuple[list[str], list[int]]:
    """Module paths, and for each node the difference of its path's number to the last node's."""
    paths: dict[str, int] = {}
    numbers = [paths.setdefault(str(n.meta.get("origin") or ""), len(paths)) for n in nodes]
    return list(paths), [a - b for a, b in zip(numbers, [0, *numbers], strict=False)]


def _argument(value: Any, here: int, index: Mapping[fx.Node, int]) -> Json:
    """JSON of an argument: a node is a string with how many nodes back it stands."""
    if isinstance(value, fx.Node):
        return str(here - index[value])
    if isinstance(value, (list, tuple)):
        return [_argument(item, here, index) for item in value]
    if isinstance(value, (bool, int)) or value is None:
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, str):
        return {"string": value}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, torch.memory_format):
        return {"memory_format": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": "any"}
    if value is torch.strided:
        return {"layout": "strided"}
    raise StorageError(f"an argument of type {type(value).__name__} ({value!r}) is not plain data")


# reading ----------------------------------------------------------------------------------


def from_json(data: Mapping[str, Json], tensors: Sequence[str]) -> fx.Graph:
    """The graph of plain data.

    Raises:
        StorageError: anything that a writer does not write; nothing of it is run.
    """
    named = [operators.find(_text(name, "operator name")) for name in data["operators"]]
    words = list(data["operators"])
    graph, made, counts = fx.Graph(), list[fx.Node](), dict[str, int]()
    taken: set[str] = set()
    origins, origin = data["origins"], 0
    if len(data["origin"]) != len(data["nodes"]):
        raise StorageError(f"{len(data['nodes'])} nodes, {len(data['origin'])} origins")
    for number, (row, delta) in enumerate(zip(data["nodes"], data["origin"], strict=True)):
        kind, what = _integer(row[0], "operator number"), row[1]
        if kind == _PLACEHOLDER:
            op, target, automatic = "placeholder", _identifier(what), _identifier(what)
        elif kind == _TENSOR:
            op, target = "get_attr", tensors[_within(what, len(tensors), "tensor number")]
            automatic = tensor_node_name(target)
        else:
            op, target = "call_function", named[_within(kind, len(named), "operator number")]
            automatic = call_node_name(words[kind], counts)
        name = _identifier(row[2] if len(row) > 2 and row[2] is not None else automatic)
        if name in taken:
            raise StorageError(f"two nodes are named {name!r}")
        taken.add(name)
        calls = op == "call_function"
        args = tuple(_value(item, made) for item in what) if calls else ()
        options = row[3] if calls and len(row) > 3 else {}
        kwargs = {_identifier(key): _value(item, made) for key, item in options.items()}
        node = graph.create_node(op, target, args, kwargs, name=name)
        if node.name != name:
            raise StorageError(f"node {number} cannot be named {name!r}")
        origin += _integer(delta, "origin")
        path = origins[_within(origin, len(origins), "origin")]
        node.meta["origin"] = _text(path, "origin")
        made.append(node)
    graph.output(tuple(_value(item, made) for item in data["output"]))
    for here, low, high in data["grids"]:
        bounds = _integer(low, "grid"), _integer(high, "grid")
        made[_within(here, len(made), "node of a grid")].meta["grid"] = bounds
    return graph


def _value(item: Json, made: Sequence[fx.Node]) -> Any:
    """The inverse of `_argument`; nodes can only be those already made."""
    if isinstance(item, str):
        back = int(item)
        if not 1 <= back <= len(made):
            raise StorageError(f"an argument reads {back} nodes back at node {len(made)}")
        return made[-back]
    if isinstance(item, list):
        return [_value(part, made) for part in item]
    if isinstance(item, (bool, int, float)) or item is None:
        return item
    ((kind, value),) = item.items()
    text = _text(value, f"argument of kind {kind!r}")
    if kind == "string":
        return text
    if kind == "device" and text == "any":
        return torch.device("cpu")
    if kind == "layout" and text == "strided":
        return torch.strided
    tables = {"float": _NUMBERS, "dtype": _KINDS, "memory_format": _MEMORY_FORMATS}
    if kind not in tables or text not in tables[kind]:
        raise StorageError(f"unknown argument {kind!r}: {text[:80]!r}")
    return tables[kind][text]


def _identifier(name: Json) -> str:
    text = _text(name, "name")
    word = _IDENTIFIER.match(text) and not keyword.iskeyword(text) and text != "self"
    if not word or len(text) > 500:
        raise StorageError(f"{text[:80]!r} is not a name for a node or argument")
    return text


def _text(value: Json, what: str) -> str:
    if not isinstance(value, str):
        raise StorageError(f"{what} is {type(value).__name__}, expected text")
    return value


def _integer(value: Json, what: str) -> int:
    if type(value) is not int:
        raise StorageError(f"{what} is {type(value).__name__}, expected an integer")
    return value


def _within(value: Json, end: int, what: str) -> int:
    if not 0 <= _integer(value, what) < end:
        raise StorageError(f"{what} {value} is not below {end}")
    return value
