"""A run's scalars in Weights & Biases."""

import collections
import os
import uuid
from typing import Any, Dict

import yaml
from detectron2.config import CfgNode
from detectron2.utils.events import EventWriter, get_event_storage

from ..common.files import replacing

WANDB_ID = "wandb_id"  # a file in OUTPUT_DIR


class WandbWriter(EventWriter):
    """Logs what metrics.json has to a project of Weights & Biases; offline, below ``OUTPUT_DIR``,
    unless the environment variable ``WANDB_MODE`` says otherwise.

    A resumed run goes on under its id, which is kept in ``OUTPUT_DIR/wandb_id``.
    """

    def __init__(self, cfg: CfgNode):
        """
        Args:
            cfg: of the run.
        """
        self._cfg = cfg
        self._run: Any = None
        self._last_write = -1

    def write(self) -> None:
        if self._run is None:  # not before a run has begun
            self._run = self._start()
        steps: Dict[int, Dict[str, float]] = collections.defaultdict(dict)
        latest = get_event_storage().latest_with_smoothing_hint()
        for name, (value, iteration) in latest.items():
            if iteration > self._last_write:
                steps[iteration][name] = value
        for iteration, values in sorted(steps.items()):
            self._run.log(values, step=iteration)
            self._last_write = iteration

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()

    def _start(self) -> Any:
        import wandb

        folder = self._cfg.OUTPUT_DIR
        path = os.path.join(folder, WANDB_ID)
        if not os.path.exists(path):
            with replacing(path) as f:
                f.write(uuid.uuid4().hex[:8].encode())
        with open(path) as f:
            name = f.read()
        mode = os.environ.get("WANDB_MODE", "offline")
        return wandb.init(
            project=self._cfg.WANDB.PROJECT,
            dir=folder,
            id=name,
            name=os.path.basename(os.path.abspath(folder)),
            mode=mode,
            # Online, a run of the same id would replace the first one; offline it isn't known.
            resume=None if mode == "offline" else "allow",
            config=yaml.safe_load(self._cfg.dump()),
        )
