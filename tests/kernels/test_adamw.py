"""AdamW over flat buffers: both implementations against explicit float64 arithmetic over several steps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ccella_fast.kernels import adamw as module
from ccella_fast.kernels.adamw import AdamWStep, adamw_
from ccella_fast.kernels.tuning import DEFAULT_LAUNCH_CONFIGS
from kernel_fixtures import draw, dtype_params, repair_interpreter

repair_interpreter()
SETTINGS = {
    "lr": 3e-3,
    "beta1": 0.8,
    "beta2": 0.95,
    "eps": 1e-6,
    "weight_decay": 0.3,
    "scale": 0.7,
    "average_decay": 0.6,
}
NAMES = ("weights", "exp_avg", "exp_avg_sq", "average", "copy")
ALLOWED = 16 * 2.0**-24  # of the largest value, after three steps of about ten roundings of fp32


def gradients(shape: tuple[int, ...], dtype: torch.dtype) -> list:
    """The gradients of three steps: fp32 tensors of `shape`, or factors of matrices of `shape` with 3, 1 and 18 rows."""
    if len(shape) == 1:
        return [draw(*shape, seed=seed, dtype=torch.float32) for seed in range(3)]
    return [tuple(draw(rows, size, seed=rows + size, dtype=dtype) for size in shape) for rows in (3, 1, 18)]


def truth(start: Tensor, steps: list, **changed: float) -> dict[str, Tensor]:
    """Explicit arithmetic in float64."""
    s = {**SETTINGS, **changed}
    w, average = start.double(), start.double()
    m, v = torch.zeros_like(w), torch.zeros_like(w)
    for t, gradient in enumerate(steps, start=1):
        if isinstance(gradient, tuple):
            dy, x = (side.double() for side in gradient)
            gradient = sum(torch.outer(one, other) for one, other in zip(dy, x, strict=True)).flatten()
        g = s["scale"] * gradient.double()
        m = s["beta1"] * m + (1 - s["beta1"]) * g
        v = s["beta2"] * v + (1 - s["beta2"]) * g**2
        w = w - s["lr"] * s["weight_decay"] * w
        w = w - s["lr"] * (m / (1 - s["beta1"] ** t)) / ((v / (1 - s["beta2"] ** t)).sqrt() + s["eps"])
        average = s["average_decay"] * average + (1 - s["average_decay"]) * w
    return dict(zip(NAMES, (w, m, v, average), strict=False))


def run(start: Tensor, steps: list, backend: str, *, others: bool = True) -> dict[str, Tensor]:
    states = [start.clone(), torch.zeros_like(start), torch.zeros_like(start)]
    average, copy = (start.clone(), start.bfloat16()) if others else (None, None)
    for number, gradient in enumerate(steps, start=1):
        kept = [side.clone() for side in (gradient if isinstance(gradient, tuple) else [gradient])]
        given = tuple(kept) if isinstance(gradient, tuple) else kept[0]
        adamw_(*states, given, AdamWStep(**SETTINGS, number=number), average=average, copy=copy, backend=backend)
    return dict(zip(NAMES, [*states, average, copy], strict=True))


def errors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """The largest error of each tensor, relative to its largest value."""
    pairs = {name: (found[name].double(), value) for name, value in expected.items()}
    return {name: float((ours - theirs).abs().max() / theirs.abs().max()) for name, (ours, theirs) in pairs.items()}


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((1000,), torch.float32), ((24, 200), torch.float32), ((16, 130), torch.bfloat16)],
    ids=["dense", "factors-fp32", "factors-bf16"],
)
def test_three_steps_equal_explicit_arithmetic(shape, dtype, backend, monkeypatch):
    small = {
        "dense": {"BLOCK": 128},
        **dict.fromkeys(("factors 16bit", "factors fp32"), {"BLOCK_M": 16, "BLOCK_K": 64}),
    }
    for key, constants in small.items():
        config = DEFAULT_LAUNCH_CONFIGS["adamw"][key]
        monkeypatch.setitem(
            DEFAULT_LAUNCH_CONFIGS["adamw"], key, config._replace(constants=config.constants | constants)
        )
    steps = gradients(shape, dtype)
    start = draw(torch.Size(shape).numel(), seed=9, dtype=torch.float32)
    found, expected = run(start, steps, backend), truth(start, steps)
    wrong = {name: error for name, error in errors(found, expected).items() if error > ALLOWED}
    assert not wrong
    # Triton's interpreter truncates to bf16; a GPU rounds.
    assert ((found["copy"].float() - found["weights"]).abs() <= 2.0**-7 * found["weights"].abs()).all()
    # Each number has an effect that is far above what is allowed.
    for name, value in SETTINGS.items():
        changed = truth(start, steps, **{name: value * (3 if name == "eps" else 0.9)})
        seen = errors(found, changed)
        assert any(error > (2e-6 if name == "eps" else 1e-4) for error in seen.values()), name


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_average_and_copy_may_be_missing(backend):
    start, steps = draw(64, dtype=torch.float32), gradients((64,), torch.float32)
    found, full = run(start, steps, backend, others=False), run(start, steps, backend)
    assert found["average"] is None and torch.equal(found["weights"], full["weights"])


@pytest.mark.parametrize("part", [1, 7, 26, 60])
@pytest.mark.parametrize("shape", [(78,), (6, 13)], ids=["dense", "factors"])
def test_parts_change_nothing(shape, part, monkeypatch):
    """Parts of one element, of one row, that do not divide the weights, and of two and four rows."""
    start, steps = draw(78, dtype=torch.float32), gradients(shape, torch.float32)
    whole = run(start, steps, "reference")
    monkeypatch.setattr(module, "_PART", part)
    found = run(start, steps, "reference")
    assert max(errors(found, truth(start, steps)).values()) <= ALLOWED
    assert all((found[name] - whole[name]).abs().max() <= ALLOWED * whole[name].abs().max() for name in NAMES[:4])


@pytest.mark.parametrize("dtype", dtype_params(torch.float32, torch.bfloat16))
def test_library_ops(dtype):
    numbers = list(AdamWStep(**SETTINGS, number=2).arguments())
    start = draw(32, dtype=torch.float32)
    states = [start.clone(), torch.zeros(32), torch.zeros(32)]
    torch.library.opcheck(module._adamw_op, (*states, start, numbers, start.clone(), start.to(dtype)))
    factors = [draw(2, size, dtype=dtype) for size in (4, 8)]
    torch.library.opcheck(module._adamw_factors_op, (*states, *factors, numbers, None, start.to(dtype)))


def test_what_does_not_fit_is_refused():
    flat, step = torch.zeros(12), AdamWStep(**SETTINGS, number=1)
    refused = {
        "exp_avg must be fp32": ([flat, flat.double(), flat, flat], {}),
        "gradient must be contiguous with shape \\(12,\\)": ([flat, flat, flat, torch.zeros(11)], {}),
        "average must be contiguous": ([flat, flat, flat, flat], {"average": torch.zeros(24)[::2]}),
        "are not the factors": ([flat, flat, flat, (torch.zeros(2, 3), torch.zeros(2, 5))], {}),
        "must be contiguous and have one dtype": (
            [flat, flat, flat, (torch.zeros(2, 3), torch.zeros(2, 4).bfloat16())],
            {},
        ),
    }
    for message, (arguments, options) in refused.items():
        with pytest.raises(ValueError, match=message):
            adamw_(*arguments, step, **options)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((2**20,), torch.float32), ((256, 3000), torch.bfloat16), ((256, 3000), torch.float32)],
    ids=["dense", "factors-bf16", "factors-fp32"],
)
def test_three_steps_on_a_gpu(shape, dtype):
    steps, start = gradients(shape, dtype), draw(torch.Size(shape).numel(), seed=9, dtype=torch.float32)
    to_gpu = lambda step: tuple(side.cuda() for side in step) if isinstance(step, tuple) else step.cuda()  # noqa: E731
    found = run(start.cuda(), [to_gpu(step) for step in steps], "triton")
    assert torch.equal(found["copy"], found["weights"].bfloat16())
    wrong = errors({name: value.cpu() for name, value in found.items()}, truth(start, steps))
    assert all(error < 4 * ALLOWED for error in wrong.values()), (
        wrong
    )  # square roots and divisions of a GPU are approximate
