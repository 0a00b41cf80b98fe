"""What the original and the model in training say to the same few prompts, time and again."""

import contextlib
import dataclasses
import functools
import json
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from tnt_jax.data import marks, records
from tnt_jax.data.examples import Example, num_marks_of, take
from tnt_jax.models import decoding, sharding
from tnt_jax.models.model import Model
from tnt_jax.runtime import console, settings_json
from tnt_jax.runtime.array_types import PyTree
from tnt_jax.tokenizers import tokenization
from tnt_jax.watching import hooks, metric_writers

_MOST_AT_ONCE = 32  # prompts that are answered together
_LONGEST = 300  # characters of a text in the log; samples.jsonl has all


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompt:
    """What is asked each time.

    Attributes:
      id: The id of the record or example.
      inputs: Token ids, EOS included.
    """

    id: str
    inputs: tuple[int, ...]


def read_prompts(path: str, vocabulary: Any) -> list[Prompt]:
    """The prompts of a file of records, in order.

    Raises:
      UsageError: The file cannot be read.
    """
    return [
        Prompt(id=row.id, inputs=tuple(marks.prompt_ids(row, vocabulary)))
        for row in records.read_records(path)
    ]


def choose_prompts(examples: Sequence[Example], number: int) -> list[Prompt]:
    """Prompts from all over the data, half of them of examples with marks if there are as many."""
    is_marked = num_marks_of(examples) > 0
    marked, clean = np.flatnonzero(is_marked).tolist(), np.flatnonzero(~is_marked).tolist()
    num_marked = min(len(marked), max(number // 2, number - len(clean)))
    chosen = [*_spread(marked, num_marked), *_spread(clean, number - num_marked)]
    return [
        Prompt(id=example.id, inputs=tuple(example.inputs.tolist()))
        for example in take(examples, np.array(chosen, int))
    ]


def _spread(rows: Sequence[Any], number: int) -> list[Any]:
    number = min(number, len(rows))
    return [rows[index * len(rows) // number] for index in range(number)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Speaker:
    """Answers prompts, some at a time; compiled once for each kind of parameters.

    Attributes:
      model: The network.
      vocabulary: The tokeniser of inputs and outputs.
      prompts: At least one.
      decoder: How to choose the tokens.
      longest_input: Tokens; longer inputs are cut.
    """

    model: Model
    vocabulary: Any
    prompts: Sequence[Prompt]
    decoder: decoding.Decoding
    longest_input: int

    def __call__(self, params: PyTree) -> list[str]:
        """The text that the parameters give for each prompt."""
        width = min(max(len(prompt.inputs) for prompt in self.prompts), self.longest_input)
        # What decoding remembers of a row comes beside the state of training.
        at_once = min(len(self.prompts), _MOST_AT_ONCE)
        texts: list[str] = []
        for first in range(0, len(self.prompts), at_once):
            rows = slice(first, first + at_once)
            decoded = self.model.decode(
                params,
                [prompt.inputs for prompt in self.prompts[rows]],
                width,
                self.decoder,
                sharding.batch_size_for(at_once, self.model.mesh),
                row_keys=None if self._keys is None else self._keys[rows],
            )
            tokens = sharding.fetch(decoded.tokens)[: len(self.prompts[rows])]
            said = (tokenization.said(row, self.decoder.end_ids) for row in tokens)
            texts += map(self.vocabulary.decode, said)
        return texts

    @functools.cached_property
    def inputs(self) -> list[str]:
        """The texts of the prompts."""
        return [self.vocabulary.prompt_text(prompt.inputs) for prompt in self.prompts]

    @functools.cached_property
    def _keys(self) -> jax.Array | None:
        if not self.decoder.temperature:
            return None
        return decoding.record_keys(0, [prompt.id for prompt in self.prompts])


class Samples(hooks.Hook):
    """Writes what the model says every so often, beside what the original says.

    `MODEL_DIR/samples.jsonl` has a line for each time: `{"step": 200, "samples": [{"id", "inputs",
    "original", "current"}]}`; the first one has no "current", but "said_by": the original's digest
    and the decoder. A run that goes on with both drops what was written after its checkpoint, and
    takes the original's outputs from there.

    Args:
      speaker: Answers the prompts.
      model_dir: Folder of the run.
      every: Updates from one time to the next.
    """

    def __init__(self, speaker: Speaker, model_dir: str, every: int):
        self.periods = (every,)
        self._speaker = speaker
        self._path = epath.Path(model_dir).expanduser() / "samples.jsonl"
        self._file: metric_writers.StepLines | None = None

    @property
    def prompts(self) -> Sequence[Prompt]:
        """What is asked."""
        return self._speaker.prompts

    def begin(self, beginning: hooks.Beginning) -> None:
        """Has the original speak, unless it has."""
        self._params_of, self._out = beginning.params_of, beginning.out
        start, original = beginning.step, beginning.original_params
        decoder = settings_json.describe(self._speaker.decoder)
        self._said_by = {"original": beginning.original_digest, "decoder": decoder}
        said = self._said_before() if start else None
        if np.any(multihost_utils.process_allgather(np.array(said is None))):
            said = None  # every host has to take part in decoding
        self._file = metric_writers.StepLines(self._path, last_step=start or -1)
        self._originals = said or [None] * len(self._speaker.prompts)
        if said is None:
            if original is not None:
                self._originals = [*self._speaker(original)]
            else:
                console.log("Samples are without the original's outputs: it is not in memory.")
            self._write(start, None)

    def __call__(self, step: int, state: Any) -> dict[str, float]:
        """Has the model speak, and writes it down; there are no metrics."""
        current = self._speaker(self._params_of(state))
        self._write(step, current)
        rows = list(zip(self._speaker.inputs, self._originals, current, strict=True))
        self._out.write_table(
            step,
            "samples",
            ["prompt", "original", "now"],
            [[inputs, original or "", now] for inputs, original, now in rows],
        )
        shown = [_in_the_log(*row) for row in rows]
        console.log("\n".join([f"update {step}, samples:", *shown]))
        return {}

    def close(self) -> None:
        """Closes the file, if the run has begun."""
        if self._file is not None:
            self._file.close()

    def _said_before(self) -> list[str | None] | None:
        """The original's outputs that an earlier process noted for the same prompts."""
        if not self._path.exists():
            return None
        prompts = zip(self._speaker.prompts, self._speaker.inputs, strict=True)
        asked = [(prompt.id, inputs) for prompt, inputs in prompts]
        # As `StepLines` reads it: whatever a crash left, half a character too.
        for line in self._path.read_bytes().decode("utf-8", "replace").split("\n"):
            with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
                found = json.loads(line)
                samples = found["samples"]
                # The first line of 0.2.0 did not say by whom.
                is_old = "said_by" not in found and "current" not in samples[0]
                if not is_old and found.get("said_by") != self._said_by:
                    continue
                if [(sample["id"], sample["inputs"]) for sample in samples] == asked:
                    return [sample["original"] for sample in samples]
        return None

    def _write(self, step: int, current: Sequence[str] | None) -> None:
        prompts = zip(self._speaker.prompts, self._speaker.inputs, self._originals, strict=True)
        samples = [
            {"id": prompt.id, "inputs": inputs, "original": original}
            for prompt, inputs, original in prompts
        ]
        for sample, text in zip(samples, current or (), strict=False):
            sample["current"] = text
        assert self._file is not None
        said_by = {"said_by": self._said_by} if current is None else {}
        self._file.write(step, {"samples": samples, **said_by})


def _in_the_log(inputs: str, original_text: str | None, current: str) -> str:
    said = {"original": original_text, "now": current}
    if original_text is None:
        said = {"now": current}
    elif original_text == current:
        said = {"both": current}
    lines = [
        f"  {_short(inputs)}",
        *(f"    {who:<8}  {_short(text)}" for who, text in said.items()),
    ]
    return "\n".join(lines)


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."
