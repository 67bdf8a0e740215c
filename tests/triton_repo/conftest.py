import pytest

from export.build import build
from export.config import load
from tests import tiny


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    root = tmp_path_factory.mktemp("tiny")
    file = tiny.save_pipeline(root)
    build(load(file), root / "build")
    return root
