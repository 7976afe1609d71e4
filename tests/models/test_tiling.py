"""Decoding and encoding in slabs equals MONAI's network without splits for any slabs, and stays within the planned memory."""

from __future__ import annotations

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
from ccella_fast.models.autoencoder.tiling_plan import chunk_edges, make_tiling_plan, slab_bounds
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
            parameter.add_(0.3 * torch.randn_like(parameter))  # so that no affine map is the identity
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
    """Records the peak of the bytes that are held by tensors created in this context."""

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


# Values


@pytest.mark.parametrize("slab_bytes", [2**29, 30_000, 1], ids=["whole", "several-slabs", "single-planes"])
@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: "x".join(map(str, grid)))
def test_tiling_equals_monai_without_splits(grid, slab_bytes, vae, theirs, monkeypatch):
    """Also on odd grids, and with chunks of unequal length."""
    monkeypatch.setattr(planning, "SLAB_BYTES", slab_bytes)
    z, x = draw(2, 3, *grid), draw(2, 1, *(4 * size for size in grid))
    plan = vae.decoder.plan(tuple(z.shape[1:]), z.device)
    assert (plan.slabs == 0) == (slab_bytes == 2**29)
    torch.testing.assert_close(vae.decode(z), theirs.decode(z), rtol=1e-4, atol=1e-4)
    for actual, expected in zip(vae.encode(x), theirs.encode(x), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mistake", ["statistics of one slab", "no halo", "none"])
def test_comparison_detects_a_wrong_tiling(mistake, vae, theirs, monkeypatch):
    """Negative control: the two usual mistakes of inexact tilings."""
    monkeypatch.setattr(planning, "SLAB_BYTES", 1)
    if mistake == "statistics of one slab":
        merge = tiling.GroupNormStatistics.merge
        monkeypatch.setattr(
            tiling.GroupNormStatistics, "merge", lambda self: (self.parts.__delitem__(slice(1, None)), merge(self))[1]
        )
    if mistake == "no halo":
        convolve = tiling._convolve_planes

        def convolve_without_halo(conv, read, length, lo, hi, bias):
            if conv.kernel_size[0] == 3 and conv.stride[0] == 1:
                return convolve(conv, lambda first, last: read(lo, hi), hi - lo, 0, hi - lo, bias)
            return convolve(conv, read, length, lo, hi, bias)

        monkeypatch.setattr(tiling, "_convolve_planes", convolve_without_halo)
    z = draw(1, 3, 9, 3, 2)
    assert torch.allclose(vae.decode(z), theirs.decode(z), rtol=1e-4, atol=1e-4) == (mistake == "none")


def test_bf16_in_slabs_is_as_accurate_as_whole(vae, monkeypatch):
    z = draw(1, 3, 16, 4, 4)
    expected = Autoencoder(CONFIG).double()
    expected.load_state_dict(vae.state_dict())
    with torch.no_grad():
        expected = expected.decode(z.double())
    vae.to(torch.bfloat16)
    errors = []
    for slab_bytes in (2**29, 1):
        monkeypatch.setattr(planning, "SLAB_BYTES", slab_bytes)
        errors.append((vae.decode(z.bfloat16()).double() - expected).abs().mean())
    assert 0 < errors[1] <= 1.2 * errors[0]


def test_statistics_are_accurate_for_a_mean_far_from_zero():
    """With mean 1000 and standard deviation 1, the mean of squares minus the squared mean is far off in fp32."""
    norm = GroupNormSiLU(4, 8, 1e-6)
    volume = (1000 + draw(1, 8, 12, 6, 6, dtype=torch.float64)).float()
    statistics = tiling.GroupNormStatistics(norm)
    for part in volume.split([1, 7, 4], dim=2):
        statistics.add(part)
    mean, rstd = statistics.merge()
    grouped = volume.double().reshape(1, 4, -1)
    torch.testing.assert_close(mean.double(), grouped.mean(2), rtol=1e-6, atol=0)
    torch.testing.assert_close(rstd.double(), (grouped.var(2, correction=0) + 1e-6).rsqrt(), rtol=1e-5, atol=0)
    naive = volume.reshape(1, 4, -1)
    assert not torch.allclose(naive.square().mean(2) - naive.mean(2) ** 2, torch.tensor(1.0), rtol=0.05)


def test_a_volume_does_not_depend_on_its_batch(vae):
    z = draw(3, 3, 5, 3, 2)
    assert torch.equal(vae.decode(z)[1], vae.decode(z[1:2])[0])


@pytest.mark.parametrize("resample", ["", "up", "down"], ids=["no-resampling", "up", "down"])
@pytest.mark.parametrize("length", [8, 23, 64])
def test_slabs_cover_every_plane_once(length, resample, vae):
    conv = next(conv for conv in (*vae.decoder.tiled_convs(), *vae.encoder.tiled_convs()) if conv.resample == resample)
    length *= 2 if resample == "down" else 1
    output = conv.output_shape((1, length, 8, 8))[1]
    for planes in (1, 3, output):
        slabs = [slab for chunk in slab_bounds(conv, chunk_edges(length), output, planes) for slab in chunk]
        assert [lo for lo, _ in slabs] == [0, *(hi for _, hi in slabs[:-1])] and slabs[-1][1] == output
        assert max(hi - lo for lo, hi in slabs) <= planes


# Memory


def full_size():
    with torch.device("meta"):
        return Autoencoder(AutoencoderConfig()).eval().requires_grad_(False)


@pytest.mark.parametrize("budget", [64 * GIB, 5.4 * GIB], ids=["64GiB", "5.4GiB"])
@pytest.mark.parametrize("direction", ["decoder", "encoder"])
def test_plan_estimates_the_allocated_memory(direction, budget):
    """At 256x256x128 in fp32, the estimate is compared with all tensors that are created, on the meta device."""
    blocks = getattr(full_size(), direction)
    shape = {"decoder": (4, 64, 64, 32), "encoder": (1, 256, 256, 128)}[direction]
    plan = make_tiling_plan(blocks.tiled_convs(), shape, 4, int(budget))
    with Allocations() as allocations:
        result = tiling.run_plan(blocks.tiled_convs(), plan, torch.empty(1, *shape, device="meta"))
    assert result.shape[1:] == plan.steps[-1].output_shape
    assert plan.bytes <= budget and allocations.peak == pytest.approx(plan.bytes, rel=0.03)


def test_decoding_takes_less_than_half_of_the_memory_of_monai():
    vae, z = full_size(), torch.empty(1, 4, 64, 64, 32, device="meta")
    with torch.device("meta"):
        theirs = maisi(AutoencoderConfig(), num_splits=2, dim_split=1).eval().requires_grad_(False)
    with Allocations() as stock:
        theirs.decode(z)
    plan = make_tiling_plan(vae.decoder.tiled_convs(), tuple(z.shape[1:]), 4, 64 * GIB)
    with Allocations() as ours:
        tiling.run_plan(vae.decoder.tiled_convs(), plan, z)
    with Allocations() as plain:
        vae.decode(z)  # module by module, as with gradients
    assert ours.peak < 0.5 * stock.peak < plain.peak


def test_a_smaller_budget_is_respected_or_an_error(vae):
    z = draw(1, 3, 24, 6, 6)
    whole = vae.decoder.plan(tuple(z.shape[1:]), z.device)
    assert whole.slabs == 0 and str(whole).startswith("whole: peak")
    budget = whole.bytes * 2 // 3
    plan = vae.decoder.plan(tuple(z.shape[1:]), z.device, budget)
    assert plan.slabs > 0 and plan.bytes <= budget and f"{plan.slabs} slabs" in str(plan)
    with Allocations() as allocations:
        decoded = vae.decode(z, memory=budget)
    assert allocations.peak < budget + 2**20  # small copies of the weights are not part of the plan
    torch.testing.assert_close(decoded, vae.decode(z), rtol=1e-4, atol=1e-5)
    with pytest.raises(ConfigError, match=r"single plane need [\d.]+ MiB of memory, but at most 1000 bytes") as caught:
        vae.decode(z, memory=1000)
    assert "bf16" in str(caught.value)


@pytest.mark.parametrize("gib", [1.5, 3, 5])
def test_slabs_on_a_small_gpu_leave_memory_for_the_workspace_of_a_convolution(gib):
    """A convolution may copy its slab into another layout. A quarter of the free memory, a third of the budget, is for that."""
    decoder = full_size().decoder
    convs, shape, budget = decoder.tiled_convs(), (4, 64, 64, 32), int(gib * GIB)
    plan = tiling.tiling_plan_for(convs, shape, torch.device("cuda"), budget)
    transient = [bytes_of_largest_slab(convs, plan, index, shape) for index in range(len(convs))]
    assert max(transient) <= budget / 3
    assert max(transient) > budget / 6  # and they are not much smaller
    unlimited = make_tiling_plan(convs, shape, 4, budget, host=True, slab_bytes=planning.GPU_SLAB_BYTES)
    assert max(bytes_of_largest_slab(convs, unlimited, index, shape) for index in range(len(convs))) > budget / 3


def bytes_of_largest_slab(convs, plan, index, shape):
    """Input and output of a convolution in fp32."""
    source = plan.steps[index - 1].output_shape if index else shape
    channels, *grid = convs[index].input_shape(source)
    step = plan.steps[index]
    window = min(step.planes + 2, grid[0])
    return 4 * (channels * window * grid[1] * grid[2] + step.output_shape[0] * step.planes * grid[1] * grid[2])


def test_activations_are_stored_on_the_host_for_a_small_device(vae):
    convs, shape = vae.decoder.tiled_convs(), (3, 24, 6, 6)
    needed = make_tiling_plan(convs, shape, 4, GIB).bytes
    with pytest.raises(ConfigError):
        make_tiling_plan(convs, shape, 4, needed // 3)
    plan = make_tiling_plan(convs, shape, 4, needed // 3, host=True)
    assert plan.on_host and plan.bytes <= needed // 3 and "activations on the host" in str(plan)
    x = draw(1, *shape)
    torch.testing.assert_close(tiling.run_plan(convs, plan, x), vae.decoder(x), rtol=1e-4, atol=1e-5)


def test_a_budget_requires_no_grad(vae):
    vae.requires_grad_(True)
    with pytest.raises(ValueError, match=r"torch\.no_grad"):
        vae.decode(draw(1, 3, 5, 3, 2), memory=GIB)
    with torch.no_grad():
        vae.decode(draw(1, 3, 5, 3, 2), memory=GIB)
