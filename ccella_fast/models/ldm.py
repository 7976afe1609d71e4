"""The diffusion model of every variant (docs/explanation/method.md, sections 2 and 7).

`condition` computes everything that depends on the prompt and the timestep, `denoise` everything that depends on x, and
`forward` both. The text-free variants are subclasses of the U-Net, so that their parameters do not have the prefix `unet.`.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from ccella_fast.config import ModelConfig
from ccella_fast.models.adapter import Adapter, ClassHead
from ccella_fast.models.blocks import Checkpointed, ModuleRunner, run_module
from ccella_fast.models.unet3d import Conditioning, UNet3d
from ccella_fast.variants import CLASS_SCALE, Variant


class ModelOutput(NamedTuple):
    """The result of a forward pass.

    Attributes:
        noise: the prediction, (B, C, X, Y, Z): the noise, or what `scheduler.prediction` names.
        class_logits: (B, num_classes); None if the variant does not predict the class.
    """

    noise: Tensor
    class_logits: Tensor | None


class DiffusionModel(nn.Module):
    """The interface of all variants.

    Attributes:
        config: the sizes.
        variant: the row of `variants.VARIANTS`.
    """

    config: ModelConfig
    variant: Variant

    def forward(
        self, x: Tensor, timesteps: Tensor, *, spacing: Tensor, text: Tensor | None = None, pirads: Tensor | None = None
    ) -> ModelOutput:
        """Predict the noise in x, and the class if the variant predicts it.

        Inputs that the variant does not use are ignored, so that the same batch is valid for all variants.

        Args:
            x: noisy latent, (B, C, X, Y, Z).
            timesteps: (B,), integer or float.
            spacing: voxel size in mm times 100, (B, 3).
            text: text features, (B, L, input_dim), for variants that read the report.
            pirads: one-hot class times 100, (B, num_classes), for variants that are given the class.

        Raises:
            ValueError: an input is missing or has a wrong shape.
        """
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
        """Compute everything that does not depend on x.

        Args:
            timesteps: (B,), integer or float.
            spacing: as in `forward`.
            text: as in `forward`, or with fewer rows, a divisor of B: they are projected once and then repeated.
            pirads: as in `forward`.
            override_class: use `pirads` instead of the class that the variant predicts from the report.

        Raises:
            ValueError: an input is missing or has a wrong shape.
        """
        raise NotImplementedError

    def denoise(self, x: Tensor, conditioning: Conditioning) -> Tensor:
        """Predict the noise in x (B, C, X, Y, Z) at the timesteps of `conditioning`."""
        raise NotImplementedError

    def set_activation_checkpointing(self, function: ModuleRunner | None) -> None:
        """Call every residual, attention and adapter block through `function`.

        Args:
            function: called as `function(module, *tensors)`, for example
                `functools.partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)`; None disables checkpointing.
        """
        for module in self.modules():
            if isinstance(module, Checkpointed):
                module.run_module = run_module if function is None else function

    def _check_inputs(self, spacing: Tensor, text: Tensor | None, pirads: Tensor | None) -> None:
        name, config = self.variant.name, self.config
        if spacing.ndim != 2 or spacing.shape[1] != 3:
            raise ValueError(f"spacing has shape {tuple(spacing.shape)}, (B, 3) is expected")
        if self.variant.text:
            if text is None:
                raise ValueError(f"text is missing: {name} requires a report")
            if text.ndim != 3 or text.shape[2] != config.input_dim:
                raise ValueError(f"text has shape {tuple(text.shape)}, (B, L, {config.input_dim}) is expected")
        if self.variant.class_input == "given":
            if pirads is None:
                raise ValueError(f"pirads is missing: {name} requires a class")
            if pirads.ndim != 2 or pirads.shape[1] != config.num_classes:
                raise ValueError(f"pirads has shape {tuple(pirads.shape)}, (B, {config.num_classes}) is expected")


class TextFreeModel(DiffusionModel, UNet3d):
    """The variants without a report: RADMAISI and MAISI."""

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
        """See `DiffusionModel.condition`."""
        self._check_inputs(spacing, text, pirads)
        return self.project(self.embed(timesteps, spacing, pirads), None, None)

    def denoise(self, x: Tensor, conditioning: Conditioning) -> Tensor:
        """See `UNet3d.denoise`."""
        return UNet3d.denoise(self, x, conditioning)


class TextModel(DiffusionModel):
    """The variants with a report: the U-Net, the adapter and, in some, a classifier of the adapter's outputs."""

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
        """See `DiffusionModel.condition`."""
        self._check_inputs(spacing, text, pirads)
        context, head_outputs = self.ella(text, timesteps)
        logits = self._class_logits(context, head_outputs)
        # The softmax is not detached: the diffusion loss also trains the class heads.
        predicted = None if logits is None or override_class else CLASS_SCALE * logits.float().softmax(dim=1)
        class_vector = pirads if predicted is None else predicted
        return self.unet.project(self.unet.embed(timesteps, spacing, class_vector), context, logits)

    def denoise(self, x: Tensor, conditioning: Conditioning) -> Tensor:
        """See `UNet3d.denoise`."""
        return self.unet.denoise(x, conditioning)

    def _class_logits(self, context: Tensor, head_outputs: Tensor | None) -> Tensor | None:
        if self.variant.head in ("cascade", "shared"):
            return self.classifier(head_outputs)
        if self.variant.head == "last":
            return self.classifier(context)
        return head_outputs
