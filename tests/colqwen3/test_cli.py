"""The command `colqwen3`: help with an example for each subcommand, and no torch before it is needed."""

import argparse
import shlex
from pathlib import Path

import pytest

from colqwen3.cli import COMMANDS, build_parser
from tests.helpers.cli import run_command

GOLDEN = Path("tests/golden/model")
IMPORTED = """
import sys
from colqwen3.cli import main
try:
    main()
finally:
    heavy = {"torch", "transformers", "numpy", "safetensors", "huggingface_hub", "auto_round", "mteb"}
    print(sorted(heavy & sys.modules.keys()), file=sys.stderr)
"""


def subparsers() -> dict[str, argparse.ArgumentParser]:
    (action,) = (
        action
        for action in build_parser()._actions
        if isinstance(action, argparse._SubParsersAction)
    )
    return dict(action.choices)


def test_each_subcommand_has_a_module_and_help() -> None:
    assert set(COMMANDS) == {
        "embed", "search", "embed-corpus", "inspect", "verify", "export-gguf", "export-colpali",
        "oracle", "benchmark-vidore",
    }  # fmt: skip
    assert set(subparsers()) == set(COMMANDS)
    overview = build_parser().format_help()
    for name, parser in subparsers().items():
        assert name in overview
        assert (parser.description or "").strip().splitlines()[0] in " ".join(overview.split())


@pytest.mark.parametrize("name", COMMANDS)
def test_the_example_in_the_help_is_accepted_by_the_parser(name: str) -> None:
    example = (subparsers()[name].epilog or "").removeprefix("example:\n").strip()
    program, *words = shlex.split(example)
    assert (program, words[0]) == ("colqwen3", name)
    args = build_parser().parse_args(words)
    assert args.command == name
    assert callable(args.execute)


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_help_imports_no_torch(name: str) -> None:
    done = run_command(*filter(None, [name, "--help"]), code=IMPORTED)
    assert (done.returncode, done.stderr) == (0, "[]\n")
    assert done.stdout.startswith(f"usage: colqwen3 {name}".rstrip())
    assert ("example:\n  colqwen3" in done.stdout) == bool(name)


def test_inspect_imports_no_torch() -> None:
    done = run_command("inspect", GOLDEN, code=IMPORTED)
    assert (done.returncode, done.stderr) == (0, "[]\n")
    assert '"quantizable"' in done.stdout


def test_verify_imports_no_torch(tmp_path: Path) -> None:
    (tmp_path / "quantization_metadata.json").write_text('{"files": {}, "tensors": {}}')
    done = run_command("verify", tmp_path, code=IMPORTED)
    assert done.returncode == 1
    assert "is not what was released" in done.stderr
    assert done.stderr.endswith("\n[]\n")


def test_no_subcommand_and_an_unknown_one_are_refused() -> None:
    for words in ([], ["quantize"]):
        done = run_command(*words)
        assert done.returncode == 2
        assert "usage: colqwen3" in done.stderr
        assert "Traceback" not in done.stderr
