"""What is read of the machine, from files of known content in place of /proc and /sys."""

from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from ccella_fast import environment, hardware, run_record

GIB = 2**30
MEMINFO = f"MemTotal: {16 * 2**20} kB\nMemFree: 4 kB\nMemAvailable:   {8 * 2**20} kB\nBuffers: 12 kB\n"


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Replace the file of this absolute path; files that were not written are absent."""
    monkeypatch.setattr(hardware, "Path", lambda path: tmp_path / str(path).lstrip("/"))

    def replace(path: str, text: str) -> None:
        file = tmp_path / path.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    return replace


def test_free_memory_is_the_machines_or_its_containers_if_less(write):
    write("/proc/meminfo", MEMINFO)
    assert hardware.free_memory() == 8 * GIB
    for limit, stat, expected in [
        ("max", "", 8 * GIB),
        (4 * GIB, f"active_file {GIB}\ninactive_file {2 * GIB}\nslab 5", 3 * GIB),  # 3 GiB in use, 2 can be dropped
        (4 * GIB, f"total_inactive_file {2 * GIB}", GIB),
        (100 * GIB, "inactive_file 0", 8 * GIB),
    ]:
        write("/sys/fs/cgroup/memory.max", f"{limit}\n")
        write("/sys/fs/cgroup/memory.current", f"{3 * GIB}\n")
        write("/sys/fs/cgroup/memory.stat", stat)
        assert hardware.free_memory() == expected


def test_the_containers_share_of_the_cpus(write):
    assert environment.describe_environment()["cpu"]["quota"] is None  # no such file
    for text, expected in [("max 100000\n", None), ("150000 100000\n", 1.5), ("", None)]:
        write("/sys/fs/cgroup/cpu.max", text)
        assert environment.describe_environment()["cpu"]["quota"] == expected


def test_name_and_instructions_are_those_of_the_first_processor(write):
    entry = "processor\t: {}\nmodel name\t: Some CPU: {} GHz\nflags\t\t: fpu avx2 {}\n"
    write("/proc/cpuinfo", "\n".join([entry.format(0, 3, "avx512_bf16x avx512f"), entry.format(1, 2, "amx_bf16")]))
    assert hardware.cpu_name() == "Some CPU: 3 GHz"
    assert hardware.cpu_instructions() == ["avx2", "avx512f"]


def test_peak_memory_is_that_of_the_largest_process(monkeypatch: pytest.MonkeyPatch):
    for children, own in ((5 * 1024, 3 * 1024), (3 * 1024, 5 * 1024)):
        kib = {resource.RUSAGE_CHILDREN: children, resource.RUSAGE_SELF: own}
        monkeypatch.setattr(resource, "getrusage", lambda who, kib=kib: SimpleNamespace(ru_maxrss=kib[who]))
        assert hardware.peak_memory()["peak_memory_mib"] == 5


def test_a_record_is_left_by_success_alone(tmp_path: Path):
    with pytest.raises(ZeroDivisionError), run_record.write_run_record(tmp_path, "prepare"):
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("cudnn", "words"),
    [(90799, "lacks"), (90800, "wrong"), (91099, "wrong"), (91100, "lacks"), (91499, "lacks"), (91500, None)],
)
def test_versions_of_cudnn_between_which_it_is_wrong_or_slow(cudnn: int, words: str | None):
    packages = {"torch": "2.11.0", "triton": "3.6.0"}
    cpu = {"quota": None, "torch_threads": 1, "cores": 1, "multiplies_bf16": True}
    found = environment.environment_warnings(
        {"cpu": cpu, "gpu": [{}], "cudnn": cudnn, "packages": packages, "settings": {}}
    )
    assert [words in line for line in found] == ([True] if words else [])


def test_the_card_describes_each_gpu():
    gpu = {"name": "Some GPU", "memory_gib": 79.6, "capability": "9.0", "processors": 132}
    facts = environment.describe_environment() | {
        "gpu": [gpu, gpu | {"name": "Another"}],
        "driver": "580.1",
        "cudnn": 91900,
    }
    lines = environment.format_environment(facts).splitlines()
    assert "GPU         Some GPU, 79.6 GiB, 132 SMs, sm_90; Another, 79.6 GiB, 132 SMs, sm_90" in lines
    assert "driver      580.1, cuDNN 91900" in lines
    without = environment.format_environment(facts | {"gpu": []})
    assert "GPU         none" in without.splitlines() and "driver" not in without
