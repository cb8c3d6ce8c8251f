"""A Program as an ONNX file: standard operators, integer weights, QuantizeLinear/DequantizeLinear.

The Program's graph is exported again with `torch.export` (it is flat and functional already) and
translated by `torch.onnx`. Most of that exporter's time goes into decomposing the graph into core
operators; this one skips it, translates the few operators that torch's table lacks itself, and
goes the long way only where a translation is missing: a ResNet-56 takes 2 s instead of 5.
"""

import re
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

from laconic.core.errors import ExportError
from laconic.program.chain import split
from laconic.program.program import Program
from laconic.runtimes._branches import Before, branching
from laconic.runtimes._export import export, lower_weights, quiet
from laconic.runtimes._onnx_blocks import blocked_weights
from laconic.runtimes._onnx_floats import float8_weights
from laconic.runtimes._onnx_gathers import decode_what_is_looked_up
from laconic.runtimes._onnx_integers import integer_products
from laconic.runtimes._onnx_operators import missing, own, refusals
from laconic.runtimes._onnx_registry import remembered_table

_IR = Any  # onnx_ir and onnxscript objects: loose stubs


def write_onnx(program: Program, path: Path, branches: bool = False) -> Path:
    """Write `program` to `path` as ONNX; dynamic dimensions keep their names.

    Inputs are named as the placeholders; outputs `output` or `output_0`, `output_1`, ...
    Weights behind quantisation nodes are stored as int8, or fp8, with a DequantizeLinear.
    With `branches`, what inputs decide is an `If` around what no row of the batch needs.

    Raises:
        ExportError: an operator has no ONNX translation, or the file cannot be written.
    """
    obstacles = refusals(program)
    if obstacles:
        raise ExportError("; ".join(obstacles), where="onnx")
    lowered = (_branching if branches else lower_weights)(program, float8_weights)
    exported = export(lowered, program)
    model = _translate(exported)
    _name_outputs(model)
    _name_inputs(model, program)
    _transpose_codes(model)
    integer_products(model)
    blocked_weights(model)
    _drop_zero_points(model)
    decode_what_is_looked_up(model)
    _strip(model)
    _save(model, path)
    return path


def _branching(program: Program, before: Before) -> fx.GraphModule:
    chain = split(program)
    if not chain.decides:
        raise ExportError(
            "nothing is decided by input, so there is nothing to branch on",
            where="onnx",
            hint="dynamic.early_exit, dynamic.cascade and dynamic.skip_layers put choices in",
        )
    return branching(chain, before)


def _translate(exported: ExportedProgram) -> _IR:
    from torch.onnx import OnnxExporterError

    def convert(table: dict[Any, Any]) -> _IR:
        with torch.no_grad(), quiet(), remembered_table():
            made = torch.onnx.export(
                exported,
                dynamo=True,
                optimize=False,
                verbose=False,
                custom_translation_table=table,
            )
            assert made is not None
            made.optimize()
        return made.model

    # The exporter's first step is `exported.run_decompositions`; this graph does without.
    vars(exported)["run_decompositions"] = lambda *_: exported
    try:
        return convert(own() | missing())
    except (OnnxExporterError, NotImplementedError):
        pass  # an operator that torch's table lacks: let it be decomposed after all
    finally:
        vars(exported).pop("run_decompositions")
    try:
        return convert(own())
    except OnnxExporterError as error:
        found = re.search(r"OpOverload\(op='([^']+)', overload='([^']+)'\)", str(error))
        what = f"operator {found[1]}.{found[2]}" if found else str(error).strip().splitlines()[0]
        raise ExportError(
            f"ONNX has no translation for {what}",
            where="onnx",
            hint="the inductor runtime takes any operator",
        ) from error


def _name_inputs(model: _IR, program: Program) -> None:
    """Inputs and free dimensions get the Program's names instead of torch's (`s77`)."""
    names: dict[str, str] = {}
    for value, node in zip(model.graph.inputs, program.placeholders, strict=True):
        value.name = node.name
        for dim, word in program.dynamic.get(node.name, {}).items():
            names[str(value.shape[dim])] = word
    for value in (*model.graph.inputs, *model.graph.outputs):
        for dim, size in enumerate(value.shape or ()):
            if not isinstance(size, int):
                renamed = re.sub(r"\w+", lambda m: names.get(m[0], m[0]), str(size))
                value.shape[dim] = renamed


def _name_outputs(model: _IR) -> None:
    """Outputs `output` or `output_0`, ...; every one a value of its own, made by a node."""
    import onnx_ir as ir

    graph = model.graph
    taken = {v.name for v in (*graph.inputs, *graph.initializers.values())}
    taken |= {v.name for node in graph for v in node.outputs}
    seen: set[int] = set()
    for position, value in enumerate(list(graph.outputs)):
        if id(value) in seen or value.producer() is None:
            node = ir.Node("", "Identity", [value])
            node.outputs[0].shape, node.outputs[0].type = value.shape, value.type
            graph.append(node)
            graph.outputs[position] = value = node.outputs[0]
        seen.add(id(value))
        name = "output" if len(graph.outputs) == 1 else f"output_{position}"
        while name in taken and name != value.name:
            name += "_"
        taken.add(name)
        value.name = name


def _transpose_codes(model: _IR) -> None:
    """Turn DequantizeLinear → Transpose of stored codes into one DequantizeLinear.

    Runtimes look for DequantizeLinear directly in front of a matrix product.
    """
    import onnx_ir as ir

    graph = model.graph
    for node in list(graph):
        source = node.inputs[0].producer() if node.op_type == "Transpose" else None
        if source is None or source.op_type != "DequantizeLinear":
            continue
        codes = source.inputs[0]
        single = len(node.inputs[0].uses()) == 1 and len(codes.uses()) == 1
        if not single or codes.const_value is None or "perm" not in node.attributes:
            continue
        perm = list(node.attributes["perm"].as_ints())
        array = codes.const_value.numpy().transpose(perm).copy()
        codes.const_value = ir.tensor(array, name=codes.name)
        codes.shape = ir.Shape(array.shape)
        if "axis" in source.attributes:
            axis = source.attributes["axis"].as_int() % len(perm)
            source.attributes["axis"] = ir.AttrInt64("axis", perm.index(axis))
        node.outputs[0].replace_all_uses_with(source.outputs[0], replace_graph_outputs=True)
        graph.remove(node, safe=True)


def _drop_zero_points(model: _IR) -> None:
    """Leave out zero points of stored codes that are all zero: nothing stands for them.

    Layers of one width share that constant, and OpenVINO keeps weights in floats, whose zero point
    others read too.
    """
    graph = model.graph
    for node in graph:
        if node.op_type != "DequantizeLinear" or len(node.inputs) < 3 or node.inputs[2] is None:
            continue
        codes, zero = node.inputs[0].const_value, node.inputs[2]
        if codes is None or zero.const_value is None or zero.const_value.numpy().any():
            continue
        node.resize_inputs(2)
        if not zero.uses():
            graph.initializers.pop(zero.name, None)


def _strip(model: _IR) -> None:
    """Drop what the exporter noted for people: it is larger than a small model's weights."""
    graph = model.graph
    keep = {id(value) for value in (*graph.inputs, *graph.outputs, *graph.initializers.values())}
    model.metadata_props.clear()
    graph.metadata_props.clear()
    for holder in (*graph.inputs, *graph.initializers.values()):
        holder.metadata_props.clear()
    for node in graph:
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
            if id(value) not in keep:
                value.shape = value.type = None


def _save(model: _IR, path: Path) -> None:
    """Write beside the target, then move into place: a full disk leaves the old file whole."""
    import onnx_ir as ir

    path.parent.mkdir(parents=True, exist_ok=True)
    large = sum(v.const_value.nbytes for v in model.graph.initializers.values()) > 1_800_000_000
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as folder:
        temporary = Path(folder) / path.name
        try:
            ir.save(model, temporary, external_data=f"{path.name}.data" if large else None)
            for file in sorted(Path(folder).iterdir(), key=lambda file: file == temporary):
                file.replace(path.parent / file.name)
        except OSError as error:
            raise ExportError(
                f"cannot write: {error.strerror}", where=str(path), hint="free some space"
            ) from error
