"""Greedy decoding, sampling and beam search over a key-value cache, each one compiled loop.

What every step reads of the inputs is computed once, before the loop; a step computes one position.
The loop ends when every row has ended.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from tnt_jax.models import families, masking, parameters
from tnt_jax.models.masking import Mask
from tnt_jax.models.network import DecodingStart
from tnt_jax.models.network_config import NetworkConfig
from tnt_jax.runtime.array_types import Array, Bool, Float, Int, Key, PyTree
from tnt_jax.runtime.errors import UsageError

_FILL = 0  # stands after the end of an output, and says nothing

# (last tokens [N], their position, cache) -> (log-probabilities of the next token [N, V], cache)
_NextLogProbs = Callable[..., tuple[Float[Array, "N V"], PyTree]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decoding:
    """How to turn next-token distributions into a sequence.

    Attributes:
      max_length: longest output in tokens, EOS included.
      num_beams: above 1, beam search with this many live beams.
      temperature: 0 takes the most probable token; above 0, samples from p^(1/temperature).
      top_k: sample among the k most probable tokens only; 0 means all.
      top_p: sample among the fewest most probable tokens that together have at least this
        probability, counted after temperature and `top_k`; 1 means all.
      length_penalty: alpha of T5X's brevity penalty: a finished beam of n tokens scores
        log_prob / ((5 + n) / 6)^alpha.
      end_ids: ids that end a sequence; `within_vocabulary` adds those of the tokeniser.
      banned_ids: ids removed at every step, the rest renormalised: the exact and free baseline for
        a list of unwanted tokens.

    Raises:
      UsageError: a value outside its range, or settings that exclude each other.
    """

    max_length: int
    num_beams: int = 1
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    length_penalty: float = 0.6
    end_ids: tuple[int, ...] = ()
    banned_ids: tuple[int, ...] = ()

    def __post_init__(self):
        # Tuples, so that the settings are hashable: a static argument of jax.jit.
        for name in ("end_ids", "banned_ids"):
            object.__setattr__(self, name, tuple(int(token) for token in getattr(self, name)))
        for name, expected, holds in (
            ("max_length", "at least 1", self.max_length >= 1),
            ("num_beams", "at least 1", self.num_beams >= 1),
            ("temperature", "0 (greedy) or above", self.temperature >= 0),
            ("top_k", "0 (off) or above", self.top_k >= 0),
            ("top_p", "above 0 and at most 1 (off)", 0 < self.top_p <= 1),
            ("length_penalty", "0 (off) or above", self.length_penalty >= 0),
        ):
            if not holds:
                found = getattr(self, name)
                raise UsageError(f"Decoding.{name}: expected {expected}, found {found}")
        if both := set(self.end_ids).intersection(self.banned_ids):
            raise UsageError(
                "Decoding.banned_ids: expected none of end_ids, or no output could end, found "
                f"{min(both)}"
            )
        if self.temperature == 0 and (self.top_k > 0 or self.top_p < 1):
            raise UsageError(
                f"Decoding.top_k={self.top_k} and top_p={self.top_p} act on sampling only: set "
                "temperature above 0, or leave them at 0 and 1"
            )
        if self.num_beams > 1 and self.temperature > 0:
            raise UsageError(
                f"Decoding.num_beams={self.num_beams} searches and temperature={self.temperature} "
                "samples: set num_beams=1 or temperature=0"
            )


@runtime_checkable
class Vocabulary(Protocol):
    """What decoding asks of a tokeniser."""

    @property
    def size(self) -> int:
        """Number of ids."""
        ...

    @property
    def end_ids(self) -> frozenset[int]:
        """The ids that end an output."""
        ...

    @property
    def never_said(self) -> frozenset[int]:
        """The ids that no output may contain, such as padding."""
        ...


def within_vocabulary(
    decoding: Decoding, vocabulary: Vocabulary, config: NetworkConfig
) -> Decoding:
    """The same settings with a tokeniser's ends, too, and never with an id that stands for no text.

    An embedding may have more rows than its vocabulary has ids. Beside ends that are stated, those
    of the tokeniser may be banned.

    Raises:
      UsageError: an id or `top_k` beyond the vocabulary, or an end that is banned.
    """
    _check_within(decoding, config.vocab_size)
    ends = {*decoding.end_ids, *vocabulary.end_ids}
    if decoding.end_ids:
        ends.difference_update(decoding.banned_ids)
    silent = [*sorted(vocabulary.never_said - ends), *range(vocabulary.size, config.vocab_size)]
    return dataclasses.replace(
        decoding, end_ids=tuple(sorted(ends)), banned_ids=(*decoding.banned_ids, *silent)
    )


def _check_within(decoding: Decoding, vocab_size: int) -> None:
    for name in ("end_ids", "banned_ids"):
        beyond = [i for i in getattr(decoding, name) if not 0 <= i < vocab_size]
        if beyond:
            raise UsageError(
                f"Decoding.{name}: expected ids within the vocabulary, from 0 to {vocab_size - 1}; "
                f"found {beyond[0]}"
            )
    if decoding.top_k > vocab_size:
        raise UsageError(
            f"Decoding.top_k: expected at most the vocabulary of {vocab_size} ids, found "
            f"{decoding.top_k}"
        )


class Decoded(NamedTuple):
    """One output per row.

    Attributes:
      tokens: `[B, max_length]`, up to the end and with it, then 0. A row without an end was cut at
        `max_length`.
      log_prob: `[B]`, nats: the sum over `tokens` of the model's log-probabilities, `banned_ids`
        removed; before temperature, top-k, top-p and length penalty.
      num_steps: decoding steps taken, at most `max_length`.
    """

    tokens: Int[Array, "B L"]
    log_prob: Float[Array, "B"]
    num_steps: Int[Array, ""]


def record_keys(seed: int, record_ids: Sequence[str]) -> Key[Array, "B"]:
    """Sampling keys of records: hashes of the seed and the id, the same in every process."""
    digests = [hashlib.sha256(f"{seed}/{record_id}".encode()).digest() for record_id in record_ids]
    words = np.frombuffer(b"".join(digests), "<u4").reshape(-1, 8)[:, :2]
    return jax.random.wrap_key_data(jnp.asarray(words), impl="threefry2x32")


@functools.partial(jax.jit, static_argnames=("config", "decoding", "num_shared"))
def decode(
    params: PyTree,
    input_tokens: Int[Array, "B S"],
    input_lengths: Int[Array, "B"],
    row_keys: Key[Array, "B"] | None = None,
    mask: Mask | None = None,
    prefix_tokens: Int[Array, "B P"] | None = None,
    *,
    config: NetworkConfig,
    decoding: Decoding,
    num_shared: int = 0,
) -> Decoded:
    """Decodes a batch.

    A row without any input token is batch filler and comes out empty.

    Args:
      params: float32 parameters of the network of `config`, layers stacked or apart.
      input_tokens: filled up on the right; the width changes no output.
      input_lengths: tokens of each row; what comes after them counts for nothing.
      row_keys: one key per row, for sampling only. The noise of a row depends on its key and the
        position alone, not on the model, the other rows or their order, so an unchanged model
        repeats its sample (bit for bit at one batch size; between batch sizes XLA may sum in
        another order, which can turn a tie within 1e-6 nats).
      mask: what must not come up: it is removed, the rest renormalised.
      prefix_tokens: how each row begins its output, filled up with -1 on the right; rows may differ
        in length, and one of no tokens is free from the start. They count in `tokens`,
        `log_prob` and `max_length` as if they had been chosen. Not for beams.
      config: the settings of the network.
      decoding: how tokens are chosen.
      num_shared: number of tokens with which all inputs begin (`layouts.num_shared_by`): a
        decoder-only model reads them once for all rows. It changes no output, but for rounding.

    Returns:
      Tokens, log-probabilities and the number of steps.

    Raises:
      UsageError: sampling without keys, an id or `top_k` beyond the vocabulary, or a prefix that is
        longer than an output may be.
    """
    _check_within(decoding, config.vocab_size)
    if decoding.temperature > 0 and row_keys is None:
        raise UsageError("sampling (Decoding.temperature above 0) needs one key per row: row_keys")
    if decoding.num_beams > 1 and prefix_tokens is not None:
        raise UsageError(
            "prefixes are for one output at a time: expected Decoding.num_beams=1, found "
            f"{decoding.num_beams}"
        )
    if prefix_tokens is not None and prefix_tokens.shape[1] > decoding.max_length:
        raise UsageError(
            f"expected prefixes of at most Decoding.max_length={decoding.max_length} tokens, found "
            f"{prefix_tokens.shape[1]}"
        )

    params, config = parameters.for_decoding(params, config)
    network = families.network_of(config)
    start = network.start_decoding(
        params,
        input_tokens,
        input_lengths,
        num_beams=decoding.num_beams,
        max_length=decoding.max_length,
        num_shared=num_shared,
    )
    removed = np.zeros((1, config.vocab_size), bool)
    removed[:, list(decoding.banned_ids)] = True

    def next_log_probs(tokens, position, cache):
        logits, cache = network.decode_step(params, tokens, position, cache, start.memory)
        return jax.nn.log_softmax(jnp.where(removed, -jnp.inf, logits)), cache

    is_filler = input_lengths == 0
    if decoding.num_beams > 1:
        return _search_beams(next_log_probs, start, is_filler, mask, decoding)
    if decoding.temperature == 0:
        row_keys = None
    if prefix_tokens is None:
        prefix_tokens = jnp.zeros((len(input_tokens), 0), jnp.int32)
    # As wide as the output, so that every step reads its own column.
    num_free = decoding.max_length - prefix_tokens.shape[1]
    forced = jnp.pad(prefix_tokens, ((0, 0), (0, num_free)), constant_values=-1)
    return _decode_rows(next_log_probs, start, is_filler, row_keys, mask, forced, decoding)


def _ends(tokens: Int[Array, "*shape"], decoding: Decoding) -> Bool[Array, "*shape"]:
    return jnp.isin(tokens, np.array(decoding.end_ids, np.int32))


def _masked(
    mask: Mask, readings: masking.Readings, log_probs: Float[Array, "B V"]
) -> Float[Array, "B V"]:
    """The log-probabilities of what a mask leaves."""
    removed = masking.removed(mask, readings, log_probs > -jnp.inf)
    return jax.nn.log_softmax(jnp.where(removed, -jnp.inf, log_probs))


# --------------------------------------------------------------------------- Greedy and sampling


class _Rows(NamedTuple):
    position: Int[Array, ""]
    tokens: Int[Array, "B L"]
    last: Int[Array, "B"]
    log_prob: Float[Array, "B"]
    ended: Bool[Array, "B"]
    readings: masking.Readings
    cache: PyTree


def _decode_rows(
    next_log_probs: _NextLogProbs,
    start: DecodingStart,
    is_filler: Bool[Array, "B"],
    row_keys: Key[Array, "B"] | None,
    mask: Mask | None,
    forced: Int[Array, "B L"],
    decoding: Decoding,
) -> Decoded:
    """Greedy without keys, sampling with them; a forced token other than -1 is taken as it is."""
    num_rows = is_filler.shape[0]

    def step(rows: _Rows) -> _Rows:
        log_probs, cache = next_log_probs(rows.last, rows.position, rows.cache)
        if mask is not None:
            log_probs = _masked(mask, rows.readings, log_probs)
        if row_keys is None:
            chosen = jnp.argmax(log_probs, axis=-1)
        else:
            chosen = _sample(log_probs, row_keys, rows.position, decoding)
        given = forced[:, rows.position]
        chosen = jnp.where(given < 0, chosen, given)
        gained = jnp.take_along_axis(log_probs, chosen[:, None], axis=1)[:, 0]
        token = jnp.where(rows.ended, _FILL, chosen).astype(jnp.int32)
        return _Rows(
            position=rows.position + 1,
            tokens=rows.tokens.at[:, rows.position].set(token),
            last=token,
            log_prob=rows.log_prob + jnp.where(rows.ended, 0.0, gained),
            ended=rows.ended | _ends(token, decoding),
            readings=_read(mask, rows.readings, chosen),
            cache=cache,
        )

    rows = jax.lax.while_loop(
        lambda rows: (rows.position < decoding.max_length) & ~jnp.all(rows.ended),
        step,
        _Rows(
            position=jnp.int32(0),
            tokens=jnp.full((num_rows, decoding.max_length), _FILL, jnp.int32),
            last=start.tokens,
            log_prob=jnp.zeros(num_rows),
            ended=is_filler,
            readings=masking.begin(num_rows),
            cache=start.cache,
        ),
    )
    return Decoded(rows.tokens, rows.log_prob, rows.position)


def _read(
    mask: Mask | None, readings: masking.Readings, tokens: Int[Array, "B"]
) -> masking.Readings:
    return readings if mask is None else masking.read(mask.tables, readings, tokens)


def _sample(
    log_probs: Float[Array, "B V"],
    row_keys: Key[Array, "B"],
    position: Int[Array, ""],
    decoding: Decoding,
) -> Int[Array, "B"]:
    """Gumbel-max sampling: the noise belongs to (key, position, token id), before any cut."""
    vocab_size = log_probs.shape[-1]
    noise = jax.vmap(
        lambda key: jax.random.gumbel(jax.random.fold_in(key, position), (vocab_size,))
    )(row_keys)
    scores = log_probs / decoding.temperature
    if decoding.top_k == 0 and decoding.top_p == 1:
        return jnp.argmax(scores + noise, axis=-1)
    scores, ids = jax.lax.top_k(scores, decoding.top_k or vocab_size)
    probs = jax.nn.softmax(scores)
    mass_before = jnp.cumsum(probs, axis=-1) - probs
    noise = jnp.take_along_axis(noise, ids, axis=1)
    best = jnp.argmax(jnp.where(mass_before < decoding.top_p, scores + noise, -jnp.inf), axis=-1)
    return jnp.take_along_axis(ids, best[:, None], axis=1)[:, 0]


# ----------------------------------------------------------------------------------- Beam search


class _Beams(NamedTuple):
    position: Int[Array, ""]
    live_tokens: Int[Array, "B N L"]  # by falling log_prob
    live_log_prob: Float[Array, "B N"]
    last: Int[Array, "B N"]
    finished_tokens: Int[Array, "B L"]  # the best finished beam
    finished_log_prob: Float[Array, "B"]
    finished_score: Float[Array, "B"]  # -inf while there is none
    readings: masking.Readings  # of the live ones, one after the other
    cache: PyTree


def _search_beams(
    next_log_probs: _NextLogProbs,
    start: DecodingStart,
    is_filler: Bool[Array, "B"],
    mask: Mask | None,
    decoding: Decoding,
) -> Decoded:
    """The best beam by the semantics of t5x/decoding.py `beam_search`.

    Each step takes the best 2N continuations of N live beams, (1 + E) N with E ends, so that N of
    them do not end; those that end compete by score, the best N of the others live on. Only the
    best finished beam is returned, so only it is kept, and a row is settled when no live beam can
    beat it. If none ever finishes, the best live beam counts.
    """
    num_rows, num_beams = is_filler.shape[0], decoding.num_beams
    if mask is not None:
        mask = mask._replace(flags=jnp.repeat(mask.flags, num_beams, axis=0))

    def penalty(length):
        return ((5.0 + length) / 6.0) ** decoding.length_penalty

    def unsettled(beams: _Beams) -> Bool[Array, ""]:
        # Log-probabilities only fall, and the penalty is mildest at the full length.
        best_possible = beams.live_log_prob[:, 0] / penalty(decoding.max_length)
        settled = jnp.all(beams.finished_score >= best_possible)
        return (beams.position < decoding.max_length) & ~settled

    def step(beams: _Beams) -> _Beams:
        position = beams.position
        log_probs, cache = next_log_probs(beams.last.reshape(-1), position, beams.cache)
        if mask is not None:
            log_probs = _masked(mask, beams.readings, log_probs)
        vocab_size = log_probs.shape[-1]
        log_probs = log_probs.reshape(num_rows, num_beams, vocab_size)
        totals = (beams.live_log_prob[:, :, None] + log_probs).reshape(num_rows, -1)
        # Of each beam E continuations can be ends, so at least N of these live on.
        num_candidates = min((1 + len(decoding.end_ids)) * num_beams, totals.shape[1])
        totals, index = jax.lax.top_k(totals, num_candidates)
        parent, token = index // vocab_size, index % vocab_size
        tokens = jnp.take_along_axis(beams.live_tokens, parent[:, :, None], axis=1)
        tokens = tokens.at[:, :, position].set(token)
        ends = _ends(token, decoding)

        ended_log_prob = jnp.where(ends, totals, -jnp.inf)
        best = jnp.argmax(ended_log_prob, axis=1)[:, None]
        ended_log_prob = jnp.take_along_axis(ended_log_prob, best, axis=1)[:, 0]
        ended_tokens = jnp.take_along_axis(tokens, best[:, :, None], axis=1)[:, 0]
        ended_score = ended_log_prob / penalty(position + 1)
        better = ended_score > beams.finished_score

        live_log_prob, kept = jax.lax.top_k(jnp.where(ends, -jnp.inf, totals), num_beams)
        parent = jnp.take_along_axis(parent, kept, axis=1)

        def follow_parents(x: Array) -> Array:
            by_row = x.reshape(num_rows, num_beams, *x.shape[1:])
            return jax.vmap(lambda row, parents: row[parents])(by_row, parent).reshape(x.shape)

        last = jnp.take_along_axis(token, kept, axis=1)
        readings = jax.tree.map(follow_parents, beams.readings)
        return _Beams(
            position=position + 1,
            live_tokens=jnp.take_along_axis(tokens, kept[:, :, None], axis=1),
            live_log_prob=live_log_prob,
            last=last,
            finished_tokens=jnp.where(better[:, None], ended_tokens, beams.finished_tokens),
            finished_log_prob=jnp.where(better, ended_log_prob, beams.finished_log_prob),
            finished_score=jnp.where(better, ended_score, beams.finished_score),
            readings=_read(mask, readings, last.reshape(-1)),
            cache=jax.tree.map(follow_parents, cache),
        )

    beams = jax.lax.while_loop(
        unsettled,
        step,
        _Beams(
            position=jnp.int32(0),
            live_tokens=jnp.full((num_rows, num_beams, decoding.max_length), _FILL, jnp.int32),
            # All beams start equal: only the first counts, or every one would be kept N times.
            live_log_prob=jnp.full((num_rows, num_beams), -jnp.inf).at[:, 0].set(0.0),
            last=start.tokens.reshape(num_rows, num_beams),
            finished_tokens=jnp.full((num_rows, decoding.max_length), _FILL, jnp.int32),
            finished_log_prob=jnp.zeros(num_rows),
            finished_score=jnp.where(is_filler, jnp.inf, -jnp.inf),
            readings=masking.begin(num_rows * num_beams),
            cache=start.cache,
        ),
    )
    has_finished = beams.finished_score > -jnp.inf
    return Decoded(
        jnp.where(has_finished[:, None], beams.finished_tokens, beams.live_tokens[:, 0]),
        jnp.where(has_finished, beams.finished_log_prob, beams.live_log_prob[:, 0]),
        beams.position,
    )
