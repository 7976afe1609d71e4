"""`sample` with any denoiser: noise by seed, errors, diffusers schedulers, and the conditions for CUDA graphs."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from torch.utils._python_dispatch import TorchDispatchMode

from ccella_fast import sample
from ccella_fast.diffusion.noise import generator, start_noise
from ccella_fast.diffusion.schedule import Schedule
from ccella_fast.diffusion.solvers import SOLVERS, Ddim, get_solver
from ccella_fast.diffusion.trajectory import Trajectory, run_trajectory
from ccella_fast.errors import ConfigError, NonFiniteError

STOCHASTIC = ("ddpm", "dpmpp_2m_sde")
OWN = "cannot be combined with the scheduler object DDIMScheduler, which has its own"
SHAPE = (2, 4, 3, 2)


def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Elementwise, without vectorized functions: the bits do not depend on the position in memory."""
    return x * (0.3 + t.view(-1, *[1] * (x.ndim - 1)).to(x.dtype) / 2000)


def prediction(solver: object) -> str:
    return "velocity" if str(solver).endswith("flow") else "epsilon"


def test_a_solver_object_with_its_own_settings():
    x_T, seeds = start_noise(SHAPE, [1, 2]), [1, 2]
    noisy = sample(network, x_T, solver=Ddim(eta=1.0), num_inference_steps=6, seeds=seeds)
    ancestral = sample(network, x_T, solver="ddpm", num_inference_steps=6, seeds=seeds)
    torch.testing.assert_close(noisy, ancestral, rtol=1e-4, atol=1e-4)  # the same distribution in each step
    assert (sample(network, x_T, solver="ddim", num_inference_steps=6) - noisy).abs().max() > 0.01


def draw(solver, seeds, num_inference_steps=6, **settings):
    return sample(
        network, start_noise(SHAPE, seeds), solver=solver, num_inference_steps=num_inference_steps,
        prediction=prediction(solver), seeds=seeds, **settings,
    )  # fmt: skip


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_sample_is_bit_equal_in_any_batch(solver):
    together = draw(solver, [5, 6, 7, 8])
    split = torch.cat([draw(solver, [5, 6, 7]), draw(solver, [8])])
    swapped = draw(solver, [8, 5])
    assert torch.equal(together, split)
    assert torch.equal(together[3], swapped[0]) and torch.equal(together[0], swapped[1])
    assert not torch.equal(together[0], together[1])


@pytest.mark.parametrize("solver", STOCHASTIC)
def test_step_noise_depends_only_on_the_seeds(solver):
    x_T = torch.zeros(2, *SHAPE)
    torch.manual_seed(1)
    first = sample(network, x_T, solver=solver, seeds=[1, 2], num_inference_steps=6)
    torch.manual_seed(2)
    assert torch.equal(first, sample(network, x_T, solver=solver, seeds=[1, 2], num_inference_steps=6))
    assert not torch.equal(first, sample(network, x_T, solver=solver, seeds=[1, 3], num_inference_steps=6))
    assert torch.equal(first, sample(network, x_T, solver=solver, seeds=np.array([1, 2]), num_inference_steps=6))
    for seeds in (None, [1], [1, 2, 3]):
        with pytest.raises(ConfigError, match="a seed for each sample"):
            sample(network, x_T, solver=solver, seeds=seeds, num_inference_steps=6)
    sample(network, x_T, solver="unipc", num_inference_steps=6)  # none needed


def test_any_rank_and_dtype():
    x_T = torch.randn(3, 4, 2, 2, 2)
    whole = sample(network, x_T)
    assert torch.equal(sample(network, x_T.flatten(1)).view_as(x_T), whole)
    assert torch.equal(sample(network, x_T[:, 0, 0, 0, 0]), whole[:, 0, 0, 0, 0])
    half = sample(lambda x, t: network(x, t) if x.dtype == torch.bfloat16 else None, x_T.bfloat16())
    assert half.dtype == torch.bfloat16
    # Only the network's input and output are bf16; between steps the sample is fp32.
    torch.testing.assert_close(half.float(), sample(network, x_T.bfloat16().float()), rtol=0.05, atol=0.05)
    double = sample(network, x_T.double())
    assert double.dtype == torch.float64
    torch.testing.assert_close(double.float(), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("solver", STOCHASTIC)
def test_a_sample_may_be_a_scalar(solver):
    seeds, x_T = [1, 2, 3], torch.randn(3)
    numbers = sample(network, x_T, solver=solver, seeds=seeds, num_inference_steps=4)
    assert torch.equal(numbers, sample(network, x_T[:, None], solver=solver, seeds=seeds, num_inference_steps=4)[:, 0])


def test_invalid_noise_and_step_counts_raise():
    for x_T in (torch.zeros(1, 3, dtype=torch.int64), np.zeros((1, 3))):
        with pytest.raises(ConfigError, match="x_T must be a floating-point tensor, got a"):
            sample(network, x_T)
    for num_inference_steps in (2.5, "5", 0):
        with pytest.raises(ConfigError, match=f"must be an integer from 1 to 1000, got {num_inference_steps!r}"):
            sample(network, torch.zeros(1, 3), num_inference_steps=num_inference_steps)


def test_the_callback_receives_every_evaluation_and_may_keep_its_tensors():
    kept = []
    x_T = torch.randn(2, *SHAPE)
    result = sample(network, x_T, num_inference_steps=5, callback=lambda *args: kept.append(args))
    plan = get_solver("dpmpp_2m").plan(Schedule.of(), 5)
    assert [(i, t) for i, t, _, _ in kept] == list(enumerate(plan.timesteps.tolist()))
    assert torch.equal(kept[-1][2], result)
    torch.testing.assert_close(kept[-1][3], result)  # the last step ends at x0
    x, (signal, sigma) = x_T, (Schedule.of().alphas_cumprod[999] ** 0.5, (1 - Schedule.of().alphas_cumprod[999]) ** 0.5)
    x0 = (x - sigma * network(x, torch.tensor([999, 999]))) / signal
    torch.testing.assert_close(kept[0][3], x0, rtol=1e-4, atol=1e-4)
    assert not torch.equal(kept[0][2], kept[1][2])  # separate tensors, not one that is overwritten


def test_the_schedule_may_be_an_array_or_an_object_with_one():
    from monai.networks.schedulers import DDIMScheduler as MonaiScheduler

    x_T = torch.randn(1, *SHAPE)
    betas = np.linspace(0.001, 0.02, 400)
    expected = sample(network, x_T, schedule=betas, num_inference_steps=8)
    settings = {"num_train_timesteps": 400, "beta_start": 0.001, "beta_end": 0.02}
    monai = MonaiScheduler(schedule="linear_beta", clip_sample=False, **settings)
    for same in (torch.from_numpy(betas), betas.tolist(), np.cumprod(1 - betas), DDIMScheduler(**settings), monai):
        torch.testing.assert_close(
            sample(network, x_T, schedule=same, num_inference_steps=8), expected, rtol=1e-4, atol=1e-4
        )
    assert (sample(network, x_T, num_inference_steps=8) - expected).abs().max() > 0.01
    # A constant array is betas: alphas_cumprod would decrease.
    np.testing.assert_allclose(Schedule.of([0.5] * 3).alphas_cumprod, [0.5, 0.25, 0.125])
    for wrong in (np.ones(5), betas[None], [0.1, 0.3, 0.2], [0.3, 0.2, 0.2], [0.5]):
        with pytest.raises(ConfigError, match="schedule"):
            sample(network, x_T, schedule=wrong)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"solver": "dpmpp2m"}, "did you mean 'dpmpp_2m"),
        ({"num_inference_steps": 1001}, "use 1 to 1000"),
        ({"solver": "euler_flow"}, "the sign differs between projects"),
        ({"solver": "euler_flow", "prediction": "epsilon"}, "velocity.*not epsilon"),
        ({"prediction": "velocity"}, "predict epsilon, v or x0, not velocity"),
        ({"prediction": "epsilom"}, "did you mean 'epsilon'"),
        ({"timestep_spacing": "kerras"}, "did you mean 'karras'"),
        ({"solver": object()}, "object is not a solver"),
        ({"solver": "DPM++ 2M SDE"}, "did you mean 'dpmpp_2m_sde'"),
        ({"solver": DDIMScheduler}, "DDIMScheduler is a class"),
        ({"solver": DDIMScheduler(), "num_inference_steps": 0}, "positive integer, got 0"),
        ({"solver": DDIMScheduler(), "timestep_spacing": "trailing"}, "timestep_spacing " + OWN),
        ({"solver": DDIMScheduler(), "schedule": [0.1, 0.2]}, "schedule " + OWN),
        ({"solver": FlowMatchEulerDiscreteScheduler(), "prediction": "epsilon"}, "is velocity, not epsilon"),
        ({"solver": DDIMScheduler(prediction_type="v_prediction"), "prediction": "epsilon"}, "is v_prediction, not epsilon"),
        ({"seeds": 3}, "a list of integers, one per sample, got int"),
        ({"solver": "ddpm", "seeds": [torch.Generator()]}, "not random generators"),
        ({"schedule": "cosine"}, "got 'cosine'"),
        ({"schedule": 1000}, "got 1000"),
        ({"schedule": [0.5]}, r"got \[0.5\]"),
        ({"model_kwargs": {}}, "use a closure"),
        ({"num_train_timesteps": 300}, "use schedule="),
        ({"generator": None}, r"seeds=\[...\]"),
        ({"callback_on_step_end": None}, "use callback=function"),
        ({"num_infrence_steps": 3}, "did you mean 'num_inference_steps'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)  # fmt: skip
def test_contradictory_arguments_raise_before_any_evaluation(settings, message):
    with pytest.raises(ConfigError, match=message) as caught:
        sample(None, torch.randn(1, 3), **settings)
    assert len(str(caught.value).splitlines()) <= 5


def test_a_flow_scheduler_takes_a_velocity():
    x_T = torch.randn(2, *SHAPE)
    taken = sample(network, x_T, solver=FlowMatchEulerDiscreteScheduler(), num_inference_steps=5)
    named = sample(network, x_T, solver=FlowMatchEulerDiscreteScheduler(), num_inference_steps=5, prediction="velocity")
    assert torch.equal(taken, named)
    ours = sample(
        network, x_T, solver="euler_flow", num_inference_steps=5, prediction="velocity", timestep_spacing="linspace"
    )
    torch.testing.assert_close(taken, ours, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("solver", [*SOLVERS, DDIMScheduler(timestep_spacing="trailing"), UniPCMultistepScheduler()])
def test_a_denoiser_and_a_callback_may_write_to_x(solver):
    """What a denoiser writes to its input changes neither x_T nor the sample; what a callback writes changes the sample."""

    def writes(x, t):
        output = network(x, t)
        x[:, 0] = 7.0
        return output

    x_T = start_noise(SHAPE, [1, 2])
    settings = {"solver": solver, "prediction": prediction(solver), "seeds": [1, 2], "num_inference_steps": 4}
    kept, expected = x_T.clone(), sample(network, x_T, **settings)
    assert torch.equal(sample(writes, x_T, **settings), expected) and torch.equal(x_T, kept)

    def scale(i, t, x, x0):
        if i == 1:
            x.mul_(1.01)

    changed = sample(network, x_T, callback=scale, **settings)
    assert (changed - expected).abs().max() > 1e-3
    with pytest.raises(ConfigError, match="the callback returned a Tensor"):
        sample(network, x_T, callback=lambda i, t, x, x0: x, **settings)


@pytest.mark.parametrize("beta_schedule", ["linear", "squaredcos_cap_v2", "scaled_linear"])
def test_the_advice_for_zero_terminal_snr_works(beta_schedule):
    table = (
        DDIMScheduler(beta_schedule=beta_schedule, rescale_betas_zero_snr=True).alphas_cumprod.double().numpy().copy()
    )
    table[-1] = 0.0
    with pytest.raises(ConfigError, match="half of that before") as caught:
        sample(network, torch.randn(1, 3), schedule=table, prediction="v")
    table[-1] = float(caught.value.fix.rpartition(" ")[2])
    assert sample(network, torch.randn(1, 3), schedule=table, prediction="v").isfinite().all()


def test_a_number_without_a_batch_is_refused():
    with pytest.raises(ConfigError, match="batch dimension"):
        sample(network, torch.tensor(1.0))


def test_an_invalid_network_output_raises():
    with pytest.raises(NonFiniteError, match="NaN"):
        sample(lambda x, t: x * float("nan"), torch.randn(1, 3))
    with pytest.raises(ConfigError, match=r"(?s)shaped like x, \(1, 3\); it returned \(1, 6\).*chunk\(2, dim=1\)\[0\]"):
        sample(lambda x, t: torch.cat([x, x], 1), torch.randn(1, 3))
    with pytest.raises(ConfigError, match=r"(?s)returned a tuple.*output\[0\]"):
        sample(lambda x, t: (x,), torch.randn(1, 3))
    with pytest.raises(ConfigError, match="MONAI.*solver='ddim', schedule=scheduler"):
        from monai.networks.schedulers import DDPMScheduler

        sample(network, torch.randn(1, 3), solver=DDPMScheduler())


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("EulerDiscreteScheduler", {"beta_schedule": "scaled_linear"}),
        ("HeunDiscreteScheduler", {}),
        ("PNDMScheduler", {}),
        ("DEISMultistepScheduler", {}),
        ("DPMSolverSinglestepScheduler", {}),
        ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
        ("EulerAncestralDiscreteScheduler", {}),
    ],
)
def test_any_diffusers_scheduler_equals_a_loop_written_out(name, settings):
    import diffusers

    scheduler = getattr(diffusers, name)(**settings)
    before = copy.deepcopy(scheduler.__dict__)
    seeds = [3, 4]
    start = start_noise(SHAPE, seeds)
    got = sample(network, start, solver=scheduler, num_inference_steps=9, seeds=seeds)
    assert str(scheduler.__dict__) == str(before)
    by_hand = copy.deepcopy(scheduler)
    by_hand.set_timesteps(9)
    x = start * getattr(by_hand, "init_noise_sigma", 1)
    extra = {"generator": [generator(seed, "step") for seed in seeds]} if "Ancestral" in name else {}
    for t in by_hand.timesteps:
        seen = by_hand.scale_model_input(x, t) if hasattr(by_hand, "scale_model_input") else x
        x = by_hand.step(network(seen, t.expand(2)), t, x, **extra).prev_sample
    torch.testing.assert_close(got, x)
    alone = sample(network, start[1:], solver=scheduler, num_inference_steps=9, seeds=seeds[1:])
    torch.testing.assert_close(alone[0], got[1], rtol=0, atol=1e-6)
    if extra:
        other = sample(network, start, solver=scheduler, num_inference_steps=9, seeds=[3, 5])
        assert torch.equal(other[0], got[0]) and not torch.equal(other[1], got[1])


def test_a_scheduler_and_the_solver_agree_and_a_contradiction_raises():
    from diffusers import DPMSolverMultistepScheduler

    ours = {"beta_start": 0.0015, "beta_end": 0.0195, "beta_schedule": "scaled_linear", "use_karras_sigmas": True}
    scheduler = DPMSolverMultistepScheduler(**ours, prediction_type="v_prediction")
    x_T = torch.randn(2, *SHAPE)
    theirs = sample(network, x_T, solver=scheduler)
    torch.testing.assert_close(sample(network, x_T, prediction="v"), theirs, rtol=1e-4, atol=1e-4)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(sample(network, x_T, prediction="epsilon"), theirs, rtol=0.1, atol=0.1)
    with pytest.raises(ConfigError, match="is v_prediction, not x0"):
        sample(network, x_T, solver=scheduler, prediction="x0")


class Recorder(TorchDispatchMode):
    """The names of the operators that are executed."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


SYNCHRONIZING = {"_local_scalar_dense", "item", "nonzero", "equal", "is_nonzero", "masked_select"}


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_evaluation_launches_the_same_operators_without_synchronization(solver):
    """The condition for capture in a CUDA graph, which first and last steps of lower order meet too."""
    plan = get_solver(solver).plan(Schedule.of(), 6, prediction=prediction(solver))
    trajectory = Trajectory(plan, start_noise(SHAPE, [1, 2]), [1, 2], static=True)
    sequences = []
    for i in range(len(trajectory)):
        trajectory.draw_noise(i)
        with Recorder() as recorder:
            trajectory.advance(network)
        sequences.append(recorder.names)
    assert len(sequences[0]) > 5 and all(sequence == sequences[0] for sequence in sequences)
    assert not SYNCHRONIZING & set(sequences[0])
    with Recorder() as recorder:  # negative control
        trajectory.x.sum().item()
    assert SYNCHRONIZING & set(recorder.names)


@pytest.mark.parametrize("solver", SOLVERS)
def test_static_buffers_keep_their_addresses_and_give_the_same_bits(solver):
    plan = get_solver(solver).plan(Schedule.of(), 6, prediction=prediction(solver))
    trajectory = Trajectory(plan, start_noise(SHAPE, [1, 2]), [1, 2], static=True)
    buffers = [trajectory.x, trajectory.x0, trajectory.index, *trajectory.state, trajectory.noise]
    addresses = [tensor.data_ptr() for tensor in buffers if tensor is not None]
    results = []
    for seeds in ([1, 2], [3, 4]):
        trajectory.start(start_noise(SHAPE, seeds), seeds)
        results.append(run_trajectory(trajectory, lambda _: trajectory.advance(network), progress=False))
        assert torch.equal(results[-1], draw(solver, seeds))
        assert trajectory.index.item() == len(plan)
    now = [trajectory.x, trajectory.x0, trajectory.index, *trajectory.state, trajectory.noise]
    assert [tensor.data_ptr() for tensor in now if tensor is not None] == addresses
    assert not torch.equal(*results)  # the first result is a copy, not the buffer


@pytest.mark.parametrize("solver", ["dpmpp_2m_sde", "unipc", "heun_flow"])
def test_a_step_compiles_without_graph_breaks(solver):
    plan = get_solver(solver).plan(Schedule.of(), 6, prediction=prediction(solver))
    x, output, noise = torch.randn(3, 2, 5)
    inputs = (x, output, torch.tensor(plan.coefficients[2]).float(), noise, tuple(torch.randn(len(plan.memory), 2, 5)))
    compiled = torch.compile(plan.step, fullgraph=True, backend="eager")(*inputs)
    torch.testing.assert_close(compiled.x, plan.step(*inputs).x)


def test_noise_is_drawn_only_for_steps_that_add_it():
    """The last step adds none, and a deterministic plan has no buffer for it."""
    plan = get_solver("ddpm").plan(Schedule.of(), 3)
    assert plan.noise_scale[-1] == 0 and (plan.noise_scale[:-1] > 0).all()
    trajectory = Trajectory(plan, torch.zeros(1, *SHAPE), [9])
    run_trajectory(trajectory, lambda _: trajectory.advance(network), progress=False)
    source = generator(9, "step")
    expected = [torch.randn(SHAPE, generator=source) for _ in range(2)]
    assert torch.equal(trajectory.noise[0], expected[-1])
    assert Trajectory(Ddim().plan(Schedule.of(), 3), torch.zeros(1, *SHAPE)).noise is None


def test_static_mode_does_not_write_to_the_callers_tensor():
    x_T = torch.randn(1, *SHAPE)
    kept = x_T.clone()
    trajectory = Trajectory(get_solver("unipc").plan(Schedule.of(), 4), x_T, static=True)
    run_trajectory(trajectory, lambda _: trajectory.advance(network), progress=False)
    assert torch.equal(x_T, kept)
