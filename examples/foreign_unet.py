"""Sampling from a custom U-Net with its own conditioning.

    python examples/foreign_unet.py [--solver unipc] [--steps 20]    # about 2 s on two CPU cores

The network is conditioned on the age of the patient, by a scale and shift in each block, and on a mask of the organ, an input
channel. `ccella_fast.sample` takes any function of (x, t): here a closure over the conditions that also applies classifier-free
guidance. `ccella_fast.speed_up` replaces each GroupNorm before a SiLU and the upsampling before a convolution; MONAI is not
required.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn

from ccella_fast import sample, speed_up


class Block(nn.Module):
    """A residual block with a scale and shift from the condition."""

    def __init__(self, inputs: int, outputs: int, condition: int):
        super().__init__()
        self.first = nn.Sequential(nn.GroupNorm(8, inputs), nn.SiLU(), nn.Conv3d(inputs, outputs, 3, padding=1))
        self.scale_shift = nn.Linear(condition, 2 * outputs)
        self.second = nn.Sequential(nn.GroupNorm(8, outputs), nn.SiLU(), nn.Conv3d(outputs, outputs, 3, padding=1))
        self.skip = nn.Conv3d(inputs, outputs, 1)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """x (B, inputs, X, Y, Z), condition (B, C) -> (B, outputs, X, Y, Z)."""
        scale, shift = self.scale_shift(condition)[:, :, None, None, None].chunk(2, dim=1)
        return self.skip(x) + self.second(self.first(x) * (1 + scale) + shift)


class OrganUNet(nn.Module):
    """A U-Net with two levels that predicts the noise."""

    def __init__(self, width: int = 16):
        super().__init__()
        self.embed_time = nn.Sequential(nn.Linear(1, 32), nn.SiLU(), nn.Linear(32, 32))
        self.embed_age = nn.Sequential(nn.Linear(1, 32), nn.SiLU(), nn.Linear(32, 32))
        self.conv_in = nn.Conv3d(2, width, 3, padding=1)
        self.high = Block(width, width, 32)
        self.down = nn.Conv3d(width, 2 * width, 3, stride=2, padding=1)
        self.low = Block(2 * width, 2 * width, 32)
        self.up = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv3d(2 * width, width, 3, padding=1))
        self.merge = Block(2 * width, width, 32)
        self.conv_out = nn.Sequential(nn.GroupNorm(8, width), nn.SiLU(), nn.Conv3d(width, 1, 3, padding=1))

    def forward(self, x: Tensor, t: Tensor, age: Tensor | None, mask: Tensor) -> Tensor:
        """x and mask (B, 1, X, Y, Z), t (B,), age in years (B,) or None for unconditional -> noise (B, 1, X, Y, Z)."""
        condition = self.embed_time(t[:, None] / 1000)
        if age is not None:
            condition = condition + self.embed_age(age[:, None] / 100)
        high = self.high(self.conv_in(torch.cat([x, mask], dim=1)), condition)
        low = self.low(self.down(high), condition)
        return self.conv_out(self.merge(torch.cat([self.up(low), high], dim=1), condition))


def main(arguments: list[str] | None = None) -> tuple[Tensor, Tensor]:
    """Return the samples before and after `speed_up`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--solver", default="dpmpp_2m")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=2.0, help="guidance scale; 1 disables guidance")
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    unet = OrganUNet().eval()  # load your weights here
    noise = torch.randn(2, 1, 16, 16, 8)
    age = torch.tensor([55.0, 70.0])
    mask = torch.zeros_like(noise)
    mask[:, :, 4:12, 4:12, 2:6] = 1

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        conditional = unet(x, t, age, mask)
        if options.guidance == 1:
            return conditional
        unconditional = unet(x, t, None, mask)
        return unconditional + options.guidance * (conditional - unconditional)

    def draw() -> Tensor:
        # The seeds are for solvers that add noise: the noise of a sample depends only on its seed, not on the batch.
        return sample(
            denoiser,
            noise,
            solver=options.solver,
            num_inference_steps=options.steps,
            prediction="epsilon",
            seeds=[1, 2],
        )

    plain = draw()
    report = speed_up(unet)
    print(report)
    faster = draw()
    print(f"{options.solver}, {options.steps} steps: samples {tuple(faster.shape)}, mean {faster.mean():.3f}")
    print(f"largest difference: {(faster - plain).abs().max() / plain.std():.1e} standard deviations")
    report.undo()
    return plain, faster


if __name__ == "__main__":
    main()
