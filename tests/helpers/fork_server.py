"""A process that has imported torch, transformers and neobert, and forks a child for everything that a test wants to run as a
process of its own.

`python -m neobert` spends 5 s of processor time on imports and some tests' commands 0.1 s on their work. A child differs from a
fresh interpreter by nothing that our code could notice: it has its own session, files, environment, working directory and
signal handlers, runs `neobert.__main__` under that name, and ends as the interpreter ends. Requests come over the socket whose
number is the first argument; each has a JSON text and four file descriptors: stdin, stdout, stderr and a socket that is sent
the child's process id and, when it ends, its exit status. The server ends with the process that started it.

With a second argument, `clean`, nothing of neobert is imported, but what loads an exported folder: the children are what
`python -I -W ignore <script> ...` would be.
"""

import atexit
import contextlib
import gc
import importlib
import io
import json
import os
import pickle
import pkgutil
import random
import resource
import runpy
import selectors
import signal
import socket
import sys
import threading
import traceback
import warnings

LIBRARIES = (
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.bert.tokenization_bert",
    "transformers.models.eurobert.modeling_eurobert",
    "torch.nn.attention.varlen",
    "torch.utils.flop_counter",
    "matplotlib.backends.backend_svg",
    "matplotlib.figure",
    "pyarrow.parquet",
    "pytest",
)
LOADERS = ("transformers.models.roberta.modeling_roberta", "onnxruntime", "sentence_transformers")
QUIET = {
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}
MESSAGE_BYTES = 1 << 17


def serve(control):
    """Fork a child per request until the other end is closed. Returns the request in a child, None at the end."""
    children = {}  # pidfd -> (process id, socket that is sent its status)
    with selectors.DefaultSelector() as ready:
        ready.register(control, selectors.EVENT_READ)
        while True:
            for key, _ in ready.select():
                if key.fileobj is not control:
                    ready.unregister(key.fileobj)
                    pid, status = children.pop(key.fileobj)
                    os.close(key.fileobj)
                    with contextlib.suppress(OSError):
                        status.send(str(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])).encode())
                    status.close()
                    continue
                message, files, *_ = socket.recv_fds(control, MESSAGE_BYTES, 4)
                if not message:
                    for pid, _ in children.values():
                        os.kill(pid, signal.SIGKILL)
                    return None
                pid = os.fork()
                if pid == 0:
                    for pidfd, (_, status) in children.items():
                        os.close(pidfd)
                        status.close()
                    control.close()
                    os.close(files.pop())
                    return json.loads(message), files
                status = socket.socket(fileno=files.pop())
                for file in files:
                    os.close(file)
                with contextlib.suppress(OSError):  # who asked for it is gone; the next request is another's
                    status.send(str(pid).encode())
                pidfd = os.pidfd_open(pid)
                children[pidfd] = (pid, status)
                ready.register(pidfd, selectors.EVENT_READ)


def become(request, files):
    """Make this child what the request describes, as if an interpreter had just started."""
    os.setsid()
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    if request["max_file_bytes"] is not None:
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["max_file_bytes"], hard))
    for name, number in (("stdout", 1), ("stderr", 2)):
        buffer = io.BufferedWriter(io.FileIO(number, "w", closefd=False))
        errors = "strict" if name == "stdout" else "backslashreplace"
        is_direct = request["unbuffered"] or name == "stderr"
        setattr(sys, name, io.TextIOWrapper(buffer, "utf-8", errors, line_buffering=is_direct, write_through=is_direct))
        setattr(sys, f"__{name}__", getattr(sys, name))
    random.seed()


def perform(request):
    """`python -m neobert ...`, a script, or a function of some module with arguments."""
    if request["script"]:
        sys.argv = request["arguments"]
        # transformers read the variable when it was imported
        sys.modules["transformers.dynamic_module_utils"].HF_MODULES_CACHE = os.environ["HF_MODULES_CACHE"]
        runpy.run_path(sys.argv[0], run_name="__main__")
    elif request["call"] is None:
        sys.argv = ["neobert", *request["arguments"]]
        runpy.run_module("neobert", run_name="__main__", alter_sys=True)
    else:
        sys.path[:] = request["path"]
        module, name, arguments = request["call"]
        function = getattr(importlib.import_module(module), name)
        function(*pickle.loads(bytes.fromhex(arguments)))


def end(function, argument):
    """Call a function and end as the interpreter does after it, but for freeing every object: that takes 0.3 s."""
    try:
        code = 0
        function(argument)
    except SystemExit as stopped:
        code = stopped.code if isinstance(stopped.code, int) else int(stopped.code is not None)
        if stopped.code is not None and not isinstance(stopped.code, int):
            print(stopped.code, file=sys.stderr)
    except KeyboardInterrupt:
        raise
    except BaseException:  # noqa: BLE001, as the interpreter prints it
        traceback.print_exc()
        code = 1
    threading._shutdown()  # waits for other threads
    atexit._run_exitfuncs()
    for file in (sys.stdout, sys.stderr):
        if not file.closed:
            file.flush()
    os._exit(code % 256)


def main():
    control = socket.socket(fileno=int(sys.argv[1]))
    os.environ.update(QUIET)
    import torch

    torch.set_num_threads(1)
    if "clean" in sys.argv:
        warnings.simplefilter("ignore")
        ours = LOADERS
    else:
        import neobert

        found = (module.name for module in pkgutil.walk_packages(neobert.__path__, "neobert."))
        ours = [name for name in found if not name.endswith("__main__")]
    for name in (*LIBRARIES, *ours):
        with contextlib.suppress(ImportError):  # an optional library
            importlib.import_module(name)
    gc.collect()
    gc.freeze()  # a collection in a child need not copy what was imported
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for pytest, which then closes the socket
    child = serve(control)
    if child is not None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        become(*child)
        end(perform, child[0])


if __name__ == "__main__":
    main()
