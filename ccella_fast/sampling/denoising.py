"""The denoising loop for one batch shape: conditioning, network, guidance and solver.

It is reused from batch to batch, so that a CUDA graph is captured once and replayed for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ccella_fast.config import Config
from ccella_fast.diffusion.guidance import extrapolate, guided_prediction
from ccella_fast.diffusion.noise import start_noise
from ccella_fast.diffusion.objective import noise_process
from ccella_fast.diffusion.prediction import check_prediction
from ccella_fast.diffusion.scheduler_adapter import SchedulerTrajectory
from ccella_fast.diffusion.solvers import SamplingPlan, Solver, get_solver
from ccella_fast.diffusion.trajectory import Trajectory, run_trajectory
from ccella_fast.errors import ConfigError
from ccella_fast.models import Conditioning, DiffusionModel
from ccella_fast.models.feature_reuse import check_depth, denoise_keeping, denoise_reusing
from ccella_fast.models.unet3d import UNet3d
from ccella_fast.sampling.conditioning import Conditioner, ConditioningCache, UncachedConditioning
from ccella_fast.sampling.cuda_graph import CudaGraphCapture, StepGraphs
from ccella_fast.sampling.guidance import Guidance, Reuse, StepKind, step_kinds
from ccella_fast.sampling.optimizations import Optimizations, fastest_convolutions
from ccella_fast.sampling.prompts import PromptRows
from ccella_fast.sampling.request import Request


@dataclass(frozen=True)
class LoopSettings:
    """The settings of the loop, shared by all batches of a request.

    Attributes:
        plan: a SamplingPlan, or a diffusers scheduler; it is determined by the next four fields and the size of the latent, and
            not compared.
        solver: the solver or its name.
        num_inference_steps: denoising steps.
        prediction: what the network predicts.
        timestep_spacing: None for the solver's default.
        schedule_length: the number of training timesteps.
        guidance: the guidance settings.
        reuse: the settings of feature reuse; None: off.
        row_by_row: see `ConditioningCache`.
    """

    plan: SamplingPlan | Any = field(compare=False)
    solver: Any
    num_inference_steps: int
    prediction: str
    timestep_spacing: str | None
    schedule_length: int
    guidance: Guidance
    reuse: Reuse | None
    row_by_row: bool

    @classmethod
    def resolve(cls, request: Request, config: Config) -> LoopSettings:
        """The settings of a request, with the defaults of `config`.

        Raises:
            ConfigError: a value is invalid, or the solver or the prediction is not that of the training.
        """
        defaults, scheduler = config.sampling, config.scheduler
        process = noise_process(scheduler, request.resolve_latent_shape(config)[1:])
        solver: Any = defaults.solver if request.solver is None else request.solver
        prediction = scheduler.prediction
        if request.prediction is not None:
            _check_prediction(check_prediction(request.prediction, process.predictions, process.kind), prediction)
        given = request.num_inference_steps
        num_inference_steps = defaults.num_inference_steps if given is None else given
        spacing = request.timestep_spacing or defaults.timestep_spacing
        plan: Any = solver
        if isinstance(solver, (str, Solver)):
            plan = get_solver(solver, flow=scheduler.is_flow).plan(
                process, num_inference_steps, prediction=prediction, timestep_spacing=spacing
            )
        if request.reuse is not None:
            if not isinstance(request.reuse, Reuse):
                kind = type(request.reuse).__name__
                why = f"reuse must be a Reuse, got an object of type {kind}"
                raise ConfigError(why, field="reuse", fix="write reuse=Reuse(interval=3, depth=1)")
            check_depth(config.model, request.reuse.depth)
        return cls(
            plan=plan,
            solver=solver,
            num_inference_steps=num_inference_steps,
            prediction=prediction,
            timestep_spacing=spacing,
            schedule_length=scheduler.num_train_timesteps,
            guidance=request.resolve_guidance(config),
            reuse=request.reuse,
            row_by_row=request.batch_invariant,
        )


class Denoised(NamedTuple):
    """The result of a batch, on the device, whose work may not be finished.

    Attributes:
        latents: (B, C, X, Y, Z) fp32.
        class_logits: (rows, classes) of the last step; None if no class is predicted.
    """

    latents: Tensor
    class_logits: Tensor | None


class DenoisingLoop:
    """Denoises batches of one shape, with prompts of one `shape_signature`.

    The kind of each step (guided or not, with the whole network or with a reused feature) is known before the loop. Each kind
    is a fixed sequence of kernels over tensors that keep their addresses; the position in the plan is read on the device.

    Args:
        model: the denoiser.
        settings: the settings of the request.
        optimizations: the sampler's optimizations.
        batch_size: B.
        latent_shape: (C, X, Y, Z).
        memory_format: of the latents.
        weak: the denoiser of autoguidance, with the same prompts, in place of the null report.
    """

    def __init__(
        self,
        model: DiffusionModel,
        settings: LoopSettings,
        optimizations: Optimizations,
        batch_size: int,
        latent_shape: Sequence[int],
        memory_format: torch.memory_format,
        weak: DiffusionModel | None = None,
    ):
        self._settings, self._latent_shape, self._memory_format = settings, list(latent_shape), memory_format
        self._device = next(model.parameters()).device
        capture = self._make_capture(optimizations)
        self._graphs = StepGraphs(capture)
        x_T = torch.zeros(batch_size, *self._latent_shape, device=self._device).contiguous(memory_format=memory_format)
        self._trajectory: Trajectory | SchedulerTrajectory
        if isinstance(settings.plan, SamplingPlan):
            self._trajectory = Trajectory(settings.plan, x_T, range(batch_size), static=capture is not None)
        else:
            self._trajectory = self._scheduler_trajectory(x_T, range(batch_size))
        shared = settings, optimizations, self._trajectory.timesteps, batch_size
        self._network = _Network(model, *shared)
        self._weak = None if weak is None else _Network(weak, *shared)
        times = [self._trajectory.timestep(i) for i in range(len(self._trajectory))]
        self._kinds = step_kinds(times, settings.schedule_length, settings.guidance, settings.reuse)

    def run(self, seeds: Sequence[int], prompts: PromptRows, *, description: str, progress: bool) -> Denoised:
        """Denoise a batch from noise, with one seed per latent."""
        x_T = start_noise(self._latent_shape, seeds, device=self._device).contiguous(memory_format=self._memory_format)
        if isinstance(self._trajectory, Trajectory):
            self._trajectory.start(x_T, seeds)
        else:
            self._trajectory = self._scheduler_trajectory(x_T, seeds)
        self._network.conditioner.set_prompts(prompts)
        if self._weak is not None:
            self._weak.conditioner.set_prompts(prompts)
        with torch.no_grad(), fastest_convolutions():
            latents = run_trajectory(self._trajectory, self._step, description=description, progress=progress)
        return Denoised(latents.contiguous(), self._network.conditioner.class_logits)

    def _step(self, i: int) -> None:
        """Evaluation i. `advance` can be captured, because it does not synchronize with the host."""
        kind = self._kinds[i]
        self._network.conditioner.prepare(i)
        if self._weak is not None and kind.guided:
            self._weak.conditioner.prepare(i)
        self._graphs.run(kind, lambda: self._trajectory.advance(lambda x, t: self._predict(x, kind)))

    def _predict(self, x: Tensor, kind: StepKind) -> Tensor:
        """The prediction for x (B, C, X, Y, Z) at the current timestep, with guidance if `kind` has it, in fp32."""
        network, weak, index, scale = self._network, self._weak, self._trajectory.index, self._settings.guidance.scale
        conditioning = network.conditioner.at(index)  # for the order of the rows, see `PromptRows`
        if kind.guided and weak is None:
            return guided_prediction(network.evaluate(torch.cat([x, x]), conditioning, kind), scale)
        predicted = network.evaluate(x, _first_rows(conditioning, len(x)), kind).float()
        if not kind.guided or weak is None:
            return predicted
        worse = weak.evaluate(x, _first_rows(weak.conditioner.at(index), len(x)), kind)
        return extrapolate(predicted, worse.float(), scale)

    def _make_capture(self, optimizations: Optimizations) -> Callable | None:
        """The function that captures a step; None if every step runs eagerly."""
        possible = (
            optimizations.cuda_graph and self._device.type == "cuda" and isinstance(self._settings.plan, SamplingPlan)
        )
        return CudaGraphCapture(self._device) if possible else None

    def _scheduler_trajectory(self, x_T: Tensor, seeds: Sequence[int]) -> SchedulerTrajectory:
        """A new copy of the diffusers scheduler for each batch, because a scheduler keeps its own state."""
        settings = self._settings
        return SchedulerTrajectory(
            settings.plan, x_T, seeds, num_inference_steps=settings.num_inference_steps, prediction=settings.prediction
        )


class _Network:
    """A network with the conditioning of its steps, and with the features that it reuses.

    Args:
        model: the denoiser.
        settings: the settings of the request.
        optimizations: the sampler's optimizations.
        timesteps: (E,), one per evaluation.
        batch_size: B.
    """

    def __init__(
        self,
        model: DiffusionModel,
        settings: LoopSettings,
        optimizations: Optimizations,
        timesteps: Tensor,
        batch_size: int,
    ):
        unet: Any = getattr(model, "unet", model)
        assert isinstance(unet, UNet3d)
        # dynamic=False: compiled separately for each shape.
        wrap: Callable = (lambda f: torch.compile(f, dynamic=False)) if optimizations.compile else (lambda f: f)
        self._unet, self._reuse = unet, settings.reuse
        self._denoise = wrap(unet.denoise)
        self._denoise_keeping, self._denoise_reusing = wrap(denoise_keeping), wrap(denoise_reusing)
        self._features: dict[bool, Tensor] = {}  # by `guided`: with guidance there are twice as many rows
        self.conditioner: Conditioner
        if optimizations.precompute_conditioning:
            self.conditioner = ConditioningCache(
                model, timesteps, row_by_row=settings.row_by_row, batch_size=batch_size
            )
        else:
            self.conditioner = UncachedConditioning(model, timesteps)

    def evaluate(self, x: Tensor, conditioning: Conditioning, kind: StepKind) -> Tensor:
        """The network's output, from the whole network or from the stored feature."""
        if self._reuse is None:
            return self._denoise(x, conditioning)
        if kind.feature == "reuse":
            return self._denoise_reusing(self._unet, x, conditioning, self._reuse.depth, self._features[kind.guided])
        noise, feature = self._denoise_keeping(self._unet, x, conditioning, self._reuse.depth)
        if kind.guided not in self._features:
            self._features[kind.guided] = torch.empty_like(feature)  # outside the memory pool of the graphs
        self._features[kind.guided].copy_(feature)
        return noise


def _check_prediction(given: str, trained: str) -> None:
    if given != trained:
        why = f"prediction is '{given}', but the network was trained to predict '{trained}'"
        fix = "leave prediction out: the checkpoint decides (scheduler.prediction in its config.json)"
        raise ConfigError(why, field="prediction", fix=fix)


def _first_rows(conditioning: Conditioning, count: int) -> Conditioning:
    """The conditional rows: the first `count` rows, or a single row expanded."""

    def take(tensor: Tensor) -> Tensor:
        return tensor.expand(count, *tensor.shape[1:]) if len(tensor) == 1 else tensor[:count]

    pairs = tuple((take(keys), take(values)) for keys, values in conditioning.keys_values)
    return Conditioning(tuple(map(take, conditioning.shifts)), pairs, None)
