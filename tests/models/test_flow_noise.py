import numpy as np
import torch

from pi05_lightning.models.flow_noise import draw_noise


def test_noise_of_a_sample_does_not_depend_on_its_batch() -> None:
    noise, time = draw_noise(torch.tensor([5, 9, 2]), seed=1, draws=2, horizon=4, action_dim=3)
    alone, alone_time = draw_noise(torch.tensor([9]), seed=1, draws=2, horizon=4, action_dim=3)
    assert torch.equal(noise[1], alone[0])
    assert torch.equal(time[1], alone_time[0])


def test_noise_differs_between_seeds() -> None:
    key = torch.tensor([5])
    assert not torch.equal(draw_noise(key, 1, 1, 4, 3)[0], draw_noise(key, 2, 1, 4, 3)[0])


def test_flow_time_has_the_moments_of_its_beta_distribution() -> None:
    _, time = draw_noise(torch.arange(4000), seed=0, draws=4, horizon=1, action_dim=1)
    assert time.min() >= 0.001
    assert time.max() <= 1.0
    # Beta(1.5, 1) has mean 0.6 and variance 0.6 · 0.4 / 3.5
    np.testing.assert_allclose(time.mean(), 0.999 * 0.6 + 0.001, atol=0.01)
    np.testing.assert_allclose(time.var(), 0.999**2 * 0.6 * 0.4 / 3.5, atol=0.005)
