"""The stages of an experiment: outputs, training, evaluation, the report, models handed back.

Every method of an `ExperimentRun` runs stages that are not done yet, and returns their files.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import pathlib
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import msgspec

from tnt_jax import __version__, convert, objectives, report
from tnt_jax.annotators import interface
from tnt_jax.checkpoints import checkpoint_kinds, pretrained
from tnt_jax.data import datasets, records, removed_everywhere, rounds
from tnt_jax.evaluation import evaluations, results
from tnt_jax.evaluation.arm_files import ArmFiles
from tnt_jax.evaluation.evaluations import Evaluation
from tnt_jax.experiments.experiment import (
    TRAINING_OUTPUTS,
    Changes,
    Experiment,
    NewOriginal,
    from_home,
    name_of_round,
)
from tnt_jax.generate import check_are_prompts, read_prompts
from tnt_jax.runtime import console, files, operative_config, settings_json, stages
from tnt_jax.runtime.errors import UsageError
from tnt_jax.tokenizers import tokenization


def _generating(name: str, decoder: str) -> str:
    """The name of the stage that makes a model's outputs."""
    return f"{name}: generate, {decoder}"


def _unrelated_name(name: str) -> str:
    """The same of what a model says to `Experiment.unrelated_prompts`."""
    return f"{name}.unrelated"


_T = TypeVar("_T")


def _once(method: Callable[["ExperimentRun"], _T]) -> Callable[["ExperimentRun"], _T]:
    """Runs the stages of a method once, however often it is called."""
    name = f"_{method.__name__}"

    @functools.wraps(method)
    def made(run: "ExperimentRun") -> _T:
        if name not in vars(run):
            setattr(run, name, method(run))
        return vars(run)[name]

    return made


def open_run(
    experiment: Experiment,
    check_prompts: Callable[[Sequence[records.Record]], None] | None = None,
) -> "ExperimentRun":
    """Opens the folder of an experiment; makes its corpus and its original where it has none yet.

    Args:
      experiment: What the arms share.
      check_prompts: Is called with the evaluation prompts that are in a file, before anything is
        trained; raises what is wrong with them.

    Raises:
      UsageError: Settings, files or the original do not fit.
    """
    root = pathlib.Path(experiment.folder)
    files.check_directory(root, "OUTPUT_DIR")
    operative_config.check_folder(root, "OUTPUT_DIR")
    kept = stages.Stages(root)
    operative_config.write(root)
    if experiment.corpus is not None:
        _make_corpus(kept, experiment, experiment.corpus)
    is_compared = _look_at_prompts(experiment, check_prompts)
    if experiment.new_original is not None:
        _make_original(kept, experiment, experiment.new_original, root / "original" / "model")
        original = str(checkpoint_kinds.find(str(root / "original" / "model")))
    else:
        assert experiment.original_checkpoint_path is not None
        original = from_home(experiment.original_checkpoint_path)
        _check_revision(root, original)
    return ExperimentRun(experiment, kept, root, original, is_compared)


def _check_revision(root: pathlib.Path, original: str) -> None:
    """Raises a UsageError where the hub has another original now than this folder was begun with.

    Stages know a model of the hub by its name, which its owner may give to other weights.
    """
    found = checkpoint_kinds.revision(original)
    if found is None:
        return
    note = root / "stages" / "original_revision.json"
    before = files.read_object(note) if note.is_file() else {}
    if before.get("model") == original and before.get("revision") not in (None, found):
        raise UsageError(
            f"{original} has changed on the Hugging Face hub: its revision is {found}, and {root} "
            f"was made with {before['revision']}. Write into another folder, or give the folder of "
            "the old revision as the model (snapshot_download of huggingface_hub)."
        )
    files.write_json(str(note), {"model": original, "revision": found})


def _look_at_prompts(
    experiment: Experiment, check: Callable[[Sequence[records.Record]], None] | None
) -> bool:
    """Checks prompts in files before the work, and says which are learned from and evaluated on.

    Returns:
      Whether both are in files: of others it is known when their outputs are there.
    """
    for setting, prompts in (
        ("TRAIN_PROMPTS", experiment.train_prompts),
        ("EVAL_PROMPTS", experiment.eval_prompts),
        ("UNRELATED_PROMPTS", experiment.unrelated_prompts),
    ):
        if prompts is not None:  # with TRAINING_RECORDS there need not be any to learn from
            check_are_prompts(prompts, setting)
    # Unrelated prompts are read to see that there are some; nothing is compared with them.
    train, evaluation, _ = (
        records.read_records(prompts) if isinstance(prompts, str) else None
        for prompts in (
            experiment.train_prompts,
            experiment.eval_prompts,
            experiment.unrelated_prompts,
        )
    )
    if evaluation is not None and check is not None:
        check(evaluation)
    setting, given = "TRAIN_PROMPTS", experiment.training_records
    if given is not None:  # these are learned from
        setting, train = "TRAINING_RECORDS", records.iterate(given)
    if train is None or evaluation is None:
        return False
    _say_seen(_num_seen(evaluation, train), len(evaluation), setting)
    return True


def _num_seen(evaluation: Iterable[records.Record], train: Iterable[records.Record]) -> int:
    """How many prompts to evaluate on are also learned from."""
    learned = {row.prompt for row in train}
    return sum(row.prompt in learned for row in evaluation)


def _say_seen(number: int, of: int, setting: str) -> None:
    if number:
        console.log(
            f"EVAL_PROMPTS: {number} of {of} inputs are also in {setting}: "
            "numbers on what was learned from say little about other inputs. Give others."
        )


def _make_corpus(kept: stages.Stages, experiment: Experiment, corpus: Callable[[], Any]) -> None:
    new, prompts = experiment.new_original, experiment.train_prompts
    output = prompts if new is None else new.records
    if not isinstance(output, str):
        raise UsageError(
            "Experiment.corpus: expected TRAIN_PROMPTS to be a file that it writes, found "
            f"{output}."
        )
    kept.run("corpus", _write_corpus, output=output, inputs={}, settings={"corpus": corpus})


def _make_original(
    kept: stages.Stages, experiment: Experiment, new: NewOriginal, model_dir: pathlib.Path
) -> None:
    kept.run(
        "vocabulary",
        _train_vocabulary,
        output=new.vocabulary_path,
        inputs={"texts_of": new.records},
        settings={"vocab_size": new.vocab_size},
    )
    dataset = datasets.RecordFiles(
        files=new.records, vocabulary=experiment.vocabulary(), annotated=False
    )
    kept.run(
        "original: train",
        new.train,
        output=str(model_dir),
        output_name="model_dir",
        inputs={},
        settings={
            "dataset": dataset,
            # A model from nothing has no original, and no adapters.
            "original_choice": experiment.original_choice(
                path=None, kind="parameters", states_dir=None, trained_layers=None
            ),
        },
        also_depends_on=[new.records],
        goes_on=True,
    )


class ExperimentRun:
    """An experiment whose original is there; its methods run stages and return their files.

    Attributes:
      settings: The experiment's settings.
      root: The experiment's folder.
      original: Path of the original's checkpoint.
      vocabulary: The tokeniser of inputs and outputs.
      annotator: Decides what is unwanted.
    """

    def __init__(
        self,
        settings: Experiment,
        kept: stages.Stages,
        root: pathlib.Path,
        original: str,
        is_compared: bool = False,
    ):
        """`open_run` makes one.

        Args:
          settings: The experiment's settings.
          kept: The stages of its folder.
          root: Its folder.
          original: Path of the original's checkpoint.
          is_compared: Whether it was said already which prompts are evaluated on and learned from.
        """
        self.settings, self._stages, self.root = settings, kept, root
        self.original, self._is_compared = original, is_compared
        self._digests: dict[str, str] = {}  # of prompts that are in no file
        self._came_as = pretrained.open_checkpoint(original)
        self.annotator, self.vocabulary = settings.annotator(), settings.vocabulary()

    @property
    def first_decoder(self) -> str:
        """The name of the decoder whose numbers count first."""
        return next(iter(self.settings.decoders))

    def files_of(self, name: str) -> ArmFiles:
        """The files of an arm, or of another folder that has outputs."""
        return ArmFiles(self.root, name)

    @property
    def training_decoders(self) -> Sequence[str]:
        """The names of the decoders that make the training outputs."""
        return self.settings.training_decoders or [self.first_decoder]

    # ------------------------------------------------------------------------------------ Outputs

    def outputs_of(
        self,
        name: str,
        checkpoint: str,
        prompts: Any,
        decoder: str,
        mask: Any | None = None,
        identity: str | None = None,
    ) -> str:
        """Generates and annotates; returns the annotated file.

        Args:
          name: The folder's name.
          checkpoint: The model's checkpoint.
          prompts: A file (or glob) of records, or a `tasks.SeqioDataset`.
          decoder: The decoder's name.
          mask: An annotator: what it knows is masked.
          identity: Which model it is, where outputs are kept whose checkpoint is not; None: its
            files tell.
        """
        is_file = isinstance(prompts, str)
        masking: dict[str, Any] = {}
        words_of: list[str] = []
        rule = ""  # a mask at first tokens without it has left other outputs in old folders
        if mask is not None:
            place = self.settings.mask_place()
            if place.at == "start":  # ordinary words are those of the training outputs
                words_of = [self.make_training_outputs()]
                place = dataclasses.replace(place, innocent=self.make_training_outputs())
                rule = ", the prompt's words are innocent"
            masking = {"mask": mask, "mask_place": place}
        of_model = {"checkpoint_path": checkpoint}
        generated = str(self.files_of(name).outputs(decoder))
        self._stages.run(
            _generating(name, decoder),
            self.settings.generate,
            output=generated,
            inputs=({} if identity else of_model) | ({"prompts": prompts} if is_file else {}),
            settings={
                "vocabulary": self.vocabulary,
                "decoder": self.settings.decoders[decoder],
            }
            | ({} if is_file else {"prompts": prompts})
            | (of_model if identity else {})
            | masking,
            also_depends_on=words_of,
            # As of `_annotated`.
            version=(identity or "")
            + ("" if mask is None else mask.description + rule)
            + ("" if is_file else f", prompts {self._digest_of(prompts)}"),
        )
        return self._annotated(name, generated, decoder, self.annotator)

    def _digest_of(self, prompts: Any) -> str:
        """The digest of prompts of a seqio task as they are read: its settings do not show them."""
        described = json.dumps(settings_json.describe(prompts), sort_keys=True)
        if described not in self._digests:  # every arm asks
            self._digests[described] = records.digest(read_prompts(prompts, self.vocabulary))
        return self._digests[described]

    def _annotated(self, name: str, generated: str, label: str, annotator: Any) -> str:
        output = str(self.files_of(name).annotated(label))
        self._stages.run(
            f"{name}: annotate, {label}",
            self.settings.annotate,
            output=output,
            inputs={"input": generated},
            settings={"vocabulary": self.vocabulary, "annotator": annotator},
            version=annotator.description,  # names what a word list holds, not only its path
        )
        return output

    def training_outputs_by(self, decoders: Sequence[str], annotator: Any | None = None) -> str:
        """The original's outputs to learn from, of other decoders, or annotated by another.

        Args:
          decoders: Their names; outputs of several are brought together as those of rounds are.
          annotator: None is the experiment's.
        """
        name, files = TRAINING_OUTPUTS, []
        for decoder in decoders:
            files.append(self.outputs_of(name, self.original, self.settings.train_prompts, decoder))
            if annotator is not None:
                # One file for all that mark alike.
                digest = hashlib.sha256(annotator.description.encode()).hexdigest()[:8]
                label = f"{type(annotator).__name__}-{digest}"
                generated = str(self.files_of(name).outputs(decoder))
                files[-1] = self._annotated(name, generated, f"{decoder}.{label}", annotator)
        if len(files) == 1:
            return files[0]
        together = " and ".join(pathlib.Path(file).name.split(".annotated")[0] for file in files)
        return self._merged(name, files, together)

    def localized(self, outputs: str, localize: Callable[..., Any]) -> str:
        """Annotated outputs of the original with what `localize` adds to them; returns the file.

        Args:
          outputs: The file of annotated outputs.
          localize: `localize.localize` with its settings bound.
        """
        described = json.dumps(stages.describe(localize, {}, []), sort_keys=True)
        digest = hashlib.sha256(described.encode()).hexdigest()[:8]
        name = f"{pathlib.Path(outputs).stem}.localized-{digest}"
        found = str(self.files_of(TRAINING_OUTPUTS).outputs(name))
        self._stages.run(
            f"{TRAINING_OUTPUTS}: localize, {name}",
            localize,
            output=found,
            inputs={"input": outputs},
            settings={"vocabulary": self.vocabulary},
            also_depends_on=[self.original, *removed_everywhere.files_of(outputs)],
        )
        return found

    def _merged(
        self, name: str, files: Sequence[str], label: str, *, keep_clean: bool = True
    ) -> str:
        merged = str(self.root / name / f"{label}.merged.jsonl")
        # Not described where it is the default: so merges of before it are known again.
        only_marked = {} if keep_clean else {"keep_clean": False}
        self._stages.run(
            f"{name}: merge, {label}",
            rounds.merge_files,
            output=merged,
            inputs={},
            settings={"rounds": list(files), "vocabulary": self.vocabulary, **only_marked},
            also_depends_on=[*files, *itertools.chain(*map(removed_everywhere.files_of, files))],
        )
        return merged

    def training_of(self, name: str, num_rounds: int) -> tuple[int, float | None]:
        """Updates of an arm that is trained, and their seconds, of all its rounds together."""
        names = [name_of_round(name, number) for number in range(1, num_rounds + 1)]
        steps = sum(
            pretrained.open_checkpoint(str(self.root / name / "model")).step for name in names
        )
        seconds = [self._stages.seconds(f"{name}: train") for name in names]
        known = [of_round for of_round in seconds if of_round is not None]
        return steps, round(sum(known), 1) if len(known) == len(seconds) else None

    def seconds_of_outputs(self, name: str, decoders: Iterable[str]) -> float | None:
        """How long it took to make a model's outputs with these decoders; None if none are there.

        Args:
          name: The folder's name.
          decoders: The names of the decoders.
        """
        found = [self._stages.seconds(_generating(name, decoder)) for decoder in decoders]
        known = [seconds for seconds in found if seconds is not None]
        return sum(known) if known else None

    @_once
    def make_training_outputs(self) -> str:
        """The outputs to learn from, annotated."""
        given = self.settings.training_records
        return self.training_outputs_by(self.training_decoders) if given is None else given

    @_once
    def make_original_outputs(self) -> dict[str, str]:
        """The original's outputs to compare with, annotated, by decoder.

        Raises:
          UsageError: The annotator knows none of some.
        """
        found = {
            decoder: self.outputs_of("original", self.original, self.settings.eval_prompts, decoder)
            for decoder in self.settings.decoders
        }
        for file in found.values():
            if next(records.iterate(file), None) is None:
                raise UsageError(
                    f"EVAL_PROMPTS: expected outputs that the annotator knows, found none in {file}"
                    ". Give other EVAL_PROMPTS, or another ANNOTATOR."
                )
        return found

    def count_seen(self, training_outputs: Iterable[str]) -> int:
        """How many outputs to compare with answer prompts that are learned from; says so once.

        Args:
          training_outputs: The files of outputs to learn from.
        """
        file = self.make_original_outputs()[self.first_decoder]
        train = itertools.chain.from_iterable(map(records.iterate, training_outputs))
        evaluation = [*records.iterate(file)]
        found = _num_seen(evaluation, train)
        if not self._is_compared:
            self._is_compared = True
            _say_seen(found, len(evaluation), "what is learned from")
        return found

    @_once
    def make_mask_outputs(self) -> dict[str, str]:
        """The same while what is unwanted is masked; empty without a mask."""
        is_made = self.settings.mask_decoding
        if is_made is None:
            is_made = isinstance(self.annotator, interface.Mask)
        if not is_made:
            return {}
        return {
            name: self.outputs_of(
                results.MASK, self.original, self.settings.eval_prompts, name, mask=self.annotator
            )
            for name in self.settings.decoders
        }

    @_once
    def make_unrelated_outputs(self) -> str | None:
        """What the original says to prompts of other tasks, annotated; None if there are none."""
        prompts = self.settings.unrelated_prompts
        if prompts is None:
            return None
        return self.outputs_of(
            _unrelated_name("original"), self.original, prompts, self.first_decoder
        )

    # --------------------------------------------------------------------------------------- Arms

    def train(
        self,
        name: str,
        objective: objectives.TntObjective,
        files: str,
        *,
        changes: Changes | None = None,
        start: str | None = None,
        after: int = 0,
    ) -> str:
        """Trains an arm on annotated outputs; returns its newest checkpoint.

        Args:
          name: The arm's name.
          objective: The loss per token.
          files: A file (or glob) of annotated records.
          changes: Settings that differ from those of the experiment.
          start: A checkpoint to start from instead of the original.
          after: Where this is not the first leg of a run: after how many updates the last one
            ended. It is gone on from: the checkpoint is that of a run in one leg, bit for bit.
        """
        model_dir = str(self.root / name / "model")
        settings = self._training(objective, files, changes or Changes(), start)
        last_leg = dataclasses.replace(settings["schedule"], train_steps=after or 1)
        self._stages.run(
            f"{name}: train",
            self.settings.train,
            output=model_dir,
            output_name="model_dir",
            inputs={},
            settings=settings,
            also_depends_on=self._read_by_training(files, start),
            goes_on=True,
            earlier_settings={**settings, "schedule": last_leg} if after else None,
        )
        return str(checkpoint_kinds.find(model_dir))

    def describe_training(
        self, objective: objectives.TntObjective, files: str, changes: Changes
    ) -> str:
        """A digest of all that decides what `train` makes of the original."""
        described = stages.describe(
            self.settings.train,
            self._training(objective, files, changes, None),
            self._read_by_training(files, None),
        )
        return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:16]

    def _read_by_training(self, files: str, start: str | None) -> list[str]:
        checkpoints = [self.original] if start is None else [self.original, start]
        return [*checkpoints, files, *removed_everywhere.files_of(files)]

    def _training(
        self, objective: objectives.TntObjective, files: str, changes: Changes, start: str | None
    ) -> dict[str, Any]:
        return self.settings.arguments_of_training(
            objective,
            files=files,
            vocabulary=self.vocabulary,
            original=self.original,
            changes=changes,
            start=start,
        )

    def train_rounds(
        self,
        name: str,
        objective: objectives.TntObjective,
        files: str,
        num_rounds: int,
        changes: Changes | None = None,
    ) -> list[str]:
        """Trains an arm, generates with it, annotates, trains on all outputs so far, and so on.

        Args:
          name: The arm's name; a later round has its number after it.
          objective: The loss per token; always against the first original.
          files: Annotated outputs of the original.
          num_rounds: Number of rounds, at least 1.
          changes: Settings that differ from those of the experiment.

        Returns:
          The checkpoint of every round.
        """
        checkpoints = [self.train(name, objective, files, changes=changes)]
        all_files = [files]
        for number in range(2, num_rounds + 1):
            of_round = name_of_round(name, number)
            all_files, merged = self.further_round(of_round, checkpoints[-1], all_files)
            checkpoints.append(
                self.train(of_round, objective, merged, changes=changes, start=checkpoints[-1])
            )
        return checkpoints

    def further_round(
        self,
        name: str,
        checkpoint: str,
        files: Sequence[str],
        *,
        identity: str | None = None,
        keep_clean: bool = True,
    ) -> tuple[list[str], str]:
        """Generates with a model on the prompts to learn from, and annotates.

        Args:
          name: The name of the round's folder.
          checkpoint: The checkpoint of the model that generates.
          files: The annotated outputs of the rounds before, the original's first.
          identity: A text that tells which model it is, where outputs are kept whose checkpoint is
            not; None: the checkpoint's files tell.
          keep_clean: Whether to keep outputs of later rounds that have no mark, see `rounds.merge`.

        Returns:
          The files of all rounds, and one file with all their outputs.
        """
        prompts = self.settings.train_prompts
        more = [
            self.outputs_of(name, checkpoint, prompts, decoder, identity=identity)
            for decoder in self.training_decoders
        ]
        all_files = [*files, *more]
        return all_files, self._merged(name, all_files, "rounds", keep_clean=keep_clean)

    def answer(self, name: str, checkpoint: str, decoder: str) -> str:
        """An arm's annotated outputs for the evaluation prompts; returns the file."""
        return self.outputs_of(name, checkpoint, self.settings.eval_prompts, decoder)

    def evaluate(
        self, name: str, checkpoint: str, decoder: str, choice_share: float | None = None
    ) -> Evaluation:
        """Generates with an arm and compares with the original; returns what `evaluate` writes.

        Of `choice_share` of the prompts, which settings are chosen on, there is no certificate;
        None is that of the settings.
        """
        current = self.answer(name, checkpoint, decoder)
        original = self.make_original_outputs()[decoder]
        certificate = self._certificate(checkpoint, original, choice_share)
        inputs = {"original_records": original, "current_records": current}
        if decoder in self.make_mask_outputs():
            inputs["mask_records"] = self.make_mask_outputs()[decoder]
        tokens = str(self.files_of(name).tokens(decoder))
        found = self._compared(
            name,
            decoder,
            inputs,
            settings={"tokens_output": tokens, "certificate": certificate},
            checkpoints=[self.original, checkpoint],
        )
        if decoder == self.first_decoder and (before := self.make_unrelated_outputs()) is not None:
            of_arm, prompts = _unrelated_name(name), self.settings.unrelated_prompts
            after = self.outputs_of(of_arm, checkpoint, prompts, decoder)
            self._compared(
                of_arm,
                decoder,
                {"original_records": before, "current_records": after},
                settings={"certificate": self._certificate(checkpoint, before, 0.0)},
                checkpoints=[self.original, checkpoint],
            )
            found = msgspec.structs.replace(found, unrelated=self.unrelated(name))
        return found

    def _certificate(
        self, checkpoint: str, original_records: str, choice_share: float | None
    ) -> Any:
        """The certificate's settings: the original's states are kept if training keeps them."""
        choice = self.settings.original_choice(path=self.original)
        folder = choice.states_folder(original_records, str(self.root))
        certificate = self.settings.certificate(
            original_checkpoint_path=self.original,
            checkpoint_path=checkpoint,
            states_dir=folder if choice.is_cached else None,
        )
        if choice_share is None:
            return certificate
        return dataclasses.replace(certificate, choice_share=choice_share)

    def unrelated(self, name: str) -> evaluations.Unrelated | None:
        """What an arm changed on prompts of other tasks, if it was evaluated on any."""
        file = self.files_of(_unrelated_name(name)).evaluation(self.first_decoder)
        if self.settings.unrelated_prompts is None or not file.exists():
            return None
        found = evaluations.read(file, has_certificate=True)
        assert found.certificate is not None
        return evaluations.Unrelated(
            kl=found.certificate.positive_collateral,
            unchanged=found.comparison.exact_match,
            num_positive=found.certificate.num_positive,
        )

    def evaluate_mask(self, decoder: str) -> Evaluation:
        """Compares what the mask leaves with the original; returns what `evaluate` writes."""
        masked = self.make_mask_outputs()[decoder]
        inputs = {
            "original_records": self.make_original_outputs()[decoder],
            "current_records": masked,
            "mask_records": masked,
        }
        return self._compared(results.MASK, decoder, inputs, {"certificate": None}, [])

    def _compared(
        self,
        name: str,
        decoder: str,
        inputs: Mapping[str, str],
        settings: Mapping[str, Any],
        checkpoints: Sequence[str],
    ) -> Evaluation:
        output = self.files_of(name).evaluation(decoder)
        self._stages.run(
            f"{name}: evaluate, {decoder}",
            self.settings.evaluate,
            output=str(output),
            inputs=inputs,
            settings={"vocabulary": self.vocabulary, "print_table": False, **settings},
            also_depends_on=checkpoints,
        )
        return evaluations.read(output)

    def report(self, names: Sequence[str]) -> pathlib.Path:
        """Writes the page that shows every arm, output by output; `summary.json` is there."""
        page = self.root / "report.html"
        files = [
            str(file)
            for name in names
            for decoder in self.settings.decoders
            for file in (
                self.files_of(name).annotated(decoder),
                self.files_of(name).tokens(decoder),
            )
        ]
        self._stages.run(
            "report",
            report.report,
            output=str(page),
            inputs={},
            settings={"pipeline_dir": str(self.root)},
            also_depends_on=[
                str(self.root / "summary.json"),
                *self.make_original_outputs().values(),
                *files,
            ],
            version=__version__,
        )
        return page

    def hand_back(self, name: str, checkpoint: str) -> None:
        """Writes an arm's model in the format that the original came in, if that is another.

        Adapters of a model in Hugging Face's format are also written by themselves.
        """
        came_as = self._came_as.output_format
        formats = [] if came_as == "orbax" else [came_as]
        if came_as == "huggingface" and pretrained.open_checkpoint(checkpoint).adapters is not None:
            formats.append("peft")
        for output_format in formats:
            self.hand_over(name, checkpoint, output_format)

    def hand_over(self, name: str, checkpoint: str, output_format: str | None = None) -> str:
        """Writes an arm's model in a format; returns where it is.

        Args:
          name: The arm's name.
          checkpoint: The checkpoint of the arm's model.
          output_format: The format to write, a setting of `convert.convert`; None is the one that
            the original came in.
        """
        output_format = output_format or self._came_as.output_format
        if output_format == "orbax":  # of a later round it is not the arm's own folder
            return str(pathlib.Path(checkpoint).parent)
        is_stacked = self._came_as.scan_layers and output_format in ("t5x", "t5x_orbax")
        output = str(self.root / name / output_format)
        self._stages.run(
            f"{name}: convert to {output_format}",
            _hand_back,
            output=output,
            inputs={
                "checkpoint": checkpoint,
                "evaluation": str(self.files_of(name).evaluation(self.first_decoder)),
            },
            settings={"output_format": output_format, "scan_layers": is_stacked},
            goes_on=True,
        )
        return output


def _write_corpus(*, output: str, corpus: Callable[[], Any]) -> None:
    corpus()
    if not pathlib.Path(output).exists():
        raise UsageError(f"Experiment.corpus: expected it to write {output}; it did not.")


def _train_vocabulary(*, output: str, texts_of: str, vocab_size: int) -> None:
    rows = records.read_records(texts_of)
    texts = [text for row in rows for text in (row.inputs, row.targets)]
    tokenization.train_sentencepiece(texts, output, vocab_size=vocab_size)


def _hand_back(
    *, output: str, checkpoint: str, evaluation: str, output_format: str, scan_layers: bool
) -> None:
    if pathlib.Path(output).exists():  # of a run that was stopped
        shutil.rmtree(output)
    convert.convert(
        input=checkpoint,
        output=output,
        output_format=output_format,
        scan_layers=scan_layers,
        evaluation=evaluation if output_format in ("huggingface", "peft") else None,
    )
