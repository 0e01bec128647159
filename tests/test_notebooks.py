"""The notebooks: each runs from top to bottom, opens in Colab, and is committed with small outputs.

A notebook's sizes stand in its cell with the tag `parameters`; here they are made smaller. The cell
with the tag `install` is for Colab alone.
"""

import base64
import json
import re
from pathlib import Path

import jax
import pytest

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(path.stem for path in FOLDER.glob("*.ipynb"))
SMALL = {
    "01_attention_in_blocks": {"length": 64, "block": 8, "lengths": (64, 128)},
    "02_cosine_similarity": {"length": 64, "scales": (1, 8, 100)},
    "03_using_it": {"length": 100, "dim": 16, "drawn": 2},
    "04_pytorch": {"length": 64, "steps": 10},
    "05_speed_and_memory": {"length": 128, "repeats": 1},
}
REPOSITORY = "REPOSITORY_OWNER/flash_attention_jax"  # where the notebooks say that they are
BADGE = "https://colab.research.google.com/assets/colab-badge.svg"
PICTURE, WHOLE = 60_000, 250_000  # bytes


def cells(name, kind=None):
    notebook = json.loads((FOLDER / f"{name}.ipynb").read_text(encoding="utf-8"))
    return [cell for cell in notebook["cells"] if kind in (None, cell["cell_type"])]


def source(cell):
    return "".join(cell["source"])


def tagged(name, tag):
    return [c for c in cells(name, "code") if tag in c["metadata"].get("tags", [])]


def outputs(name):
    return [output for cell in cells(name, "code") for output in cell["outputs"]]


def test_notebooks_are_those_that_are_promised():
    numbers = [name[:2] for name in NOTEBOOKS]
    assert len(set(numbers)) == len(numbers)
    assert set(SMALL) <= set(NOTEBOOKS)


SLOW = {"03_using_it": pytest.mark.slow}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=SLOW.get(name, ())) for name in NOTEBOOKS]
)
def test_notebook_runs_with_small_sizes(name, monkeypatch):
    matplotlib = pytest.importorskip("matplotlib", reason="needs matplotlib")
    matplotlib.use("Agg")
    monkeypatch.chdir(FOLDER)  # as Jupyter does
    namespace = {"__name__": "__main__"}
    # As users run them, with JAX's own settings.
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"):
        for number, cell in enumerate(cells(name, "code")):
            tags = cell["metadata"].get("tags", [])
            if "install" in tags:
                continue
            try:
                exec(compile(source(cell), f"{name}, code cell {number}", "exec"), namespace)
            except ModuleNotFoundError as error:
                if error.name != "torch":
                    raise
                pytest.skip("needs torch")
            if "parameters" in tags:
                small = SMALL.get(name, {})
                assert set(small) <= set(namespace), "a parameter has another name"
                namespace |= small
    from matplotlib import pyplot as plt

    plt.close("all")


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_opens_in_colab_with_one_install_cell(name):
    first = cells(name)[0]
    link = f"https://colab.research.google.com/github/{REPOSITORY}/blob/main/notebooks/{name}.ipynb"
    assert first["cell_type"] == "markdown"
    assert source(first).startswith(f"[![Open in Colab]({BADGE})]({link})")
    (install,) = tagged(name, "install")
    assert install == cells(name, "code")[0]
    assert 'if "google.colab" in sys.modules:\n' in source(install)
    assert f"git+https://github.com/{REPOSITORY}" in source(install)
    assert all("%pip" not in source(c) for c in cells(name, "code") if c != install)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_is_committed_as_it_ran_from_top_to_bottom(name):
    counts = [cell["execution_count"] for cell in cells(name, "code")]
    assert counts == list(range(1, len(counts) + 1))
    assert outputs(name)
    assert [o for o in outputs(name) if o["output_type"] == "error"] == []
    assert [o for o in outputs(name) if o.get("name") == "stderr"] == []


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_outputs_are_small(name):
    pictures = [o["data"]["image/png"] for o in outputs(name) if "image/png" in o.get("data", {})]
    assert [p for p in map(len, map(base64.b64decode, pictures)) if p > PICTURE] == []
    assert (FOLDER / f"{name}.ipynb").stat().st_size < WHOLE


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_names_no_place_on_the_machine_that_ran_it(name):
    text = (FOLDER / f"{name}.ipynb").read_text(encoding="utf-8")
    assert re.findall(r'(?<![\w.])/(?:home|root|tmp|usr|work|Users)/[^\s"\\]*', text) == []


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_links_between_notebooks_lead_somewhere(name):
    text = "".join(source(cell) for cell in cells(name, "markdown"))
    for target in re.findall(r"\]\((\w+\.ipynb)\)", text):
        assert (FOLDER / target).exists(), target
