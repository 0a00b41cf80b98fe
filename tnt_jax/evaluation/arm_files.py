"""Where pipelines and sweeps keep what an arm said, and what came of it.

The original and the mask have such folders, too, and so have the answers to prompts of other tasks.
"""

import dataclasses
import os
import pathlib


@dataclasses.dataclass(frozen=True)
class ArmFiles:
    """The files of one arm; each is of the outputs of one decoder.

    Attributes:
      root: The folder of the pipeline or sweep.
      arm: The arm's name.
    """

    root: str | os.PathLike[str]
    arm: str

    def outputs(self, decoder: str) -> pathlib.Path:
        """What the arm said."""
        return self._file(decoder, "jsonl")

    def annotated(self, decoder: str) -> pathlib.Path:
        """The same with marks; several decoders have theirs together, by a label of theirs."""
        return self._file(decoder, "annotated.jsonl")

    def evaluation(self, decoder: str) -> pathlib.Path:
        """What `evaluate` wrote."""
        return self._file(decoder, "evaluation.json")

    def tokens(self, decoder: str) -> pathlib.Path:
        """The certificate of every token, of some outputs of the original."""
        return self._file(decoder, "tokens.jsonl")

    def _file(self, decoder: str, ending: str) -> pathlib.Path:
        return pathlib.Path(self.root) / self.arm / f"{decoder}.{ending}"
