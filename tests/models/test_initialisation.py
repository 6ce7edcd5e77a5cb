import pytest
import torch

from pi05_lightning.models.config import ModelConfig
from pi05_lightning.models.pi05 import Pi05


@pytest.mark.parametrize("size", ["debug", "tiny"])
def test_every_parameter_is_written_whatever_its_memory_held(size: str) -> None:
    model = Pi05.without_memory(ModelConfig.preset(size))
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, torch.nan)
    model.reset_parameters([list(range(2944, 3968))])
    assert [name for name, parameter in model.named_parameters() if parameter.isnan().any()] == []


def test_gates_of_the_expert_start_closed() -> None:
    model = Pi05(ModelConfig.preset("debug"))
    model.reset_parameters()
    assert all(not m.any() for m in model.flow_head.modulate(torch.rand(2, 3)))
