"""explore(): in fast mode each end of each control is drawn and errors surface; otherwise a live figure."""

import ipywidgets as widgets
import pytest

from diffusion_opt.lesson import explore, settings


@pytest.fixture(params=["0", "1"])
def fast(request, monkeypatch):
    monkeypatch.setenv("DIFFUSION_OPT_FAST", request.param)
    settings.cache_clear()
    yield request.param == "1"
    settings.cache_clear()


@pytest.fixture
def drawn():
    return []


def controls():
    return {
        "steps": widgets.IntSlider(value=4, min=1, max=50),
        "solver": widgets.Dropdown(options=[("Euler's", "euler"), ("Heun's", "heun")]),
    }


def test_both_ends_are_drawn_in_fast_mode_and_the_present_value_otherwise(fast, drawn):
    shown = explore(lambda steps, solver: drawn.append((steps, solver)), **controls())
    if fast:
        assert drawn == [(1, "euler"), (50, "euler"), (4, "euler"), (4, "heun")]
        assert shown is None
    else:
        assert drawn == [(4, "euler")]
        assert isinstance(shown, widgets.interactive)


def test_a_live_figure_is_redrawn_when_a_control_moves(drawn, monkeypatch):
    monkeypatch.setenv("DIFFUSION_OPT_FAST", "0")
    settings.cache_clear()
    wanted = controls()
    explore(lambda steps, solver: drawn.append((steps, solver)), **wanted)
    wanted["steps"].value = 9
    assert drawn[-1] == (9, "euler")


def test_an_error_at_the_far_end_surfaces_in_fast_mode(monkeypatch):
    monkeypatch.setenv("DIFFUSION_OPT_FAST", "1")
    settings.cache_clear()
    with pytest.raises(ZeroDivisionError):
        explore(lambda steps: 1 / (50 - steps), steps=widgets.IntSlider(value=4, min=1, max=50))
    settings.cache_clear()


def test_sliders_wait_until_they_are_let_go(fast, drawn):
    wanted = controls()
    explore(lambda **values: drawn.append(values), **wanted)
    assert wanted["steps"].continuous_update is False


@pytest.mark.parametrize(
    ("control", "ends"),
    [
        (widgets.FloatSlider(value=0.5, min=0.1, max=1.0), [0.1, 1.0]),
        (widgets.SelectionSlider(options=[1, 2, 4]), [1, 2, 4]),
        (widgets.ToggleButtons(options={"a": 10, "b": 20}), [10, 20]),
        (widgets.Checkbox(), [False, True]),
    ],
)
def test_every_kind_of_control_has_ends(control, ends, drawn, monkeypatch):
    monkeypatch.setenv("DIFFUSION_OPT_FAST", "1")
    settings.cache_clear()
    explore(lambda x: drawn.append(x), x=control)
    settings.cache_clear()
    assert drawn == ends


def test_a_control_without_ends_is_refused(fast):
    with pytest.raises(TypeError, match=r"'name' must be a slider.*got Text"):
        explore(print, name=widgets.Text())


def test_no_controls_are_refused(fast):
    with pytest.raises(TypeError, match="at least one control"):
        explore(print)
