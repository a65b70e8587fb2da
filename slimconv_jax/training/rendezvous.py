"""Lets the processes of a run find each other before JAX connects them.

JAX's own service crashes if its port is taken, and if one process does not come it aborts the
others minutes later. So the first process listens at the same address before, and the others
report to it: a line of JSON each way. When all are there, they leave the address to JAX.
"""

import contextlib
import json
import os
import select
import socket
import time
from collections.abc import Iterable

from slimconv_jax.console import Status
from slimconv_jax.errors import InputError

_SECONDS_TO_ANSWER = 10
_SECONDS_TO_SAY_HELLO = 1
_SECONDS_OF_SILENCE = 60
_SECONDS_BETWEEN_LINES = 30


def parse_address(text: str) -> tuple[str, int]:
    """Parses "HOST:PORT", where an IPv6 address stands in brackets; returns host and port.

    Raises:
      ValueError: if it is not such an address.
    """
    host, colon, port = text.rpartition(":")
    is_port = port.isascii() and port.isdigit() and len(port) <= 5 and 0 < int(port) < 2**16
    if not host or not colon or not is_port:
        raise InputError(f"--coordinator_address={text} must be HOST:PORT, with a port up to 65535")
    return host.removeprefix("[").removesuffix("]"), int(port)


def meet(address: str, count: int, index: int, *, seconds: float) -> None:
    """Waits until all processes of a run are there, and reports who is missing.

    Args:
      address: "HOST:PORT" of the first process, the same for all.
      count: the number of processes.
      index: of this process, from 0.
      seconds: how long to wait.

    Raises:
      ValueError: if they are not there in time, the port is taken, another program answers at the
        address, or two processes have the same index.
    """
    host, port = parse_address(address)
    with Status() as status:
        wait = _Wait(status, seconds)
        if index == 0:
            _gather(port, count, wait)
        else:
            _join(host, port, count, index, wait)


class _Wait:
    """A wait with a time limit, which reports what it waits for.

    Attributes:
      seconds: the limit.
      left: seconds until then.
    """

    def __init__(self, status: Status, seconds: float):
        self._status = status
        self.seconds = seconds
        self._start = time.monotonic()
        self._last_text, self._next_line = "", 0.0

    @property
    def left(self) -> float:
        return self._start + self.seconds - time.monotonic()

    def report(self, text: str) -> None:
        """Shows a text and the time left: on a plain log only if it is new, or now and then."""
        now = time.monotonic()
        if text != self._last_text or now >= self._next_line or self._status.is_terminal:
            self._status.update(f"{text} ({max(self.left, 0):.0f} s left)")
            self._last_text, self._next_line = text, now + _SECONDS_BETWEEN_LINES


def _gather(port: int, count: int, wait: _Wait) -> None:
    """As the first process, waits for the others, and notifies them when all are there."""
    here: dict[int, socket.socket] = {}
    try:
        with _listen(port) as server:
            while missing := sorted(set(range(1, count)) - here.keys()):
                who = f"{_name(missing)} of {count}"
                if wait.left <= 0:
                    reason = f"{who} did not come in {wait.seconds:g} s"
                    _send_all(here.values(), error=reason)
                    raise InputError(f"the processes cannot be connected: {reason}")
                wait.report(f"waiting for {who}")
                _send_all(here.values(), waiting=f"waiting for {who}")
                readable, _, _ = select.select([server, *here.values()], [], [], 1)
                # They send nothing more, so this is the end of one, which may be started again.
                for index in [i for i, connection in here.items() if connection in readable]:
                    here.pop(index).close()
                if server in readable:
                    _receive_one(server, count, here)
        _send_all(here.values(), go=True)
        for connection in here.values():  # they close first, which leaves the port free
            _received(connection)
    finally:
        for connection in here.values():
            connection.close()


def _listen(port: int) -> socket.socket:
    try:
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
        return socket.create_server(("", port))
    except OSError as error:
        raise InputError(
            f"port {port} of this host, of --coordinator_address, cannot be used: "
            f"{os.strerror(error.errno)}; choose another one, the same for all processes"
        ) from None


def _receive_one(server: socket.socket, count: int, here: dict[int, socket.socket]) -> None:
    """Admits one more process, or sends it the reason why not; hangs up on other programs."""
    connection, _ = server.accept()
    hello = _received(connection, _SECONDS_TO_SAY_HELLO) or {}
    index, its_count = hello.get("process_id"), hello.get("num_processes")
    if type(index) is not int or not 0 < index < 2**31:
        connection.close()
        return
    if its_count == count and index not in here:
        here[index] = connection
        _send_all([connection], here=True)
        return
    reason = f"there are two processes with --process_id={index}"
    if its_count != count:
        reason = f"--num_processes is {count} in process 0 and {its_count} in process {index}"
    _send_all([connection], error=reason)
    connection.close()


def _join(host: str, port: int, count: int, index: int, wait: _Wait) -> None:
    """As another process, reports to the first one, and waits until all are there."""
    where = f"process 0 at {host}:{port}"
    while True:
        try:
            connection = socket.create_connection((host, port), timeout=_SECONDS_TO_ANSWER)
            break
        except (OSError, UnicodeError) as error:  # the latter if the host is not a name
            reason = getattr(error, "strerror", None) or str(error)
        if wait.left <= 0:
            raise InputError(
                f"the processes cannot be connected: {where} did not answer in {wait.seconds:g} s "
                f"({reason}); it has to run, too, and its port must be open"
            )
        wait.report(f"waiting for {where} ({reason})")
        time.sleep(min(1, max(wait.left, 0)))
    with connection:
        _send_all([connection], process_id=index, num_processes=count)
        if (answer := _received(connection)) is None:
            raise InputError(
                f"what answers at {host}:{port} is not process 0 waiting for this one: another "
                "program has that port, or the run has started already"
            )
        while "go" not in answer:
            if "error" in answer:
                raise InputError(f"the processes cannot be connected: {answer['error']}")
            wait.report(str(answer.get("waiting", "waiting for the others"))[:200])
            # The first process sends a line every second, unless it reads from another program.
            if (answer := _received(connection, _SECONDS_OF_SILENCE)) is None:
                raise InputError(f"the processes cannot be connected: {where} is gone")


def _name(indices: list[int]) -> str:
    some = ", ".join(map(str, indices[:8])) + (", ..." if len(indices) > 8 else "")
    return f"process {some}" if len(indices) == 1 else f"processes {some}"


def _send_all(connections: Iterable[socket.socket], **message) -> None:
    for connection in connections:
        connection.settimeout(_SECONDS_TO_ANSWER)
        with contextlib.suppress(OSError):  # it is gone, which reading detects
            connection.sendall(json.dumps(message).encode() + b"\n")


def _received(connection: socket.socket, seconds: float = _SECONDS_TO_ANSWER) -> dict | None:
    """Returns the next line as JSON; None if it is not a JSON object or does not come in time."""
    deadline = time.monotonic() + seconds
    text = b""
    try:
        while not text.endswith(b"\n") and len(text) < 1000:
            connection.settimeout(max(deadline - time.monotonic(), 0.001))
            if not (byte := connection.recv(1)):
                return None
            text += byte
        message = json.loads(text)
    except (OSError, ValueError, RecursionError):
        return None
    return message if isinstance(message, dict) else None
