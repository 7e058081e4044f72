"""transformers knows slimlm's format after `import slimlm`, whichever is imported first, and neither imports the other."""

import subprocess
import sys

import pytest

KNOWN = """
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
assert "slimlm" in AUTO_QUANTIZER_MAPPING and "slimlm" in AUTO_QUANTIZATION_CONFIG_MAPPING
assert any("slimlm" in name for name in CONFIG_MAPPING)
import inspect, transformers.quantizers.auto as table
assert "AUTO_QUANTIZER_MAPPING" in inspect.getsource(table) and type(table.__loader__) is type(table.__spec__.loader)
assert "slimlm" not in type(table.__loader__).__module__
"""


@pytest.mark.parametrize(
    "first",
    [
        "from transformers import AutoModelForCausalLM\nimport slimlm",
        "import slimlm\nfrom transformers import LlamaForCausalLM",
        # Slow: a process that imports both, as the two others.
        pytest.param("import transformers, slimlm\nslimlm.load", marks=pytest.mark.slow),
    ],
)
def test_the_format_is_known_whichever_is_imported_first(first: str) -> None:
    done = subprocess.run([sys.executable, "-c", f"{first}\n{KNOWN}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_config_is_known_without_the_quantizers() -> None:
    code = """
import slimlm, sys
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
assert any("slimlm" in name for name in CONFIG_MAPPING) and "transformers.quantizers.auto" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_importing_slimlm_imports_neither_torch_nor_transformers() -> None:
    code = "import slimlm, sys; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
