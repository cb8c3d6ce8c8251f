"""Any method after any other, over all of the zoo: which ordered pairs keep the identities.

    python -m benchmarks.composition [--quick] [--only plain_cnn] [--methods "*"]

Methods are those that make a network smaller by removing, merging and sharing, and int8; patterns
take others. One row a model: every method with its quick options on the model, then every method on
what each of them made, and the checks of `laconic.testing.contracts` on it (input untouched, output
ready, exact replay, storage, training goes on). A pair of which a method refuses the model by
itself, in words, is not a pair there. `pairs`: how many were run; `passed`; `failed`: the others
with the reason.
"""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch

from benchmarks.harness import Bench, Row
from laconic.core.errors import LaconicError
from laconic.methods.base import method_names
from laconic.testing import contracts, zoo

QUICK_MODELS = ("no_bias",)
METHODS = ("prune.*", "simplify.*", "share.*", "factorize.*", "quantize.static")
QUICK_METHODS = ("prune.magnitude", "quantize.static", "simplify.fold")
_LONGEST = 300


def row(model: str, methods: Sequence[str]) -> Row:
    """All pairs on one model."""
    alone: dict[str, contracts.Case] = {}
    refused: dict[str, str] = {}
    failed: dict[str, str] = {}
    for method in methods:
        try:
            alone[method] = contracts.case(method, model)
        except LaconicError as error:
            refused[method] = str(error)[:_LONGEST]
        except Exception as error:  # noqa: BLE001 - it is what the row tells
            failed[method] = f"alone: {_told(error)}"
    pairs = 0
    for first, held in alone.items():
        for second in alone:
            name = f"{first} > {second}"
            try:
                both = contracts.followed_by(held, second)
            except LaconicError as error:
                refused[name] = str(error)[:_LONGEST]
                continue
            except Exception as error:  # noqa: BLE001 - it is what the row tells
                failed[name] = f"apply: {_told(error)}"
            else:
                if reason := broken(both):
                    failed[name] = reason
            pairs += 1
    wrong = sum(" > " in name for name in failed)
    return {"pairs": pairs, "passed": pairs - wrong, "failed": failed, "refused": refused}


def broken(both: contracts.Case) -> str:
    """The first check that a pair breaks, or nothing."""
    for check in contracts.PAIR_CHECKS:
        try:
            check(both)
        except Exception as error:  # noqa: BLE001 - it is what the row tells
            return f"{check.__name__}: {_told(error)}"
    return ""


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error)[:_LONGEST]}"


def main(argv: list[str] | None = None) -> Row:
    bench = Bench("composition", __doc__ or "")
    bench.parser.add_argument("--methods", action="append", metavar="PATTERN")
    args = bench.parse(argv)
    torch.set_num_threads(1)
    names = QUICK_MODELS if args.quick else tuple(zoo.names())
    patterns = QUICK_METHODS if args.quick else args.methods or METHODS
    methods = [m for m in method_names() if any(fnmatchcase(m, p) for p in patterns)]
    rows: dict[str, dict[str, Any]] = {
        name: bench.row(name, lambda name=name: row(name, methods), methods=methods)
        for name in names
    }
    done = {name: found for name, found in rows.items() if found}
    return bench.finish(
        pairs=sum(found["pairs"] for found in done.values()),
        passed=sum(found["passed"] for found in done.values()),
        failed={
            f"{name}: {pair}": reason
            for name, found in done.items()
            for pair, reason in found["failed"].items()
        },
    )


if __name__ == "__main__":
    main()
