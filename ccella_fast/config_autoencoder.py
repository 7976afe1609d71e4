"""The sections `autoencoder` and `vae_training` of the configuration."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from ccella_fast.config_augmentation import AugmentationConfig
from ccella_fast.config_section import Count, Fraction, Positive, PositiveFloat, Section, Seed, Weight


class AutoencoderConfig(Section):
    """MAISI `AutoencoderKlMaisi`: each level but the last halves the grid."""

    in_channels: Positive = 1  #: channels of an image; 1, because each sequence is encoded separately
    out_channels: Positive = 1  #: channels of a decoded image
    latent_channels: Positive = 4  #: channels of a latent, per sequence
    num_channels: Annotated[list[Positive], Field(min_length=1)] = [64, 128, 256]  #: width of each level
    num_res_blocks: list[Positive] = [2, 2, 2]  #: residual blocks of each level
    norm_num_groups: Positive = 32  #: groups of every group normalization
    norm_eps: PositiveFloat = 1e-6  #: added to the variance in every group normalization

    @model_validator(mode="after")
    def _consistent(self) -> AutoencoderConfig:
        if len(self.num_res_blocks) != len(self.num_channels):
            raise ValueError("num_res_blocks needs one entry per level, as num_channels")
        for width in self.num_channels:
            if width % self.norm_num_groups:
                raise ValueError(f"num_channels {width} is not divisible by norm_num_groups {self.norm_num_groups}")
        return self

    @property
    def factor(self) -> int:
        """Voxels per latent voxel, along each axis."""
        return 2 ** (len(self.num_channels) - 1)


# Settings of `VaeTrainingConfig` that the first version did not have; it trained with what are now their defaults.
_LATER_VAE_SETTINGS = [
    "warmup_fraction", "max_warmup_steps", "final_lr_fraction", "weight_decay", "adam_betas", "max_grad_norm",
    "checkpointing_seconds", "optimizer", "reconstruction_loss", "spectral_weight", "perceptual_weight", "perceptual_network",
    "perceptual_sha256", "perceptual_slices", "adversarial_weight", "adversarial_start", "discriminator_channels",
    "discriminator_layers", "discriminator_lr",
]  # fmt: skip


class VaeTrainingConfig(Section):
    """`ccella-fast train-vae`: L1 + KL on random patches, and further terms if they have a weight."""

    max_train_steps: Positive = 20000  #: optimizer steps
    batch_size: Positive = 1  #: patches per step
    #: voxels of a patch along R, A, S
    patch: Annotated[list[Positive], Field(min_length=3, max_length=3)] = [64, 64, 64]
    lr: PositiveFloat = 1e-4  #: peak learning rate, reached at the end of the warm-up
    #: fraction of ``max_train_steps`` over which the learning rate rises linearly; 0: no warm-up
    warmup_fraction: Fraction = 0.05
    max_warmup_steps: Positive = 100  #: steps after which the warm-up ends at the latest, however long the run
    #: fraction of ``lr`` that is left at the end, after half a cosine
    final_lr_fraction: Annotated[float, Field(ge=0, le=1)] = 0.01
    #: muon: orthogonalized steps for the weights of convolutions, AdamW for the rest; better after few steps
    optimizer: Literal["adamw", "muon"] = "adamw"
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.01  #: decoupled, on all parameters
    #: AdamW's decay rates of both moments; with 0.999, a run of hundreds of steps would still remember its first gradients
    adam_betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    max_grad_norm: PositiveFloat = 1.0  #: the gradient's global norm is clipped to this
    kl_weight: Annotated[float, Field(ge=0)] = 1e-6  #: weight of the KL divergence next to the reconstruction loss
    #: mean absolute or mean squared error of the voxels; its weight is 1
    reconstruction_loss: Literal["l1", "l2"] = "l1"
    spectral_weight: Weight = 0.0  #: weight of the squared difference of the Fourier amplitudes; 0: off
    perceptual_weight: Weight = 0.0  #: weight of the distance between the features of ``perceptual_network``; 0: off
    #: file of MedicalNet's or RadImageNet's ResNet-50; nothing is downloaded
    perceptual_network: str | None = None
    #: SHA-256 that the file ``perceptual_network`` must have
    perceptual_sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None
    #: share of the slices in each direction that RadImageNet's 2D network sees in a step; MedicalNet is 3D and sees the patch
    perceptual_slices: Annotated[float, Field(gt=0, le=1)] = 0.2
    adversarial_weight: Weight = 0.0  #: weight of the patch discriminator's verdict; 0: off
    adversarial_start: Count = 0  #: steps before the discriminator is trained and judges
    discriminator_channels: Positive = 32  #: width of the discriminator's first layer; each layer doubles it
    #: layers of the discriminator after the first; each axis of the patch must have 3 * 2 ** ``discriminator_layers`` voxels
    discriminator_layers: Positive = 3
    discriminator_lr: PositiveFloat | None = None  #: the discriminator's peak learning rate; null: ``lr``
    seed: Seed = 0  #: data order, patches and initial weights follow from it
    #: as the section augmentation; preset none unless given
    augmentation: AugmentationConfig = AugmentationConfig.model_validate({"preset": "none"})
    #: seconds between two saves of the state from which a stopped run is resumed; 0: whenever the loss is read, every 10 steps
    checkpointing_seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 60.0

    @model_validator(mode="after")
    def _consistent(self) -> VaeTrainingConfig:
        for name in ("perceptual_network", "perceptual_sha256"):
            if self.perceptual_weight and getattr(self, name) is None:
                raise ValueError(
                    f"perceptual_weight {self.perceptual_weight:g} needs {name}; sha256sum prints a SHA-256"
                )
        smallest = 3 * 2**self.discriminator_layers
        if self.adversarial_weight and min(self.patch) < smallest:
            layers = f"discriminator_layers {self.discriminator_layers}"
            raise ValueError(f"the patch {self.patch} is too small for {layers}: each axis must have {smallest} voxels")
        return self

    def later_settings_at_default(self) -> set[str]:
        """The settings that the first version did not have and that have their defaults.

        Hashes of a configuration leave them out, so that what the first version made stays valid.
        """
        fields = type(self).model_fields
        return {name for name in _LATER_VAE_SETTINGS if getattr(self, name) == fields[name].default}
