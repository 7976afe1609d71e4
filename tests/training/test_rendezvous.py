"""The start of several processes: a signal ends one that waits for the others, and one that waits in vain names them."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
import torch.distributed as dist

from ccella_fast.errors import StalledError
from ccella_fast.rendezvous import rendezvous
from training_fixtures import free_port, run, start, write_config

SHORT = timedelta(seconds=0.6)


@pytest.fixture
def process(monkeypatch):
    """A function that makes this process one of a launcher's, and returns the port where they meet."""

    def among(rank: int, world_size: int) -> int:
        given = {"RANK": rank, "WORLD_SIZE": world_size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        for name, value in given.items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.setattr(dist, "is_initialized", lambda: False)  # of other tests
        return int(given["MASTER_PORT"])

    return among


def store(port: int, *, serves: bool = False) -> dist.TCPStore:
    return dist.TCPStore("127.0.0.1", port, None, serves, timedelta(seconds=20), wait_for_workers=False)


def stalled() -> StalledError:
    with pytest.raises(StalledError) as caught, rendezvous(SHORT):
        raise AssertionError("the block was executed")
    assert caught.value.exit_code == 7 and "within 0.01 minutes" in caught.value.why
    return caught.value


def test_process_zero_names_those_that_are_missing(process):
    port = process(0, 4)
    assert f"processes 1, 2, 3 of 4 did not arrive at 127.0.0.1:{port} " in stalled().why


def test_another_process_names_those_that_are_missing(process):
    port = process(1, 3)
    server = store(port, serves=True)
    server.set("ccella_fast/arrived/2", "127.0.0.1")
    assert f"process 0 of 3 did not arrive at 127.0.0.1:{port} " in stalled().why


def test_another_process_names_the_address_where_nothing_answers(process):
    port = process(1, 2)
    error = stalled()
    assert f"process 0 did not answer at 127.0.0.1:{port} " in error.why and socket.gethostname() in error.fix


@pytest.mark.parametrize("chosen", [None, "eth7"])
def test_the_block_is_executed_when_all_have_arrived(process, monkeypatch, chosen):
    """Not before: rank 1 is told by rank 0, which has seen all. gloo is to use the network over which they have met."""
    server = store(process(1, 2), serves=True)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", chosen or "")
    if chosen is None:
        monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    called = []

    def check() -> None:
        called.append(server.check(["ccella_fast/arrived/1"]))
        if len(called) == 3:
            server.set("ccella_fast/all_arrived", "127.0.0.1")

    with rendezvous(timedelta(minutes=1), check):
        assert called == [True] * 3 and os.environ["GLOO_SOCKET_IFNAME"] == (chosen or "lo")


def wait_for(condition, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.05)


def answers(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def check_stopped(process: subprocess.Popen, number: int) -> None:
    process.send_signal(number)
    output, _ = process.communicate(timeout=10)
    assert process.returncode == 128 + number, output
    assert output.endswith("stopped; run the same command again to continue\n") and output.count("stopped") == 1, output


def test_a_signal_ends_a_process_that_waits_for_another(tmp_path, data):
    """The third of three is missing. Before, SIGINT had no effect for half an hour, and SIGTERM no message."""
    config, port, folder = write_config(tmp_path / "config.json"), free_port(), tmp_path / "run"
    given = {"WORLD_SIZE": "3", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    first, second = (
        start("--config", config, "--data", data, "--output_dir", folder, RANK=rank, **given) for rank in "01"
    )
    wait_for(lambda: answers(int(port)), first)
    client = store(int(port))
    wait_for(lambda: client.check(["ccella_fast/arrived/0", "ccella_fast/arrived/1"]), second)
    check_stopped(second, signal.SIGTERM)
    check_stopped(first, signal.SIGINT)
    assert not folder.exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_before_process_zero_is_found_does_not_change_an_earlier_run(tmp_path, data, number):
    config, port, folder = write_config(tmp_path / "config.json", max_train_steps=2), free_port(), tmp_path / "run"
    arguments = ("--config", config, "--data", data, "--output_dir", folder)
    run(*arguments)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    given = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    process = start(*arguments, "--resume", **given)
    with socket.socket() as listener:  # another program, which closes the connection: the process tries again
        listener.bind(("127.0.0.1", int(port)))
        listener.listen()
        listener.settimeout(60)
        listener.accept()[0].close()
    check_stopped(process, number)
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.slow
def test_the_end_of_the_deepspeed_command_ends_a_process_that_waits(tmp_path, data):
    """SIGTERM to it reaches no other process, and the other machine's never come."""
    config, port, hosts = write_config(tmp_path / "config.json"), free_port(), tmp_path / "hosts"
    hosts.write_text("localhost slots=1\n127.0.0.1 slots=1\n")
    launcher = (
        str(Path(sys.executable).parent / "deepspeed"),
        "--hostfile",
        str(hosts),
        "--no_ssh",
        "--node_rank",
        "0",
    )
    launcher += ("--master_addr", "127.0.0.1", "--master_port", port)
    process = start("--config", config, "--data", data, "--output_dir", tmp_path / "run", launcher=launcher)
    wait_for(lambda: answers(int(port)), process)
    family = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGTERM)
    _, alive = psutil.wait_procs(family, timeout=10)
    for left in alive:
        left.kill()
    assert len(family) == 2 and not alive
    assert "stopped; run the same command again" in process.communicate()[0]
    assert not (tmp_path / "run").exists()
