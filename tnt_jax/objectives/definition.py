"""The objectives of Targeted Negative Training, dense over `[B, T, V]`: their definition.

Axes: `B` batch, `T` target position, `V` vocabulary, `K` ids per position. At one position: `p0` is
the original model, `p` the current one, `S` the set of removed ids (empty at an ordinary position),
`m = p(S)`, and `q` is `p` restricted to the ids outside `S` and renormalised. The desired
distribution `p_new` is the same restriction of `p0`.

A mark may have a strength s, at most 1: `p_new(v)` is proportional to `p0(v) (1 - s_v)`. Ids of
strength 1 are `S`. Ids of a smaller one are not in `S`: they are ordinary ids of an original whose
logits there are changed by `log(1 - s)`, and `p0` in what follows is that original's. A strength
above 0 lowers an id, one below 0 raises it, and 0 does nothing. Where one id has several strengths
at a position, the largest counts.

Everything is computed in float32 from logits, never from `1 - p`, so `p0(S)` and `p(S)` may round
to 1: no value and no gradient is NaN or Inf for finite logits (gaps of 1e4 are tested) and any `S`
that leaves one id.

Source: Zhang, Ranganath and Tafvizi, "Towards Minimal Targeted Updates of Language Models with
Targeted Negative Training" (arXiv 2406.13660). With `smoothing` set as they set it, the losses and
their gradients are those of google/t5patches, whose forward terms are cross-entropies: larger by
the entropy of the target, which has no gradient.

UNDIAL: Dong, Lin, Belkin, Huerta and Vulić, "UNDIAL: Self-Distillation with Adjusted Logits for
Robust Unlearning in Large Language Models" (arXiv 2402.10052). Its target at a marked token `y` is
`softmax(z0 - beta onehot(y))`, which is `p_new` of strength `1 - exp(-beta)`; its loss is the
cross-entropy with it, larger than forward KL by the entropy of the target. Its authors mark every
token of the texts to forget, or their entities and nouns alone, and train on no others.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tnt_jax.runtime.array_types import Array, Bool, Float, Int
from tnt_jax.runtime.errors import UsageError

# Stands for log 0. Finite, because -inf - (-inf) is NaN and 0 * inf is a NaN gradient; so low that
# adding any logit to it changes nothing and its exponential is exactly 0.
LOG_ZERO = -1e30

# `negative_likelihood` earns nothing for p(S) below exp(-10.3) = 3.4e-5, about 1/V for T5; without
# it the loss has no minimum. The constant is t5patches's, which applies it with the wrong sign.
LOG_LIKELIHOOD_FLOOR = -10.3

# Of the series of exp(x) for |x| < 1: what follows is below 3e-8 of the sum.
_LAST_POWER = 10

_DIVERGENCES = (
    "forward_kl",
    "reverse_kl",
    "reverse_kl_split",
    "jensen_shannon",
    "jensen_shannon_split",
)
_PREFERENCES = ("negative_preference", "final_token_preference")
NEGATIVE_TERMS = (*_DIVERGENCES, "negative_likelihood", "unlikelihood", *_PREFERENCES, "none")
POSITIVE_TERMS = ("forward_kl", "reverse_kl", "jensen_shannon", "log_likelihood", "none")
_WITH_ORIGINAL = (*_DIVERGENCES, *_PREFERENCES)
_SPLIT_TERMS = ("forward_kl", "reverse_kl_split", "jensen_shannon_split")
_SMOOTHABLE_TERMS = ("forward_kl", "reverse_kl", "log_likelihood", "none")

# UNDIAL's beta where none is given: the middle one of those that its authors suggest, 3, 10 and 30.
UNDIAL_BETA = 10.0


class Certificate(NamedTuple):
    """What an update has left undone and what it cost, in nats, each `[B, T]`.

    `residual + collateral` is `KL(p_new || p)`. Without removed ids `residual` and `smallest_cost`
    are 0 and `collateral` is `KL(p0 || p)`.

    Ids of a strength below 1 may stay, so they count among everything else. `smallest_cost` is then
    `KL(p_new || p0)` with the original as it is, not lowered: more than `-log(1 - p0(S))`.
    """

    residual: Float[Array, "B T"]  # -log(1 - p(S)): mass still on what must go
    collateral: Float[Array, "B T"]  # KL(p_new || q): everything else that moved
    smallest_cost: Float[Array, "B T"]  # -log(1 - p0(S)) = KL(p_new || p0): no update costs less


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinalTokenPreference:
    """Final-token preference optimisation (FTPO): chosen ids are preferred to the removed ones.

    Of the logits `z` of the current model and `z0` of the original, with the chosen ids `C`, the
    targets `T = C + S` and all other ids `N`:

        gap_c   z_c - log of the sum of e^(z_r) over r in S; of one removed id, z_c - z_r
        w_c     (margin - gap_c) / margin, between 0 and 1; its gradient counts
        loss    sum of w_c softplus(margin - gap_c) / sum of w_c, over C; 0 where all w_c are 0
                + target_weight * mean over T of max(|z_j - z0_j| - target_slack, 0)^2
                + rest_weight * mean over N of (z_j - z0_j)^2

    `C` is the `num_chosen` likeliest ids outside `S` of the original, without those of less than
    `min_p` times the probability of its likeliest id, removed or not; the likeliest outside `S` is
    in `C` in any case.

    Source: Paech, Roush, Goldfeder and Shwartz-Ziv, "Antislop: A Comprehensive Framework for
    Identifying and Eliminating Repetitive Patterns in Language Models" (arXiv 2510.15061), and
    `core/ftpo_trainer.py` and `configs/default.yaml` of github.com/sam-paech/auto-antislop. At
    commit 30f1694 the latter has these numbers: 20 candidates of a position, `min_p` 0.01,
    `clip_epsilon_logits` 2, `lambda_mse_target` 0.05, `tau_mse_target` 0.5, `lambda_mse` 0.4. (At
    4b31cae the two of the targets are 0.25 and 1, and a third tether is switched off.) What
    differs: a position has one rejected id there, the first token of a phrase; here every marked
    token has one, unless `MARKS="first_token"`. The weighted mean is over a batch there, here over
    a position. Where all chosen ids have won, that code gives all of them the weight 1; the text
    says that they no longer contribute, and here they do not. That code leaves out positions where
    fewer than four ids pass.

    Attributes:
      num_chosen: Most chosen ids at a position.
      min_p: Least probability of a chosen id, as a share of the original's largest one.
      margin: Logit lead at which a chosen id has won over the removed ones; no gradient beyond it.
      target_weight: Multiplies the mean squared change of the logits of chosen and removed ids.
      target_slack: Change of such a logit, up or down, that costs nothing.
      rest_weight: Multiplies the mean squared change of all other logits.

    Raises:
      UsageError: A number is out of range.
    """

    num_chosen: int = 20
    min_p: float = 0.01
    margin: float = 2.0
    target_weight: float = 0.05
    target_slack: float = 0.5
    rest_weight: float = 0.4

    def __post_init__(self):
        for name, is_valid, allowed in (
            ("num_chosen", self.num_chosen >= 1, "at least 1"),
            ("min_p", 0 < self.min_p <= 1, "above 0, and at most 1"),
            ("margin", 0 < self.margin < math.inf, "above 0, and finite"),
            ("target_weight", 0 <= self.target_weight < math.inf, "0 or more, and finite"),
            ("target_slack", 0 <= self.target_slack < math.inf, "0 or more, and finite"),
            ("rest_weight", 0 <= self.rest_weight < math.inf, "0 or more, and finite"),
        ):
            if not is_valid:
                found = getattr(self, name)
                raise UsageError(f"ftpo: {name}: expected {allowed}, found {found!r}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TntObjective:
    """A loss per target token: one term at negative positions, one at positive positions.

    The terms, with `p_e` the floored `p_new` of `removed_token_floor`:

        forward_kl            KL(p_new || p) = -log(1 - m) + KL(p_new || q)
        reverse_kl            KL(p || p_e)
        reverse_kl_split      -log(1 - m) + KL(q || p_new)                       negative only
        jensen_shannon        JS(p_new, p)
        jensen_shannon_split  -log(1 - m) + JS(p_new, q)                         negative only
        negative_likelihood   max(log m, -10.3)                                  negative only
        unlikelihood          -log(1 - m)                                        negative only
        negative_preference   2/beta softplus(beta log(m / p0(S)))               negative only
        final_token_preference  see `FinalTokenPreference`                       negative only
        log_likelihood        -log p(target)                                     positive only
        none                  0. As negative term, marks are ignored: these positions have the
                              positive term, as in plain fine-tuning

    `negative_preference` is negative preference optimisation (NPO), -2/beta log sigmoid(-beta log
    p/p0), of the removed ids of a position in place of a whole answer: Zhang, Lin, Bai and Mei,
    "Negative Preference Optimization" (arXiv 2404.05868, equation 3). Its gradient is that of
    `log m`, times 2 m^beta / (m^beta + p0(S)^beta): 1 at the original, and 0 as `m` vanishes.

    A divergence takes marks of a strength below 1 through `p_new`; such a position is negative as
    any other with a mark. The other negative terms have no `p_new`. There, a strength is the
    probability that the mark is right: a position whose strongest mark has strength s has the loss
    `s * (that with its marks) + (1 - s) * (that without them)`. They ignore marks that raise an id.

    Attributes:
      negative_term: The term at negative positions; one of `NEGATIVE_TERMS`.
      positive_term: The term at positive positions; one of `POSITIVE_TERMS`.
      negative_weight: The paper's alpha; multiplies the negative term alone.
      residual_weight: Multiplies the part `-log(1 - m)` of the negative term, where the term is the
        sum of that and of what happens outside `S`: `forward_kl`, `reverse_kl_split`,
        `jensen_shannon_split`. Whatever it is, the minimum is `p_new`: it decides what is given up
        first where a model cannot reach that. A positive term of the same name has it as well: at
        positive positions `S` is `removed_everywhere`.
      removed_token_floor: `KL(p || p_new)` is infinite while `m > 0`, so in `reverse_kl` the ids of
        `S`, and only they, share `e = min(removed_token_floor, p0(S))` in proportion to `p0`. The
        `min` keeps training from ever raising a removed id that was already rarer.
      smoothing: `s > 0` reproduces t5patches (1e-6 there): the desired distribution `d` becomes
        `(d + s) / (1 + s V)` in place of the floor, and so does the one-hot target of
        `log_likelihood`. For comparison only: the original is then no fixed point.
      label_smoothing: The share of `log_likelihood`'s target that goes to the other ids, as in T5X:
        the target keeps `1 - label_smoothing`, the other ids share the rest, and the entropy of
        that target is subtracted.
      z_loss: Adds `z_loss * logsumexp(logits)**2` to `log_likelihood`, as in T5X.
      npo_beta: The authors' beta in `negative_preference`: the larger, the sooner it lets go.
      ftpo: The settings of `final_token_preference`.
      negative_strength: Multiplies the strength of every mark: those of the batch, or 1. UNDIAL is
        `1 - exp(-beta)` with forward KL.
      removed_everywhere: Ids in `S` at every position, whatever the marks: of strength 1. With a
        divergence this distils a decoding mask into the weights.
      removed_everywhere_counts_as: "positive" or "negative": what a position is that has no mark.
        Marks make it negative, and so does a target token that is itself removed everywhere.
      sets: Long sets of ids that many marks share, which name them (`without_sets`). `train` has
        them from its data.

    Raises:
      UsageError: A setting is unknown, out of range, or without effect beside the others.
    """

    negative_term: str
    positive_term: str
    negative_weight: float = 1.0
    residual_weight: float = 1.0
    removed_token_floor: float = 1e-6
    smoothing: float = 0.0
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    # Notes of finished stages do not have these: `settings_json.describe`.
    npo_beta: float = dataclasses.field(default=0.1, metadata={"omit_default": True})
    ftpo: FinalTokenPreference = dataclasses.field(
        default=FinalTokenPreference(), metadata={"omit_default": True}
    )
    negative_strength: float = dataclasses.field(default=1.0, metadata={"omit_default": True})
    removed_everywhere: tuple[int, ...] = ()
    removed_everywhere_counts_as: str = "positive"
    sets: tuple[tuple[int, ...], ...] = dataclasses.field(
        default=(), repr=False, metadata={"omit_default": True}
    )

    def __post_init__(self):
        for name, allowed in (
            ("negative_term", NEGATIVE_TERMS),
            ("positive_term", POSITIVE_TERMS),
            ("removed_everywhere_counts_as", ("positive", "negative")),
        ):
            if getattr(self, name) not in allowed:
                raise UsageError(
                    f"{name}: expected one of {', '.join(allowed)}, found {getattr(self, name)!r}."
                )
        for name, is_valid, allowed in (
            ("negative_weight", 0 <= self.negative_weight < math.inf, "0 or more, and finite"),
            ("residual_weight", 0 < self.residual_weight < math.inf, "above 0, and finite"),
            ("removed_token_floor", 0 < self.removed_token_floor < 1, "between 0 and 1, exclusive"),
            ("smoothing", 0 <= self.smoothing < 1, "at least 0 and below 1"),
            ("label_smoothing", 0 <= self.label_smoothing < 1, "at least 0 and below 1"),
            ("z_loss", 0 <= self.z_loss < math.inf, "0 or more, and finite"),
            ("npo_beta", 0 < self.npo_beta < math.inf, "above 0, and finite"),
            (
                "negative_strength",
                not isinstance(self.negative_strength, bool) and 0 < self.negative_strength <= 1,
                "above 0 and at most 1",
            ),
            (
                "removed_everywhere",
                isinstance(self.removed_everywhere, tuple)
                and all(isinstance(i, int) and i >= 0 for i in self.removed_everywhere),
                "a tuple of token ids, each 0 or more",
            ),
        ):
            if not is_valid:
                raise UsageError(f"{name}: expected {allowed}, found {getattr(self, name)!r}.")

        if self.residual_weight != 1 and (self.negative_term not in _SPLIT_TERMS or self.smoothing):
            raise UsageError(
                f"residual_weight belongs to negative_term={' or '.join(_SPLIT_TERMS)} without "
                f"smoothing, found residual_weight={self.residual_weight} with "
                f"{self.negative_term!r}, smoothing={self.smoothing}. Set residual_weight=1, or "
                "change negative_term."
            )
        has_floor = "reverse_kl" in (self.negative_term, self.positive_term) and not self.smoothing
        if self.removed_token_floor != TntObjective.removed_token_floor and not has_floor:
            raise UsageError(
                "removed_token_floor belongs to negative_term='reverse_kl' or "
                "positive_term='reverse_kl' without smoothing, found "
                f"removed_token_floor={self.removed_token_floor} with {self.negative_term!r}, "
                f"{self.positive_term!r}, smoothing={self.smoothing}. Leave removed_token_floor "
                "out, or change a term."
            )
        for name in ("label_smoothing", "z_loss"):
            if getattr(self, name) and self.positive_term != "log_likelihood":
                raise UsageError(
                    f"{name} belongs to positive_term='log_likelihood', found "
                    f"{name}={getattr(self, name)} with positive_term={self.positive_term!r}. "
                    f"Set {name}=0, or change positive_term."
                )
        self._check_preferences()
        if self.smoothing:
            for term in (self.negative_term, self.positive_term):
                if term not in _SMOOTHABLE_TERMS:
                    raise UsageError(
                        f"smoothing reproduces t5patches and exists for "
                        f"{', '.join(_SMOOTHABLE_TERMS)} only, found smoothing={self.smoothing} "
                        f"with {term!r}. Set smoothing=0."
                    )
            if self.label_smoothing:
                raise UsageError(
                    f"smoothing and label_smoothing both smooth the target token, found "
                    f"smoothing={self.smoothing}, label_smoothing={self.label_smoothing}. Set one "
                    f"of them to 0."
                )
        if self.negative_term == self.positive_term == "none":
            raise UsageError(
                "negative_term='none' with positive_term='none' leaves no loss at any position. "
                "Choose another term for one of them."
            )
        if self.negative_strength != 1 and self.negative_term == "none":
            raise UsageError(
                "negative_term='none' ignores everything marked, found "
                f"negative_strength={self.negative_strength}. Set negative_strength=1, or choose "
                "another negative_term."
            )
        if self.removed_everywhere and self.negative_term == "none":
            raise UsageError(
                "negative_term='none' ignores everything marked or removed, but removed_everywhere "
                f"holds {len(self.removed_everywhere)} ids. Choose another negative_term, or empty "
                "removed_everywhere."
            )

    def _check_preferences(self):
        for name, term, default in (
            ("npo_beta", "negative_preference", TntObjective.npo_beta),
            ("ftpo", "final_token_preference", FinalTokenPreference()),
        ):
            if getattr(self, name) != default and self.negative_term != term:
                raise UsageError(
                    f"{name} belongs to negative_term={term!r}, found {name}={getattr(self, name)} "
                    f"with {self.negative_term!r}. Leave {name} out, or change negative_term."
                )

    @property
    def needs_original(self) -> bool:
        """Whether a term compares with the original, so that `token_losses` needs its logits."""
        return self.negative_term in _WITH_ORIGINAL or self.positive_term in _WITH_ORIGINAL

    def check(self, *, has_original: bool, vocab_size: int) -> None:
        """Raises a UsageError unless `token_losses` can be computed from what there is."""
        if self.needs_original and not has_original:
            raise UsageError(
                f"negative_term={self.negative_term!r} with positive_term={self.positive_term!r} "
                "compares with the original model, but there are no original logits. Give the "
                "original's parameters, or choose terms that do without."
            )
        if max(self.removed_everywhere, default=-1) >= vocab_size:
            raise UsageError(
                f"removed_everywhere: expected ids below the vocabulary size, {vocab_size}, found "
                f"{max(self.removed_everywhere)}. Take the ids from the vocabulary of this model."
            )

    def smoothed_target(self, vocab_size: int) -> tuple[float, float, float]:
        """The target distribution of `log_likelihood`, which smoothing spreads over all ids.

        `label_smoothing` means what it means in T5X's `cross_entropy_with_logits`; `smoothing` what
        it means in t5patches.

        Returns:
          The target's probability, that of every other id, and the entropy to subtract, in nats.
        """
        if self.smoothing:
            off = self.smoothing / (1 + self.smoothing * vocab_size)
            return off + 1 / (1 + self.smoothing * vocab_size), off, 0.0
        if self.label_smoothing:
            on, off = 1 - self.label_smoothing, self.label_smoothing / (vocab_size - 1)
            return on, off, -(on * math.log(on) + (vocab_size - 1) * off * math.log(off))
        return 1.0, 0.0, 0.0

    def is_negative(
        self, target_tokens: Int[Array, "B T"], negative_ids: Int[Array, "#B #T K"]
    ) -> Bool[Array, "B T"]:
        """Which positions `token_losses` gives the negative term, padding not looked at.

        None with `negative_term="none"`; otherwise those with at least one negative id, and what
        `removed_everywhere_counts_as` describes.
        """
        if self.negative_term == "none":
            return jnp.zeros(target_tokens.shape, bool)
        if self.removed_everywhere and self.removed_everywhere_counts_as == "negative":
            return jnp.ones(target_tokens.shape, bool)
        is_marked = jnp.broadcast_to((negative_ids != -1).any(axis=-1), target_tokens.shape)
        return is_marked | jnp.isin(target_tokens, jnp.asarray(self.removed_everywhere, jnp.int32))

    def without_sets(
        self,
        negative_ids: Int[Array, "*B K"],
        negative_strengths: Float[Array, "*B K"] | None = None,
    ) -> tuple[Int[Array, "*B _"], Float[Array, "*B _"] | None]:
        """Marks with the ids of the sets that they name, and their strengths.

        Args:
          negative_ids: Padded with -1. The first of a position may be -2 - n: all of set n.
          negative_strengths: The strength of each of the `negative_ids`; None is 1 for all.

        Returns:
          `K` ids, and as many more as the largest set has; the same if there are no sets.
        """
        if not self.sets:
            return negative_ids, negative_strengths
        size = max(map(len, self.sets))
        table = jnp.asarray([[*ids, *[-1] * (size - len(ids))] for ids in self.sets], jnp.int32)
        number = -2 - negative_ids[..., :1]
        of_set = jnp.where(number >= 0, table[jnp.maximum(number[..., 0], 0)], -1)
        ids = jnp.concatenate([jnp.maximum(negative_ids, -1), of_set], axis=-1)
        if negative_strengths is None:
            return ids, None
        of_all = jnp.broadcast_to(negative_strengths[..., :1], of_set.shape)
        return ids, jnp.concatenate([negative_strengths, of_all], axis=-1)

    def strengths(
        self,
        negative_ids: Int[Array, "#B #T K"],
        negative_strengths: Float[Array, "#B #T K"] | None,
    ) -> Float[Array, "#B #T K"] | None:
        """The strengths of marks as this objective takes them; None where all are 1."""
        if self.negative_term == "none":
            return None
        if negative_strengths is not None:
            return self.negative_strength * negative_strengths.astype(jnp.float32)
        if self.negative_strength == 1:
            return None
        return jnp.full(negative_ids.shape, self.negative_strength, jnp.float32)

    @property
    def mixes(self) -> bool:
        """Whether strengths mix the losses with and without marks, as no `p_new` takes them."""
        return self.negative_term not in (*_DIVERGENCES, "none")

    def without_raised(
        self, negative_ids: Int[Array, "*#B K"], strengths: Float[Array, "*#B K"] | None
    ) -> Int[Array, "... K"]:
        """The marks that the negative term looks at: without a `p_new`, none that raises an id.

        Args:
          negative_ids: Ids of marks, padded with -1.
          strengths: The strength of each of these ids, from `strengths`; None is 1 for all.
        """
        if strengths is None or not self.mixes:
            return negative_ids
        return jnp.where(strengths > 0, negative_ids, -1)

    def token_losses(
        self,
        *,
        current_logits: Float[Array, "B T V"],
        original_logits: Float[Array, "B T V"] | None,
        target_tokens: Int[Array, "B T"],
        negative_ids: Int[Array, "#B #T K"],
        loss_mask: Int[Array, "B T"],
        negative_strengths: Float[Array, "#B #T K"] | None = None,
    ) -> Float[Array, "B T"]:
        """Returns the loss of every target token, in nats, unreduced.

        Args:
          current_logits: Logits of the model being trained, any float dtype.
          original_logits: Logits of the frozen original; they get no gradient. May be None unless
            `needs_original`.
          target_tokens: The tokens that the decoder was made to predict.
          negative_ids: Ids to remove at each position, padded with -1; `[1, 1, K]` holds for all.
            Every id is below `V`: larger ones are ignored here and refused by the data code.
          loss_mask: 1 at real tokens, 0 at padding, whose logits may be anything, even NaN.
          negative_strengths: The strength of each of the `negative_ids`, finite and at most 1; None
            is 1 for all. What it holds at padding is not looked at.

        Returns:
          float32 losses, 0 where `loss_mask` is 0. Their sum over all devices and microbatches,
          divided by the number of unmasked tokens, is the loss to minimise.

        Raises:
          UsageError: `original_logits` is None and a term needs it, or `removed_everywhere` holds
            an id outside the vocabulary.
        """
        self.check(has_original=original_logits is not None, vocab_size=current_logits.shape[-1])
        is_real = loss_mask != 0
        strengths = self.strengths(negative_ids, negative_strengths)
        if strengths is not None and self.mixes:
            certain = dataclasses.replace(self, negative_strength=1.0)
            negative_ids = self.without_raised(negative_ids, strengths)
            share, unsure_ids = share_with_marks(negative_ids, strengths)
            with_marks, without = (
                certain.token_losses(
                    current_logits=current_logits,
                    original_logits=original_logits,
                    target_tokens=target_tokens,
                    negative_ids=ids,
                    loss_mask=loss_mask,
                )
                for ids in (negative_ids, unsure_ids)
            )
            return share * with_marks + (1 - share) * without

        def usable(logits):  # float32: tokens pushed towards zero are where bfloat16 is worst
            return jnp.where(is_real[..., None], logits.astype(jnp.float32), 0.0)

        current = usable(current_logits)
        original = jax.lax.stop_gradient(usable(original_logits)) if self.needs_original else None
        removed, lowered = jnp.zeros(current.shape, bool), original
        if self.negative_term != "none":
            removed |= removed_mask(
                negative_ids, current.shape[-1], self.removed_everywhere, strengths
            )
            if original is not None:
                changed = _lowered(original, negative_ids, strengths)
                lowered = jnp.where(removed, original, changed)

        models = current, original, lowered
        losses = self._term(self.positive_term, models, removed, target_tokens)
        if self.negative_term != "none":
            # One evaluation serves both where they agree; XLA would not merge the two backwards.
            negative_losses = (
                losses
                if self.negative_term == self.positive_term
                else self._term(self.negative_term, models, removed, target_tokens)
            )
            losses = jnp.where(
                self.is_negative(target_tokens, negative_ids),
                self.negative_weight * negative_losses,
                losses,
            )
        return jnp.where(is_real, losses, 0.0)

    def _term(self, name, models, removed, target_tokens):
        """The term called `name` at every position, `[B, T]`; its formula is in the class."""
        current, unlowered, original = models
        kept = ~removed
        match name:
            case "forward_kl" if self.smoothing:
                return _kl(self._smoothed(original, kept), jax.nn.log_softmax(current))
            case "forward_kl":  # exactly -log(1 - m) + KL(p_new || q)
                return self.residual_weight * _residual(current, removed) + _kl(
                    _log_probs_within(original, kept), _log_probs_within(current, kept)
                )
            case "reverse_kl" if self.smoothing:
                return _kl(jax.nn.log_softmax(current), self._smoothed(original, kept))
            case "reverse_kl":
                return self._floored_reverse_kl(current, unlowered, original, removed)
            case "reverse_kl_split":
                return self.residual_weight * _residual(current, removed) + _kl(
                    _log_probs_within(current, kept), _log_probs_within(original, kept)
                )
            case "jensen_shannon":
                # On S the mean is p / 2, so S adds m log(2) / 2 and the sum is over the rest.
                log_removed, log_rest = _log_masses(current, removed)
                return jnp.exp(log_removed) * (math.log(2) / 2) + _jensen_shannon(
                    _log_probs_within(original, kept),
                    log_rest[..., None] + _log_probs_within(current, kept),
                )
            case "jensen_shannon_split":
                return self.residual_weight * _residual(current, removed) + _jensen_shannon(
                    _log_probs_within(original, kept), _log_probs_within(current, kept)
                )
            case "negative_likelihood":
                log_removed, _ = _log_masses(current, removed)
                return jnp.maximum(log_removed, LOG_LIKELIHOOD_FLOOR)
            case "unlikelihood":
                return _residual(current, removed)
            case "negative_preference":
                log_ratio = _log_masses(current, removed)[0] - _log_masses(original, removed)[0]
                return 2 / self.npo_beta * jax.nn.softplus(self.npo_beta * log_ratio)
            case "final_token_preference":
                return self._final_token_preference(current, original, removed)
            case "log_likelihood":
                return self._cross_entropy(current, target_tokens)
            case "none":
                return jnp.zeros(target_tokens.shape, jnp.float32)
        raise AssertionError(name)

    def _final_token_preference(self, current, original, removed):
        """The three parts of `FinalTokenPreference`."""
        settings, moved = self.ftpo, current - original
        chosen = _chosen_ids(original, removed, settings)
        targets = chosen | removed
        of_removed = jax.nn.logsumexp(jnp.where(removed, current, LOG_ZERO), axis=-1, keepdims=True)
        short = settings.margin - (current - of_removed)
        weights = jnp.where(chosen, jax.lax.clamp(0.0, short / settings.margin, 1.0), 0.0)
        total = weights.sum(axis=-1)
        preference = (weights * jax.nn.softplus(short)).sum(axis=-1) / jnp.where(
            total > 0, total, 1.0
        )
        excess = jnp.maximum(jnp.abs(moved) - settings.target_slack, 0.0)
        return (
            preference
            + settings.target_weight * _mean_of(excess**2, targets)
            + settings.rest_weight * _mean_of(moved**2, ~targets)
        )

    def _smoothed(self, original, kept):
        """Log of `(p_new + s) / (1 + s V)`."""
        desired = jnp.exp(_log_probs_within(original, kept))
        return jnp.log(desired + self.smoothing) - math.log1p(self.smoothing * desired.shape[-1])

    def _floored_reverse_kl(self, current, unlowered, original, removed):
        """KL(p || p_e) by the chain rule: of the bit "in S or not", then within either side of it.

        Summed over ids instead, its gradient would lose every digit as m approaches 1. The floor is
        at most p0(S) of the original as it is: lowering other ids would raise it.
        """
        log_removed, log_rest = _log_masses(current, removed)
        log_floor = jnp.minimum(
            _log_masses(unlowered, removed)[0], math.log(self.removed_token_floor)
        )
        of_bit = _kl(
            jnp.stack([log_removed, log_rest], axis=-1),
            jnp.stack([log_floor, jnp.log1p(-jnp.exp(log_floor))], axis=-1),
        )
        within_removed, within_kept = (
            _kl(_log_probs_within(current, side), _log_probs_within(original, side))
            for side in (removed, ~removed)
        )
        return of_bit + jnp.exp(log_removed) * within_removed + jnp.exp(log_rest) * within_kept

    def _cross_entropy(self, current, target_tokens):
        """-log p(target), or the cross-entropy with a target of `on` there and `off` elsewhere."""
        on, off, entropy = self.smoothed_target(current.shape[-1])
        log_probs = jax.nn.log_softmax(current)
        target_log_probs = jnp.take_along_axis(log_probs, target_tokens[..., None], axis=-1)
        losses = (off - on) * target_log_probs.squeeze(-1) - entropy
        if off:
            losses -= off * log_probs.sum(axis=-1)
        if self.z_loss:
            losses += self.z_loss * jax.nn.logsumexp(current, axis=-1) ** 2
        return losses


def share_with_marks(
    negative_ids: Int[Array, "B T K"], strengths: Float[Array, "#B #T K"]
) -> tuple[Float[Array, "B T"], Int[Array, "B T K"]]:
    """How much the loss with all marks counts at each position, for a term without `p_new`.

    Returns:
      The largest strength of a position, 1 where there is no mark; and the ids without those of
      positions where it is below 1.
    """
    of_marks = jnp.where(negative_ids >= 0, strengths, 0.0).max(axis=-1)
    share = jnp.where((negative_ids >= 0).any(axis=-1), of_marks, 1.0)
    return share, jnp.where(share[..., None] < 1, -1, negative_ids)


def removed_mask(
    negative_ids: Int[Array, "B T K"],
    vocab_size: int,
    removed_everywhere: tuple[int, ...] = (),
    negative_strengths: Float[Array, "#B #T K"] | None = None,
) -> Bool[Array, "B T V"]:
    """The set `S` of every position: its `negative_ids` (-1 is padding) and `removed_everywhere`.

    Ids that are not below `vocab_size` are ignored; `TntObjective.check` refuses them. Ids of a
    strength below 1 are not in `S`.
    """
    if negative_strengths is not None:
        negative_ids = jnp.where(negative_strengths < 1, -1, negative_ids)
    everywhere = jnp.asarray(removed_everywhere, jnp.int32)
    removed_row = jnp.zeros(vocab_size, bool).at[everywhere].set(True, mode="drop")

    # A scatter: comparing each of K ids with each of V would build [B, T, K, V].
    def scatter(ids):
        ids = jnp.where(ids < 0, vocab_size, ids)  # a negative index would count from the end
        return removed_row.at[ids].set(True, mode="drop")

    return jax.vmap(jax.vmap(scatter))(negative_ids)


def desired_log_probs(
    original_logits: Float[Array, "B T V"],
    negative_ids: Int[Array, "#B #T K"],
    removed_everywhere: tuple[int, ...] = (),
    negative_strengths: Float[Array, "#B #T K"] | None = None,
) -> Float[Array, "B T V"]:
    """Log `p_new` in float32: the original without the removed ids, renormalised; -inf on those.

    With `negative_strengths` (None is 1 for all) it is proportional to `p0(v) (1 - s_v)`.
    """
    original = original_logits.astype(jnp.float32)
    kept = ~removed_mask(negative_ids, original.shape[-1], removed_everywhere, negative_strengths)
    lowered = _lowered(original, negative_ids, negative_strengths)
    return jnp.where(kept, _log_probs_within(lowered, kept), -jnp.inf)


def certificate(
    *,
    current_logits: Float[Array, "B T V"],
    original_logits: Float[Array, "B T V"],
    negative_ids: Int[Array, "#B #T K"],
    removed_everywhere: tuple[int, ...] = (),
    negative_strengths: Float[Array, "#B #T K"] | None = None,
) -> Certificate:
    """Splits `KL(p_new || p)` exactly; see `Certificate`. At padding its values mean nothing."""
    current, original = (x.astype(jnp.float32) for x in (current_logits, original_logits))
    removed = removed_mask(negative_ids, current.shape[-1], removed_everywhere, negative_strengths)
    lowered = _lowered(original, negative_ids, negative_strengths)
    log_p_new = _log_probs_within(lowered, ~removed)
    smallest_cost = _residual(original, removed)
    if negative_strengths is not None:  # as KL(p_new || p0) splits, too
        smallest_cost += _kl(log_p_new, _log_probs_within(original, ~removed))
    return Certificate(
        residual=_residual(current, removed),
        collateral=_kl(log_p_new, _log_probs_within(current, ~removed)),
        smallest_cost=smallest_cost,
    )


def removed_mass(
    logits: Float[Array, "B T V"],
    negative_ids: Int[Array, "#B #T K"],
    removed_everywhere: tuple[int, ...] = (),
    negative_strengths: Float[Array, "#B #T K"] | None = None,
) -> Float[Array, "B T"]:
    """p(S), the probability still on what must go, in float32; 0 where nothing is removed.

    With strengths it is the sum of `s_v p(v)`, which at `p_new` is not 0. Raised ids count as 0.
    """
    logits = logits.astype(jnp.float32)
    removed = removed_mask(negative_ids, logits.shape[-1], removed_everywhere, negative_strengths)
    mass = jax.nn.sigmoid(_removed_log_odds(logits, removed))
    if negative_strengths is None:
        return mass
    strengths = _strength_of_each(negative_ids, negative_strengths, logits.shape[-1])
    strengths = jnp.where(removed, 0.0, jnp.maximum(strengths, 0.0))
    return mass + (strengths * jax.nn.softmax(logits)).sum(axis=-1)


def _strength_of_each(negative_ids, strengths, vocab_size):
    """The largest strength of each id at each position, `[B, T, V]`; 0 where there is no mark."""

    def scatter(ids, of_ids):
        ids = jnp.where(ids < 0, vocab_size, ids)  # a negative index would count from the end
        largest = jnp.full(vocab_size, -jnp.inf).at[ids].max(of_ids, mode="drop")
        return jnp.where(largest > -jnp.inf, largest, 0.0)

    arrays = jnp.broadcast_arrays(negative_ids, strengths.astype(jnp.float32))
    return jax.vmap(jax.vmap(scatter))(*arrays)


def _lowered(original, negative_ids, strengths):
    """The original's logits, changed by log(1 - s) at ids of a strength s below 1."""
    if strengths is None:
        return original
    of_each = _strength_of_each(negative_ids, strengths, original.shape[-1])
    return original + jnp.log1p(-jnp.where(of_each < 1, of_each, 0.0))


def _log_probs_within(logits, ids):
    """Log-softmax over the `ids` of each position alone, `LOG_ZERO` on all others."""
    return jax.nn.log_softmax(jnp.where(ids, logits, LOG_ZERO))


def _removed_log_odds(logits, removed):
    """Log of `p(S) / (1 - p(S))`, about `LOG_ZERO` where nothing is removed."""
    # Centred at the largest logit that stays: a common offset of the logits would cost digits.
    kept = jnp.where(removed, LOG_ZERO, logits)
    centre = jax.lax.stop_gradient(kept.max(axis=-1, keepdims=True))
    log_removed = jax.nn.logsumexp(jnp.where(removed, logits - centre, LOG_ZERO), axis=-1)
    return log_removed - jax.nn.logsumexp(kept - centre, axis=-1)


def _log_masses(logits, removed):
    """The pair log p(S), log(1 - p(S)); `sigmoid` would lose its gradient as p(S) nears 1."""
    log_odds = _removed_log_odds(logits, removed)
    return jax.nn.log_sigmoid(log_odds), jax.nn.log_sigmoid(-log_odds)


def _residual(logits, removed):
    """-log(1 - p(S)), with gradient p on S and -p(S) q outside, however near p(S) is to 1."""
    return jax.nn.softplus(_removed_log_odds(logits, removed))


def _chosen_ids(original, removed, settings):
    """The mask `[B, T, V]` of the ids that `FinalTokenPreference` prefers; of equals, the first."""
    kept = jnp.where(removed, LOG_ZERO, original)
    values, ids = jax.lax.top_k(kept, min(settings.num_chosen, kept.shape[-1]))
    least = original.max(axis=-1, keepdims=True) + math.log(settings.min_p)
    is_chosen = values >= jnp.minimum(least, values[..., :1])
    return jax.vmap(jax.vmap(lambda i, x: jnp.zeros(kept.shape[-1], bool).at[i].set(x)))(
        ids, is_chosen
    )


def _mean_of(x, ids):
    """The mean of `x` over the `ids` of each position; 0 where there are none."""
    return jnp.where(ids, x, 0.0).sum(axis=-1) / jnp.maximum(ids.sum(axis=-1), 1)


def _kl(log_a, log_b):
    """KL(a || b) summed over the last axis, for distributions given by their logarithms.

    As both sum to 1, it is the sum of `b - a - a log(b / a)`, in which no summand is negative:
    nothing cancels between ids, nor within one whose log-ratio is small. The plain
    sum of `a log(a / b)` loses all its digits near a = b.
    """
    a, b, log_ratio = jnp.exp(log_a), jnp.exp(log_b), log_b - log_a
    is_near = jnp.abs(log_ratio) < 1
    near = jnp.where(is_near, log_ratio, 0.0)  # or it overflows where it is not selected
    return jnp.where(is_near, a * exp_remainder(near), b - a - a * log_ratio).sum(axis=-1)


def exp_remainder(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """`exp(x) - 1 - x` for |x| < 1, to float32's precision however small x is: its series."""
    series = jnp.full_like(x, 1 / math.factorial(_LAST_POWER))
    for power in range(_LAST_POWER - 1, 1, -1):
        series = series * x + 1 / math.factorial(power)
    return series * x * x


def _jensen_shannon(log_a, log_b):
    """JS(a, b) = KL(a || M) / 2 + KL(b || M) / 2 with M = (a + b) / 2, in nats.

    Neither needs to sum to 1: over both halves the `b - a` of `_kl` adds up to 2 M - a - b = 0.
    """
    # The log of M, exactly log a where a = b: a gradient of 1e-8 in its place would not vanish
    # under an optimizer that normalises it.
    gap = jnp.abs(log_a - log_b)
    log_mean = jnp.maximum(log_a, log_b) + jnp.log1p(jnp.expm1(-gap) / 2)
    return (_kl(log_a, log_mean) + _kl(log_b, log_mean)) / 2


# The arms of comparisons: their negative and positive terms.
TERMS = {
    "TNFF": ("forward_kl", "forward_kl"),
    "TNRR": ("reverse_kl", "reverse_kl"),
    "TNRF": ("reverse_kl", "forward_kl"),
    "TNFLL": ("forward_kl", "log_likelihood"),
    "TNRLL": ("reverse_kl", "log_likelihood"),
    "TNSR": ("reverse_kl_split", "reverse_kl"),
    "TNSF": ("reverse_kl_split", "forward_kl"),
    "TNJJ": ("jensen_shannon", "jensen_shannon"),
    "TNJSJ": ("jensen_shannon_split", "jensen_shannon"),
    "NL+LL": ("negative_likelihood", "log_likelihood"),
    "UL+LL": ("unlikelihood", "log_likelihood"),
    "NL+KL": ("negative_likelihood", "forward_kl"),
    "UL+KL": ("unlikelihood", "forward_kl"),
    "NPO+LL": ("negative_preference", "log_likelihood"),
    "NPO+KL": ("negative_preference", "forward_kl"),
    "FTPO": ("final_token_preference", "none"),
    "FTPO+KL": ("final_token_preference", "forward_kl"),
    "UNDIAL": ("forward_kl", "none"),
    "UNDIAL+KL": ("forward_kl", "forward_kl"),
    # Marks are ignored: for arms that are trained on clean outputs alone (`only_clean`).
    "LL": ("none", "log_likelihood"),
    "KL": ("none", "forward_kl"),
}

# What an arm sets beside its terms, where nothing else is asked for.
SETTINGS = {
    name: {"negative_strength": 1 - math.exp(-UNDIAL_BETA)} for name in ("UNDIAL", "UNDIAL+KL")
}


def named(name: str, **settings: Any) -> TntObjective:
    """The objective of a name in `TERMS`, with its `SETTINGS` but for those that are given.

    UNDIAL's beta is given as `negative_strength=1 - math.exp(-beta)`.

    Raises:
      UsageError: There is no such name.
    """
    if name not in TERMS:
        raise UsageError(f"objective: expected one of {', '.join(TERMS)}, found {name!r}.")
    negative_term, positive_term = TERMS[name]
    settings = {**SETTINGS.get(name, {}), **settings}
    return TntObjective(negative_term=negative_term, positive_term=positive_term, **settings)
