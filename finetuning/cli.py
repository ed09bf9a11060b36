"""Groups of flags as dataclasses: each flag stands once, with its help, beside the code that reads it.

    @dataclass
    class DataArgs:
        '''Data'''
        resolution: int = flag(512, "side of the training images, in pixels")

        def problems(self):
            if self.resolution % 8:
                yield f"--resolution {self.resolution} must be a multiple of 8"

    @dataclass
    class Args(DataArgs, NoiseArgs): ...

    args = parse(Args, __doc__)

Values come from the defaults, then from `--config FILE` (YAML or JSON, keys named as the flags), then from the command
line. Everything that is wrong is reported together: unknown flags, wrong types, values outside the choices, and what
each group's `problems` yields.
"""

import argparse
import dataclasses
import difflib
import inspect
import sys
import types
import typing
from pathlib import Path

import yaml

REQUIRED = object()


class UserError(ValueError):
    """What a person can mend: the message names the file or flag and the fix. `run_script` prints it."""


def flag(default, help, *, choices=None, metavar=None, positional=False, repeated=False):
    """A dataclass field that is also a flag, or (`positional`) a bare word. `default`: REQUIRED, a value, a list.

    A list's flag given twice counts the second time alone; with `repeated` the values add up.
    """
    metadata = {"help": help, "choices": choices, "metavar": metavar, "required": default is REQUIRED}
    metadata |= {"positional": positional, "repeated": repeated}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=None if default is REQUIRED else default, metadata=metadata)


def groups(args_class):
    """The dataclasses that declare flags, in reading order: [(class, [field, ...]), ...].

    A script may declare a group's flag again with another default: it stays in its group.
    """
    found, seen = [], set()
    for group in reversed(args_class.__mro__):
        own = inspect.get_annotations(group).keys() - seen
        fields = [f for f in dataclasses.fields(args_class) if f.name in own and "help" in f.metadata]
        seen |= own
        if fields:
            found.append((group, fields))
    return found


def title(group):
    return (group.__doc__ or group.__name__).strip().splitlines()[0].rstrip(".")


def parse(args_class, description, argv=None):
    """An instance of `args_class`, or exit status 2 with every problem listed."""
    argv = sys.argv[1:] if argv is None else argv
    args, problems = read(args_class, description, argv)
    if problems:
        print(f"{Path(sys.argv[0]).name}: {len(problems)} problem(s) with the arguments:", file=sys.stderr)
        print("\n".join(f"  - {problem}" for problem in problems), file=sys.stderr)
        raise SystemExit(2)
    return args


def parse_command(commands, description, argv=None):
    """(name, args) of a script with several commands, {name: dataclass}: the first word says which."""
    argv = sys.argv[1:] if argv is None else list(argv)
    name = argv[0] if argv else ""
    if name in ("-h", "--help"):
        print(description)
        raise SystemExit(0)
    if name not in commands:
        near = difflib.get_close_matches(name, commands, n=1)
        told = f"; did you mean {near[0]}?" if near else ""
        script = Path(sys.argv[0]).name
        print(f"{script}: say what to do: {', '.join(commands)} (not {name!r}){told}", file=sys.stderr)
        print(f"  `{script} COMMAND --help` lists the flags of each", file=sys.stderr)
        raise SystemExit(2)
    return name, parse(commands[name], description, argv[1:])


def read(args_class, description, argv):
    """(args, problems): the arguments as far as they could be read, and a list of what is wrong with them."""
    fields = {field.name: field for _, own in groups(args_class) for field in own}
    parser = _parser(args_class, description)
    given, unknown = parser.parse_known_args(argv)
    given = vars(given)
    problems = [_unknown_flag(word, fields) for word in unknown if word.startswith("-")]
    strays = [word for word in unknown if not word.startswith("-")]
    if strays and not problems:
        problems.append(f"not understood: {' '.join(strays)} (a value with spaces needs quotes)")

    config_path = given.pop("config", None)
    values = {}
    if config_path:
        config, config_problems = _read_config(Path(config_path), fields)
        values.update(config)
        problems += config_problems
    values.update(given)

    kinds = typing.get_type_hints(args_class)
    converted = {}
    for name, raw in values.items():
        try:
            converted[name] = _convert(raw, kinds[name], fields[name].metadata["choices"])
        except ValueError as problem:
            problems.append(f"{_spelled(fields[name])} {_shown(raw)}: {problem}")
    for name, field in fields.items():
        if field.metadata["required"] and values.get(name) is None:
            problems.append(f"{_spelled(field)} is required: {field.metadata['help']}")

    args = args_class(**converted)
    if not problems:
        problems = list(_group_problems(args))
    return args, problems


def as_dict(args):
    """The flags and their values, ready for JSON."""
    return {field.name: getattr(args, field.name) for _, fields in groups(type(args)) for field in fields}


def first_few(items, most=5):
    """The items for a message: "a, b, c and 4 more"."""
    items = [str(item) for item in items]
    return ", ".join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")


def flag_table(args_class, besides=None):
    """A Markdown table of the flags by group, for the README; without those that are the same in `besides`."""
    known = {} if besides is None else {field.name: field for _, own in groups(besides) for field in own}
    lines = []
    for group, fields in groups(args_class):
        fields = [f for f in fields if f.name not in known or _default_text(f) != _default_text(known[f.name])]
        if not fields:
            continue
        lines += [f"\n**{title(group)}**\n", "| flag | default | meaning |", "|---|---|---|"]
        for field in fields:
            help = field.metadata["help"].replace("|", "\\|")
            lines.append(f"| `{_spelled(field)}` | {_default_text(field)} | {help} |")
    return "\n".join(lines).strip() + "\n"


def _parser(args_class, description):
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML or JSON file that fills any flag; the command line wins")
    for group, fields in groups(args_class):
        section = parser.add_argument_group(title(group))
        for field in fields:
            _add(section, field, typing.get_type_hints(args_class)[field.name])
    return parser


def _add(section, field, kind):
    help = f"{field.metadata['help']} (default: {_default_text(field)})".replace("%", "%%")
    if field.metadata["positional"]:
        section.add_argument(field.name, nargs="?", help=help)
        return
    if kind is bool:
        section.add_argument(f"--{field.name}", action=argparse.BooleanOptionalAction, help=help)
        return
    many = typing.get_origin(_inner(kind)) is list
    metavar = field.metadata["metavar"]
    if field.metadata["choices"]:
        metavar = "{" + ",".join(map(str, field.metadata["choices"])) + "}"
    action = "extend" if field.metadata["repeated"] else "store"
    section.add_argument(f"--{field.name}", nargs="+" if many else None, metavar=metavar, help=help, action=action)


def _spelled(field):
    return field.name.upper() if field.metadata["positional"] else f"--{field.name}"


def _default_text(field):
    if field.metadata["required"]:
        return "required"
    default = field.default if field.default is not dataclasses.MISSING else field.default_factory()
    if default is None or isinstance(default, bool):
        return {None: "none", False: "off", True: "on"}[default]
    return " ".join(map(str, default)) if isinstance(default, list) else str(default) or "empty"


def _inner(kind):
    """`int | None` -> `int`."""
    if isinstance(kind, types.UnionType):
        return next(option for option in typing.get_args(kind) if option is not type(None))
    return kind


def _convert(raw, kind, choices):
    inner = _inner(kind)
    if raw is None:
        if isinstance(kind, types.UnionType):
            return None
        raise ValueError("needs a value")
    if typing.get_origin(inner) is list:
        item = typing.get_args(inner)[0]
        return [_convert(one, item, choices) for one in (raw if isinstance(raw, list) else [raw])]
    if inner is bool:
        if not isinstance(raw, bool):
            raise ValueError("must be true or false")
        return raw
    if inner in (int, float):
        if isinstance(raw, bool):
            raise ValueError(f"must be {'a whole number' if inner is int else 'a number'}")
        try:
            value = inner(raw)
        except (TypeError, ValueError, OverflowError):
            raise ValueError(f"must be {'a whole number' if inner is int else 'a number'}") from None
        if inner is int and isinstance(raw, float) and raw != value:
            raise ValueError("must be a whole number")
    elif isinstance(raw, list | dict):
        raise ValueError("takes one value, not a list")
    elif isinstance(raw, bool):  # YAML reads no, off, yes and on as these
        raise ValueError("must be text: put it in quotes")
    else:
        value = str(raw)
    if choices and value not in choices:
        raise ValueError(f"must be one of {', '.join(map(str, choices))}")
    return value


def _read_config(path, fields):
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        return {}, [f"--config {path}: {error}"]
    if not isinstance(content, dict):
        return {}, [f"--config {path}: must be a list of `flag: value` lines"]
    content.pop("run", None)  # what args.json says of the run that wrote it, beside its flags
    problems = [f"--config {path}: {_unknown_flag(str(key), fields)}" for key in content if key not in fields]
    return {key: value for key, value in content.items() if key in fields}, problems


def _unknown_flag(word, fields):
    name = word.lstrip("-").split("=")[0].replace("-", "_")
    near = difflib.get_close_matches(name, fields, n=1)
    return f"unknown flag {word.split('=')[0]}" + (f"; did you mean --{near[0]}?" if near else "")


def _group_problems(args):
    for group in type(args).__mro__:
        if "problems" in group.__dict__:
            yield from group.__dict__["problems"](args)


def _shown(raw):
    return " ".join(map(str, raw)) if isinstance(raw, list) else str(raw)
