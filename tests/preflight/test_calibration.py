"""How much calibration text a run takes: what is asked for goes before what the model needs."""

import pytest

from slimlm.preflight.calibration import amount_of
from slimlm.recipe import open_recipe

SHAPES = {"narrow": (64, 512), "wide": (512, 4864)}


@pytest.mark.parametrize(
    ("recipe", "planned", "expected"),
    [
        ("best", False, 76),  # 8 x 4864 = 38912 tokens
        ("best", True, 78),  # and 2 x 1 for a plan's losses and its check
        ("absmax", False, 16),  # 8192 tokens
    ],
)
def test_without_a_word_the_widest_layer_decides_where_covariances_are_needed(
    recipe: str, planned: bool, expected: int
) -> None:
    found = amount_of((None, None), SHAPES, open_recipe(recipe), context=2048, planned=planned)
    assert (found.samples, found.length) == (expected, 512)
    assert found.reason is not None
    assert ("8 tokens for each of the 4864 inputs of the widest layer (wide). Where" in found.reason) == (recipe == "best")


def test_what_is_asked_for_is_taken_and_the_rest_follows() -> None:
    recipe = open_recipe("best")
    both = amount_of((5, 7), SHAPES, recipe, context=2048, planned=False)
    assert (both.samples, both.length, both.reason) == (5, 7, None)
    beyond = amount_of((None, 100_000), SHAPES, recipe, context=2048, planned=False)
    assert (beyond.samples, beyond.length) == (19, 2048)
    assert amount_of((None, 100_000), SHAPES, recipe, context=None, planned=True).samples == 3
    long = amount_of((None, 2048), SHAPES, recipe, context=4096, planned=False)
    assert (long.samples, long.length) == (19, 2048)
    few = amount_of((3, None), SHAPES, recipe, context=None, planned=False)
    assert (few.samples, few.length, few.reason) == (3, 512, None)
    short = amount_of((None, None), SHAPES, recipe, context=256, planned=False)
    assert (short.samples, short.length) == (152, 256)
