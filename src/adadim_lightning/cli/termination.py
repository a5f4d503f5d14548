"""SIGTERM ends a run, whatever its main thread waits for."""

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException

TERMINATED = 143  # as shells number a SIGTERM
GRACE_S = 20.0  # clusters kill 30 seconds after SIGTERM
POLL_S = 0.25
CHILDREN_S = 5.0


@contextmanager
def ends_at_sigterm(trainer: Callable[[], Trainer | None], last_words: Callable[[], None]) -> Iterator[None]:
    """Have SIGTERM end the process: by an exception, or with exit code 143 if it does not react.

    Where nobody else handles it, SIGTERM raises ``SIGTERMException``. A handler of Python does not run while the
    main thread waits in a collective for a process that does not come. If the main thread stays at one place for
    20 seconds after SIGTERM, a line says so and the process ends, with those that it has started.

    Args:
        trainer: returns the trainer, once there is one.
        last_words: called before the process ends without having reacted, from another thread.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    watch = _Watch(trainer, last_words)
    earlier = signal.getsignal(signal.SIGTERM)
    if earlier == signal.SIG_DFL:
        signal.signal(signal.SIGTERM, watch.on_signal)
    fd = signal.set_wakeup_fd(watch.writer.fileno(), warn_on_full_buffer=False)
    watch.start()
    try:
        yield
    except SIGTERMException:
        sys.exit(TERMINATED)
    finally:
        watch.end()
        signal.set_wakeup_fd(fd)
        if earlier == signal.SIG_DFL:
            signal.signal(signal.SIGTERM, earlier)


class _Watch(threading.Thread):
    def __init__(self, trainer: Callable[[], Trainer | None], last_words: Callable[[], None]) -> None:
        super().__init__(daemon=True, name="sigterm-watch")
        self.trainer = trainer
        self.last_words = last_words
        self.reader, self.writer = socket.socketpair()
        self.writer.setblocking(False)
        self.told = threading.Event()
        self.over = threading.Event()
        self.main = threading.main_thread().ident

    def on_signal(self, number: int, frame: Any) -> None:
        """Raise, unless somebody else handles the signal and only calls this too."""
        if signal.getsignal(signal.SIGTERM) == self.on_signal and not self.over.is_set():
            self.over.set()  # once: what follows must not be interrupted
            raise SIGTERMException

    def run(self) -> None:
        # Python writes the numbers of signals to this socket at once, whatever the main thread does.
        while signal.SIGTERM not in (received := self.reader.recv(64)):
            if not received:
                return
        self.told.set()
        grace = GRACE_S
        if self._is_child():
            grace *= 2  # the parent ends both
            os.kill(os.getppid(), signal.SIGTERM)
        place, since = self._place(), time.monotonic()
        while not self._is_over(POLL_S):
            if (now := self._place()) != place:
                place, since = now, time.monotonic()
            elif time.monotonic() - since > grace:
                self._give_up()

    def _is_over(self, seconds: float) -> bool:
        """Wait; whether the run is over."""
        self.reader.settimeout(seconds)
        with suppress(TimeoutError):
            return not self.reader.recv(64)
        return False

    def end(self) -> None:
        """Stop watching; after a SIGTERM no process that was started stays behind."""
        self.over.set()
        self.writer.close()
        self.join()
        self.reader.close()
        if self.told.is_set():
            self._end_children(CHILDREN_S)

    def _place(self) -> list[Any]:
        """Where the main thread is; a loop changes its variables, though each look may find it at one call."""
        frame, places = sys._current_frames().get(self.main or 0), []
        while frame is not None:
            places.append((id(frame), frame.f_lasti, *map(id, list(frame.f_locals.values()))))
            frame = frame.f_back
        return places

    def _is_child(self) -> bool:
        trainer = self.trainer()
        environment = getattr(trainer and trainer.strategy, "cluster_environment", None)
        return isinstance(environment, LightningEnvironment) and environment.local_rank() > 0

    def _end_children(self, patience: float) -> None:
        trainer = self.trainer()
        children = list(getattr(trainer and trainer.strategy.launcher, "procs", []))
        for thread in threading.enumerate():
            if thread.name == "child-process-observer":
                vars(thread)["_child_processes"] = []  # it would kill this process since a child has ended
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline and any(_runs(child) for child in children):
            time.sleep(0.05)
        for child in children:
            if _runs(child):
                child.kill()

    def _give_up(self) -> None:
        if not self._is_child():
            with suppress(Exception):
                self.last_words()
            line = f"stopped: no reaction to SIGTERM for {GRACE_S:g} s, perhaps as it waits for another process; "
            # Not through sys.stderr, whose lock the main thread may hold.
            os.write(2, f"{line}resume=true goes on from the last checkpoint\n".encode())
        with suppress(Exception):
            self._end_children(0)
        os._exit(TERMINATED)


def _runs(child: Any) -> bool:
    """Whether a process of ``subprocess`` or ``multiprocessing`` runs."""
    return child.poll() is None if hasattr(child, "poll") else bool(child.is_alive())
