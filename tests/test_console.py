import time

import pytest

from slimconv_jax.console import Progress


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
