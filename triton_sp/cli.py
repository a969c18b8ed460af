"""The command `triton-sp`."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from triton_sp import environment, launch
from triton_sp.forecast import job, step, table
from triton_sp.plan import cost
from triton_sp.plan.calibrate import compare_attention, measure_link
from triton_sp.ranks import groups

# What is done by the files of a checkout, which an installed package does not have.
CHECKOUT = {
    "sweep": "measure speed, bytes and memory: triton-sp sweep NAME [--quick]; triton-sp sweep --help lists them",
    "plot": "plots and tables of what sweeps have measured: triton-sp plot [--check]",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point.

    >>> main(["--help"])
    Traceback (most recent call last):
    SystemExit: 0
    """
    parser = argparse.ArgumentParser(prog="triton-sp", description="sequence-parallel training of Hugging Face models")
    commands = parser.add_subparsers(dest="command", required=True)
    calibrate = commands.add_parser(
        "calibrate",
        help="measure latency, bandwidth and speed of a group on this machine and keep them for the planner; and "
        "compare implementations of attention, for SPConfig(attention='auto')",
        description="Starts its own ranks, or measures those it is started on: torchrun ... -m triton_sp.cli calibrate",
    )
    calibrate.add_argument("--ranks", type=int, help="ranks of a group; default: the GPUs, or 2 without one")
    start = commands.add_parser(
        "launch",
        help="run a training script that cannot be edited: TRITON_SP_SIZE=4 triton-sp launch train.py ...",
        description="Starts as many ranks as there are GPUs (without one, TRITON_SP_SIZE), or runs on those that "
        "torchrun has started (torchrun ... -m triton_sp.cli launch train.py). Every Trainer wraps its model.",
    )
    start.add_argument("script", nargs=argparse.REMAINDER, help="a script, -m module, or an installed command")
    commands.add_parser("env", help="what a report of a problem needs to say about this machine, to be pasted into it")
    _plan_options(
        commands.add_parser("plan", help="what each rank will hold and send in a step, before any GPU is rented")
    )
    for name, text in CHECKOUT.items():
        commands.add_parser(name, help=text, add_help=False)
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["launch"] and given[1:] not in (["-h"], ["--help"]):
        _launch(given[1:])  # argparse would take `-m` and what follows apart
        return
    parsed, rest = parser.parse_known_args(given)
    if parsed.command in CHECKOUT:
        sys.exit(_from_checkout(f"perf.{parsed.command}", rest))
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if parsed.command == "plan":
        _plan(parsed)
    elif parsed.command == "env":
        print(environment.report())
    elif "RANK" in os.environ:
        _calibrate()
    else:
        ranks = parsed.ranks or max(torch.cuda.device_count(), 0) or 2
        groups.start_ranks(ranks, "triton_sp.cli", "calibrate")


def _launch(command: list[str]) -> None:
    if "RANK" in os.environ:
        launch.run(command)
    else:
        ranks = torch.cuda.device_count() or launch.settings()[0] or 2
        groups.start_ranks(ranks, "triton_sp.cli", "launch", *command)


def _plan_options(plan: argparse.ArgumentParser) -> None:
    plan.description = (
        "Runs the model's step on tensors without numbers, by the code that plans the real run. The time is an "
        "estimate: products and attention at 400 TFLOP/s, bytes between ranks at 350 GB/s, 30 us a collective, one "
        "after the other (the cost model's link 'nvlink', by which plans are chosen too); no engine, optimizer or data."
    )
    plan.add_argument("model", help="a folder or file with a configuration of transformers, or a name on the Hub")
    plan.add_argument("--gpus", type=int, default=8, help="of the job: ZeRO and FSDP shard over them")
    plan.add_argument("--ranks", help="sizes of a group, as 1,2,4; default: 1, 2, 4, ... up to all GPUs")
    plan.add_argument("--gpu-memory", type=float, help="GB of a GPU; rows then say whether a step fits")
    plan.add_argument("--rank", type=int, default=0, help="which rank of a group; they differ where parts do")
    plan.add_argument("--text", type=_tokens, default=1024, help="tokens of text, such as 8k")
    plan.add_argument("--images", type=int, default=0)
    plan.add_argument("--resolution", default="1344x1344", help="height x width of each image, in pixels")
    plan.add_argument("--engine", choices=job.ENGINES, default="ddp")
    plan.add_argument("--checkpointing", action="store_true", help="layers are recomputed in the backward")
    plan.add_argument("--chunked-loss", action="store_true", help="SPConfig(chunked_loss=True)")
    plan.add_argument("--tiled-mlp", type=_tokens, default=0, help="SPConfig(tiled_mlp=...): tokens at a time")
    plan.add_argument("--offload", action="store_true", help="SPConfig(offload=True)")
    plan.add_argument("--plot", help="a picture too, such as plan.png")
    plan.add_argument("--json", action="store_true", help="for programs: sizes in bytes")


def _tokens(text: str) -> int:
    """8k is 8192 and 1M is 1048576."""
    scale = {"k": 1 << 10, "m": 1 << 20}.get(text[-1:].lower())
    return int(text) if scale is None else int(float(text[:-1]) * scale)


def _plan(asked: argparse.Namespace) -> None:
    height, width = (int(side) for side in asked.resolution.lower().split("x"))
    planned = job.Job(
        *(asked.gpus, asked.text, asked.images, height, width),
        *(asked.engine, asked.checkpointing, asked.chunked_loss, asked.tiled_mlp, asked.offload),
    )
    ranks = [1 << i for i in range(asked.gpus.bit_length())]
    if asked.ranks:
        ranks = [int(size) for size in asked.ranks.split(",")]
    rows = step.forecast(job.load_model(asked.model), planned, ranks, rank=asked.rank)
    print(table.as_json(rows) if asked.json else table.as_table(rows, asked.gpu_memory))
    if asked.plot:
        table.draw(rows, asked.plot, asked.gpu_memory)


def _from_checkout(module: str, arguments: list[str]) -> int:
    """Run a module of the folder perf/ beside the package; the exit code."""
    root = Path(__file__).resolve().parent.parent
    if not (root / "perf" / "sweep.py").exists():
        print("triton-sp: this needs a checkout of the repository, installed with pip install -e '.[dev]'")
        return 2
    if str(root) not in sys.path:
        sys.path.append(str(root))
    return importlib.import_module(module).main(arguments)


def _calibrate() -> None:
    """On every rank: measure together; the first of each machine stores the result."""
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
    group = groups.join_world(device)
    link = measure_link(group, device)
    if os.environ.get("LOCAL_RANK", "0") == "0":
        file = cost.store_link(link, device.type, group.size)
        print(
            f"{group.size} ranks on {device.type}: latency {link.latency * 1e6:.0f} us, "
            f"bandwidth {link.bandwidth / 1e9:.2f} GB/s, compute {link.compute / 1e12:.3g} TFLOP/s -> {file}"
        )
        findings, file = compare_attention(device)
        print(*findings, f"{len(findings)} comparisons of attention -> {file}", sep="\n")
    groups.leave_world()


def run() -> None:
    """The command itself. A plan has nothing to tidy up, so that it ends before Python takes torch, its compiler and
    transformers apart, which takes 0.9 s."""
    main()
    if sys.argv[1:2] == ["plan"]:
        sys.stdout.flush()
        os._exit(0)


if __name__ == "__main__":
    run()
