"""Processor of ColQwen3: pages and queries to tensors, and MaxSim; Pillow only, no torchvision."""

import io
from collections.abc import Sequence
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageChops, ImageCms
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer, BatchFeature, ProcessorMixin

from .scoring import BATCH, max_sim

try:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
        Qwen2VLImageProcessorPil,
        smart_resize,
    )
except ImportError:  # transformers 4.57, whose slow image processor is the Pillow-backed one
    from transformers import Qwen2VLImageProcessor as Qwen2VLImageProcessorPil
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

DEFAULT_MAX_NUM_VISUAL_TOKENS = 1280
PAGE_PROMPT = "<|im_start|>user\n<|vision_start|>{image}<|vision_end|>Describe the image.<|im_end|><|endoftext|>"
IMAGE_TOKEN = "<|image_pad|>"
AUGMENTATION_TOKEN = "<|endoftext|>"
AUGMENTATION_TOKENS = 10
MAXIMUM_RATIO = 200  # long side to short: Qwen's image processor takes nothing beyond
LEVELS = 256  # values of an 8-bit channel
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> what sets the page upright."""


def to_rgb(image: Image.Image) -> Image.Image:
    """Return a page as a viewer shows it: upright, in 8-bit RGB, transparency on white paper.

    EXIF orientation is applied, also where XMP states it. 16-bit grey becomes 8-bit: Pillow would
    turn all but its darkest greys white. CMYK goes through its ICC profile to sRGB where it has a
    usable one; profiles of RGB and grey pages, which change little, are ignored.
    """
    try:
        turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # a viewer shows a page with damaged EXIF data as it is stored
        turn = None
    key = image.info.get("transparency")
    if turn is not None:
        image = image.transpose(turn)
    alpha = None
    if image.mode.startswith("I"):
        wide = image.convert("I")
        if isinstance(key, int):
            alpha = wide.point([255 * (value != key) for value in range(1 << 16)], "L")
        image = wide.point([value >> 8 for value in range(1 << 16)], "L")
    elif image.mode == "CMYK":
        image = _cmyk_to_srgb(image)
    elif image.has_transparency_data:
        if isinstance(key, tuple) and max(key) > 255:  # of 16-bit RGB, which Pillow reads as 8-bit
            image = image.copy()
            image.info["transparency"] = tuple(value >> 8 for value in key)
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
    page = image.convert("RGB")
    if alpha is not None:
        paper = Image.new("RGB", page.size, "white")
        paper.paste(page, mask=alpha)
        page = paper
    page.info.clear()  # a page is not turned or made transparent twice
    return page


def _cmyk_to_srgb(image: Image.Image) -> Image.Image:
    """Return a CMYK image in sRGB, by its ICC profile if it has one that Pillow can use."""
    profile = image.info.get("icc_profile")
    if profile:
        try:
            converted = ImageCms.profileToProfile(
                image, io.BytesIO(profile), ImageCms.createProfile("sRGB"), outputMode="RGB"
            )
        except (ImportError, OSError, ImageCms.PyCMSError):  # no littlecms, or a damaged profile
            converted = None
        if converted is not None:
            return converted
    return image.convert("RGB")


def _without_colour(image: Image.Image) -> Image.Image:
    """Return an RGB page whose three channels are equal as one channel: a third of the work."""
    red, *others = image.split()
    if any(ImageChops.difference(red, other).getbbox() for other in others):
        return image
    return red


def _cut(image: Image.Image, patch: int, merge: int) -> NDArray[np.uint8]:
    """Return the patches of an RGB or grey image, those that become one visual token in a row."""
    height, width = image.height // patch, image.width // patch
    pixels = np.asarray(image).reshape(
        height // merge, merge, patch, width // merge, merge, patch, -1
    )
    patches = pixels.transpose(0, 3, 1, 4, 6, 2, 5)
    rgb = np.broadcast_to(patches, (*patches.shape[:4], 3, patch, patch))
    return rgb.reshape(height * width, -1)


class ColQwen3Processor(ProcessorMixin):  # type: ignore[misc]
    """Turns page images and texts into the model's inputs.

    Parameters
    ----------
    image_processor
        Qwen2-VL's image processor with a Pillow back end, so that results are the same everywhere.
    tokenizer
        Qwen's tokenizer; it pads on the left.
    """

    attributes: ClassVar[list[str]] = ["image_processor", "tokenizer"]
    image_processor_class = "AutoImageProcessor"
    tokenizer_class = "AutoTokenizer"

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, **kwargs: Any) -> None:
        tokenizer.padding_side = "left"
        super().__init__(image_processor, tokenizer)
        # once: a tokenizer that is asked now with and now without special tokens is not thread-safe
        before, after = PAGE_PROMPT.split("{image}")
        self._page_prompt = tokenizer(before)["input_ids"], tokenizer(after)["input_ids"]

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str,
        max_num_visual_tokens: int = DEFAULT_MAX_NUM_VISUAL_TOKENS,
        trust_remote_code: bool = False,
        **kwargs: Any,
    ) -> "ColQwen3Processor":
        """Load tokenizer and image processor from a folder or Hub id.

        Parameters
        ----------
        pretrained_model_name_or_path
            A folder or Hub id.
        max_num_visual_tokens
            A page is shrunk until it has at most this many visual tokens.
        trust_remote_code
            Ignored unless the tokenizer comes with code of its own.
        **kwargs
            Where to find the files: ``revision``, ``cache_dir``, ``token``, ``local_files_only``.
        """
        known = ("revision", "cache_dir", "token", "local_files_only", "subfolder")
        where = {key: kwargs[key] for key in known if key in kwargs}
        images = Qwen2VLImageProcessorPil.from_pretrained(pretrained_model_name_or_path, **where)
        # a visual token covers merge_size x merge_size patches
        side = images.patch_size * images.merge_size
        longest = max_num_visual_tokens * side * side
        # transformers 4.57 ignores the stored size, and reads the limits from other attributes
        stored, _ = images.get_image_processor_dict(pretrained_model_name_or_path, **where)
        shortest = min(stored.get("size", images.size)["shortest_edge"], longest)
        images.size = {"shortest_edge": shortest, "longest_edge": longest}
        if hasattr(images, "min_pixels"):
            images.min_pixels, images.max_pixels = shortest, longest
        tokenizer = AutoTokenizer.from_pretrained(
            pretrained_model_name_or_path, trust_remote_code=trust_remote_code, **where
        )
        return cls(image_processor=images, tokenizer=tokenizer)

    @property
    def image_token_id(self) -> int | None:
        """Id of the token that stands for a part of a page; None if the tokenizer lacks it."""
        token_id: int | None = self.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        return None if token_id == self.tokenizer.unk_token_id else token_id

    def process_images(self, images: Sequence[Image.Image]) -> BatchFeature:
        """Turn pages, in any mode of Pillow, into model inputs; see `to_rgb`.

        Returns
        -------
        BatchFeature
            ``input_ids`` and ``attention_mask`` [pages, tokens], left-padded; ``pixel_values``
            [patches, channels x temporal patch x patch x patch], all pages in a row;
            ``image_grid_thw`` [pages, 3]. A page has 11 tokens beside its visual ones.

        Raises
        ------
        ValueError
            If a page has no pixels, or is more than 200 times as long as wide.
        """
        inputs = self.cut_pages(images)
        pixels = self.pixel_values(inputs.pop("patches"))
        return BatchFeature({**inputs, "pixel_values": pixels})

    def cut_pages(self, images: Sequence[Image.Image]) -> BatchFeature:
        """Turn pages into model inputs with bytes for pixels, an eighth of the float32 values.

        Returns
        -------
        BatchFeature
            As of `process_images`, but in place of ``pixel_values`` ``patches``, bytes [patches,
            channels x patch x patch], of which `pixel_values` makes them.

        Raises
        ------
        ValueError
            As of `process_images`.
        """
        for number, image in enumerate(images, 1):
            short, long = sorted(image.size)
            if short == 0 or long > MAXIMUM_RATIO * short:
                problem = (
                    "it is empty" if short == 0 else f"its aspect ratio is over {MAXIMUM_RATIO}"
                )
                raise ValueError(
                    f"page {number} of {len(images)} is {image.width} x {image.height} pixels: {problem}"
                )
        patches, grids = zip(*(self.cut_page(to_rgb(image)) for image in images), strict=True)
        pages = torch.from_numpy(np.concatenate(patches))
        return BatchFeature({**self.page_prompts(grids), "patches": pages})

    def page_prompts(self, grids: Sequence[tuple[int, int, int]]) -> dict[str, torch.Tensor]:
        """Return the inputs of pages beside their pixels.

        Parameters
        ----------
        grids
            Frames, patch rows and patch columns of each page, as `cut_page` gives them.

        Returns
        -------
        dict
            ``input_ids``, ``attention_mask`` and ``image_grid_thw``, see `process_images`.
        """
        rows = torch.tensor(grids)
        counts = rows.prod(-1) // self.image_processor.merge_size**2
        token = self.image_token_id
        before, after = self._page_prompt
        prompts = self._pad([before + [token] * int(count) + after for count in counts])
        return {**prompts, "image_grid_thw": rows}

    def cut_page(self, image: Image.Image) -> tuple[NDArray[np.uint8], tuple[int, int, int]]:
        """Resize a page as the image processor does, and cut it into patches in 8 bits.

        Parameters
        ----------
        image
            An RGB page, see `to_rgb`.

        Returns
        -------
        ndarray, tuple
            [patches, channels x patch x patch] in the order of the image processor, but of one
            frame only; and the page's frames, patch rows and patch columns.
        """
        images = self.image_processor
        patch, merge = images.patch_size, images.merge_size
        image = _without_colour(image)
        height, width = image.height, image.width
        if images.do_resize:
            height, width = smart_resize(
                height, width, factor=patch * merge,
                min_pixels=images.size["shortest_edge"], max_pixels=images.size["longest_edge"],
            )  # fmt: skip
            image = image.resize((width, height), Image.Resampling(images.resample))
        return _cut(image, patch, merge), (1, height // patch, width // patch)

    def pixel_values(self, patches: torch.Tensor) -> torch.Tensor:
        """Return patches as the model takes them: rescaled, normalised, and in all frames.

        The values are, to the last bit, those of the image processor.

        Parameters
        ----------
        patches
            Bytes [patches, channels x patch x patch] on any device, see `cut_page`.

        Returns
        -------
        torch.Tensor
            Float32 [patches, channels x temporal patch x patch x patch] on the same device.
        """
        channels, frames = len(self._levels), self.image_processor.temporal_patch_size
        index = patches.view(len(patches), channels, -1).int()
        index += LEVELS * torch.arange(channels, device=patches.device, dtype=torch.int32)[:, None]
        levels = self._levels.flatten().to(patches.device, non_blocking=True)
        values = torch.index_select(levels, 0, index.flatten()).view(len(patches), channels, 1, -1)
        return values.expand(-1, -1, frames, -1).reshape(len(patches), -1)

    @cached_property
    def _levels(self) -> torch.Tensor:
        """What the image processor makes of each level of each channel, float32 [channels, 256]."""
        images = self.image_processor
        patch, merge, frames = images.patch_size, images.merge_size, images.temporal_patch_size
        side = patch * merge * -(-16 // (patch * merge))  # pixels enough for every level
        levels = np.arange(side * side).reshape(side, side) % LEVELS
        image = Image.fromarray(levels.astype(np.uint8)).convert("RGB")
        values = images([image], do_resize=False, return_tensors="pt")["pixel_values"]
        index = torch.from_numpy(_cut(image, patch, merge)).long()
        channels = values.shape[1] // (frames * patch * patch)
        values = values.view(len(values), channels, frames, -1)[:, :, 0]
        table = torch.empty(channels, LEVELS)
        for row, at, value in zip(
            table, index.view(len(index), channels, -1).unbind(1), values.unbind(1), strict=True
        ):
            row[at.flatten()] = value.flatten()
        return table

    def process_texts(self, texts: Sequence[str]) -> BatchFeature:
        """Turn queries, or documents given as text, into model inputs.

        Returns
        -------
        BatchFeature
            ``input_ids`` and ``attention_mask`` [texts, tokens], left-padded. Each text ends in
            ten augmentation tokens, which are attended to. What looks like a special token in a
            text is text: nobody's query becomes an image or an end of text.
        """
        rows = self.tokenizer([text.strip() for text in texts], split_special_tokens=True)
        suffix = self.tokenizer.convert_tokens_to_ids([AUGMENTATION_TOKEN]) * AUGMENTATION_TOKENS
        return BatchFeature(self._pad([row + suffix for row in rows["input_ids"]]))

    def _pad(self, rows: list[list[int]]) -> dict[str, torch.Tensor]:
        """Return ids and attention mask [rows, longest], padded on the left."""
        tensors = [torch.tensor(row) for row in rows]
        masks = [torch.ones_like(row) for row in tensors]
        end = self.tokenizer.pad_token_id
        return {
            "input_ids": pad_sequence(tensors, True, end, padding_side="left"),
            "attention_mask": pad_sequence(masks, True, 0, padding_side="left"),
        }

    def __call__(
        self, images: Any = None, text: str | Sequence[str] | None = None, **kwargs: Any
    ) -> BatchFeature:
        """Process either pages or texts, as `process_images` and `process_texts` do.

        Raises
        ------
        ValueError
            If both or neither are given.
        """
        if (images is None) == (text is None):
            raise ValueError("give either images or text")
        if text is not None:
            return self.process_texts([text] if isinstance(text, str) else text)
        return self.process_images([images] if isinstance(images, Image.Image) else images)

    def score_multi_vector(
        self,
        qs: Sequence[torch.Tensor] | torch.Tensor,
        ps: Sequence[torch.Tensor] | torch.Tensor,
        batch_size: int | None = None,
        device: torch.device | str | None = None,
    ) -> torch.Tensor:
        """Score every query against every page by MaxSim, see `max_sim`.

        Parameters
        ----------
        qs, ps
            Queries and pages: one [tokens, embed_dim] tensor each, or one padded tensor.
        batch_size
            Queries and pages that are scored at a time; it changes memory, no score.
        device
            Where to compute; by default where the queries are.

        Returns
        -------
        torch.Tensor
            Float32 scores [queries, pages] on the CPU.

        Raises
        ------
        ValueError
            If there are no queries or no pages, or ``batch_size`` is below 1.
        """
        queries = qs if device is None else [query.to(device) for query in qs]
        return max_sim(queries, ps, BATCH if batch_size is None else batch_size)
