"""ResNet-50 as feature network, in 2D and 3D, with the differences between the networks that are published as weights."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

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
