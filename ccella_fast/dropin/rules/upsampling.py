"""`F.interpolate` to twice the size, then a 3x3x3 convolution, in the upsampling modules of several projects."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from ccella_fast.dropin import fusion
from ccella_fast.dropin.layers import spellings
from ccella_fast.dropin.replacement import Replacement, ReplacementMixin, Replacements, Rule


class InterpolatedConvolution(ReplacementMixin):
    """Replaces a module with a convolution `conv` of the upsampled input."""

    conv: Any

    def suits(self, x: Tensor, *unused: Any, **also_unused: Any) -> bool:
        """Whether x is a volume, the settings are those for which this computes, and it pays."""
        return x.ndim == 5 and fusion.upsampling_pays(x) and _reason(self) is None

    def forward(self, x: Tensor, *unused: Any, **also_unused: Any) -> Tensor:
        """(B, C, X, Y, Z) -> (B, out_channels, 2X, 2Y, 2Z)."""
        return fusion.upsampled_convolution(fusion.unwrap_convolution(self.conv), x)


def _reason(module: Any) -> str | None:
    """Why the upsampling and the convolution are not one kernel; "" if it does not have both."""
    does_not_convolve = not getattr(module, "use_conv", getattr(module, "with_conv", True))
    if does_not_convolve or getattr(module, "use_convtranspose", False):
        return ""
    if getattr(module, "dims", 0) == 3 and getattr(module, "resample_2d", True):
        return "it upsamples two of three axes"
    return fusion.reason_not_to_fuse(nn.Upsample(scale_factor=2), fusion.unwrap_convolution(module.conv))


def _upsampling(module: Any) -> Replacements:
    reason = _reason(module)
    if reason is None:
        yield Replacement("upsample_conv3d", module, InterpolatedConvolution)
    elif reason:
        yield reason


class _Upsampling(nn.Module):
    """The ways in which projects write it that need no further settings."""

    conv: Any
    use_conv: bool
    with_conv: bool

    def integer(self, x):
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))

    def floating(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))

    def integer_default(self, x):
        return self.conv(F.interpolate(x, scale_factor=2))

    def floating_default(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0))

    def exact(self, x):
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest-exact"))

    def exact_floating(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest-exact"))

    def optional_integer(self, x):
        x = F.interpolate(x, scale_factor=2, mode="nearest")
        if self.use_conv:
            x = self.conv(x)
        return x

    def optional_floating(self, x):
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        if self.use_conv:
            x = self.conv(x)
        return x

    def with_integer(self, x):
        x = F.interpolate(x, scale_factor=2, mode="nearest")
        if self.with_conv:
            x = self.conv(x)
        return x

    def with_floating(self, x):  # CompVis' latent-diffusion: ldm.modules.diffusionmodules.model.Upsample
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        if self.with_conv:
            x = self.conv(x)
        return x


RULES: dict[Any, Rule] = {
    **dict.fromkeys(spellings(_Upsampling), _upsampling),
    "fee7c554bbfd339e": _upsampling,  # generative.networks.nets.diffusion_model_unet.Upsample
    "e89a97f714afd62f": _upsampling,  # generative.networks.nets.autoencoderkl.Upsample
    "ef2c4d16fd7f1db0": _upsampling,  # OpenAI's guided-diffusion: guided_diffusion.unet.Upsample
    "480be91c01d84b51": _upsampling,  # wdm-3d: guided_diffusion.unet.Upsample
}
