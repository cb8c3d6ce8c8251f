"""A network's own past as its teacher: a running mean of its tensors, a mean teacher.

Tarvainen & Valpola, "Mean teachers are better role models" (arXiv 1703.01780). The mean is of the
weights and of what batch normalisation remembers; it forgets faster while it is young.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from laconic.program.program import Program
from laconic.training.attendant import Attendant
from laconic.training.plan import Plan
from laconic.training.precision import autocast, in_float32, set_layout, wants_channels_last

_YOUNG = 10  # after n steps the mean holds the last n / 10 or so, until `decay` holds less


class Earlier(Attendant):
    """Keeps the mean and gives its outputs.

    Attributes:
        batches: length of the run in batches, 0 before it is known.
    """

    def __init__(
        self, student: Program, decay: float, device: torch.device, precision: str
    ) -> None:
        """`student`: as it begins; `decay`: of the mean, a step."""
        self._mean = student.clone().eval().to(device).requires_grad_(False)
        if wants_channels_last(self._mean):
            set_layout(self._mean, True)
        self._decay, self._device, self._precision = decay, device, precision
        self._student: Program | None = None
        self.batches = 0

    def begin(self, program: Program, plan: Plan) -> None:
        """The run's length is known."""
        self._student = program
        self.batches = (plan.steps or 1) * (plan.accumulate or 1)

    @torch.no_grad()
    def after(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        """The mean follows."""
        del optimizer
        assert self._student is not None
        share = 1 - min(self._decay, (1 + step) / (_YOUNG + step))
        for name, tensor in self._mean.tensors():
            now = self._student.tensor(name).detach()
            if tensor.is_floating_point():
                tensor.lerp_(now, share)
            else:
                tensor.copy_(now)

    @torch.no_grad()
    def __call__(self, flat: Sequence[Tensor]) -> list[Tensor]:
        """The mean's flat outputs."""
        with autocast(self._device, self._precision):
            return in_float32(self._mean.run_flat(*flat))

    def tensors(self) -> Mapping[str, Tensor]:
        """The mean."""
        return dict(self._mean.tensors())

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of `tensors`."""
        for name, tensor in self._mean.tensors():
            tensor.copy_(tensors[name])
