"""Which examples stand in which batch: on any number of processes, resumed, sorted by length."""
import numpy as np
from conftest import load_json, row_format, small_config

from data import Example, PackedDataset, Tokenizer
from training.batches import ResumableSampler, Share
from training.conversations import read_llava

# ---- Order ---------------------------------------------------------------------------------------


def global_batches(world_size, micro, start=0, seed=42):
    """Per step (7 steps of 8 out of 22 examples) the set of examples that all ranks see."""
    ranks = [list(ResumableSampler(22, 7, Share(8, micro, rank, world_size), seed, start))
             for rank in range(world_size)]
    per_step = 8 // (micro * world_size)
    assert all(len(batches) == (7 - start) * per_step for batches in ranks)
    steps = []
    for s in range(7 - start):
        of_step = [batch for batches in ranks for batch in batches[s * per_step:(s + 1) * per_step]]
        steps.append(sorted(i for batch in of_step for i in batch))
    return steps


def test_global_batches_do_not_depend_on_the_number_of_processes():
    expected = global_batches(1, 8)
    for world_size, micro in ((1, 1), (1, 4), (2, 4), (2, 2), (4, 1), (8, 1)):
        assert global_batches(world_size, micro) == expected
    assert global_batches(1, 8, seed=43) != expected
    assert global_batches(2, 2, start=3) == expected[3:]                         # resumed


def test_every_epoch_sees_every_example_once():
    sampler = ResumableSampler(22, 11, Share(8, 8), 42)
    stream = [i for batch in sampler for i in batch]                             # 88 = 4 epochs
    epochs = [stream[n:n + 22] for n in range(0, 88, 22)]
    assert all(sorted(epoch) == list(range(22)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert len(ResumableSampler(22, 11, Share(8, 2, 1, 2), 42)) == 11 * 2


# ---- Micro batches of similar length -------------------------------------------------------------


def mixed_lengths(count=1000):
    rng = np.random.default_rng(1)
    return rng.integers(20, 2000, count) * rng.choice((-1, 1, 1), count)


def sampled(world_size, micro, start=0, lengths=None):
    """9 steps of 64 out of 1,000 examples → (steps, micro batches a step, world_size, micro)."""
    return in_steps(1000, 9, [Share(64, micro, rank, world_size) for rank in range(world_size)],
                    start, lengths)


def in_steps(examples, steps, shares, start=0, lengths=None):
    ranks = [list(ResumableSampler(examples, steps, share, 42, start, lengths)) for share in shares]
    ranks = np.array(ranks).reshape(len(shares), steps - start, -1, shares[0].micro_batch)
    return ranks.transpose(1, 2, 0, 3)


def test_grouping_leaves_every_step_its_examples():
    expected = np.sort(sampled(1, 64).reshape(9, -1))
    for world_size, micro in ((1, 1), (1, 16), (2, 8), (4, 4), (8, 8)):
        grouped = sampled(world_size, micro, lengths=mixed_lengths())
        assert np.array_equal(np.sort(grouped.reshape(9, -1)), expected)
        resumed = sampled(world_size, micro, 4, mixed_lengths())
        assert np.array_equal(resumed, grouped[4:])
    shares = [Share(16, 4, rank, 2) for rank in (0, 1)]
    across = in_steps(50, 25, shares, lengths=mixed_lengths(50))     # 8 epochs, batches over ends
    assert np.array_equal(np.bincount(across.ravel()), np.full(50, 8))


def test_micro_batches_are_alike():
    lengths = mixed_lengths()
    grouped, plain = (lengths[sampled(2, 4, lengths=given)] for given in (lengths, None))

    def mixed(x):                                                                # x (9, 8, 2, 4)
        return ((x > 0).any(-1) & (x < 0).any(-1)).sum((1, 2))

    def padding(x):
        return 1 - np.abs(x).sum() / (np.abs(x).max(-1) * 4).sum()

    def slowest(x):                                  # the other rank waits for it every time
        return np.abs(x).max((2, 3)).sum() * 4

    assert mixed(grouped).max() <= 1 and mixed(plain).mean() > 6
    print(f"padding {padding(plain):.2f} → {padding(grouped):.2f}, "
          f"tokens of the slowest rank {slowest(plain):,} → {slowest(grouped):,}")
    assert padding(grouped) < padding(plain) / 3 and slowest(grouped) < 0.7 * slowest(plain)


def test_lengths_of_a_file_and_of_a_list(world):
    """They rank rows as the true numbers of tokens do, and the sign is the modality."""
    examples = read_llava(world.llava, world.images)
    rows_are = row_format(small_config(), Tokenizer(world.tokenizer))
    for given in (examples, list(examples)):
        dataset = PackedDataset(given, rows_are)
        true = [len(dataset.row(i).input_ids) for i in range(len(given))]
        estimated = dataset.lengths()
        assert (estimated > 0).all() and np.corrcoef(estimated, true)[0, 1] > 0.8
    text = [Example(None, [[("Hi.", "Hello.")]]), Example("a.jpg", [[("<image>\nHi.", None)]])]
    lengths = PackedDataset(text, rows_are).lengths()
    assert lengths[0] < 0 < 9 < lengths[1]
    assert len(load_json(world.llava)) == len(examples)
