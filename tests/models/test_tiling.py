"""Decoding and encoding in slabs: equal to MONAI's unsplit network whatever the cuts, and within the memory planned."""

from __future__ import annotations

import functools

import pytest
import torch
from monai.apps.generation.maisi.networks.autoencoderkl_maisi import AutoencoderKlMaisi
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ccella_fast.config import AutoencoderConfig
from ccella_fast.errors import ConfigError
from ccella_fast.models.autoencoder import Autoencoder, tiling
from ccella_fast.models.autoencoder import tiling_plan as planning
from ccella_fast.models.autoencoder.tiling_plan import cuts, edges_of, make_tiling_plan
from ccella_fast.models.blocks import GroupNormSiLU

CONFIG = AutoencoderConfig(num_channels=[8, 16, 24], num_res_blocks=[1, 2, 1], norm_num_groups=4, latent_channels=3)
GRIDS = [(5, 3, 2), (21, 2, 3), (8, 5, 1)]
GIB = 2**30


@pytest.fixture
def vae():
    torch.manual_seed(0)
    vae = Autoencoder(CONFIG).eval().requires_grad_(False)
    for name, parameter in vae.named_parameters():
        if "norm" in name or name.endswith("bias"):
            parameter.add_(0.3 * torch.randn_like(parameter))  # no affine map may be the identity
    return vae


@pytest.fixture
def theirs(vae):
    net = maisi(CONFIG)
    net.load_state_dict(vae.state_dict())
    return net.eval().requires_grad_(False)


def maisi(config, **overrides):
    settings = {"num_splits": 1, "norm_float16": False, "save_mem": False} | overrides
    return AutoencoderKlMaisi(
        3, 1, 1, config.num_res_blocks, config.num_channels, [False] * len(config.num_channels),
        latent_channels=config.latent_channels, norm_num_groups=config.norm_num_groups, norm_eps=config.norm_eps, **settings,
    )  # fmt: skip


def draw(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=dtype)


class Allocations(TorchDispatchMode):
    """peak: the most bytes that tensors made in here held at one time."""

    def __init__(self):
        super().__init__()
        self.alive, self.peak = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.alive.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))
        self.alive = {key: entry for key, entry in self.alive.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return result


# The same numbers


@pytest.mark.parametrize("slab", [2**29, 30_000, 1])
@pytest.mark.parametrize("grid", GRIDS)
def test_equals_monai_s_whole_network(grid, slab, vae, theirs, monkeypatch):
    """Whole, a few slabs, single planes; odd grids; pieces of unequal length."""
    monkeypatch.setattr(planning, "SLAB", slab)
    z, x = draw(2, 3, *grid), draw(2, 1, *(4 * size for size in grid))
    plan = vae.decoder.plan(tuple(z.shape[1:]), z.device)
    assert (plan.tiles == 0) == (slab == 2**29)
    torch.testing.assert_close(vae.decode(z), theirs.decode(z), rtol=1e-4, atol=1e-4)
    for actual, expected in zip(vae.encode(x), theirs.encode(x), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mistake", ["statistics of one slab", "no halo", "none"])
def test_comparison_notices_a_wrong_tiling(mistake, vae, theirs, monkeypatch):
    """Negative control: the two mistakes of inexact tilings."""
    monkeypatch.setattr(planning, "SLAB", 1)
    if mistake == "statistics of one slab":
        merge = tiling.Statistics.merge
        monkeypatch.setattr(
            tiling.Statistics, "merge", lambda self: (self.parts.__delitem__(slice(1, None)), merge(self))[1]
        )
    if mistake == "no halo":
        planes = tiling._planes
        alone = lambda conv, read, length, lo, hi: planes(conv, lambda a, b: read(lo, hi), hi - lo, 0, hi - lo)  # noqa: E731
        monkeypatch.setattr(
            tiling, "_planes",
            lambda conv, *rest: alone(conv, *rest) if conv.kernel_size[0] == 3 and conv.stride[0] == 1 else planes(conv, *rest),
        )  # fmt: skip
    z = draw(1, 3, 9, 3, 2)
    assert torch.allclose(vae.decode(z), theirs.decode(z), rtol=1e-4, atol=1e-4) == (mistake == "none")


def test_bf16_in_slabs_is_as_exact_as_whole(vae, monkeypatch):
    z = draw(1, 3, 16, 4, 4)
    expected = Autoencoder(CONFIG).double()
    expected.load_state_dict(vae.state_dict())
    with torch.no_grad():
        expected = expected.decode(z.double())
    vae.to(torch.bfloat16)
    errors = []
    for slab in (2**29, 1):
        monkeypatch.setattr(planning, "SLAB", slab)
        errors.append((vae.decode(z.bfloat16()).double() - expected).abs().mean())
    assert 0 < errors[1] <= 1.2 * errors[0]


def test_statistics_far_from_zero():
    """mean 1000, standard deviation 1: sums of squares in fp32 would be wrong by a half."""
    norm = GroupNormSiLU(4, 8, 1e-6)
    volume = (1000 + draw(1, 8, 12, 6, 6, dtype=torch.float64)).float()
    statistics = tiling.Statistics(norm)
    for part in volume.split([1, 7, 4], dim=2):
        statistics.add(part)
    mean, rstd = statistics.merge()
    grouped = volume.double().reshape(1, 4, -1)
    torch.testing.assert_close(mean.double(), grouped.mean(2), rtol=1e-6, atol=0)
    torch.testing.assert_close(rstd.double(), (grouped.var(2, correction=0) + 1e-6).rsqrt(), rtol=1e-5, atol=0)
    naive = volume.reshape(1, 4, -1)
    assert not torch.allclose(naive.square().mean(2) - naive.mean(2) ** 2, torch.tensor(1.0), rtol=0.05)


def test_a_volume_is_the_same_in_any_batch(vae):
    z = draw(3, 3, 5, 3, 2)
    assert torch.equal(vae.decode(z)[1], vae.decode(z[1:2])[0])


@pytest.mark.parametrize("resample", ["", "up", "down"])
@pytest.mark.parametrize("length", [8, 23, 64])
def test_cuts_cover_every_plane_once(length, resample, vae):
    each = next(each for each in (*vae.decoder.passes(), *vae.encoder.passes()) if each.resample == resample)
    length *= 2 if resample == "down" else 1
    output = each.output((1, length, 8, 8))[1]
    for planes in (1, 3, output):
        slabs = [slab for piece in cuts(each, edges_of(length), output, planes) for slab in piece]
        assert [lo for lo, _ in slabs] == [0, *(hi for _, hi in slabs[:-1])] and slabs[-1][1] == output
        assert max(hi - lo for lo, hi in slabs) <= planes


# Memory


def full_size():
    with torch.device("meta"):
        return Autoencoder(AutoencoderConfig()).eval().requires_grad_(False)


@pytest.mark.parametrize("budget", [64 * GIB, 5.4 * GIB])
@pytest.mark.parametrize("direction", ["decoder", "encoder"])
def test_plan_counts_what_is_allocated(direction, budget):
    """256x256x128 in fp32: the estimate against every tensor that is really made (on the meta device)."""
    blocks = getattr(full_size(), direction)
    shape = {"decoder": (4, 64, 64, 32), "encoder": (1, 256, 256, 128)}[direction]
    plan = make_tiling_plan(blocks.passes(), shape, 4, int(budget))
    with Allocations() as counted:
        result = tiling.run(blocks.passes(), plan, torch.empty(1, *shape, device="meta"))
    assert result.shape[1:] == plan.steps[-1].output
    assert plan.bytes <= budget and counted.peak == pytest.approx(plan.bytes, rel=0.03)


def test_half_of_the_stock_decoder_s_memory():
    vae, z = full_size(), torch.empty(1, 4, 64, 64, 32, device="meta")
    with torch.device("meta"):
        theirs = maisi(AutoencoderConfig(), num_splits=2, dim_split=1).eval().requires_grad_(False)
    with Allocations() as stock:
        theirs.decode(z)
    plan = make_tiling_plan(vae.decoder.passes(), tuple(z.shape[1:]), 4, 64 * GIB)
    with Allocations() as ours:
        tiling.run(vae.decoder.passes(), plan, z)
    with Allocations() as plain:
        vae.decode(z)  # module by module, as in training
    assert ours.peak < 0.5 * stock.peak < plain.peak


def test_a_smaller_budget_is_kept_or_refused(vae):
    z = draw(1, 3, 24, 6, 6)
    whole = vae.decoder.plan(tuple(z.shape[1:]), z.device)
    assert whole.tiles == 0 and str(whole).startswith("whole: peak")
    budget = whole.bytes * 2 // 3
    plan = vae.decoder.plan(tuple(z.shape[1:]), z.device, budget)
    assert plan.tiles > 0 and plan.bytes <= budget and f"{plan.tiles} tiles" in str(plan)
    with Allocations() as counted:
        decoded = vae.decode(z, memory=budget)
    assert counted.peak < budget + 2**20  # the weights' own small copies
    torch.testing.assert_close(decoded, vae.decode(z), rtol=1e-4, atol=1e-5)
    with pytest.raises(ConfigError, match=r"GiB are needed even plane by plane") as caught:
        vae.decode(z, memory=1000)
    assert "bf16" in str(caught.value)


def test_host_keeps_the_activations_of_a_small_device(vae):
    passes, shape = vae.decoder.passes(), (3, 24, 6, 6)
    need = make_tiling_plan(passes, shape, 4, GIB).bytes
    with pytest.raises(ConfigError):
        make_tiling_plan(passes, shape, 4, need // 3)
    plan = make_tiling_plan(passes, shape, 4, need // 3, host=True)
    assert plan.on_host and plan.bytes <= need // 3 and "activations on the host" in str(plan)
    x = draw(1, *shape)
    torch.testing.assert_close(tiling.run(passes, plan, x), vae.decoder(x), rtol=1e-4, atol=1e-5)


def test_budget_and_gradients_do_not_mix(vae):
    vae.requires_grad_(True)
    with pytest.raises(ValueError, match=r"torch\.no_grad"):
        vae.decode(draw(1, 3, 5, 3, 2), memory=GIB)
    with torch.no_grad():
        vae.decode(draw(1, 3, 5, 3, 2), memory=GIB)


def test_enlargement_is_torch_s():
    x = draw(1, 3, 5, 4, 6)
    expected = functools.partial(torch.nn.functional.interpolate, scale_factor=2.0, mode="trilinear")(x)
    torch.testing.assert_close(tiling.enlarge(x), expected, rtol=1e-5, atol=1e-6)
