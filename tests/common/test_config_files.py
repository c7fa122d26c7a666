"""Config files that say what they seem to say."""

import pytest
import yaml
from detectron2.config import get_cfg

from crosskd_ifc import ConfigError, add_crosskd_ifc_config
from crosskd_ifc.common.config_files import (
    default_config,
    find_config,
    load_config,
    load_config_text,
    merge_from_file,
    merge_from_list,
)
from crosskd_ifc.common.paths import REPO_CONFIGS
from crosskd_ifc.data.cards import register_cards
from crosskd_ifc.modeling.attach import check_teacher_weights


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


@pytest.mark.parametrize(
    "text, told",
    [
        ("# all of it is a comment\n", "it is empty; expected KEY: VALUE"),
        ("- a\n- b\n", "a list; expected KEY: VALUE"),
        ("_BASE_: 3\n", "_BASE_ is 3; name a file"),
        ("_BASE_: [base.yaml, 3]\n", r"_BASE_ is \['base.yaml', 3\]; name a file"),
    ],
)
def test_a_file_that_is_no_config_is_one_error(tmp_path, text, told):
    (tmp_path / "base.yaml").write_text(text)
    (tmp_path / "config.yaml").write_text("_BASE_: base.yaml\n")
    for name in ("base.yaml", "config.yaml"):
        with pytest.raises(ConfigError, match=f"--config-file .*base.yaml: {told}"):
            merged(tmp_path / name)


def test_a_stage_on_the_command_line_may_be_a_number_where_the_file_has_a_word():
    cfg, stage = default_config(), "MODEL.CROSSKD.TEACHER.STAGE"
    for value, wanted in [("mean", "mean"), ("2", 2), ("mean", "mean"), ("None", None)]:
        merge_from_list(cfg, [stage, value], key="opts")
        assert cfg.MODEL.CROSSKD.TEACHER.STAGE == wanted


def test_a_config_names_files_beside_it(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "sub").mkdir()
    monkeypatch.chdir(tmp_path)
    for name in ("teacher.yaml", "t.pth", "card.yaml", "own.py", "sub/card.yaml"):
        for folder in (tmp_path / "here", tmp_path):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text("")
    (tmp_path / "only_there.yaml").write_text("")
    (tmp_path / "here" / "sub" / "base.yaml").write_text(
        "DATASETS: {CARDS: [card.yaml, only_there.yaml, gone.yaml]}\n"
        "MODEL: {CROSSKD: {TEACHER: {CONFIG_FILE: teacher.yaml}}}\n"
    )
    (tmp_path / "here" / "config.yaml").write_text(
        "_BASE_: sub/base.yaml\n"
        "MODEL: {CROSSKD: {TEACHER: {WEIGHTS: 't.pth?x=1'}, IMPORTS: [own.py, torch]}}\n"
    )
    cfg, here = merged("here/config.yaml"), str(tmp_path / "here")
    kd = cfg.MODEL.CROSSKD
    assert kd.TEACHER.WEIGHTS == f"{here}/t.pth?x=1" and kd.IMPORTS == (f"{here}/own.py", "torch")
    # Of two files that name something, each has its own folder.
    assert cfg.DATASETS.CARDS == (f"{here}/sub/card.yaml", "only_there.yaml", "gone.yaml")
    assert kd.TEACHER.CONFIG_FILE == "teacher.yaml"
    assert find_config(kd.TEACHER.CONFIG_FILE, key="x")[0] == str(tmp_path / "teacher.yaml")
    # A config of the current folder says what it said before, on any machine.
    (tmp_path / "config.yaml").write_text("DATASETS: {CARDS: [card.yaml]}\n")
    assert merged("config.yaml").DATASETS.CARDS == ("card.yaml",)
    with pytest.raises(ConfigError) as error:
        register_cards(["gone.yaml"])
    places = [f"{here}/sub/gone.yaml", str(tmp_path / "gone.yaml"), f"{REPO_CONFIGS}/gone.yaml"]
    assert str(error.value).split("\n  - ")[1:] == places


def test_what_a_run_has_written_names_files_from_where_it_was_started(tmp_path, monkeypatch):
    # Started in the teacher's folder; the student's own has files of the same names.
    for folder in ("teacher", "student"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "model_final.pth").write_text("")
    cfg = default_config()
    cfg.MODEL.CROSSKD.TEACHER.CONFIG_FILE = "config.yaml"
    cfg.MODEL.CROSSKD.TEACHER.WEIGHTS = "model_final.pth"
    (tmp_path / "student" / "config.yaml").write_text(cfg.dump())
    monkeypatch.chdir(tmp_path / "teacher")
    found = load_config(str(tmp_path / "student" / "config.yaml"), found=True)
    assert found.MODEL.CROSSKD.TEACHER == cfg.MODEL.CROSSKD.TEACHER


def test_each_of_several_teachers_has_its_files_beside_the_config(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here" / "a.pth").write_text("")
    (tmp_path / "here" / "config.yaml").write_text(
        "MODEL: {CROSSKD: {TEACHERS: [{WEIGHTS: a.pth, STAGE: 1}, {WEIGHTS: b.pth}]}}\n"
    )
    first, second = merged("here/config.yaml").MODEL.CROSSKD.TEACHERS
    assert first == {"WEIGHTS": str(tmp_path / "here" / "a.pth"), "STAGE": 1}
    assert second == {"WEIGHTS": "b.pth"}


def test_a_tuple_in_yacs_notation_names_files_beside_the_config_as_a_list_does(
    tmp_path, monkeypatch
):
    for folder in (tmp_path / "here", tmp_path):
        folder.mkdir(exist_ok=True)
        for name in ("card.yaml", "own.py", "t.pth"):
            (folder / name).write_text("")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here" / "config.yaml").write_text(
        "DATASETS: {CARDS: '(\"card.yaml\",)'}\n"
        'MODEL:\n  CROSSKD:\n    IMPORTS: ("own.py", "torch")\n'
        "    TEACHERS: \"({'WEIGHTS': 't.pth'},)\"\n"
    )
    cfg, here = merged("here/config.yaml"), tmp_path / "here"
    assert cfg.DATASETS.CARDS == (f"{here}/card.yaml",)
    assert cfg.MODEL.CROSSKD.IMPORTS == (f"{here}/own.py", "torch")
    assert cfg.MODEL.CROSSKD.TEACHERS == ({"WEIGHTS": f"{here}/t.pth"},)


def test_teacher_weights_that_are_nowhere_are_told_with_what_was_tried(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here" / "config.yaml").write_text(
        "MODEL: {CROSSKD: {TEACHER: {WEIGHTS: lost.pth}}}\n"
    )
    weights = merged("here/config.yaml").MODEL.CROSSKD.TEACHER.WEIGHTS
    tried = f"Tried: {tmp_path}/here/lost.pth, {tmp_path}/lost.pth"
    with pytest.raises(ConfigError, match=f"there is no file 'lost.pth'.* {tried}$"):
        check_teacher_weights(weights)


@pytest.mark.parametrize(
    "text, message",
    [("", "it is empty"), ("# all a comment\n", "it is empty"), ("- a\n", "a list")],
)
def test_a_file_without_sections_is_one_error(tmp_path, text, message):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=f"config.yaml: {message}; expected KEY: VALUE sections"):
        merged(path)


@pytest.mark.parametrize("name", ["lazy.py", "lazy.yaml"])
def test_a_lazyconfig_is_named_as_such(tmp_path, name):
    (tmp_path / "lazy.py").write_text("model = {}\n")
    (tmp_path / "lazy.yaml").write_text("model: {_target_: some.Model}\n")
    (tmp_path / "over.yaml").write_text(f"_BASE_: {name}\n")
    for path in (name, "over.yaml"):
        with pytest.raises(ConfigError, match=rf"--config-file .*{name}: this is a LazyConfig"):
            merged(tmp_path / path)
