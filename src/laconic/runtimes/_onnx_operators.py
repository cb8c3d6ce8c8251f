"""ONNX for operators that torch's own table lacks, and for Laconic's."""

from collections.abc import Callable
from typing import Any

import torch

from laconic.forms import levels
from laconic.program.program import (
    DEQUANTIZE,
    DYNAMIC_QUANTIZE,
    FAKE_LEVELS,
    FAKE_QUANTIZE,
    FAKES,
    Program,
)
from laconic.runtimes._export import code_type
from laconic.runtimes._onnx_attention import attention, modules

_IR = Any  # values of onnx_ir: loose stubs


def own() -> dict[Any, Callable[..., Any]]:
    """Laconic's operators, and attention in the form that runtimes fuse."""
    dot_product: Any = torch.ops.aten.scaled_dot_product_attention.default
    return {
        FAKE_QUANTIZE: _fake_quantize,
        DEQUANTIZE: _dequantize,
        FAKE_LEVELS: _fake_levels,
        DYNAMIC_QUANTIZE: _dynamic_quantize,
        dot_product: attention,
    }


def missing() -> dict[Any, Callable[..., Any]]:
    """Operators that torch's table lacks, because it decomposes them, although ONNX has them.

    Where one of these raises NotImplementedError, decomposing is the better way.
    """
    aten = torch.ops.aten
    return {
        aten.batch_norm.default: _batch_norm,
        aten.adaptive_avg_pool2d.default: _adaptive_average,
        aten.adaptive_avg_pool1d.default: _adaptive_average,
        aten.to.dtype: _to_dtype,
        aten.to.device: _to_device,
        aten.__and__.Tensor: _both,
        aten.min.other: _smaller,
        aten.max.other: _larger,
        aten.conv_transpose1d.default: _conv_transpose,
        aten.conv_transpose2d.input: _conv_transpose,
        aten.conv_transpose3d.input: _conv_transpose,
    }


def refusals(program: Program) -> list[str]:
    """Quantisation nodes that QuantizeLinear and DequantizeLinear cannot express, in words."""
    found: list[str] = []
    for node in program.graph.nodes:
        inner: Any = node.all_input_nodes[0] if node.target in FAKES else None
        if inner is None or inner.op == "get_attr":
            continue
        if len(node.all_input_nodes[1].meta.get("shape", ())) > 1:
            found.append(f"{inner.name}: scales of runs of elements belong to stored tensors only")
        if node.target is FAKE_LEVELS:
            continue
        low, high = node.args[4:6]
        if code_type(low, high) is torch.int32:
            found.append(f"{inner.name}: activation codes in [{low}, {high}] do not fit 8 bits")
    return found


def _fake_quantize(
    x: _IR, scale: _IR, zero_point: _IR, axis: int | None, qmin: int, qmax: int
) -> _IR:
    op, _ = modules()

    full = (qmin, qmax) in ((-128, 127), (0, 255))
    if not full:
        # A narrower grid: saturate before QuantizeLinear, which knows only the whole type.
        origin = op.CastLike(zero_point, scale)
        low, high = (op.Mul(op.Sub(float(end), origin), scale) for end in (qmin, qmax))
        x = op.Clip(x, low, high) if axis is None else _clamp(x, low, high, axis)
    options: dict[str, int] = {} if axis is None else {"axis": axis}
    codes = op.QuantizeLinear(x, scale, zero_point, **options)
    return op.DequantizeLinear(codes, scale, zero_point, **options)


def _clamp(x: _IR, low: _IR, high: _IR, axis: int) -> _IR:
    op, _ = modules()

    shape = [1] * len(x.shape)
    shape[axis] = -1
    low, high = op.Reshape(low, shape), op.Reshape(high, shape)
    return op.Min(op.Max(x, low), high)


def _dynamic_quantize(x: _IR, bits: int, per_token: bool) -> _IR:
    """One operator for 8 bits and one range; otherwise the same arithmetic spelled out."""
    op, ir = modules()

    if bits == 8 and not per_token:
        return op.DequantizeLinear(*op.DynamicQuantizeLinear(x))
    axes, most = [-1] if per_token else list(range(len(x.shape))), float(2**bits - 1)
    low = op.Min(op.ReduceMin(x, axes, keepdims=1), 0.0)
    wide = op.Sub(op.Max(op.ReduceMax(x, axes, keepdims=1), 0.0), low)
    empty = op.Cast(op.Equal(wide, 0.0), to=int(ir.DataType.FLOAT))
    scale = op.Add(op.Div(wide, most), empty)  # 1 where everything is zero
    zero = op.Clip(op.Round(op.Neg(op.Div(low, scale))), 0.0, most)
    codes = op.Clip(op.Add(op.Round(op.Div(x, scale)), zero), 0.0, most)
    return op.Mul(op.Sub(codes, zero), scale)


def _fake_levels(x: _IR, scale: _IR, axis: int | None, name: str) -> _IR:
    """The nearest of fixed levels: a comparison, a cast that rounds, or a count of borders."""
    op, ir = modules()

    if axis is not None:
        shape = [1] * len(x.shape)
        shape[axis] = -1
        scale = op.Reshape(scale, shape)
    position = op.Div(x, scale)
    held, borders = levels.values(name), levels.borders(name)
    if len(held) == 2:
        return op.Mul(op.Where(op.GreaterOrEqual(position, borders[0]), held[1], held[0]), scale)
    floats = {"fp8_e4m3": ir.DataType.FLOAT8E4M3FN, "fp8_e5m2": ir.DataType.FLOAT8E5M2}
    if name in floats:
        codes = op.Cast(op.Clip(position, held[0], held[-1]), to=int(floats[name]))
        return op.Mul(op.Cast(codes, to=int(ir.DataType.FLOAT)), scale)
    above = op.GreaterOrEqual(op.Unsqueeze(position, [-1]), op.Constant(value_floats=borders))
    count = op.ReduceSum(op.Cast(above, to=int(ir.DataType.INT64)), [-1], keepdims=0)
    return op.Mul(op.Gather(op.Constant(value_floats=held), count), scale)


def _dequantize(codes: _IR, scale: _IR, zero_point: _IR, axis: int | None) -> _IR:
    op, ir = modules()

    options: dict[str, int] = {} if axis is None else {"axis": axis}
    if codes.dtype in (ir.DataType.FLOAT8E4M3FN, ir.DataType.FLOAT8E5M2):
        return op.DequantizeLinear(codes, scale, **options)
    return op.DequantizeLinear(codes, scale, zero_point, **options)


def _batch_norm(
    x: _IR,
    weight: _IR,
    bias: _IR,
    mean: _IR,
    variance: _IR,
    training: bool,
    momentum: float,
    eps: float,
    cudnn: bool,
) -> _IR:
    op, _ = modules()

    del momentum, cudnn
    if training or any(side is None for side in (weight, bias, mean, variance)):
        raise NotImplementedError  # as `missing` says
    return op.BatchNormalization(x, weight, bias, mean, variance, epsilon=eps)


def _adaptive_average(x: _IR, size: list[int]) -> _IR:
    op, _ = modules()

    if set(size) != {1}:
        raise NotImplementedError
    return op.ReduceMean(x, list(range(-len(size), 0)), keepdims=1)


def _to_dtype(x: _IR, dtype: int, *_: Any, **__: Any) -> _IR:
    op, _ = modules()

    return op.Cast(x, to=dtype)


def _to_device(x: _IR, device: Any, dtype: int, *_: Any, **__: Any) -> _IR:
    del device
    return modules()[0].Cast(x, to=dtype)


def _both(x: _IR, other: _IR) -> _IR:
    op, ir = modules()
    if x.dtype != ir.DataType.BOOL or other.dtype != ir.DataType.BOOL:
        raise NotImplementedError
    return op.And(x, other)


def _smaller(x: _IR, other: _IR) -> _IR:
    return modules()[0].Min(x, other)


def _larger(x: _IR, other: _IR) -> _IR:
    return modules()[0].Max(x, other)


def _conv_transpose(
    x: _IR,
    weight: _IR,
    bias: _IR | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> _IR:
    op, _ = modules()

    rank = len(x.shape) - 2

    def each(value: Any) -> list[int]:
        values = [value] if isinstance(value, int) else list(value)
        return values * rank if len(values) == 1 else values

    inputs = (x, weight) if bias is None else (x, weight, bias)
    return op.ConvTranspose(
        *inputs,
        strides=each(stride),
        pads=each(padding) * 2,
        output_padding=each(output_padding),
        group=groups,
        dilations=each(dilation),
    )
