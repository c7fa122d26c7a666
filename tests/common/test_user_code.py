"""MODEL.CROSSKD.IMPORTS: code of the user's own."""

import sys

import pytest
import torch
from detectron2.config import get_cfg
from helpers import tiny_cfg, tiny_model

from crosskd_ifc import FEATURE_FUSION_REGISTRY, ConfigError, add_crosskd_ifc_config
from crosskd_ifc.common.config_files import load_config, merge_from_list
from crosskd_ifc.common.user_code import import_user_code
from crosskd_ifc.modeling.attach import load_teacher_config
from crosskd_ifc.weights.export import export_student

KEY = "MODEL.CROSSKD.IMPORTS"
FUSION = """
from crosskd_ifc import FEATURE_FUSION_REGISTRY
from crosskd_ifc.distillation.fusion import SumFusion

@FEATURE_FUSION_REGISTRY.register(name={name!r})
class Half(SumFusion):
    def forward(self, features):
        return super().forward(features) / 2
"""


def with_imports(*names):
    cfg = get_cfg()
    add_crosskd_ifc_config(cfg)
    cfg.MODEL.CROSSKD.IMPORTS = names
    return cfg


def test_a_file_is_imported_once(tmp_path, monkeypatch):
    (tmp_path / "own.py").write_text(FUSION.format(name="half_of_a_file"))
    import_user_code(with_imports(str(tmp_path / "own.py")))
    assert "half_of_a_file" in FEATURE_FUSION_REGISTRY
    monkeypatch.chdir(tmp_path)  # a second registration would raise
    import_user_code(with_imports("own.py", str(tmp_path / "own.py")))


def test_a_module_is_imported(tmp_path, monkeypatch):
    (tmp_path / "own_module_of_a_user.py").write_text(FUSION.format(name="half_of_a_module"))
    monkeypatch.syspath_prepend(tmp_path)
    import_user_code(with_imports("own_module_of_a_user"))
    assert "half_of_a_module" in FEATURE_FUSION_REGISTRY


def test_a_fusion_of_ones_own_is_known_to_a_config_on_the_command_line(tmp_path):
    (tmp_path / "own.py").write_text(FUSION.format(name="half_of_an_option"))
    (tmp_path / "c.yaml").write_text("VERSION: 2\n")
    cfg = load_config(str(tmp_path / "c.yaml"), [KEY, f"('{tmp_path}/own.py',)"])
    assert cfg.MODEL.CROSSKD.IMPORTS == (f"{tmp_path}/own.py",)
    assert "half_of_an_option" in FEATURE_FUSION_REGISTRY


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "MODEL.CROSSKD.IMPORTS: the file '.*own.py' was not found"),
        ("1 / 0", "can't be imported: ZeroDivisionError .*own.py, line 1"),
        ("\nraise ValueError('a\\nb')", "can't be imported: ValueError a .*own.py, line 2"),
        ("def", "can't be imported: SyntaxError"),
    ],
)
def test_what_cannot_be_imported_is_named(tmp_path, content, message):
    if content is not None:
        (tmp_path / "own.py").write_text(content)
    modules = set(sys.modules)
    with pytest.raises(ConfigError, match=message):
        import_user_code(with_imports(str(tmp_path / "own.py")))
    assert not {m for m in set(sys.modules) - modules if m.startswith("own")}
    with pytest.raises(ConfigError, match="'no.such_module' can't be imported: ModuleNotFound"):
        import_user_code(with_imports("no.such_module"))


def test_a_teachers_config_imports_nothing(tmp_path):
    (tmp_path / "own.py").write_text("raise RuntimeError('this ran')")
    teacher = tiny_cfg(KEY, (str(tmp_path / "own.py"),), architecture="GeneralizedRCNN")
    (tmp_path / "teacher.yaml").write_text(teacher.dump())
    names = ("MODEL.CROSSKD.TEACHER.CONFIG_FILE", str(tmp_path / "teacher.yaml"))
    load_teacher_config(tiny_cfg(*names, "MODEL.CROSSKD.TEACHER.WEIGHTS", "x.pth"))


def test_a_config_found_beside_weights_imports_nothing(tmp_path):
    (tmp_path / "own.py").write_text("import sys; sys.modules['this_ran'] = sys")
    cfg = tiny_cfg(KEY, (str(tmp_path / "own.py"),))
    (tmp_path / "config.yaml").write_text(cfg.dump())
    torch.save({"model": tiny_model(cfg).state_dict()}, tmp_path / "model.pth")
    weights, out = str(tmp_path / "model.pth"), str(tmp_path / "out")
    with pytest.raises(ConfigError, match=f"{KEY} names .*own.py.* give this config by --config"):
        export_student(weights, out)
    assert "this_ran" not in sys.modules
    export_student(weights, out, config_file=str(tmp_path / "config.yaml"))
    assert sys.modules.pop("this_ran")


def test_an_option_after_the_first_key_is_refused():
    with pytest.raises(ConfigError, match="^command line: --resume stands .* options come first"):
        merge_from_list(tiny_cfg(), ["SEED", "1", "--resume"], key="command line")
    with pytest.raises(ConfigError, match="^--config-file is missing"):
        load_config("")
