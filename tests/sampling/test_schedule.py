import numpy as np
import pytest
import torch

from conftest import MS_SCHEDULER
from t2v.errors import WeightsError
from t2v.sampling.schedule import Schedule

ZERO_SNR = {"prediction_type": "v_prediction", "timestep_spacing": "trailing", "rescale_betas_zero_snr": True}


def test_alpha_bar_of_the_original():
    alpha_bar = Schedule.from_config(MS_SCHEDULER).alpha_bar
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    np.testing.assert_allclose(alpha_bar, np.cumprod(1 - betas), rtol=1e-12)
    rescaled = Schedule.from_config(MS_SCHEDULER | ZERO_SNR).alpha_bar
    assert rescaled[-1] == 0 and rescaled[0] == pytest.approx(float(alpha_bar[0]), rel=1e-12)


@pytest.mark.parametrize(
    "change",
    [
        {"beta_schedule": "linear"},
        {"prediction_type": "sample"},
        {"timestep_spacing": "other"},
        {"clip_sample": True},
        {"thresholding": True},
        {"rescale_betas_zero_snr": True},
    ],
)
def test_other_schedules_are_refused(change: dict):
    with pytest.raises(WeightsError, match=next(iter(change))):
        Schedule.from_config(MS_SCHEDULER | change)


def test_noise_is_added_by_the_signal_share():
    schedule = Schedule.from_config(MS_SCHEDULER)
    x_0, noise = torch.randn(2, 3, dtype=torch.float64)
    alpha_bar = schedule.alpha_bar[500]
    torch.testing.assert_close(
        schedule.add_noise(x_0, noise, 500), alpha_bar**0.5 * x_0 + (1 - alpha_bar) ** 0.5 * noise
    )
