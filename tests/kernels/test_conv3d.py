"""The 3x3x3 convolution: the plain backends against explicit arithmetic, the Triton kernels against float64."""

from __future__ import annotations

import pytest
import torch
import triton.language as tl
from torch.nn import functional as F

from ccella_fast.kernels import conv3d as module
from ccella_fast.kernels import conv3d_forward as forward
from ccella_fast.kernels.backend import BackendError, choose, jit
from ccella_fast.kernels.conv3d import backend_support, conv3d, conv3d_reference, kernel_layout
from ccella_fast.kernels.tuning import DEFAULT_LAUNCH_CONFIGS
from kernel_fixtures import (
    DTYPES,
    ROUNDINGS,
    channels_last,
    check_fused,
    draw,
    dtype_params,
    repair_interpreter,
    shape_id,
)

repair_interpreter()
NAMES = ["y", "x", "weight", "bias", "shift", "residual"]
HALVES = dtype_params(torch.bfloat16, torch.float16)


def case(batch, width, outputs, grid, dtype=torch.float64):
    x, weight = draw(batch, width, *grid), draw(outputs, width, 3, 3, 3, seed=1, scale=(27 * width) ** -0.5)
    bias, shift, residual = draw(outputs, seed=2), draw(batch, outputs, seed=3), draw(batch, outputs, *grid, seed=4)
    return [tensor.to(dtype) for tensor in (x, weight, bias, shift, residual)]


def on(backend):
    return lambda x, w, b, s, r: conv3d(x, w, b, shift=s, residual=r, backend=backend)


def plain(*tensors):
    """The reference in fp32, rounded once: oneDNN's weight gradient in bf16 is wrong on small grids."""
    wide = torch.promote_types(tensors[0].dtype, torch.float32)
    return conv3d_reference(*(None if t is None else t.to(wide) for t in tensors)).to(tensors[0].dtype)


def check(tensors, function=None):
    names = [name for name, tensor in zip(NAMES[1:], tensors, strict=True) if tensor is not None]
    roundings = ROUNDINGS[tensors[0].dtype]
    check_fused(function or on("triton"), plain, tensors, names=["y", *names], roundings=roundings)


@pytest.fixture
def tilings(monkeypatch):
    """The tilings of the launches in a test, in order."""
    found, choose_tiling = [], forward._tiling
    monkeypatch.setattr(forward, "_tiling", lambda *a, **k: found.append(choose_tiling(*a, **k)) or found[-1])
    return found


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 16 voxels, 16 output channels and 16 input channels."""
    table = DEFAULT_LAUNCH_CONFIGS["conv3d"]
    for key, config in table.items():
        sizes = {name: 16 if name.startswith("BLOCK") else value for name, value in config.constants.items()}
        monkeypatch.setitem(table, key, config._replace(constants=sizes))


@pytest.fixture(params=forward.SPLITS, ids="split{}".format)
def split(request, monkeypatch):
    """Into how many parts the taps are divided, whatever the number of programs."""
    monkeypatch.setattr(forward, "SPLITS", (request.param,))
    return request.param


_sum_along_z = forward._sum_along_z


@jit
def _sum_across_lines(b_before, b_middle, b_after, o_z, Z, AXIS: tl.constexpr):
    """A wrong `_sum_along_z`: no voxel is the first or the last one of its line."""
    return _sum_along_z(b_before, b_middle, b_after, 0 * o_z + 1, 3, AXIS)


@pytest.mark.parametrize("backend", ["reference", "cudnn"])
def test_plain_backends_equal_explicit_arithmetic(backend, monkeypatch):
    monkeypatch.setattr(module, "_cudnn_unsupported_reason", lambda device: None)  # the same calls run on a CPU
    tensors = x, weight, bias, shift, residual = [t.requires_grad_() for t in case(2, 3, 5, (2, 4, 3))]
    patches = F.pad(x, (1,) * 6).unfold(2, 3, 1).unfold(3, 3, 1).unfold(4, 3, 1)
    y = torch.einsum("bcxyzijk,ocijk->boxyz", patches, weight)
    b, s = bias[:, None, None, None], shift[:, :, None, None, None]
    expected = y + b + s + residual
    actual = on(backend)(*tensors)
    torch.testing.assert_close(actual, expected)
    assert not torch.allclose(on(backend)(x, weight.flip(4), *tensors[2:]), expected)
    torch.testing.assert_close(conv3d(x, weight, backend=backend), y)
    torch.testing.assert_close(conv3d(x, weight, bias, shift=shift, backend=backend), y + b + s)
    torch.testing.assert_close(conv3d(x, weight, shift=shift, residual=residual, backend=backend), y + s + residual)
    torch.testing.assert_close(conv3d(x, weight, bias, residual=residual, backend=backend), y + b + residual)
    dy = draw(*expected.shape, seed=5)
    found, truth = (torch.autograd.grad(result, tensors, dy) for result in (actual, expected))
    torch.testing.assert_close(found, truth)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("grid", [(3, 5, 4), (2, 3, 7), (1, 1, 1)], ids=shape_id)
def test_error_is_at_most_twice_that_of_plain_pytorch(grid, dtype):
    """The default tiles, partly empty; tiles of whole lines along Z, and those that overlap."""
    tensors = case(2, 12, 20, grid, dtype)
    check(tensors)
    with pytest.raises(AssertionError, match="y: error"):
        check(tensors, lambda x, w, *rest: on("triton")(x, w.flip(3) + w.flip(4), *rest))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("grid", [(3, 2, 4), (2, 3, 5)], ids=shape_id)
def test_several_tiles(grid, split, dtype, small_tiles, tilings):
    """Tiles that span two samples, of several blocks of channels, the last ones partial; with and without divided taps."""
    check(case(2, 20, 36, grid, dtype))
    assert all(tiling.box is None and tiling.halo == (grid[2] == 5) for tiling in tilings)
    assert all(tiling.programs > 3 and tiling.split == split for tiling in tilings)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    ("grid", "box"), [((3, 3, 8), (1, 2)), ((3, 2, 4), (2, 2)), ((2, 5, 2), None), ((1, 2, 16), (1, 1))], ids=str
)
@pytest.mark.parametrize("transposed", [0, 1])
def test_descriptors(grid, box, split, dtype, transposed, small_tiles, tilings, monkeypatch):
    """Tiles of part of a plane and of several planes, whose last ones and last blocks of channels are partial."""
    table = DEFAULT_LAUNCH_CONFIGS["conv3d"]
    for key in [key for key in table if key.startswith("descriptors")]:
        constants = table[key].constants | {"TRANSPOSED": transposed}
        monkeypatch.setitem(table, key, table[key]._replace(constants=constants))
    check(case(2, 24, 24, grid, dtype))
    assert all(tiling.config.constants.get("TRANSPOSED", transposed) == transposed for tiling in tilings)
    assert [(tiling.box, tiling.split) for tiling in tilings] == [(box, split)] * 2  # y and dx


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("outputs", [40, 72], ids=["narrow", "wide"])
@pytest.mark.parametrize("multiprocessors", [1, 132], ids=["large-tiles", "small-tiles"])
def test_default_tiles_with_descriptors(outputs, multiprocessors, dtype, tilings, monkeypatch):
    monkeypatch.setattr(forward, "multiprocessor_count", lambda device: multiprocessors)
    check(case(1, 72, outputs, (3, 4, 8), dtype))
    key = "small" if multiprocessors == 132 else "narrow" if outputs == 40 else "wide"
    assert tilings[0].config is DEFAULT_LAUNCH_CONFIGS["conv3d"][f"descriptors {key}"] and tilings[0].box


@pytest.mark.parametrize("width", [16, 12], ids=["descriptors", "pointers"])
@pytest.mark.parametrize("given", [(False, False, False), (True, False, True), (False, True, False)], ids=str)
def test_bias_shift_and_residual_are_optional(given, width, split, small_tiles):
    x, weight, *added = case(2, width, 16, (2, 2, 4), torch.bfloat16)
    check([x, weight, *(tensor if wanted else None for tensor, wanted in zip(added, given, strict=True))])


@pytest.mark.parametrize("width", [16, 12], ids=["descriptors", "pointers"])
def test_each_tap_arrives_at_its_voxel(width, small_tiles):
    """One voxel is set, whose neighbors must become the taps in reverse: at the ends of lines along Z nothing is moved in."""
    grid = (3, 4, 8)
    weight = torch.arange(1.0, 28.0).reshape(3, 3, 3).expand(8, width, 3, 3, 3).bfloat16()
    for place in [(1, 2, 0), (1, 2, 7), (0, 0, 3), (2, 3, 7), (1, 1, 4)]:
        x = torch.zeros(1, width, *grid, dtype=torch.bfloat16)
        x[0, 3][place] = 1.0
        y = conv3d(x, weight, backend="triton")[0, 5]
        expected = torch.zeros(grid, dtype=torch.bfloat16)
        for tap in torch.cartesian_prod(*[torch.arange(3)] * 3).tolist():
            target = tuple(p - t + 1 for p, t in zip(place, tap, strict=True))
            if all(0 <= i < size for i, size in zip(target, grid, strict=True)):
                expected[target] = weight[0, 0][tuple(tap)]
        assert torch.equal(y, expected), place


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_wrong_end_of_the_lines_is_noticed(dtype, monkeypatch):
    """The negative control: sums that move across the ends of lines along Z."""
    check(case(1, 16, 16, (2, 2, 4), dtype))
    monkeypatch.setattr(forward, "_sum_along_z", _sum_across_lines)
    with pytest.raises(AssertionError, match="y: error"):
        check(case(1, 16, 16, (2, 2, 4), dtype))


def test_layouts_and_kernel_layout():
    x, weight, *added = case(2, 8, 16, (2, 3, 4), torch.bfloat16)
    expected = on("triton")(x, weight, *added)
    assert expected.is_contiguous(memory_format=torch.channels_last_3d)
    laid_out = kernel_layout(weight)
    assert torch.equal(laid_out, weight) and laid_out.permute(2, 3, 4, 1, 0).is_contiguous()
    assert not weight.permute(2, 3, 4, 1, 0).is_contiguous()
    added_last = [added[0], added[1].T.contiguous().T, channels_last(added[2])]
    for other in (channels_last(x), x.transpose(2, 4).contiguous().transpose(2, 4)):
        assert torch.equal(on("triton")(other, laid_out, *added_last), expected)


def test_unaligned_tensors_are_read_by_pointers(tilings):
    """Descriptors need addresses that are multiples of 16 bytes."""
    x, weight, *added = case(1, 8, 8, (2, 2, 4), torch.bfloat16)
    storage = torch.zeros(x.numel() + 1, dtype=x.dtype)
    odd = storage[1:].view(1, 2, 2, 4, 8).permute(0, 4, 1, 2, 3).copy_(x)
    torch.testing.assert_close(on("triton")(odd, weight, *added), on("triton")(channels_last(x), weight, *added))
    assert [tiling.box is None for tiling in tilings] == [True, False]


def test_gradients_under_autocast_and_of_mixed_dtypes():
    x, weight, bias, shift, residual = (t.requires_grad_() for t in case(1, 8, 8, (2, 2, 4), torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        y = on("triton")(x, weight, bias, shift, residual)
        expected = conv3d_reference(x, weight, bias, shift, residual)
    assert y.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected, rtol=0.02, atol=0.02)
    found = torch.autograd.grad(y, (x, weight, bias, shift, residual), torch.ones_like(y))
    assert {gradient.dtype for gradient in found} == {torch.float32}


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_mismatched_shapes_raise(backend):
    x, weight, bias, shift, residual = good = case(2, 4, 6, (2, 2, 2), torch.float32)
    changes = [
        (0, x[0]),
        (1, weight[:, :3]),
        (1, weight[..., :2]),
        (2, bias[:5]),
        (3, shift[:1]),
        (4, residual[..., :1]),
    ]
    for index, wrong in changes:
        tensors = [wrong if i == index else tensor for i, tensor in enumerate(good)]
        with pytest.raises(ValueError, match="must have shape"):
            on(backend)(*tensors)


def test_empty_batch():
    x, weight, bias, shift, residual = case(0, 8, 8, (2, 2, 4), torch.float32)
    assert on("triton")(x, weight, bias, shift, residual).shape == (0, 8, 2, 2, 4)


@pytest.fixture
def capability(monkeypatch):
    """Sets the generation of the GPU that the functions see."""

    def pretend(*found):
        monkeypatch.setattr(forward, "interpreted", lambda: False)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: found)

    return pretend


def test_choice_of_backend(capability):
    """Triton on the generations where it was measured, without gradients and where tiles are whole lines."""
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    for major, expected in ((8, "cudnn"), (9, "triton"), (10, "triton"), (12, "cudnn")):
        capability(major, 0)
        assert choose("conv3d", backend_support(gpu, torch.bfloat16)) == expected
    capability(9, 0)
    assert choose("conv3d", backend_support(gpu, torch.bfloat16, training=True)) == "cudnn"
    assert choose("conv3d", backend_support(gpu, torch.bfloat16, descriptors=False)) == "cudnn"
    assert choose("conv3d", backend_support(gpu, torch.float32)) == "cudnn"
    assert choose("conv3d", backend_support(gpu, torch.float64)) == "cudnn"
    assert choose("conv3d", backend_support(cpu, torch.float32)) == "reference"
    x, weight, *_ = case(1, 8, 8, (1, 1, 1))
    with pytest.raises(BackendError, match="requested by argument, but the tensors are on cpu, not on a GPU"):
        conv3d(x, weight, backend="cudnn")
    with pytest.raises(BackendError, match="requested by argument, but float64 is not one of"):
        conv3d(x, weight, backend="triton")


@pytest.mark.parametrize("channels", [8, 12, 64])
@pytest.mark.parametrize("grid", [(64, 32), (3, 4), (4, 4), (32, 2), (4, 24), (1, 1), (6, 64), (4, 128)], ids=str)
def test_sizes_that_suit_descriptors_are_those_of_the_tiling(channels, grid, tilings):
    x = torch.empty(1, channels, 2, *grid, device="meta")
    boxes = [forward._box(block, *grid) for block in (64, 128)]
    expected = channels % 8 == 0 and None not in boxes
    assert forward.suits_descriptors(x, 64) == expected
    if expected:
        assert forward._tiling(x, 64, descriptors=True).box is not None


@pytest.mark.parametrize(
    ("found", "expected"), [((8, 0), "sm_80"), ((9, 0), None), ((10, 0), None), ((12, 0), "sm_120")], ids=str
)
def test_descriptors_by_generation(found, expected, capability):
    capability(*found)
    reason = forward.descriptors_unsupported_reason(torch.device("cuda"), torch.bfloat16)
    assert reason is None if expected is None else expected in reason
    assert "fp32" in forward.descriptors_unsupported_reason(torch.device("cuda"), torch.float32)


@pytest.mark.parametrize(
    ("batch", "width", "grid", "key", "split"),
    [
        (1, 64, (64, 64, 32), "narrow", 1), (8, 64, (64, 64, 32), "narrow", 1), (1, 128, (32, 32, 16), "wide", 1),
        (8, 256, (16, 16, 8), "wide", 1), (1, 256, (16, 16, 8), "small", 1), (8, 512, (8, 8, 4), "small", 1),
        (1, 512, (8, 8, 4), "small", 3),
    ],
    ids=str,
)  # fmt: skip
def test_tilings_of_the_default_model_on_an_h200(batch, width, grid, key, split):
    """Those that were the fastest in the measurement."""
    x = torch.empty(batch, width, *grid, device="meta", dtype=torch.bfloat16)
    tiling = forward._tiling(x, width, descriptors=True)
    assert tiling.config is DEFAULT_LAUNCH_CONFIGS["conv3d"][f"descriptors {key}"] and tiling.split == split
    assert tiling.box is not None and tiling.box[0] * tiling.box[1] * grid[2] == tiling.config.constants["BLOCK_M"]


def test_library_op():
    op = torch.ops.ccella_fast.conv3d
    torch.library.opcheck(op, [t.requires_grad_() for t in case(1, 8, 8, (1, 1, 2), torch.float16)])
    x, weight, *_ = (t.requires_grad_() for t in case(1, 3, 2, (1, 1, 2), torch.float32))
    torch.library.opcheck(op, (x, weight, None, None, None), test_utils="test_aot_dispatch_static")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch", "width", "outputs", "grid"),
    [
        (2, 64, 64, (64, 64, 32)), (2, 192, 128, (32, 32, 16)), (1, 512, 256, (16, 16, 8)), (1, 512, 512, (8, 8, 4)),
        (2, 40, 72, (5, 6, 7)), (2, 40, 72, (5, 12, 8)),
    ],
    ids=str,
)  # fmt: skip
def test_compiled_kernels_on_a_gpu(batch, width, outputs, grid, dtype):
    """More programs than a GPU runs at once, small grids with divided taps, and lines that do not divide a tile."""
    check([tensor.cuda() for tensor in case(batch, width, outputs, grid, dtype)])


@pytest.mark.gpu
@pytest.mark.parametrize("grid", [(528, 256, 128), (512, 256, 132)], ids=shape_id)
def test_more_than_two_to_the_31_elements_on_a_gpu(grid):
    """The last planes equal the convolution of the last planes alone."""
    x = torch.randn(1, *grid, 128, device="cuda", dtype=torch.bfloat16).permute(0, 4, 1, 2, 3)
    weight = draw(64, 128, 3, 3, 3, scale=0.02).to("cuda", torch.bfloat16)
    residual = torch.randn(1, *grid, 64, device="cuda", dtype=torch.bfloat16).permute(0, 4, 1, 2, 3)
    assert x.numel() > 2**31
    y = conv3d(x, weight, residual=residual, backend="triton")[:, :, -2:]
    expected = conv3d(x[:, :, -3:], weight, residual=residual[:, :, -3:], backend="triton")[:, :, -2:]
    assert torch.equal(y, expected)
