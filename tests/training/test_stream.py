"""The training data as a numbered stream: order, augmentations, entering it anywhere."""

import itertools

import numpy as np
import pytest
import torch
from detectron2.data.samplers import TrainingSampler
from helpers import tiny_cfg

from crosskd_ifc.training.stream import SampleStream, TrainingStream


def records(n=11):
    """Some wide, some high; no picture is read."""
    sizes = [(64, 48), (48, 64), (64, 48)]
    return [dict(zip(("width", "height"), sizes[i % 3]), image_id=i) for i in range(n)]


def mapper(record):
    """A record and the random numbers that an augmentation would draw."""
    return {**record, "drawn": (np.random.rand(), torch.rand(()).item())}


def stream(*opts, seed=3):
    np.random.seed(seed)
    cfg = tiny_cfg("SOLVER.IMS_PER_BATCH", 3, *opts)
    return TrainingStream(cfg, records(), mapper)


def batches(built, count):
    found = itertools.islice(iter(built.build_loader()), count)
    return [[(x["image_id"], x["drawn"]) for x in batch] for batch in found]


LOADERS = [
    pytest.param(workers, grouping, id=f"{workers}-workers-{'' if grouping else 'not-'}grouped")
    for workers in (0, 1, 3)
    for grouping in (True, False)
]


def options(workers, grouping):
    keys = ("DATALOADER.NUM_WORKERS", "DATALOADER.ASPECT_RATIO_GROUPING")
    return keys[0], workers, keys[1], grouping


@pytest.mark.parametrize("workers, grouping", LOADERS)
def test_batches_are_the_same_for_any_number_of_workers(workers, grouping):
    assert batches(stream(*options(workers, grouping)), 9) == batches(
        stream(*options(0, grouping)), 9
    )


@pytest.mark.parametrize("done", [1, 2, 5, 8])
@pytest.mark.parametrize("workers, grouping", LOADERS)
def test_a_stream_entered_anywhere_goes_on_as_if_it_had_run_so_far(workers, grouping, done):
    whole = batches(stream(*options(workers, grouping)), 10)
    entered = stream(*options(workers, grouping), seed=99)
    assert entered.enter(stream(*options(workers, grouping)).state_dict(), done)
    assert batches(entered, 10 - done) == whole[done:]


def test_grouped_batches_hold_wide_or_high_images_only():
    wide = {r["image_id"] for r in records() if r["width"] > r["height"]}
    for batch in batches(stream(), 8):
        assert len({image in wide for image, _ in batch}) == 1


def test_every_image_comes_once_in_each_round():
    seen = [image for batch in batches(stream(*options(0, False)), 11) for image, _ in batch]
    assert all(sorted(seen[i : i + 11]) == list(range(11)) for i in (0, 11, 22))


def test_an_image_is_augmented_anew_in_each_round():
    drawn = [x for batch in batches(stream(), 20) for x in batch]
    assert len({numbers for _, numbers in drawn}) == len(drawn)


def test_reading_data_leaves_the_random_state_of_the_training_alone():
    loader = iter(stream().build_loader())
    torch.manual_seed(1), np.random.seed(1)
    next(loader), next(loader)
    found = torch.rand(()), np.random.rand()
    torch.manual_seed(1), np.random.seed(1)
    assert found == (torch.rand(()), np.random.rand())


def test_the_seed_comes_from_numpy_and_decides_order_and_augmentations():
    assert batches(stream(seed=1), 4) == batches(stream(seed=1), 4)
    assert batches(stream(seed=1), 4) != batches(stream(seed=2), 4)


def test_a_stream_goes_on_in_its_own_order_whatever_seed_the_config_says():
    """detectron2's samplers take SEED since 2024; before, they drew from numpy."""
    opts = options(0, False)
    whole = batches(stream(*opts, "SEED", 5), 8)
    entered = stream(*opts, "SEED", 6, seed=99)
    assert entered.enter(stream(*opts, "SEED", 5).state_dict(), 3)
    assert batches(entered, 5) == whole[3:]


def test_without_a_seed_two_runs_have_different_orders():
    one, other = (
        [[image for image, _ in batch] for batch in batches(stream("SEED", -1, seed=k), 8)]
        for k in (1, 2)
    )
    assert one != other


def test_a_stream_of_other_sizes_is_not_entered():
    change = ("SOLVER.IMS_PER_BATCH", 2)
    other = stream(*change)
    before = batches(stream(*change), 4)
    assert not other.enter(stream(seed=8).state_dict(), 3)
    assert batches(other, 4) == before


def test_processes_share_the_samples_among_them(monkeypatch):
    """Each process has its own numbers, and together they have all."""
    taken = []
    for rank in range(2):
        sampler = TrainingSampler(11, seed=0)
        sampler._rank, sampler._world_size = rank, 2
        samples = SampleStream(sampler, batch_size=3, num_workers=0)
        with monkeypatch.context() as context:
            context.setattr("detectron2.utils.comm.get_rank", lambda: rank)
            context.setattr("detectron2.utils.comm.get_world_size", lambda: 2)
            taken.append([(x.position, int(x)) for x in itertools.islice(samples, 11)])
    numbers, indices = zip(*sorted(taken[0] + taken[1]))
    assert numbers == tuple(range(22))
    assert list(indices) == list(itertools.islice(TrainingSampler(11, seed=0), 22))


def test_detectron2s_other_samplers_can_be_entered_too():
    opts = ("DATALOADER.SAMPLER_TRAIN", "RepeatFactorTrainingSampler")
    opts += ("DATALOADER.REPEAT_THRESHOLD", 0.5)

    def build(seed):
        np.random.seed(seed)
        dicts = [{**r, "annotations": [{"category_id": r["image_id"] % 3}]} for r in records()]
        return TrainingStream(tiny_cfg("SOLVER.IMS_PER_BATCH", 3, *opts), dicts, mapper)

    whole = batches(build(4), 9)
    entered = build(5)
    assert entered.enter(build(4).state_dict(), 4)
    assert batches(entered, 5) == whole[4:]
