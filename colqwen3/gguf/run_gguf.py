"""Embed queries and pages with the text.gguf and mmproj.gguf beside this file; rank pages by MaxSim.

    pip install numpy pillow xllamacpp==2026.10.11549
    python run_gguf.py --queries "total of the invoice" --pages scans/*.png --out vectors.npz
    python run_gguf.py --queries "total of the invoice" --index vectors.npz

An index may also be what `colqwen3 embed` wrote. llama.cpp computes the last hidden states;
projection, normalization and MaxSim are done here. Licence: Apache-2.0.
"""

import argparse
import ctypes
import json
import math
import os
import sys
import unicodedata
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

XLLAMACPP = "2026.10.11549"  # its C interface, used here, changes from release to release
AUGMENTATION_TOKENS, MAXIMUM_RATIO, BATCH = 10, 200, 512
BEFORE, AFTER = b"<|im_start|>user\n", b"Describe the image.<|im_end|><|endoftext|>"
UNSET = 0xFFFFFFFF
DEFAULTS = {
    "llama_model_default_params": {4: UNSET, 5: 1, 6: UNSET, 7: 1, 18: 0x10000},
    "llama_context_default_params": {0: 512, 1: 2048, 2: 512, 7: 4, 8: 4, 11: UNSET, 34: 0x1010100},
    "mtmd_context_params_default": {0: 1, 4: 1, 5: 4, 11: 1, 12: UNSET, 13: UNSET, 18: 1024},
}
"""Function -> 32-bit words of the structure that it returns: if they differ, so does the layout."""
HANDLES = """llama_model_load_from_file llama_init_from_model llama_model_get_vocab llama_get_memory
    llama_get_embeddings mtmd_init_from_file mtmd_default_marker mtmd_bitmap_init
    mtmd_input_chunks_init mtmd_input_chunks_get mtmd_input_chunk_get_tokens_text
    mtmd_get_output_embd gguf_init_from_file""".split()
SIZES = """mtmd_input_chunks_size mtmd_input_chunk_get_n_tokens gguf_find_key gguf_find_tensor
    gguf_get_data_offset gguf_get_tensor_offset gguf_get_tensor_size""".split()
Array = np.ndarray[Any, Any]
Handle = type("Handle", (ctypes.c_void_p,), {})  # comes back from a call as itself, not as a number


def structure(*kinds: Any) -> Any:
    """Return a C structure with fields of these types."""
    fields = [(f"field{number}", kind) for number, kind in enumerate(kinds)]
    return type("Structure", (ctypes.Structure,), {"_fields_": fields})


PARAMS = structure(ctypes.c_uint32 * 64)  # larger than any; the library reads its beginning
PROMPT = structure(ctypes.c_char_p, ctypes.c_size_t, ctypes.c_bool, ctypes.c_bool)
BATCH_OF_TOKENS = structure(ctypes.c_int32, *[ctypes.c_void_p] * 6)
FILE_PARAMS = structure(ctypes.c_bool, ctypes.c_void_p)
ON_DECODED = ctypes.CFUNCTYPE(ctypes.c_int32)  # its arguments are not needed
ON_LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)


@ON_LOG
def log(level: int, text: bytes, _: Any) -> None:
    """Show errors of llama.cpp, and nothing else."""
    if level == 4:
        sys.stderr.write(text.decode(errors="replace"))


def load_library() -> Any:
    """Return llama.cpp's C interface, after checking that it is the one this program knows."""
    try:
        version = metadata.version("xllamacpp")
    except metadata.PackageNotFoundError:
        version = "missing"
    if version != XLLAMACPP:
        sys.exit(f"error: xllamacpp is {version}; run `pip install xllamacpp=={XLLAMACPP}`")
    from xllamacpp import xllamacpp

    lib = ctypes.CDLL(xllamacpp.__file__)
    kinds = {**dict.fromkeys(HANDLES, Handle), **dict.fromkeys(SIZES, ctypes.c_int64)}
    for name, kind in {**kinds, **dict.fromkeys(DEFAULTS, PARAMS)}.items():
        getattr(lib, name).restype = kind
    for name, words in DEFAULTS.items():
        if {place: getattr(lib, name)().field0[place] for place in words} != words:
            sys.exit(f"error: {name} has an unknown layout; reinstall xllamacpp=={XLLAMACPP}")
    lib.llama_log_set(log, None)
    lib.mtmd_helper_log_set(log, None)
    return lib


def to_rgb(image: Image.Image) -> Image.Image:
    """Return a page as a viewer shows it: upright, 8-bit, transparency on white paper."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow would clip
        image = image.convert("I").point([value >> 8 for value in range(1 << 16)], "L")
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    paper = Image.new("RGB", image.size, "white")
    paper.paste(image.convert("RGB"), mask=image.getchannel("A"))
    return paper


class Embedder:
    """The model of one folder; vectors are float32 [tokens, embed_dim], of length 1."""

    def __init__(self, folder: Path = Path(__file__).parent, threads: int = os.cpu_count() or 1):
        self.lib = lib = load_library()
        text, vision = (os.fsencode(folder / name) for name in ("text.gguf", "mmproj.gguf"))
        file = lib.gguf_init_from_file(vision, FILE_PARAMS(True, None))
        model = lib.llama_model_load_from_file(text, lib.llama_model_default_params())
        if not (file and model):
            sys.exit(f"error: {folder}: llama.cpp cannot load text.gguf or mmproj.gguf")
        width, self.smallest, self.largest, self.side = (
            lib.gguf_get_val_u32(file, ctypes.c_int64(lib.gguf_find_key(file, b"colqwen3." + key)))
            for key in (b"embed_dim", b"min_pixels", b"max_pixels", b"side")
        )
        arrays = []
        for name in (b"colqwen3.proj.weight", b"colqwen3.proj.bias"):
            tensor = ctypes.c_int64(lib.gguf_find_tensor(file, name))
            start = lib.gguf_get_data_offset(file) + lib.gguf_get_tensor_offset(file, tensor)
            count = lib.gguf_get_tensor_size(file, tensor) // 4
            arrays.append(np.fromfile(os.fsdecode(vision), "<f4", count, offset=start))
        self.weight, self.bias = arrays[0].reshape(width, -1), arrays[1]
        self.visual_tokens = self.largest // self.side**2
        params, words = lib.llama_context_default_params(), {7: threads, 8: threads}
        words |= {0: self.visual_tokens + 16, 1: BATCH, 2: BATCH}  # length, logical, physical batch
        for place, value in {**words, 11: 0, 34: 0x1010101}.items():  # no pooling; embeddings
            params.field0[place] = value
        self.context = lib.llama_init_from_model(model, params)
        params = lib.mtmd_context_params_default()
        # no timings, threads, no warm-up, limits of visual tokens
        for place, value in {4: 0, 5: threads, 11: 0, 12: 1, 13: self.visual_tokens}.items():
            params.field0[place] = value
        self.vision = lib.mtmd_init_from_file(vision, model, params)
        if not (self.context and self.vision):
            sys.exit(f"error: {folder}: llama.cpp cannot run text.gguf or mmproj.gguf")
        self.vocab = lib.llama_model_get_vocab(model)

    def tokenize(self, text: str) -> list[int]:
        """Return the ids of a query; what looks like a special token in it is text."""
        data = unicodedata.normalize("NFC", text.strip()).encode()
        ids = (ctypes.c_int32 * (len(data) + 1))()
        count = self.lib.llama_tokenize(self.vocab, data, len(data), ids, len(ids), False, False)
        return ids[:count] + [self.lib.llama_vocab_pad(self.vocab)] * AUGMENTATION_TOKENS

    def embed_query(self, text: str) -> Array:
        """Return the vectors of a query."""
        self._forget()
        return self._project(self._decode(self.tokenize(text), 0))

    def embed_page(self, image: Image.Image) -> Array:
        """Return the vectors of a page, which llama.cpp gets in a size that it need not change."""
        lib, page, rows = self.lib, to_rgb(image), list[Array]()
        page = page.resize(self._size(*page.size), Image.Resampling.BICUBIC)
        bitmap = lib.mtmd_bitmap_init(page.width, page.height, page.tobytes())
        text = BEFORE + ctypes.string_at(lib.mtmd_default_marker()) + AFTER
        chunks, position = lib.mtmd_input_chunks_init(), ctypes.c_int32(0)
        prompt, images = PROMPT(text, len(text), False, True), ctypes.byref(bitmap)
        arguments = (self.vision, chunks, ctypes.byref(prompt), images, ctypes.c_size_t(1))
        failed, expected = lib.mtmd_tokenize(*arguments), page.width * page.height // self.side**2
        collect = ON_DECODED(
            lambda: rows.append(self._rows(expected - sum(map(len, rows[1:])))) or 0
        )
        self._forget()
        for number in range(0 if failed else lib.mtmd_input_chunks_size(chunks)):
            chunk = lib.mtmd_input_chunks_get(chunks, ctypes.c_size_t(number))
            count = ctypes.c_size_t(lib.mtmd_input_chunk_get_n_tokens(chunk))
            if lib.mtmd_input_chunk_get_type(chunk) == 0:  # text
                ids = lib.mtmd_input_chunk_get_tokens_text(chunk, ctypes.byref(count))
                listed = (ctypes.c_int32 * count.value).from_address(ids.value)[:]
                rows += self._decode(listed, position.value)
                position.value += count.value
                continue
            failed = count.value != expected or lib.mtmd_encode_chunk(self.vision, chunk)
            start = (self.vision, self.context, chunk, lib.mtmd_get_output_embd(self.vision))
            end = (position, 0, BATCH, ctypes.byref(position), collect, None)
            if failed := failed or lib.mtmd_helper_decode_image_chunk(*start, *end):
                break
        lib.mtmd_input_chunks_free(chunks)
        lib.mtmd_bitmap_free(bitmap)
        if failed:
            raise RuntimeError("llama.cpp cannot embed the page; see its messages above")
        return self._project(rows)

    def _size(self, width: int, height: int) -> tuple[int, int]:
        """Return the size to which a page is resized, as Qwen2-VL's image processor does."""
        short, long = sorted((width, height))
        if short == 0 or long > MAXIMUM_RATIO * short:
            raise ValueError(f"the page is {width} x {height}: empty, or too long for its width")
        side, sizes = self.side, (width, height)
        grid = [round(size / side) * side for size in sizes]
        if math.prod(grid) > self.largest:
            beta = math.sqrt(width * height / self.largest)
            grid = [max(side, math.floor(size / beta / side) * side) for size in sizes]
        elif math.prod(grid) < self.smallest:
            beta = math.sqrt(self.smallest / (width * height))
            grid = [math.ceil(size * beta / side) * side for size in sizes]
        return grid[0], grid[1]

    def _forget(self) -> None:
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)

    def _decode(self, ids: list[int], start: int) -> list[Array]:
        """Return the last hidden states of text tokens that stand at `start` and after."""
        rows = []
        for first in range(0, len(ids), BATCH):
            tokens = np.array(ids[first : first + BATCH], np.int32)
            places = np.arange(start + first, start + first + len(tokens), dtype=np.int32)
            arrays = (tokens.ctypes.data, None, places.ctypes.data, None, None, None)
            if self.lib.llama_decode(self.context, BATCH_OF_TOKENS(len(tokens), *arrays)):
                raise RuntimeError("llama.cpp cannot embed the text; it may be too long")
            rows.append(self._rows(len(tokens)))
        return rows

    def _rows(self, left: int) -> Array:
        """Return the last hidden states of what was decoded last, the first of `left` tokens."""
        shape = min(left, BATCH), self.weight.shape[1]
        states = self.lib.llama_get_embeddings(self.context)
        size = (ctypes.c_float * math.prod(shape)).from_address(states.value)
        return np.array(size, np.float32).reshape(shape)

    def _project(self, rows: list[Array]) -> Array:
        vectors = np.concatenate(rows) @ self.weight.T + self.bias
        return np.asarray(vectors / np.linalg.norm(vectors, axis=-1, keepdims=True))


def read_vectors(path: Path) -> dict[str, Array]:
    """Return the vectors of an .npz file, or of the .safetensors file of `colqwen3 embed`."""
    if path.suffix == ".npz":
        with np.load(path) as stored:
            return dict(stored)
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header.pop("__metadata__", None)
    return {
        name: np.frombuffer(data[start:], "<f4", math.prod(entry["shape"]), entry["data_offsets"][0])
        .reshape(entry["shape"])
        for name, entry in header.items()
    }  # fmt: skip


def main() -> None:
    """Embed what the command line names, and print the best pages of each query."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--queries", nargs="*", default=[], metavar="TEXT")
    parser.add_argument("--pages", nargs="*", default=[], type=Path, metavar="IMAGE")
    parser.add_argument("--index", type=Path, metavar="FILE", help="vectors of pages")
    parser.add_argument("--out", type=Path, metavar="FILE.npz", help="keep all vectors here")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args()
    embedder = Embedder(threads=args.threads)
    vectors = read_vectors(args.index) if args.index else {}
    for path in args.pages:
        with Image.open(path) as image:
            vectors[f"page/{path.stem}"] = embedder.embed_page(image)
    for number, text in enumerate(args.queries):
        query = vectors[f"query/{number}"] = embedder.embed_query(text)
        scores = {
            name.removeprefix("page/"): float((query @ page.T).max(-1).sum())  # MaxSim
            for name, page in vectors.items()
            if name.startswith("page/")
        }
        print(text)
        for name in sorted(scores, key=lambda name: -scores[name])[:10]:
            print(f"{scores[name]:9.4f}  {name}")
    if args.out:
        np.savez(args.out, **vectors)


if __name__ == "__main__":
    main()
