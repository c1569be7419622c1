"""bits_costs.py: its table from made-up numbers; what is measured already is not measured again."""
import json

from bench import bits_costs


def numbers(shift):
    return {column: 80.0 + n + shift for n, column in enumerate(bits_costs.COLUMNS)}


def test_the_table_and_what_is_kept(tmp_path, monkeypatch, capsys):
    asked = []

    def measured(folder, checkpoint, bits):
        asked.append((folder, checkpoint, bits))
        lost = {16: 0.0, 8: 0.0, 4: -2.0 if folder == "62" else -4.0}[bits]
        return {"base": numbers(lost), "checkpoint": numbers(5 + lost / 2)}

    monkeypatch.setattr(bits_costs, "measured", measured)
    output = tmp_path / "results.jsonl"
    bits_costs.main(["62", "63", "--output", str(output)])
    said = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in said.splitlines()
            if line.startswith("|")][2:]
    assert [row[:2] for row in rows] == [[model, bits] for model in ("base", "checkpoint")
                                         for bits in ("16", "8", "4")]
    # Two seeds: a mean difference of -3 with deviation sqrt 2, so ± 12.706 · sqrt 2 / sqrt 2.
    assert rows[0][2] == "80.0" and rows[1][2] == "80.0 (+0.0 ± 0.0)"
    assert rows[2][2] == "77.0 (-3.0 ± 12.7)" and rows[5][2] == "83.5 (-1.5 ± 6.4)"
    assert len(asked) == 6 and len(output.read_text().splitlines()) == 12

    bits_costs.main(["62", "63", "--output", str(output)])
    assert len(asked) == 6 and capsys.readouterr().out == said
    assert {json.loads(line)["bits"] for line in output.open()} == {4, 8, 16}
