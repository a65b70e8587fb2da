import io
import sys
import time
import warnings

import pytest

from slimconv_jax.console import Progress, prepare_console, say
from slimconv_jax.errors import InputError, InputWarning


@pytest.mark.parametrize(
    ("seconds", "lines"),
    [
        ([1, 1.5, 1.9, 1.99], []),  # over before it needs telling
        ([1, 3, 5, 9], ["decoding: 20 of 40 images"]),
        ([3, 4, 14, 15], ["decoding: 10 of 40 images", "decoding: 30 of 40 images"]),
        ([1, 1, 1, 30], []),  # no line about the end
    ],
)
def test_a_plain_log_gets_a_line_every_ten_seconds(seconds, lines, monkeypatch, capsys):
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with Progress("decoding", 40) as progress:
        for later in seconds:
            now = 100.0 + later
            progress.advance(10)
    assert progress.done == 40
    assert capsys.readouterr().out.splitlines() == lines


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1"])
def test_any_name_can_be_printed(encoding, monkeypatch):
    name = "caf\udce9 \u65e5"  # bytes that are no UTF-8, in Python's words, and a character
    streams = [io.TextIOWrapper(io.BytesIO(), encoding, "strict") for _ in range(2)]
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    prepare_console()
    print(name)
    say(name)
    print(name, file=sys.stderr)
    lines = []
    for stream in streams:
        stream.flush()
        lines += stream.buffer.getvalue().splitlines()
    assert lines[0] == lines[1] == lines[2]
    assert lines[0].startswith(b"caf\\udce9 ")


def test_a_name_does_not_command_the_terminal(monkeypatch, capsys):
    name = "red\x1b[31m\x07\x9b2J or\nnot"
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    prepare_console()
    say(name)
    said = capsys.readouterr().out
    assert said == r"red\x1b[31m\x07\x9b2J" + " or\nnot\n"
    assert str(InputError(name)) + "\n" == said
    assert warnings.formatwarning(name, InputWarning, "a.py", 3) == f"warning: {said}"


def test_a_warning_about_input_is_one_line(monkeypatch):
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    prepare_console()
    assert warnings.formatwarning("two left", InputWarning, "a.py", 3) == "warning: two left\n"
    assert "a.py:3: UserWarning: other" in warnings.formatwarning("other", UserWarning, "a.py", 3)
