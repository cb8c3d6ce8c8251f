"""Peak memory of running an artifact, in a fresh process.

The process imports what it needs, runs the function it is told to, and reports the high-water mark
of its resident memory: the interpreter and the runtime's libraries are part of it, as they are
where the artifact is served. The mark after the imports alone is reported beside it.
"""

import argparse
import importlib
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

from laconic.core.errors import DataError
from laconic.core.measurement import Measurement

_STATUS = Path("/proc/self/status")


def peak(
    function: str,
    arguments: dict[str, Any],
    *,
    conditions: dict[str, Any] | None = None,
    timeout: float = 600,
) -> Measurement:
    """Peak resident memory in MiB of `function(**arguments)`.

    Args:
        function: "package.module:name".
        arguments: keyword arguments, plain JSON.
        conditions: what to state with the result.
        timeout: seconds after which it is given up.

    Raises:
        DataError: the function failed or took too long; its last line of output is passed on.
    """
    command = [sys.executable, "-m", __name__, function, json.dumps(arguments)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=timeout, check=True
        )
        found = json.loads(done.stdout.strip().splitlines()[-1])
    except subprocess.TimeoutExpired as error:
        raise DataError(f"not done after {timeout:g} s", where=function) from error
    except (subprocess.CalledProcessError, ValueError, IndexError) as error:
        text = error.stderr if isinstance(error, subprocess.CalledProcessError) else str(error)
        last = (text.strip().splitlines() or ["no output"])[-1]
        raise DataError(f"the measured process failed: {last}", where=function) from error
    return Measurement(
        name="peak memory",
        value=found["peak"],
        unit="MiB",
        conditions={"imports_only": found["start"], **(conditions or {})},
    )


def resident_peak() -> float:
    """The high-water mark of this process's resident memory, in MiB."""
    try:
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):  # ru_maxrss would keep the parent's mark across exec
                return int(line.split()[1]) / 1024
    except OSError:
        pass
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / (2**20 if sys.platform == "darwin" else 1024)


def _main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("function")
    parser.add_argument("arguments", type=json.loads)
    given = parser.parse_args()
    module, _, name = given.function.partition(":")
    function = vars(importlib.import_module(module))[name]
    start = resident_peak()
    function(**given.arguments)
    sys.stdout.write(json.dumps({"start": start, "peak": resident_peak()}) + "\n")


if __name__ == "__main__":
    _main()
