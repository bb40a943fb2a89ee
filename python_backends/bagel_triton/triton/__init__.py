"""Triton's side: the only room that imports pb_utils or tritonclient."""
