"""The coordinator: the processes of one run meet there, and it tells all of them when one has failed.

It takes no part in the training. `hosts` starts it beside process 0, as a process of its own, so that it outlives
process 0 and can report its failure. Every process holds one connection to it, of JSON lines:

    process:      {"index": 1, "count": 2, "host": "node-7", "pid": 4242}, on arrival
    coordinator:  {"service": 40123, "first_process": "process 0 on ..."}, when all are there: the port of JAX's service
    process:      {"heartbeat": "saving step 100"} every second: what it is doing; empty after the last of its steps
    process:      {"stuck": "has been waiting for the end of step 12 for 600 s, ..."}, for longer than it may
    process:      {"suspicion": "failed: ..."} when a collective failed, for which another process may be the reason
    process:      {"end": "", "status": 0} when it is done, or why it fails and with which status
    coordinator:  {"verdict": "process 1 on node-7 (pid 4242) failed: ...", "status": 1}, to all the others, and of a
                  run that is stuck to all; they end with that status

A connection that ends without an `end` means that the process was killed or its host is gone: the kernel notices
either, however busy the process was. Nothing of JAX is imported but that service.
"""

import argparse
import asyncio
import contextlib
import json
import math
import os
import signal
import socket
import time
from collections.abc import Callable
from typing import Any

from gemma2_jax.cluster import jax_internals
from gemma2_jax.command_line import EXIT_FAILED, EXIT_STUCK

SILENCE_SECONDS = 15  # after which a host that does not answer is considered gone
_HEARTBEAT_SECONDS = 5  # in which each process that lives sends a heartbeat, after another one has said it is stuck
PREPARING = "preparing its first step"  # what a process is doing before it
_PREPARING_SECONDS = 1800  # for which one that prepares may send no heartbeat, as when it reads from a slow disk
_LOOK_SECONDS = 60  # between looks for one that sends none
_MOST_NAMES = 4  # of processes in a verdict
_FAREWELL_SECONDS = 10  # for which JAX's service goes on after the first failure, as processes abort without it
_SHUTDOWN_SECONDS = 60  # for which JAX's service lets a process that is done wait for the others


def enable_keepalive(connection: socket.socket) -> None:
    """Makes the kernel end a connection whose remote host no longer answers."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, SILENCE_SECONDS // 3)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, SILENCE_SECONDS // 3)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 2)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, SILENCE_SECONDS * 1000)


class Coordinator:
    """Serves `count` processes until all are done, one fails, or some have not arrived after `patience` seconds."""

    def __init__(self, count: int, patience: float):
        self._count, self._patience = count, patience
        self._writers: dict[int, asyncio.StreamWriter] = {}
        self._names: dict[int, str] = {}
        self._gone: set[int] = set()
        self._heartbeats: dict[int, tuple[float, str]] = {}  # when the newest of each process came, and what it does
        self._has_verdict, self._done = False, asyncio.Event()
        self._service: Any = None

    async def serve(self, listener: socket.socket) -> None:
        """Returns when all processes have gone, or _FAREWELL_SECONDS after they have been told to."""
        await asyncio.start_server(self._attend, sock=listener)
        asyncio.get_running_loop().call_later(self._patience, self._give_up)
        self._look()
        await self._done.wait()

    async def _attend(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        enable_keepalive(writer.get_extra_info("socket"))
        try:
            hello = json.loads(await reader.readline())
            index, name = hello["index"], f"process {hello['index']} on {hello['host']} (pid {hello['pid']})"
        except (OSError, ValueError, KeyError, TypeError):
            writer.close()  # not a process of a run
            return
        if hello["count"] != self._count or index in self._writers:
            conflict = (
                f"{self._names[index]} has that index" if index in self._writers else f"process 0 for {self._count}"
            )
            text = f"{name} asks for a run of {hello['count']} process(es), but {conflict}"
            _send(writer, verdict=text)
            self._send_verdict(text)
            return
        self._writers[index], self._names[index] = writer, name
        if len(self._writers) == self._count:
            self._start()
        await self._follow(index, reader)

    def _start(self) -> None:
        """Starts JAX's service, now that all processes have arrived, and tells each of them its port."""
        with socket.create_server(("", 0)) as free:
            port = free.getsockname()[1]
        self._service = jax_internals.serve_processes(f"[::]:{port}", self._count, _SHUTDOWN_SECONDS)
        for writer in self._writers.values():
            _send(writer, service=port, first_process=self._names[0])

    async def _follow(self, index: int, reader: asyncio.StreamReader) -> None:
        has_ended = False
        with contextlib.suppress(OSError):
            async for line in reader:
                match json.loads(line):
                    case {"heartbeat": str(doing)}:
                        beat = (time.monotonic(), doing) if doing else (math.inf, "done with its steps")
                        self._heartbeats[index] = beat
                    case {"stuck": str(text)}:
                        has_ended = True  # as far as a verdict goes, which follows even where it ends before that
                        self._call_out(self._end_stuck, index, text)
                    case {"suspicion": str(text)}:
                        self._call_out(self._end_silent, index, text)
                    case {"end": str(reason), "status": int(status)}:
                        has_ended = True
                        if reason:
                            self._send_verdict(f"{self._names[index]} {reason}", index, status)
        if not has_ended:
            self._send_verdict(f"{self._names[index]} stopped answering", index)
        self._gone.add(index)
        if len(self._gone) == len(self._writers):
            self._done.set()

    def _give_up(self) -> None:
        missing = [str(index) for index in range(self._count) if index not in self._writers]
        if missing:
            self._send_verdict(
                f"process(es) {', '.join(missing)} of {self._count} did not come in {self._patience:g} s; "
                "start the same command for each of them"
            )

    def _look(self) -> None:
        """Looks for processes that prepare and stand still, and ends the run where they still do a little later.

        At their steps, they are waited for by others, which say that they are stuck.
        """
        loop, since = asyncio.get_running_loop(), time.monotonic() - _PREPARING_SECONDS
        if any(at < since and doing == PREPARING for at, doing in self._heartbeats.values()):
            loop.call_later(_HEARTBEAT_SECONDS, self._end_standing, since)
        loop.call_later(_LOOK_SECONDS, self._look)

    def _end_standing(self, since: float) -> None:
        if silent := self._describe_silent(since):
            self._send_verdict("; ".join(silent[:_MOST_NAMES]), status=EXIT_STUCK)

    def _call_out(self, decide: Callable[[int, str, float], None], index: int, text: str) -> None:
        """Waits for a heartbeat of each process, as this one waits for others, and then decides what to do."""
        now = time.monotonic()
        at, doing = self._heartbeats.get(index, (now, ""))
        self._heartbeats[index] = (max(at, now), doing)
        asyncio.get_running_loop().call_later(_HEARTBEAT_SECONDS, decide, index, text, now)

    def _end_stuck(self, index: int, text: str, since: float) -> None:
        """Ends the run of a process that is stuck, and names those that may be the reason: the silent ones, or others
        that do something else.
        """
        doing = self._heartbeats[index][1]
        unheard = [name for other, name in self._names.items() if other not in {*self._heartbeats, *self._gone}]
        silent = self._describe_silent(since) + [f"{name} has not been heard of at its steps" for name in unheard]
        others = silent or [
            f"{self._names[other]} is {does}"
            for other, (_, does) in self._heartbeats.items()
            if does != doing and other not in self._gone
        ]
        if not others and self._count > 1:
            others = ["so have all others, so that what connects them may be the reason"]
        self._send_stuck(index, text, others)

    def _end_silent(self, index: int, text: str, since: float) -> None:
        """Ends the run where processes at their steps have been silent since this one's collective failed.

        One that prepares may be silent for so long, as it reads or compiles.
        """
        if silent := self._describe_silent(since, but=PREPARING):
            self._send_stuck(index, text, silent)

    def _describe_silent(self, since: float, but: str = "") -> list[str]:
        """The processes that have sent nothing since then, the longest silent first, but for those doing that."""
        now = time.monotonic()
        silent = sorted(
            (at, other, doing) for other, (at, doing) in self._heartbeats.items() if at < since and doing != but
        )
        return [
            f"{self._names[other]} has not answered for {now - at:.0f} s, and was {doing} then"
            for at, other, doing in silent
            if other not in self._gone
        ]

    def _send_stuck(self, index: int, text: str, others: list[str]) -> None:
        more = [f"and {len(others) - _MOST_NAMES} more"] if len(others) > _MOST_NAMES else []
        self._send_verdict("; ".join([f"{self._names[index]} {text}", *others[:_MOST_NAMES], *more]), status=EXIT_STUCK)

    def _send_verdict(self, text: str, index: int | None = None, status: int = EXIT_FAILED) -> None:
        if self._has_verdict:
            return
        self._has_verdict = True
        for recipient, writer in self._writers.items():
            if recipient != index:
                _send(writer, verdict=text, status=status)
        asyncio.get_running_loop().call_later(_FAREWELL_SECONDS, self._done.set)


def _send(writer: asyncio.StreamWriter, **message: object) -> None:
    writer.write(json.dumps(message).encode() + b"\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=Coordinator.__doc__)
    parser.add_argument("--listener", type=int, help="file descriptor of a socket that listens")
    parser.add_argument("--count", type=int, help="processes of the run")
    parser.add_argument("--patience", type=float, help="seconds for all of them to come")
    arguments = parser.parse_args()
    # A terminal or a scheduler signals every process; this one ends when the others have.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)

    async def serve() -> None:
        await Coordinator(arguments.count, arguments.patience).serve(socket.socket(fileno=arguments.listener))
        os._exit(0)  # the destructor of JAX's service would wait for processes that are gone

    asyncio.run(serve())


if __name__ == "__main__":
    main()
