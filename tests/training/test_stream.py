"""The training data as a numbered stream: order, augmentations, entering it anywhere."""

import itertools

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.data.samplers import TrainingSampler
from detectron2.structures import BoxMode
from helpers import tiny_cfg
from PIL import Image

from crosskd_ifc import ConfigError, CrossKDTrainer
from crosskd_ifc.data.mapper import SampleError
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


@pytest.mark.parametrize("workers, grouping", LOADERS)
def test_reading_data_leaves_the_random_state_of_the_training_alone(workers, grouping):
    built = stream(*options(workers, grouping)).build_loader()
    torch.manual_seed(1), np.random.seed(1)
    loader = iter(built)
    next(loader), next(loader)
    found = torch.rand(()), np.random.rand()
    torch.manual_seed(1), np.random.seed(1)
    assert found == (torch.rand(()), np.random.rand())


@pytest.mark.parametrize("grouping", [True, False])
def test_a_mapper_that_gives_nothing_for_an_image_is_an_error_that_names_it(grouping):
    np.random.seed(3)
    cfg = tiny_cfg("SOLVER.IMS_PER_BATCH", 3, *options(0, grouping))
    built = TrainingStream(cfg, records(), lambda record: None).build_loader()
    with pytest.raises(SampleError, match="image id [0-9]+: the mapper gives None"):
        next(iter(built))


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
        with monkeypatch.context() as context:
            context.setattr("detectron2.utils.comm.get_rank", lambda: rank)
            context.setattr("detectron2.utils.comm.get_world_size", lambda: 2)
            samples = SampleStream(sampler, batch_size=3, num_workers=0)
        # A worker that isn't forked has no process group.
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


# Data sets that aren't lists of complete records


def photos(folder, sizes, *, boxes=((2, 2, 30, 30),), **fields):
    """Real images with one box each, as records without a size."""
    found = []
    for i, size in enumerate(sizes):
        Image.new("RGB", size, (40 * i % 256, 90, 30)).save(folder / f"{i}.png")
        record = {"file_name": str(folder / f"{i}.png"), "image_id": i, **fields}
        box = {"bbox": boxes[i % len(boxes)], "bbox_mode": BoxMode.XYXY_ABS}
        found.append({**record, "annotations": [{**box, "category_id": i % 3}]})
    return found


def training_batches(count, *opts, repeat=()):
    cfg = tiny_cfg("MODEL.CROSSKD.ENABLED", False, "SOLVER.IMS_PER_BATCH", 2, *opts)
    cfg.DATASETS.TRAIN_REPEAT_FACTOR = list(repeat)  # the oldest detectron2 has no such key
    return list(itertools.islice(CrossKDTrainer.build_train_loader(cfg), count))


def test_records_without_a_size_are_grouped_by_that_of_their_images(tmp_path):
    exif = Image.Exif()
    exif[274] = 6  # turned by a quarter: high, not wide
    records = photos(tmp_path, [(60, 40), (40, 60), (60, 40), (40, 60)])
    Image.new("RGB", (60, 40)).save(tmp_path / "2.png", exif=exif)
    DatasetCatalog.register("own_sizeless", lambda: records)
    for batch in training_batches(6, "DATASETS.TRAIN", ("own_sizeless",)):
        assert len({x["width"] > x["height"] for x in batch}) == 1
        assert {x["image_id"] for x in batch} <= {0} or 0 not in {x["image_id"] for x in batch}


def test_a_record_without_size_and_file_says_what_to_do():
    with pytest.raises(ValueError, match="image id 7.*DATALOADER.ASPECT_RATIO_GROUPING"):
        TrainingStream(tiny_cfg(), [{"image_id": 7}], mapper)


class Photos(torch.utils.data.Dataset):
    def __init__(self, records):
        self.records = records

    def __len__(self):
        return len(self.records)

    def __getitem__(self, index):
        if index >= len(self):  # a torch data set needn't end by itself
            raise RuntimeError("beyond the end")
        return self.records[index]


def test_a_torch_dataset_in_the_catalog_is_trained_on_as_a_list_is(tmp_path):
    records = photos(tmp_path, [(60, 40)] * 3, boxes=[(2, 2, 30, 30), (5, 5, 5, 9)])
    DatasetCatalog.register("own_list", lambda: records)
    DatasetCatalog.register("own_torch", lambda: Photos(records))

    def seen(*names):
        np.random.seed(3)
        batches = training_batches(4, "DATASETS.TRAIN", names)
        return [x["image_id"] for batch in batches for x in batch]

    assert seen("own_torch") == seen("own_list")
    assert set(seen("own_torch")) == {0, 2}  # the box of 1 has no area
    assert set(seen("own_torch", "own_list")) == {0, 2}


def test_an_iterable_dataset_is_refused_by_name():
    class Endless(torch.utils.data.IterableDataset):
        def __iter__(self):
            return itertools.repeat({"image_id": 0})

    DatasetCatalog.register("own_endless", Endless)
    with pytest.raises(ConfigError, match="DATASETS.TRAIN: 'own_endless' .*IterableDataset"):
        training_batches(1, "DATASETS.TRAIN", ("own_endless",))


SAMPLERS = ["RepeatFactorTrainingSampler", "WeightedTrainingSampler"]
SAMPLERS += ["WeightedCategoryTrainingSampler"]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samplers_with_weights_know_the_images_that_are_left(tmp_path, sampler):
    """Image 0 of the first data set loses its only box; of the second, each image counts twice."""
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    first = photos(tmp_path / "a", [(60, 40)] * 3, boxes=[(5, 5, 5, 9), (2, 2, 9, 9), (2, 2, 9, 9)])
    second = photos(tmp_path / "b", [(60, 40)] * 2)
    for record in second:
        record["image_id"] += 10
    for record in first + second:
        record["annotations"][0]["category_id"] = 0
    DatasetCatalog.register("own_first", lambda: first)
    DatasetCatalog.register("own_second", lambda: second)
    opts = ("DATALOADER.SAMPLER_TRAIN", sampler, "DATALOADER.REPEAT_THRESHOLD", 0.5)
    opts += ("DATASETS.TRAIN", ("own_first", "own_second"))
    rounds = training_batches(12, *opts, repeat=[["own_second", 2.0]])
    seen = [x["image_id"] for batch in rounds for x in batch]
    times = [1, 1, 1, 1] if sampler == "RepeatFactorTrainingSampler" else [1, 1, 2, 2]
    counts = [seen.count(image) for image in (1, 2, 10, 11)]
    assert counts == [24 // sum(times) * n for n in times]


def test_a_repeat_factor_of_no_training_data_set_is_an_error(tmp_path):
    found = photos(tmp_path, [(60, 40)])
    DatasetCatalog.register("own_first", lambda: found)
    opts = ("DATALOADER.SAMPLER_TRAIN", "WeightedTrainingSampler", "DATASETS.TRAIN", ("own_first",))
    with pytest.raises(
        ConfigError, match="TRAIN_REPEAT_FACTOR: 'own_frist' is none of .*own_first"
    ):
        training_batches(1, *opts, repeat=[["own_frist", 2.0]])


def test_a_weighted_sampler_needs_the_data_set_of_each_record():
    opts = ("DATALOADER.SAMPLER_TRAIN", "WeightedTrainingSampler", "DATASETS.TRAIN", ("a", "b"))
    with pytest.raises(ConfigError, match="SAMPLER_TRAIN.*'dataset_name'"):
        TrainingStream(tiny_cfg(*opts), records(), mapper)
