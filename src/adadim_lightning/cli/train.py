"""``adadim-train``: pre-train with AdaDim, from one command."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hydra.core.hydra_config import HydraConfig

from adadim_lightning.cli.app import run_app
from adadim_lightning.cli.sweep import sweep_job, sweeping, wants_resume
from adadim_lightning.cli.sweep_report import print_sweep

if TYPE_CHECKING:
    from omegaconf import DictConfig


def main() -> None:
    """Entry point of the command."""
    with sweeping() as sweeps:
        try:
            run_app(_task, "adadim-train", "train")
        finally:
            for sweep in sweeps:
                print_sweep(sweep.summaries(), sweep.folder)


def _task(config: DictConfig) -> float | None:
    # Imported here: the help needs neither torch nor lightning.
    from adadim_lightning.cli.run import train

    hydra_config = HydraConfig.get()
    job = sweep_job(hydra_config)
    sweep = hydra_config.runtime.choices.get("sweep")
    if sweep is not None and job is None:
        raise ValueError(f"sweep={sweep} makes many runs: start it as `adadim-train -m sweep={sweep}`")
    return train(
        config,
        folder=hydra_config.runtime.output_dir,
        overrides=list(hydra_config.overrides.task),
        resume=wants_resume(config),
        job=job,
    )


if __name__ == "__main__":
    main()
