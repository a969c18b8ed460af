"""What could let ranks wait for one another for ever: a rank that does something else, sleeps, or lives on without."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import Any

import torch
import torch.distributed as dist
from fault import Fault, batch, culprit, fresh, layer, step, text
from kit import mishaps
from torch.utils.data import DataLoader

import triton_sp
from triton_sp import SPConfig, errors
from triton_sp.errors import DisagreementError, PeerError

HEARTBEAT = SPConfig(heartbeat=1.0)  # a rank that does not come for 10 s has left


def interrupted_while_waiting() -> None:
    model = triton_sp.wrap(fresh())
    step(model, batch())
    if culprit():
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets what it runs beside it ignore SIGINT
        threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT)).start()
    elif dist.get_rank() == 0:
        time.sleep(3)
    step(model, batch())


def alike_but_apart() -> None:
    """All ranks fail in the same way, one of them later, and go on."""
    model = triton_sp.wrap(fresh())

    def fail(*_: Any) -> None:
        time.sleep(2.5 * culprit())
        raise MemoryError("out of memory")

    hook = layer(model).register_forward_pre_hook(fail)
    try:
        step(model, batch())
    except (MemoryError, errors.PeerError):
        hook.remove()
    step(model, batch())


def other_limits() -> None:
    data = [{"input_ids": torch.arange(8)} for _ in range(4)]
    for _ in triton_sp.share_batches(DataLoader(data), limit=1 << 10 if culprit() else 1 << 20):  # type: ignore[arg-type]
        pass


def in_a_forked_child() -> None:
    model = triton_sp.wrap(fresh())
    loss = step(model, batch())
    child = os.fork()
    if not child:
        try:
            model(**batch())
        except errors.GroupError as error:
            os._exit(0 if "forked" in str(error) else 1)
        finally:
            os._exit(2)
    assert os.waitpid(child, 0)[1] == 0
    model.zero_grad()
    assert float(step(model, batch())) == float(loss)


def in_two_threads() -> None:
    """Two models, each with a group and a thread of its own; the ranks' threads begin in another order."""
    everyone = list(range(dist.get_world_size()))
    models = [triton_sp.wrap(fresh(), dist.new_group(everyone)) for _ in range(2)]
    losses: list[list[float]] = [[], []]

    def train(number: int) -> None:
        time.sleep(0.3 * (number == dist.get_rank() % 2))
        for _ in range(3):
            models[number].zero_grad()
            losses[number].append(float(step(models[number], batch())))

    threads = [threading.Thread(target=train, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert losses[0] == losses[1] and len(losses[0]) == 3, losses


def lives_on(wrapped: bool) -> None:
    """A rank leaves the loop, or never wraps, and its process does something else."""
    if culprit() and not wrapped:
        fresh()(**batch())
        time.sleep(15)
        return
    model = triton_sp.wrap(fresh(), config=HEARTBEAT)
    step(model, batch())
    if culprit():
        time.sleep(15)
        return
    step(model, batch())


def stopped_without_a_timeout() -> None:
    model = triton_sp.wrap(fresh(), config=HEARTBEAT)
    step(model, batch())
    if culprit():
        mishaps.stop(6)
        return
    step(model, batch())


def slow_and_alive() -> None:
    """Slower than a heartbeat, but alive."""
    model = triton_sp.wrap(fresh(), config=HEARTBEAT)
    step(model, batch())
    if culprit():
        time.sleep(4)
    step(model, batch())


def generates_meanwhile() -> None:
    """A rank generates for longer than it may stay away; every token is a sign that it is there."""
    model: Any = triton_sp.wrap(fresh(), config=HEARTBEAT)
    step(model, batch())
    if culprit():
        begin = time.monotonic()
        while time.monotonic() < begin + 12:
            model.eval().generate(input_ids=text(5)["input_ids"], max_new_tokens=2, do_sample=False)
        model.train()
    step(model, batch())


FAULTS: dict[str, Fault] = {
    "SIGINT while waiting": Fault(interrupted_while_waiting, PeerError),
    "all fail alike, seconds apart": Fault(alike_but_apart, PeerError, names_rank=False),
    "share_batches with other limits": Fault(other_limits, DisagreementError),
    "a forked child calls the model": Fault(in_a_forked_child),
    "two models in two threads": Fault(in_two_threads),
    "leaves the loop and lives on": Fault(lambda: lives_on(True), PeerError),
    "forgets to wrap and lives on": Fault(lambda: lives_on(False), PeerError),
    "stopped, and no time-out": Fault(stopped_without_a_timeout, PeerError),
    "slow and alive": Fault(slow_and_alive),
    "generates meanwhile": Fault(generates_meanwhile),
}
