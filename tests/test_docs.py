"""The documents say what the code does."""

import pytest

from conftest import ROOT
from documents import check_table
from t2v.request import inputs_table


@pytest.mark.parametrize("page", ["README.md", "docs/api.md"])
def test_the_table_of_inputs_is_current(page: str):
    check_table(ROOT / page, "inputs", inputs_table())
