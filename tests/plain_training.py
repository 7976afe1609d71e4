"""Training written out as one plain loop: torch.optim.AdamW on whole fp32 weights, a float64 noise schedule, losses by hand.

It shares with `ccella_fast` the network and `noise.generator`. Settings are read as they stand in the JSON, not as `Config`
has them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from training_fixtures import CONFIG, losses, weights

from ccella_fast.config import make_config
from ccella_fast.diffusion.noise import generator
from ccella_fast.models import build_model

# What docs/explanation/method.md, section 3, trains with; CONFIG and the test's own settings win over it.
SETTINGS: dict[str, Any] = {
    "gradient_accumulation_steps": 1, "processes": 1, "weight_decay": 0.01, "adam_betas": (0.9, 0.999), "max_grad_norm": 1.0,
    "text_class_pred_weight": 1e-4, "ema_decay": 0.9999, "seed": 0, "timesteps": 1000, "betas": (0.0015, 0.0195),
    "scale": 0.97, "eps": 1e-8, "variant": "CCELLA",
}  # fmt: skip

# Settings of which each differs from its default; gradients are clipped.
UNUSUAL: dict[str, Any] = {
    "batch_size": 2, "gradient_accumulation_steps": 2, "lr": 3e-3, "max_train_steps": 4, "weight_decay": 0.3,
    "adam_betas": (0.5, 0.7), "max_grad_norm": 0.05, "text_class_pred_weight": 3e-3, "ema_decay": 0.2, "seed": 5,
}  # fmt: skip
EVERY_STEP = {"checkpointing_steps": 1, "checkpoints_total_limit": 9}  # a checkpoint after each step, and all are kept


class Step(NamedTuple):
    """After an optimizer step. `logged`: loss, loss_l1, loss_class, lr, grad_norm; None where the step was skipped."""

    logged: dict[str, float] | None
    weights: dict[str, Tensor]
    averages: dict[str, Tensor]
    ema_updates: int


def plain_training(data: Path, **changed: Any) -> list[Step]:
    """All steps of a run on the prepared folder `data`; the first entry is the start."""
    s = {**SETTINGS, **CONFIG["training"], **changed}
    cases = json.loads((data / "manifest.json").read_text())["cases"]
    parts = s["gradient_accumulation_steps"] * s["processes"]
    batch, total = s["batch_size"] * parts, s["max_train_steps"]
    values = {key: value for key, value in CONFIG.items() if key != "name"}
    torch.manual_seed(s["seed"])
    model = build_model(make_config({**values, "model": {**values["model"], "variant": s["variant"]}}))
    dtype = torch.bfloat16 if s["precision"] == "bf16" else torch.float32
    model.to(dtype)
    masters = {name: p.detach().float().clone().requires_grad_() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(
        masters.values(), lr=s["lr"], betas=s["adam_betas"], eps=s["eps"], weight_decay=s["weight_decay"]
    )
    averages = {name: p.detach().double() for name, p in masters.items()}
    betas = np.linspace(*np.sqrt(s["betas"]), s["timesteps"]) ** 2
    signal = np.cumprod(1 - betas)
    updates, steps = 0, [_step(None, masters, averages, 0)]
    for k in range(total):
        for name, p in model.named_parameters():
            p.data.copy_(masters[name].data)
            p.grad = None
        drawn = [_sample(data, cases, s, k * batch + i, signal) for i in range(batch)]
        known = sum(sample["known"] for sample in drawn)
        l1 = classes = 0.0
        for first in range(0, batch, s["batch_size"]):
            part = {key: [one[key] for one in drawn[first : first + s["batch_size"]]] for key in drawn[0]}
            inputs = {"spacing": torch.stack(part["spacing"])}
            if s["variant"] in ("CCELLA", "DECOUPLED"):
                inputs["text"] = torch.stack(part["text"]).to(dtype)
            if s["variant"] in ("DECOUPLED", "RADMAISI"):
                inputs["pirads"] = torch.stack(part["pirads"])
            predicted, logits = model(torch.stack(part["noisy"]).to(dtype), torch.stack(part["t"]), **inputs)
            noise = (predicted.float() - torch.stack(part["noise"])).abs().mean() / parts
            focal = torch.zeros(())
            for row, target, has_class in zip(
                [] if logits is None else logits, part["pirads"], part["known"], strict=logits is not None
            ):
                p = row.float().softmax(0)
                terms = -target * torch.tensor([0.25, 0.75]) * (1 - p) ** 2 * p.log()
                focal = focal + terms.sum() / known if has_class else focal
            (noise + s["text_class_pred_weight"] * focal).backward()
            l1, classes = l1 + noise.item(), classes + focal.item()
        for name, p in model.named_parameters():
            masters[name].grad = torch.zeros_like(masters[name]) if p.grad is None else p.grad.float()
        norm = math.sqrt(sum(float(m.grad.double().square().sum()) for m in masters.values()))
        lr = s["lr"] * (1 - k / total) ** 2
        if not math.isfinite(norm):
            steps.append(_step(None, masters, averages, updates))
            continue
        for m in masters.values():
            m.grad *= min(1.0, s["max_grad_norm"] / norm)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        updates += 1
        decay = min(s["ema_decay"], (1 + updates) / (10 + updates))
        averages = {name: decay * a + (1 - decay) * masters[name].detach().double() for name, a in averages.items()}
        loss = l1 + s["text_class_pred_weight"] * classes
        logged = {"loss": loss, "loss_l1": l1, "loss_class": classes, "lr": lr, "grad_norm": norm}
        steps.append(_step(logged, masters, averages, updates))
    return steps


def difference(run: Path, plain: list[Step], *, at: list[int] | None = None) -> dict[str, float]:
    """By how much a run differs from the plain loop: the largest relative difference of each logged number, and of weights and
    averages the distance relative to how far they have moved. at: steps whose checkpoints are compared; None: the last."""
    lines = {line["step"]: line for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())}
    expected = {number: step.logged for number, step in enumerate(plain) if step.logged}
    assert [step for step, _ in losses(run)] == list(expected)
    found = {
        key: max(abs(lines[n][key] - logged[key]) / max(abs(logged[key]), 1e-12) for n, logged in expected.items())
        for key in ("loss", "loss_l1", "loss_class", "lr", "grad_norm")
    }
    for name, part in (("model", "weights"), ("ema", "averages")):
        found[name] = 0.0
        for number in at or [len(plain) - 1]:
            folder = run / "checkpoints" / f"step-{number:08d}"
            if not (folder / f"{name}.safetensors").exists():
                continue
            ours, theirs, begun = weights(run, number, name), getattr(plain[number], part), getattr(plain[0], part)
            assert ours.keys() == theirs.keys()
            apart = math.hypot(*(float((ours[key].double() - theirs[key]).norm()) for key in ours))
            moved = math.hypot(*(float((begun[key].double() - theirs[key]).norm()) for key in ours))
            found[name] = max(found[name], apart / moved)
            state = json.loads((folder / "training_state.json").read_text())
            assert state["ema_updates"] in (0, plain[number].ema_updates)
    return found


def _sample(data: Path, cases: list[dict], s: dict[str, Any], position: int, signal: np.ndarray) -> dict[str, Any]:
    """What the model sees of the study at `position` of the stream: epoch after epoch, each in an order of its own."""
    epoch, offset = divmod(position, len(cases))
    order = torch.randperm(len(cases), generator=generator(s["seed"], "order", epoch)).tolist()
    case = cases[order[offset]]
    mean, sigma, text = (
        torch.from_numpy(np.load(data / case["files"][key]["path"]))
        for key in ("latent_mean/t2w", "latent_sigma/t2w", "text")
    )
    source = generator(s["seed"], "sample", position)
    posterior, noise = (torch.randn(mean.shape, generator=source) for _ in range(2))
    t = torch.randint(s["timesteps"], (), generator=source)
    latent = (mean.double() + sigma.double() * posterior.double()) * s["scale"]
    noisy = math.sqrt(signal[t]) * latent + math.sqrt(1 - signal[t]) * noise.double()
    return {
        "noisy": noisy.float(),
        "noise": noise,
        "t": t,
        "text": text,
        "pirads": 100 * torch.tensor(case["pirads"] or [0, 0], dtype=torch.float32),
        "spacing": 100 * torch.tensor(case["spacing"], dtype=torch.float32),
        "known": case["pirads"] is not None and not case["text_isnull"],
    }


def _step(
    logged: dict[str, float] | None, masters: dict[str, Tensor], averages: dict[str, Tensor], updates: int
) -> Step:
    return Step(logged, {name: m.detach().clone() for name, m in masters.items()}, dict(averages), updates)
