"""Rounding to nearest, and the packed weights of the ``auto_round`` checkpoint format."""

from collections.abc import Iterator, Mapping

import torch

SMALLEST_SCALE = 1e-5  # AutoRound's own bound: float16 still divides by it
ROWS = 256  # at a time on a CPU: temporaries stay in the processor's cache
NUMBERS = 1 << 25  # at a time on a GPU, which small pieces leave waiting
IN_BYTE = {2: torch.int32, 4: torch.int16, 8: torch.uint8}
"""Bits that divide a byte -> type of a word with as many bytes as a byte holds values."""
PACKED_TENSORS = ("qweight", "qzeros", "scales")


def _pieces(weight: torch.Tensor) -> Iterator[slice]:
    """Yield the rows to work on at a time, one piece after another."""
    rows = ROWS if weight.device.type == "cpu" else max(ROWS, NUMBERS // weight.shape[1])
    for start in range(0, len(weight), rows):
        yield slice(start, start + rows)


def round_to_nearest(
    weight: torch.Tensor, bits: int, group_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round a weight to nearest, symmetrically, as AutoRound does without tuning.

    A group's scale is its largest magnitude divided by ``2 ** (bits - 1)``, negative when the
    largest value is at least as far from zero as the smallest: that end of the range has one code
    more. Source: AutoRound's ``rtn_int_sym``.

    Parameters
    ----------
    weight
        Float [out_features, in_features].
    bits
        Bits of one weight.
    group_size
        Weights of a row that share one scale; divides in_features.

    Returns
    -------
    tuple
        Codes, int8 [out_features, in_features] from ``-2 ** (bits - 1)``, and scales, float16
        [out_features, groups]; on the weight's device, and the same on every device.
    """
    limit = 2 ** (bits - 1)
    codes = torch.empty_like(weight, dtype=torch.int8, memory_format=torch.contiguous_format)
    groups_a_row = weight.shape[1] // group_size
    scales = weight.new_empty(weight.shape[0], groups_a_row, dtype=torch.float16)
    for rows in _pieces(weight):
        part = weight[rows].to(torch.float32, copy=True)  # changed in place below
        groups = part.reshape(len(part), -1, group_size)
        below, above = -groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        scale = torch.where(above < below, below, -above).div_(limit).half()
        small = scale.float().abs() < SMALLEST_SCALE
        smallest = torch.where(scale < 0, -SMALLEST_SCALE, SMALLEST_SCALE).half()
        scales[rows] = scale = torch.where(small, smallest, scale)
        rounded = groups.div_(scale.float().unsqueeze(-1)).round_().clamp_(-limit, limit - 1)
        codes[rows] = rounded.flatten(1)
    return codes, scales


def restore_codes(
    weight: torch.Tensor, scales: torch.Tensor, bits: int
) -> tuple[torch.Tensor, float]:
    """Find the codes of a weight that is already rounded.

    Parameters
    ----------
    weight
        Float [out_features, in_features], each a multiple of its group's scale.
    scales
        Float16 [out_features, groups].
    bits
        Bits of one weight.

    Returns
    -------
    tuple
        Codes, int8 of the weight's shape, and how far the weight is from them at most, in steps,
        beyond what rounding to its own dtype explains: half a step for 127 of them in bfloat16.
    """
    limit = 2 ** (bits - 1)
    groups = weight.float().reshape(*scales.shape, -1)
    steps = groups / scales.float().unsqueeze(-1)
    codes = steps.round().clamp(-limit, limit - 1)
    rounding = codes.abs() * (torch.finfo(weight.dtype).eps / 2)
    gap = float(((steps - codes).abs() - rounding).clamp(min=0).max())
    return codes.flatten(1).to(torch.int8), gap


def dense_weight(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Return the weight that codes stand for, float32 of their shape [out_features, in_features].

    Parameters
    ----------
    codes
        Whole numbers [out_features, in_features].
    scales
        Floats [out_features, groups].
    """
    return (codes.float().reshape(*scales.shape, -1) * scales.float().unsqueeze(-1)).flatten(1)


def relative_error(weight: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> float:
    """Return the error of rounding relative to the weight, both as Frobenius norms."""
    wrong = whole = 0.0
    for rows in _pieces(weight):
        part = weight[rows].float()
        dense = dense_weight(codes[rows], scales[rows])
        wrong += float(torch.linalg.vector_norm(dense.sub_(part))) ** 2
        whole += float(torch.linalg.vector_norm(part)) ** 2
    return float((wrong / max(whole, 1e-24)) ** 0.5)


def pack(codes: torch.Tensor, scales: torch.Tensor, bits: int) -> dict[str, torch.Tensor]:
    """Pack symmetric codes as the ``auto_round`` format stores them (packing ``auto_gptq``).

    A code is stored plus ``2 ** (bits - 1)``, 32 inputs of an output in `bits` words, lowest bits
    first. The zero point is stored minus one.

    Parameters
    ----------
    codes
        Int8 [out_features, in_features] from ``-2 ** (bits - 1)``.
    scales
        Float16 [out_features, groups].
    bits
        Bits of one weight.

    Returns
    -------
    dict
        ``qweight`` int32 [in_features * bits / 32, out_features], ``qzeros`` int32
        [groups, out_features * bits / 32] and ``scales`` float16 [groups, out_features].
    """
    zero = 2 ** (bits - 1)
    zeros = torch.full((1, scales.shape[0]), zero - 1, dtype=torch.uint8, device=scales.device)
    return {
        # a sum beyond 255 wraps to what is meant
        "qweight": _pack_rows(codes.view(torch.uint8) + zero, bits).T.contiguous(),
        "qzeros": _pack_rows(zeros, bits).repeat(scales.shape[1], 1),
        "scales": scales.T.contiguous(),
    }


def pack_table(codes: torch.Tensor, scales: torch.Tensor, bits: int) -> dict[str, torch.Tensor]:
    """Pack the codes of a table of token embeddings, so that a row can be read alone.

    A code is stored plus ``2 ** (bits - 1)``, lowest bits first, as compressed-tensors packs weights.

    Parameters
    ----------
    codes
        Int8 [rows, width] from ``-2 ** (bits - 1)``.
    scales
        Float16 [rows, groups].
    bits
        Bits of one weight, 4 or 8.

    Returns
    -------
    dict
        ``weight_packed`` int32 [rows, width * bits / 32] and ``weight_scale`` float16 [rows, groups].
    """
    return {
        "weight_packed": _pack_rows(codes.view(torch.uint8) + 2 ** (bits - 1), bits),
        "weight_scale": scales,
    }


def _pack_rows(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack uint8 rows of values below ``2 ** bits`` into int32 words."""
    if bits not in IN_BYTE:  # values straddle bytes, but eight of them fill `bits` bytes
        eights = values.reshape(len(values), -1, 8).int()
        filled = (eights << torch.arange(0, 8 * bits, bits, device=values.device)).sum(-1)
        places = torch.arange(0, 8 * bits, 8, device=values.device)
        stream = (filled.unsqueeze(-1) >> places).to(torch.uint8)
        return stream.flatten(1).view(torch.int32)
    # the values of one byte lie in neighbouring bytes of one word; each moves down to its place
    wide = values.contiguous().view(IN_BYTE[bits])
    whole = torch.zeros_like(wide)
    for place in range(8 // bits):
        whole |= (wide >> (8 - bits) * place) & (2**bits - 1 << bits * place)
    return whole.to(torch.uint8).view(torch.int32)


def _unpack_rows(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Unpack int32 rows of words into int16 rows of unsigned values."""
    whole = words.contiguous().view(torch.uint8)
    mask: int = 2**bits - 1
    if bits not in IN_BYTE:
        places = torch.arange(0, 8 * bits, 8, device=words.device)
        filled = (whole.reshape(len(words), -1, bits).long() << places).sum(-1)
        shifts = torch.arange(0, 8 * bits, bits, device=words.device)
        eights = (filled.unsqueeze(-1) >> shifts) & mask
        return eights.flatten(1).to(torch.int16)
    size = (len(words), whole.shape[1] * 8 // bits)
    values = torch.empty(size, dtype=torch.int16, device=words.device)
    for place in range(8 // bits):
        values[:, place :: 8 // bits] = (whole >> (place * bits)) & mask
    return values


def unpack(qweight: torch.Tensor, qzeros: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the codes of one packed linear less their zero points: what its scales multiply.

    Zero points are stored minus one, as GPTQ does.

    Parameters
    ----------
    qweight
        Int32 [in_features * bits / 32, out_features], packed along the inputs.
    qzeros
        Int32 [groups, out_features * bits / 32], packed along the outputs.
    bits
        Bits of one weight.

    Returns
    -------
    torch.Tensor
        Int16 [out_features, in_features]; within int8 where zero points are in the middle.
    """
    codes = _unpack_rows(qweight.T.contiguous(), bits)
    zeros = (_unpack_rows(qzeros, bits) + 1).T.unsqueeze(-1)
    return codes.view(len(codes), len(qzeros), -1).sub_(zeros).flatten(1)


def reorder_outputs(
    parts: Mapping[str, torch.Tensor], order: torch.Tensor, bits: int
) -> dict[str, torch.Tensor]:
    """Return a packed linear with its outputs in another order.

    Parameters
    ----------
    parts
        As `pack` returns them.
    order
        Integers [out_features]: which output comes first, second and so on.
    bits
        Bits of one weight.
    """
    zeros = _unpack_rows(parts["qzeros"], bits)[:, order].to(torch.uint8)
    return {
        "qweight": parts["qweight"][:, order],
        "qzeros": _pack_rows(zeros, bits),
        "scales": parts["scales"][:, order],
    }


def dequantize(
    qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor, bits: int
) -> torch.Tensor:
    """Return the dense weight of one packed linear.

    A weight is ``scale * (q - zero)``, one scale and zero point a group of a row.

    Parameters
    ----------
    qweight, qzeros
        As of `unpack`.
    scales
        Float16 [groups, out_features].
    bits
        Bits of one weight.

    Returns
    -------
    torch.Tensor
        Float32 [out_features, in_features].
    """
    return dense_weight(unpack(qweight, qzeros, bits), scales.T)
