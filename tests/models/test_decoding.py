"""Decoding against teacher-forced probabilities, brute force and counted frequencies."""

import dataclasses
import functools
import itertools
import json

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import t5_inputs
from helpers.tiny_llama import LLAMA

from tnt_jax import annotators
from tnt_jax.data import records
from tnt_jax.data.token_automaton import Listed
from tnt_jax.models import decoding, families, masking, t5
from tnt_jax.models.decoding import Decoding
from tnt_jax.runtime.errors import UsageError

CONFIG = t5.T5Config(
    vocab_size=12,
    emb_dim=16,
    num_heads=2,
    num_encoder_layers=1,
    num_decoder_layers=1,
    head_dim=8,
    mlp_dim=16,
    mlp_activations=("relu",),
    logits_via_embedding=False,
)
SOURCES = jnp.asarray([[5, 3, 8, 1, 0], [2, 2, 9, 4, 1], [7, 1, 0, 0, 0]], jnp.int32)
NEVER = 11  # an EOS that random rows need not meet


@functools.cache
def random_params():
    """A model whose greedy outputs are neither short nor one token over and over."""
    rng = np.random.default_rng(9)
    params = jax.tree.map(
        lambda leaf: rng.normal(0, 0.5, leaf.shape).astype(np.float32),
        t5.T5(CONFIG).abstract_params(),
    )
    for stack in ("encoder", "decoder"):
        params[stack]["relpos_bias"]["rel_embedding"] *= 4  # so that the position matters
    return jax.tree.map(jnp.asarray, params)


def decode(sources=SOURCES, keys=None, mask=None, prefixes=None, **settings):
    settings.setdefault("end_ids", (1,))
    settings["banned_ids"] = (0, *settings.get("banned_ids", ()))  # as for T5, whose padding is 0
    decoded = decoding.decode(
        random_params(),
        sources,
        jnp.sum(sources != 0, axis=1),
        keys,
        mask,
        prefixes,
        config=CONFIG,
        decoding=Decoding(**settings),
    )
    return decoding.Decoded(*map(np.asarray, decoded))


@jax.jit
def _forward(sources, targets):
    inputs = jnp.pad(targets, ((0, 0), (1, 0)))[:, :-1]
    batch = {
        "encoder_input_tokens": sources,
        "decoder_input_tokens": inputs,
        "decoder_target_tokens": targets,
    }
    return t5_inputs.make_forward(CONFIG)(random_params(), batch)


def log_probs(sources, targets, removed=(0,)):
    """Teacher-forced `[B, T, V]` in float64, with some ids removed."""
    logits = np.array(_forward(jnp.asarray(sources), jnp.asarray(targets)), np.float64)
    logits[:, :, list(removed)] = -np.inf
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def chosen(log_probs, tokens):
    return np.take_along_axis(log_probs, tokens[:, :, None], axis=2)[:, :, 0]


# ---------------------------------------------------------------------------------------- Greedy


def test_greedy_takes_the_teacher_forced_argmax():
    for banned in ((), (6, 7)):
        decoded = decode(max_length=10, end_ids=(NEVER,), banned_ids=banned)
        expected = log_probs(SOURCES, decoded.tokens, removed=(0, *banned))
        np.testing.assert_array_equal(decoded.tokens, expected.argmax(-1))
        total = chosen(expected, decoded.tokens).sum(1)
        np.testing.assert_allclose(decoded.log_prob, total, atol=1e-4)
        assert (6 in decoded.tokens) == (6 not in banned)


def test_a_row_stops_at_its_eos_and_the_loop_with_the_last_row():
    free = decode(max_length=10, end_ids=(NEVER,)).tokens
    eos_id = int(free[0, 3])
    ends = [row.tolist().index(eos_id) + 1 for row in free]
    assert ends == [4, 2, 2]
    decoded = decode(max_length=10, end_ids=(eos_id,))
    for row, end in enumerate(ends):
        np.testing.assert_array_equal(decoded.tokens[row], [*free[row, :end], *[0] * (10 - end)])
    assert decoded.num_steps == 4
    assert decode(SOURCES[1:], max_length=10, end_ids=(eos_id,)).num_steps == 2
    gained = chosen(log_probs(SOURCES, free), free)
    expected = [row[:end].sum() for row, end in zip(gained, ends, strict=True)]
    np.testing.assert_allclose(decoded.log_prob, expected, atol=1e-4)


class Words:
    """Each id is a word; those that end an output or fill it up say nothing."""

    size = CONFIG.vocab_size
    says_broken = True
    run_ids = frozenset()
    token_bytes = tuple(b"" if i in (0, NEVER) else f" w{i}".encode() for i in range(size))


def text_of(ids):
    return " ".join(f"w{token}" for token in ids if token not in (0, NEVER))


def says_any(ids, texts):
    return any(f" {text} " in f" {text_of(ids)} " for text in texts)


def mask_of(listed_of_rows):
    """A mask of one list for all rows, of which each may say something else."""
    compiled = listed_of_rows[0].compiled(Words)
    flags = np.stack([compiled.flags(listed.allowed) for listed in listed_of_rows])
    return masking.Mask(masking.Tables.of(compiled, CONFIG.vocab_size), flags)


def test_a_banned_text_never_comes_up():
    free = decode(max_length=10, end_ids=(NEVER,)).tokens
    banned = [free[0, 2:4].tolist(), free[1, 4:7].tolist()]
    texts = tuple(map(text_of, banned))
    mask = mask_of([Listed(texts), Listed(texts), Listed(texts, allowed=texts)])
    tokens = decode(max_length=10, end_ids=(NEVER,), mask=mask).tokens
    expected = log_probs(SOURCES, tokens)
    for row, position in itertools.product((0, 1), range(10)):
        before = tokens[row, :position].tolist()
        for *prefix, last in banned:
            if before[-len(prefix) :] == prefix:
                expected[row, position, last] = -np.inf
    np.testing.assert_array_equal(tokens, expected.argmax(-1))
    # The row that bans nothing says what it said; the others go on where they must part.
    np.testing.assert_array_equal(tokens[2], free[2])
    assert (tokens[0, :3] == free[0, :3]).all() and tokens[0, 3] != free[0, 3]


def test_a_banned_text_never_comes_up_in_beams():
    settings = {"max_length": 8, "end_ids": (10,), "banned_ids": (NEVER,), "num_beams": 4}
    free = decode(**settings)
    texts = (text_of(free.tokens[0, 2:4]), text_of(free.tokens[1, 1:3]))
    mask = mask_of([Listed(texts), Listed(texts), Listed(texts, allowed=texts)])
    masked = decode(mask=mask, **settings)
    assert says_any(free.tokens[0], texts) and says_any(free.tokens[1], texts)
    assert not says_any(masked.tokens[0], texts) and not says_any(masked.tokens[1], texts)
    np.testing.assert_array_equal(masked.tokens[2], free.tokens[2])
    # What each step removes is of the beam that is gone on from: the sum is of what was left.
    left = log_probs(SOURCES, masked.tokens, removed=(0, NEVER))
    for row, position in itertools.product((0, 1), range(8)):
        for token in range(1, NEVER):
            said = [*masked.tokens[row, :position].tolist(), token]
            if any(f" {text_of(said)} ".endswith(f" {text} ") for text in texts):
                left[row, position, token] = -np.inf
    left = left - np.log(np.exp(left).sum(-1, keepdims=True))
    ends = [row.index(10) + 1 if 10 in row else 8 for row in masked.tokens.tolist()]
    expected = [of[:end].sum() for of, end in zip(chosen(left, masked.tokens), ends, strict=True)]
    np.testing.assert_allclose(masked.log_prob, expected, atol=1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_nothing_that_a_gazetteer_marks_comes_up(seed, tmp_path):
    """Names begin, end and hold one another; some of each row are supported."""
    rng = np.random.default_rng(seed)
    num_rows, length = 200, 16
    names = rng.permutation(
        ["w2", "w2 w3", "w3 w4", "w4", "w2 w3 w4", "w5 w2", "w5", "w3 w5", "w4 w2 w2", "w3"]
    ).tolist()
    values = {first: [other] for first, other in zip(names[::2], names[1::2], strict=False)}
    path = tmp_path / "names.json"
    path.write_text(json.dumps({"name": values}))
    gazetteer = annotators.Gazetteer(path=str(path))
    # Of a value that is stated by its first name the other one is supported, too.
    asked = [
        records.Record(
            id=str(number),
            inputs=" ; ".join(rng.permutation([*values])[: int(rng.integers(0, 3))]),
        )
        for number in range(num_rows)
    ]
    listed = [gazetteer.unwanted(record) for record in asked]
    settings = {"max_length": length, "end_ids": (NEVER,), "temperature": 9.0}
    settings["banned_ids"] = (1, 6, 7, 8)  # rather words of names
    sources = jnp.asarray(rng.integers(2, 11, (num_rows, 3)))
    keys = decoding.record_keys(seed, [record.id for record in asked])

    def marked(tokens):
        """How many names are marked, but for what more tokens could have made another one."""
        number = 0
        for record, ids in zip(asked, tokens, strict=True):
            targets = text_of(ids)
            spans = gazetteer.annotate(dataclasses.replace(record, targets=targets)).spans
            is_cut = NEVER not in ids
            number += sum(not is_cut or targets[s.end :].count(" ") >= 2 for s in spans)
        return number

    assert marked(decode(sources, keys, **settings).tokens) > 30
    with_all = decode(sources, keys, mask=mask_of(listed), **settings).tokens
    assert marked(with_all) == 0
    # Without what is supported, the same texts are banned; what holds one of them is out of reach.
    without = [of._replace(allowed=()) for of in listed]
    with_banned = decode(sources, keys, mask=mask_of(without), **settings).tokens
    assert marked(with_banned) == 0

    def num_said(tokens):
        """How many supported names are said that hold an unsupported one."""
        return sum(
            says_any(row, [name])
            and any(f" {part} " in f" {name} " for part in {*of.texts} - {*of.allowed})
            for row, of in zip(tokens, listed, strict=True)
            for name in of.allowed
        )

    assert num_said(with_all) >= 3
    assert num_said(with_banned) == 0


def test_a_prefix_is_said_and_then_gone_on_from():
    """Greedy after it is the teacher-forced argmax; its own tokens count in the log-probability."""
    prefixes = jnp.asarray([[3, 9, 3, 7], [5, -1, -1, -1], [-1, -1, -1, -1]], jnp.int32)
    decoded = decode(max_length=10, end_ids=(NEVER,), prefixes=prefixes)
    expected = log_probs(SOURCES, decoded.tokens)
    best = expected.argmax(-1)
    for row, length in enumerate((4, 1, 0)):
        np.testing.assert_array_equal(decoded.tokens[row, :length], prefixes[row, :length])
        np.testing.assert_array_equal(decoded.tokens[row, length:], best[row, length:])
        assert (best[row, :length] != prefixes[row, :length]).any() or not length
    total = chosen(expected, decoded.tokens).sum(1)
    np.testing.assert_allclose(decoded.log_prob, total, atol=1e-4)


def test_an_output_goes_on_from_its_own_prefix_as_it_went_on():
    keys = decoding.record_keys(3, ["a", "b", "c"])
    free = decode(keys=keys, max_length=10, end_ids=(NEVER,), temperature=1.0)
    same = decode(
        keys=keys, max_length=10, end_ids=(NEVER,), temperature=1.0, prefixes=free.tokens[:, :6]
    )
    np.testing.assert_array_equal(same.tokens, free.tokens)
    np.testing.assert_allclose(same.log_prob, free.log_prob, atol=1e-5)
    # One that has ended stays ended.
    ended = free.tokens[:, :6]
    ended = decode(max_length=10, end_ids=(int(ended[0, 2]),), prefixes=ended).tokens
    assert not ended[0, 3:].any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_length": 3}, "expected prefixes of at most Decoding.max_length=3 tokens, found 4"),
        ({"max_length": 9, "num_beams": 2}, "prefixes are for one output at a time: expected "),
    ],
)
def test_a_prefix_that_does_not_fit_is_an_error(settings, message):
    with pytest.raises(UsageError, match=message):
        decode(prefixes=jnp.ones((3, 4), jnp.int32), **settings)


def test_id_0_is_an_ordinary_token_where_nobody_bans_it():
    """Padding is the tokeniser's affair: an output goes on after a 0, also one that is given."""
    keys = decoding.record_keys(3, ["a", "b", "c"])
    settings = Decoding(max_length=12, end_ids=(NEVER,), temperature=9.0)
    lengths = jnp.sum(SOURCES != 0, axis=1)

    def decoded(prefixes=None):
        given = (random_params(), SOURCES, lengths, keys, None, prefixes)
        return decoding.decode(*given, config=CONFIG, decoding=settings)

    free = decoded()
    assert ((free.tokens[:, 1:6] == 0) & (free.tokens[:, 2:7] != 0)).any()
    assert free.num_steps == 12
    same = decoded(free.tokens[:, :6])
    np.testing.assert_array_equal(same.tokens, free.tokens)
    np.testing.assert_allclose(same.log_prob, free.log_prob, atol=1e-5)


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_source_padding_and_filler_rows_change_nothing(settings):
    narrow = decode(max_length=6, end_ids=(3,), **settings)
    padded = jnp.pad(SOURCES, ((0, 2), (0, 9)))  # two rows without any token
    wide = decode(padded, max_length=6, end_ids=(3,), **settings)
    np.testing.assert_array_equal(wide.tokens[:3], narrow.tokens)
    np.testing.assert_allclose(wide.log_prob[:3], narrow.log_prob, atol=1e-5)
    assert wide.num_steps == narrow.num_steps
    assert not wide.tokens[3:].any() and not wide.log_prob[3:].any()


def test_a_step_never_touches_the_encoder_states():
    sources = jnp.ones((3, 37), jnp.int32)  # 37 and 16 meet in no other array
    jaxpr = jax.make_jaxpr(
        lambda: decoding.decode(
            random_params(),
            sources,
            jnp.full(3, 37),
            config=CONFIG,
            decoding=Decoding(max_length=5),
        )
    )()

    def equations(jaxpr):
        for equation in jaxpr.eqns:
            yield equation
            for inner in jax.extend.core.jaxprs_in_params(equation.params):
                yield from equations(inner)

    def products(jaxpr):
        return [
            [variable.aval.shape for variable in equation.invars]
            for equation in equations(jaxpr)
            if equation.primitive.name == "dot_general"
        ]

    (loop,) = (e for e in equations(jaxpr.jaxpr) if e.primitive.name == "while")
    encoder_states = (3, 37, 16)
    assert any(encoder_states in shapes for shapes in products(jaxpr.jaxpr))
    in_loop = products(loop.params["body_jaxpr"].jaxpr)
    assert len(in_loop) == 14  # q k v o, q o, 2 x 2 of attention, 2 of the MLP, bias, logits
    assert not any(encoder_states in shapes for shapes in in_loop)


# -------------------------------------------------------------------------------------- Sampling


def test_a_record_keeps_its_sample_at_any_batch_size_and_order():
    ids = [f"record-{i}" for i in range(12)]
    sources = jnp.tile(SOURCES, (4, 1))
    settings = {"max_length": 8, "end_ids": (NEVER,), "temperature": 1.0, "top_p": 0.95}
    together = decode(sources, decoding.record_keys(0, ids), **settings).tokens
    again = decode(sources, decoding.record_keys(0, ids), **settings).tokens
    np.testing.assert_array_equal(again, together)

    order = np.random.default_rng(0).permutation(12)
    shuffled = decode(
        sources[order], decoding.record_keys(0, [ids[i] for i in order]), **settings
    ).tokens
    np.testing.assert_array_equal(shuffled, together[order])
    for start in range(0, 12, 4):
        rows = slice(start, start + 4)
        part = decode(sources[rows], decoding.record_keys(0, ids[rows]), **settings).tokens
        np.testing.assert_array_equal(part, together[rows])

    assert len(np.unique(together[::3], axis=0)) == 4  # same source, four records
    other_seed = decode(sources, decoding.record_keys(1, ids), **settings).tokens
    assert (other_seed != together).any(axis=1).mean() > 0.5


def test_a_record_key_is_the_same_in_every_process():
    key = decoding.record_keys(7, ["train/11", "train/12"])[1]
    # The first eight bytes of sha256("7/train/12"), little-endian.
    np.testing.assert_array_equal(jax.random.key_data(key), [2027207813, 1007973740])


def test_every_position_has_noise_of_its_own():
    sources, keys = jnp.tile(SOURCES[:1], (800, 1)), jax.random.split(jax.random.key(1), 800)
    # So hot that the ten ids besides padding and EOS are equally likely.
    tokens = decode(sources, keys, max_length=2, temperature=1e4, banned_ids=(NEVER,)).tokens
    repeats = (tokens[:, 0] == tokens[:, 1])[tokens[:, 0] != 1].mean()
    assert 0.06 < repeats < 0.14


NUM_DRAWS = 8000


def first_tokens(**settings):
    """The first tokens of many records with one source; the same records at every call."""
    keys = jax.random.split(jax.random.key(5), NUM_DRAWS)
    sources = jnp.tile(SOURCES[:1], (NUM_DRAWS, 1))
    return decode(sources, keys, max_length=1, end_ids=(NEVER,), **settings).tokens[:, 0]


def assert_drawn_from(tokens, probs):
    counts = np.bincount(tokens, minlength=12)
    np.testing.assert_array_equal(counts > 0, probs * NUM_DRAWS > 1)
    expected = NUM_DRAWS * probs[probs > 0]
    chi_square = ((counts[probs > 0] - expected) ** 2 / expected).sum()
    assert chi_square < 32  # 11 degrees of freedom: 1 in 1,000 correct samplers


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_sampled_frequencies_are_the_tempered_probabilities(temperature):
    weights = np.exp(log_probs(SOURCES[:1], [[2]])[0, 0] / temperature)
    assert_drawn_from(first_tokens(temperature=temperature), weights / weights.sum())


@pytest.mark.parametrize(("top_k", "top_p"), [(3, 1.0), (0, 0.6), (0, 0.01), (6, 0.7)])
def test_top_k_and_top_p_restrict_the_support_exactly(top_k, top_p):
    weights = np.exp(log_probs(SOURCES[:1], [[2]])[0, 0] / 2)  # temperature 2
    by_weight = np.argsort(-weights)
    kept = by_weight[: top_k or 12]
    before = np.cumsum(weights[kept]) - weights[kept]
    kept = kept[before < top_p * weights[kept].sum()]
    probs = np.zeros(12)
    probs[kept] = weights[kept] / weights[kept].sum()
    assert_drawn_from(first_tokens(temperature=2.0, top_k=top_k, top_p=top_p), probs)


def test_the_noise_belongs_to_the_token_whatever_is_cut():
    free = first_tokens(temperature=2.0)
    cut = first_tokens(temperature=2.0, top_k=3)
    survives = np.isin(free, np.unique(cut))
    np.testing.assert_array_equal(cut[survives], free[survives])

    banned_id = int(np.bincount(free[free != NEVER]).argmax())
    banned = first_tokens(temperature=2.0, banned_ids=(banned_id,))
    np.testing.assert_array_equal(banned[free != banned_id], free[free != banned_id])
    assert banned_id not in banned


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
@pytest.mark.parametrize("family", ["t5", "causal_lm"])
def test_parameters_that_are_cast_once_say_the_same(family, settings):
    config = {"t5": CONFIG, "causal_lm": LLAMA}[family]
    config = dataclasses.replace(config, dtype=jnp.dtype("bfloat16"))
    network = families.network_of(config)
    rng = np.random.default_rng(4)
    params = jax.tree.map(
        lambda leaf: rng.normal(0, 0.5, leaf.shape).astype(np.float32), network.abstract_params()
    )
    cast = jax.tree.map(lambda x, dtype: x.astype(dtype), params, network.computed_dtypes())
    assert any(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(cast))
    found = [
        decoding.decode(
            jax.tree.map(jnp.asarray, of),
            SOURCES,
            jnp.sum(SOURCES != 0, axis=1),
            config=config,
            decoding=Decoding(max_length=6, end_ids=(NEVER,), **settings),
        )
        for of in (params, cast)
    ]
    jax.tree.map(np.testing.assert_array_equal, *found)


# ----------------------------------------------------------------------------------- Beam search

LENGTH = 4
EOS = 1
SYMBOLS = (2, 3, 5, 8)  # the others are banned, so that every sequence can be listed
BANNED = tuple(sorted(set(range(2, 12)) - set(SYMBOLS)))


@functools.cache
def next_log_probs(row):
    """From every prefix of symbols to the log-probabilities of what follows it."""
    prefixes = list(itertools.product(SYMBOLS, repeat=LENGTH - 1))
    targets = np.asarray([[*prefix, EOS] for prefix in prefixes], np.int32)
    sources = np.repeat(np.asarray(SOURCES)[row : row + 1], len(prefixes), axis=0)
    table = log_probs(sources, targets, removed=(0, *BANNED))
    return {prefix[:n]: table[i, n] for i, prefix in enumerate(prefixes) for n in range(LENGTH)}


def score(log_prob, length, alpha):
    return log_prob / ((5 + length) / 6) ** alpha


def best_of_all(row, alpha, ends):
    """The best ended sequence among all that exist."""
    table = next_log_probs(row)
    ended = [
        (sum(table[prefix[:i]][prefix[i]] for i in range(n)) + table[prefix][end], (*prefix, end))
        for n in range(LENGTH)
        for prefix in itertools.product([s for s in SYMBOLS if s not in ends], repeat=n)
        for end in ends
    ]
    return max(ended, key=lambda found: score(found[0], len(found[1]), alpha))


def beam_search(row, num_beams, alpha, ends):
    """T5X's search without its early exit, on lists; each end adds a continuation of each beam."""
    table = next_log_probs(row)
    live, finished = [(0.0, ())], []
    for _ in range(LENGTH):
        candidates = [
            (log_prob + table[prefix][token], (*prefix, token))
            for log_prob, prefix in live
            for token in (EOS, *SYMBOLS)
        ]
        candidates = sorted(candidates, reverse=True)[: (1 + len(ends)) * num_beams]
        finished += [candidate for candidate in candidates if candidate[1][-1] in ends]
        live = [candidate for candidate in candidates if candidate[1][-1] not in ends][:num_beams]
        assert len(live) == num_beams or len(live) == len(SYMBOLS) + 1 - len(ends)
    if not finished:
        return live[0]
    return max(finished, key=lambda found: score(found[0], len(found[1]), alpha))


def assert_beams(decoded, expected):
    for tokens, log_prob, (best_log_prob, best) in zip(
        decoded.tokens, decoded.log_prob, expected, strict=True
    ):
        np.testing.assert_array_equal(tokens, [*best, *[0] * (LENGTH - len(best))])
        assert log_prob == pytest.approx(best_log_prob, abs=1e-4)


# 2 puts short and long close to each other. Chat models have up to three ends.
@pytest.mark.parametrize(("alpha", "ends"), [(0.0, (EOS,)), (2.0, (EOS,)), (2.0, (EOS, 3, 8))])
def test_enough_beams_find_the_best_of_all_sequences(alpha, ends):
    decoded = decode(
        max_length=LENGTH, num_beams=64, length_penalty=alpha, end_ids=ends, banned_ids=BANNED
    )
    assert_beams(decoded, [best_of_all(row, alpha, ends) for row in range(3)])


@pytest.mark.parametrize(
    ("num_beams", "alpha", "ends"),
    [(2, 0.6, (EOS,)), (3, 2.0, (EOS,)), (2, 0.6, (EOS, 5)), (2, 6.0, (EOS, 3, 5))],
)
def test_few_beams_find_what_the_search_on_lists_finds(num_beams, alpha, ends):
    decoded = decode(
        max_length=LENGTH,
        num_beams=num_beams,
        length_penalty=alpha,
        end_ids=ends,
        banned_ids=BANNED,
    )
    assert_beams(decoded, [beam_search(row, num_beams, alpha, ends) for row in range(3)])


# ------------------------------------------------------------------------------------ User errors


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_length": 0}, "Decoding.max_length: expected at least 1, found 0"),
        ({"num_beams": 0}, "Decoding.num_beams: expected at least 1"),
        ({"temperature": -1.0}, "Decoding.temperature: expected 0"),
        ({"temperature": 1.0, "top_p": 0.0}, "Decoding.top_p: expected above 0"),
        ({"temperature": 1.0, "top_k": -1}, "Decoding.top_k: expected 0"),
        ({"length_penalty": -0.5}, "Decoding.length_penalty: expected 0"),
        ({"banned_ids": (4, 1)}, "Decoding.banned_ids: expected none of end_ids.*, found 1$"),
        ({"top_k": 5}, "set temperature above 0"),
        ({"top_p": 0.9}, "set temperature above 0"),
        ({"num_beams": 2, "temperature": 1.0}, "set num_beams=1 or temperature=0"),
        ({"temperature": 1.0}, "row_keys"),
        ({"end_ids": (12,)}, "Decoding.end_ids: .* from 0 to 11; found 12\\b"),
        ({"banned_ids": (3, 12)}, "Decoding.banned_ids: .* from 0 to 11; found 12\\b"),
        ({"banned_ids": (-1,)}, "Decoding.banned_ids: .* from 0 to 11; found -1\\b"),
        ({"temperature": 1.0, "top_k": 13}, "top_k: .* at most the vocabulary of 12 ids, found 13"),
    ],
)
def test_a_wrong_setting_is_named(settings, message):
    with pytest.raises(UsageError, match=message):
        decode(**{"max_length": 4, **settings})


class Tokens:
    """Ten ids of twelve rows: 7 and 8 end an output, and 0 and 9 say nothing."""

    size, end_ids, never_said = 10, frozenset([7, 8]), frozenset([0, 9])


@pytest.mark.parametrize(
    ("asked", "ends", "banned"),
    [
        ({}, (7, 8), (0, 9, 10, 11)),
        ({"end_ids": (4,), "banned_ids": (5,)}, (4, 7, 8), (5, 0, 9, 10, 11)),
        ({"end_ids": (9,)}, (7, 8, 9), (0, 10, 11)),  # a control token, by which a user stops
        ({"end_ids": (4,), "banned_ids": (7,)}, (4, 8), (7, 0, 9, 10, 11)),
    ],
)
def test_ends_of_a_user_come_beside_those_of_the_tokeniser(asked, ends, banned):
    within = decoding.within_vocabulary(Decoding(max_length=4, **asked), Tokens(), CONFIG)
    assert (within.end_ids, within.banned_ids) == (ends, banned)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"banned_ids": (7,)}, "none of end_ids"),
        ({"end_ids": (99,)}, "from 0 to 11; found 99$"),
        ({"temperature": 1.0, "top_k": 13}, "12 ids, found 13$"),
    ],
)
def test_what_no_tokeniser_can_say_is_named_alone(asked, message):
    with pytest.raises(UsageError, match=message):
        decoding.within_vocabulary(Decoding(max_length=4, **asked), Tokens(), CONFIG)
