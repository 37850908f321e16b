"""Attention kernels in Triton, forward only. Nothing imports them before they are used: they alone need triton."""
