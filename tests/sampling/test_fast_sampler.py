"""FastSampler compared with loops written out here: optimizations, guidance, class override, reuse, captured steps."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils._pytree import tree_leaves

from ccella_fast import FastSampler, load_checkpoint
from ccella_fast.checkpoint import export_reference
from ccella_fast.config import make_config
from ccella_fast.diffusion.noise import generator
from ccella_fast.errors import CheckpointError, ConfigError
from ccella_fast.models import build_model
from ccella_fast.models.autoencoder import Autoencoder
from ccella_fast.sampling import Optimizations, Reuse, denoising
from ccella_fast.sampling.conditioning import ConditioningCache
from ccella_fast.sampling.denoising import DenoisingLoop
from ccella_fast.sampling.guidance import Guidance, StepKind, step_kinds
from ccella_fast.sampling.onednn_prepack import PackedConvolution, can_pack
from ccella_fast.sampling.prompts import PromptRows
from sampling_fixtures import TINY, TOKENS, WIDTH, FakeEncoder, scrambled, write_checkpoint

STEPS = 6


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("run") / "step")


@pytest.fixture(scope="module")
def sampler(checkpoint):
    return make(checkpoint)


def make(checkpoint, **options) -> FastSampler:
    given = {"device": "cpu", "dtype": "float32", "text_encoder": FakeEncoder()} | options
    return FastSampler.from_checkpoint(checkpoint, **given)


def text(*lengths: int) -> torch.Tensor:
    return torch.from_numpy(FakeEncoder().encode(["a" * length for length in lengths]).features)


def ddim(predict, seed: int, steps: int = STEPS) -> torch.Tensor:
    """DDIM with the schedule of diffusers and the network predict(x, t), in float64."""
    from diffusers import DDIMScheduler

    timesteps = torch.linspace(0, 999, steps).round().long().flip(0)
    scheduler = DDIMScheduler(beta_start=0.0015, beta_end=0.0195, beta_schedule="scaled_linear", clip_sample=False)
    abar = scheduler.alphas_cumprod.double()
    x = torch.randn(1, 4, 8, 6, 4, generator=generator(seed, "start"))
    with torch.no_grad():
        for t, after in zip(timesteps, [*timesteps[1:], None], strict=True):
            a, b = abar[t], abar[after] if after is not None else torch.tensor(1.0, dtype=torch.float64)
            eps = predict(x, t[None]).double()
            x = (b.sqrt() * (x - (1 - a).sqrt() * eps) / a.sqrt() + (1 - b).sqrt() * eps).float()
    return x


def error(got: torch.Tensor, truth: torch.Tensor) -> float:
    """The relative error in the 2-norm; single voxels of a random network's samples amplify rounding a hundredfold."""
    return float((got - truth).norm() / truth.norm())


# ---- equal to the eager baseline ----


def test_each_optimization_alone_changes_only_rounding(checkpoint):
    request = {"reports": ["abc", "d", "abc"], "seeds": [5, 6, 7], "num_inference_steps": STEPS, "batch_size": 2}
    plain = make(checkpoint, optimizations=Optimizations.off())(**request)
    for name in ("precompute_conditioning", "channels_last", "phase_upsampler"):
        got = make(checkpoint, optimizations=replace(Optimizations.off(), **{name: True}))(**request)
        # Sums are accumulated in another order: in larger batches, in another layout, as sums of taps.
        assert error(got.latents, plain.latents) < 2e-5, name
        torch.testing.assert_close(got.class_probabilities, plain.class_probabilities, atol=1e-5, rtol=0)
    assert error(plain.latents[0], plain.latents[1]) > 0.1


def test_precomputed_conditioning_is_exact(checkpoint):
    """Bit-equal for calls of equal shape; larger batches through the adapter only accumulate in another order."""
    request = {"reports": ["abc", "d"], "num_inference_steps": STEPS, "guidance_scale": 2.0, "batch_invariant": True}
    precomputed, plain = (
        make(checkpoint, optimizations=replace(Optimizations.off(), precompute_conditioning=on)) for on in (True, False)
    )
    assert torch.equal(precomputed(**request).latents, plain(**request).latents)
    timesteps, prompts = torch.tensor([999, 500, 3]), PromptRows(text(3), torch.ones(1, 3), None, False, (0,))
    cache = ConditioningCache(precomputed.model, timesteps)
    cache.set_prompts(prompts)
    cache.prepare(0)
    for i, t in enumerate(timesteps):
        got, truth = cache.at(torch.tensor([i])), prompts.condition(plain.model, t[None])
        for one, other in zip(tree_leaves(got[:2]), tree_leaves(truth[:2]), strict=True):
            assert error(one, other) < 1e-6


def test_a_single_prompt_is_stored_so_that_no_step_copies_its_shifts(checkpoint):
    model, timesteps = make(checkpoint).model, torch.tensor([999, 3])
    values = []
    for batch_size in (1, 3):
        cache = ConditioningCache(model, timesteps, batch_size=batch_size)
        cache.set_prompts(PromptRows(text(3), torch.ones(1, 3), None, False, (0,)))
        cache.prepare(0)
        shifts, keys_values, _ = denoising._first_rows(cache.at(torch.tensor([1])), batch_size)
        assert all(len(each) == batch_size and each.is_contiguous() for each in shifts)
        assert all(torch.equal(each, each[:1].expand_as(each)) for each in shifts)
        assert all(each.stride(0) == 0 or batch_size == 1 for pair in keys_values for each in pair)
        values.append(torch.cat([each[0] for each in shifts]))
    assert torch.equal(*values) and values[0].any()


def test_the_size_of_the_window_changes_only_rounding(checkpoint, monkeypatch):
    request = {
        "reports": ["abc", "d"],
        "seeds": [5],
        "num_inference_steps": STEPS,
        "batch_size": 2,
        "solver": "dpmpp_2m",
    }
    fills = []
    fill = ConditioningCache._fill
    monkeypatch.setattr(ConditioningCache, "_fill", lambda cache, first: fills.append(first) or fill(cache, first))
    whole = make(checkpoint)(**request)
    assert fills == [0]
    small = lambda *args, **options: ConditioningCache(*args, **options, max_bytes=20_000)  # noqa: E731
    monkeypatch.setattr(denoising, "ConditioningCache", small)
    windowed = make(checkpoint)(**request)
    assert fills[1:] == [0, 4]
    assert error(windowed.latents, whole.latents) < 2e-5
    torch.testing.assert_close(windowed.class_probabilities, whole.class_probabilities)


def test_the_adapter_runs_once_per_report(checkpoint):
    sampler, rows = make(checkpoint), []
    sampler.model.ella.register_forward_hook(lambda module, given, result: rows.append(len(given[1])))
    sampler(reports=["abc"], seeds=[1, 2, 3], num_inference_steps=STEPS, batch_size=2)
    assert sum(rows) == 2 * STEPS  # once for the batch of two, once for the remaining volume
    rows.clear()
    sampler(reports=["abc"], seeds=range(4), num_inference_steps=STEPS, batch_size=2)
    assert sum(rows) == 0  # the cache of the last call is still valid


def test_guidance_is_null_plus_scale_times_the_difference(checkpoint, sampler):
    model = load_checkpoint(checkpoint).model
    spacing = torch.tensor([[150.0, 150.0, 300.0]])

    def predict(x, t):
        conditional, null = (model(x, t, spacing=spacing, text=features).noise for features in (text(3), text(0)))
        inside = 200 <= t <= 700
        return null + 2.5 * (conditional - null) if inside else conditional

    guided = {"guidance_scale": 2.5, "guidance_interval": (0.2, 0.7), "num_inference_steps": STEPS}
    got = sampler(reports=["abc"], seeds=[4], **guided).latents
    assert error(got, ddim(predict, 4)) < 5e-5
    same = sampler(text=text(3), seeds=[4], null_text=text(0), **guided).latents
    assert torch.equal(got, same)
    in_batch = sampler(reports=["abc", "a"], seeds=[4, 9], batch_size=2, **guided).latents
    assert error(in_batch[:1], got) < 5e-5
    without = sampler(reports=["abc"], seeds=[4], num_inference_steps=STEPS).latents
    assert (without - got).abs().max() > 0.01
    assert torch.equal(
        sampler(reports=["abc"], seeds=[4], num_inference_steps=STEPS, guidance_scale=1.0).latents, without
    )


def test_class_override_replaces_the_predicted_class(checkpoint, sampler):
    model = load_checkpoint(checkpoint).model

    def predict(x, t):
        spacing, pirads = torch.tensor([[150.0, 150.0, 300.0]]), torch.tensor([[0.0, 100.0]])
        return model.denoise(x, model.condition(t, spacing=spacing, text=text(3), pirads=pirads, override_class=True))

    got = sampler(reports=["abc"], seeds=[4], num_inference_steps=STEPS, class_override="pos")
    assert error(got.latents, ddim(predict, 4)) < 5e-5
    free, neg = (
        sampler(reports=["abc"], seeds=[4], num_inference_steps=STEPS, class_override=name).latents
        for name in (None, "neg")
    )
    assert (free - got.latents).abs().max() > 1e-3 < (neg - got.latents).abs().max()


def test_every_volume_has_its_own_class_override(checkpoint, sampler):
    """Two volumes with the same noise and report equal those of two requests with one class each."""
    alone = [
        sampler(reports=["abc"], seeds=[4], num_inference_steps=STEPS, class_override=name).latents
        for name in ("neg", "pos")
    ]
    together = sampler(reports=["abc"], seeds=[4, 4], num_inference_steps=STEPS, class_override=["neg", "pos"])
    assert error(together.latents, torch.cat(alone)) < 5e-5
    assert error(together.latents.flip(0), torch.cat(alone)) > 1e-3
    reversed_classes = sampler(reports=["abc"], seeds=[4, 4], num_inference_steps=STEPS, class_override=["pos", "neg"])
    assert error(reversed_classes.latents, torch.cat(alone[::-1])) < 5e-5


def test_a_diffusers_scheduler_is_a_solver(sampler):
    from diffusers import DDIMScheduler

    settings = {"beta_start": 0.0015, "beta_end": 0.0195, "beta_schedule": "scaled_linear", "clip_sample": False}
    scheduler = DDIMScheduler(**settings, timestep_spacing="trailing")
    request = {"reports": ["abc", "d"], "seeds": [4], "num_inference_steps": 5}
    theirs = sampler(solver=scheduler, **request).latents
    ours = sampler(solver="ddim", timestep_spacing="trailing", **request).latents
    assert error(theirs, ours) < 5e-5


# ---- feature reuse ----


def test_reuse_equals_the_whole_network_with_its_deep_feature_replaced(checkpoint, sampler):
    """Compared with the plain model with a hook in the up path: TINY has two levels with two up blocks each."""
    loaded = load_checkpoint(checkpoint).model
    spacing, kept, count = torch.tensor([[150.0, 150.0, 300.0]]), {}, 0
    block, feature = (
        loaded.unet.up_blocks[1].resnets[0],
        16,
    )  # depth 2: the finest level, with 16 channels from the coarser one

    def replace(module, given):
        if count % 2 == 0:
            kept["deep"] = given[0][:, :feature].clone()
        return torch.cat([kept["deep"], given[0][:, feature:]], 1), *given[1:]

    block.register_forward_pre_hook(replace)

    def predict(x, t):
        nonlocal count
        noise = loaded(x, t, spacing=spacing, text=text(3)).noise
        count += 1
        return noise

    got = sampler(reports=["abc"], seeds=[4], num_inference_steps=STEPS, reuse=Reuse(interval=2, depth=2)).latents
    assert error(got, ddim(predict, 4)) < 5e-5
    exact = sampler(reports=["abc"], seeds=[4], num_inference_steps=STEPS).latents
    assert (got - exact).abs().max() > 1e-3
    for depth in (1, 2, 3):
        every = sampler(
            reports=["abc"], seeds=[4], num_inference_steps=STEPS, reuse=Reuse(interval=1, depth=depth)
        ).latents
        assert torch.equal(every, exact)
    assert torch.isfinite(
        sampler(reports=["abc"], seeds=[4], num_inference_steps=STEPS, reuse=Reuse(3, 3)).latents
    ).all()


def test_text_free_models_reuse_features_too(tmp_path):
    sampler = make(write_checkpoint(tmp_path / "step", "MAISI"), text_encoder=None)
    exact = sampler(seeds=[1], num_inference_steps=STEPS).latents
    assert torch.equal(sampler(seeds=[1], num_inference_steps=STEPS, reuse=Reuse(1, 3)).latents, exact)
    reused = sampler(seeds=[1], num_inference_steps=STEPS, reuse=Reuse(3, 3)).latents
    assert 1e-4 < (reused - exact).abs().max() < exact.abs().max()


@pytest.mark.parametrize("precompute_conditioning", [True, False], ids=["precomputed", "uncached"])
def test_a_request_does_not_depend_on_the_previous_one(precompute_conditioning):
    """One sampler, for requests with and without a class and with texts of different lengths."""
    model = scrambled(build_model(make_config(TINY)))
    text = torch.randn(1, TOKENS + 3, WIDTH, generator=torch.Generator().manual_seed(0))
    requests = [
        {"text": text[:, :TOKENS]} | more for more in ({}, {"class_override": "pos"}, {"class_override": "neg"})
    ]
    requests += [{"text": text}, {"text": text[:, :1]}]
    used, results = (
        FastSampler(
            model, dtype="float32", optimizations=Optimizations(precompute_conditioning=precompute_conditioning)
        ),
        [],
    )
    for request in requests:
        request |= {
            "seeds": [0],
            "num_inference_steps": 3,
            "latent_shape": (4, 8, 8, 4),
            "decode": False,
            "progress": False,
        }
        results.append(used(**request).latents)
        fresh = FastSampler(
            model, dtype="float32", optimizations=Optimizations(precompute_conditioning=precompute_conditioning)
        )
        assert torch.equal(results[-1], fresh(**request).latents)
    assert all(error(one, results[0]) > 1e-3 for one in results[1:])  # they differ, so a confusion would be detected


def test_kinds_of_steps():
    kinds = step_kinds([900, 700, 500, 300, 100], 1000, Guidance(3, (0.2, 0.6)), Reuse(interval=2))
    assert kinds == [
        StepKind(False, "keep"),
        StepKind(False, "reuse"),
        StepKind(True, "keep"),
        StepKind(True, "reuse"),
        StepKind(False, "keep"),
    ]
    assert step_kinds([900, 100], 1000, Guidance(), None) == [StepKind(False, "")] * 2
    # The interval is closed: the default includes the first step, and the last at t = 0.
    assert step_kinds([1000, 500, 0], 1000, Guidance(3), None) == [StepKind(True, "")] * 3
    for times, guided in [([600, 200], True), ([601, 199], False)]:
        assert step_kinds(times, 1000, Guidance(3, (0.2, 0.6)), None) == [StepKind(guided, "")] * 2


# ---- captured steps, without a GPU ----


REUSE_AND_GUIDANCE = {"reuse": Reuse(2, 2), "guidance_scale": 2.0, "guidance_interval": (0.3, 1)}


class Recorder:
    """Replaces a CUDA graph; its replay runs the step again.

    Every tensor that a step writes must keep the address that it had at capture, or a real replay would write elsewhere.
    """

    def __init__(self, loop):
        self.loop, self.captured = loop, 0

    def addresses(self):
        trajectory = self.loop._trajectory
        kept = dict(enumerate([trajectory.x, trajectory.x0, *trajectory.state, trajectory.index]))
        for network in filter(None, (self.loop._network, self.loop._weak)):
            kept |= {(network, guided): feature for guided, feature in network._features.items()}
        return {name: tensor.data_ptr() for name, tensor in kept.items()}

    def __call__(self, step):
        self.captured += 1
        before = self.addresses()

        def replay():
            step()
            assert before.items() <= self.addresses().items()

        return replay


@pytest.mark.parametrize(
    ("extra", "autoguided"),
    [({}, False), (REUSE_AND_GUIDANCE, False), (REUSE_AND_GUIDANCE, True)],
    ids=["plain", "reuse_and_guidance", "reuse_and_autoguidance"],
)
@pytest.mark.parametrize("solver", ["ddpm", "unipc"])
def test_captured_steps_equal_eager_ones(checkpoint, monkeypatch, extra, autoguided, solver):
    weak = load_checkpoint(checkpoint) if autoguided else None
    for parameter in weak.model.parameters() if autoguided else ():
        parameter.detach().mul_(1.1)
    request = {"reports": ["abc", "d"], "num_inference_steps": 9, "solver": solver, "batch_size": 1, **extra}
    eager, recorders = make(checkpoint, autoguidance=weak)(**request), []

    def make_capture(loop, optimizations):
        recorders.append(Recorder(loop))
        return recorders[-1]

    monkeypatch.setattr(DenoisingLoop, "_make_capture", make_capture)
    captured = make(checkpoint, autoguidance=weak)(**request)
    assert torch.equal(captured.latents, eager.latents)
    assert len(recorders) == 1  # the second report replays the steps captured for the first
    assert recorders[0].captured == (1 if not extra else 4)


def test_torch_compile_traces_the_whole_network(checkpoint, sampler, monkeypatch):
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: compiled(f, backend="eager", fullgraph=True, **options))
    request = {"reports": ["abc"], "seeds": [3], "num_inference_steps": 3}
    got = make(checkpoint, optimizations=Optimizations(compile=True))(**request).latents
    assert error(got, sampler(**request).latents) < 2e-5


# ---- reproducible ----


def test_batch_invariant_gives_equal_bits_in_any_batch(checkpoint, sampler):
    request = {"num_inference_steps": STEPS, "batch_invariant": True, "solver": "dpmpp_2m_sde", "guidance_scale": 2.0}
    together = sampler(reports=["abc", "d", "abc", "efgh"], seeds=[4, 5, 6, 7], batch_size=3, **request)
    for row, (report, seed) in enumerate([("abc", 4), ("d", 5), ("abc", 6), ("efgh", 7)]):
        alone = make(checkpoint)(reports=[report], seeds=[seed], **request)
        assert torch.equal(alone.latents[0], together.latents[row])
        assert torch.equal(alone.volumes[0], together.volumes[row])
    assert not torch.equal(together.latents[0], together.latents[2])


def test_iter_yields_the_volumes_in_order(checkpoint, sampler):
    request = {"reports": ["abc", "d", "ef"], "num_inference_steps": 2, "batch_size": 2}
    whole = sampler(**request)
    each = list(sampler.iter(**request))
    assert [(one.index, one.seed) for one in each] == [(0, 0), (1, 1), (2, 2)]
    for row, one in enumerate(each):
        assert torch.equal(one.volume, whole.volumes[row]) and torch.equal(one.latent, whole.latents[row])
    assert torch.equal(torch.tensor([one.class_probabilities for one in each]), whole.class_probabilities)


def test_bfloat16_is_close_to_float32(checkpoint, sampler):
    low = make(checkpoint, dtype="bfloat16")
    assert {parameter.dtype for parameter in low.model.parameters()} == {torch.bfloat16}
    assert low.model.unet.conv_in.conv.weight.is_contiguous(memory_format=torch.channels_last_3d)
    request = {"reports": ["abc"], "seeds": [3], "num_inference_steps": 4}
    exact, rounded = sampler(**request).latents, low(**request).latents
    assert 1e-4 < (exact - rounded).norm() / exact.norm() < 0.1


@pytest.mark.skipif(
    not can_pack(torch.bfloat16, torch.device("cpu")),
    reason="prepacking bf16 weights needs a CPU with AVX-512, and no ONEDNN_MAX_CPU_ISA below AVX512_CORE",
)
def test_prepacked_weights_give_the_same_bits(checkpoint):
    request = {"reports": ["abc", "d"], "num_inference_steps": 4, "batch_size": 2}
    samplers = [
        make(checkpoint, dtype="bfloat16", optimizations=Optimizations(packed_weights=on)) for on in (True, False)
    ]
    packed, plain = (sampler(**request).latents for sampler in samplers)
    assert torch.equal(packed, plain)
    first = samplers[0].model.unet.conv_in.conv
    assert isinstance(first._conv_forward, PackedConvolution) and first._conv_forward._packed.is_mkldnn
    with torch.no_grad():
        first._conv_forward._packed.copy_(torch.zeros_like(first.weight).to_mkldnn())
    assert not torch.equal(samplers[0](**request).latents, plain)  # the prepacked weights are the ones used


# ---- loading and saving ----


def test_the_given_model_is_not_modified(checkpoint):
    loaded = load_checkpoint(checkpoint)
    model = loaded.model.train()
    vae = scrambled(Autoencoder(loaded.config.autoencoder))
    before = {name: (tensor.clone(), tensor.stride()) for name, tensor in model.state_dict().items()}
    for dtype in ("float32", "bfloat16"):
        sampler = FastSampler(model, vae, 0.9, dtype=dtype, config=loaded.config)
        sampler(text=text(3), seeds=[1], num_inference_steps=2)
    assert model.training and all(parameter.requires_grad for parameter in model.parameters())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name][0]) and tensor.stride() == before[name][1]
    shared = FastSampler(model, dtype="float32").model.unet.conv_in.conv.weight
    assert shared.data_ptr() == model.unet.conv_in.conv.weight.data_ptr()


def test_a_model_without_configuration_samples_latents():
    model = scrambled(build_model(make_config(TINY)))
    result = FastSampler(model, dtype="float32")(
        text=torch.randn(2, 9, WIDTH), latent_shape=(4, 4, 6, 2), decode=False, num_inference_steps=3, solver="unipc"
    )
    assert result.latents.shape == (2, 4, 4, 6, 2) and result.volumes is None
    with pytest.raises(ConfigError, match="were not decoded"):
        result.save("nowhere")


def test_a_saved_and_loaded_sampler_generates_the_same_bits(checkpoint, sampler, tmp_path):
    request = {"reports": ["abc"], "seeds": [3], "num_inference_steps": 3}
    sampler.save_pretrained(tmp_path / "saved")
    again = FastSampler.from_pretrained(tmp_path / "saved", device="cpu", dtype="float32", text_encoder=FakeEncoder())
    assert torch.equal(again(**request).volumes, sampler(**request).volumes)
    assert again.scale_factor == sampler.scale_factor and again.intensity_scale == {"t2w": 700.0}
    with pytest.raises(ConfigError, match="already exists"):
        sampler.save_pretrained(tmp_path / "saved")
    file = tmp_path / "saved" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged"):
        FastSampler.from_pretrained(tmp_path / "saved")
    with pytest.raises(CheckpointError, match="download from the hub failed"):
        FastSampler.from_pretrained("nobody/nothing")


def test_a_reference_file_generates_the_same_bits(checkpoint, sampler, tmp_path):
    export_reference(checkpoint, tmp_path / "CCELLA.pt")
    other = FastSampler.from_checkpoint(tmp_path / "CCELLA.pt", device="cpu", dtype="float32")
    request = {"seeds": [3], "num_inference_steps": 3, "solver": "ddim", "latent_shape": (4, 8, 6, 4), "decode": False}
    with pytest.raises(ConfigError, match="6 positions, but the model was trained with 512"):
        other(text=text(3), **request)
    features = text(3).repeat(1, 86, 1)[:, :512]
    bare = FastSampler(load_checkpoint(checkpoint).model, dtype="float32")
    assert torch.equal(other(text=features, **request).latents, bare(text=features, **request).latents)


def test_a_reference_file_takes_the_autoencoder_that_is_given_whatever_its_sizes(checkpoint, tmp_path):
    """A .pt does not say which autoencoder belongs to it, so `export` names that of the checkpoint."""
    export_reference(checkpoint, tmp_path / "CCELLA.pt")
    both = [
        FastSampler.from_checkpoint(path, vae=checkpoint, device="cpu", dtype="float32")
        for path in (tmp_path / "CCELLA.pt", checkpoint)
    ]
    latents = torch.randn(1, 4, 8, 6, 4, generator=torch.Generator().manual_seed(0))
    other, own = (sampler.autoencoder.decode(latents) for sampler in both)
    assert other.shape == (1, 1, 16, 12, 8) and torch.equal(other, own)
    assert both[0].config.autoencoder == both[1].config.autoencoder


def test_save_writes_what_the_command_writes(checkpoint, sampler, tmp_path):
    from ccella_fast.sampling.command import sample_to_folder

    sample_to_folder(
        checkpoint, tmp_path / "command", reports=["abc"], num_samples=2, seed=3, text_encoder=FakeEncoder(),
        device="cpu", dtype="float32", batch_size=1,
    )  # fmt: skip
    result = sampler(reports=["abc"], seeds=[3, 4], batch_size=1)
    paths = result.save(tmp_path / "python")
    assert [path.name for path in paths] == ["sample-000_seed3.nii.gz", "sample-001_seed4.nii.gz"]
    for path in (tmp_path / "python").iterdir():
        assert path.read_bytes() == (tmp_path / "command" / path.name).read_bytes(), path.name
    with pytest.raises(ConfigError, match="another request"):
        sampler(reports=["abc"], seeds=[3, 5], batch_size=1).save(tmp_path / "python")
