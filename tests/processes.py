"""Run functions in new processes without importing torch again, which takes ten seconds.

A fork server imports torch and the package once and forks every process. Each process has its own memory, signals and
standard streams. To test how an interpreter starts or ends, start a new one instead.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from threading import Thread

import torch

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["mara_integrations.training.run"])


class Forked:
    """A process that calls a function of a module; used like `subprocess.Popen`, which has the same names.

    Args:
        target: The function.
        args: Its arguments.
        env: Environment variables besides those of the server.
    """

    def __init__(self, target, *args, env=None):
        (out, child_out), (err, child_err) = (_CONTEXT.Pipe(duplex=False) for _ in range(2))
        self._process = _CONTEXT.Process(target=_run, args=(child_out, child_err, env or {}, target, args))
        self._process.start()
        for end in (child_out, child_err):
            end.close()
        self.stdout, self.stderr = (os.fdopen(os.dup(end.fileno())) for end in (out, err))
        for end in (out, err):
            end.close()

    @property
    def returncode(self):
        return self._process.exitcode

    def send_signal(self, number):
        os.kill(self._process.pid, number)

    def communicate(self, timeout=120):
        """What it still writes to its two streams; waits for its end."""
        said = {}
        streams = {"out": self.stdout, "err": self.stderr}
        readers = [Thread(target=lambda name=name: said.update({name: streams[name].read()})) for name in streams]
        for reader in readers:
            reader.start()
        self._process.join(timeout)
        assert self._process.exitcode is not None, "it has not ended"
        for reader in readers:
            reader.join()
        return said["out"], said["err"]

    def close(self):
        """End it, if it has not ended."""
        self._process.kill()
        self._process.join()
        self._process.close()
        self.stdout.close()
        self.stderr.close()


def _run(out, err, env, target, args):
    for number, end in ((1, out), (2, err)):
        os.dup2(end.fileno(), number)
        end.close()
    os.environ.update(env)
    torch.set_num_threads(1)
    try:
        target(*args)
    finally:
        sys.stdout.flush()
