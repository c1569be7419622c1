"""bench/bench_rows.py runs, and its table has a row for each size."""
import re
import sys

from programs import shell

from bench import bench_rows


def test_bench_rows_runs(monkeypatch, capsys):
    """What it would start to be measured is forked."""
    def started(command, **_):
        assert command[0] == sys.executable
        return shell("python", *command[1:])

    monkeypatch.setattr(bench_rows.subprocess, "run", started)
    monkeypatch.setattr(sys, "argv", ["bench_rows.py", "--rows", "300", "--kilobytes", "0.3"])
    bench_rows.main()
    table = capsys.readouterr().out
    lines = [line for line in table.splitlines() if re.match(r"\| [\d,]+ \|", line)]
    assert [line.split(" |")[0] for line in lines] == ["| 300"] and lines[0].count(" s |") == 5
