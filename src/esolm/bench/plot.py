"""Speeds of writing as a picture: tokens a second of each method, a group of bars for each setting.

matplotlib draws it (the extra `plot`). It measures nothing.
"""

from pathlib import Path

from esolm.bench.writing import Setting, Writing

_FORMATS = (".png", ".svg", ".pdf")
_GROUP = 0.9  # of the room between two settings that the bars of one take
_MANY_TIMES = 20  # from here on, speeds share a picture on a log axis only


def check(path: Path) -> None:
    """ValueError before any work if the picture cannot be drawn: no matplotlib, an unknown format, no such folder."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ValueError("a picture needs matplotlib: pip install 'esolm[plot]'") from None
    if path.suffix.lower() not in _FORMATS:
        raise ValueError(f"a picture must end in {', '.join(_FORMATS)}, got {path.name!r}")
    if not path.parent.is_dir():
        raise ValueError(f"there is no folder {path.parent} for the picture: make it first")


def draw(writing: Writing, path: Path) -> None:
    """Draw the rows into a file."""
    from matplotlib.figure import Figure

    settings = list(dict.fromkeys(row.setting for row in writing.rows))
    methods = list(dict.fromkeys(row.method for row in writing.rows))
    speeds = {(row.method, row.setting): row.setting.batch * row.setting.length / row.seconds for row in writing.rows}
    figure = Figure(figsize=(7.5, 1.3 + 0.28 * len(speeds)), layout="constrained")
    axes = figure.subplots()
    for number, method in enumerate(methods):
        places = [place + (number + 1) * _GROUP / (len(methods) + 1) - _GROUP / 2 for place in range(len(settings))]
        found = [speeds[method, setting] for setting in settings]
        bars = axes.barh(places, found, height=0.9 * _GROUP / (len(methods) + 1), label=method)
        axes.bar_label(bars, [f" {speed:,.0f}" for speed in found], fontsize=8)
    if max(speeds.values()) > _MANY_TIMES * min(speeds.values()):
        axes.set_xscale("log")
        axes.set_xlim(left=min(speeds.values()) / 2)
    axes.margins(x=0.12)
    axes.set_xlabel("tokens a second")
    axes.set_yticks(range(len(settings)), [_label(setting) for setting in settings], fontsize=8)
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(
        f"{writing.machine.cpu}, {writing.machine.threads} threads, medians of {writing.repeats}", fontsize=9
    )
    figure.legend(fontsize=8, frameon=False, loc="outside lower center", ncols=len(methods))
    figure.savefig(path, dpi=150)


def _label(setting: Setting) -> str:
    steps = "L" if setting.num_steps is None else f"{setting.num_steps:,}"
    size = f"V={setting.vocab_size:,} width {setting.width}"
    return f"L={setting.length:,} T={steps}\n{size}\nbatch {setting.batch}"
