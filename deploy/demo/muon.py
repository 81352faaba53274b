"""Optimisers over stacked parameters: Muon for inner matrices, Adam for the rest.

Muon (Jordan et al., 2024) replaces the momentum of a matrix by its nearest orthogonal matrix, found by five
Newton-Schulz steps; here every leading axis is a batch of matrices.
"""

from __future__ import annotations

import torch
from torch import Tensor

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic step (Jordan et al.): chosen for speed, singular values end within 0.7 to 1.2."""


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """Approximate orthogonal factor of each matrix of `[N, R, C]`, in bf16."""
    a, b, c = NEWTON_SCHULZ
    x = matrices.bfloat16()
    is_tall = x.shape[-2] > x.shape[-1]
    x = x.transpose(-1, -2) if is_tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.transpose(-1, -2)
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.transpose(-1, -2) if is_tall else x


class Muon:
    """Nesterov momentum, orthogonalised; `rate` is the step for a square matrix."""

    def __init__(self, parameters: list[Tensor], momentum: float = 0.95, decay: float = 0.05) -> None:
        self.parameters, self.momentum, self.decay = parameters, momentum, decay
        self.buffers = [torch.zeros_like(parameter) for parameter in parameters]

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Update in place from `.grad`."""
        for parameter, buffer in zip(self.parameters, self.buffers, strict=True):
            if parameter.grad is None:
                continue
            buffer.lerp_(parameter.grad, 1 - self.momentum)
            direction = parameter.grad.lerp(buffer, self.momentum)
            rows, columns = parameter.shape[-2:]
            update = orthogonalise(direction.reshape(-1, rows, columns)).view_as(parameter)
            parameter.mul_(1 - rate * self.decay)
            parameter.add_(update, alpha=-rate * max(1.0, rows / columns) ** 0.5)


class Adam:
    """Adam without decay; each parameter has its own factor on the rate."""

    def __init__(self, parameters: list[tuple[Tensor, float]], betas: tuple[float, float] = (0.9, 0.98)) -> None:
        groups = [{"params": [parameter], "lr": factor, "factor": factor} for parameter, factor in parameters]
        self.inner = torch.optim.Adam(groups, betas=betas, eps=1e-10, fused=parameters[0][0].is_cuda)

    def step(self, rate: float) -> None:
        """Update in place from `.grad`."""
        for group in self.inner.param_groups:
            group["lr"] = group["factor"] * rate
        self.inner.step()
