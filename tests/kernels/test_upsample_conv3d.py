"""Upsampling and convolution: the plain backends against explicit arithmetic, every backend against float64."""

from __future__ import annotations

import ast
import inspect
import textwrap

import pytest
import torch
from torch.nn import functional as F

from ccella_fast.kernels import upsample_conv3d as upsample
from ccella_fast.kernels.backend import ENVIRONMENT, BackendError, choose
from ccella_fast.kernels.tuning import DEFAULT_LAUNCH_CONFIGS
from ccella_fast.kernels.upsample_conv3d import (
    MIN_PHASE_VOXELS,
    UpsampleConv3d,
    backend_support,
    phase_weights,
    transposed_weight,
    upsample_conv3d,
    upsample_conv3d_phase,
    upsample_conv3d_reference,
)
from kernel_fixtures import DTYPES, check_fused, draw, repair_interpreter

repair_interpreter()
NAMES = ["y", "x", "weight", "bias"]


def case(batch, width, outputs, grid, dtype=torch.float64):
    scale = (27 * width) ** -0.5
    x, weight = draw(batch, width, *grid), scale * draw(outputs, width, 3, 3, 3, seed=1)
    return x.to(dtype), weight.to(dtype), draw(outputs, seed=2, dtype=dtype)


@pytest.mark.parametrize("backend", ["reference", "phase"])
def test_equals_explicit_arithmetic(backend):
    x, weight, bias = tensors = [tensor.requires_grad_() for tensor in case(2, 3, 5, (2, 4, 3))]
    large = x.repeat_interleave(2, 2).repeat_interleave(2, 3).repeat_interleave(2, 4)
    patches = F.pad(large, (1,) * 6).unfold(2, 3, 1).unfold(3, 3, 1).unfold(4, 3, 1)
    expected = torch.einsum("bcxyzijk,ocijk->boxyz", patches, weight) + bias[:, None, None, None]
    actual = upsample_conv3d(x, weight, bias, backend=backend)
    torch.testing.assert_close(actual, expected)
    assert not torch.allclose(upsample_conv3d(x, weight.flip(2), bias, backend=backend), expected)
    torch.testing.assert_close(upsample_conv3d(x, weight, None, backend=backend), expected - bias[:, None, None, None])
    dy = draw(*expected.shape, seed=3)
    found, truth = (torch.autograd.grad(y, tensors, dy) for y in (actual, expected))
    torch.testing.assert_close(found, truth)


def on(backend):
    return lambda *tensors: upsample_conv3d(*tensors, backend=backend)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ["phase", "triton"])
def test_error_is_at_most_twice_that_of_plain_pytorch(backend, dtype):
    """Several steps over the input channels with the default tiles, the last one partial."""
    tensors = case(1, 36, 12, (3, 2, 5), dtype)
    check_fused(on(backend), upsample_conv3d_reference, tensors, names=NAMES)
    with pytest.raises(AssertionError, match="y: error"):
        check_fused(lambda x, w, b: on(backend)(x, w.flip(3), b), upsample_conv3d_reference, tensors, names=NAMES)


def test_taps_and_channels_are_one_loop():
    """Triton pipelines loads within the innermost loop only: a loop over channels would wait for memory at every tap."""
    source = ast.parse(textwrap.dedent(inspect.getsource(upsample._upsample_conv3d_fwd_kernel.fn)))
    assert sum(isinstance(node, (ast.For, ast.While)) for node in ast.walk(source)) == 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_several_tiles(dtype, monkeypatch):
    """Several tiles of voxels, one of which spans two samples, and of output channels; the last ones are partial."""
    for key, config in DEFAULT_LAUNCH_CONFIGS["upsample_conv3d"].items():
        small = config._replace(constants={"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 16})
        monkeypatch.setitem(DEFAULT_LAUNCH_CONFIGS["upsample_conv3d"], key, small)
    check_fused(on("triton"), upsample_conv3d_reference, case(2, 8, 20, (3, 1, 4), dtype), names=NAMES)


@pytest.mark.parametrize("backend", ["phase", "triton"])
def test_other_layouts_and_no_bias(backend):
    x, weight, bias = case(2, 5, 3, (3, 1, 2), torch.float32)
    for other in (x.to(memory_format=torch.channels_last_3d), x.transpose(2, 4)):
        check_fused(on(backend), upsample_conv3d_reference, (other, weight, bias), names=NAMES)
    check_fused(on(backend), upsample_conv3d_reference, (x, weight, None), names=NAMES[:3])


@pytest.mark.parametrize("backend", ["phase", "triton"])
def test_keeps_channels_last(backend):
    x, weight, bias = case(1, 16, 16, (2, 3, 4), torch.float32)
    last = x.to(memory_format=torch.channels_last_3d)
    with torch.no_grad():
        y = upsample_conv3d(last, weight, bias, backend=backend)
    assert y.is_contiguous(memory_format=torch.channels_last_3d)
    torch.testing.assert_close(y, upsample_conv3d_reference(x, weight, bias), rtol=1e-4, atol=1e-5)


def test_transposed_weight_is_the_same_layer():
    x, weight, bias = case(1, 3, 4, (3, 2, 4))
    actual = F.conv_transpose3d(x, transposed_weight(weight).transpose(0, 1), bias, stride=2, padding=1)
    torch.testing.assert_close(actual, upsample_conv3d_reference(x, weight, bias))


def test_phases_need_8_of_27_multiplications():
    from torch.utils.flop_counter import FlopCounterMode

    x, weight, bias = (tensor.to("meta") for tensor in case(1, 8, 8, (16, 16, 16)))
    counts = []
    for function in (upsample_conv3d_reference, upsample_conv3d_phase):
        with FlopCounterMode(display=False) as counter:
            function(x, weight, bias)
        counts.append(counter.get_total_flops())
    assert counts[0] == 2 * 27 * 8 * 8 * 32**3 and counts[0] * 8 == counts[1] * 27


def test_module_has_the_parameters_of_conv3d_and_notices_a_changed_weight():
    plain, module = torch.nn.Conv3d(8, 8, 3, padding=1), UpsampleConv3d(8)
    module.load_state_dict(plain.state_dict())
    x = draw(1, 8, 4, 2, 3, dtype=torch.float32)
    for _ in range(2):
        with torch.no_grad():
            expected = upsample_conv3d_reference(x, module.weight, module.bias)
            torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-5)
            module.weight.mul_(-2.0)  # the cached sums of taps must not be used again
    assert list(module.state_dict()) == ["weight", "bias"]


@pytest.mark.parametrize(
    "clear_cache", [lambda module, x: module(x), lambda module, _: module.eval()], ids=["call", "eval"]
)
def test_module_notices_a_weight_changed_through_data(clear_cache):
    """DeepSpeed's optimizers write this way, which PyTorch does not count as a change."""
    module, x = UpsampleConv3d(8), draw(1, 8, 4, 2, 3, dtype=torch.float32)
    with torch.no_grad():
        before = module(x)
    module.weight.data.mul_(-2.0)
    clear_cache(module, x)
    with torch.no_grad():
        expected = upsample_conv3d_reference(x, module.weight, module.bias)
        torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(before, expected, rtol=1e-2)


def test_module_created_and_called_in_inference_mode():
    with torch.inference_mode():
        module, x = UpsampleConv3d(8), draw(1, 8, 4, 2, 3, dtype=torch.float32)
        expected = upsample_conv3d_reference(x, module.weight, module.bias)
        torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["triton", "phase", "reference"])
def test_mismatched_shapes_raise(backend):
    x, weight, bias = case(1, 4, 6, (2, 2, 2), torch.float32)
    for wrong in ((x[0], weight, bias), (x, weight[:, :3], bias), (x, weight[..., :2], bias), (x, weight, bias[:5])):
        with pytest.raises(ValueError, match="must have shape"):
            upsample_conv3d(*wrong, backend=backend)


def test_kept_phase_weights_are_in_the_order_that_the_kernel_reads(monkeypatch):
    monkeypatch.setenv(ENVIRONMENT, "upsample_conv3d=triton")
    module, kept = UpsampleConv3d(3).eval(), []
    monkeypatch.setattr(upsample, "upsample_conv3d", lambda x, *args, phases, **options: kept.append(phases) or x)
    with torch.no_grad():
        module(draw(1, 3, 1, 1, 1, dtype=torch.float32))
    (phases,) = kept
    assert torch.equal(phases, phase_weights(module.weight))
    read = phases.permute(0, 3, 4, 5, 2, 1)
    assert read.is_contiguous() and not phase_weights(module.weight).permute(0, 3, 4, 5, 2, 1).is_contiguous()


def test_backend_choice_by_size_and_by_name():
    x, weight, bias = case(1, 4, 4, (2, 2, 2), torch.float32)
    cpu = torch.device("cpu"), torch.float32
    assert (
        choose("upsample_conv3d", backend_support(*cpu, voxels=MIN_PHASE_VOXELS - 1, phases_given=False)) == "reference"
    )
    assert choose("upsample_conv3d", backend_support(*cpu, voxels=MIN_PHASE_VOXELS, phases_given=False)) == "phase"
    assert choose("upsample_conv3d", backend_support(*cpu, voxels=1, phases_given=True)) == "phase"
    many = {"voxels": 10 * MIN_PHASE_VOXELS, "phases_given": False}
    gpu = torch.device("cuda")
    assert choose("upsample_conv3d", backend_support(gpu, torch.float32, **many)) == "triton"
    assert choose("upsample_conv3d", backend_support(gpu, torch.float64, **many)) == "phase"
    with pytest.raises(BackendError, match="upsample_conv3d does not have the backend 'sdpa'"):
        upsample_conv3d(x, weight, bias, backend="sdpa")
    with pytest.raises(BackendError, match="requested by argument, but float64 is not one of"):
        upsample_conv3d(x.double(), weight.double(), bias.double(), backend="triton")


def test_library_op():
    op = torch.ops.ccella_fast.upsample_conv3d
    half = [t.requires_grad_() for t in case(1, 2, 2, (1, 1, 2), torch.float16)]
    torch.library.opcheck(op, (*half, None))
    # In float32 the gradient of x has another form, which takes long to trace with symbolic shapes.
    x, weight, bias = (t.requires_grad_() for t in case(1, 2, 2, (1, 1, 2), torch.float32))
    torch.library.opcheck(op, (x, weight, bias, None), test_utils="test_aot_dispatch_static")
    torch._dynamo.reset()
    graphs = []

    def keep(graph, inputs):
        graphs.append([node.target for node in graph.graph.nodes if node.op == "call_function"])
        return graph.forward

    function = torch.compile(lambda *t: upsample_conv3d(*t, backend="triton"), backend=keep, fullgraph=True)
    function(x, weight, bias)
    assert len(graphs) == 1 and sum("upsample_conv3d" in str(target) for target in graphs[0]) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_compiled_kernel_on_a_gpu(dtype):
    tensors = [tensor.cuda() for tensor in case(2, 128, 64, (5, 4, 6), dtype)]
    check_fused(lambda *t: upsample_conv3d(*t, backend="triton"), upsample_conv3d_reference, tensors, names=NAMES)
