"""The launchers without a cluster: what they ask for, and how jobs share one machine."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import joblib
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from adadim_lightning.cli.app import config_dir

SPY = """
import json, os, time
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback

class Spy(Callback):
    def on_fit_start(self, trainer, module):
        self.start = time.time()

    def on_fit_end(self, trainer, module):
        seen = {"threads": torch.get_num_threads(), "start": self.start, "end": time.time()}
        Path(trainer.default_root_dir, "seen.json").write_text(json.dumps(seen))
"""


def launcher(*overrides: str) -> dict[str, Any]:
    """The launcher of a configuration, resolved."""
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        config = compose("train", overrides=[*overrides, "run_dir=runs"], return_hydra_config=True)
    config.hydra.job.name = "train"
    found = OmegaConf.to_container(config.hydra.launcher, resolve=True)
    assert isinstance(found, dict)
    return {str(key): value for key, value in found.items()}


@pytest.mark.slow
def test_parallel_runs_on_one_machine_share_its_cores(tmp_path: Path) -> None:
    (tmp_path / "spy.py").write_text(SPY)
    environment = {key: value for key, value in os.environ.items() if not key.endswith("_NUM_THREADS")}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(tmp_path), environment.get("PYTHONPATH"))))
    done = subprocess.run(
        [
            *(sys.executable, "-m", "adadim_lightning.cli.train", "-m", "hydra/launcher=joblib"),
            *("hydra.launcher.n_jobs=2", "seed=0,1", "trainer.max_epochs=3", "trainer.limit_train_batches=2"),
            *("data.batch_size=32", "trainer.accelerator=cpu", "run_dir=runs"),
            *("trust=[spy]", "+callbacks.spy._target_=spy.Spy"),
        ],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    seen = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("runs/*/seen.json"))]
    assert [run["threads"] for run in seen] == 2 * [max(1, joblib.cpu_count() // 2)]
    assert max(run["start"] for run in seen) < min(run["end"] for run in seen)


def test_slurm_is_asked_for_a_process_and_a_gpu_for_each_device() -> None:
    asked = launcher("hydra/launcher=slurm", "trainer.devices=4", "trainer.num_nodes=2")
    assert (asked["nodes"], asked["tasks_per_node"], asked["gpus_per_node"]) == (2, 4, 4)


def test_slurm_jobs_are_kept_inside_the_folder_of_their_sweep() -> None:
    assert launcher("hydra/launcher=slurm")["submitit_folder"].startswith("runs/")
