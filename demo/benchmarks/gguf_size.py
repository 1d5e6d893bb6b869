"""What GGUF costs at true size: memory and bytes of a conversion, and memory of a query in llama.cpp.

The checkpoint has the shapes of a 4B model in 4 bits and zeros for weights: it finds nothing, and
its bytes and memory are those of a real one. `python -m demo.benchmarks.gguf_size` writes
metrics/gguf/true_size.json.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from colqwen3.checkpoint import layout
from colqwen3.checkpoint.headers import Spec
from colqwen3.checkpoint.packing import pack
from colqwen3.checkpoint.tensor_file import TensorFile
from colqwen3.gguf.layout import expected_gguf_bytes
from colqwen3.system.errors import UserError, run
from colqwen3.system.files import read_json, write_json
from demo.benchmarks.measure import RESULT, Usage, installed, machine, run_measured
from demo.benchmarks.true_size import DEMO, PRESETS, preset_config, with_demo_tokens

BITS, GROUP_SIZE = 4, 128
COLUMNS = 32 // BITS  # codes in one int32
SCALE = 0.01
QUERIES = ("warm up", "total of the invoice for the year")
"""What the last child embeds; the second is timed."""


def write_checkpoint(folder: Path, config: dict[str, Any]) -> None:
    """Write a 4-bit checkpoint of zeros for a config, with the tokenizer and processor of the demo.

    Each linear has codes that stand for zero and one scale for all groups.
    """
    shutil.copytree(DEMO, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    packing = {
        "bits": BITS, "group_size": GROUP_SIZE, "sym": True, "data_type": "int",
        "quant_method": "auto-round", "packing_format": "auto_round:auto_gptq",
    }  # fmt: skip
    write_json(folder / "config.json", {**config, "quantization_config": packing})
    linears = layout.linears(config)
    specs: dict[str, Spec] = {}
    for name, shape in layout.tensors(config).items():
        module = name.removesuffix(".weight")
        if module not in linears:
            specs[name] = ("BF16", shape)
            continue
        rows, columns = shape
        groups = columns // GROUP_SIZE
        specs[f"{module}.qweight"] = ("I32", (columns // COLUMNS, rows))
        specs[f"{module}.qzeros"] = ("I32", (groups, rows // COLUMNS))
        specs[f"{module}.scales"] = ("F16", (groups, rows))
    with TensorFile(folder / "model.safetensors", specs) as file:
        for module, (rows, columns) in linears.items():
            scales = torch.full((rows, columns // GROUP_SIZE), SCALE, dtype=torch.float16)
            packed = pack(torch.zeros(rows, columns, dtype=torch.int8), scales, BITS)
            for part in ("qweight", "qzeros", "scales"):
                file.write(f"{module}.{part}", packed[part])


def embed_queries(folder: Path) -> None:
    """Embed queries by the files of a folder, and print processor seconds of the last one."""
    from colqwen3.gguf.run_gguf import Embedder

    embedder = Embedder(folder, threads=1)
    for query in QUERIES:
        start = time.process_time()
        embedder.embed_query(query)
        seconds = time.process_time() - start
    print(RESULT + json.dumps({"seconds_per_query": round(seconds, 2)}))


def describe(usage: Usage) -> dict[str, Any]:
    """Return what a child took; a child that failed ends the benchmark.

    Raises
    ------
    UserError
        If the child's exit status is not 0; with the end of its output.
    """
    if usage.status:
        raise UserError(f"a step failed: {usage.output[-1000:]}")
    return {
        "seconds": round(usage.seconds, 1),
        "peak_own_bytes": usage.peak_own_bytes,
        "peak_resident_bytes": usage.peak_resident_bytes,
        **usage.result,
    }


def main() -> None:
    """Write a checkpoint, convert it and embed queries, each in a process of its own."""
    parser = argparse.ArgumentParser(
        prog="python -m demo.benchmarks.gguf_size", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--preset", choices=sorted(PRESETS), default="4b")
    parser.add_argument("--config", type=Path, help="a config.json to use instead")
    parser.add_argument("--out", type=Path, default=Path("metrics/gguf/true_size.json"))
    parser.add_argument("--embed", type=Path, help=argparse.SUPPRESS)  # the last child
    args = parser.parse_args()
    if args.embed:
        embed_queries(args.embed)
        return
    config = preset_config(args.preset)
    if args.config:
        config = read_json(args.config, "name another")
    config = with_demo_tokens(config, args.config or DEMO / "config.json")
    described = machine(False)
    described["versions"] |= {name: installed(name) for name in ("gguf", "xllamacpp")}
    with tempfile.TemporaryDirectory() as temporary:
        source, out = Path(temporary) / "model", Path(temporary) / "gguf"
        write_checkpoint(source, config)
        log = Path(temporary) / "log"
        steps: dict[str, list[str | Path]] = {
            "convert": ["colqwen3", "export-gguf", source, "--out", out],
            "queries": ["demo.benchmarks.gguf_size", "--embed", out],
        }
        usages = {
            name: describe(run_measured([sys.executable, "-m", *words], Path.cwd(), log))
            for name, words in steps.items()
        }
        results = {
            "command": " ".join(["python -m demo.benchmarks.gguf_size", *sys.argv[1:]]),
            "weights": f"zeros, shapes of {args.config or args.preset}, {BITS} bits",
            "machine": described,
            "bytes": {path.name: path.stat().st_size for path in sorted(out.glob("*.gguf"))},
            "expected_tensor_bytes": expected_gguf_bytes(config)[f"w{BITS}"],
            **usages,
        }
    write_json(args.out, results)
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    run(main)
