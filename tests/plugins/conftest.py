"""The project's operators for OpenVINO, compiled for each set of instructions that the CPU has."""

import pytest
from openvino.utils.node_factory import NodeFactory

from engines import cpu
from export.checkpoints import cache_directory
from plugins.openvino import library


@pytest.fixture(scope="session")
def compiled():
    """Of a set of instructions: what makes nodes of the operators."""

    def factory(instructions):
        if not cpu.has(*instructions.needs):
            pytest.skip(f"the CPU has no {instructions.name}")
        if instructions not in factories:
            factories[instructions] = NodeFactory()
            factories[instructions].add_extension(paths[instructions])
        return factories[instructions]

    paths = {made.instructions: made.path for made in library.compiled(cache_directory() / "operators")}
    factories = {}  # nodes do not keep alive what their library is loaded by
    return factory


@pytest.fixture(scope="module", params=library.ALL, ids=lambda each: each.name)
def instructions(request):
    return request.param


@pytest.fixture(scope="module")
def factory(compiled, instructions):
    return compiled(instructions)
