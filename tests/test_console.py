import io
import subprocess
import sys
import time
import warnings

import pytest

from slimconv_jax.console import Progress, exit_status, prepare_console, say
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
    name = "caf\udce9 \u65e5"  # bytes that are not UTF-8, in Python's words, and a character
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


PRINTS = """
import sys
from slimconv_jax.console import exit_status, prepare_console, say
prepare_console(needs_stdout=sys.argv[1] == "needed")

def command():
    for number in range(20_000):  # more than a pipe holds
        say(f"line {number}")
    sys.stdout.flush()
    open(sys.argv[2], "w").write("done")

sys.exit(exit_status(command))
"""


@pytest.mark.process
@pytest.mark.parametrize("needed", [True, False])
@pytest.mark.parametrize("stdout", ["full", "closed", "read no more"])
def test_what_nobody_reads(needed, stdout, tmp_path):
    # In a process of its own, since descriptors are changed.
    shell = {"full": "{} > /dev/full", "closed": "{} >&- <&-", "read no more": "{} | head -n 1"}
    what = "needed" if needed else "beside"
    program = f"\"$0\" -c '{PRINTS}' {what} {tmp_path}/done"
    command = "set -o pipefail; " + shell[stdout].format(program)
    result = subprocess.run(
        ["bash", "-c", command, sys.executable], capture_output=True, text=True, timeout=60
    )
    went_on = not needed or stdout == "closed"
    assert result.returncode == (0 if went_on else 1), result
    assert (tmp_path / "done").exists() == went_on
    explained = needed and stdout == "full"
    sentence = "error: cannot write to standard output: No space left on device\n"
    assert result.stderr == (sentence if explained else "")


@pytest.mark.process
def test_a_full_standard_error_is_no_reason_to_stop(tmp_path):
    program = "import sys; from slimconv_jax.console import prepare_console; prepare_console(); "
    program += "print('a', file=sys.stderr); print('b', file=sys.stderr); print('c')"
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=full
        )
    assert (result.returncode, result.stdout) == (0, b"c\n")


def fail(error):
    raise error


@pytest.mark.parametrize(
    ("error", "status", "sentence"),
    [
        (InputError("no such file"), 1, "error: no such file\n"),
        (MemoryError(), 1, "error: there is not enough memory (of this machine); smaller"),
        (RuntimeError("RESOURCE_EXHAUSTED: 12 GiB\nmore"), 1, "not enough memory (RESOURCE_EXHAUS"),
        (
            RecursionError("maximum depth"),
            1,
            "error: the input is nested too deeply: maximum depth",
        ),
        (BrokenPipeError(), 1, ""),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_how_a_command_ends(error, status, sentence, capsys):
    assert exit_status(lambda: fail(error)) == status
    assert sentence in capsys.readouterr().err
    assert exit_status(lambda: None) == 0


def test_a_fault_of_our_own_is_shown_as_one():
    with pytest.raises(RuntimeError, match="a bug"):
        exit_status(lambda: fail(RuntimeError("a bug")))


@pytest.mark.process
@pytest.mark.parametrize("needed", [False, True])
def test_ctrl_c_is_not_lost_where_nothing_can_catch_it(needed):
    """As in a callback of the garbage collector, of which JAX has one."""
    code = (
        "import signal, sys, time\n"
        "from slimconv_jax.console import exit_status, prepare_console\n"
        "class Collected:\n"
        "    def __del__(self):\n"
        "        signal.raise_signal(signal.SIGINT)\n"
        "def command():\n"
        "    Collected()\n"
        "    time.sleep(30)\n"
        f"prepare_console(needs_stdout={needed})\n"
        "sys.exit(exit_status(command))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=25, check=False
    )
    assert (done.returncode, done.stderr) == (130, "interrupted\n")
