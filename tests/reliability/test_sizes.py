"""Grids that the networks cannot halve are refused before weights are read, with the nearest sizes that fit (goal R23)."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ccella_fast import cli
from ccella_fast.config import make_config
from ccella_fast.errors import ConfigError
from ccella_fast.sampling.request import Request
from study_fixtures import config, write_studies
from training_fixtures import write_prepared


def nearest(size: int, step: int) -> set[int]:
    """The multiples of `step` next to `size`, by counting down and up."""
    down, up = size, size
    while down > step and down % step:
        down -= 1
    while up % step:
        up += 1
    return {down if down % step == 0 else step, up}


def sizes_of(text: str) -> list[list[int]]:
    return [json.loads(each) for each in re.findall(r"\[[\d, ]+\]", text)]


def test_sizes_that_do_not_divide_are_refused_with_the_nearest_that_do(goal: Callable[..., None]):
    """Random grids of voxels for the default networks and for small ones, and latent grids."""
    rng, wrong, count = np.random.default_rng(0), [], 0
    for settings in (make_config([]), config()):
        step = settings.autoencoder.factor * settings.model.divisor
        for _ in range(150):
            dim = rng.integers(1, 300, 3).tolist()
            changed = settings.model_copy(update={"data": settings.data.model_copy(update={"dim": dim})})
            if all(size % step == 0 for size in dim):
                continue
            count += 1
            try:
                changed.check_grid()
                wrong.append(dim)
            except ConfigError as error:
                low, high = sizes_of(error.fix or "")
                expected = [nearest(size, step) for size in dim]
                is_nearest = all({a, b} == each for a, b, each in zip(low, high, expected, strict=True))
                wrong += [] if is_nearest and error.field == "data.dim" else [dim]
        channels, divisor = sum(settings.model.latent_channels), settings.model.divisor
        for _ in range(50):
            shape = [channels, *rng.integers(1, 60, 3).tolist()]
            if all(size % divisor == 0 for size in shape[1:]):
                continue
            count += 1
            try:
                Request(latent_shape=shape).resolve_latent_shape(settings)
                wrong.append(shape)
            except ConfigError as error:
                (near,) = sizes_of(error.fix or "")
                fits = all(a in nearest(size, divisor) for a, size in zip(near, shape[1:], strict=True))
                wrong += [] if fits else [shape]
                Request(latent_shape=[channels, *near]).resolve_latent_shape(settings)  # what is shown is valid
    assert wrong == [] and count > 300
    goal("R23", value=len(wrong), target=0, n=count)


def test_no_weights_are_read_before_the_grid_is_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """The autoencoder is damaged: reading it first would be another error, as the control shows."""
    places = {name: tmp_path / name for name in ("studies", "prepared", "out", "damaged", "config")}
    write_studies(places["studies"])
    write_prepared(places["prepared"])
    places["damaged"].write_bytes(b"not weights")
    places["config"].write_text(json.dumps(config().dump()))
    prepare = "prepare --data {studies} --out {out} --config {config} --vae {damaged}".format(**places).split()
    train = "train --data {prepared} --output_dir {out} --config {config}".format(**places).split()
    for command in (prepare, train):
        assert cli.main([*command, "--set", "data.dim=[30,32,16]"]) == 2
        assert "use [16, 32, 16] or [32, 32, 16]" in capsys.readouterr().err
        assert not places["out"].exists()
    assert cli.main(prepare) == 4  # control
