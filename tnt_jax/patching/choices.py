"""What `patch` chooses, from facts alone: each setting with its value, its reason and its flag.

Every rule is a function of what the prompts, the outputs, the network and the machine are; none
looks at anything else. docs/patch.md says them in words.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from tnt_jax.runtime.errors import UsageError

# Texts
_MULTIPLE = 8  # lengths are rounded up, so that runs of nearly equal texts share what is compiled
LONGEST_INPUT = 512
LONGEST_OUTPUT = 128
_NEARLY_ALL = 0.95  # of the outputs are learned from whole: a few run on without an end
_AS_LENGTHS_SAY = "as the lengths say that are given"
_MORE = 1.25  # as long: what the patched model says may be longer, and unwanted there
# Outputs
PILOT = 64
MARKED_WANTED, MARKED_AFFORDED = 200, 1000
_SHARE_OF_TIME = 0.1  # that outputs to learn from may take, beyond those that are wanted
FEWEST_MARKED = 20
_FEWEST_OUTPUTS = 256
CLEAN_PER_MARKED = 3
# Prompts that are kept back, as shares of all, and at most so many.
_SHARE_OF_CHOICE, _SHARE_OF_REPORT = 0.2, 0.2
_MOST_KEPT_BACK = 512
_UNWANTED_KEPT_BACK = 64
_FEWEST_TO_CHOOSE, _FEWEST_TO_REPORT = 64, 256
_FEWEST_PROMPTS = 60
# Training
# Of a device's memory, for what is counted here; the rest is the compiler's, and others'.
_ROOM = 0.6
_BYTES = 4  # float32
_KEPT_PER_LAYER = 20  # numbers that a layer keeps for its gradient, per token and embedding width
_BATCH_DECODER_ONLY, _BATCH_ENCODER_DECODER = 8, 16
_GENERATE_BATCH = 64
_WARM_UP, _FEWEST_TO_HALVE = 5, 80  # updates
# Heads that find what made an output bad
_EPOCHS_OF_HEADS, _FEWEST_OF_HEADS, _MOST_OF_HEADS = 40, 200, 1000  # updates, the last two
# Looks
_LOOKS = 20
_SHORTEST_PERIOD, _LONGEST_PERIOD = 5, 40

UNKNOWN = object()  # stands for a given value that rules cannot count with


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
    """One setting.

    Attributes:
      what: The setting's name, for people.
      macro: The macro of gin that has it: `--gin.MACRO=VALUE` overrides it.
      value: The value in Python; a text that begins with "@" is a reference of gin's.
      reason: Why it has this value.
      is_given: Whether the user set it, so that nothing was chosen.
      bindings: Settings that belong to the value, as lines of gin.
    """

    what: str
    macro: str
    value: Any
    reason: str
    is_given: bool = False
    bindings: tuple[str, ...] = ()

    @property
    def flag(self) -> str:
        """What overrides it."""
        return f"--gin.{self.macro}"

    @property
    def text(self) -> str:
        """The value as gin has it."""
        is_reference = isinstance(self.value, str) and self.value[:1] in "@%"
        return self.value if is_reference else repr(self.value)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Network:
    """The sizes of a network that choices depend on.

    Attributes:
      is_decoder_only: Whether prompt and output share a row.
      num_layers: Number of layers of all stacks together.
      num_params: How many numbers its parameters have.
      emb_dim: Width of the residual stream.
      num_heads: Attention heads per layer.
      vocab_size: Rows of the embedding.
    """

    is_decoder_only: bool
    num_layers: int
    num_params: int
    emb_dim: int
    num_heads: int
    vocab_size: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machine:
    """The properties of a machine that choices depend on.

    Attributes:
      platform: "cpu", "gpu" or "tpu".
      num_devices: Number of devices that a batch is split over.
      num_bytes: Bytes of memory of a device; on a CPU those of the host, shared by all devices.
    """

    platform: str
    num_devices: int
    num_bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Counts:
    """Outputs, and how many of them have something unwanted."""

    outputs: int
    marked: int

    @property
    def share(self) -> float:
        """The share of outputs with something unwanted, from 0 to 1."""
        return self.marked / self.outputs if self.outputs else 0.0


def _take(
    given: Mapping[str, Any], what: str, macro: str, value: Any, reason: str, *bindings: str
) -> Choice:
    """The choice; the user's where there is one, with its own value in place of `UNKNOWN`."""
    if macro not in given:
        return Choice(what=what, macro=macro, value=value, reason=reason, bindings=bindings)
    found = value if given[macro] is UNKNOWN else given[macro]
    return Choice(what=what, macro=macro, value=found, reason="given", is_given=True)


def _up(number: int, multiple: int = _MULTIPLE) -> int:
    return -(-number // multiple) * multiple


# ------------------------------------------------------------------------------------- Prompts


def split_sizes(num_prompts: int, has_eval_prompts: bool) -> tuple[int, int]:
    """How many prompts are kept back: to choose by, and to report on.

    Args:
      num_prompts: Number of prompts in the file that they are taken from.
      has_eval_prompts: Whether the user keeps them back: then all of them, half and half.

    Raises:
      UsageError: There are too few.
    """
    if has_eval_prompts:
        if num_prompts < 4:
            raise UsageError(
                f"--eval_prompts: expected at least 4 different prompts, half to choose by and "
                f"half to report on, found {num_prompts}. Give more."
            )
        choice = min(num_prompts // 2, _MOST_KEPT_BACK)
        return choice, num_prompts - choice
    if num_prompts < _FEWEST_PROMPTS:
        raise UsageError(
            f"--prompts: expected at least {_FEWEST_PROMPTS} different prompts, to learn from, to "
            f"choose by and to report on, found {num_prompts}. Give more: a few hundred are good."
        )
    return (
        min(round(_SHARE_OF_CHOICE * num_prompts), _MOST_KEPT_BACK),
        min(round(_SHARE_OF_REPORT * num_prompts), _MOST_KEPT_BACK),
    )


def num_to_choose_by(available: int, pilot: Counts) -> tuple[int, str]:
    """How many choice prompts are looked at: enough that about 64 are unwanted, at least 64."""
    return _num_kept_back(available, pilot, _FEWEST_TO_CHOOSE, "to measure the wish on")


def num_to_report_on(available: int, pilot: Counts) -> tuple[int, str]:
    """How many prompts the numbers at the end are of: as for the choice, but at least 256."""
    return _num_kept_back(available, pilot, _FEWEST_TO_REPORT, "for the numbers at the end")


def _num_kept_back(available: int, pilot: Counts, fewest: int, what_for: str) -> tuple[int, str]:
    """How many of the prompts that are kept back to use, and why."""
    wanted = math.ceil(_UNWANTED_KEPT_BACK / pilot.share) if pilot.marked else available
    wanted = max(fewest, wanted)
    if wanted <= available:
        return wanted, f"enough {what_for}"
    return available, f"all that were kept back; {wanted} would be enough {what_for}"


# ------------------------------------------------------------------------------- Before the pilot


def before_pilot(
    given: Mapping[str, Any], prompt_lengths: Sequence[int], network: Network, machine: Machine
) -> list[Choice]:
    """Lengths and the batch that outputs are made in.

    Args:
      given: Macros that the user set, with their values.
      prompt_lengths: Tokens of each prompt.
      network: The original's.
      machine: This one.
    """
    longest, reason = LONGEST_OUTPUT, "to begin with"
    if (targets := _given_targets(given)) is not None:
        longest, reason = targets, _AS_LENGTHS_SAY
    of_output = _take(given, "longest output", "MAX_LENGTH", longest, reason)
    lengths = _lengths(given, prompt_lengths, of_output)
    generate = _generate_batch(given, sum(lengths.value.values()), network, machine)
    return [lengths, of_output, generate]


def _lengths(given: Mapping[str, Any], prompt_lengths: Sequence[int], of_output: Choice) -> Choice:
    lengths = {"inputs": _input_length(prompt_lengths), "targets": of_output.value}
    reason = f"{_reason_of_input(prompt_lengths)}; outputs as the next line has it"
    return _take(given, "lengths", "TASK_FEATURE_LENGTHS", lengths, reason)


def head_updates(num_outputs: int, batch_size: int) -> int:
    """For how many updates `localize` trains each of its heads: 40 epochs, 200 to 1,000."""
    updates = _EPOCHS_OF_HEADS * num_outputs // batch_size
    return min(max(updates, _FEWEST_OF_HEADS), _MOST_OF_HEADS)


def _input_length(prompt_lengths: Sequence[int]) -> int:
    return min(_up(max(prompt_lengths)), LONGEST_INPUT)


def _reason_of_input(prompt_lengths: Sequence[int]) -> str:
    longest = max(prompt_lengths)
    num_cut = sum(length > LONGEST_INPUT for length in prompt_lengths)
    reason = f"the longest prompt has {longest} tokens"
    return f"{reason}: {num_cut} are cut at {LONGEST_INPUT}" if num_cut else reason


def _generate_batch(
    given: Mapping[str, Any], num_tokens: int, network: Network, machine: Machine
) -> Choice:
    """Outputs that are made together: 64, or what the keys and values of their tokens leave."""
    of_output = 2 * num_tokens * network.num_layers * network.emb_dim * _BYTES
    room = max(_room(machine) - network.num_params * _BYTES, 1)
    batch = _GENERATE_BATCH
    while batch > 1 and batch * of_output > room * _num_memories(machine):
        batch //= 2
    # The mesh of a program that generates has all devices on its data axis.
    batch = _up(batch, machine.num_devices)
    reason = "decoding is quickest so" if batch >= _GENERATE_BATCH else "what memory holds"
    return _take(given, "outputs at a time", "GENERATE_BATCH_SIZE", batch, reason)


def _room(machine: Machine) -> float:
    """Bytes of a device that may be used, or of the host of CPUs.

    Every device of the mesh that is written has all weights, and its part of the rows.
    """
    return _ROOM * machine.num_bytes


def _num_memories(machine: Machine) -> int:
    """What the rows of a batch are divided among."""
    return 1 if machine.platform == "cpu" else machine.num_devices


# -------------------------------------------------------------------------------- After the pilot


def after_pilot(
    given: Mapping[str, Any],
    prompt_lengths: Sequence[int],
    output_lengths: Sequence[int],
    num_unended: int,
    network: Network,
    machine: Machine,
    *,
    needs_adapters: bool = False,
) -> list[Choice]:
    """Chooses lengths and batch again, now that outputs are known, and how to train.

    Args:
      given: Macros that the user set, with their values.
      prompt_lengths: Tokens of each prompt.
      output_lengths: Tokens of each output of the pilot, and of those that are given.
      num_unended: Outputs of the pilot that did not end.
      network: The original's.
      machine: This one.
      needs_adapters: Whether adapters are what is asked for, of a T5 as well.
    """
    of_output = _longest_output(given, output_lengths, num_unended)
    lengths = _lengths(given, prompt_lengths, of_output)
    generate = _generate_batch(given, sum(lengths.value.values()), network, machine)
    return [
        lengths,
        of_output,
        generate,
        *update(given, lengths.value, network, machine, needs_adapters),
    ]


def _longest_output(
    given: Mapping[str, Any], output_lengths: Sequence[int], num_unended: int
) -> Choice:
    """A quarter more than nearly all outputs have, up to a limit; or as many as lengths say."""
    number = len(output_lengths)
    nearly_all = sorted(output_lengths)[math.ceil(_NEARLY_ALL * number) - 1]
    wanted, targets = _up(math.ceil(nearly_all * _MORE)), _given_targets(given)
    longest = min(wanted, LONGEST_OUTPUT) if targets is None else targets
    num_cut = sum(length > longest for length in output_lengths)
    # The pilot made no longer ones than that: those that did not end would be longer.
    if targets is not None or longest == LONGEST_OUTPUT:
        num_cut += num_unended
    if targets is not None:
        reason = _AS_LENGTHS_SAY
    elif wanted == longest:
        reason = f"95 % of {number} outputs have up to {nearly_all} tokens: a quarter more"
    else:
        reason = "the most that is chosen"
    if num_cut:
        reason += f"; {num_cut} of {number} are longer: their ends, and marks there, are cut off"
    return _take(given, "longest output", "MAX_LENGTH", longest, reason)


def _given_targets(given: Mapping[str, Any]) -> int | None:
    """The tokens of "targets" where the user gives TASK_FEATURE_LENGTHS; else None."""
    lengths = given.get("TASK_FEATURE_LENGTHS")
    return lengths.get("targets") if isinstance(lengths, Mapping) else None


def training_outputs(
    pilot: Counts, available: int, *, has_eval_prompts: bool = False
) -> tuple[int, str]:
    """How many outputs to learn from, and why.

    Enough that about 200 are marked, at least 256, at most one for each prompt.

    Args:
      pilot: The counts of the pilot's outputs.
      available: Number of prompts to learn from.
      has_eval_prompts: Whether the user keeps prompts back, so that none of --prompts are.

    Raises:
      UsageError: Even all of them would hardly have 20.
    """
    # With as many as two standard errors more than were found.
    at_most = pilot.marked + 2 * math.sqrt(pilot.marked + 1)
    if at_most / pilot.outputs * available < FEWEST_MARKED:
        raise UsageError(too_rare(pilot, available, has_eval_prompts=has_eval_prompts))
    wanted = max(math.ceil(MARKED_WANTED / max(pilot.share, 1e-9)), _FEWEST_OUTPUTS)
    number = min(wanted, available)
    if number < wanted:
        return number, "all prompts that are not kept back"
    if number == _FEWEST_OUTPUTS:
        return number, f"at least {_FEWEST_OUTPUTS}"
    return number, f"about {MARKED_WANTED} of them are marked"


def more_training_outputs(
    found: Counts, available: int, seconds_per_output: float, seconds: float
) -> int:
    """How many outputs to learn from, where they turn out to be cheap: with up to 1000 marked ones.

    Args:
      found: The counts of the outputs so far.
      available: Number of prompts.
      seconds_per_output: Seconds that each of these outputs took.
      seconds: The budget, of which a tenth may go into this.

    Returns:
      As many as there are, unless it is well worth making them anew.
    """
    wanted = math.ceil(MARKED_AFFORDED / max(found.share, 1e-9))
    affordable = int(_SHARE_OF_TIME * seconds / seconds_per_output)
    number = min(wanted, affordable, available)
    return number if number > 1.5 * found.outputs else found.outputs


def too_rare(
    found: Counts, available: int, *, has_eval_prompts: bool, flag: str = "--prompts"
) -> str:
    """What to do where there is too little to learn from.

    Args:
      found: The counts of the outputs so far.
      available: Number of prompts to learn from.
      has_eval_prompts: Whether the user keeps prompts back, so that none of the others are.
      flag: The flag that names the file of prompts.
    """
    wanted = math.ceil(FEWEST_MARKED / max(found.share, 0.5 / found.outputs))
    kept_back = ""
    if not has_eval_prompts:
        wanted = _with_kept_back(wanted)
        kept_back = f", of which {sum(split_sizes(wanted, False))} are kept back"
    return (
        f"too rare: {found.marked} of {found.outputs} outputs have something unwanted, and at "
        f"least {FEWEST_MARKED} to learn from are expected of {available} prompts. Give about "
        f"{wanted} prompts that bring it up in {flag}{kept_back}, or try --decoding=sampled or "
        "--decoding=both; for a list of words alone, a mask while decoding needs no training "
        "(docs/limits.md)."
    )


def _with_kept_back(to_learn: int) -> int:
    """How many prompts a file has to have, for so many to be left to learn from."""
    share = 1 - _SHARE_OF_CHOICE - _SHARE_OF_REPORT
    # Rounding up both parts that are kept back may take one more.
    wanted = min(math.ceil((to_learn + 1) / share), to_learn + 2 * _MOST_KEPT_BACK)
    return max(wanted, _FEWEST_PROMPTS)


# ------------------------------------------------------------------------------------- The update


def update(
    given: Mapping[str, Any],
    lengths: Mapping[str, int],
    network: Network,
    machine: Machine,
    needs_adapters: bool = False,
) -> list[Choice]:
    """What is trained, and how.

    Args:
      given: Macros that the user set, with their values.
      lengths: Tokens of "inputs" and "targets".
      network: The original's.
      machine: This one.
      needs_adapters: Whether adapters are what is asked for.
    """
    full_batch = _BATCH_DECODER_ONLY if network.is_decoder_only else _BATCH_ENCODER_DECODER
    kind = _kind(given, lengths, network, machine, needs_adapters)
    trained_layers = None
    if kind.value.startswith("adapters") and network.is_decoder_only:
        trained_layers = math.ceil(network.num_layers / 3)
    found = [kind]
    if kind.value.startswith("adapters"):
        found.append(
            _take(
                given,
                "layers with adapters",
                "TRAINED_LAYERS",
                trained_layers,
                f"the upper third of {network.num_layers}: an update costs half as much"
                if trained_layers
                else "all of both stacks",
            )
        )
        layers = found[-1].value or network.num_layers
    else:
        layers = network.num_layers
    batch = _take(
        given,
        "outputs in an update",
        "BATCH_SIZE",
        _up(full_batch, machine.num_devices),
        "for a decoder-only model" if network.is_decoder_only else "for an encoder and a decoder",
    )
    rest = _room(machine) - _bytes_of_weights(kind.value, network)
    least_row = _bytes_of_row(lengths, layers, network)
    of_row = least_row / _num_memories(machine)
    parts = 1
    most = batch.value // machine.num_devices
    while parts < most and (most % parts or batch.value / parts * of_row > rest):
        parts += 1
    needed, room = batch.value * of_row, max(rest, 0)
    fits = f"its activations take about {needed / 2**30:.1f} of {room / 2**30:.1f} GiB"
    of_parts = _take(given, "parts of an update", "NUM_MICROBATCHES", parts, fits)
    found += [batch, of_parts]
    # Nothing is divided by what was given: 0 parts are refused where the batch is split.
    is_short = needed > rest * of_parts.value
    short = "those of a part do not" if of_parts.is_given else "not even one row's"
    found.append(
        _take(
            given,
            "activations",
            "REMAT_POLICY",
            "full" if is_short else "none",
            f"{short} fit: computed again" if is_short else "they fit: kept",
        )
    )
    if kind.value.startswith("adapters"):
        adam = "for adapters"
    elif _bytes_with_adam(kind.value, network) + least_row <= _room(machine):
        adam = "its two moments fit"
    else:
        adam = ""
    if adam:
        b2 = "optax.adam.b2 = 0.99"
        found.append(_take(given, "optimizer", "OPTIMIZER", "@optax.adam", adam, b2))
    else:
        reason = "Adam's moments do not fit"
        found.append(_take(given, "optimizer", "OPTIMIZER", "@optimizers.adafactor", reason))
    norm = "so that one strange batch does little"
    found.append(_take(given, "largest gradient norm", "MAX_GRADIENT_NORM", 1.0, norm))
    reason = "they hold the rest in place"
    clean = "clean outputs for each marked one"
    return [*found, _take(given, clean, "CLEAN_PER_MARKED", CLEAN_PER_MARKED, reason)]


def _kind(
    given: Mapping[str, Any],
    lengths: Mapping[str, int],
    network: Network,
    machine: Machine,
    needs_adapters: bool,
) -> Choice:
    """All parameters of a T5, beside a second tree or cached states, or adapters: what fits."""
    if network.is_decoder_only or needs_adapters:
        reason = "adapters: the model holds its own original"
        return _take(given, "what is trained", "ORIGINAL", "adapters_off", reason)
    room = _room(machine)
    of_row = _bytes_of_row(lengths, network.num_layers, network)
    for kind, what in (
        ("parameters", "all parameters, beside the original's"),
        ("cached", "all parameters, beside cached states of the original"),
    ):
        needed = _bytes_of_weights(kind, network) + of_row
        if needed <= room:
            reason = f"{what}, take {needed / 2**30:.2f} of {room / 2**30:.1f} GiB"
            return _take(given, "what is trained", "ORIGINAL", kind, reason)
    reason = f"adapters: all parameters do not fit in {room / 2**30:.1f} GiB"
    return _take(given, "what is trained", "ORIGINAL", "adapters_off", reason)


def _bytes_with_adam(kind: str, network: Network) -> float:
    return _bytes_of_weights(kind, network) + 2 * network.num_params * _BYTES


def _bytes_of_weights(kind: str, network: Network) -> float:
    """Bytes that training takes before it sees a row: parameters, their gradients, the original.

    What Adafactor or adapters take beside these is little, and left out.
    """
    whole = network.num_params * _BYTES
    if kind == "parameters":
        return 3 * whole
    if kind == "cached":
        return 2 * whole + network.vocab_size * network.emb_dim * _BYTES
    return whole


def _bytes_of_row(lengths: Mapping[str, int], layers: int, network: Network) -> float:
    """What one row keeps for its gradient: its layers' numbers, and attention's probabilities."""
    num_tokens = sum(lengths.values())
    of_layers = layers * num_tokens * network.emb_dim * _KEPT_PER_LAYER
    of_attention = 2 * layers * network.num_heads * num_tokens**2
    return _BYTES * (of_layers + of_attention)


# ----------------------------------------------------------------------------------------- Looks


@dataclasses.dataclass(frozen=True, kw_only=True)
class Looks:
    """When it is looked at what a run has come to.

    Attributes:
      period: Updates from one look to the next.
      number: Most looks in an attempt.
      reason: Why this period.
    """

    period: int
    number: int
    reason: str


def looks(counts: Counts, chosen: Sequence[Choice]) -> Looks:
    """A look every quarter of an epoch, every 5 to 40 updates; 20 looks at most in an attempt.

    Args:
      counts: The counts of the training outputs.
      chosen: What `update` chose: outputs in an update, and how many clean outputs are learned from
        for each that is marked (None: all).
    """
    value = {choice.macro: choice.value for choice in chosen}
    batch_size, clean_per_marked = value["BATCH_SIZE"], value["CLEAN_PER_MARKED"]
    clean = counts.outputs - counts.marked
    if clean_per_marked is not None:
        clean = min(clean, round(clean_per_marked * counts.marked))
    learned = counts.marked + clean
    of_epoch = learned / batch_size
    period = min(max(math.ceil(of_epoch / 4), _SHORTEST_PERIOD), _LONGEST_PERIOD)
    return Looks(
        period=period,
        number=_LOOKS,
        reason=f"a quarter of an epoch of {of_epoch:.0f} updates, {_SHORTEST_PERIOD} to "
        f"{_LONGEST_PERIOD}",
    )


def learning_rate(given: Mapping[str, Any], chosen: Sequence[Choice], of_looks: Looks) -> Choice:
    """The learning rate: five updates of warming up, then half as much every four looks.

    Where four looks are less than 80 updates, it is half as much every 80. It does not depend on
    the last update: what a run has come to after some updates is what a run of so many ends with.

    Args:
      given: Macros that the user set, with their values.
      chosen: What `update` chose.
      of_looks: When it is looked at what a run has come to.
    """
    value = {choice.macro: choice.value for choice in chosen}
    if value["ORIGINAL"].startswith("adapters"):
        peak, what = 1e-3, "adapters"
    # Ours, optax's, or one in a scope; called or not.
    elif re.fullmatch(r"@.*\badafactor(\(\))?", value["OPTIMIZER"]):
        peak, what = 1e-3, "Adafactor"
    else:
        peak, what = 3e-4, "Adam, of all parameters"
    halving = max(4 * of_looks.period, _FEWEST_TO_HALVE)
    schedule = "optax.warmup_exponential_decay_schedule"
    return _take(
        given,
        "learning rate",
        "LEARNING_RATE",
        f"@{schedule}()",
        f"{peak:g} for {what}, after {_WARM_UP} updates; half as much every {halving} updates",
        f"{schedule}.init_value = 0.0",
        f"{schedule}.peak_value = {peak!r}",
        f"{schedule}.warmup_steps = {_WARM_UP}",
        f"{schedule}.transition_steps = {halving}",
        f"{schedule}.decay_rate = 0.5",
    )


def threshold(wish: float, num_unwanted: int) -> float:
    """The cut on the choice prompts that is enough: the wish and one standard error of it.

    Args:
      wish: Share of the unwanted outputs that shall be gone.
      num_unwanted: The original's on the choice prompts.
    """
    return min(wish + math.sqrt(wish * (1 - wish) / num_unwanted), 1.0)
