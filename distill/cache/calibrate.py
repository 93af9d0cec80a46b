"""The layers' means that a cache's codes are relative to, measured once for each cache.

They come from clips sampled by seed over the whole list, so that no order of the list and no
`limit` colours them, and lie beside the shards. The first writer's file stays: every later
writer codes with it, and every shard names it by its hash.
"""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing

import torch
from einops import reduce
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from distill import draw
from distill.cache.codes import BITS, Codec
from distill.cache.identity import MEANS, MEANS_FILE, other_teachers, require_identity
from distill.cache.sealed import canonical
from distill.cache.store import Folder
from distill.data.index import Clip
from distill.data.load import ClipLoader, Task, View
from distill.errors import StateError
from distill.recipe import of_teacher

CALIBRATION_CLIPS = 64


def with_codec(identity: dict, codec: Codec | None) -> dict:
    """The identity of a cache's shards: the recipe's, and the means of their codes if any."""
    has_means = codec is not None and codec.means is not None
    return {**identity, MEANS: codec.means_sha256} if has_means else identity


def read_codec(folder: Folder, identity: dict) -> Codec | None:
    """The codec of a cache's records; None where its means have yet to be measured.

    `identity` is the recipe's. Raises StateError for means that are damaged or another recipe's.
    """
    kind = identity["objective.cache.codes"]
    if kind not in BITS:
        return Codec(kind, others={name: Codec(kind) for name in other_teachers(identity)})
    if MEANS_FILE not in folder.sizes(MEANS_FILE):
        return None
    content = folder.read(MEANS_FILE)
    try:
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        written = json.loads(header["__metadata__"]["written"])
        means = load(content)
        others = {
            name: Codec(kind, means=means[of_teacher("means", name)])
            for name in other_teachers(written["identity"])
        }
        codec = Codec(kind, means=means["means"], others=others)
        found, sha256 = written["identity"], written["sha256"]
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise _damaged(folder) from error
    if codec.means_sha256 != sha256:
        raise _damaged(folder)
    require_identity(found, identity, where=f"cache {folder}")
    return codec


def write_codec(
    folder: Folder, identity: dict, means: Tensor, others: Mapping[str, Tensor] | None = None
) -> Codec:
    """Keep the means of a cache that has none yet; returns the codec of those it then has.

    `others` are the means of the other teachers, by name. Whole or not at all, and never in the
    place of others: of writers that come at once one wins, and the others take its means.
    """
    kind, others = identity["objective.cache.codes"], others or {}
    codec = Codec(
        kind, means=means, others={name: Codec(kind, means=own) for name, own in others.items()}
    )
    written = canonical({"identity": identity, "sha256": codec.means_sha256})
    tensors = {"means": means, **{of_teacher("means", name): own for name, own in others.items()}}
    folder.create(MEANS_FILE, save(tensors, metadata={"written": written}))
    return read_codec(folder, identity)


def sample_clips(clips: Sequence[Clip], *, seed: int, count: int = CALIBRATION_CLIPS) -> list[Clip]:
    """The clips to measure on: drawn by their ids, whatever their places in the list."""
    ids = torch.tensor([clip.id for clip in clips], dtype=torch.int64)
    order = draw.uniform(ids, "calibration", seed, count=1)[:, 0].argsort(stable=True)
    return [clips[place] for place in order[:count]]


def measure_means(
    clips: Sequence[Clip],
    *,
    loader: ClipLoader,
    middle: Callable[[list[tuple[Task, View]]], Mapping[str, Tensor]],
    batch_size: int,
    advance: Callable[[int], None],
) -> dict[str, Tensor]:
    """Float32 means [K,E] over the rows of the clips' first views, accumulated in float64.

    `middle` turns loaded views into rows [K,B,M,E] by their teacher's name, and `advance` is told
    how many clips a batch had. Clips that cannot be decoded are left out; raises StateError when
    none can.
    """
    totals: dict[str, Tensor] = {}
    counts: Counter[str] = Counter()
    places = range(0, len(clips), batch_size)
    tasks = [[Task(clip, view=0) for clip in clips[place : place + batch_size]] for place in places]
    with closing(loader.run(tasks)) as batches:
        for items in batches:
            if items:
                for name, rows in middle(items).items():
                    own = reduce(rows.double(), "k b m e -> k e", "sum").cpu()
                    totals[name] = totals[name] + own if name in totals else own
                    counts[name] += rows.shape[1] * rows.shape[2]
            advance(len(items))
    if not totals:
        raise StateError(
            f"none of the {len(clips)} clips that the codes would be calibrated on can be decoded; "
            "check data.train.list and data.train.prefix"
        )
    return {name: (total / counts[name]).float() for name, total in totals.items()}


def _damaged(folder: Folder) -> StateError:
    return StateError(
        f"{folder.at(MEANS_FILE)}: damaged means of the cache's codes; put the file back, or "
        "delete it and the folder's shards and run 'distill cache-teacher' again"
    )
