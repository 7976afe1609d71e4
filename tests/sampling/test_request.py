"""Errors of FastSampler for invalid requests, its memory estimate, and the modules that importing it loads."""

from __future__ import annotations

import errno
import subprocess
import sys
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ccella_fast import FastSampler
from ccella_fast.config import make_config
from ccella_fast.errors import ConfigError, NonFiniteError
from ccella_fast.models import build_model
from ccella_fast.sampling import Reuse, memory
from sampling_fixtures import TINY, TOKENS, WIDTH, FakeEncoder, write_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("run") / "step")


def make(checkpoint) -> FastSampler:
    return FastSampler.from_checkpoint(checkpoint, device="cpu", dtype="float32", text_encoder=FakeEncoder())


@pytest.fixture(scope="module")
def sampler(checkpoint):
    return make(checkpoint)


INVALID = [
    ({"text": torch.zeros(1, TOKENS, WIDTH + 1)}, "must be 16, as the model was trained, got 17"),
    ({"text": torch.zeros(1, TOKENS + 1, WIDTH)}, "7 positions, but the model was trained with 6"),
    ({"text": torch.full((1, TOKENS, WIDTH), torch.nan)}, "not finite"),
    ({"text": torch.zeros(1, TOKENS, WIDTH), "reports": ["a"]}, "both reports and text"),
    ({"reports": "a report"}, "must be a non-empty list of texts"),
    ({"reports": []}, "must be a non-empty list of texts"),
    ({"reports": ["a"], "seeds": 5}, "seeds must be a list of integers, got 5"),
    ({"reports": ["a"], "seeds": [0.5]}, r"seeds must be a list of integers, got \[0.5\]"),
    ({"reports": ["a"], "latent_shape": (4, 8.0, 8, 4)}, "latent_shape must be a list of integers"),
    ({"reports": ["a"], "num_inference_steps": "5"}, "must be an integer from 1 to 1000, got '5'"),
    ({"reports": ["a"], "spacing": 1.0}, r"three lengths between 0 and 100 mm, got \[1.0\]"),
    ({}, "needs a report"),
    ({"reports": ["a"], "solver": "dpm_2m"}, "did you mean 'dpmpp_2m'"),
    ({"reports": ["a"], "num_inference_steps": 1001}, "must be an integer from 1 to 1000, got 1001"),
    ({"reports": ["a"], "latent_shape": (4, 8, 7, 4)}, r"divisible by 2, got \[8, 7, 4\](.|\n)*use \[8, 8, 4\]"),
    ({"reports": ["a"], "latent_shape": (5, 8, 8, 4)}, r"must be \(4, X, Y, Z\) with sizes of at least 1, got \[5, 8, 8, 4\]"),
    ({"reports": ["a"], "spacing": [1, 2, -1]}, r"spacing must be .* got \[1.0, 2.0, -1.0\]"),
    ({"reports": ["a", "b"], "seeds": [1, 2, 3]}, "must be equal or 1, got 2 and 3"),
    ({"reports": ["a"], "seeds": []}, "number of volumes must be at least 1"),
    ({"reports": ["a"], "pirads": "pos"}, "predicts the class"),
    ({"reports": ["a"], "class_override": "maybe"}, "PI-RADS score from 1 to 5, neg or pos, got 'maybe'"),
    ({"reports": ["a"], "guidance_scale": -1}, "guidance_scale must be at least 0 and below 1000, got -1"),
    ({"reports": ["a"], "guidance_scale": 2, "guidance_interval": (0.8, 0.2)},
     r"increasing fractions between 0 and 1, got \[0.8, 0.2\]"),
    ({"reports": ["a"], "reuse": Reuse(2, 4)}, "4 is not a possible depth"),
    ({"reports": ["a"], "batch_size": 0}, "batch_size must be at least 1, got 0"),
]  # fmt: skip


@pytest.mark.parametrize(("request_", "message"), INVALID, ids=["-".join(given) or "nothing" for given, _ in INVALID])
def test_an_invalid_request_raises_with_a_fix(sampler, request_, message):
    with pytest.raises(ConfigError, match=message) as caught:
        sampler(**request_)
    assert caught.value.fix and len(str(caught.value).splitlines()) <= 5


def test_other_objects_and_dtypes_raise(sampler):
    for wrong in ({"model": torch.nn.Linear(1, 1)}, {"dtype": "bf16"}, {"dtype": "float16"}, {"scale_factor": 0.0}):
        with pytest.raises(ConfigError):
            FastSampler(**({"model": build_model(make_config(TINY))} | wrong))
    with pytest.raises(ConfigError, match="must be an Autoencoder of this package, got an object of type Linear"):
        FastSampler(sampler.model, torch.nn.Linear(1, 1))
    with pytest.raises(ConfigError, match="no autoencoder to decode with"):
        FastSampler(sampler.model)(text=torch.zeros(1, TOKENS, WIDTH))


def test_nan_raises(checkpoint):
    sampler = make(checkpoint)
    with torch.no_grad():
        sampler.model.unet.out[0].weight.fill_(torch.nan)
    with pytest.raises(NonFiniteError, match="diverged"):
        sampler(reports=["abc"], num_inference_steps=2)


# ---- memory ----


class PeakBytes(TorchDispatchMode):
    """The peak of the total size of live storages."""

    def __init__(self):
        super().__init__()
        self.live, self.peak = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.live:
                storage = tensor.untyped_storage()
                key = storage.data_ptr()
                self.live[key] = storage.nbytes()
                weakref.finalize(storage, self.live.pop, key, None)
        self.peak = max(self.peak, sum(self.live.values()))
        return result


def test_the_estimate_bounds_the_peak_of_the_activations():
    model = build_model("MAISI", num_channels=[32, 64], attention_levels=[False, True], num_head_channels=[0, 32],
                        num_res_blocks=2).requires_grad_(False)  # fmt: skip
    conditioning = model.condition(torch.tensor([5]), spacing=torch.ones(1, 3))
    for dtype in (torch.float32, torch.bfloat16):
        model, grid = model.to(dtype), [16, 16, 16]
        with PeakBytes() as counted, torch.no_grad():
            model.denoise(torch.zeros(1, 4, *grid), conditioning)
        estimate = memory.activation_bytes(model.config, 1, grid, dtype)
        assert 0.9 * counted.peak < estimate < 2.5 * counted.peak, (estimate, counted.peak)


def test_too_little_memory_raises_before_and_during_sampling(sampler, monkeypatch):
    with pytest.raises(
        ConfigError, match="needs about .* [GT]iB in addition to the weights, but only .* [MG]iB are free"
    ) as caught:
        sampler(reports=["abc"], num_inference_steps=2, latent_shape=(4, 4096, 4096, 4096), decode=False)
    assert all(remedy in caught.value.fix for remedy in ("batch_size", "bfloat16", "latent_shape"))

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(sampler, "_denoise", full)
    with pytest.raises(ConfigError, match="the GPU is out of memory"):
        sampler(reports=["abc"], num_inference_steps=2)


def failures():
    """What allocators raise: the GPU's, torch's on the CPU, Python's and numpy's, the operating system's, cuDNN's."""
    yield torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), "the GPU"
    for message in ("DefaultCPUAllocator: can't allocate memory: you tried to", "CUDNN_STATUS_ALLOC_FAILED"):
        yield RuntimeError(message), "the machine"
    yield MemoryError(), "the machine"
    yield OSError(errno.ENOMEM, "Cannot allocate memory"), "the machine"


@pytest.mark.parametrize(("failure", "where"), failures())
def test_too_little_memory_for_decoding_is_said_with_what_it_needs(sampler, monkeypatch, failure, where):
    decoder, plans = sampler.autoencoder.decoder, []
    monkeypatch.setattr(decoder, "plan", lambda shape, device: plans.append(shape) or SimpleNamespace(bytes=3 * 2**30))

    def full(*_):
        raise failure

    monkeypatch.setattr(sampler.autoencoder, "decode", full)
    with pytest.raises(ConfigError) as caught:
        sampler(reports=["abc"], num_inference_steps=1)
    assert f"decoding a volume (estimated: 3.00 GiB in addition to the weights): {where} is out of memory" in str(
        caught.value
    )
    assert "bfloat16" in caught.value.fix and len(str(caught.value).splitlines()) <= 5
    assert plans == [(4, 8, 6, 4)]

    def broken(*_):
        raise RuntimeError("shapes must match")

    monkeypatch.setattr(sampler.autoencoder, "decode", broken)
    with pytest.raises(RuntimeError, match="must match"):
        sampler(reports=["abc"], num_inference_steps=1)


def test_the_estimate_of_the_cache_is_the_size_of_the_keys_and_values(sampler):
    rows, steps = 3, 4
    text, spacing = torch.zeros(rows * steps, TOKENS, WIDTH), torch.ones(rows * steps, 3)
    kept = sampler.model.condition(torch.arange(rows * steps), spacing=spacing, text=text).keys_values
    estimate = memory.cache_bytes(sampler.model.config, rows, steps, torch.float32)
    assert estimate == sum(each.nbytes for pair in kept for each in pair) > 0


def test_errors_of_the_cpu_allocator_are_converted_and_others_are_not():
    with (
        pytest.raises(ConfigError, match="decoding: the machine is out of memory"),
        memory.out_of_memory("decoding"),
    ):
        torch.empty(2**50, dtype=torch.uint8)  # larger than the address space
    with pytest.raises(RuntimeError, match="must match"), memory.out_of_memory("decoding"):
        torch.zeros(2) + torch.zeros(3)


@pytest.mark.parametrize(
    ("report", "said"),
    [
        ("Lésion hypointense de la zone périphérique gauche", "report 2 seems to be in French: "),
        ("Hypointense Läsion in der peripheren Zone links", "report 2 seems to be in German: "),
        ("Lesión hipointensa en la zona periférica izquierda", "report 2 seems to be in Spanish: "),
        ("Laesie in de perifere zone links", "report 2 seems to be in Dutch: "),
        ("Lesione nella zona periferica sinistra", "report 2 seems to be in Italian: "),
        ("Lesão na zona periférica esquerda", "report 2 seems to be in Portuguese: "),
        ("前列腺外周带左侧病灶", "report 2 seems to be not in Latin letters: "),
        ("Lesion of 15 mm in the left peripheral zone with low ADC", None),
        ("PI-RADS 5 lesion, left", None),
    ],
)
def test_a_report_that_seems_not_to_be_english_is_named_by_its_number(checkpoint, caplog, report, said):
    """The encoder knows all tokens of these reports, so that only the language can be noticed."""
    sampler = FastSampler.from_checkpoint(checkpoint, device="cpu", dtype="float32", text_encoder=FakeEncoder())
    sampler(reports=["PI-RADS 2", report, report], num_inference_steps=1, decode=False)
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == (said is not None)
    assert said is None or warnings[0].startswith(said)
    assert not set(report.lower().split()) & set(" ".join(warnings).lower().split()) - {"in"}


def test_the_warning_of_a_long_report_contains_only_its_number(checkpoint, caplog):
    class TruncatingEncoder(FakeEncoder):
        def encode(self, reports):
            encoded = super().encode(reports)
            encoded.truncated = [len(report) > 3 for report in reports]
            return encoded

    sampler = FastSampler.from_checkpoint(checkpoint, device="cpu", dtype="float32", text_encoder=TruncatingEncoder())
    sampler(reports=["abc", "ab", "a secret", "abc"], num_inference_steps=1, decode=False)
    (warning,) = [record.getMessage() for record in caplog.records if "longer" in record.getMessage()]
    assert warning.startswith(f"report 3 is longer than {TOKENS} tokens") and "secret" not in caplog.text


def test_a_sampler_works_after_an_out_of_memory_error(checkpoint, monkeypatch):
    sampler, request = make(checkpoint), {"reports": ["abc"], "seeds": [1], "num_inference_steps": 4, "decode": False}
    whole = sampler(**request).latents

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    other = make(checkpoint)
    with monkeypatch.context() as patch, pytest.raises(ConfigError, match="the GPU is out of memory"):
        patch.setattr("ccella_fast.sampling.conditioning.torch.empty", full)
        other(**request)
    assert torch.equal(other(**request).latents, whole)


# ---- import ----


def test_imports_without_dali_deepspeed_and_monai():
    code = (
        "import sys\n"
        "for name in ('nvidia.dali', 'deepspeed', 'monai', 'diffusers', 'xformers', 'triton'): sys.modules[name] = None\n"
        "from ccella_fast import FastSampler, sample\n"
        "from ccella_fast.sampling.command import sample_to_folder\n"
        "print(sorted(name for name in ('transformers', 'nibabel', 'SimpleITK', 'scipy') if name in sys.modules))"
    )
    completed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert completed.stdout.strip() == "[]", completed.stderr[-2000:]
