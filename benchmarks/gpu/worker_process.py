"""A worker as its parent sees it: questions, limits, and how it was lost."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.gpu.worker import MARK


class LostError(Exception):
    """The worker crashed, or exceeded its limit (``hung``)."""

    def __init__(self, text: str, hung: bool, step: str = "") -> None:
        super().__init__(text)
        self.hung, self.step = hung, step


class Worker:
    """A child process spoken to by lines of JSON."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            list(command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=dict(environment),
            start_new_session=True,  # compilers of its own go with it
        )
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._step = "start"
        threading.Thread(target=self._read, daemon=True).start()

    def ask(self, request: Mapping[str, Any], limit: float) -> dict[str, Any]:
        """The answer within ``limit`` seconds; LostError if there is none."""
        assert self._process.stdin is not None
        self._step = "start"  # not the last of the request before
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except OSError as error:
            raise self._lost() from error
        return self._answer(time.monotonic() + limit, limit)

    def stop(self) -> None:
        """End it and what it started."""
        with contextlib.suppress(OSError):
            os.killpg(self._process.pid, 9)
        self._process.wait()

    def _answer(self, deadline: float, limit: float) -> dict[str, Any]:
        while True:
            try:
                line = self._lines.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                text = f"no answer within {limit:.0f} s, at step '{self._step}'"
                raise LostError(text, hung=True, step=self._step) from None
            if line is None:
                raise self._lost()
            message: dict[str, Any] = json.loads(line)
            if "step" not in message:
                return message | ({"step": self._step} if message.get("lost") else {})
            self._step = message["step"]

    def _lost(self) -> LostError:
        code = self._process.wait()
        text = f"the process ended with code {code}, at step '{self._step}'"
        return LostError(text, hung=False, step=self._step)

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(MARK):
                self._lines.put(line[len(MARK) :])
            elif line.strip():
                print(line.rstrip(), file=sys.stderr, flush=True)
        self._lines.put(None)
