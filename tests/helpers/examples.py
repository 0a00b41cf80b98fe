"""Examples of token ids, from lists."""

import numpy as np

from tnt_jax.data.examples import Example


def example(inputs=(1,), targets=(1,), pairs=(), loss_mask=None, name=""):
    return Example(
        inputs=np.array(inputs, np.int32),
        targets=np.array(targets, np.int32),
        negative_pairs=np.array(pairs, np.int32).reshape(-1, 2),
        loss_mask=None if loss_mask is None else np.array(loss_mask, np.int32),
        id=name,
    )
