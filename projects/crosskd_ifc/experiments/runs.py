"""What a training run is, and what its results depend on.

Each run is an ordinary ``tools/train_net.py`` run in a folder of its own. A finished one leaves
``run.json`` there (:mod:`.run_training`), with its results and a digest of all that they depend on.
"""

import ast
import contextlib
import dataclasses
import functools
import hashlib
import json
import os
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

from detectron2.config import CfgNode
from omegaconf import OmegaConf

from ..common.config_files import FILES, default_config, find_config, load_config, map_files
from ..common.files import file_sha256, read_json_if_any
from ..common.lazy_config import is_lazy
from ..common.paths import resolve_path
from ..config import ConfigError, distillation_requested, teacher_configs
from ..data import shapes
from ..data.cards import describe_data
from ..data.class_names import fill_in_class_count
from ..modeling.attach import load_teacher_config
from ..weights.state_dicts import is_missing
from .settings_digest import digested_settings


@dataclasses.dataclass
class Run:
    """One ``tools/train_net.py`` run.

    Attributes:
        name: for people.
        config: config file.
        folder: its OUTPUT_DIR.
        opts: KEY VALUE overrides.
        needs: runs whose results this one starts from, such as its teacher's.
        may_diverge: whether a loss that isn't finite is a result, an AP of 0, and no failure.
    """

    name: str
    config: str
    folder: str
    opts: List[str] = dataclasses.field(default_factory=list)
    needs: Sequence["Run"] = ()
    may_diverge: bool = False
    _built: Tuple[tuple, Optional[CfgNode]] = dataclasses.field(
        default=((), None), init=False, repr=False, compare=False
    )

    def cfg(self) -> CfgNode:
        """The full config, frozen; its files are read once."""
        key = (self.config, self.folder, *self.opts)
        if self._built[0] != key:
            self._built = key, self._build_cfg()
        return self._built[1]

    def read_again(self) -> "Run":
        """The same run, whose config files will be read anew."""
        return dataclasses.replace(self, needs=tuple(run.read_again() for run in self.needs))

    def _build_cfg(self) -> CfgNode:
        opts = [*self.opts, "OUTPUT_DIR", self.folder]
        cfg = load_config(self.config, opts, key=self.name, opts_key=self.name)
        if cfg.SOLVER.REFERENCE_WORLD_SIZE:
            raise ConfigError(
                f"{self.name}: SOLVER.REFERENCE_WORLD_SIZE is {cfg.SOLVER.REFERENCE_WORLD_SIZE}; "
                "in a comparison the number of GPUs must not change the settings: set it to 0"
            )
        fill_in_class_count(cfg, without_data=True)  # a training asks for them
        _name_stages(cfg)
        cfg.freeze()
        return cfg

    def digest(self) -> str:
        """A digest of the settings and of those of the runs it needs.

        Folder and device don't matter, nor do keys that are new since then, as long as they are at
        their defaults (those of ``MODEL.CROSSKD``: empty, 0 or False): results outlive new options.
        """
        settings = self._settings(self.cfg())
        if self.needs:
            settings.pop("MODEL.CROSSKD.TEACHER.WEIGHTS", None)
        return _sha256([settings, *(run.digest() for run in self.needs)])

    def inputs(self) -> Optional[str]:
        """A digest of what the settings only name: annotations and classes of the data sets of
        cards, files of IMPORTS, the weights that the student starts from, config and weights of a
        teacher that no run of ``needs`` trains, and the version of the built-in data, from the
        second on. None if the data or one of the weights aren't there.
        """
        cfg, found = self.cfg(), {}
        start = cfg.MODEL.WEIGHTS
        teachers = []
        if not self.needs and distillation_requested(cfg):
            named = [one for _, one in teacher_configs(cfg)]
            teachers = [(one, *load_teacher_config(one, without_data=True)) for one in named]
        if any(file and is_missing(file) for file in (start, *(x[2] for x in teachers))):
            return None
        names = (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)
        if cfg.DATASETS.CARDS:
            try:
                found["data"] = describe_data(cfg.DATASETS.CARDS, names)
            except (FileNotFoundError, ValueError):
                return None
        for name in cfg.MODEL.CROSSKD.IMPORTS:
            if name.endswith(".py"):
                path = resolve_path(name, what="file", key="MODEL.CROSSKD.IMPORTS")
                key = self._portable(name)  # of two folders perhaps
                found[key] = found.get(key, "") + file_sha256(path)
        if start and "://" not in start:
            found["start"] = file_sha256(start.split("?")[0])
        if shapes.VERSION > 1 and any(name.startswith("crosskd_shapes") for name in names):
            found["shapes"] = shapes.VERSION
        for i, (one, teacher, weights) in enumerate(teachers):
            lazy = not isinstance(teacher, CfgNode)
            settings = _teacher_file(one) if lazy else self._settings(teacher)
            key = f"teacher_{i + 1}" if i else "teacher"
            found[key] = [settings, self._portable(weights), file_sha256(weights)]
        return _sha256(found)

    def all_inputs(self) -> Dict[str, Optional[str]]:
        """:meth:`inputs` and a digest of those of the runs that it needs, None if one of them has
        none, under the names that records have."""
        found = [run.inputs() for run in self.needs]
        needed = _sha256(found) if found and None not in found else None
        return {"inputs_sha256": self.inputs(), "needs_inputs_sha256": needed}

    def _settings(self, cfg: CfgNode) -> Dict[str, Any]:
        settings = digested_settings(cfg)
        for key in settings.keys() & {*FILES, "MODEL.WEIGHTS"}:
            settings[key] = map_files(self._portable, settings[key])
        if "MODEL.CROSSKD.TEACHER.OPTS" in settings:
            settings["MODEL.CROSSKD.TEACHER.OPTS"] = self._portable_opts(cfg)
        return settings

    def _portable_opts(self, cfg: CfgNode) -> Sequence[str]:
        """TEACHER.OPTS, its files as :meth:`_portable` names them."""
        opts = cfg.MODEL.CROSSKD.TEACHER.OPTS
        if is_lazy(cfg.MODEL.CROSSKD.TEACHER.CONFIG_FILE):
            return opts
        found = list(opts)
        for i, (key, text) in enumerate(zip(opts[::2], opts[1::2])):
            if key in (*FILES, "MODEL.WEIGHTS") and text:
                is_list = text[0] in "[(" and text[-1] in ")]"
                value = ast.literal_eval(text) if is_list else text
                changed = map_files(self._portable, value)
                # A text of relative files stays as records have it.
                found[2 * i + 1] = text if changed == value else str(changed)
        return type(opts)(found)

    def _portable(self, file: str) -> str:
        """A file's name wherever the project lies: below the config's folder by the path from
        there, elsewhere by its last part. What it holds is digested by itself."""
        if "://" in file or not (os.path.isabs(file) or file.startswith("..")):
            return file
        folder = os.path.dirname(os.path.abspath(find_config(self.config, key=self.name)[0]))
        path = os.path.relpath(os.path.abspath(file), folder)
        return os.path.basename(path) if path.startswith("..") else path

    @property
    def weights(self) -> str:
        """The file of the trained weights, once they are there."""
        return self.path("model_final.pth")

    def path(self, name: str) -> str:
        return os.path.join(self.folder, name)

    def result(self) -> Optional[dict]:
        """The results of a finished run of this very config, or None."""
        done = read_json_if_any(self.path("run.json"))
        if not done or done["digest"] != self.digest():
            return None
        if "diverged" in done and not self.may_diverge:
            return None
        return done if is_same_input(done, self.all_inputs()) else None


def _name_stages(cfg: CfgNode) -> None:
    """Where TEACHER.STAGE is left open, set it to what that means with a Cascade R-CNN as the
    teacher of a student with one box head: else it would look like the first stage, see
    :func:`digested_settings`."""
    teacher = cfg.MODEL.CROSSKD.TEACHER
    with contextlib.suppress(ConfigError):  # of what can't be read; it is refused elsewhere
        if teacher.STAGE is None and distillation_requested(cfg):
            other = cfg.MODEL.CROSSKD.TEACHERS or _is_cascade(cfg)  # each has its own rule
            if not other and _has_stages(teacher.CONFIG_FILE, tuple(teacher.OPTS)):
                teacher.STAGE = "mean"


@functools.lru_cache(maxsize=None)
def _has_stages(config_file: str, opts: Tuple[str, ...]) -> bool:
    """Whether a teacher is a Cascade R-CNN."""
    cfg = default_config()
    named = cfg.MODEL.CROSSKD.TEACHER
    named.CONFIG_FILE, named.OPTS, named.WEIGHTS = config_file, opts, "not read"
    teacher, _ = load_teacher_config(cfg, without_data=True)
    if isinstance(teacher, CfgNode):
        return _is_cascade(teacher)
    return "Cascade" in str(OmegaConf.select(teacher, "model.roi_heads._target_"))


def _is_cascade(cfg: CfgNode) -> bool:
    """Whether it has several box heads, by the name of its ROI heads."""
    return "Cascade" in cfg.MODEL.ROI_HEADS.NAME


def _sha256(content: Any) -> str:
    """Of what JSON can hold."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _teacher_file(cfg: CfgNode) -> str:
    """The digest of a teacher's LazyConfig file, whose contents are code."""
    name = cfg.MODEL.CROSSKD.TEACHER.CONFIG_FILE
    return file_sha256(find_config(name, key="MODEL.CROSSKD.TEACHER.CONFIG_FILE")[0])


def is_same_input(record: Mapping[str, Any], present: Mapping[str, Optional[str]]) -> bool:
    """Whether a record was made with the present inputs, of :meth:`Run.all_inputs`.

    Records of old have none; and where a file is gone, as in a fresh clone, the record counts.
    """
    return all(None in (record.get(k), v) or record[k] == v for k, v in present.items())


def state_digest(run: Run) -> str:
    """A digest of what the state of an unfinished run depends on: also the very weights of the
    runs that it needs, which may have been trained again since."""
    weights = (file_sha256(needed.weights) for needed in run.needs)
    return "".join([run.digest(), run.inputs() or "", *weights])
