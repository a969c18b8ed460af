"""The catalogue of what can go wrong on a rank. Each case returns the right result on every rank, or raises an error on
every rank that is left. `make faults` runs all of them on 2 and 4 ranks and writes reports/faults.csv."""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from kit import parity, tiny, zoo
from torch import nn
from torch.utils.data import DataLoader

import triton_sp
from triton_sp import SPConfig, errors
from triton_sp.testing import RankError, RankPool, relative_error

PATIENCE = 3.0  # seconds, the timeout of the process group where a rank stops
CASE = zoo.CASES["llava"]


def fresh() -> nn.Module:
    return CASE.model()


def batch(name: str = "plain") -> tiny.Batch:
    return CASE.batch(name)


def text(length: int, rows: int = 1) -> tiny.Batch:
    ids = torch.randint(tiny.FIRST_TEXT, tiny.VOCAB, (rows, length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids.clone()}


def culprit() -> bool:
    return dist.get_rank() == dist.get_world_size() - 1


def step(model: nn.Module, inputs: tiny.Batch) -> torch.Tensor:
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach()


# --- the right result ----------------------------------------------------------------------------------------------


def compared(inputs: tiny.Batch) -> None:
    """One step is that of the model in one process."""
    model, expected = fresh(), fresh()
    if (inputs["labels"][:, 1:] == -100).all():
        loss = 0 * sum(parameter.sum() for parameter in expected.parameters())
        loss.backward()  # transformers' own is NaN
    else:
        loss = step(expected, inputs)
    found = step(triton_sp.wrap(model), inputs)
    triton_sp.sync_gradients(model)
    assert relative_error(found, loss) < 1e-6, (found, loss)
    if float(loss.detach()):
        error = parity.gradient_error(parity.gradients(model), parity.gradients(expected))
        assert error[0] < 1e-6, error
    else:
        assert all(float(grad.norm()) == 0 for grad in parity.gradients(model).values())


def images_first() -> tiny.Batch:
    """All images in the first rank's part of the text."""
    inputs, tail = batch(), text(200)
    return inputs | {key: torch.cat([inputs[key], tail[key]], 1) for key in ("input_ids", "labels")}


def nan_in_padding() -> tiny.Batch:
    inputs = text(9, rows=2)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["attention_mask"][1, 5:] = 0
    inputs["labels"][1, 5:] = -100
    torch.manual_seed(0)
    embeds = torch.randn(2, 9, tiny.WIDTH, dtype=CASE.dtype)
    del inputs["input_ids"]
    return inputs | {"inputs_embeds": embeds}


def compared_nan_in_padding() -> None:
    inputs, model, expected = nan_in_padding(), fresh(), fresh()
    loss = step(expected, inputs)
    poisoned = inputs | {"inputs_embeds": inputs["inputs_embeds"].clone()}
    poisoned["inputs_embeds"][1, 5:] = torch.nan
    assert relative_error(step(triton_sp.wrap(model), poisoned), loss) < 1e-6


def slow() -> None:
    if culprit():
        time.sleep(2)
    compared(batch())


# --- an error on every rank ----------------------------------------------------------------------------------------


def fewer_placeholders() -> None:
    inputs = batch("right_pad")
    inputs["input_ids"][inputs["input_ids"] == tiny.IMAGE] = tiny.FIRST_TEXT
    step(triton_sp.wrap(fresh()), inputs)


def fails_in_plan() -> None:
    model = triton_sp.wrap(fresh())
    broken = mock.patch("triton_sp.wrappers.entry.plan_decoder", side_effect=MemoryError("no plan"))
    with broken if culprit() else mock.patch.object(time, "time", time.time):
        step(model, batch())


def boom(*_: Any) -> None:
    raise MemoryError("out of memory")


def layer(model: nn.Module) -> nn.Module:
    return model.model.language_model.layers[1]


def fails_in_forward() -> None:
    model = triton_sp.wrap(fresh())
    if culprit():
        layer(model).mlp.register_forward_pre_hook(boom)
    step(model, batch())


def fails_in_backward() -> None:
    model = triton_sp.wrap(fresh())
    if culprit():
        layer(model).mlp.register_full_backward_pre_hook(boom)
    step(model, batch())


def leaves(how: Callable[[], None], where: str) -> None:
    """A rank ends or stops in the forward or the backward."""
    group = dist.new_group(list(range(dist.get_world_size())), timeout=timedelta(seconds=PATIENCE))
    model = triton_sp.wrap(fresh(), group)
    if culprit():
        module = layer(model).mlp
        hook = module.register_forward_pre_hook if where == "forward" else module.register_full_backward_pre_hook
        hook(lambda *_: how())
    step(model, batch())


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stopped() -> None:
    """Until another process wakes it, after the others should have given up."""
    subprocess.Popen(["sh", "-c", f"sleep {2 * PATIENCE}; kill -CONT {os.getpid()}"])
    os.kill(os.getpid(), signal.SIGSTOP)


def other_order() -> None:
    models = [triton_sp.wrap(fresh()), triton_sp.wrap(zoo.CASES["llama"].model())]
    for model in reversed(models) if culprit() else models:
        step(model, text(20))


def forward_beside_backward() -> None:
    model = triton_sp.wrap(fresh())
    loss = model(**batch()).loss
    if culprit():
        model(**batch())
    loss.backward()


def cached_beside_sharded() -> None:
    group = dist.new_group(list(range(dist.get_world_size())), timeout=timedelta(seconds=PATIENCE))
    model = triton_sp.wrap(fresh(), group).eval()
    with torch.no_grad():
        model(**text(20), use_cache=culprit())


def other_config() -> None:
    step(triton_sp.wrap(fresh(), config=SPConfig(gather_logits=culprit())), batch())


def other_model() -> None:
    step(triton_sp.wrap(zoo.CASES["llama"].model() if culprit() else fresh()), text(20))


def other_batch() -> None:
    step(triton_sp.wrap(fresh()), text(20 + culprit()))


# --- what used to hang ---------------------------------------------------------------------------------------------

HEARTBEAT = SPConfig(heartbeat=1.0)  # a rank that does not come for 10 s has left


def interrupted() -> None:
    raise KeyboardInterrupt


def fails_with(error: Callable[[], None], where: str) -> None:
    """A rank raises something in the middle of a step and lives on."""
    model = triton_sp.wrap(fresh())
    if culprit():
        module = layer(model).mlp
        hook = module.register_forward_pre_hook if where == "forward" else module.register_full_backward_pre_hook
        hook(lambda *_: error())
    step(model, batch())


def not_unicode() -> None:
    raise OSError("no file \udcff\udcfe")


def interrupted_while_waiting() -> None:
    model = triton_sp.wrap(fresh())
    step(model, batch())
    if culprit():
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

    hook = layer(model).mlp.register_forward_pre_hook(fail)
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
        subprocess.Popen(["sh", "-c", f"sleep 6; kill -CONT {os.getpid()}"])
        os.kill(os.getpid(), signal.SIGSTOP)
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


@dataclass(frozen=True)
class Fault:
    """A case: what runs on each rank, and whether that is the right result or an error.

    Attributes:
        raises: the errors of the ranks that the fault is not on; None where the result is right.
    """

    run: Callable[[], None]
    raises: type[errors.SPError] | None = None
    names_rank: bool = True


def right(make: Callable[[], tiny.Batch]) -> Fault:
    return Fault(lambda: compared(make()))


PEER, DIFFERENT, INPUT = errors.PeerError, errors.DisagreementError, errors.InputError
FAULTS: dict[str, Fault] = {
    "no image": right(lambda: batch("no_images")),
    "images on one rank's part": right(images_first),
    "all labels ignored": right(lambda: (b := batch()) | {"labels": torch.full_like(b["labels"], -100)}),
    "one token": right(lambda: {"input_ids": torch.tensor([[7]]), "labels": torch.tensor([[-100]])}),
    "fewer tokens than ranks": right(lambda: text(2)),
    "NaN in padded rows": Fault(compared_nan_in_padding),
    "a slow rank": Fault(slow),
    "no placeholders for features": Fault(fewer_placeholders, errors.SPError, names_rank=False),
    "exception in the plan": Fault(fails_in_plan, DIFFERENT),
    "exception in the forward": Fault(fails_in_forward, PEER),
    "exception in the backward": Fault(fails_in_backward, PEER),
    "killed in the forward": Fault(lambda: leaves(killed, "forward"), PEER),
    "killed in the backward": Fault(lambda: leaves(killed, "backward"), PEER),
    "stopped in the forward": Fault(lambda: leaves(stopped, "forward"), PEER),
    "stopped in the backward": Fault(lambda: leaves(stopped, "backward"), PEER),
    "calls in another order": Fault(other_order, DIFFERENT),
    "a forward beside a backward": Fault(forward_beside_backward, errors.SPError, names_rank=False),
    "a cached call beside a sharded one": Fault(cached_beside_sharded, PEER),
    "another configuration": Fault(other_config, DIFFERENT),
    "another model": Fault(other_model, DIFFERENT),
    "another batch": Fault(other_batch, DIFFERENT),
    "KeyboardInterrupt in the forward": Fault(lambda: fails_with(interrupted, "forward"), PEER),
    "KeyboardInterrupt in the backward": Fault(lambda: fails_with(interrupted, "backward"), PEER),
    "SystemExit in the forward": Fault(lambda: fails_with(sys.exit, "forward"), PEER),
    "an error that is not Unicode": Fault(lambda: fails_with(not_unicode, "forward"), PEER),
    "SIGINT while waiting": Fault(interrupted_while_waiting, PEER),
    "all fail alike, seconds apart": Fault(alike_but_apart, PEER, names_rank=False),
    "share_batches with other limits": Fault(other_limits, DIFFERENT),
    "a forked child calls the model": Fault(in_a_forked_child),
    "two models in two threads": Fault(in_two_threads),
    "leaves the loop and lives on": Fault(lambda: lives_on(True), PEER),
    "forgets to wrap and lives on": Fault(lambda: lives_on(False), PEER),
    "stopped, and no time-out": Fault(stopped_without_a_timeout, PEER),
    "slow and alive": Fault(slow_and_alive),
    "generates meanwhile": Fault(generates_meanwhile),
}


def on_rank(name: str) -> tuple[str, BaseException | None, float]:
    """What came of a case on this rank, and after how many seconds."""
    torch.manual_seed(0)
    start = time.monotonic()
    try:
        FAULTS[name].run()
    except BaseException as error:
        plain = copy.copy(error) if isinstance(error, errors.SPError) else RuntimeError(repr(error))
        plain.__cause__ = plain.__traceback__ = None
        return "error", plain, time.monotonic() - start
    return "result", None, time.monotonic() - start


def ready() -> None:
    """Started, and everything imported."""


def outcome(pool: RankPool, name: str, ranks: int) -> dict[str, Any]:
    """A row of the catalogue."""
    fault, answers = FAULTS[name], {}
    pool.run(ready, ranks=ranks, timeout=1000)
    try:
        answers = dict(enumerate(pool.run(on_rank, name, ranks=ranks, timeout=60)))
    except RankError as raised:  # one that was killed: the others' answers are lost with it, unless they are kept here
        answers = {rank: answer for rank, answer in enumerate(raised.results) if rank not in raised.errors}
    except TimeoutError:
        return {"case": name, "ranks": ranks, "outcome": "hang", "seconds": 60.0, "message": "", "fine": False}
    others = {rank: answer for rank, answer in answers.items() if rank != ranks - 1} or answers
    seconds = max(answer[2] for answer in others.values())
    found = [error for _, error, _ in others.values()]
    if fault.raises is None:
        fine, told = all(kind == "result" for kind, _, _ in answers.values()), "right result"
    else:
        fine = all(isinstance(error, fault.raises) for error in found) and len(others) >= ranks - 1
        fine &= not fault.names_rank or all(f"rank {ranks - 1}" in str(error) for error in found)
        told = type(found[0]).__name__
    message = "" if found[0] is None else str(found[0])
    return {"case": name, "ranks": ranks, "outcome": told if fine else f"wrong: {found}", "seconds": round(seconds, 2),
            "message": message, "fine": fine}  # fmt: skip


def tables(pool: RankPool, ranks: int) -> list[dict[str, Any]]:
    """Rows of the tables of values (promises/values.py) and of states and steps (wrappers/test_state.py)."""
    folder = Path(__file__).parents[1]
    sys.path[:0] = [str(folder / "promises"), str(folder / "wrappers")]
    import test_state
    import values

    rows = []
    for name, table in values.TABLES.items():
        answers = pool.run(values.run, name, ranks=ranks, timeout=1000)
        for label, entry in table.items():
            found = [answer[label][1] for answer in answers]
            fine = all(isinstance(error, INPUT) and error.field == entry.field for error in found)
            rows.append(_row(f"{name}: {label}", ranks, found, fine))
    for label, late in [(label, late) for label in test_state.CHANGES for late in (False, True)]:
        found = [answer[label, late] for answer in pool.run(test_state.run, [label], ranks=ranks, timeout=1000)]
        fine = all(isinstance(error, DIFFERENT) for error in found)
        rows.append(_row(f"a rank has {label}{', after a step' if late else ''}", ranks, found, fine))
    answers = pool.run(test_state.run_steps, ranks=ranks, timeout=1000)
    for label in test_state.STEPS:
        found = [answer[label] for answer in answers]
        rows.append(_row(f"steps: {label}", ranks, found, all(isinstance(error, DIFFERENT) for error in found)))
    return rows


def _row(case: str, ranks: int, found: list[Any], fine: bool) -> dict[str, Any]:
    told = type(found[0]).__name__ if fine else f"wrong: {found}"
    return {"case": case, "ranks": ranks, "outcome": told, "message": str(found[0]), "fine": fine}


def main() -> int:
    """Run all cases and write the table; 0 if every one came out as it should."""
    import pandas as pd
    from tqdm import tqdm

    pool, path = RankPool(), Path(__file__).parents[2] / "reports" / "faults.csv"
    rows = [row for ranks in (2, 4) for row in tables(pool, ranks)]
    rows += [outcome(pool, name, ranks) for ranks in (2, 4) for name in tqdm(FAULTS, desc=f"{ranks} ranks")]
    pool.close()
    path.parent.mkdir(exist_ok=True)
    table = pd.DataFrame(rows)
    table.to_csv(path, index=False)
    print(table.drop(columns=["message", "fine"]).to_string(index=False))
    return int(not table["fine"].all())


if __name__ == "__main__":
    raise SystemExit(main())
