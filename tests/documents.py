"""Tables in the documents that tests compare with the code.

    T2V_WRITE_DOCS=1 scripts/test tests/test_docs.py tests/test_api.py

writes them.
"""

import os
import re
from pathlib import Path


def check_table(page: Path, name: str, table: str) -> None:
    """The page contains this table between its markers; or is changed to, if T2V_WRITE_DOCS is 1."""
    text = page.read_text()
    found = re.search(rf"(<!-- {name}: [^\n]* -->\n)(.*?)(<!-- end -->)", text, re.DOTALL)
    assert found, f"{page.name} has no marker {name}"
    if os.environ.get("T2V_WRITE_DOCS") == "1":
        page.write_text(text[: found.end(1)] + table + text[found.start(3) :])
    else:
        assert found[2] == table
