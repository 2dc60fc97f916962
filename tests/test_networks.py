import json
from pathlib import Path

import pytest

from t2v.networks import BUILD, empty
from t2v.weights import NETWORKS


@pytest.mark.parametrize("network", NETWORKS)
def test_builds_what_the_config_describes_without_its_parameters(tiny_folder: Path, network: str):
    config = json.loads((tiny_folder / network / "config.json").read_text())
    assert {parameter.device.type for parameter in empty(network, config).parameters()} == {"meta"}
    assert BUILD.keys() == NETWORKS.keys()
