"""What is installed: every folder of the library, found from every folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from support.source_tree import FOLDERS, ROOT, copy_sources

pytestmark = pytest.mark.skipif(not (ROOT / "pyproject.toml").is_file(), reason="needs the source tree")


def test_every_folder_with_python_files_is_a_package_that_is_installed():
    listed = re.search(r"^packages = \[(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.MULTILINE | re.DOTALL)
    assert listed is not None
    installed = set(re.findall(r'"([\w.]+)"', listed[1]))
    found = set()
    for folder, package in FOLDERS.items():
        for path in (ROOT / folder).rglob("*.py"):
            assert (path.parent / "__init__.py").is_file(), f"{path.parent} has no __init__.py: no wheel would have it"
            found.add(".".join((package, *path.parent.relative_to(ROOT / folder).parts)))
    assert installed == found


def run(command, cwd):
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
    result = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout.strip()


def test_an_editable_install_is_found_from_the_folder_that_holds_the_clone(tmp_path):
    """There the clone's root, a folder called avsep without an __init__.py, could be taken for the package."""
    pytest.importorskip("setuptools", minversion="77")
    clone = copy_sources(tmp_path / "avsep")
    build = "import sys; from setuptools.build_meta import build_editable; build_editable(sys.argv[1])"
    run([sys.executable, "-c", build, tmp_path], cwd=clone)

    venv.create(tmp_path / "environment", with_pip=False, symlinks=os.name != "nt")
    python = tmp_path / "environment" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    installed = Path(run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], cwd=tmp_path))
    (wheel,) = tmp_path.glob("avsep-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)
        (record,) = (name for name in archive.namelist() if name.endswith("/RECORD"))
        assert {line.split(",")[0] for line in archive.read(record).decode().splitlines()} == set(archive.namelist())

    look = (
        "from importlib.util import find_spec; print(*(find_spec(name).origin for name in ('avsep', 'avsep.kernels')))"
    )
    for folder in (tmp_path, clone, installed):
        found = run([python, "-c", look], folder)
        assert found == f"{clone / 'avsep' / '__init__.py'} {clone / 'kernels' / '__init__.py'}"


def test_a_missing_package_is_one_line():
    """As after ``pip install --no-deps``."""
    for package in ("typer", "pydantic", "yaml"):
        code = f"import sys\nsys.modules[{package!r}] = None\nfrom avsep.cli import main\nmain(['list', 'presets'])\n"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
        assert done.returncode == 2
        assert done.stderr == (
            f"avsep: the package '{package}' is missing: install avsep with what it needs (pip install avsep)\n"
        )


@pytest.mark.slow
def test_wheel_and_sdist_are_what_pypi_takes_and_run_in_a_bare_environment(tmp_path):
    """The wheel is built from the sdist. What avsep needs is taken from where these tests run."""
    pytest.importorskip("setuptools", minversion="77")
    pytest.importorskip("twine", minversion="7")
    clone, dist = copy_sources(tmp_path / "clone"), tmp_path / "dist"
    build = "import sys; from setuptools import build_meta as b; getattr(b, 'build_' + sys.argv[1])(sys.argv[2])"
    run([sys.executable, "-c", build, "sdist", dist], cwd=clone)
    (sdist,) = dist.glob("avsep-*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    run([sys.executable, "-c", build, "wheel", dist], cwd=unpacked)
    (wheel,) = dist.glob("avsep-*.whl")
    run([sys.executable, "-m", "twine", "check", "--strict", sdist, wheel], cwd=tmp_path)

    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        data = {  # every file beside the code
            path.relative_to(ROOT / folder).as_posix()
            for folder in ("avsep", "export", "kernels")
            for path in (ROOT / folder).rglob("*")
            if path.suffix in (".yaml", ".html", ".js", ".css", ".json", ".zip", ".flac", ".safetensors", ".typed")
            and "node_modules" not in path.parts
        }
        missing = [name for name in data if not any(found.endswith(f"/{name}") for found in names)]
        assert missing == []
        venv.create(tmp_path / "bare", with_pip=False, symlinks=os.name != "nt")
        python = tmp_path / "bare" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
        installed = Path(run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], cwd=tmp_path))
        archive.extractall(installed)
    # Behind the wheel's own folder, so that only what avsep needs is found here; lines of .pth files are not read.
    others = [path for path in sys.path if path.endswith("site-packages")]
    (installed / "needed.pth").write_text("\n".join(others) + "\n")
    empty = tmp_path / "empty"
    empty.mkdir()
    where = run([python, "-c", "import avsep; print(avsep.__file__)"], cwd=empty)
    assert Path(where) == installed / "avsep" / "__init__.py"
    assert run([python, "-m", "avsep", "--version"], cwd=empty).startswith("avsep ")
    assert "iquery_small" in run([python, "-m", "avsep", "list", "presets"], cwd=empty)
    assert "PyTorch" in run([python, "-m", "avsep", "doctor"], cwd=empty)
    assert list(empty.iterdir()) == []
