"""The denoising loop of one batch shape: conditioning, network, guidance and solver, kept from batch to batch, so that a CUDA
graph is captured once and replayed for all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ccella_fast.diffusion.noise import start_noise
from ccella_fast.diffusion.scheduler_adapter import SchedulerTrajectory
from ccella_fast.diffusion.solvers import SamplingPlan
from ccella_fast.diffusion.trajectory import Trajectory, run_trajectory
from ccella_fast.models import Conditioning, DiffusionModel
from ccella_fast.models.feature_reuse import check_depth, denoise_keeping, denoise_reusing
from ccella_fast.models.unet3d import UNet3d
from ccella_fast.sampling.conditioning import Conditioner, ConditioningCache, PromptRows, UncachedConditioning
from ccella_fast.sampling.cuda_graph import CudaGraphCapture, StepGraphs
from ccella_fast.sampling.guidance import Guidance, Reuse, StepKind, step_kinds
from ccella_fast.sampling.optimizations import Optimizations


@dataclass(frozen=True)
class LoopSettings:
    """How every batch of a request goes through the loop. Two are equal when they are made from equal settings.

    plan: a Plan of ours, or a diffusers scheduler that makes its own; it follows from the four fields after it.
    schedule_length: training timesteps. row_by_row: see `ConditioningCache`."""

    plan: SamplingPlan | Any = field(compare=False)
    solver: Any
    num_steps: int
    prediction: str
    timestep_spacing: str | None
    schedule_length: int
    guidance: Guidance
    reuse: Reuse | None
    row_by_row: bool


class Denoised(NamedTuple):
    """latents (B, C, X, Y, Z) fp32 on the device; class_logits (rows, classes) of the last step, None where no class is
    predicted. Work may still be under way on the device."""

    latents: Tensor
    class_logits: Tensor | None


class DenoisingLoop:
    """Denoises batches of `batch` latents (C, X, Y, Z), all with prompts of one `form`.

    Which kind a step is (guided or not, whole or with a reused feature) is known before the loop. Each kind is a fixed sequence
    of kernels over tensors that keep their addresses; the position in the plan is read on the device.

    Raises ConfigError for a depth of reuse that the U-Net does not have."""

    def __init__(
        self,
        model: DiffusionModel,
        settings: LoopSettings,
        optimizations: Optimizations,
        batch: int,
        latent: Sequence[int],
        layout: torch.memory_format,
    ):
        self._settings, self._latent, self._layout = settings, list(latent), layout
        self._device = next(model.parameters()).device
        unet: Any = getattr(model, "unet", model)
        assert isinstance(unet, UNet3d)
        if settings.reuse is not None:
            check_depth(unet, settings.reuse.depth)
        # dynamic=False: every shape is compiled for itself.
        wrap: Callable = (lambda f: torch.compile(f, dynamic=False)) if optimizations.compile else (lambda f: f)
        self._unet = unet
        self._whole, self._keeping, self._reusing = wrap(unet.denoise), wrap(denoise_keeping), wrap(denoise_reusing)
        self._features: dict[bool, Tensor] = {}  # by guided: with guidance there are twice the rows

        capture = self._capture(optimizations)
        self._graphs = StepGraphs(capture)
        x_T = torch.zeros(batch, *self._latent, device=self._device).contiguous(memory_format=layout)
        self._trajectory: Trajectory | SchedulerTrajectory
        if isinstance(settings.plan, SamplingPlan):
            self._trajectory = Trajectory(settings.plan, x_T, range(batch), static=capture is not None)
        else:
            self._trajectory = self._scheduled(x_T, range(batch))
        timesteps = self._trajectory.timesteps
        self._source: Conditioner
        if optimizations.precompute_conditioning:
            self._source = ConditioningCache(model, timesteps, row_by_row=settings.row_by_row)
        else:
            self._source = UncachedConditioning(model, timesteps)
        times = [self._trajectory.timestep(i) for i in range(len(self._trajectory))]
        self._kinds = step_kinds(times, settings.schedule_length, settings.guidance, settings.reuse)

    def run(self, seeds: Sequence[int], prompts: PromptRows, *, description: str, progress: bool) -> Denoised:
        """A batch from noise, one seed per latent."""
        x_T = start_noise(self._latent, seeds, device=self._device).contiguous(memory_format=self._layout)
        if isinstance(self._trajectory, Trajectory):
            self._trajectory.start(x_T, seeds)
        else:
            self._trajectory = self._scheduled(x_T, seeds)
        self._source.start(prompts)
        cudnn = torch.backends.cudnn
        kept = {"enabled": cudnn.enabled, "deterministic": cudnn.deterministic, "allow_tf32": cudnn.allow_tf32}
        with torch.no_grad(), cudnn.flags(**kept, benchmark=True):
            latents = run_trajectory(self._trajectory, self._step, description=description, progress=progress)
        return Denoised(latents.contiguous(), self._source.class_logits)

    def _step(self, i: int) -> None:
        """Evaluation i. What `advance` does can be captured: device work only."""
        kind = self._kinds[i]
        self._source.prepare(i)
        self._graphs.run(kind, lambda: self._trajectory.advance(lambda x, t: self._predict(x, kind)))

    def _predict(self, x: Tensor, kind: StepKind) -> Tensor:
        """x (B, C, X, Y, Z) -> the prediction at the trajectory's position, guided if the step is, in fp32."""
        conditioning = self._source.at(self._trajectory.index)  # rows as `PromptRows` says
        if not kind.guided:
            return self._evaluate(x, _first_rows(conditioning, len(x)), kind).float()
        both = self._evaluate(torch.cat([x, x]), conditioning, kind).float()
        conditional, null = both.chunk(2)
        return null + self._settings.guidance.scale * (conditional - null)

    def _evaluate(self, x: Tensor, conditioning: Conditioning, kind: StepKind) -> Tensor:
        """The network, whole or from the kept feature."""
        reuse = self._settings.reuse
        if reuse is None:
            return self._whole(x, conditioning)
        if kind.feature == "reuse":
            return self._reusing(self._unet, x, conditioning, reuse.depth, self._features[kind.guided])
        noise, feature = self._keeping(self._unet, x, conditioning, reuse.depth)
        if kind.guided not in self._features:
            self._features[kind.guided] = torch.empty_like(feature)  # memory that no graph owns
        self._features[kind.guided].copy_(feature)
        return noise

    def _capture(self, optimizations: Optimizations) -> Callable | None:
        """How a step is recorded; None where every step is executed."""
        possible = (
            optimizations.cuda_graph and self._device.type == "cuda" and isinstance(self._settings.plan, SamplingPlan)
        )
        return CudaGraphCapture(self._device) if possible else None

    def _scheduled(self, x_T: Tensor, seeds: Sequence[int]) -> SchedulerTrajectory:
        """A diffusers scheduler keeps state of its own, so each batch takes a fresh copy."""
        settings = self._settings
        return SchedulerTrajectory(
            settings.plan, x_T, seeds, num_steps=settings.num_steps, prediction=settings.prediction
        )


def _first_rows(conditioning: Conditioning, count: int) -> Conditioning:
    """The conditional rows: the first `count`, or the single one for all."""

    def take(tensor: Tensor) -> Tensor:
        return tensor.expand(count, *tensor.shape[1:]) if len(tensor) == 1 else tensor[:count]

    pairs = tuple((take(keys), take(values)) for keys, values in conditioning.keys_values)
    return Conditioning(tuple(map(take, conditioning.shifts)), pairs, None)
