#!/usr/bin/env python3
"""Install detectron2 into the environment of the Python that runs this script.

    python tools/install_detectron2.py                            # 5 seconds, no compiler needed
    python tools/install_detectron2.py --source git --commit SHA  # minutes, with the compiled ops

detectron2 has no release on the package index. `--source pypi` takes its Python tree from a
released wheel that vendors it, gives the modules their own import name back and checks every file
against the git blob ids of the upstream commit in `detectron2-*.manifest`: what gets installed is
upstream's code bit for bit, or nothing. The compiled ops (deformable convolutions, rotated boxes,
the fast COCO evaluator) are not part of it. What detectron2 requires stands in setup.py.

Only the standard library is used: this runs before anything else is installed.
"""

import argparse
import base64
import errno
import hashlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
import zlib
from pathlib import Path
from typing import Dict, Iterable, List, NamedTuple, Optional

MIN_PYTHON = (3, 10)
MIN_VERSION = (0, 6)
CARRIER = "LabGym==3.1.2"
CARRIER_SHA256 = "a2900cff8a3fb508e1975f19b5f9abd9f261966db87b0c332697fb4138c1cb2b"
CARRIER_PACKAGE = "LabGym"
REPOSITORY = "https://github.com/facebookresearch/detectron2"
COMMIT = "b7ff9466d174fbb7061ff6d3773cd9c372a8e56f"
MANIFEST = Path(__file__).resolve().with_name("detectron2-b7ff946.manifest")
VERSION = "0.6"
DIST_INFO = "detectron2-%s.dist-info" % VERSION


class InstallError(Exception):
    """A failure that the user can understand and act on; its text is one line."""


class Installed(NamedTuple):
    """What is known of a detectron2 without importing it (an import would need torch)."""

    root: Optional[Path] = None  # the package folder; None where an import would find nothing
    version: str = ""
    ours: bool = False  # installed by this script with --source pypi
    commit: str = ""  # of a pip install from git
    broken: bool = False  # left by an interrupted pip, which can only write over it


def read_manifest(path: Path) -> Dict[str, str]:
    """Return {path: git blob id} of the lines `<blob id>  <path>`."""
    entries = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        match = re.fullmatch(r"([0-9a-f]{40})\s+(\S.*)", line)
        if match is None:
            raise InstallError("%s, line %d: not '<blob id>  <path>'" % (path.name, number))
        entries[match.group(2)] = match.group(1)
    if not entries:
        raise InstallError("%s lists no files" % path.name)
    return entries


def blob_id(data: bytes) -> str:
    """Return the id that git gives a file with this content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def check_sha256(path: Path, expected: str) -> None:
    """Raise InstallError unless the file has this SHA-256."""
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        for block in iter(lambda: handle.read(1 << 20), b""):
            digest.update(block)
    if digest.hexdigest() != expected:
        raise InstallError(
            "%s has sha256 %s, expected %s; nothing was installed"
            % (path.name, digest.hexdigest(), expected)
        )


def read_vendored(wheel: Path, package: str = CARRIER_PACKAGE) -> Dict[str, bytes]:
    """Read `<package>/detectron2/**` from a wheel, the import prefix `<package>.` taken back.

    Everything stays in memory, so that a hostile path in the archive can't reach the disk.
    """
    prefix = package + "/detectron2/"
    vendored = (package + ".detectron2").encode()
    files = {}
    try:
        with zipfile.ZipFile(wheel) as archive:
            for info in archive.infolist():
                if not info.filename.startswith(prefix) or info.is_dir():
                    continue
                path = info.filename[len(package) + 1 :]
                if path in files:
                    raise InstallError(
                        "%s holds %s twice; nothing was installed" % (wheel.name, path)
                    )
                files[path] = archive.read(info).replace(vendored, b"detectron2")
    except (zipfile.BadZipFile, zlib.error) as error:
        raise InstallError("%s is not a readable wheel: %s" % (wheel.name, error))
    return files


def differences(expected: Dict[str, str], found: Dict[str, str]) -> str:
    """Say in one line how the {path: blob id} found differ from the expected; "" if equal."""
    groups = [
        ("changed", [p for p in expected if p in found and found[p] != expected[p]]),
        ("missing", [p for p in expected if p not in found]),
        ("not in the manifest", [p for p in found if p not in expected]),
    ]
    parts = []
    for what, paths in groups:
        if paths:
            more = ", ..." if len(paths) > 5 else ""
            parts.append("%d %s (%s%s)" % (len(paths), what, ", ".join(sorted(paths)[:5]), more))
    return "; ".join(parts)


def check_files(files: Dict[str, bytes], manifest: Dict[str, str], name: str) -> None:
    """Raise InstallError that says what differs unless every file is the one in the manifest."""
    found = {path: blob_id(data) for path, data in files.items()}
    text = differences(manifest, found)
    if text:
        raise InstallError("%s differs from the manifest: %s; nothing was installed" % (name, text))


def build_wheel(files: Dict[str, bytes], folder: Path, commit: str = COMMIT) -> Path:
    """Write a plain wheel of these files and return its path. Same files, same bytes."""
    contents = dict(files)
    # first in the dist-info: tells this wheel, or the half of it, from a user's own build
    contents[DIST_INFO + "/UPSTREAM"] = ("%s@%s\n" % (REPOSITORY, commit)).encode()
    contents[DIST_INFO + "/METADATA"] = (
        "Metadata-Version: 2.1\nName: detectron2\nVersion: %s\n"
        "Summary: detectron2, Python files of upstream commit %s\n"
        "Home-page: %s\nLicense: Apache-2.0\nRequires-Python: >=3.7\n"
        % (VERSION, commit, REPOSITORY)
    ).encode()
    contents[DIST_INFO + "/WHEEL"] = (
        b"Wheel-Version: 1.0\nGenerator: install_detectron2\n"
        b"Root-Is-Purelib: true\nTag: py3-none-any\n"
    )
    record = "".join(
        "%s,sha256=%s,%d\n" % (path, _record_hash(data), len(data))
        for path, data in contents.items()
    )
    contents[DIST_INFO + "/RECORD"] = (record + DIST_INFO + "/RECORD,,\n").encode()
    wheel = folder / ("detectron2-%s-py3-none-any.whl" % VERSION)
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for path, data in contents.items():
            info = zipfile.ZipInfo(path, date_time=(2024, 1, 26, 0, 0, 0))
            info.external_attr = 0o644 << 16
            info.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(info, data)
    return wheel


def _record_hash(data: bytes) -> str:
    digest = hashlib.sha256(data).digest()
    return base64.urlsafe_b64encode(digest).rstrip(b"=").decode()


def run_pip(args: Iterable[str], show: bool = False) -> None:
    """Run this interpreter's pip; raise InstallError with the reason in one line."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", *args]
    env = dict(os.environ, PYTHONIOENCODING="utf-8")
    output = []
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=env
    ) as process:
        for line in process.stdout:
            output.append(line.decode("utf-8", "replace"))
            if show:
                print(output[-1], end="", flush=True)
    if process.returncode:
        raise InstallError(explain_pip("".join(output)))


def explain_pip(output: str) -> str:
    """Turn the output of a failed pip into one line, the likely cause first."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [re.search(r"(?:^|\s)(?:ERROR|error|fatal|\w+Error): (.+)", line) for line in lines]
    reasons = [match.group(1) for match in errors if match and match.group(1) != "Exception:"]
    reason = (reasons or lines or ["no output"])[-1]
    if "No space left on device" in output or "Errno 28" in output:
        return "disk full: pip could not write (%s)" % reason
    if "No module named pip" in output:
        return "this Python has no pip: run '%s -m ensurepip'" % sys.executable
    unreachable = (
        "NewConnectionError|NameResolutionError|ConnectTimeout|ReadTimeout|Connection refused|"
        "Network is unreachable|Temporary failure in name resolution|Max retries exceeded|"
        "ProxyError|SSLError|Could not resolve host|unable to access|No matching distribution"
    )
    if re.search(unreachable, output):
        return "no network, or the package index can't be reached (%s)" % reason
    return "pip failed: %s" % reason


# Asked of a fresh interpreter, which sees what an import would find.
_PROBE = """
import importlib.util, json
from importlib import metadata
spec = importlib.util.find_spec("detectron2")
found = {"origin": spec and spec.origin}
try:
    dist = metadata.distribution("detectron2")
    for name in ("UPSTREAM", "direct_url.json", "RECORD"):
        found[name] = dist.read_text(name)
except metadata.PackageNotFoundError:
    pass
print(json.dumps(found))
"""


def find_installed() -> Installed:
    """Return what an `import detectron2` would find. Nothing is imported."""
    with tempfile.TemporaryDirectory() as empty:  # a detectron2 folder in the cwd is not installed
        output = subprocess.check_output([sys.executable, "-c", _PROBE], cwd=empty)
    found = json.loads(output.decode().splitlines()[-1])
    ours = bool(found.get("UPSTREAM"))
    broken = ours and found["RECORD"] is None
    if not found["origin"]:
        return Installed(broken=broken)
    init = Path(found["origin"])
    version = re.search(r"^__version__\s*=\s*[\"']([\d.]+)", init.read_text("utf-8"), re.MULTILINE)
    source = json.loads(found.get("direct_url.json") or "{}")
    return Installed(
        root=init.parent,
        version=version.group(1) if version else "",
        ours=ours,
        commit=source.get("vcs_info", {}).get("commit_id", ""),
        broken=broken,
    )


def hash_tree(root: Path) -> Dict[str, str]:
    """Return {path: git blob id} of a package folder, byte-compiled files left out."""
    ids = {}
    for path in sorted(root.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            ids[(Path(root.name) / path.relative_to(root)).as_posix()] = blob_id(path.read_bytes())
    return ids


def why_suitable(installed: Installed, source: str, commit: str, manifest: Dict[str, str]) -> str:
    """Say why the installed detectron2 will do; "" where one has to be installed."""
    if installed.root is None or installed.broken:
        return ""
    if tuple(int(n) for n in installed.version.split(".") if n) < MIN_VERSION:
        return ""
    if installed.ours:  # without the compiled ops, which --source git is asked for
        intact = source == "pypi" and not differences(manifest, hash_tree(installed.root))
        return "every file verified" if intact else ""
    if commit:
        return "built from that commit" if installed.commit.startswith(commit) else ""
    return "not this script's work, kept as it is; --force replaces it"


def install_from_pypi(wheel: Optional[Path], installed: Installed) -> None:
    """Download (or take) the carrier wheel, verify it, and install the detectron2 in it.

    Raises:
        InstallError: something differs from what is expected; nothing was installed then.
    """
    manifest = read_manifest(MANIFEST)
    with tempfile.TemporaryDirectory(prefix="detectron2-") as scratch:
        folder = Path(scratch)
        if wheel is None:
            print("downloading %s" % CARRIER, flush=True)
            wheel = download(folder)
        check_sha256(wheel, CARRIER_SHA256)
        files = read_vendored(wheel)
        check_files(files, manifest, wheel.name)
        print("%s: sha256 and %d files verified" % (wheel.name, len(files)), flush=True)
        built = build_wheel(files, folder)
        replace = "--ignore-installed" if installed.broken else "--force-reinstall"
        run_pip(["install", "--no-deps", "--no-index", replace, str(built)])


def download(folder: Path) -> Path:
    """Download the carrier wheel, and nothing that it depends on."""
    run_pip(
        ["download", "--no-deps", "--ignore-requires-python", "--only-binary", ":all:"]
        + ["--retries", "2", "--dest", str(folder), CARRIER]
    )
    wheels: List[Path] = sorted(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise InstallError("pip downloaded %d wheels, expected one" % len(wheels))
    return wheels[0]


def install_from_git(commit: str) -> None:
    """Build upstream's commit with pip. Needs git, a C++ compiler and an installed torch."""
    if importlib.util.find_spec("torch") is None:
        raise InstallError("--source git compiles against torch: install torch first")
    print("building %s at %s (minutes)" % (REPOSITORY, commit), flush=True)
    run_pip(
        ["install", "--no-deps", "--no-build-isolation", "--force-reinstall"]
        + ["detectron2 @ git+%s@%s" % (REPOSITORY, commit)],
        show=True,
    )


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """That of the other tools can't be imported before detectron2 is there."""


def parse_args(argv: Optional[List[str]] = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument(
        "--source", choices=("pypi", "git"), default="pypi", help="where detectron2 comes from"
    )
    parser.add_argument(
        "--commit", default="", help="with --source git: what to build (%s)" % COMMIT[:7]
    )
    parser.add_argument("--wheel", type=Path, help="an already downloaded wheel of " + CARRIER)
    parser.add_argument("--force", action="store_true", help="replace the installed detectron2")
    args = parser.parse_args(argv)
    if args.commit and args.source != "git":
        parser.error("--commit needs --source git; --source pypi always is %s" % COMMIT[:7])
    if args.wheel and args.source != "pypi":
        parser.error("--wheel needs --source pypi")
    if args.commit and not re.fullmatch(r"[0-9a-f]{7,40}", args.commit):
        parser.error("--commit takes 7 to 40 hex digits")
    return args


def install(args: argparse.Namespace) -> None:
    """Install what the arguments ask for, or find that nothing is to be done."""
    manifest = read_manifest(MANIFEST)
    installed = find_installed()
    reason = why_suitable(installed, args.source, args.commit, manifest)
    if reason and not args.force:
        print("detectron2 %s in %s: %s" % (installed.version, installed.root, reason))
        return
    if args.source == "git":
        install_from_git(args.commit or COMMIT)
    else:
        install_from_pypi(args.wheel, installed)
    installed = find_installed()
    if installed.root is None:
        raise InstallError("pip succeeded, but %s finds no detectron2" % sys.executable)
    if args.source == "pypi":  # left-overs of another detectron2 would be imported with ours
        text = differences(manifest, hash_tree(installed.root))
        if text:
            raise InstallError(
                "%s is not as installed: %s; remove that folder and try again"
                % (installed.root, text)
            )
    print("installed detectron2 %s in %s" % (installed.version, installed.root))


def main(argv: Optional[List[str]] = None) -> int:
    """Run the command line; every expected failure is one line and exit status 1."""
    try:
        if sys.version_info < MIN_PYTHON:
            raise InstallError(
                "Python %d.%d or newer is needed, this is %d.%d"
                % (MIN_PYTHON + tuple(sys.version_info[:2]))
            )
        install(parse_args(argv))
    except InstallError as error:
        print("error: %s" % error, file=sys.stderr)
        return 1
    except OSError as error:
        what = "disk full: " if error.errno == errno.ENOSPC else ""
        print("error: %s%s" % (what, error), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
