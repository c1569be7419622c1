"""bench/bench_rows.py runs, and its table has a row for each size."""
import re

from programs import succeeds


def test_bench_rows_runs():
    table = succeeds("python", "bench/bench_rows.py", "--rows", "300", "--kilobytes", "0.3")
    lines = [line for line in table.splitlines() if re.match(r"\| [\d,]+ \|", line)]
    assert [line.split(" |")[0] for line in lines] == ["| 300"] and lines[0].count(" s |") == 5
