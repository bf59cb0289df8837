"""A ``python`` that spends no time on imports: its programs run in forks of a server, which is a fork of the tests.

``megatron-dwm`` and ``torchrun`` are such programs, and the ranks that they start; launchers wait for their turn.

Importing torch and megatron-core takes a command seven seconds of processor time, and tests of pages and benchmarks run
dozens. What a command does is the same; that it imports what it needs is what the tests of the wheel, the quickstart
and the SLURM scripts show, which start real interpreters.
"""

from __future__ import annotations

import array
import atexit
import contextlib
import importlib
import itertools
import json
import multiprocessing
import os
import runpy
import selectors
import shlex
import signal
import socket
import sys
from multiprocessing.managers import SyncManager
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.strategies import filesystem_async

from tests.distributed.harness import checkpoint_manager
from tests.e2e import launch  # noqa: F401  imports what commands need
from tests.turns import turn

_IMPORTED = (
    "matplotlib.figure",
    "megatron_dwm.analysis.report.page",
    "megatron_dwm.corpora.pipelines",
    "torch.distributed.run",
)
"""Modules of pages, plots, launchers and text processing, in addition to those of runs."""

CLIENT = """
import array, json, os, socket, sys
server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
server.connect({address!r})
message = json.dumps({{"argv": sys.argv[1:], "cwd": os.getcwd(), "environment": dict(os.environ)}}).encode()
server.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * len(message))
server.sendmsg([message], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0, 1, 2]))])
os._exit(int(server.recv(16) or b"1"))
"""
"""Sends its arguments, folder, environment and open files to the server, and ends with the program's exit code."""


def start(folder: Path) -> tuple[Path, multiprocessing.Process]:
    """Start the server, and write the commands ``python``, ``megatron-dwm`` and ``torchrun`` into a folder.

    Returns:
        the folder of the commands, and the server, which the caller must end.
    """
    address = str(folder / "server")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(address)
    listener.listen()
    commands = folder / "bin"
    commands.mkdir()
    client = folder / "client.py"
    client.write_text(CLIENT.format(address=address))
    interpreter = shlex.join([sys.executable, "-S", "-E", str(client)])
    # Launchers start ranks unbuffered. Programs with other flags than -m, such as processes of multiprocessing, get a
    # real interpreter.
    real = f'[ "$1" = -u ] && shift\ncase "$1" in -m) ;; -*) exec {shlex.quote(sys.executable)} "$@" ;; esac\n'
    scripts = {"python": f'{real}exec {interpreter} "$@"'}
    for name in ("megatron-dwm", "torchrun"):
        scripts[name] = f'exec {interpreter} {shlex.quote(str(Path(sys.executable).parent / name))} "$@"'
    for name, script in scripts.items():
        (commands / name).write_text(f"#!/bin/sh\n{script}\n")
        (commands / name).chmod(0o755)
    arguments = (listener, str(commands / "python"), checkpoint_manager())
    server = multiprocessing.get_context("fork").Process(target=_serve, args=arguments)
    server.start()
    listener.close()
    return commands, server  # type: ignore[return-value]


def _serve(listener: socket.socket, python: str, manager: SyncManager) -> None:
    """Fork for each request, and answer with the exit code of the fork."""
    for package in ("multiprocessing", "multiprocess"):
        if (module := sys.modules.get(f"{package}.forkserver")) is not None:
            module._forkserver.__init__()  # the tests' children are not this process's
    for name in _IMPORTED:
        importlib.import_module(name)
    selector = selectors.DefaultSelector()
    selector.register(listener, selectors.EVENT_READ)
    while True:
        for key, _ in selector.select():
            if key.data is None:
                client, _ = listener.accept()
                process = os.fork()
                if process == 0:
                    selector.close()
                    listener.close()
                    _run(client, python, manager)
                selector.register(os.pidfd_open(process), selectors.EVENT_READ, (process, client))
                continue
            process, client = key.data
            selector.unregister(key.fd)
            os.close(key.fd)  # type: ignore[arg-type]
            code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
            with contextlib.suppress(BrokenPipeError):  # it was killed
                client.send(str(code if code >= 0 else 128 - code).encode())
            client.close()


def _run(client: socket.socket, python: str, manager: SyncManager) -> None:
    message, ancillary, _, _ = client.recvmsg(1 << 20, socket.CMSG_SPACE(3 * array.array("i").itemsize))
    client.close()
    files = array.array("i", ancillary[0][2])
    for target, file in enumerate(files):
        os.dup2(file, target)
        os.close(file)
    request: dict[str, Any] = json.loads(message)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_DFL)
    sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w")
    sys.executable = python  # for the programs that it starts
    filesystem_async._results_queue = manager.Queue()
    code = 1
    try:
        with turn(_ranks(request["argv"])):
            code = _exit_code(request["argv"])
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _ranks(argv: list[str]) -> int:
    """Return how many ranks a launcher is to start; 1 for any other program."""
    flags = itertools.pairwise(argv)
    return next((int(value) for flag, value in flags if flag in ("--nproc", "--nproc-per-node")), 1)


def _exit_code(argv: list[str]) -> int:
    """Run ``python argv`` and return its exit code."""
    sys.argv = argv
    try:
        if argv[0] == "-m":
            sys.argv = argv[1:]
            sys.path.insert(0, "")
            runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
        else:
            sys.path.insert(0, str(Path(argv[0]).resolve().parent))
            runpy.run_path(argv[0], run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        return 1
    return 0
