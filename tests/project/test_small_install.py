"""The wheel with nothing but what its base requires, in a Python that sees no other package."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ccella_fast.config import SchedulerConfig
from ccella_fast.diffusion.schedule import Schedule
from ccella_fast.optional import PACKAGES

ROOT = Path(__file__).resolve().parents[2]
EVERY = {
    "torch",
    "deepspeed",
    "triton",
    "xformers",
    "monai",
    "transformers",
    "nvidia-dali-cuda130",
    "numpy",
    "nvidia-ml-py",
}


def requirements(distribution: importlib.metadata.Distribution, extra: str = "") -> set[str]:
    """The names of the distributions that one requires on this machine, for an extra alone or without any."""
    found = set()
    for text in distribution.requires or ():
        name, _, marker = text.partition(";")
        wanted = re.search(r"extra == [\"'](.+?)[\"']", marker)
        if (wanted[1] if wanted else "") == extra and not re.search(
            r"(win32|Windows|Darwin|darwin)|python_version <", marker
        ):
            found.add(re.match(r"[\w.-]+", name)[0])
    return found


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package as it is installed, and its metadata."""
    folder = tmp_path_factory.mktemp("wheel")
    skip = shutil.ignore_patterns(".*", "out", "build", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, folder / "source", symlinks=True, ignore=skip)
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-compile"]
    done = subprocess.run([*command, "--target", folder / "site", folder / "source"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder / "site"


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> importlib.metadata.Distribution:
    return next(iter(importlib.metadata.distributions(name="ccella-fast", path=[str(wheel)])))


@pytest.fixture(scope="module")
def base(tmp_path_factory, metadata) -> Path:
    """A folder with links to what the base requires, and to what that requires."""
    folder = tmp_path_factory.mktemp("base")
    names, known = requirements(metadata), set()
    while names - known:
        name = (names - known).pop()
        known.add(name)
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # of another platform
        names |= requirements(distribution)
        for part in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
            if not (folder / part).exists():
                (folder / part).symlink_to(distribution.locate_file(part))
    return folder


def run(code: str, *paths: Path) -> subprocess.CompletedProcess[str]:
    """Run code in a Python whose packages are in these folders alone."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "CCELLA"))}
    env = {**clean, "PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-S", "-c", code], cwd="/", env=env, capture_output=True, text=True)


USE = """
import torch, ccella_fast
from torch import nn
from ccella_fast.kernels.group_norm_silu import group_norm_silu

x = torch.randn(1, 4, 8, 8, 8)
y = ccella_fast.sample(lambda x, t: 0.5 * x, x, num_inference_steps=3, progress=True)
assert y.shape == x.shape and not torch.equal(x, y)

net = nn.Sequential(nn.GroupNorm(2, 4), nn.SiLU(), nn.Conv3d(4, 4, 1))
before = net(x)
report = ccella_fast.speed_up(net)
assert "group_norm_silu" in str(report), report
torch.testing.assert_close(net(x), before)
plain = nn.functional.silu(nn.functional.group_norm(x, 2, eps=1e-6))
torch.testing.assert_close(group_norm_silu(x, 2, torch.ones(4), torch.zeros(4)), plain)

sizes = {"num_channels": [32, 64], "attention_levels": [False, True], "num_head_channels": [0, 32], "adapter_blocks": 1}
model = ccella_fast.build_model("CCELLA", **sizes).eval()
ccella_fast.load_config, ccella_fast.load_checkpoint, ccella_fast.FastSampler
print("done")
"""


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    names = {str(path.relative_to(wheel)) for path in wheel.rglob("*") if path.is_file()}
    assert {"ccella_fast/config.py", "ccella_fast/kernels/attention.py", "ccella_fast/train.py"} <= names
    assert not [name for name in names if not name.startswith(("ccella_fast/", "ccella_fast-", "bin/ccella-fast"))]


def test_kernels_models_and_sampling_work_with_the_base_alone(wheel, base):
    done = run(USE, wheel, base)
    assert done.stdout == "done\n" and "3/3" in done.stderr, done.stderr[-2000:]
    (base / "numpy").rename(base / "hidden")  # negative control
    try:
        assert "numpy" in run(USE, wheel, base).stderr
    finally:
        (base / "hidden").rename(base / "numpy")


@pytest.mark.parametrize(
    "command", ["phantom --out /tmp/x", "check --data /tmp", "sample --checkpoint /tmp --out /tmp/x", "train"]
)
def test_a_command_names_the_extra_that_it_needs(wheel, base, command):
    code = f"import sys; from ccella_fast.{{}} import main; sys.argv[1:] = {command.split()!r}; sys.exit(main())"
    done = run(code.format("cli"), wheel, base)
    assert done.returncode == 2 and 'pip install "ccella-fast[commands]"' in done.stderr, done.stderr
    assert len(done.stderr.splitlines()) <= 5


@pytest.mark.parametrize(
    ("command", "code"), [("export --checkpoint /none --out /tmp/x.pt", 4), ("train-vae --data /none --out /tmp/x", 3)]
)
def test_a_command_that_needs_no_extra_works_with_the_base_alone(wheel, base, command, code):
    """As far as a folder that does not exist."""
    done = run(f"import sys; from ccella_fast.cli import main; sys.exit(main({command.split()!r}))", wheel, base)
    assert done.returncode == code and "/none" in done.stderr and "pip install" not in done.stderr, done.stderr


def test_the_environment_is_described_with_the_base_alone(wheel, base):
    done = run("import sys; from ccella_fast.cli import main; sys.exit(main(['env']))", wheel, base)
    assert done.returncode == 0 and re.search("absent .*deepspeed", done.stdout), done.stderr[-2000:]


# What is imported, and how it is used.
LIGHT = {
    "sample": (
        "from ccella_fast import sample",
        "sample(lambda x, t: 0.5 * x, torch.randn(2, 3), num_inference_steps=3)",
    ),
    "speed_up": (
        "from ccella_fast.dropin import speed_up",
        "report = speed_up(nn.Sequential(nn.GroupNorm(2, 4), nn.SiLU(), nn.Conv3d(4, 4, 1)))\n"
        "assert 'group_norm_silu' in str(report), report",
    ),
    "kernel": (
        "from ccella_fast.kernels.group_norm_silu import group_norm_silu",
        "group_norm_silu(torch.randn(1, 4, 8, 8), 2, torch.ones(4), torch.zeros(4))",
    ),
}


def packages(wheel: Path, others: Path, imports: str, *, first: str = "", use: str = "") -> str:
    """The packages, other than those of Python and what torch imports, whose modules an import adds."""
    show = "print(*sorted({name.partition('.')[0] for name in new if name[0] != '_'} - set(sys.stdlib_module_names)))"
    lines = ["import sys, torch", "from torch import nn", first, "before = set(sys.modules)"]
    done = run("\n".join([*lines, imports, "new = set(sys.modules) - before", use, show]), wheel, others)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


@pytest.mark.parametrize("name", LIGHT)
def test_sampling_and_kernels_import_nothing_but_torch(wheel, base, name):
    """Whoever needs only these does not wait for more than Triton, which the kernels need."""
    imports, use = LIGHT[name]
    everything = Path(torch.__file__).parents[1]
    assert packages(wheel, everything, imports) == ("ccella_fast" if name == "sample" else "ccella_fast triton")
    hide = "sys.modules.update(dict.fromkeys(['tqdm', 'pydantic', 'safetensors', 'triton']))"
    assert packages(wheel, base, imports, first=hide, use=use) == "ccella_fast"


def test_packages_are_seen_where_they_are_imported(wheel, base):
    """Negative control of the test above."""
    assert "pydantic" in packages(wheel, base, "from ccella_fast import build_model").split()


def test_extras(metadata):
    base, everything = requirements(metadata), requirements(metadata) | requirements(metadata, "all")
    assert base == {"torch", "numpy", "pydantic", "safetensors", "tqdm"}
    assert everything >= EVERY
    modules = importlib.metadata.packages_distributions()
    for module, extra in PACKAGES.items():
        if module != "protobuf":  # the name of its distribution alone
            installed = {name.lower() for name in modules.get(module, [module])}
            listed = {name.lower() for name in requirements(metadata, extra)}
            assert any(name in wanted or wanted in name for name in installed for wanted in listed), module


def test_the_default_schedule_is_that_of_the_configuration():
    assert (Schedule.of().betas == Schedule.from_config(SchedulerConfig()).betas).all()
