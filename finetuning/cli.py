"""Groups of flags as dataclasses: everything about a flag is declared once, beside the code that reads it.

    @dataclass
    class EMAArgs:
        '''Average of the weights'''
        use_ema: bool = flag(False, "average the weights")
        ema_decay: float = flag(0.9999, "decay of the average", min=0, below=1, requires="use_ema")

        def problems(self):  # only what relates several flags, or asks the disk
            if self.use_ema and not Path(self.folder).is_dir():
                yield f"--folder {self.folder}: there is no such folder"

    @dataclass
    class Args(EMAArgs, NoiseArgs): ...

    def train(args): ...

    if __name__ == "__main__":
        sys.exit(run_script(Args, __doc__, train))

Values come from the defaults, then from `--config FILE` (YAML or JSON, keys named as the flags), then from the command
line. Everything that is wrong is reported together: unknown flags, wrong types, choices and ranges, flags that do
nothing without another one, and what each group's `problems` yields.
"""

import argparse
import dataclasses
import difflib
import inspect
import math
import operator
import os
import re
import signal
import sys
import threading
import types
import typing
from pathlib import Path

import yaml

REQUIRED = object()
LIMITS = (
    ("min", "at least", operator.ge), ("above", "above", operator.gt),
    ("max", "at most", operator.le), ("below", "below", operator.lt),
)  # fmt: skip
SEEDS = {"min": 0, "max": 2**64 - 1}  # the range of a seed's flag: what torch takes; -1 is no drawn one, as elsewhere
DASHES = ("-", "\N{EN DASH}", "\N{EM DASH}", "\N{MINUS SIGN}")  # what a web page makes of --
WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


class UserError(ValueError):
    """What a person can mend: the message names the file or flag and the fix. `run_script` prints it."""


def flag(default, help=None, **declared):
    """A dataclass field that is also a flag. `default` is REQUIRED, a value, or a list; what else can be declared are
    the fields of `Flag`.

    A subclass may declare a flag again with another default: it stays in its group, and what the second declaration
    does not say (even the help) is taken from the first.
    """
    for name in ("requires", "conflicts", "was"):  # one name may stand alone
        if isinstance(declared.get(name), str):
            declared[name] = (declared[name],)
    metadata = declared | {"required": default is REQUIRED} | ({"help": help} if help else {})
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=None if default is REQUIRED else default, metadata=metadata)


# -- what is declared ------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Flag:
    """One flag of a class: what its field is, and from `required` on what its declarations say.

    choices         the values that are allowed, or a function that lists them (called only where they are needed);
                    with on and off among them, --name alone is on, --no-name off, and true and false are read too
    positional      a bare word instead of --name
    repeated        of a list: --name may be given several times, and the values add up
    min, max        the range of a number, or of each number of a list; both are allowed values
    above, below    the same, but these are not allowed themselves
    requires        a flag, or several of which one suffices, without which this one does nothing: "use_ema" is on where
                    it has a value other than off, none, 0 or empty; "loss_type=huber" names the value
    conflicts       a flag, or several, that cannot be given together with this one
    affects_result  False: cannot change what a run computes (see flags_without_effect); a group may say so of all its
                    flags, by an attribute of this name
    reads           names what is read and must not be written to: a path or a Hub name (see paths_read)
    was             older names, which go on working with a notice
    """

    name: str
    kind: object  # the type of its value, without None
    optional: bool  # None is allowed
    default: object  # a list is a fresh one
    required: bool = False
    help: str = ""
    choices: object = ()
    metavar: str | None = None
    positional: bool = False
    repeated: bool = False
    min: float | None = None
    max: float | None = None
    above: float | None = None
    below: float | None = None
    requires: tuple = ()
    conflicts: tuple = ()
    affects_result: bool = True
    reads: bool = False
    was: tuple = ()

    @property
    def spelled(self):
        return self.name.upper() if self.positional else f"--{self.name}"

    @property
    def is_list(self):
        return typing.get_origin(self.kind) is list

    @property
    def allowed(self):
        """The choices, or ()."""
        return tuple(self.choices() if callable(self.choices) else self.choices)

    @property
    def is_switch(self):
        """Whether it can be given like a bool."""
        return self.kind is bool or {"on", "off"} <= set(() if callable(self.choices) else self.choices)

    @property
    def range(self):
        """ "at least 0 and below 1", or nothing."""
        limits = ((word, getattr(self, name)) for name, word, _ in LIMITS)
        return " and ".join(f"{word} {limit}" for word, limit in limits if limit is not None)

    @property
    def default_text(self):
        if self.required:
            return "required"
        if self.default is None or isinstance(self.default, bool):
            return {None: "none", False: "off", True: "on"}[self.default]
        return " ".join(map(str, self.default)) if self.is_list else str(self.default) or "empty"

    @property
    def notes(self):
        """What the help says beside the default: its range, what it needs, whether it may be repeated."""
        needs = " or ".join(f"--{name.replace('=', ' ')}" for name in self.requires)
        repeated = "may be given several times" if self.repeated else ""
        switch = f"alone: on; --no-{self.name}: off" if self.is_switch and self.kind is not bool else ""
        return [text for text in (self.range, f"with {needs}" if needs else "", repeated, switch) if text]

    def in_range(self, value):
        limits = ((holds, getattr(self, name)) for name, _, holds in LIMITS)
        return all(limit is None or holds(value, limit) for holds, limit in limits)


CONFIG = Flag(
    "config", str, True, None, metavar="FILE", help="YAML or JSON file that fills any flag; the command line wins"
)


def groups(args_class):
    """The dataclasses that declare flags, in reading order: [(class, [Flag, ...]), ...]."""
    hints = typing.get_type_hints(args_class)
    fields = {field.name: field for field in dataclasses.fields(args_class)}
    metadata, group_of = {}, {}
    for group in reversed(args_class.__mro__):
        for name in inspect.get_annotations(group):
            field = group.__dict__.get("__dataclass_fields__", {}).get(name)
            if field is not None and "required" in field.metadata:
                of_group = {"affects_result": group.__dict__.get("affects_result", True)}
                metadata[name] = metadata.get(name, of_group) | dict(field.metadata)
                group_of.setdefault(name, group)
    found = {}
    for name, group in group_of.items():
        found.setdefault(group, []).append(_as_flag(fields[name], hints[name], metadata[name]))
    return [(group, found[group]) for group in reversed(args_class.__mro__) if group in found]


def _as_flag(field, hint, metadata):
    optional = isinstance(hint, types.UnionType)
    kind = next(one for one in typing.get_args(hint) if one is not type(None)) if optional else hint
    default = field.default if field.default is not dataclasses.MISSING else field.default_factory()
    return Flag(name=field.name, kind=kind, optional=optional, default=default, **metadata)


def flags_of(args_class):
    """{name: Flag}, in reading order."""
    return {flag.name: flag for _, flags in groups(args_class) for flag in flags}


def flags_without_effect(args_class):
    """The names, older ones too, of the flags that cannot change what a run computes: where it writes, how often."""
    flags = [flag for flag in flags_of(args_class).values() if not flag.affects_result]
    return frozenset(name for flag in flags for name in (flag.name, *flag.was))


def paths_read(args):
    """What the flags declared with reads=True name: paths, or names on the Hub."""
    values = [getattr(args, name) for name, flag in flags_of(type(args)).items() if flag.reads]
    return [path for value in values for path in (value if isinstance(value, list) else [value]) if path]


def title(group):
    return (group.__doc__ or group.__name__).strip().splitlines()[0].rstrip(".")


def as_dict(args):
    """The flags and their values, ready for JSON."""
    return {name: getattr(args, name) for name in flags_of(type(args))}


def first_few(items, most=5):
    """The items for a message: "a, b, c and 4 more"."""
    items = [str(item) for item in items]
    return ", ".join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")


def size_text(count):
    """A number of bytes for a message: "26.5 MB", "1.2 GB"."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def flag_table(args_class, besides=None):
    """A Markdown table of the flags by group, for the docs; without those that are the same in `besides`."""
    known = {} if besides is None else flags_of(besides)
    lines = []
    for group, flags in groups(args_class):
        flags = [f for f in flags if f.name not in known or f.default_text != known[f.name].default_text]
        if not flags:
            continue
        lines += [f"\n**{title(group)}**\n", "| flag | default | meaning |", "|---|---|---|"]
        for flag in flags:
            meaning = "; ".join([flag.help, *flag.notes]).replace("|", "\\|")
            lines.append(f"| `{flag.spelled}` | {flag.default_text} | {meaning} |")
    return "\n".join(lines).strip() + "\n"


# -- a script --------------------------------------------------------------------------------------------------------

FULL_GPU = re.compile(r"CUDA error: out of memory|(CUDNN|CUBLAS|CUSOLVER|CUFFT)_(STATUS_)?ALLOC_FAILED")


def run_script(args_class, description, function, argv=None):
    """Parse, call `function(args)`, and return the exit status: what it returns (None is 0).

    2    something is wrong with the flags: every problem is printed
    1    a UserError, an OSError or too little GPU memory: one message, no traceback
    130  Ctrl-C; 143 SIGTERM
    Any other exception keeps its traceback: it is an error of this code.
    """
    return _run(function, parse(args_class, description, argv))


def run_commands(commands, description, argv=None, *, was=None, usual=None):
    """`run_script` for a script with several commands, {name: (args_class, function)}.

    An entry may also be a function that returns this pair: what it imports is then imported only for that command.
    was    {older name: name}, which go on working with a notice
    usual  the command that is meant where the first word is a flag
    """
    name, rest = _command(list(commands), description, sys.argv[1:] if argv is None else list(argv), was or {}, usual)
    args_class, function = load_command(commands[name])
    return _run(function, parse(args_class, description, rest))


def load_command(entry):
    """(args_class, function) of an entry of `run_commands`."""
    return entry() if callable(entry) else entry


def _run(function, args):
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a notebook's has not
            stream.reconfigure(errors="backslashreplace")  # what a terminal's encoding lacks: \xe9
    if "WORLD_SIZE" not in os.environ:  # left in a shell, without a launcher: accelerate would wait for the others
        os.environ.pop("LOCAL_RANK", None)
    process, signals = os.getpid(), []

    def stop(number, _frame):
        """End as Ctrl-C does: what was begun is cleaned up, and a line says why."""
        if os.getpid() != process:  # a forked worker, about which nobody needs to hear
            os._exit(128 + number)
        signals.append(number)
        raise KeyboardInterrupt

    is_main = threading.current_thread() is threading.main_thread()  # elsewhere Python takes no handler
    before = signal.signal(signal.SIGTERM, stop) if is_main else None
    try:
        return function(args) or 0
    except KeyboardInterrupt:
        report("stopped by SIGTERM" if signals else "interrupted")
        return 128 + signals[0] if signals else 130
    except BrokenPipeError:  # whoever read the output is gone: `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except UserError as error:
        report(f"error: {error}")
        return 1
    except OSError as error:
        report(f"error: {_os_message(error)}", from_any_process=True)
        return 1
    except RuntimeError as error:
        torch = sys.modules.get("torch")
        # The second is what CUDA and its libraries say where they, and not PyTorch's allocator, find no memory left
        if torch is None or not (isinstance(error, torch.OutOfMemoryError) or FULL_GPU.search(str(error))):
            raise
        reason = str(error).partition("\n")[0]
        advice = getattr(args, "memory_advice", str)()
        report(f"error: the GPU has too little memory: {reason}\n{advice}".rstrip(": \n"), from_any_process=True)
        return 1
    finally:
        if is_main:
            signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def report(message, from_any_process=False):
    """A message on stderr, clear of a progress bar.

    Of several processes only the first one speaks, except `from_any_process`: what may happen to a single one.
    """
    rank = process_rank()
    if rank and not from_any_process:
        return
    message = f"[process {rank}] {message}" if rank else message
    tqdm = sys.modules.get("tqdm")
    if tqdm is not None:
        tqdm.tqdm.write(message, file=sys.stderr)
    else:
        print(message, file=sys.stderr, flush=True)


def process_rank():
    """The number of this process among those that a launcher started, as it says; 0 without a launcher.

    RANK alone is somebody's own variable, such as finetune.sh's rank of a LoRA.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return 0
    for name in ("RANK", "LOCAL_RANK"):
        if os.environ.get(name, "").isdecimal():
            return int(os.environ[name])
    return 0


def _os_message(error):
    """In one line, with the path."""
    if error.strerror is None:
        return " ".join(str(error).split())
    path = error.filename2 if error.filename2 is not None else error.filename  # a copy or a move fails at its target
    return f"{os.fsdecode(path) if isinstance(path, str | bytes) else path}: {error.strerror}" if path else str(error)


# -- reading the flags -----------------------------------------------------------------------------------------------


def parse(args_class, description, argv=None):
    """An instance of `args_class`, or exit status 2 with every problem listed."""
    argv = sys.argv[1:] if argv is None else argv
    args, problems = read(args_class, description, argv)
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        heading = f"{_script()}: {count} with the flags:"
        report("\n".join([heading, *(f"  - {problem}" for problem in problems)]))
        raise SystemExit(2)
    return args


def _command(names, description, argv, was, usual):
    """(name of the command, the words after it)."""
    word = argv[0] if argv else ""
    if word in ("-h", "--help"):
        print(description)
        raise SystemExit(0)
    if usual and word.startswith("--"):
        return usual, argv
    if word in was:
        report(f"{_script()}: {word} is now called {was[word]}")
        word = was[word]
    if word not in names:
        near = difflib.get_close_matches(word, names, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        report(f"{_script()}: say what to do: {', '.join(names)} (not {word!r}){hint}")
        report(f"  `{_script()} COMMAND --help` lists the flags of each")
        raise SystemExit(2)
    return word, argv[1:]


def read(args_class, description, argv):
    """(args, problems): the arguments as far as they could be read, and a list of what is wrong with them.

    A wrong value is replaced by the default.
    """
    flags = flags_of(args_class)
    found = _Reading(flags)
    found.read_words(list(argv), show_help=lambda: _help(args_class, description).print_help())
    if config := found.given.pop("config", None):
        found.read_config(Path(config))
    values = found.converted()
    missing = [flag for flag in flags.values() if flag.required and values.get(flag.name) is None]
    found.problems += [f"{one.spelled} is required: {one.help}" for one in missing if one.name not in found.suspect]
    args = args_class(**values)
    # What relates several flags is said only of those that could be read
    related = [*_unmet(args, flags), *(() if missing else _problems_of_groups(args))]
    return args, found.problems + [problem for problem in related if not found.is_of_suspect(problem)]


class _Reading:
    """What a command line and a config file give for `flags` {name: Flag}, and what is wrong with it."""

    def __init__(self, flags):
        self.flags, self.given, self.problems = flags, {}, []  # given: {name: text, texts, or True and False}
        self.suspect = set()  # names of flags that could not be read
        self.current = {older: flag.name for flag in flags.values() for older in flag.was}

    def wrong(self, problem, *names):
        """Note a problem, and the flags that have no value because of it."""
        self.problems.append(problem)
        self.suspect.update(names)

    def unknown(self, word, where=""):
        spelled = word.split("=")[0]
        name = spelled.lstrip("".join(DASHES)).replace("-", "_").removeprefix("no_")
        near = difflib.get_close_matches(name, [n for n, one in self.flags.items() if not one.positional], n=1)
        self.wrong(f"{where}unknown flag {spelled}" + (f"; did you mean --{near[0]}?" if near else ""), *near)

    def is_of_suspect(self, problem):
        words = problem.replace(",", " ").replace(":", " ").split()
        return any(self.flags[name].spelled in words for name in self.suspect)

    def present_name(self, name):
        """The present name of a flag; a notice where `name` is an older one."""
        if name in self.flags or name not in self.current:
            return name
        report(f"{_script()}: --{name} is now called --{self.current[name]}")
        return self.current[name]

    def read_words(self, words, show_help):
        given, strays = self.given, []
        while words:
            word = words.pop(0)
            if word in ("-h", "--help"):
                show_help()
                raise SystemExit(0)
            if word == "--":
                strays += words
                break
            if not _is_flag(word):
                strays.append(word)
                continue
            spelled, equals, attached = word.partition("=")
            name = self.present_name(spelled[2:])
            turned_off = name.startswith("no-")
            if turned_off:
                name = self.present_name(name[3:])
            flag = CONFIG if name == "config" else self.flags.get(name)
            if not spelled.startswith("--") or flag is None or flag.positional or (turned_off and not flag.is_switch):
                self.unknown(word)
                _take_values(words)
                continue

            if flag.kind is bool:
                if not equals and not turned_off and words and words[0].lower() in WORDS:
                    equals, attached = "=", words.pop(0)
                given[name] = WORDS.get(attached.lower(), attached) if equals else not turned_off
                continue
            values = ([attached] if equals else []) + _take_values(words)
            if flag.is_switch and (turned_off or not values):
                given[name] = "off" if turned_off else "on"
                strays += values
            elif not values:
                self.wrong(f"--{name} needs a value", name)
            elif not flag.is_list:
                given[name] = values[0]
                strays += values[1:]
            elif name in given and not flag.repeated:
                self.wrong(f"--{name} is given twice: put all its values after one --{name}", name)
            else:
                given[name] = given.get(name, []) + values

        for flag in self.flags.values():
            if flag.positional and strays:
                given[flag.name] = strays.pop(0)
        if strays and not self.problems:
            self.wrong(f"not understood: {' '.join(strays)} (a value with spaces needs quotes)")

    def read_config(self, path):
        """Fill in what the command line does not give."""
        try:
            content = yaml.load(path.read_text(encoding="utf-8-sig"), _OnceEach) or {}
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            return self.wrong(f"--config {path}: {error}")
        if not isinstance(content, dict):
            return self.wrong(f"--config {path}: must be a list of `flag: value` lines")
        content.pop("run", None)  # what args.json says of the run that wrote it, beside its flags
        values = {}
        for key, value in content.items():
            name = self.present_name(str(key))
            if name in self.flags:
                values[name] = value
            else:
                self.unknown(str(key), where=f"--config {path}: ")
        self.given = values | self.given

    def converted(self):
        """{name: value} of those that are right."""
        values = {}
        for name, raw in self.given.items():
            try:
                values[name] = _convert(raw, self.flags[name])
            except ValueError as problem:
                self.wrong(str(problem), name)
        return values


def _take_values(words):
    """The words up to the next flag, taken from the front of the list."""
    end = next((i for i, word in enumerate(words) if _is_flag(word)), len(words))
    taken = words[:end]
    del words[:end]
    return taken


def _is_flag(word):
    """Whether a word is a flag rather than a value: -1, -1e-3, "-" and "- with spaces" are values."""
    if not word.startswith(DASHES) or word == "-" or " " in word.partition("=")[0]:
        return False
    try:
        float(word)
    except ValueError:
        return True
    return False


class _OnceEach(yaml.SafeLoader):
    """Refuses a key that stands twice: YAML would take the last one without a word."""

    def construct_mapping(self, node, deep=False):
        keys = [key.value for key, _ in node.value]
        if twice := sorted({str(key) for key in keys if keys.count(key) > 1}):
            raise yaml.YAMLError(f"{', '.join(twice)} is given twice: keep one of them")
        return super().construct_mapping(node, deep)


def _convert(raw, flag):
    """The value as its type, in its range. Raises ValueError with the problem."""
    if raw is None:
        if flag.optional:
            return None
        raise ValueError(f"{flag.spelled} needs a value")
    if not flag.is_list:
        return _convert_one(raw, flag, flag.kind, raw)
    kind = typing.get_args(flag.kind)[0]
    return [_convert_one(one, flag, kind, raw) for one in (raw if isinstance(raw, list) else [raw])]


def _convert_one(raw, flag, kind, whole):
    def wrong(must, shown=whole):
        shown = " ".join(map(str, shown)) if isinstance(shown, list) else str(shown)
        return ValueError(f"{flag.spelled} {shown} {must}")

    if flag.is_switch and kind is not bool:
        raw = {True: "on", False: "off"}.get(WORDS.get(str(raw).lower()), raw)
    if kind is bool:
        value = WORDS.get(raw.lower()) if isinstance(raw, str) else raw
        if not isinstance(value, bool):
            raise wrong("must be true or false")
        return value
    if kind in (int, float):
        number = "must be a whole number" if kind is int else "must be a number"
        if isinstance(raw, bool):
            raise wrong(number)
        try:
            value = kind(raw)
        except (TypeError, ValueError, OverflowError):
            raise wrong(number) from None
        if kind is int and isinstance(raw, float) and raw != value:
            raise wrong(number)
        if (
            kind is float
            and not math.isfinite(value)
            and (math.isnan(value) or math.inf not in (flag.max, -(flag.min or 0)))
        ):
            raise wrong(f"must be a finite number{flag.range and ', '}{flag.range}", raw)
        if not flag.in_range(value):
            raise wrong(f"must be {flag.range}", raw)
    elif isinstance(raw, list | dict):
        raise wrong("must be one value, not a list")
    elif isinstance(raw, bool):  # YAML reads no, off, yes and on as these
        raise wrong("must be text: put it in quotes")
    else:
        value = str(raw)
        if not value and (flag.required or flag.reads or flag.default):  # of a shell's variable that is not set
            raise wrong("must not be empty", '""')
        if re.search("[\ud800-\udfff]", value) and not os.path.lexists(value):
            raise wrong(
                "is not text in this terminal's encoding: LC_ALL=C.UTF-8 before the command helps", ascii(value)
            )
    if flag.choices and value not in flag.allowed:
        near = difflib.get_close_matches(str(value), [str(choice) for choice in flag.allowed], n=1)
        hint = f"; did you mean {near[0]}?" if near and len(flag.allowed) > 5 else ""
        raise wrong(f"must be one of {', '.join(map(str, flag.allowed))}{hint}", raw)
    return value


def _problems_of_groups(args):
    for group in type(args).__mro__:
        try:
            yield from group.__dict__["problems"](args) if "problems" in group.__dict__ else ()
        except UserError as error:  # of a file that a flag names
            yield str(error)
        except OSError as error:
            yield _os_message(error)


def _unmet(args, flags):
    """Flags that do nothing, or that exclude each other."""
    changed = {name for name, flag in flags.items() if getattr(args, name) != flag.default}
    for name, flag in flags.items():
        if name not in changed:
            continue
        needs = [wanted for wanted in flag.requires if wanted.partition("=")[0] in flags]  # a script may lack them
        if needs and not any(_is_on(args, wanted) for wanted in needs):
            wanted = " or ".join(f"--{wanted.replace('=', ' ')}" for wanted in needs)
            yield f"{flag.spelled} does nothing without {wanted}"
        for other in flag.conflicts:
            if getattr(args, name) and other in changed and getattr(args, other):
                yield f"{flag.spelled} and {flags[other].spelled} cannot be given together"


def _is_on(args, wanted):
    name, equals, value = wanted.partition("=")
    return str(getattr(args, name)) == value if equals else bool(getattr(args, name))


def _script():
    return Path(sys.argv[0]).name


def _help(args_class, description):
    """argparse's parser, for the page that --help shows."""
    flags = flags_of(args_class).values()
    wanted = [flag.spelled if flag.positional else f"{flag.spelled} VALUE" for flag in flags if flag.required]
    parser = argparse.ArgumentParser(
        description=description,
        usage=" ".join(["%(prog)s", *wanted, "[--flag value ...]"]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", metavar=CONFIG.metavar, help=CONFIG.help)
    for group, own in groups(args_class):
        section = parser.add_argument_group(title(group))
        for flag in own:
            help = f"{flag.help} ({'; '.join([f'default: {flag.default_text}', *flag.notes])})".replace("%", "%%")
            if flag.positional:
                section.add_argument(flag.name, help=help)
            elif flag.kind is bool:
                section.add_argument(f"--{flag.name}", action=argparse.BooleanOptionalAction, help=help)
            else:
                metavar = flag.metavar
                if flag.choices and not (callable(flag.choices) and metavar):
                    metavar = "{" + ",".join(map(str, flag.allowed)) + "}"
                nargs = "+" if flag.is_list else "?" if flag.is_switch else None
                section.add_argument(f"--{flag.name}", nargs=nargs, metavar=metavar, help=help)
    return parser
