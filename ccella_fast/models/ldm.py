"""The whole denoiser: what depends on the prompt (`condition`), what depends on x (`denoise`), and both (`forward`).

docs/explanation/method.md, sections 2 and 7. The text-free variants are a bare U-Net, so that their parameters have no `unet.`
prefix.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from ccella_fast.config import ModelConfig
from ccella_fast.models.adapter import Adapter, ClassHead
from ccella_fast.models.blocks import Checkpointed, Runner, run
from ccella_fast.models.unet3d import Conditioning, UNet3d
from ccella_fast.variants import Variant

CLASS_SCALE = 100.0  # the reference feeds classes and spacings times 100


class ModelOutput(NamedTuple):
    noise: Tensor  # (B, C, X, Y, Z)
    class_logits: Tensor | None  # (B, num_classes); None where no class is predicted


class DiffusionModel(nn.Module):
    """What every variant offers. `variant` is its row of the table, `config` its sizes."""

    config: ModelConfig
    variant: Variant

    def forward(
        self, x: Tensor, timesteps: Tensor, *, spacing: Tensor, text: Tensor | None = None, pirads: Tensor | None = None
    ) -> ModelOutput:
        """x (B, C, X, Y, Z) noisy latent; timesteps (B,) integer or float; spacing (B, 3) in mm x 100; text (B, L, input_dim),
        for variants with a report; pirads (B, num_classes) one-hot x 100, for variants whose class is given.

        An input that the variant does not use is ignored, so that one batch serves all nine. Raises ValueError when one is
        missing or of a wrong shape."""
        conditioning = self.condition(timesteps, spacing=spacing, text=text, pirads=pirads)
        return ModelOutput(self.denoise(x, conditioning), conditioning.class_logits)

    def condition(
        self,
        timesteps: Tensor,
        *,
        spacing: Tensor,
        text: Tensor | None = None,
        pirads: Tensor | None = None,
        override_class: bool = False,
    ) -> Conditioning:
        """Everything that does not depend on x; arguments as in `forward`.

        text may have fewer rows than timesteps, a divisor: they repeat, and are projected only once. override_class: `pirads`
        takes the place of the class that the variant predicts from the report."""
        raise NotImplementedError

    def denoise(self, x: Tensor, conditioning: Conditioning) -> Tensor:
        """The predicted noise at the timesteps of `conditioning`."""
        raise NotImplementedError

    def set_activation_checkpointing(self, function: Runner | None) -> None:
        """Call every residual, attention and adapter block as `function(module, *tensors)`; None calls them plainly.

        For instance `functools.partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)`."""
        for module in self.modules():
            if isinstance(module, Checkpointed):
                module.run = run if function is None else function

    def _check_inputs(self, spacing: Tensor, text: Tensor | None, pirads: Tensor | None) -> None:
        name, config = self.variant.name, self.config
        if spacing.ndim != 2 or spacing.shape[1] != 3:
            raise ValueError(f"spacing has shape {tuple(spacing.shape)}; (B, 3) is expected")
        if self.variant.text:
            if text is None:
                raise ValueError(f"text is missing: {name} needs a report")
            if text.ndim != 3 or text.shape[2] != config.input_dim:
                raise ValueError(f"text has shape {tuple(text.shape)}; this model takes (B, L, {config.input_dim})")
        if self.variant.class_input == "given":
            if pirads is None:
                raise ValueError(f"pirads is missing: {name} needs a class")
            if pirads.ndim != 2 or pirads.shape[1] != config.num_classes:
                raise ValueError(f"pirads has shape {tuple(pirads.shape)}; this model takes (B, {config.num_classes})")


class TextFreeModel(DiffusionModel, UNet3d):
    """RADMAISI and MAISI."""

    def __init__(self, config: ModelConfig):
        UNet3d.__init__(self, config)

    def condition(
        self,
        timesteps: Tensor,
        *,
        spacing: Tensor,
        text: Tensor | None = None,
        pirads: Tensor | None = None,
        override_class: bool = False,
    ) -> Conditioning:
        self._check_inputs(spacing, text, pirads)
        return self.project(self.embed(timesteps, spacing, pirads), None, None)

    def denoise(self, x: Tensor, conditioning: Conditioning) -> Tensor:
        return UNet3d.denoise(self, x, conditioning)


class TextModel(DiffusionModel):
    """The variants with a report: adapter, U-Net and, for some, a last classifier."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config, self.variant = config, config.traits
        self.unet = UNet3d(config)
        self.ella = Adapter(config)
        if self.variant.head in ("cascade", "shared"):
            self.classifier: nn.Module = nn.Linear(config.adapter_blocks * config.num_classes, config.num_classes)
        elif self.variant.head == "last":
            self.classifier = ClassHead(config)

    def condition(
        self,
        timesteps: Tensor,
        *,
        spacing: Tensor,
        text: Tensor | None = None,
        pirads: Tensor | None = None,
        override_class: bool = False,
    ) -> Conditioning:
        self._check_inputs(spacing, text, pirads)
        context, heads = self.ella(text, timesteps)
        logits = self._class_logits(context, heads)
        # The softmax is not detached: the diffusion loss trains the heads too.
        predicted = None if logits is None or override_class else CLASS_SCALE * logits.float().softmax(dim=1)
        class_vector = pirads if predicted is None else predicted
        return self.unet.project(self.unet.embed(timesteps, spacing, class_vector), context, logits)

    def denoise(self, x: Tensor, conditioning: Conditioning) -> Tensor:
        return self.unet.denoise(x, conditioning)

    def _class_logits(self, context: Tensor, heads: Tensor | None) -> Tensor | None:
        if self.variant.head in ("cascade", "shared"):
            return self.classifier(heads)
        if self.variant.head == "last":
            return self.classifier(context)
        return heads
