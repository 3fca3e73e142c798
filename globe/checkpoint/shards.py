"""The shards of a model on the Hub on their way here: while one is read, the next is fetched; those passed may go.

Whoever reads goes through the layers, forwards or backwards, and most layers lie in one or two shards.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from pathlib import Path
from threading import Lock, Thread
from typing import Any

from globe.checkpoint.header import TensorInfo, read_header
from globe.checkpoint.hub import HubRepo
from globe.errors import CheckpointError

_LAYER = re.compile(r"(?:.*\.)?(?:layers|blocks)\.\d+\.")


def layer_of(name: str) -> str:
    """What the names of all tensors of this one's layer begin with; empty where it is of none."""
    match = _LAYER.match(name)
    return match[0] if match else ""


class HubShards:
    """Fetches the shards of a repository when they are asked for, and the following one, up or down, of neighbours.

    They lie in the Hub's cache. With a `folder` they lie there instead, never more than `most` of them: as many as the
    tensors of one layer are spread over, next to the last that was asked for, and the one that is fetched meanwhile.
    """

    def __init__(
        self, repo: HubRepo, shards: Iterable[str], tensors: Mapping[str, TensorInfo], folder: Path | None = None
    ) -> None:
        self.folder = folder
        self._repo, self._tensors, self._lock = repo, tensors, Lock()
        self._infos: dict[str, list[TensorInfo]] = {shard: [] for shard in shards}
        spread = defaultdict[str, set[str]](set)
        for tensor in tensors.values():
            self._infos[tensor.shard].append(tensor)
            spread[layer_of(tensor.name)].add(tensor.shard)
        self._shards = [*self._infos]
        self._most_used = max(map(len, spread.values()), default=1)
        self._used = dict[str, Path]()
        self._ahead = dict[str, Future[Path]]()
        """The one that is fetched before it is asked for."""

    @property
    def most(self) -> int:
        """How many shards there are at once in the folder at most."""
        return min(self._most_used + 1, len(self._infos))

    @property
    def most_bytes(self) -> int:
        """The same in bytes of tensors."""
        return self.most * max(sum(tensor.nbytes for tensor in held) for held in self._infos.values())

    def path(self, shard: str) -> Path:
        """The file of a shard, once it is here.

        Raises `CheckpointError` where it cannot be fetched, and unless it is what the Hub announced.
        """
        with self._lock:
            if shard not in self._used:
                place, following = self._shards.index(shard), self._following(shard)
                if self.folder is not None:
                    nearest = sorted(self._used, key=lambda used: abs(self._shards.index(used) - place))
                    self._used = {used: self._used[used] for used in nearest[: self._most_used - 1]}
                    self._remove_all_but({*self._used, *self._ahead, shard, *following})
                fetched = self._ahead.pop(shard, None)
                self._used[shard] = self._fetch(shard) if fetched is None else fetched.result()
                self._fetch_ahead(following)
            return self._used[shard]

    def _following(self, shard: str) -> list[str]:
        """The one behind, or before where those in use are behind; none where the reading jumps: nobody knows then."""
        place = self._shards.index(shard)
        before, behind = self._shards[max(0, place - 1) : place], self._shards[place + 1 : place + 2]
        if not self._used or self._used.keys() & before:
            return behind
        return before if self._used.keys() & behind else []

    def settle(self) -> None:
        """Wait for what is being fetched, so that nothing is written any more."""
        for ahead in self._ahead.values():
            ahead.exception()

    def _fetch_ahead(self, following: list[str]) -> None:
        if not all(ahead.done() for ahead in self._ahead.values()):  # of an order that was not kept to
            return
        self._ahead.clear()
        if self.folder is not None:
            self._remove_all_but({*self._used, *following})
        for shard in following:
            if shard not in self._used:
                ahead = self._ahead[shard] = Future[Path]()
                Thread(target=self._fulfil, args=(shard, ahead), daemon=True).start()

    def _fulfil(self, shard: str, ahead: Future[Path]) -> None:
        try:
            ahead.set_result(self._fetch(shard, quietly=True))
        except BaseException as error:  # whoever asks for it hears of it
            ahead.set_exception(error)

    def _fetch(self, shard: str, *, quietly: bool = False) -> Path:
        path = self._repo.fetch(shard, self.folder, quietly=quietly)
        if read_header(path, shard) != self._infos[shard]:
            raise CheckpointError(f"{shard}: the header of the downloaded file is not the one the Hub announced")
        return path

    def _remove_all_but(self, kept: Iterable[str]) -> None:
        assert self.folder is not None
        for shard in self._infos.keys() - kept:
            (self.folder / shard).unlink(missing_ok=True)

    def __reduce__(self) -> tuple[Any, ...]:
        """Other processes fetch by themselves."""
        return HubShards, (self._repo, self._shards, self._tensors, self.folder)
