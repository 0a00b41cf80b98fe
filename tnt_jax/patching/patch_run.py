"""A patch, from what the original says to a few prompts to the numbers of the patched model."""

import dataclasses
import json
import math
import resource
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from tnt_jax import generate, localize, pipeline
from tnt_jax.checkpoints import lazy_arrays, pretrained
from tnt_jax.data import marks, records
from tnt_jax.evaluation import results
from tnt_jax.experiments.experiment import TRAINING_OUTPUTS, Arm, Experiment
from tnt_jax.experiments.experiment_run import ExperimentRun, open_run
from tnt_jax.localization import prefix_values
from tnt_jax.models import families
from tnt_jax.patching import choices, patch_numbers, pipeline_gin, prompt_files, search
from tnt_jax.patching.asked import (
    Asked,
    is_decoder_only,
)
from tnt_jax.patching.choices import Choice, Counts
from tnt_jax.runtime import console, files, program, stages
from tnt_jax.runtime.errors import UsageError

_PATIENCE = 120.0  # seconds of looking for something unwanted, where the pilot has none
_NUM_SHOWN = 10
_TO_LEARN_FROM = "outputs to learn from"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Patched:
    """The result of a patch.

    Attributes:
      model: Path of the patched model, in the format asked for.
      numbers: What `patch.json` holds.
      table: Rows of (what, the original's, the patched model's), as printed.
      examples: Changed outputs, the worst first: input, original, patched.
      report: Path of the report page.
    """

    model: str
    numbers: Mapping[str, Any]
    table: Sequence[tuple[str, str, str]]
    examples: Sequence[Mapping[str, str]]
    report: str


def configure(gin: pipeline_gin.PipelineGin, flags: Sequence[str] = ()) -> tuple[Experiment, Arm]:
    """Has gin read the file: the experiment, and the arm.

    Args:
      gin: What has written the file.
      flags: Further arguments of the command line; none are the user's settings, which are in the
        file as well, so that what is wrong is said of flags.

    Raises:
      UsageError: A setting does not fit.
    """
    arguments = [f"--gin_file={gin.path}", *(flags or gin.flags)]
    program.configure("tnt_jax.pipeline", "pipeline", arguments, is_all_chosen=gin.is_all_chosen)
    found = program.bound_arguments(pipeline.pipeline, ("experiment", "arms", "num_rounds"))
    names = [arm.name for arm in found["arms"]]
    if len(names) != 1:
        raise UsageError(f"ARMS: expected one arm to train, found {', '.join(names) or 'none'}.")
    gin.check(found["experiment"])
    found["experiment"].check_names([*names, search.FOLDER, "prompts"])
    for arm in found["arms"]:
        found["experiment"].check_arm(arm.name, lambda arm=arm: arm.objective, arm.changes)
    if found["num_rounds"] != 1:
        raise UsageError(
            f"NUM_ROUNDS: expected none, or 1, found {found['num_rounds']}: patch adds rounds "
            "itself where they help. 1 turns that off; for rounds that you choose, use pipeline."
        )
    return found["experiment"], found["arms"][0]


def localized_model(checkpoint_path: str, states_folder: str) -> localize.OriginalModel:
    """The original for `localize`, with the settings that gin has for making its outputs.

    Args:
      checkpoint_path: The original's checkpoint.
      states_folder: Folder of its decoder states.
    """
    names = ("model", "task_feature_lengths", "batch_size", "mesh_shape")
    return localize.OriginalModel(
        checkpoint_path=checkpoint_path,
        states_folder=states_folder,
        **program.bound_arguments(generate.generate, names),
    )


def _num_marked(file: str) -> int:
    return sum(row.says_unwanted for row in records.iterate(file))


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Pilot:
    """What the original said to a few prompts, and what is known before it says more.

    Attributes:
      network: Its sizes.
      prompt_lengths: Tokens of every prompt.
      files: Annotated outputs, by the decoder that made them.
      counts: How many outputs there are, and how many are marked.
      output_lengths: Their tokens.
      num_unended: Those that did not end by themselves.
      seconds: That one of them took.
    """

    network: choices.Network
    prompt_lengths: Sequence[int]
    files: Mapping[str, str]
    counts: Counts
    output_lengths: Sequence[int]
    num_unended: int
    seconds: float

    @property
    def most_marked(self) -> str:
        """The file with the most marked outputs.

        Of two ways to decode one may say nothing unwanted: nothing can be learned from that one.
        """
        return max(self.files.values(), key=_num_marked)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Split:
    """How many prompts are for what.

    Attributes:
      num_train: To learn from.
      choice_prompts: The file of those to choose by.
      num_choice: How many these are.
      num_report: To report on.
    """

    num_train: int
    choice_prompts: str
    num_choice: int
    num_report: int


class PatchRun:
    """One patch, from the pilot to the numbers; each step is made of stages that are kept."""

    def __init__(self, asked: Asked, texts: prompt_files.Texts, machine: choices.Machine):
        self._asked, self._texts, self._machine = asked, texts, machine
        self._root, self._began = asked.root, time.monotonic()
        self._gin = asked.gin(asked.root)
        self._chosen: list[Choice] = []
        self._more: list[dict[str, Any]] = []  # what is chosen beside settings

    @property
    def _has_eval_prompts(self) -> bool:
        return self._asked.eval_prompts is not None

    def say(self, text: str) -> None:
        """A line with the time since the beginning."""
        console.say(f"{console.duration(time.monotonic() - self._began):>7}  {text}")

    def run(self, is_dry: bool) -> Patched | None:
        """Makes the patch; None where it is dry, which only tells what would be done."""
        parts = self._texts.parts
        for note in self._texts.notes:
            self.say(note)
        what = "outputs" if self._asked.unwanted.are_outputs_given else "prompts"
        self.say(
            f"{len(parts.train)} {what} to learn from, up to {len(parts.choice)} to choose by, up "
            f"to {len(parts.report)} to report on."
        )
        # What the model says, and how often it is unwanted.
        opened, pilot = self._look_at_the_original()
        if is_dry:  # before anything is refused: wrong marks may be the reason
            self._print_unwanted(pilot)
        split = self._choose(opened, pilot)
        if is_dry:
            return self._dry(pilot, split)
        # What it learns from, and by how much it would have to change.
        opened, arm, counts = self._training_outputs(split.num_train)
        found = self._search(opened, arm, counts, pilot, split)
        # The result is what a pipeline with these settings makes.
        self._gin.write(self._chosen, found)
        experiment, arm = configure(self._gin)
        self.say(
            f"Taken: {found.best}. Now the {split.num_report} prompts that nothing was chosen by."
        )
        outcome = pipeline.run_stages(experiment, [arm])
        output_format = None if self._asked.output_format == "same" else self._asked.output_format
        model = outcome.opened.hand_over(arm.name, outcome.models[arm.name], output_format)
        return self._finish(outcome, arm, found, model, pilot.network.is_decoder_only)

    # -------------------------------------------------------------------------------- The pilot

    def _write_prompts(self, name: str, rows: Sequence[records.Record], whole: bool = False) -> str:
        """Writes a file of prompts; as a whole, with all that is said of given outputs."""
        path = self._root / "prompts" / f"{name}.jsonl"
        everywhere = self._texts.everywhere if whole else ()
        return prompt_files.write(path, rows, whole=whole, everywhere=everywhere)

    def _configured(self) -> tuple[ExperimentRun, Arm]:
        """The experiment as chosen so far."""
        self._gin.write(self._chosen)
        experiment, arm = configure(self._gin)
        return open_run(experiment), arm

    def _look_at_the_original(self) -> tuple[ExperimentRun, _Pilot]:
        """What it says to a few prompts.

        Raises:
          UsageError: None of it is unwanted.
        """
        network, prompt_lengths = self._sizes()
        self._chosen = choices.before_pilot(self._gin.given, prompt_lengths, network, self._machine)
        if self._asked.unwanted.labels:
            self._localize(self._asked.unwanted.labels)
        parts = self._texts.parts
        self._texts.write_words(self._root)
        different = list({row.prompt: row for row in parts.train}.values())
        some = different[: choices.PILOT]
        is_begun = (self._root / "prompts" / "train.jsonl").is_file()
        if not is_begun:  # where it goes on they are there
            self._write_prompts("report", parts.report)
            # The last one: that it is there says that both are.
            self._write_prompts("train", some, self._asked.unwanted.are_outputs_given)
        opened, _ = self._configured()

        def answered(name: str, prompts: Sequence[records.Record]) -> _Pilot:
            file = self._write_prompts(name, prompts)
            return _answered(opened, name, file, network, prompt_lengths)

        found = answered("pilot", some)
        counts = found.counts
        self.say(
            f"{counts.outputs} answers of the original: {counts.marked} ({counts.share:.0%}) have "
            "something unwanted."
        )
        if counts.marked:
            return opened, found
        # Nothing: as many more as two minutes allow.
        most = min(int(_PATIENCE / (found.seconds * len(found.files))), len(different))
        if most > len(some):
            self.say(f"None of it: looking at {most} answers.")
            found = answered("pilot_more", different[:most])
        if not found.counts.marked:
            raise UsageError(
                f"the model never says it: none of {found.counts.outputs} outputs has anything "
                f"unwanted, by {opened.annotator.description}. See what it says in "
                f"{self._root / 'pilot'}; give prompts that bring it up, another list, or "
                "--decoding=sampled."
            )
        return opened, found

    def _sizes(self) -> tuple[choices.Network, list[int]]:
        """The sizes of the network, and the tokens of every prompt."""
        self._gin.write([])
        experiment, _ = configure(self._gin)
        parts, vocabulary = self._texts.parts, experiment.vocabulary()
        rows = [*parts.train, *parts.choice, *parts.report]
        config = pretrained.open_checkpoint(self._asked.model).config
        shapes = lazy_arrays.shapes(families.network_of(config).abstract_params())
        network = choices.Network(
            is_decoder_only=is_decoder_only(config),
            num_layers=config.total_layers,
            num_params=sum(map(math.prod, shapes.values())),
            emb_dim=config.emb_dim,
            num_heads=config.num_heads,
            vocab_size=config.vocab_size,
        )
        return network, [len(marks.prompt_ids(row, vocabulary)) for row in rows]

    def _localize(self, field: str) -> None:
        """Finds which tokens made outputs bad, in those to learn from."""
        rows = self._texts.parts.train
        labelled = self._write_prompts("labelled", rows, whole=True)
        self._gin.write(self._chosen)
        experiment, _ = configure(self._gin)
        output = str(self._root / "prompts" / "localized.jsonl")
        states = f"{labelled}.states"
        num_bad = sum(bool(row.extra[field]) for row in rows)
        self.say(
            f"{num_bad} of {len(rows)} outputs are labelled bad. Looking for what made them so."
        )
        training = prefix_values.Training()
        num_updates = choices.head_updates(len(rows), training.batch_size)
        stages.Stages(self._root).run(
            "labels: localize",
            localize.localize,
            output=output,
            inputs={"input": labelled},
            settings={
                "original_model": localized_model(self._asked.model, states),
                "vocabulary": experiment.vocabulary(),
                "label_field": field,
                "training": dataclasses.replace(training, num_updates=num_updates),
            },
        )
        # Nothing reads them again, and they may be large. Of a stage that was stopped they stay.
        shutil.rmtree(states, ignore_errors=True)
        self._texts, note = self._texts.with_marks_found(records.read_records(output))
        self.say(note)

    # ------------------------------------------------------------------------------ The choices

    def _choose(self, opened: ExperimentRun, pilot: _Pilot) -> _Split:
        """Chooses the rest, and prints it."""
        parts = self._texts.parts
        lengths = [*pilot.output_lengths]
        if self._asked.unwanted.are_outputs_given:
            encode = opened.vocabulary.encode_reply
            lengths += [len(encode(row.targets, row.inputs)) + 1 for row in parts.train]
        self._chosen = choices.after_pilot(
            self._gin.given,
            pilot.prompt_lengths,
            lengths,
            pilot.num_unended,
            pilot.network,
            self._machine,
            needs_adapters=self._asked.output_format == "peft",
        )
        available = len(parts.train)
        if self._asked.unwanted.are_outputs_given:
            number, reason = available, "all that are marked"
        else:
            number, reason = choices.training_outputs(
                pilot.counts, available, has_eval_prompts=self._has_eval_prompts
            )
        self._note(_TO_LEARN_FROM, number, reason, "--prompts")
        to_choose, reason = choices.num_to_choose_by(len(parts.choice), pilot.counts)
        choice_prompts = self._write_prompts("choice", parts.choice[:to_choose])
        self._note("prompts to choose by", to_choose, reason, "--eval_prompts")
        to_report, reason = choices.num_to_report_on(len(parts.report), pilot.counts)
        self._write_prompts("report", parts.report[:to_report])
        self._note("prompts to report on", to_report, reason, "--eval_prompts")
        for choice in self._chosen:
            self._print(choice.what, choice.value, choice.reason, choice.flag)
        # The user's settings of an optimizer have to be those of the one that is taken. Which rate
        # it will have does not matter for that.
        any_looks = choices.Looks(period=1, number=1, reason="")
        rate = choices.learning_rate(self._gin.given, self._chosen, any_looks)
        self._gin.write([*self._chosen, rate])
        configure(self._gin)
        return _Split(
            num_train=number,
            choice_prompts=choice_prompts,
            num_choice=to_choose,
            num_report=to_report,
        )

    def _note(self, what: str, value: Any, reason: str, flag: str) -> None:
        """Something chosen that is no setting of gin's; what was said of it before is replaced."""
        self._more = [each for each in self._more if each["what"] != what]
        self._more.append({"what": what, "value": value, "reason": reason, "flag": flag})
        self._print(what, value, reason, flag)

    def _print(self, what: str, value: Any, reason: str, flag: str) -> None:
        shown = json.dumps(value) if isinstance(value, Mapping) else str(value).lstrip("@")
        console.say(f"           {what}: {shown.removesuffix('()')} - {reason} ({flag})")

    # ---------------------------------------------------------------------- The training outputs

    def _training_outputs(self, number: int) -> tuple[ExperimentRun, Arm, Counts]:
        """The outputs to learn from, more of them where too few are marked."""
        train = self._texts.parts.train
        is_given = self._asked.unwanted.are_outputs_given
        file = self._root / "prompts" / "train.jsonl"
        # Where it goes on, it is known whether there were to be more.
        number = max(number, sum(1 for _ in records.iterate(file)))
        while True:
            self._write_prompts("train", train[:number], is_given)
            opened, arm = self._configured()
            rows = [row.says_unwanted for row in records.iterate(opened.make_training_outputs())]
            counts = Counts(outputs=len(rows), marked=sum(rows))
            self.say(f"{counts.outputs} outputs to learn from: {counts.marked} are marked.")
            more = number
            if not is_given:
                made_by = opened.training_decoders
                seconds = opened.seconds_of_outputs(TRAINING_OUTPUTS, made_by) or 0.0
                more = choices.more_training_outputs(
                    dataclasses.replace(counts, outputs=number),
                    len(train),
                    max(seconds / number, 1e-6),
                    self._asked.seconds,
                )
                # With more time: what was looked at so far learned from these.
                if more > number and (self._root / search.FOLDER).is_dir():
                    reason = f"as many as the looks so far are of; {more} take another folder"
                    self._note(_TO_LEARN_FROM, number, reason, "--output")
                    more = number
            if counts.marked < choices.FEWEST_MARKED:
                if number == len(train):
                    raise UsageError(
                        choices.too_rare(
                            counts,
                            number,
                            has_eval_prompts=self._has_eval_prompts,
                            flag="--prompts" if self._asked.prompts else "--records",
                        )
                    )
                more = max(more, min(2 * number, len(train)))
            if more == number:
                return opened, arm, counts
            self.say(f"They are cheap, or too few: {more} are made.")
            number = more

    # ------------------------------------------------------------------------------- The search

    def _search(
        self, opened: ExperimentRun, arm: Arm, counts: Counts, pilot: _Pilot, split: _Split
    ) -> search.Found:
        of_original = search.original_outputs(opened, split.choice_prompts)
        before = {name: search.unwanted_in(file) for name, file in of_original.items()}
        least = min((number for number in before.values() if number), default=0)
        if not least:
            raise UsageError(
                f"of the original's outputs on the prompts to choose by none is unwanted, although "
                f"{pilot.counts.marked} of {pilot.counts.outputs} others are: expected some, to "
                "measure the wish on. Give more --prompts or --eval_prompts."
            )
        when = choices.looks(counts, self._chosen)
        updates = [when.period * number for number in range(1, when.number + 1)]
        reason = f"{when.reason}; at most {when.number} at a weight"
        if isinstance(steps := self._gin.given.get("TRAIN_STEPS"), int):
            updates, reason = [steps], "given"
        self._note("updates from look to look", updates[0], reason, "--gin.TRAIN_STEPS")
        self._add_learning_rate(when)
        opened, arm = self._configured()
        attempts, reason = self._attempts(arm)
        shown = "; ".join(map(str, attempts))
        self._note("attempts", shown, reason, f"--gin.{pipeline_gin.WEIGHT}")
        enough = choices.threshold(self._asked.cut, least)
        self.say(
            f"Of the prompts to choose by, {_listed(before)} unwanted. The wish of "
            f"{self._asked.cut:.1%} counts as fulfilled with a cut of {enough:.1%} there: one "
            "standard error more."
        )
        # The pilot's outputs were made while programs compiled, and took longer than these.
        seconds = opened.seconds_of_outputs("choice", [opened.first_decoder])
        of_output = pilot.seconds if seconds is None else seconds / split.num_choice
        last = 2.5 * split.num_report * len(before) * of_output
        plan = search.Plan(
            enough=enough,
            attempts=attempts,
            updates=updates,
            prompts=split.choice_prompts,
            deadline=self._began + self._asked.seconds - last,
        )
        found = self._searched(opened, arm, plan, of_original)
        if found.is_enough:
            self.say(f"Fulfilled: {found.reason}.")
        else:
            self.say(
                f"Not fulfilled: {found.reason}. The largest cut was {found.best.cut:.1%}, of "
                f"{found.best}, which is taken."
            )
        return found

    def _attempts(self, arm: Arm) -> tuple[Sequence[search.Attempt], str]:
        """What is tried, one after the other, and why."""
        if self._gin.is_weight_given:
            return [search.Attempt(weight=arm.objective.negative_weight)], "given"
        # Nobody would mark what a round says, or rounds are not wanted.
        has_rounds = (
            not self._asked.unwanted.are_outputs_given and "NUM_ROUNDS" not in self._gin.given
        )
        return (
            search.ROUNDS if has_rounds else search.WEIGHTS,
            "one after the other, while it takes more",
        )

    def _searched(
        self, opened: ExperimentRun, arm: Arm, plan: search.Plan, before: Mapping[str, str]
    ) -> search.Found:
        """The search, or what it came to if it was over: its time does not begin anew."""
        note = self._root / "search.json"
        training = opened.describe_training(
            arm.objective, opened.make_training_outputs(), arm.changes
        )
        of_what = {
            "training": training,
            "enough": plan.enough,
            "attempts": [str(attempt) for attempt in plan.attempts],
            "updates": list(plan.updates),
            "before": {name: stages.fingerprint(file) for name, file in before.items()},
            "seconds": self._asked.seconds,
        }
        if (found := search.read_note(note, of_what)) is not None:
            for look in found.looks:
                self._told(look)
            return found
        self._take_away_what_was_finished(arm)
        found = search.search(opened, arm, plan, before, self._told)
        search.write_note(note, of_what, found)
        return found

    def _take_away_what_was_finished(self, arm: Arm) -> None:
        """Removes the result of a patch with another wish: nobody shall take it for this one's."""
        finished = self._root / "patch.json"
        if not finished.is_file():
            return
        self.say(
            f"The patch that is finished in {self._root} is replaced: its wish or time was another."
        )
        finished.unlink()
        for name in ("report.html", "summary.json", "pipeline.gin"):
            (self._root / name).unlink(missing_ok=True)
        for path in (self._root / arm.name).glob("*"):  # it may be gone
            if path.is_dir() and path.name != "model":  # a model that was handed over
                shutil.rmtree(path)
            elif path.match("*.evaluation.json"):
                path.unlink()

    def _add_learning_rate(self, when: choices.Looks) -> None:
        rate = choices.learning_rate(self._gin.given, self._chosen, when)
        self._chosen = [*self._chosen, rate]
        self._print(rate.what, rate.value, rate.reason, rate.flag)

    def _told(self, look: search.Look) -> None:
        self.say(
            f"{look}: {_listed(look.unwanted)} unwanted, a cut of {look.cut:.1%}; BLEU to the "
            f"original's outputs {look.bleu:.1f}"
        )

    def _what_else(self, reason: str) -> list[str]:
        """What would help where the wish is not fulfilled, and the search ended for a reason."""
        kind = self._asked.unwanted.kind
        tries = [
            "--time: more updates, rounds and weights" if reason == search.TIME_IS_OVER else "",
            "more --prompts: more that is marked",
        ]
        if kind in ("words", "values"):
            name = "Lexicon" if kind == "words" else "Gazetteer"
            tries.append(
                f"--gin.annotators.{name}.at_every_position=True: remove the list wherever it "
                "could be said, not only where it was"
            )
            tries.append("a mask while decoding, if the decoder is yours (docs/limits.md)")
        else:
            tries.append("alternatives: name what would be just as wrong (docs/howto_mark.md)")
        return [f"What else would help: {line}" for line in tries if line]

    # ---------------------------------------------------------------------------------- The end

    def _finish(
        self,
        outcome: pipeline.Outcome,
        arm: Arm,
        found: search.Found,
        model: str,
        is_decoder_only: bool,
    ) -> Patched:
        """The numbers on the prompts that nothing was chosen by."""
        opened, by_decoder = outcome.opened, {}
        table: list[tuple[str, str, str]] = []
        examples: list[Mapping[str, str]] = []
        for decoder, evaluation in outcome.evaluations[arm.name].items():
            current = str(opened.files_of(arm.name).annotated(decoder))
            before, after = records.read_pairs(opened.make_original_outputs()[decoder], current)
            interval = results.intervals(before, {arm.name: after}, "")[arm.name]["cut_interval"]
            numbers = patch_numbers.numbers(evaluation, interval)
            by_decoder[decoder] = numbers
            rows = patch_numbers.rows(numbers)
            console.table(
                rows,
                columns=(f"{decoder} outputs on {len(before)} new prompts", "original", "patched"),
            )
            table = table or rows
            examples = examples or patch_numbers.examples(before, after)
        for example in examples:
            lines = (f"           {name:<9} {text}" for name, text in example.items())
            console.say("\n" + "\n".join(lines))
        verdict, is_short = patch_numbers.verdict(by_decoder, self._asked.cut)
        decoder = patch_numbers.deciding(by_decoder)
        is_fulfilled = None if decoder is None else not is_short
        decoder = decoder or opened.first_decoder
        same = self._gin.command
        loads = patch_numbers.lines_that_load(model, is_decoder_only, self._asked.output_format)
        numbers = {
            "decoder": decoder,
            **by_decoder[decoder],
            "wish": self._asked.cut,
            "is_wish_fulfilled": is_fulfilled,
            "is_wish_fulfilled_on_choice_prompts": found.is_enough,
            "weight": found.best.attempt.weight,
            "round": found.best.attempt.round,
            "updates": found.best.updates,
            "looks": [dataclasses.asdict(look) for look in found.looks],
            "ended_because": found.reason,
            "decoders": by_decoder,
            "choices": [*map(patch_numbers.as_json, self._chosen), *self._more],
            "annotator": opened.annotator.description,
            "model": model,
            "loads": loads,
            "report": str(outcome.page),
            "same_by_pipeline": same,
            "seconds": round(time.monotonic() - self._began, 1),
        }
        files.write_json(self._root / "patch.json", numbers)
        console.say("")
        self.say(verdict)
        if is_short or not found.is_enough:
            for line in self._what_else(found.reason):
                console.say(f"    {line}")
        console.say(f"The patched model: {model}")
        for line in loads:
            console.say(f"    {line}")
        console.say(f"Before and after, output by output: {outcome.page.resolve().as_uri()}")
        console.say(f"The same by pipeline: {same}")
        return Patched(
            model=model, numbers=numbers, table=table, examples=examples, report=str(outcome.page)
        )

    # ------------------------------------------------------------------------------- A dry run

    def _dry(self, pilot: _Pilot, split: _Split) -> None:
        """Prints what the whole would take, from three updates; leaves the pilot alone."""
        name = "dry_run"
        number = split.num_train
        counts = Counts(outputs=number, marked=round(pilot.counts.share * number))
        when = choices.looks(counts, self._chosen)
        self._add_learning_rate(when)
        opened, arm = self._configured()
        changed = dataclasses.replace(arm.changes, schedule={"train_steps": 3, "log_every": 1})
        opened.train(name, arm.objective, pilot.most_marked, changes=changed)
        lines = (self._root / name / "model" / "metrics.jsonl").read_text("utf-8").splitlines()
        last = json.loads(lines[-1])
        of_update = last["num_tokens"] / max(last["tokens_per_second"], 1e-9)
        shutil.rmtree(self._root / name)
        stages.note_path(self._root, f"{name}: train").unlink(missing_ok=True)
        of_output, num_decoders = pilot.seconds, len(pilot.files)
        num_choice, num_report = (num_decoders * n for n in (split.num_choice, split.num_report))
        made = number * len(opened.training_decoders)
        if self._asked.unwanted.are_outputs_given:
            made = 0
        once = of_output * (made + num_choice + 2 * num_report)
        period, num_looks = when.period, when.number
        if isinstance(steps := self._gin.given.get("TRAIN_STEPS"), int):
            period, num_looks = steps, 1
        of_look = period * of_update + num_choice * of_output
        least = once + min(1 + search.NO_MORE, num_looks) * of_look
        most = once + num_looks * len(self._attempts(arm)[0]) * of_look
        self.say(
            f"An update takes {of_update:.2f} s, an output {of_output:.2f} s: "
            f"{console.duration(least)} if the first look is the best one, and at most "
            f"{console.duration(min(most, max(self._asked.seconds, least)))} (--time)."
        )
        self.say(f"Memory, at its peak so far: {_peak_bytes() / 2**30:.2f} GiB.")
        self.say("Nothing was trained for good: leave out --dry_run, and the pilot is used again.")

    def _print_unwanted(self, pilot: _Pilot) -> None:
        """Prints some answers of the original that have something unwanted, with their marks."""
        rows = [row for row in records.iterate(pilot.most_marked) if row.has_unwanted_text]
        for row in rows[:_NUM_SHOWN]:
            console.say(f"           {patch_numbers.with_marks(row)}")


def _answered(
    opened: ExperimentRun,
    name: str,
    prompts: str,
    network: choices.Network,
    prompt_lengths: Sequence[int],
) -> _Pilot:
    """The original's answers to prompts, with every decoder."""
    decoders = opened.settings.decoders
    files = {
        decoder: opened.outputs_of(name, opened.original, prompts, decoder) for decoder in decoders
    }
    rows = [row for file in files.values() for row in records.iterate(file)]
    ends = opened.vocabulary.end_ids.union(*(decoder.end_ids for decoder in decoders.values()))
    seconds = opened.seconds_of_outputs(name, files) or 0.0
    return _Pilot(
        network=network,
        prompt_lengths=prompt_lengths,
        files=files,
        counts=Counts(outputs=len(rows), marked=sum(row.has_unwanted_text for row in rows)),
        output_lengths=[len(row.target_ids or ()) for row in rows],
        num_unended=sum(ends.isdisjoint(row.target_ids or ()) for row in rows),
        seconds=max(seconds / len(rows), 1e-3),
    )


def _listed(unwanted: Mapping[str, int]) -> str:
    if len(unwanted) == 1:
        return f"{next(iter(unwanted.values()))} outputs are"
    return " and ".join(f"{number} {decoder}" for decoder, number in unwanted.items()) + " ones are"


def _peak_bytes() -> int:
    """The most memory so far: of a device, or on a CPU of this process."""
    device = jax.devices()[0]
    stats = device.memory_stats() if device.platform != "cpu" else None
    if stats and "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
