"""A weight as a chain of smaller ones: truncated SVD, spatial, Tucker-2 and CP decompositions.

    channel   W = expand (1x1) . reduce (k x k to r channels)           linear layers: W = A B
    spatial   W = horizontal (1 x k) . vertical (k x 1, to r channels)
    tucker2   W = expand (1x1) . core (k x k) . reduce (1x1)
    cp        W = expand (1x1) . horizontal . vertical (both depthwise) . reduce (1x1)

What is minimised is the error of the layer's *outputs*: with S the second moment of its input
columns and D the scale each output is multiplied with, ||D (W - W') S^(1/2)||. For `channel` that
is solved exactly by projecting the outputs on their principal directions, which needs no inverse of
S (reduced rank regression; SVD-LLM, Wang et al. 2024, has the same optimum). The others decompose a
weight whitened by the channels' part of S, then fit the last factor anew under the whole of it.

Papers: Zhang et al. 2015 (channel), Jaderberg et al. 2014 (spatial), Kim et al. 2016 (Tucker-2),
Lebedev et al. 2015 (CP).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["channel", "spatial", "tucker2", "cp"]
Factors = tuple[Tensor, ...]
ITERATIONS = 200  # of alternating least squares
TOLERANCE = 1e-4  # change of the relative squared error in one iteration that ends them
CANCELLING = 1e3  # energy of the components over that of the weight beyond which they cancel out


@dataclass(frozen=True)
class Shape:
    """What a layer's cost depends on.

    Attributes:
        out, into: channels (rows, columns).
        kernel: () for a linear layer.
        places: positions per sample of the input, of an output that only the first spatial
            dimension of the kernel has been applied to, and of the output.
    """

    out: int
    into: int
    kernel: tuple[int, ...]
    places: tuple[int, int, int]

    @property
    def macs(self) -> int:
        """Multiply-adds per sample of the whole layer."""
        return self.params * self.places[2]

    @property
    def params(self) -> int:
        """Weights of the whole layer."""
        return self.out * self.into * prod(self.kernel)


@dataclass(frozen=True)
class Stage:
    """One operator of the chain.

    Attributes:
        name: of its module, beside the old weight.
        shape: of its weight.
        places: positions per sample where it is applied.
        owns: spatial dimensions whose stride, padding and dilation it has.
        groups: of the convolution.
    """

    name: str
    shape: tuple[int, ...]
    places: int
    owns: tuple[int, ...] = ()
    groups: int = 1

    @property
    def params(self) -> int:
        """Weights of this operator."""
        return prod(self.shape)


def fitting(kind: Kind, shape: Shape) -> Kind:
    """The kind that makes sense: without a kernel to take apart all are a matrix of rank r."""
    return "channel" if prod(shape.kernel) == 1 else kind


def stages(kind: Kind, shape: Shape, ranks: Sequence[int]) -> tuple[Stage, ...]:
    """The operators of the chain, in the order of execution; `kind` as `fitting` gives it."""
    one, whole = (1,) * len(shape.kernel), tuple(range(len(shape.kernel)))
    first, middle, last = shape.places
    r, k = ranks[0], shape.kernel
    expand = Stage("expand", (shape.out, ranks[-1], *one), last)
    if kind == "channel":
        return Stage("reduce", (r, shape.into, *k), last, whole), expand
    if kind == "spatial":
        return (
            Stage("vertical", (r, shape.into, k[0], 1), middle, (0,)),
            Stage("horizontal", (shape.out, r, 1, k[1]), last, (1,)),
        )
    reduce = Stage("reduce", (r, shape.into, *one), first)
    if kind == "tucker2":
        return reduce, Stage("core", (ranks[1], r, *k), last, whole), expand
    if len(k) == 1:
        return reduce, Stage("core", (r, 1, *k), last, (0,), r), expand
    vertical = Stage("vertical", (r, 1, k[0], 1), middle, (0,), r)
    return reduce, vertical, Stage("horizontal", (r, 1, 1, k[1]), last, (1,), r), expand


def cost(kind: Kind, shape: Shape, ranks: Sequence[int]) -> tuple[int, int]:
    """Multiply-adds per sample and weights of the chain."""
    chain = stages(kind, shape, ranks)
    return sum(s.params * s.places for s in chain), sum(s.params for s in chain)


def decompose(
    kind: Kind,
    weight: Tensor,
    ranks: Sequence[int],
    moment: Tensor | None = None,
    rows: Tensor | None = None,
) -> Factors | None:
    """The weights of the chain, or None where alternating least squares found no sound answer.

    Args:
        kind: as `fitting` gives it.
        weight: float64 `[out, into, *kernel]`.
        ranks: one, or two for tucker2 (in, out).
        moment: float64 `[columns, columns]`, second moment of the input columns; identity if None.
        rows: float64 `[out]`, positive weights of the outputs; ones if None.
    """
    moment = _identity(weight) if moment is None else moment
    rows = weight.new_ones(len(weight)) if rows is None else rows
    scaled = weight * rows.reshape(-1, *[1] * (weight.ndim - 1))
    if kind == "channel":
        matrix, one = scaled.flatten(1), (1,) * (weight.ndim - 2)
        basis = top(matrix @ moment @ matrix.T, ranks[0])
        reduce = (basis.T @ matrix).reshape(-1, *weight.shape[1:])
        return _balanced(reduce, (basis / rows[:, None]).reshape(-1, *reduce.shape[:1], *one))
    if kind == "spatial":
        found = _spatial(scaled, ranks[0], moment, rows)
    elif kind == "tucker2":
        found = _tucker2(scaled, ranks, moment, rows)
    else:
        found = _cp(scaled, ranks[0], moment, rows)
    return None if found is None else polished(kind, found, weight, moment)


def product(kind: Kind, factors: Factors) -> Tensor:
    """The weight that the chain stands for, as `[out, columns]`."""
    return factors[-1].flatten(1) @ before_last(kind, factors)


def before_last(kind: Kind, factors: Factors) -> Tensor:
    """All but the last operator as one map from the input columns: `[features, columns]`."""
    first = factors[0]
    if kind == "channel":
        return first.flatten(1)
    if kind == "spatial":
        width = factors[1].shape[3]
        eye = torch.eye(width).to(first)
        return torch.einsum("rih,wv->rwihv", first[..., 0], eye).reshape(len(first) * width, -1)
    flat = first.flatten(1)
    if kind == "tucker2":
        return torch.einsum("pr...,ri->pi...", factors[1], flat).flatten(1)
    filters = factors[1].flatten(1)
    if len(factors) == 4:
        filters = (filters[:, :, None] * factors[2].flatten(1)[:, None]).flatten(1)
    return (flat[:, :, None] * filters[:, None]).flatten(1)


def polished(kind: Kind, factors: Factors, weight: Tensor, moment: Tensor | None = None) -> Factors:
    """The last factor fitted anew by least squares, the others as they are."""
    moment = _identity(weight) if moment is None else moment
    features, matrix = before_last(kind, factors), weight.flatten(1)
    inner = features @ moment @ features.T
    cross = matrix @ moment @ features.T
    level = 1e-12 * inner.diagonal().mean()
    inner.diagonal().add_(level)  # only against features that are never excited
    prior = level * factors[-1].flatten(1)
    last = torch.linalg.lstsq(inner, (cross + prior).T, driver="gelsd").solution.T
    return *factors[:-1], last.reshape(factors[-1].shape)


def spectra(
    kind: Kind, weight: Tensor, moment: Tensor | None = None, rows: Tensor | None = None
) -> tuple[Tensor, ...]:
    """Energies of the directions that ranks keep, largest first; one spectrum for each rank.

    Not for cp, whose error only its fit tells. What a rank discards of the output's energy is the
    rest of its spectrum over the sum; for tucker2 the sum of both rests is an upper bound.
    """
    moment = _identity(weight) if moment is None else moment
    rows = weight.new_ones(len(weight)) if rows is None else rows
    scaled = weight * rows.reshape(-1, *[1] * (weight.ndim - 1))
    matrix = scaled.flatten(1)
    outputs = matrix @ moment @ matrix.T
    if kind == "channel":
        grams = [outputs]
    elif kind == "spatial":
        grams = [_horizontal_gram(scaled, moment)[0]]
    else:
        flat = _whitened(scaled, moment)[0].transpose(0, 1).flatten(1)
        grams = [flat @ flat.T, outputs]
    return tuple(torch.linalg.eigvalsh(_symmetric(g)).flip(0).clamp(min=0) for g in grams)


def top(gram: Tensor, rank: int) -> Tensor:
    """Leading eigenvectors `[n, rank]`, signs such that the largest entry of each is positive."""
    vectors = torch.linalg.eigh(_symmetric(gram))[1].flip(1)[:, :rank]
    places = vectors.abs().argmax(0)
    signs = vectors[places, torch.arange(vectors.shape[1])].sign()
    return vectors * signs


# kinds ----------------------------------------------------------------------------------------


def _spatial(scaled: Tensor, rank: int, moment: Tensor, rows: Tensor) -> Factors:
    out, into, high, wide = scaled.shape
    gram, matrix = _horizontal_gram(scaled, moment)
    basis = top(gram, rank)  # [out * wide, rank]
    vertical = (matrix @ basis).T.reshape(-1, into, high, 1)
    horizontal = basis.reshape(out, 1, wide, -1).permute(0, 3, 1, 2)
    return _balanced(vertical, horizontal / rows.reshape(-1, 1, 1, 1))


def _horizontal_gram(scaled: Tensor, moment: Tensor) -> tuple[Tensor, Tensor]:
    """Second moment of all columns of outputs `[out * wide] * 2`, and the matrix behind it."""
    out, into, high, wide = scaled.shape
    matrix = scaled.permute(1, 2, 0, 3).reshape(into * high, out * wide)
    blocks = moment.reshape(into * high, wide, into * high, wide)
    columns = blocks.diagonal(dim1=1, dim2=3).mean(-1)
    return matrix.T @ columns @ matrix, matrix


def _tucker2(scaled: Tensor, ranks: Sequence[int], moment: Tensor, rows: Tensor) -> Factors:
    white, inverse = _whitened(scaled, moment)
    tensor = white.flatten(2)  # [out, into, taps]
    outer = top(_unfolded(tensor, 0), ranks[1])
    inner = outer
    for _ in range(8):  # higher-order orthogonal iteration
        inner = top(_unfolded(torch.einsum("oit,op->pit", tensor, outer), 1), ranks[0])
        outer = top(_unfolded(torch.einsum("oit,ir->ort", tensor, inner), 0), ranks[1])
    core = torch.einsum("oit,op,ir->prt", tensor, outer, inner)
    one = (1,) * (scaled.ndim - 2)
    reduce = (inner.T @ inverse).reshape(-1, scaled.shape[1], *one)
    expand = (outer / rows[:, None]).reshape(len(rows), -1, *one)
    return reduce, core.reshape(*core.shape[:2], *scaled.shape[2:]), expand


def _unfolded(tensor: Tensor, mode: int) -> Tensor:
    flat = tensor.movedim(mode, 0).flatten(1)
    return flat @ flat.T


def _cp(scaled: Tensor, rank: int, moment: Tensor, rows: Tensor) -> Factors | None:
    white, inverse = _whitened(scaled, moment)
    found = alternate(white, rank)
    if found is None:
        return None
    modes, _ = found
    one = (1,) * (scaled.ndim - 2)
    reduce = (modes[1].T @ inverse).reshape(rank, -1, *one)
    expand = (modes[0] / rows[:, None]).reshape(-1, rank, *one)
    filters = [
        mode.T.reshape(rank, 1, *(len(mode) if d == dim else 1 for d in range(len(one))))
        for dim, mode in enumerate(modes[2:])
    ]
    return reduce, *filters, expand


def alternate(tensor: Tensor, rank: int) -> tuple[list[Tensor], float] | None:
    """CP by alternating least squares: one `[size, rank]` for each dimension, and the error.

    The error is squared and relative. None where it does not settle within `ITERATIONS`, or where
    it settles on huge components that cancel out (the tensor has no best approximation of that
    rank).
    """
    energy = float(tensor.square().sum())
    modes = [_start(tensor, mode, rank) for mode in range(tensor.ndim)]
    eye, error = torch.eye(rank).to(tensor), torch.inf
    for _ in range(ITERATIONS if energy > 0 else 0):
        before = error
        for mode in (*range(1, tensor.ndim), 0):  # the first one last: it carries the sizes
            others = [m for i, m in enumerate(modes) if i != mode]
            hadamard = torch.stack([m.T @ m for m in others]).prod(0)
            cross = _cross(tensor, modes, mode)
            damped = hadamard + 1e-10 * hadamard.diagonal().mean() * eye
            modes[mode] = torch.linalg.solve(damped, cross.T).T
            if mode:
                modes[mode] = modes[mode] / modes[mode].norm(dim=0).clamp(min=1e-150)
            else:
                error = 1 - float((cross * modes[0]).sum()) / energy
        if not -1e-6 < error < torch.inf:
            return None
        if abs(before - error) < TOLERANCE:
            sound = float(modes[0].square().sum()) <= CANCELLING * energy
            return (modes, max(error, 0.0)) if sound else None
    return None


def _start(tensor: Tensor, mode: int, rank: int) -> Tensor:
    """Leading directions of a dimension; where there are too few, fixed random ones."""
    size = tensor.shape[mode]
    found = top(_unfolded(tensor, mode), min(rank, size))
    generator = torch.Generator().manual_seed(mode)
    more = torch.randn(size, rank - found.shape[1], generator=generator, dtype=torch.float64)
    return torch.cat([found, more.to(found) / size**0.5], 1)


def _cross(tensor: Tensor, modes: Sequence[Tensor], mode: int) -> Tensor:
    """The tensor contracted with every component of the other dimensions, `[size, rank]`."""
    letters = "abcde"[: tensor.ndim]
    others = [i for i in range(tensor.ndim) if i != mode]
    terms = ",".join([letters, *(f"{letters[i]}z" for i in others)])
    return torch.einsum(f"{terms}->{letters[mode]}z", tensor, *(modes[i] for i in others))


# small things ---------------------------------------------------------------------------------


def _whitened(scaled: Tensor, moment: Tensor) -> tuple[Tensor, Tensor]:
    """The weight in coordinates in which input channels are uncorrelated, and the way there.

    `inverse` `[into, into]` takes a channel vector to these coordinates' dual: W x = W~ inverse x.
    """
    into = scaled.shape[1]
    taps = moment.shape[0] // into
    channels = moment.reshape(into, taps, into, taps).diagonal(dim1=1, dim2=3).mean(-1)
    values, vectors = torch.linalg.eigh(_symmetric(channels))
    values = values.clamp(min=1e-9 * float(values[-1]) + 1e-300).sqrt()
    root = (vectors * values) @ vectors.T
    return torch.einsum("oi...,ij->oj...", scaled, root), (vectors / values) @ vectors.T


def _balanced(first: Tensor, last: Tensor) -> Factors:
    """Both factors of every rank at the same size, so that they train and quantise alike."""
    sizes = first.flatten(1).norm(dim=1), last.transpose(0, 1).flatten(1).norm(dim=1)
    alive = (sizes[0] > 0) & (sizes[1] > 0)
    ratio = torch.where(alive, (sizes[1] / sizes[0]).sqrt(), torch.ones_like(sizes[0]))
    scale = ratio.nan_to_num(1.0)
    first = first * scale.reshape(-1, *[1] * (first.ndim - 1))
    return first, last / scale.reshape(1, -1, *[1] * (last.ndim - 2))


def _symmetric(matrix: Tensor) -> Tensor:
    return (matrix + matrix.T) / 2


def _identity(weight: Tensor) -> Tensor:
    return torch.eye(weight[0].numel(), dtype=weight.dtype, device=weight.device)
