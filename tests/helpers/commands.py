"""Ways to run the command, and functions on several ranks, as processes of their own.

They are forks of a server (fork_server.py), but where `real=True` starts an interpreter.
"""

import atexit
import functools
import json
import os
import pickle
import runpy
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from helpers.runs import ROOT

HELPERS = Path(__file__).parent


@functools.cache
def server(is_clean=False):
    """The socket of this process's fork server, which is started when it is first asked for. A clean one has no neobert."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    options, kind = (["-I"], ["clean"]) if is_clean else ([], [])
    command = [sys.executable, *options, str(HELPERS / "fork_server.py"), str(theirs.fileno()), *kind]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, [HELPERS.parent]))}
    process = subprocess.Popen(command, env=environment, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
    theirs.close()

    def end():
        ours.close()
        process.wait()

    atexit.register(end)
    return ours


class Forked:
    """A process that the server forks, with the part of subprocess.Popen's interface that the tests use."""

    def __init__(
        self,
        arguments,
        *,
        call=None,
        script=False,
        env=None,
        cwd=ROOT,
        unbuffered=False,
        discard=False,
        max_file_bytes=None,
    ):
        """`script`: the first argument is one, which finds nothing of neobert imported. `unbuffered` is python's -u; `discard`
        leaves what it prints unread; `max_file_bytes` is a disk that is soon full.
        """
        self.args, self.returncode = list(map(str, arguments)), None
        request = {
            "arguments": self.args, "call": call, "script": script, "cwd": str(cwd), "path": sys.path, "unbuffered": unbuffered,
            "env": {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}, "max_file_bytes": max_file_bytes,
        }  # fmt: skip
        self._status, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        read, write = os.pipe()
        self.stdout = open(read, encoding="utf-8")  # noqa: SIM115, closed with this object
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115
        with open(os.devnull, "r+b") as null:
            files = [null, null if discard else write, self._errors, theirs]
            files = [file if isinstance(file, int) else file.fileno() for file in files]
            socket.send_fds(server(script), [json.dumps(request).encode()], files)
        os.close(write)
        theirs.close()
        self.pid = int(self._status.recv(64))

    def poll(self):
        return self._end(0)

    def wait(self, timeout=None):
        self._end(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.returncode

    def _end(self, timeout):
        if self.returncode is None:
            self._status.settimeout(timeout)
            try:
                self.returncode = int(self._status.recv(64))
            except (TimeoutError, BlockingIOError):
                return None
            self._status.close()
        return self.returncode

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(9)

    def errors(self):
        """What it has written to stderr so far."""
        self._errors.seek(0)
        return self._errors.read()

    def communicate(self, timeout=None):
        """(the rest of stdout, stderr) once the process and all that write to its stdout have ended."""
        watchdog = threading.Timer(timeout or 600, self.kill)
        watchdog.start()
        out = self.stdout.read()
        self.wait(timeout)
        is_late = not watchdog.is_alive()
        watchdog.cancel()
        if is_late:
            raise subprocess.TimeoutExpired(self.args, timeout, out)
        return out, self.errors()


def start_neobert(*arguments, **options):
    """`neobert <arguments>` in a process of its own; see Forked."""
    return Forked(arguments, **options)


def run_neobert(*arguments, timeout=120, env=None, cwd=ROOT, real=False, **options):
    """`neobert <arguments>` to its end, output to pipes. `real` starts an interpreter for it, on the real command line."""
    if real or any(name.startswith("HF_H") for name in env or {}):  # which libraries read when they are imported
        command = [sys.executable, "-m", "neobert", *map(str, arguments)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment, cwd=cwd)
    process = Forked(arguments, env=env, cwd=cwd, **options)
    out, errors = process.communicate(timeout)
    return subprocess.CompletedProcess(process.args, process.returncode, out, errors)


def start_function(function, *arguments, **options):
    """Call a function of a module that can be imported by its name, in a process of its own; see Forked."""
    return Forked([], call=[function.__module__, function.__qualname__, pickle.dumps(arguments).hex()], **options)


def run_clean_script(command, *, env, cwd, **_):
    """As subprocess.run of `python -I -W ignore <script> ...` does it, but by a fork of a process without neobert."""
    assert command[1:4] == ["-I", "-W", "ignore"]
    process = Forked(command[4:], script=True, env=env, cwd=cwd)
    out, errors = process.communicate()
    return subprocess.CompletedProcess(command, process.returncode, out, errors)


def run_script(path, cwd):
    """A Python file as the main program, in a folder."""
    process = start_function(runpy.run_path, str(path), None, "__main__", cwd=cwd)
    out, errors = process.communicate()
    assert process.returncode == 0, errors
    return out


def spawn(function, arguments=(), nprocs=2):
    """Call `function(rank, *arguments)` in so many processes, as torch.multiprocessing.spawn does; all have to end well."""
    waiting = {rank: start_function(function, rank, *arguments, discard=True) for rank in range(nprocs)}
    while waiting:
        for rank, process in list(waiting.items()):
            if process.poll() is None:
                continue
            del waiting[rank]
            if process.returncode:
                for other in waiting.values():
                    other.kill()
                raise AssertionError(f"rank {rank} ended with {process.returncode}:\n{process.errors()}")
        time.sleep(0.02)
