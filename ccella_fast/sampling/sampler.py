"""`FastSampler`: generates volumes from reports or text features."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ccella_fast import hardware
from ccella_fast.checkpoint import Checkpoint, load_checkpoint
from ccella_fast.config import Config
from ccella_fast.deprecation import DeprecatedAttribute, deprecated_arguments
from ccella_fast.errors import ConfigError, NonFiniteError
from ccella_fast.models import DiffusionModel, build_model
from ccella_fast.models.autoencoder import Autoencoder
from ccella_fast.models.feature_reuse import check_depth
from ccella_fast.processes import resolve_device
from ccella_fast.sampling import memory, pretrained
from ccella_fast.sampling.autoguidance import check_scale, check_weak_model, weak_metadata
from ccella_fast.sampling.decoding import Decoded, Decoder
from ccella_fast.sampling.denoising import DenoisingLoop, LoopSettings
from ccella_fast.sampling.onednn_prepack import can_pack, prepack_convolutions
from ccella_fast.sampling.optimizations import (
    Optimizations,
    apply_optimizations,
    check_backends,
    resolve_dtype,
    uses_channels_last,
)
from ccella_fast.sampling.output import REFERENCE_INTENSITY, GeneratedVolume, OutputVolume, OutputWriter, Result
from ccella_fast.sampling.plan import plan_request
from ccella_fast.sampling.prompts import Prompts
from ccella_fast.sampling.request import Request
from ccella_fast.sampling.text_features import TextFeatureCache
from ccella_fast.sampling.trained_on import class_head_state, warn_of_untrained_spacings

_MAX_LOOPS = 2  # one for full batches, one for the last batch of a request


@dataclass(frozen=True)
class CheckedRequest:
    """A valid request with all values that follow from it and the sampler's configuration."""

    request: Request
    prompts: Prompts
    loop_settings: LoopSettings
    latent_shape: list[int]
    batch_size: int
    writer: OutputWriter
    outputs: list[OutputVolume]


class FastSampler:
    """Generates volumes from reports or text features.

    Example::

        sampler = FastSampler.from_checkpoint("model")
        result = sampler(reports=["PI-RADS 5 lesion, left"], seeds=[0, 1], num_inference_steps=30, solver="dpmpp_2m")
        result.save("samples")

    A call takes the fields of `Request` as keywords. A seed gives the same noise, bit for bit, in any batch and on any number
    of processes. The volumes agree up to rounding, and on a CPU bit for bit with batch_invariant=True.

    The model and the autoencoder are not modified: weights that already have the device, dtype and layout are shared with them,
    others are copied (in bf16, half the size of the fp32 model). After further training, create a new sampler.

    Args:
        model: from `build_model` or `load_checkpoint`.
        autoencoder: None: only latents can be generated, with decode=False.
        scale_factor: the factor that latents were multiplied by in training: a number, or one per sequence.
        device: default: the model's.
        dtype: "auto" (bf16 on CUDA and on CPUs with bf16 instructions, otherwise fp32), a dtype or its name.
        config: the configuration of the training; default: the default grid, schedule and encoder.
        optimizations: see `Optimizations`.
        text_encoder: an object with `encode(reports).features` and `identity`; default: the configured encoder, loaded when
            reports are given and released afterwards.
        intensity_scale: by sequence, the factor from [0, 1] to the intensities of written volumes.
        origin: the origin of the weights, for the sidecars of written volumes.
        autoguidance: a weaker model of the same training, from `load_checkpoint`. Guidance is then against its prediction for
            the same report, in place of that for the null report.

    Raises:
        ConfigError: an argument is invalid.
    """

    levers = DeprecatedAttribute("optimizations")

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
        autoguidance: Checkpoint | None = None,
    ):
        if not isinstance(model, DiffusionModel):
            why = f"the model must be a DiffusionModel of this package, got an object of type {type(model).__name__}"
            fix = "use build_model or load_checkpoint; for other networks, use ccella_fast.sample"
            raise ConfigError(why, field="model", fix=fix)
        if not isinstance(autoencoder, Autoencoder | None):
            kind = type(autoencoder).__name__
            why = f"the autoencoder must be an Autoencoder of this package, got an object of type {kind}"
            fix = "use load_autoencoder, from_checkpoint(vae=...), or no autoencoder and decode=False"
            raise ConfigError(why, field="autoencoder", fix=fix)
        self.optimizations = optimizations or Optimizations()
        self.device = resolve_device(next(model.parameters()).device if device is None else device)
        self.dtype = resolve_dtype(dtype, self.device)
        check_backends(self.device, self.dtype)
        if self.device.type == "cpu" and self.dtype == torch.bfloat16:
            hardware.warn_of_emulated_bf16("use dtype float32 or auto for sampling")
        self.config = config or pretrained.config_of(model, autoencoder)
        self.origin = origin or pretrained.Provenance.of_objects(self.config)
        last = uses_channels_last(self.optimizations, self.dtype, self.device)
        self._memory_format = torch.channels_last_3d if last else torch.contiguous_format
        self.sequences: list[str] = list(self.config.data.sequences)
        self.scale_factor = pretrained.scale_factors(scale_factor, self.sequences)
        if autoguidance is not None:
            check_weak_model(self.config, self.scale_factor, autoguidance)
        self.model = self._optimized(model)
        self.weak_model = None if autoguidance is None else self._optimized(autoguidance.model)
        self._weak_metadata = {} if autoguidance is None else weak_metadata(autoguidance)
        self.autoencoder = None
        if autoencoder is not None:
            with torch.device("meta"):
                vae_twin = Autoencoder(autoencoder.config)
            self.autoencoder = apply_optimizations(vae_twin, autoencoder, self.optimizations, self.dtype, self.device)
        scales = intensity_scale or {}
        self.intensity_scale = {name: scales.get(name, REFERENCE_INTENSITY[name]) for name in self.sequences}
        #: whether predicted classes mean something: "trained", "untrained" or "unknown"; None if the variant predicts none
        self.class_head = class_head_state(self.config, self.origin.trained_on)
        self._loops: dict[Any, DenoisingLoop] = {}
        self._known_spacings: set[tuple[float, ...]] = set()
        self._text_features = TextFeatureCache(self.config, text_encoder, checks_length=config is not None)
        overlaps = self.device.type == "cuda" and self.optimizations.overlap_decode
        stream = torch.cuda.Stream(self.device) if overlaps else None
        self._decoder = Decoder(self.autoencoder, self.config.model.latent_channels, self.scale_factor, stream)

    def _optimized(self, model: DiffusionModel) -> DiffusionModel:
        """A model with the weights of `model`, for this sampler's device, dtype and layout."""
        with torch.device("meta"):
            twin = build_model(model.config)
        result = apply_optimizations(twin, model, self.optimizations, self.dtype, self.device)
        packed = self.optimizations.packed_weights
        if packed is None:
            packed = not self.optimizations.compile
        last = self._memory_format == torch.channels_last_3d
        if packed and last and can_pack(self.dtype, self.device):
            prepack_convolutions(result)
        return result

    def __repr__(self) -> str:
        data, dtype = self.config.data, str(self.dtype).removeprefix("torch.")
        size, spacing = (" x ".join(f"{value:g}" for value in values) for values in (data.dim, data.spacing))
        decoded = "" if self.autoencoder else ", no autoencoder"
        name = f"{self.config.model.variant}, {', '.join(self.sequences)}"
        return f"FastSampler({name}, {size} voxels of {spacing} mm, {dtype} on {self.device}{decoded})"

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
        autoguidance: str | Path | Checkpoint | None = None,
    ) -> FastSampler:
        """Load a sampler from files, whose hashes are verified.

        Args:
            path: a run folder, a step folder, a folder written by `save_pretrained`, a reference `.pt`, or a loaded
                `Checkpoint`.
            device: default: the GPU if there is one.
            dtype: see the class.
            vae: the autoencoder, if the checkpoint does not contain one.
            weights: "ema" or "raw"; None for the averaged weights if there are any.
            optimizations: see `Optimizations`.
            text_encoder: see the class.
            autoguidance: the weak model, as `path`.

        Raises:
            ConfigError: the device, the dtype or a requested kernel backend cannot be used here; raised before anything is
                loaded.
            CheckpointError: a file is missing, damaged or not a checkpoint.
        """
        device = resolve_device(device)
        dtype = resolve_dtype(dtype, device)
        check_backends(device, dtype)
        loaded = pretrained.load_pretrained(path, vae=vae, weights=weights)
        if isinstance(autoguidance, (str, Path)):
            autoguidance = load_checkpoint(autoguidance)
        return cls(
            loaded.checkpoint.model, loaded.autoencoder, loaded.checkpoint.scale_factor, device, dtype,
            config=loaded.checkpoint.config, optimizations=optimizations, text_encoder=text_encoder,
            intensity_scale=loaded.checkpoint.intensity_scale, origin=loaded.origin, autoguidance=autoguidance,
        )  # fmt: skip

    @classmethod
    def from_pretrained(cls, path: str | Path, **options: Any) -> FastSampler:
        """Load a sampler from a folder written by `save_pretrained`, or from a repository with such files.

        Args:
            path: the folder, or the id of the repository on the Hugging Face hub.
            options: as for `from_checkpoint`.

        Raises:
            CheckpointError: `path` is neither, or a file is missing or damaged.
        """
        return cls.from_checkpoint(pretrained.local_folder(path), **options)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the sampler to a new folder.

        The files are config.json, model.safetensors (in the sampler's dtype), training_state.json, vae/, and manifest.json with
        the SHA-256 hashes of the others.

        Raises:
            ConfigError: the folder exists.
        """
        pretrained.save_pretrained_files(Path(folder), self.parts())

    def push_to_hub(
        self,
        repo_id: str,
        *,
        license: str | Path | None = None,
        vae_license: str | Path | None = None,
        evaluation: str | Path | None = None,
        text_encoder: str | None = None,
        private: bool = False,
        token: str | None = None,
        out: str | Path | None = None,
    ) -> str:
        """Upload the folder of `save_pretrained` with a model card to the Hugging Face hub, in one commit.

        Everything is checked before the first request. The sampler must come from a checkpoint folder; its weights are shared
        in its dtype, so load it with dtype="float32". The configuration is shared without its paths. An earlier upload of the
        repository is replaced, and stays in its history.

        Args:
            repo_id: OWNER/NAME; the repository is created if it does not exist.
            license: of the diffusion model: an identifier of the hub such as "cc-by-nc-4.0", or a file with the text.
            vae_license: of the autoencoder.
            evaluation: the folder that `ccella-fast evaluate` wrote for samples of this model.
            text_encoder: the name of the encoder on the hub, if the model was trained with a folder of this machine.
            private: whether only the owner can see the repository.
            token: default: that of `hf auth login` or HF_TOKEN.
            out: a new folder to write to instead: nothing is uploaded, and licenses may be missing.

        Returns:
            The address of the repository, or the folder.

        Raises:
            ConfigError: an argument is missing or wrong, the evaluation is of another model, or the hub refuses.
            CheckpointError: there is no autoencoder, or the sampler does not come from a checkpoint folder.
            DataError: the evaluation is missing or damaged.
        """
        from ccella_fast.sampling.hub import Upload  # needs more than sampling does

        upload = Upload.check(
            repo_id, license=license, vae_license=vae_license, evaluation=evaluation, text_encoder=text_encoder,
            private=private, token=token, out=out,
        )  # fmt: skip
        return upload.run(self.parts())

    def parts(self) -> pretrained.SamplerParts:
        """What is saved and shared of the sampler."""
        state = {
            "step": self.origin.metadata.get("step", 0),
            "scale_factor": self.scale_factor,
            "intensity_scale": self.intensity_scale,
            "trained_on": self.origin.trained_on,
            "averaged": self.origin.averaged,
        }
        if self.origin.start_weights is not None:
            state["start_weights"] = self.origin.start_weights
        return pretrained.SamplerParts(self.config, self.model, self.autoencoder, state, self.origin)

    @deprecated_arguments(num_steps="num_inference_steps")
    def __call__(self, **arguments: Any) -> Result:
        """Generate all volumes of a request.

        Args:
            arguments: the fields of `Request`.

        Raises:
            ConfigError: an argument is invalid; raised before any work.
            NonFiniteError: a volume is not finite, because the model has diverged.
        """
        checked = self.check(Request(**arguments))
        return Result.from_volumes(list(self.generate(checked)), checked.writer, checked.outputs)

    @deprecated_arguments(num_steps="num_inference_steps")
    def iter(self, **arguments: Any) -> Iterator[GeneratedVolume]:
        """Generate the same volumes one by one, as they are finished.

        On CUDA, a batch is decoded on a second stream while the next one is denoised; on a CPU, they run one after the other.
        """
        return self.generate(self.check(Request(**arguments)))

    def check(self, request: Request) -> CheckedRequest:
        """Check a request, encode its reports and compute its sampling plan.

        Raises:
            ConfigError: a value is invalid, or the sampler does not support the request.
        """
        config = self.config
        plan = plan_request(request, config)
        if request.decode and self.autoencoder is None:
            fix = "give an autoencoder (vae=), or call with decode=False for latents"
            raise ConfigError("this sampler has no autoencoder to decode with", field="decode", fix=fix)
        settings = plan.loop_settings
        grid = [size * config.autoencoder.factor for size in plan.latent_shape[1:]]
        new = [spacing for spacing in plan.volumes.spacings if (*spacing, *grid) not in self._known_spacings]
        self._known_spacings |= {(*spacing, *grid) for spacing in new}  # a warning is given once
        warn_of_untrained_spacings(new, grid, config, self.origin.trained_on)
        if self.weak_model is not None:
            check_scale(settings.guidance)
            if request.reuse is not None:
                check_depth(self.weak_model.config, request.reuse.depth)
        reports = self._text_features.features_for(request, guided=self._guides_by_null(settings))
        prompts = Prompts(plan.volumes, reports, has_null_class=config.training.class_dropout > 0)
        request_metadata = {
            **self.origin.metadata,
            **self._weak_metadata,
            **plan.request_metadata(request),
            "dtype": str(self.dtype).removeprefix("torch."),
            "text_encoder": reports.encoder,
        }
        writer = OutputWriter(request_metadata, self.sequences, self.intensity_scale, self.class_head)
        outputs = [writer.describe_volume(k, prompts.metadata_of(k)) for k in range(len(prompts))]
        return CheckedRequest(request, prompts, settings, plan.latent_shape, plan.batch_size, writer, outputs)

    @deprecated_arguments(run="checked", only="indices")
    def generate(self, checked: CheckedRequest, indices: Sequence[int] | None = None) -> Iterator[GeneratedVolume]:
        """Generate the volumes of a checked request, or only those with the given indices."""
        chosen = list(range(len(checked.prompts))) if indices is None else list(indices)
        size = checked.batch_size
        return self.generate_batches(checked, [chosen[k : k + size] for k in range(0, len(chosen), size)])

    def generate_batches(self, checked: CheckedRequest, batches: Sequence[list[int]]) -> Iterator[GeneratedVolume]:
        """Generate the volumes with the given indices, those of each list together.

        On one machine, a volume has the same bits if it is generated together with the same volumes.
        """
        needed = self._check_memory(checked, max(map(len, batches))) if batches else 0
        previous: Iterator[GeneratedVolume] = iter(())
        done, total = 0, sum(map(len, batches))
        for batch in batches:
            description = f"sampling {done + 1}-{done + len(batch)} of {total}"
            done += len(batch)
            with memory.out_of_memory(f"denoising {len(batch)} at a time", needed):
                latents, probabilities = self._denoise(checked, batch, description)
            decoded = self._decoder.submit(latents, probabilities, decode=checked.request.decode)
            volumes = self._collect(checked, batch, decoded)
            if not self._decoder.overlaps:
                yield from volumes
                continue
            # Decoding this batch overlaps with denoising the next one, so its volumes are yielded one iteration later.
            yield from previous
            previous = volumes
        yield from previous

    @torch.inference_mode(False)  # a loop is used again, and outside of this mode its buffers could not be written
    def _denoise(self, checked: CheckedRequest, batch: list[int], description: str) -> tuple[Tensor, Tensor | None]:
        """The latents (B, C, X, Y, Z) and the class probabilities (B, classes) of the volumes of a batch."""
        settings, shape = checked.loop_settings, checked.latent_shape
        prompts = checked.prompts.rows(batch, guided=self._guides_by_null(settings), device=self.device)
        key = (settings, tuple(shape), len(batch), prompts.shape_signature)
        loop = self._loops.pop(key, None)
        while len(self._loops) >= _MAX_LOOPS:
            self._loops.pop(next(iter(self._loops)))
        if loop is None:
            loop = DenoisingLoop(
                self.model, settings, self.optimizations, len(batch), shape, self._memory_format, self.weak_model
            )
        seeds = [checked.prompts.seeds[k] for k in batch]
        latents, logits = loop.run(seeds, prompts, description=description, progress=checked.request.progress)
        self._loops[key] = loop  # not kept if it was interrupted or ran out of memory
        if logits is None or self.class_head == "untrained":
            return latents, None
        return latents, logits.float()[: len(batch)].softmax(1).expand(len(batch), -1)

    def _guides_by_null(self, settings: LoopSettings) -> bool:
        """Whether guidance is against the null report, for which the number of rows doubles."""
        return settings.guidance.on and self.weak_model is None

    def _collect(
        self, checked: CheckedRequest, batch: list[int], decoded: Iterator[Decoded]
    ) -> Iterator[GeneratedVolume]:
        for k, each in zip(batch, decoded, strict=True):
            if not each.finite:
                why = "the generated volume is not finite: the model has diverged"
                fix = "use an earlier checkpoint" + ("" if self.dtype == torch.float32 else ", or dtype float32")
                raise NonFiniteError(why, path=self.origin.path, field=f"{self.origin.weights} weights", fix=fix)
            yield GeneratedVolume(k, checked.prompts.seeds[k], each.volume, each.latent, each.class_probabilities)

    def _check_memory(self, checked: CheckedRequest, count: int) -> int:
        """The estimate of the bytes that a batch of `count` volumes needs, which must be free."""
        settings, shape = checked.loop_settings, checked.latent_shape
        rows = count * (2 if self._guides_by_null(settings) else 1)
        models = [self.config.model] + ([] if self.weak_model is None else [self.weak_model.config])
        needed = max(memory.activation_bytes(model, rows, shape[1:], self.dtype) for model in models)
        if self.config.model.traits.text and self.optimizations.precompute_conditioning:
            steps = settings.num_inference_steps
            needed += sum(memory.cache_bytes(model, rows, steps, self.dtype) for model in models)
        memory.check_memory(needed, self.device, f"a batch of {count} latents {shape}")
        return needed
