"""humming's 4-bit product with a gate at its end: it stores half as much, and no kernel reads that again.

The product of gate and up of a decoder layer is its largest tensor. Where its outputs alternate as
`fused.gate` takes them, each thread of the product holds both factors of what the gate gives.
"""

import json
from pathlib import Path
from typing import Any, ClassVar

from humming.kernel.humming import HummingKernel

SOURCE = Path(__file__).with_suffix(".cu").read_text(encoding="utf-8")
COLUMNS = "OUTPUT_TILE_COLUMNS = SharedStorageType::kOutputTileColumns"
"""Of humming's source: outputs that are stored at once."""


class GatedKernel(HummingKernel):  # type: ignore[misc]
    """humming's kernel with the end of `humming_gate.cu`.

    What it is started by takes the outputs that are missing for padding. Where tiles are split, it needs
    memory for their sums, which that file says how to give.
    """

    _str2kernel_cache: ClassVar[dict[Any, Any]] = {}
    code: str

    def prepare(self) -> None:
        """Compile it, or find it compiled."""
        if self.code.count(COLUMNS) != 1:
            raise RuntimeError("this version of humming has another source")
        self.code = self.code.replace(COLUMNS, f"{COLUMNS} / 2") + SOURCE
        super().prepare()


def gated_config(config: str) -> str:
    """Return humming's configuration of a layer whose product has a gate at its end."""
    values = json.loads(config)
    return json.dumps({**values, "pad_shape_n": values["shape_n"] // 2})
