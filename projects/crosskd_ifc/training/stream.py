"""The training data as one numbered stream that can be entered anywhere, so that an interrupted run
goes on with the very samples that it would have seen.

Shape shorthand: B images in a batch of one process, W data loader workers.
"""

import contextlib
import itertools
import random
from typing import Any, Callable, Dict, Iterable, Iterator, List, Mapping, Optional, Sequence, Tuple

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetFromList, MapDataset, build_detection_train_loader
from detectron2.data.samplers import RepeatFactorTrainingSampler
from detectron2.utils import comm
from torch.utils.data import Dataset, Sampler

from ..common.random_state import same_random_state
from ..config import ConfigError
from ..data.mapper import CheckedMapper, SampleError, build_mapper, check_image
from .preemption import keep_workers_on_sigterm


class StreamIndex(int):
    """An index into the data set that knows its place in the stream over all processes."""

    position: int

    def __new__(cls, index: int, position: int):
        self = super().__new__(cls, index)
        self.position = position
        return self


class SampleStream(Sampler):
    """The samples of a detectron2 sampler, numbered, from any batch on.

    Batches come in the same order for any number of workers.

    Attributes:
        batch_size: B.
        num_batches: how many of this process's batches to leave out; set it before the loader's
            iterator is made.
    """

    def __init__(
        self,
        sampler: Sampler,
        *,
        batch_size: int,
        num_workers: int,
        is_wide: Optional[Sequence[bool]] = None,
    ):
        """
        Args:
            sampler: infinite, the same in each iteration; gives the indices of this process.
            batch_size: B.
            num_workers: W.
            is_wide: for each record whether it is wider than high, where batches are grouped by
                that; else None.
        """
        self.sampler, self._is_wide = sampler, is_wide
        # Here: a worker that isn't forked has no process group.
        self._first, self._step = comm.get_rank(), comm.get_world_size()
        self.batch_size, self._num_workers = batch_size, num_workers
        self.num_batches = 0

    def __iter__(self) -> Iterator[StreamIndex]:
        numbered = (
            StreamIndex(index, k * self._step + self._first) for k, index in enumerate(self.sampler)
        )
        if self._is_wide is None:
            yield from itertools.islice(numbered, self.num_batches * self.batch_size, None)
        else:
            waiting = self._skip_grouped(numbered)
            yield from self._in_worker_order(itertools.chain(waiting, numbered))

    def _skip_grouped(self, numbered: Iterator[StreamIndex]) -> List[StreamIndex]:
        """Leave out ``num_batches`` as :class:`AspectRatioGroupedDataset` fills them; returns what
        waits in its buckets then."""
        buckets: Tuple[List[StreamIndex], ...] = ([], [])
        filled = 0
        while filled < self.num_batches:
            sample = next(numbered)
            bucket = buckets[self._is_wide[sample]]
            bucket.append(sample)
            if len(bucket) == self.batch_size:
                bucket.clear()
                filled += 1
        return sorted(itertools.chain(*buckets), key=lambda x: x.position)

    def _in_worker_order(self, samples: Iterator[StreamIndex]) -> Iterator[StreamIndex]:
        """Samples in the order in which grouping workers have to get them.

        :class:`ToIterableDataset` gives B in a row to each of W workers, and the loader takes one
        from each in turn.
        """
        size, workers = self.batch_size, self._num_workers
        if size == 1 or workers < 2:
            yield from samples
            return
        while True:
            block = list(itertools.islice(samples, size * workers))
            for worker in range(workers):
                yield from block[worker::workers]


class NumberedDataset(Dataset):
    """Records and a mapper whose random numbers depend on the place in the stream alone."""

    def __init__(self, records: List[Dict], mapper: Callable[[Dict], Any], seed: int):
        """
        Args:
            records: in detectron2's format.
            mapper: a record -> what the model gets.
            seed: of the stream.
        """
        self._dataset = MapDataset(DatasetFromList(records, copy=False), mapper)
        self.seed = seed

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Any:
        position = getattr(index, "position", None)
        if position is None:  # taken out by someone who doesn't train
            return self._dataset[index]
        with _random_state_of(self.seed, position):
            return self._dataset[index]


@contextlib.contextmanager
def _random_state_of(seed: int, position: int) -> Iterator[None]:
    """Within this context, random numbers are those of one sample."""
    number = int(np.random.SeedSequence((seed, position)).generate_state(1)[0])
    with same_random_state(torch.device("cpu")):
        random.seed(number)
        np.random.seed(number)
        torch.random.default_generator.manual_seed(number)  # torch.manual_seed would reseed the GPU
        yield


class StreamLoader:
    """A training loader that draws nothing from the global random state.

    Attributes:
        loader: detectron2's.
        stream: what it gives.
    """

    def __init__(self, loader: Iterable[List[Dict]], stream: "TrainingStream"):
        self.loader, self.stream = loader, stream

    def __iter__(self) -> Iterator[List[Dict]]:
        # torch's loader draws a seed for its workers: here, or with its first batch.
        with same_random_state(torch.device("cpu")):
            batches = iter(self.loader)
            first = next(batches)
        yield first
        yield from batches


class TrainingStream:
    """What decides which samples come, in which order and how augmented: a seed and a place.

    Attributes:
        records: what is drawn from, in detectron2's format.
        seed: of shuffling and augmentations, the same in all processes.
        samples: what the loader iterates.
    """

    def __init__(self, cfg: CfgNode, records: List[Dict], mapper: Optional[Callable] = None):
        """
        Args:
            cfg: DATALOADER and SOLVER.IMS_PER_BATCH are read; the seed is drawn from numpy.
            records: in detectron2's format. Samplers that weigh data sets read ``dataset_name``
                of each, unless DATASETS.TRAIN names only one.
            mapper: a record -> what the model gets; default: detectron2's. Its failures come as
                ``SampleError``.

        Raises:
            ConfigError: such a sampler, and a record without ``dataset_name``.
            SampleError: where batches are grouped by it, a record without size whose image can't be
                read.
        """
        self._cfg, self.records = cfg, records
        self.seed = comm.shared_random_seed()
        options = self._options(CheckedMapper(mapper) if mapper else build_mapper(cfg, True))
        self._dataset = NumberedDataset(records, options.pop("mapper"), self.seed)
        grouped = options["aspect_ratio_grouping"]
        self.samples = SampleStream(
            options["sampler"],
            batch_size=options["total_batch_size"] // comm.get_world_size(),
            num_workers=options["num_workers"],
            is_wide=[_is_wide(record) for record in records] if grouped else None,
        )
        options.update(dataset=self._dataset, sampler=self.samples, mapper=None)
        self._loader_options = options

    def build_loader(self) -> "StreamLoader":
        """detectron2's training loader of this stream."""
        loader = build_detection_train_loader(**self._loader_options)
        return StreamLoader(keep_workers_on_sigterm(loader), self)

    def state_dict(self) -> Dict[str, int]:
        """What another stream must have in common to go on from here, less the place."""
        return {
            "seed": self.seed,
            "num_records": len(self.records),
            "batch_size": self.samples.batch_size,
            "world_size": comm.get_world_size(),
        }

    def enter(self, state: Mapping[str, int], num_batches: int) -> bool:
        """Go on after ``num_batches`` of each process, before the loader's iterator is made.

        Args:
            state: of the stream that gave them.

        Returns:
            False, and nothing is changed, where the two have other sizes.
        """
        if any(state[k] != v for k, v in self.state_dict().items() if k != "seed"):
            return False
        self.seed = self._dataset.seed = state["seed"]
        self.samples.sampler = self._options()["sampler"]
        self.samples.num_batches = num_batches
        return True

    def _options(self, mapper: Optional[Callable] = None) -> Dict[str, Any]:
        """detectron2's, whose samplers draw their seeds from numpy or, since 2024, take SEED."""
        state = np.random.get_state()
        np.random.seed(self.seed % 2**32)
        try:
            return self._loader_arguments(mapper)
        finally:
            np.random.set_state(state)

    def _loader_arguments(self, mapper: Optional[Callable]) -> Dict[str, Any]:
        """The arguments of ``build_detection_train_loader``; what is random in them draws its seed
        from numpy, or takes :attr:`seed`."""
        cfg = self._cfg.clone()
        cfg.defrost()
        cfg.SEED = self.seed
        options = {"dataset": self.records, "mapper": mapper, "sampler": self._sampler()}
        return build_detection_train_loader.from_config(cfg, **options)

    def _sampler(self) -> Optional[Sampler]:
        """What detectron2's samplers that weigh data sets are for these records, None for others.

        detectron2 makes them from the data sets as they are on disk, with images that are left out
        here.
        """
        data = self._cfg.DATALOADER
        if data.SAMPLER_TRAIN not in ("WeightedTrainingSampler", "WeightedCategoryTrainingSampler"):
            return None
        names = self._cfg.DATASETS.TRAIN
        only = names[0] if len(names) == 1 else None
        members: Dict[str, List[int]] = {name: [] for name in names}
        for i, record in enumerate(self.records):
            name = record.get("dataset_name", only)
            if name not in members:
                raise ConfigError(
                    f"DATALOADER.SAMPLER_TRAIN {data.SAMPLER_TRAIN}: the 'dataset_name' of a "
                    f"record is {name!r}; expected one of DATASETS.TRAIN, {', '.join(names)}"
                )
            members[name].append(i)
        factors = torch.ones(len(self.records))
        times = dict(self._cfg.DATASETS.get("TRAIN_REPEAT_FACTOR", ()))
        for name in set(times) - set(names):
            raise ConfigError(
                f"DATASETS.TRAIN_REPEAT_FACTOR: {name!r} is none of DATASETS.TRAIN, "
                f"{', '.join(names)}"
            )
        for name, indices in members.items():
            factors[indices] *= times.get(name, 1)
            if data.SAMPLER_TRAIN == "WeightedCategoryTrainingSampler":
                repeat = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency
                factors[indices] *= repeat(
                    [self.records[i] for i in indices], data.REPEAT_THRESHOLD
                )
        if data.SAMPLER_TRAIN == "WeightedCategoryTrainingSampler":
            factors /= factors.min()
        return RepeatFactorTrainingSampler(factors)


def _is_wide(record: Dict) -> bool:
    """Whether an image is wider than high; its header says so where the record doesn't."""
    if "width" in record and "height" in record:
        return record["width"] > record["height"]
    if "file_name" not in record:
        raise SampleError(
            f"image id {record.get('image_id')}: its record has no width, height or file_name; add "
            "them, or set DATALOADER.ASPECT_RATIO_GROUPING False"
        )
    width, height = check_image(record["file_name"])
    return width > height
