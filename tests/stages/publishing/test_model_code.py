"""The code that travels with a checkpoint: complete, and named as published models name it."""

import ast
import json
import sys
from pathlib import Path

OURS = Path("colqwen3/model")


def test_names_in_auto_map_are_the_published_ones(released: Path) -> None:
    config = json.loads((released / "config.json").read_text())
    assert config["auto_map"] == {
        "AutoConfig": "configuration_colqwen3.ColQwen3Config",
        "AutoModel": "modeling_colqwen3.ColQwen3",
    }
    processor = json.loads((released / "processor_config.json").read_text())
    assert processor["auto_map"] == {"AutoProcessor": "processing_colqwen3.ColQwen3Processor"}
    assert config["architectures"] == ["ColQwen3"]
    assert config["model_type"] == "colqwen3"


def test_configs_keep_the_publishers_fields(released: Path) -> None:
    published = json.loads(Path("demo/model/config.json").read_text())
    shipped = json.loads((released / "config.json").read_text())
    # vLLM drops the projection's bias where it reads embed_dim
    assert shipped.pop("vector_dim") == published.pop("embed_dim")
    assert {key: shipped[key] for key in published} == published
    assert shipped.keys() - published.keys() == {"auto_map", "quantization_config"}


def test_code_is_ours_and_imports_nothing_that_is_not_there(released: Path) -> None:
    shipped = {path.name for path in released.glob("*.py")}
    assert shipped == {
        "configuration_colqwen3.py", "modeling_colqwen3.py", "processing_colqwen3.py", "scoring.py",
    }  # fmt: skip
    outside = set()
    for name in shipped:
        text = (released / name).read_text()
        assert text == (OURS / name).read_text()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert f"{node.module}.py" in shipped
            elif isinstance(node, ast.ImportFrom):
                outside.add(str(node.module).split(".")[0])
            elif isinstance(node, ast.Import):
                outside |= {alias.name.split(".")[0] for alias in node.names}
    assert outside - sys.stdlib_module_names == {"torch", "PIL", "numpy", "transformers"}
