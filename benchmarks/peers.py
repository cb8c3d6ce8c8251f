"""The peers measured beside us, on the same machine, in the same run.

* the original in eager PyTorch, ONNX Runtime, OpenVINO fp32 and bf16;
* `nncf.quantize` (int8) of the original in OpenVINO, with its defaults and with its best settings;
* ONNX Runtime's int8 (`quantize_static`, `quantize_dynamic`), its defaults and its best settings;
* Torch-Pruning at the same MACs.

A *runner* is a callable that takes the list of input arrays and returns the list of output arrays.
"""

import contextlib
import copy
import io
import logging
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Runner = Callable[[Sequence[np.ndarray]], list[np.ndarray]]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence what the peers print: stdout belongs to the JSON line."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.getLogger("nncf").setLevel(logging.ERROR)
        yield


def eager(model: nn.Module, threads: int) -> Runner:
    """The model as PyTorch runs it by itself."""

    def run(inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        with torch.inference_mode():
            out = model(*(torch.from_numpy(array) for array in inputs))
        return [out.numpy()]

    return run


def onnx_file(model: nn.Module, example: Sequence[Tensor], path: Path) -> Path:
    """The original as an ONNX file with a dynamic batch, by `torch.onnx.export`."""
    batch = torch.export.Dim("batch", min=1, max=4096)
    shapes = tuple({0: batch} for _ in example)
    with quiet():
        torch.onnx.export(model, tuple(example), path, dynamo=True, dynamic_shapes=shapes,
                          external_data=False, verbose=False)  # fmt: skip
    return path


def onnxruntime(path: Path, threads: int) -> Runner:
    """An ONNX file in ONNX Runtime's CPU provider."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [item.name for item in session.get_inputs()]
    return lambda inputs: session.run(None, dict(zip(names, inputs, strict=True)))


def openvino_model(model: nn.Module, example: Sequence[Tensor]) -> Any:
    """The original as an `openvino.Model` with a dynamic batch, through `torch.export`."""
    import openvino

    batch = torch.export.Dim("batch", min=1, max=4096)
    double = tuple(torch.cat([tensor, tensor]) for tensor in example)  # 1 would be specialised
    with quiet():
        exported = torch.export.export(
            model, double, dynamic_shapes=tuple({0: batch} for _ in example)
        )
        return openvino.convert_model(exported)


def reshaped(model: Any, batch: int) -> Any:
    """A copy of an `openvino.Model` for another fixed batch."""
    import openvino

    twin = model.clone()
    twin.reshape({
        port: openvino.PartialShape([batch, *list(port.get_partial_shape())[1:]])
        for port in twin.inputs
    })  # fmt: skip
    return twin


def openvino_runner(model: Any, precision: str, threads: int) -> Runner:
    """Compile for latency; `precision` is "f32" or "bf16": what non-quantised operators run in.

    `model` is an `openvino.Model` or the path of a file that OpenVINO reads.
    """
    import openvino

    core = openvino.Core()
    if isinstance(model, Path):
        model = core.read_model(model)
    compiled = core.compile_model(model, "CPU", {
        "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": "1", "INFERENCE_NUM_THREADS": str(threads),
        "INFERENCE_PRECISION_HINT": precision,
    })  # fmt: skip
    request = compiled.create_infer_request()
    count = len(compiled.outputs)

    def run(inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        result = request.infer(list(inputs), share_inputs=True)
        return [np.array(result[index]) for index in range(count)]

    return run


def nncf_int8(
    model: Any, calibration: Iterable[Sequence[np.ndarray]], *, settings: str = "default",
    samples: int = 300,
) -> Any:  # fmt: skip
    """`nncf.quantize` of an `openvino.Model` on `samples` calibration inputs.

    `settings`: "default"; "mixed" (asymmetric activations where they help); "best" (mixed and the
    slow, exact bias correction); "transformer" (the model type that keeps attention accurate).
    """
    import nncf

    chosen: dict[str, Any] = {
        "default": {},
        "mixed": {"preset": nncf.QuantizationPreset.MIXED},
        "best": {"preset": nncf.QuantizationPreset.MIXED, "fast_bias_correction": False},
        "transformer": {"model_type": nncf.ModelType.TRANSFORMER},
    }[settings]
    items = [list(item) for item in calibration]
    with quiet():
        return nncf.quantize(model, nncf.Dataset(items), subset_size=min(samples, len(items)),
                             **chosen)  # fmt: skip


def ort_int8(
    source: Path, made: Path, calibration: Sequence[Sequence[np.ndarray]], *,
    settings: str = "default",
) -> Path:  # fmt: skip
    """ONNX Runtime's quantisation of an ONNX file, batch norms fused first as it advises.

    `settings`: "default" (`quantize_static`: extremes, one scale a weight); "channels" (one a
    channel); "percentile", "entropy" (ranges by these, a scale a channel); "dynamic"
    (`quantize_dynamic`, which its documentation names for transformers).
    """
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    rule = {"percentile": quantization.CalibrationMethod.Percentile,
            "entropy": quantization.CalibrationMethod.Entropy}.get(
                settings, quantization.CalibrationMethod.MinMax)  # fmt: skip
    fused = made.with_suffix(".fused.onnx")
    names = [item.name for item in onnx_inputs(source)]

    class Reader(quantization.CalibrationDataReader):
        """One sample after the other."""

        def __init__(self) -> None:
            self.left = iter(calibration)

        def get_next(self) -> Any:
            found = next(self.left, None)
            return None if found is None else dict(zip(names, found, strict=True))

    with quiet():
        quant_pre_process(source, fused, skip_symbolic_shape=True)
        if settings == "dynamic":
            quantization.quantize_dynamic(fused, made, per_channel=True)
            return made
        quantization.quantize_static(
            fused, made, Reader(), quant_format=quantization.QuantFormat.QDQ,
            calibrate_method=rule, per_channel=settings != "default",
        )  # fmt: skip
    return made


def onnx_inputs(path: Path) -> Any:
    """The inputs of an ONNX file."""
    import onnxruntime as ort

    return ort.InferenceSession(str(path), providers=["CPUExecutionProvider"]).get_inputs()


def openvino_bytes(model: Any) -> int:
    """Bytes of the `.xml` and `.bin` files of an `openvino.Model`, saved without fp16."""
    import openvino

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.xml"
        openvino.save_model(model, path, compress_to_fp16=False)
        return sum(file.stat().st_size for file in Path(folder).iterdir())


def batched_outputs(run: Runner, inputs: Sequence[np.ndarray], batch: int) -> np.ndarray:
    """First output over all rows of `inputs` for a runner of fixed `batch`; the tail is padded."""
    rows = len(inputs[0])
    found: list[np.ndarray] = []
    for start in range(0, rows, batch):
        part = [array[start : start + batch] for array in inputs]
        short = batch - len(part[0])
        if short:
            part = [np.concatenate([a, np.repeat(a[-1:], short, axis=0)]) for a in part]
        found.append(run(part)[0][: batch - short])
    return np.concatenate(found)


def accuracy(run: Runner, pixels: Tensor, labels: Tensor, batch: int) -> Tensor:
    """1.0 where the runner's first output has its largest value at the label: float32 [n]."""
    outputs = batched_outputs(run, [pixels.numpy()], batch)
    return torch.from_numpy(outputs.argmax(1) == labels.numpy()).float()


def busy_share(seconds: float = 0.5) -> float:
    """Share of all cores that other processes keep busy just now, from /proc/stat; 0 is quiet."""

    def read() -> tuple[float, float]:
        fields = [int(x) for x in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]
        return sum(fields), fields[3] + fields[4]

    total, idle = read()
    time.sleep(seconds)
    total2, idle2 = read()
    return 1.0 - (idle2 - idle) / max(total2 - total, 1)


def interleaved(
    runners: Mapping[str, Runner], inputs: Mapping[str, Sequence[np.ndarray]], *,
    rounds: int = 7, seconds: float = 0.4, least: int = 5,
) -> dict[str, dict[str, float]]:  # fmt: skip
    """Milliseconds per call, all runners in turn in every round, in alternating order.

    A turn first runs untimed for a tenth of `seconds`, then until `seconds` have passed and
    `least` calls are made; its median counts. Returned per runner: the median turn `ms`, the
    fastest and slowest turn `low`, `high`, and `busy`: the share of the machine that other
    processes had before the rounds, at worst.
    """
    turns: dict[str, list[float]] = {name: [] for name in runners}
    busy = 0.0
    for index in range(rounds):
        busy = max(busy, busy_share(0.1))
        order = list(runners) if index % 2 == 0 else list(reversed(runners))
        for name in order:
            run, arrays = runners[name], inputs[name]
            _turn(run, arrays, seconds / 10, 1)
            turns[name].append(_turn(run, arrays, seconds, least))
    return {
        name: {"ms": median(found), "low": min(found), "high": max(found), "busy": busy}
        for name, found in turns.items()
    }


def _turn(run: Runner, inputs: Sequence[np.ndarray], seconds: float, least: int) -> float:
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < least or time.perf_counter() < end:
        start = time.perf_counter()
        run(inputs)
        times.append(time.perf_counter() - start)
    return 1e3 * median(times)


def torch_pruning(
    model: nn.Module, example: Tensor, ratio: float, importance: str, batches: Iterable[Any],
    within: Callable[[nn.Module], list[nn.Module]],
) -> nn.Module:  # fmt: skip
    """Torch-Pruning at `ratio` fewer MACs, global, no training; returns the pruned copy.

    `importance`: "l1", "l2", "taylor", "hessian", "fpgm", "bn_scale", "lamp". `within(copy)` gives
    the layers it must leave alone. The channel ratio is found by bisection. Gradients for taylor
    and hessian come from (inputs, labels) `batches`.
    """
    low, high, found = 0.0, 0.95, None
    gradients = _gradients(model, importance, batches)
    full = _torch_pruning_macs(model, example)
    for _ in range(9):
        middle = (low + high) / 2
        pruned = _torch_pruned(model, example, middle, importance, gradients, within)
        if full / _torch_pruning_macs(pruned, example) < ratio:
            low = middle
        else:
            high, found = middle, pruned
    if found is None:
        raise ValueError(f"torch-pruning does not reach {ratio}x fewer MACs here")
    return found


def _gradients(model: nn.Module, importance: str, batches: Iterable[Any]) -> dict[str, Tensor]:
    """What the score needs of the loss: parameter name -> gradient, or mean squared gradient.

    The squared ones are gathered here, a sample at a time: `accumulate_grad` of Torch-Pruning 1.6.1
    keeps the last sample only.
    """
    if importance not in ("taylor", "hessian"):
        return {}
    found: dict[str, Tensor] = {}
    count = 0
    for inputs, labels in batches:
        size = len(inputs) if importance == "taylor" else 1
        for x, y in zip(inputs.split(size), labels.split(size), strict=True):
            model.zero_grad(set_to_none=True)
            nn.functional.cross_entropy(model(x), y).backward()
            count += 1
            for name, parameter in model.named_parameters():
                if parameter.grad is not None:
                    value = parameter.grad if importance == "taylor" else parameter.grad.square()
                    found[name] = found[name] + value if name in found else value.clone()
    model.zero_grad(set_to_none=True)
    return {name: value / count for name, value in found.items()}


def _torch_pruning_macs(model: nn.Module, example: Tensor) -> float:
    import torch_pruning

    return torch_pruning.utils.count_ops_and_params(model, example)[0]


def _torch_pruned(
    model: nn.Module, example: Tensor, channels: float, importance: str,
    gradients: Mapping[str, Tensor], within: Callable[[nn.Module], list[nn.Module]],
) -> nn.Module:  # fmt: skip
    import torch_pruning as tp

    model = copy.deepcopy(model).eval()
    scorer: Any = {
        "l1": lambda: tp.importance.GroupMagnitudeImportance(p=1),
        "l2": lambda: tp.importance.GroupMagnitudeImportance(p=2),
        "taylor": tp.importance.GroupTaylorImportance,
        "hessian": tp.importance.GroupHessianImportance,
        "fpgm": tp.importance.FPGMImportance,
        "bn_scale": tp.importance.BNScaleImportance,
        "lamp": tp.importance.LAMPImportance,
    }[importance]()
    for name, parameter in model.named_parameters():
        if name in gradients:
            parameter.grad = gradients[name].clone()
            if importance == "hessian":  # a group looks its squared gradients up here
                scorer._accu_grad[parameter] = gradients[name].clone()
                scorer._counter[parameter] = 1
    with quiet():
        pruner = tp.pruner.BasePruner(
            model, example, importance=scorer, global_pruning=True, pruning_ratio=channels,
            max_pruning_ratio=0.95, ignored_layers=within(model),
        )  # fmt: skip
        pruner.step()
    model.zero_grad(set_to_none=True)
    return model


def recalibrated(model: nn.Module, batches: Iterable[Tensor]) -> nn.Module:
    """`model` with the running statistics of every batch norm taken anew over `batches`."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None  # the cumulative average
    model.train()
    with torch.no_grad():
        for inputs in batches:
            model(inputs)
    return model.eval()
