"""The beginning and end of every command.

`@command(parse_args)` makes the main function of a command. Words that it does not understand are refused. Whatever goes wrong
for reasons outside the program (a wrong value, a full disk, no access, too little memory) ends in one line; `line_of` alone
decides which errors these are. Everything else is a bug: its traceback is shown. `python -X dev` shows all tracebacks.
"""

import argparse
import contextlib
import faulthandler
import functools
import os
import re
import runpy
import select
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence

from absl import flags, logging
from ml_collections import ConfigDict, config_flags

from repae_jax import buckets, faults, ranges
from repae_jax.distributed import xla_flags

_unraisablehook = sys.unraisablehook
INTERRUPTED, UNREAD = 130, 141  # exit codes: 128 plus the number of the signal
_OURS = ("repae_jax", "checkpoints_tools", "configs", "launch")
_BUG = "This is a mistake of the program, not of yours: please report it, with all of the lines above and the command."
# Classes, and modules that end with a dot, of errors about files that are no OSError or ValueError.
_FILE_ERRORS = (
    "zipfile.BadZipFile", "zlib.error", "lzma.LZMAError", "builtins.EOFError", "PIL.Image.DecompressionBombError",
    "pyarrow.lib.", "SafetensorError", "safetensors_rust.",
)  # fmt: skip
_ARRAY_LIBRARIES = ("jax", "flax", "optax")
_STATUSES = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "PERMISSION_DENIED", "UNAUTHENTICATED", "ABORTED", "CANCELLED", "NOT_FOUND")
_TENSORFLOW = "tensorflow.python.framework.errors_impl."
_TENSORFLOW_ERRORS = (
    "ResourceExhaustedError", "PermissionDeniedError", "UnauthenticatedError", "NotFoundError", "AlreadyExistsError",
    "UnavailableError", "DeadlineExceededError", "AbortedError", "DataLossError", "FailedPreconditionError", "UnknownError",
)  # fmt: skip
_SMALLER = (
    "take fewer images at a time (--batch_size, config.data.batch_size), for training also raise config.accumulation or "
    "config.mesh.fsdp, or set config.sit.remat='full' and config.vae.remat=True"
)


def command(parse_args: Callable, interrupted: str = "interrupted") -> Callable:
    """Decorates what a command does, a function of its arguments, and returns its main function.

    A command with the options of `add_processes` is connected with the other processes first, which fail together from then on.
    One that takes a config logs information, not only warnings. The main function takes the words of the command line, None for
    those of this process, as `parse_args` does, returns what the command returns, and ends as `ending` says.
    """

    def decorate(run: Callable) -> Callable:
        @functools.wraps(run)
        def main(words: Sequence[str] | None = None):
            with ending(interrupted):
                arguments = parse_args(words)
                xla_flags.check()
            with _processes(arguments), ending(interrupted):
                if isinstance(getattr(arguments, "config", None), ConfigDict):
                    _log_information()
                return run(arguments)

        return main

    return decorate


@contextlib.contextmanager
def _processes(arguments: argparse.Namespace) -> Iterator[None]:
    """Context in which the processes that the command line describes are connected, and end together on errors."""
    if not hasattr(arguments, "coordinator"):
        yield
        return
    from repae_jax.distributed import multihost  # imports JAX, which not all commands need

    with multihost.abort_all_on_error():
        with ending():
            multihost.start(arguments.distributed, arguments.coordinator, arguments.num_processes, arguments.process_id)
        yield


def _log_information() -> None:
    """Sets up logging as absl's `app.run` does: with time and place, and the stacks of a process that crashes."""
    faulthandler.enable()
    logging.use_absl_handler()
    flags.FLAGS.mark_as_parsed()  # otherwise absl, and grain, complain
    logging.set_verbosity(logging.INFO)


# ---- the end ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def ending(interrupted: str = "interrupted") -> Iterator[None]:
    """Ends the program with one line and code 1 on errors that are not bugs; a context, or decorator.

    Ctrl-C ends it with the line given and INTERRUPTED, a closed output (`| head`) silently with UNREAD. The error is the
    context of the SystemExit; one that is a bug gets a note that says so.
    """
    with contextlib.suppress(AttributeError):  # no file, in tests
        sys.stdout.reconfigure(errors="replace")  # in containers it may be ASCII
    if not sys.flags.dev_mode:
        logging.get_absl_logger().addFilter(_without_traceback)
        sys.unraisablehook = _without_closed_loops
    try:
        try:
            yield
        except SystemExit:  # after --help
            sys.stdout.flush()
            raise
        sys.stdout.flush()  # here a failure can still be reported
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        sys.exit(INTERRUPTED)
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _output_is_closed():
            _discard_output()
            sys.exit(UNREAD)
        line = line_of(error)
        if line is None:
            error.add_note(_BUG)
            raise
        if sys.flags.dev_mode:
            traceback.print_exception(error)
        if isinstance(error, OSError):  # perhaps of printing, which Python would try again at its end
            _discard_output()
        sys.exit(f"error: {line}{_hint(error)}")


def _hint(error: Exception) -> str:
    """Returns what follows the line of an error that jax or flax raised: it may be a bug after all."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        module = frame.f_globals.get("__name__", "").partition(".")[0]
    if isinstance(error, ValueError | RuntimeError) and module in _ARRAY_LIBRARIES and not sys.flags.dev_mode:
        return f" (said by {module}; python -X dev shows where)"
    return ""


def _without_traceback(record) -> bool:
    """Log filter that shortens what Orbax logs of a full disk, in each of its threads, to a line."""
    if record.exc_info and record.exc_info[1] and line_of(record.exc_info[1]):
        record.exc_info = None
    return True


def _without_closed_loops(unraisable) -> None:
    """Drops, as sys.unraisablehook, what TensorStore raises for each write that it had begun when Orbax gave up."""
    if str(unraisable.exc_value) != "Event loop is closed":
        _unraisablehook(unraisable)


def _output_is_closed() -> bool:
    with contextlib.suppress(OSError, ValueError, AttributeError):  # no file, in tests
        waiting = select.poll()
        waiting.register(sys.stdout.fileno(), 0)
        return bool(waiting.poll(0))
    return False


def _discard_output() -> None:
    """Discards printed text that cannot be written, so that Python's end raises no further error."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def line_of(error: BaseException) -> str | None:
    """Returns the line that describes an error to a user; None for a bug of the program."""
    message = str(error) or type(error).__name__
    if isinstance(error, MemoryError):
        return f"the memory of this machine ran out ({' '.join(message.split())}): {_SMALLER}"
    if isinstance(error, ImportError):  # a package that is not installed, or broken; our own are there
        return None if (error.name or "").partition(".")[0] in _OURS else message
    if isinstance(error, ValueError | OSError):
        return message
    names = [f"{kind.__module__}.{kind.__qualname__}" for kind in type(error).__mro__]
    if "jax.errors.JaxRuntimeError" in names or "jaxlib._jax.JaxRuntimeError" in names or names[0].endswith("XlaRuntimeError"):
        return _line_of_jax(message)
    if any(name.startswith(_TENSORFLOW) for name in names):
        first = re.sub(r"^{{.*?}} ", "", message.splitlines()[0])  # after the name of an operation
        return first if type(error).__name__ in _TENSORFLOW_ERRORS else None
    if type(error) is RuntimeError or (isinstance(error, RuntimeError) and names[0].startswith(_OURS)):
        return message
    if isinstance(error, flags.Error) or faults.is_of_a_client(error) or any(name.startswith(_FILE_ERRORS) for name in names):
        return f"{type(error).__name__}: {message}"
    if isinstance(error, ExceptionGroup):
        return line_of(error.exceptions[0])
    return line_of(error.__cause__) if error.__cause__ else None


def _line_of_jax(message: str) -> str | None:
    first = message.splitlines()[0]
    if faults.is_out_of_memory(message):
        return f"the memory of the device ran out ({first}): {_SMALLER}"
    return first if message.startswith(_STATUSES) else None


# ---- the beginning ---------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """A parser like argparse's, but names of options must be whole, and a mistake is one line."""

    def __init__(self, *args, **options):
        name = getattr(sys.modules["__main__"].__spec__, "name", "").removesuffix(".__main__")
        if name.startswith(_OURS):  # otherwise argparse calls it __main__.py
            options = {"prog": f"python -m {name}", **options}
        super().__init__(*args, allow_abbrev=False, **options)

    def error(self, message):
        """Ends the program with code 2."""
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults beside the options that have one."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


class ConfigParser(Parser):
    """Parser of a command that takes a config: `--config=FILE[:ARG]`, and `--config.FIELD=VALUE` for each field.

    The arguments have the config, a ConfigDict with the changes, as `config`. Config fields are parsed by ml_collections. If
    there is a text for its help, `then` is a second config, None if it is left out.
    """

    def __init__(self, *args, then: str = "", **options):
        fields = "Fields of the config: --config.FIELD=VALUE, such as --config.data.batch_size=64 or --config.sit.qk_norm=True."
        super().__init__(*args, epilog=fields, **options)
        text = "config file, such as configs/repae.py or configs/repae.py:digits"
        self.add_argument("--config", type=path, required=True, metavar="FILE[:ARG]", help=text)
        self._names = ["config"]
        if then:
            self.add_argument("--then", type=path, metavar="FILE[:ARG]", help=f"{then}; its fields are --then.FIELD=VALUE")
            self._names.append("then")

    def parse_args(self, words=None, namespace=None):  # type: ignore[override]
        """Returns the arguments; SystemExit with one line if a word is not understood, or the config cannot be read."""
        try:
            arguments, left = self.parse_known_args(words_of(words), namespace)
            for name in self._names:
                if (text := getattr(arguments, name)) is not None:
                    config, left = _read_config(name, text, left)
                    setattr(arguments, name, config)
        except (flags.Error, ValueError) as error:
            sys.exit(f"error: {' '.join(str(error).split())}")
        if left:
            advice = ""
            if not left[0].startswith("-"):
                advice = "; a field of the config and its value are one word, --config.FIELD=VALUE"
            elif "then" in self._names and re.match(r"--?then\.", left[0]):
                advice = "; add --then=FILE, the config of the second phase, whose field it is"
            self.error(f"unrecognized arguments: {' '.join(left)}{advice}")
        return arguments


def words_of(words: Sequence[str] | None) -> list[str]:
    """Returns the words of a command line, None for this process's, with those of a --flagfile in its place.

    ValueError if that file cannot be read.
    """
    try:
        return flags.FLAGS.read_flags_from_files(["", *(sys.argv[1:] if words is None else words)], force_gnu=False)[1:]
    except flags.Error as error:
        raise ValueError(" ".join(str(error).split())) from error


def number(rule: ranges.Range) -> Callable[[str], float]:
    """Returns a function from a text to its number, for the `type` of an option."""

    def parse(text):
        try:
            value = int(text) if rule.whole else float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no {'whole ' if rule.whole else ''}number") from None
        if problem := rule.problem(value):
            raise argparse.ArgumentTypeError(f"{text} {problem}")
        return value

    return parse


def whole(least: int, most: int = ranges.LARGEST) -> Callable[[str], float]:
    """Returns `number` of integers from `least` to `most`."""
    return number(ranges.whole(least, most))


seed = number(ranges.SEED)


def image_size(text: str) -> ranges.Extent:
    """Returns the size of images in pixels, 'SIDE' or 'HEIGHT,WIDTH', for the `type` of an option."""
    sides = [whole(1, 2**20)(part) for part in text.split(",")]
    if len(sides) > 2:
        raise argparse.ArgumentTypeError(f"{text!r} has {len(sides)} numbers; allowed: SIDE, or HEIGHT,WIDTH")
    return ranges.as_extent(sides * 2 if len(sides) == 1 else sides)


def path(text: str) -> str:
    """Returns a path or address with the user's folder in the place of ~, for the `type` of an option."""
    if not text:
        raise argparse.ArgumentTypeError("it is empty")
    try:
        buckets.check_client(text)
    except ImportError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return os.path.expanduser(text)


def add_processes(parser: argparse.ArgumentParser) -> None:
    """Adds the options with which a command runs in several processes; `command` starts them."""
    text = "one of several processes that find each other: TPU pod, SLURM, GKE"
    parser.add_argument("--distributed", action="store_true", help=text)
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="by hand instead: of process 0")
    parser.add_argument("--num_processes", type=whole(1), help="by hand: number of processes")
    parser.add_argument("--process_id", type=whole(0), help="by hand: number of this process, from 0")


class _NumberOrNone(flags.ArgumentParser):
    """Parses numbers of a config, some of which may be None; `job/validate.py` knows which."""

    def __init__(self, parser):
        super().__init__()
        self._parser = parser

    def parse(self, argument):
        return None if argument == "None" else self._parser.parse(argument)

    def flag_type(self):
        return f"{self._parser.flag_type()} or None"


def _read_config(flag: str, text: str, words: list[str]) -> tuple[ConfigDict, list[str]]:
    """Returns (the config of FILE[:ARG] with the changes `--flag.FIELD` among the words, the words that are none)."""
    config = _run_config_file(flag, text)
    _check_fields(flag, config, words)
    for kind, parser in ((int, flags.IntegerParser()), (float, flags.FloatParser())):
        config_flags.register_flag_parser_for_type(kind, _NumberOrNone(parser))
    values = flags.FlagValues()
    values.set_gnu_getopt()
    holder = config_flags.DEFINE_config_dict(flag, config, flag_values=values, sys_argv=["", *words])
    _, *left = values(["", *words], known_only=True)
    return holder.value, left


def _run_config_file(flag: str, text: str) -> ConfigDict:
    """Returns the config of FILE[:ARG]; ValueError for whatever its file raises."""
    file, colon, argument = text.partition(":")
    if not os.path.isfile(file):
        raise ValueError(f"--{flag}={text}: there is no file {file!r}")
    try:
        defined = runpy.run_path(file, run_name="config")
        if "get_config" not in defined:
            raise ValueError("the file has no function get_config")
        config = defined["get_config"](*[argument] * bool(colon))
    except (ValueError, OSError) as error:
        raise ValueError(f"--{flag}={text}: {error}") from error
    except Exception as error:  # a config file is a program
        frame = traceback.extract_tb(error.__traceback__)[-1]
        raise ValueError(f"--{flag}={text}: {type(error).__name__}: {error} ({frame.filename}, line {frame.lineno})") from error
    if not isinstance(config, ConfigDict):
        raise ValueError(f"--{flag}={text}: get_config must return a ConfigDict, not {type(config).__name__}")
    return config


def _check_fields(flag: str, config: ConfigDict, words: list[str]) -> None:
    """Raises ValueError if the config lacks a field that the command line names."""
    for word in words:
        match, section, above = re.match(rf"--?(?:no)?{flag}\.([^=]+)", word), config, flag
        for name in match[1].split(".") if match else ():
            if not isinstance(section, ConfigDict | Mapping):
                raise ValueError(f"{word}: {above} is a value, and has no fields")
            if name not in section:
                raise ValueError(f"{word}: {above} has no field {name!r}; it has {', '.join(sorted(section))}")
            section, above = section[name], f"{above}.{name}"
