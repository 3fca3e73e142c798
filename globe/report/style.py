"""How the project's pictures look: no chart junk, readable labels, colours that the colour-blind tell apart."""

from __future__ import annotations

from typing import Any

from cycler import cycler
from matplotlib.axis import Axis
from matplotlib.ticker import LogLocator, NullFormatter

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#4d4d4d")
"""Okabe and Ito (2008), without the yellow that vanishes on white and with grey for black."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
INK = "#333333"

STYLE: dict[Any, Any] = {
    "axes.edgecolor": INK,
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.prop_cycle": cycler(color=COLOURS),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "figure.dpi": 150,
    "font.size": 9,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "lines.linewidth": 1.5,
    "lines.markersize": 4,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}
"""For `matplotlib.rc_context`."""


def plain_log_ticks(axis: Axis) -> None:
    """1, 2 and 5 of each decade, written out, on a logarithmic axis."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())
