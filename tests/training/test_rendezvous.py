"""Processes that find each other, or learn why not; each is a thread here."""

import concurrent.futures
import contextlib
import json
import socket
import threading
import time

import pytest

from slimconv_jax.training.rendezvous import meet, parse_address


@pytest.fixture
def address():
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    return f"127.0.0.1:{port}"


@pytest.fixture
def pool():
    with concurrent.futures.ThreadPoolExecutor() as pool:
        yield pool


@contextlib.contextmanager
def server(address, answer):
    """Another program at an address, which says something to whoever calls."""
    host, port = parse_address(address)

    def serve():
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listening.accept()
                with connection:
                    connection.recv(100)
                    connection.sendall(answer)

    with socket.create_server((host, port)) as listening:
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield
        finally:
            listening.shutdown(socket.SHUT_RDWR)
            thread.join()


def test_all_come_in_any_order_and_leave_the_port_free(address, pool, capsys):
    late = pool.submit(meet, address, 4, 2, seconds=30)  # before there is anyone to find
    time.sleep(0.1)
    others = [pool.submit(meet, address, 4, index, seconds=30) for index in (1, 0)]
    time.sleep(0.1)
    others.append(pool.submit(meet, address, 4, 3, seconds=30))
    for future in (late, *others):
        future.result()
    said = capsys.readouterr().err
    assert "waiting for process" in said and "s left)" in said
    meet(address, 1, 0, seconds=30)  # which listens there once more


def test_who_is_missing_is_named_to_all(address, pool):
    futures = [pool.submit(meet, address, 4, index, seconds=2) for index in (0, 2)]
    for future in futures:
        with pytest.raises(
            ValueError, match=r"connected: processes 1, 3 of 4 did not come in 2 s$"
        ):
            future.result()


def test_one_that_is_started_again_counts_once(address, pool):
    first = pool.submit(meet, address, 3, 0, seconds=30)
    host, port = parse_address(address)
    while True:
        with contextlib.suppress(ConnectionRefusedError):
            connection = socket.create_connection((host, port))
            break
    with connection:
        connection.sendall(b'{"process_id": 1, "num_processes": 3}\n')
        assert json.loads(connection.makefile().readline()) == {"here": True}
        with pytest.raises(ValueError, match=r"there are two processes with --process_id=1$"):
            meet(address, 3, 1, seconds=30)
        with pytest.raises(ValueError, match=r"is 3 in process 0 and 5 in process 2$"):
            meet(address, 5, 2, seconds=30)
    others = [pool.submit(meet, address, 3, index, seconds=30) for index in (1, 2)]
    for future in (first, *others):
        future.result()


def test_strangers_who_call_are_left_alone(address, pool):
    first = pool.submit(meet, address, 2, 0, seconds=30)
    host, port = parse_address(address)
    calls = (b"", b"GET / HTTP/1.1\r\n\r\n", b"[" * 5000, b"[]\n", b'{"process_id": -1}\n', b"{}\n")
    while not first.running():
        time.sleep(0.01)
    for call in calls:
        with contextlib.suppress(ConnectionError), socket.create_connection((host, port)) as caller:
            caller.sendall(call)
    meet(address, 2, 1, seconds=30)
    first.result()


def test_nobody_is_there(address):
    with pytest.raises(
        ValueError, match=f"process 0 at {address} did not answer in 1 s .Connection re"
    ):
        meet(address, 2, 1, seconds=1)


@pytest.mark.parametrize("answer", [b"HTTP/1.1 400 Bad Request\r\n", b"", b"[]\n", b"[" * 5000])
def test_another_program_has_the_address(address, answer):
    with server(address, answer):
        with pytest.raises(
            ValueError, match=f"what answers at {address} is not process 0 waiting for"
        ):
            meet(address, 2, 1, seconds=30)
        with pytest.raises(
            ValueError, match=r"^port \d+ of this host, .* cannot be used: Address alr"
        ):
            meet(address, 2, 0, seconds=30)


@pytest.mark.parametrize(
    "text", ["host", "host:", ":1", "host:x", "host:0", "host:65536", "host:-1", "host:\u00b2"]
)
def test_what_is_no_address(text):
    with pytest.raises(ValueError, match=f"^--coordinator_address={text} must be HOST:PORT"):
        parse_address(text)


def test_addresses():
    assert parse_address("host:1") == ("host", 1)
    assert parse_address("[::1]:65535") == ("::1", 65535)
