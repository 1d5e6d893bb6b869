"""Reading the packed weights of the ``auto_round`` checkpoint format."""

import torch


def dequantize(
    qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor, bits: int
) -> torch.Tensor:
    """Return the dense weight of one packed linear.

    A weight is ``scale * (q - zero)``, one scale and zero point a group of a row; zero points are
    stored minus one, as GPTQ does.

    Parameters
    ----------
    qweight
        Int32 [in_features * bits / 32, out_features], packed along the inputs.
    qzeros
        Int32 [groups, out_features * bits / 32], packed along the outputs.
    scales
        Float16 [groups, out_features].
    bits
        Bits of one weight.

    Returns
    -------
    torch.Tensor
        Float32 [out_features, in_features].
    """
    from auto_round.utils.bit_packing import unpack_bitstream

    q = unpack_bitstream(qweight, bits, dim=0).float()
    zeros = (unpack_bitstream(qzeros, bits, dim=1) + 1).float()
    group_size = q.shape[0] // scales.shape[0]
    scale = scales.float().repeat_interleave(group_size, dim=0)
    dense: torch.Tensor = scale * (q - zeros.repeat_interleave(group_size, dim=0))
    return dense.T.contiguous()
