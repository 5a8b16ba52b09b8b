"""Attention on contiguous KV rows: one strided view for K, one for V, a row number and a length per request.

Needs torch and triton only. ``prefill_attention`` and ``decode_attention`` are Triton kernels,
``reference_attention`` is plain torch and runs anywhere.
"""

from vtensor_kernels.decode import MAX_GROUPED, DecodeSchedule, DecodeWorkspace, decode_attention, max_members
from vtensor_kernels.prefill import PrefillSchedule, prefill_attention, prefill_schedule
from vtensor_kernels.reference import reference_attention
from vtensor_kernels.tile import Pages
from vtensor_kernels.warm_up import warm_up

__all__ = [
    "MAX_GROUPED",
    "DecodeSchedule",
    "DecodeWorkspace",
    "Pages",
    "PrefillSchedule",
    "decode_attention",
    "max_members",
    "prefill_attention",
    "prefill_schedule",
    "reference_attention",
    "warm_up",
]
