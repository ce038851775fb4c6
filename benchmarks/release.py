"""Makes of a checkpoint one to give away: without the optimizer's state, which triples its size.

    python -m benchmarks.release runs/NAME/model_best.pth.tar FILE.pth.tar
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from aig.checkpoint import load_checkpoint
from aig.console import InputError, Parser, run_command
from aig.runs import atomic_write

KEPT = ("epoch", "best_prec1", "state_dict", "args")


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", help="of a run")
    parser.add_argument("file", type=Path, help="to write")
    args = parser.parse_args(argv)
    checkpoint = load_checkpoint(args.checkpoint)
    if args.file.exists():
        raise InputError(f"{args.file} is there already: remove it, or choose another name")
    with atomic_write(args.file) as file:
        torch.save({name: checkpoint[name] for name in KEPT if name in checkpoint}, file)
    print(f"{args.file}: {args.file.stat().st_size:,} bytes")


if __name__ == "__main__":
    run_command(main, "release")
