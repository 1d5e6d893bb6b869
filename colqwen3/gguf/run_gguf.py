"""Embed queries and pages with the text.gguf and mmproj.gguf beside this file; rank pages by MaxSim.

    pip install numpy pillow xllamacpp==2026.10.11549
    python run_gguf.py --pages scans/*.png --out vectors.npz
    python run_gguf.py --index vectors.npz --queries "total of the invoice" "garden club"

llama.cpp computes the last hidden states; the rest is done here. Licence: Apache-2.0.
"""

import argparse
import ctypes
import math
import os
import sys
import unicodedata
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import xllamacpp
from PIL import Image, ImageOps

XLLAMACPP = "2026.10.11549"  # its C interface, used here, changes from release to release
AUGMENTATION_TOKENS, MAXIMUM_RATIO, BATCH, UNSET = 10, 200, 512, 0xFFFFFFFF
BEFORE = "<|im_start|>user\n<|vision_start|>"
AFTER = "<|vision_end|>Describe the image.<|im_end|><|endoftext|>"
DEFAULTS = {
    "llama_model_default_params": {4: UNSET, 5: 1, 6: UNSET, 7: 1, 18: 0x10000},
    "llama_context_default_params": {0: 512, 1: 2048, 2: 512, 7: 4, 11: UNSET, 13: UNSET, 34: 0x1010100},
    "mtmd_context_params_default": {0: 1, 4: 1, 5: 4, 11: 1, 12: UNSET, 13: UNSET, 18: 1024},
}  # fmt: skip
"""Function -> 32-bit words of the structure that it returns: if they differ, so does the layout."""
HANDLES = (
    "llama_model_load_from_file llama_init_from_model llama_model_get_vocab llama_get_memory "
    "llama_get_embeddings mtmd_init_from_file mtmd_default_marker mtmd_bitmap_init "
    "mtmd_input_chunks_init mtmd_input_chunks_get mtmd_get_output_embd gguf_init_from_file"
)
Array = np.ndarray[Any, Any]
Handle = type("Handle", (ctypes.c_void_p,), {})  # a call returns it as it is, not as a number


def structure(*kinds: Any) -> Any:
    """Return a C structure with fields of these types."""
    fields = [(f"field{number}", kind) for number, kind in enumerate(kinds)]
    return type("Structure", (ctypes.Structure,), {"_fields_": fields})


PARAMS = structure(ctypes.c_uint32 * 64)  # larger than any; the library reads its beginning
PROMPT = structure(ctypes.c_char_p, ctypes.c_size_t, ctypes.c_bool, ctypes.c_bool)
FILE_PARAMS = structure(ctypes.c_bool, ctypes.c_void_p)
TOKENS = structure(ctypes.c_int32, *[ctypes.c_void_p] * 6)
ON_LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
LOG = ON_LOG(lambda level, text, _: print(text.decode(), file=sys.stderr) if level == 4 else None)


def check(sound: Any, problem: str) -> None:
    """End the program with one line unless `sound`."""
    if not sound:
        sys.exit(f"error: {problem}")


def load_library() -> Any:
    """Return llama.cpp's C interface, after checking that it is the one this program knows."""
    version, fix = xllamacpp.__version__, f"run `pip install xllamacpp=={XLLAMACPP}`"
    check(version == XLLAMACPP, f"xllamacpp is {version}; {fix}")
    lib = ctypes.CDLL(xllamacpp.xllamacpp.__file__)
    lib.gguf_get_tensor_offset.restype = ctypes.c_int64
    for name in HANDLES.split():
        getattr(lib, name).restype = Handle
    for name, words in DEFAULTS.items():
        getattr(lib, name).restype = PARAMS
        actual = {place: getattr(lib, name)().field0[place] for place in words}
        check(actual == words, f"{name} has another layout; {fix} again")
    lib.llama_log_set(LOG, None)
    lib.mtmd_helper_log_set(LOG, None)
    return lib


def parameters(lib: Any, name: str, words: dict[int, int]) -> Any:
    """Return what a function of `DEFAULTS` returns, with some words replaced."""
    params = getattr(lib, name)()
    for place, word in words.items():
        params.field0[place] = word
    return params


class Embedder:
    """The model of one folder; vectors are float32 [tokens, embed_dim], of length 1."""

    def __init__(self, folder: Path = Path(__file__).parent, threads: int = os.cpu_count() or 1):
        self.lib = lib = load_library()
        text, self.path = (os.fsencode(folder / name) for name in ("text.gguf", "mmproj.gguf"))
        file = lib.gguf_init_from_file(self.path, FILE_PARAMS(True, None))
        params = parameters(lib, "llama_model_default_params", {18: 0})  # no second copy of weights
        model = lib.llama_model_load_from_file(text, params)
        check(file and model, f"{folder}: llama.cpp cannot load text.gguf or mmproj.gguf")
        keys = (b"colqwen3.min_pixels", b"colqwen3.max_pixels", b"colqwen3.side")
        ids = [ctypes.c_int64(lib.gguf_find_key(file, key)) for key in keys]
        self.min_pixels, self.max_pixels, self.side = (lib.gguf_get_val_u32(file, i) for i in ids)
        arrays = []
        for name in (b"colqwen3.proj.weight", b"colqwen3.proj.bias"):
            tensor = ctypes.c_int64(lib.gguf_find_tensor(file, name))
            start = lib.gguf_get_data_offset(file) + lib.gguf_get_tensor_offset(file, tensor)
            count = lib.gguf_get_tensor_size(file, tensor) // 4
            arrays.append(np.fromfile(os.fsdecode(self.path), "<f4", count, offset=start))
            check(len(arrays[-1]) == count > 0, f"{folder}: mmproj.gguf is damaged; fetch it again")
        self.weight, self.bias = arrays[0].reshape(len(arrays[1]), -1), arrays[1]
        most = self.max_pixels // self.side**2 + 16  # tokens of a page
        words = {0: most, 1: BATCH, 2: BATCH, 7: threads, 8: threads}  # tokens in all, at a time
        words |= {11: 0, 13: 0, 34: 0x1010101}  # no pooling, no flash attention, embeddings
        params = parameters(lib, "llama_context_default_params", words)
        self.context = lib.llama_init_from_model(model, params)
        check(self.context, f"{folder}: llama.cpp cannot run text.gguf")
        self.model, self.vocab, self.threads = model, lib.llama_model_get_vocab(model), threads

    @cached_property
    def vision(self) -> Any:
        """The vision tower, in memory from the first page on; no timings, no warm-up."""
        words = {4: 0, 5: self.threads, 11: 0, 12: 1, 13: self.max_pixels // self.side**2}
        params = parameters(self.lib, "mtmd_context_params_default", words)
        tower = self.lib.mtmd_init_from_file(self.path, self.model, params)
        check(tower, f"{os.fsdecode(self.path)}: llama.cpp cannot load the vision tower")
        return tower

    def tokenize(self, text: str, special: bool = False) -> list[int]:
        """Return ids; what looks like a special token is text, unless `special`."""
        data = unicodedata.normalize("NFC", text).encode()
        ids = (ctypes.c_int32 * (len(data) + 1))()
        count = self.lib.llama_tokenize(self.vocab, data, len(data), ids, len(ids), False, special)
        return ids[:count]

    def embed_query(self, text: str) -> Array:
        """Return the vectors of a query."""
        augmentation = [self.lib.llama_vocab_pad(self.vocab)] * AUGMENTATION_TOKENS
        return np.concatenate(self._decode(self.tokenize(text.strip()) + augmentation, 0))

    def embed_page(self, image: Image.Image) -> Array:
        """Return the vectors of a page, which llama.cpp gets in a size that it leaves as it is."""
        lib, page = self.lib, self._prepare(image)
        bitmap = lib.mtmd_bitmap_init(page.width, page.height, page.tobytes())
        marker, chunks = ctypes.string_at(lib.mtmd_default_marker()), lib.mtmd_input_chunks_init()
        prompt = ctypes.byref(PROMPT(marker, len(marker), False, True))
        one, count = ctypes.c_size_t(1), page.width * page.height // self.side**2
        failed = lib.mtmd_tokenize(self.vision, chunks, prompt, ctypes.byref(bitmap), one)
        check(not failed, "llama.cpp cannot take the page; see its messages above")
        chunk = lib.mtmd_input_chunks_get(chunks, one)  # that before it is text, that after it too
        check(lib.mtmd_input_chunk_get_n_tokens(chunk) == count, "llama.cpp resizes the page")
        failed = lib.mtmd_encode_chunk(self.vision, chunk)
        vectors = self._decode(self.tokenize(BEFORE, True), 0)
        place, done = ctypes.c_int32(len(vectors[0])), list[Array]()
        collect = ctypes.CFUNCTYPE(ctypes.c_int32)(lambda: self._collect(done, count))
        encoded = (self.vision, self.context, chunk, lib.mtmd_get_output_embd(self.vision))
        options = (place, 0, BATCH, ctypes.byref(place), collect, None)
        failed = failed or lib.mtmd_helper_decode_image_chunk(*encoded, *options)
        complete = not failed and sum(map(len, done)) == count
        check(complete, "llama.cpp cannot embed the page; see its messages above")
        lib.mtmd_input_chunks_free(chunks)
        lib.mtmd_bitmap_free(bitmap)
        vectors += done + self._decode(self.tokenize(AFTER, True), place.value)
        return np.concatenate(vectors)

    def _prepare(self, image: Image.Image) -> Image.Image:
        """Return a page as a viewer shows it, in the size that Qwen2-VL's image processor gives it."""
        with suppress(Exception):  # a viewer shows a page with damaged EXIF data as it is stored
            image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # 16-bit grey, which Pillow would clip
            image = image.convert("I").point([value >> 8 for value in range(1 << 16)], "L")
        paper = Image.new("RGB", image.size, "white")
        alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
        paper.paste(image.convert("RGBA" if alpha else "RGB").convert("RGB"), mask=alpha)
        side, sizes, area = self.side, paper.size, math.prod(paper.size)
        check(0 < max(sizes) <= MAXIMUM_RATIO * min(sizes), f"a page of {sizes} is impossible")
        grid = [round(size / side) * side for size in sizes]
        if math.prod(grid) > self.max_pixels:
            beta = math.sqrt(area / self.max_pixels)
            grid = [max(side, math.floor(size / beta / side) * side) for size in sizes]
        elif math.prod(grid) < self.min_pixels:
            beta = math.sqrt(self.min_pixels / area)
            grid = [math.ceil(size * beta / side) * side for size in sizes]
        return paper.resize((grid[0], grid[1]), Image.Resampling.BICUBIC)

    def _decode(self, ids: list[int], start: int) -> list[Array]:
        """Return the vectors of text tokens that stand at `start` and after."""
        if start == 0:  # forget the last query or page
            self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)
        vectors = list[Array]()
        for first in range(0, len(ids), BATCH):
            tokens = np.array(ids[first : first + BATCH], np.int32)
            places = np.arange(start + first, start + first + len(tokens), dtype=np.int32)
            arrays = (tokens.ctypes.data, None, places.ctypes.data, None, None, None)
            failed = self.lib.llama_decode(self.context, TOKENS(len(tokens), *arrays))
            check(not failed, "llama.cpp cannot embed the text; it may be too long")
            self._collect(vectors, len(ids))
        return vectors

    def _collect(self, vectors: list[Array], count: int) -> int:
        """Add those of the batch just decoded to the vectors of a text or page of `count` tokens."""
        shape = min(count - sum(map(len, vectors)), BATCH), self.weight.shape[1]
        address = self.lib.llama_get_embeddings(self.context).value
        states = np.array((ctypes.c_float * math.prod(shape)).from_address(address)).reshape(shape)
        batch = states @ self.weight.T + self.bias
        vectors.append(batch / np.linalg.norm(batch, axis=-1, keepdims=True))
        return 0


def main() -> None:
    """Embed what the command line names, and print the best pages of each query."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--queries", nargs="*", default=(), metavar="TEXT")
    parser.add_argument("--pages", nargs="*", default=(), type=Path, metavar="IMAGE")
    parser.add_argument("--index", type=Path, metavar="FILE.npz", help="vectors of pages")
    parser.add_argument("--out", type=Path, metavar="FILE.npz", help="keep all vectors here")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args()
    embedder = Embedder(threads=args.threads)
    vectors: dict[str, Any] = dict(np.load(args.index)) if args.index else {}
    for path in args.pages:
        name = f"page/{path.stem}"
        check(name not in vectors, f"{path}: another page has that name; rename one")
        with Image.open(path) as image:
            vectors[name] = embedder.embed_page(image)
    pages = {name[5:]: value for name, value in vectors.items() if name.startswith("page/")}
    for number, text in enumerate(args.queries):
        query = vectors[f"query/{number}"] = embedder.embed_query(text)
        scores = {name: float((query @ page.T).max(-1).sum()) for name, page in pages.items()}
        for name in sorted(scores, key=lambda name: -scores[name])[:10]:
            print(f"{scores[name]:9.4f}  {name}  {text!r}")
    if args.out:
        np.savez(args.out, **vectors)


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
