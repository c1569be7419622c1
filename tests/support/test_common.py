"""support/common.py: files of JSON lines."""
from support.common import read_json


def test_json_lines_and_blank_lines(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n\n{"a": 2}\n')
    assert read_json(str(tmp_path / "a.jsonl"), lines=True) == [{"a": 1}, {"a": 2}]
