"""A MONAI inference script before and after `speed_up`, with the same networks, noise and DDIM steps.

    python examples/monai_inference.py    # small, untrained networks: about 6 s on two CPU cores, most of it to import MONAI
    python examples/monai_inference.py --device cuda --width 64 --grid 64 64 32 --timesteps 1000

Before: networks and scheduler of MONAI, as in its tutorials. After: `speed_up` on both networks, and `ccella_fast.sample`
instead of the loop. The script prints the replaced modules, the difference of the two volumes and the ratio of the two times.

Both use every timestep of the schedule. With fewer timesteps, DDIM in MONAI 1.6 is inconsistent: the spacing of its timesteps
differs from the one with which it looks up the previous noise level. `sample` does not reproduce this.
"""

from __future__ import annotations

import argparse
import time

import torch
from monai.apps.generation.maisi.networks.autoencoderkl_maisi import AutoencoderKlMaisi
from monai.apps.generation.maisi.networks.diffusion_model_unet_maisi import DiffusionModelUNetMaisi
from monai.networks.schedulers import DDIMScheduler
from torch import Tensor

from ccella_fast import sample, speed_up


def build(width: int, device: str) -> tuple[DiffusionModelUNetMaisi, AutoencoderKlMaisi]:
    """Build the networks; replace them by yours, with their weights."""
    torch.manual_seed(0)
    unet = DiffusionModelUNetMaisi(
        spatial_dims=3, in_channels=4, out_channels=4, num_channels=[width, 2 * width, 4 * width],
        attention_levels=[False, True, True], num_head_channels=[0, 32, 32], num_res_blocks=1, include_spacing_input=True,
    )  # fmt: skip
    autoencoder = AutoencoderKlMaisi(
        spatial_dims=3, in_channels=1, out_channels=1, latent_channels=4, num_channels=[32, 64], num_res_blocks=[1, 1],
        attention_levels=[False, False], norm_num_groups=16, num_splits=2, dim_split=1,
    )  # fmt: skip
    for name, parameter in unet.named_parameters():  # an untrained U-Net predicts zeros, which would hide differences
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02 if name.endswith("weight") else 0.0)
    return unet.to(device).eval(), autoencoder.to(device).eval()


@torch.no_grad()
def sample_before(unet, autoencoder, scheduler, noise: Tensor, spacing: Tensor, steps: int) -> Tensor:
    """Sample and decode with MONAI alone."""
    scheduler.set_timesteps(num_inference_steps=steps)
    latent = noise
    for t in scheduler.timesteps:
        timesteps = torch.full((len(latent),), int(t), device=latent.device)
        predicted = unet(latent, timesteps=timesteps, spacing_tensor=spacing)
        latent, _ = scheduler.step(predicted, t, latent)
    return autoencoder.decode(latent)


@torch.no_grad()
def sample_after(unet, autoencoder, scheduler, noise: Tensor, spacing: Tensor, steps: int) -> Tensor:
    """Sample and decode with `ccella_fast.sample`."""

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        return unet(x, timesteps=t, spacing_tensor=spacing)

    # The same steps as MONAI. Multistep solvers need fewer, for example solver="unipc" and num_inference_steps=20.
    latent = sample(denoiser, noise, solver="ddim", num_inference_steps=steps, schedule=scheduler)
    return autoencoder.decode(latent)


def timed(function, *arguments) -> tuple[Tensor, float]:
    """Return the result of `function(*arguments)` and the seconds that its second call takes."""
    synchronize = torch.cuda.synchronize if arguments[3].is_cuda else lambda: None
    function(*arguments)  # warm up
    synchronize()
    start = time.perf_counter()
    result = function(*arguments)
    synchronize()
    return result, time.perf_counter() - start


def main(arguments: list[str] | None = None) -> float:
    """Return the largest difference between the two volumes, relative to their standard deviation."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--width", type=int, default=32, help="channels of the first level of the U-Net")
    parser.add_argument("--grid", type=int, nargs=3, default=[16, 16, 8], help="size of the latent")
    parser.add_argument("--timesteps", type=int, default=10, help="timesteps of the schedule; 1000 in practice")
    options = parser.parse_args(arguments)

    unet, autoencoder = build(options.width, options.device)
    betas = {"schedule": "scaled_linear_beta", "beta_start": 0.0015, "beta_end": 0.0195}
    scheduler = DDIMScheduler(options.timesteps, clip_sample=False, **betas)
    noise = torch.randn(1, 4, *options.grid, generator=torch.Generator().manual_seed(0)).to(options.device)
    spacing = 100 * torch.tensor([[0.5, 0.5, 0.5]], device=options.device)
    inputs = (unet, autoencoder, scheduler, noise, spacing, options.timesteps)

    expected, seconds_before = timed(sample_before, *inputs)
    print(speed_up(unet), speed_up(autoencoder), sep="\n")
    actual, seconds_after = timed(sample_after, *inputs)

    difference = float((actual - expected).abs().max() / expected.std())
    print(
        f"{options.timesteps} steps and decoding: {seconds_before:.2f} s before, {seconds_after:.2f} s after, "
        f"ratio {seconds_before / seconds_after:.2f}"
    )
    print(f"largest difference: {difference:.1e} standard deviations")
    return difference


if __name__ == "__main__":
    main()
