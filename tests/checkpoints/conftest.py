"""Fixtures of several files here."""

import tarfile

import pytest
from helpers import golden_model
from helpers.t5x_files import FILTER


@pytest.fixture(scope="module")
def written_by_t5x(tmp_path_factory):
    folder = tmp_path_factory.mktemp("t5x")
    with tarfile.open(golden_model.FOLDER / "t5x_checkpoints.tar.gz") as archive:
        archive.extractall(folder, **FILTER)
    return folder
