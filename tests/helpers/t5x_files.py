"""What T5X itself wrote: `golden/t5x_checkpoints.tar.gz` (golden/README.md)."""

import tarfile

import numpy as np
from helpers import golden_model
from helpers.huggingface_model import TINY

GOLDEN = np.load(golden_model.FOLDER / "t5x_checkpoints.npz")


BATCH = golden_model.tree(GOLDEN, "batch/")


# Python 3.11 has it from 3.11.4 on; Debian 12's is older. The archive is ours.
FILTER: dict = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}


CONFIG = TINY
