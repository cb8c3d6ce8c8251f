"""What every benchmark shares: arguments, rows that are stored as they finish, the final JSON line.

A benchmark is a list of named rows. A row is a function that returns a flat dict; it is stored at
once (merged into `benchmarks/results/<name>.json`, written atomically), so that an interrupted run
resumes: a row already stored *with the same settings* is not computed again unless `--only` names
it or `--fresh` is given.

    bench = Bench("resnet56_main", "what it shows")
    bench.parser.add_argument("--depth", type=int, default=56)
    args = bench.parse()
    base = bench.row("base", lambda: {"acc": measure(...)}, depth=args.depth)
    bench.finish(base_acc=base["acc"])
"""

import argparse
import importlib.metadata
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

RESULTS = Path(__file__).parent / "results"
PACKAGES = (
    "laconic", "torch", "numpy", "onnx", "onnxscript", "onnxruntime", "openvino", "nncf",
    "torch-pruning", "transformers", "constriction",
)  # fmt: skip

Row = dict[str, Any]


class Bench:
    """One benchmark: its arguments, its rows and its stored result.

    `name` names the result file. `parser` may be given further arguments before `parse`.
    `variant` (set after `parse`) keeps results of other models apart: `<name>-<variant>.json`.
    """

    def __init__(self, name: str, description: str = "") -> None:
        self.name = name
        self.variant = ""
        self.parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}",
                                              description=description)  # fmt: skip
        add = self.parser.add_argument
        add("--only", action="append", default=[], metavar="ROW", help="compute this row (again)")
        add("--quick", action="store_true", help="a small form of every row, stored apart")
        add("--fresh", action="store_true", help="forget the stored rows first")
        add("--results", type=Path, default=RESULTS, metavar="DIR", help="where results are kept")
        self.args = argparse.Namespace()
        self._started = time.perf_counter()
        self._asked: list[str] = []

    def parse(self, argv: Sequence[str] | None = None) -> argparse.Namespace:
        """Read the command line (`argv` or `sys.argv[1:]`) into `self.args` and return it."""
        self.args = self.parser.parse_args(argv)
        self._started = time.perf_counter()
        return self.args

    @property
    def path(self) -> Path:
        """The file that holds the result; `--quick` results lie in a folder of their own."""
        folder: Path = self.args.results / "quick" if self.args.quick else self.args.results
        return folder / (
            f"{self.name}-{self.variant}.json" if self.variant else f"{self.name}.json"
        )

    def stored(self) -> dict[str, Any]:
        """The result file as it stands, or an empty result when there is none."""
        if not self.path.exists():
            return {"benchmark": self.name, "rows": {}}
        return json.loads(self.path.read_text())

    def wanted(self, name: str) -> bool:
        """Whether this run may compute row `name` (it may, unless `--only` names others)."""
        return not self.args.only or name in self.args.only

    def forget(self, name: str) -> None:
        """Drop the stored row `name`, so that `row` computes it."""
        result = self.stored()
        if result["rows"].pop(name, None) is not None:
            self._write(result)

    def row(self, name: str, compute: Callable[[], Mapping[str, Any]], **settings: Any) -> Row:
        """Return row `name`: stored with equal `settings` already, or computed and stored now.

        A row that `--only` excludes returns what is stored, or `{}`.
        """
        self._asked.append(name)
        if self.args.fresh and not self.args.only and len(self._asked) == 1:
            self._write({"benchmark": self.name, "rows": {}})
        result = self.stored()
        settings = portable(settings)
        found = result["rows"].get(name)
        named = name in self.args.only
        if not self.wanted(name):
            return dict(found["values"]) if found else {}
        if found and found["settings"] == settings and not named:
            self.say(f"{name}: stored already")
            return dict(found["values"])
        self.say(f"{name}: running")
        start = time.perf_counter()
        values = portable(dict(compute()))
        seconds = round(time.perf_counter() - start, 2)
        result = self.stored()  # another process may have added rows meanwhile
        result["rows"][name] = {"settings": settings, "seconds": seconds, "values": values}
        self._write(result)
        self.say(f"{name}: {json.dumps(values)} ({seconds:.1f} s)")
        return dict(values)

    def finish(self, **summary: Any) -> dict[str, Any]:
        """Merge `summary` into the top level, store the result, print it as the last line.

        Keys whose value is None are left as they are stored (a run with `--only` knows a part).
        `seconds` is the time this run took; `seconds_rows` what the rows took when computed.
        """
        unknown = set(self.args.only) - set(self._asked)
        if unknown:
            self.parser.error(f"no row {sorted(unknown)}; rows are {self._asked}")
        result = self.stored()
        known = {key: value for key, value in portable(summary).items() if value is not None}
        rows = result.pop("rows")
        result |= known
        result["seconds"] = round(time.perf_counter() - self._started, 1)
        result["seconds_rows"] = round(sum(row["seconds"] for row in rows.values()), 1)
        result |= {"machine": machine(), "versions": versions(), "rows": rows}
        self._write(result)
        sys.stderr.flush()
        print(json.dumps(result), flush=True)
        return result

    def say(self, text: str) -> None:
        """Progress for people, on stderr: stdout carries the JSON line only."""
        elapsed = time.perf_counter() - self._started
        print(f"[{self.name} {elapsed:7.1f} s] {text}", file=sys.stderr, flush=True)

    def _write(self, result: Mapping[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=self.path.parent, suffix=".tmp")
        with os.fdopen(handle, "w") as file:
            json.dump(result, file, indent=1)
            file.write("\n")
        Path(temporary).chmod(0o644)
        Path(temporary).replace(self.path)


def portable(value: Any) -> Any:
    """`value` as plain JSON that means the same elsewhere.

    Paths are cut to their last part, scalars of NumPy and torch become numbers, NaN becomes None,
    numbers keep seven significant digits.
    """
    if isinstance(value, Mapping):
        return {str(key): portable(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [portable(item) for item in value]
    if isinstance(value, Path) or (isinstance(value, str) and value.startswith("/")):
        return Path(value).name
    if isinstance(value, str | bool | int) or value is None:
        return value
    number = float(value)
    return float(f"{number:.7g}") if math.isfinite(number) else None


def machine() -> dict[str, Any]:
    """CPU model, cores this process may use, memory in GiB, system."""
    model = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        model = lines[0].split(":", 1)[1].strip() if lines else model
        flags = next((x for x in info.read_text().splitlines() if x.startswith("flags")), "")
        units = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")
        model += f" ({' '.join(unit for unit in units if unit in flags.split())})"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory, 1),
        "system": f"{platform.system()} {platform.machine()}",
    }


def versions() -> dict[str, str]:
    """Python and the packages a result depends on, those that are installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def peak_mb() -> float:
    """Highest resident memory of this process so far, in MiB.

    Read from VmHWM: unlike `getrusage`, it does not count what the parent held before `exec`.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise OSError("/proc/self/status states no VmHWM: peak memory cannot be measured here")


def forget_peak() -> bool:
    """Let `peak_mb` count from now on; False where the system has no such thing."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def run_isolated(module: str, *arguments: str, timeout: float = 600.0) -> Row:
    """Run `python -m module arguments` in a process of its own; its last line is the JSON result.

    For rows whose peak memory or failure must not touch the others.

    Raises:
        RuntimeError: the process failed; the message holds the end of its stderr.
    """
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        capture_output=True, text=True, timeout=timeout, check=False,
        cwd=Path(__file__).parents[1],
    )  # fmt: skip
    if done.returncode != 0 or not done.stdout.strip():
        tail = "\n".join(done.stderr.strip().splitlines()[-8:])
        raise RuntimeError(f"{module} {' '.join(arguments)} ended with {done.returncode}:\n{tail}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def refuse(message: str) -> NoReturn:
    """End a benchmark that cannot run here, in words."""
    print(message, file=sys.stderr)
    raise SystemExit(2)
