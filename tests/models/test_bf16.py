"""bf16 on CPUs with and without bf16 instructions: how they are detected, and what follows from it.

Most tests replace the detection; some narrow the instructions that oneDNN uses.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ccella_fast import FastSampler, environment, hardware
from ccella_fast.config import make_config
from ccella_fast.data.preparation.prepare import prepare
from ccella_fast.errors import ConfigError
from ccella_fast.processes import HostCollectives
from ccella_fast.sampling.command import sample_to_folder
from ccella_fast.sampling.onednn_prepack import PackedConvolution, can_pack
from ccella_fast.sampling.optimizations import resolve_dtype
from ccella_fast.training import distributed
from ccella_fast.training.run import make_run_plan
from sampling_fixtures import FakeEncoder, write_checkpoint
from study_fixtures import config, write_bert, write_studies
from training_fixtures import train_here

CPU = torch.device("cpu")
on_cpu = pytest.mark.skipif(
    torch.cuda.is_available(), reason="for machines without a GPU: set CUDA_VISIBLE_DEVICES= (empty) to run it"
)


@pytest.fixture(autouse=True)
def forget_warnings():
    hardware.warn_of_emulated_bf16.cache_clear()
    yield
    hardware.warn_of_emulated_bf16.cache_clear()


@pytest.fixture
def fake_bf16_support(monkeypatch):
    """`fake_bf16_support(True)`: from now on, the CPU is reported to multiply bf16."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.delenv("RANK", raising=False)

    def fake(value: bool) -> None:
        hardware.warn_of_emulated_bf16.cache_clear()  # as in a new process
        monkeypatch.setattr(hardware, "cpu_multiplies_bf16", lambda: value)

    return fake


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("run") / "step")


def warnings_in(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if "bf16 is emulated" in record.getMessage()]


# Detection


def readable(value) -> str:
    """The id of a parameter: instructions, the limit of oneDNN, or the expected answer."""
    if isinstance(value, list):
        return "+".join(value)
    if isinstance(value, dict):
        return ",".join(f"{key}={limit}" for key, limit in value.items()) or "unlimited"
    return str(value)


@pytest.mark.parametrize(
    ("instructions", "limit", "expected"),
    [
        (["avx2"], {}, False),
        (["avx2", "avx512f"], {}, False),
        (["avx2", "avx512f", "avx512_bf16"], {}, True),
        (["avx2", "avx512f", "amx_bf16"], {"ONEDNN_MAX_CPU_ISA": "DEFAULT"}, True),
        (["avx2", "avx512f", "avx512_bf16"], {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}, True),
        (["avx2", "avx512f", "avx512_bf16"], {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"}, False),
        (["avx2", "avx512f", "avx512_bf16"], {"ONEDNN_MAX_CPU_ISA": "avx2"}, False),
        (["avx2", "avx512f", "avx512_bf16"], {"DNNL_MAX_CPU_ISA": "AVX2"}, False),
        (["avx2", "avx512f", "avx512_bf16"], {"DNNL_MAX_CPU_ISA": "AVX2", "ONEDNN_MAX_CPU_ISA": "ALL"}, True),
        (["avx2", "avx512f", "avx512_bf16"], {"ATEN_CPU_CAPABILITY": "default"}, True),
    ],
    ids=readable,
)
def test_support_depends_on_instructions_and_on_the_limit_of_onednn(monkeypatch, instructions, limit, expected):
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in limit.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(hardware, "cpu_instructions", lambda: instructions)
    assert hardware.cpu_multiplies_bf16() == expected
    assert resolve_dtype("auto", CPU) == (torch.bfloat16 if expected else torch.float32)


@pytest.mark.parametrize("limit", ["AVX2", "AVX512_CORE_VNNI", "DEFAULT"])
def test_detection_agrees_with_the_dispatch_of_onednn(limit):
    """The verbose log of oneDNN names the implementation of a matrix product, and the instructions that it uses."""
    code = (
        "import torch\nfrom ccella_fast.hardware import cpu_multiplies_bf16\n"
        "a = torch.ones(64, 64).bfloat16()\n"
        "with torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON):\n    a @ a\n"
        "print('supported', cpu_multiplies_bf16())"
    )
    given = {key: value for key, value in os.environ.items() if key not in ("ATEN_CPU_CAPABILITY", "DNNL_MAX_CPU_ISA")}
    done = subprocess.run(
        [sys.executable, "-c", code], env={**given, "ONEDNN_MAX_CPU_ISA": limit}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    products = [line for line in done.stdout.splitlines() if ",exec,cpu,matmul," in line]
    by_instruction = any("avx512_core_bf16" in line or "avx10" in line or "amx" in line for line in products)
    assert ("supported True" in done.stdout) == by_instruction, done.stdout


@pytest.mark.parametrize("supported", [True, False])
def test_weights_are_packed_if_the_operator_is_supported(monkeypatch, checkpoint, supported):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: supported)
    assert can_pack(torch.bfloat16, CPU) == (supported and torch.backends.mkldnn.is_available())
    assert not can_pack(torch.float32, CPU) and not can_pack(torch.bfloat16, torch.device("cuda"))
    sampler = FastSampler.from_checkpoint(checkpoint, device="cpu", dtype="bfloat16", text_encoder=FakeEncoder())
    forward = sampler.model.unet.conv_in.conv._conv_forward
    assert isinstance(forward, PackedConvolution) == can_pack(torch.bfloat16, CPU)


SAMPLE = """
import sys, torch
from sampling_fixtures import FakeEncoder
from ccella_fast import FastSampler
from ccella_fast.sampling import Optimizations
latents = {}
settings = [
    ("truth", "float32", Optimizations()),
    ("eager", "bfloat16", Optimizations.off()),
    ("ours", "bfloat16", Optimizations()),
]
for name, dtype, optimizations in settings:
    sampler = FastSampler.from_checkpoint(
        sys.argv[1], device="cpu", dtype=dtype, optimizations=optimizations, text_encoder=FakeEncoder()
    )
    latents[name] = sampler(reports=["abc"], seeds=[3], num_inference_steps=4).latents
truth = latents["truth"]
ours, eager = (float((latents[name] - truth).norm() / truth.norm()) for name in ("ours", "eager"))
print(ours, eager)
"""


def test_a_sample_in_bf16_is_accurate_with_instructions_narrowed_to_avx2(checkpoint):
    """In its own process, in which torch and oneDNN do not use any bf16 instructions."""
    narrow = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "default"}
    path = os.pathsep.join([*sys.path, str(Path(__file__).resolve().parents[1] / "fixtures")])
    done = subprocess.run(
        [sys.executable, "-c", SAMPLE, checkpoint], env={**os.environ, **narrow, "PYTHONPATH": path},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    ours, eager = map(float, done.stdout.split())
    assert 1e-4 < ours < 0.1 and ours < 2 * eager
    assert done.stderr.count("bf16 is emulated") == 1 and "float32 is faster" in done.stderr


# The warning


@on_cpu
@pytest.mark.parametrize("multiplies", [True, False])
def test_sampling_warns_once_and_recommends_float32(checkpoint, tmp_path, caplog, fake_bf16_support, multiplies):
    fake_bf16_support(multiplies)
    for name in ("a", "b"):
        sample_to_folder(
            checkpoint, tmp_path / name, reports=["abc"], num_samples=1, seed=0, num_inference_steps=1,
            dtype="bfloat16", text_encoder=FakeEncoder(), device="cpu",
        )  # fmt: skip
    found = warnings_in(caplog)
    assert len(found) == (0 if multiplies else 1) and all("float32 is faster" in line for line in found)


def test_float32_and_auto_give_no_warning(checkpoint, caplog, fake_bf16_support):
    fake_bf16_support(False)
    for dtype in ("auto", "float32"):
        sampler = FastSampler.from_checkpoint(checkpoint, device="cpu", dtype=dtype, text_encoder=FakeEncoder())
        assert sampler.dtype == torch.float32
    assert not warnings_in(caplog)


def test_only_rank_zero_warns(caplog, fake_bf16_support, monkeypatch):
    fake_bf16_support(False)
    monkeypatch.setenv("RANK", "1")
    hardware.warn_of_emulated_bf16("choose float32")
    assert not warnings_in(caplog)
    monkeypatch.setenv("RANK", "0")
    hardware.warn_of_emulated_bf16.cache_clear()
    hardware.warn_of_emulated_bf16("choose float32")
    assert len(warnings_in(caplog)) == 1


@on_cpu
@pytest.mark.parametrize(("dtype", "expected"), [("bfloat16", 1), ("float32", 0)])
def test_encoding_reports_warns_once(tmp_path, caplog, fake_bf16_support, dtype, expected):
    fake_bf16_support(False)
    settings = config(variant="CCELLA", encoder=write_bert(tmp_path / "bert"), text__dtype=dtype, text__batch_size=1)
    prepare(write_studies(tmp_path / "studies"), tmp_path / "out", settings)
    found = warnings_in(caplog)
    assert len(found) == expected and all("float32 is faster: set text.dtype" in line for line in found)


def test_description_of_the_environment_states_that_bf16_is_emulated(fake_bf16_support):
    for multiplies in (True, False):
        fake_bf16_support(multiplies)
        facts = {**environment.describe_environment(), "gpu": []}
        assert facts["cpu"]["multiplies_bf16"] == multiplies
        found = [line for line in environment.format_environment(facts).splitlines() if "bf16 is emulated" in line]
        assert len(found) == (not multiplies) and all("WARNING" in line and "float32" in line for line in found)
        with_gpu = {**facts, "gpu": [{"name": "H100"}], "cudnn": 91900}
        assert not any("bf16 is emulated" in line for line in environment.environment_warnings(with_gpu))


# Precision of training


def recorded(folder, step) -> set[str]:
    """The precision in the configuration of the run, in that of its checkpoint and in the run record."""
    step_folder = folder / "checkpoints" / f"step-{step:08d}"
    configs = [json.loads((place / "config.json").read_text()) for place in (folder, step_folder)]
    record = json.loads((folder / "run_record.json").read_text())
    return {*(values["training"]["precision"] for values in configs), record["precision"]}


@pytest.mark.parametrize(("first", "precision"), [(True, "bf16"), (False, "fp32")])
def test_auto_is_resolved_at_the_start_and_kept_on_another_cpu(
    tmp_path, data, caplog, fake_bf16_support, first, precision
):
    assert make_config().training.precision == "auto"
    caplog.set_level("INFO", logger="ccella_fast")
    folder, settings = tmp_path / "run", {"precision": "auto", "checkpointing_steps": 1, "max_train_steps": 2}
    fake_bf16_support(first)
    train_here(folder, data, **settings)
    assert recorded(folder, 2) == {precision} and f"training in {precision}" in caplog.text
    assert not warnings_in(caplog)
    weights = (folder / "checkpoints" / "step-00000002" / "model.safetensors").read_bytes()

    (folder / "checkpoints" / "step-00000002").rename(tmp_path / "removed")
    fake_bf16_support(not first)
    train_here(folder, data, resume="latest", **settings)
    assert recorded(folder, 2) == {precision}
    assert (folder / "checkpoints" / "step-00000002" / "model.safetensors").read_bytes() == weights
    found = warnings_in(caplog)  # the run stays in bf16 although this CPU emulates it, with a warning
    assert len(found) == (precision == "bf16") and all("float32 is faster" in line for line in found)

    (folder / "checkpoints" / "step-00000002").rename(tmp_path / "removed again")
    other = {"bf16": "fp32", "fp32": "bf16"}[precision]  # the run goes on in a precision that is asked for
    train_here(folder, data, resume="latest", **{**settings, "precision": other})
    assert recorded(folder, 2) == {other}
    assert (folder / "checkpoints" / "step-00000002" / "model.safetensors").read_bytes() != weights


def test_training_in_emulated_bf16_warns_once(tmp_path, data, caplog, fake_bf16_support):
    fake_bf16_support(False)
    for name in ("a", "b"):
        train_here(tmp_path / name, data, precision="bf16", max_train_steps=1)
    assert len(warnings_in(caplog)) == 1 and "training.precision to fp32" in warnings_in(caplog)[0]


def test_a_gpu_uses_bf16_on_any_cpu(tmp_path, data, fake_bf16_support, monkeypatch):
    fake_bf16_support(False)
    given = {"data": data, "run": tmp_path / "run", "deepspeed_file": None}
    settings = make_config({"training.max_train_steps": 1})
    assert make_run_plan(settings, **given).config.training.precision == "fp32"
    monkeypatch.setattr(distributed, "uses_gpu", lambda: True)
    assert make_run_plan(settings, **given).config.training.precision == "bf16"


def test_processes_with_different_precisions_are_an_error(tmp_path, data, fake_bf16_support, monkeypatch):
    fake_bf16_support(True)
    from_rank_zero = HostCollectives.from_rank_zero

    def of_another_cpu(self, value):
        value = from_rank_zero(self, value)
        return {**value, "training.precision": "fp32"} if "training.precision" in (value or ()) else value

    monkeypatch.setattr(HostCollectives, "from_rank_zero", of_another_cpu)
    with pytest.raises(ConfigError, match=r"training.precision is 'bf16' on process 0 .* but 'fp32'") as caught:
        train_here(tmp_path / "run", data, precision="auto", max_train_steps=1)
    assert "the CPUs differ" in caught.value.fix
