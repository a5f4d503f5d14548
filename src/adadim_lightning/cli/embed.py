"""``adadim-embed``: representations of images in a file."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adadim_lightning.cli.app import run_app

if TYPE_CHECKING:
    from omegaconf import DictConfig


def main() -> None:
    """Entry point of the command."""
    run_app(_task, "adadim-embed", "embed")


def _task(config: DictConfig) -> None:
    # Imported here: the help needs neither torch nor lightning.
    from adadim_lightning.cli.measure import write_embeddings

    write_embeddings(config)


if __name__ == "__main__":
    main()
