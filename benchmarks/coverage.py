"""How far structure is followed: tiny models of many architectures, pruned in every group, checked.

Every row is captured, every group that can shrink loses 30 % of its indices (rounded up), and the
pruned program is compared with the original run under masks. A row counts as equal only if

* the largest difference is at most `TOLERANCE` of the largest output,
* multiply-adds fell by at least 30 %,
* at most 5 % of the weights that the graph reads stand in frozen groups,
* the masked original differs clearly (1 %) from the unmasked one, and
* no operator was met that nobody had described.

    python -m benchmarks.coverage [--only llama] [--quick]
"""

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import architectures
from benchmarks.harness import Bench
from laconic.core.errors import CaptureError, LaconicError
from laconic.program.capture import capture
from laconic.program.cost import CostModel, cost
from laconic.program.groups import Groups, groups
from laconic.program.program import Program
from laconic.program.surgery import cut
from laconic.testing import zoo
from laconic.testing.masked import masked

SHARE = 0.3
SEED = 1
TOLERANCE = 2e-5
"""Relative to the largest output: float32 sums in another order, a few dozen layers deep."""


def choose(found: Groups) -> dict[str, Tensor]:
    """What stays when 30 % of every group, rounded up, go at random; one index always stays."""
    generator = torch.Generator().manual_seed(SEED)
    keep: dict[str, Tensor] = {}
    for group in found:
        drop = min(-(-group.size * 3 // 10), group.size - 1)
        keep[group.name] = torch.randperm(group.size, generator=generator)[drop:]
    return keep


def check(model: nn.Module, inputs: tuple[Tensor, ...]) -> dict[str, Any]:
    """One row: capture, prune, compare."""
    try:
        program = capture(model, inputs)
    except CaptureError as error:
        return {"exported": False, "equal": False, "why": str(error)[:300]}
    found = groups(program)
    keep = choose(found)
    try:
        pruned, changes = cut(program, keep, found)
        expected = masked(program, changes)
        with torch.no_grad():
            given, whole = pruned.run_flat(*program.example), program.run_flat(*program.example)
    except LaconicError as error:
        return {"exported": True, "equal": False, "why": str(error)[:300]}
    before, after = cost(program), cost(pruned)
    sizes = {name: len(kept) for name, kept in keep.items()}
    frozen = frozen_weights(program, found)
    total = sum(program.tensor(name).numel() for name in read_weights(program))
    row: dict[str, Any] = {
        "exported": True,
        "error": distance(given, expected),
        "differs": distance(expected, whole),
        "macs_kept": after.macs / before.macs,
        "params_kept": after.params / before.params,
        "frozen_share": sum(program.tensor(name).numel() for name in frozen) / total,
        "groups": len(found),
        "groups_pruned": sum(len(keep[group.name]) < group.size for group in found),
        "cost_model_exact": CostModel(program, found).macs(sizes) == after.macs,
        "operators": len({str(n.target) for n in program.graph.nodes if n.op == "call_function"}),
        "frozen_weights": frozen,
        "frozen_axes": dict(Counter(kind(group.frozen or "") for group in found.frozen)),
        "unknown": found.unknown,
    }
    failed = [text for text, ok in verdicts(row).items() if not ok]
    return row | {"equal": not failed, "why": "; ".join(failed)}


def verdicts(row: dict[str, Any]) -> dict[str, bool]:
    """Every condition for a row to count, in words."""
    return {
        f"error {row['error']:.1e}": row["error"] <= TOLERANCE,
        f"MACs fell to {row['macs_kept']:.2f} only": row["macs_kept"] <= 1 - SHARE,
        f"{row['frozen_share']:.1%} of the weights are frozen": row["frozen_share"] <= 0.05,
        f"masking changes {row['differs']:.1%} only": row["differs"] >= 0.01,
        f"unknown operators {list(row['unknown'])}": not row["unknown"],
        "the cost model disagrees with the cut program": row["cost_model_exact"],
    }


def read_weights(program: Program) -> list[str]:
    """Parameters that the graph reads."""
    read = {node.target for node in program.graph.nodes if node.op == "get_attr"}
    return [n for n, t in program.tensors() if n in read and isinstance(t, nn.Parameter)]


def frozen_weights(program: Program, found: Groups) -> dict[str, str]:
    """Parameters of which no axis can shrink, and why."""
    free = {member.tensor for group in found for member in group.members}
    why = {m.tensor: group.frozen or "" for group in found.frozen for m in group.members}
    return {n: why.get(n, "a single number") for n in read_weights(program) if n not in free}


def kind(reason: str) -> str:
    """A reason without the place: `input`, `output`, or what follows the colon."""
    first = reason.split()[0]
    return first if first in ("input", "output") else reason.split(": ")[-1]


def distance(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> float:
    """Largest difference, relative to the largest value of `other`, over all outputs."""
    return max(
        float((a.double() - b.double()).abs().max() / b.double().abs().max())
        for a, b in zip(one, other, strict=True)
    )


def build(name: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A model of the zoo or a shaken architecture."""
    if name.startswith("zoo."):
        return zoo.make(name.removeprefix("zoo."))
    model, inputs = architectures.build(name)
    return zoo.shake(model), inputs


def main() -> None:
    bench = Bench("coverage", __doc__ or "")
    args = bench.parse()
    torch.set_num_threads(1)
    names = [f"zoo.{name}" for name in zoo.names()] + list(architectures.ARCHITECTURES)
    names = names[::6] if args.quick else names
    rows = {
        name: bench.row(name, lambda name=name: check(*build(name)), share=SHARE, seed=SEED)
        for name in names
    }
    rows = {name: row for name, row in rows.items() if row}
    kept = {name: row for name, row in rows.items() if not name.startswith("zoo.")}
    bench.finish(
        architectures=len(kept),
        zoo=len(rows) - len(kept),
        exported=sum(row["exported"] for row in kept.values()),
        equal=sum(row["equal"] for row in kept.values()),
        zoo_equal=sum(row["equal"] for name, row in rows.items() if name.startswith("zoo.")),
        groups=sum(row.get("groups", 0) for row in rows.values()),
        groups_pruned=sum(row.get("groups_pruned", 0) for row in rows.values()),
        frozen=dict(sum((Counter(r.get("frozen_axes", {})) for r in rows.values()), Counter())),
        not_equal={name: row["why"] for name, row in rows.items() if not row["equal"]},
        largest_error=max(row.get("error", 0.0) for row in rows.values()),
        largest_frozen_share=max(row.get("frozen_share", 0.0) for row in rows.values()),
    )


if __name__ == "__main__":
    main()
