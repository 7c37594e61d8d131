"""The estimate against backward(): right direction on average, two forward passes a step, nothing else."""

import pytest
import torch

from mezo.api import build_trainer, make_engine
from mezo.config import MeZOConfig
from mezo.encoding import make_encoder
from mezo.engines.torch.loading import is_encoder, load_model, load_model_config, load_tokenizer
from mezo.engines.torch.space import direction
from mezo.estimator import Probe, TwoPoint
from mezo.objective import batch_loss, example_losses
from tests.conftest import SENTIMENT_ROWS

TEMPLATES = {"bert": "{text} it was [MASK] .", "llama": "{text} it was"}


def engine_and_examples(folder, name, **options):
    config = MeZOConfig(
        model_name_or_path=folder, template=TEMPLATES[name], label_words={"0": "terrible", "1": "great"}, **options
    )
    model_config, tokenizer = load_model_config(config), load_tokenizer(config)
    encoder = make_encoder(SENTIMENT_ROWS, config, model_config, tokenizer, encoder_model=is_encoder(model_config))
    model = load_model(config, encoder.kind, encoder.labels).model.requires_grad_(True)
    return make_engine(config, model, tokenizer), encoder(SENTIMENT_ROWS[:16])


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_mean_of_many_estimates_points_along_the_gradient(model_folder, name):
    engine, examples = engine_and_examples(model_folder(name), name)
    # Only part of the parameters moves, so that a few thousand directions are enough: the cosine of the mean of n
    # estimates in d dimensions is about sqrt(n / (n + d)).
    parts = {"bert": "layer.1.attention.output.LayerNorm", "llama": "norm.weight"}
    chosen = {n: p for n, p in engine.space.parameters.items() if parts[name] in n}
    object.__setattr__(engine.space, "parameters", chosen)
    dimension = engine.space.num_parameters()
    scores_T = engine._scores(examples, [Probe(0, 0.0)], greedy=False)[0].logprobs_T
    example_losses(examples, scores_T).mean().backward()
    gradient = torch.cat([p.grad.flatten() for p in chosen.values()])

    estimator = TwoPoint(seed=1, epsilon=1e-2)
    mean = {n: torch.zeros(p.numel(), dtype=torch.float64) for n, p in chosen.items()}
    count = 15 * dimension
    for step in range(count):
        probes = estimator.probes(step)
        losses = [batch_loss(examples, losses_N) for losses_N in engine.losses(examples, probes)]
        (outcome,) = estimator.outcomes(probes, losses)
        for n, total in mean.items():
            total.add_(outcome.coefficient * direction(outcome.seed, n, 0, len(total), total.device))
    estimate = torch.cat(list(mean.values())) / count
    cosine = torch.nn.functional.cosine_similarity(estimate, gradient.double(), dim=0)
    assert cosine > 0.95
    # Unbiased up to O(ε²): the projection on the gradient has its length, not only its direction.
    assert float(estimate @ gradient.double() / gradient.double().square().sum()) == pytest.approx(1.0, abs=0.15)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_one_estimate_is_the_directional_derivative(model_folder, name):
    """All parameters, one direction: projected_grad equals z · ∇L from backward()."""
    engine, examples = engine_and_examples(model_folder(name), name)
    scores_T = engine._scores(examples, [Probe(0, 0.0)], greedy=False)[0].logprobs_T
    example_losses(examples, scores_T).mean().backward()
    estimator = TwoPoint(seed=5, epsilon=3e-4)
    for step in range(5):
        probes = estimator.probes(step)
        losses = [batch_loss(examples, losses_N) for losses_N in engine.losses(examples, probes)]
        (outcome,) = estimator.outcomes(probes, losses)
        derivative = 0.0
        for n, p in engine.space.parameters.items():
            z = direction(outcome.seed, n, 0, p.numel(), p.device)
            derivative += float(z.double() @ p.grad.flatten().double())
        # Third-order term of the central difference, and float32 losses (6e-8 relative) over 2ε = 6e-4.
        assert outcome.coefficient == pytest.approx(derivative, rel=1e-2, abs=1e-3)


def test_a_step_is_exactly_two_forward_passes_of_its_rows(model_folder, tmp_path):
    config = MeZOConfig(
        model_name_or_path=model_folder("bert"),
        template=TEMPLATES["bert"],
        label_words={"0": "terrible", "1": "great"},
        output_dir=str(tmp_path),
        per_device_train_batch_size=8,
        max_steps=3,
        disable_tqdm=True,
    )
    trainer = build_trainer(config, SENTIMENT_ROWS)
    rows = []
    trainer.engine.model.base_model.register_forward_pre_hook(
        lambda _, args, kwargs: rows.append(len((*args, kwargs.get("input_ids"))[0])), with_kwargs=True
    )
    trainer.train()
    assert sum(rows) == 2 * 3 * 8
