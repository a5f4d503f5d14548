"""``adadim-train``: pre-train with AdaDim, from one command."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hydra.core.hydra_config import HydraConfig

from adadim_lightning.cli.app import run_app

if TYPE_CHECKING:
    from omegaconf import DictConfig


def main() -> None:
    """Entry point of the command."""
    run_app(_task, "adadim-train", "train")


def _task(config: DictConfig) -> float | None:
    # Imported here: the help needs neither torch nor lightning.
    from adadim_lightning.cli.run import train

    hydra_config = HydraConfig.get()
    return train(config, folder=hydra_config.runtime.output_dir, overrides=list(hydra_config.overrides.task))


if __name__ == "__main__":
    main()
