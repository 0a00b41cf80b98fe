"""The values of the prefixes of the original's outputs, by heads that did not see these outputs.

Axes: `B` outputs, `T` positions.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np

from tnt_jax.checkpoints import digests, opened_model
from tnt_jax.data import marks, records
from tnt_jax.data.examples import Example
from tnt_jax.data.layouts import count_lost
from tnt_jax.localization import look_ahead, prefix_values
from tnt_jax.runtime import console
from tnt_jax.tokenizers import tokenization
from tnt_jax.training import load_original


class OriginalOutputs:
    """The outputs as the head reads them.

    With `is_ended` there is one more position: after the end of each output.
    """

    def __init__(
        self,
        rows: Sequence[records.Record],
        opened: opened_model.OpenedModel,
        *,
        task_feature_lengths: Mapping[str, int],
        batch_size: int,
        states_folder: str,
        is_ended: bool = False,
    ):
        unmarked = [
            dataclasses.replace(row, negative_spans=None, negative_token_ids=()) for row in rows
        ]
        tokenized = marks.examples_from_records(unmarked, opened.vocabulary, "the records")
        self._examples = [_ended(example, opened.vocabulary, is_ended) for example in tokenized]
        # One more, so that an output cut at the length has a state after its last token too.
        lengths = dict(task_feature_lengths)
        lengths["targets"] += 1 + is_ended
        lost = count_lost(self._examples, lengths)
        if lost.num_inputs or lost.num_targets:
            console.log(
                f"{lost.num_inputs} inputs and {lost.num_targets} targets are cut "
                "(TASK_FEATURE_LENGTHS): nothing is found beyond."
            )
        self.tokens = [example.targets[: lengths["targets"]] for example in self._examples]
        self._length = max(map(len, self.tokens))
        self.digest = digests.of_params(opened.params)
        (self._states,) = load_original.states_of(
            opened.model,
            opened.params,
            [self._examples],
            digest=self.digest,
            states_folder=states_folder,
            task_feature_lengths=lengths,
            batch_size=batch_size,
        ).values()
        network = opened.model.network
        matrix, vocab_axis = network.output_matrix(opened.params)
        whole = np.asarray(matrix, np.float32)
        self.matrix = jnp.asarray(whole if vocab_axis == 0 else whole.T)
        self._said = np.zeros((len(rows), self._length, 2), np.float32)
        for start in range(0, len(rows), batch_size):
            indices = np.arange(start, min(start + batch_size, len(rows)))
            self._said[indices] = prefix_values.log_prob_and_entropy(
                self._states_of(indices),
                self.matrix,
                self.padded(indices),
                softcap=network.final_softcap,
            )

    def prompts(self, indices: np.ndarray) -> list[np.ndarray]:
        """The ids of the inputs."""
        return [self._examples[index].inputs for index in indices]

    def _states_of(self, indices: np.ndarray) -> np.ndarray:
        examples = [self._examples[index] for index in indices]
        return self._states.of_rows(examples, (len(indices), self._length))

    def padded(self, indices: np.ndarray) -> np.ndarray:
        """Their tokens `[B, T]`, filled up with 0."""
        tokens = np.zeros((len(indices), self._length), np.int32)
        for row, index in zip(tokens, indices, strict=True):
            row[: len(self.tokens[index])] = self.tokens[index]
        return tokens

    def said(self, indices: np.ndarray) -> np.ndarray:
        """The log-probability of each token, and the entropy where it stands, `[B, T, 2]`."""
        return self._said[indices]

    def evidence(self, indices: np.ndarray) -> prefix_values.Evidence:
        """A batch: what is said of a token stands where its prefix does, one position later."""
        tokens = self.padded(indices)
        lengths = np.array([len(self.tokens[index]) for index in indices])
        mask = np.arange(self._length) < lengths[:, None]
        return prefix_values.Evidence(
            states=jnp.asarray(self._states_of(indices)),
            tokens=jnp.asarray(np.pad(tokens, ((0, 0), (1, 0)))[:, :-1]),
            said=jnp.asarray(np.pad(self._said[indices], ((0, 0), (1, 0), (0, 0)))[:, :-1]),
            mask=jnp.asarray(mask.astype(np.int32)),
        )


def _ended(example: Example, vocabulary: tokenization.Tokeniser, is_twice: bool) -> Example:
    """With an EOS, also where decoding was cut: the state there is the one after all the text.

    With one more, the state there is the one after the first EOS.
    """
    has_end = len(example.targets) > 0 and example.targets[-1] in vocabulary.end_ids
    more = [vocabulary.end_id] * (int(not has_end) + int(is_twice))
    ended = np.append(example.targets, np.array(more, np.int32))
    return dataclasses.replace(example, targets=ended) if more else example


def fit_heads(
    outputs: OriginalOutputs,
    is_good: np.ndarray,
    folds: np.ndarray,
    training: prefix_values.Training,
    seed: int,
) -> look_ahead.Heads:
    """For each fold a head that was not trained on its outputs."""
    heads = {}
    names = np.unique(folds).tolist()
    for fold in console.progress(names, f"heads of {len(names)} folds", len(names)):
        others = np.flatnonzero(folds != fold)
        heads[fold] = prefix_values.fit(
            lambda chosen, others=others: outputs.evidence(others[chosen]),
            is_good[others],
            outputs.matrix,
            training,
            seed,
        )
    return look_ahead.Heads(heads, folds, training)


def values_of(outputs: OriginalOutputs, heads: look_ahead.Heads) -> list[np.ndarray]:
    """The value of each prefix of each output, by the head that was not trained on that output."""
    training = heads.training
    values: list[np.ndarray] = [np.zeros(0)] * len(heads.folds)
    for fold, params in heads.params.items():
        own = np.flatnonzero(heads.folds == fold)
        for start in range(0, len(own), training.batch_size):
            indices = own[start : start + training.batch_size]
            of_batch = prefix_values.values(
                params, outputs.evidence(indices), outputs.matrix, training=training
            )
            for index, of_row in zip(indices, np.asarray(of_batch), strict=True):
                values[index] = of_row[: len(outputs.tokens[index])]
    return values
