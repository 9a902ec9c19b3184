"""Live controls for a figure, which fail loudly when tests run.

ipywidgets catches an exception in a callback and prints it into the widget: a notebook with a broken slider runs to
its end and passes every test. So in fast mode `explore` shows nothing and calls the drawing function itself, once for
each end of each control, where an exception is an ordinary one. A live figure also leaves no picture in a stored
notebook; a lesson therefore shows a static figure first and the controls second.

    explore(draw, steps=widgets.IntSlider(4, 1, 50), solver=widgets.Dropdown(options=["euler", "heun"]))
"""

from collections.abc import Callable, Iterable, Mapping

import ipywidgets as widgets

from diffusion_opt.lesson.settings import settings


def explore(draw: Callable[..., object], **controls: widgets.ValueWidget) -> widgets.interactive | None:
    """Show `draw(**values)` under live controls and redraw when a control is let go; what `draw` returns is displayed.

    In fast mode: call `draw` at both ends of each control (each option of a list), the others at their present value,
    and return None. Raises TypeError for a control that is not a widget with a range or with options.
    """
    if not controls:
        raise TypeError("explore needs at least one control, for example steps=widgets.IntSlider(4, 1, 50)")
    ends = {name: _ends(name, control) for name, control in controls.items()}
    for control in controls.values():
        if control.has_trait("continuous_update"):
            control.continuous_update = False  # a redraw takes longer than a move of the mouse
    if settings().fast:
        now = {name: control.value for name, control in controls.items()}
        for name, values in ends.items():
            for value in values:
                draw(**{**now, name: value})
        return None
    return widgets.interactive(draw, {"auto_display": True}, **controls)


def _ends(name: str, control: object) -> tuple:
    """The values a test must try."""
    if isinstance(control, widgets.ValueWidget):
        if control.has_trait("min") and control.has_trait("max"):
            return (control.min, control.max)
        if hasattr(control, "options"):
            return _option_values(control.options)
        if isinstance(control, widgets.Checkbox | widgets.ToggleButton):
            return (False, True)
    found = type(control).__name__
    raise TypeError(f"control {name!r} must be a slider, a list of options or a checkbox of ipywidgets, got {found}")


def _option_values(options: Mapping[str, object] | Iterable) -> tuple:
    """The values of a list of options: plain values, (label, value) pairs, or a mapping from labels to values."""
    if isinstance(options, Mapping):
        return tuple(options.values())
    options = tuple(options)
    pairs = all(isinstance(option, tuple) and len(option) == 2 for option in options)
    return tuple(option[1] for option in options) if pairs else options
