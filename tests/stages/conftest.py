"""The teacher of many tests of stages."""

import pytest


@pytest.fixture(scope="module")
def teacher(tiny):
    """The teacher of `tiny`, loaded once for each test file."""
    from stages.networks.stable_diffusion import StableDiffusion  # imports torch, which not all of these tests need

    return StableDiffusion(tiny[1]["teacher"].artifact.folder)
