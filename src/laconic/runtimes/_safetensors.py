"""Weights of a language model as safetensors with the names of compressed-tensors.

transformers and vLLM read it. Weights of linear layers on integer grids are packed into int32
words, 4 or 8 bits each (grids of fewer bits take the next width): `X.weight_packed` `[out, ceil(in
* bits / 32)]`, the lowest bits first, every code plus 2^(bits - 1); `X.weight_scale` `[out,
groups]`; `X.weight_shape`; and where zero points are not all 0 `X.weight_zero_point`, packed along
the outputs, `[ceil(out * bits / 32), groups]`. Everything else is stored as the floats it stands
for. The configuration says which layers are packed and how (`format: pack-quantized`). Layout: the
compressed-tensors project (Apache-2.0), as its package reads and writes it. Symmetric grids are
what every reader takes: transformers with compressed-tensors 0.20 refuses zero points as packed
here, which is how that package itself packs them.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from laconic.core.errors import ExportError
from laconic.forms.affine import Affine
from laconic.program.equations import arguments, operator_name
from laconic.program.freezing import form_of
from laconic.program.program import DEQUANTIZE, DYNAMIC_QUANTIZE, FAKES, Program

_WIDTHS = (4, 8)


def write_safetensors(program: Program, folder: Path, config: Mapping[str, Any]) -> list[Path]:
    """Write `model.safetensors` and `config.json` into a folder; returns both.

    Args:
        program: a model with quantised weights and float activations.
        folder: made if it is not there.
        config: the original model's configuration, to which `quantization_config` is added.

    Raises:
        ExportError: activations on a grid, nothing on a grid, or a disk that is full.
    """
    tensors, scheme = packed(program)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / "model.safetensors", folder / "config.json"]
        save_file({n: t.contiguous() for n, t in tensors.items()}, paths[0], {"format": "pt"})
        held = {**config, "quantization_config": scheme}
        paths[1].write_text(json.dumps(held, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise ExportError(f"cannot write: {error.strerror}", where=str(folder)) from error
    return paths


def packed(program: Program) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All tensors by the names they are stored under, and the `quantization_config`.

    Raises:
        ExportError: as in `write_safetensors`.
    """
    _check(program)
    linear = _linear(program)
    tensors: dict[str, Tensor] = {}
    groups: dict[tuple[int, bool, int | None], list[str]] = {}
    for name in _weights(program):
        form = form_of(program, name)
        layer = name.removesuffix(".weight")
        if name in linear and isinstance(form, Affine) and form.axis in (None, 0, -2):
            parts, scheme = _packed(form)
            tensors |= {f"{name}_{key}": value for key, value in parts.items()}
            groups.setdefault(scheme, []).append(layer)
        else:
            tensors[_first_name(program, name)] = form.decode().detach().clone()
    if not groups:
        raise ExportError(
            "no weight of a linear layer stands on an integer grid",
            where="safetensors",
            hint="apply quantize.weights, quantize.gptq or another method of weights first",
        )
    layers = {str(n.meta.get("origin")) for n in program.graph.nodes if _is_linear(n)}
    return tensors, _config(groups, layers.difference(*groups.values()))


def _check(program: Program) -> None:
    """Raises ExportError: an activation on a grid."""
    for node in program.graph.nodes:
        inner: Any = node.args[0] if node.target in (DYNAMIC_QUANTIZE, *FAKES) else None
        if inner is not None and inner.op != "get_attr":
            raise ExportError(
                f"the activation {inner.name} stands on a grid; this file holds weights only",
                where="safetensors",
                hint="quantise weights alone, or export to onnx or openvino",
            )


def _weights(program: Program) -> list[str]:
    """Names of the model's own tensors: not the scales, zero points and values beside them."""
    beside: set[str] = set()
    for node in program.graph.nodes:
        if node.target is DEQUANTIZE or str(node.target).startswith("laconic."):
            beside |= {str(side.target) for side in node.all_input_nodes[1:]}
    return [name for name, _ in program.tensors() if name not in beside]


def _first_name(program: Program, name: str) -> str:
    """Of a tied tensor the name that its embedding has: the one that readers expect."""
    names = {name, *(alias for alias, kept in program.aliases.items() if kept == name)}
    origins = [
        f"{node.meta.get('origin')}.weight"
        for node in program.graph.nodes
        if node.op == "call_function" and operator_name(node) == "aten.embedding"
    ]
    return next((origin for origin in origins if origin in names), name)


def _linear(program: Program) -> set[str]:
    """Weights `[out, in]` that linear layers multiply by and nothing else reads."""
    found: set[str] = set()
    others: set[str] = set()
    for node in program.graph.nodes:
        if node.op != "get_attr":
            continue
        users = list(node.users)
        on_grid = [user for user in users if str(user.target).startswith("laconic.")]
        readers = [reader for user in on_grid for reader in user.users if user.args[0] is node]
        readers += [user for user in users if user not in on_grid]
        name = program.aliases.get(str(node.target), str(node.target))
        for reader in readers:
            held: Any = arguments(reader).get("weight") if _is_linear(reader) else None
            fits = held is node or (held is not None and held in on_grid)
            (found if fits else others).add(name)
    return {name for name in found - others if name.endswith(".weight")}


def _is_linear(node: Any) -> bool:
    return node.op == "call_function" and operator_name(node) == "aten.linear"


# packing ------------------------------------------------------------------------------------


def _packed(form: Affine) -> tuple[dict[str, Tensor], tuple[int, bool, int | None]]:
    """The parts of a weight `[out, in]`; its bits, whether it is symmetric, and its group."""
    lowest, highest = (int(end) for end in form.codes.aminmax())
    lowest, highest = min(lowest, form.qmin), max(highest, form.qmax)
    bits = next((b for b in _WIDTHS if -(2 ** (b - 1)) <= lowest and highest < 2 ** (b - 1)), None)
    if bits is None:
        raise ExportError(f"codes in [{lowest}, {highest}] do not fit 8 bits", where="safetensors")
    rows, columns = form.codes.shape
    scale = form.scale.detach().reshape(-1, form.scale.shape[-1] if form.scale.ndim == 2 else 1)
    scale = scale.expand(rows, -1).contiguous()
    zero = form.zero_point.reshape(-1, scale.shape[1]).expand(rows, -1)
    group = columns // scale.shape[1] if scale.shape[1] > 1 else None
    parts = {
        "packed": pack(form.codes, bits),
        "scale": scale,
        "shape": torch.tensor([rows, columns]),
    }
    symmetric = not bool(zero.any())
    if not symmetric:
        parts["zero_point"] = pack(zero.T.contiguous(), bits).T.contiguous()
    return parts, (bits, symmetric, group)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes `[rows, n]` in [-2^(bits - 1), 2^(bits - 1)) as int32 `[rows, ceil(n * bits / 32)]`.

    `bits` divides 32.
    """
    each = 32 // bits
    raised = codes.detach().cpu().numpy().astype(np.int64) + 2 ** (bits - 1)
    short = -raised.shape[1] % each
    wide = np.pad(raised, ((0, 0), (0, short))).reshape(len(raised), -1, each)
    words = (wide << (bits * np.arange(each))).sum(-1).astype(np.uint32)
    return torch.from_numpy(words.view(np.int32))


def _config(
    groups: Mapping[tuple[int, bool, int | None], list[str]], floats: set[str]
) -> dict[str, Any]:
    """What `config.json` says of the packed layers."""
    found: dict[str, Any] = {}
    for number, ((bits, symmetric, group), names) in enumerate(groups.items()):
        found[f"group_{number}"] = {
            "targets": ["Linear"] if len(groups) == 1 else names,
            "weights": {
                "num_bits": bits,
                "type": "int",
                "symmetric": symmetric,
                "strategy": "channel" if group is None else "group",
                "group_size": group,
                "dynamic": False,
            },
            "input_activations": None,
            "output_activations": None,
        }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": found,
        "ignore": sorted(floats),
        "kv_cache_scheme": None,
    }
