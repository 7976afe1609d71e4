"""`FastSampler`: reports, or text features, to volumes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ccella_fast import environment
from ccella_fast.checkpoint import Checkpoint
from ccella_fast.config import Config
from ccella_fast.deprecation import deprecated_arguments
from ccella_fast.diffusion.schedule import Schedule
from ccella_fast.diffusion.solvers import Solver, get_solver
from ccella_fast.errors import ConfigError, NonFiniteError
from ccella_fast.models import DiffusionModel, build_model
from ccella_fast.models.autoencoder import Autoencoder
from ccella_fast.sampling import memory, pretrained
from ccella_fast.sampling.decoding import Decoded, Decoder
from ccella_fast.sampling.denoising import DenoisingLoop, LoopSettings
from ccella_fast.sampling.onednn_prepack import can_pack, pack
from ccella_fast.sampling.optimizations import Optimizations, apply_optimizations, channels_last, resolve_dtype
from ccella_fast.sampling.output import REFERENCE_INTENSITY, GeneratedVolume, OutputVolume, OutputWriter, Result
from ccella_fast.sampling.request import Prompts, Request, check_inputs
from ccella_fast.sampling.text_features import TextFeatureCache

_LOOPS = 2  # kept: whole batches, and the rest of a request


@dataclass(frozen=True)
class CheckedRequest:
    """A request whose every part has been checked."""

    request: Request
    prompts: Prompts
    loop: LoopSettings
    latent: list[int]
    batch: int
    writing: OutputWriter
    jobs: list[OutputVolume]


class FastSampler:
    """Generates volumes from reports, or from text features.

    Example::

        sampler = FastSampler.from_checkpoint("model")
        result = sampler(reports=["PI-RADS 5 lesion, left"], seeds=[0, 1], num_steps=30, solver="dpmpp_2m")
        result.save("samples")

    A call takes the fields of `Request` as keywords. A seed gives the same noise, bit for bit, in any batch and on any number
    of processes; the volume then agrees up to rounding, and on a CPU bit for bit with batch_invariant=True.

    The model and the autoencoder are not changed: weights that already have the device, dtype and layout are shared with them,
    the others are copied (in bf16 half the size of the fp32 model). After further training, make a new sampler.

    Args:
        model: from `build_model` or `load_checkpoint`.
        autoencoder: None gives latents only, with decode=False.
        scale_factor: what latents were multiplied by in training: a number, or one per sequence.
        device: default: the model's.
        dtype: "auto" (bf16 on CUDA and on CPUs with instructions for it, else fp32), a dtype or its name.
        config: the training's configuration; default: the reference's grid, schedule and encoder.
        optimizations: see `Optimizations`.
        text_encoder: anything with `encode(reports).features` and `identity`; default: the configuration's, loaded when
            reports arrive and released afterwards.
        intensity_scale: factor by sequence from [0, 1] to the intensities of a written volume.
        origin: where the weights come from, for the sidecars of written volumes.
    """

    @deprecated_arguments(levers="optimizations")
    def __init__(
        self,
        model: DiffusionModel,
        autoencoder: Autoencoder | None = None,
        scale_factor: float | Sequence[float] = 1.0,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype = "auto",
        *,
        config: Config | None = None,
        optimizations: Optimizations | None = None,
        text_encoder: Any = None,
        intensity_scale: Mapping[str, float] | None = None,
        origin: pretrained.Provenance | None = None,
    ):
        if not isinstance(model, DiffusionModel):
            fix = "give what build_model or load_checkpoint made; for other networks there is ccella_fast.sample"
            raise ConfigError(f"a {type(model).__name__} is no model of this package", field="model", fix=fix)
        if not isinstance(autoencoder, Autoencoder | None):
            fix = "give what load_autoencoder made, from_checkpoint(vae=...) with its weights, or none and decode=False"
            raise ConfigError(
                f"a {type(autoencoder).__name__} is no autoencoder of this package", field="autoencoder", fix=fix
            )
        self.optimizations = optimizations or Optimizations()
        self.device = torch.device(device) if device is not None else next(model.parameters()).device
        self.dtype = resolve_dtype(dtype, self.device)
        if self.device.type == "cpu" and self.dtype == torch.bfloat16:
            environment.warn_of_emulated_bf16("choose dtype float32 or auto for sampling")
        self.config = config or pretrained.config_of(model, autoencoder)
        self.origin = origin or pretrained.Provenance.of_objects(self.config)
        last = channels_last(self.optimizations, self.dtype, self.device)
        self._layout = torch.channels_last_3d if last else torch.contiguous_format
        with torch.device("meta"):
            twin = build_model(model.config)
            vae_twin = None if autoencoder is None else Autoencoder(autoencoder.config)
        form = self.optimizations, self.dtype, self.device
        self.model = apply_optimizations(twin, model, *form)
        packs = (
            not self.optimizations.compile
            if self.optimizations.packed_weights is None
            else self.optimizations.packed_weights
        )
        if packs and last and can_pack(self.dtype, self.device):
            pack(self.model)
        self.autoencoder = None
        if autoencoder is not None and vae_twin is not None:
            self.autoencoder = apply_optimizations(vae_twin, autoencoder, *form)
        self.sequences: list[str] = list(self.config.data.sequences)
        self.scale_factor = pretrained.scale_factors(scale_factor, self.sequences)
        given = intensity_scale or {}
        self.intensity_scale = {name: given.get(name, REFERENCE_INTENSITY[name]) for name in self.sequences}
        self._loops: dict[Any, DenoisingLoop] = {}
        self._reports = TextFeatureCache(self.config, text_encoder, checks_length=config is not None)
        overlapped = self.device.type == "cuda" and self.optimizations.overlap_decode
        stream = torch.cuda.Stream(self.device) if overlapped else None
        self._decoder = Decoder(self.autoencoder, self.config.model.latent_channels, self.scale_factor, stream)

    @classmethod
    @deprecated_arguments(levers="optimizations")
    def from_checkpoint(
        cls,
        path: str | Path | Checkpoint,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype = "auto",
        vae: str | Path | None = None,
        weights: str | None = None,
        optimizations: Optimizations | None = None,
        text_encoder: Any = None,
    ) -> FastSampler:
        """A sampler from files. Every hash is checked.

        Args:
            path: a run folder, a step folder, what `save_pretrained` wrote, a reference `.pt`, or a loaded `Checkpoint`.
            device: default: the GPU if there is one.
            dtype: as for the class, as are `optimizations` and `text_encoder`.
            vae: the autoencoder, where the checkpoint holds none.
            weights: "ema", "raw", or None for the averaged ones where there are any.
            optimizations: see `Optimizations`.
            text_encoder: see the class.

        Raises:
            CheckpointError: naming the file.
        """
        loaded = pretrained.load_pretrained(path, vae=vae, weights=weights)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        return cls(
            loaded.checkpoint.model, loaded.autoencoder, loaded.checkpoint.scale_factor, device, dtype,
            config=loaded.checkpoint.config, optimizations=optimizations, text_encoder=text_encoder,
            intensity_scale=loaded.checkpoint.intensity_scale, origin=loaded.origin,
        )  # fmt: skip

    @classmethod
    def from_pretrained(cls, path: str | Path, **options: Any) -> FastSampler:
        """A folder that `save_pretrained` wrote, or the id of such a repository on the Hugging Face hub. options: as for
        `from_checkpoint`."""
        return cls.from_checkpoint(pretrained.local_folder(path), **options)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json, model.safetensors (in this sampler's dtype), training_state.json, vae/ and, last, manifest.json
        with their SHA-256. `folder` must not exist yet."""
        pretrained.save_pretrained_files(self, Path(folder))

    def __call__(self, **arguments: Any) -> Result:
        """All volumes of a request; arguments: the fields of `Request`. Raises ConfigError before any work for what is not
        possible, and NonFiniteError when the model has diverged."""
        run = self.check(Request(**arguments))
        return Result.of(list(self.generate(run)), run.writing, run.jobs)

    def iter(self, **arguments: Any) -> Iterator[GeneratedVolume]:
        """The same volumes one by one, as they are done. On CUDA a batch is decoded while the next is denoised, on a second
        stream; on a CPU one after the other."""
        return self.generate(self.check(Request(**arguments)))

    def check(self, request: Request) -> CheckedRequest:
        """Refuse what is not possible, encode the reports, and plan."""
        config, settings = self.config, self.config.sampling
        latent, batch, guidance = request.shape(config), request.batch(config), request.guidance(config)
        if request.decode and self.autoencoder is None:
            fix = "give an autoencoder (vae=), or call with decode=False for latents"
            raise ConfigError("this sampler has no autoencoder", field="decode", fix=fix)
        solver: Any = settings.solver if request.solver is None else request.solver
        num_steps = settings.num_inference_steps if request.num_steps is None else request.num_steps
        prediction = request.prediction or settings.prediction
        spacing = request.timestep_spacing or settings.timestep_spacing
        schedule = Schedule.from_config(config.scheduler)
        plan = get_solver(solver) if isinstance(solver, str) else solver
        if isinstance(plan, Solver):
            plan = plan.plan(schedule, num_steps, prediction=prediction, timestep_spacing=spacing)
        loop = LoopSettings(
            plan,
            solver,
            num_steps,
            prediction,
            spacing,
            len(schedule),
            guidance,
            request.reuse,
            request.batch_invariant,
        )
        has_text = not (request.reports is None and request.text is None)
        given = {"pirads": request.pirads, "class_override": request.class_override}
        check_inputs(config.model.traits, has_text=has_text, **given)
        reports = self._reports.of(request, guided=guidance.on)
        prompts = Prompts(request, config, reports)
        facts = {
            **self.origin.facts,
            "solver": solver if isinstance(solver, str) else repr(getattr(solver, "config", solver)),
            "num_inference_steps": num_steps,
            "prediction": prediction,
            "timestep_spacing": spacing,
            "guidance_scale": guidance.scale,
            "guidance_interval": list(guidance.interval),
            "reuse": request.reuse and [request.reuse.interval, request.reuse.depth],
            "latent_shape": latent,
            "dtype": str(self.dtype).removeprefix("torch."),
            "batch_invariant": request.batch_invariant,
            "text_encoder": reports.encoder,
        }
        writing = OutputWriter(facts, self.sequences, self.intensity_scale)
        jobs = [writing.job(k, *prompts.described(k)) for k in range(len(prompts))]
        return CheckedRequest(request, prompts, loop, latent, batch, writing, jobs)

    def generate(self, run: CheckedRequest, only: Sequence[int] | None = None) -> Iterator[GeneratedVolume]:
        """The volumes of a checked request, or those of them that `only` lists."""
        todo = list(range(len(run.prompts))) if only is None else list(only)
        if todo:
            self._check_memory(run, min(run.batch, len(todo)))
        waiting: Iterator[GeneratedVolume] = iter(())
        for start in range(0, len(todo), run.batch):
            batch = todo[start : start + run.batch]
            title = f"sampling {start + 1}-{start + len(batch)} of {len(todo)}"
            with memory.out_of_memory(f"denoising {len(batch)} at a time"):
                latents, probabilities = self._denoise(run, batch, title)
            done = self._decoder.start(latents, probabilities, decode=run.request.decode)
            ready = self._collect(run, batch, done)
            if not self._decoder.overlaps:
                yield from ready
                continue
            # This batch is decoded while the next one is denoised: what is handed out is the batch before.
            yield from waiting
            waiting = ready
        yield from waiting

    def _denoise(self, run: CheckedRequest, batch: list[int], title: str) -> tuple[Tensor, Tensor | None]:
        prompts = run.prompts.rows(batch, guided=run.loop.guidance.on, device=self.device)
        key = (run.loop, tuple(run.latent), len(batch), prompts.form)
        loop = self._loops.pop(key, None)
        while len(self._loops) >= _LOOPS:
            self._loops.pop(next(iter(self._loops)))
        if loop is None:
            loop = DenoisingLoop(self.model, run.loop, self.optimizations, len(batch), run.latent, self._layout)
        seeds = [run.prompts.seeds[k] for k in batch]
        latents, logits = loop.run(seeds, prompts, description=title, progress=run.request.progress)
        self._loops[key] = loop  # one that was stopped half-way, or had no memory, is not kept
        return latents, None if logits is None else logits.float()[: len(batch)].softmax(1).expand(len(batch), -1)

    def _collect(self, run: CheckedRequest, batch: list[int], done: Iterator[Decoded]) -> Iterator[GeneratedVolume]:
        for k, each in zip(batch, done, strict=True):
            if not each.finite:
                why = "the generated volume is not finite: the model has diverged"
                fix = "use a checkpoint from before" + ("" if self.dtype == torch.float32 else ", or dtype float32")
                raise NonFiniteError(why, path=self.origin.path, field=f"{self.origin.weights} weights", fix=fix)
            yield GeneratedVolume(k, run.prompts.seeds[k], each.volume, each.latent, each.class_probabilities)

    def _check_memory(self, run: CheckedRequest, count: int) -> None:
        model, rows = self.config.model, count * (2 if run.loop.guidance.on else 1)
        needed = memory.activation_bytes(model, rows, run.latent[1:], self.dtype)
        if model.traits.text and self.optimizations.precompute_conditioning:
            needed += memory.table_bytes(model, rows, run.loop.num_steps, self.dtype)
        memory.check_memory(needed, self.device, f"a batch of {count} latents {run.latent}")
