"""The baseline of the benchmarks: arithmetic, precision policy and loops of the reference implementation, in eager mode.

Like the reference implementation, it is built from MONAI's `DiffusionModelUNetMaisi`, `AutoencoderKlMaisi` and
`DDPMScheduler`, with a plain adapter (docs/explanation/method.md, sections 2 to 4). It uses fp16 autocast, a GradScaler and
MONAI's flash attention on a GPU, and fp32 on a CPU. It keeps what is slow in the original: the adapter runs at every step, a
timestep is copied to the device at every step, four values are read back to the host in a training step, and AdamW is torch's
default.

Weights are not copied: the parameters of `shared_with(model)` are those of one of our models. The outputs must therefore agree,
which is checked before any speedup is reported.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ccella_fast.config import AutoencoderConfig, ModelConfig, SchedulerConfig
from ccella_fast.losses import focal_terms
from ccella_fast.models.autoencoder import Autoencoder
from ccella_fast.models.embeddings import sinusoidal
from ccella_fast.models.ldm import DiffusionModel


def autocast(device: torch.device) -> torch.autocast:
    """The reference's precision policy: fp16 autocast on a GPU, fp32 on a CPU."""
    return torch.autocast(device.type, torch.float16, enabled=device.type == "cuda")


class AdaLayerNorm(nn.Module):
    """LayerNorm with scale and shift from a time embedding."""

    def __init__(self, width: int):
        super().__init__()
        self.linear = nn.Linear(width, 2 * width)
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)

    def forward(self, tokens: Tensor, embedding: Tensor) -> Tensor:
        """Normalize tokens (B, N, W) with an embedding (B, 1, W)."""
        shift, scale = self.linear(F.silu(embedding)).chunk(2, dim=-1)
        return self.norm(tokens) * (1 + scale) + shift


class SquaredRelu(nn.Module):
    """The square of ReLU."""

    def forward(self, x: Tensor) -> Tensor:
        """Elementwise."""
        return torch.square(F.relu(x))


class ReferencePerceiverBlock(nn.Module):
    """Perceiver block of the adapter: latents attend to themselves and to the text."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(width, 4 * width))
        self.mlp.add_module("sq_relu", SquaredRelu())
        self.mlp.add_module("c_proj", nn.Linear(4 * width, width))
        self.ln_1, self.ln_2, self.ln_ff = (AdaLayerNorm(width) for _ in range(3))

    def forward(self, latents: Tensor, text: Tensor, embedding: Tensor) -> Tensor:
        """Latents (B, N, W), text (B, L, W) and embedding (B, 1, W) to latents (B, N, W)."""
        queries = self.ln_1(latents, embedding)
        source = torch.cat([queries, self.ln_2(text, embedding)], dim=1)
        latents = latents + self.attn(queries, source, source, need_weights=False)[0]
        return latents + self.mlp(self.ln_ff(latents, embedding))


class ClassAdaptor(nn.Module):
    """Class head on the latents of one block."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.num_latents * config.cross_attention_dim, config.class_head_dim)
        self.fc2 = nn.Linear(config.class_head_dim, config.num_classes)

    def forward(self, latents: Tensor) -> Tensor:
        """Latents (B, N, W) to logits (B, classes)."""
        return self.fc2(F.relu(self.fc1(latents.flatten(1))))


class ReferenceConnector(nn.Module):
    """The adapter's Perceiver blocks, each with a class head."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        width = config.cross_attention_dim
        self.latents = nn.Parameter(torch.empty(config.num_latents, width))
        self.time_aware_linear = nn.Linear(width, width)
        self.proj_in = nn.Linear(config.input_dim, width)
        blocks = range(config.adapter_blocks)
        self.perceiver_blocks = nn.ModuleList(ReferencePerceiverBlock(width, config.adapter_heads) for _ in blocks)
        self.cascade_blocks = nn.ModuleList(ClassAdaptor(config) for _ in blocks)

    def forward(self, text: Tensor, embedding: Tensor) -> tuple[Tensor, Tensor]:
        """Text (B, L, E) and embedding (B, 1, W) to latents (B, N, W) and the heads' logits (B, blocks x classes)."""
        latents = self.latents.unsqueeze(0).repeat(len(text), 1, 1) + self.time_aware_linear(F.silu(embedding))
        text = self.proj_in(text)
        hidden = []
        for block, head in zip(self.perceiver_blocks, self.cascade_blocks, strict=True):
            latents = block(latents, text, embedding)
            hidden.append(head(latents))
        return latents, torch.cat(hidden, dim=1)


class ReferenceModel(nn.Module):
    """CCELLA from MONAI's U-Net and a plain adapter."""

    def __init__(self, config: ModelConfig, *, flash: bool):
        super().__init__()
        if config.variant != "CCELLA":
            raise ValueError(
                f"variant must be CCELLA, the only one that the reference implements, got {config.variant}"
            )
        from monai.apps.generation.maisi.networks.diffusion_model_unet_maisi import DiffusionModelUNetMaisi

        latent = sum(config.latent_channels)
        self.config = config
        self.unet = DiffusionModelUNetMaisi(
            3, latent, latent,
            num_res_blocks=config.num_res_blocks, num_channels=config.num_channels,
            attention_levels=config.attention_levels, num_head_channels=config.num_head_channels,
            norm_num_groups=config.norm_num_groups, norm_eps=config.norm_eps, with_conditioning=True,
            cross_attention_dim=config.cross_attention_dim, upcast_attention=True, use_flash_attention=flash,
            include_top_region_index_input=True, include_spacing_input=True,
        )  # fmt: skip
        # The class vector replaces MAISI's body-region vector; it has two elements instead of four.
        first = self.unet.top_region_index_layer[0]
        self.unet.top_region_index_layer[0] = nn.Linear(config.num_classes, first.out_features)
        self.ella = nn.Module()
        self.ella.time_embedding = nn.Module()
        self.ella.time_embedding.linear_1 = nn.Linear(config.adapter_time_dim, config.cross_attention_dim)
        self.ella.time_embedding.linear_2 = nn.Linear(config.cross_attention_dim, config.cross_attention_dim)
        self.ella.connector = ReferenceConnector(config)
        self.classifier = nn.Linear(config.adapter_blocks * config.num_classes, config.num_classes)

    def forward(self, x: Tensor, timesteps: Tensor, *, spacing: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Predict noise and class logits.

        Args:
            x: Noisy latent, (B, C, X, Y, Z).
            timesteps: (B,).
            spacing: Millimeters x 100, (B, 3).
            text: Report features, (B, L, E).

        Returns:
            The noise, (B, C, X, Y, Z), and the logits, (B, classes).
        """
        time = self.ella.time_embedding
        wave = sinusoidal(timesteps, self.config.adapter_time_dim).to(text.dtype)
        embedding = time.linear_2(F.silu(time.linear_1(wave)))[:, None]
        context, hidden = self.ella.connector(text, embedding)
        logits = self.classifier(hidden)
        noise = self.unet(
            x, timesteps, context=context, top_region_index_tensor=100 * logits.softmax(dim=1), spacing_tensor=spacing
        )
        return noise, logits


def shared_with(model: DiffusionModel) -> ReferenceModel:
    """A reference that shares its parameters, and so their gradients, with `model`."""
    parameters = dict(model.named_parameters())
    with torch.device("meta"):
        flash = next(iter(parameters.values())).is_cuda
        reference = ReferenceModel(model.config, flash=flash)
    renamed = {name.replace("unet.pirads_layer", "unet.top_region_index_layer"): p for name, p in parameters.items()}
    reference.load_state_dict(renamed, assign=True)
    return reference.train(model.training)


def autoencoder_shared_with(vae: Autoencoder, *, splits: int = 2) -> nn.Module:
    """MONAI's autoencoder on the weights of `vae`, with the settings of the reference's definition file."""
    from monai.apps.generation.maisi.networks.autoencoderkl_maisi import AutoencoderKlMaisi

    config: AutoencoderConfig = vae.config
    parameters = dict(vae.named_parameters())
    with torch.device("meta"):
        reference = AutoencoderKlMaisi(
            3, config.in_channels, config.out_channels, config.num_res_blocks, config.num_channels,
            [False] * len(config.num_channels), latent_channels=config.latent_channels,
            norm_num_groups=config.norm_num_groups, norm_eps=config.norm_eps,
            norm_float16=next(iter(parameters.values())).is_cuda, num_splits=splits, dim_split=1,
            with_encoder_nonlocal_attn=False, with_decoder_nonlocal_attn=False,
        )  # fmt: skip
    reference.load_state_dict(parameters, assign=True)
    return reference.eval()


def scheduler(config: SchedulerConfig, num_inference_steps: int) -> tuple[object, list[int]]:
    """MONAI's DDPM scheduler, and the timestep given to the model at each of its steps.

    With fewer steps than in training, MONAI's own spacing is wrong, because it uses single-step posteriors. Its tables are
    therefore replaced by those of the respaced chain (Nichol and Dhariwal 2021, section 4); arithmetic and cost stay the same.
    """
    from monai.networks.schedulers.ddpm import DDPMScheduler

    total = config.num_train_timesteps
    settings = {"schedule": config.schedule, "beta_start": config.beta_start, "beta_end": config.beta_end}
    chosen = (
        np.linspace(0, total - 1, num_inference_steps).round().astype(int)
        if num_inference_steps > 1
        else np.array([total - 1])
    )
    full = DDPMScheduler(total, clip_sample=False, **settings)
    short = DDPMScheduler(num_inference_steps, clip_sample=False, **settings)
    short.alphas_cumprod = full.alphas_cumprod.double()[torch.as_tensor(chosen)].float()
    before = torch.cat([torch.ones(1), short.alphas_cumprod[:-1]])
    short.alphas = short.alphas_cumprod / before
    short.betas = 1 - short.alphas
    short.set_timesteps(num_inference_steps)
    return short, chosen[::-1].tolist()


@torch.no_grad()
def sample(
    model: Callable, x: Tensor, *, spacing: Tensor, text: Tensor, config: SchedulerConfig, num_inference_steps: int,
    generator: torch.Generator | None = None, policy: torch.autocast | None = None,
) -> Tensor:  # fmt: skip
    """The reference's sampling loop (docs/explanation/method.md, section 4): from noise x (1, C, X, Y, Z) to x_0 in fp32."""
    noise_scheduler, model_timesteps = scheduler(config, num_inference_steps)
    with policy or autocast(x.device):
        for index, timestep in zip(noise_scheduler.timesteps, model_timesteps, strict=True):
            timesteps = (
                torch.Tensor((timestep,)).to(x.device).expand(len(x))
            )  # float32 and copied from the host, as in the original
            noise, _ = model(x, timesteps, spacing=spacing, text=text)
            x, _ = noise_scheduler.step(noise, index, x, generator=generator)
    return x.float()


class ReferenceTrainingStep:
    """The body of the reference's training loop (docs/explanation/method.md, section 3)."""

    def __init__(self, model: ReferenceModel, scheduler_config: SchedulerConfig, *, weight: float):
        from monai.networks.schedulers.ddpm import DDPMScheduler

        device = next(model.parameters()).device
        self.model, self.device, self.weight = model, device, weight
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        self.rate = torch.optim.lr_scheduler.PolynomialLR(self.optimizer, total_iters=100_000, power=2.0)
        self.scaler = torch.amp.GradScaler(device.type, enabled=device.type == "cuda")
        settings = scheduler_config.model_dump(include={"schedule", "beta_start", "beta_end"})
        self.noise_scheduler = DDPMScheduler(scheduler_config.num_train_timesteps, clip_sample=False, **settings)

    def __call__(self, batch: dict[str, Tensor], mark: Callable[[str], None] = lambda name: None) -> float:
        """One step on a batch; returns the loss. `mark(name)` is called at the end of each part."""
        batch = {name: value.to(self.device) for name, value in batch.items()}
        mark("loader")
        self.optimizer.zero_grad(set_to_none=True)
        with self.autocast():
            loss = self.loss(batch)
        mark("forward")
        self.scaler.scale(loss).backward()
        mark("backward")
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.rate.step()
        value = loss.item()  # logged at every iteration
        mark("optimizer")
        return value

    def autocast(self) -> torch.autocast:
        """The precision policy."""
        return autocast(self.device)

    def forward(self, *arguments: Tensor, **conditions: Tensor) -> tuple[Tensor, Tensor]:
        """The model's forward pass."""
        return self.model(*arguments, **conditions)

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """L1 loss of the noise plus the weighted focal loss of the classes that are known."""
        latents, noise, timesteps = batch["latents"], batch["noise"], batch["timesteps"]
        noisy = self.noise_scheduler.add_noise(original_samples=latents, noise=noise, timesteps=timesteps)
        predicted, logits = self.forward(noisy, timesteps, spacing=batch["spacing"], text=batch["text"])
        loss = F.l1_loss(predicted.float(), noise.float())
        known = batch["has_class"].float()
        if torch.sum(known) > 0:  # read back to the host, twice, as in the original
            classes = (focal_terms(logits, batch["pirads"]).sum(1) * known).sum() / torch.sum(known)
            loss = loss + self.weight * classes
        if torch.sum(known) > 0:
            self.class_loss = classes.item()
        return loss
