"""How the processes of a run find each other, before JAX connects them.

JAX's own service crashes where its port is taken, and aborts every process some minutes after one
did not come. So the first process listens at the same address before, and the others tell it that
they are there: a line of JSON each way. When all are, they leave the address to JAX.
"""

import contextlib
import json
import os
import select
import socket
import time

from slimconv_jax.console import Status
from slimconv_jax.errors import InputError

_SECONDS_TO_ANSWER = 10
_SECONDS_TO_INTRODUCE_ONESELF = 1
_SECONDS_OF_SILENCE = 60
_SECONDS_BETWEEN_LINES = 30


def parse_address(text: str) -> tuple[str, int]:
    """Host and port of "HOST:PORT", where an IPv6 address stands in brackets.

    Raises:
      ValueError: if it is no such address.
    """
    host, colon, port = text.rpartition(":")
    is_port = port.isascii() and port.isdigit() and len(port) <= 5 and 0 < int(port) < 2**16
    if not host or not colon or not is_port:
        raise InputError(f"--coordinator_address={text} must be HOST:PORT, with a port up to 65535")
    return host.removeprefix("[").removesuffix("]"), int(port)


def meet(address: str, count: int, index: int, *, seconds: float) -> None:
    """Waits until all processes of a run are there, and says who is missing.

    Args:
      address: "HOST:PORT" of the first process, the same for all.
      count: how many processes there are.
      index: which one this is, from 0.
      seconds: how long to wait.

    Raises:
      ValueError: if they are not there in time, the port is taken, what answers at the address is
        something else, or two processes are the same one.
    """
    host, port = parse_address(address)
    with Status() as status:
        told = _Told(status, seconds)
        if index == 0:
            _gather(port, count, told)
        else:
            _join(host, port, count, index, told)


class _Told:
    """What is told while the time passes.

    Attributes:
      left: seconds.
    """

    def __init__(self, status: Status, seconds: float):
        self._status = status
        self.seconds = seconds
        self._start = time.monotonic()
        self._last_text, self._next_line = "", 0.0

    @property
    def left(self) -> float:
        return self._start + self.seconds - time.monotonic()

    def tell(self, text: str) -> None:
        """Tells what is waited for: each time on a terminal, on a plain log at times."""
        now = time.monotonic()
        if text != self._last_text or now >= self._next_line or self._status.is_terminal:
            self._status.update(f"{text} ({max(self.left, 0):.0f} s left)")
            self._last_text, self._next_line = text, now + _SECONDS_BETWEEN_LINES


def _gather(port: int, count: int, told: _Told) -> None:
    """The first process: waits for the others, and tells each of them when all are there."""
    here: dict[int, socket.socket] = {}
    try:
        with _listen(port) as server:
            while missing := sorted(set(range(1, count)) - here.keys()):
                words = f"waiting for {_name(missing)} of {count}"
                if told.left <= 0:
                    reason = f"{_name(missing)} of {count} did not come in {told.seconds:g} s"
                    _send_all(here, {"error": reason})
                    raise InputError(f"the processes cannot be connected: {reason}")
                told.tell(words)
                _send_all(here, {"waiting": words})
                readable, _, _ = select.select([server, *here.values()], [], [], 1)
                if server in readable:
                    _receive_one(server, count, here)
                # One that was stopped may be started again.
                for index in [i for i, connection in here.items() if connection in readable]:
                    here.pop(index).close()  # they say nothing more, so this is its end
        _send_all(here, {"go": True})
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
            f"{os.strerror(error.errno)}; choose another one, for all processes"
        ) from None


def _receive_one(server: socket.socket, count: int, here: dict[int, socket.socket]) -> None:
    """Takes one more process in, or tells it why not; whatever else calls is left alone."""
    connection, _ = server.accept()
    hello = _received(connection, _SECONDS_TO_INTRODUCE_ONESELF)
    index = hello.get("process_id") if hello else None
    if type(index) is not int or not 0 < index < 2**31:
        connection.close()
        return
    reason = None
    if hello.get("num_processes") != count:
        told = hello.get("num_processes")
        reason = f"--num_processes is {count} in process 0 and {told} in process {index}"
    elif index in here:
        reason = f"there are two processes with --process_id={index}"
    if reason is not None:
        _send_all({index: connection}, {"error": reason})
        connection.close()
        return
    _send_all({index: connection}, {"here": True})
    here[index] = connection


def _join(host: str, port: int, count: int, index: int, told: _Told) -> None:
    """Another process: tells the first one that it is there, and waits until all are."""
    where = f"process 0 at {host}:{port}"
    while True:
        try:
            connection = socket.create_connection((host, port), timeout=_SECONDS_TO_ANSWER)
            break
        except (OSError, UnicodeError) as error:  # the latter of a host that is not a name
            reason = getattr(error, "strerror", None) or str(error)
        if told.left <= 0:
            raise InputError(
                f"the processes cannot be connected: {where} did not answer in {told.seconds:g} s "
                f"({reason}); it has to be started, too, and its port open"
            )
        told.tell(f"waiting for {where} ({reason})")
        time.sleep(min(1, max(told.left, 0)))
    with connection:
        _send_all({0: connection}, {"process_id": index, "num_processes": count})
        answer = _received(connection)
        if answer is None:
            raise InputError(
                f"what answers at {host}:{port} is not process 0 waiting for this one: another "
                "program has that port, or the run has begun already"
            )
        while "go" not in answer:
            if "error" in answer:
                raise InputError(f"the processes cannot be connected: {answer['error']}")
            told.tell(str(answer.get("waiting", "waiting for the others"))[:200])
            # The first process speaks every second, unless it listens to somebody else.
            answer = _received(connection, _SECONDS_OF_SILENCE)
            if answer is None:
                raise InputError(f"the processes cannot be connected: {where} is gone")


def _name(indices: list[int]) -> str:
    some = ", ".join(map(str, indices[:8])) + (", ..." if len(indices) > 8 else "")
    return f"process {some}" if len(indices) == 1 else f"processes {some}"


def _send_all(to: dict[int, socket.socket], message: dict) -> None:
    for connection in to.values():
        connection.settimeout(_SECONDS_TO_ANSWER)
        with contextlib.suppress(OSError):  # it is gone, which reading finds
            connection.sendall(json.dumps(message).encode() + b"\n")


def _received(connection: socket.socket, seconds: float = _SECONDS_TO_ANSWER) -> dict | None:
    """The next line of the other side, as JSON; None if it is none, or does not come in time."""
    deadline = time.monotonic() + seconds
    text = b""
    try:
        while not text.endswith(b"\n") and len(text) < 1000:
            connection.settimeout(max(deadline - time.monotonic(), 0.001))
            byte = connection.recv(1)
            if not byte:
                return None
            text += byte
        message = json.loads(text)
    except (OSError, ValueError, RecursionError):
        return None
    return message if isinstance(message, dict) else None
