"""What FastSampler refuses and how it says so, its estimate of memory, and what importing it takes."""

from __future__ import annotations

import subprocess
import sys
import weakref

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


BAD = [
    ({"text": torch.zeros(1, TOKENS, WIDTH + 1)}, "17 wide, the model takes 16"),
    ({"text": torch.zeros(1, TOKENS + 1, WIDTH)}, "7 positions, the model was trained with 6"),
    ({"text": torch.full((1, TOKENS, WIDTH), torch.nan)}, "not finite"),
    ({"text": torch.zeros(1, TOKENS, WIDTH), "reports": ["a"]}, "both reports and text"),
    ({"reports": "a report"}, "not a list of texts"),
    ({"reports": []}, "not a list of texts"),
    ({"reports": ["a"], "seeds": 5}, "5 is not a list of integers"),
    ({"reports": ["a"], "seeds": [0.5]}, "not a list of integers"),
    ({"reports": ["a"], "latent_shape": (4, 8.0, 8, 4)}, "not a list of integers"),
    ({"reports": ["a"], "num_steps": "5"}, "5 steps are not possible"),
    ({"reports": ["a"], "spacing": 1.0}, r"a spacing of \[1.0\] mm"),
    ({}, "needs a report"),
    ({"reports": ["a"], "solver": "dpm_2m"}, "did you mean 'dpmpp_2m'"),
    ({"reports": ["a"], "num_steps": 1001}, "1001 steps are not possible"),
    ({"reports": ["a"], "latent_shape": (4, 8, 7, 4)}, r"not divisible by 2(.|\n)*use \[8, 8, 4\]"),
    ({"reports": ["a"], "latent_shape": (5, 8, 8, 4)}, "not the shape of a latent"),
    ({"reports": ["a"], "spacing": [1, 2, -1]}, "spacing"),
    ({"reports": ["a", "b"], "seeds": [1, 2, 3]}, "do not go together"),
    ({"reports": ["a"], "seeds": []}, "no volume"),
    ({"reports": ["a"], "pirads": "pos"}, "predicts the class"),
    ({"reports": ["a"], "class_override": "maybe"}, "no class 'maybe'"),
    ({"reports": ["a"], "guidance_scale": -1}, "guidance scale of -1"),
    ({"reports": ["a"], "guidance_scale": 2, "guidance_interval": (0.8, 0.2)}, "no interval"),
    ({"reports": ["a"], "reuse": Reuse(2, 4)}, "4 is not a possible depth"),
    ({"reports": ["a"], "batch_size": 0}, "batch of 0"),
]  # fmt: skip


@pytest.mark.parametrize(("request_", "message"), BAD)
def test_bad_input_is_named_with_its_remedy(sampler, request_, message):
    with pytest.raises(ConfigError, match=message) as caught:
        sampler(**request_)
    assert caught.value.fix and len(str(caught.value).splitlines()) <= 5


def test_other_objects_and_dtypes_are_refused(sampler):
    for wrong in ({"model": torch.nn.Linear(1, 1)}, {"dtype": "bf16"}, {"dtype": "float16"}, {"scale_factor": 0.0}):
        with pytest.raises(ConfigError):
            FastSampler(**({"model": build_model(make_config(TINY))} | wrong))
    with pytest.raises(ConfigError, match="a Linear is no autoencoder"):
        FastSampler(sampler.model, torch.nn.Linear(1, 1))
    with pytest.raises(ConfigError, match="no autoencoder"):
        FastSampler(sampler.model)(text=torch.zeros(1, TOKENS, WIDTH))


def test_nan_is_an_error(checkpoint):
    sampler = make(checkpoint)
    with torch.no_grad():
        sampler.model.unet.out[0].weight.fill_(torch.nan)
    with pytest.raises(NonFiniteError, match="diverged"):
        sampler(reports=["abc"], num_steps=2)


# ---- memory ----


class PeakBytes(TorchDispatchMode):
    """The largest sum of the storages that live at one time."""

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


def test_the_estimate_holds_the_peak_of_the_activations():
    model = build_model("MAISI", num_channels=[32, 64], attention_levels=[False, True], num_head_channels=[0, 32],
                        num_res_blocks=2).requires_grad_(False)  # fmt: skip
    conditioning = model.condition(torch.tensor([5]), spacing=torch.ones(1, 3))
    for dtype in (torch.float32, torch.bfloat16):
        model, grid = model.to(dtype), [16, 16, 16]
        with PeakBytes() as counted, torch.no_grad():
            model.denoise(torch.zeros(1, 4, *grid), conditioning)
        estimate = memory.activation_bytes(model.config, 1, grid, dtype)
        assert 0.9 * counted.peak < estimate < 2.5 * counted.peak, (estimate, counted.peak)


def test_too_little_memory_is_said_beforehand_and_afterwards(sampler, monkeypatch):
    with pytest.raises(ConfigError, match="needs about .* GiB beside the weights") as caught:
        sampler(reports=["abc"], num_steps=2, latent_shape=(4, 4096, 4096, 4096), decode=False)
    assert all(remedy in caught.value.fix for remedy in ("batch_size", "bfloat16", "latent_shape"))

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(sampler, "_denoise", full)
    with pytest.raises(ConfigError, match="memory is used up"):
        sampler(reports=["abc"], num_steps=2)


def test_the_table_s_estimate_is_what_a_model_keeps(sampler):
    rows, steps = 3, 4
    text, spacing = torch.zeros(rows * steps, TOKENS, WIDTH), torch.ones(rows * steps, 3)
    kept = sampler.model.condition(torch.arange(rows * steps), spacing=spacing, text=text).keys_values
    found = memory.table_bytes(sampler.model.config, rows, steps, torch.float32)
    assert found == sum(each.nbytes for pair in kept for each in pair) > 0


def test_the_cpu_s_allocator_is_understood_and_other_errors_stay():
    with (
        pytest.raises(ConfigError, match="decoding: this machine's memory is used up"),
        memory.out_of_memory("decoding"),
    ):
        torch.empty(2**50, dtype=torch.uint8)  # more than an address space holds
    with pytest.raises(RuntimeError, match="must match"), memory.out_of_memory("decoding"):
        torch.zeros(2) + torch.zeros(3)


def test_a_long_report_is_named_by_its_number_alone(checkpoint, caplog):
    class Short(FakeEncoder):
        def encode(self, reports):
            encoded = super().encode(reports)
            encoded.truncated = [len(report) > 3 for report in reports]
            return encoded

    sampler = FastSampler.from_checkpoint(checkpoint, device="cpu", dtype="float32", text_encoder=Short())
    sampler(reports=["abc", "ab", "a secret", "abc"], num_steps=1, decode=False)
    (warned,) = [record.getMessage() for record in caplog.records if "longer" in record.getMessage()]
    assert warned.startswith(f"report 3 is longer than {TOKENS} tokens") and "secret" not in caplog.text


def test_a_sampler_works_again_after_it_was_stopped(checkpoint, monkeypatch):
    sampler, request = make(checkpoint), {"reports": ["abc"], "seeds": [1], "num_steps": 4, "decode": False}
    whole = sampler(**request).latents

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    other = make(checkpoint)
    with monkeypatch.context() as patch, pytest.raises(ConfigError, match="memory is used up"):
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
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr[-2000:]
