"""Several processes of one run, started by torchrun: rank 0 runs the command, the others do work that it hands out.

What is handed out are calls of a function that do not depend on each other: each is made by whichever process is free,
and gives what it would give in one process alone. Or all make one call at the same time, and hand tensors on in a ring.
Functions, arguments and results travel by torch.distributed, with gloo on GPUs too, since what is large lies in files,
which all processes see.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeVar

from globe.errors import RankError
from globe.machine.ring import LONGEST, Ring, StartedRing, explained, wait_for

if TYPE_CHECKING:
    from globe.run.observer import Observer

T = TypeVar("T")
_FAILED = 1


class Ranks:
    """Who makes calls that do not depend on each other: this process alone."""

    size = 1
    num_here = 1
    """Of them, on this machine."""
    is_follower = False

    def map(self, function: Callable[..., T], *arguments: Iterable[Any], watch: Observer | None = None) -> list[T]:
        """What the builtin `map` gives, as a list. With `watch` the function has an observer as its last argument, and
        what is told to that reaches `watch`."""
        calls = zip(*arguments, strict=True)
        return [function(*call) if watch is None else function(*call, watch) for call in calls]

    def together(self, function: Callable[..., T], *arguments: Any, watch: Observer | None = None) -> list[T]:
        """What each process gives, by rank, when all call the function at the same time, with these arguments and the
        ring that they form; with `watch` as `map` does."""
        return [function(*arguments, Ring()) if watch is None else function(*arguments, Ring(), watch)]

    def serve(self) -> int:
        """Make the calls that rank 0 hands out, until it ends the run; returns its exit status. None for one alone."""
        return 0


ALONE = Ranks()


def with_ranks(command: Callable[[Ranks], int]) -> int:
    """Call the command with the processes that torchrun has started, in each of them, or else with this one alone.

    It gives the ranks to what can use them, or has a follower `serve`. Returns the exit status of one process; one of
    several ends here with it, and all with the same unless one of them fails.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or os.environ.get("WORLD_SIZE", "1") == "1":
        return command(ALONE)
    ranks = _Started()
    try:
        status = command(ranks)
    except SystemExit as leaving:  # of the command line, with its help or for wrong arguments
        status = leaving.code if isinstance(leaving.code, int) else _FAILED
    ranks.end(status)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)  # gloo would wait for those that are still at work, and now and then aborts while Python ends


class _Started(Ranks):
    """One of several processes."""

    def __init__(self) -> None:
        import torch
        from torch import distributed
        from torch.distributed.rendezvous import rendezvous

        if torch.cuda.is_available():  # what settings call cuda is another GPU in each process of a machine
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        self._torch = distributed
        self._store, rank, self.size = next(rendezvous("env://", timeout=LONGEST))
        distributed.init_process_group("gloo", store=self._store, rank=rank, world_size=self.size, timeout=LONGEST)
        self.num_here, self.is_follower = int(os.environ["LOCAL_WORLD_SIZE"]), rank > 0
        self._watch: Observer | None = None
        self._num_maps = self._num_heard = 0
        self._is_idle, self._is_over = True, False

    def map(self, function: Callable[..., T], *arguments: Iterable[Any], watch: Observer | None = None) -> list[T]:
        return self._lead(function, list(zip(*arguments, strict=True)), watch, in_ring=False)

    def together(self, function: Callable[..., T], *arguments: Any, watch: Observer | None = None) -> list[T]:
        return self._lead(function, [arguments] * self.size, watch, in_ring=True)

    def serve(self) -> int:
        try:
            while not isinstance(work := self._hand_out(None), int):
                self._share(*work)
        except (RankError, KeyboardInterrupt):  # rank 0 tells of it, or the process that failed
            return _FAILED
        self._is_over = True
        return work

    def end(self, status: int) -> None:
        """End the run in all processes, unless they are at work."""
        if self._is_idle and not self.is_follower:
            with contextlib.suppress(RankError):
                self._hand_out(status)
                self._is_over = True
        if self._is_over:
            self._torch.destroy_process_group()

    def _lead(
        self, function: Callable[..., T], calls: list[tuple[Any, ...]], watch: Observer | None, *, in_ring: bool
    ) -> list[T]:
        """Have all make the calls, this process among them; returns what they give, in order."""
        self._watch, self._is_idle = watch, False
        work = function, calls, watch is not None, in_ring
        self._hand_out(work)
        results = self._share(*work)
        self._is_idle = True
        return [results[place] for place in range(len(calls))]

    def _hand_out(self, work: Any) -> Any:
        """What rank 0 gives, to all."""
        given = [work]
        self._meet()
        with explained():
            self._torch.broadcast_object_list(given)
        return given[0]

    def _share(
        self, function: Callable[..., T], calls: list[tuple[Any, ...]], is_watched: bool, in_ring: bool
    ) -> dict[int, T]:
        """Make calls until none is left, or in a ring the one of this rank; rank 0 gets the results of all, by their
        places."""
        from globe.run.observer import Told

        self._num_maps += 1
        extra = (Told(self._tell),) if is_watched else ()
        made, of_all = dict[int, T](), [dict[int, T]() for _ in range(self.size)]
        if in_ring:
            ring = StartedRing()
            made[ring.rank] = function(*calls[ring.rank], ring, *extra)
            ring.settle()
        else:
            while (place := self._take()) < len(calls):
                made[place] = function(*calls[place], *extra)
        self._meet()
        with explained():
            self._torch.gather_object(made, None if self.is_follower else of_all)
        return {place: result for results in of_all for place, result in results.items()}

    def _take(self) -> int:
        """The place of a call that nobody has taken."""
        with explained():
            return self._store.add(f"taken {self._num_maps}", 1) - 1

    def _tell(self, method: str, *arguments: Any) -> None:
        """Call a method of the observer that watches, in rank 0."""
        if not self.is_follower:
            self._hear()
            getattr(self._watch, method)(*arguments)
            return
        with explained():
            call: Any = pickle.dumps((method, arguments))  # a store takes bytes, whatever its stubs say
            self._store.set(f"told {self._store.add('told', 1)}", call)

    def _hear(self) -> None:
        """In rank 0, make the calls that the others have sent."""
        while not self.is_follower and (call := self._next_call()) is not None:
            method, arguments = call
            getattr(self._watch, method)(*arguments)

    def _next_call(self) -> tuple[str, tuple[Any, ...]] | None:
        with explained():
            if not self._store.check([key := f"told {self._num_heard + 1}"]):
                return None
            call = pickle.loads(self._store.get(key))
            self._store.delete_key(key)
        self._num_heard += 1
        return call

    def _meet(self) -> None:
        """Wait for all; `RankError` if one of them has ended. Signals are heard meanwhile, and what is told."""
        with explained():
            arrived = self._torch.barrier(async_op=True)
        assert arrived is not None
        wait_for(arrived, self._hear)
        self._hear()
