"""``d2sd::CascadeAttention``, the one attention operator of the target and of both drafters."""
