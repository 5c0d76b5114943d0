"""Tests run on the processor, whatever machine they are on; those of a GPU ask for one."""

import os

if not os.environ.get("TRIMTAB_TEST_CUDA"):
    # Before torch is imported, which looks for GPUs once.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
