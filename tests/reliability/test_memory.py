"""A long run takes no more memory than a short one."""

import json
import os
from pathlib import Path

import pytest

from .runs import said, start

STEPS, WARM = 20_000, 2_000
SPY = """
import json
import os
from pathlib import Path

from lightning.pytorch import Callback


class Spy(Callback):
    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step % 500 == 0:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            with open("memory.jsonl", "a") as file:
                file.write(json.dumps([trainer.global_step, pages * os.sysconf("SC_PAGE_SIZE")]) + "\\n")
"""
TINY = (
    "backbone.channels=[4,8,8]",
    "head.hidden_dim=32",
    "head.out_dim=16",
    "data.batch_size=16",
    "~views.augmentations",
    "+views.augmentations.noise={std: 0.1}",
    "trainer.accelerator=cpu",
    "trainer.max_epochs=-1",
    f"trainer.max_steps={STEPS}",
    "logger=wandb",
    "logger.wandb.mode=offline",
    "trust=[spy]",
    "+callbacks.spy._target_=spy.Spy",
    "run_dir=run",
)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="memory is read from Linux's /proc")
def test_memory_of_a_long_run_with_every_callback_does_not_grow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "spy.py").write_text(SPY)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert start(tmp_path, *TINY).wait() == 0, said(tmp_path)
    used = dict(map(json.loads, (tmp_path / "memory.jsonl").read_text().splitlines()))
    growth = used[STEPS] / used[WARM] - 1
    print(f"\nresident memory: {used[WARM] / 2**20:.1f} MiB after {WARM:,} steps, ", end="")
    print(f"{used[STEPS] / 2**20:.1f} MiB after {STEPS:,}: {100 * growth:+.2f} %")
    assert growth < 0.01
