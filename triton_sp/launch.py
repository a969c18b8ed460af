"""Run a training script that cannot be edited: `TRITON_SP_SIZE=4 triton-sp launch train.py --its arguments`.

Whatever trains by transformers' Trainer, or by a subclass of it (TRL, axolotl, LLaMA-Factory, ms-swift), is entered in
`Trainer.train`: there the model is wrapped, and the ranks of a group are given the same batches.
"""

from __future__ import annotations

import functools
import json
import os
import runpy
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from triton_sp.api import wrap
from triton_sp.config import SPConfig
from triton_sp.engines.loaders import share_batches
from triton_sp.errors import InputError, require
from triton_sp.explain import explain
from triton_sp.ranks import groups
from triton_sp.wrappers.install import installation_of

SIZE, SETTINGS = "TRITON_SP_SIZE", "TRITON_SP_CONFIG"


def run(command: Sequence[str]) -> None:
    """Run a script, a module (`-m name`) or an installed command as `__main__`, with every Trainer in it wrapped.

    The environment variable TRITON_SP_SIZE is the number of neighbouring ranks that share a batch, all if it is not
    set. TRITON_SP_CONFIG is the SPConfig as JSON, such as `{"chunked_loss": true}`.

    Raises:
        InputError: there is no such script, or a variable that cannot be used.
    """
    size, config = settings()
    require(command, InputError, "command", "a script", "none", "triton-sp launch train.py")
    with wrapped_trainers(size, config):
        if command[0] == "-m":
            sys.argv = [*command[1:]]
            runpy.run_module(command[1], run_name="__main__", alter_sys=True)
            return
        path = command[0] if os.path.exists(command[0]) else shutil.which(command[0])
        require(path, InputError, "command", "a script, or an installed command", command[0], "give its path")
        sys.argv = [str(path), *command[1:]]
        sys.path.insert(0, os.path.dirname(os.path.abspath(str(path))))
        runpy.run_path(str(path), run_name="__main__")


def settings() -> tuple[int | None, SPConfig]:
    """What the environment variables say: the size of a group, None for all ranks, and how models are wrapped.

    Raises:
        InputError: one of them cannot be used.
    """
    size, options = os.environ.get(SIZE), os.environ.get(SETTINGS, "{}")
    require(size is None or size.isdigit(), InputError, SIZE, "a number of ranks", repr(size), "TRITON_SP_SIZE=4")
    try:
        return int(size) if size else None, SPConfig(**json.loads(options))
    except (json.JSONDecodeError, TypeError) as error:
        remedy = """TRITON_SP_CONFIG='{"chunked_loss": true}'"""
        raise InputError(SETTINGS, expected="an SPConfig as JSON", found=str(error), remedy=remedy) from error


@contextmanager
def wrapped_trainers(size: int | None, config: SPConfig) -> Iterator[None]:
    """Every Trainer that trains meanwhile wraps its model for groups of `size` neighbouring ranks; None for all.

    A model that is wrapped already is left alone.
    """
    from transformers import Trainer

    original = Trainer.train
    Trainer.train = _train(original, size, config)  # type: ignore[method-assign]
    try:
        yield
    finally:
        Trainer.train = original  # type: ignore[method-assign]


def _train(original: Callable[..., Any], size: int | None, config: SPConfig) -> Callable[..., Any]:
    @functools.wraps(original)
    def train(trainer: Any, *args: Any, **kwargs: Any) -> Any:
        if installation_of(trainer.model) is None:
            group = groups.neighbours(size)
            wrap(trainer.model, group, config)
            share_batches(trainer, group)
            if trainer.is_world_process_zero():
                print(explain(trainer.model), flush=True)
        return original(trainer, *args, **kwargs)

    return train
