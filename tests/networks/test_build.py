import json
from pathlib import Path

import pytest

from t2v.checkpoints.folder import NETWORKS
from t2v.networks.build import BUILDERS, build_on_meta


@pytest.mark.parametrize("network", NETWORKS)
def test_builds_what_the_config_describes_without_its_parameters(tiny_folder: Path, network: str):
    config = json.loads((tiny_folder / network / "config.json").read_text())
    assert {parameter.device.type for parameter in build_on_meta(network, config).parameters()} == {"meta"}
    assert BUILDERS.keys() == NETWORKS.keys()
