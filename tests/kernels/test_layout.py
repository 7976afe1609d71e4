"""How the element-wise kernels divide a volume among programs, the order of their tiles, and their offsets."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton.language as tl

from ccella_fast.kernels import group_norm_silu_backward as backward
from ccella_fast.kernels import group_norm_silu_forward as forward
from ccella_fast.kernels import layout
from ccella_fast.kernels.backend import jit
from ccella_fast.kernels.group_norm_silu import group_norm_silu
from ccella_fast.kernels.tuning import DEFAULT_LAUNCH_CONFIGS
from kernel_fixtures import LAYOUTS, channels_last, draw, labeled, repair_interpreter

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


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles so small that a small volume is divided among many programs."""
    monkeypatch.setattr(forward, "WHOLE_TILES", ())
    for key, config in DEFAULT_LAUNCH_CONFIGS["group_norm_silu"].items():
        if "TILE" in config.constants:
            small = config._replace(constants={"TILE": 256, "STAGES": 2})
            monkeypatch.setitem(DEFAULT_LAUNCH_CONFIGS["group_norm_silu"], key, small)


def norm(x):
    channels = x.shape[1]
    return group_norm_silu(x.requires_grad_(), 2, torch.ones(channels), torch.ones(channels), backend="triton")


@pytest.mark.parametrize("last", LAYOUTS)
def test_the_second_pass_reads_the_tiles_in_reverse(last, small_tiles, monkeypatch):
    """It begins with those that the first pass has read last, which are in the L2 cache of a GPU."""
    from triton.runtime.interpreter import InterpreterBuilder

    x = draw(1, 4, 3, 7, 10, dtype=torch.float32)
    x = channels_last(x) if last else x
    seen, plain = [], InterpreterBuilder.create_masked_load

    def create_masked_load(self, ptrs, mask, *rest, **named):
        addresses = ptrs.data[np.asarray(mask.data, bool)].astype(np.int64) - x.data_ptr()
        seen.extend(addresses[(addresses >= 0) & (addresses < x.nbytes)][:1])
        return plain(self, ptrs, mask, *rest, **named)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", create_masked_load)
    monkeypatch.setattr(layout, "multiprocessor_count", lambda _: 1)
    y = norm(x)
    for _ in ("forward", "backward"):
        half = len(seen) // 2
        assert half >= 4 and len(set(seen)) == half and seen[half:] == seen[:half][::-1]
        seen.clear()
        y.sum().backward(retain_graph=True)


def test_no_more_partial_results_are_merged_than_there_are(small_tiles, monkeypatch):
    """Every program of the second launch merges them, before its first voxel."""
    merged = {}

    class Recorded:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            def launch(*arguments, **constants):
                merged[self.kernel.fn.__name__] = constants["BLOCK_P"]
                return self.kernel[grid](*arguments, **constants)

            return launch

    for owner in (forward, backward):
        for name, kernel in list(vars(owner).items()):
            if name.endswith("_kernel") and "BLOCK_P" in kernel.arg_names:
                monkeypatch.setattr(owner, name, Recorded(kernel))
    for multiprocessors, parts in ((1, 2), (3, 6), (1000, 43)):
        monkeypatch.setattr(layout, "multiprocessor_count", lambda _, count=multiprocessors: count)
        norm(channels_last(draw(1, 8, 8, 9, 19, dtype=torch.float32))).sum().backward()
        assert len(merged) == 3 and set(merged.values()) == {layout.next_power_of_two(parts)}, merged
