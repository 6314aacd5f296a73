"""The terminal view: two colours for two phases, plain where there is no terminal, and what is there after Ctrl-C."""

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from esolm.sample import Reveal
from esolm.tokenizer import Tokenizer
from esolm.watch import Watch, pieces

WORDS = ("To", " be", ",", " or", " not")
END_ID = 9
DIFFUSION = Reveal(text=0, step=0, phase="diffusion", positions=(3, 1), tokens=(3, 1))
REST = tuple(Reveal(text=0, step=s, phase="sequential", positions=(p,), tokens=(p,)) for s, p in enumerate((2, 4), 1))


def decode(ids):
    return "".join(WORDS[token] for token in ids)


def watch(console, **options) -> Watch:
    return Watch(5, decode=decode, given={0: 0}, end_id=END_ID, console=console, **options)


def terminal(**options) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, color_system="standard", width=100, **options)


def colours(view: Watch) -> dict[str, str]:
    text = view.text()
    return {text.plain[span.start : span.end]: str(span.style) for span in text.spans}


def test_each_phase_has_its_colour():
    with watch(terminal()) as view:
        for reveal in (DIFFUSION, *REST):
            view.reveal(reveal)
    assert colours(view) == {"To": "bold", " be": "cyan", " or": "cyan", ",": "yellow", " not": "yellow"}


def test_what_is_not_written_is_a_block_for_each_token():
    view = watch(terminal())
    view.reveal(DIFFUSION)
    assert view.text().plain == "To be░░  or░░ "


def test_the_finished_text_stays_in_the_terminal_with_its_legend():
    console = terminal()
    with watch(console) as view:
        for reveal in (DIFFUSION, *REST):
            view.reveal(reveal)
    printed = console.file.getvalue()
    assert "\x1b[36m be" in printed and "\x1b[33m," in printed
    assert "4 tokens in 3 steps" in printed
    for colour, label in (("36", "diffusion"), ("33", "left to right")):
        assert f"\x1b[{colour}m  ■ \x1b[0m\x1b[2m{label}\x1b[0m" in printed, label


def test_the_legend_fits_on_a_line_of_eighty():
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    view = Watch(1500, decode=lambda ids: "", given={0: 0}, console=console, slower=1e-6)
    for position, phase in enumerate(("diffusion", *["sequential"] * 999), 1):
        view.reveal(Reveal(text=0, step=position, phase=phase, positions=(position,), tokens=(1,)))
    header, *_ = view._picture().renderables
    assert len(header.wrap(console, 80)) == 1


def test_the_text_is_drawn_while_it_is_written():
    console = terminal()
    with watch(console, slower=1e-6) as view:
        view.reveal(DIFFUSION)
        drawn = console.file.getvalue()
    assert "\x1b[1;36mdiffusion" in drawn and "░░" in drawn


def test_without_live_nothing_is_drawn_before_the_end():
    console = terminal()
    with watch(console, live=False, slower=1e-6) as view:
        view.reveal(DIFFUSION)
        assert console.file.getvalue() == ""
    assert " be" in console.file.getvalue()


def test_where_the_output_is_no_terminal_the_text_is_printed_once_and_plainly():
    console = Console(file=io.StringIO(), width=8)
    with watch(console) as view:
        for reveal in (DIFFUSION, *REST):
            view.reveal(reveal)
            assert console.file.getvalue() == ""
    assert console.file.getvalue() == "To be, or not\n"


def test_ctrl_c_prints_what_is_written_so_far():
    console = Console(file=io.StringIO())
    with pytest.raises(KeyboardInterrupt), watch(console) as view:
        view.reveal(DIFFUSION)
        raise KeyboardInterrupt
    assert console.file.getvalue() == "To be░░  or░░ \n"


def test_an_error_prints_no_text():
    console = Console(file=io.StringIO())
    with pytest.raises(ZeroDivisionError), watch(console) as view:
        view.reveal(DIFFUSION)
        1 / 0  # noqa: B018
    assert console.file.getvalue() == ""


def test_the_text_stops_at_its_first_end_of_text():
    view = watch(Console(file=io.StringIO()))
    view.reveal(Reveal(text=0, step=0, phase="diffusion", positions=(4, 2), tokens=(4, END_ID)))
    assert view.text().plain == "To░░ "


def test_markup_in_a_text_is_text():
    console = terminal()
    with Watch(1, decode=lambda ids: "[bold]x[/]", console=console) as view:
        view.reveal(Reveal(text=0, step=0, phase="diffusion", positions=(0,), tokens=(0,)))
    assert "[bold]x[/]" in console.file.getvalue()


def test_a_text_longer_than_the_screen_is_shown_around_what_was_written_last():
    console = terminal(height=8)
    view = Watch(400, decode=lambda ids: "".join(f" word{token}" for token in ids), console=console, slower=1e-6)
    with view:
        for step, position in enumerate((5, 390)):
            before = len(console.file.getvalue())
            view.reveal(Reveal(text=0, step=step, phase="diffusion", positions=(position,), tokens=(position,)))
            frame = console.file.getvalue()[before:]
            assert f"word{position}" in frame and frame.count("\n") <= 8


BYTES = Tokenizer.bytes()


@given(st.one_of(st.lists(st.integers(0, 255)), st.text()))
def test_pieces_join_to_the_text(source):
    ids = BYTES.encode(source) if isinstance(source, str) else source
    strings = pieces(BYTES.decode, ids)
    assert "".join(strings) == BYTES.decode(ids) and len(strings) == len(ids)


def test_of_tokens_that_share_a_character_the_last_has_it():
    assert pieces(BYTES.decode, BYTES.encode("a€b")) == ["a", "", "", "€", "b"]


def test_pieces_keep_the_space_that_a_tokenizer_drops_from_a_first_token():
    def dropping(ids):
        return "".join(WORDS[token] for token in ids).removeprefix(" ")

    assert pieces(dropping, [0, 1, 2, 3]) == ["To", " be", ",", " or"]


def test_a_character_that_two_phases_wrote_is_whole_in_the_text():
    console = Console(file=io.StringIO())
    with Watch(4, decode=BYTES.decode, given={0: 0x61}, console=console) as view:
        view.reveal(Reveal(text=0, step=0, phase="diffusion", positions=(2,), tokens=(0x82,)))
        view.reveal(Reveal(text=0, step=1, phase="sequential", positions=(1,), tokens=(0xE2,)))
        view.reveal(Reveal(text=0, step=2, phase="sequential", positions=(3,), tokens=(0xAC,)))
    assert console.file.getvalue() == "a€\n"
