"""How every command begins and ends.

A command refuses the words that it does not understand. Whatever goes wrong for reasons outside the program (a wrong value, a
full disk, no access, too little memory) ends in one line; which errors these are is decided here alone, by what they are.
Everything else is a mistake of the program: its traceback is shown. `python -X dev` shows that of the others, too.
"""

import argparse
import contextlib
import os
import re
import runpy
import select
import sys
import traceback
from collections.abc import Mapping

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from repae_jax import ranges

flags.disclaim_key_flags()  # what is defined here belongs to the command that calls it

_unraisablehook = sys.unraisablehook
INTERRUPTED, UNREAD = 130, 141  # exit codes: 128 plus the number of the signal
_OURS = ("repae_jax", "checkpoints_tools", "configs")
_BUG = "This is a mistake of the program, not of yours: please report it, with all of the lines above and the command."
# classes, or all those of a module, that are no OSError or ValueError though they tell of files, accounts and networks
_OUTSIDE = (
    "zipfile.BadZipFile", "zlib.error", "lzma.LZMAError", "builtins.EOFError", "PIL.Image.DecompressionBombError",
    "pyarrow.lib.", "SafetensorError", "safetensors_rust.",
    "google.auth.", "google.api_core.", "gcsfs.", "fsspec.", "s3fs.", "botocore.", "aiobotocore.", "aiohttp.", "azure.",
    "httpx.", "requests.", "urllib3.", "huggingface_hub.",
    "absl.flags._exceptions.",
)  # fmt: skip
_OF_ARRAYS = ("jax", "flax", "optax")
_STATUSES = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "PERMISSION_DENIED", "UNAUTHENTICATED", "ABORTED", "CANCELLED", "NOT_FOUND")
_TENSORFLOW = "tensorflow.python.framework.errors_impl."
_OF_TENSORFLOW = (
    "ResourceExhaustedError", "PermissionDeniedError", "UnauthenticatedError", "NotFoundError", "AlreadyExistsError",
    "UnavailableError", "DeadlineExceededError", "AbortedError", "DataLossError", "FailedPreconditionError", "UnknownError",
)  # fmt: skip
_SMALLER = (
    "take fewer images at a time (--batch_size, config.data.batch_size), for training also raise config.accumulation or "
    "config.mesh.fsdp, or set config.sit.remat='full' and config.vae.remat=True"
)


# ---------------------------------------------------------------------------------------------------------------------
# The end.
# ---------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def ending(interrupted="interrupted"):
    """Ends the program with one line and code 1 for errors that are not its own; a context, or decorator of a main function.

    Ctrl-C ends it with a line and INTERRUPTED, a reader that is gone (`| head`) without a word and UNREAD.

    Args:
      interrupted: what Ctrl-C says.

    Raises:
      SystemExit: with the line. The error is its context.
      Exception: the error itself if it is a mistake of the program, with a note that says so.
    """
    with contextlib.suppress(AttributeError):  # no file, in tests
        sys.stdout.reconfigure(errors="replace")  # of containers, may know ASCII alone
    if not sys.flags.dev_mode:
        logging.get_absl_logger().addFilter(_without_traceback)
        sys.unraisablehook = _without_closed_loops
    try:
        try:
            yield
        except SystemExit:  # after --help
            sys.stdout.flush()
            raise
        sys.stdout.flush()  # here it can still be said that this fails
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        sys.exit(INTERRUPTED)
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _reader_is_gone():
            _forget_output()
            sys.exit(UNREAD)
        line = line_of(error)
        if line is None:
            error.add_note(_BUG)
            raise
        if sys.flags.dev_mode:
            traceback.print_exception(error)
        if isinstance(error, OSError):  # perhaps of what is printed, which Python would try again at its end
            _forget_output()
        sys.exit(f"error: {line}{_hint(error)}")


def _hint(error):
    """What follows the line of an error that jax or flax raised of itself: it may be a mistake of the program after all."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        module = frame.f_globals.get("__name__", "").partition(".")[0]
    if isinstance(error, ValueError | RuntimeError) and module in _OF_ARRAYS and not sys.flags.dev_mode:
        return f" (said by {module}; python -X dev shows where)"
    return ""


def _without_traceback(record):
    """Log filter: what Orbax says of a full disk, in each of its threads, is a line, too."""
    if record.exc_info and record.exc_info[1] and line_of(record.exc_info[1]):
        record.exc_info = None
    return True


def _without_closed_loops(unraisable):
    """sys.unraisablehook that drops what TensorStore raises of every write that it had begun when Orbax gave up."""
    if str(unraisable.exc_value) != "Event loop is closed":
        _unraisablehook(unraisable)


def _reader_is_gone():
    with contextlib.suppress(OSError, ValueError, AttributeError):  # no file, in tests
        waiting = select.poll()
        waiting.register(sys.stdout.fileno(), 0)
        return bool(waiting.poll(0))
    return False


def _forget_output():
    """What is printed and was not written yet, if it cannot be, is lost without a further error."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def line_of(error):
    """Returns the line that tells a user of an error; None for one that is a mistake of the program.

    Args:
      error: Exception.
    """
    said = str(error) or type(error).__name__
    if isinstance(error, MemoryError):
        return f"the memory of this machine ran out ({' '.join(said.split())}): {_SMALLER}"
    if isinstance(error, ImportError):  # of a package that is not installed, or is broken; one of ours is there
        return None if (error.name or "").partition(".")[0] in _OURS else said
    if isinstance(error, ValueError | OSError):
        return said
    names = [f"{kind.__module__}.{kind.__qualname__}" for kind in type(error).__mro__]
    if "jax.errors.JaxRuntimeError" in names or "jaxlib._jax.JaxRuntimeError" in names or names[0].endswith("XlaRuntimeError"):
        return _line_of_jax(said)
    if any(name.startswith(_TENSORFLOW) for name in names):
        first = re.sub(r"^{{.*?}} ", "", said.splitlines()[0])  # after the name of an operation
        return first if type(error).__name__ in _OF_TENSORFLOW else None
    if type(error) is RuntimeError or (isinstance(error, RuntimeError) and names[0].startswith(_OURS)):
        return said
    if any(name.startswith(_OUTSIDE) for name in names):
        return f"{type(error).__name__}: {said}"
    if isinstance(error, ExceptionGroup):
        return line_of(error.exceptions[0])
    return error.__cause__ and line_of(error.__cause__)


def _line_of_jax(said):
    first = said.splitlines()[0]
    if "RESOURCE_EXHAUSTED" in said or "out of memory" in said.lower():
        return f"the memory of the device ran out ({first}): {_SMALLER}"
    return first if said.startswith(_STATUSES) else None


# ---------------------------------------------------------------------------------------------------------------------
# The beginning, by argparse.
# ---------------------------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """argparse's, but names of options must be whole, and a mistake is one line."""

    def __init__(self, *args, **options):
        name = getattr(sys.modules["__main__"].__spec__, "name", "").removesuffix(".__main__")
        if name.startswith(_OURS):  # else argparse calls it __main__.py
            options = {"prog": f"python -m {name}", **options}
        super().__init__(*args, allow_abbrev=False, **options)

    def error(self, message):
        """Ends the program with code 2."""
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")


def number(rule):
    """Returns a function from a text to its number, for the `type` of an option; `rule` is a Range."""

    def parse(text):
        try:
            value = int(text) if rule.whole else float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no {'whole ' if rule.whole else ''}number") from None
        found = rule.problem(value)
        if found:
            raise argparse.ArgumentTypeError(f"{text} {found}")
        return value

    return parse


def whole(least, most=ranges.LARGEST):
    """Returns `number` of integers from `least` to `most`."""
    return number(ranges.whole(least, most))


seed = number(ranges.SEED)


def path(text):
    """Returns a path or address with the user's folder in the place of ~, for the `type` of an option."""
    if not text:
        raise argparse.ArgumentTypeError("it is empty")
    return os.path.expanduser(text)


# ---------------------------------------------------------------------------------------------------------------------
# The beginning, by absl's flags, which commands that take a config have.
# ---------------------------------------------------------------------------------------------------------------------


class _NumberOrNone(flags.ArgumentParser):
    """Of a config's numbers, some of which may be None; which ones is a rule of theirs."""

    def __init__(self, parser):
        super().__init__()
        self._parser = parser

    def parse(self, argument):
        return None if argument == "None" else self._parser.parse(argument)

    def flag_type(self):
        return f"{self._parser.flag_type()} or None"


def define_config():
    """Defines the flag --config of the command that calls this."""
    for kind, parser in ((int, flags.IntegerParser()), (float, flags.FloatParser())):
        config_flags.register_flag_parser_for_type(kind, _NumberOrNone(parser))
    config_flags.DEFINE_config_file("config", None, "Config file, e.g. configs/repae.py or configs/repae.py:digits.")
    flags.mark_flag_as_required("config")


def define_processes():
    """Defines the flags that tell of several processes, for `start_processes`."""
    flags.DEFINE_bool("distributed", False, "One of several processes that find each other: TPU pod, SLURM, GKE.")
    flags.DEFINE_string("coordinator", None, "By hand instead: HOST:PORT of process 0.")
    flags.DEFINE_integer("num_processes", None, "By hand: how many there are.", lower_bound=1)
    flags.DEFINE_integer("process_id", None, "By hand: which one this is, from 0.", lower_bound=0)


def start_processes():
    """Connects this process with the others that the command line tells of, if any."""
    from repae_jax.distributed import multihost  # imports JAX, which not all commands do

    options = flags.FLAGS
    multihost.start(options.distributed, options.coordinator, options.num_processes, options.process_id)


class _PathParser(flags.ArgumentParser):
    """Parses paths as `path` does."""

    def parse(self, argument):
        try:
            return path(argument)
        except argparse.ArgumentTypeError as error:
            raise ValueError(error) from error

    def flag_type(self):
        return "path"


def define_path(name, text):
    """Defines a flag that is a path or an address."""
    flags.DEFINE(_PathParser(), name, None, text, serializer=flags.ArgumentSerializer())


def run(main, define_flags):
    """Runs a command whose flags are absl's, defined by `define_flags`, and ends the program."""
    with ending():
        define_flags()
        app.run(main, flags_parser=parse_flags)


def parse_flags(arguments):
    """Reads absl's flags and the config.

    Args:
      arguments: the words of the command line, its name first.

    Returns:
      The name, as a list.

    Raises:
      SystemExit: with one line if a word is not understood, a flag has a wrong value, or the config cannot be read; with 0
        after --help.
    """
    try:
        arguments, file = _with_config_file(flags.FLAGS.read_flags_from_files(arguments, force_gnu=False))
        if file is not None:
            _check_overrides(_read_config(file), arguments)
        left = flags.FLAGS(arguments)
    except SystemExit:  # of --help alone, by absl with 1
        sys.exit(0)
    except (flags.Error, ValueError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
    if left[1:]:
        sys.exit(f"error: {' '.join(map(repr, left[1:]))} not understood: a flag and its value are one word, --FLAG=VALUE")
    return left


def _with_config_file(arguments):
    """Returns (the arguments, ~ of --config=~/mine.py replaced, which bash keeps; the value of --config or None)."""
    arguments, file = list(arguments), None
    for index, word in enumerate(arguments):
        name, equals, value = word.partition("=")
        if name in ("-config", "--config"):
            if not equals and index + 1 < len(arguments):
                arguments[index + 1] = file = os.path.expanduser(arguments[index + 1])
            elif equals:
                file = os.path.expanduser(value)
                arguments[index] = f"{name}={file}"
    return arguments, file


def _read_config(text):
    """Returns the config without the changes of the command line; ValueError in the place of whatever its file raises."""
    path, colon, argument = text.partition(":")
    if not os.path.isfile(path):
        raise ValueError(f"--config={text}: there is no file {path!r}")
    try:
        defined = runpy.run_path(path, run_name="config")
        if "get_config" not in defined:
            raise ValueError("the file has no function get_config")
        config = defined["get_config"](*[argument] * bool(colon))
    except (ValueError, OSError) as error:
        raise ValueError(f"--config={text}: {error}") from error
    except Exception as error:  # a config file is a program
        frame = traceback.extract_tb(error.__traceback__)[-1]
        raise ValueError(f"--config={text}: {type(error).__name__}: {error} ({frame.filename}, line {frame.lineno})") from error
    if not isinstance(config, ConfigDict):
        raise ValueError(f"--config={text}: get_config must return a ConfigDict, not {type(config).__name__}")
    return config


def _check_overrides(config, arguments):
    """Raises ValueError if the config has no field of a name that the command line gives."""
    for word in arguments:
        found = re.match(r"--?(?:no)?config\.([^=]+)", word)
        section, above = config, "config"
        for name in found[1].split(".") if found else ():
            if not isinstance(section, ConfigDict | Mapping):
                raise ValueError(f"{word}: {above} is a value, and has no fields")
            if name not in section:
                raise ValueError(f"{word}: {above} has no field {name!r}; it has {', '.join(sorted(section))}")
            section, above = section[name], f"{above}.{name}"
