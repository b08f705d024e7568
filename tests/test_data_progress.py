"""Progress goes to stderr: a bar on a terminal, plain lines elsewhere."""

import io
import sys

import pytest

from memjax.data import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_elsewhere_a_line_tells_the_share_and_the_last_one_the_total(capsys, monkeypatch):
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.0)
    with progress.reading("tokenising", 4_000_000) as advance:
        advance(1_000_000)
        advance(3_000_000)
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert lines[:2] == ["tokenising: 25 % of 4.0 MB", "tokenising: 100 % of 4.0 MB"]
    assert lines[2].startswith("tokenising: 4.0 MB in ")


def test_a_terminal_has_a_bar(capsys, monkeypatch):
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    with progress.reading("tokenising", 4_000_000) as advance:
        advance(4_000_000)
    assert "tokenising" in screen.getvalue()
    assert "4.0/4.0 MB" in screen.getvalue()
    assert capsys.readouterr().out == ""


def test_a_failure_is_not_reported_as_done(capsys):
    with pytest.raises(KeyError), progress.reading("tokenising", 4) as advance:
        advance(2)
        raise KeyError
    assert capsys.readouterr().err == ""
