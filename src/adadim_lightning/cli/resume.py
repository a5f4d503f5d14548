"""What an earlier part of a run left to go on from."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from adadim_lightning.callbacks.checkpoints import KEY
from adadim_lightning.cli.build import say
from adadim_lightning.cli.metrics_log import METRICS
from adadim_lightning.pretrained import CheckpointError, read_state


@dataclass(frozen=True)
class Past:
    """An earlier part of a run.

    Attributes:
        checkpoint: from which the fit goes on; None where none was written.
        steps: number of steps behind it.
        row: what the epoch logged that it ends, with its ``epoch`` and ``step``; None within one.
    """

    checkpoint: Path | None = None
    steps: int = 0
    row: Mapping[str, float] | None = None


def find_past(folder: Path, optimizer: str | None) -> Past:
    """The newest sound checkpoint of a run folder; says which it is, and which are not sound.

    Args:
        folder: of the run.
        optimizer: class of the optimizer that is to go on.

    Raises:
        ValueError: none of the checkpoints can be read, or the optimizer was another.
    """
    # last.ckpt points nowhere where a run was killed between removing the old checkpoint and setting the link.
    found = {path.resolve() for path in (folder / "checkpoints").glob("*.ckpt") if path.exists()}
    for path in sorted(found, key=lambda path: (path.stat().st_mtime, path.name), reverse=True):
        try:
            checkpoint = read_state(path)
            if "optimizer_states" not in checkpoint:
                raise CheckpointError(f"{path} is no checkpoint to go on from")
        except CheckpointError as error:
            say(f"resume     {error}; looking further")
            continue
        was = checkpoint.get("adadim", {}).get("config", {}).get("optimizer", {}).get("_target_")
        if was not in (None, optimizer):
            raise ValueError(f"the run was begun with the optimizer {was}; another cannot go on with its state")
        steps = int(checkpoint["global_step"])
        say(f"resume     {os.path.relpath(path)}, step {steps:,}")
        return Past(path, steps, checkpoint.get(KEY, {}).get("row"))
    if found:
        raise ValueError(
            f"no checkpoint in {os.path.relpath(folder)} can be read; to begin anew, remove its folder checkpoints"
        )
    if (folder / METRICS).exists():
        say(f"resume     {os.path.relpath(folder)} has no checkpoint: the run begins anew")
    return Past()
