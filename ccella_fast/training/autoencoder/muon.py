"""Muon: gradient descent whose steps are orthogonalized, for the weights of convolutions; AdamW for everything else.

Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon; the scale of the steps, with which AdamW's learning rate
and weight decay stay as they are, is that of Liu et al. 2025 (arXiv 2502.16982). `torch.optim.Muon` computes the same for
matrices, but rounds to bf16, so that results would differ between CPUs, and does not take the weights of convolutions.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the polynomial that brings singular values to about 1
_ITERATIONS = 5
_MOMENTUM = 0.95


class Muon(torch.optim.Optimizer):
    """Muon for weights with at least two rows and columns, a row being an output channel; AdamW for the other parameters.

    Args:
        parameters: that are updated.
        lr: of both.
        betas: AdamW's decay rates of both moments.
        weight_decay: of both, decoupled.
    """

    def __init__(
        self, parameters: Iterable[torch.nn.Parameter], *, lr: float, betas: tuple[float, float], weight_decay: float
    ):
        every = list(parameters)
        matrices = [p for p in every if p.ndim > 1 and min(len(p), p[0].numel()) > 1]
        chosen = {id(p) for p in matrices}
        groups: list[dict[str, Any]] = [
            {"params": matrices, "orthogonalized": True},
            {"params": [p for p in every if id(p) not in chosen], "orthogonalized": False},
        ]
        super().__init__(groups, {"lr": lr, "betas": betas, "weight_decay": weight_decay, "eps": 1e-8})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no step needs a second evaluation
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            update = self._muon if group["orthogonalized"] else self._adamw
            for p in group["params"]:
                if p.grad is not None:
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    update(p, p.grad, self.state[p], group)

    def _muon(self, p: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        if not state:
            state["momentum"] = torch.zeros_like(p)
        momentum = state["momentum"].lerp_(gradient, 1 - _MOMENTUM)
        direction = orthogonalized(gradient.lerp(momentum, _MOMENTUM).flatten(1))
        p.add_(direction.view(p.shape), alpha=-group["lr"] * 0.2 * max(direction.shape) ** 0.5)

    def _adamw(self, p: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        if not state:
            state.update(step=0, first=torch.zeros_like(p), second=torch.zeros_like(p))
        state["step"] += 1
        (beta1, beta2), count = group["betas"], state["step"]
        state["first"].lerp_(gradient, 1 - beta1)
        state["second"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        scale = (state["second"] / (1 - beta2**count)).sqrt_().add_(group["eps"])
        p.addcdiv_(state["first"], scale, value=-group["lr"] / (1 - beta1**count))


def orthogonalized(matrix: Tensor) -> Tensor:
    """A matrix with the singular vectors of `matrix` (rows, columns), and singular values between about 0.7 and 1.2.

    Newton-Schulz iteration in the precision of `matrix`.
    """
    a, b, c = _COEFFICIENTS
    x = matrix.mT if matrix.shape[0] > matrix.shape[1] else matrix  # the smaller products
    x = x / (x.norm() + 1e-7)
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)  # a x + (b gram + c gram^2) x
    return x.mT if matrix.shape[0] > matrix.shape[1] else x
