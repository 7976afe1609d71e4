"""Weight files of random networks, in the forms in which the pretrained ones are published."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from ccella_fast.evaluation.features import taps


def monai_resnet50(dimensions: int) -> nn.Module:
    """MONAI's ResNet-50 with random weights and statistics; it returns the pooled last map."""
    from monai.networks.nets.resnet import ResNet

    network = ResNet(
        "bottleneck", [3, 4, 6, 3], [64, 128, 256, 512], spatial_dims=dimensions, n_input_channels=3 if dimensions == 2 else 1,
        conv1_t_size=7, conv1_t_stride=2, shortcut_type="B", feed_forward=False, bias_downsample=False,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(dimensions)
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            size = module.num_features
            module.running_mean = 0.1 * torch.randn(size, generator=generator)
            module.running_var = 0.5 + torch.rand(size, generator=generator)
            module.weight.data = 0.5 + 0.5 * torch.rand(size, generator=generator)
            module.bias.data = 0.1 * torch.randn(size, generator=generator)
    return network.eval().requires_grad_(False)


def keras_form(network: nn.Module) -> nn.Module:
    """The 2D network with a bias everywhere, Keras's epsilon, and the strides in the first convolution of a block."""
    generator = torch.Generator().manual_seed(9)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.bias = nn.Parameter(0.1 * torch.randn(module.out_channels, generator=generator), requires_grad=False)
        elif isinstance(module, nn.BatchNorm2d):
            module.eps = 1.001e-5
        if hasattr(module, "conv3"):
            module.conv1.stride, module.conv2.stride = module.conv2.stride, module.conv1.stride
    return network


def authors_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The names that `nn.Sequential(conv1, bn1, relu, maxpool, layer1, ..., layer4)` gives, below `backbone`."""
    places = ["conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4"]
    return {
        f"backbone.{places.index(name.split('.')[0])}.{name.partition('.')[2]}": value for name, value in state.items()
    }


@pytest.fixture(scope="session")
def networks() -> dict[str, nn.Module]:
    """MONAI's networks whose weights are in the files of `weight_files`; the 3D one is not dilated."""
    return {
        "medicalnet": monai_resnet50(3),
        "official": monai_resnet50(2),
        "converted": keras_form(monai_resnet50(2)),
    }


@pytest.fixture(scope="session")
def weight_files(networks: dict[str, nn.Module], tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    folder = tmp_path_factory.mktemp("weights")
    forms: dict[str, Callable[[dict], dict]] = {
        "medicalnet": lambda state: {"state_dict": {f"module.{name}": value for name, value in state.items()}},
        "official": authors_names,
        # Converted from Keras: without the counters that torch has added later.
        "converted": lambda state: {name: v for name, v in state.items() if not name.endswith("num_batches_tracked")},
    }
    files = {}
    for name, form in forms.items():
        files[name] = folder / f"{name}.pth"
        torch.save(form(dict(networks[name].state_dict())), files[name])
    yield files
    for file in files.values():  # 370 MB
        file.unlink()


@pytest.fixture(scope="session")
def taps_package() -> None:
    if not taps.is_installed():
        pytest.skip(f"{taps.PACKAGE} is not installed; install it with: {taps.INSTALL}")
