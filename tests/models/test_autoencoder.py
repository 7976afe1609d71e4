"""The autoencoder compared with `AutoencoderKlMaisi` of MONAI; its files, and the errors that wrong files give."""

from __future__ import annotations

import json
import os

import pytest
import torch
from monai.apps.generation.maisi.networks.autoencoderkl_maisi import AutoencoderKlMaisi

from ccella_fast.config import AutoencoderConfig
from ccella_fast.errors import CheckpointError
from ccella_fast.models.autoencoder import Autoencoder, load_autoencoder, save_autoencoder

TINY = AutoencoderConfig(num_channels=[8, 16], num_res_blocks=[1, 2], norm_num_groups=4, latent_channels=3)


@pytest.fixture
def vae():
    torch.manual_seed(0)
    return Autoencoder(TINY).eval()


@pytest.fixture
def saved(vae, tmp_path):
    save_autoencoder(vae, tmp_path / "vae")
    return tmp_path / "vae"


def image(grid=(8, 12, 4)):
    return torch.rand(2, 1, *grid, generator=torch.Generator().manual_seed(1))


def test_names_shapes_and_order_equal_the_reference(state_dict_table):
    with torch.device("meta"):
        found = Autoencoder(AutoencoderConfig()).state_dict()
    rows = [(name, ",".join(map(str, tensor.shape))) for name, tensor in found.items()]
    assert rows == state_dict_table("autoencoder")
    assert sum(tensor.numel() for tensor in found.values()) == 20_944_897


@pytest.mark.parametrize("wrong", [False, True], ids=["equal", "other-epsilon"])
def test_values_and_gradients_equal_monai(wrong, vae):
    """Posterior, reconstruction and all gradients, with levels of unequal depth. Negative control: another epsilon."""
    theirs = AutoencoderKlMaisi(
        3, 1, 1, [1, 2], [8, 16], [False, False], latent_channels=3, norm_num_groups=4, norm_eps=1e-6,
        num_splits=1, norm_float16=False, save_mem=False,
    )  # fmt: skip
    theirs.load_state_dict(vae.state_dict())
    ours = Autoencoder(TINY.model_copy(update={"norm_eps": 1e-2})) if wrong else vae
    ours.load_state_dict(vae.state_dict())
    results = []
    for net in (ours, theirs):
        mean, sigma = net.encode(image())
        decoded = net.decode(mean + 0.5 * sigma)
        loss = decoded.square().mean() + sigma.log().square().mean()
        results.append([mean, sigma, decoded, *torch.autograd.grad(loss, list(net.parameters()))])
    close = [torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(*results, strict=True)]
    assert all(close) != wrong and all(close[:3]) != wrong


def test_forward_is_encode_and_decode(vae):
    noise = torch.randn(2, 3, 4, 6, 2)
    reconstruction, mean, sigma = vae(image(), noise)
    assert torch.equal(reconstruction, vae.decode(mean + sigma * noise)) and mean.shape == noise.shape
    assert torch.equal(vae(image())[0], vae.decode(mean))
    assert not torch.equal(reconstruction, vae.decode(mean))


def test_log_variance_is_clamped(vae):
    bias = vae.quant_conv_log_sigma.conv.bias.data
    for value, expected in ((1e4, 10.0), (-1e4, -15.0)):
        bias.fill_(value)
        torch.testing.assert_close(vae.encode(image())[1].log(), torch.full((2, 3, 4, 6, 2), expected))


def test_memory_format_does_not_change_values(vae):
    strided = image().to(memory_format=torch.channels_last_3d)
    last = Autoencoder(TINY).to(memory_format=torch.channels_last_3d)
    last.load_state_dict(vae.state_dict())
    for actual, expected in zip(last(strided.expand(-1, -1, -1, -1, -1)), vae(image()), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_compiles_without_graph_breaks_and_without_host_synchronization(vae):
    torch._dynamo.reset()
    compiled = torch.compile(vae, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(image())[0], vae(image())[0])
    assert vae.to("meta")(image().to("meta"))[0].shape == image().shape


def test_error_names_a_grid_that_is_not_divisible(vae):
    with pytest.raises(ValueError, match=r"multiple of 2, got \(8, 7, 4\)"):
        vae.encode(image((8, 7, 4)))


# Files


def test_saving_and_loading_is_bitwise_equal(vae, saved):
    for path in (saved, saved.parent):  # the folder itself, or one that contains it as `vae/`
        loaded = load_autoencoder(path, TINY)
        assert loaded.config == TINY and not loaded.training
        assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in vae.state_dict().items())
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert set(json.loads((saved / "manifest.json").read_text())["sha256"]) == {"config.json", "model.safetensors"}


def test_state_dict_of_the_reference_is_loaded(vae, tmp_path):
    torch.save(vae.state_dict(), tmp_path / "vae.pt")
    assert torch.equal(
        load_autoencoder(tmp_path / "vae.pt", TINY).decode(torch.ones(1, 3, 2, 2, 2)),
        vae.decode(torch.ones(1, 3, 2, 2, 2)),
    )
    with pytest.raises(CheckpointError, match="not the weights of this autoencoder.*missing"):
        load_autoencoder(tmp_path / "vae.pt")  # MAISI's sizes are assumed
    torch.save({"epoch": 1}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match="'epoch' is not a tensor"):
        load_autoencoder(tmp_path / "other.pt", TINY)
    torch.save(os.path.join, tmp_path / "hostile.pt")
    with pytest.raises(CheckpointError, match="refused"):
        load_autoencoder(tmp_path / "hostile.pt", TINY)


def test_missing_files_are_errors(saved):
    with pytest.raises(CheckpointError, match="an autoencoder is needed"):
        load_autoencoder(saved / "nowhere")
    (saved / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="missing"):
        load_autoencoder(saved)
    (saved / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="does not exist"):
        load_autoencoder(saved)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_flipped_bit_is_an_error(name, saved):
    content = bytearray((saved / name).read_bytes())
    content[-20] ^= 1
    (saved / name).write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged") as caught:
        load_autoencoder(saved)
    assert caught.value.path == str(saved / name)


def test_another_manifest_is_an_error(saved):
    (saved / "manifest.json").write_text('{"format": "ccella_fast.checkpoint", "version": 1}')
    with pytest.raises(CheckpointError, match="not the manifest of an autoencoder"):
        load_autoencoder(saved)


def test_error_names_the_setting_that_differs(saved):
    with pytest.raises(CheckpointError, match=r"latent_channels 3, but the configuration has 4") as caught:
        load_autoencoder(saved, TINY.model_copy(update={"latent_channels": 4}))
    assert caught.value.field == "autoencoder.latent_channels"


def test_error_names_the_first_tensor_that_differs(vae, tmp_path):
    other = Autoencoder(TINY.model_copy(update={"num_channels": [8, 24]}))
    torch.save(other.state_dict(), tmp_path / "vae.pt")
    match = r"'encoder.blocks.3.conv1.conv.conv.weight' has shape \[24, 8, 3, 3, 3\], \[16, 8, 3, 3, 3\] is expected"
    with pytest.raises(CheckpointError, match=match):
        load_autoencoder(tmp_path / "vae.pt", TINY)
