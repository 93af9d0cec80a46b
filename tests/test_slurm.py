"""What a command learns of itself from SLURM."""

import pytest

from distill.errors import InputError
from distill.slurm import node_names, torchrun_variables

STEP = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_NTASKS": "8",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "gpu[03-04]",
    "SLURM_JOB_NODELIST": "gpu[01-04]",
    "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.1",
}
# As in a batch script or the shell of an salloc: the number of tasks that srun would start.
JOB = {name: STEP[name] for name in ("SLURM_JOB_ID", "SLURM_NTASKS", "SLURM_JOB_NODELIST")}


@pytest.mark.parametrize(
    ("nodes", "names"),
    [
        ("a", ["a"]),
        ("a-1", ["a-1"]),
        ("a-1,b.c", ["a-1", "b.c"]),
        ("node[03-05,9]", ["node03", "node04", "node05", "node9"]),
        ("a-1,gpu-[098-101]-ib", ["a-1", *(f"gpu-{n}-ib" for n in ("098", "099", "100", "101"))]),
        ("r[1-2]n[07,9]", ["r1n07", "r1n9", "r2n07", "r2n9"]),
    ],
)
def test_a_list_of_nodes_is_their_names(nodes, names):
    assert list(node_names(nodes)) == names


@pytest.mark.parametrize("nodes", ["", "a,", "a[", "a[1", "a[]", "a[1-2-3]", "a[x]", "a]"])
def test_what_is_no_list_of_nodes_is_refused(nodes):
    with pytest.raises(InputError) as caught:
        next(node_names(nodes))
    assert str(caught.value) == (
        f"SLURM_STEP_NODELIST={nodes}: expected hosts such as node[03-05,9]; set MASTER_ADDR to "
        "the host of the first task"
    )


def test_a_task_of_srun_is_a_process_of_torchrun():
    assert torchrun_variables(STEP) == {
        "RANK": "5",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "gpu03",
        "MASTER_PORT": str(15000 + 4711),
    }


def test_steps_of_one_job_have_ports_of_their_own_that_systems_do_not_give_away():
    ports = {
        int(torchrun_variables({**STEP, "SLURM_STEP_ID": str(step)})["MASTER_PORT"])
        for step in range(20)
    }
    assert len(ports) == 20
    far = torchrun_variables({**STEP, "SLURM_JOB_ID": "98765432"})
    assert all(15000 <= port < 32768 for port in (*ports, int(far["MASTER_PORT"])))


def test_a_place_to_meet_that_is_set_stays():
    found = torchrun_variables({**STEP, "MASTER_ADDR": "10.1.1.1", "MASTER_PORT": "29500"})
    assert (found["MASTER_ADDR"], found["MASTER_PORT"]) == ("10.1.1.1", "29500")


@pytest.mark.parametrize(
    "environment",
    [
        {},
        JOB,
        {**JOB, "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},
        {**STEP, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
        {**STEP, "RANK": "3", "WORLD_SIZE": "16"},
    ],
    ids=["no SLURM", "salloc", "batch script", "step of one task", "torchrun in a step"],
)
def test_elsewhere_nothing_is_taken_from_slurm(environment):
    assert torchrun_variables(environment) == {}


def test_a_variable_that_srun_would_set_is_named():
    broken = {name: value for name, value in STEP.items() if name != "SLURM_PROCID"}
    with pytest.raises(InputError, match="^SLURM_PROCID=nothing: expected the number that srun s"):
        torchrun_variables(broken)
