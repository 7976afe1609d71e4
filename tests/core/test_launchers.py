"""The variables of each launcher as those of torchrun, or a message that names what is missing or contradicts."""

from __future__ import annotations

import pytest

from ccella_fast.errors import ConfigError
from ccella_fast.launchers import adopt_launcher, check_not_one_of_many, first_host

# What srun sets for the second of four tasks on two machines, and what mpirun and Hydra set for the second of two on one.
SRUN = {
    "SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_NTASKS": "4", "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1", "SLURM_GTIDS": "2,3", "SLURM_STEP_NODELIST": "gpu[03-04]", "SLURM_JOB_NODELIST": "gpu[01-04]",
}  # fmt: skip
OPEN_MPI = {f"OMPI_COMM_WORLD_{key}": value for key, value in
            {"RANK": "1", "SIZE": "2", "LOCAL_RANK": "1", "LOCAL_SIZE": "2"}.items()}  # fmt: skip
MVAPICH = {key.replace("OMPI", "MV2"): value for key, value in OPEN_MPI.items()}
HYDRA = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
TORCHRUN = {
    "RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "gpu03",
    "MASTER_PORT": "29500", "TORCHELASTIC_RUN_ID": "none",
}  # fmt: skip
SECOND_OF_TWO = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (SRUN, {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "gpu03"}),
        (OPEN_MPI, SECOND_OF_TWO), (MVAPICH, SECOND_OF_TWO), (HYDRA, SECOND_OF_TWO),
        # A step may be smaller than its allocation.
        ({**SRUN, "SLURM_NTASKS": "8"}, {"WORLD_SIZE": "4"}),
        # srun sets the variables of PMI too, for MPI libraries.
        ({**SRUN, "PMI_RANK": "3", "PMI_SIZE": "4"}, {"RANK": "3", "LOCAL_RANK": "1"}),
        # mpirun starts a process of its own on each machine with srun.
        ({**SRUN, **OPEN_MPI}, SECOND_OF_TWO),
        # srun may start torchrun or DeepSpeed's launcher on each machine: then their variables count.
        ({**SRUN, "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", **TORCHRUN}, TORCHRUN),
        ({**SRUN, "SLURM_STEP_NUM_TASKS": "1", **TORCHRUN}, TORCHRUN),
        # Users map what they know, and leave the rest to us.
        ({**SRUN, "RANK": "3", "WORLD_SIZE": "4"}, {"LOCAL_RANK": "1", "MASTER_ADDR": "gpu03"}),
        ({**SRUN, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "7"}, {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "7"}),
        # DeepSpeed's launcher names the number of local processes otherwise.
        ({**TORCHRUN, "LOCAL_WORLD_SIZE": "", "LOCAL_SIZE": "2"}, {"LOCAL_WORLD_SIZE": "2"}),
    ],
)  # fmt: skip
def test_launchers_are_mapped(given, expected):
    environ = {key: value for key, value in given.items() if value}
    adopt_launcher(environ)
    assert {key: environ.get(key) for key in expected} == expected
    assert environ["MASTER_PORT"].isdecimal()
    again = dict(environ)
    adopt_launcher(again)
    assert again == environ


@pytest.mark.parametrize(
    "alone",
    [
        {},
        {"SLURM_JOB_ID": "4711", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},  # a batch script
        {**SRUN, "SLURM_STEP_ID": str(0xFFFFFFFA), "SLURM_PROCID": "0"},  # a shell of salloc
        {**SRUN, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
        {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"},
        {"WORLD_SIZE": "1"},
    ],
)
def test_one_process_is_alone(alone):
    environ = dict(alone)
    adopt_launcher(environ)
    assert environ == alone


@pytest.mark.parametrize("changes", [{}, {"SLURM_STEP_ID": str(0xFFFFFFFA)}])
def test_an_allocation_for_several_needs_a_launcher(changes):
    shell = {"SLURM_JOB_ID": "4711", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", **changes}
    with pytest.raises(ConfigError, match=r"for 4 processes \(SLURM_NTASKS\), but no launcher") as caught:
        check_not_one_of_many(shell)
    assert "srun" in caught.value.fix
    for started in (SRUN, {**shell, **TORCHRUN}, {**shell, "SLURM_NTASKS": "1"}, {**SRUN, "SLURM_STEP_NUM_TASKS": "1"}):
        check_not_one_of_many(dict(started))


def without(given: dict[str, str], name: str) -> dict[str, str]:
    return {key: value for key, value in given.items() if key != name}


@pytest.mark.parametrize(
    ("given", "field", "words"),
    [
        (without(SRUN, "SLURM_PROCID"), "SLURM_PROCID", "srun has started several processes, but SLURM_PROCID"),
        (without(SRUN, "SLURM_LOCALID"), "SLURM_LOCALID", "is not set"),
        ({**SRUN, "SLURM_PROCID": "4"}, "SLURM_PROCID", "SLURM_PROCID is 4, but SLURM_STEP_NUM_TASKS is 4"),
        ({**SRUN, "SLURM_PROCID": "one"}, "SLURM_PROCID", "'one', not a number"),
        (without(OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_RANK"), "OMPI_COMM_WORLD_LOCAL_RANK", "Open MPI has started"),
        ({**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, "MASTER_ADDR", "MASTER_ADDR and MASTER_PORT are not set"),
        ({**SRUN, "RANK": "0", "WORLD_SIZE": "1"}, "RANK", "RANK is 0, but srun has started this process with SLURM_P"),
        ({**SRUN, "SLURM_PROCID": "0", "RANK": "0", "WORLD_SIZE": "1"}, "WORLD_SIZE", "SLURM_STEP_NUM_TASKS=4"),
        ({**SRUN, "WORLD_SIZE": "2"}, "WORLD_SIZE", "WORLD_SIZE is 2, but srun"),
        ({**HYDRA, "RANK": "1", "WORLD_SIZE": "3"}, "WORLD_SIZE", "with PMI_SIZE=2"),
        ({"RANK": "1"}, "WORLD_SIZE", "WORLD_SIZE is not set"),
        ({"WORLD_SIZE": "2"}, "RANK", "RANK is not set"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK", "RANK is 2, but WORLD_SIZE is 2"),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}, "MASTER_ADDR", "2 processes were started"),
        (without(TORCHRUN, "LOCAL_RANK"), "LOCAL_RANK", "LOCAL_RANK is not set"),
        ({**TORCHRUN, "LOCAL_RANK": "abc"}, "LOCAL_RANK", "'abc', not a number"),
        ({**TORCHRUN, "LOCAL_RANK": ""}, "LOCAL_RANK", "'', not a number"),
        ({**TORCHRUN, "LOCAL_RANK": "٣"}, "LOCAL_RANK", "not a number"),
        ({**TORCHRUN, "LOCAL_WORLD_SIZE": "0"}, "LOCAL_WORLD_SIZE", "0, not a number from 1"),
        ({**TORCHRUN, "MASTER_PORT": "65536"}, "MASTER_PORT", "65536, not a number from 1 to 65535"),
        ({**TORCHRUN, "MASTER_PORT": "9" * 50}, "MASTER_PORT", "not a number"),
    ],
)
def test_incomplete_and_contradicting_variables_are_named(given, field, words):
    with pytest.raises(ConfigError) as caught:
        adopt_launcher(dict(given))
    assert caught.value.field == field and words in caught.value.why


def test_all_processes_of_a_step_meet_at_one_port_and_steps_at_different_ones():
    def port(**changes: str) -> str:
        environ = {**SRUN, **changes}
        adopt_launcher(environ)
        return environ["MASTER_PORT"]

    assert port(SLURM_PROCID="0", SLURM_LOCALID="0") == port()
    assert len({port(), port(SLURM_STEP_ID="1"), port(SLURM_JOB_ID="4712")}) == 3


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu03", "gpu03"), ("gpu03,gpu04", "gpu03"), ("gpu[03-04,7],login", "gpu03"), ("gpu[7]", "gpu7"),
        ("rack[1-2]node[08,9]-ib", "rack1node08-ib"), ("a-1,b[1-2]", "a-1"),
    ],
)  # fmt: skip
def test_the_first_host_of_a_list(nodes, first):
    assert first_host(nodes) == first
