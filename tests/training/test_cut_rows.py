"""Rows that are longer than the model's length."""
import pytest
from conftest import row_format, small_config

from data import IMAGE, Example, PackedDataset, Tokenizer
from support.common import InputError
from training.guards import warn_of_cut_rows


def ask(words, answer):
    question = f"{IMAGE}\n" + "Is there a cup? " * words
    return Example("a.jpg", [[(question, "Yes. " * answer)]])


def test_rows_that_are_too_long_are_counted_before_training(world, capsys):
    """Answers that will be cut at their end are counted, whatever their place; and a prompt, which
    is never cut, is an error.
    """
    tokenizer = Tokenizer(world.tokenizer)

    def dataset(examples):
        return PackedDataset(examples, row_format(small_config(), tokenizer))

    short = [ask(1, 1 + n % 3) for n in range(300)]
    assert warn_of_cut_rows(dataset(short)) == 0
    assert capsys.readouterr().out == ""
    mixed = dataset(short[:50] + [ask(1, 200)] + short[50:] + [ask(2, 150)])
    assert warn_of_cut_rows(mixed) == 2 == sum(mixed.row(i).cut > 0 for i in range(302))
    assert capsys.readouterr().out.startswith("2 of 302 rows are longer than the model's 256 ")
    assert warn_of_cut_rows(dataset([ask(1, 200)] * 150)) == 150                # nothing fits
    with pytest.raises(InputError, match="does not fit into 256 .*a.jpg.*never cut"):
        warn_of_cut_rows(dataset(short + [ask(90, 1)]))
