"""Handles the signals that end a coordinator."""

from __future__ import annotations

import asyncio
import signal


class Signals:
    def __init__(self) -> None:
        self.stop_requested = asyncio.Event()
        self.ready = False
        # True if SIGINT came before the cluster was ready, and no other signal came before.
        self.has_interrupted_start = False
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGINT, self._interrupt)
        loop.add_signal_handler(signal.SIGTERM, self._received)
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup makes a process ignore SIGHUP.
            loop.add_signal_handler(signal.SIGHUP, self._lose_terminal)

    def _interrupt(self) -> None:
        self.has_interrupted_start |= not (self.ready or self.stop_requested.is_set())
        self._received()

    def _lose_terminal(self) -> None:
        if not self.stop_requested.is_set():
            self._received()

    def _received(self) -> None:
        if not self.ready or self.stop_requested.is_set():
            self._task.cancel()
        self.stop_requested.set()
