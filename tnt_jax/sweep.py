r"""Compares objectives, weights, learning rates and seeds: who cuts how much, at what change.

Every arm starts from one original, trains on the same annotated outputs and is evaluated on the
same prompts, as in `pipeline`. A sweep that was stopped resumes. Several processes may share one
(NUM_PROCESSES, PROCESS_INDEX); each takes its own part of the arms.

It writes `results.json` and, as tables, `results.md`. In `results.json`, "rows" has each arm,
weight, rate, seed and decoder on the prompts that were not used to choose weights; "choice_rows"
has the same on the prompts that were; "chosen" has each arm at its chosen weight and rate, averaged
over seeds, with intervals over prompts. "steps" and "train_seconds" count all rounds of an arm.
"settings" has the version of this package, and as "gin" all settings that the run was given.

When all arms are done, those on the frontier of cut and BLEU can be run with further seeds
(FRONTIER_SEEDS). Of many weights and rates most are not chosen: ONLY_CHOSEN_IN_FULL spares these
the certificate, unrelated prompts and all decoders but the first.

Example:
    python -m tnt_jax.sweep --gin_file=models/from_checkpoint.gin --gin_file=runs/sweep.gin \
      --gin.ORIGINAL_CHECKPOINT_PATH=flan-t5-small --gin.TRAIN_PROMPTS=prompts.jsonl \
      --gin.EVAL_PROMPTS=other_prompts.jsonl --gin.ANNOTATOR=@annotators.Lexicon \
      --gin.annotators.Lexicon.path=words.txt --gin.TRAIN_STEPS=200 --gin.OUTPUT_DIR=runs/sweep
"""

import contextlib
import dataclasses
import itertools
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import msgspec

from tnt_jax import __version__, objectives
from tnt_jax.data import records
from tnt_jax.evaluation import evaluations, results, tables
from tnt_jax.experiments.experiment import Changes, Experiment, check_rounds
from tnt_jax.experiments.experiment_run import ExperimentRun, open_run
from tnt_jax.runtime import console, files, holding, operative_config, program, stages
from tnt_jax.runtime.errors import UsageError

_ARM = ("decoder", "objective")  # of one weight and rate each: rows that have these alike
_FEWEST = 5  # unwanted outputs to choose weights by: fewer are chance
_FEWEST_TO_REPORT = 2  # prompts: what one says has no interval


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grid:
    """Arms: every objective with every weight, learning rate and seed, trained alike.

    Attributes:
      objectives: The objectives, by their names in `objectives.TERMS`.
      alphas: Weights of the negative term.
      seeds: Random seeds of the order of examples, of new adapters and of dropout.
      rates: What the experiment's learning rate is multiplied by. As the weight, one is chosen for
        every objective.
      variant: What is special, for tables; "" is nothing.
      objective_settings: Further arguments of `objectives.TntObjective`.
      train: Further arguments of `train.train`.
      update: Further arguments of `settings.Update`.
      schedule: Further arguments of `settings.Schedule`.
      dataset: Further arguments of `datasets.RecordFiles`.
      annotator: Makes the annotator of the training outputs, if it is not the experiment's.
      training_decoders: Names of the decoders that make the training outputs; empty is those of the
        experiment. Outputs of several are brought together as those of rounds are.
      localize: `localize.localize` with its settings bound: arms learn from what it makes of the
        annotated training outputs, such as strengths that look ahead. None: from these themselves.
      num_rounds: Rounds of generating, annotating and training.
    """

    objectives: Sequence[str]
    alphas: Sequence[float]
    seeds: Sequence[int] = (0,)
    rates: Sequence[float] = (1.0,)
    variant: str = ""
    objective_settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    train: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    update: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    schedule: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    dataset: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    annotator: Callable[[], Any] | None = None
    training_decoders: Sequence[str] = ()
    localize: Callable[..., Any] | None = None
    num_rounds: int = 1


# What makes the original's outputs to learn from, and is not for those of a patched model.
_OF_FIRST_ROUND = {
    "localize": "values are those of the original's own outputs.",
    "annotator": "further rounds are annotated by the experiment's.",
    "training_decoders": "further rounds decode as the experiment's TRAINING_DECODERS.",
}


@dataclasses.dataclass(frozen=True)
class _Cell:
    """One arm of a sweep, with one seed."""

    grid: Grid
    objective: str
    alpha: float
    rate: float
    seed: int
    in_full: bool = True  # or by what the first decoder says, without a certificate

    @property
    def labels(self) -> dict[str, Any]:
        """What tells its rows from those of other arms."""
        variant = f", {self.grid.variant}" if self.grid.variant else ""
        return {
            "objective": self.objective + variant,
            "alpha": float(self.alpha),
            "rate": None if self.rate == 1 else float(self.rate),
            "seed": self.seed,
        }

    @property
    def name(self) -> str:
        """The name of its folder."""
        return _name_of(self.labels)

    def make_objective(self) -> objectives.TntObjective:
        """Its loss per token."""
        return objectives.named(
            self.objective, negative_weight=float(self.alpha), **self.grid.objective_settings
        )

    @property
    def changes(self) -> Changes:
        """What its training has otherwise than the experiment."""
        update = self.grid.update
        if self.rate != 1:
            update = {**update, "learning_rate_factor": float(self.rate)}
        return Changes(
            train=self.grid.train,
            update=update,
            schedule={"seed": self.seed, **self.grid.schedule},
            dataset=self.grid.dataset,
        )


def _name_of(row: Mapping[str, Any]) -> str:
    if row["alpha"] is None:
        return row["objective"]
    rate = "" if row["rate"] is None else f", rate {row['rate']:g}"
    return f"{row['objective']}, alpha {row['alpha']:g}{rate}, seed {row['seed']}"


def sweep(
    *,
    experiment: Experiment,
    task: str,
    grids: Sequence[Grid],
    cut: float = 0.75,
    baseline: str = "UL+LL",
    frontier_seeds: Sequence[int] = (),
    only_chosen_in_full: bool = False,
    choice_share: float = 0.5,
    num_resamples: int = 1000,
    name: str = "results",
    process_index: int = 0,
    num_processes: int = 1,
) -> dict[str, Any]:
    """Runs every arm that is not done, and writes what came out in numbers and as tables.

    Args:
      experiment: What the arms share.
      task: Its name, for tables.
      grids: The arms.
      cut: Share of unwanted outputs that is enough: of the weights and rates that reach it those
        with the most BLEU are chosen, by the outputs of the first decoder.
      baseline: The arm that others are tested against: an objective, and its variant after a comma
        ("UL+LL, 400 updates"). Where there is no such arm, nothing is tested.
      frontier_seeds: When all arms are done, those on the frontier of the prompts that weights are
        chosen on, and the baseline, are run with these seeds too, at what was chosen for them.
      only_chosen_in_full: An arm answers the evaluation prompts with the first decoder, which is
        what weights and rates are chosen by; when all arms have, those at what was chosen for them
        are measured in full: with every decoder, the certificate and unrelated prompts. Rows of the
        others lack these numbers.
      choice_share: The share of the evaluation prompts that weights are chosen on; results are
        reported on the others.
      num_resamples: Number of bootstrap samples for intervals.
      name: The name of the two files to write, without ".json" and ".md". Sweeps of one
        `output_dir` share the original and what it said.
      process_index: Which part of the arms this process runs; 0 also what all of them need.
      num_processes: How many share the work. They see one `output_dir`.

    Returns:
      What the JSON file holds.

    Raises:
      UsageError: Settings contradict each other, another run writes into OUTPUT_DIR, or a stage
        found a mistake.
    """
    if not 0 < choice_share < 1:
        raise UsageError(f"CHOICE_SHARE: expected more than 0, less than 1, found {choice_share}.")
    if not 0 <= process_index < num_processes:
        raise UsageError(
            f"PROCESS_INDEX: expected 0 to {num_processes - 1} of NUM_PROCESSES={num_processes}, "
            f"found {process_index}."
        )
    cells = [
        _Cell(grid, *of_cell)
        for grid in grids
        for of_cell in itertools.product(grid.objectives, grid.alphas, grid.rates, grid.seeds)
    ]
    # What is there after a stop should compare arms: all have a first seed before any a second.
    cells.sort(key=lambda cell: list(cell.grid.seeds).index(cell.seed))
    experiment.check_names([cell.name for cell in cells])
    for grid in grids:
        check_rounds(experiment, grid.num_rounds, "Grid.num_rounds")
        for setting, why in _OF_FIRST_ROUND.items():
            if grid.num_rounds > 1 and getattr(grid, setting):
                raise UsageError(
                    f"Grid.{setting}: expected num_rounds=1, found {grid.num_rounds}: {why}"
                )
        for setting in ("annotator", "training_decoders"):
            if experiment.training_records is not None and getattr(grid, setting):
                raise UsageError(
                    f"Grid.{setting}: expected none with TRAINING_RECORDS, which are annotated "
                    "outputs that all arms learn from. Leave one out."
                )
    for cell in cells:
        experiment.check_arm(cell.name, cell.make_objective, cell.changes)
    began = time.monotonic()
    share = (process_index, num_processes)
    with holding.folder(experiment.folder, "OUTPUT_DIR", None if num_processes == 1 else share):
        shared = _open(experiment, grids, task, choice_share, *share)
        in_full = not only_chosen_in_full
        cells = [dataclasses.replace(cell, in_full=in_full) for cell in cells]
        shared.run_own(cells)
        while True:
            arms, choices, rows, num_missing = _run_what_follows(
                shared, cells, cut, baseline, frontier_seeds
            )
            of_choices = _of_choices(rows["rows"], choices)
            found = {
                **rows,
                "chosen": _chosen(shared.opened, of_choices, baseline, choice_share, num_resamples),
                "settings": {
                    "task": task,
                    "cut": cut,
                    "choice_share": choice_share,
                    "version": __version__,
                    "gin": operative_config.given(),
                },
            }
            # Other processes go on while this one computes: nobody may write less over more.
            if num_processes == 1 or shared.num_missing(arms) >= num_missing:
                break
        written = shared.opened.root / f"{name}.json"
        files.write_json(str(written), found)
        text = as_markdown(found, experiment.decoders)
        files.write_text(str(written.with_suffix(".md")), text)
    console.log(text)
    missing = f" {num_missing} arms are not done yet." if num_missing else ""
    if num_missing and (frontier_seeds or only_chosen_in_full):
        missing += (
            " What is chosen by the others is run when they are done: start each process again "
            "then."
        )
    console.log(
        f"The numbers are in {written}.{missing} {time.monotonic() - began:.0f} "
        f"seconds. A report: python -m tnt_jax.report --gin_file=runs/report.gin "
        f"--gin.RESULTS={written} --gin.OUTPUT=report.html"
    )
    return found


@dataclasses.dataclass(frozen=True)
class _Shared:
    """What all arms have in common, and which of them this process runs."""

    opened: ExperimentRun
    training_outputs: Mapping[int, str]  # by the identity of a grid
    task: str
    choice_share: float
    process_index: int
    num_processes: int

    def run_own(self, cells: Sequence[_Cell], what: str = "") -> None:
        """Runs this process's share of the arms."""
        own = cells[self.process_index :: self.num_processes]
        for number, cell in enumerate(own, start=1):
            console.log(f"Arm {number} of {len(own)}{what}: {cell.name}")
            self._run(cell)

    def _run(self, cell: _Cell) -> None:
        """Trains and evaluates; a cell that is done costs the time to see that."""
        *_, checkpoint = self.opened.train_rounds(
            cell.name,
            cell.make_objective(),
            self.training_outputs[id(cell.grid)],
            cell.grid.num_rounds,
            cell.changes,
        )
        if not cell.in_full:
            self.opened.answer(cell.name, checkpoint, self.opened.first_decoder)
            return
        for decoder in self.opened.settings.decoders:
            self.opened.evaluate(cell.name, checkpoint, decoder, self.choice_share)

    def _is_done(self, cell: _Cell) -> bool:
        with contextlib.suppress(stages.NotDoneError), stages.only_done():
            self._run(cell)
            return True
        return False

    def num_missing(self, cells: Sequence[_Cell]) -> int:
        """The number of arms that no process has done yet."""
        return sum(not self._is_done(cell) for cell in cells)

    def rows(self, cells: Sequence[_Cell]) -> tuple[dict[str, list[results.Row]], int]:
        """The rows of what is done, whichever process did it; and how many arms are not."""
        arms = [cell for cell in cells if self._is_done(cell)]
        return _rows(self.opened, arms, self.task, self.choice_share), len(cells) - len(arms)


def _run_what_follows(
    shared: _Shared,
    cells: Sequence[_Cell],
    cut: float,
    baseline: str,
    frontier_seeds: Sequence[int],
) -> tuple[Sequence[_Cell], Mapping[str, results.Choice], dict[str, list[results.Row]], int]:
    """Runs this process's share of what the finished arms decide: what is measured in full, seeds.

    Returns:
      All arms; the weights and rates that were chosen; the rows of what is done; the number of arms
      that are not done.
    """
    rows, num_missing = shared.rows(cells)
    # Seeds that are added for the frontier do not choose.
    choices = results.choose(_of_decoder(rows["choice_rows"], shared.opened.first_decoder), cut)
    if not num_missing and not all(cell.in_full for cell in cells):
        cells = [dataclasses.replace(cell, in_full=_is_chosen(cell, choices)) for cell in cells]
        shared.run_own([cell for cell in cells if cell.in_full], ", measured in full")
        rows, num_missing = shared.rows(cells)
    if frontier_seeds and not num_missing:
        best = {
            row["objective"]
            for row in results.over_seeds(_of_choices(rows["choice_rows"], choices), _ARM)
            if row.get("is_pareto")
        }
        again = _with_seeds(cells, choices, {baseline, *best}, frontier_seeds)
        shared.run_own(again, ", of the frontier")
        cells = [*cells, *again]
        rows, num_missing = shared.rows(cells)
    return cells, choices, rows, num_missing


def _open(
    experiment: Experiment,
    grids: Sequence[Grid],
    task: str,
    choice_share: float,
    process_index: int,
    num_processes: int,
) -> _Shared:
    """Process 0 makes what the arms share; for the others it has to be there."""
    try:
        with stages.only_done(process_index != 0):
            opened = open_run(
                experiment, lambda rows: _check_halves(rows, choice_share, "EVAL_PROMPTS")
            )
            for decoder, file in opened.make_original_outputs().items():
                rows = [*records.iterate(file)]
                _check_halves(rows, choice_share, f"EVAL_PROMPTS, {decoder} outputs")
            training = {id(grid): _training_outputs(opened, grid) for grid in grids}
            opened.count_seen({*training.values()})
            opened.make_mask_outputs()
            opened.make_unrelated_outputs()
    except stages.NotDoneError as error:
        raise UsageError(
            f"process {process_index} of {num_processes}: expected in {experiment.output_dir} what "
            f"process 0 makes, with the same settings; stage '{error}' is not done. Start that one "
            "first."
        ) from None
    return _Shared(opened, training, task, choice_share, process_index, num_processes)


def _training_outputs(opened: ExperimentRun, grid: Grid) -> str:
    """The annotated file that a grid's arms learn from."""
    files = (
        opened.make_training_outputs()
        if not grid.training_decoders and grid.annotator is None
        else opened.training_outputs_by(
            grid.training_decoders or opened.training_decoders,
            grid.annotator() if grid.annotator else None,
        )
    )
    return files if grid.localize is None else opened.localized(files, grid.localize)


def _rows(
    opened: ExperimentRun, cells: Iterable[_Cell], task: str, choice_share: float
) -> dict[str, list[results.Row]]:
    """The numbers of arms that are done, whichever process ran them, and of the mask.

    Args:
      opened: The experiment.
      cells: The arms.
      task: The task's name, for tables.
      choice_share: The share of the evaluation prompts that weights are chosen on.
    """
    found: dict[str, list[results.Row]] = {"rows": [], "choice_rows": []}
    masks = opened.make_mask_outputs()

    def add(
        name: str,
        decoder: str,
        labels: Mapping[str, Any],
        of_training: Mapping[str, Any],
        of_report: Mapping[str, Any] | None = None,
    ) -> None:
        current = str(opened.files_of(name).annotated(decoder))
        before = opened.make_original_outputs()[decoder]
        choice, report = _parts(*records.read_pairs(before, current), choice_share)
        masked: tuple[Sequence[records.Record] | None, ...] = None, None
        if decoder in masks:
            of_parts = _parts(*records.read_pairs(before, masks[decoder]), choice_share)
            masked = tuple(of_mask for _, of_mask in of_parts)
        for key, of_part, of_mask, more in (
            ("choice_rows", choice, masked[0], {}),
            ("rows", report, masked[1], of_report or {}),
        ):
            found[key].append(
                {
                    **{"task": task, **labels, "decoder": decoder},
                    **results.measure(*of_part, of_mask),
                    **of_training,
                    **more,
                }
            )

    for cell in cells:
        steps, seconds = opened.training_of(cell.name, cell.grid.num_rounds)
        of_training = {"steps": steps, "train_seconds": seconds}
        if not cell.in_full:
            add(cell.name, opened.first_decoder, cell.labels, of_training)
            continue
        for decoder in opened.settings.decoders:
            of_report = _certificate(opened, cell.name, decoder)
            add(cell.name, decoder, cell.labels, of_training, of_report)
    for decoder in masks:
        labels = {"objective": results.MASK, "alpha": None, "rate": None, "seed": 0}
        add(results.MASK, decoder, labels, {"steps": None, "train_seconds": None})
    return found


def _certificate(opened: ExperimentRun, name: str, decoder: str) -> dict[str, Any]:
    """The numbers of an arm that need both models: of its certificate, and on unrelated prompts."""
    found = evaluations.read(opened.files_of(name).evaluation(decoder), has_certificate=True)
    if decoder == opened.first_decoder:
        found = msgspec.structs.replace(found, unrelated=opened.unrelated(name))
    return results.of_models(found)


Pairs = tuple[list[records.Record], list[records.Record]]


def _check_halves(rows: Sequence[records.Record], share: float, what: str) -> None:
    """Finds out, before the work, whether there are prompts for the choice and for the report.

    Raises:
      UsageError: There are too few; the message begins with `what`.
    """
    num_choice, num_report = results.num_prompts_for_choice(rows, share)
    if num_choice < 1 or num_report < _FEWEST_TO_REPORT:
        change = "larger" if num_choice < 1 else "smaller"
        raise UsageError(
            f"{what}: expected at least 1 to choose weights on and {_FEWEST_TO_REPORT} others to "
            f"report on, found {num_choice} and {num_report} of {num_choice + num_report} with "
            f"CHOICE_SHARE={share:g}. Give more EVAL_PROMPTS, or a {change} CHOICE_SHARE."
        )


def _parts(
    original: Sequence[records.Record], current: Sequence[records.Record], share: float
) -> tuple[Pairs, Pairs]:
    """The prompts that weights are chosen on, and the others."""
    is_choice = results.are_for_choice(original, share)
    choice, report = (
        tuple(
            [row for row, chosen in zip(rows, is_choice, strict=True) if chosen == wanted]
            for rows in (original, current)
        )
        for wanted in (True, False)
    )
    return choice, report  # pyright: ignore[reportReturnType]


def _of_decoder(rows: Sequence[results.Row], decoder: str) -> list[results.Row]:
    return [row for row in rows if row["decoder"] == decoder]


def _of_choices(
    rows: Sequence[results.Row], choices: Mapping[str, results.Choice]
) -> list[results.Row]:
    """The rows of arms at their chosen weight and rate."""
    return [row for row in rows if choices.get(row["objective"]) == results.Choice.of_row(row)]


def _is_chosen(cell: _Cell, choices: Mapping[str, results.Choice]) -> bool:
    labels = cell.labels
    return choices.get(labels["objective"]) == results.Choice.of_row(labels)


def _with_seeds(
    cells: Sequence[_Cell],
    choices: Mapping[str, results.Choice],
    arms: Collection[str],
    seeds: Sequence[int],
) -> list[_Cell]:
    """The runs of some arms, at what was chosen for them, with seeds that they have not had."""
    done = {cell.name for cell in cells}
    found = {}
    for cell in cells:
        if cell.labels["objective"] in arms and _is_chosen(cell, choices):
            of_seeds = (dataclasses.replace(cell, seed=seed, in_full=True) for seed in seeds)
            found |= {again.name: again for again in of_seeds if again.name not in done}
    return list(found.values())


def _chosen(
    opened: ExperimentRun,
    rows: Sequence[results.Row],
    baseline: str,
    choice_share: float,
    num_resamples: int,
) -> list[results.Row]:
    """Every arm at its chosen weight and rate, on the prompts that neither was chosen on."""
    chosen = results.over_seeds(rows, _ARM)
    for decoder in opened.settings.decoders:
        of_decoder = _of_decoder(chosen, decoder)
        # Of an arm's first seed.
        names = {row["objective"]: _name_of(row) for row in reversed(_of_decoder(rows, decoder))}
        outputs, original = {}, []
        for arm, name in names.items():
            current = str(opened.files_of(name).annotated(decoder))
            pairs = records.read_pairs(opened.make_original_outputs()[decoder], current)
            _, (original, outputs[arm]) = _parts(*pairs, choice_share)
        if not outputs:
            continue
        sure = results.intervals(original, outputs, baseline, num_resamples=num_resamples)
        for row in of_decoder:
            row |= sure[row["objective"]]
    return chosen


def as_markdown(found: Mapping[str, Any], decoders: Iterable[str]) -> str:
    """The chosen arms as tables, the main numbers first, after a warning if the choice was chance.

    Args:
      found: What a sweep found.
      decoders: Its decoders; weights were chosen on the outputs of the first.
    """
    decoders = list(decoders)
    warning = _chosen_by_chance(found.get("choice_rows", ()), decoders[0])
    main, full = (
        tables.as_markdown(found["chosen"], decoders, in_full=in_full) for in_full in (False, True)
    )
    return "\n".join([*([warning, ""] if warning else []), main, "All columns:", "", full])


def _chosen_by_chance(choice_rows: Sequence[results.Row], decoder: str) -> str:
    """A warning where so little was unwanted that weights say nothing; "" where there is enough."""
    rows = _of_decoder(choice_rows, decoder)
    num_arms = len({row["objective"] for row in rows})
    num_choices = len({(row["objective"], results.Choice.of_row(row)) for row in rows})
    if num_choices == num_arms:  # nothing was chosen
        return ""
    number = rows[0]["num_outputs"]
    unwanted = round(rows[0]["unwanted_rate_before"] * number)
    if unwanted >= _FEWEST:
        return ""
    return (
        f"Weights (alpha) were chosen by chance: of the original's {number} {decoder} outputs that "
        f"they are chosen on {unwanted} are unwanted, expected {_FEWEST} at least. Put a decoder "
        "with more of them first in DECODERS, or give more EVAL_PROMPTS."
    )


if __name__ == "__main__":
    program.run("tnt_jax.sweep", "sweep")
