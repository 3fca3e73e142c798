"""Processes in a circle: each hands tensors on to the next, or back to the one before, and does not wait for it."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from globe.errors import RankError

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import Work

LONGEST = timedelta(days=20)
"""That one process may wait for another: a call can take long, and gloo counts milliseconds in 32 bits."""
_NAP = 0.01
"""Seconds between two looks at whether something is done."""


class Ring:
    """A circle of this process alone: what it gives comes to itself. What comes, comes in the order of giving."""

    rank, size = 0, 1

    def __init__(self) -> None:
        self._given = deque["Tensor"]()

    def turns(self, count: int) -> range:
        """Of things dealt out in turn, those of this process."""
        return range(self.rank, count, self.size)

    def give(self, tensor: Tensor, *, back: bool = False) -> None:  # noqa: ARG002
        """Hand a tensor on to the next process, or back to the one before. It is not to be changed any more."""
        self._given.append(tensor)

    def take(self, like: Tensor, *, back: bool = False) -> Tensor:  # noqa: ARG002
        """What was handed on, or back, to this process: in shape, dtype and device like another. Waits for it; raises
        `RankError` if the process that is to give it has ended."""
        return self._given.popleft()

    def settle(self) -> None:
        """Wait until all that was given is taken."""


class StartedRing(Ring):
    """One of several processes of torch.distributed's. All make it at the same time."""

    def __init__(self) -> None:
        from torch import distributed

        self._torch = distributed
        self.rank, self.size = distributed.get_rank(), distributed.get_world_size()
        self._under_way = deque["Work"]()
        with explained():
            self._to_next: list[Any] = [
                distributed.new_group([rank, (rank + 1) % self.size], LONGEST, "gloo") for rank in range(self.size)
            ]

    def give(self, tensor: Tensor, *, back: bool = False) -> None:
        while self._under_way and self._under_way[0].is_completed():
            wait_for(self._under_way.popleft())
        self._under_way.append(self._pass_on(tensor.detach().cpu().contiguous(), self.rank, back=back))

    def take(self, like: Tensor, *, back: bool = False) -> Tensor:
        there = like.new_empty(like.shape, device="cpu")
        wait_for(self._pass_on(there, (self.rank + (1 if back else -1)) % self.size, back=back))
        return there.to(like.device)

    def settle(self) -> None:
        while self._under_way:
            wait_for(self._under_way.popleft())

    def _pass_on(self, tensor: Tensor, giver: int, *, back: bool) -> Work:
        """Between a process and one beside it, by a broadcast, which can be looked at while it is under way."""
        with explained():
            work = self._torch.broadcast(tensor, giver, self._to_next[(giver - back) % self.size], async_op=True)
        assert work is not None
        return work


def wait_for(work: Work, meanwhile: Callable[[], None] = lambda: None) -> None:
    """Wait for what is under way between processes, while signals are heard and something else is done now and then.

    Raises `RankError` if one of them has ended.
    """
    while not work.is_completed():
        time.sleep(_NAP)
        meanwhile()
    with explained():
        work.wait()


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Turn what torch says of a connection into a `RankError`."""
    try:
        yield
    except RuntimeError as error:
        raise RankError(
            "another process of this run ended before its work was done: it says why above, or was killed, for want of "
            "memory most often; what is finished is kept, and the same command goes on, in as many processes as you "
            "like"
        ) from error
