"""The seed of random inputs: the same in every run, so that what fails once fails again; another one to look for more.

SLIPSTREAM_TEST_SEED=7 pytest tests/kernels
"""

import os

SEED = int(os.environ.get("SLIPSTREAM_TEST_SEED", "0"))
