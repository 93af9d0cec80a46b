"""Where the processes of a job find each other, again after every restart.

torchrun serves one key-value store for all attempts of a job (`--max-restarts`). A process that
reads an address there which an earlier attempt left would wait for ever for a dead one. Nothing in
the environment numbers attempts alike on all machines, so processes agree on a name first.
"""

import secrets
import time

from torch.distributed import PrefixStore, Store

POLL_SECONDS = 0.02


def attempt_store(store: Store, *, rank: int, count: int) -> PrefixStore:
    """The part of `store` that belongs to this attempt of `count` processes alone.

    Each process asks under a name that was never used before; rank 0 answers all it reads, of
    the dead too, until each has said that it has this attempt's name.
    """
    own = secrets.token_hex(8)
    if rank:
        store.set(f"ask/{rank}", own)
        _wait_for(store, f"answer/{own}")
        name = store.get(f"answer/{own}").decode()
        store.set(f"heard/{name}/{rank}", "")
        return PrefixStore(name, store)
    missing = list(range(1, count))
    while missing:
        for other in missing:
            if store.check([f"ask/{other}"]):
                store.set(f"answer/{store.get(f'ask/{other}').decode()}", own)
        missing = [other for other in missing if not store.check([f"heard/{own}/{other}"])]
        time.sleep(POLL_SECONDS)
    return PrefixStore(own, store)


def _wait_for(store: Store, key: str) -> None:
    """Not by the store's own wait, which is deaf to signals."""
    while not store.check([key]):
        time.sleep(POLL_SECONDS)
