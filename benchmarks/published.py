"""The published library's step, T5X's with google/t5patches, for `step.py` to run beside ours.

Neither is on a package index: docs/howto_t5x.md says how to install T5X, and t5patches is a folder
to put on PYTHONPATH. The original of its TNFF is a constant in the program: so its trainer has it.
"""

import jax
import jax.numpy as jnp
import numpy as np
import seqio
from absl import logging
from t5patches import models as patched_models
from t5patches import trainer as patched_trainer
from t5x import adafactor, models, partitioning, trainer, utils
from t5x.examples.t5 import network

logging.set_verbosity(logging.ERROR)  # T5X warns of every parameter

FIELDS = (
    *("vocab_size", "emb_dim", "num_heads", "num_encoder_layers", "num_decoder_layers"),
    *("head_dim", "mlp_dim", "mlp_activations", "logits_via_embedding"),
)
CLASSES = {
    "fine-tune": (models.EncoderDecoderModel, trainer.Trainer),
    "TNFF": (patched_models.EncoderDecoderModelTNFF, patched_trainer.SelfDistillationTrainer),
}


def make(config, name, batch):
    """The next update of a new model on `batch`, as a function: `step.Work.update`.

    Args:
      config: Our `T5Config`.
      name: One of `CLASSES`.
      batch: Our model features.
    """
    model_class, trainer_class = CLASSES[name]
    settings = {field: getattr(config, field) for field in FIELDS}
    vocabulary = seqio.PassThroughVocabulary(config.vocab_size, eos_id=1)
    model = model_class(
        module=network.Transformer(
            network.T5Config(**settings, dtype=config.dtype, dropout_rate=0.0)
        ),
        input_vocabulary=vocabulary,
        output_vocabulary=vocabulary,
        optimizer_def=adafactor.Adafactor(
            decay_rate=0.8,
            step_offset=0,
            logical_factor_rules=adafactor.standard_logical_factor_rules(),
        ),
    )
    features = {key: rows for key, rows in batch.items() if key.endswith("tokens")}
    weights = np.where(batch["decoder_negative_ids"][..., 0] >= 0, -1, batch["decoder_loss_mask"])
    if name == "fine-tune":
        weights = batch["decoder_loss_mask"]
    features = {**features, "decoder_loss_weights": jnp.asarray(weights, jnp.float32)}
    partitioner = partitioning.PjitPartitioner(num_partitions=1)
    initializer = utils.TrainStateInitializer(
        optimizer_def=model.optimizer_def,
        init_fn=model.get_initial_variables,
        input_shapes={key: features[key].shape for key in features},
        input_types={key: features[key].dtype for key in features},
        partitioner=partitioner,
    )
    state = initializer.from_scratch(jax.random.PRNGKey(0))
    original = {}
    if name != "fine-tune":  # a copy: the state is given away
        original = {"orig_train_state": jax.tree.map(jnp.copy, state)}
    training = trainer_class(
        model=model,
        train_state=state,
        partitioner=partitioner,
        eval_names=[],
        summary_dir=None,
        train_state_axes=initializer.train_state_axes,
        rng=jax.random.PRNGKey(0),
        learning_rate_fn=lambda step: jnp.float32(1e-3),
        num_microbatches=None,
        **original,
    )
    del state, original
    training.compile_train(features)

    def update():
        compiled = training._compiled_train_step
        training.train_state, metrics = compiled(training.train_state, features)
        return metrics["loss"].compute_value().value

    return update
