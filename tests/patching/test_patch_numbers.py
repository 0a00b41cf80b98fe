"""What `patch` says of its numbers, against sentences written by hand."""

import pytest

from tnt_jax.patching import patch_numbers


def of_decoder(cut, unwanted_before=0.25):
    return {
        "unwanted_before": unwanted_before,
        "cut": cut,
        "cut_interval": [cut - 0.125, cut + 0.03125],
    }


@pytest.mark.parametrize(
    ("by_decoder", "sentence", "is_short"),
    [
        (
            {"greedy": of_decoder(0.95)},
            "The wish is fulfilled: 95.0% of the unwanted outputs are gone (95 %: 82% to 98%), "
            "asked for 90%.",
            False,
        ),
        (
            {"greedy": of_decoder(0.5)},
            "Not the whole wish: 50.0% of the unwanted outputs are gone (95 %: 38% to 53%), "
            "asked for 90%.",
            True,
        ),
        # The worse of two decides.
        (
            {"greedy": of_decoder(0.95), "sampled": of_decoder(0.5)},
            "Not the whole wish: 50.0% of the unwanted sampled outputs are gone (95 %: 38% to "
            "53%), asked for 90%.",
            True,
        ),
        (
            {"greedy": of_decoder(0.9375), "sampled": of_decoder(0.95)},
            "The wish is fulfilled: 93.8% of the unwanted greedy outputs are gone (95 %: 81% to "
            "97%), asked for 90%.",
            False,
        ),
        # What one prompt says has no interval.
        (
            {"greedy": {"unwanted_before": 1.0, "cut": 1.0, "cut_interval": None}},
            "The wish is fulfilled: 100.0% of the unwanted outputs are gone, asked for 90%.",
            False,
        ),
        # It is one of which there is something to cut.
        (
            {"greedy": of_decoder(0.0, unwanted_before=0.0), "sampled": of_decoder(0.95)},
            "The wish is fulfilled: 95.0% of the unwanted sampled outputs are gone (95 %: 82% to "
            "98%), asked for 90%.",
            False,
        ),
        (
            {"greedy": of_decoder(0.0, unwanted_before=0.0)},
            "There is no cut to tell: the original says nothing unwanted on the report prompts. "
            "Give more --prompts or --eval_prompts, and another --output.",
            False,
        ),
    ],
)
def test_the_decoder_with_the_least_cut_decides_whether_the_wish_is_fulfilled(
    by_decoder, sentence, is_short
):
    assert patch_numbers.verdict(by_decoder, 0.9) == (sentence, is_short)


def test_a_wish_is_said_as_it_was_given():
    sentence, is_short = patch_numbers.verdict({"greedy": of_decoder(0.923)}, 0.925)
    assert is_short and sentence.endswith(", asked for 92.5%.")


def test_the_table_has_no_cut_where_nothing_was_unwanted():
    others = ("unwanted_after", "bleu", "unchanged", "repeated_phrase_before")
    more = dict.fromkeys((*others, "repeated_phrase_after"), 0.0)
    more |= {"unchanged_clean": None, "kl_elsewhere": None}

    def shown(cut, unwanted_before):
        _, row, *_ = patch_numbers.rows({**of_decoder(cut, unwanted_before), **more})
        return row

    assert shown(0.5, 0.25)[-1] == "50.0% (37.5% to 53.1%)"
    assert shown(0.0, 0.0)[-1] == "-"
