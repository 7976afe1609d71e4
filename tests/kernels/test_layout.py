"""How the element-wise kernels divide a volume among programs, and the offsets of their tiles."""

from __future__ import annotations

import pytest
import torch

from ccella_fast.kernels import layout
from ccella_fast.kernels.backend import jit, tl
from ccella_fast.kernels.tuning import DEFAULT_LAUNCH_CONFIGS
from kernel_fixtures import LAYOUTS, channels_last, labeled, repair_interpreter

repair_interpreter()


@pytest.mark.parametrize("channels", [64, 128, 192, 256, 384, 512, 768, 1024], ids=labeled("C"))
@pytest.mark.parametrize("last", LAYOUTS)
@pytest.mark.parametrize("batch", [1, 8], ids=labeled("B"))
def test_the_grid_fills_the_gpu_at_any_batch_size(channels, last, batch):
    x = torch.empty(batch, channels, 2**14, device="meta")
    x = channels_last(x) if last else x
    processors = layout.multiprocessor_count(x.device)
    for step in ("statistics", "apply", "sums", "input gradient"):
        config = DEFAULT_LAUNCH_CONFIGS["group_norm_silu"][layout.layout_key(step, x)]
        partial = step in ("statistics", "sums")
        grid = layout.launch_grid(x, 32, config, partial=partial)
        assert grid.programs >= 0.9 * processors
        parts, voxels = grid.programs_per_sample, grid.voxels_per_program
        assert (parts <= layout.MAX_PARTS or not partial) and parts * voxels >= 2**14 > (parts - 1) * voxels


@jit
def _offsets_kernel(out_ptr, S, voxels_per_program, LAST: tl.constexpr):
    i_b, i_block, i_part = layout.program_coords(4, 1, True)
    start, _ = layout.voxel_range(i_part, voxels_per_program, S)
    _, o_c, _ = layout.channel_lanes(i_block, 2, 32, 64)
    o_x = layout.tile_origin(i_b, start, S, 64, LAST) + layout.tile_offsets(o_c, S, 64, 2, LAST)
    tl.store(out_ptr + (i_b * 4 + i_part) * 128 + tl.arange(0, 2)[:, None] * 64 + tl.arange(0, 64)[None, :], o_x)


@pytest.mark.parametrize("last", LAYOUTS)
def test_offsets_beyond_2_to_the_31(last):
    """The offset arithmetic alone, at a size that no test could allocate: 3 samples of 64 channels x 2^30 voxels."""
    S, voxels_per_program = 2**30, 2**28
    out = torch.zeros(12, 2, 64, dtype=torch.int64)
    _offsets_kernel[(12,)](out, S, voxels_per_program, LAST=last)
    b, k, s, c = torch.meshgrid(*(torch.arange(n) for n in (3, 4, 2, 64)), indexing="ij")
    voxel = k * voxels_per_program + s
    expected = (b * S + voxel) * 64 + c if last else (b * 64 + c) * S + voxel
    assert expected.max() > 2**37
    assert torch.equal(out, expected.reshape(12, 2, 64))
    assert not torch.equal(out.int().long(), out)  # 32 bits are not enough
