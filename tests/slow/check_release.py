"""Check a released folder in clean virtual environments, one for each supported transformers line.

    PYTHONPATH=. python tests/slow/check_release.py artifacts/release/w4g128 [--versions 4.57.6 5.24.0]

Each environment holds transformers, torch and pillow, the library that owns the folder's format,
and what they bring. There `probe_release.py` embeds queries and pages from the folder; here this project's own
loaders do the same. It fails when a token differs by more than `LEAST` in cosine. It takes
minutes and a package index, so it is no part of the tests; they do the same with the transformers that
is installed.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file

from colqwen3.release.provenance import METADATA
from tests.slow.engines import environment, outside

TESTS = Path(__file__).parents[1]
PROBE = TESTS / "helpers" / "probe_release.py"
INPUTS = TESTS / "golden" / "inputs"
VERSIONS = ("4.57.6", "5.24.0")
PACKAGES = ("pillow==13.0.0",)
OWNERS = {
    "auto_round": ("torch==2.13.0", "auto-round==0.16.1"),
    "auto_gptq": ("torch==2.14.1", "optimum==2.3.0", "gptqmodel==7.7.0", "accelerate"),
    "llm_compressor": ("torch==2.13.0", "compressed-tensors==0.20.0", "accelerate"),
}
"""Format of the weights -> the packages that read it."""
LEAST = 0.99999

Vectors = dict[str, torch.Tensor]


def own_embeddings(folder: Path, inputs: Path, packed: bool) -> Vectors:
    """Return what this project's loader makes of the same inputs: packed kernel, or dense weights."""
    from colqwen3.embedding.batches import embed
    from colqwen3.model.loading import load_model, load_processor
    from tests.helpers.packed import load_packed

    load = load_packed if packed else load_model
    model = load(folder, torch.float32, torch.device("cpu"))
    processor = load_processor(folder, 1280)
    queries = json.loads((inputs / "queries.json").read_text(encoding="utf-8"))
    result = {f"query/{key}": processor.process_texts([text]) for key, text in queries.items()}
    for path in sorted((inputs / "pages").glob("*.png")):
        result[f"page/{path.stem}"] = processor.process_images([Image.open(path)])
    return {key: embed(model, each)[0] for key, each in result.items()}


def worst_cosine(actual: Vectors, expected: Vectors) -> float:
    """Return the smallest cosine of a token; 0 when an item or a token is missing."""
    if actual.keys() != expected.keys():
        return 0.0
    worst = 1.0
    for key, vectors in expected.items():
        if actual[key].shape != vectors.shape:
            return 0.0
        cosines = torch.nn.functional.cosine_similarity(actual[key].double(), vectors.double())
        worst = min(worst, float(cosines.min()))
    return worst


def probe(
    python: Path, folder: Path, inputs: Path, work: Path, *dtype: str
) -> tuple[dict[str, Any], Vectors]:
    """Run the probe in another process, from which nothing of this project can be imported."""
    out = work / "probe.safetensors"
    command = [
        str(python),
        str(PROBE),
        str(folder.resolve()),
        str(inputs.resolve()),
        str(out),
        *dtype,
    ]
    with tempfile.TemporaryDirectory() as elsewhere:
        # -P: not even the probe's own folder
        command.insert(1, "-P")
        done = subprocess.run(
            command, cwd=elsewhere, env=outside(work), capture_output=True, text=True
        )
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.strip().splitlines()[-1]), load_file(out)


def make_environment(folder: Path, version: str, owners: Iterable[str]) -> Path:
    """Return the interpreter of an environment with one version of transformers."""
    return environment(folder, f"transformers=={version}", *PACKAGES, *owners)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="PYTHONPATH=. python tests/slow/check_release.py", description=__doc__
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--versions", nargs="+", default=VERSIONS)
    parser.add_argument("--environments", type=Path, help="keep them here, and use what is there")
    parser.add_argument(
        "--reference",
        type=Path,
        help="checkpoint of the recipe, for formats that our own loaders do not read",
    )
    args = parser.parse_args()
    kind = json.loads((args.folder / METADATA).read_text(encoding="utf-8"))["format"]
    if kind not in OWNERS:
        print(f"{args.folder}: format {kind} is checked by tests/colqwen3/gguf")
        return
    reference = args.reference or args.folder
    expected = {
        "packed": own_embeddings(reference, INPUTS, packed=True),
        "dense": own_embeddings(reference, INPUTS, packed=False),
    }
    failed = False
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        for version in args.versions:
            # absolute, since it is run in another folder
            home = (args.environments or work).absolute() / f"transformers-{version}-{kind}"
            python = make_environment(home, version, OWNERS[kind])
            # other formats' libraries take the config's bfloat16, whose own noise is 0.0006
            dtype = () if kind == "auto_round" else ("float32",)
            facts, actual = probe(python, args.folder, INPUTS, work, *dtype)
            worst = {key: worst_cosine(actual, each) for key, each in expected.items()}
            tokens = sum(len(vectors) for vectors in actual.values())
            print(f"{facts}: {tokens} tokens, least cosine to our own loaders {worst}", flush=True)
            failed |= min(worst.values()) < LEAST
    sys.exit(failed)


if __name__ == "__main__":
    main()
