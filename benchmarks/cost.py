"""What following structure costs: seconds and peak memory of capture, groups and cutting.

Rows in the shape of ResNet-50 and BERT-base, and a slim encoder of 12, 24 and 48 layers that shows
how the time grows with the number of operators. Every row runs in a process of its own.

    python -m benchmarks.cost [--only bert_base] [--quick]
"""

import json
import sys
import time
from collections.abc import Callable
from math import log
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import Bench, peak_mb, run_isolated
from laconic.program.capture import capture
from laconic.program.cost import CostModel, cost
from laconic.program.groups import Groups, groups
from laconic.program.surgery import cut

Model = tuple[nn.Module, dict[str, Tensor] | tuple[Tensor, ...]]
DEPTHS = (12, 24, 48)


def _tokens(length: int, vocabulary: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (2, length), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def resnet50() -> Model:
    from benchmarks.models import resnet50_shaped

    generator = torch.Generator().manual_seed(0)
    return resnet50_shaped(generator), (torch.randn(2, 3, 224, 224, generator=generator),)


def bert_base() -> Model:
    from benchmarks.models import bert_shaped

    return bert_shaped(torch.Generator().manual_seed(0)), _tokens(64, 30000)


def slim(layers: int) -> Model:
    """A BERT of width 48, so that time follows the operators and not the weights."""
    from transformers import BertConfig, BertModel

    from benchmarks.models import Embedder

    configuration = BertConfig(
        vocab_size=100, hidden_size=48, num_attention_heads=4, intermediate_size=96,
        num_hidden_layers=layers, max_position_embeddings=32,
    )  # fmt: skip
    encoder = BertModel(configuration, add_pooling_layer=False)
    return Embedder(encoder).eval(), _tokens(12, 100)


MODELS: dict[str, Callable[[], Model]] = {"resnet50": resnet50, "bert_base": bert_base}
MODELS |= {f"slim_bert_{depth}": lambda depth=depth: slim(depth) for depth in DEPTHS}


def smallest_go(found: Groups) -> dict[str, Tensor]:
    """Keep the 70 % of every group whose producing rows have the largest norms."""
    keep: dict[str, Tensor] = {}
    for group in found:
        scores = torch.zeros(group.size)
        for member in group.by_role("producer"):
            weight = found.equations.program.tensor(member.tensor).detach()
            norms = weight.movedim(member.dim, 0).flatten(1).square().sum(1)
            index = group.index(member)
            scores.index_add_(0, index[index >= 0], norms[index >= 0])
        keep[group.name] = scores.topk(max(1, group.size * 7 // 10)).indices
    return keep


def measure(name: str) -> dict[str, Any]:
    """All stages of one model, in this process."""
    torch.set_num_threads(1)
    model, inputs = MODELS[name]()
    before = peak_mb()
    start = time.perf_counter()
    program = capture(model, inputs)
    captured = time.perf_counter()
    found = groups(program)
    grouped = time.perf_counter()
    pruned, _ = cut(program, smallest_go(found), found)
    done = time.perf_counter()
    whole, small = cost(program), cost(pruned)
    counted = time.perf_counter()
    foretold = CostModel(program, found)
    built = time.perf_counter()
    for _ in range(100):
        foretold.macs(foretold.sizes)
    return {
        "capture_s": captured - start,
        "groups_s": grouped - captured,
        "prune_s": done - grouped,
        "total_s": done - start,
        "cost_s": (counted - done) / 2,
        "cost_model_s": built - counted,
        "cost_model_call_ms": (time.perf_counter() - built) * 10,
        "peak_mb": peak_mb(),
        "peak_before_mb": before,
        "weights_mb": whole.bytes / 2**20,
        "operators": sum(node.op == "call_function" for node in program.graph.nodes),
        "groups": len(found),
        "macs_kept": small.macs / whole.macs,
    }


def exponent(rows: dict[str, dict[str, Any]], key: str) -> float | None:
    """Power of the number of operators with which a time grows, first to last depth."""
    first, last = (rows.get(f"slim_bert_{depth}") for depth in (DEPTHS[0], DEPTHS[-1]))
    if not first or not last:
        return None
    return log(last[key] / first[key]) / log(last["operators"] / first["operators"])


def main() -> None:
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measure(sys.argv[2])))
        return
    bench = Bench("cost", __doc__ or "")
    args = bench.parse()
    names = [name for name in MODELS if name.startswith("slim")] if args.quick else list(MODELS)
    rows = {
        name: bench.row(name, lambda name=name: run_isolated("benchmarks.cost", "--measure", name))
        for name in names
    }
    rows = {name: row for name, row in rows.items() if row}
    keys = ("capture_s", "groups_s", "prune_s", "peak_mb")
    bench.finish(
        **{key: {name: round(row[key], 3) for name, row in rows.items()} for key in keys},
        growth_exponent={key: exponent(rows, key) for key in ("capture_s", "groups_s", "prune_s")},
    )


if __name__ == "__main__":
    main()
