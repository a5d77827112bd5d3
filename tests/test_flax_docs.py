"""The code of docs/flax.md runs, and fails as the page shows."""

import re
from pathlib import Path
from typing import Any

import flax.linen as nn
import pytest
from flax import nnx

import gradtest
import gradtest.flax
from tests import flax_modules

PAGE = (Path(__file__).parents[1] / "docs" / "flax.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def test_the_pages_code_runs_and_prints_the_failure_that_it_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    first, *others = BLOCKS
    Path("net.py").write_text(first)
    names: dict[str, Any] = {"__name__": "net"}
    with pytest.raises(gradtest.GradientMismatch) as caught:
        exec(compile(first, str(tmp_path / "net.py"), "exec"), names)
    told = str(caught.value)
    (shown,) = re.findall(r"assert_module_grads failed: the gradient .*", PAGE)
    assert told.startswith(shown)
    assert "net.py:20 in swish_bwd" in told
    assert "rule of swish" in told
    for code in others:
        exec(code, names)
    assert names["report"].unchecked[0] == "params['base']['bias'] (excluded)"


def test_the_page_lists_every_layer_that_is_swept():
    for library, prefix in ((nn, "nn"), (nnx, "nnx")):
        for name, _, _ in flax_modules.cases(library):
            assert f"`{prefix}.{name}`" in PAGE
