"""Networks whose training diverged are refused before anything is made of them."""

import torch

from laconic.core.errors import DataError
from laconic.program.program import Program


def refuse_broken(program: Program) -> None:
    """Raise if a parameter is not finite, as after a training that diverged.

    Raises:
        DataError: names the first such parameter.
    """
    for name, tensor in program.named_parameters():
        bad = int((~torch.isfinite(tensor.detach())).sum()) if tensor.is_floating_point() else 0
        if bad:
            raise DataError(
                f"{bad} of {tensor.numel()} values are NaN or infinite",
                where=name,
                hint="a network that diverged cannot be made smaller: train it again",
            )
