"""Files for the shapes a Program will see, and the JSON that says for which shapes each is.

`NAME.buckets` names one file for any shape, and the shapes there is faster code for. OpenVINO
compiles for a shape in a fraction of a second when a file is opened, from the file for any shape:
its buckets share that file. With `ahead` what it has compiled is kept, a file for each shape,
without the weights, which all of them take from that one file: a shape of MiniLM in bf16 then
opens in 0.1 s of CPU time instead of 0.5, for half a megabyte, on such a CPU, in such a version and
with as many threads; elsewhere it is compiled as ever. A bucket is opened when it is first needed:
that spreads the cost, and spares it only for shapes that never come. Inductor always compiles
ahead of time, to a package for each shape. What lies beside is checked by its hash, once, before
it is opened.
"""

import hashlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from laconic import runtimes, storage
from laconic.core.errors import DataError, ExportError
from laconic.core.whole_files import whole_file
from laconic.engine.deploy import write_inductor
from laconic.measuring import latency
from laconic.program.program import Program
from laconic.program.signature import Signature
from laconic.program.specialize import specialize
from laconic.runtimes.base import Array, Precision, Runner, cores
from laconic.runtimes.openvino import COMPILED, OpenVino
from laconic.solvers.dynamic.buckets import Curve
from laconic.solvers.dynamic.padding import BATCH
from laconic.solvers.layers.constants import drop_identities, fold_constants
from laconic.solvers.layers.folding import fold_batch_norms

SUFFIX = ".buckets"
BRIEF = latency.Plan(rounds=3, seconds=0.05, rest=0.02, repeats=6)
_FORMAT = "laconic buckets 1"
_PACKAGES = "inductor"  # writes a file for each shape; the others compile when they open one
_LARGE = 1 << 21  # bytes of compiled code that need no reason; beyond, an eighth of the weights
Sizes = Mapping[str, int]


@dataclass(frozen=True, eq=False)
class Bucket:
    """Code for one shape.

    Attributes:
        sizes: dimension → size.
        file: what it is opened from.
        ms: milliseconds of a call, measured when it was made.
        seconds: what making it took: the compiler ahead of time, else opening the file.
    """

    sizes: Sizes
    file: str
    ms: float
    seconds: float

    @property
    def name(self) -> str:
        """`batch=1 sequence=32`."""
        return said(self.sizes)


@dataclass(frozen=True, kw_only=True)
class Buckets:
    """What a `.buckets` file says.

    Attributes:
        path: the file.
        runtime: what runs its files.
        precision: what they compute in.
        threads: of measurements, and of packages compiled ahead of time.
        inputs: name → {"shape": sizes, and names of free dimensions; "dtype"}.
        masks: dimension that may be padded → the input that hides the padding ("" for the batch).
        refused: dimension that may not → why.
        limits: dimension → the largest size the Program takes, where there is one.
        outputs: for each output, its dimensions that grow with one that may be padded.
        signature: how arguments and outputs nest.
        any_shape: the file for every other shape.
        ahead: whether OpenVINO's compiled code is kept.
        source: the Program that further files are made from; "" where `any_shape` is enough.
        buckets: the shapes there is code for.
        costs: elements of the free dimensions, ms in code for that shape, ms in code for any.
        notes: what could not be done, in words.
        hashes: SHA-256 of every file.
    """

    path: Path
    runtime: str
    precision: Precision
    threads: int
    inputs: Mapping[str, Mapping[str, Any]]
    masks: Mapping[str, str]
    refused: Mapping[str, str]
    outputs: tuple[Mapping[int, str], ...]
    signature: Signature
    any_shape: str
    limits: Mapping[str, int] = field(default_factory=dict[str, int])
    ahead: bool = False
    source: str = ""
    buckets: tuple[Bucket, ...] = ()
    costs: tuple[tuple[float, float, float], ...] = ()
    notes: tuple[str, ...] = ()
    hashes: Mapping[str, str] = field(default_factory=dict[str, str])

    @property
    def dimensions(self) -> tuple[str, ...]:
        """Names of the free dimensions, in order of the inputs."""
        shapes = [declared["shape"] for declared in self.inputs.values()]
        return tuple(dict.fromkeys(size for shape in shapes for size in shape if _free(size)))

    def fixed_cost(self) -> Curve:
        """Milliseconds in code for that shape, over its elements."""
        return Curve(tuple((size, fixed) for size, fixed, _ in self.costs))

    def open_cost(self) -> Curve:
        """Milliseconds in code for any shape, over its elements."""
        return Curve(tuple((size, free) for size, _, free in self.costs))

    def shapes(self, sizes: Sizes) -> dict[str, tuple[int, ...]]:
        """Input → shape."""
        return {
            name: tuple(sizes[size] if _free(size) else size for size in declared["shape"])
            for name, declared in self.inputs.items()
        }

    def example(self, sizes: Sizes) -> list[Array]:
        """Inputs of a shape: ones, which hide nothing in a mask, and noise for floats."""
        draw = np.random.default_rng(0)
        made: list[Array] = []
        for name, shape in self.shapes(sizes).items():
            kind = np.dtype(self.inputs[name]["dtype"])
            noise = kind.kind == "f" and "mask" not in name
            made.append(draw.standard_normal(shape).astype(kind) if noise else np.ones(shape, kind))
        return made

    def declared(self, batch: int) -> dict[str, Array]:
        """Inputs of a batch, the other dimensions as in the last bucket (1 if there is none)."""
        sizes = dict.fromkeys(self.dimensions, 1)
        sizes |= self.buckets[-1].sizes if self.buckets else {}
        sizes |= {BATCH: batch} if BATCH in sizes else {}
        return dict(zip(self.inputs, self.example(sizes), strict=True))

    def files(self) -> list[Path]:
        """Every file that has to ship."""
        return [self.path, *(self.path.with_name(name) for name in self.hashes)]

    @property
    def any_code(self) -> str:
        """What the file for any shape is opened from: its compiled code, where that is kept."""
        name = Path(self.any_shape).with_suffix(COMPILED).name
        return name if name in self.hashes else self.any_shape


def _free(size: Any) -> bool:
    return isinstance(size, str)


def said(sizes: Sizes) -> str:
    """`batch=1 sequence=32`."""
    return " ".join(f"{name}={size}" for name, size in sizes.items())


def elements(sizes: Sizes) -> int:
    """How many elements the free dimensions span: what costs are told over."""
    return math.prod(sizes.values())


def check_limits(limits: Sizes, sizes: Sizes) -> None:
    """Refuse sizes that the Program does not take.

    Raises:
        DataError: names the first one.
    """
    for name, limit in limits.items():
        if sizes[name] > limit:
            raise DataError(
                f"{name} is {sizes[name]}, the program takes {limit} at most",
                where=f"shape {said(sizes)}",
                hint="cut the input",
            )


# files ----------------------------------------------------------------------------------------


def write(held: Buckets) -> Path:
    """Write the `.buckets` file itself, with the hashes of the files beside it.

    Raises:
        ExportError: it cannot be written.
    """
    about = {
        "format": _FORMAT,
        **{key: value for key, value in vars(held).items() if key not in ("path", "signature")},
        "signature": held.signature.to_json(),
        "buckets": [asdict(bucket) for bucket in held.buckets],
    }
    try:
        with whole_file(held.path) as unfinished:
            unfinished.write_text(json.dumps(about, indent=1), encoding="utf-8")
    except OSError as error:
        raise ExportError(f"cannot write: {error.strerror}", where=str(held.path)) from error
    return held.path


def read(path: Path) -> Buckets:
    """Read a `.buckets` file.

    Raises:
        ExportError: no such file, or it is not one, or is damaged.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data.pop("format") != _FORMAT:
            raise ValueError(f"its format is not {_FORMAT!r}")
        data["signature"] = Signature.from_json(data["signature"])
        data["outputs"] = tuple({int(d): n for d, n in each.items()} for each in data["outputs"])
        data["buckets"] = tuple(Bucket(**bucket) for bucket in data["buckets"])
        data["notes"] = tuple(data["notes"])
        data["costs"] = tuple((float(a), float(b), float(c)) for a, b, c in data["costs"])
        made = Buckets(path=path, **data)
        named = {made.any_shape, *(b.file for b in made.buckets), *made.hashes}
        outside = [name for name in named if Path(name).name != name]
        if outside:
            raise ValueError(f"it names a file elsewhere: {outside[0]}")
        unknown = [b.name for b in made.buckets if set(b.sizes) != set(made.dimensions)]
        if unknown or not made.costs:
            raise ValueError(f"{unknown or 'costs'} do not fit its inputs")
    except OSError as error:
        raise ExportError(f"cannot be read: {error.strerror}", where=str(path)) from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ExportError(f"no file of buckets, or damaged: {error}", where=str(path)) from error
    return made


def hash_of(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_file(held: Buckets, name: str, checked: set[Path] | None = None) -> None:
    """Compare the hashes of the file `name` and of those it needs; `checked` ones are left out.

    Raises:
        ExportError: a file is missing, or is not the one that was written.
    """
    checked = set() if checked is None else checked
    path, needed = held.path.with_name(name), [held.path.with_name(name)]
    if path.suffix == COMPILED:
        needed.append(held.path.with_name(held.any_shape))
    files = [each for one in needed for each in runtimes.get(held.runtime).files(one)]
    for each in (each for each in files if each not in checked):
        wanted = held.hashes.get(each.name)
        if not each.exists():
            raise ExportError("is missing", where=str(each), hint=f"it belongs to {held.path.name}")
        if wanted != hash_of(each):
            raise ExportError(
                f"is not the file that {held.path.name} was written with",
                where=str(each),
                hint="specialise again",
            )
        checked.add(each)


def with_file(held: Buckets, path: Path) -> Buckets:
    """`held`, knowing the hashes of a file and of what it needs."""
    each = runtimes.get(held.runtime).files(path)
    return replace(held, hashes={**held.hashes, **{file.name: hash_of(file) for file in each}})


# code for a shape -------------------------------------------------------------------------------


def lean(program: Program, sizes: Sizes | None = None) -> Program:
    """The Program with nothing left to compute that does not depend on the input.

    Batch norms are folded and constants computed, for `sizes` if they are given. Layouts of
    weights and activations are left to the runtimes, which choose them when they compile.
    """
    made = specialize(program, sizes) if sizes else program.clone()
    made.propagate()
    fold_batch_norms(made)
    made.propagate()
    drop_identities(made)
    fold_constants(made, parameters=True)
    made.graph.eliminate_dead_code()
    made.drop_unused()
    made.propagate()
    made.recompile()
    return made


def opened(held: Buckets, name: str, sizes: Sizes | None, threads: int | None) -> Runner:
    """A file, for one shape or for any.

    Raises:
        ExportError: a file that is missing or altered, or that the runtime refuses.
    """
    engine, path = runtimes.get(held.runtime), held.path.with_name(name)
    shapes = None if sizes is None else held.shapes(sizes)
    if path.suffix == COMPILED:
        whole = held.path.with_name(held.any_shape)
        return OpenVino().load(whole, held.precision, threads, shapes, path)
    return engine.load(path, held.precision, threads, shapes)


def make(held: Buckets, sizes: Sizes, program: Program | None = None) -> tuple[Buckets, Runner]:
    """Code for one more shape, opened; its `ms` is still to be measured (`timed`).

    Raises:
        ExportError: the runtime cannot compile it.
        DataError: the Program cannot take that shape.
    """
    held, name = with_code(held, sizes)
    start = time.perf_counter()
    if held.runtime == _PACKAGES:
        name = _named(held, sizes, ".pt2")
        whole = program or storage.load(held.path.with_name(held.source))
        fixed = lean(whole, sizes)
        path = write_inductor(fixed, held.path.with_name(name), held.precision, held.threads, None)
        held = with_file(held, path)
    try:
        runner = opened(held, name, sizes, held.threads)
    except ExportError as error:
        raise DataError(f"cannot take {said(sizes)}: {error.message}", where="sizes") from error
    bucket = Bucket(dict(sizes), name, 0.0, time.perf_counter() - start)
    others = [each for each in held.buckets if each.sizes != bucket.sizes]
    return replace(held, buckets=(*others, bucket)), runner


def with_code(held: Buckets, sizes: Sizes | None) -> tuple[Buckets, str]:
    """`held`, with OpenVINO's compiled code for a shape, or for any, and the file to open.

    It is the file for any shape where compiled code is not asked for, not to be had, or large:
    then OpenVINO has computed anew what was in the weights, and each shape would ship that again.
    """
    if not held.ahead or held.runtime != "openvino":
        return held, held.any_shape
    whole = held.path.with_name(held.any_shape)
    target = held.path.with_name(_named(held, sizes or {}, COMPILED))
    shapes = None if sizes is None else held.shapes(sizes)
    try:
        OpenVino().write_compiled(whole, target, held.precision, held.threads, shapes)
    except ExportError:
        return held, whole.name  # what cannot be compiled is refused when it is opened
    weights = max(file.stat().st_size for file in OpenVino().files(whole))
    if target.stat().st_size > max(_LARGE, weights // 8):
        target.unlink()
        return held, whole.name
    return with_file(held, target), target.name


def _named(held: Buckets, sizes: Sizes, suffix: str) -> str:
    own = [held.path.stem, *(f"{dim}{size}" for dim, size in sizes.items())]
    return "-".join(own) + suffix


def timed(
    held: Buckets, calls: Sequence[tuple[Sizes, Runner]], plan: latency.Plan = BRIEF
) -> list[float]:
    """Milliseconds of each runner at its shape, in turns: the least disturbed turn of each."""
    named = {
        str(number): partial(runner.run, held.example(sizes))
        for number, (sizes, runner) in enumerate(calls)
    }
    found = latency.compare(named, plan=plan).latency
    return [found[name].low or found[name].value for name in named]


def threads_of(threads: int | None) -> int:
    """The thread count that None means."""
    return threads or cores()
