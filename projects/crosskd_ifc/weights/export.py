"""The student alone: weights and config for stock detectron2, verified before they appear."""

import functools
import operator
import os
from typing import Any, Dict, List, Mapping, NamedTuple, Tuple

import torch
import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from detectron2.structures import Instances
from detectron2.utils.file_io import PathManager
from torch import nn

from ..common.files import refuse_overwriting, staging_folder, write_json
from ..common.paths import resolve_path
from ..common.user_code import import_user_code, refuse_user_code
from ..config import ConfigError, add_crosskd_ifc_config
from .metadata import METADATA_NAME, describe_detector
from .reading import load_weights, save_safetensors
from .state_dicts import ADAPTER_PREFIX, describe_mismatch, is_state_dict

# Config key -> this project's classes and the stock ones that they are in evaluation.
STOCK_NAMES = {
    "META_ARCHITECTURE": {"CrossKDRCNN": "GeneralizedRCNN", "CrossKDRetinaNet": "RetinaNet"},
    "PROPOSAL_GENERATOR.NAME": {"CrossKDRPN": "RPN"},
    "ROI_HEADS.NAME": {"CrossKDROIHeads": "StandardROIHeads"},
}
# Below MODEL: with lower thresholds even noise is detected, so that there is something to compare.
_THRESHOLDS = ("ROI_HEADS.SCORE_THRESH_TEST", "RETINANET.SCORE_THRESH_TEST")
_HEADER = """\
# A student exported by CrossKD-IFC: a model of stock detectron2.
# MODEL.WEIGHTS is an absolute path: change it if you move the files.
"""


class Export(NamedTuple):
    """What :func:`export_student` wrote.

    Attributes:
        weights, config: absolute paths.
        architecture: of the checkpoint's own config, and the stock one that replaces it.
        parameters: their number.
        detections: how many were equal in the verification.
        dropped: what the checkpoint holds beside the student.
    """

    weights: str
    config: str
    architecture: Tuple[str, str]
    parameters: int
    detections: int
    dropped: List[str]


def export_student(
    checkpoint: str,
    out: str,
    *,
    config_file: str = "",
    force: bool = False,
    safetensors: bool = False,
) -> Export:
    """Write a checkpoint's student as a stock detectron2 model, without optimizer and adapters.

    The files appear only after a stock model built from them gave exactly the checkpoint's
    detections on random images. ``MODEL.WEIGHTS`` in the written config is an absolute path, since
    detectron2 looks for a relative one from the current folder.

    Args:
        checkpoint: ``.pth`` or ``.safetensors`` file; of a distilled or a plain model.
        out: a folder to make, with ``model.pth``, ``config.yaml`` and ``metadata.json``;
            or a name ending in ``.pth``, beside which a ``.yaml`` and the metadata are written.
        config_file: of the checkpoint's training; empty for the ``config.yaml`` beside it.
        force: replace existing files (in an existing folder, only those written).
        safetensors: also write the weights as ``.safetensors``, which stock detectron2 doesn't
            read, but ``MODEL.WEIGHTS`` and ``TEACHER.WEIGHTS`` here and other tools do.

    Raises:
        FileExistsError: if ``out`` exists, without ``force``, or is the input.
        FileNotFoundError: if the checkpoint or its config doesn't exist.
        ConfigError: if the config can't be read or has parts without a stock counterpart.
        ValueError: if the weights don't fit the config, or the detections differ.
    """
    content = load_weights(checkpoint)
    cfg, config_path = _load_config(checkpoint, config_file)
    weights_out, config_out = _output_files(out)
    files_out = [weights_out, config_out]
    files_out.append(os.path.join(os.path.dirname(weights_out), METADATA_NAME))
    if safetensors:
        files_out.append(os.path.splitext(weights_out)[0] + ".safetensors")
    for path in (out, *files_out):
        refuse_overwriting(path, sources=[checkpoint, config_path], force=force)

    stock_cfg = stock_config(cfg, weights_out)
    stock = _build(stock_cfg)
    _check_stock(stock)
    state, dropped = _student_state(content, stock, checkpoint)
    stock.load_state_dict(state)
    folder_out = os.path.dirname(weights_out)
    is_new = not os.path.lexists(folder_out)
    with staging_folder(os.path.dirname(folder_out) if is_new else folder_out) as staging:
        folder = os.path.join(staging, "student")
        PathManager.mkdirs(folder)
        paths = [os.path.join(folder, os.path.basename(p)) for p in files_out]
        torch.save({"model": stock.state_dict()}, paths[0])
        with PathManager.open(paths[1], "w") as f:
            f.write(_HEADER + stock_cfg.dump())
        write_json(paths[2], describe_detector(cfg))
        if safetensors:
            save_safetensors(stock.state_dict(), paths[3])
        detections = _verify(cfg, state, *paths[:2])
        if is_new:
            os.rename(folder, folder_out)
        else:
            for path, final in zip(paths, files_out):
                os.replace(path, final)
    return Export(
        weights_out,
        config_out,
        (cfg.MODEL.META_ARCHITECTURE, stock_cfg.MODEL.META_ARCHITECTURE),
        sum(p.numel() for p in stock.parameters()),
        detections,
        dropped,
    )


def stock_config(cfg: CfgNode, weights: str) -> CfgNode:
    """The config of the same model in evaluation, that plain ``get_cfg()`` can merge.

    Args:
        cfg: with the keys of :func:`add_crosskd_ifc_config`.
        weights: its MODEL.WEIGHTS.

    Raises:
        ConfigError: if stock detectron2 has no such config.
    """
    if cfg.MODEL.META_ARCHITECTURE in ("FCOS", "CrossKDFCOS"):
        raise ConfigError(
            "stock detectron2 builds FCOS from LazyConfig only, so there is no config to write; "
            "the checkpoint's weights load into its FCOS as they are"
        )
    ours, stock = cfg.clone(), get_cfg()
    ours.defrost()
    del ours.MODEL["CROSSKD"], ours.MODEL["FCOS"], ours.DATASETS["CARDS"]
    stock.merge_from_other_cfg(ours)
    for key, names in STOCK_NAMES.items():
        *nodes, leaf = key.split(".")
        node = functools.reduce(operator.getitem, nodes, stock.MODEL)
        node[leaf] = names.get(node[leaf], node[leaf])
    stock.MODEL.WEIGHTS = weights
    # Whoever trains on with this config must not write into the student's own folder.
    stock.OUTPUT_DIR = get_cfg().OUTPUT_DIR
    return stock


def _output_files(out: str) -> Tuple[str, str]:
    """Absolute paths of weights and config."""
    out = os.path.abspath(out)
    if out.endswith(".pth"):
        return out, out[: -len(".pth")] + ".yaml"
    return os.path.join(out, "model.pth"), os.path.join(out, "config.yaml")


def _load_config(checkpoint: str, config_file: str) -> Tuple[CfgNode, str]:
    if config_file:
        path = resolve_path(config_file, what="config", key="--config-file")
    else:
        path = os.path.join(os.path.dirname(checkpoint), "config.yaml")
        if not PathManager.isfile(path):
            raise FileNotFoundError(
                f"{path}: no such file. Training writes it beside its checkpoints; give the config "
                f"that {checkpoint} was trained with by --config-file"
            )
    cfg = get_cfg()
    add_crosskd_ifc_config(cfg)
    try:
        cfg.merge_from_file(path, allow_unsafe=False)
    except (AssertionError, AttributeError, KeyError, TypeError, ValueError, yaml.YAMLError) as e:
        raise ConfigError(f"{path}: not a detectron2 config: {_first_line(e)}") from e
    if config_file:
        import_user_code(cfg)
    else:
        refuse_user_code(cfg, path)
    return cfg, path


def _build(cfg: CfgNode) -> nn.Module:
    """The model on the CPU in evaluation mode, keeping every detection whatever its score."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "cpu"
    for key in _THRESHOLDS:
        node, leaf = key.split(".")
        cfg.MODEL[node][leaf] = -1.0
    try:
        return build_model(cfg).eval()
    except (AssertionError, KeyError) as error:
        raise ConfigError(f"the config's model can't be built: {_first_line(error)}") from error


def _check_stock(model: nn.Module) -> None:
    classes = map(type, model.modules())
    ours = {c.__name__ for c in classes if c.__module__.split(".")[0] == __name__.split(".")[0]}
    if ours:
        raise ConfigError(
            f"the config's model has parts without stock counterpart: {', '.join(ours)}"
        )


def _student_state(
    content: Any, stock: nn.Module, checkpoint: str
) -> Tuple[Dict[str, torch.Tensor], List[str]]:
    """The student's weights, and the names of what else the checkpoint holds."""
    state = content.get("model") if isinstance(content, Mapping) else None
    if not is_state_dict(state):
        raise ValueError(
            f"{checkpoint}: not a training checkpoint, it holds no weights named 'model'"
        )
    expected = stock.state_dict()
    adapters = [k for k in state if k.startswith(ADAPTER_PREFIX) and k not in expected]
    state = {k: v for k, v in state.items() if k not in adapters}
    problem = describe_mismatch(state, expected)
    if problem:
        raise ValueError(f"{checkpoint}: doesn't fit the model of its config. Weights {problem}")
    return state, [*(k for k in content if k != "model"), *adapters]


@torch.no_grad()
def _verify(cfg: CfgNode, state: Mapping[str, torch.Tensor], weights: str, config: str) -> int:
    """Compare the written model with the checkpoint's; returns the number of equal detections."""
    stock_cfg = get_cfg()
    stock_cfg.merge_from_file(config, allow_unsafe=False)
    exported, student = _build(stock_cfg), _build(cfg)
    exported.load_state_dict(load_weights(weights)["model"])
    student.load_state_dict(state)
    g = torch.Generator().manual_seed(0)
    images = [torch.randint(0, 256, (3, *hw), generator=g).float() for hw in ((96, 128), (128, 96))]
    found, wanted = (
        [x["instances"] for x in m([{"image": i} for i in images])] for m in (exported, student)
    )
    if not all(map(_equal, found, wanted)):
        raise ValueError(
            "the exported model's detections differ from the student's; nothing was written"
        )
    return sum(map(len, found))


def _equal(a: Instances, b: Instances) -> bool:
    """Whether all fields (boxes, scores, classes, masks, ...) are the same, bit for bit."""

    def tensors(x: Instances) -> Dict[str, torch.Tensor]:
        return {k: getattr(v, "tensor", v) for k, v in x.get_fields().items()}

    a_fields, b_fields = tensors(a), tensors(b)
    return a_fields.keys() == b_fields.keys() and all(
        torch.equal(v, b_fields[k]) for k, v in a_fields.items()
    )


def _first_line(error: Exception) -> str:
    # A KeyError's own text is the quoted one of its argument.
    text = error.args[0] if isinstance(error, KeyError) and error.args else error
    return str(text).strip().split("\n")[0]
