"""A working folder of small, sound input on the golden model, and its results."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from PIL import Image
from ruamel.yaml import YAML

GOLDEN = Path("tests/golden/model")
RECIPES = {
    "rtn": {"method": "rtn", "calibration": "none", "bits": 4, "group_size": 128, "sym": True},
    "tuned": {
        "method": "autoround", "calibration": "some", "bits": 4, "group_size": 128, "sym": True,
        "iters": 3, "lr": 0.005, "seed": 1,
    },
}  # fmt: skip


def make_work(folder: Path) -> Path:
    """Write model, data and params.yaml into a new folder."""
    shutil.copytree(GOLDEN, folder / "model")
    (folder / "data/corpus").mkdir(parents=True)
    for number in range(2):
        page = Image.linear_gradient("L").resize((64 + 32 * number, 96))
        page.save(folder / f"data/corpus/p{number}.png")
    write_queries(folder, {"q0": "total of the year", "q1": "costs by region"})
    (folder / "data/qrels.tsv").write_text("query-id\tcorpus-id\tscore\nq0\tp0\t1\nq1\tp1\t1\n")
    params = YAML(typ="safe").load(Path("params.yaml"))
    params["model"].update(source="model", max_num_visual_tokens=64)
    params["calibration"].update(
        dataset="data", sets={"some": {"queries": 1, "pages": 1, "passages": 0}}
    )
    params["recipes"] = RECIPES
    params["sensitivity"]["calibration"] = "none"
    params["evaluate"]["dataset"] = "data"
    params["gate"] = dict.fromkeys(params["gate"])
    params |= {"release": {}, "fallbacks": {}}
    write_params(folder, params)
    return folder


def write_params(folder: Path, params: dict[str, Any]) -> None:
    with (folder / "params.yaml").open("w") as file:
        YAML(typ="safe").dump(params, file)


def write_queries(folder: Path, texts: dict[str, str]) -> None:
    lines = [json.dumps({"_id": name, "text": text}) for name, text in texts.items()]
    (folder / "data/queries.jsonl").write_text("\n".join(lines) + "\n")


def results(folder: Path) -> dict[str, str]:
    """Return a digest of every file that is a result: no lock, and no unfinished work."""
    beside = ("ballast", "locks", "scratch")
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for root in ("artifacts", "metrics")
        for path in (folder / root).rglob("*")
        if path.is_file() and path.relative_to(folder).parts[1] not in beside
    }
