"""One batch shape in the sampling loop: its trajectory, conditioning and steps, kept from batch to batch, so that a CUDA graph
is captured once and replayed for all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ccella_fast.diffusion.loop import Trajectory, Walk, drive
from ccella_fast.diffusion.noise import start_noise
from ccella_fast.diffusion.solvers import Plan
from ccella_fast.models import Denoiser
from ccella_fast.sampling.hoist import ConditioningTable, PromptRows, StepByStep
from ccella_fast.sampling.levers import Levers
from ccella_fast.sampling.steps import CudaCapture, Guidance, Network, Reuse, Steps, step_kinds


@dataclass(frozen=True)
class Loop:
    """How every batch of a request goes through the loop. Two are equal when they are made from equal settings.

    plan: a Plan of ours, or a diffusers scheduler that makes its own. named: solver, number of steps, prediction, timestep
    spacing. total: the schedule's length. row_by_row: see `ConditioningTable`."""

    plan: Plan | Any = field(compare=False)
    named: tuple[Any, int, str, str | None]
    total: int
    guidance: Guidance
    reuse: Reuse | None
    row_by_row: bool


class Session:
    """Batches of one size, with equally many prompts, of latents (C, X, Y, Z). Raises ConfigError for a depth of reuse that the
    U-Net does not have."""

    def __init__(self, model: Denoiser, loop: Loop, levers: Levers, latent: Sequence[int], layout: torch.memory_format):
        self._model, self._loop, self._levers = model, loop, levers
        self._latent, self._layout = list(latent), layout
        self._device = next(model.parameters()).device
        self._walk: Walk | None = None

    def run(self, seeds: Sequence[int], prompts: PromptRows, *, description: str, progress: bool) -> Tensor:
        """Latents (B, C, X, Y, Z) fp32 on the device; work may still be under way there."""
        x_T = start_noise(self._latent, seeds, device=self._device).contiguous(memory_format=self._layout)
        self._begin(x_T, seeds)
        self._source.start(prompts)
        cudnn = torch.backends.cudnn
        kept = {"enabled": cudnn.enabled, "deterministic": cudnn.deterministic, "allow_tf32": cudnn.allow_tf32}
        tuned = cudnn.flags(**kept, benchmark=True)
        with torch.no_grad(), tuned:
            assert self._walk is not None
            latents = drive(self._walk, self._steps.advance, description=description, progress=progress)
        return latents.contiguous()

    @property
    def class_logits(self) -> Tensor | None:
        """(rows, classes) of the last step."""
        return self._source.class_logits

    def _begin(self, x_T: Tensor, seeds: Sequence[int]) -> None:
        loop = self._loop
        captured = self._levers.cuda_graph and x_T.is_cuda and isinstance(loop.plan, Plan)
        if isinstance(self._walk, Trajectory):
            self._walk.start(x_T, seeds)
            return
        if isinstance(loop.plan, Plan):
            walk: Any = Trajectory(loop.plan, x_T, seeds, static=captured)
        else:
            from ccella_fast.diffusion.scheduler_adapter import SchedulerTrajectory

            _, num_steps, prediction, _ = loop.named
            walk = SchedulerTrajectory(loop.plan, x_T, seeds, num_steps=num_steps, prediction=prediction)
        source: ConditioningTable | StepByStep
        if self._levers.hoist:
            source = ConditioningTable(self._model, walk.timesteps, row_by_row=loop.row_by_row)
        else:
            source = StepByStep(self._model, walk.timesteps)
        network = Network(
            self._model, source, walk.index, loop.guidance, loop.reuse, compiled=self._levers.compile
        )  # fmt: skip
        kinds = step_kinds([walk.timestep(i) for i in range(len(walk))], loop.total, loop.guidance, loop.reuse)
        self._walk, self._source = walk, source
        self._steps = Steps(walk, network, source, kinds, CudaCapture(self._device) if captured else None)
