"""Typed configs: load, override, validate, compare and save.

A config is a tree of frozen, keyword-only dataclasses. `build` turns plain data (a dict, JSON, an
`ml_collections.ConfigDict`) or a dataclass into a validated tree; every mistake is one line that
names the full path, the value, the rule and the nearest valid name. The command line follows the
habit of the ecosystem: `--config=FILE[:variant] --config.model.d_model=512`.

A field that holds one of several configs carries a `kind` in plain data
(`{"kind": "attention", "heads": 8}`): a union of dataclasses, or `Annotated[Base, OneOf(kinds)]`.
"""

import ast
import dataclasses
import difflib
import importlib.util
import json
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")

_WORDS = {"true": True, "false": False, "none": None, "null": None}


class ConfigError(ValueError):
    """A mistake in a config: the message is one line for the user."""


class FieldError(ConfigError):
    """A field breaks a rule of its dataclass; `build` adds the path to it."""

    def __init__(self, field: str, value: Any, rule: str, path: str = ""):
        self.field, self.value, self.rule, self.path = field, value, rule, path
        super().__init__(f"{path}{field}={value!r} {rule}")

    def under(self, prefix: str) -> "FieldError":
        """The same error, seen from a config that holds this one at `prefix`."""
        return FieldError(self.field, self.value, self.rule, f"{prefix}.{self.path}")


class Text(str):
    """An override as typed on the command line; the field's type decides how it is read."""


class OneOf(NamedTuple):
    """Marks a field that holds one config of several: `Annotated[Base, OneOf(kinds)]`.

    `kinds()` returns the dataclass of each kind.
    """

    kinds: Callable[[], Mapping[str, type]]


def check(config: Any, field: str, ok: bool, rule: str) -> None:
    """Raise a FieldError for `field` unless `ok`; `rule` reads after `field=value`."""
    if not ok:
        raise FieldError(field, getattr(config, field), rule)


def check_at_least(config: Any, low: float, *fields: str) -> None:
    """Check that each field is None or at least `low`."""
    for field in fields:
        value = getattr(config, field)
        check(config, field, value is None or value >= low, f"must be at least {low}")


def build(tp: Any, value: Any, path: str = "config") -> Any:
    """Validate `value` as a `tp`, recursively; `path` names it in errors."""
    origin, args = typing.get_origin(tp), typing.get_args(tp)
    if origin is typing.Annotated:
        marks = [mark for mark in args[1:] if isinstance(mark, OneOf)]
        return _build_kind(marks[0].kinds(), value, path) if marks else build(args[0], value, path)
    if origin in (typing.Union, types.UnionType):
        return _build_union(args, value, path)
    if origin is typing.Literal:
        return _build_literal(args, value, path)
    if origin is tuple:
        return _build_tuple(args, value, path)
    if origin is dict:
        return _build_dict(args, value, path)
    if dataclasses.is_dataclass(tp) and isinstance(tp, type):
        return _build_dataclass(tp, value, path)
    return _build_scalar(tp, value, path)


def _mismatch(path: str, value: Any, expected: str) -> ConfigError:
    shown = str(value) if isinstance(value, Text) else repr(value)
    name = "" if isinstance(value, Text) else f" ({type(value).__name__})"
    return ConfigError(f"{path}={shown}: expected {expected}, got {shown!s}{name}")


def _suggest(name: str, valid: Iterable[str]) -> str:
    valid = sorted(valid)
    near = difflib.get_close_matches(name, valid, 1, 0.4)
    if near:
        return f"did you mean {near[0]}?"
    return f"choose from {', '.join(valid)}" if valid else "there is none to choose from"


def _literal(value: Any, path: str, expected: str) -> Any:
    """Read command-line text as a Python literal."""
    if not isinstance(value, Text):
        return value
    if value.lower() in _WORDS:
        return _WORDS[value.lower()]
    try:
        return ast.literal_eval(str(value))
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        raise _mismatch(path, value, expected) from None


def _build_union(args: tuple, value: Any, path: str) -> Any:
    options = [a for a in args if a is not type(None)]
    none = value is None or (isinstance(value, Text) and value.lower() in ("none", "null"))
    if none and len(options) < len(args):
        return None
    if len(options) == 1:
        return build(options[0], value, path)
    classes = {getattr(a, "kind", ""): a for a in options if dataclasses.is_dataclass(a)}
    if classes:
        return _build_kind(typing.cast(dict[str, type], classes), value, path)
    for option in options:
        try:
            return build(option, value, path)
        except ConfigError:
            continue
    raise _mismatch(path, value, " or ".join(getattr(a, "__name__", str(a)) for a in options))


def _build_kind(kinds: Mapping[str, type], value: Any, path: str) -> Any:
    value = _plain(value)
    if isinstance(value, Text):
        value = {"kind": str(value)}
    if dataclasses.is_dataclass(value):
        kind = getattr(type(value), "kind", type(value).__name__)
        if kinds.get(kind) is not type(value):
            raise ConfigError(f"{path}: {type(value).__name__} is not one of {', '.join(kinds)}")
        return _build_dataclass(kinds[kind], value, path)
    if not isinstance(value, Mapping):
        raise _mismatch(path, value, f"a config of kind {', '.join(kinds) or '(none exists)'}")
    fields = dict(value)
    last = path.rpartition(".")[2]
    kind = str(fields.pop("kind", last if last in kinds else ""))
    if kind not in kinds:
        raise ConfigError(f"{path}.kind={kind!r}: no such kind; {_suggest(kind, kinds)}")
    return _build_dataclass(kinds[kind], fields, path)


def _build_literal(args: tuple, value: Any, path: str) -> Any:
    for option in args:
        if value == option and type(value) is type(option):
            return option
        if isinstance(value, Text) and str(option) == str(value):
            return option
    choices = ", ".join(repr(a) for a in args)
    near = difflib.get_close_matches(str(value), [str(a) for a in args], 1, 0.4)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ConfigError(f"{path}={str(value)!r}: must be one of {choices}{hint}")


def _build_tuple(args: tuple, value: Any, path: str) -> tuple:
    if isinstance(value, Text) and "(" not in value and "[" not in value:
        value = tuple(Text(part.strip()) for part in value.split(",") if part.strip())
    value = _literal(value, path, "a list")
    if not isinstance(value, list | tuple):
        raise _mismatch(path, value, "a list")
    types_ = args[:1] * len(value) if args[-1] is Ellipsis else args
    if len(types_) != len(value):
        raise _mismatch(path, value, f"{len(types_)} values")
    return tuple(build(a, x, f"{path}[{i}]") for i, (a, x) in enumerate(zip(types_, value)))


def _build_dict(args: tuple, value: Any, path: str) -> dict:
    value = _literal(_plain(value), path, "a mapping")
    if not isinstance(value, Mapping):
        raise _mismatch(path, value, "a mapping")
    return {build(args[0], k, path): build(args[1], x, f"{path}.{k}") for k, x in value.items()}


def _build_dataclass(tp: type, value: Any, path: str) -> Any:
    value = _plain(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        if not isinstance(value, tp):
            raise _mismatch(path, type(value).__name__, tp.__name__)
        value = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if not isinstance(value, Mapping):
        raise _mismatch(path, value, f"the fields of {tp.__name__}")
    hints = typing.get_type_hints(tp, include_extras=True)
    fields = {f.name: f for f in dataclasses.fields(tp)}
    for name in value:
        if name not in fields:
            hint = _suggest(str(name), fields)
            raise ConfigError(f"{path}.{name}: {tp.__name__} has no such field; {hint}")
    for name, field in fields.items():
        required = (field.default, field.default_factory) == (dataclasses.MISSING,) * 2
        if required and name not in value:
            raise ConfigError(f"{path}.{name}: missing; {tp.__name__} needs it")
    built = {name: build(hints[name], x, f"{path}.{name}") for name, x in value.items()}
    try:
        return tp(**built)
    except FieldError as error:
        raise error.under(path) from None
    except ValueError as error:  # also of the dataclasses of `pallas_kernels`
        raise ConfigError(f"{path}: {error}") from None


def _build_scalar(tp: Any, value: Any, path: str) -> Any:
    if tp is str:
        if isinstance(value, str):
            return str(value)
        raise _mismatch(path, value, "text")
    name = {int: "an integer", float: "a number", bool: "true or false"}.get(tp, str(tp))
    value = _literal(value, path, name)
    if tp is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if tp is int and isinstance(value, float) and value.is_integer():
        return int(value)  # 1e6 on the command line
    if tp is Any or (isinstance(value, tp) and (tp is bool or not isinstance(value, bool))):
        return value
    raise _mismatch(path, value, name)


def _plain(value: Any) -> Any:
    """An `ml_collections.ConfigDict` as a dict; anything else as it is."""
    return value.to_dict() if type(value).__module__.startswith("ml_collections") else value


def to_dict(config: Any) -> Any:
    """Plain data that JSON holds and `build` reads back."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        fields = {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
        kind = getattr(type(config), "kind", None)
        return fields if kind is None else {"kind": kind, **fields}
    if isinstance(config, Mapping):
        return {key: to_dict(value) for key, value in config.items()}
    if isinstance(config, list | tuple):
        return [to_dict(value) for value in config]
    return config


def to_json(config: Any) -> str:
    """The resolved config as text."""
    return json.dumps(to_dict(config), indent=2) + "\n"


def override(data: dict, key: str, text: str, path: str = "config") -> None:
    """Set `a.b.c` in plain data to command-line text, in place."""
    *sections, last = key.split(".")
    here = data
    for depth, name in enumerate(sections):
        if here.get(name) is None:
            here[name] = {}
        here = here[name]
        if not isinstance(here, dict):
            raise ConfigError(f"{path}.{'.'.join(sections[: depth + 1])} is not a section")
    if last == "kind" and here.get("kind") != text:
        here.clear()  # another kind has other fields
    here[last] = Text(text)


def load_file(spec: str) -> Any:
    """Plain data of `FILE.py[:variant]`, which defines `get_config()`, or of `FILE.json`."""
    name, _, variant = spec.partition(":")
    path = Path(name)
    if not path.is_file():
        near = difflib.get_close_matches(
            path.name, [p.name for p in path.parent.glob("*.py")] if path.parent.is_dir() else [], 1
        )
        hint = f"did you mean {path.parent / near[0]}?" if near else "give an existing .py or .json"
        raise ConfigError(f"--config={spec}: no such file; {hint}")
    if path.suffix == ".json":
        try:
            return json.loads(path.read_text())
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"--config={spec}: not valid JSON: {error}") from None
    if path.suffix != ".py":
        raise ConfigError(f"--config={spec}: must be a .py file with get_config() or a .json file")
    return to_dict(_plain(_get_config(path, variant, spec)))


def _get_config(path: Path, variant: str, spec: str) -> Any:
    module_spec = importlib.util.spec_from_file_location("memjax_config_file", path)
    assert module_spec and module_spec.loader
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
    except ConfigError as error:
        raise ConfigError(f"--config={spec}: {error}") from None
    except Exception as error:
        line = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ConfigError(f"--config={spec}: cannot be loaded: {line}") from error
    get_config = getattr(module, "get_config", None)
    if not callable(get_config):
        raise ConfigError(f"--config={spec}: defines no get_config(); add one")
    try:
        return get_config(variant) if variant else get_config()
    except ConfigError as error:
        raise ConfigError(f"--config={spec}: {error}") from None
    except Exception as error:
        line = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ConfigError(f"--config={spec}: get_config() failed: {line}") from error


def parse(
    tp: type[T], argv: Iterable[str], default: Any = None, flag: str = "config"
) -> tuple[T, list[str]]:
    """Read `--config=...` and `--config.a.b=value`; returns the config and the other arguments.

    `default` is used when no file is named.
    """
    data, overrides, rest = to_dict(default) if default is not None else {}, [], []
    arguments = iter(argv)
    for argument in arguments:
        name, equals, text = argument.partition("=")
        if name != f"--{flag}" and not name.startswith(f"--{flag}."):
            rest.append(argument)
            continue
        if not equals:
            following = next(arguments, None)
            if following is None or following.startswith("--"):
                raise ConfigError(f"{name}: needs a value, as in {name}=VALUE")
            text = following
        if name == f"--{flag}":
            data = load_file(text)
        else:
            overrides.append((name[len(flag) + 3 :], text))
    if not isinstance(data, dict):
        raise ConfigError(f"--{flag}: must hold the fields of {tp.__name__}")
    for key, text in overrides:
        override(data, key, text, flag)
    return build(tp, data, flag), rest


def diff(old: Any, new: Any) -> dict[str, tuple[Any, Any]]:
    """Fields that differ between two configs (or plain data): path -> (old, new)."""
    left, right = _flat(to_dict(old)), _flat(to_dict(new))
    missing = "(absent)"
    keys = [*left, *(key for key in right if key not in left)]
    pairs = {key: (left.get(key, missing), right.get(key, missing)) for key in keys}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def _flat(value: Any, path: str = "config") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {path: value}
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat.update(_flat(inner, f"{path}.{key}"))
    return flat
