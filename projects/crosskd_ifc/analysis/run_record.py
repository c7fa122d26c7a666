"""What a training has left in its OUTPUT_DIR, as numbers."""

import math
import os
import re
import statistics
from typing import Any, Dict, List, Optional, Tuple

from detectron2.config import CfgNode
from detectron2.utils.file_io import PathManager

from ..common.config_files import default_values, flat, load_config
from ..config import ConfigError
from ..training.run_folder import last_checkpoint
from .curves import ap_or_zero, read_metrics

_WRITING_PERIOD = 20  # iterations, of detectron2's writers
Points = List[Tuple[int, float]]


class RunRecord:
    """One training.

    Attributes:
        folder: its OUTPUT_DIR.
        cfg: the config that it ran with.
        iterations: done so far.
    """

    def __init__(self, folder: str, config_file: str = ""):
        """
        Args:
            folder: with ``config.yaml`` and ``metrics.json``.
            config_file: instead of the ``config.yaml`` there.

        Raises:
            ConfigError: if one of the files is missing or can't be read.
        """
        self.folder = folder
        self.cfg = _read_config(folder, config_file)
        path = os.path.join(folder, "metrics.json")
        if not PathManager.isfile(path):
            raise ConfigError(f"{path}: no such file; a training writes it into its OUTPUT_DIR")
        self._lines = _in_order(read_metrics(path))
        if not self._lines:
            raise ConfigError(f"{path}: nothing has been logged yet")
        self.iterations = min(self._lines[-1]["iteration"] + 1, self.cfg.SOLVER.MAX_ITER)

    def keys(self) -> List[str]:
        """Of everything that was logged."""
        return sorted({key for line in self._lines for key in line})

    def series(self, key: str) -> Points:
        """(iteration, value) of what was logged under a key, less what isn't finite."""
        points = ((line["iteration"], line.get(key)) for line in self._lines)
        return [
            (i, float(v)) for i, v in points if isinstance(v, (int, float)) and math.isfinite(v)
        ]

    def last(self, key: str) -> Optional[float]:
        points = self.series(key)
        return points[-1][1] if points else None

    def median(self, key: str) -> Optional[float]:
        values = [value for _, value in self.series(key)]
        return statistics.median(values) if values else None

    @property
    def test_prefix(self) -> str:
        """Before the metrics of the first test set: detectron2 names it where there are several."""
        names = self.cfg.DATASETS.TEST
        return f"{names[0]}/" if len(names) > 1 else ""

    def tasks(self) -> List[str]:
        """ "bbox", "segm", ...: what was evaluated."""
        found = (re.fullmatch(rf"{re.escape(self.test_prefix)}(\w+)/AP", k) for k in self.keys())
        return [match.group(1) for match in found if match]

    def evaluations(self, task: str) -> Points:
        """(iterations done, AP) of the student on the first test set."""
        key, last = f"{self.test_prefix}{task}/AP", self.cfg.SOLVER.MAX_ITER
        # Evaluations in between are counted from 0, the last one is not.
        return [
            (min(x["iteration"] + 1, last), ap_or_zero(x[key])) for x in self._lines if key in x
        ]

    def per_class(self, task: str) -> Dict[str, float]:
        """Class name -> AP in the last evaluation; NaN where a class has no box."""
        whole = f"{self.test_prefix}{task}/AP"
        line = next((x for x in reversed(self._lines) if whole in x), {})
        prefix = f"{whole}-"
        return {k[len(prefix) :]: float(v) for k, v in line.items() if k.startswith(prefix)}

    def settings(self) -> List[Tuple[str, Any, Any]]:
        """(key, value, default) of all that isn't at its default, this project's keys first."""
        before = default_values()
        rows = [(k, v, before.get(k)) for k, v in flat(self.cfg) if v != before.get(k)]
        return sorted(rows, key=lambda row: ("CROSSKD" not in row[0], row[0]))

    def peak_gpu_megabytes(self) -> Optional[int]:
        """What the log says last."""
        path = os.path.join(self.folder, "log.txt")
        if not PathManager.isfile(path):
            return None
        with PathManager.open(path) as f:
            found = re.findall(r"max_mem: (\d+)M", f.read())
        return int(found[-1]) if found else None

    def weights(self) -> str:
        """The file of the last weights.

        Raises:
            ConfigError: if there is none.
        """
        found = last_checkpoint(self.folder)
        if not found:
            raise ConfigError(
                f"{self.folder}: there are no weights (model_final.pth or model_*.pth); with "
                "--no-models the report is made without"
            )
        return found


def _in_order(lines: List[dict]) -> List[Dict[str, Any]]:
    """One line for each iteration, by iteration.

    A run that was resumed or started anew went back: what it had logged beyond doesn't count.
    """
    found: Dict[int, Dict[str, Any]] = {}
    for line in lines:
        if not isinstance(line, dict) or not isinstance(line.get("iteration"), int):
            continue
        here = line["iteration"]
        # Within one writing, detectron2 doesn't order them.
        if found and here <= max(found) - _WRITING_PERIOD:
            found = {i: kept for i, kept in found.items() if i < here}
        found.setdefault(here, {}).update(line)
    return [found[i] for i in sorted(found)]


def _read_config(folder: str, config_file: str) -> CfgNode:
    if config_file:
        return load_config(config_file)
    path = os.path.join(folder, "config.yaml")
    if not PathManager.isfile(path):
        raise ConfigError(f"{path}: no such file; give the OUTPUT_DIR of a training")
    with PathManager.open(path) as f:
        if re.search(r"^ +_target_:", f.read(), re.MULTILINE):
            raise ConfigError(f"{path}: a run of a LazyConfig; there are reports of YAML runs only")
    return load_config(path, key="the config of the run,", found=True)
