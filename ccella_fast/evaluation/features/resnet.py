"""ResNet-50 as feature network, in 2D and 3D, with the differences between the networks that are published as weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ccella_fast.errors import CheckpointError
from ccella_fast.models.weights import first_difference, plain_tensors, read_pt
from ccella_fast.storage import sha256

_BLOCKS = (3, 4, 6, 3)


class Bottleneck(nn.Module):
    """1, 3, 1 convolution with a shortcut (He et al., arXiv 1512.03385)."""

    def __init__(
        self,
        dimensions: int,
        channels: int,
        width: int,
        stride: int,
        dilation: int,
        bias: bool,
        epsilon: float,
        stride_first: bool,
    ):
        super().__init__()
        conv = (nn.Conv2d, nn.Conv3d)[dimensions - 2]
        norm = (nn.BatchNorm2d, nn.BatchNorm3d)[dimensions - 2]
        strides = (stride, 1) if stride_first else (1, stride)
        self.conv1 = conv(channels, width, 1, stride=strides[0], bias=bias)
        self.bn1 = norm(width, eps=epsilon)
        self.conv2 = conv(width, width, 3, stride=strides[1], padding=dilation, dilation=dilation, bias=bias)
        self.bn2 = norm(width, eps=epsilon)
        self.conv3 = conv(width, 4 * width, 1, bias=bias)
        self.bn3 = norm(4 * width, eps=epsilon)
        self.downsample = None
        if stride > 1 or channels != 4 * width:
            projection = conv(channels, 4 * width, 1, stride=stride, bias=bias)
            self.downsample = nn.Sequential(projection, norm(4 * width, eps=epsilon))

    def forward(self, x: Tensor) -> Tensor:
        """(n, channels, ...) -> (n, 4 * width, ...)."""
        shortcut = x if self.downsample is None else self.downsample(x)
        x = F.relu_(self.bn1(self.conv1(x)))
        x = F.relu_(self.bn2(self.conv2(x)))
        return F.relu_(self.bn3(self.conv3(x)).add_(shortcut))


class ResNet50(nn.Module):
    """ResNet-50 without its classifier: the mean of the last map, 2048 numbers.

    Args:
        dimensions: 2 or 3.
        in_channels: of the image.
        strides: of the four stages.
        dilations: of the 3-wide convolutions in the four stages.
        bias: whether convolutions have one.
        epsilon: of the batch norms.
        stride_first: whether a block strides in its first convolution, as in Keras, or in the 3-wide one.
    """

    def __init__(
        self,
        dimensions: int,
        in_channels: int,
        *,
        strides: Sequence[int] = (1, 2, 2, 2),
        dilations: Sequence[int] = (1, 1, 1, 1),
        bias: bool = False,
        epsilon: float = 1e-5,
        stride_first: bool = False,
    ):
        super().__init__()
        conv = (nn.Conv2d, nn.Conv3d)[dimensions - 2]
        self.conv1 = conv(in_channels, 64, 7, stride=2, padding=3, bias=bias)
        self.bn1 = (nn.BatchNorm2d, nn.BatchNorm3d)[dimensions - 2](64, eps=epsilon)
        self.maxpool = (nn.MaxPool2d, nn.MaxPool3d)[dimensions - 2](3, stride=2, padding=1)
        channels = 64
        for stage, blocks in enumerate(_BLOCKS):
            width = 64 * 2**stage
            layer = nn.Sequential()
            for block in range(blocks):
                stride = strides[stage] if block == 0 else 1
                options = (bias, epsilon, stride_first)
                layer.append(Bottleneck(dimensions, channels, width, stride, dilations[stage], *options))
                channels = 4 * width
            self.add_module(f"layer{stage + 1}", layer)

    def last_map(self, x: Tensor) -> Tensor:
        """(n, in_channels, ...) -> (n, 2048, ...)."""
        x = self.maxpool(F.relu_(self.bn1(self.conv1(x))))
        for stage in range(len(_BLOCKS)):
            x = self.get_submodule(f"layer{stage + 1}")(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        """(n, in_channels, ...) -> (n, 2048)."""
        return self.last_map(x).flatten(2).mean(2)


def check_hash(path: str | Path, known: dict[str, str], allow_unknown: bool) -> str:
    """The SHA-256 of a weight file, which has to be one of `known` (SHA-256 -> what it is) unless others are allowed.

    Raises:
        CheckpointError: the file does not exist, or is none of the known ones.
    """
    if not Path(path).is_file():
        raise CheckpointError("this weight file does not exist", path=path, field="features", fix="check the path")
    found = sha256(path)
    if found not in known and not allow_unknown:
        names = " or ".join(f"{name} ({digest[:12]}...)" for digest, name in known.items())
        why = f"the SHA-256 of this weight file is {found}, which is not that of {names}"
        fix = "copy the file again; if it is meant to be another one, allow unknown weights (--allow_unknown_weights)"
        raise CheckpointError(why, path=path, field="features", fix=fix)
    return found


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """The state dict of a `.pt` or `.pth`, also below the key `state_dict`, without the prefix of `nn.DataParallel`."""
    values: Any = read_pt(path)
    if isinstance(values, dict) and isinstance(values.get("state_dict"), dict):
        values = values["state_dict"]
    tensors = plain_tensors(values, path=path)
    if all(name.startswith("module.") for name in tensors):
        return {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    return tensors


def load_resnet50(tensors: dict[str, Tensor], what: str, path: str | Path, **options: Any) -> ResNet50:
    """A ResNet-50 of the given weights, for inference. Names, shapes and dtypes have to agree exactly.

    Args:
        tensors: the weights by name. Older files lack `num_batches_tracked`, which inference does not use.
        what: the name of the network, for error messages.
        path: the file, for error messages.
        options: of `ResNet50`.

    Raises:
        CheckpointError: these are not the weights of that network; the first difference is named.
    """
    with torch.device("meta"):
        network = ResNet50(**options)
    expected = network.state_dict()
    unused = {name: torch.zeros((), dtype=torch.int64) for name in expected if name.endswith("num_batches_tracked")}
    if not any(name in tensors for name in unused):
        tensors = {**tensors, **unused}
    difference = first_difference(expected, tensors)
    if difference is None:
        wrong = [name for name, tensor in tensors.items() if tensor.dtype != expected[name].dtype]
        difference = (
            f"'{wrong[0]}' is {tensors[wrong[0]].dtype}, {expected[wrong[0]].dtype} is expected" if wrong else None
        )
    if difference is None:
        broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
        difference = f"'{broken[0]}' has values that are not finite" if broken else None
    if difference is not None:
        why = f"these are not the weights of {what}: {difference}"
        raise CheckpointError(why, path=path, field="features", fix="give the file of that network; none is adapted")
    network.load_state_dict(tensors, strict=True, assign=True)
    return network.eval().requires_grad_(False)


@contextmanager
def float32_inference() -> Iterator[None]:
    """No gradients, and on a GPU convolutions in float32: TensorFloat-32 has the ten bits of float16."""
    flags = torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)
    with torch.inference_mode(), flags:
        yield
