"""Reference `.pt` files: any class of scale factor is read, what is unsafe or does not fit is refused, the layout written."""

from __future__ import annotations

import copy
import os
import random
import subprocess
import sys

import pytest
import torch

from ccella_fast.config import ModelConfig
from ccella_fast.errors import CheckpointError, ConfigError
from ccella_fast.models import build_model
from ccella_fast.models.weights import read_pt
from ccella_fast.reference_checkpoint import read_reference, write_reference
from ccella_fast.variants import VARIANTS

TINY = {
    "num_channels": [32, 64],
    "attention_levels": [False, True],
    "num_head_channels": [0, 32],
    "num_res_blocks": 1,
    "cross_attention_dim": 48,
    "input_dim": 24,
    "num_latents": 4,
    "adapter_blocks": 2,
    "adapter_time_dim": 16,
    "class_head_dim": 8,
}


def values(model, **changes):
    """A reference checkpoint's dictionary."""
    base = {"epoch": 3, "loss": 0.1, "num_train_timesteps": 1000, "scale_factor": torch.tensor(0.9)}
    return base | {"unet_state_dict": model.state_dict(), "optimizer": {}, "scheduler": {}} | changes


@pytest.fixture(scope="module")
def ccella():
    return build_model("CCELLA", **TINY)


@pytest.mark.parametrize("name", VARIANTS)
def test_architecture_is_found_from_names_and_shapes(name, tmp_path):
    model = build_model(name, **TINY)
    torch.save(values(model), tmp_path / "model.pt")
    absent = ["class_head_dim"] if VARIANTS[name].head == "none" else []
    if not VARIANTS[name].text:
        absent += ["cross_attention_dim", "input_dim", "num_latents", "adapter_blocks", "adapter_time_dim"]
    defaults = ModelConfig()
    expected = model.config.model_copy(update={key: getattr(defaults, key) for key in absent})
    assert read_reference(tmp_path / "model.pt", variant=name).config == expected
    assert read_reference(tmp_path / "model.pt").variant == ("CCELLA" if name == "L1ONLY" else name)


def test_round_trip_is_bit_equal(ccella, tmp_path):
    scale = [1 / 3]
    state = copy.deepcopy(ccella).to(memory_format=torch.channels_last_3d).state_dict()
    write_reference(tmp_path / "a.pt", state, scale)
    found = read_reference(tmp_path / "a.pt")
    assert (found.scale_factor, found.epoch, found.num_train_timesteps) == (scale, 0, 1000)
    assert list(found.state_dict) == list(ccella.state_dict())
    assert all(torch.equal(found.state_dict[name], tensor) for name, tensor in ccella.state_dict().items())
    raw = torch.load(tmp_path / "a.pt", weights_only=True)
    assert set(raw) == {"epoch", "loss", "num_train_timesteps", "scale_factor", "unet_state_dict"}
    assert raw["scale_factor"].shape == ()
    assert not all(tensor.is_contiguous() for tensor in state.values())
    assert all(tensor.is_contiguous() for tensor in raw["unet_state_dict"].values())


def test_a_view_does_not_carry_its_whole_storage(ccella, tmp_path):
    large = torch.zeros(4_000_000)
    state = {name: large[: tensor.numel()].view(tensor.shape) for name, tensor in ccella.state_dict().items()}
    write_reference(tmp_path / "a.pt", {name: state[name] for name in list(state)[:2]}, [1.0])
    assert (tmp_path / "a.pt").stat().st_size < 1_000_000


def test_three_sequences(tmp_path):
    model = build_model("CCELLA", latent_channels=[4, 4, 4], **TINY)
    write_reference(tmp_path / "a.pt", model.state_dict(), [0.5, 0.25, 2.0])
    found = read_reference(tmp_path / "a.pt")
    assert found.scale_factor == [0.5, 0.25, 2.0] and found.config.latent_channels == [4, 4, 4]
    assert isinstance(torch.load(tmp_path / "a.pt", weights_only=True)["scale_factor"], tuple)
    torch.save(values(model, scale_factor=(0.5,) * 5), tmp_path / "b.pt")
    with pytest.raises(CheckpointError, match="12 latent channels and 5 scale factors"):
        read_reference(tmp_path / "b.pt")


def test_scale_factor_as_monai_tensor(ccella, tmp_path):
    """MONAI's tensor with the metadata of a loaded batch, alone and in a tuple; read by a process without MONAI."""
    import numpy as np
    from monai.data.meta_tensor import MetaTensor

    batch = MetaTensor(torch.linspace(-2, 3, 64).reshape(1, 1, 4, 4, 4), affine=torch.eye(4))
    batch.meta |= {"original_affine": np.eye(4), "spatial_shape": np.array([4, 4, 4]), "filename_or_obj": "x.nii.gz"}
    factor = 1 / torch.std(batch)
    assert type(factor) is MetaTensor and factor.meta
    torch.save(values(ccella, scale_factor=factor), tmp_path / "one.pt")
    torch.save(values(ccella, scale_factor=(factor, factor)), tmp_path / "two.pt")
    code = (
        "import sys; from ccella_fast.reference_checkpoint import read_reference; "
        "print(*[read_reference(path).scale_factor for path in sys.argv[1:]]); assert 'monai' not in sys.modules"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "one.pt"), str(tmp_path / "two.pt")]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    assert printed == f"[{float(factor)}] [{float(factor)}, {float(factor)}]"
    assert read_reference(tmp_path / "two.pt").scale_factor == [float(factor)] * 2  # here MONAI is imported


class Member:
    def __init__(self, owner):
        self.owner = owner

    def __reduce__(self):
        return getattr, (self.owner, "__init__")


def test_getattr_gives_members_of_stand_ins_and_nothing_else(tmp_path):
    """Python before 3.11.4 pickles MONAI's enumerations as getattr(class, name)."""
    torch.save({"key": Member(torch.Tensor)}, tmp_path / "hostile.pt")
    with pytest.raises(CheckpointError, match="refused"):
        read_pt(tmp_path / "hostile.pt")


class Canary:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("where", ["scale_factor", "unet_state_dict", "whole"])
def test_hostile_file_is_refused_and_never_run(where, ccella, tmp_path):
    canary = tmp_path / "canary"
    whole = Canary(str(canary)) if where == "whole" else values(ccella, **{where: Canary(str(canary))})
    torch.save(whole, tmp_path / "bad.pt")
    with pytest.raises(CheckpointError, match="mkdir"):
        read_reference(tmp_path / "bad.pt")
    assert not canary.exists()
    torch.load(tmp_path / "bad.pt", weights_only=False)  # noqa: S614  the canary is a live one
    assert canary.exists()


@pytest.mark.parametrize("damage", ["truncated", "text", "empty", "list", "no state dict"])
def test_unreadable_file(damage, ccella, tmp_path):
    file = tmp_path / "a.pt"
    torch.save([1, 2] if damage == "list" else values(ccella), file)
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:5000])
    elif damage == "no state dict":
        torch.save({"epoch": 1}, file)
    elif damage != "list":
        file.write_bytes(b"" if damage == "empty" else b"not a checkpoint")
    with pytest.raises(CheckpointError) as caught:
        read_reference(file)
    assert caught.value.path == str(file) and len(str(caught.value).splitlines()) <= 5


@pytest.mark.parametrize("zipped", [True, False])
def test_damaged_bytes_give_our_error_or_a_value(zipped, tmp_path):
    file, generator, refused = tmp_path / "a.pt", random.Random(0), 0
    torch.save({"a": torch.ones(3), "b": [1, "two"]}, file, _use_new_zipfile_serialization=zipped)
    whole = file.read_bytes()
    for _ in range(150):
        damaged = bytearray(whole)
        damaged[generator.randrange(len(whole))] ^= 1 << generator.randrange(8)
        file.write_bytes(damaged)
        try:
            read_pt(file)
        except CheckpointError:
            refused += 1
    assert refused > 10


def test_missing_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        read_reference(tmp_path / "none.pt")


@pytest.mark.parametrize("factor", [None, 0.0, float("nan"), "1.0", torch.ones(2), ()])
def test_bad_scale_factor(factor, ccella, tmp_path):
    torch.save(values(ccella, scale_factor=factor), tmp_path / "a.pt")
    with pytest.raises(CheckpointError) as caught:
        read_reference(tmp_path / "a.pt")
    assert caught.value.field == "scale_factor"


def test_another_variant_is_named(tmp_path):
    torch.save(values(build_model("DECOUPLED", **TINY)), tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="not a CCELLA checkpoint.*DECOUPLED"):
        read_reference(tmp_path / "a.pt", variant="CCELLA")
    with pytest.raises(ConfigError, match="no variant 'CELLA'"):
        read_reference(tmp_path / "a.pt", variant="CELLA")


def test_first_differing_tensor_is_named(ccella, tmp_path):
    file, name = tmp_path / "a.pt", "unet.middle_block.resnet_2.conv1.conv.bias"
    state = dict(ccella.state_dict())
    torch.save(values(ccella, unet_state_dict={key: state[key] for key in state if key != name}), file)
    with pytest.raises(CheckpointError, match=f"'{name}' is missing"):
        read_reference(file)
    torch.save(values(ccella, unet_state_dict=state | {"unet.extra": torch.ones(1), "unet.other": torch.ones(1)}), file)
    with pytest.raises(CheckpointError, match="'unet.extra' and 1 more are unknown"):
        read_reference(file)
    torch.save(values(ccella, unet_state_dict=state | {name: torch.ones(5)}), file)
    with pytest.raises(CheckpointError, match=rf"'{name}' has shape \[5\], \[64\] is expected"):
        read_reference(file)
    torch.save(values(ccella, unet_state_dict=state | {name: "text"}), file)
    with pytest.raises(CheckpointError, match="is not a tensor"):
        read_reference(file)


def test_sizes_that_shapes_hide_come_from_the_configuration(tmp_path):
    """Head width 16 and 32 give the same shapes and other outputs."""
    narrow = build_model("MAISI", **TINY | {"num_head_channels": [0, 16]})
    torch.save(values(narrow), tmp_path / "a.pt")
    assert read_reference(tmp_path / "a.pt").config.num_head_channels == [0, 32]
    assert read_reference(tmp_path / "a.pt", config=narrow.config).config == narrow.config
    with pytest.raises(CheckpointError, match="not a MAISI checkpoint"):
        read_reference(tmp_path / "a.pt", config=build_model("MAISI", **TINY | {"num_res_blocks": 2}).config)


def test_our_exports_carry_what_shapes_do_not_show(tmp_path):
    model = build_model("L1ONLY", **TINY | {"num_head_channels": [0, 16], "norm_num_groups": 16})
    write_reference(tmp_path / "with.pt", model.state_dict(), [1.0], config=model.config)
    write_reference(tmp_path / "without.pt", model.state_dict(), [1.0])
    assert read_reference(tmp_path / "with.pt").config == model.config
    assert read_reference(tmp_path / "without.pt").config != model.config
    torch.save(values(model, ccella_fast_model={"variant": "L1ONLY", "widths": 3}), tmp_path / "bad.pt")
    with pytest.raises(CheckpointError, match="stored model configuration is malformed"):
        read_reference(tmp_path / "bad.pt")


@pytest.mark.parametrize("checksums", [True, False], ids=["checksums", "written-without"])
def test_a_changed_weight_is_noticed_by_its_checksum(tmp_path, checksums):
    """Negative control: a file that was written without checksums is read with the changed weight."""
    torch.serialization.set_crc32_options(checksums)
    try:
        torch.save({"weight": torch.full((100,), 1.5)}, tmp_path / "weights.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert torch.equal(read_pt(tmp_path / "weights.pt")["weight"], torch.full((100,), 1.5))
    content = (tmp_path / "weights.pt").read_bytes()
    place = content.index(torch.full((100,), 1.5).numpy().tobytes()) + 80
    (tmp_path / "weights.pt").write_bytes(content[:place] + b"\x7f" + content[place + 1 :])
    if checksums:
        with pytest.raises(CheckpointError, match="not a readable weight file: Bad CRC-32"):
            read_pt(tmp_path / "weights.pt")
    else:
        assert not torch.equal(read_pt(tmp_path / "weights.pt")["weight"], torch.full((100,), 1.5))
