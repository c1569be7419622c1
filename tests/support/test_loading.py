"""Batches ahead of the model: worker processes, and what they cannot read."""
import pickle

import pytest
import torch
from conftest import row_format, small_config

from data import PackedDataset, Tokenizer
from support import common
from support.common import InputError, run_program
from training.batches import ResumableSampler, Share
from training.conversations import read_llava


def conversations(world):
    """The session's conversations from the file, as training has them."""
    examples = read_llava(world.llava, world.images)
    return PackedDataset(examples, row_format(small_config(), Tokenizer(world.tokenizer)))


@pytest.mark.parametrize("how", ("fork", "spawn"))
def test_workers_give_the_same_batches(world, how):
    dataset = conversations(world)
    sampler = ResumableSampler(len(dataset), 2, Share(8, 4), 42)

    def loader(**options):
        return torch.utils.data.DataLoader(dataset, batch_size=None, sampler=sampler, **options)

    workers = loader(num_workers=1, multiprocessing_context=how)
    for alone, worker in zip(loader(), workers, strict=True):
        assert torch.equal(alone.input_ids, worker.input_ids)
        assert torch.equal(alone.pixel_values, worker.pixel_values)


def test_pickled_tokenizer_and_rows(world):
    dataset = conversations(world)
    again, tokenizer = pickle.loads(pickle.dumps(dataset)), dataset.format.tokenizer
    assert again.row(5) == dataset.row(5)
    question = "Is there a cup?"
    assert again.format.tokenizer.encode(question) == tokenizer.encode(question)
    assert len(pickle.dumps(tokenizer)) < 1000                   # its path, and not the model


class BadRow(torch.utils.data.Dataset):
    def __getitem__(self, i):
        raise InputError("talk.json, row 7: mend it")


def test_workers_errors_are_one_line(capsys):
    loader = torch.utils.data.DataLoader(BadRow(), batch_size=None, sampler=[0], num_workers=1)
    with pytest.raises(SystemExit):
        run_program(lambda: next(iter(loader)))
    assert capsys.readouterr().err == "error: talk.json, row 7: mend it\n"


def test_an_error_that_one_process_meets_alone(capsys, monkeypatch):
    """Rank 0 has nothing to say then; the others leave it time to."""
    waited = []
    monkeypatch.setattr(common.time, "sleep", waited.append)
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit):
            run_program(lambda: BadRow()[7])
        assert capsys.readouterr().err == "error: talk.json, row 7: mend it\n"
    assert waited == [5]
