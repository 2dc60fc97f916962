import warnings

import torch

from t2v.sampling.trace import Trace


@torch.inference_mode()
def test_the_first_result_is_what_was_computed_while_tracing():
    calls = []

    def square(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        calls.append(x)
        return (x * x,)

    trace = Trace(square, (torch.tensor([2.0]),))
    assert [trace(torch.tensor([value]))[0].item() for value in (2.0, 3.0, 4.0)] == [4, 9, 16]
    assert len(calls) == 1


def test_a_deprecation_by_torch_shows():
    """Tracing is deprecated from torch 2.13 on; whoever runs the tests shall see when that comes nearer."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Trace(lambda x: (x,), (torch.zeros(1),))
    deprecated = torch.__version__ >= "2.13"
    assert any("deprecated" in str(warning.message) for warning in caught) == deprecated
