"""Triton-language kernels run in its interpreter: tests need no GPU. Set before anything imports ``triton``."""

import os

os.environ["TRITON_INTERPRET"] = "1"
