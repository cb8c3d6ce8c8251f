"""Run a Program on whatever shape comes, in the code that is fastest for it.

A request goes to the smallest bucket that fits; inputs are padded and outputs cut. Where samples
do not know of each other, a batch is taken apart so that all of it costs least: its samples are
put in order of their lengths, and neighbours share a bucket. What no bucket serves better goes to
the file for any shape. Tokens that a mask hides at the end of a sample are not computed, unless
an output has a place for them. A sample that its mask hides whole goes to the file for any shape,
as it came: what comes out for it depends on its length.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from laconic.core.errors import DataError
from laconic.engine.arrays import axis_of, cut, joined, shaped
from laconic.engine.buckets import (
    BRIEF,
    SUFFIX,
    Bucket,
    Buckets,
    Sizes,
    check_file,
    check_limits,
    elements,
    make,
    opened,
    read,
    said,
    threads_of,
    timed,
    write,
)
from laconic.engine.files import NAME
from laconic.runtimes.base import Array, Model, Runner
from laconic.solvers.dynamic.padding import BATCH

_PLANS = 4096  # plans that are remembered
Need = tuple[int, ...]


@dataclass(frozen=True)
class Part:
    """Samples `first` to `last` of a sorted request, run together; no bucket: in any shape."""

    first: int
    last: int
    need: Need
    bucket: Bucket | None


@dataclass(frozen=True)
class Missed:
    """A shape that came and has no bucket of its own.

    Attributes:
        sizes: the shape.
        calls: how often it came.
        served: the bucket it was padded to, or "any shape".
        ms: what a call takes as it is served.
        expected_ms: what it would take in a bucket of its own, as near as the measured ones tell.
        saved_ms: what all calls so far would have saved.
        pays_after: calls until compiling is paid for.
    """

    sizes: Sizes
    calls: int
    served: str
    ms: float
    expected_ms: float
    saved_ms: float
    pays_after: int

    def __str__(self) -> str:
        return (
            f"would compile {said(self.sizes)}: {self.calls} calls took {self.ms:.3g} ms each "
            f"({self.served}), about {self.expected_ms:.3g} ms expected; "
            f"pays after {self.pays_after:,} calls"
        )


class Dispatcher(Runner):
    """A `.buckets` file, ready to run; files are opened when they are first needed."""

    def __init__(self, held: Buckets, threads: int | None = None) -> None:
        """What `read` gave, and threads of the runtime: None means all cores.

        Packages that are compiled ahead of time keep the thread count they were made for.
        """
        self.threads = held.threads if held.source else threads_of(threads)
        self.held = held = replace(held, threads=self.threads)
        self.inputs = tuple(held.inputs)
        self.conditions = {
            "runtime": held.runtime,
            "precision": held.precision,
            "threads": self.threads,
            "buckets": len(held.buckets),
        }
        self._model = Model(self, held.signature)
        self._runners: dict[str, Runner] = {}
        self._checked: set[Path] = set()
        self._seen: Counter[tuple[int, Need, Bucket | None]] = Counter()
        self._prepare()

    def _prepare(self) -> None:
        held = self.held
        self._lengths = tuple(name for name in held.dimensions if name != BATCH)
        self._free = held.open_cost()
        self._apart = BATCH in held.masks and all(BATCH in dims.values() for dims in held.outputs)
        self._batches = sorted({bucket.sizes.get(BATCH, 1) for bucket in held.buckets})
        self._plans: dict[tuple[tuple[Need, ...], int], list[Part]] = {}
        self._fits: dict[tuple[int, Need], Bucket | None] = {}
        self._known: dict[tuple[Any, ...], dict[str, int]] = {}
        kept = {name for dims in held.outputs for name in dims.values()}
        self._trims = [
            (place, name, mask)
            for place, name in enumerate(self._lengths)
            if (mask := held.masks.get(name)) and name not in kept
            if held.inputs[mask]["shape"] == [BATCH, name]
        ]

    # running ------------------------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the model is called: its arguments, its outputs, as tensors on the CPU."""
        return self._model(*args, **kwargs)

    def run(self, inputs: Sequence[Array]) -> list[Array]:
        """Outputs for one batch of any shape.

        Raises:
            DataError: inputs that the Program cannot take, by name.
            ExportError: a file is missing or altered, or the runtime refuses.
        """
        sizes = self._sizes(inputs)
        needs = self._needs(inputs, sizes)
        if needs is None:
            every = tuple(sizes[name] for name in self._lengths)
            return self._run(inputs, None, Part(0, sizes.get(BATCH, 1), every, None), sizes)
        order = sorted(range(len(needs)), key=needs.__getitem__, reverse=True)
        plan = self._plan(tuple(needs[place] for place in order), sizes.get(BATCH, 1))
        if len(plan) == 1:
            return self._run(inputs, None, plan[0], sizes)
        rows = [np.array(order[part.first : part.last]) for part in plan]
        found = [self._run(inputs, row, part, sizes) for row, part in zip(rows, plan, strict=True)]
        return [
            joined([each[number] for each in found], rows, axis_of(dims))
            for number, dims in enumerate(self.held.outputs)
        ]

    def _sizes(self, inputs: Sequence[Array]) -> dict[str, int]:
        """Size of every free dimension; refuses what does not fit."""
        key = tuple((array.shape, array.dtype) for array in inputs)
        if key not in self._known:
            if len(self._known) >= _PLANS:
                self._known.clear()
            self._known[key] = self._measured(inputs)
        return self._known[key]

    def _measured(self, inputs: Sequence[Array]) -> dict[str, int]:
        if len(inputs) != len(self.inputs):
            raise DataError(f"found {len(inputs)} inputs, expected {len(self.inputs)}: "
                            f"{', '.join(self.inputs)}", where="inputs")  # fmt: skip
        sizes: dict[str, int] = {}
        for (name, declared), array in zip(self.held.inputs.items(), inputs, strict=True):
            wanted = declared["shape"]
            fits = array.ndim == len(wanted) and all(
                size == (sizes.setdefault(want, size) if isinstance(want, str) else want)
                for want, size in zip(wanted, array.shape, strict=True)
            )
            if not fits or 0 in array.shape:
                known = [f"{want}={sizes[want]}" if want in sizes else want for want in wanted]
                raise DataError(
                    f"has shape {list(array.shape)}, expected {known}", where=f"input {name}"
                )
            if array.dtype != np.dtype(declared["dtype"]):
                raise DataError(
                    f"is {array.dtype}, expected {declared['dtype']}", where=f"input {name}"
                )
        check_limits(self.held.limits, sizes)
        return sizes

    def _needs(self, inputs: Sequence[Array], sizes: Sizes) -> tuple[Need, ...] | None:
        """What each sample needs of the lengths; one entry for all where they stay together.

        None where a sample is hidden whole.
        """
        given = tuple(sizes[name] for name in self._lengths)
        if not self._apart:
            return (given,)
        masks = [inputs[self.inputs.index(mask)] != 0 for *_, mask in self._trims]
        if all(real.all() for real in masks):
            return (given,) * sizes[BATCH]
        needs = np.tile(np.array(given, int), (sizes[BATCH], 1))
        for (place, name, _), real in zip(self._trims, masks, strict=True):
            if not real.any(1).all():
                return None
            needs[:, place] = sizes[name] - real[:, ::-1].argmax(1)
        return tuple(map(tuple, needs.tolist()))

    def _run(
        self, inputs: Sequence[Array], rows: Array | None, part: Part, sizes: Sizes
    ) -> list[Array]:
        """One part of a request, padded, run, and cut."""
        count = part.last - part.first if self._apart else sizes.get(BATCH, 1)
        wanted = dict(zip(self._lengths, part.need, strict=True)) | {BATCH: count}
        real = {**sizes, BATCH: count}
        self._seen[count, part.need, part.bucket] += 1
        if part.bucket is not None:
            wanted |= part.bucket.sizes
        feed = [
            shaped(array, declared["shape"], rows, wanted)
            for array, declared in zip(inputs, self.held.inputs.values(), strict=True)
        ]
        found = self._runner(part.bucket).run(feed)
        pairs = zip(found, self.held.outputs, strict=True)
        return [cut(array, dims, real) for array, dims in pairs]

    def _runner(self, bucket: Bucket | None) -> Runner:
        key = bucket.name if bucket else ""
        if key not in self._runners:
            file = bucket.file if bucket else self.held.any_code
            check_file(self.held, file, self._checked)
            sizes = bucket.sizes if bucket else None
            self._runners[key] = opened(self.held, file, sizes, self.threads)
        return self._runners[key]

    # choosing -----------------------------------------------------------------------------

    def _plan(self, needs: tuple[Need, ...], batch: int) -> list[Part]:
        """How a request, its samples in order, is taken apart."""
        key = needs, batch
        if key not in self._plans:
            if len(self._plans) >= _PLANS:
                self._plans.clear()
            self._plans[key] = self._cheapest(needs) if self._apart else self._whole(needs, batch)
        return self._plans[key]

    def _whole(self, needs: tuple[Need, ...], batch: int) -> list[Part]:
        """Samples that cannot be taken apart: the cheaper of a bucket and any shape."""
        bucket = self._fit(batch, needs[0])
        if bucket is not None and bucket.ms > self._open(batch, needs[0]):
            bucket = None
        return [Part(0, 1, needs[0], bucket)]

    def _cheapest(self, needs: tuple[Need, ...]) -> list[Part]:
        """The parts that cost least together: what follows a part does not depend on it.

        In any shape run the samples that no bucket takes, or all as they came: each further shape
        is one that the runtime would have to prepare for.
        """
        count = len(needs)
        fits = [any(self._fit(batch, need) for batch in self._batches) for need in needs]
        over = max((place + 1 for place, fit in enumerate(fits) if not fit), default=0)
        best: list[float] = [0.0] * (count + 1)
        chosen: dict[int, Part] = {}
        for first in reversed(range(over, count)):
            best[first] = float("inf")
            for batch in self._batches:
                last = min(first + batch, count)
                need = _longest(needs[first:last])
                bucket = self._fit(batch, need)
                if bucket is not None and bucket.ms + best[last] < best[first]:
                    best[first] = bucket.ms + best[last]
                    chosen[first] = Part(first, last, need, bucket)
        parts: list[Part] = []
        if over:
            need = _longest(needs[:over])
            parts, best[0] = [Part(0, over, need, None)], self._open(over, need) + best[over]
        if self._open(count, _longest(needs)) < best[0]:
            return [Part(0, count, _longest(needs), None)]
        while not parts or parts[-1].last < count:
            parts.append(chosen[parts[-1].last if parts else 0])
        return parts

    def _open(self, batch: int, need: Need) -> float:
        """Milliseconds in any shape."""
        return self._free(batch * math.prod(need))

    def _fit(self, batch: int, need: Need) -> Bucket | None:
        """The cheapest bucket of a batch that `need` fits."""
        key = batch, need
        if key not in self._fits:
            wanted = dict(zip(self._lengths, need, strict=True))
            able = [
                bucket
                for bucket in self.held.buckets
                if bucket.sizes.get(BATCH, 1) == batch
                and all(
                    bucket.sizes[name] >= size if name in self.held.masks
                    else bucket.sizes[name] == size
                    for name, size in wanted.items()
                )
            ]  # fmt: skip
            self._fits[key] = min(able, key=lambda bucket: bucket.ms, default=None)
        return self._fits[key]

    # what would pay ------------------------------------------------------------------------

    def missed(self) -> list[Missed]:
        """Shapes that came and would be faster in a bucket of their own, most to save first."""
        known = {tuple(sorted(bucket.sizes.items())) for bucket in self.held.buckets}
        fixed = self.held.fixed_cost()
        seconds = [bucket.seconds for bucket in self.held.buckets] or [1.0]
        found: list[Missed] = []
        for (batch, need, bucket), calls in self._seen.items():
            sizes = self._named(batch, need)
            ms = bucket.ms if bucket else self._open(batch, need)
            saved = ms - fixed(elements(sizes))
            if saved > 0 and tuple(sorted(sizes.items())) not in known:
                served = bucket.name if bucket else "any shape"
                pays = int(1e3 * sum(seconds) / len(seconds) / saved) + 1
                found.append(Missed(sizes, calls, served, ms, ms - saved, calls * saved, pays))
        return sorted(found, key=lambda missed: missed.saved_ms, reverse=True)

    def _named(self, batch: int, need: Need) -> dict[str, int]:
        sizes = dict(zip(self._lengths, need, strict=True)) | {BATCH: batch}
        return {name: sizes[name] for name in self.held.dimensions}

    def compile(self, sizes: Sizes) -> Bucket:
        """Compile for one more shape, measure it, and write it into the `.buckets` file.

        Raises:
            DataError: names or sizes that the Program does not take.
            ExportError: the runtime refuses, or a file cannot be written.
        """
        check_sizes(self.held, sizes)
        check_file(self.held, self.held.source or self.held.any_shape)
        held, runner = make(self.held, {name: sizes[name] for name in self.held.dimensions})
        *others, bucket = held.buckets
        bucket = replace(bucket, ms=timed(held, [(bucket.sizes, runner)], BRIEF)[0])
        self.held = replace(held, buckets=(*others, bucket))
        write(self.held)
        self._runners[bucket.name] = runner
        self.conditions = {**self.conditions, "buckets": len(self.held.buckets)}
        self._prepare()
        return bucket


def load(path: str | Path, threads: int | None = None) -> Dispatcher:
    """Open a `.buckets` file, or the folder that `specialize` wrote.

    Raises:
        ExportError: no such file, or it is damaged.
    """
    path = Path(path)
    return Dispatcher(read(path / f"{NAME}{SUFFIX}" if path.is_dir() else path), threads)


def check_sizes(held: Buckets, sizes: Sizes) -> None:
    """Refuse sizes that are not those of the free dimensions.

    Raises:
        DataError: see above.
    """
    if set(sizes) != set(held.dimensions) or any(size < 1 for size in sizes.values()):
        raise DataError(
            f"found {said(sizes) or 'none'}, expected a size from 1 on for each of "
            f"{', '.join(held.dimensions)}",
            where="sizes",
        )
    check_limits(held.limits, sizes)


def _longest(needs: Sequence[Need]) -> Need:
    return tuple(map(max, zip(*needs, strict=True)))
