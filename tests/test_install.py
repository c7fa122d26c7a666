"""A fresh machine: setup.py, its lock file, setup_venv.sh, install_detectron2.py. No network."""

import errno
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = {
    "detectron2/__init__.py": b'__version__ = "0.6"\n',
    "detectron2/layers/__init__.py": b"from detectron2.layers.roi import RoI\n",
    "detectron2/model_zoo/configs/Base.yaml": b"MODEL: {}\n",
}


@pytest.fixture
def installer(tmp_path, monkeypatch):
    """The script as a module; its manifest lists FILES, its pip and environment are recorded."""
    spec = importlib.util.spec_from_file_location(
        "install_detectron2", ROOT / "tools" / "install_detectron2.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    manifest = tmp_path / "test.manifest"
    lines = ["%s  %s" % (module.blob_id(data), path) for path, data in FILES.items()]
    manifest.write_text("# a comment\n" + "\n".join(lines) + "\n")
    monkeypatch.setattr(module, "MANIFEST", manifest)
    module.calls = []

    def run_pip(args, show=False):
        """Unpack the wheel that pip is told to install."""
        module.calls.append(list(args))
        zipfile.ZipFile(module.calls[-1][-1]).extractall(tmp_path / "site")

    def find_installed():
        root = tmp_path / "site" / "detectron2"
        return module.Installed(root, "0.6", ours=True) if root.exists() else module.Installed()

    monkeypatch.setattr(module, "run_pip", run_pip)
    monkeypatch.setattr(module, "find_installed", find_installed)
    return module


@pytest.fixture
def carrier(tmp_path, installer, monkeypatch):
    """Return a function that writes a carrier wheel of the given files, its hash made known."""

    def write(files):
        wheel = tmp_path / "labgym-0-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr("LabGym/__init__.py", b"raise RuntimeError\n")
            for path, data in files.items():
                data = data.replace(b"detectron2.", b"LabGym.detectron2.")
                archive.writestr("LabGym/" + path, data)
        digest = installer.hashlib.sha256(wheel.read_bytes()).hexdigest()
        monkeypatch.setattr(installer, "CARRIER_SHA256", digest)
        return wheel

    return write


def assert_refused(installer, wheel, capsys, *words):
    """The installer ends with one error line that has these words, and pip was never called."""
    assert installer.main(["--wheel", str(wheel)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    for word in words:
        assert word in error
    assert installer.calls == []


def test_prefix_is_taken_back_and_only_detectron2_is_installed(installer, carrier, tmp_path):
    assert installer.main(["--wheel", str(carrier(FILES))]) == 0
    site = tmp_path / "site"
    for path, data in FILES.items():
        assert (site / path).read_bytes() == data
    assert sorted(path.name for path in site.iterdir()) == [
        "detectron2",
        "detectron2-0.6.dist-info",
    ]


def test_installed_metadata_names_version_and_commit(installer, carrier, tmp_path):
    installer.main(["--wheel", str(carrier(FILES))])
    info = tmp_path / "site" / "detectron2-0.6.dist-info"
    assert "Name: detectron2\nVersion: 0.6\n" in (info / "METADATA").read_text()
    assert (info / "UPSTREAM").read_text().strip().endswith("@" + installer.COMMIT)
    listed = [line.split(",")[0] for line in (info / "RECORD").read_text().splitlines()]
    assert sorted(listed) == sorted(
        list(FILES) + ["%s/%s" % (info.name, p.name) for p in info.iterdir()]
    )


def test_pip_accepts_the_built_wheel(installer, tmp_path):
    wheel = installer.build_wheel(FILES, tmp_path)
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--quiet"]
    subprocess.run(command + ["--target", str(tmp_path / "site"), str(wheel)], check=True)
    assert (tmp_path / "site/detectron2/layers/__init__.py").exists()


def test_same_files_give_the_same_wheel(installer, tmp_path):
    first = installer.build_wheel(FILES, tmp_path).read_bytes()
    assert installer.build_wheel(FILES, tmp_path).read_bytes() == first


def test_changed_byte_is_refused(installer, carrier, capsys):
    wheel = carrier({**FILES, "detectron2/model_zoo/configs/Base.yaml": b"MODEL: []\n"})
    assert_refused(
        installer,
        wheel,
        capsys,
        "1 changed (detectron2/model_zoo/configs/Base.yaml)",
        "nothing was",
    )


def test_extra_file_is_refused(installer, carrier, capsys):
    wheel = carrier({**FILES, "detectron2/extra.py": b""})
    assert_refused(installer, wheel, capsys, "1 not in the manifest (detectron2/extra.py)")


def test_missing_file_is_refused(installer, carrier, capsys):
    wheel = carrier({path: data for path, data in FILES.items() if "layers" not in path})
    assert_refused(installer, wheel, capsys, "1 missing (detectron2/layers/__init__.py)")


def test_path_that_leaves_the_folder_is_refused(installer, carrier, capsys, tmp_path):
    wheel = carrier({**FILES, "detectron2/../../evil.py": b"pass\n"})
    assert_refused(installer, wheel, capsys, "detectron2/../../evil.py")
    assert not list(tmp_path.rglob("evil.py"))


def test_file_listed_twice_is_refused(installer, carrier, capsys, monkeypatch):
    wheel = carrier(FILES)
    with pytest.warns(UserWarning), zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr("LabGym/detectron2/__init__.py", FILES["detectron2/__init__.py"])
    monkeypatch.setattr(installer, "check_sha256", lambda *args: None)
    assert_refused(installer, wheel, capsys, "detectron2/__init__.py twice")


def test_wrong_sha256_is_refused(installer, carrier, capsys):
    wheel = carrier(FILES)
    data = bytearray(wheel.read_bytes())
    data[40] ^= 1
    wheel.write_bytes(bytes(data))
    assert_refused(installer, wheel, capsys, "sha256", installer.CARRIER_SHA256)


def test_long_differences_stay_one_line(installer):
    text = installer.differences({"a%d" % i: "x" for i in range(100)}, {"b": "y"})
    assert text.startswith("100 missing (a0, a1, a10, a11, a12, ...); 1 not in the manifest (b)")


def test_nothing_to_do_when_every_file_is_there(installer, carrier, capsys):
    wheel = carrier(FILES)
    assert installer.main(["--wheel", str(wheel)]) == installer.main([]) == 0
    assert len(installer.calls) == 1
    assert "every file verified" in capsys.readouterr().out


def test_damaged_installation_is_replaced(installer, carrier, tmp_path):
    wheel = carrier(FILES)
    installer.main(["--wheel", str(wheel)])
    (tmp_path / "site/detectron2/__init__.py").write_text("")
    assert installer.main(["--wheel", str(wheel)]) == 0
    assert len(installer.calls) == 2
    assert (tmp_path / "site/detectron2/__init__.py").read_bytes() == FILES[
        "detectron2/__init__.py"
    ]


def test_left_overs_beside_our_files_are_reported(installer, carrier, tmp_path, capsys):
    wheel = carrier(FILES)
    installer.main(["--wheel", str(wheel)])
    (tmp_path / "site/detectron2/_C.so").write_text("")
    assert installer.main(["--wheel", str(wheel)]) == 1
    assert "1 not in the manifest (detectron2/_C.so)" in capsys.readouterr().err


def test_own_build_is_kept_unless_it_is_too_old(installer):
    def why(**fields):
        own = {"root": Path("detectron2"), "version": "0.6", "commit": "abc1234", **fields}
        source, wanted = own.pop("source", "pypi"), own.pop("wanted", "")
        return installer.why_suitable(installer.Installed(**own), source, wanted, {})

    assert "kept" in why()
    assert "kept" in why(version="0.10", source="git")
    assert why(source="git", wanted="abc12")
    assert not why(source="git", wanted="ffff")
    assert not why(version="0.5")
    assert not why(version="")
    assert not why(root=None)
    assert not why(source="git", ours=True)


def test_pip_failures_name_their_cause(installer):
    explain = installer.explain_pip
    assert explain(
        "WARNING: Retrying after connection broken by 'NewConnectionError(...)'\n"
        "ERROR: No matching distribution found for LabGym\n"
    ).startswith("no network, or the package index can't be reached")
    full = "ERROR: Exception:\nTraceback\nOSError: [Errno 28] No space left on device\n"
    assert explain(full).startswith("disk full")
    assert "ensurepip" in explain("python: No module named pip\n")
    assert explain("ERROR: Something else\n") == "pip failed: Something else"
    assert explain("") == "pip failed: no output"


def test_full_disk_is_one_line(installer, carrier, capsys, monkeypatch):
    def write(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(installer, "build_wheel", write)
    assert_refused(installer, carrier(FILES), capsys, "disk full")


def test_old_python_is_refused(installer, capsys, monkeypatch):
    monkeypatch.setattr(installer.sys, "version_info", (3, 9, 1))
    assert installer.main([]) == 1
    assert capsys.readouterr().err == "error: Python 3.10 or newer is needed, this is 3.9\n"


@pytest.mark.parametrize(
    "args", (["--commit", "b7ff946"], ["--source", "git", "--commit", "main"], ["--source", "x"])
)
def test_wrong_arguments_are_refused(installer, args, capsys):
    with pytest.raises(SystemExit):
        installer.main(args)
    assert installer.calls == []


def test_installed_detectron2_is_found_without_importing_it(tmp_path):
    """find_installed of the real script, against a package that can't be imported."""
    package = tmp_path / "detectron2"
    package.mkdir()
    (package / "__init__.py").write_text('import nothing_like_this\n__version__ = "0.7.1"\n')
    code = "import install_detectron2 as m; i = m.find_installed(); print(i.root, i.version)"
    path = os.pathsep.join([str(tmp_path), str(ROOT / "tools")])
    output = subprocess.check_output(
        [sys.executable, "-S", "-c", code], env={**os.environ, "PYTHONPATH": path}, text=True
    )
    assert output.split() == [str(package), "0.7.1"]


def test_manifest_is_upstreams(installer):
    entries = installer.read_manifest(ROOT / "tools" / "detectron2-b7ff946.manifest")
    assert len(entries) == 306
    assert entries["detectron2/__init__.py"] == "bdd994b49294485c27610772f97f177741f5518f"
    assert "detectron2/projects/point_rend/__init__.py" in entries
    assert "detectron2/model_zoo/configs/Base-RCNN-FPN.yaml" in entries


def copy_package(folder):
    """Copy what setup.py needs, so that building leaves nothing in the work tree."""
    (folder / "projects/crosskd_ifc").mkdir(parents=True)
    (folder / "projects/other").mkdir()
    (folder / "projects/other/__init__.py").write_text("")
    for name in ("setup.py", "projects/crosskd_ifc/__init__.py", "projects/crosskd_ifc/version.py"):
        (folder / name).write_bytes((ROOT / name).read_bytes())
    return folder


# Refuses the imports that must not happen, then runs a hook of the build backend.
BUILD = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "torchvision", "detectron2", "crosskd_ifc"):
            raise AssertionError("setup.py imports " + name)

sys.meta_path.insert(0, Blocker())
sys.path.insert(0, "")
from setuptools import build_meta
print(getattr(build_meta.__legacy__, sys.argv[1])("."))
"""


def build(folder, hook):
    """Run a build hook of setup.py in an interpreter without torch and detectron2."""
    output = subprocess.check_output(
        [sys.executable, "-c", BUILD, hook], cwd=folder, text=True, stderr=subprocess.STDOUT
    )
    return zipfile.ZipFile(folder / output.splitlines()[-1])


def test_setup_builds_the_package_without_torch_and_detectron2(tmp_path):
    wheel = build(copy_package(tmp_path), "build_wheel")
    modules = [name for name in wheel.namelist() if ".dist-info/" not in name]
    assert modules == ["crosskd_ifc/__init__.py", "crosskd_ifc/version.py"]
    (name,) = [name for name in wheel.namelist() if name.endswith("/METADATA")]
    metadata = wheel.read(name).decode()
    assert "\nName: crosskd-ifc\n" in metadata
    assert "\nRequires-Dist: torch>=" in metadata
    assert "Requires-Dist: detectron2" not in metadata


def test_lower_bounds_are_versions_that_have_what_is_used(tmp_path):
    wheel = build(copy_package(tmp_path), "build_wheel")
    (name,) = [name for name in wheel.namelist() if name.endswith("/METADATA")]
    bounds = dict(re.findall(r"Requires-Dist: (\w+)>=([0-9.]+)", wheel.read(name).decode()))
    # height_ratios of subplots, and confidence_interval of a t test
    for package, first in (("matplotlib", (3, 6)), ("scipy", (1, 10))):
        assert tuple(map(int, bounds[package].split("."))) >= first


def test_readme_and_setup_tell_the_same_room_on_the_disk():
    texts = [(ROOT / name).read_text() for name in ("README.md", "tools/setup_venv.sh")]
    assert len({re.search(r"(\d+) GB", text).group(1) for text in texts}) == 1


def test_editable_install_points_at_projects(tmp_path):
    wheel = build(copy_package(tmp_path), "build_editable")
    (pth,) = [name for name in wheel.namelist() if name.endswith(".pth")]
    assert wheel.read(pth).decode().strip() == str(tmp_path / "projects")


# What runs outside the repository, with the package from the wheel.
OUTSIDE = """
import os, sys
import crosskd_ifc
from crosskd_ifc.common.command_line import tool_command
from crosskd_ifc.common.config_files import load_config
from crosskd_ifc.experiments.protocol import load_protocol
from importlib.metadata import entry_points

site = os.path.dirname(os.path.dirname(crosskd_ifc.__file__))
assert site == sys.argv[1], site
assert load_config("quick/options/giou_R_18_shapes.yaml").MODEL.CROSSKD.LOSS.BOX_TYPE == "giou"
for name in ("demo_quick.yaml", "demo.yaml"):
    assert load_protocol(name).path.startswith(site)
commands = {x.name: x for x in entry_points(group="console_scripts") if "crosskd" in x.value}
for command in commands.values():
    assert callable(command.load()), command
tools = os.path.dirname(sys.modules["crosskd_ifc.tools"].__file__)
tools = {name[:-3] for name in os.listdir(tools) if name.endswith(".py")}
tools -= {"__init__", "install_detectron2"}
assert {tool_command(name) for name in tools} | {"crosskd-check-data"} == set(commands)
print(*sorted(commands))
"""


def test_a_wheel_works_outside_the_repository_and_has_configs_and_commands(tmp_path):
    source, site = tmp_path / "source", tmp_path / "site"
    skipped = shutil.ignore_patterns("__pycache__", "*.egg-info", "results.json", "*.png")
    for name in ("projects", "configs", "tools", "benchmarks/protocols"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=skipped)
    for name in ("setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    wheel = build(source, "build_wheel")
    held = {name[len("crosskd_ifc/configs/") :] for name in wheel.namelist() if "/configs/" in name}
    paths = (path for path in (ROOT / "configs").rglob("*") if "__pycache__" not in path.parts)
    assert held == {str(x.relative_to(ROOT / "configs")) for x in paths if x.is_file()}
    assert "crosskd_ifc/tools/detectron2-b7ff946.manifest" in wheel.namelist()
    wheel.extractall(site)
    shutil.rmtree(source)
    done = subprocess.run(
        [sys.executable, "-c", OUTSIDE, str(site)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    promised = "train demo compare check-data convert export visualize"
    assert {f"crosskd-{name}" for name in promised.split()} <= set(done.stdout.split())


def test_without_detectron2_the_import_says_how_to_install_it():
    hidden = "import sys; sys.path[:] = [p for p in sys.path if 'site-packages' not in p]"
    code = f"{hidden}; sys.path.insert(0, {str(ROOT / 'projects')!r}); import crosskd_ifc"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    error = done.stderr.splitlines()[-1]
    assert error.startswith("ImportError: detectron2 is not installed; this does it")
    assert os.path.isfile(error.split()[-1]) and error.endswith("tools/install_detectron2.py")


def test_the_docs_lock_pins_and_hashes_everything_and_names_no_place():
    text = (ROOT / "requirements-docs.lock").read_text()
    entries = re.sub(r"\\\n", "", re.sub(r"^#.*\n", "", text, flags=re.M)).splitlines()
    for entry in entries:
        assert re.match(r"[a-z0-9-]+==\S+ .*--hash=sha256:[0-9a-f]{64}", entry), entry
    assert not re.search(r"://|^-|torch", text, flags=re.M)
    assert {"zensical", "mkdocstrings"} <= {entry.split("==")[0] for entry in entries}


def test_lock_pins_and_hashes_everything_and_names_no_place():
    text = (ROOT / "requirements.lock").read_text()
    entries = re.sub(r"\\\n", "", re.sub(r"^#.*\n", "", text, flags=re.M)).splitlines()
    for entry in entries:
        assert re.match(r"[a-z0-9-]+==\S+ .*--hash=sha256:[0-9a-f]{64}", entry), entry
    assert not re.search(r"://|^-", text, flags=re.M)
    names = {entry.split("==")[0] for entry in entries}
    required = re.findall(r'^ +"([\w-]+)(?:[<>].*)?",', (ROOT / "setup.py").read_text(), flags=re.M)
    assert len(required) > 15
    assert {name.lower() for name in required} <= names


# Plays python, venv and pip: writes its arguments to ../log, "fails" when ../fail is there.
FAKE_PYTHON = """#!/bin/sh
case "$*" in
-c*) exit 0 ;;
"-m venv"*) mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
*) echo "$*" >>log; [ ! -e fail ] ;;
esac
"""


@pytest.fixture
def checkout(tmp_path):
    """A copy of the files that setup_venv.sh reads, and a function that runs it."""
    for name in (
        "setup.py",
        "requirements.lock",
        "tools/setup_venv.sh",
        "tools/install_detectron2.py",
        "tools/detectron2-b7ff946.manifest",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    python = tmp_path / "python"
    python.write_text(FAKE_PYTHON)
    python.chmod(0o755)

    def run(python=python):
        """Return exit status, stderr and the commands that were run."""
        (tmp_path / "log").write_text("")
        result = subprocess.run(
            ["sh", "tools/setup_venv.sh"],
            cwd=tmp_path,
            env={**os.environ, "PYTHON": str(python)},
            capture_output=True,
            text=True,
        )
        return result.returncode, result.stderr, (tmp_path / "log").read_text().splitlines()

    return run


def test_second_setup_does_nothing(checkout, tmp_path):
    status, _, commands = checkout()
    assert status == 0
    assert commands[-2:] == [
        "tools/install_detectron2.py",
        "-m pip install --no-build-isolation --use-pep517 --quiet --no-deps --editable .",
    ]
    assert checkout() == (0, "", [])


def test_setup_updates_when_the_lock_changes(checkout, tmp_path):
    checkout()
    (tmp_path / ".venv/kept").touch()
    with (tmp_path / "requirements.lock").open("a") as lock:
        lock.write("# newer\n")
    assert len(checkout()[2]) == 4
    assert (tmp_path / ".venv/kept").exists()


def test_interrupted_setup_starts_anew(checkout, tmp_path):
    (tmp_path / "fail").touch()
    status, error, commands = checkout()
    assert status != 0 and len(commands) == 1 and error.count("\n") == 1
    (tmp_path / ".venv/half").touch()
    (tmp_path / "fail").unlink()
    assert checkout()[0] == 0
    assert not (tmp_path / ".venv/half").exists()


def test_a_venv_made_by_hand_is_taken_over_but_never_removed(checkout, tmp_path):
    own = tmp_path / ".venv/lib/own"
    own.mkdir(parents=True)
    (tmp_path / ".venv/bin").mkdir()
    (tmp_path / ".venv/bin/python").write_bytes((tmp_path / "python").read_bytes())
    (tmp_path / ".venv/bin/python").chmod(0o755)
    (tmp_path / "fail").touch()
    status, error, _ = checkout()
    assert status != 0 and "unfinished" in error and "move it away before the next" in error
    status, error, commands = checkout()
    assert status == 1 and commands == [] and own.exists()
    assert error.startswith("error: the .venv that was made by hand is unfinished")
    (tmp_path / "fail").unlink()
    (tmp_path / ".venv/.unfinished").unlink()
    assert checkout()[0] == 0 and own.exists()
    assert checkout() == (0, "", [])
    with (tmp_path / "requirements.lock").open("a") as lock:
        lock.write("# newer\n")
    (tmp_path / "fail").touch()
    assert checkout()[0] != 0 and "made by hand is unfinished" in checkout()[1] and own.exists()


def test_setup_is_redone_after_the_folder_moved(checkout, tmp_path):
    checkout()
    stamp = tmp_path / ".venv/.stamp"
    stamp.write_text(stamp.read_text().replace(str(tmp_path), "/elsewhere"))
    assert len(checkout()[2]) == 4


def test_setup_refuses_an_old_python_in_one_line(checkout, tmp_path):
    old = tmp_path / "old"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    status, error, commands = checkout(old)
    assert status == 1 and commands == []
    assert error.startswith("error: Python 3.11 or newer is needed") and error.count("\n") == 1
    assert not (tmp_path / ".venv").exists()


def test_setup_names_the_missing_venv_module(checkout, tmp_path):
    bare = tmp_path / "bare"
    bare.write_text('#!/bin/sh\ncase "$*" in *ensurepip*) exit 1 ;; esac\n')
    bare.chmod(0o755)
    status, error, _ = checkout(bare)
    assert status == 1 and "python3-venv" in error and error.count("\n") == 1
