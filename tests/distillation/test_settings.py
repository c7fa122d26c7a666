"""Every setting that can't work is refused before training, naming key, value and choices."""

import itertools
import os
import re

import pytest
from detectron2.config import get_cfg
from helpers import distilling, tiny_cfg

from crosskd_ifc import ConfigError, add_crosskd_ifc_config
from crosskd_ifc.common.config_files import merge_from_file
from crosskd_ifc.config import distillation_requested
from crosskd_ifc.distillation.compatibility.settings import check_crosskd_config

K = "MODEL.CROSSKD."
SEPARATE = (K + "FUSION.NAME", "none", K + "FUSION.IN_FEATURES", ("fc1", "fc2"))
MEAN = (K + "FUSION.NAME", "mean")
CASES = {
    "unknown fusion": (
        (K + "FUSION.NAME", "blend"),
        "FUSION.NAME.*'blend'.*'concat', .*'none', .*'sum'",
    ),
    "unknown route": (
        (K + "FUSION.ROUTE", "around"),
        "FUSION.ROUTE.*'around'.*'direct', 'through'",
    ),
    "unknown align": ((K + "FUSION.ALIGN", "whiten"), "FUSION.ALIGN.*'whiten'.*'standardize'"),
    "unknown box loss": ((K + "LOSS.BOX_TYPE", "l2"), "LOSS.BOX_TYPE.*'l2'.*'l1', .*'giou'"),
    "unknown mimic": ((K + "MIMIC", "all"), "MIMIC.*'all'.*'cross_head', 'student_head', 'both'"),
    "a combined feature that student_head doesn't have": (
        (K + "MIMIC", "student_head", K + "LOSS.FUSED_WEIGHT", 0.5),
        "FUSED_WEIGHT is 0.5, but MIMIC 'student_head'.*default, 1.0",
    ),
    "taps that student_head doesn't have": (
        (K + "MIMIC", "student_head", K + "LOSS.TAP_WEIGHTS", (1.0,)),
        "TAP_WEIGHTS.*but MIMIC 'student_head'",
    ),
    "nothing to compare": (
        (K + "FUSION.NAME", "mean", K + "LOSS.FUSED_WEIGHT", 0.0),
        "FUSED_WEIGHT is 0.*TAP_WEIGHTS.*one of them above 0",
    ),
    "no combined term of taps that aren't combined": (
        (*SEPARATE, K + "LOSS.FUSED_WEIGHT", 0.0),
        "LOSS.FUSED_WEIGHT is 0.0, but FUSION.NAME 'none'.* doesn't combine.*default, 1.0",
    ),
    "fewer weights than taps": (
        (K + "LOSS.TAP_WEIGHTS", (1.0,)),
        r"TAP_WEIGHTS is \(1.0,\).*has 3 taps.*fc1.*one weight for each",
    ),
    "a negative tap weight": (
        (K + "LOSS.TAP_WEIGHTS", (1.0, -1.0)),
        r"TAP_WEIGHTS\[1\] is -1.0.*>= 0",
    ),
    "a tap weight that is no number": (
        (K + "LOSS.TAP_WEIGHTS", ("a", 1.0)),
        "TAP_WEIGHTS.*list of numbers",
    ),
    "a detached layer that is no tap": (
        (*MEAN, K + "FUSION.DETACH", ("pool",)),
        "FUSION.DETACH.*pool.*some, not all",
    ),
    "all taps detached": (
        (*MEAN, K + "FUSION.DETACH", ("fc1", "fc2")),
        "FUSION.DETACH.*some, not all",
    ),
    "a detached tap without a combined feature": (
        (
            *(K + "FUSION.DETACH", ("fc1",), K + "LOSS.FUSED_WEIGHT", 0.0),
            *(K + "LOSS.TAP_WEIGHTS", (1.0, 1.0)),
        ),
        "FUSION.DETACH.*FUSED_WEIGHT 0.*set it to",
    ),
    "residual with one tap": (
        (K + "FUSION.NAME", "residual", K + "FUSION.IN_FEATURES", ("fc2",)),
        "'residual' needs two taps",
    ),
    "unknown mask reduction": ((K + "LOSS.MASK_REDUCTION", "sum"), "MASK_REDUCTION.*'published'"),
    "unknown mask channels": ((K + "LOSS.MASK_CHANNELS", "one"), "MASK_CHANNELS.*'ground_truth'"),
    "a fusion that student_head doesn't use": (
        (K + "MIMIC", "student_head", K + "FUSION.IN_FEATURES", ("fc2",)),
        r"FUSION.IN_FEATURES is \('fc2',\), but MIMIC 'student_head'.*default, \(\)",
    ),
    "a mask setting without masks": (
        (K + "LOSS.MASK_WEIGHT", 2.0),
        "LOSS.MASK_WEIGHT is 2.0, but.*MASK_ON False.*default, 10.0",
    ),
    "negative feature weight": ((K + "LOSS.FEATURE_WEIGHT", -1.0), "LOSS.FEATURE_WEIGHT is -1.0"),
    "negative RPN weight": ((K + "LOSS.RPN_WEIGHT", -1.0), "LOSS.RPN_WEIGHT is -1.0"),
    "negative period": ((K + "DIAGNOSTICS.GRAD_PERIOD", -1), "DIAGNOSTICS.GRAD_PERIOD is -1"),
    "negative weight decay": ((K + "FUSION.WEIGHT_DECAY", -1.0), "FUSION.WEIGHT_DECAY is -1.0"),
    "an RPN that can't mimic": (
        (K + "LOSS.RPN_WEIGHT", 1.0),
        "LOSS.RPN_WEIGHT needs MODEL.PROPOSAL_GENERATOR.NAME CrossKDRPN.*RPN",
    ),
    "names to inherit that are none": ((K + "INHERIT", (3,)), "INHERIT.*module names"),
    "a name to inherit twice": ((K + "INHERIT", ("backbone", "backbone")), "INHERIT.*twice"),
    "a module that isn't there": (
        (K + "INHERIT", ("backbone", "neck")),
        "INHERIT: nothing of 'neck'.*no such module.*backbone.bottom_up",
    ),
    "unknown precision": ((K + "TEACHER.PRECISION", "int8"), "TEACHER.PRECISION.*'int8'"),
    "unknown class map": ((K + "TEACHER.CLASS_MAP", ("x",)), r"TEACHER.CLASS_MAP.*'x'.*'teacher'"),
    "negative weight": ((K + "LOSS.CLS_WEIGHT", -0.1), "LOSS.CLS_WEIGHT is -0.1.*>= 0"),
    "negative box weight": ((K + "LOSS.BOX_WEIGHT", -1.0), "LOSS.BOX_WEIGHT is -1.0.*>= 0"),
    "NaN weight": ((K + "LOSS.CLS_WEIGHT", float("nan")), "LOSS.CLS_WEIGHT is nan"),
    "no temperature": ((K + "LOSS.TEMPERATURE", 0.0), "LOSS.TEMPERATURE is 0.0.*> 0"),
    "infinite temperature": ((K + "LOSS.TEMPERATURE", float("inf")), "LOSS.TEMPERATURE is inf"),
    "negative start": ((K + "SCHEDULE.START_ITER", -3), "SCHEDULE.START_ITER is -3"),
    "negative warm-up": ((K + "SCHEDULE.WARMUP_ITERS", -3), "SCHEDULE.WARMUP_ITERS is -3"),
    "stop before start": (
        (K + "SCHEDULE.START_ITER", 9, K + "SCHEDULE.STOP_ITER", 9),
        "SCHEDULE.STOP_ITER is 9.*START_ITER, 9",
    ),
    "a tap twice": ((K + "FUSION.IN_FEATURES", ("fc1", "fc1")), "IN_FEATURES.*twice"),
    "taps that are no names": ((K + "FUSION.IN_FEATURES", (["fc1"],)), "IN_FEATURES.*layer names"),
    "unknown tap": ((K + "FUSION.IN_FEATURES", ("fc9",)), "IN_FEATURES.*'fc9'.*pool, fc1, fc2"),
    "unknown entry": ((K + "FUSION.ENTRY", "conv1"), "ENTRY.*'conv1'.*pool, fc1, fc2"),
    "a combined term of taps that aren't combined": (
        (*SEPARATE, K + "LOSS.FUSED_WEIGHT", 0.5),
        "LOSS.FUSED_WEIGHT is 0.5, but FUSION.NAME 'none'.* doesn't combine.*default, 1.0",
    ),
    "detached taps that aren't combined": (
        (*SEPARATE, K + "FUSION.DETACH", ("fc1",)),
        r"FUSION.DETACH is \('fc1',\), but FUSION.NAME 'none'.* doesn't combine",
    ),
    "no weight for taps that aren't combined": (
        (*SEPARATE, K + "LOSS.TAP_WEIGHTS", (0.0, 0.0)),
        r"TAP_WEIGHTS is \(0.0, 0.0\): no tap would be compared",
    ),
    "a through tap deeper than the entry": (
        (K + "FUSION.ROUTE", "through", K + "FUSION.ENTRY", "fc1"),
        r"IN_FEATURES.*\['fc2'\] lie deeper than ENTRY 'fc1'.*ROUTE direct",
    ),
    "shapes that nothing bridges": (
        (K + "FUSION.IN_FEATURES", ("fc1",), K + "FUSION.NAME", "mean", K + "FUSION.ENTRY", "pool"),
        r"student's 'fc1' \(16,\) can't enter the teacher's 'pool' \(8, 7, 7\)",
    ),
    "a stock ROI head": (
        ("MODEL.ROI_HEADS.NAME", "StandardROIHeads"),
        "ROI_HEADS.NAME.*StandardROIHeads.*CrossKDROIHeads",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_wrong_setting_is_refused_when_the_teacher_is_attached(case):
    opts, message = CASES[case]
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        distilling(*opts)


def test_through_needs_the_tap_in_the_teacher_too():
    conv = ("MODEL.ROI_BOX_HEAD.NUM_CONV", 1)
    taps = (K + "FUSION.IN_FEATURES", ("conv1",), K + "FUSION.NAME", "none")
    with pytest.raises(ConfigError, match="IN_FEATURES.*teacher.*no layer 'conv1'"):
        distilling(*conv, *taps, K + "FUSION.ROUTE", "through")


def test_the_defaults_are_valid_and_ask_for_nothing_of_a_stock_architecture():
    cfg = get_cfg()
    add_crosskd_ifc_config(cfg)
    check_crosskd_config(cfg)
    assert not distillation_requested(cfg)


def test_architecture_and_teacher_settings_must_agree():
    with pytest.raises(ConfigError, match="TEACHER.CONFIG_FILE is empty.*CrossKDRCNN"):
        distillation_requested(tiny_cfg())
    stock = tiny_cfg(K + "TEACHER.CONFIG_FILE", "t.yaml", architecture="GeneralizedRCNN")
    with pytest.raises(ConfigError, match="META_ARCHITECTURE is 'GeneralizedRCNN'.*CrossKDRCNN"):
        distillation_requested(stock)
    assert not distillation_requested(tiny_cfg(K + "ENABLED", False))
    assert distillation_requested(tiny_cfg(K + "TEACHER.CONFIG_FILE", "t.yaml"))


@pytest.mark.parametrize("text", ["_BASE_: config.yaml\n", "SEED: " + "[" * 5000])
def test_a_config_file_without_an_end_is_one_error_that_names_it(text, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    message = f"^--config-file {path}: it is nested too deeply, or its _BASE_ leads back to itself$"
    with pytest.raises(ConfigError, match=message):
        merge_from_file(tiny_cfg(), str(path), key="--config-file")


def leaves(node, prefix=""):
    for key, value in node.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


@pytest.mark.parametrize("value", ["!!bool foo", "!!timestamp foo", "!!int ''", "2001-99-99"])
@pytest.mark.parametrize("is_base", [False, True], ids=["config", "its base"])
def test_a_value_that_is_not_of_its_yaml_type_is_one_error_that_names_the_file(
    tmp_path, value, is_base
):
    (tmp_path / "broken.yaml").write_text(f"SOLVER:\n  MAX_ITER: {value}\n")
    (tmp_path / "config.yaml").write_text("_BASE_: broken.yaml\n")
    path = str(tmp_path / ("config.yaml" if is_base else "broken.yaml"))
    with pytest.raises(ConfigError) as error:
        merge_from_file(tiny_cfg(), path, key="--config-file")
    assert str(error.value).startswith(f"--config-file {path}: a value is not of its YAML type (")


def test_a_config_file_that_is_nested_too_deeply_is_one_error(tmp_path):
    (tmp_path / "deep.yaml").write_text("SOLVER: " + "[" * 3000)
    with pytest.raises(ConfigError, match="--config-file .*deep.yaml: "):
        merge_from_file(tiny_cfg(), str(tmp_path / "deep.yaml"), key="--config-file")


def test_the_table_of_options_names_every_key_with_its_default():
    cfg = get_cfg()
    add_crosskd_ifc_config(cfg)
    path = os.path.join(os.path.dirname(__file__), "..", "..", "docs", "options.md")
    with open(path) as f:
        rows = dict(re.findall(r"^\| `([A-Z_.]+)` \| `([^`]*)`", f.read(), re.MULTILINE))
    others = (leaves(cfg.MODEL[node], f"MODEL.{node}.") for node in ("FCOS", "TIMM"))
    training = ("DATASETS.CARDS", "SOLVER.EMA_DECAY", "SOLVER.ACCUMULATE", "TEST.BEST_METRIC")
    more = ((key, dict(leaves(cfg))[key]) for key in (*training, "WANDB.PROJECT"))
    for key, value in itertools.chain(leaves(cfg.MODEL.CROSSKD), *others, more):
        shown = f'"{value}"' if isinstance(value, str) else str(value)
        assert rows.pop(key) == shown, key
    assert set(rows) == set()
