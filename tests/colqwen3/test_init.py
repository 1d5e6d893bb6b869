"""`import colqwen3` is quick, and every public name is there once it is asked for."""

import subprocess
import sys

import pytest

import colqwen3


def test_importing_the_library_imports_nothing_heavy() -> None:
    heavy = "{'torch', 'transformers', 'numpy', 'PIL', 'safetensors', 'huggingface_hub'}"
    code = f"import sys, colqwen3; print(sorted({heavy} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("name", colqwen3.__all__)
def test_every_public_name_resolves_and_is_documented(name: str) -> None:
    value = getattr(colqwen3, name)
    assert value.__name__ == name
    assert (value.__doc__ or "").strip()
    assert name in dir(colqwen3)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'colqwen3' has no attribute 'nothing'"):
        colqwen3.nothing  # noqa: B018
