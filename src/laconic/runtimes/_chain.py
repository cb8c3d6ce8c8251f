"""A chain of pieces as files that ship, and what runs them: standard graphs have no early return.

`NAME.RUNTIME.chain` is JSON: the plan, and the file of each piece, which lies beside it and is an
ordinary file of that runtime. Between pieces NumPy picks the rows that go on. A batch of one goes
from piece to piece without a copy. Branches inside one graph are the other way (`_branches.py`): a
batch takes them as a whole.

OpenVINO compiles per shape. Where the batch is known, its pieces are compiled for a few batch
sizes, when one is first needed, and rows are padded to the next of them; where it is not, they
keep a free batch.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from laconic import runtimes
from laconic.core.errors import ExportError
from laconic.core.whole_files import whole_file
from laconic.program.chain import Chain, Plan, Step, execute
from laconic.program.program import Program
from laconic.runtimes.base import Array, Precision, Runner, Runtime, Shapes, quantized

SUFFIX = ".chain"
_FORMAT = "laconic chain 1"
_FIXED = ("openvino",)
"""Runtimes that are faster with shapes that are known."""


def path_of(path: Path, runtime: Runtime) -> Path:
    """Where the chain beside a static file goes: `net.xml` → `net.openvino.chain`."""
    return path.with_name(f"{path.stem}.{runtime.name}{SUFFIX}")


def write(chain: Chain, runtime: Runtime, path: Path, precision: Precision, **options: Any) -> Path:
    """Write every piece beside `path`, then `path` itself.

    Args:
        chain: what to write.
        runtime: which runtime its pieces are for.
        path: ends in `.chain`.
        precision: of the pieces; what has no quantisation nodes in int8 is written as floats.
        options: further arguments of `Runtime.write`.

    Raises:
        ExportError: the runtime cannot express a piece, or a file cannot be written.
    """
    pieces: list[dict[str, Any]] = []
    for number, piece in enumerate(chain.pieces):
        own = _precision(piece, runtime, precision)
        target = path.with_name(f"{path.stem}.{number}{runtime.suffix}")
        made = runtime.write(piece, target, own, **options)
        pieces.append({"file": made.name, "precision": own, "inputs": _declared(piece)})
    about = {
        "format": _FORMAT,
        "runtime": runtime.name,
        "precision": precision,
        "plan": chain.plan,
        "pieces": pieces,
        "inputs": _inputs(chain),
    }
    try:
        with whole_file(path) as unfinished:
            unfinished.write_text(json.dumps(about, indent=1), encoding="utf-8")
    except OSError as error:
        raise ExportError(f"cannot write: {error.strerror}", where=str(path)) from error
    return path


def _precision(piece: Program, runtime: Runtime, asked: Precision) -> Precision:
    if asked != "int8" or quantized(piece):
        return asked
    return "fp32" if runtime.check(piece, "bf16") else "bf16"


def _declared(piece: Program) -> dict[str, Any]:
    """Input → shape, with names for free dimensions, and dtype."""
    found: dict[str, Any] = {}
    for node, tensor in zip(piece.placeholders, piece.example, strict=True):
        names = piece.dynamic.get(node.name, {})
        shape = [names.get(dim, size) for dim, size in enumerate(tensor.shape)]
        found[node.name] = {"shape": shape, "dtype": str(tensor.numpy().dtype)}
    return found


def _inputs(chain: Chain) -> dict[str, Any]:
    """The inputs of the whole, as the pieces that read them declare them."""
    found: dict[str, Any] = {}
    for step in _runs(chain.plan["steps"]):
        assert "run" in step
        declared = _declared(chain.pieces[step["run"]])
        found |= dict(zip(step["takes"], declared.values(), strict=True))
    return {name: found.get(name) for name in chain.plan["inputs"]}


def _runs(steps: Sequence[Step]) -> list[Step]:
    """The steps that run a piece, at any depth."""
    found: list[Step] = []
    for step in steps:
        found += _runs(step["steps"]) if "steps" in step else [step]
    return found


@dataclass(frozen=True)
class Written:
    """What a `.chain` file says.

    Attributes:
        path: the file.
        runtime: name of the runtime that its pieces are for.
        precision: what it was written for.
        plan: how the pieces connect.
        pieces: file name, precision and inputs of each.
        inputs: name → shape, free dimensions by name, and dtype; None if nothing reads it.
    """

    path: Path
    runtime: str
    precision: Precision
    plan: Plan
    pieces: tuple[Mapping[str, Any], ...]
    inputs: Mapping[str, Any]

    def files(self) -> list[Path]:
        """The file of each piece."""
        return [self.path.with_name(piece["file"]) for piece in self.pieces]

    def sizes(self, shapes: Shapes) -> dict[str, int]:
        """The sizes of free dimensions, by name, that input shapes give."""
        return {
            word: int(size)
            for name, shape in shapes.items()
            for word, size in zip((self.inputs.get(name) or {}).get("shape", ()), shape)  # noqa: B905
            if isinstance(word, str)
        }


def read(path: Path) -> Written:
    """Read a `.chain` file.

    Raises:
        ExportError: no such file, or it is not one, or is damaged.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["format"] != _FORMAT:
            raise ValueError(f"its format is {data['format']!r}, expected {_FORMAT!r}")
        made = Written(
            path, data["runtime"], data["precision"], data["plan"],
            tuple(data["pieces"]), data["inputs"],
        )  # fmt: skip
        outside = [p["file"] for p in made.pieces if Path(p["file"]).name != p["file"]]
        runs = [step["run"] for step in _runs(made.plan["steps"]) if "run" in step]
        if outside or not all(0 <= run < len(made.pieces) for run in runs):
            raise ValueError(
                f"it names a file elsewhere: {outside}" if outside else "no such piece"
            )
    except OSError as error:
        raise ExportError(f"cannot be read: {error.strerror}", where=str(path)) from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ExportError(f"no chain of pieces, or damaged: {error}", where=str(path)) from error
    return made


def files(path: Path) -> list[Path]:
    """Every file that has to ship for a chain to work.

    Raises:
        ExportError: as `read`.
    """
    held = read(path)
    engine = runtimes.get(held.runtime)
    return [path, *(each for piece in held.files() for each in engine.files(piece))]


def load(
    path: Path,
    runtime: Runtime,
    threads: int | None = None,
    shapes: Shapes | None = None,
    sizes: Sequence[int] | None = None,
) -> "ChainRunner":
    """Open a chain.

    Args:
        path: the `.chain` file; its pieces lie beside it.
        runtime: the runtime that the pieces are for, or another one that opens their files.
        threads: of the runtime.
        shapes: fixed shapes of the inputs, by name.
        sizes: batch sizes that pieces are compiled for, rows padded to the next one; () leaves the
            batch free. By default 1, 2, 4, ... up to the batch of `shapes`, in runtimes that are
            faster so; free in the others, and where the batch is not known.

    Raises:
        ExportError: a file is missing, damaged, or refused by the runtime.
    """
    held = read(path)
    known = held.sizes(shapes or {})
    if {*held.plan["whole"]} - {*held.plan["inputs"]}:
        sizes = ()  # a value of the whole batch: rows that were made up would count in it
    if sizes is None:
        sizes = powers(known["batch"]) if runtime.name in _FIXED and "batch" in known else ()
    pieces: list[Callable[[list[Array]], list[Array]]] = []
    first: Runner | None = None
    for piece, file in zip(held.pieces, held.files(), strict=True):

        def opened(batch: int | None, piece: Any = piece, file: Path = file) -> Runner:
            bound = known if batch is None else {**known, "batch": batch}
            fixed = None if batch is None else _bound(piece["inputs"], bound)
            return runtime.load(file, piece["precision"], threads, fixed)

        if sizes:
            made = Padded(opened, sizes, [_rows(d) for d in piece["inputs"].values()])
            first = first or made.runner(max(sizes))
            pieces.append(made)
        else:
            runner = opened(None)
            first = first or runner
            pieces.append(runner.run)
    conditions: dict[str, Any] = dict(first.conditions if first else {"runtime": runtime.name})
    conditions |= {"precision": held.precision, "pieces": len(pieces)}
    if sizes:
        conditions["batch sizes"] = list(sizes)
    return ChainRunner(held.plan, pieces, conditions)


def powers(batch: int) -> list[int]:
    """1, 2, 4, ... and the batch itself.

    >>> powers(12)
    [1, 2, 4, 8, 12]
    """
    return [*(2**k for k in range((batch - 1).bit_length())), batch]


def _rows(declared: Mapping[str, Any]) -> bool:
    return bool(declared["shape"]) and declared["shape"][0] == "batch"


def _bound(inputs: Mapping[str, Any], sizes: Mapping[str, int]) -> dict[str, list[int]]:
    """Shapes with free dimensions set, -1 where they stay free."""
    return {
        name: [sizes.get(d, -1) if isinstance(d, str) else d for d in declared["shape"]]
        for name, declared in inputs.items()
    }


class ChainRunner(Runner):
    """A chain, ready to run at any batch."""

    def __init__(
        self,
        plan: Plan,
        pieces: Sequence[Callable[[list[Array]], list[Array]]],
        conditions: Mapping[str, Any],
    ) -> None:
        self.inputs = tuple(plan["inputs"])
        self.conditions = conditions
        self._plan = plan
        self._pieces = pieces

    def run(self, inputs: Sequence[Array]) -> list[Array]:
        return execute(self._plan, inputs, self._pieces)


class Padded:
    """A piece compiled for a few batch sizes: rows are padded to the next, or cut by the largest.

    Args:
        opened: gives the piece for a batch size.
        sizes: the batch sizes there may be, ascending.
        rows: which inputs have rows.
    """

    def __init__(
        self, opened: Callable[[int], Runner], sizes: Sequence[int], rows: Sequence[bool]
    ) -> None:
        self._opened = opened
        self._sizes = sorted(sizes)
        self._rows = rows
        self._held: dict[int, Runner] = {}

    def runner(self, size: int) -> Runner:
        """The piece for `size` rows; compiled when first asked for."""
        if size not in self._held:
            self._held[size] = self._opened(size)
        return self._held[size]

    def __call__(self, arrays: list[Array]) -> list[Array]:
        """Run a batch of any size."""
        count = next((len(a) for a, rows in zip(arrays, self._rows, strict=True) if rows), 1)
        largest = self._sizes[-1]
        if count > largest:
            parts = [self(self._cut(arrays, start, largest)) for start in range(0, count, largest)]
            return [np.concatenate(part) for part in zip(*parts, strict=True)]
        size = next(size for size in self._sizes if size >= count)
        if size == count:
            return self.runner(size).run(arrays)
        pairs = zip(arrays, self._rows, strict=True)
        padded = [_padded(a, size) if rows else a for a, rows in pairs]
        return [found[:count] for found in self.runner(size).run(padded)]

    def _cut(self, arrays: list[Array], start: int, size: int) -> list[Array]:
        pairs = zip(arrays, self._rows, strict=True)
        return [a[start : start + size] if rows else a for a, rows in pairs]


def _padded(array: Array, size: int) -> Array:
    """The rows, and the last one again until there are `size`."""
    made = np.empty((size, *array.shape[1:]), array.dtype)
    made[: len(array)] = array
    made[len(array) :] = array[-1]
    return made
