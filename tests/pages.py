"""A report with something of everything, for the tests of the page."""

from esolm import exhibits, report
from esolm.sample import Reveal

PIECES = ("KING", ".\n", "To", " be", ",", " or", " not", " <b>", "\n", "now", " and", " then")
END = 10  # what follows was written by diffusion and then cut off
REVEALS = (
    Reveal(text=0, step=0, phase="diffusion", positions=(5, 3), tokens=(50, 30)),
    Reveal(text=0, step=1, phase="diffusion", positions=(11,), tokens=(110,)),
    *(
        Reveal(text=0, step=step, phase="sequential", positions=(position,), tokens=(position,))
        for step, position in enumerate((2, 4, 6, 7, 8, 9, 10), 2)
    ),
)


def whole_report() -> report.Report:
    """Two given tokens, nine steps, curves with and without errors, and text that would break a careless page."""
    replay = report.replay_of("A text", "Drag </script> the slider", PIECES, REVEALS, END)
    points = [(float(step), 8 - 0.01 * step) for step in range(10, 400, 10)]
    method = "EsoLM(variant='B', alpha_0=0.125, a_name_too_long_to_fit_on_a_narrow_screen_without_a_break_in_it=False)"
    return report.Report(
        title="A <i>title</i>",
        intro="What it is",
        facts=(("method", method), ("parameters", "4,203,776")),
        replays=(replay, replay),
        curves=(
            report.Curve(name="training", points=tuple(points)),
            report.Curve(name="validation", points=tuple((step, value + 0.1, 0.2) for step, value in points[9::10])),
        ),
        speeds=tuple(
            report.Speed(model=name, seconds=128 / rate, tokens_per_second=rate, nfe=128)
            for name, rate in (("AR", 1200.0), ("MDLM", 150.0), ("Eso-LM (B)", 1000.0))
        ),
        speeds_note="One text at a time",
        pictures=tuple(exhibits.pictures()),
        samples=("A text.\nIn two lines.", "<script>alert(1)</script>"),
    )
