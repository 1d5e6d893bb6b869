"""The embeddings file: one tensor [tokens, embed_dim] per query or page, in safetensors."""

import contextlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from colqwen3.checkpoint.headers import Spec, read_header
from colqwen3.checkpoint.tensor_file import StoredTensors, TensorFile
from colqwen3.system.errors import UserError, disk_is_full

KINDS = {"queries": "query", "pages": "page"}
# safetensors writes several metadata keys in an order that changes from run to run; one key keeps
# the bytes deterministic
ORDER = "order"
STORED = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
"""Types of the numbers, and their names in the file."""


@dataclass(frozen=True)
class Embeddings:
    """Token embeddings [tokens, embed_dim] by query ``_id`` and by page stem, in input order."""

    queries: Mapping[str, torch.Tensor]
    pages: Mapping[str, torch.Tensor]
    activations: str | None = None
    """What the serving runtime made them with, where they are to show what it serves."""


def write_embeddings(
    path: Path,
    queries: Mapping[str, torch.Tensor],
    pages: Mapping[str, torch.Tensor],
    *,
    dtype: torch.dtype = torch.float32,
    activations: str | None = None,
) -> None:
    """Write embeddings under ``query/<_id>`` and ``page/<stem>``, all as `dtype`, by rename.

    safetensors sorts its entries, so the input order is stored in the metadata: key ``order``, JSON
    of the lists ``queries`` and ``pages``, and ``activations`` if given. Equal input gives equal bytes. Items are read
    twice, and one at a time: a mapping that reads them from disk needs no memory.

    Raises
    ------
    ValueError
        If a tensor is not [tokens, embed_dim] with at least one token.
    UserError
        If the file cannot be written.
    """
    specs: dict[str, Spec] = {}
    for kind, items in (("query", queries), ("page", pages)):
        for name in items:
            shape = tuple(items[name].shape)
            if len(shape) != 2 or 0 in shape:
                raise ValueError(f"{kind}/{name}: {list(shape)} is not [tokens, embed_dim]")
            specs[f"{kind}/{name}"] = (STORED[dtype], shape)
    served = {"activations": activations} if activations else {}
    order = json.dumps({"queries": list(queries), "pages": list(pages), **served})
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with TensorFile(partial, specs, {ORDER: order}) as file:
            for kind, items in (("query", queries), ("page", pages)):
                for name in items:
                    file.write(f"{kind}/{name}", items[name].detach().to(dtype))
        os.replace(partial, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        if disk_is_full(error):
            raise
        raise UserError(f"{path}: cannot be written ({error}); correct the path") from None


def open_embeddings(path: Path) -> Embeddings:
    """Open a file of `write_embeddings`; each item is read when it is asked for.

    Raises
    ------
    UserError
        If the file is missing, damaged, or not of this kind.
    """
    fix = "embed again"
    try:
        with safe_open(path, framework="pt") as file:
            order = json.loads((file.metadata() or {})[ORDER])
        stored = read_header(path)
        names = {kind: [(name, f"{prefix}/{name}") for name in order[kind]]
                 for kind, prefix in KINDS.items()}  # fmt: skip
        activations = order.get("activations")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read ({error}); {fix}") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{path}: lacks the order of its items; {fix}") from None
    keys = {key for kind in names.values() for _, key in kind}
    if missing := sorted(keys - stored.keys()):
        raise UserError(f"{path}: cannot be read (there is no {missing[0]}); {fix}")
    if keys != stored.keys():
        raise UserError(f"{path}: contains tensors that its order does not name; {fix}")
    kinds = {tensor.dtype for tensor in stored.values()}
    shapes = [tensor.shape for tensor in stored.values()]
    if len(kinds) > 1 or kinds - set(STORED.values()) or any(len(x) != 2 or 0 in x for x in shapes):
        raise UserError(
            f"{path}: its tensors are not all [tokens, embed_dim] in float32, float16 or bfloat16; "
            f"{fix}"
        )
    return Embeddings(
        **{
            kind: StoredTensors(path.parent, {name: stored[key] for name, key in pairs})
            for kind, pairs in names.items()
        },
        activations=activations,
    )


def read_embeddings(path: Path) -> Embeddings:
    """Read a whole file of `write_embeddings` into memory, items in their input order.

    Raises
    ------
    UserError
        As for `open_embeddings`.
    """
    opened = open_embeddings(path)
    return Embeddings(dict(opened.queries), dict(opened.pages))
