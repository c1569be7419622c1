"""Progress in a log file: lines without carriage returns; at a terminal a bar."""
import io

import pytest

from support import bars
from support.common import progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def shown(monkeypatch, stderr, **options):
    monkeypatch.setattr("sys.stderr", stderr)
    bar = progress(range(3), "reading", **options)
    for n in bar:
        bar.set_postfix_str(f"loss {n}", refresh=False)
    return stderr.getvalue()


@pytest.mark.parametrize("leave", (True, False))
def test_in_a_log_file(monkeypatch, leave):
    monkeypatch.setattr(bars, "SECONDS", 0)
    text = shown(monkeypatch, io.StringIO(), leave=leave)
    lines = text.split("\n")
    assert "\r" not in text and "\x1b" not in text and lines.pop() == ""
    assert lines[0].startswith("reading: 0 of 3, 00:00 gone, ") and all(lines)
    assert any(line.startswith("reading: 2 of 3") and line.endswith(", loss 1") for line in lines)


def test_one_line_a_time(monkeypatch):
    """However fast the first steps are, tqdm's own thread has no reason to repeat a line."""
    monkeypatch.setattr(bars, "SECONDS", 0)
    monkeypatch.setattr("sys.stderr", io.StringIO())
    with progress(total=1000) as bar:
        bar.update(500)
        assert bar.miniters == 1


def test_short_work_is_silent(monkeypatch):
    assert shown(monkeypatch, io.StringIO()) == ""


def test_at_a_terminal(monkeypatch):
    assert "\r" in shown(monkeypatch, Terminal(), delay=0)
    assert shown(monkeypatch, Terminal(), delay=0, disable=True) == ""
    monkeypatch.setenv("RANK", "1")
    assert shown(monkeypatch, Terminal(), delay=0) == ""
