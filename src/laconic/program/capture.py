"""Turn an `nn.Module` into a Program with `torch.export`."""

import copy
import dataclasses
import inspect
import warnings
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from laconic.core.errors import CaptureError, DataError
from laconic.program import normalize
from laconic.program.program import Program
from laconic.program.signature import Signature, describe

Dynamic = str | Sequence[str] | Mapping[str, Mapping[int, str]] | None


def capture(model: nn.Module, example_inputs: Any, *, dynamic: Dynamic = "batch") -> Program:
    """Capture a trained model as a Program, exact to eager.

    Args:
        model: any module that `torch.export` can export; it is left as it was.
        example_inputs: a tuple of positional inputs, a dict of keyword inputs, or one tensor.
        dynamic: "batch": dimension 0 of every input tensor may change; ("batch", "sequence"):
            dimension 1 of every 2-d input too; a mapping input name → {dimension: name}; None:
            all shapes are fixed. An example of batch 1 is doubled first, because a size of 1 is
            always taken as fixed.

    Raises:
        CaptureError: the model cannot be exported, or holds NaN or infinite values.
        DataError: the example inputs do not fit the model.
    """
    _check_values(model)
    args, kwargs = _arguments(example_inputs)
    training = model.training
    model.eval()
    try:
        _try_eager(model, args, kwargs)
        with torch.no_grad(), _named_arguments(model, kwargs):
            return _capture(model, args, kwargs, dynamic)
    finally:
        model.train(training)


def _check_values(model: nn.Module) -> None:
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            bad = int((~torch.isfinite(tensor)).sum())
            raise CaptureError(
                f"{bad} of {tensor.numel()} values are NaN or infinite",
                where=name,
                hint="the model is broken before compression; train or load it again",
            )


def _arguments(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example, Tensor):
        return (example,), {}
    if isinstance(example, Mapping):
        return (), dict(example)
    if isinstance(example, (tuple, list)):
        return tuple(example), {}
    raise DataError(
        f"found {type(example).__name__}, expected a tensor, a tuple or a dict",
        where="example_inputs",
    )


def _try_eager(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    try:
        with torch.no_grad():
            output = model(*args, **kwargs)
    except Exception as error:
        leaves = pytree.tree_leaves((args, kwargs))
        shapes = [tuple(t.shape) for t in leaves if isinstance(t, Tensor)]
        raise DataError(
            f"the model itself fails on inputs of shapes {shapes}: {_first_line(error)}",
            where="example_inputs",
            hint="give inputs that model(...) accepts",
        ) from error
    for kind in {type(item) for item in _nest(output)}:  # torch.export knows only registered ones
        if dataclasses.is_dataclass(kind) and kind not in pytree.SUPPORTED_NODES:
            torch.export.register_dataclass(kind)


def _nest(value: Any) -> list[Any]:
    """A value and everything nested in it."""
    below: list[Any] = []
    if isinstance(value, Mapping):
        below = list(value.values())
    elif isinstance(value, (tuple, list)):
        below = list(value)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        below = [getattr(value, field.name) for field in dataclasses.fields(value)]
    return [value, *(inner for item in below for inner in _nest(item))]


@dataclass(frozen=True)
class _Wish:
    """Which dimensions should be dynamic: name of the argument leaf → {dim: name}."""

    dims: dict[int, dict[int, str]]


def _capture(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic: Dynamic
) -> Program:
    notes: list[str] = []
    given, (args, kwargs) = (args, kwargs), _double(args, kwargs, dynamic)
    wish = _wish(args, kwargs, dynamic)
    exported = _export(model, args, kwargs, wish)
    fixed = _became_fixed(exported, wish)
    if fixed:
        notes.append(f"{fixed} is fixed: the model's code ties it to the example")
        args, kwargs = given
        wish = _Wish({})
        exported = _export(model, args, kwargs, wish)
    return _assemble(model, exported, args, kwargs, wish, notes)


def _leaves(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    return pytree.tree_leaves((args, kwargs))


def _double(
    args: tuple[Any, ...], kwargs: dict[str, Any], dynamic: Dynamic
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Repeat a batch of one: export takes a size of 1 as a constant."""
    wants_batch = dynamic == "batch" or (not isinstance(dynamic, (str, type(None), Mapping)))
    tensors = [t for t in _leaves(args, kwargs) if isinstance(t, Tensor) and t.ndim]
    if not wants_batch or not tensors or any(t.shape[0] != 1 for t in tensors):
        return args, kwargs

    def twice(value: Any) -> Any:
        return torch.cat([value, value]) if isinstance(value, Tensor) and value.ndim else value

    return pytree.tree_map(twice, args), pytree.tree_map(twice, kwargs)


def _wish(args: tuple[Any, ...], kwargs: dict[str, Any], dynamic: Dynamic) -> _Wish:
    leaves = _leaves(args, kwargs)
    dims: dict[int, dict[int, str]] = {}
    if dynamic is None:
        return _Wish(dims)
    if isinstance(dynamic, Mapping):
        return _Wish(_named_wish(args, kwargs, dynamic))
    words = (dynamic,) if isinstance(dynamic, str) else tuple(dynamic)
    unknown = set(words) - {"batch", "sequence"}
    if unknown:
        raise CaptureError(
            f"unknown dynamic dimension {sorted(unknown)[0]!r}",
            where="dynamic",
            hint='use "batch", ("batch", "sequence"), None, or {input: {dimension: name}}',
        )
    tensors = [(i, t) for i, t in enumerate(leaves) if isinstance(t, Tensor) and t.ndim]
    batch = tensors[0][1].shape[0] if tensors else 0
    for index, tensor in tensors:
        if "batch" in words and tensor.shape[0] == batch:
            dims.setdefault(index, {})[0] = "batch"
        if "sequence" in words and tensor.ndim == 2:
            dims.setdefault(index, {})[1] = "sequence"
    return _Wish(dims)


def _named_wish(
    args: tuple[Any, ...], kwargs: dict[str, Any], dynamic: Mapping[str, Mapping[int, str]]
) -> dict[int, dict[int, str]]:
    names = [f"args[{i}]" for i in range(len(args))] + list(kwargs)
    wanted: dict[int, dict[int, str]] = {}
    index = 0
    for position, value in enumerate([*args, *kwargs.values()]):
        count = len(pytree.tree_leaves(value))
        for key in (names[position], str(position)):
            for leaf in range(index, index + count):
                if key in dynamic:
                    wanted[leaf] = dict(dynamic[key])
        index += count
    return wanted


def _export(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], wish: _Wish
) -> ExportedProgram:
    leaves, spec = pytree.tree_flatten((args, kwargs))
    shapes = [
        {d: Dim.AUTO for d in wish.dims.get(i, {})} if isinstance(leaf, Tensor) else None
        for i, leaf in enumerate(leaves)
    ]
    arg_shapes, kwarg_shapes = pytree.tree_unflatten(shapes, spec)
    dynamic_shapes = _by_parameter(model, arg_shapes, kwarg_shapes)
    try:
        with warnings.catch_warnings():  # recurrent layers list their parameters a second time
            warnings.filterwarnings("ignore", message=r"The tensor attributes? .*_flat_weights")
            return torch.export.export(model, args, kwargs, dynamic_shapes=dynamic_shapes)
    except Exception as error:
        raise CaptureError(
            f"torch.export cannot follow this model: {_first_line(error)}",
            where=_user_line(error) or type(model).__name__,
            hint="a Program is one static graph: replace branches that depend on tensor values, "
            "or capture the part of the model without them; --debug shows torch's own account",
        ) from error


def _by_parameter(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any] | None:
    """Shapes under the names of `forward`'s parameters, as torch.export wants them."""
    return dict(inspect.signature(model.forward).bind(*args, **kwargs).arguments)


@contextmanager
def _named_arguments(model: nn.Module, kwargs: Mapping[str, Any]) -> Generator[None]:
    """For a while, `forward(**kwargs)` names the arguments it is given.

    torch.export (2.13) cannot give dimensions of what a catch-all parameter takes.
    """
    forward = model.forward
    signature = inspect.signature(forward)
    parameters = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    extra = [name for name in kwargs if name not in {p.name for p in parameters}]
    if not extra:
        yield
        return

    def named(*given: Any, **others: Any) -> Any:
        return forward(*given, **others)

    kind = inspect.Parameter.KEYWORD_ONLY
    added = [inspect.Parameter(name, kind) for name in extra]
    setattr(named, "__signature__", signature.replace(parameters=parameters + added))  # noqa: B010
    own = model.__dict__.get("forward")
    model.forward = named
    try:
        yield
    finally:
        del model.forward
        if own is not None:
            model.forward = own


def _became_fixed(exported: ExportedProgram, wish: _Wish) -> str:
    """Names of wished dimensions that came out as constants."""
    nodes = {n.name: n for n in exported.graph.nodes if n.op == "placeholder"}
    inputs = list(exported.graph_signature.user_inputs)
    fixed: set[str] = set()
    for leaf, dims in _leaf_order(exported, wish).items():
        name = inputs[leaf]
        value = nodes[name].meta["val"] if isinstance(name, str) else None
        for dim, word in dims.items():
            if isinstance(value, Tensor) and _is_constant(value.shape[dim]):
                fixed.add(f"dimension {word!r} of {name}")
    return ", ".join(sorted(fixed))


def _is_constant(size: int | torch.SymInt) -> bool:
    """Whether a traced size is a number; a symbol that has been solved counts as one."""
    return not isinstance(size, torch.SymInt) or size.node.maybe_as_int() is not None


def _leaf_order(exported: ExportedProgram, wish: _Wish) -> dict[int, dict[int, str]]:
    """The wish by position among the exported program's inputs (keyword order may differ)."""
    order = _input_order(exported)
    return {order[leaf]: dims for leaf, dims in wish.dims.items()}


def _input_order(exported: ExportedProgram) -> list[int]:
    """Position among the graph's inputs of every leaf of the example `(args, kwargs)`."""
    count = len(exported.graph_signature.user_inputs)
    example = exported.example_inputs
    if example is None or exported.call_spec.in_spec is None:
        return list(range(count))
    numbered = pytree.tree_unflatten(list(range(count)), exported.call_spec.in_spec)
    args, kwargs = numbered
    given = example[1]
    return pytree.tree_leaves((args, {key: kwargs[key] for key in given}))


def _assemble(
    model: nn.Module,
    exported: ExportedProgram,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    wish: _Wish,
    notes: list[str],
) -> Program:
    classes: dict[str, type] = {}
    names, positional = _argument_names(model, args, kwargs)
    leaves: list[Tensor] = []
    try:
        arguments = {name: describe(value, leaves, classes) for name, value in names.items()}
        output = describe(model(*args, **kwargs), [], classes)
    except TypeError as error:
        raise CaptureError(
            f"an input or output holds something else than tensors: {error}",
            where=type(model).__name__,
            hint="wrap the model so that it takes and returns tensors (return_dict and "
            "use_cache=False help with Hugging Face models)",
        ) from error
    graph, tensors, aliases, inputs = normalize.flatten_export(exported, model)
    flat_leaves = _leaves(args, kwargs)
    order = _input_order(exported)
    tensor_inputs = [order[i] for i, leaf in enumerate(flat_leaves) if isinstance(leaf, Tensor)]
    normalize.arrange_placeholders(graph, inputs, tensor_inputs)
    held = [leaf for leaf in flat_leaves if isinstance(leaf, Tensor)]
    nodes = [node for node in graph.nodes if node.op == "placeholder"]
    wished = {order[leaf]: dims for leaf, dims in wish.dims.items()}
    dynamic = {
        node.name: wished[position]
        for node, position in zip(nodes, tensor_inputs, strict=True)
        if position in wished
    }
    signature = Signature(arguments, output, len(held), positional, classes)
    lost = [*notes, *normalize.lost_in_eval(model, graph)]
    example = [copy.deepcopy(t.detach()).cpu() for t in held]
    program = Program(
        graph, tensors, signature, example, dynamic=dynamic, aliases=aliases, lost=lost
    )
    program.propagate()
    normalize.drop_identities(program)
    program.recompile()
    program.share()  # the tensors are still the model's own
    return program


def _argument_names(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Values by parameter name of `forward`, in the order (args, kwargs); all positional names."""
    parameters = inspect.signature(model.forward).parameters.values()
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    positional = [p.name for p in parameters if p.kind in kinds]
    positional += [f"args_{i}" for i in range(len(positional), len(args))]
    return dict(zip(positional, args, strict=False)) | kwargs, tuple(positional)


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]


def _user_line(error: BaseException) -> str | None:
    """File and line of the model's code that export stumbled over."""
    text = str(error)
    for line in text.splitlines():
        stripped = line.strip()
        if stripped.startswith('File "') and "site-packages/torch" not in stripped:
            return stripped.removeprefix("File ").replace('"', "")
    trace = error.__traceback__
    place = None
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if "/torch/" not in file and "laconic" not in file and not file.startswith("<"):
            place = f"{file}:{trace.tb_lineno}"
        trace = trace.tb_next
    return place
