"""Config files that say what they seem to say."""

import pytest
import yaml
from detectron2.config import get_cfg

from crosskd_ifc import ConfigError, add_crosskd_ifc_config
from crosskd_ifc.common.config_files import load_config_text, merge_from_file


def merged(path):
    cfg = get_cfg()
    add_crosskd_ifc_config(cfg)
    merge_from_file(cfg, str(path), key="--config-file")
    return cfg


def test_a_section_that_is_there_twice_is_refused(tmp_path):
    (tmp_path / "base.yaml").write_text("SOLVER:\n  MAX_ITER: 5\nSOLVER:\n  BASE_LR: 0.5\n")
    (tmp_path / "config.yaml").write_text("_BASE_: base.yaml\nSEED: 1\n")
    for name in ("base.yaml", "config.yaml"):
        with pytest.raises(ConfigError, match="--config-file .*: SOLVER is there twice"):
            merged(tmp_path / name)


@pytest.mark.parametrize(
    "text",
    [
        "\n".join(
            f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9 if i else ['x'])}]" for i in range(9)
        ),
        "a: &a\n  b: *a\n",
    ],
    ids=["bomb", "ring"],
)
def test_aliases_that_stand_for_more_than_any_config_holds_are_refused(tmp_path, text):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ConfigError, match="its aliases .* stand for more than 100000 values"):
        merged(tmp_path / "config.yaml")


def test_what_detectron2_dumps_is_read_with_its_aliases(tmp_path):
    cfg = get_cfg()
    add_crosskd_ifc_config(cfg)
    cfg.SEED = 3
    assert "&id001" in cfg.dump()
    (tmp_path / "config.yaml").write_text(cfg.dump())
    for read in (merged(tmp_path / "config.yaml"), load_config_text(cfg.dump(), source="here")):
        assert yaml.safe_load(read.dump()) == yaml.safe_load(cfg.dump())


@pytest.mark.parametrize("text", ["[1, 2]", "MODEL: {NAME: x}", "a: 1\na: 2", "{"])
def test_a_text_that_is_no_config_is_one_error_that_says_where_it_is_from(text):
    with pytest.raises(ConfigError, match="^the checkpoint's config: "):
        load_config_text(text, source="the checkpoint's config")
