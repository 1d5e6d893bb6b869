"""A hostile model folder runs nothing and writes nowhere, unless its code is trusted in so many words."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from tests.helpers.cli import error_line, run_command
from tests.helpers.command import fork_stage
from tests.helpers.work import make_work, write_params

STAGES = (
    ["inspect_model"], ["calibrate"], ["allocate"], ["quantize", "rtn"], ["embed", "original"],
    ["embed", "rtn"],
)  # fmt: skip
AUTO_MAP = {
    "AutoConfig": "evil.ColQwen3Config",
    "AutoModel": "evil.ColQwen3",
    "AutoProcessor": "evil.ColQwen3Processor",
    "AutoImageProcessor": "evil.ImageProcessor",
}


class Bomb:
    """A pickle that writes a file as soon as it is read."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (self.canary,)  # type: ignore[return-value]


def edit(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A working folder whose model carries all that could run: code, pickles, a template."""
    folder = make_work(tmp_path / "work")
    canary, model = tmp_path / "canary", folder / "model"
    evil = f"open({str(canary)!r}, 'w').close()\nfrom transformers import Qwen2Tokenizer as Tok\n"
    for name in ("evil", "configuration_colqwen3", "modeling_colqwen3", "processing_colqwen3",
                 "tokenization_tok", "setup", "__init__", "sitecustomize"):  # fmt: skip
        (model / f"{name}.py").write_text(evil)
    template = (
        "{{ cycler.__init__.__globals__.os.system('touch CANARY') }}"
        "{% for c in ''.__class__.__mro__[1].__subclasses__() %}{{ c }}{% endfor %}"
    ).replace("CANARY", str(canary))
    for name in ("config", "preprocessor_config", "processor_config"):
        edit(model / f"{name}.json", auto_map=AUTO_MAP)
    edit(model / "tokenizer_config.json", chat_template=template)
    (model / "chat_template.jinja").write_text(template)
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "model.pth"):
        (model / name).write_bytes(pickle.dumps(Bomb(canary)))
    return folder


def outside(work: Path) -> set[str]:
    """Return the files beside the working folder, logs of the stages left out."""
    return {
        str(path)
        for path in work.parent.rglob("*")
        if work not in path.parents and path.suffix not in (".out", ".err")
    }


def test_nothing_of_a_hostile_folder_runs(work: Path) -> None:
    before = outside(work)
    for words in STAGES:
        done = fork_stage(work, words)
        assert done.code == 0, done.err
        assert "trust_remote_code" not in done.err
        assert outside(work) == before
    result = work / "artifacts/checkpoints/rtn"
    assert not list(result.glob("*.py"))
    assert not [path for path in result.glob("*.json") if "auto_map" in path.read_text()]
    assert {path.suffix for path in result.iterdir()} <= {".json", ".jinja", ".safetensors", ".txt"}
    manifest = json.loads((work / "artifacts/manifest.json").read_text())
    assert manifest["trust_remote_code"] is False


EMBED = ("embed", "--model", "model", "--queries", "data/queries.jsonl", "--out", "out.safetensors")


def test_code_of_a_tokenizer_runs_only_when_it_is_trusted(work: Path) -> None:
    """And then it does run: the canary above would have shown it."""
    before = outside(work)
    tokenizer = {"AutoTokenizer": ["evil.Tok", None]}
    edit(work / "model/tokenizer_config.json", auto_map=tokenizer, tokenizer_class="Tok")
    assert "only with trust_remote_code" in error_line(run_command(*EMBED, cwd=work))
    assert outside(work) == before
    done = run_command(*EMBED, "--trust-remote-code", cwd=work)
    assert done.returncode == 0, done.stderr
    assert "trust_remote_code is set: Python files of model may run" in done.stderr
    assert outside(work) == before | {str(work.parent / "canary")}


@pytest.mark.parametrize("trusted", [False, True])
@pytest.mark.parametrize("file", ["tokenizer_config.json", "config.json"])
def test_a_tokenizer_with_code_is_not_quantized(work: Path, file: str, trusted: bool) -> None:
    """A quantized folder carries no code, so it would tokenize otherwise than the original."""
    before = outside(work)
    params = YAML(typ="safe").load(work / "params.yaml")
    params["model"]["trust_remote_code"] = trusted
    write_params(work, params)
    assert fork_stage(work, ["inspect_model"]).code == 0
    manifest = json.loads((work / "artifacts/manifest.json").read_text())
    assert manifest["trust_remote_code"] is trusted
    auto_map = {**AUTO_MAP, "AutoTokenizer": ["evil.Tok", None]}
    edit(work / "model" / file, auto_map=auto_map, tokenizer_class="Tok")
    for stage in ("check", "inspect_model"):
        done = fork_stage(work, [stage])
        assert done.code == 1
        assert len(done.errors) == 1
        assert f"model/{file}: auto_map names code of the model's own" in done.errors[0]
    assert "auto_map names code" in error_line(run_command("inspect", "model", cwd=work))
    assert outside(work) == before


@pytest.mark.parametrize("place", ["../stolen.safetensors", "{absolute}"])
def test_an_index_reads_nothing_outside(work: Path, place: str) -> None:
    model = work / "model"
    stolen = work / "stolen.safetensors"
    index = json.loads((model / "model.safetensors.index.json").read_text())
    shard = min(index["weight_map"].values())
    shutil.move(model / shard, stolen)
    name = place.replace("{absolute}", str(stolen))
    index["weight_map"] = {
        tensor: name if file == shard else file for tensor, file in index["weight_map"].items()
    }
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    before, data = outside(work), stolen.read_bytes()
    problem = "which is not a file of the folder; fix the index"
    done = fork_stage(work, STAGES[0])
    assert done.code == 1
    assert len(done.errors) == 1
    assert problem in done.errors[0]
    for command in ("inspect", "embed"):
        words = (
            ["model"] if command == "inspect" else ["--model", "model", "--pages", "data/corpus"]
        )
        words += ["--out", "out.safetensors"] if command == "embed" else []
        assert problem in error_line(run_command(command, *words, cwd=work))
    assert outside(work) == before
    assert stolen.read_bytes() == data
    assert not (work / "out.safetensors").exists()
