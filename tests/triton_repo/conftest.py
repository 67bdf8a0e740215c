import pytest

from tests import shared


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """The build of a tiny pipeline."""
    return shared.built(shared.pipeline(tmp_path_factory))
