"""Training of the autoencoder: it equals a plain loop, and interrupted runs equal uninterrupted ones."""

from __future__ import annotations

import hashlib
import json
import math
import os
import signal
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from ccella_fast.config import VaeTrainingConfig, make_config
from ccella_fast.diffusion.noise import generator
from ccella_fast.errors import CheckpointError, ConfigError, DataError, NonFiniteError, Stopped
from ccella_fast.models.autoencoder import Autoencoder, load_autoencoder
from ccella_fast.storage import sha256, write_json
from ccella_fast.training.autoencoder import loop, run
from ccella_fast.training.autoencoder.checkpointing import identity
from ccella_fast.training.autoencoder.evaluation import evaluate
from ccella_fast.training.autoencoder.loop import learning_rate
from ccella_fast.training.autoencoder.patches import patch_requests, read_images
from ccella_fast.training.autoencoder.run import train_vae
from training_fixtures import IMAGE_GRID as GRID
from training_fixtures import write_images

SETTINGS: dict[str, Any] = {
    "autoencoder.num_channels": [8, 8],
    "autoencoder.num_res_blocks": [1, 1],
    "autoencoder.norm_num_groups": 4,
    "data.dim": list(GRID),
    "vae_training.patch": list(GRID),
    "vae_training.batch_size": 2,
    "vae_training.max_train_steps": 80,
    "vae_training.lr": 5e-3,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_images(tmp_path_factory.mktemp("prepared"))


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("run") / "vae"
    train_vae(data, out, make_config(SETTINGS))
    return out


def metrics(out: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds_per_step"} for line in lines]


# A small network, with patches smaller than the grid. The gradient norm varies around 1 and 2, so that clipping has an effect.
EXACT: dict[str, Any] = SETTINGS | {
    "autoencoder.num_channels": [4, 4],
    "autoencoder.norm_num_groups": 2,
    "vae_training.patch": [8, 8, 8],
    "vae_training.max_train_steps": 44,
    "vae_training.kl_weight": 1e-4,
}
# The values of settings that EXACT does not contain.
DEFAULTS: dict[str, Any] = {
    "seed": 0, "weight_decay": 0.01, "adam_betas": (0.9, 0.95), "eps": 1e-8, "max_grad_norm": 1.0, "log_sigma": -4.0,
    "warmup_fraction": 0.05, "max_warmup_steps": 100, "final_lr_fraction": 0.01,
}  # fmt: skip
# Other values for each setting of the optimizer and the schedule.
CHANGED: dict[str, Any] = {
    "weight_decay": 0.2, "adam_betas": [0.8, 0.98], "max_grad_norm": 2.0, "warmup_fraction": 0.25, "max_warmup_steps": 7,
    "final_lr_fraction": 0.3,
}  # fmt: skip


class PlainRun(NamedTuple):
    """The result of the plain loop."""

    steps: list[tuple[float, float, float, float]]  # L1, KL, learning rate, norm of the gradient before clipping
    begun: dict[str, torch.Tensor]  # initial weights
    weights: dict[str, torch.Tensor]


def plain_training(folder: Path, settings: dict[str, Any], **changed: Any) -> PlainRun:
    """Train in one plain loop, in float64, with AdamW, clipping, losses and learning rate written out.

    It shares the network and `noise.generator` with ccella_fast. Settings are read from the dictionary, not from `Config`.
    """
    s = DEFAULTS | {key.removeprefix("vae_training."): value for key, value in settings.items()} | changed
    cases = json.loads((folder / "manifest.json").read_text())["cases"]
    images = [np.load(folder / case["files"]["image/t2w"]["path"]) for case in cases if case["split"] == "train"]
    torch.manual_seed(generator(s["seed"], "weights").initial_seed())
    vae = Autoencoder(make_config(settings).autoencoder)
    torch.nn.init.constant_(vae.quant_conv_log_sigma.conv.bias, s["log_sigma"])
    parameters = dict(vae.double().named_parameters())
    begun = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    first, second = ({name: torch.zeros_like(p) for name, p in begun.items()} for _ in range(2))
    total, (beta1, beta2), steps = s["max_train_steps"], s["adam_betas"], []
    warm = min(s["max_warmup_steps"], max(1, int(total * s["warmup_fraction"])))
    for k in range(total):
        places, patches, noise = generator(s["seed"], "place", k), [], []
        for row in range(s["batch_size"]):
            epoch, offset = divmod(k * s["batch_size"] + row, len(images))
            order = torch.randperm(len(images), generator=generator(s["seed"], "order", epoch))
            image = images[order[offset]]
            corner = [
                int(torch.randint(n - w + 1, (1,), generator=places))
                for n, w in zip(image.shape, s["patch"], strict=True)
            ]
            patch = image[tuple(slice(c, c + w) for c, w in zip(corner, s["patch"], strict=True))]
            patches.append(torch.from_numpy(patch.astype(np.float64))[None])
            latent = [4, *(w // 2 for w in s["patch"])]
            noise.append(torch.randn(latent, generator=generator(s["seed"], "posterior", k, row)).double())
        x = torch.stack(patches)
        mean, sigma = vae.encode(x)
        l1 = (vae.decode(mean + sigma * torch.stack(noise)) - x).abs().mean()
        kl = 0.5 * (mean**2 + sigma**2 - 1 - 2 * sigma.log()).sum() / len(x)
        gradients = torch.autograd.grad(l1 + s["kl_weight"] * kl, list(parameters.values()))
        norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients))
        final = s["final_lr_fraction"]
        cosine = final + (1 - final) * (1 + math.cos(math.pi * (k - warm) / (total - warm))) / 2
        lr = s["lr"] * ((k + 1) / warm if k < warm else cosine)
        for (name, p), gradient in zip(parameters.items(), gradients, strict=True):
            gradient = gradient * min(1.0, s["max_grad_norm"] / norm)
            first[name] = beta1 * first[name] + (1 - beta1) * gradient
            second[name] = beta2 * second[name] + (1 - beta2) * gradient**2
            step = first[name] / (1 - beta1 ** (k + 1)) / ((second[name] / (1 - beta2 ** (k + 1))).sqrt() + s["eps"])
            p.data = p.data - lr * s["weight_decay"] * p.data - lr * step
        steps.append((l1.item(), kl.item(), lr, norm))
    return PlainRun(steps, begun, {name: p.detach() for name, p in parameters.items()})


def distance(weights: dict[str, torch.Tensor], plain: PlainRun) -> float:
    """The distance between `weights` and those of the plain loop, relative to how far the latter have moved."""
    apart = math.hypot(*(float((weights[name].double() - p).norm()) for name, p in plain.weights.items()))
    return apart / math.hypot(*(float((plain.begun[name] - p).norm()) for name, p in plain.weights.items()))


@pytest.fixture(scope="module")
def exact(data, tmp_path_factory) -> tuple[Path, PlainRun]:
    """A run with the settings EXACT, and the result of the plain loop."""
    out = tmp_path_factory.mktemp("exact") / "vae"
    train_vae(data, out, make_config(EXACT))
    return out, plain_training(data, EXACT)


def test_training_equals_a_plain_loop(exact):
    out, plain = exact
    norms = [norm for *_, norm in plain.steps]
    assert sum(1 < norm < 2 for norm in norms) > 5 and sum(norm > 2 for norm in norms) > 5
    assert distance(load_autoencoder(out).state_dict(), plain) < 1e-3
    lines = {line["step"]: line for line in metrics(out)}
    assert list(lines) == [10, 20, 30, 40, 44]
    for last, part in ((10, plain.steps[:10]), (30, plain.steps[20:30]), (44, plain.steps[40:])):
        l1, kl, *_ = np.mean(part, axis=0)
        expected = {"loss": l1 + 1e-4 * kl, "loss_l1": l1, "loss_kl": kl, "lr": part[-1][2]}
        assert {key: lines[last][key] for key in expected} == pytest.approx(expected, rel=1e-3)


def test_training_with_changed_settings_equals_a_plain_loop(data, tmp_path):
    settings = EXACT | {f"vae_training.{key}": value for key, value in CHANGED.items()}
    train_vae(data, tmp_path / "vae", make_config(settings))
    weights = load_autoencoder(tmp_path / "vae").state_dict()
    assert distance(weights, plain_training(data, settings)) < 1e-3
    for key in ("weight_decay", "max_grad_norm", "warmup_fraction", "max_warmup_steps"):
        assert distance(weights, plain_training(data, settings, **{key: DEFAULTS[key]})) > 1e-2, key


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_grad_norm": 2.0}, {"adam_betas": (0.9, 0.999)}, {"weight_decay": 0.0}, {"log_sigma": -3.9},
        {"max_warmup_steps": 1}, {"final_lr_fraction": 0.0},
    ],
    ids=lambda wrong: next(iter(wrong)),
)  # fmt: skip
def test_a_wrong_setting_is_detected(data, exact, wrong):
    weights = load_autoencoder(exact[0]).state_dict()
    assert distance(weights, plain_training(data, EXACT, **wrong)) > 1e-2


def test_training_reduces_the_reconstruction_error(data, trained):
    record = json.loads((trained / "run_record.json").read_text())
    _, test = read_images(data)
    untrained = evaluate(Autoencoder(make_config(SETTINGS).autoencoder), test, trained.parent, torch.device("cpu"))
    constant = np.abs(test[0].values - np.median(test[0].values)).mean()
    assert record["test"]["volumes"] == 1
    assert record["test"]["l1"] < 0.6 * min(constant, untrained["l1"])
    assert metrics(trained)[-1]["step"] == 80
    assert metrics(trained)[-1]["loss_l1"] < 0.5 * metrics(trained)[0]["loss_l1"]
    assert sorted(path.name for path in trained.iterdir()) == [
        "config.json", "manifest.json", "metrics.jsonl", "model.safetensors", "reconstructions", "run_record.json",
        "training.json",
    ]  # fmt: skip


def test_recorded_errors_are_those_of_the_written_weights(data, trained):
    """The errors are computed again from the files, in float64."""
    record = json.loads((trained / "run_record.json").read_text())["test"]
    image = np.load(data / "images" / "case3" / "t2w.npy").astype(np.float64)
    vae = load_autoencoder(trained).double()
    with torch.no_grad():
        decoded = vae.decode(vae.encode(torch.from_numpy(image)[None, None])[0])[0, 0].clamp(0, 1).numpy()
    assert record["l1"] == pytest.approx(np.abs(decoded - image).mean(), abs=2e-5)
    assert record["psnr"] == pytest.approx(10 * math.log10(1 / ((decoded - image) ** 2).mean()), abs=0.01)
    np.testing.assert_allclose(np.load(trained / "reconstructions" / "case3" / "t2w.npy"), decoded, atol=1e-5)


def test_errors_are_means_over_volumes(data, tmp_path):
    """Compare with mean L1 and mean PSNR in float64. The first four reconstructions are written."""
    images = [image for split in read_images(write_images(tmp_path / "prepared", train=4, test=2)) for image in split]
    images = [image._replace(values=image.values / (1 + number)) for number, image in enumerate(images)]
    torch.manual_seed(0)
    vae = Autoencoder(make_config(SETTINGS).autoencoder)
    measured = evaluate(vae, images, tmp_path / "out", torch.device("cpu"))
    vae.double()
    l1, squares = [], []
    for image in images:
        x = torch.from_numpy(image.values.astype(np.float64))[None, None]
        with torch.no_grad():
            difference = (vae.decode(vae.encode(x)[0]).clamp(0, 1) - x).numpy()
        l1.append(np.abs(difference).mean())
        squares.append((difference**2).mean())
    psnr = [-10 * math.log10(square) for square in squares]
    assert measured["volumes"] == 6
    assert measured["l1"] == pytest.approx(np.mean(l1), abs=2e-5)
    assert measured["psnr"] == pytest.approx(np.mean(psnr), abs=0.01)
    for wrong in (psnr[0], psnr[-1], -10 * math.log10(np.mean(squares))):
        assert measured["psnr"] != pytest.approx(wrong, abs=0.01)
    assert sorted(path.parent.name for path in (tmp_path / "out").rglob("*.npy")) == [f"case{n}" for n in range(4)]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [({}, [20, 40, 45]), ({"vae_training.checkpointing_seconds": 80}, [30, 45])],
    ids=["default", "80-seconds"],
)
def test_the_state_is_saved_at_intervals(data, tmp_path, monkeypatch, changes, expected):
    """Each step advances the clock by 3.5 seconds. The clock is read with the loss, every 10 steps."""
    seconds, saved, save = 0.0, [], loop.save_state

    def step(*_):
        nonlocal seconds
        seconds += 3.5
        return {"l1": torch.zeros(()), "kl": torch.zeros(())}

    def record_save(out, vae, optimizer, done, *rest):
        saved.append(done)
        save(out, vae, optimizer, done, *rest)

    monkeypatch.setattr(loop.time, "monotonic", lambda: seconds)
    monkeypatch.setattr(loop, "train_step", step)
    monkeypatch.setattr(loop, "save_state", record_save)
    train_vae(data, tmp_path / "vae", make_config(SETTINGS | {"vae_training.max_train_steps": 45} | changes))
    assert saved == expected


def test_folders_of_the_first_version_stay_valid(data):
    """The identity is that of the version in which the optimizer did not have settings."""
    config, (train, _) = make_config(SETTINGS), read_images(data)
    network = {
        "in_channels": 1, "out_channels": 1, "latent_channels": 4, "num_channels": [8, 8], "num_res_blocks": [1, 1],
        "norm_num_groups": 4, "norm_eps": 1e-6,
    }  # fmt: skip
    settings = {
        "max_train_steps": 80, "batch_size": 2, "patch": list(GRID), "lr": 5e-3, "kl_weight": 1e-6, "seed": 0,
    }  # fmt: skip
    parts = [network, settings, [image.sha256 for image in train]]
    assert identity(config, train) == hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    same = {"vae_training.checkpointing_seconds": 1}
    assert identity(make_config(SETTINGS | same), train) == identity(config, train)
    different = {f"vae_training.{key}": value for key, value in CHANGED.items()}
    assert len({identity(make_config(SETTINGS | {key: value}), train) for key, value in different.items()}) == len(
        CHANGED
    )
    assert identity(config, train) not in {
        identity(make_config(SETTINGS | {k: v}), train) for k, v in different.items()
    }


def test_an_interrupted_run_reaches_the_same_weights(data, trained, tmp_path, monkeypatch):
    settings = make_config(SETTINGS | {"vae_training.checkpointing_seconds": 0})
    calls = []
    whole = loop.train_step

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 37:
            raise KeyboardInterrupt
        return whole(*arguments)

    monkeypatch.setattr(loop, "train_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_vae(data, tmp_path / "vae", settings)
    assert not (tmp_path / "vae" / "manifest.json").exists()
    with (tmp_path / "vae" / "metrics.jsonl").open("a") as log:
        log.write('{"step": 4')  # an incomplete line
    train_vae(data, tmp_path / "vae", settings)
    assert len(calls) == 37 + 50  # from step 30, the last saved one
    assert metrics(tmp_path / "vae") == metrics(trained)
    expected, got = load_autoencoder(trained).state_dict(), load_autoencoder(tmp_path / "vae").state_dict()
    assert all(torch.equal(expected[name], got[name]) for name in expected)


def test_the_weights_depend_on_the_seed(data, tmp_path):
    few = SETTINGS | {"vae_training.max_train_steps": 2}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train_vae(data, tmp_path / name, make_config(few | {"vae_training.seed": seed}))
    a, b, c = (sha256(tmp_path / name / "model.safetensors") for name in "abc")
    assert a == b
    assert a != c


def test_a_finished_run_is_kept_and_another_raises(data, trained, tmp_path, monkeypatch):
    def never(*_):
        raise AssertionError("trained again")

    monkeypatch.setattr(run, "train_loop", never)
    before = {path: path.stat().st_mtime_ns for path in trained.rglob("*") if path.is_file()}
    train_vae(data, trained, make_config(SETTINGS))
    other_images = write_images(tmp_path, shift=0.1)
    for folder, settings in ((data, {"vae_training.lr": 1e-3}), (other_images, {})):
        with pytest.raises(CheckpointError, match="with other settings or other images"):
            train_vae(folder, trained, make_config(SETTINGS | settings))
    assert {path: path.stat().st_mtime_ns for path in trained.rglob("*") if path.is_file()} == before


def test_a_damaged_state_raises(data, tmp_path):
    settings = make_config(SETTINGS)
    write_json(tmp_path / "training.json", {"identity": identity(settings, read_images(data)[0])})
    (tmp_path / "state.pt").write_bytes(b"PK not really")
    with pytest.raises(CheckpointError) as caught:
        train_vae(data, tmp_path, settings)
    assert caught.value.path == str(tmp_path / "state.pt") and len(str(caught.value).splitlines()) <= 5


def test_a_diverged_last_step_is_not_saved(data, tmp_path, monkeypatch):
    whole = loop.train_step

    def last(vae, *rest):
        loss = whole(vae, *rest)
        with torch.no_grad():
            next(vae.parameters()).fill_(math.inf)  # like an update with overflowing gradients
        return loss

    monkeypatch.setattr(loop, "train_step", last)
    with pytest.raises(NonFiniteError, match="last step"):
        train_vae(data, tmp_path / "vae", make_config(SETTINGS | {"vae_training.max_train_steps": 1}))
    assert not (tmp_path / "vae" / "manifest.json").exists()


def test_a_diverged_loss_stops(data, tmp_path):
    with pytest.raises(NonFiniteError, match="lower vae_training.lr") as stopped:
        train_vae(data, tmp_path / "vae", make_config(SETTINGS | {"vae_training.lr": 1e30}))
    assert stopped.value.exit_code == 6
    assert not (tmp_path / "vae" / "manifest.json").exists()


@pytest.mark.parametrize("patch", [[8, 8, 6], [32, 16, 8], [8, 8, 9]], ids=["8x8x6", "32x16x8", "8x8x9"])
def test_patches_that_do_not_fit_raise(data, tmp_path, patch):
    factor_4 = {"autoencoder.num_channels": [8, 8, 8], "autoencoder.num_res_blocks": [1, 1, 1]}
    with pytest.raises(ConfigError, match="multiple of 4") as caught:
        train_vae(data, tmp_path / "vae", make_config(SETTINGS | factor_4 | {"vae_training.patch": patch}))
    assert caught.value.field == "vae_training.patch"
    assert not (tmp_path / "vae").exists()


def test_damaged_images_and_an_empty_split_raise(tmp_path):
    folder = write_images(tmp_path / "damaged")
    file = folder / "images" / "case1" / "t2w.npy"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    with pytest.raises(DataError, match="SHA-256") as caught:
        train_vae(folder, tmp_path / "vae", make_config(SETTINGS))
    assert caught.value.path == str(file)
    with pytest.raises(DataError, match="train split is empty"):
        train_vae(write_images(tmp_path / "empty", train=0), tmp_path / "vae", make_config(SETTINGS))


def test_without_a_test_split_no_errors_are_recorded(tmp_path):
    few = make_config(SETTINGS | {"vae_training.max_train_steps": 3})
    train_vae(write_images(tmp_path / "prepared", test=0), tmp_path / "vae", few)
    assert json.loads((tmp_path / "vae" / "run_record.json").read_text())["test"] is None


def test_patches_use_every_image_equally_often(data):
    train, _ = read_images(data)
    settings = VaeTrainingConfig(patch=[8, 8, 8], batch_size=2)
    drawn = torch.cat(
        [
            torch.from_numpy(request.read())[None]
            for step in range(30)
            for request in patch_requests(train, settings, step)
        ]
    )
    assert torch.equal(
        drawn[14:16], torch.stack([torch.from_numpy(request.read()) for request in patch_requests(train, settings, 7)])
    )
    windows = [np.lib.stride_tricks.sliding_window_view(image.values, (8, 8, 8)).reshape(-1, 512) for image in train]
    sources = [
        next(k for k, every in enumerate(windows) if (every == patch.numpy().ravel()).all(1).any()) for patch in drawn
    ]
    assert [sorted(sources[i : i + 3]) for i in range(0, 60, 3)] == [[0, 1, 2]] * 20
    assert len({patch.numpy().tobytes() for patch in drawn}) > 30


def test_augmented_patches_are_reproducible_and_train(data, tmp_path):
    train, _ = read_images(data)
    changes = {"vae_training.augmentation.preset": "image", "vae_training.max_train_steps": 3}
    augmented = make_config(SETTINGS | changes)
    requests = [patch_requests(train, augmented.vae_training, step) for step in (0, 1, 0)]
    assert requests[0] == requests[2] != requests[1] and requests[0][0].augmentation.rotation != (0.0, 0.0, 0.0)
    plain = patch_requests(train, make_config(SETTINGS).vae_training, 0)
    assert [request.corner for request in plain] == [request.corner for request in requests[0]] and plain[
        0
    ].augmentation.rotation == (
        0,
        0,
        0,
    )
    train_vae(data, tmp_path / "vae", augmented)
    assert json.loads((tmp_path / "vae" / "run_record.json").read_text())["images"] == 3


@pytest.mark.parametrize(
    ("steps", "warm"), [(400, 20), (3000, 100)], ids=["T400", "T3000"]
)  # 5 % of the run, at most 100 steps
def test_learning_rate_equals_torch_schedulers(steps, warm):
    settings = VaeTrainingConfig(max_train_steps=steps, lr=2e-3)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2e-3)
    rise = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / warm, 1.0, total_iters=warm - 1)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps - warm, eta_min=2e-5)
    both = torch.optim.lr_scheduler.SequentialLR(optimizer, [rise, cosine], milestones=[warm])
    truth = []
    for _ in range(steps):
        truth.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        both.step()
    np.testing.assert_allclose([learning_rate(settings, step) for step in range(steps)], truth, rtol=1e-6)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_the_state(data, trained, tmp_path, monkeypatch, number):
    """At the interrupted step, not only when the interval has passed."""
    out, calls, whole = tmp_path / "vae", [], loop.train_step

    def signalled(*arguments):
        calls.append(1)
        if len(calls) == 37:
            os.kill(os.getpid(), number)
        return whole(*arguments)

    monkeypatch.setattr(loop, "train_step", signalled)
    with pytest.raises(Stopped, match="stopped after step 37, which is saved in") as stopped:
        train_vae(data, out, make_config(SETTINGS))
    assert stopped.value.exit_code == 128 + number and not (out / "manifest.json").exists()
    train_vae(data, out, make_config(SETTINGS))
    assert len(calls) == 80  # no step twice
    expected, got = load_autoencoder(trained).state_dict(), load_autoencoder(out).state_dict()
    assert all(torch.equal(expected[name], got[name]) for name in expected)
