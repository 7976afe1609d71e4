"""Layout, import layers, names, and coexistence with Hugging Face's package called `kernels`."""

from __future__ import annotations

import ast
import graphlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Imports point strictly downwards. A module belongs to the longest prefix here.
LAYERS = {
    "cli": 9,
    "commands": 8,
    "train": 7, "comparison": 7,
    "sampling": 6, "downstream": 6,
    "data.checking.check": 6, "data.checking.page": 6,
    "training": 5, "data.preparation.prepare": 5, "data.preparation.preview": 5, "report": 5,
    "evaluation": 5,
    "checkpoint": 4,
    "data": 3, "reference_checkpoint": 3, "dropin": 3,
    "models": 2, "diffusion": 2, "losses": 2, "report.figures": 2, "report.page": 2,
    "config_section": 1, "config_scheduler": 1, "config_augmentation": 1, "config_autoencoder": 1,
    "config": 1, "config_errors": 1, "reference_config": 1, "entrypoint": 1, "foreign_errors": 1,
    "variants": 0, "pirads": 0, "errors": 0, "deprecation": 0, "storage": 0, "folder_kinds": 0, "folder_lock": 0,
    "launchers": 0, "environment": 0, "hardware": 0, "quantities": 0, "run_record": 0, "nvml": 0, "progress": 0, "processes": 0,
    "rendezvous": 0, "optional": 0, "lazy_names": 0,
    "kernels": 0,
}  # fmt: skip


def modules() -> list[tuple[str, Path]]:
    files = sorted(path for path in (ROOT / "ccella_fast").rglob("*.py") if "kernels" not in path.parts)
    files += sorted((ROOT / "kernels").glob("*.py"))
    result = []
    for path in files:
        base = ROOT if "ccella_fast" not in path.relative_to(ROOT).parts else ROOT / "ccella_fast"
        parts = path.relative_to(base).with_suffix("").parts
        result.append((".".join(part for part in parts if part != "__init__"), path))
    return result


def layer(module: str) -> int:
    found = [name for name in LAYERS if module == name or module.startswith(name + ".")]
    assert found, f"{module} has no layer: add it to LAYERS"
    return LAYERS[max(found, key=len)]


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ccella_fast"):
            tail = (node.module or "").removeprefix("ccella_fast").lstrip(".")
            names |= {tail} if tail else {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write the whole name"
        elif isinstance(node, ast.Import):
            names |= {a.name.removeprefix("ccella_fast.") for a in node.names if a.name.startswith("ccella_fast.")}
    return names


def test_imports_point_downwards():
    wrong = []
    for module, path in modules():
        if not module:  # the package's own __init__ names its public functions
            continue
        for other in imported(path):
            same_part = module.split(".")[0] == other.split(".")[0]
            if layer(other) > layer(module) or (layer(other) == layer(module) > 1 and not same_part):
                wrong.append(f"{module} (layer {layer(module)}) imports {other} (layer {layer(other)})")
    assert not wrong, "\n".join(wrong)


def import_graph() -> dict[str, set[str]]:
    """Module -> the modules that it imports anywhere, also in functions and for types alone."""
    known = {module for module, _ in modules()}
    graph = {}
    for module, path in modules():
        found = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ccella_fast"):
                package = (node.module or "").removeprefix("ccella_fast").lstrip(".")
                for alias in node.names:
                    name = f"{package}.{alias.name}".lstrip(".")
                    found.add(name if name in known else package)
        graph[module] = found & known - {module, ""}
    return graph


def test_imports_have_no_circle():
    graph = import_graph()
    del graph[""]  # the package's own __init__ names its public functions
    graphlib.TopologicalSorter(graph).prepare()
    some = next(module for module, imports in graph.items() if imports)
    graph[next(iter(graph[some]))].add(some)
    with pytest.raises(graphlib.CycleError):  # negative control
        graphlib.TopologicalSorter(graph).prepare()


def test_no_public_class_is_defined_twice():
    defined: dict[str, list[str]] = {}
    for folder in ("ccella_fast", "kernels", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if "kernels" in path.relative_to(ROOT).parts[1:2]:
                continue  # the symlink
            for node in ast.parse(path.read_text()).body:
                if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                    defined.setdefault(node.name, []).append(str(path.relative_to(ROOT)))
    assert len(defined) > 100
    assert {name: paths for name, paths in defined.items() if len(paths) > 1} == {}


def test_layer_check_can_fail():
    assert layer("sampling") > layer("kernels.attention") and layer("data.preparation.prepare") > layer("data.manifest")
    with pytest.raises(AssertionError, match="no layer"):
        layer("utils")


def test_no_file_beside_train_py_shadows_a_common_module():
    """`deepspeed ccella_fast/train.py` puts ccella_fast/ first on the path."""
    taken = {
        "types",
        "logging",
        "profile",
        "profiling",
        "accelerate",
        "evaluate",
        "datasets",
        "adapters",
        "distributed",
    }
    names = {path.stem for path in (ROOT / "ccella_fast").iterdir()} - {"__init__", "__pycache__", "kernels"}
    assert not names & (set(sys.stdlib_module_names) | taken)
    assert "utils" not in names


def test_the_tests_that_the_makefile_names_exist():
    done = subprocess.run(["make", "-n", "test-narrow"], cwd=ROOT, capture_output=True, text=True, check=True)
    named = [word for word in done.stdout.split() if word.startswith("tests/")]
    assert len(named) > 10
    for path, _, function in (name.partition("::") for name in named):
        assert f"def {function}" in (ROOT / path).read_text()


def run_python(code: str, cwd: Path, *paths: Path) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "HF_HUB_OFFLINE": "1"}
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True)


IMPORTS = (
    "from transformers import T5EncoderModel; from diffusers import DDIMScheduler; import sys\n"
    "from ccella_fast.kernels.attention import attention; print(attention.__module__)\n"
)


def test_transformers_and_diffusers_import_from_the_repository_root():
    done = run_python(IMPORTS, ROOT, ROOT)
    assert done.returncode == 0 and "ccella_fast.kernels.attention" in done.stdout, done.stderr[-2000:]


def test_hugging_face_kernels_package_wins_over_our_folder(tmp_path):
    """A stand-in for their distribution: a regular package later on the path must still be the one that is found."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("WHO = 'hugging face'\n")
    code = "import kernels; print(kernels.WHO)"
    done = run_python(code, ROOT, ROOT, tmp_path)
    assert done.stdout.strip() == "hugging face", done.stderr
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert (ROOT / "ccella_fast" / "kernels").is_symlink()


@pytest.mark.parametrize(
    "command",
    [
        [],
        ["phantom"],
        ["import"],
        ["check"],
        ["prepare"],
        ["train-vae"],
        ["average"],
        ["sample"],
        ["sensitivity"],
        ["evaluate"],
        ["report"],
        ["export"],
        ["push"],
        ["env"],
    ],
)
def test_help_loads_no_torch(command):
    arguments = [*command, "--help"]
    code = (
        f"import sys; from ccella_fast import cli\ntry: cli.main({arguments!r})\nfinally: print('torch' in sys.modules)"
    )
    done = run_python(code, ROOT, ROOT)
    assert done.stdout.rstrip().endswith("False"), done.stderr
    assert ("example: ccella-fast " + " ".join(command) if command else "deepspeed ccella_fast/train.py") in done.stdout
