"""What a run does as a job of Slurm."""

import os
import signal
import subprocess
import sys
import time
from typing import Any, NoReturn

from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

REQUEUED = -1  # with which submitit ends a job that it has had requeued
GRACE_S = 3600  # more than Slurm leaves a job between SIGTERM and SIGKILL


def plugins() -> list[Any]:
    """Slurm's processes for Lightning, which would requeue a job in the middle of a step."""
    return [SLURMEnvironment(auto_requeue=False)] if SLURMEnvironment.detect() else []


def requeue_when_told() -> None:
    """At SIGUSR1, which says that the job's time is nearly up, have it requeued; submitit does so by itself."""
    if "SLURM_JOB_ID" in os.environ and signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL:
        signal.signal(signal.SIGUSR1, _requeue)


def _requeue(number: int, frame: Any) -> NoReturn:
    if os.environ.get("SLURM_PROCID", "0") == "0":
        job = os.environ["SLURM_JOB_ID"]
        try:
            subprocess.run(["scontrol", "requeue", job], check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            reason = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[0]
            print(f"warning: Slurm did not requeue job {job} ({reason}); submit it again", file=sys.stderr)
    raise SystemExit(REQUEUED)


def wait_for_the_end() -> None:
    """Slurm requeues a pre-empted job that it had to kill; one that ends by itself counts as failed."""
    if "SLURM_JOB_ID" in os.environ:
        time.sleep(GRACE_S)
