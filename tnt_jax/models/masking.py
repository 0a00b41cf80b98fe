"""A mask of texts inside a compiled decoding loop: tables of `TokenAutomaton`, read by rows.

Axes: `B` rows, `V` ids, `S` states, `C` classes of characters, `U` states within a character, `F`
flags, `E` entries. A step looks a few thousand numbers up, not the vocabulary times the list: what
tokens come to is listed by state.
"""

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tnt_jax.data.token_automaton import BEGINNING, Entries, FlagPlaces, TokenAutomaton
from tnt_jax.runtime.array_types import Array, Bool, Int

_Ints = Int[Array | np.ndarray, "..."]


class Listing(NamedTuple):
    """Tokens by the place where they stand, as `token_automaton.Entries` has them.

    Attributes:
      starts: `[N + 1]`, the first entry of each place.
      tokens: `[E]`, filled up so that the longest place's number can be read from any start.
      ends: `[E]`, the flag of the state after the token.
      made: `[E]`, the flag of the mentions that are made.
      longest: `[L]` zeros, as many as the longest place has entries.
    """

    starts: _Ints
    tokens: _Ints
    ends: _Ints
    made: _Ints
    longest: _Ints

    @classmethod
    def of(cls, entries: Entries) -> "Listing":
        """Makes a listing of entries, filled up so that reading past the last place is safe."""
        longest = int(np.diff(entries.starts).max(initial=0))
        tokens, ends, made = (
            np.pad(column, (0, max(longest, 1)))
            for column in (entries.tokens, entries.ends, entries.made)
        )
        return cls(entries.starts, tokens, ends, made, np.zeros(longest, np.int32))


class Tables(NamedTuple):
    """A compiled list of texts; the same for all rows.

    Attributes:
      next_state: `[S, C]`.
      made: `[S, C]`, the flag of the mentions that a character makes.
      utf8_next: `[U, 512]`, the state within a character after a byte.
      utf8_class: `[U, 512]`, the class of the character that is whole with it, else -1.
      utf8_broken: `[U, 512]`, the class of what is no character and ends before it, else -1.
      byte_starts: `[V + 1]`, the first byte of each token.
      token_bytes: `[N]` of all tokens.
      first_class: `[V]`, the class of a token's first character; C for one without any.
      base_numbers: `[S]`, the place of each state's base in `bases`.
      bases: what tokens come to at each base.
      others: what comes to something else in a state than at its base.
      within_tokens: `[H]`, the ids that begin within a character.
      partial_tokens: `[P]`, the ids that are a part of a character.
      partial_within: `[P]`, the states within a character that they lead to.
      live: `[S, U]`, whether a character that is not whole may lead on in a listed text.
    """

    next_state: _Ints
    made: _Ints
    utf8_next: _Ints
    utf8_class: _Ints
    utf8_broken: _Ints
    byte_starts: _Ints
    token_bytes: _Ints
    first_class: _Ints
    base_numbers: _Ints
    bases: Listing
    others: Listing
    within_tokens: _Ints
    partial_tokens: _Ints
    partial_within: _Ints
    live: Bool[Array | np.ndarray, "S U"]

    @classmethod
    def of(cls, compiled: TokenAutomaton, num_ids: int) -> "Tables":
        """The tables for a model.

        Args:
          compiled: the automaton of a list and a vocabulary.
          num_ids: number of ids of the model; those beyond the vocabulary say nothing.
        """
        automaton, utf8 = compiled.automaton, compiled.utf8
        num_classes = automaton.next_state.shape[1]
        num_more = num_ids - len(compiled.token_bytes)
        contents = [*compiled.token_bytes, *[()] * num_more]
        flat = np.array([*itertools.chain.from_iterable(contents), 0], np.int32)
        starts = np.cumsum([0, *map(len, contents)]).astype(np.int32)
        is_broken = utf8.breaks & compiled.says_broken
        firsts = np.pad(compiled.first_classes, (0, num_more), constant_values=num_classes)
        withins = np.pad(compiled.ends_within, (0, num_more))
        is_part = (firsts == num_classes) & (withins > 0)
        return cls(
            next_state=automaton.next_state,
            made=compiled.flag_places.of_mentions(automaton.made),
            utf8_next=utf8.next_state,
            utf8_class=utf8.class_of,
            utf8_broken=np.where(is_broken, automaton.broken, -1).astype(np.int32),
            byte_starts=starts,
            token_bytes=flat,
            first_class=firsts,
            base_numbers=compiled.base_numbers,
            bases=Listing.of(compiled.bases),
            others=Listing.of(compiled.others),
            within_tokens=compiled.within_tokens,
            partial_tokens=np.flatnonzero(is_part).astype(np.int32),
            partial_within=withins[is_part],
            live=compiled.live,
        )


class Mask(NamedTuple):
    """What must not come up in each output.

    The token with which a row's text would have an unwanted text in it, if it ended there, is
    removed. Where a longer text that may be said is under way, only what goes on with that is left,
    until it is whole: so "rice boat" can be said where "rice" cannot. If nothing is left at all
    (the vocabulary cannot spell the longer text), nothing is removed.

    Attributes:
      tables: the compiled list of what must not come up.
      flags: what is wrong in each row (`TokenAutomaton.flags`).
    """

    tables: Tables
    flags: Bool[Array | np.ndarray, "B F"]


class Readings(NamedTuple):
    """Where the output of each row stands: as `token_automaton.Reading`."""

    state: Int[Array, "..."]
    within: Int[Array, "..."]


def begin(num_rows: int) -> Readings:
    """All rows at the beginning of a text."""
    return Readings(*(jnp.full(num_rows, number, jnp.int32) for number in BEGINNING))


def read(tables: Tables, readings: Readings, tokens: Int[Array, "..."]) -> Readings:
    """Where outputs stand after one more token each."""
    return _read(tables, None, readings, tokens)[0]


def _read(
    tables: Tables,
    flags: Bool[Array, "B F"] | None,
    readings: Readings,
    tokens: Int[Array, "..."],
) -> tuple[Readings, Bool[Array, "..."]]:
    """Readings after tokens, and whether something unwanted is mentioned up to them.

    Without flags nothing is.
    """
    starts = jnp.take(tables.byte_starts, tokens)
    lengths = jnp.take(tables.byte_starts, tokens + 1) - starts

    def emit(number, goes_on, state, is_bad):
        is_said = goes_on & (number >= 0)
        if flags is not None:
            made = jnp.asarray(tables.made)[state, number]
            is_bad |= is_said & _flags_of(flags, made)
        return jnp.where(is_said, jnp.asarray(tables.next_state)[state, number], state), is_bad

    def step(carry):
        place, state, within, is_bad = carry
        goes_on = place < lengths
        byte = jnp.take(tables.token_bytes, jnp.where(goes_on, starts + place, 0))
        for of in (tables.utf8_broken, tables.utf8_class):
            state, is_bad = emit(jnp.asarray(of)[within, byte], goes_on, state, is_bad)
        within = jnp.where(goes_on, jnp.asarray(tables.utf8_next)[within, byte], within)
        return place + 1, state, within, is_bad

    none = jnp.zeros(tokens.shape, bool)
    _, state, within, is_bad = jax.lax.while_loop(
        lambda carry: jnp.any(carry[0] < lengths), step, (jnp.int32(0), *readings, none)
    )
    return Readings(state, within), is_bad


def _flags_of(flags: Bool[Array, "B F"], numbers: Int[Array, "B ..."]) -> Bool[Array, "B ..."]:
    """Looks up, in each row's flags, those with the given numbers."""
    flat = numbers.reshape(len(flags), -1)
    return jnp.take_along_axis(flags, flat, axis=1).reshape(numbers.shape)


def removed(mask: Mask, readings: Readings, can_be_said: Bool[Array, "B V"]) -> Bool[Array, "B V"]:
    """The ids that may not come next in each row.

    Args:
      mask: what must not come up in each row.
      readings: where they stand.
      can_be_said: the ids that are not banned anyway.
    """
    tables, flags = jax.tree.map(jnp.asarray, mask)
    flag_places = FlagPlaces(tables.next_state.shape[0])
    num_rows, num_ids = can_be_said.shape
    rows = jnp.arange(num_rows)[:, None]
    state, within = readings
    is_within = within > 0
    # Bytes that a token breaks off are said first.
    broken = tables.utf8_broken[within, 0]
    is_broken = is_within & (broken >= 0)
    after = jnp.where(is_broken, tables.next_state[state, broken], state)
    is_bad_already = is_broken & _flags_of(flags, jnp.asarray(tables.made)[state, broken])

    nothing = jnp.zeros((num_rows, num_ids), bool)
    found = nothing
    for listing, place in ((tables.bases, tables.base_numbers[after]), (tables.others, after)):
        tokens, is_wrong = _listed(listing, place, flags, num_ids)
        found = found.at[rows, tokens].set(is_wrong, mode="drop")
    # What a first character makes is wrong with every token that it begins.
    made = _flags_of(flags, jnp.asarray(tables.made)[after])
    by_class = jnp.pad(made, ((0, 0), (0, 1)))
    is_made = functools.partial(jnp.take, by_class, tables.first_class, axis=1)
    of_first = jax.lax.cond(jnp.any(made), is_made, lambda: nothing)
    found |= of_first | is_bad_already[:, None]

    def going_on():
        """What is left where a text is under way that makes right what is wrong so far."""
        tokens, is_wrong = _listed(tables.others, state, flags, num_ids)
        is_left = nothing.at[rows, tokens].set(~is_wrong, mode="drop") & ~of_first
        if tables.partial_tokens.size:
            part = tables.live[state][:, tables.partial_within]
            is_left = is_left.at[rows, tables.partial_tokens].set(part)
        return ~is_left | is_within[:, None]

    goes_on = _flags_of(flags, flag_places.end_in(state)[:, None])
    found = jax.lax.cond(
        jnp.any(goes_on), lambda: jnp.where(goes_on, going_on(), found), lambda: found
    )

    def of_characters():
        """Tokens that begin within a character: all others break it off."""
        heads = jnp.broadcast_to(tables.within_tokens, (num_rows, tables.within_tokens.size))
        begun = Readings(*(jnp.broadcast_to(of[:, None], heads.shape) for of in readings))
        ends, is_bad = _read(tables, flags, begun, heads)
        is_live = (ends.within == 0) | tables.live[ends.state, ends.within]
        end_flags = jnp.where(is_live, flag_places.into(ends.state), flag_places.end_in(ends.state))
        is_wrong = is_bad | _flags_of(flags, end_flags)
        kept = jnp.where(is_within[:, None], is_wrong, found[rows, heads])
        return found.at[rows, heads].set(kept)

    if tables.within_tokens.size:
        found = jax.lax.cond(jnp.any(is_within), of_characters, lambda: found)
    return found & jnp.any(can_be_said & ~found, axis=1, keepdims=True)


def _listed(
    listing: Listing, places: Int[Array, "B"], flags: Bool[Array, "B F"], num_ids: int
) -> tuple[Int[Array, "B L"], Bool[Array, "B L"]]:
    """The tokens at a place of each row, filled up with `num_ids`, and whether they are wrong."""
    first, last = listing.starts[places], listing.starts[places + 1]
    entries = first[:, None] + jnp.arange(listing.longest.size)[None]
    tokens = jnp.where(entries < last[:, None], listing.tokens[entries], num_ids)
    is_wrong = _flags_of(flags, listing.ends[entries]) | _flags_of(flags, listing.made[entries])
    return tokens, is_wrong
