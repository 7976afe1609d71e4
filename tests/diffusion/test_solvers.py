"""Whole trajectories compared with diffusers and MONAI, single steps with the golden file.

Both implementations run in float64, tables included, so only float64 rounding remains, on any machine. Single precision is then
compared with double precision of the same plan.
"""

from __future__ import annotations

import zlib
from fractions import Fraction
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch

from ccella_fast.config import SamplingConfig, SchedulerConfig
from ccella_fast.diffusion.noise import generator, start_noise
from ccella_fast.diffusion.schedule import Schedule
from ccella_fast.diffusion.solvers import SOLVERS, Ddim, Ddpm, get_solver
from ccella_fast.diffusion.trajectory import Trajectory, run_trajectory
from ccella_fast.errors import ConfigError

SHAPE = (2, 6, 4, 3)
SEEDS = [3, 4]
SAME_SCHEDULE = {"beta_start": 0.0015, "beta_end": 0.0195, "clip_sample": False}
ALPHAS = 1 - torch.linspace(0.0015**0.5, 0.0195**0.5, 1000, dtype=torch.float64) ** 2
ABAR = torch.cumprod(ALPHAS, 0)


@pytest.fixture(scope="module")
def schedule() -> Schedule:
    return Schedule.from_config(SchedulerConfig())


def fake_denoiser(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Plausible (x keeps unit scale down to t = 0) and nonlinear, so that any wrong coefficient changes the result."""
    phase = (t.to(x.dtype) / 1000).view(-1, *[1] * (x.ndim - 1))
    return torch.sqrt(phase) * x + 0.05 * torch.cos(2 * x + 4 * phase)


def fake_velocity(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """The same for v and for the velocity of a rectified flow."""
    phase = (t.to(x.dtype) / 1000).view(-1, *[1] * (x.ndim - 1))
    return 0.7 * torch.sin(1.5 * x + phase) + phase * x


NETWORKS = {"epsilon": fake_denoiser, "v": fake_velocity, "x0": fake_velocity, "velocity": fake_velocity}
THEIR_NAMES = {"epsilon": "epsilon", "v": "v_prediction", "x0": "sample"}


def ours(
    schedule,
    solver,
    num_inference_steps,
    denoise=None,
    seeds=SEEDS,
    prediction="epsilon",
    spacing=None,
    dtype=torch.float64,
) -> list[torch.Tensor]:
    """The network's input at every evaluation, and the result."""
    seen = []

    def watched(x, t):
        seen.append(x)
        return (denoise or NETWORKS[prediction])(x, t)

    plan = solver.plan(schedule, num_inference_steps, prediction=prediction, timestep_spacing=spacing)
    trajectory = Trajectory(plan, start_noise(SHAPE, seeds).to(dtype), seeds)
    result = run_trajectory(trajectory, lambda _: trajectory.advance(watched), progress=False)
    return [*seen, result]


def start_and_noises(num_inference_steps: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The noise of the sampling loop, drawn independently, one sample at a time."""
    start = torch.stack([torch.randn(SHAPE, generator=generator(seed, "start")) for seed in SEEDS])
    sources = [generator(seed, "step") for seed in SEEDS]
    noises = [torch.stack([torch.randn(SHAPE, generator=g) for g in sources]) for _ in range(num_inference_steps)]
    return start.double(), [noise.double() for noise in noises]


def diffusers_trajectory(
    name: str, num_inference_steps: int, prediction: str = "epsilon", **settings
) -> list[torch.Tensor]:
    """The one-step solvers of diffusers. Of their fp32 tables they read only alphas_cumprod."""
    import diffusers
    from diffusers.schedulers import scheduling_ddim, scheduling_ddpm

    step = {"eta": settings.pop("eta")} if "eta" in settings else {}
    truth = getattr(diffusers, name)(
        beta_schedule="scaled_linear", prediction_type=THEIR_NAMES[prediction],
        **{"timestep_spacing": "linspace", **SAME_SCHEDULE, **settings},
    )  # fmt: skip
    truth.alphas_cumprod = ABAR
    truth.set_timesteps(num_inference_steps)
    x, noises = start_and_noises(num_inference_steps)
    trajectory = [x]
    with pytest.MonkeyPatch.context() as patch:
        for i, t in enumerate(truth.timesteps):
            # DDIMScheduler assumes t - T // N as the next timestep; with this N, that is the next one of its list.
            following = truth.timesteps[i + 1] if i + 1 < num_inference_steps else -1
            truth.num_inference_steps = Fraction(1000, int(t - following))
            for module in (scheduling_ddim, scheduling_ddpm):
                patch.setattr(module, "randn_tensor", lambda *_, now=noises[i], **__: now)
            x = truth.step(NETWORKS[prediction](x, t.expand(len(x))), t, x, **step).prev_sample
            trajectory.append(x)
    return trajectory


def assert_same(got: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert len(got) == len(expected)
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert a.dtype == b.dtype == torch.float64
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10, msg=lambda text, i=i: f"x at step {i}: {text}")


@pytest.mark.parametrize("num_inference_steps", [2, 7, 10, 20, 50, 333, 1000])
@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_ddpm_trajectory_equals_diffusers(schedule, num_inference_steps, prediction):
    settings = {"variance_type": "fixed_small", "prediction": prediction}
    expected = diffusers_trajectory("DDPMScheduler", num_inference_steps, **settings)
    assert_same(ours(schedule, Ddpm(), num_inference_steps, prediction=prediction), expected)


@pytest.mark.parametrize("num_inference_steps", [2, 7, 10, 20, 50, 333, 1000])
@pytest.mark.parametrize(("eta", "prediction"), [(0.0, "epsilon"), (1.0, "epsilon"), (0.0, "v"), (0.5, "x0")])
def test_ddim_trajectory_equals_diffusers(schedule, num_inference_steps, eta, prediction):
    settings = {"eta": eta, "set_alpha_to_one": True, "prediction": prediction}
    truth = diffusers_trajectory("DDIMScheduler", num_inference_steps, **settings)
    assert_same(ours(schedule, Ddim(eta), num_inference_steps, prediction=prediction), truth)


@pytest.mark.parametrize(
    ("num_inference_steps", "spacing"), [(20, "leading"), (20, "trailing"), (7, "trailing"), (7, "leading")]
)
def test_ddim_spacings_equal_diffusers(schedule, num_inference_steps, spacing):
    settings = {"eta": 0.0, "set_alpha_to_one": True, "timestep_spacing": spacing}
    truth = diffusers_trajectory("DDIMScheduler", num_inference_steps, **settings)
    assert_same(ours(schedule, Ddim(), num_inference_steps, spacing=spacing), truth)


class InDouble:
    """The torch module with float64 under the name float32."""

    float32 = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


@pytest.fixture
def diffusers_in_double(monkeypatch):
    """The multistep and flow schedulers of diffusers, which cast to torch.float32, without that rounding."""
    from diffusers import schedulers

    for name in ("dpmsolver_multistep", "unipc_multistep", "flow_match_euler_discrete", "flow_match_heun_discrete"):
        monkeypatch.setattr(getattr(schedulers, f"scheduling_{name}"), "torch", InDouble())


MULTISTEP = {
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 2}),
    "dpmpp_2m_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "solver_order": 2}),
    "unipc": ("UniPCMultistepScheduler", {"solver_order": 2, "solver_type": "bh2"}),
}


def multistep_trajectory(
    solver: str, num_inference_steps: int, spacing: str, prediction: str, **changes
) -> list[torch.Tensor]:
    """The multistep solvers of diffusers, with noise levels in float64 in place of their fp32 ones."""
    import diffusers

    name, settings = MULTISTEP[solver]
    how = {"use_karras_sigmas": True} if spacing == "karras" else {"timestep_spacing": spacing}
    scheduler = getattr(diffusers, name)(
        beta_start=0.0015, beta_end=0.0195, beta_schedule="scaled_linear", prediction_type=THEIR_NAMES[prediction],
        **{**settings, **how, **changes},
    )  # fmt: skip
    scheduler.alphas_cumprod = ABAR
    scheduler.set_timesteps(num_inference_steps)
    scheduler.set_begin_index(0)
    known = ((1 - ABAR) / ABAR).sqrt()
    if spacing == "karras":
        ends = known[[-1, 0]] ** (1 / 7)
        levels = (ends[0] + torch.linspace(0, 1, num_inference_steps, dtype=torch.float64) * (ends[1] - ends[0])) ** 7
    else:
        levels = known[scheduler.timesteps]
    levels = torch.cat([levels, torch.zeros(1)])
    torch.testing.assert_close(scheduler.sigmas, levels.float(), rtol=1e-4, atol=0)
    scheduler.sigmas = levels
    x, noises = start_and_noises(num_inference_steps)
    trajectory = [x]
    for t, noise in zip(scheduler.timesteps, noises, strict=True):
        extra = {"variance_noise": noise} if "sde" in solver else {}
        x = scheduler.step(NETWORKS[prediction](x, t.expand(len(x))), t, x, **extra).prev_sample
        trajectory.append(x)
    return trajectory


# Without linspace over all 1000 timesteps: there diffusers visits one timestep twice and returns NaN.
STEPS_AND_SPACINGS = [
    (1000, "trailing"), (1000, "karras"), (50, "linspace"), (50, "karras"), (20, "leading"), (20, "karras"),
    (10, "trailing"), (10, "karras"), (7, "linspace"), (7, "karras"), (2, "karras"), (1, "trailing"),
]  # fmt: skip


@pytest.mark.parametrize(("num_inference_steps", "spacing"), STEPS_AND_SPACINGS)
@pytest.mark.parametrize("prediction", ["epsilon", "v"])
@pytest.mark.parametrize("solver", MULTISTEP)
def test_multistep_trajectory_equals_diffusers(
    schedule, diffusers_in_double, solver, prediction, num_inference_steps, spacing
):
    expected = multistep_trajectory(solver, num_inference_steps, spacing, prediction)
    assert_same(
        ours(schedule, get_solver(solver), num_inference_steps, prediction=prediction, spacing=spacing), expected
    )


@pytest.mark.parametrize(
    ("solver", "changes"),
    [("dpmpp_2m", {"solver_type": "heun"}), ("dpmpp_2m", {"solver_order": 1}), ("unipc", {"solver_type": "bh1"}),
     ("unipc", {"disable_corrector": [3]})],
    ids=["dpmpp_2m-heun", "dpmpp_2m-order1", "unipc-bh1", "unipc-one_step_uncorrected"],
)  # fmt: skip
def test_a_similar_method_does_not_agree(schedule, diffusers_in_double, solver, changes):
    expected = multistep_trajectory(solver, 20, "karras", "epsilon", **changes)
    with pytest.raises(AssertionError, match="x at step"):
        assert_same(ours(schedule, get_solver(solver), 20, spacing="karras"), expected)


@pytest.mark.parametrize("num_inference_steps", [1, 2, 7, 10, 20, 50, 1000])
@pytest.mark.parametrize(
    ("solver", "name"),
    [("euler_flow", "FlowMatchEulerDiscreteScheduler"), ("heun_flow", "FlowMatchHeunDiscreteScheduler")],
)
def test_flow_trajectory_equals_diffusers(schedule, diffusers_in_double, solver, name, num_inference_steps):
    import diffusers

    scheduler = getattr(diffusers, name)()
    scheduler.set_timesteps(num_inference_steps)
    assert scheduler.sigmas.dtype == torch.float64
    x, _ = start_and_noises(0)
    expected = [x]
    for t in scheduler.timesteps:
        x = scheduler.step(fake_velocity(x, t.expand(len(x))), t, x).prev_sample
        expected.append(x)
    assert_same(
        ours(schedule, get_solver(solver), num_inference_steps, prediction="velocity", spacing="linspace"), expected
    )


@pytest.mark.parametrize("num_inference_steps", [2, 10, 50])
def test_karras_spacing_of_a_flow_equals_diffusers(schedule, diffusers_in_double, num_inference_steps):
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)
    scheduler.set_timesteps(num_inference_steps)
    x, _ = start_and_noises(0)
    expected = [x]
    for t in scheduler.timesteps:
        x = scheduler.step(fake_velocity(x, t.expand(len(x))), t, x).prev_sample
        expected.append(x)
    assert_same(
        ours(schedule, get_solver("euler_flow"), num_inference_steps, prediction="velocity", spacing="karras"), expected
    )


@pytest.mark.parametrize("solver", ["euler_flow", "heun_flow"])
def test_a_flow_network_may_predict_x0_instead(schedule, solver):
    def clean(x, t):
        return x - t.view(-1, 1, 1, 1, 1) / 1000 * fake_velocity(x, t)

    expected = ours(schedule, get_solver(solver), 10, prediction="velocity")
    got = ours(schedule, get_solver(solver), 10, clean, prediction="x0")
    assert_same(got[-1:], expected[-1:])


@pytest.mark.parametrize("num_inference_steps", [10, 20])
def test_euler_flow_equals_monai(schedule, num_inference_steps):
    """MONAI's velocity has the opposite sign; its timesteps are those of the default spacing."""
    from monai.networks.schedulers import RFlowScheduler

    scheduler = RFlowScheduler(num_train_timesteps=1000)
    scheduler.set_timesteps(num_inference_steps)
    x, _ = start_and_noises(0)
    expected = [x]
    for t, following in zip(scheduler.timesteps, [*scheduler.timesteps[1:], 0], strict=True):
        x, _ = scheduler.step(-fake_velocity(x, t.expand(len(x))), t, x, following)
        expected.append(x)
    assert_same(ours(schedule, get_solver("euler_flow"), num_inference_steps, prediction="velocity"), expected)


def test_a_single_step_starts_at_pure_noise(schedule):
    for solver in (Ddpm(), Ddim()):
        plan = solver.plan(schedule, 1)
        assert plan.timesteps.tolist() == [999]
        result = ours(schedule, solver, 1)
        signal, sigma = schedule.alphas_cumprod[999] ** 0.5, (1 - schedule.alphas_cumprod[999]) ** 0.5
        expected = (result[0] - sigma * fake_denoiser(result[0], torch.tensor([999, 999]))) / signal
        torch.testing.assert_close(result[1], expected, rtol=1e-10, atol=1e-10)


def monai_trajectory(num_inference_steps: int) -> list[torch.Tensor]:
    from monai.networks.schedulers.ddpm import DDPMScheduler

    truth = DDPMScheduler(schedule="scaled_linear_beta", **SAME_SCHEDULE)
    truth.betas, truth.alphas, truth.alphas_cumprod = 1 - ALPHAS, ALPHAS, ABAR
    truth.set_timesteps(num_inference_steps)
    x, noises = start_and_noises(num_inference_steps)
    trajectory = [x]
    with pytest.MonkeyPatch.context() as patch:
        for i, t in enumerate(truth.timesteps):
            patch.setattr(torch, "randn", lambda *_, now=noises[i], **__: now)
            x, _ = truth.step(fake_denoiser(x, t.expand(len(x))), t, x)
            trajectory.append(x)
    return trajectory


def test_ddpm_equals_monai_at_1000_steps_and_not_at_50(schedule):
    assert_same(ours(schedule, Ddpm(), 1000), monai_trajectory(1000))
    # With 50 steps, MONAI keeps the single-step posteriors (docs/explanation/method.md, C15): most of the noise remains.
    with pytest.raises(AssertionError):
        torch.testing.assert_close(ours(schedule, Ddpm(), 50)[-1], monai_trajectory(50)[-1], rtol=0.3, atol=0.3)


@pytest.mark.parametrize("t", [999, 500, 1, 0])
def test_ddpm_step_equals_golden(schedule, golden, t):
    expected = golden["SCHEDULER"][f"step_mean_t{t}"]
    x, eps = (
        torch.from_numpy(
            np.random.RandomState(zlib.crc32(f"input:{name}".encode()))
            .standard_normal(size=(1, 4, 4, 4, 4))
            .astype(np.float32)
        )
        for name in ("xt", "eps")
    )
    plan = Ddpm().plan(schedule, 1000)
    assert plan.timesteps[999 - t] == t
    row = plan.coefficients[999 - t]
    got = plan.step(x, eps, torch.tensor(row, dtype=torch.float32), torch.zeros_like(x), ())
    for value, truth in ((got.x, expected["prev"]), (got.x0, expected["x0"])):
        samples = value.flatten()[:: truth["samples_stride"]][:16].double().numpy()
        np.testing.assert_allclose(samples, truth["samples"], rtol=1e-3, atol=1e-4)
        assert abs(value.double().std(correction=0).item() / truth["std"] - 1) < 1e-3
    np.testing.assert_allclose(plan.noise_scale[999 - t] ** 2, expected["posterior_var"], rtol=1e-4, atol=1e-19)


def test_samples_of_gaussian_data_have_its_mean_and_standard_deviation(schedule):
    """The noise prediction for data N(2, 0.5^2) is known in closed form, and so is the distribution of the samples."""
    alphas = torch.tensor(schedule.alphas_cumprod)

    def exact(x, t):
        abar = alphas[t].view(-1, 1, 1, 1, 1)
        return (1 - abar).sqrt() * (x - 2 * abar.sqrt()) / (abar * 0.25 + 1 - abar)

    for solver, num_inference_steps in ((Ddpm(), 1000), (Ddim(), 300)):
        values = ours(schedule, solver, num_inference_steps, denoise=exact, seeds=list(range(40)))[-1]
        assert abs(values.mean() - 2) < 0.02, solver
        assert abs(values.std() - 0.5) < 0.02, solver


@pytest.mark.parametrize("solver", [Ddpm(), Ddim(), Ddim(eta=0.5)], ids=["ddpm", "ddim", "ddim-eta0.5"])
def test_a_sample_does_not_depend_on_its_batch(schedule, solver):
    def simple(x, t):  # vectorized tanh and cos depend in the last bit on the position in memory
        return 0.5 * x

    batch = ours(schedule, solver, 10, simple, seeds=[5, 6, 7], dtype=torch.float32)
    alone = ours(schedule, solver, 10, simple, seeds=[6], dtype=torch.float32)
    for a, b in zip(batch, alone, strict=True):
        assert torch.equal(a[1], b[0])
    assert not torch.equal(batch[-1][0], batch[-1][1])


def test_the_sample_stays_fp32_with_a_bf16_network(schedule):
    result = ours(schedule, Ddpm(), 5, lambda x, t: (0.5 * x).bfloat16(), dtype=torch.float32)
    assert all(x.dtype == torch.float32 for x in result)


def plain_arithmetic(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Only sums and products, which round alike on every machine, unlike exp and cos. x keeps unit scale."""
    phase = (t.to(x.dtype) / 1000).view(-1, *[1] * (x.ndim - 1))
    return phase * x + 0.05 * (1 - phase) * x / (1 + x * x)


@pytest.mark.parametrize("num_inference_steps", [2, 20, 1000])
@pytest.mark.parametrize("name", SOLVERS)
def test_single_precision_follows_double(schedule, name, num_inference_steps):
    """Relative to the largest value.

    The first step divides its rounding error by a signal of 0.07, and the errors of up to 1000 steps add up.
    """
    prediction = "velocity" if get_solver(name).flow else "epsilon"
    single, double = (
        ours(schedule, get_solver(name), num_inference_steps, plain_arithmetic, prediction=prediction, dtype=dtype)
        for dtype in (torch.float32, torch.float64)
    )
    error = max(float((a - b).abs().max()) for a, b in zip(single, double, strict=True))
    assert 0 < error < 1e-5 * max(float(x.abs().max()) for x in double)


@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing", "karras"])
def test_timesteps_equal_diffusers_for_any_number_of_steps(schedule, spacing):
    import diffusers

    settings = {"beta_start": 0.0015, "beta_end": 0.0195, "beta_schedule": "scaled_linear"}
    multistep = {"use_karras_sigmas": True} if spacing == "karras" else {"timestep_spacing": spacing}
    truths = {"dpmpp_2m": diffusers.DPMSolverMultistepScheduler(**settings, **multistep)}
    if spacing != "karras":
        truths["ddim"] = diffusers.DDIMScheduler(**settings, timestep_spacing=spacing)
    for name, truth in truths.items():
        truth.alphas_cumprod = ABAR
        for count in [*range(1, 120), 333, 499, 500, 501, 750, 997, 998, 999]:
            truth.set_timesteps(count)
            if name == "ddim" and spacing == "linspace" and count == 1:
                continue  # diffusers uses timestep 0 there, not the noisiest one
            got = get_solver(name).plan(schedule, count, timestep_spacing=spacing).timesteps
            expected = truth.timesteps[
                truth.timesteps >= 0
            ]  # its trailing spacing ends in -1 for some counts, such as 61
            assert got.tolist() == expected.tolist(), (name, count)


def test_every_timestep_is_visited_once_when_all_are_used(schedule):
    for name in ("ddpm", "ddim", "dpmpp_2m", "unipc"):
        for spacing in ("linspace", "leading", "trailing"):
            plan = get_solver(name).plan(schedule, 1000, timestep_spacing=spacing)
            assert plan.timesteps.tolist() == list(range(999, -1, -1)), (name, spacing)


def test_invalid_names_and_step_counts_raise(schedule):
    assert {name: type(get_solver(name)) for name in SOLVERS} == SOLVERS
    assert get_args(get_type_hints(SamplingConfig)["solver"]) == tuple(SOLVERS)
    with pytest.raises(ConfigError, match="did you mean 'ddim'"):
        get_solver("dimm")
    for name in ("ddpm", "dpmpp_2m", "euler_flow"):
        solver = get_solver(name)
        right = "velocity" if solver.flow else "epsilon"
        for count in (0, 1001):
            if not solver.flow or count < 1:  # a flow has no limit
                with pytest.raises(ConfigError, match="use 20, for example" if solver.flow else "use 1 to 1000"):
                    solver.plan(schedule, count, prediction=right)
        with pytest.raises(ConfigError, match="did you mean 'trailing'"):
            solver.plan(schedule, 10, prediction=right, timestep_spacing="trailling")
        with pytest.raises(ConfigError, match="did you mean 'velocity'"):
            solver.plan(schedule, 10, prediction="velocty")
    with pytest.raises(ConfigError, match="euler_flow needs to know what the network predicts"):
        get_solver("euler_flow").plan(schedule, 10)
    with pytest.raises(ConfigError, match="a noise schedule predict epsilon, v or x0, not velocity"):
        get_solver("unipc").plan(schedule, 10, prediction="flow_prediction")
    with pytest.raises(ConfigError, match="leading"):
        get_solver("heun_flow").plan(schedule, 10, prediction="velocity", timestep_spacing="leading")
