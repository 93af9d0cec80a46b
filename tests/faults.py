"""What workers are given to load in tests: small views, and every way to go wrong.

The clip's name says what happens. Kept apart from the tests so that workers import little.
"""

import ctypes
import os
import signal
import time

import numpy as np

from distill.data.index import Clip
from distill.data.load import Task, View
from distill.errors import InputError


def task(name: str, number: int = 0) -> Task:
    return Task(Clip(id=number, path=f"/videos/{name}", name=name, label=number, line=number + 1))


def load(task: Task) -> View:
    action, _, argument = task.clip.name.partition(" ")
    match action:
        case "sleep":
            time.sleep(float(argument))
        case "hang":  # in a way that no exception or signal handler ends
            signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
            ctypes.CDLL(None).sleep(1000)
        case "segfault":
            os.kill(os.getpid(), signal.SIGSEGV)
        case "exit":
            os._exit(int(argument))
        case "damaged":
            raise InputError(f"{task.clip.path}: the file is empty")
        case "memory":
            raise MemoryError
        case "bug":
            raise KeyError("a mistake of ours")
        case "note":
            with open(argument, "a") as file:
                file.write("tried\n")
            raise InputError(f"{task.clip.path}: noted")
        case "interrupt":
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)
    return view(number=task.clip.id)


def view(number: int) -> View:
    """A view that carries a number in its pixels and its process in `decoder`."""
    return View(
        pixels=np.full((3, 2, 4, 4), number % 256, np.uint8),
        frames=np.arange(2),
        pts_seconds=np.zeros(2),
        crop=(0, 0, 4, 4),
        flip=False,
        decoder=str(os.getpid()),
    )


class Unloadable:
    """Arrives in no worker."""

    def __reduce__(self):
        return _fail, ()


def _fail():
    raise ImportError("no such thing here")
