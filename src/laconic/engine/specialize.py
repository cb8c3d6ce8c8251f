"""Compile a Program for the shapes it will see: choose them, write the files, check and time them.

A sample of real shapes tells how often each comes; a few of them, compiled and timed against the
file for any shape, tell what a call costs in both. From that the shapes to compile for are chosen
so that the whole sample costs least (`solvers.dynamic.buckets`), with padding only where it changes
nothing (`solvers.dynamic.padding`). Every file is compared with the Program before it is kept.
"""

import math
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, TypeAlias

from laconic import runtimes, storage
from laconic.core.errors import DataError, ExportError, RecipeError, first_line
from laconic.core.progress import SILENT, Progress
from laconic.engine.buckets import (
    BRIEF,
    SUFFIX,
    Buckets,
    Sizes,
    check_limits,
    elements,
    lean,
    make,
    opened,
    said,
    threads_of,
    timed,
    with_code,
    with_file,
    write,
)
from laconic.engine.deploy import write_inductor
from laconic.engine.dispatch import Dispatcher, load
from laconic.engine.files import NAME, as_precision, pick_precision, staged
from laconic.measuring import latency
from laconic.measuring.parity import parity
from laconic.program.freezing import freeze
from laconic.program.members import alone
from laconic.program.program import Program
from laconic.program.signature import rebuild
from laconic.program.specialize import check_names, dimensions, resized
from laconic.runtimes.base import Precision, Runner
from laconic.solvers.dynamic.buckets import choose
from laconic.solvers.dynamic.limits import find_limits
from laconic.solvers.dynamic.padding import BATCH, Padding, find_padding

Shape: TypeAlias = int | Sequence[int] | Mapping[str, int]
_PROBES = 4  # shapes that are timed before any is chosen
_BATCHES = 4  # batch sizes compiled for, at most, where none are named
_INDIFFERENT = "onnxruntime"
_REFUSALS = (RuntimeError, ValueError, TypeError, IndexError)


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What `specialize` is asked for.

    Attributes:
        runtime: openvino, inductor or onnxruntime.
        precision: None: what the Program is quantised for, else fp32.
        count: how many shapes at most; with several batch sizes, how many for each.
        batches: batch sizes to compile for; None: those of the sample.
        requests: calls until the process ends; compiling has to pay within them. None: free.
        ahead: keep OpenVINO's compiled code, a small file a shape.
        threads: of the runtime; None: all cores.
        plan: how long each shape is timed.
    """

    runtime: str = "openvino"
    precision: str | None = None
    count: int = 8
    batches: Sequence[int] | None = None
    requests: int | None = None
    ahead: bool = True
    threads: int | None = None
    plan: latency.Plan = BRIEF


def specialize(
    program: Program,
    shapes: Iterable[Shape],
    out: Path,
    wish: Wish | None = None,
    progress: Progress = SILENT,
) -> Dispatcher:
    """Write `out/model.buckets` and the files it names; see `laconic.specialize`.

    Raises:
        DataError: no dynamic dimension, or shapes that the Program cannot take.
        ExportError: the runtime cannot express the Program, or what it gives differs from it.
        RecipeError: an unknown runtime or precision, or a count below 1.
        StorageError: the files cannot be written; earlier ones are untouched.
    """
    wish = wish or Wish()
    if wish.count < 1:
        raise RecipeError(f"count is {wish.count}, expected a number from 1 on", where="specialize")
    program = alone(program)
    sample = counted(program, shapes)
    if wish.batches is not None and (BATCH not in dimensions(program) or min(wish.batches) < 1):
        raise DataError(f"found {list(wish.batches)}, expected sizes of a batch that is dynamic",
                        where="batches")  # fmt: skip
    engine = runtimes.get(wish.runtime)
    kind = pick_precision(program, engine, wish.precision)
    engine.demand(program, as_precision(kind))
    out.mkdir(parents=True, exist_ok=True)
    with staged(out) as stage:
        build = _Build(program, sample, wish, kind, progress)
        write(build.made(stage / f"{NAME}{SUFFIX}"))
    return load(out / f"{NAME}{SUFFIX}", wish.threads)


def counted(program: Program, shapes: Iterable[Shape]) -> Counter[tuple[int, ...]]:
    """How often each shape comes, as sizes of the dynamic dimensions in order.

    A number is the size of the only dimension beside the batch (of the batch, if there is none);
    a sequence of numbers all dimensions, or all but the batch, which is 1 where it is not said.

    Raises:
        DataError: no shape, no dynamic dimension, unknown names, sizes below 1.
    """
    names = list(dimensions(program))
    lengths = [name for name in names if name != BATCH] or names
    found: Counter[tuple[int, ...]] = Counter()
    for shape in shapes:
        if isinstance(shape, Mapping):
            sizes = dict(shape)
        else:
            numbers = list(shape) if isinstance(shape, Sequence) else [shape]
            order = names if len(numbers) == len(names) != len(lengths) else lengths
            if len(numbers) != len(order) and names:
                raise DataError(
                    f"found {numbers}, expected sizes of {', '.join(names)}", where="shapes"
                )
            sizes = dict(zip(order, numbers, strict=bool(names)))
        if BATCH in names:
            sizes = {BATCH: 1} | sizes
        check_names(program, sizes)
        missing = next((name for name in names if name not in sizes), None)
        if missing:
            raise DataError(f"has no size for {missing!r}", where=f"shape {said(sizes)}")
        found[tuple(sizes[name] for name in names)] += 1
    if not found:
        check_names(program, {})
        raise DataError("no shapes", where="shapes", hint="give a sample of those that will come")
    return found


class _Build:
    """One folder of files in the making."""

    def __init__(
        self, program: Program, sample: Counter[tuple[int, ...]], wish: Wish,
        kind: Precision, progress: Progress,
    ) -> None:  # fmt: skip
        self.program, self.sample, self.wish = program, sample, wish
        self.kind: Precision = kind
        self.progress = progress
        self.names = tuple(dimensions(program))
        self.ahead = wish.runtime == "inductor"
        self.seconds = 0.0  # what one more shape costs: compiling, or opening the code that is kept
        with progress.task("what may be padded"):
            self.padding = find_padding(program)
        self.notes = [f"{name} keeps exact sizes: {why}" for name, why in
                      self.padding.refused.items()]  # fmt: skip

    def made(self, path: Path) -> Buckets:
        """Every file but `path` itself, and what that has to say."""
        limits = self._limits()
        held = replace(self._any_shape(path), limits=limits)
        held = replace(held, costs=self._costs(held))
        chosen = self._choose(held)
        runners: list[tuple[Sizes, Runner]] = []
        with self.progress.task("compiling", len(chosen)) as bar:
            for sizes in chosen:
                held, runner = make(held, sizes, self.program)
                self._compare(runner, sizes)
                runners.append((sizes, runner))
                bar.advance(1, said(sizes))
        if runners:
            times = timed(held, runners, self.wish.plan)
            pairs = zip(held.buckets, times, strict=True)
            held = replace(held, buckets=tuple(replace(b, ms=ms) for b, ms in pairs))
        if self.ahead and runners:
            held = replace(held, costs=self._costs_ahead(held))
        return replace(held, notes=tuple(self.notes))

    def _any_shape(self, path: Path) -> Buckets:
        """The file for any shape."""
        program, engine = self.program, runtimes.get(self.wish.runtime)
        threads = threads_of(self.wish.threads)
        target = path.with_name(f"{NAME}{engine.suffix}")
        inputs: dict[str, dict[str, Any]] = {}
        for node, tensor in zip(program.placeholders, program.example, strict=True):
            named = program.dynamic.get(node.name, {})
            shape = [named.get(dim, size) for dim, size in enumerate(tensor.shape)]
            inputs[node.name] = {"shape": shape, "dtype": str(tensor.numpy().dtype)}
        held = Buckets(
            path=path, runtime=engine.name, precision=self.kind, threads=threads, inputs=inputs,
            masks=self.padding.masks, refused=self.padding.refused, outputs=_outputs(self.padding,
            program), signature=program.signature, any_shape=target.name, ahead=self.wish.ahead,
        )  # fmt: skip
        with self.progress.task("writing the file for any shape"):
            start, whole = time.perf_counter(), lean(program)
            if self.ahead:
                write_inductor(whole, target, self.kind, threads, None)
                storage.save(freeze(program), path.with_name(f"{NAME}.laconic"))
                held = replace(held, source=f"{NAME}.laconic")
                held = with_file(held, path.with_name(held.source))
            else:
                engine.write(whole, target, self.kind)
            self.seconds = time.perf_counter() - start
        held, name = with_code(with_file(held, target), None)
        self._compare(opened(held, name, None, threads), self._sizes(min(self.sample)))
        return held

    def _sizes(self, shape: Sequence[int]) -> dict[str, int]:
        return dict(zip(self.names, shape, strict=True))

    def _limits(self) -> dict[str, int]:
        """The largest sizes there are; refuses a sample beyond them."""
        lengths = [name for name in self.names if name != BATCH]
        with self.progress.task("how large shapes may be"):
            limits = find_limits(self.program, dict.fromkeys(lengths, 1))
        for shape in self.sample:
            check_limits(limits, self._sizes(shape))
        return limits

    def _compare(self, runner: Runner, sizes: Sizes) -> None:
        """A file has to give what the Program gives."""
        program, leaves = self.program, resized(self.program, sizes)
        arguments = {
            name: rebuild(structure, leaves, program.signature.classes)
            for name, structure in program.signature.arguments.items()
        }
        try:
            report = parity(program, runner.run, [arguments], precision=self.kind)
        except _REFUSALS as error:
            raise DataError(
                f"the program itself fails on {said(sizes)}: {first_line(error)}", where="shapes"
            ) from error
        if not report.ok:
            raise ExportError(
                "; ".join(report.failures), where=f"{self.wish.runtime} {said(sizes)}"
            )

    # choosing -----------------------------------------------------------------------------

    def _costs(self, held: Buckets) -> tuple[tuple[float, float, float], ...]:
        """A few shapes of the sample, from the smallest to the largest, timed in both kinds."""
        free = opened(held, held.any_code, None, held.threads)
        by_size = {elements(self._sizes(shape)): shape for shape in sorted(self.sample)}
        order = sorted(by_size)
        places = {round(k * (len(order) - 1) / (_PROBES - 1)) for k in range(_PROBES)}
        calls: list[tuple[Sizes, Runner]] = []
        seconds: list[float] = []
        with self.progress.task("timing shapes", len(places)) as bar:
            for place in sorted(places):
                sizes = self._sizes(by_size[order[place]])
                calls.append((sizes, free))
                if not self._alike:
                    with_it, runner = make(held, sizes)
                    calls.append((sizes, runner))
                    seconds.append(with_it.buckets[-1].seconds)
                    for name in with_it.hashes.keys() - held.hashes.keys():
                        held.path.with_name(name).unlink()
                bar.advance(1, said(sizes))
        self.seconds = median(seconds or [self.seconds])
        times = timed(held, calls, self.wish.plan)
        step = 1 if self._alike else 2
        return tuple(
            (float(elements(calls[k][0])), times[k + step - 1], times[k])
            for k in range(0, len(calls), step)
        )

    @property
    def _alike(self) -> bool:
        """Whether code for a shape is not to be had just for timing it, or does not differ."""
        return self.ahead or self.wish.runtime == _INDIFFERENT

    def _costs_ahead(self, held: Buckets) -> tuple[tuple[float, float, float], ...]:
        """Times of the compiled shapes themselves, where none were to be had before."""
        free = held.open_cost()
        points = {float(elements(bucket.sizes)): bucket.ms for bucket in held.buckets}
        return tuple((size, points[size], free(size)) for size in sorted(points))

    def _choose(self, held: Buckets) -> list[dict[str, int]]:
        """The shapes to compile for."""
        if self.wish.runtime == _INDIFFERENT:
            self.notes.append("ONNX Runtime takes any shape at no cost: nothing is compiled")
            return []
        lengths, batches = self._lengths(held), self._batches()
        chosen = [
            dict(zip(self._order, length, strict=True)) | ({BATCH: batch} if batch else {})
            for length in lengths
            for batch in batches
        ]
        if not chosen:
            self.notes.append("no shape is faster compiled for by itself: all run in one file")
        return [{name: sizes[name] for name in self.names} for sizes in chosen]

    @property
    def _order(self) -> list[str]:
        """The dimensions whose sizes are chosen; batch sizes stand beside, if there are others."""
        return [name for name in self.names if name != BATCH] or list(self.names)

    def _batches(self) -> list[int]:
        """Batch sizes to compile for; 0 where they are no second dimension."""
        if BATCH not in self.names or self._order == [BATCH]:
            return [0]
        if self.wish.batches is not None:
            return sorted(set(self.wish.batches))
        place = self.names.index(BATCH)
        found = Counter(shape[place] for shape in self.sample.elements())
        return sorted(size for size, _ in found.most_common(_BATCHES))

    def _lengths(self, held: Buckets) -> list[tuple[int, ...]]:
        places = [self.names.index(name) for name in self._order]
        often: Counter[tuple[int, ...]] = Counter()
        for shape, calls in self.sample.items():
            often[tuple(shape[place] for place in places)] += calls
        if len(often) <= self.wish.count and self.wish.requests is None:
            return sorted(often)
        batch = max(1, *self._batches())
        if len(self._order) == 1 and self._order[0] in self.padding.masks:
            return self._padded(held, {key[0]: n for key, n in often.items()}, batch)
        if any(name in self.padding.masks for name in self._order):
            raise DataError(
                f"{len(often)} different sizes of {', '.join(self._order)} to choose "
                f"{self.wish.count} from, and some may be padded",
                where="shapes",
                hint="give the shapes to compile for, no more than the count",
            )
        return self._exact(held, often, batch)

    def _padded(self, held: Buckets, often: Mapping[int, int], batch: int) -> list[tuple[int, ...]]:
        fixed, free = held.fixed_cost(), held.open_cost()
        found = choose(
            often,
            lambda size: fixed(size * batch),
            count=self.wish.count,
            free=None if self.ahead else lambda size: free(size * batch),
            each=self._each(sum(often.values())),
        )
        return [(size,) for size in found.sizes]

    def _exact(
        self, held: Buckets, often: Mapping[tuple[int, ...], int], batch: int
    ) -> list[tuple[int, ...]]:
        """Sizes that cannot be padded gain each for itself: the `count` that gain most."""
        fixed, free = held.fixed_cost(), held.open_cost()
        each = self._each(sum(often.values()))

        def gain(key: tuple[int, ...]) -> float:
            size = batch * math.prod(key)
            return often[key] * (free(size) - (0.0 if self.ahead else fixed(size))) - each

        paying = [key for key in often if gain(key) > 0]
        return sorted(sorted(paying, key=gain, reverse=True)[: self.wish.count])

    def _each(self, calls: int) -> float:
        """What compiling one more costs, in milliseconds of the whole sample."""
        if self.wish.requests is None:
            return 0.0
        return 1e3 * self.seconds * len(self._batches()) * calls / self.wish.requests


def _outputs(padding: Padding, program: Program) -> tuple[Mapping[int, str], ...]:
    flat: Any = program.output_node.args[0]
    return padding.outputs or tuple({} for _ in flat)
