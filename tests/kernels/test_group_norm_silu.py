"""GroupNorm-SiLU: the plain implementation against explicit arithmetic, the Triton kernels against float64.

The kernels run in Triton's interpreter or, with the `gpu` marker, compiled.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ccella_fast.kernels import group_norm_silu_forward as forward
from ccella_fast.kernels import layout
from ccella_fast.kernels.backend import BackendError, choose
from ccella_fast.kernels.group_norm_silu import (
    GroupNormSiLU,
    backend_support,
    group_norm_silu,
    group_norm_silu_apply,
    group_norm_silu_reference,
    group_norm_statistics,
)
from ccella_fast.kernels.group_norm_silu_backward import backward_op
from ccella_fast.kernels.tuning import DEFAULT_LAUNCH_CONFIGS
from kernel_fixtures import (
    DTYPE_IDS,
    DTYPES,
    LAYOUTS,
    ROUNDINGS,
    channels_last,
    check_fused,
    draw,
    dtype_params,
    flag_params,
    labeled,
    repair_interpreter,
    shape_id,
)

repair_interpreter()
# exp(-z) in lanes that are not stored
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
NAMES = ["y", "dx", "dweight", "dbias", "dshift"]
VARIANTS = [(torch.float32, silu, shift) for silu in (False, True) for shift in (False, True)]
VARIANTS += [(dtype, on, on) for dtype in (torch.bfloat16, torch.float16) for on in (False, True)]
VARIANTS = [
    pytest.param(*variant, id=DTYPE_IDS[variant[0]] + "-silu" * variant[1] + "-shift" * variant[2])
    for variant in VARIANTS
]
SHIFTED = flag_params("no_shift", "shift")


def case(*shape, dtype=torch.float64, last=False, shift=True, mean=0.5, parameters=None):
    """x, weight, bias and shift; `parameters` is the dtype of the last three."""
    x = draw(*shape, dtype=dtype, mean=mean)
    batch, channels = shape[:2]
    parameters = parameters or dtype
    return (
        channels_last(x) if last else x,
        draw(channels, seed=1, dtype=parameters),
        draw(channels, seed=2, dtype=parameters),
        draw(batch, channels, seed=3, dtype=parameters) if shift else None,
    )


def both(groups, silu=True):
    def fused(x, weight, bias, shift):
        return group_norm_silu(x, groups, weight, bias, 1e-5, silu=silu, shift=shift, backend="triton")

    def plain(x, weight, bias, shift):
        return group_norm_silu_reference(x, groups, weight, bias, 1e-5, silu=silu, shift=shift)

    return fused, plain


def check(tensors, groups, silu=True):
    names = NAMES[: 4 + (tensors[3] is not None)]
    check_fused(*both(groups, silu), tensors, names=names, roundings=ROUNDINGS[tensors[0].dtype])


@pytest.fixture
def many_programs(monkeypatch):
    """Tiles so small that a small volume is divided among many programs, and no group fits in one program."""
    monkeypatch.setattr(forward, "WHOLE_TILES", ())
    for key, config in DEFAULT_LAUNCH_CONFIGS["group_norm_silu"].items():
        if "TILE" in config.constants:
            monkeypatch.setitem(
                DEFAULT_LAUNCH_CONFIGS["group_norm_silu"], key, config._replace(constants={"TILE": 256, "STAGES": 2})
            )


# --- The plain implementation.


def expected_norm(x, groups, weight, bias, eps, silu, shift):
    h = x if shift is None else x + shift[:, :, None, None, None]
    grouped = h.reshape(x.shape[0], groups, -1)
    centered = grouped - grouped.mean(dim=2, keepdim=True)
    h = (centered / (centered.square().mean(dim=2, keepdim=True) + eps).sqrt()).reshape(x.shape)
    h = h * weight[:, None, None, None] + bias[:, None, None, None]
    return h / (1 + (-h).exp()) if silu else h


@pytest.mark.parametrize("shifted", SHIFTED)
@pytest.mark.parametrize("silu", flag_params("no_silu", "silu"))
@pytest.mark.parametrize("dtype", dtype_params(torch.float32, torch.bfloat16))
def test_reference_equals_explicit_arithmetic(dtype, silu, shifted):
    x, weight, bias, shift = case(2, 8, 3, 5, 4, dtype=dtype, shift=shifted, mean=3)
    wide = [None if tensor is None else tensor.double() for tensor in (x, weight, bias, shift)]
    expected = expected_norm(wide[0], 4, wide[1], wide[2], 1e-3, silu, wide[3])
    actual = group_norm_silu(x, 4, weight, bias, 1e-3, silu=silu, shift=shift, backend="reference")
    assert actual.dtype == dtype
    # bf16: the result is rounded once, from fp32.
    tolerance = {"rtol": 2**-8, "atol": 1e-6} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(actual.double(), expected, **tolerance)
    wrong = expected_norm(wide[0], 2, wide[1], wide[2], 1e-3, silu, wide[3])
    assert not torch.allclose(actual.double(), wrong, **tolerance)


def test_reference_has_correct_gradients():
    tensors = [tensor.requires_grad_() for tensor in case(2, 4, 2, 3, 2)]
    assert torch.autograd.gradcheck(lambda x, w, b, s: group_norm_silu(x, 2, w, b, shift=s), tensors)


# --- The kernels.


@pytest.mark.parametrize("last", LAYOUTS)
@pytest.mark.parametrize(("dtype", "silu", "shift"), VARIANTS)
def test_a_group_in_one_program(dtype, last, silu, shift):
    check(case(2, 12, 3, 5, 4, dtype=dtype, last=last, shift=shift), 4, silu)


@pytest.mark.parametrize("last", LAYOUTS)
def test_the_largest_group_in_one_program(last):
    tensors = case(1, 32, 31, 11, 5, dtype=torch.bfloat16, last=last)
    odd = tensors[0][:, :24]  # groups of 12 channels
    assert forward.whole_tile(odd, 2) is None and forward.whole_tile(odd, 4) == 16384
    assert forward.whole_tile(tensors[0], 2) == 32768 and forward.whole_tile(tensors[0].float(), 2) is None
    assert forward.whole_tile(tensors[0], 1) is None and forward.whole_tile(tensors[0].float(), 4) == 16384
    check(tensors, 2)


@pytest.mark.parametrize("last", LAYOUTS)
@pytest.mark.parametrize(("dtype", "silu", "shift"), VARIANTS)
def test_a_group_in_many_programs(dtype, last, silu, shift, many_programs):
    check(case(2, 12, 3, 7, 3, dtype=dtype, last=last, shift=shift), 4, silu)


@pytest.mark.parametrize("last", LAYOUTS)
@pytest.mark.parametrize("programs", ["one_program", "many_programs"])
def test_other_shapes(programs, last, request):
    if programs == "many_programs":
        request.getfixturevalue(programs)
    check(case(1, 6, 7, 13, dtype=torch.float32, last=last), 3)
    check(case(1, 6, 67, dtype=torch.bfloat16, last=last), 1)
    check(case(1, 6, 35, dtype=torch.float16, last=last), 3)


@pytest.mark.parametrize("last", LAYOUTS)
@pytest.mark.parametrize("multiprocessors", [1, 4], ids=labeled("multiprocessors"))
def test_several_tiles_in_a_program(multiprocessors, last, many_programs, monkeypatch):
    """On a GPU so small that a program processes several tiles, the last one partial."""
    monkeypatch.setattr(layout, "multiprocessor_count", lambda _: multiprocessors)
    grid = layout.launch_grid(
        case(2, 12, 3, 7, 5, last=last)[0], 4, DEFAULT_LAUNCH_CONFIGS["group_norm_silu"]["sums first"]
    )
    assert grid.voxels_per_program > 256 // grid.constants["BLOCK_C"] and 105 % grid.voxels_per_program
    check(case(2, 12, 3, 7, 5, dtype=torch.float32, last=last), 4)
    check(case(2, 12, 3, 7, 5, dtype=torch.bfloat16, last=last), 4)


# The widths of the U-Net and the autoencoder, on much smaller grids of odd size; 96 has idle lanes, 192 to 1024 have several
# channel blocks. With channels first a program takes one of the 32 groups, so that four groups are enough.
@pytest.mark.parametrize("channels", [64, 96, 128, 192, 256, 384, 512, 768, 1024], ids=labeled("C"))
def test_widths_of_the_model(channels, monkeypatch):
    monkeypatch.setattr(forward, "WHOLE_TILES", ())
    check(case(1, channels, 3, 5, 2, dtype=torch.bfloat16, last=True, parameters=torch.float32), 32)
    check(case(1, channels // 8, 3, 5, 2, dtype=torch.float32, last=False, shift=False), 4)


@pytest.mark.parametrize("programs", ["one_program", "many_programs"])
def test_other_strides(programs, request):
    if programs == "many_programs":
        request.getfixturevalue(programs)
    x, weight, bias, shift = case(2, 8, 3, 4, 5, dtype=torch.float32)
    wide = draw(2, 16, 4, 4, 5, seed=7, dtype=torch.float32)
    tokens = draw(2, 33, 8, seed=8, dtype=torch.float32).transpose(1, 2)
    for other in (x.transpose(2, 4), wide[:, ::2, 1:], tokens):
        check((other, weight, bias, shift.t().contiguous().t()), 4)
    y = both(4)[0](x.transpose(2, 4), weight, bias, shift)
    assert y.is_contiguous()


@pytest.mark.parametrize("shape", [(2, 8, 4, 5, 6), (2, 8, 9, 5), (2, 8, 33)], ids=shape_id)
def test_keeps_the_memory_format_and_accepts_any_gradient_layout(shape, many_programs):
    plain = case(*shape, dtype=torch.float32)
    last = channels_last(plain[0]).requires_grad_()
    y = both(4)[0](last, *plain[1:])
    assert y.stride() == last.stride()
    torch.testing.assert_close(y, both(4)[1](*plain))
    dy = draw(*shape, seed=5, dtype=torch.float32)
    (from_contiguous,) = torch.autograd.grad(y, last, dy, retain_graph=True)
    (from_last,) = torch.autograd.grad(y, last, channels_last(dy))
    assert from_contiguous.stride() == last.stride()
    assert torch.equal(from_contiguous, from_last)


def test_parameters_and_shift_may_have_other_dtypes(many_programs):
    tensors = case(2, 12, 5, 7, dtype=torch.bfloat16, parameters=torch.float32)
    check(tensors, 4)
    tensors = case(2, 12, 5, 7, dtype=torch.float32, parameters=torch.bfloat16)
    check(tensors, 4)


@pytest.mark.parametrize("last", LAYOUTS)
@pytest.mark.parametrize("programs", ["one_program", "many_programs"])
def test_stable_far_from_zero(last, programs, request):
    if programs == "many_programs":
        request.getfixturevalue(programs)
    x, weight, bias, _ = case(1, 8, 9, 10, 11, dtype=torch.float32, last=last, shift=False, mean=1000)
    expected = both(4)[1](x.double(), weight.double(), bias.double(), None)
    tolerance = {"rtol": 0, "atol": 1e-3}  # the rounding of the mean, 3e-5, grows to 1e-4 by weight and slope
    torch.testing.assert_close(both(4)[0](x, weight, bias, None).double(), expected, **tolerance)
    shift = draw(1, 8, seed=3, dtype=torch.float32)
    shifted = both(4)[0](x - 1000, weight, bias, 1000 + shift)
    expected = both(4)[1]((x - 1000).double(), weight.double(), bias.double(), (1000 + shift).double())
    torch.testing.assert_close(shifted.double(), expected, **tolerance)


@pytest.mark.parametrize("last", LAYOUTS)
@pytest.mark.parametrize("programs", ["one_program", "many_programs"])
def test_a_constant_volume_becomes_its_bias(last, programs, request):
    """The rounding error of the mean is multiplied by 1 / sqrt(eps) = 316."""
    if programs == "many_programs":
        request.getfixturevalue(programs)
    x = torch.full((1, 12, 9, 10, 11), 1000.1)
    x = channels_last(x) if last else x
    bias = draw(12, seed=2, dtype=torch.float32)
    y = group_norm_silu(x, 4, torch.ones(12), bias, 1e-5, backend="triton")
    torch.testing.assert_close(y, nn.functional.silu(bias)[:, None, None, None].expand_as(y), rtol=1e-5, atol=1e-5)


def test_the_one_pass_formula_is_not_stable_far_from_zero():
    x, weight, bias, _ = case(1, 8, 9, 10, 11, dtype=torch.float32, shift=False, mean=1000)
    expected = both(4)[1](x.double(), weight.double(), bias.double(), None)
    flat = x.reshape(1, 4, -1)
    mean, square = flat.mean(2), flat.square().mean(2)
    rstd = (square - mean.square() + 1e-5).rsqrt()
    y = group_norm_silu_apply(x, 4, mean, rstd, weight, bias)
    assert not torch.allclose(y.double(), expected, rtol=0, atol=1e-3)


def test_criterion_rejects_a_wrong_kernel(many_programs):
    tensors = case(2, 8, 3, 7, 5, dtype=torch.bfloat16)
    fused, plain = both(4)
    for name, wrong in {
        "y": lambda x, w, b, s: 1.02 * fused(x, w, b, s),
        "dx": lambda x, w, b, s: fused(x, w, b, s) + 0.02 * (x - x.detach()),
        "dweight": lambda x, w, b, s: fused(x, w, b, s) + 0.02 * (w - w.detach())[:, None, None, None],
    }.items():
        with pytest.raises(AssertionError, match=f"{name}: error"):
            check_fused(wrong, plain, tensors, names=NAMES)


def test_every_run_gives_the_same_bits(many_programs):
    tensors = [tensor.requires_grad_() for tensor in case(2, 12, 3, 7, 5, dtype=torch.float32, last=True)]
    runs = []
    for _ in range(2):
        y = both(4)[0](*tensors)
        runs.append([y, *torch.autograd.grad(y.square().sum(), tensors)])
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("last", LAYOUTS)
def test_given_statistics(backend, last, many_programs):
    x, weight, bias, shift = case(2, 12, 6, 7, 5, dtype=torch.float32, last=last, mean=100)
    mean, variance = group_norm_statistics(x, 4, shift=shift, backend=backend)
    exact = (x + shift[:, :, None, None, None]).double().reshape(2, 4, -1)
    torch.testing.assert_close(mean.double(), exact.mean(2), rtol=1e-6, atol=0)
    torch.testing.assert_close(variance.double(), exact.var(2, correction=0), rtol=1e-5, atol=0)
    whole = both(4)[1](*(tensor.double() for tensor in (x, weight, bias, shift))).float()
    rstd = (variance + 1e-5).rsqrt()
    parts = [
        group_norm_silu_apply(part, 4, mean, rstd, weight, bias, shift=shift, backend=backend)
        for part in x.split([2, 1, 3], dim=2)
    ]
    torch.testing.assert_close(torch.cat(parts, 2), whole, rtol=1e-4, atol=2e-4)
    own = group_norm_silu(x[:, :, :2], 4, weight, bias, 1e-5, shift=shift)
    assert not torch.allclose(own, parts[0], rtol=1e-4, atol=2e-4)
    unshifted = group_norm_silu_apply(x, 4, mean, rstd, weight, bias, silu=False, backend=backend)
    assert not torch.allclose(unshifted, whole, atol=0.1)


def test_backward_through_given_statistics_raises_on_triton():
    x, weight, bias, _ = case(1, 4, 9, dtype=torch.float32, shift=False)
    statistics = torch.zeros(1, 2), torch.ones(1, 2)
    y = group_norm_silu_apply(x.requires_grad_(), 2, *statistics, weight, bias, backend="triton")
    with pytest.raises(RuntimeError, match="no autograd formula"):
        y.sum().backward()


# --- Launches and library ops.


@pytest.mark.parametrize(
    ("last", "shift"), [(False, True), (True, False)], ids=["channels_first-shift", "channels_last-no_shift"]
)
def test_library_ops(last, shift):
    x, weight, bias, shift = case(2, 4, 3, 2, dtype=torch.float32, last=last, shift=shift)
    leaves = [tensor.requires_grad_() if tensor is not None else None for tensor in (x, weight, bias, shift)]
    x, weight, bias, shift = leaves
    torch.library.opcheck(forward.forward_op, (x, 2, weight, bias, 1e-5, True, shift))
    with torch.no_grad():
        x, weight, bias, shift = (None if tensor is None else tensor.detach() for tensor in leaves)
        y, mean, rstd = forward.forward_op(x, 2, weight, bias, 1e-5, True, shift)
        torch.library.opcheck(backward_op, (y, x, weight, bias, shift, mean, rstd, True))
        torch.library.opcheck(forward.apply_op, (x, mean, rstd, weight, bias, shift, True))
        torch.library.opcheck(forward.statistics_op, (x, 2, shift))


@pytest.mark.parametrize("backend", ["triton", None], ids=["triton", "default"])
def test_compiles_into_one_graph(backend):
    graphs = []

    def keep(graph, _):
        graphs.append([node.target for node in graph.graph.nodes if node.op == "call_function"])
        return graph.forward

    def block(x, weight, bias, shift):
        return 2 * group_norm_silu(x, 2, weight, bias, shift=shift, backend=backend)

    tensors = case(1, 4, 3, 5, dtype=torch.float32)
    compiled = torch.compile(block, backend=keep, fullgraph=True)
    torch.testing.assert_close(compiled(*tensors), block(*tensors))
    ours = [target for target in graphs[0] if "ccella_fast" in str(target)]
    assert len(graphs) == 1 and len(ours) == (1 if backend == "triton" else 0)


def test_compiles_with_its_backward_pass():
    def block(x, weight, bias, shift):
        return group_norm_silu(x, 2, weight, bias, shift=shift, backend="triton").square()

    tensors = [tensor.requires_grad_() for tensor in case(1, 4, 3, 5, dtype=torch.float32, last=True)]
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    expected = torch.autograd.grad(block(*tensors).sum(), tensors)
    torch.testing.assert_close(torch.autograd.grad(compiled(*tensors).sum(), tensors), expected)


def test_meta_tensors():
    x = channels_last(torch.empty(2, 64, 8, 8, 4, device="meta", dtype=torch.bfloat16))
    weight = torch.empty(64, device="meta")
    y = group_norm_silu(x, 32, weight, weight, backend="triton")
    assert (y.shape, y.dtype, y.stride(), y.device) == (x.shape, x.dtype, x.stride(), x.device)


def test_autocast_has_no_effect():
    tensors = case(1, 4, 3, 5, dtype=torch.float32)
    for function in both(2):
        outside = function(*tensors)
        with torch.autocast("cpu", torch.bfloat16):
            inside = function(*tensors)
        assert inside.dtype == torch.float32
        assert torch.equal(inside, outside)


def test_backend_choice():
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert choose("group_norm_silu", backend_support(cuda, torch.bfloat16)) == "triton"
    assert choose("group_norm_silu", backend_support(cuda, torch.float64)) == "reference"
    assert choose("group_norm_silu", backend_support(cuda, torch.float32, channels_per_group=4096)) == "reference"
    assert choose("group_norm_silu", backend_support(cpu, torch.float32)) == "reference"
    assert choose("group_norm_silu", backend_support(cpu, torch.bfloat16)) == "native"
    assert choose("group_norm_silu", backend_support(torch.device("meta"), torch.bfloat16)) == "reference"


def test_mismatched_shapes_and_unsupported_backends_raise():
    x, weight, bias, shift = case(2, 6, 5)
    with pytest.raises(BackendError, match="float64 is not one of"):
        group_norm_silu(x, 3, weight, bias, backend="triton")
    with pytest.raises(ValueError, match="divisible by 4 groups"):
        group_norm_silu(x, 4, weight, bias)
    with pytest.raises(ValueError, match=r"\(B, C, \*spatial\)"):
        group_norm_silu(x[0], 3, weight, bias)
    with pytest.raises(ValueError, match=r"shift must have shape \(B, C\) = \(2, 6\)"):
        group_norm_silu(x, 3, weight, bias, shift=shift[:1])
    with pytest.raises(ValueError, match=r"weight must have shape \(C,\) = \(6,\), got \(3,\)"):
        group_norm_silu(x, 3, weight[:3], bias)
    with pytest.raises(ValueError, match=r"bias must have shape \(C,\) = \(6,\), got \(3,\)"):
        group_norm_silu_apply(x, 3, torch.zeros(2, 3), torch.zeros(2, 3), weight, bias[:3])
    with pytest.raises(ValueError, match=r"mean and rstd must have shape \(B, G\) = \(2, 3\), got \(2, 2\)"):
        group_norm_silu_apply(x, 3, torch.zeros(2, 2), torch.zeros(2, 2), weight, bias)


def test_module_is_a_group_norm():
    ours, theirs = GroupNormSiLU(3, 6, 1e-4, silu=False), nn.GroupNorm(3, 6, 1e-4)
    assert repr(ours) == repr(theirs).replace("GroupNorm", "GroupNormSiLU")
    theirs.load_state_dict({name: draw(6, seed=i).float() for i, name in enumerate(ours.state_dict())})
    ours.load_state_dict(theirs.state_dict())
    x, _, _, shift = case(2, 6, 5, dtype=torch.float32)
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours(x, shift), theirs(x + shift[:, :, None]))
    ours.silu = True
    torch.testing.assert_close(ours(x), nn.functional.silu(theirs(x)))


# --- On a GPU: the same kernels, compiled, with their default tiles.


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("last", LAYOUTS)
@pytest.mark.parametrize(
    "shape", [(64, 33, 32, 31), (192, 17, 16, 15), (256, 16, 16, 8), (384, 16, 16, 8), (1024, 5, 7, 8)], ids=shape_id
)
def test_compiled(dtype, last, shape):
    for shift in (False, True):
        tensors = case(2, *shape, dtype=dtype, last=last, shift=shift)
        check([None if tensor is None else tensor.cuda() for tensor in tensors], 32)


@pytest.mark.gpu
@pytest.mark.parametrize("grid", [(8, 8, 4), (32, 32, 32)], ids=shape_id)
def test_in_a_cuda_graph(grid):
    x, weight, bias, shift = (tensor.cuda() for tensor in case(1, 64, *grid, dtype=torch.bfloat16, last=True))
    group_norm_silu(x, 32, weight, bias, shift=shift)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = group_norm_silu(x, 32, weight, bias, shift=shift)
    x.copy_(channels_last(draw(*x.shape, seed=9, dtype=torch.bfloat16)))
    graph.replay()
    assert torch.equal(y, group_norm_silu(x, 32, weight, bias, shift=shift))


@pytest.mark.gpu
@pytest.mark.parametrize("last", LAYOUTS)
def test_beyond_2_to_the_31_elements(last):
    """A block of voxels repeated: statistics, output and dx are those of the block, dweight is a multiple."""
    block, times = 2**20, 33
    x, weight, bias, _ = case(1, 64, block, dtype=torch.bfloat16, shift=False)
    small = [tensor.cuda().requires_grad_() for tensor in (x, weight, bias)]
    dy = draw(1, 64, block, seed=5, dtype=torch.bfloat16).cuda()
    expected = group_norm_silu(small[0], 32, *small[1:], backend="reference")
    expected_dx, expected_dweight, _ = torch.autograd.grad(expected, small, dy)

    x = small[0].detach().repeat(1, 1, times)
    large = [(channels_last(x) if last else x).requires_grad_(), *small[1:]]
    assert x.numel() > 2**31
    y = group_norm_silu(large[0], 32, *large[1:], backend="triton")
    dx, dweight, _ = torch.autograd.grad(y, large, dy.repeat(1, 1, times))
    for k in (0, times - 1):
        part = slice(k * block, (k + 1) * block)
        torch.testing.assert_close(y[:, :, part], expected, rtol=2**-7, atol=2**-7)
        torch.testing.assert_close(dx[:, :, part], expected_dx, rtol=2**-7, atol=2**-7)
    torch.testing.assert_close(dweight, times * expected_dweight, rtol=2**-6, atol=times)


@pytest.mark.parametrize("shifted", SHIFTED)
def test_plain_path_is_accurate_for_a_large_mean_in_channels_last(shifted):
    """PyTorch's own norm on a CPU is not."""
    generator = torch.Generator().manual_seed(5)
    x = 1000 + torch.randn(2, 16, 6, 5, 4, generator=generator, dtype=torch.float64)
    shift = 100 * torch.randn(2, 16, generator=generator, dtype=torch.float64) if shifted else None
    weight, bias = torch.ones(16, dtype=torch.float64), torch.zeros(16, dtype=torch.float64)
    last = x.float().to(memory_format=torch.channels_last_3d)
    truth = group_norm_silu_reference(last.double().contiguous(), 4, weight, bias, shift=shift)
    narrow = weight.float(), bias.float()
    actual = group_norm_silu(last, 4, *narrow, shift=None if shift is None else shift.float(), backend="reference")
    assert (actual.double() - truth).abs().max() < 1e-3
    if not shifted:
        plain = torch.nn.functional.silu(torch.nn.functional.group_norm(last, 4, *narrow, 1e-6))
        assert not (plain.double() - truth).abs().max() < 1e-3
