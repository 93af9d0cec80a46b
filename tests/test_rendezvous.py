"""Processes of a job find each other, whatever an attempt before them left in the store."""

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from torch.distributed import TCPStore

from distill.rendezvous import attempt_store


@pytest.fixture
def server():
    return TCPStore("localhost", 0, is_master=True, wait_for_workers=False)


def client(server: TCPStore) -> TCPStore:
    return TCPStore("localhost", server.port, is_master=False, timeout=timedelta(seconds=30))


def meet(server: TCPStore, ranks: list[int], *, count: int = 3) -> list:
    with ThreadPoolExecutor(len(ranks)) as pool:
        futures = [
            pool.submit(attempt_store, client(server), rank=rank, count=count) for rank in ranks
        ]
        return [future.result(60) for future in futures]


def test_all_processes_of_an_attempt_share_what_no_other_attempt_reads(server):
    first = meet(server, [0, 1, 2])
    first[1].set("address", "one")
    assert [store.get("address") for store in first] == [b"one"] * 3
    second = meet(server, [2, 1, 0])
    assert not any(store.check(["address"]) for store in second)
    second[0].set("address", "two")
    assert [store.get("address") for store in second] == [b"two"] * 3
    assert first[0].get("address") == b"one"


def test_one_that_is_early_waits_for_this_attempts_first_process(server):
    """The dead rank 0 has answered everyone; the new rank 1 must not take its word."""
    (old, *_) = meet(server, [0, 1, 2])
    with ThreadPoolExecutor(1) as pool:
        early = pool.submit(attempt_store, client(server), rank=1, count=3)
        with pytest.raises(TimeoutError):
            early.result(0.5)
        new = meet(server, [0, 2])
        early.result(60).set("address", "one")
    assert [store.get("address") for store in new] == [b"one"] * 2
    assert not old.check(["address"])


def test_an_asker_that_died_unheard_keeps_nobody_from_meeting(server):
    client(server).set("ask/1", "dead")
    (first, other) = meet(server, [0, 1], count=2)
    first.set("address", "one")
    assert other.get("address") == b"one"
