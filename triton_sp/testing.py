"""A public test kit: run functions on several CPU ranks, compare gradients, count what is saved for the backward.

>>> from triton_sp.testing import relative_error
>>> import torch
>>> relative_error(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0]))
0.0
"""

from __future__ import annotations

import gc
import multiprocessing as mp
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any
from unittest import mock
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import Tensor, nn


def relative_error(found: Tensor, expected: Tensor) -> float:
    """||found - expected|| / ||expected|| in float64, or ||found|| if `expected` is zero."""
    size = float(expected.detach().double().norm())
    difference = float((found.detach().double() - expected.detach().double()).norm())
    return difference / size if size else difference


@dataclass(eq=False)
class _Saved:
    tensor: Tensor


@contextmanager
def saved_activations(model: nn.Module) -> Iterator[list[int]]:
    """Count the bytes that a forward saves for the backward, without parameters.

    Yields:
        A list, which holds that number when the block has ended.

    >>> with saved_activations(torch.nn.Linear(3, 3)) as size:
    ...     _ = torch.nn.functional.gelu(torch.zeros(4, requires_grad=True))
    >>> size
    [16]
    """
    kept: WeakSet[_Saved] = WeakSet()  # weak, so that it forgets results that are not part of the graph any more

    def pack(x: Tensor) -> _Saved:
        saved = _Saved(x.detach())
        kept.add(saved)
        return saved

    size: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
        yield size
    storages = {(s := saved.tensor.untyped_storage()).data_ptr(): s.nbytes() for saved in kept}
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    size.append(sum(count for place, count in storages.items() if place not in parameters))


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill all new memory with NaN, or with the largest integer, so that reading before writing is noticed.

    >>> with poisoned_memory():
    ...     bool(torch.empty(3).isnan().all())
    True
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # fill_uninitialized_memory needs it
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def _serve(rank: int, pipe: Connection) -> None:
    """The main function of a rank process: run one job after another, each in a process group of its own."""
    torch.set_num_threads(1)
    gc.set_threshold(50_000, 20)  # going through all that is imported again and again took 8 % of the suite
    while (job := pipe.recv()) is not None:
        store, ranks, function, args = job
        try:
            dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
            dist.barrier()  # so that a short job does not end while other ranks are still connecting
            answer = ForkingPickler.dumps((True, function(*args)))
        except BaseException as error:
            answer = ForkingPickler.dumps((False, (error, traceback.format_exc())))
        if dist.is_initialized():
            dist.destroy_process_group()  # before the answer, after which the folder of the store is removed
        pipe.send_bytes(answer)


class RankError(AssertionError):
    """A job has failed on some ranks.

    Attributes:
        errors: the exceptions by rank; EOFError if a process has ended.
        results: what the job returned, in rank order; exceptions with their tracebacks for ranks that failed.
    """

    def __init__(self, errors: dict[int, BaseException], text: str, results: list[Any]) -> None:
        self.errors, self.results = errors, results
        super().__init__(text)


class RankPool:
    """Processes that work as ranks and stay alive between jobs.

    They are forked from one process that has imported modules and done nothing else: to import transformers takes each
    rank 5 s of computing otherwise. It stays alive as long as the program, for all pools; what it imports is decided by
    the first.

    Args:
        preload: modules that it imports beside this library.

    >>> pool = RankPool()
    >>> pool.run(dist.get_rank, ranks=2)
    [0, 1]
    >>> pool.close()
    """

    def __init__(self, preload: Sequence[str] = ()) -> None:
        self._context = mp.get_context("forkserver")
        self._context.set_forkserver_preload([__name__, *preload])
        # It would look for modules on a path of its own, before Python 3.13.
        with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):
            forkserver.ensure_running()
        self._workers: list[tuple[Any, Connection]] = []

    def _start(self, ranks: int) -> None:
        for rank in range(ranks):
            if rank == len(self._workers):
                self._workers.append(self._worker(rank))
            elif not self._workers[rank][0].is_alive():
                self._workers[rank] = self._worker(rank)

    def _worker(self, rank: int) -> tuple[Any, Connection]:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_serve, args=(rank, theirs), daemon=True)
        process.start()
        theirs.close()  # so that reading from ours fails when the process ends
        return process, ours

    def run(self, function: Callable[..., Any], *args: Any, ranks: int, timeout: float = 240.0) -> list[Any]:
        """Call `function(*args)` on each rank of a new default group (gloo), and return the results in rank order.

        Args:
            function: a function of a module, with arguments and results that can be pickled.
            ranks: the size of the group.
            timeout: how many seconds to wait for a rank.

        Raises:
            RankError: a rank has raised an exception, or its process has ended.
            TimeoutError: a rank has not answered. All are killed, and started anew by the next call.
        """
        self._start(ranks)
        errors: dict[int, BaseException] = {}
        texts, results = [], []
        with tempfile.TemporaryDirectory() as folder:
            for _, pipe in self._workers[:ranks]:
                pipe.send((Path(folder) / "store", ranks, function, args))
            for rank, (process, pipe) in enumerate(self._workers[:ranks]):
                if not pipe.poll(timeout):
                    self.close()
                    raise TimeoutError(f"rank {rank} did not finish {function.__name__} within {timeout} s")
                try:
                    ok, value = pipe.recv()
                except EOFError as error:
                    process.kill()  # it may be about to end; `_start` must not take it for one that lives
                    process.join()
                    ok, value = False, (error, "its process has ended")
                results.append(value)
                if not ok:
                    errors[rank] = value[0]
                    texts.append(f"--- rank {rank}\n{value[1]}")
        if errors:
            raise RankError(errors, "\n".join(texts), results)
        return results

    def close(self) -> None:
        """End all processes."""
        for process, _ in self._workers:
            process.kill()
            process.join()
        self._workers.clear()
