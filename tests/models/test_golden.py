"""Every variant, the autoencoder and the class loss reproduce the outputs of the reference in golden/reference.json.

The models have their full size. Weights and inputs are drawn as described in that file, from a generator seeded with the CRC of
the name of each tensor.
"""

from __future__ import annotations

import math
import zlib
from collections import Counter

import numpy as np
import pytest
import torch

from ccella_fast.config import AutoencoderConfig
from ccella_fast.kernels.backend import ENVIRONMENT
from ccella_fast.losses import class_loss, focal_terms
from ccella_fast.models import adapter, build_model
from ccella_fast.models.autoencoder import Autoencoder
from ccella_fast.variants import VARIANTS

# Neighbors share weights.
ORDER = sorted(VARIANTS, key=lambda name: (not VARIANTS[name].text, VARIANTS[name].head, name))
TIMESTEPS = torch.tensor([7, 903])


def normal(key, shape):
    """`RandomState(crc32(key)).standard_normal(shape)` in float32.

    The polar method of NumPy, vectorized in blocks, takes a third of the time; the models have many parameters.
    """
    generator = np.random.RandomState(zlib.crc32(key.encode()))
    result, done = np.empty(math.prod(shape), np.float32), 0
    while done < result.size:
        uniform = 2 * generator.random_sample(2 * min(2**13, result.size - done + 8)) - 1
        first, second = uniform[::2], uniform[1::2]
        square = first * first + second * second
        inside = np.flatnonzero((square < 1) & (square > 0))
        square = square[inside]
        factor = np.sqrt(-2 * np.log(square) / square)
        drawn = np.stack([second[inside] * factor, first[inside] * factor], axis=1).reshape(-1)[: result.size - done]
        result[done : done + drawn.size] = drawn
        done += drawn.size
    return torch.from_numpy(result.reshape(tuple(shape)))


def weight(key, shape):
    r = normal(key, shape)
    if key.endswith("bias"):
        return 0.05 * r
    if len(shape) == 1:
        return 1 + 0.05 * r
    return r.mul_((shape[1] if key.endswith("latents") else math.prod(shape[1:])) ** -0.5)


class Models:
    """Draws each tensor once for all variants that use it, and frees it after its last use. Keeps the last model."""

    def __init__(self):
        self.uses = Counter(entry for name in ORDER for entry in shapes(name))
        self.drawn = {}
        self.name = self.model = None

    def load(self, name):
        if name != self.name:
            self.name = self.model = None  # free the memory first
            with torch.device("meta"):
                model = build_model(name)
            model.load_state_dict(self.state_dict(name), assign=True)
            self.name, self.model = name, model.eval().requires_grad_(False)
        return self.model

    def state_dict(self, name):
        result = {}
        for entry in shapes(name):
            key, shape = entry
            if entry not in self.drawn:
                self.drawn[entry] = weight(key, shape)
            result[key] = self.drawn[entry]
            self.uses[entry] -= 1
            if self.uses[entry] <= 0:
                del self.drawn[entry]
        return result


def shapes(name):
    with torch.device("meta"):
        return [(key, tuple(tensor.shape)) for key, tensor in build_model(name).state_dict().items()]


@pytest.fixture(scope="module")
def models():
    return Models()


def inputs(name):
    row = VARIANTS[name]
    text = 0.1 * normal("input:text", (2, 512, 4096)) if row.text else None
    pirads = torch.tensor([[100.0, 0.0], [0.0, 100.0]]) if row.class_input == "given" else None
    spacing = 100 * torch.tensor([[0.5, 0.5, 0.5625], [0.5, 0.5, 0.75]])
    return {"spacing": spacing, "text": text, "pirads": pirads}


def agrees(tensor, expected):
    """Whether a tensor is within rtol 1e-3 and atol 1e-4 of a recorded summary or list of values."""
    actual = tensor.double().numpy()
    if isinstance(expected, list):
        return np.shape(expected) == actual.shape and np.allclose(actual, expected, rtol=1e-3, atol=1e-4)
    samples = actual.reshape(-1)[:: expected["samples_stride"]][:16]
    summary = [actual.mean(), actual.std(), np.abs(actual).max(), *samples]
    recorded = [expected["mean"], expected["std"], expected["abs_max"], *expected["samples"]]
    return list(actual.shape) == expected["shape"] and np.allclose(summary, recorded, rtol=1e-3, atol=1e-4)


def record(model):
    """A dictionary that the next forward pass fills with outputs of the adapter and of the time embedding of the U-Net."""
    outputs = {}
    unet = getattr(model, "unet", model)
    unet.time_embed.register_forward_hook(lambda module, args, output: outputs.update(time_emb=output))
    if hasattr(model, "ella"):
        keys = ("context", "adapter_class_hidden")
        model.ella.register_forward_hook(lambda module, args, output: outputs.update(zip(keys, output, strict=True)))
    return outputs


def test_random_numbers_equal_numpy():
    expected = np.random.RandomState(zlib.crc32(b"key")).standard_normal((300, 501))
    np.testing.assert_allclose(normal("key", (300, 501)).numpy(), expected, rtol=1e-6, atol=1e-7)


# All variants with the default backends, and CCELLA with each backend. The Triton interpreter takes minutes.
OTHER_BACKENDS = {
    "CCELLA": [
        pytest.param("CCELLA", "reference", id="CCELLA-reference"),
        pytest.param("CCELLA", "triton", marks=pytest.mark.slow, id="CCELLA-triton"),
    ]
}
CASES = [
    case for name in ORDER for case in [pytest.param(name, None, id=f"{name}-default"), *OTHER_BACKENDS.get(name, [])]
]


@pytest.mark.parametrize(("name", "backend"), CASES)
def test_variant_reproduces_the_reference(name, backend, models, golden, monkeypatch):
    if backend:
        monkeypatch.setenv(ENVIRONMENT, backend)
    expected = golden["CCELLA" if name == "L1ONLY" else name]
    model = models.load(name)
    outputs = record(model)
    with torch.no_grad():
        output = model(normal("input:x", (2, 4, 16, 16, 8)), TIMESTEPS, **inputs(name))
    outputs |= {"noise_pred": output.noise, "class_logits": output.class_logits}
    assert expected.keys() == {key for key, value in outputs.items() if value is not None}
    for key, value in expected.items():
        assert agrees(outputs[key], value), key


@pytest.fixture(scope="module")
def adapter_weights():
    with torch.device("meta"):
        names = adapter.Adapter(build_model("ELLAMAISI").config).state_dict()
    return {key: weight(f"ella.{key}", tensor.shape) for key, tensor in names.items()}


@pytest.mark.parametrize("mistake", ["sine first", "scale first", "none"])
def test_comparison_detects_a_wrong_adapter(mistake, golden, adapter_weights, monkeypatch):
    """Negative control: two mistakes that do not change shapes. Without them, the same adapter agrees."""
    with torch.device("meta"):
        ella = adapter.Adapter(build_model("ELLAMAISI").config)
    ella.load_state_dict(adapter_weights, assign=True)
    sinusoidal = adapter.sinusoidal
    if mistake == "sine first":
        monkeypatch.setattr(adapter, "sinusoidal", lambda t, width: sinusoidal(t, width).roll(width // 2, dims=1))
    if mistake == "scale first":
        for block in ella.connector.perceiver_blocks:
            for norm in (block.ln_1, block.ln_2, block.ln_ff):
                norm.linear.weight.data = norm.linear.weight.data.roll(768, dims=0)
    with torch.no_grad():
        context, _ = ella(inputs("ELLAMAISI")["text"], TIMESTEPS)
    assert agrees(context, golden["ELLAMAISI"]["context"]) == (mistake == "none")


@pytest.mark.parametrize("activation", [False, True], ids=["right", "last-activation"])
def test_autoencoder_reproduces_the_reference(activation, golden):
    """Negative control: an activation before the last convolution, which most autoencoders have, but not that of MAISI."""
    expected = golden["AUTOENCODER_fp32"]
    vae = Autoencoder(AutoencoderConfig()).eval()
    vae.load_state_dict({key: weight(key, value.shape) for key, value in vae.state_dict().items()})
    vae.encoder.blocks[-2].silu = vae.decoder.blocks[-2].silu = activation
    generator = np.random.RandomState(zlib.crc32(b"input:image"))
    image = torch.from_numpy(generator.random_sample((1, 1, 32, 32, 16)).astype(np.float32))
    with torch.no_grad():
        mean, sigma = vae.encode(image)
        decoded = vae.decode(normal("input:z", (1, 4, 8, 8, 4)))
    for key, tensor in {"mu": mean, "sigma": sigma, "decoded": decoded}.items():
        assert agrees(tensor, expected[key]) != activation, key


def test_class_loss_reproduces_the_reference(golden):
    expected = golden["CLASS_LOSS"]
    logits, target = torch.tensor(expected["logits"]), torch.tensor(expected["pirads_x100"])
    mask = torch.tensor(expected["text_isnull"]) == 0
    assert agrees(focal_terms(logits, target), expected["elementwise"])
    assert class_loss(logits, target, mask).item() == pytest.approx(expected["reduced"], rel=1e-3)
    assert class_loss(logits, target / 100, mask).item() != pytest.approx(expected["reduced"], rel=1e-3)
