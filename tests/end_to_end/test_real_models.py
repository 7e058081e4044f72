"""On the project's real models and text, where they are there: who beats whom, and by the published protocol."""

from pathlib import Path

import pytest
import torch

import slimlm
from slimlm.data.windows import tokens_of, windows_of
from slimlm.evaluation.compare import open_any
from slimlm.evaluation.perplexity import perplexity
from slimlm.recipe import Recipe, recipe_from_dict

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
MODEL = DATA / "models" / "stories260K-hf"

pytestmark = pytest.mark.skipif(not MODEL.is_dir(), reason="the real models are not next to this checkout")


@pytest.fixture(scope="module")
def windows() -> torch.Tensor:
    text = str(DATA / "text" / "tinystories-dev.txt")
    tokens = tokens_of(open_any(str(MODEL)).tokenizer, text, "evaluation", at_most=20 * 512)
    return windows_of(tokens, 512, source="tinystories-dev.txt")


@pytest.fixture(scope="module")
def dense(windows: torch.Tensor) -> float:
    """The original's perplexity."""
    return perplexity(open_any(str(MODEL)).model, windows).value


class Rises:
    """By how much recipes raise the perplexity; each is measured once."""

    def __init__(self, windows: torch.Tensor, dense: float, folder: Path) -> None:
        self._windows, self._dense, self._folder = windows, dense, folder
        self._found: dict[str, float] = {}

    def __call__(self, recipe: str | Recipe) -> float:
        name = recipe if isinstance(recipe, str) else recipe.name
        if name not in self._found:
            text, out = DATA / "text" / "tinystories-calib.txt", self._folder / name
            slimlm.compress(MODEL, out, recipe=recipe, data=str(text), samples=16, length=512)
            self._found[name] = perplexity(open_any(str(out)).model, self._windows).value - self._dense
        return self._found[name]


@pytest.fixture(scope="module")
def rises(windows: torch.Tensor, dense: float, tmp_path_factory: pytest.TempPathFactory) -> Rises:
    return Rises(windows, dense, tmp_path_factory.mktemp("rises"))


def test_the_dense_model_has_its_known_perplexity(dense: float) -> None:
    # 4.574 over the whole text; the first 20 windows are easier. Another torch moves the last digits.
    assert dense == pytest.approx(3.7214, rel=1e-3)


def test_repair_beats_pruning_alone_and_pruning_by_activation_beats_magnitude(rises: Rises) -> None:
    slim, code, wanda, magnitude, dense4 = map(rises, ("slim", "slim-code", "wanda", "magnitude", "absmax"))
    assert dense4 < slim < code < wanda < magnitude


def test_deciding_all_together_does_less_than_a_third_of_slim_s_damage(rises: Rises) -> None:
    # `best-24` with fewer rounds, for time; on the whole text and with all rounds it does about an eighth.
    steps = [{"joint": "alternation", "rounds": 4, "descent_rounds": 2}]
    quick = recipe_from_dict({"name": "quick", "sequential": True, "steps": steps}, source="test")
    assert rises(quick) < rises("slim") / 3
