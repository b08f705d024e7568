"""Typed configs: what is accepted, and that every mistake is one line with path and remedy."""

import dataclasses
import json
import textwrap
from typing import Annotated, ClassVar, Literal

import ml_collections
import pytest

from memjax.config import ConfigError, OneOf, build, check, diff, parse, to_dict, to_json


@dataclasses.dataclass(frozen=True, kw_only=True)
class Circle:
    kind: ClassVar[str] = "circle"
    radius: float = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Square:
    kind: ClassVar[str] = "square"
    side: int = 2
    colours: tuple[str, ...] = ("red",)

    def __post_init__(self):
        check(self, "side", self.side > 0, "must be greater than 0")


KINDS = {"circle": Circle, "square": Square}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Root:
    name: str = "a"
    steps: int = 10
    rate: float = 0.1
    flag: bool = False
    mode: Literal["fast", "slow"] = "fast"
    limit: int | None = None
    size: int | Literal["auto"] = "auto"
    pair: tuple[int, int] = (1, 2)
    shape: Circle | Square = Circle()
    shapes: dict[str, Annotated[object, OneOf(lambda: KINDS)]] = dataclasses.field(
        default_factory=dict
    )


def parsed(*arguments):
    return parse(Root, arguments, Root())[0]


@pytest.mark.parametrize(
    ("argument", "field", "value"),
    [
        ("name=123", "name", "123"),
        ("steps=1e3", "steps", 1000),
        ("rate=1", "rate", 1.0),
        ("rate=3e-4", "rate", 3e-4),
        ("flag=true", "flag", True),
        ("limit=7", "limit", 7),
        ("limit=none", "limit", None),
        ("mode=slow", "mode", "slow"),
        ("size=auto", "size", "auto"),
        ("size=4", "size", 4),
        ("pair=3,4", "pair", (3, 4)),
        ("pair=(3,4)", "pair", (3, 4)),
        ("shape.radius=2", "shape", Circle(radius=2.0)),
        ("shape=square", "shape", Square()),
    ],
)
def test_override_is_read_by_the_type_of_its_field(argument, field, value):
    assert getattr(parsed(f"--config.{argument}"), field) == value


def test_changing_the_kind_drops_the_fields_of_the_old_one():
    config = parsed("--config.shape.kind=square", "--config.shape.side=5")
    assert config.shape == Square(side=5)


def test_json_round_trip_is_the_identity():
    config = Root(shape=Square(side=3, colours=("a", "b")), shapes={"x": Circle(radius=2.5)})
    assert build(Root, json.loads(to_json(config))) == config
    assert to_dict(config)["shapes"]["x"] == {"kind": "circle", "radius": 2.5}


def test_config_dict_is_validated_into_the_dataclass():
    given = ml_collections.ConfigDict({"steps": 5, "shape": {"kind": "square", "side": 4}})
    assert build(Root, given) == Root(steps=5, shape=Square(side=4))


def test_the_key_of_a_mapping_names_the_kind_if_nothing_else_does():
    assert build(Root, {"shapes": {"square": {"side": 9}}}).shapes == {"square": Square(side=9)}


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("stepz=1", "config.stepz: Root has no such field; did you mean steps?"),
        ("steps=abc", "config.steps=abc: expected an integer, got abc"),
        ("steps=1.5", "config.steps=1.5: expected an integer, got 1.5 (float)"),
        ("steps=true", "config.steps=True: expected an integer, got True (bool)"),
        ("flag=1", "config.flag=1: expected true or false, got 1 (int)"),
        ("mode=fats", "config.mode='fats': must be one of 'fast', 'slow'; did you mean fast?"),
        ("pair=1,2,3", "config.pair="),
        ("shape.kind=sqare", "config.shape.kind='sqare': no such kind; did you mean square?"),
        ("shape.side=1", "config.shape.side: Circle has no such field"),
        ("shapes.x.side=1", "config.shapes.x.kind='': no such kind; choose from circle, square"),
        ("steps.x=1", "config.steps is not a section"),
        ("size=many", "config.size"),
    ],
)
def test_mistake_is_one_line_with_path_value_and_remedy(argument, message):
    with pytest.raises(ConfigError) as error:
        parsed(f"--config.{argument}")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_rule_of_a_nested_config_names_the_full_path():
    with pytest.raises(ConfigError, match=r"^config\.shape\.side=-1 must be greater than 0$"):
        parsed("--config.shape.kind=square", "--config.shape.side=-1")


def test_file_with_a_variant_then_overrides(tmp_path):
    file = tmp_path / "c.py"
    file.write_text(
        textwrap.dedent("""
        def get_config(variant="x"):
            return {"name": variant, "steps": 3}
        """)
    )
    config, rest = parse(Root, [f"--config={file}:big", "--config.steps", "4", "--other"], Root())
    assert (config.name, config.steps, rest) == ("big", 4, ["--other"])


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("none.py", None, "no such file"),
        ("c.py", "x = 1", "defines no get_config()"),
        ("c.py", "def get_config(): return 1 / 0", "get_config() failed: ZeroDivisionError"),
        ("c.py", "import nothing_of_that_name", "cannot be loaded: ModuleNotFoundError"),
        ("c.json", "{", "not valid JSON"),
        ("c.txt", "x", "must be a .py file"),
    ],
)
def test_bad_config_file_is_one_line_with_its_name(tmp_path, name, text, message):
    file = tmp_path / name
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError) as error:
        parse(Root, [f"--config={file}"], Root())
    assert message in str(error.value) and str(file) in str(error.value)
    assert "\n" not in str(error.value)


def test_diff_lists_changed_fields_with_both_values():
    assert diff(Root(), Root(steps=11, shape=Circle(radius=2.0))) == {
        "config.steps": (10, 11),
        "config.shape.radius": (1.0, 2.0),
    }
