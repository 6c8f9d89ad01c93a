"""The examples run as they stand, and the pages' code names things that are there."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

import dts_fast

ROOT = Path(__file__).resolve().parent.parent


def test_the_tutorial_runs(capsys):
    runpy.run_path(str(ROOT / "examples" / "tutorial.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert printed.endswith("done\n")
    assert "after a call with sql: ['chat', 'sql']" in printed


def test_requests_of_many_users_get_their_own_answers(capsys):
    runpy.run_path(str(ROOT / "examples" / "serving.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert printed.count(" as alone") == 6
    assert "NOT" not in printed
    assert "unknown adapter 'nobody'" in printed


@pytest.mark.parametrize(
    "page", sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")]), ids=lambda page: page.name
)
def test_imports_and_files_in_the_pages_exist(page):
    text = page.read_text(encoding="utf-8")
    for names in re.findall(r"^from dts_fast import (.+)$", text, flags=re.MULTILINE):
        for name in names.split(","):
            assert hasattr(dts_fast, name.strip()), name
    for link in re.findall(r"\]\(((?!https?:|#)[^)#]+)", text):
        assert (page.parent / link).exists(), link
    for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
        compile(block, str(page), "exec")
