"""Everything that only a GPU can say, in one call with a time limit: `make gpu`.

    python benchmarks/gpu.py [--minutes 9] [--out out/gpu]

It runs on a bare machine with PyTorch, Triton and pytest: packages that are missing there are taken from build/wheels, which
`make gpu-wheels` fills on a machine with a network. In this order, each as a process of its own with its share of the time:

    tests       the tests that need a GPU: kernels, model, sampler, training, data
    measure     a denoising step, a training step and a decode compared with the reference; both steps with one kernel's backend
                changed at a time; then each kernel alone, compared with PyTorch, torch.compile and other libraries
    tuning      the launch configurations of the kernels

Every result is written as soon as it is known, so a call that is cut off keeps what it has measured. This file needs the
standard library only.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
GRACE = 20.0  # seconds between the interruption of a phase and its end
WHEELS, PACKAGES = ROOT / "build" / "wheels", ROOT / "build" / "gpu-packages"
CASES = (
    "denoising_step", "training_step", "decode", "denoising_step_by_kernel", "training_step_by_kernel", "sampling",
    "conv3d", "conv3d_level_1", "conv3d_level_2", "conv3d_level_3", "conv3d_batch_8",
    "group_norm_silu", "group_norm_silu_backward", "cross_attention", "attention", "upsample_conv3d", "denoising_step_batch_8",
    "cross_attention_backward", "attention_backward", "upsample_conv3d_backward", "group_norm_silu_batch_8", "encode", "energy",
    "group_norm_silu_public",
)  # fmt: skip

REHEARSED = ("training_memory", "group_norm_silu")  # a case of memory, and a kernel with the implementations of others


class Phase(NamedTuple):
    """A process, with the share of the remaining time that it may take.

    Attributes:
        name: Of the phase, and of the file with its output.
        share: Of the time that is left when the phase starts.
        command: Arguments of Python, separated by spaces; {seconds} and {minutes} stand for most of the time of the phase.
        last: Further arguments, which may contain spaces.
    """

    name: str
    share: float
    command: str
    last: list[str]


def phases(out: Path, *, rehearse: bool) -> list[Phase]:
    """The phases in their order. A rehearsal collects the tests, measures two short cases, and lists candidates."""
    tests = f"-n {max(1, (os.cpu_count() or 1) - 3)} --dist loadgroup --timeout=180 -rA --durations=20"
    cases = " ".join(f"--case {case}" for case in (REHEARSED if rehearse else CASES))
    tuning = "--dry_run" if rehearse else "--seconds {seconds:.0f} --report"
    return [
        Phase(
            "tests", 0.3, f"-m pytest -m gpu tests/gpu tests/kernels --tb=short {'--collect-only' if rehearse else tests}",
            [f"--junitxml={out / 'tests.xml'}"],
        ),
        Phase("measure", 0.75, f"benchmarks/run.py {cases} --minutes {{minutes:.2f}} --json", [str(out / "measured.json")]),
        Phase("tuning", 1.0, f"benchmarks/tune_kernels.py {tuning}", [] if rehearse else [str(out / "tuning.json")]),
    ]  # fmt: skip


def install_wheels() -> None:
    """Unpack build/wheels where this process's children find the packages; nothing else on the machine is changed."""
    wheels = sorted(map(str, WHEELS.glob("*.whl")))
    if wheels:
        options = "-m pip install --quiet --no-index --no-deps --no-compile --upgrade --target".split()
        subprocess.run([sys.executable, *options, str(PACKAGES), *wheels], check=True)


def run_phase(phase: Phase, out: Path, limit: float) -> str:
    """Run a phase for at most `limit` seconds and return how it ended, in a word or two. Its last lines are printed."""
    log = out / f"{phase.name}.log"
    seconds = 0.9 * limit
    command = [sys.executable, *phase.command.format(seconds=seconds, minutes=seconds / 60).split(), *phase.last]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(PACKAGES), str(ROOT)]), "PYTHONUNBUFFERED": "1"}
    environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with open(log, "w", encoding="utf-8") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            ended = f"exit code {process.wait(limit - min(GRACE, limit / 4))}"
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)  # pytest then reports the tests that have failed so far
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(min(GRACE, limit / 4))
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with its workers
            process.wait()
            ended = f"stopped after {limit:.0f} s"
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    print(*(f"  {line[:200]}" for line in lines[-25:]), sep="\n")
    return ended


def main(argv: Sequence[str] | None = None) -> int:
    """The command; exit code 1 if a phase failed or was stopped."""
    parser = argparse.ArgumentParser(prog="benchmarks/gpu.py", description=str(__doc__).split("\n")[0])
    parser.add_argument("--minutes", type=float, default=9.0, help="time limit of the whole call (default 9)")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "gpu", help="folder for results (default out/gpu)")
    parser.add_argument(
        "--rehearse", action="store_true", help="run every phase at its smallest on a machine without a GPU"
    )
    arguments = parser.parse_args(argv)
    end = time.monotonic() + 60 * arguments.minutes
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if not arguments.rehearse:
        install_wheels()
    failed = []
    for phase in phases(out, rehearse=arguments.rehearse):
        limit = phase.share * (end - time.monotonic())
        begin = time.monotonic()
        print(f"{phase.name}: at most {limit:.0f} s", flush=True)
        ended = run_phase(phase, out, limit)
        print(f"{phase.name}: {ended}, {time.monotonic() - begin:.0f} s", flush=True)
        failed += [phase.name] if ended != "exit code 0" else []
    print(f"results in {arguments.out}" + (f"; not complete: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
