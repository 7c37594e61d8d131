"""Scores, losses and accuracy against numbers worked out by hand."""

import math

import pytest
import torch

from mezo.objective import (
    Example,
    Target,
    TargetScores,
    TokenSequence,
    batch_loss,
    correct,
    example_losses,
    option_scores,
)

# Log-probabilities below are written as multiples of 1/8, exact in float32; what is left is the rounding of one
# exponential and one logarithm near 1: a few units of 6e-8.
TOLERANCE = 1e-6


def sequence(*options, length=6):
    """A row whose targets speak for the given options; which token is read where does not matter to an objective."""
    return TokenSequence(tuple(range(length)), tuple(Target(i, 7 + i, option) for i, option in enumerate(options)))


def completion(num_targets, length=6):
    return Example((sequence(*[0] * num_targets, length=length),))


def choices(label, *lengths):
    """One sequence per option, with so many answer tokens each."""
    return Example(tuple(sequence(*[option] * n) for option, n in enumerate(lengths)), label)


def masked(label, num_options):
    return Example((sequence(*range(num_options)),), label)


def scores(logprobs, greedy=None):
    return TargetScores(torch.tensor(logprobs), torch.tensor(greedy or [False] * len(logprobs)))


def test_an_option_scores_the_mean_of_its_tokens():
    logprobs_T = torch.tensor([-1.0, -2.0, -6.0, -0.5])
    assert option_scores([choices(0, 3, 1)], logprobs_T).tolist() == [[-3.0, -0.5]]


def test_length_normalisation_makes_doubled_answers_equal():
    """An answer repeated with the same log-probabilities keeps its score; a sum would halve its chances."""
    short = option_scores([choices(0, 2, 1)], torch.tensor([-1.0, -2.0, -0.5]))
    doubled = option_scores([choices(0, 4, 2)], torch.tensor([-1.0, -2.0, -1.0, -2.0, -0.5, -0.5]))
    assert torch.equal(short, doubled)


def test_examples_with_different_numbers_of_options():
    examples = [choices(1, 1, 2), choices(2, 1, 1, 1), masked(0, 2)]
    logprobs_T = torch.tensor([-1.0, -2.0, -4.0, -1.5, -2.5, -0.5, -0.25, -1.25])
    missing = -math.inf
    expected = [[-1.0, -3.0, missing], [-1.5, -2.5, -0.5], [-0.25, -1.25, missing]]
    assert option_scores(examples, logprobs_T).tolist() == expected
    losses = [
        math.log(math.exp(-1.0) + math.exp(-3.0)) + 3.0,
        math.log(math.exp(-1.5) + math.exp(-2.5) + math.exp(-0.5)) + 0.5,
        math.log(math.exp(-0.25) + math.exp(-1.25)) + 0.25,
    ]
    assert example_losses(examples, logprobs_T).tolist() == pytest.approx(losses, abs=TOLERANCE)


def test_losses_do_not_depend_on_the_other_examples_of_the_batch():
    examples = [choices(1, 1, 2), choices(2, 1, 1, 1), masked(0, 2)]
    logprobs_T = torch.tensor([-1.0, -2.0, -4.0, -1.5, -2.5, -0.5, -0.25, -1.25])
    parts = logprobs_T.split([3, 3, 2])
    alone = [float(example_losses([e], part)) for e, part in zip(examples, parts, strict=True)]
    # The same sums over other numbers of empty places: one rounding apart.
    assert example_losses(examples, logprobs_T).tolist() == pytest.approx(alone, abs=TOLERANCE)


def test_loss_of_a_completion_is_its_mean_token_loss():
    examples = [completion(2), completion(3)]
    losses_N = example_losses(examples, torch.tensor([-1.0, -3.0, -0.5, -0.5, -2.0]))
    assert losses_N.tolist() == [2.0, 1.0]


def test_a_batch_of_completions_weighs_tokens_not_examples():
    examples = [completion(1), completion(3)]
    losses_N = example_losses(examples, torch.tensor([-4.0, -1.0, -2.0, -1.5]))
    assert losses_N.tolist() == [4.0, 1.5]
    assert batch_loss(examples, losses_N) == (4.0 + 1.0 + 2.0 + 1.5) / 4


def test_a_batch_with_options_weighs_examples_not_tokens():
    examples = [choices(0, 1, 1), choices(0, 5, 7)]
    assert batch_loss(examples, torch.tensor([1.0, 4.0])) == 2.5


def test_batch_loss_sums_in_float64():
    """A difference of 1e-8 between two batches survives: it is what projected_grad is made of."""
    examples = [masked(0, 2)] * 4096
    losses_N = torch.full((4096,), 0.7)
    moved_N = losses_N.clone()
    moved_N[0] = torch.nextafter(losses_N[0], torch.tensor(1.0))
    difference = batch_loss(examples, moved_N) - batch_loss(examples, losses_N)
    assert difference == pytest.approx(2.0**-24 / 4096, rel=1e-2)  # float64 resolves 1e-16 of 1.5e-11


def test_huge_and_tiny_log_probabilities():
    examples = [masked(0, 2), masked(1, 2)]
    losses_N = example_losses(examples, torch.tensor([-1000.0, 0.0, -1000.0, 0.0]))
    assert losses_N.tolist() == [1000.0, 0.0]


def test_right_options():
    examples = [choices(0, 1, 2), choices(1, 1, 2), choices(2, 1, 1, 1)]
    result = scores([-1.0, -2.0, -4.0, -1.0, -2.0, -4.0, -1.5, -2.5, -0.5])
    assert correct(examples, result).tolist() == [1.0, 0.0, 1.0]


def test_a_longer_option_wins_by_its_mean_not_its_sum():
    assert correct([choices(1, 1, 3)], scores([-1.0, -0.5, -0.5, -0.5])).tolist() == [1.0]


def test_an_option_that_does_not_exist_is_never_chosen():
    """All log-probabilities of the short example are far below 0, the value an empty sum would have."""
    examples = [masked(1, 2), masked(3, 4)]
    result = scores([-9.0, -8.0, -1.0, -2.0, -3.0, -0.5])
    assert correct(examples, result).tolist() == [1.0, 1.0]


def test_accuracy_of_completions_is_the_share_of_greedy_tokens():
    examples = [completion(4), completion(1), completion(2)]
    result = scores([-1.0] * 7, [True, False, True, True, False, True, True])
    assert correct(examples, result).tolist() == [0.75, 0.0, 1.0]


def test_number_of_tokens_counts_every_sequence():
    assert choices(0, 1, 2).num_tokens == 12
    assert completion(2, length=9).num_tokens == 9
    assert (completion(3).weight, choices(0, 4, 4).weight) == (3, 1)
