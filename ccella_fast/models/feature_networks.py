"""Feature networks from local weight files: MedicalNet's and RadImageNet's ResNet-50. Nothing is downloaded.

MedicalNet (Chen et al., arXiv 1904.00625) is a 3D network, trained on 23 data sets, with strides 1, 2, 1, 1 and dilations 1, 1,
2, 4. MONAI's `resnet50` takes the same weights without complaint but strides further instead of dilating, and so computes other
features. RadImageNet (Mei et al., Radiology: AI 2022) is a 2D network. Two files go by that name: that of the authors and one
converted from Keras. They hold different networks, trained on different inputs, and are recognized by their keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ccella_fast.errors import CheckpointError
from ccella_fast.models.resnet import ResNet50
from ccella_fast.models.weights import first_difference, plain_tensors, read_pt
from ccella_fast.storage import sha256

Kind = Literal["medicalnet", "radimagenet-official", "radimagenet-converted"]

MEDICALNET: dict[str, Any] = {"dimensions": 3, "in_channels": 1, "strides": (1, 2, 1, 1), "dilations": (1, 1, 2, 4)}
# The converted file: Keras's first version of ResNet-50, with a bias everywhere and the stride in a block's first convolution.
CONVERTED: dict[str, Any] = {"dimensions": 2, "in_channels": 3, "bias": True, "epsilon": 1.001e-5, "stride_first": True}
OFFICIAL: dict[str, Any] = {"dimensions": 2, "in_channels": 3}
_OFFICIAL_NAMES = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}


def load_feature_network(path: str | Path, *, field: str) -> tuple[ResNet50, Kind]:
    """The network in a weight file, for inference, and which it is.

    Args:
        path: the file.
        field: the setting or option that named it, for error messages.

    Raises:
        CheckpointError: the file is damaged or of another network.
    """
    tensors = read_state_dict(path)
    if "backbone.0.weight" in tensors or "conv1.bias" in tensors:
        return load_radimagenet(tensors, path, field=field)
    return load_medicalnet(tensors, path, field=field), "medicalnet"


def load_medicalnet(tensors: dict[str, Tensor], path: str | Path, *, field: str) -> ResNet50:
    """MedicalNet's ResNet-50, for inference.

    Args:
        tensors: those of `resnet_50_23dataset.pth`.
        path: the file, for error messages.
        field: the setting or option that named it, for error messages.

    Raises:
        CheckpointError: these are the weights of another network. Those that are likely to be given instead are named.
    """
    first = tensors.get("conv1.weight")
    if first is None or first.ndim != 5:
        why = "this is not a 3D ResNet: it has no 'conv1.weight' with five axes"
    elif "layer1.0.conv3.weight" not in tensors:
        why = "this is a smaller ResNet (10, 18 or 34 layers), the features are those of ResNet-50"
    else:
        return load_resnet50(tensors, "MedicalNet's ResNet-50", path, field=field, **MEDICALNET)
    raise CheckpointError(why, path=path, field=field, fix="give MedicalNet's resnet_50_23dataset.pth")


def load_radimagenet(tensors: dict[str, Tensor], path: str | Path, *, field: str) -> tuple[ResNet50, Kind]:
    """RadImageNet's ResNet-50, for inference, and which of the two it is.

    Args:
        tensors: those of `RadImageNet-ResNet50_notop.pth` (converted from Keras) or of the authors' `ResNet50.pt`.
        path: the file, for error messages.
        field: the setting or option that named it, for error messages.

    Raises:
        CheckpointError: these are the weights of another network.
    """
    if "backbone.0.weight" in tensors:
        tensors = _with_common_names(tensors)
        network = load_resnet50(tensors, "RadImageNet's own ResNet-50", path, field=field, **OFFICIAL)
        return network, "radimagenet-official"
    if "conv1.bias" in tensors:
        what = "RadImageNet's ResNet-50 converted from Keras"
        return load_resnet50(tensors, what, path, field=field, **CONVERTED), "radimagenet-converted"
    why = "this is not a file of RadImageNet's ResNet-50: it has neither 'backbone.0.weight' nor 'conv1.bias'"
    fix = "give RadImageNet-ResNet50_notop.pth or RadImageNet's ResNet50.pt"
    raise CheckpointError(why, path=path, field=field, fix=fix)


def _with_common_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """`backbone.4.0.conv1.weight` -> `layer1.0.conv1.weight`; any other name becomes one that is refused."""
    result = {}
    for name, tensor in tensors.items():
        place, _, rest = name.removeprefix("backbone.").partition(".")
        is_known = name.startswith("backbone.") and place in _OFFICIAL_NAMES
        result[f"{_OFFICIAL_NAMES[place]}.{rest}" if is_known else f"not backbone: {name}"] = tensor
    return result


def check_hash(path: str | Path, known: dict[str, str], *, field: str, fix: str, allow_unknown: bool = False) -> str:
    """The SHA-256 of a weight file, which has to be one of `known` (SHA-256 -> what it is) unless others are allowed.

    Args:
        path: the file.
        known: the accepted SHA-256.
        field: the setting or option that named the file, for error messages.
        fix: what to do about another SHA-256.
        allow_unknown: accept any.

    Raises:
        CheckpointError: the file does not exist, or is none of the known ones.
    """
    if not Path(path).is_file():
        raise CheckpointError("this weight file does not exist", path=path, field=field, fix="check the path")
    found = sha256(path)
    if found not in known and not allow_unknown:
        names = " or ".join(f"{name} ({digest[:12]}...)" for digest, name in known.items())
        why = f"the SHA-256 of this weight file is {found}, which is not that of {names}"
        raise CheckpointError(why, path=path, field=field, fix=fix)
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


def load_resnet50(tensors: dict[str, Tensor], what: str, path: str | Path, *, field: str, **options: Any) -> ResNet50:
    """A ResNet-50 of the given weights, for inference. Names, shapes and dtypes have to agree exactly.

    Args:
        tensors: the weights by name. Older files lack `num_batches_tracked`, which inference does not use.
        what: the name of the network, for error messages.
        path: the file, for error messages.
        field: the setting or option that named the file, for error messages.
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
        raise CheckpointError(why, path=path, field=field, fix="give the file of that network; none is adapted")
    network.load_state_dict(tensors, strict=True, assign=True)
    return network.eval().requires_grad_(False)


@contextmanager
def float32_inference() -> Iterator[None]:
    """No gradients, and on a GPU convolutions in float32: TensorFloat-32 has the ten bits of float16."""
    flags = torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)
    with torch.inference_mode(), flags:
        yield
