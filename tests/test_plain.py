"""Plain data: what goes out comes back equal, and everything wrong is told at once."""

import json
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esolm import plain


@dataclass(frozen=True, kw_only=True)
class Shape(ABC):
    @abstractmethod
    def area(self) -> float: ...


@dataclass(frozen=True, kw_only=True)
class Square(Shape):
    side: float = 1.0

    def __post_init__(self) -> None:
        if self.side < 0:
            raise ValueError(f"side must not be negative, got {self.side}")

    def area(self) -> float:
        return self.side**2


@dataclass(frozen=True, kw_only=True)
class Box(Shape):
    width: float
    height: float = 2.0
    kind: Literal["thin", "thick"] = "thin"

    def area(self) -> float:
        return self.width * self.height


@dataclass(frozen=True, kw_only=True)
class Pen:
    colour: str = "black"
    nibs: tuple[int, ...] = (1, 2)


@dataclass(frozen=True, kw_only=True)
class Brush:
    colour: str = "black"


@dataclass(frozen=True, kw_only=True)
class Drawing:
    shape: Shape = field(default_factory=Square)
    pen: Pen = field(default_factory=Pen)
    spare: Pen | None = None
    tool: Pen | Brush = field(default_factory=Brush)
    pair: tuple[int, str] = (1, "a")
    amount: int | float | str = 1
    loud: bool = False
    level: Literal[1, 2, "auto"] = "auto"
    path: Path | None = None
    others: tuple[Shape, ...] = ()


finite = st.floats(allow_nan=False, allow_infinity=False)
squares = st.builds(Square, side=finite.filter(lambda x: x >= 0))
boxes = st.builds(Box, width=finite, height=finite, kind=st.sampled_from(["thin", "thick"]))
pens = st.builds(Pen, colour=st.text(), nibs=st.lists(st.integers()).map(tuple))
drawings = st.builds(
    Drawing,
    shape=squares | boxes,
    pen=pens,
    spare=st.none() | pens,
    tool=pens | st.builds(Brush, colour=st.text()),
    pair=st.tuples(st.integers(), st.text()),
    amount=st.integers() | finite | st.text(),
    loud=st.booleans(),
    level=st.sampled_from([1, 2, "auto"]),
    path=st.none() | st.just(Path("a/b")),
    others=st.lists(squares | boxes).map(tuple),
)


def problems_of(cls: type, data: object) -> str:
    with pytest.raises(ValueError) as caught:
        plain.from_plain(cls, data)
    return str(caught.value)


@given(drawings)
def test_what_goes_out_comes_back_equal(drawing: Drawing) -> None:
    text = plain.render(plain.to_plain(drawing))
    back = plain.from_plain(Drawing, plain.parse(text))
    assert back == drawing
    assert type(back.amount) is type(drawing.amount)


@given(st.recursive(st.none() | st.booleans() | st.integers() | finite | st.text(),
                    lambda x: st.lists(x) | st.dictionaries(st.text(), x), max_leaves=20))  # fmt: skip
def test_any_data_gives_an_object_or_a_value_error(data: object) -> None:
    for given_data in (data, {"shape": data, "pen": data, "tool": data, "others": [data], "amount": data}):
        try:
            plain.from_plain(Drawing, given_data)
        except ValueError as error:
            assert str(error)


@given(st.text(alphabet='[]{}",:\\ a1-.eE') | st.text())
def test_any_text_parses_as_json_does_or_gives_a_value_error(text: str) -> None:
    try:
        data = plain.parse(text)
    except ValueError:
        return
    assert data == json.loads(text)


def test_an_abstract_field_carries_the_name_of_its_class() -> None:
    assert plain.to_plain(Drawing())["shape"] == {"type": "Square", "side": 1.0}
    assert plain.from_plain(Shape, {"type": "Box", "width": 3}) == Box(width=3.0)


def test_a_class_of_the_users_own_needs_no_registry() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Disc(Shape):
        radius: float = 1.0

        def area(self) -> float:
            return 3.14 * self.radius**2

    assert plain.from_plain(Drawing, {"shape": {"type": "Disc", "radius": 2.0}}).shape == Disc(radius=2.0)


def test_all_problems_are_told_at_once_with_their_keys() -> None:
    data = {
        "shape": {"type": "Box", "height": "tall", "kind": "thik"},
        "pen": {"color": "red", "nibs": [1, "two"]},
        "loud": 1,
        "level": 3,
        "zzz": 0,
    }
    lines = problems_of(Drawing, data).splitlines()
    assert lines[0] == "8 problems:"
    assert sorted(line.strip() for line in lines[1:]) == [
        "level: expected one of 1, 2, 'auto', got 3",
        "loud: expected bool, got 1",
        "pen.color: unknown key; did you mean 'colour'?",
        "pen.nibs.1: expected int, got 'two'",
        "shape.height: expected float, got 'tall'",
        "shape.kind: expected one of 'thin', 'thick', got 'thik'; did you mean 'thick'?",
        "shape.width: missing; expected float",
        "zzz: unknown key (keys of Drawing: shape, pen, spare, tool, pair, amount, loud, level, path, others)",
    ]


def test_what_a_class_itself_refuses_is_told_with_the_key() -> None:
    message = problems_of(Drawing, {"others": [{"type": "Square", "side": -1}]})
    assert message == "others.0: side must not be negative, got -1.0"


def test_an_unknown_type_is_answered_with_the_nearest_one() -> None:
    message = problems_of(Drawing, {"shape": {"type": "Squre"}})
    assert "shape.type" in message and "did you mean 'Square'?" in message


@pytest.mark.parametrize("data", [[], 3, "x", None, True])
def test_a_dataclass_is_not_read_from_something_else(data: object) -> None:
    assert "Drawing" in problems_of(Drawing, data)


def test_true_is_not_an_integer_and_an_integer_is_a_float() -> None:
    assert "expected int" in problems_of(Pen, {"nibs": [True]})
    side = plain.from_plain(Square, {"side": 2}).side
    assert side == 2.0 and type(side) is float


@pytest.mark.parametrize("number", [float("nan"), float("inf"), 10**400])
def test_numbers_must_be_finite(number: float) -> None:
    assert "side" in problems_of(Square, {"side": number})
    if isinstance(number, float):
        with pytest.raises(ValueError, match="amount: must be finite"):
            plain.to_plain(Drawing(amount=number))


@pytest.mark.parametrize("text", ["NaN", "[Infinity]", "-Infinity", "1e999", '{"a": 1, "a": 2}', "", "{", "9" * 5000])
def test_json_that_means_nothing_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        plain.parse(text)


@pytest.mark.parametrize("unit", ["[", '{"a":', '"\\"', "[[]"])
def test_json_a_million_deep_is_refused_at_once(unit: str) -> None:
    start = time.process_time()
    with pytest.raises(ValueError):
        plain.parse(unit * 1_000_000)
    assert time.process_time() - start < 2


def test_brackets_inside_strings_are_not_depth() -> None:
    assert plain.parse('"' + "[" * 1000 + '\\""') == "[" * 1000 + '"'


def test_what_is_not_plain_is_refused_by_its_key() -> None:
    with pytest.raises(TypeError, match=r"pen\.colour"):
        plain.to_plain(Drawing(pen=Pen(colour=object())))  # type: ignore[arg-type]


def test_replace_changes_nested_keys_and_nothing_else() -> None:
    drawing = Drawing(shape=Box(width=1.0))
    changed = plain.replace(drawing, {"shape.width": 5, "pen.colour": "red", "spare.nibs": (7,), "loud": True})
    assert changed == Drawing(shape=Box(width=5.0), pen=Pen(colour="red"), spare=Pen(nibs=(7,)), loud=True)
    assert drawing == Drawing(shape=Box(width=1.0))


def test_replace_takes_whole_objects_and_then_keys_inside_them() -> None:
    changed = plain.replace(Drawing(), {"shape.height": 9.0, "shape": Box(width=1.0), "tool": Pen()})
    assert changed == Drawing(shape=Box(width=1.0, height=9.0), tool=Pen())


def test_replacing_the_type_starts_from_that_types_defaults() -> None:
    drawing = Drawing(shape=Square(side=3.0))
    assert plain.replace(drawing, {"shape.width": 4.0, "shape.type": "Box"}).shape == Box(width=4.0)


def test_replace_names_every_unknown_key_and_the_nearest_right_one() -> None:
    with pytest.raises(ValueError) as caught:
        plain.replace(Drawing(), {"pen.color": "red", "shpe": 1, "loud.er": 2, "pen.nibs.x": 1})
    message = str(caught.value)
    assert "pen.color: unknown key; did you mean 'colour'?" in message
    assert "shpe: unknown key; did you mean 'shape'?" in message
    assert "loud: has no keys inside, so no 'er'" in message
    assert "pen.nibs: has no keys inside" in message


def test_replace_reports_bad_values_like_from_plain() -> None:
    with pytest.raises(ValueError, match="shape: side must not be negative"):
        plain.replace(Drawing(), {"shape.side": -2})
    with pytest.raises(ValueError, match="pen: expected Pen"):
        plain.replace(Drawing(), {"pen": 5})
