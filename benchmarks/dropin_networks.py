"""The networks of the drop-in table: those of other projects, small.

Packages are pinned in dropin_requirements.txt. Projects that are on GitHub alone are read from checkouts in one folder, named
and at the commits of `CHECKOUTS`.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import nn

CHECKOUTS = {  # folder: repository and commit
    "guided-diffusion": ("openai/guided-diffusion", "22e0df8183507e13a7813f8d38d51b072ca1e67c"),
    "latent-diffusion": ("CompVis/latent-diffusion", "a506df5756472e2ebaf9078affdde2c4f1502cd4"),
    "med-ddpm": ("mobaidoctor/med-ddpm", "2b14ee648f8aba1d5350992b08db8c6861af391f"),
    "medicaldiffusion": ("FirasGit/medicaldiffusion", "da3d92a20700144d4c1411903d8ee4ded73a76f2"),
    "wdm-3d": ("pfriedri/wdm-3d", "a93a7ef70849566a4a0a02b5aa27a8a92645b867"),
}
Built = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]


class Network(NamedTuple):
    """A network of the table.

    Attributes:
        project: the package or repository that it is from.
        name: the class and what is special about the configuration.
        make: returns the network and its arguments by position and by name; raises ImportError if its package is missing.
    """

    project: str
    name: str
    make: Callable[[], Built]


def networks(sources: Path | None = None) -> list[Network]:
    """All networks. sources: the folder with the checkouts."""
    return [*_monai(), *_generative(), *_diffusers(), *_lucidrains(), *_physicsnemo(), *_checkouts(sources)]


VOLUME = (1, 2, 16, 16, 8)
TIME = torch.tensor([300])
SIZES = {"num_channels": [32, 64], "attention_levels": [False, True], "num_res_blocks": 1, "num_head_channels": 32}


# MONAI


def _from_monai(name: str, *inputs: Any, **settings: Any) -> Built:
    import monai.networks.nets as nets

    return getattr(nets, name)(**settings), *_arguments(inputs)


def _from_maisi(module: str, name: str, *inputs: Any, **settings: Any) -> Built:
    found = importlib.import_module(f"monai.apps.generation.maisi.networks.{module}")
    return getattr(found, name)(**settings), *_arguments(inputs)


def _arguments(inputs: tuple[Any, ...]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments by position, and those by name if the last input is a dictionary of them; a tuple is the shape of a tensor."""
    generator = torch.Generator().manual_seed(0)

    def value(each: Any) -> Any:
        return torch.randn(each, generator=generator) if isinstance(each, tuple) else each

    named = inputs[-1] if isinstance(inputs[-1], dict) else {}
    given = inputs[:-1] if named else inputs
    return tuple(map(value, given)), {name: value(each) for name, each in named.items()}


def _monai() -> list[Network]:
    def add(name: str, make: Callable[..., Built], *inputs: Any, **settings: Any) -> None:
        found.append(Network("MONAI", name, functools.partial(make, *inputs, **settings)))

    found: list[Network] = []
    unet = {"spatial_dims": 3, "in_channels": 2, "out_channels": 2, "channels": [32, 64]}
    unet |= {name: value for name, value in SIZES.items() if name != "num_channels"}
    text = {"with_conditioning": True, "cross_attention_dim": 16, "transformer_num_layers": 1}
    context = {"context": (1, 7, 16)}
    flat = unet | {"spatial_dims": 2}
    image = (1, 2, 48, 48)
    add("DiffusionModelUNet", _from_monai, "DiffusionModelUNet", VOLUME, TIME, **unet)
    add("DiffusionModelUNet, larger", _from_monai, "DiffusionModelUNet", (1, 2, 24, 24, 16), TIME, **unet)
    add("DiffusionModelUNet, conditioned", _from_monai, "DiffusionModelUNet", VOLUME, TIME, context, **unet, **text)
    add(
        "DiffusionModelUNet, resblock_updown", _from_monai, "DiffusionModelUNet", VOLUME, TIME, context,
        resblock_updown=True, upcast_attention=True, **unet, **text,
    )  # fmt: skip
    add("DiffusionModelUNet, 2D", _from_monai, "DiffusionModelUNet", image, TIME, **flat)
    add("DiffusionModelUNet, 2D conditioned", _from_monai, "DiffusionModelUNet", image, TIME, context, **flat, **text)
    maisi = {"spatial_dims": 3, "in_channels": 2, "out_channels": 2, "use_flash_attention": False, **SIZES}
    spacing = {"spacing_tensor": (1, 3)}
    add(
        "DiffusionModelUNetMaisi",
        _from_maisi,
        "diffusion_model_unet_maisi",
        "DiffusionModelUNetMaisi",
        VOLUME,
        TIME,
        **maisi,
    )
    add(
        "DiffusionModelUNetMaisi, all inputs", _from_maisi, "diffusion_model_unet_maisi", "DiffusionModelUNetMaisi",
        VOLUME, TIME,
        context | spacing | {"top_region_index_tensor": (1, 4), "bottom_region_index_tensor": (1, 4)},
        resblock_updown=True, include_top_region_index_input=True, include_bottom_region_index_input=True,
        include_spacing_input=True, **maisi, **text,
    )  # fmt: skip
    control = {"conditioning_embedding_num_channels": [16, 16], "conditioning_embedding_in_channels": 1}
    condition = {"controlnet_cond": (1, 1, 32, 32, 16)}
    plain = {name: value for name, value in unet.items() if name != "out_channels"}
    add("ControlNet", _from_monai, "ControlNet", VOLUME, TIME, condition, **plain, **control)
    plain = {name: value for name, value in maisi.items() if name != "out_channels"}
    add(
        "ControlNetMaisi", _from_maisi, "controlnet_maisi", "ControlNetMaisi", VOLUME, TIME, condition,
        **plain, **control, use_checkpointing=False,
    )  # fmt: skip
    vae = {"spatial_dims": 3, "in_channels": 1, "out_channels": 1, "latent_channels": 3, "channels": [32, 64]}
    vae |= {"num_res_blocks": 1, "attention_levels": [False, True]}
    scan = (1, 1, 16, 16, 8)
    plain = vae | {"attention_levels": [False, False]}
    plain |= {"with_encoder_nonlocal_attn": False, "with_decoder_nonlocal_attn": False}
    add("AutoencoderKL", _from_monai, "AutoencoderKL", scan, **vae)
    add("AutoencoderKL, no attention", _from_monai, "AutoencoderKL", scan, **plain)
    add("AutoencoderKL, convtranspose", _from_monai, "AutoencoderKL", scan, use_convtranspose=True, **plain)
    add("AutoencoderKL, 2D", _from_monai, "AutoencoderKL", (1, 1, 48, 48), **vae | {"spatial_dims": 2})
    split = {name: value for name, value in vae.items() if name != "channels"} | {"num_channels": [32, 64]}
    split |= {"num_res_blocks": [1, 1], "norm_float16": False, "print_info": False, "save_mem": True}
    for splits in (1, 2):
        add(
            f"AutoencoderKlMaisi, {splits} split{'s' * (splits > 1)}", _from_maisi, "autoencoderkl_maisi",
            "AutoencoderKlMaisi", scan, num_splits=splits, **split,
        )  # fmt: skip
    add(
        "AutoencoderKlMaisi, convtranspose", _from_maisi, "autoencoderkl_maisi", "AutoencoderKlMaisi", scan,
        num_splits=2, use_convtranspose=True, **split,
    )  # fmt: skip
    spade = {"label_nc": 3, "spade_intermediate_channels": 16}
    add(
        "SPADEDiffusionModelUNet",
        _from_monai,
        "SPADEDiffusionModelUNet",
        VOLUME,
        TIME,
        (1, 3, 16, 16, 8),
        **unet,
        **spade,
    )
    add("SPADEAutoencoderKL", _from_monai, "SPADEAutoencoderKL", scan, (1, 3, 16, 16, 8), **vae, **spade)
    quantizer = {
        "spatial_dims": 3,
        "in_channels": 1,
        "out_channels": 1,
        "channels": (32, 64),
        "num_res_channels": (32, 64),
    }
    quantizer |= {"num_embeddings": 32, "embedding_dim": 16, "num_res_layers": 1}
    quantizer |= {"downsample_parameters": ((2, 4, 1, 1),) * 2, "upsample_parameters": ((2, 4, 1, 1, 0),) * 2}
    add("VQVAE", _from_monai, "VQVAE", scan, **quantizer)
    add(
        "SegResNet",
        _from_monai,
        "SegResNet",
        (1, 1, 32, 32, 16),
        spatial_dims=3,
        init_filters=16,
        in_channels=1,
        out_channels=3,
    )
    return found


# GenerativeModels


def _from_generative(name: str, *inputs: Any, **settings: Any) -> Built:
    import generative.networks.nets as nets

    return getattr(nets, name)(**settings), *_arguments(inputs)


def _generative() -> list[Network]:
    def add(title: str, *inputs: Any, **settings: Any) -> None:
        name = title.partition(",")[0]
        found.append(Network("monai-generative", title, functools.partial(_from_generative, name, *inputs, **settings)))

    found: list[Network] = []
    unet = {"spatial_dims": 3, "in_channels": 2, "out_channels": 2, **SIZES}
    text = {"with_conditioning": True, "cross_attention_dim": 16}
    context = {"context": (1, 7, 16)}
    add("DiffusionModelUNet", VOLUME, TIME, **unet)
    add("DiffusionModelUNet, conditioned", VOLUME, TIME, context, **unet, **text)
    add("DiffusionModelUNet, resblock_updown", VOLUME, TIME, context, resblock_updown=True, **unet, **text)
    add("DiffusionModelUNet, 2D", (1, 2, 48, 48), TIME, **unet | {"spatial_dims": 2})
    control = {name: value for name, value in unet.items() if name != "out_channels"}
    add(
        "ControlNet", VOLUME, TIME, {"controlnet_cond": (1, 1, 32, 32, 16)},
        conditioning_embedding_num_channels=[16, 16], conditioning_embedding_in_channels=1, **control,
    )  # fmt: skip
    vae = {"spatial_dims": 3, "in_channels": 1, "out_channels": 1, "latent_channels": 3, "num_channels": [32, 64]}
    vae |= {"num_res_blocks": 1, "attention_levels": [False, True]}
    add("AutoencoderKL", (1, 1, 16, 16, 8), **vae)
    return found


# diffusers


def _from_diffusers(name: str, *inputs: Any, **settings: Any) -> Built:
    import diffusers

    return getattr(diffusers, name)(**settings), *_arguments(inputs)


def _diffusers() -> list[Network]:
    def add(title: str, *inputs: Any, **settings: Any) -> None:
        name = title.partition(",")[0]
        found.append(Network("diffusers", title, functools.partial(_from_diffusers, name, *inputs, **settings)))

    found: list[Network] = []
    blocks = {"block_out_channels": (32, 64), "layers_per_block": 1, "cross_attention_dim": 16, "attention_head_dim": 8}
    add(
        "UNet3DConditionModel", (1, 4, 4, 16, 16), TIME, (1, 7, 16), sample_size=16, **blocks,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"), up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
    )  # fmt: skip
    add(
        "UNet2DConditionModel", (1, 4, 32, 32), TIME, (1, 7, 16), sample_size=32, **blocks,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    add(
        "UNet2DModel, scale and shift", (1, 3, 32, 32), TIME, sample_size=32, block_out_channels=(32, 64),
        layers_per_block=1, resnet_time_scale_shift="scale_shift",
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    add(
        "AutoencoderKL", (1, 3, 32, 32), block_out_channels=(32, 64), layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    video = (1, 3, 5, 16, 16)
    add("AutoencoderKLWan", video, base_dim=16, z_dim=4, dim_mult=[1, 2, 2, 2], num_res_blocks=1)
    add(
        "AutoencoderKLCogVideoX", video, block_out_channels=(32, 32, 64, 64), layers_per_block=1, latent_channels=4,
        down_block_types=("CogVideoXDownBlock3D",) * 4, up_block_types=("CogVideoXUpBlock3D",) * 4,
    )  # fmt: skip
    add(
        "AutoencoderKLHunyuanVideo", video, block_out_channels=(32, 32, 64, 64), layers_per_block=1, latent_channels=4,
    )  # fmt: skip
    return found


# denoising-diffusion-pytorch


def _lucidrains() -> list[Network]:
    def unet(**settings: Any) -> Built:
        import denoising_diffusion_pytorch as package

        return package.Unet(dim=32, dim_mults=(1, 2), **settings), *_arguments(((1, 3, 32, 32), TIME))

    def karras() -> Built:
        from denoising_diffusion_pytorch.karras_unet_3d import KarrasUnet3D

        settings = {
            "dim": 16,
            "dim_max": 32,
            "num_downsamples": 2,
            "num_blocks_per_stage": 1,
            "attn_res": (4,),
            "attn_dim_head": 16,
        }
        network = KarrasUnet3D(image_size=16, frames=8, channels=2, **settings)
        return network, *_arguments(((1, 2, 8, 16, 16), TIME))

    make = {"Unet": unet, "KarrasUnet3D": karras}
    return [Network("denoising-diffusion-pytorch", name, function) for name, function in make.items()]


# NVIDIA PhysicsNeMo


def _physicsnemo() -> list[Network]:
    sizes = {"model_channels": 32, "channel_mult": [1, 2], "num_blocks": 1, "dropout": 0.0}

    def flat(name: str) -> Built:
        import physicsnemo.models.diffusion_unets as nets

        network = getattr(nets, name)(img_resolution=32, in_channels=2, out_channels=2, attn_resolutions=[16], **sizes)
        return network, *_arguments(((1, 2, 32, 32), torch.tensor([0.3]), None))

    def volume() -> Built:
        from physicsnemo.experimental.models.diffusion_unets import DiffusionUNet3D

        return DiffusionUNet3D(x_channels=2, num_levels=2, **sizes), *_arguments((VOLUME, torch.tensor([0.3])))

    make = {"DiffusionUNet3D": volume, **{name: functools.partial(flat, name) for name in ("SongUNet", "DhariwalUNet")}}
    return [Network("nvidia-physicsnemo", name, function) for name, function in make.items()]


# Checkouts


def _checkouts(sources: Path | None) -> list[Network]:
    def package(folder: str, name: str) -> ModuleType:
        """The package of a checkout, under a name that differs from the packages of the same name in other checkouts."""
        path, unique = _checkout(sources, folder) / name, f"{folder.replace('-', '_')}_{name}"
        if unique not in sys.modules:
            path = path / "__init__.py"
            spec = importlib.util.spec_from_file_location(unique, path, submodule_search_locations=[str(path.parent)])
            if spec is None or spec.loader is None:
                raise ImportError(f"{path} cannot be read")
            sys.modules[unique] = importlib.util.module_from_spec(spec)
        return sys.modules[unique]

    def adm(adaptive: bool) -> Built:
        unet = importlib.import_module(f"{package('guided-diffusion', 'guided_diffusion').__name__}.unet")
        network = unet.UNetModel(
            image_size=16, in_channels=2, model_channels=32, out_channels=2, num_res_blocks=1, attention_resolutions=(2,),
            channel_mult=(1, 2), dims=3, num_heads=2, use_scale_shift_norm=adaptive, resblock_updown=adaptive,
        )  # fmt: skip
        return network, *_arguments((VOLUME, TIME))

    def wavelet() -> Built:
        sys.path.insert(0, str(_checkout(sources, "wdm-3d")))  # its DWT_IDWT
        unet = importlib.import_module(f"{package('wdm-3d', 'guided_diffusion').__name__}.wunet")
        network = unet.WavUNetModel(
            image_size=16, in_channels=8, model_channels=32, out_channels=8, num_res_blocks=2, attention_resolutions=(),
            channel_mult=(1, 2), dims=3, use_freq=True, bottleneck_attention=False,
            resblock_updown=True, resample_2d=False,
        )  # fmt: skip
        return network, *_arguments(((1, 8, 16, 16, 16), TIME))

    def med_ddpm() -> Built:
        unet = importlib.import_module(f"{package('med-ddpm', 'diffusion_model').__name__}.unet")
        network = unet.create_model(
            16, 32, 1, channel_mult="1,2", attention_resolutions="8", in_channels=2, out_channels=2
        )
        return network, *_arguments((VOLUME, TIME))

    def video(name: str) -> Built:
        sys.path.insert(0, str(_checkout(sources, "medicaldiffusion")))
        if name == "Unet3D":
            from ddpm.diffusion import Unet3D

            return Unet3D(dim=16, dim_mults=(1, 2), channels=2), *_arguments(((1, 2, 8, 16, 16), TIME))
        from vq_gan_3d.model import vqgan

        settings = {"norm_type": "group", "num_groups": 16}
        if name == "Encoder":
            return vqgan.Encoder(32, (2, 2, 2), 1, **settings), *_arguments(((1, 1, 16, 16, 16),))
        return vqgan.Decoder(32, (2, 2, 2), 1, **settings), *_arguments(((1, 64, 8, 8, 8),))

    def latent(name: str) -> Built:
        sys.path.insert(0, str(_checkout(sources, "latent-diffusion")))
        from ldm.modules.diffusionmodules import model, openaimodel

        if name == "UNetModel":
            network = openaimodel.UNetModel(
                image_size=32, in_channels=4, model_channels=32, out_channels=4, num_res_blocks=1, num_heads=2,
                attention_resolutions=(2,), channel_mult=(1, 2), use_spatial_transformer=True, context_dim=16,
                use_checkpoint=False,
            )  # fmt: skip
            return network, *_arguments(((1, 4, 32, 32), TIME, (1, 7, 16)))
        sizes = {"ch": 32, "out_ch": 3, "ch_mult": (1, 2), "num_res_blocks": 1, "attn_resolutions": [16]}
        sizes |= {"in_channels": 3, "resolution": 32, "z_channels": 4}
        shape = (1, 3, 32, 32) if name == "Encoder" else (1, 4, 16, 16)
        return getattr(model, name)(**sizes), *_arguments((shape,))

    make = {
        ("guided-diffusion", "UNetModel"): functools.partial(adm, False),
        ("guided-diffusion", "UNetModel, scale and shift"): functools.partial(adm, True),
        ("wdm-3d", "WavUNetModel"): wavelet,
        ("med-ddpm", "UNetModel"): med_ddpm,
        **{("medicaldiffusion", name): functools.partial(video, name) for name in ("Unet3D", "Encoder", "Decoder")},
        **{("latent-diffusion", name): functools.partial(latent, name) for name in ("UNetModel", "Encoder", "Decoder")},
    }
    return [Network(project, name, function) for (project, name), function in make.items()]


def _checkout(sources: Path | None, folder: str) -> Path:
    if sources is None or not (sources / folder).is_dir():
        repository, commit = CHECKOUTS[folder]
        raise ImportError(f"no checkout of {repository} at {commit[:7]} in --sources")
    return sources / folder
