import os
import socket
import subprocess
import sys

import pytest

from slimconv_jax.errors import InputError
from slimconv_jax.files import MissingFileError, absolute, open_file, read_bytes, read_json


def loop(path):
    path.symlink_to(path)


def listen(path):
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.fspath(path))


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo, loop, listen])
def test_what_is_no_file_is_not_waited_for(tmp_path, make, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the address of a socket is short
    path = tmp_path / "a"
    make(path if make is not listen else "a")
    with pytest.raises(OSError):
        open_file(path)
    with pytest.raises(InputError, match=f"^cannot read {path}: \\w") as error:
        read_json(path)
    assert not isinstance(error.value, MissingFileError)


@pytest.mark.process
def test_what_a_shell_pipes_in_is_read(tmp_path):
    program = "import sys; from slimconv_jax.files import read_text; print(read_text(sys.argv[1]))"
    command = f"\"$0\" -c '{program}' <(sleep 0.2; echo hello)"
    run = ["bash", "-c", command, sys.executable]
    assert subprocess.run(run, capture_output=True, text=True).stdout == "hello\n\n"


def test_a_device_has_no_end():
    with pytest.raises(OSError, match="It is a pipe or a device, not a file"):
        open_file("/dev/zero")


def test_a_path_through_a_loop_of_links_is_a_sentence(tmp_path):
    loop(tmp_path / "a")
    with pytest.raises(InputError, match=r"^cannot read .*/a.*: Too many levels of symbolic links"):
        read_json(absolute(tmp_path / "a" / "b"))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "Expecting value"),
        ("{" * 100_000, "Expecting property name"),
        ("[" * 100_000, "it is nested more than 32 deep"),
        ('{"a":' * 100_000, "it is nested more than 32 deep"),
        ("[" * 33 + "]" * 33, "it is nested more than 32 deep"),
        ("9" * 5000, "Exceeds the limit"),
        (b"\xff", "can't decode byte 0xff"),
    ],
)
def test_text_that_is_no_json(tmp_path, content, reason):
    path = tmp_path / "a.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=f"^{path} is damaged: it is not JSON .*{reason}") as error:
        read_json(path)
    assert "\n" not in str(error.value)


def test_json_as_it_should_be(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("\ufeff" + "[" * 31 + '{"a": 1}' + "]" * 31)
    content = read_json(path)
    for _ in range(31):
        (content,) = content
    assert content == {"a": 1}
    with pytest.raises(MissingFileError, match=f"^there is no file {path}/b$"):
        read_json(path / "b")


def test_a_text_without_end_is_not_read(tmp_path):
    path = tmp_path / "a.json"
    path.touch()
    os.truncate(path, 2**30)
    with pytest.raises(InputError, match=f"^cannot read {path}: It has more than 16777216 bytes"):
        read_json(path)


@pytest.mark.parametrize("address", ["foo://a/b.json", "://", "hf://b"])
def test_addresses_that_nothing_reads(address):
    for read in (absolute, read_bytes, read_json):
        with pytest.raises(
            InputError, match=f"^{address} is an address that nothing here reads; a"
        ):
            read(address)
