"""The wheel: what `python -m build` makes is all that a user without a clone needs."""

import importlib.metadata
import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
import sys
import zipfile

import pytest

import tnt_jax

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel, made of the sdist that is made of this tree."""
    setuptools_version = importlib.metadata.version("setuptools")
    if importlib.util.find_spec("build") is None or int(setuptools_version.split(".")[0]) < 77:
        pytest.skip(
            "needs build and setuptools 77 beside each other, so that nothing is downloaded: "
            "pip install build 'setuptools>=77'"
        )
    folder = tmp_path_factory.mktemp("release")
    tree = folder / "tree"  # a copy: a build leaves files behind
    for name in ("tnt_jax", "gin_configs"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.iterdir():
        if path.is_file() and not path.name.startswith("."):
            shutil.copy(path, tree)
    built = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, tree],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    (made,) = folder.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def site(wheel, tmp_path_factory):
    """A folder with the wheel's files, as pip would put them into site-packages."""
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def run_train(site, folder, *arguments):
    return subprocess.run(
        [sys.executable, "-m", "tnt_jax.train", *arguments],
        env=os.environ | {"PYTHONPATH": str(site)},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )


def files_of(folder, pattern):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob(pattern)}


def test_the_wheel_is_the_package_with_its_files(site):
    assert files_of(site / "tnt_jax" / "gin_configs", "*.gin") == files_of(
        ROOT / "gin_configs", "*.gin"
    )
    for pattern in ("*.py", "*.html", "*.css", "*.js"):
        assert files_of(site / "tnt_jax", pattern) == files_of(ROOT / "tnt_jax", pattern)
    names = {path.name.split("-")[0] for path in site.iterdir()}
    assert names == {"tnt_jax"}, "something else would land in site-packages"


def test_gin_files_are_found_without_a_clone(site, tmp_path):
    done = run_train(site, tmp_path, "--gin_file=runs/train.gin", "--gin.MODEL_DIR=here")
    # It was read, with what it includes: what is missing is what nobody has set.
    assert done.returncode == 2
    assert "settings are missing: set --gin.INITIAL_CHECKPOINT_PATH=..., " in done.stderr
    assert "training.gin reads %MODEL, which nothing sets: add --gin_file=models/" in done.stderr
    assert "--gin.RECORDS=..." in done.stderr and "MODEL_DIR" not in done.stderr


def test_gin_files_are_the_wheels_own(site, tmp_path):
    done = run_train(site, tmp_path, "--gin_file=runs/trian.gin")
    assert done.returncode == 2
    assert f"{site / 'tnt_jax' / 'gin_configs' / 'runs' / 'trian.gin'}" in done.stderr
    assert str(ROOT) not in done.stderr
    assert "did you mean runs/train.gin or" in done.stderr


def test_the_newest_section_of_the_changelog_is_this_version():
    headings = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    assert headings[0] == tnt_jax.__version__
    assert len(headings) == len(set(headings))
